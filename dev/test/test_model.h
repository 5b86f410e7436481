/*
model.h: the table of tensors against the names and shapes of dev/doc/design.md, the pointers into it, and the
initial weights: mean and deviation per tensor, and some exact bits.
*/
#ifndef TEST_MODEL_H
#define TEST_MODEL_H

#include "llmc/model.h"
#include "buffers.h"
#include "harness.h"

typedef struct {
    Config config;
    TensorTable table;
    Weights weights;
    float *params;
} ModelCase;

static ModelCase model_case(const char *preset, const char *line) {
    ModelCase m;
    Options options;
    memset(&m, 0, sizeof(m));
    options_defaults(&options, preset);
    options_parse_line(&options, line);
    m.config = config_from_options(&options);
    model_tensors(&m.table, &m.weights, &m.config, NULL);
    CHECK(m.weights.embed == NULL && m.weights.head == NULL && m.weights.layers[0].gate_up == NULL);
    m.params = NEW(float, m.table.flat_size);
    model_tensors(&m.table, &m.weights, &m.config, m.params); // again, now into memory
    return m;
}

static void model_case_free(ModelCase *m) {
    free(m->params);
    table_free(&m->table);
    free(m->weights.layers);
}

// ----------------------------------------------------------------------------
// the table

typedef struct {
    const char *name;
    int64_t shape[3]; // 0 ends it
    double deviation;
} ModelRow;

// hidden 24, heads 4, KV 2, hd 6, V 67, 3 experts at granularity 2, F 48, 2 layers
#define MODEL_LINE                                                                                           \
    "--hidden 24 --heads 4 --kv-heads 2 --vocab-size 67 --layers 2 --experts 3 --granularity 2 --router "

#define MODEL_LAYER(N)                                                                                       \
    {"model.layers." N ".input_layernorm.weight", {24}, 0}, /* norms are all ones */                         \
        {"model.layers." N ".self_attn.q_proj.weight", {24, 24}, 0.01},                                      \
        {"model.layers." N ".self_attn.k_proj.weight", {12, 24}, 0.01},                                      \
        {"model.layers." N ".self_attn.v_proj.weight", {12, 24}, 0.01},                                      \
        {"model.layers." N ".self_attn.o_proj.weight", {24, 24}, 0.005}, {                                   \
        "model.layers." N ".post_attention_layernorm.weight", {24}, 0                                        \
    }

#define MODEL_EXPERTS(N)                                                                                     \
    {"model.layers." N ".mlp.experts.gate_up_proj", {6, 96, 24}, 0.01}, {                                    \
        "model.layers." N ".mlp.experts.down_proj", {6, 24, 48}, 0.005                                       \
    }

#define MODEL_FIRST                                                                                          \
    { "model.embed_tokens.weight", {67, 24}, 0.01 }
#define MODEL_LAST                                                                                           \
    {"model.norm.weight", {24}, 0}, {                                                                        \
        "lm_head.weight", {67, 24}, 0.01                                                                     \
    }

// elements that belong to two tensors, buckets that are not whole blocks one behind the other, tensors that leave
// their bucket, norms and matrices in one bucket
static int model_wrong_places(const ModelCase *m) {
    const TensorTable *table = &m->table;
    unsigned char *seen = NEW(unsigned char, table->flat_size);
    int wrong = table->bucket_count != m->config.layers + 4;
    int64_t next = 0;
    for (int b = 0; b < table->bucket_count; b++) {
        const Bucket *bucket = &table->buckets[b];
        wrong += bucket->first != next || bucket->size % BUCKET_BLOCK != 0;
        next += bucket->size;
    }
    wrong += next != table->flat_size;
    for (int i = 0; i < table->count; i++) {
        const Tensor *t = &table->tensors[i];
        int b = 0;
        while (t->offset >= table->buckets[b].first + table->buckets[b].size) {
            b++;
        }
        wrong += t->offset + t->size > table->buckets[b].first + table->buckets[b].size;
        wrong += table->buckets[b].decay != t->decay;
        for (int64_t j = 0; j < t->size; j++) {
            wrong += seen[t->offset + j]++;
        }
    }
    free(seen);
    return wrong;
}

// the last `state` rows are no parameters
static void model_check_table(const char *router, const ModelRow *rows, int count, int state, int experts) {
    char line[256];
    check_format(line, sizeof(line), MODEL_LINE "%s", router);
    ModelCase m = model_case(NULL, line);
    int64_t params = 0;
    int wrong = 0;
    CHECK(m.table.count == count && m.table.trained_count == count - state);
    for (int i = 0; i < count && i < m.table.count; i++) {
        const Tensor *t = &m.table.tensors[i];
        int64_t size = 1;
        int ndim = 0;
        for (; ndim < 3 && rows[i].shape[ndim] > 0; ndim++) {
            size *= rows[i].shape[ndim];
            wrong += t->shape[ndim] != rows[i].shape[ndim];
        }
        wrong += strcmp(t->name, rows[i].name) != 0 || t->ndim != ndim || t->size != size;
        wrong += t->deviation != (float)rows[i].deviation || t->decay != (ndim >= 2);
        params += i < count - state ? size : 0;
    }
    wrong += model_wrong_places(&m);
    if (!CHECK(wrong == 0 && m.table.num_params == params && config_params(&m.config, experts) == params)) {
        printf("    router %s\n", router);
    }
    model_case_free(&m);
}

static void test_model_table(void) {
    static const ModelRow biased[] = {MODEL_FIRST,
                                      MODEL_LAYER("0"),
                                      {"model.layers.0.mlp.gate.weight", {6, 24}, 0.01},
                                      MODEL_EXPERTS("0"),
                                      MODEL_LAYER("1"),
                                      {"model.layers.1.mlp.gate.weight", {6, 24}, 0.01},
                                      MODEL_EXPERTS("1"),
                                      MODEL_LAST,
                                      {"model.layers.0.mlp.gate.e_score_correction_bias", {6}, 0},
                                      {"model.layers.1.mlp.gate.e_score_correction_bias", {6}, 0}};
    const int routed = sizeof(biased) / sizeof(biased[0]) - 2; // the other learned routers have no bias
    static const ModelRow hash[] = {MODEL_FIRST,      MODEL_LAYER("0"),   MODEL_EXPERTS("0"),
                                    MODEL_LAYER("1"), MODEL_EXPERTS("1"), MODEL_LAST};
    static const ModelRow dense[] = {MODEL_FIRST,
                                     MODEL_LAYER("0"),
                                     {"model.layers.0.mlp.gate_proj.weight", {96, 24}, 0.01},
                                     {"model.layers.0.mlp.up_proj.weight", {96, 24}, 0.01},
                                     {"model.layers.0.mlp.down_proj.weight", {24, 96}, 0.005},
                                     MODEL_LAYER("1"),
                                     {"model.layers.1.mlp.gate_proj.weight", {96, 24}, 0.01},
                                     {"model.layers.1.mlp.up_proj.weight", {96, 24}, 0.01},
                                     {"model.layers.1.mlp.down_proj.weight", {24, 96}, 0.005},
                                     MODEL_LAST};
    model_check_table("relu", biased, routed, 0, 6);
    model_check_table("topk", biased, routed, 0, 6);
    model_check_table("ec", biased, routed, 0, 6);
    model_check_table("auxfree", biased, routed + 2, 2, 6);
    model_check_table("hash", hash, sizeof(hash) / sizeof(hash[0]), 0, 6);
    model_check_table("dense", dense, sizeof(dense) / sizeof(dense[0]), 0, 1);
}

// element `row` of the tensor of that name
static const float *model_at(const ModelCase *m, const char *name) {
    for (int i = 0; i < m->table.count; i++) {
        if (strcmp(m->table.tensors[i].name, name) == 0) {
            return m->params + m->table.tensors[i].offset;
        }
    }
    return NULL;
}

// each pointer at its tensor; queries, keys and values (gates and ups) are rows of one matrix
static void test_model_pointers(void) {
    ModelCase m = model_case(NULL, MODEL_LINE "relu");
    const LayerWeights *w = &m.weights.layers[1];
    CHECK(m.weights.embed == model_at(&m, "model.embed_tokens.weight"));
    CHECK(m.weights.norm == model_at(&m, "model.norm.weight"));
    CHECK(m.weights.head == model_at(&m, "lm_head.weight"));
    CHECK(w->attn_norm == model_at(&m, "model.layers.1.input_layernorm.weight"));
    CHECK(w->qkv == model_at(&m, "model.layers.1.self_attn.q_proj.weight"));
    CHECK(w->qkv + 24 * 24 == model_at(&m, "model.layers.1.self_attn.k_proj.weight"));
    CHECK(w->qkv + 36 * 24 == model_at(&m, "model.layers.1.self_attn.v_proj.weight"));
    CHECK(w->o == model_at(&m, "model.layers.1.self_attn.o_proj.weight"));
    CHECK(w->ffn_norm == model_at(&m, "model.layers.1.post_attention_layernorm.weight"));
    CHECK(w->router == model_at(&m, "model.layers.1.mlp.gate.weight"));
    CHECK(w->gate_up == model_at(&m, "model.layers.1.mlp.experts.gate_up_proj"));
    CHECK(w->down == model_at(&m, "model.layers.1.mlp.experts.down_proj"));
    model_case_free(&m);
    m = model_case(NULL, MODEL_LINE "dense");
    w = &m.weights.layers[0];
    CHECK(w->router == NULL && w->gate_up == model_at(&m, "model.layers.0.mlp.gate_proj.weight"));
    CHECK(w->gate_up + 96 * 24 == model_at(&m, "model.layers.0.mlp.up_proj.weight"));
    CHECK(w->down == model_at(&m, "model.layers.0.mlp.down_proj.weight"));
    model_case_free(&m);
    m = model_case(NULL, MODEL_LINE "hash");
    m.weights.layers[0].router = m.params; // of an earlier walk
    model_tensors(&m.table, &m.weights, &m.config, m.params);
    CHECK(m.weights.layers[0].router == NULL && m.weights.layers[0].bias == NULL);
    model_case_free(&m);
    m = model_case(NULL, MODEL_LINE "auxfree");
    CHECK(m.weights.layers[1].bias == model_at(&m, "model.layers.1.mlp.gate.e_score_correction_bias"));
    model_case_free(&m);
}

// ----------------------------------------------------------------------------
// initial weights

// normal with mean 0 and this deviation, to 4.5 standard errors; or all ones
static void model_check_tensor(const float *x, const Tensor *t, double deviation) {
    double mean = 0.0, square = 0.0;
    for (int64_t i = 0; i < t->size; i++) {
        mean += x[i];
        square += (double)x[i] * x[i];
    }
    mean /= (double)t->size;
    double spread = sqrt(square / (double)t->size - mean * mean);
    double error = 4.5 / sqrt((double)t->size);
    int ones = deviation == 0.0 && mean == 1.0 && spread == 0.0;
    int normal = fabs(mean) < error * deviation && fabs(spread / deviation - 1.0) < error / sqrt(2.0);
    if (!CHECK(deviation == 0.0 ? ones : normal)) {
        printf("    %s: mean %g, deviation %g\n", t->name, mean, spread);
    }
}

static void model_draw(const ModelCase *m, float *params, uint64_t seed) {
    FlatBuffer buffer = host_buffer(&m->table, params);
    model_init(&buffer, seed);
}

// the small preset's tensors, in 3 layers of narrow experts
static void test_model_init(void) {
    ModelCase m =
        model_case("small", "--layers 3 --vocab-size 1024 --experts 2 --ffn-mult 1 --router auxfree");
    for (int64_t i = 0; i < m.table.flat_size; i++) {
        m.params[i] = 7.0f;
    }
    model_draw(&m, m.params, 1234);
    for (int l = 0; l < 3; l++) {
        CHECK(m.weights.layers[l].bias[0] == 0.0f && m.weights.layers[l].bias[1] == 0.0f);
    }
    for (int i = 0; i < m.table.trained_count; i++) {
        const Tensor *t = &m.table.tensors[i];
        int norm = strstr(t->name, "norm") != NULL;
        int residual = strstr(t->name, "o_proj") != NULL || strstr(t->name, "down_proj") != NULL;
        model_check_tensor(m.params + t->offset, t, norm ? 0.0 : residual ? 0.01 / sqrt(6.0) : 0.01);
    }
    model_case_free(&m);
}

// a tensor's draws depend on its place in the table and the seed: no two alike
static void test_model_init_distinct(void) {
    ModelCase m = model_case(NULL, MODEL_LINE "relu");
    float *other = NEW(float, m.table.flat_size);
    int alike = 0;
    model_draw(&m, m.params, 1);
    model_draw(&m, other, 1);
    CHECK(memcmp(m.params, other, (size_t)m.table.flat_size * sizeof(float)) == 0);
    model_draw(&m, other, 2);
    for (int i = 0; i < m.table.count; i++) {
        const Tensor *a = &m.table.tensors[i];
        for (int j = 0; j < i && a->deviation > 0; j++) {
            const Tensor *b = &m.table.tensors[j];
            alike +=
                b->deviation > 0 && m.params[a->offset] / a->deviation == m.params[b->offset] / b->deviation;
        }
        alike += a->deviation > 0 && m.params[a->offset] == other[a->offset];
    }
    CHECK(alike == 0);
    free(other);
    model_case_free(&m);
}

// the same seed gives these bits on every machine; any change of generator, table or deviation shows here
static void test_model_init_golden(void) {
    static const struct {
        const char *name;
        int64_t element;
        uint32_t bits;
    } golden[] = {
        {"model.embed_tokens.weight", 0, 0xBB84B769},
        {"model.embed_tokens.weight", 1607, 0xBC9EB92B},
        {"model.layers.0.self_attn.q_proj.weight", 1, 0x3B8D8E1C},
        {"model.layers.0.self_attn.o_proj.weight", 100, 0x3B104D30},
        {"model.layers.1.mlp.gate.weight", 7, 0xBB2B8B6B},
        {"model.layers.1.mlp.experts.gate_up_proj", 13823, 0xBBAB4739},
        {"model.layers.1.mlp.experts.down_proj", 6911, 0xBC09FB5B},
        {"lm_head.weight", 1000, 0x3A77285B},
        {"model.layers.1.input_layernorm.weight", 23, 0x3F800000},
    };
    ModelCase m = model_case(NULL, MODEL_LINE "relu");
    model_draw(&m, m.params, 1234);
    for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
        uint32_t bits;
        memcpy(&bits, model_at(&m, golden[i].name) + golden[i].element, sizeof(bits));
        if (!CHECK(bits == golden[i].bits)) {
            printf("    %s %lld: %08X\n", golden[i].name, (long long)golden[i].element, bits);
        }
    }
    model_case_free(&m);
}

static void test_model(void) {
    test_model_table();
    test_model_pointers();
    test_model_init();
    test_model_init_distinct();
    test_model_init_golden();
}

#endif
