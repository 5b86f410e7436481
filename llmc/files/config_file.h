/*
config.json, with Hugging Face's keys: one table of them, which config_write and config_read both walk.

A dense model's file is a Llama's, which transformers reads too; we read Llamas' files besides our own. What
a model has that this trainer does not compute is refused by its key, never silently computed wrong. Keys that
mean nothing here are skipped.

The ids of the tokens that begin and end a text are written always, as null where no tokenizer is known: a
Llama without them is taken to have 1 and 2, and transformers then stops generating at an ordinary token.

A new key is a row of config_keys. Its column `models` has a bit per router: only configurations of these
routers hold the key, and only they are asked for it.

Errors: exit 1 with the file's name, the key, what was expected and the remedy.
*/
#ifndef CONFIG_FILE_H
#define CONFIG_FILE_H

#include "llmc/config.h"
#include "llmc/files/keys.h"

#define EVERY KEY_EVERY_MODEL
#define DENSE (1u << ROUTER_DENSE)
#define ROUTED (~DENSE)
#define MIXER (1u << ROUTER_SPARSEMIXER)
#define LORY (1u << ROUTER_LORY)
static_assert(ROUTER_COUNT <= 8 * sizeof(unsigned), "a bit per router");

#define FIELD(kind, models, name, field, least, most, absent)                                                \
    KEY_ROW(Config, kind, models, name, field, least, most, absent, 15)
#define TEXT(kind, models, name, text) KEY_TEXT_ROW(kind, models, name, text)

// in the order of the file
static inline const Key *config_keys(int *count) {
    // clang-format off
    static const Key keys[] = {
        // kind         models  key                        field, or text       least  most     if absent
        TEXT(NOTE,      DENSE,  "architectures",           "[\"LlamaForCausalLM\"]"),
        TEXT(NOTE,      ROUTED, "architectures",           "[\"RemoeForCausalLM\"]"),
        TEXT(NOTE,      DENSE,  "model_type",              "\"llama\""),
        TEXT(NOTE,      ROUTED, "model_type",              "\"remoe\""),
        FIELD(INTEGER,  EVERY,  "hidden_size",             hidden,              1,     65536,   KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "num_hidden_layers",       layers,              1,     1024,    KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "num_attention_heads",     heads,               1,     65536,   KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "num_key_value_heads",     kv_heads,            1,     65536,   KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "intermediate_size",       ffn,                 1,     1 << 24, KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "vocab_size",              vocab_size,          1,     1 << 24, KEY_REQUIRED),
        FIELD(INTEGER,  EVERY,  "max_position_embeddings", max_seq_len,         1,     1 << 24, 1024),
        FIELD(REAL,     EVERY,  "rms_norm_eps",            norm_eps,            1e-30, 1e30,    KEY_REQUIRED),
        FIELD(REAL,     EVERY,  "rope_theta",              rope_theta,          1e-30, 1e30,    KEY_REQUIRED),
        TEXT(CONSTANT,  EVERY,  "hidden_act",              "\"silu\""),
        FIELD(INTEGER,  ROUTED, "num_experts",             router.experts,      1,     65536,   KEY_REQUIRED),
        FIELD(INTEGER,  ROUTED, "num_experts_per_tok",     router.active,       1,     65536,   KEY_REQUIRED),
        FIELD(INTEGER,  ROUTED, "granularity",             granularity,         1,     65536,   1),
        TEXT(NAME,      ROUTED, "router",                  NULL),
        FIELD(FLAG,     ROUTED, "load_balance",            router.load_balance, 0,     1,       1),
        FIELD(REAL,     MIXER,  "router_jitter",           router.jitter,       0,     1e3,     0.1),
        FIELD(INTEGER,  LORY,   "segment_length",          router.segment,      1,     1 << 20, 256),
        TEXT(CONSTANT,  EVERY,  "attention_bias",          "false"),
        TEXT(CONSTANT,  EVERY,  "mlp_bias",                "false"),
        TEXT(CONSTANT,  EVERY,  "tie_word_embeddings",     "false"),
        FIELD(TOKEN,    EVERY,  "bos_token_id",            bos,                 0,     1 << 24, -1),
        FIELD(TOKEN,    EVERY,  "eos_token_id",            eos,                 0,     1 << 24, -1),
    };
    // clang-format on
    *count = (int)(sizeof(keys) / sizeof(keys[0]));
    return keys;
}

#undef EVERY
#undef DENSE
#undef ROUTED
#undef MIXER
#undef LORY
#undef FIELD
#undef TEXT

// the object without its end: more keys may follow
static inline void config_write_keys(const Config *c, FILE *file) {
    int count;
    const Key *keys = config_keys(&count);
    const char *before = "{\n";
    for (int i = 0; i < count; i++) {
        if (!key_is_of(&keys[i], c->router.method)) {
            continue;
        }
        fprintf(file, "%s  \"%s\": ", before, keys[i].name);
        if (keys[i].kind == KEY_NAME) {
            fprintf(file, "\"%s\"", router_name(c->router.method));
        } else {
            key_write(file, &keys[i], c);
        }
        before = ",\n";
    }
}

static inline void config_write(const Config *c, FILE *file) {
    config_write_keys(c, file);
    fputs("\n}\n", file);
}

// ----------------------------------------------------------------------------
// reading

__attribute__((noreturn)) static inline void config_refuse(const char *path, const char *key,
                                                           const char *expected) {
    die("%s: \"%s\" asks for what this trainer does not compute; expected %s\n  ---> use a checkpoint of a "
        "model without it",
        path, key, expected);
}

// what others may ask for beside the table's constants
static inline void config_refuse_foreign(const Json *json, const Config *c, const char *path) {
    const Json *scaling = json_get(json, "rope_scaling");
    const Json *parameters = json_get(json, "rope_parameters");
    const Json *rope_type = json_get(parameters, json_get(parameters, "type") != NULL ? "type" : "rope_type");
    const Json *head_dim = json_get(json, "head_dim");
    const Json *type = json_get(json, "model_type");
    int64_t head_size = 0;
    if (type != NULL && !json_is_text(type, "remoe") && !json_is_text(type, "llama")) {
        config_refuse(path, "model_type", "\"remoe\" or \"llama\"");
    }
    if (scaling != NULL && scaling->type != JSON_NULL) {
        config_refuse(path, "rope_scaling", "null");
    }
    if (rope_type != NULL && !json_is_text(rope_type, "default")) {
        config_refuse(path, "rope_parameters", "\"rope_type\": \"default\"");
    }
    if (head_dim != NULL && head_dim->type != JSON_NULL &&
        (!json_int64(head_dim, &head_size) || head_size != c->head_size)) {
        config_refuse(path, "head_dim", "hidden_size / num_attention_heads");
    }
}

// no num_experts means dense
static inline RouterMethod config_read_method(const Json *json, const char *path) {
    const Json *name = json_get(json, "router");
    if (json_get(json, "num_experts") == NULL) {
        if ((name != NULL && !json_is_text(name, "dense")) || json_get(json, "num_experts_per_tok") != NULL) {
            die("%s: \"router\" or \"num_experts_per_tok\" without \"num_experts\"\n"
                "  ---> write all of them, or none for a dense model",
                path);
        }
        return ROUTER_DENSE;
    }
    int method = name != NULL && name->type == JSON_STRING ? router_from_name(name->text) : -1;
    if (method < 0 || !router_has_experts((RouterMethod)method) ||
        !json_is_text(name, router_name((RouterMethod)method)) ||
        json_is_text(json_get(json, "model_type"), "llama")) {
        die("%s: \"num_experts\" needs \"router\", one of:" ROUTER_NAMES " (not dense), and \"model_type\": "
            "\"remoe\"\n"
            "  ---> write them, or drop the experts' keys of a dense model",
            path);
    }
    return (RouterMethod)method;
}

// the value of a key, or NULL. Newer configurations keep rope_theta in rope_parameters
static inline const Json *config_value(const Json *json, const char *name, const char *path) {
    const Json *value = json_get(json, name);
    if (strcmp(name, "rope_theta") != 0 || json_get(json_get(json, "rope_parameters"), name) == NULL) {
        return value;
    }
    const Json *newer = json_get(json_get(json, "rope_parameters"), name);
    double a = 0.0, b = 0.0;
    if (value != NULL && json_double(value, &a) && json_double(newer, &b) && a != b) {
        die("%s: \"rope_theta\" differs from the one in \"rope_parameters\"\n  ---> drop one of them", path);
    }
    return newer;
}

static inline void config_read_key(Config *c, const Key *key, const Json *json, const char *path) {
    const Json *value = config_value(json, key->name, path);
    const char *problem = value == NULL ? "missing" : "unusable";
    if (key_read(value, key, c) == KEY_IS_GOOD) {
        return;
    }
    if (key->kind == KEY_CONSTANT) {
        config_refuse(path, key->name, key->text);
    }
    if (key->kind == KEY_FLAG) {
        die("%s: \"%s\" is %s; expected true or false\n  ---> write one of them", path, key->name, problem);
    }
    if (key->kind == KEY_REAL) {
        die("%s: \"%s\" is %s; expected a positive number, %g to %g\n  ---> write the model's value there",
            path, key->name, problem, key->least, key->most);
    }
    die("%s: \"%s\" is %s; expected an integer from %.0f to %.0f\n  ---> write the model's value there", path,
        key->name, problem, key->least, key->most);
}

static inline Config config_read(const char *path) {
    JsonArena arena;
    Config c;
    int count;
    const Key *keys = config_keys(&count);
    memset(&c, 0, sizeof(c));
    json_arena_init(&arena);
    const Json *json = json_parse_file(path, &arena, "name a checkpoint folder with --load");
    if (json->type != JSON_OBJECT || json_duplicate_key(json) != NULL) {
        die("%s: expected one JSON object without repeated keys\n  ---> name another checkpoint folder",
            path);
    }
    c.router.method = config_read_method(json, path);
    c.router.experts = c.router.active = c.granularity = 1; // dense: it has no keys for them
    for (int i = 0; i < count; i++) {
        if (key_is_of(&keys[i], c.router.method)) {
            config_read_key(&c, &keys[i], json, path);
        }
    }
    c.head_size = c.hidden / c.heads;
    config_refuse_foreign(json, &c, path);
    config_check(&c, path, die);
    json_arena_free(&arena);
    return c;
}

#endif
