// tiles of mma.cuh: every way to load a fragment, against loops; and the reductions of sums.cuh
#ifndef TEST_MMA_CUH
#define TEST_MMA_CUH

#include "llmc/gpu/mma.cuh"
#include "llmc/gpu/sums.cuh"
#include "harness.cuh"

enum { MMA_TEST_LD = 40 }; // a row of a tile in shared memory

// C [16, 16] = A [16, 32] B [32, 16]; trans bits: A stored [k][m], B stored [k][n]; pairs: load_b2
static __global__ void mma_test_kernel(float *c, const floatX *a, const floatX *b, int trans_a, int trans_b,
                                       int pairs, int chained) {
    floatX *tile_a = (floatX *)shared_memory();
    floatX *tile_b = tile_a + 32 * MMA_TEST_LD;
    for (int i = (int)threadIdx.x; i < 32 * 16 / Pack<floatX>::SIZE; i += 32) { // 16-byte pieces
        int at = i * Pack<floatX>::SIZE;
        int columns_a = trans_a ? 16 : 32, columns_b = trans_b ? 16 : 32;
        cp_async16(tile_a + at / columns_a * MMA_TEST_LD + at % columns_a, a + at, true);
        cp_async16(tile_b + at / columns_b * MMA_TEST_LD + at % columns_b, b + at, true);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    float sum[2][4] = {{0.0f}};
    for (int k = 0; k < 32; k += 16) {
        FragA fa;
        FragB fb[2];
        if (trans_a) {
            load_a_trans(fa, tile_a + k * MMA_TEST_LD, MMA_TEST_LD);
        } else {
            load_a(fa, tile_a + k, MMA_TEST_LD);
        }
        if (pairs && trans_b) {
            load_b2_trans(fb, tile_b + k * MMA_TEST_LD, MMA_TEST_LD);
        } else if (pairs) {
            load_b2(fb, tile_b + k, MMA_TEST_LD);
        } else {
            for (int n = 0; n < 2; n++) {
                if (trans_b) {
                    load_b_trans(fb[n], tile_b + k * MMA_TEST_LD + 8 * n, MMA_TEST_LD);
                } else {
                    load_b(fb[n], tile_b + 8 * n * MMA_TEST_LD + k, MMA_TEST_LD);
                }
            }
        }
        mma(sum[0], fa, fb[0]);
        mma(sum[1], fa, fb[1]);
    }
    if (chained) { // C becomes A of C B[0:16]
        FragA fa;
        FragB fb[2];
        a_from_c(fa, sum[0], sum[1]);
        for (int n = 0; n < 2; n++) {
            load_b_trans(fb[n], tile_b + 8 * n, MMA_TEST_LD);
            float next[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            mma(next, fa, fb[n]);
            for (int i = 0; i < 4; i++) {
                sum[n][i] = next[i];
            }
        }
    }
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int n = 0; n < 2; n++) {
        for (int i = 0; i < 4; i++) {
            c[(g + i / 2 * 8) * 16 + 8 * n + 2 * t + i % 2] = sum[n][i];
        }
    }
}

static void mma_case(int trans_a, int trans_b, int pairs, int chained) {
    float *a = host_random(16 * 32, 1, 1.0f), *b = host_random(32 * 16, 2, 1.0f);
    double want[16 * 16] = {0.0}, next[16 * 16] = {0.0};
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 16; n++) {
            for (int k = 0; k < 32; k++) {
                double x = trans_a ? a[k * 16 + m] : a[m * 32 + k];
                want[m * 16 + n] += x * (trans_b ? b[k * 16 + n] : b[n * 32 + k]);
            }
        }
    }
    for (int m = 0; m < 16 && chained; m++) {
        for (int n = 0; n < 16; n++) {
            for (int k = 0; k < 16; k++) {
                next[m * 16 + n] += want[m * 16 + k] * b[k * 16 + n];
            }
        }
    }
    floatX *da = device_x(a, 16 * 32), *db = device_x(b, 32 * 16);
    float *dc = device_new<float>(16 * 16);
    launch(mma_test_kernel, 1, 32, 2 * 32 * MMA_TEST_LD * sizeof(floatX), 0, dc, da, db, trans_a, trans_b,
           pairs, chained);
    float *c = fetch(dc, 16 * 16);
    // without the chain the products are exact and only the sums round
    check_close_to("mma", c, chained ? next : want, 16 * 16, chained ? tolerance(1e-6, 5e-3) : 1e-6);
    device_release(da);
    device_release(db);
    device_release(dc);
    free(a);
    free(b);
    free(c);
}

static __global__ void reduction_test_kernel(float *out, const float *x) {
    float v = x[threadIdx.x];
    float a = warp_sum(v), b = warp_max(v), c = block_sum(v), d = block_max(v), e = block_sum(2.0f * v);
    float *row = out + threadIdx.x * 5;
    row[0] = a;
    row[1] = b;
    row[2] = c;
    row[3] = d;
    row[4] = e;
}

static void reduction_case(void) {
    enum { THREADS = 96 };
    float x[THREADS], want[THREADS * 5];
    fill_uniform(x, THREADS, 3, 1.0f);
    for (int t = 0; t < THREADS; t++) {
        double warp = 0.0, block = 0.0;
        float warp_top = -2.0f, block_top = -2.0f;
        for (int i = 0; i < THREADS; i++) {
            block += x[i];
            block_top = fmaxf(block_top, x[i]);
            warp += i / 32 == t / 32 ? x[i] : 0.0;
            warp_top = i / 32 == t / 32 ? fmaxf(warp_top, x[i]) : warp_top;
        }
        float row[5] = {(float)warp, warp_top, (float)block, block_top, (float)(2.0 * block)};
        memcpy(want + t * 5, row, sizeof(row));
    }
    float *dx = device_f(x, THREADS), *out = device_new<float>(THREADS * 5);
    launch(reduction_test_kernel, 1, THREADS, 0, 0, out, dx);
    check_device("reductions", out, want, THREADS * 5, 1e-6);
    device_release(dx);
    device_release(out);
}

static void test_cuda_mma(void) {
    for (int trans = 0; trans < 4; trans++) {
        mma_case(trans & 1, trans / 2, 0, 0);
        mma_case(trans & 1, trans / 2, 1, 0);
    }
    mma_case(0, 1, 0, 1);
    reduction_case();
}

#endif
