/*
RMSNorm and the router's logits of what it puts out, in one pass over the rows: equals rmsnorm_forward, and
then router_logits of matmul.cuh (in C matmul_forward), up to the order of the sums.

    out_nc = round(x_nc r_n w_c),  r_n as in rmsnorm.cuh;   logits_ne = sum_c out_nc router_ec

The router's weights are their fp32 masters, split into three parts of bf16 as matmul.cuh explains. This is
for bf16, few experts and rows that a warp can hold; other shapes, and the fp32 build, take the two calls.

A warp owns 8 rows, from memory to the tensor cores in the same registers: they are 8 of the 16 rows of A
(mma.cuh; the others are 0, the tensor cores are idle anyway), and which column is which k of a tile does
not matter as long as A and B agree. So a lane may hold 8 neighbouring columns, 16 bytes, as the A of two
tiles:

    lane 4 g + t   x[n + g][32 j + 8 t + 0 .. 7], j = 0, 1, ..   tile 2 j: columns 0 .. 3, 2 j + 1: 4 .. 7
                   parts[32 j + 8 t + 0 .. 7][e + g]             in shared memory, in the order of the lanes

x, out [N, d] floatX, w [d], router [E, d], rstd [N], logits [N, E] fp32; parts [3 E d] and
sums [router_sums_floats] are for use within the call. d a multiple of 8.
Errors: none.
*/
#ifndef RMSNORM_ROUTER_CUH
#define RMSNORM_ROUTER_CUH

#include "llmc/matmul.cuh"
#include "llmc/gpu/mma.cuh"
#include "llmc/rmsnorm.cuh"
// defines: GemmPlans, router_logits, next_part, add_parts; mma, FragA, FragB; rmsnorm_forward,
// rmsnorm_scaled, with_warp_packs

enum {
    RMSNORM_ROUTER_ROWS = 8, // of a warp
    RMSNORM_ROUTER_THREADS = 128,
    RMSNORM_ROUTER_SHARED_BYTES = 96 * 1024 // what a block of any GPU may have
};

#ifndef PRECISION_FP32
static_assert(PACK_X == 8, "a lane's 16 bytes are 8 columns, and a quad's 32");

// blocks that a processor holds: what the registers allow
constexpr int rmsnorm_router_occupancy(int chunks) {
    return chunks <= 24 ? 3 : 2;
}

// router -> parts [tiles of 8 experts][CHUNKS][3][32 lanes][8]; 0 beyond E and d
template <int CHUNKS>
__device__ __forceinline__ void split_router_weights(floatX *parts, const float *router, int E, int d) {
    for (int i = (int)threadIdx.x; i < ceil_div(E, 8) * CHUNKS * 32; i += RMSNORM_ROUTER_THREADS) {
        int lane = i % 32, chunk = i / 32 % CHUNKS, e = i / 32 / CHUNKS * 8 + lane / 4;
        int c = chunk * 32 + lane % 4 * 8;
        Floats rest = e < E && c < d ? load_floats(router + (int64_t)e * d + c) : Floats{};
        for (int part = 0; part < 3; part++) {
            Pack<floatX> pack;
            for (int j = 0; j < 8; j++) {
                pack.x[j] = next_part(rest.x[j]);
            }
            store_pack(parts + (i / 32 * 96 + part * 32 + lane) * 8, pack);
        }
    }
    __syncthreads();
}

// a lane's columns of its row -> the same, normed, which are stored too
template <int CHUNKS>
__device__ __forceinline__ void rmsnorm_quad_row(floatX *out, float *rstd, Bits (&x)[CHUNKS], const float *w,
                                                 int width, int d, float eps) {
    float r = rmsnorm_rstd(quad_sum(sum_of_squares_held(x)), d, eps);
    forget_values(x);
    int first = lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        int c = first + j * 32;
        x[j] = rmsnorm_scaled(x[j], load_floats(w + c), r); // beyond d 0 stays 0
        if (c < width) {
            store_bits(out + c, x[j]);
        }
    }
    if (width > 0 && first == 0) {
        *rstd = r;
    }
}

// logits of the lane's row and two of 8 experts: 2 t and 2 t + 1
template <int CHUNKS>
__device__ __forceinline__ void logits_of_tile(float *logits, const Bits (&x)[CHUNKS], const floatX *parts) {
    float sums[3][4] = {};
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
        for (int part = 0; part < 3; part++) {
            Bits weights = load_bits(parts + (j * 96 + part * 32 + lane_id()) * 8);
            for (int half = 0; half < 4; half += 2) {
                FragA a = {{x[j].x[half], 0, x[j].x[half + 1], 0}};
                FragB b = {{weights.x[half], weights.x[half + 1]}};
                mma(sums[part], a, b);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        logits[i] = add_parts(sums[2][i], sums[1][i], sums[0][i]);
    }
}

template <int CHUNKS>
static __global__ void __launch_bounds__(RMSNORM_ROUTER_THREADS, rmsnorm_router_occupancy(CHUNKS))
    rmsnorm_router_forward_kernel(floatX *out, float *rstd, float *logits, const floatX *x, const float *w,
                                  const float *router, int64_t N, int d, int E, float eps) {
    const int ROWS = RMSNORM_ROUTER_ROWS, WARPS = RMSNORM_ROUTER_THREADS / 32;
    int warp = (int)threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4;
    float *w_shared = (float *)shared_memory();         // [CHUNKS 32], 0 beyond d
    floatX *parts = (floatX *)(w_shared + CHUNKS * 32); // of router
    for (int c = (int)threadIdx.x; c < CHUNKS * 32; c += RMSNORM_ROUTER_THREADS) {
        w_shared[c] = c < d ? w[c] : 0.0f;
    }
    split_router_weights<CHUNKS>(parts, router, E, d); // its barrier covers w too
    for (int64_t first = ((int64_t)blockIdx.x * WARPS + warp) * ROWS; first < N;
         first += (int64_t)gridDim.x * WARPS * ROWS) {
        int64_t n = first + g;
        int width = n < N ? d : 0; // beyond the last row nothing is read or written
        Bits kept[CHUNKS];
        load_packs(kept, x + n * d, t * 8, 32, width);
        rmsnorm_quad_row(out + n * d, rstd + n, kept, w_shared, width, d, eps);
        for (int e = 0; e < E; e += 8) {
            float two[2];
            logits_of_tile(two, kept, parts + e / 8 * CHUNKS * 96 * 8);
            for (int i = 0; i < 2; i++) {
                if (n < N && e + 2 * t + i < E) {
                    logits[n * E + e + 2 * t + i] = two[i];
                }
            }
        }
    }
}

static inline size_t rmsnorm_router_shared_bytes(int d, int E) {
    size_t bytes = 0;
    with_warp_packs(d, [&](auto packs) {
        const int CHUNKS = decltype(packs)::value * 8;
        bytes = CHUNKS * (32 * sizeof(float) + (size_t)ceil_div(E, 8) * 96 * 8 * sizeof(floatX));
    });
    return bytes;
}

#endif

static inline void rmsnorm_router_forward(floatX *out, float *rstd, float *logits, const floatX *x,
                                          const float *w, const float *router, int64_t N, int d, int E,
                                          float eps, floatX *parts, float *sums, GemmPlans *plans,
                                          cudaStream_t stream) {
#ifndef PRECISION_FP32
    size_t shared = rmsnorm_router_shared_bytes(d, E);
    if (rmsnorm_fits_warp(d) && shared <= RMSNORM_ROUTER_SHARED_BYTES) {
        with_warp_packs(d, [&](auto packs) {
            const int CHUNKS = decltype(packs)::value * 8;
            int rows = RMSNORM_ROUTER_ROWS * RMSNORM_ROUTER_THREADS / 32;
            int64_t blocks =
                std::min<int64_t>(num_sms() * rmsnorm_router_occupancy(CHUNKS), ceil_div<int64_t>(N, rows));
            launch(rmsnorm_router_forward_kernel<CHUNKS>, (unsigned)blocks, RMSNORM_ROUTER_THREADS, shared,
                   stream, out, rstd, logits, x, w, router, N, d, E, eps);
        });
        return;
    }
#endif
    rmsnorm_forward(out, rstd, x, w, N, d, eps, stream);
    router_logits(logits, out, router, N, d, E, parts, sums, plans, stream);
}

#endif
