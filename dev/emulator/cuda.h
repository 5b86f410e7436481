// emulator: the part of NVIDIA's cuda.h that remoe.c uses: tensor maps, and values that streams write and wait for (see cuda_runtime.h beside)
#ifndef EMULATOR_CUDA_H
#define EMULATOR_CUDA_H

#include "cuda_runtime.h"

typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef enum { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED = 801 } CUresult;
typedef unsigned long long CUdeviceptr;
typedef cudaStream_t CUstream;
typedef enum { CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 } CUtensorMapDataType;
typedef enum { CU_TENSOR_MAP_INTERLEAVE_NONE } CUtensorMapInterleave;
typedef enum {
    CU_TENSOR_MAP_SWIZZLE_NONE,
    CU_TENSOR_MAP_SWIZZLE_64B,
    CU_TENSOR_MAP_SWIZZLE_128B
} CUtensorMapSwizzle;
typedef enum { CU_TENSOR_MAP_L2_PROMOTION_NONE } CUtensorMapL2promotion;
typedef enum { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE } CUtensorMapFloatOOBfill;

enum { MOST_DIMS = 5 };

struct CUtensorMap { // the innermost dimension first
    unsigned char *base;
    int size; // bytes of an element
    int dims;
    int64_t sizes[MOST_DIMS], strides[MOST_DIMS]; // elements; bytes
    int box[MOST_DIMS];
    int swizzle; // rows' bits 7 .. that are added to a 16-byte piece's number: 7, 3 or 0
};

// what the driver asks of a map: addresses and strides of 16 bytes, boxes of at most 256 in each dimension
static inline CUresult emulator_encode_tiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t dims,
                                             void *base, const cuuint64_t *sizes, const cuuint64_t *strides,
                                             const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                             CUtensorMapFloatOOBfill) {
    bool wrong = (uintptr_t)base % 16 != 0 || dims < 2 || dims > MOST_DIMS;
    memset(map, 0, sizeof(*map));
    map->base = (unsigned char *)base;
    map->size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
    map->dims = (int)dims;
    map->swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 7 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 3 : 0;
    for (int i = 0; i < MOST_DIMS; i++) {
        map->sizes[i] = i < map->dims ? (int64_t)sizes[i] : 1;
        map->strides[i] = i == 0 ? map->size : i < map->dims ? (int64_t)strides[i - 1] : 0;
        map->box[i] = i < map->dims ? (int)box[i] : 1;
        wrong |=
            map->sizes[i] < 1 || map->box[i] < 1 || map->box[i] > 256 || (i > 0 && map->strides[i] % 16 != 0);
    }
    int row = map->box[0] * map->size;
    wrong |= row % 16 != 0 || (map->swizzle == 7 && row > 128) || (map->swizzle == 3 && row > 64);
    return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// ----------------------------------------------------------------------------
// values that streams write and wait for

enum { CU_STREAM_WRITE_VALUE_DEFAULT = 0, CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER = 1 };
enum {
    CU_STREAM_WAIT_VALUE_GEQ = 0,
    CU_STREAM_WAIT_VALUE_EQ = 1,
    CU_STREAM_WAIT_VALUE_AND = 2,
    CU_STREAM_WAIT_VALUE_NOR = 3,
    CU_STREAM_WAIT_VALUE_FLUSH = 1 << 30
};

// what a device can reach: not ordinary host memory
static inline bool emulator_is_flag(CUdeviceptr address) {
    return address % 4 == 0 && emulator::memory_kind((void *)address) != emulator::MEMORY_PAGEABLE;
}

static inline CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr address, cuuint32_t value,
                                            unsigned flags) {
    if (!emulator_is_flag(address) || flags > CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    emulator::queue(stream, [=]() { __atomic_store_n((cuuint32_t *)address, value, __ATOMIC_RELEASE); });
    return CUDA_SUCCESS;
}

static inline bool emulator_has_value(cuuint32_t now, cuuint32_t value, unsigned how) {
    return how == CU_STREAM_WAIT_VALUE_GEQ   ? (int32_t)(now - value) >= 0 // cyclic
           : how == CU_STREAM_WAIT_VALUE_EQ  ? now == value
           : how == CU_STREAM_WAIT_VALUE_AND ? (now & value) != 0
                                             : ~(now | value) != 0;
}

static inline CUresult cuStreamWaitValue32(CUstream stream, CUdeviceptr address, cuuint32_t value,
                                           unsigned flags) {
    unsigned how = flags & ~(unsigned)CU_STREAM_WAIT_VALUE_FLUSH;
    const cuuint32_t *flag = (const cuuint32_t *)address;
    if (!emulator_is_flag(address) || how > CU_STREAM_WAIT_VALUE_NOR) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    emulator::queue_wait(
        stream, [=]() { return emulator_has_value(__atomic_load_n(flag, __ATOMIC_ACQUIRE), value, how); },
        [=]() {
            cuuint32_t now = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
            return "value " + std::to_string(value) + " at a flag, which is " + std::to_string(now);
        });
    return CUDA_SUCCESS;
}

// ----------------------------------------------------------------------------
// the driver's functions by name

typedef enum {
    cudaDriverEntryPointSuccess,
    cudaDriverEntryPointSymbolNotFound
} cudaDriverEntryPointQueryResult;
enum { cudaEnableDefault = 0 };

static inline cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long,
                                                  cudaDriverEntryPointQueryResult *found) {
    static const struct {
        const char *name;
        void *function;
    } known[] = {{"cuTensorMapEncodeTiled", (void *)emulator_encode_tiled},
                 {"cuStreamWriteValue32", (void *)cuStreamWriteValue32},
                 {"cuStreamWaitValue32", (void *)cuStreamWaitValue32}};
    *function = NULL;
    for (const auto &entry : known) {
        *function = strcmp(name, entry.name) == 0 ? entry.function : *function;
    }
    *found = *function != NULL ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                                           unsigned long long flags,
                                                           cudaDriverEntryPointQueryResult *found) {
    return cudaGetDriverEntryPoint(name, function, flags, found);
}

typedef struct {
    int ptxVersion;
} cudaFuncAttributes;

template <class K> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, K *) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}

#endif
