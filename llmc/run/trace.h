/*
A text as a model sees it, token by token: which experts of each layer take it, with which gates, and how
surprising it was (--trace FILE). From this file alone a page of coloured tokens can be made, without a
tokenizer.

The text is --text's file, behind the token that begins every document; or the first tokens of each validation
domain. It goes through the model in windows of T tokens, each without what came before it, as in validation:

    ids[i]          the tokens; of source s those from starts[s] on, up to the next source's
    loss[i]         -ln p(ids[i] | the window's tokens before it), NaN for a source's first token
    gates[l, i, e]  R(x_i)_e of layer l (Eq. 1), 0 where expert e is not active
    bytes           the tokens' text: of token i from offsets[i] up to offsets[i + 1]

A safetensors file: I64 offsets [N + 1] and starts [sources], I32 ids [N], F32 loss [N] and gates [L, N, E],
U8 bytes; its header says what it was made from (origin.h). A token's bytes may be a part of a UTF-8
character.

Letters: N tokens, of all sources; T of a window; L layers; E = E_tot experts. Errors: no tokenizer, an empty
text, no validation data; before anything is computed.
*/
#ifndef TRACE_H
#define TRACE_H

#include "llmc/files/domains.h"
#include "llmc/files/tokenizer.h"
#include "llmc/run/origin.h"
#include "llmc/run/run.h"
// defines: DataDomain; Tokenizer; note_origin, note_*; Run, model_loss, model_gates, model_token_losses

struct Trace {
    int count;          // of sources
    const char **names; // of each: a domain's name, or the text's file
    int64_t *starts;    // [count + 1], the last: N
    int *ids;           // [N]
};

// ----------------------------------------------------------------------------
// the tokens

// room for a source of n tokens, which is to be filled
static inline int *trace_add(Trace *trace, const char *name, int64_t n) {
    int s = trace->count++;
    int64_t start = s == 0 ? 0 : trace->starts[s];
    trace->names = GROW(const char *, trace->names, trace->count);
    trace->starts = GROW(int64_t, trace->starts, trace->count + 1);
    trace->ids = GROW(int, trace->ids, start + n);
    trace->names[s] = name;
    trace->starts[s] = start;
    trace->starts[s + 1] = start + n;
    return trace->ids + start;
}

static inline const char *file_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

static inline void trace_text(Trace *trace, const Run *run) {
    const Options *o = &run->options;
    int *ids = NULL;
    size_t size, n = 0, capacity = 0;
    char *text = check_read_file(o->text, &size, "name a text with --text");
    if (size == 0) {
        die("%s is empty: there is nothing to trace\n  ---> name a text with --text", o->text);
    }
    tokenizer_encode(run->tokenizer, text, size, &ids, &n, &capacity);
    int64_t whole = (int64_t)n + 1, taken = whole < o->trace_tokens ? whole : o->trace_tokens;
    if (taken < whole) {
        warn("%s has %lld tokens, of which the first %lld are traced\n  ---> --trace-tokens %lld", o->text,
             (long long)whole, (long long)taken, (long long)whole);
    }
    int *to = trace_add(trace, file_name(o->text), taken);
    to[0] = run->tokenizer->eot; // as every document begins
    memcpy(to + 1, ids, (size_t)(taken - 1) * sizeof(int));
    free(ids);
    free(text);
}

// the first tokens of a domain: inputs of its windows, one behind the other
static inline void trace_domain(Trace *trace, const Run *run, const DataDomain *domain, int64_t most) {
    int64_t T = run->options.seq_len, have = dataloader_num_sequences(&domain->loader) * T;
    int64_t taken = have < most ? have : most;
    int *to = trace_add(trace, domain->name, taken), *window = NEW(int, 2 * T);
    for (int64_t at = 0; at < taken; at += T) {
        dataloader_sequence(&domain->loader, at / T, run->config.vocab_size, window, window + T);
        memcpy(to + at, window, (size_t)(taken - at < T ? taken - at : T) * sizeof(int));
    }
    free(window);
}

// what is to be traced; nothing of it is computed yet
static inline Trace *trace_open(const Run *run) {
    const Options *o = &run->options;
    Trace *trace = NEW(Trace, 1);
    if (o->text[0] != '\0') {
        trace_text(trace, run);
        return trace;
    }
    if (run->num_domains == 0) {
        die("--trace has no text: there is no validation data\n  ---> --text FILE, or --val-data SHARDS");
    }
    int64_t share = o->trace_tokens / run->num_domains;
    for (int i = 0; i < run->num_domains; i++) {
        trace_domain(trace, run, &run->domains[i], share > 2 ? share : 2);
    }
    return trace;
}

static inline void trace_close(Trace *trace) {
    if (trace != NULL) {
        free(trace->names);
        free(trace->starts);
        free(trace->ids);
        free(trace);
    }
}

// ----------------------------------------------------------------------------
// what the model says of them

typedef struct {
    float *loss;   // [N]
    float *gates;  // [L, N, E]
    float **layer; // [L] where the gates of the window's first token are
    int *targets;  // [T]
    float *window; // [T] losses
} Traced;

// tokens at .. at + n - 1 of a source that ends before `end`
static inline void trace_window(Run *run, const Trace *trace, Traced *out, int64_t at, int64_t n,
                                int64_t end) {
    int64_t N = trace->starts[trace->count], E = run->config.router.experts;
    for (int64_t i = 0; i < n; i++) { // the last token predicts nothing that we know
        out->targets[i] = at + i + 1 < end ? trace->ids[at + i + 1] : 0;
    }
    for (int l = 0; l < run->config.layers; l++) {
        out->layer[l] = out->gates + (l * N + at) * E;
    }
    ranks_beat(&run->ranks, run->state.step, "trace");
    model_loss(run->model, trace->ids + at, out->targets, 1, (int)n);
    model_gates(run->model, n, out->layer);
    model_token_losses(run->model, n, out->window);
    for (int64_t i = 0; i < n && at + i + 1 < end; i++) {
        out->loss[at + i + 1] = out->window[i];
    }
}

static inline void trace_compute(Run *run, const Trace *trace, Traced *out) {
    int64_t T = run->options.seq_len;
    model_route(run->model, run->config.router.method, run->config.router.active);
    for (int s = 0; s < trace->count; s++) {
        int64_t start = trace->starts[s], end = trace->starts[s + 1];
        out->loss[start] = NAN;
        for (int64_t at = start; at < end; at += T) {
            trace_window(run, trace, out, at, end - at < T ? end - at : T, end);
        }
    }
}

// ----------------------------------------------------------------------------
// the file

// the text of a token; of an id that the model has and its tokenizer has not, none
static inline const char *trace_piece(const Run *run, int id, size_t *size) {
    *size = 0;
    return id < run->tokenizer->vocab_size ? tokenizer_piece(run->tokenizer, id, size) : "";
}

// offsets [N + 1]
static inline char *trace_bytes(const Run *run, const Trace *trace, int64_t *offsets) {
    int64_t N = trace->starts[trace->count];
    size_t size;
    for (int64_t i = 0; i < N; i++) {
        trace_piece(run, trace->ids[i], &size);
        offsets[i + 1] = offsets[i] + (int64_t)size;
    }
    char *bytes = NEW(char, offsets[N] + 1);
    for (int64_t i = 0; i < N; i++) {
        const char *piece = trace_piece(run, trace->ids[i], &size);
        memcpy(bytes + offsets[i], piece, size);
    }
    return bytes;
}

static inline void trace_put(SafetensorsWriter *w, const Run *run, const Trace *trace, const Traced *traced,
                             const int64_t *offsets, const char *bytes) {
    uint64_t N = (uint64_t)trace->starts[trace->count];
    uint64_t cells = (uint64_t)run->config.layers * N * (uint64_t)run->config.router.experts;
    safetensors_write_at(w, 0, 0, offsets, N + 1);
    safetensors_write_at(w, 1, 0, trace->starts, (uint64_t)trace->count);
    safetensors_write_at(w, 2, 0, trace->ids, N);
    safetensors_write_at(w, 3, 0, traced->loss, N);
    safetensors_write_at(w, 4, 0, traced->gates, cells);
    safetensors_write_at(w, 5, 0, bytes, (uint64_t)offsets[N]);
}

// all ranks call it
static inline void trace_write(Run *run, const Trace *trace, const Traced *traced) {
    int64_t N = trace->starts[trace->count], ends = N + 1, sources = trace->count;
    int64_t gates[] = {run->config.layers, N, run->config.router.experts};
    int64_t *offsets = NEW(int64_t, ends);
    char *bytes = trace_bytes(run, trace, offsets);
    SafetensorsWriter w;
    safetensors_writer_open(&w, run->options.trace);
    note_origin(&w, run, "trace");
    note_names(&w, "sources", trace->names, trace->count);
    if (run->config.router.method == ROUTER_EC) { // which chooses among the tokens of a window
        note_integer(&w, "batch", 1);
    }
    safetensors_declare(&w, "offsets", "I64", 1, &ends);
    safetensors_declare(&w, "starts", "I64", 1, &sources);
    safetensors_declare(&w, "ids", "I32", 1, &N);
    safetensors_declare(&w, "loss", "F32", 1, &N);
    safetensors_declare(&w, "gates", "F32", 3, gates);
    safetensors_declare(&w, "bytes", "U8", 1, &offsets[N]);
    safetensors_begin(&w, &run->ranks);
    if (run->ranks.rank == 0) {
        trace_put(&w, run, trace, traced, offsets, bytes);
    }
    safetensors_finish(&w, &run->ranks);
    free(offsets);
    free(bytes);
}

// computed and written by rank 0; all ranks call it
static inline void trace(Run *run) {
    const Trace *t = run->trace;
    int64_t N = t->starts[t->count], L = run->config.layers, T = run->options.seq_len;
    Traced traced = {NEW(float, N), NEW(float, L *N * run->config.router.experts), NEW(float *, L),
                     NEW(int, T), NEW(float, T)};
    if (run->ranks.rank == 0) {
        trace_compute(run, t, &traced);
    }
    trace_write(run, t, &traced);
    printf("trace of %lld tokens -> %s\n", (long long)N, run->options.trace);
    free(traced.loss);
    free(traced.gates);
    free(traced.layer);
    free(traced.targets);
    free(traced.window);
}

#endif
