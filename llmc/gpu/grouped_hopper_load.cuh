/*
The grouped GEMM on Hopper: the ring of stages, and the producer, the warpgroup that fills it.

A stage is a step of 64 in k: A (128 rows of D), then B (BN columns of D), each as tiles of hopper.cuh.

    full[stage]    the producer's arrivals and TMA's bytes: the stage may be read
    empty[stage]   8 consumer warps of each block of the cluster: the stage may be written

B comes by TMA. A comes by TMA where its rows lie together (produce_by_tma: one thread does it all). Where A's
rows are tokens, anywhere in x or dy, all 128 threads copy 16-byte pieces of them by cp.async
(produce_by_token): no gathered copy ever exists, and the gather costs no time of its own. Two ways to deal
out the 1,024 pieces of a stage:

    RowGather      rows of D are tokens   thread 8 r + p: piece p of rows r, r + 16, ..., the same 8 tokens in
                                          all of the tile's steps
    ColumnGather   tokens are in k        thread 16 k + p: piece p of tokens k, k + 8, ..., new in each step

Rows that do not exist (pads, token -1) and columns behind d are zeros in shared memory. What lies behind an
expert's rows is not read. Errors: none.
*/
#ifndef GROUPED_HOPPER_LOAD_CUH
#define GROUPED_HOPPER_LOAD_CUH

#include "llmc/gpu/grouped_hopper_tiles.cuh"
#include <type_traits>
// defines: Variant, Plan, find_tile, Walk; std::conditional

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace hopper {

// ----------------------------------------------------------------------------
// the ring

template <class V> struct Ring : RingTurn {
    uint32_t tiles;    // address of stage 0
    uint32_t barriers; // of full[0]
    int stages;

    __device__ __forceinline__ Ring(uint32_t base, int count) {
        tiles = base;
        barriers = base + count * V::STAGE_BYTES;
        stages = count;
        stage = 0;
        parity = 0;
    }
    __device__ __forceinline__ uint32_t a() const {
        return tiles + stage * V::STAGE_BYTES;
    }
    __device__ __forceinline__ uint32_t b() const {
        return a() + V::A_BYTES;
    }
    __device__ __forceinline__ uint32_t full() const {
        return barriers + stage * 8;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + stages * 8;
    }
    __device__ __forceinline__ uint32_t landed() const { // of the first slot of H
        return barriers + V::LANDED;
    }
    __device__ __forceinline__ void advance() {
        RingTurn::advance(stages);
    }
};

template <class V> __device__ __forceinline__ void init_barriers(Ring<V> ring) {
    for (int stage = 0; stage < ring.stages; stage++) {
        barrier_init(ring.full(), V::GATHERS ? 1 + GROUP_THREADS : 1);
        barrier_init(ring.empty(), V::CLUSTER * CONSUMER_WARPS);
        ring.advance();
    }
    for (int slot = 0; V::SLOTTED && slot < 2 * SLOTS; slot++) {
        barrier_init(ring.landed() + slot * 8, 1);
    }
    barrier_init_done();
}

// ----------------------------------------------------------------------------
// B, and A where its rows lie together, by TMA (one thread)

// A stage's B, `count` boxes of it; BOTH: to both blocks. Along k a box is BN / 2 rows (up_forward: gate's,
// then up's), across k 64 columns
template <class V, bool BOTH>
__device__ __forceinline__ void load_boxes(const Arguments &args, const Ring<V> &ring, const Tile &tile,
                                           int first_k, int first) {
#pragma unroll
    for (int j = 0; j < (BOTH ? V::HALF_BOXES : V::B_BOXES); j++) {
        int i = first + j;
        uint32_t to = ring.b() + i * (V::B_ACROSS ? (int)BLOCK_BYTES : V::BN / 2 * 128);
        if (BOTH && i == V::B_BOXES) {
            return; // of an odd number the first block has more
        }
        if (V::UP) {
            tma_load_paired<BOTH>(to, &args.b, ring.full(), first_k, tile.n / 8, 2 * tile.expert + i);
        } else if (V::B_ACROSS) {
            tma_load<BOTH>(to, &args.b, ring.full(), tile.n + i * 64, first_k, V::WGRAD ? 0 : tile.expert);
        } else {
            tma_load<BOTH>(to, &args.b, ring.full(), first_k, tile.n + i * (V::BN / 2), tile.expert);
        }
    }
}

// of blocks that share B each loads half of it, for both
template <class V>
__device__ __forceinline__ void load_b(const Arguments &args, const Ring<V> &ring, const Tile &tile,
                                       int first_k) {
    if (V::CLUSTER == 2 && tile.coupled) {
        load_boxes<V, V::CLUSTER == 2>(args, ring, tile, first_k, (int)cluster_rank() * V::HALF_BOXES);
    } else {
        load_boxes<V, false>(args, ring, tile, first_k, 0);
    }
}

template <class V>
__device__ __forceinline__ void produce_by_tma(const Arguments &args, Plan plan, Ring<V> ring) {
    int h_first = (int)*args.h.first;
    for (Walk<V> walk(plan, args); walk.more; walk.on(plan, args)) {
        const Tile &tile = walk.next;
        for (int step = 0; step < tile.steps; step++) {
            int k = step * STEP_K;
            barrier_wait(ring.empty(), ring.parity ^ 1);
            barrier_expect(ring.full(), V::B_BYTES + tile.rows / GROUP_ROWS * BLOCK_BYTES);
            tma_load(ring.a(), &args.a, ring.full(), k, h_first + tile.m, 0);
            if (tile.rows > GROUP_ROWS) {
                tma_load(ring.a() + BLOCK_BYTES, &args.a, ring.full(), k, h_first + tile.m + GROUP_ROWS, 0);
            }
            load_b<V>(args, ring, tile, k);
            ring.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// A by token (a warpgroup)

enum {
    PIECES = TILE_M * STEP_K * 2 / 16 / GROUP_THREADS
}; // of a stage's A, of 16 bytes, that a thread copies
static_assert(PIECES == 8, "what the two gathers deal out");

// Copies a thread's pieces, STRIDE bytes apart, or zeros. cp.async holds its address registers until the copy
// is issued, so eight copies through one register pair wait for each other: all addresses are computed first,
// each in a pair of its own where the compiler finds one. (Before the stage is free, in 16 registers: no
// gain.)
template <int STRIDE>
__device__ __forceinline__ void copy_pieces(uint32_t to, const uint4 *const (&from)[PIECES],
                                            const bool (&valid)[PIECES]) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        copy16(to + i * STRIDE, from[i], valid[i]);
    }
}

// Rows of D are tokens: a warp's are 4 warp + (0 .. 3) + 16 i, whose tokens its lanes fetch a tile ahead
struct RowGather {
    const uint4 *rows;
    uint32_t source[PIECES]; // first piece of the row; NO_ROW: zeros
    uint32_t piece, pieces;  // of a row: this thread's in step 0, and how many there are
    uint32_t to;             // offset in the tile
    int token;               // the lane's, of the tile that begins next

    static constexpr uint32_t NO_ROW = 0xffffffffu;

    __device__ __forceinline__ void fetch(const Arguments &args, const Tile &tile) {
        int lane = threadIdx.x % 32, row = threadIdx.x % GROUP_THREADS / 32 * 4 + lane % 4 + lane / 4 * 16;
        token = row < tile.rows ? args.chunk.token_of_row[args.chunk.first + tile.m + row] : -1;
    }
    __device__ __forceinline__ void begin(const Arguments &args, const Tile &) {
        uint32_t thread = threadIdx.x % GROUP_THREADS, row = thread / 8;
        rows = reinterpret_cast<const uint4 *>(args.rows);
        pieces = (uint32_t)args.d / 8;
        piece = thread % 8;
        to = row * 128 + ((piece ^ (row % 8)) << 4);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int its = __shfl_sync(0xffffffffu, token, 4 * i + (int)row % 4);
            source[i] = its < 0 ? NO_ROW : (uint32_t)its * pieces;
        }
    }
    __device__ __forceinline__ void copy(uint32_t a, int step) const {
        uint32_t at = piece + (uint32_t)step * (STEP_K / 8);
        const uint4 *from[PIECES];
        bool valid[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            valid[i] = at < pieces && source[i] != NO_ROW;
            from[i] = rows + (valid[i] ? source[i] + at : 0);
        }
        copy_pieces<16 * 128>(a + to, from, valid);
    }
};

// Rows of D are columns of X, tokens are in k: lane l of each warp has tokens l and l + 32 of a step. They
// are fetched two steps ahead: memory takes about as long to answer as a step (4 to 8 % of narrow experts'
// gradients)
struct ColumnGather {
    const uint4 *column; // the thread's piece of token 0
    uint32_t pieces;     // of a row
    bool inside;
    int tokens[2], later[2]; // of the next step and of the one after
    uint32_t to;

    __device__ __forceinline__ void fetch(const Arguments &args, const Tile &tile, int step = 0) {
        const int *from =
            args.chunk.token_of_row + args.chunk.first + tile.row + step * STEP_K + threadIdx.x % 32;
        later[0] = from[0];
        later[1] = from[32];
    }
    __device__ __forceinline__ void begin(const Arguments &args, const Tile &tile) {
        uint32_t thread = threadIdx.x % GROUP_THREADS, k = thread / 16, place = thread % 16;
        uint32_t first = (uint32_t)tile.m / 8 + place;
        pieces = (uint32_t)args.d / 8;
        inside = first < pieces;
        column = reinterpret_cast<const uint4 *>(args.rows) + (inside ? first : 0);
        to = place / 8 * BLOCK_BYTES + k * 128 + ((place % 8 ^ k) << 4);
    }
    __device__ __forceinline__ void shift() {
        tokens[0] = later[0];
        tokens[1] = later[1];
    }
    __device__ __forceinline__ void copy(uint32_t a, int) const {
        int k = threadIdx.x % GROUP_THREADS / 16;
        const uint4 *from[PIECES];
        bool valid[PIECES];
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int token = __shfl_sync(0xffffffffu, tokens[i / 4], k + i % 4 * 8);
            valid[i] = inside && token >= 0;
            from[i] = column + (valid[i] ? (uint32_t)token * pieces : 0);
        }
        copy_pieces<8 * 128>(a + to, from, valid);
    }
};

template <class V>
__device__ __forceinline__ void produce_by_token(const Arguments &args, Plan plan, Ring<V> ring) {
    typename std::conditional<V::WGRAD, ColumnGather, RowGather>::type gather;
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    int item = blockIdx.x / V::CLUSTER, stride = gridDim.x / V::CLUSTER;
    int h_first = V::WGRAD ? (int)*args.h.first : 0;
    // the tile's rows, or those of its first step; the tile is found once more later: registers are few here
    auto fetch_tile = [&](int item, int expert) {
        Tile tile;
        tile.expert = expert;
        if (find_tile<V>(tile, item, plan, args)) {
            gather.fetch(args, tile);
        }
    };
    // weight gradients: those of a step; behind the last, of the next tile's first
    auto fetch_step = [&](const Tile &tile, int step) {
        if constexpr (V::WGRAD) {
            gather.shift();
            if (step < tile.steps) {
                gather.fetch(args, tile, step);
            } else if (step == tile.steps) {
                fetch_tile(item + stride, tile.expert);
            }
        }
    };
    // Issuing B's loads delays a warp. The four warps take turns, so that no single one falls behind (1 % of
    // down_backward)
    auto issue_b = [&](const Tile &tile, int first_k) {
        if (warp == ring.stage % (GROUP_THREADS / 32) && elect_one()) {
            barrier_expect(ring.full(), V::B_BYTES);
            load_b<V>(args, ring, tile, first_k);
        }
    };
    Tile tile;
    tile.expert = 0;
    fetch_tile(item, 0);
    for (; find_tile<V>(tile, item, plan, args); item += stride) {
        int first_k = V::WGRAD ? h_first + tile.row : 0;
        gather.begin(args, tile);
        if (V::WGRAD) {
            fetch_step(tile, 1);
        } else {
            fetch_tile(item + stride, tile.expert);
        }
        for (int step = 0; step < tile.steps; step++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (!V::WGRAD) { // W before A (1 to 2 % of up_forward), but A before H (up to 5 % of down_wgrad)
                issue_b(tile, first_k + step * STEP_K);
            }
            gather.copy(ring.a(), step);
            if (V::WGRAD) {
                issue_b(tile, first_k + step * STEP_K);
            }
            barrier_arrive_after_copies(ring.full());
            fetch_step(tile, step + 2);
            ring.advance();
        }
    }
}

} // namespace hopper

#endif
#endif
