/*
exp(x) in fp32 that a compiler can vectorise: softmax, SiLU and cross entropy spend their time in it, and
libm's expf is a call an element.

    exp(x) = 2^n exp(r),  n = round(x / ln 2),  r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2]

exp(r) is its Taylor polynomial of degree 7 (truncation 5e-9), 2^n is written into the exponent bits. Relative
error below 2e-7 on [-80, 88]; below that range it returns exp(-80), about 2e-35; above it has no meaning (a
softmax never goes there, it subtracts the maximum); NaN in, NaN out.

    sigmoid(x) = 1 / (1 + exp(-x)), for x < -40 that of -40 (4e-18)

The bounds are where they are because vector code computes both sides of a test and picks afterwards: with
wider ones the side that is thrown away would be full of denormal numbers, a hundred times as slow.

max_of(x, n) is what a softmax subtracts first.
*/
#ifndef FAST_EXP_H
#define FAST_EXP_H

#include "llmc/arithmetic.h"
// refuses -ffast-math, which cancels the rounding that fast_exp relies on: errors of 10 %, silently

static inline float fast_exp(float x) {
    float bounded = x < -80.0f ? -80.0f : x; // a NaN fails the test and passes through
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
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
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits - 0x4B400000u + 127u) << 23; // n in the exponent field: 12 .. 254
    float power;
    memcpy(&power, &bits, sizeof(power));
    return p * power;
}

static inline float fast_sigmoid(float x) {
    return 1.0f / (1.0f + fast_exp(x < -40.0f ? 40.0f : -x));
}

// the largest of x[0..n), n >= 1; in lanes, since clang makes no vectors of a reduction by maximum
static inline float max_of(const float *x, int n) {
    enum { WIDTH = 16 };
    float lane[WIDTH];
    int i = 0;
    for (int l = 0; l < WIDTH; l++) {
        lane[l] = x[0];
    }
    for (; i + WIDTH <= n; i += WIDTH) {
#pragma omp simd
        for (int l = 0; l < WIDTH; l++) {
            lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
        }
    }
    for (; i < n; i++) {
        lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    }
    for (int l = 1; l < WIDTH; l++) {
        lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
    }
    return lane[0];
}

#endif
