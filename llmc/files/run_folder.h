/*
The folder of a run, and which of its checkpoints counts.

    step_00001000/      a checkpoint (checkpoint.h); it has its name only when it is whole
    latest              the checkpoint that --resume takes: a link to it. A text file with its name where the
                        file system has no links; a folder of its own where a copy followed the link
    step_00001000.old/  stood aside for a moment: it counts as long as there is no step_00001000
    .tmp_*              half of something
    log.jsonl           the log (logger.h)

Where `latest` is gone or leads nowhere, the checkpoint of the highest step counts.

Shapes: none. Errors: what is no checkpoint is named, with the remedy.
*/
#ifndef RUN_FOLDER_H
#define RUN_FOLDER_H

#include "llmc/files/folder.h"
#include "llmc/files/json.h"
#include "llmc/files/newfile.h"
#include <libgen.h>
// defines: dirname, rename, symlink, readlink, realpath

enum { CHECKPOINT_NAME_SIZE = 32 }; // "step_", digits, ".old"

typedef struct {
    char name[CHECKPOINT_NAME_SIZE];
    int64_t step;
} CheckpointName;

// "step_" and digits; what is named otherwise is not ours to remove. Returns the step, or -1
static inline int64_t checkpoint_step(const char *name) {
    size_t digits = strncmp(name, "step_", 5) == 0 ? strspn(name + 5, "0123456789") : 0;
    return digits > 0 && digits <= 18 && name[5 + digits] == '\0' ? strtoll(name + 5, NULL, 10) : -1;
}

static inline int has_file(const char *folder, const char *name) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/%s", folder, name);
    return path_exists(path);
}

static inline int is_checkpoint(const char *folder) {
    return has_file(folder, "config.json") && has_file(folder, "model.safetensors");
}

static inline int compare_steps_down(const void *a, const void *b) {
    int64_t x = ((const CheckpointName *)a)->step, y = ((const CheckpointName *)b)->step;
    return (x < y) - (x > y);
}

// step_N and, where N has only that, step_N.old, the highest step first; returns how many. For free()
static inline int list_checkpoints(const char *out, CheckpointName **list) {
    DIR *folder = opendir(out);
    int n = 0;
    *list = NULL;
    for (struct dirent *entry = folder != NULL ? readdir(folder) : NULL; entry != NULL;
         entry = readdir(folder)) {
        char name[CHECKPOINT_NAME_SIZE], path[PATH_SIZE];
        size_t size = strlen(entry->d_name);
        int aside = size > 4 && strcmp(entry->d_name + size - 4, ".old") == 0;
        if (size >= sizeof(name)) {
            continue;
        }
        check_format(name, sizeof(name), "%.*s", (int)(aside ? size - 4 : size), entry->d_name);
        check_format(path, sizeof(path), "%s/%s", out, name);
        int64_t step = checkpoint_step(name);
        if (step >= 0 && !(aside && name_exists(path))) {
            *list = GROW(CheckpointName, *list, n + 1);
            check_format((*list)[n].name, sizeof((*list)[n].name), "%s", entry->d_name);
            (*list)[n++].step = step;
        }
    }
    if (folder != NULL) {
        closedir(folder);
    }
    if (n > 0) {
        qsort(*list, (size_t)n, sizeof((*list)[0]), compare_steps_down);
    }
    return n;
}

// ----------------------------------------------------------------------------
// latest

// where a file system has no links, `latest` is a text file: the checkpoint's name in it, or 0
static inline int read_latest_text(char *name, const char *path) {
    struct stat status;
    if (stat(path, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size >= CHECKPOINT_NAME_SIZE) {
        return 0;
    }
    char *text = check_read_file(path, NULL, "");
    text[strcspn(text, "\r\n")] = '\0';
    int good = checkpoint_step(text) >= 0;
    check_format(name, CHECKPOINT_NAME_SIZE, "%s", good ? text : "");
    free(text);
    return good;
}

// the folder that `latest` stands for; 0 when it is gone or leads nowhere
static inline int follow_latest(char *folder, const char *out) {
    char path[PATH_SIZE], name[PATH_SIZE];
    check_format(path, sizeof(path), "%s/latest", out);
    struct stat status;
    ssize_t size = readlink(path, name, sizeof(name) - 1);
    name[size > 0 ? size : 0] = '\0';
    if (checkpoint_step(name) >= 0 || read_latest_text(name, path)) {
        check_format(folder, PATH_SIZE, "%s/%s", out, name);
        return stat(folder, &status) == 0 && S_ISDIR(status.st_mode);
    }
    check_format(folder, PATH_SIZE, "%s", path); // a link to somewhere else, or a folder of its own
    return is_checkpoint(folder);
}

// the checkpoint of the highest step; 0 when there is none
static inline int highest_checkpoint(char *folder, const char *out) {
    CheckpointName *list;
    int n = list_checkpoints(out, &list), found = 0;
    for (int i = 0; i < n && !found; i++) {
        check_format(folder, PATH_SIZE, "%s/%s", out, list[i].name);
        found = is_checkpoint(folder);
    }
    free(list);
    return found;
}

// the checkpoint of a run that counts; 0 when the folder has none
static inline int run_checkpoint(char *folder, const char *out) {
    char highest[PATH_SIZE], latest[PATH_SIZE];
    if (follow_latest(folder, out)) {
        return 1;
    }
    if (!highest_checkpoint(highest, out)) {
        return 0;
    }
    check_format(latest, sizeof(latest), "%s/latest", out);
    warn("%s %s: taking %s", latest, name_exists(latest) ? "leads nowhere" : "is missing", highest);
    check_format(folder, PATH_SIZE, "%s", highest);
    return 1;
}

// has the file system no links? Then the name stands in a file
static inline int write_latest(const char *name, const char *path) {
    unlink(path);
    if (symlink(name, path) == 0) {
        return 1;
    }
    if (errno != EPERM && errno != ENOSYS && errno != ENOTSUP && errno != EOPNOTSUPP) {
        return 0;
    }
    NewFile file;
    newfile_open(&file, path);
    fprintf(file.file, "%s\n", name);
    newfile_close(&file);
    return 1;
}

// moves out/latest to `name` in one step
static inline void point_latest(const char *out, const char *name) {
    char latest[PATH_SIZE], temporary[PATH_SIZE];
    check_format(latest, sizeof(latest), "%s/latest", out);
    check_format(temporary, sizeof(temporary), "%s/.tmp_latest", out);
    rmdir(latest); // an archive may have made an empty folder of the link
    if (!write_latest(name, temporary) || rename(temporary, latest) != 0) {
        die("cannot move the link %s: %s\n  ---> the checkpoint itself is whole: --resume %s/%s", latest,
            strerror(errno), out, name);
    }
}

// ----------------------------------------------------------------------------
// mending, by the process that has the folder's lock

// removes what an interrupted save left behind
static inline void remove_halves(const char *out) {
    DIR *folder = opendir(out);
    for (struct dirent *entry = folder != NULL ? readdir(folder) : NULL; entry != NULL;
         entry = readdir(folder)) {
        char path[PATH_SIZE];
        if (strncmp(entry->d_name, ".tmp_step_", 10) == 0 || strncmp(entry->d_name, ".tmp_latest", 11) == 0) {
            check_format(path, sizeof(path), "%s/%s", out, entry->d_name);
            remove_folder(path);
        }
    }
    if (folder != NULL) {
        closedir(folder);
    }
}

// step_N.old, which a kill left without step_N, gets its name back
static inline void restore_old_names(const char *out) {
    CheckpointName *list;
    int n = list_checkpoints(out, &list);
    for (int i = 0; i < n; i++) {
        char path[PATH_SIZE], old[PATH_SIZE];
        check_format(path, sizeof(path), "%s/%s", out, list[i].name);
        check_format(old, sizeof(old), "%s.old", path);
        if (strchr(list[i].name, '.') == NULL) {
            remove_folder(old);
        } else if (is_checkpoint(path)) {
            check_format(old, sizeof(old), "%s", path);
            *strrchr(path, '.') = '\0';
            rename(old, path);
        }
    }
    free(list);
}

// the step in state.json; -1 when there is none
static inline int64_t state_step(const char *folder) {
    char path[PATH_SIZE];
    int64_t step = -1;
    JsonArena arena;
    check_format(path, sizeof(path), "%s/state.json", folder);
    if (path_exists(path)) {
        json_arena_init(&arena);
        json_int64(json_get(json_parse_file(path, &arena, "name another checkpoint"), "step"), &step);
        json_arena_free(&arena);
    }
    return step;
}

// are the two files of that name the same, byte for byte?
static inline int same_file(const char *a, const char *b, const char *name) {
    char path[PATH_SIZE];
    size_t size_a, size_b;
    check_format(path, sizeof(path), "%s/%s", a, name);
    char *x = check_read_file(path, &size_a, "");
    check_format(path, sizeof(path), "%s/%s", b, name);
    char *y = check_read_file(path, &size_b, "");
    int same = size_a == size_b && memcmp(x, y, size_a) == 0;
    free(x);
    free(y);
    return same;
}

// A `latest` that is a folder of its own, because a copy has followed the link, is the checkpoint of its
// step: it takes that name. Where the copy has that checkpoint too, equal states say that the two are one, and
// the folder steps aside with whatever else is in it
static inline void name_real_latest(const char *out) {
    char latest[PATH_SIZE], name[CHECKPOINT_NAME_SIZE], folder[PATH_SIZE], aside[PATH_SIZE];
    struct stat status;
    check_format(latest, sizeof(latest), "%s/latest", out);
    int64_t step = lstat(latest, &status) == 0 && S_ISDIR(status.st_mode) ? state_step(latest) : -1;
    if (step < 0 || step >= (int64_t)1e18 || !is_checkpoint(latest)) {
        return;
    }
    check_format(name, sizeof(name), "step_%08lld", (long long)step);
    check_format(folder, sizeof(folder), "%s/%s", out, name);
    check_format(aside, sizeof(aside), "%s/latest.copy", out);
    if (rename(latest, folder) != 0) {
        if (!is_checkpoint(folder) || !same_file(latest, folder, "state.json") || name_exists(aside)) {
            die("%s and %s are two checkpoints of step %lld\n  ---> move one of them away", latest, folder,
                (long long)step);
        }
        rename(latest, aside);
        warn("%s was a copy of %s: it is %s now, and can be removed", latest, folder, aside);
    }
    point_latest(out, name);
}

static inline void mend_run(const char *out) {
    restore_old_names(out);
    name_real_latest(out);
    remove_halves(out);
}

// ----------------------------------------------------------------------------
// finding

// what of a run the folder holds, to say why no other may begin there; NULL: nothing
static inline const char *run_in_folder(const char *out) {
    char path[PATH_SIZE];
    struct stat status;
    CheckpointName *list;
    int checkpoints = list_checkpoints(out, &list);
    free(list);
    check_format(path, sizeof(path), "%s/latest", out);
    if (checkpoints > 0 || name_exists(path)) {
        return "its checkpoints";
    }
    check_format(path, sizeof(path), "%s/log.jsonl", out);
    int logged = stat(path, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
    return logged ? "the log.jsonl of one that has saved nothing" : NULL;
}

// when the newest checkpoint of a run was written; 0 when there is none
static inline double newest_time(const char *out) {
    CheckpointName *list;
    int n = list_checkpoints(out, &list);
    double newest = 0.0;
    for (int i = -1; i < n; i++) {
        char path[PATH_SIZE];
        struct stat status;
        check_format(path, sizeof(path), "%s/%s/model.safetensors", out, i < 0 ? "latest" : list[i].name);
        double time = stat(path, &status) == 0
                          ? (double)status.st_mtim.tv_sec + 1e-9 * (double)status.st_mtim.tv_nsec
                          : 0;
        newest = time > newest ? time : newest;
    }
    free(list);
    return newest;
}

// the folder below `runs` whose newest checkpoint is the newest of all; 0: none has a checkpoint
static inline int newest_run(char *out, const char *runs) {
    DIR *folder = opendir(runs);
    double newest = 0.0;
    for (struct dirent *entry = folder != NULL ? readdir(folder) : NULL; entry != NULL;
         entry = readdir(folder)) {
        char path[PATH_SIZE];
        check_format(path, sizeof(path), "%s/%s", runs, entry->d_name);
        double time = entry->d_name[0] == '.' ? 0.0 : newest_time(path);
        if (time > newest) {
            newest = time;
            check_format(out, PATH_SIZE, "%s", path);
        }
    }
    if (folder != NULL) {
        closedir(folder);
    }
    return newest > 0.0;
}

// a copy without slashes at its end
static inline void trim_path(char *out, const char *path) {
    size_t size = strlen(path);
    while (size > 1 && path[size - 1] == '/') {
        size--;
    }
    check_format(out, PATH_SIZE, "%.*s", (int)size, path);
}

// the folder that a path lies in, and the name that it has there
static inline void split_path(char *parent, char *name, const char *path) {
    char copy[PATH_SIZE];
    trim_path(copy, path);
    const char *slash = strrchr(copy, '/');
    check_format(name, PATH_SIZE, "%s", slash == NULL ? copy : slash + 1);
    check_format(parent, PATH_SIZE, "%s", dirname(copy));
}

// A checkpoint from what the user named: a checkpoint, a run's folder, or its `latest`. 0: there is none
static inline int find_named(char *folder, const char *named) {
    char path[PATH_SIZE], parent[PATH_SIZE], name[PATH_SIZE];
    trim_path(path, named);
    split_path(parent, name, path);
    if (strcmp(name, "latest") == 0 && (strchr(path, '/') != NULL || name_exists(path))) {
        return run_checkpoint(folder, parent);
    }
    if (!has_file(path, "config.json")) {
        return run_checkpoint(folder, path);
    }
    check_format(folder, PATH_SIZE, "%s", path);
    return 1;
}

#endif
