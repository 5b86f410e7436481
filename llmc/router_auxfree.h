/*
A top-k router that is balanced without an auxiliary loss (Wang et al., 2024, arXiv 2408.15664; DeepSeek-V3,
arXiv 2412.19437, section 2.1.2): each expert's bias, outside of the gradient, steers how often it is chosen.

    forward   s_e = sigmoid(z_e);  active: the k largest s_e + b_e, ties to the lower index
              gate g_e = s_e / S,  S the sum of the active s;  k = 1: g_e = s_e, since 1 has no gradient
    backward  b and the choice are constants:
              ds_e = (dg_e - sum_j dg_j g_j) / S for the active pairs (k = 1: dg_e), 0 elsewhere
              dz_e = ds_e s_e (1 - s_e)
    once per optimizer step, for n_e tokens of expert e in the whole step (all micro-batches, all ranks)
              b_e += u sign(mean_e n_e - n_e),  u = --bias-rate, b = 0 at first

So the load is steered as ReMoE steers the sparsity: by the sign of its error. The bias changes who is chosen,
never a gate's value. DeepSeek-V3's small loss over each sequence, its groups of experts and its scaling
factor are left out.

logits [N, E] fp32 become s in place, b [E] fp32. A logit below -40 counts as -40: s is 4e-18 there and never
0, so g always exists.
*/
#ifndef ROUTER_AUXFREE_H
#define ROUTER_AUXFREE_H

#include "llmc/router_topk.h"
#include <math.h>
// defines: fast_sigmoid, router_topk_choose, router_topk_emit, PairList; isnan, INFINITY

// s of one logit. z - z is 0, unless z is not finite: then s is no number, and the loss shows it
static inline float router_auxfree_score(float z) {
    return fast_sigmoid(z) + (z - z);
}

// z [N, E] becomes s in place
static inline void router_auxfree_scores(float *z, int64_t N, int E) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * E; i++) {
        z[i] = router_auxfree_score(z[i]);
    }
}

// pairs with the gates s; what is no number is chosen first
static inline void router_auxfree_forward(PairList *pairs, const float *s, const float *bias, int64_t N,
                                          int E, int k) {
    pairs_reserve(pairs, N, N * k);
#pragma omp parallel
    {
        unsigned char *chosen = NEW(unsigned char, E);
        float *score = NEW(float, E);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; t++) {
            for (int e = 0; e < E; e++) {
                score[e] = s[t * E + e] + bias[e];
                score[e] = isnan(score[e]) ? INFINITY : score[e];
            }
            router_topk_choose(chosen, score, E, k);
            router_topk_emit(pairs, t, chosen, s + t * E, E, k);
        }
        free(chosen);
        free(score);
    }
    pairs->row_start[N] = N * k;
    pairs_count(pairs, E);
}

// sum of s over the active experts of token t; k = 1: 1, nothing is divided
static inline float router_auxfree_sum(const PairList *pairs, const float *s, int64_t t, int E, int k) {
    float sum = 0.0f;
    for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
        sum += s[t * E + pairs->expert[p]];
    }
    return k == 1 ? 1.0f : sum;
}

// gates s -> g, of a list that is the method's own or forced
static inline void router_auxfree_gates(PairList *pairs, const float *s, int E, int k) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < pairs->tokens; t++) {
        float sum = router_auxfree_sum(pairs, s, t, E, k);
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            pairs->gate[p] /= sum;
        }
    }
}

// dlogits [N, E] overwritten from dgate [P]
static inline void router_auxfree_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                           const float *s, int E, int k) {
    memset(dlogits, 0, (size_t)(pairs->tokens * E) * sizeof(float));
    for (int64_t t = 0; t < pairs->tokens; t++) {
        float sum = router_auxfree_sum(pairs, s, t, E, k), mean = 0.0f;
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            mean += k == 1 ? 0.0f : dgate[p] * pairs->gate[p];
        }
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            int64_t i = t * E + pairs->expert[p];
            dlogits[i] = (dgate[p] - mean) / sum * s[i] * (1.0f - s[i]);
        }
    }
}

// what a step of `load` tokens for all E experts together adds to the bias of one that had `count` of them
static inline float router_auxfree_step(int64_t count, int64_t load, int E, float rate) {
    return count * E < load ? rate : count * E > load ? -rate : 0.0f;
}

// bias [E], counts [E] of a step
static inline void router_auxfree_balance(float *bias, const int64_t *counts, int E, float rate) {
    int64_t load = 0;
    for (int e = 0; e < E; e++) {
        load += counts[e];
    }
    for (int e = 0; e < E; e++) {
        bias[e] += router_auxfree_step(counts[e], load, E, rate);
    }
}

#endif
