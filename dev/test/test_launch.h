// launchers.h, launch.h: who is which rank, by made-up environments and by real forks

#include "llmc/run/launch.h"

static void launch_clear(void) {
    static const char *const more[] = {"TORCHELASTIC_USE_AGENT_STORE",
                                       "TORCHELASTIC_RUN_ID",
                                       "SLURM_JOB_ID",
                                       "SLURM_STEP_ID",
                                       "MASTER_ADDR",
                                       "MASTER_PORT",
                                       "SLURM_NTASKS",
                                       "OMP_NUM_THREADS"};
    int count;
    const Launcher *table = launchers(&count);
    for (int i = 0; i < count; i++) {
        for (int v = 0; v < LAUNCH_VARIABLES; v++) {
            if (table[i].variables[v] != NULL) {
                unsetenv(table[i].variables[v]);
            }
        }
    }
    for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++) {
        unsetenv(more[i]);
    }
}

// "A=1 B=2": these on top of what is set
static void launch_add(const char *text) {
    char *copy = check_strdup(text), *rest = NULL;
    for (char *word = strtok_r(copy, " ", &rest); word != NULL; word = strtok_r(NULL, " ", &rest)) {
        char *equals = strchr(word, '=');
        *equals = '\0';
        setenv(word, equals + 1, 1);
    }
    free(copy);
}

// nothing but these
static Launch launch_with(const char *text) {
    launch_clear();
    launch_add(text);
    return launch_read();
}

static int launch_is(const Launch *l, const char *launcher, int rank, int ranks, int local_rank,
                     int local_ranks) {
    return strcmp(l->launcher, launcher) == 0 && l->rank == rank && l->ranks == ranks &&
           l->local_rank == local_rank && l->local_ranks == local_ranks && l->listener == -1;
}

static int launch_meets(const Launch *l, const char *master, int port, const char *token) {
    return strcmp(l->master, master) == 0 && l->port == port && strcmp(l->token, token) == 0;
}

#define LAUNCH_TORCHRUN                                                                                      \
    "RANK=5 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=node1 MASTER_PORT=29500"
#define LAUNCH_OMPI                                                                                          \
    "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE="
#define LAUNCH_PMI "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS="
#define LAUNCH_SRUN                                                                                          \
    "SLURM_PROCID=9 SLURM_STEP_NUM_TASKS=11 SLURM_LOCALID=1 SLURM_STEP_TASKS_PER_NODE=4(x2),3 "              \
    "SLURM_NODEID=2 SLURM_STEP_NODELIST=gpu[03,07-09],login1 SLURM_NTASKS=99 "

static void test_launch_tables(void) {
    Launch l = launch_with("");
    CHECK(launch_is(&l, "", 0, 1, 0, 1));
    l = launch_with(LAUNCH_TORCHRUN " TORCHELASTIC_RUN_ID=run7");
    CHECK(launch_is(&l, "torchrun", 5, 16, 1, 4) && launch_meets(&l, "node1", 29500, "run7"));
    l = launch_with(LAUNCH_TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=True");
    CHECK(launch_meets(&l, "node1", 29501, ""));
    l = launch_with(LAUNCH_TORCHRUN " TORCHELASTIC_USE_AGENT_STORE=False");
    CHECK(launch_meets(&l, "node1", 29500, ""));
    l = launch_with(LAUNCH_OMPI "4");
    CHECK(launch_is(&l, "Open MPI", 2, 4, 2, 4) && launch_meets(&l, "127.0.0.1", 29600, ""));
    l = launch_with(LAUNCH_OMPI "3 MASTER_ADDR=node1 MASTER_PORT=1234");
    CHECK(launch_is(&l, "Open MPI", 2, 4, 2, 3) && launch_meets(&l, "node1", 1234, ""));
    l = launch_with(LAUNCH_PMI "4");
    CHECK(launch_is(&l, "MPICH", 3, 4, 1, 4) && launch_meets(&l, "127.0.0.1", 29600, ""));
    l = launch_with(LAUNCH_SRUN "SLURM_JOB_ID=77 SLURM_STEP_ID=2");
    CHECK(launch_is(&l, "srun", 9, 11, 1, 3) && strcmp(l.master, "gpu03") == 0);
    CHECK(strcmp(l.token, "77.2") == 0 && l.port >= 15000 && l.port < 31000);
    Launch again = launch_with(LAUNCH_SRUN "SLURM_JOB_ID=77 SLURM_STEP_ID=2 RANK=");
    Launch other = launch_with(LAUNCH_SRUN "SLURM_JOB_ID=77 SLURM_STEP_ID=3");
    CHECK(again.port == l.port && other.port != l.port);
    l = launch_with(LAUNCH_SRUN "SLURM_JOB_ID=77 MASTER_ADDR=ib0 MASTER_PORT=4000");
    CHECK(launch_meets(&l, "ib0", 4000, "77."));
    // a batch script, without srun
    l = launch_with("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=8 SLURM_JOB_ID=77");
    CHECK(launch_is(&l, "", 0, 1, 0, 1));
    // launchers under srun, and srun with PMI
    l = launch_with(LAUNCH_SRUN LAUNCH_TORCHRUN);
    CHECK(launch_is(&l, "torchrun", 5, 16, 1, 4));
    l = launch_with(LAUNCH_SRUN LAUNCH_OMPI "4");
    CHECK(launch_is(&l, "Open MPI", 2, 4, 2, 4));
    l = launch_with(LAUNCH_SRUN "PMI_RANK=9 PMI_SIZE=11");
    CHECK(launch_is(&l, "srun", 9, 11, 1, 3));
    launch_clear();
}

static int launch_first_node_is(const char *list, const char *want) {
    char node[64];
    slurm_first_node(node, sizeof(node), list);
    return strcmp(node, want) == 0;
}

static void test_launch_slurm_lists(void) {
    CHECK(launch_first_node_is("gpu[03,07-09],login1", "gpu03"));
    CHECK(launch_first_node_is("gpu[007-009]", "gpu007"));
    CHECK(launch_first_node_is("login1,gpu[1-2]", "login1"));
    CHECK(launch_first_node_is("rack[1-2]node[05,08]x,other", "rack1node05x"));
    CHECK(launch_first_node_is("n-1.cluster.example", "n-1.cluster.example"));
    CHECK(launch_first_node_is("", "") && launch_first_node_is("a[", "a") &&
          launch_first_node_is("a[1", "a1"));
    int all;
    CHECK(slurm_tasks("4(x2),3", 0, &all) == 4 && all == 11);
    CHECK(slurm_tasks("4(x2),3", 1, &all) == 4 && slurm_tasks("4(x2),3", 2, &all) == 3);
    CHECK(slurm_tasks("8", 0, &all) == 8 && all == 8);
    CHECK(slurm_tasks("1,2(x10),3", 11, &all) == 3 && all == 24);
    static const char *const bad[] = {"",   "x",   "4(x2",   "4(x)",  "4(x0)", "0",
                                      "-1", "4;3", "4(x2)3", "99999", "4,x"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        CHECK(slurm_tasks(bad[i], 0, &all) == 0);
    }
    CHECK(slurm_tasks("4(x2),3", 3, &all) == 0);
}

static void launch_reads(void *arg) {
    launch_with((const char *)arg);
}

static void launch_refused(const char *environment, const char *text) {
    char copy[1024];
    check_format(copy, sizeof(copy), "%s", environment);
    check_dies(1, text, launch_reads, copy);
}

static void test_launch_faults(void) {
    launch_refused("RANK=5 WORLD_SIZE=16",
                   "torchrun's variables are incomplete: there is RANK=5 WORLD_SIZE=16, and "
                   "there is no LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT");
    launch_refused("OMPI_COMM_WORLD_SIZE=4", "and there is no OMPI_COMM_WORLD_RANK");
    launch_refused("PMI_RANK=0 PMI_SIZE=2", "there is no MPI_LOCALRANKID MPI_LOCALNRANKS");
    launch_refused("SLURM_STEP_NUM_TASKS=2", "srun's variables are incomplete");
    launch_refused(LAUNCH_TORCHRUN " RANK=16",
                   "torchrun's variables contradict each other: RANK=16 WORLD_SIZE=16");
    launch_refused(LAUNCH_TORCHRUN " LOCAL_RANK=4", "contradict");
    launch_refused(LAUNCH_TORCHRUN " LOCAL_WORLD_SIZE=17", "contradict");
    launch_refused(LAUNCH_TORCHRUN " RANK=0", "contradict"); // its local rank is 1
    launch_refused(LAUNCH_TORCHRUN " RANK=five", "RANK is \"five\"");
    launch_refused(LAUNCH_TORCHRUN " MASTER_PORT=65536", "MASTER_PORT is \"65536\"");
    launch_refused(LAUNCH_OMPI "3", "does not say where rank 0 is\n  ---> export");
    launch_refused(LAUNCH_SRUN "SLURM_STEP_NUM_TASKS=12", "srun's variables contradict each other");
    launch_refused(LAUNCH_SRUN "SLURM_STEP_TASKS_PER_NODE=many", "is \"many\"");
}

// ----------------------------------------------------------------------------
// --gpus

typedef struct {
    const char *environment;
    int gpus;
    void (*rank)(const Launch *l); // what each does
} LaunchCase;

static void launch_runs(void *arg) {
    const LaunchCase *c = (const LaunchCase *)arg;
    launch_clear();
    launch_add(c->environment);
    Launch l = launch_ranks(c->gpus);
    if (c->rank != NULL) {
        c->rank(&l);
    }
    fflush(stdout);
}

static char launch_output[65536];

static int launch_status(const char *environment, int gpus, void (*rank)(const Launch *l)) {
    LaunchCase c = {environment, gpus, rank};
    return run_in_child(launch_runs, &c, launch_output, sizeof(launch_output));
}

static int launch_says(const char *text) {
    int times = 0;
    for (const char *found = launch_output; (found = strstr(found, text)) != NULL; found++) {
        times++;
    }
    return times;
}

static void launch_prints(const Launch *l) {
    printf("rank %d of %d, %d of %d at %s:%d %s, %s listens, %zu bytes of token\n", l->rank, l->ranks,
           l->local_rank, l->local_ranks, l->master, l->port > 0, l->launcher,
           l->listener >= 0 ? "which" : "who never", strlen(l->token));
    warn("so much for %d", l->rank);
}

static void launch_rank_2_ends(const Launch *l) {
    if (l->rank == 2) {
        exit(3);
    }
}

static void launch_rank_1_killed(const Launch *l) {
    if (l->rank == 1) {
        raise(SIGKILL);
    }
    usleep(300000);
    exit(1); // as if the star had seen it
}

static void launch_rank_1_dies(const Launch *l) {
    if (l->rank == 1) {
        die_usage("no such thing");
    }
}

static void launch_all_die(const Launch *l) {
    (void)l;
    die("no such file");
}

static void launch_waits(const Launch *l) {
    printf("%d waits\n", l->rank);
    fflush(stdout);
    if (l->rank == 0) {
        usleep(100000);
        kill(getppid(), SIGINT); // is not passed on
        usleep(300000);
        printf("not interrupted\n");
        fflush(stdout);
        kill(getppid(), SIGTERM);
    }
    sleep(20);
}

static void launch_orphans(const Launch *l) {
    printf("%d is here\n", l->rank);
    fflush(stdout);
    if (l->rank == 0) {
        usleep(200000);
        kill(getppid(), SIGKILL);
    }
    sleep(20); // holds the pipe's end
}

static void test_launch_gpus(void) {
    CHECK(launch_status("", 3, launch_prints) == 0);
    CHECK(launch_says("rank 0 of 3, 0 of 3 at 127.0.0.1:1 --gpus, which listens, 32 bytes of token\n") == 1);
    CHECK(launch_says("rank 2 of 3, 2 of 3 at 127.0.0.1:1 --gpus, who never listens") == 1);
    CHECK(launch_says("warning") == 1 && launch_says("warning: so much for 0\n") == 1);
    CHECK(launch_status("", 1, launch_prints) == 0 && launch_says("rank 0 of 1") == 1);
    CHECK(launch_status("", 0, launch_prints) == 0 && launch_says("rank 0 of 1") == 1);
    CHECK(launch_status(LAUNCH_TORCHRUN, 4, launch_prints) == 0 && launch_says("rank 5 of 16") == 1);
    CHECK(launch_status(LAUNCH_TORCHRUN, 8, NULL) == 2 && launch_output[0] == '\0'); // local rank 1 of 4
    CHECK(launch_status(LAUNCH_TORCHRUN " RANK=4 LOCAL_RANK=0", 8, NULL) == 2);
    CHECK(launch_says("--gpus 8 contradicts torchrun, which has started 4 ranks on this machine") == 1);
    // an interactive shell of srun's
    const char *shell = "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1 "
                        "SLURM_NODEID=0 SLURM_STEP_NODELIST=gpu1";
    CHECK(launch_status(shell, 0, launch_prints) == 0 && launch_says("rank 0 of 1") == 1);
    CHECK(launch_status(shell, 2, launch_prints) == 0 && launch_says("of 2, ") == 2);
}

static void test_launch_ends(void) {
    CHECK(launch_status("", 4, launch_rank_2_ends) == 3);
    CHECK(launch_says("error: rank 2 has ended with exit status 3\n") == 1 && launch_says("error") == 1);
    CHECK(launch_status("", 4, launch_rank_1_killed) == 128 + SIGKILL);
    CHECK(launch_says("error: rank 1 was killed by signal 9 (Killed)\n") == 1 && launch_says("error") == 1);
    CHECK(launch_status("", 4, launch_rank_1_dies) == 2);
    CHECK(launch_says("usage error: rank 1: no such thing\n") == 1 && launch_says("error") == 1);
    CHECK(launch_status("", 4, launch_all_die) == 1 && launch_says("no such file") == 1 &&
          launch_says("error") == 1);
    double begin = seconds_now();
    CHECK(launch_status("", 3, launch_waits) == 128 + SIGTERM && launch_says("waits") == 3);
    CHECK(launch_says("error") == 0 && launch_says("not interrupted") == 1);
#ifdef __linux__
    CHECK(launch_status("", 3, launch_orphans) == 128 + SIGKILL && launch_says("is here") == 3);
#endif
    CHECK(seconds_now() - begin < 10.0);
}

// one fails, one ends when it is asked to, one does not
static void launch_lingers(void *arg) {
    pid_t children[3];
    sigset_t signals, mask;
    (void)arg;
    launch_signals(&signals);
    sigprocmask(SIG_BLOCK, &signals, &mask);
    for (int i = 0; i < 3; i++) {
        children[i] = fork();
        if (children[i] == 0) {
            signal(SIGTERM, i == 2 ? SIG_IGN : SIG_DFL);
            sigprocmask(SIG_SETMASK, &mask, NULL);
            if (i > 0) {
                sleep(20);
            }
            _exit(5);
        }
    }
    signal(SIGCHLD, launch_caught);
    double begin = seconds_now();
    int status = launch_supervise(children, 3, &signals, 1, 2);
    double seconds = seconds_now() - begin;
    printf("status %d, %s\n", status, seconds > 1.7 && seconds < 6.0 ? "in time" : "not in time");
}

// whichever is seen first, the rank that a signal has killed is the cause
static void launch_notes(void *arg) {
    pid_t children[3] = {11, 12, 13};
    Brood b = {children, 3, 3, -1, 0, 0, 0};
    (void)arg;
    brood_note(&b, 0, 1 << 8);
    brood_note(&b, 2, SIGKILL);
    brood_note(&b, 1, SIGSEGV);
    printf("rank %d, status %d, %d left\n", b.failed, b.status, b.running);
}

static void test_launch_threads(void) {
    Launch l = launch_with(LAUNCH_TORCHRUN);
    CHECK(launch_threads(&l) >= 1);
    l.local_ranks = 4096;
    CHECK(launch_threads(&l) == 1);
    l.local_ranks = 1;
    CHECK(launch_threads(&l) == 0);
    l = launch_with(LAUNCH_TORCHRUN " OMP_NUM_THREADS=3");
    CHECK(launch_threads(&l) == 0);
    launch_clear();
}

static void test_launch(void) {
    const char *set = getenv("OMP_NUM_THREADS"); // for the tests after this one
    char *threads = set != NULL ? check_strdup(set) : NULL;
    test_launch_tables();
    test_launch_slurm_lists();
    test_launch_faults();
    test_launch_gpus();
    test_launch_ends();
    check_dies(0, "status 5, in time", launch_lingers, NULL);
    check_dies(0, "rank 2, status 137, 0 left", launch_notes, NULL);
    test_launch_threads();
    if (threads != NULL) {
        setenv("OMP_NUM_THREADS", threads, 1);
        free(threads);
    }
}
