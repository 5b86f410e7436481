/*
test_remoe.cu: runs the CUDA tests, one component a file in dev/test/cuda/test_X.cuh.

    ./test_remoecu             all of them
    ./test_remoecu router ...  only these; model:topk is those of the model's cases
    ./test_remoecu --few ...   fewer and smaller shapes of router and model: for compute-sanitizer
    ./test_remoecu --portable ...   the portable kernels alone
    ./test_remoecu --bench attention ...   times these components' kernels instead
    ./test_remoecu --list      their names

On a Hopper GPU in bf16 the components that have kernels of two kinds are tested (and timed) with both,
unless --portable is given.

Prints a line a component and last "N passed, N failed"; exit 1 if any failed. The CUDA trainer is included
whole, and the CPU trainer in a namespace of its own: the reference that everything is compared with.
*/
#define main train_remoecu_main
#include "train_remoe.cu"
#undef main

// the reference's own components; all that it includes stands above already or here
#include "llmc/attention.h"
#include "llmc/crossentropy.h"
#include "llmc/dispatch.h"
#include "llmc/embedding.h"
#include "llmc/experts.h"
#include "llmc/matmul.h"
#include "llmc/merge.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
#include "llmc/router.h"
#include "llmc/run/host_memory.h"

namespace cpu {
#define main train_remoe_main
#include "train_remoe.c"
#undef main
} // namespace cpu

#include "dev/test/cuda/harness.cuh"
#include "dev/test/cuda/test_adamw.cuh"
#include "dev/test/cuda/test_buckets.cuh"
#include "dev/test/cuda/test_attention.cuh"
#include "dev/test/cuda/test_crossentropy.cuh"
#include "dev/test/cuda/test_decode.cuh"
#include "dev/test/cuda/test_dispatch.cuh"
#include "dev/test/cuda/test_dispatch_rmsnorm.cuh"
#include "dev/test/cuda/bench_elementwise.cuh"
#include "dev/test/cuda/test_embedding.cuh"
#include "dev/test/cuda/test_experts.cuh"
#include "dev/test/cuda/test_matmul.cuh"
#include "dev/test/cuda/test_merge.cuh"
#include "dev/test/cuda/test_grouped_gemm.cuh"
#include "dev/test/cuda/test_mma.cuh"
#include "dev/test/cuda/test_model.cuh"
#include "dev/test/cuda/test_pairs.cuh"
#include "dev/test/cuda/test_repeat.cuh"
#include "dev/test/cuda/test_rmsnorm.cuh"
#include "dev/test/cuda/test_rmsnorm_router.cuh"
#include "dev/test/cuda/test_rope.cuh"
#include "dev/test/cuda/test_router.cuh"
#include "dev/test/cuda/test_streams.cuh"

typedef struct {
    const char *name;
    void (*run)(void);
    void (*bench)(void); // or NULL
    int has_two_kinds;   // tested again with the Hopper kernels
} TestRow;

// foundations first
static const TestRow test_rows[] = {
    {"streams", test_cuda_streams, NULL, 0},
    {"mma", test_cuda_mma, NULL, 0},
    {"gemm", test_cuda_gemm, bench_cuda_elementwise, 0},
    {"embedding", test_cuda_embedding, NULL, 0},
    {"rmsnorm", test_cuda_rmsnorm, NULL, 0},
    {"rmsnorm_router", test_cuda_rmsnorm_router, NULL, 0},
    {"rope", test_cuda_rope, NULL, 0},
    {"attention", test_cuda_attention, bench_cuda_attention, 1},
    {"pairs", test_cuda_pairs, NULL, 0},
    {"router", test_cuda_router, bench_cuda_router, 0},
    {"dispatch", test_cuda_dispatch, bench_cuda_dispatch, 0},
    {"dispatch_rmsnorm", test_cuda_dispatch_rmsnorm, bench_cuda_dispatch_rmsnorm, 0},
    {"grouped_gemm", test_cuda_grouped_gemm, bench_cuda_grouped_gemm, 1},
    {"experts", test_cuda_experts, NULL, 1},
    {"merge", test_cuda_merge, NULL, 1},
    {"crossentropy", test_cuda_crossentropy, NULL, 0},
    {"adamw", test_cuda_adamw, NULL, 0},
    {"buckets", test_cuda_buckets, NULL, 0},
    {"model", test_cuda_model, NULL, 1},
    {"decode", test_cuda_decode, NULL, 0},
    {"repeat", test_cuda_repeat, NULL, 1},
};

enum { TEST_ROWS = sizeof(test_rows) / sizeof(test_rows[0]) };

// does the argument name this test, or cases of it (model:topk)?
static int names_test(const char *argument, const char *name) {
    size_t size = strlen(name);
    int cases = strcmp(name, "model") == 0 || strcmp(name, "decode") == 0;
    return strncmp(argument, name, size) == 0 && (argument[size] == '\0' || (cases && argument[size] == ':'));
}

// none is named: all, and where there is no GPU to fill, all but the repeats
static int test_is_wanted(const TestRow *row, int argc, char **argv) {
    int named = 0;
    for (int i = 1; i < argc; i++) {
        named += argv[i][0] != '-';
        if (names_test(argv[i], row->name)) {
            return 1;
        }
    }
    return named == 0 && !(emulated() && row->run == test_cuda_repeat);
}

static void refuse_unknown_tests(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int known = strcmp(argv[i], "--bench") == 0 || strcmp(argv[i], "--few") == 0 ||
                    strcmp(argv[i], "--portable") == 0;
        for (int row = 0; row < TEST_ROWS; row++) {
            known += names_test(argv[i], test_rows[row].name);
        }
        if (!known) {
            die_usage("no test is called %s\n  ---> ./test_remoecu --list", argv[i]);
        }
    }
}

typedef struct {
    int passed, failed, skipped;
} TestTotals;

static void run_test(const TestRow *row, TestTotals *totals) {
    double begin = seconds_now();
    memset(&tally, 0, sizeof(tally));
    test_component = row->name;
    row->run();
    CUDA_CHECK(cudaDeviceSynchronize());
    int ok = tally.failures == 0 && tally.checks > 0;
    printf("%-16s %s  %6d checks, %d failed%s  %.1f s%s\n", row->name, ok ? "ok    " : "FAILED", tally.checks,
           tally.failures, tally.skipped ? ", some skipped" : "", seconds_now() - begin,
           test_kernels == KERNELS_HOPPER ? "  (Hopper kernels)" : "");
    fflush(stdout);
    totals->passed += ok;
    totals->failed += !ok;
    totals->skipped += tally.skipped;
}

static int run_tests(int argc, char **argv, Kernels best) {
    TestTotals totals = {0, 0, 0};
    for (int row = 0; row < TEST_ROWS; row++) {
        if (!test_is_wanted(&test_rows[row], argc, argv)) {
            continue;
        }
        test_kernels = KERNELS_PORTABLE;
        run_test(&test_rows[row], &totals);
        if (test_rows[row].has_two_kinds && best != KERNELS_PORTABLE) {
            test_kernels = best;
            run_test(&test_rows[row], &totals);
        }
    }
    printf("%s: %d passed, %d failed", is_fp32() ? "fp32" : "bf16", totals.passed, totals.failed);
    printf(totals.skipped ? ", %d skipped\n" : "\n", totals.skipped);
    return totals.failed > 0;
}

static void run_benches(int argc, char **argv, Kernels best) {
    for (int row = 0; row < TEST_ROWS; row++) {
        if (test_rows[row].bench == NULL || !test_is_wanted(&test_rows[row], argc, argv)) {
            continue;
        }
        test_kernels = KERNELS_PORTABLE;
        test_rows[row].bench();
        if (test_rows[row].has_two_kinds && best != KERNELS_PORTABLE) {
            test_kernels = best;
            printf("the same with Hopper kernels\n");
            test_rows[row].bench();
        }
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    machine_start(argv);
    int benching = argc >= 2 && strcmp(argv[1], "--bench") == 0;
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (int row = 0; row < TEST_ROWS; row++) {
            printf("%s\n", test_rows[row].name);
        }
        return 0;
    }
    refuse_unknown_tests(argc, argv);
    test_names = argv + 1;
    Kernels best = grouped_best_kernels();
    for (int i = 1; i < argc; i++) {
        few_cases |= strcmp(argv[i], "--few") == 0;
        best = strcmp(argv[i], "--portable") == 0 ? KERNELS_PORTABLE : best;
    }
    if (!benching) {
        return run_tests(argc, argv, best);
    }
    run_benches(argc, argv, best);
    return 0;
}
