/*
checkpoint.h: everything comes back bit for bit; what a kill or a full disk leaves behind does no harm; --keep
removes the right ones; folders made by others load; missing, truncated and foreign files are named.
*/
#ifndef TEST_CHECKPOINT_H
#define TEST_CHECKPOINT_H

#include <signal.h>
#include <sys/resource.h>
// defines: signal, setrlimit
#include "llmc/files/checkpoint.h"
#include "harness.h"

#define CHECKPOINT_OUT "build/test/checkpoint"

typedef struct {
    Config config;
    TensorTable table;
    Weights weights;
    float *params, *exp_avg, *exp_avg_sq;
    RunState state;
    Options options;
} CheckpointCase;

static void checkpoint_clean(void) {
    CHECK(system("rm -rf " CHECKPOINT_OUT " && mkdir -p " CHECKPOINT_OUT) == 0);
}

// a model of a few thousand weights, all of them drawn from the seed
static CheckpointCase checkpoint_case(const char *line, unsigned seed) {
    CheckpointCase m;
    memset(&m, 0, sizeof(m));
    options_defaults(&m.options, NULL);
    options_parse_line(&m.options,
                       "--hidden 8 --heads 2 --kv-heads 1 --layers 2 --vocab-size 11 --experts 3");
    options_parse_line(&m.options, line);
    m.config = config_from_options(&m.options);
    model_tensors(&m.table, &m.weights, &m.config, NULL);
    size_t n = (size_t)m.table.num_params;
    m.params = NEW(float, n);
    m.exp_avg = NEW(float, n);
    m.exp_avg_sq = NEW(float, n);
    fill_uniform(m.params, n, seed, 1.0f);
    fill_uniform(m.exp_avg, n, seed + 1, 1e-3f);
    fill_uniform(m.exp_avg_sq, n, seed + 2, 1e-40f); // numbers that a careless reader would flush to 0
    m.params[3] = -0.0f;
    m.params[4] = INFINITY;
    m.state.step = 7;
    m.state.optimizer_step = 123456789012;
    m.state.sequences = (int64_t)1 << 45;
    m.state.sparsity = lambda_init(1.2345678e-9, 1.2);
    m.state.sparsity.stage = STAGE_SPARSIFYING;
    m.state.sparsity.min_sparsity = 0.1 + 0.2;
    m.state.sparsity.rising_steps = 3;
    m.state.sparsity.stage2_step = 5;
    return m;
}

static void checkpoint_case_free(CheckpointCase *m) {
    free(m->params);
    free(m->exp_avg);
    free(m->exp_avg_sq);
    free(m->table.tensors);
    free(m->weights.layers);
}

static void checkpoint_save_case(const CheckpointCase *m, int64_t step) {
    RunState state = m->state;
    state.step = step;
    checkpoint_save(CHECKPOINT_OUT, &m->config, &m->table, m->params, m->exp_avg, m->exp_avg_sq, &state,
                    &m->options, NULL);
}

static int checkpoint_has(const char *name) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), CHECKPOINT_OUT "/%s", name);
    return access(path, F_OK) == 0;
}

static int checkpoint_latest_is(const char *name) {
    char target[256] = {0};
    return readlink(CHECKPOINT_OUT "/latest", target, sizeof(target) - 1) > 0 && strcmp(target, name) == 0;
}

// no temporary of any kind
static int checkpoint_is_tidy(void) {
    return system("test -z \"$(find " CHECKPOINT_OUT " -name '*tmp*')\"") == 0;
}

static int checkpoint_weights_equal(const CheckpointCase *m, const char *folder) {
    float *params = NEW(float, m->table.num_params);
    checkpoint_load_weights(params, folder, &m->table);
    int equal = memcmp(params, m->params, (size_t)m->table.num_params * sizeof(float)) == 0;
    free(params);
    return equal;
}

// ----------------------------------------------------------------------------
// there and back

static int checkpoint_moments_equal(const CheckpointCase *m, const char *folder) {
    size_t n = (size_t)m->table.num_params;
    float *a = NEW(float, n), *b = NEW(float, n);
    int found = checkpoint_load_moments(a, b, folder, &m->table);
    int equal =
        memcmp(a, m->exp_avg, n * sizeof(float)) == 0 && memcmp(b, m->exp_avg_sq, n * sizeof(float)) == 0;
    free(a);
    free(b);
    return found && equal;
}

static void checkpoint_check_round_trip(const char *line) {
    const char *folder = CHECKPOINT_OUT "/step_00000007";
    CheckpointCase m = checkpoint_case(line, 1);
    Options options;
    RunState state;
    memset(&state, 0, sizeof(state));
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    CHECK(checkpoint_latest_is("step_00000007") && checkpoint_is_tidy());
    CHECK(checkpoint_weights_equal(&m, folder) && checkpoint_moments_equal(&m, folder));
    options_defaults(&options, "small");
    CHECK(checkpoint_load_state(&state, &options, folder) == 1);
    state.sparsity.alpha = m.state.sparsity.alpha; // alpha is the options' business
    CHECK(state.step == 7 && state.optimizer_step == m.state.optimizer_step &&
          state.sequences == m.state.sequences);
    CHECK(state.sparsity.lambda == m.state.sparsity.lambda && state.sparsity.stage == STAGE_SPARSIFYING);
    CHECK(state.sparsity.min_sparsity == 0.1 + 0.2 && state.sparsity.rising_steps == 3);
    CHECK(state.sparsity.stage2_step == 5 && state.sparsity.stage3_step == -1);
    CHECK(options.hidden == 8 && options.vocab_size == 11 && options.lr == m.options.lr && options.keep == 2);
    Config config = config_read(CHECKPOINT_OUT "/latest/config.json");
    CHECK(config.hidden == 8 && config.layers == 2 && config.router.method == m.config.router.method);
    CHECK(config.router.experts == m.config.router.experts && config.ffn == m.config.ffn);
    checkpoint_case_free(&m);
}

static void test_checkpoint_round_trip(void) {
    checkpoint_check_round_trip("--router relu --granularity 2");
    checkpoint_check_round_trip("--router hash");
    checkpoint_check_round_trip("--router dense");
}

// weights alone, rounded to bf16: an export, not a state to go on from
static void test_checkpoint_bf16(void) {
    const char *folder = CHECKPOINT_OUT "/step_00000007";
    CheckpointCase m = checkpoint_case("--save-dtype bf16", 1);
    RunState state;
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    for (int64_t i = 0; i < m.table.num_params; i++) {
        m.params[i] = bf16_to_float(float_to_bf16(m.params[i]));
    }
    CHECK(checkpoint_weights_equal(&m, folder));
    CHECK(!checkpoint_has("step_00000007/optimizer.safetensors") &&
          !checkpoint_has("step_00000007/state.json"));
    CHECK(checkpoint_load_state(&state, NULL, folder) == 0 && !checkpoint_moments_equal(&m, folder));
    checkpoint_case_free(&m);
}

// the same step again, as a second Ctrl-C at once does: the second save is what stays
static void test_checkpoint_again(void) {
    CheckpointCase first = checkpoint_case("", 1), second = checkpoint_case("", 9);
    checkpoint_clean();
    checkpoint_save_case(&first, 7);
    checkpoint_save_case(&second, 7);
    CHECK(checkpoint_weights_equal(&second, CHECKPOINT_OUT "/latest") && checkpoint_is_tidy());
    checkpoint_case_free(&first);
    checkpoint_case_free(&second);
}

static void checkpoint_find_missing(void *named) {
    char folder[PATH_SIZE];
    checkpoint_find(folder, (const char *)named, "build/test/nowhere");
}

static void test_checkpoint_find(void) {
    char folder[PATH_SIZE], latest[] = "latest", absent[] = "build/test/absent", empty[] = "build/test";
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    checkpoint_find(folder, "latest", CHECKPOINT_OUT);
    CHECK(strcmp(folder, CHECKPOINT_OUT "/latest") == 0);
    checkpoint_find(folder, CHECKPOINT_OUT, ""); // a run's folder
    CHECK(strcmp(folder, CHECKPOINT_OUT "/latest") == 0);
    checkpoint_find(folder, CHECKPOINT_OUT "/step_00000007", "");
    CHECK(strcmp(folder, CHECKPOINT_OUT "/step_00000007") == 0);
    check_dies(1, "no checkpoint in build/test/nowhere/latest", checkpoint_find_missing, latest);
    check_dies(1, "no checkpoint in build/test/absent", checkpoint_find_missing, absent);
    check_dies(1, "there is no build/test/config.json", checkpoint_find_missing, empty);
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// --keep

static void test_checkpoint_keep(void) {
    CheckpointCase m = checkpoint_case("--keep 2", 1);
    checkpoint_clean();
    CHECK(system("cd " CHECKPOINT_OUT
                 " && mkdir step_best step_00000001_copy other step_ && touch step_best/x "
                 "other/y log.jsonl && ln -s other step_00000000") == 0);
    for (int64_t step = 1; step <= 12; step++) {
        checkpoint_save_case(&m, step);
    }
    CHECK(checkpoint_has("step_00000011") && checkpoint_has("step_00000012") &&
          checkpoint_latest_is("step_00000012"));
    CHECK(!checkpoint_has("step_00000010") && !checkpoint_has("step_00000001") &&
          !checkpoint_has("step_00000009"));
    CHECK(checkpoint_has("step_best/x") && checkpoint_has("step_00000001_copy") && checkpoint_has("step_"));
    CHECK(checkpoint_has("other/y") &&
          checkpoint_has("log.jsonl")); // a link goes, what it points to does not
    m.options.keep = 1;
    checkpoint_save_case(&m, 5); // a run resumed from an earlier step
    CHECK(checkpoint_latest_is("step_00000005") && checkpoint_weights_equal(&m, CHECKPOINT_OUT "/latest"));
    m.options.keep = 0;
    for (int64_t step = 99999998; step <= 100000000; step++) { // from eight digits to nine
        checkpoint_save_case(&m, step);
    }
    CHECK(checkpoint_has("step_00000005") && checkpoint_has("step_99999998"));
    m.options.keep = 2;
    checkpoint_save_case(&m, 100000001);
    CHECK(checkpoint_has("step_100000000") && !checkpoint_has("step_99999999"));
    CHECK(!checkpoint_has("step_00000005"));
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// interrupted

// a disk that takes no more than 2000 bytes a file; handler: killed in a write, or told that it failed
static void checkpoint_save_on_full_disk(const CheckpointCase *m, void (*handler)(int)) {
    struct rlimit limit = {2000, 2000};
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, handler);
    checkpoint_save_case(m, 8);
}

static void checkpoint_save_full(void *m) {
    checkpoint_save_on_full_disk((const CheckpointCase *)m, SIG_IGN);
}

static void checkpoint_save_killed(void *m) {
    checkpoint_save_on_full_disk((const CheckpointCase *)m, SIG_DFL);
}

static void test_checkpoint_interrupted(int keep) {
    CheckpointCase m = checkpoint_case("", 1), next = checkpoint_case("", 9);
    m.options.keep = next.options.keep = keep;
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    check_dies(1, "cannot write " CHECKPOINT_OUT "/.tmp_step_00000008/model.safetensors",
               checkpoint_save_full, &next);
    CHECK(!checkpoint_has("step_00000008") && checkpoint_latest_is("step_00000007"));
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT "/latest"));
    CHECK(run_in_child(checkpoint_save_killed, &next, NULL, 0) == 128 + SIGXFSZ);
    CHECK(checkpoint_has(".tmp_step_00000008") && !checkpoint_has("step_00000008"));
    CHECK(checkpoint_latest_is("step_00000007") && checkpoint_weights_equal(&m, CHECKPOINT_OUT "/latest"));
    CHECK(checkpoint_moments_equal(&m, CHECKPOINT_OUT "/latest"));
    checkpoint_save_case(&next, 9); // another step: the remains of step 8 go too
    CHECK(checkpoint_is_tidy() && checkpoint_latest_is("step_00000009") && checkpoint_has("step_00000007"));
    CHECK(checkpoint_weights_equal(&next, CHECKPOINT_OUT "/latest"));
    checkpoint_case_free(&m);
    checkpoint_case_free(&next);
}

// half of the same step's folder, with a file that the next save does not write
static void test_checkpoint_stale(void) {
    CheckpointCase m = checkpoint_case("--save-dtype bf16", 1);
    checkpoint_clean();
    CHECK(system("cd " CHECKPOINT_OUT
                 " && mkdir .tmp_step_00000007 && echo half > .tmp_step_00000007/state.json") == 0);
    checkpoint_save_case(&m, 7);
    CHECK(checkpoint_is_tidy() && checkpoint_has("step_00000007") &&
          !checkpoint_has("step_00000007/state.json"));
    checkpoint_case_free(&m);
}

static void checkpoint_save_below_file(void *m) {
    const CheckpointCase *c = (const CheckpointCase *)m;
    checkpoint_save(CHECKPOINT_OUT "/file/run", &c->config, &c->table, c->params, c->exp_avg, c->exp_avg_sq,
                    &c->state, &c->options, NULL);
}

static void test_checkpoint_no_folder(void) {
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    CHECK(system("touch " CHECKPOINT_OUT "/file") == 0);
    check_dies(1, "cannot make the folder " CHECKPOINT_OUT "/file/run", checkpoint_save_below_file, &m);
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// folders by others

// m's tensors last to first, an unknown one between them, every second in BF16; without one of them (or -1)
static void checkpoint_write_foreign(const CheckpointCase *m, int without) {
    const int64_t shape[2] = {2, 3};
    const float unknown[6] = {0};
    SafetensorsWriter w;
    safetensors_writer_open(&w, CHECKPOINT_OUT "/model.safetensors");
    for (int i = m->table.count - 1; i >= 0; i--) {
        const Tensor *t = &m->table.tensors[i];
        if (i != without) {
            safetensors_declare(&w, t->name, i % 2 ? "BF16" : "F32", t->ndim, t->shape);
        }
        if (i == 2) {
            safetensors_declare(&w, "model.layers.0.rotary_emb.inv_freq", "F32", 2, shape);
        }
    }
    safetensors_write_header(&w);
    for (int i = m->table.count - 1; i >= 0; i--) {
        const Tensor *t = &m->table.tensors[i];
        if (i != without) {
            safetensors_write_f32(&w, m->params + t->offset, (size_t)t->size);
        }
        if (i == 2) {
            safetensors_write_f32(&w, unknown, 6);
        }
    }
    safetensors_writer_finish(&w);
}

static void checkpoint_load_foreign(void *m) {
    checkpoint_weights_equal((const CheckpointCase *)m, CHECKPOINT_OUT);
}

static void test_checkpoint_foreign(void) {
    CheckpointCase m = checkpoint_case("", 1), wider = checkpoint_case("--hidden 16", 1);
    checkpoint_clean();
    for (int i = 1; i < m.table.count; i += 2) {
        const Tensor *t = &m.table.tensors[i];
        for (int64_t j = t->offset; j < t->offset + t->size; j++) {
            m.params[j] = bf16_to_float(float_to_bf16(m.params[j]));
        }
    }
    checkpoint_write_foreign(&m, -1);
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT));
    check_dies(1, "tensor model.embed_tokens.weight has shape [11, 8], expected [11, 16]",
               checkpoint_load_foreign, &wider);
    checkpoint_write_foreign(&m, 4);
    check_dies(1, "has no tensor model.layers.0.self_attn.v_proj.weight, expected with shape [4, 8]",
               checkpoint_load_foreign, &m);
    CHECK(truncate(CHECKPOINT_OUT "/model.safetensors", 3000) == 0);
    check_dies(1, CHECKPOINT_OUT "/model.safetensors is not a good safetensors file", checkpoint_load_foreign,
               &m);
    unlink(CHECKPOINT_OUT "/model.safetensors");
    check_dies(1, "cannot open " CHECKPOINT_OUT "/model.safetensors", checkpoint_load_foreign, &m);
    checkpoint_case_free(&m);
    checkpoint_case_free(&wider);
}

// ----------------------------------------------------------------------------
// damaged states

static void checkpoint_load_latest(void *m) {
    CheckpointCase *c = (CheckpointCase *)m;
    checkpoint_load_moments(c->exp_avg, c->exp_avg_sq, CHECKPOINT_OUT "/latest", &c->table);
    checkpoint_load_state(&c->state, &c->options, CHECKPOINT_OUT "/latest");
}

// state.json with `from` replaced by `to`
static void checkpoint_edit_state(const char *whole, const char *from, const char *to) {
    const char *at = strstr(whole, from);
    FILE *file = check_fopen(CHECKPOINT_OUT "/latest/state.json", "wb", "");
    CHECK(at != NULL);
    fwrite(whole, 1, at == NULL ? 0 : (size_t)(at - whole), file);
    fputs(to, file);
    fputs(at == NULL ? "" : at + strlen(from), file);
    check_fclose(file, "state.json");
}

static void test_checkpoint_damaged(void) {
    static const char *const cases[][3] = {
        {"\"step\": 7", "\"steps\": 7", "\"step\" is missing"},
        {"\"step\": 7", "\"step\": -1", "\"step\" is missing or unusable"},
        {"\"step\": 7", "\"step\": 7.5", "\"step\" is unusable"},
        {"\"step\": 7", "\"step\": 9223372036854775807", "\"step\" is missing or unusable"},
        {"\"optimizer_step\": 1", "\"optimizer_step\": \"1\", \"x\": 1",
         "\"optimizer_step\" is missing or unusable"},
        {"\"optimizer_step\": 1", "\"optimizer_step\": 9999991", "\"optimizer_step\" is missing or unusable"},
        {"\"sequences\": ", "\"sequences\": null, \"x\": ", "\"sequences\" is missing or unusable"},
        {"\"lambda\": ", "\"lambda\": -", "\"lambda\" is missing or unusable"},
        {"\"lambda\": ", "\"lambda\": 0, \"x\": ", "\"lambda\" is missing or unusable"},
        {"\"lambda\": ", "\"lambda\": 1e300, \"x\": ", "\"lambda\" is missing or unusable"},
        {"\"lambda\": ", "\"x\": ", "\"lambda\" is missing"},
        {"\"stage\": 2", "\"stage\": 0", "\"stage\" is missing or unusable"},
        {"\"stage\": 2", "\"stage\": 4", "\"stage\" is missing or unusable"},
        {"\"stage\": 2", "\"stage\": 4294967298", "\"stage\" is missing or unusable"},
        {"\"min_sparsity\": 0", "\"min_sparsity\": 2", "\"min_sparsity\" is missing or unusable"},
        {"\"rising_steps\": 3", "\"rising_steps\": 2147483647", "\"rising_steps\" is missing or unusable"},
        {"\"stage2_step\": 5", "\"stage2_step\": -2", "\"stage2_step\" is missing or unusable"},
        {"\"stage3_step\": -1", "\"stage3_step\": []", "\"stage3_step\" is missing or unusable"},
        {"\"step\": 7", "\"step\": 7, \"step\": 8", "without repeated keys"},
        {"\"options\": {", "\"options\": null, \"x\": {", "\"options\" is not an object"},
        {"\"options\": {", "\"option\": {", "\"options\" is not an object"},
        {"\"hidden\": 8", "\"hidden\": 1", "hidden"},
        {"\"options\": {", "\"options\": {\"stesp\": 1, ", "stesp"},
        {"\"step\": 7", "\"step\" 7", "state.json is not valid JSON: line 2"},
    };
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    char *whole = check_read_file(CHECKPOINT_OUT "/latest/state.json", NULL, "");
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        checkpoint_edit_state(whole, cases[i][0], cases[i][1]);
        if (!check_dies(1, cases[i][2], checkpoint_load_latest, &m)) {
            printf("    %s -> %s\n", cases[i][0], cases[i][1]);
        }
    }
    CHECK(truncate(CHECKPOINT_OUT "/latest/state.json", 100) == 0);
    check_dies(1, "state.json is not valid JSON", checkpoint_load_latest, &m);
    CHECK(truncate(CHECKPOINT_OUT "/latest/optimizer.safetensors", 2000) == 0);
    check_dies(1, "/optimizer.safetensors is not a good safetensors file", checkpoint_load_latest, &m);
    free(whole);
    checkpoint_case_free(&m);
}

static void test_checkpoint(void) {
    test_checkpoint_round_trip();
    test_checkpoint_bf16();
    test_checkpoint_again();
    test_checkpoint_find();
    test_checkpoint_keep();
    test_checkpoint_interrupted(2);
    test_checkpoint_interrupted(0);
    test_checkpoint_stale();
    test_checkpoint_no_folder();
    test_checkpoint_foreign();
    test_checkpoint_damaged();
    CHECK(system("rm -rf " CHECKPOINT_OUT) == 0);
}

#endif
