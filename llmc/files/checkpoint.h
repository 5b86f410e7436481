/*
Checkpoints: a folder step_00001000/ per checkpoint, in the formats of Hugging Face.

    config.json            the model's shape (config_file.h)
    model.safetensors      the fp32 weights, by the names of model.h
    optimizer.safetensors  AdamW's moments, exp_avg.NAME and exp_avg_sq.NAME
    state.json             what else the run needs to go on, which run that is, and its options (state_file.h)
    vocab.json, merges.txt, tokenizer_config.json    the tokenizer, if there is one (tokenizer_files.h)

Written to .tmp_step_00001000/, each file fsynced, then renamed; the link `latest` moves last (run_folder.h);
the oldest are removed later (remove_oldest). So a full disk or a kill at any moment leaves the earlier
checkpoints as they were. Each rank writes and reads the ranges that it keeps, piece by piece (ranges.h), of
the same two safetensors files; rank 0 does all the rest. A folder with config.json and model.safetensors
alone loads too, in F32, BF16 or F16, its tensors in any order and in any number of files (weight_files.h),
whoever made it.

Errors: whatever is missing, does not fit or is not used is named with its file, and exit 1.
*/
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "llmc/files/buffer_files.h"
#include "llmc/files/config_file.h"
#include "llmc/files/provenance.h"
#include "llmc/files/run_folder.h"
#include "llmc/files/state_file.h"
#include "llmc/files/tokenizer_files.h"
#include "llmc/files/weight_files.h"
#include "llmc/run/ranks.h"

#define TOKEN_NAME ".ranks" // in a temporary folder: a number that tells it from others of its name
// what stands before a tensor's name in each of the two files
static const char *const weight_prefix[] = {""};
static const char *const moment_prefixes[] = {"exp_avg.", "exp_avg_sq."};
static_assert(sizeof("exp_avg_sq.") + sizeof(((Tensor *)0)->name) <= TENSOR_NAME_SIZE,
              "a moment's name fits");
static_assert(PATH_SIZE + sizeof(".tmp") <= sizeof(((NewFile *)0)->temporary), "a file has a temporary name");

// ----------------------------------------------------------------------------
// saving

// Keeps the `keep` highest steps up to `current` (0: all). Later ones are of a future that a resumed run has
// left: they stay until it writes its own. A folder loses its name first: a kill leaves no half of one
static inline void remove_oldest(const char *out, int64_t current, int64_t keep) {
    CheckpointName *list;
    int n = list_checkpoints(out, &list);
    int64_t seen = 0;
    for (int i = 0; i < n && keep > 0; i++) {
        char path[PATH_SIZE], temporary[PATH_SIZE];
        if (list[i].step <= current && ++seen > keep) {
            check_format(path, sizeof(path), "%s/%s", out, list[i].name);
            check_format(temporary, sizeof(temporary), "%s/.tmp_%s", out, list[i].name);
            remove_folder(temporary);
            rename(path, temporary);
            remove_folder(temporary);
        }
    }
    free(list);
    remove_halves(out);
}

// Gives a whole folder its name. Where the same step was saved before, the two change places at once. On file
// systems that cannot do that, the earlier one steps aside first, under a name that counts (run_folder.h): a
// kill between the two renames loses neither
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
    check_format(aside, sizeof(aside), "%s.old", folder);
    remove_folder(aside);
    if (rename(folder, aside) != 0 || rename(temporary, folder) != 0) {
        int cause = errno;
        rename(aside, folder);
        die("cannot rename %s: %s\n  ---> it is whole: rename it to %s", temporary, strerror(cause), folder);
    }
    remove_folder(aside);
}

// the number in a folder's token; 0: there is none to be seen
static inline uint64_t read_token(const char *folder) {
    char path[PATH_SIZE];
    uint64_t number = 0;
    check_format(path, sizeof(path), "%s/" TOKEN_NAME, folder);
    FILE *file = fopen(path, "rb");
    size_t n = file != NULL ? fread(&number, sizeof(number), 1, file) : 0;
    if (file != NULL) {
        fclose(file);
    }
    return n == 1 ? number : 0;
}

static inline void write_token(const char *folder, uint64_t number) {
    char path[PATH_SIZE];
    NewFile file;
    check_format(path, sizeof(path), "%s/" TOKEN_NAME, folder);
    newfile_open(&file, path);
    newfile_write(&file, &number, sizeof(number), 1);
    newfile_close(&file);
}

// unseen [ranks]: dies if the folder that rank 0 has made is unseen on one of them
static inline void refuse_unseen(Ranks *ranks, const char *folder, const int *unseen) {
    int rank = 0;
    while (rank < ranks->count && !unseen[rank]) {
        rank++;
    }
    if (rank == ranks->count) {
        return;
    }
    if (ranks->rank == 0) {
        remove_folder(folder);
    } else {
        ranks_barrier(ranks); // in which rank 0 ends the run: one of them says why
    }
    die("rank %d does not see %s, which rank 0 has made\n"
        "  ---> --out must be on a file system that all machines share",
        rank, folder);
}

// Does every rank see the folder that rank 0 has made? Another machine may have one of its own by that name.
// All wait here until it is made
static inline void check_shared_folder(Ranks *ranks, const char *folder) {
    uint64_t number = draw_run();
    int *unseen = NEW(int, ranks->count);
    if (ranks->rank == 0 && ranks->count > 1) {
        write_token(folder, number);
    }
    ranks_share(ranks, &number, sizeof(number));
    int mine = ranks->rank != 0 && read_token(folder) != number;
    ranks_gather(ranks, &mine, sizeof(mine), unseen);
    refuse_unseen(ranks, folder, unseen);
    free(unseen);
    if (ranks->rank == 0 && ranks->count > 1) {
        char path[PATH_SIZE];
        check_format(path, sizeof(path), "%s/" TOKEN_NAME, folder);
        unlink(path);
    }
}

// an empty folder for the checkpoint, with its config.json
static inline void start_folder(const char *folder, const Config *config) {
    char path[PATH_SIZE];
    NewFile file;
    remove_folder(folder);
    make_folder(folder);
    check_format(path, sizeof(path), "%s/config.json", folder);
    newfile_open(&file, path);
    config_write(config, file.file);
    newfile_close(&file);
}

// Parameters, exp_avg and exp_avg_sq [3]; tokenizer NULL: none goes along. All ranks call it: each writes
// what it keeps, rank 0 the rest. Dies with earlier checkpoints intact
static inline void checkpoint_save(Ranks *ranks, const char *out, const Config *config,
                                   const FlatBuffer *buffers, const RunState *state,
                                   const Provenance *provenance, const Options *options,
                                   const Tokenizer *tokenizer) {
    char name[64], folder[PATH_SIZE], temporary[PATH_SIZE], path[PATH_SIZE];
    check_format(name, sizeof(name), "step_%08lld", (long long)state->step);
    check_format(folder, sizeof(folder), "%s/%s", out, name);
    check_format(temporary, sizeof(temporary), "%s/.tmp_%s", out, name);
    check_format(path, sizeof(path), "%s/state.json", temporary);
    if (ranks->rank == 0) {
        start_folder(temporary, config);
    }
    check_shared_folder(ranks, temporary);
    save_buffers(ranks, temporary, "model.safetensors", &buffers[0], weight_prefix, 1, "F32");
    save_buffers(ranks, temporary, "optimizer.safetensors", &buffers[1], moment_prefixes, 2, "F32");
    if (ranks->rank == 0) {
        state_write(path, state, provenance, options);
        if (tokenizer != NULL) {
            tokenizer_save(tokenizer, temporary, config->max_seq_len);
        }
        place_folder(temporary, folder);
        point_latest(out, name);
        newfile_sync_folder(folder); // the names in `out`
    }
    ranks_barrier(ranks);
}

// ----------------------------------------------------------------------------
// loading

// The checkpoint folder that the user named: a checkpoint, a run's folder, its `latest`; or 'latest' alone,
// of `out`, or where that is "", of the newest run below runs
static inline void checkpoint_find(char *folder, const char *named, const char *out) {
    char newest[PATH_SIZE] = "runs";
    int found = find_named(folder, named);
    if (!found && strcmp(named, "latest") == 0) {
        if (out[0] == '\0' && !newest_run(newest, "runs")) {
            die("no folder below runs holds a checkpoint\n  ---> train one first, or name a run's folder");
        }
        out = out[0] == '\0' ? newest : out;
        named = out;
        found = run_checkpoint(folder, out);
    }
    if (!found || !has_file(folder, "config.json")) {
        char config[PATH_SIZE];
        check_format(config, sizeof(config), "%s/config.json", found ? folder : named);
        check_not_closed(config);
        die("no checkpoint in %s: there is no %s/config.json\n  ---> train one first, or name its folder",
            named, found ? folder : named);
    }
}

// names what a file has beyond the tensors of so many buffers like this one: a model that ignored it would be
// another one
static inline void refuse_unused_tensors(const Safetensors *st, const FlatBuffer *buffer,
                                         const char *const *prefixes, int count) {
    char names[512] = "";
    size_t used = 0, unused = 0;
    int tensors = buffer_tensors(buffer);
    if (st->count == (size_t)count * (size_t)tensors) {
        return; // all of these were found
    }
    for (size_t e = 0; e < st->count; e++) {
        const char *name = st->entries[e].name, *suffix = strstr(name, ".rotary_emb.inv_freq");
        int known = suffix != NULL && strcmp(suffix, ".rotary_emb.inv_freq") == 0; // follows from rope_theta
        for (int b = 0; b < count && !known; b++) {
            size_t size = strlen(prefixes[b]);
            for (int i = 0; i < tensors && strncmp(name, prefixes[b], size) == 0 && !known; i++) {
                known = strcmp(name + size, buffer->table->tensors[i].name) == 0;
            }
        }
        if (!known && unused++ < 4 && used < sizeof(names)) {
            used += (size_t)snprintf(names + used, sizeof(names) - used, "%s%.100s", used ? ", " : "", name);
        }
    }
    if (unused > 0) {
        die("%s has tensors that the model of config.json does not use (%zu): %s%s\n  ---> %s", st->path,
            unused, names, unused > 4 ? ", ..." : "",
            st->hint[0] ? st->hint : "name a folder whose config.json and tensors belong together");
    }
}

static inline void checkpoint_load_weights(const FlatBuffer *params, const char *folder) {
    Safetensors *st = open_weights(folder);
    load_buffer(params, st, weight_prefix[0]);
    refuse_unused_tensors(st, params, weight_prefix, 1);
    safetensors_close(st);
}

// exp_avg and exp_avg_sq [2]; 1 when the folder has moments, 0 when they stay zero
static inline int checkpoint_load_moments(const FlatBuffer *moments, const char *folder) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/optimizer.safetensors", folder);
    if (!path_exists(path)) {
        return 0;
    }
    Safetensors *st = safetensors_open(path, "remove the file to start with zero moments");
    load_buffer(&moments[0], st, moment_prefixes[0]);
    load_buffer(&moments[1], st, moment_prefixes[1]);
    refuse_unused_tensors(st, &moments[0], moment_prefixes, 2);
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

// what the folder says of its run; all zero where it says nothing
static inline void checkpoint_load_provenance(Provenance *provenance, const char *folder) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/state.json", folder);
    memset(provenance, 0, sizeof(*provenance));
    if (path_exists(path)) {
        state_read_provenance(provenance, path);
    }
}

#endif
