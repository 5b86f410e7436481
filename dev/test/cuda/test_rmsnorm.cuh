/*
rmsnorm.cuh against rmsnorm.h: rows that a warp, a block's registers and no registers can hold.

Tolerances: rstd and dw are fp32 sums of the same terms in another order: 1e-5. out and dx are rounded to bf16
once: at most 2^-9 of an element, so at most 2e-3 of the tensor.
*/
#ifndef TEST_CUDA_RMSNORM_CUH
#define TEST_CUDA_RMSNORM_CUH

#include "llmc/rmsnorm.h"
#include "llmc/rmsnorm.cuh"
#include "harness.cuh"

static void rmsnorm_cuda_case(int64_t N, int d) {
    const float eps = 1e-5f;
    int64_t size = N * d;
    float *x = host_random(size, 1, 1.0f), *dout = host_random(size, 2, 1.0f),
          *dx = host_random(size, 3, 1.0f);
    float *w = NEW(float, d), *dw = NEW(float, d), *out = NEW(float, size), *rstd = NEW(float, N);
    fill_uniform(w, (size_t)d, 4, 1.5f); // an fp32 master: not rounded
    fill_uniform(dw, (size_t)d, 5, 1.0f);
    floatX *d_x = device_x(x, size), *d_dout = device_x(dout, size), *d_out = device_new<floatX>(size);
    floatX *d_dx[2] = {device_x(dx, size), device_x(dx, size)};
    float *d_w = device_f(w, d), *d_rstd = device_new<float>(N);
    float *d_dw[2] = {device_f(dw, d), device_f(dw, d)},
          *scratch = device_new<float>(rmsnorm_scratch_floats(d));
    rmsnorm_forward(out, rstd, x, w, N, d, eps);
    rmsnorm_backward(dx, dw, dout, x, w, rstd, N, d);
    rmsnorm_forward(d_out, d_rstd, d_x, d_w, N, d, eps, 0);
    for (int i = 0; i < 2; i++) {
        rmsnorm_backward(d_dx[i], d_dw[i], d_dout, d_x, d_w, d_rstd, N, d, scratch, 0);
    }
    check_device("rmsnorm out", d_out, out, size, tolerance(1e-5, 2e-3));
    check_device("rmsnorm rstd", d_rstd, rstd, N, 1e-5);
    check_device("rmsnorm dx", d_dx[0], dx, size, tolerance(1e-5, 2e-3));
    check_device("rmsnorm dw", d_dw[0], dw, d, 1e-5);
    CHECK(device_hash(d_dx[0], size * sizeof(floatX)) == device_hash(d_dx[1], size * sizeof(floatX)));
    CHECK(device_hash(d_dw[0], 4ll * d) == device_hash(d_dw[1], 4ll * d));
    const void *taken[] = {d_x, d_dout, d_out, d_dx[0], d_dx[1], d_w, d_rstd, d_dw[0], d_dw[1], scratch};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {x, dout, dx, w, dw, out, rstd};
    for (float *p : mine) {
        free(p);
    }
}

static void test_cuda_rmsnorm(void) {
    const int widths[] = {8, 24, 192, 768, 776, 1000, 1024, 1032, 1536};
    for (int d : widths) {
        rmsnorm_cuda_case(1, d);
        rmsnorm_cuda_case(17, d);
    }
    rmsnorm_cuda_case(300, 24);
    rmsnorm_cuda_case(300, 768);
    rmsnorm_cuda_case(17, 1544); // beyond a warp
    rmsnorm_cuda_case(17, 2048);
    rmsnorm_cuda_case(5, 4104);   // beyond a block's registers
    rmsnorm_cuda_case(600, 2056); // more rows than blocks
    if (!emulated()) {
        rmsnorm_cuda_case(4099, 768); // a warp goes over several rows
        rmsnorm_cuda_case(4099, 1536);
        rmsnorm_cuda_case(3, 65536);
    }
}

#endif
