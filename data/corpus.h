/*
Documents out of files, one after another, in constant memory.

    FILE.jsonl   a JSON object a line: {"text": ..., "meta": {"pile_set_name": ...}}, as the Pile has it
    FILE.txt     plain text, cut into documents at <|endoftext|> and at the first blank line behind text_bytes
                 bytes (0: not there)
    FILE.zst     either of them, through `zstd -dc`
    -            JSON Lines from standard input

A record is what the file holds of a document, unparsed: reading is one thread's work, corpus_parse() any
thread's. A position (file, offset in its uncompressed bytes, line) can be returned to.

Shapes: none. Errors: a file that cannot be read ends the program, naming it; a record that is no document is
the caller's to count.
*/
#ifndef CORPUS_H
#define CORPUS_H

#include "llmc/check.h"
#include "llmc/files/json.h"
#include <ctype.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: tolower, open, stat, waitpid, read, lseek, pipe, fork, execlp

enum { CORPUS_DOMAIN_SIZE = 48, CORPUS_READ_SIZE = 1 << 20, CORPUS_LONGEST_TEXT = 64 };

#define CORPUS_SEPARATOR "<|endoftext|>"

typedef struct {
    int file;       // index into the paths
    int64_t offset; // of the next record, in uncompressed bytes
    int64_t line;   // of the next record, from 1 on
} CorpusPosition;

typedef struct {
    char *const *paths;
    int count;
    size_t text_bytes;       // of a .txt file's document, at least; 0: no cut at blank lines
    CorpusPosition position; // of the next record
    int fd;                  // where uncompressed bytes come from; -1 when no file is open
    int source;              // the compressed file, read by the decompressor; -1 when there is none
    pid_t decompressor;
    int ended;    // fd has no more
    char *buffer; // bytes read
    size_t start; // of the first byte of the next record
    size_t size;  // behind the last byte read
    size_t capacity;
    size_t scanned;   // bytes behind start known not to end a record
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

typedef struct {
    const char *text;
    size_t size;
    char domain[CORPUS_DOMAIN_SIZE]; // fit for a file name
} CorpusDocument;

// ----------------------------------------------------------------------------
// kinds of files

static inline int corpus_has_suffix(const char *path, const char *suffix) {
    size_t n = strlen(path), m = strlen(suffix);
    return n > m && strcmp(path + n - m, suffix) == 0;
}

static inline int corpus_is_compressed(const char *path) {
    return corpus_has_suffix(path, ".zst");
}

static inline int corpus_is_text(const char *path) {
    return corpus_has_suffix(path, ".txt") || corpus_has_suffix(path, ".txt.zst");
}

static inline int corpus_is_stdin(const char *path) {
    return strcmp(path, "-") == 0;
}

static inline void corpus_check_path(const char *path) {
    struct stat status;
    int json = corpus_has_suffix(path, ".jsonl") || corpus_has_suffix(path, ".jsonl.zst");
    if (!json && !corpus_is_text(path) && !corpus_is_stdin(path)) {
        die_usage("%s: unknown kind of file\n  ---> expected .jsonl, .txt, either with .zst behind, or - for "
                  "JSON Lines "
                  "from standard input",
                  path);
    }
    if (!corpus_is_stdin(path) && stat(path, &status) != 0) {
        die("cannot open %s: %s\n  ---> make sample, or one of data/download_*.sh", path, strerror(errno));
    }
}

// bytes on disk; 0 when unknown
static inline int64_t corpus_file_size(const char *path) {
    struct stat status;
    return !corpus_is_stdin(path) && stat(path, &status) == 0 && S_ISREG(status.st_mode) ? status.st_size : 0;
}

// ----------------------------------------------------------------------------
// opening and closing

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
        execlp("zstd", "zstd", "-dcq", (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    c->fd = ends[0];
}

static inline void corpus_open_file(Corpus *c) {
    const char *path = c->paths[c->position.file];
    int fd = corpus_is_stdin(path) ? dup(0) : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        die("cannot open %s: %s\n  ---> check its name and its permissions", path, strerror(errno));
    }
    c->fd = fd;
    c->ended = 0;
    c->start = 0;
    c->size = 0;
    c->scanned = 0;
    if (corpus_is_compressed(path)) {
        c->source = fd;
        corpus_start_decompressor(c, path);
    }
}

// hurried: the file was not read to its end, so that the decompressor's complaint means nothing
static inline void corpus_close_file(Corpus *c, int hurried) {
    const char *path = c->paths[c->position.file];
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
        die("%s: %s\n  ---> %s", path,
            missing ? "zstd is not installed" : "zstd -dc failed: the file is damaged or cut",
            missing ? "install zstd, or decompress the file by hand" : "fetch it again");
    }
}

static inline void corpus_init(Corpus *c, char *const *paths, int count, size_t text_bytes) {
    memset(c, 0, sizeof(*c));
    c->paths = paths;
    c->count = count;
    c->text_bytes = text_bytes;
    c->position.line = 1;
    c->fd = -1;
    c->source = -1;
    for (int i = 0; i < count; i++) {
        corpus_check_path(paths[i]);
    }
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
        die("cannot read %s: %s\n  ---> is it a file, and is the disk healthy?", c->paths[c->position.file],
            strerror(errno));
    }
    c->ended = got == 0;
    c->size += (size_t)got;
}

// bytes of text to the first blank line behind text_bytes, its newlines included; a text without one is cut
// at CORPUS_LONGEST_TEXT times that. 0: more must be read first
static inline size_t corpus_paragraph_end(const Corpus *c, const char *text, size_t size) {
    size_t longest = c->text_bytes * CORPUS_LONGEST_TEXT;
    size_t window = size < longest ? size : longest;
    const char *blank = NULL;
    if (window > c->text_bytes) {
        blank = (const char *)memmem(text + c->text_bytes, window - c->text_bytes, "\n\n", 2);
    }
    size_t end = blank != NULL ? (size_t)(blank - text) : window;
    while (end < size && text[end] == '\n') {
        end++;
    }
    if (end == size) {
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
    int plain = corpus_is_text(c->paths[c->position.file]);
    const char *separator = plain ? CORPUS_SEPARATOR : "\n";
    size_t length = strlen(separator);
    size_t end = plain && c->text_bytes > 0 ? corpus_paragraph_end(c, text, size) : size;
    const char *found = NULL;
    if (end > c->scanned) {
        found = (const char *)memmem(text + c->scanned, end - c->scanned, separator, length);
    }
    int complete = plain && c->text_bytes > 0 ? end > 0 : c->ended;
    if (found == NULL && !complete) {
        c->scanned = c->text_bytes == 0 && size > length ? size - length : 0;
        return 0;
    }
    *bytes = found != NULL ? (size_t)(found - text) : end;
    *skip = found != NULL ? length : 0;
    c->scanned = 0;
    return 1;
}

static inline void corpus_advance(Corpus *c, size_t bytes) {
    const char *p = c->buffer + c->start;
    const char *end = p + bytes;
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

static inline void corpus_next_file(Corpus *c) {
    corpus_close_file(c, 0);
    c->finished += corpus_file_size(c->paths[c->position.file]);
    c->position.file++;
    c->position.offset = 0;
    c->position.line = 1;
}

// 0 when all files have been read; blank records are passed over. The bytes stay until the next call
static inline int corpus_next(Corpus *c, CorpusRecord *record) {
    while (c->position.file < c->count) {
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
            corpus_advance(c, bytes + skip);
            if (!corpus_is_blank(record->bytes, bytes)) {
                return 1;
            }
        }
    }
    return 0;
}

// goes back to a position of an earlier run
static inline void corpus_seek(Corpus *c, CorpusPosition position) {
    c->finished = 0;
    for (int i = 0; i < position.file; i++) {
        c->finished += corpus_file_size(c->paths[i]);
    }
    c->position = position;
    if (position.file == c->count) {
        return;
    }
    corpus_open_file(c);
    if (c->source < 0 && lseek(c->fd, position.offset, SEEK_SET) == position.offset) {
        return;
    }
    int64_t left = position.offset;
    while (left > 0 && !c->ended) {
        corpus_fill(c);
        size_t use = (int64_t)c->size < left ? c->size : (size_t)left;
        left -= (int64_t)use;
        c->start = use;
    }
    if (left > 0) {
        die("%s is shorter than it was in the earlier run\n  ---> start again in another folder with --out",
            c->paths[position.file]);
    }
}

// fraction of the files' bytes on disk that have been read; negative when unknown
static inline double corpus_progress(const Corpus *c) {
    int64_t total = 0;
    for (int i = 0; i < c->count; i++) {
        int64_t size = corpus_file_size(c->paths[i]);
        total = size > 0 && total >= 0 ? total + size : -1;
    }
    int64_t current = c->source >= 0 ? (int64_t)lseek(c->source, 0, SEEK_CUR) : c->position.offset;
    return total > 0 ? (double)(c->finished + current) / (double)total : -1.0;
}

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

// ----------------------------------------------------------------------------
// parsing

// lower case, what is neither letter nor digit to one '_'
static inline void corpus_domain_name(char *domain, const char *name, size_t size) {
    size_t n = 0;
    for (size_t i = 0; i < size && n + 1 < CORPUS_DOMAIN_SIZE; i++) {
        int c = (unsigned char)name[i];
        if (c < 0x80 && isalnum(c)) {
            domain[n++] = (char)tolower(c);
        } else if (n > 0 && domain[n - 1] != '_') {
            domain[n++] = '_';
        }
    }
    while (n > 0 && domain[n - 1] == '_') {
        n--;
    }
    domain[n] = '\0';
    if (n == 0) {
        strcpy(domain, "unnamed");
    }
}

// the file's name up to its first dot
static inline void corpus_file_domain(char *domain, const char *path) {
    const char *slash = strrchr(path, '/');
    const char *name = slash != NULL ? slash + 1 : path;
    const char *stem = corpus_is_stdin(path) ? "stdin" : name;
    corpus_domain_name(domain, stem, strcspn(stem, "."));
}

// 1 and the document, which lives in the record and the arena; or 0 and the cause
static inline int corpus_parse(const Corpus *c, const CorpusRecord *record, JsonArena *arena,
                               CorpusDocument *document, char *error, size_t capacity) {
    const char *path = c->paths[record->file];
    if (corpus_is_text(path)) {
        document->text = record->bytes;
        document->size = record->size;
        corpus_file_domain(document->domain, path);
        return 1;
    }
    json_arena_reset(arena);
    char cause[256];
    const Json *root = json_parse(record->bytes, record->size, arena, cause, sizeof(cause));
    if (root == NULL) {
        snprintf(error, capacity, "%s", cause + strlen("line 1, ")); // the record's line is the file's
        return 0;
    }
    const Json *text = json_get(root, "text");
    if (text == NULL || text->type != JSON_STRING) {
        snprintf(error, capacity,
                 root->type != JSON_OBJECT ? "not an object"
                 : text == NULL            ? "no \"text\""
                                           : "\"text\" is not a string");
        return 0;
    }
    document->text = text->text;
    document->size = text->text_size;
    const Json *domain = json_get(json_get(root, "meta"), "pile_set_name");
    if (domain != NULL && domain->type == JSON_STRING) {
        corpus_domain_name(document->domain, domain->text, domain->text_size);
    } else {
        corpus_file_domain(document->domain, path);
    }
    return 1;
}

// ----------------------------------------------------------------------------
// what the command lines of data/ share

static inline int64_t corpus_integer(const char *name, const char *text, int64_t least, int64_t most) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || errno == ERANGE || value < least || value > most) {
        die_usage("--%s expects an integer from %lld to %lld, not '%s'", name, (long long)least,
                  (long long)most, text);
    }
    return value;
}

// as many threads as wanted (0: one a core), 1 without OpenMP
static inline int corpus_threads(int wanted) {
    int threads = 1;
    (void)wanted;
#ifdef _OPENMP
    if (wanted > 0) {
        omp_set_num_threads(wanted);
    }
    threads = omp_get_max_threads();
#endif
    return threads;
}

// with the folders above it
static inline void corpus_make_folder(const char *dir) {
    char path[4096];
    check_format(path, sizeof(path), "%s/", dir);
    for (char *p = path + 1; *p != '\0'; p++) {
        if (*p == '/') {
            *p = '\0';
            mkdir(path, 0777); // access() below tells what came of it
            *p = '/';
        }
    }
    if (access(dir, W_OK | X_OK) != 0) {
        die("cannot write in the folder %s: %s\n  ---> choose another one with --out", dir, strerror(errno));
    }
}

// of the bytes alone: the same on every machine
static inline uint64_t corpus_hash(const char *text, size_t size) {
    uint64_t h = size + 0x9E3779B97F4A7C15ull;
    uint64_t word;
    size_t at = 0;
    for (; at + 8 <= size; at += 8) {
        memcpy(&word, text + at, 8);
        h = (h ^ word) * 0xD6E8FEB86659FD93ull;
        h ^= h >> 32;
    }
    for (word = 0; at < size; at++) {
        word = word << 8 | (uint8_t)text[at];
    }
    h = (h ^ word) * 0xD6E8FEB86659FD93ull;
    h = (h ^ h >> 32) * 0x9E3779B97F4A7C15ull;
    return h ^ h >> 32;
}

#endif
