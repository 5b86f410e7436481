/*
Text from a model: a prompt, and then one token after the other, each drawn from the model's next logits
(sampler.h).

Keys and values of earlier positions are cached. When the context is full, its second half begins a new one.
Errors: logits that are no numbers end the text.
*/
#ifndef GENERATE_H
#define GENERATE_H

#include "llmc/files/tokenizer.h"
#include "llmc/rng.h"
#include "llmc/run/run.h"
#include "llmc/run/sampler.h"

static inline int logits_are_numbers(const float *logits, int allowed) {
    int good = 1;
    for (int v = 0; v < allowed; v++) {
        good &= isfinite(logits[v]) != 0;
    }
    return good;
}

// Prints the prompt and what follows; returns 0 if the model's logits were no numbers. A generated token has
// no batch in which experts could choose among tokens: ec then routes as topk
static inline int generate(Run *run, const char *prompt) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    RouterMethod method = c->router.method;
    uint64_t stream = ((uint64_t)1 << 32) + (uint64_t)run->state.step; // apart from the tensors' streams
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    tokenizer_encode(run->tokenizer, prompt, strlen(prompt), &ids, &n, &capacity);
    int window = (int)o->seq_len;
    int *context = NEW(int, window + 1);
    float *logits = NEW(float, c->vocab_size);
    int length = 1, cached = 0, numbers = 1;
    context[0] = run->tokenizer->eot; // as every document begins
    for (size_t i = n > (size_t)(window - 1) ? n - (size_t)(window - 1) : 0; i < n; i++) {
        context[length++] = ids[i];
    }
    int allowed = run->tokenizer->vocab_size;
    model_route(m, router_row(method)->for_one_token, c->router.active);
    printf("%s", prompt);
    for (int64_t i = 0; i < o->sample_tokens && !stop_requested; i++) {
        if (length > window) { // the context is full: go on from its second half
            cached = 0;
            length = window / 2 > 0 ? window / 2 : 1;
            memmove(context, context + window + 1 - length, (size_t)length * sizeof(int));
        }
        ranks_beat(&run->ranks, run->state.step, "sampling");
        // the sampler's own copy: it sorts
        memcpy(logits, model_next_logits(m, context, length, cached), (size_t)c->vocab_size * sizeof(float));
        cached = length;
        numbers = logits_are_numbers(logits, allowed);
        if (!numbers) {
            break;
        }
        double u = rng_uniform((uint64_t)o->seed, stream, (uint64_t)i);
        int token = sample_token(logits, allowed, o->temperature, (int)o->top_k, u);
        if (token == run->tokenizer->eot) {
            break;
        }
        context[length++] = token;
        size_t size;
        const char *piece = tokenizer_piece(run->tokenizer, token, &size);
        fwrite(piece, 1, size, stdout);
        fflush(stdout);
    }
    printf("\n");
    model_route(m, method, c->router.active);
    free(context);
    free(logits);
    free(ids);
    return numbers;
}

// --sample: the prompt and its continuation are all that is printed
static inline void sample(Run *run) {
    if (!generate(run, run->options.sample)) {
        die("the model's logits are not finite: its weights are broken\n  ---> --load another checkpoint");
    }
}

static inline void show_sample(Run *run, const char *prompt) {
    if (run->tokenizer == NULL || run->options.sample_tokens == 0) {
        return;
    }
    RouterMethod method = run->config.router.method, alone = router_row(method)->for_one_token;
    if (alone != method) {
        warn("%s cannot route a token without its batch: sampling routes as %s", router_name(method),
             router_name(alone));
    }
    printf("--- sample after step %lld\n", (long long)run->state.step);
    int numbers = generate(run, prompt);
    printf("---\n");
    fflush(stdout);
    if (!numbers) {
        warn("the sample ended early: the model's logits are not finite");
    }
}

#endif
