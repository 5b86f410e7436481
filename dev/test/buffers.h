/*
A flat buffer that lies in the host's memory, all of it: the simplest one, to which a test may give other
ranges; and ranks that say nothing to each other.
*/
#ifndef TEST_BUFFERS_H
#define TEST_BUFFERS_H

#include "llmc/ranges.h"
#include "llmc/run/ranks.h"

static const Range everything_there_is = {0, (int64_t)1 << 60};

static inline void host_buffer_get(void *values, int which, int64_t first, int64_t n, float *out) {
    (void)which;
    memcpy(out, (const float *)values + first, (size_t)n * sizeof(float));
}

static inline void host_buffer_set(void *values, int which, int64_t first, int64_t n, const float *x) {
    (void)which;
    memcpy((float *)values + first, x, (size_t)n * sizeof(float));
}

static inline FlatBuffer host_buffer(const TensorTable *table, float *values) {
    FlatBuffer buffer = {table,           &everything_there_is, 1, values, BUFFER_PARAMS,
                         host_buffer_get, host_buffer_set};
    return buffer;
}

static inline FlatBuffer host_moments(const TensorTable *table, float *values) {
    FlatBuffer buffer = host_buffer(table, values);
    buffer.which = BUFFER_EXP_AVG;
    return buffer;
}

static inline Ranks silent_rank(int rank, int count) {
    Ranks ranks;
    memset(&ranks, 0, sizeof(ranks));
    ranks.rank = ranks.local_rank = rank;
    ranks.count = ranks.local_count = count;
    return ranks;
}

#endif
