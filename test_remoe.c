/*
test_remoe.c: runs the CPU tests, one component a file in dev/test/test_X.h.

    ./test_remoe             all of them
    ./test_remoe lambda ...  only these
    ./test_remoe --list      their names

Prints a line a component and last "N passed, N failed" (components); exit 1 if any failed. The whole trainer
is included, so that the tests can call any part of it; `./test_remoe --train OPTIONS` is that trainer, for
the tests that watch it from outside.
*/
#define main train_remoe_main
#include "train_remoe.c"
#undef main

#include "dev/test/harness.h"
#include "dev/test/test_adamw.h"
#include "dev/test/test_attention.h"
#include "dev/test/test_checkpoint.h"
#include "dev/test/test_config.h"
#include "dev/test/test_crossentropy.h"
#include "dev/test/test_dataloader.h"
#include "dev/test/test_dispatch.h"
#include "dev/test/test_embedding.h"
#include "dev/test/test_experts.h"
#include "dev/test/test_export.h"
#include "dev/test/test_fast_exp.h"
#include "dev/test/test_fuzz_corpus.h"
#include "dev/test/test_json.h"
#include "dev/test/test_lambda.h"
#include "dev/test/test_launch.h"
#include "dev/test/test_logger.h"
#include "dev/test/test_machine.h"
#include "dev/test/test_matmul.h"
#include "dev/test/test_merge.h"
#include "dev/test/test_model.h"
#include "dev/test/test_options.h"
#include "dev/test/test_pairs.h"
#include "dev/test/test_ranks.h"
#include "dev/test/test_rmsnorm.h"
#include "dev/test/test_rng.h"
#include "dev/test/test_rope.h"
#include "dev/test/test_router.h"
#include "dev/test/test_router_auxfree.h"
#include "dev/test/test_router_ec.h"
#include "dev/test/test_router_hash.h"
#include "dev/test/test_router_lory.h"
#include "dev/test/test_router_relu.h"
#include "dev/test/test_router_sparsemixer.h"
#include "dev/test/test_router_topk.h"
#include "dev/test/test_safetensors.h"
#include "dev/test/test_sampler.h"
#include "dev/test/test_schedule.h"
#include "dev/test/test_score.h"
#include "dev/test/test_tokenizer.h"
#include "dev/test/test_data.h"
#include "dev/test/test_trainer.h"

typedef struct {
    const char *name;
    void (*run)(void);
} TestRow;

// in the order of the data's way through the program: foundations, formats, model, trainer
static const TestRow test_rows[] = {
    {"machine", test_machine},
    {"rng", test_rng},
    {"fast_exp", test_fast_exp},
    {"json", test_json},
    {"options", test_options},
    {"config", test_config},
    {"safetensors", test_safetensors},
    {"tokenizer", test_tokenizer},
    {"dataloader", test_dataloader},
    {"model", test_model},
    {"matmul", test_matmul},
    {"embedding", test_embedding},
    {"rmsnorm", test_rmsnorm},
    {"rope", test_rope},
    {"attention", test_attention},
    {"pairs", test_pairs},
    {"router_relu", test_router_relu},
    {"router_topk", test_router_topk},
    {"router_auxfree", test_router_auxfree},
    {"router_sparsemixer", test_router_sparsemixer},
    {"router_lory", test_router_lory},
    {"router_ec", test_router_ec},
    {"router_hash", test_router_hash},
    {"router", test_router},
    {"dispatch", test_dispatch},
    {"experts", test_experts},
    {"merge", test_merge},
    {"crossentropy", test_crossentropy},
    {"adamw", test_adamw},
    {"schedule", test_schedule},
    {"lambda", test_lambda},
    {"sampler", test_sampler},
    {"logger", test_logger},
    {"launch", test_launch},
    {"ranks", test_ranks},
    {"checkpoint", test_checkpoint},
    {"fuzz_corpus", test_fuzz_corpus},
    {"data", test_data},
    {"trainer", test_trainer},
    {"export", test_export},
    {"score", test_score},
};

enum { TEST_ROWS = sizeof(test_rows) / sizeof(test_rows[0]) };

static int test_is_wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], name) == 0) {
            return 1;
        }
    }
    return argc == 1;
}

static void refuse_unknown_tests(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        int known = 0;
        for (int row = 0; row < TEST_ROWS; row++) {
            known += strcmp(argv[i], test_rows[row].name) == 0;
        }
        if (!known) {
            die_usage("no test is called %s\n  ---> ./test_remoe --list", argv[i]);
        }
    }
}

int main(int argc, char **argv) {
    machine_start(argv);
    int passed = 0, failed = 0, skipped = 0;
    if (argc == 2 && strcmp(argv[1], "--list") == 0) {
        for (int row = 0; row < TEST_ROWS; row++) {
            printf("%s\n", test_rows[row].name);
        }
        return 0;
    }
    if (argc >= 2 && strcmp(argv[1], "--train") == 0) {
        return train_remoe_main(argc - 1, argv + 1);
    }
    refuse_unknown_tests(argc, argv);
    make_folder("build/test");
    for (int row = 0; row < TEST_ROWS; row++) {
        if (!test_is_wanted(test_rows[row].name, argc, argv)) {
            continue;
        }
        double begin = seconds_now();
        memset(&tally, 0, sizeof(tally));
        test_rows[row].run();
        int ok = tally.failures == 0 && tally.checks + tally.skipped > 0;
        printf("%-14s %s  %6d checks, %d failed%s  %.1f s\n", test_rows[row].name, ok ? "ok    " : "FAILED",
               tally.checks, tally.failures, tally.skipped ? ", some skipped" : "", seconds_now() - begin);
        fflush(stdout);
        passed += ok;
        failed += !ok;
        skipped += tally.skipped;
    }
    printf("%d passed, %d failed", passed, failed);
    printf(skipped ? ", %d skipped\n" : "\n", skipped);
    return failed > 0;
}
