/*
dispatch.h: the sort against a walk over experts and then tokens (stable, complete, nothing twice), gather and
combine against sums in double, and loads from none to all on one expert.
*/
#ifndef TEST_DISPATCH_H
#define TEST_DISPATCH_H

#include "llmc/dispatch.h"
#include "harness.h"

enum { DISPATCH_N = 37, DISPATCH_E = 6, DISPATCH_D = 11, DISPATCH_CELLS = DISPATCH_N * DISPATCH_E };

typedef enum {
    DISPATCH_MIXED,
    DISPATCH_ALL,
    DISPATCH_NONE,
    DISPATCH_ONE_EXPERT,
    DISPATCH_ONE_PAIR
} DispatchLoad;

// expert 3 never, token 5 never, in the mixed load
static void dispatch_fill(PairList *pairs, DispatchLoad load) {
    float mask[DISPATCH_CELLS], score[DISPATCH_CELLS];
    fill_uniform(mask, DISPATCH_CELLS, 1, 1.0f);
    fill_uniform(score, DISPATCH_CELLS, 2, 1.0f);
    for (int i = 0; i < DISPATCH_CELLS; i++) {
        int t = i / DISPATCH_E, e = i % DISPATCH_E;
        int mixed = mask[i] > 0.1f && e != 3 && t != 5;
        mask[i] = load == DISPATCH_ALL || (load == DISPATCH_MIXED && mixed) ||
                  (load == DISPATCH_ONE_EXPERT && e == 4) ||
                  (load == DISPATCH_ONE_PAIR && i == DISPATCH_CELLS - 1);
    }
    pairs_from_mask(pairs, score, mask, DISPATCH_N, DISPATCH_E);
}

// rows in the order expert, token: found by search, not by counting
static void dispatch_check_sort(const Dispatch *dispatch, const PairList *pairs) {
    int64_t row = 0, wrong = 0;
    for (int e = 0; e < DISPATCH_E; e++) {
        wrong += dispatch->offsets[e] != row;
        for (int64_t t = 0; t < DISPATCH_N; t++) {
            for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
                if (pairs->expert[p] == e) {
                    wrong += dispatch->row_of_pair[p] != row || dispatch->token_of_row[row] != t;
                    wrong += dispatch->gate_of_row[row] != pairs->gate[p];
                    row++;
                }
            }
        }
    }
    CHECK(wrong == 0 && dispatch->offsets[DISPATCH_E] == row && row == pairs->num_pairs);
}

// with gates the weighted sum of the rows, without them the plain one; both are added to what y holds
static void dispatch_check_combine(const Dispatch *dispatch, const PairList *pairs, const float *rows,
                                   const float *gates) {
    float y[DISPATCH_N * DISPATCH_D];
    double want[DISPATCH_N * DISPATCH_D];
    fill_uniform(y, DISPATCH_N * DISPATCH_D, 4, 1.0f);
    to_double(want, y, DISPATCH_N * DISPATCH_D);
    for (int64_t t = 0; t < DISPATCH_N; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            for (int c = 0; c < DISPATCH_D; c++) {
                double value = rows[dispatch->row_of_pair[p] * DISPATCH_D + c];
                want[t * DISPATCH_D + c] += (gates != NULL ? gates[p] : 1.0) * value;
            }
        }
    }
    dispatch_combine(y, rows, pairs, gates, dispatch, DISPATCH_D);
    check_close_to("dispatch_combine", y, want, DISPATCH_N * DISPATCH_D, 2e-7);
}

static void dispatch_check_rows(const Dispatch *dispatch, const PairList *pairs) {
    static float x[DISPATCH_N * DISPATCH_D], rows[DISPATCH_CELLS * DISPATCH_D];
    int wrong = 0;
    fill_uniform(x, DISPATCH_N * DISPATCH_D, 3, 1.0f);
    dispatch_gather(rows, x, dispatch, pairs->num_pairs, DISPATCH_D);
    for (int64_t row = 0; row < pairs->num_pairs; row++) {
        wrong += memcmp(rows + row * DISPATCH_D, x + dispatch->token_of_row[row] * DISPATCH_D,
                        DISPATCH_D * sizeof(float)) != 0;
    }
    CHECK(wrong == 0);
    fill_uniform(rows, DISPATCH_CELLS * DISPATCH_D, 5, 1.0f); // as the experts would leave them
    dispatch_check_combine(dispatch, pairs, rows, pairs->gate);
    dispatch_check_combine(dispatch, pairs, rows, NULL);
}

// one Dispatch for all of them: from few pairs to many and back
static void test_dispatch_loads(void) {
    const DispatchLoad loads[] = {DISPATCH_NONE,       DISPATCH_ONE_PAIR, DISPATCH_MIXED,
                                  DISPATCH_ONE_EXPERT, DISPATCH_ALL,      DISPATCH_NONE};
    const int64_t sizes[] = {0, 1, -1, DISPATCH_N, DISPATCH_CELLS, 0};
    PairList pairs = pairs_empty();
    Dispatch dispatch;
    dispatch_init(&dispatch, DISPATCH_E);
    for (int i = 0; i < 6; i++) {
        dispatch_fill(&pairs, loads[i]);
        CHECK(sizes[i] < 0 || pairs.num_pairs == sizes[i]);
        dispatch_sort(&dispatch, &pairs, DISPATCH_E);
        dispatch_check_sort(&dispatch, &pairs);
        dispatch_check_rows(&dispatch, &pairs);
    }
    dispatch_free(&dispatch);
    pairs_free(&pairs);
}

static void test_dispatch_threads(void) {
    static float rows[DISPATCH_CELLS * DISPATCH_D], y[2][DISPATCH_N * DISPATCH_D];
    PairList pairs = pairs_empty();
    Dispatch dispatch;
    dispatch_init(&dispatch, DISPATCH_E);
    dispatch_fill(&pairs, DISPATCH_MIXED);
    dispatch_sort(&dispatch, &pairs, DISPATCH_E);
    fill_uniform(rows, DISPATCH_CELLS * DISPATCH_D, 5, 1.0f);
    memset(y, 0, sizeof(y));
    for (int i = 0; i < 2; i++) {
        use_threads(i + 1);
        dispatch_combine(y[i], rows, &pairs, pairs.gate, &dispatch, DISPATCH_D);
    }
    CHECK(memcmp(y[0], y[1], sizeof(y[0])) == 0);
    dispatch_free(&dispatch);
    pairs_free(&pairs);
}

static void test_dispatch(void) {
    test_dispatch_loads();
    test_dispatch_threads();
}

#endif
