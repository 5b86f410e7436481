/*
Sixteen bytes of floatX and the fp32 numbers that belong to them; exponentials in base 2.

Activations are packs of 8 bf16 numbers (4 in the fp32 build), but norms' weights, gradients, rotation tables
and moments are fp32. Floats are as many fp32 numbers as a pack has elements, so that one loop serves both: 32
bytes that move as two 16-byte accesses (one in the fp32 build).

    widen    pack -> Floats, exact
    narrow   Floats -> pack, each rounded once

What a thread holds for long it should hold as Bits, the pack's 16 bytes in 4 registers: a Pack<floatX> has
8 numbers of 16 bits, and where paths of control meet (a load that depends on a condition) the compiler
gives each a register.

The hardware's exponential is 2^x, so exp(x) is computed as power_of_2(x LOG2_E), and the multiplication is
best folded into one that is there anyway.
*/
#ifndef FLOATS_CUH
#define FLOATS_CUH

#include "llmc/gpu/cuda_common.cuh"

enum { PACK_X = Pack<floatX>::SIZE };
static_assert(8 % PACK_X == 0, "rows of a multiple of 8 numbers are whole packs");

struct alignas(16) Floats {
    float x[PACK_X];
};

__device__ __forceinline__ Floats load_floats(const float *from) {
    return *reinterpret_cast<const Floats *>(from);
}

// the same of what no thread writes while the kernel runs: the compiler may move such a load before a store
__device__ __forceinline__ Floats load_constant_floats(const float *from) {
#ifdef EMULATED
    return load_floats(from);
#else
    Floats floats;
    for (int i = 0; i < PACK_X; i += 4) {
        *reinterpret_cast<float4 *>(floats.x + i) = __ldg(reinterpret_cast<const float4 *>(from + i));
    }
    return floats;
#endif
}

__device__ __forceinline__ void store_floats(float *to, const Floats &floats) {
    *reinterpret_cast<Floats *>(to) = floats;
}

__device__ __forceinline__ Floats widen(const Pack<floatX> &pack) {
    Floats floats;
    for (int i = 0; i < PACK_X; i++) {
        floats.x[i] = to_float(pack.x[i]);
    }
    return floats;
}

__device__ __forceinline__ Pack<floatX> narrow(const Floats &floats) {
    Pack<floatX> pack;
    for (int i = 0; i < PACK_X; i++) {
        pack.x[i] = to_x(floats.x[i]);
    }
    return pack;
}

typedef Pack<uint32_t> Bits;

__device__ __forceinline__ Bits load_bits(const floatX *from) {
    return *reinterpret_cast<const Bits *>(from);
}

__device__ __forceinline__ void store_bits(floatX *to, const Bits &bits) {
    *reinterpret_cast<Bits *>(to) = bits;
}

__device__ __forceinline__ Bits to_bits(const Pack<floatX> &pack) {
    Bits bits;
    memcpy(&bits, &pack, sizeof(bits));
    return bits;
}

__device__ __forceinline__ Floats widen(const Bits &bits) {
    Pack<floatX> pack;
    memcpy(&pack, &bits, sizeof(pack));
    return widen(pack);
}

// a thread's packs: columns first, first + step, ... of the row, 0 beyond its end
template <int PACKS>
__device__ __forceinline__ void load_packs(Bits (&kept)[PACKS], const floatX *row, int first, int step,
                                           int d) {
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        kept[i] = first + i * step < d ? load_bits(row + first + i * step) : Bits{};
    }
}

// Hides from the compiler that these values are unchanged. Otherwise it would keep everything computed from
// them (conversions, exponentials) in registers for the second use, and spill
template <int COUNT> __device__ __forceinline__ void forget_values(Bits (&held)[COUNT]) {
#ifdef EMULATED
    (void)held;
#else
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        asm volatile("" : "+r"(held[i].x[0]), "+r"(held[i].x[1]), "+r"(held[i].x[2]), "+r"(held[i].x[3]));
    }
#endif
}

// sum += x
__device__ __forceinline__ void add_to(Floats &sum, const Floats &x) {
    for (int i = 0; i < PACK_X; i++) {
        sum.x[i] += x.x[i];
    }
}

// sum += scale x
__device__ __forceinline__ void add_scaled(Floats &sum, float scale, const Floats &x) {
    for (int i = 0; i < PACK_X; i++) {
        sum.x[i] = fmaf(scale, x.x[i], sum.x[i]);
    }
}

// whether 16-byte accesses may begin at p
static inline bool is_aligned16(const void *p) {
    return (uintptr_t)p % 16 == 0;
}

// ----------------------------------------------------------------------------
// exponentials

static constexpr float LOG2_E = 1.44269504f; // exp(x) = 2^(x LOG2_E)
static constexpr float LN_2 = 0.693147181f;  // ln x = LN_2 log2(x)

// 2^x to a relative 2^-22; -infinity gives 0. The library's exp2f spends three more instructions on denormals
__device__ __forceinline__ float power_of_2(float x) {
#ifdef EMULATED
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x to a relative 2^-23; of infinity 0
__device__ __forceinline__ float reciprocal(float x) {
#ifdef EMULATED
    return 1.0f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / (1 + exp(-x))
__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// The same with subnormal numbers flushed to 0, which spares the instructions that scale them: one for the
// power, one for the reciprocal, one each to multiply and add. The last bits differ from sigmoid's; the error
// is about 1e-6
__device__ __forceinline__ float sigmoid_ftz(float x) {
    return reciprocal(1.0f + power_of_2(-LOG2_E * x));
}

#endif
