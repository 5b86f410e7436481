/*
router_hash.h: experts (id k + j) mod E against that formula, in ascending order, and the dense layer's list.
*/
#ifndef TEST_ROUTER_HASH_H
#define TEST_ROUTER_HASH_H

#include "llmc/router_hash.h"
#include "harness.h"

static void router_hash_check(int E, int k) {
    enum { N = 200 };
    int ids[N], wrong = 0;
    PairList pairs = pairs_empty();
    for (int t = 0; t < N; t++) {
        ids[t] = t < 100 ? t : t * 327;
    }
    ids[N - 1] = 16777215; // the largest id a configuration allows
    router_hash_forward(&pairs, ids, N, E, k);
    for (int t = 0; t < N; t++) {
        int64_t start = pairs.row_start[t];
        wrong += pairs.row_start[t + 1] - start != k;
        for (int j = 0; j < k; j++) {
            int expert = (int)(((int64_t)ids[t] * k + j) % E), found = 0;
            for (int64_t p = start; p < start + k; p++) {
                found += pairs.expert[p] == expert;
            }
            wrong += found != 1;
            wrong += j > 0 && pairs.expert[start + j] <= pairs.expert[start + j - 1];
            wrong += pairs.gate[start + j] != 1.0f;
        }
    }
    CHECK(pairs.tokens == N && pairs.num_pairs == (int64_t)N * k);
    if (!CHECK(wrong == 0)) {
        printf("    E %d, k %d\n", E, k);
    }
    pairs_free(&pairs);
}

static void test_router_hash_dense(void) {
    const int zeros[5] = {0};
    const int64_t starts[6] = {0, 1, 2, 3, 4, 5};
    const float ones[5] = {1, 1, 1, 1, 1};
    PairList pairs = pairs_empty();
    router_dense_forward(&pairs, 5);
    CHECK(pairs.tokens == 5 && pairs.num_pairs == 5);
    CHECK(memcmp(pairs.row_start, starts, sizeof(starts)) == 0);
    CHECK(memcmp(pairs.expert, zeros, sizeof(zeros)) == 0);
    CHECK(memcmp(pairs.gate, ones, sizeof(ones)) == 0);
    pairs_free(&pairs);
}

static void test_router_hash(void) {
    const int cases[][2] = {{8, 1}, {8, 2}, {8, 3}, {9, 6}, {7, 7}, {1, 1}, {512, 64}, {1000, 200}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        router_hash_check(cases[i][0], cases[i][1]);
    }
    test_router_hash_dense();
}

#endif
