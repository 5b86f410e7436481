/*
One thread's sgemm in fp32: blocked and packed.

    C[M,N] = (accumulate ? C : 0) + op(A)[M,K] op(B)[K,N]         row-major, with leading dimensions

A core with AVX-512 can start two fused multiply-adds of 16 lanes per cycle: 64 flops, if nothing ever waits.

1. The tile. 8 x 48 elements of C live in 24 registers. One step of k loads 3 vectors of B and 8 scalars of A:
   11 loads, of which two can start per cycle. They hide behind the step's 24 multiply-adds, 12 cycles. These
   are 24 independent sums, so none waits the 4 cycles that its predecessor takes. The textbook's triple loop
   loads twice for each multiply-add of one long chain, and reaches a few percent. With 16 registers (SSE,
   AVX2) a tile is 6 rows x 2 vectors, for the same reasons.
2. Packing. The tile wants its 48 columns of B side by side, step after step of k. They are copied into such a
   panel once, transposed if B is stored [N,K], and every tile below reads the panel: no cache line half used,
   no page missed. Rows of A are read where they are, unless A is stored [K,M]: then they are packed likewise.
   An operand that only one or two tiles would read is not worth the copy.
3. Blocking. k is cut at BLOCK_K, columns at BLOCK_N: the packed panels fit a second-level cache of 2 MB, or
   the next one; and BLOCK_M rows of A stay in the second-level cache while all these panels pass by.

Every element of C is summed in an order that depends on K alone: from 0, in the order of k, over each
BLOCK_K; and these sums are added to C in turn. Neither M, N nor its place in C enters, so a row has the same
bits computed alone or among others (sampling with a cache relies on it). Multiply-adds are spelled out, as
whether a compiler fuses c + a*b depends on -std and -ffp-contract.

Errors: none. C is not read unless accumulate.
*/
#ifndef MATMUL_KERNEL_H
#define MATMUL_KERNEL_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif
// defines: static_assert, int64_t, memcpy, _mm512_fmadd_ps, _mm256_fmadd_ps, vfmaq_f32

// ALTERNATE_LOW takes the lower halves of two vectors in turn (a0, b0, a1, b1, ...), ALTERNATE_HIGH the upper
// ones
#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8, TILE_VECS = 3 };
#define ALTERNATE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ALTERNATE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECS = 2 };
#define ALTERNATE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ALTERNATE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#if defined(__aarch64__)
enum { LANES = 4, TILE_ROWS = 8, TILE_VECS = 3 };
#else
enum { LANES = 4, TILE_ROWS = 6, TILE_VECS = 2 };
#endif
#define ALTERNATE_LOW 0, 4, 1, 5
#define ALTERNATE_HIGH 2, 6, 3, 7
#endif

enum {
    TILE_COLS = TILE_VECS * LANES,
    BLOCK_M = 6 * TILE_ROWS,
    BLOCK_N = 768, // a multiple of every TILE_COLS
    BLOCK_K = 384,
    PANEL_STEPS = BLOCK_K + 2, // 2 spare: panels a power of two apart would fall on the same few cache lines
};
static_assert(BLOCK_N % TILE_COLS == 0 && BLOCK_M % TILE_ROWS == 0, "blocks are whole tiles");
static_assert((TILE_ROWS == 8 && TILE_VECS == 3) || (TILE_ROWS == 6 && TILE_VECS == 2),
              "tile_of_vectors has a case for each size of tile");
static_assert((LANES & (LANES - 1)) == 0, "transpose shuffles log2(LANES) times, copy_few halves LANES");

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef float VecAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // unaligned
typedef int32_t LaneNumbers __attribute__((vector_size(4 * LANES)));

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

// Where tiles find an operand: element k of line i (a row of A, a column of B) of panel p is at[p*panel +
// i*line + k*step].
typedef struct {
    const float *at;
    int64_t panel, line, step;
} Panels;

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#ifdef __CUDACC__
#pragma nv_diag_suppress 1675 // nvcc hands GCC's pragma on, but does not know it
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

// n floats, n < TILE_COLS: memcpy with sizes that the compiler knows
ALWAYS_INLINE void copy_few(float *to, const float *from, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        memcpy(to + i, from + i, sizeof(Vec));
    }
    for (int64_t size = LANES / 2; size > 0; size /= 2) {
        if (n & size) {
            memcpy(to + i, from + i, sizeof(float) * size);
            i += size;
        }
    }
}

// ----------------------------------------------------------------------------
// the tile

// rows x vecs vectors of C (+)= K steps of a times b. rows and vecs are constants: all loops but k's are
// unrolled
ALWAYS_INLINE void tile(const int rows, const int vecs, int64_t K, Panels a, Panels b, float *c, int64_t ldc,
                        int accumulate) {
    const Vec zero = {0};
    Vec sum[TILE_ROWS][TILE_VECS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < vecs; v++) {
            sum[r][v] = zero;
            __builtin_prefetch(c + r * ldc + v * LANES, 1); // to arrive during the loop below
        }
    }
    for (int64_t k = 0; k < K; k++) {
        Vec b_row[TILE_VECS];
        UNROLL for (int v = 0; v < vecs; v++) {
            b_row[v] = *(const VecAnywhere *)(b.at + v * LANES);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            Vec a_everywhere = a.at[r * a.line] - zero; // x - 0 is x in every lane, also for -0
            UNROLL for (int v = 0; v < vecs; v++) {
                sum[r][v] = multiply_add(a_everywhere, b_row[v], sum[r][v]);
            }
        }
        a.at += a.step;
        b.at += b.step;
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

// any number of rows and vectors: one of the TILE_ROWS * TILE_VECS loops that the compiler makes of the
// function above
static inline void tile_of_vectors(int rows, int vecs, int64_t K, Panels a, Panels b, float *c, int64_t ldc,
                                   int accumulate) {
    // clang-format off
    switch (rows * 4 + vecs) {
#define TILE_CASE(r, v) case (r) * 4 + (v): tile(r, v, K, a, b, c, ldc, accumulate); break;
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
    // clang-format on
}

// any number of columns: if the last of C are no whole vector, by way of a tile that has room for it
static inline void tile_of_columns(int rows, int cols, int64_t K, Panels a, Panels b, float *c, int64_t ldc,
                                   int accumulate) {
    int vecs = (cols + LANES - 1) / LANES;
    if (cols == vecs * LANES) {
        tile_of_vectors(rows, vecs, K, a, b, c, ldc, accumulate);
        return;
    }
    float edge[TILE_ROWS * TILE_COLS] = {0};
    tile_of_vectors(rows, vecs, K, a, b, edge, TILE_COLS, 0);
    for (int r = 0; r < rows; r++) {
        float *from = edge + r * TILE_COLS, *to = c + r * ldc;
        for (int j = 0; j < cols && accumulate; j++) {
            from[j] += to[j];
        }
        copy_few(to, from, cols);
    }
}

// ----------------------------------------------------------------------------
// packing n lines (rows of A or columns of B) of K steps into panels `width` lines wide, zeros behind the
// last line

// in memory the lines are side by side: line i of step k is from[k*ld + i]
ALWAYS_INLINE void pack(float *to, const float *from, int64_t ld, int64_t K, int64_t n, const int width) {
    for (int64_t k = 0; k < K; k++) {
        const float *line = from + k * ld;
        float *panel = to + k * width;
        int64_t i = 0;
        for (; i + width <= n; i += width) {
            memcpy(panel, line + i, sizeof(float) * width);
            panel += PANEL_STEPS * width;
        }
        if (i < n) {
            memset(panel, 0, sizeof(float) * width);
            copy_few(panel, line + i, n - i);
        }
    }
}

ALWAYS_INLINE Vec alternate(Vec a, Vec b, const int high) {
#ifdef __clang__
    return high ? __builtin_shufflevector(a, b, ALTERNATE_HIGH)
                : __builtin_shufflevector(a, b, ALTERNATE_LOW);
#else
    const LaneNumbers high_lanes = {ALTERNATE_HIGH}, low_lanes = {ALTERNATE_LOW};
    return __builtin_shuffle(a, b, high ? high_lanes : low_lanes);
#endif
}

// LANES x LANES elements: a perfect shuffle of the upper with the lower rows, log2(LANES) times, is the
// transpose. Where there are fewer rows the last one is read again.
ALWAYS_INLINE void transpose(float *to, int64_t to_ld, const float *from, int64_t from_ld, int64_t rows) {
    Vec x[LANES], y[LANES];
    UNROLL for (int i = 0; i < LANES; i++) {
        x[i] = *(const VecAnywhere *)(from + smaller(i, rows - 1) * from_ld);
    }
    UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = alternate(x[i], x[i + LANES / 2], 0);
            y[2 * i + 1] = alternate(x[i], x[i + LANES / 2], 1);
        }
        UNROLL for (int i = 0; i < LANES; i++) {
            x[i] = y[i];
        }
    }
    UNROLL for (int i = 0; i < LANES; i++) {
        *(VecAnywhere *)(to + i * to_ld) = x[i];
    }
}

// in memory the steps are side by side: line i of step k is from[i*ld + k]
static inline void pack_transposed(float *to, const float *from, int64_t ld, int64_t K, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        float *column = to + i / TILE_COLS * TILE_COLS * PANEL_STEPS + i % TILE_COLS;
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            transpose(column + k * TILE_COLS, TILE_COLS, from + i * ld + k, ld, n - i);
        }
        for (; k < K; k++) {
            for (int64_t lane = 0; lane < LANES; lane++) {
                column[k * TILE_COLS + lane] = i + lane < n ? from[(i + lane) * ld + k] : 0.0f;
            }
        }
    }
}

// ----------------------------------------------------------------------------
// one thread's sgemm

// Thread-local: too large for some stacks, wanted too often for malloc, and of no meaning once a call has
// returned.
ALWAYS_INLINE float *packing_memory(void) {
    static __thread float memory[PANEL_STEPS * (BLOCK_N + BLOCK_M)] __attribute__((aligned(64)));
    return memory;
}

static inline Panels gemm_rows_of_a(const Gemm *g, int64_t i0, int64_t M, int64_t k0, int64_t K) {
    int64_t line = g->trans_a ? 1 : g->lda, step = g->trans_a ? g->lda : 1;
    const float *from = g->A + i0 * line + k0 * step;
    Panels in_place = {from, TILE_ROWS * line, line, step};
    if (!g->trans_a || g->N <= TILE_COLS) {
        return in_place;
    }
    float *to = packing_memory() + PANEL_STEPS * BLOCK_N;
    Panels packed = {to, TILE_ROWS * PANEL_STEPS, 1, TILE_ROWS};
    pack(to, from, g->lda, K, M, TILE_ROWS);
    return packed;
}

static inline Panels gemm_columns_of_b(const Gemm *g, int64_t j0, int64_t N, int64_t k0, int64_t K) {
    float *to = packing_memory();
    Panels packed = {to, TILE_COLS * PANEL_STEPS, 1, TILE_COLS};
    if (g->trans_b) {
        pack_transposed(to, g->B + j0 * g->ldb + k0, g->ldb, K, N);
        return packed;
    }
    const float *from = g->B + k0 * g->ldb + j0;
    Panels in_place = {from, TILE_COLS, 1, g->ldb};
    if (g->M <= 2 * TILE_ROWS && N % LANES == 0) {
        return in_place;
    }
    pack(to, from, g->ldb, K, N, TILE_COLS);
    return packed;
}

static inline void gemm_block(Panels a, Panels b, int64_t M, int64_t N, int64_t K, float *c, int64_t ldc,
                              int accumulate) {
    for (int64_t j = 0; j < N; j += TILE_COLS) {
        Panels a_tile = a;
        for (int64_t i = 0; i < M; i += TILE_ROWS) {
            tile_of_columns((int)smaller(TILE_ROWS, M - i), (int)smaller(TILE_COLS, N - j), K, a_tile, b,
                            c + i * ldc + j, ldc, accumulate);
            a_tile.at += a.panel;
        }
        b.at += b.panel;
    }
}

static inline void gemm_clear(const Gemm *g) {
    for (int64_t i = 0; i < g->M && !g->accumulate; i++) {
        memset(g->C + i * g->ldc, 0, sizeof(float) * (size_t)g->N);
    }
}

static inline void gemm_serial(const Gemm *g) {
    if (g->M <= 0 || g->N <= 0) {
        return;
    }
    if (g->K <= 0) {
        gemm_clear(g);
        return;
    }
    for (int64_t j0 = 0; j0 < g->N; j0 += BLOCK_N) {
        int64_t N = smaller(BLOCK_N, g->N - j0);
        for (int64_t k0 = 0; k0 < g->K; k0 += BLOCK_K) {
            int64_t K = smaller(BLOCK_K, g->K - k0);
            Panels b = gemm_columns_of_b(g, j0, N, k0, K);
            for (int64_t i0 = 0; i0 < g->M; i0 += BLOCK_M) {
                int64_t M = smaller(BLOCK_M, g->M - i0);
                Panels a = gemm_rows_of_a(g, i0, M, k0, K);
                gemm_block(a, b, M, N, K, g->C + i0 * g->ldc + j0, g->ldc, g->accumulate || k0 > 0);
            }
        }
    }
}

static inline Gemm gemm_make(int trans_a, int trans_b, int64_t M, int64_t N, int64_t K, const float *A,
                             int64_t lda, const float *B, int64_t ldb, float *C, int64_t ldc,
                             int accumulate) {
    Gemm g = {trans_a, trans_b, accumulate, M, N, K, A, lda, B, ldb, C, ldc};
    return g;
}

// C[M,N] = (accumulate ? C : 0) + op(A)[M,K] op(B)[K,N], by the calling thread alone.
// trans_a: A is stored [K,M] (else [M,K]); trans_b: B is stored [N,K] (else [K,N])
static inline void sgemm_serial(int trans_a, int trans_b, int M, int N, int K, const float *A, int64_t lda,
                                const float *B, int64_t ldb, float *C, int64_t ldc, int accumulate) {
    Gemm g = gemm_make(trans_a, trans_b, M, N, K, A, lda, B, ldb, C, ldc, accumulate);
    gemm_serial(&g);
}

#undef ALTERNATE_LOW
#undef ALTERNATE_HIGH
#undef ALWAYS_INLINE
#undef UNROLL
#endif
