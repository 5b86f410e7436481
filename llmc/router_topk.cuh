/*
The TopK router on the device (router_topk.h has the formulas). A group of lanes serves a token: one warp when
it has 32 experts or more.

    softmax   three passes over a row that stays in the L1 cache: maximum, sum of exponentials, quotients
    choice    the k largest s of a token, ties to the lower expert, without sorting: the bits of floats >= 0
              are ordered as integers are, so the k-th largest of E keys is the largest T with
                  #{e: key_e >= T} >= k
              and its bits are found from the highest down, one count a bit; the search ends as soon as the
              count is k, after some 10 to 15 bits unless scores tie. Then bit e = key_e > T, or key_e == T
              for as many of the lowest experts as are still missing. The cost does not depend on k.
    loss      scale E / (k N) / N sum_e n_e sum_t s_te, in double, in a fixed order
    backward  ds_te = share n_e + (dR_te if active), share = weight E / (k N) / N, and through the softmax
                  dz_te = s_te (ds_te - dot_t),
                  dot_t = sum_e s_te share n_e + sum_{active e} s_te dR_te
              a lane writes its experts as if none were active, then the pairs are written over them; in fp32,
              rounded once

s [N, E] fp32; counts [E]: tokens of each expert in the global micro-batch of N tokens; E, k any.
*/
#ifndef ROUTER_TOPK_CUH
#define ROUTER_TOPK_CUH

#include "llmc/pairs.cuh"
#include "llmc/router_topk.h"

// by a group: row [experts] becomes its softmax. A lane reads and writes its own experts alone
__device__ __forceinline__ void group_softmax(float *row, int experts, int lanes) {
    int lane = group_lane(lanes);
    float max = -INFINITY, sum = 0.0f;
#pragma unroll 8
    for (int e = lane; e < experts; e += lanes) {
        max = fmaxf(max, row[e]);
    }
    max = group_max(max, lanes);
#pragma unroll 4
    for (int e = lane; e < experts; e += lanes) {
        sum += expf(row[e] - max);
    }
    sum = group_sum(sum, lanes);
#pragma unroll 4
    for (int e = lane; e < experts; e += lanes) { // the exponential again rather than a pass of stores for it
        row[e] = expf(row[e] - max) / sum;
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_softmax_kernel(float *z, int N, int E, int lanes) {
    int t = group_token(lanes);
    group_softmax(z + (int64_t)t * E, t < N ? E : 0, lanes);
}

// z [N, E] becomes softmax(z) in place
static inline void router_softmax(float *z, int N, int E, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_softmax_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, z, N, E, lanes);
}

// ----------------------------------------------------------------------------
// the k largest

// 1 .. 0x3f800001, ordered as the scores in [0, 1] are; what is no number counts as 1
__device__ __forceinline__ uint32_t score_key(float s) {
    uint32_t bits = __float_as_uint(s);
    return (bits < 0x3f800000u ? bits : 0x3f800000u) + 1;
}

struct ScoreKeys {
    enum { BITS = 30 }; // score_key() < 2^30
    const float *row;
    __device__ __forceinline__ uint32_t operator()(int e) const {
        return score_key(row[e]);
    }
};

// by a group: how many keys are at least `least`
template <class Keys>
__device__ __forceinline__ int group_count(Keys keys, int experts, uint32_t least, int lanes) {
    int count = 0;
#pragma unroll 8
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        count += keys(e) >= least;
    }
    return group_sum(count, lanes);
}

// the largest T that at least k keys reach; fewer than k are above it, or all that reach it are wanted
template <class Keys>
__device__ __forceinline__ uint32_t group_kth_largest(Keys keys, int experts, int k, int lanes) {
    uint32_t T = 0;
    int reached = experts > 0 ? experts : k; // a group without a token lets its neighbours in the warp decide
    for (int bit = Keys::BITS - 1; bit >= 0 && !__all_sync(0xffffffffu, reached == k); bit--) {
        uint32_t candidate = T | 1u << bit;
        int count = group_count(keys, experts, candidate, lanes);
        if (count >= k) {
            T = candidate;
            reached = count;
        }
    }
    return T;
}

// by a group: its token's words of the mask = the k largest keys; experts: E, or 0 without a token
template <class Keys>
__device__ __forceinline__ void group_mask_largest(uint32_t *words, Keys keys, int experts, int E, int k,
                                                   int lanes) {
    int lane = group_lane(lanes), W = mask_words(E);
    uint32_t T = group_kth_largest(keys, experts, k, lanes);
    int missing = k - group_count(keys, experts, T + 1, lanes); // to be taken among the ties
    for (int w = 0; w < W; w++) {
        int e = 32 * w + lane;
        uint32_t key = e < experts ? keys(e) : 0;
        uint32_t ties = group_ballot(e < experts && key == T, lanes);
        bool taken = ties >> lane & 1 && __popc(ties & bits_below(lane)) < missing;
        uint32_t word = group_ballot(e < experts && (key > T || taken), lanes); // (Eq. 2, 3)
        if (lane == 0 && experts > 0) {
            words[w] = word;
        }
        missing -= __popc(ties);
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_topk_kernel(uint32_t *mask, float *z, int N, int E, int k, int lanes) {
    int t = group_token(lanes), experts = t < N ? E : 0;
    float *row = z + (int64_t)t * E;
    group_softmax(row, experts, lanes);
    ScoreKeys keys = {row};
    group_mask_largest(mask + (int64_t)t * mask_words(E), keys, experts, E, k, lanes);
}

// z [N, E] becomes the softmax, mask the k largest of each token
static inline void router_topk_forward(uint32_t *mask, float *z, int N, int E, int k, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_topk_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, mask, z, N, E, k, lanes);
}

// ----------------------------------------------------------------------------
// auxiliary loss, backward

static __global__ void __launch_bounds__(SUM_THREADS)
    router_topk_loss_kernel(double *partial, const float *s, const int *counts, int tokens, int E,
                            int lanes) {
    double sum = 0.0;
    int stride = (int)gridDim.x * (SUM_THREADS / lanes);
    for (int t = group_token(lanes); t < tokens; t += stride) {
#pragma unroll 4
        for (int e = group_lane(lanes); e < E; e += lanes) {
            sum += (double)counts[e] * s[(int64_t)t * E + e];
        }
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// *loss += scale * sum_e f_e mean_t s_te of this rank's tokens; partial [SUM_MOST_BLOCKS]
static inline void router_topk_loss(double *loss, const float *s, const int *counts, int tokens, int64_t N,
                                    int E, int k, double scale, double *partial, cudaStream_t stream) {
    double share = (double)E / ((double)k * (double)N) / (double)N;
    int blocks = sum_blocks((int64_t)tokens * E);
    launch(router_topk_loss_kernel, blocks, SUM_THREADS, 0, stream, partial, s, counts, tokens, E,
           lanes_of(E));
    add_partials(loss, partial, blocks, scale * share, stream);
}

// counts == NULL: no loss, ds is the pairs' alone
static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_topk_backward_kernel(floatX *dlogits, const float *__restrict__ dgate, DevicePairs pairs,
                                const float *__restrict__ logits, const int *__restrict__ counts, int tokens,
                                int E, float share, int lanes) {
    int t = group_token(lanes), lane = group_lane(lanes);
    int experts = t < tokens ? E : 0;
    int begin = t < tokens ? pairs.row_start[t] + lane : 0, end = t < tokens ? pairs.row_start[t + 1] : 0;
    const float *s = logits + (int64_t)t * E;
    floatX *row = dlogits + (int64_t)t * E;
    float dot = 0.0f;
    for (int e = lane; e < experts && counts != NULL; e += lanes) {
        dot += s[e] * (share * (float)counts[e]);
    }
    for (int p = begin; p < end; p += lanes) {
        dot += s[pairs.expert[p]] * dgate[p];
    }
    dot = group_sum(dot, lanes);
    for (int e = lane; e < experts; e += lanes) {
        float ds = counts != NULL ? share * (float)counts[e] : 0.0f;
        row[e] = to_x(s[e] * (ds - dot));
    }
    __syncwarp(); // in place before another lane writes a pair over one
    for (int p = begin; p < end; p += lanes) {
        int e = pairs.expert[p];
        float ds = (counts != NULL ? share * (float)counts[e] : 0.0f) + dgate[p];
        row[e] = to_x(s[e] * (ds - dot));
    }
}

// dlogits [tokens, E] overwritten from dgate [P]; weight 0 (counts may be NULL): without the loss's gradient
static inline void router_topk_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                        const float *s, const int *counts, int tokens, int64_t N, int E,
                                        int k, double weight, cudaStream_t stream) {
    int lanes = lanes_of(E);
    double share = weight * (double)E / ((double)k * (double)N) / (double)N;
    launch(router_topk_backward_kernel, group_blocks(tokens, lanes), GROUP_BLOCK, 0, stream, dlogits, dgate,
           pairs, s, weight != 0.0 ? counts : NULL, tokens, E, share, lanes);
}

#endif
