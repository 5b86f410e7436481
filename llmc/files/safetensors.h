/*
The safetensors format (Hugging Face), of which checkpoints, exports and dumps are made, and its reader;
safetensors_writer.h writes it.

    file   = N (8 bytes, little-endian), header (N bytes of JSON), data
    header = {"NAME": {"dtype": "F32", "shape": [8, 768], "data_offsets": [begin, end]}, ...}

A name "__metadata__" holds remarks, which are ignored. Begin and end count from the start of data; the
tensors lie there without gap or overlap, up to the end of the file. All of that is checked when a file is
opened. Sizes in 64 bits. The file is mapped, not read.

Shapes: any up to 8 dimensions. Errors: a file that is no such file, or does not hold a tensor in the shape
that is required, dies naming file, tensor, what was found and what was expected.
*/
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: open, mmap, munmap, fstat, close
#include "llmc/check.h"
#include "llmc/files/json.h"

#define SAFETENSORS_MAX_DIMS 8
#define SAFETENSORS_MAX_HEADER 100000000 // the format's own limit

typedef struct {
    const char *name;
    const char *dtype;
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t offset;           // first byte, from the start of the file (writer: of data)
    uint64_t size;             // bytes
    const unsigned char *data; // reader: the first byte in memory
} SafetensorsEntry;

typedef struct Safetensors {
    const char *path;
    const char *hint;          // the command that would make or mend the file
    const unsigned char *data; // the whole file
    uint64_t size;
    JsonArena arena;           // owns the names
    SafetensorsEntry *entries; // sorted by name
    size_t count;
    struct Safetensors *next; // another file, which is closed with this one (weight_files.h)
} Safetensors;

// ----------------------------------------------------------------------------
// numbers

static inline float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static inline float bf16_to_float(uint16_t h) {
    return float_from_bits((uint32_t)h << 16);
}

// to nearest, ties to even; NaN stays NaN
static inline uint16_t float_to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    if (x != x) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = h >> 10 & 31;
    uint32_t mantissa = h & 0x3FF;
    if (exponent == 31) { // infinity, NaN
        return float_from_bits(sign | 0x7F800000 | mantissa << 13);
    }
    if (exponent == 0) { // zero, subnormal: mantissa * 2^-24, exact
        float x = (float)mantissa / 16777216.0f;
        return sign ? -x : x;
    }
    return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// bytes per element, 0 for a dtype we do not know
static inline uint64_t safetensors_dtype_size(const char *dtype) {
    static const struct {
        const char *name;
        uint64_t size;
    } dtypes[] = {{"F32", 4}, {"BF16", 2}, {"F16", 2},  {"F64", 8},     {"I64", 8},
                  {"I32", 4}, {"I16", 2},  {"I8", 1},   {"U64", 8},     {"U32", 4},
                  {"U16", 2}, {"U8", 1},   {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]); i++) {
        if (strcmp(dtype, dtypes[i].name) == 0) {
            return dtypes[i].size;
        }
    }
    return 0;
}

static inline uint64_t safetensors_num_elements(const SafetensorsEntry *entry) {
    uint64_t n = 1;
    for (int i = 0; i < entry->ndim; i++) {
        n *= (uint64_t)entry->shape[i];
    }
    return n;
}

// ----------------------------------------------------------------------------
// reader: the header

PRINTF_LIKE(2, 3)
__attribute__((noreturn)) static inline void safetensors_refuse(const Safetensors *st, const char *fmt, ...) {
    char cause[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(cause, sizeof(cause), fmt, args);
    va_end(args);
    die("%s is not a good safetensors file: %s%s%s", st->path, cause, st->hint[0] ? "\n  ---> " : "",
        st->hint);
}

// the JSON of a shape: non-negative integers, whose product times the size of an element fits 64 bits
static inline void safetensors_parse_shape(const Safetensors *st, const Json *shape,
                                           SafetensorsEntry *entry) {
    if (shape == NULL || shape->type != JSON_ARRAY || shape->count > SAFETENSORS_MAX_DIMS) {
        safetensors_refuse(st, "tensor %.200s needs a shape of at most %d dimensions", entry->name,
                           SAFETENSORS_MAX_DIMS);
    }
    uint64_t n = 1, element = safetensors_dtype_size(entry->dtype);
    int overflow = 0;
    for (const Json *dim = shape->child; dim != NULL; dim = dim->next) {
        int64_t *size = &entry->shape[entry->ndim++];
        if (!json_int64(dim, size) || *size < 0) {
            safetensors_refuse(st, "a dimension of tensor %.200s is not a size", entry->name);
        }
        overflow |= __builtin_mul_overflow(n, (uint64_t)*size, &n);
    }
    overflow |= element != 0 && __builtin_mul_overflow(n, element, &n);
    if (overflow || (element != 0 && n != entry->size)) {
        safetensors_refuse(st, "tensor %.200s has %llu bytes, which its shape and dtype %.20s contradict",
                           entry->name, (unsigned long long)entry->size, entry->dtype);
    }
}

static inline void safetensors_parse_entry(const Safetensors *st, const Json *json, uint64_t data_start,
                                           SafetensorsEntry *entry) {
    const Json *dtype = json_get(json, "dtype");
    const Json *offsets = json_get(json, "data_offsets");
    int64_t begin = 0, end = 0;
    entry->name = json->key;
    if (strlen(json->key) != json->key_size) {
        safetensors_refuse(st, "the name of tensor %.200s... holds a zero byte", entry->name);
    }
    if (json->type != JSON_OBJECT || json_duplicate_key(json) != NULL) {
        safetensors_refuse(st, "tensor %.200s is not described by an object with distinct names",
                           entry->name);
    }
    if (dtype == NULL || dtype->type != JSON_STRING) {
        safetensors_refuse(st, "tensor %.200s has no dtype", entry->name);
    }
    if (offsets == NULL || offsets->type != JSON_ARRAY || offsets->count != 2 ||
        !json_int64(offsets->child, &begin) || !json_int64(offsets->child->next, &end)) {
        safetensors_refuse(st, "tensor %.200s needs data_offsets: [begin, end]", entry->name);
    }
    if (begin < 0 || begin > end || (uint64_t)end > st->size - data_start) {
        safetensors_refuse(st,
                           "data_offsets [%lld, %lld] of tensor %.200s lie outside of the file's %llu bytes",
                           (long long)begin, (long long)end, entry->name, (unsigned long long)st->size);
    }
    entry->dtype = dtype->text;
    entry->offset = data_start + (uint64_t)begin;
    entry->data = st->data + entry->offset;
    entry->size = (uint64_t)(end - begin);
    safetensors_parse_shape(st, json_get(json, "shape"), entry);
}

static inline int safetensors_compare_offsets(const void *a, const void *b) {
    const SafetensorsEntry *x = (const SafetensorsEntry *)a;
    const SafetensorsEntry *y = (const SafetensorsEntry *)b;
    if (x->offset != y->offset) {
        return x->offset < y->offset ? -1 : 1;
    }
    return (x->size > y->size) - (x->size < y->size); // empty ones first
}

static inline int safetensors_compare_names(const void *a, const void *b) {
    return strcmp(((const SafetensorsEntry *)a)->name, ((const SafetensorsEntry *)b)->name);
}

// no gap, no overlap, nothing behind the last
static inline void safetensors_check_layout(const Safetensors *st, uint64_t data_start) {
    uint64_t expected = data_start;
    qsort(st->entries, st->count, sizeof(SafetensorsEntry), safetensors_compare_offsets);
    for (size_t i = 0; i < st->count; i++) {
        const SafetensorsEntry *entry = &st->entries[i];
        if (entry->offset != expected) {
            safetensors_refuse(st, "tensor %.200s %s", entry->name,
                               entry->offset < expected ? "overlaps another" : "follows a gap in the data");
        }
        expected += entry->size;
    }
    if (expected != st->size) {
        safetensors_refuse(st, "%llu bytes, but its tensors end at byte %llu", (unsigned long long)st->size,
                           (unsigned long long)expected);
    }
}

// where data begins; N is checked against the file
static inline uint64_t safetensors_data_start(const Safetensors *st) {
    uint64_t n = 0;
    if (st->size < 8) {
        safetensors_refuse(st, "it has %llu bytes, the length of its header alone needs 8",
                           (unsigned long long)st->size);
    }
    memcpy(&n, st->data, 8);
    if (n > SAFETENSORS_MAX_HEADER || n > st->size - 8 || n < 2 || st->data[8] != '{') {
        safetensors_refuse(st,
                           "%llu bytes, said to begin with a header of %llu (truncated, or another format)",
                           (unsigned long long)st->size, (unsigned long long)n);
    }
    return 8 + n;
}

// fills entries from st->data
static inline void safetensors_read_header(Safetensors *st) {
    char error[256];
    uint64_t data_start = safetensors_data_start(st);
    const char *text = (const char *)st->data + 8;
    const Json *header = json_parse(text, (size_t)data_start - 8, &st->arena, error, sizeof(error));
    if (header == NULL) {
        safetensors_refuse(st, "header: %s", error);
    }
    const char *twice = json_duplicate_key(header);
    if (twice != NULL) {
        safetensors_refuse(st, "two tensors named %.200s", twice);
    }
    st->entries = NEW(SafetensorsEntry, header->count);
    for (const Json *json = header->child; json != NULL; json = json->next) {
        if (strcmp(json->key, "__metadata__") != 0) {
            safetensors_parse_entry(st, json, data_start, &st->entries[st->count]);
            st->count++;
        }
    }
    safetensors_check_layout(st, data_start);
    qsort(st->entries, st->count, sizeof(SafetensorsEntry), safetensors_compare_names);
}

static inline char *safetensors_copy_text(JsonArena *arena, const char *text) {
    size_t size = strlen(text) + 1;
    return (char *)memcpy(json_arena_take(arena, size), text, size);
}

// hint: the command that would make or mend the file ("" when there is none)
static inline Safetensors *safetensors_open(const char *path, const char *hint) {
    struct stat status;
    Safetensors *st = NEW(Safetensors, 1);
    st->path = safetensors_copy_text(&st->arena, path);
    st->hint = safetensors_copy_text(&st->arena, hint);
    int file = open(path, O_RDONLY | O_NONBLOCK); // so that a FIFO is refused, not waited for
    if (file < 0 || fstat(file, &status) != 0) {
        die_unopened(path, hint);
    }
    if (!S_ISREG(status.st_mode) || status.st_size == 0) {
        safetensors_refuse(st, "%s", S_ISREG(status.st_mode) ? "it is empty" : "it is not a regular file");
    }
    st->size = (uint64_t)status.st_size;
    void *data = mmap(NULL, (size_t)st->size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) {
        die("cannot map %s into memory: %s", path, strerror(errno));
    }
    close(file);
    st->data = (const unsigned char *)data;
    safetensors_read_header(st);
    return st;
}

static inline void safetensors_close(Safetensors *st) {
    while (st != NULL) {
        Safetensors *next = st->next;
        if (st->data != NULL) {
            munmap((void *)st->data, (size_t)st->size);
        }
        free(st->entries);
        json_arena_free(&st->arena);
        free(st);
        st = next;
    }
}

// ----------------------------------------------------------------------------
// reader: tensors

// NULL when the file has no such tensor
static inline const SafetensorsEntry *safetensors_find(const Safetensors *st, const char *name) {
    size_t low = 0, high = st->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(name, st->entries[middle].name);
        if (order == 0) {
            return &st->entries[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

// "[8, 768]"
static inline void safetensors_format_shape(char *out, size_t capacity, int ndim, const int64_t *shape) {
    size_t used = (size_t)snprintf(out, capacity, "[");
    for (int i = 0; i < ndim && used < capacity; i++) {
        used += (size_t)snprintf(out + used, capacity - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
    }
    if (used < capacity) {
        snprintf(out + used, capacity - used, "]");
    }
}

// the tensor, which must be there in this shape
static inline const SafetensorsEntry *safetensors_require(const Safetensors *st, const char *name, int ndim,
                                                          const int64_t *shape) {
    char found[256], expected[256];
    const SafetensorsEntry *entry = safetensors_find(st, name);
    const char *arrow = st->hint[0] ? "\n  ---> " : "";
    safetensors_format_shape(expected, sizeof(expected), ndim, shape);
    if (entry == NULL) {
        die("%s has no tensor %s, expected with shape %s%s%s", st->path, name, expected, arrow, st->hint);
    }
    safetensors_format_shape(found, sizeof(found), entry->ndim, entry->shape);
    if (strcmp(found, expected) != 0) {
        die("%s: tensor %s has shape %s, expected %s%s%s", st->path, name, found, expected, arrow, st->hint);
    }
    return entry;
}

// elements [first, first + n) of a floating-point tensor
static inline void safetensors_read_f32_range(const Safetensors *st, const SafetensorsEntry *entry,
                                              uint64_t first, uint64_t n, float *out) {
    uint64_t element = safetensors_dtype_size(entry->dtype);
    if (entry->dtype[0] != 'F' && strcmp(entry->dtype, "BF16") != 0) {
        element = 0;
    }
    if (first > safetensors_num_elements(entry) || n > safetensors_num_elements(entry) - first) {
        die("%s: read beyond the end of tensor %s", st->path, entry->name);
    }
    const unsigned char *in = entry->data + first * element;
    if (strcmp(entry->dtype, "F32") == 0) {
        memcpy(out, in, (size_t)(4 * n));
    } else if (strcmp(entry->dtype, "F64") == 0) {
        for (uint64_t i = 0; i < n; i++) {
            double x;
            memcpy(&x, in + 8 * i, sizeof(x)); // data may lie at any address
            out[i] = (float)x;
        }
    } else if (element == 2) {
        int is_bf16 = entry->dtype[0] == 'B';
        for (uint64_t i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, in + 2 * i, sizeof(h));
            out[i] = is_bf16 ? bf16_to_float(h) : f16_to_float(h);
        }
    } else {
        die("%s: tensor %s has dtype %.20s, expected F32, BF16, F16 or F64\n  ---> convert it to one of them",
            st->path, entry->name, entry->dtype);
    }
}

// Lets go of the memory of what was read: a mapped file counts as this process's as far as it was touched
static inline void safetensors_release(const SafetensorsEntry *entry, uint64_t first, uint64_t n) {
    uint64_t element = safetensors_dtype_size(entry->dtype), page = (uint64_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)(entry->data + first * element) / page * page;
    uintptr_t end = (uintptr_t)(entry->data + (first + n) * element);
    madvise((void *)begin, (size_t)(end - begin), MADV_DONTNEED); // unchanged, it is read again
}

static inline void safetensors_read_f32(const Safetensors *st, const SafetensorsEntry *entry, float *out) {
    safetensors_read_f32_range(st, entry, 0, safetensors_num_elements(entry), out);
}

#endif
