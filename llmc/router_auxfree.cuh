/*
The bias-balanced router on the device (router_auxfree.h has the formulas). A group of lanes serves a token.

    choice    s = sigmoid(z) in place; the k largest s_e + b_e as in router_topk.cuh, by keys of all 32 bits:
              sums may be negative, so of a float's bits the sign is flipped, or where it is set, all
    gates     once the pairs are listed: each over the sum of its token's (k = 1: nothing is done)
    backward  a token's gradient is zeroed, then its pairs are written over it; in fp32, rounded once
    balance   one thread per expert of a layer; the counts are integers, so all ranks have the same bits

z [N, E], b [E] fp32, counts [E].
*/
#ifndef ROUTER_AUXFREE_CUH
#define ROUTER_AUXFREE_CUH

#include "llmc/router_auxfree.h"
#include "llmc/router_topk.cuh"
// defines: group_mask_largest

// router_auxfree_score()
__device__ __forceinline__ float auxfree_score(float z) {
    return 1.0f / (1.0f + expf(-fmaxf(z, -40.0f))) + (z - z);
}

// 0 .. 0xfffffffe, ordered as the floats are; what is no number is above all
struct BiasedKeys {
    enum { BITS = 32 };
    const float *row, *bias;
    __device__ __forceinline__ uint32_t operator()(int e) const {
        float score = row[e] + bias[e];
        uint32_t bits = __float_as_uint(score);
        uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000u;
        return score == score ? key : 0xfffffffeu;
    }
};

// by a group: row [experts] becomes s, its token's words of the mask the k largest with their biases
__device__ __forceinline__ void group_auxfree(uint32_t *words, float *row, const float *bias, int experts,
                                              int E, int k, int lanes) {
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        row[e] = auxfree_score(row[e]);
    }
    BiasedKeys keys = {row, bias};
    group_mask_largest(words, keys, experts, E, k, lanes);
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_auxfree_kernel(uint32_t *mask, float *z, const float *bias, int N, int E, int k, int lanes) {
    int t = group_token(lanes);
    group_auxfree(mask + (int64_t)t * mask_words(E), z + (int64_t)t * E, bias, t < N ? E : 0, E, k, lanes);
}

// z [N, E] becomes s, mask the k of each token
static inline void router_auxfree_forward(uint32_t *mask, float *z, const float *bias, int N, int E, int k,
                                          cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_auxfree_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, mask, z, bias, N, E, k,
           lanes);
}

static __global__ void __launch_bounds__(256) router_auxfree_scores_kernel(float *z, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < n) {
        z[i] = auxfree_score(z[i]);
    }
}

// z [N, E] becomes s, where the choice is given
static inline void router_auxfree_scores(float *z, int N, int E, cudaStream_t stream) {
    int64_t n = (int64_t)N * E;
    launch(router_auxfree_scores_kernel, (unsigned)ceil_div<int64_t>(n, 256), 256, 0, stream, z, n);
}

// the pairs of a group's token: those of the lane are begin, begin + lanes, .. < end
struct TokenPairs {
    int begin, end;
};

__device__ __forceinline__ TokenPairs group_pairs(DevicePairs pairs, int t, int tokens, int lanes) {
    TokenPairs own = {0, 0};
    if (t < tokens) {
        own.begin = pairs.row_start[t] + group_lane(lanes);
        own.end = pairs.row_start[t + 1];
    }
    return own;
}

// sum of s [E] over a token's pairs
__device__ __forceinline__ float group_active_sum(DevicePairs pairs, TokenPairs own, const float *s,
                                                  int lanes) {
    float sum = 0.0f;
    for (int p = own.begin; p < own.end; p += lanes) {
        sum += s[pairs.expert[p]];
    }
    return group_sum(sum, lanes);
}

// by a group: its token's gates s -> g, of k > 1; s [N, E]
__device__ __forceinline__ void group_auxfree_gates(DevicePairs pairs, const float *s, int t, int N, int E,
                                                    int lanes) {
    TokenPairs own = group_pairs(pairs, t, N, lanes);
    float sum = group_active_sum(pairs, own, s + (int64_t)t * E, lanes);
    for (int p = own.begin; p < own.end; p += lanes) {
        pairs.gate[p] /= sum;
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_auxfree_gates_kernel(DevicePairs pairs, const float *s, int N, int E, int lanes) {
    group_auxfree_gates(pairs, s, group_token(lanes), N, E, lanes);
}

// gates s -> g, of a list that is the method's own or forced
static inline void router_auxfree_gates(DevicePairs pairs, const float *s, int N, int E, int k,
                                        cudaStream_t stream) {
    int lanes = lanes_of(E);
    if (k > 1) {
        launch(router_auxfree_gates_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, pairs, s, N, E,
               lanes);
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_auxfree_backward_kernel(floatX *dlogits, const float *__restrict__ dgate, DevicePairs pairs,
                                   const float *__restrict__ scores, int tokens, int E, int k, int lanes) {
    int t = group_token(lanes), experts = t < tokens ? E : 0;
    const float *s = scores + (int64_t)t * E;
    floatX *row = dlogits + (int64_t)t * E;
    TokenPairs own = group_pairs(pairs, t, tokens, lanes);
    float sum = group_active_sum(pairs, own, s, lanes), mean = 0.0f;
    for (int p = own.begin; p < own.end; p += lanes) {
        mean += dgate[p] * pairs.gate[p];
    }
    mean = group_sum(mean, lanes);
    sum = k == 1 ? 1.0f : sum;
    mean = k == 1 ? 0.0f : mean;
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        row[e] = to_x(0.0f);
    }
    __syncwarp(); // in place before another lane writes a pair over one
    for (int p = own.begin; p < own.end; p += lanes) {
        int e = pairs.expert[p];
        row[e] = to_x((dgate[p] - mean) / sum * s[e] * (1.0f - s[e]));
    }
}

// dlogits [tokens, E] overwritten from dgate [P]
static inline void router_auxfree_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                           const float *s, int tokens, int E, int k, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_auxfree_backward_kernel, group_blocks(tokens, lanes), GROUP_BLOCK, 0, stream, dlogits,
           dgate, pairs, s, tokens, E, k, lanes);
}

// ----------------------------------------------------------------------------
// the bias

// each thread adds up all counts: E additions beside which the launch is the larger part
static __global__ void __launch_bounds__(256)
    router_auxfree_balance_kernel(float *bias, const int64_t *counts, int first, int end, int E, float rate) {
    int e = first + (int)(blockIdx.x * 256 + threadIdx.x);
    int64_t load = 0;
    for (int i = 0; i < E; i++) {
        load += counts[i];
    }
    if (e < end) {
        bias[e] += counts[e] * E < load ? rate : counts[e] * E > load ? -rate : 0.0f;
    }
}

// the biases first .. end - 1 of bias [E], which are this rank's; counts [E] of a step
static inline void router_auxfree_balance(float *bias, const int64_t *counts, int first, int end, int E,
                                          float rate, cudaStream_t stream) {
    if (first < end) {
        launch(router_auxfree_balance_kernel, ceil_div(end - first, 256), 256, 0, stream, bias, counts, first,
               end, E, rate);
    }
}

#endif
