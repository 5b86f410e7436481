/*
router.h: each method reaches its own file with its own weight and normalisation (1/L for relu alone), and a
forced active set replaces the method's.
*/
#ifndef TEST_ROUTER_H
#define TEST_ROUTER_H

#include "llmc/router.h"
#include "harness.h"

enum { ROUTER_TOKENS = 12, ROUTER_E = 4, ROUTER_K = 2, ROUTER_CELLS = ROUTER_TOKENS * ROUTER_E };
enum { ROUTER_SEGMENT = 4 };

typedef struct {
    float logits[ROUTER_CELLS]; // what router_forward left
    float gates[ROUTER_CELLS];
    float dlogits[ROUTER_CELLS];
    double loss;
    PairList pairs;
} RouterRun;

static const float router_bias[ROUTER_E] = {0.3f, -0.2f, 0.0f, 0.1f};

static const uint64_t router_key = 99;

static Segments router_segments(void) {
    return segments_of(1, ROUTER_TOKENS, ROUTER_SEGMENT, NULL);
}

static Router router_of(RouterMethod method, int load_balance) {
    Router router;
    router.method = method;
    router.experts = method == ROUTER_DENSE ? 1 : ROUTER_E;
    router.active = method == ROUTER_DENSE ? 1 : ROUTER_K;
    router.load_balance = load_balance;
    router.jitter = 0.3;
    router.segment = ROUTER_SEGMENT;
    return router;
}

// forward, loss and backward of one layer of `layers`; gates' gradients are all 0.01
static void router_run(RouterRun *run, Router router, const float *forced, int layers, double weight) {
    int ids[ROUTER_TOKENS];
    float dgate[ROUTER_CELLS];
    memset(run, 0, sizeof(*run));
    for (int t = 0; t < ROUTER_TOKENS; t++) {
        ids[t] = 3 * t;
    }
    for (int i = 0; i < ROUTER_CELLS; i++) {
        dgate[i] = 0.01f;
    }
    fill_uniform(run->logits, ROUTER_CELLS, 1, 1.0f);
    RouterInputs in = {ids, router_bias, forced, {&router_key, 0, 1}, router_segments()};
    router_forward(&run->pairs, router.method >= ROUTER_HASH ? NULL : run->logits, in, router, ROUTER_TOKENS);
    router_gates(run->gates, &run->pairs, run->logits, router);
    run->loss = router_loss(&run->pairs, run->logits, run->pairs.counts, ROUTER_TOKENS, router, layers);
    router_backward(run->dlogits, dgate, &run->pairs, run->logits, run->pairs.counts, ROUTER_TOKENS, router,
                    layers, weight);
    pairs_free(&run->pairs);
}

static int router_all_zero(const float *x, int n) {
    int zeros = 0;
    for (int i = 0; i < n; i++) {
        zeros += x[i] == 0.0f;
    }
    return zeros == n;
}

static void test_router_names(void) {
    for (int i = 0; i < ROUTER_COUNT; i++) {
        RouterMethod method = (RouterMethod)i;
        CHECK(router_from_name(router_name(method)) == i);
        CHECK(router_has_weights(method) == (method != ROUTER_HASH && method != ROUTER_DENSE));
        CHECK(router_has_experts(method) == (method != ROUTER_DENSE));
        CHECK(router_has_lambda(method) == (method == ROUTER_RELU));
        CHECK(router_row(method)->for_one_token == (method == ROUTER_EC ? ROUTER_TOPK : method));
    }
    CHECK(router_from_name("relu") == ROUTER_RELU && router_from_name("topk") == ROUTER_TOPK);
    CHECK(router_from_name("ec") == ROUTER_EC && router_from_name("hash") == ROUTER_HASH);
    CHECK(router_from_name("dense") == ROUTER_DENSE && router_from_name("auxfree") == ROUTER_AUXFREE);
    CHECK(router_from_name("sparsemixer") == ROUTER_SPARSEMIXER);
    CHECK(router_from_name("lory") == ROUTER_LORY && router_merges(ROUTER_LORY) && !router_merges(ROUTER_EC));
    CHECK(router_loss_weight(ROUTER_RELU, 3.0, 0.5) == 3.0 &&
          router_loss_weight(ROUTER_TOPK, 3.0, 0.5) == 0.5);
    CHECK(router_loss_weight(ROUTER_EC, 3.0, 0.5) == 0.0 && router_loss_weight(ROUTER_HASH, 3.0, 0.5) == 0.0);
    CHECK(router_from_name("ReLU") == -1 && router_from_name("") == -1 && router_from_name("rel") == -1);
}

static void test_router_relu_switch(void) {
    RouterRun run, many, plain;
    router_run(&run, router_of(ROUTER_RELU, 1), NULL, 1, 0.5);
    router_run(&many, router_of(ROUTER_RELU, 1), NULL, 3, 1.5); // loss a third of it, gradient the same
    router_run(&plain, router_of(ROUTER_RELU, 0), NULL, 1, 0.5);
    double sum = 0.0;
    for (int i = 0; i < ROUTER_CELLS; i++) {
        sum += run.gates[i];
        CHECK(run.gates[i] == (run.logits[i] > 0.0f ? run.logits[i] : 0.0f));
        CHECK(fabs(plain.dlogits[i] - (run.logits[i] > 0.0f ? 0.01 + 0.5 / ROUTER_TOKENS : 0.0)) < 1e-8);
    }
    CHECK(fabs(plain.loss - sum / ROUTER_TOKENS) < 1e-12);
    CHECK(fabs(run.loss - plain.loss) > 1e-3); // the load does weigh
    CHECK(many.loss == run.loss / 3);
    check_close("relu dlogits of 3 layers", many.dlogits, run.dlogits, ROUTER_CELLS, 1e-7);
}

static void test_router_topk_switch(void) {
    RouterRun run, many, plain;
    router_run(&run, router_of(ROUTER_TOPK, 1), NULL, 1, 0.5);
    router_run(&many, router_of(ROUTER_TOPK, 1), NULL, 3, 0.5); // no 1/L
    router_run(&plain, router_of(ROUTER_TOPK, 0), NULL, 1, 0.5);
    for (int t = 0; t < ROUTER_TOKENS; t++) {
        double sum = 0.0;
        int active = 0;
        for (int e = 0; e < ROUTER_E; e++) {
            sum += run.logits[t * ROUTER_E + e]; // the softmax by now
            active += run.gates[t * ROUTER_E + e] != 0.0f;
        }
        CHECK(fabs(sum - 1.0) < 1e-6 && active == ROUTER_K);
    }
    CHECK(many.loss == run.loss && memcmp(many.dlogits, run.dlogits, sizeof(run.dlogits)) == 0);
    CHECK(run.loss > 0.9 && plain.loss == 0.0); // about 1 when the load is even
    CHECK(relative_error(plain.dlogits, run.dlogits, ROUTER_CELLS) > 1e-2);
}

// the bias moves the choice, not the gates, which are shares; no loss, and one more expert is one more gate
static void test_router_auxfree_switch(void) {
    RouterRun run, forced;
    float all[ROUTER_CELLS];
    router_run(&run, router_of(ROUTER_AUXFREE, 1), NULL, 2, 0.5);
    CHECK(run.loss == 0.0);
    for (int t = 0; t < ROUTER_TOKENS; t++) {
        const float *gates = run.gates + t * ROUTER_E, *s = run.logits + t * ROUTER_E;
        float sum = 0.0f, least = 2.0f, most = 0.0f;
        for (int e = 0; e < ROUTER_E; e++) {
            sum += gates[e];
            least = gates[e] != 0.0f ? fminf(least, s[e] + router_bias[e]) : least;
            most = gates[e] == 0.0f ? fmaxf(most, s[e] + router_bias[e]) : most;
        }
        CHECK(fabsf(sum - 1.0f) < 1e-6f && least >= most);
    }
    for (int i = 0; i < ROUTER_CELLS; i++) {
        all[i] = 1.0f;
    }
    router_run(&forced, router_of(ROUTER_AUXFREE, 1), all, 2, 0.5);
    for (int t = 0; t < ROUTER_TOKENS; t++) {
        const float *s = forced.logits + t * ROUTER_E;
        CHECK(fabsf(forced.gates[t * ROUTER_E] - s[0] / (s[0] + s[1] + s[2] + s[3])) < 1e-6f);
    }
}

// every expert has a weight, a segment's tokens have the same, and nothing replaces them
static void test_router_lory_switch(void) {
    RouterRun run, forced;
    float all[ROUTER_CELLS] = {0};
    router_run(&run, router_of(ROUTER_LORY, 1), NULL, 2, 0.5);
    router_run(&forced, router_of(ROUTER_LORY, 1), all, 2, 0.5);
    CHECK(run.loss == 0.0 && memcmp(run.gates, forced.gates, sizeof(run.gates)) == 0);
    CHECK(memcmp(run.gates, run.logits, sizeof(run.gates)) == 0);
    for (int t = 0; t < ROUTER_TOKENS; t++) {
        const float *gates = run.gates + t * ROUTER_E;
        CHECK(fabsf(gates[0] + gates[1] + gates[2] + gates[3] - 1.0f) < 1e-6f);
        CHECK(memcmp(gates, run.gates + t / ROUTER_SEGMENT * ROUTER_SEGMENT * ROUTER_E,
                     ROUTER_E * sizeof(float)) == 0);
    }
    int last = (ROUTER_TOKENS - ROUTER_SEGMENT) * ROUTER_E;
    CHECK(
        router_all_zero(run.dlogits + last, ROUTER_CELLS - last)); // nobody's weights are the last segment's
}

static void test_router_others(void) {
    RouterRun run;
    router_run(&run, router_of(ROUTER_EC, 1), NULL, 2, 0.5);
    CHECK(run.loss == 0.0 && !router_all_zero(run.dlogits, ROUTER_CELLS));
    for (int e = 0; e < ROUTER_E; e++) {
        int load = 0;
        for (int t = 0; t < ROUTER_TOKENS; t++) {
            load += run.gates[t * ROUTER_E + e] != 0.0f;
        }
        CHECK(load == ROUTER_TOKENS * ROUTER_K / ROUTER_E);
    }
    router_run(&run, router_of(ROUTER_HASH, 1), NULL, 2, 0.5);
    CHECK(run.loss == 0.0 && router_all_zero(run.dlogits, ROUTER_CELLS));
    CHECK(run.gates[0] == 1.0f && run.gates[1] == 1.0f && run.gates[2] == 0.0f); // id 0: experts 0, 1
    CHECK(run.gates[4] == 0.0f && run.gates[6] == 1.0f && run.gates[7] == 1.0f); // id 3: experts 2, 3
    router_run(&run, router_of(ROUTER_DENSE, 1), NULL, 2, 0.5);
    CHECK(run.loss == 0.0 && run.gates[0] == 1.0f && run.gates[ROUTER_TOKENS - 1] == 1.0f);
}

// the set is the forced one, the values are the method's own: z itself for relu, negative ones too
static void test_router_forced(void) {
    const RouterMethod methods[] = {ROUTER_RELU, ROUTER_TOPK, ROUTER_EC};
    float forced[ROUTER_CELLS], logits[ROUTER_CELLS];
    fill_uniform(logits, ROUTER_CELLS, 1, 1.0f);
    fill_uniform(forced, ROUTER_CELLS, 2, 1.0f);
    for (int i = 0; i < ROUTER_CELLS; i++) {
        forced[i] = forced[i] > 0.3f || i == 0 ? -forced[i] : 0.0f;
    }
    for (int m = 0; m < 3; m++) {
        RouterRun run;
        int wrong = 0, negative = 0;
        router_run(&run, router_of(methods[m], 1), forced, 1, 0.5);
        for (int i = 0; i < ROUTER_CELLS; i++) {
            wrong += run.gates[i] != (forced[i] != 0.0f ? run.logits[i] : 0.0f);
            wrong += methods[m] == ROUTER_RELU && run.logits[i] != logits[i];
            wrong += methods[m] == ROUTER_RELU && (run.dlogits[i] != 0.0f) != (forced[i] != 0.0f);
            negative += run.gates[i] < 0.0f;
        }
        CHECK(wrong == 0 && (negative > 0) == (methods[m] == ROUTER_RELU));
    }
    RouterRun hash;
    router_run(&hash, router_of(ROUTER_HASH, 1), forced, 1, 0.5);
    CHECK(hash.gates[0] == 1.0f && hash.gates[1] == 1.0f); // hash has no choice to replace
}

// one logit of one token that is no number: whatever the method, some gate is none either, so that the loss
// shows it
static void test_router_not_a_number(void) {
    const RouterMethod methods[] = {ROUTER_RELU, ROUTER_TOPK, ROUTER_AUXFREE, ROUTER_SPARSEMIXER, ROUTER_EC};
    for (int m = 0; m < 5; m++) {
        float logits[ROUTER_CELLS];
        int broken = 0;
        PairList pairs = pairs_empty();
        fill_uniform(logits, ROUTER_CELLS, 1, 1.0f);
        logits[7 * ROUTER_E + 2] = NAN;
        RouterInputs in = {NULL, router_bias, NULL, {&router_key, 0, 1}, router_segments()};
        router_forward(&pairs, logits, in, router_of(methods[m], 1), ROUTER_TOKENS);
        for (int64_t p = pairs.row_start[7]; p < pairs.row_start[8]; p++) {
            broken += isnan(pairs.gate[p]);
        }
        CHECK(broken > 0);
        pairs_free(&pairs);
    }
}

static void test_router(void) {
    test_router_not_a_number();
    test_router_names();
    test_router_relu_switch();
    test_router_topk_switch();
    test_router_auxfree_switch();
    test_router_lory_switch();
    test_router_others();
    test_router_forced();
}

#endif
