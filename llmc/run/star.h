/*
The star: every rank has two connections to rank 0. One carries what the ranks say to each other (talk, of the
main thread), one that they live (pulse, of the watch thread: watch.h). Here they are made.

    rank k   connects, says Hello on each; is told that it is ACCEPTED, later that all have come (START)
    rank 0   listens, seats those who belong to the run, sends strangers away

Errors: exit 1. A rank that never comes, that comes twice or that counts otherwise is named by rank 0; the
others then end without a word.
*/
#ifndef STAR_H
#define STAR_H

#include <pthread.h>
// defines: pthread_t, pthread_mutex_t
#include "llmc/run/launch.h"
#include "llmc/run/sockets.h"

enum { STAR_PROTOCOL = 1 };
enum { STAR_TEXT = 4096, STAR_HOST = 64, STAR_PHASE = 40 };
enum { STAR_GUESTS = 64 };    // who have connected and not yet said who they are
enum { STAR_STRANGERS = 10 }; // that are warned of
#define STAR_MAGIC                                                                                           \
    0x72656d6f65200a01ull // as this machine orders its bytes: one of another order is a stranger
#define STAR_HELLO_SECONDS                                                                                   \
    10.0 // a guest that has said nothing for so long, or a tenth of the time for all, goes

enum { ROLE_TALK, ROLE_PULSE, ROLES };

typedef struct {
    uint64_t magic;
    int32_t protocol, role, rank, ranks;
    char host[STAR_HOST], token[64];
} Hello;

enum { WELCOME_ACCEPTED, WELCOME_START, WELCOME_REFUSED };

typedef struct {
    uint64_t magic;
    int32_t kind, status; // status: to exit with, of REFUSED
    char host[STAR_HOST]; // rank 0's
} Welcome;

// what a rank last said of itself
typedef struct {
    int64_t step;
    uint64_t count;  // of ranks_beat
    int32_t waiting; // in a call of ranks.h: for others
    int32_t unused;
    char phase[STAR_PHASE]; // "": not known yet
} Beat;

// the other end of two connections
typedef struct {
    int socket[ROLES]; // -1: none
    char host[STAR_HOST];
    // of the watch thread:
    char in[2 * STAR_TEXT], out[2 * STAR_TEXT]; // of pulse; what has come, what is to go
    size_t in_used, out_used;
    Beat beat;
    double still, silent; // seconds since its beat has changed, since it has said anything
    int left;             // it has said that it goes
    int left_status;
    double left_since; // seconds
} Peer;

typedef struct {
    int rank, count;
    int pid; // a process that this one forks is no rank
    const Launch *launch;
    char host[STAR_HOST];
    Peer *peers;     // rank 0: [count], its own is at 0; others: rank 0 alone
    int first, end;  // the peers that there are
    int strangers;   // that rank 0 has sent away
    uint64_t calls;  // of ranks.h
    double watchdog; // seconds; 0: off
    pthread_t thread;
    int wake[2], done[2]; // pipes: to the watch thread, and from it when it has done what was asked
    pthread_mutex_t mutex;
    // under the mutex:
    Beat beat;              // of this rank
    char remedy[STAR_TEXT]; // what to do when the run is broken
    int ender;              // who ends the run, or this rank: see watch.h
    int request;            // to the watch thread: a frame to send
    int request_status;
    char request_text[STAR_TEXT];
    int heard;  // rank 0 has answered the request
    int joined; // the watch thread is waited for, after BYE
} Star;

// ----------------------------------------------------------------------------
// rank k

// one connection: made, and accepted by rank 0. -1: *why
static inline int star_try(Star *s, int role, double deadline, const char **why) {
    const Launch *l = s->launch;
    Hello hello;
    Welcome welcome;
    int fd = socket_connect(l->master, l->port, 5.0, why);
    if (fd < 0) {
        return -1;
    }
    memset(&hello, 0, sizeof(hello));
    hello.magic = STAR_MAGIC;
    hello.protocol = STAR_PROTOCOL;
    hello.role = role;
    hello.rank = s->rank;
    hello.ranks = s->count;
    memcpy(hello.host, s->host, sizeof(hello.host));
    memcpy(hello.token, l->token, sizeof(hello.token));
    int answered =
        socket_send(fd, &hello, sizeof(hello)) && socket_receive(fd, &welcome, sizeof(welcome), deadline);
    if (answered && welcome.magic == STAR_MAGIC) {
        if (welcome.kind == WELCOME_REFUSED) {
            exit(welcome.status); // rank 0 has said why
        }
        memcpy(s->peers[0].host, welcome.host, sizeof(welcome.host));
        s->peers[0].host[STAR_HOST - 1] = '\0';
        return fd;
    }
    *why = answered ? "what listens there is not rank 0 of this run" : "what listens there gave no answer";
    close(fd);
    return -1;
}

// waits for what rank 0 says next on `talk`, until then; returns only when that is START, or nothing yet
static inline void star_await(const Star *s, double deadline, int patient) {
    Welcome welcome;
    int talk = s->peers[0].socket[ROLE_TALK];
    if (talk < 0 || (!patient && !socket_wait(talk, POLLIN, socket_clock()))) {
        return;
    }
    if (!socket_receive(talk, &welcome, sizeof(welcome), deadline)) {
        die("rank 0 (%s) is gone: it ended before all ranks had come", s->peers[0].host);
    }
    if (welcome.kind != WELCOME_START) {
        exit(welcome.status); // rank 0 has said why
    }
}

static inline void star_come(Star *s, double minutes) {
    const Launch *l = s->launch;
    const char *why = "";
    double deadline = socket_clock() + 60.0 * minutes;
    for (int role = 0; role < ROLES; role++) {
        int fd = -1;
        for (int tries = 0; (fd = star_try(s, role, deadline, &why)) < 0; tries++) {
            star_await(s, deadline, 0);
            if (socket_clock() > deadline) {
                die("on %s: rank 0 was not met at %s, port %d, within %g minutes: %s\n"
                    "  ---> look there for its message; MASTER_ADDR and MASTER_PORT say where it listens",
                    s->host, l->master, l->port, minutes, why);
            }
            poll(NULL, 0, tries < 20 ? 50 : 500);
        }
        s->peers[0].socket[role] = fd;
    }
    star_await(s, socket_clock() + 60.0 * minutes + 10.0, 1); // rank 0 gives up before
}

// ----------------------------------------------------------------------------
// rank 0

// a connection that has not said who it is
typedef struct {
    int socket; // -1: a free place
    double deadline;
    size_t used;
    Hello hello;
    char from[STAR_HOST];
} Guest;

static inline int star_welcome(const Star *s, int fd, int kind, int status) {
    Welcome welcome;
    memset(&welcome, 0, sizeof(welcome));
    welcome.magic = STAR_MAGIC;
    welcome.kind = kind;
    welcome.status = status;
    memcpy(welcome.host, s->host, sizeof(welcome.host));
    return socket_send(fd, &welcome, sizeof(welcome));
}

// ends the run before it has begun
PRINTF_LIKE(2, 3) static inline void star_refuse(Star *s, const char *fmt, ...) {
    char text[STAR_TEXT];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    for (int k = s->first; k < s->end; k++) {
        for (int role = 0; role < ROLES; role++) {
            if (s->peers[k].socket[role] >= 0) {
                star_welcome(s, s->peers[k].socket[role], WELCOME_REFUSED, 1);
            }
        }
    }
    die("%s", text);
}

// (they may come again and again)
static inline void star_dismiss(Star *s, Guest *g, const char *why) {
    if (++s->strangers <= STAR_STRANGERS) {
        warn("a stranger from %s was sent away: it %s%s", g->from, why,
             s->strangers == STAR_STRANGERS ? " (no more is said of strangers)" : "");
    }
    close(g->socket);
    g->socket = -1;
}

// a guest that belongs to the run gets its seat; returns 1 if it does
static inline int star_seat(Star *s, Guest *g) {
    Hello *h = &g->hello;
    int fd = g->socket;
    h->host[STAR_HOST - 1] = h->token[sizeof(h->token) - 1] = '\0';
    if (strcmp(h->token, s->launch->token) != 0) {
        star_dismiss(s, g, "belongs to another run");
        return 0;
    }
    g->socket = -1;
    if (h->protocol != STAR_PROTOCOL) {
        star_welcome(s, fd, WELCOME_REFUSED, 1);
        star_refuse(s,
                    "rank %d (%s) and rank 0 (%s) are of different versions of this program\n"
                    "  ---> install the same on all machines",
                    h->rank, h->host, s->host);
    }
    if (h->ranks != s->count || h->rank < 1 || h->rank >= s->count || h->role < 0 || h->role >= ROLES) {
        star_welcome(s, fd, WELCOME_REFUSED, 1);
        star_refuse(s, "a process on %s says it is rank %d of %d, and rank 0 (%s) knows of %d ranks", h->host,
                    h->rank, h->ranks, s->host, s->count);
    }
    Peer *p = &s->peers[h->rank];
    if (p->socket[h->role] >= 0) {
        star_welcome(s, fd, WELCOME_REFUSED, 1);
        star_refuse(s, "two processes say they are rank %d: one on %s, one on %s", h->rank, p->host, h->host);
    }
    p->socket[h->role] = fd;
    memcpy(p->host, h->host, sizeof(p->host));
    socket_block(fd, 1);
    star_welcome(s, fd, WELCOME_ACCEPTED, 0);
    return 1;
}

// reads what a guest says; returns 1 when that was all and it has been seated
static inline int star_listen_to(Star *s, Guest *g, int readable) {
    if (readable) {
        ssize_t got = recv(g->socket, (char *)&g->hello + g->used, sizeof(g->hello) - g->used, 0);
        if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
            star_dismiss(s, g, "said nothing that a rank says");
            return 0;
        }
        g->used += got > 0 ? (size_t)got : 0;
        if (g->used >= sizeof(g->hello.magic) && g->hello.magic != STAR_MAGIC) {
            star_dismiss(s, g, "said nothing that a rank says");
            return 0;
        }
        if (g->used == sizeof(g->hello)) {
            return star_seat(s, g);
        }
    }
    if (socket_clock() > g->deadline) {
        star_dismiss(s, g, "has said nothing");
    }
    return 0;
}

static inline void star_let_in(int listener, Guest *g, double minutes) {
    g->socket = socket_accept(listener, g->from, sizeof(g->from));
    if (g->socket >= 0) {
        socket_block(g->socket, 0);
        g->used = 0;
        g->deadline =
            socket_clock() + (6.0 * minutes < STAR_HELLO_SECONDS ? 6.0 * minutes : STAR_HELLO_SECONDS);
    }
}

// dies naming those who have not come
static inline void star_name_missing(Star *s, double minutes) {
    const Launch *l = s->launch;
    char list[256] = "";
    int missing = 0;
    for (int k = s->first; k < s->end; k++) {
        size_t used = strlen(list);
        if (s->peers[k].socket[ROLE_TALK] < 0 || s->peers[k].socket[ROLE_PULSE] < 0) {
            snprintf(list + used, sizeof(list) - used, "%s%d", missing++ > 0 ? ", " : "", k);
        }
    }
    star_refuse(s,
                "after %g minutes %s %s of %d %s not come: %s says that there are %d ranks, %d of them on "
                "this machine (%s), and that they meet at %s, port %d\n"
                "  ---> look for their messages; more time: --connect-minutes",
                minutes, missing > 1 ? "ranks" : "rank", list, s->count, missing > 1 ? "have" : "has",
                l->launcher, l->ranks, l->local_ranks, s->host, l->master, l->port);
}

// one who has been seated says nothing before the start: there is something to read when it is gone
static inline void star_check_seated(Star *s, const struct pollfd *polled) {
    for (int k = s->first; k < s->end; k++) {
        for (int role = 0; role < ROLES; role++) {
            if (polled[k * ROLES + role].revents != 0) {
                star_refuse(s, "rank %d (%s) is gone: it ended before all ranks had come", k,
                            s->peers[k].host);
            }
        }
    }
}

static inline int star_open_listener(const Launch *l, double minutes) {
    double patience = minutes < 0.2 ? 60.0 * minutes : 12.0; // for a run before this one to leave
    double deadline = socket_clock() + patience;
    int listener = l->listener;
    while (listener < 0 && (listener = socket_listen(l->port)) < 0) {
        if (socket_clock() > deadline) {
            die("rank 0 cannot listen on port %d: %s\n  ---> set MASTER_PORT to another, for all ranks",
                l->port, strerror(errno));
        }
        poll(NULL, 0, 200);
    }
    socket_block(listener, 0);
    return listener;
}

static inline void star_receive(Star *s, double minutes) {
    static Guest guests[STAR_GUESTS];
    int listener = star_open_listener(s->launch, minutes), missing = ROLES * (s->count - 1);
    int seats = ROLES * s->count;
    struct pollfd *polled = NEW(struct pollfd, seats + STAR_GUESTS + 1);
    for (int i = 0; i < STAR_GUESTS; i++) {
        guests[i].socket = -1;
    }
    for (double deadline = socket_clock() + 60.0 * minutes; missing > 0;) {
        int vacant = -1;
        for (int i = 0; i < seats + STAR_GUESTS; i++) {
            polled[i].fd = i < seats ? s->peers[i / ROLES].socket[i % ROLES] : guests[i - seats].socket;
            polled[i].events = POLLIN;
            polled[i].revents = 0;
            vacant = i >= seats && polled[i].fd < 0 ? i - seats : vacant;
        }
        struct pollfd *door = &polled[seats + STAR_GUESTS];
        door->fd = vacant >= 0 ? listener : -1;
        door->events = POLLIN;
        door->revents = 0;
        if (poll(polled, (nfds_t)(seats + STAR_GUESTS + 1), 100) < 0) {
            continue; // a signal: nothing has been said of any
        }
        for (int i = 0; i < STAR_GUESTS; i++) {
            if (guests[i].socket >= 0) {
                missing -= star_listen_to(s, &guests[i], polled[seats + i].revents != 0);
            }
        }
        if (door->revents != 0) {
            star_let_in(listener, &guests[vacant], minutes);
        }
        star_check_seated(s, polled);
        if (missing > 0 && socket_clock() > deadline) {
            star_name_missing(s, minutes);
        }
    }
    for (int i = 0; i < STAR_GUESTS; i++) {
        if (guests[i].socket >= 0) {
            close(guests[i].socket);
        }
    }
    close(listener);
    free(polled);
    for (int k = s->first; k < s->end; k++) {
        star_welcome(s, s->peers[k].socket[ROLE_TALK], WELCOME_START, 0);
    }
}

#endif
