/*
rmsnorm.h: forward against double, backward against central differences; rows where eps rules, and zeros.
*/
#ifndef TEST_RMSNORM_H
#define TEST_RMSNORM_H

#include "llmc/rmsnorm.h"
#include "harness.h"

enum { RMSNORM_MOST = 1000, RMSNORM_MOST_D = 150 };

// objective: sum_nc dout_nc out_nc
typedef struct {
    int N, d;
    double x[RMSNORM_MOST], w[RMSNORM_MOST_D], dout[RMSNORM_MOST], out[RMSNORM_MOST];
} RmsnormCase;

static double rmsnorm_objective(void *context) {
    RmsnormCase *r = (RmsnormCase *)context;
    double sum = 0.0;
    for (int n = 0; n < r->N; n++) {
        double squares = 0.0;
        for (int c = 0; c < r->d; c++) {
            squares += r->x[n * r->d + c] * r->x[n * r->d + c];
        }
        for (int c = 0; c < r->d; c++) {
            int i = n * r->d + c;
            r->out[i] = r->x[i] / sqrt(squares / r->d + 1e-5) * r->w[c];
            sum += r->dout[i] * r->out[i];
        }
    }
    return sum;
}

typedef struct {
    float out[RMSNORM_MOST], rstd[RMSNORM_MOST], dx[RMSNORM_MOST], dw[RMSNORM_MOST_D];
} RmsnormRun;

static void rmsnorm_run(RmsnormRun *run, const float *x, const float *w, const float *dout, int N, int d) {
    memset(run, 0, sizeof(*run));
    for (int i = 0; i < N * d; i++) {
        run->dx[i] = 0.5f; // added to, as are the weights' gradients
    }
    run->dw[d - 1] = 0.5f;
    rmsnorm_forward(run->out, run->rstd, x, w, N, d, 1e-5f);
    rmsnorm_backward(run->dx, run->dw, dout, x, w, run->rstd, N, d);
}

static void rmsnorm_check(int N, int d, float scale) {
    static float x[RMSNORM_MOST], w[RMSNORM_MOST_D], dout[RMSNORM_MOST];
    static double want[RMSNORM_MOST];
    static RmsnormCase r;
    static RmsnormRun run[2];
    fill_uniform(x, RMSNORM_MOST, 1, scale);
    fill_uniform(w, RMSNORM_MOST_D, 2, 1.5f);
    fill_uniform(dout, RMSNORM_MOST, 3, 1.0f);
    for (int threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        rmsnorm_run(&run[threads - 1], x, w, dout, N, d);
    }
    CHECK(memcmp(&run[0], &run[1], sizeof(run[0])) == 0);
    r.N = N;
    r.d = d;
    to_double(r.x, x, RMSNORM_MOST);
    to_double(r.w, w, RMSNORM_MOST_D);
    to_double(r.dout, dout, RMSNORM_MOST);
    rmsnorm_objective(&r);
    check_close_to("rmsnorm out", run[0].out, r.out, (size_t)(N * d), 3e-7);
    central_differences(want, r.x, (size_t)(N * d), rmsnorm_objective, &r);
    for (int i = 0; i < N * d; i++) {
        want[i] += 0.5;
    }
    check_close_to("rmsnorm dx", run[0].dx, want, (size_t)(N * d), 1e-6);
    central_differences(want, r.w, (size_t)d, rmsnorm_objective, &r);
    want[d - 1] += 0.5;
    check_close_to("rmsnorm dw", run[0].dw, want, (size_t)d, 1e-6);
}

static void test_rmsnorm_zeros(void) {
    const float x[3] = {0, 0, 0}, w[3] = {1, 2, 3}, dout[3] = {1, 1, 1};
    float out[3], rstd[1], dx[3] = {0, 0, 0}, dw[3] = {0, 0, 0};
    rmsnorm_forward(out, rstd, x, w, 1, 3, 1e-5f);
    rmsnorm_backward(dx, dw, dout, x, w, rstd, 1, 3);
    CHECK(out[0] == 0.0f && out[2] == 0.0f && dw[1] == 0.0f);
    CHECK(fabs(rstd[0] / sqrt(1e5) - 1.0) < 1e-6 && fabs(dx[2] / (3.0 * sqrt(1e5)) - 1.0) < 1e-6);
}

static void test_rmsnorm(void) {
    rmsnorm_check(5, 24, 1.0f);
    rmsnorm_check(6, 150, 2.0f); // d beyond a thread's block of columns
    rmsnorm_check(1, 64, 1.0f);
    rmsnorm_check(17, 1, 3.0f);
    rmsnorm_check(7, 33, 0.004f); // mean square about eps
    test_rmsnorm_zeros();
}

#endif
