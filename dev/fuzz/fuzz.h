/*
What the fuzz targets share: die() leaves by longjmp instead of ending the program, so that a refused input is
one run like any other. Include before any header of llmc/. A target is built and run a minute with
    clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE dev/fuzz/fuzz_json.c -o build/fuzz_json -lm
    build/fuzz_json -max_total_time=60 -close_fd_mask=2 build/corpus_json dev/fuzz/corpus/json
(the first folder, which must exist, takes what it discovers). A find goes to dev/fuzz/corpus/X, which is
replayed by dev/test/test_X.h; the shards' by test_dataloader.h, those of config, state and log by test_fuzz_corpus.h.
*/
#ifndef FUZZ_H
#define FUZZ_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
// defines: longjmp, abort

static jmp_buf fuzz_died;
#define DIE_EXIT(status) longjmp(fuzz_died, (status))

// a broken promise: reported by libFuzzer as a crash
#define FUZZ_CHECK(cond)                                                                                     \
    do {                                                                                                     \
        if (!(cond)) {                                                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                                       \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t capacity);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed);

#endif
