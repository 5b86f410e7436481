/*
rope.h: the rotation of each pair (i, i + hd/2) against double, the columns that must stay as they are, and
the backward as the forward's transpose.
*/
#ifndef TEST_ROPE_H
#define TEST_ROPE_H

#include "llmc/check.h"
#include "llmc/rope.h"
#include "harness.h"

enum { ROPE_MOST = 12000 };

// one pair at position t, by the angle's definition
static void rope_reference_pair(double *low, double *high, int t, int i, int hd, double theta) {
    double angle = t * exp(-2.0 * i / hd * log(theta));
    double a = *low, b = *high;
    *low = a * cos(angle) - b * sin(angle);
    *high = a * sin(angle) + b * cos(angle);
}

// positions start .. start + T - 1; the first `heads` blocks of hd columns of `stride`
static void rope_check(int B, int T, int start, int heads, int hd, int stride, double theta) {
    static float x[ROPE_MOST], y[ROPE_MOST], dx[ROPE_MOST], again[ROPE_MOST];
    static double want[ROPE_MOST];
    size_t size = (size_t)(B * T * stride);
    float *table = NEW(float, (start + T) * hd);
    double forward = 0.0, backward = 0.0;
    int touched = 0;
    rope_table(table, start + T, hd, theta);
    fill_uniform(x, size, 1, 1.0f);
    fill_uniform(dx, size, 2, 1.0f);
    memcpy(y, x, sizeof(y));
    to_double(want, x, size);
    for (int n = 0; n < B * T; n++) {
        for (int pair = 0; pair < heads * hd / 2; pair++) {
            double *head = want + n * stride + pair / (hd / 2) * hd;
            int i = pair % (hd / 2);
            rope_reference_pair(head + i, head + i + hd / 2, start + n % T, i, hd, theta);
        }
    }
    use_threads(1);
    rope_forward(y, table, B, T, start, heads, hd, stride);
    check_close_to("rope", y, want, size, 1e-7);
    for (size_t i = 0; i < size; i++) {
        touched += (int)i % stride >= heads * hd && y[i] != x[i];
        forward += (double)y[i] * dx[i];
    }
    CHECK(touched == 0); // the values behind queries and keys
    memcpy(again, dx, sizeof(again));
    rope_backward(dx, table, B, T, start, heads, hd, stride);
    use_threads(2);
    rope_backward(again, table, B, T, start, heads, hd, stride);
    CHECK(memcmp(dx, again, sizeof(again)) == 0);
    for (size_t i = 0; i < size; i++) {
        backward += (double)x[i] * dx[i]; // <R x, dy> = <x, R^T dy>
    }
    CHECK(fabs(forward - backward) < 1e-5 * sqrt((double)size));
    rope_backward(y, table, B, T, start, heads, hd, stride);
    check_close("rope there and back", y, x, size, 2e-7);
    free(table);
}

static void test_rope(void) {
    rope_check(2, 9, 0, 3, 24, 100, 1e6);
    rope_check(1, 5, 4, 2, 2, 7, 1e6);      // hd 2: one pair a head, angle t
    rope_check(3, 1, 0, 1, 8, 8, 1e4);      // T = 1: nothing turns
    rope_check(1, 3, 8189, 1, 64, 64, 1e6); // far positions keep their digits
    rope_check(1, 1, 17, 5, 24, 192, 1e6);  // a step of cached sampling
}

#endif
