/*
SparseMixer-v2 (Liu et al., 2024, GRIN, arXiv 2409.12136): a sampled top-k, whose router learns from an estimate
of the gradient of the expected loss.

    forward, k rounds over the experts that are still free
        z* = max z_e, e* its index (ties: the lower);  A = { e: z* - z_e <= 2 r max(|z_e|, z*) },  r = jitter
        p_e = exp(z_e - z*) / sum_{i in A} exp(z_i - z*) for e in A, else 0
        training    D ~ p;   M = 1 if D = e*, else 1 with probability 1/4 and 1/3 with 3/4
        evaluation  D = e*;  M = 1
        the token goes to D with gate M p_D; D is free no more. Gates are not renormalised
    backward  dz_e += dR_D p_D (1[e = D] - p_e) for e in A, each round; M does not appear

That gradient needs f(h_D) - f(0), f being the rest of the network and h_D the expert's part. Heun's third-order
rule has it from two points, f(h) - f(0) = h (f'(h) / 4 + 3 f'(h/3) / 4) + O(h^4), and M picks one of them, so
that one pass is enough (the price: noise).

    auxiliary loss of one layer   sum_e f_e mean_t s_te, s = softmax(z) over all experts, f as in router_topk.h
    its gradient                  as there

Draws are counter-based, so neither ranks nor micro-batches nor resuming change them:
    key = rng_bits(seed, 0x64726177, step);   token = its sequence's place in the step x T + position
    u, v = draw_uniform(key, layer, token 2k + 2j), (.. + 1);  D = the first e of A whose running sum of
    exp(z_e - z*) exceeds u times the whole sum;  M = 1 if D = e* or v < 1/4

z [N, E] fp32 stays; the list keeps its rounds [N, k] for backward.
*/
#ifndef ROUTER_SPARSEMIXER_H
#define ROUTER_SPARSEMIXER_H

#include "llmc/rng.h"
#include "llmc/router_topk.h"
#include <math.h>
// defines: rng_bits, HOST_AND_DEVICE; PairList, RouterRound, router_softmax_backward, fast_exp; fabsf, fmaxf

// which draws a layer of a micro-batch takes
typedef struct {
    const uint64_t *key; // of the step; NULL: none are taken, each round has its argmax
    int64_t first_token; // of this rank's micro-batch, in the step of all ranks
    int layer;
} RouterDraws;

static inline uint64_t draw_key(uint64_t seed, int64_t step) {
    return rng_bits(seed, 0x64726177u, (uint64_t)step);
}

// in (0, 1), exact in fp32
HOST_AND_DEVICE static inline float draw_uniform(uint64_t key, int layer, uint64_t counter) {
    return ((float)(rng_bits(key, (uint64_t)layer, counter) >> 41) + 0.5f) * (1.0f / 8388608.0f);
}

HOST_AND_DEVICE static inline int sparsemixer_is_candidate(float z, float max, float jitter) {
    return max - z <= 2.0f * jitter * fmaxf(fabsf(z), max);
}

// z* and the sum over A of a round among the experts that are not taken [E]; returns e*
static inline int sparsemixer_begin_round(RouterRound *round, const float *z, const unsigned char *taken,
                                          int E, float jitter) {
    int best = 0;
    while (taken[best]) {
        best++;
    }
    for (int e = best + 1; e < E; e++) {
        best = !taken[e] && z[e] > z[best] ? e : best;
    }
    round->max = z[best];
    round->sum = 0.0f;
    for (int e = 0; e < E; e++) {
        if (!taken[e] && sparsemixer_is_candidate(z[e], round->max, jitter)) {
            round->sum += fast_exp(z[e] - round->max);
        }
    }
    return best;
}

// the expert where the running sum exceeds u of the whole; the last of A if rounding leaves none, or `best`
static inline int sparsemixer_draw(const RouterRound *round, const float *z, const unsigned char *taken,
                                   int E, float jitter, float u, int best) {
    float running = 0.0f;
    int drawn = best;
    for (int e = 0; e < E; e++) {
        if (!taken[e] && sparsemixer_is_candidate(z[e], round->max, jitter)) {
            running += fast_exp(z[e] - round->max);
            drawn = e;
            if (running > u * round->sum) {
                break;
            }
        }
    }
    return drawn;
}

// p of an expert that was free in the round
static inline float sparsemixer_probability(const RouterRound *round, float z, float jitter) {
    return sparsemixer_is_candidate(z, round->max, jitter) ? fast_exp(z - round->max) / round->sum : 0.0f;
}

// expert of a round, -1: none
HOST_AND_DEVICE static inline int round_expert(const RouterRound *round) {
    return (round->draw < 0 ? -round->draw : round->draw) - 1;
}

// the draw of round j from an earlier dump's row [E]; 0: there is none
static inline int sparsemixer_forced_draw(const float *forced, const unsigned char *taken, int E, int j) {
    for (int e = 0; e < E; e++) {
        if (!taken[e] && (int)fabsf(forced[e]) == j + 1) {
            return forced[e] < 0.0f ? -(e + 1) : e + 1;
        }
    }
    return 0;
}

// a token's k rounds. forced: a dump's row [E], or NULL; token: in the step
static inline void sparsemixer_token(RouterRound *rounds, unsigned char *taken, const float *z,
                                     RouterDraws draws, int64_t token, const float *forced, int E, int k,
                                     float jitter) {
    memset(taken, 0, (size_t)E);
    for (int j = 0; j < k; j++) {
        RouterRound *round = &rounds[j];
        int best = sparsemixer_begin_round(round, z, taken, E, jitter), expert = best, is_third = 0;
        if (draws.key != NULL) {
            uint64_t counter = (uint64_t)token * 2u * (uint64_t)k + 2u * (uint64_t)j;
            float u = draw_uniform(*draws.key, draws.layer, counter);
            expert = sparsemixer_draw(round, z, taken, E, jitter, u, best);
            is_third = expert != best && draw_uniform(*draws.key, draws.layer, counter + 1) >= 0.25f;
        }
        round->draw = forced != NULL ? sparsemixer_forced_draw(forced, taken, E, j)
                                     : (is_third ? -(expert + 1) : expert + 1);
        if (round->draw != 0) {
            taken[round_expert(round)] = 1;
        }
    }
}

// M p_D of a round; logits that are not finite make no number of it, and the loss shows them
static inline float sparsemixer_gate(const RouterRound *round, const float *z, int E, float jitter) {
    float broken = 0.0f;
    for (int e = 0; e < E; e++) {
        broken += z[e] - z[e];
    }
    float p = sparsemixer_probability(round, z[round_expert(round)], jitter);
    return (round->draw < 0 ? p / 3.0f : p) + broken;
}

// the pairs of token t, which begin at p, in ascending order of experts; returns where they end
static inline int64_t sparsemixer_emit(PairList *pairs, int64_t p, const RouterRound *rounds,
                                       const unsigned char *taken, const float *z, int E, float jitter) {
    for (int e = 0; e < E; e++) {
        if (taken[e]) {
            int j = 0;
            while (round_expert(&rounds[j]) != e) {
                j++;
            }
            pairs->expert[p] = e;
            pairs->gate[p++] = sparsemixer_gate(&rounds[j], z, E, jitter);
        }
    }
    return p;
}

// forced [N, E]: NULL, or draws to repeat, +-(j + 1) in round j's expert, minus where M = 1/3
static inline void router_sparsemixer_forward(PairList *pairs, const float *z, RouterDraws draws,
                                              const float *forced, int64_t N, int E, int k, float jitter) {
    unsigned char *taken = NEW(unsigned char, E);
    int64_t p = 0;
    pairs_reserve(pairs, N, N * k);
    pairs_reserve_rounds(pairs, N * k);
    for (int64_t t = 0; t < N; t++) {
        RouterRound *rounds = pairs->rounds + t * k;
        const float *row = z + t * E;
        sparsemixer_token(rounds, taken, row, draws, draws.first_token + t,
                          forced != NULL ? forced + t * E : NULL, E, k, jitter);
        pairs->row_start[t] = p;
        p = sparsemixer_emit(pairs, p, rounds, taken, row, E, jitter);
    }
    pairs->row_start[N] = p;
    pairs->num_pairs = p;
    pairs_count(pairs, E);
    free(taken);
}

// softmax(z) [E] of one token
static inline void sparsemixer_softmax(float *s, const float *z, int E) {
    memcpy(s, z, (size_t)E * sizeof(float));
    router_softmax(s, 1, E);
}

// sum_e f_e mean_t s_te over this rank's tokens, N of them in the global micro-batch
static inline double router_sparsemixer_loss(const float *z, const int64_t *counts, int64_t tokens, int64_t N,
                                             int E, int k) {
    float *s = NEW(float, E);
    double sum = 0.0;
    for (int64_t t = 0; t < tokens; t++) {
        sparsemixer_softmax(s, z + t * E, E);
        sum += router_topk_loss(s, counts, 1, N, E, k);
    }
    free(s);
    return sum;
}

// adds a round's part to dz [E], dR: its gate's gradient; taken [E]: in earlier rounds
static inline void sparsemixer_round_backward(float *dz, const RouterRound *round, float dR, const float *z,
                                              const unsigned char *taken, int E, float jitter) {
    int drawn = round_expert(round);
    float scale = dR * sparsemixer_probability(round, z[drawn], jitter);
    for (int e = 0; e < E; e++) {
        if (!taken[e]) {
            dz[e] -= scale * sparsemixer_probability(round, z[e], jitter);
        }
    }
    dz[drawn] += scale;
}

// dlogits [N, E] overwritten from dgate [P]
static inline void router_sparsemixer_backward(float *dlogits, const float *dgate, const PairList *pairs,
                                               const float *z, const int64_t *counts, int64_t N, int E, int k,
                                               float jitter, double weight) {
    unsigned char *taken = NEW(unsigned char, E);
    float *s = NEW(float, E);
    for (int64_t t = 0; t < pairs->tokens; t++) {
        const float *row = z + t * E;
        float *dz = dlogits + t * E;
        for (int e = 0; e < E; e++) {
            taken[e] = 0;
            dz[e] = (float)(weight * ((double)E * (double)counts[e] / ((double)k * (double)N)) / (double)N);
        }
        sparsemixer_softmax(s, row, E);
        router_softmax_backward(dz, s, 1, E);
        for (int j = 0; j < k; j++) {
            const RouterRound *round = &pairs->rounds[t * k + j];
            int64_t p = pairs->row_start[t];
            if (round->draw == 0) {
                continue;
            }
            while (pairs->expert[p] != round_expert(round)) {
                p++;
            }
            sparsemixer_round_backward(dz, round, dgate[p], row, taken, E, jitter);
            taken[round_expert(round)] = 1;
        }
    }
    free(taken);
    free(s);
}

// the draws of a list as --route-from reads them, [N, E]
static inline void router_sparsemixer_draws(float *draws, const RouterRound *rounds, int64_t N, int E,
                                            int k) {
    memset(draws, 0, (size_t)(N * E) * sizeof(float));
    for (int64_t i = 0; i < N * k; i++) {
        if (rounds[i].draw != 0) {
            float number = (float)(i % k + 1);
            draws[i / k * E + round_expert(&rounds[i])] = rounds[i].draw < 0 ? -number : number;
        }
    }
}

#endif
