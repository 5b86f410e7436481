/*
Attention of one position over the cache (attention.h has the formulas), and the combine of its parts.

With one query per head there is nothing to do but read the cache, and a head's is short: so it is cut into
pieces, a block each. With z_t = q k_t / sqrt(hd), piece s of the positions leaves

    m_s = max_t z_t,   l_s = sum_t exp(z_t - m_s),   o_s = sum_t exp(z_t - m_s) v_t

and the block that is done last puts the pieces together, in their order, whichever block it is:

    out = sum_s exp(m_s - m) o_s / sum_s exp(m_s - m) l_s,   m = max_s m_s

A piece is at least DECODE_TILE positions, so a short cache is one piece; it grows where more than
DECODE_PIECES of that size would be needed. Within a piece a thread takes a position for z, then a pack of
columns of every so many positions for o; tiles follow each other with a running maximum.

cache [T, (H + 2 KV) hd] floatX, queries, keys and values of the positions up to *position; out [H hd]
floatX; partial [H, DECODE_PIECES, hd + 2] fp32; tickets [H], 0 before and after. hd <= 128. Errors: none.
*/
#ifndef DECODE_ATTENTION_CUH
#define DECODE_ATTENTION_CUH

#include "llmc/gpu/decode.cuh"
// defines: is_last_block, load_written, launch_chained

enum { DECODE_TILE = 128, DECODE_PIECES = 16, DECODE_MOST_HEAD = 128 };
static_assert((int)DECODE_MOST_HEAD <= (int)DECODE_TILE, "a thread per column of the output");

static inline int64_t decode_attention_floats(int H, int hd) {
    return (int64_t)H * DECODE_PIECES * (hd + 2);
}

// positions of a piece, of n
__device__ __forceinline__ int decode_piece(int n) {
    return max((int)DECODE_TILE, (n + DECODE_PIECES - 1) / DECODE_PIECES);
}

// by a thread: q k of one position; q [hd] in shared memory
__device__ __forceinline__ float decode_score(const float *q, const floatX *key, int hd) {
    float sum = 0.0f;
#pragma unroll 8
    for (int c = 0; c < hd; c += PACK_X) {
        sum += sum_of_products(widen(load_bits(key + c)), load_floats(q + c));
    }
    return sum;
}

// by a block, of a head: positions first .. end - 1 -> m (in base 2), l, and each thread's part of o: its
// pack of columns of every `apart`-th position
__device__ __forceinline__ void decode_positions(float &m, float &l, Floats &o, const float *q,
                                                 const floatX *keys, const floatX *values, int64_t stride,
                                                 int first, int end, int hd) {
    __shared__ float power[DECODE_TILE];
    int thread = (int)threadIdx.x, packs = hd / PACK_X, apart = DECODE_TILE / packs;
    const floatX *column = values + thread % packs * PACK_X;
    m = -INFINITY;
    l = 0.0f;
    o = Floats{};
    for (int tile = first; tile < end; tile += DECODE_TILE) {
        int count = min((int)DECODE_TILE, end - tile);
        float z = thread < count ? decode_score(q, keys + (tile + thread) * stride, hd) : -INFINITY;
        float max = fmaxf(m, block_max(z)); // its barrier: the tile before has been read
        power[thread] = power_of_2(z - max);
        float shrink = power_of_2(m - max);
        l = l * shrink + block_sum(power[thread]); // its barrier: all powers are there
        m = max;
        for (int i = 0; i < PACK_X; i++) {
            o.x[i] *= shrink;
        }
#pragma unroll 8
        for (int t = thread / packs; t < count; t += apart) {
            if (thread < packs * apart) {
                add_scaled(o, power[t], widen(load_bits(column + (tile + t) * stride)));
            }
        }
    }
}

// by a block: the pieces of a head -> out [hd]
__device__ __forceinline__ void decode_combine(floatX *out, const float *partial, int pieces, int hd) {
    int c = (int)threadIdx.x;
    float m = -INFINITY, l = 0.0f, sum = 0.0f;
    for (int s = 0; s < pieces; s++) {
        m = fmaxf(m, load_written(partial + s * (hd + 2) + hd));
    }
#pragma unroll 8
    for (int s = 0; s < pieces && c < hd; s++) {
        const float *piece = partial + s * (hd + 2);
        float scale = power_of_2(load_written(piece + hd) - m);
        l += scale * load_written(piece + hd + 1);
        sum += scale * load_written(piece + c);
    }
    if (c < hd) {
        out[c] = to_x(sum / l);
    }
}

// block (head, piece)
static __global__ void __launch_bounds__(DECODE_TILE)
    decode_attention_kernel(floatX *out, float *partial, int *tickets, const floatX *cache,
                            const int *position, int H, int KV, int hd, float scale) {
    __shared__ Floats q[DECODE_MOST_HEAD / PACK_X], parts[DECODE_TILE]; // parts: [apart][hd]
    float *query = &q[0].x[0], *part = &parts[0].x[0];
    next_may_begin();
    previous_done();
    int n = *position + 1, length = decode_piece(n), pieces = ceil_div(n, length), thread = (int)threadIdx.x;
    int h = (int)blockIdx.x, s = (int)blockIdx.y, packs = hd / PACK_X, apart = DECODE_TILE / packs;
    int64_t stride = (int64_t)(H + 2 * KV) * hd;
    const floatX *keys = cache + (H + h / (H / KV)) * hd;
    if (s >= pieces) {
        return;
    }
    if (thread < hd) {
        query[thread] = scale * to_float(cache[(n - 1) * stride + h * hd + thread]);
    }
    __syncthreads();
    float m, l;
    Floats o;
    decode_positions(m, l, o, query, keys, keys + (int64_t)KV * hd, stride, s * length,
                     min(n, (s + 1) * length), hd);
    parts[thread] = o;
    __syncthreads();
    float *piece = partial + ((int64_t)h * DECODE_PIECES + s) * (hd + 2);
    float sum = 0.0f;
    for (int i = 0; i < apart && thread < hd; i++) {
        sum += part[i * hd + thread];
    }
    if (thread < hd) {
        piece[thread] = sum;
    }
    if (thread == 0) {
        piece[hd] = m;
        piece[hd + 1] = l;
    }
    if (is_last_block(tickets + h, pieces)) {
        decode_combine(out + h * hd, partial + (int64_t)h * DECODE_PIECES * (hd + 2), pieces, hd);
    }
}

// T: the longest cache
static inline void decode_attention(floatX *out, float *partial, int *tickets, const floatX *cache,
                                    const int *position, int T, int H, int KV, int hd, cudaStream_t stream) {
    unsigned pieces = (unsigned)std::min<int>(ceil_div<int>(T, DECODE_TILE), DECODE_PIECES);
    launch_chained(decode_attention_kernel, dim3((unsigned)H, pieces), DECODE_TILE, stream, out, partial,
                   tickets, cache, position, H, KV, hd, LOG2_E / sqrtf((float)hd));
}

#endif
