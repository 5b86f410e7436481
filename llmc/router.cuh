/*
Routing on the device, whichever the method (router.h has the table of methods): the one place that knows them
all.

    logits [N, E] -> mask [N, W] of the method, or of a forced active set -> pairs_from_mask -> pair list
    pair list, its counts -> router_loss; gates' gradient [P] -> router_backward -> logits' gradient [N, E]

Here the loss is added to a double in device memory, and nothing is returned: the host never waits.

N is this rank's tokens. The load f_e is that of the global micro-batch: counts [E] and tokens, the tokens per
expert and in all, are of all ranks (of one rank: pairs.counts and N). Each rank's loss is then its share, to
be added up. Scratch: router_scratch_bytes(), used only within a call.
*/
#ifndef ROUTER_CUH
#define ROUTER_CUH

#include "llmc/router.h"
#include "llmc/router_auxfree.cuh"
#include "llmc/router_ec.cuh"
#include "llmc/router_hash.cuh"
#include "llmc/router_lory.cuh"
#include "llmc/router_relu.cuh"
#include "llmc/router_sparsemixer.cuh"
#include "llmc/router_topk.cuh"

typedef struct {
    uint32_t *mask;      // [N, W]
    float *scores;       // [E, N] expert choice; [C, E] lory
    uint64_t *threshold; // [E]
    void *pairs;
} RouterScratch;

static inline RouterScratch router_scratch(Scratch *scratch, Router router, int N) {
    int E = router.experts, choice = router.method == ROUTER_EC; // its scores by expert
    int has_scores = choice || router_merges(router.method);
    RouterScratch r;
    r.mask = scratch_take<uint32_t>(scratch, (int64_t)N * mask_words(E));
    r.scores = scratch_take<float>(scratch, has_scores ? (int64_t)N * E : 0);
    r.threshold = scratch_take<uint64_t>(scratch, choice ? E : 0);
    r.pairs = scratch_take<char>(scratch, (int64_t)pairs_scratch_bytes(N, E));
    return r;
}

// for router_forward, and for router_loss, which uses the same bytes
static inline size_t router_scratch_bytes(Router router, int N) {
    Scratch s = {NULL, 0};
    router_scratch(&s, router, N);
    size_t partial = SUM_MOST_BLOCKS * sizeof(double);
    return s.used > partial ? s.used : partial;
}

// what the method makes of its logits, where the choice is given
static inline void router_scores(float *logits, Router router, int N, cudaStream_t stream) {
    switch (router_row(router.method)->scores) {
    case SCORES_SOFTMAX: router_softmax(logits, N, router.experts, stream); break;
    case SCORES_SIGMOID: router_auxfree_scores(logits, N, router.experts, stream); break;
    default: break;
    }
}

// logits [N, E] become what the table says; all on the device
static inline void router_forward(DevicePairs pairs, float *logits, RouterInputs in, Router router, int N,
                                  void *scratch, cudaStream_t stream) {
    int E = router.experts, k = router.active, weights = router_has_weights(router.method);
    int draws = router_draws(router.method);
    float jitter = (float)router.jitter;
    Scratch s = {(unsigned char *)scratch, 0};
    RouterScratch r = router_scratch(&s, router, N);
    if (in.forced != NULL && router_can_be_forced(router.method)) {
        ActiveIfForced active = {in.forced, E};
        router_scores(logits, router, N, stream);
        mask_where(r.mask, active, N, E, stream);
    } else {
        switch (router.method) {
        case ROUTER_RELU: router_relu_forward(r.mask, logits, N, E, stream); break;
        case ROUTER_TOPK: router_topk_forward(r.mask, logits, N, E, k, stream); break;
        case ROUTER_AUXFREE: router_auxfree_forward(r.mask, logits, in.bias, N, E, k, stream); break;
        case ROUTER_SPARSEMIXER:
            router_sparsemixer_forward(r.mask, pairs.rounds, logits, in.draws, in.forced, N, E, k, jitter,
                                       stream);
            break;
        case ROUTER_LORY: router_lory_forward(pairs, logits, in.segments, E, r.scores, stream); return;
        case ROUTER_EC: router_ec_forward(r.mask, logits, r.scores, r.threshold, N, E, k, stream); break;
        case ROUTER_HASH: router_hash_forward(r.mask, in.ids, N, E, k, stream); break;
        default: router_dense_forward(pairs, N, stream); return; // one pair per token, no mask
        }
    }
    pairs_from_mask(pairs, weights && !draws ? logits : NULL, r.mask, N, E, r.pairs, stream);
    if (router.method == ROUTER_AUXFREE) {
        router_auxfree_gates(pairs, logits, N, E, k, stream);
    } else if (draws) {
        router_sparsemixer_gates(pairs, r.mask, logits, N, E, k, jitter, stream);
    }
}

// *loss += scale * one layer's term of `reg`
static inline void router_loss(double *loss, DevicePairs pairs, const float *logits, const int *counts,
                               int64_t tokens, Router router, int N, int layers, double scale, void *scratch,
                               cudaStream_t stream) {
    int E = router.experts, k = router.active;
    double *partial = (double *)scratch;
    counts = router.load_balance ? counts : NULL;
    switch (router.method) {
    case ROUTER_RELU:
        router_relu_loss(loss, pairs, counts, N, tokens, E, k, scale / layers, partial, stream);
        break;
    case ROUTER_TOPK:
        if (router.load_balance) {
            router_topk_loss(loss, logits, counts, N, tokens, E, k, scale, partial, stream);
        }
        break;
    case ROUTER_SPARSEMIXER:
        if (router.load_balance) {
            router_sparsemixer_loss(loss, logits, counts, N, tokens, E, k, scale, partial, stream);
        }
        break;
    default: break;
    }
}

// dlogits [N, E] overwritten; dgate: for lory da [C, E]; weight: router_loss_weight() over the number of
// micro-batches
static inline void router_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                   const float *logits, const int *counts, int64_t tokens, Router router,
                                   int N, int layers, double weight, cudaStream_t stream) {
    int E = router.experts, k = router.active;
    counts = router.load_balance ? counts : NULL;
    switch (router.method) {
    case ROUTER_RELU:
        router_relu_backward(dlogits, dgate, pairs, counts, N, tokens, E, k, weight / layers, stream);
        break;
    case ROUTER_TOPK:
        router_topk_backward(dlogits, dgate, pairs, logits, counts, N, tokens, E, k,
                             router.load_balance ? weight : 0.0, stream);
        break;
    case ROUTER_SPARSEMIXER:
        router_sparsemixer_backward(dlogits, dgate, pairs, logits, counts, N, tokens, E, k,
                                    (float)router.jitter, router.load_balance ? weight : 0.0, stream);
        break;
    case ROUTER_AUXFREE: router_auxfree_backward(dlogits, dgate, pairs, logits, N, E, k, stream); break;
    case ROUTER_LORY: router_lory_backward(dlogits, dgate, pairs, logits, N, E, stream); break;
    case ROUTER_EC: router_ec_backward(dlogits, dgate, pairs, logits, N, E, stream); break;
    default: break;
    }
}

// dense [N, E] picture of what each expert's weight is for each token; logits: what router_forward left
static inline void router_gates(float *gates, DevicePairs pairs, const float *logits, Router router, int N,
                                cudaStream_t stream) {
    int E = router.experts;
    if (router_merges(router.method)) {
        CUDA_CHECK(cudaMemcpyAsync(gates, logits, (size_t)N * (size_t)E * sizeof(float),
                                   cudaMemcpyDeviceToDevice, stream));
    } else {
        pairs_to_dense(gates, pairs, N, E, stream);
    }
}

#endif
