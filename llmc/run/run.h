/*
A run: a model, its data, its state and its log, whatever trainer computes it. What is done with one stands in
the files beside this one; a trainer includes main.h last, below all that a run calls (trainer.h).

    open.h        options -> model, weights, state, data      train.h          step after step (step.h)
    evaluate.h    validation; the dump for checkers           bench.h          speed
    statistics.h  which experts take which tokens             export.h         for Hugging Face's libraries
    flips.h       how much a step changes that                interactive.h    --sample, by generate.h
    trace.h       one text's experts, gates, losses           generate_run.h   --generate, by generate.h
    main.h        which of these                              score_run.h      --score, by score.h

Letters: B sequences, T tokens each, N = B T, L layers, V vocabulary, E = E_tot experts, k = k_tot active.
*/
#ifndef RUN_H
#define RUN_H

#include "llmc/files/checkpoint.h"
#include "llmc/files/dataloader.h"
#include "llmc/files/domains.h"
#include "llmc/files/logger.h"
#include "llmc/files/prefetch.h"
#include "llmc/files/tokenizer.h"
#include "llmc/run/options.h"
#include "llmc/run/launch.h"
#include "llmc/run/ranks.h"
#include "llmc/step.h"
#include "llmc/trainer.h"
#include <signal.h>
// defines: checkpoint_save; StepRecord; Prefetcher; Tokenizer; Options; RunState, train_step; Model;
// sig_atomic_t

static volatile sig_atomic_t stop_requested; // a signal's only way to speak

typedef struct Statistics Statistics; // statistics.h
typedef struct Flips Flips;           // flips.h
typedef struct Trace Trace;           // trace.h

typedef struct {
    Options options;
    Launch launch;
    Ranks ranks;
    Config config;
    Model *model;
    StepSettings step;
    RunState state;
    Provenance provenance; // which run, on which data
    int lock;              // of the folder that it writes to; -1: none
    DataLoader train;
    Prefetcher ahead;    // batches of `train`, assembled while a step computes
    DataDomain *domains; // to validate on
    int num_domains;
    Tokenizer *tokenizer;   // NULL: no text can be shown
    Statistics *statistics; // NULL where it was not asked for, and so the next two
    Flips *flips;
    Trace *trace;
    char log_path[PATH_SIZE];
    FILE *log;
    StepStats stats;
    double *layer_sparsity; // [L]
    int *inputs, *targets;  // [B, T]
    int bad_steps;          // non-finite, in a row
    int *off_steps;         // [L] without an active expert, in a row
    int64_t last_saved;     // step of the newest checkpoint, -1: none
    int64_t good_step;      // the newest whose weights have given a usual loss since, -1: none
    double usual_loss;      // recent mean of losses that were usual, 0: none yet
    int risen_steps;        // in a row, far above it
    int most_off;           // layers that have been said to be off
    double step_seconds;    // recent mean
    int64_t first_step;     // of this process
    double started;         // seconds_now() then
} Run;

static inline void get_from_model(void *m, int which, int64_t first, int64_t n, float *out) {
    model_get((Model *)m, (ModelBuffer)which, first, n, out);
}

static inline void set_in_model(void *m, int which, int64_t first, int64_t n, const float *x) {
    model_set((Model *)m, (ModelBuffer)which, first, n, x);
}

// one of the model's buffers: to read from files what this rank keeps of it, or to write what it owns
static inline FlatBuffer model_buffer(Model *m, ModelBuffer which, Holding holding) {
    FlatBuffer buffer = {model_table(m), NULL, 0, m, which, get_from_model, set_in_model};
    buffer.ranges = model_ranges(m, holding, &buffer.count);
    return buffer;
}

static inline int every(int64_t period, int64_t step) {
    return period > 0 && step % period == 0;
}

static inline int has_lambda(const Run *run) {
    return router_has_lambda(run->config.router.method);
}

// how a text is routed that grows, or is scored, without a batch around it
static inline RouterMethod method_alone(const Run *run) {
    return router_row(run->config.router.method)->for_one_token;
}

static inline void warn_of_method_alone(const Run *run, const char *what) {
    RouterMethod method = run->config.router.method, alone = method_alone(run);
    if (alone != method) {
        warn("%s lets experts choose among a batch's tokens, which are no part of a text: %s routes as %s",
             router_name(method), what, router_name(alone));
    }
}

// windows of a domain that are validated, at most
static inline int64_t validation_windows(const Run *run) {
    const Options *o = &run->options;
    if (o->stats[0] == '\0') {
        return o->val_batches * o->batch;
    }
    return o->stats_tokens == 0 ? INT64_MAX : (o->stats_tokens - 1) / o->seq_len + 1; // for any batch
}

// what the log has of a step that took so many seconds; before: the state that it began with
static inline void fill_record(Run *run, StepRecord *r, const RunState *before, double seconds) {
    const Config *c = &run->config;
    const StepStats *s = &run->stats;
    int E = c->router.experts;
    int64_t cells = (int64_t)c->layers * E, counted = 0;
    memset(r, 0, sizeof(*r));
    r->step = before->step;
    r->lm_loss = s->lm_loss;
    r->reg_loss = s->reg_loss;
    r->lambda = before->sparsity.lambda;
    r->stage = has_lambda(run) ? run->state.sparsity.stage : 0;
    r->layers = c->layers;
    r->experts = E;
    r->layer_sparsity = run->layer_sparsity;
    r->tokens_per_expert.min = s->counts[0];
    for (int l = 0; l < c->layers; l++) {
        int64_t active = 0;
        for (int e = 0; e < E; e++) {
            int64_t count = s->counts[(int64_t)l * E + e];
            active += count;
            r->tokens_per_expert.min = count < r->tokens_per_expert.min ? count : r->tokens_per_expert.min;
            r->tokens_per_expert.max = count > r->tokens_per_expert.max ? count : r->tokens_per_expert.max;
            r->dead_experts += count == 0 && router_has_mask(c->router.method);
        }
        counted += active;
        run->layer_sparsity[l] = step_sparsity(c->router, active, s->tokens * E);
    }
    r->tokens_per_expert.mean = (double)counted / (double)cells;
    r->zero_expert_tokens = s->zero_expert;
    r->sparsity = step_sparsity(c->router, s->active, s->tokens * cells);
    r->active_experts = (double)s->active / (double)(s->tokens * c->layers);
    r->grad_norm = s->grad_norm;
    r->lr = schedule_lr(run->step.schedule, before->step);
    r->ms = 1000.0 * seconds;
    r->tok_s = (double)s->tokens / seconds;
    double sequences = (double)s->tokens / (double)run->options.seq_len;
    r->tflops = config_flops(c, run->options.seq_len, c->router.active) * sequences / seconds * 1e-12;
    r->tflops_active = config_flops(c, run->options.seq_len, r->active_experts) * sequences / seconds * 1e-12;
    double peak = 1e-12 * model_peak_flops(run->model);
    r->mfu = peak > 0.0 ? r->tflops / peak : -1.0;
    r->mfu_active = peak > 0.0 ? r->tflops_active / peak : -1.0;
    r->mem_gb = model_memory_gb(run->model);
    r->time = unix_time();
    r->ms_waiting = s->ms_waiting;
    r->stage2_step = has_lambda(run) ? run->state.sparsity.stage2_step : -1;
    r->stage3_step = has_lambda(run) ? run->state.sparsity.stage3_step : -1;
    r->flip_rate = r->flip_count = -1.0;
    r->layer_expert_tokens = every(run->options.log_experts_every, before->step) ? s->counts : NULL;
}

// all but the newest --keep checkpoints go
static inline void prune(const Run *run) {
    if (run->ranks.rank == 0) {
        remove_oldest(run->options.out, run->last_saved, run->options.keep);
    }
}

// A checkpoint; none after a step that was not finite. Earlier ones stay until its weights have been seen to
// compute
static inline void save(Run *run) {
    Model *m = run->model;
    char remedy[PATH_SIZE];
    if (run->bad_steps > 0) {
        warn("step %lld is not saved: the loss or the gradient norm was not finite",
             (long long)run->state.step);
        return;
    }
    ranks_beat(&run->ranks, run->state.step, "saving");
    FlatBuffer buffers[] = {model_buffer(m, BUFFER_PARAMS, RANGES_OWNED),
                            model_buffer(m, BUFFER_EXP_AVG, RANGES_OWNED),
                            model_buffer(m, BUFFER_EXP_AVG_SQ, RANGES_OWNED)};
    checkpoint_save(&run->ranks, run->options.out, &run->config, buffers, &run->state, &run->provenance,
                    &run->options, run->tokenizer);
    run->last_saved = run->state.step;
    check_format(remedy, sizeof(remedy), "--resume %s (its last whole checkpoint: step_%08lld)",
                 run->options.out, (long long)run->state.step);
    ranks_remedy(&run->ranks, remedy);
    printf("saved %s/step_%08lld\n", run->options.out, (long long)run->state.step);
    fflush(stdout);
}

// what was learned before data that cannot be read is kept
static inline void save_before_end(void *run) {
    save((Run *)run);
}

#endif
