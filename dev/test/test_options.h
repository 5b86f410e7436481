/*
options.h: spellings, presets and aliases of the command line, everything it refuses, what of it makes the
model, and the way into a checkpoint and back (state_file.h).
*/
#ifndef TEST_OPTIONS_H
#define TEST_OPTIONS_H

#include "llmc/files/state_file.h"
#include "llmc/run/startup.h"
#include "harness.h"

#define OPTIONS_PATH "build/test/options.json"

// the table's defaults, then a line of words without quotes
static Options options_of(const char *line) {
    Options options;
    options_defaults(&options, NULL);
    options_parse_line(&options, line);
    return options;
}

static void test_options_defaults(void) {
    Options o = options_of("");
    int count;
    const OptionRow *rows = option_rows(&count);
    CHECK(o.experts == 8 && o.active == 1 && o.granularity == 1 && o.load_balance == 1 && o.eval == 0);
    CHECK(o.bias_rate == 0.001 && o.router_jitter == 0.1 && o.segment_length == 48);
    CHECK(o.lambda_init == 1e-8 && o.alpha == 1.2 && o.aux_coeff == 0.01 && o.lr == 5e-4 && o.lr_min == 5e-5);
    CHECK(o.weight_decay == 0.01 && o.grad_clip == 1.0 && o.warmup_steps == -1 && o.topk_warmup_k == 6);
    CHECK(o.pair_budget == 0.0 && o.recompute == 0);
    CHECK(strcmp(o.preset, "tiny") == 0 && strcmp(o.router, "relu") == 0 && o.out[0] == '\0');
    for (int i = 0; i < count; i++) { // names are distinct, and each is found as it is typed
        char spelled[64];
        option_spell(spelled, sizeof(spelled), rows[i].field);
        CHECK(option_find(spelled, strlen(spelled)) == &rows[i] && rows[i].help[0] != '\0');
        CHECK(strchr(spelled, '_') == NULL);
    }
}

static void test_options_presets(void) {
    Options o;
    options_defaults(&o, "medium");
    CHECK(o.hidden == 1024 && o.layers == 24 && o.heads == 16 && o.kv_heads == 4 && o.vocab_size == 51200);
    CHECK(o.seq_len == 1024 && o.global_batch == 512 && o.steps == 60000 && strcmp(o.preset, "medium") == 0);
    CHECK(strcmp(o.train_data, "data/pile/train_*.bin") == 0 && o.experts == 8 && o.segment_length == 256);
    options_defaults(&o, "small");
    CHECK(o.hidden == 768 && o.layers == 12 && o.heads == 12 && o.kv_heads == 4);
    options_defaults(&o, "large");
    CHECK(o.hidden == 1536 && o.layers == 24 && o.heads == 16 && o.kv_heads == 4);
    CHECK(o.lr == 5e-4 && o.lr_min == 5e-5); // the paper's
    options_parse_line(&o, "--layers 3");    // the user's words come after
    CHECK(o.layers == 3 && o.hidden == 1536);
    options_defaults(&o, "tiny");
    CHECK(strcmp(o.preset, "tiny") == 0 && o.layers == 3 && o.vocab_size == 2048 && o.seq_len == 192);
}

static void test_options_spellings(void) {
    Options o = options_of("--steps 5 --global-batch=64 --lr 1e-3 --out=a=b --router topk");
    CHECK(o.steps == 5 && o.global_batch == 64 && o.lr == 1e-3 && strcmp(o.out, "a=b") == 0);
    CHECK(strcmp(o.router, "topk") == 0);
    o = options_of("--global_batch 32 --data d*.bin --lambda 0.5 --steps 5 --steps 7 --warmup-steps -1");
    CHECK(o.global_batch == 32 && strcmp(o.train_data, "d*.bin") == 0 && o.lambda_init == 0.5 &&
          o.steps == 7);
    o = options_of("--eval --steps 9");
    CHECK(o.eval == 1 && o.steps == 9);
    o = options_of("--eval 1 --shuffle 0 --bench=1 --load-balance=0");
    CHECK(o.eval == 1 && o.shuffle == 0 && o.bench == 1 && o.load_balance == 0);
    CHECK(options_of("--bench").bench == BENCH_STEPS && options_of("--bench --steps 9").steps == 9);
    CHECK(options_of("--bench forward").bench == BENCH_FORWARD && options_of("").bench == BENCH_NOTHING);
    CHECK(options_of("--bench=sample").bench == BENCH_SAMPLE &&
          options_of("--bench 0").bench == BENCH_NOTHING);
    o = options_of("--pair-budget 1.5 --recompute");
    CHECK(o.pair_budget == 1.5 && o.recompute == 1);
    errno = ERANGE; // left by something earlier
    o = options_of("--val-data= --seed 9223372036854775807 --lambda 1e30 --lr 0");
    CHECK(o.val_data[0] == '\0' && o.seed == INT64_MAX && o.lambda_init == 1e30 && o.lr == 0.0);
    const char *words[] = {"--sample", "a \"prompt\" of two  words", "--tokenizer", ""};
    options_parse(&o, 4, words);
    CHECK(strcmp(o.sample, "a \"prompt\" of two  words") == 0 && o.tokenizer[0] == '\0');
}

// ----------------------------------------------------------------------------
// refusals

static void options_parse_in_child(void *line) {
    options_of((const char *)line);
}

static void options_parse_long(void *size) {
    Options o;
    char *text = NEW(char, *(size_t *)size + 1);
    const char *words[] = {"--out", text};
    memset(text, 'x', *(size_t *)size);
    options_defaults(&o, "tiny");
    options_parse(&o, 2, words);
}

// what `--resume "$UNSET"` passes on
static void options_parse_empty(void *unused) {
    Options o;
    const char *words[] = {"--steps", "5", "--resume", ""};
    (void)unused;
    options_defaults(&o, "tiny");
    options_parse(&o, 4, words);
}

static void options_unknown_preset(void *unused) {
    Options o;
    (void)unused;
    options_defaults(&o, "huge");
}

static void test_options_refused(void) {
    static const char *const cases[][2] = {
        {"--stesp 5", "unknown option --stesp\n  ---> did you mean --steps?"},
        {"--global_bach 5", "did you mean --global-batch?"},
        {"--lambda-int 5", "did you mean --lambda-init?"},
        {"--step=5", "unknown option --step\n"},
        {"--exprets 5 --steps 1", "did you mean --experts?"},
        {"--=5", "unknown option --"},
        {"-steps 5", "'-steps' is not an option"},
        {"steps 5", "'steps' is not an option"},
        {"--", "'--' is not an option"},
        {"--eval yes", "'yes' is not an option"},
        {"--steps", "--steps needs a value"},
        {"--steps --lr 1", "--steps expects an integer"},
        {"--steps 5x", "--steps expects an integer from 1"},
        {"--steps 1e3", "--steps expects an integer"},
        {"--steps 5.0", "--steps expects an integer"},
        {"--steps=", "--steps expects an integer"},
        {"--seed=", "--seed expects an integer"},
        {"--lr=", "--lr expects a number"},
        {"--resume=", "--resume is empty, expected a path\n  ---> "},
        {"--load=", "--load is empty"},
        {"--out=", "--out is empty"},
        {"--data=", "--train-data is empty"},
        {"--dump=", "--dump is empty"},
        {"--route-from=", "--route-from is empty"},
        {"--steps 0", "--steps expects an integer from 1"},
        {"--steps 9223372036854775808", "--steps expects an integer"},
        {"--steps -9223372036854775809", "--steps expects an integer"},
        {"--warmup-steps -2", "--warmup-steps expects an integer from -1"},
        {"--experts 65537", "--experts expects an integer from 1 to 65536"},
        {"--lr 1e-3x", "--lr expects a number"},
        {"--lr nan", "--lr expects a number"},
        {"--lr inf", "--lr expects a number"},
        {"--lr 1e999", "--lr expects a number"},
        {"--lr -1", "--lr expects a number from 0 to 1000"},
        {"--pair-budget -1", "--pair-budget expects a number from 0"},
        {"--recompute=2", "--recompute expects an integer from 0 to 1"},
        {"--alpha 0.99", "--alpha expects a number from 1 to 1000"},
        {"--lambda -1", "--lambda-init expects a number from 0"},
        {"--eval=2", "--eval expects an integer from 0 to 1"},
        {"--a-name-that-is-longer-than-any-name-that-the-table-has-and-than-its-64-letters 1",
         "unknown option --"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char line[128];
        check_format(line, sizeof(line), "%s", cases[i][0]);
        if (!check_dies(2, cases[i][1], options_parse_in_child, line)) {
            printf("    %s\n", line);
        }
    }
    size_t most = OPTION_TEXT_SIZE - 1, beyond = OPTION_TEXT_SIZE;
    CHECK(run_in_child(options_parse_long, &most, NULL, 0) == 0);
    check_dies(2, "--out: longer than 16383 bytes", options_parse_long, &beyond);
    check_dies(2, "--resume is empty", options_parse_empty, NULL);
    check_dies(2, "--preset huge: unknown\n  ---> one of: tiny, small, medium, large", options_unknown_preset,
               NULL);
}

// ----------------------------------------------------------------------------
// words that others look for

static void test_options_given(void) {
    const char *words[] = {"--preset", "small",         "--steps=3", "--global_batch", "4",
                           "--data",   "--preset=tiny", "--out",     "--preset"};
    CHECK(strcmp(options_peek(2, words, "preset", "x"), "small") == 0);
    CHECK(strcmp(options_peek(7, words, "preset", "x"), "tiny") == 0); // the last one counts
    CHECK(strcmp(options_peek(9, words, "steps", "x"), "3") == 0);
    CHECK(strcmp(options_peek(1, words, "preset", "x"), "x") == 0); // no value: the parser will say so
    CHECK(strcmp(options_peek(9, words, "step", "x"), "x") == 0);
    CHECK(options_given(9, words, "steps") && options_given(9, words, "global_batch"));
    CHECK(options_given(9, words, "train_data") && !options_given(5, words, "train_data"));
    CHECK(!options_given(9, words, "lr") && !options_given(0, words, "preset"));
}

static void options_print_help(void *unused) {
    Options o = options_of("");
    (void)unused;
    options_help(&o, "./train_remoe");
}

static void test_options_help(void) {
    static char help[65536];
    int count, missing = 0;
    const OptionRow *rows = option_rows(&count);
    CHECK(run_in_child(options_print_help, NULL, help, sizeof(help)) == 0);
    for (int i = 0; i < count; i++) {
        char spelled[64], line[80];
        option_spell(spelled, sizeof(spelled), rows[i].field);
        check_format(line, sizeof(line), "\n  --%s ", spelled);
        missing += strstr(help, line) == NULL || strstr(help, rows[i].help) == NULL;
    }
    CHECK(missing == 0 && strstr(help, "[5e-05]") != NULL && strstr(help, "[build/sample]") != NULL);
}

// ----------------------------------------------------------------------------
// scopes

// the name that a run's start-up table gives its model
static void test_options_model_name(void) {
    static const char *const cases[][2] = {
        {"", "tiny"},
        {"--router topk --experts 16 --active 2 --granularity 2 --load-balance 0", "tiny"},
        {"--seq-len 5 --batch 2 --steps 3 --lr 1 --seed 7", "tiny"},
        {"--hidden 192 --layers 3", "tiny"}, // as they are
        {"--layers 4", "custom"},
        {"--hidden 256 --heads 8", "custom"},
        {"--kv-heads 1", "custom"},
        {"--ffn-mult 3", "custom"},
        {"--vocab-size 4096", "custom"},
    };
    Options o;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        options_defaults(&o, "tiny");
        options_parse_line(&o, cases[i][0]);
        if (!CHECK(strcmp(options_model_name(&o), cases[i][1]) == 0)) {
            printf("    %s\n", cases[i][0]);
        }
    }
    options_defaults(&o, "medium");
    CHECK(strcmp(options_model_name(&o), "medium") == 0);
    options_parse_line(&o, "--hidden 192 --layers 3 --heads 6"); // tiny's, but for V and KV
    CHECK(strcmp(options_model_name(&o), "custom") == 0);
}

static void test_options_forget_once(void) {
    Options o = options_of("--eval --bench --load a --resume b --dump c --route-from d --sample e --steps 9 "
                           "--save-dtype bf16 --layers 5 --router hash"),
            want = options_of("--steps 9 --layers 5 --router hash");
    options_forget_once(&o);
    CHECK(o.eval == 0 && o.bench == 0 && o.load[0] == '\0' && o.resume[0] == '\0' && o.dump[0] == '\0');
    CHECK(o.route_from[0] == '\0' && o.sample[0] == '\0' && strcmp(o.save_dtype, "f32") == 0);
    CHECK(o.steps == want.steps && o.layers == want.layers && strcmp(o.router, want.router) == 0);
}

// ----------------------------------------------------------------------------
// in a checkpoint

static void options_save_text(const char *text) {
    FILE *file = check_fopen(OPTIONS_PATH, "wb", "");
    check_fwrite(text, 1, strlen(text), file, OPTIONS_PATH);
    check_fclose(file, OPTIONS_PATH);
}

static void options_load(void *options) {
    JsonArena arena;
    json_arena_init(&arena);
    options_read_json((Options *)options, json_parse_file(OPTIONS_PATH, &arena, ""), OPTIONS_PATH);
    json_arena_free(&arena);
}

static void test_options_round_trip(void) {
    const char *words[] = {"--out", "runs/\"quoted\"\\ \n \xC3\xA9", "--sample", ""};
    Options o = options_of("--lr 0.1 --lambda 1.2345678901234567e-8 --seed 9223372036854775807 --shuffle 0"),
            back;
    options_parse(&o, 4, words);
    FILE *file = check_fopen(OPTIONS_PATH, "wb", "");
    options_write_json(file, &o);
    check_fclose(file, OPTIONS_PATH);
    options_defaults(&back, "small");
    options_load(&back);
    CHECK(back.lr == 0.1 && back.lambda_init == 1.2345678901234567e-8 && back.seed == INT64_MAX);
    CHECK(strcmp(back.out, o.out) == 0 && back.shuffle == 0 && back.layers == o.layers);
    options_defaults(&back, "small");
    options_save_text("{\"steps\": 12}"); // what an older checkpoint does not name keeps its value
    options_load(&back);
    CHECK(back.steps == 12 && back.layers == 12 && back.hidden == 768);
}

static void test_options_bad_json(void) {
    static const char *const cases[][2] = {
        {"[]", "\"options\" is not an object"},
        {"null", "\"options\" is not an object"},
        {"{\"stesp\": 5}", "unusable option \"stesp\""},
        {"{\"steps\": \"5\"}", "unusable option \"steps\""},
        {"{\"steps\": true}", "unusable option \"steps\""},
        {"{\"out\": 5}", "unusable option \"out\""},
        {"{\"out\": null}", "unusable option \"out\""},
        {"{\"steps\": 0}", "--steps (from the checkpoint) expects an integer from 1"},
        {"{\"steps\": 1.5}", "--steps (from the checkpoint) expects an integer"},
        {"{\"lr\": 1e999}", "--lr (from the checkpoint) expects a number"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        Options o = options_of("");
        options_save_text(cases[i][0]);
        if (!check_dies(1, cases[i][1], options_load, &o)) {
            printf("    %s\n", cases[i][0]);
        }
    }
}

typedef struct {
    int argc;
    const char *argv[4];
} OptionsLine;

static void options_launch(void *arg) {
    const OptionsLine *line = (const OptionsLine *)arg;
    Options o = options_of("");
    read_launch_options(&o, line->argc, line->argv);
    printf("%d %g %g, asks %d\n", (int)o.gpus, o.connect_minutes, o.watchdog_minutes,
           wants_answer(line->argc, line->argv));
}

// what is looked at before there are ranks is held to the table like all else
static void test_options_of_the_launch(void) {
    static const struct {
        OptionsLine line;
        int status;
        const char *text;
    } cases[] = {
        {{1, {"--eval"}}, 0, "0 5 10, asks 0\n"},
        {{4, {"--gpus", "3", "--gpus=2", "--version"}}, 0, "2 5 10, asks 1\n"},
        {{3, {"-h", "--watchdog-minutes", "0"}}, 0, "0 5 0, asks 1\n"},
        {{2, {"--gpus", "-1"}}, 2, "--gpus expects an integer from 0 to 64, not '-1'"},
        {{1, {"--gpus=65"}}, 2, "--gpus expects an integer from 0 to 64, not '65'"},
        {{2, {"--gpus", "2x"}}, 2, "not '2x'"},
        {{2, {"--connect-minutes", "soon"}}, 2, "--connect-minutes expects a number from 0.001 to"},
        {{2, {"--connect-minutes", "0"}}, 2, "not '0'"},
        {{2, {"--watchdog_minutes", "-3"}}, 2, "--watchdog-minutes expects a number from 0 to"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        OptionsLine line = cases[i].line;
        check_dies(cases[i].status, cases[i].text, options_launch, &line);
    }
}

// each group of --help begins at an option that exists, the first at the first
static void test_option_groups(void) {
    int count, options;
    const OptionGroup *groups = option_groups(&count);
    const OptionRow *rows = option_rows(&options), *before = NULL;
    for (int i = 0; i < count; i++) {
        const OptionRow *row = option_find(groups[i].first, strlen(groups[i].first));
        CHECK(row != NULL && (i == 0 ? row == rows : row > before));
        before = row;
    }
}

static void test_options(void) {
    test_option_groups();
    CHECK(system("mkdir -p build/test") == 0);
    test_options_defaults();
    test_options_presets();
    test_options_spellings();
    test_options_refused();
    test_options_given();
    test_options_help();
    test_options_model_name();
    test_options_of_the_launch();
    test_options_forget_once();
    test_options_round_trip();
    test_options_bad_json();
    unlink(OPTIONS_PATH);
}

#endif
