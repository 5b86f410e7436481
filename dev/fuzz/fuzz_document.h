/*
For targets whose subject reads a JSON document from a file: a folder in memory for it, a mutator that puts hostile values where
the document has values, and an account of memory, because die() leaves a reader with its memory in its hands.
Include after fuzz.h, before any header of llmc/.
*/
#ifndef FUZZ_DOCUMENT_H
#define FUZZ_DOCUMENT_H

#include <string.h>
#include <unistd.h>
// defines: memcpy, memmove, strlen, unlink, rmdir

enum { FUZZ_LIVE = 1024 };

static void *fuzz_live[FUZZ_LIVE]; // what calloc and realloc gave and nobody freed
static int fuzz_live_count;

static void fuzz_forget(const void *p) {
    for (int i = fuzz_live_count - 1; i >= 0; i--) {
        if (fuzz_live[i] == p) {
            fuzz_live[i] = fuzz_live[--fuzz_live_count];
            return;
        }
    }
}

static void *fuzz_note(void *p) {
    if (fuzz_live_count < FUZZ_LIVE) {
        fuzz_live[fuzz_live_count++] = p;
    }
    return p;
}

static void *fuzz_calloc(size_t n, size_t size) {
    return fuzz_note(calloc(n, size));
}

static void *fuzz_realloc(void *p, size_t size) {
    fuzz_forget(p);
    return fuzz_note(realloc(p, size));
}

static void fuzz_free(void *p) {
    fuzz_forget(p);
    free(p);
}

static void fuzz_free_all(void) {
    while (fuzz_live_count > 0) {
        free(fuzz_live[--fuzz_live_count]);
    }
}

#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free

// ----------------------------------------------------------------------------
// the file

static char fuzz_folder[64];
static char fuzz_path[128]; // in it

static void fuzz_remove_file(void) {
    unlink(fuzz_path);
    rmdir(fuzz_folder);
}

// the document under `name` in a folder of this process
static void fuzz_write(const char *name, const void *data, size_t size) {
    if (fuzz_folder[0] == '\0') {
        int in_memory = access("/dev/shm", W_OK) == 0;
        snprintf(fuzz_folder, sizeof(fuzz_folder), "%s/remoe_fuzz_XXXXXX", in_memory ? "/dev/shm" : "/tmp");
        FUZZ_CHECK(mkdtemp(fuzz_folder) != NULL);
        snprintf(fuzz_path, sizeof(fuzz_path), "%s/%s", fuzz_folder, name);
        atexit(fuzz_remove_file);
    }
    FILE *file = fopen(fuzz_path, "wb");
    FUZZ_CHECK(file != NULL && fwrite(data, 1, size, file) == size && fclose(file) == 0);
}

// ----------------------------------------------------------------------------
// every second mutation puts another value behind one of the document's colons

static size_t fuzz_replace_value(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    static const char *const values[] = {
        "0",
        "1",
        "2",
        "3",
        "7",
        "-1",
        "1024",
        "65536",
        "16777216",
        "2147483647",
        "2147483648",
        "4294967297",
        "9223372036854775807",
        "-9223372036854775808",
        "9223372036854775808",
        "0.5",
        "-0.0",
        "1e-300",
        "1e30",
        "1e300",
        "1e999",
        "true",
        "false",
        "null",
        "\"\"",
        "\"relu\"",
        "\"topk\"",
        "\"hash\"",
        "\"dense\"",
        "\"llama\"",
        "\"relu\\u0000\"",
        "\"\\uD83D\\uDE00\"",
        "{}",
        "[]",
        "[[{\"a\": 1}]]",
        "{\"rope_theta\": 1e4}",
    };
    const char *value = values[seed / 4 % (sizeof(values) / sizeof(values[0]))];
    size_t begin = size > 0 ? seed / 256 % size : 0;
    while (begin < size && data[begin] != ':') {
        begin++;
    }
    size_t end = begin + 1, n = strlen(value);
    while (end < size && strchr(",}\n", data[end]) == NULL) {
        end++;
    }
    if (begin >= size || size - (end - begin - 1) + n > capacity) {
        return LLVMFuzzerMutate(data, size, capacity);
    }
    memmove(data + begin + 1 + n, data + end, size - end);
    memcpy(data + begin + 1, value, n);
    return size - (end - begin - 1) + n;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    return seed % 2 ? LLVMFuzzerMutate(data, size, capacity) : fuzz_replace_value(data, size, capacity, seed);
}

#endif
