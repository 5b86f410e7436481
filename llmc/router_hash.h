/*
Hash layers (Roller et al., 2021): the token id alone chooses the experts. No weights, no gradient.

    experts (id k + j) mod E, j = 0 .. k-1;  gate 1        (id mod E when k = 1, as in the paper)

The dense layer is the special case of one expert that everybody uses (router_dense_forward).
*/
#ifndef ROUTER_HASH_H
#define ROUTER_HASH_H

#include "llmc/pairs.h"

static inline void router_hash_forward(PairList *pairs, const int *ids, int64_t N, int E, int k) {
    pairs_reserve(pairs, N, N * k);
    for (int64_t t = 0; t < N; t++) {
        int first = (int)((int64_t)ids[t] * k % E);
        int wrapped = first + k > E ? first + k - E
                                    : 0; // the experts that come round to 0 are the lowest: ascending order
        for (int j = 0; j < k; j++) {
            pairs->expert[t * k + j] = j < wrapped ? j : first + j - wrapped;
            pairs->gate[t * k + j] = 1.0f;
        }
        pairs->row_start[t] = t * k;
    }
    pairs->row_start[N] = N * k;
    pairs_count(pairs, E);
}

static inline void router_dense_forward(PairList *pairs, int64_t N) {
    pairs_reserve(pairs, N, N);
    for (int64_t t = 0; t < N; t++) {
        pairs->row_start[t] = t;
        pairs->expert[t] = 0;
        pairs->gate[t] = 1.0f;
    }
    pairs->row_start[N] = N;
    pairs_count(pairs, 1);
}

#endif
