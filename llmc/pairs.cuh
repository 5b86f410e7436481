/*
The pair list on the device (pairs.h says what it is), and how routers make one.

A router's decision is a bit mask [N, W] of 32-bit words, W = ceil(E / 32): bit e % 32 of word e / 32 of token
t is 1 iff expert e is active for t. One bit per token and expert is little to read three times, and a pair's
place within its token is a popcount of the bits below it. Every method that can decide one pair by itself is
a predicate for mask_where(); pairs_from_mask() makes compressed rows of any mask:

    row_start[t] = sum_{u < t} popcount(mask[u])            a prefix sum over tokens
    pair p = row_start[t] + popcount(mask[t] below e):      expert[p] = e, gate[p] = score[t, e]
    counts[e] = sum_t bit(t, e)

    launch 1  tiles of 256 tokens: row lengths scanned within the tile, its total, its count of each expert
    launch 2  one block scans the tiles' totals; the others add up the tiles' counts, 32 experts per block
    launch 3  a group of lanes per token (sums.cuh) writes its pairs, neighbouring lanes neighbouring pairs

Nothing depends on the order in which blocks run, so the list is the same each time. Nothing waits for the
host: the number of pairs P is row_start[N], on the device.

A group of lanes_of(E) lanes serves a token (sums.cuh); where that is fewer than 32, one word holds all of the
token's bits.

N tokens, E experts, P pairs. N * E < 2^31 (indices are int; products of sizes are 64 bits).
*/
#ifndef PAIRS_CUH
#define PAIRS_CUH

#include "llmc/gpu/sums.cuh"
#include "llmc/pairs.h"
// defines: launch, ceil_div, scratch_take, lanes_of, group_*, block_exclusive_sum; PairList

typedef struct {
    int *row_start;      // [N + 1]
    int *expert;         // [N E]: room for all pairs
    float *gate;         // [N E]
    int *counts;         // [E] tokens of each expert
    RouterRound *rounds; // [N, k], or NULL where the router does not draw
    Segments segments;   // which `expert` numbers, where the router merges experts
} DevicePairs;

typedef struct {
    int64_t active;      // pairs
    int64_t zero_expert; // tokens without a pair
} RoutingStats;

// ----------------------------------------------------------------------------
// a mask from a predicate active(t, e)

__host__ __device__ __forceinline__ int mask_words(int E) {
    return ceil_div(E, 32);
}

enum { MASK_WORDS_A_GROUP = 4 }; // so that as many loads are under way before the first is used

template <class Active>
static __global__ void __launch_bounds__(GROUP_BLOCK)
    mask_kernel(uint32_t *mask, Active active, int N, int E, int lanes) {
    int W = mask_words(E), groups = GROUP_BLOCK / lanes;
    int first = (int)blockIdx.x * groups * MASK_WORDS_A_GROUP + (int)threadIdx.x / lanes;
    bool on[MASK_WORDS_A_GROUP];
#pragma unroll
    for (int i = 0; i < MASK_WORDS_A_GROUP; i++) {
        int word = first + i * groups; // t W + w
        int t = word / W, e = word % W * 32 + group_lane(lanes);
        on[i] = t < N && e < E && active(t, e);
    }
#pragma unroll
    for (int i = 0; i < MASK_WORDS_A_GROUP; i++) {
        int word = first + i * groups;
        uint32_t bits = group_ballot(on[i], lanes);
        if (group_lane(lanes) == 0 && word < N * W) {
            mask[word] = bits;
        }
    }
}

template <class Active>
static void mask_where(uint32_t *mask, Active active, int N, int E, cudaStream_t stream) {
    int lanes = lanes_of(E);
    int blocks = ceil_div(N * mask_words(E), GROUP_BLOCK / lanes * MASK_WORDS_A_GROUP);
    launch(mask_kernel<Active>, blocks, GROUP_BLOCK, 0, stream, mask, active, N, E, lanes);
}

// a given active set [N, E], entries != 0
struct ActiveIfForced {
    const float *forced;
    int E;
    __device__ bool operator()(int t, int e) const {
        return forced[(int64_t)t * E + e] != 0.0f;
    }
};

// ----------------------------------------------------------------------------
// compressed rows from a mask

enum { PAIR_TILE = 256, TOTAL_THREADS = 1024 }; // a tile's tokens; threads of the second launch
static_assert(PAIR_TILE % 32 == 0, "a warp counts 32 tokens at a time");

typedef struct {
    int *place;       // [N] pairs of the tile before the token's
    int *totals;      // [tiles] pairs of each tile
    int *tile_start;  // [tiles + 1] their prefix sum
    int *tile_counts; // [tiles, E] tokens of each expert in each tile
} PairsScratch;

static inline PairsScratch pairs_scratch(Scratch *scratch, int N, int E) {
    int64_t tiles = ceil_div(N, (int)PAIR_TILE);
    PairsScratch p;
    p.place = scratch_take<int>(scratch, N);
    p.totals = scratch_take<int>(scratch, tiles);
    p.tile_start = scratch_take<int>(scratch, tiles + 1);
    p.tile_counts = scratch_take<int>(scratch, tiles * E);
    return p;
}

static inline size_t pairs_scratch_bytes(int N, int E) {
    Scratch s = {NULL, 0};
    pairs_scratch(&s, N, E);
    return s.used;
}

// how many of PAIR_TILE tokens from `first` have bit `lane` set in word w; a warp calls
__device__ __forceinline__ int tile_count(const uint32_t *mask, int first, int w, int N, int E) {
    int lane = (int)threadIdx.x % 32, W = mask_words(E);
    int bits = min(32, E - 32 * w), count = 0;
    for (int t = first + lane; t < first + PAIR_TILE; t += 32) {
        uint32_t word = t < N ? mask[(int64_t)t * W + w] : 0;
        uint32_t column = 0; // of the 32 x 32 bits of 32 tokens, the one of this lane's expert
        for (int bit = 0; bit < bits; bit++) {
            uint32_t users = __ballot_sync(0xffffffffu, word >> bit & 1);
            column = bit == lane ? users : column;
        }
        count += __popc(column);
    }
    return count;
}

static __global__ void __launch_bounds__(PAIR_TILE)
    pairs_count_kernel(PairsScratch p, const uint32_t *__restrict__ mask, int N, int E) {
    int W = mask_words(E), first = (int)blockIdx.x * PAIR_TILE, t = first + (int)threadIdx.x;
    int length = 0, total;
    for (int w = 0; w < W && t < N; w++) {
        length += __popc(mask[(int64_t)t * W + w]);
    }
    int before = block_exclusive_sum(length, &total);
    if (t < N) {
        p.place[t] = before;
    }
    if (threadIdx.x == 0) {
        p.totals[blockIdx.x] = total;
    }
    for (int w = (int)threadIdx.x / 32; w < W; w += PAIR_TILE / 32) {
        int e = 32 * w + (int)threadIdx.x % 32;
        int count = tile_count(mask, first, w, N, E);
        if (e < E) {
            p.tile_counts[(int64_t)blockIdx.x * E + e] = count;
        }
    }
}

// block 0: where each tile's pairs start, and P; block 1 + w: the counts of the experts of word w
static __global__ void __launch_bounds__(TOTAL_THREADS)
    pairs_total_kernel(DevicePairs pairs, PairsScratch p, int tiles, int N, int E) {
    __shared__ int partial[TOTAL_THREADS / 32][32];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    if (blockIdx.x == 0) {
        scan_in_one_block(p.tile_start, p.totals, tiles);
        if (threadIdx.x == 0) {
            pairs.row_start[N] = p.tile_start[tiles]; // this thread wrote it
        }
        return;
    }
    int e = ((int)blockIdx.x - 1) * 32 + lane, sum = 0;
    for (int tile = warp; tile < tiles && e < E; tile += TOTAL_THREADS / 32) {
        sum += p.tile_counts[(int64_t)tile * E + e];
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && e < E) {
        sum = 0;
        for (int i = 0; i < TOTAL_THREADS / 32; i++) {
            sum += partial[i][lane];
        }
        pairs.counts[e] = sum;
    }
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    pairs_write_kernel(DevicePairs pairs, PairsScratch p, const float *__restrict__ score,
                       const uint32_t *__restrict__ mask, int N, int E, int lanes) {
    int t = group_token(lanes), lane = group_lane(lanes), W = mask_words(E);
    if (t >= N) {
        return;
    }
    int start = p.tile_start[t / PAIR_TILE] + p.place[t];
    if (lane == 0) {
        pairs.row_start[t] = start;
    }
#pragma unroll 4
    for (int w = 0; w < W; w++) {
        uint32_t word = mask[(int64_t)t * W + w];
        if (word >> lane & 1) {
            int e = 32 * w + lane, pair = start + __popc(word & bits_below(lane));
            pairs.expert[pair] = e;
            pairs.gate[pair] = score != NULL ? score[(int64_t)t * E + e] : 1.0f;
        }
        start += __popc(word);
    }
}

// active where the mask's bit is set, gates taken from score [N, E] (or 1 everywhere when score is NULL)
static inline void pairs_from_mask(DevicePairs pairs, const float *score, const uint32_t *mask, int N, int E,
                                   void *scratch, cudaStream_t stream) {
    Scratch s = {(unsigned char *)scratch, 0};
    PairsScratch p = pairs_scratch(&s, N, E);
    int tiles = ceil_div(N, (int)PAIR_TILE), lanes = lanes_of(E);
    launch(pairs_count_kernel, tiles, PAIR_TILE, 0, stream, p, mask, N, E);
    launch(pairs_total_kernel, 1 + mask_words(E), TOTAL_THREADS, 0, stream, pairs, p, tiles, N, E);
    launch(pairs_write_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, pairs, p, score, mask, N, E,
           lanes);
}

// ----------------------------------------------------------------------------
// what is read off a list

// a thread per word: a token has few pairs, and its words read the same ones
static __global__ void __launch_bounds__(GROUP_BLOCK)
    pairs_to_bits_kernel(uint64_t *bits, DevicePairs pairs, int N, int W) {
    int i = (int)(blockIdx.x * GROUP_BLOCK + threadIdx.x), t = i / W;
    uint64_t word = 0;
    for (int p = t < N ? pairs.row_start[t] : 0; t < N && p < pairs.row_start[t + 1]; p++) {
        int e = pairs.expert[p];
        word |= (uint64_t)(e / 64 == i % W) << e % 64;
    }
    if (t < N) {
        bits[i] = word;
    }
}

// bits [N, bit_words(E)]
static inline void pairs_to_bits(uint64_t *bits, DevicePairs pairs, int N, int E, cudaStream_t stream) {
    int W = bit_words(E);
    launch(pairs_to_bits_kernel, ceil_div(N * W, (int)GROUP_BLOCK), GROUP_BLOCK, 0, stream, bits, pairs, N,
           W);
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    pairs_to_dense_kernel(float *gates, DevicePairs pairs, int N, int E, int lanes) {
    int t = group_token(lanes), lane = group_lane(lanes);
    for (int e = lane; e < E && t < N; e += lanes) {
        gates[(int64_t)t * E + e] = 0.0f;
    }
    __syncwarp(); // the zeros are in place before another lane writes a gate over one
    for (int p = t < N ? pairs.row_start[t] + lane : 0; t < N && p < pairs.row_start[t + 1]; p += lanes) {
        gates[(int64_t)t * E + pairs.expert[p]] = pairs.gate[p];
    }
}

// dense [N, E] picture of the gates: 0 where not active
static inline void pairs_to_dense(float *gates, DevicePairs pairs, int N, int E, cudaStream_t stream) {
    int lanes = lanes_of(E);
    launch(pairs_to_dense_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, gates, pairs, N, E, lanes);
}

// integers: the atomics' order does not show
static __global__ void __launch_bounds__(GROUP_BLOCK)
    routing_stats_kernel(RoutingStats *stats, DevicePairs pairs, int64_t *counts, int N, int E) {
    int i = (int)(blockIdx.x * GROUP_BLOCK + threadIdx.x);
    if (i < E && counts != NULL) {
        counts[i] += pairs.counts[i];
    }
    bool empty = i < N && pairs.row_start[i] == pairs.row_start[i + 1];
    unsigned long long found = (unsigned long long)__popc(__ballot_sync(0xffffffffu, empty));
    if (threadIdx.x % 32 == 0 && found > 0) {
        atomicAdd((unsigned long long *)&stats->zero_expert, found);
    }
    if (i == 0) {
        stats->active += pairs.row_start[N];
    }
}

// adds a layer's micro-batch to *stats and to counts [E] (NULL: none), all in device memory
static inline void routing_stats(RoutingStats *stats, DevicePairs pairs, int64_t *counts, int N, int E,
                                 cudaStream_t stream) {
    int most = N > E ? N : E;
    launch(routing_stats_kernel, ceil_div(most, (int)GROUP_BLOCK), GROUP_BLOCK, 0, stream, stats, pairs,
           counts, N, E);
}

#endif
