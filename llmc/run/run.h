/*
A run: what a trainer does with a model, whatever computes it. The CPU trainer and the CUDA trainer share all
of it: options, data, schedule, lambda and its stages, clipping, the log, checkpoints, validation, sampling,
dump, bench. The model itself is behind the interface below, which each trainer implements at its end.

    a step   gradients of the mean over the micro-batches of lm_loss + weight * reg (Eq. 6), their norm
             clip by min(1, grad_clip / norm), AdamW
             then lambda, by the sparsity S that the step has seen (lambda.h)
    a step whose loss or norm is not finite updates nothing; the third in a row ends the run

Letters: B sequences, T tokens each, N = B T, L layers, V vocabulary, E = E_tot experts, k = k_tot active.
Errors: what a run cannot do without is opened, and refused, before it starts (startup.h has the options').
*/
#ifndef RUN_H
#define RUN_H

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: signal, open, flock; omp_set_num_threads, omp_get_max_threads
#include "llmc/adamw.h"
#include "llmc/files/checkpoint.h"
#include "llmc/config.h"
#include "llmc/files/dataloader.h"
#include "llmc/files/dump.h"
#include "llmc/lambda.h"
#include "llmc/files/logger.h"
#include "llmc/model.h"
#include "llmc/run/options.h"
#include "llmc/files/prefetch.h"
#include "llmc/rng.h"
#include "llmc/run/sampler.h"
#include "llmc/schedule.h"
#include "llmc/run/startup.h"
#include "llmc/files/tokenizer.h"

// ----------------------------------------------------------------------------
// what a run needs of a model: each trainer defines these

typedef struct Model Model;

// what a model is opened for: how much memory it takes
typedef enum { FOR_INFERENCE, FOR_GRADIENTS, FOR_TRAINING } Purpose;
typedef enum { BUFFER_PARAMS, BUFFER_GRADS, BUFFER_EXP_AVG, BUFFER_EXP_AVG_SQ } ModelBuffer;

// what a step learned, over its micro-batches. A run zeroes it, a model adds to it
typedef struct {
    int64_t tokens;           // N of the step
    int64_t *counts;          // [L, E] tokens of each expert
    int64_t zero_expert;      // (layer, token) pairs without an expert
    int64_t active;           // pairs
    double lm_loss, reg_loss; // means over the micro-batches
    double grad_norm;         // of all gradients together
} StepStats;

extern const char *const program_name; // "./train_remoe"

// Allocates all that micro-batches of o->batch x o->seq_len need, and refuses what does not fit. For training,
// the start-up table's lines about memory are printed first. Weights, gradients and moments are zero
Model *model_open(const Config *config, const Options *o, Purpose purpose);
void model_close(Model *m);
const TensorTable *model_table(const Model *m);

// One of the flat buffers [num_params], on the host; what model_return gets back with changed = 1 becomes the
// model's. Between the two calls nothing else may use it
float *model_borrow(Model *m, ModelBuffer which);
void model_return(Model *m, ModelBuffer which, float *buffer, int changed);

// the method and k_tot in force: topk's warm-up raises k, ec samples as topk
void model_route(Model *m, RouterMethod method, int k);

// Gradients of a step's mean over micro_batches batches of B x T taken from `ahead`, into the gradient buffer;
// losses, routing and the gradient's norm into s
void model_gradients(Model *m, Prefetcher *ahead, int micro_batches, int B, int T, double reg_weight,
                     StepStats *s);
// AdamW's step t (from 1) with the gradients times grad_scale
void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t);
// mean over the B x T targets, no gradient
double model_loss(Model *m, const int *inputs, const int *targets, int B, int T);
// [V] on the host: logits of position n - 1 of one sequence; the positions before start are in the cache
const float *model_next_logits(Model *m, const int *ids, int n, int start);
// One micro-batch forward and backward, its gradient into the gradient buffer. forced: NULL, or L active sets
// [N, E] that replace the router's own; logits: NULL, or [N, V]; gates: NULL, or L matrices [N, E]
void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, StepStats *s);

double model_memory_gb(const Model *m);  // largest use so far
double model_peak_flops(const Model *m); // of the device, dense, at its products' precision; <= 0: unknown
void model_profile(Model *m, int on);    // 1: measure where the time goes from here; 0: print the table

// ----------------------------------------------------------------------------
// a run

enum { BAD_STEPS_LIMIT = 3 }; // non-finite steps in a row that end a run

static volatile sig_atomic_t stop_requested; // a signal's only way to speak

static inline void request_stop(int signal_number) {
    if (signal_number == SIGINT) {
        signal(SIGINT, SIG_DFL); // a second Ctrl-C does not wait for the end of the step
    }
    stop_requested = 1;
}

typedef struct {
    Options options;
    Config config;
    Model *model;
    RunState state;
    Schedule schedule;
    DataLoader train;
    Prefetcher ahead;     // batches of `train`, assembled while a step computes
    Tokenizer *tokenizer; // NULL: no text can be shown
    char log_path[PATH_SIZE];
    FILE *log;
    StepStats stats;
    double *layer_sparsity; // [L]
    int *inputs, *targets;  // [B, T]
    int micro_batches;      // a step
    int bad_steps;          // non-finite, in a row
    int64_t first_step;     // of this process
    double started;         // seconds_now() then
} Run;

static inline int has_lambda(const Run *run) {
    return run->config.router.method == ROUTER_RELU;
}

static inline int k_in_force(const Options *o, const Config *c, int64_t step) {
    if (c->router.method != ROUTER_TOPK || step >= o->topk_warmup_steps) {
        return c->router.active;
    }
    int64_t k = o->topk_warmup_k * c->granularity;
    return k < c->router.experts ? (int)k : c->router.experts;
}

static inline void stats_reset(StepStats *s, const Config *c) {
    if (s->counts == NULL) {
        s->counts = NEW(int64_t, (int64_t)c->layers * c->router.experts);
    }
    memset(s->counts, 0, (size_t)(c->layers * c->router.experts) * sizeof(int64_t));
    s->tokens = s->zero_expert = s->active = 0;
    s->lm_loss = s->reg_loss = s->grad_norm = 0.0;
}

// weight of the regulariser in the loss (Eq. 6)
static inline double regulariser_weight(const Config *c, double lambda, double aux_coeff) {
    return c->router.method == ROUTER_RELU ? lambda : c->router.method == ROUTER_TOPK ? aux_coeff : 0.0;
}

static inline void fill_record(Run *run, StepRecord *r, double lr, double seconds) {
    const Config *c = &run->config;
    const StepStats *s = &run->stats;
    int E = c->router.experts;
    int64_t cells = (int64_t)c->layers * E;
    memset(r, 0, sizeof(*r));
    r->step = run->state.step;
    r->lm_loss = s->lm_loss;
    r->reg_loss = s->reg_loss;
    r->lambda = run->state.sparsity.lambda;
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
    r->lr = lr;
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

// one optimizer step: gradients, clipping, AdamW, then lambda. Fills the record; returns 0 when the step was
// skipped
static inline int train_step(Run *run, StepRecord *record) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    double begin = seconds_now();
    double lr = schedule_lr(run->schedule, run->state.step);
    double weight = regulariser_weight(c, run->state.sparsity.lambda, o->aux_coeff);
    model_route(m, c->router.method, k_in_force(o, c, run->state.step));
    stats_reset(&run->stats, c);
    model_gradients(m, &run->ahead, run->micro_batches, (int)o->batch, (int)o->seq_len, weight, &run->stats);
    double norm = run->stats.grad_norm;
    int finite = isfinite(run->stats.lm_loss) && isfinite(run->stats.reg_loss) && isfinite(norm);
    if (finite) {
        model_update(m, lr, o->weight_decay, clip_scale(norm, o->grad_clip), ++run->state.optimizer_step);
    }
    fill_record(run, record, lr, seconds_now() - begin);
    if (finite && has_lambda(run)) {
        int64_t pairs = run->stats.tokens * c->layers * c->router.experts;
        stage_update(&run->state.sparsity, run->state.step, run->stats.active, pairs, c->router.experts,
                     c->router.active);
        lambda_update(&run->state.sparsity, run->stats.active, pairs, c->router.experts, c->router.active);
    }
    record->stage = has_lambda(run) ? run->state.sparsity.stage : 0;
    run->state.sequences += (int64_t)run->micro_batches * o->batch;
    run->state.step++;
    return finite;
}

static inline void save(Run *run) {
    Model *m = run->model;
    float *params = model_borrow(m, BUFFER_PARAMS);
    float *exp_avg = model_borrow(m, BUFFER_EXP_AVG), *exp_avg_sq = model_borrow(m, BUFFER_EXP_AVG_SQ);
    checkpoint_save(run->options.out, &run->config, model_table(m), params, exp_avg, exp_avg_sq, &run->state,
                    &run->options);
    model_return(m, BUFFER_EXP_AVG_SQ, exp_avg_sq, 0);
    model_return(m, BUFFER_EXP_AVG, exp_avg, 0);
    model_return(m, BUFFER_PARAMS, params, 0);
    printf("saved %s/step_%08lld\n", run->options.out, (long long)run->state.step);
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// validation

// mean loss of up to val_batches micro-batches of one shard, its windows in order; *tokens counts the targets
static inline double validate_file(Run *run, const char *path, int64_t *tokens) {
    const Options *o = &run->options;
    DataLoader loader;
    dataloader_open(&loader, path, (int)o->seq_len, 0, 0);
    int64_t sequences = dataloader_num_sequences(&loader);
    int64_t most = o->val_batches * o->batch;
    double sum = 0.0;
    *tokens = 0;
    sequences = sequences < most ? sequences : most;
    for (int64_t first = 0; first < sequences; first += o->batch) {
        int B = (int)(sequences - first < o->batch ? sequences - first : o->batch);
        int64_t N = (int64_t)B * o->seq_len;
        for (int b = 0; b < B; b++) {
            dataloader_sequence(&loader, first + b, run->config.vocab_size, run->inputs + b * o->seq_len,
                                run->targets + b * o->seq_len);
        }
        sum += model_loss(run->model, run->inputs, run->targets, B, (int)o->seq_len) * (double)N;
        *tokens += N;
    }
    dataloader_close(&loader);
    return sum / (double)*tokens;
}

// every domain of --val-data, then all together; ec routes within its micro-batch
static inline void validate(Run *run) {
    if (run->options.val_data[0] == '\0') {
        return;
    }
    DataDomain *domains;
    int count = dataloader_domains(run->options.val_data, &domains);
    double sum = 0.0;
    int64_t total = 0;
    model_route(run->model, run->config.router.method, run->config.router.active);
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < count; i++) {
        int64_t tokens;
        double loss = validate_file(run, domains[i].path, &tokens);
        sum += loss * (double)tokens;
        total += tokens;
        printf(" %s %.4f", domains[i].name, loss);
        fflush(stdout);
        if (run->log != NULL) {
            log_validation(run->log, run->log_path, run->state.step, loss, domains[i].name);
        }
    }
    printf(" | all %.4f\n", sum / (double)total);
    if (run->log != NULL) {
        log_validation(run->log, run->log_path, run->state.step, sum / (double)total, "all");
    }
    dataloader_free_domains(domains, count);
}

// ----------------------------------------------------------------------------
// sampling

// a generated token has no batch in which experts could choose among tokens: ec takes each token's k largest
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
    model_route(m, method == ROUTER_EC ? ROUTER_TOPK : method, c->router.active);
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
    if (run->config.router.method == ROUTER_EC) {
        warn("expert choice cannot route a single token: sampling takes each token's k largest experts");
    }
    printf("--- sample after step %lld\n", (long long)run->state.step);
    generate(run, prompt);
    printf("---\n");
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// dump: one micro-batch, forward and backward in training mode, for checkers (DESIGN.md, section 4)

static inline void dump(Run *run) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    int B = (int)o->batch, T = (int)o->seq_len, dense = c->router.method == ROUTER_DENSE;
    int64_t N = (int64_t)B * T;
    double weight = regulariser_weight(c, run->state.sparsity.lambda, o->aux_coeff);
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
        int stage = run->state.sparsity.stage;
        // before a step, not after the last: a run resumed here validates here, so the log misses and repeats
        // nothing
        if (run->state.step > 0 && every(o->val_every, run->state.step)) {
            validate(run);
        }
        if (run->state.step > 0 && every(o->sample_every, run->state.step)) {
            show_sample(run, "");
        }
        int finite = train_step(run, &record);
        double now = seconds_now();
        log_step(run->log, run->log_path, &record);
        announce_stages(run, stage);
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
    save(run); // before anything that could fail
    if (run->state.step < o->steps) {
        printf("stopped at step %lld of %lld\n  ---> continue with --resume %s\n", (long long)run->state.step,
               (long long)o->steps, run->options.out);
        return;
    }
    validate(run);
    show_sample(run, "");
}

enum { SETTLED_STEPS = 20, TIMED_STEPS = 10, MOST_STEPS = 2000, MOST_ROUNDS = 5 };

// trains with one micro-batch a step until stage III, and S within 0.005 of its target over the last
// SETTLED_STEPS
static inline void bench_settle(Run *run, double target) {
    double recent[SETTLED_STEPS] = {0};
    int micro_batches = run->micro_batches;
    run->micro_batches = 1;
    for (int step = 0; has_lambda(run); step++) {
        StepRecord r;
        double mean = 0.0;
        train_step(run, &r);
        recent[step % SETTLED_STEPS] = r.sparsity;
        for (int i = 0; i < SETTLED_STEPS; i++) {
            mean += recent[i] / SETTLED_STEPS;
        }
        if (r.stage == STAGE_SPARSE && step >= SETTLED_STEPS && fabs(mean - target) < 0.005) {
            break;
        }
        if (step == MOST_STEPS) {
            warn("S is still %.4f, not %.4f, after %d steps: the timing below is of another sparsity", mean,
                 target, MOST_STEPS);
            break;
        }
    }
    run->micro_batches = micro_batches;
}

static inline int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// one more step, for where its time goes: measuring may slow it
static inline void bench_profile(Run *run) {
    StepRecord r;
    model_profile(run->model, 1);
    train_step(run, &r);
    model_profile(run->model, 0);
}

typedef struct {
    double ms[TIMED_STEPS];  // ascending
    double sparsity, active; // means
} BenchRound;

static inline BenchRound bench_time(Run *run) {
    BenchRound timed = {{0}, 0.0, 0.0};
    for (int i = 0; i < TIMED_STEPS; i++) {
        StepRecord r;
        train_step(run, &r);
        timed.ms[i] = r.ms;
        timed.sparsity += r.sparsity / TIMED_STEPS;
        timed.active += r.active_experts / TIMED_STEPS;
    }
    qsort(timed.ms, TIMED_STEPS, sizeof(double), compare_doubles);
    return timed;
}

// Whole steps at the given global batch, once S has settled. Sparser is faster, and of many experts 0.005 of S
// are a large part of k: until S is within 0.005 and k within 4 % of the target, steps are timed anew. The
// round that came nearest
static inline BenchRound bench_rounds(Run *run, double target) {
    const Router *router = &run->config.router;
    double enough = fmin(0.005, 0.04 * router->active / router->experts);
    BenchRound best = {{0}, 0.0, 0.0};
    for (int i = 0; i < MOST_ROUNDS; i++) {
        bench_settle(run, target);
        BenchRound timed = bench_time(run);
        if (i == 0 || fabs(timed.sparsity - target) < fabs(best.sparsity - target)) {
            best = timed;
        }
        if (!has_lambda(run) || fabs(best.sparsity - target) < enough) {
            break;
        }
    }
    return best;
}

static inline void bench(Run *run) {
    const Config *c = &run->config;
    double target = 1.0 - (double)c->router.active / c->router.experts;
    BenchRound timed = bench_rounds(run, target);
    double seconds = 0.5e-3 * (timed.ms[(TIMED_STEPS - 1) / 2] + timed.ms[TIMED_STEPS / 2]); // the median
    double tokens = (double)run->stats.tokens, T = (double)run->options.seq_len;
    double nominal = config_flops(c, run->options.seq_len, c->router.active) * tokens / T / seconds;
    double measured = config_flops(c, run->options.seq_len, timed.active) * tokens / T / seconds;
    double peak = model_peak_flops(run->model), unit = nominal < 1e12 ? 1e9 : 1e12;
    printf("bench     %.0f tokens a step, median %.1f ms (%.1f to %.1f) | S %.4f, target %.4f\n", tokens,
           1e3 * seconds, timed.ms[0], timed.ms[TIMED_STEPS - 1], timed.sparsity, target);
    printf("          %.0f tok/s | %.1f %cFLOP/s at nominal k, %.1f at the measured active experts",
           tokens / seconds, nominal / unit, unit < 1e12 ? 'G' : 'T', measured / unit);
    if (peak > 0.0) {
        printf(" | mfu %.4f, mfu_active %.4f", nominal / peak, measured / peak);
    }
    printf(" | %.2f GB\n", model_memory_gb(run->model));
    bench_profile(run);
}

// ----------------------------------------------------------------------------
// setting up a run

// the first lines of the start-up table: before anything is allocated or opened, so that a refusal has its
// figures above it
static inline void print_model(const Options *o, const Config *c) {
    const Router *r = &c->router;
    const char *name = o->resume[0] != '\0' ? o->resume
                       : o->load[0] != '\0' ? o->load
                                            : options_model_name(o);
    double gflops = 1e-9 * config_flops(c, o->seq_len, r->active);
    printf("model     %s | L %d, d %d, H %d, KV %d, hd %d, F %d, V %d, T %lld\n", name, c->layers, c->hidden,
           c->heads, c->kv_heads, c->head_size, c->ffn, c->vocab_size, (long long)o->seq_len);
    printf("router    %s | %d of %d experts (granularity %d)%s\n", router_name(r->method), r->active,
           r->experts, c->granularity,
           r->method == ROUTER_RELU && !r->load_balance ? ", no load balance" : "");
    printf("params    %lld total, %lld active | %.*f GFLOPs a sequence\n",
           (long long)config_params(c, r->experts), (long long)config_params(c, r->active),
           gflops < 100.0 ? 3 : 1, gflops);
}

// weights, moments and state: drawn from the seed, loaded, or resumed
static inline void build_model(Run *run) {
    const Options *o = &run->options;
    Config *c = &run->config;
    Purpose purpose = wants_training(o) ? FOR_TRAINING : o->dump[0] != '\0' ? FOR_GRADIENTS : FOR_INFERENCE;
    const char *folder = o->resume[0] != '\0' ? o->resume : o->load;
    char path[PATH_SIZE];
    if (folder[0] != '\0') {
        check_format(path, sizeof(path), "%s/config.json", folder);
        *c = config_read(path);
    } else {
        *c = config_from_options(o);
    }
    c->max_seq_len = o->seq_len > c->max_seq_len || folder[0] == '\0' ? (int)o->seq_len : c->max_seq_len;
    if (purpose == FOR_TRAINING) {
        print_model(o, c);
    }
    run->model = model_open(c, o, purpose);
    float *params = model_borrow(run->model, BUFFER_PARAMS);
    if (folder[0] == '\0') {
        model_init(params, model_table(run->model), (uint64_t)o->seed);
    } else {
        checkpoint_load_weights(params, folder, model_table(run->model));
    }
    model_return(run->model, BUFFER_PARAMS, params, 1);
}

// AdamW's moments, if the folder has them
static inline int load_moments(Run *run, const char *folder) {
    Model *m = run->model;
    float *exp_avg = model_borrow(m, BUFFER_EXP_AVG), *exp_avg_sq = model_borrow(m, BUFFER_EXP_AVG_SQ);
    int found = checkpoint_load_moments(exp_avg, exp_avg_sq, folder, model_table(m));
    model_return(m, BUFFER_EXP_AVG_SQ, exp_avg_sq, found);
    model_return(m, BUFFER_EXP_AVG, exp_avg, found);
    return found;
}

static inline void build_state(Run *run, int lambda_given) {
    const Options *o = &run->options;
    RunState *state = &run->state;
    int resuming = o->resume[0] != '\0';
    RunState loaded = *state;
    state->sparsity = resuming ? loaded.sparsity : lambda_init(o->lambda_init, o->alpha);
    state->sparsity.alpha = (float)o->alpha;
    if (o->load[0] != '\0' && checkpoint_load_state(&loaded, NULL, o->load)) {
        state->optimizer_step = loaded.optimizer_step;
        state->sparsity.lambda = lambda_given ? (float)o->lambda_init : loaded.sparsity.lambda;
    }
    if (wants_training(o)) {
        const char *folder = resuming ? o->resume : o->load;
        int found = folder[0] != '\0' && load_moments(run, folder);
        if (!found) {
            state->optimizer_step = 0; // zero moments: their bias correction starts anew
        }
        if (resuming && !found) {
            die("%s has no optimizer.safetensors\n  ---> start from its weights: --load %s", folder, folder);
        }
    }
    int64_t warmup = o->warmup_steps >= 0 ? o->warmup_steps : o->steps / 100;
    Schedule schedule = {o->lr, o->lr_min, warmup, o->steps};
    run->schedule = schedule;
    run->first_step = state->step;
}

// data, text and buffers; what a run cannot do without is opened before it starts
static inline void open_data(Run *run) {
    const Options *o = &run->options;
    const Config *c = &run->config;
    char vocab[PATH_SIZE];
    check_format(vocab, sizeof(vocab), "%s/vocab.json", o->tokenizer);
    if (o->eval || o->dump[0] != '\0') {
        run->tokenizer = NULL; // no text is shown
    } else if (o->tokenizer[0] != '\0' && path_exists(vocab)) {
        run->tokenizer = tokenizer_load(o->tokenizer);
        if (run->tokenizer->vocab_size > c->vocab_size) {
            die("%s has %d tokens, the model's vocabulary only %d\n  ---> name the model's own --tokenizer",
                o->tokenizer, run->tokenizer->vocab_size, c->vocab_size);
        }
    } else if (o->sample[0] != '\0') {
        die("no tokenizer: there is no %s\n  ---> name its folder with --tokenizer, or run `make "
            "sample-data`",
            vocab);
    } else if (o->tokenizer[0] != '\0') {
        warn("no samples will be shown: there is no %s\n  ---> name a folder with --tokenizer", vocab);
    }
    run->inputs = NEW(int, o->batch * o->seq_len);
    run->targets = NEW(int, o->batch * o->seq_len);
    run->layer_sparsity = NEW(double, c->layers);
    if (!o->eval && o->sample[0] == '\0') {
        int shuffle = o->dump[0] == '\0' && o->shuffle;
        dataloader_open(&run->train, o->train_data, (int)o->seq_len, (uint64_t)o->seed, shuffle);
    }
    if (wants_training(
            o)) { // micro-batch after micro-batch in the run's order, or the first one again and again
        int64_t first = o->overfit_batch ? 0 : run->state.sequences;
        prefetch_start(&run->ahead, &run->train, (int)o->batch, c->vocab_size, first,
                       o->overfit_batch ? 0 : o->batch);
    }
    run->micro_batches = (int)(o->global_batch / o->batch);
}

static inline void print_table(const Run *run) {
    const Options *o = &run->options;
    const Router *r = &run->config.router;
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    printf("data      ");
    dataloader_print(&run->train, stdout);
    printf(" | %.1f epochs\n",
           (double)o->steps * (double)o->global_batch / (double)dataloader_num_sequences(&run->train));
    printf("schedule  %lld steps of %lld x %lld sequences | lr %g -> %g, warm-up %lld | seed %lld\n",
           (long long)o->steps, (long long)(o->global_batch / o->batch), (long long)o->batch, o->lr,
           o->lr_min, (long long)run->schedule.warmup, (long long)o->seed);
    if (r->method == ROUTER_RELU) {
        printf("sparsity  target %.4f | lambda %g, alpha %g\n", 1.0 - (double)r->active / r->experts,
               (double)run->state.sparsity.lambda, o->alpha);
    }
    printf("output    %s | %d threads\n", run->options.out, threads);
    fflush(stdout);
}

static inline void open_log(Run *run) {
    char name[64], folder[PATH_SIZE];
    make_folder(run->options.out);
    int lock = open(run->options.out, O_RDONLY | O_DIRECTORY); // held until the process ends, however it ends
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        die("another process trains in %s\n  ---> stop it, or choose another folder with --out",
            run->options.out);
    }
    check_format(name, sizeof(name), "step_%08lld", (long long)run->state.step);
    check_format(folder, sizeof(folder), "%.1900s/%s", run->options.out, name);
    if (run->options.resume[0] != '\0' && path_exists(folder)) {
        point_latest(run->options.out,
                     name); // to where the log is cut back: later checkpoints are of another future
    }
    check_format(run->log_path, PATH_SIZE, "%.2000s/log.jsonl", run->options.out);
    log_cut(run->log_path, run->state.step);
    run->log = check_fopen(run->log_path, "ab", "choose another folder with --out");
}

static inline void close_run(Run *run) {
    if (run->log != NULL) {
        check_fclose(run->log, run->log_path);
    }
    if (run->tokenizer != NULL) {
        tokenizer_free(run->tokenizer);
    }
    if (wants_training(&run->options)) {
        prefetch_stop(&run->ahead);
    }
    dataloader_close(&run->train);
    free(run->inputs);
    free(run->targets);
    free(run->layer_sparsity);
    free(run->stats.counts);
    model_close(run->model);
    free(run);
}

// the folder that a new run writes to must not hold another one
static inline void open_out(Run *run) {
    Options *o = &run->options;
    char latest[PATH_SIZE], out[PATH_SIZE];
    if (o->out[0] == '\0') {
        const char *name = o->load[0] != '\0' ? "loaded" : o->preset;
        default_out(out, name, router_name(run->config.router.method), 0);
        check_format(o->out, OPTION_TEXT_SIZE, "%s", out);
    }
    check_format(latest, sizeof(latest), "%.1900s/latest", o->out);
    if (o->resume[0] == '\0' && path_exists(latest)) {
        die("%s already holds a run\n  ---> continue it with --resume %s, or choose another --out", o->out,
            o->out);
    }
}

static inline Run *open_run(int argc, const char *const *argv) {
    Run *run = NEW(Run, 1);
    read_options(&run->options, &run->state, program_name, argc, argv);
#ifdef _OPENMP
    if (run->options.threads > 0) {
        omp_set_num_threads((int)run->options.threads);
    }
#endif
    build_model(run);
    build_state(run, options_given(argc, argv, "lambda_init"));
    if (wants_training(&run->options)) {
        open_out(run);
    }
    open_data(run);
    run->started = seconds_now();
    return run;
}

// a trainer's main: reads the command line, does what it asks for, returns the exit status
static inline int run_main(int argc, char **argv) {
    Run *run = open_run(argc - 1, (const char *const *)(argv + 1));
    signal(SIGINT, request_stop);
    signal(SIGTERM, request_stop);
    signal(SIGXFSZ, SIG_IGN); // a file at its size limit is then a failed write, with a message
    if (run->options.dump[0] != '\0') {
        dump(run);
    } else if (run->options.eval) {
        validate(run);
    } else if (run->options.sample[0] != '\0') {
        generate(run, run->options.sample);
    } else if (run->options.bench) {
        print_table(run);
        bench(run);
    } else {
        print_table(run);
        open_log(run);
        train(run);
    }
    close_run(run);
    return 0;
}

#endif
