/*
A file that appears under its name only when it is whole: written as PATH.tmp, flushed, fsynced, closed, then
renamed. A program killed at any moment leaves an earlier PATH as it was. Devices are written directly.

Shapes: none. Errors: a write that fails (full disk) removes PATH.tmp and dies.
*/
#ifndef NEWFILE_H
#define NEWFILE_H

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: open, stat, fsync, unlink, close
#include "llmc/check.h"

typedef struct {
    FILE *file;
    char path[4096];
    char temporary[4096]; // what is written: PATH.tmp, or PATH itself when it is no regular file
} NewFile;

static inline int newfile_is_special(const NewFile *f) {
    return strcmp(f->path, f->temporary) == 0;
}

__attribute__((noreturn)) static inline void newfile_fail(NewFile *f) {
    int cause = errno;
    if (!newfile_is_special(f)) {
        unlink(f->temporary);
    }
    die("cannot write %s: %s\n  ---> free some disk space, or choose another folder", f->path,
        strerror(cause));
}

static inline void newfile_name(NewFile *f, const char *path) {
    struct stat status;
    int special = stat(path, &status) == 0 && !S_ISREG(status.st_mode);
    check_format(f->path, sizeof(f->path), "%s", path);
    check_format(f->temporary, sizeof(f->temporary), "%s%s", path, special ? "" : ".tmp");
    f->file = NULL;
}

static inline void newfile_open(NewFile *f, const char *path) {
    newfile_name(f, path);
    f->file = fopen(f->temporary, "wb");
    if (f->file == NULL) {
        die("cannot write %s: %s\n  ---> make its folder, or choose another", path, strerror(errno));
    }
}

static inline void newfile_write(NewFile *f, const void *data, size_t size, size_t n) {
    if (fwrite(data, size, n, f->file) != n) {
        newfile_fail(f);
    }
}

// makes the names in path's folder durable
static inline void newfile_sync_folder(const char *path) {
    char name[4096];
    const char *slash = strrchr(path, '/');
    check_format(name, sizeof(name), "%.*s", slash == NULL ? 1 : (int)(slash - path) + 1,
                 slash == NULL ? "." : path);
    int folder = open(name, O_RDONLY | O_DIRECTORY);
    if (folder >= 0) {
        fsync(folder); // some file systems cannot: then the name is as durable as they make it
        close(folder);
    }
}

// what is written, synced and closed gets its name
static inline void newfile_place(NewFile *f) {
    if (newfile_is_special(f)) {
        return;
    }
    if (rename(f->temporary, f->path) != 0) {
        newfile_fail(f);
    }
    newfile_sync_folder(f->path);
}

static inline void newfile_close(NewFile *f) {
    int unsynced =
        fflush(f->file) != 0 || ferror(f->file) || (!newfile_is_special(f) && fsync(fileno(f->file)) != 0);
    if (unsynced || fclose(f->file) != 0) {
        newfile_fail(f);
    }
    newfile_place(f);
}

#endif
