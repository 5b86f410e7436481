/*
Routing on the device, whichever the method (router.h has the table of methods): the one place that knows them
all.

    logits [N, E] -> mask [N, W] of the method, or of a forced active set -> pairs_from_mask -> pair list
    pair list, its counts -> router_loss; gates' gradient [P] -> router_backward -> logits' gradient [N, E]

Here the loss is added to a double in device memory, and nothing is returned: the host never waits.

N is this rank's tokens. With data parallelism the load f_e is that of the global micro-batch: before
router_loss and router_backward, point pairs.counts at the sums over all ranks, and tell both how many ranks
of N tokens there are. Each rank's loss is then its share, to be added up. Scratch: router_scratch_bytes(),
used only within a call.
*/
#ifndef ROUTER_CUH
#define ROUTER_CUH

#include "llmc/router.h"
#include "llmc/router_ec.cuh"
#include "llmc/router_hash.cuh"
#include "llmc/router_relu.cuh"
#include "llmc/router_topk.cuh"

typedef struct {
    uint32_t *mask;      // [N, W]
    float *scores;       // [E, N] expert choice
    uint64_t *threshold; // [E]
    void *pairs;
} RouterScratch;

static inline RouterScratch router_scratch(Scratch *scratch, Router router, int N) {
    int E = router.experts, choice = router.method == ROUTER_EC;
    RouterScratch r;
    r.mask = scratch_take<uint32_t>(scratch, (int64_t)N * mask_words(E));
    r.scores = scratch_take<float>(scratch, choice ? (int64_t)N * E : 0);
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

static inline int router_has_softmax(RouterMethod method) {
    return method == ROUTER_TOPK || method == ROUTER_EC;
}

// logits [N, E] (becomes the softmax for topk and ec), ids [N], forced [N, E] or NULL
static inline void router_forward(DevicePairs pairs, float *logits, const int *ids, const float *forced,
                                  Router router, int N, void *scratch, cudaStream_t stream) {
    int E = router.experts, k = router.active, weights = router_has_weights(router.method);
    Scratch s = {(unsigned char *)scratch, 0};
    RouterScratch r = router_scratch(&s, router, N);
    if (router.method == ROUTER_DENSE) {
        router_dense_forward(pairs, N, stream);
        return;
    }
    if (forced != NULL && weights) {
        ActiveIfForced active = {forced, E};
        if (router_has_softmax(router.method)) {
            router_softmax(logits, N, E, stream);
        }
        mask_where(r.mask, active, N, E, stream);
    } else if (router.method == ROUTER_RELU) {
        router_relu_forward(r.mask, logits, N, E, stream);
    } else if (router.method == ROUTER_TOPK) {
        router_topk_forward(r.mask, logits, N, E, k, stream);
    } else if (router.method == ROUTER_EC) {
        router_ec_forward(r.mask, logits, r.scores, r.threshold, N, E, k, stream);
    } else {
        router_hash_forward(r.mask, ids, N, E, k, stream);
    }
    pairs_from_mask(pairs, weights ? logits : NULL, r.mask, N, E, r.pairs, stream);
}

// *loss += scale * one layer's term of `reg`
static inline void router_loss(double *loss, DevicePairs pairs, const float *logits, Router router, int N,
                               int layers, double scale, void *scratch, cudaStream_t stream, int ranks = 1) {
    int E = router.experts, k = router.active;
    int64_t all = (int64_t)N * ranks;
    double *partial = (double *)scratch;
    if (router.method == ROUTER_RELU) {
        const int *counts = router.load_balance ? pairs.counts : NULL;
        router_relu_loss(loss, pairs, counts, N, all, E, k, scale / layers, partial, stream);
    } else if (router.method == ROUTER_TOPK && router.load_balance) {
        router_topk_loss(loss, logits, pairs.counts, N, all, E, k, scale, partial, stream);
    }
}

// dlogits [N, E] overwritten; weight: lambda (relu) or the auxiliary coefficient (topk), over the number of
// micro-batches
static inline void router_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                   const float *logits, Router router, int N, int layers, double weight,
                                   cudaStream_t stream, int ranks = 1) {
    int E = router.experts, k = router.active;
    int64_t all = (int64_t)N * ranks;
    const int *counts = router.load_balance ? pairs.counts : NULL;
    if (router.method == ROUTER_RELU) {
        router_relu_backward(dlogits, dgate, pairs, counts, N, all, E, k, weight / layers, stream);
    } else if (router.method == ROUTER_TOPK) {
        router_topk_backward(dlogits, dgate, pairs, logits, counts, N, all, E, k,
                             counts != NULL ? weight : 0.0, stream);
    } else if (router.method == ROUTER_EC) {
        router_ec_backward(dlogits, dgate, pairs, logits, N, E, stream);
    }
}

#endif
