/*
What the router does with validation data, counted: which experts take which layers', domains' and ids' tokens
(--eval --stats FILE; the ReMoE paper's Figures 7 to 9, 11, 12 and Table 12). Evaluation routing; mask[l, t, e]
is 1 iff expert e of layer l is active for token t, and v(t) is the id of that *input* token.

    tokens[D]          sum_{t of domain D} 1
    routed.D[l, e]     sum_{t of domain D} mask[l, t, e]     over tokens[D]: routed-token ratio (Figure 9)
    count[v]           sum_{t: v(t) = v} 1                   over all domains
    active[v]          sum_{t: v(t) = v} sum_{l, e} mask     over L count[v]: mean active experts (Figure 7)
    used.l[v, e]       sum_{t: v(t) = v} mask[l, t, e]       over count[v]: P(e | v) (Table 12)

The counts are integers, so threads, micro-batches and ranks may add them up in any order. used.l is that of
the middle layer, (L - 1) / 2, or of all (--stats-layers all): V E numbers a layer. The file is a safetensors
file: I64, and I32 for used.l; what it was made from stands in its header (origin.h). dev/doc/design.md has
its format.

The trainer hands the masks over as bits (trainer.h): L N E / 8 bytes a micro-batch, where gates would be 32
times that.

Letters: N tokens of a micro-batch, L layers, E = E_tot experts, V vocabulary, W = bit_words(E). Errors: a
domain that has changed since the start, two domains of one name, or more tokens than an I32 counts, end the
program without a file.
*/
#ifndef STATISTICS_H
#define STATISTICS_H

#include "llmc/files/domains.h"
#include "llmc/run/origin.h"
#include "llmc/run/run.h"
// defines: DataDomain; note_origin, note_*, compose; Run, bit_words, bits_count, ranks_sum, safetensors_*

struct Statistics {
    int domains, layers, experts, vocab;
    int first_used, num_used; // layers of `used`
    int64_t *cells, size;     // all counts in one block, in this order:
    int64_t *tokens;          // [domains]
    int64_t *routed;          // [domains, L, E]
    int64_t *count, *active;  // [V]
    int64_t *used;            // [num_used, V, E]
    uint64_t *masks;          // [L, N, W] of a micro-batch
    int *actives;             // [N] active experts of a token, over all layers
};

// so that used.l cannot run over, even if one id were all there is
static inline void check_statistics_tokens(const Run *run) {
    int64_t total = 0;
    for (int i = 0; i < run->num_domains; i++) {
        int64_t windows = dataloader_num_sequences(&run->domains[i].loader), most = validation_windows(run);
        total += (windows < most ? windows : most) * run->options.seq_len;
    }
    if (total > INT32_MAX) {
        die("--stats: %lld tokens, more than its counts hold (%d)\n  ---> --stats-tokens %lld",
            (long long)total, INT32_MAX, (long long)(INT32_MAX / run->num_domains / 2));
    }
}

static inline void check_domain_names(const Run *run) {
    for (int i = 0; i < run->num_domains; i++) {
        for (int k = 0; k < i; k++) {
            if (strcmp(run->domains[i].name, run->domains[k].name) == 0) {
                die("--stats: %s and %s are both called %s\n  ---> rename one of them", run->domains[k].path,
                    run->domains[i].path, run->domains[i].name);
            }
        }
    }
}

static inline Statistics *statistics_open(const Run *run) {
    const Config *c = &run->config;
    int all = strcmp(run->options.stats_layers, "all") == 0;
    int64_t L = c->layers, E = c->router.experts, V = c->vocab_size, D = run->num_domains;
    int64_t N = run->options.batch * run->options.seq_len;
    check_statistics_tokens(run);
    check_domain_names(run);
    Statistics *s = NEW(Statistics, 1);
    s->domains = (int)D;
    s->layers = (int)L;
    s->experts = (int)E;
    s->vocab = (int)V;
    s->first_used = all ? 0 : ((int)L - 1) / 2;
    s->num_used = all ? (int)L : 1;
    s->size = D + D * L * E + 2 * V + s->num_used * V * E;
    s->cells = NEW(int64_t, s->size);
    s->tokens = s->cells;
    s->routed = s->tokens + D;
    s->count = s->routed + D * L * E;
    s->active = s->count + V;
    s->used = s->active + V;
    s->masks = NEW(uint64_t, L * N * bit_words(c->router.experts));
    s->actives = NEW(int, N);
    return s;
}

static inline void statistics_close(Statistics *s) {
    if (s != NULL) {
        free(s->cells);
        free(s->masks);
        free(s->actives);
        free(s);
    }
}

// ----------------------------------------------------------------------------
// counting

// routed [E] and used [V, E] (NULL: not wanted) of one layer; masks [N, W]
static inline void count_layer(int64_t *routed, int64_t *used, const int *ids, const uint64_t *masks,
                               int64_t N, int E) {
    int W = bit_words(E);
    for (int64_t i = 0; i < N * W; i++) {
        for (uint64_t word = masks[i]; word != 0; word &= word - 1) {
            int e = (int)(i % W) * 64 + __builtin_ctzll(word);
            routed[e]++;
            if (used != NULL) {
                used[(int64_t)ids[i / W] * E + e]++;
            }
        }
    }
}

// s->actives [N]
static inline void count_actives(Statistics *s, int64_t N) {
    int W = bit_words(s->experts);
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < N; t++) {
        int active = 0;
        for (int64_t i = 0; i < (int64_t)s->layers * W; i++) {
            active += bits_count(s->masks[(i / W * N + t) * W + i % W]);
        }
        s->actives[t] = active;
    }
}

// s->masks: of N tokens of a domain. Layers share no count, so threads take a layer each
static inline void statistics_add(Statistics *s, int domain, const int *ids, int64_t N) {
    int E = s->experts, W = bit_words(E);
    int64_t *routed = s->routed + (int64_t)domain * s->layers * E;
    s->tokens[domain] += N;
#pragma omp parallel for schedule(static)
    for (int l = 0; l < s->layers; l++) {
        int kept = l - s->first_used;
        int64_t *used = kept >= 0 && kept < s->num_used ? s->used + (int64_t)kept * s->vocab * E : NULL;
        count_layer(routed + (int64_t)l * E, used, ids, s->masks + l * N * W, N, E);
    }
    count_actives(s, N);
    for (int64_t t = 0; t < N; t++) {
        s->count[ids[t]]++;
        s->active[ids[t]] += s->actives[t];
    }
}

// ----------------------------------------------------------------------------
// the file

static inline void note_statistics(SafetensorsWriter *w, const Run *run, const Statistics *s) {
    const char **names = NEW(const char *, s->domains);
    Composed used;
    for (int i = 0; i < s->domains; i++) {
        names[i] = run->domains[i].name;
    }
    note_origin(w, run, "stats");
    note_names(w, "domains", names, s->domains);
    compose(&used);
    for (int i = 0; i < s->num_used; i++) {
        fprintf(used.out, "%s%d", i == 0 ? "[" : ", ", s->first_used + i);
    }
    fputc(']', used.out);
    note_composed(w, "used_layers", &used);
    if (run->config.router.method == ROUTER_EC) { // which chooses among the tokens of a micro-batch
        note_integer(w, "batch", run->options.batch);
    }
    free(names);
}

static inline void statistics_declare(SafetensorsWriter *w, const Run *run, const Statistics *s) {
    int64_t domains = s->domains, vocab = s->vocab;
    int64_t routed[] = {s->layers, s->experts}, used[] = {s->vocab, s->experts};
    char name[64];
    safetensors_declare(w, "tokens", "I64", 1, &domains);
    for (int i = 0; i < s->domains; i++) {
        const char *domain = run->domains[i].name;
        char *spelled = json_spell_bytes(domain, strlen(domain)), *full = NEW(char, strlen(spelled) + 8);
        sprintf(full, "routed.%s", spelled);
        safetensors_declare(w, full, "I64", 2, routed);
        free(spelled);
        free(full);
    }
    safetensors_declare(w, "count", "I64", 1, &vocab);
    safetensors_declare(w, "active", "I64", 1, &vocab);
    for (int i = 0; i < s->num_used; i++) {
        check_format(name, sizeof(name), "used.%d", s->first_used + i);
        safetensors_declare(w, name, "I32", 2, used);
    }
}

static inline void put_used(SafetensorsWriter *w, size_t tensor, const int64_t *used, int64_t n) {
    int32_t narrow[4096];
    for (int64_t done = 0; done < n;) {
        int64_t piece = n - done < 4096 ? n - done : 4096;
        for (int64_t i = 0; i < piece; i++) {
            narrow[i] = (int32_t)used[done + i];
        }
        safetensors_write_at(w, tensor, (uint64_t)done, narrow, (uint64_t)piece);
        done += piece;
    }
}

static inline void statistics_put(SafetensorsWriter *w, const Statistics *s) {
    int64_t cells = (int64_t)s->layers * s->experts, columns = (int64_t)s->vocab * s->experts;
    size_t tensor = 0;
    safetensors_write_at(w, tensor++, 0, s->tokens, (uint64_t)s->domains);
    for (int i = 0; i < s->domains; i++) {
        safetensors_write_at(w, tensor++, 0, s->routed + i * cells, (uint64_t)cells);
    }
    safetensors_write_at(w, tensor++, 0, s->count, (uint64_t)s->vocab);
    safetensors_write_at(w, tensor++, 0, s->active, (uint64_t)s->vocab);
    for (int i = 0; i < s->num_used; i++) {
        put_used(w, tensor++, s->used + i * columns, columns);
    }
}

// all ranks call it: their counts together, written by rank 0
static inline void statistics_write(Run *run, Statistics *s) {
    SafetensorsWriter writer;
    int64_t total = 0;
    ranks_sum(&run->ranks, s->cells, s->size);
    safetensors_writer_open(&writer, run->options.stats);
    note_statistics(&writer, run, s);
    statistics_declare(&writer, run, s);
    safetensors_begin(&writer, &run->ranks);
    if (run->ranks.rank == 0) {
        statistics_put(&writer, s);
    }
    safetensors_finish(&writer, &run->ranks);
    for (int i = 0; i < s->domains; i++) {
        total += s->tokens[i];
    }
    printf("statistics of %lld tokens -> %s\n", (long long)total, run->options.stats);
}

#endif
