/*
The grouped GEMM on any GPU: the shape of its tiles, and the tiles of a chunk of rows, found on the device.
Only the device knows how many rows an expert has: a block makes a table of them at its start, and finds in it
the tiles that are its own, number b, b + blocks, ... Tiles of an expert are taken 16 rows of tiles at a time:
blocks that run together read the same weights and the same rows, from L2. Errors: none.
*/
#ifndef GROUPED_PORTABLE_TILES_CUH
#define GROUPED_PORTABLE_TILES_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/mma.cuh"
#include "llmc/gpu/row_chunk.cuh"
#include "llmc/gpu/sums.cuh"
// defines: lane_id; RowChunk, ChunkH, ROW_ALIGN

namespace portable {

struct Shape {
    enum {
        WARP_M = 64, // a warp's part of C
        WARP_N = 64,
        WARPS_M = 2,
        WARPS_N = 2,
        M = WARPS_M * WARP_M, // a block's tile
        N = WARPS_N * WARP_N,
        K = 64 / sizeof(floatX), // a step along k: 64 bytes of a line
        STAGES = 4,
        THREADS = 32 * WARPS_M * WARPS_N,
        BLOCKS_PER_SM = 2,
        NEIGHBOURS = 16, // rows of tiles that are taken together
        PACK = 16 / sizeof(floatX),
        SKEW = PACK,
        GROUP = 32, // columns of C of which a lane holds 8 neighbours
    };
};

static_assert(ROW_ALIGN % Shape::WARP_M == 0, "a warp's rows are one expert's");
static_assert(Shape::WARP_N == 2 * Shape::GROUP, "a warp's columns are two groups: of up_forward G and U");

struct WarpSums { // a warp's 64 x 64 of C, as fragments
    float c[Shape::WARP_M / 16][Shape::WARP_N / 8][4];
};

// the same for all lanes, and so that the compiler knows it
__device__ __forceinline__ int warp_id() {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
}

// ----------------------------------------------------------------------------
// the tiles of a chunk

// BY_EXPERT: the lines of C are an expert's M, summed over its rows in the chunk; else they are these rows,
// and the sums have K terms
struct Sizes {
    RowChunk chunk;
    int M, K;
    int N; // columns of C that tiles count (the up-projection counts gate and up as one)
    int tile_n;
};

struct Tile {
    int expert;
    int m, m_end; // first line of C; where the expert's lines end
    int n;        // first column
    int k, k_end; // what is summed over
};

// The chunk's number of a row, clamped to the chunk. A segment's part in the chunk lies between those of its
// ends
__device__ __forceinline__ int chunk_row(const RowChunk &chunk, int row) {
    return min(max(row - chunk.first, 0), chunk.rows);
}

// H of the chunk's rows
__device__ __forceinline__ floatX *chunk_h(const ChunkH &h, int F) {
    return h.buffer + *h.first * 3 * F;
}

// In shared memory, for each expert and their end: what comes before it
struct TableRow {
    int tiles; // rows of tiles of the experts before
    int row;   // first row, in the chunk
};

// The table's prefix sum, by one warp, 32 rows of the table at a time
template <bool BY_EXPERT> __device__ __forceinline__ void fill_table(TableRow *table, const Sizes &sizes) {
    const RowChunk &chunk = sizes.chunk;
    int E = chunk.experts, before = 0;
#pragma unroll 1
    for (int e0 = 0; e0 <= E; e0 += 32) {
        int e = e0 + lane_id();
        int begin = chunk_row(chunk, chunk.offsets[min(e, E)]);
        int end = chunk_row(chunk, chunk.offsets[min(e + 1, E)]);
        int lines = BY_EXPERT && end > begin ? sizes.M : end - begin; // none behind the last expert
        int own = ceil_div<int>(lines, Shape::M), sum = warp_prefix_sum(own);
        if (e <= E) {
            table[e].tiles = before + sum - own;
            table[e].row = begin;
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
}

template <bool BY_EXPERT>
__device__ __forceinline__ Tile find_tile(int number, const TableRow *table, const Sizes &sizes) {
    int columns = ceil_div(sizes.N, sizes.tile_n);
    int row = number / columns; // if each expert's tiles were taken row by row
    int low = 0, high = sizes.chunk.experts;
    while (high - low > 1) { // the last expert that begins at or before it
        int middle = (low + high) / 2;
        if (table[middle].tiles <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    TableRow from = table[low], to = table[low + 1];
    int local = number - from.tiles * columns;
    int band = local / (Shape::NEIGHBOURS * columns) * Shape::NEIGHBOURS;
    int height = min((int)Shape::NEIGHBOURS, to.tiles - from.tiles - band);
    local -= band * columns; // within the band column by column
    Tile tile;
    tile.expert = low;
    tile.m = (BY_EXPERT ? 0 : from.row) + (band + local % height) * Shape::M;
    tile.m_end = BY_EXPERT ? sizes.M : to.row;
    tile.n = local / height * sizes.tile_n;
    tile.k = BY_EXPERT ? from.row : 0;
    tile.k_end = BY_EXPERT ? to.row : sizes.K;
    return tile;
}

} // namespace portable

#endif
