/*
exp(x) in fp32 that a compiler can vectorise: softmax, SiLU and cross entropy spend their time in it, and libm's expf
is a call an element.

    exp(x) = 2^n exp(r),  n = round(x / ln 2),  r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]

exp(r) is its Taylor polynomial of degree 7 (truncation 5e-9), 2^n is written into the exponent bits. Relative error below 2e-7
on [-87.3, 88.7]; below that range it returns the smallest normal number (about 1e-38), above it exp(88.7); NaN in, NaN out.
*/
#ifndef FAST_EXP_H
#define FAST_EXP_H

#include <stdint.h>
#include <string.h>
// defines: int32_t, memcpy

static inline float fast_exp(float x) {
    float bounded = x < -87.3f ? -87.3f : x; // a NaN fails both tests and passes through
    bounded = bounded > 88.7f ? 88.7f : bounded;
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
    float shifted = bounded * 1.44269504f + shift;
    float n = shifted - shift;
    float r = bounded - n * 0.693145752f; // ln 2 in two parts: n * the first is exact
    r = r - n * 1.42860677e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    // 2^n in two halves, so that n = 128 (x near 88.7) does not overflow the exponent field
    int32_t exponent = bits - 0x4B400000;
    int32_t half = exponent >> 1;
    int32_t bits_a = (half + 127) << 23;
    int32_t bits_b = (exponent - half + 127) << 23;
    float a, b;
    memcpy(&a, &bits_a, sizeof(a));
    memcpy(&b, &bits_b, sizeof(b));
    return p * a * b;
}

#endif
