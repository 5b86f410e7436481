/*
emulator: memory of the device and of the host, and what lies where.

A single device's memory is malloc's. Where there are more (EMULATED_GPUS), each process has the memory of its device
in one file without a name, so that others can map parts of it (cudaIpc*) by way of /proc/PID/fd. It goes with the
last process that has it mapped. Pages that were never used, or are free again, take no memory.
*/
#ifndef EMULATOR_DEVICE_MEMORY_H
#define EMULATOR_DEVICE_MEMORY_H

#include <fcntl.h>
#include <map>
#include <mutex>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EMULATED_BYTES_LOG2 = 33 }; // 8 GB of "device" memory

namespace emulator {

typedef enum { MEMORY_PAGEABLE, MEMORY_PINNED, MEMORY_DEVICE, MEMORY_SHARED, MEMORY_PEER } MemoryKind;

enum { MEMORY_UNIT = 512, PAGE_BYTES = 4096 };

struct Range {
    size_t bytes;
    MemoryKind kind;
    pid_t pid; // a child knows its parent's ranges, which are not its own to give back
};

// a process's device memory that others may map
struct Heap {
    pid_t pid;
    int fd;
    unsigned char *base;
    std::map<size_t, size_t> free; // offset: bytes
};

struct Memory {
    std::mutex mutex;
    std::map<uintptr_t, Range> ranges; // all but pageable memory
    Heap heap;
    size_t used;
};

static inline Memory *memory() {
    static Memory *all = new Memory();
    return all;
}

static inline int gpus() {
    const char *text = getenv("EMULATED_GPUS");
    int count = text != NULL && *text != '\0' ? atoi(text) : 1;
    if (count < 1 || count > 64) {
        fprintf(stderr, "emulator: EMULATED_GPUS=%s: 1 .. 64\n", text);
        abort();
    }
    return count;
}

static inline bool has_peers() {
    const char *text = getenv("EMULATED_PEERS");
    return text == NULL || strcmp(text, "0") != 0;
}

static inline MemoryKind memory_kind(const void *p) {
    Memory *m = memory();
    std::lock_guard<std::mutex> lock(m->mutex);
    auto next = m->ranges.upper_bound((uintptr_t)p);
    if (next == m->ranges.begin()) {
        return MEMORY_PAGEABLE;
    }
    --next;
    return (uintptr_t)p - next->first < next->second.bytes ? next->second.kind : MEMORY_PAGEABLE;
}

static inline void note_range(const void *p, size_t bytes, MemoryKind kind) {
    Memory *m = memory();
    std::lock_guard<std::mutex> lock(m->mutex);
    m->ranges[(uintptr_t)p] = {bytes, kind, getpid()};
}

// what began at p, out of the list; pageable if nothing did
static inline Range forget_range(const void *p) {
    Memory *m = memory();
    std::lock_guard<std::mutex> lock(m->mutex);
    auto found = m->ranges.find((uintptr_t)p);
    Range range = {0, MEMORY_PAGEABLE, 0};
    if (found != m->ranges.end()) {
        range = found->second;
        m->ranges.erase(found);
    }
    return range;
}

// ----------------------------------------------------------------------------
// the heap that others may map

static inline Heap *heap() {
    const size_t bytes =
        (size_t)2 << EMULATED_BYTES_LOG2; // twice the memory: holes between allocations cost nothing
    Heap *h = &memory()->heap;
    if (h->base != NULL && h->pid == getpid()) {
        return h;
    }
    h->pid = getpid(); // a child's own: the parent's stays mapped
    h->fd = memfd_create("emulated GPU", MFD_CLOEXEC);
    void *base = h->fd < 0 || ftruncate(h->fd, (off_t)bytes) != 0
                     ? MAP_FAILED
                     : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, h->fd, 0);
    if (base == MAP_FAILED) {
        perror("emulator: memory for other processes to map");
        abort();
    }
    h->base = (unsigned char *)base;
    h->free = {{0, bytes}};
    return h;
}

static inline void *heap_take(size_t bytes) {
    Heap *h = heap();
    for (auto hole = h->free.begin(); hole != h->free.end(); ++hole) {
        if (hole->second >= bytes) {
            size_t offset = hole->first, left = hole->second - bytes;
            h->free.erase(hole);
            if (left > 0) {
                h->free[offset + bytes] = left;
            }
            return h->base + offset;
        }
    }
    return NULL;
}

static inline void heap_give(void *p, size_t bytes) {
    Heap *h = heap();
    size_t offset = (size_t)((unsigned char *)p - h->base);
    size_t first = (offset + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES,
           end = (offset + bytes) / PAGE_BYTES * PAGE_BYTES;
    if (end > first) {
        fallocate(h->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)first, (off_t)(end - first));
    }
    auto hole = h->free.insert({offset, bytes}).first, next = std::next(hole);
    if (next != h->free.end() && offset + bytes == next->first) {
        hole->second += next->second;
        h->free.erase(next);
    }
    if (hole != h->free.begin() && std::prev(hole)->first + std::prev(hole)->second == offset) {
        std::prev(hole)->second += hole->second;
        h->free.erase(hole);
    }
}

static inline size_t heap_bytes(size_t bytes) {
    return (bytes / MEMORY_UNIT + 1) * MEMORY_UNIT;
}

// ----------------------------------------------------------------------------
// device memory

static inline void *device_take(size_t bytes) {
    size_t most = (size_t)1 << EMULATED_BYTES_LOG2;
    bool shared = gpus() > 1;
    void *p = bytes > most - memory()->used ? NULL
              : shared                      ? heap_take(heap_bytes(bytes))
                                            : aligned_alloc(256, heap_bytes(bytes));
    if (p == NULL) {
        return NULL;
    }
    memory()->used += bytes;
    memset(p, 0xff, bytes);
    note_range(p, bytes, shared ? MEMORY_SHARED : MEMORY_DEVICE);
    return p;
}

static inline bool device_give(void *p) {
    Range range = forget_range(p);
    if (range.kind != MEMORY_DEVICE && range.kind != MEMORY_SHARED) {
        return false;
    }
    memory()->used -= range.bytes;
    if (range.kind == MEMORY_DEVICE) {
        free(p);
    } else if (range.pid == getpid()) {
        heap_give(p, heap_bytes(range.bytes));
    }
    return true;
}

// ----------------------------------------------------------------------------
// other processes' memory

struct IpcHandle {
    char kind[8];
    int pid, fd;
    uint64_t offset, bytes;
};

// of the allocation that begins at p
static inline bool ipc_handle_of(IpcHandle *handle, const void *p) {
    Memory *m = memory();
    std::lock_guard<std::mutex> lock(m->mutex);
    auto found = m->ranges.find((uintptr_t)p);
    if (found == m->ranges.end() || found->second.kind != MEMORY_SHARED || found->second.pid != getpid()) {
        return false;
    }
    *handle = {"memory", getpid(), m->heap.fd, (uint64_t)((unsigned char *)p - m->heap.base),
               found->second.bytes};
    return true;
}

static inline void *ipc_open(const IpcHandle *handle) {
    char path[64];
    size_t skipped = handle->offset % PAGE_BYTES;
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle->pid, handle->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return NULL;
    }
    void *pages = mmap(NULL, handle->bytes + skipped, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                       (off_t)(handle->offset - skipped));
    close(fd);
    if (pages == MAP_FAILED) {
        return NULL;
    }
    note_range((unsigned char *)pages + skipped, handle->bytes, MEMORY_PEER);
    return (unsigned char *)pages + skipped;
}

static inline bool ipc_close(void *p) {
    if (memory_kind(p) != MEMORY_PEER) {
        return false;
    }
    Range range = forget_range(p);
    size_t skipped = (uintptr_t)p % PAGE_BYTES;
    return range.bytes > 0 && munmap((unsigned char *)p - skipped, range.bytes + skipped) == 0;
}

} // namespace emulator

#endif
