/*
The experts' products on Hopper (sm_90a), bf16: the functions of grouped_gemm.cuh, same names and arguments,
in namespace hopper. One kernel template does all six; they differ in where the operands come from and in
what becomes of the accumulators:

    product                                   M x N, k         A            B          epilogue
    up_forward     [G | U] = X' W_gate_up^T   rows x 2F, d     X by token   W_gate_up  G, U; gate A
    down_forward   Y = (gate A) W_down^T      rows x d, F      gate A       W_down     Y
    down_backward  dA' = dY' W_down           rows x F, d      dY by token  W_down     SwiGLU backward
    up_backward    dX' = dH W_gate_up         rows x d, 2F     dH           W_gate_up  dX'
    down_wgrad     dW_down += dY'^T (gate A)  d x F, rows      dY by token  gate A     fp32 +=
    up_wgrad       dW_gate_up^T += X'^T dH    d x 2F, rows     X by token   dH         fp32 +=, transposed

where dH = [dG | dU]. SwiGLU, with silu(g) = g s, s = sigmoid(g), of the rounded G and U:
    A = U silu(G);  dgate's part = sum over the tile of dA' A
    dG = gate dA' U s (1 + G (1 - s));  dU = gate dA' silu(G)

How the kernel works. As many blocks as multiprocessors walk through the tiles of D, 128 x BN (BN = 256, 192
or 128: whichever wastes least). A block is three warpgroups. One is the producer: it fills a ring of stages
in shared memory, each a step of 64 in k. B comes by TMA; A by TMA where its rows lie together, else each
thread copies 16-byte pieces (cp.async) from the rows' tokens: no gathered copy ever exists. The other two are
consumers, 64 rows of the tile each: wgmma from the ring into registers.

The epilogue is hidden. With d = 768 a tile is only 12 steps long, and what follows, SwiGLU and the stores,
would take as long again. So a consumer keeps a tile's results (Held: rounded pairs in half the registers;
down_backward's sums as they are) and starts the next tile; while the products of its steps run, which need
nobody, it lets a part of 32 columns of the last tile leave at every step or two:

    tensor cores   | tile 1: step 0 | 1 | 2 | ... | 11 | tile 2: step 0 | 1      | 2      | ...
    the consumer   |                                   | part 0 of 1    | part 1 | part 2 | ...

Results leave by way of shared memory, from where TMA takes them: up_forward's warp by warp, 16 bytes a lane
(paired_rows_map's order of B's rows makes them neighbours), the others' (stmatrix) when a consumer's four
warps have met. Weight gradients, whose tiles are long, leave at once, and TMA adds them to what is in memory
(or stores them, where there is nothing yet): one addition an element and launch, so there is no order to depend
on.

Two blocks make a cluster and, where possible, take two tiles of one column of tiles: they need the same B, so
each loads half of it, for both. Where an expert has an odd number of row tiles, the last is shared the other
way: two tiles side by side, each block loads its own B. A stage is free when both blocks' consumers are done.
up_forward's blocks stand alone where W is small: its epilogue is long, and four consumers that wait for each
other lose more than loading all of B costs (1 to 4 %). Where W is big, L2 is asked for less so (1 to 7 %).

By count shared memory sets the pace. It gives 128 bytes a cycle; at the tensor cores' full rate wgmma reads
80 (all of B for every 64 rows of A), the ring's copies write 48, and up_forward's results, in and out again,
are 16.

    full[stage]    producer's arrivals and TMA's bytes: the stage may be read
    empty[stage]   8 consumer warps of each block of the cluster: the stage may be written

down_backward moves 8 bytes an element of dA', more than its products take time for. Its H goes through
shared memory, 64 rows x 64 columns of G and of U at a time, a slot: TMA brings it, the consumer computes in
place, TMA takes dG and dU away. Each consumer has two slots and asks for the next piece, of this tile or the
next, as soon as a slot's results have left.

    landed[consumer][slot]   TMA's bytes: the slot may be read

Operands that are stored across k (W in the backward products; both in the weight gradients, whose k are rows)
are read as they are: wgmma transposes them (hopper.cuh). up_forward's tile holds BN/2 gate columns and the up
columns of the same f, so that a thread has both. Rows: segments of the experts are multiples of 64 rows; half
tiles that belong to nobody are not stored. Edges of d and F, multiples of 8, are zeros in shared memory and
are not stored.

Deterministic: each element of an output has one owner, who adds in a fixed order; tiles are dealt out in a
fixed order. Shapes: grouped_gemm.cuh. place of ChunkH: a multiple of 3F. Errors: more than 2048 experts are
refused. Nothing is allocated, the host does not wait; tensor maps are kernel arguments, so a CUDA graph may
capture the launches.
*/
#ifndef GROUPED_GEMM_HOPPER_CUH
#define GROUPED_GEMM_HOPPER_CUH

#include "llmc/gpu/row_chunk.cuh"

#ifndef PRECISION_FP32
#include "llmc/gpu/hopper.cuh"
#include <type_traits>
// defines: std::conditional

namespace hopper {

enum {
    UP_FORWARD,     // a block alone
    UP_FORWARD_TWO, // two that share B
    DOWN_FORWARD,
    DOWN_BACKWARD,
    UP_BACKWARD,
    DOWN_WGRAD,
    UP_WGRAD
};

enum {
    TILE_M = 128,
    STEP_K = 64,
    GROUP_ROWS = 64, // rows of a consumer
    BLOCK_THREADS = 3 * GROUP_THREADS,
    CONSUMER_WARPS = 8,
    MOST_EXPERTS = 2048,
};

template <int PRODUCT> struct Traits {
    enum {
        UP = PRODUCT == UP_FORWARD || PRODUCT == UP_FORWARD_TWO,
        WGRAD = PRODUCT == DOWN_WGRAD || PRODUCT == UP_WGRAD,
        GATHERS = WGRAD || UP || PRODUCT == DOWN_BACKWARD, // A, by token
        A_ACROSS = WGRAD,                                  // stored across k
        B_ACROSS = !UP && PRODUCT != DOWN_FORWARD,
        B_WEIGHTS = !WGRAD,                         // B has a third dimension, the expert
        H_IN_SLOTS = PRODUCT == DOWN_BACKWARD,      // the epilogue's H
        CLUSTER = PRODUCT == UP_FORWARD ? 1 : 2,    // blocks
        PRODUCER_REGISTERS = WGRAD || UP ? 56 : 40, // of 3 x 168 that the threads have at the start
        CONSUMER_REGISTERS = WGRAD || UP ? 224 : 232,
    };
};

// columns of D's tile as the product counts them; up_forward counts f, its tile has gate and up of each
template <int PRODUCT, int BN> struct Columns {
    enum { N = Traits<PRODUCT>::UP ? BN / 2 : BN };
};

struct Arguments {
    CUtensorMap a[2]; // where rows lie together; of two, the second is H in scratch
    CUtensorMap b[2];
    CUtensorMap h_out[2]; // what the epilogue reads and writes, or writes: H [rows][3][F]
    CUtensorMap out;      // what it writes: Y, dX'; or adds to: dW [E][.][.], fp32
    RowChunk chunk;
    ChunkH h;
    const floatX *rows; // gathered: X or dY [N, d]
    int again;          // up_forward only if H has no place
    float *dgate_partial;
    int d, F;
    int N;                // columns as Columns counts them
    int steps;            // of 64 in k; weight gradients: an expert's own
    int m_tiles, n_tiles; // tiles of D; m_tiles of weight gradients only
    int stages;           // of the ring
};

// An item is what a cluster takes at a time, a tile for each of its blocks: how many an expert has. First come
// tiles of one column; in the rows of tiles that are left over, neighbours
template <int PRODUCT> static __host__ __device__ __forceinline__ int items_of(int m_tiles, int n_tiles) {
    const int CLUSTER = Traits<PRODUCT>::CLUSTER;
    return m_tiles / CLUSTER * n_tiles + m_tiles % CLUSTER * ceil_div<int>(n_tiles, CLUSTER);
}

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
        BARRIERS = 256,         // bytes: full, empty; from LANDED on, the slots'
        LANDED = 192,
    };
};

enum {
    SLOTS = 2,   // of each consumer
    SLOT_F = 64, // columns of G and U in a slot
    SLOT_BYTES = 2 * GROUP_ROWS * SLOT_F * 2,
    PART_COLUMNS = 32, // of results that leave at a time
    PART_BYTES = GROUP_ROWS * PART_COLUMNS * 2,
    PART_PLACES = 3, // of each consumer: the last three of Y or dX'
    WARP_ROWS = 16,  // of up_forward's results that a warp lets leave: G, U and gate A
    WARP_PART_BYTES = WARP_ROWS * 3 * PART_COLUMNS * 2,
    ADD_BYTES = GROUP_ROWS * PART_COLUMNS * 4,
    ADD_PLACES = 2,           // the last two of dW
    MOST_SHARED = 227 * 1024, // of a block
};

// what a consumer's epilogue has of it
template <int PRODUCT> struct Epilogue {
    enum {
        BYTES = Traits<PRODUCT>::WGRAD        ? ADD_PLACES * ADD_BYTES
                : Traits<PRODUCT>::H_IN_SLOTS ? SLOTS * SLOT_BYTES
                : Traits<PRODUCT>::UP         ? GROUP_ROWS / WARP_ROWS * WARP_PART_BYTES
                                              : PART_PLACES * PART_BYTES
    };
};

// all but the ring
template <int PRODUCT, int BN> static inline int other_bytes(int experts) {
    int align = 1024; // shared memory may begin anywhere
    return align + 2 * Epilogue<PRODUCT>::BYTES + Stages<BN>::BARRIERS + 2 * (experts + 1) * (int)sizeof(int);
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
        barrier_init(ring.empty(), Traits<PRODUCT>::CLUSTER * CONSUMER_WARPS);
        ring.advance();
    }
    for (int slot = 0; Traits<PRODUCT>::H_IN_SLOTS && slot < 2 * SLOTS; slot++) {
        barrier_init(ring.landed() + slot * 8, 1);
    }
    barrier_init_done();
}

// ----------------------------------------------------------------------------
// the plan: which tiles there are, and whose

// in shared memory
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

template <int PRODUCT> __device__ __forceinline__ int plan_items(int rows, const Arguments &args) {
    int m_tiles = Traits<PRODUCT>::WGRAD ? args.m_tiles : ceil_div<int>(rows, TILE_M);
    return rows > 0 ? items_of<PRODUCT>(m_tiles, args.n_tiles) : 0;
}

// all threads of the block
template <int PRODUCT> __device__ __forceinline__ void make_plan(Plan plan, const Arguments &args) {
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
        int items = plan_items<PRODUCT>(rows, args);
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
    const int CLUSTER = Traits<PRODUCT>::CLUSTER;
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

// where the next tile is looked for
struct Walk {
    Tile next; // while `more`
    int item;
    bool more;
};

template <int PRODUCT, int BN> __device__ __forceinline__ Walk walk_begin(Plan plan, const Arguments &args) {
    Walk walk;
    walk.next.expert = 0;
    walk.item = blockIdx.x / Traits<PRODUCT>::CLUSTER;
    walk.more = find_tile<PRODUCT, BN>(walk.next, walk.item, plan, args);
    return walk;
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void walk_on(Walk &walk, Plan plan, const Arguments &args) {
    walk.item += gridDim.x / Traits<PRODUCT>::CLUSTER;
    walk.more = find_tile<PRODUCT, BN>(walk.next, walk.item, plan, args);
}

// ----------------------------------------------------------------------------
// producer: B, and A where its rows lie together, by TMA (one thread)

// H's place, in rows; *which: the tensor map
__device__ __forceinline__ int64_t h_row(const Arguments &args, int *which) {
    int64_t place = *args.h.place;
    *which = place < 0;
    return place < 0 ? 0 : place / (3 * args.F);
}

// a box of B, to this block or to both; row: of up_forward's paired rows a multiple of 8
template <int PRODUCT>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap *map, uint32_t full, bool both,
                                         int column, int row, int sheet) {
    const uint16_t blocks = 3;
    if (Traits<PRODUCT>::UP) {
        if (both) {
            tma_multicast_paired(to, map, full, blocks, column, row / 8, sheet);
        } else {
            tma_load_paired(to, map, full, column, row / 8, sheet);
        }
    } else if (Traits<PRODUCT>::B_WEIGHTS) {
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
        int row = Traits<PRODUCT>::UP ? tile.n : tile.n + piece * (BN / 2);
        int sheet = Traits<PRODUCT>::UP ? 2 * tile.expert + piece : tile.expert;
        load_box<PRODUCT>(to, map, ring.full(), both, first_k, row, sheet);
    } else {
        uint32_t to = ring.b() + piece * BLOCK_BYTES;
        load_box<PRODUCT>(to, map, ring.full(), both, tile.n + piece * 64, first_k, tile.expert);
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void load_b(const CUtensorMap *map, Ring<BN> ring, const Tile &tile, int first_k) {
    const int PIECES_B = Traits<PRODUCT>::B_ACROSS ? BN / 64 : 2;
    bool both = Traits<PRODUCT>::CLUSTER == 2 && tile.coupled;
    for (int piece = 0; piece < PIECES_B; piece++) {
        if (!both || (piece >= (PIECES_B + 1) / 2) == (int)cluster_rank()) {
            load_piece_b<PRODUCT>(map, ring, tile, first_k, piece, both);
        }
    }
}

template <int PRODUCT, int BN>
__device__ __forceinline__ void produce_by_tma(const Arguments &args, Plan plan, Ring<BN> ring) {
    int which, h_first = (int)h_row(args, &which);
    for (Walk walk = walk_begin<PRODUCT, BN>(plan, args); walk.more; walk_on<PRODUCT, BN>(walk, plan, args)) {
        const Tile &tile = walk.next;
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

// A warp's threads copy rows 4 warp + (0 .. 3) + 16 i: one token a lane. Fetched a tile ahead, or the ring
// would run dry meanwhile
__device__ __forceinline__ int row_token(const Arguments &args, const Tile &tile) {
    int thread = threadIdx.x % GROUP_THREADS, lane = thread % 32;
    int row = thread / 32 * 4 + lane % 4 + lane / 4 * 16;
    return row < tile.rows ? args.chunk.token_of_row[args.chunk.first + tile.m + row] : -1;
}

__device__ __forceinline__ void gather_begin(RowGather &gather, const Arguments &args, int token) {
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    uint32_t row = thread / 8;
    gather.rows = reinterpret_cast<const uint4 *>(args.rows);
    gather.pieces = (uint32_t)args.d / 8;
    gather.piece = thread % 8;
    gather.to = row * 128 + ((gather.piece ^ (row % 8)) << 4);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int its = __shfl_sync(0xffffffffu, token, 4 * i + (int)row % 4);
        gather.source[i] = its < 0 ? (uint32_t)NO_ROW : (uint32_t)its * gather.pieces;
    }
}

// A copy's address is in use until the copy has left its queue, so each should have registers of its own (where
// the compiler finds them): with one pair for all, eight waits in a row took as long as the step's products
__device__ __forceinline__ void gather_step(const RowGather &gather, uint32_t a, int step) {
    uint32_t piece = gather.piece + (uint32_t)step * (STEP_K / 8);
    bool inside = piece < gather.pieces;
    const uint4 *from[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        bool valid = inside && gather.source[i] != NO_ROW;
        from[i] = gather.rows + (valid ? gather.source[i] + piece : 0);
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        copy16(a + gather.to + i * 16 * 128, from[i], inside && gather.source[i] != NO_ROW);
    }
}

// Rows of D are columns of X, tokens are in k. Thread 16 k + p copies piece p of tokens k, k + 8, ... of 64;
// the tokens of the next step are on their way meanwhile (lane l has those of l and l + 32).
struct ColumnGather {
    const uint4 *column; // the thread's piece of token 0
    uint32_t pieces;     // of a row
    bool inside;
    int next[2]; // tokens
    uint32_t to;
};

// those of the step that begins at a row of the chunk
__device__ __forceinline__ void gather_tokens(ColumnGather &gather, const Arguments &args, int row) {
    const int *tokens = args.chunk.token_of_row + args.chunk.first + row + threadIdx.x % 32;
    gather.next[0] = tokens[0];
    gather.next[1] = tokens[32];
}

__device__ __forceinline__ void gather_begin(ColumnGather &gather, const Arguments &args, const Tile &tile) {
    uint32_t thread = threadIdx.x % GROUP_THREADS;
    uint32_t k = thread / 16, place = thread % 16;
    uint32_t piece = (uint32_t)tile.m / 8 + place;
    gather.pieces = (uint32_t)args.d / 8;
    gather.inside = piece < gather.pieces;
    gather.column = reinterpret_cast<const uint4 *>(args.rows) + (gather.inside ? piece : 0);
    gather.to = place / 8 * BLOCK_BYTES + k * 128 + ((place % 8 ^ k) << 4);
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

template <int PRODUCT, int BN>
__device__ __forceinline__ void produce_by_token(const Arguments &args, Plan plan, Ring<BN> ring) {
    const bool WGRAD = Traits<PRODUCT>::WGRAD;
    // warps that ask for B in turns, which makes one late: 1 % (blocks alone, or with tokens to fetch: nothing)
    const int ISSUERS = Traits<PRODUCT>::CLUSTER == 2 && !WGRAD ? GROUP_THREADS / 32 : 1;
    int which = 0, h_first = WGRAD ? (int)h_row(args, &which) : 0;
    const CUtensorMap *map = &args.b[which];
    RowGather by_row;
    ColumnGather by_column;
    int token = -1;
    // of a tile's rows, or of its first step; the tile is found once more later: registers are few here
    auto fetch_tokens = [&](int item, int expert) {
        Tile tile;
        tile.expert = expert;
        if (find_tile<PRODUCT, BN>(tile, item, plan, args)) {
            if (WGRAD) {
                gather_tokens(by_column, args, tile.row);
            } else {
                token = row_token(args, tile);
            }
        }
    };
    Tile tile;
    tile.expert = 0;
    const int CLUSTER = Traits<PRODUCT>::CLUSTER;
    int item = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    fetch_tokens(item, 0);
    for (; find_tile<PRODUCT, BN>(tile, item, plan, args); item += stride) {
        int first_k = WGRAD ? h_first + tile.row : 0;
        if (WGRAD) {
            gather_begin(by_column, args, tile);
        } else {
            gather_begin(by_row, args, token);
            fetch_tokens(item + stride, tile.expert);
        }
        for (int step = 0; step < tile.steps; step++) {
            barrier_wait(ring.empty(), ring.parity ^ 1);
            if ((int)threadIdx.x == ring.stage % ISSUERS * 32) {
                barrier_expect(ring.full(), Stages<BN>::B_BYTES);
                load_b<PRODUCT>(map, ring, tile, first_k + step * STEP_K);
            }
            if (WGRAD) {
                gather_step(by_column, ring.a());
            } else {
                gather_step(by_row, ring.a(), step);
            }
            barrier_arrive_after_copies(ring.full());
            if (WGRAD) { // while the copies are on their way
                if (step + 1 < tile.steps) {
                    gather_tokens(by_column, args, tile.row + (step + 1) * STEP_K);
                } else {
                    fetch_tokens(item + stride, tile.expert);
                }
            }
            ring.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: the product

template <int CLUSTER> __device__ __forceinline__ void release_stage(uint32_t empty) {
    uint32_t lane = threadIdx.x % 32;
    if (lane >= CLUSTER) {
        return;
    }
    if (CLUSTER == 1) {
        barrier_arrive(empty);
    } else {
        barrier_arrive(empty, lane);
    }
}

// a consumer at its products
template <int PRODUCT, int BN> struct Multiplier {
    Ring<BN> ring;
    int group;
    uint32_t last; // the stage whose products may still run

    // starts the products of a step and waits for those of the step before
    __device__ __forceinline__ void step(float (&acc)[BN / 2], int step) {
        const int A_ACROSS = Traits<PRODUCT>::A_ACROSS, B_ACROSS = Traits<PRODUCT>::B_ACROSS;
        const int A_STEP = A_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16; // descriptors count 16 bytes
        const int B_STEP = B_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16;
        barrier_wait(ring.full(), ring.parity);
        if (Traits<PRODUCT>::GATHERS) {
            fence_async_proxy();
        }
        uint64_t a = tile_descriptor(ring.a() + group * BLOCK_BYTES);
        uint64_t b = tile_descriptor(ring.b());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEP_K / 16; k++) {
            wgmma<A_ACROSS, B_ACROSS>(acc, a + k * A_STEP, b + k * B_STEP, k > 0 || step > 0);
        }
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            release_stage<Traits<PRODUCT>::CLUSTER>(last);
        }
        last = ring.empty();
        ring.advance();
    }

    // All products of a tile; the last of them still run. meanwhile(0) .. meanwhile(PARTS - 1): what to do
    // while they run, spread evenly over the steps: of steps without a part that follow each other, the
    // consumer would take more than the ring brings in time. Parts are unrolled, to find their registers at
    // compile time
    template <int PARTS, class Meanwhile>
    __device__ __forceinline__ void tile(float (&acc)[BN / 2], int steps, const Meanwhile &meanwhile) {
        int i = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll 1
            for (; i < steps && i <= part * steps / PARTS; i++) {
                step(acc, i);
            }
            meanwhile(part);
        }
        for (; i < steps; i++) {
            step(acc, i);
        }
    }

    __device__ __forceinline__ void done(float (&acc)[BN / 2]) const {
        wgmma_wait<0>();
        wgmma_results(acc);
        release_stage<Traits<PRODUCT>::CLUSTER>(last);
    }
};

// ----------------------------------------------------------------------------
// consumers: epilogues

// 1 / (1 + 2^(-x log2 e)), two instructions of the special function unit: error 1e-6 or so
__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal(1.0f + power_of_2(-1.44269504f * x));
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

// the gates of this thread's rows of a tile
__device__ __forceinline__ void load_gates(float (&gate)[2], const Arguments &args, const Tile &tile,
                                           Place place) {
    const float *gates = args.chunk.gate_of_row + args.chunk.first + tile.m + place.row;
    gate[0] = gates[0];
    gate[1] = gates[8];
}

// A tile's results until they leave, during the next tile's products, in BN / 32 parts: rounded pairs, or
// down_backward's sums
template <int PRODUCT, int BN> struct Held {
    enum { PARTS = BN / PART_COLUMNS };
    uint32_t pairs[BN / 4];
    float gate[2]; // up_forward's, of rows row and row + 8
    Tile tile;
    bool any; // this consumer has a share in the tile

    __device__ __forceinline__ void take(const float (&acc)[BN / 2]) {
#pragma unroll
        for (int i = 0; i < BN / 4; i++) {
            pairs[i] = pack2(acc[2 * i], acc[2 * i + 1]);
        }
    }
    // columns 32 i .. 32 i + 31 of row + 8 half
    __device__ __forceinline__ void get(uint32_t (&v)[4], int i, int half) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = pairs[(4 * i + j) * 2 + half];
        }
    }
    // of up_forward's G (u 0) or U (1), whose columns are dealt out in pairs: the thread's 8 neighbours of
    // columns 32 i .. 32 i + 31
    __device__ __forceinline__ void get_paired(uint32_t (&v)[4], int u, int i, int half) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = pairs[(BN / 16 * u + BN / 64 * j + i) * 2 + half];
        }
    }
};

template <int BN> struct Held<DOWN_BACKWARD, BN> {
    enum { PARTS = BN / PART_COLUMNS };
    float sums[BN / 2];
    float gate[2], dot[2]; // of rows row and row + 8
    Tile tile;
    int pieces; // of H
    bool any;

    __device__ __forceinline__ void take(const float (&acc)[BN / 2]) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++) {
            sums[i] = acc[i];
        }
    }
};

// A consumer's places in shared memory for results that leave by TMA, 64 rows x 32 columns at a time
struct Exit {
    uint32_t memory;
    int barrier; // the consumer's own
    int row;     // the consumer's first row in a tile
    int left;    // copies so far
    bool starts; // this thread starts them

    __device__ __forceinline__ Exit(uint32_t memory_, int group) {
        memory = memory_;
        barrier = 1 + group;
        row = group * GROUP_ROWS;
        left = 0;
        starts = threadIdx.x % GROUP_THREADS == 0;
    }
    // until all but PENDING copies have left
    template <int PENDING> __device__ __forceinline__ void wait_free() const {
        if (starts) {
            tma_wait_read<PENDING>();
        }
        named_barrier(barrier, GROUP_THREADS);
    }
    // rows row + 8 half, rounded pairs, as 64-byte rows: lane 8 j + r has row r's j-th 16 bytes
    __device__ __forceinline__ void put(uint32_t place, int half, const uint32_t (&v)[4]) const {
        uint32_t thread = threadIdx.x % GROUP_THREADS, r = thread / 32 * 16 + thread % 8;
        store_matrices(place + (r + 8 * half) * 64 + ((r / 2 ^ thread % 32 / 8) % 4 << 4), v);
    }
    // all have put theirs; the starting thread may copy
    __device__ __forceinline__ void full() {
        fence_async_proxy();
        named_barrier(barrier, GROUP_THREADS);
        left++;
    }
};

// A warp's place in shared memory for up_forward's results, 16 rows x 32 columns of G, U and gate A at a
// time: 64-byte lines, swizzled, three a row. One copy takes them, and the warp waits for no other
struct WarpExit {
    uint32_t lines[3]; // of G, U, gate A: where lane 4 r + t puts row r's t-th 16 bytes

    __device__ __forceinline__ WarpExit(uint32_t group_memory, int /* group */) {
        uint32_t warp = threadIdx.x % GROUP_THREADS / 32, lane = threadIdx.x % 32;
        for (uint32_t i = 0; i < 3; i++) {
            uint32_t line = 3 * (lane / 4) + i;
            lines[i] = group_memory + warp * WARP_PART_BYTES + line * 64 + ((line / 2 ^ lane) % 4 << 4);
        }
    }
    // starts the copies; it has the first line. (Asked for anew each time: registers are few)
    __device__ __forceinline__ bool first_lane() const {
        return threadIdx.x % 32 == 0;
    }
    // until the last copy has left
    __device__ __forceinline__ void wait_free() const {
        if (first_lane()) {
            tma_wait_read<0>();
        }
        __syncwarp();
    }
    // rows r + 8 half, 24 lines further: swizzled as row r; i: G, U, gate A
    __device__ __forceinline__ void put(int i, int half, const uint32_t (&v)[4]) const {
        shared_store(lines[i] + half * (WARP_PART_BYTES / 2), v);
    }
    // all lanes have put theirs: to columns f on of the warp's rows; the tile's begin at first_row of the map
    __device__ __forceinline__ void leave(const CUtensorMap *map, int f, int first_row) const {
        fence_async_proxy();
        __syncwarp();
        if (first_lane()) {
            int warp = (int)threadIdx.x / 32 - GROUP_THREADS / 32; // of the consumers' eight
            tma_store(map, lines[0], f, 0, first_row + warp * WARP_ROWS);
            tma_commit();
        }
    }
};

// A part of up_forward's results: G, U, and gate silu(G) U of the rounded G and U; 32 columns take two parts
template <int PRODUCT, int BN>
__device__ __forceinline__ void leave_part(const Held<PRODUCT, BN> &held, int part, const Arguments &args,
                                           const WarpExit &exit, const CUtensorMap *h_map, int h_first) {
    int i = part / 2, half = part % 2, f = held.tile.n + PART_COLUMNS * i;
    uint32_t g[4], u[4], a[4];
    if (f >= args.F) {
        return;
    }
    held.get_paired(g, 0, i, half);
    held.get_paired(u, 1, i, half);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float low = low_half(g[j]), high = high_half(g[j]), gate = held.gate[half];
        a[j] =
            pack2(gate * low * sigmoid(low) * low_half(u[j]), gate * high * sigmoid(high) * high_half(u[j]));
    }
    if (half == 0) {
        exit.wait_free();
    }
    exit.put(0, half, g);
    exit.put(1, half, u);
    exit.put(2, half, a);
    if (half == 1) {
        exit.leave(h_map, f, h_first + held.tile.m);
    }
}

// a part of the rounded results, 32 columns
template <int PRODUCT, int BN>
__device__ __forceinline__ void leave_part(const Held<PRODUCT, BN> &held, int part, const Arguments &args,
                                           Exit &exit) {
    int n = held.tile.n + PART_COLUMNS * part;
    uint32_t place = exit.memory + exit.left % PART_PLACES * PART_BYTES;
    if (n >= args.N) {
        return;
    }
    exit.wait_free<PART_PLACES - 1>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t v[4];
        held.get(v, part, half);
        exit.put(place, half, v);
    }
    exit.full();
    if (exit.starts) {
        tma_store(&args.out, place, n, held.tile.m + exit.row);
        tma_commit();
    }
}

// one pair of columns of dA', G and U: G, U become dG, dU; returns dA' A
__device__ __forceinline__ float swiglu_backward_pair(uint32_t &g, uint32_t &u, const float (&da)[2],
                                                      float gate) {
    float G[2] = {low_half(g), high_half(g)}, U[2] = {low_half(u), high_half(u)};
    float dG[2], dU[2], dot = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float s = sigmoid(G[i]), silu = G[i] * s, d = gate * da[i];
        dot += da[i] * silu * U[i];
        dG[i] = d * U[i] * (s + silu * (1.0f - s));
        dU[i] = d * silu;
    }
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
        if (place.column == 0) {
            args.dgate_partial[(int64_t)(tile.m + place.row + 8 * half) * args.n_tiles + tile.n / BN] = sum;
        }
    }
}

// A consumer's slots of H. Its pieces, 64 columns each of one tile after the other, go through them in turn.
struct Slots {
    uint32_t memory; // address of slot 0
    uint32_t landed; // its barrier
    uint32_t lane;   // offset of the row and 16 bytes that this lane gives load_matrices, unswizzled
    const CUtensorMap *map;
    int row;     // in the map, of the consumer's first row in the chunk's first tile
    int barrier; // the consumer's own
    bool starts; // this thread starts the copies
    int asked;   // pieces so far whose copies have been started
    int done;    // pieces so far that have been computed
    int of_tile; // number of the first piece of the tile whose results are held

    __device__ __forceinline__ uint32_t slot(int piece) const {
        return memory + piece % SLOTS * SLOT_BYTES;
    }
    __device__ __forceinline__ void wait() const {
        barrier_wait(landed + done % SLOTS * 8, done / SLOTS % 2);
    }
};

__device__ __forceinline__ Slots slots_new(const Arguments &args, uint32_t memory, uint32_t landed,
                                           int group) {
    Slots slots;
    int which, first = (int)h_row(args, &which);
    uint32_t thread = threadIdx.x % GROUP_THREADS, row = thread / 32 * 16 + thread % 8;
    slots.memory = memory;
    slots.landed = landed + group * SLOTS * 8;
    slots.lane = row * 128 + ((row ^ thread % 32 / 8) % 8 << 4);
    slots.map = &args.h_out[which];
    slots.row = first + group * GROUP_ROWS;
    slots.barrier = 1 + group;
    slots.starts = thread == 0;
    slots.asked = slots.done = slots.of_tile = 0;
    return slots;
}

// pieces of H that a tile of this consumer has
template <int BN> __device__ __forceinline__ int slot_pieces(const Arguments &args, const Tile &tile) {
    int columns = min(args.F - tile.n, BN);
    return columns <= 0 ? 0 : (columns + SLOT_F - 1) / SLOT_F;
}

// G and U of the next pieces, as far as slots are free: of the held tile, then of the one that is multiplied
__device__ __forceinline__ void slots_ask(Slots &slots, const Tile &held, int held_pieces, const Tile &tile,
                                          int pieces) {
    while (slots.asked - slots.done < SLOTS) {
        int p = slots.asked - slots.of_tile;
        bool later = p >= held_pieces;
        p -= later ? held_pieces : 0;
        if (later && p >= pieces) {
            return;
        }
        if (slots.starts) {
            uint32_t landed = slots.landed + slots.asked % SLOTS * 8, to = slots.slot(slots.asked);
            int f = (later ? tile.n : held.n) + p * SLOT_F, row = slots.row + (later ? tile.m : held.m);
            tma_wait_read<0>(); // the slot's last results have left
            barrier_expect(landed, SLOT_BYTES);
            tma_load(to, slots.map, landed, f, 0, row);
            tma_load(to + BLOCK_BYTES, slots.map, landed, f, 1, row);
        }
        slots.asked++;
    }
}

// dG and dU of the slot, columns f on, that all of the consumer's threads have written
__device__ __forceinline__ void slots_store(const Slots &slots, const Tile &held, int f) {
    fence_async_proxy();
    named_barrier(slots.barrier, GROUP_THREADS);
    if (slots.starts) {
        tma_store(slots.map, slots.slot(slots.done), f, 0, slots.row + held.m);
        tma_store(slots.map, slots.slot(slots.done) + BLOCK_BYTES, f, 1, slots.row + held.m);
        tma_commit();
    }
}

// The thread's pairs of G and U in columns 32 i .. 32 i + 31 of row + 8 half of the slot become dG and dU; its
// sums of these columns begin at da[first], 4 apart
template <int COUNT>
__device__ __forceinline__ float swiglu_backward_pairs(const float (&da)[COUNT], int first,
                                                       const Slots &slots, int i, int half, float gate) {
    uint32_t at = ((slots.slot(slots.done) + slots.lane) ^ (uint32_t)i << 6) + half * 8 * 128;
    uint32_t g[4], u[4];
    float dot = 0.0f;
    load_matrices(g, at);
    load_matrices(u, at + BLOCK_BYTES);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float pair[2] = {da[first + 4 * j], da[first + 4 * j + 1]};
        dot += swiglu_backward_pair(g[j], u[j], pair, gate);
    }
    store_matrices(at, g);
    store_matrices(at + BLOCK_BYTES, u);
    return dot;
}

// a part of down_backward's results: 32 columns, half of a piece of H
template <int BN>
__device__ __forceinline__ void leave_part(Held<DOWN_BACKWARD, BN> &held, int part, const Arguments &args,
                                           Place place, Slots &slots) {
    int piece = part / 2, i = part % 2;
    if (piece >= held.pieces) {
        return;
    }
    if (i == 0) {
        slots.wait();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        held.dot[half] +=
            swiglu_backward_pairs(held.sums, part * 16 + 2 * half, slots, i, half, held.gate[half]);
    }
    if (i == 0) {
        return;
    }
    slots_store(slots, held.tile, held.tile.n + piece * SLOT_F);
    slots.done++;
    if (piece == held.pieces - 1) {
        store_dgate<BN>(held.dot, args, held.tile, place);
    }
}

__device__ __forceinline__ void tma_store_or_add(const CUtensorMap *map, uint32_t from, int column, int row,
                                                 int sheet, bool store) {
    if (store) {
        tma_store(map, from, column, row, sheet);
    } else {
        tma_add(map, from, column, row, sheet);
    }
}

// A part of a weight gradient's tile, dW[m][n] += D, or transposed, dW[n][m] += D. In shared memory rows are
// of 32 numbers, 128 bytes, swizzled; transposed there are two boxes, the second of columns m + 32 on
template <int PRODUCT, int BN>
__device__ __forceinline__ void add_part(const float (&acc)[BN / 2], int part, const Arguments &args,
                                         const Tile &tile, Exit &exit) {
    uint32_t t = threadIdx.x % 4;
    uint32_t place = exit.memory + exit.left % ADD_PLACES * ADD_BYTES;
    int m = tile.m + exit.row, n = tile.n + PART_COLUMNS * part;
    if (n >= args.N || m >= args.d) {
        return;
    }
    exit.wait_free<ADD_PLACES - 1>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t row = own_row() + 8 * half;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const float *pair = &acc[(4 * part + j) * 4 + 2 * half];
            if (PRODUCT == DOWN_WGRAD) {
                uint32_t piece = (2 * j + t / 2) ^ row % 8;
                shared_store(place + row * 128 + (piece << 4) + t % 2 * 8, pair[0], pair[1]);
            } else {
                uint32_t column = 8 * j + 2 * t, piece = row % 32 / 4;
                uint32_t box = place + row / 32 * (ADD_BYTES / 2) + row % 4 * 4;
                shared_store(box + column * 128 + ((piece ^ 2 * t) << 4), pair[0]);
                shared_store(box + (column + 1) * 128 + ((piece ^ (2 * t + 1)) << 4), pair[1]);
            }
        }
    }
    exit.full();
    if (exit.starts) {
        bool set = sets_gradient(args.chunk, tile.expert);
        if (PRODUCT == DOWN_WGRAD) {
            tma_store_or_add(&args.out, place, n, m, tile.expert, set);
        } else {
            tma_store_or_add(&args.out, place, m, n, tile.expert, set);
            tma_store_or_add(&args.out, place + ADD_BYTES / 2, m + 32, n, tile.expert, set);
        }
        tma_commit();
    }
}

// weight gradients: a tile's sums are added when its products are done
template <int PRODUCT, int BN>
__device__ __forceinline__ void consume_at_once(const Arguments &args, Plan plan, Ring<BN> ring, int group,
                                                uint32_t exit_memory) {
    Exit exit(exit_memory, group);
    Multiplier<PRODUCT, BN> multiplier = {ring, group, 0};
    Walk walk = walk_begin<PRODUCT, BN>(plan, args);
    while (walk.more) {
        float acc[BN / 2];
        Tile tile = walk.next;
        for (int i = 0; i < tile.steps; i++) {
            multiplier.step(acc, i);
        }
        walk_on<PRODUCT, BN>(walk, plan, args);
        multiplier.done(acc);
#pragma unroll
        for (int part = 0; part < BN / PART_COLUMNS; part++) {
            add_part<PRODUCT, BN>(acc, part, args, tile, exit);
        }
    }
    tma_wait_written(); // who has started copies: shared memory must outlive them
}

// up_forward, down_forward, up_backward: the last tile's results leave while the products of the next run
template <int PRODUCT, int BN>
__device__ __forceinline__ void consume_rounded(const Arguments &args, Plan plan, Ring<BN> ring, int group,
                                                uint32_t exit_memory) {
    typedef Held<PRODUCT, BN> Results;
    const bool UP = Traits<PRODUCT>::UP;
    typedef typename std::conditional<UP, WarpExit, Exit>::type ResultsExit;
    int which = 0, h_first = UP ? (int)h_row(args, &which) : 0;
    const CUtensorMap *h_map = &args.h_out[which];
    ResultsExit exit(exit_memory, group);
    Multiplier<PRODUCT, BN> multiplier = {ring, group, 0};
    Walk walk = walk_begin<PRODUCT, BN>(plan, args);
    Results held;
    held.any = false;
    while (walk.more || held.any) {
        float acc[BN / 2];
        Tile tile = walk.next;
        int steps = walk.more ? tile.steps : 0;
        bool mine = walk.more && group * GROUP_ROWS < tile.rows;
        auto leave = [&](int part) {
            if (!held.any) {
                return;
            }
            if constexpr (UP) {
                leave_part(held, part, args, exit, h_map, h_first);
            } else {
                leave_part(held, part, args, exit);
            }
        };
        multiplier.template tile<Results::PARTS>(acc, steps, leave);
        held.any = mine;
        held.tile = tile;
        if (UP && mine) {
            load_gates(held.gate, args, tile, thread_place(group));
        }
        if (walk.more) {
            walk_on<PRODUCT, BN>(walk, plan, args);
            multiplier.done(acc);
            held.take(acc);
        }
    }
    tma_wait_written(); // who has started copies: shared memory must outlive them
}

// the same of down_backward
template <int BN>
__device__ __forceinline__ void consume_down_backward(const Arguments &args, Plan plan, Ring<BN> ring,
                                                      int group, uint32_t slots_memory) {
    typedef Held<DOWN_BACKWARD, BN> Results;
    Place place = thread_place(group);
    Slots slots = slots_new(args, slots_memory, ring.landed(), group);
    Multiplier<DOWN_BACKWARD, BN> multiplier = {ring, group, 0};
    Walk walk = walk_begin<DOWN_BACKWARD, BN>(plan, args);
    Results held;
    held.any = false;
    held.pieces = 0;
    while (walk.more || held.any) {
        float acc[BN / 2];
        Tile tile = walk.next;
        int steps = walk.more ? tile.steps : 0;
        bool mine = walk.more && group * GROUP_ROWS < tile.rows;
        int pieces = mine ? slot_pieces<BN>(args, tile) : 0;
        auto leave = [&](int part) {
            slots_ask(slots, held.tile, held.pieces, tile, pieces);
            if (part < Results::PARTS && held.any) {
                leave_part(held, part, args, place, slots);
            }
        };
        multiplier.template tile<Results::PARTS + 1>(acc, steps, leave);
        slots.of_tile += held.pieces;
        held.any = mine;
        held.tile = tile;
        held.pieces = pieces;
        held.dot[0] = held.dot[1] = 0.0f;
        if (mine) {
            load_gates(held.gate, args, tile, place);
        }
        if (walk.more) {
            walk_on<DOWN_BACKWARD, BN>(walk, plan, args);
            multiplier.done(acc);
            held.take(acc);
        }
    }
    tma_wait_written(); // who has started copies: shared memory must outlive them
}

#endif

// ----------------------------------------------------------------------------
// the kernel

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GROUPED_CLUSTER_DIMS __cluster_dims__(Traits<PRODUCT>::CLUSTER, 1, 1)
#else
#define GROUPED_CLUSTER_DIMS // compiled for an older GPU as well: no clusters there
#endif

template <int PRODUCT, int BN>
static __global__ void GROUPED_CLUSTER_DIMS __launch_bounds__(BLOCK_THREADS, 1)
    grouped_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (Traits<PRODUCT>::UP && args.again && *args.h.place >= 0) {
        return; // backward asks for H again, and it is there
    }
    uint32_t address = shared_address(shared_memory());
    uint32_t base = (address + 1023) & ~1023u;
    unsigned char *memory = shared_memory() + (base - address);
    Ring<BN> ring(base + 2 * Epilogue<PRODUCT>::BYTES, args.stages);
    unsigned char *after = memory + 2 * Epilogue<PRODUCT>::BYTES + args.stages * Stages<BN>::BYTES;
    int *starts = reinterpret_cast<int *>(after + Stages<BN>::BARRIERS);
    Plan plan = {starts, starts + args.chunk.experts + 1};
    if (threadIdx.x == 0) {
        init_barriers<PRODUCT>(ring);
    }
    make_plan<PRODUCT>(plan, args);
    __syncthreads();
    if (Traits<PRODUCT>::CLUSTER > 1) {
        cluster_sync(); // the other block's barriers are there
    }
    // every warp's role must look the same to all its lanes
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP_THREADS, 0);
    if (group == 0) {
        give_registers<Traits<PRODUCT>::PRODUCER_REGISTERS>();
        if (Traits<PRODUCT>::GATHERS) {
            produce_by_token<PRODUCT>(args, plan, ring);
        } else if (threadIdx.x == 0) {
            produce_by_tma<PRODUCT>(args, plan, ring);
        }
        __syncwarp();
    } else {
        take_registers<Traits<PRODUCT>::CONSUMER_REGISTERS>();
        uint32_t mine = base + (group - 1) * Epilogue<PRODUCT>::BYTES;
        if constexpr (Traits<PRODUCT>::WGRAD) {
            consume_at_once<PRODUCT>(args, plan, ring, group - 1, mine);
        } else if constexpr (PRODUCT == DOWN_BACKWARD) {
            consume_down_backward(args, plan, ring, group - 1, mine);
        } else {
            consume_rounded<PRODUCT>(args, plan, ring, group - 1, mine);
        }
    }
    if (Traits<PRODUCT>::CLUSTER > 1) {
        cluster_sync(); // the other block may still send here
    }
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

// Narrow tiles load more a product, into shared memory and from it: so much longer for the same work (192:
// measured), in 1/100
static inline int tile_cost(int BN) {
    return BN * (BN == 256 ? 100 : BN == 192 ? 115 : 130);
}

// BN for a product over rows, with `columns` of N in a tile of 256; `most`: the largest there is
static inline int row_tile(int N, int columns, int most = 256) {
    int best = most;
    for (int BN = most - 64; BN >= 128; BN -= 64) {
        if (ceil_div(N, columns * BN / 256) * tile_cost(BN) <
            ceil_div(N, columns * best / 256) * tile_cost(best)) {
            best = BN;
        }
    }
    return best;
}

// BN for a weight gradient [E][M, N]: its tiles are few, so the last round of blocks counts
static inline int64_t wgrad_cost(int E, int M, int N, int BN) {
    int64_t items = items_of<DOWN_WGRAD>(ceil_div<int>(M, TILE_M), ceil_div(N, BN));
    return ceil_div<int64_t>(E * items, num_sms() / Traits<DOWN_WGRAD>::CLUSTER) * tile_cost(BN);
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
    return args;
}

template <int PRODUCT, int BN> static void start_tiles(Arguments args, cudaStream_t stream) {
    args.n_tiles = ceil_div<int>(args.N, Columns<PRODUCT, BN>::N);
    args.stages = ring_stages<PRODUCT, BN>(args.chunk.experts);
    int blocks = num_sms() / Traits<PRODUCT>::CLUSTER * Traits<PRODUCT>::CLUSTER;
    size_t shared = other_bytes<PRODUCT, BN>(args.chunk.experts) + args.stages * Stages<BN>::BYTES;
    void (*kernel)(Arguments) = grouped_kernel<PRODUCT, BN>;
    launch(kernel, blocks, BLOCK_THREADS, shared, stream, args);
}

template <int PRODUCT> static void start(Arguments args, int BN, cudaStream_t stream) {
    if (BN == 256) {
        if constexpr (PRODUCT != DOWN_BACKWARD) {
            start_tiles<PRODUCT, 256>(args, stream);
        }
    } else if (BN == 192) {
        start_tiles<PRODUCT, 192>(args, stream);
    } else {
        start_tiles<PRODUCT, 128>(args, stream);
    }
}

// Columns of H as a TMA operand: in the store, whose length is not known here, and in scratch
static inline void h_maps(CUtensorMap maps[2], ChunkH h, int first, int columns, int F, int rows,
                          int box_rows) {
    const int64_t any_length = 0x7fffffff;
    const floatX *store = h.store != NULL ? h.store : h.scratch;
    maps[0] = tensor_map(store + first, columns, any_length, 0, box_rows, 3 * F);
    maps[1] = h.scratch != NULL ? tensor_map(h.scratch + first, columns, rows, 0, box_rows, 3 * F) : maps[0];
}

// H as an epilogue operand, [rows][3][F], in boxes of `parts` of G, U and gate A: a box ends where G ends
static inline void h_epilogue_maps(CUtensorMap maps[2], ChunkH h, int F, int rows, int box_rows, int parts,
                                   int columns) {
    const int64_t any_length = 0x7fffffff;
    const floatX *store = h.store != NULL ? h.store : h.scratch;
    maps[0] = tensor_map(store, false, F, 3, any_length, parts, box_rows, columns);
    maps[1] =
        h.scratch != NULL ? tensor_map(h.scratch, false, F, 3, rows, parts, box_rows, columns) : maps[0];
}

// results of the chunk's rows
static inline CUtensorMap out_map(const floatX *out, int columns, int rows) {
    return tensor_map(out, false, columns, rows, 0, GROUP_ROWS, 1, PART_COLUMNS);
}

// a weight gradient, [E][rows][columns]
static inline CUtensorMap gradient_map(const float *dw, int64_t columns, int64_t rows, int experts,
                                       int box_rows) {
    return tensor_map(dw, true, columns, rows, experts, box_rows, 1, PART_COLUMNS);
}

enum { BOX_ACROSS = 64 }; // k of a box of an operand stored across k

// Up to so many bytes of an expert's W_gate_up do up_forward's blocks stand alone: measured at 1, 9 and 17 MB.
// (Where a test has small shapes only, they should meet both)
static inline int64_t alone_bytes(void) {
    return emulated() ? 32 << 10 : 8 << 20;
}

static inline void grouped_up_forward(ChunkH h, int again, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, d);
    int BN = row_tile(F, 128);
    args.h = h;
    args.rows = x;
    args.again = again;
    h_epilogue_maps(args.h_out, h, F, chunk.rows, WARP_ROWS, 3, PART_COLUMNS);
    args.b[0] = paired_rows_map(w_gate_up, d, F, 2 * chunk.experts, BN / 2); // a sheet: gate's or up's rows
    if (4 * (int64_t)d * F > alone_bytes()) {
        start<UP_FORWARD_TWO>(args, BN, stream);
    } else {
        start<UP_FORWARD>(args, BN, stream);
    }
}

static inline void grouped_down_forward(floatX *y, ChunkH h, const floatX *w_down, RowChunk chunk, int d,
                                        int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, d, F);
    int BN = row_tile(d, 256);
    args.h = h;
    args.out = out_map(y, d, chunk.rows);
    h_maps(args.a, h, 2 * F, F, F, chunk.rows, GROUP_ROWS);
    args.b[0] = tensor_map(w_down, F, d, chunk.experts, BN / 2);
    start<DOWN_FORWARD>(args, BN, stream);
}

// BN of down_backward: of 256 columns the sums and those held would be 256 registers; narrow experts take
// less time in tiles of 128 (measured)
static inline int down_backward_tile(int F) {
    return row_tile(F, 256, F < 1024 ? 128 : 192);
}

static inline int grouped_dgate_tiles(int F) {
    return ceil_div(F, down_backward_tile(F));
}

static inline void grouped_down_backward(ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, d);
    args.h = h;
    args.rows = dy;
    args.dgate_partial = dgate_partial;
    h_epilogue_maps(args.h_out, h, F, chunk.rows, GROUP_ROWS, 1, SLOT_F);
    args.b[0] = tensor_map(w_down, F, d, chunk.experts, BOX_ACROSS);
    start<DOWN_BACKWARD>(args, down_backward_tile(F), stream);
}

static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, d, 2 * F);
    args.h = h;
    args.out = out_map(dx, d, chunk.rows);
    h_maps(args.a, h, 0, 2 * F, F, chunk.rows, GROUP_ROWS);
    args.b[0] = tensor_map(w_gate_up, d, 2 * F, chunk.experts, BOX_ACROSS);
    start<UP_BACKWARD>(args, row_tile(d, 256), stream);
}

static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, ChunkH h, RowChunk chunk, int d,
                                      int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, F, 0);
    args.h = h;
    args.rows = dy;
    args.out = gradient_map(dw_down, F, d, chunk.experts, GROUP_ROWS);
    h_maps(args.b, h, 2 * F, F, F, chunk.rows, BOX_ACROSS);
    start<DOWN_WGRAD>(args, wgrad_tile(chunk.experts, d, F), stream);
}

static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, d, F, 2 * F, 0);
    args.h = h;
    args.rows = x;
    args.out = gradient_map(dw_gate_up, d, 2 * F, chunk.experts, PART_COLUMNS);
    h_maps(args.b, h, 0, 2 * F, F, chunk.rows, BOX_ACROSS);
    start<UP_WGRAD>(args, wgrad_tile(chunk.experts, d, 2 * F), stream);
}

} // namespace hopper

#endif
#endif
