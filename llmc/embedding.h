/*
Token embedding.

    forward   out[n] = table[ids[n]]
    backward  dtable[v] += sum over the positions n with ids[n] = v, in ascending n, of dout[n]

ids [N], table [V, d], out [N, d]. No positions are added: rope.h rotates them into the queries and keys.
Threads own columns, so that each sum has one fixed order.
*/
#ifndef EMBEDDING_H
#define EMBEDDING_H

#include <stdint.h>
#include <string.h>
// defines: int64_t, memcpy

static inline void embedding_forward(float *out, const int *ids, const float *table, int64_t N, int d) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        memcpy(out + n * d, table + (int64_t)ids[n] * d, (size_t)d * sizeof(float));
    }
}

static inline void embedding_backward(float *dtable, const float *dout, const int *ids, int64_t N, int d) {
    enum { BLOCK = 64 };
#pragma omp parallel for schedule(static)
    for (int first = 0; first < d; first += BLOCK) {
        int last = first + BLOCK < d ? first + BLOCK : d;
        for (int64_t n = 0; n < N; n++) {
            float *row = dtable + (int64_t)ids[n] * d;
            for (int c = first; c < last; c++) {
                row[c] += dout[n * d + c];
            }
        }
    }
}

#endif
