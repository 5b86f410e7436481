// emulator: the part of NVIDIA's cuda_bf16.h that remoe.c uses (see cuda_runtime.h beside)
#ifndef EMULATOR_CUDA_BF16_H
#define EMULATOR_CUDA_BF16_H

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
    uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// to the nearest, ties to even; NaN stays NaN
static inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    __nv_bfloat16 rounded;
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        rounded.bits = 0x7fff;
    } else {
        rounded.bits = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    return rounded;
}

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}

#endif
