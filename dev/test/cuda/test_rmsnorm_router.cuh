/*
rmsnorm_router.cuh against rmsnorm.h and matmul.h: few experts (fused) and many (two calls), rows that a warp can
hold and wider ones, numbers of rows that leave a warp's last ones empty.

The logits' weights are fp32 masters that bf16 cannot represent. The logits are compared with the C product of what
the device normed, so that only their own error is seen: 1e-5. The normed rows are rmsnorm_forward's bit for bit:
with --recompute, backward makes them again by that.
*/
#ifndef TEST_CUDA_RMSNORM_ROUTER_CUH
#define TEST_CUDA_RMSNORM_ROUTER_CUH

#include "../../../llmc/matmul.h"
#include "../../../llmc/rmsnorm.h"
#include "../../../llmc/rmsnorm_router.cuh"
#include "harness.cuh"
#include "test_gemm.cuh"

static void rmsnorm_router_case(GemmPlans *plans, int64_t N, int d, int E) {
    const float eps = 1e-5f;
    int64_t size = N * d;
    float *x = host_random(size, 1, 1.0f), *w = NEW(float, d), *router = NEW(float, (int64_t)E *d);
    float *out = NEW(float, size), *rstd = NEW(float, N), *logits = NEW(float, N *E);
    fill_uniform(w, (size_t)d, 2, 1.5f);
    fill_uniform(router, (size_t)E * d, 3, 0.01f);
    floatX *d_x = device_x(x, size), *d_out = device_new<floatX>(size), *apart = device_new<floatX>(size),
           *scratch = device_new<floatX>(3ll * E * d);
    float *d_w = device_f(w, d), *d_router = device_f(router, (int64_t)E * d), *d_rstd = device_new<float>(N),
          *d_logits = device_new<float>(N * E), *rstd_apart = device_new<float>(N);
    rmsnorm_forward(out, rstd, x, w, N, d, eps);
    rmsnorm_router_forward(d_out, d_rstd, d_logits, d_x, d_w, d_router, N, d, E, eps, scratch, plans, 0);
    rmsnorm_forward(apart, rstd_apart, d_x, d_w, N, d, eps, 0);
    check_device("rmsnorm_router out", d_out, out, size, tolerance(1e-5, 2e-3));
    check_device("rmsnorm_router rstd", d_rstd, rstd, N, 1e-5);
    float *normed = fetch(d_out, size);
    matmul_forward(logits, normed, router, N, d, E);
    check_device("rmsnorm_router logits", d_logits, logits, N * E, 1e-5);
    CHECK(device_hash(d_out, size * sizeof(floatX)) == device_hash(apart, size * sizeof(floatX)));
    CHECK(device_hash(d_rstd, N * 4) == device_hash(rstd_apart, N * 4));
    const void *taken[] = {d_x, d_out, apart, scratch, d_w, d_router, d_rstd, d_logits, rstd_apart};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {x, w, router, out, rstd, logits, normed};
    for (float *p : mine) {
        free(p);
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
    if (!emulated()) {
        rmsnorm_router_case(plans, 20011, 768, 8); // each warp goes over several groups of rows
        rmsnorm_router_case(plans, 20011, 1536, 16);
    }
    gemm_test_close(plans);
}

#endif
