/*
The command line: one table. The struct, the parser, --help, the presets, the printed settings and the options
saved in a checkpoint (state_file.h) all walk OPTION_TABLE (option_table.h), so an option is written once.

An option's name is its field with dashes: `--global-batch 64` or `--global-batch=64`. Three short names
exist besides: --data for --train-data, --lambda for --lambda-init, --export for --export-to (C++ has the word
itself). A preset is itself a piece of command line, read before the user's; a resumed run starts from its
saved options instead. Errors: exit 2, with the nearest name.
*/
#ifndef OPTIONS_H
#define OPTIONS_H

#include "llmc/check.h"
#include "llmc/run/option_table.h"
#include <math.h>
#include <stddef.h>
// defines: strtoll, strtod, isfinite, offsetof

enum { OPTION_TEXT_SIZE = 16384, OPTION_NAME_SIZE = 64 }; // with the 0 at the end

#define OPTION_FIELD_INT(field) int64_t field;
#define OPTION_FIELD_REAL(field) double field;
#define OPTION_FIELD_TEXT(field) char field[OPTION_TEXT_SIZE];
#define OPTION_FIELD_FLAG(field) int64_t field;
#define OPTION_FIELD_MODE(field) int64_t field;
#define OPTION_FIELD(kind, scope, field, initial, least, most, help) OPTION_FIELD_##kind(field)

typedef struct {
    OPTION_TABLE(OPTION_FIELD)
    int sampling; // --sample was given, if only with an empty prompt
} Options;

#define OPTION_CHECK(kind, scope, field, ...)                                                                \
    static_assert(sizeof(#field) <= OPTION_NAME_SIZE, #field ": too long a name");
OPTION_TABLE(OPTION_CHECK)

typedef enum { OPTION_INT, OPTION_REAL, OPTION_TEXT, OPTION_FLAG, OPTION_MODE } OptionKind;
typedef enum { OPTION_SHAPE, OPTION_ROUTING, OPTION_RUN, OPTION_ONCE } OptionScope;

typedef struct {
    OptionKind kind;
    OptionScope scope;
    const char *field; // with underscores
    size_t offset;     // in Options
    const char *initial;
    double least, most;
    const char *help;
} OptionRow;

#define OPTION_ROW(kind, scope, field, initial, least, most, help)                                           \
    {OPTION_##kind, OPTION_##scope,  #field,         offsetof(Options, field),                               \
     initial,       (double)(least), (double)(most), help},

static inline const OptionRow *option_rows(int *count) {
    static const OptionRow rows[] = {OPTION_TABLE(OPTION_ROW)};
    *count = (int)(sizeof(rows) / sizeof(rows[0]));
    return rows;
}

// ----------------------------------------------------------------------------
// presets: the paper's Table 1 (V = GPT-2's 50257 padded to a multiple of 1024), and one for a CPU

static inline const char *preset_arguments(const char *name) {
    static const char *presets[][2] = {
        {"tiny", "--lr 1.5e-3 --lr-min 1.5e-4 --warmup-steps 160"},
        {"small", "--hidden 768 --layers 12 --heads 12"},
        {"medium", "--hidden 1024 --layers 24 --heads 16"},
        {"large", "--hidden 1536 --layers 24 --heads 16"},
    };
    for (size_t i = 0; i < sizeof(presets) / sizeof(presets[0]); i++) {
        if (strcmp(presets[i][0], name) == 0) {
            return presets[i][1];
        }
    }
    die_usage("--preset %s: unknown\n  ---> one of: tiny, small, medium, large", name);
}

// what the paper's three sizes share
static inline const char *preset_common(const char *name) {
    return strcmp(name, "tiny") == 0
               ? ""
               : "--kv-heads 4 --vocab-size 51200 --seq-len 1024 --segment-length 256 --batch 4 "
                 "--global-batch 512 --steps 60000 "
                 "--train-data data/pile/train_*.bin --val-data data/pile/val.*.bin --tokenizer data/gpt2 "
                 "--save-every 1000 --val-every 1000 --val-batches 100";
}

// ----------------------------------------------------------------------------
// parsing

// what --bench times: nothing, whole steps (`--bench` alone), the forward pass, sampling
typedef enum { BENCH_NOTHING, BENCH_STEPS, BENCH_FORWARD, BENCH_SAMPLE } BenchMode;

// the words of a MODE: its values' numbers are their places
static inline const char *const *option_modes(int *count) {
    static const char *const modes[] = {"0", "1", "forward", "sample"};
    *count = (int)(sizeof(modes) / sizeof(modes[0]));
    return modes;
}

// -1: no word of a MODE
static inline int option_mode(const char *text) {
    int count;
    const char *const *modes = option_modes(&count);
    for (int i = 0; i < count; i++) {
        if (strcmp(modes[i], text) == 0) {
            return i;
        }
    }
    return -1;
}

// `--global-batch` and `global_batch` are one name
static inline int option_name_equal(const char *name, size_t size, const char *field) {
    if (strlen(field) != size) {
        return 0;
    }
    for (size_t i = 0; i < size; i++) {
        if ((name[i] == '-' ? '_' : name[i]) != field[i]) {
            return 0;
        }
    }
    return 1;
}

static inline const OptionRow *option_find(const char *name, size_t size) {
    int count;
    const OptionRow *rows = option_rows(&count);
    if (option_name_equal(name, size, "data")) {
        return option_find("train_data", 10);
    }
    if (option_name_equal(name, size, "lambda")) {
        return option_find("lambda_init", 11);
    }
    if (option_name_equal(name, size, "export")) {
        return option_find("export_to", 9);
    }
    for (int i = 0; i < count; i++) {
        if (option_name_equal(name, size, rows[i].field)) {
            return &rows[i];
        }
    }
    return NULL;
}

// Levenshtein distance, for the nearest match of a mistyped name; nb < OPTION_NAME_SIZE
static inline int edit_distance(const char *a, size_t na, const char *b, size_t nb) {
    int row[OPTION_NAME_SIZE];
    for (size_t j = 0; j <= nb; j++) {
        row[j] = (int)j;
    }
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            int replace = diagonal + ((a[i - 1] == '-' ? '_' : a[i - 1]) != b[j - 1]);
            int shift = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = replace < shift ? replace : shift;
        }
    }
    return row[nb];
}

// a field's name as it is typed
static inline void option_spell(char *out, size_t capacity, const char *field) {
    size_t i = 0;
    for (; field[i] != '\0' && i + 1 < capacity; i++) {
        out[i] = field[i] == '_' ? '-' : field[i];
    }
    out[i] = '\0';
}

__attribute__((noreturn)) static inline void option_unknown(const char *name, size_t size) {
    int count;
    const OptionRow *rows = option_rows(&count);
    size = size < OPTION_NAME_SIZE ? size : (size_t)OPTION_NAME_SIZE;
    const OptionRow *best = &rows[0];
    int best_distance = 1000;
    for (int i = 0; i < count; i++) {
        int distance = edit_distance(name, size, rows[i].field, strlen(rows[i].field));
        if (distance < best_distance) {
            best_distance = distance;
            best = &rows[i];
        }
    }
    char spelled[OPTION_NAME_SIZE];
    option_spell(spelled, sizeof(spelled), best->field);
    die_usage("unknown option --%.*s\n  ---> did you mean --%s? All options: --help", (int)size, name,
              spelled);
}

// sets one option from text; `from`: the checkpoint's file that holds it, or "" for the command line
static inline void option_set(Options *options, const OptionRow *row, const char *text, const char *from) {
    void (*fail)(const char *, ...) = from[0] == '\0' ? die_usage : die;
    const char *source = from[0] == '\0' ? "" : " (from the checkpoint)";
    const char *remedy = from[0] == '\0' ? "--help describes it" : "another checkpoint, or mend ";
    char *field = (char *)options + row->offset;
    char spelled[OPTION_NAME_SIZE];
    option_spell(spelled, sizeof(spelled), row->field);
    if (row->kind == OPTION_TEXT) {
        if (strlen(text) >= OPTION_TEXT_SIZE) {
            fail("--%s%s: longer than %d bytes\n  ---> %s%s", spelled, source, OPTION_TEXT_SIZE - 1, remedy,
                 from);
        }
        strcpy(field, text);
        return;
    }
    if (row->kind == OPTION_MODE) {
        int64_t mode = option_mode(text);
        if (mode < 0) {
            fail("--%s%s expects nothing, forward or sample, not '%.200s'\n  ---> %s%s", spelled, source,
                 text, remedy, from);
        }
        memcpy(field, &mode, sizeof(mode));
        return;
    }
    char *end = NULL;
    errno = 0;
    double value;
    if (row->kind == OPTION_REAL) {
        value = strtod(text, &end);
        memcpy(field, &value, sizeof(value));
    } else {
        long long integer = strtoll(text, &end, 10);
        int64_t stored = integer;
        value = (double)integer;
        memcpy(field, &stored, sizeof(stored));
    }
    int malformed = end == text || *end != '\0' || errno == ERANGE || !isfinite(value);
    if (malformed || value < row->least || value > row->most) {
        fail("--%s%s expects %s from %.9g to %.9g, not '%.200s'\n  ---> %s%s", spelled, source,
             row->kind == OPTION_REAL ? "a number" : "an integer", row->least, row->most, text, remedy, from);
    }
}

// An empty path is what `--resume "$UNSET"` leaves of it: to take it for "not given" would begin another run
static inline void option_refuse_empty(const OptionRow *row, const char *text) {
    if (row->kind == OPTION_TEXT && strlen(text) < (size_t)row->least) {
        char spelled[OPTION_NAME_SIZE];
        option_spell(spelled, sizeof(spelled), row->field);
        die_usage(
            "--%s is empty, expected a path\n  ---> leave it out, or see which shell variable is not set",
            spelled);
    }
}

static inline int option_is_switch(const char *text) {
    return strcmp(text, "0") == 0 || strcmp(text, "1") == 0;
}

// is the word behind an option its value?
static inline int option_takes(const OptionRow *row, const char *text) {
    switch (row->kind) {
    case OPTION_FLAG: return option_is_switch(text);
    case OPTION_MODE: return strncmp(text, "--", 2) != 0;
    default: return 1;
    }
}

static inline void options_parse(Options *options, int argc, const char *const *argv) {
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) != 0 || argv[i][2] == '\0') {
            die_usage("'%s' is not an option: options begin with --\n  ---> all options: --help", argv[i]);
        }
        const char *name = argv[i] + 2;
        const char *equals = strchr(name, '=');
        size_t size = equals != NULL ? (size_t)(equals - name) : strlen(name);
        const OptionRow *row = option_find(name, size);
        if (row == NULL) {
            option_unknown(name, size);
        }
        options->sampling |= row->offset == offsetof(Options, sample);
        int next_is_value = i + 1 < argc && option_takes(row, argv[i + 1]);
        if (equals != NULL || next_is_value) {
            const char *value = equals != NULL ? equals + 1 : argv[++i];
            option_refuse_empty(row, value);
            option_set(options, row, value, "");
        } else if (row->kind == OPTION_FLAG || row->kind == OPTION_MODE) {
            option_set(options, row, "1", "");
        } else {
            die_usage("--%.*s needs a value\n  ---> --help shows what it expects", (int)size, name);
        }
    }
}

// a preset's words; no quoting is needed there
static inline void options_parse_line(Options *options, const char *line) {
    char words[1024];
    const char *argv[64];
    int argc = 0;
    check_format(words, sizeof(words), "%s", line);
    for (char *word = strtok(words, " "); word != NULL && argc < 64; word = strtok(NULL, " ")) {
        argv[argc++] = word;
    }
    options_parse(options, argc, argv);
}

// the table's defaults, then the preset's words (NULL: none, for a model that is loaded)
static inline void options_defaults(Options *options, const char *preset) {
    int count;
    const OptionRow *rows = option_rows(&count);
    memset(options, 0, sizeof(*options));
    for (int i = 0; i < count; i++) {
        option_set(options, &rows[i], rows[i].initial, "");
    }
    if (preset != NULL) {
        options_parse_line(options, preset_common(preset));
        options_parse_line(options, preset_arguments(preset));
        option_set(options, option_find("preset", 6), preset, "");
    }
}

// back to their defaults: what an earlier process alone was asked for
static inline void options_forget_once(Options *options) {
    int count;
    const OptionRow *rows = option_rows(&count);
    for (int i = 0; i < count; i++) {
        if (rows[i].scope == OPTION_ONCE) {
            option_set(options, &rows[i], rows[i].initial, "");
        }
    }
}

// the value of `--name value` or `--name=value`, the last one given; fallback when absent
static inline const char *options_peek(int argc, const char *const *argv, const char *name,
                                       const char *fallback) {
    for (int i = argc - 1; i >= 0; i--) {
        size_t size = strncmp(argv[i], "--", 2) == 0 ? strcspn(argv[i] + 2, "=") : 0;
        if (size > 0 && option_name_equal(argv[i] + 2, size, name)) {
            const char *rest = argv[i] + 2 + size;
            if (*rest == '=') {
                return rest + 1;
            }
            if (*rest == '\0' && i + 1 < argc) {
                return argv[i + 1];
            }
        }
    }
    return fallback;
}

// was the option given on this command line (under either spelling)?
static inline int options_given(int argc, const char *const *argv, const char *field) {
    const OptionRow *wanted = option_find(field, strlen(field));
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) == 0 && option_find(argv[i] + 2, strcspn(argv[i] + 2, "=")) == wanted) {
            return 1;
        }
    }
    return 0;
}

// ----------------------------------------------------------------------------
// printing, saving, restoring

static inline void option_format(char *out, size_t capacity, const Options *options, const OptionRow *row,
                                 int digits) {
    const char *field = (const char *)options + row->offset;
    if (row->kind == OPTION_TEXT) {
        snprintf(out, capacity, "%s", field);
    } else if (row->kind == OPTION_REAL) {
        double value;
        memcpy(&value, field, sizeof(value));
        snprintf(out, capacity, "%.*g", digits, value);
    } else {
        int64_t value;
        int modes;
        memcpy(&value, field, sizeof(value));
        if (row->kind == OPTION_MODE) {
            snprintf(out, capacity, "%s", option_modes(&modes)[value]);
            return;
        }
        snprintf(out, capacity, "%lld", (long long)value);
    }
}

// does an option have another value than the table's? (--sample, if only an empty prompt)
static inline int option_is_changed(const Options *options, const char *field) {
    char value[OPTION_TEXT_SIZE];
    const OptionRow *row = option_find(field, strlen(field));
    option_format(value, sizeof(value), options, row, 17);
    return strcmp(value, row->initial) != 0 ||
           (options->sampling && row->offset == offsetof(Options, sample));
}

// the preset's name, where the model's sizes are the preset's; how a model routes is no part of a preset
static inline const char *options_model_name(const Options *options) {
    Options preset;
    int count;
    const OptionRow *rows = option_rows(&count);
    options_defaults(&preset, options->preset);
    for (int i = 0; i < count; i++) {
        char want[OPTION_TEXT_SIZE], have[OPTION_TEXT_SIZE];
        option_format(want, sizeof(want), &preset, &rows[i], 17);
        option_format(have, sizeof(have), options, &rows[i], 17);
        if (rows[i].scope == OPTION_SHAPE && strcmp(want, have) != 0) {
            return "custom";
        }
    }
    return options->preset;
}

#endif
