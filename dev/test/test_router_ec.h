/*
router_ec.h: every expert's load, its choice against a search without sorting (ties included), and the
gradient against central differences.
*/
#ifndef TEST_ROUTER_EC_H
#define TEST_ROUTER_EC_H

#include "llmc/router_ec.h"
#include "harness.h"

enum { EC_MOST_CELLS = 400 };

// is token t among the C best of expert e? It is if fewer than C tokens are better, or equal and lower
static int router_ec_is_chosen(const float *s, int t, int e, int N, int E, int C) {
    int before = 0;
    for (int other = 0; other < N; other++) {
        float mine = s[t * E + e], theirs = s[other * E + e];
        before += theirs > mine || (theirs == mine && other < t);
    }
    return before < C;
}

// steps: how many different scores there are (few: many ties)
static void router_ec_check_choice(int N, int E, int k, int steps, int64_t want_load) {
    float s[EC_MOST_CELLS], picture[EC_MOST_CELLS];
    int64_t wrong = 0;
    PairList pairs = pairs_empty();
    fill_uniform(s, (size_t)(N * E), 1, 1.0f);
    for (int i = 0; i < N * E; i++) {
        s[i] = (1.0f + floorf(0.5f * (s[i] + 1.0f) * (float)steps)) / (float)steps;
    }
    router_ec_forward(&pairs, s, N, E, k);
    pairs_to_dense(picture, &pairs, E);
    for (int i = 0; i < N * E; i++) {
        wrong += picture[i] != (router_ec_is_chosen(s, i / E, i % E, N, E, (int)want_load) ? s[i] : 0.0f);
    }
    for (int e = 0; e < E; e++) {
        wrong += pairs.counts[e] != want_load;
    }
    if (!CHECK(wrong == 0)) {
        printf("    N %d, E %d, k %d, %d scores\n", N, E, k, steps);
    }
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// gradient: of sum c_te softmax(z)_te over the active pairs, the choice held constant

enum { EC_TOKENS = 17, EC_E = 4, EC_CELLS = EC_TOKENS * EC_E };

typedef struct {
    double z[EC_CELLS], c[EC_CELLS];
} EcCase;

static double router_ec_objective(void *context) {
    const EcCase *x = (const EcCase *)context;
    double total = 0.0;
    for (int t = 0; t < EC_TOKENS; t++) {
        double sum = 0.0, weighted = 0.0;
        for (int e = 0; e < EC_E; e++) {
            sum += exp(x->z[t * EC_E + e]);
            weighted += x->c[t * EC_E + e] * exp(x->z[t * EC_E + e]);
        }
        total += weighted / sum;
    }
    return total;
}

static void test_router_ec_gradient(void) {
    float s[EC_CELLS], dgate[EC_CELLS], dz[EC_CELLS];
    double want[EC_CELLS];
    EcCase x;
    PairList pairs = pairs_empty();
    memset(&x, 0, sizeof(x));
    fill_uniform(s, EC_CELLS, 3, 2.0f);
    to_double(x.z, s, EC_CELLS);
    router_softmax(s, EC_TOKENS, EC_E);
    router_ec_forward(&pairs, s, EC_TOKENS, EC_E, 2);
    fill_uniform(dgate, (size_t)pairs.num_pairs, 4, 0.1f);
    for (int64_t t = 0, p = 0; t < EC_TOKENS; t++) {
        for (; p < pairs.row_start[t + 1]; p++) {
            x.c[t * EC_E + pairs.expert[p]] = dgate[p];
        }
    }
    central_differences(want, x.z, EC_CELLS, router_ec_objective, &x);
    fill_uniform(dz, EC_CELLS, 5, 1.0f); // overwritten
    router_ec_backward(dz, dgate, &pairs, s, EC_E);
    check_close_to("router_ec dz", dz, want, EC_CELLS, 1e-6);
    pairs_free(&pairs);
}

static void test_router_ec(void) {
    for (int threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        router_ec_check_choice(40, 8, 1, 1000000, 5);
        router_ec_check_choice(41, 8, 2, 5, 10); // floor(82 / 8), ties
        router_ec_check_choice(31, 5, 5, 3, 31); // everybody
        router_ec_check_choice(7, 8, 1, 100, 0); // fewer tokens than experts: nobody
        router_ec_check_choice(1, 1, 1, 100, 1);
        router_ec_check_choice(33, 6, 1, 1, 5); // all scores equal: the lowest tokens
    }
    test_router_ec_gradient();
}

#endif
