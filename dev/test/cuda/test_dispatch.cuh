/*
dispatch.cuh against dispatch.h on the same pair lists: the sort row by row through the padding (exactly);
the combine within one rounding to floatX, and bit for bit whatever the number of chunks; the gates'
gradient exactly. From no pair to all of them, empty experts and tokens without one, blocks of tokens that
are not full.
*/
#ifndef CUDA_TEST_DISPATCH_CUH
#define CUDA_TEST_DISPATCH_CUH

#include "llmc/dispatch.cuh"
#include "llmc/dispatch.h"
#include "harness.cuh"

// ----------------------------------------------------------------------------
// pair lists on both sides: test_experts.cuh uses them too

typedef enum {
    LOAD_MIXED,
    LOAD_SPARSE,
    LOAD_EIGHTH,
    LOAD_ALL,
    LOAD_NONE,
    LOAD_ONE_EXPERT,
    LOAD_ONE_PAIR,
    LOADS
} PairLoad;

typedef struct {
    int N, E;
    PairList host;
    Dispatch host_dispatch;
    DevicePairs pairs;
    DeviceDispatch dispatch;
    void *scratch;
} PairsCase;

static inline int load_has(PairLoad load, float uniform, int t, int e, int N, int E) {
    switch (load) {
    case LOAD_MIXED: return uniform > 0.1f && (E < 4 || e != 3) && t != 5; // expert 3, token 5 never
    case LOAD_SPARSE: return uniform > 1.0f - 2.0f / (float)E;             // one expert a token, on average
    case LOAD_EIGHTH: return uniform > 0.75f;
    case LOAD_ALL: return 1;
    case LOAD_ONE_EXPERT: return e == E / 2;
    case LOAD_ONE_PAIR: return t == N - 1 && e == E - 1;
    default: return 0;
    }
}

static inline PairList host_pairs(PairLoad load, int N, int E) {
    PairList pairs = pairs_empty();
    float *mask = NEW(float, N *E), *score = NEW(float, N *E);
    fill_uniform(mask, (size_t)(N * E), 1, 1.0f);
    fill_uniform(score, (size_t)(N * E), 2, 1.0f); // negative ones too, as a forced set has them
    for (int i = 0; i < N * E; i++) {
        mask[i] = load_has(load, mask[i], i / E, i % E, N, E) ? 1.0f : 0.0f;
    }
    pairs_from_mask(&pairs, score, mask, N, E);
    free(mask);
    free(score);
    return pairs;
}

// room for all pairs, as in the trainer; what lies beyond the list stays a NaN pattern
static inline DevicePairs device_pairs(const PairList *host, int N, int E) {
    DevicePairs pairs;
    pairs.rounds = NULL;
    int *row_start = NEW(int, N + 1), *counts = NEW(int, E);
    for (int t = 0; t <= N; t++) {
        row_start[t] = (int)host->row_start[t];
    }
    for (int e = 0; e < E; e++) {
        counts[e] = (int)host->counts[e];
    }
    size_t P = (size_t)host->num_pairs;
    pairs.row_start = device_i(row_start, N + 1);
    pairs.counts = device_i(counts, E);
    pairs.expert = device_new<int>((int64_t)N * E);
    pairs.gate = device_new<float>((int64_t)N * E);
    if (P > 0) {
        CUDA_CHECK(cudaMemcpy(pairs.expert, host->expert, P * sizeof(int), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(pairs.gate, host->gate, P * sizeof(float), cudaMemcpyHostToDevice));
    }
    free(row_start);
    free(counts);
    return pairs;
}

static inline DeviceDispatch device_dispatch(int N, int E) {
    DeviceDispatch dispatch;
    dispatch.offsets = device_new<int>(E + 1);
    dispatch.row_of_pair = device_new<int>((int64_t)N * E);
    dispatch.token_of_row = device_new<int>((int64_t)(N + ROW_ALIGN) * E);
    dispatch.gate_of_row = device_new<float>((int64_t)(N + ROW_ALIGN) * E);
    // NaN patterns read as -1, which is what a pad must be given
    CUDA_CHECK(cudaMemset(dispatch.token_of_row, 0x3f, (size_t)(N + ROW_ALIGN) * (size_t)E * sizeof(int)));
    return dispatch;
}

// sorted on both sides
static inline PairsCase pairs_case(PairLoad load, int N, int E) {
    PairsCase c;
    c.N = N;
    c.E = E;
    c.host = host_pairs(load, N, E);
    dispatch_init(&c.host_dispatch, E);
    dispatch_sort(&c.host_dispatch, &c.host, E);
    c.pairs = device_pairs(&c.host, N, E);
    c.dispatch = device_dispatch(N, E);
    c.scratch = device_new<char>((int64_t)dispatch_scratch_bytes(N, E));
    dispatch_sort(c.dispatch, c.pairs, N, E, c.scratch, NULL);
    return c;
}

static inline void pairs_case_free(PairsCase *c) {
    const void *buffers[] = {c->pairs.row_start,       c->pairs.expert,         c->pairs.gate,
                             c->pairs.counts,          c->dispatch.offsets,     c->dispatch.row_of_pair,
                             c->dispatch.token_of_row, c->dispatch.gate_of_row, c->scratch};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        device_release(buffers[i]);
    }
    dispatch_free(&c->host_dispatch);
    pairs_free(&c->host);
}

// ----------------------------------------------------------------------------
// sort

// where the host's row is among the padded ones
static inline int cuda_dispatch_row(const PairsCase *c, const int *offsets, int e, int64_t host_row) {
    return offsets[e] + (int)(host_row - c->host_dispatch.offsets[e]);
}

static int64_t cuda_dispatch_wrong_offsets(const PairsCase *c, const int *offsets) {
    int64_t wrong = offsets[0] != 0;
    for (int e = 0; e < c->E; e++) {
        int64_t count = c->host_dispatch.offsets[e + 1] - c->host_dispatch.offsets[e];
        wrong += offsets[e + 1] - offsets[e] != (count + ROW_ALIGN - 1) / ROW_ALIGN * ROW_ALIGN;
    }
    return wrong;
}

static void cuda_dispatch_check_sort(const PairsCase *c) {
    const Dispatch *want = &c->host_dispatch;
    int *offsets = fetch(c->dispatch.offsets, c->E + 1);
    int rows = offsets[c->E];
    int64_t wrong = cuda_dispatch_wrong_offsets(c, offsets);
    if (!CHECK(wrong == 0)) {
        free(offsets);
        return;
    }
    int *row_of_pair = fetch(c->dispatch.row_of_pair, c->host.num_pairs);
    int *token_of_row = fetch(c->dispatch.token_of_row, rows);
    float *gate_of_row = fetch(c->dispatch.gate_of_row, rows);
    for (int64_t p = 0; p < c->host.num_pairs; p++) {
        wrong += row_of_pair[p] != cuda_dispatch_row(c, offsets, c->host.expert[p], want->row_of_pair[p]);
    }
    for (int e = 0; e < c->E; e++) {
        int64_t host_row = want->offsets[e];
        for (int row = offsets[e]; row < offsets[e + 1]; row++, host_row++) {
            int pad = host_row >= want->offsets[e + 1];
            wrong += token_of_row[row] != (pad ? -1 : want->token_of_row[host_row]);
            wrong += gate_of_row[row] != (pad ? 0.0f : want->gate_of_row[host_row]);
        }
    }
    CHECK(wrong == 0);
    free(offsets);
    free(row_of_pair);
    free(token_of_row);
    free(gate_of_row);
}

// ----------------------------------------------------------------------------
// combine and dgate, over chunks of R rows

// what the buffer that all chunks of R rows share holds at chunk i: its rows, or those of the last one that
// has any
static const floatX *rows_at_chunk(const floatX *rows, const PairsCase *c, int d, int R, int i) {
    int64_t total = 0;
    for (int e = 0; e < c->E; e++) {
        total += padded_rows((int)(c->host_dispatch.offsets[e + 1] - c->host_dispatch.offsets[e]));
    }
    int64_t last = total > 0 ? (total - 1) / R : 0;
    return rows + (i < last ? i : last) * R * d;
}

// y from `chunks` chunks of R rows; what has no chunk is left out, so chunks R must reach the last row
static void cuda_dispatch_combine(floatX *y, float *sum, const floatX *residual, const floatX *rows,
                                  const PairsCase *c, int d, int R, int chunks) {
    for (int i = 0; i < chunks; i++) {
        dispatch_combine(y, sum, residual, rows_at_chunk(rows, c, d, R, i), c->pairs, c->dispatch, c->N, c->E,
                         d, i * R, R, i == chunks - 1, NULL);
    }
}

// residual + the C combine, over the same rows without their pads
static float *cuda_dispatch_want(const PairsCase *c, const float *rows, const float *residual, int d) {
    int *offsets = fetch(c->dispatch.offsets, c->E + 1);
    float *y = NEW(float, c->N *d), *packed = NEW(float, c->host.num_pairs *d);
    for (int64_t p = 0; p < c->host.num_pairs; p++) {
        int64_t host_row = c->host_dispatch.row_of_pair[p];
        int row = cuda_dispatch_row(c, offsets, c->host.expert[p], host_row);
        memcpy(packed + host_row * d, rows + (int64_t)row * d, (size_t)d * sizeof(float));
    }
    if (residual != NULL) {
        memcpy(y, residual, (size_t)(c->N * d) * sizeof(float));
    }
    dispatch_combine(y, packed, &c->host, NULL, &c->host_dispatch, d);
    free(offsets);
    free(packed);
    return y;
}

// in 1, 2 and 3 chunks, and with a fourth that has no rows; y takes the place of the residual; a single chunk
// does without a sum
static void cuda_dispatch_check_combine(const PairsCase *c, int d, int with_residual) {
    int64_t most = (int64_t)(c->N + ROW_ALIGN) * c->E, size = (int64_t)c->N * d;
    float *host_rows = host_random(most * d, 3, 1.0f), *host_residual = host_random(size, 4, 1.0f);
    float *want = cuda_dispatch_want(c, host_rows, with_residual ? host_residual : NULL, d);
    floatX *rows = device_x(host_rows, most * d);
    float *sum = device_new<float>(size);
    uint64_t first = 0;
    for (int chunks = 1; chunks <= 4; chunks++) {
        int R = padded_rows((int)ceil_div<int64_t>(most, chunks < 4 ? chunks : 3));
        floatX *y = device_x(host_residual, size);
        cuda_dispatch_combine(y, chunks > 1 ? sum : NULL, with_residual ? y : NULL, rows, c, d, R, chunks);
        // one rounding to bf16: at most 2^-9 of a value, 1.1e-3 of a tensor as a rule
        check_device("dispatch_combine", y, want, size, tolerance(1e-6, 2.5e-3));
        uint64_t hash = device_hash(y, size * (int64_t)sizeof(floatX));
        first = chunks == 1 ? hash : first;
        CHECK(hash == first);
        device_release(y);
    }
    device_release(rows);
    device_release(sum);
    free(host_rows);
    free(host_residual);
    free(want);
}

// what the chunks before row `end` have written: their pairs, and no others (those are NaN)
static void cuda_dispatch_check_dgate_until(const float *dgate, const float *partial, int tiles,
                                            const PairsCase *c, int end) {
    float *got = fetch(dgate, c->host.num_pairs);
    int *row_of_pair = fetch(c->dispatch.row_of_pair, c->host.num_pairs);
    int64_t wrong = 0;
    for (int64_t p = 0; p < c->host.num_pairs; p++) {
        float want = 0.0f;
        for (int tile = 0; tile < tiles; tile++) {
            want += partial[(int64_t)row_of_pair[p] * tiles + tile];
        }
        wrong += row_of_pair[p] < end ? !(got[p] == want) : got[p] == got[p];
    }
    CHECK(wrong == 0);
    free(got);
    free(row_of_pair);
}

static void cuda_dispatch_check_dgate(const PairsCase *c, int tiles, int chunks) {
    int64_t most = (int64_t)(c->N + ROW_ALIGN) * c->E;
    int R = padded_rows((int)ceil_div<int64_t>(most, chunks));
    int64_t size = (int64_t)chunks * R * tiles;
    float *host_partial = NEW(float, size), *dgate = device_new<float>(c->host.num_pairs);
    fill_uniform(host_partial, (size_t)size, 6, 1.0f);
    float *partial = device_f(host_partial, size);
    for (int i = 0; i < chunks; i++) {
        dispatch_dgate(dgate, partial + (int64_t)i * R * tiles, tiles, c->pairs, c->dispatch, c->N, c->E,
                       i * R, R, NULL);
        cuda_dispatch_check_dgate_until(dgate, host_partial, tiles, c, (i + 1) * R);
    }
    device_release(partial);
    device_release(dgate);
    free(host_partial);
}

// ----------------------------------------------------------------------------

static void test_cuda_dispatch_loads(void) {
    const int shapes[][2] = {{1, 1}, {17, 3}, {37, 6}, {64, 8}, {65, 1}, {150, 8}, {33, 128}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (int load = 0; load < LOADS; load++) {
            PairsCase c = pairs_case((PairLoad)load, shapes[i][0], shapes[i][1]);
            cuda_dispatch_check_sort(&c);
            pairs_case_free(&c);
        }
    }
}

// more than PREFIX_THREADS blocks of tokens: the prefix goes over several tiles; on a GPU the trainer's
// sizes too
static void test_cuda_dispatch_large(void) {
    const int shapes[][2] = {{SORT_TOKENS * PREFIX_THREADS + 100, 2}, {65536, 8}, {8192, 512}};
    for (int i = 0; i < (emulated() ? 1 : 3); i++) {
        for (int load = LOAD_MIXED; load <= LOAD_ALL; load++) {
            PairsCase c = pairs_case((PairLoad)load, shapes[i][0], shapes[i][1]);
            cuda_dispatch_check_sort(&c);
            pairs_case_free(&c);
        }
    }
}

static void test_cuda_dispatch_rows(void) {
    const PairLoad loads[] = {LOAD_MIXED, LOAD_SPARSE, LOAD_NONE, LOAD_ALL};
    for (int i = 0; i < 4; i++) {
        PairsCase c = pairs_case(loads[i], 70, 5);
        for (int with = 0; with < 4; with++) {
            cuda_dispatch_check_combine(&c, with < 2 ? 8 : 72, with % 2);
        }
        cuda_dispatch_check_dgate(&c, 1, 1);
        cuda_dispatch_check_dgate(&c, 3, 2);
        pairs_case_free(&c);
    }
}

// the bits of a repeat, gates and rows of all experts
static void test_cuda_dispatch_repeats(void) {
    int N = emulated() ? 130 : 20000, E = 24;
    PairsCase c = pairs_case(LOAD_MIXED, N, E);
    uint64_t first = device_hash(c.dispatch.row_of_pair, c.host.num_pairs * 4);
    for (int i = 0; i < 3; i++) {
        dispatch_sort(c.dispatch, c.pairs, N, E, c.scratch, NULL);
        CHECK(device_hash(c.dispatch.row_of_pair, c.host.num_pairs * 4) == first);
    }
    cuda_dispatch_check_sort(&c);
    pairs_case_free(&c);
}

static void test_cuda_dispatch(void) {
    test_cuda_dispatch_loads();
    test_cuda_dispatch_large();
    test_cuda_dispatch_rows();
    test_cuda_dispatch_repeats();
}

// ----------------------------------------------------------------------------
// speed, against the bytes that must move

static void bench_cuda_dispatch_line(const char *what, double ms, double bytes) {
    printf("    %-28s %8.1f us  %7.0f GB/s of %.1f MB at least\n", what, 1e3 * ms, 1e-6 * bytes / ms,
           1e-6 * bytes);
}

static void bench_cuda_dispatch_shape(PairLoad load, int N, int E, int d, int F) {
    PairsCase c = pairs_case(load, N, E);
    int *offsets = fetch(c.dispatch.offsets, E + 1);
    int rows = offsets[E], tiles = ceil_div(F, 128);
    double P = (double)c.host.num_pairs, vector = (double)d * sizeof(floatX);
    floatX *Y = device_new<floatX>((int64_t)rows * d), *x = device_new<floatX>((int64_t)N * d);
    float *partial = device_new<float>((int64_t)rows * tiles), *dgate = device_new<float>(c.host.num_pairs);
    float *sum = device_new<float>((int64_t)N * d);
    int half = padded_rows(ceil_div(rows, 2));
    printf("  N %d, E %d, d %d, F %d: %.0f pairs, %d rows\n", N, E, d, F, P, rows);
    double ms = device_ms([&] { dispatch_sort(c.dispatch, c.pairs, N, E, c.scratch, NULL); });
    bench_cuda_dispatch_line("dispatch_sort", ms, 4.0 * N + 8.0 * P + 12.0 * P);
    ms = device_ms([&] { cuda_dispatch_combine(x, NULL, x, Y, &c, d, rows, 1); });
    bench_cuda_dispatch_line("dispatch_combine", ms, 4.0 * N + 4.0 * P + P * vector + 2.0 * N * vector);
    ms = device_ms([&] { cuda_dispatch_combine(x, sum, x, Y, &c, d, half, 2); });
    bench_cuda_dispatch_line("dispatch_combine, 2 chunks", ms,
                             4.0 * N + 4.0 * P + P * vector + 2.0 * N * vector + 8.0 * N * d);
    ms = device_ms([&] { dispatch_dgate(dgate, partial, tiles, c.pairs, c.dispatch, N, E, 0, rows, NULL); });
    bench_cuda_dispatch_line("dispatch_dgate", ms, 8.0 * P + 4.0 * P * tiles);
    const void *buffers[] = {Y, x, partial, dgate, sum};
    for (int i = 0; i < 5; i++) {
        device_release(buffers[i]);
    }
    free(offsets);
    pairs_case_free(&c);
}

// one expert a token; the dense start; fine experts, 64 of 512
static void bench_cuda_dispatch(void) {
    bench_cuda_dispatch_shape(LOAD_SPARSE, 65536, 8, 768, 3072);
    bench_cuda_dispatch_shape(LOAD_MIXED, 65536, 8, 768, 3072);
    bench_cuda_dispatch_shape(LOAD_EIGHTH, 65536, 512, 768, 48);
}

#endif
