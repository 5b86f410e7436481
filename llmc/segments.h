/*
Segments: the stretches of a text that a router which merges experts (router_lory.h) routes, instead of
tokens.

    B sequences of T tokens each are n = ceil(T / S) segments per sequence; the last may be shorter than S:
        segment c = b n + s   tokens b T + s S .. min(b T + (s + 1) S, (b + 1) T) - 1
    a segment's source, which decides its merge: the segment before it, or, first in its sequence, itself

With contexts the whole of a sequence is one segment, whose routing has seen its first tokens alone: a prompt
whose continuation is to be scored, or written.
*/
#ifndef SEGMENTS_H
#define SEGMENTS_H

#include "llmc/rng.h"
#include <stdint.h>
// defines: HOST_AND_DEVICE, int64_t

typedef struct {
    int sequences;       // B
    int tokens;          // T, of each
    int length;          // S, at most T
    const int *contexts; // [B] tokens at a sequence's beginning that route it; NULL: all of a segment's
    int kept;            // the layers' experts have been merged by the call before: nothing is routed
} Segments;

// contexts: NULL, or as above
static inline Segments segments_of(int sequences, int tokens, int length, const int *contexts) {
    Segments s = {sequences, tokens, contexts != NULL || length > tokens ? tokens : length, contexts, 0};
    return s;
}

// the next tokens of one sequence, of the segment that the call before has merged experts for
static inline Segments segments_kept(int tokens) {
    Segments s = {1, tokens, tokens, NULL, 1};
    return s;
}

// do the experts that are merged stay, for what follows? A prompt's do, in the place that its layer has
static inline int segments_stay(Segments s) {
    return s.kept || (s.contexts != NULL && s.sequences == 1);
}

// n, of a sequence
HOST_AND_DEVICE static inline int segments_each(Segments s) {
    return (s.tokens + s.length - 1) / s.length;
}

// C = B n
HOST_AND_DEVICE static inline int segments_count(Segments s) {
    return s.sequences * segments_each(s);
}

HOST_AND_DEVICE static inline int64_t segment_first(Segments s, int c) {
    int each = segments_each(s);
    return (int64_t)(c / each) * s.tokens + (int64_t)(c % each) * s.length;
}

HOST_AND_DEVICE static inline int segment_size(Segments s, int c) {
    int before = c % segments_each(s) * s.length;
    return s.tokens - before < s.length ? s.tokens - before : s.length;
}

HOST_AND_DEVICE static inline int segment_of_token(Segments s, int64_t t) {
    return (int)(t / s.tokens) * segments_each(s) + (int)(t % s.tokens) / s.length;
}

// the segment whose mean decides how c's experts are merged
HOST_AND_DEVICE static inline int segment_source(Segments s, int c) {
    return c % segments_each(s) > 0 ? c - 1 : c;
}

// the segment that c's mean decides besides its own, or -1
HOST_AND_DEVICE static inline int segment_next(Segments s, int c) {
    return (c + 1) % segments_each(s) > 0 ? c + 1 : -1;
}

enum { MERGE_CHUNK = 32 }; // segments whose experts are in memory at once

// merged experts in memory: a chunk's, or one per layer
static inline int64_t merged_experts(int layers, int64_t segments) {
    int64_t chunk = segments < MERGE_CHUNK ? segments : (int64_t)MERGE_CHUNK;
    return chunk > layers ? chunk : layers;
}

#endif
