/*
Folders: made, removed, locked.

Shapes: none. Errors: a folder that cannot be made, or in which another process works, dies with its name.
*/
#ifndef FOLDER_H
#define FOLDER_H

#include "llmc/check.h"
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: opendir, readdir, mkdir, open, flock, stat, unlink, rmdir

enum { PATH_SIZE = 2048 };

static inline int path_exists(const char *path) {
    struct stat status;
    return stat(path, &status) == 0;
}

// is the name taken, if only by a link to nothing?
static inline int name_exists(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0;
}

// two names of one folder, or of one file
static inline int same_folder(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

// mkdir -p
static inline void make_folder(const char *path) {
    char part[PATH_SIZE];
    check_format(part, sizeof(part), "%s", path);
    int cause = 0; // of the outermost folder that could not be made
    for (char *slash = strchr(part + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        cause = mkdir(part, 0777) != 0 && errno != EEXIST && cause == 0 ? errno : cause;
        *slash = '/';
    }
    if (mkdir(part, 0777) != 0 && errno != EEXIST) {
        die("cannot make the folder %s: %s\n  ---> choose another folder with --out", path,
            strerror(cause != 0 && errno == ENOENT ? cause : errno));
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

// A lock on a folder, which the system lets go of when the process ends, however it ends. doing: what another
// process does that has it. Some file systems have no locks: then nobody is kept out, and a warning says so
static inline int lock_folder(const char *path, const char *doing) {
    int lock = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) == 0) {
        return lock;
    }
    if (lock >= 0 && errno == EWOULDBLOCK) {
        die("another process %s in %s\n  ---> stop it or wait for it, or choose another folder with --out",
            doing, path);
    }
    warn("%s cannot be locked: %s\n  ---> see to it that no second process %s there", path, strerror(errno),
         doing);
    return lock;
}

#endif
