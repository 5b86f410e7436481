/*
The device's memory: every buffer is taken here, under the heading it is accounted for.

take() counts and allocates; in a counting run (memory->counting) it only counts and returns NULL, so that the
same code that allocates a model also says beforehand how large it would be, and how large a micro-batch would
fit. Errors: out of memory ends the program with what was asked for.
*/
#ifndef MEMORY_CUH
#define MEMORY_CUH

#include "llmc/gpu/cuda_common.cuh"

typedef enum {
    SEGMENT_WEIGHTS,     // floatX working copy
    SEGMENT_MASTERS,     // fp32 weights
    SEGMENT_MOMENTS,     // AdamW's two, fp32
    SEGMENT_GRADIENTS,   // fp32
    SEGMENT_ACTIVATIONS, // what forward leaves for backward, a layer; routing
    SEGMENT_PAIRS,       // H: the pair arena's store and scratch
    SEGMENT_WORKSPACE,   // scratch that all layers share; cuBLASLt's
    SEGMENT_EXCHANGE,    // what other GPUs write into
    SEGMENT_COUNT
} MemorySegment;

enum { MEMORY_ALIGN = 256, MEMORY_MOST_BUFFERS = 65536 };
// of what other processes open: the driver hands out memory in pieces of 2 MB, and opens whole pieces
enum { MEMORY_SHARED_ALIGN = 2 << 20 };

typedef struct {
    int counting;
    int64_t bytes[SEGMENT_COUNT];
    void **buffers; // all that were taken, to be given back
    int count;
} DeviceMemory;

static inline const char *segment_name(int segment) {
    static const char *const names[SEGMENT_COUNT] = {"weights",     "masters", "moments",   "gradients",
                                                     "activations", "pairs",   "workspace", "exchange"};
    return names[segment];
}

static inline int64_t memory_total(const DeviceMemory *memory) {
    int64_t total = 0;
    for (int segment = 0; segment < SEGMENT_COUNT; segment++) {
        total += memory->bytes[segment];
    }
    return total;
}

// n elements, not cleared
template <class T>
static T *take(DeviceMemory *memory, MemorySegment segment, int64_t n, int64_t align = MEMORY_ALIGN) {
    int64_t bytes = ceil_div<int64_t>(n * (int64_t)sizeof(T), align) * align;
    void *buffer = NULL;
    memory->bytes[segment] += bytes;
    if (memory->counting || bytes == 0) {
        return NULL;
    }
    cudaError_t error = cudaMalloc(&buffer, (size_t)bytes);
    if (error != cudaSuccess) {
        die("the device cannot allocate %.2f GB of %s after %.2f GB: %s\n  ---> use a smaller --batch or "
            "--pair-budget, or stop what else runs on the device",
            1e-9 * (double)bytes, segment_name(segment), 1e-9 * (double)(memory_total(memory) - bytes),
            cudaGetErrorString(error));
    }
    if (memory->buffers == NULL) {
        memory->buffers = NEW(void *, MEMORY_MOST_BUFFERS);
    }
    if (memory->count == MEMORY_MOST_BUFFERS) {
        die("more than %d device buffers\n  ---> use fewer layers", MEMORY_MOST_BUFFERS);
    }
    memory->buffers[memory->count++] = buffer;
    return (T *)buffer;
}

static inline void memory_release(DeviceMemory *memory) {
    for (int i = 0; i < memory->count; i++) {
        CUDA_CHECK(cudaFree(memory->buffers[i]));
    }
    free(memory->buffers);
    memset(memory, 0, sizeof(*memory));
}

#endif
