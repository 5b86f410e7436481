/*
Hash layers, and the dense layer, on the device (router_hash.h): the token id alone chooses.

    hash    active iff (e - id k) mod E < k: the experts (id k + j) mod E, j = 0 .. k - 1; gate 1
    dense   expert 0 for every token, gate 1: the list is known, one launch writes it

ids [N] >= 0.
*/
#ifndef ROUTER_HASH_CUH
#define ROUTER_HASH_CUH

#include "llmc/pairs.cuh"
#include "llmc/router_hash.h"

struct ActiveIfHashed {
    const int *ids;
    int E;
    int k;
    __device__ bool operator()(int t, int e) const {
        int first = (int)((int64_t)ids[t] * k % E);
        int behind = e - first;
        return (behind < 0 ? behind + E : behind) < k;
    }
};

static inline void router_hash_forward(uint32_t *mask, const int *ids, int N, int E, int k,
                                       cudaStream_t stream) {
    ActiveIfHashed active = {ids, E, k};
    mask_where(mask, active, N, E, stream);
}

static __global__ void __launch_bounds__(GROUP_BLOCK) router_dense_kernel(DevicePairs pairs, int N) {
    int t = (int)(blockIdx.x * GROUP_BLOCK + threadIdx.x);
    if (t < N) {
        pairs.expert[t] = 0;
        pairs.gate[t] = 1.0f;
    }
    if (t <= N) {
        pairs.row_start[t] = t;
    }
    if (t == N) {
        pairs.counts[0] = N;
    }
}

static inline void router_dense_forward(DevicePairs pairs, int N, cudaStream_t stream) {
    launch(router_dense_kernel, N / GROUP_BLOCK + 1, GROUP_BLOCK, 0, stream, pairs,
           N); // N + 1 threads at least
}

#endif
