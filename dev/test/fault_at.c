/*
Preloaded into a program, this lets its n-th operation on files go wrong, so that a test can try every n in turn.

    cc -shared -fPIC dev/test/fault_at.c -o fault_at.so -ldl
    LD_PRELOAD=./fault_at.so FAULT_AT=7 FAULT=kill ./train_remoe ...    SIGKILL in place of operation 7
    LD_PRELOAD=./fault_at.so FAULT_AT=7 FAULT=full ./train_remoe ...    no space from operation 7 on
    LD_PRELOAD=./fault_at.so PLAIN=1 ./train_remoe ...                  a file system without links, locks and exchanges

Operations are the calls that make, lengthen, flush, sync, rename, link or remove a file or a folder; a full disk does not hinder
the removing. Of the many writes to a place in a file every sixteenth counts, the first among them. The standard streams do not.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: dlsym, kill, getenv, flock, mode_t, va_list

// 1 when the operation that is about to run shall fail
static int fault_now(int needs_space) {
    static int operations;
    const char *at = getenv("FAULT_AT"), *fault = getenv("FAULT");
    if (at == NULL || fault == NULL || ++operations < atoi(at)) {
        return 0;
    }
    if (strcmp(fault, "kill") == 0) {
        kill(getpid(), SIGKILL);
    }
    errno = ENOSPC;
    return needs_space;
}

// the function of that name which this one stands in front of
#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

FILE *fopen(const char *path, const char *mode) {
    if (mode[0] != 'r' && fault_now(1)) {
        return NULL;
    }
    return NEXT(FILE * (*)(const char *, const char *), "fopen")(path, mode);
}

int fflush(FILE *file) {
    if (file != stdout && file != stderr && fault_now(1)) {
        return EOF;
    }
    return NEXT(int (*)(FILE *), "fflush")(file);
}

int open(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list args;
        va_start(args, flags);
        mode = va_arg(args, mode_t);
        va_end(args);
    }
    return flags & O_CREAT && fault_now(1) ? -1
                                           : NEXT(int (*)(const char *, int, ...), "open")(path, flags, mode);
}

int ftruncate(int fd, off_t size) {
    return fault_now(1) ? -1 : NEXT(int (*)(int, off_t), "ftruncate")(fd, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    static int writes;
    if (writes++ % 16 == 0 && fault_now(1)) {
        return -1;
    }
    return NEXT(ssize_t(*)(int, const void *, size_t, off_t), "pwrite")(fd, data, size, at);
}

// the disk is not waited for: what a killed process has written is in the kernel's hands anyway
int fsync(int fd) {
    (void)fd;
    return fault_now(1) ? -1 : 0;
}

int mkdir(const char *path, mode_t mode) {
    return fault_now(1) ? -1 : NEXT(int (*)(const char *, mode_t), "mkdir")(path, mode);
}

// 1 on a file system that lacks what is asked for
static int is_plain(int error) {
    errno = error;
    return getenv("PLAIN") != NULL;
}

int flock(int fd, int operation) {
    return is_plain(ENOLCK) ? -1 : NEXT(int (*)(int, int), "flock")(fd, operation);
}

int symlink(const char *target, const char *path) {
    if (is_plain(EPERM)) {
        return -1;
    }
    return fault_now(1) ? -1 : NEXT(int (*)(const char *, const char *), "symlink")(target, path);
}

int rename(const char *from, const char *to) {
    return fault_now(1) ? -1 : NEXT(int (*)(const char *, const char *), "rename")(from, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    typedef int (*Function)(int, const char *, int, const char *, unsigned);
    if (is_plain(EINVAL)) {
        return -1;
    }
    return fault_now(1) ? -1 : NEXT(Function, "renameat2")(from_folder, from, to_folder, to, flags);
}

int unlink(const char *path) {
    fault_now(0);
    return NEXT(int (*)(const char *), "unlink")(path);
}

int rmdir(const char *path) {
    fault_now(0);
    return NEXT(int (*)(const char *), "rmdir")(path);
}
