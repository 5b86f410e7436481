/*
Losses that are computed without a gradient, while the host prepares the next batch: what model_loss_begin
leaves for model_loss_end (trainer.h). A forward alone (model_look, model_score) takes the next slot.

    begin   the batch is copied to its slot and its forward queued; loss, overflow, counts and rows follow it
            to the host's memory, and an event says when they are there
    end     waits for the event. If a layer had more rows than were planned for (arena.cuh), the forward is
            queued again with a larger plan; else what it found plans the forwards that are begun next

Number i has slot i modulo MOST_LOSSES. Evaluation has a plan of its own: its batches meet a router that no
longer changes, and a plan for the worst case would launch up to E/2k chunks of pairs in vain, whose combine
moves the whole residual stream each. Errors: none here.
*/
#ifndef LOSSES_CUH
#define LOSSES_CUH

#include "llmc/embedding.cuh"
#include "llmc/gpu/memory.cuh"
#include "llmc/trainer.h"
// defines: EmbeddingPlan; take, DeviceMemory; MOST_LOSSES

// a micro-batch on the device
typedef struct {
    int *inputs, *targets;   // [N]
    int64_t first_token;     // in the step of all ranks
    EmbeddingPlan positions; // where each id stands, for the embedding's gradient
} Batch;

// what a forward alone leaves for the host; behind it counts [cells], cells = L E, then the arena's rows [L]
// (int)
typedef struct {
    double loss;
    int64_t overflow; // a layer had more rows than were planned for
} LossResult;

typedef struct {
    Batch batches[MOST_LOSSES];
    int B[MOST_LOSSES], T[MOST_LOSSES];
    double *sums;           // [MOST_LOSSES] on the device
    int *staging;           // [MOST_LOSSES][2, N] inputs and targets on the host, pinned
    unsigned char *results; // [MOST_LOSSES][result_bytes] likewise
    size_t result_bytes;
    cudaEvent_t done[MOST_LOSSES];
    int *recent_rows, *planned; // [L] as a training step's, of the arena
    int64_t begun, ended;
} Losses;

static inline LossResult *loss_result(const Losses *losses, int slot) {
    return (LossResult *)(losses->results + (size_t)slot * losses->result_bytes);
}

// N: tokens of the largest batch
static inline void losses_allocate(Losses *losses, DeviceMemory *memory, int64_t N) {
    losses->sums = take<double>(memory, SEGMENT_WORKSPACE, MOST_LOSSES);
    for (int i = 0; i < MOST_LOSSES; i++) {
        losses->batches[i].inputs = take<int>(memory, SEGMENT_WORKSPACE, N);
        losses->batches[i].targets = take<int>(memory, SEGMENT_WORKSPACE, N);
    }
}

// the host's part, after losses_allocate. plan [L]: of the first losses, the worst case
static inline void losses_open(Losses *losses, int64_t N, int L, int64_t cells, const int *plan) {
    losses->result_bytes = sizeof(LossResult) + (size_t)ceil_div<int64_t>(cells + L, 2) * 2 * sizeof(int);
    CUDA_CHECK(cudaMallocHost(&losses->staging, (size_t)(MOST_LOSSES * 2 * N) * sizeof(int)));
    CUDA_CHECK(cudaMallocHost(&losses->results, MOST_LOSSES * losses->result_bytes));
    losses->recent_rows = NEW(int, L);
    losses->planned = NEW(int, L);
    memcpy(losses->planned, plan, (size_t)L * sizeof(int));
    for (int i = 0; i < MOST_LOSSES; i++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&losses->done[i], cudaEventDisableTiming));
    }
}

static inline void losses_close(Losses *losses) {
    for (int i = 0; i < MOST_LOSSES; i++) {
        CUDA_CHECK(cudaEventDestroy(losses->done[i]));
    }
    CUDA_CHECK(cudaFreeHost(losses->staging));
    CUDA_CHECK(cudaFreeHost(losses->results));
    free(losses->recent_rows);
    free(losses->planned);
}

#endif
