/*
emulator: streams and events.

Early streams do all work when it is queued, in the order of the calls. Late streams (EMULATED_STREAMS=late) keep it,
with its arguments, until somebody must have it: a host that synchronises, copies to ordinary memory or frees. Then
only that is done: the stream in its order, and of others what stands before an event that it waits for. Where an
event is missing, the work that it should have ordered has not been done, and the numbers are wrong every time. With
a number instead of `late`, a seed, some work that nobody waits for is done sooner, other work each time.

Late streams do what a stream waits for when it waits, and by then have done what that should itself have waited for: a
copy that forgets to wait for what it copies is right by accident. With EMULATED_STREAMS=ahead all other streams do what
they can before each step of the one that the host waits for.

A step may have to wait for another process (a value in memory, a peer's NCCL call). It then does what it can and says
that it is not done. While the host polls for it, heads of the other streams are tried, too, after a few milliseconds:
what the other process waits for may be among them.

What a process has queued may be what another waits for. Before a host waits for another process by other means than
CUDA's and NCCL's (a socket, a file), it calls emulator::flush(), which does all that is queued; a GPU would not have
waited to be asked.

One thread at a time may use late streams. A forked child begins with empty ones.
*/
#ifndef EMULATOR_STREAMS_H
#define EMULATOR_STREAMS_H

#include <deque>
#include <functional>
#include <memory>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <time.h>
#include <unistd.h>
#include <vector>

typedef struct EmulatorStream *cudaStream_t;

namespace emulator {

static inline double seconds_now() {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline int &current_device() {
    static thread_local int device = 0;
    return device;
}

// one cudaEventRecord(): an event names the latest, a wait the one that was the latest then
struct Record {
    cudaStream_t stream;
    bool done;
    double seconds; // when it was
};

struct Step {
    std::function<bool()> advance; // does it, or as much as can be done now; whether it is done
    std::shared_ptr<Record> after; // not before this
    std::function<std::string()> waits_for;
};

} // namespace emulator

struct EmulatorStream {
    std::deque<emulator::Step> steps;
};

namespace emulator {

typedef enum { STREAMS_EARLY, STREAMS_LATE, STREAMS_AHEAD, STREAMS_SEEDED } StreamMode;

struct Streams {
    StreamMode mode;
    uint64_t seed, draws;
    EmulatorStream by_default; // stream NULL
    std::vector<cudaStream_t> all;
    pthread_t user; // the thread that queues late work
};

static inline void parse_streams(Streams *streams, const char *text) {
    char *end = NULL;
    bool early = text == NULL || *text == '\0' || strcmp(text, "early") == 0,
         late = !early && !strcmp(text, "late"), ahead = !early && !strcmp(text, "ahead");
    streams->mode = early ? STREAMS_EARLY : late ? STREAMS_LATE : ahead ? STREAMS_AHEAD : STREAMS_SEEDED;
    streams->draws = 0;
    streams->seed = streams->mode == STREAMS_SEEDED ? strtoull(text, &end, 10) : 0;
    if (streams->mode == STREAMS_SEEDED && *end != '\0') {
        fprintf(stderr, "emulator: EMULATED_STREAMS=%s: early, late, ahead or a number\n", text);
        abort();
    }
}

// never deleted: what is left to do at exit needs it
static inline Streams *streams() {
    static Streams *all = NULL;
    if (all == NULL) {
        all = new Streams();
        all->all.push_back(&all->by_default);
        parse_streams(all, getenv("EMULATED_STREAMS"));
    }
    return all;
}

static inline bool early() {
    return streams()->mode == STREAMS_EARLY;
}

static inline cudaStream_t stream_of(cudaStream_t stream) {
    return stream != NULL ? stream : &streams()->by_default;
}

// a child's record may be lost: the queue that held it was the parent's
static inline bool is_over(const Record *record) {
    return record == NULL || record->done || record->stream->steps.empty();
}

// the first step of a stream, if it can be done now; whether it was
static inline bool do_head(cudaStream_t stream) {
    if (stream->steps.empty()) {
        return false;
    }
    Step &step = stream->steps.front();
    if (!is_over(step.after.get()) || !step.advance()) {
        return false;
    }
    stream->steps.pop_front();
    return true;
}

// every stream's first step, if it can be done now; whether any was
static inline bool do_heads() {
    bool any = false;
    for (size_t i = 0; i < streams()->all.size(); i++) {
        any |= do_head(streams()->all[i]);
    }
    return any;
}

// ----------------------------------------------------------------------------
// waits for other processes

static inline double most_seconds() {
    const char *text = getenv("EMULATED_WAIT_SECONDS");
    return text != NULL && atof(text) > 0.0 ? atof(text) : 120.0;
}

// of waiting: other streams' heads are tried from then on
static constexpr double HELP_AFTER = 0.003;

// one wait: polls at first, then in short sleeps (ranks share processors), and not for ever
struct Patience {
    int polls;
    double start;
    Patience() : polls(0), start(0.0) {
    }
    void pause(const std::function<std::string()> &waits_for) {
        const struct timespec nap = {0, 50000};
        if (++polls < 100) {
            sched_yield();
            return;
        }
        start = start > 0.0 ? start : seconds_now();
        double waited = seconds_now() - start;
        if (waited > HELP_AFTER && do_heads()) {
            start = seconds_now() - HELP_AFTER; // the time limit is for others
            return;
        }
        if (waited > most_seconds()) {
            fflush(stdout);
            fprintf(stderr, "emulator: a stream has waited %.3g s for %s\n", most_seconds(),
                    waits_for().c_str());
            _exit(1);
        }
        nanosleep(&nap, NULL);
    }
};

static inline void wait_until(const std::function<bool()> &advance,
                              const std::function<std::string()> &waits_for) {
    Patience patience;
    while (!advance()) {
        patience.pause(waits_for);
    }
}

// ----------------------------------------------------------------------------
// doing what is queued

// the stream whose head must be done next for `stream` to go on: its own, or one with an event that it waits for
static inline cudaStream_t needed_first(cudaStream_t stream) {
    while (!stream->steps.empty() && !is_over(stream->steps.front().after.get())) {
        stream = stream->steps.front().after->stream;
    }
    return stream;
}

// the seed's next number, another for each device (splitmix64)
static inline uint64_t draw() {
    uint64_t x =
        streams()->seed + ((uint64_t)current_device() << 48) + 0x9e3779b97f4a7c15ull * ++streams()->draws;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static inline void do_some() {
    enum { MOST = 16 };
    for (uint64_t n = draw() % MOST; n > 0; n--) {
        do_head(streams()->all[draw() % streams()->all.size()]);
    }
}

// all that other streams can do now
static inline void do_ahead_of(cudaStream_t stream) {
    for (bool any = true; any;) {
        any = false;
        for (size_t i = 0; i < streams()->all.size(); i++) {
            any |= streams()->all[i] != stream && do_head(streams()->all[i]);
        }
    }
}

// all of a stream, or as far as `until`
static inline void finish(cudaStream_t stream, const Record *until = NULL) {
    Patience patience;
    stream = stream_of(stream);
    if (streams()->mode == STREAMS_SEEDED) {
        do_some();
    }
    while (until != NULL ? !is_over(until) : !stream->steps.empty()) {
        if (streams()->mode == STREAMS_AHEAD) {
            do_ahead_of(stream);
        }
        cudaStream_t next = needed_first(stream);
        if (do_head(next)) {
            patience = Patience();
        } else {
            patience.pause(next->steps.front().waits_for);
        }
    }
}

// all that is queued in all streams
static inline void flush() {
    for (size_t i = 0; i < streams()->all.size(); i++) {
        finish(streams()->all[i]);
    }
}

// a host that asks whether something is done, again and again, must some day hear that it is
static inline void do_one_for(cudaStream_t stream) {
    static int idle = 0;
    if (do_head(needed_first(stream))) {
        idle = 0;
    } else if (++idle >= 1000) {
        idle = 0;
        do_heads();
    }
}

// text as in EMULATED_STREAMS
static inline void set_streams(const char *text) {
    flush();
    parse_streams(streams(), text);
}

// ----------------------------------------------------------------------------
// queueing

static inline void forget_queues() {
    for (cudaStream_t stream : streams()->all) {
        stream->steps.clear();
    }
}

static inline bool is_idle() {
    for (cudaStream_t stream : streams()->all) {
        if (!stream->steps.empty()) {
            return false;
        }
    }
    return true;
}

// what can be done without others
static inline void do_at_exit() {
    while (do_heads()) {
    }
}

static inline void begin_queueing() {
    static bool registered = false;
    if (!registered) {
        registered = true;
        pthread_atfork(NULL, NULL, forget_queues);
        atexit(do_at_exit);
    }
    if (!pthread_equal(streams()->user, pthread_self()) && !is_idle()) {
        fprintf(stderr, "emulator: two threads use CUDA's streams: they cannot be late (EMULATED_STREAMS)\n");
        abort();
    }
    streams()->user = pthread_self();
}

static inline void push(cudaStream_t stream, Step step) {
    begin_queueing();
    stream_of(stream)->steps.push_back(std::move(step));
}

// work(), once all before it in the stream has been done; it holds its arguments
template <class F> static void queue(cudaStream_t stream, F work) {
    if (early()) {
        work();
        return;
    }
    std::function<bool()> advance = [work = std::move(work)]() {
        work();
        return true;
    };
    push(stream, {std::move(advance), nullptr, nullptr});
}

// what may have to wait for another process
static inline void queue_wait(cudaStream_t stream, std::function<bool()> advance,
                              std::function<std::string()> waits_for,
                              std::shared_ptr<Record> after = nullptr) {
    if (early()) {
        wait_until(advance, waits_for);
        return;
    }
    push(stream, {std::move(advance), std::move(after), std::move(waits_for)});
}

static inline std::shared_ptr<Record> queue_record(cudaStream_t stream) {
    std::shared_ptr<Record> record = std::make_shared<Record>();
    record->stream = stream_of(stream);
    queue(stream, [record]() {
        record->seconds = seconds_now();
        record->done = true;
    });
    return record;
}

static inline void queue_wait_for(cudaStream_t stream, const std::shared_ptr<Record> &record) {
    if (is_over(record.get()) || record->stream == stream_of(stream)) {
        return;
    }
    push(stream, {[]() { return true; }, record, nullptr});
}

} // namespace emulator

#endif
