/*
sampler.h: which tokens can come out, how often, and what no logit may do.
*/
#ifndef TEST_SAMPLER_H
#define TEST_SAMPLER_H

#include "llmc/run/sampler.h"
#include "harness.h"

enum { SAMPLER_V = 6, SAMPLER_DRAWS = 20000 };

// frequency of each token over evenly spread u
static void sampler_frequencies(double *frequency, const float *logits, int allowed, double temperature,
                                int top_k) {
    int outside = 0;
    memset(frequency, 0, SAMPLER_V * sizeof(double));
    for (int i = 0; i < SAMPLER_DRAWS; i++) {
        float copy[SAMPLER_V];
        memcpy(copy, logits, sizeof(copy));
        int token = sample_token(copy, allowed, temperature, top_k, (i + 0.5) / SAMPLER_DRAWS);
        if (token >= 0 && token < allowed) {
            frequency[token] += 1.0 / SAMPLER_DRAWS;
        } else {
            outside++;
        }
    }
    CHECK(outside == 0);
}

// kept: which tokens share the probability
static void sampler_check(const float *logits, int allowed, double temperature, int top_k, const int *kept) {
    double frequency[SAMPLER_V], want[SAMPLER_V] = {0}, sum = 0.0, worst = 0.0;
    for (int v = 0; v < allowed; v++) {
        want[v] = kept[v] ? exp(logits[v] / temperature) : 0.0;
        sum += want[v];
    }
    sampler_frequencies(frequency, logits, allowed, temperature, top_k);
    for (int v = 0; v < SAMPLER_V; v++) {
        worst = fmax(worst, fabs(frequency[v] - want[v] / sum));
    }
    if (!CHECK(worst <= 1.001 / SAMPLER_DRAWS)) {
        printf("    temperature %g, top_k %d, off by %g\n", temperature, top_k, worst);
    }
}

static void test_sampler_frequencies(void) {
    const float logits[SAMPLER_V] = {0.5f, 2.0f, -1.0f, 2.0f, 0.4f, 9.0f}; // 5 is padding: never allowed
    const int all[SAMPLER_V] = {1, 1, 1, 1, 1, 0}, three[SAMPLER_V] = {1, 1, 0, 1, 0, 0};
    const int two[SAMPLER_V] = {0, 1, 0, 1, 0, 0}, four[SAMPLER_V] = {1, 1, 0, 1, 1, 0};
    sampler_check(logits, 5, 1.0, 0, all);
    sampler_check(logits, 5, 0.5, 0, all);
    sampler_check(logits, 5, 3.0, 5, all);
    sampler_check(logits, 5, 3.0, 100, all);
    sampler_check(logits, 5, 1.0, 4, four);
    sampler_check(logits, 5, 1.0, 3, three);
    sampler_check(logits, 5, 1.0, 2, two);
    sampler_check(logits, 5, 1.0, 1, two); // the second ties with the first: it stays in
}

static void test_sampler_greedy(void) {
    float logits[SAMPLER_V] = {0.5f, 2.0f, -1.0f, 2.0f, 0.4f, 9.0f}, kept[SAMPLER_V];
    memcpy(kept, logits, sizeof(kept));
    CHECK(sample_token(logits, 5, 0.0, 0, 0.999) == 1); // the lower of equals, whatever u
    CHECK(memcmp(logits, kept, sizeof(kept)) == 0);
    CHECK(sample_token(logits, 6, 0.0, 3, 0.5) == 5 && sample_token(kept, 1, 1.0, 0, 0.5) == 0);
}

// logits that exp or the division could not take, a cold temperature, u at its ends
static void test_sampler_extremes(void) {
    const float huge[SAMPLER_V] = {3e38f, -3e38f, 3e38f, 0.0f, -INFINITY, 1.0f};
    double frequency[SAMPLER_V];
    sampler_frequencies(frequency, huge, SAMPLER_V, 1.0, 0);
    CHECK(fabs(frequency[0] - 0.5) < 1e-4 && fabs(frequency[2] - 0.5) < 1e-4);
    sampler_frequencies(frequency, huge, SAMPLER_V, 1.0, 4);
    CHECK(fabs(frequency[0] - 0.5) < 1e-4 && fabs(frequency[2] - 0.5) < 1e-4);
    const float near[SAMPLER_V] = {1.0f, 1.0001f, 0.9f, 0.0f, 0.0f, 0.0f};
    sampler_frequencies(frequency, near, SAMPLER_V, 1e-300, 0);
    CHECK(frequency[1] > 0.9999);
    float last[SAMPLER_V] = {0.0f, 0.0f, -2000.0f, 0.0f, -2000.0f, -3000.0f};
    int token = sample_token(last, SAMPLER_V, 1.0, 0, 1.0);
    CHECK(token == 3); // rounding at its worst: still a token that can be
    for (int i = 0; i < 2; i++) {
        float flat[SAMPLER_V] = {0}, broken[SAMPLER_V] = {NAN, NAN, NAN, NAN, NAN, NAN};
        double u = i == 0 ? 1e-17 : 1.0 - 1e-16;
        CHECK(sample_token(flat, SAMPLER_V, 1.0, 0, u) == (i == 0 ? 0 : SAMPLER_V - 1));
        token = sample_token(broken, SAMPLER_V, 1.0, 2, u);
        CHECK(token >= 0 && token < SAMPLER_V);
    }
}

static int sampler_descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// the k-th largest of many, with and without ties, is where sorting has it
static void test_sampler_threshold(void) {
    enum { V = 1000 };
    float logits[V], sorted[V];
    for (int ties = 0; ties < 2; ties++) {
        int wrong = 0;
        fill_uniform(logits, V, 3, 1.0f);
        for (int v = 0; v < V && ties; v++) {
            logits[v] = floorf(logits[v] * 4.0f);
        }
        memcpy(sorted, logits, sizeof(sorted));
        qsort(sorted, V, sizeof(float), sampler_descending);
        for (int k = 1; k <= V; k++) {
            wrong += sample_threshold(logits, V, k) != sorted[k - 1];
        }
        CHECK(wrong == 0);
    }
}

static void test_sampler(void) {
    test_sampler_threshold();
    test_sampler_frequencies();
    test_sampler_greedy();
    test_sampler_extremes();
}

#endif
