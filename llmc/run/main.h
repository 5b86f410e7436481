/*
A trainer's main, whichever trainer: open the run that the command line describes, do what it asks for, close
it.

    train (the default), or: --bench [forward|sample], --eval, --sample TEXT, --score FILE, --generate FILE,
    --trace FILE, --dump FILE, --export DIR
*/
#ifndef MAIN_H
#define MAIN_H

#include "llmc/machine.h"
#include "llmc/run/bench.h"
#include "llmc/run/evaluate.h"
#include "llmc/run/export.h"
#include "llmc/run/generate_run.h"
#include "llmc/run/interactive.h"
#include "llmc/run/open.h"
#include "llmc/run/score_run.h"
#include "llmc/run/trace.h"
#include "llmc/run/train.h"
// defines: machine_start; bench; validate, dump; statistics_write, trace; export_model; generate_file; sample;
// open_run, close_run; score; train

static inline void request_stop(int signal_number) {
    if (signal_number == SIGINT) {
        signal(SIGINT, SIG_DFL); // a second Ctrl-C does not wait for the end of the step
    }
    stop_requested = 1;
}

// Whatever asks a run that writes to end lets it save first: Ctrl-C, kill, a terminal that closes (unless
// nohup had that ignored), a pipe whose reader is gone. All else has nothing to lose and ends at once
static inline void catch_signals(void) {
    signal(SIGINT, request_stop);
    signal(SIGTERM, request_stop);
    signal(SIGPIPE, request_stop);
    if (signal(SIGHUP, request_stop) == SIG_IGN) {
        signal(SIGHUP, SIG_IGN);
    }
}

static inline void evaluate(Run *run) {
    validate(run);
    if (run->statistics != NULL) {
        statistics_write(run, run->statistics);
    }
    if (run->trace != NULL) {
        trace(run);
    }
}

// a trace is of the weights after the last step
static inline void train_and_trace(Run *run) {
    train(run);
    if (run->trace != NULL && run->state.step == run->options.steps) {
        trace(run);
    } else if (run->trace != NULL) {
        warn("%s was not written: the run ended before its last step\n  ---> --load %s --trace %s",
             run->options.trace, run->options.out, run->options.trace);
    }
}

static inline void bench_mode(Run *run) {
    switch (run->options.bench) {
    case BENCH_FORWARD: bench_forward(run); break;
    case BENCH_SAMPLE: bench_sample(run); break;
    default: bench(run); break;
    }
}

// program: how the trainer is called, for --help. Returns the exit status
static inline int run_main(const char *program, int argc, char **argv) {
    machine_start(argv);
    if (options_given(argc - 1, (const char *const *)(argv + 1), "export_to")) {
        export_model(program, argc - 1, (const char *const *)(argv + 1)); // nothing is computed: no Run
        return 0;
    }
    Run *run = open_run(program, argc - 1, (const char *const *)(argv + 1));
    int status = 0;
    signal(SIGXFSZ, SIG_IGN); // a file at its size limit is then a failed write, with a message
    if (run->options.dump[0] != '\0') {
        dump(run);
    } else if (run->options.eval) {
        evaluate(run);
    } else if (run->options.sampling) {
        sample(run);
    } else if (traces_only(&run->options)) {
        trace(run);
    } else if (run->options.score[0] != '\0') {
        catch_signals();
        status = score(run);
    } else if (run->options.generate[0] != '\0') {
        catch_signals();
        status = generate_file(run);
    } else if (run->options.bench) {
        print_table(run);
        bench_mode(run);
    } else {
        catch_signals();
        print_table(run);
        open_log(run);
        train_and_trace(run);
    }
    close_run(run);
    return status;
}

#endif
