/*
Attention's backward on Hopper (sm_90a), bf16, heads of 64 or 96, with RoPE's behind it:
attention_rope_backward of attention.cuh in namespace hopper. The same two kernels as in
attention_backward_portable.cuh, the same sums in registers, no atomics; producer, consumers, ring and walk
are attention_hopper.cuh's:

    dq   64 queries a consumer:  S = Q K^T, dP = dO V^T;     dS = P (dP - D);  dQ += dS K
    dkv  64 keys a consumer, and all queries of the group's heads that see them, transposed:
                                 S^T = K Q^T, dP^T = V dO^T;  dV += P^T dO, dK += dS^T Q

P and dS go from accumulators to left operand in registers. The ring's tiles are read along k in the first two
products, across it in the others. exp of one tile runs beside the last products of the tile before and beside
dP; the other consumer's products fill what is left. For tile i, in this order:

    dq    .. | S_i, dQ_{i-1}, dP_i | exp |        dS | S_{i+1}, dQ_i, dP_{i+1} | ..
    dkv   .. | S_i, dK_{i-1}, dP_i | exp | dV_i | dS | S_{i+1}, dK_i, dP_{i+1} | ..

With hd = 96 the dkv consumers' registers do not suffice for K's and V's fragments: they are read from shared
memory. dq and dk are turned back by RoPE's angles before they are rounded: columns i and i + hd/2 are in one
thread. Scratch as in attention_backward_portable.cuh: the first kernel fills it for the second.
*/
#ifndef ATTENTION_BACKWARD_HOPPER_CUH
#define ATTENTION_BACKWARD_HOPPER_CUH

#include "llmc/gpu/attention_backward_portable.cuh"
#include "llmc/gpu/attention_hopper.cuh"
// defines: attention_padded; AttentionMemory, AttentionWalk, AttentionOwn, load_tile, add_product,
// to_operand, store_rows, start_attention

#ifdef HOPPER_KERNELS
namespace hopper {

__host__ __device__ __forceinline__ int64_t padded_rows(const AttentionArguments &args) {
    return portable::attention_padded(args.T);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// dk, dv: producer

// lse in base 2 of a head's first row; D follows after padded_rows floats
__device__ __forceinline__ float *scratch_rows(const AttentionArguments &args, int b, int head) {
    return args.scratch + ((int64_t)b * args.H + head) * 2 * padded_rows(args);
}

template <int HD>
__device__ __forceinline__ void produce(const AttentionArguments &args,
                                        AttentionMemory<HD, ATTENTION_DKV> memory) {
    typedef AttentionMemory<HD, ATTENTION_DKV> Memory;
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.KV)) {
        barrier_wait(memory.own_empty(), memory.own_parity ^ 1);
        barrier_expect(memory.own_full(), Memory::OWN_BYTES);
        memory.own_parity ^= 1;
        for (int consumer = 0; consumer < 2; consumer++) {
            int row = at.first + consumer * ATTENTION_ROWS, column = (args.H + at.head) * HD;
            load_tile<HD>(memory.own(0, consumer), &args.qkv, memory.own_full(), column, row, at.b);
            load_tile<HD>(memory.own(1, consumer), &args.qkv, memory.own_full(), column + args.KV * HD, row,
                          at.b);
        }
        int group = args.H / args.KV;
        for (int head = at.head * group; head < (at.head + 1) * group; head++) {
            for (int query = at.first; query < args.T; query += ATTENTION_ROWS) {
                barrier_wait(memory.empty(), memory.ring.parity ^ 1);
                barrier_expect(memory.full(), Memory::STAGE_BYTES + Memory::ROW_BYTES);
                load_tile<HD>(memory.tile(0), &args.qkv, memory.full(), head * HD, query, at.b);
                load_tile<HD>(memory.tile(1), &args.dout, memory.full(), head * HD, query, at.b);
                tma_load(memory.base + memory.rows(), &args.rows, memory.full(), query, 0,
                         at.b * args.H + head);
                memory.advance();
            }
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: dq

// the natural logarithms of this lane's rows, row and row + 8
__device__ __forceinline__ float2 load_lse(const AttentionArguments &args, AttentionTile128 at, int row) {
    const float *lse = args.lse + ((int64_t)at.b * args.H + at.head) * args.T + at.first + row;
    int rows = args.T - at.first - row; // that exist from there on
    return make_float2(rows > 0 ? lse[0] : 0.0f, rows > 8 ? lse[8] : 0.0f);
}

// D of this lane's two rows: dO's fragments times out's
template <int HD>
__device__ __forceinline__ void dot_rows(float (&D)[2], const AttentionOwn<HD, true> &dout,
                                         uint32_t out_tile) {
    D[0] = D[1] = 0.0f;
#pragma unroll
    for (int step = 0; step < HD / 16; step++) {
        uint32_t o[4];
        load_fragment(o, out_tile, step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t a = dout.a[step][i];
            D[i % 2] += low_half(a) * low_half(o[i]) + high_half(a) * high_half(o[i]);
        }
    }
    D[0] = quad_sum(D[0]);
    D[1] = quad_sum(D[1]);
}

// Base-2 lse and D of the consumer's rows, for itself and, in scratch, for the other kernel. Position 0 sees
// only itself: an infinite lse makes p and ds exactly 0; the other kernel sets p = 1
__device__ __forceinline__ void finish_rows(float (&lse2)[2], const float (&D)[2], float2 lse,
                                            const AttentionArguments &args, AttentionTile128 at, int row) {
    float *rows = scratch_rows(args, at.b, at.head);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int position = at.first + row + 8 * half;
        bool sees = position > 0 && position < args.T;
        lse2[half] = sees ? (half ? lse.y : lse.x) * LOG2_E : INFINITY;
        if (threadIdx.x % 4 == 0 && position < padded_rows(args)) {
            rows[position] = lse2[half];
            rows[padded_rows(args) + position] = D[half];
        }
    }
}

// Of the two newest groups of products the first makes S, the second dP: s becomes p, dp dS, rounded to ds
template <class Memory>
__device__ __forceinline__ void soften_rows(uint32_t (&ds)[4][4], float (&s)[32], float (&dp)[32],
                                            const float (&lse2)[2], const float (&D)[2], float c,
                                            bool diagonal, const Memory &memory) {
    wgmma_wait<1>();
    wgmma_results(s);
    if (diagonal) {
        mask_diagonal<false>(s);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        s[i] = power_of_2(s[i] * c - lse2[i / 2 % 2]);
    }
    wgmma_results(s); // here, while dP is being made
    wait_next(memory, !diagonal);
    wgmma_wait<0>();
    wgmma_results(dp);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        dp[i] = s[i] * (dp[i] - D[i / 2 % 2]);
    }
    to_operand(ds, dp);
}

template <int HD>
__device__ __forceinline__ void consume(const AttentionArguments &args,
                                        AttentionMemory<HD, ATTENTION_DQ> memory, int consumer) {
    int width = (args.H + 2 * args.KV) * HD;
    int local = consumer * ATTENTION_ROWS + own_row();
    float c = args.c;
    AttentionWalk walk = {0};
    AttentionTile128 at, following;
    bool more = walk.next(following, args, args.H);
    float2 lse = more ? load_lse(args, following, local) : make_float2(0.0f, 0.0f);
    while (more) {
        at = following;
        int row = at.first + consumer * ATTENTION_ROWS;
        int tiles = ceil_div<int>(min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T), ATTENTION_ROWS);
        int mine = row < args.T ? row / ATTENTION_ROWS + 1 : 0;
        AttentionOwn<HD, true> queries, dout;
        float D[2], lse2[2], s[32], dp[32], dq[HD / 2];
        uint32_t ds[4][4];
        barrier_wait(memory.own_full(), memory.own_parity);
        memory.own_parity ^= 1;
        queries.begin(memory.own(0, consumer));
        dout.begin(memory.own(1, consumer));
        dot_rows<HD>(D, dout, memory.own(2, consumer));
        release(memory.own_empty());
        finish_rows(lse2, D, lse, args, at, local);
        more = walk.next(following, args, args.H);
        if (more) {
            lse = load_lse(args, following, local); // on its way during the products
        }
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            dq[i] = 0.0f;
        }
        if (mine > 0) {
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            queries.times(s, memory.tile(0));
            wgmma_commit();
            dout.times(dp, memory.tile(1));
            wgmma_commit();
            soften_rows(ds, s, dp, lse2, D, c, mine == 1, memory);
#pragma unroll 1
            for (int i = 1; i < mine; i++) {
                uint32_t keys = memory.tile(0), done = memory.empty();
                memory.advance();
                wgmma_fence();
                queries.times(s, memory.tile(0));
                wgmma_commit();
                add_product<HD>(dq, ds, keys);
                dout.times(dp, memory.tile(1));
                wgmma_commit();
                soften_rows(ds, s, dp, lse2, D, c, i == mine - 1, memory);
                release(done);
            }
            wgmma_fence();
            add_product<HD>(dq, ds, memory.tile(0));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(dq);
            release(memory.empty());
            memory.advance();
        }
        for (int i = mine; i < tiles; i++) {
            skip_stage(memory);
        }
        floatX *to = args.to + ((int64_t)at.b * args.T + row) * width + at.head * HD;
        store_rows<HD, true>(to, width, dq, args.scale, args, row);
    }
}

// ----------------------------------------------------------------------------
// consumers: dk, dv

// Scores become p, and dp becomes dS. Columns are queries: their lse are at `lse` (from this lane's first
// on), their D 64 floats further
struct AttentionColumns {
    const float *lse;

    __device__ __forceinline__ void probabilities(float (&s)[32], float c) const {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 l = *reinterpret_cast<const float2 *>(lse + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[4 * n + i] = power_of_2(s[4 * n + i] * c - (i % 2 ? l.y : l.x));
            }
        }
    }
    __device__ __forceinline__ void gradients(float (&dp)[32], const float (&s)[32]) const {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 D = *reinterpret_cast<const float2 *>(lse + ATTENTION_ROWS + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dp[4 * n + i] = s[4 * n + i] * (dp[4 * n + i] - (i % 2 ? D.y : D.x));
            }
        }
    }
};

// which queries a consumer's keys meet next
struct AttentionQueries {
    int query;    // first of the present tile
    int first, T; // of the head's first tile; all positions
    int skipped;  // tiles of each head before the first: the other consumer's

    template <class Memory> __device__ __forceinline__ void begin_head(Memory &memory) {
        query = first;
        for (int i = 0; i < skipped; i++) {
            skip_stage(memory);
        }
    }
    template <class Memory> __device__ __forceinline__ void advance(Memory &memory) {
        memory.advance();
        query += ATTENTION_ROWS;
        if (query >= T) {
            begin_head(memory);
        }
    }
};

template <int HD>
__device__ __forceinline__ void consume(const AttentionArguments &args,
                                        AttentionMemory<HD, ATTENTION_DKV> memory, int consumer) {
    const bool KEEP = HD <= 64; // K's and V's fragments in registers
    int width = (args.H + 2 * args.KV) * HD;
    float c = args.c;
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.KV)) {
        int row = at.first + consumer * ATTENTION_ROWS; // the consumer's first key
        int tiles = args.H / args.KV * max(ceil_div<int>(args.T - row, ATTENTION_ROWS), 0);
        AttentionQueries queries = {row, row, args.T, consumer};
        AttentionOwn<HD, KEEP> keys, values;
        float s[32], dp[32], dk[HD / 2], dv[HD / 2];
        uint32_t p[4][4], ds[4][4];
        barrier_wait(memory.own_full(), memory.own_parity);
        memory.own_parity ^= 1;
        keys.begin(memory.own(0, consumer));
        values.begin(memory.own(1, consumer));
        if (KEEP) {
            release(memory.own_empty());
        }
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            dk[i] = dv[i] = 0.0f;
        }
        // the newest groups of products make S, then (beside dK) dP: P, dV's product, dS
        auto soften = [&] {
            AttentionColumns columns = {reinterpret_cast<const float *>(memory.memory + memory.rows()) +
                                        threadIdx.x % 4 * 2};
            wgmma_wait<1>();
            wgmma_results(s);
            if (queries.query == row) {
                mask_diagonal<true>(s);
            }
            columns.probabilities(s, c);
            to_operand(p, s);
            if (queries.query + row + (int)threadIdx.x % GROUP_THREADS == 0) { // position 0 and itself
                p[0][0] = pack2(1.0f, s[1]);
            }
            wgmma_fence();
            add_product<HD>(dv, p, memory.tile(1));
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_results(dp);
            columns.gradients(dp, s);
            to_operand(ds, dp);
        };
        if (tiles > 0) {
            queries.begin_head(memory);
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            keys.times(s, memory.tile(0));
            wgmma_commit();
            values.times(dp, memory.tile(1));
            wgmma_commit();
            soften();
            wgmma_wait<0>(); // else the compiler would keep this P apart from the loop's
#pragma unroll 1
            for (int i = 1; i < tiles; i++) {
                uint32_t before = memory.tile(0), done = memory.empty();
                queries.advance(memory);
                barrier_wait(memory.full(), memory.ring.parity);
                wgmma_fence();
                keys.times(s, memory.tile(0));
                wgmma_commit();
                add_product<HD>(dk, ds, before);
                values.times(dp, memory.tile(1));
                wgmma_commit();
                soften();
                release(done);
            }
            wgmma_fence();
            add_product<HD>(dk, ds, memory.tile(0));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(dk);
            wgmma_results(dv);
            release(memory.empty());
            memory.advance();
        } else { // beyond T: the other consumer's tiles
            for (int i = 0; i < args.H / args.KV; i++) {
                skip_stage(memory);
            }
        }
        if (!KEEP) {
            release(memory.own_empty());
        }
        floatX *to = args.to + ((int64_t)at.b * args.T + row) * width + (args.H + at.head) * HD;
        store_rows<HD, true>(to, width, dk, args.scale, args, row);
        store_rows<HD, false>(to + args.KV * HD, width, dv, 1.0f, args, row);
    }
}

#endif

// ----------------------------------------------------------------------------
// launches

template <int HD> static void start_backward(AttentionArguments args, cudaStream_t stream) {
    start_attention<HD, ATTENTION_DQ>(args, stream);
    start_attention<HD, ATTENTION_DKV>(args, stream);
}

static inline void attention_rope_backward(floatX *dqkv, const floatX *dout, const floatX *out,
                                           const floatX *qkv, const float *lse, float *scratch,
                                           const float *rope_table, int B, int T, int H, int KV, int hd,
                                           cudaStream_t stream) {
    AttentionArguments args = attention_arguments(dqkv, qkv, B, T, 0, H, KV, hd);
    args.dout = tensor_map(dout, H * hd, T, B, ATTENTION_ROWS);
    args.out = tensor_map(out, H * hd, T, B, ATTENTION_ROWS);
    args.scratch = scratch;
    args.rows = tensor_map(scratch, true, padded_rows(args), 2, B * H, 2, 1, ATTENTION_ROWS);
    args.lse = lse;
    args.rope_table = rope_table;
    if (hd == 64) {
        start_backward<64>(args, stream);
    } else {
        start_backward<96>(args, stream);
    }
}

} // namespace hopper

#endif
#endif
