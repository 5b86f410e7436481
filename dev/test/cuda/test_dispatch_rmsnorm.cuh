/*
dispatch_rmsnorm.cuh against the C functions one after another: dispatch_combine and rmsnorm_forward;
dispatch_combine, sgemm and rmsnorm_backward. Few experts (dz W within the kernel) and many (a GEMM), no
router, rows that a warp can hold and wider ones, tokens without an expert, one chunk of rows and several.

Tolerances: y, normed and dx are rounded to bf16 once each, at most 2^-9 of an element, and normed is of a
rounded y on both sides; rstd and dw are fp32 sums in another order. dx of wide rows comes of a dnormed that
is rounded too.
*/
#ifndef TEST_CUDA_DISPATCH_RMSNORM_CUH
#define TEST_CUDA_DISPATCH_RMSNORM_CUH

#include "llmc/gpu/dispatch_rmsnorm.cuh"
#include "llmc/matmul.h"
#include "llmc/rmsnorm.h"
#include "test_dispatch.cuh"
#include "test_matmul.cuh"

// a pair list, rows in chunks of R, and the device's description of the last chunk
typedef struct {
    PairsCase pairs;
    int d, R, chunks;
    float *host_rows;
    floatX *rows;
    float *sum;
} CombineCase;

static CombineCase combine_case(PairLoad load, int N, int E, int d, int chunks) {
    CombineCase c;
    int64_t most = (int64_t)(N + ROW_ALIGN) * E;
    c.pairs = pairs_case(load, N, E);
    c.d = d;
    c.chunks = chunks;
    c.R = padded_rows((int)ceil_div<int64_t>(most, chunks));
    c.host_rows = host_random((int64_t)chunks * c.R * d, 1, 1.0f);
    c.rows = device_x(c.host_rows, (int64_t)chunks * c.R * d);
    c.sum = device_new<float>((int64_t)N * d);
    return c;
}

static void combine_case_free(CombineCase *c) {
    pairs_case_free(&c->pairs);
    free(c->host_rows);
    device_release(c->rows);
    device_release(c->sum);
}

// all chunks but the last are added up
static CombineChunk combine_last_chunk(const CombineCase *c) {
    int last = c->chunks - 1;
    for (int i = 0; i < last; i++) {
        dispatch_combine((floatX *)NULL, c->sum, NULL, rows_at_chunk(c->rows, &c->pairs, c->d, c->R, i),
                         c->pairs.pairs, c->pairs.dispatch, c->pairs.N, c->pairs.E, c->d, i * c->R, c->R, 0,
                         NULL);
    }
    CombineChunk chunk = {rows_at_chunk(c->rows, &c->pairs, c->d, c->R, last),
                          c->sum,
                          last * c->R,
                          c->R,
                          c->pairs.pairs,
                          c->pairs.dispatch,
                          c->pairs.E};
    return chunk;
}

static void combine_rmsnorm_forward_case(const CombineCase *c) {
    int N = c->pairs.N, d = c->d;
    int64_t size = (int64_t)N * d;
    const float eps = 1e-5f;
    float *residual = host_random(size, 2, 1.0f), *w = NEW(float, d), *normed = NEW(float, size),
          *rstd = NEW(float, N);
    fill_uniform(w, (size_t)d, 3, 1.5f);
    floatX *d_residual = device_x(residual, size), *d_normed = device_new<floatX>(size);
    float *d_w = device_f(w, d), *d_rstd = device_new<float>(N);
    float *want = cuda_dispatch_want(&c->pairs, c->host_rows, residual, d);
    dispatch_combine_rmsnorm_forward(d_residual, d_normed, d_rstd, d_residual, combine_last_chunk(c), d_w, N,
                                     d, eps, NULL);
    check_device("combine_rmsnorm y", d_residual, want, size, tolerance(1e-5, 2e-3));
    float *y = fetch(d_residual, size); // as it was rounded
    rmsnorm_forward(normed, rstd, y, w, N, d, eps);
    check_device("combine_rmsnorm normed", d_normed, normed, size, tolerance(1e-5, 2e-3));
    check_device("combine_rmsnorm rstd", d_rstd, rstd, N, 1e-5);
    uint64_t once = device_hash(d_normed, size * sizeof(floatX));
    rmsnorm_again(d_normed, d_rstd, d_residual, d_w, N, d, NULL); // as with --recompute
    CHECK(device_hash(d_normed, size * sizeof(floatX)) == once);
    const void *taken[] = {d_residual, d_normed, d_w, d_rstd};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {residual, w, normed, rstd, want, y};
    for (float *p : mine) {
        free(p);
    }
}

// dz [N, E]: 0 where the expert is not active, as the ReLU router leaves it, unless dense
static float *combine_dz(const CombineCase *c, int dense) {
    int64_t cells = (int64_t)c->pairs.N * c->pairs.E;
    float *all = host_random(cells, 5, 1.0f), *dz = NEW(float, cells);
    const PairList *pairs = &c->pairs.host;
    for (int t = 0; t < c->pairs.N; t++) {
        for (int64_t p = pairs->row_start[t]; p < pairs->row_start[t + 1]; p++) {
            int64_t cell = (int64_t)t * c->pairs.E + pairs->expert[p];
            dz[cell] = all[cell];
        }
    }
    if (dense) {
        memcpy(dz, all, (size_t)cells * sizeof(float));
    }
    free(all);
    return dz;
}

typedef enum { ROUTER_NONE, ROUTER_SPARSE, ROUTER_FULL } CombineRouter;

static void combine_rmsnorm_backward_case(const CombineCase *c, CombineRouter kind, GemmPlans *plans) {
    int N = c->pairs.N, E = c->pairs.E, d = c->d;
    int64_t size = (int64_t)N * d;
    float *x = host_random(size, 2, 1.0f), *dx = host_random(size, 3, 1.0f),
          *router = host_random((int64_t)E * d, 4, 1.0f), *dz = combine_dz(c, kind == ROUTER_FULL);
    float *w = NEW(float, d), *dw = NEW(float, d), *rstd = NEW(float, N), *zero = NEW(float, size);
    fill_uniform(w, (size_t)d, 6, 1.5f);
    fill_uniform(dw, (size_t)d, 7, 1.0f);
    fill_uniform(rstd, (size_t)N, 8, 1.0f);
    floatX *d_x = device_x(x, size), *d_router = device_x(router, (int64_t)E * d),
           *d_dz = device_x(dz, (int64_t)N * E), *dnormed = device_new<floatX>(size);
    float *d_w = device_f(w, d), *d_rstd = device_f(rstd, N),
          *scratch = device_new<float>(rmsnorm_scratch_floats(d));
    floatX *d_dx[2] = {device_x(dx, size), device_x(dx, size)};
    float *d_dw[2] = {device_f(dw, d), device_f(dw, d)};
    float *want = cuda_dispatch_want(&c->pairs, c->host_rows, zero, d);
    if (kind != ROUTER_NONE) {
        sgemm(0, 0, N, d, E, dz, E, router, d, want, d, 1); // dnormed += dz W
    }
    rmsnorm_backward(dx, dw, want, x, w, rstd, N, d);
    for (int i = 0; i < 2; i++) {
        dispatch_combine_rmsnorm_backward(d_dx[i], d_dw[i], dnormed, combine_last_chunk(c),
                                          kind != ROUTER_NONE ? d_dz : NULL, d_router, d_x, d_w, d_rstd,
                                          kind == ROUTER_SPARSE, N, d, scratch, plans, NULL);
    }
    bool within = rmsnorm_fits_warp(d) && (E <= COMBINE_RMSNORM_MOST_EXPERTS || kind != ROUTER_FULL);
    double rounded = within ? 0.0 : 2e-3; // dnormed, dz W
    check_device("combine_rmsnorm dx", d_dx[0], dx, size, tolerance(1e-5, 2e-3 + 2.0 * rounded));
    check_device("combine_rmsnorm dw", d_dw[0], dw, d, tolerance(1e-5, 1e-5 + 2.0 * rounded));
    CHECK(device_hash(d_dx[0], size * sizeof(floatX)) == device_hash(d_dx[1], size * sizeof(floatX)));
    CHECK(device_hash(d_dw[0], 4ll * d) == device_hash(d_dw[1], 4ll * d));
    const void *taken[] = {d_x,     d_router, d_dz,    dnormed, d_w,    d_rstd,
                           scratch, d_dx[0],  d_dx[1], d_dw[0], d_dw[1]};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {x, dx, router, dz, w, dw, rstd, zero, want};
    for (float *p : mine) {
        free(p);
    }
}

static void combine_rmsnorm_case(PairLoad load, int N, int E, int d, int chunks, GemmPlans *plans) {
    CombineCase c = combine_case(load, N, E, d, chunks);
    int before = tally.failures;
    combine_rmsnorm_forward_case(&c);
    for (int kind = ROUTER_NONE; kind <= ROUTER_FULL; kind++) {
        combine_rmsnorm_backward_case(&c, (CombineRouter)kind, plans);
    }
    if (tally.failures > before) {
        printf("  ... load %d, N %d, E %d, d %d, %d chunks\n", load, N, E, d, chunks);
    }
    combine_case_free(&c);
}

// more rows than were planned for (the arena's overflow): those beyond the last chunk are left out
static void combine_rmsnorm_overflow_case(void) {
    enum { N = 70, E = 8, D = 24 };
    CombineCase c = combine_case(LOAD_ALL, N, E, D, 3);
    CombineChunk chunk = {c.rows, NULL, 0, c.R, c.pairs.pairs, c.pairs.dispatch, E};
    float *residual = host_random(N * D, 2, 1.0f), *w = host_random(D, 3, 1.0f);
    floatX *d_residual = device_x(residual, N * D), *y[2], *normed = device_new<floatX>(N * D);
    float *d_w = device_f(w, D), *rstd = device_new<float>(N);
    y[0] = device_new<floatX>(N * D);
    y[1] = device_new<floatX>(N * D);
    dispatch_combine(y[0], NULL, d_residual, c.rows, c.pairs.pairs, c.pairs.dispatch, N, E, D, 0, c.R, 1,
                     NULL);
    dispatch_combine_rmsnorm_forward(y[1], normed, rstd, d_residual, chunk, d_w, N, D, 1e-5f, NULL);
    CHECK(device_hash(y[0], N * D * sizeof(floatX)) == device_hash(y[1], N * D * sizeof(floatX)));
    const void *taken[] = {d_residual, y[0], y[1], normed, d_w, rstd};
    for (const void *p : taken) {
        device_release(p);
    }
    free(residual);
    free(w);
    combine_case_free(&c);
}

static void test_cuda_dispatch_rmsnorm(void) {
    const int widths[] = {8, 24, 200, 768, 1024, 1536, 2056}, experts[] = {1, 3, 8, 16, 17, 128};
    GemmPlans *plans = gemm_test_open();
    for (int d : widths) {
        for (int E : experts) {
            int thin = emulated() && E * d > 8192;
            combine_rmsnorm_case(LOAD_MIXED, thin ? 6 : 39, E, d, 1, plans);
        }
    }
    for (int chunks = 1; chunks <= 4; chunks += 3) {
        combine_rmsnorm_case(LOAD_SPARSE, 70, 8, 200, chunks, plans);
        combine_rmsnorm_case(LOAD_ALL, 70, 8, 768, chunks, plans);
        combine_rmsnorm_case(LOAD_EIGHTH, 70, 40, 768, chunks, plans);
        combine_rmsnorm_case(LOAD_NONE, 17, 3, 24, chunks, plans);
        // more rows than lanes; of a single rounding's error 9 tokens make no average
        combine_rmsnorm_case(LOAD_MIXED, 39, 128, 24, chunks, plans);
        combine_rmsnorm_case(LOAD_MIXED, 9, 5, 2056, chunks, plans);
    }
    combine_rmsnorm_case(LOAD_EIGHTH, 2200, 3, 24, 2, plans); // a warp goes over several tokens
    if (!emulated()) {
        combine_rmsnorm_case(LOAD_SPARSE, 20011, 8, 768, 2, plans);
        combine_rmsnorm_case(LOAD_MIXED, 5003, 16, 1536, 3, plans);
    }
    combine_rmsnorm_overflow_case();
    gemm_test_close(plans);
}

// ----------------------------------------------------------------------------
// speed, against the bytes that must move

static void bench_combine_rmsnorm_of(PairLoad load, int N, int E, int d, GemmPlans *plans) {
    PairsCase c = pairs_case(load, N, E);
    int64_t size = (int64_t)N * d;
    int *offsets = fetch(c.dispatch.offsets, E + 1), rows = offsets[E];
    double P = (double)c.host.num_pairs, vector = (double)d * sizeof(floatX);
    floatX *Y = device_new<floatX>((int64_t)rows * d), *x = device_new<floatX>(size),
           *y = device_new<floatX>(size), *normed = device_new<floatX>(size);
    float *dz_host = NEW(float, (int64_t)N *E), *w = device_new<float>(d), *rstd = device_new<float>(N),
          *dw = device_new<float>(d), *scratch = device_new<float>(rmsnorm_scratch_floats(d));
    for (int t = 0; t < N; t++) {
        for (int64_t p = c.host.row_start[t]; p < c.host.row_start[t + 1]; p++) {
            dz_host[(int64_t)t * E + c.host.expert[p]] = 1.0f;
        }
    }
    floatX *dz = device_x(dz_host, (int64_t)N * E), *router = device_new<floatX>((int64_t)E * d);
    CombineChunk chunk = {Y, NULL, 0, rows, c.pairs, c.dispatch, E};
    printf("  N %d, E %d, d %d: %.0f pairs\n", N, E, d, P);
    double ms =
        device_ms([&] { dispatch_combine_rmsnorm_forward(y, normed, rstd, x, chunk, w, N, d, 1e-5f, 0); });
    bench_cuda_dispatch_line("combine_rmsnorm forward", ms, 4.0 * N + 4.0 * P + (P + 3.0 * N) * vector);
    ms = device_ms([&] {
        dispatch_combine_rmsnorm_backward(y, dw, normed, chunk, dz, router, x, w, rstd, 1, N, d, scratch,
                                          plans, 0);
    });
    bench_cuda_dispatch_line("combine_rmsnorm backward", ms,
                             8.0 * N + 4.0 * P + 2.0 * N * E + (P + 3.0 * N) * vector);
    const void *taken[] = {Y, x, y, normed, w, rstd, dw, scratch, dz, router};
    for (const void *p : taken) {
        device_release(p);
    }
    free(dz_host);
    free(offsets);
    pairs_case_free(&c);
}

static void bench_cuda_dispatch_rmsnorm(void) {
    GemmPlans *plans = gemm_test_open();
    bench_combine_rmsnorm_of(LOAD_SPARSE, 65536, 8, 768, plans);
    bench_combine_rmsnorm_of(LOAD_MIXED, 65536, 8, 768, plans);
    bench_combine_rmsnorm_of(LOAD_SPARSE, 65536, 8, 1024, plans);
    bench_combine_rmsnorm_of(LOAD_SPARSE, 32768, 8, 1536, plans);
    bench_combine_rmsnorm_of(LOAD_SPARSE, 65536, 32, 768, plans);
    bench_combine_rmsnorm_of(LOAD_EIGHTH, 65536, 64, 768, plans);
    bench_combine_rmsnorm_of(LOAD_EIGHTH, 32768, 512, 768, plans);
    gemm_test_close(plans);
}

#endif
