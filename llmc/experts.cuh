/*
SwiGLU experts over the dispatched rows, a chunk of rows at a time (arena.cuh). Equals experts_forward and
experts_backward of experts.h; like there no expert's output and no gathered row outlives its use.

    forward, for each chunk of R rows                                                  in experts.h
      x [N, d] --rows--> grouped_up_forward     [G | U] = X' W_gate_up^T               gather, matmul,
          gate                                  gate A, where A = silu(G) * U          swiglu_forward
      gate A ----------> grouped_down_forward   Y [R, d] = (gate A) W_down^T           matmul, scaled
      Y ---------------> dispatch_combine       y_t = residual_t + sum_p Y[row]        combine
    backward, if nothing has been added to the gradients yet (fresh): experts_clear_unused, dW = 0 of experts
    without a row; then for each chunk
      x, unless H is kept: grouped_up_forward   H = [G | U | gate A] again, same bits
      dy [N, d] --rows-> grouped_down_backward  dA' = dO' W_down; in its epilogue      gather, matmul,
          G, U, gate                              dgate_p = <dA', A>, a tile's part    swiglu_backward
                                                  G <- dG, U <- dU
      dy, gate A ------> grouped_down_wgrad     dW_down += dO'^T (gate A)              matmul
      dG, dU, x -------> grouped_up_wgrad       dW_gate_up += dH^T X'                  gather, matmul
                                                fresh: = for +=
      dG, dU ----------> grouped_up_backward    dX' [R, d] = dH W_gate_up              matmul
      dX' -------------> dispatch_combine       dx_t = residual_t + sum_p dX'[row]     combine
      parts of dgate --> dispatch_dgate         dgate_p, their sum in order            its last loop

where row = row_of_pair[p], dG = gate dA' U silu'(G), dU = gate dA' silu(G), dH = [dG | dU], and --rows--> is
a gather that the GEMM does while it loads. Unlike the C functions these leave the last chunk's combine to the
caller, who has something to do with the sum while it is in registers (dispatch_rmsnorm.cuh): they return what
is to be combined, good until the arena's next use. Shapes: x, dy [N, d] floatX; the bank's weights floatX,
their gradients fp32; dgate [P] fp32, in the pair list's order. d and F are multiples of 8. Before:
dispatch_sort and arena_place of the layer. Errors: none here; *arena->overflow afterwards.
*/
#ifndef EXPERTS_CUH
#define EXPERTS_CUH

#include "llmc/gpu/arena.cuh"
#include "llmc/dispatch.cuh"
#include "llmc/gpu/dispatch_rmsnorm.cuh"
#include "llmc/gpu/grouped_gemm.cuh"
// defines: RowChunk, ChunkH, arena_chunk, arena_h; dispatch_combine; CombineChunk; grouped_*

typedef struct { // as ExpertBank of experts.h
    int E, d, F;
    const floatX *gate_up, *down; // [E, 2F, d], [E, d, F]
    float *dgate_up, *ddown;      // the same shapes; NULL without training
} DeviceBank;

// a chunk's rows through their experts: Y
static inline void experts_chunk_forward(floatX *y, ChunkH h, const floatX *x, DeviceBank bank,
                                         RowChunk chunk, cudaStream_t stream) {
    grouped_up_forward(h, 0, x, bank.gate_up, chunk, bank.d, bank.F, stream); // gate silu(G) U
    grouped_down_forward(y, h, bank.down, chunk, bank.d, bank.F, stream);     // Y = (gate A) W_down^T
}

// dX', the bank's gradients and parts of <dA', A>; H is spent
static inline void experts_chunk_backward(floatX *dx, float *partial, ChunkH h, const floatX *dy,
                                          const floatX *x, DeviceBank bank, RowChunk chunk,
                                          cudaStream_t stream) {
    int d = bank.d, F = bank.F;
    grouped_up_forward(h, 1, x, bank.gate_up, chunk, d, F, stream);        // H, if it is not kept
    grouped_down_backward(h, partial, dy, bank.down, chunk, d, F, stream); // dG, dU, parts of <dA', A>
    grouped_down_wgrad(bank.ddown, dy, h, chunk, d, F, stream);            // dW_down += dO'^T (gate A)
    grouped_up_wgrad(bank.dgate_up, h, x, chunk, d, F, stream);            // dW_gate_up += dH^T X'
    grouped_up_backward(dx, h, bank.gate_up, chunk, d, F, stream);         // dX' = dH W_gate_up
}

// Adds the chunk's rows (Y or dX') to their tokens' sums; the last chunk's are left
static inline void experts_combine(const Arena *arena, DevicePairs pairs, DeviceDispatch dispatch,
                                   RowChunk chunk, int last, int N, int d, cudaStream_t stream) {
    if (!last) {
        dispatch_combine((floatX *)NULL, arena->sum, NULL, arena->rows, pairs, dispatch, N, arena->E, d,
                         chunk.first, chunk.rows, 0, stream); // (Eq. 1)
    }
}

static inline CombineChunk experts_last_chunk(const Arena *arena, DevicePairs pairs, DeviceDispatch dispatch,
                                              int layer) {
    int first = (arena->planned[layer] - 1) * arena->chunk_rows;
    CombineChunk chunk = {arena->rows, arena->sum, first, arena->chunk_rows, pairs, dispatch, arena->E};
    return chunk;
}

// returns what sums to the experts' output
static inline CombineChunk experts_forward(const floatX *x, DeviceBank bank, DevicePairs pairs,
                                           DeviceDispatch dispatch, Arena *arena, int layer, int N,
                                           cudaStream_t stream) {
    for (int c = 0; c < arena->planned[layer]; c++) {
        RowChunk chunk = arena_chunk(arena, dispatch, c);
        experts_chunk_forward(arena->rows, arena_h(arena, layer, c), x, bank, chunk, stream);
        experts_combine(arena, pairs, dispatch, chunk, c == arena->planned[layer] - 1, N, bank.d, stream);
    }
    return experts_last_chunk(arena, pairs, dispatch, layer);
}

enum { CLEAR_THREADS = 256, CLEAR_BLOCKS = 32 }; // blocks: of an expert

static __global__ void __launch_bounds__(CLEAR_THREADS)
    clear_unused_kernel(float *dw, const int *offsets, int64_t size) {
    int e = (int)blockIdx.x / CLEAR_BLOCKS;
    if (offsets[e] < offsets[e + 1]) {
        return;
    }
    int64_t first = blockIdx.x % CLEAR_BLOCKS * CLEAR_THREADS + threadIdx.x;
    for (int64_t i = first; i < size; i += CLEAR_BLOCKS * CLEAR_THREADS) {
        dw[e * size + i] = 0.0f;
    }
}

// dw [E][size] = 0 of the experts that have no row: no product sets it
static inline void experts_clear_unused(float *dw, DeviceDispatch dispatch, int E, int64_t size,
                                        cudaStream_t stream) {
    launch(clear_unused_kernel, (unsigned)E * CLEAR_BLOCKS, CLEAR_THREADS, 0, stream, dw, dispatch.offsets,
           size);
}

// the bank's gradients += ...; fresh: = ..., whatever was there. dgate [P] is overwritten; H is spent.
// Returns what sums to the gradient of x
static inline CombineChunk experts_backward(float *dgate, const floatX *dy, const floatX *x, DeviceBank bank,
                                            int fresh, DevicePairs pairs, DeviceDispatch dispatch,
                                            Arena *arena, int layer, int N, cudaStream_t stream) {
    int d = bank.d, F = bank.F;
    if (fresh) {
        experts_clear_unused(bank.dgate_up, dispatch, bank.E, 2 * (int64_t)F * d, stream);
        experts_clear_unused(bank.ddown, dispatch, bank.E, (int64_t)F * d, stream);
    }
    for (int c = 0; c < arena->planned[layer]; c++) {
        RowChunk chunk = arena_chunk(arena, dispatch, c);
        chunk.fresh = fresh;
        float *partial = arena->dgate_partial;
        experts_chunk_backward(arena->rows, partial, arena_h(arena, layer, c), dy, x, bank, chunk, stream);
        experts_combine(arena, pairs, dispatch, chunk, c == arena->planned[layer] - 1, N, d, stream);
        dispatch_dgate(dgate, partial, arena->dgate_tiles, pairs, dispatch, N, arena->E, chunk.first,
                       chunk.rows, stream);
    }
    return experts_last_chunk(arena, pairs, dispatch, layer);
}

#endif
