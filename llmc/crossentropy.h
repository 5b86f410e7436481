/*
Softmax cross entropy, in nats, forward and backward in one pass over the logits.

    loss_n = ln sum_v exp(z_nv) - z_n,target;     dz_nv = scale (softmax(z_n)_v - 1{v = target})

logits [N, V], targets [N], losses [N]. With scale != 0 the logits are overwritten by their gradient (scale =
1 / number of targets of the step, so that the mean's gradient comes out); with scale = 0 they stay as they
are (evaluation). All V rows take part in the softmax, the padded ones too: they are never targets.

Scoring (llmc/run/score.h) asks for the target's log likelihood, ll_n = -loss_n, and whether it is the token
that greedy decoding would choose: greedy_n = 1 if no other logit is larger, and no equal one has a lower
index.
*/
#ifndef CROSSENTROPY_H
#define CROSSENTROPY_H

#include "llmc/fast_exp.h"
#include <math.h>
#include <stdint.h>
// defines: logf, int64_t

static inline void crossentropy_forward_backward(float *losses, float *logits, const int *targets, int64_t N,
                                                 int V, float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        float *z = logits + n * V;
        float target_logit = z[targets[n]];
        float max = max_of(z, V);
        float sum = 0.0f;
        if (scale == 0.0f) {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) {
                sum += fast_exp(z[v] - max);
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) {
                z[v] = fast_exp(z[v] - max);
                sum += z[v];
            }
            float factor = scale / sum;
            for (int v = 0; v < V; v++) {
                z[v] *= factor;
            }
            z[targets[n]] -= scale;
        }
        losses[n] = logf(sum) + (max - target_logit);
    }
}

// logits stay as they are
static inline void crossentropy_score(float *ll, unsigned char *greedy, const float *logits,
                                      const int *targets, int64_t N, int V) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *z = logits + n * V;
        float target_logit = z[targets[n]];
        float max = max_of(z, V);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int v = 0; v < V; v++) {
            sum += fast_exp(z[v] - max);
        }
        ll[n] = (target_logit - max) - logf(sum);
        greedy[n] = target_logit == max;
        for (int v = 0; v < targets[n] && greedy[n]; v++) {
            greedy[n] = z[v] != max;
        }
    }
}

#endif
