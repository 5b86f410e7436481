/*
Grouped GEMM on any GPU with tensor cores (mma.sync, sm_80 and later), and in fp32: the functions of
grouped_gemm.cuh, which has the table of the six products, in namespace portable. They are one kernel, for
operands (grouped_portable_load.cuh) and an epilogue (grouped_portable_epilogues.cuh); a fixed grid of blocks
walks over the tiles of C (grouped_portable_tiles.cuh). In the products over rows an expert's rows are lines
of C, in the weight gradients they are summed over.

1. A block computes tiles of 128 x 128 of C: four warps, each 64 x 64 in 128 registers a thread. A warp reads
   64 + 64 lines from shared memory for 64 x 64 products; a smaller part would wait for shared memory.
2. Shared memory is a ring of four stages of 64 bytes along k, filled by cp.async three steps ahead of the
   tensor cores and right across the end of a tile: the next tile's loads run during the epilogue. Two blocks
   share a multiprocessor, so that one's products cover the other's epilogue.
3. The gather costs nothing: cp.async reads 16 bytes from anywhere, each line from its token's row. Token -1
   (a pad) and whatever is beyond an edge of C or of k are read as zeros, so no size need be a multiple of a
   tile. Rows are 16 bytes longer in shared memory than their content: ldmatrix then meets every bank once.
4. A thread holds columns 2t, 2t + 1 of each 8 of C. Where weights are stored [n][k], their lines are permuted
   on the way in, so that these pairs are 8 neighbours of C: 16 bytes to store. The same permutation sets gate
   and up lines side by side: one thread has G and U of the same column. For [k][n] four lanes exchange pairs.
5. Segments and chunks are multiples of 64 rows, a warp's height: a warp's rows all exist or none does.

Every element of C is the sum over k in steps of 16, in order, by one thread: no bit depends on the number of
blocks, nor, in the products over rows, on the rows around it: H computed again in backward is the same H. A
weight's gradient is added chunk by chunk.

Shapes: grouped_gemm.cuh. Errors: none; 80 KB and 8 (E + 1) bytes of shared memory must fit a block.
*/
#ifndef GROUPED_PORTABLE_CUH
#define GROUPED_PORTABLE_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/grouped_portable_epilogues.cuh"
#include "llmc/gpu/grouped_portable_load.cuh"
#include "llmc/gpu/grouped_portable_tiles.cuh"
#include "llmc/gpu/mma.cuh"
// defines: the epilogues; Operand, TileLoader; Shape, Sizes, WarpSums, fill_table, find_tile; load_a, load_b,
// mma

namespace portable {

// ----------------------------------------------------------------------------
// products

// Where a warp's part of the operands is in a stage
template <class A, class B> struct WarpPlace {
    typedef TileLoader<A, B> Loader;
    enum { LDA = Loader::CopyA::LD, LDB = Loader::CopyB::LD };
    int a, b;

    __device__ __forceinline__ explicit WarpPlace(int warp) {
        int m = warp / Shape::WARPS_N * Shape::WARP_M, n = warp % Shape::WARPS_N * Shape::WARP_N;
        a = A::LAYOUT == BY_LINE ? m * LDA : m;
        b = Loader::CopyA::ELEMENTS + (B::LAYOUT == BY_LINE ? n * LDB : n);
    }
};

#ifdef PRECISION_FP32
// the same elements by the same lanes, without the detour over fragments
template <class A, class B>
__device__ __forceinline__ void multiply(WarpSums &sums, const floatX *stage, WarpPlace<A, B> place) {
    typedef Shape S;
    typedef WarpPlace<A, B> Place;
    const int line_a = A::LAYOUT == BY_LINE ? Place::LDA : 1, step_a = A::LAYOUT == BY_LINE ? 1 : Place::LDA;
    const int line_b = B::LAYOUT == BY_LINE ? Place::LDB : 1, step_b = B::LAYOUT == BY_LINE ? 1 : Place::LDB;
    int g = lane_id() / 4, t = lane_id() % 4;
    const floatX *tile_a = stage + place.a, *tile_b = stage + place.b;
#pragma unroll 1
    for (int k = 0; k < S::K; k++) {
        float b[S::WARP_N / 4];
#pragma unroll
        for (int j = 0; j < S::WARP_N / 4; j++) {
            b[j] = tile_b[(8 * (j / 2) + 2 * t + j % 2) * line_b + k * step_b];
        }
#pragma unroll
        for (int i = 0; i < S::WARP_M / 8; i++) {
            float a = tile_a[(8 * i + g) * line_a + k * step_a];
#pragma unroll
            for (int j = 0; j < S::WARP_N / 4; j++) {
                sums.c[i / 2][j / 2][i % 2 * 2 + j % 2] += a * b[j];
            }
        }
    }
}
#else
template <class A, class B>
__device__ __forceinline__ void multiply(WarpSums &sums, const floatX *stage, WarpPlace<A, B> place) {
    typedef Shape S;
    const int lda = place.LDA, ldb = place.LDB;
    const floatX *tile_a = stage + place.a, *tile_b = stage + place.b;
#pragma unroll
    for (int k = 0; k < S::K; k += 16) {
        FragA a[S::WARP_M / 16];
#pragma unroll
        for (int i = 0; i < S::WARP_M / 16; i++) {
            if (A::LAYOUT == BY_LINE) {
                load_a(a[i], tile_a + 16 * i * lda + k, lda);
            } else {
                load_a_trans(a[i], tile_a + k * lda + 16 * i, lda);
            }
        }
#pragma unroll
        for (int j = 0; j < S::WARP_N / 8; j += 2) {
            FragB b[2];
            if (B::LAYOUT == BY_LINE) {
                load_b2(b, tile_b + 8 * j * ldb + k, ldb);
            } else {
                load_b2_trans(b, tile_b + k * ldb + 8 * j, ldb);
            }
#pragma unroll
            for (int i = 0; i < S::WARP_M / 16; i++) {
                mma(sums.c[i][j], a[i], b[0]);
                mma(sums.c[i][j + 1], a[i], b[1]);
            }
        }
    }
}
#endif

// Four lanes, each with the pairs of columns 2t, 2t + 1 of four times 8 columns q: lane t ends with all pairs
// of q = t, that of lane q in q's place. A transpose of 4 x 4 pairs: first between lanes (and places) that
// differ in bit 0, then in bit 1
__device__ __forceinline__ void exchange_columns(WarpSums &sums) {
    typedef Shape S;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        bool upper = lane_id() & bit;
#pragma unroll
        for (int i = 0; i < S::WARP_M / 16; i++) {
#pragma unroll
            for (int j = 0; j < S::WARP_N / 8; j++) {
                if (j & bit) {
                    continue;
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float &low = sums.c[i][j][c], &high = sums.c[i][j + bit][c];
                    float other = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
                    low = upper ? other : low;
                    high = upper ? high : other;
                }
            }
        }
    }
}

template <class A, class B, class Epilogue>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS_PER_SM)
    product_kernel(Sizes sizes, A operand_a, B operand_b, Epilogue epilogue) {
    typedef Shape S;
    typedef TileLoader<A, B> Loader;
    if (epilogue.nothing_to_do()) {
        return;
    }
    floatX *stages = (floatX *)shared_memory();
    TableRow *table = (TableRow *)(stages + S::STAGES * Loader::STAGE);
    if (threadIdx.x < 32) {
        fill_table<Loader::BY_EXPERT>(table, sizes);
    }
    __syncthreads();
    Loader loader(sizes, operand_a, operand_b, table);
    for (int stage = 0; stage < S::STAGES - 1; stage++) {
        loader.load(stages + stage * Loader::STAGE);
    }
    int warp = warp_id(), read = 0, write = S::STAGES - 1;
    WarpPlace<A, B> place(warp);
    for (int number = (int)blockIdx.x; number < loader.tiles; number += (int)gridDim.x) {
        // a tile of very few steps has been left behind by the loader
        Tile tile =
            loader.number == number ? loader.tile : find_tile<Loader::BY_EXPERT>(number, table, sizes);
        tile.m += warp / S::WARPS_N * S::WARP_M;
        tile.n += warp % S::WARPS_N * (sizes.tile_n / S::WARPS_N);
        bool inside = tile.m < tile.m_end && tile.n < sizes.N; // else this warp only copies
        WarpSums sums = {};
        for (int k = tile.k; k < tile.k_end; k += S::K) {
            cp_async_wait<S::STAGES - 2>(); // all groups but the youngest ones: this step's has arrived
            __syncthreads(); // everybody's has; and all are done with the stage that is filled next
            loader.load(stages + write * Loader::STAGE);
            if (inside) {
                multiply(sums, stages + read * Loader::STAGE, place);
            }
            read = read + 1 < S::STAGES ? read + 1 : 0;
            write = write + 1 < S::STAGES ? write + 1 : 0;
        }
        if (inside) {
            if (B::LAYOUT == BY_STEP && Epilogue::NEIGHBOURS_IN_A_LANE) {
                exchange_columns(sums);
            }
            epilogue.store(sums, tile);
        }
    }
}

// ----------------------------------------------------------------------------
// the six products

template <class A, class B, class Epilogue>
static void multiply_chunk(Sizes sizes, A a, B b, Epilogue epilogue, cudaStream_t stream) {
    typedef Shape S;
    typedef TileLoader<A, B> Loader;
    int E = sizes.chunk.experts, segments = sizes.chunk.rows / S::WARP_M; // experts with rows are not more
    int most_rows = Loader::BY_EXPERT ? min(E, segments) * ceil_div<int>(sizes.M, S::M)
                                      : min(segments, sizes.chunk.rows / S::M + E);
    int blocks = min(S::BLOCKS_PER_SM * num_sms(), most_rows * ceil_div(sizes.N, sizes.tile_n));
    size_t shared_bytes = S::STAGES * Loader::STAGE * sizeof(floatX) + (size_t)(E + 1) * sizeof(TableRow);
    launch(product_kernel<A, B, Epilogue>, blocks, S::THREADS, shared_bytes, stream, sizes, a, b, epilogue);
}

// C's rows are the chunk's
static inline Sizes sizes_by_rows(RowChunk chunk, int N, int K, int tile_n = Shape::N) {
    Sizes sizes = {chunk, 0, K, N, tile_n};
    return sizes;
}

// C is a matrix an expert, the chunk's rows are summed over
static inline Sizes sizes_by_expert(RowChunk chunk, int M, int N) {
    Sizes sizes = {chunk, M, 0, N, Shape::N};
    return sizes;
}

// dH = [dG | dU]
template <OperandLayout LAYOUT> static Operand<LAYOUT, IN_ORDER> rows_of_dh(ChunkH h, int F) {
    Operand<LAYOUT, IN_ORDER> operand = {NULL, h, 0, 2 * F, 3 * F, 0, NULL};
    return operand;
}

// gate A
template <OperandLayout LAYOUT> static Operand<LAYOUT, IN_ORDER> rows_of_a(ChunkH h, int F) {
    Operand<LAYOUT, IN_ORDER> operand = {NULL, h, 2 * F, F, 3 * F, 0, NULL};
    return operand;
}

template <OperandLayout LAYOUT>
static Operand<LAYOUT, GATHERED> rows_of_tokens(const floatX *data, int width, RowChunk chunk) {
    Operand<LAYOUT, GATHERED> operand = {
        data, ChunkH(), 0, width, width, 0, chunk.token_of_row + chunk.first};
    return operand;
}

template <OperandLayout LAYOUT, OperandRows ROWS>
static Operand<LAYOUT, ROWS> weights(const floatX *data, int width, int64_t per_expert) {
    Operand<LAYOUT, ROWS> operand = {data, ChunkH(), 0, width, width, per_expert, NULL};
    return operand;
}

// G, U = X' W_gate_up^T; gate A. again: backward's call, only for what is not kept
static inline void grouped_up_forward(ChunkH h, int again, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    SwigluForward epilogue = {h, again, chunk.gate_of_row + chunk.first, F};
    multiply_chunk(sizes_by_rows(chunk, F, d, Shape::N / 2), rows_of_tokens<BY_LINE>(x, d, chunk),
                   weights<BY_LINE, GATE_UP>(w_gate_up, d, (int64_t)2 * F * d), epilogue, stream);
}

// Y = (gate A) W_down^T
static inline void grouped_down_forward(floatX *y, ChunkH h, const floatX *w_down, RowChunk chunk, int d,
                                        int F, cudaStream_t stream) {
    StoreRows epilogue = {y, d};
    multiply_chunk(sizes_by_rows(chunk, d, F), rows_of_a<BY_LINE>(h, F),
                   weights<BY_LINE, PERMUTED>(w_down, F, (int64_t)d * F), epilogue, stream);
}

// partial sums that grouped_down_backward writes of each row's <dA', A>
static inline int grouped_dgate_tiles(int F) {
    return ceil_div<int>(F, Shape::WARP_N);
}

// dA' = dO' W_down; G, U become dG, dU; dgate_partial [R, grouped_dgate_tiles(F)]
static inline void grouped_down_backward(ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    SwigluBackward epilogue = {h, dgate_partial, chunk.gate_of_row + chunk.first, F, grouped_dgate_tiles(F)};
    multiply_chunk(sizes_by_rows(chunk, F, d), rows_of_tokens<BY_LINE>(dy, d, chunk),
                   weights<BY_STEP, IN_ORDER>(w_down, F, (int64_t)d * F), epilogue, stream);
}

// dW_down[e] += dO'^T (gate A)
static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, ChunkH h, RowChunk chunk, int d,
                                      int F, cudaStream_t stream) {
    AddToWeights epilogue = {dw_down, d, F, chunk};
    multiply_chunk(sizes_by_expert(chunk, d, F), rows_of_tokens<BY_STEP>(dy, d, chunk),
                   rows_of_a<BY_STEP>(h, F), epilogue, stream);
}

// dW_gate_up[e] += dH^T X'
static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    AddToWeights epilogue = {dw_gate_up, 2 * F, d, chunk};
    multiply_chunk(sizes_by_expert(chunk, 2 * F, d), rows_of_dh<BY_STEP>(h, F),
                   rows_of_tokens<BY_STEP>(x, d, chunk), epilogue, stream);
}

// dX' = dH W_gate_up
static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    StoreRows epilogue = {dx, d};
    multiply_chunk(sizes_by_rows(chunk, d, 2 * F), rows_of_dh<BY_LINE>(h, F),
                   weights<BY_STEP, IN_ORDER>(w_gate_up, d, (int64_t)2 * F * d), epilogue, stream);
}

} // namespace portable

#endif
