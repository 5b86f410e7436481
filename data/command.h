/*
What the command lines of data/ share: integers, threads, the output folder and its lock.

Shapes: none. Errors: exit 2 for a value that is none, 1 for a folder that cannot be used.
*/
#ifndef COMMAND_H
#define COMMAND_H

#include "llmc/check.h"
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: open, flock, mkdir, access, omp_set_num_threads, omp_get_max_threads

static inline int64_t command_integer(const char *name, const char *text, int64_t least, int64_t most) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || errno == ERANGE || value < least || value > most) {
        die_usage("--%s expects an integer from %lld to %lld, not '%s'", name, (long long)least,
                  (long long)most, text);
    }
    return value;
}

// an empty one is a shell variable that is not set, and would name the root folder or nothing
static inline const char *command_text(const char *name, const char *text) {
    if (text[0] == '\0') {
        die_usage("--%s expects a name, not ''", name);
    }
    return text;
}

// as many threads as wanted (0: one a core), 1 without OpenMP
static inline int command_threads(int wanted) {
    int threads = 1;
    (void)wanted;
#ifdef _OPENMP
    if (wanted > 0) {
        omp_set_num_threads(wanted);
    }
    threads = omp_get_max_threads();
#endif
    return threads;
}

// with the folders above it. The first mkdir() that fails knows why; what comes after it only finds nothing
static inline void command_make_folder(const char *dir) {
    char path[4096];
    int cause = 0;
    check_format(path, sizeof(path), "%s/", dir);
    for (char *p = path + 1; *p != '\0'; p++) {
        if (*p == '/') {
            *p = '\0';
            int failed = mkdir(path, 0777) != 0 ? errno : 0;
            if (cause == 0 && failed != 0 && failed != EEXIST && access(path, F_OK) != 0) {
                cause = failed;
            }
            *p = '/';
        }
    }
    if (access(dir, W_OK | X_OK) != 0) {
        die("cannot write in the folder %s: %s\n  ---> choose another one with --out", dir,
            strerror(cause != 0 ? cause : errno));
    }
}

// two runs in one folder would write over each other; the system lets go of the lock however this run ends.
// Where the file system has no locks, that is the user's to see to
static inline void command_lock_folder(const char *dir) {
    int folder = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) {
        die("cannot open the folder %s: %s\n  ---> choose another one with --out", dir, strerror(errno));
    }
    if (flock(folder, LOCK_EX | LOCK_NB) == 0) {
        return;
    }
    if (errno == EWOULDBLOCK) {
        die("%s: another run is at work there\n  ---> wait for it, or choose another --out", dir);
    }
    warn("%s cannot be locked (%s): start no second run there", dir, strerror(errno));
}

#endif
