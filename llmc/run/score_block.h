/*
Requests to score, laid out as sequences of tokens: the rules of the lm-evaluation-harness (EleutherAI), with
which scores are compared.

    {"id"?, "context", "continuations": [...]}                   strings, taken as they are
    {"id"?, "query", "choices": [...], "gold"?, "delimiter"?}    context query, continuation delimiter + choice
    {"id"?, "text"}                                              all of a text

A continuation. White space at the context's end belongs to the continuation (there GPT-2's words begin):

    context' = context without it;   a = encode(context');   w = encode(context + continuation)
    tokens = a + w[|a| ..]       (|a| alone divides w: where a word spans the border, w does not begin with a)
    inputs = the last T + 1 tokens but the very last;   targets = w[|a| ..]

An empty context is end-of-text. There is no other token before a context. "<|endoftext|>" in a string is the
token, as Hugging Face's tokenizers read it.

A text is cut into windows of T inputs. The first begins with end-of-text, each later one with the last target
of the one before; each token is a target once. The last window is filled up to T inputs with tokens before.

    inputs     E t0 t1 t2 | t3 t4 t5 t6 | t5 t6 t7 t8        T = 4, 10 tokens
    targets    t0 t1 t2 t3 | t4 t5 t6 t7 |       t8 t9

Sequences. Where the inputs of one continuation are the beginning of another's (choices of one token each have
the same inputs), both are read off one sequence: spans.

A result is one line, compact:
    {"id":..,"ll":[..],"tokens":[..],"greedy":[..],"chars":[..],"gold":n}
ll to 9 digits, which is all of an fp32 number; chars (code points of the choices, for acc_norm) where there
are choices.
*/
#ifndef SCORE_BLOCK_H
#define SCORE_BLOCK_H

#include "llmc/files/tokenizer.h"
#include "llmc/run/requests.h"
#include <math.h>
// defines: Tokenizer, tokenizer_encode_special; Requests, request_*; isfinite

#define LIST(type)                                                                                           \
    struct {                                                                                                 \
        type *items;                                                                                         \
        int count, capacity;                                                                                 \
    }

// room for one more, which is not zeroed; its address
#define LIST_ADD(type, list)                                                                                 \
    ((list).count < (list).capacity ? (void)0                                                                \
                                    : (void)((list).capacity = 2 * (list).capacity + 64,                     \
                                             (list).items = GROW(type, (list).items, (list).capacity)),      \
     &(list).items[(list).count++])

typedef struct {
    char *id;         // as it is written, or NULL
    int first, count; // continuations
    int has_choices;
    int64_t gold; // -1: none
    int longest;  // inputs of its longest sequence
} ScoreRequest;

typedef struct {
    int64_t tokens, chars;
    float ll;
    int greedy;
} Continued; // a continuation, or a whole text

typedef struct {
    size_t inputs; // where they begin among the block's ids
    int length;
    int context; // the first so many of them
    int request;
    int first, count; // spans
} ScoreSequence;

// targets in a row that one sequence predicts
typedef struct {
    int continuation;
    int row, count; // positions row .. row + count - 1 predict them
    size_t targets; // where they begin among the ids
    double ll;
    int greedy;
} ScoreSpan;

typedef struct {
    LIST(ScoreRequest) requests;
    LIST(Continued) continuations;
    LIST(ScoreSequence) sequences;
    LIST(ScoreSpan) spans;
    int *ids;
    size_t num_ids, capacity;
    int64_t inputs; // tokens of all sequences: the work
} ScoreBlock;

typedef struct {
    Tokenizer *tokenizer;
    int T;
    const char *delimiter; // between query and choice, where a request names none
} ScoreRules;

static inline void block_clear(ScoreBlock *b) {
    for (int i = 0; i < b->requests.count; i++) {
        free(b->requests.items[i].id);
    }
    b->requests.count = b->continuations.count = b->sequences.count = b->spans.count = 0;
    b->num_ids = 0;
    b->inputs = 0;
}

static inline void block_free(ScoreBlock *b) {
    block_clear(b);
    free(b->requests.items);
    free(b->continuations.items);
    free(b->sequences.items);
    free(b->spans.items);
    free(b->ids);
}

// ----------------------------------------------------------------------------
// text

// what Python's str.rstrip() takes away
static inline int is_python_space(unsigned c) {
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

// bytes of the text without the white space at its end; UTF-8
static inline size_t size_without_space(const char *text, size_t size) {
    const unsigned char *p = (const unsigned char *)text;
    while (size > 0) {
        size_t first = size - 1;
        for (; first > 0 && (p[first] & 0xC0) == 0x80; first--) {
        }
        unsigned code = p[first];
        if (size - first == 2) {
            code = (p[first] & 0x1Fu) << 6 | (p[first + 1] & 0x3Fu);
        } else if (size - first == 3) {
            code = (p[first] & 0x0Fu) << 12 | (p[first + 1] & 0x3Fu) << 6 | (p[first + 2] & 0x3Fu);
        }
        if (size - first > 3 || !is_python_space(code)) {
            break;
        }
        size = first;
    }
    return size;
}

static inline int64_t count_characters(const char *text, size_t size) {
    int64_t n = 0;
    for (size_t i = 0; i < size; i++) {
        n += (text[i] & 0xC0) != 0x80;
    }
    return n;
}

static inline void block_encode(ScoreBlock *b, const ScoreRules *rules, const char *text, size_t size) {
    tokenizer_encode_special(rules->tokenizer, text, size, &b->ids, &b->num_ids, &b->capacity);
}

static inline void block_add_id(ScoreBlock *b, int id) {
    tokenizer_reserve(&b->ids, b->num_ids, &b->capacity, 1);
    b->ids[b->num_ids++] = id;
}

// ----------------------------------------------------------------------------
// sequences

static inline Continued *block_continue(ScoreBlock *b, int64_t tokens, int64_t chars) {
    Continued *c = LIST_ADD(Continued, b->continuations);
    Continued empty = {tokens, chars, 0.0f, 1};
    *c = empty;
    b->requests.items[b->requests.count - 1].count++;
    return c;
}

// does one of the last sequence, of the same request, and these inputs begin with the other? Then they become
// one, with the longer's
static inline int block_join(ScoreBlock *b, size_t inputs, int length, int context) {
    ScoreSequence *last = b->sequences.count > 0 ? &b->sequences.items[b->sequences.count - 1] : NULL;
    if (last == NULL || last->request != b->requests.count - 1 || last->context != context) {
        return 0;
    }
    int common = length < last->length ? length : last->length;
    if (memcmp(b->ids + inputs, b->ids + last->inputs, (size_t)common * sizeof(int)) != 0) {
        return 0;
    }
    if (length > last->length) {
        b->inputs += length - last->length;
        last->inputs = inputs;
        last->length = length;
    }
    return 1;
}

// the last continuation's next `count` targets, which follow on the first so many inputs: from `inputs` on
// `length` of them, whose last one predicts the last target
static inline void block_span(ScoreBlock *b, size_t inputs, int length, size_t targets, int count) {
    int context = length - count + 1;
    if (!block_join(b, inputs, length, context)) {
        ScoreSequence *s = LIST_ADD(ScoreSequence, b->sequences);
        ScoreSequence fresh = {inputs, length, context, b->requests.count - 1, b->spans.count, 0};
        *s = fresh;
        b->inputs += length;
    }
    ScoreSequence *s = &b->sequences.items[b->sequences.count - 1];
    ScoreRequest *request = &b->requests.items[b->requests.count - 1];
    ScoreSpan *span = LIST_ADD(ScoreSpan, b->spans);
    ScoreSpan fresh = {b->continuations.count - 1, context - 1, count, targets, 0.0, 0};
    *span = fresh;
    s->count++;
    request->longest = s->length > request->longest ? s->length : request->longest;
}

// whole: context and continuation; bare: bytes of the context without the white space at its end
static inline void block_add_continuation(ScoreBlock *b, const ScoreRules *rules, const Requests *r,
                                          const char *whole, size_t size, size_t bare, int64_t chars) {
    size_t first = b->num_ids;
    if (bare == 0) {
        block_add_id(b, rules->tokenizer->eot);
    } else {
        block_encode(b, rules, whole, bare);
    }
    size_t border = b->num_ids, taken = bare == 0 ? 0 : border - first;
    block_encode(b, rules, whole, size); // its first `taken` tokens give way to the context's own
    size_t all = b->num_ids - border, count = all > taken ? all - taken : 0;
    memmove(b->ids + border, b->ids + border + taken, count * sizeof(int));
    b->num_ids = border + count;
    ScoreRequest *request = &b->requests.items[b->requests.count - 1];
    if (count == 0) {
        request_fail(r, "continuation %d adds no token to its context", request->count);
    }
    if (count > (size_t)rules->T) {
        request_fail(r, "continuation %d has %zu tokens, more than --seq-len %d", request->count, count,
                     rules->T);
    }
    block_continue(b, (int64_t)count, chars);
    size_t length = b->num_ids - 1 - first, most = (size_t)rules->T;
    size_t cut = length > most ? length - most : 0;
    block_span(b, first + cut, (int)(length - cut), border, (int)count);
}

// the last continuation: `tokens` tokens behind end-of-text, which stands at `first`
static inline void block_add_windows(ScoreBlock *b, const ScoreRules *rules, size_t first, size_t tokens) {
    size_t T = (size_t)rules->T;
    for (size_t done = 0; done < tokens;) {
        size_t count = tokens - done < T ? tokens - done : T, end = done + count;
        size_t length = end < T ? end : T; // inputs: as many before the last target as there are, up to T
        block_span(b, first + end - length, (int)length, first + 1 + done, (int)count);
        done = end;
    }
}

static inline void block_add_text(ScoreBlock *b, const ScoreRules *rules, const char *text, size_t size) {
    size_t first = b->num_ids;
    block_add_id(b, rules->tokenizer->eot);
    block_encode(b, rules, text, size);
    size_t tokens = b->num_ids - first - 1;
    block_continue(b, (int64_t)tokens, -1);
    block_add_windows(b, rules, first, tokens);
}

// ----------------------------------------------------------------------------
// requests

// strings of `list`, each behind context and delimiter
static inline void block_add_list(ScoreBlock *b, const ScoreRules *rules, const Requests *r,
                                  const Json *context, const char *delimiter, size_t delimiter_size,
                                  const Json *list, int has_choices) {
    size_t before = context->text_size + delimiter_size;
    size_t bare = size_without_space(context->text, context->text_size);
    char *whole = NULL;
    for (const Json *text = list->child; text != NULL; text = text->next) {
        whole = GROW(char, whole, before + text->text_size + 1);
        memcpy(whole, context->text, context->text_size);
        memcpy(whole + context->text_size, delimiter, delimiter_size);
        memcpy(whole + before, text->text, text->text_size);
        block_add_continuation(b, rules, r, whole, before + text->text_size, bare,
                               has_choices ? count_characters(text->text, text->text_size) : -1);
    }
    free(whole);
}

static inline void block_add_choices(ScoreBlock *b, const ScoreRules *rules, const Requests *r,
                                     const Json *json) {
    const Json *choices = request_texts(r, json, "choices");
    const char *delimiter = rules->delimiter;
    size_t delimiter_size = strlen(delimiter);
    ScoreRequest *request = &b->requests.items[b->requests.count - 1];
    if (json_get(json, "delimiter") != NULL) {
        const Json *own = request_text(r, json, "delimiter");
        delimiter = own->text;
        delimiter_size = own->text_size;
    }
    request->has_choices = 1;
    request->gold = request_integer(r, json, "gold", 0, (int64_t)choices->count - 1, -1);
    block_add_list(b, rules, r, request_text(r, json, "query"), delimiter, delimiter_size, choices, 1);
}

// the line that r has read last
static inline void block_add(ScoreBlock *b, const ScoreRules *rules, const Requests *r, const Json *json) {
    int forms = 0;
    static const char *const keys[] = {"continuations", "choices", "text"};
    for (int i = 0; i < 3; i++) {
        forms += json_get(json, keys[i]) != NULL;
    }
    if (forms != 1) {
        request_fail(r, "a request has \"continuations\", \"choices\" or \"text\": one of them");
    }
    ScoreRequest fresh = {request_id(r, json), b->continuations.count, 0, 0, -1, 0};
    *LIST_ADD(ScoreRequest, b->requests) = fresh;
    if (json_get(json, "choices") != NULL) {
        block_add_choices(b, rules, r, json);
    } else if (json_get(json, "text") != NULL) {
        const Json *text = request_text(r, json, "text");
        block_add_text(b, rules, text->text, text->text_size);
    } else {
        const Json *list = request_texts(r, json, "continuations");
        block_add_list(b, rules, r, request_text(r, json, "context"), "", 0, list, 0);
    }
}

// ----------------------------------------------------------------------------
// results

static inline void block_write_list(FILE *out, const ScoreBlock *b, const ScoreRequest *request, char what) {
    const char *separator = "[";
    for (int i = 0; i < request->count; i++, separator = ",") {
        const Continued *c = &b->continuations.items[request->first + i];
        fputs(separator, out);
        switch (what) {
        case 'l': fprintf(out, "%.9g", (double)c->ll); break;
        case 't': fprintf(out, "%lld", (long long)c->tokens); break;
        case 'g': fputs(c->greedy ? "true" : "false", out); break;
        default: fprintf(out, "%lld", (long long)c->chars); break;
        }
    }
    fputs("]", out);
}

static inline void block_write(FILE *out, const ScoreBlock *b, const ScoreRequest *request) {
    fputs("{", out);
    if (request->id != NULL) {
        fprintf(out, "\"id\":%s,", request->id);
    }
    fputs("\"ll\":", out);
    block_write_list(out, b, request, 'l');
    fputs(",\"tokens\":", out);
    block_write_list(out, b, request, 't');
    fputs(",\"greedy\":", out);
    block_write_list(out, b, request, 'g');
    if (request->has_choices) {
        fputs(",\"chars\":", out);
        block_write_list(out, b, request, 'c');
    }
    if (request->gold >= 0) {
        fprintf(out, ",\"gold\":%lld", (long long)request->gold);
    }
    fputs("}\n", out);
}

// Takes ll and greedy of a request from a line that was written before; 0 where it is not the request's
static inline int block_read(ScoreBlock *b, const ScoreRequest *request, const char *line, size_t size,
                             JsonArena *arena) {
    char error[256];
    Composed again; // all else of the line is the request's: as if written anew
    json_arena_reset(arena);
    const Json *json = json_parse(line, size, arena, error, sizeof(error));
    const Json *ll = json_get(json, "ll"), *greedy = json_get(json, "greedy");
    if (ll == NULL || greedy == NULL || (int64_t)ll->count != request->count ||
        (int64_t)greedy->count != request->count) {
        return 0;
    }
    ll = ll->child;
    greedy = greedy->child;
    for (int i = 0; i < request->count; i++, ll = ll->next, greedy = greedy->next) {
        Continued *c = &b->continuations.items[request->first + i];
        double value = 0.0;
        if (!json_double(ll, &value)) {
            return 0;
        }
        c->ll = (float)value;
        c->greedy = greedy->boolean;
    }
    compose(&again);
    block_write(again.out, b, request);
    char *text = composed(&again);
    int same = again.size == size + 1 && memcmp(text, line, size) == 0;
    free(text);
    return same;
}

#endif
