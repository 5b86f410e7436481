/*
Where each id stands: the token embedding's gradient as a list of sums that a GPU can add up in a fixed order.

    dtable[v] += sum over the positions n with ids[n] = v, in ascending n, of dout[n]

Adding every position's row at once, each where it belongs, would leave the order of a row's additions to
chance. So the host, which has the ids first, sorts the positions by id (a stable counting sort: within an id
they ascend) and cuts each id's into pieces of at most PIECE_POSITIONS: in any text a few ids have thousands.

    ids        5 2 5 5 2 9                 with PIECE_POSITIONS = 2
    position   1 4 | 0 2 | 3 | 5           piece 0 is id 2, pieces 1 and 2 are id 5, piece 3 is id 9
    piece_to    2    -1   -2   9           >= 0: the sum of an id's only piece is added to that row of dtable;
                                           -1 - r: it is partial row r
    long ids   5: partial rows 0, 1        added in order, then to dtable

All of it lies in one array of ints of a size that depends on N alone, so that it is copied to a device at
once and a CUDA graph of a micro-step serves every batch.

Shapes: N positions, V ids; every id is in 0 .. V - 1. Errors: none.
*/
#ifndef POSITIONS_H
#define POSITIONS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
// defines: size_t, int64_t, memset

enum { PIECE_POSITIONS = 64 };

typedef struct {
    int *counts;      // [2] pieces, long ids
    int *position;    // [N] by id
    int *piece_first; // [N + 1] piece p is position[piece_first[p]] .. position[piece_first[p + 1] - 1]
    int *piece_to;    // [N]
    int *long_id;     // [long_ids_most(N)]
    int *long_first;  // [long_ids_most(N) + 1] first partial row; those of long id l end where l + 1's begin
} EmbeddingPlan;

// ids with more than one piece have at least PIECE_POSITIONS + 1 positions ...
static inline int64_t long_ids_most(int64_t N) {
    return N / (PIECE_POSITIONS + 1);
}

// ... and at most 2 partial rows for every PIECE_POSITIONS + 1 positions
static inline int64_t partial_rows_most(int64_t N) {
    return 2 * N / (PIECE_POSITIONS + 1);
}

static inline size_t embedding_plan_ints(int64_t N) {
    return (size_t)(2 + N + (N + 1) + N + long_ids_most(N) + (long_ids_most(N) + 1));
}

// the plan's arrays in embedding_plan_ints(N) ints, of the host or of a device
static inline EmbeddingPlan embedding_plan_in(int *memory, int64_t N) {
    EmbeddingPlan plan;
    plan.counts = memory;
    plan.position = plan.counts + 2;
    plan.piece_first = plan.position + N;
    plan.piece_to = plan.piece_first + N + 1;
    plan.long_id = plan.piece_to + N;
    plan.long_first = plan.long_id + long_ids_most(N);
    return plan;
}

// what has been laid out so far
typedef struct {
    int position, piece, long_id, row;
} EmbeddingPlanEnd;

// the pieces of an id that has n positions
static inline void embedding_plan_id(EmbeddingPlan plan, EmbeddingPlanEnd *end, int id, int n) {
    int pieces = (n + PIECE_POSITIONS - 1) / PIECE_POSITIONS;
    if (pieces > 1) {
        plan.long_id[end->long_id] = id;
        plan.long_first[end->long_id] = end->row;
        end->long_id++;
    }
    for (int i = 0; i < pieces; i++) {
        plan.piece_first[end->piece] = end->position + i * PIECE_POSITIONS;
        plan.piece_to[end->piece] = pieces > 1 ? -1 - end->row++ : id;
        end->piece++;
    }
    end->position += n;
}

// fills the plan (in host memory); place [V] is scratch
static inline void embedding_plan(EmbeddingPlan plan, const int *ids, int64_t N, int V, int *place) {
    EmbeddingPlanEnd end = {0, 0, 0, 0};
    memset(place, 0, sizeof(int) * (size_t)V);
    for (int64_t n = 0; n < N; n++) {
        place[ids[n]]++;
    }
    for (int v = 0; v < V; v++) { // from how many there are to where they begin
        int count = place[v];
        place[v] = end.position;
        if (count > 0) {
            embedding_plan_id(plan, &end, v, count);
        }
    }
    for (int64_t n = 0; n < N; n++) {
        plan.position[place[ids[n]]++] = (int)n;
    }
    plan.piece_first[end.piece] = end.position;
    plan.long_first[end.long_id] = end.row;
    plan.counts[0] = end.piece;
    plan.counts[1] = end.long_id;
}

#endif
