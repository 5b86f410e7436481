/*
segments.h and router_lory.h: where segments lie, the shift and its softmax worked by hand, contexts, counts;
the gradient against central differences of a double that holds the first segments' weights.
*/
#ifndef TEST_ROUTER_LORY_H
#define TEST_ROUTER_LORY_H

#include "llmc/router_lory.h"
#include "harness.h"

// every token is in one segment, which knows it, and segments follow each other
static void lory_check_segments(int B, int T, int length, int each, int last) {
    Segments s = segments_of(B, T, length, NULL);
    int64_t t = 0;
    int wrong = 0;
    CHECK(segments_each(s) == each && segments_count(s) == B * each);
    for (int c = 0; c < B * each; c++) {
        int size = segment_size(s, c), first_of_text = c % each == 0, last_of_text = c % each == each - 1;
        wrong += segment_first(s, c) != t || size != (last_of_text ? last : length);
        wrong += segment_source(s, c) != (first_of_text ? c : c - 1);
        wrong += segment_next(s, c) != (last_of_text ? -1 : c + 1);
        for (int i = 0; i < size; i++, t++) {
            wrong += segment_of_token(s, t) != c;
        }
    }
    CHECK(wrong == 0 && t == (int64_t)B * T);
}

static void test_lory_segments(void) {
    int contexts[3] = {2, 17, 1};
    lory_check_segments(3, 16, 4, 4, 4);
    lory_check_segments(2, 17, 5, 4, 2);
    lory_check_segments(2, 5, 1, 5, 1);
    lory_check_segments(1, 1, 1, 1, 1);
    Segments whole = segments_of(3, 17, 4, contexts), shorter = segments_of(2, 3, 256, NULL);
    CHECK(segments_count(whole) == 3 && segment_size(whole, 2) == 17 && segment_source(whole, 2) == 2);
    CHECK(segments_count(shorter) == 2 && shorter.length == 3);
    CHECK(merged_experts(3, 4) == 4 && merged_experts(3, 400) == MERGE_CHUNK && merged_experts(50, 4) == 50);
}

// two texts of 5 tokens in segments of 2, E = 2: logit 0 of segment c is ln(c + 1) on average, logit 1 is 0
static void test_lory_by_hand(void) {
    const int E = 2, B = 2, T = 5;
    float logits[20], spread[5] = {0.5f, -0.5f, 1.0f, -1.0f, 0.0f};
    PairList pairs = pairs_empty();
    Segments s = segments_of(B, T, 2, NULL);
    for (int t = 0; t < B * T; t++) {
        logits[t * E] = logf((float)segment_of_token(s, t) + 1.0f) + spread[t % T];
        logits[t * E + 1] = 0.0f;
    }
    router_lory_forward(&pairs, logits, s, E);
    // weights of expert 0: (c + 1) / (c + 2), c the segment before, or its own
    const float want[6] = {1 / 2.f, 1 / 2.f, 2 / 3.f, 4 / 5.f, 4 / 5.f, 5 / 6.f};
    int wrong = 0;
    for (int t = 0; t < B * T; t++) {
        int c = segment_of_token(s, t);
        wrong += fabsf(logits[t * E] - want[c]) > 1e-6f || fabsf(logits[t * E + 1] - 1.0f + want[c]) > 1e-6f;
        wrong += pairs.row_start[t] != t || pairs.expert[t] != c || pairs.gate[t] != 1.0f;
    }
    CHECK(wrong == 0 && pairs.num_pairs == 10 && pairs.row_start[10] == 10);
    CHECK(pairs.counts[0] == 0 && pairs.counts[1] == 0); // no weight exceeds 2/E = 1
    pairs_free(&pairs);
}

// of four experts one has more than half of a segment's weight
static void test_lory_counts(void) {
    float logits[4 * 4] = {0};
    PairList pairs = pairs_empty();
    logits[2] = logits[4 + 2] = 4.0f; // both tokens of the first segment: it is used there, and in the second
    router_lory_forward(&pairs, logits, segments_of(1, 4, 2, NULL), 4);
    CHECK(pairs.counts[0] == 0 && pairs.counts[2] == 4);
    pairs_free(&pairs);
}

// a text is one segment that its first tokens route; a kept one is not routed at all
static void test_lory_contexts(void) {
    enum { B = 2, T = 7, E = 3 };
    float logits[B * T * E], kept[B * T * E], want[B * E] = {0};
    int contexts[B] = {2, 5}, wrong = 0;
    PairList pairs = pairs_empty();
    fill_uniform(logits, B * T * E, 3, 2.0f);
    for (int b = 0; b < B; b++) {
        for (int i = 0; i < contexts[b] * E; i++) {
            want[b * E + i % E] += logits[b * T * E + i] / (float)contexts[b];
        }
    }
    router_softmax(want, B, E);
    router_lory_forward(&pairs, logits, segments_of(B, T, 2, contexts), E);
    for (int i = 0; i < B * T * E; i++) {
        wrong += fabsf(logits[i] - want[i / (T * E) * E + i % E]) > 1e-6f;
    }
    Segments one = segments_kept(1);
    memcpy(kept, logits, sizeof(kept));
    router_lory_forward(&pairs, logits, one, E);
    CHECK(wrong == 0 && memcmp(kept, logits, sizeof(kept)) == 0);
    CHECK(pairs.num_pairs == 1 && pairs.expert[0] == 0 && pairs.gate[0] == 1.0f && pairs.counts[0] == 0);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// gradient of sum_ce da_ce a_ce

enum { LORY_TOKENS = 3 * 11, LORY_E = 3, LORY_CELLS = LORY_TOKENS * LORY_E, LORY_SEGMENTS = 3 * 3 };

typedef struct {
    Segments s;
    double z[LORY_CELLS], da[LORY_SEGMENTS * LORY_E];
} LoryReference;

static double lory_objective(void *context) {
    LoryReference *r = (LoryReference *)context;
    double sum = 0.0;
    for (int c = 0; c < LORY_SEGMENTS; c++) {
        double mean[LORY_E] = {0}, all = 0.0, source = segment_source(r->s, c),
               size = segment_size(r->s, (int)source);
        for (int i = 0; i < (int)size * LORY_E; i++) {
            mean[i % LORY_E] += r->z[segment_first(r->s, (int)source) * LORY_E + i] / size;
        }
        for (int e = 0; e < LORY_E; e++) {
            all += exp(mean[e]);
        }
        for (int e = 0; e < LORY_E && source != c; e++) { // the first segment's are constants
            sum += r->da[c * LORY_E + e] * exp(mean[e]) / all;
        }
    }
    return sum;
}

static void test_lory_gradient(void) {
    LoryReference *r = NEW(LoryReference, 1);
    float z[LORY_CELLS], dz[LORY_CELLS], da[LORY_SEGMENTS * LORY_E];
    double want[LORY_CELLS];
    PairList pairs = pairs_empty();
    r->s = segments_of(3, 11, 4, NULL);
    fill_uniform(z, LORY_CELLS, 1, 2.0f);
    fill_uniform(da, LORY_SEGMENTS * LORY_E, 2, 1.0f);
    to_double(r->z, z, LORY_CELLS);
    to_double(r->da, da, LORY_SEGMENTS * LORY_E);
    central_differences(want, r->z, LORY_CELLS, lory_objective, r);
    router_lory_forward(&pairs, z, r->s, LORY_E);
    router_lory_backward(dz, da, &pairs, z, LORY_E);
    check_close_to("router_lory_backward", dz, want, LORY_CELLS, 1e-6);
    pairs_free(&pairs);
    free(r);
}

static void test_router_lory(void) {
    test_lory_segments();
    test_lory_by_hand();
    test_lory_counts();
    test_lory_contexts();
    test_lory_gradient();
}

#endif
