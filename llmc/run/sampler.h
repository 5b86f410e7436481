/*
Sampling the next token from one row of logits.

    p = softmax(z / temperature) over the `top_k` largest logits (0: over all), drawn with one uniform number;
    temperature 0: the largest logit.

Only the first `allowed` entries take part: the vocabulary rows that pad a model to a round size have no text.
The maximum is subtracted before exp, so that no logit overflows. logits [V] is overwritten.
*/
#ifndef SAMPLER_H
#define SAMPLER_H

#include "llmc/rng.h"

static inline int sample_argmax(const float *logits, int allowed) {
    int best = 0;
    for (int v = 1; v < allowed; v++) {
        if (logits[v] > logits[best]) {
            best = v;
        }
    }
    return best;
}

// the top_k-th largest value: everything below it is left out (ties with it stay in)
static inline float sample_threshold(const float *logits, int allowed, int top_k) {
    float threshold = INFINITY;
    int kept = 0;
    while (kept < top_k) {
        float next = -INFINITY;
        int equal = 0;
        for (int v = 0; v < allowed; v++) {
            if (logits[v] < threshold && logits[v] > next) {
                next = logits[v];
                equal = 0;
            }
            equal += logits[v] == next;
        }
        if (equal == 0) {
            break;
        }
        threshold = next;
        kept += equal;
    }
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

#endif
