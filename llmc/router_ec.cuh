/*
Expert choice on the device (router_ec.h says what it is, and why it leaks): each expert takes the
C = floor(N k / E) tokens with the largest s, ties to the lower token.

A token's key for an expert is its score above its place, 64 bits in which no two tokens are equal,
    key(s, t) = bits(s) 2^32 + (2^32 - 1 - t)          larger score first, then lower token
so expert e takes the tokens with key >= T_e, T_e being the C-th largest. One block per expert finds it by
radix select: from the highest byte down it counts the keys that agree with T_e so far by their next byte, and
takes the byte in which the C-th lies; it ends when all keys with that byte are wanted. That is three or four
passes over N scores; only scores that tie at the threshold need the bytes of t. The counts are integers,
added by atomics: any order gives the same.

    launch 1  softmax                     s [N, E], in place
    launch 2  transposition               scores [E, N]: an expert's scores are consecutive
    launch 3  radix select                T [E]
    launch 4  mask bit = key(s_te, t) >= T_e

The backward is that of TopK without its loss.
*/
#ifndef ROUTER_EC_CUH
#define ROUTER_EC_CUH

#include "llmc/gpu/sums.cuh"
#include "llmc/router_ec.h"
#include "llmc/router_topk.cuh"
// defines: warp_prefix_sum; router_softmax, score_key, mask_where

enum { TRANSPOSE_TILE = 32, SELECT_THREADS = 1024 };
static_assert(TRANSPOSE_TILE == 32, "a lane per column of a tile");
static_assert(SELECT_THREADS >= 256, "a thread per bin");

static __global__ void __launch_bounds__(GROUP_BLOCK)
    ec_transpose_kernel(float *scores, const float *s, int N, int E) {
    __shared__ float tile[TRANSPOSE_TILE]
                         [TRANSPOSE_TILE + 1]; // + 1: a column's elements lie in different banks
    int first_t = (int)blockIdx.x * TRANSPOSE_TILE, first_e = (int)blockIdx.y * TRANSPOSE_TILE;
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int i = warp; i < TRANSPOSE_TILE; i += GROUP_BLOCK / 32) {
        int t = first_t + i, e = first_e + lane;
        tile[i][lane] = t < N && e < E ? s[(int64_t)t * E + e] : 0.0f;
    }
    __syncthreads();
    for (int i = warp; i < TRANSPOSE_TILE; i += GROUP_BLOCK / 32) {
        int t = first_t + lane, e = first_e + i;
        if (t < N && e < E) {
            scores[(int64_t)e * N + t] = tile[lane][i];
        }
    }
}

__device__ __forceinline__ uint64_t ec_key(float score, int t) {
    return (uint64_t)score_key(score) << 32 | (0xffffffffu - (uint32_t)t);
}

// by a warp: bins[256] counts keys by a byte. Returns the byte of the wanted-th largest key; *wanted becomes
// its place among the keys with that byte
__device__ __forceinline__ int select_byte(const int *bins, int *wanted) {
    int lane = (int)threadIdx.x % 32, top = 255 - 8 * lane; // this lane's bytes are top, top - 1, .. top - 7
    int mine = 0;
    for (int i = 0; i < 8; i++) {
        mine += bins[top - i];
    }
    int above = warp_prefix_sum(mine) - mine; // keys with larger bytes: those of the lower lanes
    int found = -1, place = 0;
    for (int i = 0; i < 8; i++) {
        int count = bins[top - i];
        if (found < 0 && above < *wanted && *wanted <= above + count) {
            found = top - i;
            place = *wanted - above;
        }
        above += count;
    }
    int finder = __ffs((int)__ballot_sync(0xffffffffu, found >= 0)) - 1;
    *wanted = __shfl_sync(0xffffffffu, place, finder);
    return __shfl_sync(0xffffffffu, found, finder);
}

// threshold[e]: the capacity-th largest key of expert e, or a lower one that no further key reaches
static __global__ void __launch_bounds__(SELECT_THREADS)
    ec_select_kernel(uint64_t *threshold, const float *__restrict__ scores, int N, int capacity) {
    __shared__ int bins[256];
    __shared__ uint64_t shared_prefix;
    __shared__ int shared_wanted;
    scores += (int64_t)blockIdx.x * N;
    uint64_t prefix = 0; // the threshold's bytes so far
    int wanted = capacity, shift = 64;
    bool finished = capacity == 0;
    while (!finished) {
        shift -= 8;
        if (threadIdx.x < 256) {
            bins[threadIdx.x] = 0;
        }
        __syncthreads();
#pragma unroll 4
        for (int t = (int)threadIdx.x; t < N; t += SELECT_THREADS) {
            uint64_t head = ec_key(scores[t], t) >> shift;
            if (head >> 8 == prefix) {
                atomicAdd(&bins[head & 255], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            int byte = select_byte(bins, &wanted);
            if (threadIdx.x == 0) {
                shared_prefix = prefix << 8 | (uint64_t)byte;
                shared_wanted = wanted;
            }
        }
        __syncthreads();
        prefix = shared_prefix;
        wanted = shared_wanted;
        finished = shift == 0 || bins[prefix & 255] == wanted;
        __syncthreads(); // all have read the bins before they are cleared
    }
    if (threadIdx.x == 0) {
        threshold[blockIdx.x] = capacity == 0 ? UINT64_MAX : prefix << shift;
    }
}

struct ActiveIfChosen {
    const float *s;
    const uint64_t *threshold;
    int E;
    __device__ bool operator()(int t, int e) const {
        return ec_key(s[(int64_t)t * E + e], t) >= threshold[e];
    }
};

// z [N, E] becomes the softmax; scores [E, N] and threshold [E]: scratch
static inline void router_ec_forward(uint32_t *mask, float *z, float *scores, uint64_t *threshold, int N,
                                     int E, int k, cudaStream_t stream) {
    int capacity = (int)((int64_t)N * k / E);
    dim3 tiles((unsigned)ceil_div(N, (int)TRANSPOSE_TILE), (unsigned)ceil_div(E, (int)TRANSPOSE_TILE));
    ActiveIfChosen active = {z, threshold, E};
    router_softmax(z, N, E, stream);
    launch(ec_transpose_kernel, tiles, GROUP_BLOCK, 0, stream, scores, z, N, E);
    launch(ec_select_kernel, E, SELECT_THREADS, 0, stream, threshold, scores, N, capacity);
    mask_where(mask, active, N, E, stream);
}

static inline void router_ec_backward(floatX *dlogits, const float *dgate, DevicePairs pairs, const float *s,
                                      int N, int E, cudaStream_t stream) {
    router_topk_backward(dlogits, dgate, pairs, s, NULL, N, N, E, 1, 0.0, stream);
}

#endif
