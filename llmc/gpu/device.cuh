/*
The GPU that a trainer runs on: which one, what it can do, how much memory it has left, what it could compute
at most; and copies between it and the host that are over when they return.

Errors: no GPU, a GPU that is too old, or kernels that it cannot run end the program with what to do instead.
*/
#ifndef DEVICE_CUH
#define DEVICE_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/grouped_gemm.cuh"
#include "llmc/run/ranks.h"
// defines: CUDA_CHECK, device_attribute, emulated; Kernels, grouped_best_kernels

// The GPU of this rank: that of its number on the machine, or the one that a launcher shows it. This process
// uses it from here on
static inline int device_open(const Ranks *ranks) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        die("no CUDA device: %s\n  ---> ./train_remoe trains on the CPU",
            error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
    }
    if (ranks->local_rank >= count && count > 1) {
        die("rank %d is number %d on its machine, which has %d GPUs\n  ---> --gpus %d", ranks->rank,
            ranks->local_rank, count, count);
    }
    int device = count > 1 ? ranks->local_rank : 0;
    CUDA_CHECK(cudaSetDevice(device));
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 8) {
        die("the CUDA device is older than compute capability 8.0 (Ampere)\n"
            "  ---> ./train_remoe trains on the CPU");
    }
    return device;
}

// driver, libraries and fragmentation want some of what is free
static inline int64_t device_available_bytes(void) {
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    return (int64_t)available - (int64_t)total / 50;
}

// dense bf16 peak of the cards we know, their data sheets'; 0: unknown, or tensor cores have no part in it
// (fp32)
static inline double device_peak_flops(int device) {
#ifdef PRECISION_FP32
    (void)device;
    return 0.0;
#else
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, device));
    if (strstr(prop.name, "PCIe") != NULL || strstr(prop.name, "NVL") != NULL) { // slower than the SXM cards
        return 0.0;
    }
    if (strstr(prop.name, "H100") != NULL || strstr(prop.name, "H200") != NULL) {
        return 989.4e12;
    }
    return strstr(prop.name, "A100") != NULL ? 312e12 : 0.0;
#endif
}

// bytes per second of the memory of the same cards; 0: unknown
static inline double device_peak_bytes(int device) {
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, device));
    if (strstr(prop.name, "PCIe") != NULL || strstr(prop.name, "NVL") != NULL) {
        return 0.0;
    }
    return strstr(prop.name, "H200") != NULL           ? 4.8e12
           : strstr(prop.name, "H100") != NULL         ? 3.35e12
           : strstr(prop.name, "A100-SXM4-80") != NULL ? 2.039e12
           : strstr(prop.name, "A100-SXM4-40") != NULL ? 1.555e12
                                                       : 0.0;
}

// name: auto, portable or hopper (--kernels)
static inline Kernels device_kernels(const char *name) {
    Kernels best = grouped_best_kernels();
    int hopper = strcmp(name, "hopper") == 0, portable = strcmp(name, "portable") == 0;
    if (hopper && best != KERNELS_HOPPER) {
        die("--kernels hopper: they need a Hopper GPU (H100, H200), a build for sm_90a, and bf16\n"
            "  ---> --kernels portable, or make CUDA_ARCHS=90a");
    }
    if (emulated() && !hopper) {
        return KERNELS_PORTABLE; // the emulator has both, and mma.sync's are the faster ones there
    }
    return portable ? KERNELS_PORTABLE : best;
}

// Copies between host and device, over when the call returns. In a stream of its own, which does not wait for
// any other: a plain cudaMemcpy from ordinary host memory may still be under way when it returns
static inline void copy_now(void *to, const void *from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
}

#endif
