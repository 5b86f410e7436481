/*
Records out of files, one after another, in constant memory.

A record is what a file holds of a document, unparsed: reading is one thread's work, parsing (document.h)
any thread's.
    JSON Lines   a line
    text         what stands between <|endoftext|>, cut at the first blank line behind text_bytes bytes (0:
                 not there). A blank line may end in carriage returns, as on Windows
Compressed files come through `zstd -dc`. A byte order mark of UTF-8 is no part of a file's first record, nor
of any line. Records of white space alone are passed over.

A position (file, offset in its uncompressed bytes, line) can be returned to. With it goes a digest of all
that was read up to there, names included: whether the input is still the same is seen by reading it again,
and where no file was touched since (inputs_identity), taken for granted.

Shapes: none. Errors: a file that cannot be read, or is not what it was, ends the program, naming it.
*/
#ifndef CORPUS_H
#define CORPUS_H

#include "data/hash.h"
#include "data/inputs.h"
#include "llmc/check.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
// defines: open, stat, waitpid, read, lseek, pipe, fork, execlp

enum { CORPUS_READ_SIZE = 1 << 20, CORPUS_LONGEST_TEXT = 64 };

#define CORPUS_SEPARATOR "<|endoftext|>"
#define CORPUS_BYTE_ORDER_MARK "\xEF\xBB\xBF"

typedef struct {
    int file;       // index into the inputs
    int64_t offset; // of the next record, in uncompressed bytes
    int64_t line;   // of the next record, from 1 on
    Digest digest;  // of the names and bytes before it
} CorpusPosition;

typedef struct {
    const Inputs *inputs;
    size_t text_bytes;       // of a text's document, at least; 0: no cut at blank lines
    CorpusPosition position; // of the next record
    int fd;                  // where uncompressed bytes come from; -1 when no file is open
    int source;              // the compressed file, read by the decompressor; -1 when there is none
    pid_t decompressor;
    int ended;    // fd has no more
    char *buffer; // bytes read
    size_t start; // of the first byte of the next record
    size_t size;  // behind the last byte read
    size_t capacity;
    size_t scanned;   // bytes behind start in which no separator, or no blank line, begins
    int64_t finished; // bytes of the files before this one, as they are on disk
} Corpus;

typedef struct {
    const char *bytes;
    size_t size;
    int file;
    int64_t line;
} CorpusRecord;

// many records, with bytes of their own
typedef struct {
    CorpusRecord *records;
    size_t n, records_capacity;
    char *bytes;
    size_t size, capacity;
    CorpusPosition end; // of the next record
    double progress;    // fraction of the input read, negative when unknown
} CorpusBatch;

static inline const Input *corpus_input(const Corpus *c) {
    return &c->inputs->files[c->position.file];
}

// ----------------------------------------------------------------------------
// opening and closing

// --long=31 allows windows of up to 2 GiB: zstd's own limit is 128 MiB
static inline void corpus_start_decompressor(Corpus *c, const char *path) {
    int ends[2];
    if (pipe(ends) != 0) {
        die("cannot make a pipe to zstd: %s", strerror(errno));
    }
    c->decompressor = fork();
    if (c->decompressor < 0) {
        die("cannot start zstd for %s: %s", path, strerror(errno));
    }
    if (c->decompressor == 0) {
        dup2(c->source, 0);
        dup2(ends[1], 1);
        close(c->source);
        close(ends[0]);
        close(ends[1]);
        execlp("zstd", "zstd", "-dcq", "--long=31", (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    c->fd = ends[0];
}

static inline void corpus_open_file(Corpus *c) {
    const Input *input = corpus_input(c);
    int fd = input_is_stdin(input) ? dup(0) : open(input->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        input_cannot_open(input->path, "it was there at the start");
    }
    c->fd = fd;
    c->ended = 0;
    c->start = 0;
    c->size = 0;
    c->scanned = 0;
    if (input->compressed) {
        c->source = fd;
        corpus_start_decompressor(c, input->path);
    }
}

// hurried: the file was not read to its end, so that the decompressor's complaint means nothing
static inline void corpus_close_file(Corpus *c, int hurried) {
    close(c->fd);
    c->fd = -1;
    if (c->source < 0) {
        return;
    }
    close(c->source);
    c->source = -1;
    int status = 0;
    waitpid(c->decompressor, &status, 0);
    if (!hurried && (!WIFEXITED(status) || WEXITSTATUS(status) != 0)) {
        int missing = WIFEXITED(status) && WEXITSTATUS(status) == 127;
        die("%s: %s\n  ---> %s", corpus_input(c)->path,
            missing ? "zstd is not installed" : "zstd -dc failed: the file is damaged or cut",
            missing ? "install zstd, or decompress the file by hand"
                    : "fetch it again, and give the same command: it goes on where it was");
    }
}

static inline void corpus_init(Corpus *c, const Inputs *inputs, size_t text_bytes) {
    memset(c, 0, sizeof(*c));
    c->inputs = inputs;
    c->text_bytes = text_bytes;
    c->position.line = 1;
    c->fd = -1;
    c->source = -1;
}

static inline void corpus_free(Corpus *c) {
    if (c->fd >= 0) {
        corpus_close_file(c, 1);
    }
    free(c->buffer);
}

// ----------------------------------------------------------------------------
// reading

static inline void corpus_fill(Corpus *c) {
    if (c->start > 0) {
        memmove(c->buffer, c->buffer + c->start, c->size - c->start);
        c->size -= c->start;
        c->start = 0;
    }
    if (c->capacity - c->size < CORPUS_READ_SIZE) {
        c->capacity = 2 * c->size + 2 * CORPUS_READ_SIZE;
        c->buffer = GROW(char, c->buffer, c->capacity);
    }
    ssize_t got;
    do {
        got = read(c->fd, c->buffer + c->size, CORPUS_READ_SIZE);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        die("cannot read %s: %s\n  ---> is it a file, and is the disk healthy?", corpus_input(c)->path,
            strerror(errno));
    }
    c->ended = got == 0;
    c->size += (size_t)got;
}

// the first of two newlines with at most a carriage return between them, or NULL
static inline const char *corpus_find_blank_line(const char *text, size_t size) {
    const char *end = text + size;
    for (const char *p = text; (p = (const char *)memchr(p, '\n', (size_t)(end - p))) != NULL; p++) {
        const char *next = p + 1;
        next += next < end && *next == '\r';
        if (next < end && *next == '\n') {
            return p;
        }
    }
    return NULL;
}

static inline size_t corpus_skip_newlines(const char *text, size_t at, size_t size) {
    for (;;) {
        size_t next = at + (at + 1 < size && text[at] == '\r');
        if (next == size || text[next] != '\n') {
            return at;
        }
        at = next + 1;
    }
}

// bytes of text to the first blank line behind text_bytes, its newlines included; a text without one is cut
// at CORPUS_LONGEST_TEXT times that. 0: more must be read first
static inline size_t corpus_paragraph_end(Corpus *c, const char *text, size_t size) {
    size_t longest = c->text_bytes * CORPUS_LONGEST_TEXT;
    size_t window = size < longest ? size : longest;
    size_t from = c->scanned > c->text_bytes ? c->scanned : c->text_bytes;
    const char *blank = from < window ? corpus_find_blank_line(text + from, window - from) : NULL;
    size_t end = blank != NULL ? (size_t)(blank - text) : window;
    c->scanned = blank != NULL ? end : window < 2 ? 0 : window - 2; // perhaps it begins in the last two
    end = corpus_skip_newlines(text, end, size);
    if (end == size || (end + 1 == size && text[end] == '\r')) {
        return c->ended ? size : 0; // perhaps the blank line or its newlines go on
    }
    while (blank == NULL && end > 1 && (text[end] & 0xC0) == 0x80) {
        end--; // not within a character
    }
    return end;
}

// bytes of the record at the buffer's start and, in *skip, of what separates it from the next; 0: read more
static inline int corpus_cut(Corpus *c, size_t *bytes, size_t *skip) {
    const char *text = c->buffer + c->start;
    size_t size = c->size - c->start;
    int plain = corpus_input(c)->kind == INPUT_TEXT;
    int paragraphs = plain && c->text_bytes > 0;
    const char *separator = plain ? CORPUS_SEPARATOR : "\n";
    size_t length = strlen(separator);
    size_t end = paragraphs ? corpus_paragraph_end(c, text, size) : size;
    size_t from = paragraphs ? 0 : c->scanned;
    if (end == 0) {
        return 0;
    }
    const char *found = (const char *)memmem(text + from, end - from, separator, length);
    if (found == NULL && !paragraphs && !c->ended) {
        c->scanned = size >= length ? size - length + 1 : 0;
        return 0;
    }
    *bytes = found != NULL ? (size_t)(found - text) : end;
    *skip = found != NULL ? length : 0;
    c->scanned = 0;
    return 1;
}

// a file's name goes into the digest with its first byte
static inline void corpus_advance(Corpus *c, size_t bytes) {
    const char *p = c->buffer + c->start;
    const char *end = p + bytes;
    if (c->position.offset == 0 && bytes > 0) {
        digest_add(&c->position.digest, corpus_input(c)->path, strlen(corpus_input(c)->path) + 1);
    }
    digest_add(&c->position.digest, p, bytes);
    while ((p = (const char *)memchr(p, '\n', (size_t)(end - p))) != NULL) {
        c->position.line++;
        p++;
    }
    c->start += bytes;
    c->position.offset += (int64_t)bytes;
}

static inline int corpus_is_blank(const char *text, size_t size) {
    size_t i = 0;
    while (i < size && (text[i] == '\n' || text[i] == '\r' || text[i] == ' ' || text[i] == '\t')) {
        i++;
    }
    return i == size;
}

// a text's first record, and every line of JSON Lines (for files may be joined), without byte order mark
static inline void corpus_drop_mark(const Corpus *c, CorpusRecord *record) {
    size_t length = strlen(CORPUS_BYTE_ORDER_MARK);
    int first = c->position.offset == 0;
    if (first && record->size >= 2 &&
        (memcmp(record->bytes, "\xFF\xFE", 2) == 0 || memcmp(record->bytes, "\xFE\xFF", 2) == 0)) {
        die("%s is UTF-16\n  ---> iconv -f UTF-16 -t UTF-8 makes text of it that is read here",
            corpus_input(c)->path);
    }
    if ((first || corpus_input(c)->kind == INPUT_JSON_LINES) && record->size >= length &&
        memcmp(record->bytes, CORPUS_BYTE_ORDER_MARK, length) == 0) {
        record->bytes += length;
        record->size -= length;
    }
}

static inline void corpus_next_file(Corpus *c) {
    corpus_close_file(c, 0);
    c->finished += corpus_input(c)->size;
    c->position.file++;
    c->position.offset = 0;
    c->position.line = 1;
}

// 0 when all files have been read; blank records are passed over. The bytes stay until the next call
static inline int corpus_next(Corpus *c, CorpusRecord *record) {
    while (c->position.file < c->inputs->count) {
        size_t bytes, skip;
        if (c->fd < 0) {
            corpus_open_file(c);
        }
        if (c->start == c->size && c->ended) {
            corpus_next_file(c);
        } else if (c->start == c->size || !corpus_cut(c, &bytes, &skip)) {
            corpus_fill(c);
        } else {
            record->bytes = c->buffer + c->start;
            record->size = bytes;
            record->file = c->position.file;
            record->line = c->position.line;
            corpus_drop_mark(c, record);
            corpus_advance(c, bytes + skip);
            if (!corpus_is_blank(record->bytes, record->size)) {
                return 1;
            }
        }
    }
    return 0;
}

// ----------------------------------------------------------------------------
// going back to a position of an earlier run

__attribute__((noreturn)) static inline void corpus_changed(const char *path, const char *how) {
    die("%s %s\n  ---> rm -r the folder of the shards, or choose another --out, and start again", path, how);
}

// reads on in the file that is open, up to an offset (negative: to its end)
static inline void corpus_read_to(Corpus *c, int64_t offset) {
    while (offset < 0 || c->position.offset < offset) {
        size_t size = c->size - c->start;
        int64_t left = offset - c->position.offset;
        if (size > 0) {
            corpus_advance(c, offset < 0 || left > (int64_t)size ? size : (size_t)left);
        } else if (!c->ended) {
            corpus_fill(c);
        } else if (offset < 0) {
            return;
        } else {
            corpus_changed(corpus_input(c)->path, "is shorter than it was in the earlier run");
        }
    }
}

// the files before the one of that index, into the digest
static inline void corpus_read_files(Corpus *c, int end) {
    while (c->position.file < end) {
        corpus_open_file(c);
        corpus_read_to(c, -1);
        corpus_next_file(c);
    }
}

// reads all again that the earlier run read: it must be the same
static inline void corpus_verify(Corpus *c, const CorpusPosition *target) {
    corpus_read_files(c, target->file);
    if (target->file < c->inputs->count) {
        corpus_open_file(c);
        corpus_read_to(c, target->offset);
    }
    if (!digest_equal(&c->position.digest, &target->digest) || c->position.line != target->line) {
        int last = target->file < c->inputs->count ? target->file : c->inputs->count - 1;
        corpus_changed(c->inputs->files[last].path, "or a file before it is another than in the earlier run");
    }
}

// trusted: no file before the position was touched since
static inline void corpus_seek(Corpus *c, const CorpusPosition *target, int trusted) {
    int ended = target->file >= c->inputs->count;
    if (!trusted || (!ended && input_is_stdin(&c->inputs->files[target->file]))) {
        corpus_verify(c, target);
        return;
    }
    for (int i = 0; i < target->file; i++) {
        c->finished += c->inputs->files[i].size;
    }
    c->position.file = target->file;
    if (!ended) {
        struct stat status;
        corpus_open_file(c);
        int seekable = c->source < 0 && fstat(c->fd, &status) == 0 && S_ISREG(status.st_mode);
        if (!seekable || target->offset > (int64_t)status.st_size ||
            lseek(c->fd, (off_t)target->offset, SEEK_SET) != (off_t)target->offset) {
            corpus_read_to(c, target->offset);
        }
    }
    c->position = *target;
}

// fraction of the files' bytes on disk that have been read; negative when unknown
static inline double corpus_progress(const Corpus *c) {
    int64_t current = c->source >= 0 ? (int64_t)lseek(c->source, 0, SEEK_CUR) : c->position.offset;
    return c->inputs->size > 0 ? (double)(c->finished + current) / (double)c->inputs->size : -1.0;
}

// ----------------------------------------------------------------------------
// batches

// records of about `bytes` together; 0 when there are no more
static inline int corpus_read_batch(Corpus *c, CorpusBatch *batch, size_t bytes) {
    CorpusRecord record;
    batch->size = 0;
    batch->n = 0;
    while (batch->size < bytes && corpus_next(c, &record)) {
        if (batch->size + record.size > batch->capacity) {
            batch->capacity = batch->size + record.size + bytes;
            batch->bytes = GROW(char, batch->bytes, batch->capacity);
        }
        if (batch->n == batch->records_capacity) {
            batch->records_capacity = 2 * batch->n + 1024;
            batch->records = GROW(CorpusRecord, batch->records, batch->records_capacity);
        }
        memcpy(batch->bytes + batch->size, record.bytes, record.size);
        batch->size += record.size;
        batch->records[batch->n++] = record;
    }
    size_t at = 0;
    for (size_t i = 0; i < batch->n; i++) { // only now, for the bytes may have moved
        batch->records[i].bytes = batch->bytes + at;
        at += batch->records[i].size;
    }
    batch->end = c->position;
    batch->progress = corpus_progress(c);
    return batch->n > 0;
}

static inline void corpus_free_batch(CorpusBatch *batch) {
    free(batch->records);
    free(batch->bytes);
}

#endif
