/*
matmul_kernel.h and matmul.h. What is computed: every transpose, odd sizes, leading dimensions and accumulation
against a float64 product, relative to the norm of |A| |B| (a sum that cancels has no relative accuracy). How:
the same bits as one chain of multiply-adds per block of k, whatever the tile, the number of threads and the
neighbours.
*/
#ifndef TEST_MATMUL_H
#define TEST_MATMUL_H

#include "llmc/check.h"
#include "llmc/matmul.h"
#include "harness.h"

enum { MATMUL_PAD = 5 }; // leading dimensions are this much larger than the width

typedef struct {
    int trans_a, trans_b, accumulate, M, N, K;
    int64_t lda, ldb, ldc;
    float *A, *B, *C; // C as it was before
} MatmulCase;

static MatmulCase matmul_case_new(int trans_a, int trans_b, int accumulate, int M, int N, int K) {
    MatmulCase c = {trans_a, trans_b, accumulate, M, N, K, 0, 0, 0, NULL, NULL, NULL};
    c.lda = (trans_a ? M : K) + MATMUL_PAD;
    c.ldb = (trans_b ? K : N) + MATMUL_PAD;
    c.ldc = N + MATMUL_PAD;
    size_t size_a = (size_t)(c.lda * (trans_a ? K : M)), size_b = (size_t)(c.ldb * (trans_b ? N : K));
    size_t size_c = (size_t)(c.ldc * M);
    c.A = NEW(float, size_a);
    c.B = NEW(float, size_b);
    c.C = NEW(float, size_c);
    fill_uniform(c.A, size_a, 1, 1.0f);
    fill_uniform(c.B, size_b, 2, 1.0f);
    fill_uniform(c.C, size_c, 3, 1.0f);
    for (size_t i = 0; i < size_c && !accumulate; i++) {
        c.C[i] = NAN;
    }
    return c;
}

static void matmul_case_free(MatmulCase *c) {
    free(c->A);
    free(c->B);
    free(c->C);
}

static float *matmul_copy(const float *x, size_t n) {
    float *y = NEW(float, n);
    if (n > 0) {
        memcpy(y, x, n * sizeof(float));
    }
    return y;
}

static int matmul_same_bits(const float *x, const float *y, size_t n) {
    return n == 0 || memcmp(x, y, n * sizeof(float)) == 0;
}

static void matmul_set_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

static int matmul_most_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static float matmul_a(const MatmulCase *c, int i, int k) {
    return c->A[c->trans_a ? k * c->lda + i : i * c->lda + k];
}

static float matmul_b(const MatmulCase *c, int k, int j) {
    return c->B[c->trans_b ? j * c->ldb + k : k * c->ldb + j];
}

// ||got - product|| <= 1e-7 || |A| |B| + |C| ||, and nothing written behind the last column
static void matmul_check_values(const MatmulCase *c, const float *got) {
    double error = 0.0, size = 0.0;
    int kept = 1;
    for (int i = 0; i < c->M; i++) {
        for (int j = 0; j < c->N; j++) {
            double sum = c->accumulate ? (double)c->C[i * c->ldc + j] : 0.0, magnitude = fabs(sum);
            for (int k = 0; k < c->K; k++) {
                double product = (double)matmul_a(c, i, k) * (double)matmul_b(c, k, j);
                sum += product;
                magnitude += fabs(product);
            }
            error += (got[i * c->ldc + j] - sum) * (got[i * c->ldc + j] - sum);
            size += magnitude * magnitude;
        }
        kept &= matmul_same_bits(got + i * c->ldc + c->N, c->C + i * c->ldc + c->N, MATMUL_PAD);
    }
    if (!CHECK(error <= 1e-14 * size) || !CHECK(kept)) {
        printf("  trans %d %d accumulate %d M %d N %d K %d: relative error %.2e\n", c->trans_a, c->trans_b,
               c->accumulate, c->M, c->N, c->K, sqrt(error / size));
    }
}

static void test_matmul_one_size(int M, int N, int K) {
    for (int trans = 0; trans < 4; trans++) {
        MatmulCase c = matmul_case_new(trans & 1, trans >> 1, (M + N + K + trans) % 2, M, N, K);
        float *got = matmul_copy(c.C, (size_t)(c.ldc * M));
        sgemm(c.trans_a, c.trans_b, M, N, K, c.A, c.lda, c.B, c.ldb, got, c.ldc, c.accumulate);
        matmul_check_values(&c, got);
        free(got);
        matmul_case_free(&c);
    }
}

static void test_matmul_sizes(void) {
    static const int sizes[] = {0, 1, 3, 7, 17, 24, 47, 48, 49, 67, 129};
    enum { COUNT = sizeof(sizes) / sizeof(sizes[0]) };
    for (int i = 0; i < COUNT; i++) {
        for (int j = 0; j < COUNT; j++) {
            for (int k = 0; k < COUNT; k++) {
                test_matmul_one_size(sizes[i], sizes[j], sizes[k]);
            }
        }
    }
    // more than one block of rows, columns, steps
    test_matmul_one_size(BLOCK_M + 3, BLOCK_N + 5, 33);
    test_matmul_one_size(9, 50, BLOCK_K);
    test_matmul_one_size(2 * BLOCK_M + 1, 51, 2 * BLOCK_K + 1);
}

// the promise of matmul_kernel.h: from 0, in the order of k, over each block; the blocks' sums in turn
static float matmul_chain(const MatmulCase *c, int i, int j) {
    float total = c->C[i * c->ldc + j];
    for (int k0 = 0; k0 < c->K; k0 += BLOCK_K) {
        volatile float sum = 0.0f; // volatile: no contraction but the one that is written
        for (int k = k0; k < c->K && k < k0 + BLOCK_K; k++) {
#if defined(__AVX512F__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
            sum = fmaf(matmul_a(c, i, k), matmul_b(c, k, j), sum);
#else
            volatile float product = matmul_a(c, i, k) * matmul_b(c, k, j);
            sum = product + sum;
#endif
        }
        total = k0 > 0 || c->accumulate ? total + sum : sum;
    }
    return total;
}

static void test_matmul_order_of_sums(void) {
    static const int sizes[][3] = {
        {1, 1, 40}, {13, 67, 2 * BLOCK_K + 17}, {17, 24, 64}, {50, 53, 31}, {1, 100, 500}};
    for (int size = 0; size < 5; size++) {
        for (int trans = 0; trans < 8; trans++) {
            const int *s = sizes[size];
            MatmulCase c = matmul_case_new(trans & 1, (trans >> 1) & 1, trans >> 2, s[0], s[1], s[2]);
            float *got = matmul_copy(c.C, (size_t)(c.ldc * c.M));
            sgemm_serial(c.trans_a, c.trans_b, c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, got, c.ldc,
                         c.accumulate);
            int equal = 1;
            for (int i = 0; i < c.M; i++) {
                for (int j = 0; j < c.N; j++) {
                    equal &= got[i * c.ldc + j] == matmul_chain(&c, i, j);
                }
            }
            CHECK(equal);
            free(got);
            matmul_case_free(&c);
        }
    }
}

static void test_matmul_row_alone(void) {
    for (int trans = 0; trans < 4; trans++) {
        MatmulCase c = matmul_case_new(trans & 1, trans >> 1, 0, 21, 117, BLOCK_K + 29);
        float *all = matmul_copy(c.C, (size_t)(c.ldc * c.M)), *one = matmul_copy(c.C, (size_t)(c.ldc * c.M));
        sgemm(c.trans_a, c.trans_b, c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, all, c.ldc, 0);
        for (int i = 0; i < c.M; i++) {
            const float *row = c.A + (c.trans_a ? i : i * c.lda);
            sgemm(c.trans_a, c.trans_b, 1, c.N, c.K, row, c.lda, c.B, c.ldb, one + i * c.ldc, c.ldc, 0);
        }
        CHECK(matmul_same_bits(all, one, (size_t)(c.ldc * c.M)));
        free(all);
        free(one);
        matmul_case_free(&c);
    }
}

static void test_matmul_threads(void) {
    static const int sizes[][3] = {
        {129, 67, 400}, {8, 500, 100}, {700, 8, 100}, {1, 3000, 200}, {48, 48, 200}};
    int most = matmul_most_threads();
    for (int size = 0; size < 5; size++) {
        for (int trans = 0; trans < 4; trans++) {
            const int *s = sizes[size];
            MatmulCase c = matmul_case_new(trans & 1, trans >> 1, trans % 2, s[0], s[1], s[2]);
            size_t n = (size_t)(c.ldc * c.M);
            float *want = matmul_copy(c.C, n);
            sgemm_serial(c.trans_a, c.trans_b, c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, want, c.ldc,
                         c.accumulate);
            for (int threads = 1; threads <= 7; threads++) {
                float *got = matmul_copy(c.C, n);
                matmul_set_threads(threads);
                sgemm(c.trans_a, c.trans_b, c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, got, c.ldc, c.accumulate);
                CHECK(matmul_same_bits(got, want, n));
                free(got);
            }
            free(want);
            matmul_case_free(&c);
        }
    }
    matmul_set_threads(most);
}

static void test_matmul_layer(void) {
    enum { ROWS = 37, C = 24, OC = 67 };
    float inp[ROWS * C], weight[OC * C], dout[ROWS * OC], out[ROWS * OC], dinp[ROWS * C], dweight[OC * C];
    float want_out[ROWS * OC], want_dinp[ROWS * C], want_dweight[OC * C];
    fill_uniform(inp, ROWS * C, 1, 1.0f);
    fill_uniform(weight, OC * C, 2, 1.0f);
    fill_uniform(dout, ROWS * OC, 3, 1.0f);
    fill_uniform(dweight, OC * C, 4, 1.0f);
    for (int t = 0; t < ROWS; t++) {
        for (int o = 0; o < OC; o++) {
            double sum = 0.0;
            for (int i = 0; i < C; i++) {
                sum += (double)inp[t * C + i] * (double)weight[o * C + i];
            }
            want_out[t * OC + o] = (float)sum;
            out[t * OC + o] = NAN;
        }
        for (int i = 0; i < C; i++) {
            double sum = 0.0;
            for (int o = 0; o < OC; o++) {
                sum += (double)dout[t * OC + o] * (double)weight[o * C + i];
            }
            want_dinp[t * C + i] = (float)sum;
            dinp[t * C + i] = NAN;
        }
    }
    for (int o = 0; o < OC; o++) {
        for (int i = 0; i < C; i++) {
            double sum = (double)dweight[o * C + i];
            for (int t = 0; t < ROWS; t++) {
                sum += (double)dout[t * OC + o] * (double)inp[t * C + i];
            }
            want_dweight[o * C + i] = (float)sum;
        }
    }
    matmul_forward(out, inp, weight, ROWS, C, OC);
    check_close("matmul_forward", out, want_out, ROWS * OC, 1e-6);
    matmul_backward(dinp, NULL, dout, inp, weight, ROWS, C, OC);
    matmul_backward(NULL, dweight, dout, inp, weight, ROWS, C, OC);
    check_close("matmul_backward dinp", dinp, want_dinp, ROWS * C, 1e-6);
    check_close("matmul_backward dweight", dweight, want_dweight, OC * C, 1e-6);
}

// every expert by itself with sgemm_serial, against all in one call on 1 .. 7 threads
static void test_matmul_grouped_case(const int64_t *offsets, int E, int C, int OC) {
    size_t matrix = (size_t)OC * (size_t)C, all = matrix * (size_t)E;
    size_t in = (size_t)offsets[E] * (size_t)C, to = (size_t)offsets[E] * (size_t)OC;
    float *inp = NEW(float, in), *weight = NEW(float, all), *dout = NEW(float, to);
    float *want_out = NEW(float, to), *want_dinp = NEW(float, in), *want_dweight = NEW(float, all);
    fill_uniform(inp, in, 1, 1.0f);
    fill_uniform(weight, all, 2, 1.0f);
    fill_uniform(dout, to, 3, 1.0f);
    fill_uniform(want_dweight, all, 4, 1.0f);
    float *before = matmul_copy(want_dweight, all);
    for (int e = 0; e < E; e++) {
        int rows = (int)(offsets[e + 1] - offsets[e]);
        const float *x = inp + offsets[e] * C, *w = weight + (size_t)e * matrix, *dy = dout + offsets[e] * OC;
        sgemm_serial(0, 1, rows, OC, C, x, C, w, C, want_out + offsets[e] * OC, OC, 0);
        sgemm_serial(0, 0, rows, C, OC, dy, OC, w, C, want_dinp + offsets[e] * C, C, 0);
        sgemm_serial(1, 0, OC, C, rows, dy, OC, x, C, want_dweight + (size_t)e * matrix, C, 1);
    }
    int most = matmul_most_threads();
    for (int threads = 1; threads <= 7; threads++) {
        float *out = NEW(float, to), *dinp = NEW(float, in);
        float *dweight = matmul_copy(before, all);
        memset(out, 0xff, to * sizeof(float)); // NaN
        memset(dinp, 0xff, in * sizeof(float));
        matmul_set_threads(threads);
        matmul_grouped_forward(out, inp, weight, offsets, E, C, OC);
        matmul_grouped_backward(dinp, dweight, dout, inp, weight, offsets, E, C, OC);
        CHECK(matmul_same_bits(out, want_out, to));
        CHECK(matmul_same_bits(dinp, want_dinp, in));
        CHECK(matmul_same_bits(dweight, want_dweight, all));
        free(out);
        free(dinp);
        free(dweight);
    }
    matmul_set_threads(most);
    free(inp);
    free(weight);
    free(dout);
    free(want_out);
    free(want_dinp);
    free(want_dweight);
    free(before);
}

static void test_matmul_grouped(void) {
    static const int64_t mixed[] = {0, 0, 1, 131, 131, 198, 200}; // empty, one row, many, empty, some, two
    static const int64_t all_in_one[] = {0, 0, 0, 150, 150};
    static const int64_t single[] = {0, 83};
    static const int64_t nobody[] = {0, 0, 0, 0};
    static const int64_t few_each[] = {0, 3, 5, 6, 10, 17, 18, 21, 22, 24};
    test_matmul_grouped_case(mixed, 6, 56, 67);
    test_matmul_grouped_case(all_in_one, 4, 48, 96);
    test_matmul_grouped_case(single, 1, 33, 129);
    test_matmul_grouped_case(nobody, 3, 24, 40);
    test_matmul_grouped_case(few_each, 9, 96, 101);
}

static void test_matmul(void) {
    test_matmul_sizes();
    test_matmul_order_of_sums();
    test_matmul_row_alone();
    test_matmul_threads();
    test_matmul_layer();
    test_matmul_grouped();
}

#endif
