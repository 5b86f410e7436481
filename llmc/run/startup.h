/*
What a run is started with: the options of the table, the preset, a checkpoint and the command line, each over
the one before; and the folder that it writes to. Both trainers start here.

    --resume  continues a run: its own options, data position and folder
    --load    begins a run from weights; where they are only looked at (--eval, --sample, --trace, --score,
              --generate, --export), their data and vocabulary come along
A shape option beside either is refused: the checkpoint's config.json decides the shape. Errors: exit 2 for a
command line that contradicts itself, 1 for a folder that does not hold what it should.
*/
#ifndef STARTUP_H
#define STARTUP_H

#include "llmc/files/checkpoint.h"
#include "llmc/files/logger.h"
#include "llmc/files/tokenizer.h"
#include "llmc/run/help.h"
#include "llmc/run/options.h"
// defines: checkpoint_*, run_in_folder; log_has_validation; tokenizer_load; answer_help; Options, options_*

// --trace of a model that is loaded; else it follows the training
static inline int traces_only(const Options *o) {
    return o->trace[0] != '\0' && o->load[0] != '\0';
}

// --score and --generate: a file of requests to a file of results
static inline int has_requests(const Options *o) {
    return o->score[0] != '\0' || o->generate[0] != '\0';
}

// --dump, --eval, --sample, --score, --generate, --export and this --trace only look at a model
static inline int wants_training(const Options *o) {
    return o->dump[0] == '\0' && !o->eval && !o->sampling && !traces_only(o) && !has_requests(o) &&
           o->export_to[0] == '\0';
}

// ... with the data, batch and vocabulary of the model's own run, all but --dump, whose checkers name theirs; so
// do --bench forward and sample
static inline int takes_runs_data(const Options *o) {
    int looks = !wants_training(o) || o->bench == BENCH_FORWARD || o->bench == BENCH_SAMPLE;
    return looks && o->dump[0] == '\0';
}

// ... and --bench trains, but keeps nothing of it
static inline int writes_run(const Options *o) {
    return wants_training(o) && !o->bench;
}

// what must be known before there are ranks, of which one then reads all options
static inline void read_launch_options(Options *o, int argc, const char *const *argv) {
    static const char *const fields[] = {"gpus", "connect_minutes", "watchdog_minutes"};
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        const OptionRow *row = option_find(fields[i], strlen(fields[i]));
        option_set(o, row, options_peek(argc, argv, row->field, row->initial), "");
    }
}

// the first runs/NAME[-2, -3, ...] that holds nothing of a run
static inline void default_out(char *out, const char *preset, const char *router) {
    char log[PATH_SIZE];
    check_format(out, PATH_SIZE, "runs/%s-%s", preset, router);
    check_format(log, sizeof(log), "%s/log.jsonl", out);
    for (int i = 2; run_in_folder(out) != NULL || name_exists(log); i++) {
        check_format(out, PATH_SIZE, "runs/%s-%s-%d", preset, router, i);
        check_format(log, sizeof(log), "%s/log.jsonl", out);
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

// The checkpoint to resume, the folder of its run, and its name there. A link leads to the run that the
// checkpoint belongs to; where none does, the folder keeps the spelling that the user gave it
static inline void find_run(char *folder, char *home, char *name, const Options *o) {
    char real_home[PATH_SIZE];
    checkpoint_find(folder, o->resume, o->out);
    char *real = realpath(folder, NULL);
    split_path(home, name, folder);
    if (real != NULL) {
        split_path(real_home, name, real);
        if (!same_folder(home, real_home)) {
            check_format(home, PATH_SIZE, "%s", real_home);
        }
        int here = strcmp(home, ".") == 0;
        check_format(folder, PATH_SIZE, "%.1500s%s%.500s", here ? "" : home, here ? "" : "/", name);
        free(real);
    }
}

// whose checkpoints a folder holds, beside those of a run
typedef struct {
    int own;                            // of that run
    char other[CHECKPOINT_NAME_SIZE];   // one of another run, or ""
    char unknown[CHECKPOINT_NAME_SIZE]; // one that does not say, or "": from before runs had numbers
} Neighbours;

// of a checkpoint of `run`, which may itself lie in `out`
static inline Neighbours find_neighbours(const char *out, const char *folder, uint64_t run) {
    Neighbours found = {0, "", ""};
    CheckpointName *list;
    int n = list_checkpoints(out, &list);
    for (int i = 0; i < n; i++) {
        char path[PATH_SIZE];
        check_format(path, sizeof(path), "%s/%s", out, list[i].name);
        int itself = same_folder(path, folder);
        check_format(path, sizeof(path), "%s/%s/state.json", out, list[i].name);
        uint64_t its_run = itself ? run : peek_run(path);
        if (itself || (its_run == run && run != 0)) {
            found.own++;
        } else {
            memcpy(its_run == 0 || run == 0 ? found.unknown : found.other, list[i].name, sizeof(found.other));
        }
    }
    free(list);
    return found;
}

// Dies when `out` holds another run than the one that would go on there. A run that was moved or copied whole
// goes on where it is; a checkpoint that was copied by itself does not make a run of the folder around it.
// Returns 1 when it is the run's own folder
static inline int check_whose_folder(const char *out, const char *folder, const char *name, uint64_t run,
                                     int out_given) {
    Neighbours found = find_neighbours(out, folder, run);
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/%s", out, name);
    int inside = same_folder(path, folder) && (checkpoint_step(name) >= 0 || found.own > 0);
    // what does not say whose it is belongs to the run in whose folder it lies
    const char *other = found.other[0] != '\0' || inside ? found.other : found.unknown;
    if (other[0] != '\0') {
        die("%s holds another run than %s: its %s\n  ---> choose another folder with --out, or continue that "
            "run with --resume %s",
            out, folder, other, out);
    }
    if (!inside && !out_given) {
        die("%s is a copy outside of its run's folder\n  ---> name a folder for the run: --resume %s --out "
            "RUN",
            folder, folder);
    }
    if (!inside && found.own == 0 && run_in_folder(out) != NULL) {
        die("%s already holds a run: %s\n  ---> remove it, or choose another folder with --out", out,
            run_in_folder(out));
    }
    return inside || found.own > 0;
}

// --resume: the run goes on with its own options, in its folder, unless the command line says otherwise. The
// folder is locked before its `latest` is followed: a process that saves there and ends would otherwise leave
// one step's weights with another's moments. Returns the lock, or -1
static inline int resume_options(Options *o, RunState *state, Provenance *provenance, int argc,
                                 const char *const *argv) {
    char folder[PATH_SIZE], home[PATH_SIZE], name[PATH_SIZE], out[PATH_SIZE];
    int writing = writes_run(o), lock = -1, out_given = o->out[0] != '\0';
    find_run(folder, home, name, o);
    if (writing && (!out_given || path_exists(o->out))) {
        lock = lock_folder(out_given ? o->out : home, "trains");
        if (!out_given || same_folder(o->out, home)) {
            mend_run(home);
        }
        find_run(folder, home, name, o);
    }
    refuse_shape_options(argc, argv, folder);
    if (!inherit_options(o, state, folder, argc, argv)) {
        die("%s has no state.json: it is not a checkpoint of a run\n  ---> start from its weights: --load %s",
            folder, folder);
    }
    checkpoint_load_provenance(provenance, folder);
    check_format(out, sizeof(out), "%s", out_given ? o->out : home);
    check_format(o->out, sizeof(o->out), "%s", out);
    check_format(o->resume, sizeof(o->resume), "%s", folder);
    if (writing &&
        (!check_whose_folder(out, folder, name, provenance->run, out_given) || provenance->run == 0)) {
        provenance->run = draw_run(); // a branch of the run, or a run from before they had a number
    }
    return lock;
}

// A run that has all its steps, and has validated them: nothing is left to do, and nothing is touched
static inline void stop_if_finished(const Options *o, const RunState *state) {
    char log[PATH_SIZE], home[PATH_SIZE], name[PATH_SIZE];
    split_path(home, name, o->resume);
    check_format(log, sizeof(log), "%s/log.jsonl", o->out);
    int to_validate = same_folder(home, o->out) && o->val_data[0] != '\0';
    if (state->step < o->steps || (to_validate && !log_has_validation(log, state->step))) {
        return;
    }
    printf("%s has done %lld steps, and --steps is %lld: nothing is left to do, and nothing was changed\n"
           "  ---> to go on: --resume %s --steps %lld; to look at it: --load %s --eval, or --sample TEXT\n",
           o->resume, (long long)state->step, (long long)o->steps, o->resume, (long long)(2 * state->step),
           o->resume);
    exit(0);
}

// --load: another run's weights, and what comes along; never the folder that it wrote to
static inline void load_options(Options *o, int argc, const char *const *argv) {
    char folder[PATH_SIZE];
    checkpoint_find(folder, o->load, "");
    refuse_shape_options(argc, argv, folder);
    if (takes_runs_data(o)) {
        RunState unused;
        inherit_options(o, &unused, folder, argc, argv);
    }
    if (!options_given(argc, argv, "out")) {
        o->out[0] = '\0';
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

// the largest batch up to `batch` with which ranks share a global batch out evenly; 0: there is none
static inline int64_t even_batch(int64_t global_batch, int64_t batch, int ranks) {
    for (int64_t b = batch; b > 0; b--) {
        if (global_batch % (b * ranks) == 0) {
            return b;
        }
    }
    return 0;
}

static inline void check_batch(const Options *o, int ranks) {
    int64_t even = even_batch(o->global_batch, o->batch, ranks);
    char remedy[64] = "a --global-batch that is a multiple of the ranks";
    if (even == o->batch) {
        return;
    }
    if (even > 0) {
        check_format(remedy, sizeof(remedy), "--batch %lld", (long long)even);
    }
    if (ranks == 1) {
        die_usage("--global-batch %lld is not a multiple of --batch %lld\n  ---> %s",
                  (long long)o->global_batch, (long long)o->batch, remedy);
    }
    die_usage("--global-batch %lld is not a multiple of --batch %lld on %d ranks\n  ---> %s",
              (long long)o->global_batch, (long long)o->batch, ranks, remedy);
}

// What is done instead of training: one thing at a time. (--trace also follows --eval, or a training)
static inline void check_modes(const Options *o) {
    const char *const modes[] = {o->dump[0] != '\0' ? "--dump" : NULL,
                                 o->eval ? "--eval" : NULL,
                                 o->sampling ? "--sample" : NULL,
                                 o->score[0] != '\0' ? "--score" : NULL,
                                 o->generate[0] != '\0' ? "--generate" : NULL,
                                 o->trace[0] != '\0' && !o->eval ? "--trace" : NULL,
                                 o->bench ? "--bench" : NULL,
                                 o->export_to[0] != '\0' ? "--export" : NULL};
    const char *first = NULL;
    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (first != NULL && modes[i] != NULL) {
            die_usage("%s and %s exclude each other: one at a time\n  ---> first one, then the other", first,
                      modes[i]);
        }
        first = modes[i] != NULL ? modes[i] : first;
    }
}

// options that say nothing without another
static inline void check_owners(const Options *o) {
    static const char *const owned[][2] = {
        {"stats", "eval"},     {"stats_layers", "stats"}, {"text", "trace"},      {"stats_tokens", "stats"},
        {"samples", "sample"}, {"trace_tokens", "trace"}, {"delimiter", "score"}, {"route_from", "dump"}};
    for (size_t i = 0; i < sizeof(owned) / sizeof(owned[0]); i++) {
        if (option_is_changed(o, owned[i][0]) && !option_is_changed(o, owned[i][1])) {
            char spelled[OPTION_NAME_SIZE];
            option_spell(spelled, sizeof(spelled), owned[i][0]);
            die_usage("--%s belongs to --%s\n  ---> name both, or neither", spelled, owned[i][1]);
        }
    }
}

// What is there is replaced only if it may be an earlier one: a safetensors file is a header's length in 8 bytes,
// then the header
static inline void refuse_foreign_output(const char *path, const char *option) {
    enum { LENGTH = 8 };
    struct stat status;
    char head[LENGTH + 1];
    if (path[0] == '\0' || stat(path, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size == 0) {
        return;
    }
    FILE *file = fopen(path, "rb");
    int foreign = file != NULL && (fread(head, 1, sizeof(head), file) < sizeof(head) || head[LENGTH] != '{');
    if (file != NULL) {
        fclose(file);
    }
    if (foreign) {
        die("--%s %s is there, and no safetensors file\n  ---> name another file, or remove it", option,
            path);
    }
}

// what looks at the routers
static inline void check_routing_options(const Options *o) {
    if (strcmp(o->stats_layers, "middle") != 0 && strcmp(o->stats_layers, "all") != 0) {
        die_usage("--stats-layers %s: expected middle or all", o->stats_layers);
    }
    if (o->text[0] != '\0' && same_folder(o->text, o->trace)) {
        die_usage("--trace would write over its own --text %s\n  ---> name another file", o->text);
    }
    refuse_foreign_output(o->stats, "stats");
    refuse_foreign_output(o->trace, "trace");
    if (o->flip_every > 0 && o->val_data[0] == '\0' && writes_run(o)) {
        die_usage("--flip-every needs validation data, on which flips are counted\n"
                  "  ---> name shards with --val-data, or leave it out");
    }
}

static inline void check_options(const Options *o, int ranks) {
    check_modes(o);
    check_routing_options(o);
    check_batch(o, ranks);
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
    if (strcmp(o->comm, "auto") != 0 && strcmp(o->comm, "copies") != 0 && strcmp(o->comm, "nccl") != 0) {
        die_usage("--comm %s: expected auto, copies or nccl", o->comm);
    }
    if (wants_training(o) && o->lambda_init < 1e-30) {
        die_usage(
            "--lambda-init %g: lambda grows by a factor per step, and never does from 0 (--dump takes it)\n"
            "  ---> 1e-30 or more, or another --router",
            o->lambda_init);
    }
    if (o->lr_min > o->lr) {
        die_usage("--lr-min %g is larger than --lr %g", o->lr_min, o->lr);
    }
    if (!wants_training(o) && o->load[0] == '\0' && o->resume[0] == '\0') {
        die_usage("--eval, --sample, --score, --generate, --dump and --export need a model\n"
                  "  ---> name its folder with --load");
    }
    if (has_requests(o) && o->out[0] == '\0') {
        die_usage("--%s has nowhere to write\n  ---> name a file with --out",
                  o->score[0] != '\0' ? "score" : "generate");
    }
    check_owners(o);
}

// From the table, the preset, a checkpoint and the command line, each over the one before. Returns the lock
// of the folder of a run that is resumed, or -1
static inline int read_options(Options *o, RunState *state, Provenance *provenance, const char *program,
                               int argc, const char *const *argv, int ranks) {
    int lock = -1;
    int loading = options_given(argc, argv, "load");
    options_defaults(o, loading ? NULL : options_peek(argc, argv, "preset", "tiny"));
    answer_help(o, program, argc, argv);
    options_parse(o, argc, argv);
    if (o->resume[0] != '\0' && o->load[0] != '\0') {
        die_usage(
            "--resume and --load exclude each other\n  ---> --resume continues a run, --load starts one");
    }
    if (o->resume[0] != '\0') {
        lock = resume_options(o, state, provenance, argc, argv);
    } else if (o->load[0] != '\0') {
        load_options(o, argc, argv);
    }
    drop_foreign_data(o, argc, argv);
    if (o->global_batch == 0 || !wants_training(o)) {
        o->global_batch = o->batch * ranks;
    }
    check_options(o, ranks);
    if (wants_training(o) && options_given(argc, argv, "save_dtype")) {
        die_usage(
            "--save-dtype belongs to --export: a training run always saves f32, which alone it can go on "
            "from\n  ---> train without it, then: --load RUN --export FOLDER --save-dtype %s",
            o->save_dtype);
    }
    if (o->resume[0] != '\0' && writes_run(o)) {
        stop_if_finished(o, state);
    }
    return lock;
}

#endif
