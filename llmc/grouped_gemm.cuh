/*
Grouped GEMM: one product an expert, all of them in one launch, on rows sorted by expert (dispatch.cuh). Only
the device knows how many rows an expert has: a fixed grid of blocks reads offsets[E + 1] and walks over tiles
of C.

    function               C                        A                        B                 then
    grouped_up_forward     H [R, 2F]   = X' W^T     X' = x[token]   [m][k]   W_gate_up [n][k]  A = silu(G) * U
    grouped_down_forward   Y [R, d]    = A W^T      A               [m][k]   W_down    [n][k]
    grouped_down_backward  dA' [R, F]  = dO' W      dO' = dy[token] [m][k]   W_down    [k][n]  SwiGLU backward
    grouped_up_backward    dX' [R, d]  = dH W       dH              [m][k]   W_gate_up [k][n]
    grouped_down_wgrad     dW_down    += dO'^T A    dO' = dy[token] [k][m]   gate A    [k][n]  fp32, in place
    grouped_up_wgrad       dW_gate_up += dH^T X'    dH              [k][m]   x[token]  [k][n]  fp32, in place

    G, U = the halves of H's columns, rounded;   A = silu(G) U,   silu(g) = g sigmoid(g)
    dgate = <dA', A>;   a = gate A;   dG = gate dA' U silu'(G),   dU = gate dA' silu(G)     (in place of H)

They are one kernel. An operand says how it is stored, [line][k] or [k][line], and which of its rows to read
(gathered by token, in order, an expert's weights); an epilogue says what becomes of a finished tile. In the
first four products an expert's rows are lines of C, in the last two they are summed over.

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
6. Tiles of an expert are taken 16 rows of tiles at a time: blocks that run together read the same weights
   and the same rows, from L2.

Every element of C is the sum over k in steps of 16, in order, by one thread: no bit depends on the number of
blocks, nor, in the first four, on the rows around it: H computed again in backward is the same H. A weight's
gradient is added chunk by chunk.

Shapes: x, dy [N, d] floatX; chunk buffers a [R, F], y, dx [R, d], h [R, 2F], indexed from the chunk's first
row; W_gate_up [E, 2F, d], W_down [E, d, F] floatX, their gradients fp32; d, F multiples of 8. Nothing is
written for rows that do not exist. Errors: none; 80 KB and 4 (E + 1) bytes of shared memory must fit a block.
*/
#ifndef GROUPED_GEMM_CUH
#define GROUPED_GEMM_CUH

#include "cuda_common.cuh"
#include "mma.cuh"

typedef struct {             // a chunk of the layer's rows
    const int *offsets;      // [E + 1] first row of each expert's segment: multiples of 64
    const int *token_of_row; // by the row's number in the layer; -1 in pads
    const float *gate_of_row;
    int experts;
    int first, rows; // the chunk: rows first .. first + rows - 1, as far as they exist
} RowChunk;

typedef struct { // H of a chunk [R, 2F]
    floatX *store;
    floatX *scratch;
    const int64_t *place; // its place in the store, or -1: it is in scratch
} ChunkH;

namespace grouped {

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

// ----------------------------------------------------------------------------
// the tiles of a chunk

struct Sizes {
    RowChunk chunk;
    int M; // lines of C an expert; 0: its rows in the chunk
    int N; // columns of C that tiles count (the up-projection counts gate and up as one)
    int K; // length of the sums; 0: the expert's rows in the chunk
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

__device__ __forceinline__ floatX *chunk_h(const ChunkH &h) {
    int64_t place = *h.place;
    return place >= 0 ? h.store + place : h.scratch;
}

// first[e] = rows of tiles of the experts before e: a prefix sum by one warp, 32 experts at a time
__device__ __forceinline__ void count_tiles(int *first, const Sizes &sizes) {
    const RowChunk &chunk = sizes.chunk;
    int lane = lane_id(), before = 0;
    for (int e0 = 0; e0 < chunk.experts; e0 += 32) {
        int e = min(e0 + lane, chunk.experts - 1);
        int rows = chunk_row(chunk, chunk.offsets[e + 1]) - chunk_row(chunk, chunk.offsets[e]);
        int lines = sizes.M > 0 && rows > 0 ? sizes.M : rows;
        int sum = ceil_div<int>(lines, Shape::M);
        for (int distance = 1; distance < 32; distance *= 2) {
            int other = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        if (e0 + lane < chunk.experts) {
            first[e0 + lane + 1] = before + sum;
        }
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) {
        first[0] = 0;
    }
}

__device__ __forceinline__ Tile find_tile(int number, const int *first, const Sizes &sizes) {
    const RowChunk &chunk = sizes.chunk;
    int columns = ceil_div(sizes.N, sizes.tile_n);
    int row = number / columns; // if each expert's tiles were taken row by row
    int low = 0, high = chunk.experts;
    while (high - low > 1) { // the last expert that begins at or before it
        int middle = (low + high) / 2;
        if (first[middle] <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    int rows = first[low + 1] - first[low];
    int local = number - first[low] * columns;
    int band = local / (Shape::NEIGHBOURS * columns) * Shape::NEIGHBOURS;
    int height = min((int)Shape::NEIGHBOURS, rows - band);
    local -= band * columns; // within the band column by column
    int begin = chunk_row(chunk, chunk.offsets[low]), end = chunk_row(chunk, chunk.offsets[low + 1]);
    Tile tile;
    tile.expert = low;
    tile.m = (sizes.M > 0 ? 0 : begin) + (band + local % height) * Shape::M;
    tile.m_end = sizes.M > 0 ? sizes.M : end;
    tile.n = local / height * sizes.tile_n;
    tile.k = sizes.K > 0 ? 0 : begin;
    tile.k_end = sizes.K > 0 ? sizes.K : end;
    return tile;
}

// ----------------------------------------------------------------------------
// operands

enum OperandLayout {
    BY_LINE, // [line][k]: a source row is a line of the tile (a row of C, or a column)
    BY_STEP  // [k][line]: a source row is a step along k
};

enum OperandRows {
    IN_ORDER, // the chunk's own rows; a weight matrix' rows
    GATHERED, // those of the rows' tokens
    PERMUTED, // weights, by line: 8 columns of C to a lane
    GATE_UP   // the same, half of a warp's lines of the gate, half of the up-projection
};

template <OperandLayout LAYOUT_, OperandRows ROWS_> struct Operand {
    static const OperandLayout LAYOUT = LAYOUT_;
    static const OperandRows ROWS = ROWS_;
    const floatX *data; // NULL: H
    ChunkH h;
    int width;          // elements of a row
    int64_t per_expert; // elements between two experts' matrices; 0: rows of the chunk
    const int *token;   // GATHERED: of the chunk's rows
};

// Which of a group's columns the MMA's column l is to be: lane t has l = 2t, 2t + 1 of each 8, and is to get
// columns 8t .. 8t + 7
__device__ __forceinline__ int permuted_column(int l) {
    return 8 * (l % 8 / 2) + 2 * (l / 8) + l % 2;
}

// Copies an operand's tiles into shared memory: LINES lines of C, Shape::K steps. A thread copies the same
// 16-byte piece of a few source rows; their numbers are found one step ahead, so that nobody waits for tokens.
// LD: elements from row to row of the tile in shared memory
template <class O, int LINES> struct TileCopy {
    typedef Shape S;
    enum {
        BY_LINES = O::LAYOUT == BY_LINE,
        WIDTH = BY_LINES ? (int)S::K : LINES,
        HEIGHT = BY_LINES ? LINES : (int)S::K,
        LD = WIDTH + S::SKEW,
        ELEMENTS = HEIGHT * LD,
        PIECES = WIDTH / S::PACK, // of a row
        ROWS = HEIGHT * PIECES / S::THREADS
    };
    const floatX *matrix;
    int source[ROWS]; // row of the matrix, or -1: zeros

    static __device__ __forceinline__ int piece() {
        return (int)threadIdx.x % PIECES;
    }

    // Row i of this thread. Eight lanes write 128 bytes at a time, which must meet each bank once: part of a
    // row of 256 bytes does so anyhow, of the rows of 64 bytes (80 apart) two that are 4 rows apart
    static __device__ __forceinline__ int tile_row(int i) {
        int r = (int)threadIdx.x / PIECES;
        return BY_LINES ? i * (S::THREADS / PIECES) + r / 8 * 8 + r % 8 / 2 + r % 2 * 4 : r * ROWS + i;
    }

    __device__ __forceinline__ void find_matrix(const O &operand, int expert) {
        matrix = operand.data != NULL ? operand.data + expert * operand.per_expert : chunk_h(operand.h);
    }

    // the tile's rows begin at `begin` (a line of C, or k), those beyond end do not exist
    __device__ __forceinline__ void find_rows(const O &operand, int begin, int end) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int r = tile_row(i), row = begin + r;
            if (O::ROWS == PERMUTED) {
                row = begin + r / S::GROUP * S::GROUP + permuted_column(r % S::GROUP);
            }
            if (O::ROWS == GATE_UP) { // begin and end count columns of the gate
                row = begin + r / S::WARP_N * S::GROUP + permuted_column(r % S::GROUP);
            }
            source[i] = row < end ? row : -1;
            if (O::ROWS == GATHERED && row < end) {
                source[i] = operand.token[row];
            }
            if (O::ROWS == GATE_UP && row < end && r % S::WARP_N >= S::GROUP) {
                source[i] += end;
            }
        }
    }

    __device__ __forceinline__ void copy(floatX *tile, const O &operand, int column) const {
        column += piece() * S::PACK;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            bool valid = source[i] >= 0 && column < operand.width;
            const floatX *from = matrix + (valid ? (int64_t)source[i] * operand.width + column : 0);
            cp_async16(tile + tile_row(i) * LD + piece() * S::PACK, from, valid);
        }
    }
};

// Fills one stage after the other, through all of the block's tiles
template <class A, class B> struct TileLoader {
    typedef Shape S;
    typedef TileCopy<A, S::M> CopyA;
    typedef TileCopy<B, S::N> CopyB;
    enum { STAGE = CopyA::ELEMENTS + CopyB::ELEMENTS };
    CopyA a;
    CopyB b;
    Tile tile;
    int number; // of the tile

    __device__ __forceinline__ void find_rows(const A &operand_a, const B &operand_b, int columns,
                                              bool new_tile) {
        if (new_tile || A::LAYOUT == BY_STEP) {
            a.find_rows(operand_a, A::LAYOUT == BY_LINE ? tile.m : tile.k,
                        A::LAYOUT == BY_LINE ? tile.m_end : tile.k_end);
        }
        if (new_tile || B::LAYOUT == BY_STEP) {
            b.find_rows(operand_b, B::LAYOUT == BY_LINE ? tile.n : tile.k,
                        B::LAYOUT == BY_LINE ? columns : tile.k_end);
        }
    }

    __device__ __forceinline__ void open(int tile_number, int tiles, const int *first, const Sizes &sizes,
                                         const A &operand_a, const B &operand_b) {
        number = tile_number;
        if (number < tiles) {
            tile = find_tile(number, first, sizes);
            a.find_matrix(operand_a, tile.expert);
            b.find_matrix(operand_b, tile.expert);
            find_rows(operand_a, operand_b, sizes.N, true);
        }
    }

    // starts the copies of the next step; after the last one an empty group, for those who count groups
    __device__ __forceinline__ void load(floatX *stage, int tiles, const int *first, const Sizes &sizes,
                                         const A &operand_a, const B &operand_b) {
        if (number < tiles) {
            a.copy(stage, operand_a, A::LAYOUT == BY_LINE ? tile.k : tile.m);
            b.copy(stage + CopyA::ELEMENTS, operand_b, B::LAYOUT == BY_LINE ? tile.k : tile.n);
            tile.k += S::K;
            if (tile.k < tile.k_end) {
                find_rows(operand_a, operand_b, sizes.N, false);
            } else {
                open(number + (int)gridDim.x, tiles, first, sizes, operand_a, operand_b);
            }
        }
        cp_async_commit();
    }
};

// ----------------------------------------------------------------------------
// products

struct WarpSums { // a warp's 64 x 64 of C, as fragments
    float c[Shape::WARP_M / 16][Shape::WARP_N / 8][4];
};

// Where this warp's part of a stage begins
template <class A, class B> struct WarpOperands {
    typedef TileLoader<A, B> Loader;
    enum { LDA = Loader::CopyA::LD, LDB = Loader::CopyB::LD };
    const floatX *a, *b;

    __device__ __forceinline__ explicit WarpOperands(const floatX *stage) {
        int warp = (int)threadIdx.x / 32;
        int m = warp / Shape::WARPS_N * Shape::WARP_M, n = warp % Shape::WARPS_N * Shape::WARP_N;
        a = stage + (A::LAYOUT == BY_LINE ? m * LDA : m);
        b = stage + Loader::CopyA::ELEMENTS + (B::LAYOUT == BY_LINE ? n * LDB : n);
    }
};

#ifdef PRECISION_FP32
// the same elements by the same lanes, without the detour over fragments
template <class A, class B> __device__ __forceinline__ void multiply(WarpSums &sums, const floatX *stage) {
    typedef Shape S;
    typedef WarpOperands<A, B> Operands;
    const int line_a = A::LAYOUT == BY_LINE ? Operands::LDA : 1,
              step_a = A::LAYOUT == BY_LINE ? 1 : Operands::LDA;
    const int line_b = B::LAYOUT == BY_LINE ? Operands::LDB : 1,
              step_b = B::LAYOUT == BY_LINE ? 1 : Operands::LDB;
    int g = lane_id() / 4, t = lane_id() % 4;
    Operands tile(stage);
#pragma unroll 1
    for (int k = 0; k < S::K; k++) {
        float b[S::WARP_N / 4];
#pragma unroll
        for (int j = 0; j < S::WARP_N / 4; j++) {
            b[j] = tile.b[(8 * (j / 2) + 2 * t + j % 2) * line_b + k * step_b];
        }
#pragma unroll
        for (int i = 0; i < S::WARP_M / 8; i++) {
            float a = tile.a[(8 * i + g) * line_a + k * step_a];
#pragma unroll
            for (int j = 0; j < S::WARP_N / 4; j++) {
                sums.c[i / 2][j / 2][i % 2 * 2 + j % 2] += a * b[j];
            }
        }
    }
}
#else
template <class A, class B> __device__ __forceinline__ void multiply(WarpSums &sums, const floatX *stage) {
    typedef Shape S;
    const int lda = WarpOperands<A, B>::LDA, ldb = WarpOperands<A, B>::LDB;
    WarpOperands<A, B> tile(stage);
#pragma unroll
    for (int k = 0; k < S::K; k += 16) {
        FragA a[S::WARP_M / 16];
#pragma unroll
        for (int i = 0; i < S::WARP_M / 16; i++) {
            if (A::LAYOUT == BY_LINE) {
                load_a(a[i], tile.a + 16 * i * lda + k, lda);
            } else {
                load_a_trans(a[i], tile.a + k * lda + 16 * i, lda);
            }
        }
#pragma unroll
        for (int j = 0; j < S::WARP_N / 8; j += 2) {
            FragB b[2];
            if (B::LAYOUT == BY_LINE) {
                load_b2(b, tile.b + 8 * j * ldb + k, ldb);
            } else {
                load_b2_trans(b, tile.b + k * ldb + 8 * j, ldb);
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

template <class A, class B, class Epilogue>
__global__ void __launch_bounds__(Shape::THREADS, Shape::BLOCKS_PER_SM)
    product_kernel(Sizes sizes, A operand_a, B operand_b, Epilogue epilogue) {
    typedef Shape S;
    typedef TileLoader<A, B> Loader;
    if (epilogue.nothing_to_do()) {
        return;
    }
    floatX *stages = (floatX *)shared_memory();
    int *first = (int *)(stages + S::STAGES * Loader::STAGE);
    if (threadIdx.x < 32) {
        count_tiles(first, sizes);
    }
    __syncthreads();
    int tiles = first[sizes.chunk.experts] * ceil_div(sizes.N, sizes.tile_n);
    int warp = (int)threadIdx.x / 32;
    int warp_m = warp / S::WARPS_N * S::WARP_M, warp_n = warp % S::WARPS_N * (sizes.tile_n / S::WARPS_N);
    Loader loader;
    loader.open((int)blockIdx.x, tiles, first, sizes, operand_a, operand_b);
    for (int stage = 0; stage < S::STAGES - 1; stage++) {
        loader.load(stages + stage * Loader::STAGE, tiles, first, sizes, operand_a, operand_b);
    }
    int read = 0, write = S::STAGES - 1;
    for (int number = (int)blockIdx.x; number < tiles; number += (int)gridDim.x) {
        Tile tile = find_tile(number, first, sizes);
        tile.m += warp_m;
        tile.n += warp_n;
        bool inside = tile.m < tile.m_end && tile.n < sizes.N; // else this warp only copies
        WarpSums sums = {};
        for (int k = tile.k; k < tile.k_end; k += S::K) {
            cp_async_wait<S::STAGES - 2>(); // of all groups but the youngest ones: this step's has arrived
            __syncthreads(); // everybody's has; and all are done with the stage that is filled next
            loader.load(stages + write * Loader::STAGE, tiles, first, sizes, operand_a, operand_b);
            if (inside) {
                multiply<A, B>(sums, stages + read * Loader::STAGE);
            }
            read = read + 1 < S::STAGES ? read + 1 : 0;
            write = write + 1 < S::STAGES ? write + 1 : 0;
        }
        if (inside) {
            epilogue.store(sums, tile);
        }
    }
}

// ----------------------------------------------------------------------------
// epilogues: store(sums, tile) is called by a whole warp, its own first row and column in tile.m and tile.n

__device__ __forceinline__ void load_eight(float v[8], const floatX *from) {
#pragma unroll
    for (int i = 0; i < 8; i += Pack<floatX>::SIZE) {
        Pack<floatX> pack = load_pack(from + i);
#pragma unroll
        for (int j = 0; j < Pack<floatX>::SIZE; j++) {
            v[i + j] = to_float(pack.x[j]);
        }
    }
}

// v becomes what was stored: rounded
__device__ __forceinline__ void store_eight(floatX *to, float v[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += Pack<floatX>::SIZE) {
        Pack<floatX> pack;
#pragma unroll
        for (int j = 0; j < Pack<floatX>::SIZE; j++) {
            pack.x[j] = to_x(v[i + j]);
            v[i + j] = to_float(pack.x[j]);
        }
        store_pack(to + i, pack);
    }
}

// Four lanes, each with the pairs v[2q], v[2q + 1], q = 0 .. 3: lane t ends with all pairs t, that of lane q at
// q. A transpose of 4 x 4 pairs: first between lanes (and pairs) that differ in bit 0, then in bit 1.
__device__ __forceinline__ void quad_transpose(float v[8]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        bool upper = lane_id() & bit;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            if (q & bit) {
                continue;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &low = v[2 * q + i], &high = v[2 * (q + bit) + i];
                float other = __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
                low = upper ? other : low;
                high = upper ? high : other;
            }
        }
    }
}

// This lane's 8 neighbours of C: row 16 i + g + 8 half, columns from 32 group + 8t on; B's layout tells how they
// lie
template <OperandLayout LAYOUT>
__device__ __forceinline__ void eight_columns(float v[8], const WarpSums &sums, int i, int half, int group) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        v[2 * q] = sums.c[i][4 * group + q][2 * half];
        v[2 * q + 1] = sums.c[i][4 * group + q][2 * half + 1];
    }
    if (LAYOUT == BY_STEP) {
        quad_transpose(v);
    }
}

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// C, rounded
template <OperandLayout LAYOUT> struct StoreRows {
    floatX *out;
    int width;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        typedef Shape S;
        int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < S::WARP_M / 8; i++) {
            int row = tile.m + 8 * i + g;
#pragma unroll
            for (int group = 0; group < S::WARP_N / S::GROUP; group++) {
                int column = tile.n + S::GROUP * group + 8 * t;
                float v[8];
                eight_columns<LAYOUT>(v, sums, i / 2, i % 2, group);
                if (column < width) {
                    store_eight(out + (int64_t)row * width + column, v);
                }
            }
        }
    }
};

// H, rounded, and A = silu(G) * U of what was rounded. B's lines are GATE_UP: group 0 is G, group 1 U
struct SwigluForward {
    floatX *a; // NULL: only H, and only if it has no place in the store
    ChunkH h;
    int F;

    __device__ __forceinline__ bool nothing_to_do() const {
        return a == NULL && *h.place >= 0;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        int f = tile.n + 8 * (lane_id() % 4);
        if (f >= F) {
            return;
        }
        floatX *h_rows = chunk_h(h);
#pragma unroll
        for (int i = 0; i < Shape::WARP_M / 8; i++) {
            int64_t row = tile.m + 8 * i + lane_id() / 4;
            float gate[8], up[8];
            eight_columns<BY_LINE>(gate, sums, i / 2, i % 2, 0);
            eight_columns<BY_LINE>(up, sums, i / 2, i % 2, 1);
            store_eight(h_rows + row * 2 * F + f, gate);
            store_eight(h_rows + row * 2 * F + F + f, up);
            if (a != NULL) {
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    gate[c] *= sigmoid(gate[c]) * up[c];
                }
                store_eight(a + row * F + f, gate);
            }
        }
    }
};

// From dA' = C and H: gate A, dH in place of H, and each row's sum of dA' A over the warp's columns
struct SwigluBackward {
    floatX *a;
    ChunkH h;
    float *dgate_partial;     // [R, dgate_tiles]
    const float *gate_of_row; // of the chunk's rows
    int F, dgate_tiles;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    // 8 columns of a row; returns their part of <dA', A>
    __device__ __forceinline__ float backward_eight(float da[8], float G[8], float U[8], float gate) const {
        float dot = 0.0f;
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float s = sigmoid(G[c]), silu = G[c] * s;
            float activation = silu * U[c], d = da[c] * gate;
            dot += da[c] * activation;
            da[c] = gate * activation;
            G[c] = d * U[c] * s * (1.0f + G[c] * (1.0f - s));
            U[c] = d * silu;
        }
        return dot;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        typedef Shape S;
        int t = lane_id() % 4;
        floatX *h_rows = chunk_h(h);
#pragma unroll
        for (int i = 0; i < S::WARP_M / 8; i++) {
            int64_t row = tile.m + 8 * i + lane_id() / 4;
            float gate = gate_of_row[row], dot = 0.0f;
            float G[2][8], U[2][8];
#pragma unroll
            for (int group = 0; group < 2; group++) { // all loads before the first use
                int f = tile.n + S::GROUP * group + 8 * t;
                if (f < F) {
                    load_eight(G[group], h_rows + row * 2 * F + f);
                    load_eight(U[group], h_rows + row * 2 * F + F + f);
                }
            }
#pragma unroll
            for (int group = 0; group < 2; group++) {
                int f = tile.n + S::GROUP * group + 8 * t;
                float da[8];
                eight_columns<BY_STEP>(da, sums, i / 2, i % 2, group);
                if (f < F) {
                    dot += backward_eight(da, G[group], U[group], gate);
                    store_eight(a + row * F + f, da);
                    store_eight(h_rows + row * 2 * F + f, G[group]);
                    store_eight(h_rows + row * 2 * F + F + f, U[group]);
                }
            }
            dot += __shfl_xor_sync(0xffffffffu, dot, 1);
            dot += __shfl_xor_sync(0xffffffffu, dot, 2);
            if (t == 0) {
                dgate_partial[row * dgate_tiles + tile.n / S::WARP_N] = dot;
            }
        }
    }
};

// an expert's matrix += C; here rows of C may end anywhere
struct AddToWeights {
    float *dw;
    int M, N;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        typedef Shape S;
        float *matrix = dw + (int64_t)tile.expert * M * N;
        int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < S::WARP_M / 8; i++) {
            int m = tile.m + 8 * i + g;
            float2 old[S::WARP_N / 8];
            float2 *row = (float2 *)(matrix + (int64_t)m * N + tile.n + 2 * t);
#pragma unroll
            for (int j = 0; j < S::WARP_N / 8; j++) { // all loads before the first use
                if (m < M && tile.n + 8 * j < N) {
                    old[j] = row[4 * j];
                }
            }
#pragma unroll
            for (int j = 0; j < S::WARP_N / 8; j++) {
                if (m < M && tile.n + 8 * j < N) {
                    const float *c = sums.c[i / 2][j] + i % 2 * 2;
                    row[4 * j] = make_float2(old[j].x + c[0], old[j].y + c[1]);
                }
            }
        }
    }
};

// ----------------------------------------------------------------------------
// the six products

template <class A, class B, class Epilogue>
static void multiply_chunk(Sizes sizes, A a, B b, Epilogue epilogue, cudaStream_t stream) {
    typedef Shape S;
    int E = sizes.chunk.experts, segments = sizes.chunk.rows / S::WARP_M; // experts with rows are not more
    int most_rows = sizes.M > 0 ? min(E, segments) * ceil_div<int>(sizes.M, S::M)
                                : min(segments, sizes.chunk.rows / S::M + E);
    int blocks = min(S::BLOCKS_PER_SM * num_sms(), most_rows * ceil_div(sizes.N, sizes.tile_n));
    size_t shared_bytes =
        S::STAGES * TileLoader<A, B>::STAGE * sizeof(floatX) + (size_t)(E + 1) * sizeof(int);
    launch(product_kernel<A, B, Epilogue>, blocks, S::THREADS, shared_bytes, stream, sizes, a, b, epilogue);
}

// C's rows are the chunk's
static inline Sizes sizes_by_rows(RowChunk chunk, int N, int K, int tile_n = Shape::N) {
    Sizes sizes = {chunk, 0, N, K, tile_n};
    return sizes;
}

// C is a matrix an expert, the chunk's rows are summed over
static inline Sizes sizes_by_expert(RowChunk chunk, int M, int N) {
    Sizes sizes = {chunk, M, N, 0, Shape::N};
    return sizes;
}

template <OperandLayout LAYOUT> static Operand<LAYOUT, IN_ORDER> rows_of(const floatX *data, int width) {
    Operand<LAYOUT, IN_ORDER> operand = {data, {NULL, NULL, NULL}, width, 0, NULL};
    return operand;
}

template <OperandLayout LAYOUT> static Operand<LAYOUT, IN_ORDER> rows_of(ChunkH h, int F) {
    Operand<LAYOUT, IN_ORDER> operand = {NULL, h, 2 * F, 0, NULL};
    return operand;
}

template <OperandLayout LAYOUT>
static Operand<LAYOUT, GATHERED> rows_of_tokens(const floatX *data, int width, RowChunk chunk) {
    Operand<LAYOUT, GATHERED> operand = {
        data, {NULL, NULL, NULL}, width, 0, chunk.token_of_row + chunk.first};
    return operand;
}

template <OperandLayout LAYOUT, OperandRows ROWS>
static Operand<LAYOUT, ROWS> weights(const floatX *data, int width, int64_t per_expert) {
    Operand<LAYOUT, ROWS> operand = {data, {NULL, NULL, NULL}, width, per_expert, NULL};
    return operand;
}

} // namespace grouped

// H = X' W_gate_up^T, A = silu(G) * U. a == NULL: backward's, only H, and only if it is not in the store
static inline void grouped_up_forward(floatX *a, ChunkH h, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    using namespace grouped;
    SwigluForward epilogue = {a, h, F};
    multiply_chunk(sizes_by_rows(chunk, F, d, Shape::N / 2), rows_of_tokens<BY_LINE>(x, d, chunk),
                   weights<BY_LINE, GATE_UP>(w_gate_up, d, (int64_t)2 * F * d), epilogue, stream);
}

// Y = A W_down^T
static inline void grouped_down_forward(floatX *y, const floatX *a, const floatX *w_down, RowChunk chunk,
                                        int d, int F, cudaStream_t stream) {
    using namespace grouped;
    StoreRows<BY_LINE> epilogue = {y, d};
    multiply_chunk(sizes_by_rows(chunk, d, F), rows_of<BY_LINE>(a, F),
                   weights<BY_LINE, PERMUTED>(w_down, F, (int64_t)d * F), epilogue, stream);
}

// partial sums that grouped_down_backward writes of each row's <dA', A>
static inline int grouped_dgate_tiles(int F) {
    return ceil_div<int>(F, grouped::Shape::WARP_N);
}

// dA' = dO' W_down; a = gate A; H becomes dH; dgate_partial [R, grouped_dgate_tiles(F)]
static inline void grouped_down_backward(floatX *a, ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    using namespace grouped;
    SwigluBackward epilogue = {
        a, h, dgate_partial, chunk.gate_of_row + chunk.first, F, grouped_dgate_tiles(F)};
    multiply_chunk(sizes_by_rows(chunk, F, d), rows_of_tokens<BY_LINE>(dy, d, chunk),
                   weights<BY_STEP, IN_ORDER>(w_down, F, (int64_t)d * F), epilogue, stream);
}

// dW_down[e] += dO'^T a, where a = gate A
static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, const floatX *a, RowChunk chunk,
                                      int d, int F, cudaStream_t stream) {
    using namespace grouped;
    AddToWeights epilogue = {dw_down, d, F};
    multiply_chunk(sizes_by_expert(chunk, d, F), rows_of_tokens<BY_STEP>(dy, d, chunk),
                   rows_of<BY_STEP>(a, F), epilogue, stream);
}

// dW_gate_up[e] += dH^T X'
static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    using namespace grouped;
    AddToWeights epilogue = {dw_gate_up, 2 * F, d};
    multiply_chunk(sizes_by_expert(chunk, 2 * F, d), rows_of<BY_STEP>(h, F),
                   rows_of_tokens<BY_STEP>(x, d, chunk), epilogue, stream);
}

// dX' = dH W_gate_up
static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    using namespace grouped;
    StoreRows<BY_STEP> epilogue = {dx, d};
    multiply_chunk(sizes_by_rows(chunk, d, 2 * F), rows_of<BY_LINE>(h, F),
                   weights<BY_STEP, IN_ORDER>(w_gate_up, d, (int64_t)2 * F * d), epilogue, stream);
}

#endif
