/*
What the CUDA components' tests share, on top of dev/test/harness.h: device copies of host inputs, fetching
results, a tolerance a precision.

Inputs are rounded to floatX before either side sees them, so that only the computation's own error is
measured. device_new() is filled with NaN patterns: what a kernel forgets to write shows.
*/
#ifndef CUDA_HARNESS_CUH
#define CUDA_HARNESS_CUH

#include "dev/test/harness.h"
#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/row_chunk.cuh"

// the kernels of grouped GEMM and attention under test: the runner goes through the table with each kind that the
// device has
inline Kernels test_kernels = KERNELS_PORTABLE;

// is a component's case among those that the command line names (`model:relu`)? The runner sets both
inline const char *test_component = "";
inline char **test_names = NULL; // ends with NULL

static inline int case_is_wanted(const char *name) {
    size_t size = strlen(test_component);
    int filters = 0;
    for (char **wanted = test_names; wanted != NULL && *wanted != NULL; wanted++) {
        if (strncmp(*wanted, test_component, size) == 0 && (*wanted)[size] == ':') {
            filters++;
            if (strstr(name, *wanted + size + 1) != NULL) {
                return 1;
            }
        }
    }
    return filters == 0;
}

// --few: each kernel in few and tiny shapes, for compute-sanitizer, several hundred times slower than the GPU
inline int few_cases = 0;

// the tolerance of this build
static inline double tolerance(double fp32, double bf16) {
#ifdef PRECISION_FP32
    (void)bf16;
    return fp32;
#else
    (void)fp32;
    return bf16;
#endif
}

static inline int is_fp32() {
    return sizeof(floatX) == sizeof(float);
}

// n values uniform in [-scale, scale], representable in floatX
static inline float *host_random(int64_t n, unsigned seed, float scale) {
    float *x = NEW(float, n);
    fill_uniform(x, (size_t)n, seed, scale);
    for (int64_t i = 0; i < n; i++) {
        x[i] = to_float(to_x(x[i]));
    }
    return x;
}

template <class T> static T *device_new(int64_t n) {
    T *p = NULL;
    size_t bytes = (size_t)(n > 0 ? n : 1) * sizeof(T);
    CUDA_CHECK(cudaMalloc(&p, bytes));
    CUDA_CHECK(cudaMemset(p, 0xff, bytes));
    return p;
}

template <class T> static T *device_copy(const T *host, int64_t n) {
    T *p = device_new<T>(n);
    if (n > 0) {
        CUDA_CHECK(cudaMemcpy(p, host, (size_t)n * sizeof(T), cudaMemcpyHostToDevice));
    }
    return p;
}

static inline float *device_f(const float *host, int64_t n) {
    return device_copy(host, n);
}

static inline int *device_i(const int *host, int64_t n) {
    return device_copy(host, n);
}

static inline floatX *device_x(const float *host, int64_t n) {
    floatX *rounded = NEW(floatX, n);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        rounded[i] = to_x(host[i]);
    }
    floatX *p = device_copy(rounded, n);
    free(rounded);
    return p;
}

template <class T> static T *fetch_raw(const T *device, int64_t n) {
    T *host = NEW(T, n);
    CUDA_CHECK(cudaDeviceSynchronize());
    if (n > 0) {
        CUDA_CHECK(cudaMemcpy(host, device, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    }
    return host;
}

static inline float *fetch(const float *device, int64_t n) {
    return fetch_raw(device, n);
}

static inline int *fetch(const int *device, int64_t n) {
    return fetch_raw(device, n);
}

static inline float *fetch(const __nv_bfloat16 *device, int64_t n) {
    __nv_bfloat16 *raw = fetch_raw(device, n);
    float *host = NEW(float, n);
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        host[i] = to_float(raw[i]);
    }
    free(raw);
    return host;
}

static inline void device_release(const void *p) {
    CUDA_CHECK(cudaFree((void *)p));
}

// ||device - want|| / ||want||
template <class T>
static int check_device(const char *what, const T *device, const float *want, int64_t n, double limit) {
    float *got = fetch(device, n);
    int ok = check_close(what, got, want, (size_t)n, limit);
    free(got);
    return ok;
}

// a buffer's bytes, to see that a repeat gives the same
static inline uint64_t device_hash(const void *device, int64_t bytes) {
    unsigned char *host = fetch_raw((const unsigned char *)device, bytes);
    uint64_t hash = 1469598103934665603ull; // FNV-1a's constants, 8 bytes at a time
    for (int64_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, host + i, (size_t)(bytes - i < 8 ? bytes - i : 8));
        hash = (hash ^ word) * 1099511628211ull;
        hash ^= hash >> 32;
    }
    free(host);
    return hash;
}

// milliseconds of one call, the median of `repeats` after two to warm up; for the bench_ functions
template <class F> static double device_ms(F call, int repeats = 10) {
    cudaEvent_t begin, end;
    double *times = NEW(double, repeats);
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    call();
    call();
    for (int i = 0; i < repeats; i++) {
        float ms;
        CUDA_CHECK(cudaEventRecord(begin));
        call();
        CUDA_CHECK(cudaEventRecord(end));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        times[i] = ms;
    }
    for (int i = 1; i < repeats; i++) { // insertion sort
        for (int j = i; j > 0 && times[j] < times[j - 1]; j--) {
            double swap = times[j];
            times[j] = times[j - 1];
            times[j - 1] = swap;
        }
    }
    double median = 0.5 * (times[(repeats - 1) / 2] + times[repeats / 2]);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    free(times);
    return median;
}

#endif
