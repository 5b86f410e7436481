/*
Files of requests and the files of their results, both JSON Lines: what --score and --generate read and write.

    REQUESTS    an object a line. A line that is wrong ends the program: "REQUESTS:LINE: what is wrong"
    RESULTS     a line per request, in request order. A file that is there goes on: its whole lines count, a
                torn last one is cut off when writing begins, if it begins as a result does. Whoever goes on
                checks first that the lines belong to its requests: until then nothing is touched

Lines are read one at a time, so that memory does not grow with a file. Errors: exit 1 for what is no regular
file, for a line that is wrong, for a full disk (what was written stays, and goes on), for results that
another process is writing.
*/
#ifndef REQUESTS_H
#define REQUESTS_H

#include "llmc/check.h"
#include "llmc/files/folder.h"
#include "llmc/files/json.h"
#include "llmc/files/logger.h"
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
// defines: PATH_SIZE, json_*, seconds_now, open, flock, ftruncate

enum { EXIT_INTERRUPTED = 130 }; // as shells have it of Ctrl-C

// a JSON Lines file that is read line by line
typedef struct {
    const char *path;
    FILE *file;
    int64_t line;         // the one that was read last, from 1
    int64_t begin, end;   // where it begins and ends, in bytes
    int64_t size;         // of the file
    char *text;           // the line
    size_t text_capacity; // of it
    JsonArena arena;      // its tree
} Requests;

static inline void refuse_special_file(const char *path, const char *option) {
    struct stat status;
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        die("--%s %s is not a regular file: what is read again when a run goes on must stay\n"
            "  ---> name a file",
            option, path);
    }
}

static inline void requests_open(Requests *r, const char *path, const char *option) {
    memset(r, 0, sizeof(*r));
    refuse_special_file(path, option);
    r->path = path;
    r->file = check_fopen(path, "rb", "name a file of requests, an object a line");
    struct stat status;
    r->size = fstat(fileno(r->file), &status) == 0 ? (int64_t)status.st_size : 0;
}

static inline void requests_close(Requests *r) {
    fclose(r->file);
    free(r->text);
    json_arena_free(&r->arena);
}

// to a place where reading was before: behind `line`, which ends at byte `end`
static inline void requests_go_to(Requests *r, int64_t line, int64_t end) {
    if (fseeko(r->file, (off_t)end, SEEK_SET) != 0) {
        die("cannot read %s: %s", r->path, strerror(errno));
    }
    r->line = line;
    r->begin = r->end = end;
}

// the line that was read last is wrong
PRINTF_LIKE(2, 3)
__attribute__((noreturn)) static inline void request_fail(const Requests *r, const char *fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    die("%s:%lld: %s", r->path, (long long)r->line, text);
}

// the next line's object, which lives until the next call; NULL behind the last
static inline const Json *requests_next(Requests *r) {
    char error[256];
    ssize_t size = getline(&r->text, &r->text_capacity, r->file);
    if (size < 0) {
        if (ferror(r->file)) {
            die("cannot read %s: %s", r->path, strerror(errno));
        }
        return NULL;
    }
    r->line++;
    r->begin = r->end;
    r->end += size;
    json_arena_reset(&r->arena);
    size_t bare = (size_t)size - (r->text[size - 1] == '\n');
    const Json *json = json_parse(r->text, bare, &r->arena, error, sizeof(error));
    if (json == NULL) { // its own "line 1" would mislead
        const char *column = strstr(error, "column");
        request_fail(r, "not valid JSON: %s", column != NULL ? column : error);
    }
    if (json->type != JSON_OBJECT) {
        request_fail(r, "not an object in braces");
    }
    if (json_duplicate_key(json) != NULL) {
        request_fail(r, "\"%.100s\" stands twice", json_duplicate_key(json));
    }
    return json;
}

// fewer lines than the first reading found
__attribute__((noreturn)) static inline void requests_have_changed(const Requests *r) {
    die("%s has changed while it was read\n  ---> the same command again", r->path);
}

// ----------------------------------------------------------------------------
// members of a request

static inline const Json *request_text(const Requests *r, const Json *request, const char *key) {
    const Json *text = json_get(request, key);
    if (text == NULL || text->type != JSON_STRING) {
        request_fail(r, text == NULL ? "\"%s\" is missing" : "\"%s\" is not a string", key);
    }
    return text;
}

// one string or more
static inline const Json *request_texts(const Requests *r, const Json *request, const char *key) {
    const Json *list = json_get(request, key);
    if (list == NULL || list->type != JSON_ARRAY || list->count == 0) {
        request_fail(r, "\"%s\" is not a list of one string or more", key);
    }
    for (const Json *text = list->child; text != NULL; text = text->next) {
        if (text->type != JSON_STRING) {
            request_fail(r, "\"%s\" holds something that is not a string", key);
        }
    }
    return list;
}

// least .. most, or `usual` where it is missing
static inline int64_t request_integer(const Requests *r, const Json *request, const char *key, int64_t least,
                                      int64_t most, int64_t usual) {
    int64_t value = usual;
    const Json *member = json_get(request, key);
    if (member != NULL && (!json_int64(member, &value) || value < least || value > most)) {
        request_fail(r, "\"%s\" is not an integer from %lld to %lld", key, (long long)least, (long long)most);
    }
    return value;
}

static inline double request_number(const Requests *r, const Json *request, const char *key, double least,
                                    double most, double usual) {
    double value = usual;
    const Json *member = json_get(request, key);
    if (member != NULL && (!json_double(member, &value) || !(value >= least && value <= most))) {
        request_fail(r, "\"%s\" is not a number from %g to %g", key, least, most);
    }
    return value;
}

// "id", a scalar, as it goes into the result: a text for free(), or NULL where there is none
static inline char *request_id(const Requests *r, const Json *request) {
    const Json *id = json_get(request, "id");
    Composed text;
    if (id == NULL) {
        return NULL;
    }
    if (id->type == JSON_OBJECT || id->type == JSON_ARRAY) {
        request_fail(r, "\"id\" is neither a text nor a number");
    }
    compose(&text);
    switch (id->type) {
    case JSON_STRING: json_write_string(text.out, id->text, id->text_size); break;
    case JSON_NUMBER: fputs(id->text, text.out); break;
    case JSON_BOOL: fputs(id->boolean ? "true" : "false", text.out); break;
    default: fputs("null", text.out); break;
    }
    return composed(&text);
}

// ----------------------------------------------------------------------------
// results

enum { RESULTS_MOST_AGAIN = 16 };

typedef struct {
    const char *path, *key;
    FILE *file; // NULL: not there yet
    char *text; // the line that was read last, without its end
    size_t text_capacity;
    int64_t lines, end;               // whole ones that were read, and where they end
    int again;                        // so many of the newest are kept, to be computed again
    char *newest[RESULTS_MOST_AGAIN]; // in a ring by line: a result, and where its request begins
    int64_t begin[RESULTS_MOST_AGAIN];
} Results;

static inline void results_lock(const Results *r) {
    if (flock(fileno(r->file), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        die("another process is writing %s\n  ---> wait for it, or name another --out", r->path);
    }
}

// key: of a result's first member, but for "id"; again: at most RESULTS_MOST_AGAIN
static inline void results_open(Results *r, const char *path, const char *key, int again,
                                const Requests *requests) {
    memset(r, 0, sizeof(*r));
    r->path = path;
    r->key = key;
    r->again = again;
    refuse_special_file(path, "out");
    if (same_folder(path, requests->path)) {
        die("--out %s is the file of requests\n  ---> name another --out", path);
    }
    r->file = fopen(path, "r+b");
    if (r->file == NULL && errno != ENOENT) {
        die_unopened(path, "name another --out");
    }
    if (r->file != NULL) {
        results_lock(r);
    }
}

// Does a line without an end begin as a result does? Else it is somebody's file, and not to be cut off. (Zeros
// are what a machine that lost its power may leave.)
static inline int results_may_be_torn(const Results *r, size_t size) {
    char begin[2][32];
    check_format(begin[0], sizeof(begin[0]), "{\"%s\":", r->key);
    check_format(begin[1], sizeof(begin[1]), "{\"id\":");
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(begin[i]);
        if (memcmp(r->text, begin[i], size < length ? size : length) == 0) {
            return 1;
        }
    }
    return r->text[0] == '\0';
}

// the next whole line, or NULL: there is no more, or what is left is torn
static inline const char *results_next(Results *r, size_t *size) {
    ssize_t got = r->file != NULL ? getline(&r->text, &r->text_capacity, r->file) : -1;
    if (got <= 0) {
        return NULL;
    }
    if (r->text[got - 1] != '\n') {
        if (!results_may_be_torn(r, (size_t)got)) {
            die("%s ends with something else than results\n  ---> name another --out, or remove it", r->path);
        }
        return NULL;
    }
    r->lines++;
    r->end += got;
    r->text[got - 1] = '\0';
    *size = (size_t)got - 1;
    return r->text;
}

// the line that was read last belongs to the request that was read last
static inline void results_keep(Results *r, const Requests *requests) {
    int place = (int)((r->lines - 1) % r->again);
    free(r->newest[place]);
    r->newest[place] = check_strdup(r->text);
    r->begin[place] = requests->begin;
}

// the result of the line behind `line`, one of the newest
static inline const char *results_kept(const Results *r, int64_t line) {
    return r->newest[line % r->again];
}

// the newest results' requests begin behind this line, which ends at byte *end
static inline int64_t results_again(const Results *r, int64_t *end) {
    int64_t line = r->lines > r->again ? r->lines - r->again : 0;
    *end = r->begin[line % r->again];
    return line;
}

static inline void results_fail(const Results *r) {
    die("cannot write %s: %s\n  ---> free some disk space, then the same command again: it goes on", r->path,
        strerror(errno));
}

// from here on lines are written, behind the whole ones that were read
static inline void results_begin(Results *r) {
    if (r->file == NULL) {
        if (path_exists(r->path)) {
            die("another process has begun to write %s\n  ---> wait for it, or name another --out", r->path);
        }
        r->file = check_fopen(r->path, "wbx", "make its folder, or name another --out");
        results_lock(r);
    }
    if (fseeko(r->file, (off_t)r->end, SEEK_SET) != 0 || ftruncate(fileno(r->file), (off_t)r->end) != 0) {
        results_fail(r);
    }
}

static inline void results_write(Results *r, const char *text, size_t size) {
    if (fwrite(text, 1, size, r->file) != size) {
        results_fail(r);
    }
}

static inline void results_flush(Results *r) {
    if (fflush(r->file) != 0) {
        results_fail(r);
    }
}

static inline void results_close(Results *r) {
    if (r->file != NULL && (ferror(r->file) || fclose(r->file) != 0)) {
        results_fail(r);
    }
    for (int i = 0; i < r->again; i++) {
        free(r->newest[i]);
    }
    free(r->text);
}

// a line of the results is not this request's
__attribute__((noreturn)) static inline void results_foreign(const Results *r, const char *requests) {
    die("%s:%lld is not the result of line %lld of %s: it belongs to other requests\n"
        "  ---> name another --out, or remove it",
        r->path, (long long)r->lines, (long long)r->lines, requests);
}

__attribute__((noreturn)) static inline void results_superfluous(const Results *r, const char *requests) {
    die("%s has more results than %s has requests: it belongs to others\n  ---> name another --out, or "
        "remove "
        "it",
        r->path, requests);
}

// ----------------------------------------------------------------------------
// progress, on stderr

typedef struct {
    double begun, shown;            // seconds_now()
    double work, done, done_before; // in any unit; before: by an earlier process
    int64_t tokens, tokens_before;  // computed
    int64_t requests, bytes;        // of the file, so far
    int quiet;                      // this rank is not the one that speaks
} RequestProgress;

static inline void request_progress_begin(RequestProgress *p, int quiet) {
    p->begun = p->shown = seconds_now();
    p->quiet = quiet;
}

// a line that is written over on a terminal, else one now and then
static inline void request_progress_show(RequestProgress *p, int last) {
    double now = seconds_now(), seconds = now - p->begun + 1e-9, here = p->done - p->done_before;
    int terminal = isatty(STDERR_FILENO);
    char ahead[64] = "";
    if (p->quiet || (last && p->tokens == p->tokens_before) ||
        (!last && now - p->shown < (terminal ? 0.5 : 10.0))) {
        return;
    }
    p->shown = now;
    if (!last && here > 0.0) {
        int64_t eta = (int64_t)(seconds * (p->work - p->done) / here);
        snprintf(ahead, sizeof(ahead), "  %.1f %%  ETA %lld:%02d:%02d", 100.0 * p->done / p->work,
                 (long long)(eta / 3600), (int)(eta / 60 % 60), (int)(eta % 60));
    }
    fprintf(stderr, "%s%.1f MB  %lld requests  %lld tokens  %.0f tok/s%s   %s", terminal ? "\r" : "",
            1e-6 * (double)p->bytes, (long long)p->requests, (long long)p->tokens,
            (double)(p->tokens - p->tokens_before) / seconds, ahead, terminal && !last ? "" : "\n");
}

#endif
