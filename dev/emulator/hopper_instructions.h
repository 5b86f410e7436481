/*
emulator: Hopper's instructions, in place of the PTX of hopper.cuh and wgmma.cuh: same functions, same arguments.
See there for what each does, and cuda_runtime.h beside for the rest of the emulator.

What is asynchronous is done as late as it may be:
    copies to shared memory (cp.async, TMA)   when each of the block's threads has had its turn
    wgmma, with its registers for A           at the wait that covers it
    TMA's stores and additions                at the wait that lets the thread write the memory again
so whoever reads before its barrier finds NaN, and whoever gives memory back too early spoils numbers. What this
does not show: missing fences between the generic and the asynchronous proxy, and PTX that is wrong.

Barrier, 8 bytes of shared memory: arrivals that a phase needs, those still missing, and 2 x (bytes still
missing) + phase; a phase ends when both are 0.
*/
#ifndef EMULATOR_HOPPER_INSTRUCTIONS_H
#define EMULATOR_HOPPER_INSTRUCTIONS_H

#include "cuda.h"
#include "cuda_bf16.h"

namespace emulator {

enum {
    GROUP = 128,         // threads of a warpgroup
    SHARED_BEGIN = 1024, // address of shared memory's first byte
    LATE_TURNS = 3       // of all threads, before a wait for wgmma ends
};

struct Barrier {
    uint16_t count, missing;
    int32_t state;
};

struct Copy { // to shared memory; or an arrival behind such
    enum { BYTES16, ARRIVAL, BOX } kind;
    uint32_t to, barrier;
    const void *from; // NULL: zeros
    CUtensorMap map;
    int at[MOST_DIMS];
    unsigned blocks; // bit 0: this block's shared memory, bit 1: its partner's
};

struct Store {
    CUtensorMap map;
    uint32_t from;
    int at[MOST_DIMS];
    bool adds;
};

struct ThreadStores {
    std::vector<Store> open; // not committed
    std::deque<std::vector<Store>> groups;
};

struct Product { // a warpgroup's wgmma
    int N, add_to, across_a, across_b, number;
    uint64_t a, b;
    const uint32_t *registers[GROUP]; // A, or NULL: in shared memory
    float *acc[GROUP];
};

struct Meeting {
    int arrived;
    unsigned generation;
};

struct Async {
    std::vector<Copy> copies;
    ThreadStores stores[MOST_THREADS];
    std::deque<Product> products[MOST_THREADS / GROUP];
    int first[MOST_THREADS / GROUP];       // number of the deque's first product
    int issued[MOST_THREADS];              // products, by thread
    std::deque<int> commits[MOST_THREADS]; // how many were issued at each commit that no wait has covered
    Meeting group[MOST_THREADS / GROUP], named[16], cluster;
    Async() : first(), issued(), group(), named(), cluster() {
    }
};

static inline void fail(const char *what) {
    fprintf(stderr, "emulator: %s\n", what);
    abort();
}

static inline unsigned char *shared_at(Block *b, uint32_t address, size_t bytes) {
    if (address < SHARED_BEGIN || address - SHARED_BEGIN + bytes > b->shared.size()) {
        fail("an address outside shared memory");
    }
    return shared_memory_of(b) + (address - SHARED_BEGIN);
}

// ----------------------------------------------------------------------------
// barriers

static inline void change(Block *b, uint32_t address, int arrivals, int bytes) {
    Barrier *barrier = (Barrier *)shared_at(b, address, sizeof(Barrier));
    if (address % 8 != 0 || barrier->missing < arrivals || barrier->count == 0xffff) {
        fail("an arrival at a barrier that expects none");
    }
    barrier->missing = (uint16_t)(barrier->missing - arrivals);
    barrier->state += 2 * bytes;
    if (barrier->missing == 0 && barrier->state >> 1 == 0) {
        barrier->missing = barrier->count;
        barrier->state ^= 1;
    }
    b->progress = true;
}

static inline void meet(Meeting *meeting, int threads) {
    barrier(&meeting->arrived, &threads, &meeting->generation);
}

// ----------------------------------------------------------------------------
// boxes of tensors

static inline int box_bytes(const CUtensorMap &map) {
    int bytes = map.size;
    for (int size : map.box) {
        bytes *= size;
    }
    return bytes;
}

// f(shared offset, address in the tensor or NULL) for each 16 bytes of the box; the last may be cut off
template <class F>
static void for_pieces(const CUtensorMap &map, const int at[MOST_DIMS], uint32_t shared, F f) {
    int row_bytes = map.box[0] * map.size, bytes = box_bytes(map);
    for (int byte = 0; byte < bytes; byte += 16) {
        uint32_t linear = shared + (uint32_t)byte;
        uint32_t place = linear ^ (linear >> 7 & (uint32_t)map.swizzle) << 4;
        int64_t column = at[0] + byte % row_bytes / map.size, left = (map.sizes[0] - column) * map.size;
        bool inside = column >= 0 && left > 0;
        int64_t offset = column * map.size;
        for (int i = 1, row = byte / row_bytes; i < MOST_DIMS; row /= map.box[i], i++) {
            int64_t place_of = (int64_t)at[i] + row % map.box[i];
            inside &= place_of >= 0 && place_of < map.sizes[i];
            offset += place_of * map.strides[i];
        }
        f(place, inside ? map.base + offset : NULL, (size_t)(left < 16 ? left : 16));
    }
}

static inline void load_box(Block *b, const Copy &copy) {
    if (copy.to % 128 != 0 || (copy.map.swizzle == 7 && copy.to % 1024 != 0)) {
        fail("TMA: shared memory is not aligned");
    }
    for_pieces(copy.map, copy.at, copy.to, [&](uint32_t place, const unsigned char *from, size_t bytes) {
        unsigned char *to = shared_at(b, place, 16);
        memset(to, 0, 16);
        if (from != NULL) {
            memcpy(to, from, bytes);
        }
    });
    change(b, copy.barrier, 0, -box_bytes(copy.map));
}

static inline void store_box(Block *b, const Store &store) {
    for_pieces(store.map, store.at, store.from, [&](uint32_t place, unsigned char *to, size_t bytes) {
        const unsigned char *from = shared_at(b, place, 16);
        for (size_t i = 0; to != NULL && store.adds && i < bytes; i += 4) {
            *(float *)(to + i) += *(const float *)(from + i);
        }
        if (to != NULL && !store.adds) {
            memcpy(to, from, bytes);
        }
    });
}

// all but the newest `pending` groups of the running thread
static inline void finish_stores(Block *b, size_t pending) {
    ThreadStores *mine = &b->async->stores[b->current];
    while (mine->groups.size() > pending) {
        for (const Store &store : mine->groups.front()) {
            store_box(b, store);
        }
        mine->groups.pop_front();
    }
}

// ----------------------------------------------------------------------------
// a block's asynchronous work

static inline bool do_copies(Block *b) {
    std::vector<Copy> copies;
    copies.swap(b->async->copies);
    for (const Copy &copy : copies) {
        if (copy.kind == Copy::BYTES16) {
            unsigned char *to = shared_at(b, copy.to, 16);
            memset(to, 0, 16);
            if (copy.from != NULL) {
                memcpy(to, copy.from, 16);
            }
        } else if (copy.kind == Copy::ARRIVAL) {
            change(b, copy.barrier, 1, 0);
        } else {
            for (int i = 0; i < 2; i++) {
                if (copy.blocks >> i & 1) {
                    load_box(b->rank == i ? b : b->partner, copy);
                }
            }
        }
    }
    return !copies.empty();
}

static inline void end_async(Block *b) {
    for (int t = 0; t < threads_of(b); t++) {
        if (!b->async->stores[t].groups.empty() || !b->async->stores[t].open.empty()) {
            fail("a thread has left the kernel before its TMA stores had read shared memory");
        }
    }
    for (const std::deque<Product> &products : b->async->products) {
        if (!products.empty()) {
            fail("a warpgroup has left the kernel without a wait for its wgmma");
        }
    }
    delete b->async;
    b->async = NULL;
    b->do_async = NULL;
    b->end_async = NULL;
}

static inline Async *async() {
    Block *b = here();
    if (b->async == NULL) {
        b->async = new Async;
        b->do_async = do_copies;
        b->end_async = end_async;
    }
    return b->async;
}

// ----------------------------------------------------------------------------
// wgmma

// the number at (m, k) of a swizzled operand
static inline float operand(Block *b, uint64_t descriptor, int across, int m, int k) {
    uint32_t begin = (uint32_t)(descriptor & 0x3fff) << 4, block = (uint32_t)(descriptor >> 16 & 0x3fff) << 4,
             group = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
    uint32_t line = (uint32_t)(across ? k : m), within = (uint32_t)(across ? m % 64 : k);
    uint32_t linear =
        begin + (across ? (uint32_t)m / 64 * block : 0) + line / 8 * group + line % 8 * 128 + within * 2;
    __nv_bfloat16 number;
    memcpy(&number, shared_at(b, linear ^ (linear >> 7 & 7) << 4, 2), 2);
    return __bfloat162float(number);
}

static inline float register_operand(const Product &p, int m, int k) {
    int thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2;
    __nv_bfloat16 pair[2];
    memcpy(pair, &p.registers[thread][k / 8 * 2 + m % 16 / 8], 4);
    return __bfloat162float(pair[k % 2]);
}

static inline void multiply(Block *block, const Product &p) {
    float a[16][64], b[16][256];
    for (int k = 0; k < 16; k++) {
        for (int m = 0; m < 64; m++) {
            a[k][m] =
                p.registers[0] != NULL ? register_operand(p, m, k) : operand(block, p.a, p.across_a, m, k);
        }
        for (int n = 0; n < p.N; n++) {
            b[k][n] = operand(block, p.b, p.across_b, n, k);
        }
    }
    for (int m = 0; m < 64; m++) {
        float sums[256] = {0};
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < p.N; n++) {
                sums[n] += a[k][m] * b[k][n];
            }
        }
        for (int n = 0; n < p.N; n++) {
            float *acc = p.acc[m / 16 * 32 + m % 8 * 4 + n % 8 / 2];
            float *at = acc + n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
            *at = (p.add_to ? *at : 0.0f) + sums[n];
        }
    }
}

// the running thread's share of a product: it is its warpgroup's next
static inline void issue(int count, float *acc, const uint32_t *registers, uint64_t a, uint64_t b, int add_to,
                         int across_a, int across_b) {
    Async *state = async();
    int me = here()->current, group = me / GROUP, number = state->issued[me]++;
    std::deque<Product> *products = &state->products[group];
    size_t index = (size_t)(number - state->first[group]);
    if (index == products->size()) {
        Product p;
        memset(&p, 0, sizeof(p));
        p.N = 2 * count;
        p.add_to = add_to;
        p.across_a = across_a;
        p.across_b = across_b;
        p.number = number;
        p.a = a;
        p.b = b;
        products->push_back(p);
    }
    Product *p = &(*products)[index];
    if (p->N != 2 * count || p->a != a || p->b != b || p->add_to != add_to) {
        fail("the threads of a warpgroup differ in their wgmma");
    }
    p->registers[me % GROUP] = registers;
    p->acc[me % GROUP] = acc;
}

static inline void wait_products(size_t pending) {
    Async *state = async();
    Block *b = here();
    int me = b->current, group = me / GROUP;
    std::deque<int> *commits = &state->commits[me];
    int end = 0; // number of the first product that may go on
    while (commits->size() > pending) {
        end = commits->front();
        commits->pop_front();
    }
    meet(&state->group[group], GROUP);
    for (int turn = 0; turn < LATE_TURNS; turn++) { // others may use memory that was given back too early
        here()->progress = true;
        yield();
    }
    std::deque<Product> *products = &state->products[group];
    if (me % GROUP == 0) {
        while (!products->empty() && products->front().number < end) {
            multiply(b, products->front());
            products->pop_front();
            state->first[group]++;
        }
    }
    meet(&state->group[group], GROUP);
}

} // namespace emulator

// ----------------------------------------------------------------------------
// the functions of hopper.cuh and wgmma.cuh

namespace hopper {

static inline bool elect_one(void) {
    return emulator_lane() == 0;
}

static inline uint32_t shared_address(const void *p) {
    return (uint32_t)((const unsigned char *)p - emulator::shared_memory()) + emulator::SHARED_BEGIN;
}

static inline void barrier_init(uint32_t barrier, int arrivals) {
    emulator::Barrier fresh = {(uint16_t)arrivals, (uint16_t)arrivals, 0};
    memcpy(emulator::shared_at(emulator::here(), barrier, sizeof(fresh)), &fresh, sizeof(fresh));
}

static inline void barrier_init_done(void) {
}

static inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    emulator::change(emulator::here(), barrier, 1, (int)bytes);
}

static inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
    emulator::Block *b = emulator::here();
    emulator::change((uint32_t)b->rank == rank ? b : b->partner, barrier, 1, 0);
}

static inline void barrier_arrive(uint32_t barrier) {
    emulator::change(emulator::here(), barrier, 1, 0);
}

static inline void add_copy(const emulator::Copy &copy) {
    emulator::async()->copies.push_back(copy);
}

static inline void barrier_arrive_after_copies(uint32_t barrier) {
    emulator::Copy copy = {};
    copy.kind = emulator::Copy::ARRIVAL;
    copy.barrier = barrier;
    add_copy(copy);
}

static inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    for (;;) {
        emulator::Block *b = emulator::here();
        emulator::Barrier now;
        memcpy(&now, emulator::shared_at(b, barrier, sizeof(now)), sizeof(now));
        if (((uint32_t)now.state & 1) != parity) {
            b->progress = true;
            return;
        }
        emulator::yield();
    }
}

static inline void cluster_sync(void) {
    emulator::Block *b = emulator::here();
    b->wants_partner = true;
    while (emulator::here()->partner == NULL) {
        emulator::yield();
    }
    b = emulator::here();
    emulator::Block *first = b->rank == 0 ? b : b->partner;
    emulator::async();
    while (first->async == NULL) {
        emulator::yield();
    }
    emulator::meet(&first->async->cluster, 2 * emulator::threads_of(first));
}

static inline uint32_t cluster_rank(void) {
    return (uint32_t)emulator::here()->rank;
}

static inline void copy16(uint32_t to, const void *from, bool valid) {
    emulator::Copy copy = {};
    copy.kind = emulator::Copy::BYTES16;
    copy.to = to;
    copy.from = valid ? from : NULL;
    add_copy(copy);
}

static inline void fence_async_proxy(void) {
}

static inline void add_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, unsigned blocks,
                           const int (&at)[MOST_DIMS]) {
    emulator::Copy copy = {};
    copy.kind = emulator::Copy::BOX;
    copy.to = to;
    copy.barrier = barrier;
    copy.map = *map;
    memcpy(copy.at, at, sizeof(at));
    copy.blocks = blocks;
    add_copy(copy);
}

// the blocks a box goes to: this one, or both of the cluster
static inline unsigned box_blocks(bool both) {
    return both ? 3u : 1u << emulator::here()->rank;
}

template <bool BOTH = false>
static inline void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column, int row,
                            int sheet) {
    add_box(to, map, barrier, box_blocks(BOTH), {column, row, sheet});
}

template <bool BOTH = false>
static inline void tma_load_paired(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                   int group, int sheet) {
    add_box(to, map, barrier, box_blocks(BOTH), {column, 0, group, 0, sheet});
}

static inline void add_store(const CUtensorMap *map, uint32_t from, int column, int row, int sheet,
                             bool adds) {
    emulator::Store store = {*map, from, {column, row, sheet}, adds};
    emulator::async()->stores[emulator::here()->current].open.push_back(store);
}

static inline void tma_store(const CUtensorMap *map, uint32_t from, int column, int row, int sheet) {
    add_store(map, from, column, row, sheet, false);
}

static inline void tma_add(const CUtensorMap *map, uint32_t from, int column, int row, int sheet) {
    add_store(map, from, column, row, sheet, true);
}

static inline void tma_commit(void) {
    emulator::ThreadStores *mine = &emulator::async()->stores[emulator::here()->current];
    mine->groups.push_back(std::vector<emulator::Store>());
    mine->groups.back().swap(mine->open);
}

template <int PENDING> static inline void tma_wait_read(void) {
    emulator::async();
    emulator::finish_stores(emulator::here(), PENDING);
}

static inline void tma_wait_written(void) {
    tma_wait_read<0>();
}

static inline void load_matrices(uint32_t (&v)[4], uint32_t row) {
    const uint32_t *rows = emulator::show(row);
    int lane = emulator_lane();
    for (int j = 0; j < 4; j++) {
        memcpy(&v[j], emulator::shared_at(emulator::here(), rows[8 * j + lane / 4], 16) + lane % 4 * 4, 4);
    }
}

static inline void store_matrices(uint32_t row, const uint32_t (&v)[4]) {
    const uint32_t *rows = emulator::show(row);
    int lane = emulator_lane();
    for (int j = 0; j < 4; j++) {
        memcpy(emulator::shared_at(emulator::here(), rows[8 * j + lane / 4], 16) + lane % 4 * 4, &v[j], 4);
    }
}

static inline void shared_store(uint32_t to, float x) {
    memcpy(emulator::shared_at(emulator::here(), to, 4), &x, 4);
}

static inline void shared_store(uint32_t to, float x, float y) {
    shared_store(to, x);
    shared_store(to + 4, y);
}

static inline void shared_store(uint32_t to, const uint32_t (&v)[4]) {
    memcpy(emulator::shared_at(emulator::here(), to, 16), v, 16);
}

static inline void named_barrier(int id, int threads) {
    emulator::meet(&emulator::async()->named[id], threads);
}

template <int REGISTERS> static inline void give_registers(void) {
}

template <int REGISTERS> static inline void take_registers(void) {
}

static inline void wgmma_fence(void) {
}

static inline void wgmma_commit(void) {
    emulator::Async *state = emulator::async();
    int me = emulator::here()->current;
    state->commits[me].push_back(state->issued[me]);
}

template <int PENDING> static inline void wgmma_wait(void) {
    emulator::wait_products(PENDING);
}

template <int COUNT> static inline void wgmma_results(float (&)[COUNT]) {
}

template <int ACROSS_A, int ACROSS_B, int COUNT>
static inline void wgmma(float (&acc)[COUNT], uint64_t descriptor_a, uint64_t descriptor_b, int add_to) {
    emulator::issue(COUNT, acc, NULL, descriptor_a, descriptor_b, add_to, ACROSS_A, ACROSS_B);
}

template <int ACROSS_B, int COUNT>
static inline void wgmma(float (&acc)[COUNT], const uint32_t (&a)[4], uint64_t descriptor_b, int add_to) {
    emulator::issue(COUNT, acc, a, 0, descriptor_b, add_to, 0, ACROSS_B);
}

} // namespace hopper

#endif
