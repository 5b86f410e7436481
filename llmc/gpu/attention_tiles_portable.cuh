/*
The tiles that attention's portable kernels are made of (attention_portable.cuh,
attention_backward_portable.cuh): sizes, copies between memory, shared memory and registers, and two products
of tensor cores (mma.cuh).

    product_nt   C [16 M, N]  = A B^T   A: the warp's own rows [16 M, HD], B: a tile [N, HD]   scores, dP
    product_nn   C [16 M, HD] += P B    P: accumulators [16 M, K] as A,    B: a tile [K, HD]   O, dQ, dK, dV

A tile in shared memory has rows of HD numbers, the head size hd rounded up to 32, 64, 96 or 128 with columns
of zeros, and 16 bytes between rows. A block is four warps, each with 16 M rows. Loops over fragments have
constant bounds: the compiler unrolls them and keeps all fragments in registers.
*/
#ifndef ATTENTION_TILES_PORTABLE_CUH
#define ATTENTION_TILES_PORTABLE_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/mma.cuh"
#include "llmc/gpu/sums.cuh"
#include "llmc/rope.cuh"
// defines: LOG2_E, LN_2, power_of_2; FragA, FragB, load_a, load_b2, load_b2_trans, a_from_c, mma, cp_async16;
// quad_sum, quad_max; rope_turn, rope_backward

namespace portable {

enum {
    ATTENTION_WARPS = 4,
    ATTENTION_THREADS = 32 * ATTENTION_WARPS,
    ATTENTION_PAD =
        64 // scratch has a multiple of so many rows per head: whole tiles of the backward's queries
};

// Tile sizes for head size HD. M: fragments of 16 rows that a warp owns; KEEP: their operands stay in
// registers (else they are read from shared memory each time); STEP: columns of a tile at a time. What bounds
// them is the 255 registers per thread at two blocks per multiprocessor, and 99 KB of shared memory per block
template <int HD> struct AttentionTile {
    enum {
        SKEW = 16 / sizeof(floatX),
        LD = HD + SKEW, // a row in shared memory: eight rows' 16 bytes lie in different banks
        BF16 = sizeof(floatX) == 2,
        // forward
        M = BF16 ? 2 : 1,
        ROWS = 16 * M * ATTENTION_WARPS,
        KEYS = BF16 && HD <= 96 ? 64 : 32,
        KEEP = BF16 && HD <= 64,
        // dq
        DQ_M = BF16 && HD <= 96 ? 2 : 1,
        DQ_ROWS = 16 * DQ_M * ATTENTION_WARPS,
        DQ_KEYS = BF16 ? (HD <= 64 ? 64 : 32) : 16,
        DQ_STEP = BF16 && HD <= 64 ? 32 : 16,
        DQ_KEEP = BF16,
        // dk and dv
        DKV_M = BF16 && HD <= 64 ? 2 : 1,
        DKV_ROWS = 16 * DKV_M * ATTENTION_WARPS,
        DKV_QUERIES = BF16 ? (HD <= 96 ? 64 : 32) : 16,
        DKV_STEP = BF16 && HD > 64 ? 32 : 16,
        DKV_KEEP = BF16 && HD <= 96,
        // shared memory: the block's own rows and two stages (lse and D of the queries are fp32)
        ROW_BYTES = LD * sizeof(floatX),
        FORWARD_BYTES = (ROWS + 4 * KEYS) * ROW_BYTES,
        DQ_BYTES = (2 * DQ_ROWS + 4 * DQ_KEYS) * ROW_BYTES,
        DKV_BYTES = (2 * DKV_ROWS + 4 * DKV_QUERIES) * ROW_BYTES + 4 * DKV_QUERIES * sizeof(float)
    };
    static_assert(HD % 32 == 0,
                  "RoPE's halves are whole fragments, and a row is whole pieces for four lanes");
    static_assert(DQ_KEYS % DQ_STEP == 0 && DKV_QUERIES % DKV_STEP == 0, "a tile is whole steps");
    static_assert(KEYS % 16 == 0 && DQ_STEP % 16 == 0 && DKV_STEP % 16 == 0, "a step is whole fragments");
    static_assert(ATTENTION_PAD % DKV_QUERIES == 0, "scratch has whole tiles of queries");
    static_assert(DKV_QUERIES / 2 <= ATTENTION_THREADS, "a thread copies four of a stage's lse and D");
    static_assert(!BF16 || (FORWARD_BYTES <= 99 << 10 && DQ_BYTES <= 99 << 10 && DKV_BYTES <= 99 << 10),
                  "a block of any GPU may have 99 KB");
};

// ----------------------------------------------------------------------------
// tiles between memory, shared memory and registers

// tile [ROWS, LD] = rows of `from`, `stride` apart; zeros beyond `rows` and hd (if not FULL). Asynchronous
template <int ROWS, int HD, bool FULL>
__device__ __forceinline__ void copy_tile(floatX *tile, const floatX *from, int stride, int rows, int hd) {
    enum {
        SIZE = Pack<floatX>::SIZE,
        LANES = HD / SIZE % 8 == 0 ? 8 : 4, // threads side by side in a row
        STEP = ATTENTION_THREADS / LANES
    };
    int row = (int)threadIdx.x / LANES, column = (int)threadIdx.x % LANES * SIZE;
    const floatX *at = from + (row * stride + column); // within a tile 32 bits are enough
    floatX *to = tile + row * AttentionTile<HD>::LD + column;
    for (int r = 0; r < ROWS && (ROWS % STEP == 0 || r + row < ROWS); r += STEP) {
        for (int c = 0; c < HD; c += LANES * SIZE) {
            bool valid = FULL || (r + row < rows && c + column < hd);
            cp_async16(to + r * AttentionTile<HD>::LD + c, valid ? at + c : from, valid);
        }
        at += STEP * stride;
    }
}

template <int ROWS, int HD>
__device__ __forceinline__ void copy_tile(floatX *tile, const floatX *from, int stride, int rows, int hd) {
    if (rows >= ROWS && hd == HD) {
        copy_tile<ROWS, HD, true>(tile, from, stride, rows, hd);
    } else {
        copy_tile<ROWS, HD, false>(tile, from, stride, rows, hd);
    }
}

struct alignas(2 * sizeof(floatX)) FloatXPair {
    floatX low, high;
};

// a warp's accumulators [16 M, HD] times scale become rows of `to`, by way of its own rows `stage` in shared
// memory, so that whole pieces of 16 bytes are written
template <int M, int HD>
__device__ __forceinline__ void store_rows(floatX *to, int stride, int rows, int hd, floatX *stage,
                                           const float acc[M][HD / 8][4], float scale) {
    enum { LD = AttentionTile<HD>::LD, SIZE = Pack<floatX>::SIZE, PIECES = HD / SIZE };
    int lane = lane_id(), g = lane / 4, t = lane % 4;
    __syncwarp(); // the last products have read these rows
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < HD / 8; n++) {
            for (int i = 0; i < 4; i += 2) {
                FloatXPair pair = {to_x(acc[m][n][i] * scale), to_x(acc[m][n][i + 1] * scale)};
                floatX *at = stage + (16 * m + g + 4 * i) * LD + 8 * n + 2 * t;
                *reinterpret_cast<FloatXPair *>(at) = pair;
            }
        }
    }
    __syncwarp();
    for (int i = 0; i < M * PIECES / 2; i++) {
        int row = (32 * i + lane) / PIECES, column = (32 * i + lane) % PIECES * SIZE;
        if (row < rows && column < hd) {
            store_pack(to + (int64_t)row * stride + column, load_pack(stage + row * LD + column));
        }
    }
}

// RoPE's rotation back of a warp's accumulators [16 M, HD], of positions position .. below T
template <int M, int HD>
__device__ __forceinline__ void turn_rows(float acc[M][HD / 8][4], const float *table, int position, int T) {
    int lane = lane_id();
    for (int i = 0; i < 2 * M; i++) { // rows i = 0 (g) and 1 (g + 8) of each fragment
        int at = min(position + 8 * i + lane / 4, T - 1);
        const float *angles = table + (int64_t)at * HD + lane % 4 * 2;
        for (int n = 0; n < HD / 16; n++) {
            for (int j = 0; j < 2; j++) {
                rope_turn(acc[i / 2][n][i % 2 * 2 + j], acc[i / 2][n + HD / 16][i % 2 * 2 + j],
                          angles[8 * n + j], angles[HD / 2 + 8 * n + j], -1.0f);
            }
        }
    }
}

// a warp's 16 M rows of a tile as left operand
template <int M, int HD, bool KEEP> struct WarpRows {
    const floatX *tile;
    FragA kept[KEEP ? M : 1][KEEP ? HD / 16 : 1];

    __device__ __forceinline__ void begin(const floatX *rows) {
        tile = rows;
        for (int i = 0; KEEP && i < M * HD / 16; i++) {
            read(kept[i / (HD / 16)][i % (HD / 16)], i / (HD / 16), i % (HD / 16));
        }
    }
    __device__ __forceinline__ void read(FragA &a, int m, int k) const {
        load_a(a, tile + 16 * m * AttentionTile<HD>::LD + 16 * k, AttentionTile<HD>::LD);
    }
    __device__ __forceinline__ void get(FragA &a, int m, int k) const {
        if (KEEP) {
            a = kept[KEEP ? m : 0][KEEP ? k : 0];
        } else {
            read(a, m, k);
        }
    }
};

// C [16 M, N] = A B^T: B's rows are the tile's rows
template <int M, int N, int HD, bool KEEP>
__device__ __forceinline__ void product_nt(float c[M][N / 8][4], const WarpRows<M, HD, KEEP> &rows,
                                           const floatX *tile) {
    enum { LD = AttentionTile<HD>::LD };
    for (int i = 0; i < M * N / 2; i++) {
        c[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0.0f;
    }
    for (int k = 0; k < HD / 16; k++) {
        FragA a[M];
        for (int m = 0; m < M; m++) {
            rows.get(a[m], m, k);
        }
        for (int n = 0; n < N / 16; n++) {
            FragB b[2];
            load_b2(b, tile + 16 * n * LD + 16 * k, LD);
            for (int m = 0; m < M; m++) {
                mma(c[m][2 * n], a[m], b[0]);
                mma(c[m][2 * n + 1], a[m], b[1]);
            }
        }
    }
}

// C [16 M, HD] += P B: P are accumulators [16 M, K], rounded to floatX here; B is the tile [K, HD]
template <int M, int K, int HD>
__device__ __forceinline__ void product_nn(float c[M][HD / 8][4], const float p[M][K / 8][4],
                                           const floatX *tile) {
    enum { LD = AttentionTile<HD>::LD };
    for (int k = 0; k < K / 16; k++) {
        FragA a[M];
        for (int m = 0; m < M; m++) {
            a_from_c(a[m], p[m][2 * k], p[m][2 * k + 1]);
        }
        for (int n = 0; n < HD / 16; n++) {
            FragB b[2];
            load_b2_trans(b, tile + 16 * k * LD + 16 * n, LD);
            for (int m = 0; m < M; m++) {
                mma(c[m][2 * n], a[m], b[0]);
                mma(c[m][2 * n + 1], a[m], b[1]);
            }
        }
    }
}

// scores [16 M, N] of positions `row`.. and `column`.. of which the key lies in the query's future become
// -infinity; rows are queries, TRANSPOSED: keys
template <int M, int N, bool TRANSPOSED>
__device__ __forceinline__ void mask_future(float s[M][N / 8][4], int row, int column) {
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int m = 0; m < M; m++) {
        for (int i = 0; i < N / 2; i++) {
            int ahead = column + i / 4 * 8 + 2 * t + i % 2 - (row + 16 * m + g + i % 4 / 2 * 8);
            s[m][i / 4][i % 4] = (TRANSPOSED ? ahead < 0 : ahead > 0) ? -INFINITY : s[m][i / 4][i % 4];
        }
    }
}

// ----------------------------------------------------------------------------
// steps of a kernel

// Keys and values of one head, tile by tile, in two stages of shared memory: [KEYS, LD] each
template <int KEYS, int HD> struct KeyStages {
    enum { LD = AttentionTile<HD>::LD };
    floatX *tiles;
    const floatX *from;   // the head's first key
    int stride, to_value; // elements from a key to the next; from a key to its value
    int T, hd;

    __device__ __forceinline__ floatX *keys(int key) const {
        return tiles + key / KEYS % 2 * 2 * KEYS * LD;
    }
    __device__ __forceinline__ floatX *values(int key) const {
        return keys(key) + KEYS * LD;
    }
    // the tile of `key` is on its way
    __device__ __forceinline__ void load(int key) const {
        const floatX *first = from + (int64_t)key * stride;
        copy_tile<KEYS, HD>(keys(key), first, stride, T - key, hd);
        copy_tile<KEYS, HD>(values(key), first + to_value, stride, T - key, hd);
        cp_async_commit();
    }
};

// until the newest stage is there, and all threads have done with the other one
__device__ __forceinline__ void wait_stage() {
    cp_async_wait<0>();
    __syncthreads();
}

// Scores of the warp's rows, positions `row` .., and of columns, positions `column` ..; the future is masked
// where there is any. Rows are queries; TRANSPOSED: keys
template <int M, int N, bool TRANSPOSED, int HD, bool KEEP>
__device__ __forceinline__ void make_scores(float s[M][N / 8][4], const WarpRows<M, HD, KEEP> &rows,
                                            const floatX *tile, int row, int column) {
    product_nt<M, N, HD>(s, rows, tile);
    if (TRANSPOSED ? column < row + 16 * M - 1 : column + N - 1 > row) {
        mask_future<M, N, TRANSPOSED>(s, row, column);
    }
}

} // namespace portable

#endif
