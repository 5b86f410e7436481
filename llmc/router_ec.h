/*
Expert choice (Zhou et al., 2022): experts choose tokens, so that every expert has the same load by
construction.

    forward   s = softmax(z);  expert e takes the C = floor(N k / E) tokens with the largest s_te,
              ties to the lower token;  R = s
    backward  as in router_topk.h, without a loss of its own

Whether a token is chosen depends on the other tokens of the batch, later ones too: training leaks the future,
and results depend on how the batch is split over ranks. It is here as the paper's baseline, not as a
recommendation. A generated token has no batch to compete in: sampling takes each token's k largest instead.

logits [N, E] fp32 become s in place.
*/
#ifndef ROUTER_EC_H
#define ROUTER_EC_H

#include "llmc/router_topk.h"

typedef struct {
    float score;
    int64_t token;
} EcCandidate;

// larger score first, what is no number before all (so that it is seen: router_relu.h), then lower token
static inline int ec_compare(const void *a, const void *b) {
    const EcCandidate *x = (const EcCandidate *)a;
    const EcCandidate *y = (const EcCandidate *)b;
    int x_broken = x->score != x->score, y_broken = y->score != y->score;
    if (x_broken != y_broken) {
        return x_broken ? -1 : 1;
    }
    if (x->score != y->score && !x_broken) {
        return x->score > y->score ? -1 : 1;
    }
    return (x->token > y->token) - (x->token < y->token);
}

static inline void router_ec_forward(PairList *pairs, const float *s, int64_t N, int E, int k) {
    int64_t capacity = N * k / E;
    float *mask = NEW(float, N *E);
#pragma omp parallel
    {
        EcCandidate *candidates = NEW(EcCandidate, N);
#pragma omp for schedule(static)
        for (int e = 0; e < E; e++) {
            for (int64_t t = 0; t < N; t++) {
                candidates[t].score = s[t * E + e];
                candidates[t].token = t;
            }
            qsort(candidates, (size_t)N, sizeof(EcCandidate), ec_compare);
            for (int64_t i = 0; i < capacity; i++) {
                mask[candidates[i].token * E + e] = 1.0f;
            }
        }
        free(candidates);
    }
    pairs_from_mask(pairs, s, mask, N, E);
    free(mask);
}

static inline void router_ec_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                      const float *s, int E) {
    memset(dlogits, 0, (size_t)(pairs->tokens * E) * sizeof(float));
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            dlogits[t * E + pairs->expert[p]] = dgate[p];
        }
    }
    router_softmax_backward(dlogits, s, pairs->tokens, E);
}

#endif
