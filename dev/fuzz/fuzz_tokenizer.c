// bpe.h, vocabulary.h, tokenizer.h: any two files are a vocabulary or refused; with a good one any bytes
// become ids and come back, and the quick ways to cut and merge words give what the slow ones give. An input
// is "V" vocab.json "\0" merges.txt "\0" text, or "T" text for the vocabulary of 256 bytes and a few merges.
#include "fuzz.h"
#include <string.h>
#include <unistd.h>

// die() leaves in the middle of loading: what was allocated by then is freed here
enum { FUZZ_BLOCKS = 1 << 16 };
static void *fuzz_blocks[FUZZ_BLOCKS];
static size_t fuzz_count;

static void *fuzz_remember(void *p) {
    FUZZ_CHECK(fuzz_count < FUZZ_BLOCKS);
    fuzz_blocks[fuzz_count++] = p;
    return p;
}

// p may be older than the last reset
static void fuzz_forget(void *p) {
    for (size_t i = fuzz_count; i-- > 0;) {
        if (fuzz_blocks[i] == p) {
            fuzz_blocks[i] = fuzz_blocks[--fuzz_count];
            return;
        }
    }
}

static void *fuzz_calloc(size_t n, size_t size) {
    return fuzz_remember(calloc(n, size));
}

static void *fuzz_realloc(void *p, size_t size) {
    fuzz_forget(p);
    return fuzz_remember(realloc(p, size));
}

static void fuzz_free(void *p) {
    fuzz_forget(p);
    free(p);
}

#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define free fuzz_free
#include "llmc/files/tokenizer.h"
#undef calloc
#undef realloc
#undef free
#include "fuzz_vocabulary.h"

static char fuzz_folder[64];

static void fuzz_write(const char *name, const void *data, size_t size) {
    char path[128];
    check_format(path, sizeof(path), "%s/%s", fuzz_folder, name);
    FILE *file = fopen(path, "wb");
    FUZZ_CHECK(file != NULL && fwrite(data, 1, size, file) == size);
    fclose(file);
}

static void check_text(Tokenizer *t, const char *text, size_t size) {
    int *ids = NULL;
    size_t n = 0, capacity = 0, slow = 0, back_size;
    tokenizer_encode(t, text, size, &ids, &n, &capacity);
    for (size_t at = 0, bytes; at < size; at += bytes) {
        const uint8_t *word = (const uint8_t *)text + at;
        bytes = tokenizer_word_size(t, word, size - at);
        FUZZ_CHECK(bytes > 0 && bytes <= size - at);
        tokenizer_merge_long(t, word, bytes);
        for (int64_t i = 0; i >= 0; i = t->symbols[i].next) {
            FUZZ_CHECK(slow < n && ids[slow] == t->symbols[i].id);
            slow++;
        }
    }
    FUZZ_CHECK(slow == n);
    char *back = tokenizer_decode(t, ids, n, &back_size);
    FUZZ_CHECK(back_size == size && memcmp(back, text, size) == 0);
    fuzz_free(back);
    n = 0;
    tokenizer_encode_special(t, text, size, &ids, &n, &capacity);
    back = tokenizer_decode(t, ids, n, &back_size);
    FUZZ_CHECK(back_size == size && memcmp(back, text, size) == 0);
    fuzz_free(back);
    fuzz_free(ids);
}

// writes the input's vocabulary and returns where its text begins; NULL when it has none
static const char *write_vocabulary(const char *data, size_t size) {
    const char *end = data + size;
    const char *merges = data[0] == 'V' ? (const char *)memchr(data, 0, size) : NULL;
    const char *text =
        merges != NULL ? (const char *)memchr(merges + 1, 0, (size_t)(end - merges) - 1) : NULL;
    if (text != NULL) {
        fuzz_write("vocab.json", data + 1, (size_t)(merges - data) - 1);
        fuzz_write("merges.txt", merges + 1, (size_t)(text - merges) - 1);
    }
    return text != NULL ? text + 1 : NULL;
}

static void check_vocabulary(const char *text, size_t size) {
    if (setjmp(fuzz_died) == 0) {
        Tokenizer *t = tokenizer_load(fuzz_folder);
        check_text(t, text, size);
        tokenizer_free(t);
        FUZZ_CHECK(fuzz_count == 0); // nothing leaks on the straight path
    }
    while (fuzz_count > 0) {
        free(fuzz_blocks[--fuzz_count]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Tokenizer *bytes;
    if (bytes == NULL) {
        strcpy(fuzz_folder, "/tmp/fuzz_tokenizer.XXXXXX");
        FUZZ_CHECK(mkdtemp(fuzz_folder) != NULL);
        fuzz_write_bytes_vocabulary(fuzz_folder);
        bytes = tokenizer_load(fuzz_folder);
        fuzz_count = 0; // it stays
    }
    const char *end = (const char *)data + size;
    const char *text = size > 0 ? write_vocabulary((const char *)data, size) : NULL;
    if (text != NULL) {
        check_vocabulary(text, (size_t)(end - text));
    } else if (size > 0) {
        check_text(bytes, (const char *)data + 1, size - 1);
        fuzz_count = 0; // its scratch may have grown
    }
    return 0;
}
