/*
The dump: one micro-batch's losses, gates and gradients in a safetensors file, for checkers
(dev/doc/design.md has all file formats). Fp32:

    lm_loss, reg_loss, loss = lm_loss + weight reg_loss, sparsity       [1] each
    logits [B*T, V] when B*T <= 256;  gates.N [B*T, E] of layer N, 0 where not active (none when dense)
    draws.N [B*T, E] where the router draws: +-(j + 1) in round j's expert, minus where M = 1/3, else 0
    grad.NAME for every tensor NAME of the checkpoint, in its shape

With several ranks B is that of all together; each writes its own rows, and of the gradients what it keeps.
A dump's gates, or its draws, can be the next one's routes (--route-from): gates != 0 is the active set.
Errors: as in safetensors.h.
*/
#ifndef DUMP_H
#define DUMP_H

#include "llmc/files/buffer_files.h"
#include "llmc/config.h"

enum { DUMP_SCALARS = 4, DUMP_MOST_LOGIT_ROWS = 256 };

// what one rank has of a dump; N tokens on each
typedef struct {
    int64_t N;
    const float *scalars;      // [DUMP_SCALARS], the same on all ranks
    const float *logits;       // [N, V], or NULL
    const float *const *gates; // L matrices [N, E], or NULL when dense
    const float *const *draws; // the same, or NULL where the router draws nothing
    FlatBuffer grads;
} Dump;

// L matrices, or none
static inline void dump_declare_layers(SafetensorsWriter *w, const Config *c, const char *what,
                                       const float *const *matrices, const int64_t *shape) {
    for (int l = 0; l < c->layers && matrices != NULL; l++) {
        char name[64];
        check_format(name, sizeof(name), "%s.%d", what, l);
        safetensors_declare(w, name, "F32", 2, shape);
    }
}

static inline void dump_declare(SafetensorsWriter *w, const Config *c, const Dump *dump, int ranks) {
    static const char *const scalar_names[DUMP_SCALARS] = {"lm_loss", "reg_loss", "loss", "sparsity"};
    int64_t one = 1, logit_shape[] = {dump->N * ranks, c->vocab_size};
    int64_t gate_shape[] = {dump->N * ranks, c->router.experts};
    for (int i = 0; i < DUMP_SCALARS; i++) {
        safetensors_declare(w, scalar_names[i], "F32", 1, &one);
    }
    if (dump->logits != NULL) {
        safetensors_declare(w, "logits", "F32", 2, logit_shape);
    }
    dump_declare_layers(w, c, "gates", dump->gates, gate_shape);
    dump_declare_layers(w, c, "draws", dump->draws, gate_shape);
    declare_buffer(w, &dump->grads, "grad.", "F32");
}

// rank r's rows are those from r N on; size: of N rows
static inline void dump_put_rows(SafetensorsWriter *w, size_t tensor, int rank, const float *rows,
                                 int64_t size) {
    safetensors_write_at(w, tensor, (uint64_t)(rank * size), rows, (uint64_t)size);
}

// one rank's part; rank 0 has the scalars too
static inline void dump_put(SafetensorsWriter *w, const Config *c, const Dump *dump, int rank) {
    size_t tensor = 0;
    for (; tensor < DUMP_SCALARS; tensor++) {
        safetensors_write_at(w, tensor, 0, &dump->scalars[tensor], rank == 0);
    }
    if (dump->logits != NULL) {
        dump_put_rows(w, tensor++, rank, dump->logits, dump->N * c->vocab_size);
    }
    for (int l = 0; l < c->layers && dump->gates != NULL; l++) {
        dump_put_rows(w, tensor++, rank, dump->gates[l], dump->N * c->router.experts);
    }
    for (int l = 0; l < c->layers && dump->draws != NULL; l++) {
        dump_put_rows(w, tensor++, rank, dump->draws[l], dump->N * c->router.experts);
    }
    write_buffer(w, tensor, &dump->grads);
}

// all ranks call it
static inline void dump_write(Ranks *ranks, const char *path, const Config *c, const Dump *dump) {
    SafetensorsWriter writer;
    safetensors_writer_open(&writer, path);
    dump_declare(&writer, c, dump, ranks->count);
    safetensors_begin(&writer, ranks);
    dump_put(&writer, c, dump, ranks->rank);
    safetensors_finish(&writer, ranks);
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

// this rank's rows of the gates, or draws, of an earlier dump of the same micro-batch; N tokens on each rank
static inline float **dump_read_routes(const Ranks *ranks, const char *path, const Config *c, int64_t N) {
    Safetensors *st = safetensors_open(path, "make it with --dump");
    float **routes = layer_matrices(c, N);
    int64_t shape[] = {N * ranks->count, c->router.experts}, size = N * c->router.experts;
    for (int l = 0; l < c->layers; l++) {
        char name[64];
        check_format(name, sizeof(name), router_draws(c->router.method) ? "draws.%d" : "gates.%d", l);
        safetensors_read_f32_range(st, safetensors_require(st, name, 2, shape),
                                   (uint64_t)(ranks->rank * size), (uint64_t)size, routes[l]);
    }
    safetensors_close(st);
    return routes;
}

#endif
