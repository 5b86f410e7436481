/*
Token shards and the order in which they are read. A shard is llm.c's: 256 int32 {20240520, 1, ntok, 0, ...},
then ntok uint16 tokens; the files are mapped, not read.

A shard of ntok tokens has floor((ntok - 1) / T) windows; window w is tokens [w T, w T + T]: T inputs, and the
T targets one token later. Sequence i is a pure function of (files, T, seed, i): a position in the data is one
integer, and ranks need no state.
    i -> source     weighted sources take turns: after any n sequences, source s was used n w_s times, +- 1
    use u of it     epoch = u / windows, j = u % windows
    j -> window     a seeded permutation of [0, windows), another each epoch (--shuffle 0: j itself)
so within an epoch of a source no window is repeated or skipped.

Shapes: inputs, targets [T]. Errors: a file that is no whole shard, too few tokens for one window, or a token
that the vocabulary does not have, dies naming file, position and remedy.
*/
#ifndef DATALOADER_H
#define DATALOADER_H

#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: open, glob, llround, mmap, munmap, fstat, close
#include "llmc/check.h"
#include "llmc/files/newfile.h"
#include "llmc/rng.h"

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_BYTES 1024
#define DATALOADER_HINT "make sample-data, or name your own shards with --train-data and --val-data"

static inline char *dataloader_copy(const char *text) {
    size_t size = strlen(text) + 1;
    return (char *)memcpy(GROW(char, NULL, size), text, size);
}

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
            SHARD_MAGIC, DATALOADER_HINT);
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
    int file = open(path, O_RDONLY);
    if (file < 0 || fstat(file, &status) != 0) {
        die("cannot open %s: %s\n  ---> %s", path, strerror(errno), DATALOADER_HINT);
    }
    if (!S_ISREG(status.st_mode) || status.st_size == 0) {
        die("%s is %s\n  ---> %s", path, S_ISREG(status.st_mode) ? "empty" : "not a regular file",
            DATALOADER_HINT);
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
    shard->path = dataloader_copy(path);
}

static inline void shard_close(TokenShard *shard) {
    munmap((void *)shard->data, shard->size);
    free(shard->path);
}

// ----------------------------------------------------------------------------
// the loader

#define MIX_PERIOD 10000 // weights are rounded to multiples of 1 / MIX_PERIOD

typedef struct {
    TokenShard *shards;
    int num_shards;
    int64_t num_tokens;
    int64_t num_windows;
    double weight; // as given
    int64_t share; // uses in a period of MIX_PERIOD sequences
    char *pattern;
} DataSource;

typedef struct {
    DataSource *sources;
    int num_sources;
    int seq_len;
    uint64_t seed;
    int shuffle;
    int *mix_source;   // [MIX_PERIOD] which source a sequence of the period takes
    int64_t *mix_used; // [MIX_PERIOD] how often the period has used that source before
} DataLoader;

static inline void dataloader_glob(const char *pattern, glob_t *found) {
    int failed = glob(pattern, 0, NULL, found); // sorted by name
    if (failed) {
        die("no file matches %s\n  ---> %s", pattern, DATALOADER_HINT);
    }
}

// the next item of a comma-separated list, or NULL; cuts the list up
static inline char *dataloader_next_item(char **list) {
    char *item = *list;
    if (item == NULL) {
        return NULL;
    }
    item += strspn(item, " ");
    char *comma = strchr(item, ',');
    *list = comma == NULL ? NULL : comma + 1;
    if (comma != NULL) {
        *comma = '\0';
    }
    if (item[0] == '\0') {
        die_usage("an empty name in a list of data files, expected GLOB or GLOB:WEIGHT, ...");
    }
    return item;
}

// "a*.bin:0.7": cuts the weight off; 0 when there is none
static inline double dataloader_cut_weight(char *item) {
    char *colon = strrchr(item, ':');
    char *end = NULL;
    double weight = colon == NULL ? 0.0 : strtod(colon + 1, &end);
    if (colon == NULL || end == colon + 1 || *end != '\0') {
        return 0.0; // a name with a colon in it
    }
    if (!(weight > 0.0 && weight < 1e30)) {
        die_usage("the weight of %s must be positive, as in \"a*.bin:0.7,b*.bin:0.3\"", item);
    }
    *colon = '\0';
    return weight;
}

static inline void dataloader_add_files(DataSource *source, const char *pattern, int seq_len) {
    glob_t found;
    dataloader_glob(pattern, &found);
    source->shards = GROW(TokenShard, source->shards, source->num_shards + (int)found.gl_pathc);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        TokenShard *shard = &source->shards[source->num_shards++];
        shard_open(shard, found.gl_pathv[i]);
        shard->first_window = source->num_windows;
        source->num_tokens += shard->num_tokens;
        source->num_windows += shard->num_tokens > 0 ? (shard->num_tokens - 1) / seq_len : 0;
    }
    globfree(&found);
}

// weighted globs are a source each, globs without weights are one source together
static inline void dataloader_add_sources(DataLoader *loader, const char *spec) {
    char *copy = dataloader_copy(spec), *list = copy, *item;
    while ((item = dataloader_next_item(&list)) != NULL) {
        double weight = dataloader_cut_weight(item);
        if (loader->num_sources > 0 && (weight > 0.0) != (loader->sources[0].weight > 0.0)) {
            die_usage("%s: give each of the globs a weight, or none of them", spec);
        }
        if (loader->num_sources == 0 || weight > 0.0) {
            loader->sources = GROW(DataSource, loader->sources, loader->num_sources + 1);
            DataSource *source = &loader->sources[loader->num_sources++];
            memset(source, 0, sizeof(*source));
            source->weight = weight;
            source->pattern = dataloader_copy(weight > 0.0 ? item : spec);
        }
        dataloader_add_files(&loader->sources[loader->num_sources - 1], item, loader->seq_len);
    }
    free(copy);
}

static inline void dataloader_set_shares(DataLoader *loader) {
    double total = 0.0, before = 0.0;
    for (int s = 0; s < loader->num_sources; s++) {
        total += loader->sources[s].weight;
    }
    for (int s = 0; s < loader->num_sources; s++) {
        DataSource *source = &loader->sources[s];
        double after = before + source->weight;
        // rounding the running sums makes the shares add up
        source->share = total == 0.0
                            ? MIX_PERIOD
                            : llround(MIX_PERIOD * after / total) - llround(MIX_PERIOD * before / total);
        if (source->share < 1) {
            die_usage("the weight of %s is less than 1/%d of all", source->pattern, MIX_PERIOD);
        }
        before = after;
    }
}

// Who takes slot t of a period? With w_s = share_s / MIX_PERIOD, let use j of source s be due in the slots
// [floor(j / w_s), ceil((j + 1) / w_s)). Giving each source w_s of every slot serves all uses in time, so an
// undivided schedule exists too (bipartite flows are integral), and earliest deadline first finds it. Then
// after n slots source s was used floor(n w_s) or ceil(n w_s) times; after a whole period, exactly share_s
// times.
static inline void dataloader_mix(DataLoader *loader) {
    int64_t *used = NEW(int64_t, loader->num_sources);
    loader->mix_source = NEW(int, MIX_PERIOD);
    loader->mix_used = NEW(int64_t, MIX_PERIOD);
    for (int64_t t = 0; t < MIX_PERIOD; t++) {
        int next = 0;
        int64_t earliest = INT64_MAX;
        for (int s = 0; s < loader->num_sources; s++) {
            int64_t share = loader->sources[s].share;
            int64_t deadline = ((used[s] + 1) * MIX_PERIOD + share - 1) / share;
            if (used[s] * MIX_PERIOD < (t + 1) * share && deadline < earliest) {
                earliest = deadline;
                next = s;
            }
        }
        loader->mix_source[t] = next;
        loader->mix_used[t] = used[next]++;
    }
    free(used);
}

// spec: "GLOB,GLOB,..." or "GLOB:WEIGHT,GLOB:WEIGHT,..."
static inline void dataloader_open(DataLoader *loader, const char *spec, int seq_len, uint64_t seed,
                                   int shuffle) {
    memset(loader, 0, sizeof(*loader));
    loader->seq_len = seq_len;
    loader->seed = seed;
    loader->shuffle = shuffle;
    dataloader_add_sources(loader, spec);
    dataloader_set_shares(loader);
    dataloader_mix(loader);
    for (int s = 0; s < loader->num_sources; s++) {
        const DataSource *source = &loader->sources[s];
        if (source->num_windows == 0) {
            die("%s holds %lld tokens in %d files, none long enough for a window of %d + 1\n"
                "  ---> use a smaller --seq-len, or more data",
                source->pattern, (long long)source->num_tokens, source->num_shards, seq_len);
        }
    }
}

static inline void dataloader_close(DataLoader *loader) {
    for (int s = 0; s < loader->num_sources; s++) {
        for (int i = 0; i < loader->sources[s].num_shards; i++) {
            shard_close(&loader->sources[s].shards[i]);
        }
        free(loader->sources[s].shards);
        free(loader->sources[s].pattern);
    }
    free(loader->sources);
    free(loader->mix_source);
    free(loader->mix_used);
}

// windows of all sources: with one source, the sequences of an epoch
static inline int64_t dataloader_num_sequences(const DataLoader *loader) {
    int64_t n = 0;
    for (int s = 0; s < loader->num_sources; s++) {
        n += loader->sources[s].num_windows;
    }
    return n;
}

static inline int64_t dataloader_total_tokens(const DataLoader *loader) {
    int64_t n = 0;
    for (int s = 0; s < loader->num_sources; s++) {
        n += loader->sources[s].num_tokens;
    }
    return n;
}

// one line, without its end
static inline void dataloader_print(const DataLoader *loader, FILE *out) {
    int files = 0;
    for (int s = 0; s < loader->num_sources; s++) {
        files += loader->sources[s].num_shards;
    }
    fprintf(out, "%lld tokens in %d file%s, %lld windows of %d, %s",
            (long long)dataloader_total_tokens(loader), files, files == 1 ? "" : "s",
            (long long)dataloader_num_sequences(loader), loader->seq_len,
            loader->shuffle ? "shuffled" : "in order");
    for (int s = 0; s < loader->num_sources && loader->num_sources > 1; s++) {
        const DataSource *source = &loader->sources[s];
        fprintf(out, "%s %.2f %% %s", s ? "," : ":", 100.0 * (double)source->share / MIX_PERIOD,
                source->pattern);
    }
}

// j's place in a permutation of [0, n) that key chooses: Feistel rounds permute [0, 4^half), the least such
// range that holds n, and walking on from every value that is not below n leaves a permutation of [0, n).
// Eight rounds: with four, a small n shows a bias
static inline int64_t dataloader_permute(int64_t j, int64_t n, uint64_t key) {
    int half = 0;
    while (((int64_t)1 << (2 * half)) < n) {
        half++;
    }
    uint64_t mask = ((uint64_t)1 << half) - 1;
    uint64_t x = (uint64_t)j;
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 8; round++) {
            uint64_t next = left ^ (rng_bits(key, round, right) & mask);
            left = right;
            right = next;
        }
        x = left << half | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// which shard and window sequence index is
static inline const TokenShard *dataloader_locate(const DataLoader *loader, int64_t index, int64_t *window) {
    int slot = (int)(index % MIX_PERIOD);
    int s = loader->mix_source[slot];
    const DataSource *source = &loader->sources[s];
    int64_t use = index / MIX_PERIOD * source->share + loader->mix_used[slot];
    int64_t epoch = use / source->num_windows;
    int64_t j = use % source->num_windows;
    if (loader->shuffle) {
        uint64_t key = rng_bits(loader->seed, (uint64_t)s, (uint64_t)epoch);
        j = dataloader_permute(j, source->num_windows, key);
    }
    int low = 0, high = source->num_shards; // the last shard whose first window is not behind j
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (source->shards[middle].first_window <= j) {
            low = middle;
        } else {
            high = middle;
        }
    }
    *window = j - source->shards[low].first_window;
    return &source->shards[low];
}

// inputs, targets [T] of sequence index >= 0
static inline void dataloader_sequence(const DataLoader *loader, int64_t index, int vocab_size, int *inputs,
                                       int *targets) {
    int64_t window;
    int T = loader->seq_len, largest = 0;
    const TokenShard *shard = dataloader_locate(loader, index, &window);
    const uint16_t *tokens = shard->tokens + window * T;
    for (int t = 0; t <= T; t++) {
        largest = tokens[t] > largest ? tokens[t] : largest;
    }
    for (int t = 0; t <= T && largest >= vocab_size; t++) {
        if (tokens[t] >= vocab_size) {
            die("%s: token %lld is %d, but the vocabulary has %d\n  ---> tokenize the text with this model's "
                "vocabulary, or train with a larger --vocab-size",
                shard->path, (long long)(window * T + t), tokens[t], vocab_size);
        }
    }
    for (int t = 0; t < T; t++) {
        inputs[t] = tokens[t];
        targets[t] = tokens[t + 1];
    }
}

// ----------------------------------------------------------------------------
// validation domains

typedef struct {
    char *path;
    char *name; // "github" of val.github.bin, else the file's name without .bin
} DataDomain;

static inline char *dataloader_domain_name(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = dataloader_copy(slash == NULL ? path : slash + 1);
    size_t size = strlen(name);
    if (size > 4 && strcmp(name + size - 4, ".bin") == 0) {
        name[size - 4] = '\0';
    }
    if (strncmp(name, "val.", 4) == 0 && name[4] != '\0') {
        memmove(name, name + 4, strlen(name + 4) + 1);
    }
    return name;
}

// the files of "GLOB,GLOB,...", one domain each; returns how many
static inline int dataloader_domains(const char *spec, DataDomain **domains) {
    char *copy = dataloader_copy(spec), *list = copy, *item;
    int n = 0;
    *domains = NULL;
    while ((item = dataloader_next_item(&list)) != NULL) {
        glob_t found;
        dataloader_glob(item, &found);
        *domains = GROW(DataDomain, *domains, n + (int)found.gl_pathc);
        for (size_t i = 0; i < found.gl_pathc; i++, n++) {
            (*domains)[n].path = dataloader_copy(found.gl_pathv[i]);
            (*domains)[n].name = dataloader_domain_name(found.gl_pathv[i]);
        }
        globfree(&found);
    }
    free(copy);
    return n;
}

static inline void dataloader_free_domains(DataDomain *domains, int n) {
    for (int i = 0; i < n; i++) {
        free(domains[i].path);
        free(domains[i].name);
    }
    free(domains);
}

#endif
