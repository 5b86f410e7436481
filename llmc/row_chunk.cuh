/*
What a grouped GEMM is told of the rows it works on: a chunk of a layer's rows, sorted by expert (dispatch.cuh),
where their up-projections H are kept (arena.cuh), and which kernels to use.

    rows    0 ...... offsets[1] ...... offsets[2] ...        expert e: offsets[e] .. offsets[e + 1] - 1
    chunk   first .. first + rows - 1, as far as they exist: the device alone knows how many do
*/
#ifndef ROW_CHUNK_CUH
#define ROW_CHUNK_CUH

#include "cuda_common.cuh"

typedef struct {
    const int *offsets;      // [E + 1] first row of each expert's segment: multiples of 64
    const int *token_of_row; // by the row's number in the layer; -1 in pads
    const float *gate_of_row;
    int experts;
    int first, rows;
    Kernels kernels;
} RowChunk;

typedef struct { // H of a chunk [R, 2F]
    floatX *store;
    floatX *scratch;
    const int64_t *place; // its place in the store, or -1: it is in scratch
} ChunkH;

#endif
