/*
Counter-based random numbers: a pure function of (seed, stream, counter), so that nothing depends on order,
threads, ranks or sharding, and any element can be drawn alone.

    rng_bits(seed, stream, counter)     64 bits: three rounds of a multiply-xorshift mixer (Steele et al.)
    rng_uniform(...)                    double in (0, 1), 52 bits, never 0 or 1
    rng_normal(seed, stream, counter)   float, N(0, 1), by Box-Muller:
        z_{2i} = sqrt(-2 ln u_{2i}) cos(2 pi u_{2i+1}),   z_{2i+1} = sqrt(-2 ln u_{2i}) sin(2 pi u_{2i+1})

Weights are initialised from rng_normal by both trainers on the host: the same seed gives the same bits on
every machine and compiler. So ln, sin and cos are made here from IEEE + - * / and sqrt alone (a libm may
differ in its last bit), and no a*b + c may be contracted into one rounding: rng_round() hides each product
from the optimiser.
*/
#ifndef RNG_H
#define RNG_H

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
// defines: static_assert, DBL_MANT_DIG, sqrt, uint64_t, memcpy

static_assert(DBL_MANT_DIG == 53, "rng_uniform fills a double's 53 bits, rng_log takes them apart");

// a function that kernels call too
#ifdef __CUDACC__
#define HOST_AND_DEVICE __host__ __device__
#else
#define HOST_AND_DEVICE
#endif

HOST_AND_DEVICE static inline uint64_t rng_mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

HOST_AND_DEVICE static inline uint64_t rng_bits(uint64_t seed, uint64_t stream, uint64_t counter) {
    return rng_mix(rng_mix(rng_mix(seed) ^ stream) ^ counter);
}

HOST_AND_DEVICE static inline double rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint64_t bits =
        rng_bits(seed, stream, counter) >> 12; // with the half added they fill a double's 53: nothing rounds
    return ((double)bits + 0.5) * (1.0 / 4503599627370496.0);
}

// the value itself, but opaque: the compiler cannot fuse the product that made it with the sum that takes it
static inline double rng_round(double product) {
#if defined(__x86_64__)
    __asm__("" : "+x"(product));
    return product;
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
    return product;
#else
    volatile double rounded = product;
    return rounded;
#endif
}

// c[0] + x (c[1] + x (c[2] + ...)), each step rounded twice
static inline double rng_polynomial(double x, const double *c, int n) {
    double y = c[n - 1];
    for (int i = n - 2; i >= 0; i--) {
        y = rng_round(y * x) + c[i];
    }
    return y;
}

// ln u for a normal positive double: u = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m +
// 1))
static inline double rng_log(double u) {
    static const double series[9] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7, 1.0 / 9,
                                     1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17};
    uint64_t bits;
    memcpy(&bits, &u, sizeof(bits));
    int exponent = (int)(bits >> 52) - 1022; // u = m 2^exponent with m in [1/2, 1)
    bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FE0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof(m));
    if (m < 0.70710678118654752440) {
        m = m + m;
        exponent--;
    }
    double s = (m - 1.0) / (m + 1.0);
    double atanh_s = rng_round(s * rng_polynomial(rng_round(s * s), series, 9));
    return rng_round((double)exponent * 0.69314718055994530942) + (atanh_s + atanh_s);
}

// cos and sin of 2 pi u for u in (0, 1): reduced to a quarter turn, then their Taylor series on [-pi/4, pi/4]
static inline void rng_cos_sin(double u, double *cosine, double *sine) {
    static const double cos_series[9] = {1.0,
                                         -1.0 / 2,
                                         1.0 / 24,
                                         -1.0 / 720,
                                         1.0 / 40320,
                                         -1.0 / 3628800,
                                         1.0 / 479001600,
                                         -1.0 / 87178291200.0,
                                         1.0 / 20922789888000.0};
    static const double sin_series[8] = {
        1.0,          -1.0 / 6,        1.0 / 120,          -1.0 / 5040,
        1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800.0, -1.0 / 1307674368000.0};
    int quarter = (int)(rng_round(u * 4.0) + 0.5); // the nearest multiple of a quarter turn, 0..4
    double x = (u - (double)quarter * 0.25) * 6.28318530717958647693;
    double x2 = rng_round(x * x);
    double c = rng_polynomial(x2, cos_series, 9);
    double s = x * rng_polynomial(x2, sin_series, 8);
    *cosine = quarter % 2 == 0 ? c : s;
    *sine = quarter % 2 == 0 ? s : c;
    if (quarter == 1 || quarter == 2) {
        *cosine = -*cosine;
    }
    if (quarter == 2 || quarter == 3) {
        *sine = -*sine;
    }
}

// one normal; elements 2i and 2i + 1 are the two halves of one Box-Muller pair
static inline float rng_normal(uint64_t seed, uint64_t stream, uint64_t counter) {
    uint64_t pair = counter & ~(uint64_t)1;
    double radius = sqrt(-2.0 * rng_log(rng_uniform(seed, stream, pair)));
    double cosine, sine;
    rng_cos_sin(rng_uniform(seed, stream, pair + 1), &cosine, &sine);
    return (float)(radius * (counter % 2 == 0 ? cosine : sine));
}

// x[0..n) = N(0, deviation): elements first .. first + n - 1 of the stream
static inline void rng_fill_normal(float *x, int64_t first, int64_t n, float deviation, uint64_t seed,
                                   uint64_t stream) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        x[i] = deviation * rng_normal(seed, stream, (uint64_t)(first + i));
    }
}

#endif
