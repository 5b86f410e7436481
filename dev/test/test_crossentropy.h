/*
crossentropy.h: losses and gradients against double, logits of any size, and evaluation that leaves them.
*/
#ifndef TEST_CROSSENTROPY_H
#define TEST_CROSSENTROPY_H

#include "llmc/crossentropy.h"
#include "harness.h"

enum { CROSSENTROPY_MOST = 2100 };

// objective: scale * sum of the losses
typedef struct {
    int N, V;
    const int *targets;
    double scale;
    double logits[CROSSENTROPY_MOST], losses[CROSSENTROPY_MOST];
} CrossentropyCase;

static double crossentropy_objective(void *context) {
    CrossentropyCase *r = (CrossentropyCase *)context;
    double total = 0.0;
    for (int n = 0; n < r->N; n++) {
        const double *z = r->logits + n * r->V;
        double max = z[0], sum = 0.0;
        for (int v = 1; v < r->V; v++) {
            max = fmax(max, z[v]);
        }
        for (int v = 0; v < r->V; v++) {
            sum += exp(z[v] - max);
        }
        r->losses[n] = log(sum) + max - z[r->targets[n]];
        total += r->scale * r->losses[n];
    }
    return total;
}

static void crossentropy_check(int N, int V, float range) {
    static float logits[CROSSENTROPY_MOST], kept[CROSSENTROPY_MOST], gradient[2][CROSSENTROPY_MOST];
    static double want[CROSSENTROPY_MOST];
    static CrossentropyCase r;
    float losses[CROSSENTROPY_MOST], again[CROSSENTROPY_MOST];
    int targets[CROSSENTROPY_MOST];
    fill_uniform(logits, CROSSENTROPY_MOST, 1, range);
    memcpy(kept, logits, sizeof(kept));
    for (int n = 0; n < N; n++) {
        targets[n] = n * 13 % V;
    }
    r.N = N;
    r.V = V;
    r.targets = targets;
    r.scale = 0.125f;
    to_double(r.logits, logits, CROSSENTROPY_MOST);
    crossentropy_forward_backward(losses, logits, targets, N, V, 0.0f);
    CHECK(memcmp(logits, kept, sizeof(kept)) == 0);
    for (int threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        memcpy(gradient[threads - 1], logits, sizeof(logits));
        crossentropy_forward_backward(again, gradient[threads - 1], targets, N, V, 0.125f);
        CHECK(memcmp(losses, again, (size_t)N * sizeof(float)) == 0); // the same with and without gradient
    }
    CHECK(memcmp(gradient[0], gradient[1], (size_t)(N * V) * sizeof(float)) == 0);
    crossentropy_objective(&r);
    check_close_to("crossentropy losses", losses, r.losses, (size_t)N, 1e-6);
    central_differences(want, r.logits, (size_t)(N * V), crossentropy_objective, &r);
    check_close_to("crossentropy gradient", gradient[0], want, (size_t)(N * V), 1e-6);
    unsigned char greedy[CROSSENTROPY_MOST];
    crossentropy_score(again, greedy, logits, targets, N, V);
    for (int n = 0; n < N; n++) {
        int best = 0;
        for (int v = 1; v < V; v++) {
            best = logits[n * V + v] > logits[n * V + best] ? v : best;
        }
        CHECK(greedy[n] == (best == targets[n]));
        again[n] = -again[n];
    }
    check_close_to("crossentropy log likelihoods", again, r.losses, (size_t)N, 1e-6);
}

// of equal logits the lower index is the greedy choice; the log likelihood of a sure token is 0
static void test_crossentropy_score(void) {
    const float rows[5 * 4] = {1.0f, 3.0f, 3.0f,  2.0f, 1.0f,  3.0f, 3.0f,  2.0f, 1.0f,  3.0f,
                               3.0f, 2.0f, -1e4f, 1e4f, -2e4f, 1e3f, -1e4f, 1e4f, -2e4f, 1e3f};
    const int targets[5] = {1, 2, 0, 1, 2}, greedy_want[5] = {1, 0, 0, 1, 0};
    float ll[5];
    unsigned char greedy[5];
    crossentropy_score(ll, greedy, rows, targets, 5, 4);
    double sum = exp(-2.0) + 2.0 + exp(-1.0);
    CHECK(fabs(ll[0] + log(sum)) < 1e-6 && ll[1] == ll[0] && fabs(ll[2] + 2.0 + log(sum)) < 1e-6);
    CHECK(ll[3] == 0.0f && ll[4] == -3e4f);
    for (int n = 0; n < 5; n++) {
        CHECK(greedy[n] == greedy_want[n]);
    }
}

// a target 2e4 below the others: its loss is exact, its gradient -scale
static void test_crossentropy_extremes(void) {
    float z[3] = {-5e3f, -1e4f, 1e4f}, loss;
    const int target[1] = {1};
    crossentropy_forward_backward(&loss, z, target, 1, 3, 1.0f);
    CHECK(loss == 2e4f && z[0] < 2e-35f && z[1] == -1.0f && z[2] == 1.0f);
    float same[4] = {-3e38f, -3e38f, -3e38f, -3e38f};
    crossentropy_forward_backward(&loss, same, target, 1, 4, 1.0f);
    CHECK(fabs(loss - log(4.0)) < 1e-6 && same[0] == 0.25f && same[1] == -0.75f);
    float alone[1] = {7.0f};
    const int first[1] = {0};
    crossentropy_forward_backward(&loss, alone, first, 1, 1, 1.0f);
    CHECK(loss == 0.0f && alone[0] == 0.0f);
    for (int v = 0; v < 2; v++) { // a diverged run must not look like a good one
        float broken[2] = {1.0f, 1.0f};
        broken[v] = NAN;
        crossentropy_forward_backward(&loss, broken, first, 1, 2, 0.0f);
        CHECK(isnan(loss));
    }
}

static void test_crossentropy(void) {
    crossentropy_check(31, 67, 3.0f);
    crossentropy_check(2, 1024, 1.0f);
    crossentropy_check(100, 2, 5.0f);
    crossentropy_check(40, 16, 1e-3f);
    test_crossentropy_extremes();
    test_crossentropy_score();
}

#endif
