/*
The tensors of the model: one table. Allocation, initialisation, checkpoints, the optimizer, the gradient
norm, the tests and the parameter count all walk it; model_tensors() below is the only place that lists them.

A flat buffer of num_params floats holds them in the table's order; parameters, gradients and AdamW's two
moments are four such buffers, and Weights are pointers into one of them. q, k and v rows are consecutive (one
matmul computes all three), and so are gate and up.

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
*/
#ifndef MODEL_H
#define MODEL_H

#include "llmc/config.h"
#include "llmc/rng.h"

typedef struct {
    char name[80];
    int ndim;
    int64_t shape[3];
    int64_t offset;  // first element in the flat buffer
    int64_t size;    // elements
    float deviation; // of the initial normal; 0: all ones
    int decay;       // does weight decay apply?
} Tensor;

typedef struct {
    float *attn_norm; // [d]
    float *qkv;       // [(H + 2 KV) hd, d]
    float *o;         // [d, d]
    float *ffn_norm;  // [d]
    float *router;    // [E_tot, d], NULL without a learned router
    float *gate_up;   // [E_tot, 2F, d]
    float *down;      // [E_tot, d, F]
} LayerWeights;

typedef struct {
    float *embed;         // [V, d]
    LayerWeights *layers; // [L]
    float *norm;          // [d]
    float *head;          // [V, d]
} Weights;

typedef struct {
    Tensor *tensors;
    int count;
    int64_t num_params;
} TensorTable;

// the parameters, and what training keeps for each of them: flat buffers [num_params], the last three NULL
// without training. On a GPU the buffers are in device memory
typedef struct {
    TensorTable table;
    Weights weights, grads; // into values, and into grad
    float *values, *grad, *exp_avg, *exp_avg_sq;
} Params;

// a walk over the tensors: fills the table, and points Weights into `base`
typedef struct {
    TensorTable *table;
    float *base;
    int layer;
} TensorWalk;

static inline float *place_tensor(TensorWalk *walk, const char *name, float deviation, int64_t rows,
                                  int64_t columns, int64_t depth) {
    TensorTable *table = walk->table;
    Tensor *tensor = &table->tensors[table->count++];
    char suffix[80];
    check_format(suffix, sizeof(suffix), "%s", name);
    if (walk->layer >= 0) {
        check_format(tensor->name, sizeof(tensor->name), "model.layers.%d.%s", walk->layer, suffix);
    } else {
        check_format(tensor->name, sizeof(tensor->name), "%s", suffix);
    }
    tensor->shape[0] = rows;
    tensor->shape[1] = columns;
    tensor->shape[2] = depth;
    tensor->ndim = depth > 0 ? 3 : columns > 0 ? 2 : 1;
    tensor->size = rows * (columns > 0 ? columns : 1) * (depth > 0 ? depth : 1);
    tensor->offset = table->num_params;
    tensor->deviation = deviation;
    tensor->decay = tensor->ndim >= 2;
    table->num_params += tensor->size;
    return walk->base != NULL ? walk->base + tensor->offset : NULL;
}

static inline void place_layer(TensorWalk *walk, LayerWeights *w, const Config *c) {
    int64_t d = c->hidden, F = c->ffn, hd = c->head_size, E = c->router.experts;
    float std = 0.01f;
    float residual_std =
        (float)(0.01 / sqrt(2.0 * c->layers)); // what adds to the residual stream starts smaller
    w->attn_norm = place_tensor(walk, "input_layernorm.weight", 0.0f, d, 0, 0);
    w->qkv = place_tensor(walk, "self_attn.q_proj.weight", std, c->heads * hd, d, 0);
    place_tensor(walk, "self_attn.k_proj.weight", std, c->kv_heads * hd, d, 0);
    place_tensor(walk, "self_attn.v_proj.weight", std, c->kv_heads * hd, d, 0);
    w->o = place_tensor(walk, "self_attn.o_proj.weight", residual_std, d, d, 0);
    w->ffn_norm = place_tensor(walk, "post_attention_layernorm.weight", 0.0f, d, 0, 0);
    w->router = NULL;
    if (!router_has_experts(c->router.method)) {
        w->gate_up = place_tensor(walk, "mlp.gate_proj.weight", std, F, d, 0);
        place_tensor(walk, "mlp.up_proj.weight", std, F, d, 0);
        w->down = place_tensor(walk, "mlp.down_proj.weight", residual_std, d, F, 0);
        return;
    }
    if (router_has_weights(c->router.method)) {
        w->router = place_tensor(walk, "mlp.gate.weight", std, E, d, 0);
    }
    w->gate_up = place_tensor(walk, "mlp.experts.gate_up_proj", std, E, 2 * F, d);
    w->down = place_tensor(walk, "mlp.experts.down_proj", residual_std, E, d, F);
}

// the list itself: fills `table`; with a base, `weights` point into it
static inline void model_tensors(TensorTable *table, Weights *weights, const Config *c, float *base) {
    enum { MOST_IN_A_LAYER = 9, OUTSIDE_LAYERS = 3 };
    TensorWalk walk = {table, base, -1};
    if (table->tensors == NULL) {
        table->tensors = NEW(Tensor, c->layers * MOST_IN_A_LAYER + OUTSIDE_LAYERS);
    }
    if (weights->layers == NULL) {
        weights->layers = NEW(LayerWeights, c->layers);
    }
    table->count = 0;
    table->num_params = 0;
    weights->embed = place_tensor(&walk, "model.embed_tokens.weight", 0.01f, c->vocab_size, c->hidden, 0);
    for (walk.layer = 0; walk.layer < c->layers; walk.layer++) {
        place_layer(&walk, &weights->layers[walk.layer], c);
    }
    walk.layer = -1;
    weights->norm = place_tensor(&walk, "model.norm.weight", 0.0f, c->hidden, 0, 0);
    weights->head = place_tensor(&walk, "lm_head.weight", 0.01f, c->vocab_size, c->hidden, 0);
}

// the host's part: the lists
static inline void params_free(Params *params) {
    free(params->table.tensors);
    free(params->weights.layers);
    free(params->grads.layers);
}

// params [num_params]: drawn from (seed, tensor, element) alone, the same bits everywhere
static inline void model_init(float *params, const TensorTable *table, uint64_t seed) {
    for (int i = 0; i < table->count; i++) {
        const Tensor *tensor = &table->tensors[i];
        float *x = params + tensor->offset;
        if (tensor->deviation > 0.0f) {
            rng_fill_normal(x, tensor->size, tensor->deviation, seed, (uint64_t)i);
            continue;
        }
        for (int64_t j = 0; j < tensor->size; j++) {
            x[j] = 1.0f;
        }
    }
}

#endif
