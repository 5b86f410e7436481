/*
Errors and checked resources: the one place that ends the program.

Every failure says what was wrong, in which file or flag, what was expected, and the command that mends it:
    die("cannot open %s: %s\n  ---> make sample-data", path, strerror(errno));
prints "error: ..." on stderr and exits with status 1; die_usage() is for a bad command line and exits with 2.
The functions below return only on success, so callers read as the straight path.

Shapes: none. Errors: exit 1 (die) or 2 (die_usage). A fuzz target defines DIE_EXIT to leave by longjmp
instead.
*/
#ifndef CHECK_H
#define CHECK_H

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
// defines: static_assert, fopen, fread, fwrite, fclose, vfprintf, vsnprintf, exit, calloc, realloc, free,
// strerror, errno, va_list, open_memstream
#include "llmc/arithmetic.h"

static_assert(sizeof(float) == 4 && sizeof(double) == 8, "fp32 and fp64");

#ifndef DIE_EXIT
#define DIE_EXIT(status) exit(status)
#endif

#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define PRINTF_LIKE(fmt, args) __attribute__((format(gnu_printf, fmt, args)))
#else
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))
#endif

// Takes each message in place of stderr, if set. kind: "error", "usage error" or "warning"
static void (*message_taker)(const char *kind, const char *text);

static inline void print_message(const char *kind, const char *fmt, va_list args) {
    if (message_taker != NULL) {
        char text[8192];
        vsnprintf(text, sizeof(text), fmt, args); // what is longer is cut
        message_taker(kind, text);
        return;
    }
    fflush(stdout); // what was printed before the error stays before it
    fprintf(stderr, "%s: ", kind);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
}

PRINTF_LIKE(1, 2) __attribute__((noreturn)) static inline void die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    print_message("error", fmt, args);
    va_end(args);
    DIE_EXIT(1);
    abort(); // not reached
}

PRINTF_LIKE(1, 2) __attribute__((noreturn)) static inline void die_usage(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    print_message("usage error", fmt, args);
    va_end(args);
    DIE_EXIT(2);
    abort(); // not reached
}

PRINTF_LIKE(1, 2) static inline void warn(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    print_message("warning", fmt, args);
    va_end(args);
}

// ----------------------------------------------------------------------------
// memory

// n zeroed elements; n = 0 gives a pointer that can be freed
static inline void *check_calloc(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (p == NULL) {
        die("out of memory: cannot allocate %zu x %zu bytes\n  ---> use a smaller --batch, --seq-len or "
            "model",
            n, size);
    }
    return p;
}

// grows (or shrinks) to n elements; what is new is not zeroed
static inline void *check_realloc(void *p, size_t n, size_t size) {
    if (size != 0 && n > SIZE_MAX / size) {
        die("impossible allocation: %zu x %zu bytes", n, size);
    }
    size_t bytes = n * size;
    void *grown = realloc(p, bytes > 0 ? bytes : 1);
    if (grown == NULL) {
        die("out of memory: cannot allocate %zu x %zu bytes\n  ---> use a smaller --batch, --seq-len or "
            "model",
            n, size);
    }
    return grown;
}

#define NEW(type, n) ((type *)check_calloc((size_t)(n), sizeof(type)))
#define GROW(type, p, n) ((type *)check_realloc((p), (size_t)(n), sizeof(type)))

// a copy of text, for the caller to free
static inline char *check_strdup(const char *text) {
    size_t size = strlen(text) + 1;
    return (char *)memcpy(GROW(char, NULL, size), text, size);
}

// ----------------------------------------------------------------------------
// text that is put together with fprintf, of any length

// a stream into memory: *text and *size, for free(), hold what was written once it is closed
static inline FILE *check_memstream(char **text, size_t *size) {
    FILE *out = open_memstream(text, size);
    if (out == NULL) {
        die("out of memory for a text");
    }
    return out;
}

typedef struct {
    char *text;
    size_t size;
    FILE *out;
} Composed;

static inline void compose(Composed *c) {
    c->out = check_memstream(&c->text, &c->size);
}

// nothing follows; the text, for free()
static inline char *composed(Composed *c) {
    if (fclose(c->out) != 0) {
        die("out of memory for a text");
    }
    return c->text;
}

// ----------------------------------------------------------------------------
// files

// Dies if a folder on the way to `path` is closed to this user: what is there would look as if it were not.
// For use where something has not been found
static inline void check_not_closed(const char *path) {
    struct stat status;
    if (stat(path, &status) != 0 && errno == EACCES) {
        die("cannot look at %s: %s\n  ---> check its permissions, and those of its folders", path,
            strerror(errno));
    }
}

// Dies because of errno. hint: the command that would make or mend the file ("" when there is none). A file
// that is there and closed to this user need not be made
static inline void die_unopened(const char *path, const char *hint) {
    int closed = errno == EACCES || errno == EPERM;
    die("cannot open %s: %s%s%s", path, strerror(errno), closed || hint[0] ? "\n  ---> " : "",
        closed ? "check its permissions, and those of its folders" : hint);
}

static inline FILE *check_fopen(const char *path, const char *mode, const char *hint) {
    FILE *file = fopen(path, mode);
    if (file == NULL) {
        die_unopened(path, hint);
    }
    return file;
}

static inline void check_fwrite(const void *data, size_t size, size_t n, FILE *file, const char *path) {
    if (fwrite(data, size, n, file) != n) {
        die("cannot write %s: %s\n  ---> free some disk space, or choose another folder with --out", path,
            strerror(errno));
    }
}

// closing is where buffered data meets a full disk, so it is checked as a write is
static inline void check_fclose(FILE *file, const char *path) {
    int failed = ferror(file);
    if (fclose(file) != 0 || failed) {
        die("cannot write %s: %s\n  ---> free some disk space, or choose another folder with --out", path,
            strerror(errno));
    }
}

// The whole file in memory, with a 0 byte behind it; *size (bytes, without that 0) may be NULL. A FIFO would
// be waited for, perhaps for ever
static inline char *check_read_file(const char *path, size_t *size, const char *hint) {
    struct stat status;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) {
        die("%s is not a regular file%s%s", path, hint[0] ? "\n  ---> " : "", hint);
    }
    FILE *file = check_fopen(path, "rb", hint);
    char *text = NULL;
    size_t used = 0, capacity = 0, got = 1;
    while (got > 0) {
        if (capacity - used < 2) {
            capacity = capacity ? 2 * capacity : 65536;
            text = GROW(char, text, capacity);
        }
        got = fread(text + used, 1, capacity - used - 1, file);
        used += got;
    }
    if (ferror(file)) {
        die("cannot read %s: %s%s%s", path, strerror(errno), hint[0] ? "\n  ---> " : "", hint);
    }
    fclose(file);
    text[used] = '\0';
    if (size != NULL) {
        *size = used;
    }
    return text;
}

// snprintf that refuses to cut: for paths and names
PRINTF_LIKE(3, 4) static inline void check_format(char *out, size_t capacity, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(out, capacity, fmt, args);
    va_end(args);
    if (n < 0 || (size_t)n >= capacity) {
        die("a path or name is longer than %zu bytes: %s...\n  ---> use a shorter one", capacity - 1, out);
    }
}

#endif
