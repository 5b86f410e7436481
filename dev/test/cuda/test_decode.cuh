/*
One token at a time: attention over the cache against attention_forward; the sampler against sample_next on
the host, draw by draw; a text's logits, step by step, against the full forward of the same tokens and, in
fp32,
the CPU's; whole texts against the CPU's, up to a full window and read anew; the same text twice.
*/
#ifndef TEST_DECODE_CUH
#define TEST_DECODE_CUH

#include "test_model.cuh"

// ----------------------------------------------------------------------------
// attention

static void decode_attention_case(int n, int H, int KV, int hd) {
    int64_t width = (H + 2 * KV) * hd;
    float *host = host_random(n * width, 5u + (unsigned)n, 1.0f);
    floatX *cache = device_x(host, n * width), *out = device_new<floatX>(H * hd);
    floatX *whole = device_new<floatX>(H * hd);
    float *partial = device_new<float>(decode_attention_floats(H, hd)), *lse = device_new<float>(H);
    int last = n - 1, zeros[64] = {0};
    int *position = device_i(&last, 1), *tickets = device_i(zeros, H);
    attention_forward(whole, lse, cache, 1, n, last, H, KV, hd, KERNELS_PORTABLE, 0);
    float *want = fetch(whole, H * hd);
    for (int again = 0; again < 2; again++) { // the tickets are 0 again
        decode_attention(out, partial, tickets, cache, position, n + 5, H, KV, hd, 0);
        if (!check_device("decode attention", out, want, H * hd, tolerance(2e-6, 8e-3))) {
            printf("    n %d, H %d, KV %d, hd %d\n", n, H, KV, hd);
        }
    }
    free(host);
    free(want);
    const void *all[] = {cache, out, whole, partial, lse, position, tickets};
    for (const void *p : all) {
        device_release(p);
    }
}

static void decode_attention_cases(void) {
    const int cases[][4] = {{1, 4, 2, 16},   {2, 3, 1, 24},    {127, 2, 2, 64},  {128, 6, 2, 8},
                            {129, 4, 1, 96}, {300, 2, 1, 128}, {2049, 2, 1, 16}, {4100, 1, 1, 24}};
    for (int i = 0; i < (few_cases ? 5 : 8); i++) {
        decode_attention_case(cases[i][0], cases[i][1], cases[i][2], cases[i][3]);
    }
}

// ----------------------------------------------------------------------------
// the sampler

// `draws` tokens of one row of logits; rounds: coarse logits have many ties
static void sampler_case(int V, int allowed, int top_k, double temperature, float scale, int rounds,
                         int draws) {
    enum { D = 8 };
    float *z = NEW(float, V), *copy = NEW(float, V);
    fill_uniform(z, (size_t)V, 17u + (unsigned)V, scale);
    for (int v = 0; v < V; v++) {
        z[v] = rounds ? rintf(z[v]) : v >= allowed ? 2.0f * scale : z[v];
    }
    float *embedding = host_random((int64_t)V * D, 3, 1.0f);
    Sampling s = {temperature, top_k, allowed, 99, 7};
    TextState state = {s, 10, 3, 1000, 0}, after;
    TextState *device_state = device_copy(&state, 1);
    floatX *embed = device_x(embedding, (int64_t)V * D), *x = device_new<floatX>(D);
    float *logits = device_f(z, V), *values = device_new<float>(V);
    int *ids = device_new<int>(V), *ring, differ = 0, token = 0;
    CUDA_CHECK(cudaMallocHost(&ring, TEXT_RING * sizeof(int)));
    for (int i = 0; i < draws; i++) {
        sample_on_device(device_state, ring, x, embed, logits, ids, values, D, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        memcpy(copy, z, (size_t)V * sizeof(float));
        token = sample_next(copy, &s, 1000 + i);
        differ += ring[i % TEXT_RING] != token;
    }
    TextState *states = fetch_raw(device_state, 1);
    after = *states;
    if (!CHECK(differ == 0)) {
        printf("    %d of %d draws differ: V %d of %d, top_k %d, temperature %g\n", differ, draws, allowed, V,
               top_k, temperature);
    }
    CHECK(after.draw == 1000 + draws && after.position == 10 + draws && after.count == draws);
    CHECK(after.token == (token < 0 ? 0 : token));
    check_device("the next token's embedding", x, embedding + (int64_t)after.token * D, D, 0.0);
    CUDA_CHECK(cudaFreeHost(ring));
    free(states);
    free(z);
    free(copy);
    free(embedding);
    const void *all[] = {device_state, embed, x, logits, values, ids};
    for (const void *p : all) {
        device_release(p);
    }
}

static void sampler_broken_case(float value) {
    enum { V = 100, D = 8 };
    float z[V] = {0};
    z[71] = value;
    Sampling s = {0.8, 50, V, 1, 1};
    TextState state = {s, 0, 0, 0, 0};
    TextState *device_state = device_copy(&state, 1);
    float *embedding = host_random(V * D, 3, 1.0f), *logits = device_f(z, V), *values = device_new<float>(V);
    floatX *embed = device_x(embedding, V * D), *x = device_new<floatX>(D);
    int *ids = device_new<int>(V), *ring;
    CUDA_CHECK(cudaMallocHost(&ring, TEXT_RING * sizeof(int)));
    sample_on_device(device_state, ring, x, embed, logits, ids, values, D, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CHECK(ring[0] == -1 && sample_next(z, &s, 0) == -1);
    CUDA_CHECK(cudaFreeHost(ring));
    free(embedding);
    const void *all[] = {device_state, embed, x, logits, values, ids};
    for (const void *p : all) {
        device_release(p);
    }
}

static void sampler_cases(void) {
    const int few = few_cases ? 2 : emulated() ? 25 : 1000;
    sampler_case(1, 1, 0, 1.0, 1.0f, 0, 2);
    sampler_case(6, 5, 3, 0.8, 2.0f, 0, few);
    sampler_case(67, 67, 0, 1.0, 3.0f, 0, few);
    sampler_case(1000, 997, 50, 0.8, 8.0f, 0, few);
    sampler_case(3000, 2900, 50, 0.8, 8.0f, 1, few); // ties at the threshold, all over the vocabulary
    if (few_cases) {
        return;
    }
    sampler_case(3000, 2900, 1, 0.8, 8.0f, 1, few); // ties at the top
    sampler_case(3000, 2900, 0, 1.3, 8.0f, 0, few);
    sampler_case(3000, 3000, 1024, 1.0, 2.0f, 0, few);
    sampler_case(3000, 3000, 1025, 1.0, 2.0f, 0, few);
    sampler_case(3000, 3000, 2999, 1.0, 2.0f, 1, few);
    sampler_case(3000, 3000, 5000, 1e-3, 2.0f, 0, few);
    sampler_case(3000, 2900, 50, 0.0, 3.0f, 1, 2); // greedy, with ties
    sampler_case(51200, 50257, 50, 0.8, 10.0f, 0, few);
    sampler_case(51200, 50257, 0, 0.8, 10.0f, 0, few / 5);
    sampler_broken_case(NAN);
    sampler_broken_case(INFINITY);
    sampler_broken_case(-INFINITY);
}

// ----------------------------------------------------------------------------
// texts

// each router; a head size that packs do not divide evenly, several words of experts, one head, T near and at
// the window
static const ModelCase text_cases[] = {
    {"relu", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 1, 33, 1, 0, 8.0f},
    {"relu, E = 3, G = 3", "relu", 3, 1, 3, 1, 72, 3, 1, 4, 67, 1, 17, 1, 0, 8.0f},
    {"relu, E = 128, G = 8", "relu", 128, 1, 8, 1, 32, 1, 1, 4, 67, 1, 9, 1, 0, 8.0f},
    {"relu, router off", "relu", 4, 1, 1, 2, 32, 2, 1, 4, 67, 1, 17, 1, 4, 8.0f},
    {"relu, hd = 96", "relu", 4, 1, 1, 1, 96, 1, 1, 1, 67, 1, 20, 1, 0, 8.0f},
    {"topk, k = 2", "topk", 4, 2, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"topk, E = 40, k = 5", "topk", 40, 5, 1, 1, 48, 2, 1, 2, 67, 1, 12, 1, 0, 8.0f},
    {"auxfree, k = 2", "auxfree", 4, 2, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"auxfree, k = 1", "auxfree", 8, 1, 1, 1, 32, 4, 2, 4, 67, 1, 19, 1, 0, 8.0f},
    {"sparsemixer, k = 2", "sparsemixer", 4, 2, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"sparsemixer, E = 36", "sparsemixer", 36, 1, 1, 1, 48, 2, 1, 2, 67, 1, 12, 1, 0, 8.0f},
    {"lory", "lory", 4, 1, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"expert choice", "ec", 4, 1, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"hash, k = 2", "hash", 5, 2, 1, 2, 48, 2, 1, 2, 67, 1, 17, 1, 0, 8.0f},
    {"dense", "dense", 1, 1, 1, 2, 64, 4, 2, 4, 67, 1, 17, 1, 0, 8.0f},
    {"dense, wide", "dense", 1, 1, 1, 1, 1040, 13, 13, 2, 67, 1, 4, 1, 0,
     1.0f}, // more than a lane loads at once
};

// a model of the case on each side, routed as a text is
typedef struct {
    Examination x;
    float *params;
    Model *model;
    cpu::Model *reference;
} TextModels;

static void text_models_open(TextModels *m, const ModelCase *t) {
    examination_init(&m->x, t);
    m->params = draw_weights(t, &m->x.config);
    const Router *router = &m->x.config.router;
    RouterMethod alone = router_row(router->method)->for_one_token;
    m->model = open_for(&m->x, FOR_INFERENCE);
    m->reference = open_on_cpu(&m->x, FOR_INFERENCE);
    set_device_weights(m->model, m->params);
    cpu::model_set(m->reference, BUFFER_PARAMS, 0, model_table(m->model)->flat_size, m->params);
    model_route(m->model, alone, router->active);
    cpu::model_route(m->reference, alone, router->active);
}

static void text_models_close(TextModels *m) {
    model_close(m->model);
    cpu::model_close(m->reference);
    free(m->params);
    examination_free(&m->x);
}

// [T, V] of the full forward of one sequence, in evaluation mode; prompt: its first tokens, which merge lory's
// experts
static floatX *full_logits(Model *m, const int *ids, int T, int prompt) {
    floatX *all = device_new<floatX>((int64_t)T * m->config.vocab_size);
    Losses *losses = &m->losses;
    CUDA_CHECK(cudaMemcpy(losses->batches[0].inputs, ids, (size_t)T * sizeof(int), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(losses->batches[0].targets, ids, (size_t)T * sizeof(int), cudaMemcpyHostToDevice));
    plan_worst(m, T);
    model_forward(m, losses->batches[0].inputs, 1, T, 0, no_draws, &prompt, NULL);
    classifier(m, losses->batches[0].targets, T, 0.0f, all);
    return all;
}

// a text from `first` tokens to the end of the window: every step's logits
static void text_logits_case(const ModelCase *t, int first) {
    TextModels m;
    Sampling s = {1.5, 0, t->V, 3, 4};
    text_models_open(&m, t);
    Model *model = m.model;
    int ids[64];
    float *steps = NEW(float, t->T * t->V);
    memcpy(ids, m.x.inputs, (size_t)first * sizeof(int));
    model_read(model, ids, first, &s, 0, 1000);
    CHECK(model->text.most == t->T - first + 1);
    for (int n = first; n <= t->T; n++) {
        queue_token(model);
        float *logits = fetch(model->text.logits, t->V);
        memcpy(steps + (n - first) * t->V, logits, (size_t)t->V * sizeof(float));
        free(logits);
        ids[n] = text_take(&model->text);
        CHECK(ids[n] >= 0 && ids[n] < t->V);
    }
    floatX *all = full_logits(model, ids, t->T, first);
    float *whole = fetch(all, (int64_t)t->T * t->V);
    int off = 0, most = t->T - first + 1;
    for (int n = first; n <= t->T; n++) {
        double error = relative_error(steps + (n - first) * t->V, whole + (n - 1) * t->V, (size_t)t->V);
        off += !(error <= tolerance(1e-5, 2e-2));
    }
    if (!CHECK(off <= (is_fp32() ? 0 : most / 8))) { // in bf16 a close choice of experts may flip
        printf("    logits of %d of %d steps of %s, from %d on\n", off, most, t->name, first);
    }
    free(whole);
    for (int n = first; n <= t->T && is_fp32(); n++) {
        const float *want = cpu::next_logits(m.reference, ids, n, n == first ? 0 : n - 1);
        check_close("logits beside the CPU's", steps + (n - first) * t->V, want, (size_t)t->V, 1e-5);
    }
    device_release(all);
    free(steps);
    text_models_close(&m);
}

// `count` tokens behind the first `start` of the case, on the device and the CPU: how many differ
static int differing_tokens(TextModels *m, int start, const Sampling *s, int count, int *tokens) {
    int differ = 0;
    model_read(m->model, m->x.inputs, start, s, 5, count);
    cpu::model_read(m->reference, m->x.inputs, start, s, 5, count);
    for (int i = 0; i < count; i++) {
        tokens[i] = model_next_token(m->model);
        differ += tokens[i] != cpu::model_next_token(m->reference);
    }
    return differ;
}

// The tokens themselves: to the end of the window, read anew at it, drawn and greedy. A text that is left
// half-way does no harm to the next, and the same text comes twice
static void text_tokens_case(const ModelCase *t) {
    TextModels m;
    Sampling drawn = {1.0, 20, t->V - 1, 3, 4}, greedy = {0.0, 20, t->V, 3, 4};
    text_models_open(&m, t);
    int tokens[64], again[64], differ = 0;
    differ += differing_tokens(&m, 1, &drawn, t->T, tokens);
    differ += differing_tokens(&m, t->T, &drawn, 1, again);
    model_read(m.model, m.x.inputs, 1, &drawn, 5, 1000);
    for (int i = 0; i < 3; i++) {
        CHECK(model_next_token(m.model) == tokens[i]);
    }
    differ += differing_tokens(&m, t->T - 2, &greedy, 3, again);
    if (!CHECK(!is_fp32() || differ == 0)) {
        printf("    %d tokens of %s differ\n", differ, t->name);
    }
    text_models_close(&m);
}

// a loss that was begun before another is ended after it, and in the order of beginning; a plan that is too
// small is mended
static void losses_case(void) {
    const ModelCase t = {"losses", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 4, 33, 1, 0, 8.0f};
    Examination x;
    examination_init(&x, &t);
    float *params = draw_weights(&t, &x.config);
    Model *m = open_for(&x, FOR_INFERENCE);
    set_device_weights(m, params);
    CHECK(m->routing.arena.max_chunks > 1);
    double alone = model_loss(m, x.inputs, x.targets, t.B, t.T);
    float *each = NEW(float, x.N);
    model_token_losses(m, x.N, each);
    CHECK(fabs(mean_late_loss(each, t.B, t.T, 0) - alone) <= 1e-6 * alone);
    free(each);
    double other = model_loss(m, x.targets, x.inputs, t.B, t.T),
           short_one = model_loss(m, x.inputs, x.targets, 1, 9);
    int64_t active;
    model_loss_begin(m, x.inputs, x.targets, t.B, t.T);
    for (int l = 0; l < t.L; l++) {
        m->losses.planned[l] = 1;
    }
    model_loss_begin(m, x.targets, x.inputs, t.B, t.T);
    CHECK(model_loss_end(m, &active) == alone);
    m->losses.planned[0] = 1;
    model_loss_begin(m, x.inputs, x.targets, 1, 9);
    CHECK(model_loss_end(m, NULL) == other);
    CHECK(model_loss_end(m, NULL) == short_one);
    CHECK(m->losses.begun == m->losses.ended && active > 0);
    cpu::Model *reference = open_on_cpu(&x, FOR_INFERENCE);
    cpu::model_set(reference, BUFFER_PARAMS, 0, model_table(m)->flat_size, params);
    int64_t active_want;
    cpu::model_loss_begin(reference, x.inputs, x.targets, t.B, t.T);
    double want = cpu::model_loss_end(reference, &active_want);
    CHECK(fabs(alone - want) <= tolerance(2e-6, 2e-3) * want);
    CHECK(llabs(active - active_want) <= (is_fp32() ? 0 : active_want / 50));
    cpu::model_close(reference);
    model_close(m);
    free(params);
    examination_free(&x);
}

// lory's tokens have one expert each, whatever its counts say
static void lory_active_case(void) {
    const ModelCase t = {"lory, active", "lory", 4, 1, 1, 2, 48, 2, 1, 2, 67, 2, 17, 1, 0, 8.0f};
    TextModels m;
    text_models_open(&m, &t);
    int64_t active[2];
    model_loss_begin(m.model, m.x.inputs, m.x.targets, t.B, t.T);
    model_loss_end(m.model, &active[0]);
    cpu::model_loss_begin(m.reference, m.x.inputs, m.x.targets, t.B, t.T);
    cpu::model_loss_end(m.reference, &active[1]);
    CHECK(active[0] == t.L * t.B * t.T && active[1] == active[0]);
    text_models_close(&m);
}

static void test_cuda_decode(void) {
    const struct {
        const char *name;
        void (*run)(void);
    } parts[] = {{"attention", decode_attention_cases},
                 {"sampler", sampler_cases},
                 {"losses", losses_case},
                 {"lory, active", lory_active_case}};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        if (case_is_wanted(parts[i].name)) {
            parts[i].run();
        }
    }
    for (size_t i = 0; i < sizeof(text_cases) / sizeof(text_cases[0]); i += few_cases ? 3 : 1) {
        const ModelCase *t = &text_cases[i];
        if (case_is_wanted(t->name)) {
            text_logits_case(t, few_cases ? t->T - 1 : 2);
        }
        if (case_is_wanted(t->name) && !few_cases) {
            text_tokens_case(t);
        }
    }
}

#endif
