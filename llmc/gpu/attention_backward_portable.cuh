/*
Attention's backward on any GPU from sm_80 on, and in fp32, with RoPE's behind it: attention_rope_backward of
attention.cuh in namespace portable. Probabilities are computed again from lse, tile by tile:

    P = exp(scale S - lse),   dS = P (dP - D),   D_t = dout_t . out_t

Two kernels, each with its sums in registers: no atomics, no order that depends on scheduling.

    attention_dq_kernel    a block owns queries:  S = Q K^T, dP = dO V^T;  dQ += dS K
    attention_dkv_kernel   a block owns keys and walks over the queries of all heads of the group, with tiles
                           transposed:            S^T = K Q^T, dP^T = V dO^T;  dV += P^T dO, dK += dS^T Q

Seven products instead of the five of a kernel that adds dQ across blocks: the price of registers. Each kernel
is one loop: load a stage, scores, probabilities, dP and dS, accumulate.

D is made from the stored, rounded out: the first kernel does it on its way, and leaves D and lse in base 2
for the second in scratch [B, H, 2, T rounded up to ATTENTION_PAD]. dq and dk are turned back by RoPE's angles
before they are rounded, where a thread has columns i and i + hd/2: where hd is 32, 64, 96 or 128. For other
heads rope_backward does it afterwards (and what it reads is rounded already). A position that sees only
itself (t = 0) has p = 1 and ds = 0 exactly, as in attention.h.

qkv, dqkv [B, T, (H + 2 KV) hd], out, dout [B, T, H hd], lse [B, H, T]. Buffers begin at multiples of 16
bytes, hd is a multiple of 8.
*/
#ifndef ATTENTION_BACKWARD_PORTABLE_CUH
#define ATTENTION_BACKWARD_PORTABLE_CUH

#include "llmc/gpu/attention_portable.cuh"
// defines: AttentionTile, KeyStages, WarpRows, make_scores, product_nt, product_nn, store_rows, turn_rows

namespace portable {

// rows of scratch per head
__host__ __device__ __forceinline__ int attention_padded(int T) {
    return ceil_div(T, (int)ATTENTION_PAD) * ATTENTION_PAD;
}

// ----------------------------------------------------------------------------
// dq

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

// what the softmax needs of the lane's own queries, rows i = 0 (g) and 1 (g + 8) of each fragment
template <int M> struct QueryRows {
    float lse[M][2], D[M][2]; // lse in base 2

    template <int N> __device__ __forceinline__ void probabilities(float s[M][N / 8][4], float c) const {
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < N / 2; i++) {
                s[m][i / 4][i % 4] = power_of_2(s[m][i / 4][i % 4] * c - lse[m][i % 4 / 2]);
            }
        }
    }
    // dp becomes ds
    template <int N>
    __device__ __forceinline__ void gradients(float dp[M][N / 8][4], const float p[M][N / 8][4]) const {
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < N / 2; i++) {
                float *ds = &dp[m][i / 4][i % 4];
                *ds = p[m][i / 4][i % 4] * (*ds - D[m][i % 4 / 2]);
            }
        }
    }
};

// The lane's rows of a block whose queries begin at position `first`; also written to scratch, of this head,
// for the second kernel. dout and out are the block's first rows, lse the head's
template <int M, int HD>
__device__ __forceinline__ void find_rows(QueryRows<M> &rows, float *scratch, const floatX *dout,
                                          const floatX *out, const float *lse, int first, int T, int stride,
                                          int hd) {
    int padded = attention_padded(T);
    for (int i = 0; i < 2 * M; i++) {
        int local = (int)threadIdx.x / 32 * 16 * M + 8 * i + lane_id() / 4;
        int at = first + local;
        bool valid = at < T;
        int64_t from = (int64_t)local * stride;
        float d = row_dot<HD>(dout + from, out + from, valid, hd);
        // position 0 sees only itself: an infinite lse makes p and ds exactly 0; the second kernel sets p = 1
        float l = valid && at > 0 ? lse[at] * LOG2_E : INFINITY;
        if (at < padded && lane_id() % 4 == 0) {
            scratch[at] = l;
            scratch[padded + at] = d;
        }
        rows.lse[i / 2][i % 2] = l;
        rows.D[i / 2][i % 2] = d;
    }
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
    floatX *do_tile = q_tile + ROWS * LD;       // [ROWS, LD]; then the stages of keys and values
    int h = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int last = min(first + ROWS, T) - 1;
    int width = (H + 2 * KV) * hd;
    int64_t q_at = ((int64_t)b * T + first) * width + h * hd;
    int64_t out_at = ((int64_t)b * T + first) * H * hd + h * hd;
    const floatX *k = qkv + (int64_t)b * T * width + (H + h / (H / KV)) * hd;
    KeyStages<KEYS, HD> stages = {do_tile + ROWS * LD, k, width, KV * hd, T, hd};
    copy_tile<ROWS, HD>(q_tile, qkv + q_at, width, T - first, hd);
    copy_tile<ROWS, HD>(do_tile, dout + out_at, H * hd, T - first, hd);
    cp_async_commit();
    stages.load(0);

    int warp_row = (int)threadIdx.x / 32 * 16 * M;
    int row = first + warp_row;
    QueryRows<M> rows;
    find_rows<M, HD>(rows, scratch + ((int64_t)b * H + h) * 2 * attention_padded(T), dout + out_at,
                     out + out_at, lse + ((int64_t)b * H + h) * T, first, T, H * hd, hd);
    cp_async_wait<1>();
    __syncthreads(); // queries and dout are there

    floatX *own = q_tile + warp_row * LD;
    WarpRows<M, HD, Tile::DQ_KEEP> queries, douts;
    queries.begin(own);
    douts.begin(do_tile + warp_row * LD);
    float c = scale * LOG2_E;
    float dq[M][HD / 8][4] = {};
    for (int key = 0; key <= last; key += KEYS) {
        wait_stage();
        if (key + KEYS <= last) {
            stages.load(key + KEYS);
        }
        for (int j = 0; j < KEYS && key + j < row + 16 * M; j += STEP) { // beyond: this warp's future
            const floatX *keys = stages.keys(key) + j * LD, *values = stages.values(key) + j * LD;
            float s[M][STEP / 8][4], dp[M][STEP / 8][4];
            make_scores<M, STEP, false>(s, queries, keys, row, key + j);
            rows.template probabilities<STEP>(s, c);
            product_nt<M, STEP, HD>(dp, douts, values);
            rows.template gradients<STEP>(dp, s);
            product_nn<M, STEP, HD>(dq, dp, keys);
        }
    }
    if (hd == HD) {
        turn_rows<M, HD>(dq, rope_table, row, T);
    }
    store_rows<M, HD>(dqkv + q_at + (int64_t)warp_row * width, width, T - row, hd, own, dq, scale);
}

// ----------------------------------------------------------------------------
// dk, dv

// Queries of one head, dout, lse (in base 2) and D, tile by tile, in two stages of shared memory
template <int QUERIES, int HD> struct QueryStages {
    enum { LD = AttentionTile<HD>::LD, STAGE = 2 * QUERIES * LD };
    floatX *tiles; // [2][queries, dout][QUERIES, LD]
    float *rows;   // [2][lse, D][QUERIES]
    const floatX *qkv, *dout;
    const float *scratch;
    int b, T, H, width, hd;

    __device__ __forceinline__ floatX *tile(int parity) const {
        return tiles + parity * STAGE;
    }
    // the tile of the head's `query` is on its way
    __device__ __forceinline__ void load(int head, int query, int parity) const {
        floatX *stage = tile(parity);
        int64_t position = (int64_t)b * T + query;
        copy_tile<QUERIES, HD>(stage, qkv + position * width + head * hd, width, T - query, hd);
        copy_tile<QUERIES, HD>(stage + QUERIES * LD, dout + position * H * hd + head * hd, H * hd, T - query,
                               hd);
        if (threadIdx.x < QUERIES / 2) { // four floats per thread
            int i = (int)threadIdx.x % (QUERIES / 4), which = (int)threadIdx.x / (QUERIES / 4);
            cp_async16(rows + (2 * parity + which) * QUERIES + 4 * i,
                       scratch + (((int64_t)b * H + head) * 2 + which) * attention_padded(T) + query + 4 * i,
                       true);
        }
        cp_async_commit();
    }
};

// the same as QueryRows where queries are columns
template <int M, int QUERIES> struct QueryColumns {
    const float *lse; // of this lane's first column, in shared memory; D is QUERIES floats further

    template <int N> __device__ __forceinline__ void probabilities(float s[M][N / 8][4], float c) const {
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < N / 2; i++) {
                s[m][i / 4][i % 4] = power_of_2(s[m][i / 4][i % 4] * c - lse[i / 4 * 8 + i % 2]);
            }
        }
    }
    // dp becomes ds
    template <int N>
    __device__ __forceinline__ void gradients(float dp[M][N / 8][4], const float p[M][N / 8][4]) const {
        for (int m = 0; m < M; m++) {
            for (int i = 0; i < N / 2; i++) {
                float *ds = &dp[m][i / 4][i % 4];
                *ds = p[m][i / 4][i % 4] * (*ds - lse[QUERIES + i / 4 * 8 + i % 2]);
            }
        }
    }
};

// block: a tile of keys of one key/value head, and all queries that see it, head by head. Scores are
// transposed: their rows are keys
template <int HD>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_dkv_kernel(floatX *dqkv, const float *scratch, const floatX *dout, const floatX *qkv,
                         const float *rope_table, int T, int H, int KV, int hd, float scale) {
    typedef AttentionTile<HD> Tile;
    enum { M = Tile::DKV_M, ROWS = Tile::DKV_ROWS, QUERIES = Tile::DKV_QUERIES, STEP = Tile::DKV_STEP };
    enum { LD = Tile::LD };
    typedef QueryStages<QUERIES, HD> Queries;
    floatX *k_tile = (floatX *)shared_memory(); // [ROWS, LD]
    floatX *v_tile = k_tile + ROWS * LD;        // [ROWS, LD]; then the stages
    floatX *q_tiles = v_tile + ROWS * LD;
    float *row_tiles = (float *)(q_tiles + 2 * Queries::STAGE);
    int kv = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = (int)blockIdx.z * ROWS; // the first keys are seen by most queries
    int width = (H + 2 * KV) * hd;
    int64_t k_at = ((int64_t)b * T + first) * width + (H + kv) * hd;
    Queries queries = {q_tiles, row_tiles, qkv, dout, scratch, b, T, H, width, hd};
    int head = kv * (H / KV), query = first;
    int stages = H / KV * ceil_div(T - first, (int)QUERIES);
    copy_tile<ROWS, HD>(k_tile, qkv + k_at, width, T - first, hd);
    copy_tile<ROWS, HD>(v_tile, qkv + k_at + KV * hd, width, T - first, hd);
    cp_async_commit();
    queries.load(head, query, 0);
    cp_async_wait<1>();
    __syncthreads(); // keys and values are there

    int warp_row = (int)threadIdx.x / 32 * 16 * M;
    int row = first + warp_row; // this warp's keys: row .. row + 16 M - 1
    floatX *own_k = k_tile + warp_row * LD, *own_v = v_tile + warp_row * LD;
    WarpRows<M, HD, Tile::DKV_KEEP> keys, values;
    keys.begin(own_k);
    values.begin(own_v);
    float c = scale * LOG2_E;
    int t = lane_id() % 4;
    float dk[M][HD / 8][4] = {}, dv[M][HD / 8][4] = {};
    for (int i = 0; i < stages; i++) {
        int next = query + QUERIES < T ? query + QUERIES : first; // then the next head's first
        wait_stage();
        if (i + 1 < stages) {
            head += next == first;
            queries.load(head, next, (i + 1) % 2);
        }
        const floatX *stage = queries.tile(i % 2);
        const float *stage_rows = row_tiles + 2 * (i % 2) * QUERIES;
        for (int j = 0; j < QUERIES; j += STEP) {
            if (query + j + STEP - 1 < row) {
                continue; // these queries see none of this warp's keys
            }
            const floatX *q = stage + j * LD, *d_out = stage + (QUERIES + j) * LD;
            float s[M][STEP / 8][4], dp[M][STEP / 8][4];
            make_scores<M, STEP, true>(s, keys, q, row, query + j);
            QueryColumns<M, QUERIES> columns = {stage_rows + j + 2 * t};
            columns.template probabilities<STEP>(s, c);
            product_nt<M, STEP, HD>(dp, values, d_out);
            columns.template gradients<STEP>(dp, s);
            if (query + j + row + lane_id() == 0) { // position 0 and itself
                s[0][0][0] = 1.0f;
            }
            product_nn<M, STEP, HD>(dv, s, d_out);
            product_nn<M, STEP, HD>(dk, dp, q);
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
    return (size_t)B * H * 2 * attention_padded(T);
}

template <int HD>
static void attention_backward_padded(floatX *dqkv, const floatX *dout, const floatX *out, const floatX *qkv,
                                      const float *lse, float *scratch, const float *rope_table, int B, int T,
                                      int H, int KV, int hd, cudaStream_t stream) {
    typedef AttentionTile<HD> Tile;
    float scale = 1.0f / sqrtf((float)hd);
    launch(attention_dq_kernel<HD>, dim3(H, B, ceil_div(T, (int)Tile::DQ_ROWS)), ATTENTION_THREADS,
           Tile::DQ_BYTES, stream, dqkv, scratch, dout, out, qkv, lse, rope_table, T, H, KV, hd, scale);
    launch(attention_dkv_kernel<HD>, dim3(KV, B, ceil_div(T, (int)Tile::DKV_ROWS)), ATTENTION_THREADS,
           Tile::DKV_BYTES, stream, dqkv, scratch, dout, qkv, rope_table, T, H, KV, hd, scale);
    if (hd != HD) { // else the kernels have done it
        rope_backward(dqkv, rope_table, B, T, 0, H + KV, hd, (H + 2 * KV) * hd, stream);
    }
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
