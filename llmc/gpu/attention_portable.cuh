/*
Attention on any GPU from sm_80 on, and in fp32: the functions of attention.cuh in namespace portable (the
backward: attention_backward_portable.cuh). Scores and probabilities exist only as accumulators of one tile of
queries x keys (attention.h has the formulas; Dao et al., 2022, 2023 the method).

A block owns 128 queries of a head, a warp 32 of them, and walks over the tiles of keys up to the diagonal.
For each:

    load         the next tile of keys and values is on its way (cp.async, two stages)
    scores       S = Q K^T, masked on the diagonal
    softmax      P = exp(S - m) as it goes ("online"): per row the maximum m and the sum l so far. Where a
                 tile raises the maximum from m to m', l and the output so far are multiplied by exp(m - m')
    accumulate   O += P V. A lane's scores are already placed as the left operand of a product wants them
                 (a_from_c), so that P goes from one product to the other in registers

exp(x) is computed as 2^(x log2 e): scores stay unscaled, and scale log2 e is folded into the exponent.

qkv [B, T, (H + 2 KV) hd], out [B, T - start, H hd], lse [B, H, T - start] (natural logarithm, fp32). Buffers
begin at multiples of 16 bytes, hd is a multiple of 8.
*/
#ifndef ATTENTION_PORTABLE_CUH
#define ATTENTION_PORTABLE_CUH

#include "llmc/gpu/attention_tiles_portable.cuh"
// defines: AttentionTile, KeyStages, WarpRows, make_scores, product_nn, store_rows

namespace portable {

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

// lse of the warp's rows, and their output divided by the sum; lse: of the head's position `start`, in row 0
template <int M, int HD>
__device__ __forceinline__ void finish_softmax(float *lse, float o[M][HD / 8][4], const float max[M][2],
                                               const float sum[M][2], int row, int start, int T) {
    for (int i = 0; i < 2 * M; i++) {
        float total = quad_sum(sum[i / 2][i % 2]);
        int at = row + 8 * i + lane_id() / 4;
        if (at < T && lane_id() % 4 == 0) {
            float base2 = max[i / 2][i % 2] + log2f(total);
            lse[at - start] = base2 * LN_2;
        }
        float inverse = 1.0f / total;
        for (int n = 0; n < HD / 8; n++) {
            o[i / 2][n][i % 2 * 2] *= inverse;
            o[i / 2][n][i % 2 * 2 + 1] *= inverse;
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
    floatX *q_tile = (floatX *)shared_memory(); // [ROWS, LD]; then the stages of keys and values
    int h = (int)blockIdx.x, b = (int)blockIdx.y;
    int first = start + (int)(gridDim.z - 1 - blockIdx.z) * ROWS;
    int last = min(first + ROWS, T) - 1;
    int width = (H + 2 * KV) * hd;
    const floatX *q = qkv + ((int64_t)b * T + first) * width + h * hd;
    const floatX *k = qkv + (int64_t)b * T * width + (H + h / (H / KV)) * hd;
    KeyStages<KEYS, HD> stages = {q_tile + ROWS * LD, k, width, KV * hd, T, hd};
    copy_tile<ROWS, HD>(q_tile, q, width, T - first, hd);
    cp_async_commit();
    stages.load(0);
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
        wait_stage();
        if (key + KEYS <= last) {
            stages.load(key + KEYS);
        }
        if (key < row + 16 * M) { // else all of it is in this warp's future
            float s[M][KEYS / 8][4];
            make_scores<M, KEYS, false>(s, queries, stages.keys(key), row, key);
            online_softmax<M, KEYS, HD>(s, o, max, sum, c);
            product_nn<M, KEYS, HD>(o, s, stages.values(key));
        }
    }

    int rows_out = T - start;
    finish_softmax<M, HD>(lse + ((int64_t)b * H + h) * rows_out, o, max, sum, row, start, T);
    store_rows<M, HD>(out + ((int64_t)b * rows_out + row - start) * H * hd + h * hd, H * hd, T - row, hd, own,
                      o, 1.0f);
}

// ----------------------------------------------------------------------------
// launches

template <int HD>
static void attention_forward_padded(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, cudaStream_t stream) {
    typedef AttentionTile<HD> Tile;
    float c = LOG2_E / sqrtf((float)hd);
    launch(attention_forward_kernel<HD>, dim3(H, B, ceil_div(T - start, (int)Tile::ROWS)), ATTENTION_THREADS,
           Tile::FORWARD_BYTES, stream, out, lse, qkv, T, start, H, KV, hd, c);
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

} // namespace portable

#endif
