/*
A text that is continued on the device: what its steps share, and the order in which the host queues and
takes tokens.

    read    the prompt's forward fills the cache; token 0 is drawn from the logits of its last position
    step i  token i - 1 is read at its position: layers, head, sampler -> token i

All that changes from step to step (position, token, draw) is in device memory, so each step is the same
launches: a CUDA graph, captured once. The sampler writes tokens into a ring in the host's memory. The host
queues up to TEXT_AHEAD steps before it waits for a token, so that the device goes on while a token is
printed. Steps behind the last token that is wanted are computed in vain, and forgotten by the next read.

    queued   steps that the device has been given         ring, done [TEXT_RING]: step i's in slot i modulo it
    taken    tokens that the host has seen

Errors: none here.
*/
#ifndef TEXT_CUH
#define TEXT_CUH

#include "llmc/config.h"
#include "llmc/gpu/decode_attention.cuh"
#include "llmc/gpu/decode_router.cuh"
#include "llmc/gpu/memory.cuh"
#include "llmc/gpu/sampler.cuh"
// defines: Config; decode_attention_floats; DevicePairs, mask_words; take, DeviceMemory; TextState, TEXT_RING

enum { TEXT_AHEAD = 4 };
static_assert(TEXT_AHEAD + 2 <= TEXT_RING, "no slot is written before its token was taken");

typedef struct {
    TextState *state;
    floatX *x, *att, *mid, *normed; // [d]
    floatX *h;                      // [E, F] of the active experts
    float *partial;                 // of attention's pieces
    int *tickets;                   // [H + 1] of the heads, of the router
    float *router_logits;           // [E]
    uint32_t *mask;                 // [W]
    DevicePairs pairs;              // of one token
    float *logits, *values;         // [V]
    int *ids;                       // [V] that logits and values are of, once they are candidates
    int *ring;                      // [TEXT_RING] on the host, pinned
    cudaEvent_t done[TEXT_RING];
    cudaGraphExec_t graph; // a step's launches; NULL: not captured
    RouterMethod method;   // that it was captured with, as k
    int k;
    int64_t queued, taken, most;
} Text;

static inline void text_allocate(Text *t, const Config *c, DeviceMemory *memory) {
    int64_t d = c->hidden, E = c->router.experts, V = c->vocab_size;
    t->state = take<TextState>(memory, SEGMENT_WORKSPACE, 1);
    t->x = take<floatX>(memory, SEGMENT_WORKSPACE, d);
    t->att = take<floatX>(memory, SEGMENT_WORKSPACE, d);
    t->mid = take<floatX>(memory, SEGMENT_WORKSPACE, d);
    t->normed = take<floatX>(memory, SEGMENT_WORKSPACE, d);
    t->h = take<floatX>(memory, SEGMENT_WORKSPACE, E * c->ffn);
    t->partial = take<float>(memory, SEGMENT_WORKSPACE, decode_attention_floats(c->heads, c->head_size));
    t->tickets = take<int>(memory, SEGMENT_WORKSPACE, c->heads + 1);
    t->router_logits = take<float>(memory, SEGMENT_WORKSPACE, E);
    t->mask = take<uint32_t>(memory, SEGMENT_WORKSPACE, mask_words((int)E));
    t->pairs.row_start = take<int>(memory, SEGMENT_WORKSPACE, 2);
    t->pairs.expert = take<int>(memory, SEGMENT_WORKSPACE, E);
    t->pairs.gate = take<float>(memory, SEGMENT_WORKSPACE, E);
    t->pairs.rounds = take<RouterRound>(memory, SEGMENT_WORKSPACE, E);
    t->logits = take<float>(memory, SEGMENT_WORKSPACE, V);
    t->values = take<float>(memory, SEGMENT_WORKSPACE, V);
    t->ids = take<int>(memory, SEGMENT_WORKSPACE, V);
}

// after text_allocate
static inline void text_open(Text *t, const Config *c, cudaStream_t stream) {
    CUDA_CHECK(cudaMemsetAsync(t->tickets, 0, (size_t)(c->heads + 1) * sizeof(int), stream));
    CUDA_CHECK(cudaMallocHost(&t->ring, TEXT_RING * sizeof(int)));
    for (int i = 0; i < TEXT_RING; i++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&t->done[i], cudaEventDisableTiming));
    }
}

static inline void text_forget_graph(Text *t) {
    if (t->graph != NULL) {
        CUDA_CHECK(cudaGraphExecDestroy(t->graph));
        t->graph = NULL;
    }
}

static inline void text_close(Text *t) {
    text_forget_graph(t);
    for (int i = 0; i < TEXT_RING; i++) {
        CUDA_CHECK(cudaEventDestroy(t->done[i]));
    }
    CUDA_CHECK(cudaFreeHost(t->ring));
}

// whether another step should be queued before the host waits for a token
static inline int text_wants_step(const Text *t) {
    return t->queued < t->most && t->queued <= t->taken + TEXT_AHEAD;
}

// `launches` is what a step consists of, with a method and k
template <class Launches>
static void text_queue_step(Text *t, RouterMethod method, int k, cudaStream_t stream,
                            const Launches &launches) {
    if (emulated()) { // without graphs
        launches();
        return;
    }
    if (t->graph == NULL || t->method != method || t->k != k) {
        cudaGraph_t graph;
        text_forget_graph(t);
        CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        launches();
        CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
        CUDA_CHECK(cudaGraphInstantiate(&t->graph, graph, 0));
        CUDA_CHECK(cudaGraphDestroy(graph));
        t->method = method;
        t->k = k;
    }
    CUDA_CHECK(cudaGraphLaunch(t->graph, stream));
}

// the step's token is on its way
static inline void text_queued(Text *t, cudaStream_t stream) {
    CUDA_CHECK(cudaEventRecord(t->done[t->queued % TEXT_RING], stream));
    t->queued++;
}

// waits for the next token
static inline int text_take(Text *t) {
    int slot = (int)(t->taken++ % TEXT_RING);
    CUDA_CHECK(cudaEventSynchronize(t->done[slot]));
    return *(volatile int *)(t->ring + slot);
}

#endif
