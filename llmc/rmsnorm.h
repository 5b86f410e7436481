/*
RMSNorm (Zhang and Sennrich, 2019): no mean is subtracted, no bias is added.

    forward   r = 1 / sqrt(mean_c(x_c^2) + eps);  out_c = x_c r w_c
    backward  dx_c += r (w_c dout_c - x_c r^2 mean_j(dout_j w_j x_j));   dw_c += sum_n dout_nc x_nc r_n

x, out [N, d]; w [d]; rstd [N] keeps r for the backward. dx is added to, since the residual stream has a
gradient of its own; dx and dout must not overlap.
*/
#ifndef RMSNORM_H
#define RMSNORM_H

#include <math.h>
#include <stdint.h>
// defines: sqrtf, int64_t

static inline void rmsnorm_forward(float *out, float *rstd, const float *x, const float *w, int64_t N, int d,
                                   float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * d;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < d; c++) {
            sum += row[c] * row[c];
        }
        float r = 1.0f / sqrtf(sum / (float)d + eps);
        for (int c = 0; c < d; c++) {
            out[n * d + c] = row[c] * r * w[c];
        }
        rstd[n] = r;
    }
}

static inline void rmsnorm_backward(float *dx, float *dw, const float *dout, const float *x, const float *w,
                                    const float *rstd, int64_t N, int d) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * d;
        const float *drow = dout + n * d;
        float r = rstd[n];
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < d; c++) {
            sum += drow[c] * w[c] * row[c];
        }
        float scale = sum / (float)d * r * r;
        for (int c = 0; c < d; c++) {
            dx[n * d + c] += r * (w[c] * drow[c] - row[c] * scale);
        }
    }
    enum { BLOCK = 64 }; // threads own columns of dw: one fixed order of summation over the tokens
#pragma omp parallel for schedule(static)
    for (int first = 0; first < d; first += BLOCK) {
        int last = first + BLOCK < d ? first + BLOCK : d;
        for (int64_t n = 0; n < N; n++) {
            for (int c = first; c < last; c++) {
                dw[c] += dout[n * d + c] * x[n * d + c] * rstd[n];
            }
        }
    }
}

#endif
