/*
The ReLU router of ReMoE: continuous where an expert switches on or off, and free to give each token as many
experts as it needs.

    forward   R(x)_e = relu(z_e), z = W x (Eq. 4, 5); active iff z_e > 0
    backward  dz_e = dR_e for the active pairs, 0 elsewhere

    regulariser of one layer   reg_l = sum_e f_e mean_t R(x_t)_e                          (Eq. 10)
        f_e = E / (k N) n_e (Eq. 11), the expert's load relative to its fair share, taken as a constant;
        without load balance f = 1 (Eq. 9). The model's regulariser is its mean over the L layers;
        lambda weighs it (lambda.h).
    its gradient   dR_te += weight f_e / N for the active pairs, weight = lambda / L

logits [N, E] fp32; E = E_tot experts, k = k_tot; n_e = counts[e] over the N tokens of the global micro-batch.
*/
#ifndef ROUTER_RELU_H
#define ROUTER_RELU_H

#include "llmc/pairs.h"
#include <float.h>
// defines: FLT_MAX

// A logit that is no number, or infinite, is active too: were it "off", a router that has broken would look
// like one that is sparse, and nothing would ever show it. So its gate reaches the loss, which is then not
// finite
static inline int router_relu_is_active(float z) {
    return !(z <= 0.0f && z >= -FLT_MAX);
}

static inline void router_relu_forward(PairList *pairs, const float *logits, int64_t N, int E) {
    int64_t count = 0;
    for (int64_t i = 0; i < N * E; i++) {
        count += router_relu_is_active(logits[i]);
    }
    pairs_reserve(pairs, N, count);
    int64_t p = 0;
    for (int64_t t = 0; t < N; t++) {
        pairs->row_start[t] = p;
        for (int e = 0; e < E; e++) {
            float z = logits[t * E + e];
            if (router_relu_is_active(z)) { // R = relu(z) (Eq. 4, 5)
                pairs->expert[p] = e;
                pairs->gate[p] = z;
                p++;
            }
        }
    }
    pairs->row_start[N] = p;
    pairs_count(pairs, E);
}

// f_e
static inline double router_relu_load(const int64_t *counts, int e, int64_t N, int E, int k,
                                      int load_balance) {
    return load_balance ? (double)E * (double)counts[e] / ((double)k * (double)N) : 1.0; // (Eq. 11)
}

// sum_e f_e mean_t R_te: one layer's term
static inline double router_relu_loss(const PairList *pairs, const int64_t *counts, int64_t N, int E, int k,
                                      int load_balance) {
    double sum = 0.0;
    for (int64_t p = 0; p < pairs->num_pairs; p++) {
        sum += router_relu_load(counts, pairs->expert[p], N, E, k, load_balance) * pairs->gate[p];
    }
    return sum / (double)N; // (Eq. 9, 10)
}

// dlogits [N, E] overwritten from dgate [P], the gates' gradient of the language model's loss
static inline void router_relu_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                        const int64_t *counts, int64_t N, int E, int k, int load_balance,
                                        double weight) {
    memset(dlogits, 0, (size_t)(pairs->tokens * E) * sizeof(float));
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            int e = pairs->expert[p];
            double load = router_relu_load(counts, e, N, E, k, load_balance);
            dlogits[t * E + e] = dgate[p] + (float)(weight * load / (double)N); // gradient of (Eq. 6)
        }
    }
}

#endif
