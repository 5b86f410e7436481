/*
Attention on any GPU from sm_80 on, and in fp32: the functions of attention.cuh in namespace portable. Scores
and probabilities exist only as accumulators of one tile of queries x keys (attention.h has the formulas; Dao
et al., 2022, 2023 the method).

forward   A block owns 128 queries of a head, a warp 32 of them, and walks over the tiles of keys up to the
          diagonal with the softmax made as it goes ("online"): per row the maximum m and the sum l so far;
          where a tile raises the maximum from m to m', l and the output so far are multiplied by exp(m - m').
          A lane's scores are already placed as a next product's left operand wants them (a_from_c), so that
          P goes from S = Q K^T to O += P V through no memory.
backward  Two kernels, each with its sums in registers: no atomics, no order that depends on scheduling.
          attention_dq_kernel   a block owns queries:   ds from S = Q K^T, dP = dO V^T;      dQ = ds K
          attention_dkv_kernel  a block owns keys and walks over the queries of all heads of the group, with
                                the tiles transposed:   S^T = K Q^T, dP^T = V dO^T;  dV = P^T dO, dK = ds^T Q
          Seven products instead of the five of a kernel that adds dQ across blocks: the price of registers.

exp(x) is computed as 2^(x log2 e): scores stay unscaled, and scale log2 e is folded into the exponent. The
backward needs D_t = dout_t . out_t (from the stored, rounded out): the first kernel makes it on its way. dq
and dk are turned back by RoPE's angles before they are rounded, where a thread has columns i and i + hd/2:
where hd is 32, 64, 96 or 128. For other heads rope_backward does it afterwards (and what it reads is rounded
already). A position that sees only itself (t = 0) has p = 1 and ds = 0 exactly, as in attention.h. Loops over
fragments have constant bounds: the compiler unrolls them and keeps all of them in registers.

qkv [B, T, (H + 2 KV) hd], out [B, T - start, H hd], lse [B, H, T - start] (natural logarithm, fp32); scratch
[B, H, 2, T rounded up to 64] is lse in base 2 and D. Buffers begin at multiples of 16 bytes, hd is a multiple
of 8; tiles have hd rounded up to 32, 64, 96 or 128 with columns of zeros.
*/
#ifndef ATTENTION_PORTABLE_CUH
#define ATTENTION_PORTABLE_CUH

#include "llmc/gpu/mma.cuh"
#include "llmc/rope.cuh"
// defines: FragA, FragB, load_a, load_b2, load_b2_trans, a_from_c, mma, cp_async16; rope_turn, rope_backward

namespace portable {

enum {
    ATTENTION_WARPS = 4,
    ATTENTION_THREADS = 32 * ATTENTION_WARPS,
    ATTENTION_PAD = 64 // rows of scratch are a multiple: no tile of queries of the backward is larger
};

// Tile sizes for head size HD. M: fragments of 16 rows that a warp owns; KEEP: their operands stay in
// registers (else they are read from shared memory each time); STEP: columns of a tile at a time. What bounds
// them is the 255 registers of a thread at two blocks a processor, and 99 KB of shared memory a block
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
        DKV_KEEP = BF16 && HD <= 96
    };
};

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

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
// forward

// One more tile of scores: s becomes p = 2^(c s - max), sum (this lane's share) and the output so far follow
// a new maximum; for rows i = 0 (g) and 1 (g + 8) of each fragment. max is in units of the exponent; it need
// not be the true maximum, only near it: nothing is rescaled while p stays below 2^8
template <int M, int N, int HD>
__device__ __forceinline__ void online_softmax(float s[M][N / 8][4], float o[M][HD / 8][4], float max[M][2],
                                               float sum[M][2], float c) {
    float top[M][2];
    bool grows = false;
    for (int i = 0; i < 2 * M; i++) {
        float most = -INFINITY;
        for (int n = 0; n < N / 8; n++) {
            const float *pair = &s[i / 2][n][i % 2 * 2];
            most = fmaxf(most, fmaxf(pair[0], pair[1]));
        }
        top[i / 2][i % 2] = quad_max(most) * c;
        grows = grows || top[i / 2][i % 2] > max[i / 2][i % 2] + 8.0f;
    }
    if (__any_sync(0xffffffffu, grows)) { // always at the first tile: max was -infinity, keep is 0
        for (int i = 0; i < 2 * M; i++) {
            float old = max[i / 2][i % 2], raised = top[i / 2][i % 2] > old + 8.0f ? top[i / 2][i % 2] : old;
            float keep = power_of_2(old - raised);
            max[i / 2][i % 2] = raised;
            sum[i / 2][i % 2] *= keep;
            for (int n = 0; n < HD / 8; n++) {
                o[i / 2][n][i % 2 * 2] *= keep;
                o[i / 2][n][i % 2 * 2 + 1] *= keep;
            }
        }
    }
    for (int m = 0; m < M; m++) {
        for (int i = 0; i < N / 2; i++) {
            float *p = &s[m][i / 4][i % 4];
            *p = power_of_2(*p * c - max[m][i % 4 / 2]);
            sum[m][i % 4 / 2] += *p;
        }
    }
}

// block: a tile of queries of one head; the longest rows first
template <int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, int T, int start, int H, int KV,
                             int hd, float c) {
    typedef AttentionTile<HD> Tile;
    enum { M = Tile::M, ROWS = Tile::ROWS, KEYS = Tile::KEYS, LD = Tile::LD };
    floatX *q_tile = (floatX *)shared_memory(); // [ROWS, LD]
    floatX *kv_tiles = q_tile + ROWS * LD;      // two stages of keys [KEYS, LD] and values [KEYS, LD]
    int h = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = start + (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int last = min(first + ROWS, T) - 1;
    int width = (H + 2 * KV) * hd;
    const floatX *q = qkv + ((int64_t)b * T + first) * width + h * hd;
    const floatX *k = qkv + (int64_t)b * T * width + (H + h / (H / KV)) * hd;
    auto load_stage = [&](int key) {
        floatX *stage = kv_tiles + key / KEYS % 2 * 2 * KEYS * LD;
        const floatX *from = k + (int64_t)key * width;
        copy_tile<KEYS, HD>(stage, from, width, T - key, hd);
        copy_tile<KEYS, HD>(stage + KEYS * LD, from + KV * hd, width, T - key, hd);
        cp_async_commit();
    };
    copy_tile<ROWS, HD>(q_tile, q, width, T - first, hd);
    cp_async_commit();
    load_stage(0);
    cp_async_wait<1>();
    __syncthreads(); // queries are there

    int warp_row = (int)threadIdx.x / 32 * 16 * M;
    floatX *own = q_tile + warp_row * LD;
    int row = first + warp_row; // this warp's rows: row .. row + 16 M - 1
    WarpRows<M, HD, Tile::KEEP> queries;
    queries.begin(own);
    float o[M][HD / 8][4] = {};
    float max[M][2], sum[M][2];
    for (int m = 0; m < M; m++) {
        max[m][0] = max[m][1] = -INFINITY;
        sum[m][0] = sum[m][1] = 0.0f;
    }
    for (int key = 0; key <= last; key += KEYS) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and all have done with the other one
        if (key + KEYS <= last) {
            load_stage(key + KEYS);
        }
        if (key < row + 16 * M) { // else all of it is in this warp's future
            const floatX *stage = kv_tiles + key / KEYS % 2 * 2 * KEYS * LD;
            float s[M][KEYS / 8][4];
            product_nt<M, KEYS, HD>(s, queries, stage);
            if (key + KEYS - 1 > row) {
                mask_future<M, KEYS, false>(s, row, key);
            }
            online_softmax<M, KEYS, HD>(s, o, max, sum, c);
            product_nn<M, KEYS, HD>(o, s, stage + KEYS * LD);
        }
    }

    int64_t out_row = row - start;
    int rows_out = T - start;
    for (int i = 0; i < 2 * M; i++) {
        float total = quad_sum(sum[i / 2][i % 2]);
        int at = row + 8 * i + lane_id() / 4;
        if (at < T && lane_id() % 4 == 0) {
            float base2 = max[i / 2][i % 2] + log2f(total);
            lse[((int64_t)b * H + h) * rows_out + at - start] = base2 * 0.693147181f;
        }
        float inverse = 1.0f / total;
        for (int n = 0; n < HD / 8; n++) {
            o[i / 2][n][i % 2 * 2] *= inverse;
            o[i / 2][n][i % 2 * 2 + 1] *= inverse;
        }
    }
    store_rows<M, HD>(out + ((int64_t)b * rows_out + out_row) * H * hd + h * hd, H * hd, T - row, hd, own, o,
                      1.0f);
}

// ----------------------------------------------------------------------------
// backward

// D of the row of dout and out that this lane's quad reads, columns shared out by 16 bytes
template <int HD>
__device__ __forceinline__ float row_dot(const floatX *dout, const floatX *out, bool valid, int hd) {
    enum { SIZE = Pack<floatX>::SIZE };
    float sum = 0.0f;
    for (int i = 0; i < HD / (4 * SIZE); i++) {
        int column = (4 * i + lane_id() % 4) * SIZE;
        if (valid && column < hd) {
            Pack<floatX> a = load_pack(dout + column), b = load_pack(out + column);
            for (int j = 0; j < SIZE; j++) {
                sum += to_float(a.x[j]) * to_float(b.x[j]);
            }
        }
    }
    return quad_sum(sum);
}

// block: a tile of queries of one head, longest rows first. Also fills scratch for the second kernel
template <int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_dq_kernel(floatX *dqkv, float *scratch, const floatX *dout, const floatX *out,
                        const floatX *qkv, const float *lse, const float *rope_table, int T, int H, int KV,
                        int hd, float scale) {
    typedef AttentionTile<HD> Tile;
    enum { M = Tile::DQ_M, ROWS = Tile::DQ_ROWS, KEYS = Tile::DQ_KEYS, STEP = Tile::DQ_STEP, LD = Tile::LD };
    floatX *q_tile = (floatX *)shared_memory(); // [ROWS, LD]
    floatX *do_tile = q_tile + ROWS * LD;       // [ROWS, LD]
    floatX *kv_tiles = do_tile + ROWS * LD;     // two stages of keys [KEYS, LD] and values [KEYS, LD]
    int h = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int last = min(first + ROWS, T) - 1;
    int width = (H + 2 * KV) * hd;
    int64_t q_at = ((int64_t)b * T + first) * width + h * hd;
    int64_t out_at = ((int64_t)b * T + first) * H * hd + h * hd;
    const floatX *k = qkv + (int64_t)b * T * width + (H + h / (H / KV)) * hd;
    auto load_stage = [&](int key) {
        floatX *stage = kv_tiles + key / KEYS % 2 * 2 * KEYS * LD;
        const floatX *from = k + (int64_t)key * width;
        copy_tile<KEYS, HD>(stage, from, width, T - key, hd);
        copy_tile<KEYS, HD>(stage + KEYS * LD, from + KV * hd, width, T - key, hd);
        cp_async_commit();
    };
    copy_tile<ROWS, HD>(q_tile, qkv + q_at, width, T - first, hd);
    copy_tile<ROWS, HD>(do_tile, dout + out_at, H * hd, T - first, hd);
    cp_async_commit();
    load_stage(0);

    int warp_row = (int)threadIdx.x / 32 * 16 * M;
    int row = first + warp_row;
    int padded = ceil_div(T, (int)ATTENTION_PAD) * ATTENTION_PAD;
    float *row_lse = scratch + ((int64_t)b * H + h) * 2 * padded, *row_d = row_lse + padded;
    float lse2[M][2], D[M][2]; // of this lane's rows
    for (int i = 0; i < 2 * M; i++) {
        int local = warp_row + 8 * i + lane_id() / 4;
        int at = first + local;
        bool valid = at < T;
        int64_t from = out_at + (int64_t)local * H * hd;
        float d = row_dot<HD>(dout + from, out + from, valid, hd);
        // position 0 sees only itself: an infinite lse makes p and ds exactly 0; the second kernel sets p = 1
        float l = valid && at > 0 ? lse[((int64_t)b * H + h) * T + at] * 1.44269504f : INFINITY;
        if (at < padded && lane_id() % 4 == 0) {
            row_lse[at] = l;
            row_d[at] = d;
        }
        lse2[i / 2][i % 2] = l;
        D[i / 2][i % 2] = d;
    }
    cp_async_wait<1>();
    __syncthreads(); // queries and dout are there

    floatX *own = q_tile + warp_row * LD;
    WarpRows<M, HD, Tile::DQ_KEEP> queries, douts;
    queries.begin(own);
    douts.begin(do_tile + warp_row * LD);
    float c = scale * 1.44269504f;
    float dq[M][HD / 8][4] = {};
    for (int key = 0; key <= last; key += KEYS) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and all have done with the other one
        if (key + KEYS <= last) {
            load_stage(key + KEYS);
        }
        const floatX *stage = kv_tiles + key / KEYS % 2 * 2 * KEYS * LD;
        for (int j = 0; j < KEYS && key + j < row + 16 * M; j += STEP) { // beyond: this warp's future
            float s[M][STEP / 8][4], dp[M][STEP / 8][4];
            product_nt<M, STEP, HD>(s, queries, stage + j * LD);
            if (key + j + STEP - 1 > row) {
                mask_future<M, STEP, false>(s, row, key + j);
            }
            for (int m = 0; m < M; m++) {
                for (int i = 0; i < STEP / 2; i++) {
                    s[m][i / 4][i % 4] = power_of_2(s[m][i / 4][i % 4] * c - lse2[m][i % 4 / 2]);
                }
            }
            product_nt<M, STEP, HD>(dp, douts, stage + (KEYS + j) * LD);
            for (int m = 0; m < M; m++) {
                for (int i = 0; i < STEP / 2; i++) {
                    float *ds = &dp[m][i / 4][i % 4];
                    *ds = s[m][i / 4][i % 4] * (*ds - D[m][i % 4 / 2]);
                }
            }
            product_nn<M, STEP, HD>(dq, dp, stage + j * LD);
        }
    }
    if (hd == HD) {
        turn_rows<M, HD>(dq, rope_table, row, T);
    }
    store_rows<M, HD>(dqkv + q_at + (int64_t)warp_row * width, width, T - row, hd, own, dq, scale);
}

// block: a tile of keys of one key/value head, and all queries that see it, head by head. Scores are
// transposed: their rows are keys
template <int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_dkv_kernel(floatX *dqkv, const float *scratch, const floatX *dout, const floatX *qkv,
                         const float *rope_table, int T, int H, int KV, int hd, float scale) {
    typedef AttentionTile<HD> Tile;
    enum { M = Tile::DKV_M, ROWS = Tile::DKV_ROWS, QUERIES = Tile::DKV_QUERIES, STEP = Tile::DKV_STEP };
    enum { LD = Tile::LD, STAGE = 2 * QUERIES * LD };
    floatX *k_tile = (floatX *)shared_memory(); // [ROWS, LD]
    floatX *v_tile = k_tile + ROWS * LD;        // [ROWS, LD]
    floatX *q_tiles = v_tile + ROWS * LD;       // two stages of queries [QUERIES, LD] and dout [QUERIES, LD]
    float *row_tiles = (float *)(q_tiles + 2 * STAGE); // two stages of lse [QUERIES] and D [QUERIES]
    int kv = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = (int)blockIdx.z * ROWS; // the first keys are seen by most queries
    int width = (H + 2 * KV) * hd;
    int64_t k_at = ((int64_t)b * T + first) * width + (H + kv) * hd;
    int padded = ceil_div(T, (int)ATTENTION_PAD) * ATTENTION_PAD;
    auto load_stage = [&](int head, int query, int parity) {
        floatX *stage = q_tiles + parity * STAGE;
        int64_t position = (int64_t)b * T + query;
        copy_tile<QUERIES, HD>(stage, qkv + position * width + head * hd, width, T - query, hd);
        copy_tile<QUERIES, HD>(stage + QUERIES * LD, dout + position * H * hd + head * hd, H * hd, T - query,
                               hd);
        if (threadIdx.x < QUERIES / 2) { // four floats a thread
            int i = (int)threadIdx.x % (QUERIES / 4), which = (int)threadIdx.x / (QUERIES / 4);
            cp_async16(row_tiles + (2 * parity + which) * QUERIES + 4 * i,
                       scratch + (((int64_t)b * H + head) * 2 + which) * padded + query + 4 * i, true);
        }
        cp_async_commit();
    };
    int head = kv * (H / KV), query = first;
    int stages = H / KV * ceil_div(T - first, (int)QUERIES);
    copy_tile<ROWS, HD>(k_tile, qkv + k_at, width, T - first, hd);
    copy_tile<ROWS, HD>(v_tile, qkv + k_at + KV * hd, width, T - first, hd);
    cp_async_commit();
    load_stage(head, query, 0);
    cp_async_wait<1>();
    __syncthreads(); // keys and values are there

    int warp_row = (int)threadIdx.x / 32 * 16 * M;
    int row = first + warp_row; // this warp's keys: row .. row + 16 M - 1
    floatX *own_k = k_tile + warp_row * LD, *own_v = v_tile + warp_row * LD;
    WarpRows<M, HD, Tile::DKV_KEEP> keys, values;
    keys.begin(own_k);
    values.begin(own_v);
    float c = scale * 1.44269504f;
    int t = lane_id() % 4;
    float dk[M][HD / 8][4] = {}, dv[M][HD / 8][4] = {};
    for (int i = 0; i < stages; i++) {
        int next = query + QUERIES < T ? query + QUERIES : first; // then the next head's first
        cp_async_wait<0>();
        __syncthreads(); // this stage is there, and all have done with the other one
        if (i + 1 < stages) {
            head += next == first;
            load_stage(head, next, (i + 1) % 2);
        }
        const floatX *stage = q_tiles + i % 2 * STAGE;
        const float *rows_lse = row_tiles + 2 * (i % 2) * QUERIES;
        for (int j = 0; j < QUERIES; j += STEP) {
            if (query + j + STEP - 1 < row) {
                continue; // these queries see none of this warp's keys
            }
            float s[M][STEP / 8][4], dp[M][STEP / 8][4];
            product_nt<M, STEP, HD>(s, keys, stage + j * LD);
            if (query + j < row + 16 * M - 1) {
                mask_future<M, STEP, true>(s, row, query + j);
            }
            const float *column = rows_lse + j + 2 * t; // a lane's columns, that is queries
            for (int m = 0; m < M; m++) {
                for (int k = 0; k < STEP / 2; k++) {
                    s[m][k / 4][k % 4] = power_of_2(s[m][k / 4][k % 4] * c - column[k / 4 * 8 + k % 2]);
                }
            }
            product_nt<M, STEP, HD>(dp, values, stage + (QUERIES + j) * LD);
            for (int m = 0; m < M; m++) {
                for (int k = 0; k < STEP / 2; k++) {
                    float *ds = &dp[m][k / 4][k % 4];
                    *ds = s[m][k / 4][k % 4] * (*ds - column[QUERIES + k / 4 * 8 + k % 2]);
                }
            }
            if (query + j + row + lane_id() == 0) { // position 0 and itself
                s[0][0][0] = 1.0f;
            }
            product_nn<M, STEP, HD>(dv, s, stage + (QUERIES + j) * LD);
            product_nn<M, STEP, HD>(dk, dp, stage + j * LD);
        }
        query = next;
    }
    if (hd == HD) {
        turn_rows<M, HD>(dk, rope_table, row, T);
    }
    floatX *to = dqkv + k_at + (int64_t)warp_row * width;
    store_rows<M, HD>(to, width, T - row, hd, own_k, dk, scale);
    store_rows<M, HD>(to + KV * hd, width, T - row, hd, own_v, dv, 1.0f);
}

// ----------------------------------------------------------------------------
// launches

static inline size_t attention_scratch_floats(int B, int T, int H) {
    return (size_t)B * H * 2 * (ceil_div(T, (int)ATTENTION_PAD) * ATTENTION_PAD);
}

template <int HD>
static void attention_forward_padded(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, cudaStream_t stream) {
    typedef AttentionTile<HD> Tile;
    float c = 1.44269504f / sqrtf((float)hd);
    size_t bytes = (size_t)(Tile::ROWS + 4 * Tile::KEYS) * Tile::LD * sizeof(floatX);
    launch(attention_forward_kernel<HD>, dim3(H, B, ceil_div(T - start, (int)Tile::ROWS)), ATTENTION_THREADS,
           bytes, stream, out, lse, qkv, T, start, H, KV, hd, c);
}

template <int HD>
static void attention_backward_padded(floatX *dqkv, const floatX *dout, const floatX *out, const floatX *qkv,
                                      const float *lse, float *scratch, const float *rope_table, int B, int T,
                                      int H, int KV, int hd, cudaStream_t stream) {
    typedef AttentionTile<HD> Tile;
    float scale = 1.0f / sqrtf((float)hd);
    size_t dq_bytes = (size_t)(2 * Tile::DQ_ROWS + 4 * Tile::DQ_KEYS) * Tile::LD * sizeof(floatX);
    launch(attention_dq_kernel<HD>, dim3(H, B, ceil_div(T, (int)Tile::DQ_ROWS)), ATTENTION_THREADS, dq_bytes,
           stream, dqkv, scratch, dout, out, qkv, lse, rope_table, T, H, KV, hd, scale);
    size_t dkv_bytes = (size_t)(2 * Tile::DKV_ROWS + 4 * Tile::DKV_QUERIES) * Tile::LD * sizeof(floatX) +
                       4 * Tile::DKV_QUERIES * sizeof(float);
    launch(attention_dkv_kernel<HD>, dim3(KV, B, ceil_div(T, (int)Tile::DKV_ROWS)), ATTENTION_THREADS,
           dkv_bytes, stream, dqkv, scratch, dout, qkv, rope_table, T, H, KV, hd, scale);
    if (hd != HD) { // else the kernels have done it
        rope_backward(dqkv, rope_table, B, T, 0, H + KV, hd, (H + 2 * KV) * hd, stream);
    }
}

static inline void attention_check_head(int hd) {
    if (hd % 8 != 0 || hd < 8 || hd > 128) {
        die("attention: a head of %d: the CUDA kernels take multiples of 8 from 8 to 128", hd);
    }
}

static inline void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, cudaStream_t stream) {
    attention_check_head(hd);
    auto forward = hd <= 32   ? attention_forward_padded<32>
                   : hd <= 64 ? attention_forward_padded<64>
                   : hd <= 96 ? attention_forward_padded<96>
                              : attention_forward_padded<128>;
    forward(out, lse, qkv, B, T, start, H, KV, hd, stream);
}

static inline void attention_rope_backward(floatX *dqkv, const floatX *dout, const floatX *out,
                                           const floatX *qkv, const float *lse, float *scratch,
                                           const float *rope_table, int B, int T, int H, int KV, int hd,
                                           cudaStream_t stream) {
    attention_check_head(hd);
    auto backward = hd <= 32   ? attention_backward_padded<32>
                    : hd <= 64 ? attention_backward_padded<64>
                    : hd <= 96 ? attention_backward_padded<96>
                               : attention_backward_padded<128>;
    backward(dqkv, dout, out, qkv, lse, scratch, rope_table, B, T, H, KV, hd, stream);
}

} // namespace portable

#endif
