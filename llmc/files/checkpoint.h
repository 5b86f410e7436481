/*
Checkpoints: a folder step_00001000/ per checkpoint, in the formats of Hugging Face.

    config.json            the model's shape (config_file.h)
    model.safetensors      the fp32 weights, or bf16 for exports, by the names of model.h
    optimizer.safetensors  AdamW's moments, exp_avg.NAME and exp_avg_sq.NAME
    state.json             what else the run needs to go on, and its options (state_file.h)
    vocab.json, merges.txt, tokenizer_config.json    the tokenizer, if there is one (tokenizer_files.h)

Written to .tmp_step_00001000/, each file fsynced, then renamed; the link `latest` moves last; then the oldest
are removed (--keep). So a full disk or a kill at any moment leaves the earlier checkpoints as they were. A
folder with config.json and model.safetensors alone loads too, in F32 or BF16, its tensors in any order,
whoever made it.

Errors: whatever is missing or does not fit is named with its file, and exit 1.
*/
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "llmc/files/config_file.h"
#include "llmc/files/safetensors_writer.h"
#include "llmc/files/state_file.h"
#include "llmc/files/tokenizer_files.h"
#include "llmc/model.h"
#include <dirent.h>
// defines: opendir, readdir, mkdir, rename, symlink, unlink, rmdir, fsync

enum { PATH_SIZE = 2048, TENSOR_NAME_SIZE = 128 };
static_assert(sizeof("exp_avg_sq.") + sizeof(((Tensor *)0)->name) <= TENSOR_NAME_SIZE,
              "a moment's name fits");
static_assert(sizeof(((Tensor *)0)->shape) / sizeof(int64_t) <= SAFETENSORS_MAX_DIMS,
              "the format takes our shapes");
static_assert(PATH_SIZE + sizeof(".tmp") <= sizeof(((NewFile *)0)->temporary), "a file has a temporary name");

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
            char name[TENSOR_NAME_SIZE];
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

// moments NULL (or bf16): weights and config only; tokenizer NULL: none goes along. Returns nothing; dies with
// earlier checkpoints intact.
static inline void checkpoint_save(const char *out, const Config *config, const TensorTable *table,
                                   const float *params, const float *exp_avg, const float *exp_avg_sq,
                                   const RunState *state, const Options *options,
                                   const Tokenizer *tokenizer) {
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
        state_write(path, state, options);
    }
    if (tokenizer != NULL) {
        tokenizer_save(tokenizer, temporary, config->max_seq_len);
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
        char name[TENSOR_NAME_SIZE];
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

// 1 when the folder has a state; options NULL: only the state is wanted
static inline int checkpoint_load_state(RunState *state, Options *options, const char *folder) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/state.json", folder);
    if (!path_exists(path)) {
        return 0;
    }
    state_read(state, options, path);
    return 1;
}

#endif
