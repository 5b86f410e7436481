/*
crossentropy.cuh against crossentropy.h: vocabularies of every remainder, targets at both ends, wide logits,
evaluation, very long rows, and the losses' sum.

Tolerances: losses are fp32, of sums in another order: 1e-5; the gradient is rounded to bf16 once, at most
2^-9 of an element.
*/
#ifndef TEST_CUDA_CROSSENTROPY_CUH
#define TEST_CUDA_CROSSENTROPY_CUH

#include "llmc/crossentropy.h"
#include "llmc/crossentropy.cuh"
#include "harness.cuh"

static void crossentropy_cuda_case(int64_t N, int V, float range, float scale) {
    int64_t size = N * V;
    float *logits = host_random(size, 1, range), *losses = NEW(float, N);
    int *targets = NEW(int, N);
    for (int64_t n = 0; n < N; n++) {
        targets[n] = n == 0 ? V - 1 : n == 1 ? 0 : (int)(n * 7919 % V);
    }
    floatX *d_logits[2] = {device_x(logits, size), device_x(logits, size)};
    float *d_losses = device_new<float>(N);
    int *d_targets = device_i(targets, N);
    crossentropy_forward_backward(losses, logits, targets, N, V, scale);
    for (int i = 0; i < 2; i++) {
        crossentropy_forward_backward(d_losses, d_logits[i], d_targets, N, V, scale, 0);
    }
    check_device("cross entropy losses", d_losses, losses, N, 1e-5);
    check_device("cross entropy dlogits", d_logits[0], logits, size,
                 scale == 0.0f ? 0.0 : tolerance(1e-5, 2e-3));
    CHECK(device_hash(d_logits[0], size * sizeof(floatX)) == device_hash(d_logits[1], size * sizeof(floatX)));
    device_release(d_logits[0]);
    device_release(d_logits[1]);
    device_release(d_losses);
    device_release(d_targets);
    free(logits);
    free(losses);
    free(targets);
}

// log likelihoods of fp32 logits, with ties at the top
static void crossentropy_score_case(int64_t N, int V, float range) {
    float *logits = host_random(N * V, 1, range), *ll = NEW(float, N);
    unsigned char *greedy = NEW(unsigned char, N);
    int *targets = NEW(int, N);
    for (int64_t n = 0; n < N; n++) {
        float *z = logits + n * V;
        z[n * 7 % V] = z[n * 13 % V] = n % 3 == 0 ? 2.0f * range : z[0];
        targets[n] = n % 2 == 0 ? (int)(n * 7 % V) : (int)(n * 13 % V);
    }
    crossentropy_score(ll, greedy, logits, targets, N, V);
    float *d_logits = device_f(logits, N * V), *d_ll = device_new<float>(N);
    unsigned char *d_greedy = device_new<unsigned char>(N);
    int *d_targets = device_i(targets, N);
    crossentropy_score(d_ll, d_greedy, d_logits, d_targets, N, V, 0);
    check_device("log likelihoods", d_ll, ll, N, 1e-6);
    unsigned char *got = fetch_raw(d_greedy, N);
    CHECK(memcmp(got, greedy, (size_t)N) == 0);
    device_release(d_logits);
    device_release(d_ll);
    device_release(d_greedy);
    device_release(d_targets);
    free(got);
    free(logits);
    free(ll);
    free(greedy);
    free(targets);
}

static void crossentropy_cuda_not_finite(void) {
    float logits[24] = {1.0f, 2.0f};
    logits[13] = NAN;
    logits[22] = INFINITY;
    const int targets[3] = {0, 0, 0};
    floatX *d_logits = device_x(logits, 24);
    float *d_losses = device_new<float>(3);
    int *d_targets = device_i(targets, 3);
    crossentropy_forward_backward(d_losses, d_logits, d_targets, 3, 8, 1.0f, 0);
    float *losses = fetch(d_losses, 3);
    CHECK(isfinite(losses[0]) && !isfinite(losses[1]) && !isfinite(losses[2]));
    device_release(d_logits);
    device_release(d_losses);
    device_release(d_targets);
    free(losses);
}

static void sum_losses_case(int64_t N) {
    float *losses = host_random(N, 1, 5.0f);
    double sum = 0.5, want = 0.5;
    for (int64_t n = 0; n < N; n++) {
        want += 0.25 * losses[n];
    }
    float *d_losses = device_f(losses, N);
    double *d_sum = device_copy(&sum, 1);
    sum_losses(d_sum, d_losses, N, 0.25, 0);
    double *got = fetch_raw(d_sum, 1);
    CHECK(fabs(*got - want) <= 1e-12 * (double)N);
    device_release(d_losses);
    device_release(d_sum);
    free(losses);
    free(got);
}

static void test_cuda_crossentropy(void) {
    const int vocabularies[] = {1, 8, 66, 67, 2048};
    for (int V : vocabularies) {
        crossentropy_cuda_case(1, V, 3.0f, 1.0f);
        crossentropy_cuda_case(17, V, 3.0f, 1.0f / 17);
        crossentropy_cuda_case(17, V, 60.0f, 1.0f); // probabilities of 0 and 1
        crossentropy_cuda_case(17, V, 3.0f, 0.0f);
    }
    crossentropy_cuda_case(300, 67, 3.0f, 0.01f);
    // kept in registers, whole packs and not, from the narrowest to the widest in bf16; beyond, read twice
    const int wide[] = {4104, 4105, 50257, 51200, 57335, 57336, 57337, 130001};
    for (int V : wide) {
        crossentropy_cuda_case(3, V, 3.0f, 0.01f);
    }
    crossentropy_cuda_case(2, 51200, 60.0f, 1.0f);
    crossentropy_cuda_case(2, 51200, 3.0f, 0.0f);
    crossentropy_cuda_not_finite();
    const int scored[] = {1, 2, 67, 511, 2048, 50257};
    for (int V : scored) {
        crossentropy_score_case(V > 2048 ? 4 : 60, V, 3.0f);
        crossentropy_score_case(V > 2048 ? 4 : 60, V, 60.0f);
    }
    sum_losses_case(1);
    sum_losses_case(17);
    sum_losses_case(5000);
    if (!emulated()) {
        crossentropy_cuda_case(1024, 51200, 3.0f, 1e-3f);
    }
}

#endif
