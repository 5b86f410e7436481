/*
The pair list on the device (pairs.h says what it is), and how routers make one.

A router's decision is a bit mask [N, W] of 32-bit words, W = ceil(E / 32): bit e % 32 of word e / 32 of token
t is 1 iff expert e is active for t. One bit a (token, expert) is little to read three times, and a pair's
place within its token is a popcount of the bits below it. Every method that can decide one pair by itself is
a predicate for mask_where(); pairs_from_mask() makes compressed rows of any mask:

    row_start[t] = sum_{u < t} popcount(mask[u])            a prefix sum over tokens
    pair p = row_start[t] + popcount(mask[t] below e):      expert[p] = e, gate[p] = score[t, e]
    counts[e] = sum_t bit(t, e)

    launch 1  tiles of 256 tokens: row lengths scanned within the tile, its total, its count of each expert
    launch 2  one block scans the tiles' totals; the others add up the tiles' counts, 32 experts a block
    launch 3  `lanes` threads a token write its pairs, neighbours in memory by neighbours in the warp

Nothing depends on the order in which blocks run, so the list is the same each time. Nothing waits for the host:
the number of pairs P is row_start[N], on the device.

Groups: a token with E experts is served by lanes_of(E) = 1, 2, 4, .. 32 neighbouring lanes of a warp, lane l
taking the experts l, l + lanes, ...: with E = 8 a warp serves four tokens and its loads are still
consecutive. With lanes < 32 all of a token's bits are in one word.

N tokens, E experts, P pairs. N * E < 2^31 (indices are int; products of sizes are 64 bits).
*/
#ifndef PAIRS_CUH
#define PAIRS_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/pairs.h"
// defines: launch, floatX, ceil_div, PairList

typedef struct {
    int *row_start; // [N + 1]
    int *expert;    // [N E]: room for all pairs
    float *gate;    // [N E]
    int *counts;    // [E] tokens of each expert
} DevicePairs;

typedef struct {
    int64_t active;      // pairs
    int64_t zero_expert; // tokens without a pair
} RoutingStats;

// ----------------------------------------------------------------------------
// scratch: consecutive pieces of one buffer, each 256-byte aligned. The function that hands them out also
// counts them, with base == NULL: sizes and layout cannot disagree

typedef struct {
    unsigned char *base;
    size_t used;
} Scratch;

template <class T> static T *scratch_take(Scratch *scratch, int64_t n) {
    T *piece = scratch->base == NULL ? NULL : (T *)(scratch->base + scratch->used);
    scratch->used += ceil_div<size_t>((size_t)n * sizeof(T), 256) * 256;
    return piece;
}

// ----------------------------------------------------------------------------
// prefix sums

enum { SCAN_BLOCK = 1024 };

// sum of x over the block's lower threads; *total: over all of them. The block is of whole warps, all call
__device__ __forceinline__ int block_exclusive_sum(int x, int *total) {
    __shared__ int warp_totals[32];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int inclusive = x;
    for (int offset = 1; offset < 32; offset *= 2) {
        int below = __shfl_up_sync(0xffffffffu, inclusive, offset);
        inclusive += lane >= offset ? below : 0;
    }
    __syncthreads(); // an earlier call's totals have been read
    if (lane == 31) {
        warp_totals[warp] = inclusive;
    }
    __syncthreads();
    int before = 0, sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) {
        before += i < warp ? warp_totals[i] : 0;
        sum += warp_totals[i];
    }
    *total = sum;
    return before + inclusive - x;
}

// by one block: out[i] = in[0] + .. + in[i - 1], out[n] = the sum of all
__device__ __forceinline__ void scan_in_one_block(int *out, const int *in, int n) {
    int carried = 0, total;
    for (int first = 0; first < n; first += (int)blockDim.x) {
        int i = first + (int)threadIdx.x;
        int before = block_exclusive_sum(i < n ? in[i] : 0, &total);
        if (i < n) {
            out[i] = carried + before;
        }
        carried += total;
    }
    if (threadIdx.x == 0) {
        out[n] = carried;
    }
}

// ----------------------------------------------------------------------------
// groups of lanes

enum { GROUP_BLOCK = 256 }; // threads of a block that is made of groups

__host__ __device__ __forceinline__ int mask_words(int E) {
    return ceil_div(E, 32);
}

static inline int lanes_of(int E) {
    int lanes = 1;
    while (lanes < 32 && lanes < E) {
        lanes *= 2;
    }
    return lanes;
}

// blocks for one group a token
static inline int group_blocks(int N, int lanes) {
    return ceil_div(N, GROUP_BLOCK / lanes);
}

// the token of this thread's group (may be >= N)
__device__ __forceinline__ int group_token(int lanes) {
    return (int)(blockIdx.x * (blockDim.x / (unsigned)lanes) + threadIdx.x / (unsigned)lanes);
}

__device__ __forceinline__ int group_lane(int lanes) {
    return (int)threadIdx.x & (lanes - 1);
}

// sums and maxima over a group, and its lanes' predicates as bits; all of the warp's threads call
template <class T> __device__ __forceinline__ T group_sum(T x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
    }
    return x;
}

__device__ __forceinline__ float group_max(float x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    }
    return x;
}

__device__ __forceinline__ uint32_t group_ballot(bool predicate, int lanes) {
    int first = (int)threadIdx.x % 32 & ~(lanes - 1);
    return __ballot_sync(0xffffffffu, predicate) >> first & 0xffffffffu >> (32 - lanes);
}

__device__ __forceinline__ uint32_t bits_below(int bit) {
    return (1u << bit) - 1;
}

// ----------------------------------------------------------------------------
// a mask from a predicate active(t, e)

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

enum { PAIR_TILE = 256 }; // tokens

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
static __global__ void __launch_bounds__(SCAN_BLOCK)
    pairs_total_kernel(DevicePairs pairs, PairsScratch p, int tiles, int N, int E) {
    __shared__ int partial[32][32];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    if (blockIdx.x == 0) {
        scan_in_one_block(p.tile_start, p.totals, tiles);
        if (threadIdx.x == 0) {
            pairs.row_start[N] = p.tile_start[tiles]; // this thread wrote it
        }
        return;
    }
    int e = ((int)blockIdx.x - 1) * 32 + lane, sum = 0;
    for (int tile = warp; tile < tiles && e < E; tile += 32) {
        sum += p.tile_counts[(int64_t)tile * E + e];
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && e < E) {
        sum = 0;
        for (int i = 0; i < 32; i++) {
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
    launch(pairs_total_kernel, 1 + mask_words(E), SCAN_BLOCK, 0, stream, pairs, p, tiles, N, E);
    launch(pairs_write_kernel, group_blocks(N, lanes), GROUP_BLOCK, 0, stream, pairs, p, score, mask, N, E,
           lanes);
}

// ----------------------------------------------------------------------------
// what is read off a list

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

// ----------------------------------------------------------------------------
// sums of many terms into one double: a partial sum a block, then one block adds them, in a fixed order

enum { SUM_MOST_BLOCKS = 512, SUM_THREADS = 256 };

// for up to n terms; of sizes alone, never of the device: the order of a sum must not depend on it
static inline int sum_blocks(int64_t n) {
    return (int)min(ceil_div(n, (int64_t)SUM_THREADS), (int64_t)SUM_MOST_BLOCKS);
}

// every thread of the block calls and gets the sum
__device__ __forceinline__ double block_sum_double(double x) {
    __shared__ double warp_sums[32];
    x = group_sum(x, 32);
    if (threadIdx.x % 32 == 0) {
        warp_sums[threadIdx.x / 32] = x;
    }
    __syncthreads();
    double sum = 0.0;
    for (int warp = 0; warp < (int)blockDim.x / 32; warp++) {
        sum += warp_sums[warp];
    }
    return sum;
}

static __global__ void __launch_bounds__(SUM_MOST_BLOCKS)
    add_partials_kernel(double *sum, const double *partial, int blocks, double scale) {
    double total = block_sum_double((int)threadIdx.x < blocks ? partial[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) {
        *sum += scale * total;
    }
}

// *sum += scale * (partial[0] + .. + partial[blocks - 1])
static inline void add_partials(double *sum, const double *partial, int blocks, double scale,
                                cudaStream_t stream) {
    launch(add_partials_kernel, 1, SUM_MOST_BLOCKS, 0, stream, sum, partial, blocks, scale);
}

#endif
