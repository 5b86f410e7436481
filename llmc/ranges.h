/*
The part of a flat buffer that a process keeps: ranges of its elements, and the way to and from a tensor's.

    ranges         ascending, without overlap; everything where there is one rank
    next_piece     what is kept of one tensor, in pieces that a small buffer on the host can hold
    model_init     first values, piece by piece

Files are read and written by tensors, memory is divided by ranges: a range may cut a tensor anywhere, and
nothing here takes tensors to be adjacent or in order in the buffer. What lies between them belongs to none
and is never looked at. So no process ever holds more than its ranges and one piece.

Shapes: none. Errors: none.
*/
#ifndef RANGES_H
#define RANGES_H

#include "llmc/model.h"

#define MOST_IN_PIECE ((int64_t)1 << 18) // elements: 1 MB, little memory and enough for any disk or bus

typedef enum { BUFFER_PARAMS, BUFFER_GRADS, BUFFER_EXP_AVG, BUFFER_EXP_AVG_SQ } ModelBuffer;

// One of the flat buffers, wherever it lies. get and set copy n elements from `first` on, all within one
// range, to and from the host
typedef struct {
    const TensorTable *table;
    const Range *ranges;
    int count; // of ranges
    void *owner;
    int which; // a ModelBuffer
    void (*get)(void *owner, int which, int64_t first, int64_t n, float *out);
    void (*set)(void *owner, int which, int64_t first, int64_t n, const float *x);
} FlatBuffer;

// State (model.h) is a value like a parameter's, but has neither gradient nor moments
static inline int buffer_tensors(const FlatBuffer *buffer) {
    return buffer->which == BUFFER_PARAMS ? buffer->table->count : buffer->table->trained_count;
}

typedef struct {
    int64_t element; // the first one, counted within its tensor
    int64_t first;   // the same one, within the flat buffer
    int64_t n;
    int range; // that it lies in
} Piece;

static const Piece before_first_piece = {0, 0, 0, 0};

// Moves on to the next piece of the tensor that is kept here. 0: there is none left
static inline int next_piece(Piece *piece, const Tensor *tensor, const FlatBuffer *buffer) {
    int64_t from = tensor->offset + piece->element + piece->n, end = tensor->offset + tensor->size;
    for (; piece->range < buffer->count; piece->range++) {
        const Range *range = &buffer->ranges[piece->range];
        int64_t first = range->first > from ? range->first : from;
        int64_t last = range->first + range->size < end ? range->first + range->size : end;
        if (first < last) {
            piece->element = first - tensor->offset;
            piece->first = first;
            piece->n = last - first < MOST_IN_PIECE ? last - first : (int64_t)MOST_IN_PIECE;
            return 1;
        }
    }
    return 0;
}

// the parameters' first values, the same bits whoever keeps them
static inline void model_init(const FlatBuffer *params, uint64_t seed) {
    float *values = NEW(float, MOST_IN_PIECE);
    for (int i = 0; i < params->table->count; i++) {
        for (Piece p = before_first_piece; next_piece(&p, &params->table->tensors[i], params);) {
            tensor_draw(values, params->table, i, p.element, p.n, seed);
            params->set(params->owner, params->which, p.first, p.n, values);
        }
    }
    free(values);
}

#endif
