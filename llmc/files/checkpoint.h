/*
Checkpoints: a folder step_00001000/ a checkpoint, in the formats of Hugging Face.

    config.json            the model's shape (config.h)
    model.safetensors      the fp32 weights, or bf16 for exports, by the names of model.h
    optimizer.safetensors  AdamW's moments, exp_avg.NAME and exp_avg_sq.NAME
    state.json             step, AdamW's t, loader position, lambda and stage, random state, all options

Written to .tmp_step_00001000/, each file fsynced, then renamed; the link `latest` moves last; then the oldest
are removed (--keep). So a full disk or a kill at any moment leaves the earlier checkpoints as they were. A
folder with config.json and model.safetensors alone loads too, in F32 or BF16, its tensors in any order,
whoever made it.

Errors: whatever is missing or does not fit is named with its file, and exit 1.
*/
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "llmc/lambda.h"
#include "llmc/model.h"
#include "llmc/files/safetensors_writer.h"
#include <dirent.h>
// defines: opendir, readdir, mkdir, rename, symlink, unlink, rmdir, fsync

enum { PATH_SIZE = 2048 };

#define STATE_MOST 1e15 // far from overflow, whatever a run adds to it, and exact in a double
#define STATE_HINT "name another checkpoint, or remove the file and --load the folder for its weights alone"

// all that a run needs to go on besides weights and moments
typedef struct {
    int64_t step;           // optimizer steps of this run that are done
    int64_t optimizer_step; // AdamW's t (larger than step when the weights came with their moments)
    int64_t sequences;      // the loader's position
    LambdaState sparsity;
} RunState;

static inline int path_exists(const char *path) {
    struct stat status;
    return stat(path, &status) == 0;
}

// mkdir -p
static inline void make_folder(const char *path) {
    char part[PATH_SIZE];
    check_format(part, sizeof(part), "%s", path);
    for (char *slash = strchr(part + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(part, 0777);
        *slash = '/';
    }
    if (mkdir(part, 0777) != 0 && errno != EEXIST) {
        die("cannot make the folder %s: %s\n  ---> choose another folder with --out", path, strerror(errno));
    }
}

// removes a folder of plain files, or a link without what it points to; quiet when it is not there
static inline void remove_folder(const char *path) {
    DIR *folder = unlink(path) == 0 ? NULL : opendir(path);
    if (folder == NULL) {
        return;
    }
    for (struct dirent *entry = readdir(folder); entry != NULL; entry = readdir(folder)) {
        char file[PATH_SIZE];
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            check_format(file, sizeof(file), "%s/%s", path, entry->d_name);
            unlink(file);
        }
    }
    closedir(folder);
    rmdir(path);
}

// ----------------------------------------------------------------------------
// saving

// one flat buffer as tensors prefix + NAME; buffers: how many, written one after the other
static inline void save_tensors(const char *path, const TensorTable *table, const char *const *prefixes,
                                const float *const *buffers, int count, const char *dtype) {
    SafetensorsWriter writer;
    safetensors_writer_open(&writer, path);
    for (int b = 0; b < count; b++) {
        for (int i = 0; i < table->count; i++) {
            char name[128];
            check_format(name, sizeof(name), "%s%s", prefixes[b], table->tensors[i].name);
            safetensors_declare(&writer, name, dtype, table->tensors[i].ndim, table->tensors[i].shape);
        }
    }
    safetensors_write_header(&writer);
    for (int b = 0; b < count; b++) {
        for (int i = 0; i < table->count; i++) {
            safetensors_write_f32(&writer, buffers[b] + table->tensors[i].offset,
                                  (size_t)table->tensors[i].size);
        }
    }
    safetensors_writer_finish(&writer);
}

static inline void save_state(const char *path, const RunState *state, const Options *options) {
    NewFile file;
    const LambdaState *s = &state->sparsity;
    newfile_open(&file, path);
    fprintf(file.file, "{\n  \"step\": %lld,\n  \"optimizer_step\": %lld,\n  \"sequences\": %lld,\n",
            (long long)state->step, (long long)state->optimizer_step, (long long)state->sequences);
    fprintf(file.file, "  \"lambda\": %.9g,\n  \"stage\": %d,\n  \"min_sparsity\": %.17g,\n", s->lambda,
            s->stage, s->min_sparsity);
    fprintf(file.file, "  \"rising_steps\": %d,\n  \"stage2_step\": %lld,\n  \"stage3_step\": %lld,\n",
            s->rising_steps, (long long)s->stage2_step, (long long)s->stage3_step);
    // every draw is a function of (seed, stream, counter): the seed and the step are the random state
    fprintf(file.file,
            "  \"rng\": {\"seed\": %lld, \"counter\": %lld},\n  \"options\": ", (long long)options->seed,
            (long long)state->step);
    options_write_json(file.file, options);
    fprintf(file.file, "\n}\n");
    newfile_close(&file);
}

// "step_" and digits; what is named otherwise is not ours to remove
static inline int is_checkpoint_name(const char *name) {
    return strncmp(name, "step_", 5) == 0 && name[5] != '\0' &&
           name[5 + strspn(name + 5, "0123456789")] == '\0';
}

// Keeps the `keep` highest steps up to `current` (0: all). Later ones are of a future that a resumed run has
// left: they stay until it writes its own. A folder loses its name first: a kill leaves no half of one
static inline void remove_oldest(const char *out, const char *current, int64_t keep) {
    struct dirent **names;
    int n = scandir(out, &names, NULL, versionsort);
    int64_t seen = 0;
    for (int i = n - 1; i >= 0; i--) {
        const char *name = names[i]->d_name;
        char path[PATH_SIZE], temporary[PATH_SIZE];
        check_format(path, sizeof(path), "%s/%s", out, name);
        check_format(temporary, sizeof(temporary), "%s/.tmp_%s", out, name);
        if (strncmp(name, ".tmp_step_", 10) == 0) { // of a run that was killed while saving
            remove_folder(path);
        } else if (keep > 0 && is_checkpoint_name(name) && strverscmp(name, current) <= 0 && ++seen > keep) {
            remove_folder(temporary);
            rename(path, temporary);
            remove_folder(temporary);
        }
        free(names[i]);
    }
    if (n > 0) {
        free(names);
    }
}

// gives a whole folder its name. Where the same step was saved before, the two change places at once; on file
// systems that cannot do that, the earlier one steps aside first
static inline void place_folder(const char *temporary, const char *folder) {
    char aside[PATH_SIZE];
    if (rename(temporary, folder) == 0) {
        return;
    }
#ifdef RENAME_EXCHANGE
    if (renameat2(AT_FDCWD, temporary, AT_FDCWD, folder, RENAME_EXCHANGE) == 0) {
        remove_folder(temporary);
        return;
    }
#endif
    check_format(aside, sizeof(aside), "%s.old", temporary);
    remove_folder(aside);
    if (rename(folder, aside) != 0 || rename(temporary, folder) != 0) {
        die("cannot rename %s: %s\n  ---> it is whole: rename it to %s", temporary, strerror(errno), folder);
    }
    remove_folder(aside);
}

// moves the link out/latest to `name` in one step
static inline void point_latest(const char *out, const char *name) {
    char link_path[PATH_SIZE], temporary[PATH_SIZE];
    check_format(link_path, sizeof(link_path), "%s/latest", out);
    check_format(temporary, sizeof(temporary), "%s/.tmp_latest", out);
    unlink(temporary);
    if (symlink(name, temporary) != 0 || rename(temporary, link_path) != 0) {
        die("cannot move the link %s: %s\n  ---> the checkpoint itself is whole: --resume %s/%s", link_path,
            strerror(errno), out, name);
    }
}

// moments NULL (or bf16): weights and config only. Returns nothing; dies with earlier checkpoints intact.
static inline void checkpoint_save(const char *out, const Config *config, const TensorTable *table,
                                   const float *params, const float *exp_avg, const float *exp_avg_sq,
                                   const RunState *state, const Options *options) {
    static const char *const no_prefix[] = {""};
    static const char *const moment_prefixes[] = {"exp_avg.", "exp_avg_sq."};
    const float *moments[] = {exp_avg, exp_avg_sq};
    int bf16 = strcmp(options->save_dtype, "bf16") == 0;
    char name[64], folder[PATH_SIZE], temporary[PATH_SIZE], path[PATH_SIZE];
    check_format(name, sizeof(name), "step_%08lld", (long long)state->step);
    check_format(folder, sizeof(folder), "%s/%s", out, name);
    check_format(temporary, sizeof(temporary), "%s/.tmp_%s", out, name);
    remove_folder(temporary);
    make_folder(temporary);
    check_format(path, sizeof(path), "%s/config.json", temporary);
    NewFile file;
    newfile_open(&file, path);
    config_write(config, file.file);
    newfile_close(&file);
    check_format(path, sizeof(path), "%s/model.safetensors", temporary);
    save_tensors(path, table, no_prefix, &params, 1, bf16 ? "BF16" : "F32");
    if (!bf16) {
        check_format(path, sizeof(path), "%s/optimizer.safetensors", temporary);
        save_tensors(path, table, moment_prefixes, moments, 2, "F32");
        check_format(path, sizeof(path), "%s/state.json", temporary);
        save_state(path, state, options);
    }
    place_folder(temporary, folder);
    point_latest(out, name);
    newfile_sync_folder(folder); // the names in `out`
    remove_oldest(out, name, options->keep);
}

// ----------------------------------------------------------------------------
// loading

// a checkpoint folder from what the user named: 'latest' (of `out`), a run's folder, or the checkpoint itself
static inline void checkpoint_find(char *folder, const char *named, const char *out) {
    char path[PATH_SIZE];
    if (strcmp(named, "latest") == 0 && !path_exists("latest/config.json")) {
        check_format(folder, PATH_SIZE, "%s/latest", out);
    } else {
        check_format(path, sizeof(path), "%s/latest/config.json", named);
        check_format(folder, PATH_SIZE, "%s%s", named, path_exists(path) ? "/latest" : "");
    }
    check_format(path, sizeof(path), "%s/config.json", folder);
    if (!path_exists(path)) {
        die("no checkpoint in %s: there is no %s\n  ---> train one first, or name its folder", folder, path);
    }
}

static inline void load_tensors(float *buffer, const Safetensors *st, const TensorTable *table,
                                const char *prefix) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        char name[128];
        check_format(name, sizeof(name), "%s%s", prefix, tensor->name);
        safetensors_read_f32(st, safetensors_require(st, name, tensor->ndim, tensor->shape),
                             buffer + tensor->offset);
    }
}

static inline void checkpoint_load_weights(float *params, const char *folder, const TensorTable *table) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/model.safetensors", folder);
    Safetensors *st = safetensors_open(path, "name a folder with config.json and model.safetensors");
    load_tensors(params, st, table, "");
    safetensors_close(st);
}

// 1 when the folder has moments, 0 when they stay zero
static inline int checkpoint_load_moments(float *exp_avg, float *exp_avg_sq, const char *folder,
                                          const TensorTable *table) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/optimizer.safetensors", folder);
    if (!path_exists(path)) {
        return 0;
    }
    Safetensors *st = safetensors_open(path, "remove the file to start with zero moments");
    load_tensors(exp_avg, st, table, "exp_avg.");
    load_tensors(exp_avg_sq, st, table, "exp_avg_sq.");
    safetensors_close(st);
    return 1;
}

static inline double state_real(const Json *json, const char *path, const char *key, double least,
                                double most) {
    double value = 0.0;
    const Json *member = json_get(json, key);
    if (member == NULL || !json_double(member, &value) || value < least || value > most) {
        die("%s: \"%s\" is missing or unusable, expected a number from %.15g to %.15g\n  ---> " STATE_HINT,
            path, key, least, most);
    }
    return value;
}

// an integer below 2^53, which a double holds exactly
static inline int64_t state_int(const Json *json, const char *path, const char *key, double least,
                                double most) {
    int64_t value = 0;
    double real = state_real(json, path, key, least, most);
    if (!json_int64(json_get(json, key), &value)) {
        die("%s: \"%s\" is unusable: %g, expected an integer\n  ---> " STATE_HINT, path, key, real);
    }
    return value;
}

// 1 when the folder has a state; options NULL: only the state is wanted. alpha is the options' business.
static inline int checkpoint_load_state(RunState *state, Options *options, const char *folder) {
    char path[PATH_SIZE];
    JsonArena arena;
    check_format(path, sizeof(path), "%s/state.json", folder);
    if (!path_exists(path)) {
        return 0;
    }
    json_arena_init(&arena);
    const Json *json = json_parse_file(path, &arena, STATE_HINT);
    if (json->type != JSON_OBJECT || json_duplicate_key(json) != NULL) {
        die("%s: expected one JSON object without repeated keys\n  ---> " STATE_HINT, path);
    }
    state->step = state_int(json, path, "step", 0, STATE_MOST);
    state->optimizer_step = state_int(json, path, "optimizer_step", 0, STATE_MOST);
    state->sequences = state_int(json, path, "sequences", 0, STATE_MOST);
    state->sparsity.lambda = (float)state_real(json, path, "lambda", 1e-30, 1.00000002e30); // as 1e30 prints
    state->sparsity.stage = (int)state_int(json, path, "stage", STAGE_DENSE, STAGE_SPARSE);
    state->sparsity.min_sparsity = state_real(json, path, "min_sparsity", 0.0, 1.0);
    state->sparsity.rising_steps = (int)state_int(json, path, "rising_steps", 0, 1 << 30);
    state->sparsity.stage2_step = state_int(json, path, "stage2_step", -1, STATE_MOST);
    state->sparsity.stage3_step = state_int(json, path, "stage3_step", -1, STATE_MOST);
    if (options != NULL) {
        options_read_json(options, json_get(json, "options"), path);
        // where that process began, and what else it was asked for, is not what a resumed one is asked for
        options->load[0] = options->dump[0] = options->route_from[0] = options->sample[0] = '\0';
        options->eval = options->bench = 0;
    }
    json_arena_free(&arena);
    return 1;
}

#endif
