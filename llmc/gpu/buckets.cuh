/*
What the owner of a shard does with the gradients that have come for it (buckets.h says who owns what).

    sum_parts     own[i] = part_0[i] + part_1[i] + .. + part_{n-1}[i]      in rank order, fp32
                   squares[b] = sum of own[i]^2 over block b                in double
    sum_squares    *sum = the squares of all blocks of all buckets, in the flat buffer's order

The order is that in which one rank adds the gradients of n micro-batches to each other, so n ranks of one
micro-batch get the bits of one rank with n. A block of squares is added in a tree whose shape is fixed, and
nobody's shard cuts a block: the norm has the same bits on any number of ranks. With one rank there is nothing
to add, and only the squares are left.

    own [shard elements] fp32, in place; the other parts lie in the landing area, slot after slot, `stride`
    elements each: rank p's in slot p, or p - 1 behind the own rank. squares [blocks of the shard]

The price: (n + 1) 4 bytes an element of the shard, 1.25 ms of a small model's step at n = 8 on an H100.
Errors: none.
*/
#ifndef BUCKETS_CUH
#define BUCKETS_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/sums.cuh"
#include "llmc/buckets.h"
// defines: load_pack, store_pack, launch; block_sum_by_halves; Bucket, BUCKET_BLOCK

enum { BUCKET_THREADS = 512 };
static_assert(BUCKET_BLOCK % (BUCKET_THREADS * Pack<float>::SIZE) == 0, "a block's threads move whole packs");

// where rank p's part lies in the landing area of rank `rank`
__host__ __device__ __forceinline__ int landing_slot(int p, int rank) {
    return p < rank ? p : p - 1;
}

static __global__ void __launch_bounds__(BUCKET_THREADS)
    sum_parts_kernel(float *own, const float *landed, int64_t stride, int rank, int ranks, double *squares) {
    const int WIDTH = Pack<float>::SIZE;
    int64_t first = (int64_t)blockIdx.x * BUCKET_BLOCK;
    double sum = 0.0;
    for (int i = (int)threadIdx.x * WIDTH; i < BUCKET_BLOCK; i += BUCKET_THREADS * WIDTH) {
        Pack<float> total = {};
        for (int p = 0; p < ranks; p++) {
            const float *from = p == rank ? own : landed + landing_slot(p, rank) * stride;
            Pack<float> part = load_pack(from + first + i);
            for (int j = 0; j < WIDTH; j++) {
                total.x[j] = p == 0 ? part.x[j] : total.x[j] + part.x[j];
            }
        }
        if (ranks > 1) {
            store_pack(own + first + i, total);
        }
        for (int j = 0; j < WIDTH; j++) {
            sum += (double)total.x[j] * (double)total.x[j];
        }
    }
    double block = block_sum_by_halves<BUCKET_THREADS>(sum);
    if (threadIdx.x == 0) {
        squares[blockIdx.x] = block;
    }
}

// size: elements of the shard, whole blocks
static inline void sum_parts(float *own, const float *landed, int64_t stride, int64_t size, int rank,
                             int ranks, double *squares, cudaStream_t stream) {
    if (size > 0) {
        launch(sum_parts_kernel, dim3((unsigned)(size / BUCKET_BLOCK)), BUCKET_THREADS, 0, stream, own,
               landed, stride, rank, ranks, squares);
    }
}

// a bucket's blocks; block j is rank j / most's, at `place` of its row
static __global__ void __launch_bounds__(BUCKET_THREADS)
    sum_squares_kernel(double *sum, const double *squares, int64_t row, int64_t place, int64_t blocks,
                       int64_t most) {
    double mine = 0.0;
    for (int64_t j = threadIdx.x; j < blocks; j += BUCKET_THREADS) {
        mine += squares[j / most * row + place + j % most];
    }
    double total = block_sum_by_halves<BUCKET_THREADS>(mine);
    if (threadIdx.x == 0) {
        *sum += total;
    }
}

// blocks of a rank's row of squares: of all its shards, each as long as the longest of its bucket
static inline int64_t squares_row(const Bucket *buckets, int count, int ranks) {
    return owned_place(buckets, count, ranks) / BUCKET_BLOCK;
}

// *sum (device) overwritten; squares [ranks, squares_row]
static inline void sum_squares(double *sum, const double *squares, const Bucket *buckets, int count,
                               int ranks, cudaStream_t stream) {
    int64_t row = squares_row(buckets, count, ranks);
    CUDA_CHECK(cudaMemsetAsync(sum, 0, sizeof(double), stream));
    for (int b = 0; b < count; b++) {
        if (buckets[b].size > 0) {
            launch(sum_squares_kernel, 1, BUCKET_THREADS, 0, stream, sum, squares, row,
                   owned_place(buckets, b, ranks) / BUCKET_BLOCK, bucket_blocks(&buckets[b]),
                   owned_most_blocks(&buckets[b], ranks));
        }
    }
}

#endif
