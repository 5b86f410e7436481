/*
train_remoe.c: the CPU reference trainer of ReMoE (mixture-of-experts language models with a ReLU router),
fp32, OpenMP.

One file, read top to bottom: the model's memory, forward, backward, update, and what a run does with them.
The mathematics of each step stands in its own header under llmc/; the CUDA trainer has the same order and the
same names.

    tokens -> embedding -> L layers -> RMSNorm -> lm_head -> cross entropy -> loss, and back
    a layer   x = x + Attn(RMSNorm(x))      RMSNorm -> qkv -> RoPE -> attention -> o -> +
              x = x + MoE(RMSNorm(x))       RMSNorm -> router -> dispatch -> experts -> combine -> +

Letters: B sequences, T tokens each, N = B T, d hidden, L layers, H heads, KV key/value heads, hd head size, V
vocabulary, E = E_tot experts, k = k_tot active, F width of an expert, P active (token, expert) pairs.

    make train_remoe && ./train_remoe            the tiny preset on the built-in sample (make sample-data)
    ./train_remoe --help                         all options
*/
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
// defines: open, flock, sysconf; omp_set_num_threads, omp_get_max_threads
// defines: die, warn, NEW, GROW
#include "llmc/check.h"
// defines: rng_uniform
#include "llmc/rng.h"
// defines: Options, options_parse, options_defaults, options_help
#include "llmc/options.h"
// defines: Config, config_from_options, config_read, config_params, config_flops
#include "llmc/config.h"
// defines: TensorTable, Weights, LayerWeights, model_tensors, model_init
#include "llmc/model.h"
// defines: DataLoader, dataloader_open, dataloader_sequence; Prefetch
#include "llmc/dataloader.h"
#include "llmc/prefetch.h"
// defines: Tokenizer, tokenizer_load, tokenizer_encode, tokenizer_piece
#include "llmc/tokenizer.h"
// defines: matmul_forward, matmul_backward, sgemm
#include "llmc/matmul.h"
// defines: embedding_*, rmsnorm_*, rope_*, attention_* (forward, backward)
#include "llmc/attention.h"
#include "llmc/embedding.h"
#include "llmc/rmsnorm.h"
#include "llmc/rope.h"
// defines: PairList, router_forward, router_loss, router_backward; Dispatch, dispatch_sort; experts_forward,
// experts_backward
#include "llmc/dispatch.h"
#include "llmc/experts.h"
#include "llmc/router.h"
// defines: crossentropy_forward_backward
#include "llmc/crossentropy.h"
// defines: adamw_update, clip_scale, sum_of_squares; schedule_lr; LambdaState, lambda_update, stage_update
#include "llmc/adamw.h"
#include "llmc/lambda.h"
#include "llmc/schedule.h"
// defines: sample_token
#include "llmc/sampler.h"
// defines: RunState, checkpoint_save, checkpoint_load_*; Safetensors
#include "llmc/checkpoint.h"
#include "llmc/safetensors.h"
// defines: dump_write, dump_read_routes
#include "llmc/dump.h"
// defines: read_options, default_out, wants_training
#include "llmc/startup.h"
// defines: StepRecord, log_step, log_validation, print_step, seconds_now
#include "llmc/logger.h"

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
    float *router_logits; // [N, E] (the softmax for topk and ec)
    PairList pairs;       // who goes where, with which gate
    Dispatch dispatch;    // the same, sorted by expert
    int64_t *counts;      // [E] tokens of each expert in the micro-batch
    float *h;             // [P, 2F] up-projections; grows with P
    int64_t h_capacity;
} LayerActs;

typedef struct {
    Config config;
    TensorTable table;
    Weights weights, grads;
    float *params, *grad, *exp_avg, *exp_avg_sq; // [num_params] each; the last three NULL without training
    LayerActs *layers;                           // [L]
    float *rope;                                 // [T, hd]
    float *x;                                    // [N, d] the residual stream after the last layer
    float *normed, *rstd;                        // [N, d], [N] final norm
    float *logits;                               // [chunk, V]
    int64_t logit_rows;                          // chunk
    float *losses;                               // [N]
    float *dx, *dnormed, *datt, *dqkv; // gradients of the residual stream, a norm's output, att, qkv
    float *drouter;                    // [N, E]
    float *dgate;                      // [P]
    int64_t dgate_capacity;
    float *scratch; // the experts' rows: P (d + F + 1) floats; grows with P
    int64_t scratch_capacity;
    int B, T; // the largest micro-batch
    int k;    // k_tot in force (the near-dense warm-up of topk raises it)
} Model;

static float *floats(int64_t n) {
    return NEW(float, n);
}

enum { COPY_BLOCK = 16384 }; // floats: what one thread copies or clears at a time

static void copy_floats(float *to, const float *from, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += COPY_BLOCK) {
        memcpy(to + i, from + i, (size_t)(n - i < COPY_BLOCK ? n - i : COPY_BLOCK) * sizeof(float));
    }
}

static void zero_floats(float *x, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += COPY_BLOCK) {
        memset(x + i, 0, (size_t)(n - i < COPY_BLOCK ? n - i : COPY_BLOCK) * sizeof(float));
    }
}

// bytes of weights (with gradients and moments) and of what a micro-batch of N tokens, each with `active`
// experts, keeps
static double model_bytes(const Config *c, int64_t N, double active, int training) {
    double d = c->hidden, E = c->router.experts;
    double layer = 5.0 * d + (double)config_qkv_width(c) + c->heads + E + 2.0 + active * (2.0 * c->ffn + 5.0);
    double shared = 7.0 * d + (double)config_qkv_width(c) + E + active * (d + c->ffn + 2.0);
    double weights = (double)config_params(c, c->router.experts) * (training ? 4.0 : 1.0);
    return 4.0 * (weights + (double)N * (c->layers * layer + shared));
}

// refuses before anything is allocated what the machine's memory cannot hold
static void check_memory(const Config *c, const Options *o, int training) {
    int fresh = c->router.method == ROUTER_RELU && o->load[0] == '\0' && o->resume[0] == '\0';
    double active = fresh ? 0.5 * c->router.experts : c->router.active; // about half are on at initialisation
    double have = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    int64_t N = o->batch * o->seq_len;
    double need = model_bytes(c, N, active, training);
    double fixed = model_bytes(c, 0, active, training);
    if (need > have) {
        double rows = (have - fixed) / (need - fixed) * (double)o->batch;
        die("the run needs %.1f GB of memory, the machine has %.1f\n  ---> use %s", 1e-9 * need, 1e-9 * have,
            rows < 1.0 ? "a smaller model, or a shorter --seq-len" : "a smaller --batch");
    }
}

static void model_allocate_params(Model *m, const Config *config) {
    memset(m, 0, sizeof(*m));
    m->config = *config;
    m->k = config->router.active;
    model_tensors(&m->table, &m->weights, config, NULL);
    m->params = floats(m->table.num_params);
    model_tensors(&m->table, &m->weights, config, m->params);
}

static void model_allocate_training(Model *m, int with_moments) {
    m->grad = floats(m->table.num_params);
    model_tensors(&m->table, &m->grads, &m->config, m->grad);
    if (with_moments) {
        m->exp_avg = floats(m->table.num_params);
        m->exp_avg_sq = floats(m->table.num_params);
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
    a->counts = NEW(int64_t, c->router.experts);
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
    m->B = B;
    m->T = T;
    m->layers = NEW(LayerActs, c->layers);
    for (int l = 0; l < c->layers; l++) {
        layer_allocate(&m->layers[l], c, N);
    }
    m->rope = floats((int64_t)T * c->head_size);
    rope_table(m->rope, T, c->head_size, c->rope_theta);
    m->x = floats(N * d);
    m->normed = floats(N * d);
    m->rstd = floats(N);
    m->logit_rows = classifier_rows(N, c->vocab_size);
    m->logits = floats(m->logit_rows * c->vocab_size);
    m->losses = floats(N);
    if (m->grad != NULL) {
        m->dx = floats(N * d);
        m->dnormed = floats(N * d);
        m->datt = floats(N * d);
        m->dqkv = floats(N * config_qkv_width(c));
        m->drouter = floats(router_has_weights(c->router.method) ? N * c->router.experts : 0);
    }
}

static void model_free(Model *m) {
    for (int l = 0; l < m->config.layers && m->layers != NULL; l++) {
        LayerActs *a = &m->layers[l];
        float *buffers[] = {a->x,   a->attn_normed, a->attn_rstd, a->qkv,           a->att, a->lse,
                            a->mid, a->ffn_normed,  a->ffn_rstd,  a->router_logits, a->h};
        for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
            free(buffers[i]);
        }
        free(a->counts);
        pairs_free(&a->pairs);
        dispatch_free(&a->dispatch);
    }
    float *buffers[] = {m->params, m->grad, m->exp_avg, m->exp_avg_sq, m->rope,   m->x,
                        m->normed, m->rstd, m->logits,  m->losses,     m->dx,     m->dnormed,
                        m->datt,   m->dqkv, m->drouter, m->dgate,      m->scratch};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
        free(buffers[i]);
    }
    free(m->layers);
    free(m->table.tensors);
    free(m->weights.layers);
    free(m->grads.layers);
}

// the number of pairs is known only once the router has spoken: buffers follow it
static void layer_reserve_pairs(Model *m, LayerActs *a) {
    int64_t P = a->pairs.num_pairs, d = m->config.hidden, F = m->config.ffn;
    if (P > a->h_capacity) {
        a->h_capacity = P;
        free(a->h);
        a->h = floats(P * 2 * F);
    }
    if (P > m->dgate_capacity) {
        m->dgate_capacity = P;
        free(m->dgate);
        m->dgate = floats(P);
    }
    if (P * (d + F + 1) > m->scratch_capacity) {
        m->scratch_capacity = P * (d + F + 1);
        free(m->scratch);
        m->scratch = floats(m->scratch_capacity);
    }
}

// ----------------------------------------------------------------------------
// forward

// x [N, d] -> mid [N, d] = x + Attn(RMSNorm(x)); rows start .. T-1 of each sequence
static void attention_block_forward(Model *m, int l, int B, int T, int start) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerActs *a = &m->layers[l];
    int64_t N = (int64_t)B * (T - start);
    int d = c->hidden, width = (int)config_qkv_width(c);
    float *qkv = a->qkv + (int64_t)start * width; // start > 0 has B = 1: its rows follow the cached ones
    rmsnorm_forward(a->attn_normed, a->attn_rstd, a->x, w->attn_norm, N, d, (float)c->norm_eps);
    matmul_forward(qkv, a->attn_normed, w->qkv, N, d, width);
    rope_forward(qkv, m->rope, B, T - start, start, c->heads + c->kv_heads, c->head_size, width);
    attention_forward(a->att, a->lse, a->qkv, B, T, start, c->heads, c->kv_heads, c->head_size);
    copy_floats(a->mid, a->x, N * d);
    sgemm(0, 1, (int)N, d, d, a->att, d, w->o, d, a->mid, d, 1); // mid += att W_o^T
}

static Router router_in_force(const Model *m) {
    Router router = m->config.router;
    router.active = m->k;
    return router;
}

// mid [N, d] -> out [N, d] = mid + MoE(RMSNorm(mid)), sum over the active experts (Eq. 1)
static void moe_block_forward(Model *m, int l, float *out, const int *ids, int64_t N, const float *forced) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerActs *a = &m->layers[l];
    int d = c->hidden, E = c->router.experts;
    rmsnorm_forward(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, (float)c->norm_eps);
    if (w->router != NULL) {
        matmul_forward(a->router_logits, a->ffn_normed, w->router, N, d, E); // z = W x
    }
    router_forward(&a->pairs, a->router_logits, ids, forced, router_in_force(m), N);
    pairs_count(a->counts, &a->pairs, E);
    dispatch_sort(&a->dispatch, &a->pairs, E);
    layer_reserve_pairs(m, a);
    copy_floats(out, a->mid, N * d);
    experts_forward(out, a->h, a->ffn_normed, w->gate_up, w->down, &a->pairs, &a->dispatch, E, d, c->ffn,
                    m->scratch);
}

// ids [N]: rows start .. T-1 of B sequences (start > 0 only with B = 1: the earlier positions are in the qkv
// buffers). forced: NULL, or for each layer an active set [N, E] that replaces the router's own
static void model_forward(Model *m, const int *ids, int B, int T, int start, const float *const *forced) {
    const Config *c = &m->config;
    int64_t N = (int64_t)B * (T - start);
    embedding_forward(m->layers[0].x, ids, m->weights.embed, N, c->hidden);
    for (int l = 0; l < c->layers; l++) {
        float *out = l + 1 < c->layers ? m->layers[l + 1].x : m->x;
        attention_block_forward(m, l, B, T, start);
        moe_block_forward(m, l, out, ids, N, forced != NULL ? forced[l] : NULL);
    }
    rmsnorm_forward(m->normed, m->rstd, m->x, m->weights.norm, N, c->hidden, (float)c->norm_eps);
}

// mean loss over N targets. grad_scale != 0: the head's gradient and dnormed too, of grad_scale * sum of the
// losses; all_logits: NULL, or [N, V] to keep them
static double classifier(Model *m, const int *targets, int64_t N, float grad_scale, float *all_logits) {
    int d = m->config.hidden, V = m->config.vocab_size;
    for (int64_t first = 0; first < N; first += m->logit_rows) {
        int64_t rows = N - first < m->logit_rows ? N - first : m->logit_rows;
        const float *normed = m->normed + first * d;
        matmul_forward(m->logits, normed, m->weights.head, rows, d, V);
        if (all_logits != NULL) {
            memcpy(all_logits + first * V, m->logits, (size_t)(rows * V) * sizeof(float));
        }
        crossentropy_forward_backward(m->losses + first, m->logits, targets + first, rows, V, grad_scale);
        if (grad_scale != 0.0f) {
            matmul_backward(m->dnormed + first * d, m->grads.head, m->logits, normed, m->weights.head, rows,
                            d, V);
        }
    }
    double sum = 0.0;
    for (int64_t n = 0; n < N; n++) {
        sum += m->losses[n];
    }
    return sum / (double)N;
}

// the column `reg` (router.h) of a micro-batch of N tokens
static double regulariser(const Model *m, int64_t N) {
    double reg = 0.0;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->layers[l];
        reg += router_loss(&a->pairs, a->router_logits, a->counts, router_in_force(m), N, m->config.layers);
    }
    return reg;
}

// ----------------------------------------------------------------------------
// backward, in the forward's reverse order; m->dx carries the residual stream's gradient

static void moe_block_backward(Model *m, int l, int64_t N, double reg_weight) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerWeights *g = &m->grads.layers[l];
    LayerActs *a = &m->layers[l];
    int d = c->hidden, E = c->router.experts;
    zero_floats(m->dnormed, N * d);
    experts_backward(m->dnormed, m->dgate, g->gate_up, g->down, m->dx, a->ffn_normed, a->h, w->gate_up,
                     w->down, &a->pairs, &a->dispatch, E, d, c->ffn, m->scratch);
    if (w->router != NULL) {
        router_backward(m->drouter, m->dgate, &a->pairs, a->router_logits, a->counts, router_in_force(m), N,
                        c->layers, reg_weight);
        sgemm(0, 0, (int)N, d, E, m->drouter, E, w->router, d, m->dnormed, d, 1); // dnormed += dz W
        matmul_backward(NULL, g->router, m->drouter, a->ffn_normed, w->router, N, d, E);
    }
    rmsnorm_backward(m->dx, g->ffn_norm, m->dnormed, a->mid, w->ffn_norm, a->ffn_rstd, N, d);
}

static void attention_block_backward(Model *m, int l, int B, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerWeights *g = &m->grads.layers[l];
    LayerActs *a = &m->layers[l];
    int64_t N = (int64_t)B * T;
    int d = c->hidden, width = (int)config_qkv_width(c);
    matmul_backward(m->datt, g->o, m->dx, a->att, w->o, N, d, d);
    attention_backward(m->dqkv, m->datt, a->qkv, a->lse, B, T, c->heads, c->kv_heads, c->head_size);
    rope_backward(m->dqkv, m->rope, B, T, 0, c->heads + c->kv_heads, c->head_size, width);
    matmul_backward(m->dnormed, g->qkv, m->dqkv, a->attn_normed, w->qkv, N, d, width);
    rmsnorm_backward(m->dx, g->attn_norm, m->dnormed, a->x, w->attn_norm, a->attn_rstd, N, d);
}

// after model_forward and classifier (which left dnormed): adds to all gradients. reg_weight: of the
// regulariser
static void model_backward(Model *m, const int *ids, int B, int T, double reg_weight) {
    const Config *c = &m->config;
    int64_t N = (int64_t)B * T;
    zero_floats(m->dx, N * c->hidden);
    rmsnorm_backward(m->dx, m->grads.norm, m->dnormed, m->x, m->weights.norm, m->rstd, N, c->hidden);
    for (int l = c->layers - 1; l >= 0; l--) {
        moe_block_backward(m, l, N, reg_weight);
        attention_block_backward(m, l, B, T);
    }
    embedding_backward(m->grads.embed, m->dx, ids, N, c->hidden);
}

// ----------------------------------------------------------------------------
// one optimizer step

// what a step learned of routing, over its micro-batches
typedef struct {
    int64_t tokens;      // N of the step
    int64_t *counts;     // [L, E] tokens of each expert
    int64_t zero_expert; // (layer, token) pairs without an expert
    int64_t active;      // pairs
    double lm_loss, reg_loss;
} StepStats;

static void stats_reset(StepStats *s, const Config *c) {
    if (s->counts == NULL) {
        s->counts = NEW(int64_t, (int64_t)c->layers * c->router.experts);
    }
    memset(s->counts, 0, (size_t)(c->layers * c->router.experts) * sizeof(int64_t));
    s->tokens = s->zero_expert = s->active = 0;
    s->lm_loss = s->reg_loss = 0.0;
}

static void stats_add_micro_batch(StepStats *s, const Model *m, int64_t N) {
    int E = m->config.router.experts;
    s->tokens += N;
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->layers[l];
        for (int e = 0; e < E; e++) {
            s->counts[(int64_t)l * E + e] += a->counts[e];
        }
        for (int64_t t = 0; t < N; t++) {
            s->zero_expert += a->pairs.row_start[t] == a->pairs.row_start[t + 1];
        }
        s->active += a->pairs.num_pairs;
    }
}

// weight of the regulariser in the loss (Eq. 6)
static double regulariser_weight(const Config *c, double lambda, double aux_coeff) {
    return c->router.method == ROUTER_RELU ? lambda : c->router.method == ROUTER_TOPK ? aux_coeff : 0.0;
}

// adds the gradient of one of `micro_batches` to m->grad, and its losses and routing to the step's
static void micro_step(Model *m, StepStats *s, const int *inputs, const int *targets, int B, int T,
                       int micro_batches, double reg_weight) {
    int64_t N = (int64_t)B * T;
    model_forward(m, inputs, B, T, 0, NULL);
    s->lm_loss += classifier(m, targets, N, (float)(1.0 / ((double)N * micro_batches)), NULL) / micro_batches;
    s->reg_loss += regulariser(m, N) / micro_batches;
    model_backward(m, inputs, B, T, reg_weight / micro_batches);
    stats_add_micro_batch(s, m, N);
}

static double gradient_norm(const Model *m) {
    double sum = 0.0;
    for (int i = 0; i < m->table.count; i++) {
        sum += sum_of_squares(m->grad + m->table.tensors[i].offset, m->table.tensors[i].size);
    }
    return sqrt(sum);
}

static void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t) {
    AdamW adamw = {0.9, 0.999, 1e-8};
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *tensor = &m->table.tensors[i];
        int64_t at = tensor->offset;
        adamw_update(m->params + at, m->exp_avg + at, m->exp_avg_sq + at, m->grad + at, tensor->size, adamw,
                     lr, tensor->decay ? weight_decay : 0.0, grad_scale, t);
    }
}

// ----------------------------------------------------------------------------
// a run

enum { BAD_STEPS_LIMIT = 3 }; // non-finite steps in a row that end a run

static volatile sig_atomic_t stop_requested; // a signal's only way to speak

static void request_stop(int signal_number) {
    if (signal_number == SIGINT) {
        signal(SIGINT, SIG_DFL); // a second Ctrl-C does not wait for the end of the step
    }
    stop_requested = 1;
}

typedef struct {
    Options options;
    Model model;
    RunState state;
    Schedule schedule;
    DataLoader train;
    Prefetcher ahead;     // batches of `train`, assembled while a step computes
    Tokenizer *tokenizer; // NULL: no text can be shown
    char log_path[PATH_SIZE];
    FILE *log;
    StepStats stats;
    double *layer_sparsity; // [L]
    int *inputs, *targets;  // [B, T]
    int micro_batches;      // a step
    int bad_steps;          // non-finite, in a row
    int64_t first_step;     // of this process
    double started;         // seconds_now() then
} Run;

static int has_lambda(const Run *run) {
    return run->model.config.router.method == ROUTER_RELU;
}

static int k_in_force(const Options *o, const Config *c, int64_t step) {
    if (c->router.method != ROUTER_TOPK || step >= o->topk_warmup_steps) {
        return c->router.active;
    }
    int64_t k = o->topk_warmup_k * c->granularity;
    return k < c->router.experts ? (int)k : c->router.experts;
}

static void fill_record(Run *run, StepRecord *r, double norm, double lr, double seconds) {
    const Config *c = &run->model.config;
    const StepStats *s = &run->stats;
    int E = c->router.experts;
    int64_t cells = (int64_t)c->layers * E;
    memset(r, 0, sizeof(*r));
    r->step = run->state.step;
    r->lm_loss = s->lm_loss;
    r->reg_loss = s->reg_loss;
    r->lambda = run->state.sparsity.lambda;
    r->layers = c->layers;
    r->layer_sparsity = run->layer_sparsity;
    r->tokens_min = s->counts[0];
    for (int l = 0; l < c->layers; l++) {
        int64_t active = 0;
        for (int e = 0; e < E; e++) {
            int64_t count = s->counts[(int64_t)l * E + e];
            active += count;
            r->tokens_min = count < r->tokens_min ? count : r->tokens_min;
            r->tokens_max = count > r->tokens_max ? count : r->tokens_max;
            r->dead_experts += count == 0;
        }
        run->layer_sparsity[l] = sparsity_of(active, s->tokens * E);
    }
    r->tokens_mean = (double)s->active / (double)cells;
    r->zero_expert_tokens = s->zero_expert;
    r->sparsity = sparsity_of(s->active, s->tokens * cells);
    r->active_experts = (double)s->active / (double)(s->tokens * c->layers);
    r->grad_norm = norm;
    r->lr = lr;
    r->ms = 1000.0 * seconds;
    r->tok_s = (double)s->tokens / seconds;
    double sequences = (double)s->tokens / (double)run->options.seq_len;
    r->tflops = config_flops(c, run->options.seq_len, c->router.active) * sequences / seconds * 1e-12;
    r->tflops_active = config_flops(c, run->options.seq_len, r->active_experts) * sequences / seconds * 1e-12;
    r->mfu = r->mfu_active = -1.0; // a CPU has no peak that all agree on
    r->mem_gb = peak_memory_gb();
}

// one optimizer step: gradients, clipping, AdamW, then lambda. Fills the record; returns 0 when the step was
// skipped
static int train_step(Run *run, StepRecord *record) {
    Model *m = &run->model;
    const Options *o = &run->options;
    const Config *c = &m->config;
    double begin = seconds_now();
    double lr = schedule_lr(run->schedule, run->state.step);
    double weight = regulariser_weight(c, run->state.sparsity.lambda, o->aux_coeff);
    m->k = k_in_force(o, c, run->state.step);
    stats_reset(&run->stats, c);
    zero_floats(m->grad, m->table.num_params);
    for (int micro_batch = 0; micro_batch < run->micro_batches; micro_batch++) {
        int *inputs, *targets;
        prefetch_next(&run->ahead, &inputs, &targets);
        micro_step(m, &run->stats, inputs, targets, (int)o->batch, (int)o->seq_len, run->micro_batches,
                   weight);
    }
    double norm = gradient_norm(m);
    int finite = isfinite(run->stats.lm_loss) && isfinite(run->stats.reg_loss) && isfinite(norm);
    if (finite) {
        model_update(m, lr, o->weight_decay, clip_scale(norm, o->grad_clip), ++run->state.optimizer_step);
    }
    fill_record(run, record, norm, lr, seconds_now() - begin);
    if (finite && has_lambda(run)) {
        int64_t pairs = run->stats.tokens * c->layers * c->router.experts;
        stage_update(&run->state.sparsity, run->state.step, run->stats.active, pairs, c->router.experts,
                     c->router.active);
        lambda_update(&run->state.sparsity, run->stats.active, pairs, c->router.experts, c->router.active);
    }
    record->stage = has_lambda(run) ? run->state.sparsity.stage : 0;
    run->state.sequences += (int64_t)run->micro_batches * o->batch;
    run->state.step++;
    return finite;
}

static void save(Run *run) {
    checkpoint_save(run->options.out, &run->model.config, &run->model.table, run->model.params,
                    run->model.exp_avg, run->model.exp_avg_sq, &run->state, &run->options);
    printf("saved %s/step_%08lld\n", run->options.out, (long long)run->state.step);
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// validation

// mean loss of up to val_batches micro-batches of one shard, its windows in order; *tokens counts the targets
static double validate_file(Run *run, const char *path, int64_t *tokens) {
    const Options *o = &run->options;
    DataLoader loader;
    dataloader_open(&loader, path, (int)o->seq_len, 0, 0);
    int64_t sequences = dataloader_num_sequences(&loader);
    int64_t most = o->val_batches * o->batch;
    double sum = 0.0;
    *tokens = 0;
    sequences = sequences < most ? sequences : most;
    for (int64_t first = 0; first < sequences; first += o->batch) {
        int B = (int)(sequences - first < o->batch ? sequences - first : o->batch);
        int64_t N = (int64_t)B * o->seq_len;
        for (int b = 0; b < B; b++) {
            dataloader_sequence(&loader, first + b, run->model.config.vocab_size,
                                run->inputs + b * o->seq_len, run->targets + b * o->seq_len);
        }
        model_forward(&run->model, run->inputs, B, (int)o->seq_len, 0, NULL);
        sum += classifier(&run->model, run->targets, N, 0.0f, NULL) * (double)N;
        *tokens += N;
    }
    dataloader_close(&loader);
    return sum / (double)*tokens;
}

// every domain of --val-data, then all together; ec routes within its micro-batch
static void validate(Run *run) {
    if (run->options.val_data[0] == '\0') {
        return;
    }
    DataDomain *domains;
    int count = dataloader_domains(run->options.val_data, &domains);
    double sum = 0.0;
    int64_t total = 0;
    run->model.k = run->model.config.router.active;
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < count; i++) {
        int64_t tokens;
        double loss = validate_file(run, domains[i].path, &tokens);
        sum += loss * (double)tokens;
        total += tokens;
        printf(" %s %.4f", domains[i].name, loss);
        fflush(stdout);
        if (run->log != NULL) {
            log_validation(run->log, run->log_path, run->state.step, loss, domains[i].name);
        }
    }
    printf(" | all %.4f\n", sum / (double)total);
    if (run->log != NULL) {
        log_validation(run->log, run->log_path, run->state.step, sum / (double)total, "all");
    }
    dataloader_free_domains(domains, count);
}

// ----------------------------------------------------------------------------
// sampling

// logits of the last of the positions start .. n-1, whose ids are given; the earlier positions are in the
// cache
static float *next_logits(Model *m, const int *ids, int n, int start) {
    model_forward(m, ids + start, 1, n, start, NULL);
    matmul_forward(m->logits, m->normed + (int64_t)(n - 1 - start) * m->config.hidden, m->weights.head, 1,
                   m->config.hidden, m->config.vocab_size);
    return m->logits;
}

// a generated token has no batch in which experts could choose among tokens: ec takes each token's k largest
static void generate(Run *run, const char *prompt) {
    Model *m = &run->model;
    const Options *o = &run->options;
    RouterMethod method = m->config.router.method;
    uint64_t stream = ((uint64_t)1 << 32) + (uint64_t)run->state.step; // apart from the tensors' streams
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    tokenizer_encode(run->tokenizer, prompt, strlen(prompt), &ids, &n, &capacity);
    int window = m->T;
    int *context = NEW(int, window + 1);
    int length = 1, cached = 0;
    context[0] = run->tokenizer->eot; // as every document begins
    for (size_t i = n > (size_t)(window - 1) ? n - (size_t)(window - 1) : 0; i < n; i++) {
        context[length++] = ids[i];
    }
    int allowed = run->tokenizer->vocab_size;
    m->k = m->config.router.active;
    m->config.router.method = method == ROUTER_EC ? ROUTER_TOPK : method;
    printf("%s", prompt);
    for (int64_t i = 0; i < o->sample_tokens && !stop_requested; i++) {
        if (length > window) { // the context is full: go on from its second half
            cached = 0;
            length = window / 2 > 0 ? window / 2 : 1;
            memmove(context, context + window + 1 - length, (size_t)length * sizeof(int));
        }
        float *logits = next_logits(m, context, length, cached);
        cached = length;
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
    m->config.router.method = method;
    free(context);
    free(ids);
}

static void show_sample(Run *run, const char *prompt) {
    if (run->tokenizer == NULL || run->options.sample_tokens == 0) {
        return;
    }
    if (run->model.config.router.method == ROUTER_EC) {
        warn("expert choice cannot route a single token: sampling takes each token's k largest experts");
    }
    printf("--- sample after step %lld\n", (long long)run->state.step);
    generate(run, prompt);
    printf("---\n");
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// dump: one micro-batch, forward and backward in training mode, for checkers (DESIGN.md, section 4)

static void dump(Run *run) {
    Model *m = &run->model;
    const Options *o = &run->options;
    const Config *c = &m->config;
    int B = (int)o->batch, T = (int)o->seq_len, dense = c->router.method == ROUTER_DENSE;
    int64_t N = (int64_t)B * T;
    double weight = regulariser_weight(c, run->state.sparsity.lambda, o->aux_coeff);
    float **routes = o->route_from[0] != '\0' && !dense ? dump_read_routes(o->route_from, c, N) : NULL;
    float **gates = dense ? NULL : layer_matrices(c, N);
    float *logits = N <= DUMP_MOST_LOGIT_ROWS ? floats(N * c->vocab_size) : NULL;
    for (int b = 0; b < B; b++) {
        dataloader_sequence(&run->train, b, c->vocab_size, run->inputs + b * T, run->targets + b * T);
    }
    stats_reset(&run->stats, c);
    model_forward(m, run->inputs, B, T, 0, (const float *const *)routes);
    double lm_loss = classifier(m, run->targets, N, 1.0f / (float)N, logits);
    double reg = regulariser(m, N);
    model_backward(m, run->inputs, B, T, weight);
    stats_add_micro_batch(&run->stats, m, N);
    for (int l = 0; l < c->layers && !dense; l++) {
        pairs_to_dense(gates[l], &m->layers[l].pairs, c->router.experts);
    }
    double loss = lm_loss + weight * reg;
    double sparsity = dense ? 0.0 : sparsity_of(run->stats.active, N * c->layers * c->router.experts);
    float scalars[DUMP_SCALARS] = {(float)lm_loss, (float)reg, (float)loss, (float)sparsity};
    dump_write(o->dump, c, &m->table, N, scalars, logits, (const float *const *)gates, m->grad);
    printf("lm_loss %.7f reg_loss %.7f loss %.7f sparsity %.7f -> %s\n", lm_loss, reg, loss, sparsity,
           o->dump);
    free_layer_matrices(routes);
    free_layer_matrices(gates);
    free(logits);
}

// ----------------------------------------------------------------------------
// training

static void announce_stages(const Run *run, int before) {
    const LambdaState *s = &run->state.sparsity;
    if (has_lambda(run) && before < STAGE_SPARSIFYING && s->stage >= STAGE_SPARSIFYING) {
        printf("stage II (sparsifying) began at step %lld\n", (long long)s->stage2_step);
    }
    if (has_lambda(run) && before < STAGE_SPARSE && s->stage == STAGE_SPARSE) {
        printf("stage III (sparse) began at step %lld: the settling time\n", (long long)s->stage3_step);
    }
}

static int every(int64_t period, int64_t step) {
    return period > 0 && step % period == 0;
}

static int out_of_time(const Run *run) {
    return run->options.max_minutes > 0.0 && seconds_now() - run->started > 60.0 * run->options.max_minutes;
}

// counts non-finite steps in a row; the weights are as they were before them
static void guard_finite(Run *run, int finite) {
    run->bad_steps = finite ? 0 : run->bad_steps + 1;
    if (finite) {
        return;
    }
    warn("step %lld: the loss or the gradient norm is not finite: the update is skipped",
         (long long)run->state.step - 1);
    if (run->bad_steps == BAD_STEPS_LIMIT) {
        save(run);
        die("%d non-finite steps in a row\n  ---> --resume %s with a smaller --lr, or look at the data",
            BAD_STEPS_LIMIT, run->options.out);
    }
}

static void train(Run *run) {
    const Options *o = &run->options;
    double last_print = 0.0;
    while (run->state.step < o->steps && !stop_requested && !out_of_time(run)) {
        StepRecord record;
        int stage = run->state.sparsity.stage;
        // before a step, not after the last: a run resumed here validates here, so the log misses and repeats
        // nothing
        if (run->state.step > 0 && every(o->val_every, run->state.step)) {
            validate(run);
        }
        if (run->state.step > 0 && every(o->sample_every, run->state.step)) {
            show_sample(run, "");
        }
        int finite = train_step(run, &record);
        double now = seconds_now();
        log_step(run->log, run->log_path, &record);
        announce_stages(run, stage);
        int64_t done = run->state.step - run->first_step;
        if (now - last_print > 1.0 || done <= 3 || run->state.step == o->steps) {
            print_step(&record, o->steps,
                       (now - run->started) / (double)done * (double)(o->steps - run->state.step));
            last_print = now;
        }
        guard_finite(run, finite);
        if (run->state.step == o->steps) {
            break; // the end saves, validates and samples below
        }
        if (every(o->save_every, run->state.step)) {
            save(run);
        }
    }
    double seconds = seconds_now() - run->started;
    printf("%lld steps in %.1f s; the loader was waited for %.2f %% of it\n",
           (long long)(run->state.step - run->first_step), seconds, 0.1 * run->ahead.wait_ms / seconds);
    save(run); // before anything that could fail
    if (run->state.step < o->steps) {
        printf("stopped at step %lld of %lld\n  ---> continue with --resume %s\n", (long long)run->state.step,
               (long long)o->steps, run->options.out);
        return;
    }
    validate(run);
    show_sample(run, "");
}

enum { SETTLED_STEPS = 20, TIMED_STEPS = 10, MOST_STEPS = 2000 };

// trains with one micro-batch a step until stage III, and S within 0.005 of its target over the last
// SETTLED_STEPS
static void bench_settle(Run *run, double target) {
    double recent[SETTLED_STEPS] = {0};
    int micro_batches = run->micro_batches;
    run->micro_batches = 1;
    for (int step = 0; has_lambda(run); step++) {
        StepRecord r;
        double mean = 0.0;
        train_step(run, &r);
        recent[step % SETTLED_STEPS] = r.sparsity;
        for (int i = 0; i < SETTLED_STEPS; i++) {
            mean += recent[i] / SETTLED_STEPS;
        }
        if (r.stage == STAGE_SPARSE && step >= SETTLED_STEPS && fabs(mean - target) < 0.005) {
            break;
        }
        if (step == MOST_STEPS) {
            warn("S is still %.4f, not %.4f, after %d steps: the timing below is of another sparsity", mean,
                 target, MOST_STEPS);
            break;
        }
    }
    run->micro_batches = micro_batches;
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// whole steps at the given global batch, once S has settled; medians
static void bench(Run *run) {
    const Config *c = &run->model.config;
    double target = 1.0 - (double)c->router.active / c->router.experts;
    double times[TIMED_STEPS], sparsity = 0.0, active = 0.0;
    bench_settle(run, target);
    for (int i = 0; i < TIMED_STEPS; i++) {
        StepRecord r;
        train_step(run, &r);
        times[i] = r.ms;
        sparsity += r.sparsity / TIMED_STEPS;
        active += r.active_experts / TIMED_STEPS;
    }
    qsort(times, TIMED_STEPS, sizeof(double), compare_doubles);
    double seconds = 0.5e-3 * (times[(TIMED_STEPS - 1) / 2] + times[TIMED_STEPS / 2]);
    double tokens = (double)run->stats.tokens, T = (double)run->options.seq_len;
    double nominal = config_flops(c, run->options.seq_len, c->router.active) * tokens / T / seconds;
    double measured = config_flops(c, run->options.seq_len, active) * tokens / T / seconds;
    printf("bench     %.0f tokens a step, median %.1f ms (%.1f to %.1f) | S %.4f, target %.4f\n", tokens,
           1e3 * seconds, times[0], times[TIMED_STEPS - 1], sparsity, target);
    printf(
        "          %.0f tok/s | %.1f GFLOP/s at nominal k, %.1f at the measured active experts | %.2f GB\n",
        tokens / seconds, 1e-9 * nominal, 1e-9 * measured, peak_memory_gb());
}

// ----------------------------------------------------------------------------
// setting up a run

// the first lines of the start-up table: before anything is allocated or opened, so that a refusal has its
// figures above it
static void print_model(const Options *o, const Config *c) {
    const Router *r = &c->router;
    const char *name = o->resume[0] != '\0' ? o->resume : o->load[0] != '\0' ? o->load : o->preset;
    int64_t N = o->batch * o->seq_len;
    double fixed = model_bytes(c, 0, r->active, 1);
    double gflops = 1e-9 * config_flops(c, o->seq_len, r->active);
    printf("model     %s | L %d, d %d, H %d, KV %d, hd %d, F %d, V %d, T %lld\n", name, c->layers, c->hidden,
           c->heads, c->kv_heads, c->head_size, c->ffn, c->vocab_size, (long long)o->seq_len);
    printf("router    %s | %d of %d experts (granularity %d)%s\n", router_name(r->method), r->active,
           r->experts, c->granularity,
           r->method == ROUTER_RELU && !r->load_balance ? ", no load balance" : "");
    printf("params    %lld total, %lld active | %.*f GFLOPs a sequence\n",
           (long long)config_params(c, r->experts), (long long)config_params(c, r->active),
           gflops < 100.0 ? 3 : 1, gflops);
    printf("memory    %.2f GB of weights, gradients and moments; %.2f GB of activations, %.2f if all experts "
           "are on\n",
           1e-9 * fixed, 1e-9 * (model_bytes(c, N, r->active, 1) - fixed),
           1e-9 * (model_bytes(c, N, r->experts, 1) - fixed));
}

// weights, moments and state: drawn from the seed, loaded, or resumed
static void build_model(Run *run) {
    Model *m = &run->model;
    const Options *o = &run->options;
    const char *folder = o->resume[0] != '\0' ? o->resume : o->load;
    int training = wants_training(o);
    char path[PATH_SIZE];
    Config config;
    if (folder[0] != '\0') {
        check_format(path, sizeof(path), "%s/config.json", folder);
        config = config_read(path);
    } else {
        config = config_from_options(o);
    }
    config.max_seq_len =
        o->seq_len > config.max_seq_len || folder[0] == '\0' ? (int)o->seq_len : config.max_seq_len;
    if (training) {
        print_model(o, &config);
    }
    check_memory(&config, o, training || o->dump[0] != '\0');
    model_allocate_params(m, &config);
    if (training || o->dump[0] != '\0') {
        model_allocate_training(m, training);
    }
    if (folder[0] == '\0') {
        model_init(m->params, &m->table, (uint64_t)o->seed);
    } else {
        checkpoint_load_weights(m->params, folder, &m->table);
    }
    model_allocate_activations(m, (int)o->batch, (int)o->seq_len);
}

static void build_state(Run *run, int lambda_given) {
    const Options *o = &run->options;
    RunState *state = &run->state;
    int resuming = o->resume[0] != '\0';
    RunState loaded = *state;
    state->sparsity = resuming ? loaded.sparsity : lambda_init(o->lambda_init, o->alpha);
    state->sparsity.alpha = (float)o->alpha;
    if (o->load[0] != '\0' && checkpoint_load_state(&loaded, NULL, o->load)) {
        state->optimizer_step = loaded.optimizer_step;
        state->sparsity.lambda = lambda_given ? (float)o->lambda_init : loaded.sparsity.lambda;
    }
    if (wants_training(o)) {
        const char *folder = resuming ? o->resume : o->load;
        int found = folder[0] != '\0' && checkpoint_load_moments(run->model.exp_avg, run->model.exp_avg_sq,
                                                                 folder, &run->model.table);
        if (!found) {
            state->optimizer_step = 0; // zero moments: their bias correction starts anew
        }
        if (resuming && !found) {
            die("%s has no optimizer.safetensors\n  ---> start from its weights: --load %s", folder, folder);
        }
    }
    int64_t warmup = o->warmup_steps >= 0 ? o->warmup_steps : o->steps / 100;
    Schedule schedule = {o->lr, o->lr_min, warmup, o->steps};
    run->schedule = schedule;
    run->first_step = state->step;
}

// data, text and buffers; what a run cannot do without is opened before it starts
static void open_data(Run *run) {
    const Options *o = &run->options;
    const Config *c = &run->model.config;
    char vocab[PATH_SIZE];
    check_format(vocab, sizeof(vocab), "%s/vocab.json", o->tokenizer);
    if (o->eval || o->dump[0] != '\0') {
        run->tokenizer = NULL; // no text is shown
    } else if (o->tokenizer[0] != '\0' && path_exists(vocab)) {
        run->tokenizer = tokenizer_load(o->tokenizer);
        if (run->tokenizer->vocab_size > c->vocab_size) {
            die("%s has %d tokens, the model's vocabulary only %d\n  ---> name the model's own --tokenizer",
                o->tokenizer, run->tokenizer->vocab_size, c->vocab_size);
        }
    } else if (o->sample[0] != '\0') {
        die("no tokenizer: there is no %s\n  ---> name its folder with --tokenizer, or run `make "
            "sample-data`",
            vocab);
    } else if (o->tokenizer[0] != '\0') {
        warn("no samples will be shown: there is no %s\n  ---> name a folder with --tokenizer", vocab);
    }
    run->inputs = NEW(int, o->batch * o->seq_len);
    run->targets = NEW(int, o->batch * o->seq_len);
    run->layer_sparsity = NEW(double, c->layers);
    if (!o->eval && o->sample[0] == '\0') {
        int shuffle = o->dump[0] == '\0' && o->shuffle;
        dataloader_open(&run->train, o->train_data, (int)o->seq_len, (uint64_t)o->seed, shuffle);
    }
    if (wants_training(
            o)) { // micro-batch after micro-batch in the run's order, or the first one again and again
        int64_t first = o->overfit_batch ? 0 : run->state.sequences;
        prefetch_start(&run->ahead, &run->train, (int)o->batch, c->vocab_size, first,
                       o->overfit_batch ? 0 : o->batch);
    }
    run->micro_batches = (int)(o->global_batch / o->batch);
}

static void print_table(const Run *run) {
    const Options *o = &run->options;
    const Router *r = &run->model.config.router;
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    printf("data      ");
    dataloader_print(&run->train, stdout);
    printf(" | %.1f epochs\n",
           (double)o->steps * (double)o->global_batch / (double)dataloader_num_sequences(&run->train));
    printf("schedule  %lld steps of %lld x %lld sequences | lr %g -> %g, warm-up %lld | seed %lld\n",
           (long long)o->steps, (long long)(o->global_batch / o->batch), (long long)o->batch, o->lr,
           o->lr_min, (long long)run->schedule.warmup, (long long)o->seed);
    if (r->method == ROUTER_RELU) {
        printf("sparsity  target %.4f | lambda %g, alpha %g\n", 1.0 - (double)r->active / r->experts,
               (double)run->state.sparsity.lambda, o->alpha);
    }
    printf("output    %s | %d threads\n", run->options.out, threads);
    fflush(stdout);
}

static void open_log(Run *run) {
    char name[64], folder[PATH_SIZE];
    make_folder(run->options.out);
    int lock = open(run->options.out, O_RDONLY | O_DIRECTORY); // held until the process ends, however it ends
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        die("another process trains in %s\n  ---> stop it, or choose another folder with --out",
            run->options.out);
    }
    check_format(name, sizeof(name), "step_%08lld", (long long)run->state.step);
    check_format(folder, sizeof(folder), "%.1900s/%s", run->options.out, name);
    if (run->options.resume[0] != '\0' && path_exists(folder)) {
        point_latest(run->options.out,
                     name); // to where the log is cut back: later checkpoints are of another future
    }
    check_format(run->log_path, PATH_SIZE, "%.2000s/log.jsonl", run->options.out);
    log_cut(run->log_path, run->state.step);
    run->log = check_fopen(run->log_path, "ab", "choose another folder with --out");
}

static void close_run(Run *run) {
    if (run->log != NULL) {
        check_fclose(run->log, run->log_path);
    }
    if (run->tokenizer != NULL) {
        tokenizer_free(run->tokenizer);
    }
    if (wants_training(&run->options)) {
        prefetch_stop(&run->ahead);
    }
    dataloader_close(&run->train);
    free(run->inputs);
    free(run->targets);
    free(run->layer_sparsity);
    free(run->stats.counts);
    model_free(&run->model);
    free(run);
}

// the folder that a new run writes to must not hold another one
static void open_out(Run *run) {
    Options *o = &run->options;
    char latest[PATH_SIZE], out[PATH_SIZE];
    if (o->out[0] == '\0') {
        const char *name = o->load[0] != '\0' ? "loaded" : o->preset;
        default_out(out, name, router_name(run->model.config.router.method), 0);
        check_format(o->out, OPTION_TEXT_SIZE, "%s", out);
    }
    check_format(latest, sizeof(latest), "%.1900s/latest", o->out);
    if (o->resume[0] == '\0' && path_exists(latest)) {
        die("%s already holds a run\n  ---> continue it with --resume %s, or choose another --out", o->out,
            o->out);
    }
}

static Run *open_run(int argc, const char *const *argv) {
    Run *run = NEW(Run, 1);
    read_options(&run->options, &run->state, "./train_remoe", argc, argv);
#ifdef _OPENMP
    if (run->options.threads > 0) {
        omp_set_num_threads((int)run->options.threads);
    }
#endif
    build_model(run);
    build_state(run, options_given(argc, argv, "lambda_init"));
    if (wants_training(&run->options)) {
        open_out(run);
    }
    open_data(run);
    run->started = seconds_now();
    return run;
}

int main(int argc, char **argv) {
    Run *run = open_run(argc - 1, (const char *const *)(argv + 1));
    signal(SIGINT, request_stop);
    signal(SIGTERM, request_stop);
    signal(SIGXFSZ, SIG_IGN); // a file at its size limit is then a failed write, with a message
    if (run->options.dump[0] != '\0') {
        dump(run);
    } else if (run->options.eval) {
        validate(run);
    } else if (run->options.sample[0] != '\0') {
        generate(run, run->options.sample);
    } else if (run->options.bench) {
        print_table(run);
        bench(run);
    } else {
        print_table(run);
        open_log(run);
        train(run);
    }
    close_run(run);
    return 0;
}
