/*
Causal self-attention with grouped queries (Ainslie et al., 2023): head h reads key/value head h / (H / KV).

    forward   s_tj = q_t . k_j / sqrt(hd), j <= t;   p_tj = exp(s_tj - lse_t), lse_t = ln sum_j exp(s_tj)
              out_t = sum_j p_tj v_j
    backward  dp_tj = dout_t . v_j;   D_t = sum_j p_tj dp_tj (= dout_t . out_t)
              ds_tj = p_tj (dp_tj - D_t) / sqrt(hd);   dq_t = sum_j ds_tj k_j
              dk_j = sum_t ds_tj q_t;   dv_j = sum_t p_tj dout_t      (sums over the group's heads too)

qkv [B, T, (H + 2 KV) hd]: a position's queries, then its keys, then its values, keys and queries already
rotated (rope.h). out [B, T - start, H hd]; lse [B, H, T - start]. The T x T matrix never exists: a block of
queries at a time, and the backward makes p again from lse (as in FlashAttention, Dao et al., 2022). start > 0
computes only the positions start .. T-1 against all keys up to T: a key/value cache is a qkv buffer that is
kept.
*/
#ifndef ATTENTION_H
#define ATTENTION_H

#include "llmc/check.h"
#include "llmc/fast_exp.h"
#include "llmc/matmul.h"
#include <math.h>
// defines: sqrtf, logf

enum { ATTENTION_BLOCK = 64 }; // queries a block: its scores stay in cache

// one block of query rows first .. first + rows - 1 of one head: scores become probabilities in place, p
// [rows, ld]
static inline void attention_softmax(float *p, float *lse, int first, int rows, int ld, float scale) {
    for (int r = 0; r < rows; r++) {
        float *row = p + (int64_t)r * ld;
        int n = first + r + 1; // causal: keys 0 .. first + r
        float max = max_of(row, n);
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < n; j++) {
            row[j] = fast_exp((row[j] - max) * scale);
            sum += row[j];
        }
        float inverse = 1.0f / sum;
        for (int j = 0; j < n; j++) {
            row[j] *= inverse;
        }
        for (int j = n; j < ld; j++) {
            row[j] = 0.0f;
        }
        lse[r] = max * scale + logf(sum);
    }
}

static inline void attention_forward(float *out, float *lse, const float *qkv, int B, int T, int start, int H,
                                     int KV, int hd) {
    int width = (H + 2 * KV) * hd;
    int rows_out = T - start;
    float scale = 1.0f / sqrtf((float)hd);
#pragma omp parallel
    {
        float *p = NEW(float, (int64_t)ATTENTION_BLOCK *T);
#pragma omp for collapse(2) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < H; h++) {
                const float *q = qkv + (int64_t)b * T * width + h * hd;
                const float *k = qkv + (int64_t)b * T * width + (H + h / (H / KV)) * hd;
                const float *v = k + KV * hd;
                for (int first = start; first < T; first += ATTENTION_BLOCK) {
                    int rows = T - first < ATTENTION_BLOCK ? T - first : ATTENTION_BLOCK;
                    int keys = first + rows;
                    float *o = out + ((int64_t)b * rows_out + first - start) * H * hd + h * hd;
                    float *l = lse + ((int64_t)b * H + h) * rows_out + first - start;
                    sgemm_serial(0, 1, rows, keys, hd, q + (int64_t)first * width, width, k, width, p, keys,
                                 0);
                    attention_softmax(p, l, first, rows, keys, scale);
                    sgemm_serial(0, 0, rows, hd, keys, p, keys, v, width, o, H * hd, 0);
                }
            }
        }
        free(p);
    }
}

// one block of rows: p holds scores and becomes p; ds holds dp and becomes ds. D is summed from the same dp
// that it is subtracted from: where a token sees only itself, p = 1 and ds is exactly 0, not a rounding error
// that AdamW would blow up
static inline void attention_softmax_backward(float *p, float *ds, const float *lse, int first, int rows,
                                              int ld, float scale) {
    for (int r = 0; r < rows; r++) {
        float *prow = p + (int64_t)r * ld;
        float *srow = ds + (int64_t)r * ld;
        int n = first + r + 1;
        float D = 0.0f;
#pragma omp simd reduction(+ : D)
        for (int j = 0; j < n; j++) {
            prow[j] = fast_exp(prow[j] * scale - lse[r]);
            D += prow[j] * srow[j];
        }
        for (int j = 0; j < n; j++) {
            srow[j] = prow[j] * (srow[j] - D) * scale;
        }
        if (n == 1) { // also where the score is so large that the rounding of lse shows
            prow[0] = 1.0f;
            srow[0] = 0.0f;
        }
        for (int j = n; j < ld; j++) {
            prow[j] = 0.0f;
            srow[j] = 0.0f;
        }
    }
}

// dqkv [B, T, (H + 2 KV) hd] is overwritten. A thread owns a key/value head with all its query heads.
static inline void attention_backward(float *dqkv, const float *dout, const float *qkv, const float *lse,
                                      int B, int T, int H, int KV, int hd) {
    int width = (H + 2 * KV) * hd;
    int stride = H * hd;
    int group = H / KV;
    float scale = 1.0f / sqrtf((float)hd);
#pragma omp parallel
    {
        float *p = NEW(float, (int64_t)ATTENTION_BLOCK *T);
        float *ds = NEW(float, (int64_t)ATTENTION_BLOCK *T);
#pragma omp for collapse(2) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int g = 0; g < KV; g++) {
                int64_t base = (int64_t)b * T * width;
                int64_t key = base + (H + g) * hd;
                int64_t value = key + KV * hd;
                for (int t = 0; t < T; t++) {
                    memset(dqkv + key + (int64_t)t * width, 0, (size_t)hd * sizeof(float));
                    memset(dqkv + value + (int64_t)t * width, 0, (size_t)hd * sizeof(float));
                }
                for (int h = g * group; h < (g + 1) * group; h++) {
                    for (int first = 0; first < T; first += ATTENTION_BLOCK) {
                        int rows = T - first < ATTENTION_BLOCK ? T - first : ATTENTION_BLOCK;
                        int keys = first + rows;
                        int64_t query = base + (int64_t)first * width + h * hd;
                        int64_t o = ((int64_t)b * T + first) * stride + h * hd;
                        const float *l = lse + ((int64_t)b * H + h) * T + first;
                        sgemm_serial(0, 1, rows, keys, hd, qkv + query, width, qkv + key, width, p, keys, 0);
                        sgemm_serial(0, 1, rows, keys, hd, dout + o, stride, qkv + value, width, ds, keys, 0);
                        attention_softmax_backward(p, ds, l, first, rows, keys, scale);
                        sgemm_serial(0, 0, rows, hd, keys, ds, keys, qkv + key, width, dqkv + query, width,
                                     0);
                        sgemm_serial(1, 0, keys, hd, rows, ds, keys, qkv + query, width, dqkv + key, width,
                                     1);
                        sgemm_serial(1, 0, keys, hd, rows, p, keys, dout + o, stride, dqkv + value, width, 1);
                    }
                }
            }
        }
        free(p);
        free(ds);
    }
}

#endif
