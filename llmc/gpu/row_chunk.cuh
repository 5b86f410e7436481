/*
What a grouped GEMM is told of the rows it works on: a chunk of a layer's rows, sorted by expert
(dispatch.cuh), where what backward needs of them is kept (arena.cuh), and which kernels to use.

    rows    0 ...... offsets[1] ...... offsets[2] ...        expert e: offsets[e] .. offsets[e + 1] - 1
    chunk   first .. first + rows - 1, as far as they exist: the device alone knows how many do
*/
#ifndef ROW_CHUNK_CUH
#define ROW_CHUNK_CUH

#include "llmc/dispatch.cuh"
#include "llmc/gpu/cuda_common.cuh"
// defines: ROW_ALIGN, of which the offsets are multiples; Kernels

typedef struct {
    const int *offsets;      // [E + 1] first row of each expert's segment: multiples of ROW_ALIGN
    const int *token_of_row; // by the row's number in the layer; -1 in pads
    const float *gate_of_row;
    int experts;
    int first, rows;
    Kernels kernels;
    int fresh; // weight gradients: there is nothing to add to yet
} RowChunk;

// is the expert's weight gradient set, not added to? In the chunk with its first row, if it is fresh
__device__ __forceinline__ bool sets_gradient(const RowChunk &chunk, int expert) {
    return chunk.fresh && chunk.offsets[expert] >= chunk.first;
}

// H, in one buffer [rows, 3F] for all chunks. A row is G, U = its up-projection, and gate A, the
// down-projection's input, where A = silu(G) U; backward turns G, U into dG, dU and reads gate A again. The
// first `kept` rows stay until backward has read them; a chunk that lies behind them is in scratch, where the
// next one overwrites it
typedef struct {
    floatX *buffer;
    int64_t rows, kept;
    const int64_t *first; // where this chunk's H begins, in rows; the device decides (arena.cuh)
    int alone;            // no backward follows: up_forward writes gate A, and leaves G and U out
} ChunkH;

// does backward find the chunk's H? Else it must be computed again
__device__ __forceinline__ bool is_kept(const ChunkH &h) {
    return *h.first < h.kept;
}

#endif
