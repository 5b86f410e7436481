/*
Functions of the CUDA driver, found through the runtime, so that programs need not link the driver's library.

Errors: a driver without the function ends the program with the remedy.
*/
#ifndef DRIVER_CUH
#define DRIVER_CUH

#include "llmc/gpu/cuda_common.cuh"
#include <cuda.h>
// defines: CUDA_CHECK; cudaGetDriverEntryPoint

static inline void *driver_function(const char *name, const char *remedy) {
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) {
        die("the CUDA driver has no %s\n  ---> %s", name, remedy);
    }
    return function;
}

#endif
