/*
--sample TEXT, and --sample -: prompts from standard input, one a line, of any length.

Each prompt is continued --samples times, each time with other random numbers: those of its place among all
texts of the process. A text ends with end-of-text, or after --sample-tokens. Of a prompt that is longer than
the context, its last T - 1 tokens count. On stdout is text alone, texts on one prompt divided by a line
"---"; how fast it came, on stderr. Errors: logits that are no numbers end the program.
*/
#ifndef INTERACTIVE_H
#define INTERACTIVE_H

#include "llmc/run/generate.h"
#include <unistd.h>
// defines: generate, Continuation, refuse_broken_text; isatty

static inline void sample_prompt(Run *run, const char *prompt, size_t size, int64_t index) {
    for (int64_t i = 0; i < run->options.samples; i++) {
        if (i > 0) {
            printf("---\n");
        }
        Continuation done = generate(run, prompt, size, index * run->options.samples + i);
        fflush(stdout);
        refuse_broken_text(&done);
        if (run->ranks.rank == 0 && done.tokens > 1) {
            fprintf(stderr, "%lld tokens, %.0f tok/s\n", (long long)done.tokens,
                    (double)(done.tokens - 1) / done.seconds);
        }
    }
}

static inline void sample_prompts_of_stdin(Run *run) {
    char *line = NULL;
    size_t capacity = 0;
    int asks = isatty(STDIN_FILENO) && isatty(STDERR_FILENO);
    for (int64_t index = 0;; index++) {
        if (asks) {
            fprintf(stderr, "> ");
        }
        ssize_t size = getline(&line, &capacity, stdin);
        if (size < 0) {
            break;
        }
        sample_prompt(run, line, (size_t)size - (line[size - 1] == '\n'), index);
    }
    if (ferror(stdin)) {
        die("cannot read standard input: %s", strerror(errno));
    }
    free(line);
}

static inline void sample(Run *run) {
    warn_of_method_alone(run, "--sample");
    if (strcmp(run->options.sample, "-") != 0) {
        sample_prompt(run, run->options.sample, strlen(run->options.sample), 0);
    } else if (run->ranks.count > 1) {
        die_usage("--sample - answers one prompt after the other: there is nothing for a second rank to do\n"
                  "  ---> leave --gpus out");
    } else {
        sample_prompts_of_stdin(run);
    }
}

#endif
