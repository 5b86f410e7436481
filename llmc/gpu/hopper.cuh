/*
Hopper's asynchronous machinery (sm_90a): barriers in shared memory and the tensor memory accelerator (TMA).
One function per instruction; wgmma.cuh has the tensor cores', grouped_hopper.cuh and attention_hopper.cuh put
them together.

Barrier (mbarrier): counts arrivals and, of asynchronous copies, bytes. When both counts are met the phase
ends and the next begins; a waiter names the phase by its parity, 0, 1, 0, ... A barrier is its byte address
in shared memory.

TMA: one thread has a box of a tensor copied to shared memory. The tensor map (its address, sizes, strides,
box) is made on the host; what lies outside the tensor arrives as zeros. In a cluster of blocks a box can be
delivered to several blocks at once (multicast): same offset in each, and each block's barrier gets the bytes.

Tiles lie in shared memory as TMA's 128-byte swizzle writes and wgmma reads them. A row is 128 bytes, 64 bf16
numbers, eight pieces of 16 bytes; piece p of row r is at place p ^ (r % 8). A column of pieces then meets all
32 banks, so that 8 rows can be read at once:

    place   0  1  2  3  4  5  6  7
    row 0   0  1  2  3  4  5  6  7
    row 1   1  0  3  2  5  4  7  6
    row 2   2  3  0  1  6  7  4  5
    row 3   3  2  1  0  7  6  5  4
    ...
    row 7   7  6  5  4  3  2  1  0

A tile begins at a multiple of 1024 bytes. Two ways to hold an operand of M (or N) x 64 in k:
    along k    a row is one m, its 64 numbers neighbours in k (K-major); m / 8 groups of 1024 bytes
    across k   a row is one k, its 64 numbers neighbours in m (MN-major); a block of 64 rows for each 64 of m

Source: the PTX manual, sections on mbarrier, cp.async.bulk.tensor and elect. On a CPU dev/emulator has all of
it in C++. Errors: a tensor map that the driver refuses ends the program.
*/
#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "llmc/gpu/driver.cuh"
#include "llmc/gpu/mma.cuh"
#include <cuda.h>
// defines: CUtensorMap, cuTensorMapEncodeTiled's types (the function itself is looked up when needed)

#define HOPPER_KERNELS

namespace hopper {

enum {
    GROUP_THREADS = 128,    // a warpgroup
    ATOM_BYTES = 1024,      // of a tile: 8 rows of 128 bytes
    BLOCK_BYTES = 64 * 128, // 64 of them
};
static_assert(BLOCK_BYTES % ATOM_BYTES == 0, "a block of a tile begins where its swizzle begins");

// ----------------------------------------------------------------------------
// tensor maps, on the host

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);

static inline EncodeTiled tensor_map_encoder(void) {
    return (EncodeTiled)driver_function("cuTensorMapEncodeTiled", "install a driver of CUDA 12 or newer");
}

// Innermost dimension first; strides in bytes, that of the first dimension is an element. A row of a box has
// 128 or 64 bytes (swizzled) or 256 (not swizzled). L2 promotion is off: fetching more than was asked for
// slows down_backward by 2 to 6 %, the others by up to 3 %. were asked for, brought to L2, cost down_backward
// 2 to 6 %, others 3 % to nothing.)
static inline CUtensorMap tensor_map(const void *base, bool fp32, int dims, const cuuint64_t *sizes,
                                     const cuuint64_t *strides, const cuuint32_t *box) {
    CUtensorMap map;
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    cuuint32_t row_bytes = box[0] * (fp32 ? 4 : 2);
    CUresult result = tensor_map_encoder()(
        &map, fp32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)dims,
        (void *)base, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
        : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                          : CU_TENSOR_MAP_SWIZZLE_NONE,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        die("cuTensorMapEncodeTiled: error %d for %d dimensions, %lld x %lld ..., at %p, box of %d x %d ...",
            (int)result, dims, (long long)sizes[0], (long long)sizes[1], base, (int)box[0], (int)box[1]);
    }
    return map;
}

// Tensor [sheets][rows][columns], rows `stride` elements apart (0: contiguous). The box is
// [box_sheets][box_rows][box_columns]
static inline CUtensorMap tensor_map(const void *base, bool fp32, int64_t columns, int64_t rows,
                                     int64_t sheets, int box_rows, int box_sheets, int box_columns,
                                     int64_t stride = 0) {
    stride = (stride > 0 ? stride : columns) * (fp32 ? 4 : 2);
    cuuint64_t sizes[3] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)sheets};
    cuuint64_t strides[2] = {(cuuint64_t)stride, (cuuint64_t)(rows * stride)};
    cuuint32_t box[3] = {(cuuint32_t)box_columns, (cuuint32_t)box_rows, (cuuint32_t)box_sheets};
    return tensor_map(base, fp32, 3, sizes, strides, box);
}

// of bf16, boxes of 64 columns
static inline CUtensorMap tensor_map(const void *base, int64_t columns, int64_t rows, int64_t sheets,
                                     int box_rows, int64_t stride = 0) {
    return tensor_map(base, false, columns, rows, sheets, box_rows, 1, 64, stride);
}

// A bf16 operand [sheets][rows][columns] along k, rows a multiple of 8, whose rows are permuted while they
// are loaded. wgmma gives thread t of a quad columns 2t and 2t + 1 of every 8 of its result, which are rows
// of B. The box has, of each 8 rows, first all rows 0 and 1, then all 2 and 3, ...: what a thread holds of
// four groups of 8 columns are then 8 neighbours, one store of 16 bytes. For a box of 128 rows, in quarters
// of 32:
//
//     row of the box   0  1 | 2  3 | 4  5 | 6  7 | 8  9 | ...    32 33 | ...    64 65 | ...    96 97 | ...
//     holds row        0  1 | 8  9 |16 17 |24 25 |32 33 | ...     2  3 | ...     4  5 | ...     6  7 | ...
//     of thread        0      1      2      3      0              0              0              0
//
// (dimensions: column, 2 rows, groups of 8, 4 pairs, sheet)
static inline CUtensorMap paired_rows_map(const void *base, int64_t columns, int64_t rows, int64_t sheets,
                                          int box_rows) {
    cuuint64_t row = (cuuint64_t)columns * 2;
    cuuint64_t sizes[5] = {(cuuint64_t)columns, 2, (cuuint64_t)rows / 8, 4, (cuuint64_t)sheets};
    cuuint64_t strides[4] = {row, 8 * row, 2 * row, (cuuint64_t)rows * row};
    cuuint32_t box[5] = {64, 2, (cuuint32_t)box_rows / 8, 4, 1};
    return tensor_map(base, false, 5, sizes, strides, box);
}

#ifdef EMULATED
} // namespace hopper
#include "hopper_instructions.h" // dev/emulator
namespace hopper {
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// barriers

// One lane of the warp, always the same; all lanes must be here. ptxas knows that one thread is behind this,
// and issues a TMA there as one instruction. Behind `threadIdx.x == 0` it packs each TMA into a loop over
// whatever lanes there may be, 15 instructions, and the grouped GEMM's producer, with four to six copies a
// step, falls behind the tensor cores
__device__ __forceinline__ bool elect_one(void) {
    uint32_t elected;
    asm volatile("{\n"
                 ".reg .pred elected;\n"
                 "elect.sync _|elected, 0xffffffff;\n"
                 "selp.u32 %0, 1, 0, elected;\n"
                 "}"
                 : "=r"(elected)::"memory");
    return elected != 0;
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// before others (of the cluster, and TMA) use the barriers that this thread initialised
__device__ __forceinline__ void barrier_init_done(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// one arrival, and so many bytes of copies are to come in this phase
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// One arrival at the barrier of the same address in block `rank` of the cluster. (With .release.cluster it
// would first wait for all of the thread's stores to reach L2: some 1000 cycles a stage.)
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// one arrival at a barrier of this block
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// one arrival as soon as this thread's cp.asyncs so far have landed
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile("{\n"
                 ".reg .pred passed;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 passed, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, passed;\n"
                 "}"
                 : "=r"(passed)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return passed != 0;
}

// In a build with HOPPER_WATCHDOG a wait of a second ends the kernel with an error: for finding deadlocks
struct Patience {
#ifdef HOPPER_WATCHDOG
    long long start;
    __device__ __forceinline__ Patience() : start(clock64()) {
    }
    __device__ __forceinline__ void check() const {
        if (clock64() - start > 2000000000ll) {
            __trap();
        }
    }
#else
    __device__ __forceinline__ void check() const {
    }
#endif
};

// until the phase of this parity has ended
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    Patience patience;
    while (!barrier_passed(barrier, parity)) {
        patience.check();
    }
}

// all threads of the cluster
__device__ __forceinline__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::
                     : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// ----------------------------------------------------------------------------
// copies

// what threads have written to shared memory (cp.async is theirs, too) becomes visible to wgmma and TMA
__device__ __forceinline__ void fence_async_proxy(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The box at (column, row, sheet); BOTH: to this block and to the other one of its cluster
template <bool BOTH = false>
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                         int row, int sheet) {
    if (BOTH) {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
                     "l"(map), "r"(barrier), "h"((uint16_t)3), "r"(column), "r"(row), "r"(sheet)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                     "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(sheet)
                     : "memory");
    }
}

// the same of rows in pairs (paired_rows_map), from row 8 group of the sheet on
template <bool BOTH = false>
__device__ __forceinline__ void tma_load_paired(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                                int column, int group, int sheet) {
    if (BOTH) {
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%4, %7, %5, %7, %6}], [%2], %3;" ::"r"(to),
                     "l"(map), "r"(barrier), "h"((uint16_t)3), "r"(column), "r"(group), "r"(sheet), "r"(0)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%3, %6, %4, %6, %5}], [%2];" ::"r"(to),
                     "l"(map), "r"(barrier), "r"(column), "r"(group), "r"(sheet), "r"(0)
                     : "memory");
    }
}

// The box from shared memory to the tensor; what lies outside the tensor is not written. Before it, the
// writing threads' fence_async_proxy and a barrier.
__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int column, int row,
                                          int sheet) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(from), "r"(column), "r"(row), "r"(sheet)
        : "memory");
}

// The box of fp32 numbers is added to the tensor, in L2. Where nobody else adds meanwhile, that is one sum as
// any other: always the same bits
__device__ __forceinline__ void tma_add(const CUtensorMap *map, uint32_t from, int column, int row,
                                        int sheet) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], "
                 "[%1];" ::"l"(map),
                 "r"(from), "r"(column), "r"(row), "r"(sheet)
                 : "memory");
}

// this thread's stores since the last commit are a group
__device__ __forceinline__ void tma_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// until all but PENDING of this thread's groups have read shared memory, which may then be written again
template <int PENDING> __device__ __forceinline__ void tma_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// until they have been written
__device__ __forceinline__ void tma_wait_written(void) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ----------------------------------------------------------------------------
// shared memory by address; barriers between some of the block's warps

__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]),
                 "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

__device__ __forceinline__ void shared_store(uint32_t to, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

__device__ __forceinline__ void shared_store(uint32_t to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void shared_store(uint32_t to, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                 "r"(v[3])
                 : "memory");
}

// `id` is 1 .. 15: __syncthreads has 0
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ----------------------------------------------------------------------------
// registers between warpgroups

template <int REGISTERS> __device__ __forceinline__ void give_registers(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void take_registers(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

// A ring of stages: the one whose turn it is, and the parity of the phase of its barriers that is to come
struct RingTurn {
    int stage;
    uint32_t parity;

    __device__ __forceinline__ void advance(int stages) {
        stage++;
        if (stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

} // namespace hopper

#endif
