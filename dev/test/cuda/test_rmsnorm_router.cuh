/*
rmsnorm_router.cuh against rmsnorm.h and matmul.h: few experts (fused) and many (two calls), rows that a
warp can hold and wider ones, numbers of rows that leave a warp's last ones empty.

The logits' weights are fp32 masters that bf16 cannot represent. The logits are compared with the C product
of what the device normed, so that only their own error is seen: 1e-5. rmsnorm_again must make the normed
rows bit for bit.
*/
#ifndef TEST_CUDA_RMSNORM_ROUTER_CUH
#define TEST_CUDA_RMSNORM_ROUTER_CUH

#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "llmc/gpu/rmsnorm_router.cuh"
#include "harness.cuh"
#include "test_matmul.cuh"

static void rmsnorm_router_case(GemmPlans *plans, int64_t N, int d, int E) {
    const float eps = 1e-5f;
    int64_t size = N * d;
    float *x = host_random(size, 1, 1.0f), *w = NEW(float, d), *router = NEW(float, (int64_t)E *d);
    float *out = NEW(float, size), *rstd = NEW(float, N), *logits = NEW(float, N *E);
    fill_uniform(w, (size_t)d, 2, 1.5f);
    fill_uniform(router, (size_t)E * d, 3, 0.01f);
    floatX *d_x = device_x(x, size), *d_out = device_new<floatX>(size), *again = device_new<floatX>(size),
           *parts = device_new<floatX>(3ll * E * d);
    float *d_w = device_f(w, d), *d_router = device_f(router, (int64_t)E * d), *d_rstd = device_new<float>(N),
          *d_logits = device_new<float>(N * E), *sums = device_new<float>(router_sums_floats(N, E));
    rmsnorm_forward(out, rstd, x, w, N, d, eps);
    rmsnorm_router_forward(d_out, d_rstd, d_logits, d_x, d_w, d_router, N, d, E, eps, parts, sums, plans, 0);
    rmsnorm_again(again, d_rstd, d_x, d_w, N, d, 0);
    check_device("rmsnorm_router out", d_out, out, size, tolerance(1e-5, 2e-3));
    check_device("rmsnorm_router rstd", d_rstd, rstd, N, 1e-5);
    float *normed = fetch(d_out, size);
    matmul_forward(logits, normed, router, N, d, E);
    check_device("rmsnorm_router logits", d_logits, logits, N * E, 1e-5);
    CHECK(device_hash(d_out, size * sizeof(floatX)) == device_hash(again, size * sizeof(floatX)));
    const void *taken[] = {d_x, d_out, again, parts, sums, d_w, d_router, d_rstd, d_logits};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {x, w, router, out, rstd, logits, normed};
    for (float *p : mine) {
        free(p);
    }
}

// As router_least_part_case of test_matmul.cuh: pairs v and -(hi + mid) of v, so that only v's least part is
// left of the logit. Rows of 1 are normed to 0.999995, which is 1 in bf16
static void rmsnorm_router_least_part_case(GemmPlans *plans) {
    enum { D = 8 };
    float x[D], w[D], router[D], want = 0.0f;
    fill_uniform(router, D, 7, 0.01f);
    for (int c = 0; c < D; c += 2) {
        float high = to_float(to_x(router[c])), middle = to_float(to_x(router[c] - high));
        router[c + 1] = -(high + middle);
        want += router[c] + router[c + 1];
        x[c] = x[c + 1] = w[c] = w[c + 1] = 1.0f;
    }
    floatX *d_x = device_x(x, D), *out = device_new<floatX>(D), *parts = device_new<floatX>(3 * D);
    float *d_w = device_f(w, D), *d_router = device_f(router, D), *rstd = device_new<float>(1),
          *logit = device_new<float>(1), *sums = device_new<float>(router_sums_floats(1, 1));
    rmsnorm_router_forward(out, rstd, logit, d_x, d_w, d_router, 1, D, 1, 1e-5f, parts, sums, plans, 0);
    check_device("router's least part", logit, &want, 1, 1e-5);
    const void *taken[] = {d_x, out, parts, sums, d_w, d_router, rstd, logit};
    for (const void *p : taken) {
        device_release(p);
    }
}

static void test_cuda_rmsnorm_router(void) {
    GemmPlans *plans = gemm_test_open();
    const int widths[] = {8, 24, 200, 768, 1024, 1536, 2056}, experts[] = {1, 3, 8, 16, 17, 128};
    for (int d : widths) {
        for (int E : experts) {
            rmsnorm_router_case(plans, 1, d, E);
            rmsnorm_router_case(plans, 39, d, E);
        }
    }
    rmsnorm_router_case(plans, 300, 24, 8);
    if (!is_fp32()) {
        rmsnorm_router_least_part_case(plans);
    }
    if (!emulated()) {
        rmsnorm_router_case(plans, 20011, 768, 8); // each warp goes over several groups of rows
        rmsnorm_router_case(plans, 20011, 1024, 16);
        rmsnorm_router_case(plans, 20011, 1536, 8);
    }
    gemm_test_close(plans);
}

#endif
