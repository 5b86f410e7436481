/*
router_lory.cuh, merge.cuh and merged_experts.cuh against router_lory.h and merge.h on the same inputs:
weights and pairs of segments and of contexts; the merge, and its backward, which is compared in fp32 in both
builds; whole layers of one chunk of segments and of several, short ones among them. Then what must not change
a bit: what of H is kept, a repeat, other texts in the batch; gradients that are added to; and a prompt's
experts, which stay.
*/
#ifndef CUDA_TEST_MERGE_CUH
#define CUDA_TEST_MERGE_CUH

#include "llmc/merge.h"
#include "llmc/merged_experts.cuh"
#include "harness.cuh"

// ----------------------------------------------------------------------------
// the router

static DevicePairs merge_device_pairs(int N, int E) {
    DevicePairs pairs = {};
    pairs.row_start = device_new<int>(N + 1);
    pairs.expert = device_new<int>(N);
    pairs.gate = device_new<float>(N);
    pairs.counts = device_new<int>(E);
    return pairs;
}

static void merge_release_pairs(DevicePairs pairs) {
    device_release(pairs.row_start);
    device_release(pairs.expert);
    device_release(pairs.gate);
    device_release(pairs.counts);
}

static void merge_check_pairs(DevicePairs got, const PairList *want, int E) {
    int N = (int)want->tokens, wrong = 0;
    int *row_start = fetch(got.row_start, N + 1), *expert = fetch(got.expert, N),
        *counts = fetch(got.counts, E);
    float *gate = fetch(got.gate, N);
    for (int t = 0; t < N; t++) {
        wrong += row_start[t] != t || expert[t] != want->expert[t] || gate[t] != 1.0f;
    }
    for (int e = 0; e < E; e++) {
        wrong += counts[e] != want->counts[e];
    }
    CHECK(wrong == 0 && row_start[N] == N);
    free(row_start);
    free(expert);
    free(gate);
    free(counts);
}

static void merge_router_case(int B, int T, int length, int E, const int *contexts) {
    int N = B * T;
    int64_t cells = (int64_t)N * E;
    Segments s = segments_of(B, T, length, contexts), on_device = s;
    int C = segments_count(s);
    float *logits = host_random(cells, 3, 3.0f), *da = host_random((int64_t)C * E, 4, 1.0f);
    float *dlogits = NEW(float, cells), *device_logits = device_f(logits, cells),
          *device_da = device_f(da, C * E);
    float *scratch = device_new<float>((int64_t)C * E);
    floatX *device_dlogits = device_new<floatX>(cells);
    int *device_contexts = contexts != NULL ? device_i(contexts, B) : NULL;
    PairList want = pairs_empty();
    DevicePairs pairs = merge_device_pairs(N, E);
    on_device.contexts = device_contexts;
    pairs.segments = on_device;
    router_lory_forward(&want, logits, s, E);
    router_lory_forward(pairs, device_logits, on_device, E, scratch, NULL);
    check_device("lory weights", device_logits, logits, cells, 2e-6);
    merge_check_pairs(pairs, &want, E);
    router_lory_backward(dlogits, da, &want, logits, E);
    router_lory_backward(device_dlogits, device_da, pairs, device_logits, N, E, NULL);
    check_device("lory dlogits", device_dlogits, dlogits, cells, tolerance(1e-5, 4e-3));
    on_device.kept = 1; // the weights stay what they are
    uint64_t before = device_hash(device_logits, cells * 4);
    router_lory_forward(pairs, device_logits, on_device, E, scratch, NULL);
    CHECK(device_hash(device_logits, cells * 4) == before);
    pairs_free(&want);
    merge_release_pairs(pairs);
    const void *buffers[] = {device_logits, device_da, scratch, device_dlogits, device_contexts};
    for (int i = 0; i < 5; i++) {
        device_release(buffers[i]);
    }
    free(logits);
    free(da);
    free(dlogits);
}

static void test_merge_router(void) {
    int contexts[3] = {4, 21, 1};
    merge_router_case(2, 16, 4, 8, NULL);
    merge_router_case(3, 21, 5, 3, contexts);
    if (few_cases) {
        return;
    }
    merge_router_case(3, 21, 5, 3, NULL);
    merge_router_case(1, 7, 9, 4, NULL);
    merge_router_case(2, 70, 64, 1, NULL);
    merge_router_case(2, 19, 3, 70, NULL);
    merge_router_case(1, 600, 256, 8, NULL);
}

// ----------------------------------------------------------------------------
// the merge alone

typedef struct {
    int E, d, F;
    float *gate_up, *down, *dgate_up, *ddown;
    DeviceBank device;
} MergeBankPair;

// weights that floatX has, gradients that it has not
static MergeBankPair merge_bank_pair(int E, int d, int F, unsigned seed) {
    MergeBankPair b;
    int64_t down = (int64_t)E * F * d;
    b.E = E;
    b.d = d;
    b.F = F;
    b.gate_up = host_random(2 * down, seed, 0.5f);
    b.down = host_random(down, seed + 1, 0.5f);
    b.dgate_up = NEW(float, 2 * down);
    b.ddown = NEW(float, down);
    fill_uniform(b.dgate_up, (size_t)(2 * down), seed + 2, 1.0f);
    fill_uniform(b.ddown, (size_t)down, seed + 3, 1.0f);
    DeviceBank device = {E,
                         d,
                         F,
                         device_x(b.gate_up, 2 * down),
                         device_x(b.down, down),
                         device_f(b.dgate_up, 2 * down),
                         device_f(b.ddown, down)};
    b.device = device;
    return b;
}

static ExpertBank merge_host_bank(const MergeBankPair *b) {
    ExpertBank bank = {b->E, b->d, b->F, b->gate_up, b->down, b->dgate_up, b->ddown};
    return bank;
}

static void merge_bank_pair_free(MergeBankPair *b) {
    float *host[] = {b->gate_up, b->down, b->dgate_up, b->ddown};
    const void *device[] = {b->device.gate_up, b->device.down, b->device.dgate_up, b->device.ddown};
    for (int i = 0; i < 4; i++) {
        free(host[i]);
        device_release(device[i]);
    }
}

// `count` of the segments of one token each, of which the first is not the batch's; fresh: dbank is set
static void merge_sums_case(int count, int E, int d, int F, int fresh) {
    enum { BEFORE = 2 };
    int64_t down = (int64_t)F * d;
    MergeBankPair own = merge_bank_pair(E, d, F, 31), to = merge_bank_pair(count, d, F, 41);
    float *a = NEW(float, (BEFORE + count) * E), *da = NEW(float, count *E);
    fill_uniform(a, (size_t)((BEFORE + count) * E), 5, 1.0f);
    float *device_a = device_f(a, (BEFORE + count) * E), *device_da = device_new<float>((int64_t)count * E);
    float *parts = device_new<float>((int64_t)MERGE_CHUNK * E * MERGE_BLOCKS);
    DeviceSegments chunk = {segments_of(1, BEFORE + count, 1, NULL), BEFORE, count};
    if (fresh) { // NaN: all must be set
        memset(own.dgate_up, 0, (size_t)(2 * E * down) * sizeof(float));
        memset(own.ddown, 0, (size_t)(E * down) * sizeof(float));
        CUDA_CHECK(cudaMemset(own.device.dgate_up, 0xff, (size_t)(2 * E * down) * sizeof(float)));
        CUDA_CHECK(cudaMemset(own.device.ddown, 0xff, (size_t)(E * down) * sizeof(float)));
    }
    merge_backward(merge_host_bank(&own), da, a + BEFORE * E, merge_host_bank(&to));
    merge_backward(own.device, device_da, device_a, to.device, chunk, parts, fresh, NULL);
    check_device("merge da", device_da, da, (int64_t)count * E, 1e-5);
    check_device("merge dgate_up", own.device.dgate_up, own.dgate_up, 2 * E * down, 1e-6);
    check_device("merge ddown", own.device.ddown, own.ddown, E * down, 1e-6);
    merge_forward(merge_host_bank(&to), a + BEFORE * E, merge_host_bank(&own));
    merge_forward(to.device, device_a, own.device, chunk, NULL);
    check_device("merged gate_up", to.device.gate_up, to.gate_up, 2 * count * down, tolerance(1e-6, 3e-3));
    check_device("merged down", to.device.down, to.down, count * down, tolerance(1e-6, 3e-3));
    device_release(device_a);
    device_release(device_da);
    device_release(parts);
    free(a);
    free(da);
    merge_bank_pair_free(&own);
    merge_bank_pair_free(&to);
}

static void test_merge_matrices(void) {
    merge_sums_case(3, 8, 8, 24, 1);
    merge_sums_case(MERGE_CHUNK, 5, 24, 40, 0); // not all of the last tile's columns exist
    if (few_cases) {
        return;
    }
    merge_sums_case(1, 1, 8, 8, 0);
    merge_sums_case(MERGE_CHUNK, 8, 64, 128, 1);
    merge_sums_case(9, 37, 16, 24, 0);  // more experts than a block of the backward has
    merge_sums_case(4, 70, 16, 16, 1);  // and than the forward's shared memory
    merge_sums_case(2, 2, 256, 520, 0); // more tiles than blocks
}

// ----------------------------------------------------------------------------
// layers

enum { MERGE_LAYERS = 3, MERGE_LAYER = 1 };

typedef enum { MERGE_Y, MERGE_DX, MERGE_DA, MERGE_DGATE_UP, MERGE_DDOWN, MERGE_RESULTS } MergeResult;

typedef struct {
    Segments s;
    int N, C, E, d, F;
    MergeBankPair bank;
    float *want[MERGE_RESULTS];
    int64_t size[MERGE_RESULTS];
    floatX *x, *residual, *dy, *y, *dx;
    float *a, *da;
    DevicePairs pairs;
    DeviceDispatch dispatch;
} MergeCase;

static void merge_reference(MergeCase *c, float *const *host, float *a, PairList *pairs) {
    Merged merged;
    float *h = NEW(float, (int64_t)c->N * 2 * c->F), *scratch = NEW(float, (int64_t)c->N *(c->d + c->F + 1));
    ExpertBank bank = merge_host_bank(&c->bank);
    for (int i = 0; i < MERGE_RESULTS; i++) {
        c->want[i] = NEW(float, c->size[i]);
    }
    memcpy(c->want[MERGE_Y], host[1], (size_t)c->size[MERGE_Y] * sizeof(float));
    memcpy(c->want[MERGE_DX], host[1], (size_t)c->size[MERGE_DX] * sizeof(float));
    bank.dgate_up = c->want[MERGE_DGATE_UP];
    bank.ddown = c->want[MERGE_DDOWN];
    merged_open(&merged, MERGE_LAYERS, c->C, c->N, c->E, c->d, c->F, 1);
    merged_forward(c->want[MERGE_Y], h, host[0], bank, a, pairs, MERGE_LAYER, &merged, scratch);
    merged_backward(c->want[MERGE_DX], host[2], host[0], h, bank, a, pairs, MERGE_LAYER, &merged, scratch);
    memcpy(c->want[MERGE_DA], merged.da, (size_t)c->size[MERGE_DA] * sizeof(float));
    merged_close(&merged);
    free(h);
    free(scratch);
}

static MergeCase merge_case(int B, int T, int length, int E, int d, int F) {
    MergeCase c = {};
    PairList pairs = pairs_empty();
    c.s = segments_of(B, T, length, NULL);
    c.N = B * T;
    c.C = segments_count(c.s);
    c.E = E;
    c.d = d;
    c.F = F;
    c.bank = merge_bank_pair(E, d, F, 51);
    int64_t token = (int64_t)c.N * d, down = (int64_t)E * F * d;
    int64_t sizes[MERGE_RESULTS] = {token, token, (int64_t)c.C * E, 2 * down, down};
    memcpy(c.size, sizes, sizeof(sizes));
    float *host[] = {host_random(token, 11, 1.0f), host_random(token, 12, 1.0f),
                     host_random(token, 13, 1.0f)};
    float *a = host_random((int64_t)c.N * E, 14, 2.0f);
    router_lory_forward(&pairs, a, c.s, E);
    merge_reference(&c, host, a, &pairs);
    c.x = device_x(host[0], token);
    c.residual = device_x(host[1], token);
    c.dy = device_x(host[2], token);
    c.y = device_new<floatX>(token);
    c.dx = device_new<floatX>(token);
    c.a = device_f(a, (int64_t)c.N * E);
    c.da = device_new<float>((int64_t)c.C * E);
    int64_t rows = merged_rows(B, T, length).worst;
    c.dispatch.offsets = device_new<int>(c.C + 1);
    c.dispatch.row_of_pair = device_new<int>(c.N);
    c.dispatch.token_of_row = device_new<int>(rows);
    c.dispatch.gate_of_row = device_new<float>(rows);
    c.pairs = merge_device_pairs(c.N, E);
    c.pairs.segments = c.s;
    c.pairs.segments.kept = 1; // the list alone: a is given
    router_lory_forward(c.pairs, c.a, c.pairs.segments, E, NULL, NULL);
    c.pairs.segments.kept = 0;
    for (int i = 0; i < 3; i++) {
        free(host[i]);
    }
    free(a);
    pairs_free(&pairs);
    return c;
}

static void merge_case_free(MergeCase *c) {
    const void *buffers[] = {c->x,
                             c->residual,
                             c->dy,
                             c->y,
                             c->dx,
                             c->a,
                             c->da,
                             c->dispatch.offsets,
                             c->dispatch.row_of_pair,
                             c->dispatch.token_of_row,
                             c->dispatch.gate_of_row};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        device_release(buffers[i]);
    }
    for (int i = 0; i < MERGE_RESULTS; i++) {
        free(c->want[i]);
    }
    merge_bank_pair_free(&c->bank);
    merge_release_pairs(c->pairs);
}

// an arena and merged experts for the case's shape
typedef struct {
    DeviceMemory memory;
    Arena arena;
    DeviceMerged merged;
} MergeRoom;

static MergeRoom *merge_room(const MergeCase *c, int64_t store_rows) {
    MergeRoom *room = NEW(MergeRoom, 1);
    Segments s = c->s;
    arena_open(&room->arena, &room->memory, merged_rows(s.sequences, s.tokens, s.length), MERGE_LAYERS, c->N,
               c->E, c->d, c->F, store_rows, 1, test_kernels);
    merged_take(&room->merged, &room->memory, MERGE_LAYERS, s.sequences, c->C, c->E, c->d, c->F, 1);
    arena_begin_step(&room->arena, NULL);
    return room;
}

static void merge_room_free(MergeRoom *room) {
    CUDA_CHECK(cudaDeviceSynchronize());
    arena_free(&room->arena);
    memory_release(&room->memory);
    free(room);
}

static void merge_combine(floatX *to, const MergeCase *c, CombineChunk sums, int N) {
    dispatch_combine(to, sums.sum, c->residual, sums.rows, sums.pairs, sums.dispatch, N, sums.E, c->d,
                     sums.first, sums.chunk_rows, 1, NULL);
}

static uint64_t merge_run(MergeCase *c, int64_t store_rows, int fresh) {
    MergeRoom *room = merge_room(c, store_rows);
    arena_begin_micro_batch(&room->arena, NULL);
    if (fresh) {
        CUDA_CHECK(
            cudaMemset(c->bank.device.dgate_up, 0xff, (size_t)c->size[MERGE_DGATE_UP] * sizeof(float)));
        CUDA_CHECK(cudaMemset(c->bank.device.ddown, 0xff, (size_t)c->size[MERGE_DDOWN] * sizeof(float)));
    }
    merge_combine(c->y, c,
                  merged_forward(c->x, c->bank.device, c->a, c->pairs, c->dispatch, &room->merged,
                                 &room->arena, MERGE_LAYER, NULL),
                  c->N);
    merge_combine(c->dx, c,
                  merged_backward(c->da, c->dy, c->x, c->bank.device, fresh, c->a, c->pairs, c->dispatch,
                                  &room->merged, &room->arena, MERGE_LAYER, NULL),
                  c->N);
    int *overflow = fetch(room->arena.overflow, 1);
    CHECK(*overflow == 0);
    free(overflow);
    merge_room_free(room);
    const void *results[MERGE_RESULTS] = {c->y, c->dx, c->da, c->bank.device.dgate_up, c->bank.device.ddown};
    uint64_t hash = 0;
    for (int i = 0; i < MERGE_RESULTS; i++) {
        hash = hash * 31 + device_hash(results[i], c->size[i] * (i < MERGE_DA ? (int64_t)sizeof(floatX) : 4));
    }
    return hash;
}

// experts' tolerances (test_experts.cuh), and bank' rounded once more
static void merge_check(const MergeCase *c) {
    const double limit = tolerance(1e-5, 1e-2);
    check_device("merged y", c->y, c->want[MERGE_Y], c->size[MERGE_Y], limit);
    check_device("merged dx", c->dx, c->want[MERGE_DX], c->size[MERGE_DX], limit);
    check_device("merged da", c->da, c->want[MERGE_DA], c->size[MERGE_DA], limit);
    check_device("merged dgate_up", c->bank.device.dgate_up, c->want[MERGE_DGATE_UP], c->size[MERGE_DGATE_UP],
                 limit);
    check_device("merged ddown", c->bank.device.ddown, c->want[MERGE_DDOWN], c->size[MERGE_DDOWN], limit);
}

static void merge_layer_case(int B, int T, int length, int E, int d, int F) {
    MergeCase c = merge_case(B, T, length, E, d, F);
    int64_t all = MERGE_LAYERS * merged_rows(B, T, length).worst;
    int before = tally.failures;
    uint64_t kept = merge_run(&c, all, 1);
    merge_check(&c);
    if (!few_cases) {
        CHECK(merge_run(&c, all, 1) == kept && merge_run(&c, 0, 1) == kept);
        CHECK(merge_run(&c, merged_rows(B, T, length).worst / 2, 1) == kept);
        for (int i = MERGE_DGATE_UP; i <= MERGE_DDOWN; i++) { // once more, added: twice as much
            for (int64_t j = 0; j < c.size[i]; j++) {
                c.want[i][j] *= 2.0f;
            }
        }
        merge_run(&c, all, 0);
        merge_check(&c);
    }
    if (tally.failures > before) {
        printf("  ... B %d, T %d, S %d, E %d, d %d, F %d\n", B, T, length, E, d, F);
    }
    merge_case_free(&c);
}

// a batch's first text has the bits that it has alone
static void merge_alone_case(void) {
    enum { T = 70, LENGTH = 16, E = 4, D = 16, F = 24 };
    MergeCase many = merge_case(8, T, LENGTH, E, D, F), one = merge_case(1, T, LENGTH, E, D, F);
    size_t text = T * D * sizeof(floatX);
    CUDA_CHECK(cudaMemcpy(one.x, many.x, text, cudaMemcpyDeviceToDevice));
    CUDA_CHECK(cudaMemcpy(one.residual, many.residual, text, cudaMemcpyDeviceToDevice));
    CUDA_CHECK(cudaMemcpy(one.dy, many.dy, text, cudaMemcpyDeviceToDevice));
    CUDA_CHECK(cudaMemcpy(one.a, many.a, T * E * sizeof(float), cudaMemcpyDeviceToDevice));
    merge_run(&many, 0, 1);
    merge_run(&one, 0, 1);
    CHECK(device_hash(one.y, (int64_t)text) == device_hash(many.y, (int64_t)text));
    CHECK(device_hash(one.dx, (int64_t)text) == device_hash(many.dx, (int64_t)text));
    CHECK(device_hash(one.da, one.C * E * 4) == device_hash(many.da, one.C * E * 4));
    merge_case_free(&many);
    merge_case_free(&one);
}

// whole texts, more of them than a chunk of rows takes; then the last token again, with the experts that
// stayed
static void merge_prompt_case(int B, int T, int length) {
    enum { E = 4, D = 16, F = 24 };
    MergeCase c = merge_case(B, T, length, E, D, F);
    MergeRoom *room = merge_room(&c, 0);
    int *contexts = NEW(int, B), *on_device = NULL;
    for (int b = 0; b < B; b++) {
        contexts[b] = T / 2 + 1 - b % 2;
    }
    on_device = device_i(contexts, B);
    PairList pairs = pairs_empty();
    float *x = fetch(c.x, c.N * D), *residual = fetch(c.residual, c.N * D),
          *a = host_random(c.N * E, 14, 2.0f);
    float *h = NEW(float, (int64_t)c.N * 2 * F), *scratch = NEW(float, (int64_t)c.N *(D + F + 1));
    Merged merged;
    merged_open(&merged, MERGE_LAYERS, B, c.N, E, D, F, 0);
    router_lory_forward(&pairs, a, segments_of(B, T, length, contexts), E);
    merged_forward(residual, h, x, merge_host_bank(&c.bank), a, &pairs, MERGE_LAYER, &merged, scratch);
    CUDA_CHECK(cudaMemcpy(c.a, a, (size_t)c.N * E * sizeof(float), cudaMemcpyHostToDevice));
    c.pairs.segments = segments_of(B, T, length, on_device);
    c.pairs.segments.kept = 1;
    router_lory_forward(c.pairs, c.a, c.pairs.segments, E, NULL, NULL);
    c.pairs.segments.kept = 0;
    arena_begin_micro_batch(&room->arena, NULL);
    merge_combine(c.y, &c,
                  merged_forward(c.x, c.bank.device, c.a, c.pairs, c.dispatch, &room->merged, &room->arena,
                                 MERGE_LAYER, NULL),
                  c.N);
    check_device("whole texts", c.y, residual, c.N * D, tolerance(1e-5, 1e-2));
    if (B == 1) {
        const floatX *last = c.x + (int64_t)(T - 1) * D;
        CUDA_CHECK(cudaMemcpy(c.residual, c.residual + (int64_t)(T - 1) * D, D * sizeof(floatX),
                              cudaMemcpyDeviceToDevice));
        c.pairs.segments = segments_kept(1);
        router_lory_forward(c.pairs, c.a, c.pairs.segments, E, NULL, NULL);
        merge_combine(c.dx, &c,
                      merged_forward(last, c.bank.device, NULL, c.pairs, c.dispatch, &room->merged,
                                     &room->arena, MERGE_LAYER, NULL),
                      1);
        CHECK(device_hash(c.dx, D * (int64_t)sizeof(floatX)) ==
              device_hash(c.y + (int64_t)(T - 1) * D, D * (int64_t)sizeof(floatX)));
    }
    merged_close(&merged);
    merge_room_free(room);
    merge_case_free(&c);
    pairs_free(&pairs);
    device_release(on_device);
    free(contexts);
    free(x);
    free(residual);
    free(a);
    free(h);
    free(scratch);
}

static void test_cuda_merge(void) {
    test_merge_router();
    test_merge_matrices();
    merge_layer_case(1, 20, 8, 4, 16, 24);
    if (few_cases) {
        return;
    }
    merge_layer_case(2, 128, 64, 8, 32, 64); // no pads
    merge_layer_case(3, 150, 70, 3, 24, 40); // more rows than ROW_ALIGN, and short ones
    merge_layer_case(5, 15, 1, 3, 16, 24);   // 75 segments
    merge_layer_case(1, 9, 16, 2, 16, 16);
    merge_alone_case();
    merge_prompt_case(1, 150, 8);
    merge_prompt_case(40, 30, 8); // 40 texts in two chunks
    merge_prompt_case(5, 200, 4); // texts longer than the chunk's rows would be for segments
}

#endif
