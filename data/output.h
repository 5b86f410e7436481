/*
What build/tokenize writes, so that it can be killed at any moment and goes on where it was.

A shard is NAME.partial until it is full or the input ends. Every few seconds what was written is made
durable, and then tokenize.state.json (state.h) says how far it goes. After a crash the partial files are cut
to the sizes that stand there; the result is the same as without the crash.
    train_000000.bin, ...          training shards, all domains in the order of the input
    train_DOMAIN.000000.bin, ...   the same per domain (--split-domains)
    val.DOMAIN.bin                 a domain's validation shard
    unreadable.txt                 the records that are no documents

A document goes to validation if its text's hash says so: copies of a text stay on one side. A domain whose
first document went to training gives the next one that is different, and the copies of it: where there are
two, one is validated.

Shards: 256 int32 {20240520, 1, number of tokens, 0...}, then uint16 tokens. Errors: exit 1.
*/
#ifndef OUTPUT_H
#define OUTPUT_H

#include "data/inputs.h"
#include "llmc/files/shard.h"
#include "llmc/files/newfile.h"

enum {
    MAX_DOMAINS = 256,
    LISTED_UNREADABLE = 10,
    OUTPUT_PATH_SIZE = 4096,
    OUTPUT_NAME_SIZE = 80,
    OUTPUT_PREFIX_SIZE = 64
};

#define OUTPUT_MOST (1ll << 53) // of anything that is counted

typedef struct {
    char name[OUTPUT_NAME_SIZE]; // in the output folder
    FILE *file;                  // NULL when not open
    int64_t tokens;
} Shard;

// training shards one after another, all full but the last
typedef struct {
    char prefix[OUTPUT_PREFIX_SIZE]; // of their names
    int64_t finished;                // shards that are full, or the last
    int64_t renamed;                 // of them, those that have their final names
    Shard shard;                     // the one being filled
} Series;

typedef struct {
    char name[DOMAIN_SIZE];
    int64_t documents, bytes, train_tokens, val_tokens;
    int64_t first_hash;  // of the first document
    int64_t chosen_hash; // of the one that went to validation for want of another; 0: none
    Shard val;
    Series train; // with --split-domains
} Domain;

typedef struct {
    const char *dir;
    int64_t shard_tokens;
    double val_fraction;
    int split_domains;
    const char *job; // what the output depends on, the bytes of the inputs apart; a restart must agree
    Series train;    // without --split-domains
    Domain domains[MAX_DOMAINS];
    int domain_count;
    int64_t documents, tokens, bytes; // bytes of text
    int64_t unreadable, unreadable_bytes;
    FILE *unreadable_file;
    int unnamed;  // there are full shards without their final names
    int complete; // all input is in the partial files
} Output;

// ----------------------------------------------------------------------------
// shards

static inline void output_path(const Output *out, char *path, const char *name, const char *suffix) {
    check_format(path, OUTPUT_PATH_SIZE, "%s/%s%s", out->dir, name, suffix);
}

__attribute__((noreturn)) static inline void output_write_failed(const Output *out, const char *name) {
    die("cannot write %s/%s.partial: %s\n  ---> free some disk space and give the same command: it goes on "
        "where it was",
        out->dir, name, strerror(errno));
}

// opens NAME.partial cut to `size` bytes, ready to append
static inline FILE *output_open_partial(const Output *out, const char *name, int64_t size) {
    char path[OUTPUT_PATH_SIZE];
    output_path(out, path, name, ".partial");
    FILE *file =
        check_fopen(path, size > 0 ? "r+b" : "w+b", "give the command with another --out to start again");
    if (fseek(file, 0, SEEK_END) != 0 || ftell(file) < size) {
        die("%s is shorter than tokenize.state.json says\n  ---> rm -r %s, and start again", path, out->dir);
    }
    if ((size > 0 && ftruncate(fileno(file), size) != 0) || fseek(file, 0, SEEK_END) != 0) {
        die("cannot cut %s to its last known good size: %s\n  ---> check its permissions", path,
            strerror(errno));
    }
    return file;
}

static inline void shard_open_partial(const Output *out, Shard *shard) {
    const int32_t header[SHARD_HEADER_BYTES / 4] = {0};
    int64_t size = shard->tokens > 0 ? SHARD_HEADER_BYTES + 2 * shard->tokens : 0;
    shard->file = output_open_partial(out, shard->name, size);
    if (shard->tokens == 0 && fwrite(header, sizeof(header), 1, shard->file) != 1) {
        output_write_failed(out, shard->name);
    }
}

static inline void output_sync_file(const Output *out, FILE *file, const char *name) {
    if (file != NULL && (fflush(file) != 0 || fsync(fileno(file)) != 0)) {
        output_write_failed(out, name);
    }
}

// the header, which knows the number of tokens only now
static inline void shard_finish(const Output *out, Shard *shard) {
    int32_t header[SHARD_HEADER_BYTES / 4] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)shard->tokens};
    if (fseek(shard->file, 0, SEEK_SET) != 0 || fwrite(header, sizeof(header), 1, shard->file) != 1) {
        output_write_failed(out, shard->name);
    }
    output_sync_file(out, shard->file, shard->name);
    fclose(shard->file);
    shard->file = NULL;
}

static inline void shard_append(const Output *out, Shard *shard, const uint16_t *tokens, size_t n) {
    if (n > (size_t)(INT32_MAX - shard->tokens)) {
        die("%s/%s would hold more than %d tokens, the most that a shard counts\n  ---> rm -r %s, and start "
            "again with a smaller --val-fraction",
            out->dir, shard->name, INT32_MAX, out->dir);
    }
    if (shard->file == NULL) {
        shard_open_partial(out, shard);
    }
    if (fwrite(tokens, sizeof(uint16_t), n, shard->file) != n) {
        output_write_failed(out, shard->name);
    }
    shard->tokens += (int64_t)n;
}

// renames what the state calls finished; done again after a crash, so a missing file is no error
static inline void output_rename(const Output *out, const char *name) {
    char partial[OUTPUT_PATH_SIZE], path[OUTPUT_PATH_SIZE];
    output_path(out, partial, name, ".partial");
    output_path(out, path, name, "");
    if (rename(partial, path) != 0 && (errno != ENOENT || access(path, F_OK) != 0)) {
        die("cannot rename %s: %s\n  ---> check the folder's permissions", partial, strerror(errno));
    }
}

// ----------------------------------------------------------------------------
// series of training shards

static inline void series_name(const Series *series, int64_t index, char *name) {
    check_format(name, OUTPUT_NAME_SIZE, "%s%06lld.bin", series->prefix, (long long)index);
}

// as it stands after so many tokens
static inline void series_resume(const Output *out, Series *series, int64_t tokens) {
    series->finished = tokens / out->shard_tokens;
    series->shard.tokens = tokens % out->shard_tokens;
    if (out->complete && series->shard.tokens > 0) {
        series->finished++;
        series->shard.tokens = 0;
    }
    series_name(series, series->finished, series->shard.name);
}

static inline void series_finish_shard(Output *out, Series *series) {
    shard_finish(out, &series->shard);
    series->finished++;
    series->shard.tokens = 0;
    series_name(series, series->finished, series->shard.name);
    out->unnamed = 1;
}

static inline void series_append(Output *out, Series *series, const uint16_t *tokens, size_t n) {
    while (n > 0) {
        int64_t room = out->shard_tokens - series->shard.tokens;
        size_t use = (int64_t)n < room ? n : (size_t)room;
        shard_append(out, &series->shard, tokens, use);
        tokens += use;
        n -= use;
        if (series->shard.tokens == out->shard_tokens) {
            series_finish_shard(out, series);
        }
    }
}

static inline void series_rename(const Output *out, Series *series) {
    char name[OUTPUT_NAME_SIZE];
    for (; series->renamed < series->finished; series->renamed++) {
        series_name(series, series->renamed, name);
        output_rename(out, name);
    }
}

// ----------------------------------------------------------------------------
// domains

// the series of the output, one after another; NULL behind the last
static inline Series *output_series(Output *out, int index) {
    if (!out->split_domains) {
        return index == 0 ? &out->train : NULL;
    }
    return index < out->domain_count ? &out->domains[index].train : NULL;
}

static inline Domain *output_domain(Output *out, const char *name) {
    for (int i = 0; i < out->domain_count; i++) {
        if (strcmp(out->domains[i].name, name) == 0) {
            return &out->domains[i];
        }
    }
    if (out->domain_count == MAX_DOMAINS) {
        die("more than %d domains, the last one '%s'\n  ---> files that belong together are one domain if "
            "their "
            "folder is named in their place; in JSON Lines, is meta.pile_set_name a domain?",
            MAX_DOMAINS, name);
    }
    Domain *domain = &out->domains[out->domain_count++];
    memset(domain, 0, sizeof(*domain));
    check_format(domain->name, sizeof(domain->name), "%s", name);
    check_format(domain->val.name, sizeof(domain->val.name), "val.%s.bin", name);
    check_format(domain->train.prefix, sizeof(domain->train.prefix), "train_%s.", name);
    series_resume(out, &domain->train, 0);
    return domain;
}

// hash: of the document's text; by_hash: what it alone says
static inline int domain_validates(const Output *out, Domain *domain, int64_t hash, int by_hash) {
    if (domain->documents == 0) {
        domain->first_hash = hash;
    } else if (out->val_fraction > 0.0 && domain->val_tokens == 0 && hash != domain->first_hash && !by_hash) {
        domain->chosen_hash = hash;
    }
    return by_hash || (domain->chosen_hash != 0 && hash == domain->chosen_hash);
}

static inline void output_document(Output *out, const char *name, size_t text_size, int64_t hash, int by_hash,
                                   const uint16_t *tokens, size_t n) {
    Domain *domain = output_domain(out, name);
    int validates = domain_validates(out, domain, hash, by_hash);
    domain->documents++;
    domain->bytes += (int64_t)text_size;
    out->documents++;
    out->bytes += (int64_t)text_size;
    out->tokens += (int64_t)n;
    if (validates) {
        domain->val_tokens += (int64_t)n;
        shard_append(out, &domain->val, tokens, n);
    } else {
        domain->train_tokens += (int64_t)n;
        series_append(out, out->split_domains ? &domain->train : &out->train, tokens, n);
    }
}

static inline void output_unreadable(Output *out, const char *path, int64_t line, const char *error) {
    int n = fprintf(out->unreadable_file, "%s:%lld: %s\n", path, (long long)line, error);
    if (n < 0) {
        output_write_failed(out, "unreadable.txt");
    }
    if (out->unreadable < LISTED_UNREADABLE) {
        warn("%s, line %lld is no document: %s", path, (long long)line, error);
    }
    out->unreadable++;
    out->unreadable_bytes += n;
}

static inline int64_t output_train_tokens(const Output *out) {
    int64_t n = 0;
    for (int i = 0; i < out->domain_count; i++) {
        n += out->domains[i].train_tokens;
    }
    return n;
}

// ----------------------------------------------------------------------------
// all of it

static inline void output_init(Output *out) {
    check_format(out->train.prefix, sizeof(out->train.prefix), "train_");
    series_resume(out, &out->train, 0);
}

// the partial files as the state (or the start) has them
static inline void output_open(Output *out) {
    Series *series;
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        series_rename(out, series);
        if (series->shard.tokens > 0) {
            shard_open_partial(out, &series->shard);
        }
    }
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val.tokens > 0) {
            shard_open_partial(out, &out->domains[i].val);
        }
    }
    out->unreadable_file = output_open_partial(out, "unreadable.txt", out->unreadable_bytes);
}

// what is in the partial files, on the disk
static inline void output_sync(Output *out) {
    char folder[OUTPUT_PATH_SIZE];
    Series *series;
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        output_sync_file(out, series->shard.file, series->shard.name);
    }
    for (int i = 0; i < out->domain_count; i++) {
        output_sync_file(out, out->domains[i].val.file, out->domains[i].val.name);
    }
    output_sync_file(out, out->unreadable_file, "unreadable.txt");
    output_path(out, folder, "", "");
    newfile_sync_folder(folder);
}

// the input has ended: headers, and the last shards
static inline void output_complete(Output *out) {
    Series *series;
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        if (series->shard.tokens > 0) {
            series_finish_shard(out, series);
        }
    }
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val.file != NULL) {
            shard_finish(out, &out->domains[i].val);
        }
    }
    out->complete = 1;
}

#endif
