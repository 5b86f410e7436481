/*
The standard streams: streams_open() is the first line of every main().

A descriptor from 0 to 2 that the caller closed (`<&- >&- 2>&-`) is the number that the next file to be
opened gets: progress would then be printed into a shard, a pipe's end taken for standard input. So they are
opened on /dev/null before anything else is.

What is printed on standard output is buffered, and a disk that is full shows when the buffer is written: at
the program's end, behind the last line of main(). So an exit handler writes it, and makes the exit status 1
if that fails, however the program ends.

Shapes: none. Errors: exit 1.
*/
#ifndef STREAMS_H
#define STREAMS_H

#include <fcntl.h>
#include <unistd.h>
// defines: open, close, _exit
#include "llmc/check.h"

// as die() says it, of a program that is ending already
PRINTF_LIKE(1, 2) static inline void streams_error(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    print_message("error", fmt, args);
    va_end(args);
}

static inline void streams_check_stdout(void) {
    int failed = ferror(stdout);
    if (fflush(stdout) != 0 || failed) {
        streams_error("cannot write standard output: %s\n  ---> %swhat was written into files is whole",
                      strerror(errno), errno == ENOSPC ? "free some disk space; " : "");
        _exit(1); // exit() must not be called again from its own handler
    }
}

static inline void streams_open(void) {
    int fd;
    do {
        fd = open("/dev/null", O_RDWR); // the lowest number that is free
        if (fd < 0) {
            die("cannot open /dev/null: %s\n  ---> give the program its standard streams", strerror(errno));
        }
    } while (fd <= STDERR_FILENO);
    close(fd);
    if (atexit(streams_check_stdout) != 0) {
        die("cannot register an exit handler");
    }
}

#endif
