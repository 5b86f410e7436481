/*
buckets.cuh: the ranks' gradients added up by the owners, one rank after the other on one device, against the same
sums in a loop; and the norm, whose bits must not depend on the number of ranks.

Tolerance: none. The sums are fp32 additions in a given order, the norm's blocks are added in fixed trees.
*/
#ifndef TEST_CUDA_BUCKETS_CUH
#define TEST_CUDA_BUCKETS_CUH

#include "harness.cuh"
#include "llmc/adamw.h"
#include "llmc/gpu/buckets.cuh"

enum { BUCKETS = 4, MOST_RANKS = 8 };

typedef struct {
    Bucket buckets[BUCKETS];
    int64_t flat_size;
} BucketLayout;

static BucketLayout bucket_layout(void) {
    const int64_t blocks[BUCKETS] = {1, 0, 7, 16}; // fewer than ranks, none, no multiple of them, whole
    BucketLayout layout;
    layout.flat_size = 0;
    for (int b = 0; b < BUCKETS; b++) {
        Bucket bucket = {layout.flat_size, blocks[b] * BUCKET_BLOCK, 1, 0};
        layout.buckets[b] = bucket;
        layout.flat_size += bucket.size;
    }
    return layout;
}

// what rank r does: its own part in place, the others' in the landing area as a move would leave them
static void sum_of_rank(const BucketLayout *layout, float *const *parts, int r, int ranks, float *sums,
                        double *squares_row_of_r) {
    for (int b = 0; b < BUCKETS; b++) {
        const Bucket *bucket = &layout->buckets[b];
        Range own = owned_range(bucket, r, ranks);
        int64_t stride = owned_most_blocks(bucket, ranks) * BUCKET_BLOCK;
        float *d_own = device_f(parts[r] + own.first, own.size > 0 ? own.size : 1);
        float *landed = NEW(float, stride *ranks + 1);
        for (int p = 0; p < ranks; p++) {
            if (p != r) {
                memcpy(landed + landing_slot(p, r) * stride, parts[p] + own.first,
                       (size_t)own.size * sizeof(float));
            }
        }
        float *d_landed = device_f(landed, stride * ranks + 1);
        sum_parts(d_own, d_landed, stride, own.size, r, ranks,
                  squares_row_of_r + owned_place(layout->buckets, b, ranks) / BUCKET_BLOCK, 0);
        float *got = fetch(d_own, own.size > 0 ? own.size : 1);
        memcpy(sums + own.first, got, (size_t)own.size * sizeof(float));
        device_release(d_own);
        device_release(d_landed);
        free(landed);
        free(got);
    }
}

// the norm's square, and every sum, of so many ranks
static double buckets_case(const BucketLayout *layout, float *const *parts, int ranks) {
    int64_t row = squares_row(layout->buckets, BUCKETS, ranks), wrong = 0;
    float *sums = NEW(float, layout->flat_size);
    double *d_squares = device_new<double>(row * ranks), *d_sum = device_new<double>(1);
    for (int r = 0; r < ranks; r++) {
        sum_of_rank(layout, parts, r, ranks, sums, d_squares + r * row);
    }
    for (int64_t i = 0; i < layout->flat_size; i++) {
        float want = parts[0][i];
        for (int p = 1; p < ranks; p++) {
            want += parts[p][i];
        }
        wrong += !(sums[i] == want);
    }
    CHECK(wrong == 0);
    sum_squares(d_sum, d_squares, layout->buckets, BUCKETS, ranks, 0);
    double *got = fetch_raw(d_sum, 1), norm = *got, want = sum_of_squares(sums, layout->flat_size);
    CHECK(fabs(norm - want) <= 1e-12 * want);
    device_release(d_squares);
    device_release(d_sum);
    free(sums);
    free(got);
    return norm;
}

static void test_cuda_buckets(void) {
    BucketLayout layout = bucket_layout();
    float *parts[MOST_RANKS];
    for (int p = 0; p < MOST_RANKS; p++) {
        parts[p] = NEW(float, layout.flat_size);
    }
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        for (int p = 0; p < ranks; p++) {
            fill_uniform(parts[p], (size_t)layout.flat_size, (unsigned)(100 * ranks + p), 1.0f);
        }
        buckets_case(&layout, parts, ranks);
    }
    // the same sums, from ranks whose other parts are 0: the same bits of the norm
    fill_uniform(parts[0], (size_t)layout.flat_size, 5, 1.0f);
    parts[0][3] = 1e25f; // a square that fp32 could not hold
    for (int p = 1; p < MOST_RANKS; p++) {
        memset(parts[p], 0, (size_t)layout.flat_size * sizeof(float));
    }
    double alone = buckets_case(&layout, parts, 1);
    for (int ranks = 2; ranks <= MOST_RANKS; ranks++) {
        CHECK(buckets_case(&layout, parts, ranks) == alone);
    }
    for (int p = 0; p < MOST_RANKS; p++) {
        free(parts[p]);
    }
}

#endif
