// logger.h: any log.jsonl is cut back to a step without an error: its whole rows of earlier steps stay, byte for byte, and no others.
#include "fuzz.h"
#include "fuzz_document.h"
#include "llmc/files/logger.h"

enum { FIRST_STEP = 3 }; // that a resumed run will write

static int stays(const char *line, size_t size, JsonArena *arena) {
    char error[128];
    int64_t step;
    const Json *row = json_parse(line, size, arena, error, sizeof(error));
    return row != NULL && json_int64(json_get(row, "step"), &step) && step < FIRST_STEP;
}

// the expected file, made line by line
static char *expected(const char *data, size_t size, size_t *kept) {
    char *out = (char *)calloc(size + 1, 1);
    JsonArena arena;
    size_t begin = 0;
    json_arena_init(&arena);
    *kept = 0;
    for (size_t i = 0; i < size; i++) {
        if (data[i] != '\n') {
            continue;
        }
        if (stays(data + begin, i - begin, &arena)) {
            memcpy(out + *kept, data + begin, i - begin + 1);
            *kept += i - begin + 1;
        }
        begin = i + 1;
    }
    json_arena_free(&arena);
    return out;
}

static void check_file(const char *want, size_t size) {
    size_t got_size;
    char *got = check_read_file(fuzz_path, &got_size, "");
    FUZZ_CHECK(got_size == size && memcmp(got, want, size) == 0);
    free(got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t kept;
    fuzz_write("log.jsonl", data, size);
    if (setjmp(fuzz_died) == 0) {
        log_cut(fuzz_path, FIRST_STEP);
        char *want = expected((const char *)data, size, &kept);
        check_file(want, kept);
        log_cut(fuzz_path, FIRST_STEP); // again: nothing is left to cut
        check_file(want, kept);
        free(want);
    } else {
        FUZZ_CHECK(!"cutting a log never dies");
    }
    fuzz_free_all();
    return 0;
}
