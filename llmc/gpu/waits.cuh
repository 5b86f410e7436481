/*
How long a step's compute stream stood still for other ranks: the exposed communication of each step, for the
log.

    waits_begin(w, stream)      the stream is about to wait for what another rank sends
    waits_end(w, stream)        it goes on
    waits_ms(w)                 the sum of all pairs since the last call; the stream is to be done

Two events a wait, of a pool that grows to a step's number of waits (some 40, at L = 12): recorded by the
stream, and read only after the host has waited for the step, so that nothing waits for them (a few
microseconds a step). A wait that has nothing to wait for costs those microseconds, too: that is the figure's
floor. Errors: none of its own.
*/
#ifndef WAITS_CUH
#define WAITS_CUH

#include "llmc/gpu/cuda_common.cuh"

typedef struct {
    cudaEvent_t *events; // [capacity] beginnings and ends in turn
    int count, capacity;
} Waits;

static inline void waits_record(Waits *w, cudaStream_t stream) {
    if (w->count == w->capacity) {
        w->capacity = 2 * w->capacity + 64;
        w->events = GROW(cudaEvent_t, w->events, w->capacity);
        for (int i = w->count; i < w->capacity; i++) {
            CUDA_CHECK(cudaEventCreate(&w->events[i]));
        }
    }
    CUDA_CHECK(cudaEventRecord(w->events[w->count++], stream));
}

static inline void waits_begin(Waits *w, cudaStream_t stream) {
    waits_record(w, stream);
}

static inline void waits_end(Waits *w, cudaStream_t stream) {
    waits_record(w, stream);
}

static inline double waits_ms(Waits *w) {
    double sum = 0.0;
    for (int i = 0; i + 1 < w->count; i += 2) {
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, w->events[i], w->events[i + 1]));
        sum += ms;
    }
    w->count = 0;
    return sum;
}

static inline void waits_close(Waits *w) {
    for (int i = 0; i < w->capacity; i++) {
        CUDA_CHECK(cudaEventDestroy(w->events[i]));
    }
    free(w->events);
}

#endif
