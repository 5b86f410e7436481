/*
RMSNorm and the router's logits of what it puts out, in one pass over the rows: equals rmsnorm_forward, and then
router_logits of gemm.cuh (in C matmul_forward), up to the order of the sums.

    out_nc = round(x_nc r_n w_c),  r_n as in rmsnorm.cuh;   logits_ne = sum_c out_nc router_ec

in fp32: the router's weights are their masters, and nothing but out is rounded. For at most 16 experts and rows
that a warp can hold; other shapes take the two calls.

A warp owns a few rows at a time, a lane the same columns of each, so that a weight that it reads from shared
memory serves all the rows. With ROWS rows and 32 / ROWS experts at a time a lane has 32 sums, and the warp
exchanges them so that lane i ends with the i-th: 31 shuffles, where one sum after another would take 160.

x, out [N, d] floatX, w [d], router [E, d], rstd [N], logits [N, E] fp32; scratch [3 E d]. d a multiple of 8.
Errors: none.
*/
#ifndef RMSNORM_ROUTER_CUH
#define RMSNORM_ROUTER_CUH

#include "gemm.cuh"
#include "rmsnorm.cuh"
// defines: GemmPlans, router_logits; rmsnorm_forward, load_packs, with_warp_packs

enum {
    RMSNORM_ROUTER_MOST_EXPERTS = 16,
    RMSNORM_ROUTER_THREADS = 128,
    RMSNORM_ROUTER_BLOCKS_PER_SM = 3 // leaves a thread 168 registers
};

// The sums of x[i] over the warp: lane i gets the i-th. Half of the lanes keep the upper half of x, the others the
// lower one, and so on: a template, so that x stays in registers
template <int HALF = 16> __device__ __forceinline__ float warp_sums(float *x) {
    bool upper = (threadIdx.x & HALF) != 0;
    for (int i = 0; i < HALF; i++) {
        float mine = upper ? x[i + HALF] : x[i], theirs = upper ? x[i] : x[i + HALF];
        x[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, HALF);
    }
    if constexpr (HALF > 1) {
        return warp_sums<HALF / 2>(x);
    }
    return x[0];
}

// An expert's weights in shared memory: first the first 16 bytes that belong to each pack of floatX, then the
// second ones, so that neighbouring lanes read neighbouring addresses
__device__ __forceinline__ int router_weight_place(int c, int d) {
    return (c % PACK_X / 4 * (d / PACK_X) + c / PACK_X) * 4; // of 4 columns from c on
}

__device__ __forceinline__ void keep_router_weights(float *kept, const float *router, int E, int d) {
#pragma unroll 4 // loads that are under way together
    for (int i = (int)threadIdx.x * 4; i < E * d; i += RMSNORM_ROUTER_THREADS * 4) {
        store_pack(kept + i / d * d + router_weight_place(i % d, d), load_pack(router + i));
    }
    __syncthreads();
}

// those of the columns c .. c + PACK_X - 1
__device__ __forceinline__ Floats load_router_weights(const float *expert, int c, int d) {
    Floats weights;
    for (int i = 0; i < PACK_X; i += 4) {
        Pack<float> part = load_pack(expert + router_weight_place(c + i, d));
        for (int j = 0; j < 4; j++) {
            weights.x[i + j] = part.x[j];
        }
    }
    return weights;
}

// x becomes the normed row, which is stored too
template <int PACKS>
__device__ __forceinline__ void rmsnorm_held_row(floatX *out, float *rstd, Bits (&x)[PACKS], const float *w,
                                                 int d, float eps) {
    int first = (int)(threadIdx.x % 32) * PACK_X;
    float r = rmsnorm_rstd(warp_sum(sum_of_squares_held(x)), d, eps);
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * 32 * PACK_X;
        if (c < d) {
            x[i] = rmsnorm_scaled(x[i], w + c, r);
            store_bits(out + c, x[i]);
        }
    }
    if (first == 0) {
        *rstd = r;
    }
}

// of the experts first .. first + 32 / ROWS - 1: lane i has row i / (32 / ROWS), expert first + i % (32 / ROWS)
template <int ROWS, int PACKS>
__device__ __forceinline__ float logits_of_rows(const Bits (&normed)[ROWS][PACKS], const float *weights,
                                                int first, int E, int d) {
    const int EXPERTS = 32 / ROWS;
    float sums[32] = {};
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (int)(threadIdx.x % 32 + i * 32) * PACK_X;
        if (c >= d) {
            continue;
        }
        Floats x[ROWS];
        for (int row = 0; row < ROWS; row++) {
            x[row] = widen(normed[row][i]);
        }
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            if (first + e < E) {
                Floats weight = load_router_weights(weights + (first + e) * d, c, d);
                for (int row = 0; row < ROWS; row++) {
                    sums[row * EXPERTS + e] += sum_of_products(x[row], weight);
                }
            }
        }
    }
    return warp_sums(sums);
}

template <int ROWS, int PACKS>
static __global__ void __launch_bounds__(RMSNORM_ROUTER_THREADS, RMSNORM_ROUTER_BLOCKS_PER_SM)
    rmsnorm_router_forward_kernel(floatX *out, float *rstd, float *logits, const floatX *x, const float *w,
                                  const float *router, int64_t N, int d, int E, float eps) {
    const int EXPERTS = 32 / ROWS, WARPS = RMSNORM_ROUTER_THREADS / 32;
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    float *weights = (float *)shared_memory(); // [E, d]
    keep_router_weights(weights, router, E, d);
    for (int64_t n = ((int64_t)blockIdx.x * WARPS + warp) * ROWS; n < N; n += gridDim.x * WARPS * ROWS) {
        Bits kept[ROWS][PACKS] = {};
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (n + row < N) {
                load_packs(kept[row], x + (n + row) * d, lane * PACK_X, 32 * PACK_X, d);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (n + row < N) {
                rmsnorm_held_row(out + (n + row) * d, rstd + n + row, kept[row], w, d, eps);
            }
        }
        for (int first = 0; first < E; first += EXPERTS) {
            float logit = logits_of_rows<ROWS, PACKS>(kept, weights, first, E, d);
            int64_t row = n + lane / EXPERTS;
            int e = first + lane % EXPERTS;
            if (row < N && e < E) {
                logits[row * E + e] = logit;
            }
        }
    }
}

static inline void rmsnorm_router_forward(floatX *out, float *rstd, float *logits, const floatX *x,
                                          const float *w, const float *router, int64_t N, int d, int E,
                                          float eps, floatX *scratch, GemmPlans *plans, cudaStream_t stream) {
    if (E > RMSNORM_ROUTER_MOST_EXPERTS || !rmsnorm_fits_warp(d)) {
        rmsnorm_forward(out, rstd, x, w, N, d, eps, stream);
        router_logits(logits, out, router, N, d, E, scratch, plans, stream);
        return;
    }
    with_warp_packs(d, [&](auto packs) {
        const int PACKS = decltype(packs)::value, ROWS = PACKS <= 3 ? 4 : 2; // what registers hold
        int64_t most = num_sms() * RMSNORM_ROUTER_BLOCKS_PER_SM;
        int64_t blocks = std::min(most, ceil_div<int64_t>(N, ROWS * RMSNORM_ROUTER_THREADS / 32));
        launch(rmsnorm_router_forward_kernel<ROWS, PACKS>, (unsigned)blocks, RMSNORM_ROUTER_THREADS,
               (size_t)E * d * sizeof(float), stream, out, rstd, logits, x, w, router, N, d, E, eps);
    });
}

#endif
