/*
emulator: whether ranks do the same, for communication that is not NCCL's.

Where ranks that move data by themselves do not agree what comes next, they wait for each other without end, or take
one thing for another. agree() finds out: each rank leaves a line for each turn where the others see it.
*/
#ifndef EMULATOR_AGREE_H
#define EMULATOR_AGREE_H

#include <atomic>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

namespace emulator {

enum { AGREE_TURNS = 256, AGREE_TEXT = 120 };

struct AgreeEntry {
    std::atomic<uint64_t> turn; // plus 1; 0: being written
    char text[AGREE_TEXT];
};

struct AgreeFile {
    std::atomic<int> joined;
    alignas(128) AgreeEntry entries[][AGREE_TURNS]; // a ring a rank
};

struct Agreement {
    std::string run;
    pid_t pid;
    AgreeFile *file;
};

static inline size_t agree_bytes(int ranks) {
    return sizeof(AgreeFile) + (size_t)ranks * AGREE_TURNS * sizeof(AgreeEntry);
}

// the last that comes removes the name
static inline AgreeFile *agree_open(int ranks, const char *run) {
    char path[64];
    uint64_t hash = 1469598103934665603ull; // FNV-1a
    for (const char *at = run; *at != '\0'; at++) {
        hash = (hash ^ (unsigned char)*at) * 1099511628211ull;
    }
    snprintf(path, sizeof(path), "/dev/shm/emulator-%016llx", (unsigned long long)hash);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void *file = fd < 0 || ftruncate(fd, (off_t)agree_bytes(ranks)) != 0
                     ? MAP_FAILED
                     : mmap(NULL, agree_bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (file == MAP_FAILED) {
        perror(path);
        abort();
    }
    close(fd);
    if (++((AgreeFile *)file)->joined == ranks) {
        unlink(path);
    }
    return (AgreeFile *)file;
}

static inline AgreeFile *agree_file(int ranks, const char *run) {
    static Agreement *known = new Agreement();
    if (known->file == NULL || known->pid != getpid() || known->run != run) {
        *known = {run, getpid(), agree_open(ranks, run)};
    }
    return known->file;
}

// `theirs` of the same turn, or false: they are not there yet, or far ahead
static inline bool agree_read(AgreeEntry *entry, uint64_t turn, char *theirs) {
    if (entry->turn.load() != turn + 1) {
        return false;
    }
    memcpy(theirs, entry->text, AGREE_TEXT);
    return entry->turn.fetch_add(0) == turn + 1; // a write: the copy is over before it
}

// Rank `rank` of `ranks` does `text` in `turn` of what all of them call `run`, a text that no other group of ranks
// uses. Where another rank does something else in that turn, both are named and the process ends. Of two that differ
// at least the later one sees it
static inline void agree(int rank, int ranks, const char *run, uint64_t turn, const char *text) {
    if (ranks < 2) {
        return;
    }
    AgreeFile *file = agree_file(ranks, run);
    AgreeEntry *mine = &file->entries[rank][turn % AGREE_TURNS];
    char theirs[AGREE_TEXT];
    mine->turn.store(0);
    strncpy(mine->text, text, AGREE_TEXT - 1);
    mine->turn.store(turn + 1);
    for (int r = 0; r < ranks; r++) {
        if (agree_read(&file->entries[r][turn % AGREE_TURNS], turn, theirs) &&
            strcmp(theirs, mine->text) != 0) {
            const char *lines[2] = {rank < r ? mine->text : theirs, rank < r ? theirs : mine->text};
            fflush(stdout);
            fprintf(stderr, "emulator: in turn %llu rank %d moves `%s`, rank %d `%s`\n",
                    (unsigned long long)turn, rank < r ? rank : r, lines[0], rank < r ? r : rank, lines[1]);
            abort();
        }
    }
}

} // namespace emulator

#endif
