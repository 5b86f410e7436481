/*
Sequences that begin alike, computed once: a question and its answers, a context and its continuations.

    sequence 0   c c c c c a a a          rows 0 .. 7
    sequence 1   c c c c c b b            rows 8, 9: positions 5, 6, behind the first 5 rows of sequence 0
    sequence 2   d d d                    rows 10 .. 12

A branch is what a sequence has of its own: the positions from `start` on, in packed rows without any padding.
Its first `start` positions are those of its root, an earlier sequence that stands whole. All that a model
does row by row (norms, products, routers, experts) sees packed rows. Attention alone knows of positions: it
lays the root's keys and values before the branch's own, as the key/value cache of sampling does. So a row
has the bits that it has in its sequence alone. (Four answers of 25 tokens behind 70 cost 170 rows, not 380)

Roots and branches must have contexts of one length: what a router makes of a context (its mean) is then the
same for both.

Shapes: B sequences of up to T tokens, N packed rows; qkv and out as in attention.h, of N rows. Errors: none.
*/
#ifndef BRANCHES_H
#define BRANCHES_H

#include "llmc/attention.h"
#include "llmc/rope.h"
// defines: attention_forward, rope_forward, NEW

typedef struct {
    int root_row;  // packed row of the sequence's position 0
    int start;     // positions that are the root's; 0: the sequence is a root itself
    int first_row; // packed row of position `start`
    int rows;      // positions of its own, 0 where the root has them all
} Branch;

// the packed row of position t
static inline int branch_row(const Branch *b, int t) {
    return t < b->start ? b->root_row + t : b->first_row + t - b->start;
}

static inline int common_prefix(const int *a, int na, const int *b, int nb) {
    int n = 0;
    while (n < na && n < nb && a[n] == b[n]) {
        n++;
    }
    return n;
}

// ids [B, T] with lengths and contexts [B] -> branches [B] and their packed ids [N]; returns N. A sequence
// branches off the last root if it has all of its context in common with it
static inline int branches_plan(Branch *branches, int *packed, const int *ids, const int *lengths,
                                const int *contexts, int B, int T) {
    int N = 0, root = 0;
    for (int b = 0; b < B; b++) {
        const int *own = ids + (int64_t)b * T;
        int shared = 0;
        if (b > 0 && contexts[b] == contexts[root]) {
            shared = common_prefix(own, lengths[b], ids + (int64_t)root * T, lengths[root]);
        }
        if (shared < contexts[b]) {
            shared = 0;
            root = b;
        }
        Branch branch = {root == b ? N : branches[root].first_row, shared, N, lengths[b] - shared};
        branches[b] = branch;
        memcpy(packed + N, own + shared, (size_t)branch.rows * sizeof(int));
        N += branch.rows;
    }
    return N;
}

// queries and keys of packed rows [N, stride], each by its position
static inline void branches_rope_forward(float *x, const float *table, const Branch *branches, int B,
                                         int heads, int hd, int stride) {
    for (int b = 0; b < B; b++) {
        rope_forward(x + (int64_t)branches[b].first_row * stride, table, 1, branches[b].rows,
                     branches[b].start, heads, hd, stride);
    }
}

// one branch; room: of T rows of qkv
static inline void branch_attention_forward(float *out, float *lse, const float *qkv, const Branch *b,
                                            float *room, int H, int KV, int hd) {
    int64_t width = (H + 2 * KV) * hd;
    const float *own = qkv + b->first_row * width, *all = own;
    if (b->start > 0) {
        memcpy(room, qkv + b->root_row * width, (size_t)(b->start * width) * sizeof(float));
        memcpy(room + b->start * width, own, (size_t)(b->rows * width) * sizeof(float));
        all = room;
    }
    attention_forward(out + (int64_t)b->first_row * H * hd, lse, all, 1, b->start + b->rows, b->start, H, KV,
                      hd);
}

// threads take branches in turn; of a single one they take the heads
static inline void branches_attention_forward(float *out, const float *qkv, const Branch *branches, int B,
                                              int T, int H, int KV, int hd) {
#pragma omp parallel if (B > 1)
    {
        float *room = NEW(float, (int64_t)T *(H + 2 * KV) * hd);
        float *lse = NEW(float, (int64_t)T *H);
#pragma omp for schedule(dynamic)
        for (int b = 0; b < B; b++) {
            if (branches[b].rows > 0) {
                branch_attention_forward(out, lse, qkv, &branches[b], room, H, KV, hd);
            }
        }
        free(room);
        free(lse);
    }
}

#endif
