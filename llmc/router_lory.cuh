/*
Lory's router on the device (router_lory.h has the formulas).

    mean      a block per segment, a warp per expert: lanes add up every 32nd token's logit, then each
              other's; the softmax of the E means by one warp. The rest of the batch changes no bit of it
    spread    the source's softmax to all of a segment's tokens, over their logits, and their pairs
    count     a warp per expert
    backward  a group of lanes per token: each makes its segment's dz anew, E products, and rounds once

a [N, E] fp32; dlogits [N, E] floatX; da [C, E]. Scratch: [C, E] floats.
*/
#ifndef ROUTER_LORY_CUH
#define ROUTER_LORY_CUH

#include "llmc/router_lory.h"
#include "llmc/router_topk.cuh"
// defines: lory_weights, lory_uses, segment_*; group_*, warp_sum, group_softmax, DevicePairs

// e [C, E] = softmax of the means
static __global__ void __launch_bounds__(GROUP_BLOCK)
    lory_mean_kernel(float *e_all, const float *logits, Segments s, int E) {
    int c = (int)blockIdx.x, lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int tokens = s.contexts != NULL ? s.contexts[c] : segment_size(s, c);
    const float *first = logits + segment_first(s, c) * E;
    float *mean = e_all + (int64_t)c * E;
    for (int e = warp; e < E; e += GROUP_BLOCK / 32) {
        float sum = 0.0f;
#pragma unroll 4
        for (int t = lane; t < tokens; t += 32) {
            sum += first[(int64_t)t * E + e];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            mean[e] = sum / (float)tokens;
        }
    }
    __syncthreads();
    if (warp == 0) {
        group_softmax(mean, E, 32);
    }
}

// a thread per token and expert; e_all NULL: nothing but the pairs
static __global__ void __launch_bounds__(GROUP_BLOCK)
    lory_spread_kernel(DevicePairs pairs, float *a, const float *e_all, Segments s, int N, int E) {
    int64_t i = (int64_t)blockIdx.x * GROUP_BLOCK + threadIdx.x, t = i / E;
    int e = (int)(i % E);
    if (t >= N) {
        return;
    }
    int c = segment_of_token(s, t);
    if (e_all != NULL) {
        a[i] = e_all[(int64_t)segment_source(s, c) * E + e];
    }
    if (e == 0) {
        pairs.row_start[t] = (int)t;
        pairs.expert[t] = c;
        pairs.gate[t] = 1.0f;
    }
    if (i == 0) {
        pairs.row_start[N] = N;
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    lory_count_kernel(int *counts, const float *a, Segments s, int E) {
    int e = (int)(blockIdx.x * (GROUP_BLOCK / 32) + threadIdx.x / 32), used = 0;
    for (int c = (int)threadIdx.x % 32; c < segments_count(s) && e < E && !s.kept; c += 32) {
        used += lory_uses(lory_weights(a, s, c, E)[e], E) ? segment_size(s, c) : 0;
    }
    used = group_sum(used, 32);
    if (threadIdx.x % 32 == 0 && e < E) {
        counts[e] = used;
    }
}

// logits [N, E] become a, unless the experts are kept; scratch [C, E]
static inline void router_lory_forward(DevicePairs pairs, float *logits, Segments s, int E, float *scratch,
                                       cudaStream_t stream) {
    int N = s.sequences * s.tokens;
    unsigned blocks = (unsigned)ceil_div<int64_t>((int64_t)N * E, GROUP_BLOCK);
    if (!s.kept) {
        launch(lory_mean_kernel, segments_count(s), GROUP_BLOCK, 0, stream, scratch, logits, s, E);
    }
    launch(lory_spread_kernel, blocks, GROUP_BLOCK, 0, stream, pairs, logits, s.kept ? NULL : scratch, s, N,
           E);
    launch(lory_count_kernel, ceil_div(E, GROUP_BLOCK / 32), GROUP_BLOCK, 0, stream, pairs.counts, logits, s,
           E);
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    lory_backward_kernel(floatX *dlogits, const float *da, const float *a, Segments s, int N, int E,
                         int lanes) {
    int t = group_token(lanes), c = t < N ? segment_of_token(s, t) : 0;
    int next = t < N ? segment_next(s, c) : -1, experts = next >= 0 ? E : 0;
    const float *e_c = lory_weights(a, s, next >= 0 ? next : 0, E);
    const float *de = da + (int64_t)(next >= 0 ? next : 0) * E;
    float dot = 0.0f, share = 1.0f / (float)segment_size(s, c);
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        dot += e_c[e] * de[e];
    }
    dot = group_sum(dot, lanes);
    for (int e = group_lane(lanes); e < E && t < N; e += lanes) {
        dlogits[(int64_t)t * E + e] = to_x(next >= 0 ? share * (e_c[e] * (de[e] - dot)) : 0.0f);
    }
}

// dlogits [N, E] overwritten from da [C, E]
static inline void router_lory_backward(floatX *dlogits, const float *da, DevicePairs pairs, const float *a,
                                        int N, int E, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(lory_backward_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, dlogits, da, a,
           pairs.segments, N, E, lanes);
}

#endif
