/*
The pair list: what every router emits, and all that the rest of the model knows of routing.

For each token the experts that are active for it, with their gates: compressed sparse rows over tokens,
    token t owns pairs row_start[t] .. row_start[t + 1] - 1;   expert[p] ascends within a token
    gate[p] = R(x_t)_e (Eq. 1)
and for each expert e, counts[e], the number of its tokens (n_e).
N tokens, E experts, P = num_pairs active (token, expert) pairs. Active is membership in the list, not gate >
0: a softmax may underflow to a gate of 0 and its expert is still run. A token may own no pair at all.
*/
#ifndef PAIRS_H
#define PAIRS_H

#include "llmc/check.h"
#include "llmc/segments.h"
// defines: NEW, GROW; Segments

// one draw of a router that draws its experts one after the other (router_sparsemixer.h)
typedef struct {
    int draw;       // the expert + 1, negative where M = 1/3; 0: none
    float max, sum; // over those that could be drawn: the largest logit, exp(z - max) together
    float slope;    // of backward: the gate's gradient times its probability
} RouterRound;

typedef struct {
    int64_t tokens;      // N
    int64_t num_pairs;   // P
    int64_t *row_start;  // [N + 1]
    int *expert;         // [P]
    float *gate;         // [P]
    int64_t *counts;     // [E]
    RouterRound *rounds; // [N, k], or NULL where the router does not draw
    Segments segments;   // which `expert` numbers, where the router merges experts
    int64_t capacity;    // pairs that fit
    int64_t round_capacity;
    int64_t token_capacity;
    int expert_capacity;
} PairList;

static inline PairList pairs_empty(void) {
    PairList pairs;
    memset(&pairs, 0, sizeof(pairs));
    return pairs;
}

static inline void pairs_reserve(PairList *pairs, int64_t tokens, int64_t num_pairs) {
    if (tokens + 1 > pairs->token_capacity) {
        pairs->token_capacity = tokens + 1;
        pairs->row_start = GROW(int64_t, pairs->row_start, pairs->token_capacity);
    }
    if (num_pairs > pairs->capacity) {
        pairs->capacity = num_pairs;
        pairs->expert = GROW(int, pairs->expert, num_pairs);
        pairs->gate = GROW(float, pairs->gate, num_pairs);
    }
    pairs->tokens = tokens;
    pairs->num_pairs = num_pairs;
}

static inline void pairs_reserve_rounds(PairList *pairs, int64_t rounds) {
    if (rounds > pairs->round_capacity) {
        pairs->round_capacity = rounds;
        pairs->rounds = GROW(RouterRound, pairs->rounds, rounds);
    }
}

static inline void pairs_free(PairList *pairs) {
    free(pairs->row_start);
    free(pairs->expert);
    free(pairs->gate);
    free(pairs->counts);
    free(pairs->rounds);
}

static inline void pairs_clear_counts(PairList *pairs, int E) {
    if (E > pairs->expert_capacity) {
        pairs->expert_capacity = E;
        pairs->counts = GROW(int64_t, pairs->counts, E);
    }
    memset(pairs->counts, 0, (size_t)E * sizeof(int64_t));
}

// counts[e] = number of tokens of expert e; their sum is P. Whoever makes a list ends with this
static inline void pairs_count(PairList *pairs, int E) {
    pairs_clear_counts(pairs, E);
    for (int64_t p = 0; p < pairs->num_pairs; p++) {
        pairs->counts[pairs->expert[p]]++;
    }
}

// active where mask[t, e] != 0 (mask [N, E]), gates taken from score [N, E] (or 1 everywhere when score is
// NULL)
static inline void pairs_from_mask(PairList *pairs, const float *score, const float *mask, int64_t N, int E) {
    int64_t count = 0;
    for (int64_t i = 0; i < N * E; i++) {
        count += mask[i] != 0.0f;
    }
    pairs_reserve(pairs, N, count);
    int64_t p = 0;
    for (int64_t t = 0; t < N; t++) {
        pairs->row_start[t] = p;
        for (int e = 0; e < E; e++) {
            if (mask[t * E + e] != 0.0f) {
                pairs->expert[p] = e;
                pairs->gate[p] = score != NULL ? score[t * E + e] : 1.0f;
                p++;
            }
        }
    }
    pairs->row_start[N] = p;
    pairs_count(pairs, E);
}

// words of a token's active set, as bits: bit e % 64 of word e / 64 is 1 iff expert e is active
static inline int bit_words(int E) {
    return (E + 63) / 64;
}

static inline int bits_count(uint64_t word) {
    return __builtin_popcountll(word);
}

// bits [N, bit_words(E)]
static inline void pairs_to_bits(uint64_t *bits, const PairList *pairs, int E) {
    int W = bit_words(E);
    memset(bits, 0, (size_t)(pairs->tokens * W) * sizeof(uint64_t));
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            bits[t * W + pairs->expert[p] / 64] |= (uint64_t)1 << pairs->expert[p] % 64;
        }
    }
}

// dense [N, E] picture of the gates: 0 where not active
static inline void pairs_to_dense(float *gates, const PairList *pairs, int E) {
    memset(gates, 0, (size_t)(pairs->tokens * E) * sizeof(float));
    for (int64_t t = 0; t < pairs->tokens; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            gates[t * E + pairs->expert[p]] = pairs->gate[p];
        }
    }
}

#endif
