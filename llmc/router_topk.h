/*
The TopK router of vanilla MoE (Switch, dMoE): the paper's baseline.

    forward   s = softmax(z);  active: the k largest s_e, ties to the lower index      (Eq. 2, 3)
              R(x)_e = s_e, not renormalised
    backward  ds_e = dR_e for the active pairs, 0 elsewhere;  dz_e = s_e (ds_e - sum_j s_j ds_j)

    auxiliary loss of one layer (Fedus et al., 2022)   sum_e f_e mean_t s_te,  f_e = E / (k N) n_e, constant
    its gradient   ds_te += weight f_e / N for ALL experts; without load balance there is no such loss

logits [N, E] fp32 become the probabilities s in place. The TopK is discontinuous where two experts tie (the
paper's section 3.1).
*/
#ifndef ROUTER_TOPK_H
#define ROUTER_TOPK_H

#include "llmc/fast_exp.h"
#include "llmc/pairs.h"

// z[N, E] becomes softmax(z) in place
static inline void router_softmax(float *z, int64_t N, int E) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < N; t++) {
        float *row = z + t * E;
        float max = row[0];
        for (int e = 1; e < E; e++) {
            max = row[e] > max ? row[e] : max;
        }
        float sum = 0.0f;
        for (int e = 0; e < E; e++) {
            row[e] = fast_exp(row[e] - max);
            sum += row[e];
        }
        for (int e = 0; e < E; e++) {
            row[e] /= sum;
        }
    }
}

// dlogits holds ds on entry and dz on return
static inline void router_softmax_backward(float *dlogits, const float *s, int64_t N, int E) {
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < N; t++) {
        float *row = dlogits + t * E;
        float dot = 0.0f;
        for (int e = 0; e < E; e++) {
            dot += s[t * E + e] * row[e];
        }
        for (int e = 0; e < E; e++) {
            row[e] = s[t * E + e] * (row[e] - dot);
        }
    }
}

// TopK: chosen[e] = 1 for the k largest of score[E], ties to the lower index
static inline void router_topk_choose(unsigned char *chosen, const float *score, int E, int k) {
    for (int e = 0; e < E; e++) {
        chosen[e] = 0;
    }
    for (int i = 0; i < k; i++) {
        int best = 0;
        while (chosen[best]) {
            best++;
        }
        for (int e = best + 1; e < E; e++) {
            if (!chosen[e] && score[e] > score[best]) {
                best = e;
            }
        }
        chosen[best] = 1; // of the k largest (Eq. 2, 3)
    }
}

// token t's pairs: the k chosen of its E experts, with the gates s[E]
static inline void router_topk_emit(PairList *pairs, int64_t t, const unsigned char *chosen, const float *s,
                                    int E, int k) {
    int64_t p = t * k;
    pairs->row_start[t] = p;
    for (int e = 0; e < E; e++) {
        if (chosen[e]) {
            pairs->expert[p] = e;
            pairs->gate[p] = s[e];
            p++;
        }
    }
}

static inline void router_topk_forward(PairList *pairs, const float *s, int64_t N, int E, int k) {
    pairs_reserve(pairs, N, N * k);
#pragma omp parallel
    {
        unsigned char *chosen = NEW(unsigned char, E);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < N; t++) {
            router_topk_choose(chosen, s + t * E, E, k);
            router_topk_emit(pairs, t, chosen, s + t * E, E, k);
        }
        free(chosen);
    }
    pairs->row_start[N] = N * k;
    pairs_count(pairs, E);
}

// sum_e f_e mean_t s_te over this rank's tokens, N of them in the global micro-batch
static inline double router_topk_loss(const float *s, const int64_t *counts, int64_t tokens, int64_t N, int E,
                                      int k) {
    double sum = 0.0;
    for (int64_t t = 0; t < tokens; t++) {
        for (int e = 0; e < E; e++) {
            sum += (double)counts[e] * s[t * E + e];
        }
    }
    return sum * (double)E / ((double)k * (double)N) / (double)N;
}

static inline void router_topk_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                        const float *s, const int64_t *counts, int64_t N, int E, int k,
                                        double weight) {
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int e = 0; e < E; e++) {
            double load = (double)E * (double)counts[e] / ((double)k * (double)N);
            dlogits[t * E + e] = (float)(weight * load / (double)N);
        }
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            dlogits[t * E + pairs->expert[p]] += dgate[p];
        }
    }
    router_softmax_backward(dlogits, s, pairs->tokens, E);
}

#endif
