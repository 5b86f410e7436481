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

// how a context is continued
typedef struct {
    double temperature; // as sample_token's
    int top_k;
    int64_t most;    // tokens
    uint64_t stream; // of the random numbers: token i draws number i
} Sampling;

// what a continuation says to each of its tokens; returns 0 to end it
typedef int (*TokenTaker)(void *taker, int token);

typedef struct {
    int64_t tokens; // computed, end-of-text included
    double seconds;
    int numbers; // 0: the model's logits were no numbers, which ended the text
} Continuation;

// Continues context[0 .. length), of window + 1 places, until end-of-text, s->most tokens or the taker's 0. A
// generated token has no batch in which experts could choose among tokens: ec then routes as topk
static inline Continuation continue_context(Run *run, int *context, int length, const Sampling *s,
                                            TokenTaker take, void *taker) {
    Model *m = run->model;
    const Options *o = &run->options;
    RouterMethod method = run->config.router.method;
    int window = (int)o->seq_len, V = run->config.vocab_size, allowed = run->tokenizer->vocab_size;
    int cached = 0, goes_on = 1;
    Continuation done = {0, seconds_now(), 1};
    float *logits = NEW(float, V);
    model_route(m, router_row(method)->for_one_token, run->config.router.active);
    while (done.tokens < s->most && goes_on && !stop_requested) {
        if (length > window) { // the context is full: go on from its second half
            cached = 0;
            length = window / 2 > 0 ? window / 2 : 1;
            memmove(context, context + window + 1 - length, (size_t)length * sizeof(int));
        }
        ranks_beat(&run->ranks, run->state.step, "sampling");
        // the sampler's own copy: it sorts
        memcpy(logits, model_next_logits(m, context, length, cached), (size_t)V * sizeof(float));
        cached = length;
        done.numbers = logits_are_numbers(logits, allowed);
        if (!done.numbers) {
            break;
        }
        double u = rng_uniform((uint64_t)o->seed, s->stream, (uint64_t)done.tokens++);
        int token = sample_token(logits, allowed, s->temperature, s->top_k, u);
        context[length++] = token;
        goes_on = token != run->tokenizer->eot && take(taker, token);
    }
    model_route(m, method, run->config.router.active);
    free(logits);
    done.seconds = seconds_now() - done.seconds;
    return done;
}

// The last tokens of a text that leave room for one more, behind end-of-text, as every document begins; returns
// how many. context: [seq_len + 1]
static inline int prompt_context(Run *run, const char *text, size_t size, int *context) {
    int window = (int)run->options.seq_len;
    int *ids = NULL;
    size_t n = 0, capacity = 0, most = (size_t)(window - 1);
    tokenizer_encode(run->tokenizer, text, size, &ids, &n, &capacity);
    size_t kept = n < most ? n : most;
    context[0] = run->tokenizer->eot;
    for (size_t i = 0; i < kept; i++) {
        context[1 + i] = ids[n - kept + i];
    }
    free(ids);
    return 1 + (int)kept;
}

static inline int print_token(void *tokenizer, int token) {
    size_t size;
    const char *piece = tokenizer_piece((const Tokenizer *)tokenizer, token, &size);
    fwrite(piece, 1, size, stdout);
    fflush(stdout);
    return 1;
}

// Prints the prompt and its index-th continuation
static inline Continuation generate(Run *run, const char *prompt, size_t size, int64_t index) {
    const Options *o = &run->options;
    uint64_t first = ((uint64_t)1 << 32) + (uint64_t)run->state.step; // apart from the tensors' streams
    Sampling sampling = {o->temperature, (int)o->top_k, o->sample_tokens, first + ((uint64_t)index << 48)};
    int *context = NEW(int, o->seq_len + 1);
    int length = prompt_context(run, prompt, size, context);
    fwrite(prompt, 1, size, stdout);
    Continuation done = continue_context(run, context, length, &sampling, print_token, run->tokenizer);
    printf("\n");
    free(context);
    return done;
}

static inline void refuse_broken_logits(const Continuation *done) {
    if (!done->numbers) {
        die("the model's logits are not finite: its weights are broken\n  ---> --load another checkpoint");
    }
}

// --sample: the prompt and its continuation are all that is printed
static inline void sample(Run *run) {
    Continuation done = generate(run, run->options.sample, strlen(run->options.sample), 0);
    refuse_broken_logits(&done);
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
    Continuation done = generate(run, prompt, strlen(prompt), 0);
    printf("---\n");
    fflush(stdout);
    if (!done.numbers) {
        warn("the sample ended early: the model's logits are not finite");
    }
}

#endif
