/*
attention.cuh against attention.h, and rope.h behind it, on the same (rounded) inputs: forward with and
without a cache, each of dq, dk and dv; a repeat gives the same bits, as do the rows of a cached forward;
scores far beyond exp's range.

Tolerances in bf16: p and ds are rounded to 8 bits before their products, results once more, each rounding a
relative 2^-9 / sqrt(3) = 1.1e-3 where it is not averaged out: 4e-3 forward and dv. ds has in D the rounding
of the stored output too: 6e-3 for dq and dk. Where one key has nearly all of p, ds is a difference of nearly
equal numbers, and has fewer digits in either precision.
*/
#ifndef TEST_CUDA_ATTENTION_CUH
#define TEST_CUDA_ATTENTION_CUH

#include "llmc/attention.cuh"
#include "llmc/attention.h"
#include "llmc/rope.h"
#include "harness.cuh"

typedef struct {
    int B, T, H, KV, hd, start;
    float scale; // of the inputs
    int ramp;    // 1: they grow with the position, so that the softmax's maximum does too
} AttentionCase;

static const AttentionCase ATTENTION_CASES[] = {
    {1, 1, 1, 1, 8, 0, 1.0f, 0},      {2, 1, 4, 2, 64, 0, 1.0f, 0},    {2, 17, 2, 2, 8, 0, 1.0f, 0},
    {1, 64, 2, 1, 16, 0, 1.0f, 0},    {2, 65, 3, 1, 24, 0, 1.0f, 0},   {1, 130, 4, 1, 40, 0, 1.0f, 0},
    {1, 130, 3, 1, 64, 0, 2.0f, 0},   {1, 65, 2, 2, 64, 0, 1.0f, 0},   {1, 130, 2, 1, 96, 0, 2.0f, 0},
    {2, 17, 4, 2, 96, 0, 1.0f, 0},    {1, 130, 1, 1, 128, 0, 2.0f, 0}, {1, 33, 2, 1, 104, 0, 1.0f, 0},
    {1, 130, 2, 1, 56, 100, 1.0f, 0}, {1, 66, 4, 1, 8, 65, 1.0f, 0},   {1, 130, 2, 1, 32, 3, 1.0f, 0},
    {2, 65, 2, 1, 64, 0, 20.0f, 0},   {1, 130, 2, 1, 64, 0, 5.0f, 1},  {1, 200, 1, 1, 96, 0, 4.0f, 1},
    {1, 130, 1, 1, 64, 0, 30.0f, 1},  {1, 200, 6, 2, 64, 70, 1.0f, 0}, {1, 300, 3, 1, 96, 290, 1.0f, 0},
};

static float *attention_inputs(const AttentionCase *s) {
    int64_t width = (s->H + 2 * s->KV) * s->hd, n = s->B * s->T * width;
    float *qkv = host_random(n, 11, s->scale);
    for (int64_t i = 0; s->ramp && i < n; i++) {
        qkv[i] = to_float(to_x(qkv[i] * (float)(i / width % s->T + 1) / (float)s->T));
    }
    return qkv;
}

// a part of dqkv: columns from .. from + columns - 1 of each position
static float *attention_part(const float *qkv, int positions, int width, int from, int columns) {
    float *part = NEW(float, (int64_t)positions *columns);
    for (int i = 0; i < positions; i++) {
        memcpy(part + (int64_t)i * columns, qkv + (int64_t)i * width + from, (size_t)columns * sizeof(float));
    }
    return part;
}

static void check_attention_part(const char *name, const AttentionCase *s, const float *got,
                                 const float *want, int from, int columns, double limit) {
    char what[128];
    int width = (s->H + 2 * s->KV) * s->hd;
    float *a = attention_part(got, s->B * s->T, width, from, columns);
    float *b = attention_part(want, s->B * s->T, width, from, columns);
    snprintf(what, sizeof(what), "attention %s (B %d, T %d, H %d, KV %d, hd %d, scale %g)", name, s->B, s->T,
             s->H, s->KV, s->hd, s->scale);
    check_close(what, a, b, (size_t)s->B * s->T * columns, limit);
    free(a);
    free(b);
}

// a position that sees only itself gives its query no gradient at all, not even a rounding error
static void check_first_query(const AttentionCase *s, const float *dqkv) {
    int nonzero = 0;
    for (int b = 0; b < s->B; b++) {
        for (int i = 0; i < s->H * s->hd; i++) {
            nonzero += dqkv[(int64_t)b * s->T * (s->H + 2 * s->KV) * s->hd + i] != 0.0f;
        }
    }
    CHECK(nonzero == 0);
}

static void attention_backward_case(const AttentionCase *s, const float *qkv, const floatX *dev_qkv,
                                    const floatX *dev_out, const float *dev_lse, const float *lse) {
    int width = (s->H + 2 * s->KV) * s->hd, queries = s->H * s->hd, keys = s->KV * s->hd;
    int64_t n_qkv = (int64_t)s->B * s->T * width, n_out = (int64_t)s->B * s->T * queries;
    int64_t n_scratch = (int64_t)attention_scratch_floats(s->B, s->T, s->H);
    float *dout = host_random(n_out, 12, 1.0f), *want = NEW(float, n_qkv);
    float *table = NEW(float, (int64_t)s->T * s->hd);
    rope_table(table, s->T, s->hd, 1e4);
    floatX *dev_dout = device_x(dout, n_out), *dev_dqkv = device_new<floatX>(n_qkv);
    float *scratch = device_new<float>(n_scratch), *dev_table = device_f(table, (int64_t)s->T * s->hd);
    attention_backward(want, dout, qkv, lse, s->B, s->T, s->H, s->KV, s->hd);
    rope_backward(want, table, s->B, s->T, 0, s->H + s->KV, s->hd, width);
    attention_rope_backward(dev_dqkv, dev_dout, dev_out, dev_qkv, dev_lse, scratch, dev_table, s->B, s->T,
                            s->H, s->KV, s->hd, test_kernels, 0);
    float *got = fetch(dev_dqkv, n_qkv);
    int sharp = s->scale > 10.0f;
    double limit = tolerance(sharp ? 1e-3 : 1e-5, sharp ? 5e-2 : s->ramp ? 1.2e-2 : 6e-3);
    check_attention_part("dq", s, got, want, 0, queries, limit);
    check_attention_part("dk", s, got, want, queries, keys, limit);
    check_attention_part("dv", s, got, want, queries + keys, keys, tolerance(sharp ? 1e-3 : 1e-5, 4e-3));
    check_first_query(s, got);

    floatX *dev_again = device_new<floatX>(n_qkv);
    attention_rope_backward(dev_again, dev_dout, dev_out, dev_qkv, dev_lse, scratch, dev_table, s->B, s->T,
                            s->H, s->KV, s->hd, test_kernels, 0);
    int64_t bytes = n_qkv * (int64_t)sizeof(floatX);
    CHECK(device_hash(dev_dqkv, bytes) == device_hash(dev_again, bytes));
    device_release(dev_dout);
    device_release(dev_dqkv);
    device_release(dev_again);
    device_release(scratch);
    device_release(dev_table);
    free(table);
    free(dout);
    free(want);
    free(got);
}

static void attention_case(const AttentionCase *s) {
    char what[128];
    int width = (s->H + 2 * s->KV) * s->hd, rows = s->T - s->start, queries = s->H * s->hd;
    int64_t n_qkv = (int64_t)s->B * s->T * width, n_out = (int64_t)s->B * rows * queries;
    int64_t n_lse = (int64_t)s->B * s->H * rows;
    float *qkv = attention_inputs(s), *out = NEW(float, n_out), *lse = NEW(float, n_lse);
    floatX *dev_qkv = device_x(qkv, n_qkv), *dev_out = device_new<floatX>(n_out);
    float *dev_lse = device_new<float>(n_lse);
    attention_forward(out, lse, qkv, s->B, s->T, s->start, s->H, s->KV, s->hd);
    attention_forward(dev_out, dev_lse, dev_qkv, s->B, s->T, s->start, s->H, s->KV, s->hd, test_kernels, 0);
    int sharp = s->scale > 10.0f;
    snprintf(what, sizeof(what), "attention (B %d, T %d, H %d, KV %d, hd %d, start %d, scale %g)", s->B, s->T,
             s->H, s->KV, s->hd, s->start, s->scale);
    check_device(what, dev_out, out, n_out, tolerance(sharp ? 1e-3 : 1e-5, 4e-3));
    check_device("attention's lse", dev_lse, lse, n_lse, 1e-5);
    if (s->start == 0) {
        attention_backward_case(s, qkv, dev_qkv, dev_out, dev_lse, lse);
    } else { // the same rows as those of the whole forward, bit for bit
        floatX *whole = device_new<floatX>((int64_t)s->T * queries);
        float *whole_lse = device_new<float>((int64_t)s->T * s->H);
        attention_forward(whole, whole_lse, dev_qkv, s->B, s->T, 0, s->H, s->KV, s->hd, test_kernels, 0);
        int64_t bytes = n_out * (int64_t)sizeof(floatX);
        CHECK(device_hash(whole + (int64_t)s->start * queries, bytes) == device_hash(dev_out, bytes));
        device_release(whole);
        device_release(whole_lse);
    }
    device_release(dev_qkv);
    device_release(dev_out);
    device_release(dev_lse);
    free(qkv);
    free(out);
    free(lse);
}

static void test_cuda_attention(void) {
    for (size_t i = 0; i < sizeof(ATTENTION_CASES) / sizeof(ATTENTION_CASES[0]); i++) {
        attention_case(&ATTENTION_CASES[i]);
    }
    if (!emulated()) {
        AttentionCase small = {2, 1024, 12, 4, 64, 0, 1.0f, 0}, large = {2, 1024, 4, 1, 96, 0, 1.0f, 0};
        AttentionCase odd = {1, 999, 3, 3, 128, 0, 4.0f, 1};
        attention_case(&small);
        attention_case(&large);
        attention_case(&odd);
    }
}

static void bench_attention_shape(int B, int T, int H, int KV, int hd) {
    int64_t n_qkv = (int64_t)B * T * (H + 2 * KV) * hd, n_out = (int64_t)B * T * H * hd;
    float *qkv = host_random(n_qkv, 21, 1.7f), *dout = host_random(n_out, 22, 1.7f);
    floatX *dev_qkv = device_x(qkv, n_qkv), *dev_dout = device_x(dout, n_out);
    floatX *dev_out = device_new<floatX>(n_out), *dev_dqkv = device_new<floatX>(n_qkv);
    float *lse = device_new<float>((int64_t)B * H * T), *table = NEW(float, (int64_t)T *hd);
    float *scratch = device_new<float>((int64_t)attention_scratch_floats(B, T, H));
    rope_table(table, T, hd, 1e6);
    float *dev_table = device_f(table, (int64_t)T * hd);
    double forward =
        device_ms([&] { attention_forward(dev_out, lse, dev_qkv, B, T, 0, H, KV, hd, test_kernels, 0); });
    double backward = device_ms([&] {
        attention_rope_backward(dev_dqkv, dev_dout, dev_out, dev_qkv, lse, scratch, dev_table, B, T, H, KV,
                                hd, test_kernels, 0);
    });
    double tera = 4.0 * B * H * T * T * hd / 2.0 * 1e-12; // counted causal
    printf("attention B %d, T %d, H %d, KV %d, hd %d: forward %.3f ms, %.0f TFLOP/s; backward %.3f ms, %.0f "
           "TFLOP/s\n",
           B, T, H, KV, hd, forward, tera / (forward * 1e-3), backward, 2.5 * tera / (backward * 1e-3));
    device_release(dev_qkv);
    device_release(dev_dout);
    device_release(dev_out);
    device_release(dev_dqkv);
    device_release(lse);
    device_release(scratch);
    device_release(dev_table);
    free(table);
    free(qkv);
    free(dout);
}

static inline void bench_cuda_attention(void) {
    bench_attention_shape(32, 1024, 12, 4, 64);
    bench_attention_shape(32, 1024, 16, 4, 64);
    bench_attention_shape(32, 1024, 16, 4, 96);
}

#endif
