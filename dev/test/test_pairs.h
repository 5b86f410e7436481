/*
pairs.h: the compressed rows, and the bits, against a mask read entry by entry; lists reused and empty.
*/
#ifndef TEST_PAIRS_H
#define TEST_PAIRS_H

#include "llmc/pairs.h"
#include "harness.h"

// a token with all experts, one with none, the rest mixed; the last active pair in the last cell
static void pairs_sample_mask(float *mask, int64_t N, int E) {
    fill_uniform(mask, (size_t)(N * E), 7, 1.0f);
    for (int64_t i = 0; i < N * E; i++) {
        mask[i] = i / E == 1 ? 0.0f : i / E == 2 || mask[i] > 0.2f ? mask[i] : 0.0f;
    }
    mask[N * E - 1] = -1e-30f; // any value but 0 is active
}

static void pairs_check_against_mask(const PairList *pairs, const float *score, const float *mask, int64_t N,
                                     int E) {
    int64_t p = 0, wrong = 0;
    CHECK(pairs->tokens == N && pairs->row_start[0] == 0);
    for (int64_t t = 0; t < N; t++) {
        for (int e = 0; e < E; e++) {
            if (mask[t * E + e] != 0.0f) {
                wrong += pairs->expert[p] != e || pairs->gate[p] != (score != NULL ? score[t * E + e] : 1.0f);
                p++;
            }
        }
        wrong += pairs->row_start[t + 1] != p;
    }
    CHECK(wrong == 0 && pairs->num_pairs == p);
}

static void test_pairs_from_mask(void) {
    enum { N = 19, E = 5 };
    float mask[N * E], score[N * E], picture[N * E];
    int64_t total = 0, wrong = 0;
    PairList pairs = pairs_empty();
    pairs_sample_mask(mask, N, E);
    fill_uniform(score, N * E, 8, 1.0f);
    pairs_from_mask(&pairs, NULL, mask, 3, E); // grows from nothing, then grows, then shrinks
    pairs_check_against_mask(&pairs, NULL, mask, 3, E);
    pairs_from_mask(&pairs, score, mask, N, E);
    pairs_check_against_mask(&pairs, score, mask, N, E);
    pairs_to_dense(picture, &pairs, E);
    for (int i = 0; i < N * E; i++) {
        wrong += picture[i] != (mask[i] != 0.0f ? score[i] : 0.0f);
        pairs.counts[i % E] -= mask[i] != 0.0f;
    }
    for (int e = 0; e < E; e++) {
        wrong += pairs.counts[e] != 0;
    }
    CHECK(wrong == 0);
    pairs_from_mask(&pairs, score, mask, 4, E);
    pairs_check_against_mask(&pairs, score, mask, 4, E);
    for (int e = 0; e < E; e++) {
        total += pairs.counts[e];
    }
    CHECK(total == pairs.num_pairs);
    pairs_free(&pairs);
}

static void test_pairs_none(void) {
    enum { N = 3, E = 2 };
    float mask[N * E] = {0}, picture[N * E] = {1, 1, 1, 1, 1, 1};
    PairList pairs = pairs_empty();
    mask[3] = -0.0f;
    pairs_from_mask(&pairs, NULL, mask, N, E);
    pairs_check_against_mask(&pairs, NULL, mask, N, E);
    CHECK(pairs.num_pairs == 0);
    CHECK(pairs.counts[0] == 0 && pairs.counts[1] == 0);
    pairs_to_dense(picture, &pairs, E);
    CHECK(memcmp(picture, mask, 3 * sizeof(float)) == 0);
    pairs_free(&pairs);
}

// one word, a full one, two, and some more; all bits were 1 before
static void test_pairs_bits(int E) {
    enum { N = 19, MOST = 130 };
    float mask[N * MOST];
    uint64_t bits[N * 3 + 1];
    int W = bit_words(E), wrong = 0;
    PairList pairs = pairs_empty();
    memset(bits, 0xFF, sizeof(bits));
    pairs_sample_mask(mask, N, E);
    pairs_from_mask(&pairs, NULL, mask, N, E);
    pairs_to_bits(bits, &pairs, E);
    for (int i = 0; i < N * 64 * W; i++) {
        int t = i / (64 * W), e = i % (64 * W);
        int on = (int)(bits[t * W + e / 64] >> e % 64 & 1);
        wrong += on != (e < E && mask[t * E + e] != 0.0f);
    }
    CHECK(wrong == 0 && bits[N * W] == UINT64_MAX);
    pairs_free(&pairs);
}

static void test_pairs(void) {
    const int experts[] = {1, 5, 63, 64, 65, 128, 130};
    test_pairs_from_mask();
    for (size_t i = 0; i < sizeof(experts) / sizeof(experts[0]); i++) {
        test_pairs_bits(experts[i]);
    }
    test_pairs_none();
}

#endif
