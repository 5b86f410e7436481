/*
Sums and maxima over a warp's lanes and over a block, prefix sums, and sums of arrays into one double.

    quad_, group_, warp_, block_     4 lanes, 1 .. 32 lanes, a warp, a block
    warp_prefix_sum                  over this lane and the lower ones
    block_exclusive_sum              over the lower threads
    scan_in_one_block                of an array
    add_all, add_partials            a whole array, by one block

Addition is not associative, so the order of the terms is part of what a function is: each adds in a tree
whose shape depends on the number of terms alone, and has the same bits each time. Unless a function says
otherwise, all threads of the warp (of the block) call it and all get the result; a block is one-dimensional,
of whole warps.

Groups: a token with E experts is served by lanes_of(E) = 1, 2, 4, .. 32 neighbouring lanes of a warp. Lane l
takes the experts l, l + lanes, ... With E = 8 a warp serves four tokens, and its loads are still consecutive.
*/
#ifndef SUMS_CUH
#define SUMS_CUH

#include "llmc/gpu/cuda_common.cuh"
// defines: launch, ceil_div

// ----------------------------------------------------------------------------
// groups of lanes

enum { GROUP_BLOCK = 256 }; // threads of a block that is made of groups
static_assert(GROUP_BLOCK % 32 == 0, "no group crosses the end of a block");

static inline int lanes_of(int E) {
    int lanes = 1;
    while (lanes < 32 && lanes < E) {
        lanes *= 2;
    }
    return lanes;
}

// blocks for one group per token
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

// the group's predicates, lane l's in bit l
__device__ __forceinline__ uint32_t group_ballot(bool predicate, int lanes) {
    int first = (int)threadIdx.x % 32 & ~(lanes - 1);
    return __ballot_sync(0xffffffffu, predicate) >> first & 0xffffffffu >> (32 - lanes);
}

__device__ __forceinline__ uint32_t bits_below(int bit) {
    return (1u << bit) - 1;
}

// ----------------------------------------------------------------------------
// quads, warps, blocks

// neighbours first, where group_sum adds lanes 2 apart first
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float warp_sum(float x) {
    return group_sum(x, 32);
}

__device__ __forceinline__ float warp_max(float x) {
    return group_max(x, 32);
}

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    __syncthreads(); // an earlier call's sums have been read
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f);
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_max(partial[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0]);
}

// ----------------------------------------------------------------------------
// prefix sums

// x of this lane and of all lower ones
__device__ __forceinline__ int warp_prefix_sum(int x) {
    int lane = (int)threadIdx.x % 32;
    for (int offset = 1; offset < 32; offset *= 2) {
        int below = __shfl_up_sync(0xffffffffu, x, offset);
        x += lane >= offset ? below : 0;
    }
    return x;
}

// x of all lower threads; *total: of all threads
__device__ __forceinline__ int block_exclusive_sum(int x, int *total) {
    __shared__ int warp_totals[32];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    int inclusive = warp_prefix_sum(x);
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
// many terms into one double

// The sum in thread 0, elsewhere 0: the upper half of the threads is added to the lower half, and so on. Once
// per kernel: no barrier keeps a second call from overwriting what the first still reads
template <int THREADS> __device__ __forceinline__ double block_sum_by_halves(double x) {
    static_assert((THREADS & (THREADS - 1)) == 0, "threads are halved until one is left");
    __shared__ double sums[THREADS];
    int thread = (int)threadIdx.x;
    sums[thread] = x;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) {
            sums[thread] += sums[thread + step];
        }
    }
    return thread == 0 ? sums[0] : 0.0;
}

template <int THREADS, class T>
static __global__ void __launch_bounds__(THREADS)
    add_all_kernel(double *sum, const T *x, int64_t n, double scale) {
    double mine = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
        mine += (double)x[i];
    }
    double total = block_sum_by_halves<THREADS>(mine);
    if (threadIdx.x == 0) {
        *sum += scale * total;
    }
}

// *sum += scale (x[0] + .. + x[n - 1]), by one block: each thread its terms in order, then the threads
template <int THREADS, class T>
static void add_all(double *sum, const T *x, int64_t n, double scale, cudaStream_t stream) {
    launch(add_all_kernel<THREADS, T>, 1, THREADS, 0, stream, sum, x, n, scale);
}

// A kernel that sums many terms leaves a partial sum per block, which add_partials adds
enum { SUM_MOST_BLOCKS = 512, SUM_THREADS = 256 };

// for up to n terms; of sizes alone, never of the device: the order of a sum must not depend on it
static inline int sum_blocks(int64_t n) {
    return (int)min(ceil_div(n, (int64_t)SUM_THREADS), (int64_t)SUM_MOST_BLOCKS);
}

// each warp in a tree, then the warps in order; once per kernel, likewise
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

// a thread per partial sum
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
