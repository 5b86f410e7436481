/*
The grouped GEMM on Hopper: what becomes of a tile's sums. Four epilogues, named as the portable ones
(grouped_portable_epilogues.cuh): SwigluForward, StoreRows, SwigluBackward, AddToWeights. Each is a
consumer's, 64 rows of the tile, and has

    any                       a tile is held whose results have not left
    take(acc)                 the tile's sums: to be held (AddToWeights: to leave at once)
    leave(part, next, mine)   part 0, 1, ... of what is held leaves; next is the tile that is multiplied
                              meanwhile, mine: this consumer has rows of it
    hold(next, mine)          and that one becomes the held one

Results leave by way of shared memory, from where TMA takes them: the consumer's four warps put a part, 64
rows x 32 columns, meet, and one thread starts the copy. The place is free when the copy has read it.
SwigluForward's warps wait for no other: each takes its own 16 rows. What lies behind an edge of d or F is not
stored; nor are the rows of a half tile that is nobody's.

Formulas, with silu(g) = g s, s = sigmoid(g), of the rounded G and U:

    SwigluForward    gate A = gate U silu(G)
    SwigluBackward   dG = gate dA' U s (1 + G (1 - s));  dU = gate dA' silu(G);  dgate's part = <dA', A>
*/
#ifndef GROUPED_HOPPER_EPILOGUES_CUH
#define GROUPED_HOPPER_EPILOGUES_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/grouped_hopper_tiles.cuh"
// defines: sigmoid_ftz; Variant, Tile, Arguments

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace hopper {

// the first of this thread's two rows of the block's tile
__device__ __forceinline__ int thread_row(int group) {
    return group * GROUP_ROWS + own_row();
}

// of a warpgroup; the same for all lanes, and so that the compiler knows it
__device__ __forceinline__ int group_warp(void) {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x % GROUP_THREADS / 32, 0);
}

__device__ __forceinline__ void load_gates(float (&gate)[2], const Arguments &args, const Tile &tile,
                                           int group) {
    const float *gates = args.chunk.gate_of_row + args.chunk.first + tile.m + thread_row(group);
    gate[0] = gates[0];
    gate[1] = gates[8];
}

// A tile's results until they leave: rounded pairs, half of the registers of the sums
template <class V> struct Held {
    uint32_t pairs[V::BN / 4];
    Tile tile;
    bool any;

    __device__ __forceinline__ void take(const float (&acc)[V::BN / 2]) {
#pragma unroll
        for (int i = 0; i < V::BN / 4; i++) {
            pairs[i] = pack2(acc[2 * i], acc[2 * i + 1]);
        }
    }
};

// A consumer's places in shared memory for what its four warps let leave together
struct Exit {
    uint32_t memory;
    int group, warp;
    int left; // copies so far

    __device__ __forceinline__ Exit(uint32_t memory_, int group_)
        : memory(memory_), group(group_), warp(group_warp()), left(0) {
    }
    // one thread, always the same, starts the copies
    template <class Start> __device__ __forceinline__ void by_one(const Start &start) const {
        if (warp == 0 && elect_one()) {
            start();
        }
    }
    __device__ __forceinline__ void meet() const {
        named_barrier(1 + group, GROUP_THREADS);
    }
    // until all but PENDING copies have left
    template <int PENDING> __device__ __forceinline__ void wait_free() const {
        by_one([] { tma_wait_read<PENDING>(); });
        meet();
    }
    // all have put theirs; the starting thread may copy
    __device__ __forceinline__ void full() {
        fence_async_proxy();
        meet();
        left++;
    }
};

// ----------------------------------------------------------------------------
// G and U, rounded, and gate silu(G) U of what was rounded

// A warp's place in shared memory has 16 rows x 32 columns of G, U and gate A: 64-byte lines, swizzled, three
// a row. The 32 columns take two parts, rows r and rows r + 8: paired_rows_map's order of B's rows has made a
// thread's results 16 bytes of a line. GATED_FORWARD has gate A's lines alone, one a row
template <class V> struct SwigluForward : Held<V> {
    const Arguments &args;
    int group, first_row; // of the warp's rows in the chunk's first tile, in the map
    float gate[2];        // of rows row and row + 8
    uint32_t memory;      // the warp's
    static constexpr int LINES = V::ALONE ? 1 : 3, FIRST = 3 - LINES; // of G, U, gate A
    static constexpr uint32_t HALF_BYTES = WARP_ROWS / 2 * LINES * PART_COLUMNS * 2;
    uint32_t lines[LINES]; // where lane 4 r + t puts row r's t-th 16 bytes

    __device__ __forceinline__ SwigluForward(const Arguments &args_, int group_, uint32_t memory_, uint32_t)
        : args(args_), group(group_) {
        uint32_t warp = (uint32_t)group_warp(), lane = threadIdx.x % 32;
        memory = memory_ + warp * WARP_PART_BYTES;
        first_row = (int)*args.h.first + group * GROUP_ROWS + (int)warp * WARP_ROWS;
        for (uint32_t i = 0; i < LINES; i++) {
            uint32_t line = LINES * (lane / 4) + i;
            lines[i] = memory + line * 64 + ((line / 2 ^ lane) % 4 << 4);
        }
        this->any = false;
    }
    __device__ __forceinline__ void hold(const Tile &next, bool mine) {
        this->any = mine;
        this->tile = next;
        if (mine) {
            load_gates(gate, args, next, group);
        }
    }
    // of G (u 0) or U (1), whose columns are dealt out in pairs: the thread's 8 neighbours of columns 32 i ..
    __device__ __forceinline__ void get(uint32_t (&v)[4], int u, int i, int half) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = this->pairs[(V::BN / 16 * u + V::BN / 64 * j + i) * 2 + half];
        }
    }
    __device__ __forceinline__ void leave(int part, const Tile &, bool) const {
        int i = part / 2, half = part % 2, f = this->tile.n + PART_COLUMNS * i;
        uint32_t v[3][4];
        if (!this->any || f >= args.F) {
            return;
        }
        get(v[0], 0, i, half);
        get(v[1], 1, i, half);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float low = low_half(v[0][j]), high = high_half(v[0][j]);
            v[2][j] = pack2(gate[half] * low * sigmoid_ftz(low) * low_half(v[1][j]),
                            gate[half] * high * sigmoid_ftz(high) * high_half(v[1][j]));
        }
        if (half == 0) { // until the last copy has left
            if (elect_one()) {
                tma_wait_read<0>();
            }
            __syncwarp();
        }
        for (int j = 0; j < LINES; j++) { // rows r + 8: 8 rows' lines further, swizzled as rows r
            shared_store(lines[j] + half * HALF_BYTES, v[FIRST + j]);
        }
        if (half == 1) {
            fence_async_proxy();
            __syncwarp();
            if (elect_one()) {
                tma_store(&args.out, memory, f, FIRST, first_row + this->tile.m);
                tma_commit();
            }
        }
    }
};

// ----------------------------------------------------------------------------
// Y or dX', rounded

template <class V> struct StoreRows : Held<V> {
    const Arguments &args;
    Exit exit;

    __device__ __forceinline__ StoreRows(const Arguments &args_, int group, uint32_t memory, uint32_t)
        : args(args_), exit(memory, group) {
        this->any = false;
    }
    __device__ __forceinline__ void hold(const Tile &next, bool mine) {
        this->any = mine;
        this->tile = next;
    }
    __device__ __forceinline__ void leave(int part, const Tile &, bool) {
        int n = this->tile.n + PART_COLUMNS * part;
        uint32_t place = exit.memory + exit.left % PART_PLACES * PART_BYTES;
        uint32_t thread = threadIdx.x % GROUP_THREADS, r = thread / 32 * 16 + thread % 8;
        if (!this->any || n >= args.N) {
            return;
        }
        exit.wait_free<PART_PLACES - 1>();
#pragma unroll
        for (int half = 0; half < 2; half++) { // 64-byte rows: lane 8 j + r has row r's j-th 16 bytes
            uint32_t v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                v[j] = this->pairs[(4 * part + j) * 2 + half];
            }
            store_matrices(place + (r + 8 * half) * 64 + ((r / 2 ^ thread % 32 / 8) % 4 << 4), v);
        }
        exit.full();
        exit.by_one([&] {
            tma_store(&args.out, place, n, this->tile.m + exit.group * GROUP_ROWS, 0);
            tma_commit();
        });
    }
};

// ----------------------------------------------------------------------------
// dG, dU in place of G, U, and the tile's part of dgate

// H comes and goes in slots, 64 rows x 64 columns of G and of U. The consumer's pieces of H, of one tile
// after the other, go through its two slots in turn: TMA brings a piece, the consumer computes in place, TMA
// takes it away. The next one is asked for as soon as the slot's results have left, also that of the tile
// that is multiplied now
template <class V> struct SwigluBackward {
    const Arguments &args;
    Exit exit;
    uint32_t landed; // slot 0's barrier: TMA's bytes, the slot may be read
    uint32_t lane;   // offset of the row and 16 bytes that this lane gives load_matrices, unswizzled
    int first_row;   // in the map, of the consumer's first row in the chunk's first tile
    int asked, done; // pieces so far whose copies have been started; that have been computed
    int of_tile;     // number of the held tile's first piece
    float sums[V::BN / 2];
    float gate[2], dot[2]; // of rows row and row + 8
    Tile tile;
    int pieces; // of the held tile
    bool any;

    __device__ __forceinline__ SwigluBackward(const Arguments &args_, int group, uint32_t memory,
                                              uint32_t landed_)
        : args(args_), exit(memory, group), landed(landed_ + group * SLOTS * 8), asked(0), done(0),
          of_tile(0), pieces(0), any(false) {
        uint32_t thread = threadIdx.x % GROUP_THREADS, row = thread / 32 * 16 + thread % 8;
        lane = row * 128 + ((row ^ thread % 32 / 8) % 8 << 4);
        first_row = (int)*args.h.first + group * GROUP_ROWS;
    }
    __device__ __forceinline__ uint32_t slot(int piece) const {
        return exit.memory + piece % SLOTS * SLOT_BYTES;
    }
    __device__ __forceinline__ int pieces_of(const Tile &its, bool mine) const {
        int columns = min(args.F - its.n, (int)V::BN);
        return !mine || columns <= 0 ? 0 : (columns + SLOT_F - 1) / SLOT_F;
    }
    __device__ __forceinline__ void take(const float (&acc)[V::BN / 2]) {
#pragma unroll
        for (int i = 0; i < V::BN / 2; i++) {
            sums[i] = acc[i];
        }
    }
    __device__ __forceinline__ void hold(const Tile &next, bool mine) {
        of_tile += pieces;
        pieces = pieces_of(next, mine);
        any = mine;
        tile = next;
        dot[0] = dot[1] = 0.0f;
        if (mine) {
            load_gates(gate, args, next, exit.group);
        }
    }
    // G and U of the next pieces, as far as slots are free: of the held tile, then of the one that is
    // multiplied
    __device__ __forceinline__ void ask(const Tile &next, int next_pieces) {
        while (asked - done < SLOTS) {
            int p = asked - of_tile;
            bool later = p >= pieces;
            p -= later ? pieces : 0;
            if (later && p >= next_pieces) {
                return;
            }
            exit.by_one([&] {
                uint32_t barrier = landed + asked % SLOTS * 8;
                int f = (later ? next.n : tile.n) + p * SLOT_F, row = first_row + (later ? next.m : tile.m);
                tma_wait_read<0>(); // the slot's last results have left
                barrier_expect(barrier, SLOT_BYTES);
                tma_load(slot(asked), &args.out, barrier, f, 0, row);
                tma_load(slot(asked) + BLOCK_BYTES, &args.out, barrier, f, 1, row);
            });
            asked++;
        }
    }
    // one pair of columns of dA', G and U: G, U become dG, dU; returns dA' A
    static __device__ __forceinline__ float pair(uint32_t &g, uint32_t &u, const float *da, float gate) {
        float G[2] = {low_half(g), high_half(g)}, U[2] = {low_half(u), high_half(u)};
        float dG[2], dU[2], dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float s = sigmoid_ftz(G[i]), silu = G[i] * s, d = gate * da[i];
            dot += da[i] * silu * U[i];
            dG[i] = d * U[i] * (s + silu * (1.0f - s));
            dU[i] = d * silu;
        }
        g = pack2(dG[0], dG[1]);
        u = pack2(dU[0], dU[1]);
        return dot;
    }
    // 32 columns of the slot, in place; `half`: of rows row and row + 8
    __device__ __forceinline__ float pairs(int part, int half) const {
        uint32_t at = ((slot(done) + lane) ^ (uint32_t)(part % 2) << 6) + half * 8 * 128, g[4], u[4];
        float sum = 0.0f;
        load_matrices(g, at);
        load_matrices(u, at + BLOCK_BYTES);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += pair(g[j], u[j], &sums[part * 16 + 2 * half + 4 * j], gate[half]);
        }
        store_matrices(at, g);
        store_matrices(at + BLOCK_BYTES, u);
        return sum;
    }
    // the tile's part of dgate, summed: the quad's lanes have one row's
    __device__ __forceinline__ void store_dgate() const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = dot[half] + __shfl_xor_sync(0xffffffffu, dot[half], 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (threadIdx.x % 4 == 0) {
                int64_t row = tile.m + thread_row(exit.group) + 8 * half;
                args.dgate_partial[row * args.n_tiles + tile.n / V::BN] = sum;
            }
        }
    }
    // half of a piece of H; one part more than there are columns asks for the next tile's
    __device__ __forceinline__ void leave(int part, const Tile &next, bool mine) {
        int piece = part / 2, f = tile.n + piece * SLOT_F;
        ask(next, pieces_of(next, mine));
        if (part == V::PARTS || !any || piece >= pieces) {
            return;
        }
        if (part % 2 == 0) {
            barrier_wait(landed + done % SLOTS * 8, done / SLOTS % 2);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            dot[half] += pairs(part, half);
        }
        if (part % 2 == 0) {
            return;
        }
        exit.full();
        exit.by_one([&] {
            tma_store(&args.out, slot(done), f, 0, first_row + tile.m);
            tma_store(&args.out, slot(done) + BLOCK_BYTES, f, 1, first_row + tile.m);
            tma_commit();
        });
        done++;
        if (piece == pieces - 1) {
            store_dgate();
        }
    }
};

// ----------------------------------------------------------------------------
// dW[m][n] += D, or transposed, dW[n][m] += D: = D where nothing has been added yet

// The tiles are long (k are rows), so their results leave at once. In shared memory a part's rows are of 32
// numbers, 128 bytes, swizzled; transposed there are two boxes, the second of columns m + 32 on
template <class V> struct AddToWeights {
    const Arguments &args;
    Exit exit;
    Tile tile;
    static constexpr bool any = false;

    __device__ __forceinline__ AddToWeights(const Arguments &args_, int group, uint32_t memory, uint32_t)
        : args(args_), exit(memory, group) {
    }
    __device__ __forceinline__ void leave(int, const Tile &, bool) {
    }
    __device__ __forceinline__ void hold(const Tile &next, bool) {
        tile = next;
    }
    // the pair of columns 8 j + 2 t, + 1 of a row of the part
    __device__ __forceinline__ void put(uint32_t place, uint32_t row, uint32_t j, const float *pair) const {
        uint32_t t = threadIdx.x % 4;
        if (V::PRODUCT == DOWN_WGRAD) {
            uint32_t piece = (2 * j + t / 2) ^ row % 8;
            shared_store(place + row * 128 + (piece << 4) + t % 2 * 8, pair[0], pair[1]);
        } else {
            uint32_t column = 8 * j + 2 * t, piece = row % 32 / 4;
            uint32_t box = place + row / 32 * (ADD_BYTES / 2) + row % 4 * 4;
            shared_store(box + column * 128 + ((piece ^ 2 * t) << 4), pair[0]);
            shared_store(box + (column + 1) * 128 + ((piece ^ (2 * t + 1)) << 4), pair[1]);
        }
    }
    __device__ __forceinline__ void add_box(uint32_t from, int column, int row, bool set) const {
        if (set) {
            tma_store(&args.out, from, column, row, tile.expert);
        } else {
            tma_add(&args.out, from, column, row, tile.expert);
        }
    }
    __device__ __forceinline__ void take(const float (&acc)[V::BN / 2]) {
        int m = tile.m + exit.group * GROUP_ROWS;
#pragma unroll
        for (int part = 0; part < V::BN / PART_COLUMNS; part++) {
            uint32_t place = exit.memory + exit.left % ADD_PLACES * ADD_BYTES;
            int n = tile.n + PART_COLUMNS * part;
            if (n >= args.N || m >= args.d) {
                return;
            }
            exit.wait_free<ADD_PLACES - 1>();
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) {
                    put(place, own_row() + 8 * half, j, &acc[(4 * part + j) * 4 + 2 * half]);
                }
            }
            exit.full();
            exit.by_one([&] {
                bool set = sets_gradient(args.chunk, tile.expert);
                if (V::PRODUCT == DOWN_WGRAD) {
                    add_box(place, n, m, set);
                } else {
                    add_box(place, m, n, set);
                    add_box(place + ADD_BYTES / 2, m + 32, n, set);
                }
                tma_commit();
            });
        }
    }
};

} // namespace hopper

#endif
#endif
