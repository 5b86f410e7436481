/*
The training loop: step after step (step.h), each with its row in the log; checkpoints, validation and samples
on their way; an end when the steps, the time, or somebody's patience is over.

A step that is not finite changes no weight; the third in a row ends the run. Nothing is saved after such a
step: what the folder holds stays the last good state.
*/
#ifndef TRAIN_H
#define TRAIN_H

#include "llmc/files/logger.h"
#include "llmc/run/evaluate.h"
#include "llmc/run/generate.h"
#include "llmc/run/run.h"
#include "llmc/step.h"

enum { BAD_STEPS_LIMIT = 3 }; // non-finite steps in a row that end a run

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
    save(run); // before anything that could fail
    if (run->state.step < o->steps) {
        printf("stopped at step %lld of %lld\n  ---> continue with --resume %s\n", (long long)run->state.step,
               (long long)o->steps, run->options.out);
        return;
    }
    validate(run);
    show_sample(run, "");
}

#endif
