/*
The smallest test harness that does the job. A component's cases are functions without arguments in
dev/test/test_X.h, each entered through `static void test_X(void)`, which the runner's table names. A case
checks with the macros below: each failure prints file, line and figures and is counted; the runner exits 1 if
any was.

    CHECK(cond)                               a fact
    check_close(what, got, want, n, tol)      ||got - want|| / ||want|| <= tol over n floats; NaN never passes
    check_close_to(what, got, want, n, tol)   the same against a reference in double
    check_dies(status, "text", fn, arg)       fn(arg), in a child process, ends so and says the text

Comparisons are relative, per tensor: an absolute tolerance would hide a wrong small gradient.
*/
#ifndef HARNESS_H
#define HARNESS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: sqrt, printf, fork, pipe, dup2, read, waitpid, omp_set_num_threads

typedef struct {
    int checks;   // made so far
    int failures; // of them, failed
    int skipped;  // cases that lacked their input (outside data, zstd, ...)
} TestTally;

static TestTally tally;

#define CHECK(cond) check_fact((cond) ? 1 : 0, #cond, __FILE__, __LINE__)

static inline int check_fact(int ok, const char *what, const char *file, int line) {
    tally.checks++;
    if (!ok) {
        tally.failures++;
        printf("  FAILED %s:%d: %s\n", file, line, what);
    }
    return ok;
}

static inline void skip_case(const char *why) {
    tally.skipped++;
    printf("  skipped: %s\n", why);
}

// ||got - want|| / ||want||; when want is all zero, ||got||
static inline double relative_error(const float *got, const float *want, size_t n) {
    double diff = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        diff += d * d;
        norm += (double)want[i] * (double)want[i];
    }
    return norm > 0.0 ? sqrt(diff / norm) : sqrt(diff);
}

static inline int check_close(const char *what, const float *got, const float *want, size_t n,
                              double tolerance) {
    double error = relative_error(got, want, n);
    int ok = error <= tolerance; // false for NaN
    tally.checks++;
    if (!ok) {
        tally.failures++;
        printf("  FAILED %s: relative error %.3e > %.1e over %zu values\n", what, error, tolerance, n);
    }
    return ok;
}

// got in fp32 against a reference that was computed in double
static inline int check_close_to(const char *what, const float *got, const double *want, size_t n,
                                 double tolerance) {
    double diff = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        diff += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    double error = norm > 0.0 ? sqrt(diff / norm) : sqrt(diff);
    tally.checks++;
    if (!(error <= tolerance)) { // NaN fails too
        tally.failures++;
        printf("  FAILED %s: relative error %.3e > %.1e over %zu values\n", what, error, tolerance, n);
        return 0;
    }
    return 1;
}

// gradient[i] = d f(context) / d x[i], for an f in double that reads x: good to about 1e-9
static inline void central_differences(double *gradient, double *x, size_t n, double (*f)(void *),
                                       void *context) {
    for (size_t i = 0; i < n; i++) {
        double here = x[i], h = 1e-5;
        x[i] = here + h;
        double above = f(context);
        x[i] = here - h;
        double below = f(context);
        x[i] = here;
        gradient[i] = (above - below) / (2.0 * h);
    }
}

static inline void to_double(double *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        out[i] = x[i];
    }
}

#if defined(__clang__) && defined(__has_feature)
#if __has_feature(address_sanitizer)
// a forked child is without the threads that hold libomp's memory: that is not a leak of ours
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:libomp";
}
#endif
#endif

static inline void use_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

// runs fn(arg) in a child with stdout and stderr caught; output (may be NULL) receives what it printed
static inline int run_in_child(void (*fn)(void *), void *arg, char *output, size_t capacity) {
    int fds[2];
    char text[4096];
    size_t used = 0;
    fflush(stdout);
    fflush(stderr);
    if (pipe(fds) != 0) {
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fds[1], 1);
        dup2(fds[1], 2);
        close(fds[0]);
        close(fds[1]);
        fn(arg);
        fflush(stdout);
        _exit(0);
    }
    close(fds[1]);
    for (;;) {
        ssize_t got = read(fds[0], text, sizeof(text));
        if (got <= 0) {
            break;
        }
        if (output != NULL && used + (size_t)got < capacity) {
            memcpy(output + used, text, (size_t)got);
            used += (size_t)got;
        }
    }
    if (output != NULL) {
        output[used] = '\0';
    }
    close(fds[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define check_dies(status, text, fn, arg) check_dies_at(status, text, fn, arg, __FILE__, __LINE__)

static inline int check_dies_at(int want, const char *text, void (*fn)(void *), void *arg, const char *file,
                                int line) {
    static char output[65536];
    int status = run_in_child(fn, arg, output, sizeof(output));
    int ok = status == want && strstr(output, text) != NULL;
    tally.checks++;
    if (!ok) {
        tally.failures++;
        printf("  FAILED %s:%d: exit %d (expected %d) with \"%s\" in: %s\n", file, line, status, want, text,
               output);
    }
    return ok;
}

// small reproducible inputs: uniform in [-scale, scale)
static inline void fill_uniform(float *x, size_t n, unsigned seed, float scale) {
    unsigned long long state = seed * 0x9E3779B97F4A7C15ull + 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        x[i] = scale * ((float)(state >> 40) / 8388608.0f - 1.0f);
    }
}

#endif
