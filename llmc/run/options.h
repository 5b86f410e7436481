/*
The command line: one table. The struct, the parser, --help, the presets, the printed settings and the options
saved in a checkpoint (state_file.h) all walk OPTION_TABLE, so an option is written once.

    OPTION(kind, scope, field, default, least, most, what it means)
    kind:  INT (int64), REAL (double), TEXT (least: the fewest bytes that may be given), FLAG (0 or 1;
           `--eval` alone means 1)
    scope: SHAPE, sizes of the model, and ROUTING, how it routes: a loaded model has decided them, so they are
           refused beside --load and --resume
           RUN, which a resumed run keeps unless it is given anew; ONCE, of this process alone
An option's name is its field with dashes: `--global-batch 64` or `--global-batch=64`. Three short names
exist besides: --data for --train-data, --lambda for --lambda-init, --export for --export-to (C++ has the word
itself). A preset is itself a piece of command line,
read before the user's; a resumed run starts from its saved options instead. Errors: exit 2, with the nearest
name.
*/
#ifndef OPTIONS_H
#define OPTIONS_H

#include "llmc/check.h"
#include "llmc/router.h"
#include <math.h>
#include <stddef.h>
// defines: strtoll, strtod, isfinite, offsetof

enum { OPTION_TEXT_SIZE = 16384, OPTION_NAME_SIZE = 64 }; // with the 0 at the end

#define OPTION_TABLE(OPTION)                                                                                 \
    OPTION(TEXT, SHAPE, preset, "tiny", 0, 0,                                                                \
           "tiny, small, medium or large: a set of the options below (the paper's Table 1)")                 \
    OPTION(TEXT, ROUTING, router, "relu", 0, 0,                                                              \
           "how tokens find their experts (ReMoE: relu), one of:" ROUTER_NAMES)                              \
    OPTION(INT, ROUTING, experts, "8", 1, 65536, "E, experts at granularity 1")                              \
    OPTION(INT, ROUTING, active, "1", 1, 65536, "k, experts that a token should use on average, of E")       \
    OPTION(INT, ROUTING, granularity, "1", 1, 65536,                                                         \
           "G: E*G experts of width F/G, k*G of them active (Eq. 12, 13)")                                   \
    OPTION(INT, SHAPE, layers, "3", 1, 1024, "L, transformer layers")                                        \
    OPTION(INT, SHAPE, hidden, "192", 2, 65536, "d, width of the residual stream")                           \
    OPTION(INT, SHAPE, heads, "6", 1, 1024, "H, query heads")                                                \
    OPTION(INT, SHAPE, kv_heads, "2", 1, 1024, "KV, key/value heads; H must be a multiple")                  \
    OPTION(INT, SHAPE, ffn_mult, "4", 1, 1024,                                                               \
           "an expert is ffn_mult * d / G wide (Dense x8: --router dense --ffn-mult 32)")                    \
    OPTION(INT, SHAPE, vocab_size, "2048", 1, 65536,                                                         \
           "V, rows of the embedding; at least the tokenizer's ids")                                         \
    OPTION(FLAG, ROUTING, load_balance, "1", 0, 1,                                                           \
           "f_le of Eq. 11 in the regulariser (relu); the auxiliary loss (topk); the biases (auxfree)")      \
    OPTION(REAL, ROUTING, router_jitter, "0.1", 0, 1e3,                                                      \
           "sparsemixer: r, how far below the best a candidate may be")                                      \
    OPTION(REAL, RUN, aux_coeff, "0.01", 0, 1e6, "weight of the auxiliary loss (topk, sparsemixer)")         \
    OPTION(REAL, RUN, bias_rate, "0.001", 0, 1e3, "auxfree: what a step adds to an expert's bias, or takes") \
    OPTION(REAL, RUN, lambda_init, "1e-8", 0, 1e30,                                                          \
           "lambda_0, the regulariser's first weight (also --lambda)")                                       \
    OPTION(REAL, RUN, alpha, "1.2", 1, 1e3, "lambda's factor per step (Eq. 7)")                              \
    OPTION(INT, RUN, topk_warmup_steps, "0", 0, INT64_MAX,                                                   \
           "topk: near-dense first steps (the paper's Appendix H)")                                          \
    OPTION(INT, RUN, topk_warmup_k, "6", 1, 65536, "topk: k during those steps")                             \
    OPTION(TEXT, RUN, train_data, "build/sample/train_*.bin", 1, 0,                                          \
           "token shards: globs, optionally weighted: a*:0.7,b*:0.3 (also --data)")                          \
    OPTION(TEXT, RUN, val_data, "build/sample/val.*.bin", 0, 0,                                              \
           "validation shards, one per domain: val.DOMAIN.bin ('': no validation)")                          \
    OPTION(TEXT, RUN, tokenizer, "build/sample", 0, 0,                                                       \
           "folder with vocab.json and merges.txt, to show samples ('': none)")                              \
    OPTION(INT, RUN, batch, "16", 1, 65536, "B, sequences per micro-batch and rank")                         \
    OPTION(INT, RUN, seq_len, "192", 1, 1048576, "T, tokens per sequence")                                   \
    OPTION(INT, RUN, global_batch, "0", 0, 1 << 24, "sequences per step (0: one micro-batch)")               \
    OPTION(INT, RUN, steps, "400", 1, 1e12, "optimizer steps of the whole run")                              \
    OPTION(REAL, RUN, lr, "5e-4", 0, 1e3, "largest learning rate")                                           \
    OPTION(REAL, RUN, lr_min, "5e-5", 0, 1e3, "learning rate of the last step")                              \
    OPTION(INT, RUN, warmup_steps, "-1", -1, INT64_MAX, "steps of linear warm-up (-1: 1 % of the steps)")    \
    OPTION(REAL, RUN, weight_decay, "0.01", 0, 1e3, "AdamW's, on tensors of 2 or more dimensions")           \
    OPTION(REAL, RUN, grad_clip, "1", 0, 1e30, "largest gradient norm (0: no clipping)")                     \
    OPTION(INT, RUN, seed, "1234", 0, INT64_MAX, "of the weights, the data order and the samples")           \
    OPTION(FLAG, RUN, shuffle, "1", 0, 1,                                                                    \
           "visit the training windows in a seeded random order (0: shard order)")                           \
    OPTION(TEXT, RUN, out, "", 1, 0,                                                                         \
           "folder of the run: log.jsonl and checkpoints (default: runs/PRESET-ROUTER, numbered)")           \
    OPTION(INT, RUN, save_every, "0", 0, INT64_MAX, "steps between checkpoints (0: only the last)")          \
    OPTION(INT, RUN, keep, "2", 0, INT64_MAX, "newest checkpoints to keep (0: all)")                         \
    OPTION(TEXT, ONCE, save_dtype, "f32", 0, 0, "weights of an export: f32 or bf16")                         \
    OPTION(INT, RUN, val_every, "0", 0, INT64_MAX, "steps between validations (0: only after the last)")     \
    OPTION(INT, RUN, val_batches, "20", 1, 1e12, "micro-batches per validation and domain, at most")         \
    OPTION(INT, RUN, sample_every, "0", 0, INT64_MAX, "steps between samples (0: only after the last)")      \
    OPTION(INT, RUN, sample_tokens, "256", 0, INT64_MAX, "tokens to generate per sample")                    \
    OPTION(TEXT, ONCE, resume, "", 1, 0, "continue a run: a checkpoint, a run's folder, or 'latest'")        \
    OPTION(TEXT, ONCE, load, "", 1, 0,                                                                       \
           "start from the weights of this checkpoint folder (moments and lambda if it has them)")           \
    OPTION(TEXT, ONCE, dump, "", 1, 0,                                                                       \
           "write one micro-batch's losses, gates and gradients to this file; no training")                  \
    OPTION(TEXT, ONCE, route_from, "", 1, 0, "with --dump: take the active experts from this earlier dump")  \
    OPTION(TEXT, ONCE, export_to, "", 1, 0,                                                                  \
           "write --load's model to this new folder, for Hugging Face's libraries (also --export)")          \
    OPTION(FLAG, ONCE, eval, "0", 0, 1, "validation only")                                                   \
    OPTION(TEXT, ONCE, sample, "", 0, 0, "continue this prompt and stop (with --load)")                      \
    OPTION(REAL, RUN, temperature, "0.8", 0, 1e3, "of samples (0: always the likeliest token)")              \
    OPTION(INT, RUN, top_k, "50", 0, 1 << 24, "sample among so many likeliest tokens (0: all)")              \
    OPTION(FLAG, RUN, overfit_batch, "0", 0, 1,                                                              \
           "train on the first batch again and again: a check that learning works")                          \
    OPTION(REAL, RUN, max_minutes, "0", 0, 1e9, "save and stop after so long (0: no limit)")                 \
    OPTION(INT, RUN, threads, "0", 0, 4096, "OpenMP threads (0: as many as cores)")                          \
    OPTION(TEXT, RUN, kernels, "auto", 0, 0,                                                                 \
           "CUDA: kernels of experts and attention: portable, hopper, or auto (the fastest there is)")       \
    OPTION(REAL, RUN, pair_budget, "0", 0, 1e6,                                                              \
           "CUDA: GB of pair storage kept for the backward pass (0: what memory is left over)")              \
    OPTION(FLAG, RUN, recompute, "0", 0, 1,                                                                  \
           "CUDA: normalised inputs are not kept but computed again in backward: less memory, same bits")    \
    OPTION(INT, ONCE, gpus, "0", 0, 64,                                                                      \
           "CUDA: ranks to start on this machine, a process and a GPU each (0: one, or as a launcher says)") \
    OPTION(FLAG, ONCE, zero, "1", 0, 1,                                                                      \
           "CUDA: ranks divide masters and moments among them (ZeRO-1); 0: each keeps all, the same bits")   \
    OPTION(TEXT, ONCE, comm, "auto", 0, 0,                                                                   \
           "CUDA: what carries data between ranks: copies (one machine's copy engines), nccl, or auto")      \
    OPTION(REAL, ONCE, connect_minutes, "5", 1e-3, 1e6, "how long ranks wait for each other at the start")   \
    OPTION(REAL, ONCE, watchdog_minutes, "10", 0, 1e6,                                                       \
           "a rank that stands still so long ends the run (0: never)")                                       \
    OPTION(FLAG, ONCE, bench, "0", 0, 1, "reach the target sparsity, then time whole steps")

#define OPTION_FIELD_INT(field) int64_t field;
#define OPTION_FIELD_REAL(field) double field;
#define OPTION_FIELD_TEXT(field) char field[OPTION_TEXT_SIZE];
#define OPTION_FIELD_FLAG(field) int64_t field;
#define OPTION_FIELD(kind, scope, field, initial, least, most, help) OPTION_FIELD_##kind(field)

typedef struct {
    OPTION_TABLE(OPTION_FIELD)
    int sampling; // --sample was given, if only with an empty prompt
} Options;

#define OPTION_CHECK(kind, scope, field, ...)                                                                \
    static_assert(sizeof(#field) <= OPTION_NAME_SIZE, #field ": too long a name");
OPTION_TABLE(OPTION_CHECK)

typedef enum { OPTION_INT, OPTION_REAL, OPTION_TEXT, OPTION_FLAG } OptionKind;
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
               : "--kv-heads 4 --vocab-size 51200 --seq-len 1024 --batch 4 --global-batch 512 --steps 60000 "
                 "--train-data data/pile/train_*.bin --val-data data/pile/val.*.bin --tokenizer data/gpt2 "
                 "--save-every 1000 --val-every 1000 --val-batches 100";
}

// ----------------------------------------------------------------------------
// parsing

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
        int next_is_value = i + 1 < argc && (row->kind != OPTION_FLAG || option_is_switch(argv[i + 1]));
        if (equals != NULL || next_is_value) {
            const char *value = equals != NULL ? equals + 1 : argv[++i];
            option_refuse_empty(row, value);
            option_set(options, row, value, "");
        } else if (row->kind == OPTION_FLAG) {
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
        memcpy(&value, field, sizeof(value));
        snprintf(out, capacity, "%lld", (long long)value);
    }
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
