/*
router_auxfree.h: scores against double, cases worked by hand (the choice by bias and its ties, gates, a step
of the bias), what is not finite, the gradient against central differences, and a load that evens out.
*/
#ifndef TEST_ROUTER_AUXFREE_H
#define TEST_ROUTER_AUXFREE_H

#include "llmc/router_auxfree.h"
#include "harness.h"

enum { AUXFREE_TOKENS = 19, AUXFREE_E = 6, AUXFREE_CELLS = AUXFREE_TOKENS * AUXFREE_E };

static void test_router_auxfree_scores(void) {
    float z[AUXFREE_CELLS];
    double want[AUXFREE_CELLS];
    fill_uniform(z, AUXFREE_CELLS, 1, 20.0f);
    for (int i = 0; i < AUXFREE_CELLS; i++) {
        want[i] = 1.0 / (1.0 + exp(-(double)z[i]));
    }
    router_auxfree_scores(z, AUXFREE_TOKENS, AUXFREE_E);
    check_close_to("router_auxfree_scores", z, want, AUXFREE_CELLS, 3e-7);
    CHECK(router_auxfree_score(-1e30f) > 0.0f && router_auxfree_score(1e30f) == 1.0f);
    CHECK(isnan(router_auxfree_score(NAN)) && isnan(router_auxfree_score(INFINITY)) &&
          isnan(router_auxfree_score(-INFINITY)));
}

static void router_auxfree_check_chosen(const float *s, const float *bias, int k, const char *want) {
    PairList pairs = pairs_empty();
    char got[5] = "....";
    router_auxfree_forward(&pairs, s, bias, 1, 4, k);
    for (int64_t p = 0; p < pairs.num_pairs; p++) {
        got[pairs.expert[p]] = 'x';
        CHECK(isnan(s[pairs.expert[p]]) || pairs.gate[p] == s[pairs.expert[p]]); // without the bias
    }
    if (!CHECK(strcmp(got, want) == 0)) {
        printf("    k %d: %s, expected %s\n", k, got, want);
    }
    pairs_free(&pairs);
}

static void test_router_auxfree_choice(void) {
    const float s[4] = {0.5f, 0.75f, 0.25f, 0.5f}, broken[4] = {0.5f, 0.75f, NAN, 0.5f};
    const float none[4] = {0}, some[4] = {0.0f, -0.5f, 0.25f, 0.125f},
                below[4] = {-2.0f, -2.0f, -1.0f, -3.0f};
    router_auxfree_check_chosen(s, none, 1, ".x..");
    router_auxfree_check_chosen(s, none, 2, "xx.."); // a tie: the lower index
    router_auxfree_check_chosen(s, some, 1, "...x"); // 0.5, 0.25, 0.5, 0.625
    router_auxfree_check_chosen(s, some, 2, "x..x");
    router_auxfree_check_chosen(s, some, 3, "x.xx");
    router_auxfree_check_chosen(s, some, 4, "xxxx");
    router_auxfree_check_chosen(s, below, 2, ".xx."); // all sums below 0
    router_auxfree_check_chosen(broken, some, 1, "..x.");
}

// k = 2: 1/4 and 1/2 are 1/3 and 2/3; k = 1: the score itself; a forced token may have none
static void test_router_auxfree_gates(void) {
    const float s[12] = {0.25f, 0.5f, 0.125f, 0, 0.5f, 0.5f, 0.25f, 0, 0.5f, 0.5f, 0.25f, 0};
    const float forced[12] = {1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0};
    const float dgate[5] = {3.0f, 6.0f, 1.0f, 1.0f, 1.0f};
    float dz[12];
    PairList pairs = pairs_empty();
    pairs_from_mask(&pairs, s, forced, 3, 4);
    router_auxfree_gates(&pairs, s, 4, 2);
    CHECK(pairs.num_pairs == 5 && pairs.gate[0] == 0.25f / 0.75f && pairs.gate[1] == 0.5f / 0.75f);
    CHECK(pairs.gate[2] == 0.4f && pairs.gate[3] == 0.4f && pairs.gate[4] == 0.2f);
    router_auxfree_backward(dz, dgate, &pairs, s, 4, 2); // sum_j dg_j g_j = 5: ds = -2 / 0.75, 1 / 0.75
    CHECK(fabsf(dz[0] + 2.0f / 0.75f * 0.25f * 0.75f) < 1e-6f && fabsf(dz[1] - 1.0f / 0.75f * 0.25f) < 1e-6f);
    CHECK(dz[2] == 0.0f && fabsf(dz[4]) < 1e-7f && dz[8] == 0.0f); // equal gradients: no share gains
    pairs_from_mask(&pairs, s, forced, 3, 4);
    router_auxfree_gates(&pairs, s, 4, 1);
    CHECK(pairs.gate[0] == 0.25f && pairs.gate[1] == 0.5f && pairs.gate[4] == 0.25f);
    router_auxfree_backward(dz, dgate, &pairs, s, 4, 1);
    CHECK(dz[0] == 3.0f * 0.25f * 0.75f && dz[1] == 6.0f * 0.25f && dz[4] == 0.25f);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// gradient of sum c_te g_te over the active pairs, the choice held constant

typedef struct {
    double z[AUXFREE_CELLS], c[AUXFREE_CELLS];
    unsigned char active[AUXFREE_CELLS];
    int k;
} AuxfreeCase;

static double router_auxfree_objective(void *context) {
    const AuxfreeCase *x = (const AuxfreeCase *)context;
    double total = 0.0;
    for (int t = 0; t < AUXFREE_TOKENS; t++) {
        double sum = 0.0, weighted = 0.0;
        for (int i = t * AUXFREE_E; i < (t + 1) * AUXFREE_E; i++) {
            double s = x->active[i] ? 1.0 / (1.0 + exp(-x->z[i])) : 0.0;
            sum += s;
            weighted += x->c[i] * s;
        }
        total += x->k == 1 ? weighted : weighted / sum;
    }
    return total;
}

static void router_auxfree_check_gradient(int k) {
    const float bias[AUXFREE_E] = {0.2f, -0.3f, 0.0f, 0.1f, -0.1f, 0.05f};
    float s[AUXFREE_CELLS], dgate[AUXFREE_CELLS], dz[AUXFREE_CELLS];
    double want[AUXFREE_CELLS];
    AuxfreeCase x;
    PairList pairs = pairs_empty();
    volatile int experts = AUXFREE_E; // no constant: see test_router_topk.h
    int E = experts;
    memset(&x, 0, sizeof(x));
    x.k = k;
    fill_uniform(s, AUXFREE_CELLS, 5, 2.0f);
    to_double(x.z, s, AUXFREE_CELLS);
    router_auxfree_scores(s, AUXFREE_TOKENS, E);
    router_auxfree_forward(&pairs, s, bias, AUXFREE_TOKENS, E, k);
    router_auxfree_gates(&pairs, s, E, k);
    CHECK(pairs.num_pairs == AUXFREE_TOKENS * k);
    fill_uniform(dgate, (size_t)pairs.num_pairs, 6, 0.1f);
    for (int64_t p = 0; p < pairs.num_pairs; p++) {
        int64_t i = p / k * AUXFREE_E + pairs.expert[p];
        x.active[i] = 1;
        x.c[i] = dgate[p];
    }
    central_differences(want, x.z, AUXFREE_CELLS, router_auxfree_objective, &x);
    fill_uniform(dz, AUXFREE_CELLS, 7, 1.0f); // overwritten
    router_auxfree_backward(dz, dgate, &pairs, s, E, k);
    check_close_to("router_auxfree dz", dz, want, AUXFREE_CELLS, 1e-6);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// the bias

static void test_router_auxfree_step(void) {
    const int64_t counts[4] = {9, 0, 3, 3}, odd[4] = {4, 4, 4, 3};
    float bias[4] = {0.0f, 0.5f, 0.25f, -0.25f};
    router_auxfree_balance(bias, counts, 4, 0.125f); // mean 3.75
    CHECK(bias[0] == -0.125f && bias[1] == 0.625f && bias[2] == 0.375f && bias[3] == -0.125f);
    router_auxfree_balance(bias, odd, 4, 0.125f); // mean 3.75 too
    CHECK(bias[0] == -0.25f && bias[1] == 0.5f && bias[2] == 0.25f && bias[3] == 0.0f);
    const int64_t even[4] = {7, 7, 7, 7};
    router_auxfree_balance(bias, even, 4, 0.125f);
    CHECK(bias[0] == -0.25f && bias[3] == 0.0f);
}

// a router that prefers expert 0 and avoids the last: after some steps each has its share
static void test_router_auxfree_evens_out(void) {
    enum { N = 300, E = 6, K = 2 };
    static float z[N * E], s[N * E];
    float bias[E] = {0};
    PairList pairs = pairs_empty();
    int64_t first = 0, most = 0;
    fill_uniform(z, N * E, 3, 1.0f);
    for (int step = 0; step < 400; step++) {
        for (int i = 0; i < N * E; i++) {
            s[i] = z[i] + 1.0f - 0.4f * (float)(i % E);
        }
        router_auxfree_scores(s, N, E);
        router_auxfree_forward(&pairs, s, bias, N, E, K);
        most = 0;
        for (int e = 0; e < E; e++) {
            most = pairs.counts[e] > most ? pairs.counts[e] : most;
        }
        first = step == 0 ? most : first;
        router_auxfree_balance(bias, pairs.counts, E, 2e-3f);
    }
    CHECK((double)first * E / (N * K) > 2.0 && (double)most * E / (N * K) < 1.05);
    pairs_free(&pairs);
}

static void test_router_auxfree(void) {
    test_router_auxfree_scores();
    test_router_auxfree_choice();
    test_router_auxfree_gates();
    test_router_auxfree_step();
    test_router_auxfree_evens_out();
    router_auxfree_check_gradient(1);
    router_auxfree_check_gradient(2);
    router_auxfree_check_gradient(AUXFREE_E);
}

#endif
