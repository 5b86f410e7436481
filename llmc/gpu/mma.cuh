/*
Tensor-core tiles: C[16, 8] += A[16, 16] B[16, 8], one warp, fp32 sums (the instruction mma.m16n8k16).

Each of the 32 lanes holds a few elements of each operand, its "fragment". With lane = 4 g + t:
    C   c[0], c[1] = C[g][2t], C[g][2t+1];   c[2], c[3] = C[g+8][2t], C[g+8][2t+1]
    A   registers (A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..]), two neighbours in k each
    B   registers (B[2t..][g], B[2t+8..][g]), two neighbours in k each
Fragments are read from tiles in shared memory, stored along k or, with _trans, across it; a C fragment can be
the next product's A (attention's probabilities). In the fp32 build a fragment holds the same elements as
floats, and mma() multiplies them with shuffles and multiply-adds: slow, exact, and all else stays the same.

Also the asynchronous copies, global to shared, that feed such tiles (cp.async), and what Hopper's kernels
share with these (hopper.cuh): instructions that take a byte address in shared memory, and pairs of bf16.
sm_80 and later.
*/
#ifndef MMA_CUH
#define MMA_CUH

#include "llmc/gpu/cuda_common.cuh"

#ifdef PRECISION_FP32
struct FragA {
    float x[8];
};
struct FragB {
    float x[4];
};
#else
struct FragA {
    uint32_t x[4];
};
struct FragB {
    uint32_t x[2];
};
#endif

__device__ __forceinline__ int lane_id() {
    return (int)(threadIdx.x % 32);
}

// ----------------------------------------------------------------------------
// shared memory by address; pairs of bf16

#ifndef EMULATED
__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Four 8 x 8 matrices of bf16 numbers: lane 8 j + r gives the address of row r of matrix j, 16 bytes, and
// lane 4 g + t gets columns 2t and 2t + 1 of row g of matrix j in v[j]
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}

// each matrix transposed
__device__ __forceinline__ void load_matrices_trans(uint32_t (&v)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}

// asynchronously, 16 bytes from global to shared memory; zeros if !valid (nothing is read then)
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
#endif

// two numbers rounded to bf16, the first in the low half
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

// ----------------------------------------------------------------------------
// fragments

#if defined(PRECISION_FP32) || defined(EMULATED)
// element by element, as each lane's fragment is defined

__device__ __forceinline__ void set_element(FragA &a, int i, floatX value) {
    reinterpret_cast<floatX *>(a.x)[i] = value;
}

__device__ __forceinline__ void set_element(FragB &b, int i, floatX value) {
    reinterpret_cast<floatX *>(b.x)[i] = value;
}

// A[m][k] is tile[m * m_step + k * k_step]
__device__ __forceinline__ void gather_a(FragA &a, const floatX *tile, int m_step, int k_step) {
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int i = 0; i < 8; i++) {
        int m = g + 8 * (i / 2 % 2);
        int k = 2 * t + i % 2 + 8 * (i / 4);
        set_element(a, i, tile[m * m_step + k * k_step]);
    }
}

__device__ __forceinline__ void gather_b(FragB &b, const floatX *tile, int n_step, int k_step) {
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int i = 0; i < 4; i++) {
        set_element(b, i, tile[g * n_step + (2 * t + i % 2 + 8 * (i / 2)) * k_step]);
    }
}

__device__ __forceinline__ void load_a(FragA &a, const floatX *tile, int ld) {
    gather_a(a, tile, ld, 1);
}

__device__ __forceinline__ void load_a_trans(FragA &a, const floatX *tile, int ld) {
    gather_a(a, tile, 1, ld);
}

__device__ __forceinline__ void load_b(FragB &b, const floatX *tile, int ld) {
    gather_b(b, tile, ld, 1);
}

__device__ __forceinline__ void load_b_trans(FragB &b, const floatX *tile, int ld) {
    gather_b(b, tile, 1, ld);
}

__device__ __forceinline__ void load_b2(FragB b[2], const floatX *tile, int ld) {
    load_b(b[0], tile, ld);
    load_b(b[1], tile + 8 * ld, ld);
}

__device__ __forceinline__ void load_b2_trans(FragB b[2], const floatX *tile, int ld) {
    load_b_trans(b[0], tile, ld);
    load_b_trans(b[1], tile + 8, ld);
}
#else
__device__ __forceinline__ void load_a(FragA &a, const floatX *tile, int ld) {
    int l = lane_id();
    load_matrices(a.x, shared_address(tile + (l % 16) * ld + l / 16 * 8));
}

__device__ __forceinline__ void load_a_trans(FragA &a, const floatX *tile, int ld) {
    int l = lane_id();
    load_matrices_trans(a.x, shared_address(tile + (l / 16 * 8 + l % 8) * ld + l / 8 % 2 * 8));
}

__device__ __forceinline__ void load_b(FragB &b, const floatX *tile, int ld) {
    int l = lane_id();
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.x[0]), "=r"(b.x[1])
                 : "r"(shared_address(tile + (l % 8) * ld + l / 8 % 2 * 8))
                 : "memory");
}

__device__ __forceinline__ void load_b_trans(FragB &b, const floatX *tile, int ld) {
    int l = lane_id();
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.x[0]), "=r"(b.x[1])
                 : "r"(shared_address(tile + (l % 16) * ld))
                 : "memory");
}

__device__ __forceinline__ void load_b2(FragB b[2], const floatX *tile, int ld) {
    int l = lane_id();
    uint32_t x[4];
    load_matrices(x, shared_address(tile + (l / 16 * 8 + l % 8) * ld + l / 8 % 2 * 8));
    b[0].x[0] = x[0];
    b[0].x[1] = x[1];
    b[1].x[0] = x[2];
    b[1].x[1] = x[3];
}

__device__ __forceinline__ void load_b2_trans(FragB b[2], const floatX *tile, int ld) {
    int l = lane_id();
    uint32_t x[4];
    load_matrices_trans(x, shared_address(tile + (l % 16) * ld + l / 16 * 8));
    b[0].x[0] = x[0];
    b[0].x[1] = x[1];
    b[1].x[0] = x[2];
    b[1].x[1] = x[3];
}
#endif

#ifdef PRECISION_FP32
__device__ __forceinline__ void a_from_c(FragA &a, const float c0[4], const float c1[4]) {
    for (int i = 0; i < 4; i++) {
        a.x[i] = c0[i];
        a.x[4 + i] = c1[i];
    }
}
#else
__device__ __forceinline__ void a_from_c(FragA &a, const float c0[4], const float c1[4]) {
    a.x[0] = pack2(c0[0], c0[1]);
    a.x[1] = pack2(c0[2], c0[3]);
    a.x[2] = pack2(c1[0], c1[1]);
    a.x[3] = pack2(c1[2], c1[3]);
}
#endif

#ifdef EMULATED
// all lanes show their fragments to each other, then each computes its four elements of C
static inline void mma(float c[4], const FragA &a, const FragB &b) {
    struct Both {
        FragA a;
        FragB b;
    } mine = {a, b};
    const Both *warp = emulator::show(mine);
    int g = lane_id() / 4, t = lane_id() % 4;
    for (int k = 0; k < 16; k++) {
        int from = k % 8 / 2, at = k % 2 + 4 * (k / 8);
        for (int i = 0; i < 4; i++) {
            const floatX *row = reinterpret_cast<const floatX *>(warp[4 * g + from].a.x);
            const floatX *column = reinterpret_cast<const floatX *>(warp[4 * (2 * t + i % 2) + from].b.x);
            c[i] += to_float(row[at + 2 * (i / 2)]) * to_float(column[k % 2 + 2 * (k / 8)]);
        }
    }
}
#elif defined(PRECISION_FP32)
__device__ __forceinline__ void mma(float c[4], const FragA &a, const FragB &b) {
    int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < 16; k++) {
        int from = k % 8 / 2, at = k % 2 + 4 * (k / 8); // which lane of a quad holds column k, and where
        float low = __shfl_sync(0xffffffffu, a.x[at], 4 * g + from);
        float high = __shfl_sync(0xffffffffu, a.x[at + 2], 4 * g + from);
        float left = __shfl_sync(0xffffffffu, b.x[k % 2 + 2 * (k / 8)], 8 * t + from);
        float right = __shfl_sync(0xffffffffu, b.x[k % 2 + 2 * (k / 8)], 8 * t + 4 + from);
        c[0] += low * left;
        c[1] += low * right;
        c[2] += high * left;
        c[3] += high * right;
    }
}
#else
__device__ __forceinline__ void mma(float c[4], const FragA &a, const FragB &b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
#endif

// ----------------------------------------------------------------------------
// asynchronous copies: issued in groups, waited for until at most N groups are under way; a barrier must
// follow before other threads' copies are read

#ifdef EMULATED
static inline void cp_async16(void *to, const void *from, bool valid) {
    if (valid) {
        memcpy(to, from, 16);
    } else {
        memset(to, 0, 16);
    }
}

static inline void cp_async_commit() {
}

template <int N> static inline void cp_async_wait() {
}
#else
__device__ __forceinline__ void cp_async16(void *to, const void *from, bool valid) {
    copy16(shared_address(to), from, valid);
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

#endif
