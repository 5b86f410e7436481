/*
The grouped GEMM on any GPU: its operands, and how their tiles come into shared memory. An operand says how it
is stored, [line][k] or [k][line], and which of its rows to read (gathered by token, in order, an expert's
weights). Errors: none.
*/
#ifndef GROUPED_PORTABLE_LOAD_CUH
#define GROUPED_PORTABLE_LOAD_CUH

#include "llmc/gpu/grouped_portable_tiles.cuh"
// defines: Shape, Sizes, Tile, TableRow, find_tile, chunk_h; cp_async16

namespace portable {

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
        matrix = operand.data != NULL ? operand.data
                                      : operand.h.buffer + *operand.h.first * operand.stride + operand.first;
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

} // namespace portable

#endif
