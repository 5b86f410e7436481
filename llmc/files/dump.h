/*
The dump: one micro-batch's losses, gates and gradients in a safetensors file, for checkers
(dev/doc/design.md has all file formats). Fp32:

    lm_loss, reg_loss, loss = lm_loss + weight reg_loss, sparsity       [1] each
    logits [B*T, V] when B*T <= 256;  gates.N [B*T, E] of layer N, 0 where not active (none when dense)
    grad.NAME for every tensor NAME of the checkpoint, in its shape

A dump's gates can be the next one's routes (--route-from): gates != 0 is the active set. Errors: as in
safetensors.h.
*/
#ifndef DUMP_H
#define DUMP_H

#include "llmc/model.h"
#include "llmc/files/safetensors_writer.h"

enum { DUMP_SCALARS = 4, DUMP_MOST_LOGIT_ROWS = 256 };

// N tokens; logits [N, V] or NULL; gates: L pointers to [N, E], or NULL when dense; grad [num_params]
static inline void dump_write(const char *path, const Config *c, const TensorTable *table, int64_t N,
                              const float *scalars, const float *logits, const float *const *gates,
                              const float *grad) {
    static const char *const scalar_names[DUMP_SCALARS] = {"lm_loss", "reg_loss", "loss", "sparsity"};
    int64_t one = 1, E = c->router.experts;
    int64_t logit_shape[] = {N, c->vocab_size}, gate_shape[] = {N, E};
    int gate_layers = gates != NULL ? c->layers : 0;
    char name[128];
    SafetensorsWriter writer;
    safetensors_writer_open(&writer, path);
    for (int i = 0; i < DUMP_SCALARS; i++) {
        safetensors_declare(&writer, scalar_names[i], "F32", 1, &one);
    }
    if (logits != NULL) {
        safetensors_declare(&writer, "logits", "F32", 2, logit_shape);
    }
    for (int l = 0; l < gate_layers; l++) {
        check_format(name, sizeof(name), "gates.%d", l);
        safetensors_declare(&writer, name, "F32", 2, gate_shape);
    }
    for (int i = 0; i < table->count; i++) {
        check_format(name, sizeof(name), "grad.%s", table->tensors[i].name);
        safetensors_declare(&writer, name, "F32", table->tensors[i].ndim, table->tensors[i].shape);
    }
    safetensors_write_header(&writer);
    for (int i = 0; i < DUMP_SCALARS; i++) {
        safetensors_write_f32(&writer, &scalars[i], 1);
    }
    safetensors_write_f32(&writer, logits, logits != NULL ? (size_t)(N * c->vocab_size) : 0);
    for (int l = 0; l < gate_layers; l++) {
        safetensors_write_f32(&writer, gates[l], (size_t)(N * E));
    }
    for (int i = 0; i < table->count; i++) {
        safetensors_write_f32(&writer, grad + table->tensors[i].offset, (size_t)table->tensors[i].size);
    }
    safetensors_writer_finish(&writer);
}

// L matrices [N, E] in one block
static inline float **layer_matrices(const Config *c, int64_t N) {
    float **layers = NEW(float *, c->layers);
    layers[0] = NEW(float, N * c->router.experts * c->layers);
    for (int l = 1; l < c->layers; l++) {
        layers[l] = layers[l - 1] + N * c->router.experts;
    }
    return layers;
}

static inline void free_layer_matrices(float **layers) {
    if (layers != NULL) {
        free(layers[0]);
        free(layers);
    }
}

// the gates of an earlier dump of the same micro-batch
static inline float **dump_read_routes(const char *path, const Config *c, int64_t N) {
    Safetensors *st = safetensors_open(path, "make it with --dump");
    float **routes = layer_matrices(c, N);
    int64_t shape[] = {N, c->router.experts};
    for (int l = 0; l < c->layers; l++) {
        char name[64];
        check_format(name, sizeof(name), "gates.%d", l);
        safetensors_read_f32(st, safetensors_require(st, name, 2, shape), routes[l]);
    }
    safetensors_close(st);
    return routes;
}

#endif
