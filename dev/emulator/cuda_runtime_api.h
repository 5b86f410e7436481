/*
emulator: the runtime's functions (see cuda_runtime.h beside): devices, memory, streams, events, other processes'
memory. What waits, and when work is done, is in streams.h.
*/
#ifndef EMULATOR_CUDA_RUNTIME_API_H
#define EMULATOR_CUDA_RUNTIME_API_H

#include "agree.h"
#include "device_memory.h"
#include "streams.h"
#include <algorithm>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef enum {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorPeerAccessUnsupported = 217,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorPeerAccessAlreadyEnabled = 704,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorUnknown = 999
} cudaError_t;
typedef struct EmulatorGraph *cudaGraph_t;
typedef struct EmulatorGraphExec *cudaGraphExec_t;
typedef struct {
    std::shared_ptr<emulator::Record> latest; // NULL: never recorded
    bool timed;
} EmulatorEvent, *cudaEvent_t;
typedef enum {
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
} cudaMemcpyKind;
typedef enum {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
} cudaDeviceAttr;
typedef enum { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal } cudaStreamCaptureMode;
enum {
    cudaStreamDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventDefault = 0,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaEventWaitDefault = 0,
    cudaHostAllocDefault = 0,
    cudaHostAllocPortable = 1,
    cudaHostAllocMapped = 2,
    cudaIpcMemLazyEnablePeerAccess = 1
};
enum { CUDA_IPC_HANDLE_SIZE = 64 };
typedef struct {
    char reserved[CUDA_IPC_HANDLE_SIZE];
} cudaIpcMemHandle_t;

typedef struct {
    char name[256];
    size_t totalGlobalMem;
    int multiProcessorCount, major, minor;
} cudaDeviceProp;

static inline const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInitializationError: return "initialization error";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorPeerAccessUnsupported: return "peer access is not supported between these two devices";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorPeerAccessAlreadyEnabled: return "peer access is already enabled";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "not emulated";
    case cudaErrorUnknown: break;
    }
    return "unknown error";
}

namespace emulator {

static inline cudaError_t &last_error() {
    static thread_local cudaError_t error = cudaSuccess;
    return error;
}

static inline cudaError_t result(cudaError_t error) {
    if (error != cudaSuccess) {
        last_error() = error;
    }
    return error;
}

static inline cudaError_t valid(bool is, cudaError_t otherwise) {
    return result(is ? cudaSuccess : otherwise);
}

} // namespace emulator

static inline cudaError_t cudaPeekAtLastError() {
    return emulator::last_error();
}

static inline cudaError_t cudaGetLastError() {
    cudaError_t error = emulator::last_error();
    emulator::last_error() = cudaSuccess;
    return error;
}
// ----------------------------------------------------------------------------
// devices

static inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = emulator::gpus();
    return cudaSuccess;
}

static inline cudaError_t cudaGetDevice(int *device) {
    *device = emulator::current_device();
    return cudaSuccess;
}

namespace emulator {

static inline cudaError_t valid_device(int device) {
    return valid(device >= 0 && device < gpus(), cudaErrorInvalidDevice);
}

} // namespace emulator

static inline cudaError_t cudaSetDevice(int device) {
    cudaError_t error = emulator::valid_device(device);
    if (error == cudaSuccess) {
        emulator::current_device() = device;
    }
    return error;
}

static inline cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer && emulator::has_peers();
    cudaError_t error = emulator::valid_device(device);
    return error != cudaSuccess ? error : emulator::valid_device(peer);
}

static inline cudaError_t cudaDeviceGetPCIBusId(char *text, int bytes, int device) {
    if (bytes < 13) {
        return emulator::result(cudaErrorInvalidValue);
    }
    snprintf(text, (size_t)bytes, "0000:%02x:00.0", (unsigned)device & 0xff);
    return emulator::valid_device(device);
}

static inline cudaError_t cudaDeviceGetByPCIBusId(int *device, const char *bus) {
    int count;
    char its[32];
    cudaGetDeviceCount(&count);
    for (*device = 0; *device < count; (*device)++) {
        cudaDeviceGetPCIBusId(its, sizeof(its), *device);
        if (strcmp(its, bus) == 0) {
            return cudaSuccess;
        }
    }
    return cudaErrorInvalidDevice;
}

static inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
             : attribute == cudaDevAttrComputeCapabilityMajor     ? 9
             : attribute == cudaDevAttrComputeCapabilityMinor     ? 0
                                                                  : 4; // processors
    return emulator::valid_device(device);
}

static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device) {
    memset(prop, 0, sizeof(*prop));
    strcpy(prop->name, "emulated on the CPU");
    prop->totalGlobalMem = (size_t)1 << EMULATED_BYTES_LOG2;
    prop->multiProcessorCount = 4;
    prop->major = 9;
    return emulator::valid_device(device);
}

static inline cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

static inline cudaError_t cudaDeviceSynchronize() {
    emulator::flush();
    return cudaSuccess;
}
// ----------------------------------------------------------------------------
// memory

template <class T> static inline cudaError_t cudaMalloc(T **p, size_t bytes) {
    void *memory = emulator::device_take(bytes);
    if (memory != NULL) {
        *p = (T *)memory;
    }
    return emulator::valid(memory != NULL, cudaErrorMemoryAllocation);
}

static inline cudaError_t cudaFree(void *p) {
    emulator::flush();
    return emulator::valid(p == NULL || emulator::device_give(p), cudaErrorInvalidValue);
}

template <class T> static inline cudaError_t cudaHostAlloc(T **p, size_t bytes, unsigned) {
    *p = (T *)malloc(bytes);
    if (*p != NULL) {
        emulator::note_range(*p, bytes, emulator::MEMORY_PINNED);
    }
    return emulator::valid(*p != NULL, cudaErrorMemoryAllocation);
}

template <class T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes) {
    return cudaHostAlloc(p, bytes, cudaHostAllocDefault);
}

static inline cudaError_t cudaFreeHost(void *p) {
    emulator::flush();
    if (p != NULL && emulator::forget_range(p).kind != emulator::MEMORY_PINNED) {
        return emulator::result(cudaErrorInvalidValue);
    }
    free(p);
    return cudaSuccess;
}

static inline cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = (size_t)1 << EMULATED_BYTES_LOG2;
    *available = *total - emulator::memory()->used;
    return cudaSuccess;
}

namespace emulator {

// from pageable memory the bytes are taken at once
static inline void queue_copy(void *to, const void *from, size_t bytes, cudaStream_t stream) {
    if (memory_kind(from) != MEMORY_PAGEABLE) {
        queue(stream, [=]() { memcpy(to, from, bytes); });
        return;
    }
    const unsigned char *first = (const unsigned char *)from;
    std::vector<unsigned char> taken(first, first + bytes);
    queue(stream, [to, taken = std::move(taken)]() { memcpy(to, taken.data(), taken.size()); });
}

} // namespace emulator

static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                                          cudaStream_t stream) {
    if (emulator::early()) {
        memcpy(to, from, bytes);
        return cudaSuccess;
    }
    if (bytes > 0) {
        emulator::queue_copy(to, from, bytes, stream);
    }
    if (bytes > 0 && emulator::memory_kind(to) == emulator::MEMORY_PAGEABLE) {
        emulator::finish(stream);
    }
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    cudaMemcpyAsync(to, from, bytes, kind, NULL);
    emulator::finish(NULL);
    return cudaSuccess;
}

static inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    emulator::queue(stream, [=]() { memset(p, value, bytes); });
    return cudaSuccess;
}

// the host does not wait for it
static inline cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    return cudaMemsetAsync(p, value, bytes, NULL);
}
// ----------------------------------------------------------------------------
// other processes' memory

static inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *p) {
    emulator::IpcHandle own;
    static_assert(sizeof(own) <= sizeof(*handle), "fits");
    if (emulator::gpus() < 2) {
        return emulator::result(cudaErrorNotSupported); // memory is not of the kind that others can map
    }
    memset(handle, 0, sizeof(*handle));
    if (!emulator::ipc_handle_of(&own, p)) {
        return emulator::result(cudaErrorInvalidValue);
    }
    memcpy(handle, &own, sizeof(own));
    return cudaSuccess;
}

static inline cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t handle, unsigned flags) {
    emulator::IpcHandle theirs;
    memcpy(&theirs, &handle, sizeof(theirs));
    if (flags != cudaIpcMemLazyEnablePeerAccess || memcmp(theirs.kind, "memory", 7) != 0) {
        return emulator::result(cudaErrorInvalidValue);
    }
    if (!emulator::has_peers()) {
        return emulator::result(cudaErrorPeerAccessUnsupported);
    }
    *p = theirs.pid == getpid() ? NULL : emulator::ipc_open(&theirs); // CUDA does not open what is one's own
    return emulator::valid(*p != NULL, cudaErrorInvalidResourceHandle);
}

static inline cudaError_t cudaIpcCloseMemHandle(void *p) {
    emulator::flush();
    return emulator::valid(emulator::ipc_close(p), cudaErrorInvalidValue);
}
// ----------------------------------------------------------------------------
// streams

static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new EmulatorStream();
    emulator::streams()->all.push_back(*stream);
    return cudaSuccess;
}

static inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}

static inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

// its work is done first: no record of it is asked for afterwards
static inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream == NULL) {
        return emulator::result(cudaErrorInvalidResourceHandle);
    }
    emulator::finish(stream);
    std::vector<cudaStream_t> &all = emulator::streams()->all;
    all.erase(std::remove(all.begin(), all.end(), stream), all.end());
    delete stream;
    return cudaSuccess;
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    emulator::finish(stream);
    return cudaSuccess;
}

static inline cudaError_t cudaStreamQuery(cudaStream_t stream) {
    cudaStream_t asked = emulator::stream_of(stream);
    if (!asked->steps.empty()) {
        emulator::do_one_for(asked);
    }
    return asked->steps.empty() ? cudaSuccess : cudaErrorNotReady;
}

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    return cudaErrorNotSupported;
}

static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *) {
    return cudaErrorNotSupported;
}

static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *, cudaGraph_t, unsigned long long = 0) {
    return cudaErrorNotSupported;
}

static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
    return cudaErrorNotSupported;
}

static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) {
    return cudaErrorNotSupported;
}

static inline cudaError_t cudaGraphDestroy(cudaGraph_t) {
    return cudaErrorNotSupported;
}
// ----------------------------------------------------------------------------
// events

static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = new EmulatorEvent();
    (*event)->timed = (flags & cudaEventDisableTiming) == 0;
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

static inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}

static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = NULL) {
    event->latest = emulator::queue_record(stream);
    return cudaSuccess;
}

static inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
    emulator::queue_wait_for(stream, event->latest);
    return cudaSuccess;
}

static inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    std::shared_ptr<emulator::Record> record = event->latest;
    if (!emulator::is_over(record.get())) {
        emulator::finish(record->stream, record.get());
    }
    return cudaSuccess;
}

static inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    std::shared_ptr<emulator::Record> record = event->latest;
    if (!emulator::is_over(record.get())) {
        emulator::do_one_for(record->stream);
    }
    return emulator::is_over(record.get()) ? cudaSuccess : cudaErrorNotReady;
}

static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
    if (begin->latest == NULL || end->latest == NULL || !begin->timed || !end->timed) {
        return emulator::result(cudaErrorInvalidResourceHandle);
    }
    if (!begin->latest->done || !end->latest->done) {
        return cudaErrorNotReady;
    }
    *ms = (float)(1e3 * (end->latest->seconds - begin->latest->seconds));
    return cudaSuccess;
}

#endif
