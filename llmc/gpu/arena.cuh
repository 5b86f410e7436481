/*
The pair arena: memory for rows whose number only the device knows, and that changes by a factor of E/2k
during a run. A ReLU router starts with about half of all experts on and ends with k of E; nobody may pay
the dense start's memory for the whole run, nor wait for a count to reach the host.

    rows of a layer         sorted by expert, offsets[E] of them (dispatch.cuh), at most W = worst_rows
    chunk c                 rows c R .. (c + 1) R - 1, the unit that kernels are launched for
    R = min(W, 3/2 N k rounded up to 64, + 64 E)     W = min(E round_up(N, 64), N k_most + 64 E)

R is a constant of the run. In the sparse stage N k rows and their pads are one chunk, with a third to
spare; in the dense stage there are several, and all buffers that a chunk needs only for a moment (Y, dX')
are still just R rows long. It must be constant because an expert whose rows two chunks share gets its
weights' gradient in two sums: the chunks' boundaries are part of the order of summation, and so of the
result.

Only H = [G | U | gate A] (row_chunk.cuh), 3F values a row, is kept from forward to backward. (Without gate A
it would be a third smaller; then grouped_down_backward, which memory holds up, would write it again, a fifth
of its bytes.) The store has room for store_rows rows of all layers together. On the device, layer after
layer, each chunk is given the next free rows; one that does not fit is placed behind the store, in scratch:
the next chunk overwrites it, and backward computes it again with the same kernel on the same rows. So the
budget decides what is computed twice, and no bit of what:

    h      | layer 0, chunk 0 | layer 0, chunk 1 | layer 1, chunk 0 | ... | any chunk that did not fit |
    rows   0                                                   cursor ->  store_rows              h_rows

The host launches planned[l] chunks of layer l, as many as the rows of the last steps and a margin ask for; a
chunk beyond offsets[E] finds no rows, and its kernels exit. If the margin was too small, *overflow is set:
the step's results are then worthless (the update must look at the flag), and the step is repeated with a
larger plan. lambda swings S about its target: with many experts k goes up and down by a half within ten
steps, so what a layer needed fades slowly; a chunk too many is cheaper than a step. A step:

    arena_plan(recent rows)                   host; arena_grow(rows) instead if the last step overflowed
    arena_begin_step                          overflow, most_rows = 0
      a micro-batch: arena_begin_micro_batch  the store is empty
        a layer: dispatch_sort, arena_place, experts_forward (experts.cuh)
    read *overflow and most_rows [L], arena_remember(recent rows, most_rows)

Errors: none at run time; memory.cuh reports what does not fit the device.
*/
#ifndef ARENA_CUH
#define ARENA_CUH

#include "llmc/gpu/cuda_common.cuh"
#include "llmc/dispatch.cuh"
#include "llmc/gpu/grouped_gemm.cuh"
#include "llmc/gpu/memory.cuh"

// rows of a layer
typedef struct {
    int64_t worst;   // W, at most
    int64_t results; // whose Y is in memory at once: a chunk's, or all
    int chunk;       // R
    int most_chunks; // for which there are places
} ArenaRows;

typedef struct {
    int L, N, E, F;       // N: tokens of the largest micro-batch
    Kernels kernels;      // of the grouped GEMMs
    int chunk_rows;       // R
    int max_chunks;       // a layer: ceil(W / R)
    int64_t worst_rows;   // W
    int64_t store_rows;   // the budget, in rows of H
    int dgate_tiles;      // partial sums of a row's gate gradient
    int64_t h_rows;       // and R rows of scratch, unless the store holds the worst case
    floatX *h;            // [h_rows, 3F]
    floatX *rows;         // [R, d] Y, in backward dX'
    float *sum;           // [N, d] the combine's, from chunk to chunk; NULL if there is never a second
    float *dgate_partial; // [R, dgate_tiles]; NULL for inference
    int64_t *first;       // [L, max_chunks] where a chunk's H begins, in rows of h
    int64_t *cursor;      // rows of the store in use
    int *overflow;        // a layer had more rows than were planned for
    int *most_rows;       // [L] most rows of a micro-batch since arena_begin_step
    int *planned;         // [L] chunks to launch; on the host
    int alone;            // this forward is not followed by a backward
} Arena;

// ----------------------------------------------------------------------------
// sizes

static inline int64_t arena_worst_rows(int N, int E, int k_most) {
    int64_t by_expert = (int64_t)E * padded_rows(N); // each expert has every token
    int64_t by_pairs = ceil_div<int64_t>((int64_t)N * k_most, ROW_ALIGN) * ROW_ALIGN + (int64_t)E * ROW_ALIGN;
    return by_expert < by_pairs ? by_expert : by_pairs;
}

static inline int64_t arena_chunk_rows(int N, int E, int k, int64_t worst) {
    int64_t usual = ceil_div<int64_t>((int64_t)N * k * 3 / 2, ROW_ALIGN) * ROW_ALIGN + (int64_t)E * ROW_ALIGN;
    return usual < worst ? usual : worst;
}

// k: active experts aimed at; k_most: at most N k_most pairs in a micro-batch (E for relu, k where the router
// fixes it)
static inline ArenaRows arena_rows(int N, int E, int k, int k_most) {
    ArenaRows rows;
    rows.worst = arena_worst_rows(N, E, k_most);
    rows.results = arena_chunk_rows(N, E, k, rows.worst);
    rows.chunk = (int)rows.results;
    rows.most_chunks = (int)ceil_div<int64_t>(rows.worst, rows.chunk);
    return rows;
}

// bytes of the store for one row: what a budget in bytes is divided by
static inline int64_t arena_row_bytes(int F) {
    return 3 * (int64_t)F * (int64_t)sizeof(floatX);
}

// ----------------------------------------------------------------------------
// the plan

// With a margin: from one step to the next a few percent more rows, and a few more pads, are usual
static inline int arena_chunks(const Arena *arena, int64_t rows) {
    int64_t expected = rows + rows * 12 / 100 + (int64_t)ROW_ALIGN * arena->E + arena->N / 16;
    int64_t bounded = expected < arena->worst_rows ? expected : arena->worst_rows;
    return (int)ceil_div<int64_t>(bounded, arena->chunk_rows); // at least 1: the combine must run
}

// recent [L] = the most rows of the last steps, of older ones less: a sixteenth a step of what was too many
static inline void arena_remember(int *recent, const int *rows, int L) {
    for (int l = 0; l < L; l++) {
        int faded = recent[l] - (recent[l] - rows[l]) / 16;
        recent[l] = rows[l] > faded ? rows[l] : faded;
    }
}

// rows [L], on the host: each layer's most rows lately; NULL: nothing is known, the worst case
static inline void arena_plan(Arena *arena, const int *rows) {
    for (int l = 0; l < arena->L; l++) {
        arena->planned[l] = rows != NULL ? arena_chunks(arena, rows[l]) : arena->max_chunks;
    }
}

// After an overflow. The layers behind the one that overflowed saw wrong inputs, so what they counted must
// not shrink their plan; the one itself counted all its rows and gets at least one chunk more. So repeating
// ends
static inline void arena_grow(Arena *arena, const int *rows) {
    for (int l = 0; l < arena->L; l++) {
        int chunks = arena_chunks(arena, rows[l]);
        arena->planned[l] = chunks > arena->planned[l] ? chunks : arena->planned[l];
    }
}

// ----------------------------------------------------------------------------
// memory

static inline void arena_take_chunk(Arena *arena, DeviceMemory *memory, int64_t results, int d,
                                    int training) {
    int64_t R = arena->chunk_rows;
    arena->rows = take<floatX>(memory, SEGMENT_WORKSPACE, results * d);
    if (arena->max_chunks > 1 && results < arena->worst_rows) {
        arena->sum = take<float>(memory, SEGMENT_WORKSPACE, (int64_t)arena->N * d);
    }
    if (training) {
        arena->dgate_partial = take<float>(memory, SEGMENT_WORKSPACE, R * arena->dgate_tiles);
    }
}

// store_rows: the budget, of no use unless training. The plan is the worst case until arena_plan
static inline void arena_open(Arena *arena, DeviceMemory *memory, ArenaRows rows, int L, int N, int E, int d,
                              int F, int64_t store_rows, int training, Kernels kernels) {
    memset(arena, 0, sizeof(*arena));
    arena->L = L;
    arena->N = N;
    arena->E = E;
    arena->F = F;
    arena->worst_rows = rows.worst;
    arena->chunk_rows = rows.chunk;
    arena->max_chunks = rows.most_chunks;
    arena->store_rows = training ? store_rows : 0;
    arena->kernels = kernels;
    arena->dgate_tiles = grouped_dgate_tiles(F, kernels);
    int stores_all = arena->store_rows >= L * arena->worst_rows;
    arena->h_rows = arena->store_rows + (stores_all ? 0 : arena->chunk_rows);
    arena->h = take<floatX>(memory, SEGMENT_PAIRS, arena->h_rows * 3 * F);
    arena_take_chunk(arena, memory, rows.results, d, training);
    arena->first = take<int64_t>(memory, SEGMENT_WORKSPACE, (int64_t)L * arena->max_chunks);
    arena->cursor = take<int64_t>(memory, SEGMENT_WORKSPACE, 1);
    arena->overflow = take<int>(memory, SEGMENT_WORKSPACE, 1);
    arena->most_rows = take<int>(memory, SEGMENT_WORKSPACE, L);
    arena->planned = NEW(int, L);
    arena_plan(arena, NULL);
}

static inline void arena_init(Arena *arena, DeviceMemory *memory, int L, int N, int E, int k, int k_most,
                              int d, int F, int64_t store_rows, int training, Kernels kernels) {
    arena_open(arena, memory, arena_rows(N, E, k, k_most), L, N, E, d, F, store_rows, training, kernels);
}

// the device's part belongs to the DeviceMemory
static inline void arena_free(Arena *arena) {
    free(arena->planned);
    memset(arena, 0, sizeof(*arena));
}

// ----------------------------------------------------------------------------
// placement

static inline void arena_begin_step(Arena *arena, cudaStream_t stream) {
    CUDA_CHECK(cudaMemsetAsync(arena->overflow, 0, sizeof(int), stream));
    CUDA_CHECK(cudaMemsetAsync(arena->most_rows, 0, (size_t)arena->L * sizeof(int), stream));
}

static inline void arena_begin_micro_batch(Arena *arena, cudaStream_t stream) {
    CUDA_CHECK(cudaMemsetAsync(arena->cursor, 0, sizeof(int64_t), stream));
}

// One thread: a place depends on all before it, and there are few. Only rows that exist are given room
static __global__ void arena_place_kernel(Arena arena, int layer, const int *num_rows, int chunk_rows,
                                          int planned) {
    int64_t rows = *num_rows, used = *arena.cursor, R = chunk_rows;
    for (int c = 0; c < planned; c++) {
        int64_t here = rows - c * R < R ? rows - c * R : R;
        int stored = here > 0 && used + here <= arena.store_rows;
        arena.first[(int64_t)layer * arena.max_chunks + c] = stored ? used : arena.store_rows;
        used += stored ? here : 0;
    }
    *arena.cursor = used;
    if (rows > planned * R) {
        *arena.overflow = 1;
    }
    if (rows > arena.most_rows[layer]) {
        arena.most_rows[layer] = (int)rows;
    }
}

// num_rows: on the device; in chunks of chunk_rows, so many of which will be launched
static inline void arena_place_chunks(Arena *arena, int layer, const int *num_rows, int chunk_rows,
                                      int planned, cudaStream_t stream) {
    launch(arena_place_kernel, 1, 1, 0, stream, *arena, layer, num_rows, chunk_rows, planned);
}

// after dispatch_sort of the layer; layers in the order of the forward pass
static inline void arena_place(Arena *arena, int layer, DeviceDispatch dispatch, cudaStream_t stream) {
    arena_place_chunks(arena, layer, dispatch.offsets + arena->E, arena->chunk_rows, arena->planned[layer],
                       stream);
}

// ----------------------------------------------------------------------------
// chunks, as the grouped GEMMs take them

static inline RowChunk arena_chunk(const Arena *arena, DeviceDispatch dispatch, int c) {
    RowChunk chunk;
    chunk.offsets = dispatch.offsets;
    chunk.token_of_row = dispatch.token_of_row;
    chunk.gate_of_row = dispatch.gate_of_row;
    chunk.experts = arena->E;
    chunk.first = c * arena->chunk_rows;
    chunk.rows = arena->chunk_rows;
    chunk.kernels = arena->kernels;
    chunk.fresh = 0;
    return chunk;
}

static inline ChunkH arena_h(const Arena *arena, int layer, int c) {
    const int64_t *first = arena->first + (int64_t)layer * arena->max_chunks + c;
    ChunkH h = {arena->h, arena->h_rows, arena->store_rows, first, arena->alone};
    return h;
}

#endif
