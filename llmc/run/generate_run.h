/*
--generate: contexts, a file of requests, continued into a file of results (requests.h).

    {"id"?, "context", "until"?: [strings] or a string, "max_tokens"?, "temperature"?, "top_k"?}
    {"id":..,"text":".."}

A text goes on until one of the `until` strings is in it, end-of-text, or max_tokens (--sample-tokens). Then
the harness's cut: for each of the strings in turn, what stands before its first occurrence. Where a request
does not say, temperature is 0 (always the likeliest token) and top_k 0 (all tokens). Of the context count its
last T - max_tokens tokens, at least one, so that nothing of it is lost on the way; an empty one is
end-of-text.

The random numbers of a request are those of its line, so that neither ranks nor an interruption change it.
Ranks take requests in turn; rank 0 writes. Before a file goes on, its newest results are generated again, and
most must begin as they did. Errors: as in requests.h.
*/
#ifndef GENERATE_RUN_H
#define GENERATE_RUN_H

#include "llmc/run/agree.h"
#include "llmc/run/generate.h"
#include "llmc/run/requests.h"
// defines: agree_on_requests; continue_ids, refuse_broken_text; Requests, Results, EXIT_INTERRUPTED

enum {
    GENERATE_ROUND = 4,        // requests of a rank between two writes, where there are several
    GENERATE_AGAIN = 4,        // results that are generated again before a file goes on
    GENERATE_AGAIN_BYTES = 16, // how far those must agree
    GENERATE_STREAM = 62       // random streams 2^62 + line: apart from all others
};
static_assert((int)GENERATE_AGAIN <= (int)RESULTS_MOST_AGAIN, "results keep so many");

typedef struct {
    char *id;                    // as it is written, or NULL
    const Json *context, *until; // until: NULL, a string or a list of strings
    Sampling sampling;
    int64_t most;
} GenerateRequest;

// a text that grows
typedef struct {
    const Tokenizer *tokenizer;
    const Json *until;
    char *bytes;
    size_t size, capacity;
} GrowingText;

// the first stop string, or NULL
static inline const Json *first_stop(const Json *until) {
    return until != NULL && until->type == JSON_ARRAY ? until->child : until;
}

// the next one; a string alone has none
static inline const Json *next_stop(const Json *until, const Json *stop) {
    return until->type == JSON_ARRAY ? stop->next : NULL;
}

static inline void read_generate_request(GenerateRequest *q, const Run *run, const Requests *r,
                                         const Json *json) {
    const Options *o = &run->options;
    q->context = request_text(r, json, "context");
    q->until = json_get(json, "until");
    if (q->until != NULL && q->until->type == JSON_NULL) {
        q->until = NULL;
    } else if (q->until != NULL && q->until->type != JSON_STRING && q->until->count > 0) {
        q->until = request_texts(r, json, "until");
    } else if (q->until != NULL && q->until->type != JSON_STRING && q->until->type != JSON_ARRAY) {
        request_fail(r, "\"until\" is neither a string nor a list of strings");
    }
    q->most = request_integer(r, json, "max_tokens", 0, INT64_MAX, o->sample_tokens);
    q->sampling =
        sampling_of(o, run->tokenizer->vocab_size, ((uint64_t)1 << GENERATE_STREAM) + (uint64_t)r->line);
    q->sampling.temperature = request_number(r, json, "temperature", 0.0, 1e3, 0.0);
    q->sampling.top_k = (int)request_integer(r, json, "top_k", 0, 1 << 24, 0);
    q->id = request_id(r, json);
}

// 1 as long as nothing of the text, of which `added` bytes are new, says that it ends
static inline int text_goes_on(const GrowingText *t, size_t added) {
    for (const Json *stop = first_stop(t->until); stop != NULL; stop = next_stop(t->until, stop)) {
        size_t near_end = added + stop->text_size; // a new occurrence ends in what was added
        size_t from = t->size > near_end ? t->size - near_end : 0;
        if (stop->text_size > 0 &&
            memmem(t->bytes + from, t->size - from, stop->text, stop->text_size) != NULL) {
            return 0;
        }
    }
    return 1;
}

static inline int grow_text(void *to, int token) {
    GrowingText *t = (GrowingText *)to;
    size_t size;
    if (token == t->tokenizer->eot) {
        return 0;
    }
    const char *piece = tokenizer_piece(t->tokenizer, token, &size);
    if (t->size + size > t->capacity) {
        t->capacity = 2 * (t->size + size) + 256;
        t->bytes = GROW(char, t->bytes, t->capacity);
    }
    memcpy(t->bytes + t->size, piece, size);
    t->size += size;
    return text_goes_on(t, size);
}

static inline void cut_text(GrowingText *t) {
    for (const Json *stop = first_stop(t->until); stop != NULL; stop = next_stop(t->until, stop)) {
        const char *found = stop->text_size > 0 && t->size > 0
                                ? (const char *)memmem(t->bytes, t->size, stop->text, stop->text_size)
                                : NULL;
        t->size = found != NULL ? (size_t)(found - t->bytes) : t->size;
    }
}

// the ids of a context that count; for free()
static inline int *context_ids(Run *run, const GenerateRequest *q, int *n) {
    int64_t T = run->options.seq_len, room = q->most < T ? T - q->most : 1;
    int *ids = NULL;
    size_t count = 0, capacity = 0;
    tokenizer_encode_special(run->tokenizer, q->context->text, q->context->text_size, &ids, &count,
                             &capacity);
    if (count == 0) {
        tokenizer_reserve(&ids, 0, &capacity, 1);
        ids[count++] = run->tokenizer->eot;
    }
    size_t kept = count < (size_t)room ? count : (size_t)room;
    memmove(ids, ids + count - kept, kept * sizeof(int));
    *n = (int)kept;
    return ids;
}

// the result of the request that r has read last, as a line without its end; for free(). Adds to *tokens
static inline char *generate_result(Run *run, const Requests *r, const Json *json, int64_t *tokens) {
    GenerateRequest q;
    Composed line;
    int n;
    read_generate_request(&q, run, r, json);
    int *ids = context_ids(run, &q, &n);
    GrowingText text = {run->tokenizer, q.until, NULL, 0, 0};
    Continuation done = continue_ids(run, ids, n, &q.sampling, q.most, grow_text, &text);
    refuse_broken_text(&done);
    cut_text(&text);
    *tokens += done.tokens;
    compose(&line);
    if (q.id != NULL) {
        fprintf(line.out, "{\"id\":%s,\"text\":", q.id);
    } else {
        fputs("{\"text\":", line.out);
    }
    json_write_string(line.out, text.bytes, text.size);
    fputs("}", line.out);
    free(text.bytes);
    free(ids);
    free(q.id);
    return composed(&line);
}

// ----------------------------------------------------------------------------
// the file

typedef struct {
    int64_t requests, results;
    int64_t again_line, again_end; // the newest results' requests begin behind this line
    int64_t next_end;              // bytes before the first request without a result
} GeneratePlan;

typedef struct {
    Run *run;
    Requests requests;
    Results results;
    GeneratePlan plan;
    RequestProgress progress;
} Generation;

// is the line a result of the request that was read last?
static inline int is_result_of(const Requests *r, const Json *request, const char *line, size_t size,
                               JsonArena *arena) {
    char error[256], *id = request_id(r, request);
    json_arena_reset(arena);
    const Json *json = json_parse(line, size, arena, error, sizeof(error));
    const Json *text = json_get(json, "text"), *its_id = json_get(json, "id");
    int good = text != NULL && text->type == JSON_STRING && (its_id != NULL) == (id != NULL);
    if (good && id != NULL) {
        size_t length = strlen(id); // as it is written
        good = strncmp(line, "{\"id\":", 6) == 0 && strncmp(line + 6, id, length) == 0 &&
               line[6 + length] == ',';
    } else if (good) {
        good = strncmp(line, "{\"text\":", 8) == 0;
    }
    free(id);
    return good;
}

// max_tokens of T or more leave a context one token
static inline void warn_of_short_contexts(const Generation *g, int64_t short_contexts) {
    if (short_contexts > 0) {
        warn("%lld of %lld requests ask for %lld tokens, all that the model sees at once, or more: of their "
             "contexts one token counts\n  ---> a smaller \"max_tokens\", or --sample-tokens",
             (long long)short_contexts, (long long)g->plan.requests, (long long)g->run->options.seq_len);
    }
}

static inline void generate_plan(Generation *g) {
    GeneratePlan *p = &g->plan;
    JsonArena arena;
    size_t size;
    int64_t short_contexts = 0;
    int there = g->run->ranks.rank == 0;
    json_arena_init(&arena);
    for (const Json *json; (json = requests_next(&g->requests)) != NULL; p->requests++) {
        GenerateRequest q;
        ranks_beat(&g->run->ranks, g->run->state.step, "reading requests");
        read_generate_request(&q, g->run, &g->requests, json);
        short_contexts += q.most >= g->run->options.seq_len && q.context->text_size > 0;
        free(q.id);
        const char *line = there ? results_next(&g->results, &size) : NULL;
        there = line != NULL;
        if (there && !is_result_of(&g->requests, json, line, size, &arena)) {
            results_foreign(&g->results, g->requests.path);
        }
        if (there) {
            results_keep(&g->results, &g->requests);
            p->next_end = g->requests.end;
        }
    }
    if (g->run->ranks.rank == 0) {
        p->results = g->results.lines;
        p->again_line = results_again(&g->results, &p->again_end);
        if (results_next(&g->results, &size) != NULL) {
            results_superfluous(&g->results, g->requests.path);
        }
    }
    warn_of_short_contexts(g, short_contexts);
    json_arena_free(&arena);
    ranks_share(&g->run->ranks, p, sizeof(*p));
}

// do two results begin alike?
static inline int texts_agree(const char *a, const char *b) {
    const char *x = strstr(a, "\"text\":"), *y = strstr(b, "\"text\":");
    return x != NULL && y != NULL && strncmp(x, y, strlen("\"text\":\"") + GENERATE_AGAIN_BYTES) == 0;
}

// rank 0 generates the newest results again
static inline void generate_check_weights(Generation *g) {
    int64_t count = g->plan.results - g->plan.again_line, agree = 0, tokens = 0;
    requests_go_to(&g->requests, g->plan.again_line, g->plan.again_end);
    for (int64_t i = 0; i < count && !stop_requested; i++) {
        const Json *json = requests_next(&g->requests);
        char *line = generate_result(g->run, &g->requests, json, &tokens);
        agree += texts_agree(line, results_kept(&g->results, g->plan.again_line + i));
        free(line);
    }
    if (!stop_requested && 2 * agree < count) {
        die("%s was written with other weights or another --seed: of its last %lld results that were "
            "generated again, %lld agree\n  ---> name another --out, or remove it",
            g->results.path, (long long)count, (long long)agree);
    }
}

// of one rank in a round
typedef struct {
    uint64_t longest; // bytes of its longest line, with the 0
    int64_t tokens;
} RoundSizes;

// the ranks' lines of one round become rank 0's, one request after the other
static inline void generate_write_round(Generation *g, char **lines, int count, int64_t tokens) {
    Ranks *ranks = &g->run->ranks;
    RoundSizes own = {0, tokens}, *sizes = NEW(RoundSizes, ranks->count);
    uint64_t longest = 0;
    for (int i = 0; i < count; i++) {
        uint64_t size = lines[i] != NULL ? strlen(lines[i]) + 1 : 0;
        own.longest = size > own.longest ? size : own.longest;
    }
    ranks_gather(ranks, &own, sizeof(own), sizes);
    for (int k = 0; k < ranks->count; k++) {
        longest = sizes[k].longest > longest ? sizes[k].longest : longest;
        g->progress.tokens += sizes[k].tokens;
    }
    char *mine = NEW(char, longest), *all = NEW(char, longest *(uint64_t)ranks->count);
    for (int i = 0; i < count; i++) {
        if (lines[i] != NULL) {
            memcpy(mine, lines[i], strlen(lines[i]) + 1);
        }
        ranks_gather(ranks, mine, longest, all);
        if (ranks->rank == 0) {
            const char *line = all + (uint64_t)(i % ranks->count) * longest;
            results_write(&g->results, line, strlen(line));
            results_write(&g->results, "\n", 1);
        }
    }
    if (ranks->rank == 0) {
        results_flush(&g->results);
    }
    free(sizes);
    free(mine);
    free(all);
}

// up to a round of requests; 0: interrupted, on any rank
static inline int generate_round(Generation *g) {
    Ranks *ranks = &g->run->ranks;
    int most = ranks->count > 1 ? GENERATE_ROUND * ranks->count : 1, count = 0;
    int64_t tokens = 0;
    char **lines = NEW(char *, most);
    for (; count < most && g->requests.line < g->plan.requests; count++) {
        const Json *json = requests_next(&g->requests);
        if (json == NULL) {
            requests_have_changed(&g->requests);
        }
        if (count % ranks->count == ranks->rank && !stop_requested) {
            lines[count] = generate_result(g->run, &g->requests, json, &tokens);
        }
    }
    int whole = !ranks_any(ranks, stop_requested);
    if (whole) {
        generate_write_round(g, lines, count, tokens);
        g->plan.results += count;
    }
    for (int i = 0; i < count; i++) {
        free(lines[i]);
    }
    free(lines);
    g->progress.requests = g->requests.line;
    g->progress.bytes = g->requests.end;
    g->progress.done = (double)g->requests.end;
    request_progress_show(&g->progress, 0);
    return whole;
}

// the exit status
static inline int generate_file(Run *run) {
    Generation g;
    int whole = 1;
    memset(&g, 0, sizeof(g));
    g.run = run;
    agree_on_requests(run, run->options.generate);
    warn_of_method_alone(run, "--generate");
    requests_open(&g.requests, run->options.generate, "generate");
    if (run->ranks.rank == 0) {
        results_open(&g.results, run->options.out, "text", GENERATE_AGAIN, &g.requests);
    }
    generate_plan(&g);
    if (run->ranks.rank == 0) {
        generate_check_weights(&g);
        results_begin(&g.results);
    }
    requests_go_to(&g.requests, g.plan.results, g.plan.next_end);
    request_progress_begin(&g.progress, run->ranks.rank != 0);
    g.progress.work = (double)g.requests.size;
    g.progress.done = g.progress.done_before = (double)g.plan.next_end;
    while (whole && g.plan.results < g.plan.requests) {
        whole = generate_round(&g);
    }
    request_progress_show(&g.progress, 1);
    printf("generate  %s%s has %lld of %lld results%s\n", whole ? "" : "interrupted: ", run->options.out,
           (long long)g.plan.results, (long long)g.plan.requests, whole ? "" : "; the same command goes on");
    requests_close(&g.requests);
    if (run->ranks.rank == 0) {
        results_close(&g.results);
    }
    return whole ? 0 : EXIT_INTERRUPTED;
}

#endif
