/*
Dispatch: from the pair list (token-major) to the experts' rows (expert-major) and back. Dropless: every pair
gets a row, there is no capacity and no padding.

    count    n_e = number of tokens of expert e (the pair list has it)
    sort     offsets = exclusive prefix sum of n_e; a stable counting sort gives pair p the row
             row_of_pair[p] = offsets[e] + (number of earlier pairs of e): an expert's tokens ascend
    gather   X'[row] = x[token_of_row[row]]
    combine  y_t = sum over t's pairs, ascending expert, of gate_p Y[row_of_pair[p]]   (Eq. 1)

Backward: gather's is the combine without gates, dx_t += sum_p dX'[row_of_pair[p]]; combine's is in experts.h.
x, y [N, d]; X', Y [P, d]. The sums have a fixed order, so the result does not depend on threads.
*/
#ifndef DISPATCH_H
#define DISPATCH_H

#include "llmc/pairs.h"

typedef struct {
    int64_t *offsets;      // [E + 1] rows of expert e: offsets[e] .. offsets[e + 1] - 1
    int64_t *row_of_pair;  // [P]
    int64_t *token_of_row; // [P]
    float *gate_of_row;    // [P]
    int64_t capacity;
} Dispatch;

static inline void dispatch_init(Dispatch *dispatch, int E) {
    memset(dispatch, 0, sizeof(*dispatch));
    dispatch->offsets = NEW(int64_t, E + 1);
}

static inline void dispatch_free(Dispatch *dispatch) {
    free(dispatch->offsets);
    free(dispatch->row_of_pair);
    free(dispatch->token_of_row);
    free(dispatch->gate_of_row);
}

static inline void dispatch_sort(Dispatch *dispatch, const PairList *pairs, int E) {
    int64_t P = pairs->num_pairs;
    if (P > dispatch->capacity) {
        dispatch->capacity = P;
        dispatch->row_of_pair = GROW(int64_t, dispatch->row_of_pair, P);
        dispatch->token_of_row = GROW(int64_t, dispatch->token_of_row, P);
        dispatch->gate_of_row = GROW(float, dispatch->gate_of_row, P);
    }
    int64_t *offsets = dispatch->offsets;
    offsets[0] = 0;
    for (int e = 0; e < E; e++) {
        offsets[e + 1] = offsets[e] + pairs->counts[e];
    }
    // offsets[e] serves as expert e's cursor while its rows are handed out; it ends at the old offsets[e + 1]
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            int64_t row = offsets[pairs->expert[p]]++;
            dispatch->row_of_pair[p] = row;
            dispatch->token_of_row[row] = t;
            dispatch->gate_of_row[row] = pairs->gate[p];
        }
    }
    memmove(offsets + 1, offsets, (size_t)E * sizeof(int64_t));
    offsets[0] = 0;
}

static inline void dispatch_gather(float *rows, const float *x, const Dispatch *dispatch, int64_t P, int d) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < P; r++) {
        memcpy(rows + r * d, x + dispatch->token_of_row[r] * d, (size_t)d * sizeof(float));
    }
}

// y[t] += sum over the token's pairs of gate * rows[row_of_pair]; gates NULL: every gate is 1
static inline void dispatch_combine(float *y, const float *rows, const PairList *pairs, const float *gates,
                                    const Dispatch *dispatch, int d) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            const float *row = rows + dispatch->row_of_pair[p] * d;
            float gate = gates != NULL ? gates[p] : 1.0f;
            for (int c = 0; c < d; c++) {
                y[t * d + c] += gate * row[c]; // (Eq. 1)
            }
        }
    }
}

#endif
