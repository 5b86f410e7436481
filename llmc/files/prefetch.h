/*
Batches assembled ahead: while a step computes on one batch, a thread copies the next out of the mapped shards
(and waits for the disk in its place). Batch n holds the sequences first + n * stride + [0, B): with R ranks,
rank r takes first + r B and stride R B. What arrives is what dataloader_sequence gives, whatever the timing.

Shapes: inputs, targets [B, T]. Errors: a token that the vocabulary does not have ends the program, where its
batch is taken: those before it were good, and `before_end`, if set, may save what they have taught.
*/
#ifndef PREFETCH_H
#define PREFETCH_H

#include <pthread.h>
#include <time.h>
// defines: pthread_create, pthread_mutex_lock, pthread_cond_wait, clock_gettime
#include "llmc/check.h"
#include "llmc/files/dataloader.h"

typedef struct {
    const DataLoader *loader;
    int batch;
    int vocab_size;
    int64_t first;
    int64_t stride;
    int *inputs[2]; // batch n lies in buffer n % 2
    int *targets[2];
    int64_t assembled; // batches that the thread has finished
    int64_t taken;     // batches handed out; the last of them is in use
    int stopping;
    const TokenShard
        *bad; // holds bad_token, which the vocabulary does not have; nothing is assembled any more
    int64_t bad_token;
    void (*before_end)(void *); // called with `context` in the thread that takes, before the program ends
    void *context;
    double wait_ms; // what the steps have waited for batches, in all
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
} Prefetcher;

// the shard of a bad token, or NULL
static inline const TokenShard *prefetch_assemble(const Prefetcher *p, int64_t n, int64_t *token) {
    int T = p->loader->seq_len;
    const TokenShard *bad = NULL;
    for (int b = 0; b < p->batch && bad == NULL; b++) {
        bad = dataloader_try_sequence(p->loader, p->first + n * p->stride + b, p->vocab_size,
                                      p->inputs[n % 2] + (int64_t)b * T, p->targets[n % 2] + (int64_t)b * T,
                                      token);
    }
    return bad;
}

static inline void *prefetch_run(void *argument) {
    Prefetcher *p = (Prefetcher *)argument;
    pthread_mutex_lock(&p->mutex);
    while (!p->stopping) {
        if (p->assembled > p->taken || p->bad != NULL) { // one is in use, one is ready: no free buffer
            pthread_cond_wait(&p->changed, &p->mutex);
            continue;
        }
        pthread_mutex_unlock(&p->mutex);
        int64_t token = -1;
        const TokenShard *bad = prefetch_assemble(p, p->assembled, &token);
        pthread_mutex_lock(&p->mutex);
        p->bad = bad;
        p->bad_token = token;
        p->assembled += bad == NULL;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

static inline void prefetch_start(Prefetcher *p, const DataLoader *loader, int batch, int vocab_size,
                                  int64_t first, int64_t stride) {
    size_t n = (size_t)batch * (size_t)loader->seq_len;
    memset(p, 0, sizeof(*p));
    p->loader = loader;
    p->batch = batch;
    p->vocab_size = vocab_size;
    p->first = first;
    p->stride = stride;
    for (int i = 0; i < 2; i++) {
        p->inputs[i] = NEW(int, n);
        p->targets[i] = NEW(int, n);
    }
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->changed, NULL);
    int failed = pthread_create(&p->thread, NULL, prefetch_run, p);
    if (failed) {
        die("cannot start the loader's thread: %s", strerror(failed));
    }
}

// the next batch; valid until the next call
static inline void prefetch_next(Prefetcher *p, int **inputs, int **targets) {
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    pthread_mutex_lock(&p->mutex);
    while (p->assembled == p->taken && p->bad == NULL) {
        pthread_cond_wait(&p->changed, &p->mutex);
    }
    if (p->assembled == p->taken) {
        if (p->before_end != NULL) {
            p->before_end(p->context);
        }
        dataloader_refuse_token(p->bad, p->bad_token, p->vocab_size);
    }
    *inputs = p->inputs[p->taken % 2];
    *targets = p->targets[p->taken % 2];
    p->taken++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    clock_gettime(CLOCK_MONOTONIC, &after);
    p->wait_ms +=
        1e3 * (double)(after.tv_sec - before.tv_sec) + 1e-6 * (double)(after.tv_nsec - before.tv_nsec);
}

static inline void prefetch_stop(Prefetcher *p) {
    pthread_mutex_lock(&p->mutex);
    p->stopping = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    pthread_join(p->thread, NULL);
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->changed);
    for (int i = 0; i < 2; i++) {
        free(p->inputs[i]);
        free(p->targets[i]);
    }
}

#endif
