/*
A run: what a trainer does with a model, whatever computes it. The CPU trainer and the CUDA trainer share all
of it: options, data, the log, checkpoints, validation, sampling, dump, bench. What a step is stands in
step.h, what a run needs of a model in trainer.h; a trainer includes this file last, below all that it calls.

    open_run   options -> model, weights, state, data
    train      step after step: log, checkpoints, validation, samples; the third step in a row that is not
               finite ends the run

Letters: B sequences, T tokens each, N = B T, L layers, V vocabulary, E = E_tot experts, k = k_tot active.
Errors: what a run cannot do without is opened, and refused, before it starts (startup.h has the options').
*/
#ifndef RUN_H
#define RUN_H

#include <signal.h>
// defines: signal, sig_atomic_t
#include "llmc/config.h"
#include "llmc/files/checkpoint.h"
#include "llmc/files/dataloader.h"
#include "llmc/files/domains.h"
#include "llmc/files/dump.h"
#include "llmc/files/logger.h"
#include "llmc/files/prefetch.h"
#include "llmc/files/tokenizer.h"
#include "llmc/lambda.h"
#include "llmc/rng.h"
#include "llmc/run/options.h"
#include "llmc/run/sampler.h"
#include "llmc/run/startup.h"
#include "llmc/step.h"
#include "llmc/trainer.h"

// ----------------------------------------------------------------------------
// a run

enum { BAD_STEPS_LIMIT = 3 }; // non-finite steps in a row that end a run

static volatile sig_atomic_t stop_requested; // a signal's only way to speak

typedef struct {
    Options options;
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
    Tokenizer *tokenizer; // NULL: no text can be shown
    char log_path[PATH_SIZE];
    FILE *log;
    StepStats stats;
    double *layer_sparsity; // [L]
    int *inputs, *targets;  // [B, T]
    int bad_steps;          // non-finite, in a row
    int device;             // which of the machine's GPUs
    int64_t first_step;     // of this process
    double started;         // seconds_now() then
} Run;

static inline int has_lambda(const Run *run) {
    return router_has_lambda(run->config.router.method);
}

// what the log has of a step that took so many seconds; before: the state that it began with
static inline void fill_record(Run *run, StepRecord *r, const RunState *before, double seconds) {
    const Config *c = &run->config;
    const StepStats *s = &run->stats;
    int E = c->router.experts;
    int64_t cells = (int64_t)c->layers * E;
    memset(r, 0, sizeof(*r));
    r->step = before->step;
    r->lm_loss = s->lm_loss;
    r->reg_loss = s->reg_loss;
    r->lambda = before->sparsity.lambda;
    r->stage = has_lambda(run) ? run->state.sparsity.stage : 0;
    r->layers = c->layers;
    r->layer_sparsity = run->layer_sparsity;
    r->tokens_min = s->counts[0];
    for (int l = 0; l < c->layers; l++) {
        int64_t active = 0;
        for (int e = 0; e < E; e++) {
            int64_t count = s->counts[(int64_t)l * E + e];
            active += count;
            r->tokens_min = count < r->tokens_min ? count : r->tokens_min;
            r->tokens_max = count > r->tokens_max ? count : r->tokens_max;
            r->dead_experts += count == 0;
        }
        run->layer_sparsity[l] = sparsity_of(active, s->tokens * E);
    }
    r->tokens_mean = (double)s->active / (double)cells;
    r->zero_expert_tokens = s->zero_expert;
    r->sparsity = sparsity_of(s->active, s->tokens * cells);
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
}

static inline void save(Run *run) {
    Model *m = run->model;
    float *params = model_borrow(m, BUFFER_PARAMS);
    float *exp_avg = model_borrow(m, BUFFER_EXP_AVG), *exp_avg_sq = model_borrow(m, BUFFER_EXP_AVG_SQ);
    checkpoint_save(run->options.out, &run->config, model_table(m), params, exp_avg, exp_avg_sq, &run->state,
                    &run->provenance, &run->options);
    model_return(m, BUFFER_EXP_AVG_SQ, exp_avg_sq, 0);
    model_return(m, BUFFER_EXP_AVG, exp_avg, 0);
    model_return(m, BUFFER_PARAMS, params, 0);
    printf("saved %s/step_%08lld\n", run->options.out, (long long)run->state.step);
    fflush(stdout);
}

// what was learned before data that cannot be read is kept
static inline void save_before_end(void *run) {
    save((Run *)run);
}

// ----------------------------------------------------------------------------
// validation

// Mean loss of up to val_batches micro-batches of one shard, its windows in order; *tokens counts the
// targets. 0 when a token has changed since the run began into one that the vocabulary does not have
static inline int validate_domain(Run *run, const DataLoader *loader, double *loss, int64_t *tokens) {
    const Options *o = &run->options;
    int64_t sequences = dataloader_num_sequences(loader), bad_token;
    int64_t most = o->val_batches * o->batch;
    double sum = 0.0;
    *tokens = 0;
    sequences = sequences < most ? sequences : most;
    for (int64_t first = 0; first < sequences; first += o->batch) {
        int B = (int)(sequences - first < o->batch ? sequences - first : o->batch);
        int64_t N = (int64_t)B * o->seq_len;
        for (int b = 0; b < B; b++) {
            if (dataloader_try_sequence(loader, first + b, run->config.vocab_size,
                                        run->inputs + b * o->seq_len, run->targets + b * o->seq_len,
                                        &bad_token) != NULL) {
                return 0;
            }
        }
        sum += model_loss(run->model, run->inputs, run->targets, B, (int)o->seq_len) * (double)N;
        *tokens += N;
    }
    *loss = sum / (double)*tokens;
    return 1;
}

// every domain of --val-data, then all together; ec routes within its micro-batch
static inline void validate(Run *run) {
    double sum = 0.0;
    int64_t total = 0;
    if (run->num_domains == 0) {
        return;
    }
    model_route(run->model, run->config.router.method, run->config.router.active);
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < run->num_domains; i++) {
        const DataDomain *domain = &run->domains[i];
        int64_t tokens;
        double loss;
        if (!validate_domain(run, &domain->loader, &loss, &tokens)) {
            warn("%s was not validated: it has changed since the run began, and is damaged", domain->path);
            continue;
        }
        sum += loss * (double)tokens;
        total += tokens;
        printf(" %s %.4f", domain->name, loss);
        fflush(stdout);
        if (run->log != NULL) {
            log_validation(run->log, run->log_path, run->state.step, loss, domain->name);
        }
    }
    if (total == 0) {
        printf("\n");
        return;
    }
    printf(" | all %.4f\n", sum / (double)total);
    if (run->log != NULL) {
        log_validation(run->log, run->log_path, run->state.step, sum / (double)total, "all");
    }
}

// ----------------------------------------------------------------------------
// sampling

// a generated token has no batch in which experts could choose among tokens: ec then routes as topk
static inline void generate(Run *run, const char *prompt) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    RouterMethod method = c->router.method;
    uint64_t stream = ((uint64_t)1 << 32) + (uint64_t)run->state.step; // apart from the tensors' streams
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    tokenizer_encode(run->tokenizer, prompt, strlen(prompt), &ids, &n, &capacity);
    int window = (int)o->seq_len;
    int *context = NEW(int, window + 1);
    float *logits = NEW(float, c->vocab_size);
    int length = 1, cached = 0;
    context[0] = run->tokenizer->eot; // as every document begins
    for (size_t i = n > (size_t)(window - 1) ? n - (size_t)(window - 1) : 0; i < n; i++) {
        context[length++] = ids[i];
    }
    int allowed = run->tokenizer->vocab_size;
    model_route(m, router_row(method)->for_one_token, c->router.active);
    printf("%s", prompt);
    for (int64_t i = 0; i < o->sample_tokens && !stop_requested; i++) {
        if (length > window) { // the context is full: go on from its second half
            cached = 0;
            length = window / 2 > 0 ? window / 2 : 1;
            memmove(context, context + window + 1 - length, (size_t)length * sizeof(int));
        }
        // the sampler's own copy: it sorts
        memcpy(logits, model_next_logits(m, context, length, cached), (size_t)c->vocab_size * sizeof(float));
        cached = length;
        double u = rng_uniform((uint64_t)o->seed, stream, (uint64_t)i);
        int token = sample_token(logits, allowed, o->temperature, (int)o->top_k, u);
        if (token == run->tokenizer->eot) {
            break;
        }
        context[length++] = token;
        size_t size;
        const char *piece = tokenizer_piece(run->tokenizer, token, &size);
        fwrite(piece, 1, size, stdout);
        fflush(stdout);
    }
    printf("\n");
    model_route(m, method, c->router.active);
    free(context);
    free(logits);
    free(ids);
}

static inline void show_sample(Run *run, const char *prompt) {
    if (run->tokenizer == NULL || run->options.sample_tokens == 0) {
        return;
    }
    RouterMethod method = run->config.router.method, alone = router_row(method)->for_one_token;
    if (alone != method) {
        warn("%s cannot route a token without its batch: sampling routes as %s", router_name(method),
             router_name(alone));
    }
    printf("--- sample after step %lld\n", (long long)run->state.step);
    generate(run, prompt);
    printf("---\n");
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// dump: one micro-batch, forward and backward in training mode, for checkers (dump.h)

static inline void dump(Run *run) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    int B = (int)o->batch, T = (int)o->seq_len, dense = !router_has_experts(c->router.method);
    int64_t N = (int64_t)B * T;
    double weight = router_loss_weight(c->router.method, run->state.sparsity.lambda, o->aux_coeff);
    float **routes = o->route_from[0] != '\0' && !dense ? dump_read_routes(o->route_from, c, N) : NULL;
    float **gates = dense ? NULL : layer_matrices(c, N);
    float *logits = N <= DUMP_MOST_LOGIT_ROWS ? NEW(float, N * c->vocab_size) : NULL;
    for (int b = 0; b < B; b++) {
        dataloader_sequence(&run->train, b, c->vocab_size, run->inputs + b * T, run->targets + b * T);
    }
    stats_reset(&run->stats, c);
    model_examine(m, run->inputs, run->targets, B, T, weight, (const float *const *)routes, logits, gates,
                  &run->stats);
    double lm_loss = run->stats.lm_loss, reg = run->stats.reg_loss;
    double loss = lm_loss + weight * reg;
    double sparsity = dense ? 0.0 : sparsity_of(run->stats.active, N * c->layers * c->router.experts);
    float scalars[DUMP_SCALARS] = {(float)lm_loss, (float)reg, (float)loss, (float)sparsity};
    float *grad = model_borrow(m, BUFFER_GRADS);
    dump_write(o->dump, c, model_table(m), N, scalars, logits, (const float *const *)gates, grad);
    model_return(m, BUFFER_GRADS, grad, 0);
    printf("lm_loss %.7f reg_loss %.7f loss %.7f sparsity %.7f -> %s\n", lm_loss, reg, loss, sparsity,
           o->dump);
    free_layer_matrices(routes);
    free_layer_matrices(gates);
    free(logits);
}

// ----------------------------------------------------------------------------
// training

static inline void announce_stages(const Run *run, int before) {
    const LambdaState *s = &run->state.sparsity;
    if (has_lambda(run) && before < STAGE_SPARSIFYING && s->stage >= STAGE_SPARSIFYING) {
        printf("stage II (sparsifying) began at step %lld\n", (long long)s->stage2_step);
    }
    if (has_lambda(run) && before < STAGE_SPARSE && s->stage == STAGE_SPARSE) {
        printf("stage III (sparse) began at step %lld: the settling time\n", (long long)s->stage3_step);
    }
}

static inline int every(int64_t period, int64_t step) {
    return period > 0 && step % period == 0;
}

static inline int out_of_time(const Run *run) {
    return run->options.max_minutes > 0.0 && seconds_now() - run->started > 60.0 * run->options.max_minutes;
}

// counts non-finite steps in a row; the weights are as they were before them
static inline void guard_finite(Run *run, int finite) {
    run->bad_steps = finite ? 0 : run->bad_steps + 1;
    if (finite) {
        return;
    }
    warn("step %lld: the loss or the gradient norm is not finite: the update is skipped",
         (long long)run->state.step - 1);
    if (run->bad_steps == BAD_STEPS_LIMIT) {
        save(run);
        die("%d non-finite steps in a row\n  ---> --resume %s with a smaller --lr, or look at the data",
            BAD_STEPS_LIMIT, run->options.out);
    }
}

static inline void train(Run *run) {
    const Options *o = &run->options;
    double last_print = 0.0;
    while (run->state.step < o->steps && !stop_requested && !out_of_time(run)) {
        StepRecord record;
        // before a step, not after the last: a run resumed here validates here, so the log misses and repeats
        // nothing
        if (run->state.step > 0 && every(o->val_every, run->state.step)) {
            validate(run);
        }
        if (run->state.step > 0 && every(o->sample_every, run->state.step)) {
            show_sample(run, "");
        }
        RunState before = run->state;
        double begin = seconds_now();
        int finite = train_step(run->model, &run->ahead, &run->config, &run->step, &run->state, &run->stats);
        double now = seconds_now();
        fill_record(run, &record, &before, now - begin);
        log_step(run->log, run->log_path, &record);
        announce_stages(run, before.sparsity.stage);
        int64_t done = run->state.step - run->first_step;
        if (now - last_print > 1.0 || done <= 3 || run->state.step == o->steps) {
            print_step(&record, o->steps,
                       (now - run->started) / (double)done * (double)(o->steps - run->state.step));
            last_print = now;
        }
        guard_finite(run, finite);
        if (run->state.step == o->steps) {
            break; // the end saves, validates and samples below
        }
        if (every(o->save_every, run->state.step)) {
            save(run);
        }
    }
    double seconds = seconds_now() - run->started;
    printf("%lld steps in %.1f s; the loader was waited for %.2f %% of it\n",
           (long long)(run->state.step - run->first_step), seconds, 0.1 * run->ahead.wait_ms / seconds);
    if (run->state.step > run->first_step || o->resume[0] == '\0') {
        save(run); // before anything that could fail
    }
    if (run->state.step < o->steps) {
        printf("stopped at step %lld of %lld\n  ---> continue with --resume %s\n", (long long)run->state.step,
               (long long)o->steps, run->options.out);
        return;
    }
    validate(run);
    show_sample(run, "");
}

#endif
