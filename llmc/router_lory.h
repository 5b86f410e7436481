/*
Lory (Zhong et al., 2024, arXiv 2405.03133): experts are merged in parameter space, once per segment of S
tokens (segments.h), by the softmax of the segment before. All experts have a part in each token, and all get
a gradient.

    forward   z_c = W mean of x_t over segment c = mean of the tokens' logits W x_t;   e_c = softmax(z_c)
              a_c = e of the segment before;   first in a sequence: a_c = stopgrad(e_c)
              the tokens of segment c have one expert, sum_e a_ce expert_e, and no gate              (merge.h)
    backward  from da [C, E], which the merge's backward has made. If c' follows c in its sequence,
              dz_c = e_c (da_c' - <e_c, da_c'>), e_c = a_c';   else dz_c = 0
              a token's logits:  dz_t = dz_c / |c|

The logits of a mean are the mean of the logits, so W's part of the work, both ways, is that of any router.

The first segment is routed by its own mean: its tokens see E - 1 numbers per layer of what comes after them.
The stop-gradient keeps the router from learning to use that; the forward pass leaks all the same, within that
segment. So validation also reports the loss of the positions from S on. With contexts (a prompt) a segment is
routed by the mean over the context, and its gradient is not asked for.

Here no router's softmax is near a threshold, and the pair list is known: token t has the pair (t, its
segment, gate 1). counts[e] says how far expert e is used: the tokens of all segments with a_ce > 2 / E (the
paper's G.1).

logits [N, E] become in place a of each token's segment.
*/
#ifndef ROUTER_LORY_H
#define ROUTER_LORY_H

#include "llmc/router_topk.h"
// defines: router_softmax; PairList, Segments

// a of segment c, [E]: its first token's
HOST_AND_DEVICE static inline const float *lory_weights(const float *a, Segments s, int c, int E) {
    return a + segment_first(s, c) * E;
}

// does a segment that merges with weight a use the expert?
HOST_AND_DEVICE static inline int lory_uses(float a, int E) {
    return a * (float)E > 2.0f;
}

// mean [E] of the logits of segment c's tokens, or of its context's
static inline void lory_mean(float *mean, const float *logits, Segments s, int c, int E) {
    int tokens = s.contexts != NULL ? s.contexts[c] : segment_size(s, c);
    const float *first = logits + segment_first(s, c) * E;
    for (int e = 0; e < E; e++) {
        mean[e] = 0.0f;
    }
    for (int t = 0; t < tokens; t++) {
        for (int e = 0; e < E; e++) {
            mean[e] += first[(int64_t)t * E + e];
        }
    }
    for (int e = 0; e < E; e++) {
        mean[e] /= (float)tokens;
    }
}

static inline void lory_count(PairList *pairs, const float *a, int E) {
    Segments s = pairs->segments;
    pairs_clear_counts(pairs, E);
    for (int c = 0; c < segments_count(s) && !s.kept; c++) {
        const float *weights = lory_weights(a, s, c, E);
        for (int e = 0; e < E; e++) {
            pairs->counts[e] += lory_uses(weights[e], E) ? segment_size(s, c) : 0;
        }
    }
}

// a token's one pair: its segment, with gate 1
static inline void lory_list(PairList *pairs, Segments s) {
    int64_t N = (int64_t)s.sequences * s.tokens;
    pairs_reserve(pairs, N, N);
    pairs->segments = s;
    for (int64_t t = 0; t < N; t++) {
        pairs->row_start[t] = t;
        pairs->expert[t] = segment_of_token(s, t);
        pairs->gate[t] = 1.0f;
    }
    pairs->row_start[N] = N;
}

static inline void router_lory_forward(PairList *pairs, float *logits, Segments s, int E) {
    int C = segments_count(s);
    lory_list(pairs, s);
    if (!s.kept) {
        float *mean = NEW(float, (int64_t)C *E);
        for (int c = 0; c < C; c++) {
            lory_mean(mean + (int64_t)c * E, logits, s, c, E);
        }
        router_softmax(mean, C, E);
        for (int64_t t = 0; t < pairs->tokens; t++) {
            int64_t source = segment_source(s, pairs->expert[t]);
            memcpy(logits + t * E, mean + source * E, (size_t)E * sizeof(float));
        }
        free(mean);
    }
    lory_count(pairs, logits, E);
}

// dlogits [N, E] overwritten from da [C, E]
static inline void router_lory_backward(float *dlogits, const float *da, const PairList *pairs,
                                        const float *a, int E) {
    Segments s = pairs->segments;
    for (int c = 0; c < segments_count(s); c++) {
        int next = segment_next(s, c), size = segment_size(s, c);
        float *dz = dlogits + segment_first(s, c) * E;
        for (int e = 0; e < E; e++) {
            dz[e] = next >= 0 ? da[(int64_t)next * E + e] / (float)size : 0.0f;
        }
        if (next >= 0) {
            router_softmax_backward(dz, lory_weights(a, s, next, E), 1, E);
        }
        for (int t = 1; t < size; t++) {
            memcpy(dz + (int64_t)t * E, dz, (size_t)E * sizeof(float));
        }
    }
}

#endif
