/*
Flat buffers in safetensors files: the tensors of the table, named PREFIX + NAME, from and to the ranges that
a process keeps of them (ranges.h), piece by piece.

Shapes: model.h's. Errors: as in safetensors.h and safetensors_writer.h.
*/
#ifndef BUFFER_FILES_H
#define BUFFER_FILES_H

#include "llmc/files/folder.h"
#include "llmc/files/safetensors.h"
#include "llmc/files/safetensors_writer.h"
#include "llmc/ranges.h"

enum { TENSOR_NAME_SIZE = 128 };
static_assert(sizeof(((Tensor *)0)->shape) / sizeof(int64_t) <= SAFETENSORS_MAX_DIMS,
              "the format takes our shapes");

// dtype: of the parameters; state is small, and kept exactly
static inline void declare_buffer(SafetensorsWriter *w, const FlatBuffer *buffer, const char *prefix,
                                  const char *dtype) {
    for (int i = 0; i < buffer_tensors(buffer); i++) {
        const Tensor *tensor = &buffer->table->tensors[i];
        char name[TENSOR_NAME_SIZE];
        check_format(name, sizeof(name), "%s%s", prefix, tensor->name);
        safetensors_declare(w, name, i < buffer->table->trained_count ? dtype : "F32", tensor->ndim,
                            tensor->shape);
    }
}

// what is kept here of a buffer whose first tensor has that number in the file
static inline void write_buffer(SafetensorsWriter *w, size_t first_tensor, const FlatBuffer *buffer) {
    float *values = NEW(float, MOST_IN_PIECE);
    for (int i = 0; i < buffer_tensors(buffer); i++) {
        for (Piece p = before_first_piece; next_piece(&p, &buffer->table->tensors[i], buffer);) {
            buffer->get(buffer->owner, buffer->which, p.first, p.n, values);
            safetensors_write_at(w, first_tensor + (size_t)i, (uint64_t)p.element, values, (uint64_t)p.n);
        }
    }
    free(values);
}

// so many buffers [count], one after the other, as tensors prefix + NAME; with the file goes its temporary
// folder, should a rank fail
static inline void save_buffers(Ranks *ranks, const char *folder, const char *file, const FlatBuffer *buffers,
                                const char *const *prefixes, int count, const char *dtype) {
    char path[PATH_SIZE];
    SafetensorsWriter writer;
    check_format(path, sizeof(path), "%s/%s", folder, file);
    safetensors_writer_open(&writer, path);
    writer.folder = folder;
    for (int b = 0; b < count; b++) {
        declare_buffer(&writer, &buffers[b], prefixes[b], dtype);
    }
    safetensors_begin(&writer, ranks);
    for (int b = 0, first = 0; b < count; first += buffer_tensors(&buffers[b++])) {
        write_buffer(&writer, (size_t)first, &buffers[b]);
    }
    safetensors_finish(&writer, ranks);
}

// what is kept here of one buffer
static inline void load_buffer(const FlatBuffer *buffer, const Safetensors *st, const char *prefix) {
    float *values = NEW(float, MOST_IN_PIECE);
    for (int i = 0; i < buffer_tensors(buffer); i++) {
        const Tensor *tensor = &buffer->table->tensors[i];
        char name[TENSOR_NAME_SIZE];
        check_format(name, sizeof(name), "%s%s", prefix, tensor->name);
        const SafetensorsEntry *entry = safetensors_require(st, name, tensor->ndim, tensor->shape);
        for (Piece p = before_first_piece; next_piece(&p, tensor, buffer);) {
            safetensors_read_f32_range(st, entry, (uint64_t)p.element, (uint64_t)p.n, values);
            safetensors_release(entry, (uint64_t)p.element, (uint64_t)p.n);
            buffer->set(buffer->owner, buffer->which, p.first, p.n, values);
        }
    }
    free(values);
}

#endif
