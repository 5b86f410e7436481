/*
train_remoe.cu: the CUDA trainer of ReMoE (mixture-of-experts language models with a ReLU router), on one GPU
or many (a process each: llmc/gpu/comm.cuh).

The same model as train_remoe.c, in the same order and with the same names: forward, backward, the gradients
of a step, and then what a run asks of them (llmc/trainer.h). The step that a run repeats is llmc/step.h:
gradients, clip, AdamW, lambda. What the model keeps on the device is llmc/gpu/model_memory.cuh; losses that
are computed ahead, llmc/gpu/losses.cuh; a text that grows by one token at a time has kernels of its own,
llmc/gpu/decode.cuh. The mathematics of each component stands in its own header under llmc/: X.h in C, X.cuh
in CUDA.

    tokens -> embedding -> L layers -> RMSNorm -> lm_head -> cross entropy -> loss, and back
    a layer   x = x + Attn(RMSNorm(x))      RMSNorm -> qkv -> RoPE -> attention -> o -> +
              x = x + MoE(RMSNorm(x))       RMSNorm -> router -> dispatch -> experts -> combine -> +

Formats: activations and the weights' working copy are floatX (bf16; fp32 in the checking build,
PRECISION=fp32). Masters, gradients, moments, router logits, gates and all sums are fp32.

Nothing in a micro-step waits for the host: how many experts are on is known to the device alone. The host
queues micro-steps and hears once a step of losses, routing and whether a layer needed more chunks of pairs
than were planned for it (arena.cuh); then the step is repeated with a larger plan. No atomics on floats, no
order that depends on timing: the same seed gives the same bits.

Letters: B sequences, T tokens each, N = B T, d hidden, L layers, H heads, KV key/value heads, hd head size, V
vocabulary, E = E_tot experts, k = k_tot active, F width of an expert, P active (token, expert) pairs.

    make train_remoecu && ./train_remoecu --preset small       all options: --help
*/
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
// defines: die, NEW; Config, Params, Weights, LayerWeights; ModelSettings, StepStats, and what a run asks of
// a model
#include "llmc/trainer.h"
// defines: Model and its groups: DeviceParams, Comm, Activations, ActivationGradients, Routing, Step, Losses,
// Text; allocate_all; comm_*; update_bucket, publish_params; losses_*, text_*, decode_*; *_vote*
#include "llmc/gpu/model_memory.cuh"
#include "llmc/gpu/votes.cuh"
// defines: GemmPlans, matmul_forward, matmul_backward, gemm (cuBLASLt)
#include "llmc/matmul.cuh"
// defines: embedding_*, rmsnorm_*, attention_* (forward, backward), rope_forward; rmsnorm_router_forward
#include "llmc/attention.cuh"
#include "llmc/embedding.cuh"
#include "llmc/gpu/rmsnorm_router.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/rope.cuh"
// defines: DevicePairs, router_forward, router_loss, router_backward; DeviceDispatch, dispatch_sort;
// experts_forward, experts_backward; CombineChunk, dispatch_combine_rmsnorm_forward, ..._backward
#include "llmc/dispatch.cuh"
#include "llmc/experts.cuh"
#include "llmc/gpu/dispatch_rmsnorm.cuh"
#include "llmc/router.cuh"
// defines: merged_forward, merged_backward; crossentropy_forward_backward, crossentropy_score, sum_losses
#include "llmc/crossentropy.cuh"
#include "llmc/merged_experts.cuh"

// --bench's table of where the time goes: what is queued from here on is part of `part`
static void mark(Model *m, const char *part) {
    profile_mark(&m->profile, part, m->stream);
}

// ----------------------------------------------------------------------------
// forward

// x, attn_normed [N, d] -> mid [N, d] = x + Attn(RMSNorm(x)); rows start .. T-1 of each sequence
static void attention_block_forward(Model *m, int l, int B, int T, int start) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int N = B * (T - start), d = c->hidden, width = (int)config_qkv_width(c);
    floatX *qkv = a->qkv + (int64_t)start * width; // start > 0 has B = 1: its rows follow the cached ones
    mark(m, "attention projections");
    matmul_forward(qkv, a->attn_normed, w->qkv, N, d, width, &m->gemm, m->stream);
    mark(m, "rope");
    rope_forward(qkv, m->acts.rope, B, T - start, start, c->heads + c->kv_heads, c->head_size, width,
                 m->stream);
    mark(m, "attention forward");
    attention_forward(a->att, a->lse, a->qkv, B, T, start, c->heads, c->kv_heads, c->head_size, m->kernels,
                      m->stream);
    mark(m, "attention projections");
    gemm(&m->gemm, 0, 1, N, d, d, a->att, d, w->o, d, a->mid, d, a->x,
         m->stream); // x + att W_o^T
}

// the layer's own experts, which its pairs index, or which are merged into those that its pairs index
static DeviceBank layer_bank(const Model *m, int l) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    DeviceBank bank = {c->router.experts, c->hidden, c->ffn, w->gate_up, w->down, NULL, NULL};
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

// what a layer hands on: the residual stream after it and the next norm of that, and the norm's weight
typedef struct {
    floatX *x, *normed; // [N, d]
    float *rstd;        // [N]
    const float *norm;  // [d]
} LayerOut;

static LayerOut layer_out(const Model *m, int l) {
    if (l + 1 < m->config.layers) {
        const LayerActs *a = &m->acts.layers[l + 1];
        LayerOut next = {a->x, a->attn_normed, a->attn_rstd, m->params.weights.layers[l + 1].attn_norm};
        return next;
    }
    LayerOut last = {m->acts.x, m->acts.normed, m->acts.rstd, m->params.weights.norm};
    return last;
}

// ffn_normed -> what sums to the experts' output
static CombineChunk layer_experts_forward(Model *m, int l, int N) {
    const LayerActs *a = &m->acts.layers[l];
    Arena *arena = &m->routing.arena;
    if (router_merges(m->config.router.method)) { // the pairs index a bank of merged experts
        mark(m, "experts forward");
        return merged_forward(a->ffn_normed, layer_bank(m, l), a->router_logits, a->pairs, a->dispatch,
                              &m->routing.merged, arena, l, m->stream);
    }
    dispatch_sort(a->dispatch, a->pairs, N, m->config.router.experts, m->scratch, m->stream);
    arena_place(arena, l, a->dispatch, m->stream);
    mark(m, "experts forward");
    return experts_forward(a->ffn_normed, layer_bank(m, l), a->pairs, a->dispatch, arena, l, N, m->stream);
}

// mid [N, d] -> out [N, d] = mid + MoE(RMSNorm(mid)), sum over the active experts (Eq. 1), and the next norm.
// segments: how the tokens lie in sequences. ids, draws' key, contexts, forced: device
static void moe_block_forward(Model *m, int l, const int *ids, Segments segments, RouterDraws draws,
                              const float *forced) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int N = segments.sequences * segments.tokens, d = c->hidden, E = c->router.experts;
    mark(m, "norms");
    if (w->router != NULL) { // z = W x, W from its fp32 master
        rmsnorm_router_forward(a->ffn_normed, a->ffn_rstd, a->router_logits, a->mid, w->ffn_norm, w->router,
                               N, d, E, (float)c->norm_eps, m->routing.router_parts, (float *)m->scratch,
                               &m->gemm, m->stream);
    } else {
        rmsnorm_forward(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, (float)c->norm_eps, m->stream);
    }
    mark(m, "router and dispatch");
    RouterInputs in = {ids, w->bias, forced, draws, segments};
    in.draws.layer = l;
    a->pairs.segments = segments;
    router_forward(a->pairs, a->router_logits, in, router_in_force(m), N, m->scratch, m->stream);
    CombineChunk sums = layer_experts_forward(m, l, N);
    mark(m, "combine and norms");
    LayerOut out = layer_out(m, l);
    dispatch_combine_rmsnorm_forward(out.x, out.normed, out.rstd, a->mid, sums, out.norm, N, d,
                                     (float)c->norm_eps, m->stream);
}

// the active set of layer l from the host (dump), or NULL
static const float *upload_forced(Model *m, const float *const *forced, int l, int N) {
    if (forced == NULL || m->routing.forced == NULL) {
        return NULL;
    }
    size_t bytes = (size_t)N * (size_t)m->config.router.experts * sizeof(float);
    CUDA_CHECK(cudaMemcpyAsync(m->routing.forced, forced[l], bytes, cudaMemcpyHostToDevice, m->stream));
    return m->routing.forced;
}

// contexts [B] on the device, or NULL; the host may forget its own
static const int *upload_contexts(Model *m, const int *contexts, int B) {
    int *to = m->routing.merged.contexts;
    if (contexts == NULL || to == NULL) {
        return NULL;
    }
    copy_now(to, contexts, (size_t)B * sizeof(int), cudaMemcpyHostToDevice, m->stream);
    return to;
}

// ids [N], on the device: rows start .. T-1 of B sequences (start > 0 only with B = 1: the earlier positions
// are in the qkv buffers). draws: what chance decides; contexts: NULL, or [B], on the host, how many of its
// first tokens route each sequence (lory; a call with start > 0 has the experts that the call before has
// merged); forced: NULL, or for each layer an active set [N, E] that replaces the router's own
static void model_forward(Model *m, const int *ids, int B, int T, int start, RouterDraws draws,
                          const int *contexts, const float *const *forced) {
    const Config *c = &m->config;
    int N = B * (T - start);
    Segments segments = start > 0 ? segments_kept(T - start)
                                  : segments_of(B, T, c->router.segment, upload_contexts(m, contexts, B));
    arena_begin_micro_batch(&m->routing.arena, m->stream);
    comm_wait(&m->comm, BUCKET_EMBED, m->stream);
    mark(m, "embedding");
    LayerActs *first = &m->acts.layers[0];
    embedding_forward(first->x, ids, m->params.weights.embed, N, c->hidden, m->stream);
    mark(m, "norms");
    rmsnorm_forward(first->attn_normed, first->attn_rstd, first->x, m->params.weights.layers[0].attn_norm, N,
                    c->hidden, (float)c->norm_eps, m->stream); // the later ones: each of the layer before
    for (int l = 0; l < c->layers; l++) {
        comm_wait(&m->comm, bucket_of_layer(l), m->stream);
        attention_block_forward(m, l, B, T, start);
        moe_block_forward(m, l, ids, segments, draws, upload_forced(m, forced, l, N));
    }
    comm_wait(&m->comm, bucket_of_head(c->layers), m->stream);
}

// losses of N targets. grad_scale != 0: the head's gradient and dnormed too, of grad_scale * sum of the
// losses; all_logits: NULL, or [N, V] on the device to keep them
static void classifier(Model *m, const int *targets, int N, float grad_scale, floatX *all_logits) {
    int64_t d = m->config.hidden, V = m->config.vocab_size;
    const floatX *head = m->params.weights.head;
    for (int64_t first = 0; first < N; first += m->acts.logit_rows) {
        int64_t rows = N - first < m->acts.logit_rows ? N - first : m->acts.logit_rows;
        const floatX *normed = m->acts.normed + first * d;
        mark(m, "head");
        matmul_forward(m->acts.logits, normed, head, rows, (int)d, (int)V, &m->gemm, m->stream);
        if (all_logits != NULL) {
            CUDA_CHECK(cudaMemcpyAsync(all_logits + first * V, m->acts.logits,
                                       (size_t)(rows * V) * sizeof(floatX), cudaMemcpyDeviceToDevice,
                                       m->stream));
        }
        mark(m, "cross entropy");
        crossentropy_forward_backward(m->acts.losses + first, m->acts.logits, targets + first, rows, (int)V,
                                      grad_scale, m->stream);
        if (grad_scale != 0.0f) {
            mark(m, "head");
            matmul_backward(m->back.dnormed + first * d, m->params.grads.head, m->acts.logits, normed, head,
                            rows, (int)d, (int)V, &m->gemm, m->stream);
        }
    }
}

// tokens per expert of layer l in the micro-batches of all ranks together
static const int *counts_of(const Model *m, int l) {
    return m->routing.counts_all + (int64_t)l * m->config.router.experts;
}

// adds scale * this rank's share of the column `reg` (router.h) of a micro-batch to the step's
static void regulariser(Model *m, int N, double scale) {
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->acts.layers[l];
        router_loss(&m->step.sums->reg_loss, a->pairs, a->router_logits, counts_of(m, l),
                    (int64_t)N * m->comm.ranks, router_in_force(m), N, m->config.layers, scale, m->scratch,
                    m->stream);
    }
}

// ----------------------------------------------------------------------------
// backward, in the forward's reverse order; m->back.dx carries the residual stream's gradient

// what sums to the gradient of ffn_normed, but the router's part. back.dgate: the gradient of the pairs'
// gates, or of the weights that experts are merged with
static CombineChunk layer_experts_backward(Model *m, int l, int N) {
    const LayerActs *a = &m->acts.layers[l];
    if (router_merges(m->config.router.method)) {
        return merged_backward(m->back.dgate, m->back.dx, a->ffn_normed, layer_bank(m, l), m->fresh,
                               a->router_logits, a->pairs, a->dispatch, &m->routing.merged, &m->routing.arena,
                               l, m->stream);
    }
    return experts_backward(m->back.dgate, m->back.dx, a->ffn_normed, layer_bank(m, l), m->fresh, a->pairs,
                            a->dispatch, &m->routing.arena, l, N, m->stream);
}

static void moe_block_backward(Model *m, int l, int N, double reg_weight) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    LayerWeights *g = &m->params.grads.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int d = c->hidden, E = c->router.experts;
    if (m->settings.recompute) {
        mark(m, "norms");
        rmsnorm_again(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, m->stream);
    }
    mark(m, "experts backward");
    CombineChunk sums = layer_experts_backward(m, l, N);
    mark(m, "router and dispatch");
    if (w->router != NULL) {
        router_backward(m->back.drouter, m->back.dgate, a->pairs, a->router_logits, counts_of(m, l),
                        (int64_t)N * m->comm.ranks, router_in_force(m), N, c->layers, reg_weight, m->stream);
        matmul_backward(NULL, g->router, m->back.drouter, a->ffn_normed, w->router_x, N, d, E, &m->gemm,
                        m->stream);
    }
    mark(m, "combine and norms");
    dispatch_combine_rmsnorm_backward(
        m->back.dx, g->ffn_norm, m->back.dnormed, sums, w->router != NULL ? m->back.drouter : NULL,
        w->router_x, a->mid, w->ffn_norm, a->ffn_rstd, router_row(c->router.method)->gradient_is_sparse, N, d,
        (float *)m->scratch, &m->gemm, m->stream);
}

static void attention_block_backward(Model *m, int l, int B, int T) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    LayerWeights *g = &m->params.grads.layers[l];
    LayerActs *a = &m->acts.layers[l];
    int N = B * T, d = c->hidden, width = (int)config_qkv_width(c);
    if (m->settings.recompute) {
        mark(m, "norms");
        rmsnorm_again(a->attn_normed, a->attn_rstd, a->x, w->attn_norm, N, d, m->stream);
    }
    mark(m, "attention projections");
    matmul_backward(m->back.datt, g->o, m->back.dx, a->att, w->o, N, d, d, &m->gemm, m->stream);
    mark(m, "attention backward"); // and RoPE's
    attention_rope_backward(m->back.dqkv, m->back.datt, a->att, a->qkv, a->lse, (float *)m->scratch,
                            m->acts.rope, B, T, c->heads, c->kv_heads, c->head_size, m->kernels, m->stream);
    mark(m, "attention projections");
    matmul_backward(m->back.dnormed, g->qkv, m->back.dqkv, a->attn_normed, w->qkv, N, d, width, &m->gemm,
                    m->stream);
    mark(m, "norms");
    rmsnorm_backward(m->back.dx, g->attn_norm, m->back.dnormed, a->x, w->attn_norm, a->attn_rstd, N, d,
                     (float *)m->scratch, m->stream);
}

// the gradients of a bucket get nothing more in this step: off to their owners, while the next are computed
static void gradients_done(Model *m, int bucket, int last) {
    if (last) {
        comm_exchange(&m->comm, bucket, m->stream);
    }
}

// after model_forward and classifier (which left dnormed): adds to all gradients. reg_weight: of the
// regulariser; last: of the step's micro-batches
static void model_backward(Model *m, const Batch *batch, int B, int T, double reg_weight, int last) {
    const Config *c = &m->config;
    int N = B * T, d = c->hidden;
    gradients_done(m, bucket_of_head(c->layers), last);
    mark(m, "norms");
    CUDA_CHECK(cudaMemsetAsync(m->back.dx, 0, (size_t)N * (size_t)d * sizeof(floatX), m->stream));
    rmsnorm_backward(m->back.dx, m->params.grads.norm, m->back.dnormed, m->acts.x, m->params.weights.norm,
                     m->acts.rstd, N, d, (float *)m->scratch, m->stream);
    for (int l = c->layers - 1; l >= 0; l--) {
        moe_block_backward(m, l, N, reg_weight);
        attention_block_backward(m, l, B, T);
        gradients_done(m, bucket_of_layer(l), last);
    }
    gradients_done(m, BUCKET_ROUTERS, last);
    gradients_done(m, BUCKET_NORMS, last);
    mark(m, "embedding");
    embedding_backward(m->params.grads.embed, m->back.dx, batch->positions, (float *)m->scratch, N, d,
                       m->stream);
    gradients_done(m, BUCKET_EMBED, last);
    m->fresh = 0;
}

// ----------------------------------------------------------------------------
// gradients of a step

// weight of a micro-batch's losses in the step's
static void sum_step(Model *m, int N, int micro_batches) {
    int E = m->config.router.experts;
    mark(m, "losses and counts");
    sum_losses(&m->step.sums->lm_loss, m->acts.losses, N, 1.0 / ((double)N * micro_batches * m->comm.ranks),
               m->stream);
    regulariser(m, N, 1.0 / micro_batches);
    for (int l = 0; l < m->config.layers; l++) {
        routing_stats(&m->step.sums->routing, m->acts.layers[l].pairs, m->step.counts + (int64_t)l * E, N, E,
                      m->stream);
    }
}

// Forward, losses and backward of one of `micro_batches` of each rank: adds its gradient to m->params.grad,
// its losses and routing to the step's sums. all_logits: NULL, or [N, V]; forced: as in model_forward.
// Nothing here waits for the device: a CUDA graph can capture it
static void micro_step(Model *m, const Batch *batch, int B, int T, int micro_batches, double reg_weight,
                       int last, const float *const *forced, floatX *all_logits) {
    int N = B * T;
    int64_t cells = (int64_t)m->config.layers * m->config.router.experts;
    RouterDraws draws = {m->step.draw_key, batch->first_token, 0};
    model_forward(m, batch->inputs, B, T, 0, draws, NULL, forced);
    comm_counts_send(&m->comm, cells, m->stream); // f_e is the global micro-batch's (Eq. 11)
    classifier(m, batch->targets, N, (float)(1.0 / ((double)N * micro_batches * m->comm.ranks)), all_logits);
    comm_counts_receive(&m->comm, m->routing.counts_all, cells, m->stream); // wanted only now
    sum_step(m, N, micro_batches);
    model_backward(m, batch, B, T, reg_weight / micro_batches, last);
}

// All but the experts', which are nearly all there are: the first micro-batch sets those. A layer's, gate_up
// and down, lie together
static void clear_gradients(Model *m) {
    int64_t experts = 3 * (int64_t)m->routing.arena.E * m->config.ffn * m->config.hidden;
    float *from = m->params.grad;
    for (int l = 0; l <= m->config.layers; l++) {
        float *to = l < m->config.layers ? m->params.grads.layers[l].gate_up
                                         : m->params.grad + m->params.table.flat_size;
        CUDA_CHECK(cudaMemsetAsync(from, 0, (size_t)(to - from) * sizeof(float), m->stream));
        from = to + experts;
    }
    m->fresh = 1;
}

static void begin_step(Model *m) {
    int64_t cells = (int64_t)m->config.layers * m->config.router.experts;
    mark(m, "clearing gradients");
    CUDA_CHECK(cudaMemsetAsync(m->step.sums, 0, sizeof(StepSums), m->stream));
    CUDA_CHECK(cudaMemsetAsync(m->step.counts, 0, (size_t)cells * sizeof(int64_t), m->stream));
    if (m->params.grad != NULL) {
        clear_gradients(m);
    }
    arena_begin_step(&m->routing.arena, m->stream);
}

// everything is queued: the norm, and what the ranks tell each other
static void end_step(Model *m, int stop) {
    const Config *c = &m->config;
    const TensorTable *t = &m->params.table;
    comm_exchange_end(&m->comm, m->stream);
    mark(m, "votes and norm");
    launch(vote_kernel, 1, 256, 0, m->stream, own_vote(m), m->step.sums, m->routing.arena.overflow, stop,
           m->step.counts, c->layers * c->router.experts, m->routing.arena.most_rows, c->layers);
    comm_votes(&m->comm, vote_bytes(m), m->stream);
    mark(m, "votes and norm");
    sum_squares(m->step.grad_squares, (const double *)m->comm.regions[REGION_SQUARES].own, t->buckets,
                t->bucket_count, m->comm.ranks, m->stream);
    mark(m, NULL);
}

// What the devices have summed up; waits for it. Returns 0 if a layer of any rank had more chunks of pairs
// than were planned: then the step is worthless, and the plan is larger. All ranks read the same, so they do
// the same
static int read_step(Model *m, int64_t tokens, StepStats *s) {
    int overflow;
    double squares;
    size_t bytes = (size_t)(m->comm.ranks * vote_bytes(m));
    unsigned char *votes = NEW(unsigned char, bytes);
    int *rows = NEW(int, m->config.layers);
    copy_now(&squares, m->step.grad_squares, sizeof(squares), cudaMemcpyDeviceToHost, m->stream);
    copy_now(votes, m->comm.regions[REGION_VOTES].own, bytes, cudaMemcpyDeviceToHost, m->stream);
    overflow = count_votes(m, votes, s, rows);
    if (overflow) {
        arena_grow(&m->routing.arena, rows);
    } else {
        s->tokens += tokens;
        s->grad_norm = sqrt(squares);
        s->ms_waiting = m->comm.ranks > 1 ? waits_ms(&m->comm.waits) : -1.0;
        arena_remember(m->routing.recent_rows, rows, m->config.layers);
        arena_plan(&m->routing.arena, m->routing.recent_rows);
    }
    free(votes);
    free(rows);
    return !overflow;
}

// plans for all pairs of N tokens: where there is no step before to go by
static void plan_worst(Model *m, int N) {
    int rows = (int)arena_worst_rows(N, m->config.router.experts, most_active(m));
    int *all = NEW(int, m->config.layers);
    for (int l = 0; l < m->config.layers; l++) {
        all[l] = rows;
    }
    arena_plan(&m->routing.arena, all);
    free(all);
}

// the i-th micro-batch of a step, from the host. Its part of the staging buffer must no longer be in use: a
// step ends by waiting for the device
static void upload_batch(Model *m, int i, const int *inputs, const int *targets, int N) {
    int64_t most = (int64_t)m->settings.B * m->settings.T, ints = batch_ints(m);
    int *host = m->step.staging + i * ints;
    m->step.batches[i].first_token = ((int64_t)i * m->comm.ranks + m->comm.rank) * N;
    memcpy(host, inputs, (size_t)N * sizeof(int));
    memcpy(host + most, targets, (size_t)N * sizeof(int));
    if (m->params.grad != NULL) {
        embedding_plan(embedding_plan_in(host + 2 * most, most), inputs, N, m->config.vocab_size,
                       m->step.id_places);
    }
    CUDA_CHECK(cudaMemcpyAsync(m->step.batches[i].inputs, host, (size_t)ints * sizeof(int),
                               cudaMemcpyHostToDevice, m->stream));
}

// which random numbers the step's routers draw
static void begin_draws(Model *m, int64_t step) {
    uint64_t key = draw_key(m->settings.seed, step);
    copy_now(m->step.draw_key, &key, sizeof(key), cudaMemcpyHostToDevice, m->stream);
}

void model_gradients(Model *m, Prefetcher *ahead, int64_t step, int micro_batches, int B, int T,
                     double reg_weight, StepStats *s) {
    m->comm.waits.count = 0; // those of a validation are not the step's
    if (router_draws(m->config.router.method)) {
        begin_draws(m, step);
    }
    for (int taken = 0, done = 0; !done;) { // again, if a layer had more pairs than were planned for
        int stop = s->stop;
        stats_reset(s, &m->config);
        begin_step(m);
        for (int i = 0; i < micro_batches; i++) {
            if (taken == i) {
                int *inputs, *targets;
                prefetch_next(ahead, &inputs, &targets);
                upload_batch(m, i, inputs, targets, B * T);
                taken++;
            }
            micro_step(m, &m->step.batches[i], B, T, micro_batches, reg_weight, i + 1 == micro_batches, NULL,
                       NULL);
        }
        end_step(m, stop);
        done = read_step(m, (int64_t)micro_batches * m->comm.ranks * B * T, s);
    }
}

// Each rank moves the biases that it owns, as AdamW does with weights: the update that follows sends them on
void model_balance(Model *m, float rate, const int64_t *counts) {
    const DeviceParams *p = &m->params;
    int E = m->config.router.experts;
    Range kept = p->kept[BUCKET_NORMS];
    CUDA_CHECK(cudaMemcpyAsync(m->step.counts, counts, (size_t)(m->config.layers * E) * sizeof(int64_t),
                               cudaMemcpyHostToDevice, m->stream));
    for (int l = 0; l < m->config.layers; l++) {
        int64_t place = p->table.places.layers[l].bias;
        int first = (int)std::clamp<int64_t>(kept.first - place, 0, E);
        int end = (int)std::clamp<int64_t>(kept.first + kept.size - place, 0, E);
        router_auxfree_balance(p->fp32 + place, m->step.counts + (int64_t)l * E, first, end, E, rate,
                               m->stream);
    }
}

// bucket after bucket in the order in which the next forward wants them: what is updated goes to the other
// ranks
void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t) {
    AdamW adamw = {0.9, 0.999, 1e-8};
    mark(m, "AdamW");
    for (int b = 0; b < m->params.table.bucket_count; b++) {
        update_bucket(&m->params, &m->comm, b, adamw, lr, weight_decay, grad_scale, t, m->stream);
    }
    mark(m, NULL);
}

// ----------------------------------------------------------------------------
// what a run asks for (llmc/trainer.h)

Model *model_open(const Config *config, const ModelSettings *settings) {
    check_shapes(config, settings->B, settings->T);
    Model *m = NEW(Model, 1);
    m->config = *config;
    m->settings = *settings;
    m->settings.recompute = settings->recompute && settings->purpose != FOR_INFERENCE;
    m->k = config->router.active;
    m->routing.recent_rows = NEW(int, config->layers);
    m->acts.layers = NEW(LayerActs, config->layers);
    params_open_lists(&m->params, config);
    int device = device_open(settings->ranks);
    CUDA_CHECK(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    m->kernels = device_kernels(settings->kernels);
    comm_open(&m->comm, settings->ranks, settings->comm, settings->zero && settings->purpose != FOR_INFERENCE,
              device, &m->params.table, &m->profile);
    int64_t available = device_available_bytes();
    int64_t batches = 4 * batch_ints(m) * settings->micro_batches;
    int64_t need = fixed_bytes(m, settings->B) + batches;
    int most = largest_batch(m, available - batches);
    refuse_too_large(m, need, available, most);
    allocate_all(m, choose_store_rows(m, available - need));
    allocate_batches(m, settings->micro_batches);
    losses_open(&m->losses, (int64_t)settings->B * settings->T, config->layers,
                (int64_t)config->layers * config->router.experts, m->routing.arena.planned);
    text_open(&m->text, config, m->stream);
    upload_rope(m);
    clear_params(&m->params, m->stream);
    comm_connect(&m->comm);
    if (settings->purpose == FOR_TRAINING) {
        comm_print(&m->comm);
        print_memory(m, available - device_available_bytes(), most);
    }
    return m;
}

void model_close(Model *m) {
    CUDA_CHECK(cudaDeviceSynchronize());
    comm_close(&m->comm);
    text_close(&m->text);
    losses_close(&m->losses);
    gemm_close(&m->gemm);
    arena_free(&m->routing.arena);
    memory_release(&m->memory);
    CUDA_CHECK(cudaFreeHost(m->step.staging));
    CUDA_CHECK(cudaStreamDestroy(m->stream));
    free(m->step.batches);
    free(m->step.id_places);
    free(m->routing.recent_rows);
    free(m->acts.layers);
    params_close_lists(&m->params);
    free(m);
}

const TensorTable *model_table(const Model *m) {
    return &m->params.table;
}

const Range *model_ranges(const Model *m, Holding holding, int *count) {
    *count = m->params.table.bucket_count;
    return holding == RANGES_OWNED ? m->params.owned : m->params.kept;
}

// (whoever reads and writes all of a model's buffers is long at it, and lives)
void model_get(Model *m, ModelBuffer which, int64_t first, int64_t n, float *out) {
    ranks_beat_again(m->comm.star);
    copy_now(out, params_element(&m->params, which, first), (size_t)n * sizeof(float), cudaMemcpyDeviceToHost,
             m->stream);
}

void model_set(Model *m, ModelBuffer which, int64_t first, int64_t n, const float *x) {
    ranks_beat_again(m->comm.star);
    copy_now(params_element(&m->params, which, first), x, (size_t)n * sizeof(float), cudaMemcpyHostToDevice,
             m->stream);
}

void model_publish(Model *m) {
    publish_params(&m->params, &m->comm, m->stream);
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

void model_route(Model *m, RouterMethod method, int k) {
    m->config.router.method = method;
    m->k = k;
}

// another plan of the arena, for a forward apart from training; returns the one that was in force
static int *exchange_plan(Model *m, int *plan) {
    int *planned = m->routing.arena.planned;
    m->routing.arena.planned = plan;
    return planned;
}

// a forward that no backward follows, by evaluation's plan; contexts: as in model_forward
static void queue_alone(Model *m, const int *ids, int B, int T, const int *contexts) {
    Arena *arena = &m->routing.arena;
    int *planned = exchange_plan(m, m->losses.planned);
    arena->alone = 1;
    arena_begin_step(arena, m->stream);
    model_forward(m, ids, B, T, 0, no_draws, contexts, NULL);
    exchange_plan(m, planned);
    arena->alone = 0;
}

// what the host wants to know of it is on its way
static void queue_findings(Model *m, int slot) {
    LossResult *result = loss_result(&m->losses, slot);
    int L = m->config.layers, *counts = (int *)(result + 1);
    int64_t cells = (int64_t)L * m->config.router.experts;
    const Arena *arena = &m->routing.arena;
    cudaMemcpyKind down = cudaMemcpyDeviceToHost;
    result->overflow = 0; // of which the device writes half
    CUDA_CHECK(cudaMemcpyAsync(&result->overflow, arena->overflow, sizeof(int), down, m->stream));
    CUDA_CHECK(cudaMemcpyAsync(counts, m->acts.layers[0].pairs.counts, (size_t)cells * sizeof(int), down,
                               m->stream));
    CUDA_CHECK(cudaMemcpyAsync(counts + cells, arena->most_rows, (size_t)L * sizeof(int), down, m->stream));
    CUDA_CHECK(cudaEventRecord(m->losses.done[slot], m->stream));
}

// a loss whose batch is on the device
static void queue_loss(Model *m, int slot) {
    Losses *losses = &m->losses;
    const Batch *batch = &losses->batches[slot];
    int B = losses->B[slot], T = losses->T[slot];
    CUDA_CHECK(cudaMemsetAsync(losses->sums + slot, 0, sizeof(double), m->stream));
    queue_alone(m, batch->inputs, B, T, NULL);
    classifier(m, batch->targets, B * T, 0.0f, NULL);
    sum_losses(losses->sums + slot, m->acts.losses, B * T, 1.0 / (B * T), m->stream);
    mark(m, NULL);
    CUDA_CHECK(cudaMemcpyAsync(&loss_result(&m->losses, slot)->loss, losses->sums + slot, sizeof(double),
                               cudaMemcpyDeviceToHost, m->stream));
    queue_findings(m, slot);
}

void model_loss_begin(Model *m, const int *inputs, const int *targets, int B, int T) {
    Losses *losses = &m->losses;
    int slot = (int)(losses->begun++ % MOST_LOSSES), N = B * T;
    int64_t most = (int64_t)m->settings.B * m->settings.T;
    int *host = losses->staging + slot * 2 * most;
    memcpy(host, inputs, (size_t)N * sizeof(int));
    memcpy(host + most, targets, (size_t)N * sizeof(int));
    CUDA_CHECK(cudaMemcpyAsync(losses->batches[slot].inputs, host, (size_t)N * sizeof(int),
                               cudaMemcpyHostToDevice, m->stream));
    CUDA_CHECK(cudaMemcpyAsync(losses->batches[slot].targets, host + most, (size_t)N * sizeof(int),
                               cudaMemcpyHostToDevice, m->stream));
    losses->B[slot] = B;
    losses->T[slot] = T;
    queue_loss(m, slot);
}

// plans evaluation's launches from what a loss has found; whether its own plan was large enough
static int plan_next_losses(Model *m, const LossResult *result) {
    Losses *losses = &m->losses;
    Arena *arena = &m->routing.arena;
    const int *rows = (const int *)(result + 1) + (int64_t)m->config.layers * m->config.router.experts;
    int *planned = exchange_plan(m, losses->planned);
    if (result->overflow) {
        arena_grow(arena, rows);
    } else {
        arena_remember(losses->recent_rows, rows, m->config.layers);
        arena_plan(arena, losses->recent_rows);
    }
    exchange_plan(m, planned);
    return !result->overflow;
}

// (token, expert) pairs of all layers; counts [L, E] of N tokens (lory's are another measure: each token has one
// expert)
static int64_t active_pairs(const Model *m, const int *counts, int64_t N) {
    int64_t L = m->config.layers, sum = 0;
    if (router_merges(m->config.router.method)) {
        return L * N;
    }
    for (int64_t i = 0; i < L * m->config.router.experts; i++) {
        sum += counts[i];
    }
    return sum;
}

double model_loss_end(Model *m, int64_t *active) {
    int slot = (int)(m->losses.ended++ % MOST_LOSSES);
    const LossResult *result = loss_result(&m->losses, slot);
    CUDA_CHECK(cudaEventSynchronize(m->losses.done[slot]));
    while (!plan_next_losses(m, result)) { // a layer had more pairs than were planned for
        queue_loss(m, slot);
        CUDA_CHECK(cudaEventSynchronize(m->losses.done[slot]));
    }
    if (active != NULL) {
        *active = active_pairs(m, (const int *)(result + 1), (int64_t)m->losses.B[slot] * m->losses.T[slot]);
    }
    return result->loss;
}

// ----------------------------------------------------------------------------
// a forward alone

// waits for it; again, if a layer had more pairs than were planned for. contexts: as in model_forward
static void look(Model *m, const int *inputs, int B, int T, const int *contexts) {
    int slot = (int)(m->losses.begun % MOST_LOSSES);
    int *ids = m->losses.batches[slot].inputs;
    copy_now(ids, inputs, (size_t)(B * T) * sizeof(int), cudaMemcpyHostToDevice, m->stream);
    do {
        queue_alone(m, ids, B, T, contexts);
        queue_findings(m, slot);
        CUDA_CHECK(cudaEventSynchronize(m->losses.done[slot]));
    } while (!plan_next_losses(m, loss_result(&m->losses, slot)));
}

void model_look(Model *m, const int *inputs, int B, int T) {
    look(m, inputs, B, T, NULL);
}

// rows [n, d] = normed[which]
static __global__ void __launch_bounds__(256)
    gather_rows_kernel(floatX *rows, const floatX *normed, const int *which, int64_t n, int d) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n * d) {
        rows[i] = normed[(int64_t)which[i / d] * d + i % d];
    }
}

// log likelihoods of up to N targets, from what model_forward has left. The fp32 logits take the place of
// training's
static void score_rows(Model *m, const int *rows, const int *targets, int64_t n, float *ll,
                       unsigned char *greedy) {
    int64_t d = m->config.hidden, V = m->config.vocab_size;
    int64_t wide = (int64_t)(sizeof(float) / sizeof(floatX)), most = larger(m->acts.logit_rows / wide, 1);
    floatX *gathered = m->acts.x; // which nobody reads after the last norm
    float *logits = (float *)m->acts.logits;
    int *d_targets = m->step.batches[0].targets;
    copy_now(m->acts.score_rows, rows, (size_t)n * sizeof(int), cudaMemcpyHostToDevice, m->stream);
    copy_now(d_targets, targets, (size_t)n * sizeof(int), cudaMemcpyHostToDevice, m->stream);
    for (int64_t first = 0; first < n; first += most) {
        int64_t count = n - first < most ? n - first : most;
        launch(gather_rows_kernel, (unsigned)ceil_div<int64_t>(count * d, 256), 256, 0, m->stream, gathered,
               m->acts.normed, m->acts.score_rows + first, count, (int)d);
        gemm(&m->gemm, 0, 1, count, V, d, gathered, d, m->params.weights.head, d, logits, V, NULL, m->stream);
        crossentropy_score(m->acts.losses + first, m->acts.score_greedy + first, logits, d_targets + first,
                           count, (int)V, m->stream);
    }
    copy_now(ll, m->acts.losses, (size_t)n * sizeof(float), cudaMemcpyDeviceToHost, m->stream);
    copy_now(greedy, m->acts.score_greedy, (size_t)n, cudaMemcpyDeviceToHost, m->stream);
}

// (a sequence alone costs its padding here, and its context's computation: contexts are not shared)
void model_score(Model *m, const ScoreBatch *s, float *ll, unsigned char *greedy) {
    int64_t most = (int64_t)m->settings.B * m->settings.T;
    look(m, s->ids, s->B, s->T, router_merges(m->config.router.method) ? s->contexts : NULL);
    for (int64_t first = 0; first < s->n; first += most) {
        int64_t count = s->n - first < most ? s->n - first : most;
        score_rows(m, s->rows + first, s->targets + first, count, ll + first, greedy + first);
    }
}

int model_shares_contexts(void) {
    return 0;
}

// ----------------------------------------------------------------------------
// a text, token after token (gpu/text.cuh)

// the text's token, at its position: t->x [d] -> the same after layer l
static void decode_layer(Model *m, int l) {
    const Config *c = &m->config;
    const LayerReads *w = &m->params.weights.layers[l];
    Text *t = &m->text;
    int d = c->hidden, H = c->heads, KV = c->kv_heads, hd = c->head_size;
    float eps = (float)c->norm_eps;
    const int *position = &t->state->position;
    floatX *cache = m->acts.layers[l].qkv;
    Router router = router_in_force(m);
    DeviceBank bank = layer_bank(m, l);
    const float *weights = w->router;
    if (router_merges(router.method)) { // one expert, which the prompt has merged
        bank = prompt_bank(&m->routing.merged, bank, l);
        router.method = ROUTER_DENSE;
        router.experts = 1;
        weights = NULL;
    }
    DecodeRouter one = {weights,
                        w->bias,
                        &t->state->token,
                        t->router_logits,
                        t->mask,
                        t->tickets + H,
                        t->pairs,
                        router.method,
                        router.experts,
                        router.active,
                        (float)router.jitter};
    decode_qkv(cache, position, t->x, w->attn_norm, w->qkv, m->acts.rope, d, H + 2 * KV, H + KV, hd, eps,
               m->stream);
    decode_attention(t->att, t->partial, t->tickets, cache, position, m->settings.T, H, KV, hd, m->stream);
    decode_output(t->mid, t->x, t->att, w->o, d, m->stream);
    decode_router(t->normed, one, t->mid, w->ffn_norm, d, eps, m->stream);
    decode_up(t->h, t->normed, t->pairs, bank.gate_up, bank.E, router.active, d, bank.F, m->stream);
    decode_down(t->x, t->mid, t->h, t->pairs, bank.down, d, bank.F, m->stream);
}

// the last layer's output in t->x -> the next token, and its embedding in t->x
static void decode_next(Model *m) {
    const Config *c = &m->config;
    Text *t = &m->text;
    decode_head(t->logits, t->x, m->params.weights.norm, m->params.weights.head, &t->state->sampling.allowed,
                c->vocab_size, c->hidden, (float)c->norm_eps, m->stream);
    sample_on_device(t->state, t->ring, t->x, m->params.weights.embed, t->logits, t->ids, t->values,
                     c->hidden, m->stream);
}

static void queue_token(Model *m) {
    if (m->text.queued == 0) { // the prompt's forward has done the layers
        decode_next(m);
    } else {
        text_queue_step(&m->text, m->config.router.method, m->k, m->stream, [=] {
            for (int l = 0; l < m->config.layers; l++) {
                decode_layer(m, l);
            }
            decode_next(m);
        });
    }
    text_queued(&m->text, m->stream);
}

void model_read(Model *m, const int *ids, int n, const Sampling *s, int64_t draw, int64_t most) {
    Text *t = &m->text;
    TextState state = {*s, n - 1, 0, draw, 0};
    int64_t d = m->config.hidden, room = m->settings.T - n + 1;
    look(m, ids, 1, n, &n);
    CUDA_CHECK(cudaMemcpyAsync(t->x, m->acts.x + (n - 1) * d, (size_t)d * sizeof(floatX),
                               cudaMemcpyDeviceToDevice, m->stream));
    copy_now(t->state, &state, sizeof(state), cudaMemcpyHostToDevice, m->stream); // behind an earlier text
    t->queued = t->taken = 0;
    t->most = most < room ? most : room;
}

int model_next_token(Model *m) {
    while (text_wants_step(&m->text)) {
        queue_token(m);
    }
    return text_take(&m->text);
}

// ----------------------------------------------------------------------------
// what can be compared

static void download(const Model *m, float *host, const floatX *device, int64_t n) {
#ifdef PRECISION_FP32
    copy_now(host, device, (size_t)n * sizeof(float), cudaMemcpyDeviceToHost, m->stream);
#else
    floatX *rounded = NEW(floatX, n);
    copy_now(rounded, device, (size_t)n * sizeof(floatX), cudaMemcpyDeviceToHost, m->stream);
    for (int64_t i = 0; i < n; i++) {
        host[i] = to_float(rounded[i]);
    }
    free(rounded);
#endif
}

void model_masks(Model *m, int64_t N, uint64_t *masks) {
    int E = m->config.router.experts;
    int64_t words = N * bit_words(E);
    uint64_t *bits = (uint64_t *)m->scratch;
    for (int l = 0; l < m->config.layers; l++) {
        pairs_to_bits(bits + l * words, m->acts.layers[l].pairs, (int)N, E, m->stream);
    }
    copy_now(masks, bits, (size_t)(m->config.layers * words) * sizeof(uint64_t), cudaMemcpyDeviceToHost,
             m->stream);
}

void model_token_losses(Model *m, int64_t N, float *losses) {
    copy_now(losses, m->acts.losses, (size_t)N * sizeof(float), cudaMemcpyDeviceToHost, m->stream);
}

void model_gates(Model *m, int64_t N, float *const *gates) {
    int E = m->config.router.experts;
    float *dense = NULL;
    CUDA_CHECK(cudaMalloc(&dense, (size_t)N * (size_t)E * sizeof(float)));
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->acts.layers[l];
        router_gates(dense, a->pairs, a->router_logits, router_in_force(m), N, m->stream);
        copy_now(gates[l], dense, (size_t)N * (size_t)E * sizeof(float), cudaMemcpyDeviceToHost, m->stream);
    }
    CUDA_CHECK(cudaFree(dense));
}

static void download_draws(Model *m, float *const *draws, int64_t N) {
    RouterRound *rounds = NEW(RouterRound, N * m->k);
    for (int l = 0; l < m->config.layers; l++) {
        copy_now(rounds, m->acts.layers[l].pairs.rounds, (size_t)(N * m->k) * sizeof(RouterRound),
                 cudaMemcpyDeviceToHost, m->stream);
        router_sparsemixer_draws(draws[l], rounds, N, m->config.router.experts, m->k);
    }
    free(rounds);
}

void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, float *const *draws,
                   StepStats *s) {
    int N = B * T;
    int64_t V = m->config.vocab_size;
    floatX *all_logits = NULL;
    if (logits != NULL) {
        CUDA_CHECK(cudaMalloc(&all_logits, (size_t)(N * V) * sizeof(floatX)));
    }
    plan_worst(m, N);
    begin_draws(m, 0);
    begin_step(m);
    upload_batch(m, 0, inputs, targets, N);
    micro_step(m, &m->step.batches[0], B, T, 1, reg_weight, 1, forced, all_logits);
    end_step(m, 0);
    read_step(m, (int64_t)N * m->comm.ranks, s);
    if (logits != NULL) {
        download(m, logits, all_logits, N * V);
        CUDA_CHECK(cudaFree(all_logits));
    }
    if (gates != NULL) {
        model_gates(m, N, gates);
    }
    if (draws != NULL) {
        download_draws(m, draws, N);
    }
}

int model_weight_bytes(void) {
    return sizeof(floatX);
}

int model_takes_ranks(void) {
    return 1;
}

double model_memory_gb(const Model *m) {
    return 1e-9 * (double)memory_total(&m->memory);
}

double model_peak_flops(const Model *m) {
    return device_peak_flops(m->comm.device) * m->comm.ranks;
}

double model_peak_bytes(const Model *m) {
    return device_peak_bytes(m->comm.device);
}

double model_profile(Model *m, int on) {
    if (on) {
        profile_begin(&m->profile);
        return 0.0;
    }
    return profile_end(&m->profile);
}

// ----------------------------------------------------------------------------
// the run: options, data, step after step, log, checkpoints

// defines: run_main; streams_open
#include "llmc/run/main.h"
#include "llmc/streams.h"

int main(int argc, char **argv) {
    streams_open();
    return run_main("./train_remoecu", argc, argv);
}
