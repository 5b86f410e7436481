/*
SparseMixer-v2 on the device (router_sparsemixer.h has the formulas). A group of lanes serves a token, and draws
its experts one after the other: the mask's bits are those that are taken.

    a round   the largest free logit, and its lowest expert by ballots; then the running sums of exp(z - z*) over
              32 experts at a time, twice in the same order: for the whole, and for where u of it is passed
    gates     once the pairs are listed: a round's pair is found by the bits of the mask below its expert
    backward  a lane per round makes dR p_D; then each expert adds up the rounds in which it was free, and the
              auxiliary loss's part; in fp32, rounded once

The step's key is read from device memory, so that a captured graph draws anew each time it runs. The cost is
O(k E) per token.
*/
#ifndef ROUTER_SPARSEMIXER_CUH
#define ROUTER_SPARSEMIXER_CUH

#include "llmc/router_sparsemixer.h"
#include "llmc/router_topk.cuh"
// defines: RouterDraws, draw_uniform, sparsemixer_is_candidate; group_*, add_partials, DevicePairs

// a token for its group of lanes
struct MixerToken {
    const float *z;        // [E]
    const uint32_t *taken; // [W] bits
    int experts;           // E, or 0 where there is no token
    int lanes;
    float jitter;

    __device__ __forceinline__ int lane() const {
        return group_lane(lanes);
    }
    // is the lane's expert of word w free?
    __device__ __forceinline__ bool is_free(int w) const {
        return 32 * w + lane() < experts && !(taken[w] >> lane() & 1);
    }
    // exp(z - z*) of the lane's expert of word w, 0 where it is no candidate
    __device__ __forceinline__ float weight(int w, float max) const {
        float logit = is_free(w) ? z[32 * w + lane()] : 0.0f;
        return is_free(w) && sparsemixer_is_candidate(logit, max, jitter) ? expf(logit - max) : 0.0f;
    }
};

// inclusive, over the group's lanes
__device__ __forceinline__ float group_prefix_sum(float x, int lanes) {
    for (int offset = 1; offset < lanes; offset *= 2) {
        float before = __shfl_up_sync(0xffffffffu, x, offset);
        x += group_lane(lanes) >= offset ? before : 0.0f;
    }
    return x;
}

// of the group's last lane
__device__ __forceinline__ float group_last(float x, int lanes) {
    return __shfl_sync(0xffffffffu, x, ((int)threadIdx.x % 32) | (lanes - 1));
}

// z* of the free experts, and e*: the first free one, if no logit is a number
__device__ __forceinline__ float group_best(int *best, MixerToken token, int W) {
    float max = -INFINITY;
    for (int w = 0; w < W; w++) {
        max = fmaxf(max, token.is_free(w) ? token.z[32 * w + token.lane()] : -INFINITY);
    }
    max = group_max(max, token.lanes);
    int found = -1, first = -1;
    for (int w = 0; w < W; w++) {
        bool is_free = token.is_free(w);
        uint32_t free_ones = group_ballot(is_free, token.lanes);
        uint32_t equal = group_ballot(is_free && token.z[32 * w + token.lane()] == max, token.lanes);
        first = first < 0 && free_ones != 0 ? 32 * w + __ffs((int)free_ones) - 1 : first;
        found = found < 0 && equal != 0 ? 32 * w + __ffs((int)equal) - 1 : found;
    }
    *best = found >= 0 ? found : first;
    return max;
}

// the sum of all weights; *drawn = where the running sum passes the threshold, the last candidate if nowhere
__device__ __forceinline__ float group_running_sum(int *drawn, MixerToken token, float max, float threshold,
                                                   int W) {
    float running = 0.0f;
    int passed = -1, last = -1;
    for (int w = 0; w < W; w++) {
        float weight = token.weight(w, max), sum = group_prefix_sum(weight, token.lanes);
        uint32_t candidates = group_ballot(weight > 0.0f, token.lanes);
        uint32_t above = group_ballot(weight > 0.0f && running + sum > threshold, token.lanes);
        passed = passed < 0 && above != 0 ? 32 * w + __ffs((int)above) - 1 : passed;
        last = candidates != 0 ? 32 * w + 31 - __clz((int)candidates) : last;
        running += group_last(sum, token.lanes);
    }
    *drawn = passed >= 0 ? passed : last >= 0 ? last : *drawn;
    return running;
}

// the draw of round j in an earlier dump's row, 0: there is none
__device__ __forceinline__ int group_forced_draw(MixerToken token, const float *forced, int j, int W) {
    int draw = 0;
    for (int w = 0; w < W; w++) {
        float code = token.is_free(w) ? forced[32 * w + token.lane()] : 0.0f;
        uint32_t here = group_ballot((int)fabsf(code) == j + 1, token.lanes);
        uint32_t third = group_ballot(code < 0.0f, token.lanes);
        if (draw == 0 && here != 0) {
            int bit = __ffs((int)here) - 1;
            draw = third >> bit & 1 ? -(32 * w + bit + 1) : 32 * w + bit + 1;
        }
    }
    return draw;
}

// the draw of round j of the step's token
__device__ __forceinline__ int group_draw(MixerToken token, RouterRound round, int best, RouterDraws draws,
                                          int64_t step_token, int j, int k, int W) {
    if (draws.key == NULL) {
        return best + 1;
    }
    uint64_t counter = (uint64_t)step_token * 2u * (uint64_t)k + 2u * (uint64_t)j;
    float u = draw_uniform(*draws.key, draws.layer, counter);
    int drawn = best;
    group_running_sum(&drawn, token, round.max, u * round.sum, W);
    bool third = drawn != best && draw_uniform(*draws.key, draws.layer, counter + 1) >= 0.25f;
    return third ? -(drawn + 1) : drawn + 1;
}

// by a group: the rounds of token t, and its words of the mask
__device__ __forceinline__ void group_sparsemixer(uint32_t *mask, RouterRound *rounds, const float *z,
                                                  RouterDraws draws, const float *forced, int t, int N, int E,
                                                  int k, float jitter, int lanes) {
    int W = mask_words(E);
    uint32_t *words = mask + (int64_t)t * W;
    MixerToken token = {z + (int64_t)t * E, words, t < N ? E : 0, lanes, jitter};
    for (int w = token.lane(); w < W && t < N; w += lanes) {
        words[w] = 0;
    }
    __syncwarp();
    for (int j = 0; j < k; j++) {
        RouterRound round;
        int best, unused = 0;
        round.max = group_best(&best, token, W);
        round.sum = group_running_sum(&unused, token, round.max, INFINITY, W);
        round.draw = forced != NULL ? group_forced_draw(token, forced + (int64_t)t * E, j, W)
                                    : group_draw(token, round, best, draws, draws.first_token + t, j, k, W);
        round.slope = 0.0f;
        __syncwarp(); // all have read the bits
        if (token.lane() == 0 && t < N) {
            int e = round_expert(&round);
            rounds[(int64_t)t * k + j] = round;
            if (e >= 0) {
                words[e / 32] |= 1u << e % 32;
            }
        }
        __syncwarp();
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_sparsemixer_kernel(uint32_t *mask, RouterRound *rounds, const float *z, RouterDraws draws,
                              const float *forced, int N, int E, int k, float jitter, int lanes) {
    group_sparsemixer(mask, rounds, z, draws, forced, group_token(lanes), N, E, k, jitter, lanes);
}

// mask [N, W] and rounds [N, k] of z [N, E]; forced: NULL, or draws [N, E] to repeat
static inline void router_sparsemixer_forward(uint32_t *mask, RouterRound *rounds, const float *z,
                                              RouterDraws draws, const float *forced, int N, int E, int k,
                                              float jitter, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_sparsemixer_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, mask, rounds, z, draws,
           forced, N, E, k, jitter, lanes);
}

// p of an expert that was free in the round
__device__ __forceinline__ float round_probability(RouterRound round, float z, float jitter) {
    return sparsemixer_is_candidate(z, round.max, jitter) ? expf(z - round.max) / round.sum : 0.0f;
}

// by a group: the gates of token t's pairs
__device__ __forceinline__ void group_sparsemixer_gates(DevicePairs pairs, const uint32_t *mask,
                                                        const float *z, int t, int N, int E, int k,
                                                        float jitter, int lanes) {
    int lane = group_lane(lanes);
    const float *row = z + (int64_t)t * E;
    const uint32_t *words = mask + (int64_t)t * mask_words(E);
    float broken = 0.0f; // 0, or no number
    for (int e = lane; e < E && t < N; e += lanes) {
        broken += row[e] - row[e];
    }
    broken = group_sum(broken, lanes);
    for (int j = lane; j < k && t < N; j += lanes) {
        RouterRound round = pairs.rounds[(int64_t)t * k + j];
        int e = round_expert(&round);
        if (e >= 0) {
            int p = pairs.row_start[t] + __popc(words[e / 32] & bits_below(e % 32));
            for (int w = 0; w < e / 32; w++) {
                p += __popc(words[w]);
            }
            float probability = round_probability(round, row[e], jitter);
            pairs.gate[p] = (round.draw < 0 ? probability / 3.0f : probability) + broken;
        }
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_sparsemixer_gates_kernel(DevicePairs pairs, const uint32_t *mask, const float *z, int N, int E,
                                    int k, float jitter, int lanes) {
    group_sparsemixer_gates(pairs, mask, z, group_token(lanes), N, E, k, jitter, lanes);
}

// the gates of a list that was made of the mask
static inline void router_sparsemixer_gates(DevicePairs pairs, const uint32_t *mask, const float *z, int N,
                                            int E, int k, float jitter, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(router_sparsemixer_gates_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, pairs, mask, z, N,
           E, k, jitter, lanes);
}

// ----------------------------------------------------------------------------
// auxiliary loss, backward

// of a row of logits: the largest, and the sum of exp(z - max)
struct RowSums {
    float max, sum;
};

__device__ __forceinline__ RowSums group_row_sums(const float *row, int experts, int lanes) {
    RowSums sums = {-INFINITY, 0.0f};
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        sums.max = fmaxf(sums.max, row[e]);
    }
    sums.max = group_max(sums.max, lanes);
    for (int e = group_lane(lanes); e < experts; e += lanes) {
        sums.sum += expf(row[e] - sums.max);
    }
    sums.sum = group_sum(sums.sum, lanes);
    return sums;
}

static __global__ void __launch_bounds__(SUM_THREADS)
    router_sparsemixer_loss_kernel(double *partial, const float *z, const int *counts, int tokens, int E,
                                   int lanes) {
    double sum = 0.0;
    int groups = SUM_THREADS / lanes;
    for (int first = (int)blockIdx.x * groups; first < tokens; first += (int)gridDim.x * groups) {
        int t = first + (int)threadIdx.x / lanes, experts = t < tokens ? E : 0;
        const float *row = z + (int64_t)t * E;
        RowSums sums = group_row_sums(row, experts, lanes);
        for (int e = group_lane(lanes); e < experts; e += lanes) {
            sum += (double)counts[e] * (expf(row[e] - sums.max) / sums.sum);
        }
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// *loss += scale * sum_e f_e mean_t softmax(z)_te of this rank's tokens; partial [SUM_MOST_BLOCKS]
static inline void router_sparsemixer_loss(double *loss, const float *z, const int *counts, int tokens,
                                           int64_t N, int E, int k, double scale, double *partial,
                                           cudaStream_t stream) {
    double share = (double)E / ((double)k * (double)N) / (double)N;
    int blocks = sum_blocks((int64_t)tokens * E);
    launch(router_sparsemixer_loss_kernel, blocks, SUM_THREADS, 0, stream, partial, z, counts, tokens, E,
           lanes_of(E));
    add_partials(loss, partial, blocks, scale * share, stream);
}

// slope = dR p_D of each of a token's rounds, a lane per round
__device__ __forceinline__ void group_slopes(DevicePairs pairs, const float *dgate, const float *row, int t,
                                             int k, float jitter, int lanes) {
    for (int j = group_lane(lanes); j < k; j += lanes) {
        RouterRound *round = &pairs.rounds[(int64_t)t * k + j];
        int e = round_expert(round);
        for (int p = pairs.row_start[t]; p < pairs.row_start[t + 1] && e >= 0; p++) {
            if (pairs.expert[p] == e) {
                round->slope = dgate[p] * round_probability(*round, row[e], jitter);
            }
        }
    }
}

// counts == NULL: no loss, the rounds alone
static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_sparsemixer_backward_kernel(floatX *dlogits, const float *dgate, DevicePairs pairs, const float *z,
                                       const int *counts, int tokens, int E, int k, float jitter, float share,
                                       int lanes) {
    int t = group_token(lanes), lane = group_lane(lanes), experts = t < tokens ? E : 0;
    const float *row = z + (int64_t)t * E;
    RowSums sums = group_row_sums(row, experts, lanes);
    float dot = 0.0f;
    for (int e = lane; e < experts && counts != NULL; e += lanes) {
        dot += expf(row[e] - sums.max) / sums.sum * (share * (float)counts[e]);
    }
    dot = group_sum(dot, lanes);
    if (t < tokens) {
        group_slopes(pairs, dgate, row, t, k, jitter, lanes);
    }
    __syncwarp(); // every lane reads all slopes
    for (int e = lane; e < experts; e += lanes) {
        float s = expf(row[e] - sums.max) / sums.sum;
        float dz = counts != NULL ? s * (share * (float)counts[e] - dot) : 0.0f;
        for (int j = 0, is_free = 1; j < k && is_free; j++) {
            RouterRound round = pairs.rounds[(int64_t)t * k + j];
            is_free = round_expert(&round) != e;
            dz += round.slope * ((is_free ? 0.0f : 1.0f) - round_probability(round, row[e], jitter));
        }
        dlogits[(int64_t)t * E + e] = to_x(dz);
    }
}

// dlogits [tokens, E] overwritten from dgate [P]; weight 0 (counts may be NULL): without the loss's gradient
static inline void router_sparsemixer_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                               const float *z, const int *counts, int tokens, int64_t N,
                                               int E, int k, float jitter, double weight,
                                               cudaStream_t stream) {
    int lanes = lanes_of(E);
    double share = weight * (double)E / ((double)k * (double)N) / (double)N;
    launch(router_sparsemixer_backward_kernel, group_blocks(tokens, lanes), GROUP_BLOCK, 0, stream, dlogits,
           dgate, pairs, z, weight != 0.0 ? counts : NULL, tokens, E, k, jitter, share, lanes);
}

#endif
