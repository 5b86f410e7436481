/*
The grouped GEMM on Hopper: what its kernels differ in, and who computes what.

Variant   a product, the columns of a tile and the blocks of a cluster: all that is known at compile time.
Plan      made by every block at its start, in shared memory, from the offsets of the experts' rows: how many
          items each expert has. An item is what a cluster takes at a time, a tile for each of its blocks.
Walk      a cluster's items: number c, c + clusters, c + 2 clusters, ...

An expert with 5 rows and 3 columns of tiles, and a cluster of two blocks, a and b; a3 is block a's tile of
item 3:

          column 0   1    2
    row 0        a0  a1   a2      items 0 to 5: the blocks have the same columns, so the same B (they are
        1        b0  b1   b2      coupled): each loads half of it, for both
        2        a3  a4   a5
        3        b3  b4   b5
        4        a6  b6   a7      items 6, 7: what is left over is shared the other way; each loads its own B

Errors: none.
*/
#ifndef GROUPED_HOPPER_TILES_CUH
#define GROUPED_HOPPER_TILES_CUH

#include "llmc/gpu/row_chunk.cuh"
#include "llmc/gpu/sums.cuh"
#include "llmc/gpu/wgmma.cuh"
// defines: RowChunk, ChunkH, ROW_ALIGN; CUtensorMap, RingTurn, cluster_rank, BLOCK_BYTES

namespace hopper {

// GATED_FORWARD: up_forward that leaves gate A alone behind
enum { UP_FORWARD, DOWN_FORWARD, DOWN_BACKWARD, UP_BACKWARD, DOWN_WGRAD, UP_WGRAD, GATED_FORWARD };

enum {
    TILE_M = 128,
    STEP_K = 64,
    GROUP_ROWS = 64, // rows of a consumer
    BLOCK_THREADS = 3 * GROUP_THREADS,
    START_REGISTERS = 168, // of a thread, before the warpgroups give and take
    CONSUMER_WARPS = 8,
    MOST_EXPERTS = 2048,
    MOST_SHARED = 227 * 1024, // of a block
    PART_COLUMNS = 32,        // of results that leave at a time
    PART_BYTES = GROUP_ROWS * PART_COLUMNS * 2,
    PART_PLACES = 3, // of each consumer: the last three parts of Y or dX'
    WARP_ROWS = 16,  // of up_forward's results that leave together: a warp's
    WARP_PART_BYTES = WARP_ROWS * 3 * PART_COLUMNS * 2,
    ADD_BYTES = GROUP_ROWS * PART_COLUMNS * 4,
    ADD_PLACES = 2, // of each consumer: the last two parts of dW
    SLOTS = 2,      // of H, of each consumer
    SLOT_F = 64,    // columns of G and U in a slot
    SLOT_BYTES = 2 * GROUP_ROWS * SLOT_F * 2,
};

static_assert(ROW_ALIGN % GROUP_ROWS == 0, "a consumer's rows are one expert's");
static_assert(ROW_ALIGN % STEP_K == 0, "the rows of a weight gradient's step are one expert's");
static_assert(TILE_M == 2 * GROUP_ROWS && BLOCK_THREADS == 3 * GROUP_THREADS, "a producer and two consumers");
static_assert(STEP_K * 2 == 128 && SLOT_F * 2 == 128, "a row in shared memory is TMA's 128-byte swizzle");
static_assert(GROUP_ROWS * 128 == BLOCK_BYTES, "a consumer's A is one block of a tile");
static_assert(GROUP_ROWS == 64, "a consumer's rows are wgmma's");
static_assert(PART_COLUMNS * 2 == 64 && PART_COLUMNS * 4 == 128,
              "a part's rows are swizzled, as bf16 and as fp32");
static_assert(SLOT_F == 2 * PART_COLUMNS, "a slot of H is two parts");

template <int PRODUCT_, int BN_, int CLUSTER_> struct Variant {
    static constexpr int PRODUCT = PRODUCT_, BN = BN_, CLUSTER = CLUSTER_;
    static constexpr bool ALONE = PRODUCT == GATED_FORWARD, UP = PRODUCT == UP_FORWARD || ALONE;
    static constexpr bool WGRAD = PRODUCT == DOWN_WGRAD || PRODUCT == UP_WGRAD;
    static constexpr bool SLOTTED = PRODUCT == DOWN_BACKWARD;        // the epilogue reads H
    static constexpr bool GATHERS = WGRAD || UP || SLOTTED;          // A, by token
    static constexpr bool A_ACROSS = WGRAD;                          // stored across k (hopper.cuh)
    static constexpr bool B_ACROSS = !UP && PRODUCT != DOWN_FORWARD; // the same of B
    static constexpr int N =
        UP ? BN / 2 : BN; // a tile's columns as the product counts them: up_forward counts f
    static constexpr int PARTS = WGRAD ? 0 : BN / PART_COLUMNS; // that leave during the next tile
    static constexpr int B_BOXES = B_ACROSS ? BN / 64 : 2;      // of a stage
    static constexpr int HALF_BOXES = (B_BOXES + 1) / 2; // that the first block of a cluster loads for both
    static constexpr int A_BYTES = TILE_M * STEP_K * 2, B_BYTES = BN * STEP_K * 2; // of a stage
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int MOST_STAGES = BN == 256 ? 4 : BN == 192 ? 5 : 6; // about 200 KB
    static constexpr int BARRIERS = 256, LANDED = 192; // bytes: full, empty; from LANDED on, the slots'
    static constexpr int EXIT_BYTES = WGRAD     ? ADD_PLACES * ADD_BYTES // of a consumer's results
                                      : SLOTTED ? SLOTS * SLOT_BYTES
                                      : UP      ? GROUP_ROWS / WARP_ROWS * WARP_PART_BYTES
                                                : PART_PLACES * PART_BYTES;
    static constexpr int PRODUCER_REGISTERS = WGRAD || UP ? 56 : 40;
    static constexpr int CONSUMER_REGISTERS = WGRAD || UP ? 224 : 232;

    // shared memory but for the ring; the plan has 2 E + 3 numbers
    static constexpr int other_bytes(int experts) {
        const int align = 1024; // shared memory may begin anywhere
        return align + 2 * EXIT_BYTES + BARRIERS + (2 * experts + 3) * (int)sizeof(int);
    }
    static constexpr int stages(int experts) {
        int room = (MOST_SHARED - other_bytes(experts)) / STAGE_BYTES;
        return room < MOST_STAGES ? room : MOST_STAGES;
    }
    static_assert(BN % 64 == 0 && BN <= 256, "wgmma's columns, and boxes across k");
    static_assert(2 * MOST_STAGES * 8 <= LANDED && LANDED + 2 * SLOTS * 8 <= BARRIERS,
                  "room for the barriers");
    static_assert(EXIT_BYTES % 1024 == 0 && STAGE_BYTES % 1024 == 0,
                  "tiles begin at multiples of 1024 bytes");
    static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * START_REGISTERS,
                  "nobody has more to give");
};

struct Arguments {
    CUtensorMap a; // where A's rows lie together
    CUtensorMap b;
    CUtensorMap
        out; // of the epilogue. Reads and writes H [rows][3][F]; writes Y, dX'; adds to dW [E][.][.], fp32
    RowChunk chunk;
    ChunkH h;
    const floatX *rows; // gathered: x or dy [N, d]
    int again;          // up_forward only if H is not kept
    float *dgate_partial;
    int d, F;
    int N;                // columns as Variant counts them
    int steps;            // in k, of STEP_K; weight gradients: an expert's own
    int m_tiles, n_tiles; // tiles of D; m_tiles of weight gradients only
    int stages;           // of the ring
};

// how many items an expert has: tiles of one column; in the rows of tiles that are left over, neighbours
__host__ __device__ __forceinline__ int items_of(int cluster, int m_tiles, int n_tiles) {
    return m_tiles / cluster * n_tiles + m_tiles % cluster * ceil_div<int>(n_tiles, cluster);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// the plan

// In shared memory. The number of all items has a place of its own, whose address no thread computes: so
// ptxas knows that all lanes read the same, and keeps a producer's item, tile and stage in uniform registers,
// where TMA wants its operands. Read at item_start[E], by an address in each thread's registers, it might
// have been different in each lane, for all that ptxas knew, and so might everything that follows from it
struct Plan {
    int *items;      // of all experts
    int *item_start; // [E + 1] first item of each expert
    int *row_start;  // [E + 1] first row in the chunk

    __device__ __forceinline__ Plan(void *memory, int experts) {
        items = reinterpret_cast<int *>(memory);
        item_start = items + 1;
        row_start = item_start + experts + 1;
    }
};

// all threads of the block
template <class V> __device__ __forceinline__ void make_plan(Plan plan, const Arguments &args) {
    const RowChunk &chunk = args.chunk;
    int thread = threadIdx.x, before = 0;
    int end = max(min(chunk.first + chunk.rows, chunk.offsets[chunk.experts]), chunk.first);
    for (int e = thread; e <= chunk.experts; e += BLOCK_THREADS) {
        plan.row_start[e] = min(max(chunk.offsets[e], chunk.first), end) - chunk.first;
    }
    __syncthreads();
    if (thread >= 32) {
        return;
    }
    for (int e = thread; e - thread < chunk.experts; e += 32) {
        int rows = e < chunk.experts ? plan.row_start[e + 1] - plan.row_start[e] : 0;
        int m_tiles = V::WGRAD ? args.m_tiles : ceil_div<int>(rows, TILE_M);
        int items = rows > 0 ? items_of(V::CLUSTER, m_tiles, args.n_tiles) : 0;
        items = warp_prefix_sum(items);
        if (e < chunk.experts) {
            plan.item_start[e + 1] = before + items;
        }
        before += __shfl_sync(0xffffffffu, items, 31);
    }
    if (thread == 0) {
        plan.item_start[0] = 0;
        *plan.items = before;
    }
}

// ----------------------------------------------------------------------------
// the walk

struct Tile {
    int expert;
    int m;        // first row of D: of the chunk; weight gradients: of d
    int n;        // first column
    int rows;     // of D that belong to the expert, 64 or 128
    int row;      // weight gradients: first row in k
    int steps;    // in k
    bool coupled; // the cluster's blocks have the same B
};

// Tile of this block in the item; false when there are no more. tile.expert is where the search goes on.
template <class V>
__device__ __forceinline__ bool find_tile(Tile &tile, int item, Plan plan, const Arguments &args) {
    const int CLUSTER = V::CLUSTER;
    if (item >= *plan.items) {
        return false;
    }
    while (item >= plan.item_start[tile.expert + 1]) {
        tile.expert++;
    }
    int rank = CLUSTER == 1 ? 0 : (int)cluster_rank();
    int row = plan.row_start[tile.expert];
    int rows = plan.row_start[tile.expert + 1] - row;
    int m_tiles = V::WGRAD ? args.m_tiles : ceil_div<int>(rows, TILE_M);
    int pairs = m_tiles / CLUSTER;
    int i = item - plan.item_start[tile.expert];
    int pair = i / args.n_tiles;
    tile.coupled = pair < pairs;
    int m_tile = tile.coupled ? pair * CLUSTER + rank : m_tiles - 1;
    int n_tile = tile.coupled ? i - pair * args.n_tiles : (i - pairs * args.n_tiles) * CLUSTER + rank;
    tile.n = n_tile * V::N;
    tile.m = m_tile * TILE_M + (V::WGRAD ? 0 : row);
    tile.rows = V::WGRAD ? (int)TILE_M : min(rows - m_tile * TILE_M, (int)TILE_M);
    tile.row = row;
    tile.steps = V::WGRAD ? rows / STEP_K : args.steps;
    return true;
}

// the block's tiles, one after the other
template <class V> struct Walk {
    Tile next; // while `more`
    int item;
    bool more;

    __device__ __forceinline__ Walk(Plan plan, const Arguments &args) {
        next.expert = 0;
        item = blockIdx.x / V::CLUSTER;
        more = find_tile<V>(next, item, plan, args);
    }
    __device__ __forceinline__ void on(Plan plan, const Arguments &args) {
        item += gridDim.x / V::CLUSTER;
        more = find_tile<V>(next, item, plan, args);
    }
};

#endif

} // namespace hopper

#endif
