/*
A trainer's main, whichever trainer: open the run that the command line describes, do what it asks for, close
it.

    train (the default), or: --bench, --eval, --sample TEXT, --dump FILE
*/
#ifndef MAIN_H
#define MAIN_H

#include "llmc/machine.h"
#include "llmc/run/bench.h"
#include "llmc/run/evaluate.h"
#include "llmc/run/generate.h"
#include "llmc/run/open.h"
#include "llmc/run/train.h"
// defines: machine_start; bench; validate, dump; generate; open_run, close_run; train

static inline void request_stop(int signal_number) {
    if (signal_number == SIGINT) {
        signal(SIGINT, SIG_DFL); // a second Ctrl-C does not wait for the end of the step
    }
    stop_requested = 1;
}

// program: how the trainer is called, for --help. Returns the exit status
static inline int run_main(const char *program, int argc, char **argv) {
    machine_start(argv);
    Run *run = open_run(program, argc - 1, (const char *const *)(argv + 1));
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
