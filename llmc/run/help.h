/*
--help and --version: what a trainer can be told, in groups, and which trainer it is.

A group begins at one option of OPTION_TABLE and has those that follow it, up to the next group's.
*/
#ifndef HELP_H
#define HELP_H

#include "llmc/run/options.h"

#ifndef REMOE_VERSION // the Makefile's, by git
#define REMOE_VERSION "unknown"
#endif

typedef struct {
    const char *first; // field of the option it begins with
    const char *title;
} OptionGroup;

static inline const OptionGroup *option_groups(int *count) {
    static const OptionGroup groups[] = {
        {"preset", "the model"},
        {"aux_coeff", "the router's loss, and lambda"},
        {"train_data", "data"},
        {"batch", "steps"},
        {"out", "what a run saves, validates and shows"},
        {"resume", "where it starts"},
        {"dump", "instead of training"},
        {"overfit_batch", "the process"},
    };
    *count = (int)(sizeof(groups) / sizeof(groups[0]));
    return groups;
}

static inline void print_group_of(const char *field) {
    int count;
    const OptionGroup *groups = option_groups(&count);
    for (int i = 0; i < count; i++) {
        if (strcmp(groups[i].first, field) == 0) {
            printf("\n%s\n", groups[i].title);
        }
    }
}

static inline void options_help(const Options *defaults, const char *program) {
    int count;
    const OptionRow *rows = option_rows(&count);
    printf("%s: train a mixture-of-experts language model with a ReLU router (ReMoE)\n\n"
           "usage: %s [--option value | --option=value] ...\n\n"
           "--help, --version; all others with the defaults of the preset '%s':\n",
           program, program, defaults->preset);
    for (int i = 0; i < count; i++) {
        char spelled[OPTION_NAME_SIZE], value[OPTION_TEXT_SIZE];
        option_spell(spelled, sizeof(spelled), rows[i].field);
        option_format(value, sizeof(value), defaults, &rows[i], 6);
        print_group_of(rows[i].field);
        printf("  --%-18s %s [%s]\n", spelled, rows[i].help, value);
    }
}

static inline void print_version(const char *program) {
    printf("%s, remoe.c %s, compiler %s%s\n", program, REMOE_VERSION, __VERSION__,
#ifdef _OPENMP
           ", OpenMP"
#else
           ""
#endif
    );
}

static inline int is_help(const char *argument) {
    return strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0;
}

static inline int is_version(const char *argument) {
    return strcmp(argument, "--version") == 0;
}

// --help or --version anywhere on the command line?
static inline int wants_answer(int argc, const char *const *argv) {
    int wants = 0;
    for (int i = 0; i < argc; i++) {
        wants |= is_help(argv[i]) || is_version(argv[i]);
    }
    return wants;
}

// ... answers it and ends the program
static inline void answer_help(const Options *defaults, const char *program, int argc,
                               const char *const *argv) {
    for (int i = 0; i < argc; i++) {
        if (is_help(argv[i])) {
            options_help(defaults, program);
            exit(0);
        }
        if (is_version(argv[i])) {
            print_version(program);
            exit(0);
        }
    }
}

#endif
