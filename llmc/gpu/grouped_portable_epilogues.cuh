/*
The grouped GEMM on any GPU: what becomes of a finished tile. Four epilogues, named as Hopper's
(grouped_hopper_epilogues.cuh): StoreRows, SwigluForward, SwigluBackward, AddToWeights. Formulas, with silu(g)
= g s, s = sigmoid(g), of the rounded G and U:

    SwigluForward    A = U silu(G), times gate
    SwigluBackward   dG = gate dA' U silu'(G);  dU = gate dA' silu(G);  <dA', A>, a warp's part of dgate
*/
#ifndef GROUPED_PORTABLE_EPILOGUES_CUH
#define GROUPED_PORTABLE_EPILOGUES_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/grouped_portable_tiles.cuh"
// defines: load_pack, store_pack, to_float, to_x; Shape, WarpSums, Tile, chunk_h

namespace portable {

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

// v becomes what is stored: rounded, also if it is not wanted in memory
__device__ __forceinline__ void store_eight(floatX *to, float v[8], bool wanted = true) {
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        eight.pack[i / Pack<floatX>::SIZE].x[i % Pack<floatX>::SIZE] = to_x(v[i]);
    }
#pragma unroll
    for (int i = 0; i < Eight::PACKS && wanted; i++) {
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
    int again;                // only if H is not kept
    const float *gate_of_row; // of the chunk's rows
    int F;

    __device__ __forceinline__ bool nothing_to_do() const {
        return again && is_kept(h);
    }

    __device__ __forceinline__ void store(const WarpSums &sums, const Tile &tile) const {
        int f = tile.n + 8 * (lane_id() % 4);
        if (f >= F) {
            return;
        }
        floatX *h_rows = chunk_h(h, F);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t row = tile.m + 8 * i + lane_id() / 4;
            floatX *to = h_rows + row * 3 * F + f;
            float gate = gate_of_row[row], G[8], U[8];
            eight_columns(G, sums, i, 0);
            eight_columns(U, sums, i, 1);
            store_eight(to, G, !h.alone);
            store_eight(to + F, U, !h.alone);
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
        floatX *h_rows = chunk_h(h, F);
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

} // namespace portable

#endif
