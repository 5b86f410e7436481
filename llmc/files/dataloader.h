/*
The order in which token shards (shard.h) are read.

A shard of ntok tokens has floor((ntok - 1) / T) windows; window w is tokens [w T, w T + T]: T inputs, and the
T targets one token later. Sequence i is a pure function of (files, T, seed, i): a position in the data is one
integer, and ranks need no state.
    i -> source     weighted sources take turns: after any n sequences, source s was used n w_s times, +- 1
    use u of it     epoch = u / windows, j = u % windows
    j -> window     a seeded permutation of [0, windows), another each epoch (--shuffle 0: j itself)
So within an epoch of a source no window is repeated or skipped.

Shapes: inputs, targets [T]. Errors: too few tokens for one window, or a token that the vocabulary does not
have, dies naming file, position and remedy.
*/
#ifndef DATALOADER_H
#define DATALOADER_H

#include "llmc/check.h"
#include "llmc/files/data_names.h"
#include "llmc/files/shard.h"
#include "llmc/rng.h"
#include <math.h>
// defines: llround

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
    char *copy = check_strdup(spec), *list = copy, *item;
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
            source->pattern = check_strdup(weight > 0.0 ? item : spec);
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

// spec: "GLOB,GLOB,..." or "GLOB:WEIGHT,GLOB:WEIGHT,..."; a name that exists as it stands is that file
static inline void dataloader_open_shards(DataLoader *loader, const char *spec, int seq_len, uint64_t seed,
                                          int shuffle) {
    memset(loader, 0, sizeof(*loader));
    loader->seq_len = seq_len;
    loader->seed = seed;
    loader->shuffle = shuffle;
    dataloader_add_sources(loader, spec);
    dataloader_set_shares(loader);
    dataloader_mix(loader);
}

// the same, and each source has a window
static inline void dataloader_open(DataLoader *loader, const char *spec, int seq_len, uint64_t seed,
                                   int shuffle) {
    dataloader_open_shards(loader, spec, seq_len, seed, shuffle);
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

// ----------------------------------------------------------------------------
// tokens

// a token of the window's T + 1 that the vocabulary does not have; -1: all are good
static inline int64_t dataloader_bad_token(const TokenShard *shard, int64_t window, int T, int vocab_size) {
    const uint16_t *tokens = shard->tokens + window * T;
    int largest = 0;
    for (int t = 0; t <= T; t++) {
        largest = tokens[t] > largest ? tokens[t] : largest;
    }
    for (int t = 0; t <= T && largest >= vocab_size; t++) {
        if (tokens[t] >= vocab_size) {
            return window * T + t;
        }
    }
    return -1;
}

__attribute__((noreturn)) static inline void dataloader_refuse_token(const TokenShard *shard, int64_t token,
                                                                     int vocab_size) {
    die("%s: token %lld is %d, but the vocabulary has %d\n  ---> tokenize the text with this model's "
        "vocabulary, or train with a larger --vocab-size",
        shard->path, (long long)token, shard->tokens[token], vocab_size);
}

// Before a run: the tokens of every shard's first and last windows (of another vocabulary they show there; to
// read all of a training set would take minutes)
static inline void dataloader_check_tokens(const DataLoader *loader, int64_t windows, int vocab_size) {
    for (int s = 0; s < loader->num_sources; s++) {
        for (int i = 0; i < loader->sources[s].num_shards; i++) {
            const TokenShard *shard = &loader->sources[s].shards[i];
            int64_t n = shard->num_tokens > 0 ? (shard->num_tokens - 1) / loader->seq_len : 0;
            for (int64_t w = 0; w < n; w = w + 1 < windows || w + 1 == n ? w + 1 : n - 1) {
                int64_t token = dataloader_bad_token(shard, w, loader->seq_len, vocab_size);
                if (token >= 0) {
                    dataloader_refuse_token(shard, token, vocab_size);
                }
            }
        }
    }
}

// Inputs, targets [T] of sequence index >= 0. A token that the vocabulary does not have: returns its shard,
// and which token; else NULL
static inline const TokenShard *dataloader_try_sequence(const DataLoader *loader, int64_t index,
                                                        int vocab_size, int *inputs, int *targets,
                                                        int64_t *token) {
    int64_t window;
    int T = loader->seq_len;
    const TokenShard *shard = dataloader_locate(loader, index, &window);
    const uint16_t *tokens = shard->tokens + window * T;
    *token = dataloader_bad_token(shard, window, T, vocab_size);
    if (*token >= 0) {
        return shard;
    }
    for (int t = 0; t < T; t++) {
        inputs[t] = tokens[t];
        targets[t] = tokens[t + 1];
    }
    return NULL;
}

// the same; a token that the vocabulary does not have ends the program
static inline void dataloader_sequence(const DataLoader *loader, int64_t index, int vocab_size, int *inputs,
                                       int *targets) {
    int64_t token;
    const TokenShard *bad = dataloader_try_sequence(loader, index, vocab_size, inputs, targets, &token);
    if (bad != NULL) {
        dataloader_refuse_token(bad, token, vocab_size);
    }
}

#endif
