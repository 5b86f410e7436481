/*
experts.cuh and arena.cuh against experts.h on the same inputs: forward and backward, in one chunk and in
several, for loads from no pair to all; then what must not change a bit: the budget (nothing, a part or all
stored), more chunks planned than there are rows, inference, a repeat, a CUDA graph. And the plan: placement
against the rule of arena.cuh, the overflow flag, and that growing from it suffices.
*/
#ifndef CUDA_TEST_EXPERTS_CUH
#define CUDA_TEST_EXPERTS_CUH

#include "llmc/experts.cuh"
#include "llmc/experts.h"
#include "harness.cuh"
#include "test_dispatch.cuh"

// k: what the chunks are sized for; the rows that exist depend on the load
typedef struct {
    int N, E, d, F, k;
} ExpertsShape;

typedef enum {
    EXPERTS_Y,
    EXPERTS_DX,
    EXPERTS_DGATE,
    EXPERTS_DGATE_UP,
    EXPERTS_DDOWN,
    EXPERTS_RESULTS
} ExpertsResult;

// inputs on both sides, what the C functions make of them, and a place for the device's results
typedef struct {
    ExpertsShape shape;
    PairsCase pairs;
    float *want[EXPERTS_RESULTS];
    int64_t size[EXPERTS_RESULTS];
    floatX *x, *residual, *dy, *gate_up, *down;
    floatX *y, *dx;
    float *dgate, *dgate_up, *ddown;
} ExpertsCase;

// ----------------------------------------------------------------------------
// the reference

static void cuda_experts_reference(ExpertsCase *c, float *const *host) {
    ExpertsShape s = c->shape;
    int64_t P = c->pairs.host.num_pairs;
    float *h = NEW(float, P * 2 * s.F), *scratch = NEW(float, P *(s.d + s.F + 1));
    for (int i = 0; i < EXPERTS_RESULTS; i++) {
        c->want[i] = NEW(float, c->size[i]); // the weights' gradients begin as 0
    }
    memcpy(c->want[EXPERTS_Y], host[1], (size_t)c->size[EXPERTS_Y] * sizeof(float));
    memcpy(c->want[EXPERTS_DX], host[1], (size_t)c->size[EXPERTS_DX] * sizeof(float));
    ExpertBank bank = {s.E, s.d, s.F, host[3], host[4], c->want[EXPERTS_DGATE_UP], c->want[EXPERTS_DDOWN]};
    experts_forward(c->want[EXPERTS_Y], h, host[0], bank, &c->pairs.host, &c->pairs.host_dispatch, scratch);
    experts_backward(c->want[EXPERTS_DX], c->want[EXPERTS_DGATE], host[2], host[0], h, bank, &c->pairs.host,
                     &c->pairs.host_dispatch, scratch);
    free(h);
    free(scratch);
}

static ExpertsCase cuda_experts_case(ExpertsShape s, PairLoad load) {
    ExpertsCase c;
    int64_t token = (int64_t)s.N * s.d, weight = (int64_t)s.E * s.F * s.d;
    c.shape = s;
    c.pairs = pairs_case(load, s.N, s.E);
    int64_t P = c.pairs.host.num_pairs;
    int64_t sizes[EXPERTS_RESULTS] = {token, token, P, 2 * weight, weight};
    memcpy(c.size, sizes, sizeof(sizes));
    float *host[] = {host_random(token, 11, 1.0f), host_random(token, 12, 1.0f), host_random(token, 13, 1.0f),
                     host_random(2 * weight, 14, 0.5f), host_random(weight, 15, 0.5f)};
    cuda_experts_reference(&c, host);
    c.x = device_x(host[0], token);
    c.residual = device_x(host[1], token);
    c.dy = device_x(host[2], token);
    c.gate_up = device_x(host[3], 2 * weight);
    c.down = device_x(host[4], weight);
    c.y = device_new<floatX>(token);
    c.dx = device_new<floatX>(token);
    c.dgate = device_new<float>(P);
    c.dgate_up = device_new<float>(2 * weight);
    c.ddown = device_new<float>(weight);
    for (int i = 0; i < 5; i++) {
        free(host[i]);
    }
    return c;
}

static void cuda_experts_case_free(ExpertsCase *c) {
    const void *buffers[] = {c->x, c->residual, c->dy,    c->gate_up,  c->down,
                             c->y, c->dx,       c->dgate, c->dgate_up, c->ddown};
    for (int i = 0; i < 10; i++) {
        device_release(buffers[i]);
    }
    for (int i = 0; i < EXPERTS_RESULTS; i++) {
        free(c->want[i]);
    }
    pairs_case_free(&c->pairs);
}

// ----------------------------------------------------------------------------
// runs

enum { EXPERTS_LAYERS = 2, EXPERTS_LAYER = 1 };

static DeviceMemory cuda_experts_memory(void) {
    DeviceMemory memory;
    memset(&memory, 0, sizeof(memory));
    return memory;
}

static void cuda_experts_arena(Arena *arena, DeviceMemory *memory, const ExpertsShape *s, int64_t store_rows,
                               int training) {
    *memory = cuda_experts_memory();
    arena_init(arena, memory, EXPERTS_LAYERS, s->N, s->E, s->k, s->E, s->d, s->F, store_rows, training,
               test_kernels);
    arena_begin_step(arena, NULL);
}

static void cuda_experts_arena_free(Arena *arena, DeviceMemory *memory) {
    CUDA_CHECK(cudaDeviceSynchronize());
    memory_release(memory);
    arena_free(arena);
}

// what experts_forward and experts_backward leave to do: to = residual + the sums
static void cuda_experts_combine(floatX *to, const ExpertsCase *c, CombineChunk sums, cudaStream_t stream) {
    dispatch_combine(to, sums.sum, c->residual, sums.rows, sums.pairs, sums.dispatch, c->shape.N, sums.E,
                     c->shape.d, sums.first, sums.chunk_rows, 1, stream);
}

static DeviceBank cuda_experts_bank(const ExpertsCase *c) {
    DeviceBank bank = {c->shape.E, c->shape.d, c->shape.F, c->gate_up, c->down, c->dgate_up, c->ddown};
    return bank;
}

// both layers are placed, so that the one that is computed does not begin at the store's beginning
static void cuda_experts_forward(ExpertsCase *c, Arena *arena, cudaStream_t stream) {
    ExpertsShape s = c->shape;
    arena_begin_micro_batch(arena, stream);
    for (int l = 0; l < EXPERTS_LAYERS; l++) {
        arena_place(arena, l, c->pairs.dispatch, stream);
    }
    CombineChunk sums = experts_forward(c->x, cuda_experts_bank(c), c->pairs.pairs, c->pairs.dispatch, arena,
                                        EXPERTS_LAYER, s.N, stream);
    cuda_experts_combine(c->y, c, sums, stream);
}

// of fresh gradients, which hold NaN: all of them must be set (test_grouped_gemm.cuh has those that are added to)
static void cuda_experts_backward(ExpertsCase *c, Arena *arena, cudaStream_t stream) {
    ExpertsShape s = c->shape;
    CUDA_CHECK(cudaMemsetAsync(c->dgate_up, 0xff, (size_t)c->size[EXPERTS_DGATE_UP] * sizeof(float), stream));
    CUDA_CHECK(cudaMemsetAsync(c->ddown, 0xff, (size_t)c->size[EXPERTS_DDOWN] * sizeof(float), stream));
    CombineChunk sums = experts_backward(c->dgate, c->dy, c->x, cuda_experts_bank(c), 1, c->pairs.pairs,
                                         c->pairs.dispatch, arena, EXPERTS_LAYER, s.N, stream);
    cuda_experts_combine(c->dx, c, sums, stream);
}

// what an earlier run has written must not pass for this one's
static void cuda_experts_forget(ExpertsCase *c) {
    CUDA_CHECK(cudaMemset(c->y, 0xff, (size_t)c->size[EXPERTS_Y] * sizeof(floatX)));
    CUDA_CHECK(cudaMemset(c->dx, 0xff, (size_t)c->size[EXPERTS_DX] * sizeof(floatX)));
    CUDA_CHECK(cudaMemset(c->dgate, 0xff, (size_t)c->size[EXPERTS_DGATE] * sizeof(float)));
}

static void cuda_experts_run(ExpertsCase *c, Arena *arena) {
    cuda_experts_forget(c);
    cuda_experts_forward(c, arena, NULL);
    cuda_experts_backward(c, arena, NULL);
}

// all results' bits
static uint64_t cuda_experts_hash(const ExpertsCase *c) {
    const int64_t x = sizeof(floatX), f = sizeof(float);
    uint64_t hash = device_hash(c->y, c->size[EXPERTS_Y] * x);
    hash = hash * 31 + device_hash(c->dx, c->size[EXPERTS_DX] * x);
    hash = hash * 31 + device_hash(c->dgate, c->size[EXPERTS_DGATE] * f);
    hash = hash * 31 + device_hash(c->dgate_up, c->size[EXPERTS_DGATE_UP] * f);
    return hash * 31 + device_hash(c->ddown, c->size[EXPERTS_DDOWN] * f);
}

// ----------------------------------------------------------------------------
// results

// bf16: H, gate A, Y (dH, dX') and the result are each rounded once, 1.1e-3 of a tensor a time, and silu
// hands its input's error on: 3e-3 is usual. fp32: sums of up to 2F terms in another order
static void cuda_experts_check(const ExpertsCase *c) {
    const double limit = tolerance(1e-5, 1e-2);
    check_device("experts y", c->y, c->want[EXPERTS_Y], c->size[EXPERTS_Y], limit);
    check_device("experts dx", c->dx, c->want[EXPERTS_DX], c->size[EXPERTS_DX], limit);
    check_device("experts dgate", c->dgate, c->want[EXPERTS_DGATE], c->size[EXPERTS_DGATE], limit);
    check_device("experts dw_gate_up", c->dgate_up, c->want[EXPERTS_DGATE_UP], c->size[EXPERTS_DGATE_UP],
                 limit);
    check_device("experts dw_down", c->ddown, c->want[EXPERTS_DDOWN], c->size[EXPERTS_DDOWN], limit);
}

// where each chunk went: in order, without gaps, behind the store where it did not fit
static void cuda_experts_check_places(const ExpertsCase *c, const Arena *arena) {
    int *offsets = fetch(c->pairs.dispatch.offsets, c->shape.E + 1), wrong = 0;
    int64_t *first = fetch_raw(arena->first, (int64_t)EXPERTS_LAYERS * arena->max_chunks), used = 0;
    for (int i = 0; i < EXPERTS_LAYERS * arena->max_chunks; i++) {
        int64_t left = offsets[c->shape.E] - (int64_t)(i % arena->max_chunks) * arena->chunk_rows;
        int64_t here = left < arena->chunk_rows ? left : arena->chunk_rows;
        int fits = here > 0 && used + here <= arena->store_rows;
        wrong += first[i] != (fits ? used : arena->store_rows);
        used += fits ? here : 0;
    }
    CHECK(wrong == 0);
    free(offsets);
    free(first);
}

static void cuda_experts_check_flags(const ExpertsCase *c, const Arena *arena, int overflow) {
    int *offsets = fetch(c->pairs.dispatch.offsets, c->shape.E + 1), *flag = fetch(arena->overflow, 1);
    int *most = fetch(arena->most_rows, EXPERTS_LAYERS);
    CHECK(flag[0] == overflow);
    for (int l = 0; l < EXPERTS_LAYERS; l++) {
        CHECK(most[l] == offsets[c->shape.E]);
    }
    free(offsets);
    free(flag);
    free(most);
}

// everything stored, against C; all but the last layer's last chunk, and nothing: the same bits
static void cuda_experts_check_budgets(ExpertsShape shape, PairLoad load, int min_chunks) {
    ExpertsCase c = cuda_experts_case(shape, load);
    int *offsets = fetch(c.pairs.dispatch.offsets, shape.E + 1);
    int64_t rows = offsets[shape.E], worst = arena_worst_rows(shape.N, shape.E, shape.E);
    const int64_t budgets[] = {EXPERTS_LAYERS * worst, rows > 0 ? EXPERTS_LAYERS * rows - ROW_ALIGN : 0, 0};
    uint64_t first = 0;
    for (int i = 0; i < 3; i++) {
        Arena arena;
        DeviceMemory memory;
        cuda_experts_arena(&arena, &memory, &shape, budgets[i], 1);
        CHECK(arena.max_chunks >= min_chunks && (i == 0) == (arena.h_rows == arena.store_rows));
        cuda_experts_run(&c, &arena);
        cuda_experts_check_places(&c, &arena);
        cuda_experts_check_flags(&c, &arena, 0);
        if (i == 0) {
            cuda_experts_check(&c);
            first = cuda_experts_hash(&c);
        }
        CHECK(cuda_experts_hash(&c) == first);
        cuda_experts_arena_free(&arena, &memory);
    }
    free(offsets);
    cuda_experts_case_free(&c);
}

static void test_cuda_experts_loads(void) {
    const ExpertsShape shapes[] = {
        {1, 1, 8, 8, 1}, {37, 3, 24, 40, 1}, {70, 8, 72, 24, 2}, {20, 128, 16, 8, 1}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (int load = 0; load < LOADS; load++) {
            if (emulated() && shapes[i].E == 128 && load != LOAD_SPARSE) {
                continue; // slow
            }
            cuda_experts_check_budgets(shapes[i], (PairLoad)load, 1);
        }
    }
}

static void test_cuda_experts_chunks(void) {
    const ExpertsShape two = {400, 3, 24, 40, 1}, three = {260, 8, 16, 24, 1}, wide = {1500, 8, 200, 264, 1};
    cuda_experts_check_budgets(two, LOAD_ALL, 2);
    cuda_experts_check_budgets(two, LOAD_MIXED, 2);
    cuda_experts_check_budgets(two, LOAD_NONE, 2);
    cuda_experts_check_budgets(three, LOAD_ALL, 3);
    cuda_experts_check_budgets(three, LOAD_ONE_EXPERT, 3);
    if (!emulated()) {
        cuda_experts_check_budgets(wide, LOAD_ALL, 5);
        cuda_experts_check_budgets(wide, LOAD_MIXED, 5);
        cuda_experts_check_budgets(wide, LOAD_SPARSE, 5);
    }
}

// ----------------------------------------------------------------------------
// the plan

// planned too small: flagged, the rows all counted; grown from these counts: enough, and right
static void test_cuda_experts_overflow(void) {
    const ExpertsShape shape = {260, 8, 16, 24, 1};
    ExpertsCase c = cuda_experts_case(shape, LOAD_ALL);
    Arena arena;
    DeviceMemory memory;
    cuda_experts_arena(&arena, &memory, &shape, 1000, 1);
    cuda_experts_run(&c, &arena);
    uint64_t worst = cuda_experts_hash(&c);
    const int few[EXPERTS_LAYERS] = {64, 64};
    arena_plan(&arena, few);
    CHECK(arena.planned[0] == 1 && arena.planned[1] == 1);
    arena_begin_step(&arena, NULL);
    cuda_experts_run(&c, &arena);
    cuda_experts_check_flags(&c, &arena, 1);
    int *rows = fetch(arena.most_rows, EXPERTS_LAYERS);
    rows[0] = 64; // as if layer 0 had counted too few: it keeps its plan
    arena.planned[0] = 2;
    arena_grow(&arena, rows);
    CHECK(arena.planned[0] == 2 && arena.planned[1] == arena.max_chunks);
    rows[0] = rows[1];
    arena_plan(&arena, rows);
    CHECK(arena.planned[0] == arena.planned[1]);
    arena_begin_step(&arena, NULL);
    cuda_experts_run(&c, &arena);
    cuda_experts_check_flags(&c, &arena, 0);
    CHECK(cuda_experts_hash(&c) == worst);
    free(rows);
    cuda_experts_arena_free(&arena, &memory);
    cuda_experts_case_free(&c);
}

// more chunks planned than there are rows, or just one: the same bits
static void test_cuda_experts_plan(void) {
    const ExpertsShape shape = {400, 3, 24, 40, 1};
    ExpertsCase c = cuda_experts_case(shape, LOAD_SPARSE);
    Arena arena;
    DeviceMemory memory;
    cuda_experts_arena(&arena, &memory, &shape, 500, 1);
    CHECK(arena.planned[EXPERTS_LAYER] == 2);
    cuda_experts_run(&c, &arena);
    cuda_experts_check(&c);
    uint64_t first = cuda_experts_hash(&c);
    for (int chunks = 2; chunks >= 1; chunks--) {
        arena.planned[0] = arena.planned[1] = chunks;
        cuda_experts_run(&c, &arena);
        cuda_experts_check_flags(&c, &arena, 0);
        CHECK(cuda_experts_hash(&c) == first);
    }
    cuda_experts_arena_free(&arena, &memory);
    cuda_experts_case_free(&c);
}

// no store, nothing for a backward: the same y. A counting run finds the bytes that an allocating one takes
static void test_cuda_experts_inference(void) {
    const ExpertsShape shape = {260, 8, 16, 24, 1};
    ExpertsCase c = cuda_experts_case(shape, LOAD_MIXED);
    uint64_t hash[2];
    for (int training = 0; training < 2; training++) {
        Arena arena, counted;
        DeviceMemory memory, counting = cuda_experts_memory();
        counting.counting = 1;
        arena_init(&counted, &counting, EXPERTS_LAYERS, shape.N, shape.E, shape.k, shape.E, shape.d, shape.F,
                   100, training, test_kernels);
        arena_free(&counted);
        cuda_experts_arena(&arena, &memory, &shape, 100, training);
        CHECK(memory_total(&memory) == memory_total(&counting) && memory.bytes[SEGMENT_WORKSPACE] > 0);
        CHECK(memory.bytes[SEGMENT_PAIRS] ==
              ceil_div<int64_t>((arena.chunk_rows + (training ? 100 : 0)) * arena_row_bytes(shape.F), 256) *
                  256);
        cuda_experts_forget(&c);
        cuda_experts_forward(&c, &arena, NULL);
        check_device("experts y", c.y, c.want[EXPERTS_Y], c.size[EXPERTS_Y], tolerance(1e-5, 1e-2));
        hash[training] = device_hash(c.y, c.size[EXPERTS_Y] * (int64_t)sizeof(floatX));
        cuda_experts_arena_free(&arena, &memory);
    }
    CHECK(hash[0] == hash[1]);
    cuda_experts_case_free(&c);
}

// a fixed router has at most N k pairs: one chunk, and no sum to carry
static void test_cuda_experts_fixed(void) {
    Arena arena;
    DeviceMemory memory = cuda_experts_memory();
    memory.counting = 1;
    arena_init(&arena, &memory, 3, 1000, 8, 2, 2, 16, 24, 0, 1, test_kernels);
    CHECK(arena.max_chunks == 1 && arena.chunk_rows == 2048 + 8 * 64 && arena.planned[2] == 1);
    arena_free(&arena);
    arena_init(&arena, &memory, 1, 65536, 8, 1, 8, 16, 24, 0, 1, test_kernels);
    CHECK(arena.chunk_rows == 98304 + 512 && arena.max_chunks == 6);
    const int dense = 4 * 65536, sparse = 65536 + 256;
    arena_plan(&arena, &dense);
    CHECK(arena.planned[0] == 4);
    arena_plan(&arena, &sparse);
    CHECK(arena.planned[0] == 1);
    int recent = 0, steps = 0; // a dense step is planned for a while longer
    arena_remember(&recent, &dense, 1);
    CHECK(recent == dense);
    do {
        arena_remember(&recent, &sparse, 1);
        arena_plan(&arena, &recent);
        steps++;
    } while (arena.planned[0] > 1 && steps < 1000);
    CHECK(steps > 10 && steps < 60);
    arena_free(&arena);
}

// ----------------------------------------------------------------------------
// no synchronisation: a layer's forward and backward are captured as a graph, and played twice

static void test_cuda_experts_graph(void) {
    if (emulated()) {
        return;
    }
    const ExpertsShape shape = {400, 3, 24, 40, 1};
    ExpertsCase c = cuda_experts_case(shape, LOAD_ALL);
    Arena arena;
    DeviceMemory memory;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t playable;
    CUDA_CHECK(cudaStreamCreate(&stream));
    cuda_experts_arena(&arena, &memory, &shape, 700, 1);
    cuda_experts_run(&c, &arena);
    uint64_t first = cuda_experts_hash(&c);
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    dispatch_sort(c.pairs.dispatch, c.pairs.pairs, shape.N, shape.E, c.pairs.scratch, stream);
    cuda_experts_forward(&c, &arena, stream);
    cuda_experts_backward(&c, &arena, stream);
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&playable, graph, 0));
    for (int i = 0; i < 2; i++) {
        cuda_experts_forget(&c);
        CUDA_CHECK(cudaGraphLaunch(playable, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CHECK(cuda_experts_hash(&c) == first);
    }
    CUDA_CHECK(cudaGraphExecDestroy(playable));
    CUDA_CHECK(cudaGraphDestroy(graph));
    CUDA_CHECK(cudaStreamDestroy(stream));
    cuda_experts_arena_free(&arena, &memory);
    cuda_experts_case_free(&c);
}

static void test_cuda_experts(void) {
    test_cuda_experts_loads();
    test_cuda_experts_chunks();
    test_cuda_experts_overflow();
    test_cuda_experts_plan();
    test_cuda_experts_inference();
    test_cuda_experts_fixed();
    test_cuda_experts_graph();
}

#endif
