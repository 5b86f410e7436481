/*
experts.h: Eq. 1 with SwiGLU experts in double, written without any dispatch, against the forward; its central
differences, for x, both weights and the gates, against the backward. From all experts on to no pair at all.
*/
#ifndef TEST_EXPERTS_H
#define TEST_EXPERTS_H

#include "llmc/experts.h"
#include "harness.h"

enum { EXPERTS_N = 9, EXPERTS_D = 6, EXPERTS_MOST_F = 5, EXPERTS_MOST_E = 4 };
enum { EXPERTS_CELLS = EXPERTS_N * EXPERTS_MOST_E };
enum { EXPERTS_X = EXPERTS_N * EXPERTS_D, EXPERTS_W = EXPERTS_MOST_E * EXPERTS_MOST_F * EXPERTS_D };

// in double, gates as a dense [N, E] picture; objective: sum_tc dy_tc y_tc
typedef struct {
    int E, F;
    double x[EXPERTS_X], gate[EXPERTS_CELLS], gate_up[2 * EXPERTS_W], down[EXPERTS_W];
    double active[EXPERTS_CELLS], dy[EXPERTS_X], y[EXPERTS_X];
} ExpertsReference;

// y += gate W_down (silu(W_gate x) * (W_up x))
static void experts_reference_pair(ExpertsReference *r, int t, int e) {
    const double *x = r->x + t * EXPERTS_D, *gate_up = r->gate_up + e * 2 * r->F * EXPERTS_D;
    for (int f = 0; f < r->F; f++) {
        double g = 0.0, u = 0.0;
        for (int c = 0; c < EXPERTS_D; c++) {
            g += gate_up[f * EXPERTS_D + c] * x[c];
            u += gate_up[(r->F + f) * EXPERTS_D + c] * x[c];
        }
        double a = g / (1.0 + exp(-g)) * u;
        for (int c = 0; c < EXPERTS_D; c++) {
            r->y[t * EXPERTS_D + c] += r->gate[t * r->E + e] * r->down[(e * EXPERTS_D + c) * r->F + f] * a;
        }
    }
}

static double experts_objective(void *context) {
    ExpertsReference *r = (ExpertsReference *)context;
    double sum = 0.0;
    memset(r->y, 0, sizeof(r->y));
    for (int i = 0; i < EXPERTS_N * r->E; i++) {
        if (r->active[i] != 0.0) {
            experts_reference_pair(r, i / r->E, i % r->E);
        }
    }
    for (int i = 0; i < EXPERTS_X; i++) {
        sum += r->dy[i] * r->y[i];
    }
    return sum;
}

typedef struct {
    float x[EXPERTS_X], dy[EXPERTS_X], gate_up[2 * EXPERTS_W], down[EXPERTS_W];
    float y[EXPERTS_X], dx[EXPERTS_X], dgate[EXPERTS_CELLS], dgate_up[2 * EXPERTS_W], ddown[EXPERTS_W];
} ExpertsRun;

// y, dx and the weights' gradients begin as `begin` everywhere: they are added to
static void experts_run(ExpertsRun *run, const PairList *pairs, int E, int F, float begin) {
    int64_t P = pairs->num_pairs, floats = P * (EXPERTS_D + F + 1);
    Dispatch dispatch;
    float *h = P > 0 ? NEW(float, P * 2 * F) : NULL; // the trainer has none either before its first pair
    float *scratch = P > 0 ? NEW(float, floats) : NULL;
    fill_uniform(run->x, EXPERTS_X, 11, 1.0f);
    fill_uniform(run->dy, EXPERTS_X, 12, 1.0f);
    fill_uniform(run->gate_up, 2 * EXPERTS_W, 13, 1.0f);
    fill_uniform(run->down, EXPERTS_W, 14, 1.0f);
    float *results[] = {run->y, run->dx, run->dgate_up, run->ddown};
    const size_t sizes[] = {EXPERTS_X, EXPERTS_X, 2 * EXPERTS_W, EXPERTS_W};
    for (int i = 0; i < 4; i++) {
        for (size_t j = 0; j < sizes[i]; j++) {
            results[i][j] = begin;
        }
    }
    dispatch_init(&dispatch, E);
    dispatch_sort(&dispatch, pairs, E);
    ExpertBank bank = {E, EXPERTS_D, F, run->gate_up, run->down, run->dgate_up, run->ddown};
    experts_forward(run->y, h, run->x, bank, pairs, &dispatch, scratch);
    experts_backward(run->dx, run->dgate, run->dy, run->x, h, bank, pairs, &dispatch, scratch);
    dispatch_free(&dispatch);
    free(scratch);
    free(h);
}

// the gradients of the reference, begin added
static void experts_reference_gradient(ExpertsReference *r, double *gradient, double *x, size_t n,
                                       double begin) {
    central_differences(gradient, x, n, experts_objective, r);
    for (size_t i = 0; i < n; i++) {
        gradient[i] += begin;
    }
}

static void experts_compare(const ExpertsRun *run, const PairList *pairs, int E, int F, double begin) {
    static ExpertsReference r;
    double want[2 * EXPERTS_W], dgate[EXPERTS_CELLS] = {0};
    float gates[EXPERTS_CELLS];
    memset(&r, 0, sizeof(r));
    r.E = E;
    r.F = F;
    to_double(r.x, run->x, EXPERTS_X);
    to_double(r.dy, run->dy, EXPERTS_X);
    to_double(r.gate_up, run->gate_up, 2 * EXPERTS_W);
    to_double(r.down, run->down, EXPERTS_W);
    pairs_to_dense(gates, pairs, E);
    to_double(r.gate, gates, (size_t)(EXPERTS_N * E));
    for (int64_t t = 0, p = 0; t < EXPERTS_N; t++) {
        for (; p < pairs->row_start[t + 1]; p++) {
            r.active[t * E + pairs->expert[p]] = 1.0;
        }
    }
    experts_objective(&r);
    for (int i = 0; i < EXPERTS_X; i++) {
        want[i] = r.y[i] + begin;
    }
    check_close_to("experts y", run->y, want, EXPERTS_X, 1e-6);
    experts_reference_gradient(&r, want, r.x, EXPERTS_X, begin);
    check_close_to("experts dx", run->dx, want, EXPERTS_X, 1e-6);
    experts_reference_gradient(&r, want, r.gate_up, (size_t)(2 * E * F * EXPERTS_D), begin);
    check_close_to("experts dgate_up", run->dgate_up, want, (size_t)(2 * E * F * EXPERTS_D), 1e-6);
    experts_reference_gradient(&r, want, r.down, (size_t)(E * F * EXPERTS_D), begin);
    check_close_to("experts ddown", run->ddown, want, (size_t)(E * F * EXPERTS_D), 1e-6);
    experts_reference_gradient(&r, want, r.gate, (size_t)(EXPERTS_N * E), 0.0);
    for (int64_t t = 0, p = 0; t < EXPERTS_N; t++) {
        for (; p < pairs->row_start[t + 1]; p++) {
            dgate[p] = want[t * E + pairs->expert[p]];
        }
    }
    check_close_to("experts dgate", run->dgate, dgate, (size_t)pairs->num_pairs, 1e-6);
}

// pairs where a uniform number in [-1, 1) exceeds `threshold`; experts 1 and up, or all
static void experts_check(int E, int F, float threshold, int first_expert) {
    static ExpertsRun run[2];
    float mask[EXPERTS_CELLS], gate[EXPERTS_CELLS];
    PairList pairs = pairs_empty();
    fill_uniform(mask, EXPERTS_CELLS, 15, 1.0f);
    fill_uniform(gate, EXPERTS_CELLS, 16, 2.0f); // negative ones too, as a forced set has them
    for (int i = 0; i < EXPERTS_CELLS; i++) {
        mask[i] = mask[i] > threshold && i % E >= first_expert;
    }
    pairs_from_mask(&pairs, gate, mask, EXPERTS_N, E);
    for (int i = 0; i < 2; i++) {
        use_threads(i + 1);
        experts_run(&run[i], &pairs, E, F, 0.25f);
    }
    CHECK(memcmp(run[0].y, run[1].y, sizeof(run[0].y)) == 0);
    CHECK(memcmp(run[0].dx, run[1].dx, sizeof(run[0].dx)) == 0);
    CHECK(memcmp(run[0].dgate, run[1].dgate, (size_t)pairs.num_pairs * sizeof(float)) == 0);
    CHECK(memcmp(run[0].dgate_up, run[1].dgate_up, sizeof(run[0].dgate_up)) == 0);
    CHECK(memcmp(run[0].ddown, run[1].ddown, sizeof(run[0].ddown)) == 0);
    experts_compare(&run[0], &pairs, E, F, 0.25);
    pairs_free(&pairs);
}

// silu and its gradient where exp leaves fp32's range: 0 or the identity, never NaN
static void test_experts_saturation(void) {
    float h[4] = {-200.0f, 200.0f, 3.0f, -2.0f}; // gates, then ups
    float a[2], da[2] = {1.0f, 1.0f}, dgate[1];
    const float gates[1] = {0.5f}, want_a[2] = {0.0f, -400.0f}, want_dh[4] = {0.0f, -1.0f, 0.0f, 100.0f};
    swiglu_forward(a, h, 1, 2);
    check_close("saturated a", a, want_a, 2, 1e-7);
    swiglu_backward(h, da, dgate, gates, 1, 2);
    check_close("saturated dh", h, want_dh, 4, 1e-7);
    CHECK(dgate[0] == -400.0f && da[1] == -200.0f);
}

static void test_experts(void) {
    experts_check(3, 5, 0.0f, 0);  // a mixture
    experts_check(4, 3, -0.4f, 2); // two empty experts first
    experts_check(2, 1, -2.0f, 0); // every pair, width 1
    experts_check(1, 4, -2.0f, 0); // dense
    experts_check(4, 2, 0.9f, 0);  // most tokens without an expert
    experts_check(3, 5, 2.0f, 0);  // no pair at all
    test_experts_saturation();
}

#endif
