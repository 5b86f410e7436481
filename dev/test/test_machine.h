// machine.h, arithmetic.h, host_memory.h: what is asked of the machine, on this one and on made-up others

#include "llmc/machine.h"
#include "llmc/run/host_memory.h"
#include <sys/mman.h>
#include <sys/stat.h>
// defines: mmap; mkdir

static void machine_write(const char *path, const char *text) {
    FILE *file = check_fopen(path, "w", "");
    fputs(text, file);
    check_fclose(file, path);
}

static HostMemory machine_limits(const char *groups) {
    HostMemory memory = {64e9, "this machine has"};
    machine_write("build/test/groups", groups);
    cgroup_limits(&memory, "build/test/groups", "build/test/cgroup");
    return memory;
}

// the least of the limits of own group and parents, in either version
static void test_machine_groups(void) {
    static const char *const folders[] = {
        "build/test/cgroup",          "build/test/cgroup/a",        "build/test/cgroup/a/b",
        "build/test/cgroup/memory",   "build/test/cgroup/memory/a", "build/test/cgroup/memory/a/b",
        "build/test/cgroup/memory/c",
    };
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        mkdir(folders[i], 0777);
    }
    machine_write("build/test/cgroup/a/memory.max", "2000000000\n");
    machine_write("build/test/cgroup/a/b/memory.max", "max\n");
    machine_write("build/test/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    machine_write("build/test/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n");
    machine_write("build/test/cgroup/memory/a/b/memory.limit_in_bytes", "1000000000\n");
    HostMemory parent = machine_limits("0::/a/b\n");
    CHECK(parent.bytes == 2e9 && strcmp(parent.whose, "build/test/cgroup/a/memory.max allows") == 0);
    CHECK(machine_limits("4:memory:/a/b\n1:name=systemd:/a/b\n").bytes == 1e9);
    CHECK(machine_limits("12:cpu,cpuacct:/a/b\n0::/a/b\n4:memory:/a/b\n").bytes == 1e9);
    CHECK(machine_limits("4:memory:/c\n").bytes == 64e9);  // no limit there, and the root's is none
    CHECK(machine_limits("0::/\n").bytes == 64e9);         // no such file
    CHECK(machine_limits("0::/not/here\n").bytes == 64e9); // a container sees its own group as the root:
    machine_write("build/test/cgroup/memory.max", "500000000\n");
    CHECK(machine_limits("0::/not/here\n").bytes == 5e8);
    CHECK(machine_limits("0::/\n").bytes == 5e8);
    CHECK(machine_limits("").bytes == 64e9 && machine_limits("nonsense\n:\n").bytes == 64e9);
    unlink("build/test/cgroup/memory.max");
    HostMemory here = host_memory();
    CHECK(here.bytes > 1e6 && here.bytes < 1e15);
}

// reads a mapped file of three pages that has become shorter meanwhile
static void machine_read_beyond(void *arg) {
    const char *path = (const char *)arg;
    size_t size = 3 * (size_t)sysconf(_SC_PAGESIZE);
    int file = open(path, O_RDWR | O_CREAT, 0666);
    if (ftruncate(file, (off_t)size) != 0) {
        die("cannot make the file");
    }
    const volatile char *data = (const volatile char *)mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    catch_faults();
    if (data[size - 1] != 0 || ftruncate(file, 10) != 0) {
        die("cannot cut the file");
    }
    printf("read %d\n", data[size - 1]);
}

static void machine_raise_bus(void *arg) {
    (void)arg;
    catch_faults();
    raise(SIGBUS);
    raise(SIGBUS);
}

static void test_machine_faults(void) {
    char path[] = "build/test/a file that shrinks";
    check_dies(1, "a file that shrinks could not be read: it was cut short", machine_read_beyond, path);
    check_dies(128 + SIGBUS, "", machine_raise_bus, NULL); // of no file: as it would have been
    char found[4096], self[4096];
    CHECK(program_path(self, sizeof(self)) && access(self, X_OK) == 0);
#ifdef __linux__
    mapped_path((uintptr_t)test_machine_faults, found, sizeof(found));
    CHECK(strcmp(found, self) == 0);
    mapped_path(16, found, sizeof(found));
    CHECK(found[0] == '\0');
#else
    (void)found;
#endif
}

static void test_machine(void) {
    CHECK(arithmetic_fault() == NULL);
    test_machine_groups();
    test_machine_faults();
}
