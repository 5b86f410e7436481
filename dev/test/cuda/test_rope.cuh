/*
rope.cuh against rope.h: head sizes with and without whole packs in half a head, positions that do not begin
at 0, values behind the heads left alone; backward undoes forward.

Tolerance: rounded to bf16 once, at most 2^-9 of an element.
*/
#ifndef TEST_CUDA_ROPE_CUH
#define TEST_CUDA_ROPE_CUH

#include "llmc/rope.h"
#include "llmc/rope.cuh"
#include "harness.cuh"

static void rope_cuda_case(int B, int T, int start, int heads, int hd) {
    int stride = (heads + 2) * hd; // two heads of values behind
    int64_t size = (int64_t)B * T * stride;
    float *table = NEW(float, (int64_t)(start + T) * hd), *x = host_random(size, 1, 1.0f),
          *once = NEW(float, size);
    rope_table(table, start + T, hd, 1e6);
    float *d_table = device_f(table, (int64_t)(start + T) * hd);
    floatX *d_x = device_x(x, size), *d_again = device_x(x, size);
    memcpy(once, x, sizeof(float) * (size_t)size);
    rope_forward(once, table, B, T, start, heads, hd, stride);
    rope_forward(d_x, d_table, B, T, start, heads, hd, stride, 0);
    rope_forward(d_again, d_table, B, T, start, heads, hd, stride, 0);
    check_device("rope forward", d_x, once, size, tolerance(1e-6, 2e-3));
    CHECK(device_hash(d_x, size * sizeof(floatX)) == device_hash(d_again, size * sizeof(floatX)));
    rope_backward(d_x, d_table, B, T, start, heads, hd, stride, 0);
    check_device("rope backward of forward", d_x, x, size, tolerance(1e-6, 3e-3)); // two roundings
    rope_backward(d_again, d_table, B, T, start, heads, hd, stride, 0);
    float *turned = fetch(d_again, size);
    int moved = 0;
    for (int64_t i = 0; i < size; i++) { // what is behind the heads is the input's bits
        moved += i % stride >= (int64_t)heads * hd && turned[i] != x[i];
    }
    CHECK(moved == 0);
    device_release(d_table);
    device_release(d_x);
    device_release(d_again);
    free(table);
    free(x);
    free(once);
    free(turned);
}

static void test_cuda_rope(void) {
    const int head_sizes[] = {2, 8, 16, 24, 64, 96, 128};
    for (int hd : head_sizes) {
        rope_cuda_case(1, 1, 0, 1, hd);
        rope_cuda_case(2, 17, 0, 3, hd);
        rope_cuda_case(1, 5, 1000, 4, hd);
    }
    rope_cuda_case(1, 2, 3, 1, 1032);
    if (!emulated()) {
        rope_cuda_case(8, 1024, 0, 16, 64);
    }
}

#endif
