/*
Several GPUs, one process each: how gradients, weights and counts get from one to the others while they
compute. A reader who does not care about ranks meets five words in train_remoe.cu, each where the thing it
speaks of is complete or needed. With one rank each of them does nothing.

    comm_counts_*    f_e's tokens per expert are those of all ranks (Eq. 11)
    comm_exchange    a bucket's gradient is complete: its shards go to their owners (buckets.h)
    comm_votes       losses, counts, overflow, norm, the wish to stop: everyone's, to everyone, once a step
    comm_gather      the owner has updated its shard: the new weights go to everyone
    comm_wait        the weights of a bucket are here

Picture of a step; E is an event, and only the last line but two waits for the host:

    compute stream                                       communication stream (the highest priority)
    forward; layer l waits for E(gathered l)  <--------- (the weights of the step before are arriving)
    E(counts) -----------------------------------------> counts to everyone; E(here)
    head and loss; wait E(here); counts_all = their sum
    backward. When bucket b is complete:
      wait E(landed b-1); add up b-1 (buckets.cuh)
      E(ready b) --------------------------------------> shards of b to their owners; E(landed b)
    the last bucket is added up; E --------------------> votes and squares to everyone; E
    wait; THE HOST WAITS: repeat? finite? clip
    AdamW of bucket b's shard; E(updated b) -----------> the shard to everyone; E(gathered b)

All that moves is a `move`: to every other rank a slice of a buffer, from every other rank a slice. Between
GPUs of one machine that reach each other's memory, the copy engines carry it, and no multiprocessor:

    1  to every peer: write ready = turn into its flags        "my region is free: what I did with it is over"
    2  for every peer p: wait for ready[p]; copy the slice into p's region; write landed = turn into p's flags
    3  wait for landed from every peer

- A region is not overwritten while it is read: its reader's `ready` stands behind an event that stands behind
  the reading. A slice is complete when it is copied, for the same reason on the sender's side.
- A write to a peer's flag fences first, as __threadfence_system does: who sees the flag sees the copy.
- Turns are counted alike on all ranks, so they cannot mix. Every ready goes out before the first wait, and
  every other write stands behind waits for ready alone, so no circle of waits can close.
- Nothing else may be put on the communication stream. A memset, a copy inside the card or a kernel would wait
  for a running product to end, and with it all that is behind.

Across machines, or where peers are out of reach, NCCL's send and receive carry the same slices, by kernels:
the same bits, but they take multiprocessors from ours.

Flags are memory operations of streams (cuStreamWriteValue32, cuStreamWaitValue32). A peer that dies is not
noticed by a stream that waits for it: that is ranks.h's to see. Errors: no NCCL where it is needed, two ranks
on one GPU, a GPU that is not there.
*/
#ifndef COMM_CUH
#define COMM_CUH

#include "llmc/gpu/device.cuh"
#include "llmc/gpu/memory.cuh"
#include "llmc/gpu/profile.cuh"
#include "llmc/gpu/buckets.cuh"
#include "llmc/gpu/waits.cuh"
#include "llmc/model.h"
#include "llmc/run/ranks.h"
#include <cuda.h>
#ifdef REMOE_NCCL
#include <nccl.h>
#endif
// defines: take; profile_mark; sum_parts; Bucket; Ranks, ranks_gather; CUstream, CUdeviceptr; ncclSend,
// ncclRecv

// memory that other ranks write into; on every rank of the same layout
typedef enum {
    REGION_FLAGS,
    REGION_LANDING, // [ranks - 1][shard of the largest bucket] parts of the own shard's gradient
    REGION_FP32,    // norms and routers; in the fp32 build all weights
    REGION_WORKING, // all weights, as products read them
    REGION_GRADS,   // all gradients, where every rank updates everything (--zero 0)
    REGION_COUNTS,  // [ranks][L E] tokens per expert of the micro-batch
    REGION_VOTES,   // [ranks][a vote]
    REGION_SQUARES, // [ranks][squares_row]
    REGION_COUNT
} RegionName;

typedef struct {
    char *own;
    char *peers[RANKS_MOST_ON_A_MACHINE]; // the same region of each rank of this machine, as addresses here
} Region;

// written by peers: [rank] the last turn in which that rank was ready, and in which its slice had landed
typedef struct {
    uint32_t ready[RANKS_MOST_ON_A_MACHINE], landed[RANKS_MOST_ON_A_MACHINE];
} Flags;

// bytes of a move: where in the sender's buffer, where in the receiver's region, how many
typedef struct {
    int64_t from, to, bytes;
} Slice;

typedef CUresult (*StreamValue)(CUstream, CUdeviceptr, cuuint32_t, unsigned);

typedef struct {
    int rank, ranks;
    int device;    // of the machine's GPUs
    int by_copies; // else by NCCL
    Ranks *star;
    cudaStream_t stream;
    Region regions[REGION_COUNT];
    uint32_t turn;
    StreamValue write, wait;
    Slice *out, *in;       // [ranks] of the move that is being queued
    cudaEvent_t ready;     // what is to be moved is complete
    cudaEvent_t here;      // what was moved has come: exchanges, counts, votes, which are waited for soon
    cudaEvent_t *gathered; // [buckets]
    int *arriving;         // [buckets] gathered since a forward last waited for it
    Waits waits;           // of the step
    const Bucket *buckets;
    int bucket_count;
    int pending; // bucket whose parts have landed or will, and are not yet added up; -1: none
    int divided; // states are (ZeRO-1)
    float *grad;
    double *squares; // the own row
    Profile *profile;
    char run[64]; // names the run where ranks are emulated
#ifdef REMOE_NCCL
    ncclComm_t nccl;
#endif
} Comm;

// memory that other ranks write into, if there are any
template <class T>
static T *take_region(Comm *c, RegionName name, DeviceMemory *memory, MemorySegment segment, int64_t n) {
    int64_t align = c->ranks > 1 ? (int64_t)MEMORY_SHARED_ALIGN : (int64_t)MEMORY_ALIGN;
    T *own = take<T>(memory, segment, n, align);
    c->regions[name].own = (char *)own;
    return own;
}

// ----------------------------------------------------------------------------
// moves

static inline void comm_flag(Comm *c, StreamValue operation, const uint32_t *flag, unsigned how) {
    if (operation(c->stream, (CUdeviceptr)flag, c->turn, how) != CUDA_SUCCESS) {
        die("the CUDA driver refuses a stream's memory operation\n  ---> --comm nccl");
    }
}

static inline Flags *comm_flags(Comm *c, int rank) {
    Region *flags = &c->regions[REGION_FLAGS];
    return (Flags *)(rank == c->rank ? flags->own : flags->peers[rank]);
}

// the order in which a rank serves the others: nobody receives from two at a time
static inline int comm_peer(const Comm *c, int i) {
    return (c->rank + i) % c->ranks;
}

static inline void comm_copy_slices(Comm *c, Region *region, const char *from) {
    for (int i = 1; i < c->ranks; i++) {
        comm_flag(c, c->write, &comm_flags(c, comm_peer(c, i))->ready[c->rank],
                  CU_STREAM_WRITE_VALUE_DEFAULT);
    }
    for (int i = 1; i < c->ranks; i++) {
        int p = comm_peer(c, i);
        const Slice *slice = &c->out[p];
        comm_flag(c, c->wait, &comm_flags(c, c->rank)->ready[p], CU_STREAM_WAIT_VALUE_GEQ);
        if (slice->bytes > 0) {
            CUDA_CHECK(cudaMemcpyAsync(region->peers[p] + slice->to, from + slice->from, (size_t)slice->bytes,
                                       cudaMemcpyDeviceToDevice, c->stream));
        }
        comm_flag(c, c->write, &comm_flags(c, p)->landed[c->rank], CU_STREAM_WRITE_VALUE_DEFAULT);
    }
    for (int i = 1; i < c->ranks; i++) {
        comm_flag(c, c->wait, &comm_flags(c, c->rank)->landed[comm_peer(c, i)], CU_STREAM_WAIT_VALUE_GEQ);
    }
}

#ifdef REMOE_NCCL
static inline void nccl_check(ncclResult_t result, const char *call, const char *file, int line) {
    if (result != ncclSuccess && result != ncclInProgress) {
        die("NCCL: %s (%s:%d: %s)\n  ---> NCCL_DEBUG=INFO says more", ncclGetLastError(NULL), file, line,
            call);
    }
}
#define NCCL_CHECK(call) nccl_check((call), #call, __FILE__, __LINE__)

static inline void comm_send_slices(Comm *c, Region *region, const char *from) {
    NCCL_CHECK(ncclGroupStart());
    for (int i = 1; i < c->ranks; i++) {
        int p = comm_peer(c, i), q = comm_peer(c, c->ranks - i);
        if (c->out[p].bytes > 0) {
            NCCL_CHECK(
                ncclSend(from + c->out[p].from, (size_t)c->out[p].bytes, ncclChar, p, c->nccl, c->stream));
        }
        if (c->in[q].bytes > 0) {
            NCCL_CHECK(
                ncclRecv(region->own + c->in[q].to, (size_t)c->in[q].bytes, ncclChar, q, c->nccl, c->stream));
        }
    }
    NCCL_CHECK(ncclGroupEnd());
}
#else
__attribute__((noreturn)) static inline void comm_without_nccl(void) {
    die("these GPUs do not all reach each other's memory, and this program was built without NCCL\n"
        "  ---> make train_remoecu NCCL_HOME=/path, with include/nccl.h and lib/libnccl.so in it");
}

static inline void comm_send_slices(Comm *, Region *, const char *) {
    comm_without_nccl();
}
#endif

// Queues a move: c->out and c->in say what of `from` goes where in the others' region. What `stream` has
// queued so far comes before it. `what` names the move, for those who look for ranks that do different things
static inline void comm_move(Comm *c, RegionName name, const void *from, const char *what, cudaEvent_t here,
                             cudaStream_t stream) {
    c->turn++;
    CUDA_CHECK(cudaEventRecord(c->ready, stream));
    CUDA_CHECK(cudaStreamWaitEvent(c->stream, c->ready, 0));
#ifdef EMULATED
    emulator::agree(c->rank, c->ranks, c->run, c->turn, what);
#else
    (void)what;
#endif
    if (c->by_copies) {
        comm_copy_slices(c, &c->regions[name], (const char *)from);
    } else {
        comm_send_slices(c, &c->regions[name], (const char *)from);
    }
    CUDA_CHECK(cudaEventRecord(here, c->stream));
}

// `stream` goes on when what was moved is here
static inline void comm_await(Comm *c, cudaEvent_t here, cudaStream_t stream) {
    profile_mark(c->profile, PROFILE_WAITING, stream);
    waits_begin(&c->waits, stream);
    CUDA_CHECK(cudaStreamWaitEvent(stream, here, 0));
    waits_end(&c->waits, stream);
}

// every rank's own piece of a region goes to the same place of everyone's; pieces: bytes, of each rank
static inline void comm_share(Comm *c, RegionName name, const Slice *pieces, const char *what,
                              cudaEvent_t here, cudaStream_t stream) {
    Slice own = pieces[c->rank];
    for (int p = 0; p < c->ranks; p++) {
        c->out[p] = own;
        c->in[p] = pieces[p];
    }
    comm_move(c, name, c->regions[name].own, what, here, stream);
}

// rows of `bytes`, one of each rank
static inline void comm_share_rows(Comm *c, RegionName name, int64_t bytes, const char *what,
                                   cudaStream_t stream) {
    Slice *rows = NEW(Slice, c->ranks);
    for (int p = 0; p < c->ranks; p++) {
        rows[p].from = rows[p].to = p * bytes;
        rows[p].bytes = bytes;
    }
    comm_share(c, name, rows, what, c->here, stream);
    free(rows);
}

// the ranks' shards of a bucket in a flat buffer of elements of `size` bytes
static inline void comm_share_bucket(Comm *c, RegionName name, int bucket, int64_t size, const char *what,
                                     cudaEvent_t here, cudaStream_t stream) {
    Slice *shards = NEW(Slice, c->ranks);
    for (int p = 0; p < c->ranks; p++) {
        Range range = owned_range(&c->buckets[bucket], p, c->ranks);
        shards[p].from = shards[p].to = range.first * size;
        shards[p].bytes = range.size * size;
    }
    comm_share(c, name, shards, what, here, stream);
    free(shards);
}

// ----------------------------------------------------------------------------
// gradients

// adds up the bucket whose parts are on their way: the compute stream's part of an exchange
static inline void comm_sum_pending(Comm *c, cudaStream_t stream) {
    if (c->pending < 0) {
        return;
    }
    const Bucket *bucket = &c->buckets[c->pending];
    Range own = owned_range(bucket, c->rank, c->ranks);
    if (c->ranks > 1) {
        comm_await(c, c->here, stream);
    }
    profile_mark(c->profile, c->ranks > 1 ? PROFILE_ADDING : "gradient norm", stream);
    sum_parts(c->grad + own.first, (const float *)c->regions[REGION_LANDING].own,
              owned_most_blocks(bucket, c->ranks) * BUCKET_BLOCK, own.size, c->rank, c->ranks,
              c->squares + owned_place(c->buckets, c->pending, c->ranks) / BUCKET_BLOCK, stream);
    c->pending = -1;
}

static inline void comm_push_parts(Comm *c, int bucket, cudaStream_t stream) {
    const Bucket *b = &c->buckets[bucket];
    int64_t stride = owned_most_blocks(b, c->ranks) * BUCKET_BLOCK * (int64_t)sizeof(float);
    Range own = owned_range(b, c->rank, c->ranks);
    char what[64];
    check_format(what, sizeof(what), "gradients of bucket %d", bucket);
    for (int p = 0; p < c->ranks; p++) {
        Range theirs = owned_range(b, p, c->ranks);
        Slice out = {theirs.first * 4, landing_slot(c->rank, p) * stride, theirs.size * 4};
        Slice in = {0, landing_slot(p, c->rank) * stride, own.size * 4};
        c->out[p] = out;
        c->in[p] = in;
    }
    comm_move(c, REGION_LANDING, c->grad, what, c->here, stream);
}

// The gradient of a bucket is complete on this rank: its shards go to their owners, which add them up when
// the next bucket comes. All ranks: the same buckets in the same order
static inline void comm_exchange(Comm *c, int bucket, cudaStream_t stream) {
    comm_sum_pending(c, stream);
    if (c->ranks > 1) {
        comm_push_parts(c, bucket, stream);
    }
    c->pending = bucket;
}

// after the last bucket of a step; where states are not divided, everyone gets every sum
static inline void comm_exchange_end(Comm *c, cudaStream_t stream) {
    comm_sum_pending(c, stream);
    for (int b = 0; b < c->bucket_count && c->ranks > 1 && !c->divided; b++) {
        comm_share_bucket(c, REGION_GRADS, b, sizeof(float), "sums of gradients", c->here, stream);
        comm_await(c, c->here, stream);
    }
}

// ----------------------------------------------------------------------------
// weights

// the owner has updated its shard of a bucket: everyone gets it
static inline void comm_gather(Comm *c, int bucket, cudaStream_t stream) {
    if (c->ranks == 1 || !c->divided) {
        return;
    }
    char what[64];
    check_format(what, sizeof(what), "weights of bucket %d", bucket);
    if (c->buckets[bucket].is_fp32 && sizeof(floatX) != sizeof(float)) {
        comm_share_bucket(c, REGION_FP32, bucket, sizeof(float), what, c->here, stream);
    }
    comm_share_bucket(c, REGION_WORKING, bucket, sizeof(floatX), what, c->gathered[bucket], stream);
    c->arriving[bucket] = 1;
}

// What reads the weights of a bucket may begin. Those gathered before it are here too. Once a stream has waited
// for them, later forwards need not
static inline void comm_wait(Comm *c, int bucket, cudaStream_t stream) {
    if (c->ranks > 1 && c->arriving[bucket]) {
        comm_await(c, c->gathered[bucket], stream);
        c->arriving[bucket] = 0;
    }
}

// ----------------------------------------------------------------------------
// counts and votes

// the own row of counts [L E] is complete
static inline void comm_counts_send(Comm *c, int64_t cells, cudaStream_t stream) {
    if (c->ranks > 1) {
        comm_share_rows(c, REGION_COUNTS, cells * (int64_t)sizeof(int), "tokens per expert", stream);
    }
}

static __global__ void __launch_bounds__(256)
    sum_counts_kernel(int *sum, const int *rows, int cells, int ranks) {
    int i = (int)(blockIdx.x * 256 + threadIdx.x), total = 0;
    for (int p = 0; p < ranks && i < cells; p++) {
        total += rows[(int64_t)p * cells + i];
    }
    if (i < cells) {
        sum[i] = total;
    }
}

// all [L E] = everyone's; with one rank they are the own row
static inline void comm_counts_receive(Comm *c, int *all, int64_t cells, cudaStream_t stream) {
    if (c->ranks > 1) {
        comm_await(c, c->here, stream);
        launch(sum_counts_kernel, ceil_div((int)cells, 256), 256, 0, stream, all,
               (const int *)c->regions[REGION_COUNTS].own, (int)cells, c->ranks);
    }
}

// everyone's row of votes and of squares, to be read behind `stream`
static inline void comm_votes(Comm *c, int64_t vote_bytes, cudaStream_t stream) {
    if (c->ranks > 1) {
        int64_t row = squares_row(c->buckets, c->bucket_count, c->ranks);
        comm_share_rows(c, REGION_SQUARES, row * (int64_t)sizeof(double), "squares", stream);
        comm_share_rows(c, REGION_VOTES, vote_bytes, "votes", stream);
        comm_await(c, c->here, stream);
    }
}

#endif
