/*
Matrix multiplication in fp32: one thread's sgemm (matmul_kernel.h) shared among threads, and the linear
layers made of it.

    C[M,N] = (accumulate ? C : 0) + op(A)[M,K] op(B)[K,N]         row-major, with leading dimensions
    out = inp W^T           dinp = dout W           dW += dout^T inp          a linear layer, W [OC, C]

Threads divide C, never k. The order in which an element of C is summed depends on K alone, so the number of
threads does not change its bits.

By expert: the rows of inp are sorted by expert, those of expert e are offsets[e] .. offsets[e+1]. Laid end to
end the experts' work is a line, of which each thread takes an equal length: uneven experts cost nothing.

Shapes: N tokens (P pairs when grouped), C inputs, OC outputs, E experts. Errors: none. C is not read unless
accumulate.
*/
#ifndef MATMUL_H
#define MATMUL_H

#include "llmc/matmul_kernel.h"
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: omp_get_thread_num, omp_get_num_threads

// ----------------------------------------------------------------------------
// threads

// What packing and other overhead cost, in rows of C: an expert of n rows costs about n + OVERHEAD_ROWS.
// Below WORTH_THREADS multiply-adds, waking the other threads costs more than they save.
enum { OVERHEAD_ROWS = 16, WORTH_THREADS = 200000 };

// Expert e's product. Its rows are C's (by_k = 0; B has a matrix per expert) or the ones summed over (by_k =
// 1; C has).
static inline Gemm gemm_of_expert(Gemm all, int by_k, const int64_t *offsets, int e) {
    Gemm g = all;
    g.A += offsets[e] * all.lda;
    if (by_k) {
        g.B += offsets[e] * all.ldb;
        g.C += e * all.M * all.N;
        g.K = offsets[e + 1] - offsets[e];
    } else {
        g.B += e * all.N * all.K;
        g.C += offsets[e] * all.ldc;
        g.M = offsets[e + 1] - offsets[e];
    }
    return g;
}

// rows i0 .. i1, columns j0 .. j1 of the product
static inline Gemm gemm_part(Gemm g, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    g.A += g.trans_a ? i0 : i0 * g.lda;
    g.B += g.trans_b ? j0 * g.ldb : j0;
    g.C += i0 * g.ldc + j0;
    g.M = i1 - i0;
    g.N = j1 - j0;
    return g;
}

// Into how many parts to cut the rows, the columns being cut into threads / parts: so that a thread's part of
// C and the packing of its columns are least together.
static inline int choose_row_parts(int64_t M, int64_t N, int threads) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int parts = 1; parts <= threads; parts++) {
        int64_t rows = round_up((M + parts - 1) / parts, TILE_ROWS) + OVERHEAD_ROWS;
        int64_t cols = round_up((N * parts + threads - 1) / threads, LANES);
        if (threads % parts == 0 && rows * cols < least) {
            least = rows * cols;
            best = parts;
        }
    }
    return best;
}

// where part i of n begins: equal parts, cut at multiples of step
static inline int64_t part_begin(int64_t size, int64_t step, int i, int n) {
    return smaller(size, (size + step - 1) / step * i / n * step);
}

static inline int64_t expert_cost(const int64_t *offsets, int e) {
    int64_t rows = offsets[e + 1] - offsets[e];
    return rows > 0 ? rows + OVERHEAD_ROWS : 0;
}

// This thread's part of the E products: an equal length of the line of costs, which cuts an expert's rows of
// C in proportion, and its part of the columns. Called by every thread of a team.
static inline void gemm_shared(Gemm all, int by_k, const int64_t *offsets, int E) {
    int thread = 0, threads = 1;
#ifdef _OPENMP
    thread = omp_get_thread_num();
    threads = omp_get_num_threads();
#endif
    int row_parts = choose_row_parts(by_k ? E * all.M : offsets[E], all.N, threads);
    int col_parts = threads / row_parts, row = thread % row_parts, col = thread / row_parts;
    int64_t j0 = part_begin(all.N, TILE_COLS, col, col_parts);
    int64_t j1 = part_begin(all.N, TILE_COLS, col + 1, col_parts);
    int64_t length = 0;
    for (int e = 0; e < E; e++) {
        length += expert_cost(offsets, e);
    }
    int64_t begin = length * row / row_parts, end = length * (row + 1) / row_parts;
    for (int e = 0; e < E; e++) {
        int64_t cost = expert_cost(offsets, e); // expert e is 0 .. cost in what follows
        if (cost > 0 && begin < cost && end > 0) {
            Gemm g = gemm_of_expert(all, by_k, offsets, e);
            int64_t i0 = begin > 0 ? smaller(g.M, round_up(begin * g.M / cost, TILE_ROWS)) : 0;
            int64_t i1 = end < cost ? smaller(g.M, round_up(end * g.M / cost, TILE_ROWS)) : g.M;
            Gemm mine = gemm_part(g, i0, i1, j0, j1);
            gemm_serial(&mine);
        }
        begin -= cost;
        end -= cost;
    }
}

// C[M,N] = (accumulate ? C : 0) + op(A)[M,K] op(B)[K,N], C's rows and columns divided among the threads
static inline void sgemm(int trans_a, int trans_b, int M, int N, int K, const float *A, int64_t lda,
                         const float *B, int64_t ldb, float *C, int64_t ldc, int accumulate) {
    Gemm g = gemm_make(trans_a, trans_b, M, N, K, A, lda, B, ldb, C, ldc, accumulate);
    int64_t offsets[2] = {0, M};
#pragma omp parallel if ((int64_t)M * N * K > WORTH_THREADS)
    gemm_shared(g, 0, offsets, 1);
}

// ----------------------------------------------------------------------------
// linear layers, by expert and whole

// out[P, OC] = inp[P, C] weight[e][OC, C]^T, e the expert that owns the row
static inline void matmul_grouped_forward(float *out, const float *inp, const float *weight,
                                          const int64_t *offsets, int E, int C, int OC) {
    Gemm g = gemm_make(0, 1, 0, OC, C, inp, C, weight, C, out, OC, 0);
#pragma omp parallel if (offsets[E] * OC * C > WORTH_THREADS)
    gemm_shared(g, 0, offsets, E);
}

// dinp[P, C] = dout[P, OC] weight[e][OC, C] (may be NULL); dweight[e][OC, C] += dout^T inp over e's rows (may
// be NULL)
static inline void matmul_grouped_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                                           const float *weight, const int64_t *offsets, int E, int C,
                                           int OC) {
    Gemm to_inp = gemm_make(0, 0, 0, C, OC, dout, OC, weight, C, dinp, C, 0);
    Gemm to_weight = gemm_make(1, 0, OC, C, 0, dout, OC, inp, C, dweight, C, 1);
#pragma omp parallel if (offsets[E] * OC * C > WORTH_THREADS)
    {
        if (dinp != NULL) {
            gemm_shared(to_inp, 0, offsets, E);
        }
        if (dweight != NULL) {
            gemm_shared(to_weight, 1, offsets, E);
        }
    }
}

// out[N, OC] = inp[N, C] weight[OC, C]^T
static inline void matmul_forward(float *out, const float *inp, const float *weight, int64_t N, int C,
                                  int OC) {
    int64_t offsets[2] = {0, N};
    matmul_grouped_forward(out, inp, weight, offsets, 1, C, OC);
}

// dinp[N, C] = dout[N, OC] weight[OC, C] (may be NULL); dweight[OC, C] += dout^T inp (may be NULL)
static inline void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                                   const float *weight, int64_t N, int C, int OC) {
    int64_t offsets[2] = {0, N};
    matmul_grouped_backward(dinp, dweight, dout, inp, weight, offsets, 1, C, OC);
}

#endif
