/*
Matrix multiplication in fp32: one blocked, packed sgemm, and the linear layers made of it, whole or by expert.

    C[M,N] = (accumulate ? C : 0) + op(A)[M,K] op(B)[K,N]         row-major, with leading dimensions
    out = inp W^T           dinp = dout W           dW += dout^T inp          a linear layer, W [OC, C]

A core that can start two 16-lane fused multiply-adds a cycle does 64 flops a cycle (AVX-512), if nothing ever waits:

1. The tile. 8 x 48 elements of C live in registers: 24 accumulators. A step of k loads 3 vectors of B and 8 scalars
   of A (11 loads, 2 of which can start a cycle) and does 24 multiply-adds (12 cycles): the loads hide behind
   the arithmetic, and 24 independent sums hide the 4 cycles that each multiply-add takes. A plain triple
   loop has one load or store an operation and one chain of dependent sums; it reaches a few percent of that.
   With 16 registers (SSE, AVX2) the tile is 6 rows x 2 vectors for the same reasons.
2. Packing. The tile wants B's 48 columns side by side, k after k. They are copied that way once (transposed when B is
   stored [N,K]) and then read by every row tile, from the first-level cache and without page misses. A is read where
   it stands, 8 rows at a time, unless stored [K,M]: then its blocks are packed too. B in place is
   good enough, and packing not worth it, when few rows share it.
3. Blocking. k is cut at BLOCK_K so that a packed panel stays in the nearest cache, rows at BLOCK_M so that A's block stays in
   the second one while all panels pass over it, columns at BLOCK_N, which bounds the scratch memory.

Same bits whatever the threads, the tile or the neighbours: each element of C is the sum, from 0, of its products in the order
of k within each block of BLOCK_K, and these sums are added to C in order. Neither M, N nor the place in the matrix enters,
so a row computed alone equals the same row among others (sampling with a cache relies on it), and threads only ever
divide C, never k. Multiply-adds are written out as fused ones, because whether a compiler fuses c + a*b depends on
-std and -ffp-contract, and not always alike in two copies of a loop.

By expert: the rows offsets[e] .. offsets[e+1] of inp (sorted by expert) meet W[e]. Laid end to end, the experts'
work is a line; each thread takes an equal length of it, so uneven experts cost nothing.

Shapes: N tokens (P pairs when grouped), C inputs, OC outputs, E experts. Errors: none. C is not read unless accumulate.
*/
#ifndef MATMUL_H
#define MATMUL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif
// defines: int64_t, memcpy, omp_get_num_threads, _mm512_fmadd_ps, _mm256_fmadd_ps, vfmaq_f32

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8, TILE_VECS = 3 };
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, TILE_ROWS = 8, TILE_VECS = 3 };
#else
enum { LANES = 4, TILE_ROWS = 6, TILE_VECS = 2 };
#endif
enum { TILE_COLS = TILE_VECS * LANES, BLOCK_K = 384, BLOCK_M = 24 * TILE_ROWS, BLOCK_N = 768, PAD_K = 2 };

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // in memory, unaligned

typedef struct {
    int trans_a, trans_b, accumulate;
    int64_t M, N, K;
    const float *A;
    int64_t lda;
    const float *B;
    int64_t ldb;
    float *C;
    int64_t ldc;
} Gemm;

typedef int32_t Lanes __attribute__((vector_size(4 * LANES)));
#if defined(__AVX512F__)
#define LOWER_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define LOWER_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER_HALVES 0, 4, 1, 5
#define UPPER_HALVES 2, 6, 3, 7
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

// a b + c, rounded once where the machine can
ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// ----------------------------------------------------------------------------
// the tile

// rows x vecs vectors of C; op(A)[r,k] = a[r*a_row + k*a_k], op(B)[k,] = b[k*b_k]; rows and vecs are constants
ALWAYS_INLINE void tile(const int rows, const int vecs, int64_t K, const float *a, int64_t a_row, int64_t a_k,
                        const float *b, int64_t b_k, float *c, int64_t ldc, int accumulate) {
    const Vec zero = {0};
    Vec sum[TILE_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vecs; v++) {
            sum[r][v] = zero;
        }
    }
    for (int64_t k = 0; k < K; k++) {
        Vec row_of_b[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; v++) {
            row_of_b[v] = *(const VecAnywhere *)(b + v * LANES);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            Vec a_everywhere = a[r * a_row] - zero;
            UNROLL for (int v = 0; v < vecs; v++) {
                sum[r][v] = multiply_add(a_everywhere, row_of_b[v], sum[r][v]);
            }
        }
        a += a_k;
        b += b_k;
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vecs; v++) {
            VecAnywhere *to = (VecAnywhere *)(c + r * ldc + v * LANES);
            if (accumulate) {
                sum[r][v] += *to;
            }
            *to = sum[r][v];
        }
    }
}

// a tile of any number of rows and vectors, by one of TILE_ROWS * TILE_VECS loops that the compiler makes of that one
static inline void tile_whole(int rows, int vecs, int64_t K, const float *a, int64_t a_row, int64_t a_k,
                              const float *b, int64_t b_k, float *c, int64_t ldc, int accumulate) {
    switch (rows * 4 + vecs) {
#define TILE_CASE(r, v) case (r) * 4 + (v): tile(r, v, K, a, a_row, a_k, b, b_k, c, ldc, accumulate); break;
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_CASES(r) TILE_CASE(r, 1) TILE_CASE(r, 2) TILE_CASE(r, 3)
    TILE_CASES(7) TILE_CASES(8)
#else
#define TILE_CASES(r) TILE_CASE(r, 1) TILE_CASE(r, 2)
#endif
    TILE_CASES(1) TILE_CASES(2) TILE_CASES(3) TILE_CASES(4) TILE_CASES(5) TILE_CASES(6)
#undef TILE_CASES
#undef TILE_CASE
    }
}

// a tile of any number of columns: the last of C need not be whole vectors
static inline void tile_any(int rows, int cols, int64_t K, const float *a, int64_t a_row, int64_t a_k, const float *b,
                            int64_t b_k, float *c, int64_t ldc, int accumulate) {
    int vecs = (cols + LANES - 1) / LANES;
    if (cols == vecs * LANES) {
        tile_whole(rows, vecs, K, a, a_row, a_k, b, b_k, c, ldc, accumulate);
        return;
    }
    float edge[TILE_ROWS * TILE_COLS] = {0};
    tile_whole(rows, vecs, K, a, a_row, a_k, b, b_k, edge, TILE_COLS, 0);
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < cols; j++) {
            float sum = edge[r * TILE_COLS + j];
            c[r * ldc + j] = accumulate ? c[r * ldc + j] + sum : sum;
        }
    }
}

// ----------------------------------------------------------------------------
// packing: n columns in panels of `width`, each panel k after k; the last panel is as many vectors as it needs

// columns stand side by side: column j of step k is from[k*ld + j]
ALWAYS_INLINE void pack(float *to, const float *from, int64_t ld, int64_t K, int64_t n, const int width,
                        const int step) {
    for (int64_t k = 0; k < K; k++) {
        int64_t j = 0;
        for (; j + width <= n; j += width) {
            memcpy(to + j * (K + PAD_K) + k * width, from + k * ld + j, sizeof(float) * width);
        }
        if (j < n) {
            int64_t last = round_up(n - j, step);
            for (int64_t i = 0; i < last; i++) {
                to[j * (K + PAD_K) + k * last + i] = j + i < n ? from[k * ld + j + i] : 0.0f;
            }
        }
    }
}

ALWAYS_INLINE Vec interleave(Vec a, Vec b, const int upper) {
#ifdef __clang__
    return upper ? __builtin_shufflevector(a, b, UPPER_HALVES) : __builtin_shufflevector(a, b, LOWER_HALVES);
#else
    const Lanes lower_halves = {LOWER_HALVES}, upper_halves = {UPPER_HALVES};
    return __builtin_shuffle(a, b, upper ? upper_halves : lower_halves);
#endif
}

// LANES x LANES elements: interleaving the first half of the rows with the second log2(LANES) times transposes them
ALWAYS_INLINE void transpose(float *to, int64_t to_ld, const float *from, int64_t from_ld, int64_t rows) {
    Vec x[LANES], y[LANES];
    UNROLL for (int i = 0; i < LANES; i++) {
        x[i] = *(const VecAnywhere *)(from + (i < rows ? i : rows - 1) * from_ld);
    }
    UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = interleave(x[i], x[i + LANES / 2], 0);
            y[2 * i + 1] = interleave(x[i], x[i + LANES / 2], 1);
        }
        UNROLL for (int i = 0; i < LANES; i++) {
            x[i] = y[i];
        }
    }
    UNROLL for (int i = 0; i < LANES; i++) {
        *(VecAnywhere *)(to + i * to_ld) = x[i];
    }
}

// k stands side by side: column j of step k is from[j*ld + k]
static inline void pack_transposed(float *to, const float *from, int64_t ld, int64_t K, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES) {
        int64_t panel = j / TILE_COLS * TILE_COLS;
        int64_t width = smaller(TILE_COLS, round_up(n - panel, LANES));
        float *column = to + panel * (K + PAD_K) + j - panel;
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            transpose(column + k * width, width, from + j * ld + k, ld, smaller(LANES, n - j));
        }
        for (; k < K; k++) {
            for (int i = 0; i < LANES; i++) {
                column[k * width + i] = j + i < n ? from[(j + i) * ld + k] : 0.0f;
            }
        }
    }
}

// ----------------------------------------------------------------------------
// one thread's sgemm

// Packed blocks live in thread-local memory: too large for every stack, needed too often for malloc, of use to nobody
// once a call has returned.
ALWAYS_INLINE float *packing_memory(void) {
    static __thread float memory[(BLOCK_K + PAD_K) * (BLOCK_N + BLOCK_M)] __attribute__((aligned(64)));
    return memory;
}

static inline void gemm_clear(const Gemm *g) {
    for (int64_t i = 0; i < g->M && !g->accumulate; i++) {
        for (int64_t j = 0; j < g->N; j++) {
            g->C[i * g->ldc + j] = 0.0f;
        }
    }
}

// rows i0 .. i0 + M of C += op(A)[, k0..k0+K] times the packed columns j0 .. j0 + N
static inline void gemm_block(const Gemm *g, int64_t i0, int64_t M, int64_t j0, int64_t N, int64_t k0, int64_t K,
                              float *packed_a, const float *packed_b) {
    const float *a = g->A + i0 * g->lda + k0;
    int64_t a_row = g->lda, a_k = 1, next_tile = TILE_ROWS * g->lda;
    if (g->trans_a) {
        pack(packed_a, g->A + k0 * g->lda + i0, g->lda, K, M, TILE_ROWS, TILE_ROWS);
        a = packed_a;
        a_row = 1;
        a_k = TILE_ROWS;
        next_tile = TILE_ROWS * (K + PAD_K);
    }
    for (int64_t j = 0; j < N; j += TILE_COLS) {
        int cols = (int)smaller(TILE_COLS, N - j);
        int width = (cols + LANES - 1) / LANES * LANES;
        for (int64_t i = 0; i < M; i += TILE_ROWS) {
            tile_any((int)smaller(TILE_ROWS, M - i), cols, K, a + i / TILE_ROWS * next_tile, a_row, a_k,
                     packed_b + j * (K + PAD_K), width, g->C + (i0 + i) * g->ldc + j0 + j, g->ldc,
                     g->accumulate || k0 > 0);
        }
    }
}

static inline void gemm_serial(const Gemm *g) {
    float *packed_b = packing_memory();
    float *packed_a = packed_b + (BLOCK_K + PAD_K) * BLOCK_N;
    if (g->K == 0) {
        gemm_clear(g);
    }
    for (int64_t j0 = 0; j0 < g->N; j0 += BLOCK_N) {
        int64_t N = smaller(BLOCK_N, g->N - j0);
        for (int64_t k0 = 0; k0 < g->K; k0 += BLOCK_K) {
            int64_t K = smaller(BLOCK_K, g->K - k0);
            if (g->trans_b) {
                pack_transposed(packed_b, g->B + j0 * g->ldb + k0, g->ldb, K, N);
            } else {
                pack(packed_b, g->B + k0 * g->ldb + j0, g->ldb, K, N, TILE_COLS, LANES);
            }
            for (int64_t i0 = 0; i0 < g->M; i0 += BLOCK_M) {
                gemm_block(g, i0, smaller(BLOCK_M, g->M - i0), j0, N, k0, K, packed_a, packed_b);
            }
        }
    }
}

static inline Gemm gemm_make(int trans_a, int trans_b, int64_t M, int64_t N, int64_t K, const float *A, int64_t lda,
                             const float *B, int64_t ldb, float *C, int64_t ldc, int accumulate) {
    Gemm g = {trans_a, trans_b, accumulate, M, N, K, A, lda, B, ldb, C, ldc};
    return g;
}

static inline void sgemm_serial(int trans_a, int trans_b, int M, int N, int K, const float *A, int64_t lda,
                                const float *B, int64_t ldb, float *C, int64_t ldc, int accumulate) {
    Gemm g = gemm_make(trans_a, trans_b, M, N, K, A, lda, B, ldb, C, ldc, accumulate);
    gemm_serial(&g);
}

// ----------------------------------------------------------------------------
// threads

// the part of C below rows i0.., columns j0..
static inline Gemm gemm_part(Gemm g, int64_t i0, int64_t M, int64_t j0, int64_t N) {
    g.A += g.trans_a ? i0 : i0 * g.lda;
    g.B += g.trans_b ? j0 * g.ldb : j0;
    g.C += i0 * g.ldc + j0;
    g.M = M;
    g.N = N;
    return g;
}

// expert e's product. The grouped rows are C's (by_k = 0: B is [E, ..]) or those summed over (by_k = 1: C is [E, M, N])
static inline Gemm gemm_of_expert(Gemm g, int by_k, const int64_t *offsets, int e) {
    g.A += offsets[e] * g.lda;
    if (by_k) {
        g.B += offsets[e] * g.ldb;
        g.C += e * g.M * g.N;
        g.K = offsets[e + 1] - offsets[e];
    } else {
        g.B += e * g.N * g.K;
        g.C += offsets[e] * g.ldc;
        g.M = offsets[e + 1] - offsets[e];
    }
    return g;
}

// where part i of n begins: equal parts, cut at multiples of step
static inline int64_t part_begin(int64_t size, int64_t step, int i, int n) {
    return smaller(size, (size + step - 1) / step * i / n * step);
}

// Into how many parts to cut the rows so that threads / parts cuts of the columns make the least work for the busiest
// thread; packing a column costs it about as much as 16 rows.
static inline int choose_row_parts(int64_t M, int64_t N, int threads) {
    int best = 1;
    int64_t least = INT64_MAX;
    for (int parts = 1; parts <= threads; parts++) {
        if (threads % parts == 0) {
            int64_t rows = round_up((M + parts - 1) / parts, TILE_ROWS);
            int64_t cols = round_up((N * parts + threads - 1) / threads, LANES);
            if ((rows + 16) * cols < least) {
                least = (rows + 16) * cols;
                best = parts;
            }
        }
    }
    return best;
}

// Share out the E products by a team of threads. The line of work: expert e owns offsets[e] .. offsets[e+1] of it.
static inline void gemm_shared(Gemm all, int by_k, const int64_t *offsets, int E) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_num_threads();
#endif
    int64_t length = offsets[E];
    int row_parts = choose_row_parts(by_k ? E * all.M : length, all.N, threads);
    int col_parts = threads / row_parts;
#pragma omp for schedule(dynamic) nowait
    for (int part = 0; part < threads; part++) {
        int row = part % row_parts, col = part / row_parts;
        int64_t begin = length * row / row_parts, end = length * (row + 1) / row_parts;
        int64_t j0 = part_begin(all.N, TILE_COLS, col, col_parts);
        int64_t j1 = part_begin(all.N, TILE_COLS, col + 1, col_parts);
        for (int e = 0; e < E; e++) {
            Gemm g = gemm_of_expert(all, by_k, offsets, e);
            int64_t rows = offsets[e + 1] - offsets[e];
            if (rows == 0) {
                continue;
            }
            int64_t from = begin < offsets[e] ? 0 : smaller(rows, begin - offsets[e]);
            int64_t to = end < offsets[e] ? 0 : smaller(rows, end - offsets[e]);
            int64_t i0 = smaller(g.M, round_up(from * g.M / rows, TILE_ROWS));
            int64_t i1 = to == rows ? g.M : smaller(g.M, round_up(to * g.M / rows, TILE_ROWS));
            if (i0 < i1 && j0 < j1) {
                Gemm mine = gemm_part(g, i0, i1 - i0, j0, j1 - j0);
                gemm_serial(&mine);
            }
        }
    }
}

// below this many multiply-adds, waking the other threads costs more than they save
enum { WORTH_THREADS = 100000 };

static inline void gemm_parallel(Gemm g) {
    int64_t offsets[2] = {0, g.M};
    if (g.K == 0) {
        gemm_clear(&g);
        return;
    }
#pragma omp parallel if (g.M * g.N * g.K > WORTH_THREADS)
    gemm_shared(g, 0, offsets, 1);
}

static inline void sgemm(int trans_a, int trans_b, int M, int N, int K, const float *A, int64_t lda, const float *B,
                         int64_t ldb, float *C, int64_t ldc, int accumulate) {
    gemm_parallel(gemm_make(trans_a, trans_b, M, N, K, A, lda, B, ldb, C, ldc, accumulate));
}

// ----------------------------------------------------------------------------
// linear layers, by expert and whole

// out[P, OC] = inp[P, C] weight[e][OC, C]^T, e the expert that owns the row
static inline void matmul_grouped_forward(float *out, const float *inp, const float *weight, const int64_t *offsets,
                                          int E, int C, int OC) {
    Gemm g = gemm_make(0, 1, 0, OC, C, inp, C, weight, C, out, OC, 0);
#pragma omp parallel if (offsets[E] * OC * C > WORTH_THREADS)
    gemm_shared(g, 0, offsets, E);
}

// dinp[P, C] = dout[P, OC] weight[e][OC, C] (may be NULL); dweight[e][OC, C] += dout^T inp over e's rows (may be NULL)
static inline void matmul_grouped_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                                           const float *weight, const int64_t *offsets, int E, int C, int OC) {
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
static inline void matmul_forward(float *out, const float *inp, const float *weight, int64_t N, int C, int OC) {
    int64_t offsets[2] = {0, N};
    matmul_grouped_forward(out, inp, weight, offsets, 1, C, OC);
}

// dinp[N, C] = dout[N, OC] weight[OC, C] (may be NULL); dweight[OC, C] += dout^T inp (may be NULL)
static inline void matmul_backward(float *dinp, float *dweight, const float *dout, const float *inp,
                                   const float *weight, int64_t N, int C, int OC) {
    int64_t offsets[2] = {0, N};
    matmul_grouped_backward(dinp, dweight, dout, inp, weight, offsets, 1, C, OC);
}

#undef UNROLL
#undef ALWAYS_INLINE
#endif
