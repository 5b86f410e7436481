/*
The last words of a rank, and the start and the end of its watch thread (watch.h), which carries them.

    die() on rank k     its text goes to rank 0, which says it, once, and ends the run
    exit() on rank 0    the others are told to end too
    exit() on rank k    rank 0 is told; if it has no words of its own soon, it names the rank

Errors: exit 1 where there is no thread to be had.
*/
#ifndef LAST_WORDS_H
#define LAST_WORDS_H

#include "llmc/run/watch.h"
// defines: Star, watch_run, watch_claim, watch_park

// asks the watch thread to send a last frame, and waits until it has; returns 1 if rank 0 answered, or all
// heard
static inline int watch_ask(Star *s, int request, int status, const char *text, double seconds) {
    pthread_mutex_lock(&s->mutex);
    s->request = request;
    s->request_status = status;
    snprintf(s->request_text, sizeof(s->request_text), "%s", text);
    pthread_mutex_unlock(&s->mutex);
    ssize_t written = write(s->wake[1], "", 1);
    (void)written; // a pipe of our own has room
    int in_time = socket_wait(s->done[0], POLLIN, socket_clock() + seconds);
    pthread_mutex_lock(&s->mutex);
    int heard = in_time && s->heard;
    pthread_mutex_unlock(&s->mutex);
    return heard;
}

static Star *watch_star; // what message_taker and the exit handler are of
static int watch_died;   // the status that die() will exit with, for systems whose exit handlers are not told

// message_taker, once the star stands
static inline void watch_message(const char *kind, const char *text) {
    Star *s = watch_star;
    int warning = strcmp(kind, "warning") == 0, status = strcmp(kind, "usage error") == 0 ? 2 : 1;
    if (s->pid != (int)getpid()) { // a child, of a rank
        fprintf(stderr, "%s: %s\n", kind, text);
        return;
    }
    if (warning && s->rank != 0) {
        return;
    }
    if (!warning && !watch_claim(s, ENDER_MAIN)) {
        watch_park(); // the watch thread was first
    }
    if (!warning) {
        watch_died = status;
        launch_first_word();
        if (s->rank != 0 && watch_ask(s, FRAME_DYING, status, text, 1.0)) {
            return; // rank 0 has said it
        }
    }
    fflush(stdout);
    if (s->rank == 0) {
        fprintf(stderr, "%s: %s\n", kind, text);
    } else {
        fprintf(stderr, "%s: rank %d (%s): %s\n", kind, s->rank, s->host, text);
    }
}

// exit() without ranks_close: rank 0 takes the others with it, another one says that it goes
static inline void watch_exit(int status) {
    Star *s = watch_star;
    if (s == NULL || s->pid != (int)getpid() || (s->rank != 0 && watch_died != 0)) {
        return; // ... or rank 0 has had its last word
    }
    if (!watch_claim(s, ENDER_MAIN)) {
        watch_park();
    }
    if (s->rank == 0 && status != 0) {
        launch_first_word();
    }
    watch_ask(s, s->rank == 0 ? FRAME_END : FRAME_BYE, status, "", 2.0 * WATCH_LEAVE_SECONDS);
}

#ifdef __GLIBC__
static inline void watch_at_exit(int status, void *unused) {
    (void)unused;
    watch_exit(status);
}
#else
static inline void watch_at_exit(void) {
    watch_exit(watch_died);
}
#endif

// ----------------------------------------------------------------------------
// start and end of the thread

static inline void watch_start(Star *s) {
    static int registered;
    sigset_t all, mask;
    if (pipe(s->wake) != 0 || pipe(s->done) != 0) {
        die("cannot make a pipe: %s", strerror(errno));
    }
    for (int i = 0; i < 2; i++) {
        fcntl(s->wake[i], F_SETFD, FD_CLOEXEC);
        fcntl(s->done[i], F_SETFD, FD_CLOEXEC);
    }
    for (int k = s->first; k < s->end; k++) {
        socket_block(s->peers[k].socket[ROLE_PULSE], 0);
        socket_lose_soon(s->peers[k].socket[ROLE_PULSE]);
    }
    pthread_mutex_init(&s->mutex, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &mask); // the program's handlers are the main thread's
    int failed = pthread_create(&s->thread, NULL, watch_run, s);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (failed) {
        die("cannot start the watch thread: %s", strerror(failed));
    }
    watch_star = s;
    message_taker = watch_message;
    if (!registered) {
        registered = 1;
#ifdef __GLIBC__
        failed = on_exit(watch_at_exit, NULL);
#else
        failed = atexit(watch_at_exit);
#endif
        if (failed) {
            die("cannot register an exit handler");
        }
    }
}

// after all have agreed to
static inline void watch_stop(Star *s) {
    pthread_mutex_lock(&s->mutex);
    s->joined = 1;
    pthread_mutex_unlock(&s->mutex);
    watch_ask(s, FRAME_BYE, 0, "", 2.0 * WATCH_LEAVE_SECONDS);
    pthread_join(s->thread, NULL);
    message_taker = launch_message;
    watch_star = NULL;
    for (int i = 0; i < 2; i++) {
        close(s->wake[i]);
        close(s->done[i]);
    }
    pthread_mutex_destroy(&s->mutex);
}

#endif
