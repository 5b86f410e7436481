/*
Text from a model: a prompt, and then one token after the other, each drawn from the model's next logits
(sampler.h).

Keys and values of earlier positions are cached. When the context is full, its second half begins a new one.
A GPU computes some tokens ahead of those that are shown, so that printing does not hold it up.
Errors: logits that are no numbers end the text, and the program where the text is all that was asked for.
*/
#ifndef GENERATE_H
#define GENERATE_H

#include "llmc/files/tokenizer.h"
#include "llmc/run/run.h"
#include "llmc/run/sampler.h"
// defines: tokenizer_encode, tokenizer_piece; Run; Sampling

// takes the next token of a text; returns whether the text goes on
typedef int (*TokenSink)(void *to, int token);

typedef struct {
    int64_t tokens;
    double seconds; // since the first token: the prompt is not in it
    int numbers;    // 0: the model's logits were no numbers, which ended the text
} Continuation;

// where a text was asked for, and nothing else
static inline void refuse_broken_text(const Continuation *done) {
    if (!done->numbers) {
        die("the model's logits are not finite: its weights are broken\n  ---> --load another checkpoint");
    }
}

// The options' way to draw; stream: which random numbers
static inline Sampling sampling_of(const Options *o, int allowed, uint64_t stream) {
    Sampling s = {o->temperature, (int)o->top_k, allowed, (uint64_t)o->seed, stream};
    return s;
}

// Continues ids [n], n > 0, of which the window's last count, by up to `most` tokens, until `sink` says no. A
// generated token has no batch in which experts could choose among tokens: ec then routes as topk
static inline Continuation continue_ids(Run *run, const int *ids, int n, const Sampling *s, int64_t most,
                                        TokenSink sink, void *to) {
    Model *m = run->model;
    const Router *router = &run->config.router;
    int window = (int)run->options.seq_len, length = n < window ? n : window;
    int *context = NEW(int, window + 1);
    Continuation done = {0, 0.0, 1};
    double begin = 0.0;
    memcpy(context, ids + n - length, (size_t)length * sizeof(int));
    model_route(m, method_alone(run), router->active);
    for (int goes_on = 1, reads = 1; goes_on && done.tokens < most && !stop_requested;) {
        if (length > window) { // the context is full: go on from its second half
            length = window / 2 > 0 ? window / 2 : 1;
            memmove(context, context + window + 1 - length, (size_t)length * sizeof(int));
            reads = 1;
        }
        if (reads) {
            model_read(m, context, length, s, done.tokens, most - done.tokens);
            reads = 0;
        }
        ranks_beat(&run->ranks, run->state.step, "sampling");
        int token = model_next_token(m);
        done.numbers = token >= 0;
        if (!done.numbers) {
            break;
        }
        context[length++] = token;
        begin = done.tokens == 0 ? seconds_now() : begin;
        done.tokens++;
        goes_on = sink(to, token);
    }
    done.seconds = done.tokens > 0 ? seconds_now() - begin : 0.0;
    model_route(m, router->method, router->active);
    free(context);
    return done;
}

// as documents do, a text ends with the token that begins the next one
static inline int print_token(void *to, int token) {
    const Tokenizer *tokenizer = (const Tokenizer *)to;
    size_t size;
    if (token == tokenizer->eot) {
        return 0;
    }
    const char *piece = tokenizer_piece(tokenizer, token, &size);
    fwrite(piece, 1, size, stdout);
    fflush(stdout);
    return 1;
}

// Prints the prompt and what follows; index: of the texts that follow on it
static inline Continuation generate(Run *run, const char *prompt, size_t size, int64_t index) {
    const Options *o = &run->options;
    Tokenizer *tokenizer = run->tokenizer;
    uint64_t stream = ((uint64_t)1 << 32) + (uint64_t)run->state.step; // apart from the tensors' streams
    Sampling s = sampling_of(o, tokenizer->vocab_size, stream + ((uint64_t)index << 40));
    int *ids = NULL;
    size_t n = 0, capacity = 0, most = (size_t)o->seq_len - 1;
    tokenizer_encode(tokenizer, prompt, size, &ids, &n, &capacity);
    size_t kept = n < most ? n : most;
    int *context = NEW(int, kept + 1);
    context[0] = tokenizer->eot; // as every document begins
    for (size_t i = 0; i < kept; i++) {
        context[1 + i] = ids[n - kept + i];
    }
    fwrite(prompt, 1, size, stdout);
    Continuation done =
        continue_ids(run, context, (int)kept + 1, &s, o->sample_tokens, print_token, tokenizer);
    printf("\n");
    free(context);
    free(ids);
    return done;
}

static inline void show_sample(Run *run, const char *prompt) {
    if (run->tokenizer == NULL || run->options.sample_tokens == 0) {
        return;
    }
    warn_of_method_alone(run, "a sample");
    printf("--- sample after step %lld\n", (long long)run->state.step);
    Continuation done = generate(run, prompt, strlen(prompt), 0);
    if (done.tokens > 1) {
        printf("--- %lld tokens, %.0f tok/s\n", (long long)done.tokens,
               (double)(done.tokens - 1) / done.seconds);
    } else {
        printf("---\n");
    }
    fflush(stdout);
    if (!done.numbers) {
        warn("the sample ended early: the model's logits are not finite");
    }
}

#endif
