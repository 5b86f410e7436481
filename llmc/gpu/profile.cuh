/*
Where a step's time goes on the device, by component.

profile_mark(profile, "experts", stream) says: what is queued from here on belongs to the experts, until the
next mark. A mark is one event in the stream, recorded only while the profile is on; nothing waits for it. The
table adds up the time between neighbouring marks by name. Errors: none of its own.
*/
#ifndef PROFILE_CUH
#define PROFILE_CUH

#include "llmc/gpu/cuda_common.cuh"

enum { PROFILE_MOST_NAMES = 32 };

// what several GPUs cost
#define PROFILE_WAITING "waiting for other GPUs"
#define PROFILE_ADDING "adding up gradients, norm"

typedef struct {
    int on;
    int count, capacity;
    cudaEvent_t *events;
    const char **names; // of what follows each event; NULL: nothing, the device may be idle
} Profile;

static inline void profile_mark(Profile *profile, const char *name, cudaStream_t stream) {
    if (!profile->on) {
        return;
    }
    if (profile->count == profile->capacity) {
        profile->capacity = 2 * profile->capacity + 1024;
        profile->events = GROW(cudaEvent_t, profile->events, profile->capacity);
        profile->names = GROW(const char *, profile->names, profile->capacity);
    }
    CUDA_CHECK(cudaEventCreate(&profile->events[profile->count]));
    CUDA_CHECK(cudaEventRecord(profile->events[profile->count], stream));
    profile->names[profile->count++] = name;
}

static inline void profile_begin(Profile *profile) {
    profile->on = 1;
}

typedef struct {
    const char *name;
    double ms;
} ProfileRow;

static inline int profile_rows(const Profile *profile, ProfileRow *rows) {
    int count = 0;
    for (int i = 0; i + 1 < profile->count; i++) {
        float ms;
        int row = 0;
        if (profile->names[i] == NULL) {
            continue;
        }
        CUDA_CHECK(cudaEventElapsedTime(&ms, profile->events[i], profile->events[i + 1]));
        while (row < count && strcmp(rows[row].name, profile->names[i]) != 0) {
            row++;
        }
        if (row == count && count < PROFILE_MOST_NAMES) {
            rows[count].name = profile->names[i];
            rows[count++].ms = 0.0;
        }
        rows[row < PROFILE_MOST_NAMES ? row : PROFILE_MOST_NAMES - 1].ms += ms;
    }
    return count;
}

// The table, largest share first; all marks are forgotten. Returns the share of the parts between which other
// ranks stand: PROFILE_WAITING and PROFILE_ADDING
static inline double profile_end(Profile *profile) {
    ProfileRow rows[PROFILE_MOST_NAMES];
    double total = 0.0, exposed = 0.0;
    CUDA_CHECK(cudaDeviceSynchronize());
    int count = profile_rows(profile, rows);
    for (int i = 0; i < count; i++) {
        total += rows[i].ms;
        exposed += strcmp(rows[i].name, PROFILE_WAITING) == 0 || strcmp(rows[i].name, PROFILE_ADDING) == 0
                       ? rows[i].ms
                       : 0.0;
    }
    printf("%-24s %10s %7s\n", "component", "ms a step", "share");
    for (int printed = 0; printed < count; printed++) {
        int best = 0;
        for (int i = 1; i < count; i++) {
            best = rows[i].ms > rows[best].ms ? i : best;
        }
        printf("%-24s %10.2f %6.1f%%\n", rows[best].name, rows[best].ms, 100.0 * rows[best].ms / total);
        rows[best].ms = -1.0;
    }
    printf("%-24s %10.2f\n", "all", total);
    for (int i = 0; i < profile->count; i++) {
        CUDA_CHECK(cudaEventDestroy(profile->events[i]));
    }
    free(profile->events);
    free(profile->names);
    memset(profile, 0, sizeof(*profile));
    return total > 0.0 ? exposed / total : 0.0;
}

#endif
