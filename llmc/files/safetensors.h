/*
The safetensors format (Hugging Face), both ways: what checkpoints, exports and dumps are made of.

    file   = N (8 bytes, little-endian), header (N bytes of JSON), data
    header = {"NAME": {"dtype": "F32", "shape": [8, 768], "data_offsets": [begin, end]}, ...}

A name "__metadata__" holds remarks, which are ignored. Begin and end count from the start of data; the
tensors lie there without gap or overlap, up to the end of the file. All of that is checked when a file is
opened. Sizes in 64 bits. The reader maps the file; the writer streams it: tensors are declared first, then
their values follow in that order, in pieces of any size.

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
#include "llmc/files/newfile.h"

#define SAFETENSORS_MAX_DIMS 8
#define SAFETENSORS_MAX_HEADER 100000000 // the format's own limit

typedef struct {
    const char *name;
    const char *dtype;
    int ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t offset; // first byte, from the start of the file (writer: of data)
    uint64_t size;   // bytes
} SafetensorsEntry;

typedef struct {
    const char *path;
    const char *hint;          // the command that would make or mend the file
    const unsigned char *data; // the whole file
    uint64_t size;
    JsonArena arena;           // owns the names
    SafetensorsEntry *entries; // sorted by name
    size_t count;
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

// bytes an element, 0 for a dtype we do not know
static inline uint64_t safetensors_dtype_size(const char *dtype) {
    static const char *const names[] = {"F32", "BF16", "F16", "F64", "I64",  "I32",     "I16",    "I8",
                                        "U64", "U32",  "U16", "U8",  "BOOL", "F8_E4M3", "F8_E5M2"};
    static const int sizes[] = {4, 2, 2, 8, 8, 4, 2, 1, 8, 4, 2, 1, 1, 1, 1};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (strcmp(dtype, names[i]) == 0) {
            return (uint64_t)sizes[i];
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
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status) != 0) {
        die("cannot open %s: %s%s%s", path, strerror(errno), hint[0] ? "\n  ---> " : "", hint);
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
    munmap((void *)st->data, (size_t)st->size);
    free(st->entries);
    json_arena_free(&st->arena);
    free(st);
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
    const unsigned char *in = st->data + entry->offset + first * element;
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

static inline void safetensors_read_f32(const Safetensors *st, const SafetensorsEntry *entry, float *out) {
    safetensors_read_f32_range(st, entry, 0, safetensors_num_elements(entry), out);
}

// ----------------------------------------------------------------------------
// writer

typedef struct {
    NewFile file;
    JsonArena arena;           // owns the names
    SafetensorsEntry *entries; // as declared
    size_t count;
    size_t current;   // tensor being written
    uint64_t written; // bytes of it
    uint64_t total;   // bytes of all
} SafetensorsWriter;

static inline void safetensors_writer_open(SafetensorsWriter *w, const char *path) {
    memset(w, 0, sizeof(*w));
    newfile_open(&w->file, path);
}

// dtype: "F32" or "BF16"; before safetensors_write_header
static inline void safetensors_declare(SafetensorsWriter *w, const char *name, const char *dtype, int ndim,
                                       const int64_t *shape) {
    int is_bf16 = strcmp(dtype, "BF16") == 0;
    if ((!is_bf16 && strcmp(dtype, "F32") != 0) || ndim < 0 || ndim > SAFETENSORS_MAX_DIMS) {
        die("%s: tensor %s cannot be written as %s with %d dimensions", w->file.path, name, dtype, ndim);
    }
    if ((w->count & (w->count - 1)) == 0) { // full at each power of two
        w->entries = GROW(SafetensorsEntry, w->entries, w->count ? 2 * w->count : 1);
    }
    SafetensorsEntry *entry = &w->entries[w->count++];
    memset(entry, 0, sizeof(*entry));
    entry->name = safetensors_copy_text(&w->arena, name);
    entry->dtype = is_bf16 ? "BF16" : "F32";
    entry->ndim = ndim;
    for (int i = 0; i < ndim; i++) {
        entry->shape[i] = shape[i];
    }
    entry->offset = w->total;
    entry->size = safetensors_num_elements(entry) * (is_bf16 ? 2 : 4);
    w->total += entry->size;
}

static inline void safetensors_print_entry(FILE *out, const SafetensorsEntry *entry) {
    char shape[256];
    safetensors_format_shape(shape, sizeof(shape), entry->ndim, entry->shape);
    fputc(',', out);
    json_write_string(out, entry->name, strlen(entry->name));
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}", entry->dtype, shape,
            (unsigned long long)entry->offset, (unsigned long long)(entry->offset + entry->size));
}

// a complete tensor, or an empty one, makes room for the next
static inline void safetensors_skip_complete(SafetensorsWriter *w) {
    while (w->current < w->count && w->written == w->entries[w->current].size) {
        w->current++;
        w->written = 0;
    }
}

static inline void safetensors_write_header(SafetensorsWriter *w) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) {
        die("out of memory for the header of %s", w->file.path);
    }
    fprintf(out, "{\"__metadata__\":{\"format\":\"pt\"}"); // without it transformers refuses the file
    for (size_t i = 0; i < w->count; i++) {
        safetensors_print_entry(out, &w->entries[i]);
    }
    fputc('}', out);
    while ((8 + ftell(out)) % 64 != 0) {
        fputc(' ', out); // data begins at a multiple of 64 bytes
    }
    fclose(out);
    uint64_t n = size;
    newfile_write(&w->file, &n, 8, 1);
    newfile_write(&w->file, text, 1, size);
    free(text);
    safetensors_skip_complete(w);
}

static inline void safetensors_write_bf16(SafetensorsWriter *w, const float *x, size_t n) {
    uint16_t half[4096];
    for (size_t done = 0; done < n;) {
        size_t piece = n - done < 4096 ? n - done : 4096;
        for (size_t i = 0; i < piece; i++) {
            half[i] = float_to_bf16(x[done + i]);
        }
        newfile_write(&w->file, half, 2, piece);
        done += piece;
    }
}

// the next n values of the tensor being written
static inline void safetensors_write_f32(SafetensorsWriter *w, const float *x, size_t n) {
    if (n == 0) {
        return;
    }
    const SafetensorsEntry *entry = w->current < w->count ? &w->entries[w->current] : NULL;
    uint64_t bytes = entry == NULL ? 0 : n * safetensors_dtype_size(entry->dtype);
    if (entry == NULL || bytes > entry->size - w->written) {
        die("%s: more values than declared for %s", w->file.path,
            entry == NULL ? "all tensors" : entry->name);
    }
    if (entry->dtype[0] == 'B') {
        safetensors_write_bf16(w, x, n);
    } else {
        newfile_write(&w->file, x, 4, n);
    }
    w->written += bytes;
    safetensors_skip_complete(w);
}

// the file gets its name here, and only if it is whole
static inline void safetensors_writer_finish(SafetensorsWriter *w) {
    if (w->current != w->count) {
        die("%s: tensor %s was not written to its end", w->file.path, w->entries[w->current].name);
    }
    newfile_close(&w->file);
    free(w->entries);
    json_arena_free(&w->arena);
}

#endif
