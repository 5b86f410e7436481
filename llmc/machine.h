/*
What a program asks of the machine before it does anything else: machine_start is the first line of each main.

    CPU          the instructions that the build uses are there; asked even before main, see cpu_check
    arithmetic   is IEEE's (arithmetic.h)
    threads      that wait for others soon sleep. OpenMP's own default is to spin for milliseconds, which on a
                 machine with one busy process beside takes the core from the very thread that is waited for
    mapped files that shrink or fail while they are read end the program with a message, where the system
                 would kill it (SIGBUS)

Errors: exit 1, with a message on stderr.
*/
#ifndef MACHINE_H
#define MACHINE_H

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>
// defines: open, sigaction, read, write, readlink, execv, _exit
#ifdef __APPLE__
#include <mach-o/dyld.h>
// defines: _NSGetExecutablePath
#endif
#include "llmc/arithmetic.h"
#include "llmc/check.h"

// ----------------------------------------------------------------------------
// messages from where little is safe: no stdio, no allocation

static inline void say(const char *text) {
    ssize_t written = write(STDERR_FILENO, text, strlen(text));
    (void)written; // nobody is left to tell
}

#define MACHINE_REBUILD "\n  ---> make clean && make      (on this machine)\n"

// ----------------------------------------------------------------------------
// the CPU

/*
-march=native turns on what the building machine has; elsewhere the first such instruction would be a SIGILL.
main itself may hold one in its first line, so the question is asked before main, by a function that the
compiler must build without them. (What no list has, the handler of SIGILL below reports.)
*/
#if (defined(__x86_64__) || defined(__i386__)) && !defined(__CUDA_ARCH__)
#ifdef __clang__
#define PLAIN_CPU "no-avx,no-bmi,no-bmi2,no-popcnt,no-lzcnt,no-movbe"
#else
#define PLAIN_CPU "general-regs-only,no-avx,no-bmi,no-bmi2,no-popcnt,no-lzcnt,no-movbe"
#endif
#define CPU_NEEDS(feature)                                                                                   \
    if (!__builtin_cpu_supports(feature)) {                                                                  \
        missing = feature;                                                                                   \
    }

__attribute__((constructor, noinline, target(PLAIN_CPU))) static void cpu_check(void) {
    const char *missing = NULL;
    __builtin_cpu_init();
#ifdef __SSE4_2__
    CPU_NEEDS("sse4.2")
#endif
#ifdef __POPCNT__
    CPU_NEEDS("popcnt")
#endif
#ifdef __BMI__
    CPU_NEEDS("bmi")
#endif
#ifdef __BMI2__
    CPU_NEEDS("bmi2")
#endif
#ifdef __FMA4__
    CPU_NEEDS("fma4")
#endif
#ifdef __FMA__
    CPU_NEEDS("fma")
#endif
#ifdef __AVX512BF16__
    CPU_NEEDS("avx512bf16")
#endif
#ifdef __AVX512VNNI__
    CPU_NEEDS("avx512vnni")
#endif
#ifdef __AVX512VPOPCNTDQ__
    CPU_NEEDS("avx512vpopcntdq")
#endif
#ifdef __AVX512VBMI2__
    CPU_NEEDS("avx512vbmi2")
#endif
#ifdef __AVX512VBMI__
    CPU_NEEDS("avx512vbmi")
#endif
#ifdef __AVX512BW__
    CPU_NEEDS("avx512bw")
#endif
#ifdef __AVX512DQ__
    CPU_NEEDS("avx512dq")
#endif
#ifdef __AVX512VL__
    CPU_NEEDS("avx512vl")
#endif
#ifdef __AVX512F__
    CPU_NEEDS("avx512f")
#endif
#ifdef __AVX2__
    CPU_NEEDS("avx2")
#endif
#ifdef __AVX__
    CPU_NEEDS("avx")
#endif
    if (missing != NULL) {
        say("error: this program was built for a CPU with ");
        say(missing);
        say(", which this one lacks" MACHINE_REBUILD);
        _exit(1);
    }
}
#endif

// ----------------------------------------------------------------------------
// mapped files

// the path of the file that is mapped at `address`; "" where there is none. Reads /proc/self/maps, where that
// exists: "begin-end rwxp offset device inode   path" a line
static inline void mapped_path(uintptr_t address, char *path, size_t capacity) {
    char buffer[4096];
    uintptr_t bound[2] = {0, 0};
    int field = 0, inside = 0; // field 0, 1: the bounds; 2: what follows; 3: the path
    size_t used = 0;
    int maps = open("/proc/self/maps", O_RDONLY);
    path[0] = '\0';
    for (ssize_t n; maps >= 0 && (n = read(maps, buffer, sizeof(buffer))) > 0;) {
        for (ssize_t i = 0; i < n; i++) {
            char c = buffer[i];
            if (c == '\n') {
                if (inside) {
                    close(maps);
                    return;
                }
                bound[0] = bound[1] = 0;
                field = inside = 0;
                used = 0;
                path[0] = '\0';
            } else if (field < 2 && (c == '-' || c == ' ')) {
                field++;
                inside = field == 2 && address >= bound[0] && address < bound[1];
            } else if (field < 2) {
                bound[field] = bound[field] << 4 | (uintptr_t)(c <= '9' ? c - '0' : c - 'a' + 10);
            } else if (field == 3 || c == '/') {
                field = 3;
                if (used + 1 < capacity) {
                    path[used++] = c;
                    path[used] = '\0';
                }
            }
        }
    }
    path[0] = '\0';
    if (maps >= 0) {
        close(maps);
    }
}

// SIGBUS of a mapped file, SIGILL: a message and the end. Of anything else: what would have happened anyway
static inline void machine_fault(int signal_number, siginfo_t *info, void *context) {
    char path[4096];
    (void)context;
    mapped_path((uintptr_t)info->si_addr, path, sizeof(path));
#ifndef __linux__
    if (info->si_code == BUS_ADRERR) {
        strcpy(path, "a mapped file");
    }
#endif
    if (signal_number == SIGBUS && path[0] != '\0') {
        say("error: ");
        say(path);
        say(" could not be read: it was cut short while it was in use, or its disk failed\n"
            "  ---> copy or make it again, then --resume the run\n");
        _exit(1);
    }
    if (signal_number == SIGILL) {
        say("error: this CPU lacks an instruction that the program was built with" MACHINE_REBUILD);
        _exit(1);
    }
    signal(signal_number, SIG_DFL); // and on return the instruction fails again
}

static inline void catch_faults(void) {
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = machine_fault;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGILL, &action, NULL);
}

// ----------------------------------------------------------------------------
// threads

// this program's own file; 0 where the system does not say
static inline int program_path(char *path, size_t capacity) {
#ifdef __APPLE__
    uint32_t size = (uint32_t)capacity;
    return _NSGetExecutablePath(path, &size) == 0;
#else
    ssize_t n = readlink("/proc/self/exe", path, capacity - 1);
    path[n > 0 ? n : 0] = '\0';
    return n > 0 && (size_t)n < capacity - 1;
#endif
}

// Threads that wait for others spin for some 10 us, then sleep, unless the user said how they should wait. That
// is long enough for the rest of a loop that all began together (sleeping at once makes a step of a very small
// model 2.5 times as long), and too short to hold a core that somebody needs (the runtimes' own milliseconds
// make a step 3 to 10 times as long beside one busy process on two cores: dev/LOG.md). clang's runtime reads its
// environment at the first parallel loop; gcc's before main, so the program starts itself anew, once (1 ms).
// Where that cannot be done the program goes on as it is
static inline void wait_briefly(char **argv) {
#ifdef _OPENMP
    if (getenv("OMP_WAIT_POLICY") != NULL || getenv("GOMP_SPINCOUNT") != NULL ||
        getenv("KMP_BLOCKTIME") != NULL) {
        return;
    }
    setenv("GOMP_SPINCOUNT", "1000", 1); // turns of a loop
    setenv("KMP_BLOCKTIME", "1", 1);     // ms: clang's runtime knows nothing shorter but 0
#ifndef __clang__
    char path[4096];
    if (program_path(path, sizeof(path))) {
        execv(path, argv);
    }
#endif
#endif
    (void)argv;
}

// ----------------------------------------------------------------------------

static inline void machine_start(char **argv) {
    const char *fault = arithmetic_fault();
    if (fault != NULL) {
        die("this program was built or started so that %s: its results would be others\n"
            "  ---> make clean && make, without the compiler's fast-math options in CFLAGS",
            fault);
    }
    wait_briefly(argv);
    catch_faults();
}

#endif
