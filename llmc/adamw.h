/*
AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) and clipping by the global norm.

    g <- grad min(1, clip / (norm + 1e-6)),  norm = the L2 norm of all gradients, the regulariser's included
    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   m' = m / (1 - b1^t);   v' = v / (1 - b2^t)
    w <- w - lr (m' / (sqrt(v') + eps) + decay w)

t = 1 at the first update. Elementwise; the norm is a sum over fixed blocks, so that its bits do not depend on
threads or sharding.
*/
#ifndef ADAMW_H
#define ADAMW_H

#include "llmc/check.h"
#include <math.h>
// defines: sqrtf, pow

enum { NORM_BLOCK = 65536 }; // elements of one partial sum

// sum of squares of x[0..n): each block in order, then the blocks in order
static inline double sum_of_squares(const float *x, int64_t n) {
    int64_t blocks = (n + NORM_BLOCK - 1) / NORM_BLOCK;
    double *partial = NEW(double, blocks);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t last = (b + 1) * NORM_BLOCK < n ? (b + 1) * NORM_BLOCK : n;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = b * NORM_BLOCK; i < last; i++) {
            sum += (double)x[i] * (double)x[i];
        }
        partial[b] = sum;
    }
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        total += partial[b];
    }
    free(partial);
    return total;
}

// the factor on the gradients (1 where the norm is within the limit); max_norm 0: no clipping
static inline float clip_scale(double norm, double max_norm) {
    double scale = max_norm / (norm + 1e-6);
    return max_norm > 0.0 && scale < 1.0 ? (float)scale : 1.0f;
}

typedef struct {
    double beta1, beta2, eps;
} AdamW;

static inline void adamw_update(float *w, float *m, float *v, const float *grad, int64_t n, AdamW adamw,
                                double lr, double decay, float grad_scale, int64_t t) {
    float beta1 = (float)adamw.beta1;
    float beta2 = (float)adamw.beta2;
    float one_minus_beta1 = (float)(1.0 - adamw.beta1);
    float one_minus_beta2 = (float)(1.0 - adamw.beta2);
    float step = (float)(lr / (1.0 - pow(adamw.beta1, (double)t)));              // lr and m's bias correction
    float inverse_root = (float)(1.0 / sqrt(1.0 - pow(adamw.beta2, (double)t))); // v's, taken out of the root
    float eps = (float)adamw.eps;
    float shrink = (float)(lr * decay);
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = beta1 * m[i] + one_minus_beta1 * g;
        v[i] = beta2 * v[i] + one_minus_beta2 * g * g;
        w[i] -= step * m[i] / (sqrtf(v[i]) * inverse_root + eps) + shrink * w[i];
    }
}

#endif
