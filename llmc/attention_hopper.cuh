/*
Attention's backward on Hopper (sm_90a), bf16, heads of 64 or 96: the function of attention.cuh in namespace
hopper. The same two kernels as in attention_portable.cuh, the same sums in registers, on wgmma and TMA:

    attention_queries_kernel  64 queries a consumer:  S = Q K^T, dP = dO V^T;     dS = P (dP - D);  dQ += dS K
    attention_keys_kernel     64 keys a consumer, all queries of the group's heads that see them, transposed:
                              S^T = K Q^T, dP^T = V dO^T;   dV += P^T dO, dK += dS^T Q

A block is three warpgroups. One is the producer: a thread of it has TMA bring what the consumers own, then
the other side, 64 rows a stage, into a ring. The other two are consumers, 64 rows each: what they own is the
left operand and stays in registers as fragments, which halves what wgmma reads from shared memory; P and dS
go from accumulators to left operand in registers. Left operands' rows are along k, the ring's tiles are read
both along and across k (hopper.cuh).

    own_full    TMA's bytes: the rows that the consumers own have come
    own_empty   8 consumer warps: they are in registers, the next may come
    full[stage], empty[stage]   the same of the ring

A consumer keeps products in flight while it computes: exp of one tile runs beside the last products of the
tile before and beside dP, and the other consumer's products fill what is left. For tile i, in this order:

    keys:     .. | S_i, dK_{i-1}, dP_i | exp | dV_i | dS | S_{i+1}, dK_i, dP_{i+1} | ..
    queries:  .. | S_i, dQ_{i-1}, dP_i | exp |        dS | S_{i+1}, dQ_i, dP_{i+1} | ..

Blocks are as many as multiprocessors and take the tiles of 128 rows in pairs, a long one (at the end of the
sequence for queries) and the short one that complements it: all pairs are equal work. The producer is at the
next tile while the consumers finish one. Tiles wholly in the future are not loaded, or where only one of the
consumers needs them, skipped by the other; the mask is applied on the diagonal alone.

hd = 96 is a block of 64 columns and half a block: boxes are 64 columns wide, the other half holds columns of
the next head that nobody reads. Rows beyond T are zeros (the maps know sequences), and are not stored.
dq and dk are turned back by RoPE's angles before they are rounded: columns i and i + hd/2 are in one thread.

Deterministic; nothing is allocated; tensor maps are kernel arguments. Scratch as in attention_portable.cuh.
*/
#ifndef ATTENTION_HOPPER_CUH
#define ATTENTION_HOPPER_CUH

#include "attention_portable.cuh"
// defines: portable::attention_exp2, quad_sum, rope_turn

#if !defined(PRECISION_FP32) && !defined(EMULATED)
#include "hopper.cuh"

namespace hopper {

enum {
    ATTENTION_ROWS = 64, // of a consumer, and of a tile of the ring
    ATTENTION_BLOCK_ROWS = 2 * ATTENTION_ROWS,
    ATTENTION_BLOCK_THREADS = 3 * GROUP_THREADS,
    ATTENTION_BLOCK_WARPS = 8,         // of consumers
    ATTENTION_PRODUCER_REGISTERS = 24, // of 3 x 168 that a thread of each warpgroup has at the start
    ATTENTION_CONSUMER_REGISTERS = 240
};

struct AttentionArguments {
    CUtensorMap qkv, dout, out; // [B][T][columns], boxes of 64 rows x 64 columns
    floatX *dqkv;
    float *scratch;
    const float *lse, *rope_table;
    int B, T, H, KV;
    float scale;
};

// shared memory: OWN tiles of 64 rows that each consumer owns, the ring, lse and D of the ring's queries
template <int HD, int OWN> struct AttentionMemory {
    enum {
        TILE = (HD + 63) / 64 * BLOCK_BYTES,
        STAGES = HD <= 64 ? 4 : 3,
        OWN_BYTES = 2 * OWN * TILE,
        STAGE_BYTES = 2 * TILE,
        ROW_BYTES = 2 * ATTENTION_ROWS * 4,
        ROWS = OWN_BYTES + STAGES * STAGE_BYTES, // offsets
        BARRIERS = ROWS + STAGES * ROW_BYTES,
        BYTES = 1024 + BARRIERS + (2 + 2 * STAGES) * 8 // shared memory may begin anywhere
    };

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    unsigned char *memory;
    uint32_t base;
    int stage;
    uint32_t parity, own_parity; // of the phases that are to come

    __device__ __forceinline__ AttentionMemory() {
        uint32_t address = shared_address(shared_memory());
        base = (address + 1023) & ~1023u;
        memory = shared_memory() + (base - address);
        stage = 0;
        parity = own_parity = 0;
    }
    __device__ __forceinline__ uint32_t own(int which, int consumer) const {
        return base + (2 * which + consumer) * TILE;
    }
    __device__ __forceinline__ uint32_t tile(int which) const {
        return base + OWN_BYTES + stage * STAGE_BYTES + which * TILE;
    }
    __device__ __forceinline__ int rows() const { // offset
        return ROWS + stage * ROW_BYTES;
    }
    __device__ __forceinline__ uint32_t own_full() const {
        return base + BARRIERS;
    }
    __device__ __forceinline__ uint32_t own_empty() const {
        return own_full() + 8;
    }
    __device__ __forceinline__ uint32_t full() const {
        return base + BARRIERS + 16 + stage * 16;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + 8;
    }
    __device__ __forceinline__ void advance() {
        stage++;
        if (stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void init_barriers() {
        barrier_init(own_full(), 1);
        barrier_init(own_empty(), ATTENTION_BLOCK_WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full(), 1);
            barrier_init(empty(), ATTENTION_BLOCK_WARPS);
            advance();
        }
        parity = 0;
        barrier_init_done();
    }
#endif
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// whose turn it is

struct AttentionTile128 {
    int b, head, first; // its first row
};

// A block's tiles, in pairs of equal work: tile z from the end, then tile z from the beginning
struct AttentionWalk {
    int heads, tiles, items, turn; // turns 2 i and 2 i + 1: the block's item i

    __device__ __forceinline__ AttentionWalk(int B, int T, int n_heads) {
        heads = n_heads;
        tiles = ceil_div<int>(T, ATTENTION_BLOCK_ROWS);
        items = B * heads * ((tiles + 1) / 2);
        turn = 0;
    }
    // false when there are no more
    __device__ __forceinline__ bool next(AttentionTile128 &at) {
        int item, z, pairs = (tiles + 1) / 2;
        bool second;
        do {
            item = turn / 2 * (int)gridDim.x + (int)blockIdx.x;
            z = item / heads % pairs;
            second = turn % 2 == 1;
            turn++;
        } while (second && 2 * z == tiles - 1); // the middle is alone
        at.head = item % heads;
        at.b = item / heads / pairs;
        at.first = (second ? z : tiles - 1 - z) * ATTENTION_BLOCK_ROWS;
        return item < items;
    }
};

// ----------------------------------------------------------------------------
// producer (one thread)

// 64 rows, HD columns
template <int HD>
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                          int row, int b) {
    for (int block = 0; block * 64 < HD; block++) {
        tma_load(to + block * BLOCK_BYTES, map, barrier, column + 64 * block, row, b);
    }
}

template <int HD>
__device__ __forceinline__ void produce_for_queries(const AttentionArguments &args,
                                                    AttentionMemory<HD, 3> memory) {
    typedef AttentionMemory<HD, 3> Memory;
    AttentionWalk walk(args.B, args.T, args.H);
    AttentionTile128 at;
    while (walk.next(at)) {
        barrier_wait(memory.own_empty(), memory.own_parity ^ 1);
        barrier_expect(memory.own_full(), Memory::OWN_BYTES);
        memory.own_parity ^= 1;
        for (int consumer = 0; consumer < 2; consumer++) {
            int row = at.first + consumer * ATTENTION_ROWS, column = at.head * HD;
            load_tile<HD>(memory.own(0, consumer), &args.qkv, memory.own_full(), column, row, at.b);
            load_tile<HD>(memory.own(1, consumer), &args.dout, memory.own_full(), column, row, at.b);
            load_tile<HD>(memory.own(2, consumer), &args.out, memory.own_full(), column, row, at.b);
        }
        int column = (args.H + at.head / (args.H / args.KV)) * HD;
        for (int key = 0; key < min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T); key += ATTENTION_ROWS) {
            barrier_wait(memory.empty(), memory.parity ^ 1);
            barrier_expect(memory.full(), Memory::STAGE_BYTES);
            load_tile<HD>(memory.tile(0), &args.qkv, memory.full(), column, key, at.b);
            load_tile<HD>(memory.tile(1), &args.qkv, memory.full(), column + args.KV * HD, key, at.b);
            memory.advance();
        }
    }
}

// lse in base 2 of a head's first row; D follows after so many floats
__device__ __forceinline__ int64_t padded_rows(const AttentionArguments &args) {
    return ceil_div<int>(args.T, portable::ATTENTION_PAD) * portable::ATTENTION_PAD;
}

__device__ __forceinline__ float *scratch_rows(const AttentionArguments &args, int b, int head) {
    return args.scratch + ((int64_t)b * args.H + head) * 2 * padded_rows(args);
}

template <int HD>
__device__ __forceinline__ void produce_for_keys(const AttentionArguments &args,
                                                 AttentionMemory<HD, 2> memory) {
    typedef AttentionMemory<HD, 2> Memory;
    AttentionWalk walk(args.B, args.T, args.KV);
    AttentionTile128 at;
    while (walk.next(at)) {
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
            const float *rows = scratch_rows(args, at.b, head);
            for (int query = at.first; query < args.T; query += ATTENTION_ROWS) {
                barrier_wait(memory.empty(), memory.parity ^ 1);
                barrier_expect(memory.full(), Memory::STAGE_BYTES + Memory::ROW_BYTES);
                load_tile<HD>(memory.tile(0), &args.qkv, memory.full(), head * HD, query, at.b);
                load_tile<HD>(memory.tile(1), &args.dout, memory.full(), head * HD, query, at.b);
                for (int i = 0; i < 2; i++) {
                    bulk_load(memory.base + memory.rows() + i * ATTENTION_ROWS * 4,
                              rows + i * padded_rows(args) + query, ATTENTION_ROWS * 4, memory.full());
                }
                memory.advance();
            }
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: operands and products

// lane 0 of each warp
__device__ __forceinline__ void release(uint32_t empty) {
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(empty);
    }
}

// a stage that this consumer does not need
template <class Memory> __device__ __forceinline__ void skip_stage(Memory &memory) {
    barrier_wait(memory.full(), memory.parity);
    release(memory.empty());
    memory.advance();
}

// columns 16 step .. 16 step + 15 of the warp's 16 rows of a tile, as left operand
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t tile, int step) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x % GROUP_THREADS / 32 * 16 + lane % 16;
    uint32_t piece = 2 * (step % 4) + lane / 16;
    uint32_t from = tile + step / 4 * BLOCK_BYTES + row * 128 + ((piece ^ (row % 8)) << 4);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from)
                 : "memory");
}

// a consumer's own 64 rows as left operand; not KEEP: read from shared memory each time
template <int HD, bool KEEP> struct AttentionOwn {
    uint32_t tile;
    uint32_t a[KEEP ? HD / 16 : 1][4];

    __device__ __forceinline__ void begin(uint32_t from) {
        tile = from;
#pragma unroll
        for (int step = 0; KEEP && step < HD / 16; step++) {
            load_fragment(a[KEEP ? step : 0], tile, step);
        }
    }
    // C = own B^T, B's rows are the tile's
    __device__ __forceinline__ void times(float (&c)[32], uint32_t b_tile) const {
#pragma unroll
        for (int step = 0; step < HD / 16; step++) {
            uint64_t at = (step / 4 * BLOCK_BYTES + step % 4 * 32) / 16; // descriptors count 16 bytes
            if (KEEP) {
                wgmma<0>(c, a[KEEP ? step : 0], tile_descriptor(b_tile) + at, step > 0);
            } else {
                wgmma<0, 0>(c, tile_descriptor(tile) + at, tile_descriptor(b_tile) + at, step > 0);
            }
        }
    }
};

// C += A B, B is the tile [64, HD]
template <int HD>
__device__ __forceinline__ void add_product(float (&c)[HD / 2], const uint32_t (&a)[4][4], uint32_t tile) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
        wgmma<1>(c, a[step], tile_descriptor(tile) + step * (16 * 128 / 16), 1);
    }
}

// accumulators [64, 64] become a left operand
__device__ __forceinline__ void to_operand(uint32_t (&a)[4][4], const float (&c)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        a[i / 4][i % 4] = pack2(c[2 * i], c[2 * i + 1]);
    }
}

// On the diagonal's tile [64, 64]: scores of keys in the query's future become -infinity. Rows are queries;
// TRANSPOSED: keys
template <bool TRANSPOSED> __device__ __forceinline__ void mask_diagonal(float (&s)[32]) {
    int thread = (int)threadIdx.x % GROUP_THREADS;
    int before = thread % 4 * 2 - (thread / 32 * 16 + thread % 32 / 4); // column - row of s[0]
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int ahead = before + i / 4 * 8 + i % 2 - i / 2 % 2 * 8;
        s[i] = (TRANSPOSED ? ahead < 0 : ahead > 0) ? -INFINITY : s[i];
    }
}

// Accumulators times scale become rows of `to`, which is the first of them at `position`; TURN: by way of
// RoPE's rotation back. Rows beyond T are not stored
template <int HD, bool TURN>
__device__ __forceinline__ void store_rows(floatX *to, int stride, float (&acc)[HD / 2], float scale,
                                           const float *table, int position, int T) {
    int thread = (int)threadIdx.x % GROUP_THREADS, t = thread % 4;
    int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        bool valid = position + row < T;
        const float *angles = table + (int64_t)(valid ? position + row : 0) * HD + 2 * t;
#pragma unroll
        for (int n = 0; n < HD / 16; n++) { // columns 8 n .. and HD / 2 + 8 n ..
            float *low = &acc[4 * n + 2 * half], *high = &acc[4 * (n + HD / 16) + 2 * half];
            float2 cosine = make_float2(1.0f, 1.0f), sine = make_float2(0.0f, 0.0f);
            if (TURN) {
                cosine = *reinterpret_cast<const float2 *>(angles + 8 * n);
                sine = *reinterpret_cast<const float2 *>(angles + HD / 2 + 8 * n);
            }
            for (int j = 0; j < 2; j++) {
                low[j] *= scale;
                high[j] *= scale;
            }
            rope_turn(low[0], high[0], cosine.x, sine.x, -1.0f);
            rope_turn(low[1], high[1], cosine.y, sine.y, -1.0f);
        }
#pragma unroll
        for (int i = 0; i < HD / 32; i++) {
            uint32_t v[4];
            rounded_pairs(v, acc, i, half);
            quad_transpose(v);
            if (valid) {
                store16(to + (int64_t)row * stride + 32 * i + 8 * t, v);
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
    D[0] = portable::quad_sum(D[0]);
    D[1] = portable::quad_sum(D[1]);
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
        lse2[half] = sees ? (half ? lse.y : lse.x) * 1.44269504f : INFINITY;
        if (threadIdx.x % 4 == 0 && position < padded_rows(args)) {
            rows[position] = lse2[half];
            rows[padded_rows(args) + position] = D[half];
        }
    }
}

// s: scores become p; dp becomes dS, rounded. At most one group of products but S and dP is in flight
__device__ __forceinline__ void soften_rows(uint32_t (&ds)[4][4], float (&s)[32], float (&dp)[32],
                                            const float (&lse2)[2], const float (&D)[2], float c,
                                            bool diagonal) {
    wgmma_wait<1>();
    wgmma_results(s);
    if (diagonal) {
        mask_diagonal<false>(s);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        s[i] = portable::attention_exp2(s[i] * c - lse2[i / 2 % 2]);
    }
    wgmma_wait<0>();
    wgmma_results(dp);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        dp[i] = s[i] * (dp[i] - D[i / 2 % 2]);
    }
    to_operand(ds, dp);
}

template <int HD>
__device__ __forceinline__ void consume_queries(const AttentionArguments &args, AttentionMemory<HD, 3> memory,
                                                int consumer) {
    int width = (args.H + 2 * args.KV) * HD;
    int local = consumer * ATTENTION_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4;
    float c = args.scale * 1.44269504f;
    AttentionWalk walk(args.B, args.T, args.H);
    AttentionTile128 at, following;
    bool more = walk.next(following);
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
        more = walk.next(following);
        if (more) {
            lse = load_lse(args, following, local); // on its way during the products
        }
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            dq[i] = 0.0f;
        }
        if (mine > 0) {
            barrier_wait(memory.full(), memory.parity);
            wgmma_fence();
            queries.times(s, memory.tile(0));
            wgmma_commit();
            dout.times(dp, memory.tile(1));
            wgmma_commit();
            soften_rows(ds, s, dp, lse2, D, c, mine == 1);
#pragma unroll 1
            for (int i = 1; i < mine; i++) {
                uint32_t keys = memory.tile(0), done = memory.empty();
                memory.advance();
                barrier_wait(memory.full(), memory.parity);
                wgmma_fence();
                queries.times(s, memory.tile(0));
                wgmma_commit();
                add_product<HD>(dq, ds, keys);
                dout.times(dp, memory.tile(1));
                wgmma_commit();
                soften_rows(ds, s, dp, lse2, D, c, i == mine - 1);
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
        floatX *to = args.dqkv + ((int64_t)at.b * args.T + row) * width + at.head * HD;
        store_rows<HD, true>(to, width, dq, args.scale, args.rope_table, row, args.T);
    }
}

// ----------------------------------------------------------------------------
// consumers: dk, dv

// p and dS of a tile; columns are queries: their lse are at `lse`, their D 64 floats on, from this lane's
// first on. At most two groups of products but S and dP are in flight; dV's is the newest
struct AttentionColumns {
    const float *lse;

    __device__ __forceinline__ void probabilities(float (&s)[32], float c) const {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 l = *reinterpret_cast<const float2 *>(lse + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[4 * n + i] = portable::attention_exp2(s[4 * n + i] * c - (i % 2 ? l.y : l.x));
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
    int query, first, T; // the present tile's first; the first tile's first
    int skipped;         // tiles of each head before that

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

// Which left operands stay in registers: both with hd 64, else V
template <int HD> struct AttentionKeeps {
    enum { K = HD <= 64, V = HD <= 64 };
};

template <int HD>
__device__ __forceinline__ void consume_keys(const AttentionArguments &args, AttentionMemory<HD, 2> memory,
                                             int consumer) {
    const bool KEEP_ALL = AttentionKeeps<HD>::K && AttentionKeeps<HD>::V;
    int width = (args.H + 2 * args.KV) * HD;
    float c = args.scale * 1.44269504f;
    AttentionWalk walk(args.B, args.T, args.KV);
    AttentionTile128 at;
    while (walk.next(at)) {
        int row = at.first + consumer * ATTENTION_ROWS; // the consumer's first key
        int tiles = args.H / args.KV * max(ceil_div<int>(args.T - row, ATTENTION_ROWS), 0);
        AttentionQueries queries = {row, row, args.T, consumer};
        AttentionOwn<HD, AttentionKeeps<HD>::K> keys;
        AttentionOwn<HD, AttentionKeeps<HD>::V> values;
        float s[32], dp[32], dk[HD / 2], dv[HD / 2];
        uint32_t p[4][4], ds[4][4];
        barrier_wait(memory.own_full(), memory.own_parity);
        memory.own_parity ^= 1;
        keys.begin(memory.own(0, consumer));
        values.begin(memory.own(1, consumer));
        if (KEEP_ALL) {
            release(memory.own_empty());
        }
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            dk[i] = dv[i] = 0.0f;
        }
        auto soften = [&] {
            AttentionColumns columns = {
                reinterpret_cast<const float *>(memory.memory + memory.rows()) + threadIdx.x % 4 * 2};
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
            barrier_wait(memory.full(), memory.parity);
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
                barrier_wait(memory.full(), memory.parity);
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
        if (!KEEP_ALL) {
            release(memory.own_empty());
        }
        floatX *to = args.dqkv + ((int64_t)at.b * args.T + row) * width + (args.H + at.head) * HD;
        store_rows<HD, true>(to, width, dk, args.scale, args.rope_table, row, args.T);
        store_rows<HD, false>(to + args.KV * HD, width, dv, 1.0f, args.rope_table, row, args.T);
    }
}

#endif

// ----------------------------------------------------------------------------
// the kernels

template <int HD, int OWN>
static __global__ void __launch_bounds__(ATTENTION_BLOCK_THREADS, 1)
    attention_backward_kernel(const __grid_constant__ AttentionArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    AttentionMemory<HD, OWN> memory;
    if (threadIdx.x == 0) {
        memory.init_barriers();
    }
    __syncthreads();
    // every warp's role must look the same to all its lanes
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP_THREADS, 0);
    if (group == 0) {
        give_registers<ATTENTION_PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            if constexpr (OWN == 3) {
                produce_for_queries<HD>(args, memory);
            } else {
                produce_for_keys<HD>(args, memory);
            }
        }
    } else {
        take_registers<ATTENTION_CONSUMER_REGISTERS>();
        if constexpr (OWN == 3) {
            consume_queries<HD>(args, memory, group - 1);
        } else {
            consume_keys<HD>(args, memory, group - 1);
        }
    }
#else
    (void)args;
    __trap(); // a build without sm_90a has no such kernel
#endif
}

// ----------------------------------------------------------------------------
// launches

// the head sizes that these kernels are made for
static inline bool attention_takes(int hd) {
    return hd == 64 || hd == 96;
}

template <int HD, int OWN>
static void start_attention(AttentionArguments args, int heads, cudaStream_t stream) {
    int tiles = ceil_div<int>(args.T, ATTENTION_BLOCK_ROWS), items = args.B * heads * ((tiles + 1) / 2);
    void (*kernel)(AttentionArguments) = attention_backward_kernel<HD, OWN>;
    launch(kernel, min(num_sms(), items), ATTENTION_BLOCK_THREADS, AttentionMemory<HD, OWN>::BYTES, stream,
           args);
}

static inline void attention_rope_backward(floatX *dqkv, const floatX *dout, const floatX *out,
                                           const floatX *qkv, const float *lse, float *scratch,
                                           const float *rope_table, int B, int T, int H, int KV, int hd,
                                           cudaStream_t stream) {
    AttentionArguments args;
    memset(&args, 0, sizeof(args));
    args.qkv = tensor_map(qkv, (H + 2 * KV) * hd, T, B, ATTENTION_ROWS);
    args.dout = tensor_map(dout, H * hd, T, B, ATTENTION_ROWS);
    args.out = tensor_map(out, H * hd, T, B, ATTENTION_ROWS);
    args.dqkv = dqkv;
    args.scratch = scratch;
    args.lse = lse;
    args.rope_table = rope_table;
    args.B = B;
    args.T = T;
    args.H = H;
    args.KV = KV;
    args.scale = 1.0f / sqrtf((float)hd);
    if (hd == 64) {
        start_attention<64, 3>(args, H, stream);
        start_attention<64, 2>(args, KV, stream);
    } else {
        start_attention<96, 3>(args, H, stream);
        start_attention<96, 2>(args, KV, stream);
    }
}

} // namespace hopper

#endif
#endif
