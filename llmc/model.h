/*
The tensors of the model: one table. Allocation, initialisation, checkpoints, the optimizer, the gradient
norm, the tests and the parameter count all walk it; model_tensors() below is the only place that lists them.

Parameters, gradients and AdamW's two moments are flat buffers of one layout, and Weights are pointers into
one of them. Files have the tensors in the table's order. A flat buffer has them in buckets (buckets.h), since
several GPUs exchange and update a bucket at once, each padded with zeros to whole blocks:

    norms | routers | embed | layer 0: q k v o gate_up down | layer 1 | .. | layer L - 1 | head

q, k and v rows are consecutive (one matmul computes all three), and so are gate and up.

    name                                             shape               init deviation         weight decay
    model.embed_tokens.weight                        [V, d]              0.01                   yes
    model.layers.N.input_layernorm.weight            [d]                 1 (constant)           no
    model.layers.N.self_attn.{q,k,v}_proj.weight     [H hd | KV hd, d]   0.01                   yes
    model.layers.N.self_attn.o_proj.weight           [d, d]              0.01 / sqrt(2 L)       yes
    model.layers.N.post_attention_layernorm.weight   [d]                 1 (constant)           no
    model.layers.N.mlp.gate.weight (learned router)  [E_tot, d]          0.01                   yes
    model.layers.N.mlp.experts.gate_up_proj          [E_tot, 2F, d]      0.01                   yes
    model.layers.N.mlp.experts.down_proj             [E_tot, d, F]       0.01 / sqrt(2 L)       yes
    (dense: mlp.{gate,up}_proj.weight [F, d], mlp.down_proj.weight [d, F])
    model.norm.weight                                [d]                 1 (constant)           no
    lm_head.weight                                   [V, d]              0.01                   yes

State that a run changes by another rule than AdamW's comes last in the table, zeros at first:

    model.layers.N.mlp.gate.e_score_correction_bias  [E_tot]   router_auxfree.h's

It lies among the norms, which every rank has in fp32 and which do not decay. Its gradient and moments are
always 0, so AdamW leaves its bits alone, and they are in no file (the price: 12 bytes for each of L E_tot
numbers).
*/
#ifndef MODEL_H
#define MODEL_H

#include "llmc/config.h"
#include "llmc/rng.h"
#include "llmc/buckets.h"
// defines: Config; rng_fill_normal; Bucket, bucket_round_up

typedef struct {
    char name[80];
    int ndim;
    int64_t shape[3];
    int64_t offset;  // first element in the flat buffer
    int64_t size;    // elements
    float deviation; // of the initial normal; 0: a constant
    int decay;       // does weight decay apply?
} Tensor;

// where the tensors begin in a flat buffer
typedef struct {
    int64_t attn_norm; // [d]
    int64_t qkv;       // [(H + 2 KV) hd, d]
    int64_t o;         // [d, d]
    int64_t ffn_norm;  // [d]
    int64_t router;    // [E_tot, d], -1 without a learned router
    int64_t bias;      // [E_tot], -1 without one
    int64_t gate_up;   // [E_tot, 2F, d]
    int64_t down;      // [E_tot, d, F]
} LayerPlaces;

typedef struct {
    int64_t embed;       // [V, d]
    LayerPlaces *layers; // [L]
    int64_t norm;        // [d]
    int64_t head;        // [V, d]
} Places;

// the same as pointers; router, bias NULL without one
typedef struct {
    float *attn_norm, *qkv, *o, *ffn_norm, *router, *bias, *gate_up, *down;
} LayerWeights;

typedef struct {
    float *embed;
    LayerWeights *layers; // [L]
    float *norm, *head;
} Weights;

// the buckets around those of the layers
enum { BUCKET_NORMS, BUCKET_ROUTERS, BUCKET_EMBED, BUCKET_LAYERS };

static inline int bucket_of_layer(int layer) {
    return BUCKET_LAYERS + layer;
}

static inline int bucket_of_head(int layers) {
    return BUCKET_LAYERS + layers;
}

typedef struct {
    Tensor *tensors;
    int count, trained_count; // of all; of the parameters, which come first: the others are state
    Places places;
    Bucket *buckets;
    int bucket_count;
    int64_t num_params; // elements of the parameters
    int64_t flat_size;  // elements of a flat buffer: the same, and padding
} TensorTable;

// the parameters, and what training keeps for each of them: flat buffers [flat_size], the last three NULL
// without training
typedef struct {
    TensorTable table;
    Weights weights, grads; // into values, and into grad
    float *values, *grad, *exp_avg, *exp_avg_sq;
} Params;

// a walk over the tensors; layer -1: outside of the layers
typedef struct {
    TensorTable *table;
    int layer;
} TensorWalk;

#define BIAS_NAME "mlp.gate.e_score_correction_bias"

// Adds a tensor at the end of a bucket; returns where it begins
static inline int64_t place_tensor(TensorWalk *walk, int bucket_index, const char *name, float deviation,
                                   int64_t rows, int64_t columns, int64_t depth) {
    TensorTable *table = walk->table;
    Tensor *tensor = &table->tensors[table->count++];
    Bucket *bucket = &table->buckets[bucket_index];
    if (walk->layer >= 0) {
        check_format(tensor->name, sizeof(tensor->name), "model.layers.%d.%s", walk->layer, name);
    } else {
        check_format(tensor->name, sizeof(tensor->name), "%s", name);
    }
    tensor->shape[0] = rows;
    tensor->shape[1] = columns;
    tensor->shape[2] = depth;
    tensor->ndim = depth > 0 ? 3 : columns > 0 ? 2 : 1;
    tensor->size = rows * (columns > 0 ? columns : 1) * (depth > 0 ? depth : 1);
    tensor->offset = bucket->first + bucket->size;
    tensor->deviation = deviation;
    tensor->decay = bucket->decay;
    bucket->size += tensor->size;
    table->num_params += tensor->size;
    return tensor->offset;
}

static inline void place_layer(TensorWalk *walk, LayerPlaces *p, const Config *c) {
    int64_t d = c->hidden, F = c->ffn, hd = c->head_size, E = c->router.experts;
    int own = bucket_of_layer(walk->layer);
    float std = 0.01f;
    float residual_std =
        (float)(0.01 / sqrt(2.0 * c->layers)); // what adds to the residual stream starts smaller
    p->attn_norm = place_tensor(walk, BUCKET_NORMS, "input_layernorm.weight", 0.0f, d, 0, 0);
    p->qkv = place_tensor(walk, own, "self_attn.q_proj.weight", std, c->heads * hd, d, 0);
    place_tensor(walk, own, "self_attn.k_proj.weight", std, c->kv_heads * hd, d, 0);
    place_tensor(walk, own, "self_attn.v_proj.weight", std, c->kv_heads * hd, d, 0);
    p->o = place_tensor(walk, own, "self_attn.o_proj.weight", residual_std, d, d, 0);
    p->ffn_norm = place_tensor(walk, BUCKET_NORMS, "post_attention_layernorm.weight", 0.0f, d, 0, 0);
    p->router = -1;
    if (!router_has_experts(c->router.method)) {
        p->gate_up = place_tensor(walk, own, "mlp.gate_proj.weight", std, F, d, 0);
        place_tensor(walk, own, "mlp.up_proj.weight", std, F, d, 0);
        p->down = place_tensor(walk, own, "mlp.down_proj.weight", residual_std, d, F, 0);
        return;
    }
    if (router_has_weights(c->router.method)) {
        p->router = place_tensor(walk, BUCKET_ROUTERS, "mlp.gate.weight", std, E, d, 0);
    }
    p->gate_up = place_tensor(walk, own, "mlp.experts.gate_up_proj", std, E, 2 * F, d);
    p->down = place_tensor(walk, own, "mlp.experts.down_proj", residual_std, E, d, F);
}

// what is no parameter, behind them
static inline void place_state(TensorWalk *walk, const Config *c) {
    TensorTable *table = walk->table;
    int64_t params = table->num_params;
    for (walk->layer = 0; walk->layer < c->layers; walk->layer++) {
        int64_t *place = &table->places.layers[walk->layer].bias;
        *place = -1;
        if (router_row(c->router.method)->has_bias) {
            *place = place_tensor(walk, BUCKET_NORMS, BIAS_NAME, 0.0f, c->router.experts, 0, 0);
        }
    }
    table->num_params = params;
}

// the list itself; where the buckets begin is taken as it stands
static inline void place_tensors(TensorTable *table, const Config *c) {
    TensorWalk walk = {table, -1};
    Places *p = &table->places;
    table->count = 0;
    table->num_params = 0;
    p->embed =
        place_tensor(&walk, BUCKET_EMBED, "model.embed_tokens.weight", 0.01f, c->vocab_size, c->hidden, 0);
    for (walk.layer = 0; walk.layer < c->layers; walk.layer++) {
        place_layer(&walk, &p->layers[walk.layer], c);
    }
    walk.layer = -1;
    p->norm = place_tensor(&walk, BUCKET_NORMS, "model.norm.weight", 0.0f, c->hidden, 0, 0);
    p->head =
        place_tensor(&walk, bucket_of_head(c->layers), "lm_head.weight", 0.01f, c->vocab_size, c->hidden, 0);
    table->trained_count = table->count;
    place_state(&walk, c);
}

// the buckets' places from their sizes, which then begin anew
static inline void place_buckets(TensorTable *table) {
    table->flat_size = 0;
    for (int b = 0; b < table->bucket_count; b++) {
        Bucket *bucket = &table->buckets[b];
        bucket->first = table->flat_size;
        bucket->decay = b != BUCKET_NORMS;
        bucket->is_fp32 = b == BUCKET_NORMS || b == BUCKET_ROUTERS;
        table->flat_size += bucket_round_up(bucket->size);
        bucket->size = 0;
    }
}

static inline void point_weights(Weights *weights, const TensorTable *table, const Config *c, float *base) {
    const Places *p = &table->places;
    weights->embed = base + p->embed;
    weights->norm = base + p->norm;
    weights->head = base + p->head;
    for (int l = 0; l < c->layers; l++) {
        const LayerPlaces *from = &p->layers[l];
        LayerWeights *w = &weights->layers[l];
        w->attn_norm = base + from->attn_norm;
        w->qkv = base + from->qkv;
        w->o = base + from->o;
        w->ffn_norm = base + from->ffn_norm;
        w->router = from->router >= 0 ? base + from->router : NULL;
        w->bias = from->bias >= 0 ? base + from->bias : NULL;
        w->gate_up = base + from->gate_up;
        w->down = base + from->down;
    }
}

// Fills `table`: a first walk finds how large the buckets are, a second one places the tensors in them. With
// a base, `weights` point into it
static inline void model_tensors(TensorTable *table, Weights *weights, const Config *c, float *base) {
    enum { MOST_IN_A_LAYER = 10, OUTSIDE_LAYERS = 3 };
    if (table->tensors == NULL) {
        table->bucket_count = bucket_of_head(c->layers) + 1;
        table->tensors = NEW(Tensor, c->layers * MOST_IN_A_LAYER + OUTSIDE_LAYERS);
        table->buckets = NEW(Bucket, table->bucket_count);
        table->places.layers = NEW(LayerPlaces, c->layers);
    }
    if (weights->layers == NULL) {
        weights->layers = NEW(LayerWeights, c->layers);
    }
    for (int walk = 0; walk < 2; walk++) {
        place_buckets(table);
        place_tensors(table, c);
    }
    for (int b = 0; b < table->bucket_count; b++) {
        table->buckets[b].size = bucket_round_up(table->buckets[b].size);
    }
    if (base != NULL) {
        point_weights(weights, table, c, base);
    }
}

static inline void table_free(TensorTable *table) {
    free(table->tensors);
    free(table->buckets);
    free(table->places.layers);
}

// the host's part: the lists
static inline void params_free(Params *params) {
    table_free(&params->table);
    free(params->weights.layers);
    free(params->grads.layers);
}

// elements [first, first + n) of tensor i, drawn from (seed, tensor, element) alone: the same bits everywhere;
// norms are ones, state is zeros
static inline void tensor_draw(float *x, const TensorTable *table, int i, int64_t first, int64_t n,
                               uint64_t seed) {
    float deviation = table->tensors[i].deviation;
    if (deviation > 0.0f) {
        rng_fill_normal(x, first, n, deviation, seed, (uint64_t)i);
        return;
    }
    for (int64_t j = 0; j < n; j++) {
        x[j] = i < table->trained_count ? 1.0f : 0.0f;
    }
}

#endif
