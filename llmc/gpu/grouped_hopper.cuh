/*
The experts' products on Hopper (sm_90a), bf16: the functions of grouped_gemm.cuh, which has the table of the
six products, in namespace hopper. One kernel template does all six; they differ in where the operands come
from (grouped_hopper_load.cuh) and in what becomes of the accumulators (grouped_hopper_epilogues.cuh):

    product         A              B                  across k   epilogue
    up_forward      X' by token    W_gate_up by TMA              SwigluForward, during the next tile
    (up_forward without a backward, GATED_FORWARD, lets gate A alone leave)
    down_forward    gate A by TMA  W_down by TMA                 StoreRows, the same
    down_backward   dO' by token   W_down by TMA      B          SwigluBackward, the same
    up_backward     dH by TMA      W_gate_up by TMA   B          StoreRows, the same
    down_wgrad      dO' by token   gate A by TMA      A, B       AddToWeights, at once
    up_wgrad        X' by token    dH by TMA          A, B       AddToWeights, at once, transposed

As many blocks as multiprocessors walk through the tiles of D (grouped_hopper_tiles.cuh), 128 x BN (BN = 256,
192 or 128: whichever wastes least). A block is three warpgroups. One is the producer: it fills a ring of
stages in shared memory, each a step of 64 in k. The other two are consumers, 64 rows of the tile each: wgmma
from the ring into registers.

    A by token --cp.async--\           /-> consumer 0: rows 0 .. 63 ----\
    A ------------TMA-------> ring ---+                                  +--> shared ---TMA--> H, Y, dX'
    B ------------TMA------/  of 4-6   \-> consumer 1: rows 64 .. 127 --/     memory           dW +=
     half of it, for both     stages       wgmma, then the epilogue
     blocks of a cluster

The epilogue is hidden. With d = 768 a tile is only 12 steps long, and what follows, SwiGLU and the stores,
would take as long again. So a consumer keeps a tile's results in registers (rounded, or down_backward's sums
as they are) and starts the next tile; while the products of its steps run, which need nobody, it lets a part
of 32 columns of the last tile leave at every step or two:

    tensor cores   | tile 1: step 0 | 1 | 2 | ... | 11 | tile 2: step 0 | 1      | 2      | ...
    the consumer   |                                   | part 0 of 1    | part 1 | part 2 | ...

Weight gradients, whose tiles are long, leave at once. TMA adds each tile to dW in memory, or overwrites it if
this is the first contribution. Each element is added to exactly once per launch, so the result does not
depend on the order of tiles.

Two blocks form a cluster. They work on two row tiles with the same columns, hence the same B: each loads half
of B and multicasts it to both. Where an expert has an odd number of row tiles, the blocks share the last: two
tiles side by side, each block loads its own B. A stage is free when both blocks' consumers are done.

Shared memory is the bottleneck. It delivers 128 bytes per cycle. At full tensor-core rate wgmma reads 80 of
them (all of B for every 64 rows of A), the ring's loads write 48, up_forward's results add 16: 144 in all.

What the tricks cost and bring, on an H100; a step is one of training, dense is cuBLASLt's product of the same
size:

    trick                                            lines   worth
    gather in the load: no gathered copy exists        170   2 % of a step at k = 1, 25 % of experts at k = 8
    the epilogue is hidden behind the next tile         70   0.70 -> 0.82 and more of dense
    H comes and goes in slots (down_backward)          150   3 % of a step
    clusters share B                                    60   1 to 12 % of a product
    B's rows in pairs (up_forward)                      50   1 to 2 % of it
    warps that leave alone (up_forward)                 50   3 % of it
    no clusters where W is small (up_forward)           10   1 to 7 % of it
    TMA is issued behind elect_one (hopper.cuh)         20   2 to 15 % of up_backward and the weight gradients
    all lanes know that they agree (Plan)                3   3 to 4 % of up_forward
    tokens are fetched two steps ahead                  10   4 to 8 % of narrow experts' weight gradients
    what takes longer is asked for first                 5   1 to 2 % of up_forward, up to 5 % of down_wgrad
    four issuers in turn                                 1   1 % of down_backward

Deterministic: each element of an output has one owner, who adds in a fixed order; tiles are dealt out in a
fixed order. Shapes: grouped_gemm.cuh. Errors: more than 2048 experts are refused. Nothing is allocated, the
host does not wait; tensor maps are kernel arguments, so a CUDA graph may capture the launches.
*/
#ifndef GROUPED_HOPPER_CUH
#define GROUPED_HOPPER_CUH

#include "llmc/gpu/row_chunk.cuh"

#ifndef PRECISION_FP32
#include "llmc/gpu/grouped_hopper_epilogues.cuh"
#include "llmc/gpu/grouped_hopper_load.cuh"
#include "llmc/gpu/grouped_hopper_tiles.cuh"
#include "llmc/gpu/wgmma.cuh"
#include <type_traits>
// defines: Variant, Arguments, Plan, Walk; Ring, produce_by_*; the epilogues; wgmma; std::conditional

namespace hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// consumers

// the product
template <class V> struct Multiplier {
    Ring<V> ring;
    int group;
    uint32_t last; // empty[] of the stage whose products may still run

    __device__ __forceinline__ void release() const {
        uint32_t lane = threadIdx.x % 32;
        if (lane >= V::CLUSTER) {
            return;
        }
        if (V::CLUSTER == 1) {
            barrier_arrive(last);
        } else {
            barrier_arrive(last, lane);
        }
    }
    // starts the products of a step and waits for those of the step before
    __device__ __forceinline__ void step(float (&acc)[V::BN / 2], int step) {
        const int A_STEP = V::A_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16; // descriptors count 16 bytes
        const int B_STEP = V::B_ACROSS ? 16 * 128 / 16 : 16 * 2 / 16;
        barrier_wait(ring.full(), ring.parity);
        if (V::GATHERS) {
            fence_async_proxy();
        }
        uint64_t a = tile_descriptor(ring.a() + group * BLOCK_BYTES);
        uint64_t b = tile_descriptor(ring.b());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < STEP_K / 16; k++) {
            wgmma<V::A_ACROSS, V::B_ACROSS>(acc, a + k * A_STEP, b + k * B_STEP, k > 0 || step > 0);
        }
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            release();
        }
        last = ring.empty();
        ring.advance();
    }
    // All products of a tile; the last of them still run. meanwhile(0) .. meanwhile(PARTS - 1): what to do
    // while they run. Parts are spread evenly over the steps. If several steps came without a part, the
    // consumer would drain the ring faster than the producer fills it. They are unrolled, to find their
    // registers at compile time
    template <int PARTS, class Meanwhile>
    __device__ __forceinline__ void tile(float (&acc)[V::BN / 2], int steps, const Meanwhile &meanwhile) {
        int i = 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll 1
            for (; i < steps && i <= part * steps / (PARTS + !PARTS); i++) {
                step(acc, i);
            }
            meanwhile(part);
        }
        for (; i < steps; i++) {
            step(acc, i);
        }
    }
    __device__ __forceinline__ void done(float (&acc)[V::BN / 2]) const {
        wgmma_wait<0>();
        wgmma_results(acc);
        release();
    }
};

template <class V> struct EpilogueOf {
    typedef typename std::conditional<V::SLOTTED, SwigluBackward<V>, StoreRows<V>>::type OfRows;
    typedef typename std::conditional<V::UP, SwigluForward<V>, OfRows>::type Rounded;
    typedef typename std::conditional<V::WGRAD, AddToWeights<V>, Rounded>::type Type;
};

// the last tile's results leave while the products of the next run
template <class V>
__device__ __forceinline__ void consume(const Arguments &args, Plan plan, Ring<V> ring, int group,
                                        uint32_t memory) {
    const int PARTS = V::PARTS + V::SLOTTED; // behind the last part H is asked for once more
    typename EpilogueOf<V>::Type epilogue(args, group, memory, ring.landed());
    Multiplier<V> multiplier = {ring, group, 0};
    Walk<V> walk(plan, args);
    while (walk.more || epilogue.any) {
        float acc[V::BN / 2];
        Tile tile = walk.next;
        int steps = walk.more ? tile.steps : 0;
        bool mine = walk.more && group * GROUP_ROWS < tile.rows;
        multiplier.template tile<PARTS>(acc, steps, [&](int part) { epilogue.leave(part, tile, mine); });
        epilogue.hold(tile, mine);
        if (walk.more) {
            walk.on(plan, args);
            multiplier.done(acc);
            epilogue.take(acc);
        }
    }
    tma_wait_written(); // who has started copies: shared memory must outlive them
}

#endif

// ----------------------------------------------------------------------------
// the kernel

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GROUPED_CLUSTER_DIMS __cluster_dims__(V::CLUSTER, 1, 1)
#else
#define GROUPED_CLUSTER_DIMS // compiled for an older GPU as well: no clusters there
#endif

// shared memory: what the consumers' results leave by, the ring, its barriers, the plan
template <class V>
static __global__ void GROUPED_CLUSTER_DIMS __launch_bounds__(BLOCK_THREADS, 1)
    grouped_kernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (V::UP && args.again && is_kept(args.h)) {
        return; // backward asks for H again, and it is there
    }
    uint32_t address = shared_address(shared_memory());
    uint32_t base = (address + 1023) & ~1023u;
    unsigned char *memory = shared_memory() + (base - address);
    Ring<V> ring(base + 2 * V::EXIT_BYTES, args.stages);
    Plan plan(memory + 2 * V::EXIT_BYTES + args.stages * V::STAGE_BYTES + V::BARRIERS, args.chunk.experts);
    if (threadIdx.x == 0) {
        init_barriers<V>(ring);
    }
    make_plan<V>(plan, args);
    __syncthreads();
    if (V::CLUSTER > 1) {
        cluster_sync(); // the other block's barriers are there
    }
    // every warp's role must look the same to all its lanes
    int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), group = warp / (GROUP_THREADS / 32);
    if (group == 0) {
        give_registers<V::PRODUCER_REGISTERS>();
        if (V::GATHERS) {
            produce_by_token<V>(args, plan, ring);
        } else if (warp == 0 && elect_one()) {
            produce_by_tma<V>(args, plan, ring);
        }
        __syncwarp();
    } else {
        take_registers<V::CONSUMER_REGISTERS>();
        consume<V>(args, plan, ring, group - 1, base + (group - 1) * V::EXIT_BYTES);
    }
    if (V::CLUSTER > 1) {
        cluster_sync(); // the other block may still send here
    }
#else
    (void)args;
    __trap(); // a build without sm_90a has no such kernel
#endif
}

#undef GROUPED_CLUSTER_DIMS

// ----------------------------------------------------------------------------
// host: tiles

// a Hopper device, and code for it in this build (not PTX of an older target that the driver has translated)
static inline bool available(void) {
    cudaFuncAttributes code;
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
        return false;
    }
    CUDA_CHECK(cudaFuncGetAttributes(&code, grouped_kernel<Variant<DOWN_FORWARD, 256, 2>>));
    return code.ptxVersion >= 90;
}

// Narrow tiles load more per product, into shared memory and from it: they take so much longer for the same
// work, in 1/100 (192: measured)
static inline int tile_cost(int BN) {
    return BN * (BN == 256 ? 100 : BN == 192 ? 115 : 130);
}

// the BN whose tiles take the least time by `rounds`(BN), of most, most - 64, ... 128
template <class Rounds> static int cheapest_tile(int most, const Rounds &rounds) {
    int best = most;
    for (int BN = most - 64; BN >= 128; BN -= 64) {
        best = rounds(BN) * tile_cost(BN) < rounds(best) * tile_cost(best) ? BN : best;
    }
    return best;
}

// for a product over rows, with `columns` of N in a tile of 256
static inline int row_tile(int N, int columns, int most = 256) {
    return cheapest_tile(most, [&](int BN) { return (int64_t)ceil_div(N, columns * BN / 256); });
}

// for a weight gradient [E][M, N]: its tiles are few, so the last round of blocks counts
static inline int wgrad_tile(int E, int M, int N) {
    return cheapest_tile(256, [&](int BN) {
        int64_t items = items_of(2, ceil_div<int>(M, TILE_M), ceil_div(N, BN));
        return ceil_div<int64_t>(E * items, num_sms() / 2);
    });
}

// down_backward's sums and those held would be 256 registers with 256 columns. Tiles of 128 are faster where
// an expert is narrow (measured)
static inline int down_backward_tile(int F) {
    return row_tile(F, 256, F < 1024 ? 128 : 192);
}

static inline int grouped_dgate_tiles(int F) {
    return ceil_div(F, down_backward_tile(F));
}

// If W_gate_up of an expert is at most this large, up_forward runs without clusters: its epilogue is long,
// and four consumers that wait for each other lose more (1 to 4 %) than loading all of B costs. If it is
// larger, L2 is what clusters relieve (1 to 7 %). The threshold lies between measurements at 1, 9 and 17 MB.
// (A test has small shapes only, which should meet both)
static inline int64_t alone_bytes(void) {
    return emulated() ? 32 << 10 : 8 << 20;
}

// ----------------------------------------------------------------------------
// host: launches

static inline Arguments arguments(RowChunk chunk, ChunkH h, const floatX *rows, int d, int F, int N, int k) {
    Arguments args;
    memset((void *)&args, 0, sizeof(args));
    if (chunk.experts > MOST_EXPERTS) {
        die("%d experts: the Hopper kernels take at most %d\n  ---> use --kernels portable", chunk.experts,
            (int)MOST_EXPERTS);
    }
    args.chunk = chunk;
    args.h = h;
    args.rows = rows;
    args.d = d;
    args.F = F;
    args.N = N;
    args.steps = ceil_div<int>(k, STEP_K);
    args.m_tiles = ceil_div<int>(d, TILE_M);
    return args;
}

template <class V> static void start_variant(Arguments args, cudaStream_t stream) {
    static_assert(V::stages(MOST_EXPERTS) >= 2, "the plan of most experts leaves room for a ring");
    args.n_tiles = ceil_div<int>(args.N, V::N);
    args.stages = V::stages(args.chunk.experts);
    int shared = V::other_bytes(args.chunk.experts) + args.stages * V::STAGE_BYTES;
    void (*kernel)(Arguments) = grouped_kernel<V>;
    launch(kernel, num_sms() / V::CLUSTER * V::CLUSTER, BLOCK_THREADS, (size_t)shared, stream, args);
}

template <int PRODUCT, int CLUSTER = 2> static void start(Arguments args, int BN, cudaStream_t stream) {
    if (BN == 256) {
        if constexpr (PRODUCT != DOWN_BACKWARD) {
            start_variant<Variant<PRODUCT, 256, CLUSTER>>(args, stream);
        }
    } else if (BN == 192) {
        start_variant<Variant<PRODUCT, 192, CLUSTER>>(args, stream);
    } else {
        start_variant<Variant<PRODUCT, 128, CLUSTER>>(args, stream);
    }
}

enum { BOX_ACROSS = STEP_K }; // k of a box of an operand stored across k

// columns of H, from `first` on, as an operand
static inline CUtensorMap h_operand(ChunkH h, int first, int columns, int F, int box_rows) {
    return tensor_map(h.buffer + first, columns, h.rows, 1, box_rows, 3 * F);
}

// H as an epilogue reads and writes it, [rows][3][F], in boxes of `parts` of G, U and gate A: a box ends
// where G ends
static inline CUtensorMap h_results(ChunkH h, int F, int box_rows, int parts, int columns) {
    return tensor_map(h.buffer, false, F, 3, h.rows, parts, box_rows, columns);
}

// results of the chunk's rows
static inline CUtensorMap row_results(const floatX *out, int columns, int rows) {
    return tensor_map(out, false, columns, rows, 1, GROUP_ROWS, 1, PART_COLUMNS);
}

static inline void grouped_up_forward(ChunkH h, int again, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, h, x, d, F, F, d);
    int BN = row_tile(F, 128);
    args.again = again;
    args.out = h_results(h, F, WARP_ROWS, h.alone ? 1 : 3, PART_COLUMNS);
    args.b = paired_rows_map(w_gate_up, d, F, 2 * chunk.experts, BN / 2); // a sheet: gate's or up's rows
    bool clusters = 4 * (int64_t)d * F > alone_bytes();
    if (h.alone) {
        clusters ? start<GATED_FORWARD>(args, BN, stream) : start<GATED_FORWARD, 1>(args, BN, stream);
    } else {
        clusters ? start<UP_FORWARD>(args, BN, stream) : start<UP_FORWARD, 1>(args, BN, stream);
    }
}

static inline void grouped_down_forward(floatX *y, ChunkH h, const floatX *w_down, RowChunk chunk, int d,
                                        int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, h, NULL, d, F, d, F);
    int BN = row_tile(d, 256);
    args.out = row_results(y, d, chunk.rows);
    args.a = h_operand(h, 2 * F, F, F, GROUP_ROWS);
    args.b = tensor_map(w_down, F, d, chunk.experts, BN / 2);
    start<DOWN_FORWARD>(args, BN, stream);
}

static inline void grouped_down_backward(ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    Arguments args = arguments(chunk, h, dy, d, F, F, d);
    args.dgate_partial = dgate_partial;
    args.out = h_results(h, F, GROUP_ROWS, 1, SLOT_F);
    args.b = tensor_map(w_down, F, d, chunk.experts, BOX_ACROSS);
    start<DOWN_BACKWARD>(args, down_backward_tile(F), stream);
}

static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, h, NULL, d, F, d, 2 * F);
    args.out = row_results(dx, d, chunk.rows);
    args.a = h_operand(h, 0, 2 * F, F, GROUP_ROWS);
    args.b = tensor_map(w_gate_up, d, 2 * F, chunk.experts, BOX_ACROSS);
    start<UP_BACKWARD>(args, row_tile(d, 256), stream);
}

static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, ChunkH h, RowChunk chunk, int d,
                                      int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, h, dy, d, F, F, 0);
    args.out = tensor_map(dw_down, true, F, d, chunk.experts, GROUP_ROWS, 1, PART_COLUMNS);
    args.b = h_operand(h, 2 * F, F, F, BOX_ACROSS);
    start<DOWN_WGRAD>(args, wgrad_tile(chunk.experts, d, F), stream);
}

static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    Arguments args = arguments(chunk, h, x, d, F, 2 * F, 0);
    args.out = tensor_map(dw_gate_up, true, d, 2 * F, chunk.experts, PART_COLUMNS, 1, PART_COLUMNS);
    args.b = h_operand(h, 0, 2 * F, F, BOX_ACROSS);
    start<UP_WGRAD>(args, wgrad_tile(chunk.experts, d, 2 * F), stream);
}

} // namespace hopper

#endif
#endif
