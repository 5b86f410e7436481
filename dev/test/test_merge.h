/*
merge.h: the merge and its backward against the sums in double; then whole layers: every segment's tokens
through experts that were merged for it alone, with more segments than a chunk has, against merged_forward and
merged_backward, whose results must not depend on the chunks; and a prompt's experts, which stay.
*/
#ifndef TEST_MERGE_H
#define TEST_MERGE_H

#include "llmc/merge.h"
#include "harness.h"

enum {
    MERGE_E = 3,
    MERGE_D = 6,
    MERGE_F = 5,
    MERGE_UP = 2 * MERGE_F * MERGE_D,
    MERGE_DOWN = MERGE_F * MERGE_D
};

typedef struct {
    float gate_up[MERGE_E * MERGE_UP], down[MERGE_E * MERGE_DOWN];
    float dgate_up[MERGE_E * MERGE_UP], ddown[MERGE_E * MERGE_DOWN];
} MergeBank;

static ExpertBank merge_bank(MergeBank *b) {
    ExpertBank bank = {MERGE_E, MERGE_D, MERGE_F, b->gate_up, b->down, b->dgate_up, b->ddown};
    fill_uniform(b->gate_up, MERGE_E * MERGE_UP, 21, 1.0f);
    fill_uniform(b->down, MERGE_E * MERGE_DOWN, 22, 1.0f);
    fill_uniform(b->dgate_up, MERGE_E * MERGE_UP, 23, 1.0f); // which is added to
    fill_uniform(b->ddown, MERGE_E * MERGE_DOWN, 24, 1.0f);
    return bank;
}

// to [rows][size] = a [rows][inner] times from [inner][size], or a^T
static void merge_product(double *to, const float *a, const float *from, int rows, int inner, int size,
                          int transposed) {
    for (int i = 0; i < rows * size; i++) {
        for (int j = 0; j < inner; j++) {
            int row = i / size;
            to[i] +=
                (double)(transposed ? a[j * rows + row] : a[row * inner + j]) * from[j * size + i % size];
        }
    }
}

static void test_merge_sums(void) {
    enum { C = 4 };
    MergeBank own;
    float a[C * MERGE_E], da[C * MERGE_E];
    float up[C * MERGE_UP], down[C * MERGE_DOWN], dup[C * MERGE_UP], ddown[C * MERGE_DOWN];
    double want_up[C * MERGE_UP] = {0}, want_down[C * MERGE_DOWN] = {0}, want_da[C * MERGE_E] = {0};
    double want_dup[MERGE_E * MERGE_UP], want_ddown[MERGE_E * MERGE_DOWN];
    ExpertBank bank = merge_bank(&own), merged = {C, MERGE_D, MERGE_F, up, down, dup, ddown};
    fill_uniform(a, C * MERGE_E, 1, 1.0f);
    fill_uniform(dup, C * MERGE_UP, 2, 1.0f);
    fill_uniform(ddown, C * MERGE_DOWN, 3, 1.0f);
    to_double(want_dup, own.dgate_up, MERGE_E * MERGE_UP);
    to_double(want_ddown, own.ddown, MERGE_E * MERGE_DOWN);
    merge_product(want_up, a, own.gate_up, C, MERGE_E, MERGE_UP, 0);
    merge_product(want_down, a, own.down, C, MERGE_E, MERGE_DOWN, 0);
    merge_product(want_dup, a, dup, MERGE_E, C, MERGE_UP, 1);
    merge_product(want_ddown, a, ddown, MERGE_E, C, MERGE_DOWN, 1);
    for (int i = 0; i < C * MERGE_E; i++) {
        for (int j = 0; j < MERGE_UP; j++) {
            want_da[i] += (double)dup[i / MERGE_E * MERGE_UP + j] * own.gate_up[i % MERGE_E * MERGE_UP + j];
        }
        for (int j = 0; j < MERGE_DOWN; j++) {
            want_da[i] +=
                (double)ddown[i / MERGE_E * MERGE_DOWN + j] * own.down[i % MERGE_E * MERGE_DOWN + j];
        }
    }
    merge_forward(merged, a, bank);
    merge_backward(bank, da, a, merged);
    check_close_to("merged gate_up", up, want_up, C * MERGE_UP, 1e-6);
    check_close_to("merged down", down, want_down, C * MERGE_DOWN, 1e-6);
    check_close_to("da", da, want_da, C * MERGE_E, 1e-6);
    check_close_to("dgate_up", own.dgate_up, want_dup, MERGE_E * MERGE_UP, 1e-6);
    check_close_to("ddown", own.ddown, want_ddown, MERGE_E * MERGE_DOWN, 1e-6);
}

// ----------------------------------------------------------------------------
// layers

typedef struct {
    float *x, *dy, *y, *dx, *h, *a, *scratch;
    PairList pairs;
    MergeBank own;
    Merged merged;
} MergeLayer;

static MergeLayer *merge_layer(Segments s) {
    MergeLayer *m = NEW(MergeLayer, 1);
    int64_t N = (int64_t)s.sequences * s.tokens, d = MERGE_D, F = MERGE_F;
    m->x = NEW(float, N *d);
    m->dy = NEW(float, N *d);
    m->y = NEW(float, N *d);
    m->dx = NEW(float, N *d);
    m->h = NEW(float, N * 2 * F);
    m->a = NEW(float, N *MERGE_E);
    m->scratch = NEW(float, N *(d + F + 1));
    fill_uniform(m->x, (size_t)(N * d), 11, 1.0f);
    fill_uniform(m->dy, (size_t)(N * d), 12, 1.0f);
    fill_uniform(m->a, (size_t)(N * MERGE_E), 13, 2.0f);
    merged_open(&m->merged, 3, segments_count(s), N, MERGE_E, MERGE_D, MERGE_F, 1);
    router_lory_forward(&m->pairs, m->a, s, MERGE_E);
    return m;
}

static void merge_layer_free(MergeLayer *m) {
    float *buffers[] = {m->x, m->dy, m->y, m->dx, m->h, m->a, m->scratch};
    for (int i = 0; i < 7; i++) {
        free(buffers[i]);
    }
    pairs_free(&m->pairs);
    merged_close(&m->merged);
    free(m);
}

// the same, a segment at a time: batches of one, whose tokens are one segment
static void merge_check_layer(int B, int T, int length) {
    Segments s = segments_of(B, T, length, NULL);
    MergeLayer *m = merge_layer(s), *one = merge_layer(s);
    ExpertBank bank = merge_bank(&m->own), single = merge_bank(&one->own);
    int C = segments_count(s);
    float *da = NEW(float, (int64_t)C *MERGE_E);
    merged_forward(m->y, m->h, m->x, bank, m->a, &m->pairs, 1, &m->merged, m->scratch);
    merged_backward(m->dx, m->dy, m->x, m->h, bank, m->a, &m->pairs, 1, &m->merged, m->scratch);
    for (int c = 0; c < C; c++) {
        int64_t t = segment_first(s, c);
        int whole = segment_size(s, c);
        PairList pairs = pairs_empty();
        lory_list(&pairs, segments_of(1, whole, whole, NULL));
        merged_forward(one->y + t * MERGE_D, one->h, one->x + t * MERGE_D, single, one->a + t * MERGE_E,
                       &pairs, 0, &one->merged, one->scratch);
        merged_backward(one->dx + t * MERGE_D, one->dy + t * MERGE_D, one->x + t * MERGE_D, one->h, single,
                        one->a + t * MERGE_E, &pairs, 0, &one->merged, one->scratch);
        memcpy(da + c * MERGE_E, one->merged.da, MERGE_E * sizeof(float));
        pairs_free(&pairs);
    }
    size_t n = (size_t)(B * T * MERGE_D);
    check_close("y", m->y, one->y, n, 1e-6);
    check_close("dx", m->dx, one->dx, n, 1e-6);
    check_close("da", m->merged.da, da, (size_t)(C * MERGE_E), 1e-6);
    check_close("dgate_up", m->own.dgate_up, one->own.dgate_up, MERGE_E * MERGE_UP, 1e-6);
    check_close("ddown", m->own.ddown, one->own.ddown, MERGE_E * MERGE_DOWN, 1e-6);
    free(da);
    merge_layer_free(m);
    merge_layer_free(one);
}

// the prompt's experts are in the place of their layer, and the layers' do not meet
static void test_merge_kept(void) {
    enum { PROMPT = 4, D = MERGE_D };
    int context = PROMPT;
    Segments prompt = segments_of(1, PROMPT, 2, &context), next = segments_kept(3);
    MergeLayer *first = merge_layer(prompt), *other = merge_layer(prompt);
    ExpertBank bank = merge_bank(&first->own);
    float y[2][3 * D] = {{0}};
    for (int e = 0; e < MERGE_E; e++) {
        for (int t = 0; t < PROMPT; t++) {
            other->a[t * MERGE_E + e] = e == 1 ? 1.0f : 0.0f;
        }
    }
    merged_forward(first->y, first->h, first->x, bank, first->a, &first->pairs, 0, &first->merged,
                   first->scratch);
    merged_forward(other->y, other->h, first->x, bank, other->a, &other->pairs, 2, &first->merged,
                   first->scratch);
    PairList pairs = pairs_empty();
    lory_list(&pairs, next);
    for (int layer = 0; layer < 2; layer++) { // the prompt's last tokens again, more than a segment's
        merged_forward(y[layer], first->h, first->x + (PROMPT - 3) * D, bank, first->a, &pairs, 2 * layer,
                       &first->merged, first->scratch);
    }
    CHECK(memcmp(y[0], first->y + (PROMPT - 3) * D, sizeof(y[0])) == 0);
    CHECK(memcmp(y[1], other->y + (PROMPT - 3) * D, sizeof(y[1])) == 0 &&
          memcmp(y[0], y[1], sizeof(y[0])) != 0);
    pairs_free(&pairs);
    merge_layer_free(first);
    merge_layer_free(other);
}

static void test_merge(void) {
    test_merge_sums();
    merge_check_layer(2, 12, 3);
    merge_check_layer(3, 13, 5);
    merge_check_layer(5, 15, 1); // 75 segments: two chunks and a part
    merge_check_layer(1, 7, 9);
    test_merge_kept();
}

#endif
