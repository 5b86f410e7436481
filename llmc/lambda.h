/*
The sparsity controller of ReMoE and its three stages. Read this file first: it is the idea of the paper.

A ReLU router is free to switch on any number of experts. An L1 penalty pushes the gates towards zero, and its
weight lambda is steered so that on average k of E experts stay on:

    loss_i = lm + lambda_i reg                                                      (Eq. 6)
    S_i = 1 - active pairs / (L N E)         measured over the whole step            (Eq. 8)
    lambda_{i+1} = lambda_i alpha^sign((1 - k/E) - S_i)                               (Eq. 7)

Too dense: lambda grows by the factor alpha; too sparse: it shrinks; exactly on target: it stays. Whether S_i
is below the target is decided in integers, active E > k L N E, so that every rank and every implementation
decides alike. lambda is fp32 and kept in [1e-30, 1e30].

On its way to a gate lambda is scaled three times: the gradient that the regulariser adds to an active pair is
lambda * 1/micro-batches (the trainers' micro_step) * 1/L (router.h) * f_e/N (router_relu.h).

Stages (the paper's section 3.5; Figure 4): I dense, about half of all pairs on while lambda is still tiny; II
sparsifying, from the first step of 5 in a row with S_i > S_min + 0.1 (target - S_min), S_min the smallest S
so far; III sparse, from the first step with S_i >= target: that step is the settling time. A stage, once
reached, stays.
*/
#ifndef LAMBDA_H
#define LAMBDA_H

#include <stdint.h>
// defines: int64_t

enum { STAGE_DENSE = 1, STAGE_SPARSIFYING = 2, STAGE_SPARSE = 3, STAGE_PATIENCE = 5 };

typedef struct {
    float lambda;        // the next step's coefficient
    float alpha;         // > 1
    int stage;           // STAGE_...
    double min_sparsity; // smallest S so far
    int rising_steps;    // steps in a row above the stage II threshold
    int64_t stage2_step; // first step of stage II, -1 before
    int64_t stage3_step; // first step of stage III = settling time, -1 before
} LambdaState;

static inline LambdaState lambda_init(double lambda0, double alpha) {
    LambdaState state;
    state.lambda = (float)lambda0;
    state.alpha = (float)alpha;
    state.stage = STAGE_DENSE;
    state.min_sparsity = 1.0;
    state.rising_steps = 0;
    state.stage2_step = -1;
    state.stage3_step = -1;
    return state;
}

// S; pairs: all pairs that could be on in the step, L N E
static inline double sparsity_of(int64_t active, int64_t pairs) {
    return 1.0 - (double)active / (double)pairs; // (Eq. 8)
}

// sign(target - S) in integers: 1 too dense, -1 too sparse, 0 on target. S < 1 - k/E  <=>  active E > k pairs
static inline int sparsity_sign(int64_t active, int64_t pairs, int E, int k) {
    int64_t have = active * E;
    int64_t want = pairs * k;
    return (have > want) - (have < want);
}

static inline void lambda_update(LambdaState *state, int64_t active, int64_t pairs, int E, int k) {
    int sign = sparsity_sign(active, pairs, E, k);
    if (sign > 0) {
        state->lambda *= state->alpha; // (Eq. 7)
    } else if (sign < 0) {
        state->lambda /= state->alpha;
    }
    state->lambda = state->lambda < 1e-30f ? 1e-30f : state->lambda;
    state->lambda = state->lambda > 1e30f ? 1e30f : state->lambda;
}

static inline void stage_update(LambdaState *state, int64_t step, int64_t active, int64_t pairs, int E,
                                int k) {
    double sparsity = sparsity_of(active, pairs);
    double target = 1.0 - (double)k / E;
    if (sparsity < state->min_sparsity) {
        state->min_sparsity = sparsity;
    }
    int rising = sparsity > state->min_sparsity + 0.1 * (target - state->min_sparsity);
    state->rising_steps = rising ? state->rising_steps + 1 : 0;
    if (state->stage == STAGE_DENSE && state->rising_steps == STAGE_PATIENCE) {
        state->stage = STAGE_SPARSIFYING;
        state->stage2_step = step - (STAGE_PATIENCE - 1);
    }
    if (state->stage != STAGE_SPARSE && sparsity_sign(active, pairs, E, k) <= 0) {
        if (state->stage == STAGE_DENSE) { // so fast that the 5 steps were not over
            state->stage2_step = step - (state->rising_steps > 0 ? state->rising_steps - 1 : 0);
        }
        state->stage = STAGE_SPARSE;
        state->stage3_step = step;
    }
}

#endif
