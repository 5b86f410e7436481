/*
How much a step's update changes the routing (--flip-every n; the ReMoE paper's Eq. 14, 15 and Figure 10).

    flip rate  = 1/(L N E) sum_{l, t, e} | M'[l, t, e] - M[l, t, e] |,     flip count = E flip rate

M, M' are the active sets, 0 or 1, of a *fixed* calibration set of N tokens by the weights before and after
one update: one update apart, not one logged step apart. The flip count is the number of experts that change
per token and layer; a topk router with k = 1 that moves a token flips two entries.

The calibration set is the first 64 sequences of the validation data, domains in turn (all, if there are
fewer), routed as in evaluation. Its masks are bits: M and M' differ in popcount(M ^ M') places. Two forward
passes without a head: at a global batch of 512 some 2 * 64 / (3 * 512) = 8 % of a step, so n = 100 costs
0.1 %.

Ranks take micro-batches in turns and add up integers; nothing of it touches the step, so a run's bits do not
depend on n. A router that chooses among the tokens of a micro-batch (ec) does so among --batch sequences here
too.

Letters: L layers, E = E_tot experts, W = bit_words(E). Errors: no validation data.
*/
#ifndef FLIPS_H
#define FLIPS_H

#include "llmc/files/domains.h"
#include "llmc/run/run.h"
// defines: DataDomain; Run, model_look, model_masks; bit_words, bits_count; ranks_sum

enum { FLIP_SEQUENCES = 64 };

struct Flips {
    int sequences;            // of the calibration set
    int *inputs;              // [sequences, T]
    uint64_t *before, *after; // of the micro-batches that this rank takes, [L, N, W] each
    int64_t *changed;         // [L]
    double *layer_rate;       // [L] 1/(N E) of that
    double rate;
};

// sequences: the calibration set's i-th is the next of the next domain that has one left
static inline int choose_sequences(const Run *run, int *inputs, int *targets) {
    int T = (int)run->options.seq_len, chosen = 0, found = 1;
    for (int64_t window = 0; found && chosen < FLIP_SEQUENCES; window++) {
        found = 0;
        for (int i = 0; i < run->num_domains && chosen < FLIP_SEQUENCES; i++) {
            const DataLoader *loader = &run->domains[i].loader;
            if (window < dataloader_num_sequences(loader)) {
                dataloader_sequence(loader, window, run->config.vocab_size, inputs + (int64_t)chosen * T,
                                    targets);
                found = 1;
                chosen++;
            }
        }
    }
    return chosen;
}

static inline int64_t flip_words(const Run *run, int sequences) {
    return run->options.seq_len * sequences * run->config.layers * bit_words(run->config.router.experts);
}

static inline Flips *flips_open(const Run *run) {
    int T = (int)run->options.seq_len, ranks = run->ranks.count, B = (int)run->options.batch;
    Flips *f = NEW(Flips, 1);
    f->inputs = NEW(int, (int64_t)FLIP_SEQUENCES *T);
    f->sequences = choose_sequences(run, f->inputs, run->targets);
    int batches = (f->sequences + B - 1) / B, own = (batches + ranks - 1) / ranks * B;
    own = own < f->sequences ? own : f->sequences;
    f->before = NEW(uint64_t, flip_words(run, own));
    f->after = NEW(uint64_t, flip_words(run, own));
    f->changed = NEW(int64_t, run->config.layers);
    f->layer_rate = NEW(double, run->config.layers);
    return f;
}

static inline void flips_close(Flips *f) {
    if (f != NULL) {
        free(f->inputs);
        free(f->before);
        free(f->after);
        free(f->changed);
        free(f->layer_rate);
        free(f);
    }
}

// sequences of the micro-batch that begins with `first`
static inline int flip_batch(const Run *run, const Flips *f, int first) {
    int left = f->sequences - first, B = (int)run->options.batch;
    return left < B ? left : B;
}

// the masks of this rank's micro-batches, one behind the other
static inline void flips_look(Run *run, const Flips *f, uint64_t *masks) {
    int T = (int)run->options.seq_len, B = (int)run->options.batch;
    model_route(run->model, run->config.router.method, run->config.router.active);
    ranks_beat(&run->ranks, run->state.step, "calibration");
    for (int first = run->ranks.rank * B; first < f->sequences; first += run->ranks.count * B) {
        int b = flip_batch(run, f, first);
        model_look(run->model, f->inputs + (int64_t)first * T, b, T);
        model_masks(run->model, (int64_t)b * T, masks);
        masks += flip_words(run, b);
    }
}

static inline void flips_before(Run *run) {
    flips_look(run, run->flips, run->flips->before);
}

// f->changed [L] of this rank's micro-batches
static inline void flips_count(const Run *run, Flips *f) {
    int L = run->config.layers, B = (int)run->options.batch;
    const uint64_t *before = f->before, *after = f->after;
    memset(f->changed, 0, (size_t)L * sizeof(int64_t));
    for (int first = run->ranks.rank * B; first < f->sequences; first += run->ranks.count * B) {
        int64_t words = flip_words(run, flip_batch(run, f, first)) / L;
        for (int l = 0; l < L; l++, before += words, after += words) {
            for (int64_t i = 0; i < words; i++) {
                f->changed[l] += bits_count(before[i] ^ after[i]);
            }
        }
    }
}

static inline void flips_after(Run *run) {
    Flips *f = run->flips;
    int L = run->config.layers;
    double entries = (double)f->sequences * (double)run->options.seq_len * run->config.router.experts;
    flips_look(run, f, f->after);
    flips_count(run, f);
    ranks_sum(&run->ranks, f->changed, L);
    f->rate = 0.0;
    for (int l = 0; l < L; l++) {
        f->layer_rate[l] = (double)f->changed[l] / entries; // (Eq. 14)
        f->rate += f->layer_rate[l] / L;
    }
}

#endif
