/*
--score: a file of requests to a file of results. What a block of requests is and how it is computed: score.h

    read all requests, and the results that are there     score_plan
    compute the newest of those again                     score_check_weights
    block after block                                     score_blocks
*/
#ifndef SCORE_RUN_H
#define SCORE_RUN_H

#include "llmc/run/agree.h"
#include "llmc/run/score.h"
// defines: agree_on_requests; ScoreBlock, score_block, score_count, score_print

static_assert((int)SCORE_AGAIN <= (int)RESULTS_MOST_AGAIN, "results keep so many");

// what the first reading has found; rank 0's is everyone's
typedef struct {
    int64_t requests, work;        // lines, and tokens of their sequences
    int64_t results;               // that are there
    int64_t block_line, block_end; // the block with the first request that has none begins behind this line
    int64_t block_done;            // tokens before it
    int64_t again_line, again_end; // the newest results' requests begin behind this line
} ScorePlan;

typedef struct {
    Run *run;
    ScoreRules rules;
    Requests requests;
    Results results; // rank 0's
    ScorePlan plan;
    RequestProgress progress;
    ScoreSums sums;
} Scoring;

static inline int block_is_full(const Scoring *s, int64_t inputs, int64_t requests) {
    const Options *o = &s->run->options;
    return inputs >= SCORE_BLOCK * o->batch * o->seq_len || requests >= SCORE_MOST_REQUESTS;
}

// the result of the request that has been read last, if there is one; 0: there is none
static inline int score_take_result(Scoring *s, ScoreBlock *one, JsonArena *arena) {
    size_t size;
    const char *line = results_next(&s->results, &size);
    if (line == NULL) {
        return 0;
    }
    if (!block_read(one, &one->requests.items[0], line, size, arena)) {
        results_foreign(&s->results, s->requests.path);
    }
    results_keep(&s->results, &s->requests);
    score_count(&s->sums, one, &one->requests.items[0]);
    return 1;
}

// reads everything once
static inline void score_plan(Scoring *s) {
    ScorePlan *p = &s->plan;
    ScoreBlock one;
    JsonArena arena;
    int64_t inputs = 0, requests = 0, block_line = 0, block_end = 0, block_done = 0;
    int there = s->run->ranks.rank == 0;
    memset(&one, 0, sizeof(one));
    json_arena_init(&arena);
    for (const Json *json; (json = requests_next(&s->requests)) != NULL; p->requests++) {
        ranks_beat(&s->run->ranks, s->run->state.step, "reading requests");
        block_clear(&one);
        block_add(&one, &s->rules, &s->requests, json);
        if (block_is_full(s, inputs, requests)) {
            block_line = s->requests.line - 1;
            block_end = s->requests.begin;
            block_done = p->work;
            inputs = requests = 0;
        }
        there = there && score_take_result(s, &one, &arena);
        if (there || p->requests == s->results.lines) { // up to the first that has none
            p->block_line = block_line;
            p->block_end = block_end;
            p->block_done = block_done;
        }
        inputs += one.inputs;
        requests++;
        p->work += one.inputs;
    }
    size_t size;
    if (s->run->ranks.rank == 0) {
        p->results = s->results.lines;
        p->again_line = results_again(&s->results, &p->again_end);
        if (results_next(&s->results, &size) != NULL) {
            results_superfluous(&s->results, s->requests.path);
        }
    }
    block_free(&one);
    json_arena_free(&arena);
    ranks_share(&s->run->ranks, p, sizeof(*p));
}

// requests from the next one on, up to line `last`, as many as a block has
static inline void score_fill_block(Scoring *s, ScoreBlock *b, int64_t last) {
    block_clear(b);
    while (s->requests.line < last && !block_is_full(s, b->inputs, b->requests.count)) {
        const Json *json = requests_next(&s->requests);
        if (json == NULL) {
            requests_have_changed(&s->requests);
        }
        block_add(b, &s->rules, &s->requests, json);
    }
    s->progress.requests = s->requests.line;
    s->progress.bytes = s->requests.end;
}

// is what the block has computed of a request what was written before? To 1 %, which other batches, kernels
// or precisions keep
static inline int score_agrees(ScoreBlock *b, const ScoreRequest *request, const char *result,
                               JsonArena *arena) {
    float *now = NEW(float, request->count);
    int agrees = 1;
    for (int i = 0; i < request->count; i++) {
        now[i] = b->continuations.items[request->first + i].ll;
    }
    block_read(b, request, result, strlen(result), arena);
    for (int i = 0; i < request->count; i++) {
        float before = b->continuations.items[request->first + i].ll;
        agrees &= fabs((double)now[i] - (double)before) <= 0.01 + 0.01 * fabs((double)before);
    }
    free(now);
    return agrees;
}

// Computes the newest results again: most of another model's would differ. 0: interrupted
static inline int score_check_weights(Scoring *s) {
    ScoreBlock b;
    JsonArena arena;
    int64_t first = s->plan.again_line, count = s->plan.results - first;
    int agree = 0;
    if (count == 0) {
        return 1;
    }
    memset(&b, 0, sizeof(b));
    json_arena_init(&arena);
    requests_go_to(&s->requests, first, s->plan.again_end);
    score_fill_block(s, &b, s->plan.results);
    count = b.requests.count; // fewer, where they are long
    int whole = score_block(s->run, &b, &s->progress);
    for (int64_t i = 0; i < count && whole && s->run->ranks.rank == 0; i++) {
        agree += score_agrees(&b, &b.requests.items[i], results_kept(&s->results, first + i), &arena);
    }
    if (whole && s->run->ranks.rank == 0 && 2 * agree < count) {
        die("%s was written with other weights: of its last %lld results that were computed again, %d agree\n"
            "  ---> name another --out, or remove it",
            s->results.path, (long long)count, agree);
    }
    block_free(&b);
    json_arena_free(&arena);
    return whole;
}

// rank 0's: the results of a block whose first request is behind line `first`, but for those that are there
static inline void score_write_block(Scoring *s, const ScoreBlock *b, int64_t first) {
    for (int i = 0; i < b->requests.count && s->run->ranks.rank == 0; i++) {
        if (first + i >= s->plan.results) {
            block_write(s->results.file, b, &b->requests.items[i]);
            score_count(&s->sums, b, &b->requests.items[i]);
        }
    }
    if (s->run->ranks.rank == 0) {
        results_flush(&s->results);
    }
}

// 0: interrupted
static inline int score_blocks(Scoring *s) {
    ScoreBlock b;
    int whole = 1;
    memset(&b, 0, sizeof(b));
    requests_go_to(&s->requests, s->plan.block_line, s->plan.block_end);
    s->progress.tokens = s->progress.tokens_before = s->plan.block_done;
    s->progress.done = s->progress.done_before = (double)s->plan.block_done;
    while (whole && s->requests.line < s->plan.requests) {
        int64_t first = s->requests.line;
        score_fill_block(s, &b, s->plan.requests);
        whole = score_block(s->run, &b, &s->progress);
        if (whole) {
            score_write_block(s, &b, first);
        }
    }
    block_free(&b);
    request_progress_show(&s->progress, 1);
    return whole;
}

static inline void scoring_open(Scoring *s, Run *run) {
    const Options *o = &run->options;
    ScoreRules rules = {run->tokenizer, (int)o->seq_len, o->delimiter};
    memset(s, 0, sizeof(*s));
    s->run = run;
    s->rules = rules;
    request_progress_begin(&s->progress, run->ranks.rank != 0);
    requests_open(&s->requests, o->score, "score");
    if (run->ranks.rank == 0) {
        results_open(&s->results, o->out, "ll", SCORE_AGAIN, &s->requests);
    }
}

static inline void scoring_close(Scoring *s) {
    requests_close(&s->requests);
    if (s->run->ranks.rank == 0) {
        results_close(&s->results);
    }
}

// the exit status
static inline int score(Run *run) {
    Scoring s;
    agree_on_requests(run, run->options.score);
    warn_of_method_alone(run, "--score"); // (a sequence alone, or a batch of any kind: the same route)
    model_route(run->model, method_alone(run), run->config.router.active);
    scoring_open(&s, run);
    score_plan(&s);
    s.progress.work = (double)s.plan.work;
    int whole = score_check_weights(&s);
    if (whole && run->ranks.rank == 0) {
        results_begin(&s.results);
    }
    request_progress_begin(&s.progress, run->ranks.rank != 0);
    if (s.plan.results < s.plan.requests) {
        whole = whole && score_blocks(&s);
    }
    scoring_close(&s);
    if (!whole) {
        printf("score     interrupted: %s has %lld of %lld results; the same command goes on\n",
               run->options.out, (long long)s.sums.requests, (long long)s.plan.requests);
        return EXIT_INTERRUPTED;
    }
    score_print(&s.sums);
    return 0;
}

#endif
