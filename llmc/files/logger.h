/*
What a run says of itself: runs/NAME/log.jsonl, one JSON object per step and per validation, and a
progress line.

A resumed run cuts the log back to the step it resumes from, so that the file reads as if the run had never
stopped. Errors: a log that cannot be written stops the run with its cause; rows that cannot be read back are
dropped with a warning.
*/
#ifndef LOGGER_H
#define LOGGER_H

#include "llmc/files/json.h"
#include "llmc/files/json_bytes.h"
#include "llmc/files/log_keys.h"
#include "llmc/files/newfile.h"
#include "llmc/lambda.h"
#include <sys/resource.h>
#include <time.h>
// defines: StepRecord, LogKey, log_keys; clock_gettime, getrusage

static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// seconds since 1970
static inline double unix_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// largest resident memory of the process so far
static inline double peak_memory_gb(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss / 1073741824.0; // bytes
#else
    return (double)usage.ru_maxrss / 1048576.0; // KB
#endif
}

// the whole log, or NULL when there is none. A FIFO would never end
static inline char *log_read(const char *path, size_t *size) {
    struct stat status;
    if (stat(path, &status) != 0) {
        return NULL;
    }
    if (!S_ISREG(status.st_mode)) {
        die("%s is not a regular file\n  ---> remove it, or choose another folder with --out", path);
    }
    return check_read_file(path, size, "choose another folder with --out");
}

// has the log a validation after `step` steps, to its last row?
static inline int log_has_validation(const char *path, int64_t step) {
    static const char last[] = ", \"domain\": \"all\"}\n";
    char first[64];
    size_t size, tail = sizeof(last) - 1;
    int found = 0;
    char *text = log_read(path, &size);
    check_format(first, sizeof(first), "{\"%s\": %lld, \"%s\": ", log_validation_keys[0], (long long)step,
                 log_validation_keys[1]);
    for (char *line = text, *end; text != NULL && !found && (end = strchr(line, '\n')) != NULL;
         line = end + 1) {
        found = (size_t)(end + 1 - line) > strlen(first) + tail && strncmp(line, first, strlen(first)) == 0 &&
                memcmp(end + 1 - tail, last, tail) == 0;
    }
    free(text);
    return found;
}

// drops the rows of steps from `step` on, and a half-written last one. The row of step i says i, a validation
// after n steps says n: a run resumed there makes it again
static inline void log_cut(const char *path, int64_t step) {
    size_t size;
    char *text = log_read(path, &size);
    NewFile kept;
    JsonArena arena;
    if (text == NULL) {
        return;
    }
    newfile_open(&kept, path);
    json_arena_init(&arena);
    int64_t dropped = 0;
    // memchr, not strchr: a machine that lost its power may leave zero bytes in the middle
    for (char *line = text, *end; (end = (char *)memchr(line, '\n', (size_t)(text + size - line))) != NULL;
         line = end + 1) {
        char error[128];
        int64_t row = -1;
        json_arena_reset(&arena);
        const Json *json = json_parse(line, (size_t)(end - line), &arena, error, sizeof(error));
        if (json == NULL || json->type != JSON_OBJECT || json_get(json, "step") == NULL ||
            !json_int64(json_get(json, "step"), &row)) {
            dropped++;
        } else if (row < step) {
            newfile_write(&kept, line, 1, (size_t)(end - line) + 1);
        }
    }
    if (dropped > 0) {
        warn("%s: %lld unreadable rows dropped", path, (long long)dropped);
    }
    json_arena_free(&arena);
    free(text);
    newfile_close(&kept);
}

// a row is on disk when this returns, or the run stops
static inline void log_flush(FILE *log, const char *path) {
    if (fflush(log) != 0 || ferror(log)) {
        die("cannot write %s: %s\n  ---> free some disk space, then --resume the run", path, strerror(errno));
    }
}

// a non-finite value is null: JSON has no NaN
static inline void log_value(FILE *log, double value) {
    if (value - value == 0.0) {
        fprintf(log, "%.9g", value);
    } else {
        fputs("null", log);
    }
}

// numbers in brackets
static inline void log_reals(FILE *log, const double *x, int n) {
    for (int i = 0; i < n; i++) {
        fputs(i > 0 ? ", " : "[", log);
        log_value(log, x[i]);
    }
    fputc(']', log);
}

// x [L, E]: a list per layer
static inline void log_cells(FILE *log, const int64_t *x, int layers, int experts) {
    for (int i = 0; i < layers * experts; i++) {
        fputs(i == 0 ? "[[" : i % experts == 0 ? "], [" : ", ", log);
        fprintf(log, "%lld", (long long)x[i]);
    }
    fputs("]]", log);
}

static inline int log_is_known(const LogKey *key, const void *field) {
    switch (key->kind) {
    case LOG_INTEGER: return *(const int64_t *)field >= 0;
    case LOG_REAL:
    case LOG_SECONDS: return !(*(const double *)field < 0.0); // not a number is a value
    case LOG_LAYERS: return *(const double *const *)field != NULL;
    case LOG_CELLS: return *(const int64_t *const *)field != NULL;
    default: return 1;
    }
}

// the value alone
static inline void log_field(FILE *log, const LogKey *key, const void *field, const StepRecord *r) {
    const LogRange *range = (const LogRange *)field;
    switch (key->kind) {
    case LOG_INTEGER: fprintf(log, "%lld", (long long)*(const int64_t *)field); break;
    case LOG_REAL: log_value(log, *(const double *)field); break;
    case LOG_SECONDS: fprintf(log, "%.3f", *(const double *)field); break;
    case LOG_LAYERS: log_reals(log, *(const double *const *)field, r->layers); break;
    case LOG_CELLS: log_cells(log, *(const int64_t *const *)field, r->layers, r->experts); break;
    case LOG_RANGE:
        fprintf(log, "{\"min\": %lld, \"mean\": ", (long long)range->min);
        log_value(log, range->mean);
        fprintf(log, ", \"max\": %lld}", (long long)range->max);
        break;
    }
}

static inline void log_step(FILE *log, const char *path, const StepRecord *r) {
    int count;
    const LogKey *keys = log_keys(&count);
    for (int i = 0; i < count; i++) {
        const void *field = (const char *)r + keys[i].offset;
        if (keys[i].presence == LOG_ALWAYS || log_is_known(&keys[i], field)) {
            fprintf(log, "%s\"%s\": ", i == 0 ? "{" : ", ", keys[i].name);
            log_field(log, &keys[i], field, r);
        }
    }
    fprintf(log, "}\n");
    log_flush(log, path);
}

// late: NULL, or the loss without the first segment, which is routed by its own mean (router_lory.h)
static inline void log_validation(FILE *log, const char *path, int64_t step, double loss, const double *late,
                                  const char *domain) {
    fprintf(log, "{\"%s\": %lld, \"%s\": ", log_validation_keys[0], (long long)step, log_validation_keys[1]);
    log_value(log, loss);
    if (late != NULL) {
        fprintf(log, ", \"%s\": ", log_validation_keys[2]);
        log_value(log, *late);
    }
    fprintf(log, ", \"%s\": ", log_validation_keys[3]);
    json_write_bytes(log, domain, strlen(domain));
    fprintf(log, "}\n");
    log_flush(log, path);
}

// "1h02m", "3m20s", "12s"
static inline void format_duration(char *out, size_t capacity, double seconds) {
    int64_t s = (int64_t)((seconds < 1e15 ? seconds : 1e15) + 0.5); // the most that --steps can ask for
    if (s >= 3600) {
        snprintf(out, capacity, "%lldh%02lldm", (long long)(s / 3600), (long long)(s / 60 % 60));
    } else if (s >= 60) {
        snprintf(out, capacity, "%lldm%02llds", (long long)(s / 60), (long long)(s % 60));
    } else {
        snprintf(out, capacity, "%llds", (long long)s);
    }
}

static inline void print_step(const StepRecord *r, int64_t steps, double seconds_left) {
    static const char *stages[] = {"-", "I", "II", "III"};
    static_assert(sizeof(stages) / sizeof(stages[0]) == STAGE_SPARSE + 1,
                  "a name per stage, and one for none");
    char left[32];
    format_duration(left, sizeof(left), seconds_left);
    printf("step %5lld/%lld | loss %7.4f | ", (long long)r->step + 1, (long long)steps, r->lm_loss);
    if (r->stage != 0) {
        printf("lambda %8.2e | S %.4f | stage %-3s | ", r->lambda, r->sparsity, stages[r->stage]);
    }
    printf("%7.0f tok/s", r->tok_s);
    if (r->mfu >= 0.0) {
        printf(" | %.1f%% MFU", 100.0 * r->mfu);
    } else {
        printf(" | %.1f GFLOP/s", 1000.0 * r->tflops_active);
    }
    printf(" | %s left\n", left);
    fflush(stdout);
}

#endif
