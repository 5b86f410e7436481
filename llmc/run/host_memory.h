/*
How much memory this process may use: the least of the machine's and of the limits that a container sets.

A container (Docker, Kubernetes, Slurm) is a group of processes with a limit, inside groups with limits of
their own; who takes more is killed, without a word. Linux shows the groups as files. /proc/self/cgroup names
those that a process is in, a line each:

    version 2   0::/a/b             limit: /sys/fs/cgroup/a/b/memory.max, a number of bytes or "max"
    version 1   4:memory:/a/b              /sys/fs/cgroup/memory/a/b/memory.limit_in_bytes

and each parent /a, / may have such a file too. Inside of a container the own group often is the root, and the
path that is named is not to be seen: files that are not there are no limits.

Errors: none; what cannot be read is no limit.
*/
#ifndef HOST_MEMORY_H
#define HOST_MEMORY_H

#include <unistd.h>
// defines: sysconf
#ifdef __APPLE__
#include <sys/sysctl.h>
// defines: sysctlbyname
#endif
#include "llmc/check.h"

typedef struct {
    double bytes;
    char whose[8500]; // "this machine has", or the file that says so
} HostMemory;

// the number in a file of the group and of each of its parents, where it is less than *memory
static inline void cgroup_limit(HostMemory *memory, const char *root, const char *group, const char *name) {
    char path[4096], file[8400];
    check_format(path, sizeof(path), "%s", group);
    for (size_t end = strlen(path);; end--) {
        double bytes;
        if (end > 0 && path[end] != '/' && path[end] != '\0') {
            continue;
        }
        path[end] = '\0';
        snprintf(file, sizeof(file), "%s%s/%s", root, path, name);
        FILE *limit = fopen(file, "r");
        if (limit != NULL && fscanf(limit, "%lf", &bytes) == 1 && bytes < memory->bytes) {
            memory->bytes = bytes;
            snprintf(memory->whose, sizeof(memory->whose), "%s allows", file);
        }
        if (limit != NULL) {
            fclose(limit);
        }
        if (end == 0) {
            return;
        }
    }
}

// groups: the file /proc/self/cgroup; root: where the groups' files are
static inline void cgroup_limits(HostMemory *memory, const char *groups, const char *root) {
    char line[4096], folder[4096];
    FILE *file = fopen(groups, "r");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char *controllers = strchr(line, ':');
        char *group = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
        if (group == NULL) {
            continue;
        }
        *group++ = '\0';
        group[strcspn(group, "\n")] = '\0';
        if (strcmp(controllers, ":memory") == 0) {
            snprintf(folder, sizeof(folder), "%.4000s/memory", root);
            cgroup_limit(memory, folder, group, "memory.limit_in_bytes");
        } else if (strcmp(controllers, ":") == 0) {
            cgroup_limit(memory, root, group, "memory.max");
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

static inline HostMemory host_memory(void) {
    HostMemory memory = {0.0, "this machine has"};
#ifdef __APPLE__
    uint64_t bytes = 0;
    size_t size = sizeof(bytes);
    sysctlbyname("hw.memsize", &bytes, &size, NULL, 0);
    memory.bytes = (double)bytes;
#else
    memory.bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    cgroup_limits(&memory, "/proc/self/cgroup", "/sys/fs/cgroup");
#endif
    return memory;
}

#endif
