/*
emulator: runs remoe.c's CUDA sources on a CPU, for machines without a GPU and for debuggers.

It stands in the include path where NVIDIA's cuda_runtime.h would be; llmc/gpu/cuda_common.cuh's launch() calls
emulator::run(), and memory is the host's. A block's threads are fibers on one stack each: they take turns, one
going on until it meets a barrier or a warp's exchange (__syncthreads, __syncwarp, __shfl_*, __ballot_sync,
mma), and blocks are shared out over OpenMP threads. So a kernel computes here what it computes on a GPU as
far as indices, masks, missing writes and barriers that not all reach are concerned; speed it cannot show, nor what
PTX does. A thousand times slower than a GPU.

With -fsanitize=thread (make test-races) ThreadSanitizer takes each fiber for a thread, ordered by __syncthreads and
__syncwarp alone: a barrier that is missing between two threads' accesses is reported, whether it spoils numbers
or not. Copies, wgmma and TMA are not followed.

hopper_instructions.h beside has Hopper's asynchronous instructions. Their work is done as late as their barriers
and waits allow, so a wait that is missing, or a buffer that is given back too early, gives wrong numbers.

Streams are early (work is done when it is queued) or late (streams.h), processes can be several with a "GPU" each
(device_memory.h, nccl.h, agree.h); the environment says so:
    EMULATED_GPUS=n           devices, 1 .. 64 (1); with more than one, device memory can be opened by other processes
    EMULATED_PEERS=0          no device can reach another's memory
    EMULATED_STREAMS=late     or early; or ahead, or a number: late, but some of it sooner (streams.h)
    EMULATED_WAIT_SECONDS=n   how long a stream waits for another process before its own is ended (120)

Assumes converged warps and full masks at exchanges. Shared memory and device buffers start as NaN patterns.
*/
#ifndef EMULATOR_CUDA_RUNTIME_H
#define EMULATOR_CUDA_RUNTIME_H

#include <algorithm>
#include <deque>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __constant__ static const
#define __grid_constant__
#define __align__(n) alignas(n)
#define __cluster_dims__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL 1

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
static inline float2 make_float2(float x, float y) {
    return {x, y};
}
// ----------------------------------------------------------------------------
// fibers

// saves the running fiber's registers on its stack and its stack pointer in *from; goes on where `to` stands
extern "C" void emulator_switch(void **from, void *to);
#if defined(__x86_64__)
asm(".text\n.globl emulator_switch\nemulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
enum { EMULATOR_SAVED_WORDS = 6 };
#else
#error "the emulator knows x86-64 only: port emulator_switch() and first_frame()"
#endif

// ----------------------------------------------------------------------------
// ThreadSanitizer, in a build with -fsanitize=thread: each fiber is a thread to it, ordered by barriers alone

#ifdef __SANITIZE_THREAD__
extern "C" {
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *address);
void __tsan_release(void *address);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
}
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define EMULATOR_UNSEEN
static inline void *__tsan_get_current_fiber(void) {
    return NULL;
}
static inline void *__tsan_create_fiber(unsigned) {
    return NULL;
}
static inline void __tsan_switch_to_fiber(void *, unsigned) {
}
static inline void __tsan_acquire(void *) {
}
static inline void __tsan_release(void *) {
}
static inline void AnnotateIgnoreReadsBegin(const char *, int) {
}
static inline void AnnotateIgnoreReadsEnd(const char *, int) {
}
static inline void AnnotateIgnoreWritesBegin(const char *, int) {
}
static inline void AnnotateIgnoreWritesEnd(const char *, int) {
}
#endif

namespace emulator {

// what the emulator itself does with its memory is no race
struct Unseen {
    Unseen() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
};

enum { STACK_BYTES = 128 * 1024, SLOT_BYTES = 64, MOST_THREADS = 1024 };

struct Warp {
    int alive, arrived;
    unsigned generation;
    alignas(
        16) unsigned char slots[2][32 *
                                   SLOT_BYTES]; // what lanes show: two sets in turn, so one barrier is enough
};

struct Async; // a block's asynchronous instructions: hopper_instructions.h

struct Block {
    void *scheduler; // stack pointers of what does not run
    void *fibers[MOST_THREADS];
    void *seen_scheduler, *seen_fibers[MOST_THREADS]; // ThreadSanitizer's
    unsigned char *stacks;
    uint3 thread_index[MOST_THREADS];
    bool done[MOST_THREADS]; // left the kernel
    Warp warps[MOST_THREADS / 32];
    int alive, arrived;
    unsigned generation;
    bool progress, backwards;
    int current; // thread that runs now
    uint3 block_index;
    dim3 block_size, grid_size;
    std::vector<unsigned char> shared;
    void (*body)(void *);
    void *argument;
    // Of two blocks that follow each other the second begins when the first asks for it, as a cluster of two
    Block *partner;
    int rank;
    bool wants_partner;
    Async *async;              // once there are any
    bool (*do_async)(Block *); // does what is under way; whether there was any
    void (*end_async)(Block *);
    Block() : stacks(NULL), async(NULL), do_async(NULL), end_async(NULL) {
    }
};

static inline Block *&block() {
    static thread_local Block *current = NULL;
    return current;
}

// the address of a thread_local must not be kept across a switch of fibers, so it is asked for each time
static __attribute__((noinline)) Block *here() {
    asm volatile("");
    return block();
}

// emulator_switch, which ThreadSanitizer is told of
static EMULATOR_UNSEEN __attribute__((noinline)) void go_on(void **from, void *to, void *seen) {
    const unsigned unordered = 1;
    __tsan_switch_to_fiber(seen, unordered);
    emulator_switch(from, to);
}

static EMULATOR_UNSEEN void yield() {
    Block *b = here();
    go_on(&b->fibers[b->current], b->scheduler, b->seen_scheduler);
}

// an address that stands for a barrier's phase: who comes through has seen what those did who came before the barrier
static inline void *phase(unsigned *generation, unsigned number) {
    return (char *)generation + number % 2;
}

// waits until all `alive` have come; `orders`: memory, too
static inline void barrier(int *arrived, const int *alive, unsigned *generation, bool orders = true) {
    Unseen unseen;
    Block *b = here();
    unsigned mine = *generation;
    if (orders) {
        __tsan_release(phase(generation, mine));
    }
    (*arrived)++;
    if (*arrived == *alive) {
        *arrived = 0;
        (*generation)++;
    }
    while (*(volatile unsigned *)generation == mine) {
        yield();
    }
    if (orders) {
        __tsan_acquire(phase(generation, mine));
    }
    b->progress = true;
}

static inline Warp *warp() {
    Block *b = here();
    return &b->warps[b->current / 32];
}

static inline void sync_warp(bool orders = true) {
    Warp *w = warp();
    barrier(&w->arrived, &w->alive, &w->generation, orders);
}

// every lane shows a value to its warp; returns all of them, by lane
template <class T> static inline const T *show(const T &value) {
    static_assert(sizeof(T) <= SLOT_BYTES, "too large for a slot");
    Unseen unseen;
    Warp *w = warp();
    T *slots = (T *)w->slots[w->generation % 2];
    memcpy(&slots[here()->current % 32], &value, sizeof(T));
    sync_warp(false);
    return slots;
}

static inline unsigned char *shared_memory_of(Block *b) {
    return (unsigned char *)(((uintptr_t)b->shared.data() + 1023) / 1024 * 1024);
}

static inline unsigned char *shared_memory() {
    return shared_memory_of(here());
}

static inline void finish_thread() {
    Unseen unseen;
    Block *b = here();
    Warp *w = warp();
    __tsan_release(phase(&b->generation, b->generation));
    __tsan_release(phase(&w->generation, w->generation));
    __tsan_release(b->done);
    b->done[b->current] = true;
    b->progress = true;
    b->alive--;
    w->alive--;
    if (b->alive > 0 && b->arrived == b->alive) {
        b->arrived = 0;
        b->generation++;
    }
    if (w->alive > 0 && w->arrived == w->alive) {
        w->arrived = 0;
        w->generation++;
    }
}

static EMULATOR_UNSEEN void fiber_main() {
    Block *b = here();
    __tsan_acquire(b);
    b->body(b->argument);
    finish_thread();
    yield(); // for good
}

// a stack on which emulator_switch() finds saved registers and, as its return address, fiber_main
static inline void *first_frame(unsigned char *stack) {
    uintptr_t top = ((uintptr_t)stack + STACK_BYTES) / 16 * 16;
    void **frame = (void **)top - EMULATOR_SAVED_WORDS - 2; // as if fiber_main had been called: 8 mod 16
    memset(frame, 0, (EMULATOR_SAVED_WORDS + 2) * sizeof(void *));
    frame[EMULATOR_SAVED_WORDS] = (void *)fiber_main;
    return frame;
}

static inline int threads_of(const Block *b) {
    return (int)(b->block_size.x * b->block_size.y * b->block_size.z);
}

static inline void begin_block(Block *b, int64_t index) {
    int threads = threads_of(b);
    dim3 grid = b->grid_size;
    __tsan_release(b);
    b->seen_scheduler = __tsan_get_current_fiber();
    b->block_index = {(unsigned)(index % grid.x), (unsigned)(index / grid.x % grid.y),
                      (unsigned)(index / grid.x / grid.y)};
    if (b->end_async != NULL) {
        b->end_async(b); // the block's before
    }
    memset(b->shared.data(), 0xff, b->shared.size());
    b->partner = NULL;
    b->wants_partner = false;
    b->backwards = false;
    b->alive = threads;
    b->arrived = 0;
    b->generation = 0;
    for (int w = 0; w < (threads + 31) / 32; w++) {
        b->warps[w].alive = std::min(32, threads - 32 * w);
        b->warps[w].arrived = 0;
        b->warps[w].generation = 0;
    }
    for (int t = 0; t < threads; t++) {
        unsigned x = b->block_size.x, y = b->block_size.y;
        b->thread_index[t] = {(unsigned)t % x, (unsigned)t / x % y, (unsigned)t / (x * y)};
        b->done[t] = false;
        b->fibers[t] = first_frame(b->stacks + (size_t)t * STACK_BYTES);
    }
}

// every thread's turn, forwards and backwards by turns, so that no order is relied on; whether anything came of it
static inline bool take_turns(Block *b) {
    int threads = threads_of(b);
    block() = b;
    b->progress = false;
    b->backwards = !b->backwards;
    for (int i = 0; i < threads; i++) {
        int t = b->backwards ? threads - 1 - i : i;
        if (!b->done[t]) {
            b->current = t;
            go_on(&b->scheduler, b->fibers[t], b->seen_fibers[t]);
        }
    }
    bool done = b->do_async != NULL && b->do_async(b);
    return b->progress || done;
}

// block `index`, and `second`, unless NULL, as its partner if it wants one; whether it did
static inline bool run_block(Block *first, Block *second, int64_t index) {
    begin_block(first, index);
    while (first->alive > 0 || (first->partner != NULL && second->alive > 0)) {
        bool progress = take_turns(first);
        if (first->wants_partner && first->partner == NULL && second != NULL) {
            begin_block(second, index + 1);
            first->partner = second;
            second->partner = first;
            progress = true;
        }
        progress |= first->partner != NULL && take_turns(second);
        if (!progress) {
            fprintf(stderr, "emulator: block (%u, %u, %u) waits at a barrier that some threads never reach\n",
                    first->block_index.x, first->block_index.y, first->block_index.z);
            abort();
        }
    }
    __tsan_acquire(first->done);
    if (first->partner != NULL) {
        __tsan_acquire(second->done);
    }
    return first->partner != NULL;
}

// ThreadSanitizer's fiber of a block's thread; blocks after each other share them
static inline void *seen_fiber(int rank, int t) {
    static thread_local void *fibers[2][MOST_THREADS];
    if (fibers[rank][t] == NULL) {
        fibers[rank][t] = __tsan_create_fiber(0);
    }
    return fibers[rank][t];
}

// Stacks of a block's threads, which launches after each other share: untouched memory is slow to get
static inline unsigned char *stacks_of(int rank, int threads) {
    static thread_local unsigned char *stacks[2];
    static thread_local int most[2];
    if (threads > most[rank]) {
        free(stacks[rank]);
        stacks[rank] = (unsigned char *)malloc((size_t)threads * STACK_BYTES);
        most[rank] = threads;
    }
    return stacks[rank];
}

static inline Block *new_block(dim3 grid, dim3 size, size_t shared_bytes, int rank) {
    Block *b = new Block;
    b->block_size = size;
    b->grid_size = grid;
    b->rank = rank;
    for (int t = 0; t < threads_of(b); t++) {
        b->seen_fibers[t] = seen_fiber(rank, t);
    }
    b->stacks = stacks_of(rank, threads_of(b));
    b->shared.resize(shared_bytes + 1024);
    return b;
}

static inline void delete_block(Block *b) {
    if (b->end_async != NULL) {
        b->end_async(b);
    }
    delete b;
}

template <class F> static void call_body(void *f) {
    (*(F *)f)();
}

template <class F> static void run(dim3 grid, dim3 block_size, size_t shared_bytes, F body) {
    int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
    int threads = (int)(block_size.x * block_size.y * block_size.z);
    if (threads < 1 || threads > MOST_THREADS || shared_bytes > 227 * 1024) {
        fprintf(stderr, "emulator: impossible launch: %d threads, %zu bytes of shared memory\n", threads,
                shared_bytes);
        abort();
    }
#pragma omp parallel
    {
        Unseen unseen;
        Block *mine[2];
        for (int rank = 0; rank < 2; rank++) {
            mine[rank] = new_block(grid, block_size, shared_bytes, rank);
            mine[rank]->body = call_body<F>;
            mine[rank]->argument = &body;
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks; i += 2) {
            bool two = i + 1 < blocks;
            if (!run_block(mine[0], two ? mine[1] : NULL, i) && two) {
                run_block(mine[1], NULL, i + 1);
            }
        }
        block() = NULL;
        delete_block(mine[0]);
        delete_block(mine[1]);
    }
}

} // namespace emulator

#define threadIdx (emulator::here()->thread_index[emulator::here()->current])
#define blockIdx (emulator::here()->block_index)
#define blockDim (emulator::here()->block_size)
#define gridDim (emulator::here()->grid_size)

// ----------------------------------------------------------------------------
// device functions

static inline void __syncthreads() {
    emulator::Block *b = emulator::here();
    emulator::barrier(&b->arrived, &b->alive, &b->generation);
}

static inline void __syncwarp(unsigned = 0xffffffffu) {
    emulator::sync_warp();
}

static inline int emulator_lane() {
    return emulator::here()->current % 32;
}

template <class T> static inline T __shfl_sync(unsigned, T x, int lane, int width = 32) {
    int base = emulator_lane() / width * width;
    return emulator::show(x)[base + (lane & (width - 1))];
}

template <class T> static inline T __shfl_xor_sync(unsigned, T x, int mask, int width = 32) {
    int from = emulator_lane() ^ mask;
    int same = from / width == emulator_lane() / width;
    return emulator::show(x)[same ? from : emulator_lane()];
}

template <class T> static inline T __shfl_up_sync(unsigned, T x, unsigned delta, int width = 32) {
    int from = emulator_lane() - (int)delta;
    return emulator::show(x)[emulator_lane() % width >= (int)delta ? from : emulator_lane()];
}

static inline unsigned __ballot_sync(unsigned, int predicate) {
    emulator::Block *b = emulator::here();
    int first = b->current / 32 * 32;
    bool gone[32]; // before the exchange: lanes may leave after it, before this one reads
    for (int lane = 0; lane < 32; lane++) {
        gone[lane] = first + lane >= emulator::threads_of(b) || b->done[first + lane];
    }
    const int *all = emulator::show(predicate);
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; lane++) {
        ballot |= (unsigned)(!gone[lane] && all[lane] != 0) << lane;
    }
    return ballot;
}

static inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

static inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, !predicate) == 0;
}

static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
#define __expf(x) expf(x) // the C library has a function of this name
static inline float __fdividef(float x, float y) {
    return x / y;
}
static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline int min(int a, int b) {
    return a < b ? a : b;
}
static inline int max(int a, int b) {
    return a > b ? a : b;
}
static inline int64_t min(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max(int64_t a, int64_t b) {
    return a > b ? a : b;
}
template <class T> static inline T atomicAdd(T *p, T x) {
    static_assert(!std::is_floating_point<T>::value, "float atomics have no fixed order");
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
// blocks are ordered by their atomics, which order all memory here
static inline void __threadfence() {
}
template <class T> static inline T atomicOr(T *p, T x) {
    return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST);
}

#include "cuda_runtime_api.h" // the runtime's functions: memory, streams, events

#endif
