/*
RMSNorm (Zhang and Sennrich, 2019) on the device.

    forward   r = 1 / sqrt(mean_c(x_c^2) + eps);  out_c = x_c r w_c
    backward  dx_c += r (w_c dout_c - x_c r^2 mean_j(dout_j w_j x_j));   dw_c += sum_n dout_nc x_nc r_n

Arithmetic is next to nothing, so what counts is that each byte moves once: forward reads x and writes out;
backward reads dout, x and dx and writes dx. Forward reads a row into registers, in 16-byte packs, reduces it
and uses it from there. A warp owns a row if it can hold it (d <= 1536 in bf16): no barrier, and many rows are
in flight. A wider row takes a block; what exceeds its registers (d > 2048) is read again, from the cache.

dw sums over rows. Every lane handles the same columns of each row, so it accumulates its part of dw in shared
memory, next to w. This saves registers, so more warps are resident. (When a whole block handles one row, dw
is accumulated in global memory.) The warps of a block are then added in order, and a second kernel adds the
blocks in a fixed tree. The number of blocks is a constant, not the device's number of multiprocessors: so the
order of the sums is the same everywhere.

x, out, dout [N, d], dx [N, d] floatX, added to in fp32 and rounded once; w [d] the fp32 master, dw [d] fp32;
rstd [N]; scratch [rmsnorm_scratch_floats(d)]. d a multiple of 8. Equals rmsnorm_forward, rmsnorm_backward of
rmsnorm.h up to the order of the sums. Errors: none.
*/
#ifndef RMSNORM_CUH
#define RMSNORM_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/sums.cuh"
#include <type_traits>
// defines: Floats, Bits, load_floats, load_packs, widen, narrow; warp_sum, block_sum; std::integral_constant

enum {
    RMSNORM_THREADS = 256,   // of a block
    RMSNORM_WARP_PACKS = 6,  // a lane holds at most, where a warp owns a row
    RMSNORM_BLOCK_PACKS = 1, // a thread holds, where a block owns a row
    RMSNORM_BACKWARD_THREADS = 128,
    RMSNORM_BACKWARD_BLOCKS = 132 // for each block that a processor holds: an H100 has so many processors
};

// blocks that a processor holds in backward: what the registers allow
constexpr int rmsnorm_backward_occupancy(int packs) {
    return packs <= 3 ? 5 : packs == 4 ? 4 : 3;
}

static_assert(rmsnorm_backward_occupancy(1) >= rmsnorm_backward_occupancy(RMSNORM_WARP_PACKS),
              "rmsnorm_scratch_floats has room for the largest number of blocks");

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
    return (int64_t)RMSNORM_BACKWARD_BLOCKS * rmsnorm_backward_occupancy(1) * d;
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
__device__ __forceinline__ Bits rmsnorm_scaled(const Bits &x, const Floats &w, float r) {
    Floats scaled = widen(x);
    for (int i = 0; i < PACK_X; i++) {
        scaled.x[i] = scaled.x[i] * r * w.x[i];
    }
    return to_bits(narrow(scaled));
}

template <int PACKS> __device__ __forceinline__ float sum_of_squares_held(const Bits (&kept)[PACKS]) {
    float sum = 0.0f;
#pragma unroll
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
    Bits kept[PACKS];
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
            store_bits(out + n * d + c, rmsnorm_scaled(kept[i], load_constant_floats(w + c), r));
        }
    }
    for (int c = first + PACKS * STEP; c < d; c += STEP) {
        store_bits(out + n * d + c, rmsnorm_scaled(load_bits(row + c), load_constant_floats(w + c), r));
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

// a thread has a pack
static __global__ void __launch_bounds__(RMSNORM_THREADS)
    rmsnorm_again_kernel(floatX *out, const float *rstd, const floatX *x, const float *w, int64_t packs,
                         int d) {
    int64_t i = (int64_t)blockIdx.x * RMSNORM_THREADS + threadIdx.x;
    if (i < packs) {
        int64_t at = i * PACK_X, n = at / d;
        store_bits(out + at,
                   rmsnorm_scaled(load_bits(x + at), load_constant_floats(w + (at - n * d)), rstd[n]));
    }
}

// out once more, the same bits, from the rstd of whichever kernel made it first
static inline void rmsnorm_again(floatX *out, const float *rstd, const floatX *x, const float *w, int64_t N,
                                 int d, cudaStream_t stream) {
    int64_t packs = N * d / PACK_X;
    launch(rmsnorm_again_kernel, (unsigned)ceil_div<int64_t>(packs, RMSNORM_THREADS), RMSNORM_THREADS, 0,
           stream, out, rstd, x, w, packs, d);
}

// ----------------------------------------------------------------------------
// backward

// dout w x, summed
__device__ __forceinline__ float rmsnorm_dot(Floats dout, const Floats &x, const Floats &w) {
    for (int i = 0; i < PACK_X; i++) {
        dout.x[i] *= w.x[i];
    }
    return sum_of_products(dout, x);
}

// dx += r (w dout - x scale)
__device__ __forceinline__ void rmsnorm_add_dx(floatX *dx, Floats before, const Floats &dout, const Floats &x,
                                               const Floats &w, float r, float scale) {
    for (int i = 0; i < PACK_X; i++) {
        before.x[i] += r * (w.x[i] * dout.x[i] - x.x[i] * scale);
    }
    store_pack(dx, narrow(before));
}

// dw += dout x r
__device__ __forceinline__ void rmsnorm_add_dw(Floats &dw, const Floats &dout, const Floats &x, float r) {
    for (int i = 0; i < PACK_X; i++) {
        dw.x[i] += dout.x[i] * x.x[i] * r;
    }
}

// In shared memory w, and each warp's sums of dw, stand as [PACKS][PACK_X / 4][32 lanes][4]: 16 bytes of
// each lane after the other's, which is how a warp's accesses are fastest. The place of columns c .. c + 3:
__device__ __forceinline__ int lane_place(int c) {
    int pack = c / PACK_X, part = c % PACK_X / 4;
    return ((pack / 32 * (PACK_X / 4) + part) * 32 + pack % 32) * 4;
}

// the lane's of one of the PACKS
__device__ __forceinline__ Floats load_lane_floats(const float *pack) {
    Floats floats;
    for (int i = 0; i < PACK_X; i += 4) {
        Pack<float> part = load_pack(pack + (i / 4 * 32 + threadIdx.x % 32) * 4);
        for (int j = 0; j < 4; j++) {
            floats.x[i + j] = part.x[j];
        }
    }
    return floats;
}

__device__ __forceinline__ void store_lane_floats(float *pack, const Floats &floats) {
    for (int i = 0; i < PACK_X; i += 4) {
        Pack<float> part;
        for (int j = 0; j < 4; j++) {
            part.x[j] = floats.x[i + j];
        }
        store_pack(pack + (i / 4 * 32 + threadIdx.x % 32) * 4, part);
    }
}

// columns c .. c + 3 of the warps' sums, added in order
template <int PACKS> __device__ __forceinline__ Pack<float> rmsnorm_join_warps(const float *sums, int c) {
    const float *at = sums + lane_place(c);
    Pack<float> total = load_pack(at);
    for (int warp = 1; warp < RMSNORM_BACKWARD_THREADS / 32; warp++) {
        Pack<float> more = load_pack(at + warp * PACKS * 32 * PACK_X);
        for (int j = 0; j < 4; j++) {
            total.x[j] += more.x[j];
        }
    }
    return total;
}

// One row; sums: of dw, the warp's. Beyond d everything is 0
template <int PACKS, class Rows>
__device__ __forceinline__ void rmsnorm_backward_row(floatX *dx, float *sums, const Rows &rows,
                                                     const floatX *x, const float *w, float r, int64_t n,
                                                     int d) {
    const int STEP = 32 * PACK_X;
    int first = (int)(threadIdx.x % 32) * PACK_X;
    Bits before[PACKS], kept[PACKS];
    Floats dout[PACKS];
    load_packs(before, dx + n * d, first, STEP, d); // on its way while the row is summed
    load_packs(kept, x + n * d, first, STEP, d);
    rows.load(dout, n, d);
    float sum = 0.0f;
    for (int i = 0; i < PACKS; i++) {
        sum += rmsnorm_dot(dout[i], widen(kept[i]), load_lane_floats(w + i * STEP));
    }
    float scale = warp_sum(sum) / (float)d * r * r;
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * STEP;
        Floats x_c = widen(kept[i]), dw = load_lane_floats(sums + i * STEP);
        rmsnorm_add_dw(dw, dout[i], x_c, r);
        store_lane_floats(sums + i * STEP, dw);
        if (c < d) {
            rmsnorm_add_dx(dx + n * d + c, widen(before[i]), dout[i], x_c, load_lane_floats(w + i * STEP), r,
                           scale);
        }
    }
}

// The rows of dout as they are in memory. (dispatch_rmsnorm.cuh has others, which are made on the way.)
struct StoredRows {
    const floatX *dout;
    template <int PACKS> __device__ __forceinline__ void load(Floats (&row)[PACKS], int64_t n, int d) const {
        Bits packs[PACKS];
        load_packs(packs, dout + n * d, (int)(threadIdx.x % 32) * PACK_X, 32 * PACK_X, d);
        for (int i = 0; i < PACKS; i++) {
            row[i] = widen(packs[i]);
        }
    }
};

template <int PACKS, class Rows>
static __global__ void __launch_bounds__(RMSNORM_BACKWARD_THREADS, rmsnorm_backward_occupancy(PACKS))
    rmsnorm_backward_kernel(floatX *dx, float *partial, Rows rows, const floatX *x, const float *w,
                            const float *rstd, int64_t N, int d) {
    const int WARPS = RMSNORM_BACKWARD_THREADS / 32, COLUMNS = PACKS * 32 * PACK_X;
    int warp = (int)threadIdx.x / 32;
    float *sums = (float *)shared_memory(), *w_shared = sums + WARPS * COLUMNS; // [WARPS][COLUMNS], [COLUMNS]
    for (int c = (int)threadIdx.x * 4; c < COLUMNS; c += RMSNORM_BACKWARD_THREADS * 4) {
        store_pack(w_shared + lane_place(c), c < d ? load_pack(w + c) : Pack<float>{});
        for (int i = 0; i < WARPS; i++) {
            store_pack(sums + i * COLUMNS + c, Pack<float>{});
        }
    }
    __syncthreads();
    for (int64_t n = (int64_t)blockIdx.x * WARPS + warp; n < N; n += (int64_t)gridDim.x * WARPS) {
        rmsnorm_backward_row<PACKS>(dx, sums + warp * COLUMNS, rows, x, w_shared, rstd[n], n, d);
    }
    __syncthreads();
    for (int c = (int)threadIdx.x * 4; c < d; c += RMSNORM_BACKWARD_THREADS * 4) {
        store_pack(partial + (int64_t)blockIdx.x * d + c, rmsnorm_join_warps<PACKS>(sums, c));
    }
}

// A block owns a row. partial: its sums of dw, each read again by the thread that wrote it
static __global__ void __launch_bounds__(RMSNORM_BACKWARD_THREADS)
    rmsnorm_backward_wide_kernel(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                 const float *w, const float *rstd, int64_t N, int d) {
    const int STEP = RMSNORM_BACKWARD_THREADS * PACK_X;
    int first = (int)threadIdx.x * PACK_X;
    partial += (int64_t)blockIdx.x * d;
    for (int c = first; c < d; c += STEP) {
        store_floats(partial + c, Floats{});
    }
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        float sum = 0.0f, r = rstd[n];
        for (int c = first; c < d; c += STEP) {
            sum += rmsnorm_dot(widen(load_pack(dout + n * d + c)), widen(load_pack(x + n * d + c)),
                               load_floats(w + c));
        }
        float scale = block_sum(sum) / (float)d * r * r;
        for (int c = first; c < d; c += STEP) { // dout and x once more, from the cache
            int64_t at = n * d + c;
            Floats dout_c = widen(load_pack(dout + at)), x_c = widen(load_pack(x + at)),
                   dw = load_floats(partial + c);
            rmsnorm_add_dx(dx + at, widen(load_pack(dx + at)), dout_c, x_c, load_floats(w + c), r, scale);
            rmsnorm_add_dw(dw, dout_c, x_c, r);
            store_floats(partial + c, dw);
        }
    }
}

enum { JOIN_COLUMNS = 32, JOIN_SLICES = 32 };

// dw[c] += the sum over blocks of partial[block][c]: 32 slices of blocks, then the slices in order
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

// d that a warp can hold
template <class Rows>
static inline void rmsnorm_backward_of(floatX *dx, float *dw, Rows rows, const floatX *x, const float *w,
                                       const float *rstd, int64_t N, int d, float *scratch,
                                       cudaStream_t stream) {
    with_warp_packs(d, [&](auto packs) {
        const int PACKS = decltype(packs)::value, WARPS = RMSNORM_BACKWARD_THREADS / 32;
        int blocks = RMSNORM_BACKWARD_BLOCKS * rmsnorm_backward_occupancy(PACKS);
        blocks = (int)std::min<int64_t>(blocks, ceil_div<int64_t>(N, WARPS));
        size_t shared = (size_t)((WARPS + 1) * PACKS * 32 * PACK_X) * sizeof(float); // sums of dw, and w
        launch(rmsnorm_backward_kernel<PACKS, Rows>, blocks, RMSNORM_BACKWARD_THREADS, shared, stream, dx,
               scratch, rows, x, w, rstd, N, d);
        rmsnorm_join_blocks(dw, scratch, blocks, d, stream);
    });
}

static inline void rmsnorm_backward(floatX *dx, float *dw, const floatX *dout, const floatX *x,
                                    const float *w, const float *rstd, int64_t N, int d, float *scratch,
                                    cudaStream_t stream) {
    if (rmsnorm_fits_warp(d)) {
        rmsnorm_backward_of(dx, dw, StoredRows{dout}, x, w, rstd, N, d, scratch, stream);
        return;
    }
    int blocks = (int)std::min<int64_t>(RMSNORM_BACKWARD_BLOCKS * rmsnorm_backward_occupancy(1), N);
    launch(rmsnorm_backward_wide_kernel, blocks, RMSNORM_BACKWARD_THREADS, 0, stream, dx, scratch, dout, x, w,
           rstd, N, d);
    rmsnorm_join_blocks(dw, scratch, blocks, d, stream);
}

#endif
