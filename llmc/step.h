/*
One optimizer step of ReMoE, whole. This is what training repeats.

    loss_i = lm + lambda_i reg            mean over the step's micro-batches             (Eq. 6)
    g      = d loss_i / d weights, scaled by min(1, grad_clip / ||g||)
    AdamW with lr(i)                      adamw.h, schedule.h
    S_i    = 1 - active pairs / (L N E)   what the routers did meanwhile                 (Eq. 8)
    lambda_{i+1} = lambda_i alpha^sign((1 - k/E) - S_i)                                  (Eq. 7)

Other routers have another weight before reg, or none (router.h), and no lambda to steer; auxfree steers a
bias for each expert instead (router_auxfree.h). A step whose losses or norm are not finite updates nothing,
lambda and biases neither: it only moves on in the data.

Forward and backward are the model's (trainer.h). Letters: B sequences of T tokens a micro-batch, N tokens of
the step, L layers, E = E_tot experts, k = k_tot of them active.
*/
#ifndef STEP_H
#define STEP_H

#include "llmc/adamw.h"
#include "llmc/lambda.h"
#include "llmc/schedule.h"
#include "llmc/trainer.h"
#include <math.h>
// defines: clip_scale; LambdaState, lambda_update, stage_update; Schedule, schedule_lr; Model, StepStats,
// model_*

// what stays the same from step to step
typedef struct {
    int micro_batches, B, T; // of a rank
    int ranks;
    Schedule schedule;
    double weight_decay, grad_clip;
    double aux_coeff;     // topk's and sparsemixer's
    double bias_rate;     // auxfree's
    int64_t warmup_steps; // of topk's k: so many steps with warmup_k
    int64_t warmup_k;
} StepSettings;

// how far training has come: all that it needs to go on besides weights and moments. Every checkpoint has it
typedef struct {
    int64_t step;           // optimizer steps of this run that are done
    int64_t optimizer_step; // AdamW's t (larger than step when the weights came with their moments)
    int64_t sequences;      // the loader's position
    LambdaState sparsity;
} RunState;

// k of a step: nearly dense in the first ones, where a router is told so (the paper's Appendix H)
static inline int step_k(const StepSettings *s, Router router, int64_t step) {
    int warms_up = router_row(router.method)->k_warms_up && step < s->warmup_steps;
    return !warms_up ? router.active : s->warmup_k < router.experts ? (int)s->warmup_k : router.experts;
}

// the largest k of any step
static inline int step_most_k(const StepSettings *s, Router router) {
    int first = step_k(s, router, 0);
    return first > router.active ? first : router.active;
}

// S of k active experts
static inline double target_sparsity(Router router) {
    return router_merges(router.method) ? 0.0 : 1.0 - (double)router.active / router.experts;
}

// S of so many active pairs, of those that there could be. Where a router merges experts none is off
static inline double step_sparsity(Router router, int64_t active, int64_t pairs) {
    return router_merges(router.method) ? 0.0 : sparsity_of(active, pairs);
}

static inline int stats_are_finite(const StepStats *s) {
    return isfinite(s->lm_loss) && isfinite(s->reg_loss) && isfinite(s->grad_norm);
}

// takes the step's micro-batches from `ahead`, moves *state on; 0: nothing was updated, see above
static inline int train_step(Model *m, Prefetcher *ahead, const Config *c, const StepSettings *s,
                             RunState *state, StepStats *stats) {
    Router router = c->router;
    double reg_weight = router_loss_weight(router.method, state->sparsity.lambda, s->aux_coeff);
    model_route(m, router.method, step_k(s, router, state->step));
    model_gradients(m, ahead, state->step, s->micro_batches, s->B, s->T, reg_weight,
                    stats); // of lm + lambda reg (Eq. 6)
    int finite = stats_are_finite(stats);
    if (finite && router_row(router.method)->has_bias && router.load_balance) {
        model_balance(m, (float)s->bias_rate, stats->counts);
    }
    if (finite) {
        float scale = clip_scale(stats->grad_norm, s->grad_clip);
        model_update(m, schedule_lr(s->schedule, state->step), s->weight_decay, scale,
                     ++state->optimizer_step);
    }
    if (finite && router_has_lambda(router.method)) {
        int64_t pairs = stats->tokens * c->layers * router.experts; // that could have been on
        stage_update(&state->sparsity, state->step, stats->active, pairs, router.experts, router.active);
        lambda_update(&state->sparsity, stats->active, pairs, router.experts, router.active); // (Eq. 7, 8)
    }
    state->sequences += (int64_t)s->micro_batches * s->B * s->ranks;
    state->step++;
    return finite;
}

#endif
