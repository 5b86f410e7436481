/*
Merged experts on the device: another bank for the grouped GEMM. The same functions as merge.h, chunk by
chunk.

    merge_forward    a thread owns 16 bytes of the experts' weights and 8 segments: each weight is read once for
                     all of a chunk's segments. fp32 sums, in the order of the experts, rounded once to bank'
    merge_backward   a block owns 256 columns of the fp32 dbank', and leaves them in shared memory for both
                     results:
                       dbank[e] += sum_c a_ce dbank'[c]     in the order of the segments, from 0
                       da_ce     = <dbank'[c], bank[e]>     a warp 64 of the columns, 4 x 2 sums per lane
                     Then it goes on to the columns one grid further. The blocks' parts of da are added at the
                     end, as many as the sizes alone say.

Memory holds both up: of 32 segments, E = 8, merge_forward writes 32 experts and reads 8 (in bf16),
merge_backward reads 32 in fp32, and reads, adds to and writes 8.

Rows are known to the host: segment c has the rows c R .. (c + 1) R - 1, R = S rounded up to 64, the last of
which may be pads. So nothing is sorted, a chunk of segments is the arena's chunk of rows (arena.cuh: H is
kept or computed again), and the order of no sum depends on how many are kept. Y of all chunks stays until the
combine, N d values: less than the combine's fp32 sums would take from chunk to chunk.

a [N, E] fp32 by token, da [C, E] fp32; bank and bank' [., 2F, d], [., d, F] floatX; their gradients fp32. d
and F multiples of 8. Errors: none.
*/
#ifndef MERGE_CUH
#define MERGE_CUH

#include "llmc/experts.cuh"
#include "llmc/router_lory.cuh"
// defines: DeviceBank, experts_chunk_*, Arena, arena_place_chunks; lory_weights, Segments, MERGE_CHUNK

typedef struct {
    floatX *gate_up, *down;  // [experts, 2F, d], [experts, d, F]
    float *dgate_up, *ddown; // the same shapes; NULL for inference
    float *parts;            // [MERGE_CHUNK, E, MERGE_BLOCKS] of da; the same
    int *contexts;           // [B] of the batch
} DeviceMerged;

// ----------------------------------------------------------------------------
// forward

enum {
    MERGE_THREADS = 256,
    MERGE_SEGMENTS = 8,                                           // of a thread
    MERGE_PACKS = MERGE_THREADS / (MERGE_CHUNK / MERGE_SEGMENTS), // of a block
    MERGE_EXPERTS = 64 // whose weights of merging are in shared memory at once
};
static_assert(MERGE_CHUNK % MERGE_SEGMENTS == 0, "a chunk's segments are shared out evenly");

// segments first .. first + count - 1 of a batch
typedef struct {
    Segments all;
    int first, count;
} DeviceSegments;

// a of the chunk's segment c for expert e, 0 where there is none
__device__ __forceinline__ float chunk_weight(const float *a, const DeviceSegments &chunk, int c, int e,
                                              int E) {
    return c < chunk.count && e < E ? lory_weights(a, chunk.all, chunk.first + c, E)[e] : 0.0f;
}

// to [count][size] = a bank, bank [E][size]
static __global__ void __launch_bounds__(MERGE_THREADS)
    merge_forward_kernel(floatX *to, const float *a, const floatX *bank, DeviceSegments chunk, int E,
                         int64_t size) {
    __shared__ float weights[MERGE_EXPERTS][MERGE_CHUNK];
    int thread = (int)threadIdx.x, c0 = thread / MERGE_PACKS * MERGE_SEGMENTS;
    int64_t at = ((int64_t)blockIdx.x * MERGE_PACKS + thread % MERGE_PACKS) * PACK_X;
    bool works = at < size && c0 < chunk.count;
    Floats sums[MERGE_SEGMENTS] = {};
    for (int e0 = 0; e0 < E; e0 += MERGE_EXPERTS) {
        __syncthreads(); // the earlier experts' weights have been read
        for (int i = thread; i < MERGE_EXPERTS * MERGE_CHUNK; i += MERGE_THREADS) {
            weights[i / MERGE_CHUNK][i % MERGE_CHUNK] =
                chunk_weight(a, chunk, i % MERGE_CHUNK, e0 + i / MERGE_CHUNK, E);
        }
        __syncthreads();
        int here = works ? min(E - e0, (int)MERGE_EXPERTS) : 0;
#pragma unroll 4
        for (int e = 0; e < here; e++) {
            Floats w = widen(load_bits(bank + (e0 + e) * size + at));
            for (int i = 0; i < MERGE_SEGMENTS; i++) {
                add_scaled(sums[i], weights[e][c0 + i], w);
            }
        }
    }
    for (int i = 0; i < MERGE_SEGMENTS && works; i++) {
        if (c0 + i < chunk.count) {
            store_pack(to + (c0 + i) * size + at, narrow(sums[i]));
        }
    }
}

static inline void merge_matrix(floatX *to, const float *a, const floatX *bank, DeviceSegments chunk, int E,
                                int64_t size, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div<int64_t>(size, MERGE_PACKS * PACK_X);
    launch(merge_forward_kernel, blocks, MERGE_THREADS, 0, stream, to, a, bank, chunk, E, size);
}

// bank' of the chunk's segments
static inline void merge_forward(DeviceBank to, const float *a, DeviceBank bank, DeviceSegments chunk,
                                 cudaStream_t stream) {
    int64_t down = (int64_t)bank.F * bank.d;
    merge_matrix((floatX *)to.gate_up, a, bank.gate_up, chunk, bank.E, 2 * down, stream);
    merge_matrix((floatX *)to.down, a, bank.down, chunk, bank.E, down, stream);
}

// ----------------------------------------------------------------------------
// backward

enum {
    UNMERGE_THREADS = 128,
    UNMERGE_WARPS = UNMERGE_THREADS / 32,
    UNMERGE_COLUMNS = 256, // of a tile
    UNMERGE_PITCH =
        UNMERGE_COLUMNS + 4,        // of its rows in shared memory: 8 rows' columns lie in different banks
    UNMERGE_GROUP = 8,              // experts at a time
    UNMERGE_EXPERTS = 32,           // of a block
    UNMERGE_SUMS = MERGE_CHUNK + 8, // pitch of a warp's da
    MERGE_BLOCKS = 1024             // at most, along the columns
};
static_assert(UNMERGE_THREADS * 4 == 2 * UNMERGE_COLUMNS, "a thread has 4 columns, and half of the experts");
static_assert(UNMERGE_GROUP == 2 * 4 && UNMERGE_GROUP * MERGE_CHUNK == 32 * 8, "a lane has 4 x 2 sums");

// a block's shared memory
struct UnmergeTile {
    float dmerged[MERGE_CHUNK][UNMERGE_PITCH];
    float bank[UNMERGE_GROUP][UNMERGE_PITCH];
    float weights[MERGE_CHUNK][UNMERGE_GROUP];
    float da[1][UNMERGE_SUMS]; // [UNMERGE_WARPS experts]: warp w's sums of expert e in row w experts + e
};

static inline int unmerge_experts(int E) {
    return min(ceil_div<int>(E, UNMERGE_GROUP) * UNMERGE_GROUP, (int)UNMERGE_EXPERTS);
}

static inline size_t unmerge_shared_bytes(int E) {
    return sizeof(UnmergeTile) +
           (size_t)(UNMERGE_WARPS * unmerge_experts(E) - 1) * UNMERGE_SUMS * sizeof(float);
}

struct alignas(16) Four {
    float x[4];
};

__device__ __forceinline__ Four load_four(const float *from) {
    return *reinterpret_cast<const Four *>(from);
}

__device__ __forceinline__ void store_four(float *to, const Four &four) {
    *reinterpret_cast<Four *>(to) = four;
}

// columns first .. of dbank', 0 beyond count and size
__device__ __forceinline__ void load_dmerged(UnmergeTile &tile, const float *dmerged, int count,
                                             int64_t first, int64_t size) {
    int column = (int)threadIdx.x * 4 % UNMERGE_COLUMNS, half = (int)threadIdx.x * 4 / UNMERGE_COLUMNS;
    bool inside = first + column < size;
#pragma unroll 8
    for (int c = half; c < MERGE_CHUNK; c += 2) {
        Four four = inside && c < count ? load_four(dmerged + c * size + first + column) : Four{};
        store_four(&tile.dmerged[c][column], four);
    }
}

// the same columns of experts e0 .., and what they are merged with
__device__ __forceinline__ void load_unmerge_group(UnmergeTile &tile, const floatX *bank, const float *a,
                                                   const DeviceSegments &chunk, int e0, int E, int64_t first,
                                                   int64_t size) {
    const int packs = UNMERGE_COLUMNS / PACK_X;
    for (int i = (int)threadIdx.x; i < UNMERGE_GROUP * packs; i += UNMERGE_THREADS) {
        int e = i / packs, column = i % packs * PACK_X;
        bool exists = e0 + e < E && first + column < size;
        store_floats(&tile.bank[e][column],
                     exists ? widen(load_bits(bank + (e0 + e) * size + first + column)) : Floats{});
    }
    for (int i = (int)threadIdx.x; i < MERGE_CHUNK * UNMERGE_GROUP; i += UNMERGE_THREADS) {
        tile.weights[i / UNMERGE_GROUP][i % UNMERGE_GROUP] =
            chunk_weight(a, chunk, i / UNMERGE_GROUP, e0 + i % UNMERGE_GROUP, E);
    }
}

// dbank of 4 columns and 4 of the experts e0 ..
__device__ __forceinline__ void unmerge_weights(float *dbank, const UnmergeTile &tile, int e0, int E,
                                                int64_t first, int64_t size, int set) {
    int column = (int)threadIdx.x * 4 % UNMERGE_COLUMNS, half = (int)threadIdx.x * 4 / UNMERGE_COLUMNS * 4;
    Four sums[4] = {};
#pragma unroll 8
    for (int c = 0; c < MERGE_CHUNK; c++) {
        Four d = load_four(&tile.dmerged[c][column]), w = load_four(&tile.weights[c][half]);
        for (int e = 0; e < 4; e++) {
            for (int i = 0; i < 4; i++) {
                sums[e].x[i] = fmaf(w.x[e], d.x[i], sums[e].x[i]);
            }
        }
    }
    for (int e = 0; e < 4; e++) {
        float *to = dbank + (e0 + half + e) * size + first + column;
        if (e0 + half + e < E && first + column < size) {
            Four old = set ? Four{} : load_four(to);
            for (int i = 0; i < 4; i++) {
                old.x[i] += sums[e].x[i];
            }
            store_four(to, old);
        }
    }
}

// da of the tile's columns: a warp's 64, whose sums go to its own rows from `row` on
__device__ __forceinline__ void unmerge_da(UnmergeTile &tile, int row) {
    const int columns = UNMERGE_COLUMNS / UNMERGE_WARPS;
    int lane = (int)threadIdx.x % 32, c = lane % 8, e = lane / 8;
    int begin = (int)threadIdx.x / 32 * columns;
    float sums[4][2] = {};
#pragma unroll 2
    for (int k = begin; k < begin + columns; k += 4) {
        Four d[4], w[2];
        for (int i = 0; i < 4; i++) {
            d[i] = load_four(&tile.dmerged[c + 8 * i][k]);
        }
        for (int j = 0; j < 2; j++) {
            w[j] = load_four(&tile.bank[e + 4 * j][k]);
        }
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 2; j++) {
                for (int x = 0; x < 4; x++) {
                    sums[i][j] = fmaf(d[i].x[x], w[j].x[x], sums[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) {
            tile.da[row + e + 4 * j][c + 8 * i] += sums[i][j];
        }
    }
}

// parts [MERGE_CHUNK, E, MERGE_BLOCKS]: a block's are set, or added to where another matrix has set them;
// set: dbank
static __global__ void __launch_bounds__(UNMERGE_THREADS)
    merge_backward_kernel(float *dbank, float *parts, const float *a, const float *dmerged,
                          const floatX *bank, DeviceSegments chunk, int E, int64_t size, int set,
                          int add_parts) {
    UnmergeTile &tile = *(UnmergeTile *)shared_memory();
    int first_expert = (int)blockIdx.y * UNMERGE_EXPERTS, warp = (int)threadIdx.x / 32;
    int experts = min(ceil_div<int>(E - first_expert, UNMERGE_GROUP) * UNMERGE_GROUP, (int)UNMERGE_EXPERTS);
    for (int i = (int)threadIdx.x; i < UNMERGE_WARPS * experts * UNMERGE_SUMS; i += UNMERGE_THREADS) {
        tile.da[i / UNMERGE_SUMS][i % UNMERGE_SUMS] = 0.0f;
    }
    for (int64_t first = (int64_t)blockIdx.x * UNMERGE_COLUMNS; first < size;
         first += (int64_t)gridDim.x * UNMERGE_COLUMNS) {
        __syncthreads(); // the earlier tile has been read
        load_dmerged(tile, dmerged, chunk.count, first, size);
        for (int group = 0; group < experts; group += UNMERGE_GROUP) {
            int e0 = first_expert + group;
            if (group > 0) {
                __syncthreads(); // the earlier experts have been read
            }
            load_unmerge_group(tile, bank, a, chunk, e0, E, first, size);
            __syncthreads();
            unmerge_weights(dbank, tile, e0, E, first, size, set);
            unmerge_da(tile, warp * experts + group);
        }
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < experts * MERGE_CHUNK; i += UNMERGE_THREADS) {
        int e = i / MERGE_CHUNK, c = i % MERGE_CHUNK;
        float sum = 0.0f;
        for (int w = 0; w < UNMERGE_WARPS; w++) {
            sum += tile.da[w * experts + e][c];
        }
        if (first_expert + e < E) {
            float *part = parts + ((int64_t)c * E + first_expert + e) * MERGE_BLOCKS + blockIdx.x;
            *part = add_parts ? *part + sum : sum;
        }
    }
}

static inline int unmerge_blocks(int64_t size) {
    int64_t tiles = ceil_div<int64_t>(size, UNMERGE_COLUMNS);
    return (int)(tiles < MERGE_BLOCKS ? tiles : (int64_t)MERGE_BLOCKS);
}

static inline void unmerge_matrix(float *dbank, float *parts, const float *a, const float *dmerged,
                                  const floatX *bank, DeviceSegments chunk, int E, int64_t size, int set,
                                  int add_parts, cudaStream_t stream) {
    dim3 grid((unsigned)unmerge_blocks(size), (unsigned)ceil_div<int>(E, UNMERGE_EXPERTS));
    launch(merge_backward_kernel, grid, UNMERGE_THREADS, unmerge_shared_bytes(E), stream, dbank, parts, a,
           dmerged, bank, chunk, E, size, set, add_parts);
}

// a warp per element of da: lanes add every 32nd part, then each other's
static __global__ void __launch_bounds__(MERGE_THREADS)
    add_da_kernel(float *da, const float *parts, int blocks, int elements) {
    int i = (int)(blockIdx.x * (MERGE_THREADS / 32) + threadIdx.x / 32);
    float sum = 0.0f;
#pragma unroll 8
    for (int b = (int)threadIdx.x % 32; b < blocks && i < elements; b += 32) {
        sum += parts[(int64_t)i * MERGE_BLOCKS + b];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0 && i < elements) {
        da[i] = sum;
    }
}

// the bank's gradients += ..., fresh: = ...; da [count, E] of the chunk's segments is overwritten
static inline void merge_backward(DeviceBank bank, float *da, const float *a, DeviceBank to,
                                  DeviceSegments chunk, float *parts, int fresh, cudaStream_t stream) {
    int E = bank.E, elements = chunk.count * E;
    int64_t down = (int64_t)bank.F * bank.d;
    unmerge_matrix(bank.dgate_up, parts, a, to.dgate_up, bank.gate_up, chunk, E, 2 * down, fresh, 0, stream);
    unmerge_matrix(bank.ddown, parts, a, to.ddown, bank.down, chunk, E, down, fresh, 1, stream);
    launch(add_da_kernel, ceil_div<int>(elements, MERGE_THREADS / 32), MERGE_THREADS, 0, stream, da, parts,
           unmerge_blocks(2 * down), elements);
}

#endif
