/*
sockets.h, star.h, watch.h, last_words.h, ranks.h: stars of real processes, which print into one pipe.

Most stars of this file wait for something (a watchdog, a rank that is late), so they are started together and
looked at one after the other.
*/
#include "llmc/run/ranks.h"
#include <sys/time.h>
// defines: setitimer

enum { STARS_MOST = 64 };

typedef struct {
    const char *name;
    int count;
    double watchdog, connect;  // minutes
    void (*body)(Ranks *r);    // after ranks_open; ranks_close comes after it
    void (*before)(Launch *l); // before ranks_open; may be NULL
    const char *rank_2_build, *rank_2_option;
    // of the run
    Launch launch;
    pid_t children[STARS_MOST];
    int pipe, running;
    double begin, seconds; // until the last rank has ended
    int status[STARS_MOST];
    size_t used;
    char output[16384];
} StarRun;

static StarRun *star_run; // a child's own

static void stars_child(StarRun *run, int rank) {
    Launch l = run->launch;
    Ranks r;
    l.rank = l.local_rank = rank;
    if (rank != 0) {
        close(l.listener);
        l.listener = -1;
    }
    star_run = run;
    message_taker = launch_message;
    launch_voice.rank = rank;
    if (run->before != NULL) {
        run->before(&l);
    }
    const char *argv[] = {"--steps", "10", "--lr", "5e-4", "--bench"};
    argv[3] = rank == 2 && run->rank_2_option != NULL ? run->rank_2_option : argv[3];
    const char *build = rank == 2 && run->rank_2_build != NULL ? run->rank_2_build : "v1 bf16";
    ranks_open(&r, &l, run->connect, run->watchdog, build, 5, argv);
    run->body(&r);
    ranks_close(&r);
    exit(0);
}

static void stars_start(StarRun *run) {
    int fds[2];
    memset(&run->launch, 0, sizeof(run->launch));
    run->launch.ranks = run->launch.local_ranks = run->count;
    run->launch.launcher = "test";
    strcpy(run->launch.token, "token");
    launch_listen(&run->launch);
    run->connect = run->connect > 0.0 ? run->connect : 1.0;
    run->running = run->count;
    run->used = 0;
    CHECK(pipe(fds) == 0);
    fflush(stdout);
    fflush(stderr);
    run->begin = seconds_now();
    for (int rank = 0; rank < run->count; rank++) {
        run->children[rank] = fork();
        if (run->children[rank] == 0) {
            dup2(fds[1], 1);
            dup2(fds[1], 2);
            close(fds[0]);
            close(fds[1]);
            stars_child(run, rank);
        }
    }
    close(fds[1]);
    close(run->launch.listener);
    run->pipe = fds[0];
    fcntl(run->pipe, F_SETFL, O_NONBLOCK);
}

// what there is to read and to reap now
static void stars_look(StarRun *run) {
    ssize_t got;
    while ((got = read(run->pipe, run->output + run->used, sizeof(run->output) - 1 - run->used)) > 0) {
        run->used += (size_t)got;
    }
    run->output[run->used] = '\0';
    for (int rank = 0; rank < run->count; rank++) {
        int status;
        if (run->children[rank] > 0 && waitpid(run->children[rank], &status, WNOHANG) > 0) {
            run->status[rank] = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            run->children[rank] = 0;
            run->running--;
            run->seconds = seconds_now() - run->begin;
        }
    }
}

// until no more than `left` ranks are there; those are killed then, and all are after so many seconds
static void stars_finish(StarRun *run, int left, double seconds) {
    double deadline = run->begin + seconds;
    stars_look(run);
    while (run->running > left && seconds_now() < deadline) {
        stars_look(run);
        usleep(2000);
    }
    if (!CHECK(run->running <= left)) {
        printf("  of %s, %d ranks are there after %.1f s\n", run->name, run->running, seconds);
    }
    for (int rank = 0; rank < run->count; rank++) {
        if (run->children[rank] > 0) {
            kill(run->children[rank], SIGKILL);
        }
    }
    double ended = run->seconds;
    while (run->running > 0) {
        stars_look(run);
        usleep(2000);
    }
    run->seconds = ended;
    stars_look(run);
    close(run->pipe);
}

static int stars_said(const StarRun *run, const char *text) {
    int times = 0;
    for (const char *found = run->output; (found = strstr(found, text)) != NULL; found++) {
        times++;
    }
    return times;
}

// Every rank ended with `status`, but for one (-1: none) that ended with that_status; the text was said, once, and
// there was no other error
static void stars_check(const StarRun *run, int status, int that, int that_status, const char *text) {
    int ok = 1, errors = stars_said(run, "error: ");
    for (int rank = 0; rank < run->count; rank++) {
        ok &= run->status[rank] == (rank == that ? that_status : status);
    }
    char host[STAR_HOST] = "", want[512];
    gethostname(host, sizeof(host) - 1);
    size_t used = 0;
    for (; *text != '\0' && used + STAR_HOST < sizeof(want); text++) { // @: this machine
        if (*text == '@') {
            used += (size_t)snprintf(want + used, sizeof(want) - used, "%s", host);
        } else {
            want[used++] = *text;
        }
    }
    want[used] = '\0';
    ok &= used == 0 ? errors == 0 : stars_said(run, want) == 1 && errors == 1;
    if (!CHECK(ok)) {
        printf("  of %s; wanted \"%s\"; exit statuses", run->name, want);
        for (int rank = 0; rank < run->count; rank++) {
            printf(" %d", run->status[rank]);
        }
        printf("; after %.1f s; said: %s\n", run->seconds, run->output);
    }
}

// ----------------------------------------------------------------------------
// calls

static void stars_must(const Ranks *r, int fact, const char *what) {
    if (!fact) {
        die("on rank %d, not so: %s", r->rank, what);
    }
}

// more than at once, of numbers that no float holds
static void stars_sum(Ranks *r) {
    int64_t n = SUM_AT_ONCE + 3, wrong = 0, big = (int64_t)1 << 54, *x = NEW(int64_t, n);
    for (int64_t i = 0; i < n; i++) {
        x[i] = big + i * (r->rank + 1);
    }
    ranks_sum(r, x, n);
    for (int64_t i = 0; i < n; i++) {
        wrong += x[i] != r->count * big + i * r->count * (r->count + 1) / 2;
    }
    stars_must(r, wrong == 0, "sum");
    free(x);
}

static void stars_calls(Ranks *r) {
    static const size_t sizes[] = {0, 1, 80, 1000, 70000};
    for (int i = 0; i < (r->count < 10 ? 5 : 4); i++) {
        size_t bytes = sizes[i];
        unsigned char *all = NEW(unsigned char, bytes *(size_t)r->count), *mine = NEW(unsigned char, bytes);
        memset(mine, r->rank + 10 * i, bytes);
        ranks_gather(r, mine, bytes, all);
        int equal = 1;
        for (size_t b = 0; b < bytes * (size_t)r->count; b++) {
            equal &= all[b] == (unsigned char)(b / bytes + 10 * (size_t)i);
        }
        stars_must(r, equal, "gather");
        memset(all, 0, bytes * (size_t)r->count);
        memset(all + (size_t)r->rank * bytes, r->rank + 1, bytes);
        ranks_gather(r, all + (size_t)r->rank * bytes, bytes, all); // its own row
        for (size_t b = 0; b < bytes * (size_t)r->count; b++) {
            equal &= all[b] == (unsigned char)(b / bytes + 1);
        }
        stars_must(r, equal, "gather in place");
        memset(mine, r->rank == 0 ? 7 : 1, bytes);
        ranks_share(r, mine, bytes);
        for (size_t b = 0; b < bytes; b++) {
            equal &= mine[b] == 7;
        }
        stars_must(r, equal, "share");
        ranks_barrier(r);
        stars_must(r, ranks_any(r, 0) == 0 && ranks_any(r, 256) == 1, "any");
        stars_must(r, ranks_any(r, r->rank == r->count - 1) == 1, "any, of the last");
        stars_must(r, ranks_any(r, r->rank == 0) == 1, "any, of the first");
        ranks_beat(r, i, "calls");
        free(all);
        free(mine);
    }
    stars_sum(r);
    ranks_agree(r, "the data", "a 1\nb 2\n");
    ranks_agree(r, "nothing", "");
    printf("rank %d prints\n", r->rank);
    warn("from rank %d", r->rank);
    fflush(stdout);
}

static void test_ranks_calls(void) {
    static const int counts[] = {2, 3, 8, 64};
    static StarRun run;
    for (int i = 0; i < 4; i++) {
        memset(&run, 0, sizeof(run));
        run.name = "calls";
        run.count = counts[i];
        run.body = stars_calls;
        stars_start(&run);
        stars_finish(&run, 0, 20.0);
        stars_check(&run, 0, -1, 0, "");
        CHECK(stars_said(&run, "prints") == 1 && stars_said(&run, "rank 0 prints\n") == 1);
        CHECK(stars_said(&run, "warning") == 1 && stars_said(&run, "warning: from rank 0\n") == 1);
    }
}

// one rank: no star, no thread, and a launch that says nothing of sockets
static void test_ranks_alone(void) {
    Launch l;
    Ranks r;
    int32_t mine = 5, all = 0;
    memset(&l, 0, sizeof(l));
    l.ranks = l.local_ranks = 1;
    ranks_open(&r, &l, 1.0, 1.0, "v1", 0, NULL);
    CHECK(r.rank == 0 && r.count == 1 && r.local_rank == 0 && r.local_count == 1 && r.star == NULL);
    ranks_gather(&r, &mine, sizeof(mine), &all);
    CHECK(all == 5);
    ranks_gather(&r, &all, sizeof(all), &all);
    ranks_share(&r, &mine, sizeof(mine));
    ranks_barrier(&r);
    CHECK(ranks_any(&r, 2) == 1 && ranks_any(&r, 0) == 0 && mine == 5);
    int64_t alone[2] = {7, -1};
    ranks_sum(&r, alone, 2);
    CHECK(alone[0] == 7 && alone[1] == -1);
    ranks_agree(&r, "x", "y");
    ranks_beat(&r, 1, "x");
    ranks_remedy(&r, "x");
    ranks_close(&r);
    CHECK(message_taker == NULL);
}

// signals all the time: no call is cut short
static void stars_ignore(int signal_number) {
    (void)signal_number;
}

// A signal to the process that the main thread does not take now waits: no other thread has it
static void stars_own_signals(const Ranks *r) {
    sigset_t one, pending;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    signal(SIGUSR1, stars_ignore);
    sigprocmask(SIG_BLOCK, &one, NULL);
    kill(getpid(), SIGUSR1);
    usleep(50000);
    sigpending(&pending);
    stars_must(r, sigismember(&pending, SIGUSR1), "the watch thread takes no signal");
    sigprocmask(SIG_UNBLOCK, &one, NULL);
}

static void stars_interrupted(Ranks *r) {
    enum { LARGE = 8 << 20 }; // more than a socket takes
    struct sigaction action;
    struct itimerval often = {{0, 500}, {0, 500}};
    memset(&action, 0, sizeof(action));
    action.sa_handler = stars_ignore; // without SA_RESTART
    sigaction(SIGALRM, &action, NULL);
    stars_own_signals(r);
    setitimer(ITIMER_REAL, &often, NULL);
    char *mine = NEW(char, LARGE), *all = NEW(char, LARGE * r->count);
    for (double until = seconds_now() + 0.1; r->rank == 0 && seconds_now() < until;) {
        usleep(1000);
    }
    ranks_gather(r, mine, LARGE, all);
    free(mine);
    free(all);
    for (int i = 0; i < 200; i++) {
        stars_calls(r);
    }
}

// ----------------------------------------------------------------------------
// who comes

static void stars_nothing(Ranks *r) {
    (void)r;
}

static void stars_late(Launch *l) {
    usleep(l->rank == 1 ? 1500000 : 0);
}

static void stars_missing(Launch *l) {
    if (l->rank == 2) {
        _exit(0);
    }
}

static void stars_twice(Launch *l) {
    usleep(l->rank == 2 ? 1000000 : 0); // all others have come
    l->rank = l->rank == 2 ? 1 : l->rank;
}

static void stars_miscounted(Launch *l) {
    usleep(l->rank == 2 ? 1000000 : 0);
    l->ranks += l->rank == 2;
}

static void stars_gone_early(Launch *l) {
    if (l->rank == 2) {
        usleep(1000000);
        Star *s = ranks_make_star(l, 0.0);
        const char *why = "";
        if (star_try(s, ROLE_TALK, socket_clock() + 10.0, &why) >= 0) {
            raise(SIGKILL);
        }
    }
}

// a rank 0 that is gone when it has answered the first of two connections
static void stars_half_met(Launch *l) {
    if (l->rank == 0) {
        Star *s = ranks_make_star(l, 0.0);
        Hello hello;
        char from[64];
        int fd = socket_accept(l->listener, from, sizeof(from));
        socket_receive(fd, &hello, sizeof(hello), socket_clock() + 5.0);
        star_welcome(s, fd, WELCOME_ACCEPTED, 0);
        close(l->listener);
        usleep(200000);
        _exit(7);
    }
}

static void stars_no_rank_0(Launch *l) {
    if (l->rank == 0) {
        _exit(0);
    }
}

static void stars_other_token(Launch *l) {
    if (l->rank == 2) {
        strcpy(l->token, "another");
        dup2(open("/dev/null", O_WRONLY), 2); // it says that it has met nobody
    }
}

// from outside: connections that say nothing, something else, the wrong thing, or less than all
static void stars_strangers(const StarRun *run, int fds[4]) {
    static const char http[] = "GET / HTTP/1.0\r\n\r\n";
    const char *why = "";
    Hello hello;
    memset(&hello, 0, sizeof(hello));
    hello.magic = STAR_MAGIC;
    hello.protocol = STAR_PROTOCOL;
    hello.rank = 1;
    hello.ranks = run->count;
    strcpy(hello.token, "tokem");
    for (int i = 0; i < 4; i++) {
        fds[i] = socket_connect("127.0.0.1", run->launch.port, 5.0, &why);
    }
    CHECK(socket_send(fds[1], http, sizeof(http)));
    CHECK(socket_send(fds[2], &hello, sizeof(hello)));
    CHECK(socket_send(fds[3], &hello, 20));
    shutdown(fds[3], SHUT_WR);
}

static void test_ranks_strangers(void) {
    static StarRun run;
    int fds[4];
    run.name = "strangers";
    run.count = 3;
    run.body = stars_calls;
    run.connect = 0.1;
    run.before = stars_late;
    stars_start(&run);
    stars_strangers(&run, fds);
    stars_finish(&run, 0, 10.0);
    stars_check(&run, 0, -1, 0, "");
    CHECK(run.seconds < 6.0);
    CHECK(stars_said(&run, "warning: a stranger from 127.0.0.1 was sent away") == 4);
    CHECK(stars_said(&run, "has said nothing") == 1);
    CHECK(stars_said(&run, "belongs to another run") == 1 &&
          stars_said(&run, "said nothing that a rank says") == 2);
    for (int i = 0; i < 4; i++) {
        close(fds[i]);
    }
}

// ----------------------------------------------------------------------------
// how it ends

static void stars_killed(Ranks *r) {
    ranks_remedy(r, "--resume runs/x");
    ranks_beat(r, 7, "backward");
    if (r->rank == 2) {
        usleep(1500000); // a beat has told where it is
        raise(SIGKILL);
    }
    ranks_barrier(r);
}

static void stars_killed_0(Ranks *r) {
    ranks_beat(r, 8, "forward");
    if (r->rank == 0) {
        usleep(1500000);
        raise(SIGKILL);
    }
    sleep(20); // in no call: the watch thread alone sees it
}

static void stars_stopped(Ranks *r) {
    ranks_beat(r, 3, "forward");
    if (r->rank == 1) {
        usleep(1300000);
        raise(SIGSTOP);
    }
    ranks_barrier(r);
}

static void stars_stopped_0(Ranks *r) {
    if (r->rank == 0) {
        raise(SIGSTOP);
    }
    ranks_barrier(r);
}

static void stars_hung(Ranks *r) {
    ranks_beat(r, 4, "saving");
    if (r->rank == r->count - 1) {
        sleep(20);
    }
    ranks_barrier(r);
}

static void stars_hung_0(Ranks *r) {
    ranks_beat(r, 5, "saving");
    if (r->rank == 0) {
        sleep(20);
    }
    ranks_barrier(r);
}

// A rank that is slow and says so; the others wait for it for longer than the watchdog's time
static void stars_slow(Ranks *r) {
    for (int i = 0; r->rank == 1 && i < 16; i++) {
        if (i % 8 == 0) {
            ranks_beat(r, i, "validation");
        } else {
            ranks_beat_again(r);
        }
        usleep(300000);
    }
    ranks_barrier(r);
}

// all are stopped for longer than the watchdog's time, and go on
static void stars_paused(Ranks *r) {
    for (int i = 0; i < 25; i++) {
        ranks_beat(r, i, "forward");
        usleep(100000);
    }
    ranks_barrier(r);
}

static void stars_signal(const StarRun *run, int signal_number) {
    for (int rank = 0; rank < run->count; rank++) {
        if (run->children[rank] > 0) {
            kill(run->children[rank], signal_number);
        }
    }
}

static void stars_unwatched(Ranks *r) {
    if (r->rank == 1) {
        usleep(3000000);
    }
    ranks_barrier(r);
}

static void stars_dies(Ranks *r) {
    if (r->rank == 2) {
        die("cannot read x\n  ---> %s", "make it");
    }
    ranks_barrier(r);
}

static void stars_dies_of_usage(Ranks *r) {
    if (r->rank == 2) {
        die_usage("no such option");
    }
    sleep(20);
}

static void stars_all_die(Ranks *r) {
    die("nobody can read x (%s)", r->count > 0 ? "no" : "");
}

static void stars_dies_0(Ranks *r) {
    if (r->rank == 0) {
        die("rank 0 cannot go on");
    }
    sleep(20);
}

// rank 0 does not answer, so the words are said where they were meant
static void stars_dies_unheard(Ranks *r) {
    if (r->rank == 0) {
        raise(SIGSTOP);
    }
    usleep(300000);
    if (r->rank == 2) {
        die("last words");
    }
    _exit(1);
}

static void stars_exits_0(Ranks *r) {
    if (r->rank == 0) {
        exit(0);
    }
    ranks_barrier(r);
    sleep(20);
}

static void stars_all_exit(Ranks *r) {
    exit(r->count > 0 ? 0 : 1);
}

static void stars_exits_1(Ranks *r) {
    if (r->rank == 0) {
        warn("three in a row: the run ends");
        exit(1);
    }
    sleep(20);
}

static void stars_one_exits_1(Ranks *r) {
    if (r->rank == 2) {
        exit(1);
    }
    sleep(20);
}

static void stars_leaves(Ranks *r) {
    if (r->rank == 1) {
        exit(0);
    }
    ranks_barrier(r);
}

static void stars_parted(Ranks *r) {
    char mine[80], all[240];
    memset(mine, 0, sizeof(mine));
    ranks_barrier(r);
    if (r->rank == 1) {
        ranks_gather(r, mine, sizeof(mine), all);
    } else {
        ranks_barrier(r);
    }
}

static void stars_parted_bytes(Ranks *r) {
    char mine[80], all[240];
    memset(mine, 0, sizeof(mine));
    ranks_gather(r, mine, r->rank == 2 ? 40 : 80, all);
}

static void stars_parted_kinds(Ranks *r) {
    if (r->rank == 1) {
        ranks_share(r, NULL, 0);
    } else {
        ranks_barrier(r);
    }
}

static void stars_disagree(Ranks *r) {
    ranks_agree(r, "the data", "same");
    ranks_agree(r, "the data", r->rank == 2 ? "a 1\nb 3\nc 4" : "a 1\nb 2\nc 3");
}

static void stars_disagree_shorter(Ranks *r) {
    ranks_agree(r, "the plan", r->rank >= 1 ? "a 1\nb" : "a 1\nb\nc");
}

// a process that a rank forks is no rank: it says what it has to say, and the run goes on
static void stars_forks(Ranks *r) {
    if (r->rank == 1) {
        pid_t pid = fork();
        if (pid == 0) {
            die("only a helper");
        }
        double begin = seconds_now();
        waitpid(pid, NULL, 0);
        stars_must(r, seconds_now() - begin < 1.5, "it ends at once");
    }
    ranks_barrier(r);
}

typedef struct {
    StarRun run;
    int left;              // ranks that do not end by themselves
    double within;         // seconds
    int status;            // of all
    int that, that_status; // but this one
    const char *text;      // said once, and no other error
} StarCase;

#define GONE 128 + SIGKILL

// name, ranks, watchdog, connect, body, before; left, within; status, but for; text
#define CASE(name, count, watchdog, connect, body, before, left, within, status, that, that_status, text)    \
    {                                                                                                        \
        {name, count, watchdog, connect, body, before, NULL, NULL, {0}, {0}, 0, 0, 0, 0, {0}, 0, {0}}, left, \
            within, status, that, that_status, text                                                          \
    }

static void test_ranks_cases(void) {
#define STILL 3.0 / 60.0
    static StarCase cases[] = {
        CASE("paused", 3, STILL, 0, stars_paused, NULL, 0, 12, 0, -1, 0, ""),
        CASE("signals", 3, 0, 0, stars_interrupted, NULL, 0, 15, 0, -1, 0, ""),
        CASE("late", 3, 0, 0, stars_nothing, stars_late, 0, 6, 0, -1, 0, ""),
        CASE("missing", 4, 0, 0.02, stars_nothing, stars_missing, 0, 5, 1, 2, 0,
             "error: after 0.02 minutes rank 2 of 4 has not come: test says that there are 4 ranks, 4 of "
             "them on "
             "this machine (@), and that they meet at 127.0.0.1, port "),
        CASE("twice", 4, 0, 0, stars_nothing, stars_twice, 0, 5, 1, -1, 0,
             "error: two processes say they are rank 1: one on @, one on @\n"),
        CASE("miscounted", 3, 0, 0, stars_nothing, stars_miscounted, 0, 5, 1, -1, 0,
             "error: a process on @ says it is rank 2 of 4, and rank 0 (@) knows of 3 ranks\n"),
        CASE("gone early", 4, 0, 0, stars_nothing, stars_gone_early, 0, 5, 1, 2, GONE,
             "error: rank 2 (@) is gone: it ended before all ranks had come\n"),
        CASE("killed", 4, 0, 0, stars_killed, NULL, 0, 6, 1, 2, GONE,
             "error: rank 2 (@) is gone, in step 7 (backward)\n  ---> --resume runs/x\n"),
        CASE("killed, rank 0", 2, 0, 0, stars_killed_0, NULL, 0, 6, 1, 0, GONE,
             "error: rank 0 (@) is gone, in step 8 (forward): noticed by rank 1 (@)\n"),
        CASE("stopped", 4, STILL, 0, stars_stopped, NULL, 1, 9, 1, 1, GONE,
             "error: rank 1 (@) hangs, in step 3 (forward): it has not answered for 0.0"),
        CASE("stopped, rank 0", 2, STILL, 0, stars_stopped_0, NULL, 1, 9, 1, 0, GONE,
             "error: rank 0 (@) hangs: it has not answered for 0.0"),
        CASE("hung", 4, STILL, 0, stars_hung, NULL, 0, 9, 1, -1, 0,
             "error: rank 3 (@) hangs, in step 4 (saving): it has not moved for 0.0"),
        CASE("hung, rank 0", 4, STILL, 0, stars_hung_0, NULL, 0, 9, 1, -1, 0,
             "error: rank 0 (@) hangs, in step 5 (saving): it has not moved for 0.0"),
        CASE("slow", 3, STILL, 0, stars_slow, NULL, 0, 9, 0, -1, 0, ""),
        CASE("unwatched", 3, 0, 0, stars_unwatched, NULL, 0, 9, 0, -1, 0, ""),
        CASE("dies", 4, 0, 0, stars_dies, NULL, 0, 5, 1, -1, 0,
             "error: rank 2 (@): cannot read x\n  ---> make it\n"),
        CASE("dies of usage", 4, 0, 0, stars_dies_of_usage, NULL, 0, 5, 2, -1, 0,
             "usage error: rank 2 (@): no such option\n"),
        CASE("all die", 8, 0, 0, stars_all_die, NULL, 0, 5, 1, -1, 0, "nobody can read x (no)\n"),
        CASE("dies, rank 0", 4, 0, 0, stars_dies_0, NULL, 0, 5, 1, -1, 0, "error: rank 0 cannot go on\n"),
        CASE("dies unheard", 3, 0, 0, stars_dies_unheard, NULL, 1, 5, 1, 0, GONE,
             "error: rank 2 (@): last words\n"),
        CASE("exit(0) of rank 0", 4, 0, 0, stars_exits_0, NULL, 0, 5, 0, -1, 0, ""),
        CASE("exit(0) of all", 4, 0, 0, stars_all_exit, NULL, 0, 5, 0, -1, 0, ""),
        CASE("exit(1) of rank 0", 4, 0, 0, stars_exits_1, NULL, 0, 5, 1, -1, 0, ""),
        CASE("exit(1) of rank 2", 4, 0, 0, stars_one_exits_1, NULL, 0, 6, 1, -1, 0,
             "error: rank 2 (@) has ended with exit status 1\n"),
        CASE("exit(0) of rank 1", 4, 0, 0, stars_leaves, NULL, 0, 7, 1, 1, 0,
             "error: rank 1 (@) has left the run, where rank 0 (@) calls barrier\n"),
        CASE("parted", 3, 0, 0, stars_parted, NULL, 0, 5, 1, -1, 0,
             "error: rank 1 (@) calls gather of 80 bytes, rank 0 (@) barrier: the ranks' ways have parted"),
        CASE("parted, bytes", 3, 0, 0, stars_parted_bytes, NULL, 0, 5, 1, -1, 0,
             "error: rank 2 (@) calls gather of 40 bytes, rank 0 (@) gather of 80 bytes"),
        CASE("parted, kinds", 3, 0, 0, stars_parted_kinds, NULL, 0, 5, 1, -1, 0,
             "error: rank 1 (@) calls share of 0 bytes, rank 0 (@) barrier"),
        CASE("half met", 2, 0, 0, stars_nothing, stars_half_met, 0, 5, 1, 0, 7,
             "error: rank 1: rank 0 (@) is gone: it ended before all ranks had come\n"),
        CASE("disagree", 4, 0, 0, stars_disagree, NULL, 0, 5, 1, -1, 0,
             "error: rank 2 (@): the data differs: `b 3` where rank 0 (@) has `b 2`\n"
             "  ---> copy it to all machines\n"),
        CASE("disagree, shorter", 3, 0, 0, stars_disagree_shorter, NULL, 0, 5, 1, -1, 0,
             "error: rank 1 (@): the plan differs: `nothing more` where rank 0 (@) has `c`\n"
             "  ---> copy it to all machines\n"),
        CASE("other options", 4, 0, 0, stars_nothing, NULL, 0, 5, 2, -1, 0,
             "usage error: rank 2 (@) was started with --lr 1e-4, rank 0 (@) with --lr 5e-4\n"),
        CASE("other build", 4, 0, 0, stars_nothing, NULL, 0, 5, 1, -1, 0,
             "error: rank 2 (@) is another program than rank 0 (@): v1 fp32, not v1 bf16\n"),
        CASE("forks", 3, 0, 0, stars_forks, NULL, 0, 5, 0, -1, 0, "error: only a helper\n"),
        CASE("no rank 0", 2, 0, 0.02, stars_nothing, stars_no_rank_0, 0, 5, 1, 0, 0,
             "error: rank 1: on @: rank 0 was not met at 127.0.0.1, port "),
        CASE("other token", 3, 0, 0.02, stars_nothing, stars_other_token, 0, 5, 1, -1, 0,
             "error: after 0.02 minutes rank 2 of 3 has not come"),
    };
    enum { CASES = sizeof(cases) / sizeof(cases[0]) };
    for (int i = 0; i < CASES; i++) {
        StarRun *run = &cases[i].run;
        run->rank_2_option = strcmp(run->name, "other options") == 0 ? "1e-4" : NULL;
        run->rank_2_build = strcmp(run->name, "other build") == 0 ? "v1 fp32" : NULL;
        stars_start(run);
    }
    usleep(500000);
    stars_signal(&cases[0].run, SIGSTOP);
    usleep(4000000);
    stars_signal(&cases[0].run, SIGCONT);
    for (int i = 0; i < CASES; i++) {
        StarCase *c = &cases[i];
        stars_finish(&c->run, c->left, c->within + 5.0); // some seconds for a busy machine
        stars_check(&c->run, c->status, c->that, c->that_status, c->text);
    }
}

// --gpus and the star together; the parent knows of the signal, rank 0 of the step
static void stars_by_gpus(void *arg) {
    Ranks r;
    Launch l = launch_ranks(3);
    ranks_open(&r, &l, 1.0, 0.0, "v1", 0, NULL);
    ranks_beat(&r, 2, "backward");
    if (r.rank == *(int *)arg) {
        usleep(1300000);
        raise(SIGKILL);
    }
    ranks_barrier(&r);
    printf("%d ranks\n", r.count);
    ranks_close(&r);
    exit(0);
}

static void test_ranks_by_gpus(void) {
    int nobody = -1, rank = 1;
    check_dies(0, "3 ranks\n", stars_by_gpus, &nobody);
    check_dies(GONE, "rank 1 was killed by signal 9 (Killed)\n", stars_by_gpus, &rank);
    check_dies(GONE, "is gone, in step 2 (backward)\n", stars_by_gpus, &rank);
    rank = 0;
    check_dies(GONE, ") is gone, in step 2 (backward): noticed by rank ", stars_by_gpus, &rank);
}

static void test_ranks(void) {
    test_ranks_by_gpus();
    test_ranks_alone();
    test_ranks_calls();
    test_ranks_strangers();
    test_ranks_cases();
}
