/*
Token embedding on the device.

    forward   out[n] = table[ids[n]]
    backward  dtable[v] += sum over the positions n with ids[n] = v of dout[n], in a fixed order

Forward: a warp copies a row. Backward: the sums are listed by positions.h. A warp takes a piece (at most 64
positions of one id) and 32 packs of columns, adds the rows in ascending position in fp32, and either adds the
sum to dtable (the id's only piece) or leaves it as a partial row; a second kernel adds the partial rows of
each id in order. Every row of dtable has one writer per kernel, so there is nothing to be atomic about.

The numbers of pieces are read from device memory and the warps walk over them, so that the launch is the same
for every batch. Bytes that have to move: dout once, and one row of dtable read and written for every id seen.

Shapes: ids [N], table [V, d] floatX, out, dout [N, d], dtable [V, d] fp32; d a multiple of 8. Equals
embedding_forward, embedding_backward of embedding.h up to the order of the sums. Errors: none.
*/
#ifndef EMBEDDING_CUH
#define EMBEDDING_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/files/positions.h"
// defines: Floats, widen, add_to; EmbeddingPlan, partial_rows_most

enum { EMBEDDING_THREADS = 256, EMBEDDING_COLUMNS = 32 * PACK_X }; // columns: of one warp

static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_forward_kernel(floatX *out, const int *ids, const floatX *table, int64_t N, int d) {
    int64_t n = ((int64_t)blockIdx.x * EMBEDDING_THREADS + threadIdx.x) / 32;
    if (n < N) {
        const floatX *row = table + (int64_t)ids[n] * d;
        for (int c = (int)(threadIdx.x % 32) * PACK_X; c < d; c += EMBEDDING_COLUMNS) {
            store_pack(out + n * d + c, load_pack(row + c));
        }
    }
}

static inline void embedding_forward(floatX *out, const int *ids, const floatX *table, int64_t N, int d,
                                     cudaStream_t stream) {
    launch(embedding_forward_kernel, dim3((unsigned)ceil_div<int64_t>(N * 32, EMBEDDING_THREADS)),
           EMBEDDING_THREADS, 0, stream, out, ids, table, N, d);
}

// this thread's warp among all, and how many there are
typedef struct {
    int64_t warp, warps;
} WarpOfGrid;

__device__ __forceinline__ WarpOfGrid warp_of_grid() {
    WarpOfGrid all = {((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32,
                      (int64_t)gridDim.x * blockDim.x / 32};
    return all;
}

// PACK_X columns of a row += sum
__device__ __forceinline__ void add_to_row(float *row, const Floats &sum) {
    Floats total = load_floats(row);
    add_to(total, sum);
    store_floats(row, total);
}

static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_pieces_kernel(float *dtable, float *partial, const floatX *dout, EmbeddingPlan plan, int d) {
    int slabs = ceil_div<int>(d, EMBEDDING_COLUMNS);
    WarpOfGrid me = warp_of_grid();
    for (int64_t item = me.warp; item < (int64_t)plan.counts[0] * slabs; item += me.warps) {
        int64_t piece = item / slabs;
        int c = (int)(item % slabs * 32 + threadIdx.x % 32) * PACK_X;
        if (c < d) {
            Floats sum = {};
            int last = plan.piece_first[piece + 1];
            for (int i = plan.piece_first[piece]; i < last; i++) {
                add_to(sum, widen(load_pack(dout + (int64_t)plan.position[i] * d + c)));
            }
            int to = plan.piece_to[piece];
            if (to >= 0) {
                add_to_row(dtable + (int64_t)to * d + c, sum);
            } else {
                store_floats(partial + (int64_t)(-1 - to) * d + c, sum);
            }
        }
    }
}

static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    embedding_long_ids_kernel(float *dtable, const float *partial, EmbeddingPlan plan, int d) {
    int slabs = ceil_div<int>(d, EMBEDDING_COLUMNS);
    WarpOfGrid me = warp_of_grid();
    for (int64_t item = me.warp; item < (int64_t)plan.counts[1] * slabs; item += me.warps) {
        int64_t l = item / slabs;
        int c = (int)(item % slabs * 32 + threadIdx.x % 32) * PACK_X;
        if (c < d) {
            Floats sum = {};
            int last = plan.long_first[l + 1];
            for (int row = plan.long_first[l]; row < last; row++) {
                add_to(sum, load_floats(partial + (int64_t)row * d + c));
            }
            add_to_row(dtable + (int64_t)plan.long_id[l] * d + c, sum);
        }
    }
}

// plan: in device memory; partial [partial_rows_most(N), d] scratch
static inline void embedding_backward(float *dtable, const floatX *dout, EmbeddingPlan plan, float *partial,
                                      int64_t N, int d, cudaStream_t stream) {
    // a multiprocessor runs 2048 threads at a time; the second kernel gets fewer, since long ids are few
    unsigned blocks = (unsigned)(num_sms() * (2048 / EMBEDDING_THREADS));
    launch(embedding_pieces_kernel, dim3(blocks), EMBEDDING_THREADS, 0, stream, dtable, partial, dout, plan,
           d);
    if (long_ids_most(N) > 0) {
        launch(embedding_long_ids_kernel, dim3(blocks / 4), EMBEDDING_THREADS, 0, stream, dtable, partial,
               plan, d);
    }
}

#endif
