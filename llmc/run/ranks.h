/*
The ranks of a run: processes that drive a GPU each, and what they say to each other on the host. Every call
goes through rank 0 (star.h); a thread watches that all live (watch.h).

All ranks make the same calls in the same order. Each call is announced by a header, so that ranks that differ
are named instead of waiting for each other. With one rank there is no socket, no thread, and no call does
anything.

On the ranks but 0 nothing is printed: stdout is /dev/null, warn() silent, and what die() says is said by rank
0, which then ends the run.

Errors: exit 1, or 2 where the command lines differ; a message on rank 0's stderr names the rank.
*/
#ifndef RANKS_H
#define RANKS_H

#include "llmc/run/last_words.h"

enum { RANKS_MOST_ON_A_MACHINE = 64 };

typedef struct {
    int rank, count;             // of all ranks
    int local_rank, local_count; // of those on this machine
    Star *star;                  // NULL with one rank
} Ranks;

static inline Ranks ranks_alone(void) {
    Ranks alone = {0, 1, 0, 1, NULL};
    return alone;
}

// a name of the run that no other has at the same time on this machine
static inline const char *ranks_token(const Ranks *r) {
    return r->star != NULL ? r->star->launch->token : "";
}

// ----------------------------------------------------------------------------
// calls

enum { CALL_GATHER, CALL_SHARE, CALL_BARRIER, CALL_ANY, CALL_AGREE };

typedef struct {
    uint64_t number, bytes;
    int32_t kind, unused;
} CallHead;

// "gather of 80 bytes"
static inline const char *call_name(char *out, size_t capacity, const CallHead *call) {
    static const char *const names[] = {"gather", "share", "barrier", "any", "agree"};
    int known = call->kind >= 0 && call->kind <= CALL_AGREE;
    if (known && (call->kind == CALL_GATHER || call->kind == CALL_SHARE)) {
        snprintf(out, capacity, "%s of %llu bytes", names[call->kind], (unsigned long long)call->bytes);
    } else {
        snprintf(out, capacity, "%s", known ? names[call->kind] : "nothing that is known");
    }
    return out;
}

// A connection that ends in a call: the watch thread knows more, and ends the run. Unless the other rank went
// in good order, in the middle of it
static inline void call_broken(const Star *s, int k, const CallHead *mine) {
    char name[64];
    poll(NULL, 0, 3000);
    die("rank %d (%s) has left the run, where rank %d (%s) calls %s", k, s->peers[k].host, s->rank, s->host,
        call_name(name, sizeof(name), mine));
}

static inline void call_differs(const Star *s, int k, const CallHead *his, const CallHead *mine) {
    char name[64], my_name[64];
    die("rank %d (%s) calls %s, rank %d (%s) %s: the ranks' ways have parted at call %llu\n"
        "  ---> this is an error of the program",
        k, s->peers[k].host, call_name(name, sizeof(name), his), s->rank, s->host,
        call_name(my_name, sizeof(my_name), mine), (unsigned long long)mine->number);
}

static inline void call_receive_head(const Star *s, int k, const CallHead *mine) {
    CallHead his;
    if (!socket_receive(s->peers[k].socket[ROLE_TALK], &his, sizeof(his), -1.0)) {
        call_broken(s, k, mine);
    }
    if (his.kind != mine->kind || his.bytes != mine->bytes || his.number != mine->number) {
        call_differs(s, k, &his, mine);
    }
}

static inline void call_waits(Star *s, int waiting) {
    pthread_mutex_lock(&s->mutex);
    s->beat.waiting = waiting;
    pthread_mutex_unlock(&s->mutex);
}

// Each rank k sends up_bytes to rank 0, which has them in all[k]; then rank 0 sends down_bytes to each
static inline void call_exchange(Star *s, int kind, size_t bytes, const void *up, size_t up_bytes, char *all,
                                 void *down, size_t down_bytes) {
    CallHead mine = {s->calls++, bytes, kind, 0};
    call_waits(s, 1);
    for (int k = s->first; k < s->end; k++) {
        int fd = s->peers[k].socket[ROLE_TALK];
        int ok = 1;
        if (s->rank != 0) {
            ok = socket_send(fd, &mine, sizeof(mine)) && socket_send(fd, up, up_bytes);
        } else {
            call_receive_head(s, k, &mine);
            ok = up_bytes == 0 || socket_receive(fd, all + (size_t)k * up_bytes, up_bytes, -1.0);
        }
        if (!ok) {
            call_broken(s, k, &mine);
        }
    }
    for (int k = s->first; k < s->end; k++) {
        int fd = s->peers[k].socket[ROLE_TALK];
        int ok = 1;
        if (s->rank != 0) {
            call_receive_head(s, k, &mine);
            ok = socket_receive(fd, down, down_bytes, -1.0);
        } else {
            ok = socket_send(fd, &mine, sizeof(mine)) && socket_send(fd, down, down_bytes);
        }
        if (!ok) {
            call_broken(s, k, &mine);
        }
    }
    call_waits(s, 0);
}

static inline void call_gather(Star *s, int kind, const void *mine, size_t bytes, void *all) {
    char *row = (char *)all + (size_t)s->rank * bytes;
    if (row != mine) {
        memmove(row, mine, bytes);
    }
    call_exchange(s, kind, bytes, row, bytes, (char *)all, all, (size_t)s->count * bytes);
}

// all ranks call each of the following in the same order; with one rank none does anything
// all [count][bytes]: everyone's, by rank; mine may be all's own row
static inline void ranks_gather(Ranks *r, const void *mine, size_t bytes, void *all) {
    if (r->star != NULL) {
        call_gather(r->star, CALL_GATHER, mine, bytes, all);
    } else if (all != mine) {
        memcpy(all, mine, bytes);
    }
}

// rank 0's data becomes everyone's
static inline void ranks_share(Ranks *r, void *data, size_t bytes) {
    if (r->star != NULL) {
        call_exchange(r->star, CALL_SHARE, bytes, NULL, 0, NULL, data, bytes);
    }
}

static inline void ranks_barrier(Ranks *r) {
    if (r->star != NULL) {
        call_exchange(r->star, CALL_BARRIER, 0, NULL, 0, NULL, NULL, 0);
    }
}

enum { SUM_AT_ONCE = 1 << 16 }; // of each rank, so that all of them take little memory

// x [n]: the sum of all ranks'
static inline void ranks_sum(Ranks *r, int64_t *x, int64_t n) {
    int64_t *all = r->count > 1 ? NEW(int64_t, (int64_t)r->count * SUM_AT_ONCE) : NULL;
    for (int64_t first = 0; first < n && r->count > 1; first += SUM_AT_ONCE) {
        int64_t piece = n - first < SUM_AT_ONCE ? n - first : (int64_t)SUM_AT_ONCE;
        ranks_gather(r, x + first, (size_t)piece * sizeof(int64_t), all);
        for (int64_t i = 0; i < piece; i++) {
            x[first + i] = 0;
            for (int k = 0; k < r->count; k++) {
                x[first + i] += all[k * piece + i];
            }
        }
    }
    free(all);
}

// is the flag set on any rank?
static inline int ranks_any(Ranks *r, int flag) {
    int any = flag != 0;
    if (r->star != NULL) {
        char mine = (char)any, *all = NEW(char, r->count);
        call_gather(r->star, CALL_ANY, &mine, 1, all);
        for (int k = 0; k < r->count; k++) {
            any |= all[k] != 0;
        }
        free(all);
    }
    return any;
}

// ----------------------------------------------------------------------------
// what must be the same everywhere

typedef struct {
    int32_t found, unused;
    char mine[256], root[256]; // the lines, this rank's and rank 0's
} Difference;

// the line that begins at text, and where the next one begins; NULL behind the last
static inline const char *difference_line(char *line, size_t capacity, const char *text) {
    if (text == NULL) {
        snprintf(line, capacity, "nothing more");
        return NULL;
    }
    size_t length = strcspn(text, "\n");
    snprintf(line, capacity, "%.*s", length < capacity ? (int)length : (int)capacity - 1, text);
    return text[length] == '\n' ? text + length + 1 : NULL;
}

static inline void find_difference(Difference *d, const char *mine, const char *root) {
    memset(d, 0, sizeof(*d));
    d->found = strcmp(mine, root) != 0;
    while (d->found && (mine != NULL || root != NULL)) {
        int same = mine != NULL && root != NULL && strcspn(mine, "\n") == strcspn(root, "\n") &&
                   strncmp(mine, root, strcspn(mine, "\n")) == 0;
        mine = difference_line(d->mine, sizeof(d->mine), mine);
        root = difference_line(d->root, sizeof(d->root), root);
        if (!same) {
            return;
        }
    }
}

// the lowest rank whose text is not rank 0's, or -1; *found: where they differ
static inline int ranks_compare(Ranks *r, const char *text, Difference *found) {
    Star *s = r->star;
    uint64_t bytes = strlen(text) + 1;
    call_exchange(s, CALL_AGREE, sizeof(bytes), NULL, 0, NULL, &bytes, sizeof(bytes));
    char *root = NEW(char, bytes > strlen(text) ? bytes : strlen(text) + 1);
    memcpy(root, text, strlen(text));
    call_exchange(s, CALL_AGREE, bytes, NULL, 0, NULL, root, bytes);
    Difference mine, *all = NEW(Difference, r->count);
    int differing = -1;
    find_difference(&mine, text, root);
    call_gather(s, CALL_AGREE, &mine, sizeof(mine), all);
    for (int k = r->count - 1; k > 0; k--) {
        if (all[k].found) {
            differing = k;
            *found = all[k];
        }
    }
    free(all);
    free(root);
    return differing;
}

// The others wait here for rank 0 to say what differs and end the run
static inline void ranks_wait_for_the_end(Ranks *r) {
    if (r->rank != 0) {
        ranks_barrier(r);
    }
}

// dies where a rank's text is not rank 0's, naming the first line that differs. what: the data, the model,
// ...
static inline void ranks_agree(Ranks *r, const char *what, const char *text) {
    Difference d;
    int k = r->star != NULL ? ranks_compare(r, text, &d) : -1;
    if (k > 0) {
        ranks_wait_for_the_end(r);
        die("rank %d (%s): %s differs: `%s` where rank 0 (%s) has `%s`\n  ---> copy it to all machines", k,
            r->star->peers[k].host, what, d.mine, r->star->host, d.root);
    }
}

// an option with its value a line
static inline char *ranks_command_lines(int argc, const char *const *argv) {
    size_t bytes = 1, used = 0;
    for (int i = 0; i < argc; i++) {
        bytes += strlen(argv[i]) + 1;
    }
    char *text = NEW(char, bytes);
    for (int i = 0; i < argc; i++) {
        int value = i > 0 && strncmp(argv[i - 1], "--", 2) == 0 && strchr(argv[i - 1], '=') == NULL &&
                    strncmp(argv[i], "--", 2) != 0;
        used += (size_t)snprintf(text + used, bytes - used, "%s%s",
                                 i == 0  ? ""
                                 : value ? " "
                                         : "\n",
                                 argv[i]);
    }
    return text;
}

// the same program, started in the same way
static inline void ranks_check_start(Ranks *r, const char *build, int argc, const char *const *argv) {
    Difference d;
    int k = ranks_compare(r, build, &d);
    if (k > 0) {
        ranks_wait_for_the_end(r);
        die("rank %d (%s) is another program than rank 0 (%s): %s, not %s\n"
            "  ---> install the same on all machines",
            k, r->star->peers[k].host, r->star->host, d.mine, d.root);
    }
    char *lines = ranks_command_lines(argc, argv);
    k = ranks_compare(r, lines, &d);
    if (k > 0) {
        ranks_wait_for_the_end(r);
        die_usage("rank %d (%s) was started with %s, rank 0 (%s) with %s", k, r->star->peers[k].host, d.mine,
                  r->star->host, d.root);
    }
    free(lines);
}

// ----------------------------------------------------------------------------
// open, beat, close

static inline void ranks_silence(void) {
    int nowhere = open("/dev/null", O_WRONLY);
    fflush(stdout);
    if (nowhere < 0 || dup2(nowhere, STDOUT_FILENO) < 0) {
        die("cannot open /dev/null: %s", strerror(errno));
    }
    close(nowhere);
}

static inline Star *ranks_make_star(const Launch *launch, double watchdog_minutes) {
    Star *s = NEW(Star, 1);
    s->rank = launch->rank;
    s->count = launch->ranks;
    s->pid = (int)getpid();
    s->launch = launch;
    s->watchdog = 60.0 * watchdog_minutes;
    s->first = s->rank == 0 ? 1 : 0;
    s->end = s->rank == 0 ? s->count : 1;
    s->peers = NEW(Peer, s->end);
    gethostname(s->host, sizeof(s->host) - 1); // a name that is longer is cut
    for (int k = 0; k < s->end; k++) {
        s->peers[k].socket[ROLE_TALK] = s->peers[k].socket[ROLE_PULSE] = -1;
    }
    memcpy(s->peers[0].host, s->host, sizeof(s->host));
    return s;
}

// Connects the ranks, or dies after connect_minutes. watchdog_minutes: how long a rank may stand still (0:
// for ever), some seconds at least. build: version and precision; it and the command line must be the same on
// all
static inline void ranks_open(Ranks *r, const Launch *launch, double connect_minutes, double watchdog_minutes,
                              const char *build, int argc, const char *const *argv) {
    memset(r, 0, sizeof(*r));
    r->rank = launch->rank;
    r->count = launch->ranks;
    r->local_rank = launch->local_rank;
    r->local_count = launch->local_ranks;
    if (r->count == 1) {
        return;
    }
    r->star = ranks_make_star(launch, watchdog_minutes);
    if (r->rank == 0) {
        star_receive(r->star, connect_minutes);
    } else {
        star_come(r->star, connect_minutes);
        ranks_silence();
    }
    watch_start(r->star);
    ranks_check_start(r, build, argc, argv);
}

// Where this rank is: phase changes, or a piece of a long one is done. Cheap: the watch thread sends it on
static inline void ranks_beat(Ranks *r, int64_t step, const char *phase) {
    if (r->star != NULL) {
        Star *s = r->star;
        pthread_mutex_lock(&s->mutex);
        s->beat.step = step;
        s->beat.count++;
        if (strcmp(s->beat.phase, phase) != 0) {
            memset(s->beat.phase, 0, sizeof(s->beat.phase)); // beats are compared byte by byte
            snprintf(s->beat.phase, sizeof(s->beat.phase), "%s", phase);
        }
        pthread_mutex_unlock(&s->mutex);
    }
}

// a piece of a long phase is done
static inline void ranks_beat_again(Ranks *r) {
    if (r->star != NULL) {
        pthread_mutex_lock(&r->star->mutex);
        r->star->beat.count++;
        pthread_mutex_unlock(&r->star->mutex);
    }
}

// what to do when a rank is lost: the text behind the arrow
static inline void ranks_remedy(Ranks *r, const char *text) {
    if (r->star != NULL) {
        pthread_mutex_lock(&r->star->mutex);
        snprintf(r->star->remedy, sizeof(r->star->remedy), "%s", text);
        pthread_mutex_unlock(&r->star->mutex);
    }
}

// all ranks leave, once all have come here
static inline void ranks_close(Ranks *r) {
    Star *s = r->star;
    if (s == NULL) {
        return;
    }
    ranks_barrier(r);
    watch_stop(s);
    for (int k = s->first; k < s->end; k++) {
        close(s->peers[k].socket[ROLE_TALK]);
        if (s->peers[k].socket[ROLE_PULSE] >= 0) {
            close(s->peers[k].socket[ROLE_PULSE]);
        }
    }
    free(s->peers);
    free(s);
    r->star = NULL;
}

#endif
