/*
Scoring: the log likelihood of each continuation of each request (--score REQUESTS --out RESULTS). What a
request becomes in tokens, and its result: score_block.h.

    ll = sum over its targets of ln softmax(z)_target        greedy = each target is the argmax of its z

    1. All requests are read once: a line that is wrong is said before anything is computed; and the results
       that are there are held against them.
    2. Results that are there: the newest are computed again, since other weights would not show otherwise.
    3. Block after block: as many requests as make up SCORE_BLOCK batches. A block's sequences are sorted by
       length and cut into batches of up to B x T tokens with padding; ranks take batches in turn. Rank 0
       writes the block's results in request order.

A block is a function of the file, of B and of T alone: a run that goes on computes the block in which it was
interrupted from its beginning, so that its results have the bits of a run that was not. (An interruption
costs at most a block.) Ranks change who computes a batch, not what is in it.

Last, where every request has a gold: accuracy as the harness has it.

    acc        largest ll is gold's (ties: the first). One choice: its greedy flag
    acc_norm   the same of ll / characters of the choice
    +-         standard error: sqrt(p (1 - p) / (n - 1))
    perplexity exp(-mean ll) of files with one choice a request; its standard error: perplexity times ll's

ec would let a sequence's experts choose among its neighbours and padding: it routes as topk here. Errors: as
in requests.h; results of other requests or other weights are refused and stay as they are.
*/
#ifndef SCORE_H
#define SCORE_H

#include "llmc/files/logger.h"
#include "llmc/run/run.h"
#include "llmc/run/score_block.h"
// defines: seconds_now; Run; ScoreBlock, block_*, Results, Requests

enum {
    SCORE_BLOCK = 32,            // batches a block
    SCORE_MOST_REQUESTS = 16384, // of a block
    SCORE_MOST_SEQUENCES = 4096, // of a batch
    SCORE_AGAIN = 16             // results that are computed again before a file goes on
};

// ----------------------------------------------------------------------------
// a block

typedef struct {
    int key, request, index; // key: what is sorted by, the longest first
} ScoreOrder;

static inline int compare_score_order(const void *a, const void *b) {
    const ScoreOrder *x = (const ScoreOrder *)a, *y = (const ScoreOrder *)b;
    return x->key != y->key ? (x->key < y->key) - (x->key > y->key)
                            : (x->index > y->index) - (x->index < y->index);
}

// By length; where contexts are shared, by request, a request being as long as its longest sequence
static inline ScoreOrder *score_order(const ScoreBlock *b) {
    ScoreOrder *order = NEW(ScoreOrder, b->sequences.count);
    for (int i = 0; i < b->sequences.count; i++) {
        const ScoreSequence *s = &b->sequences.items[i];
        int key = model_shares_contexts() ? b->requests.items[s->request].longest : s->length;
        ScoreOrder o = {key, s->request, i};
        order[i] = o;
    }
    qsort(order, (size_t)b->sequences.count, sizeof(order[0]), compare_score_order);
    return order;
}

// How many of the sequences from `first` on make up a batch of at most `most` tokens, and the longest's length.
// Where contexts are segments (lory), the model has room for no more of them than for sequences
static inline int score_batch_size(const Run *run, const ScoreBlock *b, const ScoreOrder *order, int first,
                                   int *longest) {
    const Options *o = &run->options;
    int64_t most = o->batch * o->seq_len;
    int most_sequences = router_merges(run->config.router.method) ? (int)o->batch : SCORE_MOST_SEQUENCES;
    int n = 0;
    *longest = 0;
    for (; first + n < b->sequences.count && n < most_sequences; n++) {
        int length = b->sequences.items[order[first + n].index].length;
        length = length > *longest ? length : *longest;
        if (n > 0 && (int64_t)(n + 1) * length > most) {
            break;
        }
        *longest = length;
    }
    return n;
}

// buffers of one batch
typedef struct {
    int *ids, *lengths, *contexts, *rows, *targets;
    float *ll;
    unsigned char *greedy;
} ScoreBuffers;

static inline void score_buffers_fill(ScoreBuffers *u, const ScoreBlock *b, const ScoreOrder *order,
                                      ScoreBatch *batch) {
    int64_t n = 0;
    for (int i = 0; i < batch->B; i++) {
        const ScoreSequence *s = &b->sequences.items[order[i].index];
        memset(u->ids + (int64_t)i * batch->T, 0, (size_t)batch->T * sizeof(int));
        memcpy(u->ids + (int64_t)i * batch->T, b->ids + s->inputs, (size_t)s->length * sizeof(int));
        u->lengths[i] = s->length;
        u->contexts[i] = s->context;
        for (int k = 0; k < s->count; k++) {
            const ScoreSpan *span = &b->spans.items[s->first + k];
            for (int t = 0; t < span->count; t++, n++) {
                u->rows[n] = i * batch->T + span->row + t;
                u->targets[n] = b->ids[span->targets + (size_t)t];
            }
        }
    }
    batch->n = n;
}

static inline int64_t score_targets(const ScoreBlock *b, const ScoreOrder *order, int n) {
    int64_t targets = 0;
    for (int i = 0; i < n; i++) {
        const ScoreSequence *s = &b->sequences.items[order[i].index];
        for (int k = 0; k < s->count; k++) {
            targets += b->spans.items[s->first + k].count;
        }
    }
    return targets;
}

// the spans of n sequences that make up one batch
static inline void score_batch(Run *run, ScoreBlock *b, const ScoreOrder *order, int n, int longest) {
    int64_t targets = score_targets(b, order, n), at = 0;
    ScoreBuffers u = {NEW(int, (int64_t)n *longest),
                      NEW(int, n),
                      NEW(int, n),
                      NEW(int, targets),
                      NEW(int, targets),
                      NEW(float, targets),
                      NEW(unsigned char, targets)};
    ScoreBatch batch = {n, longest, u.ids, u.lengths, u.contexts, 0, u.rows, u.targets};
    score_buffers_fill(&u, b, order, &batch);
    model_score(run->model, &batch, u.ll, u.greedy);
    for (int i = 0; i < n; i++) {
        const ScoreSequence *s = &b->sequences.items[order[i].index];
        for (int k = 0; k < s->count; k++) {
            ScoreSpan *span = &b->spans.items[s->first + k];
            span->greedy = 1;
            for (int t = 0; t < span->count; t++, at++) {
                span->ll += (double)u.ll[at];
                span->greedy &= u.greedy[at];
            }
        }
    }
    void *buffers[] = {u.ids, u.lengths, u.contexts, u.rows, u.targets, u.ll, u.greedy};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        free(buffers[i]);
    }
}

typedef struct {
    double ll;
    int32_t greedy, done; // done: by the rank whose row this is
} SpanScore;

// the spans that each rank has computed become everyone's
static inline void score_gather(Run *run, ScoreBlock *b, const unsigned char *mine) {
    int n = b->spans.count, ranks = run->ranks.count;
    SpanScore *own = NEW(SpanScore, n), *all = NEW(SpanScore, (int64_t)n * ranks);
    for (int i = 0; i < n && ranks > 1; i++) {
        SpanScore score = {b->spans.items[i].ll, b->spans.items[i].greedy, mine[i]};
        own[i] = score;
    }
    if (ranks > 1) {
        ranks_gather(&run->ranks, own, (size_t)n * sizeof(SpanScore), all);
    }
    for (int64_t i = 0; i < (int64_t)n * ranks && ranks > 1; i++) {
        if (all[i].done) {
            b->spans.items[i % n].ll = all[i].ll;
            b->spans.items[i % n].greedy = all[i].greedy;
        }
    }
    free(own);
    free(all);
}

static inline void score_add_spans(ScoreBlock *b) {
    double *sums = NEW(double, b->continuations.count);
    for (int i = 0; i < b->spans.count; i++) {
        const ScoreSpan *span = &b->spans.items[i];
        sums[span->continuation] += span->ll;
        b->continuations.items[span->continuation].greedy &= span->greedy;
    }
    for (int i = 0; i < b->continuations.count; i++) {
        Continued *c = &b->continuations.items[i];
        c->ll = (float)sums[i];
        if (!isfinite(c->ll)) {
            die("the model's log likelihoods are not finite: its weights are broken\n  ---> --load another "
                "checkpoint");
        }
    }
    free(sums);
}

// ----------------------------------------------------------------------------
// a block, computed

// All of a block's batches, of which this rank computes every count-th. 0: a signal has interrupted it, on
// any rank
static inline int score_block(Run *run, ScoreBlock *b, RequestProgress *progress) {
    ScoreOrder *order = score_order(b);
    unsigned char *mine = NEW(unsigned char, b->spans.count);
    int64_t begun = progress->tokens;
    for (int first = 0, i = 0, n; first < b->sequences.count && !stop_requested; first += n, i++) {
        int longest;
        n = score_batch_size(run, b, order, first, &longest);
        for (int k = first; k < first + n; k++) {
            const ScoreSequence *s = &b->sequences.items[order[k].index];
            memset(mine + s->first, i % run->ranks.count == run->ranks.rank, (size_t)s->count);
            progress->tokens += s->length;
        }
        if (i % run->ranks.count == run->ranks.rank) {
            ranks_beat(&run->ranks, run->state.step, "scoring");
            score_batch(run, b, order + first, n, longest);
            progress->done = (double)progress->tokens;
            request_progress_show(progress, 0);
        }
    }
    free(order);
    int whole = !ranks_any(&run->ranks, stop_requested);
    if (whole) {
        score_gather(run, b, mine);
        score_add_spans(b);
    } else {
        progress->tokens = begun;
    }
    free(mine);
    return whole;
}

// ----------------------------------------------------------------------------
// accuracy

typedef struct {
    int64_t requests, golds, single; // all, with a gold, with one choice
    int64_t right, right_norm, greedy;
    double ll, ll_squares; // of single choices
} ScoreSums;

// the first of the largest ll / chars (norm) or ll
static inline int score_best(const ScoreBlock *b, const ScoreRequest *request, int norm) {
    int best = 0;
    double largest = -INFINITY;
    for (int i = 0; i < request->count; i++) {
        const Continued *c = &b->continuations.items[request->first + i];
        double value = norm ? (double)c->ll / (double)c->chars : (double)c->ll;
        if (value > largest) {
            largest = value;
            best = i;
        }
    }
    return best;
}

static inline void score_count(ScoreSums *s, const ScoreBlock *b, const ScoreRequest *request) {
    s->requests++;
    if (request->gold < 0) {
        return;
    }
    s->golds++;
    s->right += score_best(b, request, 0) == request->gold;
    s->right_norm += score_best(b, request, 1) == request->gold;
    if (request->count == 1) {
        const Continued *c = &b->continuations.items[request->first];
        s->single++;
        s->greedy += c->greedy;
        s->ll += (double)c->ll;
        s->ll_squares += (double)c->ll * (double)c->ll;
    }
}

static inline void score_print_share(const char *name, int64_t right, int64_t n) {
    double p = (double)right / (double)n;
    printf(" | %s %.4f", name, p);
    if (n > 1) {
        printf(" +- %.4f", sqrt(p * (1.0 - p) / (double)(n - 1)));
    }
}

static inline void score_print(const ScoreSums *s) {
    double n = (double)s->requests;
    printf("score     n %lld", (long long)s->requests);
    if (s->golds < s->requests || s->requests == 0) {
        printf(" requests\n");
        return;
    }
    if (s->single < s->requests) {
        score_print_share("acc", s->right, s->requests);
        score_print_share("acc_norm", s->right_norm, s->requests);
    } else {
        double mean = s->ll / n, perplexity = exp(-mean);
        score_print_share("acc", s->greedy, s->requests);
        printf(" | perplexity %.4g", perplexity);
        if (s->requests > 1) {
            double variance = fmax(s->ll_squares - n * mean * mean, 0.0) / (n - 1.0);
            printf(" +- %.3g", perplexity * sqrt(variance / n));
        }
    }
    printf("\n");
}

#endif
