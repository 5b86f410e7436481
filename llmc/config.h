/*
The shape of a model: from the options, from and to config.json (Hugging Face's keys), its parameters and
FLOPs.

    E_tot = E G experts of width F = ffn_mult d / G, k_tot = k G of them active          (Eq. 12, 13)
    FLOPs a sequence, forward and backward, no causal halving (Narayanan et al., 2021; the paper's Table 1):
        12 T L d^2 [(1 + KV/H + T/d) + 1.5 (F/d) k_tot + V / (2 L d)]

Errors: an impossible or unsupported shape is refused by the name of its key or flag.
*/
#ifndef CONFIG_H
#define CONFIG_H

#include "llmc/files/json.h"
#include "llmc/run/options.h"
#include "llmc/router.h"

typedef struct {
    int vocab_size; // V
    int hidden;     // d
    int layers;     // L
    int heads;      // H
    int kv_heads;   // KV
    int head_size;  // hd = d / H
    int ffn;        // F, width of one expert
    Router router;  // method, E_tot, k_tot, load balance
    int granularity;
    int max_seq_len;
    double norm_eps;
    double rope_theta;
} Config;

// stops with `where` (the file, or "options") and the name that is wrong; fail: die or die_usage
static inline void config_check(const Config *c, const char *where, void (*fail)(const char *, ...)) {
    const Router *r = &c->router;
    if (c->hidden % c->heads != 0 || c->head_size % 2 != 0) {
        fail("%s: hidden size %d over %d heads must give an even head size\n  ---> change one of the two",
             where, c->hidden, c->heads);
    }
    if (c->heads % c->kv_heads != 0) {
        fail("%s: %d query heads are not a multiple of %d key/value heads\n  ---> change one of the two",
             where, c->heads, c->kv_heads);
    }
    if (r->active > r->experts) {
        fail("%s: %d active experts of only %d\n  ---> use fewer active experts, or more experts", where,
             r->active, r->experts);
    }
    if (r->experts % c->granularity != 0 || r->active % c->granularity != 0) {
        fail("%s: %d experts and %d active ones are not multiples of the granularity %d\n"
             "  ---> change one of them",
             where, r->experts, r->active, c->granularity);
    }
    double weights = 3.0 * c->layers * r->experts * c->hidden * c->ffn;
    if (weights > 1e15) { // sizes far below INT64_MAX from here on
        fail("%s: experts of %g weights in all\n  ---> use fewer layers or experts, or smaller ones", where,
             weights);
    }
}

static inline Config config_from_options(const Options *o) {
    Config c;
    memset(&c, 0, sizeof(c));
    int method = router_from_name(o->router);
    if (method < 0) {
        die_usage("--router %s: unknown\n  ---> one of: relu, topk, ec, hash, dense", o->router);
    }
    int dense = method == ROUTER_DENSE;
    c.vocab_size = (int)o->vocab_size;
    c.hidden = (int)o->hidden;
    c.layers = (int)o->layers;
    c.heads = (int)o->heads;
    c.kv_heads = (int)o->kv_heads;
    c.head_size = c.hidden / c.heads;
    c.granularity = dense ? 1 : (int)o->granularity;
    c.router.method = (RouterMethod)method;
    c.router.load_balance = (int)o->load_balance;
    c.max_seq_len = (int)o->seq_len;
    c.norm_eps = 1e-5;
    c.rope_theta = 1e6;
    int64_t experts = dense ? 1 : o->experts * o->granularity;
    int64_t active = dense ? 1 : o->active * o->granularity;
    int64_t width = o->ffn_mult * o->hidden;
    if (experts > 65536 || active > experts) {
        die_usage("--active %lld of --experts %lld, at --granularity %lld: expected no more active ones than "
                  "experts, and at most 65536 experts",
                  (long long)o->active, (long long)o->experts, (long long)o->granularity);
    }
    if (width % c.granularity != 0) {
        die_usage("--granularity %d does not divide the width %lld of a dense feed-forward layer",
                  c.granularity, (long long)width);
    }
    c.router.experts = (int)experts; // E G experts, k G of them active, F / G wide each (Eq. 12, 13)
    c.router.active = (int)active;
    c.ffn = (int)(width / c.granularity);
    config_check(&c, "options", die_usage);
    return c;
}

// ----------------------------------------------------------------------------
// counts

static inline int64_t config_qkv_width(const Config *c) {
    return (int64_t)(c->heads + 2 * c->kv_heads) * c->head_size;
}

// parameters of a model in which each token uses `experts` experts (E_tot: all; k_tot: the active ones)
static inline int64_t config_params(const Config *c, int experts) {
    int64_t d = c->hidden;
    int64_t router = router_has_weights(c->router.method) ? d * c->router.experts : 0;
    int64_t layer = 2 * d + config_qkv_width(c) * d + d * d + (int64_t)experts * 3 * d * c->ffn + router;
    return 2 * (int64_t)c->vocab_size * d + d + c->layers * layer;
}

// forward and backward of one sequence of T tokens, each using `active` experts
static inline double config_flops(const Config *c, int64_t T, double active) {
    double d = c->hidden;
    double attention = 1.0 + (double)c->kv_heads / c->heads + (double)T / d;
    double experts = 1.5 * (c->ffn / d) * active;
    double head = c->vocab_size / (2.0 * c->layers * d);
    return 12.0 * (double)T * c->layers * d * d * (attention + experts + head);
}

// ----------------------------------------------------------------------------
// config.json

static inline void config_write(const Config *c, FILE *file) {
    int dense = c->router.method == ROUTER_DENSE;
    fprintf(file, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n",
            dense ? "LlamaForCausalLM" : "RemoeForCausalLM", dense ? "llama" : "remoe");
    fprintf(file, "  \"hidden_size\": %d,\n  \"num_hidden_layers\": %d,\n", c->hidden, c->layers);
    fprintf(file, "  \"num_attention_heads\": %d,\n  \"num_key_value_heads\": %d,\n", c->heads, c->kv_heads);
    fprintf(file, "  \"intermediate_size\": %d,\n  \"vocab_size\": %d,\n", c->ffn, c->vocab_size);
    fprintf(file, "  \"max_position_embeddings\": %d,\n  \"rms_norm_eps\": %.15g,\n", c->max_seq_len,
            c->norm_eps);
    fprintf(file, "  \"rope_theta\": %.15g,\n  \"hidden_act\": \"silu\",\n", c->rope_theta);
    if (!dense) {
        fprintf(file, "  \"num_experts\": %d,\n  \"num_experts_per_tok\": %d,\n", c->router.experts,
                c->router.active);
        fprintf(file, "  \"granularity\": %d,\n  \"router\": \"%s\",\n", c->granularity,
                router_name(c->router.method));
        fprintf(file, "  \"load_balance\": %s,\n", c->router.load_balance ? "true" : "false");
    }
    fprintf(file,
            "  \"attention_bias\": false,\n  \"mlp_bias\": false,\n  \"tie_word_embeddings\": false\n}\n");
}

// an integer key from 1 to `most`; fallback < 0: the key is required
static inline int config_int(const Json *json, const char *path, const char *key, int64_t most,
                             int fallback) {
    const Json *value = json_get(json, key);
    int64_t integer = 0;
    if (value == NULL && fallback >= 0) {
        return fallback;
    }
    if (value == NULL || !json_int64(value, &integer) || integer < 1 || integer > most) {
        die("%s: \"%s\" is %s; expected an integer from 1 to %lld\n  ---> write the model's value there",
            path, key, value == NULL ? "missing" : "unusable", (long long)most);
    }
    return (int)integer;
}

static inline double config_real(const Json *json, const char *path, const char *key) {
    double real = 0.0;
    const Json *value = json_get(json, key);
    if (value == NULL || !json_double(value, &real) || real < 1e-30 || real > 1e30) {
        die("%s: \"%s\" is %s; expected a positive number, 1e-30 to 1e30\n  ---> write the model's value "
            "there",
            path, key, value == NULL ? "missing" : "unusable");
    }
    return real;
}

// absent, null or false; anything else means yes, in one language or another
static inline int config_is_off(const Json *value) {
    return value == NULL || value->type == JSON_NULL || (value->type == JSON_BOOL && !value->boolean);
}

static inline int config_is_text(const Json *value, const char *text) {
    return value != NULL && value->type == JSON_STRING && value->text_size == strlen(text) &&
           memcmp(value->text, text, value->text_size) == 0; // it may hold a zero byte
}

__attribute__((noreturn)) static inline void config_refuse(const char *path, const char *key,
                                                           const char *expected) {
    die("%s: \"%s\" asks for what this trainer does not compute; expected %s\n  ---> use a checkpoint of a "
        "model without it",
        path, key, expected);
}

// what the model lacks is refused by name, never silently computed wrong
static inline void config_refuse_foreign(const Json *json, const Config *c, const char *path) {
    const Json *act = json_get(json, "hidden_act");
    const Json *scaling = json_get(json, "rope_scaling");
    const Json *parameters = json_get(json, "rope_parameters");
    const Json *rope_type = json_get(parameters, json_get(parameters, "type") != NULL ? "type" : "rope_type");
    const Json *head_dim = json_get(json, "head_dim");
    const Json *type = json_get(json, "model_type");
    int64_t head_size = 0;
    if (type != NULL && !config_is_text(type, "remoe") && !config_is_text(type, "llama")) {
        config_refuse(path, "model_type", "\"remoe\" or \"llama\"");
    }
    if (!config_is_off(json_get(json, "tie_word_embeddings"))) {
        config_refuse(path, "tie_word_embeddings", "false");
    }
    if (!config_is_off(json_get(json, "attention_bias"))) {
        config_refuse(path, "attention_bias", "false");
    }
    if (!config_is_off(json_get(json, "mlp_bias"))) {
        config_refuse(path, "mlp_bias", "false");
    }
    if (scaling != NULL && scaling->type != JSON_NULL) {
        config_refuse(path, "rope_scaling", "null");
    }
    if (rope_type != NULL && !config_is_text(rope_type, "default")) {
        config_refuse(path, "rope_parameters", "\"rope_type\": \"default\"");
    }
    if (act != NULL && !config_is_text(act, "silu")) {
        config_refuse(path, "hidden_act", "\"silu\"");
    }
    if (head_dim != NULL && head_dim->type != JSON_NULL &&
        (!json_int64(head_dim, &head_size) || head_size != c->head_size)) {
        config_refuse(path, "head_dim", "hidden_size / num_attention_heads");
    }
}

// the routing keys; no num_experts means dense
static inline void config_read_router(Config *c, const Json *json, const char *path) {
    const Json *name = json_get(json, "router");
    const Json *balance = json_get(json, "load_balance");
    int64_t flag = 1;
    if (json_get(json, "num_experts") == NULL) {
        if ((name != NULL && !config_is_text(name, "dense")) ||
            json_get(json, "num_experts_per_tok") != NULL) {
            die("%s: \"router\" or \"num_experts_per_tok\" without \"num_experts\"\n"
                "  ---> write all of them, or none for a dense model",
                path);
        }
        c->router.method = ROUTER_DENSE;
        c->router.experts = c->router.active = c->granularity = 1;
        return;
    }
    int method = name != NULL && name->type == JSON_STRING ? router_from_name(name->text) : -1;
    if (method < 0 || method == ROUTER_DENSE || !config_is_text(name, router_name((RouterMethod)method)) ||
        config_is_text(json_get(json, "model_type"), "llama")) {
        die("%s: \"num_experts\" needs \"router\": \"relu\", \"topk\", \"ec\" or \"hash\", and "
            "\"model_type\": \"remoe\"\n"
            "  ---> write them, or drop the experts' keys of a dense model",
            path);
    }
    c->router.method = (RouterMethod)method;
    c->router.experts = config_int(json, path, "num_experts", 65536, -1);
    c->router.active = config_int(json, path, "num_experts_per_tok", 65536, -1);
    c->granularity = config_int(json, path, "granularity", 65536, 1);
    c->router.load_balance = 1;
    if (balance != NULL && balance->type == JSON_BOOL) {
        c->router.load_balance = balance->boolean;
    } else if (balance != NULL && json_int64(balance, &flag) && (flag == 0 || flag == 1)) {
        c->router.load_balance = (int)flag;
    } else if (balance != NULL) {
        die("%s: \"load_balance\" is unusable; expected true or false\n  ---> write one of them", path);
    }
}

// newer configurations keep it in rope_parameters
static inline double config_rope_theta(const Json *json, const char *path) {
    const Json *parameters = json_get(json, "rope_parameters");
    if (json_get(parameters, "rope_theta") == NULL) {
        return config_real(json, path, "rope_theta");
    }
    double theta = config_real(parameters, path, "rope_theta");
    if (json_get(json, "rope_theta") != NULL && config_real(json, path, "rope_theta") != theta) {
        die("%s: \"rope_theta\" differs from the one in \"rope_parameters\"\n  ---> drop one of them", path);
    }
    return theta;
}

static inline Config config_read(const char *path) {
    JsonArena arena;
    Config c;
    memset(&c, 0, sizeof(c));
    json_arena_init(&arena);
    const Json *json = json_parse_file(path, &arena, "name a checkpoint folder with --load");
    if (json->type != JSON_OBJECT || json_duplicate_key(json) != NULL) {
        die("%s: expected one JSON object without repeated keys\n  ---> name another checkpoint folder",
            path);
    }
    c.vocab_size = config_int(json, path, "vocab_size", 1 << 24, -1);
    c.hidden = config_int(json, path, "hidden_size", 65536, -1);
    c.layers = config_int(json, path, "num_hidden_layers", 1024, -1);
    c.heads = config_int(json, path, "num_attention_heads", 65536, -1);
    c.kv_heads = config_int(json, path, "num_key_value_heads", 65536, -1);
    c.ffn = config_int(json, path, "intermediate_size", 1 << 24, -1);
    c.max_seq_len = config_int(json, path, "max_position_embeddings", 1 << 24, 1024);
    c.norm_eps = config_real(json, path, "rms_norm_eps");
    c.rope_theta = config_rope_theta(json, path);
    c.head_size = c.hidden / c.heads;
    config_read_router(&c, json, path);
    config_refuse_foreign(json, &c, path);
    config_check(&c, path, die);
    json_arena_free(&arena);
    return c;
}

#endif
