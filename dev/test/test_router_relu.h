/*
router_relu.h: who is active, Eq. 9-11 on a case worked by hand and against double, and the gradient of gates
and regulariser against central differences.
*/
#ifndef TEST_ROUTER_RELU_H
#define TEST_ROUTER_RELU_H

#include "llmc/router_relu.h"
#include "harness.h"

static void test_router_relu_active(void) {
    enum { N = 4, E = 3 };
    const float z[N * E] = {0.0f, -0.0f, 1e-45f, -1.0f, -FLT_MAX, -1e-45f,
                            3.0f, 2.0f,  1.0f,   1e30f, -1.0f,    0.5f};
    const int experts[] = {2, 0, 1, 2, 0, 2};
    const float gates[] = {1e-45f, 3.0f, 2.0f, 1.0f, 1e30f, 0.5f};
    const int64_t starts[] = {0, 1, 1, 4, 6};
    PairList pairs = pairs_empty();
    router_relu_forward(&pairs, z, N, E);
    CHECK(pairs.tokens == N && pairs.num_pairs == 6);
    CHECK(memcmp(pairs.row_start, starts, sizeof(starts)) == 0);
    CHECK(memcmp(pairs.expert, experts, sizeof(experts)) == 0);
    CHECK(memcmp(pairs.gate, gates, sizeof(gates)) == 0);
    router_relu_forward(&pairs, z, 1, 2); // a token without experts
    CHECK(pairs.tokens == 1 && pairs.num_pairs == 0 && pairs.row_start[1] == 0);
    pairs_free(&pairs);
}

// what is not finite is never "off": it must reach the loss
static void test_router_relu_not_finite(void) {
    const float z[4] = {-1.0f, NAN, INFINITY, -INFINITY};
    PairList pairs = pairs_empty();
    router_relu_forward(&pairs, z, 1, 4);
    CHECK(pairs.num_pairs == 3 && pairs.expert[0] == 1 && isnan(pairs.gate[0]));
    CHECK(isinf(pairs.gate[1]) && isinf(pairs.gate[2]) &&
          !isfinite(router_relu_loss(&pairs, pairs.counts, 1, 4, 1, 0)));
    pairs_free(&pairs);
}

// N = 2, E = 4, k = 2: f_e = 4 n_e / (2 * 2) = n_e
static void test_router_relu_loss_by_hand(void) {
    const float z[8] = {1.0f, 0.5f, -1.0f, -1.0f, 2.0f, -3.0f, 0.25f, -1.0f};
    PairList pairs = pairs_empty();
    router_relu_forward(&pairs, z, 2, 4);
    const int64_t *counts = pairs.counts;
    CHECK(router_relu_load(counts, 0, 2, 4, 2, 1) == 2.0 && router_relu_load(counts, 3, 2, 4, 2, 1) == 0.0);
    CHECK(router_relu_load(counts, 3, 2, 4, 2, 0) == 1.0);
    CHECK(router_relu_loss(&pairs, counts, 2, 4, 2, 1) == (2 * 3.0 + 1 * 0.5 + 1 * 0.25) / 2);
    CHECK(router_relu_loss(&pairs, counts, 2, 4, 2, 0) == (3.0 + 0.5 + 0.25) / 2);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// gradient: of sum_te c_te R_te + weight sum_e f_e mean_t R_te, f held constant

enum { RELU_TOKENS = 13, RELU_E = 5, RELU_CELLS = RELU_TOKENS * RELU_E };

typedef struct {
    double z[RELU_CELLS], c[RELU_CELLS], f[RELU_E];
    double weight, global_tokens;
} ReluCase;

static double router_relu_objective(void *context) {
    const ReluCase *s = (const ReluCase *)context;
    double sum = 0.0;
    for (int i = 0; i < RELU_CELLS; i++) {
        double gate = s->z[i] > 0.0 ? s->z[i] : 0.0;
        sum += gate * (s->c[i] + s->weight * s->f[i % RELU_E] / s->global_tokens);
    }
    return sum;
}

// these tokens are one rank's share of `global_tokens`; counts are of all
static void router_relu_check_gradient(int64_t global_tokens, int k, int load_balance, double weight) {
    const int64_t counts[RELU_E] = {9, 0, 20, 1, 5};
    float z[RELU_CELLS], c[RELU_CELLS], dgate[RELU_CELLS], dz[RELU_CELLS];
    double want[RELU_CELLS];
    ReluCase s;
    PairList pairs = pairs_empty();
    fill_uniform(z, RELU_CELLS, 1, 1.0f);
    fill_uniform(c, RELU_CELLS, 2, 0.01f);
    fill_uniform(dz, RELU_CELLS, 3, 1.0f); // overwritten
    to_double(s.z, z, RELU_CELLS);
    to_double(s.c, c, RELU_CELLS);
    s.weight = weight;
    s.global_tokens = (double)global_tokens;
    for (int e = 0; e < RELU_E; e++) { // Eq. 11
        s.f[e] = load_balance ? RELU_E * (double)counts[e] / (k * s.global_tokens) : 1.0;
    }
    central_differences(want, s.z, RELU_CELLS, router_relu_objective, &s);
    router_relu_forward(&pairs, z, RELU_TOKENS, RELU_E);
    for (int64_t t = 0, p = 0; t < RELU_TOKENS; t++) {
        for (; p < pairs.row_start[t + 1]; p++) {
            dgate[p] = c[t * RELU_E + pairs.expert[p]];
        }
    }
    router_relu_backward(dz, dgate, &pairs, counts, global_tokens, RELU_E, k, load_balance, weight);
    check_close_to("router_relu dz", dz, want, RELU_CELLS, 1e-7);
    pairs_free(&pairs);
}

static void test_router_relu(void) {
    test_router_relu_active();
    test_router_relu_not_finite();
    test_router_relu_loss_by_hand();
    router_relu_check_gradient(RELU_TOKENS, 1, 1, 0.3);
    router_relu_check_gradient(RELU_TOKENS, 2, 0, 0.3);
    router_relu_check_gradient(3 * RELU_TOKENS, 2, 1, 1e-3);
    router_relu_check_gradient(RELU_TOKENS, 1, 1, 0.0);
}

#endif
