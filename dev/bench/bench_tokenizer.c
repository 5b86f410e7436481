/*
Speed of tokenizer_encode on one thread: every document of each file, three passes over all files, each with a new
Tokenizer, that is an empty cache. A line a file: name, bytes of text, ids, CPU seconds of the best pass, SHA-256
of the ids as uint16.

    build/bench_tokenizer DIR FILE...        DIR: vocab.json and merges.txt

dev/bench/bench_tokenizer.py runs it in turns with tiktoken.
*/
#include "data/document.h"
#include "data/sha256.h"
#include "llmc/files/tokenizer.h"
#include "llmc/machine.h"
#include <time.h>
// defines: clock_gettime

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    size_t bytes, ids;
    double seconds;
    char sha256[65];
} Result;

// reading, parsing and hashing are not in the time
static void bench_file(Tokenizer *t, char *path, int **ids, size_t *capacity, Result *result) {
    Inputs inputs;
    Corpus corpus;
    CorpusRecord record;
    Document document;
    JsonArena arena;
    Sha256 sha;
    char error[256];
    double seconds = 0.0;
    inputs_init(&inputs, &path, 1, "");
    corpus_init(&corpus, &inputs, 0);
    json_arena_init(&arena);
    sha256_init(&sha);
    result->bytes = 0;
    result->ids = 0;
    while (corpus_next(&corpus, &record)) {
        if (!document_parse(&inputs.files[record.file], "text", &record, &arena, &document, error,
                            sizeof(error))) {
            die("%s, line %lld: %s", path, (long long)record.line, error);
        }
        size_t n = 0;
        double start = cpu_seconds();
        tokenizer_encode(t, document.text, document.size, ids, &n, capacity);
        seconds += cpu_seconds() - start;
        result->bytes += document.size;
        result->ids += n;
        for (size_t i = 0; i < n; i++) {
            uint16_t id = (uint16_t)(*ids)[i];
            sha256_update(&sha, &id, 2);
        }
    }
    sha256_finish(&sha, result->sha256);
    result->seconds = result->seconds == 0.0 || seconds < result->seconds ? seconds : result->seconds;
    json_arena_free(&arena);
    corpus_free(&corpus);
    inputs_free(&inputs);
}

int main(int argc, char **argv) {
    machine_start(argv);
    if (argc < 3) {
        die_usage("no file\n  ---> build/bench_tokenizer DIR FILE...");
    }
    Tokenizer *t = tokenizer_load(argv[1]);
    Result *results = NEW(Result, argc);
    int *ids = NULL;
    size_t capacity = 0;
    for (int pass = 0; pass < 3; pass++) {
        Tokenizer *fresh = tokenizer_share(t);
        for (int i = 2; i < argc; i++) {
            bench_file(fresh, argv[i], &ids, &capacity, &results[i]);
        }
        tokenizer_free(fresh);
    }
    for (int i = 2; i < argc; i++) {
        const Result *r = &results[i];
        printf("%s %zu %zu %.6f %s\n", argv[i], r->bytes, r->ids, r->seconds, r->sha256);
    }
    free(results);
    free(ids);
    tokenizer_free(t);
    return 0;
}
