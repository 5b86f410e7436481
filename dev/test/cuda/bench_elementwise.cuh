/*
Speed of what runs between the expert layers: GB/s of the kernels that memory bounds (bytes that have to move,
over time: an H100 has 3350, an H200 4800, of which a copy reaches about 90 %), TFLOP/s of cuBLASLt's products
(989 dense in bf16). The small preset's shapes: N = 65536 tokens, d = 768, logits by 8192 rows of V = 51200.

Buffers are larger than the caches, so that a repeat does not find them there; operands are N(0, 1), since
zeros would cost the multipliers less power and run faster. Medians of 10.
*/
#ifndef BENCH_ELEMENTWISE_CUH
#define BENCH_ELEMENTWISE_CUH

#include "llmc/adamw.cuh"
#include "llmc/crossentropy.cuh"
#include "llmc/embedding.cuh"
#include "llmc/matmul.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/gpu/rmsnorm_router.cuh"
#include "llmc/rope.cuh"
#include "harness.cuh"

enum { BENCH_N = 65536, BENCH_D = 768, BENCH_V = 51200, BENCH_ROWS = 8192, BENCH_PARAMETERS = 100000000 };

// the sum of 12 uniform numbers less its mean: variance 1
static __device__ float bench_normal(uint64_t i) {
    float sum = -6.0f;
    for (int k = 0; k < 12; k++) {
        uint64_t x = (12 * i + k + 1) * 0x9E3779B97F4A7C15ull;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
        sum += (float)(x >> 40) / 16777216.0f;
    }
    return sum;
}

__device__ __forceinline__ void bench_set(float &x, float value) {
    x = value;
}

__device__ __forceinline__ void bench_set(__nv_bfloat16 &x, float value) {
    x = __float2bfloat16(value);
}

template <class T> static __global__ void bench_fill_kernel(T *x, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        bench_set(x[i], bench_normal((uint64_t)i));
    }
}

template <class T> static T *bench_new(int64_t n) {
    T *x = device_new<T>(n);
    launch(bench_fill_kernel<T>, 1024, 256, 0, 0, x, n);
    return x;
}

static void bench_gb(const char *what, double bytes, double ms) {
    printf("  %-28s %8.3f ms %8.0f GB/s\n", what, ms, 1e-6 * bytes / ms);
}

static void bench_rows(void) {
    const double x_bytes = (double)BENCH_N * BENCH_D * sizeof(floatX);
    floatX *x = bench_new<floatX>((int64_t)BENCH_N * BENCH_D),
           *dout = bench_new<floatX>((int64_t)BENCH_N * BENCH_D);
    floatX *out = bench_new<floatX>((int64_t)BENCH_N * BENCH_D);
    float *w = bench_new<float>(BENCH_D), *dw = bench_new<float>(BENCH_D), *rstd = bench_new<float>(BENCH_N);
    float *scratch = device_new<float>(rmsnorm_scratch_floats(BENCH_D));
    bench_gb("rmsnorm forward", 2 * x_bytes,
             device_ms([&] { rmsnorm_forward(out, rstd, x, w, BENCH_N, BENCH_D, 1e-5f, 0); }));
    bench_gb("rmsnorm backward", 4 * x_bytes,
             device_ms([&] { rmsnorm_backward(out, dw, dout, x, w, rstd, BENCH_N, BENCH_D, scratch, 0); }));
    const void *taken[] = {x, dout, out, w, dw, rstd, scratch};
    for (const void *p : taken) {
        device_release(p);
    }
}

static void bench_rope(void) {
    enum { T = 1024, HEADS = 16, HD = 64, STRIDE = 20 * HD };
    floatX *qkv = bench_new<floatX>((int64_t)BENCH_N * STRIDE);
    float *table = bench_new<float>(T * HD);
    bench_gb("rope", 2.0 * BENCH_N * HEADS * HD * sizeof(floatX),
             device_ms([&] { rope_forward(qkv, table, BENCH_N / T, T, 0, HEADS, HD, STRIDE, 0); }));
    device_release(qkv);
    device_release(table);
}

// ids as frequent as words: of rank r with probability proportional to 1/r
static void bench_embedding(void) {
    const double x_bytes = (double)BENCH_N * BENCH_D * sizeof(floatX);
    int *ids = NEW(int, BENCH_N), *place = NEW(int, BENCH_V), seen = 0;
    int *memory = NEW(int, embedding_plan_ints(BENCH_N));
    float *uniform = NEW(float, BENCH_N);
    fill_uniform(uniform, BENCH_N, 1, 0.5f);
    for (int n = 0; n < BENCH_N; n++) {
        ids[n] = (int)(pow((double)BENCH_V, uniform[n] + 0.5) - 1.0) % BENCH_V;
    }
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    embedding_plan(embedding_plan_in(memory, BENCH_N), ids, BENCH_N, BENCH_V, place);
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int n = 0, last = -1; n < BENCH_N; n++) { // positions by id
        int id = ids[embedding_plan_in(memory, BENCH_N).position[n]];
        seen += id != last;
        last = id;
    }
    floatX *table = bench_new<floatX>((int64_t)BENCH_V * BENCH_D),
           *x = bench_new<floatX>((int64_t)BENCH_N * BENCH_D);
    float *dtable = bench_new<float>((int64_t)BENCH_V * BENCH_D);
    float *partial = device_new<float>(partial_rows_most(BENCH_N) * BENCH_D);
    int *d_ids = device_i(ids, BENCH_N), *d_memory = device_i(memory, (int64_t)embedding_plan_ints(BENCH_N));
    EmbeddingPlan plan = embedding_plan_in(d_memory, BENCH_N);
    printf("  %-28s %8.3f ms on the host, %d ids seen\n", "embedding plan",
           1e3 * (double)(end.tv_sec - begin.tv_sec) + 1e-6 * (double)(end.tv_nsec - begin.tv_nsec), seen);
    bench_gb("embedding forward", 2 * x_bytes,
             device_ms([&] { embedding_forward(x, d_ids, table, BENCH_N, BENCH_D, 0); }));
    bench_gb("embedding backward", x_bytes + 8.0 * seen * BENCH_D,
             device_ms([&] { embedding_backward(dtable, x, plan, partial, BENCH_N, BENCH_D, 0); }));
    const void *taken[] = {table, x, dtable, partial, d_ids, d_memory};
    for (const void *p : taken) {
        device_release(p);
    }
    free(ids);
    free(place);
    free(memory);
    free(uniform);
}

static void bench_crossentropy(void) {
    const double bytes = (double)BENCH_ROWS * BENCH_V * sizeof(floatX);
    floatX *logits = bench_new<floatX>((int64_t)BENCH_ROWS * BENCH_V);
    float *losses = device_new<float>(BENCH_ROWS);
    double *sum = device_new<double>(1);
    int *targets = device_new<int>(BENCH_ROWS);
    CUDA_CHECK(cudaMemset(targets, 0, BENCH_ROWS * sizeof(int)));
    bench_gb("cross entropy, gradient", 2 * bytes, device_ms([&] {
                 crossentropy_forward_backward(losses, logits, targets, BENCH_ROWS, BENCH_V, 1.0f, 0);
             }));
    bench_gb("cross entropy, loss alone", bytes, device_ms([&] {
                 crossentropy_forward_backward(losses, logits, targets, BENCH_ROWS, BENCH_V, 0.0f, 0);
             }));
    bench_gb("cross entropy, V = 50257", 2 * bytes * 50257 / BENCH_V, device_ms([&] {
                 crossentropy_forward_backward(losses, logits, targets, BENCH_ROWS, 50257, 1.0f, 0);
             }));
    bench_gb("sum of losses", BENCH_ROWS * 4.0,
             device_ms([&] { sum_losses(sum, losses, BENCH_ROWS, 1.0, 0); }));
    device_release(logits);
    device_release(losses);
    device_release(sum);
    device_release(targets);
}

static void bench_adamw(void) {
    const AdamW adamw = {0.9, 0.999, 1e-8};
    const double n = BENCH_PARAMETERS;
    float *w = bench_new<float>(BENCH_PARAMETERS), *m = bench_new<float>(BENCH_PARAMETERS);
    float *v = device_new<float>(BENCH_PARAMETERS), *grad = bench_new<float>(BENCH_PARAMETERS);
    floatX *w_x = device_new<floatX>(BENCH_PARAMETERS);
    const int64_t whole = BENCH_PARAMETERS / BUCKET_BLOCK * BUCKET_BLOCK;
    double *squares = device_new<double>(whole / BUCKET_BLOCK);
    CUDA_CHECK(cudaMemset(v, 0, BENCH_PARAMETERS * sizeof(float)));
    bench_gb("adamw", n * (28 + sizeof(floatX)), device_ms([&] {
                 adamw_update(w, w_x, m, v, grad, BENCH_PARAMETERS, adamw, 1e-4, 0.01, 1.0f, 10, 0);
             }));
    bench_gb("gradient norm", (double)whole * 4,
             device_ms([&] { sum_parts(grad, NULL, whole, whole, 0, 1, squares, 0); }));
    bench_gb("sum of two ranks' gradients, norm", (double)whole * 12,
             device_ms([&] { sum_parts(grad, m, whole, whole, 0, 2, squares, 0); }));
    bench_gb("rounded copy", n * (4 + sizeof(floatX)),
             device_ms([&] { round_copy(w_x, w, BENCH_PARAMETERS, 0); }));
    const void *taken[] = {w, m, v, grad, w_x, squares};
    for (const void *p : taken) {
        device_release(p);
    }
}

// a linear layer forward and in both directions backward
static void bench_layer(GemmPlans *plans, int64_t N, int C, int OC) {
    floatX *inp = bench_new<floatX>(N * C), *w = bench_new<floatX>((int64_t)OC * C),
           *out = bench_new<floatX>(N * OC);
    float *dw = bench_new<float>((int64_t)OC * C);
    double flops = 2.0 * (double)N * C * OC;
    double forward = device_ms([&] { matmul_forward(out, inp, w, N, C, OC, plans, 0); });
    double dinp = device_ms([&] { matmul_backward(inp, NULL, out, inp, w, N, C, OC, plans, 0); });
    double dweight = device_ms([&] { matmul_backward(NULL, dw, out, inp, w, N, C, OC, plans, 0); });
    printf("  gemm N %lld, %d -> %-11d forward %.3f ms %.0f TFLOP/s, dinp %.3f ms %.0f, dw %.3f ms %.0f\n",
           (long long)N, C, OC, forward, 1e-9 * flops / forward, dinp, 1e-9 * flops / dinp, dweight,
           1e-9 * flops / dweight);
    device_release(inp);
    device_release(w);
    device_release(out);
    device_release(dw);
}

// the norm before the experts with the router's logits
static void bench_router_logits(GemmPlans *plans, int64_t N, int d, int E) {
    floatX *x = bench_new<floatX>(N * d), *normed = device_new<floatX>(N * d),
           *parts = device_new<floatX>(3ll * E * d);
    float *router = bench_new<float>((int64_t)E * d), *w = bench_new<float>(d), *rstd = device_new<float>(N),
          *logits = device_new<float>(N * E), *sums = device_new<float>(router_sums_floats(N, E));
    const double logit_bytes = 4.0 * (double)N * E, x_bytes = (double)N * d * sizeof(floatX);
    char name[64];
    snprintf(name, sizeof(name), "router logits, d %d, E %d", d, E);
    bench_gb(name, x_bytes + logit_bytes, // x once: what one product would move
             device_ms([&] { router_logits(logits, x, router, N, d, E, parts, sums, plans, 0); }));
    snprintf(name, sizeof(name), "rmsnorm_router, d %d, E %d", d, E);
    bench_gb(name, 2 * x_bytes + logit_bytes, device_ms([&] {
                 rmsnorm_router_forward(normed, rstd, logits, x, w, router, N, d, E, 1e-5f, parts, sums,
                                        plans, 0);
             }));
    const void *taken[] = {x, normed, parts, sums, router, w, rstd, logits};
    for (const void *p : taken) {
        device_release(p);
    }
}

static void bench_cuda_elementwise(void) {
    GemmPlans *plans = NEW(GemmPlans, 1);
    const size_t workspace = 32 << 20;
    bench_rows();
    bench_rope();
    bench_embedding();
    bench_crossentropy();
    bench_adamw();
    gemm_open(plans, device_new<char>(workspace), workspace);
    bench_router_logits(plans, BENCH_N, BENCH_D, 8);
    bench_router_logits(plans, BENCH_N, BENCH_D, 16);
    bench_router_logits(plans, BENCH_N, BENCH_D, 64);
    bench_router_logits(plans, BENCH_N, 1024, 8);
    bench_router_logits(plans, BENCH_N / 2, 1536, 8);
    bench_layer(plans, BENCH_N, BENCH_D, 1280);
    bench_layer(plans, BENCH_N, BENCH_D, BENCH_D);
    bench_layer(plans, BENCH_ROWS, BENCH_D, BENCH_V);
    device_release(plans->workspace);
    gemm_close(plans);
    free(plans);
}

#endif
