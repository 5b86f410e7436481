/*
How the ranks' GPUs find each other before training (comm.cuh has what they do then), and how they part.

    comm_open      who is where, and who carries moves: copy engines, where each GPU of one machine can write
                   into the memory of every other, else NCCL, which connects
    comm_connect   once the regions are taken and cleared: everyone learns where everyone's are (cudaIpc)
    comm_close     nobody's memory goes while another may still write into it

All ranks call these alike; what they tell each other goes through rank 0 (run/ranks.h). Errors: two ranks on
one GPU, GPUs that do not reach each other where that was asked for, no NCCL where it is needed.
*/
#ifndef COMM_OPEN_CUH
#define COMM_OPEN_CUH

#include "llmc/gpu/comm.cuh"
#include "llmc/gpu/driver.cuh"
// defines: Comm, Region, comm_*; driver_function; Ranks, ranks_gather

// what a rank tells the others of itself
typedef struct {
    char host[64], bus[32];
} CommCard;

static inline void comm_refuse_shared_card(const CommCard *cards, const Ranks *star) {
    for (int p = 0; p < star->count; p++) {
        const CommCard *mine = &cards[star->rank], *other = &cards[p];
        if (p < star->rank && strcmp(other->host, mine->host) == 0 && strcmp(other->bus, mine->bus) == 0) {
            die("ranks %d and %d are both on the GPU %s of %s\n"
                "  ---> one GPU a rank: fewer --gpus, or let the launcher show each rank all GPUs of its "
                "machine",
                p, star->rank, mine->bus, mine->host);
        }
    }
}

// can this rank write into the memory of every other?
static inline int comm_reaches_all(const CommCard *cards, const Ranks *star, int device) {
    for (int p = 0; p < star->count; p++) {
        int peer, can = 0;
        if (p == star->rank) {
            continue;
        }
        if (strcmp(cards[p].host, cards[star->rank].host) != 0 || p >= RANKS_MOST_ON_A_MACHINE ||
            cudaDeviceGetByPCIBusId(&peer, cards[p].bus) != cudaSuccess ||
            cudaDeviceCanAccessPeer(&can, device, peer) != cudaSuccess || !can) {
            cudaGetLastError(); // an unknown card is an answer, not an error
            return 0;
        }
    }
    return 1;
}

// --comm auto, copies or nccl: who carries moves. All ranks decide alike
static inline int comm_choose_copies(Ranks *star, const char *wanted, int device) {
    CommCard *cards = NEW(CommCard, star->count);
    CommCard mine = {"", ""};
    gethostname(mine.host, sizeof(mine.host) - 1);
    CUDA_CHECK(cudaDeviceGetPCIBusId(mine.bus, sizeof(mine.bus), device));
    ranks_gather(star, &mine, sizeof(mine), cards);
    comm_refuse_shared_card(cards, star);
    int reaches = !ranks_any(star, !comm_reaches_all(cards, star, device));
    free(cards);
    if (strcmp(wanted, "copies") == 0 && !reaches) {
        die("--comm copies: the GPUs of this run do not all reach each other's memory\n  ---> --comm nccl");
    }
    return reaches && strcmp(wanted, "nccl") != 0;
}

static inline StreamValue comm_driver_function(const char *name) {
    return (StreamValue)driver_function(name, "--comm nccl, or a driver of CUDA 12 or newer");
}

typedef struct {
    cudaIpcMemHandle_t regions[REGION_COUNT];
} CommHandles;

// every rank of the machine learns where everyone's regions are
static inline void comm_open_regions(Comm *c) {
    CommHandles mine, *all = NEW(CommHandles, c->ranks);
    memset(&mine, 0, sizeof(mine));
    for (int i = 0; i < REGION_COUNT; i++) {
        if (c->regions[i].own != NULL) {
            CUDA_CHECK(cudaIpcGetMemHandle(&mine.regions[i], c->regions[i].own));
        }
    }
    ranks_gather(c->star, &mine, sizeof(mine), all);
    for (int p = 0; p < c->ranks; p++) {
        for (int i = 0; i < REGION_COUNT && p != c->rank; i++) {
            if (c->regions[i].own != NULL) {
                CUDA_CHECK(cudaIpcOpenMemHandle((void **)&c->regions[i].peers[p], all[p].regions[i],
                                                cudaIpcMemLazyEnablePeerAccess));
            }
        }
    }
    free(all);
}

// The regions but those of the weights and gradients themselves. cells: L E; with_gradients: they will be
// exchanged
static inline void comm_allocate(Comm *c, DeviceMemory *memory, int with_gradients, int64_t cells,
                                 int64_t vote_bytes) {
    int64_t most = 0, row = squares_row(c->buckets, c->bucket_count, c->ranks);
    for (int b = 0; b < c->bucket_count && with_gradients; b++) {
        int64_t elements = owned_most_blocks(&c->buckets[b], c->ranks) * BUCKET_BLOCK;
        most = elements > most ? elements : most;
    }
    take_region<float>(c, REGION_LANDING, memory, SEGMENT_EXCHANGE, (c->ranks - 1) * most);
    take_region<Flags>(c, REGION_FLAGS, memory, SEGMENT_EXCHANGE, c->ranks > 1 ? 1 : 0);
    take_region<int>(c, REGION_COUNTS, memory, SEGMENT_EXCHANGE, c->ranks * cells);
    take_region<unsigned char>(c, REGION_VOTES, memory, SEGMENT_EXCHANGE, c->ranks * vote_bytes);
    double *squares = take_region<double>(c, REGION_SQUARES, memory, SEGMENT_EXCHANGE, c->ranks * row);
    c->squares = squares + c->rank * row;
}

// a line of the start-up table
static inline void comm_print(const Comm *c) {
    if (c->ranks > 1) {
        printf("ranks     %d, a GPU each; data go %s; %s\n", c->ranks,
               c->by_copies
                   ? "from memory to memory by the GPUs' copy engines"
                   : "by NCCL, whose kernels take multiprocessors from ours (the GPUs do not all reach each "
                     "other's memory, or --comm nccl)",
               c->divided ? "masters and moments are divided (ZeRO-1)"
                          : "each keeps all masters and moments");
    }
}

// The regions are taken, and cleared: other ranks write into them from here on
static inline void comm_connect(Comm *c) {
    if (c->ranks == 1) {
        return;
    }
    CUDA_CHECK(cudaMemset(c->regions[REGION_FLAGS].own, 0, sizeof(Flags)));
    CUDA_CHECK(cudaDeviceSynchronize());
    if (c->by_copies) {
        c->write = comm_driver_function("cuStreamWriteValue32");
        c->wait = comm_driver_function("cuStreamWaitValue32");
        comm_open_regions(c);
    }
    ranks_barrier(c->star);
}

// before memory is counted: NCCL takes some of its own
static inline void comm_open_nccl(Comm *c) {
#ifdef REMOE_NCCL
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    setenv("NCCL_NVLS_ENABLE", "0", 0); // multicast is of no use to sends, and has hung young versions
    if (c->rank == 0) {
        NCCL_CHECK(ncclGetUniqueId(&id));
    }
    ranks_share(c->star, &id, sizeof(id));
    NCCL_CHECK(ncclCommInitRankConfig(&c->nccl, c->ranks, id, c->rank, &config));
#else
    (void)c;
    comm_without_nccl();
#endif
}

// wanted: auto, copies or nccl; divided: each rank keeps the states of its own shards alone
static inline void comm_open(Comm *c, Ranks *star, const char *wanted, int divided, int device,
                             const TensorTable *table, Profile *profile) {
    int least, greatest;
    c->rank = star->rank;
    c->ranks = star->count;
    c->device = device;
    c->star = star;
    c->divided = divided;
    c->buckets = table->buckets;
    c->bucket_count = table->bucket_count;
    c->pending = -1;
    c->profile = profile;
    if (c->ranks == 1) {
        return;
    }
    c->by_copies = comm_choose_copies(star, wanted, device);
    if (!c->by_copies) {
        comm_open_nccl(c);
    }
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&c->stream, cudaStreamNonBlocking, greatest));
    CUDA_CHECK(cudaEventCreateWithFlags(&c->ready, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&c->here, cudaEventDisableTiming));
    c->gathered = NEW(cudaEvent_t, c->bucket_count);
    c->arriving = NEW(int, c->bucket_count);
    for (int b = 0; b < c->bucket_count; b++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&c->gathered[b], cudaEventDisableTiming));
    }
    c->out = NEW(Slice, c->ranks);
    c->in = NEW(Slice, c->ranks);
    check_format(c->run, sizeof(c->run), "%s", ranks_token(star));
}

// nobody's memory goes while another may still write into it
static inline void comm_close(Comm *c) {
    if (c->ranks == 1) {
        return;
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    ranks_barrier(c->star);
    for (int i = 0; i < REGION_COUNT && c->by_copies; i++) {
        for (int p = 0; p < c->ranks; p++) {
            if (c->regions[i].peers[p] != NULL) {
                CUDA_CHECK(cudaIpcCloseMemHandle(c->regions[i].peers[p]));
            }
        }
    }
    ranks_barrier(c->star);
    for (int b = 0; b < c->bucket_count; b++) {
        CUDA_CHECK(cudaEventDestroy(c->gathered[b]));
    }
    waits_close(&c->waits);
    CUDA_CHECK(cudaEventDestroy(c->ready));
    CUDA_CHECK(cudaEventDestroy(c->here));
#ifdef REMOE_NCCL
    if (!c->by_copies) {
        NCCL_CHECK(ncclCommDestroy(c->nccl));
    }
#endif
    CUDA_CHECK(cudaStreamDestroy(c->stream));
    free(c->gathered);
    free(c->arriving);
    free(c->out);
    free(c->in);
}

#endif
