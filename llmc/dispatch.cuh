/*
Dispatch on the device: from the pair list (token-major) to the experts' rows (expert-major) and back. The
same functions as dispatch.h, on the same order of rows, with one difference: each expert's segment begins at
a multiple of ROW_ALIGN = 64 rows, so that the 64 rows that a warp (portable) or a warpgroup (Hopper) of the
grouped GEMM multiplies belong to one expert.

    count    n_e = number of tokens of expert e (the pair list has it)
    sort     offsets = exclusive prefix sum of n_e rounded up to 64; a stable counting sort gives pair p
             row row_of_pair[p] = offsets[e] + (number of earlier tokens of e): an expert's tokens ascend
             pad rows, n_e .. offsets[e + 1] - offsets[e] - 1 of a segment: token -1, gate 0
    gather   done by the GEMM that reads the rows: X'[row] = x[token_of_row[row]]
    combine  y_t = residual_t + sum over t's pairs, ascending expert, of Y[row_of_pair[p]]          (Eq. 1)
             the rows have their gates already (grouped_gemm.cuh)
    dgate    dgate_p = sum over tiles of dgate_partial[row_of_pair[p]]: from rows back to pairs

How the sort runs in parallel and stays stable. A token has an expert at most once, so for 64 tokens the
pairs are a bitmap, 64 bits per expert. A block sets its tokens' bits, and then both numbers a counting sort
needs are population counts, in whatever order the threads came:

    expert e of a block   bit t: token t has expert e     0 1 1 0 0 1 0 0 ...
        its count                                         popc(all bits)
        rank of token t                                   popc(bits below t)

    1. histogram[e][block] = count                        every block its column
    2. histogram[e][block] -> first row: a prefix sum     expert after expert, block after block
    3. row_of_pair[p] = histogram[e][block] + rank        every block its pairs again

Combine and dgate work on a chunk of rows at a time (rows first .. first + chunk_rows - 1; arena.cuh says
why). A token's rows ascend with its pairs, so those in the chunk are neighbours in its list. The sum is
carried from chunk to chunk in fp32 and rounded once, after the last: the same additions in the same order,
however many chunks there are. Chunks are launched for the largest possible number of rows; the trailing ones
may be empty. Only the device knows which chunk is the last with rows. That chunk's rows are still in the
shared buffer when the last call runs, so the last call adds them and rounds; the calls in between do nothing.
(So that sum crosses memory once less.) Backward: gather's is the combine; combine's is in experts.cuh.

Shapes: x, y, residual [N, d] floatX, y may be residual; Y [chunk_rows, d], indexed from the chunk's first
row; sum [N, d] fp32; d a multiple of 8. Equals dispatch_sort and dispatch_combine (without gates) of
dispatch.h, and the last loop of experts_backward in experts.h. Errors: none; 12 E bytes of shared memory
must fit a block.
*/
#ifndef DISPATCH_CUH
#define DISPATCH_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/sums.cuh"
#include "llmc/pairs.cuh"
// defines: launch, floatX, Floats, load_packs, add_to, DevicePairs, block_exclusive_sum

enum { ROW_ALIGN = 64 };

typedef struct {
    int *offsets;       // [E + 1] rows of expert e: offsets[e] .. offsets[e + 1] - 1, pads included
    int *row_of_pair;   // [N E]
    int *token_of_row;  // [N E + ROW_ALIGN E] -1 in pads
    float *gate_of_row; // [N E + ROW_ALIGN E] 0 in pads
} DeviceDispatch;

// ----------------------------------------------------------------------------
// sort

enum { SORT_TOKENS = 64, SORT_WORDS = SORT_TOKENS / 32, SORT_THREADS = 256, PREFIX_THREADS = 512 };
static_assert(SORT_TOKENS % 32 == 0, "the bitmap is whole words");
static_assert((SORT_TOKENS & (SORT_TOKENS - 1)) == 0, "sort_token halves the tokens until one is left");
static_assert(PREFIX_THREADS % 32 == 0, "block_exclusive_sum wants whole warps");

__host__ __device__ __forceinline__ int padded_rows(int rows) {
    return ceil_div<int>(rows, ROW_ALIGN) * ROW_ALIGN;
}

// a block's tokens, in shared memory
typedef struct {
    int *starts;      // [SORT_TOKENS + 1] first pair of each token; tokens beyond N own none
    unsigned *bitmap; // [E][SORT_WORDS] bit t: token t has the expert
} SortBlock;

// the token of the block that owns pair p: the last one that begins at or before p
__device__ __forceinline__ int sort_token(const int *starts, int p) {
    int t = 0;
    for (int step = SORT_TOKENS / 2; step > 0; step /= 2) {
        t += starts[t + step] <= p ? step : 0;
    }
    return t;
}

// Many threads may set bits of one word: an integer OR, of which no order shows
__device__ __forceinline__ void sort_mark(SortBlock block, DevicePairs pairs, int N, int E) {
    for (int i = threadIdx.x; i <= SORT_TOKENS; i += SORT_THREADS) {
        int t = (int)blockIdx.x * SORT_TOKENS + i;
        block.starts[i] = pairs.row_start[t < N ? t : N];
    }
    for (int i = threadIdx.x; i < E * SORT_WORDS; i += SORT_THREADS) {
        block.bitmap[i] = 0;
    }
    __syncthreads();
    int end = block.starts[SORT_TOKENS];
    for (int p = block.starts[0] + (int)threadIdx.x; p < end; p += SORT_THREADS) {
        int t = sort_token(block.starts, p);
        atomicOr(&block.bitmap[pairs.expert[p] * SORT_WORDS + t / 32], 1u << (t % 32));
    }
    __syncthreads();
}

// tokens of the block before t that have the expert
__device__ __forceinline__ int sort_rank(const unsigned *words, int t) {
    int rank = __popc(words[t / 32] & bits_below(t % 32));
    for (int word = 0; word < t / 32; word++) {
        rank += __popc(words[word]);
    }
    return rank;
}

static __global__ void __launch_bounds__(SORT_THREADS)
    sort_histogram_kernel(int *histogram, DevicePairs pairs, int N, int E) {
    __shared__ int starts[SORT_TOKENS + 1];
    SortBlock block = {starts, (unsigned *)shared_memory()};
    sort_mark(block, pairs, N, E);
    for (int e = threadIdx.x; e < E; e += SORT_THREADS) {
        int count = 0;
        for (int word = 0; word < SORT_WORDS; word++) {
            count += __popc(block.bitmap[e * SORT_WORDS + word]);
        }
        histogram[(int64_t)e * gridDim.x + blockIdx.x] = count;
    }
}

// rows of the experts before e, pads included
__device__ __forceinline__ int sort_first_row(const int *counts, int e) {
    int rows = 0, total;
    for (int i = threadIdx.x; i < e; i += PREFIX_THREADS) {
        rows += padded_rows(counts[i]);
    }
    block_exclusive_sum(rows, &total);
    return total;
}

// One block per expert: counts of the blocks of tokens become their first rows, and the pads are filled
static __global__ void __launch_bounds__(PREFIX_THREADS)
    sort_prefix_kernel(DeviceDispatch dispatch, int *histogram, const int *counts, int E, int blocks) {
    int e = blockIdx.x;
    int first = sort_first_row(counts, e);
    int end = first + padded_rows(counts[e]);
    int row = first;
    for (int begin = 0; begin < blocks; begin += PREFIX_THREADS) {
        int b = begin + (int)threadIdx.x, total;
        int64_t at = (int64_t)e * blocks + b;
        int before = block_exclusive_sum(b < blocks ? histogram[at] : 0, &total);
        if (b < blocks) {
            histogram[at] = row + before;
        }
        row += total;
    }
    for (int pad = first + counts[e] + (int)threadIdx.x; pad < end; pad += PREFIX_THREADS) {
        dispatch.token_of_row[pad] = -1;
        dispatch.gate_of_row[pad] = 0.0f;
    }
    if (threadIdx.x == 0) {
        dispatch.offsets[e] = first;
        if (e == E - 1) {
            dispatch.offsets[E] = end;
        }
    }
}

static __global__ void __launch_bounds__(SORT_THREADS)
    sort_write_kernel(DeviceDispatch dispatch, const int *histogram, DevicePairs pairs, int N, int E) {
    __shared__ int starts[SORT_TOKENS + 1];
    SortBlock block = {starts, (unsigned *)shared_memory()};
    int *first_row = (int *)block.bitmap + E * SORT_WORDS;
    for (int e = threadIdx.x; e < E; e += SORT_THREADS) {
        first_row[e] = histogram[(int64_t)e * gridDim.x + blockIdx.x];
    }
    sort_mark(block, pairs, N, E); // its barriers cover first_row too
    int end = starts[SORT_TOKENS];
    for (int p = starts[0] + (int)threadIdx.x; p < end; p += SORT_THREADS) {
        int e = pairs.expert[p], t = sort_token(starts, p);
        int row = first_row[e] + sort_rank(block.bitmap + e * SORT_WORDS, t);
        dispatch.row_of_pair[p] = row;
        dispatch.token_of_row[row] = (int)blockIdx.x * SORT_TOKENS + t;
        dispatch.gate_of_row[row] = pairs.gate[p];
    }
}

static inline size_t dispatch_scratch_bytes(int N, int E) {
    return (size_t)ceil_div<int>(N, SORT_TOKENS) * (size_t)E * sizeof(int); // the histogram
}

static inline void dispatch_sort(DeviceDispatch dispatch, DevicePairs pairs, int N, int E, void *scratch,
                                 cudaStream_t stream) {
    int *histogram = (int *)scratch;
    int blocks = ceil_div<int>(N, SORT_TOKENS);
    size_t bitmap = (size_t)E * SORT_WORDS * sizeof(unsigned), first_row = (size_t)E * sizeof(int);
    launch(sort_histogram_kernel, blocks, SORT_THREADS, bitmap, stream, histogram, pairs, N, E);
    launch(sort_prefix_kernel, E, PREFIX_THREADS, 0, stream, dispatch, histogram, pairs.counts, E, blocks);
    launch(sort_write_kernel, blocks, SORT_THREADS, bitmap + first_row, stream, dispatch, histogram, pairs, N,
           E);
}

// ----------------------------------------------------------------------------
// combine

// the first of a token's pairs begin .. end - 1 whose row is `row` or beyond; end if there is none
__device__ __forceinline__ int first_pair_from(const int *row_of_pair, int begin, int end, int64_t row) {
    while (begin < end) {
        int middle = begin + (end - begin) / 2;
        if (row_of_pair[middle] < row) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// first row of the last chunk that has any, or `first` if that chunk begins later; num_rows: offsets[E]
__device__ __forceinline__ int last_chunk_first(const int *num_rows, int first, int chunk_rows) {
    return first > 0 ? min(first, max(*num_rows - 1, 0) / chunk_rows * chunk_rows) : 0;
}

// The rows that a combine adds, and what those of earlier chunks came to
typedef struct {
    const floatX *rows;    // [chunk_rows, d]
    float *sum;            // [N, d] of the chunks before; not read when there is none
    int first, chunk_rows; // first row of the chunk, rows that it may have
    DevicePairs pairs;
    DeviceDispatch dispatch;
    int E;
} CombineChunk;

// y = residual + sum, rounded once; residual NULL: 0
__device__ __forceinline__ void store_residual_sum(floatX *y, const floatX *residual, Floats sum) {
    if (residual != NULL) {
        add_to(sum, widen(load_pack(residual)));
    }
    store_pack(y, narrow(sum));
}

enum { COMBINE_THREADS = 256 };

// A thread owns 16 bytes of one token's y; as many threads as that makes keep the memory busy. The rows'
// loads do not depend on each other, and four are under way at a time.
static __global__ void __launch_bounds__(COMBINE_THREADS)
    dispatch_combine_kernel(floatX *y, const floatX *residual, CombineChunk chunk, int N, int d,
                            int last_chunk) {
    const int *row_of_pair = chunk.dispatch.row_of_pair, *num_rows = chunk.dispatch.offsets + chunk.E;
    int first = chunk.first;
    if (last_chunk) {
        first = last_chunk_first(num_rows, first, chunk.chunk_rows);
    } else if ((int64_t)first + chunk.chunk_rows >= *num_rows) {
        return; // the last call's
    }
    unsigned packs = (unsigned)d / PACK_X; // of a token
    unsigned index = blockIdx.x * COMBINE_THREADS + threadIdx.x;
    unsigned t = index / packs;
    if (t >= (unsigned)N) {
        return;
    }
    int column = (int)(index - t * packs) * PACK_X;
    int64_t at = (int64_t)t * d + column;
    int begin = chunk.pairs.row_start[t], end = chunk.pairs.row_start[t + 1];
    begin = first > 0 ? first_pair_from(row_of_pair, begin, end, first) : begin;
    end = first_pair_from(row_of_pair, begin, end, (int64_t)first + chunk.chunk_rows);
    if (begin == end && first > 0 && !last_chunk) {
        return; // the sum stays what it is
    }
    Floats total = first > 0 ? load_floats(chunk.sum + at) : Floats{};
#pragma unroll 4
    for (int p = begin; p < end; p++) {
        int64_t row = row_of_pair[p] - first;
        add_to(total, widen(load_pack(chunk.rows + row * d + column))); // (Eq. 1)
    }
    if (last_chunk) {
        store_residual_sum(y + at, residual != NULL ? residual + at : NULL, total);
    } else {
        store_floats(chunk.sum + at, total);
    }
}

// Adds the chunk's rows to sum, from 0 when first == 0; with last_chunk writes y = residual + sum instead,
// and the rows may be of an earlier chunk, see above. sum is not touched (may be NULL) when the chunk is
// both. residual NULL: 0
static inline void dispatch_combine(floatX *y, float *sum, const floatX *residual, const floatX *rows,
                                    DevicePairs pairs, DeviceDispatch dispatch, int N, int E, int d,
                                    int first, int chunk_rows, int last_chunk, cudaStream_t stream) {
    int64_t threads = (int64_t)N * (d / PACK_X); // less than 2^31, or y alone would be 32 GB
    CombineChunk chunk = {rows, sum, first, chunk_rows, pairs, dispatch, E};
    launch(dispatch_combine_kernel, (unsigned)ceil_div<int64_t>(threads, COMBINE_THREADS), COMBINE_THREADS, 0,
           stream, y, residual, chunk, N, d, last_chunk);
}

// The same sum for a kernel that needs the whole of a token's row: a warp owns a token, a lane PACKS of its
// packs. The lanes fetch the numbers of 32 rows at a time and then add those in the chunk, one after the
// other. The chunk is the last that has rows, chunk.first or an earlier one.
template <int PACKS>
__device__ __forceinline__ void combine_token(Floats (&total)[PACKS], const CombineChunk &chunk, int64_t t,
                                              int d) {
    int lane = (int)threadIdx.x % 32, end = chunk.pairs.row_start[t + 1];
    int first = last_chunk_first(chunk.dispatch.offsets + chunk.E, chunk.first, chunk.chunk_rows);
    for (int i = 0; i < PACKS; i++) {
        int c = (lane + i * 32) * PACK_X;
        total[i] = first > 0 && c < d ? load_floats(chunk.sum + t * d + c) : Floats{};
    }
    for (int begin = chunk.pairs.row_start[t]; begin < end; begin += 32) {
        int p = begin + lane;
        int row = p < end ? chunk.dispatch.row_of_pair[p] - first : -1;
        unsigned here = __ballot_sync(0xffffffffu, row >= 0 && row < chunk.chunk_rows);
        for (; here != 0; here &= here - 1) {
            int next = __ffs((int)here) - 1;
            const floatX *from = chunk.rows + (int64_t)__shfl_sync(0xffffffffu, row, next) * d;
            Bits packs[PACKS];
            load_packs(packs, from, lane * PACK_X, 32 * PACK_X, d);
            for (int i = 0; i < PACKS; i++) {
                add_to(total[i], widen(packs[i]));
            }
        }
    }
}

// ----------------------------------------------------------------------------
// gates' gradient

enum { DGATE_THREADS = 256, DGATE_BLOCKS_PER_SM = 8 };

static __global__ void __launch_bounds__(DGATE_THREADS)
    dispatch_dgate_kernel(float *dgate, const float *dgate_partial, int tiles, DevicePairs pairs,
                          DeviceDispatch dispatch, int N, int first, int chunk_rows) {
    int64_t P = pairs.row_start[N];
    int64_t stride = (int64_t)gridDim.x * DGATE_THREADS;
    for (int64_t p = (int64_t)blockIdx.x * DGATE_THREADS + threadIdx.x; p < P; p += stride) {
        int row = dispatch.row_of_pair[p] - first;
        if (row >= 0 && row < chunk_rows) {
            float sum = 0.0f;
#pragma unroll 8 // whole sectors at a time
            for (int tile = 0; tile < tiles; tile++) {
                sum += dgate_partial[(int64_t)row * tiles + tile];
            }
            dgate[p] = sum;
        }
    }
}

// dgate[p] of the pairs whose rows are in the chunk, the others' stay; dgate_partial [chunk_rows, tiles]
static inline void dispatch_dgate(float *dgate, const float *dgate_partial, int tiles, DevicePairs pairs,
                                  DeviceDispatch dispatch, int N, int E, int first, int chunk_rows,
                                  cudaStream_t stream) {
    int64_t most = ceil_div<int64_t>((int64_t)N * E, DGATE_THREADS), enough = num_sms() * DGATE_BLOCKS_PER_SM;
    launch(dispatch_dgate_kernel, (unsigned)(most < enough ? most : enough), DGATE_THREADS, 0, stream, dgate,
           dgate_partial, tiles, pairs, dispatch, N, first, chunk_rows);
}

#endif
