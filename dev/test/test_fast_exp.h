/*
fast_exp.h: the relative error that its comment promises, over its whole range, what it does beyond, and the
maximum of a row.
*/
#ifndef TEST_FAST_EXP_H
#define TEST_FAST_EXP_H

#include "llmc/fast_exp.h"
#include "harness.h"

// `steps` points from `least` to `most`
static double fast_exp_worst(double least, double most, int steps) {
    double worst = 0.0;
    for (int i = 0; i <= steps; i++) {
        float x = (float)(least + (most - least) * i / steps);
        worst = fmax(worst, fabs(fast_exp(x) / exp(x) - 1.0));
    }
    return worst;
}

// the maximum in every place of rows of every length around the lanes
static void test_fast_exp_max(void) {
    float x[70];
    int wrong = 0;
    for (int n = 1; n <= 70; n++) {
        for (int at = 0; at < n; at++) {
            fill_uniform(x, 70, 1, 1.0f);
            x[at] = 1.5f;
            wrong += max_of(x, n) != 1.5f;
            x[at] = -2.0f;
            wrong += n == 1 && max_of(x, n) != -2.0f;
        }
    }
    CHECK(wrong == 0);
}

// against double; where silu(x) is below 1e-15, only that it stays there
static void test_fast_sigmoid(void) {
    double worst = 0.0;
    for (int i = 0; i <= 1000000; i++) {
        float x = (float)(-40.0 + 140.0 * i / 1000000);
        worst = fmax(worst, fabs(fast_sigmoid(x) * (1.0 + exp(-(double)x)) - 1.0));
    }
    CHECK(worst < 3e-7);
    CHECK(fast_sigmoid(-1e30f) > 0.0f && fast_sigmoid(-1e30f) < 5e-18f && fast_sigmoid(1e30f) == 1.0f);
    CHECK(isnan(fast_sigmoid(NAN)));
}

static void test_fast_exp(void) {
    test_fast_sigmoid();
    test_fast_exp_max();
    CHECK(fast_exp_worst(-80.0, 88.0, 1000000) < 2e-7);
    CHECK(fast_exp_worst(-1.0, 1.0, 100000) < 2e-7);
    CHECK(fast_exp_worst(-1e-30, 1e-30, 10) < 1e-7);
    CHECK(fast_exp(0.0f) == 1.0f && fast_exp(-0.0f) == 1.0f);
    CHECK(fast_exp(-80.1f) == fast_exp(-1e30f) && fast_exp(-INFINITY) == fast_exp(-80.1f));
    CHECK(fast_exp(-INFINITY) > 0.0f && fast_exp(-INFINITY) < 2e-35f);
    CHECK(isnan(fast_exp(NAN)) && isnan(fast_exp(-NAN)));
}

#endif
