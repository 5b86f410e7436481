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
#include "llmc/files/newfile.h"
#include "llmc/lambda.h"
#include <sys/resource.h>
#include <time.h>
// defines: clock_gettime, getrusage

typedef struct {
    int64_t step; // from 0
    double lm_loss, reg_loss, lambda, sparsity;
    int stage;                    // 0: the router has no stages
    const double *layer_sparsity; // [L]
    int layers;
    int64_t tokens_min, tokens_max; // tokens per expert, over layers and experts
    double tokens_mean;
    int64_t dead_experts;       // (layer, expert) pairs without a token
    int64_t zero_expert_tokens; // (layer, token) pairs without an expert
    double active_experts;      // mean per token
    double grad_norm, lr, ms, tok_s;
    double tflops;          // by the paper's formula at nominal k
    double tflops_active;   // the same at the measured active experts
    double mfu, mfu_active; // over the device's peak; < 0: the peak is unknown
    double mem_gb;
} StepRecord;

static inline double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
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
    check_format(first, sizeof(first), "{\"step\": %lld, \"val_loss\": ", (long long)step);
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

static inline void log_number(FILE *log, const char *key, double value) {
    fprintf(log, ", \"%s\": ", key);
    log_value(log, value);
}

static inline void log_step(FILE *log, const char *path, const StepRecord *r) {
    fprintf(log, "{\"step\": %lld", (long long)r->step);
    log_number(log, "lm_loss", r->lm_loss);
    log_number(log, "reg_loss", r->reg_loss);
    log_number(log, "lambda", r->lambda);
    log_number(log, "sparsity", r->sparsity);
    fprintf(log, ", \"stage\": %d, \"layer_sparsity\": [", r->stage);
    for (int l = 0; l < r->layers; l++) {
        fputs(l > 0 ? ", " : "", log);
        log_value(log, r->layer_sparsity[l]);
    }
    fprintf(log, "], \"tokens_per_expert\": {\"min\": %lld", (long long)r->tokens_min);
    log_number(log, "mean", r->tokens_mean);
    fprintf(log, ", \"max\": %lld}", (long long)r->tokens_max);
    fprintf(log, ", \"dead_experts\": %lld, \"zero_expert_tokens\": %lld", (long long)r->dead_experts,
            (long long)r->zero_expert_tokens);
    log_number(log, "active_experts", r->active_experts);
    log_number(log, "grad_norm", r->grad_norm);
    log_number(log, "lr", r->lr);
    log_number(log, "ms", r->ms);
    log_number(log, "tok_s", r->tok_s);
    log_number(log, "tflops", r->tflops);
    log_number(log, "tflops_active", r->tflops_active);
    if (r->mfu >= 0.0) {
        log_number(log, "mfu", r->mfu);
        log_number(log, "mfu_active", r->mfu_active);
    }
    log_number(log, "mem_gb", r->mem_gb);
    fprintf(log, "}\n");
    log_flush(log, path);
}

// late: NULL, or the loss without the first segment, which is routed by its own mean (router_lory.h)
static inline void log_validation(FILE *log, const char *path, int64_t step, double loss, const double *late,
                                  const char *domain) {
    fprintf(log, "{\"step\": %lld", (long long)step);
    log_number(log, "val_loss", loss);
    if (late != NULL) {
        log_number(log, "val_loss_after_first_segment", *late);
    }
    fprintf(log, ", \"domain\": ");
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
