/*
The emulator's streams and ranks (dev/emulator), in emulated builds alone: what is late, what forces it, whether a
missing event shows; values, memory and NCCL's calls between processes; and that calls that do not match are named.

Exact: small integers.
*/
#ifndef TEST_CUDA_STREAMS_CUH
#define TEST_CUDA_STREAMS_CUH

#include "harness.cuh"

#ifndef EMULATED
static void test_cuda_streams(void) {
    skip_case("the emulator's");
    CHECK(1);
}
#else
#include <atomic>
#include <cuda.h>
#include <nccl.h>
#include <sys/mman.h>

static const char *const stream_modes[] = {"early", "late", "ahead", "1", "2"};
enum { STREAM_MODES = 5, STREAM_N = 100 };

__global__ static void streams_fill(int *x, int value) {
    if (threadIdx.x < STREAM_N) {
        x[threadIdx.x] = value;
    }
}

__global__ static void streams_add(int *out, const int *x) {
    if (threadIdx.x < STREAM_N) {
        out[threadIdx.x] += x[threadIdx.x];
    }
}

static void fill_on(cudaStream_t stream, int *x, int value) {
    launch(streams_fill, 1, 128, 0, stream, x, value);
}

// all of x, if it is one value (else -1), after what the stream has to do
static int value_on(cudaStream_t stream, const int *x) {
    int host[STREAM_N];
    CUDA_CHECK(cudaMemcpyAsync(host, x, sizeof(host), cudaMemcpyDeviceToHost, stream));
    for (int i = 1; i < STREAM_N; i++) {
        if (host[i] != host[0]) {
            return -1;
        }
    }
    return host[0];
}

// ----------------------------------------------------------------------------
// one process

typedef struct {
    cudaStream_t a, b;
    cudaEvent_t event;
    int *x, *y;
} StreamsCase;

static StreamsCase streams_case(const char *mode) {
    StreamsCase c;
    emulator::set_streams(mode);
    CUDA_CHECK(cudaStreamCreateWithFlags(&c.a, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithPriority(&c.b, cudaStreamNonBlocking, -1));
    CUDA_CHECK(cudaEventCreateWithFlags(&c.event, cudaEventDisableTiming));
    c.x = device_new<int>(STREAM_N);
    c.y = device_new<int>(STREAM_N);
    fill_on(NULL, c.x, 0);
    fill_on(NULL, c.y, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    return c;
}

static void streams_release(StreamsCase *c) {
    device_release(c->x);
    device_release(c->y);
    CUDA_CHECK(cudaEventDestroy(c->event));
    CUDA_CHECK(cudaStreamDestroy(c->a));
    CUDA_CHECK(cudaStreamDestroy(c->b));
    emulator::set_streams(NULL);
}

// y on stream b, of x that stream a fills with 7; wait_for_a: the host does, before it looks at stream b
static int value_across(const char *mode, bool with_event, bool wait_for_a) {
    StreamsCase c = streams_case(mode);
    fill_on(c.a, c.x, 7);
    if (with_event) {
        CUDA_CHECK(cudaEventRecord(c.event, c.a));
        CUDA_CHECK(cudaStreamWaitEvent(c.b, c.event));
    }
    launch(streams_add, 1, 128, 0, c.b, c.y, c.x);
    if (wait_for_a) {
        CUDA_CHECK(cudaStreamSynchronize(c.a));
    }
    int value = value_on(c.b, c.y);
    streams_release(&c);
    return value;
}

static void streams_missing_event(void) {
    for (const char *mode : stream_modes) {
        CHECK(value_across(mode, true, false) == 7);
    }
    CHECK(value_across("early", false, false) == 7);
    CHECK(value_across("late", false, false) == 0);
    CHECK(value_across("late", false, true) == 7); // which only this finds:
    CHECK(value_across("ahead", false, true) == 0);
}

// a wait is for the record before it, not for a later one, and none for an event without any
static void streams_event_is_bound(void) {
    StreamsCase c = streams_case("late");
    CUDA_CHECK(cudaStreamWaitEvent(c.b, c.event, 0));
    CHECK(value_on(c.b, c.x) == 0);
    fill_on(c.a, c.x, 1);
    CUDA_CHECK(cudaEventRecord(c.event, c.a));
    CUDA_CHECK(cudaStreamWaitEvent(c.b, c.event, 0));
    fill_on(c.a, c.x, 2);
    CUDA_CHECK(cudaEventRecord(c.event, c.a));
    CHECK(value_on(c.b, c.x) == 1);
    CUDA_CHECK(cudaEventSynchronize(c.event));
    CHECK(value_on(c.b, c.x) == 2);
    CHECK(cudaStreamQuery(c.a) == cudaSuccess);
    streams_release(&c);
}

// who asks again and again is told in the end; times are those of the work
static void streams_queries(void) {
    StreamsCase c = streams_case("late");
    cudaEvent_t begin, end;
    float ms = -1.0f;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CHECK(cudaEventQuery(end) == cudaSuccess);
    CUDA_CHECK(cudaEventRecord(begin, c.a));
    fill_on(c.a, c.x, 3);
    CUDA_CHECK(cudaEventRecord(end, c.a));
    CHECK(cudaEventElapsedTime(&ms, begin, end) == cudaErrorNotReady);
    int asked = 0;
    while (cudaEventQuery(end) == cudaErrorNotReady) {
        asked++;
    }
    CHECK(asked > 0 && cudaStreamQuery(c.a) == cudaSuccess);
    CHECK(cudaEventElapsedTime(&ms, begin, end) == cudaSuccess && ms > 0.0f && ms < 1e4f);
    CHECK(cudaEventElapsedTime(&ms, c.event, end) == cudaErrorInvalidResourceHandle);
    CHECK(cudaGetLastError() == cudaErrorInvalidResourceHandle && cudaPeekAtLastError() == cudaSuccess);
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    streams_release(&c);
}

// from ordinary memory bytes are taken at the call, from pinned memory when the copy is made
static void streams_copies(const char *mode, int of_pinned) {
    StreamsCase c = streams_case(mode);
    int *pinned, ordinary = 1;
    CUDA_CHECK(cudaMallocHost(&pinned, 2 * sizeof(int)));
    pinned[0] = 1;
    pinned[1] = 0;
    CUDA_CHECK(cudaMemcpyAsync(c.x, pinned, sizeof(int), cudaMemcpyHostToDevice, c.a));
    CUDA_CHECK(cudaMemcpyAsync(c.x + 1, &ordinary, sizeof(int), cudaMemcpyHostToDevice, c.a));
    CUDA_CHECK(cudaMemcpyAsync(pinned + 1, c.x + 1, sizeof(int), cudaMemcpyDeviceToHost, c.a));
    pinned[0] = ordinary = 5;
    CHECK(pinned[1] == (of_pinned == 5 ? 0 : 1));
    int got[2];
    CUDA_CHECK(cudaMemcpyAsync(got, c.x, sizeof(got), cudaMemcpyDeviceToHost, c.a));
    CHECK(got[0] == of_pinned && got[1] == 1 && pinned[1] == 1);
    CUDA_CHECK(cudaFreeHost(pinned));
    streams_release(&c);
}

// what is freed, destroyed or flushed has been worked on before
static void streams_forced(void) {
    StreamsCase c = streams_case("late");
    int *pinned;
    CUDA_CHECK(cudaHostAlloc(&pinned, sizeof(int), cudaHostAllocDefault));
    *pinned = 0;
    fill_on(c.a, c.x, 4);
    CUDA_CHECK(cudaMemcpyAsync(pinned, c.x, sizeof(int), cudaMemcpyDeviceToHost, c.a));
    CHECK(*pinned == 0);
    emulator::flush();
    CHECK(*pinned == 4);
    fill_on(c.a, c.x, 6);
    CUDA_CHECK(cudaMemcpyAsync(pinned, c.x, sizeof(int), cudaMemcpyDeviceToHost, c.a));
    device_release(device_new<int>(1));
    CHECK(*pinned == 6);
    CUDA_CHECK(cudaFreeHost(pinned));
    streams_release(&c);
}

// ----------------------------------------------------------------------------
// several processes

enum { MOST_TEST_RANKS = 4 };

typedef struct {
    std::atomic<int> arrived;
    cudaIpcMemHandle_t handles[MOST_TEST_RANKS];
    ncclUniqueId id;
    char run[64];
    const char *mode;
} RanksShared;

typedef struct {
    int rank, ranks;
    RanksShared *shared;
} RankCase;

// all ranks have come here; what one of them may still have to do for the others is done first
static void ranks_meet(RankCase *c, int times) {
    emulator::flush();
    c->shared->arrived++;
    while (c->shared->arrived < times * c->ranks) {
        usleep(100);
    }
}

static void rank_main(RankCase c, void (*body)(RankCase *), int out) {
    char count[16];
    snprintf(count, sizeof(count), "%d", c.ranks);
    setenv("EMULATED_GPUS", count, 1);
    setenv("EMULATED_WAIT_SECONDS", "20", 0);
    dup2(out, 1);
    dup2(out, 2);
#ifdef _OPENMP
    omp_set_num_threads(1); // the parent's threads are not here
#endif
    alarm(60);
    memset(&tally, 0, sizeof(tally));
    CUDA_CHECK(cudaSetDevice(c.rank));
    emulator::set_streams(c.shared->mode);
    body(&c);
    emulator::flush();
    fflush(stdout);
    _exit(tally.failures > 0 ? 9 : 0);
}

static void read_all(int from, char *text, size_t bytes) {
    size_t used = 0;
    ssize_t got;
    while (used + 1 < bytes && (got = read(from, text + used, bytes - 1 - used)) > 0) {
        used += (size_t)got;
    }
    text[used] = '\0';
}

// body(rank) in a process a rank; how many of them ended well. What they print is in `text`
static int run_ranks(int ranks, const char *mode, void (*body)(RankCase *), char *text, size_t bytes) {
    static int runs = 0;
    void *memory = mmap(NULL, sizeof(RanksShared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    RanksShared *shared = (RanksShared *)memory;
    pid_t children[MOST_TEST_RANKS];
    int pipes[2], well = 0;
    snprintf(shared->run, sizeof(shared->run), "test %d %d", getpid(), ++runs);
    shared->mode = mode;
    CHECK(ncclGetUniqueId(&shared->id) == ncclSuccess && pipe(pipes) == 0);
    fflush(stdout);
    for (int rank = 0; rank < ranks; rank++) {
        children[rank] = fork();
        if (children[rank] == 0) {
            rank_main({rank, ranks, shared}, body, pipes[1]);
        }
    }
    close(pipes[1]);
    read_all(pipes[0], text, bytes);
    close(pipes[0]);
    for (int rank = 0; rank < ranks; rank++) {
        int status;
        waitpid(children[rank], &status, 0);
        well += WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    emulator::close_unique_file(shared->id.internal);
    munmap(memory, sizeof(RanksShared));
    return well;
}

static void ranks_succeed(int ranks, const char *mode, void (*body)(RankCase *)) {
    char text[4096];
    int well = run_ranks(ranks, mode, body, text, sizeof(text));
    if (!CHECK(well == ranks)) {
        printf("  %d of %d ranks, streams %s:\n%s\n", well, ranks, mode, text);
    }
}

// none ends well, and two lines are among what they print
static void ranks_fail(int ranks, const char *mode, void (*body)(RankCase *), const char *first,
                       const char *second) {
    char text[4096];
    int well = run_ranks(ranks, mode, body, text, sizeof(text));
    if (!CHECK(well == 0 && strstr(text, first) != NULL && strstr(text, second) != NULL)) {
        printf("  %d of %d ranks, streams %s: expected `%s` and `%s`:\n%s\n", well, ranks, mode, first,
               second, text);
    }
}

// ----------------------------------------------------------------------------
// memory and values between processes

typedef CUresult (*StreamValue32)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

static StreamValue32 driver_function(const char *name) {
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
    CHECK(found == cudaDriverEntryPointSuccess);
    return (StreamValue32)function;
}

typedef struct {
    int landing[STREAM_N];
    cuuint32_t ready, landed;
} PeerArea;

static PeerArea *area_new(void) {
    PeerArea *area = device_new<PeerArea>(1);
    CUDA_CHECK(cudaMemset(area, 0, sizeof(*area)));
    CUDA_CHECK(cudaDeviceSynchronize());
    return area;
}

// the area of the other of two ranks
static PeerArea *area_of_peer(RankCase *c, PeerArea *own) {
    void *theirs = NULL;
    cudaIpcMemHandle_t *handles = c->shared->handles;
    CUDA_CHECK(cudaIpcGetMemHandle(&handles[c->rank], own));
    ranks_meet(c, 1);
    CUDA_CHECK(cudaIpcOpenMemHandle(&theirs, handles[1 - c->rank], cudaIpcMemLazyEnablePeerAccess));
    CHECK(cudaIpcOpenMemHandle(&theirs, handles[c->rank], cudaIpcMemLazyEnablePeerAccess) != cudaSuccess);
    CUDA_CHECK(cudaIpcOpenMemHandle(&theirs, handles[1 - c->rank], cudaIpcMemLazyEnablePeerAccess));
    return (PeerArea *)theirs;
}

// many small allocations before and after: a handle is of any of them
static void rank_opens_memory(RankCase *c) {
    int *small = device_new<int>(3), *gone = device_new<int>(5000);
    PeerArea *own = area_new();
    int value = 0, mine = 40 + c->rank;
    device_release(gone);
    PeerArea *theirs = area_of_peer(c, own);
    CUDA_CHECK(cudaMemcpy(&theirs->landing[7], &mine, sizeof(int), cudaMemcpyHostToDevice));
    ranks_meet(c, 2);
    CUDA_CHECK(cudaMemcpy(&value, &own->landing[7], sizeof(int), cudaMemcpyDeviceToHost));
    CHECK(value == 41 - c->rank);
    cudaIpcMemHandle_t handle;
    CHECK(cudaIpcGetMemHandle(&handle, &own->landing[1]) == cudaErrorInvalidValue);
    CUDA_CHECK(cudaIpcCloseMemHandle(theirs));
    CHECK(cudaIpcCloseMemHandle(theirs) == cudaErrorInvalidValue);
    int devices, can;
    char bus[32];
    CUDA_CHECK(cudaGetDeviceCount(&devices));
    CUDA_CHECK(cudaDeviceCanAccessPeer(&can, c->rank, 1 - c->rank));
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof(bus), 1));
    CHECK(devices == 2 && can == 1 && strcmp(bus, "0000:01:00.0") == 0);
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
    device_release(small);
    device_release(own);
}

// Turns of: each pushes a value into the other's landing area, and adds what it gets to a sum. Flags say when the area
// is free and when the value is there; turns pass 2^32
static void rank_pushes(RankCase *c) {
    enum { TURNS = 40 };
    StreamValue32 write = driver_function("cuStreamWriteValue32"),
                  wait = driver_function("cuStreamWaitValue32");
    StreamsCase s = streams_case(c->shared->mode);
    PeerArea *own = area_new();
    cuuint32_t turn = (cuuint32_t)-TURNS / 2, before = turn;
    CUDA_CHECK(cudaMemcpy(&own->ready, &before, sizeof(before), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(&own->landed, &before, sizeof(before), cudaMemcpyHostToDevice));
    PeerArea *theirs = area_of_peer(c, own);
    emulator::set_streams(c->shared->mode); // as streams_case() found it
    int sum = 0;
    for (int i = 0; i < TURNS; i++) {
        turn++;
        fill_on(s.a, s.x, 100 * c->rank + i);
        CUDA_CHECK(cudaEventRecord(s.event, s.a));
        CUDA_CHECK(cudaStreamWaitEvent(s.b, s.event));
        CHECK(write(s.b, (CUdeviceptr)&theirs->ready, turn, CU_STREAM_WRITE_VALUE_DEFAULT) == CUDA_SUCCESS);
        CHECK(wait(s.b, (CUdeviceptr)&own->ready, turn, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS);
        CUDA_CHECK(
            cudaMemcpyAsync(theirs->landing, s.x, STREAM_N * sizeof(int), cudaMemcpyDeviceToDevice, s.b));
        CHECK(write(s.b, (CUdeviceptr)&theirs->landed, turn, CU_STREAM_WRITE_VALUE_DEFAULT) == CUDA_SUCCESS);
        CHECK(wait(s.b, (CUdeviceptr)&own->landed, turn, CU_STREAM_WAIT_VALUE_GEQ) == CUDA_SUCCESS);
        CUDA_CHECK(cudaEventRecord(s.event, s.b));
        CUDA_CHECK(cudaStreamWaitEvent(s.a, s.event));
        launch(streams_add, 1, 128, 0, s.a, s.y, own->landing);
        sum += 100 * (1 - c->rank) + i;
        emulator::agree(c->rank, c->ranks, c->shared->run, turn, "a push");
    }
    CHECK(value_on(s.a, s.y) == sum);
    emulator::flush();
    ranks_meet(c, 2);
}

// What the other waits for is in a stream that nobody forces: it is found while this rank waits itself
static void rank_waits_beside(RankCase *c) {
    StreamsCase s = streams_case(c->shared->mode);
    PeerArea *own = area_new(), *theirs = area_of_peer(c, own);
    fill_on(s.a, s.x, 1);
    cuStreamWriteValue32(s.a, (CUdeviceptr)&theirs->landed, 1, CU_STREAM_WRITE_VALUE_DEFAULT);
    cuStreamWaitValue32(s.b, (CUdeviceptr)&own->landed, 1, CU_STREAM_WAIT_VALUE_GEQ);
    CUDA_CHECK(cudaStreamSynchronize(s.b));
    CHECK(cuStreamWriteValue32(s.a, (CUdeviceptr)&s, 1, 0) == CUDA_ERROR_INVALID_VALUE);
    ranks_meet(c, 2);
}

static void rank_waits_in_vain(RankCase *c) {
    cuuint32_t *flag = device_new<cuuint32_t>(1), six = 6;
    setenv("EMULATED_WAIT_SECONDS", "0.2", 1);
    CUDA_CHECK(cudaMemcpy(flag, &six, sizeof(six), cudaMemcpyHostToDevice));
    cuStreamWaitValue32(NULL, (CUdeviceptr)flag, 7, CU_STREAM_WAIT_VALUE_GEQ);
    CUDA_CHECK(cudaStreamSynchronize(NULL));
    CHECK(c->rank < 0);
}

static void rank_disagrees(RankCase *c) {
    for (uint64_t turn = 0; turn < 1000; turn++) { // rings are used again
        emulator::agree(c->rank, c->ranks, c->shared->run, turn, turn % 2 ? "odd" : "even");
    }
    emulator::agree(c->rank, c->ranks, c->shared->run, 1017, c->rank == 0 ? "bucket 3" : "bucket 2");
    alarm(1); // the first to come may not see it
    pause();
}

// ----------------------------------------------------------------------------
// NCCL

static ncclComm_t rank_joins(RankCase *c) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm = NULL;
    config.maxCTAs = 8;
    config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
    CHECK(ncclCommInitRankConfig(&comm, c->ranks, c->shared->id, c->rank, &config) == ncclSuccess);
    return comm;
}

// n ints first, first + 1, ...
static int *device_count(int64_t n, int first) {
    int *host = NEW(int, n);
    for (int64_t i = 0; i < n; i++) {
        host[i] = first + (int)i;
    }
    int *p = device_i(host, n);
    free(host);
    return p;
}

// how many of n ints are not first, first + step, ...
static int64_t wrong_counts(cudaStream_t stream, const int *x, int64_t n, int first, int step) {
    int *host = NEW(int, n);
    int64_t wrong = 0;
    CUDA_CHECK(cudaMemcpyAsync(host, x, (size_t)n * sizeof(int), cudaMemcpyDeviceToHost, stream));
    for (int64_t i = 0; i < n; i++) {
        wrong += host[i] != first + step * (int)i;
    }
    free(host);
    return wrong;
}

enum { NCCL_N = 200000 }; // more than a channel holds at once

// each to the next, from the one before
static void rank_rings(RankCase *c, ncclComm_t comm, cudaStream_t stream) {
    int next = (c->rank + 1) % c->ranks, before = (c->rank + c->ranks - 1) % c->ranks;
    int *own = device_count(NCCL_N, 1000 * c->rank), *got = device_new<int>(NCCL_N);
    CUDA_CHECK(cudaStreamSynchronize(NULL)); // which fills new memory
    ncclGroupStart();
    CHECK(ncclSend(own, NCCL_N, ncclInt32, next, comm, stream) == ncclSuccess);
    CHECK(ncclRecv(got, NCCL_N, ncclInt32, before, comm, stream) == ncclSuccess);
    ncclGroupEnd();
    CHECK(wrong_counts(stream, got, NCCL_N, 1000 * before, 1) == 0);
    device_release(own);
    device_release(got);
}

static void rank_gathers(RankCase *c, ncclComm_t comm, cudaStream_t stream) {
    int n = NCCL_N / 4;
    int *all = device_new<int>(c->ranks * n), *part = device_count(n, c->rank * n);
    CUDA_CHECK(cudaStreamSynchronize(NULL));
    CUDA_CHECK(
        cudaMemcpyAsync(all + c->rank * n, part, (size_t)n * sizeof(int), cudaMemcpyDeviceToDevice, stream));
    CHECK(ncclAllGather(all + c->rank * n, all, (size_t)n, ncclInt32, comm, stream) ==
          ncclSuccess); // in place
    CHECK(wrong_counts(stream, all, c->ranks * n, 0, 1) == 0);
    CHECK(ncclReduceScatter(all, part, (size_t)n, ncclInt32, ncclSum, comm, stream) == ncclSuccess);
    CHECK(wrong_counts(stream, part, n, c->ranks * c->rank * n, c->ranks) == 0);
    device_release(all);
    device_release(part);
}

static void rank_adds(RankCase *c, ncclComm_t comm, cudaStream_t stream) {
    int n = 1000, ranks = c->ranks;
    int *x = device_count(n, 10 * c->rank);
    CHECK(ncclAllReduce(x, x, (size_t)n, ncclInt32, ncclSum, comm, stream) == ncclSuccess);
    CHECK(wrong_counts(stream, x, n, 10 * ranks * (ranks - 1) / 2, ranks) == 0);
    device_release(x);
    x = device_count(n, 10 * c->rank);
    CHECK(ncclAllReduce(x, x, (size_t)n, ncclInt32, ncclMax, comm, stream) == ncclSuccess);
    CHECK(ncclBroadcast(x, x, (size_t)n, ncclInt32, 1, comm, stream) == ncclSuccess);
    CHECK(wrong_counts(stream, x, n, 10 * (ranks - 1), 1) == 0);
    device_release(x);
    float ones[4] = {1.0f, 2.0f, 3.0f, 4.0f}, sum[4];
    float *f = device_f(ones, 4);
    CHECK(ncclAllReduce(f, f, 4, ncclFloat, ncclSum, comm, stream) == ncclSuccess);
    CUDA_CHECK(cudaMemcpyAsync(sum, f, sizeof(sum), cudaMemcpyDeviceToHost, stream));
    CHECK(sum[0] == (float)ranks && sum[3] == 4.0f * (float)ranks);
    device_release(f);
}

// two streams: a communicator's calls are done in their order
static void rank_uses_nccl(RankCase *c) {
    StreamsCase s = streams_case(c->shared->mode);
    ncclComm_t comm = rank_joins(c);
    int ranks, *x = device_count(10, c->rank), *y = device_new<int>(10 * c->ranks);
    CUDA_CHECK(cudaStreamSynchronize(NULL));
    CHECK(ncclCommCount(comm, &ranks) == ncclSuccess && ranks == c->ranks);
    for (int i = 0; i < 3; i++) {
        rank_rings(c, comm, s.a);
        rank_gathers(c, comm, s.b);
        rank_adds(c, comm, s.a);
        CHECK(ncclAllGather(x, y, 10, ncclInt32, comm, c->rank % 2 ? s.a : s.b) ==
              ncclSuccess); // nobody asks for it
    }
    CHECK(ncclAllGather(&s, y, 10, ncclInt32, comm, s.a) == ncclInvalidArgument);
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
    CHECK(wrong_counts(s.a, y, 10, 0, 1) == 0);
}

static void rank_counts_wrong(RankCase *c) {
    ncclComm_t comm = rank_joins(c);
    int *x = device_new<int>(1000);
    ncclAllReduce(x, x, c->rank == 1 ? 100 : 101, ncclInt32, ncclSum, comm, NULL);
    CUDA_CHECK(cudaStreamSynchronize(NULL));
}

static void rank_gathers_alone(RankCase *c) {
    ncclComm_t comm = rank_joins(c);
    int *x = device_new<int>(1000);
    if (c->rank == 0) {
        ncclRecv(x, 7, ncclInt32, 1, comm, NULL);
    } else {
        ncclBroadcast(x, x, 100, ncclInt32, 0, comm, NULL);
    }
    CUDA_CHECK(cudaStreamSynchronize(NULL));
}

// each sends before it receives: not in a group, so each waits for the other's recv
static void rank_sends_first(RankCase *c) {
    ncclComm_t comm = rank_joins(c);
    int *x = device_new<int>(1000);
    ncclSend(x, 5, ncclInt32, (c->rank + 1) % c->ranks, comm, NULL);
    ncclRecv(x, 5, ncclInt32, (c->rank + c->ranks - 1) % c->ranks, comm, NULL);
    CUDA_CHECK(cudaStreamSynchronize(NULL));
}

// rank 0 sends what rank 1 never receives
static void rank_sends_in_vain(RankCase *c) {
    ncclComm_t comm = rank_joins(c);
    int *x = device_new<int>(1000);
    if (c->rank == 0) {
        ncclSend(x, 5, ncclInt32, 1, comm, NULL);
        CUDA_CHECK(cudaStreamSynchronize(NULL));
    }
    ncclCommDestroy(comm);
    CHECK(c->rank < 0); // so that all ranks fail
}

static void streams_ranks(void) {
    for (const char *mode : stream_modes) {
        ranks_succeed(2, mode, rank_opens_memory);
        ranks_succeed(2, mode, rank_pushes);
        ranks_succeed(2, mode, rank_waits_beside);
        ranks_succeed(3, mode, rank_uses_nccl);
    }
    ranks_fail(1, "late", rank_waits_in_vain, "a stream has waited 0.2 s for value 7 at a flag, which is 6",
               "");
    ranks_fail(1, "early", rank_waits_in_vain, "a stream has waited 0.2 s for value 7 at a flag, which is 6",
               "");
    ranks_fail(2, "early", rank_disagrees,
               "emulator: in turn 1017 rank 0 moves `bucket 3`, rank 1 `bucket 2`", "");
}

static void streams_nccl_mismatches(void) {
    const char *modes[] = {"early", "late"};
    for (const char *mode : modes) {
        ranks_fail(3, mode, rank_counts_wrong, "ncclAllReduce of 101 ncclInt32 (ncclSum)",
                   "ncclAllReduce of 100 ncclInt32 (ncclSum)");
        ranks_fail(2, mode, rank_gathers_alone, "rank 0 is in ncclRecv of 7 ncclInt32 from rank 1",
                   "rank 1 in ncclBroadcast of 100 ncclInt32 from rank 0");
        ranks_fail(3, mode, rank_sends_first, "would wait for each other for ever: rank",
                   "in ncclSend of 5 ncclInt32 to rank");
        ranks_fail(2, mode, rank_sends_in_vain, "rank 0 is in ncclSend of 5 ncclInt32 to rank 1",
                   "rank 1 in none: it has left the communicator");
    }
}

static void test_cuda_streams(void) {
    const char *before = getenv("EMULATED_STREAMS");
    streams_missing_event();
    streams_event_is_bound();
    streams_queries();
    streams_copies("early", 1);
    streams_copies("late", 5);
    streams_forced();
    streams_ranks();
    streams_nccl_mismatches();
    emulator::set_streams(before);
}
#endif

#endif
