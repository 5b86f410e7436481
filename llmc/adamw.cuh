/*
AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) on the device.

    g <- grad grad_scale                             grad_scale = min(1, clip / (norm + 1e-6)): adamw.h
    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   m' = m / (1 - b1^t);   v' = v / (1 - b2^t)
    w <- w - lr (m' / (sqrt(v') + eps) + decay w);   w_x = w rounded to floatX, what the products read

Elementwise, with adamw.h's constants and expressions: only whether a compiler fuses a product with a sum can
make a last bit differ. 28 bytes are read and written per element, 30 with the bf16 copy; a thread moves a
pack's worth of each in 16-byte accesses. Where a tensor does not begin on a multiple of 16 bytes, and for the
last few elements, single elements are moved instead: the same arithmetic, so the same bits.

w, m, v, grad [n] fp32, w_x [n] floatX. Equals adamw_update of adamw.h. The
gradients' norm: gpu/buckets.cuh. Errors: none.
*/
#ifndef ADAMW_CUH
#define ADAMW_CUH

#include "llmc/adamw.h"
#include "llmc/gpu/floats.cuh"
// defines: AdamW; Floats, load_floats, store_floats, narrow

enum { ADAMW_THREADS = 256 };

// adamw.h's constants of a step
typedef struct {
    float beta1, beta2, one_minus_beta1, one_minus_beta2;
    float step, inverse_root, eps, shrink, grad_scale;
} AdamWStep;

static inline AdamWStep adamw_step(AdamW adamw, double lr, double decay, float grad_scale, int64_t t) {
    AdamWStep s;
    s.beta1 = (float)adamw.beta1;
    s.beta2 = (float)adamw.beta2;
    s.one_minus_beta1 = (float)(1.0 - adamw.beta1);
    s.one_minus_beta2 = (float)(1.0 - adamw.beta2);
    s.step = (float)(lr / (1.0 - pow(adamw.beta1, (double)t)));              // lr and m's bias correction
    s.inverse_root = (float)(1.0 / sqrt(1.0 - pow(adamw.beta2, (double)t))); // v's, taken out of the root
    s.eps = (float)adamw.eps;
    s.shrink = (float)(lr * decay);
    s.grad_scale = grad_scale;
    return s;
}

__device__ __forceinline__ void adamw_element(float &w, float &m, float &v, float grad, const AdamWStep &s) {
    float g = grad * s.grad_scale;
    m = s.beta1 * m + s.one_minus_beta1 * g;
    v = s.beta2 * v + s.one_minus_beta2 * g * g;
    w -= s.step * m / (sqrtf(v) * s.inverse_root + s.eps) + s.shrink * w;
}

// thread i: elements [i PACK_X, (i + 1) PACK_X)
static __global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel(float *w, floatX *w_x, float *m, float *v, const float *grad, int64_t n, AdamWStep s,
                 bool aligned) {
    int64_t i = ((int64_t)blockIdx.x * ADAMW_THREADS + threadIdx.x) * PACK_X;
    if (aligned && i + PACK_X <= n) {
        Floats w_i = load_floats(w + i), m_i = load_floats(m + i), v_i = load_floats(v + i);
        Floats grad_i = load_floats(grad + i);
        for (int j = 0; j < PACK_X; j++) {
            adamw_element(w_i.x[j], m_i.x[j], v_i.x[j], grad_i.x[j], s);
        }
        store_floats(w + i, w_i);
        store_floats(m + i, m_i);
        store_floats(v + i, v_i);
        if (w_x != NULL) {
            store_pack(w_x + i, narrow(w_i));
        }
        return;
    }
    for (int64_t j = i; j < n && j < i + PACK_X; j++) {
        float w_j = w[j];
        adamw_element(w_j, m[j], v[j], grad[j], s);
        w[j] = w_j;
        if (w_x != NULL) {
            w_x[j] = to_x(w_j);
        }
    }
}

// w_x: the rounded copy; NULL or w itself where there is none
static inline void adamw_update(float *w, floatX *w_x, float *m, float *v, const float *grad, int64_t n,
                                AdamW adamw, double lr, double decay, float grad_scale, int64_t t,
                                cudaStream_t stream) {
    floatX *copy = (void *)w_x == (void *)w ? NULL : w_x;
    bool aligned =
        is_aligned16(w) && is_aligned16(m) && is_aligned16(v) && is_aligned16(grad) && is_aligned16(copy);
    launch(adamw_kernel, dim3((unsigned)ceil_div<int64_t>(n, ADAMW_THREADS * PACK_X)), ADAMW_THREADS, 0,
           stream, w, copy, m, v, grad, n, adamw_step(adamw, lr, decay, grad_scale, t), aligned);
}

static __global__ void __launch_bounds__(ADAMW_THREADS)
    round_copy_kernel(floatX *out, const float *in, int64_t n, bool aligned) {
    int64_t i = ((int64_t)blockIdx.x * ADAMW_THREADS + threadIdx.x) * PACK_X;
    if (aligned && i + PACK_X <= n) {
        store_pack(out + i, narrow(load_floats(in + i)));
        return;
    }
    for (int64_t j = i; j < n && j < i + PACK_X; j++) {
        out[j] = to_x(in[j]);
    }
}

// out[i] = in[i] rounded
static inline void round_copy(floatX *out, const float *in, int64_t n, cudaStream_t stream) {
    launch(round_copy_kernel, dim3((unsigned)ceil_div<int64_t>(n, ADAMW_THREADS * PACK_X)), ADAMW_THREADS, 0,
           stream, out, in, n, is_aligned16(out) && is_aligned16(in));
}

#endif
