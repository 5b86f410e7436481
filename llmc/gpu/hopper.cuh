/*
Hopper's asynchronous machinery (sm_90a): barriers in shared memory, the tensor memory accelerator (TMA), and
the tensor cores' wgmma. One function an instruction; grouped_gemm_hopper.cuh puts them together.

Barrier (mbarrier): counts arrivals and, of asynchronous copies, bytes. When both counts are met the phase
ends and the next begins; a waiter names the phase by its parity, 0, 1, 0, ... A barrier is its byte address
in shared memory.

TMA: one thread has a box of a tensor copied to shared memory. The tensor map (its address, sizes, strides,
box) is made on the host; what lies outside the tensor arrives as zeros. In a cluster of blocks a box can be
delivered to several blocks at once (multicast): same offset in each, and each block's barrier gets the bytes.

Tiles, as TMA's 128-byte swizzle writes and wgmma reads them: rows of 128 bytes (64 bf16 numbers), the 16-byte
piece p of row r at place p ^ (r % 8), so that 8 rows' pieces of one column lie in different banks. A tile
begins at a multiple of 1024 bytes. Two ways to hold an operand of M (or N) x 64 in k:
    along k    a row is one m, its 64 numbers neighbours in k; m / 8 groups of 1024 bytes
    across k   a row is one k, its 64 numbers neighbours in m; a block of 64 rows for each 64 of m

wgmma: four warps (a warpgroup) multiply D[64, N] += A[64, 16] B[16, N], bf16 from shared memory, fp32 in
registers: thread lane = 4 g + t of warp w holds, for each 8 columns j,
    acc[4j], acc[4j+1] = D[16w + g][8j + 2t], [8j + 2t + 1];  acc[4j+2], acc[4j+3] the same of row 16w + g + 8
It runs on while its thread goes on; its registers are not to be touched until the wait.

Source: the PTX manual, sections on mbarrier, cp.async.bulk.tensor and wgmma. On a CPU dev/emulator has all of
it in C++. Errors: a tensor map that the driver refuses ends the program.
*/
#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "llmc/gpu/cuda_common.cuh"
#include <cuda.h>
// defines: CUtensorMap, cuTensorMapEncodeTiled's types (the function itself is looked up when needed)

#define HOPPER_KERNELS

namespace hopper {

enum {
    GROUP_THREADS = 128, // a warpgroup
    ATOM_BYTES = 1024,
    BLOCK_BYTES = 64 * 128 // of a tile: 8 rows of 128 bytes; 64 of them
};

// ----------------------------------------------------------------------------
// tensor maps, on the host

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill);

// the driver's function, found through the runtime so that programs need not link the driver's library
static inline EncodeTiled tensor_map_encoder(void) {
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &found));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) {
        die("the CUDA driver has no cuTensorMapEncodeTiled\n  ---> install a driver of CUDA 12 or newer");
    }
    return (EncodeTiled)function;
}

// Innermost dimension first; strides in bytes, that of the first is an element. Rows of a box are of 128 bytes
// (64 bf16 or 32 fp32 numbers) or of 64, swizzled, or of 256, as they are. (No promotion: bigger pieces than
// were asked for, brought to L2, cost down_backward 2 to 6 %, others 3 % to nothing.)
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

// Tensor [sheets][rows][columns], rows `stride` elements apart (0: contiguous); sheets 0: [rows][columns].
// The box is [box_sheets][box_rows][box_columns]
static inline CUtensorMap tensor_map(const void *base, bool fp32, int64_t columns, int64_t rows,
                                     int64_t sheets, int box_rows, int box_sheets, int box_columns,
                                     int64_t stride = 0) {
    stride = (stride > 0 ? stride : columns) * (fp32 ? 4 : 2);
    cuuint64_t sizes[3] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)sheets};
    cuuint64_t strides[2] = {(cuuint64_t)stride, (cuuint64_t)(rows * stride)};
    cuuint32_t box[3] = {(cuuint32_t)box_columns, (cuuint32_t)box_rows, (cuuint32_t)box_sheets};
    return tensor_map(base, fp32, sheets > 0 ? 3 : 2, sizes, strides, box);
}

// of bf16, boxes of 64 columns
static inline CUtensorMap tensor_map(const void *base, int64_t columns, int64_t rows, int64_t sheets,
                                     int box_rows, int64_t stride = 0) {
    return tensor_map(base, false, columns, rows, sheets, box_rows, 1, 64, stride);
}

// A bf16 operand [sheets][rows][columns] along k, rows a multiple of 8, whose box has the rows in another order:
// of each 8 first all rows 0 and 1, then all 2 and 3, ... (dimensions: column, 2 rows, groups of 8, 4 pairs,
// sheet). Of wgmma's results thread t of a quad has columns 2t and 2t + 1 of each 8. If they are rows of this
// box, row 2 (4q + t) + c of quarter j is 32 q + 8 t + 2 j + c: the thread's are 8 neighbours, 16 bytes
static inline CUtensorMap paired_rows_map(const void *base, int64_t columns, int64_t rows, int64_t sheets,
                                          int box_rows) {
    cuuint64_t row = (cuuint64_t)columns * 2;
    cuuint64_t sizes[5] = {(cuuint64_t)columns, 2, (cuuint64_t)rows / 8, 4, (cuuint64_t)sheets};
    cuuint64_t strides[4] = {row, 8 * row, 2 * row, (cuuint64_t)rows * row};
    cuuint32_t box[5] = {64, 2, (cuuint32_t)box_rows / 8, 4, 1};
    return tensor_map(base, false, 5, sizes, strides, box);
}

// Describes a swizzled tile to wgmma: address, stride between blocks of 64 in m across k (along k: unused),
// stride between groups of 8 rows; addresses in 16 bytes
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
    const uint64_t swizzle_128 = 1;
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(BLOCK_BYTES >> 4) << 16 |
           (uint64_t)(ATOM_BYTES >> 4) << 32 | swizzle_128 << 62;
}

#ifdef EMULATED
} // namespace hopper
#include "hopper_instructions.h" // dev/emulator
namespace hopper {
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// barriers

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
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

// 16 bytes from global to shared memory; zeros if !valid (the address must be in bounds all the same)
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

// what threads have written to shared memory (cp.async is theirs, too) becomes visible to wgmma and TMA
__device__ __forceinline__ void fence_async_proxy(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// the box at (column, row) of a map of two dimensions
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                         int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}

// the same of three dimensions
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int column,
                                         int row, int sheet) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(sheet)
                 : "memory");
}

// the box of rows in pairs (paired_rows_map) from row 8 group of the sheet on
__device__ __forceinline__ void tma_load_paired(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                                int column, int group, int sheet) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %6, %4, %6, %5}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(group), "r"(sheet), "r"(0)
                 : "memory");
}

// to every block of the cluster whose bit is set in `blocks`
__device__ __forceinline__ void tma_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                              uint16_t blocks, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
                 "l"(map), "r"(barrier), "h"(blocks), "r"(column), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void tma_multicast(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                              uint16_t blocks, int column, int row, int sheet) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
                 "l"(map), "r"(barrier), "h"(blocks), "r"(column), "r"(row), "r"(sheet)
                 : "memory");
}

__device__ __forceinline__ void tma_multicast_paired(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                                     uint16_t blocks, int column, int group, int sheet) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%4, %7, %5, %7, %6}], [%2], %3;" ::"r"(to),
                 "l"(map), "r"(barrier), "h"(blocks), "r"(column), "r"(group), "r"(sheet), "r"(0)
                 : "memory");
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

__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(from), "r"(column), "r"(row)
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

// Four matrices of 8 x 8 bf16 numbers, v[j] of lane 4 g + t being row g, columns 2t and 2t + 1 of the j-th,
// as in wgmma's results. Lane 8 j + r gives the address of row r of the j-th, 16 bytes
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}

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

// ----------------------------------------------------------------------------
// wgmma

// before the first wgmma, and whenever registers it uses have been touched
__device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// until at most PENDING of the newest groups are unfinished
template <int PENDING> __device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// keeps the compiler from moving uses of the accumulators to before the wait
template <int COUNT> __device__ __forceinline__ void wgmma_results(float (&acc)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+f"(acc[i])::"memory");
    }
}

#define WGMMA_REGISTERS_32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                   \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGISTERS_48                                                                                   \
    WGMMA_REGISTERS_32                                                                                       \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGISTERS_64                                                                                   \
    WGMMA_REGISTERS_48                                                                                       \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGISTERS_96                                                                                   \
    WGMMA_REGISTERS_64                                                                                       \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                       \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_REGISTERS_128                                                                                  \
    WGMMA_REGISTERS_96                                                                                       \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"           \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_ACC4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define WGMMA_ACC16(i) WGMMA_ACC4(i), WGMMA_ACC4(i + 4), WGMMA_ACC4(i + 8), WGMMA_ACC4(i + 12)
#define WGMMA_ACC32(i) WGMMA_ACC16(i), WGMMA_ACC16(i + 16)

// %0 .. of the accumulators; then A, B, "add to what is there", "stored across k" of A and of B
#define WGMMA(n, registers, a, b, add, ta, tb, ...)                                                          \
    asm volatile("{\n"                                                                                       \
                 ".reg .pred add;\n"                                                                         \
                 "setp.ne.b32 add, " add ", 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, " a ", " b        \
                 ", add, 1, 1, " ta ", " tb ";\n"                                                            \
                 "}"                                                                                         \
                 : __VA_ARGS__                                                                               \
                 : "l"(descriptor_a), "l"(descriptor_b), "r"(add_to), "n"(ACROSS_A), "n"(ACROSS_B))

// the same with A in four registers: `names` are their numbers
#define WGMMA_A(n, registers, names, b, add, tb, ...)                                                        \
    asm volatile("{\n"                                                                                       \
                 ".reg .pred add;\n"                                                                         \
                 "setp.ne.b32 add, " add ", 0;\n"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" registers "}, {" names "}, " b  \
                 ", add, 1, 1, " tb ";\n"                                                                    \
                 "}"                                                                                         \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_b), "r"(add_to),               \
                   "n"(ACROSS_B))

// acc = (add_to ? acc : 0) + A[64, 16] B[16, N]; N is twice the number of accumulators
template <int ACROSS_A, int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[128], uint64_t descriptor_a, uint64_t descriptor_b,
                                      int add_to) {
    WGMMA("256", WGMMA_REGISTERS_128, "%128", "%129", "%130", "%131", "%132", WGMMA_ACC32(0), WGMMA_ACC32(32),
          WGMMA_ACC32(64), WGMMA_ACC32(96));
}

template <int ACROSS_A, int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[96], uint64_t descriptor_a, uint64_t descriptor_b,
                                      int add_to) {
    WGMMA("192", WGMMA_REGISTERS_96, "%96", "%97", "%98", "%99", "%100", WGMMA_ACC32(0), WGMMA_ACC32(32),
          WGMMA_ACC32(64));
}

template <int ACROSS_A, int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[64], uint64_t descriptor_a, uint64_t descriptor_b,
                                      int add_to) {
    WGMMA("128", WGMMA_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", WGMMA_ACC32(0), WGMMA_ACC32(32));
}

template <int ACROSS_A, int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[32], uint64_t descriptor_a, uint64_t descriptor_b,
                                      int add_to) {
    WGMMA("64", WGMMA_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", WGMMA_ACC32(0));
}

// A in registers: for lane 4 g + t (A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]), as in mma.cuh
template <int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[64], const uint32_t (&a)[4], uint64_t descriptor_b,
                                      int add_to) {
    WGMMA_A("128", WGMMA_REGISTERS_64, "%64, %65, %66, %67", "%68", "%69", "%70", WGMMA_ACC32(0),
            WGMMA_ACC32(32));
}

template <int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[48], const uint32_t (&a)[4], uint64_t descriptor_b,
                                      int add_to) {
    WGMMA_A("96", WGMMA_REGISTERS_48, "%48, %49, %50, %51", "%52", "%53", "%54", WGMMA_ACC32(0),
            WGMMA_ACC16(32));
}

template <int ACROSS_B>
__device__ __forceinline__ void wgmma(float (&acc)[32], const uint32_t (&a)[4], uint64_t descriptor_b,
                                      int add_to) {
    WGMMA_A("64", WGMMA_REGISTERS_32, "%32, %33, %34, %35", "%36", "%37", "%38", WGMMA_ACC32(0));
}

#undef WGMMA
#undef WGMMA_A
#undef WGMMA_ACC4
#undef WGMMA_ACC16
#undef WGMMA_ACC32
#undef WGMMA_REGISTERS_32
#undef WGMMA_REGISTERS_48
#undef WGMMA_REGISTERS_64
#undef WGMMA_REGISTERS_96
#undef WGMMA_REGISTERS_128

#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// accumulators become rows of bf16

__device__ __forceinline__ uint32_t pack2(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

__device__ __forceinline__ float low_half(uint32_t pair) {
    return __uint_as_float(pair << 16);
}

__device__ __forceinline__ float high_half(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

// The quad's 4 x 4 matrix is transposed: v[j] of lane i goes to v[i] of lane j. What a lane has of four
// groups of 8 columns becomes all 8 columns of one group.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4]) {
    bool odd = threadIdx.x % 2 == 1, high = threadIdx.x / 2 % 2 == 1;
    uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? v[0] : v[1], 1);
    uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? v[2] : v[3], 1);
    v[0] = odd ? x : v[0];
    v[1] = odd ? v[1] : x;
    v[2] = odd ? y : v[2];
    v[3] = odd ? v[3] : y;
    x = __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2);
    y = __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
    v[0] = high ? x : v[0];
    v[1] = high ? y : v[1];
    v[2] = high ? v[2] : x;
    v[3] = high ? v[3] : y;
}

__device__ __forceinline__ void store16(floatX *to, const uint32_t (&v)[4]) {
    *reinterpret_cast<uint4 *>(to) = make_uint4(v[0], v[1], v[2], v[3]);
}

// the first of the two rows of its warpgroup's 64 that a lane holds accumulators of; the other is 8 further
__device__ __forceinline__ int own_row(void) {
    return (int)(threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4);
}

// columns 32 i .. 32 i + 31 of row g + 8 half of accumulators, rounded
template <int COUNT>
__device__ __forceinline__ void rounded_pairs(uint32_t (&v)[4], const float (&acc)[COUNT], int i, int half) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int at = (4 * i + j) * 4 + 2 * half;
        v[j] = pack2(acc[at], acc[at + 1]);
    }
}

#endif

} // namespace hopper

#endif
