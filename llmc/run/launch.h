/*
Which rank of a run this process is, and where rank 0 is to be met. Three ways to start:

    one process           no variables of a launcher, no --gpus: rank 0 of 1
    --gpus N              this process forks N children, a rank each, and waits for them
    torchrun, srun, ...   have started all the processes; their environment says who is who

With --gpus the parent listens on a port that the system chooses before there is any child: it is never in
use, and two runs cannot meet. The exit status of the first child that fails is the run's.

Errors: exit 2 where --gpus contradicts the launcher, 1 where its variables do (launchers.h).
*/
#ifndef LAUNCH_H
#define LAUNCH_H

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
// defines: htonl, open, sockaddr_in, sigwait, mmap, socket, waitpid, time, fork, sysconf
#ifdef __linux__
#include <sched.h>
#include <sys/prctl.h>
// defines: sched_getaffinity, prctl
#endif
#include "llmc/run/launchers.h"
// defines: Launch, launch_read

enum { LAUNCH_TERM_SECONDS = 5, LAUNCH_KILL_SECONDS = 20 }; // after the first child has failed

// ----------------------------------------------------------------------------
// who speaks: of several ranks that find the same fault, one

static struct {
    int rank;
    int *said; // shared by the ranks that one process forked: one of them has said why the run ends
} launch_voice;

// 1 for the first that asks
static inline int launch_first_word(void) {
    return launch_voice.said == NULL || !__atomic_exchange_n(launch_voice.said, 1, __ATOMIC_SEQ_CST);
}

// message_taker of several ranks: rank 0 warns, and the first that dies is heard
static inline void launch_message(const char *kind, const char *text) {
    fflush(stdout);
    int warning = strcmp(kind, "warning") == 0;
    if (warning ? launch_voice.rank != 0 : !launch_first_word()) {
        return;
    }
    if (launch_voice.rank == 0) {
        fprintf(stderr, "%s: %s\n", kind, text);
    } else {
        fprintf(stderr, "%s: rank %d: %s\n", kind, launch_voice.rank, text);
    }
}

// ----------------------------------------------------------------------------
// --gpus

// of the ranks that a parent waits for
typedef struct {
    pid_t *children; // [count], 0: has ended
    int count, running;
    int failed; // its rank, or -1
    int status; // its exit status, 128 + n for signal n
    int by_signal;
    int asked; // a signal has been passed on, or sent, to them: to end by it is no news
} Brood;

static inline void brood_signal(Brood *b, int signal_number) {
    b->asked = 1;
    for (int i = 0; i < b->count; i++) {
        if (b->children[i] > 0) {
            kill(b->children[i], signal_number);
        }
    }
}

// A rank that a signal kills is the cause of the others' end, even if theirs is seen before
static inline void brood_note(Brood *b, int rank, int status) {
    int by_signal = WIFSIGNALED(status), first = b->failed < 0;
    int code = by_signal ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    b->children[rank] = 0;
    b->running--;
    if (code == 0 || !(first || (by_signal && !b->by_signal && !b->asked))) {
        return;
    }
    b->failed = rank;
    b->status = code;
    b->by_signal = by_signal;
    if (by_signal && !b->asked) {
        fprintf(stderr, "error: rank %d was killed by signal %d (%s)\n", rank, code - 128,
                strsignal(code - 128));
    }
}

static inline void brood_reap(Brood *b) {
    int status;
    for (pid_t pid; b->running > 0 && (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        for (int i = 0; i < b->count; i++) {
            if (b->children[i] == pid) {
                brood_note(b, i, status);
            }
        }
    }
}

static inline void launch_caught(int signal_number) {
    (void)signal_number; // sigwait returns it; systems that ignore SIGCHLD do not keep it for that
}

// Waits until all have ended; `signals` are blocked. Returns the exit status. Ctrl-C reaches the whole group,
// so it is not passed on: a second one would not let them save
static inline int launch_supervise(pid_t *children, int count, const sigset_t *signals, int term_seconds,
                                   int kill_seconds) {
    Brood b = {children, count, count, -1, 0, 0, 0};
    int alarms = 0;
    for (brood_reap(&b); b.running > 0; brood_reap(&b)) {
        if (b.failed >= 0 && alarms == 0) {
            alarms = 1;
            alarm((unsigned)term_seconds);
        }
        int caught = 0;
        sigwait(signals, &caught);
        if (caught == SIGINT) {
            b.asked = 1;
        } else if (caught == SIGTERM || caught == SIGHUP) {
            brood_signal(&b, caught);
        } else if (caught == SIGALRM) {
            brood_signal(&b, alarms == 1 ? SIGTERM : SIGKILL);
            alarm(alarms == 1 ? (unsigned)(kill_seconds - term_seconds) : 0);
            alarms = 2;
        }
    }
    if (b.failed >= 0 && !b.by_signal && !b.asked && launch_first_word()) {
        fprintf(stderr, "error: rank %d has ended with exit status %d\n", b.failed, b.status);
    }
    return b.status;
}

// what the parent waits for; a signal that is ignored (SIGHUP, by nohup) stays ignored
static inline void launch_signals(sigset_t *signals) {
    static const int all[] = {SIGCHLD, SIGALRM, SIGTERM, SIGINT, SIGHUP};
    sigemptyset(signals);
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        struct sigaction old;
        if (sigaction(all[i], NULL, &old) == 0 && (old.sa_handler != SIG_IGN || i < 2)) {
            sigaddset(signals, all[i]);
        }
    }
}

static inline void launch_draw_token(char *token, size_t capacity) {
    uint64_t number[2] = {(uint64_t)time(NULL), (uint64_t)getpid()};
    int random = open("/dev/urandom", O_RDONLY);
    if (random >= 0) {
        ssize_t got = read(random, number, sizeof(number));
        (void)got; // time and process will do
        close(random);
    }
    snprintf(token, capacity, "%016llx%016llx", (unsigned long long)number[0], (unsigned long long)number[1]);
}

static inline void launch_listen(Launch *l) {
    struct sockaddr_in address;
    socklen_t size = sizeof(address);
    memset(&address, 0, sizeof(address));
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    l->listener = socket(AF_INET, SOCK_STREAM, 0);
    if (l->listener < 0 || bind(l->listener, (struct sockaddr *)&address, size) != 0 ||
        listen(l->listener, SOMAXCONN) != 0 ||
        getsockname(l->listener, (struct sockaddr *)&address, &size) != 0) {
        die("cannot listen on 127.0.0.1 for the ranks: %s", strerror(errno));
    }
    fcntl(l->listener, F_SETFD, FD_CLOEXEC);
    snprintf(l->master, sizeof(l->master), "127.0.0.1");
    l->port = ntohs(address.sin_port);
}

// the start of a child: it does not outlive its parent
static inline void launch_child(Launch *l, int rank, pid_t parent, const sigset_t *mask) {
    sigprocmask(SIG_SETMASK, mask, NULL);
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGTERM);
#endif
    if (getppid() != parent) {
        _exit(1); // the parent had died before
    }
    l->rank = l->local_rank = rank;
    if (rank != 0) {
        close(l->listener);
        l->listener = -1;
    }
}

// returns in the children only
static inline void launch_fork(Launch *l, int ranks) {
    sigset_t signals, mask;
    pid_t parent = getpid(), *children = NEW(pid_t, ranks);
    launch_listen(l);
    launch_draw_token(l->token, sizeof(l->token));
    void *shared = mmap(NULL, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    launch_voice.said = shared != MAP_FAILED ? (int *)shared : NULL;
    l->launcher = "--gpus";
    l->ranks = l->local_ranks = ranks;
    launch_signals(&signals);
    sigprocmask(SIG_BLOCK, &signals, &mask);
    fflush(NULL); // else each child would write it too
    for (int rank = 0; rank < ranks; rank++) {
        children[rank] = fork();
        if (children[rank] == 0) {
            free(children);
            launch_child(l, rank, parent, &mask);
            return;
        }
        if (children[rank] < 0) {
            int why = errno;
            for (int i = 0; i < rank; i++) {
                kill(children[i], SIGKILL);
            }
            die("cannot start %d processes: %s", ranks, strerror(why));
        }
    }
    close(l->listener);
    signal(SIGCHLD, launch_caught);
    exit(launch_supervise(children, ranks, &signals, LAUNCH_TERM_SECONDS, LAUNCH_KILL_SECONDS));
}

// ----------------------------------------------------------------------------

// Returns in each rank. gpus: --gpus, 0 where it was not given. A launcher that has started a single process
// (an interactive shell of srun's, say) leaves the rest to --gpus
static inline Launch launch_ranks(int gpus) {
    Launch l = launch_read();
    if (l.ranks > 1 && gpus > 0 && gpus != l.local_ranks) {
        if (l.local_rank > 0) {
            exit(2); // once a machine is enough
        }
        die_usage("--gpus %d contradicts %s, which has started %d ranks on this machine\n  ---> drop it",
                  gpus, l.launcher, l.local_ranks);
    }
    if (l.ranks == 1 && gpus > 1) {
        launch_fork(&l, gpus);
    }
    if (l.ranks > 1) {
        launch_voice.rank = l.rank;
        message_taker = launch_message;
    }
    return l;
}

// How many threads a rank should use, so that those of this machine share its cores; 0: as many as it would.
// A launcher may have bound each rank to cores of its own
static inline int launch_threads(const Launch *l) {
    long online = sysconf(_SC_NPROCESSORS_ONLN), allowed = online;
    if (l->local_ranks == 1 || launch_variable("OMP_NUM_THREADS") != NULL) {
        return 0;
    }
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        allowed = CPU_COUNT(&set);
    }
#endif
    long shared = (strcmp(l->launcher, "--gpus") == 0 ? allowed : online) / l->local_ranks;
    long threads = shared < allowed ? shared : allowed;
    return threads > 1 ? (int)threads : 1;
}

#endif
