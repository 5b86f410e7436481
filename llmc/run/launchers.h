/*
What a launcher's environment says: which rank of a run this process is, and where rank 0 is to be met.

    launcher   rank, ranks, local ones         where rank 0 listens                       token
    torchrun   RANK, WORLD_SIZE, LOCAL_...     MASTER_ADDR, MASTER_PORT (+ 1, see there)  TORCHELASTIC_RUN_ID
    Open MPI   OMPI_COMM_WORLD_...             127.0.0.1 or MASTER_ADDR, 29600            none
    MPICH      PMI_..., MPI_LOCAL...           the same; Intel MPI too                    none
    srun       SLURM_PROCID, SLURM_STEP_...    the step's first node, a port of the step  job and step

MASTER_ADDR and MASTER_PORT win where the user sets them. An empty variable is an unset one.

Errors: exit 1 where variables are incomplete or contradict each other; the message says which were seen.
*/
#ifndef LAUNCHERS_H
#define LAUNCHERS_H

#include "llmc/check.h"

typedef struct {
    int rank, ranks;             // of all
    int local_rank, local_ranks; // of those on this machine
    char master[256];            // where rank 0 listens
    int port;
    int listener;   // a listening socket that rank 0 has from its parent, else -1
    char token[64]; // what the ranks of this run know, and others do not; "" where the launcher gives none
    const char *launcher; // "" where there was none
} Launch;

enum { LAUNCH_MOST = 4096 }; // ranks

enum { LAUNCH_RANK, LAUNCH_RANKS, LAUNCH_LOCAL_RANK, LAUNCH_LOCAL_RANKS, LAUNCH_VARIABLES = 6 };

typedef struct {
    const char *name;
    const char *variables[LAUNCH_VARIABLES];         // the four above, then whatever else it must give
    const char *signs[2];                            // one of these is set: the launcher is there
    int (*tasks)(const Launch *l, const char *text); // how many ranks this machine has, from the fourth
    void (*place)(Launch *l);                        // sets master, port and token
} Launcher;

// NULL where it is not set
static inline const char *launch_variable(const char *name) {
    const char *value = name != NULL ? getenv(name) : NULL;
    return value != NULL && value[0] != '\0' ? value : NULL;
}

static inline int launch_number(const char *name, int least, int most) {
    const char *text = launch_variable(name);
    char *end = NULL;
    long value = text != NULL ? strtol(text, &end, 10) : -1;
    if (text == NULL || end == text || *end != '\0' || value < least || value > most) {
        die("the variable %s is \"%s\": not a number from %d to %d", name, text != NULL ? text : "", least,
            most);
    }
    return (int)value;
}

static inline int launch_tasks_plain(const Launch *l, const char *name) {
    (void)l;
    return launch_number(name, 1, LAUNCH_MOST);
}

// Slurm's tasks per node, as in "4(x2),3": those of a node; *all: of all nodes. 0 where the text is no such
// list
static inline int slurm_tasks(const char *text, int node, int *all) {
    int tasks = 0;
    *all = 0;
    for (int first = 0; *text != '\0';) {
        char *end;
        long n = strtol(text, &end, 10), nodes = 1;
        if (end == text || n < 1 || n > LAUNCH_MOST) {
            return 0;
        }
        if (strncmp(end, "(x", 2) == 0) {
            text = end + 2;
            nodes = strtol(text, &end, 10);
            if (end == text || *end++ != ')' || nodes < 1 || nodes > LAUNCH_MOST) {
                return 0;
            }
        }
        if ((*end != ',' && *end != '\0') || *all + n * nodes > LAUNCH_MOST) {
            return 0;
        }
        tasks = node >= first && node < first + nodes ? (int)n : tasks;
        first += (int)nodes;
        *all += (int)(n * nodes);
        text = *end == ',' ? end + 1 : end;
    }
    return tasks;
}

static inline int launch_tasks_srun(const Launch *l, const char *name) {
    int all, node = launch_number("SLURM_NODEID", 0, LAUNCH_MOST);
    int tasks = slurm_tasks(launch_variable(name), node, &all);
    if (tasks == 0 || all != l->ranks) {
        die("srun's variables contradict each other: %s is \"%s\", SLURM_NODEID %d, SLURM_STEP_NUM_TASKS %d",
            name, launch_variable(name), node, l->ranks);
    }
    return tasks;
}

// the first of Slurm's node list: gpu03 of "gpu[03,07-09],login1", r1n05 of "r[1-2]n[05-08]"
static inline void slurm_first_node(char *out, size_t capacity, const char *list) {
    size_t used = 0;
    while (*list != '\0' && *list != ',' && used + 1 < capacity) {
        if (*list != '[') {
            out[used++] = *list++;
            continue;
        }
        for (list++; *list != '\0' && strchr(",-]", *list) == NULL && used + 1 < capacity; list++) {
            out[used++] = *list;
        }
        list += strcspn(list, "]");
        list += *list == ']';
    }
    out[used] = '\0';
}

static inline void launch_copy(char *out, size_t capacity, const char *name) {
    const char *text = launch_variable(name);
    snprintf(out, capacity, "%s", text != NULL ? text : "");
}

// MASTER_ADDR and MASTER_PORT win where the user sets them
static inline void launch_place_by_user(Launch *l) {
    if (launch_variable("MASTER_ADDR") != NULL) {
        launch_copy(l->master, sizeof(l->master), "MASTER_ADDR");
    }
    if (launch_variable("MASTER_PORT") != NULL) {
        l->port = launch_number("MASTER_PORT", 1, 65535);
    }
}

// torchrun's own store listens on MASTER_PORT, then
static inline void launch_place_torchrun(Launch *l) {
    const char *agent = launch_variable("TORCHELASTIC_USE_AGENT_STORE");
    launch_place_by_user(l);
    if (agent != NULL && strcmp(agent, "True") == 0) {
        l->port += l->port < 65535 ? 1 : -1;
    }
    launch_copy(l->token, sizeof(l->token), "TORCHELASTIC_RUN_ID");
}

static inline void launch_place_mpi(Launch *l) {
    if (l->local_ranks < l->ranks && launch_variable("MASTER_ADDR") == NULL) {
        die("%s has started %d ranks, %d of them here, and does not say where rank 0 is\n"
            "  ---> export its machine's name to all: mpirun -x MASTER_ADDR=$(hostname) (Open MPI), "
            "mpirun -genv MASTER_ADDR $(hostname) (others)",
            l->launcher, l->ranks, l->local_ranks);
    }
    snprintf(l->master, sizeof(l->master), "127.0.0.1");
    l->port = 29600;
    launch_place_by_user(l);
}

static inline void launch_place_srun(Launch *l) {
    const char *job = launch_variable("SLURM_JOB_ID"), *step = launch_variable("SLURM_STEP_ID");
    uint32_t hash = 2166136261u; // FNV-1a
    snprintf(l->token, sizeof(l->token), "%s.%s", job != NULL ? job : "", step != NULL ? step : "");
    for (const char *c = l->token; *c != '\0'; c++) {
        hash = (hash ^ (unsigned char)*c) * 16777619u;
    }
    slurm_first_node(l->master, sizeof(l->master), launch_variable("SLURM_STEP_NODELIST"));
    l->port = 15000 + (int)(hash % 16000);
    launch_place_by_user(l);
}

// The first whose variables are complete is taken: mpirun and torchrun may themselves run under srun. A batch
// script has SLURM_PROCID and SLURM_NTASKS without srun; srun --mpi=pmi2 sets PMI_RANK without a local one
static inline const Launcher *launchers(int *count) {
    static const Launcher table[] = {
        {"torchrun",
         {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"},
         {"RANK", "WORLD_SIZE"},
         launch_tasks_plain,
         launch_place_torchrun},
        {"Open MPI",
         {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
          "OMPI_COMM_WORLD_LOCAL_SIZE", NULL, NULL},
         {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
         launch_tasks_plain,
         launch_place_mpi},
        {"MPICH",
         {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", NULL, NULL},
         {"PMI_RANK", "PMI_SIZE"},
         launch_tasks_plain,
         launch_place_mpi},
        {"srun",
         {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
          "SLURM_NODEID", "SLURM_STEP_NODELIST"},
         {"SLURM_STEP_NUM_TASKS", NULL},
         launch_tasks_srun,
         launch_place_srun},
    };
    *count = (int)(sizeof(table) / sizeof(table[0]));
    return table;
}

// " RANK=3 WORLD_SIZE=8", or with set = 0 the names of those that are not set; returns how many
static inline int launch_list(char *out, size_t capacity, const Launcher *launcher, int set) {
    int count = 0;
    size_t used = 0;
    out[0] = '\0';
    for (int i = 0; i < LAUNCH_VARIABLES; i++) {
        const char *name = launcher->variables[i], *value = launch_variable(name);
        if (name != NULL && (value != NULL) == set) {
            used += (size_t)snprintf(out + used, capacity - used, set ? " %s=%.60s" : " %s", name, value);
            count++;
        }
    }
    return count;
}

static inline void launch_read_from(Launch *l, const Launcher *launcher) {
    const char *const *v = launcher->variables;
    char seen[1024];
    l->launcher = launcher->name;
    l->rank = launch_number(v[LAUNCH_RANK], 0, LAUNCH_MOST);
    l->ranks = launch_number(v[LAUNCH_RANKS], 1, LAUNCH_MOST);
    l->local_rank = launch_number(v[LAUNCH_LOCAL_RANK], 0, LAUNCH_MOST);
    l->local_ranks = launcher->tasks(l, v[LAUNCH_LOCAL_RANKS]);
    if (l->rank >= l->ranks || l->local_rank >= l->local_ranks || l->local_ranks > l->ranks ||
        l->local_rank > l->rank) {
        launch_list(seen, sizeof(seen), launcher, 1);
        die("%s's variables contradict each other:%s", launcher->name, seen);
    }
    if (l->ranks > 1) {
        launcher->place(l);
    }
}

// what the environment says; without a launcher, one rank
static inline Launch launch_read(void) {
    Launch l;
    char seen[1024], missing[1024];
    const Launcher *partial = NULL;
    int count;
    const Launcher *table = launchers(&count);
    memset(&l, 0, sizeof(l));
    l.ranks = l.local_ranks = 1;
    l.listener = -1;
    l.launcher = "";
    for (int i = 0; i < count; i++) {
        const char *const *signs = table[i].signs;
        if (launch_variable(signs[0]) == NULL && launch_variable(signs[1]) == NULL) {
            continue;
        }
        if (launch_list(missing, sizeof(missing), &table[i], 0) == 0) {
            launch_read_from(&l, &table[i]);
            return l;
        }
        partial = partial == NULL ? &table[i] : partial;
    }
    if (partial != NULL) {
        launch_list(seen, sizeof(seen), partial, 1);
        launch_list(missing, sizeof(missing), partial, 0);
        die("%s's variables are incomplete: there is%s, and there is no%s\n"
            "  ---> start all ranks with the launcher, or unset these variables and use --gpus",
            partial->name, seen, missing);
    }
    return l;
}

#endif
