/*
Grouped GEMM on any GPU with tensor cores (mma.sync, sm_80 and later), and in fp32: the functions of
grouped_gemm.cuh in namespace portable. Only the device knows how many rows an expert has: a fixed grid of
blocks reads offsets[E + 1] and walks over tiles of C.

    function               C                        A                        B                 then
    grouped_up_forward     [G | U]     = X' W^T     X' = x[token]   [m][k]   W_gate_up [n][k]  gate A
    grouped_down_forward   Y [R, d]    = gate A W^T gate A          [m][k]   W_down    [n][k]
    grouped_down_backward  dA' [R, F]  = dO' W      dO' = dy[token] [m][k]   W_down    [k][n]  SwiGLU backward
    grouped_up_backward    dX' [R, d]  = dH W       dH = [dG | dU]  [m][k]   W_gate_up [k][n]
    grouped_down_wgrad     dW_down    += dO'^T A    dO' = dy[token] [k][m]   gate A    [k][n]  fp32, in place
    grouped_up_wgrad       dW_gate_up += dH^T X'    dH = [dG | dU]  [k][m]   x[token]  [k][n]  fp32, in place

    A = silu(G) U of the rounded G and U,   silu(g) = g sigmoid(g)
    dgate = <dA', A>;   dG = gate dA' U silu'(G),   dU = gate dA' silu(G)       (in place of G and U)

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

Shapes: x, dy [N, d] floatX; chunk buffers h [R, 3F] = [G | U | gate A], y, dx [R, d], indexed from the chunk's
first row; W_gate_up [E, 2F, d], W_down [E, d, F] floatX, their gradients fp32; d, F multiples of 8. Nothing is
written for rows that do not exist. Errors: none; 80 KB and 8 (E + 1) bytes of shared memory must fit a block.
*/
#ifndef GROUPED_GEMM_PORTABLE_CUH
#define GROUPED_GEMM_PORTABLE_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/mma.cuh"
#include "llmc/gpu/row_chunk.cuh"
// defines: RowChunk, ChunkH; load_a, load_b, mma, cp_async16

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

__device__ __forceinline__ floatX *chunk_h(const ChunkH &h) {
    int64_t place = *h.place;
    return place >= 0 ? h.store + place : h.scratch;
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
        int own = ceil_div<int>(lines, Shape::M), sum = own;
        for (int distance = 1; distance < 32; distance *= 2) {
            int other = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane_id() >= distance ? other : 0;
        }
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
    const floatX *data; // NULL: columns of H
    ChunkH h;
    int first;          // H's first column that is read
    int width;          // elements of a row
    int stride;         // from row to row
    int64_t per_expert; // elements between two experts' matrices; 0: rows of the chunk
    const int *token;   // GATHERED: of the chunk's rows
};

// Which of a group's columns the MMA's column l is to be: lane t has l = 2t, 2t + 1 of each 8, and is to get
// columns 8t .. 8t + 7
__device__ __forceinline__ int permuted_column(int l) {
    return 8 * (l % 8 / 2) + 2 * (l / 8) + l % 2;
}

// Copies an operand's tiles into shared memory: LINES lines of C, Shape::K steps. A thread copies the same
// 16-byte piece of a few source rows; their numbers are found one step ahead, so that nobody waits for
// tokens. LD: elements from row to row of the tile in shared memory
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

    __device__ __forceinline__ void find_chunk(const O &operand) {
        matrix = operand.data != NULL ? operand.data : chunk_h(operand.h) + operand.first;
    }

    __device__ __forceinline__ void find_expert(const O &operand, int expert) {
        if (operand.per_expert > 0) {
            matrix = operand.data + expert * operand.per_expert;
        }
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
            const floatX *from =
                matrix + (int64_t)source[i] * operand.stride + column; // not read unless valid
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
    static const bool BY_EXPERT = A::LAYOUT == BY_STEP;
    const Sizes &sizes;
    const A &operand_a;
    const B &operand_b;
    const TableRow *table;
    CopyA a;
    CopyB b;
    int tiles;  // of the chunk
    int number; // of the tile that is being loaded
    Tile tile;
    int k; // its next step

    __device__ __forceinline__ TileLoader(const Sizes &sizes_, const A &a_, const B &b_,
                                          const TableRow *table_)
        : sizes(sizes_), operand_a(a_), operand_b(b_), table(table_) {
        tiles = table[sizes.chunk.experts].tiles * ceil_div(sizes.N, sizes.tile_n);
        a.find_chunk(operand_a);
        b.find_chunk(operand_b);
        open((int)blockIdx.x);
    }

    __device__ __forceinline__ void find_rows(bool new_tile) {
        if (A::LAYOUT == BY_STEP) {
            a.find_rows(operand_a, k, tile.k_end);
        } else if (new_tile) {
            a.find_rows(operand_a, tile.m, tile.m_end);
        }
        if (B::LAYOUT == BY_STEP) {
            b.find_rows(operand_b, k, tile.k_end);
        } else if (new_tile) {
            b.find_rows(operand_b, tile.n, sizes.N);
        }
    }

    __device__ __forceinline__ void open(int tile_number) {
        number = tile_number;
        if (number < tiles) {
            tile = find_tile<BY_EXPERT>(number, table, sizes);
            k = tile.k;
            a.find_expert(operand_a, tile.expert);
            b.find_expert(operand_b, tile.expert);
            find_rows(true);
        }
    }

    // starts the copies of the next step; after the last one an empty group, for those who count groups
    __device__ __forceinline__ void load(floatX *stage) {
        if (number < tiles) {
            a.copy(stage, operand_a, A::LAYOUT == BY_LINE ? k : tile.m);
            b.copy(stage + CopyA::ELEMENTS, operand_b, B::LAYOUT == BY_LINE ? k : tile.n);
            k += S::K;
            if (k < tile.k_end) {
                find_rows(false);
            } else {
                open(number + (int)gridDim.x);
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
// epilogues: store(sums, tile) is called by a whole warp, its own first row and column in tile.m and tile.n.
// NEIGHBOURS_IN_A_LANE: a lane is to hold 8 neighbours of C, not four pairs

struct Eight { // neighbours, as they are stored
    enum { PACKS = 8 / Pack<floatX>::SIZE };
    Pack<floatX> pack[PACKS];
};

__device__ __forceinline__ Eight load_eight(const floatX *from) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < Eight::PACKS; i++) {
        eight.pack[i] = load_pack(from + i * Pack<floatX>::SIZE);
    }
    return eight;
}

__device__ __forceinline__ void to_floats(float v[8], const Eight &eight) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = to_float(eight.pack[i / Pack<floatX>::SIZE].x[i % Pack<floatX>::SIZE]);
    }
}

// v becomes what was stored: rounded
__device__ __forceinline__ void store_eight(floatX *to, float v[8]) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        eight.pack[i / Pack<floatX>::SIZE].x[i % Pack<floatX>::SIZE] = to_x(v[i]);
    }
#pragma unroll
    for (int i = 0; i < Eight::PACKS; i++) {
        store_pack(to + i * Pack<floatX>::SIZE, eight.pack[i]);
    }
    to_floats(v, eight);
}

// This lane's neighbours of C in row 8 i + g: columns 32 group + 8t .. + 7
__device__ __forceinline__ void eight_columns(float v[8], const WarpSums &sums, int i, int group) {
#pragma unroll
    for (int c = 0; c < 8; c++) {
        v[c] = sums.c[i / 2][4 * group + c / 2][i % 2 * 2 + c % 2];
    }
}

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// C, rounded
struct StoreRows {
    enum { NEIGHBOURS_IN_A_LANE = 1, ROWS = Shape::WARP_M / 8, GROUPS = Shape::WARP_N / Shape::GROUP };
    floatX *out;
    int width;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int row = tile.m + 8 * i + lane_id() / 4;
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                int column = tile.n + Shape::GROUP * group + 8 * (lane_id() % 4);
                if (column < width) {
                    float v[8];
                    eight_columns(v, sums, i, group);
                    store_eight(out + (int64_t)row * width + column, v);
                }
            }
        }
    }
};

// G and U, rounded, and gate silu(G) U of what was rounded. B's lines are GATE_UP: group 0 is G, group 1 U
struct SwigluForward {
    enum { NEIGHBOURS_IN_A_LANE = 1, ROWS = Shape::WARP_M / 8 };
    ChunkH h;
    int again;                // only if H has no place in the store
    const float *gate_of_row; // of the chunk's rows
    int F;

    __device__ __forceinline__ bool nothing_to_do() const {
        return again && *h.place >= 0;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        int f = tile.n + 8 * (lane_id() % 4);
        if (f >= F) {
            return;
        }
        floatX *h_rows = chunk_h(h);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t row = tile.m + 8 * i + lane_id() / 4;
            floatX *to = h_rows + row * 3 * F + f;
            float gate = gate_of_row[row], G[8], U[8];
            eight_columns(G, sums, i, 0);
            eight_columns(U, sums, i, 1);
            store_eight(to, G);
            store_eight(to + F, U);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                G[c] *= gate * sigmoid(G[c]) * U[c];
            }
            store_eight(to + 2 * F, G);
        }
    }
};

// From dA' = C, G and U: dG and dU in their place, and each row's sum of dA' A over the warp's columns
struct SwigluBackward {
    enum {
        NEIGHBOURS_IN_A_LANE = 1,
        GROUPS = Shape::WARP_N / Shape::GROUP,
        PIECES = Shape::WARP_M / 8 * GROUPS, // groups of a lane's rows, row after row
        AHEAD = 2                            // pieces of H that are under way while one is worked on
    };
    struct Piece {
        Eight G, U;
        float gate;
    };
    ChunkH h;
    float *dgate_partial;     // [R, dgate_tiles]
    const float *gate_of_row; // of the chunk's rows
    int F, dgate_tiles;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    // zeros where there is no column
    __device__ __forceinline__ Piece load_piece(const floatX *h_rows, int row, int f) const {
        Piece piece = {};
        piece.gate = gate_of_row[row];
        if (f < F) {
            const floatX *from = h_rows + (int64_t)row * 3 * F + f;
            piece.G = load_eight(from);
            piece.U = load_eight(from + F);
        }
        return piece;
    }

    // stores what becomes of 8 columns of a row; returns their part of <dA', A>
    __device__ __forceinline__ float backward_piece(const float da[8], const Piece &piece, floatX *h_rows,
                                                    int row, int f) const {
        float G[8], U[8], dot = 0.0f;
        to_floats(G, piece.G);
        to_floats(U, piece.U);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float s = sigmoid(G[c]), silu = G[c] * s;
            float d = da[c] * piece.gate;
            dot += da[c] * silu * U[c];
            G[c] = d * U[c] * s * (1.0f + G[c] * (1.0f - s));
            U[c] = d * silu;
        }
        if (f < F) {
            floatX *to = h_rows + (int64_t)row * 3 * F + f;
            store_eight(to, G);
            store_eight(to + F, U);
        }
        return dot;
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        int t = lane_id() % 4, f = tile.n + 8 * t, row = tile.m + lane_id() / 4;
        floatX *h_rows = chunk_h(h);
        Piece pieces[AHEAD + 1];
        float dot = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES + AHEAD; p++) {
            if (p < PIECES) {
                pieces[p % (AHEAD + 1)] =
                    load_piece(h_rows, row + p / GROUPS * 8, f + p % GROUPS * Shape::GROUP);
            }
            int now = p - AHEAD, i = now / GROUPS, group = now % GROUPS;
            if (now < 0) {
                continue;
            }
            __syncwarp(); // one after the other: the compiler would mix them and run out of registers
            float da[8];
            eight_columns(da, sums, i, group);
            dot +=
                backward_piece(da, pieces[now % (AHEAD + 1)], h_rows, row + 8 * i, f + group * Shape::GROUP);
            if (group == GROUPS - 1) { // the row is complete: the four lanes' sums
                dot += __shfl_xor_sync(0xffffffffu, dot, 1);
                dot += __shfl_xor_sync(0xffffffffu, dot, 2);
                if (t == 0) {
                    dgate_partial[(int64_t)(row + 8 * i) * dgate_tiles + tile.n / Shape::WARP_N] = dot;
                }
                dot = 0.0f;
            }
        }
    }
};

// an expert's matrix += C; here rows of C may end anywhere
struct AddToWeights {
    enum { NEIGHBOURS_IN_A_LANE = 0, ROWS = Shape::WARP_M / 8, PAIRS = Shape::WARP_N / 8, AHEAD = 2 };
    float *dw;
    int M, N;
    RowChunk chunk;

    __device__ __forceinline__ bool nothing_to_do() const {
        return false;
    }

    __device__ __forceinline__ float2 *at(const Tile &tile, int m, int j) const {
        int64_t row = (int64_t)tile.expert * M + m;
        return (float2 *)(dw + row * N + tile.n + 8 * j + 2 * (lane_id() % 4));
    }

    __device__ __forceinline__ void load_row(float2 old[PAIRS], const Tile &tile, int m, bool set) const {
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            if (m < M && tile.n + 8 * j < N) {
                old[j] = set ? make_float2(0.0f, 0.0f) : *at(tile, m, j);
            }
        }
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        int m0 = tile.m + lane_id() / 4;
        bool set = sets_gradient(chunk, tile.expert);
        float2 old[AHEAD + 1][PAIRS];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            load_row(old[i], tile, m0 + 8 * i, set);
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (i + AHEAD < ROWS) {
                load_row(old[(i + AHEAD) % (AHEAD + 1)], tile, m0 + 8 * (i + AHEAD), set);
            }
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                if (m0 + 8 * i < M && tile.n + 8 * j < N) {
                    const float2 &was = old[i % (AHEAD + 1)][j];
                    const float *c = sums.c[i / 2][j] + i % 2 * 2;
                    *at(tile, m0 + 8 * i, j) = make_float2(was.x + c[0], was.y + c[1]);
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

// [dG | dU]
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
        data, {NULL, NULL, NULL}, 0, width, width, 0, chunk.token_of_row + chunk.first};
    return operand;
}

template <OperandLayout LAYOUT, OperandRows ROWS>
static Operand<LAYOUT, ROWS> weights(const floatX *data, int width, int64_t per_expert) {
    Operand<LAYOUT, ROWS> operand = {data, {NULL, NULL, NULL}, 0, width, width, per_expert, NULL};
    return operand;
}

// G, U = X' W_gate_up^T; gate A. again: backward's call, only for what is not in the store
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

// dW_gate_up[e] += [dG | dU]^T X'
static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    AddToWeights epilogue = {dw_gate_up, 2 * F, d, chunk};
    multiply_chunk(sizes_by_expert(chunk, 2 * F, d), rows_of_dh<BY_STEP>(h, F),
                   rows_of_tokens<BY_STEP>(x, d, chunk), epilogue, stream);
}

// dX' = [dG | dU] W_gate_up
static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    StoreRows epilogue = {dx, d};
    multiply_chunk(sizes_by_rows(chunk, d, 2 * F), rows_of_dh<BY_LINE>(h, F),
                   weights<BY_STEP, IN_ORDER>(w_gate_up, d, (int64_t)2 * F * d), epilogue, stream);
}

} // namespace portable

#endif
