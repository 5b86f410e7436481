/*
Routing, whichever the method: the one place that knows them all.

    logits [N, E] -> router_forward -> pair list;   counts of the global micro-batch -> router_loss
    gates' gradient [P] -> router_backward -> logits' gradient [N, E]

    method       gate                         extra loss `reg`                                  its weight
    relu         relu(z_e)                    (1/L) sum_l sum_e f_le mean_t R_te (Eq. 9, 10)    lambda
    topk         softmax(z)_e of the k best   sum_l sum_e f_le mean_t softmax(z)_te             aux_coeff
    auxfree      sigmoid(z_e) over their sum, 0
                 of the k best with a bias
    sparsemixer  M p_e of k draws from p      topk's                                            aux_coeff
    lory         1; experts merged by         0
                 segments' softmax(z)
    ec           softmax(z)_te, experts pick  0
    hash         1, by token id               0
    dense        1, one expert                0                (each in router_METHOD.h, dense beside hash)

The logits are W x (a matmul of the caller); for topk and ec they become the softmax in place, for auxfree
the sigmoid, for lory the weights that the token's experts are merged with. hash and dense have none (NULL).
A `forced` active set [N, E] (entries != 0) replaces the method's own: two implementations, or two
precisions, can then be compared without a pair near the threshold flipping. A forced gate keeps its own
value, z for relu. sparsemixer's forced set says which draws were made, and in which order. lory has no
active set to force.

A new method is its header router_METHOD.h, and here a row of the table and a case in each of the three
switches; on the GPU the same again (router_METHOD.cuh, router.cuh).
*/
#ifndef ROUTER_H
#define ROUTER_H

#include "llmc/router_auxfree.h"
#include "llmc/router_ec.h"
#include "llmc/router_hash.h"
#include "llmc/router_lory.h"
#include "llmc/router_relu.h"
#include "llmc/router_sparsemixer.h"
#include "llmc/router_topk.h"
// defines: router_METHOD_forward, _loss, _backward; PairList

typedef enum { WEIGHS_NOTHING, WEIGHS_LAMBDA, WEIGHS_AUX_COEFF } RouterLossWeight;
typedef enum { SCORES_LOGITS, SCORES_SOFTMAX, SCORES_SIGMOID } RouterScores;

// clang-format off
#define ROUTER_TABLE(ROW)                                                                                    \
    /*                             has     has     has  logits   its loss  a token      k warms number  gradient\
      method       name           experts weights bias become  is weighed alone is     up      is open sparse */\
    ROW(RELU,        "relu",        1,     1,      0,   LOGITS,  LAMBDA,    RELU,        0,      1,      1)  \
    ROW(TOPK,        "topk",        1,     1,      0,   SOFTMAX, AUX_COEFF, TOPK,        1,      0,      0)  \
    ROW(AUXFREE,     "auxfree",     1,     1,      1,   SIGMOID, NOTHING,   AUXFREE,     0,      0,      1)  \
    ROW(SPARSEMIXER, "sparsemixer", 1,     1,      0,   LOGITS,  AUX_COEFF, SPARSEMIXER, 0,      0,      0)  \
    ROW(LORY,        "lory",        1,     1,      0,   LOGITS,  NOTHING,   LORY,        0,      0,      0)  \
    ROW(EC,          "ec",          1,     1,      0,   SOFTMAX, NOTHING,   TOPK,        0,      0,      0)  \
    ROW(HASH,        "hash",        1,     0,      0,   LOGITS,  NOTHING,   HASH,        0,      0,      0)  \
    ROW(DENSE,       "dense",       0,     0,      0,   LOGITS,  NOTHING,   DENSE,       0,      0,      0)
// clang-format on

#define ROUTER_METHOD(method, ...) ROUTER_##method,
#define ROUTER_NAME(method, name, ...) " " name
#define ROUTER_NAMES ROUTER_TABLE(ROUTER_NAME) // each with a space before it

typedef enum { ROUTER_TABLE(ROUTER_METHOD) ROUTER_COUNT } RouterMethod;

typedef struct {
    const char *name;
    int has_experts;              // 0: one feed-forward layer for all tokens
    int has_weights;              // W [E, d]
    int has_bias;                 // b [E], which balances the load
    RouterScores scores;          // what the logits become in place
    RouterLossWeight loss_weight; // of `reg` in the loss
    RouterMethod for_one_token;   // how a token without a batch around it is routed (sampling)
    int k_warms_up;               // the first steps may be nearly dense
    int leaves_number_open;       // a token may have up to E experts; else k of them, on average at most
    int gradient_is_sparse;       // only the logits of active pairs have one
} RouterRow;

#define ROUTER_ROW(method, name, experts, weights, bias, scores, weight, one, warms, open, sparse)           \
    {name, experts, weights, bias, SCORES_##scores, WEIGHS_##weight, ROUTER_##one, warms, open, sparse},

static inline const RouterRow *router_row(RouterMethod method) {
    static const RouterRow rows[] = {ROUTER_TABLE(ROUTER_ROW)};
    return &rows[method];
}

typedef struct {
    RouterMethod method;
    int experts;      // E_tot = E G
    int active;       // k_tot = k G (for topk: the k in force)
    int load_balance; // relu: f_le (1) or 1 (0); topk: auxiliary loss or none; auxfree: biases move or not
    double jitter;    // r, sparsemixer's
    int segment;      // S, lory's, at most
} Router;

// what a layer's router is told beside its logits; NULL where its method does not ask for it
typedef struct {
    const int *ids;      // [N] of the tokens
    const float *bias;   // [E]
    const float *forced; // [N, E] an active set, or NULL for the method's own
    RouterDraws draws;
    Segments segments;
} RouterInputs;

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

// does it draw experts by chance, and is its forced set one of draws?
static inline int router_draws(RouterMethod method) {
    return method == ROUTER_SPARSEMIXER;
}

// does it merge a segment's experts into one, which all of its tokens have (merge.h)?
static inline int router_merges(RouterMethod method) {
    return method == ROUTER_LORY;
}

// does it switch experts on and off, token by token?
static inline int router_has_mask(RouterMethod method) {
    return router_has_experts(method) && !router_merges(method);
}

// is there an active set of experts to choose?
static inline int router_can_be_forced(RouterMethod method) {
    return router_has_weights(method) && !router_draws(method) && !router_merges(method);
}

// weight of `reg` in the loss (Eq. 6)
static inline double router_loss_weight(RouterMethod method, double lambda, double aux_coeff) {
    RouterLossWeight weight = router_row(method)->loss_weight;
    return weight == WEIGHS_LAMBDA ? lambda : weight == WEIGHS_AUX_COEFF ? aux_coeff : 0.0;
}

// logits [N, E] become what the table says
static inline void router_forward(PairList *pairs, float *logits, RouterInputs in, Router router, int64_t N) {
    int E = router.experts, k = router.active;
    switch (router_row(router.method)->scores) {
    case SCORES_SOFTMAX: router_softmax(logits, N, E); break;
    case SCORES_SIGMOID: router_auxfree_scores(logits, N, E); break;
    default: break;
    }
    if (in.forced != NULL && router_can_be_forced(router.method)) {
        pairs_from_mask(pairs, logits, in.forced, N, E);
    } else {
        switch (router.method) {
        case ROUTER_RELU: router_relu_forward(pairs, logits, N, E); break;
        case ROUTER_TOPK: router_topk_forward(pairs, logits, N, E, k); break;
        case ROUTER_AUXFREE: router_auxfree_forward(pairs, logits, in.bias, N, E, k); break;
        case ROUTER_SPARSEMIXER:
            router_sparsemixer_forward(pairs, logits, in.draws, in.forced, N, E, k, (float)router.jitter);
            break;
        case ROUTER_LORY: router_lory_forward(pairs, logits, in.segments, E); break;
        case ROUTER_EC: router_ec_forward(pairs, logits, N, E, k); break;
        case ROUTER_HASH: router_hash_forward(pairs, in.ids, N, E, k); break;
        default: router_dense_forward(pairs, N); break;
        }
    }
    if (router.method == ROUTER_AUXFREE) {
        router_auxfree_gates(pairs, logits, E, k);
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
    case ROUTER_SPARSEMIXER:
        return router.load_balance ? router_sparsemixer_loss(logits, counts, pairs->tokens, tokens, E, k)
                                   : 0.0;
    default: return 0.0;
    }
}

// dlogits [N, E] overwritten; dgate: for lory da [C, E]; weight: router_loss_weight() over the number of
// micro-batches
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
    case ROUTER_SPARSEMIXER:
        router_sparsemixer_backward(dlogits, dgate, pairs, logits, counts, tokens, E, k, (float)router.jitter,
                                    balance ? weight : 0.0);
        break;
    case ROUTER_AUXFREE: router_auxfree_backward(dlogits, dgate, pairs, logits, E, k); break;
    case ROUTER_LORY: router_lory_backward(dlogits, dgate, pairs, logits, E); break;
    case ROUTER_EC: router_ec_backward(dlogits, dgate, pairs, logits, E); break;
    default: break;
    }
}

// dense [N, E] picture of what each expert's weight is for each token; logits: what router_forward left
static inline void router_gates(float *gates, const PairList *pairs, const float *logits, Router router) {
    if (router_merges(router.method)) {
        memcpy(gates, logits, (size_t)(pairs->tokens * router.experts) * sizeof(float));
    } else {
        pairs_to_dense(gates, pairs, router.experts);
    }
}

#endif
