/*
The training loop: step after step (step.h), each with its row in the log; checkpoints, validation and samples
on their way; an end when the steps or the time are over, or a signal asks for it.

A step that is not finite changes no weight; the third in a row ends the run. Nothing is saved after such a
step, so that the folder keeps the last good state.

What the routers do is said where it can go wrong: how dense each layer is when a stage begins and at the end,
and a layer that has switched itself off. Such a layer's ReLU router has no gradient, so nothing switches it
on again.
*/
#ifndef TRAIN_H
#define TRAIN_H

#include "llmc/files/logger.h"
#include "llmc/run/evaluate.h"
#include "llmc/run/flips.h"
#include "llmc/run/generate.h"
#include "llmc/run/run.h"
#include "llmc/step.h"
// defines: StepRecord, log_step, print_step; validate; show_sample; Run, save; train_step

enum { RISEN_STEPS_LIMIT = 5 }; // steps in a row with a loss far above the usual after which that is said
enum { BAD_STEPS_LIMIT = 3 };   // non-finite steps in a row that end a run
enum { OFF_STEPS_LIMIT = 20 };  // steps in a row without an active expert after which a layer is off
#define NEARLY_OFF 0.25         // of k: a layer that uses fewer experts per token has little of a mixture

// "0.70 0.97 0.96", and how many (layer, token) pairs have no expert
static inline void print_layers(const Run *run, const StepRecord *r) {
    int nearly_off = 0;
    double k = run->config.router.active, E = run->config.router.experts;
    printf("          S by layer");
    for (int l = 0; l < r->layers; l++) {
        printf(" %.2f", r->layer_sparsity[l]);
        nearly_off += (1.0 - r->layer_sparsity[l]) * E < NEARLY_OFF * k;
    }
    printf(" | no expert for %.0f %% of all (layer, token) pairs",
           100.0 * (double)r->zero_expert_tokens / (double)(run->stats.tokens * r->layers));
    printf(nearly_off > 0 ? ", %d of %d layers nearly off\n" : "\n", nearly_off, r->layers);
}

static inline void announce_stages(const Run *run, const StepRecord *r, int before) {
    const LambdaState *s = &run->state.sparsity;
    if (!has_lambda(run) || before == s->stage) {
        return;
    }
    if (before < STAGE_SPARSIFYING) {
        printf("stage II (sparsifying) began at step %lld\n", (long long)s->stage2_step + 1);
    }
    if (s->stage == STAGE_SPARSE) {
        printf("stage III (sparse) began at step %lld: settled after %lld steps\n",
               (long long)s->stage3_step + 1, (long long)s->stage3_step);
    }
    print_layers(run, r);
}

// counts steps in a row in which a layer had no active expert; says so once, and again when more layers
// follow
static inline void guard_layers(Run *run, const StepRecord *r) {
    char layers[256] = "";
    int off = 0;
    if (run->off_steps == NULL) {
        run->off_steps = NEW(int, r->layers);
    }
    for (int l = 0; l < r->layers; l++) {
        size_t used = strlen(layers);
        run->off_steps[l] = r->layer_sparsity[l] == 1.0 ? run->off_steps[l] + 1 : 0;
        if (run->off_steps[l] >= OFF_STEPS_LIMIT && ++off > 0 && used + 16 < sizeof(layers)) {
            check_format(layers + used, sizeof(layers) - used, " %d", l);
        }
    }
    if (off > run->most_off) {
        run->most_off = off;
        warn("no expert of %s%s has been active for %d steps: a router that is off has no gradient\n"
             "  ---> go on from an earlier checkpoint, or start anew, with a smaller --lr, --alpha or "
             "--lambda",
             off == r->layers ? "any layer:"
             : off > 1        ? "layers"
                              : "layer",
             layers, OFF_STEPS_LIMIT);
    }
}

// Weights that have blown up may still compute a number, or nothing but the same guess for all tokens. A loss
// more than a nat above the recent ones shows that, until it comes down again
static inline int loss_is_usual(Run *run) {
    double loss = run->stats.lm_loss;
    int usual = run->usual_loss == 0.0 || loss < run->usual_loss + 1.0;
    double weight = run->usual_loss == 0.0 ? 1.0 : usual ? 0.1 : 0.0;
    run->usual_loss += weight * (loss - run->usual_loss);
    return usual;
}

static inline void print_good_checkpoint(const Run *run) {
    if (run->ranks.rank > 0) {
        return; // rank 0 says it
    }
    if (run->good_step < 0) {
        fprintf(
            stderr,
            "  ---> there is no good checkpoint: start again with a smaller --lr, or look at the data%s\n",
            run->options.load[0] != '\0' ? " and the weights that were loaded" : "");
    } else {
        fprintf(stderr,
                "  ---> the last good checkpoint: --resume %s/step_%08lld with a smaller --lr, or look at "
                "the data\n",
                run->options.out, (long long)run->good_step);
    }
}

// A checkpoint is good once its weights have given a usual loss; older ones go only then
static inline void guard_loss(Run *run) {
    int usual = loss_is_usual(run);
    run->risen_steps = usual ? 0 : run->risen_steps + 1;
    if (run->risen_steps == RISEN_STEPS_LIMIT) {
        warn("for %d steps the loss has been far above what it was, %.4f: now %.4f", RISEN_STEPS_LIMIT,
             run->usual_loss, run->stats.lm_loss);
        print_good_checkpoint(run);
    }
    if (usual && run->good_step != run->last_saved) {
        run->good_step = run->last_saved;
        prune(run);
    }
}

// counts non-finite steps in a row; the weights are as they were before them
static inline void guard_finite(Run *run, int finite) {
    run->bad_steps = finite ? 0 : run->bad_steps + 1;
    if (finite) {
        guard_loss(run);
        return;
    }
    warn("step %lld: the loss or the gradient norm is not finite: the update is skipped",
         (long long)run->state.step);
    if (run->bad_steps == BAD_STEPS_LIMIT) {
        warn("%d non-finite steps in a row: the run ends", BAD_STEPS_LIMIT);
        print_good_checkpoint(run);
        exit(1);
    }
}

static inline int out_of_time(const Run *run) {
    return run->options.max_minutes > 0.0 && seconds_now() - run->started > 60.0 * run->options.max_minutes;
}

static inline int wants_stop(const Run *run) {
    return stop_requested || (run->ranks.rank == 0 && out_of_time(run));
}

// Must the run end? One rank asks itself; several must decide alike, and do so in each step's vote
static inline int must_stop(const Run *run) {
    return run->ranks.count == 1 ? wants_stop(run) : run->stats.stop;
}

// seconds until the last step, from the speed of the recent ones: early steps, dense ones, are slower
static inline double seconds_left(Run *run, double seconds) {
    double weight = run->step_seconds == 0.0 ? 1.0 : 0.1;
    run->step_seconds += weight * (seconds - run->step_seconds);
    return run->step_seconds * (double)(run->options.steps - run->state.step);
}

static inline int is_flip_step(const Run *run, int64_t step) {
    return run->flips != NULL && every(run->options.flip_every, step);
}

static inline void record_flips(const Run *run, StepRecord *r) {
    r->flip_rate = run->flips->rate;
    r->flip_count = run->flips->rate * run->config.router.experts; // (Eq. 15)
    r->layer_flip_rate = run->flips->layer_rate;
}

// all that is said of a step that took so many seconds; before: the state that it began with
static inline void report_step(Run *run, const RunState *before, double seconds, double *last_print) {
    const Options *o = &run->options;
    StepRecord record;
    double now = seconds_now(), left = seconds_left(run, seconds);
    int last = run->state.step == o->steps;
    fill_record(run, &record, before, seconds);
    if (is_flip_step(run, record.step)) {
        record_flips(run, &record);
    }
    log_step(run->log, run->log_path, &record);
    if (now - *last_print > 1.0 || run->state.step - run->first_step <= 3 || last) {
        print_step(&record, o->steps, left);
        *last_print = now;
    }
    announce_stages(run, &record, before->sparsity.stage);
    if (last && has_lambda(run)) {
        print_layers(run, &record);
    }
    if (has_lambda(run)) {
        guard_layers(run, &record);
    }
}

// validation and samples, where it is time for them
static inline void look_at_model(Run *run) {
    const Options *o = &run->options;
    int to_validate = run->state.step > 0 && every(o->val_every, run->state.step);
    int to_sample = run->state.step > 0 && every(o->sample_every, run->state.step);
    if (to_validate) {
        validate(run);
    }
    if (to_sample) {
        show_sample(run, "");
    }
    if (to_validate || to_sample) {
        run->stats.stop = ranks_any(&run->ranks, wants_stop(run));
    }
}

static inline void train(Run *run) {
    const Options *o = &run->options;
    double last_print = 0.0;
    run->last_saved = o->resume[0] != '\0' ? run->first_step : -1;
    run->good_step = -1; // a resumed one has yet to show it
    if (run->step.schedule.warmup > o->steps) {
        warn("--warmup-steps %lld of only %lld steps: the learning rate never gets to --lr\n"
             "  ---> --warmup-steps %lld",
             (long long)run->step.schedule.warmup, (long long)o->steps, (long long)o->steps / 10);
    }
    while (run->state.step < o->steps && !must_stop(run)) {
        // before a step, not after the last: a run resumed here validates here, so the log misses and repeats
        // nothing
        look_at_model(run);
        if (must_stop(run)) {
            break;
        }
        run->stats.stop = wants_stop(run);
        ranks_beat(&run->ranks, run->state.step, "training");
        RunState before = run->state;
        if (is_flip_step(run, before.step)) {
            flips_before(run);
        }
        double begin = seconds_now();
        int finite = train_step(run->model, &run->ahead, &run->config, &run->step, &run->state, &run->stats);
        double seconds = seconds_now() - begin;
        if (is_flip_step(run, before.step)) {
            flips_after(run);
        }
        report_step(run, &before, seconds, &last_print);
        guard_finite(run, finite);
        if (run->state.step < o->steps && every(o->save_every, run->state.step)) {
            save(run);
        }
    }
    double seconds = seconds_now() - run->started;
    printf("%lld steps in %.1f s; the loader was waited for %.2f %% of it\n",
           (long long)(run->state.step - run->first_step), seconds, 0.1 * run->ahead.wait_ms / seconds);
    if (run->state.step != run->last_saved) {
        save(run); // before anything that could fail
        if (run->bad_steps == 0 && run->risen_steps == 0) {
            prune(run);
        }
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
