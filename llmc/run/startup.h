/*
What a run is started with: the options of the table, the preset, a checkpoint and the command line, each over
the one before; and the folder that it writes to. Both trainers start here.

    --resume  continues a run: its own options, data position and folder
    --load    begins a run from weights; to --eval or --sample them, their data and vocabulary come along
A shape option beside either is refused: the checkpoint's config.json decides the shape. Errors: exit 2 for a
command line that contradicts itself, 1 for a folder that does not hold what it should.
*/
#ifndef STARTUP_H
#define STARTUP_H

#include "llmc/files/checkpoint.h"
#include "llmc/files/tokenizer.h"
#include "llmc/run/options.h"
#include <libgen.h>
// defines: dirname

// --dump, --eval, --sample and --export only look at a model
static inline int wants_training(const Options *o) {
    return o->dump[0] == '\0' && !o->eval && o->sample[0] == '\0' && o->export_to[0] == '\0';
}

// the first free runs/NAME[-2, -3, ...], or, to resume, the last one that is taken
static inline void default_out(char *out, const char *preset, const char *router, int resuming) {
    char last[PATH_SIZE], latest[PATH_SIZE];
    for (int i = 1;; i++) {
        if (i == 1) {
            check_format(out, PATH_SIZE, "runs/%s-%s", preset, router);
            check_format(last, sizeof(last), "%s", out);
        } else {
            check_format(out, PATH_SIZE, "runs/%s-%s-%d", preset, router, i);
        }
        check_format(latest, sizeof(latest), "%.1900s/latest", out);
        if (!path_exists(latest)) {
            break;
        }
        check_format(last, sizeof(last), "%s", out);
    }
    if (resuming) {
        check_format(out, PATH_SIZE, "%s", last);
    }
}

// options that a loaded model has already decided
static inline void refuse_shape_options(int argc, const char *const *argv, const char *folder) {
    int count;
    const OptionRow *rows = option_rows(&count);
    for (int i = 0; i < count; i++) {
        int decided = rows[i].scope == OPTION_SHAPE || rows[i].scope == OPTION_ROUTING;
        if (decided && options_given(argc, argv, rows[i].field)) {
            char spelled[OPTION_NAME_SIZE];
            option_spell(spelled, sizeof(spelled), rows[i].field);
            die_usage(
                "--%s cannot be combined with --load or --resume: %s/config.json decides it\n  ---> drop it",
                spelled, folder);
        }
    }
}

// other data than the preset's: its validation shards and its vocabulary do not belong to them
static inline void drop_foreign_data(Options *o, int argc, const char *const *argv) {
    if (options_given(argc, argv, "train_data") && !options_given(argc, argv, "val_data")) {
        o->val_data[0] = '\0';
    }
    if (options_given(argc, argv, "train_data") && !options_given(argc, argv, "tokenizer")) {
        o->tokenizer[0] = '\0';
    }
}

// the options that a checkpoint's run was started with, then the command line's
static inline int inherit_options(Options *o, RunState *state, const char *folder, int argc,
                                  const char *const *argv) {
    options_defaults(o, NULL);
    int found = checkpoint_load_state(state, o, folder);
    options_parse(o, argc, argv);
    return found;
}

// --resume: the run goes on with its own options, in its folder, unless the command line says otherwise
static inline void resume_options(Options *o, RunState *state, int argc, const char *const *argv) {
    char folder[PATH_SIZE], out[PATH_SIZE];
    default_out(out, o->preset, o->router, 1);
    checkpoint_find(folder, o->resume, o->out[0] != '\0' ? o->out : out);
    refuse_shape_options(argc, argv, folder);
    if (!inherit_options(o, state, folder, argc, argv)) {
        die("%s has no state.json: it is not a checkpoint of a run\n  ---> start from its weights: --load %s",
            folder, folder);
    }
    if (!options_given(argc, argv, "out")) { // a run that was moved or copied goes on where it is now
        check_format(out, sizeof(out), "%s", folder);
        check_format(o->out, sizeof(o->out), "%s", dirname(out));
    }
    check_format(o->resume, sizeof(o->resume), "%s", folder);
}

// --load: another run's weights. To look at them (--eval, --sample, --export), its data and vocabulary come
// along
static inline void load_options(Options *o, int argc, const char *const *argv) {
    char folder[PATH_SIZE];
    checkpoint_find(folder, o->load, "");
    refuse_shape_options(argc, argv, folder);
    if (o->eval || o->sample[0] != '\0' || o->export_to[0] != '\0') {
        RunState unused;
        inherit_options(o, &unused, folder, argc, argv);
    }
    check_format(o->load, sizeof(o->load), "%s", folder);
}

// A model's own tokenizer is the one in its checkpoint, unless the command line names another (given). The
// folder that the run was started with may be gone, or be meant from another working folder. Returns "" or a
// folder, which need not be there
static inline const char *tokenizer_folder(const Options *o, int given) {
    const char *loaded = o->resume[0] != '\0' ? o->resume : o->load;
    return !given && tokenizer_is_in(loaded) ? loaded : o->tokenizer;
}

// the tokenizer of a model, whose config learns the token that begins and ends a text
static inline Tokenizer *load_tokenizer(const char *folder, Config *c) {
    Tokenizer *t = tokenizer_load(folder);
    if (t->vocab_size > c->vocab_size) {
        die("%s has %d tokens, the model's vocabulary only %d\n  ---> name the model's own --tokenizer",
            folder, t->vocab_size, c->vocab_size);
    }
    c->bos = c->eos = t->eot;
    return t;
}

static inline void check_options(const Options *o) {
    if (o->global_batch % o->batch != 0) {
        die_usage("--global-batch %lld is not a multiple of --batch %lld", (long long)o->global_batch,
                  (long long)o->batch);
    }
    if (o->batch * o->seq_len > INT32_MAX) {
        die_usage("--batch %lld x --seq-len %lld: more than %d tokens a micro-batch", (long long)o->batch,
                  (long long)o->seq_len, INT32_MAX);
    }
    if (o->eval && o->val_data[0] == '\0') {
        die_usage("--eval has nothing to evaluate\n  ---> name shards with --val-data");
    }
    if (strcmp(o->save_dtype, "f32") != 0 && strcmp(o->save_dtype, "bf16") != 0) {
        die_usage("--save-dtype %s: expected f32 or bf16", o->save_dtype);
    }
    if (strcmp(o->kernels, "auto") != 0 && strcmp(o->kernels, "portable") != 0 &&
        strcmp(o->kernels, "hopper") != 0) {
        die_usage("--kernels %s: expected auto, portable or hopper", o->kernels);
    }
    if (o->lr_min > o->lr) {
        die_usage("--lr-min %g is larger than --lr %g", o->lr_min, o->lr);
    }
    if (!wants_training(o) && o->load[0] == '\0' && o->resume[0] == '\0') {
        die_usage("--eval, --sample, --dump and --export need a model\n  ---> name its folder with --load");
    }
    if (o->route_from[0] != '\0' && o->dump[0] == '\0') {
        die_usage("--route-from belongs to --dump");
    }
}

// from the table, the preset, a checkpoint and the command line, each over the one before
static inline void read_options(Options *o, RunState *state, const char *program, int argc,
                                const char *const *argv) {
    int loading = options_given(argc, argv, "load");
    options_defaults(o, loading ? NULL : options_peek(argc, argv, "preset", "tiny"));
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            options_help(o, program);
            exit(0);
        }
    }
    options_parse(o, argc, argv);
    if (o->resume[0] != '\0' && o->load[0] != '\0') {
        die_usage(
            "--resume and --load exclude each other\n  ---> --resume continues a run, --load starts one");
    }
    if (o->resume[0] != '\0') {
        resume_options(o, state, argc, argv);
    } else if (o->load[0] != '\0') {
        load_options(o, argc, argv);
    }
    drop_foreign_data(o, argc, argv);
    if (o->global_batch == 0 || o->dump[0] != '\0') {
        o->global_batch = o->batch;
    }
    check_options(o);
}

#endif
