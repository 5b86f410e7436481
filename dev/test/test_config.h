/*
config.h and config_file.h: parameters and FLOPs of the paper's presets, options that make no model,
config.json written and read back, configurations that others write, and everything that is refused.
*/
#ifndef TEST_CONFIG_H
#define TEST_CONFIG_H

#include "llmc/files/config_file.h"
#include "harness.h"

#define CONFIG_PATH "build/test/config.json"

// a preset, or NULL for the table's defaults, and more words
static Config config_of(const char *preset, const char *line) {
    Options options;
    options_defaults(&options, preset);
    options_parse_line(&options, line);
    return config_from_options(&options);
}

// ----------------------------------------------------------------------------
// counts

static void config_check_counts(const char *preset, int64_t dense, int64_t experts, double gflops) {
    Config c = config_of(preset, "--router dense");
    CHECK(config_params(&c, 1) == dense);
    CHECK(fabs(1e-9 * config_flops(&c, 1024, 1) - gflops) < 0.05);
    c = config_of(preset, "--router relu");
    CHECK(config_params(&c, 8) == experts);
    CHECK(config_params(&c, 1) ==
          dense + (int64_t)c.layers * 8 * c.hidden); // a token's share: its router too
    CHECK(fabs(1e-9 * config_flops(&c, 1024, 1) - gflops) < 0.05);
    CHECK(config_params(&c, 8) - config_params(&c, 7) == (int64_t)c.layers * 12 * c.hidden * c.hidden);
}

static void test_config_counts(void) {
    config_check_counts("small", 182471424, 777087744, 995.4);
    config_check_counts("medium", 469812224, 2583938048, 2873.3);
    config_check_counts("large", 978396672, 5735032320, 5991.5);
    Config c =
        config_of("small", "--granularity 4 --active 2"); // granularity moves neither weights nor FLOPs
    Config plain = config_of("small", "--active 2");
    CHECK(c.router.experts == 32 && c.router.active == 8 && c.ffn == 768);
    CHECK(config_params(&c, 32) - config_params(&plain, 8) == 12 * 24 * 768); // but for the router's rows
    CHECK(config_flops(&c, 1024, 8) == config_flops(&plain, 1024, 2));
    double expert = 12.0 * 1024 * 12 * 768 * 768 * 1.5 * 4; // 3 matrices [4 d, d], 6 flops a weight and token
    CHECK(fabs(config_flops(&plain, 1024, 2.5) - config_flops(&plain, 1024, 1) - 1.5 * expert) <
          1e-6 * expert);
    c = config_of("small", "--router hash");
    CHECK(config_params(&c, 8) == 777087744 - 12 * 8 * 768); // no router
    c = config_of("small", "--router dense --ffn-mult 32");
    CHECK(c.ffn == 24576 && c.router.experts == 1 && config_params(&c, 1) == 777087744 - 12 * 8 * 768);
}

// ----------------------------------------------------------------------------
// from options

static void test_config_from_options(void) {
    Config c =
        config_of(NULL, "--hidden 96 --heads 6 --kv-heads 3 --ffn-mult 3 --granularity 4 --experts 5 "
                        "--active 2 --router topk --load-balance 0 --seq-len 77 --vocab-size 67 --layers 2");
    CHECK(c.hidden == 96 && c.heads == 6 && c.kv_heads == 3 && c.head_size == 16 && c.layers == 2);
    CHECK(c.ffn == 72 && c.granularity == 4 && c.router.experts == 20 && c.router.active == 8);
    CHECK(c.router.method == ROUTER_TOPK && c.router.load_balance == 0 && c.max_seq_len == 77);
    CHECK(c.vocab_size == 67 && c.norm_eps == 1e-5 && c.rope_theta == 1e6 && config_qkv_width(&c) == 12 * 16);
    c = config_of(NULL, "--router dense --experts 8 --active 1 --granularity 2"); // dense: one expert, whole
    CHECK(c.router.experts == 1 && c.router.active == 1 && c.granularity == 1 && c.ffn == 4 * c.hidden);
}

static void config_of_line(void *line) {
    config_of(NULL, (const char *)line);
}

static void test_config_options_refused(void) {
    static const char *const cases[][2] = {
        {"--router relus", "--router relus: unknown"},
        {"--hidden 100 --heads 3", "hidden size 100 over 3 heads must give an even head size"},
        {"--hidden 12 --heads 4", "must give an even head size"},
        {"--hidden 2 --heads 4", "must give an even head size"},
        {"--heads 4 --kv-heads 3", "4 query heads are not a multiple of 3 key/value heads"},
        {"--heads 4 --kv-heads 8", "are not a multiple"},
        {"--experts 4 --active 5", "--active 5 of --experts 4"},
        {"--experts 1 --active 65536 --granularity 65536", "--active 65536 of --experts 1"},
        {"--experts 32769 --granularity 2", "at most 65536 experts"},
        {"--hidden 128 --granularity 3", "--granularity 3 does not divide the width 512"},
        {"--experts 65536 --hidden 65536 --heads 1024 --layers 1024 --ffn-mult 1024",
         "use fewer layers or experts"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char line[128];
        check_format(line, sizeof(line), "%s", cases[i][0]);
        if (!check_dies(2, cases[i][1], config_of_line, line)) {
            printf("    %s\n", line);
        }
    }
}

// ----------------------------------------------------------------------------
// to a file and back

// the fields of all keys that the model has, bit for bit
static int config_keys_equal(const Config *a, const Config *b) {
    int count, equal = 1;
    const Key *keys = config_keys(&count);
    for (int i = 0; i < count; i++) {
        const char *x = (const char *)a + keys[i].offset, *y = (const char *)b + keys[i].offset;
        equal &= !key_is_of(&keys[i], a->router.method) || memcmp(x, y, keys[i].size) == 0;
    }
    return equal;
}

// a value of an option that is not its default
static void config_other_value(char *text, size_t capacity, const OptionRow *row) {
    long long number = strtoll(row->initial, NULL, 10);
    if (row->kind == OPTION_INT) {
        check_format(text, capacity, "%lld", number > 0 ? 2 * number : 1);
    } else if (row->kind == OPTION_FLAG) {
        check_format(text, capacity, "%d", number == 0);
    } else {
        check_format(text, capacity, "%s", strcmp(row->field, "router") == 0 ? "hash" : "1");
    }
}

// an option makes another model if and only if the table says so: what is refused beside a loaded model
static void test_config_scopes(void) {
    int count;
    const OptionRow *rows = option_rows(&count);
    for (int i = 0; i < count; i++) {
        int lory = strcmp(rows[i].field, "segment_length") == 0; // no router has all keys
        const char *line =
            lory ? "--heads 8 --router lory" : "--heads 8 --router sparsemixer"; // 8: 2 x twice the KV
        char text[OPTION_TEXT_SIZE];
        Options o;
        Config plain = config_of(NULL, line);
        options_defaults(&o, NULL);
        options_parse_line(&o, line);
        config_other_value(text, sizeof(text), &rows[i]);
        option_set(&o, &rows[i], text, "");
        Config c = config_from_options(&o);
        c.max_seq_len = plain.max_seq_len; // RoPE needs no table of positions: any model takes any length
        int decides = c.router.method != plain.router.method || !config_keys_equal(&c, &plain);
        int says = rows[i].scope == OPTION_SHAPE || rows[i].scope == OPTION_ROUTING;
        if (!CHECK(decides == says || strcmp(rows[i].field, "preset") == 0)) { // which acts by other options
            printf("    --%s\n", rows[i].field);
        }
    }
}

static void test_config_round_trip(void) {
    static const char *const lines[] = {"--router relu --granularity 2 --active 2",
                                        "--router topk --load-balance 0",
                                        "--router auxfree",
                                        "--router sparsemixer --router-jitter 0.25",
                                        "--router lory --segment-length 37",
                                        "--router ec",
                                        "--router hash",
                                        "--router dense --ffn-mult 3"};
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        Config c = config_of(NULL, lines[i]);
        c.norm_eps = 1e-6;
        c.rope_theta = 123456.75;
        c.bos = (int)i - 1; // -1, none, is written as null
        FILE *file = check_fopen(CONFIG_PATH, "wb", "");
        config_write(&c, file);
        check_fclose(file, CONFIG_PATH);
        Config back = config_read(CONFIG_PATH);
        CHECK(back.router.method == c.router.method && config_keys_equal(&back, &c));
        CHECK(back.head_size == c.head_size && back.router.experts == c.router.experts);
        CHECK(back.router.active == c.router.active && back.granularity == c.granularity);
        CHECK(back.norm_eps == 1e-6 && back.rope_theta == 123456.75 && back.hidden == c.hidden);
        CHECK(back.bos == (int)i - 1 && back.eos == -1);
    }
}

// the names that Hugging Face's readers look for
static void test_config_written(void) {
    Config c = config_of(NULL, "--router dense");
    FILE *file = check_fopen(CONFIG_PATH, "wb", "");
    config_write(&c, file);
    check_fclose(file, CONFIG_PATH);
    char *dense = check_read_file(CONFIG_PATH, NULL, "");
    CHECK(strstr(dense, "\"architectures\": [\"LlamaForCausalLM\"]") &&
          strstr(dense, "\"model_type\": \"llama\""));
    CHECK(strstr(dense, "\"rope_theta\": 1000000,") && strstr(dense, "\"rms_norm_eps\": 1e-05,"));
    CHECK(strstr(dense, "\"tie_word_embeddings\": false") && strstr(dense, "experts") == NULL);
    CHECK(strstr(dense, "\"bos_token_id\": null,") && strstr(dense, "\"eos_token_id\": null\n"));
    c = config_of(NULL, "--hidden 128 --heads 4 --granularity 2");
    file = check_fopen(CONFIG_PATH, "wb", "");
    config_write(&c, file);
    check_fclose(file, CONFIG_PATH);
    char *routed = check_read_file(CONFIG_PATH, NULL, "");
    CHECK(strstr(routed, "\"model_type\": \"remoe\"") && strstr(routed, "\"num_experts\": 16,"));
    CHECK(strstr(routed, "\"num_experts_per_tok\": 2,") && strstr(routed, "\"intermediate_size\": 256,"));
    free(dense);
    free(routed);
}

// ----------------------------------------------------------------------------
// files by others

// does the text of members, each `"key": value, `, have this key at its top?
static int config_names(const char *members, const char *key) {
    char first[80], later[80];
    check_format(first, sizeof(first), "\"%s\":", key);
    check_format(later, sizeof(later), ", \"%s\":", key);
    return strncmp(members, first, strlen(first)) == 0 || strstr(members, later) != NULL;
}

// a good configuration without the key `dropped`, and with `added` in the place of the members it names
static void config_save(const char *dropped, const char *added, int routed) {
    static const char *const members[][2] = {
        {"vocab_size", "67"},         {"hidden_size", "24"},        {"num_hidden_layers", "2"},
        {"num_attention_heads", "4"}, {"num_key_value_heads", "2"}, {"intermediate_size", "10"},
        {"rms_norm_eps", "1e-5"},     {"rope_theta", "10000.0"},    {"model_type", "\"remoe\""},
        {"num_experts", "6"},         {"num_experts_per_tok", "2"}, {"granularity", "2"},
        {"router", "\"relu\""},       {"load_balance", "true"},
    };
    FILE *file = check_fopen(CONFIG_PATH, "wb", "");
    fprintf(file, "{%s", added);
    for (size_t i = 0; i < (routed ? 14 : 8); i++) {
        if (strcmp(dropped, members[i][0]) != 0 && !config_names(added, members[i][0])) {
            fprintf(file, "\"%s\": %s, ", members[i][0], members[i][1]);
        }
    }
    fprintf(file, "\"foreign\": [1, {\"a\": null}], \"torch_dtype\": \"float32\"}\n");
    check_fclose(file, CONFIG_PATH);
}

static Config config_read_with(const char *dropped, const char *added, int routed) {
    config_save(dropped, added, routed);
    return config_read(CONFIG_PATH);
}

static void test_config_accepted(void) {
    Config c = config_read_with("", "", 1);
    CHECK(c.router.method == ROUTER_RELU && c.router.experts == 6 && c.router.active == 2 &&
          c.granularity == 2);
    CHECK(c.rope_theta == 1e4 && c.norm_eps == 1e-5 && c.head_size == 6 && c.ffn == 10);
    CHECK(c.max_seq_len == 1024 && c.router.load_balance == 1); // where nobody says otherwise
    c = config_read_with("", "\"max_position_embeddings\": 2048, \"head_dim\": 6, \"rope_scaling\": null, ",
                         0);
    CHECK(c.router.method == ROUTER_DENSE && c.router.experts == 1 && c.router.active == 1 &&
          c.granularity == 1);
    CHECK(c.max_seq_len == 2048);
    c = config_read_with("rope_theta",
                         "\"rope_parameters\": {\"rope_theta\": 5e5, \"rope_type\": \"default\"}, ", 0);
    CHECK(c.rope_theta == 5e5);
    c = config_read_with("", "\"rope_parameters\": {\"rope_theta\": 1e4}, \"head_dim\": null, ", 0);
    CHECK(c.rope_theta == 1e4);
    c = config_read_with("", "\"rope_parameters\": null, \"attention_bias\": null, \"mlp_bias\": false, ", 0);
    CHECK(c.rope_theta == 1e4);
    c = config_read_with("", "\"router\": \"lory\", \"granularity\": 1, \"num_experts_per_tok\": 1, ", 1);
    CHECK(c.router.segment == 256);
    c = config_read_with("granularity", "\"hidden_act\": \"silu\", ", 1);
    CHECK(c.granularity == 1);
    c = config_read_with("", "\"load_balance\": 0, ", 1);
    CHECK(c.router.load_balance == 0);
    c = config_read_with("", "\"load_balance\": false, ", 1);
    CHECK(c.router.load_balance == 0);
    c = config_read_with("model_type", "", 1);
    CHECK(c.router.experts == 6);
    c = config_read_with("", "\"router\": \"dense\", \"model_type\": \"llama\", ", 0);
    CHECK(c.router.method == ROUTER_DENSE);
    CHECK(c.bos == -1 && c.eos == -1);
    c = config_read_with("", "\"bos_token_id\": 0, \"eos_token_id\": [2, 3], ", 0);
    CHECK(c.bos == 0 && c.eos == -1); // a list is not one token, and no fault
    c = config_read_with("", "\"bos_token_id\": null, \"eos_token_id\": 66, ", 1);
    CHECK(c.bos == -1 && c.eos == 66);
}

typedef struct {
    const char *message, *dropped, *added;
    int routed;
} ConfigCase;

static void config_read_case(void *unused) {
    (void)unused;
    config_read(CONFIG_PATH);
}

static void test_config_refused(void) {
    static const ConfigCase cases[] = {
        {"\"vocab_size\" is missing", "vocab_size", "", 1},
        {"\"hidden_size\" is missing", "hidden_size", "", 0},
        {"\"num_hidden_layers\" is missing", "num_hidden_layers", "", 0},
        {"\"num_attention_heads\" is missing", "num_attention_heads", "", 0},
        {"\"num_key_value_heads\" is missing", "num_key_value_heads", "", 0},
        {"\"intermediate_size\" is missing", "intermediate_size", "", 0},
        {"\"rms_norm_eps\" is missing; expected a positive number", "rms_norm_eps", "", 0},
        {"\"rope_theta\" is missing", "rope_theta", "", 0},
        {"\"rope_theta\" is missing", "rope_theta", "\"rope_parameters\": {\"rope_type\": \"default\"}, ", 0},
        {"\"num_experts_per_tok\" is missing", "num_experts_per_tok", "", 1},
        {"\"num_experts\" needs \"router\"", "router", "", 1},
        {"without \"num_experts\"", "num_experts", "", 1},
        {"without \"num_experts\"", "", "\"router\": \"relu\", ", 0},
        {"without \"num_experts\"", "", "\"num_experts_per_tok\": 1, ", 0},
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": \"24\", ", 0},
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": 0, ", 0},
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": -24, ", 0},
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": 24.5, ", 0},
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": 4294967320, ", 0}, // 24 in 32 bits
        {"\"hidden_size\" is unusable", "", "\"hidden_size\": null, ", 0},
        {"\"num_hidden_layers\" is unusable", "", "\"num_hidden_layers\": 1025, ", 0},
        {"\"rms_norm_eps\" is unusable", "", "\"rms_norm_eps\": 0, ", 0},
        {"\"rms_norm_eps\" is unusable", "", "\"rms_norm_eps\": 1e999, ", 0},
        {"\"rope_theta\" is unusable", "", "\"rope_theta\": \"1e4\", ", 0},
        {"\"rope_theta\" is unusable", "", "\"rope_theta\": 1e31, ", 0},
        {"\"num_experts\" is unusable", "", "\"num_experts\": 65537, ", 1},
        {"\"max_position_embeddings\" is unusable", "", "\"max_position_embeddings\": 0, ", 0},
        {"\"load_balance\" is unusable", "", "\"load_balance\": 2, ", 1},
        {"\"load_balance\" is unusable", "", "\"load_balance\": \"true\", ", 1},
        {"\"num_experts\" needs \"router\"", "", "\"router\": \"dense\", ", 1},
        {"\"num_experts\" needs \"router\"", "", "\"router\": \"switch\", ", 1},
        {"\"num_experts\" needs \"router\"", "", "\"model_type\": \"llama\", ", 1},
        {"differs from the one in", "", "\"rope_parameters\": {\"rope_theta\": 5e5}, ", 0},
        {"24 over 5 heads", "", "\"num_attention_heads\": 5, ", 0},
        {"24 over 8 heads must give an even", "", "\"num_attention_heads\": 8, ", 0},
        {"not a multiple of 3 key/value heads", "", "\"num_key_value_heads\": 3, ", 0},
        {"8 active experts of only 6", "", "\"num_experts_per_tok\": 8, ", 1},
        {"not multiples of the granularity 2", "", "\"num_experts\": 5, ", 1},
        {"not multiples of the granularity 2", "", "\"num_experts_per_tok\": 3, ", 1},
        {"merges experts into one", "", "\"router\": \"lory\", ", 1}, // of 2 active
        {"\"segment_length\" is unusable", "",
         "\"router\": \"lory\", \"granularity\": 1, \"num_experts_per_tok\": 1, \"segment_length\": 0, ", 1},
        {"use fewer layers or experts", "",
         "\"intermediate_size\": 16777216, \"hidden_size\": 65536, \"num_experts\": 65536, ", 1},
        {"\"model_type\" asks for what", "", "\"model_type\": \"mixtral\", ", 0},
        {"\"model_type\" asks for what", "", "\"model_type\": 1, ", 0},
        {"\"tie_word_embeddings\" asks for what", "", "\"tie_word_embeddings\": true, ", 0},
        {"\"tie_word_embeddings\" asks for what", "", "\"tie_word_embeddings\": 1, ", 0},
        {"\"attention_bias\" asks for what", "", "\"attention_bias\": true, ", 0},
        {"\"mlp_bias\" asks for what", "", "\"mlp_bias\": true, ", 1},
        {"\"rope_scaling\" asks for what", "", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}, ",
         0},
        {"\"rope_parameters\" asks for what", "", "\"rope_parameters\": {\"rope_type\": \"yarn\"}, ", 0},
        {"\"rope_parameters\" asks for what", "", "\"rope_parameters\": {\"type\": \"linear\"}, ", 0},
        {"\"hidden_act\" asks for what", "", "\"hidden_act\": \"gelu\", ", 0},
        {"\"head_dim\" asks for what", "", "\"head_dim\": 8, ", 0},
        {"\"head_dim\" asks for what", "", "\"head_dim\": \"6\", ", 0},
        {"without repeated keys", "", "\"vocab_size\": 67, \"vocab_size\": 67, ", 0},
        {"is not valid JSON: line 1", "", "\"a\" 1, ", 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        const ConfigCase *c = &cases[i];
        config_save(c->dropped, c->added, c->routed);
        if (!check_dies(1, c->message, config_read_case, NULL)) {
            printf("    without \"%s\", with %s\n", c->dropped, c->added);
        }
    }
    FILE *file = check_fopen(CONFIG_PATH, "wb", "");
    fprintf(file, "[]\n");
    check_fclose(file, CONFIG_PATH);
    check_dies(1, "expected one JSON object", config_read_case, NULL);
    unlink(CONFIG_PATH);
    check_dies(1, "---> name a checkpoint folder with --load", config_read_case, NULL);
}

static void config_read_in_child(void *path) {
    config_read((const char *)path);
}

static void test_config_fifo(void) {
    static char path[] = "build/test/config_fifo";
    unlink(path);
    CHECK(mkfifo(path, 0600) == 0);
    check_dies(1, "is not a regular file", config_read_in_child, path);
    unlink(path);
}

static void test_config(void) {
    test_config_fifo();
    CHECK(system("mkdir -p build/test") == 0);
    test_config_counts();
    test_config_from_options();
    test_config_options_refused();
    test_config_scopes();
    test_config_round_trip();
    test_config_written();
    test_config_accepted();
    test_config_refused();
}

#endif
