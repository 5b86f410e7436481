/*
The watch thread of each rank: it tells rank 0, or as rank 0 the others, that the rank lives and where it is,
and ends the run when one is gone or hangs. It also carries the last words of a rank
(last_words.h): die() on any rank is heard once, from rank 0.

    BEAT    step, phase; both ways, once a second
    DYING   to rank 0: the text of die()
    BYE     goes, in order or not: its exit status
    END     from rank 0: the run ends, and it has been said why

The run is ended by one thread: whoever claims that first (ender) speaks. Ending is _exit, never abort: a
process's end frees its GPU, and nothing waits for a rank that is dead.
*/
#ifndef WATCH_H
#define WATCH_H

#include "llmc/run/star.h"

enum { FRAME_NONE, FRAME_BEAT, FRAME_DYING, FRAME_BYE, FRAME_END };
enum { ENDER_NONE, ENDER_MAIN, ENDER_WATCH };

#define WATCH_SECONDS 1.0       // between beats, at most
#define WATCH_LEAVE_SECONDS 1.0 // for the others to hear the last word
#define WATCH_GRACE 2.0         // after a rank has left with a failure: rank 0 may have words of its own
#define WATCH_STOPPED 2.0       // this process cannot have run: between two looks so much time has passed

typedef struct {
    int32_t kind, bytes, status, unused;
} FrameHead;

// the thread goes no further: another one ends the process
__attribute__((noreturn)) static inline void watch_park(void) {
    for (;;) {
        poll(NULL, 0, 1000);
    }
}

// may this thread end the run?
static inline int watch_claim(Star *s, int ender) {
    pthread_mutex_lock(&s->mutex);
    s->ender = s->ender == ENDER_NONE ? ender : s->ender;
    int mine = s->ender == ender;
    pthread_mutex_unlock(&s->mutex);
    return mine;
}

// ----------------------------------------------------------------------------
// frames

// A frame that does not fit is left out: a peer that reads nothing misses no more than beats
static inline void watch_put(Peer *p, int kind, int status, const void *data, size_t bytes) {
    FrameHead head = {kind, (int32_t)bytes, status, 0};
    if (p->socket[ROLE_PULSE] >= 0 && p->out_used + sizeof(head) + bytes <= sizeof(p->out)) {
        memcpy(p->out + p->out_used, &head, sizeof(head));
        if (bytes > 0) {
            memcpy(p->out + p->out_used + sizeof(head), data, bytes);
        }
        p->out_used += sizeof(head) + bytes;
    }
}

static inline void watch_send(Peer *p) {
    while (p->socket[ROLE_PULSE] >= 0 && p->out_used > 0) {
        ssize_t sent = send(p->socket[ROLE_PULSE], p->out, p->out_used, SOCKET_SEND_FLAGS);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent <= 0) {
            return; // full; or gone, which reading shows
        }
        p->out_used -= (size_t)sent;
        memmove(p->out, p->out + sent, p->out_used);
    }
}

static inline void watch_drop(Peer *p) {
    close(p->socket[ROLE_PULSE]);
    p->socket[ROLE_PULSE] = -1;
}

// says the last word to all and waits for them to have heard it, a second at most
static inline void watch_leave(Star *s, int kind, int status) {
    double deadline = socket_clock() + WATCH_LEAVE_SECONDS;
    for (int k = s->first; k < s->end; k++) {
        Peer *p = &s->peers[k];
        watch_put(p, kind, status, NULL, 0);
        watch_send(p);
        if (p->socket[ROLE_PULSE] >= 0) {
            shutdown(p->socket[ROLE_PULSE], SHUT_WR);
        }
    }
    for (int k = s->first; k < s->end; k++) {
        Peer *p = &s->peers[k];
        while (p->socket[ROLE_PULSE] >= 0) {
            ssize_t got = socket_wait(p->socket[ROLE_PULSE], POLLIN, deadline)
                              ? recv(p->socket[ROLE_PULSE], p->in, sizeof(p->in), 0)
                              : 0;
            if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN)) {
                watch_drop(p);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// the end of the run, as the watch thread sees it

static inline const char *watch_where(char *out, size_t capacity, const Beat *b) {
    out[0] = '\0';
    if (b->phase[0] != '\0') {
        snprintf(out, capacity, ", in step %lld (%s)", (long long)b->step, b->phase);
    }
    return out;
}

// Says so and ends the process, on rank 0 the run; returns if that is another thread's already. Not by stdio,
// whose lock the main thread may hold in its sleep
PRINTF_LIKE(3, 4) static inline void watch_end(Star *s, int status, const char *fmt, ...) {
    char text[2 * STAR_TEXT];
    va_list args;
    if (!watch_claim(s, ENDER_WATCH)) {
        return;
    }
    va_start(args, fmt);
    vsnprintf(text, sizeof(text) - 2, fmt, args);
    va_end(args);
    strcat(text, "\n");
    int first = launch_first_word();
    if (first || s->rank == 0) {
        ssize_t written = write(STDERR_FILENO, text, strlen(text));
        (void)written; // nobody is left to tell
    }
    if (s->rank == 0) {
        watch_leave(s, FRAME_END, status);
    }
    _exit(status);
}

// "\n  ---> what to do", or ""
static inline const char *watch_remedy(Star *s, char *out, size_t capacity) {
    pthread_mutex_lock(&s->mutex);
    snprintf(out, capacity, "%s%s", s->remedy[0] != '\0' ? "\n  ---> " : "", s->remedy);
    pthread_mutex_unlock(&s->mutex);
    return out;
}

static inline void watch_done(Star *s, int heard) {
    pthread_mutex_lock(&s->mutex);
    s->heard = heard;
    pthread_mutex_unlock(&s->mutex);
    ssize_t written = write(s->done[1], "", 1);
    (void)written; // a pipe of our own has room
}

// Another rank's connection is at its end. On rank k that is rank 0's, and this rank may be dying of its own
static inline void watch_gone(Star *s, int k) {
    Peer *p = &s->peers[k];
    char where[128], remedy[STAR_TEXT + 16];
    watch_drop(p);
    if (p->left) {
        return;
    }
    watch_where(where, sizeof(where), &p->beat);
    watch_remedy(s, remedy, sizeof(remedy));
    if (s->rank == 0) {
        watch_end(s, 1, "error: rank %d (%s) is gone%s%s", k, p->host, where, remedy);
    } else {
        watch_end(s, 1, "error: rank 0 (%s) is gone%s: noticed by rank %d (%s)%s", p->host, where, s->rank,
                  s->host, remedy);
        watch_done(s, 0);
        watch_park();
    }
}

// the run's end, as rank 0 has said it
static inline void watch_obey(Star *s, int status) {
    if (watch_claim(s, ENDER_WATCH)) {
        _exit(status);
    }
    watch_done(s, 1);
    watch_park();
}

static inline void watch_take(Star *s, int k, const FrameHead *head, const char *data) {
    Peer *p = &s->peers[k];
    if (head->kind == FRAME_BEAT && head->bytes == (int32_t)sizeof(Beat)) {
        if (memcmp(&p->beat, data, sizeof(Beat)) != 0) {
            memcpy(&p->beat, data, sizeof(Beat));
            p->beat.phase[STAR_PHASE - 1] = '\0';
            p->still = 0.0;
        }
    } else if (head->kind == FRAME_DYING && s->rank == 0) {
        watch_end(s, head->status, "%s: rank %d (%s): %.*s", head->status == 2 ? "usage error" : "error", k,
                  p->host, (int)head->bytes, data);
    } else if (head->kind == FRAME_BYE) {
        p->left = 1;
        p->left_status = head->status;
    } else if (head->kind == FRAME_END && s->rank != 0) {
        watch_obey(s, head->status);
    }
}

static inline void watch_read(Star *s, int k) {
    Peer *p = &s->peers[k];
    ssize_t got = recv(p->socket[ROLE_PULSE], p->in + p->in_used, sizeof(p->in) - p->in_used, 0);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) {
        return;
    }
    if (got <= 0) {
        watch_gone(s, k);
        return;
    }
    p->silent = 0.0;
    p->in_used += (size_t)got;
    for (FrameHead head; p->in_used >= sizeof(head);) {
        memcpy(&head, p->in, sizeof(head));
        size_t whole = sizeof(head) + (size_t)(head.bytes >= 0 ? head.bytes : 0);
        if (head.bytes < 0 || whole > sizeof(p->in)) {
            watch_gone(s, k); // nothing that a rank says
            return;
        }
        if (p->in_used < whole) {
            return;
        }
        watch_take(s, k, &head, p->in + sizeof(head));
        p->in_used -= whole;
        memmove(p->in, p->in + whole, p->in_used);
    }
}

// ----------------------------------------------------------------------------
// standing still

// Of those that have not moved for a while: first one that does not answer, then the one that is least far. A
// rank that waits for others in a call is not to blame
static inline int watch_suspect(const Star *s) {
    int worst = -1;
    for (int k = 0; k < s->count; k++) {
        const Peer *p = &s->peers[k], *w = worst >= 0 ? &s->peers[worst] : NULL;
        double limit = 0.5 * s->watchdog;
        int mute = p->silent >= limit, worst_mute = w != NULL && w->silent >= limit;
        if (p->left || (!mute && (p->beat.waiting || p->still < limit))) {
            continue;
        }
        if (w == NULL || mute > worst_mute ||
            (mute == worst_mute && (p->beat.step < w->beat.step ||
                                    (p->beat.step == w->beat.step && p->beat.count < w->beat.count)))) {
            worst = k;
        }
    }
    return worst;
}

static inline void watch_name_hung(Star *s, int k) {
    const Peer *p = &s->peers[k];
    char where[128], remedy[STAR_TEXT + 16];
    int mute = p->silent >= 0.5 * s->watchdog;
    watch_where(where, sizeof(where), &p->beat);
    watch_remedy(s, remedy, sizeof(remedy));
    watch_end(s, 1, "error: rank %d (%s) hangs%s: %s for %.3g minutes%s", k, p->host, where,
              mute ? "it has not answered" : "it has not moved", (mute ? p->silent : p->still) / 60.0,
              remedy);
}

// `seconds` since the last look. Time in which this process was itself stopped (Ctrl-Z) does not count
static inline void watch_age(Star *s, const Beat *own, double seconds) {
    int limit_reached = 0, stopped = seconds > WATCH_STOPPED;
    if (s->rank == 0 && memcmp(&s->peers[0].beat, own, sizeof(*own)) != 0) {
        s->peers[0].beat = *own;
        s->peers[0].still = 0.0;
    }
    for (int k = 0; k < s->end; k++) {
        Peer *p = &s->peers[k];
        int itself = s->rank == 0 && k == 0;
        p->still = stopped ? 0.0 : p->still + seconds;
        p->silent = stopped || itself ? 0.0 : p->silent + seconds;
        p->left_since += p->left ? seconds : 0.0;
        limit_reached |= !p->left && (p->silent >= s->watchdog ||
                                      (s->rank == 0 && !p->beat.waiting && p->still >= s->watchdog));
        if (s->rank == 0 && p->left_status != 0 && p->left_since >= WATCH_GRACE) {
            watch_end(s, 1, "error: rank %d (%s) has ended with exit status %d", k, p->host, p->left_status);
        }
    }
    if (s->watchdog > 0.0 && limit_reached) {
        watch_name_hung(s, s->rank == 0 ? watch_suspect(s) : 0);
    }
}

// ----------------------------------------------------------------------------
// the thread

// does what the main thread has asked for; returns 1 when that was to leave
static inline int watch_serve(Star *s, int request, int status) {
    char byte;
    ssize_t got = read(s->wake[0], &byte, 1);
    (void)got;
    if (request == FRAME_DYING) { // the answer will be END
        pthread_mutex_lock(&s->mutex);
        watch_put(&s->peers[0], FRAME_DYING, status, s->request_text, strlen(s->request_text));
        pthread_mutex_unlock(&s->mutex);
    } else if (request != FRAME_NONE) {
        watch_leave(s, request, status);
        watch_done(s, 1);
        return 1;
    }
    return 0;
}

static inline void *watch_run(void *argument) {
    Star *s = (Star *)argument;
    struct pollfd *polled = (struct pollfd *)calloc((size_t)s->count + 1, sizeof(struct pollfd));
    double last = socket_clock(), eighth = s->watchdog / 8.0;
    double pace = eighth > 0.0 && eighth < WATCH_SECONDS ? eighth : WATCH_SECONDS;
    for (int leaving = polled == NULL; !leaving;) {
        pthread_mutex_lock(&s->mutex);
        Beat own = s->beat;
        int request = s->request, status = s->request_status;
        s->request = FRAME_NONE;
        pthread_mutex_unlock(&s->mutex);
        double now = socket_clock();
        int due = now - last >= pace;
        for (int k = s->first; due && k < s->end; k++) {
            Peer *p = &s->peers[k];
            if (p->out_used == 0) {
                watch_put(p, FRAME_BEAT, 0, &own, sizeof(own));
            }
        }
        if (due) {
            watch_age(s, &own, now - last);
            last = now;
        }
        leaving = request != FRAME_NONE && watch_serve(s, request, status);
        for (int k = s->first; k < s->end; k++) {
            Peer *p = &s->peers[k];
            watch_send(p);
            polled[k].fd = p->socket[ROLE_PULSE];
            polled[k].events = (short)(POLLIN | (p->out_used > 0 ? POLLOUT : 0));
            polled[k].revents = 0;
        }
        polled[s->end].fd = s->wake[0];
        polled[s->end].events = POLLIN;
        polled[s->end].revents = 0;
        double left = leaving ? 0.0 : last + pace - socket_clock();
        if (leaving || poll(polled + s->first, (nfds_t)(s->end + 1 - s->first),
                            left > 0.0 ? 1 + (int)(1e3 * left) : 0) <= 0) {
            continue;
        }
        for (int k = s->first; k < s->end; k++) {
            if (polled[k].revents & (POLLIN | POLLHUP | POLLERR)) {
                watch_read(s, k);
            }
        }
    }
    free(polled);
    pthread_mutex_lock(&s->mutex);
    int joined = s->joined;
    pthread_mutex_unlock(&s->mutex);
    if (!joined) {
        watch_park(); // exit() ends it
    }
    return NULL;
}

#endif
