/*
The experts of a layer that merges them: merged_forward and merged_backward of merge.h on the device.

    for each chunk of segments   merge_forward -> bank';  experts_chunk_forward on bank'
    backward, likewise           merge_forward again;     experts_chunk_backward: dbank' is set;
                                 merge_backward

Scratch does not grow with the batch: a chunk's bank' in floatX and dbank' in fp32, 18 F d bytes per segment
in bf16. What is returned is combined as experts.cuh's is: every token has one row.

R: rows of a segment. Before: router_forward. Errors: none.
*/
#ifndef MERGED_EXPERTS_CUH
#define MERGED_EXPERTS_CUH

#include "llmc/merge.cuh"
// defines: DeviceMerged, DeviceSegments, merge_*; experts_chunk_*, Arena, RowChunk, CombineChunk

// ----------------------------------------------------------------------------
// sizes

// R, of the longest segment
static inline int segment_rows(Segments s) {
    return padded_rows(s.length);
}

// of batches of at most B sequences of at most T tokens, in segments, or whole
static inline ArenaRows merged_rows(int B, int T, int length) {
    Segments s = segments_of(B, T, length, NULL);
    int C = segments_count(s);
    ArenaRows rows;
    rows.worst = rows.results = (int64_t)C * segment_rows(s);
    rows.chunk = std::max(std::min(C, (int)MERGE_CHUNK) * segment_rows(s), padded_rows(T));
    rows.most_chunks = C;
    return rows;
}

static inline void merged_take(DeviceMerged *m, DeviceMemory *memory, int layers, int B, int segments, int E,
                               int d, int F, int training) {
    int64_t down = merged_experts(layers, segments) * F * d;
    m->gate_up = take<floatX>(memory, SEGMENT_WORKSPACE, 2 * down);
    m->down = take<floatX>(memory, SEGMENT_WORKSPACE, down);
    m->contexts = take<int>(memory, SEGMENT_WORKSPACE, B);
    if (training) {
        int64_t chunk = (int64_t)std::min(segments, (int)MERGE_CHUNK) * F * d;
        m->dgate_up = take<float>(memory, SEGMENT_WORKSPACE, 2 * chunk);
        m->ddown = take<float>(memory, SEGMENT_WORKSPACE, chunk);
        m->parts = take<float>(memory, SEGMENT_WORKSPACE, (int64_t)MERGE_CHUNK * E * MERGE_BLOCKS);
    }
}

// ----------------------------------------------------------------------------
// rows

// a thread per row, and one for their end
static __global__ void __launch_bounds__(GROUP_BLOCK)
    segment_dispatch_kernel(DeviceDispatch dispatch, Segments s, int R) {
    int row = (int)(blockIdx.x * GROUP_BLOCK + threadIdx.x), C = segments_count(s);
    int c = row / R, i = row % R;
    if (row > C * R) {
        return;
    }
    if (i == 0) {
        dispatch.offsets[c] = row;
    }
    if (c < C) {
        bool exists = i < segment_size(s, c);
        int t = (int)segment_first(s, c) + i;
        dispatch.token_of_row[row] = exists ? t : -1;
        dispatch.gate_of_row[row] = exists ? 1.0f : 0.0f;
        if (exists) {
            dispatch.row_of_pair[t] = row;
        }
    }
}

// how many segments the arena's chunk of rows has room for
static inline int chunk_segments(const Arena *arena, Segments s) {
    return std::min(arena->chunk_rows / segment_rows(s), (int)MERGE_CHUNK);
}

// rows and H's places of a layer
static inline void merged_place(Arena *arena, int layer, DeviceDispatch dispatch, Segments s,
                                cudaStream_t stream) {
    int C = segments_count(s), R = segment_rows(s), per_chunk = chunk_segments(arena, s);
    launch(segment_dispatch_kernel, C * R / GROUP_BLOCK + 1, GROUP_BLOCK, 0, stream, dispatch, s, R);
    arena_place_chunks(arena, layer, dispatch.offsets + C, per_chunk * R, ceil_div(C, per_chunk), stream);
}

static inline DeviceSegments device_segments(const Arena *arena, Segments s, int number) {
    int per_chunk = chunk_segments(arena, s), first = number * per_chunk;
    DeviceSegments chunk = {s, first, std::min(segments_count(s) - first, per_chunk)};
    return chunk;
}

// its rows, whose experts are numbered from the chunk's first segment on
static inline RowChunk device_segment_rows(const Arena *arena, DeviceDispatch dispatch,
                                           DeviceSegments chunk) {
    int R = segment_rows(chunk.all);
    RowChunk rows = {dispatch.offsets + chunk.first,
                     dispatch.token_of_row,
                     dispatch.gate_of_row,
                     chunk.count,
                     chunk.first * R,
                     chunk.count * R,
                     arena->kernels,
                     1}; // fresh: dbank' has nothing of an earlier chunk's
    return rows;
}

// A layer's own place serves a prompt, whose experts stay; the first ones serve all else
static inline DeviceBank merged_bank(const DeviceMerged *m, DeviceBank bank, DeviceSegments chunk,
                                     int layer) {
    Segments s = chunk.all;
    int64_t down = (int64_t)bank.F * bank.d;
    int64_t place = segments_stay(s) ? layer : 0;
    DeviceBank to = {chunk.count, bank.d,  bank.F, m->gate_up + 2 * place * down, m->down + place * down,
                     m->dgate_up, m->ddown};
    return to;
}

// what merged_forward has left of a layer's experts for a prompt
static inline DeviceBank prompt_bank(const DeviceMerged *m, DeviceBank bank, int layer) {
    DeviceSegments one = {segments_kept(1), 0, 1};
    return merged_bank(m, bank, one, layer);
}

// ----------------------------------------------------------------------------
// forward, backward

static inline int device_segment_chunks(const Arena *arena, Segments s) {
    return ceil_div(segments_count(s), chunk_segments(arena, s));
}

// all of a layer's rows are in the arena
static inline CombineChunk merged_combine(const Arena *arena, DevicePairs pairs, DeviceDispatch dispatch) {
    int rows = segments_count(pairs.segments) * segment_rows(pairs.segments);
    CombineChunk all = {arena->rows, NULL, 0, rows, pairs, dispatch, arena->E};
    return all;
}

static inline floatX *merged_results(const Arena *arena, RowChunk rows, int d) {
    return arena->rows + (int64_t)rows.first * d;
}

// returns what sums to the experts' output
static inline CombineChunk merged_forward(const floatX *x, DeviceBank bank, const float *a, DevicePairs pairs,
                                          DeviceDispatch dispatch, const DeviceMerged *merged, Arena *arena,
                                          int layer, cudaStream_t stream) {
    Segments s = pairs.segments;
    merged_place(arena, layer, dispatch, s, stream);
    for (int i = 0; i < device_segment_chunks(arena, s); i++) {
        DeviceSegments chunk = device_segments(arena, s, i);
        RowChunk rows = device_segment_rows(arena, dispatch, chunk);
        DeviceBank to = merged_bank(merged, bank, chunk, layer);
        if (!s.kept) {
            merge_forward(to, a, bank, chunk, stream);
        }
        experts_chunk_forward(merged_results(arena, rows, bank.d), arena_h(arena, layer, i), x, to, rows,
                              stream);
    }
    return merged_combine(arena, pairs, dispatch);
}

// the bank's gradients += ..., fresh: = ...; da [C, E] is overwritten; H is spent. Returns what sums to the
// gradient of x
static inline CombineChunk merged_backward(float *da, const floatX *dy, const floatX *x, DeviceBank bank,
                                           int fresh, const float *a, DevicePairs pairs,
                                           DeviceDispatch dispatch, const DeviceMerged *merged, Arena *arena,
                                           int layer, cudaStream_t stream) {
    Segments s = pairs.segments;
    for (int i = 0; i < device_segment_chunks(arena, s); i++) {
        DeviceSegments chunk = device_segments(arena, s, i);
        RowChunk rows = device_segment_rows(arena, dispatch, chunk);
        DeviceBank to = merged_bank(merged, bank, chunk, layer);
        merge_forward(to, a, bank, chunk, stream);
        experts_chunk_backward(merged_results(arena, rows, bank.d), arena->dgate_partial,
                               arena_h(arena, layer, i), dy, x, to, rows, stream);
        merge_backward(bank, da + (int64_t)chunk.first * bank.E, a, to, chunk, merged->parts, fresh && i == 0,
                       stream);
    }
    return merged_combine(arena, pairs, dispatch);
}

#endif
