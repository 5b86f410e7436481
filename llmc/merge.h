/*
Merged experts: another bank, each of whose experts is a weighted sum of the layer's own (router_lory.h).

    merge_forward    bank'[c] = sum_e a_ce bank[e]
    merge_backward   dbank[e] += sum_c a_ce dbank'[c];   da_ce = <dbank'[c], bank[e]>, over gate_up and down
    merged_forward   experts_forward of experts.h on bank', whose expert c is that of segment c (segments.h):
                     merge, run, drop, MERGE_CHUNK segments at a time
    merged_backward  experts_backward likewise, each chunk merged again before

A merged expert has as many weights as an expert, 3 F d, for the S tokens of a segment: all segments' together
would be larger than all that the tokens leave. So a chunk's experts are merged, used and overwritten by the
next chunk's, and backward merges them again (2 E operations a weight, little beside the 12 S of its
products).

One prompt's experts stay, in the place that its layer has, until another batch is computed: the tokens that
are generated after the prompt are those of the same segment (segments.kept).

a: [N, E] by token, as router_lory_forward leaves it; bank and bank' [., 2F, d], [., d, F].
*/
#ifndef MERGE_H
#define MERGE_H

#include "llmc/experts.h"
#include "llmc/router_lory.h"
// defines: ExpertBank, experts_*; lory_weights, Segments, segments_*, PairList; sgemm

typedef struct {
    int64_t experts;         // that there is room for
    float *gate_up, *down;   // [experts, 2F, d], [experts, d, F]
    float *dgate_up, *ddown; // the same shapes; NULL without training
    float *a;                // [MERGE_CHUNK, E] of a chunk's segments
    float *da;               // [C, E] of all segments
    float *dgate;            // of a chunk's pairs, of no use
    PairList pairs;          // of a chunk: token t has the chunk's segment that it lies in
    Dispatch dispatch;       // the same: rows are tokens
} Merged;

// floats of all that merged_open takes, but the lists
static inline double merged_floats(int layers, int64_t segments, int E, int d, int F, int training) {
    double expert = 3.0 * F * d;
    return (double)merged_experts(layers, segments) * expert * (training ? 2 : 1) +
           (double)(segments + MERGE_CHUNK) * E;
}

// for batches of at most so many segments and tokens
static inline void merged_open(Merged *m, int layers, int64_t segments, int64_t tokens, int E, int d, int F,
                               int training) {
    memset(m, 0, sizeof(*m));
    m->experts = merged_experts(layers, segments);
    m->gate_up = NEW(float, m->experts * 2 * F * d);
    m->down = NEW(float, m->experts *F *d);
    m->a = NEW(float, (int64_t)MERGE_CHUNK *E);
    if (training) {
        m->dgate_up = NEW(float, m->experts * 2 * F * d);
        m->ddown = NEW(float, m->experts *F *d);
        m->da = NEW(float, segments *E);
        m->dgate = NEW(float, tokens);
    }
    dispatch_init(&m->dispatch, MERGE_CHUNK);
}

static inline void merged_close(Merged *m) {
    float *buffers[] = {m->gate_up, m->down, m->dgate_up, m->ddown, m->a, m->da, m->dgate};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        free(buffers[i]);
    }
    if (m->experts > 0) {
        pairs_free(&m->pairs);
        dispatch_free(&m->dispatch);
    }
}

// ----------------------------------------------------------------------------
// the merge, of C experts

// a [C, E]
static inline void merge_forward(ExpertBank to, const float *a, ExpertBank bank) {
    int E = bank.E, up = 2 * bank.F * bank.d, down = bank.F * bank.d;
    sgemm(0, 0, to.E, up, E, a, E, bank.gate_up, up, (float *)to.gate_up, up, 0);
    sgemm(0, 0, to.E, down, E, a, E, bank.down, down, (float *)to.down, down, 0);
}

// the bank's gradients += ...; da [C, E] overwritten
static inline void merge_backward(ExpertBank bank, float *da, const float *a, ExpertBank to) {
    int E = bank.E, C = to.E, up = 2 * bank.F * bank.d, down = bank.F * bank.d;
    sgemm(0, 1, C, E, up, to.dgate_up, up, bank.gate_up, up, da, E, 0);
    sgemm(0, 1, C, E, down, to.ddown, down, bank.down, down, da, E, 1);
    sgemm(1, 0, E, up, C, a, E, to.dgate_up, up, bank.dgate_up, up, 1);
    sgemm(1, 0, E, down, C, a, E, to.ddown, down, bank.ddown, down, 1);
}

// ----------------------------------------------------------------------------
// chunks of segments

// some of a batch's segments, all of whose tokens are neighbours
typedef struct {
    int first, count;            // segments
    int64_t first_token, tokens; // theirs
    ExpertBank bank;             // their merged experts
} SegmentChunk;

// layer's own place serves a prompt, the first ones all else
static inline SegmentChunk segment_chunk(const Merged *m, Segments s, int first, int layer, ExpertBank bank) {
    int C = segments_count(s), place = segments_stay(s) ? layer : 0;
    int64_t up = (int64_t)place * 2 * bank.F * bank.d, down = (int64_t)place * bank.F * bank.d;
    SegmentChunk chunk;
    chunk.first = first;
    chunk.count = C - first < MERGE_CHUNK ? C - first : (int)MERGE_CHUNK;
    chunk.first_token = segment_first(s, first);
    int last = first + chunk.count - 1;
    chunk.tokens = segment_first(s, last) + segment_size(s, last) - chunk.first_token;
    chunk.bank = bank;
    chunk.bank.E = chunk.count;
    chunk.bank.gate_up = m->gate_up + up;
    chunk.bank.down = m->down + down;
    chunk.bank.dgate_up = m->dgate_up;
    chunk.bank.ddown = m->ddown;
    return chunk;
}

// the chunk's own pair list and its rows: row r is token r
static inline void segment_chunk_list(Merged *m, const PairList *all, const SegmentChunk *chunk) {
    pairs_reserve(&m->pairs, chunk->tokens, chunk->tokens);
    for (int64_t t = 0; t < chunk->tokens; t++) {
        m->pairs.row_start[t] = t;
        m->pairs.expert[t] = all->expert[chunk->first_token + t] - chunk->first;
        m->pairs.gate[t] = 1.0f;
    }
    m->pairs.row_start[chunk->tokens] = chunk->tokens;
    pairs_count(&m->pairs, chunk->count);
    dispatch_sort(&m->dispatch, &m->pairs, chunk->count);
}

// m->a [count, E]
static inline void segment_chunk_weights(Merged *m, Segments s, const float *a, const SegmentChunk *chunk,
                                         int E) {
    for (int c = 0; c < chunk->count; c++) {
        memcpy(m->a + (int64_t)c * E, lory_weights(a, s, chunk->first + c, E), (size_t)E * sizeof(float));
    }
}

// y [N, d] += each segment's merged expert; keeps h [N, 2F]; scratch as experts_forward's
static inline void merged_forward(float *y, float *h, const float *x, ExpertBank bank, const float *a,
                                  const PairList *pairs, int layer, Merged *m, float *scratch) {
    Segments s = pairs->segments;
    int d = bank.d, F = bank.F;
    for (int first = 0; first < segments_count(s); first += MERGE_CHUNK) {
        SegmentChunk chunk = segment_chunk(m, s, first, layer, bank);
        int64_t t = chunk.first_token;
        segment_chunk_list(m, pairs, &chunk);
        if (!s.kept) {
            segment_chunk_weights(m, s, a, &chunk, bank.E);
            merge_forward(chunk.bank, m->a, bank);
        }
        experts_forward(y + t * d, h + t * 2 * F, x + t * d, chunk.bank, &m->pairs, &m->dispatch, scratch);
    }
}

// dx += ..., the bank's gradients += ..., m->da [C, E] overwritten; h is spent
static inline void merged_backward(float *dx, const float *dy, const float *x, float *h, ExpertBank bank,
                                   const float *a, const PairList *pairs, int layer, Merged *m,
                                   float *scratch) {
    Segments s = pairs->segments;
    int64_t d = bank.d, F = bank.F, expert = F * d * (int64_t)sizeof(float);
    for (int first = 0; first < segments_count(s); first += MERGE_CHUNK) {
        SegmentChunk chunk = segment_chunk(m, s, first, layer, bank);
        int64_t t = chunk.first_token;
        segment_chunk_list(m, pairs, &chunk);
        segment_chunk_weights(m, s, a, &chunk, bank.E);
        merge_forward(chunk.bank, m->a, bank);
        memset(m->dgate_up, 0, (size_t)(chunk.count * 2 * expert));
        memset(m->ddown, 0, (size_t)(chunk.count * expert));
        experts_backward(dx + t * d, m->dgate, dy + t * d, x + t * d, h + t * 2 * F, chunk.bank, &m->pairs,
                         &m->dispatch, scratch);
        merge_backward(bank, m->da + (int64_t)first * bank.E, m->a, chunk.bank);
    }
}

#endif
