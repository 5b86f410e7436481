/*
--bench: the speed of whole optimizer steps at the sparsity that training spends its time at.

    settle    steps of one micro-batch each until stage III, and S near its target
    time      TIMED_STEPS steps of the whole global batch: their median
    profile   one more, taken apart (trainer.h)

Sparser is faster, so S is reported beside the speed, and steps are timed anew until it is close. FLOPs are
those of config.h, once at the nominal k and once at the experts that were active; mfu is their share of the
device's peak. Errors: none; a sparsity that is never reached gives a warning.
*/
#ifndef BENCH_H
#define BENCH_H

#include "llmc/run/run.h"
// defines: Run, StepRecord, fill_record; train_step, model_profile, model_peak_flops

static inline void bench_step(Run *run, StepRecord *r) {
    RunState before = run->state;
    double begin = seconds_now();
    train_step(run->model, &run->ahead, &run->config, &run->step, &run->state, &run->stats);
    fill_record(run, r, &before, seconds_now() - begin);
}

enum { SETTLED_STEPS = 20, TIMED_STEPS = 10, MOST_STEPS = 2000, MOST_ROUNDS = 5 };

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

static inline int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// one more step, for where its time goes: measuring may slow it
static inline void bench_profile(Run *run) {
    StepRecord r;
    model_profile(run->model, 1);
    bench_step(run, &r);
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
        bench_step(run, &r);
        timed.ms[i] = r.ms;
        timed.sparsity += r.sparsity / TIMED_STEPS;
        timed.active += r.active_experts / TIMED_STEPS;
    }
    qsort(timed.ms, TIMED_STEPS, sizeof(double), compare_doubles);
    return timed;
}

// Whole steps at the given global batch, once S has settled. Sparser is faster, and of many experts 0.005 of
// S are a large part of k: until S is within 0.005 and k within 4 % of the target, steps are timed anew. The
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

#endif
