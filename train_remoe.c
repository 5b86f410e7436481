/*
train_remoe.c: the CPU reference trainer of ReMoE (mixture-of-experts language models with a ReLU router),
fp32, OpenMP.

One file, read top to bottom: the model's memory, forward, backward, the gradients of a step, and last what a
run asks of them (llmc/trainer.h). The step that a run repeats is llmc/step.h: gradients, clip, AdamW, lambda.
The run itself (options, log, checkpoints, samples, scores) is llmc/run/run.h, and the mathematics of each
component stands in its own header under llmc/; the CUDA trainer has the same order and the same names.

    tokens -> embedding -> L layers -> RMSNorm -> lm_head -> cross entropy -> loss, and back
    a layer   x = x + Attn(RMSNorm(x))      RMSNorm -> qkv -> RoPE -> attention -> o -> +
              x = x + MoE(RMSNorm(x))       RMSNorm -> router -> dispatch -> experts -> combine -> +

Letters: B sequences, T tokens each, N = B T, d hidden, L layers, H heads, KV key/value heads, hd head size, V
vocabulary, E = E_tot experts, k = k_tot active, F width of an expert, P active (token, expert) pairs.

    make train_remoe && ./train_remoe            the tiny preset on the built-in sample (make sample-data)
    ./train_remoe --help                         all options
*/
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
// defines: die, NEW
#include "llmc/check.h"
// defines: Config, config_params, config_qkv_width
#include "llmc/config.h"
// defines: TensorTable, Weights, LayerWeights, model_tensors
#include "llmc/model.h"
// defines: Prefetcher, prefetch_next
#include "llmc/files/prefetch.h"
// defines: matmul_forward, matmul_backward, sgemm
#include "llmc/matmul.h"
// defines: embedding_*, rmsnorm_*, rope_*, attention_* (forward, backward); Branch, branches_*
#include "llmc/attention.h"
#include "llmc/branches.h"
#include "llmc/embedding.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
// defines: PairList, router_forward, router_loss, router_backward; Dispatch, dispatch_sort; experts_forward,
// experts_backward
#include "llmc/dispatch.h"
#include "llmc/experts.h"
#include "llmc/router.h"
// defines: Segments; Merged, merged_forward, merged_backward (lory)
#include "llmc/merge.h"
// defines: crossentropy_forward_backward, crossentropy_score
#include "llmc/crossentropy.h"
// defines: adamw_update, sum_of_squares
#include "llmc/adamw.h"
// defines: seconds_now, peak_memory_gb
#include "llmc/files/logger.h"
// defines: Purpose, ModelSettings, ModelBuffer, StepStats, ScoreBatch; what a run asks of a model: model_*
#include "llmc/trainer.h"
// defines: HostMemory, host_memory
#include "llmc/run/host_memory.h"

// ----------------------------------------------------------------------------
// the model's memory

// what one layer's forward leaves for its backward
typedef struct {
    float *x;           // [N, d] the residual stream that enters the layer
    float *attn_normed; // [N, d]
    float *attn_rstd;   // [N]
    float *qkv; // [B, T, (H + 2 KV) hd], queries and keys rotated; also the key/value cache of sampling
    float *att; // [N, d] the heads' outputs
    float *lse; // [B, H, T]
    float *mid; // [N, d] the residual stream between attention and experts
    float *ffn_normed;    // [N, d]
    float *ffn_rstd;      // [N]
    float *router_logits; // [N, E], or what the router makes of them
    PairList pairs;       // who goes where, with which gate
    Dispatch dispatch;    // the same, sorted by expert
    float *h;             // [P, 2F] up-projections; grows with P
    int64_t h_capacity;
} LayerActs;

// where a step's time goes (bench), in the order in which it is spent
typedef enum {
    TIME_DATA,
    TIME_EMBEDDING,
    TIME_ATTENTION,
    TIME_MOE,
    TIME_HEAD,
    TIME_MOE_BACKWARD,
    TIME_ATTENTION_BACKWARD,
    TIME_EMBEDDING_BACKWARD,
    TIME_NORM,
    TIME_UPDATE,
    TIME_ROWS
} TimeRow;

// what forward leaves for backward, and the head
typedef struct {
    LayerActs *layers;  // [L]
    float *rope;        // [T, hd]
    float *x;           // [N, d] the residual stream after the last layer
    float *normed;      // [N, d] final norm
    float *rstd;        // [N]
    float *logits;      // [chunk, V]
    int64_t logit_rows; // chunk
    float *losses;      // [N]
} Activations;

// gradients of activations: all layers share them, backward passes them on
typedef struct {
    float *dx, *dnormed, *datt, *dqkv; // of the residual stream, a norm's output, att, qkv
    float *drouter;                    // [N, E]
    float *dgate;                      // [P]
    int64_t dgate_capacity;
} ActivationGradients;

// losses that have been begun, by their number modulo MOST_LOSSES
typedef struct {
    double loss[MOST_LOSSES];
    int64_t active[MOST_LOSSES], begun, ended;
} Losses;

// a text that is continued: its tokens so far, of which the first `cached` have keys and values in the cache
typedef struct {
    int *ids; // [T + 1]
    int length, cached;
    Sampling sampling;
    int64_t draw;
} Text;

struct Model {
    Config config;
    uint64_t seed; // of the routers' draws
    int k;         // k_tot in force (the near-dense warm-up of topk raises it)
    Params params;
    Range everything; // of a flat buffer: one rank keeps all of it
    Activations acts;
    ActivationGradients back;
    Merged merged; // lory's experts of some segments
    Losses losses;
    Text text;
    float *scratch; // the experts' rows: P (d + F + 1) floats; grows with P
    int64_t scratch_capacity;
    double seconds[TIME_ROWS], last_lap;
};

static float *floats(int64_t n) {
    return NEW(float, n);
}

enum { COPY_BLOCK = 16384 }; // floats: what one thread copies or clears at a time

static size_t block_bytes(int64_t left) {
    return (size_t)(left < COPY_BLOCK ? left : (int64_t)COPY_BLOCK) * sizeof(float);
}

static void copy_floats(float *to, const float *from, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += COPY_BLOCK) {
        memcpy(to + i, from + i, block_bytes(n - i));
    }
}

static void zero_floats(float *x, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += COPY_BLOCK) {
        memset(x + i, 0, block_bytes(n - i));
    }
}

// bytes of weights with what training keeps beside them, and of what a micro-batch of N tokens, each with
// `active` experts, keeps
static double model_bytes(const Config *c, int64_t N, double active, Purpose purpose) {
    double d = c->hidden, E = c->router.experts;
    double layer = 5.0 * d + (double)config_qkv_width(c) + c->heads + E + 2.0 + active * (2.0 * c->ffn + 5.0);
    double shared = 7.0 * d + (double)config_qkv_width(c) + E + active * (d + c->ffn + 2.0);
    double copies = purpose == FOR_TRAINING ? 4.0 : purpose == FOR_GRADIENTS ? 2.0 : 1.0;
    double weights = (double)config_params(c, c->router.experts) * copies;
    return 4.0 * (weights + (double)N * (c->layers * layer + shared));
}

static int64_t most_segments(const Config *c, int B, int T) {
    return segments_count(segments_of(B, T, c->router.segment, NULL));
}

// bytes that merged experts take
static double merged_bytes(const Config *c, const ModelSettings *s) {
    int training = s->purpose != FOR_INFERENCE, merges = router_merges(c->router.method);
    return !merges ? 0.0
                   : 4.0 * merged_floats(c->layers, most_segments(c, s->B, s->T), c->router.experts,
                                         c->hidden, c->ffn, training);
}

// GB, rounded up to what is printed, so that printed numbers add up
static double printed_gb(double bytes) {
    return 0.01 * ceil(1e-7 * bytes);
}

static double activations_gb(const Config *c, const ModelSettings *s, double active) {
    int64_t N = (int64_t)s->B * s->T;
    return printed_gb(model_bytes(c, N, active, s->purpose) - model_bytes(c, 0, active, s->purpose) +
                      merged_bytes(c, s));
}

static void print_memory(const Config *c, const ModelSettings *s) {
    printf("memory    %.2f GB of weights, gradients and moments\n          %.2f GB of activations",
           printed_gb(model_bytes(c, 0, 0.0, s->purpose)), activations_gb(c, s, c->router.active));
    if (s->starts_dense) {
        printf(", %.2f at the start with half of the experts on",
               activations_gb(c, s, 0.5 * c->router.experts));
    }
    if (c->router.experts > 1 && !router_merges(c->router.method)) {
        printf(", %.2f with all", activations_gb(c, s, c->router.experts));
    }
    printf("\n");
}

// what to do where `activations` of B sequences find less room. A divisor of B: it divides --global-batch too
static void memory_remedy(char *remedy, size_t capacity, int B, double activations, double room) {
    for (int parts = 2; parts <= B; parts++) {
        if (B % parts == 0 && activations / parts <= room) {
            check_format(remedy, capacity, "--batch %d fits", B / parts);
            return;
        }
    }
    check_format(remedy, capacity, "use a smaller model, or a shorter --seq-len");
}

// refuses before anything is allocated what the memory cannot hold; warns of what it could not hold if all
// experts were on, as they may be while lambda is small
static void check_memory(const Config *c, const ModelSettings *s) {
    HostMemory memory = host_memory();
    double have = 1e-9 * memory.bytes, weights = printed_gb(model_bytes(c, 0, 0.0, s->purpose));
    double half = 0.5 * c->router.experts; // of new weights half are on
    double usual = activations_gb(c, s, s->starts_dense ? half : c->router.active);
    double most = activations_gb(c, s, s->starts_dense ? c->router.experts : c->router.active);
    char remedy[64];
    memory_remedy(remedy, sizeof(remedy), s->B, most, have - weights);
    if (weights + usual > have) {
        die("--batch %d needs %.2f + %.2f = %.2f GB of memory, %s %.2f\n  ---> %s", s->B, weights, usual,
            weights + usual, memory.whose, have, remedy);
    }
    if (weights + most > have) {
        warn("--batch %d needs %.2f + %.2f = %.2f GB of memory if all experts are on, %s %.2f: more, and the "
             "system ends the run\n  ---> %s",
             s->B, weights, most, weights + most, memory.whose, have, remedy);
    }
}

static void model_allocate_params(Model *m, const Config *config) {
    memset(m, 0, sizeof(*m));
    m->config = *config;
    m->k = config->router.active;
    model_tensors(&m->params.table, &m->params.weights, config, NULL);
    m->params.values = floats(m->params.table.flat_size);
    model_tensors(&m->params.table, &m->params.weights, config, m->params.values);
}

// the time since the last lap was spent on `row`
static void lap(Model *m, TimeRow row) {
    double now = seconds_now();
    m->seconds[row] += now - m->last_lap;
    m->last_lap = now;
}

static void model_allocate_training(Model *m, int with_moments) {
    m->params.grad = floats(m->params.table.flat_size);
    model_tensors(&m->params.table, &m->params.grads, &m->config, m->params.grad);
    if (with_moments) {
        m->params.exp_avg = floats(m->params.table.flat_size);
        m->params.exp_avg_sq = floats(m->params.table.flat_size);
    }
}

static void layer_allocate(LayerActs *a, const Config *c, int64_t N) {
    int64_t d = c->hidden;
    memset(a, 0, sizeof(*a));
    a->x = floats(N * d);
    a->attn_normed = floats(N * d);
    a->attn_rstd = floats(N);
    a->qkv = floats(N * config_qkv_width(c));
    a->att = floats(N * d);
    a->lse = floats(N * c->heads);
    a->mid = floats(N * d);
    a->ffn_normed = floats(N * d);
    a->ffn_rstd = floats(N);
    a->router_logits = router_has_weights(c->router.method) ? floats(N * c->router.experts) : NULL;
    dispatch_init(&a->dispatch, c->router.experts);
}

// rows of logits that are in memory at once: the whole [N, V] matrix would outgrow all else
static int64_t classifier_rows(int64_t N, int V) {
    int64_t rows = (int64_t)(4 << 20) / V;
    rows = rows < 1 ? 1 : rows;
    return rows < N ? rows : N;
}

static void model_allocate_activations(Model *m, int B, int T) {
    const Config *c = &m->config;
    int64_t N = (int64_t)B * T, d = c->hidden;
    m->acts.layers = NEW(LayerActs, c->layers);
    for (int l = 0; l < c->layers; l++) {
        layer_allocate(&m->acts.layers[l], c, N);
    }
    m->acts.rope = floats((int64_t)T * c->head_size);
    rope_table(m->acts.rope, T, c->head_size, c->rope_theta);
    m->acts.x = floats(N * d);
    m->acts.normed = floats(N * d);
    m->acts.rstd = floats(N);
    m->acts.logit_rows = classifier_rows(N, c->vocab_size);
    m->acts.logits = floats(m->acts.logit_rows * c->vocab_size);
    m->acts.losses = floats(N);
    if (router_merges(c->router.method)) {
        merged_open(&m->merged, c->layers, most_segments(c, B, T), N, c->router.experts, c->hidden, c->ffn,
                    m->params.grad != NULL);
    }
    m->text.ids = NEW(int, T + 1);
    if (m->params.grad != NULL) {
        m->back.dx = floats(N * d);
        m->back.dnormed = floats(N * d);
        m->back.datt = floats(N * d);
        m->back.dqkv = floats(N * config_qkv_width(c));
        m->back.drouter = floats(router_has_weights(c->router.method) ? N * c->router.experts : 0);
    }
}

static void model_free(Model *m) {
    for (int l = 0; l < m->config.layers && m->acts.layers != NULL; l++) {
        LayerActs *a = &m->acts.layers[l];
        float *buffers[] = {a->x,   a->attn_normed, a->attn_rstd, a->qkv,           a->att, a->lse,
                            a->mid, a->ffn_normed,  a->ffn_rstd,  a->router_logits, a->h};
        for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
            free(buffers[i]);
        }
        pairs_free(&a->pairs);
        dispatch_free(&a->dispatch);
    }
    Params *p = &m->params;
    Activations *acts = &m->acts;
    ActivationGradients *back = &m->back;
    float *buffers[] = {p->values,    p->grad,    p->exp_avg,    p->exp_avg_sq, acts->rope, acts->x,
                        acts->normed, acts->rstd, acts->logits,  acts->losses,  back->dx,   back->dnormed,
                        back->datt,   back->dqkv, back->drouter, back->dgate,   m->scratch};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        free(buffers[i]);
    }
    free(m->text.ids);
    free(acts->layers);
    merged_close(&m->merged);
    params_free(p);
}

// the number of pairs is known only once the router has spoken: buffers follow it
static void layer_reserve_pairs(Model *m, LayerActs *a) {
    int64_t P = a->pairs.num_pairs, d = m->config.hidden, F = m->config.ffn;
    if (P > a->h_capacity) {
        a->h_capacity = P;
        free(a->h);
        a->h = floats(P * 2 * F);
    }
    if (P > m->back.dgate_capacity) {
        m->back.dgate_capacity = P;
        free(m->back.dgate);
        m->back.dgate = floats(P);
    }
    if (P * (d + F + 1) > m->scratch_capacity) {
        m->scratch_capacity = P * (d + F + 1);
        free(m->scratch);
        m->scratch = floats(m->scratch_capacity);
    }
}

// ----------------------------------------------------------------------------
// forward

// which positions the rows of a forward are: start .. T-1 of B sequences (start > 0 only with B = 1: the
// earlier positions are in the qkv buffers), or the rows of B branches in sequences of up to T tokens
typedef struct {
    int B, T, start;
    const Branch *branches; // NULL: none
    int64_t N;              // rows
} Positions;

static Positions plain_positions(int B, int T, int start) {
    Positions p = {B, T, start, NULL, (int64_t)B * (T - start)};
    return p;
}

// x [N, d] -> mid [N, d] = x + Attn(RMSNorm(x))
static void attention_block_forward(Model *m, int l, Positions p) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->params.weights.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int64_t N = p.N;
    int d = c->hidden, width = (int)config_qkv_width(c), H = c->heads, KV = c->kv_heads, hd = c->head_size;
    float *qkv = a->qkv + (int64_t)p.start * width; // behind the cached rows
    rmsnorm_forward(a->attn_normed, a->attn_rstd, a->x, w->attn_norm, N, d, (float)c->norm_eps);
    matmul_forward(qkv, a->attn_normed, w->qkv, N, d, width);
    if (p.branches != NULL) {
        branches_rope_forward(qkv, m->acts.rope, p.branches, p.B, H + KV, hd, width);
        branches_attention_forward(a->att, qkv, p.branches, p.B, p.T, H, KV, hd);
    } else {
        rope_forward(qkv, m->acts.rope, p.B, p.T - p.start, p.start, H + KV, hd, width);
        attention_forward(a->att, a->lse, a->qkv, p.B, p.T, p.start, H, KV, hd);
    }
    copy_floats(a->mid, a->x, N * d);
    sgemm(0, 1, (int)N, d, d, a->att, d, w->o, d, a->mid, d, 1); // mid += att W_o^T
}

// the layer's own experts, which its pairs index, or which are merged into those that its pairs index
static ExpertBank layer_bank(const Model *m, int l) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->params.weights.layers[l];
    ExpertBank bank = {c->router.experts, c->hidden, c->ffn, w->gate_up, w->down, NULL, NULL};
    if (m->params.grad != NULL) {
        bank.dgate_up = m->params.grads.layers[l].gate_up;
        bank.ddown = m->params.grads.layers[l].down;
    }
    return bank;
}

static const RouterDraws no_draws = {NULL, 0, 0}; // evaluation

static Router router_in_force(const Model *m) {
    Router router = m->config.router;
    router.active = m->k;
    return router;
}

// mid [N, d] -> out [N, d] = mid + MoE(RMSNorm(mid)), sum over the active experts (Eq. 1). segments: how the
// tokens lie in sequences
static void moe_block_forward(Model *m, int l, float *out, const int *ids, Segments segments,
                              RouterDraws draws, const float *forced) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->params.weights.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int d = c->hidden, E = c->router.experts;
    int64_t N = (int64_t)segments.sequences * segments.tokens;
    rmsnorm_forward(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, (float)c->norm_eps);
    if (w->router != NULL) {
        matmul_forward(a->router_logits, a->ffn_normed, w->router, N, d, E); // z = W x
    }
    RouterInputs in = {ids, w->bias, forced, draws, segments};
    in.draws.layer = l;
    router_forward(&a->pairs, a->router_logits, in, router_in_force(m), N);
    layer_reserve_pairs(m, a);
    copy_floats(out, a->mid, N * d);
    if (router_merges(c->router.method)) { // the pairs index a bank of merged experts
        merged_forward(out, a->h, a->ffn_normed, layer_bank(m, l), a->router_logits, &a->pairs, l, &m->merged,
                       m->scratch);
    } else {
        dispatch_sort(&a->dispatch, &a->pairs, E);
        experts_forward(out, a->h, a->ffn_normed, layer_bank(m, l), &a->pairs, &a->dispatch, m->scratch);
    }
}

// ids [N]. draws: what chance decides; segments: of the tokens that are routed together; forced: NULL, or for
// each layer an active set [N, E] that replaces the router's own
static void forward_rows(Model *m, const int *ids, Positions p, Segments segments, RouterDraws draws,
                         const float *const *forced) {
    const Config *c = &m->config;
    int64_t N = p.N;
    embedding_forward(m->acts.layers[0].x, ids, m->params.weights.embed, N, c->hidden);
    lap(m, TIME_EMBEDDING);
    for (int l = 0; l < c->layers; l++) {
        float *out = l + 1 < c->layers ? m->acts.layers[l + 1].x : m->acts.x;
        attention_block_forward(m, l, p);
        lap(m, TIME_ATTENTION);
        moe_block_forward(m, l, out, ids, segments, draws, forced != NULL ? forced[l] : NULL);
        lap(m, TIME_MOE);
    }
    rmsnorm_forward(m->acts.normed, m->acts.rstd, m->acts.x, m->params.weights.norm, N, c->hidden,
                    (float)c->norm_eps);
}

// rows start .. T-1 of B sequences. contexts: NULL, or [B] how many of its first tokens route each sequence
// (lory; a call with start > 0 has the experts that the call before has merged)
static void model_forward(Model *m, const int *ids, int B, int T, int start, RouterDraws draws,
                          const int *contexts, const float *const *forced) {
    int S = m->config.router.segment;
    Segments segments = start > 0 ? segments_kept(T - start) : segments_of(B, T, S, contexts);
    forward_rows(m, ids, plain_positions(B, T, start), segments, draws, forced);
}

// mean loss over N targets. grad_scale != 0: the head's gradient and dnormed too, of grad_scale * sum of the
// losses; all_logits: NULL, or [N, V] to keep them
static double classifier(Model *m, const int *targets, int64_t N, float grad_scale, float *all_logits) {
    int d = m->config.hidden, V = m->config.vocab_size;
    for (int64_t first = 0; first < N; first += m->acts.logit_rows) {
        int64_t rows = N - first < m->acts.logit_rows ? N - first : m->acts.logit_rows;
        const float *normed = m->acts.normed + first * d;
        matmul_forward(m->acts.logits, normed, m->params.weights.head, rows, d, V);
        if (all_logits != NULL) {
            memcpy(all_logits + first * V, m->acts.logits, (size_t)(rows * V) * sizeof(float));
        }
        crossentropy_forward_backward(m->acts.losses + first, m->acts.logits, targets + first, rows, V,
                                      grad_scale);
        if (grad_scale != 0.0f) {
            matmul_backward(m->back.dnormed + first * d, m->params.grads.head, m->acts.logits, normed,
                            m->params.weights.head, rows, d, V);
        }
    }
    double sum = 0.0;
    for (int64_t n = 0; n < N; n++) {
        sum += m->acts.losses[n];
    }
    return sum / (double)N;
}

// the column `reg` (router.h) of a micro-batch of N tokens
static double regulariser(const Model *m, int64_t N) {
    double reg = 0.0;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->acts.layers[l];
        reg += router_loss(&a->pairs, a->router_logits, a->pairs.counts, N, router_in_force(m),
                           m->config.layers);
    }
    return reg;
}

// ----------------------------------------------------------------------------
// backward, in the forward's reverse order; m->back.dx carries the residual stream's gradient

static void moe_block_backward(Model *m, int l, int64_t N, double reg_weight) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->params.weights.layers[l];
    LayerWeights *g = &m->params.grads.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int d = c->hidden, E = c->router.experts;
    const float *dgate = m->back.dgate;
    zero_floats(m->back.dnormed, N * d);
    if (router_merges(c->router.method)) {
        merged_backward(m->back.dnormed, m->back.dx, a->ffn_normed, a->h, layer_bank(m, l), a->router_logits,
                        &a->pairs, l, &m->merged, m->scratch);
        dgate = m->merged.da;
    } else {
        experts_backward(m->back.dnormed, m->back.dgate, m->back.dx, a->ffn_normed, a->h, layer_bank(m, l),
                         &a->pairs, &a->dispatch, m->scratch);
    }
    if (w->router != NULL) {
        router_backward(m->back.drouter, dgate, &a->pairs, a->router_logits, a->pairs.counts, N,
                        router_in_force(m), c->layers, reg_weight);
        sgemm(0, 0, (int)N, d, E, m->back.drouter, E, w->router, d, m->back.dnormed, d, 1); // dnormed += dz W
        matmul_backward(NULL, g->router, m->back.drouter, a->ffn_normed, w->router, N, d, E);
    }
    rmsnorm_backward(m->back.dx, g->ffn_norm, m->back.dnormed, a->mid, w->ffn_norm, a->ffn_rstd, N, d);
}

static void attention_block_backward(Model *m, int l, int B, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->params.weights.layers[l];
    LayerWeights *g = &m->params.grads.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int64_t N = (int64_t)B * T;
    int d = c->hidden, width = (int)config_qkv_width(c);
    matmul_backward(m->back.datt, g->o, m->back.dx, a->att, w->o, N, d, d);
    attention_backward(m->back.dqkv, m->back.datt, a->qkv, a->lse, B, T, c->heads, c->kv_heads, c->head_size);
    rope_backward(m->back.dqkv, m->acts.rope, B, T, 0, c->heads + c->kv_heads, c->head_size, width);
    matmul_backward(m->back.dnormed, g->qkv, m->back.dqkv, a->attn_normed, w->qkv, N, d, width);
    rmsnorm_backward(m->back.dx, g->attn_norm, m->back.dnormed, a->x, w->attn_norm, a->attn_rstd, N, d);
}

// after model_forward and classifier (which left dnormed): adds to all gradients. reg_weight: of the
// regulariser
static void model_backward(Model *m, const int *ids, int B, int T, double reg_weight) {
    const Config *c = &m->config;
    int64_t N = (int64_t)B * T;
    zero_floats(m->back.dx, N * c->hidden);
    rmsnorm_backward(m->back.dx, m->params.grads.norm, m->back.dnormed, m->acts.x, m->params.weights.norm,
                     m->acts.rstd, N, c->hidden);
    lap(m, TIME_HEAD);
    for (int l = c->layers - 1; l >= 0; l--) {
        moe_block_backward(m, l, N, reg_weight);
        lap(m, TIME_MOE_BACKWARD);
        attention_block_backward(m, l, B, T);
        lap(m, TIME_ATTENTION_BACKWARD);
    }
    embedding_backward(m->params.grads.embed, m->back.dx, ids, N, c->hidden);
    lap(m, TIME_EMBEDDING_BACKWARD);
}

// ----------------------------------------------------------------------------
// gradients of a step

// what the routers did with a micro-batch of N tokens
static void stats_add_micro_batch(StepStats *s, const Model *m, int64_t N) {
    int E = m->config.router.experts;
    s->tokens += N;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->acts.layers[l];
        for (int e = 0; e < E; e++) {
            s->counts[(int64_t)l * E + e] += a->pairs.counts[e];
        }
        for (int64_t t = 0; t < N; t++) {
            s->zero_expert += a->pairs.row_start[t] == a->pairs.row_start[t + 1];
        }
        s->active += a->pairs.num_pairs;
    }
}

// adds the gradient of one of `micro_batches` to m->params.grad, and its losses and routing to the step's
static void micro_step(Model *m, StepStats *s, const int *inputs, const int *targets, int B, int T,
                       RouterDraws draws, int micro_batches, double reg_weight) {
    int64_t N = (int64_t)B * T;
    model_forward(m, inputs, B, T, 0, draws, NULL, NULL);
    s->lm_loss += classifier(m, targets, N, (float)(1.0 / ((double)N * micro_batches)), NULL) / micro_batches;
    s->reg_loss += regulariser(m, N) / micro_batches;
    model_backward(m, inputs, B, T, reg_weight / micro_batches);
    stats_add_micro_batch(s, m, N);
}

static double gradient_norm(const Model *m) {
    double sum = 0.0;
    for (int i = 0; i < m->params.table.count; i++) {
        sum += sum_of_squares(m->params.grad + m->params.table.tensors[i].offset,
                              m->params.table.tensors[i].size);
    }
    return sqrt(sum);
}

// ----------------------------------------------------------------------------
// what a run asks of a model (llmc/trainer.h)

Model *model_open(const Config *config, const ModelSettings *s) {
    if (s->purpose == FOR_TRAINING) {
        print_memory(config, s);
    }
    check_memory(config, s);
    Model *m = NEW(Model, 1);
    model_allocate_params(m, config);
    m->seed = s->seed;
    m->everything.size = m->params.table.flat_size;
    if (s->purpose != FOR_INFERENCE) {
        model_allocate_training(m, s->purpose == FOR_TRAINING);
    }
    model_allocate_activations(m, s->B, s->T);
    return m;
}

void model_close(Model *m) {
    model_free(m);
    free(m);
}

const TensorTable *model_table(const Model *m) {
    return &m->params.table;
}

const Range *model_ranges(const Model *m, Holding holding, int *count) {
    (void)holding;
    *count = 1;
    return &m->everything;
}

static float *flat_buffer(const Model *m, ModelBuffer which) {
    float *buffers[] = {m->params.values, m->params.grad, m->params.exp_avg, m->params.exp_avg_sq};
    return buffers[which];
}

void model_get(Model *m, ModelBuffer which, int64_t first, int64_t n, float *out) {
    memcpy(out, flat_buffer(m, which) + first, (size_t)n * sizeof(float));
}

void model_set(Model *m, ModelBuffer which, int64_t first, int64_t n, const float *x) {
    memcpy(flat_buffer(m, which) + first, x, (size_t)n * sizeof(float));
}

// the products read the parameters themselves
void model_publish(Model *m) {
    (void)m;
}

void model_route(Model *m, RouterMethod method, int k) {
    m->config.router.method = method;
    m->k = k;
}

void model_gradients(Model *m, Prefetcher *ahead, int64_t step, int micro_batches, int B, int T,
                     double reg_weight, StepStats *s) {
    uint64_t key = draw_key(m->seed, step);
    m->last_lap = seconds_now();
    stats_reset(s, &m->config);
    zero_floats(m->params.grad, m->params.table.flat_size);
    lap(m, TIME_UPDATE);
    for (int micro_batch = 0; micro_batch < micro_batches; micro_batch++) {
        int *inputs, *targets;
        prefetch_next(ahead, &inputs, &targets);
        lap(m, TIME_DATA);
        RouterDraws draws = {&key, (int64_t)micro_batch * B * T, 0};
        micro_step(m, s, inputs, targets, B, T, draws, micro_batches, reg_weight);
    }
    s->grad_norm = gradient_norm(m);
    lap(m, TIME_NORM);
}

void model_balance(Model *m, float rate, const int64_t *counts) {
    int E = m->config.router.experts;
    for (int l = 0; l < m->config.layers; l++) {
        router_auxfree_balance(m->params.weights.layers[l].bias, counts + (int64_t)l * E, E, rate);
    }
}

void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t) {
    m->last_lap = seconds_now();
    AdamW adamw = {0.9, 0.999, 1e-8};
    for (int i = 0; i < m->params.table.count; i++) {
        const Tensor *tensor = &m->params.table.tensors[i];
        int64_t at = tensor->offset;
        adamw_update(m->params.values + at, m->params.exp_avg + at, m->params.exp_avg_sq + at,
                     m->params.grad + at, tensor->size, adamw, lr, tensor->decay ? weight_decay : 0.0,
                     grad_scale, t);
    }
    lap(m, TIME_UPDATE);
}

void model_loss_begin(Model *m, const int *inputs, const int *targets, int B, int T) {
    Losses *losses = &m->losses;
    int64_t i = losses->begun++ % MOST_LOSSES;
    m->last_lap = seconds_now();
    model_forward(m, inputs, B, T, 0, no_draws, NULL, NULL);
    losses->loss[i] = classifier(m, targets, (int64_t)B * T, 0.0f, NULL);
    losses->active[i] = 0;
    lap(m, TIME_HEAD);
    for (int l = 0; l < m->config.layers; l++) {
        losses->active[i] += m->acts.layers[l].pairs.num_pairs;
    }
}

double model_loss_end(Model *m, int64_t *active) {
    int64_t i = m->losses.ended++ % MOST_LOSSES;
    if (active != NULL) {
        *active = m->losses.active[i];
    }
    return m->losses.loss[i];
}

void model_look(Model *m, const int *inputs, int B, int T) {
    model_forward(m, inputs, B, T, 0, no_draws, NULL, NULL);
}

void model_masks(Model *m, int64_t N, uint64_t *masks) {
    int E = m->config.router.experts;
    for (int l = 0; l < m->config.layers; l++) {
        pairs_to_bits(masks + l * N * bit_words(E), &m->acts.layers[l].pairs, E);
    }
}

void model_gates(Model *m, int64_t N, float *const *gates) {
    (void)N; // the lists know
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->acts.layers[l];
        router_gates(gates[l], &a->pairs, a->router_logits, router_in_force(m));
    }
}

void model_token_losses(Model *m, int64_t N, float *losses) {
    memcpy(losses, m->acts.losses, (size_t)N * sizeof(float));
}

// log likelihoods of n targets, of the packed rows `rows`
static void score_rows(Model *m, const int *rows, const int *targets, int64_t n, float *ll,
                       unsigned char *greedy) {
    int d = m->config.hidden, V = m->config.vocab_size;
    float *gathered = m->acts.x; // which nobody reads after the last norm
    for (int64_t first = 0; first < n; first += m->acts.logit_rows) {
        int64_t count = n - first < m->acts.logit_rows ? n - first : m->acts.logit_rows;
        for (int64_t i = 0; i < count; i++) {
            memcpy(gathered + i * d, m->acts.normed + (int64_t)rows[first + i] * d,
                   (size_t)d * sizeof(float));
        }
        matmul_forward(m->acts.logits, gathered, m->params.weights.head, count, d, V);
        crossentropy_score(ll + first, greedy + first, m->acts.logits, targets + first, count, V);
    }
}

// sequences that begin alike share what they have in common
static void score_branches(Model *m, const ScoreBatch *s, float *ll, unsigned char *greedy) {
    Branch *branches = NEW(Branch, s->B);
    int *packed = NEW(int, (int64_t)s->B * s->T), *rows = NEW(int, s->n);
    int N = branches_plan(branches, packed, s->ids, s->lengths, s->contexts, s->B, s->T);
    Positions positions = {s->B, s->T, 0, branches, N};
    forward_rows(m, packed, positions, segments_of(1, N, N, NULL), no_draws, NULL);
    for (int64_t i = 0; i < s->n; i++) {
        rows[i] = branch_row(&branches[s->rows[i] / s->T], s->rows[i] % s->T);
    }
    score_rows(m, rows, s->targets, s->n, ll, greedy);
    free(branches);
    free(packed);
    free(rows);
}

// (where a sequence's context decides how its experts are merged, each sequence has its own)
void model_score(Model *m, const ScoreBatch *s, float *ll, unsigned char *greedy) {
    if (router_merges(m->config.router.method)) {
        model_forward(m, s->ids, s->B, s->T, 0, no_draws, s->contexts, NULL);
        score_rows(m, s->rows, s->targets, s->n, ll, greedy);
    } else {
        score_branches(m, s, ll, greedy);
    }
}

int model_shares_contexts(void) {
    return 1;
}

// [V]: logits of position n - 1 of one sequence; the positions before start are in the cache
static float *next_logits(Model *m, const int *ids, int n, int start) {
    int d = m->config.hidden;
    model_forward(m, ids + start, 1, n, start, no_draws, &n, NULL); // n: the prompt, if start is 0
    matmul_forward(m->acts.logits, m->acts.normed + (int64_t)(n - 1 - start) * d, m->params.weights.head, 1,
                   d, m->config.vocab_size);
    return m->acts.logits;
}

void model_read(Model *m, const int *ids, int n, const Sampling *s, int64_t draw, int64_t most) {
    (void)most;
    memcpy(m->text.ids, ids, (size_t)n * sizeof(int));
    m->text.length = n;
    m->text.cached = 0;
    m->text.sampling = *s;
    m->text.draw = draw;
}

int model_next_token(Model *m) {
    Text *text = &m->text;
    float *logits = next_logits(m, text->ids, text->length, text->cached);
    int token = sample_next(logits, &text->sampling, text->draw++);
    text->cached = text->length;
    text->ids[text->length++] = token;
    return token;
}

void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, float *const *draws,
                   StepStats *s) {
    int64_t N = (int64_t)B * T;
    uint64_t key = draw_key(m->seed, 0);
    RouterDraws first = {&key, 0, 0};
    zero_floats(m->params.grad, m->params.table.flat_size);
    model_forward(m, inputs, B, T, 0, first, NULL, forced);
    s->lm_loss = classifier(m, targets, N, 1.0f / (float)N, logits);
    s->reg_loss = regulariser(m, N);
    model_backward(m, inputs, B, T, reg_weight);
    stats_add_micro_batch(s, m, N);
    s->grad_norm = gradient_norm(m);
    if (gates != NULL) {
        model_gates(m, N, gates);
    }
    for (int l = 0; l < m->config.layers && draws != NULL; l++) {
        router_sparsemixer_draws(draws[l], m->acts.layers[l].pairs.rounds, N, m->config.router.experts, m->k);
    }
}

int model_weight_bytes(void) {
    return sizeof(float);
}

int model_takes_ranks(void) {
    return 0;
}

double model_memory_gb(const Model *m) {
    (void)m;
    return peak_memory_gb(); // of the whole process
}

// a CPU has no peak that all agree on
double model_peak_flops(const Model *m) {
    (void)m;
    return 0.0;
}

double model_peak_bytes(const Model *m) {
    (void)m;
    return 0.0;
}

double model_profile(Model *m, int on) {
    static const char *const names[TIME_ROWS] = {"waiting for data",
                                                 "embedding",
                                                 "attention",
                                                 "router and experts",
                                                 "head and loss, both ways",
                                                 "router and experts, backward",
                                                 "attention, backward",
                                                 "embedding, backward",
                                                 "gradient norm",
                                                 "zeroing and AdamW"};
    double sum = 0.0;
    for (int row = 0; row < TIME_ROWS; row++) {
        sum += m->seconds[row];
    }
    for (int row = 0; row < TIME_ROWS && !on; row++) {
        if (m->seconds[row] > 0.0) { // (a forward pass alone has no backward rows)
            printf("          %-28s %9.1f ms %5.1f %%\n", names[row], 1e3 * m->seconds[row],
                   100.0 * m->seconds[row] / sum);
        }
    }
    memset(m->seconds, 0, sizeof(m->seconds));
    return 0.0;
}

// ----------------------------------------------------------------------------
// the run: options, data, step after step, log, checkpoints

// defines: run_main; streams_open
#include "llmc/run/main.h"
#include "llmc/streams.h"

int main(int argc, char **argv) {
    streams_open();
    return run_main("./train_remoe", argc, argv);
}
