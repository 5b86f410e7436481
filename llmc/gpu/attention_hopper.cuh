/*
Attention on Hopper (sm_90a), bf16, heads of 64 or 96: what forward and backward
(attention_backward_hopper.cuh) share, and the forward; the functions of attention.cuh in namespace hopper.
The mathematics is that of attention_portable.cuh, P and dS exist only as accumulators; here the products are
wgmma's and the copies TMA's.

How the kernels work. A block is three warpgroups. One is the producer: one thread of it has TMA bring the
rows that the consumers own, then tile by tile the rows that these are multiplied with, 64 at a time, into a
ring of stages. The other two are consumers, 64 rows each (forward: queries): what they own is the left
operand and stays in registers as fragments, and P goes from accumulators to left operand in registers. The
ring's tiles are read along k (S = Q K^T) and across it (O += P V): hopper.cuh.

    own_full, own_empty         TMA's bytes: what the consumers own is there; 8 warps: it is in registers
    full[stage], empty[stage]   the same of the ring

A consumer keeps products in flight while it computes. Forward, tile i of the keys:

    start S_{i+1} = Q K_{i+1}^T | maxima of S_i | await O += P_{i-1} V_{i-1} | P_i = exp | start O += P_i V_i

Blocks are as many as multiprocessors and take tiles of 128 rows in pairs, a long one from the end of the
sequence and the short one that complements it: all pairs are equal work, and the producer is at the next tile
while the consumers finish one. Tiles wholly in the future are not loaded, or where only one of the consumers
needs them, skipped by the other; the mask is applied on the diagonal alone.

hd = 96 is a block of 64 columns and half a block: boxes are 64 columns wide, the other half holds columns of
the next head that nobody reads. Rows beyond T are zeros (the maps know sequences), and are not stored, nor
are rows before start. Deterministic; nothing is allocated; tensor maps are kernel arguments.
*/
#ifndef ATTENTION_HOPPER_CUH
#define ATTENTION_HOPPER_CUH

#include "llmc/gpu/attention_portable.cuh"
// defines: portable::quad_sum, rope_turn

#ifndef PRECISION_FP32
#include "llmc/gpu/wgmma.cuh"

namespace hopper {

enum {
    ATTENTION_ROWS = 64, // of a consumer, and of a tile of the ring
    ATTENTION_BLOCK_ROWS = 2 * ATTENTION_ROWS,
    ATTENTION_BLOCK_THREADS = 3 * GROUP_THREADS,
    ATTENTION_BLOCK_WARPS = 8,         // of consumers
    ATTENTION_PRODUCER_REGISTERS = 24, // of 3 x 168 that a thread of each warpgroup has at the start
    ATTENTION_CONSUMER_REGISTERS = 240
};

// the kernels; also how many tiles of 64 rows a consumer owns: Q; K and V; Q, dO and out
enum { ATTENTION_FORWARD = 1, ATTENTION_DKV = 2, ATTENTION_DQ = 3 };

struct AttentionArguments {
    CUtensorMap qkv, dout, out; // [B][T][columns], boxes of 64 rows x 64 columns
    CUtensorMap rows;           // scratch, [B H][2][T padded to 64]: boxes of 2 x 64
    floatX *to;                 // out or dqkv
    float *lse_to, *scratch;
    const float *lse, *rope_table;
    int B, T, start, H, KV; // start: of the backward 0
    float scale;
    float c; // scale log2 e: exponents are of 2
};

// shared memory: OWN tiles of 64 rows that each consumer owns, the ring, lse and D of the ring's queries
template <int HD, int OWN> struct AttentionMemory {
    enum {
        TILE = (HD + 63) / 64 * BLOCK_BYTES,
        STAGES = HD <= 64                   ? 6
                 : OWN == ATTENTION_FORWARD ? 5
                                            : 3,
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
    RingTurn ring;
    uint32_t own_parity; // as ring.parity, of what the consumers own

    __device__ __forceinline__ AttentionMemory() {
        uint32_t address = shared_address(shared_memory());
        base = (address + 1023) & ~1023u;
        memory = shared_memory() + (base - address);
        ring.stage = 0;
        ring.parity = own_parity = 0;
    }
    __device__ __forceinline__ uint32_t own(int which, int consumer) const {
        return base + (2 * which + consumer) * TILE;
    }
    __device__ __forceinline__ uint32_t tile(int which) const {
        return base + OWN_BYTES + ring.stage * STAGE_BYTES + which * TILE;
    }
    __device__ __forceinline__ int rows() const { // offset
        return ROWS + ring.stage * ROW_BYTES;
    }
    __device__ __forceinline__ uint32_t own_full() const {
        return base + BARRIERS;
    }
    __device__ __forceinline__ uint32_t own_empty() const {
        return own_full() + 8;
    }
    __device__ __forceinline__ uint32_t full() const {
        return base + BARRIERS + 16 + ring.stage * 16;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + 8;
    }
    __device__ __forceinline__ void advance() {
        ring.advance(STAGES);
    }
    __device__ __forceinline__ void init_barriers() {
        barrier_init(own_full(), 1);
        barrier_init(own_empty(), ATTENTION_BLOCK_WARPS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full(), 1);
            barrier_init(empty(), ATTENTION_BLOCK_WARPS);
            advance();
        }
        ring.parity = 0;
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
    int turn; // turns 2 i and 2 i + 1: the block's item i

    // false when there are no more
    __device__ __forceinline__ bool next(AttentionTile128 &at, const AttentionArguments &args, int heads) {
        int before = args.start / ATTENTION_BLOCK_ROWS; // tiles that are not computed
        int tiles = ceil_div<int>(args.T, ATTENTION_BLOCK_ROWS) - before, pairs = (tiles + 1) / 2, item, z;
        bool second;
        do {
            item = turn / 2 * (int)gridDim.x + (int)blockIdx.x;
            z = item / heads % pairs;
            second = turn % 2 == 1;
            turn++;
        } while (second && 2 * z == tiles - 1); // the middle is alone
        at.head = item % heads;
        at.b = item / heads / pairs;
        at.first = (before + (second ? z : tiles - 1 - z)) * ATTENTION_BLOCK_ROWS;
        return at.b < args.B;
    }
};

// All threads: barriers are there. Returns the thread's warpgroup: 0 is the producer. Every warp's role must
// look the same to all its lanes
template <class Memory> __device__ __forceinline__ int begin_block(Memory &memory) {
    if (threadIdx.x == 0) {
        memory.init_barriers();
    }
    __syncthreads();
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP_THREADS, 0);
}

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

// for queries, the keys up to the diagonal; OWN: forward or dq
template <int HD, int OWN>
__device__ __forceinline__ void produce(const AttentionArguments &args, AttentionMemory<HD, OWN> memory) {
    typedef AttentionMemory<HD, OWN> Memory;
    const CUtensorMap *maps[3] = {&args.qkv, &args.dout, &args.out};
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.H)) {
        barrier_wait(memory.own_empty(), memory.own_parity ^ 1);
        barrier_expect(memory.own_full(), Memory::OWN_BYTES);
        memory.own_parity ^= 1;
        for (int i = 0; i < 2 * OWN; i++) {
            int row = at.first + i % 2 * ATTENTION_ROWS;
            load_tile<HD>(memory.own(i / 2, i % 2), maps[i / 2], memory.own_full(), at.head * HD, row, at.b);
        }
        int column = (args.H + at.head / (args.H / args.KV)) * HD;
        for (int key = 0; key < min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T); key += ATTENTION_ROWS) {
            barrier_wait(memory.empty(), memory.ring.parity ^ 1);
            barrier_expect(memory.full(), Memory::STAGE_BYTES);
            load_tile<HD>(memory.tile(0), &args.qkv, memory.full(), column, key, at.b);
            load_tile<HD>(memory.tile(1), &args.qkv, memory.full(), column + args.KV * HD, key, at.b);
            memory.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: operands and products

// lane 0 of each warp, when all its lanes have read
__device__ __forceinline__ void release(uint32_t empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(empty);
    }
}

// a stage that this consumer does not need
template <class Memory> __device__ __forceinline__ void skip_stage(Memory &memory) {
    barrier_wait(memory.full(), memory.ring.parity);
    release(memory.empty());
    memory.advance();
}

// the stage after the present one is there; if there is one
template <class Memory> __device__ __forceinline__ void wait_next(Memory memory, bool exists) {
    if (exists) {
        memory.advance();
        barrier_wait(memory.full(), memory.ring.parity);
    }
}

// columns 16 step .. 16 step + 15 of the warp's 16 rows of a tile, as left operand
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t tile, int step) {
    uint32_t lane = threadIdx.x % 32, row = threadIdx.x % GROUP_THREADS / 32 * 16 + lane % 16;
    uint32_t piece = 2 * (step % 4) + lane / 16;
    uint32_t from = tile + step / 4 * BLOCK_BYTES + row * 128 + ((piece ^ (row % 8)) << 4);
    load_matrices(a, from);
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
    int before = (int)threadIdx.x % 4 * 2 - own_row(); // column - row of s[0]
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int ahead = before + i / 4 * 8 + i % 2 - i / 2 % 2 * 8;
        s[i] = (TRANSPOSED ? ahead < 0 : ahead > 0) ? -INFINITY : s[i];
    }
}

// Accumulators times scale become rows of `to`, which is the first of them at `position`; TURN: by way of
// RoPE's rotation back. Rows before start and from T on are not stored
template <int HD, bool TURN>
__device__ __forceinline__ void store_rows(floatX *to, int stride, float (&acc)[HD / 2], float scale,
                                           const AttentionArguments &args, int position) {
    int row = own_row(), t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        bool valid = position + row >= args.start && position + row < args.T;
        const float *angles = args.rope_table + (int64_t)(valid ? position + row : 0) * HD + 2 * t;
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            acc[4 * n + 2 * half] *= scale;
            acc[4 * n + 2 * half + 1] *= scale;
        }
#pragma unroll
        for (int n = 0; TURN && n < HD / 16; n++) { // columns 8 n .. and HD / 2 + 8 n ..
            float *low = &acc[4 * n + 2 * half], *high = &acc[4 * (n + HD / 16) + 2 * half];
            float2 cosine = *reinterpret_cast<const float2 *>(angles + 8 * n);
            float2 sine = *reinterpret_cast<const float2 *>(angles + HD / 2 + 8 * n);
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
// consumers: forward

// the softmax so far of this lane's two rows: maximum (near it, in units of the exponent), this lane's share
// of the sum
struct AttentionSoftmax {
    float max[2], sum[2];

    // a tile's own maxima
    static __device__ __forceinline__ void tops(float (&top)[2], const float (&s)[32], float c) {
        top[0] = top[1] = -INFINITY;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
        }
        top[0] = portable::quad_max(top[0]) * c;
        top[1] = portable::quad_max(top[1]) * c;
    }
    // s becomes p; the sum and the output so far follow a new maximum, if p would exceed 2^8 without
    template <int HALF_HD>
    __device__ __forceinline__ void add(float (&s)[32], float (&o)[HALF_HD], const float (&top)[2], float c) {
        bool grows = top[0] > max[0] + 8.0f || top[1] > max[1] + 8.0f;
        if (__any_sync(0xffffffffu, grows)) {
            for (int half = 0; half < 2; half++) {
                float raised = top[half] > max[half] + 8.0f ? top[half] : max[half];
                float keep = power_of_2(max[half] - raised);
                max[half] = raised;
                sum[half] *= keep;
#pragma unroll
                for (int n = 0; n < HALF_HD / 4; n++) {
                    o[4 * n + 2 * half] *= keep;
                    o[4 * n + 2 * half + 1] *= keep;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 32; i++) {
            s[i] = power_of_2(s[i] * c - max[i / 2 % 2]);
            sum[i / 2 % 2] += s[i];
        }
    }
};

// lse, and the output divided by the sum
template <int HD>
__device__ __forceinline__ void store_output(float (&o)[HD / 2], const AttentionSoftmax &softmax,
                                             const AttentionArguments &args, AttentionTile128 at, int row) {
    int rows_out = args.T - args.start, stride = args.H * HD;
    for (int half = 0; half < 2; half++) {
        float total = portable::quad_sum(softmax.sum[half]), inverse = 1.0f / total;
        int position = row + own_row() + 8 * half;
        if (threadIdx.x % 4 == 0 && position >= args.start && position < args.T) {
            args.lse_to[((int64_t)at.b * args.H + at.head) * rows_out + position - args.start] =
                (softmax.max[half] + log2f(total)) * 0.693147181f;
        }
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            o[4 * n + 2 * half] *= inverse;
            o[4 * n + 2 * half + 1] *= inverse;
        }
    }
    floatX *to = args.to + ((int64_t)at.b * rows_out + row - args.start) * stride + at.head * HD;
    store_rows<HD, false>(to, stride, o, 1.0f, args, row);
}

template <int HD>
__device__ __forceinline__ void consume(const AttentionArguments &args,
                                        AttentionMemory<HD, ATTENTION_FORWARD> memory, int consumer) {
    float c = args.c;
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.H)) {
        int row = at.first + consumer * ATTENTION_ROWS;
        int tiles = ceil_div<int>(min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T), ATTENTION_ROWS);
        int mine = row < args.T ? row / ATTENTION_ROWS + 1 : 0;
        AttentionSoftmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        AttentionOwn<HD, true> queries;
        float even[32], odd[32], o[HD / 2], top[2];
        uint32_t p[4][4];
        barrier_wait(memory.own_full(), memory.own_parity);
        memory.own_parity ^= 1;
        queries.begin(memory.own(0, consumer));
        release(memory.own_empty());
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            o[i] = 0.0f;
        }
        uint32_t done = 0; // the stage before
        // of the tile whose scores are s; meanwhile the next tile's scores
        auto step = [&](float(&s)[32], float(&next)[32]) {
            uint32_t values = memory.tile(1), present = memory.empty();
            memory.advance();
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            queries.times(next, memory.tile(0));
            wgmma_commit();
            AttentionSoftmax::tops(top, s, c);
            wgmma_wait<1>(); // the output so far is there
            wgmma_results(o);
            if (done != 0) {
                release(done);
            }
            softmax.add(s, o, top, c);
            to_operand(p, s);
            wgmma_fence();
            add_product<HD>(o, p, values);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_results(next);
            done = present;
        };
        if (mine > 0) {
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            queries.times(even, memory.tile(0));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(even);
#pragma unroll 1
            for (int i = 2; i < mine; i += 2) {
                step(even, odd);
                step(odd, even);
                wgmma_wait<0>(); // the compiler follows no product around the loop
                wgmma_results(o);
            }
            if (mine % 2 == 0) {
                step(even, odd);
                wgmma_wait<0>();
                wgmma_results(o);
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    even[i] = odd[i];
                }
            }
            mask_diagonal<false>(even);
            AttentionSoftmax::tops(top, even, c);
            wgmma_wait<0>();
            wgmma_results(o);
            if (done != 0) {
                release(done);
            }
            softmax.add(even, o, top, c);
            to_operand(p, even);
            wgmma_fence();
            add_product<HD>(o, p, memory.tile(1));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(o);
            release(memory.empty());
            memory.advance();
        }
        for (int i = mine; i < tiles; i++) {
            skip_stage(memory);
        }
        store_output<HD>(o, softmax, args, at, row);
    }
}

#endif

// ----------------------------------------------------------------------------
// launches

// OWN says which of the kernels; produce and consume have one version a kind of memory
template <int HD, int OWN>
static __global__ void __launch_bounds__(ATTENTION_BLOCK_THREADS, 1)
    attention_kernel(const __grid_constant__ AttentionArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    AttentionMemory<HD, OWN> memory;
    int group = begin_block(memory);
    if (group == 0) {
        give_registers<ATTENTION_PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            produce(args, memory);
        }
    } else {
        take_registers<ATTENTION_CONSUMER_REGISTERS>();
        consume(args, memory, group - 1);
    }
#else
    (void)args;
    __trap(); // a build without sm_90a has no such kernel
#endif
}

// the head sizes that these kernels are made for
static inline bool attention_takes(int hd) {
    return hd == 64 || hd == 96;
}

static inline AttentionArguments attention_arguments(floatX *to, const floatX *qkv, int B, int T, int start,
                                                     int H, int KV, int hd) {
    AttentionArguments args;
    memset(&args, 0, sizeof(args));
    args.qkv = tensor_map(qkv, (H + 2 * KV) * hd, T, B, ATTENTION_ROWS);
    args.to = to;
    args.B = B;
    args.T = T;
    args.start = start;
    args.H = H;
    args.KV = KV;
    args.scale = 1.0f / sqrtf((float)hd);
    args.c = args.scale * 1.44269504f;
    return args;
}

template <int HD, int OWN> static void start_attention(AttentionArguments args, cudaStream_t stream) {
    void (*kernel)(AttentionArguments) = attention_kernel<HD, OWN>;
    int tiles = ceil_div<int>(args.T, ATTENTION_BLOCK_ROWS) - args.start / ATTENTION_BLOCK_ROWS;
    int items = args.B * (OWN == ATTENTION_DKV ? args.KV : args.H) * ((tiles + 1) / 2);
    launch(kernel, min(num_sms(), items), ATTENTION_BLOCK_THREADS, AttentionMemory<HD, OWN>::BYTES, stream,
           args);
}

static inline void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, cudaStream_t stream) {
    AttentionArguments args = attention_arguments(out, qkv, B, T, start, H, KV, hd);
    args.lse_to = lse;
    if (hd == 64) {
        start_attention<64, ATTENTION_FORWARD>(args, stream);
    } else {
        start_attention<96, ATTENTION_FORWARD>(args, stream);
    }
}

} // namespace hopper

#endif
#endif
