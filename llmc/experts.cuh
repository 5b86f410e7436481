/*
SwiGLU experts over the dispatched rows, a chunk of rows at a time (arena.cuh). Equals experts_forward and
experts_backward of experts.h; like there no expert's output and no gathered row outlives its use.

    forward, for each chunk of R rows                                                  in experts.h
      x [N, d] --rows--> grouped_up_forward     [G | U] = X' W_gate_up^T               gather, matmul,
          gate                                  gate A, where A = silu(G) * U          swiglu_forward
      gate A ----------> grouped_down_forward   Y [R, d] = (gate A) W_down^T           matmul, scaled
      Y ---------------> dispatch_combine       y_t = residual_t + sum_p Y[row]        combine
    backward, for each chunk
      x, unless H is kept: grouped_up_forward   H = [G | U | gate A] again, same bits
      dy [N, d] --rows-> grouped_down_backward  dA' = dO' W_down; in its epilogue      gather, matmul,
          G, U, gate                              dgate_p = <dA', A>, a tile's part    swiglu_backward
                                                  G <- dG, U <- dU
      dy, gate A ------> grouped_down_wgrad     dW_down += dO'^T (gate A)              matmul
      dG, dU, x -------> grouped_up_wgrad       dW_gate_up += [dG | dU]^T X'           gather, matmul
      dG, dU ----------> grouped_up_backward    dX' [R, d] = [dG | dU] W_gate_up       matmul
      dX' -------------> dispatch_combine       dx_t = residual_t + sum_p dX'[row]     combine
      parts of dgate --> dispatch_dgate         dgate_p, their sum in order            its last loop

where row = row_of_pair[p], dG = gate dA' U silu'(G), dU = gate dA' silu(G), and --rows--> is a gather that
the GEMM does while it loads. Unlike the C functions these do not add to y and dx but write residual + sum,
rounded once: the residual stream is read and written in the same pass. Shapes: x, y, dx, dy, residual [N,
d] floatX; w_gate_up [E, 2F, d], w_down [E, d, F] floatX, their gradients fp32 and added to; dgate [P] fp32,
in the pair list's order. d and F are multiples of 8. y may be residual, and dx may be residual or dy: they
are written after all else is read. With y (dx) NULL the last chunk's combine is left to the caller, who has
something to do with the sum while it is in registers (dispatch_rmsnorm.cuh): experts_last_chunk() describes
it, until the arena's next use. Before: dispatch_sort and arena_place of the layer. Errors: none here;
*arena->overflow afterwards.
*/
#ifndef EXPERTS_CUH
#define EXPERTS_CUH

#include "arena.cuh"
#include "dispatch.cuh"
#include "dispatch_rmsnorm.cuh"
#include "grouped_gemm.cuh"
// defines: RowChunk, ChunkH, arena_chunk, arena_h; dispatch_combine; CombineChunk; grouped_*

// what a combine that was left to the caller has to add
static inline CombineChunk experts_last_chunk(DevicePairs pairs, DeviceDispatch dispatch, const Arena *arena,
                                              int layer) {
    int first = (arena->planned[layer] - 1) * arena->chunk_rows;
    CombineChunk chunk = {arena->rows, arena->sum, first, arena->chunk_rows, pairs, dispatch};
    return chunk;
}

// y = residual + the experts' weighted sum; residual NULL: 0
static inline void experts_forward(floatX *y, const floatX *residual, const floatX *x,
                                   const floatX *w_gate_up, const floatX *w_down, DevicePairs pairs,
                                   DeviceDispatch dispatch, Arena *arena, int layer, int N, int E, int d,
                                   int F, cudaStream_t stream) {
    (void)E; // the arena has it
    for (int c = 0; c < arena->planned[layer]; c++) {
        RowChunk chunk = arena_chunk(arena, dispatch, c);
        ChunkH h = arena_h(arena, layer, c);
        int last = c == arena->planned[layer] - 1;
        grouped_up_forward(h, 0, x, w_gate_up, chunk, d, F, stream);       // gate silu(G) U
        grouped_down_forward(arena->rows, h, w_down, chunk, d, F, stream); // Y = (gate A) W_down^T
        if (!last || y != NULL) {
            dispatch_combine(y, arena->sum, residual, arena->rows, pairs, dispatch, N, d, chunk.first,
                             chunk.rows, last, stream); // (Eq. 1)
        }
    }
}

// dx = residual + ...; dw += ...; dgate [P] is overwritten; H is spent
static inline void experts_backward(floatX *dx, float *dgate, float *dw_gate_up, float *dw_down,
                                    const floatX *residual, const floatX *dy, const floatX *x,
                                    const floatX *w_gate_up, const floatX *w_down, DevicePairs pairs,
                                    DeviceDispatch dispatch, Arena *arena, int layer, int N, int E, int d,
                                    int F, cudaStream_t stream) {
    for (int c = 0; c < arena->planned[layer]; c++) {
        RowChunk chunk = arena_chunk(arena, dispatch, c);
        ChunkH h = arena_h(arena, layer, c);
        int last = c == arena->planned[layer] - 1;
        floatX *rows = arena->rows;
        float *partial = arena->dgate_partial;
        grouped_up_forward(h, 1, x, w_gate_up, chunk, d, F, stream);        // H, if it has no place
        grouped_down_backward(h, partial, dy, w_down, chunk, d, F, stream); // dG, dU, parts of <dA', A>
        grouped_down_wgrad(dw_down, dy, h, chunk, d, F, stream);            // dW_down += dO'^T (gate A)
        grouped_up_wgrad(dw_gate_up, h, x, chunk, d, F, stream);            // dW_gate_up += [dG | dU]^T X'
        grouped_up_backward(rows, h, w_gate_up, chunk, d, F, stream);       // dX' = [dG | dU] W_gate_up
        if (!last || dx != NULL) {
            dispatch_combine(dx, arena->sum, residual, rows, pairs, dispatch, N, d, chunk.first, chunk.rows,
                             last, stream); // dx_t += sum_p dX'[row_of_pair p]
        }
        dispatch_dgate(dgate, partial, arena->dgate_tiles, pairs, dispatch, N, E, chunk.first, chunk.rows,
                       stream);
    }
}

#endif
