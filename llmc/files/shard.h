/*
A token shard, as llm.c has it, written and read.

    file = 256 int32 {20240520, 1, ntok, 0, ...}, then ntok uint16 tokens        little-endian

The reader maps the file: no token is copied before it is used.

Shapes: tokens [ntok]. Errors: a file that is no whole shard dies, named with what it is and the remedy.
*/
#ifndef SHARD_H
#define SHARD_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: open, mmap, munmap, fstat, close
#include "llmc/check.h"
#include "llmc/files/fnv.h"
#include "llmc/files/newfile.h"

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_BYTES 1024
#define SHARD_HINT "make sample-data, or name your own shards with --train-data and --val-data"

static_assert(SHARD_HEADER_BYTES == 256 * sizeof(int32_t), "a header is 256 int32");

// ----------------------------------------------------------------------------
// writing a shard

typedef struct {
    NewFile file;
    int64_t num_tokens; // so far
} ShardWriter;

static inline void shard_writer_open(ShardWriter *w, const char *path) {
    const int32_t header[SHARD_HEADER_BYTES / 4] = {SHARD_MAGIC, SHARD_VERSION, 0};
    w->num_tokens = 0;
    newfile_open(&w->file, path);
    newfile_write(&w->file, header, 1, sizeof(header));
}

static inline void shard_writer_append(ShardWriter *w, const uint16_t *tokens, size_t n) {
    if (n > (size_t)(INT32_MAX - w->num_tokens)) {
        die("%s: a shard cannot hold more than %d tokens\n  ---> write several shards", w->file.path,
            INT32_MAX);
    }
    newfile_write(&w->file, tokens, sizeof(tokens[0]), n);
    w->num_tokens += (int64_t)n;
}

// the file gets its name here, once its header counts its tokens
static inline void shard_writer_close(ShardWriter *w) {
    int32_t count = (int32_t)w->num_tokens;
    if (fseek(w->file.file, 8, SEEK_SET) != 0) {
        newfile_fail(&w->file);
    }
    newfile_write(&w->file, &count, sizeof(count), 1);
    newfile_close(&w->file);
}

// ----------------------------------------------------------------------------
// reading a shard

typedef struct {
    char *path;
    const unsigned char *data; // the whole file
    size_t size;
    const uint16_t *tokens;
    int64_t num_tokens;
    int64_t first_window; // windows of the shards before it in its source
} TokenShard;

// says what a file is that is no shard, where that can be seen
static inline void shard_refuse_foreign(const char *path, const unsigned char *data, size_t size) {
    static const struct {
        const char *start;
        size_t size;
        const char *what;
    } formats[] = {
        {"\xA1\xD9\x34\x01", 4,
         "a llm.c shard of 32-bit tokens (LLaMA 3)\n  ---> tokenize the text with GPT-2's "
         "vocabulary, or one of your own"},
        {"\x28\xB5\x2F\xFD", 4, "compressed with zstd\n  ---> decompress it with zstd -d"},
        {"\x1F\x8B", 2, "compressed with gzip\n  ---> decompress it with gunzip"},
        {"\x93NUMPY", 6,
         "a NumPy array\n  ---> write a shard: 256 int32 {20240520, 1, count}, then uint16 tokens"},
        {"PAR1", 4, "a Parquet table\n  ---> tokenize its text first"},
        {"{", 1, "JSON text\n  ---> tokenize it first"},
    };
    for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if (size >= formats[i].size && memcmp(data, formats[i].start, formats[i].size) == 0) {
            die("%s is not a token shard: it is %s", path, formats[i].what);
        }
    }
}

// the number of tokens of a whole shard; anything else dies
static inline int64_t shard_check(const char *path, const unsigned char *data, size_t size) {
    int32_t header[3] = {0, 0, 0};
    memcpy(header, data, size < sizeof(header) ? size : sizeof(header));
    if (header[0] != SHARD_MAGIC) {
        shard_refuse_foreign(path, data, size);
        die("%s is not a token shard: it begins with %d, expected %d\n  ---> %s", path, header[0],
            SHARD_MAGIC, SHARD_HINT);
    }
    if (size < SHARD_HEADER_BYTES) {
        die("%s is truncated: %zu bytes, its header alone needs %d\n  ---> copy or make it again", path, size,
            SHARD_HEADER_BYTES);
    }
    if (header[1] != SHARD_VERSION) {
        die("%s is a token shard of version %d, expected %d\n  ---> tokenize the text again", path, header[1],
            SHARD_VERSION);
    }
    int64_t expected = SHARD_HEADER_BYTES + 2 * (int64_t)header[2];
    if ((int64_t)size != expected) {
        die("%s %s: its header counts %d tokens, %lld bytes, but the file has %zu\n  ---> copy or make it "
            "again",
            path, (int64_t)size < expected ? "is truncated" : "is damaged", header[2], (long long)expected,
            size);
    }
    return header[2];
}

static inline void shard_open(TokenShard *shard, const char *path) {
    struct stat status;
    int file = open(path, O_RDONLY | O_NONBLOCK); // so that a FIFO is refused, not waited for
    if (file < 0 || fstat(file, &status) != 0) {
        die_unopened(path, SHARD_HINT);
    }
    if (!S_ISREG(status.st_mode) || status.st_size == 0) {
        die("%s is %s\n  ---> %s", path, S_ISREG(status.st_mode) ? "empty" : "not a regular file",
            SHARD_HINT);
    }
    shard->size = (size_t)status.st_size;
    void *data = mmap(NULL, shard->size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) {
        die("cannot map %s into memory: %s", path, strerror(errno));
    }
    close(file);
    shard->data = (const unsigned char *)data;
    shard->num_tokens = shard_check(path, shard->data, shard->size);
    shard->tokens = (const uint16_t *)(shard->data + SHARD_HEADER_BYTES);
    shard->path = check_strdup(path);
}

static inline void shard_close(TokenShard *shard) {
    munmap((void *)shard->data, shard->size);
    free(shard->path);
}

// FNV-1a of the header and of the first and last 4 KB of tokens: what tells shards apart without reading them
static inline uint64_t shard_hash(const TokenShard *shard) {
    enum { END_BYTES = 4096 };
    size_t first =
        shard->size < SHARD_HEADER_BYTES + END_BYTES ? shard->size : SHARD_HEADER_BYTES + END_BYTES;
    size_t last = shard->size > END_BYTES ? shard->size - END_BYTES : 0;
    last = last > first ? last : first;
    uint64_t hash = fnv_add(FNV_START, shard->data, first);
    return fnv_add(hash, shard->data + last, shard->size - last);
}

#endif
