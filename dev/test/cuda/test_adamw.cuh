/*
adamw.cuh against adamw.h: some steps from zero moments, sizes and addresses that are no whole packs, the
rounded copy.

Tolerance: the same expressions in fp32, up to the compilers' fused multiply-adds.
*/
#ifndef TEST_CUDA_ADAMW_CUH
#define TEST_CUDA_ADAMW_CUH

#include "llmc/adamw.h"
#include "llmc/adamw.cuh"
#include "harness.cuh"

// tensors that begin `offset` elements into their memory
static void adamw_cuda_case(int64_t n, int offset) {
    const AdamW adamw = {0.9, 0.999, 1e-8};
    int64_t all = n + offset;
    float *w = NEW(float, all), *m = NEW(float, all), *v = NEW(float, all), *grad = NEW(float, all);
    fill_uniform(w, (size_t)all, 1, 0.1f);
    float *d_w = device_f(w, all), *d_m = device_f(m, all), *d_v = device_f(v, all);
    float *d_grad = device_new<float>(all);
    floatX *d_w_x = device_new<floatX>(all);
    for (int t = 1; t <= 3; t++) {
        fill_uniform(grad, (size_t)all, (unsigned)(10 + t), 0.3f);
        CUDA_CHECK(cudaMemcpy(d_grad, grad, (size_t)all * sizeof(float), cudaMemcpyHostToDevice));
        adamw_update(w + offset, m + offset, v + offset, grad + offset, n, adamw, 1e-3, 0.01, 0.77f, t);
        adamw_update(d_w + offset, d_w_x + offset, d_m + offset, d_v + offset, d_grad + offset, n, adamw,
                     1e-3, 0.01, 0.77f, t, 0);
    }
    check_device("adamw w", d_w, w, all, 2e-7);
    check_device("adamw m", d_m, m, all, 2e-7);
    check_device("adamw v", d_v, v, all, 2e-7);
    float *got = fetch(d_w, all), *rounded = fetch(d_w_x + offset, n);
    int wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        wrong += rounded[i] != to_float(to_x(got[offset + i]));
    }
    CHECK(wrong == 0);
    CUDA_CHECK(cudaMemset(d_w_x, 0xff, (size_t)all * sizeof(floatX)));
    round_copy(d_w_x + offset, d_w + offset, n, 0);
    float *copied = fetch(d_w_x + offset, n);
    CHECK(memcmp(copied, rounded, (size_t)n * sizeof(float)) == 0);
    const void *taken[] = {d_w, d_m, d_v, d_grad, d_w_x};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {w, m, v, grad, got, rounded, copied};
    for (float *p : mine) {
        free(p);
    }
}

// without a copy, and with the weights named as their own copy: the same weights
static void adamw_cuda_no_copy(void) {
    enum { MANY = 37 };
    const AdamW adamw = {0.9, 0.999, 1e-8};
    float x[MANY], zero[MANY] = {0};
    fill_uniform(x, MANY, 1, 0.1f);
    float *w[2] = {device_f(x, MANY), device_f(x, MANY)}, *grad = device_f(x, MANY);
    for (int i = 0; i < 2; i++) {
        float *m = device_f(zero, MANY), *v = device_f(zero, MANY);
        adamw_update(w[i], i == 0 ? NULL : (floatX *)w[i], m, v, grad, MANY, adamw, 1e-2, 0.0, 1.0f, 1, 0);
        device_release(m);
        device_release(v);
    }
    float *got = fetch(w[0], MANY);
    CHECK(fabsf(fabsf(got[0] - x[0]) - 1e-2f) < 1e-6f);
    CHECK(device_hash(w[0], sizeof(x)) == device_hash(w[1], sizeof(x)));
    device_release(w[0]);
    device_release(w[1]);
    device_release(grad);
    free(got);
}

static void test_cuda_adamw(void) {
    adamw_cuda_case(1, 0);
    adamw_cuda_case(1003, 0);
    adamw_cuda_case(4096, 0);
    adamw_cuda_case(1003, 1);
    adamw_cuda_no_copy();
    if (!emulated()) {
        adamw_cuda_case(10000001, 0);
    }
}

#endif
