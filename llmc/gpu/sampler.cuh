/*
Sampling the next token on the device: equals sample_next of run/sampler.h, in one launch, so that a text
needs no word from the host.

    p = softmax(z / temperature) over the `top_k` largest logits, drawn with one uniform number; or argmax

One block, whose warps take equal ranges of the vocabulary. Sorting is not needed, and the vocabulary is read
twice:

    1  every thread's largest logit. The k-th largest of those is at most the k-th largest of all
    2  each warp lists its logits from there on, in the order of ids: a few more than k
    3  the k-th largest of the listed ones, bit by bit: the largest key that at least k keys reach. What is
       below it gets weight 0
    4  weights exp((z - max) / temperature) are summed in double, each warp its list, then the warps in order;
       u of the sum lies in one warp's list, and there a running sum finds the token

With top_k 0 or above the number of threads everything is listed. The weights are rounded to fp32 as the host
rounds them, and their sum's error is about 1e-15 of it: that another token comes out is as likely.

logits [V] fp32; ids, values [V]: the lists. The token, and its embedding as the next step's input, are left
where the next step looks. Errors: a logit that is no number gives the token -1.
*/
#ifndef DEVICE_SAMPLER_CUH
#define DEVICE_SAMPLER_CUH

#include "llmc/gpu/decode.cuh"
#include "llmc/run/sampler.h"
// defines: launch_chained; Sampling, rng_uniform

enum { SAMPLER_THREADS = 1024, SAMPLER_WARPS = SAMPLER_THREADS / 32, TEXT_RING = 8 };
static_assert((TEXT_RING & (TEXT_RING - 1)) == 0, "slots are numbered modulo the ring");

// what the steps of a text hand on, on the device
typedef struct {
    Sampling sampling;
    int position;  // of the token that is read next
    int token;     // that one, 0 after a text has ended
    int64_t draw;  // of the next sample
    int64_t count; // tokens so far
} TextState;

// ordered as the floats are
__device__ __forceinline__ uint32_t logit_key(float z) {
    uint32_t bits = __float_as_uint(z + 0.0f); // -0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ int block_total(int x) {
    __shared__ int partial[SAMPLER_WARPS];
    x = group_sum(x, 32);
    __syncthreads(); // an earlier call's sums have been read
    if (lane_id() == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return group_sum(partial[lane_id()], 32);
}
static_assert(SAMPLER_WARPS == 32, "a lane per warp's sum");

// The largest T that at least k keys of the block reach. count(least): how many keys are at least that, by
// all threads; total: how many there are, -1: not known
template <class Count>
__device__ __forceinline__ uint32_t block_kth_largest(const Count &count, int total, int k) {
    uint32_t T = 0;
    int reached = total;
    for (int bit = 31; bit >= 0 && reached != k; bit--) {
        uint32_t candidate = T | 1u << bit;
        int here = count(candidate);
        if (here >= k) {
            T = candidate;
            reached = here;
        }
    }
    return T;
}

// a logit, and the first id that has it
struct Largest {
    float value;
    int id;
};

__device__ __forceinline__ void take_larger(Largest &a, const Largest &b) {
    bool larger = b.value > a.value || (b.value == a.value && b.id < a.id);
    a.value = larger ? b.value : a.value;
    a.id = larger ? b.id : a.id;
}

__device__ __forceinline__ Largest block_largest(Largest mine) {
    __shared__ Largest warps[SAMPLER_WARPS];
    for (int offset = 16; offset > 0; offset /= 2) {
        Largest other = {__shfl_xor_sync(0xffffffffu, mine.value, offset),
                         __shfl_xor_sync(0xffffffffu, mine.id, offset)};
        take_larger(mine, other);
    }
    if (lane_id() == 0) {
        warps[threadIdx.x / 32] = mine;
    }
    __syncthreads();
    mine = warps[0];
    for (int w = 1; w < SAMPLER_WARPS; w++) {
        take_larger(mine, warps[w]);
    }
    return mine;
}

// a warp's range of the vocabulary, and its list within
struct WarpRange {
    int first, end;
    int listed; // the first so many of ids, values from `first` on
};

// by a warp: what reaches the bound, in the order of ids
__device__ __forceinline__ void list_candidates(WarpRange &range, int *ids, float *values,
                                                const float *logits, uint32_t bound) {
    range.listed = 0;
#pragma unroll 4
    for (int tile = range.first; tile < range.end; tile += 32) {
        int v = tile + lane_id();
        float z = v < range.end ? logits[v] : 0.0f;
        bool taken = v < range.end && logit_key(z) >= bound;
        uint32_t all = __ballot_sync(0xffffffffu, taken);
        if (taken) {
            int at = range.first + range.listed + __popc(all & bits_below(lane_id()));
            ids[at] = v;
            values[at] = z;
        }
        range.listed += __popc(all);
    }
    __syncwarp();
}

// inclusive, over a warp's lanes
__device__ __forceinline__ double warp_running_sum(double x) {
    for (int offset = 1; offset < 32; offset *= 2) {
        double below = __shfl_up_sync(0xffffffffu, x, (unsigned)offset);
        x += lane_id() >= offset ? below : 0.0;
    }
    return x;
}

// by a warp: the listed logits become weights; returns their sum
__device__ __forceinline__ double weigh_candidates(const WarpRange &range, float *values, uint32_t threshold,
                                                   float max, double temperature) {
    double sum = 0.0;
    for (int i = range.first + lane_id(); i < range.first + range.listed; i += 32) {
        float z = values[i];
        values[i] = logit_key(z) >= threshold ? (float)exp(((double)z - max) / temperature) : 0.0f;
        sum += values[i];
    }
    return group_sum(sum, 32);
}

// by a warp: the id where the running sum of its weights passes the target; -1: nowhere.
// *last: the last id with a weight
__device__ __forceinline__ int find_target(int *last, const WarpRange &range, const int *ids,
                                           const float *weights, double target) {
    double before = 0.0;
    for (int tile = range.first; tile < range.first + range.listed; tile += 32) {
        int i = tile + lane_id();
        float weight = i < range.first + range.listed ? weights[i] : 0.0f;
        double sum = before + warp_running_sum((double)weight);
        uint32_t passed = __ballot_sync(0xffffffffu, weight > 0.0f && sum > target);
        uint32_t any = __ballot_sync(0xffffffffu, weight > 0.0f);
        *last = any != 0 ? ids[tile + 31 - __clz((int)any)] : *last;
        if (passed != 0) {
            return ids[tile + __ffs((int)passed) - 1];
        }
        before = __shfl_sync(0xffffffffu, sum, 31);
    }
    return -1;
}

// by a block, temperature > 0; in all threads
__device__ __forceinline__ int draw_token(const float *logits, int *ids, float *values, Largest mine,
                                          WarpRange range, float max, const Sampling &s, double u) {
    __shared__ double sums[SAMPLER_WARPS];
    __shared__ int found[SAMPLER_WARPS], lasts[SAMPLER_WARPS];
    int warp = (int)threadIdx.x / 32, V = s.allowed, k = s.top_k > 0 && s.top_k < V ? s.top_k : V;
    uint32_t own = mine.id < V ? logit_key(mine.value) : 0, bound = 0, threshold = 0;
    if (k < V && k <= SAMPLER_THREADS) {
        bound =
            block_kth_largest([&](uint32_t least) { return block_total(own >= least); }, SAMPLER_THREADS, k);
    }
    list_candidates(range, ids, values, logits, bound);
    if (k < V) {
        auto count = [&](uint32_t least) {
            int here = 0;
            for (int i = range.first + lane_id(); i < range.first + range.listed; i += 32) {
                here += logit_key(values[i]) >= least;
            }
            return block_total(here);
        };
        threshold = block_kth_largest(count, -1, k);
    }
    double sum = weigh_candidates(range, values, threshold, max, s.temperature);
    if (lane_id() == 0) {
        sums[warp] = sum;
    }
    __syncthreads();
    double before = 0.0, total = 0.0;
    for (int w = 0; w < SAMPLER_WARPS; w++) {
        before += w < warp ? sums[w] : 0.0;
        total += sums[w];
    }
    int last = -1, token = find_target(&last, range, ids, values, u * total - before);
    if (lane_id() == 0) {
        found[warp] = token;
        lasts[warp] = last;
    }
    __syncthreads();
    token = last = -1;
    for (int w = 0; w < SAMPLER_WARPS; w++) {
        token = token < 0 ? found[w] : token;
        last = lasts[w] >= 0 ? lasts[w] : last;
    }
    return token >= 0 ? token : last;
}

// x [d] becomes the token's embedding
static __global__ void __launch_bounds__(SAMPLER_THREADS)
    sampler_kernel(TextState *state, int *ring, floatX *x, const floatX *embed, const float *logits, int *ids,
                   float *values, int d) {
    next_may_begin();
    previous_done();
    TextState text = *state;
    int V = text.sampling.allowed, warp = (int)threadIdx.x / 32, share = ceil_div(V, (int)SAMPLER_WARPS);
    WarpRange range = {min(V, warp * share), min(V, (warp + 1) * share), 0};
    Largest mine = {-INFINITY, V};
    bool broken = false;
#pragma unroll 8
    for (int v = range.first + lane_id(); v < range.end; v += 32) {
        float z = logits[v];
        Largest other = {z, v};
        broken |= !(z - z == 0.0f);
        take_larger(mine, other);
    }
    broken = block_total(broken) > 0;
    Largest best = block_largest(mine);
    double u = rng_uniform(text.sampling.seed, text.sampling.stream, (uint64_t)text.draw);
    int token = -1;
    if (!broken) {
        token = text.sampling.temperature > 0.0
                    ? draw_token(logits, ids, values, mine, range, best.value, text.sampling, u)
                    : best.id;
    }
    for (int c = (int)threadIdx.x * PACK_X; c < d; c += SAMPLER_THREADS * PACK_X) {
        store_bits(x + c, load_bits(embed + (int64_t)max(token, 0) * d + c));
    }
    __syncthreads(); // all have read the state
    if (threadIdx.x == 0) {
        ring[text.count % TEXT_RING] = token;
        state->position = text.position + 1;
        state->token = max(token, 0);
        state->draw = text.draw + 1;
        state->count = text.count + 1;
    }
}

static inline void sample_on_device(TextState *state, int *ring, floatX *x, const floatX *embed,
                                    const float *logits, int *ids, float *values, int d,
                                    cudaStream_t stream) {
    launch_chained(sampler_kernel, 1, SAMPLER_THREADS, stream, state, ring, x, embed, logits, ids, values, d);
}

#endif
