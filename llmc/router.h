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

Whatever else the rest of the program asks of a method (has it weights? what weighs its loss? how is a single
token routed?) stands in one table, ROUTER_TABLE: nobody compares methods by name.

The logits are W x (a matmul of the caller); for topk and ec they become the softmax in place. hash and dense
have none (NULL). A `forced` active set [N, E] (entries != 0) replaces the method's own: two implementations,
or two precisions, can then be compared without a pair near the threshold flipping. A forced gate keeps its
own value, z for relu.

A new method is its header router_METHOD.h, and here a row of the table and a case in each of the three
switches; on the GPU the same again (router_METHOD.cuh, router.cuh).
*/
#ifndef ROUTER_H
#define ROUTER_H

#include "llmc/router_ec.h"
#include "llmc/router_hash.h"
#include "llmc/router_relu.h"
#include "llmc/router_topk.h"
// defines: router_METHOD_forward, _loss, _backward; PairList

typedef enum { WEIGHS_NOTHING, WEIGHS_LAMBDA, WEIGHS_AUX_COEFF } RouterLossWeight;

// clang-format off
#define ROUTER_TABLE(ROW)                                                                                    \
    /*                 has      has      has      its loss is  a token alone  k warms  number   gradient     \
          method name  experts  weights  softmax  weighed by   goes by        up       is open  is sparse */ \
    ROW(RELU,  "relu",   1,       1,       0,     LAMBDA,      RELU,          0,       1,       1)           \
    ROW(TOPK,  "topk",   1,       1,       1,     AUX_COEFF,   TOPK,          1,       0,       0)           \
    ROW(EC,    "ec",     1,       1,       1,     NOTHING,     TOPK,          0,       0,       0)           \
    ROW(HASH,  "hash",   1,       0,       0,     NOTHING,     HASH,          0,       0,       0)           \
    ROW(DENSE, "dense",  0,       0,       0,     NOTHING,     DENSE,         0,       0,       0)
// clang-format on

#define ROUTER_METHOD(method, ...) ROUTER_##method,
#define ROUTER_NAME(method, name, ...) " " name
#define ROUTER_NAMES ROUTER_TABLE(ROUTER_NAME) // each with a space before it

typedef enum { ROUTER_TABLE(ROUTER_METHOD) ROUTER_COUNT } RouterMethod;

typedef struct {
    const char *name;
    int has_experts;              // 0: one feed-forward layer for all tokens
    int has_weights;              // W [E, d]
    int has_softmax;              // the logits become softmax(z)
    RouterLossWeight loss_weight; // of `reg` in the loss
    RouterMethod for_one_token;   // how a token without a batch around it is routed (sampling)
    int k_warms_up;               // the first steps may be nearly dense
    int leaves_number_open;       // a token may have up to E experts; else k of them, on average at most
    int gradient_is_sparse;       // only the logits of active pairs have one
} RouterRow;

#define ROUTER_ROW(method, name, experts, weights, softmax, weight, one, warms, open, sparse)                \
    {name, experts, weights, softmax, WEIGHS_##weight, ROUTER_##one, warms, open, sparse},

static inline const RouterRow *router_row(RouterMethod method) {
    static const RouterRow rows[] = {ROUTER_TABLE(ROUTER_ROW)};
    return &rows[method];
}

typedef struct {
    RouterMethod method;
    int experts;      // E_tot = E G
    int active;       // k_tot = k G (for topk: the k in force)
    int load_balance; // f_le (1) or 1 (0) for relu; auxiliary loss (1) or none (0) for topk
} Router;

static inline const char *router_name(RouterMethod method) {
    return router_row(method)->name;
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

static inline int router_has_experts(RouterMethod method) {
    return router_row(method)->has_experts;
}

static inline int router_has_weights(RouterMethod method) {
    return router_row(method)->has_weights;
}

// is its loss weighed by lambda, which then steers the sparsity (lambda.h)?
static inline int router_has_lambda(RouterMethod method) {
    return router_row(method)->loss_weight == WEIGHS_LAMBDA;
}

// weight of `reg` in the loss (Eq. 6)
static inline double router_loss_weight(RouterMethod method, double lambda, double aux_coeff) {
    RouterLossWeight weight = router_row(method)->loss_weight;
    return weight == WEIGHS_LAMBDA ? lambda : weight == WEIGHS_AUX_COEFF ? aux_coeff : 0.0;
}

// logits [N, E] (becomes the softmax for topk and ec), ids [N], forced [N, E] or NULL
static inline void router_forward(PairList *pairs, float *logits, const int *ids, const float *forced,
                                  Router router, int64_t N) {
    int E = router.experts;
    if (router_row(router.method)->has_softmax) {
        router_softmax(logits, N, E);
    }
    if (forced != NULL && router_has_weights(router.method)) {
        pairs_from_mask(pairs, logits, forced, N, E);
    } else {
        switch (router.method) {
        case ROUTER_RELU: router_relu_forward(pairs, logits, N, E); break;
        case ROUTER_TOPK: router_topk_forward(pairs, logits, N, E, router.active); break;
        case ROUTER_EC: router_ec_forward(pairs, logits, N, E, router.active); break;
        case ROUTER_HASH: router_hash_forward(pairs, ids, N, E, router.active); break;
        default: router_dense_forward(pairs, N); break;
        }
    }
}

// one layer's term of `reg`; counts [E], tokens: tokens per expert, and in all, of the global micro-batch
static inline double router_loss(const PairList *pairs, const float *logits, const int64_t *counts,
                                 int64_t tokens, Router router, int layers) {
    int E = router.experts, k = router.active;
    switch (router.method) {
    case ROUTER_RELU: return router_relu_loss(pairs, counts, tokens, E, k, router.load_balance) / layers;
    case ROUTER_TOPK:
        return router.load_balance ? router_topk_loss(logits, counts, pairs->tokens, tokens, E, k) : 0.0;
    default: return 0.0;
    }
}

// dlogits [N, E] overwritten; weight: router_loss_weight() over the number of micro-batches
static inline void router_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                   const float *logits, const int64_t *counts, int64_t tokens, Router router,
                                   int layers, double weight) {
    int E = router.experts, k = router.active, balance = router.load_balance;
    switch (router.method) {
    case ROUTER_RELU:
        router_relu_backward(dlogits, dgate, pairs, counts, tokens, E, k, balance, weight / layers);
        break;
    case ROUTER_TOPK:
        router_topk_backward(dlogits, dgate, pairs, logits, counts, tokens, E, k, balance ? weight : 0.0);
        break;
    case ROUTER_EC: router_ec_backward(dlogits, dgate, pairs, logits, E); break;
    default: break;
    }
}

#endif
