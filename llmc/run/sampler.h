/*
Sampling the next token from one row of logits.

    p = softmax(z / temperature) over the `top_k` largest logits (0: over all), drawn with one uniform number;
    temperature 0: the largest logit.

Only the first `allowed` entries take part: the vocabulary rows that pad a model to a round size have no text.
The maximum is subtracted before exp, so that no logit overflows. logits [V] is overwritten. On a GPU the same
is done by gpu/sampler.cuh. Errors: logits that are no numbers give no token, -1.
*/
#ifndef SAMPLER_H
#define SAMPLER_H

#include "llmc/check.h"
#include "llmc/rng.h"

// how the tokens of a text are drawn; draw i takes uniform number i of (seed, stream)
typedef struct {
    double temperature;
    int top_k, allowed;
    uint64_t seed, stream;
} Sampling;

static inline int sample_argmax(const float *logits, int allowed) {
    int best = 0;
    for (int v = 1; v < allowed; v++) {
        if (logits[v] > logits[best]) {
            best = v;
        }
    }
    return best;
}

// the top_k-th largest value: everything below it is left out (ties with it stay in). Quickselect on a copy:
// the part that holds the wanted place is divided again, O(V) on average
static inline float sample_threshold(const float *logits, int allowed, int top_k) {
    float *x = NEW(float, allowed);
    memcpy(x, logits, (size_t)allowed * sizeof(float));
    int first = 0, last = allowed - 1, wanted = top_k - 1; // in descending order
    while (first < last) {
        float pivot = x[first + (last - first) / 2];
        int i = first, j = last;
        while (i <= j) { // larger ones to the left
            for (; x[i] > pivot; i++) {
            }
            for (; x[j] < pivot; j--) {
            }
            if (i <= j) {
                float swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        if (wanted <= j) {
            last = j;
        } else if (wanted >= i) {
            first = i;
        } else {
            break; // between the two parts: all equal the pivot
        }
    }
    float threshold = x[wanted];
    free(x);
    return threshold;
}

// u in (0, 1)
static inline int sample_token(float *logits, int allowed, double temperature, int top_k, double u) {
    if (temperature <= 0.0) {
        return sample_argmax(logits, allowed);
    }
    float max = logits[sample_argmax(logits, allowed)];
    float threshold = top_k > 0 && top_k < allowed ? sample_threshold(logits, allowed, top_k) : -INFINITY;
    double sum = 0.0;
    for (int v = 0; v < allowed; v++) {
        double p = logits[v] >= threshold ? exp(((double)logits[v] - max) / temperature) : 0.0;
        logits[v] = (float)p;
        sum += logits[v];
    }
    double target = u * sum;
    int last = 0;
    for (int v = 0; v < allowed; v++) {
        if (logits[v] > 0.0f) {
            last = v;
            target -= logits[v];
            if (target < 0.0) {
                return v;
            }
        }
    }
    return last; // rounding left a crumb of probability at the end
}

static inline int logits_are_numbers(const float *logits, int allowed) {
    int good = 1;
    for (int v = 0; v < allowed; v++) {
        good &= isfinite(logits[v]) != 0;
    }
    return good;
}

// a text's token of this draw, -1 if the logits are no numbers
static inline int sample_next(float *logits, const Sampling *s, int64_t draw) {
    double u = rng_uniform(s->seed, s->stream, (uint64_t)draw);
    return logits_are_numbers(logits, s->allowed)
               ? sample_token(logits, s->allowed, s->temperature, s->top_k, u)
               : -1;
}

#endif
