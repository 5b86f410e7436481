/*
What all CUDA components share: the number format, checked calls, launches, 16-byte accesses, and pieces of a
scratch buffer.

floatX is the format of activations and of the weights' working copy: bf16, or fp32 where PRECISION_FP32 is
defined (a build for checking: the same kernels, offsets and epilogues; only the inner product of mma.cuh
differs). Sums, norms, gates and gradients of weights are fp32 in both.

Every kernel is started by launch(), with the block's dynamic shared memory at shared_memory(). The same
sources compile with a plain C++ compiler against dev/emulator, where launch() runs a kernel on the CPU.
Errors: a failed call ends the program with its name.
*/
#ifndef CUDA_COMMON_CUH
#define CUDA_COMMON_CUH

#include "llmc/check.h"
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
// defines: __nv_bfloat16, cudaLaunchKernel, cudaStream_t, int64_t

#ifdef PRECISION_FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif

// the experts' products and attention have kernels of two kinds: with mma.sync, and with Hopper's own
// instructions
typedef enum { KERNELS_PORTABLE, KERNELS_HOPPER } Kernels;

#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

static inline void cuda_check(cudaError_t error, const char *call, const char *file, int line) {
    if (error != cudaSuccess) {
        die("CUDA: %s (%s:%d: %s)", cudaGetErrorString(error), file, line, call);
    }
}

// ----------------------------------------------------------------------------
// numbers

__host__ __device__ __forceinline__ float to_float(float x) {
    return x;
}

__host__ __device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

// rounds to the nearest, ties to even
__host__ __device__ __forceinline__ floatX to_x(float x) {
#ifdef PRECISION_FP32
    return x;
#else
    return __float2bfloat16(x);
#endif
}

template <class T> __host__ __device__ __forceinline__ T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// 16 bytes: what one thread should load or store at a time. The address must be a multiple of 16
template <class T> struct alignas(16) Pack {
    enum { SIZE = 16 / sizeof(T) };
    T x[SIZE];
};

template <class T> __device__ __forceinline__ Pack<T> load_pack(const T *from) {
    return *reinterpret_cast<const Pack<T> *>(from);
}

template <class T> __device__ __forceinline__ void store_pack(T *to, const Pack<T> &pack) {
    *reinterpret_cast<Pack<T> *>(to) = pack;
}

// ----------------------------------------------------------------------------
// launches

#ifdef EMULATED
static inline bool emulated() {
    return true;
}

static inline unsigned char *shared_memory() {
    return emulator::shared_memory();
}

template <class... P, class... A>
static void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   A... args) {
    emulator::queue(
        stream, [=] { emulator::run(grid, block, shared_bytes, [&] { kernel(static_cast<P>(args)...); }); });
}
#else
static inline bool emulated() {
#ifdef SMALL_TESTS // as slow as emulated: a build for compute-sanitizer
    return true;
#else
    return false;
#endif
}

__device__ __forceinline__ unsigned char *shared_memory() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
}

template <class... P>
static void launch_exact(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, P... args) {
    void *pointers[] = {(void *)&args..., NULL};
    if (shared_bytes > 40 * 1024) { // beyond 48 KB, the kernel's own variables included, it must be asked for
        CUDA_CHECK(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)shared_bytes));
    }
    CUDA_CHECK(cudaLaunchKernel((const void *)kernel, grid, block, pointers, shared_bytes, stream));
}

// the arguments are converted to the kernel's own types, as in a call; an empty grid launches nothing
template <class... P, class... A>
static void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   A... args) {
    if (grid.x > 0 && grid.y > 0 && grid.z > 0) {
        launch_exact<P...>(kernel, grid, block, shared_bytes, stream, static_cast<P>(args)...);
    }
}
#endif

static inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

static inline int num_sms() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}

// ----------------------------------------------------------------------------
// scratch: consecutive pieces of one buffer, each 256-byte aligned. The function that hands them out also
// counts them, with base == NULL: sizes and layout cannot disagree

typedef struct {
    unsigned char *base;
    size_t used;
} Scratch;

template <class T> static T *scratch_take(Scratch *scratch, int64_t n) {
    T *piece = scratch->base == NULL ? NULL : (T *)(scratch->base + scratch->used);
    scratch->used += ceil_div<size_t>((size_t)n * sizeof(T), 256) * 256;
    return piece;
}

#endif
