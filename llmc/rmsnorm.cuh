/*
RMSNorm (Zhang and Sennrich, 2019) on the device.

    forward   r = 1 / sqrt(mean_c(x_c^2) + eps);  out_c = x_c r w_c
    backward  dx_c += r (w_c dout_c - x_c r^2 mean_j(dout_j w_j x_j));   dw_c += sum_n dout_nc x_nc r_n

Arithmetic is next to nothing, so what counts is that each byte moves once: forward reads x and writes out;
backward reads dout, x and dx and writes dx. Forward reads a row into registers, in 16-byte packs, reduces it
and uses it from there. A warp owns a row if it can hold it (d <= 1536 in bf16): no barrier, and many rows are
in flight. A wider row takes a block; what exceeds its registers (d > 2048) is read again, from the cache.

dw sums over rows. A thread meets the same columns in every row, so it adds them up in registers while it is
there (in memory beyond 2048); the warps of a block are then added in order, and a second kernel adds the
blocks in a fixed tree. The number of blocks is a constant, not the device's number of processors, so that the
order of the sums is the same everywhere.

x, out, dout [N, d], dx [N, d] floatX, added to in fp32 and rounded once; w [d] the fp32 master, dw [d] fp32;
rstd [N]; scratch [rmsnorm_scratch_floats(d)]. d a multiple of 8. Equals rmsnorm_forward, rmsnorm_backward of
rmsnorm.h up to the order of the sums. Errors: none.
*/
#ifndef RMSNORM_CUH
#define RMSNORM_CUH

#include "floats.cuh"
#include <type_traits>
// defines: Floats, load_floats, widen, narrow; std::integral_constant

enum {
    RMSNORM_THREADS = 256,     // of a block
    RMSNORM_WARP_PACKS = 6,    // a lane holds at most, where a warp owns a row
    RMSNORM_BLOCK_PACKS = 1,   // a thread holds, where a block owns a row
    RMSNORM_WARP_BLOCKS = 264, // in backward: 2 for each of an H100's processors, 16 rows under way
    RMSNORM_BLOCK_BLOCKS = 528 // 4 for each
};

static inline bool rmsnorm_fits_warp(int d) {
    return d <= 32 * RMSNORM_WARP_PACKS * PACK_X;
}

// calls f with the packs that a lane has to hold, a constant: the fewer, the more rows are under way
template <class F> static void with_warp_packs(int d, F f) {
    int packs = ceil_div<int>(d, 32 * PACK_X);
    if (packs <= 3) {
        f(std::integral_constant<int, 3>());
    } else if (packs == 4) {
        f(std::integral_constant<int, 4>());
    } else {
        f(std::integral_constant<int, RMSNORM_WARP_PACKS>());
    }
}

static inline int64_t rmsnorm_scratch_floats(int d) {
    return (int64_t)RMSNORM_BLOCK_BLOCKS * d;
}

// the sum over the threads that own a row
template <int THREADS> __device__ __forceinline__ float row_sum(float x) {
    return THREADS == 32 ? warp_sum(x) : block_sum(x);
}

__device__ __forceinline__ float sum_of_products(const Floats &a, const Floats &b) {
    float sum = 0.0f;
    for (int i = 0; i < PACK_X; i++) {
        sum += a.x[i] * b.x[i];
    }
    return sum;
}

// ----------------------------------------------------------------------------
// forward

// r of a row whose squares' sum is given
__device__ __forceinline__ float rmsnorm_rstd(float squares, int d, float eps) {
    return 1.0f / sqrtf(squares / (float)d + eps);
}

// x r w, rounded
__device__ __forceinline__ Pack<floatX> rmsnorm_scaled(const Pack<floatX> &x, const float *w, float r) {
    Floats scaled = widen(x), weight = load_floats(w);
    for (int i = 0; i < PACK_X; i++) {
        scaled.x[i] = scaled.x[i] * r * weight.x[i];
    }
    return narrow(scaled);
}

// a thread's packs: columns first, first + step, ... of the row, 0 beyond its end
template <int PACKS>
__device__ __forceinline__ void load_packs(Pack<floatX> (&kept)[PACKS], const floatX *row, int first,
                                           int step, int d) {
    for (int i = 0; i < PACKS; i++) {
        kept[i] = first + i * step < d ? load_pack(row + first + i * step) : Pack<floatX>{};
    }
}

template <int PACKS> __device__ __forceinline__ float sum_of_squares_held(const Pack<floatX> (&kept)[PACKS]) {
    float sum = 0.0f;
    for (int i = 0; i < PACKS; i++) {
        sum += sum_of_products(widen(kept[i]), widen(kept[i]));
    }
    return sum;
}

// THREADS own a row, each holds PACKS packs of it: columns (thread + i THREADS) PACK_X
template <int THREADS, int PACKS>
static __global__ void __launch_bounds__(RMSNORM_THREADS, PACKS <= 4 ? 4 : 3)
    rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *x, const float *w, int64_t N, int d,
                           float eps) {
    const int STEP = THREADS * PACK_X;
    int64_t n = (int64_t)blockIdx.x * (RMSNORM_THREADS / THREADS) + threadIdx.x / THREADS;
    if (n >= N) {
        return; // with all who share the row
    }
    int first = (int)(threadIdx.x % THREADS) * PACK_X;
    const floatX *row = x + n * d;
    Pack<floatX> kept[PACKS];
    load_packs(kept, row, first, STEP, d);
    float sum = sum_of_squares_held(kept);
    for (int c = first + PACKS * STEP; c < d; c += STEP) {
        Floats more = widen(load_pack(row + c));
        sum += sum_of_products(more, more);
    }
    float r = rmsnorm_rstd(row_sum<THREADS>(sum), d, eps);
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * STEP;
        if (c < d) {
            store_pack(out + n * d + c, rmsnorm_scaled(kept[i], w + c, r));
        }
    }
    for (int c = first + PACKS * STEP; c < d; c += STEP) {
        store_pack(out + n * d + c, rmsnorm_scaled(load_pack(row + c), w + c, r));
    }
    if (first == 0) {
        rstd[n] = r;
    }
}

static inline void rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const float *w, int64_t N,
                                   int d, float eps, cudaStream_t stream) {
    if (rmsnorm_fits_warp(d)) {
        with_warp_packs(d, [&](auto packs) {
            launch(rmsnorm_forward_kernel<32, decltype(packs)::value>,
                   dim3((unsigned)ceil_div<int64_t>(N, RMSNORM_THREADS / 32)), RMSNORM_THREADS, 0, stream,
                   out, rstd, x, w, N, d, eps);
        });
    } else {
        launch(rmsnorm_forward_kernel<RMSNORM_THREADS, RMSNORM_BLOCK_PACKS>, dim3((unsigned)N),
               RMSNORM_THREADS, 0, stream, out, rstd, x, w, N, d, eps);
    }
}

// ----------------------------------------------------------------------------
// backward

// dout w x, summed
__device__ __forceinline__ float rmsnorm_dot(Floats dout, const Floats &x, const float *w) {
    Floats weight = load_floats(w);
    for (int i = 0; i < PACK_X; i++) {
        dout.x[i] *= weight.x[i];
    }
    return sum_of_products(dout, x);
}

// dx += r (w dout - x scale)
__device__ __forceinline__ void rmsnorm_add_dx(floatX *dx, Floats before, const Floats &dout, const Floats &x,
                                               const float *w, float r, float scale) {
    Floats weight = load_floats(w);
    for (int i = 0; i < PACK_X; i++) {
        before.x[i] += r * (weight.x[i] * dout.x[i] - x.x[i] * scale);
    }
    store_pack(dx, narrow(before));
}

// dw += dout x r
__device__ __forceinline__ void rmsnorm_add_dw(Floats &dw, const Floats &dout, const Floats &x, float r) {
    for (int i = 0; i < PACK_X; i++) {
        dw.x[i] += dout.x[i] * x.x[i] * r;
    }
}

// One row. held: the sums of dw of the thread's first PACKS packs; beyond: of the others, in memory, by
// column. x and dout are read twice, the second time from the cache: as fp32 numbers they would not fit the
// registers
template <int THREADS, int PACKS>
__device__ __forceinline__ void rmsnorm_backward_row(floatX *dx, Floats (&held)[PACKS], float *beyond,
                                                     const floatX *dout, const floatX *x, const float *w,
                                                     float r, int d) {
    const int STEP = THREADS * PACK_X;
    int first = (int)(threadIdx.x % THREADS) * PACK_X;
    Pack<floatX> before[PACKS] = {}; // dx, on its way while the row is summed
    float sum = 0.0f;
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * STEP;
        if (c < d) {
            before[i] = load_pack(dx + c);
            sum += rmsnorm_dot(widen(load_pack(dout + c)), widen(load_pack(x + c)), w + c);
        }
    }
    for (int c = first + PACKS * STEP; c < d; c += STEP) {
        sum += rmsnorm_dot(widen(load_pack(dout + c)), widen(load_pack(x + c)), w + c);
    }
    float scale = row_sum<THREADS>(sum) / (float)d * r * r;
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * STEP;
        if (c < d) {
            Floats dout_c = widen(load_pack(dout + c)), x_c = widen(load_pack(x + c));
            rmsnorm_add_dx(dx + c, widen(before[i]), dout_c, x_c, w + c, r, scale);
            rmsnorm_add_dw(held[i], dout_c, x_c, r);
        }
    }
    for (int c = first + PACKS * STEP; c < d; c += STEP) {
        Floats dout_c = widen(load_pack(dout + c)), x_c = widen(load_pack(x + c)),
               dw = load_floats(beyond + c);
        rmsnorm_add_dx(dx + c, widen(load_pack(dx + c)), dout_c, x_c, w + c, r, scale);
        rmsnorm_add_dw(dw, dout_c, x_c, r);
        store_floats(beyond + c, dw); // read again by this thread alone
    }
}

// the sums of dw in registers -> the block's row of partial; where warps own rows, warp after warp
template <int THREADS, int PACKS>
__device__ __forceinline__ void rmsnorm_join_rows(float *partial, const Floats (&held)[PACKS], int d) {
    __shared__ Floats joined[PACKS][THREADS];
    const int OWNERS = RMSNORM_THREADS / THREADS;
    int owner = (int)threadIdx.x / THREADS, thread = (int)threadIdx.x % THREADS;
    for (int turn = 0; turn < OWNERS; turn++) {
        for (int i = 0; i < PACKS && turn == owner; i++) {
            int c = (thread + i * THREADS) * PACK_X;
            Floats sum = turn > 0 ? joined[i][thread] : Floats{};
            for (int j = 0; j < PACK_X; j++) {
                sum.x[j] += held[i].x[j];
            }
            joined[i][thread] = sum;
            if (turn == OWNERS - 1 && c < d) {
                store_floats(partial + c, sum);
            }
        }
        __syncthreads();
    }
}

template <int THREADS, int PACKS>
static __global__ void __launch_bounds__(RMSNORM_THREADS, THREADS > 32 ? 4
                                                          : PACKS <= 4 ? 2
                                                                       : 1)
    rmsnorm_backward_kernel(floatX *dx, float *partial, const floatX *dout, const floatX *x, const float *w,
                            const float *rstd, int64_t N, int d) {
    const int ROWS = RMSNORM_THREADS / THREADS;
    float *mine = partial + (int64_t)blockIdx.x * d;
    int first = (int)(threadIdx.x % THREADS) * PACK_X;
    Floats held[PACKS] = {};
    for (int c = first + PACKS * THREADS * PACK_X; c < d; c += THREADS * PACK_X) {
        store_floats(mine + c, Floats{});
    }
    for (int64_t n = (int64_t)blockIdx.x * ROWS + threadIdx.x / THREADS; n < N;
         n += (int64_t)gridDim.x * ROWS) {
        rmsnorm_backward_row<THREADS, PACKS>(dx + n * d, held, mine, dout + n * d, x + n * d, w, rstd[n], d);
    }
    rmsnorm_join_rows<THREADS, PACKS>(mine, held, d);
}

enum { JOIN_COLUMNS = 32, JOIN_SLICES = 8 };

// dw[c] += the sum over blocks of partial[block][c]: 8 slices of blocks, then the slices in order
static __global__ void __launch_bounds__(JOIN_COLUMNS *JOIN_SLICES)
    rmsnorm_join_blocks_kernel(float *dw, const float *partial, int blocks, int d) {
    __shared__ float sums[JOIN_SLICES][JOIN_COLUMNS];
    int column = (int)threadIdx.x % JOIN_COLUMNS, slice = (int)threadIdx.x / JOIN_COLUMNS;
    int c = (int)blockIdx.x * JOIN_COLUMNS + column;
    float sum = 0.0f;
    for (int block = slice; block < blocks && c < d; block += JOIN_SLICES) {
        sum += partial[(int64_t)block * d + c];
    }
    sums[slice][column] = sum;
    __syncthreads();
    if (slice == 0 && c < d) {
        for (int s = 1; s < JOIN_SLICES; s++) {
            sum += sums[s][column];
        }
        dw[c] += sum;
    }
}

static inline void rmsnorm_join_blocks(float *dw, const float *partial, int blocks, int d,
                                       cudaStream_t stream) {
    launch(rmsnorm_join_blocks_kernel, dim3((unsigned)ceil_div<int>(d, JOIN_COLUMNS)),
           JOIN_COLUMNS * JOIN_SLICES, 0, stream, dw, partial, blocks, d);
}

static inline void rmsnorm_backward(floatX *dx, float *dw, const floatX *dout, const floatX *x,
                                    const float *w, const float *rstd, int64_t N, int d, float *scratch,
                                    cudaStream_t stream) {
    int blocks;
    if (rmsnorm_fits_warp(d)) {
        blocks = (int)std::min<int64_t>(RMSNORM_WARP_BLOCKS, ceil_div<int64_t>(N, RMSNORM_THREADS / 32));
        with_warp_packs(d, [&](auto packs) {
            launch(rmsnorm_backward_kernel<32, decltype(packs)::value>, dim3((unsigned)blocks),
                   RMSNORM_THREADS, 0, stream, dx, scratch, dout, x, w, rstd, N, d);
        });
    } else {
        blocks = (int)std::min<int64_t>(RMSNORM_BLOCK_BLOCKS, N);
        launch(rmsnorm_backward_kernel<RMSNORM_THREADS, RMSNORM_BLOCK_PACKS>, dim3((unsigned)blocks),
               RMSNORM_THREADS, 0, stream, dx, scratch, dout, x, w, rstd, N, d);
    }
    rmsnorm_join_blocks(dw, scratch, blocks, d, stream);
}

#endif
