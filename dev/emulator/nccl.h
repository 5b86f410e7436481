/*
emulator: the part of NVIDIA's nccl.h that remoe.c uses, for ranks that are processes of one machine.

A communicator is a file without a name that all ranks have mapped; its first owner made it with the unique id, which
says where it is to be found (/proc/PID/fd/N): it goes with its processes. From each rank to each other leads a
channel, a ring of bytes that carries one message after the other. All calls are made of messages: a collective sends
each rank what it needs of this one, and sums are added up where they belong, in the order of the ranks. A group, or a
call outside of one, is a set: its messages travel at the same time, and it ends when all have arrived.

What NCCL does not do: it notices calls that do not match, where NCCL hangs or mixes up bytes. A message says of which
call it is; and where ranks wait for each other in a circle, none with a call that the other waits for, none will ever
go on. Both ranks are named then, and all end.
*/
#ifndef EMULATOR_NCCL_H
#define EMULATOR_NCCL_H

#include <atomic>
#include <climits>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <vector>

#define NCCL_MAJOR 2
#define NCCL_MINOR 28
#define NCCL_PATCH 9
#define NCCL_VERSION(x, y, z) ((x)*10000 + (y)*100 + (z))
#define NCCL_VERSION_CODE NCCL_VERSION(NCCL_MAJOR, NCCL_MINOR, NCCL_PATCH)

typedef struct EmulatorComm *ncclComm_t;
enum { NCCL_UNIQUE_ID_BYTES = 128 };
typedef struct {
    char internal[NCCL_UNIQUE_ID_BYTES];
} ncclUniqueId;

typedef enum {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
    ncclNumResults = 8
} ncclResult_t;

typedef enum {
    ncclInt8 = 0,
    ncclChar = 0,
    ncclUint8 = 1,
    ncclInt32 = 2,
    ncclInt = 2,
    ncclUint32 = 3,
    ncclInt64 = 4,
    ncclUint64 = 5,
    ncclFloat16 = 6,
    ncclHalf = 6,
    ncclFloat32 = 7,
    ncclFloat = 7,
    ncclFloat64 = 8,
    ncclDouble = 8,
    ncclBfloat16 = 9,
    ncclNumTypes = 10
} ncclDataType_t;

typedef enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4, ncclNumOps = 5 } ncclRedOp_t;

#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_CONFIG_UNDEF_PTR NULL
#define NCCL_CTA_POLICY_DEFAULT 0x00
#define NCCL_CTA_POLICY_EFFICIENCY 0x01
#define NCCL_CTA_POLICY_ZERO 0x02

// accepted, and without effect: every communicator is a blocking one
typedef struct {
    size_t size;
    unsigned magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char *netName;
    int splitShare, trafficClass;
    const char *commName;
    int collnetEnable, CTAPolicy, shrinkShare, nvlsCTAs, nChannelsPerNetPeer, nvlinkCentricSched;
} ncclConfig_t;

#define NCCL_CONFIG_INITIALIZER                                                                              \
    {                                                                                                        \
        sizeof(ncclConfig_t), 0xcafebeef, NCCL_VERSION_CODE, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,   \
            NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT,      \
            NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_PTR, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT,      \
            NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT, NCCL_CONFIG_UNDEF_INT       \
    }

namespace emulator {

enum { NCCL_MOST_RANKS = 64, CHANNEL_BYTES = 256 * 1024, SET_TEXT = 512 };

typedef enum {
    CALL_SEND,
    CALL_RECV,
    CALL_ALL_GATHER,
    CALL_ALL_REDUCE,
    CALL_REDUCE_SCATTER,
    CALL_BROADCAST
} CallKind;

// a call with its arguments; `peer` is a broadcast's root, too
struct Call {
    CallKind kind;
    const void *from;
    void *to;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t sum;
    int peer;
};

// ----------------------------------------------------------------------------
// what ranks share

// what both ends of a message must say of it. A send and its recv say the same
struct Message {
    int kind, type, sum, peer;
    uint64_t count;
};

// From one rank to another. Messages are counted; the next begins when all before it have been taken
struct Channel {
    std::atomic<uint64_t> posted; // messages that the sender has to send
    std::atomic<uint64_t> wanted; // that the receiver waits for, so far
    std::atomic<uint64_t> begun;  // the last one has `message`
    std::atomic<uint64_t> taken;  // by the receiver, in full
    Message message;
    std::atomic<uint64_t> written, read; // bytes, of all messages
    alignas(64) unsigned char ring[CHANNEL_BYTES];
};

struct RankState {
    std::atomic<uint64_t> turn; // odd: in a set
    std::atomic<int> here, gone;
    char set[SET_TEXT]; // what is in it
};

struct CommFile {
    std::atomic<int> ranks, joined, broken;
    RankState states[NCCL_MOST_RANKS];
    alignas(64) Channel channels[]; // [from][to]
};

} // namespace emulator

struct EmulatorComm {
    int rank, ranks;
    emulator::CommFile *file;
    std::shared_ptr<emulator::Record> last; // the end of the set that was queued last
    std::atomic<bool> aborted;
};

namespace emulator {

static inline Channel *channel(ncclComm_t comm, int from, int to) {
    return &comm->file->channels[from * comm->ranks + to];
}

static inline size_t comm_bytes(int ranks) {
    return sizeof(CommFile) + (size_t)ranks * (size_t)ranks * sizeof(Channel);
}

static inline size_t type_bytes(ncclDataType_t type) {
    static const size_t bytes[ncclNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
    return bytes[type];
}

// ----------------------------------------------------------------------------
// names

static inline std::string name_of(const Call &call) {
    static const char *const kinds[] = {"ncclSend",      "ncclRecv",          "ncclAllGather",
                                        "ncclAllReduce", "ncclReduceScatter", "ncclBroadcast"};
    static const char *const types[] = {"ncclInt8",    "ncclUint8",   "ncclInt32",   "ncclUint32",
                                        "ncclInt64",   "ncclUint64",  "ncclFloat16", "ncclFloat32",
                                        "ncclFloat64", "ncclBfloat16"};
    std::string text = kinds[call.kind], peer = std::to_string(call.peer);
    text += " of " + std::to_string(call.count) + " " + types[call.type];
    if (call.kind == CALL_ALL_REDUCE || call.kind == CALL_REDUCE_SCATTER) {
        text += call.sum == ncclSum ? " (ncclSum)" : " (ncclMax)";
    }
    return text + (call.kind == CALL_SEND                                  ? " to rank " + peer
                   : call.kind == CALL_RECV || call.kind == CALL_BROADCAST ? " from rank " + peer
                                                                           : "");
}

static inline std::string name_of(const std::vector<Call> &calls) {
    std::string text = calls.size() > 1 ? "a group: " : "";
    for (size_t i = 0; i < calls.size() && text.size() < SET_TEXT; i++) {
        text += (i > 0 ? ", " : "") + name_of(calls[i]);
    }
    return text;
}

// the first that finds out says it; the others end with it
static inline void break_off(ncclComm_t comm, int other, const char *why) {
    if (comm->file->broken.exchange(1) == 0) {
        int me = comm->rank, first = me < other ? me : other, second = me < other ? other : me;
        fflush(stdout);
        fprintf(stderr, "emulator: %s: rank %d is in %s; rank %d in %s\n", why, first,
                comm->file->states[first].set, second, comm->file->states[second].set);
    }
    abort();
}

// ----------------------------------------------------------------------------
// ranks that wait for each other

// rank r waits for what is not in the set that p is in
static inline bool waits_for_more(ncclComm_t comm, int r, int p) {
    const Channel *out = channel(comm, r, p), *in = channel(comm, p, r);
    bool unsent = out->taken < out->posted && out->wanted < out->posted;
    bool unreceived = in->taken < in->wanted && in->posted < in->wanted;
    return unsent || unreceived;
}

// The first rank of a way that leads from this one, waiting for the next, back to it; -1: there is none. While ranks
// stay in their sets, what they wait for in each other stays, too: turns tell
static inline int circle(ncclComm_t comm) {
    uint64_t turns[NCCL_MOST_RANKS];
    int first[NCCL_MOST_RANKS], queue[NCCL_MOST_RANKS], queued = 0,
                                                        last = -1; // breadth first; where the way began
    int way_back = -1;
    for (int r = 0; r < comm->ranks; r++) {
        turns[r] = comm->file->states[r].turn;
        first[r] = -1;
    }
    queue[queued++] = comm->rank;
    for (int i = 0; i < queued && way_back < 0; i++) {
        for (int p = 0; p < comm->ranks && way_back < 0; p++) {
            int r = queue[i];
            if (p == r || turns[p] % 2 == 0 || !waits_for_more(comm, r, p)) {
                continue;
            }
            if (p == comm->rank) {
                way_back = first[r];
            } else if (first[p] < 0) {
                first[p] = r == comm->rank ? p : first[r];
                queue[queued++] = p;
            }
        }
    }
    for (int i = 0; i < queued; i++) {
        last = comm->file->states[queue[i]].turn != turns[queue[i]] ? -1 : way_back;
        if (last < 0) {
            return -1;
        }
    }
    return way_back;
}

static inline void find_hang(ncclComm_t comm) {
    int other = waits_for_more(comm, comm->rank, comm->rank) ? comm->rank : circle(comm);
    if (other >= 0) {
        break_off(comm, other, "NCCL's calls do not match, and would wait for each other for ever");
    }
    for (int p = 0; p < comm->ranks; p++) {
        if (comm->file->states[p].gone && waits_for_more(comm, comm->rank, p)) {
            snprintf(comm->file->states[p].set, SET_TEXT, "none: it has left the communicator");
            break_off(comm, p, "NCCL's calls do not match");
        }
    }
}

// ----------------------------------------------------------------------------
// messages

struct Transfer {
    bool sends, done;
    int peer;
    unsigned char *data;
    size_t bytes, moved;
    Message message;
    uint64_t number;
};

static inline void move_out(Channel *c, Transfer *t) {
    if (c->taken == t->number - 1 && c->begun < t->number) {
        c->message = t->message;
        c->begun = t->number;
    }
    while (c->begun == t->number && t->moved < t->bytes) {
        size_t at = c->written % CHANNEL_BYTES, room = CHANNEL_BYTES - (c->written - c->read);
        size_t n = std::min(t->bytes - t->moved, std::min(room, CHANNEL_BYTES - at));
        if (n == 0) {
            return;
        }
        memcpy(c->ring + at, t->data + t->moved, n);
        t->moved += n;
        c->written += n;
    }
    t->done = c->taken >= t->number;
}

static inline void move_in(ncclComm_t comm, Channel *c, Transfer *t) {
    if (c->begun != t->number) {
        return;
    }
    if (memcmp(&c->message, &t->message, sizeof(Message)) != 0) {
        break_off(comm, t->peer, "NCCL's calls do not match");
    }
    while (t->moved < t->bytes) {
        size_t at = c->read % CHANNEL_BYTES, n = std::min(c->written - c->read, CHANNEL_BYTES - at);
        if (n == 0) {
            return;
        }
        memcpy(t->data + t->moved, c->ring + at, n);
        t->moved += n;
        c->read += n;
    }
    c->taken = t->number;
    t->done = true;
}

// ----------------------------------------------------------------------------
// sums

template <class T> static void add(void *sum, const void *x, size_t n, ncclRedOp_t how) {
    T *into = (T *)sum;
    const T *part = (const T *)x;
    for (size_t i = 0; i < n; i++) {
        into[i] = how == ncclSum ? (T)(into[i] + part[i]) : part[i] > into[i] ? part[i] : into[i];
    }
}

template <> inline void add<__nv_bfloat16>(void *sum, const void *x, size_t n, ncclRedOp_t how) {
    __nv_bfloat16 *into = (__nv_bfloat16 *)sum;
    for (size_t i = 0; i < n; i++) {
        float a = __bfloat162float(into[i]), b = __bfloat162float(((const __nv_bfloat16 *)x)[i]);
        into[i] = __float2bfloat16(how == ncclSum ? a + b : b > a ? b : a);
    }
}

static inline void add(void *sum, const void *x, size_t n, ncclDataType_t type, ncclRedOp_t how) {
    switch (type) {
    case ncclInt8: add<int8_t>(sum, x, n, how); break;
    case ncclUint8: add<uint8_t>(sum, x, n, how); break;
    case ncclInt32: add<int32_t>(sum, x, n, how); break;
    case ncclUint32: add<uint32_t>(sum, x, n, how); break;
    case ncclInt64: add<int64_t>(sum, x, n, how); break;
    case ncclUint64: add<uint64_t>(sum, x, n, how); break;
    case ncclFloat32: add<float>(sum, x, n, how); break;
    case ncclFloat64: add<double>(sum, x, n, how); break;
    case ncclBfloat16: add<__nv_bfloat16>(sum, x, n, how); break;
    default: break; // refused when it was called
    }
}

// ----------------------------------------------------------------------------
// sets

struct Set {
    ncclComm_t comm;
    cudaStream_t stream;
    std::vector<Call> calls;
    std::vector<Transfer> transfers;
    std::vector<std::vector<unsigned char>> parts; // of sums: by call, [ranks][count]
    bool begun, ended;
    unsigned tries;
};

static inline void exchange(Set *set, const Call &call, bool sends, int peer, const void *data,
                            size_t bytes) {
    Message message = {call.kind == CALL_RECV ? CALL_SEND : call.kind, call.type, 0, 0, call.count};
    message.peer = call.kind == CALL_BROADCAST ? call.peer : 0;
    message.sum = call.kind == CALL_ALL_REDUCE || call.kind == CALL_REDUCE_SCATTER ? (int)call.sum : 0;
    set->transfers.push_back({sends, false, peer, (unsigned char *)data, bytes, 0, message, 0});
}

static inline void plan_gather(Set *set, const Call &call, size_t bytes) {
    int me = set->comm->rank;
    unsigned char *own = (unsigned char *)call.to + (size_t)me * bytes;
    for (int i = 1; i < set->comm->ranks; i++) {
        int p = (me + i) % set->comm->ranks;
        exchange(set, call, true, p, call.from, bytes);
        exchange(set, call, false, p, (unsigned char *)call.to + (size_t)p * bytes, bytes);
    }
    if (own != call.from && bytes > 0) {
        memmove(own, call.from, bytes);
    }
}

// every rank's share of a sum comes here, as far as this rank adds it up
static inline void plan_sum(Set *set, const Call &call, size_t bytes, std::vector<unsigned char> *parts) {
    int me = set->comm->rank;
    bool scatters = call.kind == CALL_REDUCE_SCATTER;
    const unsigned char *from = (const unsigned char *)call.from;
    parts->resize((size_t)set->comm->ranks * bytes);
    for (int i = 1; i < set->comm->ranks; i++) {
        int p = (me + i) % set->comm->ranks;
        exchange(set, call, true, p, from + (scatters ? (size_t)p * bytes : 0), bytes);
        exchange(set, call, false, p, parts->data() + (size_t)p * bytes, bytes);
    }
    if (bytes > 0) {
        memcpy(parts->data() + (size_t)me * bytes, from + (scatters ? (size_t)me * bytes : 0), bytes);
    }
}

static inline void plan_broadcast(Set *set, const Call &call, size_t bytes) {
    int me = set->comm->rank;
    if (me != call.peer) {
        exchange(set, call, false, call.peer, call.to, bytes);
        return;
    }
    for (int i = 1; i < set->comm->ranks; i++) {
        exchange(set, call, true, (me + i) % set->comm->ranks, call.from, bytes);
    }
    if (call.to != call.from && bytes > 0) {
        memmove(call.to, call.from, bytes);
    }
}

static inline void plan(Set *set) {
    set->parts.resize(set->calls.size());
    for (size_t i = 0; i < set->calls.size(); i++) {
        const Call &call = set->calls[i];
        size_t bytes = call.count * type_bytes(call.type);
        switch (call.kind) {
        case CALL_SEND: exchange(set, call, true, call.peer, call.from, bytes); break;
        case CALL_RECV: exchange(set, call, false, call.peer, call.to, bytes); break;
        case CALL_ALL_GATHER: plan_gather(set, call, bytes); break;
        case CALL_ALL_REDUCE:
        case CALL_REDUCE_SCATTER: plan_sum(set, call, bytes, &set->parts[i]); break;
        case CALL_BROADCAST: plan_broadcast(set, call, bytes); break;
        }
    }
}

// others see what the set has before they see that it has begun
static inline void begin(Set *set) {
    ncclComm_t comm = set->comm;
    RankState *state = &comm->file->states[comm->rank];
    set->begun = true;
    plan(set);
    for (Transfer &t : set->transfers) {
        t.number = t.sends ? ++channel(comm, comm->rank, t.peer)->posted
                           : ++channel(comm, t.peer, comm->rank)->wanted;
    }
    snprintf(state->set, SET_TEXT, "%s", name_of(set->calls).c_str());
    state->turn++;
}

static inline void end(Set *set) {
    ncclComm_t comm = set->comm;
    for (size_t i = 0; i < set->calls.size(); i++) {
        const Call &call = set->calls[i];
        size_t bytes = set->parts[i].size() / (size_t)comm->ranks;
        if (bytes == 0) {
            continue;
        }
        memcpy(call.to, set->parts[i].data(), bytes);
        for (int r = 1; r < comm->ranks; r++) {
            add(call.to, set->parts[i].data() + (size_t)r * bytes, call.count, call.type, call.sum);
        }
    }
    set->ended = true;
    comm->file->states[comm->rank].turn++;
}

// moves what can be moved; whether all is done
static inline bool advance(Set *set) {
    ncclComm_t comm = set->comm;
    bool all = true;
    if (set->ended || comm->aborted) {
        return true;
    }
    if (!set->begun) {
        begin(set);
    }
    for (Transfer &t : set->transfers) {
        if (!t.done && t.sends) {
            move_out(channel(comm, comm->rank, t.peer), &t);
        } else if (!t.done) {
            move_in(comm, channel(comm, t.peer, comm->rank), &t);
        }
        all &= t.done;
    }
    if (!all) {
        if (comm->file->broken) {
            abort(); // another rank has said why
        }
        if (++set->tries % 64 == 0) {
            find_hang(comm);
        }
        return false;
    }
    end(set);
    return true;
}

static inline std::string waits_in(const Set *set) {
    std::string text = "others in " + name_of(set->calls);
    for (const Transfer &t : set->transfers) {
        if (!t.done) {
            return text + ": rank " + std::to_string(set->comm->rank) +
                   (t.sends ? " sends to " : " receives from ") + "rank " + std::to_string(t.peer);
        }
    }
    return text;
}

// Sets of a communicator are done in the order of their calls, whatever their streams
static inline void queue_set(const std::shared_ptr<Set> &set) {
    ncclComm_t comm = set->comm;
    queue_wait_for(set->stream, comm->last);
    queue_wait(
        set->stream, [set]() { return advance(set.get()); }, [set]() { return waits_in(set.get()); });
    comm->last = queue_record(set->stream);
}

// ----------------------------------------------------------------------------
// groups

struct Group {
    int depth;
    std::vector<std::shared_ptr<Set>> sets; // one a communicator
};

static inline Group *group() {
    static thread_local Group here;
    return &here;
}

static inline std::shared_ptr<Set> set_of(ncclComm_t comm, cudaStream_t stream) {
    for (const std::shared_ptr<Set> &set : group()->sets) {
        if (set->comm == comm) {
            return set;
        }
    }
    std::shared_ptr<Set> set = std::make_shared<Set>();
    set->comm = comm;
    set->stream = stream;
    group()->sets.push_back(set);
    return set;
}

// Early streams: the sets of a group at the same time, since ranks may have them in other orders
static inline void end_group() {
    std::vector<std::shared_ptr<Set>> sets = std::move(group()->sets);
    group()->sets.clear();
    if (early() && !sets.empty()) {
        wait_until(
            [&]() {
                bool all = true;
                for (const std::shared_ptr<Set> &set : sets) {
                    all &= advance(set.get());
                }
                return all;
            },
            [&]() { return waits_in(sets[0].get()); });
        return;
    }
    for (const std::shared_ptr<Set> &set : sets) {
        queue_set(set);
    }
}

static inline ncclResult_t call(ncclComm_t comm, cudaStream_t stream, const Call &what) {
    bool adds = what.kind == CALL_ALL_REDUCE || what.kind == CALL_REDUCE_SCATTER;
    if (comm == NULL || (unsigned)what.type >= ncclNumTypes || what.peer < 0 || what.peer >= comm->ranks) {
        return ncclInvalidArgument;
    }
    if (adds && (what.type == ncclFloat16 || (what.sum != ncclSum && what.sum != ncclMax))) {
        return ncclInvalidArgument; // not emulated
    }
    if (what.count > 0 && ((what.from != NULL && memory_kind(what.from) == MEMORY_PAGEABLE) ||
                           (what.to != NULL && memory_kind(what.to) == MEMORY_PAGEABLE))) {
        return ncclInvalidArgument; // a GPU cannot reach it
    }
    std::shared_ptr<Set> set = set_of(comm, stream);
    set->calls.push_back(what);
    if (set->stream != stream) {
        fprintf(stderr, "emulator: a group with calls of one communicator in two streams: not emulated\n");
        abort();
    }
    if (group()->depth == 0) {
        end_group();
    }
    return ncclSuccess;
}

// ----------------------------------------------------------------------------
// communicators

// the unique ids that this process has made, and their files
struct UniqueFile {
    std::string name;
    int fd;
};

static inline std::vector<UniqueFile> *unique_files() {
    static std::vector<UniqueFile> *files = new std::vector<UniqueFile>();
    return files;
}

static inline CommFile *map_comm(const char *path, int ranks) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return NULL;
    }
    void *file =
        ftruncate(fd, (off_t)comm_bytes(ranks)) != 0
            ? MAP_FAILED
            : mmap(NULL, comm_bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    close(fd);
    return file == MAP_FAILED ? NULL : (CommFile *)file;
}

// all have it mapped: its name is no longer needed
static inline void close_unique_file(const char *name) {
    std::vector<UniqueFile> *files = unique_files();
    for (size_t i = 0; i < files->size(); i++) {
        if ((*files)[i].name == name) {
            close((*files)[i].fd);
            files->erase(files->begin() + (int64_t)i);
            return;
        }
    }
}

static inline ncclResult_t join(ncclComm_t comm) {
    int none = 0;
    CommFile *file = comm->file;
    bool first = file->ranks.compare_exchange_strong(none, comm->ranks);
    if ((!first && none != comm->ranks) || file->states[comm->rank].here.exchange(1) != 0) {
        fprintf(stderr,
                "emulator: rank %d of %d of an NCCL communicator: there are %d, or it is there already\n",
                comm->rank, comm->ranks, file->ranks.load());
        return ncclInvalidUsage;
    }
    file->joined++;
    wait_until([&]() { return file->joined == comm->ranks; },
               [&]() {
                   return "an NCCL communicator of " + std::to_string(comm->ranks) + " ranks, of which " +
                          std::to_string(file->joined) + " are there";
               });
    return ncclSuccess;
}

} // namespace emulator

// ----------------------------------------------------------------------------
// NCCL's functions

static inline const char *ncclGetErrorString(ncclResult_t result) {
    static const char *const texts[ncclNumResults] = {"no error",
                                                      "unhandled cuda error",
                                                      "unhandled system error",
                                                      "internal error",
                                                      "invalid argument",
                                                      "invalid usage",
                                                      "remote process exited or there was a network error",
                                                      "NCCL operation in progress"};
    return (unsigned)result < ncclNumResults ? texts[result] : "unknown result code";
}

static inline const char *ncclGetLastError(ncclComm_t) {
    return "";
}

static inline ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

static inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    int fd = memfd_create("emulated NCCL", MFD_CLOEXEC);
    if (fd < 0) {
        return ncclSystemError;
    }
    memset(id, 0, sizeof(*id));
    snprintf(id->internal, sizeof(id->internal), "/proc/%d/fd/%d", getpid(), fd);
    emulator::unique_files()->push_back({id->internal, fd});
    return ncclSuccess;
}

static inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                                                  const ncclConfig_t *) {
    if (ranks < 1 || ranks > emulator::NCCL_MOST_RANKS || rank < 0 || rank >= ranks) {
        return ncclInvalidArgument;
    }
    emulator::CommFile *file = emulator::map_comm(id.internal, ranks);
    if (file == NULL) { // who made the id is gone
        return ncclSystemError;
    }
    *comm = new EmulatorComm{rank, ranks, file, nullptr, false};
    ncclResult_t result = emulator::join(*comm);
    emulator::close_unique_file(id.internal);
    return result;
}

static inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, ranks, id, rank, NULL);
}

static inline ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    if (!emulator::is_over(comm->last.get())) {
        emulator::finish(comm->last->stream, comm->last.get());
    }
    comm->file->states[comm->rank].gone = 1;
    munmap(comm->file, emulator::comm_bytes(comm->ranks));
    delete comm;
    return ncclSuccess;
}

// what is queued ends without being done; it still names the communicator, which therefore stays in memory
static inline ncclResult_t ncclCommAbort(ncclComm_t comm) {
    comm->aborted = true;
    comm->file->states[comm->rank].gone = 1;
    return ncclSuccess;
}

static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

static inline ncclResult_t ncclCommCount(ncclComm_t comm, int *count) {
    *count = comm->ranks;
    return ncclSuccess;
}

static inline ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

static inline ncclResult_t ncclGroupStart() {
    emulator::group()->depth++;
    return ncclSuccess;
}

static inline ncclResult_t ncclGroupEnd() {
    if (emulator::group()->depth == 0) {
        return ncclInvalidUsage;
    }
    if (--emulator::group()->depth == 0) {
        emulator::end_group();
    }
    return ncclSuccess;
}

static inline ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t type, int peer,
                                    ncclComm_t comm, cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_SEND, from, NULL, count, type, ncclSum, peer});
}

static inline ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                                    cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_RECV, NULL, to, count, type, ncclSum, peer});
}

// `to` has count elements a rank
static inline ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type,
                                         ncclComm_t comm, cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_ALL_GATHER, from, to, count, type, ncclSum, 0});
}

static inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type,
                                         ncclRedOp_t sum, ncclComm_t comm, cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_ALL_REDUCE, from, to, count, type, sum, 0});
}

// `from` has count elements a rank
static inline ncclResult_t ncclReduceScatter(const void *from, void *to, size_t count, ncclDataType_t type,
                                             ncclRedOp_t sum, ncclComm_t comm, cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_REDUCE_SCATTER, from, to, count, type, sum, 0});
}

static inline ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type,
                                         int root, ncclComm_t comm, cudaStream_t stream) {
    return emulator::call(comm, stream, {emulator::CALL_BROADCAST, from, to, count, type, ncclSum, root});
}

#endif
