/*
The tensor cores of Hopper (sm_90a): wgmma. Four warps (a warpgroup) multiply D[64, N] += A[64, 16] B[16, N],
bf16 from shared memory (A: or from registers), fp32 in registers: thread lane = 4 g + t of warp w holds, for
each 8 columns j,

    acc[4j], acc[4j+1] = D[16w + g][8j + 2t], [8j + 2t + 1];  acc[4j+2], acc[4j+3] the same of row 16w + g + 8

wgmma runs on while its thread goes on; its registers are not to be touched until the wait. How operands lie
in shared memory: hopper.cuh.

Source: the PTX manual, section on wgmma. On a CPU dev/emulator has all of it in C++. Errors: none.
*/
#ifndef WGMMA_CUH
#define WGMMA_CUH

#include "llmc/gpu/hopper.cuh"
// defines: BLOCK_BYTES, ATOM_BYTES, GROUP_THREADS

namespace hopper {

// Describes a swizzled tile to wgmma: address, stride between blocks of 64 in m across k (along k: unused),
// stride between groups of 8 rows; addresses in 16 bytes
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
    const uint64_t swizzle_128 = 1;
    return (uint64_t)((address & 0x3FFFF) >> 4) | (uint64_t)(BLOCK_BYTES >> 4) << 16 |
           (uint64_t)(ATOM_BYTES >> 4) << 32 | swizzle_128 << 62;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(EMULATED)

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
