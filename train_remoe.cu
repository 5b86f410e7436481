/*
train_remoe.cu: the CUDA trainer of ReMoE (mixture-of-experts language models with a ReLU router), for one GPU.

The same model as train_remoe.c, in the same order and with the same names: memory, forward, backward, update,
and then what a run (llmc/run/run.h, shared by both) asks of it. The mathematics of each step stands in its own
header under llmc/: X.h in C, X.cuh in CUDA.

    tokens -> embedding -> L layers -> RMSNorm -> lm_head -> cross entropy -> loss, and back
    a layer   x = x + Attn(RMSNorm(x))      RMSNorm -> qkv -> RoPE -> attention -> o -> +
              x = x + MoE(RMSNorm(x))       RMSNorm -> router -> dispatch -> experts -> combine -> +

Formats: activations and the weights' working copy are floatX (bf16; fp32 in the checking build, PRECISION=fp32).
Masters, gradients, moments, router logits, gates and all sums are fp32.

Nothing in a micro-step waits for the host: how many experts are on is known to the device alone. The host
queues micro-steps and hears once a step of losses, routing and whether a layer needed more chunks of pairs than
were planned for it (arena.cuh); then the step is repeated with a larger plan. No atomics on floats, no order
that depends on timing: the same seed gives the same bits.

Letters: B sequences, T tokens each, N = B T, d hidden, L layers, H heads, KV key/value heads, hd head size, V
vocabulary, E = E_tot experts, k = k_tot active, F width of an expert, P active (token, expert) pairs.

    make train_remoecu && ./train_remoecu --preset small       all options: --help
*/
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
// defines: die, warn, NEW; Options, Config, TensorTable, Weights; Run, run_main and the interface of a trainer
#include "llmc/run/run.h"
// defines: floatX, launch, CUDA_CHECK; DeviceMemory, take
#include "llmc/gpu/cuda_common.cuh"
#include "llmc/gpu/memory.cuh"
// defines: GemmPlans, matmul_forward, matmul_backward, gemm (cuBLASLt)
#include "llmc/matmul.cuh"
// defines: embedding_*, rmsnorm_*, attention_* (forward, backward), rope_forward; rmsnorm_router_forward
#include "llmc/attention.cuh"
#include "llmc/embedding.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/gpu/rmsnorm_router.cuh"
#include "llmc/rope.cuh"
#include "llmc/rope.h"
// defines: DevicePairs, router_forward, router_loss, router_backward; DeviceDispatch, dispatch_sort; Arena;
// experts_forward, experts_backward; CombineChunk, dispatch_combine_rmsnorm_forward, ..._backward
#include "llmc/gpu/arena.cuh"
#include "llmc/dispatch.cuh"
#include "llmc/gpu/dispatch_rmsnorm.cuh"
#include "llmc/experts.cuh"
#include "llmc/router.cuh"
// defines: crossentropy_forward_backward, sum_losses; adamw_update, sum_of_squares, round_copy
#include "llmc/adamw.cuh"
#include "llmc/crossentropy.cuh"
// defines: Profile, profile_mark
#include "llmc/gpu/profile.cuh"

const char *const program_name = "./train_remoecu";

enum { GEMM_WORKSPACE_BYTES = 64 << 20 }; // what cuBLASLt's Hopper kernels want at most is 32 MB

// ----------------------------------------------------------------------------
// the model's memory

// what one layer's forward leaves for its backward
typedef struct {
    floatX *x;           // [N, d] the residual stream that enters the layer
    floatX *attn_normed; // [N, d], or of all layers together with --recompute
    float *attn_rstd;    // [N]
    floatX *qkv; // [B, T, (H + 2 KV) hd], queries and keys rotated; also the key/value cache of sampling
    floatX *att; // [N, d] the heads' outputs
    float *lse;  // [B, H, T]
    floatX *mid; // [N, d] the residual stream between attention and experts
    floatX *ffn_normed;      // [N, d], or of all layers together with --recompute
    float *ffn_rstd;         // [N]
    float *router_logits;    // [N, E] (the softmax for topk and ec)
    DevicePairs pairs;       // who goes where, with which gate
    DeviceDispatch dispatch; // the same, sorted by expert
} LayerActs;

// what a step's micro-batches add up on the device
typedef struct {
    double lm_loss, reg_loss, grad_squares;
    RoutingStats routing;
} StepSums;

// a micro-batch on the device
typedef struct {
    int *inputs, *targets;   // [N]
    EmbeddingPlan positions; // where each id stands, for the embedding's gradient
} Batch;

struct Model {
    Config config;
    int B, T;   // the largest micro-batch
    int k;      // k_tot in force (the near-dense warm-up of topk raises it)
    int k_most; // the largest that will be
    Purpose purpose;
    Kernels kernels; // of the grouped GEMMs and attention
    int recompute;   // normed activations are made again in backward
    cudaStream_t stream;
    DeviceMemory memory;
    GemmPlans gemm;
    Profile profile;
    TensorTable table;
    Weights weights, grads;                      // into params and grad, on the device
    int fresh;                                   // the experts' gradients have nothing yet: they are set
    float *params, *grad, *exp_avg, *exp_avg_sq; // [num_params] each; the last three NULL without training
    floatX *params_x;                            // [num_params] working copy; in the fp32 build params itself
    LayerActs *layers;                           // [L]
    Arena arena;                                 // what the experts keep, and work in
    int *recent_rows;                            // [L] of the arena in the last steps, on the host
    float *rope;                                 // [T, hd]
    floatX *x;                                   // [N, d] the residual stream after the last layer
    floatX *normed;                              // [N, d] final norm
    float *rstd;                                 // [N]
    floatX *logits;                              // [chunk, V]
    int64_t logit_rows;                          // chunk
    float *losses;                               // [N]
    floatX *dx, *dnormed, *datt, *dqkv; // gradients of the residual stream, a norm's output, att, qkv
    floatX *drouter;                    // [N, E]
    float *dgate;                       // [P]
    float *forced;                      // [N, E] an active set to replace the router's (dump)
    void *scratch;                      // of routing, norms, attention, sums: each in turn
    floatX *router_parts;               // the router's weights in three parts
    StepSums *sums;                     // one
    int64_t *counts;                    // [L, E] of the step
    Batch *batches;                     // [micro-batches] of the step, kept until it is done
    int *staging;                       // the same on the host, pinned
    int *id_places;                     // [V] scratch of the host
    float *host_logits;                 // [V] of sampling
};

// Rows of logits that are in memory at once, at most: as many as keep the product large while [N, V] would
// outgrow all else
static int64_t classifier_most_rows(int64_t N, int V) {
    int64_t rows = ((int64_t)1 << 30) / V / 256 * 256;
    rows = rows < 256 ? 256 : rows;
    return rows < N ? rows : N;
}

// the same number of chunks, evenly filled
static int64_t classifier_rows(int64_t N, int V) {
    int64_t most = classifier_most_rows(N, V), chunks = ceil_div<int64_t>(N, most);
    int64_t rows = ceil_div<int64_t>(ceil_div<int64_t>(N, chunks), 256) * 256;
    return rows < most ? rows : most;
}

// pairs that a token can have at most: only the ReLU router leaves it open (and a dump's forced routes)
static int most_active(const Model *m) {
    const Router *r = &m->config.router;
    return r->method == ROUTER_RELU || m->purpose == FOR_GRADIENTS ? r->experts : m->k_most;
}

static void routing_allocate(Model *m, DevicePairs *pairs, DeviceDispatch *dispatch) {
    DeviceMemory *memory = &m->memory;
    int N = m->B * m->T, E = m->config.router.experts;
    int64_t P = (int64_t)N * most_active(m), rows = arena_worst_rows(N, E, most_active(m));
    pairs->row_start = take<int>(memory, SEGMENT_ACTIVATIONS, N + 1);
    pairs->expert = take<int>(memory, SEGMENT_ACTIVATIONS, P);
    pairs->gate = take<float>(memory, SEGMENT_ACTIVATIONS, P);
    pairs->counts = take<int>(memory, SEGMENT_ACTIVATIONS, E);
    dispatch->offsets = take<int>(memory, SEGMENT_ACTIVATIONS, E + 1);
    dispatch->row_of_pair = take<int>(memory, SEGMENT_ACTIVATIONS, P);
    dispatch->token_of_row = take<int>(memory, SEGMENT_ACTIVATIONS, rows);
    dispatch->gate_of_row = take<float>(memory, SEGMENT_ACTIVATIONS, rows);
}

static void layer_allocate(Model *m, LayerActs *a, floatX *shared_normed) {
    const Config *c = &m->config;
    int64_t N = (int64_t)m->B * m->T, d = c->hidden, E = c->router.experts;
    DeviceMemory *memory = &m->memory;
    a->x = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->attn_normed = m->recompute ? shared_normed : take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->attn_rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    a->qkv = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * config_qkv_width(c));
    a->att = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->lse = take<float>(memory, SEGMENT_ACTIVATIONS, N * c->heads);
    a->mid = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->ffn_normed = m->recompute ? shared_normed : take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->ffn_rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    if (router_has_weights(c->router.method)) {
        a->router_logits = take<float>(memory, SEGMENT_ACTIVATIONS, N * E);
    }
    routing_allocate(m, &a->pairs, &a->dispatch);
}

static void allocate_params(Model *m) {
    DeviceMemory *memory = &m->memory;
    model_tensors(&m->table, &m->weights, &m->config, NULL); // for the number of parameters
    int64_t n = m->table.num_params;
    m->params = take<float>(memory, SEGMENT_MASTERS, n);
#ifdef PRECISION_FP32
    m->params_x = m->params;
#else
    m->params_x = take<floatX>(memory, SEGMENT_WEIGHTS, n);
#endif
    model_tensors(&m->table, &m->weights, &m->config, m->params);
    if (m->purpose != FOR_INFERENCE) {
        m->grad = take<float>(memory, SEGMENT_GRADIENTS, n);
        model_tensors(&m->table, &m->grads, &m->config, m->grad);
    }
    if (m->purpose == FOR_TRAINING) {
        m->exp_avg = take<float>(memory, SEGMENT_MOMENTS, n);
        m->exp_avg_sq = take<float>(memory, SEGMENT_MOMENTS, n);
    }
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// bytes that the largest user of the common scratch wants
static int64_t scratch_bytes(const Model *m) {
    const Config *c = &m->config;
    int N = m->B * m->T, E = c->router.experts;
    int64_t bytes = (int64_t)router_scratch_bytes(c->router, N);
    bytes = larger(bytes, (int64_t)dispatch_scratch_bytes(N, E));
    bytes = larger(bytes, router_has_weights(c->router.method) ? 4 * router_sums_floats(N, E) : 0);
    bytes = larger(bytes, 4 * rmsnorm_scratch_floats(c->hidden));
    bytes = larger(bytes, 4 * (int64_t)attention_scratch_floats(m->B, m->T, c->heads));
    bytes = larger(bytes, 4 * partial_rows_most(N) * c->hidden);
    return larger(bytes, 8 * norm_blocks(m->table.num_params));
}

static void allocate_activations(Model *m) {
    const Config *c = &m->config;
    DeviceMemory *memory = &m->memory;
    int64_t N = (int64_t)m->B * m->T, d = c->hidden, E = c->router.experts;
    int has_logits = router_has_weights(c->router.method);
    floatX *shared_normed = m->recompute ? take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d) : NULL;
    for (int l = 0; l < c->layers; l++) {
        layer_allocate(m, &m->layers[l], shared_normed);
    }
    m->rope = take<float>(memory, SEGMENT_WORKSPACE, (int64_t)m->T * c->head_size);
    m->x = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    m->normed = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    m->rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    m->logit_rows = classifier_rows(N, c->vocab_size);
    // room for the most: largest_batch relies on memory that grows with B
    m->logits =
        take<floatX>(memory, SEGMENT_WORKSPACE, classifier_most_rows(N, c->vocab_size) * c->vocab_size);
    m->losses = take<float>(memory, SEGMENT_WORKSPACE, N);
    m->scratch = take<unsigned char>(memory, SEGMENT_WORKSPACE, scratch_bytes(m));
    m->router_parts = take<floatX>(memory, SEGMENT_WORKSPACE, has_logits ? 3 * E * d : 0);
    m->sums = take<StepSums>(memory, SEGMENT_WORKSPACE, 1);
    m->counts = take<int64_t>(memory, SEGMENT_WORKSPACE, c->layers * E);
    if (m->purpose != FOR_INFERENCE) {
        m->dx = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->dnormed = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->datt = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->dqkv = take<floatX>(memory, SEGMENT_WORKSPACE, N * config_qkv_width(c));
        m->drouter = take<floatX>(memory, SEGMENT_WORKSPACE, has_logits ? N * E : 0);
        m->dgate = take<float>(memory, SEGMENT_WORKSPACE, N * E);
    }
    if (m->purpose == FOR_GRADIENTS) { // a dump may force the routes
        m->forced = take<float>(memory, SEGMENT_WORKSPACE, has_logits ? N * E : 0);
    }
}

// everything but the arena's store, which gets what is left; counts only, when memory.counting
static void allocate_all(Model *m, int64_t store_rows) {
    const Config *c = &m->config;
    allocate_params(m);
    allocate_activations(m);
    void *workspace = take<unsigned char>(&m->memory, SEGMENT_WORKSPACE, GEMM_WORKSPACE_BYTES);
    if (!m->memory.counting) {
        gemm_open(&m->gemm, workspace, GEMM_WORKSPACE_BYTES);
    }
    arena_init(&m->arena, &m->memory, c->layers, m->B * m->T, c->router.experts, c->router.active,
               most_active(m), c->hidden, c->ffn, store_rows, m->purpose != FOR_INFERENCE, m->kernels);
}

// bytes that this model would take for micro-batches of B sequences, without any store of pairs
static int64_t fixed_bytes(const Model *like, int B) {
    Model m;
    memset(&m, 0, sizeof(m));
    m.config = like->config;
    m.B = B;
    m.T = like->T;
    m.k_most = like->k_most;
    m.purpose = like->purpose;
    m.recompute = like->recompute;
    m.kernels = like->kernels;
    m.memory.counting = 1;
    m.layers = NEW(LayerActs, like->config.layers);
    allocate_all(&m, 0);
    int64_t bytes = memory_total(&m.memory);
    arena_free(&m.arena);
    free(m.layers);
    free(m.table.tensors);
    free(m.weights.layers);
    free(m.grads.layers);
    return bytes;
}

// can the rows of so many sequences a micro-batch be numbered in 31 bits?
static int rows_countable(const Config *c, int64_t B, int64_t T) {
    return B * T * c->router.experts + (int64_t)ROW_ALIGN * c->router.experts < INT32_MAX;
}

static int largest_batch(const Model *like, int64_t available) {
    int fits = 0;
    for (int step = 1 << 16; step > 0; step /= 2) { // memory grows with B
        int B = fits + step;
        if (B <= 65536 && rows_countable(&like->config, B, like->T) && fixed_bytes(like, B) <= available) {
            fits = B;
        }
    }
    return fits;
}

static void check_shapes(const Config *c, int64_t B, int64_t T) {
    if (c->head_size % 8 != 0 || c->head_size > 128) {
        die("head size %d (hidden %d over %d heads): the CUDA trainer computes head sizes 8 to 128 in "
            "multiples "
            "of 8\n  ---> change --hidden or --heads, or use ./train_remoe",
            c->head_size, c->hidden, c->heads);
    }
    if (c->hidden % 8 != 0 || c->ffn % 8 != 0) {
        die("hidden size %d and expert width %d must be multiples of 8 for the CUDA trainer\n"
            "  ---> change --hidden, --ffn-mult or --granularity, or use ./train_remoe",
            c->hidden, c->ffn);
    }
    if (!rows_countable(c, B, T)) {
        die("%lld tokens a micro-batch with %d experts: more than 2^31 rows of pairs\n  ---> use a smaller "
            "--batch",
            (long long)(B * T), c->router.experts);
    }
}

// ints of one micro-batch: inputs, targets, and where each id stands
static int64_t batch_ints(const Model *m) {
    int64_t N = (int64_t)m->B * m->T;
    return 2 * N + (int64_t)embedding_plan_ints(N);
}

// all micro-batches of a step, so that it can be repeated
static void allocate_batches(Model *m, int micro_batches) {
    int64_t N = (int64_t)m->B * m->T, ints = batch_ints(m);
    int *at = take<int>(&m->memory, SEGMENT_WORKSPACE, micro_batches * ints);
    m->batches = NEW(Batch, micro_batches);
    m->id_places = NEW(int, m->config.vocab_size);
    CUDA_CHECK(cudaMallocHost(&m->staging, (size_t)(micro_batches * ints) * sizeof(int)));
    for (int i = 0; i < micro_batches; i++, at += ints) {
        m->batches[i].inputs = at;
        m->batches[i].targets = at + N;
        m->batches[i].positions = embedding_plan_in(at + 2 * N, N);
    }
}

// driver, libraries and fragmentation want some too
static int64_t available_bytes(void) {
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    return (int64_t)available - (int64_t)total / 50;
}

// rows of the arena's store: --pair-budget, or what is left over, at most all pairs of all layers
static int64_t choose_store_rows(const Model *m, const Options *o, int64_t left_over) {
    const Config *c = &m->config;
    if (m->purpose == FOR_INFERENCE) {
        return 0;
    }
    int64_t worst = c->layers * arena_worst_rows(m->B * m->T, c->router.experts, most_active(m));
    int64_t budget = o->pair_budget > 0.0 ? (int64_t)(o->pair_budget * 1e9) : left_over;
    int64_t rows = budget / arena_row_bytes(c->ffn);
    return rows < worst ? rows : worst;
}

static void print_memory(const Model *m, int64_t driver_bytes, int most) {
    printf("memory   ");
    for (int segment = 0; segment < SEGMENT_COUNT; segment++) {
        printf(" %s %.2f%s", segment_name(segment), 1e-9 * (double)m->memory.bytes[segment],
               segment + 1 < SEGMENT_COUNT ? " |" : "");
    }
    printf(" | total %.2f GB (the driver counts %.2f)\n", 1e-9 * (double)memory_total(&m->memory),
           1e-9 * (double)driver_bytes);
    printf("          --batch %d of at most %d; pairs: room for %.2f experts a token and layer\n", m->B, most,
           (double)m->arena.store_rows / ((double)m->B * m->T * m->config.layers));
}

static void open_device(Model *m) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) {
        die("no CUDA device: %s\n  ---> ./train_remoe trains on the CPU",
            error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
    }
    CUDA_CHECK(cudaSetDevice(0));
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 8) {
        die("the CUDA device is older than compute capability 8.0 (Ampere)\n"
            "  ---> ./train_remoe trains on the CPU");
    }
    CUDA_CHECK(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
}

// Copies between host and device that are over when the call returns. In the model's own stream, which does not
// wait for any other: a plain cudaMemcpy from ordinary host memory may still be under way when it returns
static void copy_now(const Model *m, void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, kind, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

static void upload_rope(const Model *m) {
    const Config *c = &m->config;
    int64_t n = (int64_t)m->T * c->head_size;
    float *table = NEW(float, n);
    rope_table(table, m->T, c->head_size, c->rope_theta);
    copy_now(m, m->rope, table, (size_t)n * sizeof(float), cudaMemcpyHostToDevice);
    free(table);
}

// weights, gradients and moments are zero until a run sets them
static void clear_weights(const Model *m) {
    size_t bytes = (size_t)m->table.num_params * sizeof(float);
    float *buffers[] = {m->params, m->grad, m->exp_avg, m->exp_avg_sq};
    for (int i = 0; i < 4; i++) {
        if (buffers[i] != NULL) {
            CUDA_CHECK(cudaMemsetAsync(buffers[i], 0, bytes, m->stream));
        }
    }
}

static void refuse_too_large(const Model *m, const Options *o, int64_t need, int64_t available, int most) {
    char remedy[64] = "use a smaller model, or a shorter --seq-len";
    if (most > 0) {
        check_format(remedy, sizeof(remedy), "the largest that fits: --batch %d", most);
    }
    if (need > available) {
        die("--batch %d needs %.2f GB of device memory, %.2f are free\n  ---> %s", m->B, 1e-9 * (double)need,
            1e-9 * (double)available, remedy);
    }
    if (o->pair_budget * 1e9 > (double)(available - need)) {
        die("--pair-budget %g: only %.2f GB are left for pairs\n"
            "  ---> a smaller --pair-budget, or 0 for all that is left",
            o->pair_budget, 1e-9 * (double)(available - need));
    }
}

static Kernels choose_kernels(const Options *o) {
    Kernels best = grouped_best_kernels();
    int hopper = strcmp(o->kernels, "hopper") == 0, portable = strcmp(o->kernels, "portable") == 0;
    if (hopper && best != KERNELS_HOPPER) {
        die("--kernels hopper: they need a Hopper GPU (H100, H200), a build for sm_90a, and bf16\n"
            "  ---> --kernels portable, or make CUDA_ARCHS=90a");
    }
    if (emulated() && !hopper) {
        return KERNELS_PORTABLE; // the emulator has both, and mma.sync's are the faster ones there
    }
    return portable ? KERNELS_PORTABLE : best;
}

Model *model_open(const Config *config, const Options *o, Purpose purpose) {
    check_shapes(config, o->batch, o->seq_len);
    Model *m = NEW(Model, 1);
    int64_t warm = o->topk_warmup_steps > 0 ? o->topk_warmup_k * config->granularity : 0;
    m->config = *config;
    m->B = (int)o->batch;
    m->T = (int)o->seq_len;
    m->k = config->router.active;
    m->k_most =
        (int)(config->router.experts < larger(m->k, warm) ? config->router.experts : larger(m->k, warm));
    m->purpose = purpose;
    m->recompute = o->recompute && purpose != FOR_INFERENCE;
    m->layers = NEW(LayerActs, config->layers);
    m->host_logits = NEW(float, config->vocab_size);
    m->recent_rows = NEW(int, config->layers);
    open_device(m);
    m->kernels = choose_kernels(o);
    int64_t available = available_bytes();
    int64_t batches = 4 * batch_ints(m) * (o->global_batch / o->batch);
    int64_t need = fixed_bytes(m, m->B) + batches;
    int most = largest_batch(m, available - batches);
    refuse_too_large(m, o, need, available, most);
    allocate_all(m, choose_store_rows(m, o, available - need));
    allocate_batches(m, (int)(o->global_batch / o->batch));
    upload_rope(m);
    clear_weights(m);
    if (purpose == FOR_TRAINING) {
        print_memory(m, available - available_bytes(), most);
    }
    return m;
}

void model_close(Model *m) {
    CUDA_CHECK(cudaDeviceSynchronize());
    gemm_close(&m->gemm);
    arena_free(&m->arena);
    memory_release(&m->memory);
    CUDA_CHECK(cudaFreeHost(m->staging));
    CUDA_CHECK(cudaStreamDestroy(m->stream));
    free(m->batches);
    free(m->id_places);
    free(m->layers);
    free(m->host_logits);
    free(m->recent_rows);
    free(m->table.tensors);
    free(m->weights.layers);
    free(m->grads.layers);
    free(m);
}

// the rounded working copy of a master
static const floatX *working(const Model *m, const float *master) {
    return m->params_x + (master - m->params);
}

// ----------------------------------------------------------------------------
// forward

// x, attn_normed [N, d] -> mid [N, d] = x + Attn(RMSNorm(x)); rows start .. T-1 of each sequence
static void attention_block_forward(Model *m, int l, int B, int T, int start) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerActs *a = &m->layers[l];
    int N = B * (T - start), d = c->hidden, width = (int)config_qkv_width(c);
    floatX *qkv = a->qkv + (int64_t)start * width; // start > 0 has B = 1: its rows follow the cached ones
    profile_mark(&m->profile, "attention projections", m->stream);
    matmul_forward(qkv, a->attn_normed, working(m, w->qkv), N, d, width, &m->gemm, m->stream);
    profile_mark(&m->profile, "rope", m->stream);
    rope_forward(qkv, m->rope, B, T - start, start, c->heads + c->kv_heads, c->head_size, width, m->stream);
    profile_mark(&m->profile, "attention forward", m->stream);
    attention_forward(a->att, a->lse, a->qkv, B, T, start, c->heads, c->kv_heads, c->head_size, m->kernels,
                      m->stream);
    profile_mark(&m->profile, "attention projections", m->stream);
    gemm(&m->gemm, 0, 1, N, d, d, a->att, d, working(m, w->o), d, a->mid, d, a->x,
         m->stream); // x + att W_o^T
}

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
        const LayerActs *a = &m->layers[l + 1];
        LayerOut next = {a->x, a->attn_normed, a->attn_rstd, m->weights.layers[l + 1].attn_norm};
        return next;
    }
    LayerOut last = {m->x, m->normed, m->rstd, m->weights.norm};
    return last;
}

// mid [N, d] -> out [N, d] = mid + MoE(RMSNorm(mid)), sum over the active experts (Eq. 1), and the next norm. ids,
// forced: device
static void moe_block_forward(Model *m, int l, const int *ids, int N, const float *forced) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerActs *a = &m->layers[l];
    int d = c->hidden, E = c->router.experts;
    profile_mark(&m->profile, "norms", m->stream);
    if (w->router != NULL) { // z = W x, W from its fp32 master
        rmsnorm_router_forward(a->ffn_normed, a->ffn_rstd, a->router_logits, a->mid, w->ffn_norm, w->router,
                               N, d, E, (float)c->norm_eps, m->router_parts, (float *)m->scratch, &m->gemm,
                               m->stream);
    } else {
        rmsnorm_forward(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, (float)c->norm_eps, m->stream);
    }
    profile_mark(&m->profile, "router and dispatch", m->stream);
    router_forward(a->pairs, a->router_logits, ids, forced, router_in_force(m), N, m->scratch, m->stream);
    dispatch_sort(a->dispatch, a->pairs, N, E, m->scratch, m->stream);
    arena_place(&m->arena, l, a->dispatch, m->stream);
    profile_mark(&m->profile, "experts forward", m->stream);
    CombineChunk sums = experts_forward(a->ffn_normed, working(m, w->gate_up), working(m, w->down), a->pairs,
                                        a->dispatch, &m->arena, l, N, d, c->ffn, m->stream);
    profile_mark(&m->profile, "combine and norms", m->stream);
    LayerOut out = layer_out(m, l);
    dispatch_combine_rmsnorm_forward(out.x, out.normed, out.rstd, a->mid, sums, out.norm, N, d,
                                     (float)c->norm_eps, m->stream);
}

// the active set of layer l from the host (dump), or NULL
static const float *upload_forced(Model *m, const float *const *forced, int l, int N) {
    if (forced == NULL || m->forced == NULL) {
        return NULL;
    }
    size_t bytes = (size_t)N * (size_t)m->config.router.experts * sizeof(float);
    CUDA_CHECK(cudaMemcpyAsync(m->forced, forced[l], bytes, cudaMemcpyHostToDevice, m->stream));
    return m->forced;
}

// ids [N], on the device: rows start .. T-1 of B sequences (start > 0 only with B = 1: the earlier positions are
// in the qkv buffers). forced: NULL, or for each layer an active set [N, E] that replaces the router's own
static void model_forward(Model *m, const int *ids, int B, int T, int start, const float *const *forced) {
    const Config *c = &m->config;
    int N = B * (T - start);
    arena_begin_micro_batch(&m->arena, m->stream);
    profile_mark(&m->profile, "embedding", m->stream);
    LayerActs *first = &m->layers[0];
    embedding_forward(first->x, ids, working(m, m->weights.embed), N, c->hidden, m->stream);
    profile_mark(&m->profile, "norms", m->stream);
    rmsnorm_forward(first->attn_normed, first->attn_rstd, first->x, m->weights.layers[0].attn_norm, N,
                    c->hidden, (float)c->norm_eps, m->stream); // the later ones: each of the layer before
    for (int l = 0; l < c->layers; l++) {
        attention_block_forward(m, l, B, T, start);
        moe_block_forward(m, l, ids, N, upload_forced(m, forced, l, N));
    }
}

// losses of N targets. grad_scale != 0: the head's gradient and dnormed too, of grad_scale * sum of the losses;
// all_logits: NULL, or [N, V] on the device to keep them
static void classifier(Model *m, const int *targets, int N, float grad_scale, floatX *all_logits) {
    int64_t d = m->config.hidden, V = m->config.vocab_size;
    const floatX *head = working(m, m->weights.head);
    for (int64_t first = 0; first < N; first += m->logit_rows) {
        int64_t rows = N - first < m->logit_rows ? N - first : m->logit_rows;
        const floatX *normed = m->normed + first * d;
        profile_mark(&m->profile, "head", m->stream);
        matmul_forward(m->logits, normed, head, rows, (int)d, (int)V, &m->gemm, m->stream);
        if (all_logits != NULL) {
            CUDA_CHECK(cudaMemcpyAsync(all_logits + first * V, m->logits, (size_t)(rows * V) * sizeof(floatX),
                                       cudaMemcpyDeviceToDevice, m->stream));
        }
        profile_mark(&m->profile, "cross entropy", m->stream);
        crossentropy_forward_backward(m->losses + first, m->logits, targets + first, rows, (int)V, grad_scale,
                                      m->stream);
        if (grad_scale != 0.0f) {
            profile_mark(&m->profile, "head", m->stream);
            matmul_backward(m->dnormed + first * d, m->grads.head, m->logits, normed, head, rows, (int)d,
                            (int)V, &m->gemm, m->stream);
        }
    }
}

// adds scale * the column `reg` (router.h) of a micro-batch to the step's
static void regulariser(Model *m, int N, double scale) {
    for (int l = 0; l < m->config.layers; l++) {
        const LayerActs *a = &m->layers[l];
        router_loss(&m->sums->reg_loss, a->pairs, a->router_logits, router_in_force(m), N, m->config.layers,
                    scale, m->scratch, m->stream);
    }
}

// ----------------------------------------------------------------------------
// backward, in the forward's reverse order; m->dx carries the residual stream's gradient

static void moe_block_backward(Model *m, int l, int N, double reg_weight) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerWeights *g = &m->grads.layers[l];
    LayerActs *a = &m->layers[l];
    int d = c->hidden, E = c->router.experts;
    if (m->recompute) {
        profile_mark(&m->profile, "norms", m->stream);
        rmsnorm_again(a->ffn_normed, a->ffn_rstd, a->mid, w->ffn_norm, N, d, m->stream);
    }
    profile_mark(&m->profile, "experts backward", m->stream);
    CombineChunk sums = experts_backward(m->dgate, g->gate_up, g->down, m->fresh, m->dx, a->ffn_normed,
                                         working(m, w->gate_up), working(m, w->down), a->pairs, a->dispatch,
                                         &m->arena, l, N, d, c->ffn, m->stream);
    profile_mark(&m->profile, "router and dispatch", m->stream);
    const floatX *router = w->router != NULL ? working(m, w->router) : NULL;
    if (router != NULL) {
        router_backward(m->drouter, m->dgate, a->pairs, a->router_logits, router_in_force(m), N, c->layers,
                        reg_weight, m->stream);
        matmul_backward(NULL, g->router, m->drouter, a->ffn_normed, router, N, d, E, &m->gemm, m->stream);
    }
    profile_mark(&m->profile, "combine and norms", m->stream);
    dispatch_combine_rmsnorm_backward(
        m->dx, g->ffn_norm, m->dnormed, sums, router != NULL ? m->drouter : NULL, router, a->mid, w->ffn_norm,
        a->ffn_rstd, c->router.method == ROUTER_RELU, N, d, (float *)m->scratch, &m->gemm, m->stream);
}

static void attention_block_backward(Model *m, int l, int B, int T) {
    const Config *c = &m->config;
    const LayerWeights *w = &m->weights.layers[l];
    LayerWeights *g = &m->grads.layers[l];
    LayerActs *a = &m->layers[l];
    int N = B * T, d = c->hidden, width = (int)config_qkv_width(c);
    if (m->recompute) {
        profile_mark(&m->profile, "norms", m->stream);
        rmsnorm_again(a->attn_normed, a->attn_rstd, a->x, w->attn_norm, N, d, m->stream);
    }
    profile_mark(&m->profile, "attention projections", m->stream);
    matmul_backward(m->datt, g->o, m->dx, a->att, working(m, w->o), N, d, d, &m->gemm, m->stream);
    profile_mark(&m->profile, "attention backward", m->stream); // and RoPE's
    attention_rope_backward(m->dqkv, m->datt, a->att, a->qkv, a->lse, (float *)m->scratch, m->rope, B, T,
                            c->heads, c->kv_heads, c->head_size, m->kernels, m->stream);
    profile_mark(&m->profile, "attention projections", m->stream);
    matmul_backward(m->dnormed, g->qkv, m->dqkv, a->attn_normed, working(m, w->qkv), N, d, width, &m->gemm,
                    m->stream);
    profile_mark(&m->profile, "norms", m->stream);
    rmsnorm_backward(m->dx, g->attn_norm, m->dnormed, a->x, w->attn_norm, a->attn_rstd, N, d,
                     (float *)m->scratch, m->stream);
}

// after model_forward and classifier (which left dnormed): adds to all gradients. reg_weight: of the regulariser
static void model_backward(Model *m, const Batch *batch, int B, int T, double reg_weight) {
    const Config *c = &m->config;
    int N = B * T, d = c->hidden;
    profile_mark(&m->profile, "norms", m->stream);
    CUDA_CHECK(cudaMemsetAsync(m->dx, 0, (size_t)N * (size_t)d * sizeof(floatX), m->stream));
    rmsnorm_backward(m->dx, m->grads.norm, m->dnormed, m->x, m->weights.norm, m->rstd, N, d,
                     (float *)m->scratch, m->stream);
    for (int l = c->layers - 1; l >= 0; l--) {
        moe_block_backward(m, l, N, reg_weight);
        attention_block_backward(m, l, B, T);
    }
    profile_mark(&m->profile, "embedding", m->stream);
    embedding_backward(m->grads.embed, m->dx, batch->positions, (float *)m->scratch, N, d, m->stream);
    m->fresh = 0;
}

// ----------------------------------------------------------------------------
// one optimizer step

// weight of a micro-batch's losses in the step's
static void sum_step(Model *m, int N, int micro_batches) {
    int E = m->config.router.experts;
    profile_mark(&m->profile, "losses and counts", m->stream);
    sum_losses(&m->sums->lm_loss, m->losses, N, 1.0 / ((double)N * micro_batches), m->stream);
    regulariser(m, N, 1.0 / micro_batches);
    for (int l = 0; l < m->config.layers; l++) {
        routing_stats(&m->sums->routing, m->layers[l].pairs, m->counts + (int64_t)l * E, N, E, m->stream);
    }
}

// Queues one of `micro_batches`: adds its gradient to m->grad, its losses and routing to the step's sums.
// Nothing here waits for the device: a CUDA graph can capture it
static void micro_step(Model *m, const Batch *batch, int B, int T, int micro_batches, double reg_weight) {
    int N = B * T;
    model_forward(m, batch->inputs, B, T, 0, NULL);
    classifier(m, batch->targets, N, (float)(1.0 / ((double)N * micro_batches)), NULL);
    sum_step(m, N, micro_batches);
    model_backward(m, batch, B, T, reg_weight / micro_batches);
}

// All but the experts', which are nearly all there are: the first micro-batch sets those. A layer's, gate_up and
// down, lie together
static void clear_gradients(Model *m) {
    int64_t experts = 3 * (int64_t)m->arena.E * m->config.ffn * m->config.hidden;
    float *from = m->grad;
    for (int l = 0; l <= m->config.layers; l++) {
        float *to = l < m->config.layers ? m->grads.layers[l].gate_up : m->grad + m->table.num_params;
        CUDA_CHECK(cudaMemsetAsync(from, 0, (size_t)(to - from) * sizeof(float), m->stream));
        from = to + experts;
    }
    m->fresh = 1;
}

static void begin_step(Model *m) {
    int64_t cells = (int64_t)m->config.layers * m->config.router.experts;
    profile_mark(&m->profile, "clearing gradients", m->stream);
    CUDA_CHECK(cudaMemsetAsync(m->sums, 0, sizeof(StepSums), m->stream));
    CUDA_CHECK(cudaMemsetAsync(m->counts, 0, (size_t)cells * sizeof(int64_t), m->stream));
    if (m->grad != NULL) {
        clear_gradients(m);
    }
    arena_begin_step(&m->arena, m->stream);
}

static void gradient_norm(Model *m) {
    profile_mark(&m->profile, "gradient norm", m->stream);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *tensor = &m->table.tensors[i];
        sum_of_squares(&m->sums->grad_squares, m->grad + tensor->offset, tensor->size, (double *)m->scratch,
                       m->stream);
    }
    profile_mark(&m->profile, NULL, m->stream);
}

// what the device has summed up; waits for it. Returns 0 if a layer had more chunks of pairs than were planned:
// then s is untouched, the step is worthless, and the plan is larger
static int read_step(Model *m, int64_t tokens, StepStats *s) {
    int L = m->config.layers, E = m->config.router.experts, overflow;
    StepSums sums;
    int64_t *counts = NEW(int64_t, L * E);
    int *rows = NEW(int, L);
    copy_now(m, &overflow, m->arena.overflow, sizeof(int), cudaMemcpyDeviceToHost);
    copy_now(m, rows, m->arena.most_rows, (size_t)L * sizeof(int), cudaMemcpyDeviceToHost);
    copy_now(m, &sums, m->sums, sizeof(sums), cudaMemcpyDeviceToHost);
    copy_now(m, counts, m->counts, (size_t)(L * E) * sizeof(int64_t), cudaMemcpyDeviceToHost);
    if (overflow) {
        arena_grow(&m->arena, rows);
    } else {
        s->tokens += tokens;
        s->active += sums.routing.active;
        s->zero_expert += sums.routing.zero_expert;
        s->lm_loss += sums.lm_loss;
        s->reg_loss += sums.reg_loss;
        s->grad_norm = sqrt(sums.grad_squares);
        for (int i = 0; i < L * E; i++) {
            s->counts[i] += counts[i];
        }
        arena_remember(m->recent_rows, rows, L);
        arena_plan(&m->arena, m->recent_rows);
    }
    free(counts);
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
    arena_plan(&m->arena, all);
    free(all);
}

// the i-th micro-batch of a step, from the host. Its part of the staging buffer must no longer be in use: a step
// ends by waiting for the device
static void upload_batch(Model *m, int i, const int *inputs, const int *targets, int N) {
    int64_t most = (int64_t)m->B * m->T, ints = batch_ints(m);
    int *host = m->staging + i * ints;
    memcpy(host, inputs, (size_t)N * sizeof(int));
    memcpy(host + most, targets, (size_t)N * sizeof(int));
    if (m->grad != NULL) {
        embedding_plan(embedding_plan_in(host + 2 * most, most), inputs, N, m->config.vocab_size,
                       m->id_places);
    }
    CUDA_CHECK(cudaMemcpyAsync(m->batches[i].inputs, host, (size_t)ints * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
}

void model_gradients(Model *m, Prefetcher *ahead, int micro_batches, int B, int T, double reg_weight,
                     StepStats *s) {
    for (int taken = 0, done = 0; !done;) { // again, if a layer had more pairs than were planned for
        begin_step(m);
        for (int i = 0; i < micro_batches; i++) {
            if (taken == i) {
                int *inputs, *targets;
                prefetch_next(ahead, &inputs, &targets);
                upload_batch(m, i, inputs, targets, B * T);
                taken++;
            }
            micro_step(m, &m->batches[i], B, T, micro_batches, reg_weight);
        }
        gradient_norm(m);
        done = read_step(m, (int64_t)micro_batches * B * T, s);
    }
}

void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t) {
    AdamW adamw = {0.9, 0.999, 1e-8};
    profile_mark(&m->profile, "AdamW", m->stream);
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *tensor = &m->table.tensors[i];
        int64_t at = tensor->offset;
        adamw_update(m->params + at, m->params_x + at, m->exp_avg + at, m->exp_avg_sq + at, m->grad + at,
                     tensor->size, adamw, lr, tensor->decay ? weight_decay : 0.0, grad_scale, t, m->stream);
    }
    profile_mark(&m->profile, NULL, m->stream);
}

// ----------------------------------------------------------------------------
// what a run asks for (llmc/run/run.h)

const TensorTable *model_table(const Model *m) {
    return &m->table;
}

static float *device_buffer(const Model *m, ModelBuffer which) {
    switch (which) {
    case BUFFER_PARAMS: return m->params;
    case BUFFER_GRADS: return m->grad;
    case BUFFER_EXP_AVG: return m->exp_avg;
    default: return m->exp_avg_sq;
    }
}

float *model_borrow(Model *m, ModelBuffer which) {
    float *host = (float *)check_realloc(NULL, (size_t)m->table.num_params, sizeof(float));
    copy_now(m, host, device_buffer(m, which), (size_t)m->table.num_params * sizeof(float),
             cudaMemcpyDeviceToHost);
    return host;
}

void model_return(Model *m, ModelBuffer which, float *buffer, int changed) {
    if (changed) {
        copy_now(m, device_buffer(m, which), buffer, (size_t)m->table.num_params * sizeof(float),
                 cudaMemcpyHostToDevice);
    }
#ifndef PRECISION_FP32
    if (changed && which == BUFFER_PARAMS) {
        round_copy(m->params_x, m->params, m->table.num_params, m->stream);
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
    }
#endif
    free(buffer);
}

void model_route(Model *m, RouterMethod method, int k) {
    m->config.router.method = method;
    m->k = k;
}

// the worst case of N tokens, for a forward apart from training; returns training's plan, to be put back
static int *plan_apart(Model *m, int N) {
    int *planned = m->arena.planned;
    m->arena.planned = NEW(int, m->config.layers);
    plan_worst(m, N);
    return planned;
}

static void plan_back(Model *m, int *planned) {
    free(m->arena.planned);
    m->arena.planned = planned;
}

double model_loss(Model *m, const int *inputs, const int *targets, int B, int T) {
    double loss;
    int N = B * T;
    int *planned = plan_apart(m, N);
    upload_batch(m, 0, inputs, targets, N);
    model_forward(m, m->batches[0].inputs, B, T, 0, NULL);
    classifier(m, m->batches[0].targets, N, 0.0f, NULL);
    CUDA_CHECK(cudaMemsetAsync(&m->sums->lm_loss, 0, sizeof(double), m->stream));
    sum_losses(&m->sums->lm_loss, m->losses, N, 1.0 / N, m->stream);
    copy_now(m, &loss, &m->sums->lm_loss, sizeof(double), cudaMemcpyDeviceToHost);
    plan_back(m, planned);
    return loss;
}

static void download(const Model *m, float *host, const floatX *device, int64_t n) {
#ifdef PRECISION_FP32
    copy_now(m, host, device, (size_t)n * sizeof(float), cudaMemcpyDeviceToHost);
#else
    floatX *rounded = NEW(floatX, n);
    copy_now(m, rounded, device, (size_t)n * sizeof(floatX), cudaMemcpyDeviceToHost);
    for (int64_t i = 0; i < n; i++) {
        host[i] = to_float(rounded[i]);
    }
    free(rounded);
#endif
}

const float *model_next_logits(Model *m, const int *ids, int n, int start) {
    int d = m->config.hidden, V = m->config.vocab_size, rows = n - start;
    Batch *batch = &m->batches[0];
    int *planned = plan_apart(m, rows);
    CUDA_CHECK(cudaMemcpyAsync(batch->inputs, ids + start, (size_t)rows * sizeof(int), cudaMemcpyHostToDevice,
                               m->stream));
    model_forward(m, batch->inputs, 1, n, start, NULL);
    matmul_forward(m->logits, m->normed + (int64_t)(rows - 1) * d, working(m, m->weights.head), 1, d, V,
                   &m->gemm, m->stream);
    download(m, m->host_logits, m->logits, V);
    plan_back(m, planned);
    return m->host_logits;
}

static void download_gates(Model *m, float *const *gates, int N) {
    int E = m->config.router.experts;
    float *dense = NULL;
    CUDA_CHECK(cudaMalloc(&dense, (size_t)N * (size_t)E * sizeof(float)));
    for (int l = 0; l < m->config.layers; l++) {
        pairs_to_dense(dense, m->layers[l].pairs, N, E, m->stream);
        copy_now(m, gates[l], dense, (size_t)N * (size_t)E * sizeof(float), cudaMemcpyDeviceToHost);
    }
    CUDA_CHECK(cudaFree(dense));
}

void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, StepStats *s) {
    int N = B * T;
    int64_t V = m->config.vocab_size;
    floatX *all_logits = NULL;
    if (logits != NULL) {
        CUDA_CHECK(cudaMalloc(&all_logits, (size_t)(N * V) * sizeof(floatX)));
    }
    plan_worst(m, N);
    begin_step(m);
    upload_batch(m, 0, inputs, targets, N);
    model_forward(m, m->batches[0].inputs, B, T, 0, forced);
    classifier(m, m->batches[0].targets, N, 1.0f / (float)N, all_logits);
    sum_step(m, N, 1);
    model_backward(m, &m->batches[0], B, T, reg_weight);
    gradient_norm(m);
    read_step(m, N, s);
    if (logits != NULL) {
        download(m, logits, all_logits, N * V);
        CUDA_CHECK(cudaFree(all_logits));
    }
    if (gates != NULL) {
        download_gates(m, gates, N);
    }
}

double model_memory_gb(const Model *m) {
    return 1e-9 * (double)memory_total(&m->memory);
}

// dense bf16 peak of the cards we know: their data sheets'
double model_peak_flops(const Model *m) {
    (void)m;
#ifdef PRECISION_FP32
    return 0.0; // tensor cores have no part in it
#else
    cudaDeviceProp prop;
    CUDA_CHECK(cudaGetDeviceProperties(&prop, 0));
    if (strstr(prop.name, "PCIe") != NULL || strstr(prop.name, "NVL") != NULL) { // slower than the SXM cards
        return 0.0;
    }
    if (strstr(prop.name, "H100") != NULL || strstr(prop.name, "H200") != NULL) {
        return 989.4e12;
    }
    return strstr(prop.name, "A100") != NULL ? 312e12 : 0.0;
#endif
}

void model_profile(Model *m, int on) {
    if (on) {
        profile_begin(&m->profile);
    } else {
        profile_end(&m->profile);
    }
}

int main(int argc, char **argv) {
    return run_main(argc, argv);
}
