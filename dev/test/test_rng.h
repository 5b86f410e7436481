/*
rng.h: the mixer against SplitMix64's published outputs, the functions made of + - * / sqrt against libm, the
distributions' moments, and the exact bits of some normals, since weights must be the same everywhere and for
ever.
*/
#ifndef TEST_RNG_H
#define TEST_RNG_H

#include "llmc/rng.h"
#include "harness.h"

// ----------------------------------------------------------------------------
// uniform

static uint64_t rng_undo_shift(uint64_t x, int shift) {
    uint64_t y = x;
    for (int i = 0; i < 64; i += shift) {
        y = x ^ (y >> shift);
    }
    return y;
}

static uint64_t rng_inverse(uint64_t odd) {
    uint64_t y = odd;
    for (int i = 0; i < 6; i++) { // Newton: the right bits double
        y *= 2 - odd * y;
    }
    return y;
}

static uint64_t rng_unmix(uint64_t x) {
    x = rng_undo_shift(x, 31) * rng_inverse(0x94D049BB133111EBull);
    x = rng_undo_shift(x, 27) * rng_inverse(0xBF58476D1CE4E5B9ull);
    return rng_undo_shift(x, 30) - 0x9E3779B97F4A7C15ull;
}

// the counter at which the stream (5, 9) gives these bits
static uint64_t rng_counter_of(uint64_t bits) {
    return rng_unmix(bits) ^ rng_mix(rng_mix(5) ^ 9);
}

static void test_rng_uniform(void) {
    enum { N = 200000 };
    double mean = 0.0, square = 0.0;
    CHECK(rng_mix(0) == 0xE220A8397B1DCDAFull); // SplitMix64 from seed 0: its first three outputs
    CHECK(rng_mix(0x9E3779B97F4A7C15ull) == 0x6E789E6AA1B965F4ull);
    CHECK(rng_mix(2 * 0x9E3779B97F4A7C15ull) == 0x06C45D188009454Full);
    CHECK(rng_bits(5, 9, rng_counter_of(UINT64_MAX)) == UINT64_MAX && rng_bits(5, 9, rng_counter_of(0)) == 0);
    double most = rng_uniform(5, 9, rng_counter_of(UINT64_MAX)), least = rng_uniform(5, 9, rng_counter_of(0));
    CHECK(most < 1.0 && most > 1.0 - 1e-15 && least > 0.0 && least < 1e-15);
    CHECK(rng_uniform(5, 9, rng_counter_of(1ull << 63)) > 0.5 &&
          rng_uniform(5, 9, rng_counter_of((1ull << 63) - 1)) < 0.5);
    for (int i = 0; i < N; i++) {
        double u = rng_uniform(1, 2, (uint64_t)i);
        mean += u / N;
        square += u * u / N;
    }
    CHECK(fabs(mean - 0.5) < 4.0 * sqrt(1.0 / 12 / N) && fabs(square - 1.0 / 3) < 4.0 * sqrt(4.0 / 45 / N));
}

// ----------------------------------------------------------------------------
// normal

static void test_rng_functions(void) {
    double worst_log = 0.0, worst_circle = 0.0;
    for (int i = 1; i < 100000; i++) {
        double u = i % 3 == 0   ? i / 100000.0
                   : i % 3 == 1 ? 1.0 - i * 1e-13
                                : ldexp(1.0 + i / 100000.0, -1 - i % 53);
        double cosine, sine;
        rng_cos_sin(u, &cosine, &sine);
        worst_log = fmax(worst_log, fabs(rng_log(u) / log(u) - 1.0));
        worst_circle = fmax(worst_circle, fmax(fabs(cosine - cos(6.283185307179586477 * u)),
                                               fabs(sine - sin(6.283185307179586477 * u))));
    }
    CHECK(worst_log < 1e-14 && worst_circle < 2e-15);
    for (int quarter = 0; quarter <= 4; quarter++) {
        double cosine, sine;
        rng_cos_sin(quarter / 4.0, &cosine, &sine);
        CHECK(cosine == (quarter % 2 ? 0 : quarter == 2 ? -1 : 1) && sine == (quarter % 2 ? 2 - quarter : 0));
    }
}

// the mean of a(i) b(i) over n elements of two streams, in units of its standard error
static double rng_correlation(uint64_t seed_a, uint64_t stream_a, uint64_t seed_b, uint64_t stream_b,
                              int shift) {
    enum { N = 50000 };
    double sum = 0.0;
    for (uint64_t i = 0; i < N; i++) {
        sum += (double)rng_normal(seed_a, stream_a, i) * rng_normal(seed_b, stream_b, i + (uint64_t)shift);
    }
    return sum / sqrt(N);
}

static void test_rng_normal(void) {
    enum { N = 200000 };
    double moment[5] = {0}, beyond3 = 0.0;
    for (uint64_t i = 0; i < N; i++) {
        double z = rng_normal(1234, 7, i), power = 1.0;
        for (int k = 0; k < 5; k++, power *= z) {
            moment[k] += power / N;
        }
        beyond3 += (fabs(z) > 3.0) / (double)N;
    }
    CHECK(fabs(moment[1]) < 4.0 * sqrt(1.0 / N) && fabs(moment[2] - 1.0) < 4.0 * sqrt(2.0 / N));
    CHECK(fabs(moment[3]) < 4.0 * sqrt(15.0 / N) && fabs(moment[4] - 3.0) < 4.0 * sqrt(96.0 / N));
    CHECK(fabs(beyond3 - 0.0026998) < 4.0 * sqrt(0.0027 / N));
    CHECK(fabs(rng_correlation(1, 2, 1, 2, 1)) < 4.0); // neighbours, the two halves of a pair among them
    CHECK(fabs(rng_correlation(1, 2, 1, 3, 0)) < 4.0); // streams
    CHECK(fabs(rng_correlation(1, 2, 2, 2, 0)) < 4.0); // seeds
    CHECK(fabs(rng_correlation(1, 2, 2, 1, 0)) < 4.0); // seed and stream exchanged
}

static void test_rng_fill(void) {
    enum { N = 1001 };
    float x[2][N];
    int wrong = 0;
    for (int i = 0; i < 2; i++) {
        use_threads(i + 1);
        rng_fill_normal(x[i], 0, N, 0.25f, 42, 3);
    }
    for (int i = 0; i < N; i++) {
        wrong += x[0][i] != 0.25f * rng_normal(42, 3, (uint64_t)i);
    }
    CHECK(wrong == 0 && memcmp(x[0], x[1], sizeof(x[0])) == 0);
    for (int first = 0; first < N; first += 77) { // pieces that part the two halves of a pair
        rng_fill_normal(x[1] + first, first, 77 < N - first ? 77 : N - first, 0.25f, 42, 3);
    }
    CHECK(memcmp(x[0], x[1], sizeof(x[0])) == 0);
}

// these bits change only if every weight ever drawn may change
static void test_rng_golden(void) {
    static const struct {
        uint64_t seed, stream, counter;
        uint32_t bits;
    } golden[] = {
        {0, 0, 0, 0x3F4BF0D0},
        {0, 0, 1, 0x3FE91721},
        {1234, 0, 0, 0xBECF5E94},
        {1234, 0, 1, 0xBFB94AD2},
        {1234, 5, 2, 0xBEE302E4},
        {1234, 5, 3, 0xBE47C39F},
        {1234, 107, 1000003, 0x3EBFBAE5},
        {1234, 8, (uint64_t)1 << 40, 0xBDAF1B15},
        {INT64_MAX, (uint64_t)1 << 32, 7, 0xBF258B24},
        {7, 1, 500, 0xBFAD43B6},
        {7, 1, 501, 0x3F608688},
        {7, 1, 502, 0x3FD0DF33},
    };
    for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
        float z = rng_normal(golden[i].seed, golden[i].stream, golden[i].counter);
        uint32_t bits;
        memcpy(&bits, &z, sizeof(bits));
        if (!CHECK(bits == golden[i].bits)) {
            printf("    element %zu: %08X\n", i, bits);
        }
    }
}

static void rng_fold(uint64_t *hash, double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof(bits));
    *hash = rng_mix(*hash ^ bits);
}

// a product fused with its sum shows in the last bits of these doubles long before it shows in a float
static void test_rng_rounding(void) {
    uint64_t logs = 0, cosines = 0, sines = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        double u = rng_uniform(1, 2, i), cosine, sine;
        rng_cos_sin(u, &cosine, &sine);
        rng_fold(&logs, rng_log(u));
        rng_fold(&cosines, cosine);
        rng_fold(&sines, sine);
    }
    CHECK(logs == 0x898B5E56B65364D0ull);
    CHECK(cosines == 0x3A5F62F178150DF5ull);
    CHECK(sines == 0xFF56D9229CC349D9ull);
}

static void test_rng(void) {
    test_rng_uniform();
    test_rng_functions();
    test_rng_normal();
    test_rng_fill();
    test_rng_golden();
    test_rng_rounding();
}

#endif
