/*
What attention's Hopper kernels share (attention_hopper.cuh, attention_backward_hopper.cuh): their arguments,
shared memory with its ring and barriers, the order in which blocks take tiles, and a consumer's operands and
products.

A block is three warpgroups: one producer, and two consumers that own 64 rows each. Shared memory holds those
rows and a ring of stages, each of two tiles of 64 rows (and, for the backward, lse and D of the ring's
queries):

    own_full       completed by TMA's bytes: the consumers' own rows are there
    own_empty      completed by 8 warps: these rows are in registers, the next may come
    full[stage], empty[stage]   the same for each stage of the ring

The left operand of a product is fragments in registers (or the consumer's own rows), the right one a tile of
the ring, read along k (S = Q K^T) or across it (O += P V): hopper.cuh. A lane's accumulators are placed as
the next product's left operand wants them, so that P and dS go from one product to the other in registers.

hd = 96 is a block of 64 columns and half a block: boxes are 64 columns wide, the other half holds columns of
the next head that nobody reads. Rows beyond T are zeros (the maps know sequences), and are not stored, nor
are rows before start.
*/
#ifndef ATTENTION_TILES_HOPPER_CUH
#define ATTENTION_TILES_HOPPER_CUH

#include "llmc/gpu/attention_tiles_portable.cuh"
// defines: portable::ATTENTION_PAD, quad_sum, quad_max, LOG2_E, LN_2, rope_turn

#ifndef PRECISION_FP32
#include "llmc/gpu/wgmma.cuh"

namespace hopper {

enum {
    ATTENTION_ROWS = 64, // of a consumer, and of a tile of the ring
    ATTENTION_BLOCK_ROWS = 2 * ATTENTION_ROWS,
    ATTENTION_BLOCK_THREADS = 3 * GROUP_THREADS,
    ATTENTION_BLOCK_WARPS = 8,                                           // of consumers
    ATTENTION_START_REGISTERS = 65536 / ATTENTION_BLOCK_THREADS / 8 * 8, // per thread, come in eights
    ATTENTION_PRODUCER_REGISTERS = 24,
    ATTENTION_CONSUMER_REGISTERS = 240
};

static_assert(ATTENTION_ROWS * 128 == BLOCK_BYTES, "64 columns of a consumer's rows are one block of a tile");
static_assert(ATTENTION_BLOCK_WARPS * 32 == 2 * GROUP_THREADS, "two of the warpgroups are consumers");
static_assert(ATTENTION_PRODUCER_REGISTERS + 2 * ATTENTION_CONSUMER_REGISTERS <=
                  3 * ATTENTION_START_REGISTERS,
              "what consumers take, the producer has given");
static_assert(portable::ATTENTION_PAD % ATTENTION_ROWS == 0, "scratch has whole tiles of queries");

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
    static_assert(TILE % 1024 == 0, "a swizzled tile begins at a multiple of 1024 bytes");
    static_assert(BARRIERS % 8 == 0, "a barrier is 8 bytes, aligned");
    static_assert(BYTES <= 227 << 10, "what a block may have on sm_90");

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

#endif

} // namespace hopper

#endif
#endif
