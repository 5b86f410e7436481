/*
Writes a safetensors file (safetensors.h has the format) as a stream: tensors are declared first, then their
values follow in that order, in pieces of any size. So neither the file nor a whole tensor need be in memory.

    open -> declare NAME, dtype, shape ... -> write_header -> write_f32 values ... -> finish

Shapes: any up to 8 dimensions, F32 or BF16. Errors: values that were not declared, or are missing, die.
*/
#ifndef SAFETENSORS_WRITER_H
#define SAFETENSORS_WRITER_H

#include "llmc/files/newfile.h"
#include "llmc/files/safetensors.h"

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
