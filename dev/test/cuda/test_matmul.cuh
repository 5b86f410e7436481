/*
matmul.cuh against matmul.h: all transpositions, addends, types of C, leading dimensions and addresses that rule
out 16-byte accesses; linear layers; the router's logits from fp32 weights; plans that are found again.

Tolerances: the terms of a product of bf16 numbers are exact in fp32, so what is left is its fp32 sum, which
tensor cores truncate: 1e-5. A bf16 result is rounded once besides, at most 2^-9 of an element. The logits are
compared with a product by the unrounded fp32 weights.
*/
#ifndef TEST_CUDA_GEMM_CUH
#define TEST_CUDA_GEMM_CUH

#include "llmc/matmul.h"
#include "llmc/matmul.cuh"
#include "harness.cuh"

enum { TEST_WORKSPACE = 32 << 20 };

// the tests' plans, on a workspace of their own
static GemmPlans *gemm_test_open(void) {
    GemmPlans *plans = NEW(GemmPlans, 1);
    gemm_open(plans, device_new<char>(TEST_WORKSPACE), TEST_WORKSPACE);
    return plans;
}

static void gemm_test_close(GemmPlans *plans) {
    device_release(plans->workspace);
    gemm_close(plans);
    free(plans);
}

static floatX *device_as(floatX *, const float *host, int64_t n) {
    return device_x(host, n);
}
#ifndef PRECISION_FP32
static float *device_as(float *, const float *host, int64_t n) {
    return device_f(host, n);
}
#endif

// op(A)[M, K] op(B)[K, N]; `pad` columns behind every row of each matrix, and as many elements before its
// first. addend 0: none; 1: C itself; 2: another matrix
template <class T>
static void gemm_case(GemmPlans *plans, int trans_a, int trans_b, int M, int N, int K, int pad, int addend) {
    int rows_a = trans_a ? K : M, lda = (trans_a ? M : K) + pad;
    int rows_b = trans_b ? N : K, ldb = (trans_b ? K : N) + pad, ldc = N + pad;
    int64_t size_a = (int64_t)rows_a * lda + pad, size_b = (int64_t)rows_b * ldb + pad;
    int64_t size_c = (int64_t)M * ldc + pad;
    float *A = host_random(size_a, 1, 1.0f), *B = host_random(size_b, 2, 1.0f),
          *C = host_random(size_c, 3, 1.0f);
    floatX *dA = device_x(A, size_a), *dB = device_x(B, size_b);
    T *other = device_as((T *)NULL, C, size_c);
    for (int64_t i = 0; i < (int64_t)M * N; i++) { // what must not matter: C where it is not the addend
        C[pad + i / N * ldc + i % N] += addend == 1 ? 0.0f : 1.0f;
    }
    T *dC[2] = {device_as((T *)NULL, C, size_c), device_as((T *)NULL, C, size_c)};
    for (int64_t i = 0; i < (int64_t)M * N; i++) {
        C[pad + i / N * ldc + i % N] -= addend == 1 ? 0.0f : 1.0f;
    }
    for (int i = 0; i < 2; i++) {
        const T *from = addend == 0 ? NULL : addend == 1 ? dC[i] + pad : other + pad;
        gemm(plans, trans_a, trans_b, M, N, K, dA + pad, lda, dB + pad, ldb, dC[i] + pad, ldc, from, 0);
    }
    sgemm(trans_a, trans_b, M, N, K, A + pad, lda, B + pad, ldb, C + pad, ldc, addend != 0);
    check_device("gemm", dC[0], C, size_c, sizeof(T) == sizeof(float) ? 1e-5 : 2e-3);
    CHECK(device_hash(dC[0], size_c * sizeof(T)) == device_hash(dC[1], size_c * sizeof(T)));
    const void *taken[] = {dA, dB, dC[0], dC[1], other};
    for (const void *p : taken) {
        device_release(p);
    }
    free(A);
    free(B);
    free(C);
}

static void gemm_layer_case(GemmPlans *plans, int64_t N, int C, int OC) {
    float *inp = host_random(N * C, 1, 1.0f), *w = host_random((int64_t)OC * C, 2, 1.0f);
    float *dout = host_random(N * OC, 3, 1.0f), *dw = host_random((int64_t)OC * C, 4, 1.0f);
    float *out = NEW(float, N *OC), *dinp = NEW(float, N *C);
    floatX *d_inp = device_x(inp, N * C), *d_w = device_x(w, (int64_t)OC * C),
           *d_dout = device_x(dout, N * OC);
    floatX *d_out = device_new<floatX>(N * OC), *d_dinp = device_new<floatX>(N * C);
    float *d_dw = device_f(dw, (int64_t)OC * C);
    matmul_forward(out, inp, w, N, C, OC);
    matmul_backward(dinp, dw, dout, inp, w, N, C, OC);
    matmul_forward(d_out, d_inp, d_w, N, C, OC, plans, 0);
    matmul_backward(d_dinp, NULL, d_dout, d_inp, d_w, N, C, OC, plans, 0);
    matmul_backward(NULL, d_dw, d_dout, d_inp, d_w, N, C, OC, plans, 0);
    check_device("matmul out", d_out, out, N * OC, tolerance(1e-5, 2e-3));
    check_device("matmul dinp", d_dinp, dinp, N * C, tolerance(1e-5, 2e-3));
    check_device("matmul dw", d_dw, dw, (int64_t)OC * C, 1e-5);
    const void *taken[] = {d_inp, d_w, d_dout, d_out, d_dinp, d_dw};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {inp, w, dout, dw, out, dinp};
    for (float *p : mine) {
        free(p);
    }
}

// weights that bf16 cannot represent: bf16 weights would be wrong by 1e-3
static void router_logits_case(GemmPlans *plans, int64_t N, int d, int E) {
    float *x = host_random(N * d, 1, 1.0f), *w = NEW(float, (int64_t)E *d), *logits = NEW(float, N *E);
    fill_uniform(w, (size_t)E * d, 2, 0.01f);
    floatX *d_x = device_x(x, N * d), *d_parts = device_new<floatX>(3ll * E * d);
    float *d_w = device_f(w, (int64_t)E * d), *d_logits = device_new<float>(N * E),
          *sums = device_new<float>(router_sums_floats(N, E));
    matmul_forward(logits, x, w, N, d, E);
    router_logits(d_logits, d_x, d_w, N, d, E, d_parts, sums, plans, 0);
    check_device("router logits", d_logits, logits, N * E, 1e-5);
    float *parts = fetch(d_parts, is_fp32() ? 0 : 3ll * E * d);
    int inexact = 0;
    for (int64_t i = 0; i < (int64_t)E * d && !is_fp32(); i++) {
        inexact += parts[i] + (parts[E * d + i] + parts[2 * E * d + i]) != w[i];
    }
    CHECK(inexact == 0);
    const void *taken[] = {d_x, d_parts, sums, d_w, d_logits};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {x, w, logits, parts};
    for (float *p : mine) {
        free(p);
    }
}

// Weights in pairs, v and -(hi + mid) of v: of each pair only v's least part is left of the logit, 2^-18 of v
static void router_least_part_case(GemmPlans *plans) {
    enum { D = 8 };
    float x[D], w[D], want = 0.0f;
    fill_uniform(w, D, 7, 0.01f);
    for (int c = 0; c < D; c += 2) {
        float high = to_float(to_x(w[c])), middle = to_float(to_x(w[c] - high));
        w[c + 1] = -(high + middle);
        want += w[c] + w[c + 1];
        x[c] = x[c + 1] = 1.0f;
    }
    floatX *d_x = device_x(x, D), *parts = device_new<floatX>(3 * D);
    float *d_w = device_f(w, D), *logit = device_new<float>(1),
          *sums = device_new<float>(router_sums_floats(1, 1));
    router_logits(logit, d_x, d_w, 1, D, 1, parts, sums, plans, 0);
    check_device("router's least part", logit, &want, 1, 1e-5);
    const void *taken[] = {d_x, parts, sums, d_w, logit};
    for (const void *p : taken) {
        device_release(p);
    }
}

// a shape has one plan however often it is used; more shapes than plans still come out right
static void gemm_plans_case(void) {
    GemmPlans *plans = gemm_test_open();
    gemm_case<float>(plans, 0, 1, 24, 16, 32, 0, 0); // (twice within)
    gemm_case<float>(plans, 0, 1, 24, 16, 32, 0, 1);
    CHECK(plans->made == 1);
    gemm_case<float>(plans, 0, 1, 24, 16, 32, 1, 0);
    CHECK(plans->made == 2);
    for (int M = 1; M <= GEMM_MOST_PLANS + 3; M++) {
        gemm_case<float>(plans, 0, 1, M, 8, 16, 0, 0);
    }
    gemm_case<float>(plans, 0, 1, 24, 16, 32, 0, 0); // made anew
    gemm_test_close(plans);
}

static void test_cuda_gemm(void) {
    GemmPlans *plans = gemm_test_open();
    const int shapes[][3] = {{1, 1, 1}, {17, 67, 24}, {300, 192, 72}, {64, 3, 129}, {33, 1, 768}};
    for (const int *s : shapes) {
        for (int trans = 0; trans < 4; trans++) {
            for (int addend = 0; addend < 3; addend++) {
                int pad = addend * 4 % 7; // 0, 4, 1: addresses of 16, 8 and 2 bytes
                gemm_case<floatX>(plans, trans & 1, trans / 2, s[0], s[1], s[2], pad, addend);
                gemm_case<float>(plans, trans & 1, trans / 2, s[0], s[1], s[2], pad, addend);
            }
        }
    }
    gemm_layer_case(plans, 1, 24, 40);
    gemm_layer_case(plans, 17, 24, 67); // V
    gemm_layer_case(plans, 300, 192, 320);
    const int experts[] = {1, 3, 8, 128};
    for (int E : experts) {
        router_logits_case(plans, 17, 192, E);
        router_logits_case(plans, 300, 24, E);
    }
    if (!is_fp32()) {
        router_least_part_case(plans);
    }
    if (!emulated()) {
        gemm_layer_case(plans, 4096, 768, 1280);
        gemm_layer_case(plans, 1000, 768, 50257);
        router_logits_case(plans, 4096, 768, 8);
        router_logits_case(plans, 5000, 64, 1024); // its sums in three pieces
    }
    gemm_test_close(plans);
    gemm_plans_case();
}

#endif
