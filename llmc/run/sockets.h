/*
TCP between the ranks: connections that are made, and all of a message or nothing. A signal that interrupts a
call is no error; a peer that has gone is one, and raises no signal (SIGPIPE).
*/
#ifndef SOCKETS_H
#define SOCKETS_H

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
// defines: fcntl, getaddrinfo, TCP_NODELAY, poll, socket, clock_gettime, close
#include "llmc/check.h"

#ifdef MSG_NOSIGNAL
#define SOCKET_SEND_FLAGS MSG_NOSIGNAL
#else
#define SOCKET_SEND_FLAGS 0 // macOS: SO_NOSIGPIPE
#endif

enum { SOCKET_LOST_SECONDS = 30 }; // without an answer of the other machine

static inline double socket_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline void socket_option(int fd, int level, int option, int value) {
    setsockopt(fd, level, option, &value, sizeof(value)); // a system without it does its best
}

static inline void socket_block(int fd, int blocking) {
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

// What every connection has. The machine at the other end may be gone; keepalive asks it
static inline void socket_settle(int fd) {
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    socket_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    socket_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
    socket_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, SOCKET_LOST_SECONDS / 3);
    socket_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, SOCKET_LOST_SECONDS / 6);
    socket_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
#endif
#ifdef SO_NOSIGPIPE
    socket_option(fd, SOL_SOCKET, SO_NOSIGPIPE, 1);
#endif
}

// For a connection that the other end always reads: bytes that are not taken mean that it is gone. (A full
// one of which nobody reads for a while would be cut as well)
static inline void socket_lose_soon(int fd) {
#ifdef TCP_USER_TIMEOUT
    socket_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 1000 * SOCKET_LOST_SECONDS);
#endif
    (void)fd;
}

// waits for events, and looks once in any case; 0 when the time (socket_clock's; < 0: for ever) is over
static inline int socket_wait(int fd, short events, double deadline) {
    for (;;) {
        struct pollfd wanted = {fd, events, 0};
        double left = deadline < 0.0 ? 3600.0 : deadline - socket_clock();
        int ms = left <= 0.0 ? 0 : 1 + (int)(1e3 * (left < 3600.0 ? left : 3600.0));
        int ready = poll(&wanted, 1, ms);
        if (ready > 0) {
            return 1;
        }
        if (deadline >= 0.0 && socket_clock() >= deadline) {
            return 0;
        }
    }
}

// all of it: 1; else 0
static inline int socket_send(int fd, const void *data, size_t bytes) {
    const char *at = (const char *)data;
    while (bytes > 0) {
        ssize_t sent = send(fd, at, bytes, SOCKET_SEND_FLAGS);
        if (sent > 0) {
            at += sent;
            bytes -= (size_t)sent;
        } else if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            socket_wait(fd, POLLOUT, -1.0);
        } else if (!(sent < 0 && errno == EINTR)) {
            return 0;
        }
    }
    return 1;
}

// all of it, until then: 1; else 0
static inline int socket_receive(int fd, void *data, size_t bytes, double deadline) {
    char *at = (char *)data;
    while (bytes > 0) {
        if (deadline >= 0.0 && !socket_wait(fd, POLLIN, deadline)) {
            return 0;
        }
        ssize_t got = recv(fd, at, bytes, 0);
        if (got > 0) {
            at += got;
            bytes -= (size_t)got;
        } else if (!(got < 0 && (errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK))) {
            return 0;
        }
    }
    return 1;
}

static inline struct addrinfo *socket_addresses(const char *host, int port, int flags, int *error) {
    struct addrinfo hints, *found = NULL;
    char service[16];
    memset(&hints, 0, sizeof(hints));
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags;
    snprintf(service, sizeof(service), "%d", port);
    *error = getaddrinfo(host, service, &hints, &found);
    return *error == 0 ? found : NULL;
}

// one try, of all the addresses that the name has. -1: *why says why
static inline int socket_connect(const char *host, int port, double seconds, const char **why) {
    int error, failed = ECONNREFUSED;
    struct addrinfo *all = socket_addresses(host, port, 0, &error);
    if (all == NULL) {
        *why = gai_strerror(error);
        return -1;
    }
    for (struct addrinfo *a = all; a != NULL; a = a->ai_next) {
        int fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        socklen_t size = sizeof(failed);
        if (fd < 0) {
            failed = errno;
            continue;
        }
        socket_block(fd, 0);
        failed = connect(fd, a->ai_addr, a->ai_addrlen) == 0 ? 0 : errno;
        if (failed == EINPROGRESS || failed == EINTR) {
            failed = ETIMEDOUT;
            if (socket_wait(fd, POLLOUT, socket_clock() + seconds)) {
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &size);
            }
        }
        if (failed == 0) {
            freeaddrinfo(all);
            socket_block(fd, 1);
            socket_settle(fd);
            return fd;
        }
        close(fd);
    }
    freeaddrinfo(all);
    *why = strerror(failed);
    return -1;
}

// on every address of this machine, IPv4 and 6; -1: errno says why
static inline int socket_listen(int port) {
    int error, fd = -1, failed = EADDRNOTAVAIL;
    struct addrinfo *all = socket_addresses(NULL, port, AI_PASSIVE, &error);
    for (int v6 = 1; v6 >= 0 && fd < 0; v6--) {
        for (struct addrinfo *a = all; a != NULL && fd < 0; a = a->ai_next) {
            if ((a->ai_family == AF_INET6) != v6 || (fd = socket(a->ai_family, a->ai_socktype, 0)) < 0) {
                continue;
            }
            socket_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
            if (v6) {
                socket_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
            }
            if (bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0) {
                failed = errno;
                close(fd);
                fd = -1;
            }
        }
    }
    if (all != NULL) {
        freeaddrinfo(all);
    }
    errno = failed;
    return fd;
}

// a connection that somebody has asked for, or -1; *from: the address
static inline int socket_accept(int listener, char *from, size_t capacity) {
    struct sockaddr_storage address;
    socklen_t size = sizeof(address);
    int fd = accept(listener, (struct sockaddr *)&address, &size);
    if (fd >= 0) {
        socket_settle(fd);
        if (getnameinfo((struct sockaddr *)&address, size, from, (socklen_t)capacity, NULL, 0,
                        NI_NUMERICHOST) != 0) {
            snprintf(from, capacity, "somewhere");
        }
    }
    return fd;
}

#endif
