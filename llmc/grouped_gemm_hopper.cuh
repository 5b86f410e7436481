/*
The experts' products on Hopper (sm_90a), bf16: the functions of grouped_gemm.cuh, same names and arguments,
in namespace hopper. One kernel template does all six; they differ in where the operands come from and in
what becomes of the accumulators:

    product                                   M x N, k         A            B          epilogue
    up_forward     H = X' W_gate_up^T         rows x 2F, d     X by token   W_gate_up  H; A = silu(G) U
    down_forward   Y = A W_down^T             rows x d, F      A            W_down     Y
    down_backward  dA' = dY' W_down           rows x F, d      dY by token  W_down     SwiGLU backward
    up_backward    dX' = dH W_gate_up         rows x d, 2F     dH           W_gate_up  dX'
    down_wgrad     dW_down += dY'^T (gate A)  d x F, rows      dY by token  gate A     fp32 +=
    up_wgrad       dW_gate_up^T += X'^T dH    d x 2F, rows     X by token   dH         fp32 +=, transposed

SwiGLU backward, with silu(g) = g s, s = sigmoid(g):
    A = U silu(G);  dgate's part = sum over the tile of dA' A;  a = gate A
    dG = gate dA' U s (1 + G (1 - s));  dU = gate dA' silu(G)

How the kernel works. As many blocks as multiprocessors walk through the tiles of D, 128 x BN (BN = 256, 192
or 128: whichever wastes least). A block is three warpgroups. One is the producer: it fills a ring of stages
in shared memory, each a step of 64 in k. B comes by TMA; A by TMA where its rows lie together, else each
thread copies 16-byte pieces (cp.async) from the rows' tokens: no gathered copy ever exists. What an epilogue
will read, H or the gradient so far, it has fetched to L2 meanwhile. The other two are consumers, 64 rows of
the tile each: wgmma from the ring into registers, then the epilogue from registers. The second consumer
starts each tile a little after the first (LEAD stages), so that one's epilogue runs while the other
multiplies: with d = 768 a tile is only 12 stages long.

Two blocks make a cluster and, where possible, take two tiles of one column of tiles: they need the same B, so
each loads half of it, for both. Where an expert has an odd number of row tiles, the last is shared the other
way: two tiles side by side, each block loads its own B. A stage is free when both blocks' consumers are done.

    full[stage]    producer's arrivals and TMA's bytes: the stage may be read
    empty[stage]   8 consumer warps of each block of the cluster: the stage may be written

down_backward moves 10 bytes an element of dA', more than its products take time for. Its H goes through
shared memory, 64 rows x 64 columns of G and of U at a time, a slot: TMA brings it, the consumer computes in
place, TMA takes dG and dU away. Each consumer has two slots and starts the copies itself: the tile's first
two pieces during its first products, the others (in L2 by then) when the slot's results have left.

    landed[consumer][slot]   TMA's bytes: the slot may be read

Operands that are stored across k (W in the backward products; both in the weight gradients, whose k are rows)
are read as they are: wgmma transposes them (hopper.cuh). up_forward's tile holds BN/2 gate columns and the up
columns of the same f, so that a thread has both. Accumulators leave by 16-byte stores after lanes of a quad
have exchanged pieces. Rows: segments of the experts are multiples of 64 rows; half tiles that belong to
nobody are not stored. Edges of d and F, multiples of 8, are zeros in shared memory and are not stored.

Deterministic: each element of an output has one owner, who adds in a fixed order; tiles are dealt out in a
fixed order. Shapes: grouped_gemm.cuh. place of ChunkH: a multiple of 2F. Errors: more than 2048 experts are
refused. Nothing is allocated, the host does not wait; tensor maps are kernel arguments, so a CUDA graph may
capture the launches.
*/
#ifndef GROUPED_GEMM_HOPPER_CUH
#define GROUPED_GEMM_HOPPER_CUH

#include "row_chunk.cuh"

#if !defined(PRECISION_FP32) && !defined(EMULATED)
#include "hopper.cuh"

#ifndef GROUPED_CLUSTER
#define GROUPED_CLUSTER 2
#endif
#ifndef GROUPED_LEAD
#define GROUPED_LEAD 2
#endif
#ifndef GROUPED_PREFETCH
#define GROUPED_PREFETCH true
#endif

namespace hopper {

enum { UP_FORWARD, DOWN_FORWARD, DOWN_BACKWARD, UP_BACKWARD, DOWN_WGRAD, UP_WGRAD };

enum {
    TILE_M = 128,
    STEP_K = 64,
    GROUP_ROWS = 64, // rows of a consumer
    BLOCK_THREADS = 3 * GROUP_THREADS,
    CONSUMER_WARPS = 8,
    CLUSTER = GROUPED_CLUSTER, // blocks: 1 or 2
    MOST_EXPERTS = 2048,
    PRODUCER_REGISTERS = 56, // of 3 x 168 that a thread of each warpgroup has at the start
    CONSUMER_REGISTERS = 224,
};

template <int PRODUCT> struct Traits {
    enum {
        WGRAD = PRODUCT == DOWN_WGRAD || PRODUCT == UP_WGRAD,
        GATHERS = WGRAD || PRODUCT == UP_FORWARD || PRODUCT == DOWN_BACKWARD, // A, by token
        A_ACROSS = WGRAD,                                                     // stored across k
        B_ACROSS = PRODUCT != UP_FORWARD && PRODUCT != DOWN_FORWARD,
        B_WEIGHTS = !WGRAD, // B has a third dimension, the expert
        H_IN_SLOTS = PRODUCT == DOWN_BACKWARD, // the epilogue's H
    };
};

// columns of D's tile as the product counts them; up_forward counts f, its tile has gate and up of each
template <int PRODUCT, int BN> struct Columns {
    enum { N = PRODUCT == UP_FORWARD ? BN / 2 : BN };
};

struct Arguments {
    CUtensorMap a[2]; // where rows lie together; of two, the second is H in scratch
    CUtensorMap b[2];
    CUtensorMap soon[2]; // what the epilogue reads, 64 rows a box: H [rows][2][F], or dW (as bf16) [rows][.]
    RowChunk chunk;
    ChunkH h;
    const floatX *rows; // gathered: X or dY [N, d]
    floatX *a_out;      // up_forward: A or NULL; down_backward: gate A
    floatX *out;        // Y or dX'
    float *dw;
    float *dgate_partial;
    int d, F;
    int N;                // columns as Columns counts them
    int steps;            // of 64 in k; weight gradients: an expert's own
    int m_tiles, n_tiles; // tiles of D; m_tiles of weight gradients only
    int stages;           // of the ring
    int lead;
    bool prefetch;
};

// ----------------------------------------------------------------------------
// shared memory: the ring, its barriers, the plan

template <int BN> struct Stages {
    enum {
        A_BYTES = TILE_M * STEP_K * 2,
        B_BYTES = BN * STEP_K * 2,
        BYTES = A_BYTES + B_BYTES,
        MOST = BN == 256   ? 4
               : BN == 192 ? 5
                           : 6, // about 200 KB
        BARRIERS = 256,         // bytes: full, empty, the leader's count; from LANDED on, the slots'
        LANDED = 192,
    };
};

enum {
    SLOTS = 2,   // of each consumer
    SLOT_F = 64, // columns of G and U in a slot
    SLOT_BYTES = 2 * GROUP_ROWS * SLOT_F * 2,
    MOST_SHARED = 227 * 1024, // of a block
};

template <int PRODUCT> struct AllSlots {
    enum { BYTES = Traits<PRODUCT>::H_IN_SLOTS ? 2 * SLOTS * SLOT_BYTES : 0 };
};

// all but the ring
template <int PRODUCT, int BN> static inline int other_bytes(int experts) {
    int align = 1024; // shared memory may begin anywhere
    return align + AllSlots<PRODUCT>::BYTES + Stages<BN>::BARRIERS + 2 * (experts + 1) * (int)sizeof(int);
}

template <int PRODUCT, int BN> static inline int ring_stages(int experts) {
    int room = MOST_SHARED - other_bytes<PRODUCT, BN>(experts);
    return min(room / Stages<BN>::BYTES, (int)Stages<BN>::MOST);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int BN> struct Ring {
    uint32_t tiles;    // address of stage 0
    uint32_t barriers; // of full[0]
    int stages;
    int stage;
    uint32_t parity; // of the phase that is to come

    __device__ __forceinline__ Ring(uint32_t base, int count) {
        tiles = base;
        barriers = base + count * Stages<BN>::BYTES;
        stages = count;
        stage = 0;
        parity = 0;
    }
    __device__ __forceinline__ uint32_t a() const {
        return tiles + stage * Stages<BN>::BYTES;
    }
    __device__ __forceinline__ uint32_t b() const {
        return a() + Stages<BN>::A_BYTES;
    }
    __device__ __forceinline__ uint32_t full() const {
        return barriers + stage * 8;
    }
    __device__ __forceinline__ uint32_t empty() const {
        return full() + stages * 8;
    }
    __device__ __forceinline__ uint32_t landed() const {
        return barriers + Stages<BN>::LANDED;
    }
    __device__ __forceinline__ void advance() {
        stage++;
        if (stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int PRODUCT, int BN> __device__ __forceinline__ void init_barriers(Ring<BN> ring) {
    for (int stage = 0; stage < ring.stages; stage++) {
        barrier_init(ring.full(), Traits<PRODUCT>::GATHERS ? 1 + GROUP_THREADS : 1);
        barrier_init(ring.empty(), CLUSTER * CONSUMER_WARPS);
        ring.advance();
    }
    for (int slot = 0; Traits<PRODUCT>::H_IN_SLOTS && slot < 2 * SLOTS; slot++) {
        barrier_init(ring.landed() + slot * 8, 1);
    }
    barrier_init_done();
}

// ----------------------------------------------------------------------------
// the plan: which tiles there are, and whose

// In shared memory. An item is what a cluster takes at a time: two tiles.
struct Plan {
    int *item_start; // [E + 1] first item of each expert; the last: all items
    int *row_start;  // [E + 1] first row in the chunk
};

struct Tile {
    int expert;
    int m;        // first row of D: of the chunk; weight gradients: of d
    int n;        // first column
    int rows;     // of D that belong to the expert, 64 or 128
    int row;      // weight gradients: first row in k
    int steps;    // in k
    bool coupled; // the cluster's blocks have the same B
};

template <bool WGRAD> __device__ __forceinline__ int plan_items(int rows, const Arguments &args) {
    int m_tiles = WGRAD ? args.m_tiles : ceil_div<int>(rows, TILE_M);
    int coupled = m_tiles / CLUSTER * args.n_tiles;
    int alone = m_tiles % CLUSTER * ceil_div<int>(args.n_tiles, CLUSTER);
    return rows > 0 ? coupled + alone : 0;
}

// all threads of the block
template <bool WGRAD> __device__ __forceinline__ void make_plan(Plan plan, const Arguments &args) {
    const RowChunk &chunk = args.chunk;
    int thread = threadIdx.x;
    int end = max(min(chunk.first + chunk.rows, chunk.offsets[chunk.experts]), chunk.first);
    for (int e = thread; e <= chunk.experts; e += BLOCK_THREADS) {
        plan.row_start[e] = min(max(chunk.offsets[e], chunk.first), end) - chunk.first;
    }
    __syncthreads();
    if (thread >= 32) {
        return;
    }
    int before = 0;
    for (int e = thread; e - thread < chunk.experts; e += 32) {
        int rows = e < chunk.experts ? plan.row_start[e + 1] - plan.row_start[e] : 0;
        int items = plan_items<WGRAD>(rows, args);
        for (int offset = 1; offset < 32; offset *= 2) {
            int below = __shfl_up_sync(0xffffffffu, items, offset);
            items += thread >= offset ? below : 0;
        }
        if (e < chunk.experts) {
            plan.item_start[e + 1] = before + items;
        }
        before += __shfl_sync(0xffffffffu, items, 31);
    }
    if (thread == 0) {
        plan.item_start[0] = 0;
    }
}

// Tile of this block in the item; false when there are no more. tile.expert is where the search goes on.
template <int PRODUCT, int BN>
__device__ __forceinline__ bool find_tile(Tile &tile, int item, Plan plan, const Arguments &args) {
    const bool WGRAD = Traits<PRODUCT>::WGRAD;
    if (item >= plan.item_start[args.chunk.experts]) {
        return false;
    }
    while (item >= plan.item_start[tile.expert + 1]) {
        tile.expert++;
    }
    int rank = CLUSTER == 1 ? 0 : (int)cluster_rank();
    int row = plan.row_start[tile.expert];
    int rows = plan.row_start[tile.expert + 1] - row;
    int m_tiles = WGRAD ? args.m_tiles : ceil_div<int>(rows, TILE_M);
    int pairs = m_tiles / CLUSTER;
    int i = item - plan.item_start[tile.expert];
    int pair = i / args.n_tiles;
    tile.coupled = pair < pairs;
    int m_tile = tile.coupled ? pair * CLUSTER + rank : m_tiles - 1;
    int n_tile = tile.coupled ? i - pair * args.n_tiles : (i - pairs * args.n_tiles) * CLUSTER + rank;
    tile.n = n_tile * Columns<PRODUCT, BN>::N;
    tile.m = m_tile * TILE_M + (WGRAD ? 0 : row);
    tile.rows = WGRAD ? TILE_M : min(rows - m_tile * TILE_M, (int)TILE_M);
    tile.row = row;
    tile.steps = WGRAD ? rows / STEP_K : args.steps;
    return true;
}

// ----------------------------------------------------------------------------
// producer: B, and A where its rows lie together, by TMA (one thread)

// H's place, in rows of [., 2F]; *which: the tensor map
__device__ __forceinline__ int64_t h_row(const Arguments &args, int *which) {
    int64_t place = *args.h.place;
    *which = place < 0;
    return place < 0 ? 0 : place / (2 * args.F);
}

__device__ __forceinline__ floatX *h_address(const Arguments &args) {
    int64_t place = *args.h.place;
    return place < 0 ? args.h.scratch : args.h.store + place;
}

// a box of B, to this block or to both
template <int PRODUCT>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, uint32_t full, bool both,
                                         int column, int row, int sheet) {
    const uint16_t blocks = 3;
    if (Traits<PRODUCT>::B_WEIGHTS) {
        if (both) {
            tma_multicast(to, map, full, blocks, column, row, sheet);
        } else {
            tma_load(to, map, full, column, row, sheet);
        }
    } else if (both) {
        tma_multicast(to, map, full, blocks, column, row);
    } else {
        tma_load(to, map, full, column, row);
    }
}

// One box of a stage's B. Along k: BN / 2 columns (up_forward: gate, then up); across k: 64 columns.
template <int PRODUCT, int BN>
__device__ __forceinline__ void load_piece_b(const CUtensorMap *map, Ring<BN> ring, const Tile &tile,
                                             int first_k, int piece, bool both) {
    if (!Traits<PRODUCT>::B_ACROSS) {
        uint32_t to = ring.b() + piece * (BN / 2) * 128;
        int row = PRODUCT == UP_FORWARD ? tile.n : tile.n + piece * (BN / 2);
        int sheet = PRODUCT == UP_FORWARD ? 2 * tile.expert + piece : tile.expert;
        load_box<PRODUCT>(to, map, ring.full(), both, first_k, row, sheet);
    } else {
        uint32_t to = ring.b() + piece * BLOCK_BYTES;
        load_box<PRODUCT>(to, map, ring.full(), both, tile.n + piece * 64, first_k, tile.expert);
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void load_b(const CUtensorMap *map, Ring<BN> ring, const Tile &tile, int first_k) {
    const int PIECES_B = Traits<PRODUCT>::B_ACROSS ? BN / 64 : 2;
    bool both = CLUSTER == 2 && tile.coupled;
    for (int piece = 0; piece < PIECES_B; piece++) {
        if (!both || (piece >= (PIECES_B + 1) / 2) == (int)cluster_rank()) {
            load_piece_b<PRODUCT>(map, ring, tile, first_k, piece, both);
        }
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void produce_by_tma(const Arguments &args, Plan plan, Ring<BN> ring) {
    int which = 0;
    int h_first = PRODUCT == UP_BACKWARD ? (int)h_row(args, &which) : 0;
    Tile tile;
    tile.expert = 0;
    for (int item = blockIdx.x / CLUSTER; find_tile<PRODUCT, BN>(tile, item, plan, args);
         item += gridDim.x / CLUSTER) {
        int halves = tile.rows / GROUP_ROWS; // what lies after the expert's rows is not read
        for (int step = 0; step < tile.steps; step++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            barrier_expect(ring.full(), Stages<BN>::B_BYTES + halves * BLOCK_BYTES);
            for (int half = 0; half < halves; half++) {
                tma_load(ring.a() + half * BLOCK_BYTES, &args.a[which], ring.full(), step * STEP_K,
                         h_first + tile.m + half * GROUP_ROWS);
            }
            load_b<PRODUCT>(&args.b[0], ring, tile, step * STEP_K);
            ring.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// producer: A by token (a warpgroup)

enum { PIECES = 8 }; // of 16 bytes, a thread and stage

// Rows of D are tokens. Thread 8 r + p copies piece p of rows r, r + 16, ...
struct RowGather {
    const uint4 *rows;
    uint32_t source[PIECES]; // in pieces, from the first row; NO_ROW: zeros
    uint32_t piece, pieces;  // of a row: this thread's in step 0, and how many there are
    uint32_t to;             // offset in the tile
};

enum : uint32_t { NO_ROW = 0xffffffffu };

__device__ __forceinline__ void gather_begin(RowGather &gather, const Arguments &args, const Tile &tile) {
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    uint32_t row = thread / 8;
    gather.rows = reinterpret_cast<const uint4 *>(args.rows);
    gather.pieces = (uint32_t)args.d / 8;
    gather.piece = thread % 8;
    gather.to = row * 128 + ((gather.piece ^ (row % 8)) << 4);
    const int *tokens = args.chunk.token_of_row + args.chunk.first + tile.m;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int r = (int)row + 16 * i;
        int token = r < tile.rows ? tokens[r] : -1;
        gather.source[i] = token < 0 ? (uint32_t)NO_ROW : (uint32_t)token * gather.pieces;
    }
}

__device__ __forceinline__ void gather_step(const RowGather &gather, uint32_t a, int step) {
    uint32_t piece = gather.piece + (uint32_t)step * (STEP_K / 8);
    bool inside = piece < gather.pieces;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        bool valid = inside && gather.source[i] != NO_ROW;
        copy16(a + gather.to + i * 16 * 128, gather.rows + (valid ? gather.source[i] + piece : 0), valid);
    }
}

// Rows of D are columns of X, tokens are in k. Thread 16 k + p copies piece p of tokens k, k + 8, ... of 64;
// the tokens of the next step are on their way meanwhile (lane l has those of l and l + 32).
struct ColumnGather {
    const uint4 *column; // the thread's piece of token 0
    uint32_t pieces;     // of a row
    bool inside;
    const int *tokens;
    int next[2];
    uint32_t to;
};

__device__ __forceinline__ void gather_tokens(ColumnGather &gather, int step) {
    gather.next[0] = gather.tokens[step * STEP_K];
    gather.next[1] = gather.tokens[step * STEP_K + 32];
}

__device__ __forceinline__ void gather_begin(ColumnGather &gather, const Arguments &args, const Tile &tile) {
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    uint32_t k = thread / 16, place = thread % 16;
    uint32_t piece = (uint32_t)tile.m / 8 + place;
    gather.pieces = (uint32_t)args.d / 8;
    gather.inside = piece < gather.pieces;
    gather.column = reinterpret_cast<const uint4 *>(args.rows) + (gather.inside ? piece : 0);
    gather.tokens = args.chunk.token_of_row + args.chunk.first + tile.row + threadIdx.x % 32;
    gather.to = place / 8 * BLOCK_BYTES + k * 128 + ((place % 8 ^ k) << 4);
    gather_tokens(gather, 0);
}

__device__ __forceinline__ void gather_step(const ColumnGather &gather, uint32_t a) {
    int k = threadIdx.x % GROUP_THREADS / 16;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int token = __shfl_sync(0xffffffffu, gather.next[i / 4], k + i % 4 * 8);
        bool valid = gather.inside && token >= 0;
        copy16(a + gather.to + i * 8 * 128, gather.column + (valid ? (uint32_t)token * gather.pieces : 0),
               valid);
    }
}

enum { PREFETCH_STEPS = 8 }; // this long before a tile's end

// What the epilogue will read is fetched to L2 during the tile's last steps: H, or the gradient so far. One
// thread; a tile has BN / 16 boxes of 64 rows of 128 bytes
template <int PRODUCT, int BN>
__device__ __forceinline__ void prefetch_epilogue(const Arguments &args, const CUtensorMap *map, int h_first,
                                                  const Tile &tile, int step) {
    const int BOXES = BN / 16;
    bool spread = tile.steps >= PREFETCH_STEPS;
    int a_step = spread ? (BOXES + PREFETCH_STEPS - 1) / PREFETCH_STEPS : BOXES;
    int first = (spread ? step - (tile.steps - PREFETCH_STEPS) : step) * a_step;
    for (int box = max(first, 0); box < min(first + a_step, BOXES); box++) {
        int x = box / 2, y = box % 2;
        if (PRODUCT == DOWN_BACKWARD && y * GROUP_ROWS < tile.rows) { // G, then U
            int piece = x % (BN / 64);
            if (!Traits<PRODUCT>::H_IN_SLOTS || piece >= SLOTS) {
                tma_prefetch(map, tile.n + piece * 64, x / (BN / 64), h_first + tile.m + y * 64);
            }
        } else if (PRODUCT == DOWN_WGRAD) {
            tma_prefetch(map, 2 * tile.n + x * 64, tile.expert * args.d + tile.m + y * 64);
        } else if (PRODUCT == UP_WGRAD) {
            tma_prefetch(map, 2 * tile.m + box % 4 * 64, tile.expert * args.N + tile.n + box / 4 * 64);
        }
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void produce_by_token(const Arguments &args, Plan plan, Ring<BN> ring) {
    const bool WGRAD = Traits<PRODUCT>::WGRAD;
    int which = 0;
    int h_first = PRODUCT == UP_WGRAD || PRODUCT == DOWN_BACKWARD ? (int)h_row(args, &which) : 0;
    const CUtensorMap *map = &args.b[PRODUCT == UP_WGRAD ? which : 0];
    const CUtensorMap *soon = &args.soon[PRODUCT == DOWN_BACKWARD ? which : 0];
    Tile tile;
    tile.expert = 0;
    for (int item = blockIdx.x / CLUSTER; find_tile<PRODUCT, BN>(tile, item, plan, args);
         item += gridDim.x / CLUSTER) {
        RowGather by_row;
        ColumnGather by_column;
        int first_k = PRODUCT == UP_WGRAD ? h_first + tile.row : PRODUCT == DOWN_WGRAD ? tile.row : 0;
        if (WGRAD) {
            gather_begin(by_column, args, tile);
        } else {
            gather_begin(by_row, args, tile);
        }
        for (int step = 0; step < tile.steps; step++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if (threadIdx.x == 0) {
                barrier_expect(ring.full(), Stages<BN>::B_BYTES);
                load_b<PRODUCT>(map, ring, tile, first_k + step * STEP_K);
                if (PRODUCT != UP_FORWARD && args.prefetch) {
                    prefetch_epilogue<PRODUCT, BN>(args, soon, h_first, tile, step);
                }
            }
            if (WGRAD) {
                gather_step(by_column, ring.a());
                if (step + 1 < tile.steps) {
                    gather_tokens(by_column, step + 1);
                }
            } else {
                gather_step(by_row, ring.a(), step);
            }
            barrier_arrive_after_copies(ring.full());
            ring.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: the product

__device__ __forceinline__ void release_stage(uint32_t empty) {
    uint32_t lane = threadIdx.x % 32;
    if (lane < CLUSTER) {
        barrier_arrive(empty, lane);
    }
}

// the leading consumer tells how many tiles it is well into; the other starts no tile before that
__device__ __forceinline__ void lead_tell(volatile int *lead, int tiles) {
    if (threadIdx.x % GROUP_THREADS == 0) {
        *lead = tiles;
    }
}

__device__ __forceinline__ void lead_wait(volatile int *lead, int tiles) {
    Patience patience;
    while (*lead < tiles) {
        patience.check();
    }
}

// Starts all products of a tile; the last of them still run. Returns the stage they read, to be released.
// Meanwhile: what to do when the first run
template <int PRODUCT, int BN, class Meanwhile>
__device__ __forceinline__ uint32_t multiply(float (&acc)[BN / 2], Ring<BN> &ring, int group, int steps,
                                             int tiles, int lead, volatile int *leading,
                                             const Meanwhile &meanwhile) {
    const int A_ACROSS = Traits<PRODUCT>::A_ACROSS, B_ACROSS = Traits<PRODUCT>::B_ACROSS;
    const int A_STEP = A_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16; // descriptors count 16 bytes
    const int B_STEP = B_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16;
    uint32_t last = 0;
    int told = min(lead, steps) - 1;
    if (group == 1 && lead > 0) {
        lead_wait(leading, tiles);
    }
    for (int step = 0; step < steps; step++) {
        barrier_wait(ring.full(), ring.parity);
        if (Traits<PRODUCT>::GATHERS) {
            fence_async_proxy();
        }
        uint64_t a = tile_descriptor(ring.a() + group * BLOCK_BYTES);
        uint64_t b = tile_descriptor(ring.b());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEP_K / 16; k++) {
            wgmma<A_ACROSS, B_ACROSS>(acc, a + k * A_STEP, b + k * B_STEP, step + k > 0);
        }
        wgmma_commit();
        if (step == 0) {
            meanwhile();
        } else {
            wgmma_wait<1>();
            release_stage(last);
        }
        if (group == 0 && step == told) {
            lead_tell(leading, tiles);
        }
        last = ring.empty();
        ring.advance();
    }
    return last;
}

template <int COUNT> __device__ __forceinline__ void multiply_done(float (&acc)[COUNT], uint32_t last) {
    wgmma_wait<0>();
    wgmma_results(acc);
    release_stage(last);
}

// ----------------------------------------------------------------------------
// consumers: epilogues

// 1 / (1 + 2^(-x log2 e)), two instructions of the special function unit: error 1e-6 or so
__device__ __forceinline__ float sigmoid(float x) {
    float power, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.44269504f * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
    return result;
}

// Where this thread's accumulators are: rows row and row + 8 of the tile; after the exchange, of each 32
// columns those from `column` on
struct Place {
    int row, column;
};

__device__ __forceinline__ Place thread_place(int group) {
    int thread = threadIdx.x % GROUP_THREADS;
    Place place = {group * GROUP_ROWS + thread / 32 * 16 + thread % 32 / 4, thread % 4 * 8};
    return place;
}

// H, and A = silu(G) U of the rounded H
template <int BN>
__device__ __forceinline__ void store_swiglu(const float (&acc)[BN / 2], const Arguments &args,
                                             const Tile &tile, Place place, floatX *h) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int64_t row = tile.m + place.row + 8 * half;
#pragma unroll
        for (int i = 0; i < BN / 64; i++) {
            uint32_t gate[4], up[4], a[4];
            rounded_pairs(gate, acc, i, half);
            rounded_pairs(up, acc, i + BN / 64, half);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float low = low_half(gate[j]), high = high_half(gate[j]);
                a[j] = pack2(low * sigmoid(low) * low_half(up[j]), high * sigmoid(high) * high_half(up[j]));
            }
            quad_transpose(gate);
            quad_transpose(up);
            quad_transpose(a);
            int f = tile.n + 32 * i + place.column;
            if (f < args.F) {
                store16(h + row * 2 * args.F + f, gate);
                store16(h + row * 2 * args.F + args.F + f, up);
                if (args.a_out != NULL) {
                    store16(args.a_out + row * args.F + f, a);
                }
            }
        }
    }
}

template <int BN>
__device__ __forceinline__ void store_rounded(const float (&acc)[BN / 2], const Arguments &args,
                                              const Tile &tile, Place place) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int64_t row = tile.m + place.row + 8 * half;
#pragma unroll
        for (int i = 0; i < BN / 32; i++) {
            uint32_t v[4];
            rounded_pairs(v, acc, i, half);
            quad_transpose(v);
            int n = tile.n + 32 * i + place.column;
            if (n < args.N) {
                store16(args.out + row * args.N + n, v);
            }
        }
    }
}

// one pair of columns: da = dA' and the pair of G, U become gate A, dG, dU; returns dA' A
__device__ __forceinline__ float swiglu_backward_pair(uint32_t &a, uint32_t &g, uint32_t &u,
                                                      const float (&da)[2], float gate) {
    float G[2] = {low_half(g), high_half(g)}, U[2] = {low_half(u), high_half(u)};
    float A[2], dG[2], dU[2], dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float s = sigmoid(G[i]), silu = G[i] * s, d = gate * da[i];
        A[i] = silu * U[i];
        dot += da[i] * A[i];
        dG[i] = d * U[i] * (s + silu * (1.0f - s));
        dU[i] = d * silu;
    }
    a = pack2(gate * A[0], gate * A[1]);
    g = pack2(dG[0], dG[1]);
    u = pack2(dU[0], dU[1]);
    return dot;
}

// dgate's part of the tile: the quad's lanes have one row's
template <int BN>
__device__ __forceinline__ void store_dgate(const float (&dot)[2], const Arguments &args, const Tile &tile,
                                            Place place) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = dot[half] + __shfl_xor_sync(0xffffffffu, dot[half], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (place.column == 0 && tile.n < args.N) {
            args.dgate_partial[(int64_t)(tile.m + place.row + 8 * half) * args.n_tiles + tile.n / BN] = sum;
        }
    }
}

// A consumer's slots of H. Piece p of a tile, columns 64 p .., is in slot p % SLOTS.
struct Slots {
    uint32_t memory;   // address of slot 0
    uint32_t landed;   // its barrier
    uint32_t parities; // bit s: of slot s' phase that is to come
    uint32_t pair;     // offset of the thread's first pair of columns, were it not for the swizzle
    const CUtensorMap *map;
    int row;     // in the map, of the consumer's first row in the chunk's first tile
    int barrier; // the consumer's own
    bool starts; // this thread starts the copies

    __device__ __forceinline__ uint32_t slot(int p) const {
        return memory + p % SLOTS * SLOT_BYTES;
    }
    __device__ __forceinline__ void wait(int p) {
        barrier_wait(landed + p % SLOTS * 8, parities >> (p % SLOTS) & 1);
        parities ^= 1u << (p % SLOTS);
    }
};

__device__ __forceinline__ Slots slots_new(const Arguments &args, uint32_t memory, uint32_t landed,
                                           int group) {
    Slots slots;
    int which, first = (int)h_row(args, &which);
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    uint32_t row = thread / 32 * 16 + thread % 32 / 4;
    slots.memory = memory + group * SLOTS * SLOT_BYTES;
    slots.landed = landed + group * SLOTS * 8;
    slots.parities = 0;
    slots.pair = row * 128 + (row % 8 << 4) + thread % 4 * 4;
    slots.map = &args.soon[which];
    slots.row = first + group * GROUP_ROWS;
    slots.barrier = 1 + group;
    slots.starts = thread == 0;
    return slots;
}

// The starting thread: G and U of piece p, if there is one, as soon as the slot's results have left
__device__ __forceinline__ void slots_load(const Slots &slots, const Arguments &args, const Tile &tile,
                                           int p) {
    int f = tile.n + p * SLOT_F;
    uint32_t landed = slots.landed + p % SLOTS * 8;
    if (f < args.F) {
        tma_wait_read();
        barrier_expect(landed, SLOT_BYTES);
        tma_load(slots.slot(p), slots.map, landed, f, 0, slots.row + tile.m);
        tma_load(slots.slot(p) + BLOCK_BYTES, slots.map, landed, f, 1, slots.row + tile.m);
    }
}

// dG and dU of piece p, that all of the consumer's threads have written
__device__ __forceinline__ void slots_store(const Slots &slots, const Tile &tile, int p) {
    fence_async_proxy();
    named_barrier(slots.barrier, GROUP_THREADS);
    if (slots.starts) {
        int f = tile.n + p * SLOT_F;
        tma_store(slots.map, slots.slot(p), f, 0, slots.row + tile.m);
        tma_store(slots.map, slots.slot(p) + BLOCK_BYTES, f, 1, slots.row + tile.m);
        tma_commit();
    }
}

// address of the thread's pair in group c of 8 columns, row + 8 half
__device__ __forceinline__ uint32_t pair_address(const Slots &slots, int p, int c, int half) {
    return ((slots.slot(p) + slots.pair) ^ (uint32_t)c << 4) + half * 8 * 128;
}

// The thread's pairs of G and U in columns 32 i .. 32 i + 31 of row + 8 half become dG and dU, v gate A
template <int COUNT>
__device__ __forceinline__ float swiglu_backward_pairs(uint32_t (&v)[4], const float (&acc)[COUNT],
                                                       const Slots &slots, int p, int i, int half,
                                                       float gate) {
    uint32_t g[4], u[4];
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t at = pair_address(slots, p, 4 * i + j, half);
        g[j] = shared_load(at);
        u[j] = shared_load(at + BLOCK_BYTES);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int first = (8 * p + 4 * i + j) * 4 + 2 * half;
        float da[2] = {acc[first], acc[first + 1]};
        dot += swiglu_backward_pair(v[j], g[j], u[j], da, gate);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t at = pair_address(slots, p, 4 * i + j, half);
        shared_store(at, g[j]);
        shared_store(at + BLOCK_BYTES, u[j]);
    }
    return dot;
}

// gate A of piece p goes to memory after dG and dU, so that the fence before theirs has no stores to wait for
template <int BN>
__device__ __forceinline__ void store_swiglu_backward(const float (&acc)[BN / 2], const Arguments &args,
                                                      const Tile &tile, Place place, Slots &slots,
                                                      const float (&gate)[2]) {
    const int PIECES_F = BN / SLOT_F;
    float dot[2] = {0.0f, 0.0f};
#pragma unroll
    for (int p = 0; p < PIECES_F; p++) {
        if (tile.n + p * SLOT_F >= args.F) {
            break;
        }
        uint32_t a[4][4]; // 32 columns of row and of row + 8, then the next 32
        slots.wait(p);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            dot[b % 2] += swiglu_backward_pairs(a[b], acc, slots, p, b / 2, b % 2, gate[b % 2]);
            quad_transpose(a[b]);
            if (b == 0 && p > 0 && p + 1 < PIECES_F && slots.starts) {
                slots_load(slots, args, tile, p + 1);
            }
        }
        slots_store(slots, tile, p);
#pragma unroll
        for (int b = 0; b < 4; b++) {
            int f = tile.n + p * SLOT_F + b / 2 * 32 + place.column;
            if (f < args.F) {
                store16(args.a_out + (int64_t)(tile.m + place.row + b % 2 * 8) * args.F + f, a[b]);
            }
        }
    }
    store_dgate<BN>(dot, args, tile, place);
}

enum { ADD_AT_ONCE = 8 }; // groups of 8 columns whose sums are loaded before the first is stored

// dW[m][n] += D
template <int BN>
__device__ __forceinline__ void add_straight(const float (&acc)[BN / 2], const Arguments &args,
                                             const Tile &tile, Place place) {
    int n = tile.n + place.column / 4; // the thread's first of 8 columns
    float *dw = args.dw + (int64_t)tile.expert * args.d * args.N + n;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int m = tile.m + place.row + 8 * half;
        float *row = dw + (int64_t)m * args.N;
#pragma unroll
        for (int begin = 0; begin < BN / 8; begin += ADD_AT_ONCE) {
            float2 sum[ADD_AT_ONCE];
#pragma unroll
            for (int j = 0; j < ADD_AT_ONCE; j++) {
                if (m < args.d && n + 8 * (begin + j) < args.N) {
                    sum[j] = *reinterpret_cast<const float2 *>(row + 8 * (begin + j));
                }
            }
#pragma unroll
            for (int j = 0; j < ADD_AT_ONCE; j++) {
                if (m < args.d && n + 8 * (begin + j) < args.N) {
                    sum[j].x += acc[4 * (begin + j) + 2 * half];
                    sum[j].y += acc[4 * (begin + j) + 2 * half + 1];
                    *reinterpret_cast<float2 *>(row + 8 * (begin + j)) = sum[j];
                }
            }
        }
    }
}

// dW[n][m] += D
template <int BN>
__device__ __forceinline__ void add_transposed(const float (&acc)[BN / 2], const Arguments &args,
                                               const Tile &tile, Place place) {
    int m = tile.m + place.row, n = tile.n + place.column / 4;
    float *dw = args.dw + ((int64_t)tile.expert * args.N + n) * args.d + m;
#pragma unroll
    for (int begin = 0; begin < BN / 8; begin += ADD_AT_ONCE / 2) {
        float sum[ADD_AT_ONCE / 2][4];
#pragma unroll
        for (int j = 0; j < ADD_AT_ONCE / 2; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (m + c / 2 * 8 < args.d && n + 8 * (begin + j) < args.N) {
                    sum[j][c] = dw[(int64_t)(8 * (begin + j) + c % 2) * args.d + c / 2 * 8];
                }
            }
        }
#pragma unroll
        for (int j = 0; j < ADD_AT_ONCE / 2; j++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (m + c / 2 * 8 < args.d && n + 8 * (begin + j) < args.N) {
                    dw[(int64_t)(8 * (begin + j) + c % 2) * args.d + c / 2 * 8] =
                        sum[j][c] + acc[4 * (begin + j) + c];
                }
            }
        }
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void consume(const Arguments &args, Plan plan, Ring<BN> ring, int group,
                                        uint32_t slots_memory, volatile int *leading) {
    const bool H_IN_SLOTS = Traits<PRODUCT>::H_IN_SLOTS;
    floatX *h = PRODUCT == UP_FORWARD ? h_address(args) : NULL;
    Place place = thread_place(group);
    Slots slots;
    if (H_IN_SLOTS) {
        slots = slots_new(args, slots_memory, ring.landed(), group);
    }
    Tile tile, next;
    next.expert = 0;
    int item = blockIdx.x / CLUSTER, tiles = 0;
    bool more = find_tile<PRODUCT, BN>(next, item, plan, args);
    while (more) {
        float acc[BN / 2], gate[2];
        tile = next;
        bool mine = group * GROUP_ROWS < tile.rows;
        if (PRODUCT == DOWN_BACKWARD && mine) {
            const float *gates = args.chunk.gate_of_row + args.chunk.first + tile.m + place.row;
            gate[0] = gates[0];
            gate[1] = gates[8];
        }
        auto load_first = [&] {
            if (H_IN_SLOTS && mine && slots.starts) {
                for (int p = 0; p < SLOTS; p++) {
                    slots_load(slots, args, tile, p);
                }
            }
        };
        uint32_t last =
            multiply<PRODUCT>(acc, ring, group, tile.steps, ++tiles, args.lead, leading, load_first);
        item += gridDim.x / CLUSTER;
        more = find_tile<PRODUCT, BN>(next, item, plan, args);
        multiply_done(acc, last);
        if (!mine) {
            continue;
        }
        if (PRODUCT == UP_FORWARD) {
            store_swiglu<BN>(acc, args, tile, place, h);
        } else if (PRODUCT == DOWN_BACKWARD) {
            store_swiglu_backward<BN>(acc, args, tile, place, slots, gate);
        } else if (PRODUCT == DOWN_WGRAD) {
            add_straight<BN>(acc, args, tile, place);
        } else if (PRODUCT == UP_WGRAD) {
            add_transposed<BN>(acc, args, tile, place);
        } else {
            store_rounded<BN>(acc, args, tile, place);
        }
    }
    if (H_IN_SLOTS && slots.starts) {
        tma_wait_written(); // shared memory must outlive the copies
    }
}

#endif

// ----------------------------------------------------------------------------
// the kernel

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GROUPED_CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define GROUPED_CLUSTER_DIMS // compiled for an older GPU as well: no clusters there
#endif

template <int PRODUCT, int BN>
static __global__ void GROUPED_CLUSTER_DIMS __launch_bounds__(BLOCK_THREADS, 1)
    grouped_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (PRODUCT == UP_FORWARD && args.a_out == NULL && *args.h.place >= 0) {
        return; // backward asks for H again, and it is there
    }
    uint32_t address = shared_address(shared_memory());
    uint32_t base = (address + 1023) & ~1023u;
    unsigned char *memory = shared_memory() + (base - address);
    const int stages = Traits<PRODUCT>::H_IN_SLOTS ? args.stages : (int)Stages<BN>::MOST;
    Ring<BN> ring(base + AllSlots<PRODUCT>::BYTES, stages);
    unsigned char *after = memory + AllSlots<PRODUCT>::BYTES + stages * Stages<BN>::BYTES;
    volatile int *leading = reinterpret_cast<volatile int *>(after + stages * 16);
    int *starts = reinterpret_cast<int *>(after + Stages<BN>::BARRIERS);
    Plan plan = {starts, starts + args.chunk.experts + 1};
    if (threadIdx.x == 0) {
        init_barriers<PRODUCT>(ring);
        *leading = 0;
    }
    make_plan<Traits<PRODUCT>::WGRAD>(plan, args);
    __syncthreads();
    cluster_sync(); // the other block's barriers are there
    // every warp's role must look the same to all its lanes
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP_THREADS, 0);
    if (group == 0) {
        give_registers<PRODUCER_REGISTERS>();
        if (Traits<PRODUCT>::GATHERS) {
            produce_by_token<PRODUCT>(args, plan, ring);
        } else if (threadIdx.x == 0) {
            produce_by_tma<PRODUCT>(args, plan, ring);
        }
        __syncwarp();
    } else {
        take_registers<CONSUMER_REGISTERS>();
        consume<PRODUCT>(args, plan, ring, group - 1, base, leading);
    }
    cluster_sync(); // the other block may still send here
#else
    (void)args;
    __trap(); // a build without sm_90a has no such kernel
#endif
}

#undef GROUPED_CLUSTER_DIMS

// ----------------------------------------------------------------------------
// host: tiles and launches

// a Hopper device, and code for it in this build (not PTX of an older target that the driver has translated)
static inline bool available(void) {
    cudaFuncAttributes code;
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
        return false;
    }
    CUDA_CHECK(cudaFuncGetAttributes(&code, grouped_kernel<DOWN_FORWARD, 256>));
    return code.ptxVersion >= 90;
}

// Narrow tiles load more a product: about so much longer for the same work, in 1/100
static inline int tile_cost(int BN) {
    return BN * (BN == 256 ? 100 : BN == 192 ? 104 : 116);
}

// BN for a product over rows, with `columns` of N in a tile of 256
static inline int row_tile(int N, int columns) {
    int best = 256;
    for (int BN = 192; BN >= 128; BN -= 64) {
        if (ceil_div(N, columns * BN / 256) * tile_cost(BN) <
            ceil_div(N, columns * best / 256) * tile_cost(best)) {
            best = BN;
        }
    }
    return best;
}

// BN for a weight gradient [E][M, N]: its tiles are few, so the last round of blocks counts
static inline int64_t wgrad_cost(int E, int M, int N, int BN) {
    int m_tiles = ceil_div<int>(M, TILE_M), n_tiles = ceil_div(N, BN);
    int64_t items = m_tiles / CLUSTER * n_tiles + m_tiles % CLUSTER * ceil_div<int>(n_tiles, CLUSTER);
    return ceil_div<int64_t>(E * items, num_sms() / CLUSTER) * tile_cost(BN);
}

static inline int wgrad_tile(int E, int M, int N) {
    int best = 256;
    for (int BN = 192; BN >= 128; BN -= 64) {
        if (wgrad_cost(E, M, N, BN) < wgrad_cost(E, M, N, best)) {
            best = BN;
        }
    }
    return best;
}

static inline Arguments arguments(RowChunk chunk, int d, int F, int N, int k) {
    Arguments args;
    memset(&args, 0, sizeof(args));
    if (chunk.experts > MOST_EXPERTS) {
        die("%d experts: the Hopper kernels take at most %d\n  ---> use --kernels portable", chunk.experts,
            (int)MOST_EXPERTS);
    }
    args.chunk = chunk;
    args.d = d;
    args.F = F;
    args.N = N;
    args.steps = ceil_div<int>(k, STEP_K);
    args.m_tiles = ceil_div<int>(d, TILE_M);
    args.lead = GROUPED_LEAD;
    args.prefetch = GROUPED_PREFETCH;
    return args;
}

template <int PRODUCT, int BN> static void start_tiles(Arguments args, cudaStream_t stream) {
    args.n_tiles = ceil_div<int>(args.N, Columns<PRODUCT, BN>::N);
    args.stages = ring_stages<PRODUCT, BN>(args.chunk.experts);
    args.lead = min(args.lead, args.stages - 2); // a stage at least is being filled
    int blocks = num_sms() / CLUSTER * CLUSTER;
    size_t shared = other_bytes<PRODUCT, BN>(args.chunk.experts) + args.stages * Stages<BN>::BYTES;
    void (*kernel)(Arguments) = grouped_kernel<PRODUCT, BN>;
    launch(kernel, blocks, BLOCK_THREADS, shared, stream, args);
}

template <int PRODUCT> static void start(Arguments args, int BN, cudaStream_t stream) {
    if (BN == 256) {
        start_tiles<PRODUCT, 256>(args, stream);
    } else if (BN == 192) {
        start_tiles<PRODUCT, 192>(args, stream);
    } else {
        start_tiles<PRODUCT, 128>(args, stream);
    }
}

// H as a TMA operand: in the store, whose length is not known here, and in scratch
static inline void h_maps(CUtensorMap maps[2], ChunkH h, int F, int rows, int box_rows) {
    const int64_t any_length = 0x7fffffff;
    maps[0] = tensor_map(h.store != NULL ? h.store : h.scratch, 2 * F, any_length, 0, box_rows);
    maps[1] = h.scratch != NULL ? tensor_map(h.scratch, 2 * F, rows, 0, box_rows) : maps[0];
}

// H as an epilogue operand, [rows][2][F]: a box ends where G ends
static inline void h_epilogue_maps(CUtensorMap maps[2], ChunkH h, int F, int rows) {
    const int64_t any_length = 0x7fffffff;
    maps[0] = tensor_map(h.store != NULL ? h.store : h.scratch, F, 2, any_length, 1, GROUP_ROWS);
    maps[1] = h.scratch != NULL ? tensor_map(h.scratch, F, 2, rows, 1, GROUP_ROWS) : maps[0];
}

// to be prefetched only: two bf16 stand for an fp32 number
static inline CUtensorMap gradient_map(const float *dw, int64_t columns, int64_t rows) {
    return tensor_map(dw, 2 * columns, rows, 0, 64);
}

enum { BOX_ACROSS = 64 }; // k of a box of an operand stored across k

static inline void grouped_up_forward(floatX *a, ChunkH h, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, d);
    int BN = row_tile(F, 128);
    args.h = h;
    args.rows = x;
    args.a_out = a;
    args.b[0] = tensor_map(w_gate_up, d, F, 2 * chunk.experts, BN / 2); // a sheet: gate's or up's rows
    start<UP_FORWARD>(args, BN, stream);
}

static inline void grouped_down_forward(floatX *y, const floatX *a, const floatX *w_down, RowChunk chunk,
                                        int d, int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, d, F);
    int BN = row_tile(d, 256);
    args.out = y;
    args.a[0] = tensor_map(a, F, chunk.rows, 0, GROUP_ROWS);
    args.b[0] = tensor_map(w_down, F, d, chunk.experts, BN / 2);
    start<DOWN_FORWARD>(args, BN, stream);
}

static inline int grouped_dgate_tiles(int F) {
    return ceil_div(F, row_tile(F, 256));
}

static inline void grouped_down_backward(floatX *a, ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, d);
    args.h = h;
    args.rows = dy;
    args.a_out = a;
    args.dgate_partial = dgate_partial;
    h_epilogue_maps(args.soon, h, F, chunk.rows);
    args.b[0] = tensor_map(w_down, F, d, chunk.experts, BOX_ACROSS);
    start<DOWN_BACKWARD>(args, row_tile(F, 256), stream);
}

static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, d, 2 * F);
    args.h = h;
    args.out = dx;
    h_maps(args.a, h, F, chunk.rows, GROUP_ROWS);
    args.b[0] = tensor_map(w_gate_up, d, 2 * F, chunk.experts, BOX_ACROSS);
    start<UP_BACKWARD>(args, row_tile(d, 256), stream);
}

static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, const floatX *a, RowChunk chunk,
                                      int d, int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, 0);
    args.rows = dy;
    args.dw = dw_down;
    args.soon[0] = gradient_map(dw_down, F, (int64_t)chunk.experts * d);
    args.b[0] = tensor_map(a, F, chunk.rows, 0, BOX_ACROSS);
    start<DOWN_WGRAD>(args, wgrad_tile(chunk.experts, d, F), stream);
}

static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, 2 * F, 0);
    args.h = h;
    args.rows = x;
    args.dw = dw_gate_up;
    args.soon[0] = gradient_map(dw_gate_up, d, (int64_t)chunk.experts * 2 * F);
    h_maps(args.b, h, F, chunk.rows, BOX_ACROSS);
    start<UP_WGRAD>(args, wgrad_tile(chunk.experts, d, 2 * F), stream);
}

} // namespace hopper

#endif
#endif
