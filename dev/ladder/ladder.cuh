/*
What the ladder programs share: N(0, 1) data made on the device, buffers that begin as NaN, times, failures.

Data are hashed counters through Box and Muller's formula: the numbers decide the power that multipliers draw,
and so the clock; zeros would run faster. Times are CUDA events' in the default stream.
*/
#ifndef LADDER_CUH
#define LADDER_CUH

#include "llmc/gpu/sums.cuh"
#include <algorithm>
#include <math.h>
#include <vector>
// defines: launch, CUDA_CHECK, floatX, block_sum; std::sort, sqrtf, std::vector

static int failures = 0; // of all checks so far

__device__ static inline uint32_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return (uint32_t)(x >> 32);
}

__device__ static inline float normal(uint64_t i, uint64_t seed) {
    float u = ((float)(mix(2 * i + seed * 0x1000003ull) >> 8) + 0.5f) * 0x1p-24f;
    float v = ((float)(mix(2 * i + 1 + seed * 0x1000003ull) >> 8) + 0.5f) * 0x1p-24f;
    return sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
}

template <class T> static __global__ void fill_kernel(T *p, int64_t n, uint64_t seed, float scale) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        p[i] = (T)(scale * normal(i, seed));
    }
}

template <class T> static T *poisoned_new(int64_t n) {
    T *p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(T)));
    CUDA_CHECK(cudaMemset(p, 0xff, n * sizeof(T))); // NaN
    return p;
}

template <class T> static T *random_new(int64_t n, uint64_t seed, float scale) {
    T *p;
    CUDA_CHECK(cudaMalloc(&p, n * sizeof(T)));
    launch(fill_kernel<T>, 1024, 256, 0, 0, p, n, seed, scale);
    return p;
}

template <class F> static float milliseconds(F f) {
    static cudaEvent_t begin, end;
    float ms;
    if (begin == NULL) {
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
    }
    CUDA_CHECK(cudaEventRecord(begin, 0));
    f();
    CUDA_CHECK(cudaEventRecord(end, 0));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms;
}

static float median(std::vector<float> times) {
    std::sort(times.begin(), times.end());
    return times.empty() ? NAN : times[times.size() / 2];
}

static int failures_shown(void) {
    printf(failures ? "%d FAILED\n" : "all checks passed\n", failures);
    return failures != 0;
}

#endif
