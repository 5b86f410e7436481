/*
What the CUDA trainer keeps on the device: the model in groups, the plan of its memory, and how large a
micro-batch fits.

allocate_all() takes every buffer but the pair arena's store, which gets what is left over. The same function
with memory.counting set counts bytes only: so the refusal of a micro-batch that is too large, and the largest
that would fit, cannot disagree with what is taken afterwards.

Letters: B sequences of T tokens a micro-batch, N = B T, d hidden, L layers, H heads, KV key/value heads, hd
head size, V vocabulary, E = E_tot experts, F width of an expert, P active (token, expert) pairs. Errors:
shapes that the kernels do not compute, and what does not fit, end the program with the option to change.
*/
#ifndef MODEL_MEMORY_CUH
#define MODEL_MEMORY_CUH

#include "llmc/attention.cuh"
#include "llmc/dispatch.cuh"
#include "llmc/embedding.cuh"
#include "llmc/gpu/arena.cuh"
#include "llmc/gpu/comm_open.cuh"
#include "llmc/gpu/device.cuh"
#include "llmc/gpu/device_params.cuh"
#include "llmc/gpu/losses.cuh"
#include "llmc/gpu/memory.cuh"
#include "llmc/gpu/profile.cuh"
#include "llmc/gpu/text.cuh"
#include "llmc/matmul.cuh"
#include "llmc/merged_experts.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/rope.h"
#include "llmc/router.cuh"
#include "llmc/trainer.h"
// defines: floatX, take, DeviceMemory; Arena; DevicePairs, DeviceDispatch; DeviceMerged; Losses; Text;
// GemmPlans; *_scratch_*; Params, Config

enum { GEMM_WORKSPACE_BYTES = 64 << 20 }; // what cuBLASLt's Hopper kernels want at most is 32 MB

// ----------------------------------------------------------------------------
// the model

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
    float *router_logits;    // [N, E], or what the router makes of them
    DevicePairs pairs;       // who goes where, with which gate
    DeviceDispatch dispatch; // the same, sorted by expert
} LayerActs;

// what a step's micro-batches add up on the device
typedef struct {
    double lm_loss, reg_loss;
    RoutingStats routing;
} StepSums;

// what a rank has to say at the end of a step; behind it counts [L E] (int64), then the arena's rows [L]
// (int)
typedef struct {
    StepSums sums;
    int overflow; // a layer had more pairs than were planned for
    int stop;     // this rank wants the run to end
} Vote;

static_assert(sizeof(Vote) % sizeof(int64_t) == 0, "counts stand behind it");

// what forward leaves for backward, and the head
typedef struct {
    LayerActs *layers;           // [L]
    float *rope;                 // [T, hd]
    floatX *x;                   // [N, d] the residual stream after the last layer
    floatX *normed;              // [N, d] final norm
    float *rstd;                 // [N]
    floatX *logits;              // [chunk, V]
    int64_t logit_rows;          // chunk
    float *losses;               // [N]
    int *score_rows;             // [N] which rows of the residual stream are scored
    unsigned char *score_greedy; // [N]
} Activations;

// gradients of activations: all layers share them, backward passes them on
typedef struct {
    floatX *dx, *dnormed, *datt, *dqkv; // of the residual stream, a norm's output, att, qkv
    floatX *drouter;                    // [N, E]
    float *dgate;                       // [P]
} ActivationGradients;

typedef struct {
    Arena arena;          // what the experts keep, and work in
    DeviceMerged merged;  // lory's experts of some segments
    int *counts_all;      // [L, E] tokens per expert of the micro-batch, of all ranks
    int *recent_rows;     // [L] of the arena in the last steps, on the host
    float *forced;        // [N, E] an active set to replace the router's (dump)
    floatX *router_parts; // the router's weights in three parts
} Routing;

typedef struct {
    StepSums *sums;       // one
    int64_t *counts;      // [L, E] of the step
    double *grad_squares; // one: of all gradients
    uint64_t *draw_key;   // one: of the routers' draws
    Batch *batches;       // [micro-batches], kept until the step is done
    int *staging;         // the same on the host, pinned
    int *id_places;       // [V] scratch of the host
} Step;

struct Model {
    Config config;
    ModelSettings settings;
    int k;           // k_tot in force (the near-dense warm-up of topk raises it)
    Kernels kernels; // of the grouped GEMMs and attention
    cudaStream_t stream;
    DeviceMemory memory;
    GemmPlans gemm;
    Profile profile;
    Comm comm; // with the other GPUs of the run
    DeviceParams params;
    int fresh; // the experts' gradients have nothing yet: they are set, not added to
    Activations acts;
    ActivationGradients back;
    Routing routing;
    Step step;
    Losses losses;
    Text text;
    void *scratch; // of routing, norms, attention, sums: each in turn
};

// ----------------------------------------------------------------------------
// the plan of its memory

// Rows of logits that are in memory at once, at most: as many as keep the product large while [N, V] would
// outgrow all else
static inline int64_t classifier_most_rows(int64_t N, int V) {
    int64_t rows = ((int64_t)1 << 30) / V / 256 * 256;
    rows = rows < 256 ? 256 : rows;
    return rows < N ? rows : N;
}

// the same number of chunks, evenly filled
static inline int64_t classifier_rows(int64_t N, int V) {
    int64_t most = classifier_most_rows(N, V), chunks = ceil_div<int64_t>(N, most);
    int64_t rows = ceil_div<int64_t>(ceil_div<int64_t>(N, chunks), 256) * 256;
    return rows < most ? rows : most;
}

// pairs that a token can have at most, on average: some routers leave it open, and so do a dump's forced
// routes
static inline int most_active(const Model *m) {
    const Router *r = &m->config.router;
    int open = router_row(r->method)->leaves_number_open || m->settings.purpose == FOR_GRADIENTS;
    return open && !router_merges(r->method) ? r->experts : m->settings.most_k;
}

// rows of a layer's pairs
static inline ArenaRows layer_rows(const Model *m) {
    const Router *r = &m->config.router;
    int B = m->settings.B, T = m->settings.T;
    return router_merges(r->method) ? merged_rows(B, T, r->segment)
                                    : arena_rows(B * T, r->experts, r->active, most_active(m));
}

// experts that a layer's pairs index, at most
static inline int indexed_experts(const Model *m) {
    const Router *r = &m->config.router;
    return router_merges(r->method)
               ? segments_count(segments_of(m->settings.B, m->settings.T, r->segment, NULL))
               : r->experts;
}

static inline void routing_allocate(Model *m, DevicePairs *pairs, DeviceDispatch *dispatch) {
    DeviceMemory *memory = &m->memory;
    int N = m->settings.B * m->settings.T;
    int64_t P = (int64_t)N * most_active(m), rows = layer_rows(m).worst;
    pairs->row_start = take<int>(memory, SEGMENT_ACTIVATIONS, N + 1);
    pairs->expert = take<int>(memory, SEGMENT_ACTIVATIONS, P);
    pairs->gate = take<float>(memory, SEGMENT_ACTIVATIONS, P);
    if (router_draws(m->config.router.method)) {
        pairs->rounds = take<RouterRound>(memory, SEGMENT_ACTIVATIONS, (int64_t)N * m->config.router.active);
    }
    dispatch->offsets = take<int>(memory, SEGMENT_ACTIVATIONS, indexed_experts(m) + 1);
    dispatch->row_of_pair = take<int>(memory, SEGMENT_ACTIVATIONS, P);
    dispatch->token_of_row = take<int>(memory, SEGMENT_ACTIVATIONS, rows);
    dispatch->gate_of_row = take<float>(memory, SEGMENT_ACTIVATIONS, rows);
}

static inline void layer_allocate(Model *m, LayerActs *a, floatX *shared_normed) {
    const Config *c = &m->config;
    int64_t N = (int64_t)m->settings.B * m->settings.T, d = c->hidden, E = c->router.experts;
    DeviceMemory *memory = &m->memory;
    a->x = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->attn_normed = m->settings.recompute ? shared_normed : take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->attn_rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    a->qkv = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * config_qkv_width(c));
    a->att = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->lse = take<float>(memory, SEGMENT_ACTIVATIONS, N * c->heads);
    a->mid = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->ffn_normed = m->settings.recompute ? shared_normed : take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    a->ffn_rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    if (router_has_weights(c->router.method)) {
        a->router_logits = take<float>(memory, SEGMENT_ACTIVATIONS, N * E);
    }
    routing_allocate(m, &a->pairs, &a->dispatch);
}

static inline int64_t vote_bytes(const Model *m) {
    int64_t L = m->config.layers, E = m->config.router.experts;
    return ceil_div<int64_t>((int64_t)sizeof(Vote) + 8 * L * E + 4 * L, 256) * 256;
}

// where gradients land, and the rows that ranks tell each other
static inline void allocate_exchange(Model *m) {
    Comm *c = &m->comm;
    int E = m->config.router.experts;
    int64_t cells = (int64_t)m->config.layers * E;
    comm_allocate(c, &m->memory, m->settings.purpose != FOR_INFERENCE, cells, vote_bytes(m));
    c->grad = m->params.grad;
    int *counts = (int *)c->regions[REGION_COUNTS].own;
    m->routing.counts_all = c->ranks > 1 ? take<int>(&m->memory, SEGMENT_EXCHANGE, cells) : counts;
    for (int l = 0; l < m->config.layers; l++) { // the routers write the own row
        m->acts.layers[l].pairs.counts = counts + c->rank * cells + (int64_t)l * E;
    }
}

static inline int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// bytes that the largest user of the common scratch wants
static inline int64_t scratch_bytes(const Model *m) {
    const Config *c = &m->config;
    int N = m->settings.B * m->settings.T, E = c->router.experts;
    int64_t bytes = (int64_t)router_scratch_bytes(c->router, N);
    bytes = larger(bytes, (int64_t)dispatch_scratch_bytes(N, E));
    bytes = larger(bytes, (int64_t)sizeof(uint64_t) * c->layers * N * bit_words(E)); // model_masks
    bytes = larger(bytes, router_has_weights(c->router.method) ? 4 * router_sums_floats(N, E) : 0);
    bytes = larger(bytes, 4 * rmsnorm_scratch_floats(c->hidden));
    bytes = larger(bytes, 4 * (int64_t)attention_scratch_floats(m->settings.B, m->settings.T, c->heads));
    return larger(bytes, 4 * partial_rows_most(N) * c->hidden);
}

static inline void allocate_activations(Model *m) {
    const Config *c = &m->config;
    DeviceMemory *memory = &m->memory;
    int64_t N = (int64_t)m->settings.B * m->settings.T, d = c->hidden, E = c->router.experts;
    int has_logits = router_has_weights(c->router.method);
    floatX *shared_normed = m->settings.recompute ? take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d) : NULL;
    for (int l = 0; l < c->layers; l++) {
        layer_allocate(m, &m->acts.layers[l], shared_normed);
    }
    m->acts.rope = take<float>(memory, SEGMENT_WORKSPACE, (int64_t)m->settings.T * c->head_size);
    m->acts.x = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    m->acts.normed = take<floatX>(memory, SEGMENT_ACTIVATIONS, N * d);
    m->acts.rstd = take<float>(memory, SEGMENT_ACTIVATIONS, N);
    m->acts.logit_rows = classifier_rows(N, c->vocab_size);
    // room for the most: largest_batch relies on memory that grows with B. (Of 2 rows at least: one in fp32)
    m->acts.logits = take<floatX>(memory, SEGMENT_WORKSPACE,
                                  larger(classifier_most_rows(N, c->vocab_size), 2) * c->vocab_size);
    m->acts.losses = take<float>(memory, SEGMENT_WORKSPACE, N);
    m->scratch = take<unsigned char>(memory, SEGMENT_WORKSPACE, scratch_bytes(m));
    m->routing.router_parts = take<floatX>(memory, SEGMENT_WORKSPACE, has_logits ? 3 * E * d : 0);
    m->step.sums = take<StepSums>(memory, SEGMENT_WORKSPACE, 1);
    m->step.counts = take<int64_t>(memory, SEGMENT_WORKSPACE, c->layers * E);
    m->step.grad_squares = take<double>(memory, SEGMENT_WORKSPACE, 1);
    m->step.draw_key = take<uint64_t>(memory, SEGMENT_WORKSPACE, 1);
    text_allocate(&m->text, c, memory);
    losses_allocate(&m->losses, memory, N);
    if (m->settings.purpose != FOR_INFERENCE) {
        m->back.dx = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->back.dnormed = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->back.datt = take<floatX>(memory, SEGMENT_WORKSPACE, N * d);
        m->back.dqkv = take<floatX>(memory, SEGMENT_WORKSPACE, N * config_qkv_width(c));
        m->back.drouter = take<floatX>(memory, SEGMENT_WORKSPACE, has_logits ? N * E : 0);
        m->back.dgate = take<float>(memory, SEGMENT_WORKSPACE, N * E);
    }
    if (m->settings.purpose == FOR_INFERENCE) {
        m->acts.score_rows = take<int>(memory, SEGMENT_WORKSPACE, N);
        m->acts.score_greedy = take<unsigned char>(memory, SEGMENT_WORKSPACE, N);
    }
    if (m->settings.purpose == FOR_GRADIENTS) { // a dump may force the routes
        m->routing.forced = take<float>(memory, SEGMENT_WORKSPACE, has_logits ? N * E : 0);
    }
}

// everything but the arena's store, which gets what is left; counts only, when memory.counting
static inline void allocate_all(Model *m, int64_t store_rows) {
    const Config *c = &m->config;
    allocate_params(&m->params, &m->comm, &m->memory, &m->config, m->settings.purpose);
    allocate_activations(m);
    allocate_exchange(m);
    void *workspace = take<unsigned char>(&m->memory, SEGMENT_WORKSPACE, GEMM_WORKSPACE_BYTES);
    if (!m->memory.counting) {
        gemm_open(&m->gemm, workspace, GEMM_WORKSPACE_BYTES);
    }
    int training = m->settings.purpose != FOR_INFERENCE;
    arena_open(&m->routing.arena, &m->memory, layer_rows(m), c->layers, m->settings.B * m->settings.T,
               c->router.experts, c->hidden, c->ffn, store_rows, training, m->kernels);
    if (router_merges(c->router.method)) {
        merged_take(&m->routing.merged, &m->memory, c->layers, m->settings.B, indexed_experts(m),
                    c->router.experts, c->hidden, c->ffn, training);
    }
}

// bytes that this model would take for micro-batches of B sequences, without any store of pairs
static inline int64_t fixed_bytes(const Model *like, int B) {
    Model m;
    memset(&m, 0, sizeof(m));
    m.config = like->config;
    m.settings = like->settings;
    m.settings.B = B;
    m.kernels = like->kernels;
    m.memory.counting = 1;
    m.comm = like->comm;
    m.acts.layers = NEW(LayerActs, like->config.layers);
    params_open_lists(&m.params, &m.config);
    allocate_all(&m, 0);
    int64_t bytes = memory_total(&m.memory);
    arena_free(&m.routing.arena);
    params_close_lists(&m.params);
    free(m.acts.layers);
    return bytes;
}

// can the rows of so many sequences a micro-batch be numbered in 31 bits?
static inline int rows_countable(const Config *c, int64_t B, int64_t T) {
    int64_t length = c->router.segment < T ? c->router.segment : T;
    int64_t rows = router_merges(c->router.method)
                       ? B * ceil_div(T, length) * (length + ROW_ALIGN)
                       : B * T * c->router.experts + (int64_t)ROW_ALIGN * c->router.experts;
    return rows < INT32_MAX && B * T * c->router.experts < INT32_MAX;
}

static inline int largest_batch(const Model *like, int64_t available) {
    int fits = 0;
    for (int step = 1 << 16; step > 0; step /= 2) { // memory grows with B
        int B = fits + step;
        if (B <= 65536 && rows_countable(&like->config, B, like->settings.T) &&
            fixed_bytes(like, B) <= available) {
            fits = B;
        }
    }
    return fits;
}

static inline void check_shapes(const Config *c, int64_t B, int64_t T) {
    if (c->head_size % 8 != 0 || c->head_size > 128) {
        die("head size %d (hidden %d over %d heads): the CUDA trainer computes multiples of 8, up to 128\n"
            "  ---> change --hidden or --heads, or use ./train_remoe",
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
static inline int64_t batch_ints(const Model *m) {
    int64_t N = (int64_t)m->settings.B * m->settings.T;
    return 2 * N + (int64_t)embedding_plan_ints(N);
}

// all micro-batches of a step, so that it can be repeated
static inline void allocate_batches(Model *m, int micro_batches) {
    int64_t N = (int64_t)m->settings.B * m->settings.T, ints = batch_ints(m);
    int *at = take<int>(&m->memory, SEGMENT_WORKSPACE, micro_batches * ints);
    m->step.batches = NEW(Batch, micro_batches);
    m->step.id_places = NEW(int, m->config.vocab_size);
    CUDA_CHECK(cudaMallocHost(&m->step.staging, (size_t)(micro_batches * ints) * sizeof(int)));
    for (int i = 0; i < micro_batches; i++, at += ints) {
        m->step.batches[i].inputs = at;
        m->step.batches[i].targets = at + N;
        m->step.batches[i].positions = embedding_plan_in(at + 2 * N, N);
    }
}

// rows of the arena's store: --pair-budget, or what is left over, at most all pairs of all layers
static inline int64_t choose_store_rows(const Model *m, int64_t left_over) {
    const Config *c = &m->config;
    if (m->settings.purpose == FOR_INFERENCE) {
        return 0;
    }
    int64_t worst = c->layers * layer_rows(m).worst;
    int64_t budget = m->settings.pair_budget > 0.0 ? (int64_t)(m->settings.pair_budget * 1e9) : left_over;
    int64_t rows = budget / arena_row_bytes(c->ffn);
    return rows < worst ? rows : worst;
}

static inline void print_memory(const Model *m, int64_t driver_bytes, int most) {
    printf("memory   ");
    for (int segment = 0; segment < SEGMENT_COUNT; segment++) {
        printf(" %s %.2f%s", segment_name(segment), 1e-9 * (double)m->memory.bytes[segment],
               segment + 1 < SEGMENT_COUNT ? " |" : "");
    }
    printf(" | total %.2f GB (the driver counts %.2f)\n", 1e-9 * (double)memory_total(&m->memory),
           1e-9 * (double)driver_bytes);
    printf("          --batch %d of at most %d; pairs: room for %.2f experts a token and layer\n",
           m->settings.B, most,
           (double)m->routing.arena.store_rows / ((double)m->settings.B * m->settings.T * m->config.layers));
}

static inline void upload_rope(const Model *m) {
    const Config *c = &m->config;
    int64_t n = (int64_t)m->settings.T * c->head_size;
    float *table = NEW(float, n);
    rope_table(table, m->settings.T, c->head_size, c->rope_theta);
    copy_now(m->acts.rope, table, (size_t)n * sizeof(float), cudaMemcpyHostToDevice, m->stream);
    free(table);
}

static inline void refuse_too_large(const Model *m, int64_t need, int64_t available, int most) {
    char remedy[64] = "use a smaller model, or a shorter --seq-len";
    if (most > 0) {
        check_format(remedy, sizeof(remedy), "the largest that fits: --batch %d", most);
    }
    if (need > available) {
        die("--batch %d needs %.2f GB of device memory, %.2f are free\n  ---> %s", m->settings.B,
            1e-9 * (double)need, 1e-9 * (double)available, remedy);
    }
    if (m->settings.pair_budget * 1e9 > (double)(available - need)) {
        die("--pair-budget %g: only %.2f GB are left for pairs\n"
            "  ---> a smaller --pair-budget, or 0 for all that is left",
            m->settings.pair_budget, 1e-9 * (double)(available - need));
    }
}

#endif
