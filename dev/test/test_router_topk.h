/*
router_topk.h: the softmax against double (far beyond exp's range too), the choice and its ties, the auxiliary
loss, and the gradient against central differences.
*/
#ifndef TEST_ROUTER_TOPK_H
#define TEST_ROUTER_TOPK_H

#include "llmc/router_topk.h"
#include "harness.h"

enum { TOPK_TOKENS = 23, TOPK_E = 6, TOPK_CELLS = TOPK_TOKENS * TOPK_E };

static void router_topk_reference_softmax(double *s, const double *z, int N, int E) {
    for (int t = 0; t < N; t++) {
        double max = z[t * E], sum = 0.0;
        for (int e = 0; e < E; e++) {
            max = fmax(max, z[t * E + e]);
        }
        for (int e = 0; e < E; e++) {
            sum += exp(z[t * E + e] - max);
        }
        for (int e = 0; e < E; e++) {
            s[t * E + e] = exp(z[t * E + e] - max) / sum;
        }
    }
}

static void test_router_topk_softmax(void) {
    const float scales[] = {1e-3f, 1.0f, 30.0f, 1e4f, 1e30f};
    for (size_t i = 0; i < sizeof(scales) / sizeof(scales[0]); i++) {
        float z[TOPK_CELLS];
        double reference[TOPK_CELLS];
        fill_uniform(z, TOPK_CELLS, 1, scales[i]);
        to_double(reference, z, TOPK_CELLS);
        router_topk_reference_softmax(reference, reference, TOPK_TOKENS, TOPK_E);
        router_softmax(z, TOPK_TOKENS, TOPK_E);
        check_close_to("router_softmax", z, reference, TOPK_CELLS, 3e-7);
    }
}

static void router_topk_check_chosen(const float *score, int E, int k, const char *want) {
    unsigned char chosen[8];
    char got[9] = {0};
    router_topk_choose(chosen, score, E, k);
    for (int e = 0; e < E; e++) {
        got[e] = chosen[e] ? 'x' : '.';
    }
    if (!CHECK(strcmp(got, want) == 0)) {
        printf("    k %d: %s, expected %s\n", k, got, want);
    }
}

static void test_router_topk_choice(void) {
    const float distinct[5] = {0.1f, 0.4f, 0.05f, 0.25f, 0.2f};
    const float ties[5] = {0.1f, 0.3f, 0.1f, 0.3f, 0.2f};
    const float zeros[5] = {0};
    router_topk_check_chosen(distinct, 5, 1, ".x...");
    router_topk_check_chosen(distinct, 5, 3, ".x.xx");
    router_topk_check_chosen(distinct, 5, 5, "xxxxx");
    router_topk_check_chosen(ties, 5, 1, ".x...");
    router_topk_check_chosen(ties, 5, 2, ".x.x.");
    router_topk_check_chosen(ties, 5, 4, "xx.xx");
    router_topk_check_chosen(zeros, 5, 2, "xx..."); // all underflown: still k of them
}

// the gate is the probability itself, and membership does not ask whether it is above 0
static void test_router_topk_pairs(void) {
    float s[8] = {0.0f, -300.0f, -200.0f, -400.0f, 1.0f, 2.0f, 3.0f, 4.0f};
    const int experts[4] = {0, 2, 2, 3};
    PairList pairs = pairs_empty();
    router_softmax(s, 2, 4);
    router_topk_forward(&pairs, s, 2, 4, 2);
    CHECK(pairs.num_pairs == 4 && pairs.row_start[0] == 0 && pairs.row_start[1] == 2 &&
          pairs.row_start[2] == 4);
    CHECK(pairs.expert[0] == experts[0] && pairs.expert[2] == experts[2] && pairs.expert[3] == experts[3]);
    CHECK(pairs.gate[0] == 1.0f && pairs.gate[1] < 2e-35f);
    CHECK(pairs.gate[2] == s[6] && pairs.gate[3] == s[7] && s[6] + s[7] < 0.9f);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// loss and gradient of sum c_te s_te over the active pairs + weight sum_e f_e mean_t s_te; f, choice constant

typedef struct {
    double z[TOPK_CELLS], c[TOPK_CELLS], f[TOPK_E]; // c is 0 where not active
    double weight, global_tokens;
} TopkCase;

static double router_topk_objective(void *context) {
    const TopkCase *x = (const TopkCase *)context;
    double s[TOPK_CELLS], sum = 0.0;
    router_topk_reference_softmax(s, x->z, TOPK_TOKENS, TOPK_E);
    for (int i = 0; i < TOPK_CELLS; i++) {
        sum += s[i] * (x->c[i] + x->weight * x->f[i % TOPK_E] / x->global_tokens);
    }
    return sum;
}

static const int64_t topk_counts[TOPK_E] = {9, 0, 40, 1, 5, 14};

// the tokens are a rank's share of global_tokens
static void router_topk_fill(TopkCase *x, float *z, int64_t global_tokens, int k, double weight) {
    fill_uniform(z, TOPK_CELLS, 5, 2.0f);
    to_double(x->z, z, TOPK_CELLS);
    memset(x->c, 0, sizeof(x->c));
    x->weight = weight;
    x->global_tokens = (double)global_tokens;
    for (int e = 0; e < TOPK_E; e++) {
        x->f[e] = TOPK_E * (double)topk_counts[e] / (k * x->global_tokens);
    }
}

static void router_topk_check_gradient(int64_t global_tokens, int k, double weight) {
    float s[TOPK_CELLS], dgate[TOPK_CELLS], dz[TOPK_CELLS];
    double want[TOPK_CELLS];
    TopkCase x;
    PairList pairs = pairs_empty();
    volatile int experts =
        TOPK_E; // no constant: clang before 17 miscompiles such loops unrolled (llvm #63602)
    int E = experts;
    router_topk_fill(&x, s, global_tokens, k, weight);
    router_softmax(s, TOPK_TOKENS, E);
    router_topk_forward(&pairs, s, TOPK_TOKENS, E, k);
    CHECK(pairs.num_pairs == TOPK_TOKENS * k);
    fill_uniform(dgate, (size_t)pairs.num_pairs, 6, 0.1f);
    for (int64_t p = 0; p < pairs.num_pairs; p++) {
        x.c[p / k * TOPK_E + pairs.expert[p]] = dgate[p];
    }
    central_differences(want, x.z, TOPK_CELLS, router_topk_objective, &x);
    fill_uniform(dz, TOPK_CELLS, 7, 1.0f); // overwritten
    router_topk_backward(dz, dgate, &pairs, s, topk_counts, global_tokens, E, k, weight);
    check_close_to("router_topk dz", dz, want, TOPK_CELLS, 1e-6);
    pairs_free(&pairs);
}

static void test_router_topk_loss(void) {
    float s[TOPK_CELLS];
    TopkCase x;
    router_topk_fill(&x, s, 3 * TOPK_TOKENS, 2, 1.0);
    router_softmax(s, TOPK_TOKENS, TOPK_E);
    double want = router_topk_objective(&x); // c = 0: the loss alone
    double got = router_topk_loss(s, topk_counts, TOPK_TOKENS, 3 * TOPK_TOKENS, TOPK_E, 2);
    CHECK(fabs(got / want - 1.0) < 1e-6);
}

static void test_router_topk_threads(void) {
    enum { N = 501, E = 9, K = 3 };
    static float s[2][N * E], dz[2][N * E];
    PairList pairs[2] = {pairs_empty(), pairs_empty()};
    for (int i = 0; i < 2; i++) {
        use_threads(i + 1);
        fill_uniform(s[i], N * E, 8, 3.0f);
        fill_uniform(dz[i], N * E, 9, 1.0f);
        router_softmax(s[i], N, E);
        router_topk_forward(&pairs[i], s[i], N, E, K);
        router_softmax_backward(dz[i], s[i], N, E);
    }
    CHECK(memcmp(s[0], s[1], sizeof(s[0])) == 0 && memcmp(dz[0], dz[1], sizeof(dz[0])) == 0);
    CHECK(memcmp(pairs[0].expert, pairs[1].expert, N * K * sizeof(int)) == 0);
    CHECK(memcmp(pairs[0].gate, pairs[1].gate, N * K * sizeof(float)) == 0);
    pairs_free(&pairs[0]);
    pairs_free(&pairs[1]);
}

static void test_router_topk(void) {
    test_router_topk_softmax();
    test_router_topk_choice();
    test_router_topk_pairs();
    test_router_topk_loss();
    router_topk_check_gradient(TOPK_TOKENS, 1, 0.01);
    router_topk_check_gradient(3 * TOPK_TOKENS, 2, 5.0);
    router_topk_check_gradient(TOPK_TOKENS, TOPK_E, 0.0); // every expert, no auxiliary loss
    test_router_topk_threads();
}

#endif
