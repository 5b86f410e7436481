/*
Grouped GEMM: one product per expert, all of them in one launch, on rows sorted by expert.

    grouped_       product                                M x N, sum over   in the epilogue
    up_forward     [G | U]     = X' W_gate_up^T           rows x 2F, d      gate A, where A = silu(G) U
    down_forward   Y           = (gate A) W_down^T        rows x d, F
    down_backward  dA'         = dO' W_down               rows x F, d       dgate = <dA', A>; dG, dU for G, U
    down_wgrad     dW_down    += dO'^T (gate A)           d x F, rows       fp32
    up_wgrad       dW_gate_up += dH^T X'                  2F x d, rows      fp32
    up_backward    dX'         = dH W_gate_up             rows x d, 2F

where dH = [dG | dU], and with silu(g) = g s, s = sigmoid(g), of the rounded G and U

    dG = gate dA' U silu'(G) = gate dA' U s (1 + G (1 - s));   dU = gate dA' silu(G)

The gate is applied before the down-projection and not to its result, which is the same: so forward's gate A
is what the weights' gradient needs, and the combine just adds rows.

X' and dO' are rows of x and dy [N, d] by token, gathered while they are loaded. Two implementations stand
behind these names: grouped_portable.cuh (mma.sync, sm_80 and later, and fp32) and grouped_hopper.cuh (wgmma
and TMA, sm_90a, bf16); chunk.kernels chooses. Their sums differ in order, so their bits do; each is
deterministic.

Shapes: chunk buffers h [R, 3F] = [G | U | gate A], y, dx [R, d], indexed from the chunk's first row;
w_gate_up [E, 2F, d], w_down [E, d, F] floatX, their gradients fp32; d, F multiples of 8. Nothing is written
for rows that do not exist. Equals matmul_grouped_* of matmul.h and swiglu_* of experts.h. Errors: none.
*/
#ifndef GROUPED_GEMM_CUH
#define GROUPED_GEMM_CUH

#include "llmc/gpu/grouped_hopper.cuh"
#include "llmc/gpu/grouped_portable.cuh"
#include "llmc/gpu/row_chunk.cuh"

// the fastest kernels that this device and this build have
static inline Kernels grouped_best_kernels() {
#ifdef HOPPER_KERNELS
    if (hopper::available()) {
        return KERNELS_HOPPER;
    }
#endif
    return KERNELS_PORTABLE;
}

#ifdef HOPPER_KERNELS
#define GROUPED(kernels, call) ((kernels) == KERNELS_HOPPER ? hopper::call : portable::call)
#else
#define GROUPED(kernels, call) ((void)(kernels), portable::call)
#endif

// partial sums that grouped_down_backward writes of each row's <dA', A>
static inline int grouped_dgate_tiles(int F, Kernels kernels) {
    return GROUPED(kernels, grouped_dgate_tiles(F));
}

// G, U = X' W_gate_up^T, gate A of the rounded G and U. again: backward's call, only for what is not kept
static inline void grouped_up_forward(ChunkH h, int again, const floatX *x, const floatX *w_gate_up,
                                      RowChunk chunk, int d, int F, cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_up_forward(h, again, x, w_gate_up, chunk, d, F, stream));
}

// Y = (gate A) W_down^T
static inline void grouped_down_forward(floatX *y, ChunkH h, const floatX *w_down, RowChunk chunk, int d,
                                        int F, cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_down_forward(y, h, w_down, chunk, d, F, stream));
}

// dA' = dO' W_down; G, U become dG, dU; dgate_partial [R, grouped_dgate_tiles]: sums of dA' A, one per tile
static inline void grouped_down_backward(ChunkH h, float *dgate_partial, const floatX *dy,
                                         const floatX *w_down, RowChunk chunk, int d, int F,
                                         cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_down_backward(h, dgate_partial, dy, w_down, chunk, d, F, stream));
}

// dW_down[e] += dO'^T (gate A); chunk.fresh: set, of the experts whose first row is in the chunk
static inline void grouped_down_wgrad(float *dw_down, const floatX *dy, ChunkH h, RowChunk chunk, int d,
                                      int F, cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_down_wgrad(dw_down, dy, h, chunk, d, F, stream));
}

// dW_gate_up[e] += dH^T X'; the same
static inline void grouped_up_wgrad(float *dw_gate_up, ChunkH h, const floatX *x, RowChunk chunk, int d,
                                    int F, cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_up_wgrad(dw_gate_up, h, x, chunk, d, F, stream));
}

// dX' = dH W_gate_up
static inline void grouped_up_backward(floatX *dx, ChunkH h, const floatX *w_gate_up, RowChunk chunk, int d,
                                       int F, cudaStream_t stream) {
    GROUPED(chunk.kernels, grouped_up_backward(dx, h, w_gate_up, chunk, d, F, stream));
}

#undef GROUPED

#endif
