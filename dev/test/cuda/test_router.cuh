/*
router.cuh and the methods below it, against router.h on the same logits: active sets, gates, losses,
gradients.

relu, hash, dense and every list of a forced set are exact. Softmax and sigmoid are compared to 1e-6 with
those in double; the choices of topk, auxfree and ec then are those that the C functions make from the device's
own scores, exactly, ties included: a rounding cannot excuse a wrong choice. Logits lie on a grid of 1/1024, so
for topk the C functions' own scores must give the same choice too. Gradients: 1e-5 in fp32; in bf16 one rounding of
each element, at most 2^-8 of it.
*/
#ifndef TEST_ROUTER_CUH
#define TEST_ROUTER_CUH

#include "llmc/router.cuh"
#include "test_pairs.cuh"

enum { LOGITS_RANDOM, LOGITS_FEW, LOGITS_EQUAL, LOGITS_OFF, LOGITS_ONE, LOGITS_STEEP, LOGITS_KINDS };

static float *sample_logits(int kind, int N, int E) {
    int64_t cells = (int64_t)N * E;
    float *z = NEW(float, cells);
    fill_uniform(z, (size_t)cells, 11, 1.0f);
    for (int64_t i = 0; i < cells; i++) {
        int e = (int)(i % E);
        float grid = floorf(z[i] * 1024.0f) / 1024.0f;
        z[i] = kind == LOGITS_FEW     ? floorf(z[i] * 2.0f) / 2.0f
               : kind == LOGITS_EQUAL ? 0.5f
               : kind == LOGITS_OFF   ? grid - 1.0f // no logit above 0
               : kind == LOGITS_ONE   ? grid + (e == E / 2 ? 3.0f : -1.0f)
               : kind == LOGITS_STEEP ? grid - 60.0f * (float)e // most probabilities underflow
                                      : grid;
    }
    return z;
}

typedef struct {
    Router router;
    int N, kind, ranks;
    const float *forced; // [N, E] or NULL
} RouterCase;

// of all experts; negative ones too
static float *sample_bias(int E) {
    float *bias = NEW(float, E);
    fill_uniform(bias, (size_t)E, 17, 0.1f);
    return bias;
}

// the draws of a micro-batch that is not the step's first
static const uint64_t sample_key = 0x123456789abcdefu;
enum { SAMPLE_FIRST = 1000, SAMPLE_LAYER = 3 };

static const Segments no_segments = {0, 0, 0, NULL, 0}; // lory, which has them, is test_merge.cuh's

typedef struct { // one run on the device
    DevicePairs pairs;
    float *logits;
    floatX *dlogits;
    double *loss;
    void *scratch;
} DeviceRouting;

static int *sample_ids(int N) {
    int *ids = NEW(int, N);
    for (int t = 0; t < N; t++) {
        ids[t] = (int)((unsigned)t * 2654435761u % 50257u);
    }
    return ids;
}

static DeviceRouting device_routing(RouterCase c, const float *logits) {
    int64_t cells = (int64_t)c.N * c.router.experts;
    double loss = 0.5;
    DeviceRouting r;
    int *host_ids = sample_ids(c.N), *ids = device_i(host_ids, c.N);
    float *forced = c.forced != NULL ? device_f(c.forced, cells) : NULL;
    float *host_bias = sample_bias(c.router.experts), *bias = device_f(host_bias, c.router.experts);
    uint64_t *key = device_copy(&sample_key, 1);
    RouterInputs in = {ids, bias, forced, {key, SAMPLE_FIRST, SAMPLE_LAYER}, no_segments};
    r.pairs = device_pairs_new(c.N, c.router.experts);
    r.logits = device_f(logits, cells);
    r.dlogits = device_new<floatX>(cells);
    r.loss = device_copy(&loss, 1);
    r.scratch = device_new<char>((int64_t)router_scratch_bytes(c.router, c.N));
    router_forward(r.pairs, r.logits, in, c.router, c.N, r.scratch, NULL);
    CUDA_CHECK(cudaDeviceSynchronize());
    free(host_ids);
    free(host_bias);
    device_release(key);
    device_release(bias);
    device_release(ids);
    device_release(forced);
    return r;
}

static void device_routing_release(DeviceRouting r) {
    device_pairs_release(r.pairs);
    device_release(r.logits);
    device_release(r.dlogits);
    device_release(r.loss);
    device_release(r.scratch);
}

// the list that the C functions make from scores s: what the logits have become
static void choose_in_c(PairList *want, const float *s, RouterCase c) {
    int N = c.N, E = c.router.experts, k = c.router.active;
    int *ids = sample_ids(N);
    float *bias = sample_bias(E);
    RouterInputs in = {ids, bias, c.forced, {&sample_key, SAMPLE_FIRST, SAMPLE_LAYER}, no_segments};
    if (c.forced != NULL && router_has_weights(c.router.method) && !router_draws(c.router.method)) {
        pairs_from_mask(want, s, c.forced, (int64_t)N, E);
    } else if (c.router.method == ROUTER_TOPK) {
        router_topk_forward(want, s, N, E, k);
    } else if (c.router.method == ROUTER_AUXFREE) {
        router_auxfree_forward(want, s, bias, N, E, k);
    } else if (c.router.method == ROUTER_EC) {
        router_ec_forward(want, s, N, E, k);
    } else {
        router_forward(want, (float *)s, in, c.router, (int64_t)N);
    }
    if (c.router.method == ROUTER_AUXFREE) {
        router_auxfree_gates(want, s, E, k);
    }
    free(ids);
    free(bias);
}

// softmax of each row, in double
static double *exact_softmax(const float *logits, int N, int E) {
    double *s = NEW(double, (int64_t)N *E);
    for (int64_t t = 0; t < N; t++) {
        double sum = 0.0, max = -INFINITY;
        for (int e = 0; e < E; e++) {
            max = fmax(max, (double)logits[t * E + e]);
        }
        for (int e = 0; e < E; e++) {
            s[t * E + e] = exp((double)logits[t * E + e] - max);
            sum += s[t * E + e];
        }
        for (int e = 0; e < E; e++) {
            s[t * E + e] /= sum;
        }
    }
    return s;
}

static double *exact_sigmoid(const float *logits, int64_t n) {
    double *s = NEW(double, n);
    for (int64_t i = 0; i < n; i++) {
        s[i] = 1.0 / (1.0 + exp(-fmax((double)logits[i], -40.0)));
    }
    return s;
}

// Where a draw falls on the border between two experts, two exponentials that differ in a last bit draw
// differently: about E 1e-7 of the draws. So many may differ; all else is compared with the device's draws.
// Returns these, as a forced set [N, E]
static float *take_device_draws(const PairList *own, DeviceRouting r, RouterCase c) {
    int E = c.router.experts, k = c.router.active, differing = 0;
    double expected = 1e-7 * (double)c.N * k * E;
    RouterRound *rounds = fetch_raw(r.pairs.rounds, (int64_t)c.N * k);
    float *draws = NEW(float, (int64_t)c.N *E);
    for (int t = 0; t < c.N; t++) {
        int differs = 0;
        for (int j = 0; j < k; j++) {
            int draw = rounds[(int64_t)t * k + j].draw;
            differs |= draw != own->rounds[(int64_t)t * k + j].draw;
            if (draw != 0 && abs(draw) <= E) {
                draws[(int64_t)t * E + abs(draw) - 1] = (float)(draw < 0 ? -(j + 1) : j + 1);
            }
        }
        differing += differs;
    }
    if (!CHECK(differing <= (expected < 0.02 ? 0.0 : 2.0 + 3.0 * expected))) {
        printf("  %d of %d tokens are drawn otherwise\n", differing, c.N);
    }
    free(rounds);
    return draws;
}

static void check_forward(PairList *want, DeviceRouting r, const float *logits, RouterCase c) {
    int N = c.N, E = c.router.experts;
    int64_t cells = (int64_t)N * E;
    float *device_s = fetch(r.logits, cells), *s = NEW(float, cells);
    memcpy(s, logits, (size_t)cells * sizeof(float));
    RouterScores scores = router_row(c.router.method)->scores;
    if (scores == SCORES_SIGMOID) {
        double *exact = exact_sigmoid(logits, cells);
        check_close_to("router sigmoid", device_s, exact, (size_t)cells, 1e-6);
        free(exact);
    } else if (scores == SCORES_SOFTMAX) {
        router_softmax(s, (int64_t)N, E);
        double *exact = exact_softmax(logits, N, E);
        check_close_to("router softmax", device_s, exact, (size_t)cells, 1e-6);
        free(exact);
        if (c.router.method == ROUTER_TOPK && c.kind != LOGITS_STEEP) { // where 0 and exp(-80) choose alike
            choose_in_c(want, s, c);
            // C adds a row's E terms one after another: E roundings, of which most cancel
            check_pairs("topk, C's scores", r.pairs, want, N, E, 1e-6 + 6e-9 * E);
        }
    } else {
        CHECK(memcmp(device_s, s, (size_t)cells * sizeof(float)) == 0); // left alone
    }
    choose_in_c(want, device_s, c);
    if (router_draws(c.router.method) && c.forced == NULL) {
        RouterCase drawn = c;
        float *draws = take_device_draws(want, r, c);
        drawn.forced = draws;
        choose_in_c(want, device_s, drawn);
        free(draws);
    }
    double limit =
        scores == SCORES_SIGMOID || router_draws(c.router.method) ? 1e-6 : 0.0; // quotients of sums
    check_pairs(router_name(c.router.method), r.pairs, want, N, E, limit);
    free(device_s);
    free(s);
}

// counts over all ranks, as equal ranks would have them; *device: the same on the device
static int64_t *global_counts(int **device, const PairList *want, RouterCase c) {
    int E = c.router.experts;
    int64_t *counts = NEW(int64_t, E);
    int *sums = NEW(int, E);
    for (int e = 0; e < E; e++) {
        counts[e] = want->counts[e] * c.ranks;
        sums[e] = (int)counts[e];
    }
    *device = device_copy(sums, E);
    free(sums);
    return counts;
}

static void check_loss_and_backward(const PairList *want, DeviceRouting r, RouterCase c) {
    enum { LAYERS = 3 };
    int64_t cells = (int64_t)c.N * c.router.experts, all = (int64_t)c.N * c.ranks;
    float *s = fetch(r.logits, cells), *dgate = NEW(float, want->num_pairs), *dlogits = NEW(float, cells);
    int *device_counts;
    int64_t *counts = global_counts(&device_counts, want, c);
    double weight = 0.7 * (double)all; // as large as dgate
    fill_uniform(dgate, (size_t)want->num_pairs, 5, 1.0f);
    float *device_dgate = device_f(dgate, want->num_pairs);

    router_loss(r.loss, r.pairs, r.logits, device_counts, all, c.router, c.N, LAYERS, 0.25, r.scratch, NULL);
    double want_loss = router_loss(want, s, counts, all, c.router, LAYERS);
    double *loss = fetch_raw(r.loss, 1);
    double limit = router_draws(c.router.method) ? 1e-6 : 1e-7; // each has its own softmax
    CHECK(fabs(loss[0] - (0.5 + 0.25 * want_loss)) <= 1e-12 + limit * fabs(want_loss));
    free(loss);

    router_backward(dlogits, dgate, want, s, counts, all, c.router, LAYERS, weight);
    router_backward(r.dlogits, device_dgate, r.pairs, r.logits, device_counts, all, c.router, c.N, LAYERS,
                    weight, NULL);
    int comparable = c.kind != LOGITS_STEEP; // there s_te (ds_te - dot_t) is what rounding leaves of 0
    if (router_has_weights(c.router.method) && comparable) {
        check_device("router dlogits", r.dlogits, dlogits, cells, tolerance(1e-5, 4e-3));
    }
    free(s);
    free(dgate);
    free(dlogits);
    free(counts);
    device_release(device_dgate);
    device_release(device_counts);
}

static uint64_t routing_hash(DeviceRouting r, RouterCase c) {
    int64_t cells = (int64_t)c.N * c.router.experts; // pairs that are not there are device_new's pattern
    uint64_t hash = device_hash(r.pairs.row_start, (c.N + 1) * 4);
    hash = hash * 31 + device_hash(r.pairs.expert, cells * 4);
    hash = hash * 31 + device_hash(r.pairs.gate, cells * 4);
    hash = hash * 31 + device_hash(r.pairs.counts, c.router.experts * 4);
    hash = hash * 31 + device_hash(r.logits, cells * 4);
    hash = hash * 31 + device_hash(r.dlogits, cells * (int64_t)sizeof(floatX));
    return hash * 31 + device_hash(r.loss, 8);
}

static uint64_t router_case_once(RouterCase c) {
    if (router_merges(c.router.method)) { // which routes no tokens: test_merge.cuh
        return 0;
    }
    float *logits = sample_logits(c.kind, c.N, c.router.experts);
    PairList want = pairs_empty();
    DeviceRouting r = device_routing(c, logits);
    int before = tally.failures;
    check_forward(&want, r, logits, c);
    check_loss_and_backward(&want, r, c);
    uint64_t hash = routing_hash(r, c);
    if (tally.failures > before) {
        printf("  ... %s, E %d, k %d, N %d, logits %d, load balance %d, ranks %d%s\n",
               router_name(c.router.method), c.router.experts, c.router.active, c.N, c.kind,
               c.router.load_balance, c.ranks, c.forced != NULL ? ", forced" : "");
    }
    pairs_free(&want);
    device_routing_release(r);
    free(logits);
    return hash;
}

static void router_case(RouterMethod method, int E, int k, int N, int kind) {
    Router router = {method, E, k, (N + E + k) % 3 != 0, 0.3, 0};
    RouterCase c = {router, N, kind, 1, NULL};
    router_case_once(c);
}

// logits that are not finite: the same experts as in C, and a gate that is none either
static void test_router_not_finite(void) {
    enum { N = 70, E = 8, AT = 33 * E + 5 };
    const float values[] = {NAN, INFINITY, -INFINITY};
    for (int method = ROUTER_RELU; method <= ROUTER_EC; method++) {
        for (int i = 0; i < 3 && method != ROUTER_LORY; i++) {
            RouterCase c = {{(RouterMethod)method, E, 2, 1, 0.3, 0}, N, LOGITS_RANDOM, 1, NULL};
            if (method != ROUTER_RELU && i == 2) { // a probability of 0, which is a number
                continue;
            }
            float *logits = sample_logits(c.kind, N, E);
            logits[AT] = values[i];
            PairList want = pairs_empty();
            DeviceRouting r = device_routing(c, logits);
            float *bias = sample_bias(E);
            RouterInputs in = {NULL, bias, NULL, {NULL, 0, 0}, no_segments};
            router_forward(&want, logits, in, c.router, N);
            free(bias);
            int *row_start = fetch(r.pairs.row_start, N + 1), broken = 0, wrong = 0;
            int *expert = fetch(r.pairs.expert, want.num_pairs);
            float *gate = fetch(r.pairs.gate, want.num_pairs);
            for (int p = 0; p < (int)want.num_pairs; p++) {
                wrong += method == ROUTER_RELU && expert[p] != want.expert[p];
                broken += p >= row_start[AT / E] && p < row_start[AT / E + 1] && !isfinite(gate[p]);
            }
            CHECK(row_start[N] == want.num_pairs && wrong == 0 && broken > 0);
            free(row_start);
            free(expert);
            free(gate);
            free(logits);
            pairs_free(&want);
            device_routing_release(r);
        }
    }
}

// what a forced set must do for every method that has weights: hash and dense ignore it
static void test_router_sets(void) {
    RouterMethod methods[] = {ROUTER_RELU, ROUTER_TOPK, ROUTER_AUXFREE, ROUTER_EC, ROUTER_HASH};
    int shapes[][2] = {{19, 3}, {33, 8}, {12, 40}};
    for (int m = 0; m < 5; m++) {
        for (int i = 0; i < 3; i++) {
            for (int kind = 0; kind < MASK_KINDS; kind++) {
                int N = shapes[i][0], E = shapes[i][1];
                float *forced = sample_mask(kind, N, E, 9);
                Router router = {methods[m], E, 2, 1, 0.3, 0};
                RouterCase c = {router, N, LOGITS_RANDOM, 1 + kind % 3, forced};
                router_case_once(c);
                free(forced);
            }
        }
    }
}

static void test_router_repeats(void) {
    for (int method = 0; method < ROUTER_COUNT; method++) {
        Router router = {
            (RouterMethod)method, method == ROUTER_DENSE ? 1 : 33, method == ROUTER_DENSE ? 1 : 5, 1, 0.3, 0};
        RouterCase c = {router, emulated() ? 100 : 50000, LOGITS_FEW, 1, NULL};
        CHECK(router_case_once(c) == router_case_once(c));
    }
}

static void test_router_shapes(void) {
    int experts[] = {1, 3, 8, 32, 33, 128, 130}, tokens[] = {1, 17, 64, 1000, 4099};
    for (int i = 0; i < 7; i++) {
        int E = experts[i], thin = emulated() && E > 33, most = emulated() ? 2200 : 1 << 30;
        for (int j = 0; j < 3; j++) {
            int k = j == 0 ? 1 : j == 1 ? 2 : E;
            if (k > E || (j > 0 && k == 1)) {
                continue;
            }
            for (int method = ROUTER_RELU; method <= ROUTER_HASH; method++) {
                if (thin && method == ROUTER_EC && k != 2) { // a block of 1024 threads an expert
                    continue;
                }
                for (int n = 0; n < 5 && E * tokens[n] <= most; n++) {
                    router_case((RouterMethod)method, E, k, tokens[n], LOGITS_RANDOM);
                }
                for (int kind = LOGITS_FEW; kind < (thin ? LOGITS_EQUAL : LOGITS_KINDS); kind++) {
                    router_case((RouterMethod)method, E, k, 37, kind);
                }
            }
        }
    }
    router_case(ROUTER_DENSE, 1, 1, 1, LOGITS_RANDOM);
    router_case(ROUTER_DENSE, 1, 1, 1023, LOGITS_RANDOM);
    router_case(ROUTER_DENSE, 1, 1, 1024, LOGITS_RANDOM);
}

static void test_router_large(void) {
    router_case(ROUTER_RELU, 8, 1, 65536, LOGITS_RANDOM);
    router_case(ROUTER_TOPK, 8, 1, 65536, LOGITS_RANDOM);
    router_case(ROUTER_TOPK, 512, 64, 10007, LOGITS_RANDOM);
    router_case(ROUTER_TOPK, 512, 64, 1001, LOGITS_FEW);
    router_case(ROUTER_TOPK, 3000, 7, 300, LOGITS_FEW);
    router_case(ROUTER_TOPK, 65536, 2, 20, LOGITS_FEW);
    router_case(ROUTER_AUXFREE, 8, 2, 65536, LOGITS_RANDOM);
    router_case(ROUTER_SPARSEMIXER, 8, 2, 6553, LOGITS_RANDOM);
    router_case(ROUTER_SPARSEMIXER, 512, 64, 101, LOGITS_RANDOM);
    router_case(ROUTER_AUXFREE, 512, 64, 1001, LOGITS_FEW);
    router_case(ROUTER_AUXFREE, 3000, 7, 300, LOGITS_FEW);
    router_case(ROUTER_EC, 8, 1, 1000003, LOGITS_RANDOM);
    router_case(ROUTER_EC, 8, 2, 1000003, LOGITS_EQUAL);
    router_case(ROUTER_EC, 512, 64, 5003, LOGITS_FEW);
    router_case(ROUTER_HASH, 8, 2, 1000003, LOGITS_RANDOM);
}

// every kernel: 4, 8 and 32 lanes a token, one tile of tokens and two, load balance or none, forced or not
static void test_router_few(void) {
    for (int method = ROUTER_RELU; method <= ROUTER_HASH; method++) {
        float *forced = sample_mask(MASK_MIXED, 33, 8, 9);
        RouterCase c = {{(RouterMethod)method, 8, 2, 1, 0.3, 0}, 33, LOGITS_RANDOM, 2, forced};
        router_case_once(c);
        router_case((RouterMethod)method, 3, 2, 300, LOGITS_RANDOM);
        router_case((RouterMethod)method, 33, 2, 37, LOGITS_FEW);
        free(forced);
    }
    router_case(ROUTER_DENSE, 1, 1, 300, LOGITS_RANDOM);
}

// a step of the biases, whole and in the parts that ranks own: C's bits
static void test_router_balance(void) {
    const int shapes[] = {1, 5, 300};
    for (int i = 0; i < 3; i++) {
        int E = shapes[i];
        float *bias = sample_bias(E);
        int64_t *counts = NEW(int64_t, E);
        for (int e = 0; e < E; e++) {
            counts[e] = ((int64_t)1 << 33) + (e * 7 + 3) % 11 - 5;
        }
        for (int parts = 1; parts <= 2; parts++) {
            float *device = device_f(bias, E);
            int64_t *device_counts = device_copy(counts, E);
            for (int part = 0; part < parts; part++) {
                router_auxfree_balance(device, device_counts, E * part / parts, E * (part + 1) / parts, E,
                                       0.01f, NULL);
            }
            float *got = fetch(device, E), *want = NEW(float, E);
            memcpy(want, bias, (size_t)E * sizeof(float));
            router_auxfree_balance(want, counts, E, 0.01f);
            CHECK(memcmp(got, want, (size_t)E * sizeof(float)) == 0);
            free(got);
            free(want);
            device_release(device);
            device_release(device_counts);
        }
        free(bias);
        free(counts);
    }
}

static void test_cuda_router(void) {
    test_router_balance();
    if (few_cases) {
        test_router_few();
        return;
    }
    test_router_shapes();
    test_router_sets();
    test_router_not_finite();
    test_router_repeats();
    if (!emulated()) {
        test_router_large();
    }
}

// ----------------------------------------------------------------------------
// speed, by name only

static void bench_router_of(RouterMethod method, int E, int k, float shift) {
    enum { N = 65536, LAYERS = 12 };
    Router router = {method, E, k, 1, 0.1, 0};
    RouterCase c = {router, N, LOGITS_RANDOM, 1, NULL};
    int64_t cells = (int64_t)N * E;
    float *logits = host_random(cells, 3, 2.0f);
    for (int64_t i = 0; i < cells; i++) {
        logits[i] -= shift;
    }
    DeviceRouting r = device_routing(c, logits);
    int *host_ids = sample_ids(N), *ids = device_i(host_ids, N), *row_start = fetch(r.pairs.row_start, N + 1);
    float *host_bias = sample_bias(E), *bias = device_f(host_bias, E);
    uint64_t *key = device_copy(&sample_key, 1);
    RouterInputs in = {ids, bias, NULL, {key, SAMPLE_FIRST, SAMPLE_LAYER}, no_segments};
    float *given = device_f(logits, cells), *dgate = device_new<float>(cells);
    RoutingStats *stats = device_new<RoutingStats>(1);
    int64_t *counts = device_new<int64_t>(E);
    size_t bytes = (size_t)cells * sizeof(float);
    CUDA_CHECK(cudaMemset(dgate, 0, bytes));
    auto restore = [&] {
        CUDA_CHECK(cudaMemcpyAsync(r.logits, given, bytes, cudaMemcpyDeviceToDevice, NULL));
    };
    auto forward = [&] {
        restore(); // some overwrite it
        router_forward(r.pairs, r.logits, in, router, N, r.scratch, NULL);
    };
    auto rows = [&] {
        Scratch s = {(unsigned char *)r.scratch, 0};
        RouterScratch parts = router_scratch(&s, router, N);
        pairs_from_mask(r.pairs, r.logits, parts.mask, N, E, parts.pairs, NULL);
    };
    auto loss = [&] {
        router_loss(r.loss, r.pairs, r.logits, r.pairs.counts, N, router, N, LAYERS, 1.0, r.scratch, NULL);
    };
    auto backward = [&] {
        router_backward(r.dlogits, dgate, r.pairs, r.logits, r.pairs.counts, N, router, N, LAYERS, 1.0, NULL);
    };
    auto count = [&] { routing_stats(stats, r.pairs, counts, N, E, NULL); };
    double copy_ms = device_ms(restore), forward_ms = device_ms(forward) - copy_ms, rows_ms = device_ms(rows);
    printf(
        "  %-7s N %d E %3d k %2d, %.2f active a token | us: forward %.1f (rows from mask %.1f, a copy of the "
        "logits %.1f)",
        router_name(method), N, E, k, (double)row_start[N] / N, 1e3 * forward_ms, 1e3 * rows_ms,
        1e3 * copy_ms);
    if (router_has_weights(method)) {
        rows_ms = device_ms(backward);
        forward(); // the list again, before the loss's partial sums take the scratch
        printf(", backward %.1f, loss %.1f", 1e3 * rows_ms, 1e3 * device_ms(loss));
    }
    printf(", stats %.1f\n", 1e3 * device_ms(count));
    device_routing_release(r);
    free(logits);
    free(host_ids);
    free(host_bias);
    free(row_start);
    device_release(key);
    device_release(bias);
    device_release(ids);
    device_release(given);
    device_release(dgate);
    device_release(stats);
    device_release(counts);
}

static void bench_cuda_router(void) {
    bench_router_of(ROUTER_RELU, 8, 1, 1.5f); // one in eight above 0
    bench_router_of(ROUTER_RELU, 8, 1, 0.0f); // one in two: the dense stage
    bench_router_of(ROUTER_TOPK, 8, 1, 0.0f);
    bench_router_of(ROUTER_AUXFREE, 8, 1, 0.0f);
    bench_router_of(ROUTER_SPARSEMIXER, 8, 1, 0.0f);
    bench_router_of(ROUTER_EC, 8, 1, 0.0f);
    bench_router_of(ROUTER_HASH, 8, 1, 0.0f);
    bench_router_of(ROUTER_RELU, 512, 64, 1.5f);
    bench_router_of(ROUTER_TOPK, 512, 64, 0.0f);
    bench_router_of(ROUTER_AUXFREE, 512, 64, 0.0f);
    bench_router_of(ROUTER_SPARSEMIXER, 512, 64, 0.0f);
    bench_router_of(ROUTER_EC, 512, 64, 0.0f);
}

#endif
