/*
Routing, whichever the method: the one place that knows them all.

    logits [N, E] -> router_forward -> pair list;   counts of the global micro-batch -> router_loss
    gates' gradient [P] -> router_backward -> logits' gradient [N, E]

    method  gate                         extra loss `reg`                                  its weight
    relu    relu(z_e)                    (1/L) sum_l sum_e f_le mean_t R_te (Eq. 9, 10)    lambda
    topk    softmax(z)_e of the k best   sum_l sum_e f_le mean_t softmax(z)_te             aux_coeff
    ec      softmax(z)_te, experts pick  0
    hash    1, by token id               0
    dense   1, one expert                0                     (each in router_METHOD.h, dense beside hash)

The logits are W x (a matmul of the caller); for topk and ec they become the softmax in place. hash and dense
have none (NULL). A `forced` active set [N, E] (entries != 0) replaces the method's own: two implementations,
or two precisions, can then be compared without a pair near the threshold flipping. A forced gate keeps its
own value, z for relu.
*/
#ifndef ROUTER_H
#define ROUTER_H

#include "llmc/router_ec.h"
#include "llmc/router_hash.h"
#include "llmc/router_relu.h"
#include "llmc/router_topk.h"

typedef enum { ROUTER_RELU, ROUTER_TOPK, ROUTER_EC, ROUTER_HASH, ROUTER_DENSE, ROUTER_COUNT } RouterMethod;

typedef struct {
    RouterMethod method;
    int experts;      // E_tot = E G
    int active;       // k_tot = k G (for topk: the k in force)
    int load_balance; // f_le (1) or 1 (0) for relu; auxiliary loss (1) or none (0) for topk
} Router;

static inline const char *router_name(RouterMethod method) {
    static const char *names[ROUTER_COUNT] = {"relu", "topk", "ec", "hash", "dense"};
    return names[method];
}

// -1 when there is no such method
static inline int router_from_name(const char *name) {
    for (int method = 0; method < ROUTER_COUNT; method++) {
        if (strcmp(name, router_name((RouterMethod)method)) == 0) {
            return method;
        }
    }
    return -1;
}

static inline int router_has_weights(RouterMethod method) {
    return method == ROUTER_RELU || method == ROUTER_TOPK || method == ROUTER_EC;
}

// logits [N, E] (becomes the softmax for topk and ec), ids [N], forced [N, E] or NULL
static inline void router_forward(PairList *pairs, float *logits, const int *ids, const float *forced,
                                  Router router, int64_t N) {
    int E = router.experts;
    if (router.method == ROUTER_TOPK || router.method == ROUTER_EC) {
        router_softmax(logits, N, E);
    }
    if (forced != NULL && router_has_weights(router.method)) {
        pairs_from_mask(pairs, logits, forced, N, E);
        return;
    }
    switch (router.method) {
    case ROUTER_RELU: router_relu_forward(pairs, logits, N, E); break;
    case ROUTER_TOPK: router_topk_forward(pairs, logits, N, E, router.active); break;
    case ROUTER_EC: router_ec_forward(pairs, logits, N, E, router.active); break;
    case ROUTER_HASH: router_hash_forward(pairs, ids, N, E, router.active); break;
    default: router_dense_forward(pairs, N); break;
    }
}

// one layer's term of `reg`; counts [E] and N: tokens an expert, and tokens, of the global micro-batch
static inline double router_loss(const PairList *pairs, const float *logits, const int64_t *counts,
                                 Router router, int64_t N, int layers) {
    if (router.method == ROUTER_RELU) {
        return router_relu_loss(pairs, counts, N, router.experts, router.active, router.load_balance) /
               layers;
    }
    if (router.method == ROUTER_TOPK && router.load_balance) {
        return router_topk_loss(logits, counts, pairs->tokens, N, router.experts, router.active);
    }
    return 0.0;
}

// dlogits [N, E] overwritten; weight: lambda (relu) or the auxiliary coefficient (topk), over the number of
// micro-batches
static inline void router_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                   const float *logits, const int64_t *counts, Router router, int64_t N,
                                   int layers, double weight) {
    int E = router.experts;
    switch (router.method) {
    case ROUTER_RELU:
        router_relu_backward(dlogits, dgate, pairs, counts, N, E, router.active, router.load_balance,
                             weight / layers);
        break;
    case ROUTER_TOPK:
        router_topk_backward(dlogits, dgate, pairs, logits, counts, N, E, router.active,
                             router.load_balance ? weight : 0.0);
        break;
    case ROUTER_EC: router_ec_backward(dlogits, dgate, pairs, logits, E); break;
    default: break;
    }
}

#endif
