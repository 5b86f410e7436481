/*
The router of one token, and the RMSNorm before it: which experts, with which gates.

    normed [d] = round(RMSNorm(mid));  z [E] = W normed;  the choice -> the list of one token's pairs

Every block computes a few logits, and the one that is done last chooses, by a warp, with the functions that
route whole batches (router_METHOD.cuh), in evaluation mode: nothing is drawn. A method without weights has
one block, for normed and the choice.

    method        the choice's function of a group of lanes             gates
    relu          ActiveIfPositive                                      z
    topk, ec      group_softmax, group_mask_largest                     softmax(z)
    auxfree       group_auxfree                                         group_auxfree_gates
    sparsemixer   group_sparsemixer, without draws the largest logits   group_sparsemixer_gates
    hash          ActiveIfHashed                                        1
    dense         expert 0                                              1

mid [d] floatX, w [d], router [E, d], bias [E] fp32; logits [E] become what router.h's table says. pairs: the
list of N = 1 token. Errors: none.
*/
#ifndef DECODE_ROUTER_CUH
#define DECODE_ROUTER_CUH

#include "llmc/gpu/decode.cuh"
#include "llmc/router.cuh"
// defines: is_last_block, normed_row; Router, router_row, group_*; ActiveIf*

typedef struct {
    const float *weights; // [E, d], or NULL
    const float *bias;    // [E], or NULL
    const int *token;     // its id
    float *logits;        // [E]
    uint32_t *mask;       // [W]
    int *ticket;
    DevicePairs pairs;
    RouterMethod method;
    int E, k;
    float jitter;
} DecodeRouter;

// by a warp: mask [W] of a predicate active(token 0, e)
template <class Active>
__device__ __forceinline__ void decode_mask_where(uint32_t *mask, const Active &active, int E) {
    for (int w = 0; w < mask_words(E); w++) {
        int e = 32 * w + lane_id();
        uint32_t word = __ballot_sync(0xffffffffu, e < E && active(0, e));
        if (lane_id() == 0) {
            mask[w] = word;
        }
    }
}

struct ActiveAlone {
    __device__ __forceinline__ bool operator()(int, int e) const {
        return e == 0;
    }
};

// by a warp
__device__ __forceinline__ void decode_choose(const DecodeRouter &r) {
    ActiveIfPositive positive = {r.logits, r.E};
    ActiveIfHashed hashed = {r.token, r.E, r.k};
    ScoreKeys scores = {r.logits};
    RouterDraws none = {NULL, 0, 0};
    switch (r.method) {
    case ROUTER_RELU: decode_mask_where(r.mask, positive, r.E); break;
    case ROUTER_HASH: decode_mask_where(r.mask, hashed, r.E); break;
    case ROUTER_DENSE: decode_mask_where(r.mask, ActiveAlone(), r.E); break;
    case ROUTER_AUXFREE: group_auxfree(r.mask, r.logits, r.bias, r.E, r.E, r.k, 32); break;
    case ROUTER_SPARSEMIXER:
        group_sparsemixer(r.mask, r.pairs.rounds, r.logits, none, NULL, 0, 1, r.E, r.k, r.jitter, 32);
        break;
    default: group_softmax(r.logits, r.E, 32); group_mask_largest(r.mask, scores, r.E, r.E, r.k, 32);
    }
    __syncwarp();
}

// by a warp: the mask's bits in order, each with its score as its gate, or 1
__device__ __forceinline__ void decode_list(const DecodeRouter &r) {
    int count = 0;
    for (int w = 0; w < mask_words(r.E); w++) {
        uint32_t word = r.mask[w];
        if (word >> lane_id() & 1) {
            int e = 32 * w + lane_id(), p = count + __popc(word & bits_below(lane_id()));
            r.pairs.expert[p] = e;
            r.pairs.gate[p] = r.weights != NULL ? r.logits[e] : 1.0f;
        }
        count += __popc(word);
    }
    if (lane_id() == 0) {
        r.pairs.row_start[0] = 0;
        r.pairs.row_start[1] = count;
    }
    __syncwarp();
    if (r.method == ROUTER_AUXFREE && r.k > 1) {
        group_auxfree_gates(r.pairs, r.logits, 0, 1, r.E, 32);
    } else if (r.method == ROUTER_SPARSEMIXER) {
        group_sparsemixer_gates(r.pairs, r.mask, r.logits, 0, 1, r.E, r.k, r.jitter, 32);
    }
}

// by a warp: z of expert e
__device__ __forceinline__ float decode_logit(const float *weights, const NormedRow &normed, int d) {
    float sum = 0.0f;
#pragma unroll 4
    for (int c = lane_id() * PACK_X; c < d; c += DECODE_STEP) {
        sum += sum_of_products(load_constant_floats(weights + c), normed(c));
    }
    return warp_sum(sum);
}

static __global__ void __launch_bounds__(DECODE_THREADS)
    decode_router_kernel(floatX *normed, DecodeRouter r, const floatX *mid, const float *w, int d,
                         float eps) {
    next_may_begin();
    previous_done();
    NormedRow row = normed_row(mid, w, d, eps);
    int e = decode_warp();
    for (int c = (int)threadIdx.x * PACK_X; c < d && blockIdx.x == 0; c += DECODE_THREADS * PACK_X) {
        store_pack(normed + c, narrow(row(c)));
    }
    if (r.weights != NULL && e < r.E) {
        float z = decode_logit(r.weights + (int64_t)e * d, row, d);
        if (lane_id() == 0) {
            r.logits[e] = z;
        }
    }
    if (is_last_block(r.ticket, (int)gridDim.x) && threadIdx.x < 32) {
        for (int i = lane_id(); i < r.E && r.weights != NULL; i += 32) {
            r.logits[i] = load_written(r.logits + i); // each lane its own: read from here on
        }
        __syncwarp();
        decode_choose(r);
        decode_list(r);
    }
}

static inline void decode_router(floatX *normed, DecodeRouter r, const floatX *mid, const float *w, int d,
                                 float eps, cudaStream_t stream) {
    unsigned blocks = r.weights != NULL ? decode_blocks(r.E) : 1;
    launch_chained(decode_router_kernel, blocks, DECODE_THREADS, stream, normed, r, mid, w, d, eps);
}

#endif
