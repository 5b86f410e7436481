/*
buckets.h: every block has one owner, and a place of its own there. buckets.cuh: the ranks' gradients added up by the
owners, one rank after the other on one device, against the same sums in a loop; and the norm, whose bits must not
depend on the number of ranks. And the votes (train_remoe.cu): what one rank alone says, all must hear.

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

// shards tile a bucket in the ranks' order; in what a rank keeps, a shard ends before the next one's place
static void owners_case(const BucketLayout *layout, int ranks) {
    for (int b = 0; b < BUCKETS; b++) {
        const Bucket *bucket = &layout->buckets[b];
        int64_t next = bucket->first;
        for (int r = 0; r < ranks; r++) {
            Range own = owned_range(bucket, r, ranks);
            CHECK(own.first == next && own.size >= 0 && own.size % BUCKET_BLOCK == 0);
            CHECK(owned_place(layout->buckets, b, ranks) + own.size <=
                  owned_place(layout->buckets, b + 1, ranks));
            next += own.size;
        }
        CHECK(next == bucket->first + bucket->size);
    }
}

enum { VOTE_RANKS = 3, VOTE_LAYERS = 2, VOTE_EXPERTS = 3, VOTE_CELLS = VOTE_LAYERS * VOTE_EXPERTS };

// the votes of ranks of which `speaker` alone wants to stop, has overflowed, and has the most rows of layer 0; as
// `listener` counts them
static void votes_case(Model *m, int speaker, int listener) {
    const int rows[2][VOTE_LAYERS] = {{7, 9}, {64, 9}};
    int64_t counts[VOTE_CELLS] = {1, 2, 3, 4, 5, 6}, bytes = vote_bytes(m);
    int most[VOTE_LAYERS] = {0, 0};
    unsigned char *d_votes = device_new<unsigned char>(VOTE_RANKS * bytes);
    int64_t *d_counts = device_new<int64_t>(VOTE_CELLS);
    StepSums *d_sums = device_new<StepSums>(1);
    int *d_rows = device_new<int>(VOTE_LAYERS), *d_overflow = device_new<int>(1);
    CUDA_CHECK(cudaMemcpy(d_counts, counts, sizeof(counts), cudaMemcpyHostToDevice));
    for (int p = 0; p < VOTE_RANKS; p++) {
        StepSums sums = {0.5 + p, 1.5 * p, {10 + p, 1 + p}};
        int speaks = p == speaker;
        CUDA_CHECK(cudaMemcpy(d_sums, &sums, sizeof(sums), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(d_rows, rows[speaks], sizeof(rows[0]), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(d_overflow, &speaks, sizeof(speaks), cudaMemcpyHostToDevice));
        launch(vote_kernel, 1, 256, 0, 0, d_votes + p * bytes, (const StepSums *)d_sums,
               (const int *)d_overflow, speaks, (const int64_t *)d_counts, (int)VOTE_CELLS,
               (const int *)d_rows, (int)VOTE_LAYERS);
    }
    unsigned char *votes = fetch_raw(d_votes, VOTE_RANKS * bytes);
    StepStats stats = {};
    stats_reset(&stats, &m->config);
    m->comm.rank = listener;
    CHECK(count_votes(m, votes, &stats, most) && stats.stop);
    CHECK(most[0] == 64 && most[1] == 9);
    CHECK(stats.lm_loss == 4.5 && stats.reg_loss == 4.5);
    CHECK(stats.active + stats.zero_expert == 33 + 6);
    for (int i = 0; i < VOTE_CELLS; i++) {
        CHECK(stats.counts[i] == VOTE_RANKS * counts[i]);
    }
    device_release(d_votes);
    device_release(d_counts);
    device_release(d_sums);
    device_release(d_rows);
    device_release(d_overflow);
    free(votes);
    free(stats.counts);
}

static void votes_cases(void) {
    Model *m = NEW(Model, 1); // no more of it than votes need
    m->config.layers = VOTE_LAYERS;
    m->config.router.experts = VOTE_EXPERTS;
    m->comm.ranks = VOTE_RANKS;
    for (int speaker = 0; speaker < VOTE_RANKS; speaker++) {
        for (int listener = 0; listener < VOTE_RANKS; listener++) {
            votes_case(m, speaker, listener);
        }
    }
    free(m);
}

static void test_cuda_buckets(void) {
    BucketLayout layout = bucket_layout();
    float *parts[MOST_RANKS];
    votes_cases();
    for (int p = 0; p < MOST_RANKS; p++) {
        parts[p] = NEW(float, layout.flat_size);
    }
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        for (int p = 0; p < ranks; p++) {
            fill_uniform(parts[p], (size_t)layout.flat_size, (unsigned)(100 * ranks + p), 1.0f);
        }
        owners_case(&layout, ranks);
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
