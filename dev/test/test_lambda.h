/*
lambda.h: Eq. 7 as fp32 multiplications decided in integers, its clamps, and the stages of sparsity curves
drawn by hand.
*/
#ifndef TEST_LAMBDA_H
#define TEST_LAMBDA_H

#include "llmc/lambda.h"
#include "harness.h"

static void test_lambda_sign(void) {
    CHECK(sparsity_sign(13, 100, 8, 1) == 1 && sparsity_sign(12, 100, 8, 1) == -1); // 12.5 would be on target
    CHECK(sparsity_sign(25, 200, 8, 1) == 0 && sparsity_sign(26, 200, 8, 1) == 1 &&
          sparsity_sign(24, 200, 8, 1) == -1);
    CHECK(sparsity_sign(1, 3, 3, 1) == 0 && sparsity_sign(2, 6, 3, 1) == 0); // 1 - 1/3 has no exact double
    CHECK(sparsity_sign(0, 10, 4, 1) == -1 && sparsity_sign(10, 10, 4, 4) == 0);
    // L 24, 2^19 tokens, 512 experts: one pair more or less than the target's 2^19 * 24 * 64
    int64_t pairs = (int64_t)24 * 524288 * 512, target = pairs / 8;
    CHECK(sparsity_sign(target, pairs, 512, 64) == 0);
    CHECK(sparsity_sign(target + 1, pairs, 512, 64) == 1 && sparsity_sign(target - 1, pairs, 512, 64) == -1);
    CHECK(sparsity_of(25, 200) == 0.875 && sparsity_of(0, 8) == 1.0 && sparsity_of(8, 8) == 0.0);
}

static void test_lambda_steps(void) {
    LambdaState s = lambda_init(1e-8, 1.2);
    CHECK(s.lambda == 1e-8f && s.alpha == 1.2f && s.stage == STAGE_DENSE && s.stage2_step == -1 &&
          s.stage3_step == -1);
    float want = 1e-8f;
    for (int i = 0; i < 10; i++) { // too dense
        lambda_update(&s, 50, 100, 8, 1);
        want *= 1.2f;
        CHECK(s.lambda == want);
    }
    lambda_update(&s, 25, 200, 8, 1); // on target
    CHECK(s.lambda == want);
    for (int i = 0; i < 10; i++) { // too sparse
        lambda_update(&s, 0, 100, 8, 1);
        want /= 1.2f;
        CHECK(s.lambda == want);
    }
}

static void test_lambda_clamps(void) {
    LambdaState s = lambda_init(1e-29, 10.0);
    for (int i = 0; i < 3; i++) {
        lambda_update(&s, 0, 100, 8, 1);
    }
    CHECK(s.lambda == 1e-30f);
    lambda_update(&s, 100, 100, 8, 1);
    CHECK(s.lambda == 1e-30f * 10.0f); // it comes back
    s = lambda_init(1e30, 1000.0);
    for (int i = 0; i < 5; i++) {
        lambda_update(&s, 100, 100, 8, 1);
    }
    CHECK(s.lambda == 1e30f);
}

// ----------------------------------------------------------------------------
// stages: active pairs of 1000 a step, E = 10 and k = 1, so that the target S = 0.9 is 100 of them

static LambdaState lambda_stages(LambdaState s, int64_t first_step, const int *active, int steps) {
    for (int i = 0; i < steps; i++) {
        stage_update(&s, first_step + i, active[i], 1000, 10, 1);
    }
    return s;
}

// S_min = 0.5 at step 2, so stage II needs S > 0.54 (fewer than 460) five times in a row
static void test_lambda_stages(void) {
    const int curve[] = {480, 490, 500, 495, 470, 459, 458, 457, 461, 459, 455, 440, 400,
                         300, 200, 101, 100, 90,  600, 600, 100, 100, 100, 100, 100, 100};
    LambdaState s = lambda_init(1e-8, 1.2);
    s = lambda_stages(s, 0, curve, 8);
    CHECK(s.stage == STAGE_DENSE && s.min_sparsity == 0.5 && s.rising_steps == 3);
    s = lambda_stages(s, 8, curve + 8, 1); // the row is broken
    CHECK(s.stage == STAGE_DENSE && s.rising_steps == 0);
    s = lambda_stages(s, 9, curve + 9, 4);
    CHECK(s.stage == STAGE_DENSE && s.rising_steps == 4);
    s = lambda_stages(s, 13, curve + 13, 1);
    CHECK(s.stage == STAGE_SPARSIFYING && s.stage2_step == 9 && s.stage3_step == -1);
    s = lambda_stages(s, 14, curve + 14, 2); // 101 active: not yet
    CHECK(s.stage == STAGE_SPARSIFYING && s.stage3_step == -1);
    s = lambda_stages(s, 16, curve + 16, 1); // exactly on target
    CHECK(s.stage == STAGE_SPARSE && s.stage3_step == 16 && s.stage2_step == 9);
    s = lambda_stages(s, 17, curve + 17, 9); // a stage, once reached, stays
    CHECK(s.stage == STAGE_SPARSE && s.stage3_step == 16 && s.stage2_step == 9);
}

// S_min falls late: what counts is the smallest so far
static void test_lambda_stage_minimum(void) {
    const int falling[] = {500, 461, 461, 461, 461, 461, 461, 461, 700, 641, 639, 639, 639, 639, 639};
    LambdaState s = lambda_init(1e-8, 1.2);
    s = lambda_stages(s, 0, falling, 8); // S = 0.539 is not above 0.5 + 0.1 * 0.4
    CHECK(s.stage == STAGE_DENSE);
    s = lambda_stages(s, 8, falling + 8, 7); // S_min = 0.3: above 0.36
    CHECK(s.stage == STAGE_SPARSIFYING && s.min_sparsity == sparsity_of(700, 1000) && s.stage2_step == 10);
}

// sparse before the five steps are over, or from the beginning
static void test_lambda_stage_fast(void) {
    const int fast[] = {500, 490, 300, 90}, sparse[] = {50};
    LambdaState s = lambda_stages(lambda_init(1e-8, 1.2), 0, fast, 4);
    CHECK(s.stage == STAGE_SPARSE && s.stage2_step == 2 && s.stage3_step == 3);
    s = lambda_stages(lambda_init(1e-8, 1.2), 0, sparse, 1);
    CHECK(s.stage == STAGE_SPARSE && s.stage2_step == 0 && s.stage3_step == 0);
}

static void test_lambda(void) {
    test_lambda_sign();
    test_lambda_steps();
    test_lambda_clamps();
    test_lambda_stages();
    test_lambda_stage_minimum();
    test_lambda_stage_fast();
}

#endif
