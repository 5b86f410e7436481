/*
adamw.h: many steps against AdamW in double as its paper writes it, the norm over blocks of every size,
clipping, and equal bits whatever the threads.
*/
#ifndef TEST_ADAMW_H
#define TEST_ADAMW_H

#include "llmc/adamw.h"
#include "harness.h"

enum { ADAMW_N = 1003 };

typedef struct {
    float w[ADAMW_N], m[ADAMW_N], v[ADAMW_N];
} AdamwState;

static void adamw_reference(double *w, double *m, double *v, const float *grad, double lr, double decay,
                            double clip, int t) {
    for (int i = 0; i < ADAMW_N; i++) {
        double g = grad[i] * clip;
        m[i] = 0.9 * m[i] + 0.1 * g;
        v[i] = 0.999 * v[i] + 0.001 * g * g;
        double m_hat = m[i] / (1.0 - pow(0.9, t)), v_hat = v[i] / (1.0 - pow(0.999, t));
        w[i] = w[i] - lr * m_hat / (sqrt(v_hat) + 1e-8) - lr * decay * w[i];
    }
}

// gradients of size `scale`: at 1e-8 eps decides
static void adamw_check(float scale, double lr, double decay, float clip, int first_t, int steps) {
    static AdamwState state;
    static double w[ADAMW_N], m[ADAMW_N], v[ADAMW_N];
    const AdamW adamw = {0.9, 0.999, 1e-8};
    float grad[ADAMW_N];
    fill_uniform(state.w, ADAMW_N, 1, 0.1f);
    fill_uniform(state.m, ADAMW_N, 2, scale);
    fill_uniform(state.v, ADAMW_N, 3, scale * scale);
    for (int i = 0; i < ADAMW_N; i++) { // from zero moments, or from those of an earlier run
        state.m[i] = first_t == 1 ? 0.0f : state.m[i];
        state.v[i] = first_t == 1 ? 0.0f : fabsf(state.v[i]);
    }
    to_double(w, state.w, ADAMW_N);
    to_double(m, state.m, ADAMW_N);
    to_double(v, state.v, ADAMW_N);
    for (int t = first_t; t < first_t + steps; t++) {
        fill_uniform(grad, ADAMW_N, (unsigned)t + 10, scale);
        adamw_update(state.w, state.m, state.v, grad, ADAMW_N, adamw, lr, decay, clip, t);
        adamw_reference(w, m, v, grad, lr, decay, clip, t);
    }
    check_close_to("adamw w", state.w, w, ADAMW_N, 1e-6);
    check_close_to("adamw m", state.m, m, ADAMW_N, 1e-6);
    check_close_to("adamw v", state.v, v, ADAMW_N, 1e-6);
}

static void test_adamw_first_step(void) {
    const AdamW adamw = {0.9, 0.999, 1e-8};
    float w[3] = {1.0f, 1.0f, 1.0f}, m[3] = {0}, v[3] = {0};
    const float grad[3] = {5.0f, -0.001f, 0.0f};
    adamw_update(w, m, v, grad, 3, adamw, 0.01, 0.0, 1.0f, 1); // each moves by lr against its gradient's sign
    CHECK(fabs(w[0] - 0.99) < 1e-7 && fabs(w[1] - 1.01) < 2e-7 && w[2] == 1.0f);
    adamw_update(w, m, v, grad, 3, adamw, 0.0, 0.5, 1.0f, 2); // lr 0: nothing moves, decay neither
    CHECK(fabs(w[0] - 0.99) < 1e-7 && w[2] == 1.0f);
    adamw_update(w, m, v, grad, 3, adamw, 0.01, 0.5, 1.0f, 3);
    CHECK(fabs(w[2] - 0.995) < 1e-7);
}

// the same elements in other chunks: an uneven number, so that threads begin and end in the middle of vectors
static void test_adamw_threads(void) {
    static AdamwState state[3];
    const AdamW adamw = {0.9, 0.999, 1e-8};
    float grad[ADAMW_N];
    for (int i = 0; i < 3; i++) {
        use_threads(i + 1);
        fill_uniform(state[i].w, ADAMW_N, 1, 0.1f);
        memset(state[i].m, 0, sizeof(state[i].m));
        memset(state[i].v, 0, sizeof(state[i].v));
        for (int t = 1; t <= 3; t++) {
            fill_uniform(grad, ADAMW_N, (unsigned)t, 0.3f);
            adamw_update(state[i].w, state[i].m, state[i].v, grad, ADAMW_N, adamw, 1e-3, 0.01, 0.77f, t);
        }
    }
    CHECK(memcmp(&state[0], &state[1], sizeof(state[0])) == 0);
    CHECK(memcmp(&state[0], &state[2], sizeof(state[0])) == 0);
}

static void test_adamw_norm(void) {
    const int64_t sizes[] = {0, 1, 7, NORM_BLOCK - 1, NORM_BLOCK, NORM_BLOCK + 1, 3 * NORM_BLOCK + 5};
    float *x = NEW(float, 3 * NORM_BLOCK + 5);
    fill_uniform(x, 3 * NORM_BLOCK + 5, 4, 2.0f);
    for (int i = 0; i < 7; i++) {
        long double want = 0.0L;
        for (int64_t j = 0; j < sizes[i]; j++) {
            want += (long double)x[j] * x[j];
        }
        use_threads(1);
        double one = sum_of_squares(x, sizes[i]);
        use_threads(2);
        CHECK(one == sum_of_squares(x, sizes[i]) && fabs(one - (double)want) <= 2e-12 * one);
    }
    x[5] = 1e30f; // a square that fp32 could not hold
    CHECK(fabs(sum_of_squares(x, 100) / ((double)x[5] * x[5]) - 1.0) < 1e-12);
    free(x);
}

static void test_adamw_clip(void) {
    CHECK(clip_scale(0.0, 1.0) == 1.0f && clip_scale(0.5, 1.0) == 1.0f && clip_scale(0.999998, 1.0) == 1.0f);
    CHECK(clip_scale(4.0, 1.0) == (float)(1.0 / (4.0 + 1e-6)) &&
          clip_scale(4.0, 2.0) == (float)(2.0 / (4.0 + 1e-6)));
    CHECK(clip_scale(1.0, 1.0) < 1.0f); // the 1e-6 of the formula
    CHECK(clip_scale(1e30, 0.0) == 1.0f);
}

static void test_adamw(void) {
    test_adamw_first_step();
    adamw_check(0.1f, 1e-3, 0.01, 1.0f, 1, 30);
    adamw_check(3.0f, 5e-4, 0.0, 0.25f, 1, 10);
    adamw_check(1e-8f, 1e-3, 0.1, 1.0f, 1, 10);
    adamw_check(1e-3f, 1e-2, 0.5, 0.5f, 100000, 10);
    test_adamw_threads();
    test_adamw_norm();
    test_adamw_clip();
}

#endif
