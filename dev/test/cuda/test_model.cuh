/*
The whole model on the device against the CPU reference: losses, gates and every gradient tensor of one
micro-batch on the same weights and tokens; ten optimizer steps; and what must not change a single bit: a
repeat, the pair budget, recomputation, a plan that was too small, a CUDA graph.

In bf16 the active set is the CPU's (forced), so that a gate near zero cannot flip; one case compares the free
routes too. Draws are forced likewise, among all experts: who is a candidate could flip. Tolerances:
dev/doc/design.md, Tests.
*/
#ifndef TEST_MODEL_CUH
#define TEST_MODEL_CUH

#include "harness.cuh"
#include "dev/test/buffers.h"

typedef struct {
    const char *name, *router;
    int E, k, G, L, d, H, KV, mult, V, B, T, load_balance;
    int dead;   // experts of the last layer whose router row is zero: never on
    float gain; // on the paper's initial weights; 1: the tolerance is tighter
} ModelCase;

static const ModelCase model_cases[] = {
    {"relu", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 2, 33, 1, 0, 1.0f},
    {"relu, random weights", "relu", 4, 2, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"relu, no balance", "relu", 4, 1, 1, 1, 48, 2, 2, 4, 67, 1, 20, 0, 0, 8.0f},
    {"relu, T = 1", "relu", 8, 1, 1, 2, 32, 1, 1, 4, 67, 3, 1, 1, 0, 8.0f},
    {"relu, E = 1", "relu", 1, 1, 1, 1, 32, 4, 2, 4, 67, 1, 17, 1, 0, 8.0f},
    {"relu, E = 3, G = 3", "relu", 3, 1, 3, 1, 72, 3, 1, 4, 67, 1, 17, 1, 0, 8.0f},
    {"relu, E = 128, G = 8", "relu", 128, 1, 8, 1, 32, 1, 1, 4, 67, 1, 9, 1, 0, 8.0f},
    {"relu, hd = 96", "relu", 4, 1, 1, 1, 96, 1, 1, 1, 67, 1, 65, 1, 0, 8.0f},
    {"relu, dead expert", "relu", 4, 1, 1, 2, 32, 2, 1, 4, 67, 1, 17, 1, 1, 8.0f},
    {"relu, router off", "relu", 4, 1, 1, 2, 32, 2, 1, 4, 67, 1, 17, 1, 4, 8.0f},
    {"topk, k = 2", "topk", 4, 2, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"topk, no aux", "topk", 8, 1, 2, 1, 32, 4, 2, 4, 67, 1, 17, 0, 0, 8.0f},
    {"auxfree, k = 2", "auxfree", 4, 2, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"auxfree, G = 3", "auxfree", 3, 1, 3, 1, 72, 3, 1, 4, 67, 1, 17, 1, 0, 1.0f},
    {"auxfree, k = 1", "auxfree", 8, 1, 1, 1, 32, 4, 2, 4, 67, 1, 19, 1, 0, 8.0f},
    {"sparsemixer, k = 1", "sparsemixer", 8, 1, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"sparsemixer, k = 2", "sparsemixer", 4, 2, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 1.0f},
    {"sparsemixer, G = 3", "sparsemixer", 3, 2, 3, 1, 72, 3, 1, 4, 67, 1, 17, 0, 0, 1.0f},
    {"lory", "lory", 8, 1, 1, 2, 48, 2, 1, 2, 67, 2, 32, 1, 0, 8.0f},
    {"lory, a short segment", "lory", 4, 1, 1, 2, 64, 4, 2, 4, 67, 3, 19, 1, 0, 1.0f},
    {"lory, E = 1", "lory", 1, 1, 1, 1, 32, 4, 2, 4, 67, 1, 17, 1, 0, 8.0f},
    {"lory, several chunks", "lory", 3, 1, 1, 2, 32, 1, 1, 2, 67, 9, 35, 1, 0, 8.0f},
    {"expert choice", "ec", 4, 1, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"hash, k = 2", "hash", 5, 2, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f},
    {"dense", "dense", 1, 1, 1, 2, 64, 4, 2, 4, 67, 2, 17, 1, 0, 8.0f},
};

// what racecheck can finish: each router once, all in one layer
static const ModelCase few_model_cases[] = {
    {"relu", "relu", 4, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"topk", "topk", 4, 2, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"auxfree", "auxfree", 4, 2, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"sparsemixer", "sparsemixer", 4, 2, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"lory", "lory", 4, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"ec", "ec", 4, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"hash", "hash", 5, 2, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"dense", "dense", 1, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
};

// the other cases' model then: as many tokens, in one narrow layer
static ModelCase narrow_if_few(ModelCase t) {
    if (few_cases) {
        t.L = 1;
        t.d = 32;
        t.H = 2;
        t.KV = 1;
        t.V = 67;
    }
    return t;
}

static Options model_options(const ModelCase *t) {
    Options o;
    options_defaults(&o, "tiny");
    check_format(o.router, sizeof(o.router), "%s", t->router);
    o.experts = t->E;
    o.active = t->k;
    o.granularity = t->G;
    o.layers = t->L;
    o.hidden = t->d;
    o.heads = t->H;
    o.kv_heads = t->KV;
    o.ffn_mult = t->mult;
    o.vocab_size = t->V;
    o.batch = o.global_batch = t->B;
    o.seq_len = t->T;
    o.load_balance = t->load_balance;
    o.segment_length = 8;
    o.router_jitter = is_fp32() ? 0.3 : 1.0; // 1: all experts are candidates
    check_format(o.kernels, sizeof(o.kernels), "%s", test_kernels == KERNELS_HOPPER ? "hopper" : "portable");
    return o;
}

// one micro-batch, and what came of it
typedef struct {
    Config config;
    Options options;
    int N;
    int *inputs, *targets;
    float *params; // [flat_size]
    StepStats stats;
    float *grads;  // [flat_size]
    float **gates; // L matrices [N, E], or NULL
    float **draws; // the same, NULL where the router draws nothing
    float *logits; // [N, V]
} Examination;

static void examination_init(Examination *x, const ModelCase *t) {
    memset(x, 0, sizeof(*x));
    x->options = model_options(t);
    x->config = config_from_options(&x->options);
    x->N = t->B * t->T;
    x->inputs = NEW(int, x->N);
    x->targets = NEW(int, x->N);
    for (int n = 0; n < x->N; n++) {
        x->inputs[n] = (n * 7 + n * n % 5) % t->V;
        x->targets[n] = (n * 11 + 3) % t->V;
    }
    x->stats.counts = NEW(int64_t, x->config.layers * x->config.router.experts);
    x->gates = router_has_experts(x->config.router.method) ? layer_matrices(&x->config, x->N) : NULL;
    x->draws = router_draws(x->config.router.method) ? layer_matrices(&x->config, x->N) : NULL;
    x->logits = NEW(float, (int64_t)x->N * t->V);
}

static void examination_free(Examination *x) {
    free(x->inputs);
    free(x->targets);
    free(x->params);
    free(x->stats.counts);
    free(x->grads);
    free_layer_matrices(x->gates);
    free_layer_matrices(x->draws);
    free(x->logits);
}

static Model *open_for(const Examination *x, Purpose purpose) {
    static Ranks alone = ranks_alone();
    ModelSettings settings = model_settings(&x->options, &x->config, purpose, &alone);
    return model_open(&x->config, &settings);
}

static cpu::Model *open_on_cpu(const Examination *x, Purpose purpose) {
    static Ranks alone = ranks_alone();
    ModelSettings settings = model_settings(&x->options, &x->config, purpose, &alone);
    return cpu::model_open(&x->config, &settings);
}

static float *draw_weights(const ModelCase *t, const Config *c) {
    TensorTable table;
    Weights weights;
    memset(&table, 0, sizeof(table));
    memset(&weights, 0, sizeof(weights));
    model_tensors(&table, &weights, c, NULL);
    float *params = NEW(float, table.flat_size);
    model_tensors(&table, &weights, c, params);
    FlatBuffer buffer = host_buffer(&table, params);
    model_init(&buffer, 7);
    for (int i = 0; i < table.count; i++) {
        for (int64_t j = 0; j < table.tensors[i].size; j++) {
            float *w = params + table.tensors[i].offset + j;
            float uneven = 0.1f * (float)(j % 7 - 3) * (t->gain > 1.0f); // of norms and biases
            *w = table.tensors[i].decay ? *w * t->gain : *w + uneven;
        }
    }
    if (t->dead > 0) { // in all layers but the first, unless all are dead
        for (int l = t->dead == t->E ? 0 : 1; l < c->layers; l++) {
            memset(weights.layers[l].router, 0, (size_t)(t->dead * c->hidden) * sizeof(float));
        }
    }
    table_free(&table);
    free(weights.layers);
    return params;
}

static double regulariser_weight_of(const ModelCase *t) {
    return strcmp(t->router, "relu") == 0                                            ? 0.03
           : strcmp(t->router, "topk") == 0 || strcmp(t->router, "sparsemixer") == 0 ? 0.01
                                                                                     : 0.0;
}

// the reference's answer
static void examine_on_cpu(Examination *x, const ModelCase *t) {
    cpu::Model *m = open_on_cpu(x, FOR_GRADIENTS);
    int64_t n = cpu::model_table(m)->flat_size;
    x->params = draw_weights(t, &x->config);
    cpu::model_set(m, BUFFER_PARAMS, 0, n, x->params);
    cpu::model_examine(m, x->inputs, x->targets, t->B, t->T, regulariser_weight_of(t), NULL, x->logits,
                       x->gates, x->draws, &x->stats);
    x->grads = NEW(float, n);
    cpu::model_get(m, BUFFER_GRADS, 0, n, x->grads);
    cpu::model_close(m);
}

static void set_device_weights(Model *m, const float *params) {
    int count;
    const Range *ranges = model_ranges(m, RANGES_KEPT, &count);
    for (int i = 0; i < count; i++) {
        model_set(m, BUFFER_PARAMS, ranges[i].first, ranges[i].size, params + ranges[i].first);
    }
    model_publish(m);
}

// all of one of the buffers, for free()
static float *copy_of(Model *m, ModelBuffer which) {
    int count;
    float *values = NEW(float, model_table(m)->flat_size);
    const Range *ranges = model_ranges(m, RANGES_KEPT, &count);
    for (int i = 0; i < count; i++) {
        model_get(m, which, ranges[i].first, ranges[i].size, values + ranges[i].first);
    }
    return values;
}

static void examine_on_device(Examination *x, Model *m, const ModelCase *t, const float *params,
                              const float *const *forced) {
    set_device_weights(m, params);
    model_examine(m, x->inputs, x->targets, t->B, t->T, regulariser_weight_of(t), forced, x->logits, x->gates,
                  x->draws, &x->stats);
    x->grads = copy_of(m, BUFFER_GRADS);
}

static double cosine(const float *a, const float *b, int64_t n) {
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int64_t i = 0; i < n; i++) {
        ab += (double)a[i] * b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
    }
    return aa > 0.0 && bb > 0.0 ? ab / sqrt(aa * bb) : aa == bb;
}

// a row of the table; in bf16 a gradient that should be zero may not be anything else either
static void compare_row(const char *name, const float *got, const float *want, int64_t n, double limit,
                        int show, double *worst, const char **worst_name) {
    double error = relative_error(got, want, (size_t)n);
    check_close(name, got, want, (size_t)n, limit);
    if (show) {
        printf("  %-52s %10.2e %12.9f\n", name, error, cosine(got, want, n));
    }
    if (error > *worst) {
        *worst = error;
        *worst_name = name;
    }
}

static void model_case(const ModelCase *t, int show) {
    Examination want, got;
    double worst = 0.0, limit = tolerance(1e-5, t->gain > 1.0f ? 4e-2 : 2e-2);
    const char *worst_name = "";
    examination_init(&want, t);
    examination_init(&got, t);
    examine_on_cpu(&want, t);
    Model *m = open_for(&got, FOR_GRADIENTS);
    const TensorTable *table = model_table(m);
    int forced = !is_fp32() && got.gates != NULL && strcmp(t->router, "lory") != 0;
    examine_on_device(&got, m, t, want.params,
                      forced ? (const float *const *)(want.draws != NULL ? want.draws : want.gates) : NULL);
    if (show) {
        printf("  %-52s %10s %12s\n", t->name, "rel error", "cosine");
    }
    compare_row("logits", got.logits, want.logits, (int64_t)want.N * t->V, limit, show, &worst, &worst_name);
    for (int l = 0; l < t->L && got.gates != NULL; l++) {
        int cells = want.N * want.config.router.experts, flips = 0;
        for (int i = 0; i < cells; i++) {
            flips += (got.gates[l][i] != 0.0f) != (want.gates[l][i] != 0.0f);
        }
        CHECK(flips == 0 || (forced && t->gain > 1.0f && flips < cells / 100)); // a forced gate may be just 0
        compare_row("gates", got.gates[l], want.gates[l], cells, limit, show, &worst, &worst_name);
    }
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        compare_row(tensor->name, got.grads + tensor->offset, want.grads + tensor->offset, tensor->size,
                    limit, show, &worst, &worst_name);
    }
    double losses[2] = {got.stats.lm_loss, got.stats.reg_loss};
    double losses_want[2] = {want.stats.lm_loss, want.stats.reg_loss};
    for (int i = 0; i < 2; i++) {
        double off = fabs(losses[i] - losses_want[i]);
        CHECK(off <= tolerance(2e-6, i == 0 ? 2e-3 : 2e-2) * fabs(losses_want[i]));
    }
    CHECK(fabs(got.stats.grad_norm - want.stats.grad_norm) <= limit * want.stats.grad_norm);
    CHECK(got.stats.active == want.stats.active);
    CHECK(got.stats.zero_expert == want.stats.zero_expert);
    CHECK(memcmp(got.stats.counts, want.stats.counts,
                 (size_t)(t->L * want.config.router.experts) * sizeof(int64_t)) == 0);
    printf("  %-24s loss %.6f (CPU %.6f)  S %.3f  worst %.1e  %s\n", t->name, losses[0], losses_want[0],
           step_sparsity(want.config.router, got.stats.active,
                         (int64_t)want.N * t->L * want.config.router.experts),
           worst, worst_name);
    model_close(m);
    examination_free(&got);
    examination_free(&want);
}

// the routes left free: in bf16 few pairs flip, and only such as are close to the threshold
static void free_routes_case(void) {
    const ModelCase t = {"free", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 4, 64, 1, 0, 1.0f};
    Examination want, got;
    examination_init(&want, &t);
    examination_init(&got, &t);
    examine_on_cpu(&want, &t);
    Model *m = open_for(&got, FOR_GRADIENTS);
    examine_on_device(&got, m, &t, want.params, NULL);
    for (int l = 0; l < t.L; l++) {
        int cells = want.N * t.E, flips = 0;
        double squares = 0.0, farthest = 0.0;
        for (int i = 0; i < cells; i++) {
            double a = got.gates[l][i], b = want.gates[l][i];
            squares += b * b;
            if ((a != 0.0) != (b != 0.0)) {
                flips++;
                farthest = fmax(farthest, fmax(a, b));
            }
        }
        CHECK(flips <= (is_fp32() ? 0.0 : 0.015) * cells);
        CHECK(farthest <= 2e-2 * sqrt(2.0 * squares / cells)); // of rms(z): half of the z are below 0
    }
    CHECK(fabs(got.stats.lm_loss - want.stats.lm_loss) <= 2e-3 * want.stats.lm_loss);
    model_close(m);
    examination_free(&got);
    examination_free(&want);
}

// ----------------------------------------------------------------------------
// the same bits

static uint64_t hash_of(const Examination *x, int64_t num_params) {
    uint64_t hash = 1469598103934665603ull;
    const unsigned char *bytes = (const unsigned char *)x->grads;
    for (size_t i = 0; i < (size_t)num_params * sizeof(float); i++) {
        hash = (hash ^ bytes[i]) * 1099511628211ull;
    }
    bytes = (const unsigned char *)&x->stats.lm_loss;
    for (size_t i = 0; i < sizeof(double); i++) {
        hash = (hash ^ bytes[i]) * 1099511628211ull;
    }
    return hash;
}

// the bits of one examination with so many rows of pairs in the store (-1: all), and recomputed norms
static uint64_t bits_of(const ModelCase *t, const float *params, int64_t store_rows, int recompute,
                        int repeats) {
    Examination x;
    uint64_t hash = 0;
    examination_init(&x, t);
    x.options.recompute = recompute;
    x.options.pair_budget =
        store_rows >= 0 ? 1e-9 * (double)(store_rows * arena_row_bytes(x.config.ffn)) + 1e-12 : 0.0;
    Model *m = open_for(&x, FOR_GRADIENTS);
    for (int i = 0; i < repeats; i++) {
        memset(&x.stats.tokens, 0, sizeof(x.stats.tokens));
        x.stats.lm_loss = x.stats.reg_loss = 0.0;
        free(x.grads);
        examine_on_device(&x, m, t, params, NULL);
        uint64_t now = hash_of(&x, model_table(m)->flat_size);
        CHECK(i == 0 || now == hash);
        hash = now;
    }
    model_close(m);
    examination_free(&x);
    return hash;
}

static void same_bits_of(const char *router) {
    const ModelCase t = narrow_if_few({"bits", router, 8, 1, 1, 2, 64, 4, 2, 4, 256, 2, 33, 1, 0, 8.0f});
    Options o = model_options(&t);
    Config c = config_from_options(&o);
    float *params = draw_weights(&t, &c);
    uint64_t all = bits_of(&t, params, -1, 0, few_cases ? 1 : 3);
    CHECK(bits_of(&t, params, 0, few_cases, 1) == all);
    if (!few_cases) {
        CHECK(bits_of(&t, params, 300, 0, 1) == all);
        CHECK(bits_of(&t, params, -1, 1, 1) == all);
    }
    free(params);
}

static void same_bits_case(void) {
    same_bits_of("relu");
    same_bits_of("lory");
}

// a plan that is too small is noticed, and the step repeated with a larger one gives the same bits
static void overflow_case(void) {
    const ModelCase t = narrow_if_few({"overflow", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 4, 33, 1, 0, 8.0f});
    Options o = model_options(&t);
    Config c = config_from_options(&o);
    float *params = draw_weights(&t, &c);
    uint64_t hashes[2];
    for (int small = 0; small < 2; small++) {
        Examination x;
        examination_init(&x, &t);
        Model *m = open_for(&x, FOR_GRADIENTS);
        set_device_weights(m, params);
        upload_batch(m, 0, x.inputs, x.targets, x.N);
        int attempts = 0, done = 0;
        for (int l = 0; l < t.L; l++) {
            m->routing.arena.planned[l] = small ? 1 : m->routing.arena.max_chunks;
        }
        while (!done) {
            stats_reset(&x.stats, &x.config);
            begin_step(m);
            micro_step(m, &m->step.batches[0], t.B, t.T, 1, 0.03, 1, NULL, NULL);
            end_step(m, 0);
            done = read_step(m, x.N, &x.stats);
            attempts++;
        }
        CHECK(m->routing.arena.max_chunks > 1);
        CHECK(small ? attempts > 1 : attempts == 1);
        x.grads = copy_of(m, BUFFER_GRADS);
        hashes[small] = hash_of(&x, model_table(m)->flat_size);
        model_close(m);
        examination_free(&x);
    }
    CHECK(hashes[0] == hashes[1]);
    free(params);
}

// nothing in a micro-step waits for the host or allocates: a capture would fail; its replay gives the same
// bits
static void graph_case(void) {
    const ModelCase t = narrow_if_few({"graph", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 2, 33, 1, 0, 8.0f});
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    Examination x;
    if (emulated()) {
        skip_case("the emulator has no CUDA graphs");
        return;
    }
    examination_init(&x, &t);
    float *params = draw_weights(&t, &x.config);
    Model *m = open_for(&x, FOR_GRADIENTS);
    uint64_t hashes[2];
    set_device_weights(m, params);
    upload_batch(m, 0, x.inputs, x.targets, x.N);
    for (int captured = 0; captured < 2; captured++) { // the first makes cuBLASLt's plans
        begin_step(m);
        if (captured) {
            CUDA_CHECK(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeGlobal));
        }
        micro_step(m, &m->step.batches[0], t.B, t.T, 1, 0.03, 1, NULL, NULL);
        end_step(m, 0);
        if (captured) {
            CUDA_CHECK(cudaStreamEndCapture(m->stream, &graph));
            CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
            CUDA_CHECK(cudaGraphLaunch(replay, m->stream));
        }
        x.stats.lm_loss = 0.0;
        plan_worst(m, x.N);
        CHECK(read_step(m, x.N, &x.stats));
        plan_worst(m, x.N);
        free(x.grads);
        x.grads = copy_of(m, BUFFER_GRADS);
        hashes[captured] = hash_of(&x, model_table(m)->flat_size);
    }
    CHECK(hashes[0] == hashes[1]);
    CUDA_CHECK(cudaGraphExecDestroy(replay));
    CUDA_CHECK(cudaGraphDestroy(graph));
    model_close(m);
    free(params);
    examination_free(&x);
}

// a router that has broken is no router that is sparse: the loss is not finite, on either side
static void broken_router_case(const char *router, float value) {
    const ModelCase t = {"broken", router, 4, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 1.0f};
    Examination want, got;
    TensorTable table = {};
    Weights weights = {};
    examination_init(&want, &t);
    examination_init(&got, &t);
    examine_on_cpu(&want, &t);
    model_tensors(&table, &weights, &want.config, NULL);
    model_tensors(&table, &weights, &want.config, want.params);
    for (int c = 0; c < t.d; c++) {
        weights.layers[0].router[t.d + c] = value; // of expert 1
    }
    cpu::Model *reference = open_on_cpu(&want, FOR_GRADIENTS);
    cpu::model_set(reference, BUFFER_PARAMS, 0, table.flat_size, want.params);
    want.stats.lm_loss = 0.0;
    cpu::model_examine(reference, want.inputs, want.targets, t.B, t.T, 0.03, NULL, want.logits, want.gates,
                       want.draws, &want.stats);
    Model *m = open_for(&got, FOR_GRADIENTS);
    examine_on_device(&got, m, &t, want.params, NULL);
    CHECK(!isfinite(want.stats.lm_loss) && !isfinite(got.stats.lm_loss));
    cpu::model_close(reference);
    model_close(m);
    table_free(&table);
    free(weights.layers);
    examination_free(&got);
    examination_free(&want);
}

static void broken_routers_case(void) {
    broken_router_case("relu", NAN);
    broken_router_case("relu", INFINITY);
    broken_router_case("topk", NAN);
    broken_router_case("auxfree", NAN);
    broken_router_case("auxfree", INFINITY);
    broken_router_case("sparsemixer", NAN);
    broken_router_case("sparsemixer", INFINITY);
    broken_router_case("lory", NAN);
    broken_router_case("lory", INFINITY);
    broken_router_case("ec", NAN);
}

// ----------------------------------------------------------------------------
// steps and sampling

// three updates on both sides: weights, biases and moments
static void update_case_of(const char *router) {
    const ModelCase t = {"update", router, 4, 1, 1, 1, 32, 2, 1, 2, 67, 1, 17, 1, 0, 1.0f};
    Examination want, got;
    examination_init(&want, &t);
    examination_init(&got, &t);
    cpu::Model *reference = open_on_cpu(&want, FOR_TRAINING);
    Model *m = open_for(&got, FOR_TRAINING);
    int64_t n = model_table(m)->flat_size;
    float *params = draw_weights(&t, &want.config);
    float *grads = NEW(float, n), *expected = NEW(float, n);
    cpu::model_set(reference, BUFFER_PARAMS, 0, n, params);
    set_device_weights(m, params);
    for (int step = 1; step <= 3; step++) {
        cpu::model_examine(reference, want.inputs, want.targets, t.B, t.T, 0.03, NULL, want.logits,
                           want.gates, want.draws, &want.stats);
        cpu::model_get(reference, BUFFER_GRADS, 0, n, grads); // the same: the update alone is compared
        model_set(m, BUFFER_GRADS, 0, n, grads);
        if (router_row(want.config.router.method)->has_bias) {
            cpu::model_balance(reference, 0.03f, want.stats.counts);
            model_balance(m, 0.03f, want.stats.counts);
        }
        cpu::model_update(reference, 1e-3, 0.01, 0.7f, step);
        model_update(m, 1e-3, 0.01, 0.7f, step);
    }
    for (int which = BUFFER_PARAMS; which <= BUFFER_EXP_AVG_SQ; which++) {
        if (which == BUFFER_GRADS) {
            continue;
        }
        float *have = copy_of(m, (ModelBuffer)which);
        cpu::model_get(reference, (ModelBuffer)which, 0, n, expected);
        check_close("update", have, expected, (size_t)n, 1e-6);
        free(have);
    }
    free(grads);
    free(expected);
    cpu::model_close(reference);
    model_close(m);
    free(params);
    examination_free(&got);
    examination_free(&want);
}

static void update_case(void) {
    update_case_of("relu");
    update_case_of("auxfree");
}

// logits with the key/value cache, position by position, are the full forward's: for lory, of the one that
// uses the prompt's experts for all of the text
static void sampling_case_of(const char *router) {
    const ModelCase t = narrow_if_few({"sampling", router, 4, 1, 1, 2, 48, 2, 1, 2, 67, 1, 20, 1, 0, 8.0f});
    const int first = few_cases ? t.T - 1 : 5;
    Examination x;
    examination_init(&x, &t);
    float *params = draw_weights(&t, &x.config);
    Model *m = open_for(&x, FOR_GRADIENTS);
    examine_on_device(&x, m, &t, params, NULL);
    double loss = model_loss(m, x.inputs, x.targets, t.B, t.T);
    CHECK(fabs(loss - x.stats.lm_loss) <= 1e-6 * loss);
    CHECK(fabs(model_late_loss(m, t.B, t.T, 0) - loss) <= 1e-6 * loss);
    CHECK(fabs(model_late_loss(m, t.B, t.T, 8) - loss) > 1e-6 * loss);
    if (router_merges(x.config.router.method)) {
        int *planned = plan_apart(m, t.T);
        upload_batch(m, 0, x.inputs, x.targets, t.T);
        model_forward(m, m->step.batches[0].inputs, 1, t.T, 0, no_draws, &first, NULL);
        matmul_forward(m->acts.logits, m->acts.normed, m->params.weights.head, t.T, t.d, t.V, &m->gemm,
                       m->stream);
        download(m, x.logits, m->acts.logits, t.T * t.V);
        plan_back(m, planned);
    }
    for (int n = first; n <= t.T; n++) {
        const float *logits = model_next_logits(m, x.inputs, n, n == first ? 0 : n - 1);
        check_close("cached logits", logits, x.logits + (int64_t)(n - 1) * t.V, (size_t)t.V,
                    tolerance(1e-5, 2e-2)); // another tile shape: other rounding
    }
    model_close(m);
    free(params);
    examination_free(&x);
}

static void sampling_case(void) {
    sampling_case_of("relu");
    sampling_case_of("lory");
}

static void model_table_cases(void) {
    const ModelCase *cases = few_cases ? few_model_cases : model_cases;
    size_t count = (few_cases ? sizeof(few_model_cases) : sizeof(model_cases)) / sizeof(ModelCase);
    for (size_t i = 0; i < count; i++) {
        if (case_is_wanted(cases[i].name)) {
            model_case(&cases[i], i == 0 && !few_cases);
        }
    }
    const ModelCase large = {"relu, larger", "relu", 8, 1, 1, 3, 256, 4, 2, 4, 2048, 4, 256, 1, 0, 1.0f};
    const ModelCase fine = {"relu, fine-grained", "relu", 8, 1, 8, 3, 256, 4, 2, 4, 2048, 4, 256, 1, 0, 1.0f};
    if (!emulated() && case_is_wanted(large.name)) {
        model_case(&large, 1);
    }
    if (!emulated() && case_is_wanted(fine.name)) {
        model_case(&fine, 0);
    }
}

static void test_cuda_model(void) {
    const struct {
        const char *name;
        void (*run)(void);
    } others[] = {{"free routes", free_routes_case}, {"bits", same_bits_case},
                  {"overflow", overflow_case},       {"graph", graph_case},
                  {"update", update_case},           {"sampling", sampling_case},
                  {"broken", broken_routers_case}};
    model_table_cases();
    for (size_t i = few_cases; i < sizeof(others) / sizeof(others[0]);
         i++) { // the first has no kernel of its own
        if (case_is_wanted(others[i].name)) {
            others[i].run();
        }
    }
}

#endif
