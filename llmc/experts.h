/*
SwiGLU experts over the dispatched rows (Shazeer, 2020).

    forward   H = X' W_gate_up^T = [G | U];   A = silu(G) * U;   Y = A W_down^T
              y_t += sum_p gate_p Y[row_of_pair p]                                                 (Eq. 1)
    backward  dA' = dO' W_down            with dO' the gathered rows of dy, not yet multiplied by their gates
              dgate_p = <dA', A>          = <dy_t, Y>, so that Y need not be kept: only X and H are
              dW_down += (gate A)^T dO';    dA = gate dA'
              dG = dA U silu'(G);  dU = dA silu(G);   dW_gate_up += dH^T X';   dX' = dH W_gate_up
              dx_t += sum_p dX'[row_of_pair p]

with silu(g) = g sigmoid(g), silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g))). x, y, dx, dy [N, d]; h [P, 2F]
(gate columns first); P rows sorted by expert (dispatch.h). W_gate_up [E, 2F, d] and W_down [E, d, F] are a
bank of E experts: the experts of the pair list index it, wherever its weights come from and their gradients
go to. Without routing (one expert, every gate 1) this is the dense SwiGLU layer.
*/
#ifndef EXPERTS_H
#define EXPERTS_H

#include "llmc/dispatch.h"
#include "llmc/fast_exp.h"
#include "llmc/matmul.h"

typedef struct {
    int E, d, F;
    const float *gate_up, *down; // [E, 2F, d], [E, d, F]
    float *dgate_up, *ddown;     // the same shapes; NULL without training
} ExpertBank;

// a[P, F] = silu(h[:, :F]) * h[:, F:]
static inline void swiglu_forward(float *a, const float *h, int64_t P, int F) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < P; r++) {
        const float *gate = h + r * 2 * F;
        const float *up = gate + F;
        for (int c = 0; c < F; c++) {
            a[r * F + c] = gate[c] * fast_sigmoid(gate[c]) * up[c];
        }
    }
}

// h becomes dh in place and da becomes gate * a in place: da arrives as dA' (without the gate); dgate[r] =
// <dA', A>
static inline void swiglu_backward(float *h, float *da, float *dgate, const float *gates, int64_t P, int F) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < P; r++) {
        float *gate = h + r * 2 * F;
        float *up = gate + F;
        float *row = da + r * F;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < F; c++) {
            float sigmoid = fast_sigmoid(gate[c]);
            float silu = gate[c] * sigmoid;
            float a = silu * up[c];
            float d = row[c] * gates[r];
            dot += row[c] * a;
            row[c] = gates[r] * a;
            gate[c] = d * up[c] * sigmoid * (1.0f + gate[c] * (1.0f - sigmoid));
            up[c] = d * silu;
        }
        dgate[r] = dot;
    }
}

// y += the experts' weighted sum; keeps h; scratch holds at least P * (d + F) floats
static inline void experts_forward(float *y, float *h, const float *x, ExpertBank bank, const PairList *pairs,
                                   const Dispatch *dispatch, float *scratch) {
    int64_t P = pairs->num_pairs;
    int E = bank.E, d = bank.d, F = bank.F;
    if (P == 0) {
        return; // h and scratch may have no memory yet
    }
    float *rows = scratch; // X', then Y
    float *a = scratch + P * d;
    dispatch_gather(rows, x, dispatch, P, d);
    matmul_grouped_forward(h, rows, bank.gate_up, dispatch->offsets, E, d, 2 * F);
    swiglu_forward(a, h, P, F);
    matmul_grouped_forward(rows, a, bank.down, dispatch->offsets, E, F, d);
    dispatch_combine(y, rows, pairs, pairs->gate, dispatch, d);
}

// dx += ..., the bank's gradients += ...; dgate [P], in the pair list's order, is overwritten; h is spent;
// scratch as in the forward plus P floats
static inline void experts_backward(float *dx, float *dgate, const float *dy, const float *x, float *h,
                                    ExpertBank bank, const PairList *pairs, const Dispatch *dispatch,
                                    float *scratch) {
    int64_t P = pairs->num_pairs;
    int E = bank.E, d = bank.d, F = bank.F;
    const int64_t *offsets = dispatch->offsets;
    if (P == 0) {
        return;
    }
    float *rows = scratch; // dO', then X', then dX'
    float *a = rows + P * d;
    float *dgate_of_row = a + P * F;
    dispatch_gather(rows, dy, dispatch, P, d);
    matmul_grouped_backward(a, NULL, rows, NULL, bank.down, offsets, E, F, d);       // dA'
    swiglu_backward(h, a, dgate_of_row, dispatch->gate_of_row, P, F);                // a = gate A, h = dH
    matmul_grouped_backward(NULL, bank.ddown, rows, a, bank.down, offsets, E, F, d); // (gate A)^T dO'
    dispatch_gather(rows, x, dispatch, P, d);
    matmul_grouped_backward(NULL, bank.dgate_up, h, rows, bank.gate_up, offsets, E, d, 2 * F);
    matmul_grouped_backward(rows, NULL, h, NULL, bank.gate_up, offsets, E, d, 2 * F); // dX'
    dispatch_combine(dx, rows, pairs, NULL, dispatch, d);
    for (int64_t p = 0; p < P; p++) {
        dgate[p] = dgate_of_row[dispatch->row_of_pair[p]];
    }
}

#endif
