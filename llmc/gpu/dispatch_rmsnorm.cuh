/*
The experts' combine joined with the RMSNorm next to it, so that what lies between them stays in registers.
Each equals calls of dispatch.cuh, matmul.cuh and rmsnorm.cuh (and the C functions of those names):

    dispatch_combine_rmsnorm_forward    y = residual + combine;  normed, rstd = rmsnorm_forward(y)
        the norm is the next layer's, or the last one; y is rounded before it is normed, as it is stored
    dispatch_combine_rmsnorm_backward   dnormed = combine + dz W_router;  dx, dw += rmsnorm_backward of it
        dnormed, the gradient of what the experts and the router read, is not stored, nor rounded

A warp owns a token, and combine_token (dispatch.cuh) adds the token's rows. The rest of backward is
rmsnorm.cuh's, which is told to get its rows here. Of dz W only the terms with dz != 0 are computed (with the
ReLU router, those of the active experts), from the rows of W, which L1 keeps. With another router and more
than 16 experts a GEMM computes the product, and its result is read.

Rows that a warp cannot hold (d > 1536 in bf16) take the separate calls.

y, normed, x, dx, residual [N, d] floatX; w, dw [d] fp32; rstd [N]; dz [N, E] floatX, router [E, d] its floatX
copy; dnormed [N, d] and scratch [rmsnorm_scratch_floats(d)] are for use within the call. d a multiple of 8.
Errors: none.
*/
#ifndef DISPATCH_RMSNORM_CUH
#define DISPATCH_RMSNORM_CUH

#include "llmc/dispatch.cuh"
#include "llmc/matmul.cuh"
#include "llmc/rmsnorm.cuh"
// defines: CombineChunk, combine_token, dispatch_combine; gemm; rmsnorm_*, with_warp_packs

enum { COMBINE_RMSNORM_MOST_EXPERTS = 16 }; // for a warp to add all of a token's dz W, none of them 0

// ----------------------------------------------------------------------------
// forward

template <int PACKS>
static __global__ void __launch_bounds__(RMSNORM_THREADS, PACKS <= 3 ? 3 : 2)
    dispatch_combine_rmsnorm_forward_kernel(floatX *y, floatX *normed, float *rstd, const floatX *residual,
                                            CombineChunk chunk, const float *w, int N, int d, float eps) {
    int64_t t = (int64_t)blockIdx.x * (RMSNORM_THREADS / 32) + threadIdx.x / 32;
    if (t >= N) {
        return; // the whole warp
    }
    int first = (int)(threadIdx.x % 32) * PACK_X;
    Bits kept[PACKS];
    Floats total[PACKS];
    load_packs(kept, residual + t * d, first, 32 * PACK_X, d);
    combine_token(total, chunk, t, d);
    for (int i = 0; i < PACKS; i++) {
        add_to(total[i], widen(kept[i]));
        kept[i] = to_bits(narrow(total[i]));
    }
    float r = rmsnorm_rstd(warp_sum(sum_of_squares_held(kept)), d, eps);
    for (int i = 0; i < PACKS; i++) {
        int c = first + i * 32 * PACK_X;
        if (c < d) {
            store_bits(y + t * d + c, kept[i]);
            store_bits(normed + t * d + c, rmsnorm_scaled(kept[i], load_constant_floats(w + c), r));
        }
    }
    if (first == 0) {
        rstd[t] = r;
    }
}

// y may be residual
static inline void dispatch_combine_rmsnorm_forward(floatX *y, floatX *normed, float *rstd,
                                                    const floatX *residual, CombineChunk chunk,
                                                    const float *w, int N, int d, float eps,
                                                    cudaStream_t stream) {
    if (!rmsnorm_fits_warp(d)) {
        dispatch_combine(y, chunk.sum, residual, chunk.rows, chunk.pairs, chunk.dispatch, N, chunk.E, d,
                         chunk.first, chunk.chunk_rows, 1, stream);
        rmsnorm_forward(normed, rstd, y, w, N, d, eps, stream);
        return;
    }
    with_warp_packs(d, [&](auto packs) {
        launch(dispatch_combine_rmsnorm_forward_kernel<decltype(packs)::value>,
               ceil_div<int>(N, RMSNORM_THREADS / 32), RMSNORM_THREADS, 0, stream, y, normed, rstd, residual,
               chunk, w, N, d, eps);
    });
}

// ----------------------------------------------------------------------------
// backward

// The gradient of a norm's output, which the experts and the router have read: the combine's sum and dz W,
// whose product a GEMM has left in memory, or whose factors are here
struct CombinedRows {
    CombineChunk chunk;
    const floatX *product; // [N, d]; NULL: none
    const floatX *dz;      // [N, E]; NULL: none
    const floatX *router;  // [E, d]

    // of token t, dz of the lane's among the 32 experts from first on
    __device__ __forceinline__ float dz_of(int64_t t, int first) const {
        int e = first + (int)threadIdx.x % 32;
        return dz != NULL && e < chunk.E ? to_float(dz[t * chunk.E + e]) : 0.0f;
    }

    // row += dz W of these experts
    template <int PACKS>
    __device__ __forceinline__ void add_router(Floats (&row)[PACKS], float dz_e, int first, int d) const {
        Bits packs[PACKS];
        for (unsigned here = __ballot_sync(0xffffffffu, dz_e != 0.0f); here != 0; here &= here - 1) {
            int next = __ffs((int)here) - 1;
            float scale = __shfl_sync(0xffffffffu, dz_e, next);
            load_packs(packs, router + (first + next) * d, (int)threadIdx.x % 32 * PACK_X, 32 * PACK_X, d);
            for (int i = 0; i < PACKS; i++) {
                add_scaled(row[i], scale, widen(packs[i]));
            }
        }
    }

    template <int PACKS> __device__ __forceinline__ void load(Floats (&row)[PACKS], int64_t t, int d) const {
        float dz_e = dz_of(t, 0); // on its way while the experts' rows are summed
        Bits packs[PACKS];
        combine_token(row, chunk, t, d);
        if (product != NULL) {
            load_packs(packs, product + t * d, (int)threadIdx.x % 32 * PACK_X, 32 * PACK_X, d);
            for (int i = 0; i < PACKS; i++) {
                add_to(row[i], widen(packs[i]));
            }
        }
        add_router(row, dz_e, 0, d);
        for (int first = 32; first < chunk.E; first += 32) {
            add_router(row, dz_of(t, first), first, d);
        }
    }
};

// dz NULL: the experts alone have read the norm's output; sparse: dz is 0 but for a token's active experts
static inline void dispatch_combine_rmsnorm_backward(floatX *dx, float *dw, floatX *dnormed,
                                                     CombineChunk chunk, const floatX *dz,
                                                     const floatX *router, const floatX *x, const float *w,
                                                     const float *rstd, int sparse, int N, int d,
                                                     float *scratch, GemmPlans *plans, cudaStream_t stream) {
    int E = chunk.E, fits = rmsnorm_fits_warp(d);
    int by_token = fits && (sparse || E <= COMBINE_RMSNORM_MOST_EXPERTS);
    if (!fits) {
        dispatch_combine(dnormed, chunk.sum, NULL, chunk.rows, chunk.pairs, chunk.dispatch, N, E, d,
                         chunk.first, chunk.chunk_rows, 1, stream);
    }
    const floatX *product = NULL;
    if (dz != NULL && !by_token) {
        gemm(plans, 0, 0, N, d, E, dz, E, router, d, dnormed, d, fits ? NULL : dnormed, stream);
        product = dnormed;
        dz = NULL;
    }
    if (fits) {
        CombinedRows rows = {chunk, product, dz, router};
        rmsnorm_backward_of(dx, dw, rows, x, w, rstd, N, d, scratch, stream);
    } else {
        rmsnorm_backward(dx, dw, dnormed, x, w, rstd, N, d, scratch, stream);
    }
}

#endif
