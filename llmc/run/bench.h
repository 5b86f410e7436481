/*
--bench: the speed of whole optimizer steps at the sparsity that training spends its time at; --bench forward:
of the forward pass alone; --bench sample: of one text, token after token.

    warm      steps for some seconds: cold devices are faster than they remain
    settle    steps of one micro-batch each until stage III, and S near its target
    time      steps of the whole global batch, ten or more, for some seconds: their median
    profile   one more, taken apart (trainer.h)

forward and sample settle likewise, unless the model (--load) has the sparsity; then

    forward   the loss of batches of B sequences, in evaluation mode, 20 and then 100 timed ones; two are
              under way at a time, so that reading a batch costs no time. FLOPs are a third of a step's
    sample    a window of tokens behind one. The bytes are those of the active weights, each read once per
              token: all but the embedding, of which a token is one row

Sparser is faster, so S is reported beside the speed, and steps are timed anew until it is close. FLOPs are
those of config.h, once at the nominal k and once at the experts that were active; mfu is their share of the
device's peak. Errors: a model that gives no text; a sparsity that is never reached is a warning.
*/
#ifndef BENCH_H
#define BENCH_H

#include "llmc/run/generate.h"
#include "llmc/run/run.h"
// defines: continue_ids; Run, StepRecord, fill_record; train_step, model_profile, model_peak_flops

static inline void bench_step(Run *run, StepRecord *r) {
    RunState before = run->state;
    double begin = seconds_now();
    ranks_beat(&run->ranks, before.step, "bench");
    train_step(run->model, &run->ahead, &run->config, &run->step, &run->state, &run->stats);
    fill_record(run, r, &before, seconds_now() - begin);
}

#define WARM_SECONDS 2.0 // a cool GPU is a fifth faster than it remains

#define TIMED_SECONDS 4.0

enum { SETTLED_STEPS = 20, LEAST_TIMED = 10, MOST_TIMED = 100, MOST_STEPS = 2000, MOST_ROUNDS = 5 };
enum { FORWARD_WARM = 20, FORWARD_TIMED = 100 };
static_assert((int)FORWARD_TIMED <= (int)MOST_TIMED, "a round has room for them");

// trains with one micro-batch a step until stage III, and S within 0.005 of its target over the last
// SETTLED_STEPS
static inline void bench_settle(Run *run, double target) {
    double recent[SETTLED_STEPS] = {0};
    int micro_batches = run->step.micro_batches;
    run->step.micro_batches = 1;
    for (int step = 0; has_lambda(run); step++) {
        StepRecord r;
        double mean = 0.0;
        bench_step(run, &r);
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
    run->step.micro_batches = micro_batches;
}

// untimed steps, until the device is as warm as it gets; returns how many are to be timed
static inline int bench_warm(Run *run) {
    double begin = seconds_now(), enough;
    int steps = 0, timed;
    do {
        StepRecord r;
        bench_step(run, &r);
        steps++;
    } while (ranks_any(&run->ranks, seconds_now() - begin < WARM_SECONDS));
    enough = TIMED_SECONDS * steps / (seconds_now() - begin);
    timed = enough < LEAST_TIMED ? (int)LEAST_TIMED : enough > MOST_TIMED ? (int)MOST_TIMED : (int)enough;
    ranks_share(&run->ranks, &timed, sizeof(timed));
    return timed;
}

static inline int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// What a rank pays for there being others. Ranks are never equally fast: the fastest waits for the slowest,
// which waits for data alone. So the least share is that of the communication, and the rest is the ranks'
// difference
static inline void bench_exposed(Run *run, double share) {
    int ranks = run->ranks.count;
    double *all = NEW(double, ranks), least = share, most = share;
    ranks_gather(&run->ranks, &share, sizeof(share), all);
    for (int p = 0; p < ranks; p++) {
        least = all[p] < least ? all[p] : least;
        most = all[p] > most ? all[p] : most;
    }
    if (ranks > 1) {
        printf("exposed communication, sums included: %.2f %% of the step on the rank that waits least, "
               "%.2f %% on the one that waits most\n",
               100.0 * least, 100.0 * most);
    }
    free(all);
}

// one more step, for where its time goes: measuring may slow it
static inline void bench_profile(Run *run) {
    StepRecord r;
    model_profile(run->model, 1);
    bench_step(run, &r);
    bench_exposed(run, model_profile(run->model, 0));
}

typedef struct {
    double ms[MOST_TIMED]; // ascending
    int count;
    double sparsity, active; // means
} BenchRound;

static inline double median_seconds(const BenchRound *timed) {
    return 0.5e-3 * (timed->ms[(timed->count - 1) / 2] + timed->ms[timed->count / 2]);
}

static inline BenchRound bench_time(Run *run, int count) {
    BenchRound timed = {{0}, count, 0.0, 0.0};
    for (int i = 0; i < count; i++) {
        StepRecord r;
        bench_step(run, &r);
        timed.ms[i] = r.ms;
        timed.sparsity += r.sparsity / count;
        timed.active += r.active_experts / count;
    }
    qsort(timed.ms, (size_t)count, sizeof(double), compare_doubles);
    return timed;
}

// Whole steps at the given global batch, once S has settled. Sparser is faster, and of many experts 0.005 of
// S are a large part of k: until S is within 0.005 and k within 4 % of the target, steps are timed anew. The
// round that came nearest
static inline BenchRound bench_rounds(Run *run, double target, int count) {
    const Router *router = &run->config.router;
    double enough = fmin(0.005, 0.04 * router->active / router->experts);
    BenchRound best = {{0}, 0, 0.0, 0.0};
    for (int i = 0; i < MOST_ROUNDS; i++) {
        bench_settle(run, target);
        BenchRound timed = bench_time(run, count);
        if (i == 0 || fabs(timed.sparsity - target) < fabs(best.sparsity - target)) {
            best = timed;
        }
        if (!has_lambda(run) || fabs(best.sparsity - target) < enough) {
            break;
        }
    }
    return best;
}

// FLOP/s, by the formula at the nominal k and at the experts that were active
static inline void print_speed(double tokens_per_second, double nominal, double measured) {
    double unit = nominal < 1e12 ? 1e9 : 1e12;
    printf("          %.0f tok/s | %.1f %cFLOP/s at nominal k, %.1f at the measured active experts",
           tokens_per_second, nominal / unit, unit < 1e12 ? 'G' : 'T', measured / unit);
}

static inline void bench(Run *run) {
    const Config *c = &run->config;
    double target = target_sparsity(c->router);
    int count = bench_warm(run);
    BenchRound timed = bench_rounds(run, target, count);
    double seconds = median_seconds(&timed);
    double tokens = (double)run->stats.tokens, T = (double)run->options.seq_len;
    double nominal = config_flops(c, run->options.seq_len, c->router.active) * tokens / T / seconds;
    double measured = config_flops(c, run->options.seq_len, timed.active) * tokens / T / seconds;
    double peak = model_peak_flops(run->model);
    printf("bench     %.0f tokens a step, median of %d: %.1f ms (%.1f to %.1f) | S %.4f, target %.4f\n",
           tokens, count, 1e3 * seconds, timed.ms[0], timed.ms[count - 1], timed.sparsity, target);
    print_speed(tokens / seconds, nominal, measured);
    if (peak > 0.0) {
        printf(" | mfu %.4f, mfu_active %.4f", nominal / peak, measured / peak);
    }
    printf(" | %.2f GB\n", model_memory_gb(run->model));
    bench_profile(run);
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// the forward pass, and sampling

// S of one evaluated batch
static inline double sparsity_of_forward(Run *run) {
    const Config *c = &run->config;
    int B = (int)run->options.batch, T = (int)run->options.seq_len, *inputs, *targets;
    int64_t active;
    prefetch_next(&run->ahead, &inputs, &targets);
    model_loss_begin(run->model, inputs, targets, B, T);
    model_loss_end(run->model, &active);
    return step_sparsity(c->router, active, (int64_t)B * T * c->layers * c->router.experts);
}

// trains until the model has the sparsity that it should have, if it has not
static inline void reach_sparsity(Run *run, double target) {
    double S = sparsity_of_forward(run);
    for (int i = 0; has_lambda(run) && fabs(S - target) > 0.005 && i < MOST_ROUNDS; i++) {
        bench_settle(run, target);
        S = sparsity_of_forward(run);
    }
}

// FORWARD_WARM, then `count` timed losses; in the time of each its successor is begun
static inline BenchRound forward_round(Run *run, int count) {
    const Config *c = &run->config;
    int B = (int)run->options.batch, T = (int)run->options.seq_len, *inputs, *targets;
    int64_t cells = (int64_t)B * T * c->layers;
    BenchRound timed = {{0}, count, 0.0, 0.0};
    prefetch_next(&run->ahead, &inputs, &targets);
    model_loss_begin(run->model, inputs, targets, B, T);
    double last = seconds_now();
    for (int i = -FORWARD_WARM; i < count; i++) {
        int64_t active;
        prefetch_next(&run->ahead, &inputs, &targets);
        model_loss_begin(run->model, inputs, targets, B, T);
        ranks_beat(&run->ranks, run->state.step, "bench");
        model_loss_end(run->model, &active);
        double now = seconds_now();
        if (i >= 0) {
            timed.ms[i] = 1e3 * (now - last);
            timed.sparsity += step_sparsity(c->router, active, cells * c->router.experts) / count;
            timed.active += (double)active / (double)cells / count;
        }
        last = now;
    }
    model_loss_end(run->model, NULL);
    qsort(timed.ms, (size_t)count, sizeof(double), compare_doubles);
    return timed;
}

static inline void bench_forward(Run *run) {
    const Config *c = &run->config;
    int64_t B = run->options.batch, T = run->options.seq_len;
    double target = target_sparsity(c->router);
    reach_sparsity(run, target);
    for (double begin = seconds_now(); seconds_now() - begin < WARM_SECONDS;) {
        sparsity_of_forward(run);
    }
    int count = FORWARD_TIMED;
    BenchRound timed = forward_round(run, count);
    double seconds = median_seconds(&timed);
    double nominal = config_flops(c, T, c->router.active) / 3.0 * (double)B / seconds;
    double measured = config_flops(c, T, timed.active) / 3.0 * (double)B / seconds;
    double peak = model_peak_flops(run->model) / run->ranks.count;
    printf("forward   %lld x %lld tokens, median of %d: %.2f ms (%.2f to %.2f) | S %.4f, target %.4f\n",
           (long long)B, (long long)T, count, 1e3 * seconds, timed.ms[0], timed.ms[count - 1], timed.sparsity,
           target);
    print_speed((double)(B * T) / seconds, nominal, measured);
    if (peak > 0.0) {
        printf(" | %.4f of the peak, %.4f", nominal / peak, measured / peak);
    }
    printf("\n");
    model_profile(run->model, 1);
    sparsity_of_forward(run);
    model_profile(run->model, 0);
    fflush(stdout);
}

static inline int count_token(void *to, int token) {
    (void)to;
    (void)token;
    return 1;
}

static inline void bench_sample(Run *run) {
    const Config *c = &run->config;
    double target = target_sparsity(c->router);
    int first = 0, wide = model_weight_bytes();
    Sampling s = sampling_of(&run->options, c->vocab_size, 0);
    reach_sparsity(run, target);
    Continuation warm = continue_ids(run, &first, 1, &s, run->options.seq_len, count_token, NULL);
    Continuation done = continue_ids(run, &first, 1, &s, run->options.seq_len, count_token, NULL);
    if (!warm.numbers || !done.numbers || done.tokens < 2) {
        die("--bench sample: the model gave no text to time\n  ---> a larger --seq-len, or another --load");
    }
    double speed = (double)(done.tokens - 1) / done.seconds, peak = model_peak_bytes(run->model);
    double bytes =
        (double)wide * (double)(config_params(c, c->router.active) - (int64_t)c->vocab_size * c->hidden);
    printf(
        "sample    %lld tokens: %.1f tok/s, %.1f us a token | %.3f GB of active weights a token: %.1f GB/s",
        (long long)done.tokens, speed, 1e6 / speed, 1e-9 * bytes, 1e-9 * bytes * speed);
    if (peak > 0.0) {
        printf(", %.4f of the memory's %.0f", bytes * speed / peak, 1e-9 * peak);
    }
    printf("\n");
    fflush(stdout);
}

#endif
