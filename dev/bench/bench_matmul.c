/*
Our sgemm against OpenBLAS's (where the library is installed) and the naive loop, on the model's shapes.

Every linear layer has three products: forward NT, inp's gradient NN, weight's gradient TN. Each line is one
of them on 1 and on 2 threads, measured in turns (ours, OpenBLAS, ours, OpenBLAS, ...) so that both meet the
same noise; a figure is the median of its turns. The last line is the geometric mean and the minimum of the
ratios ours / OpenBLAS. The naive loop runs on one thread and on a few rows of the problem: more would take
minutes.

    make bench                      (part of it; about 30 seconds)
    build/bench_matmul TEXT         only the lines whose name contains TEXT
*/
#include <dirent.h>
#include <dlfcn.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
// defines: opendir, dlopen, log, sched_setaffinity, printf, setenv, strstr, clock_gettime, execv, usleep

#include "llmc/check.h"
#include "llmc/machine.h"
#include "llmc/matmul.h"

typedef void (*BlasSgemm)(int order, int trans_a, int trans_b, int M, int N, int K, float alpha,
                          const float *A, int lda, const float *B, int ldb, float beta, float *C, int ldc);
typedef void (*BlasThreads)(int threads);
typedef char *(*BlasCore)(void);

typedef struct {
    BlasSgemm sgemm;
    BlasThreads set_threads;
    const char *core; // the processor that it takes this one for
} Blas;

typedef struct {
    const char *name;
    int rows, C, OC; // out[rows, OC] = inp[rows, C] weight[OC, C]^T
} Layer;

// tiny: d = 192, F = 768; small: d = 768, F = 3072; 2048 tokens, 8 experts of which each token takes one or
// two
static const Layer layers[] = {
    {"tiny qkv", 2048, 192, 320},
    {"tiny o", 2048, 192, 192},
    {"tiny router", 2048, 192, 8},
    {"tiny gate_up, expert", 512, 192, 1536},
    {"tiny down, expert", 512, 768, 192},
    {"tiny head", 2048, 192, 2048},
    {"tiny gate_up, 16 rows", 16, 192, 1536},
    {"small qkv", 1024, 768, 1280},
    {"small o", 1024, 768, 768},
    {"small router", 2048, 768, 8},
    {"small gate_up, expert", 256, 768, 6144},
    {"small down, expert", 256, 3072, 768},
    {"small head", 512, 768, 51200},
};

enum { ROUNDS = 5 };

// Spinning threads of one library would slow the other's turns: have both give up soon. Read when they are
// loaded.
static void keep_threads_quiet(char **argv) {
    if (getenv("OPENBLAS_THREAD_TIMEOUT") == NULL) {
        setenv("OPENBLAS_THREAD_TIMEOUT", "21", 1); // 2^21 cycles
        setenv("OPENBLAS_NUM_THREADS", "2", 1);
        setenv("GOMP_SPINCOUNT", "10000", 0);
        setenv("KMP_BLOCKTIME", "1", 0);
#ifdef __AVX512F__
        setenv("OPENBLAS_CORETYPE", "SkylakeX", 0); // some machines are taken for lesser ones
#endif
        char program[4096];
        if (program_path(program, sizeof(program))) {
            execv(program, argv);
        }
    }
}

// The kernel may leave two short-lived teams of threads on one core: bind thread 0 and 1 of either library to
// two.
static void pin(pid_t thread, int index) {
#ifdef __linux__
    static cpu_set_t cores;
    static int known = 0;
    if (!known) {
        known = sched_getaffinity(0, sizeof(cores), &cores) == 0;
    }
    for (int cpu = 0; known && cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &cores) && index-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(thread, sizeof(one), &one);
        }
    }
#else
    (void)thread;
    (void)index;
#endif
}

// OpenBLAS's second thread exists as soon as the library is loaded, ours with the first parallel region
static void pin_threads(void) {
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *entry = NULL;
    while (tasks != NULL && (entry = readdir(tasks)) != NULL) {
        pid_t thread = (pid_t)atoi(entry->d_name);
        if (thread > 0) {
            pin(thread, thread == getpid() ? 0 : 1);
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(2)
    pin(0, omp_get_thread_num());
#endif
}

static Blas load_blas(void) {
    Blas blas = {NULL, NULL, "unknown"};
    BlasCore core = NULL;
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    if (library == NULL) {
        library = dlopen("libopenblas.so", RTLD_NOW);
    }
    if (library != NULL) {
        *(void **)&blas.sgemm = dlsym(library, "cblas_sgemm");
        *(void **)&blas.set_threads = dlsym(library, "openblas_set_num_threads");
        *(void **)&core = dlsym(library, "openblas_get_corename");
    }
    if (blas.sgemm == NULL || blas.set_threads == NULL) {
        blas.sgemm = NULL;
    } else if (core != NULL) {
        blas.core = core();
    }
    return blas;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void set_threads(const Blas *blas, int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    if (blas->sgemm != NULL) {
        blas->set_threads(threads);
    }
}

static void naive(int trans_a, int trans_b, int M, int N, int K, const float *A, int64_t lda, const float *B,
                  int64_t ldb, float *C, int64_t ldc) {
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            float sum = 0.0f;
            for (int k = 0; k < K; k++) {
                sum +=
                    (trans_a ? A[k * lda + i] : A[i * lda + k]) * (trans_b ? B[j * ldb + k] : B[k * ldb + j]);
            }
            C[i * ldc + j] = sum;
        }
    }
}

typedef struct {
    const char *op;
    int trans_a, trans_b, M, N, K, lda, ldb;
    const float *A, *B;
    float *C;
} Product;

typedef enum { OURS, BLAS, NAIVE } Who;

static void multiply(Who who, const Blas *blas, const Product *p) {
    if (who == OURS) {
        sgemm(p->trans_a, p->trans_b, p->M, p->N, p->K, p->A, p->lda, p->B, p->ldb, p->C, p->N, 0);
    } else if (who == BLAS) {
        blas->sgemm(101, 111 + p->trans_a, 111 + p->trans_b, p->M, p->N, p->K, 1.0f, p->A, p->lda, p->B,
                    p->ldb, 0.0f, p->C, p->N);
    } else {
        naive(p->trans_a, p->trans_b, p->M, p->N, p->K, p->A, p->lda, p->B, p->ldb, p->C, p->N);
    }
}

// GFLOP/s of one turn: a call to wake the threads and fill the caches, then calls for a few milliseconds
static double turn(Who who, const Blas *blas, const Product *p) {
    double flops = 2.0 * p->M * p->N * p->K;
    if (flops < 2e9) {
        multiply(who, blas, p);
    }
    int calls = 0;
    double start = now(), seconds = 0.0;
    while (seconds < 0.008) {
        multiply(who, blas, p);
        calls++;
        seconds = now() - start;
    }
    usleep(2000); // let the threads fall asleep
    return flops * calls / seconds * 1e-9;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof(double), ascending);
    return values[n / 2];
}

typedef struct {
    double log_sum, least;
    int n;
} Ratios;

static void measure(const Blas *blas, const Product *p, int threads, Ratios *ratios) {
    double ours[ROUNDS], theirs[ROUNDS];
    int rounds = 2.0 * p->M * p->N * p->K > 2e10 ? 3 : ROUNDS;
    set_threads(blas, threads);
    for (int i = 0; i < rounds; i++) {
        ours[i] = turn(OURS, blas, p);
        theirs[i] = blas->sgemm != NULL ? turn(BLAS, blas, p) : 0.0;
    }
    double mine = median(ours, rounds), peer = median(theirs, rounds);
    printf(" | %7.1f", mine);
    if (blas->sgemm != NULL) {
        double ratio = mine / peer;
        printf(" %7.1f %5.2f", peer, ratio);
        ratios->log_sum += log(ratio);
        ratios->least = ratio < ratios->least ? ratio : ratios->least;
        ratios->n++;
    }
    fflush(stdout);
}

static double naive_speed(const Blas *blas, Product p) {
    double most = 1e7 / p.N / p.K;
    p.M = p.M < most ? p.M : (most < 1.0 ? 1 : (int)most);
    return turn(NAIVE, blas, &p);
}

static float *random_floats(size_t n) {
    float *x = NEW(float, n);
    uint32_t state = 12345;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(int32_t)state * 4.6566129e-10f; // uniform in [-1, 1)
    }
    return x;
}

static void bench_layer(const Blas *blas, const Layer *layer, Ratios *ratios) {
    int rows = layer->rows, C = layer->C, OC = layer->OC;
    size_t inp_size = (size_t)rows * C, out_size = (size_t)rows * OC, weight_size = (size_t)OC * C;
    float *inp = random_floats(inp_size), *out = random_floats(out_size),
          *weight = random_floats(weight_size);
    Product products[3] = {
        {"NT", 0, 1, rows, OC, C, C, C, inp, weight, NEW(float, out_size)},
        {"NN", 0, 0, rows, C, OC, OC, C, out, weight, NEW(float, inp_size)},
        {"TN", 1, 0, OC, C, rows, OC, C, out, inp, NEW(float, weight_size)},
    };
    for (int i = 0; i < 3; i++) {
        const Product *p = &products[i];
        printf("%-22s %s %5d %5d %5d %6.1f", layer->name, p->op, p->M, p->N, p->K, naive_speed(blas, *p));
        measure(blas, p, 1, ratios);
#ifdef _OPENMP
        measure(blas, p, 2, ratios);
#endif
        printf("\n");
        free(p->C);
    }
    free(inp);
    free(out);
    free(weight);
}

int main(int argc, char **argv) {
    keep_threads_quiet(argv);
    Blas blas = load_blas();
    pin_threads();
    Ratios ratios = {0.0, INFINITY, 0};
    if (blas.sgemm == NULL) {
        printf("OpenBLAS is not installed: its columns are left out\n");
    } else {
        printf("OpenBLAS for %s against %d lanes\n", blas.core, LANES);
    }
    printf("%-44snaive |       1 thread        |       2 threads\n", "GFLOP/s");
    printf("%-22s op     M     N     K        |    ours    blas ratio |    ours    blas ratio\n", "layer");
    for (size_t i = 0; i < sizeof(layers) / sizeof(layers[0]); i++) {
        if (argc < 2 || strstr(layers[i].name, argv[1]) != NULL) {
            bench_layer(&blas, &layers[i], &ratios);
        }
    }
    if (ratios.n > 0) {
        printf("ours / OpenBLAS: geometric mean %.2f, minimum %.2f of %d\n", exp(ratios.log_sum / ratios.n),
               ratios.least, ratios.n);
    }
    return 0;
}
