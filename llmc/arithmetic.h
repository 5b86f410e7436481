/*
What this code relies on and no compiler may take from it: IEEE arithmetic, and numbers that lie in memory as
they do in files.

    NaN != NaN                      the guard against a step that is not finite, fast_exp, the routers' masks
    (a + b) - b rounds twice        fast_exp rounds to an integer so; sums keep their order, so that the same
                                    seed gives the same bits
    x / y is the nearest number     not x times a rounded 1 / y
    -0 + 0 = 0, and 1e-40 is not 0  the regulariser's weight and Adam's second moments are tiny for a while

-ffast-math (-Ofast) and its parts break these without a word: losses differ, and a NaN trains on. What a
compiler admits to, by a macro, is refused when it compiles. What it keeps to itself (clang does), or what a
library does to the CPU, is found when the program starts: arithmetic_fault.
-ffp-contract=fast is none of them: it rounds once where two roundings stand, and reorders nothing.
*/
#ifndef ARITHMETIC_H
#define ARITHMETIC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
// defines: NULL, uint32_t, memcpy

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a big-endian machine: files hold numbers as they lie in memory, lowest byte first, and would be wrong"
#endif
#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) ||               \
    defined(__NO_SIGNED_ZEROS__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0)
#error "-Ofast, -ffast-math and its parts give other losses and no guard against NaN: compile without them"
#endif

// what of the above does not hold in this program, or NULL. The numbers are volatile: else the compiler would
// do the sums, not the CPU
static inline const char *arithmetic_fault(void) {
    volatile float zero = 0.0f, minus_zero = -0.0f, tiny = 1e-38f, third = 0.3f, shift = 12582912.0f;
    volatile float nan_value = zero / zero;
    float x = nan_value;
    if (x == x || !(x != x)) {
        return "NaN counts as a number (-ffinite-math-only)";
    }
    float a = third, b = shift;
    if ((a + b) - b != zero) {
        return "sums are reordered (-fassociative-math)";
    }
    float negative = minus_zero, sum = negative + 0.0f;
    uint32_t bits;
    memcpy(&bits, &sum, sizeof(bits));
    if (bits != 0) {
        return "-0 + 0 is -0 (-fno-signed-zeros)";
    }
    if (tiny * 0.01f == zero) {
        return "tiny numbers are flushed to zero (-ffast-math when linking, or a library that sets it)";
    }
    for (int i = 3; i < 128; i++) {
        volatile float numbers[4] = {(float)i, 2.0f * (float)i, 3.0f * (float)i, 5.0f * (float)i};
        float y = numbers[0], one = numbers[0] / y, two = numbers[1] / y, three = numbers[2] / y,
              five = numbers[3] / y;
        if (one != 1.0f || two != 2.0f || three != 3.0f || five != 5.0f) {
            return "divisions are products with a rounded 1 / y (-freciprocal-math)";
        }
    }
    return NULL;
}

#endif
