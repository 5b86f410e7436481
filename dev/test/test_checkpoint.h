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
#include "llmc/files/dump.h"
#include "buffers.h"
#include "harness.h"

#define CHECKPOINT_OUT "build/test/checkpoint"

typedef struct {
    Config config;
    TensorTable table;
    Weights weights;
    float *params, *exp_avg, *exp_avg_sq;
    RunState state;
    Provenance provenance;
    Options options;
} CheckpointCase;

static void checkpoint_clean(void) {
    CHECK(system("rm -rf " CHECKPOINT_OUT " && mkdir -p " CHECKPOINT_OUT) == 0);
}

// what lies between the tensors is in no file: zeros, as in a model
static void checkpoint_fill(float *x, const TensorTable *table, int count, unsigned seed, float scale) {
    for (int i = 0; i < count; i++) {
        const Tensor *t = &table->tensors[i];
        fill_uniform(x + t->offset, (size_t)t->size, seed + 97u * (unsigned)i, scale);
    }
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
    size_t n = (size_t)m.table.flat_size;
    m.params = NEW(float, n);
    m.exp_avg = NEW(float, n);
    m.exp_avg_sq = NEW(float, n);
    checkpoint_fill(m.params, &m.table, m.table.count, seed, 1.0f);
    checkpoint_fill(m.exp_avg, &m.table, m.table.trained_count, seed + 1, 1e-3f);
    checkpoint_fill(m.exp_avg_sq, &m.table, m.table.trained_count, seed + 2,
                    1e-40f); // numbers that a careless reader would flush to 0
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
    table_free(&m->table);
    free(m->weights.layers);
}

static void checkpoint_save_to(const char *out, const CheckpointCase *m, const RunState *state) {
    Ranks alone = silent_rank(0, 1);
    FlatBuffer buffers[] = {host_buffer(&m->table, m->params), host_moments(&m->table, m->exp_avg),
                            host_moments(&m->table, m->exp_avg_sq)};
    checkpoint_save(&alone, out, &m->config, buffers, state, &m->provenance, &m->options, NULL);
}

static void checkpoint_save_case(const CheckpointCase *m, int64_t step) {
    RunState state = m->state;
    state.step = step;
    checkpoint_save_to(CHECKPOINT_OUT, m, &state);
    remove_oldest(CHECKPOINT_OUT, step, m->options.keep);
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
    float *params = NEW(float, m->table.flat_size);
    FlatBuffer buffer = host_buffer(&m->table, params);
    checkpoint_load_weights(&buffer, folder);
    int equal = memcmp(params, m->params, (size_t)m->table.flat_size * sizeof(float)) == 0;
    free(params);
    return equal;
}

// ----------------------------------------------------------------------------
// there and back

static int checkpoint_moments_equal(const CheckpointCase *m, const char *folder) {
    size_t n = (size_t)m->table.flat_size;
    float *a = NEW(float, n), *b = NEW(float, n);
    FlatBuffer moments[] = {host_moments(&m->table, a), host_moments(&m->table, b)};
    int found = checkpoint_load_moments(moments, folder);
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
    const char *path = "runs/\xe9t\xe9 \\xE9 \xc3\xa9/train_*.bin"; // no UTF-8, what stands for it, and UTF-8
    checkpoint_clean();
    check_format(m.options.train_data, sizeof(m.options.train_data), "%s", path);
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
    CHECK(strcmp(options.train_data, path) == 0);
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
    checkpoint_check_round_trip("--router auxfree --active 2");
}

// weights alone, rounded to bf16: an export, not a state to go on from. Biases are kept exactly
static void test_checkpoint_bf16(void) {
    CheckpointCase m = checkpoint_case("--router auxfree", 1);
    FlatBuffer buffer = host_buffer(&m.table, m.params);
    Ranks alone = silent_rank(0, 1);
    RunState state;
    checkpoint_clean();
    save_buffers(&alone, CHECKPOINT_OUT, "model.safetensors", &buffer, weight_prefix, 1, "BF16");
    for (int i = 0; i < m.table.trained_count; i++) {
        const Tensor *tensor = &m.table.tensors[i];
        for (int64_t j = tensor->offset; j < tensor->offset + tensor->size; j++) {
            m.params[j] = bf16_to_float(float_to_bf16(m.params[j]));
        }
    }
    CHECK(m.table.count == m.table.trained_count + 2);
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT));
    CHECK(checkpoint_load_state(&state, NULL, CHECKPOINT_OUT) == 0 &&
          !checkpoint_moments_equal(&m, CHECKPOINT_OUT));
    checkpoint_case_free(&m);
}

// whatever the options of an older run say, a checkpoint has all that the run needs to go on
static void test_checkpoint_always_whole(void) {
    CheckpointCase m = checkpoint_case("--save-dtype bf16", 1);
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT "/latest") &&
          checkpoint_moments_equal(&m, CHECKPOINT_OUT "/latest"));
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

// ----------------------------------------------------------------------------
// which checkpoint counts

static void checkpoint_find_missing(void *named) {
    char folder[PATH_SIZE];
    checkpoint_find(folder, (const char *)named, "build/test/nowhere");
}

// what the user named, and the checkpoint's folder
static void checkpoint_check_find(const char *named, const char *want) {
    char folder[PATH_SIZE];
    checkpoint_find(folder, named, CHECKPOINT_OUT);
    if (!CHECK(strcmp(folder, want) == 0)) {
        printf("    %s: %s, expected %s\n", named, folder, want);
    }
}

static void test_checkpoint_find(void) {
    const char *step = CHECKPOINT_OUT "/step_00000007";
    char latest[] = "latest", absent[] = "build/test/absent", empty[] = "build/test";
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    checkpoint_save_case(&m, 5);
    checkpoint_save_case(&m, 9);
    checkpoint_save_case(&m, 7);
    checkpoint_check_find("latest", step);
    checkpoint_check_find(CHECKPOINT_OUT, step); // a run's folder
    checkpoint_check_find(CHECKPOINT_OUT "/latest", step);
    checkpoint_check_find(CHECKPOINT_OUT "/step_00000007", step);
    checkpoint_check_find(CHECKPOINT_OUT "/step_00000007/", step);
    check_dies(1, "no checkpoint in build/test/nowhere", checkpoint_find_missing, latest);
    check_dies(1, "no checkpoint in build/test/absent", checkpoint_find_missing, absent);
    check_dies(1, "there is no build/test/config.json", checkpoint_find_missing, empty);
    checkpoint_case_free(&m);
}

static void checkpoint_find_run(void *want) {
    checkpoint_check_find(CHECKPOINT_OUT, (const char *)want);
    checkpoint_check_find("latest", (const char *)want);
    checkpoint_check_find(CHECKPOINT_OUT "/latest", (const char *)want);
    CHECK(run_in_folder(CHECKPOINT_OUT) != NULL); // no place for another run
    _exit(tally.failures != 0);                   // the tally of a child is not its parent's
}

// the checkpoint that counts after a command in the run's folder, and whether it goes without saying
static void checkpoint_check_latest(const char *command, const char *name, const char *warning) {
    char words[512], want[PATH_SIZE], output[4096];
    check_format(words, sizeof(words), "cd " CHECKPOINT_OUT " && %s", command);
    check_format(want, sizeof(want), CHECKPOINT_OUT "/%s", name);
    CHECK(system(words) == 0);
    int failures = tally.failures;
    tally.failures = 0;
    int status = run_in_child(checkpoint_find_run, want, output, sizeof(output));
    tally.failures = failures;
    int said = strstr(output, "warning: ") != NULL;
    if (!CHECK(status == 0 && (warning[0] == '\0' ? !said : strstr(output, warning) != NULL))) {
        printf("    %s: %s\n", command, output);
    }
}

// `latest` in all its forms
static void test_checkpoint_latest(void) {
    CheckpointCase m = checkpoint_case("--keep 0", 1);
    checkpoint_clean();
    for (int64_t step = 99999998; step <= 100000000; step += 2) { // names that do not sort as numbers do
        checkpoint_save_case(&m, step);
    }
    const char *low = "step_99999998", *high = "step_100000000";
    checkpoint_check_latest("ln -sfn step_99999998 latest", low, "");
    checkpoint_check_latest("rm latest", high,
                            "/latest is missing: taking " CHECKPOINT_OUT "/step_100000000");
    checkpoint_check_latest("ln -s gone latest", high, "/latest leads nowhere: taking ");
    checkpoint_check_latest("ln -sfn step_7 latest", high, "/latest leads nowhere: taking ");
    checkpoint_check_latest("ln -sfn latest latest", high, "/latest leads nowhere: taking ");
    checkpoint_check_latest("mkdir step_200000000 && touch step_200000000/config.json", high, "nowhere");
    checkpoint_check_latest("rm -r step_200000000 latest && echo step_99999998 > latest", low, "");
    checkpoint_check_latest("printf 'step_99999998\\r\\n' > latest", low, "");
    checkpoint_check_latest("echo step_7 > latest", high, "/latest leads nowhere");
    checkpoint_check_latest("echo ../../../etc > latest", high, "/latest leads nowhere");
    checkpoint_check_latest("rm latest && cp -r step_99999998 latest", "latest", "");
    mend_run(CHECKPOINT_OUT); // the copy of a checkpoint that is there
    CHECK(checkpoint_latest_is(low) && checkpoint_has("step_99999998/state.json") && checkpoint_is_tidy());
    checkpoint_check_latest("rm latest && mv step_99999998 latest", "latest", "");
    mend_run(CHECKPOINT_OUT); // the only one of its step
    CHECK(checkpoint_latest_is(low) && checkpoint_has("step_99999998/state.json") && checkpoint_is_tidy());
    checkpoint_case_free(&m);
}

static void checkpoint_mend(void *unused) {
    (void)unused;
    mend_run(CHECKPOINT_OUT);
}

// killed between the two renames of a file system that cannot exchange names: neither is lost
static void test_checkpoint_aside(void) {
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    checkpoint_check_latest("mv step_00000007 step_00000007.old", "step_00000007.old", "leads nowhere");
    mend_run(CHECKPOINT_OUT);
    CHECK(checkpoint_has("step_00000007/state.json") && !checkpoint_has("step_00000007.old"));
    checkpoint_check_latest("mkdir step_00000007.old && touch step_00000007.old/config.json", "step_00000007",
                            "");
    mend_run(CHECKPOINT_OUT); // half removed, beside the one that took its place
    CHECK(checkpoint_has("step_00000007/state.json") && !checkpoint_has("step_00000007.old"));
    checkpoint_check_latest(
        "rm latest && cp -r step_00000007 latest && echo '{\"step\":7}' > latest/state.json", "latest", "");
    check_dies(1, "are two checkpoints of step 7\n  ---> ", checkpoint_mend, NULL);
    checkpoint_case_free(&m);
}

static void checkpoint_touch(const char *run, int64_t step, int minute) {
    char command[512];
    check_format(command, sizeof(command),
                 "mkdir -p " CHECKPOINT_OUT "/%s/step_%lld && touch -d '2001-01-01 00:%02d' " CHECKPOINT_OUT
                 "/%s/step_%lld/model.safetensors",
                 run, (long long)step, minute, run, (long long)step);
    CHECK(system(command) == 0);
}

// `--resume latest`: whatever the names
static void test_checkpoint_newest_run(void) {
    char out[PATH_SIZE];
    checkpoint_clean();
    CHECK(!newest_run(out, CHECKPOINT_OUT) && !newest_run(out, CHECKPOINT_OUT "/absent"));
    checkpoint_touch("tiny-relu", 300, 10);
    checkpoint_touch("small-topk-2", 5, 30);
    checkpoint_touch("small-topk-2", 9, 20);
    checkpoint_touch("x", 1, 29);
    checkpoint_touch(".hidden", 1, 40);
    CHECK(newest_run(out, CHECKPOINT_OUT) && strcmp(out, CHECKPOINT_OUT "/small-topk-2") == 0);
    checkpoint_touch("tiny-relu", 300, 31);
    CHECK(newest_run(out, CHECKPOINT_OUT) && strcmp(out, CHECKPOINT_OUT "/tiny-relu") == 0);
}

// ----------------------------------------------------------------------------
// which run, which data

static void test_checkpoint_provenance(void) {
    ShardRecord shards[2] = {{"train \"0\".bin", 2048, 0xfedcba9876543210}, {"b.bin", 1024, 1}};
    Provenance back, none = {0, NULL, 0};
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    m.provenance.run = draw_run();
    m.provenance.shards = shards;
    m.provenance.num_shards = 2;
    CHECK(m.provenance.run != 0 && draw_run() != m.provenance.run);
    checkpoint_save_case(&m, 7);
    checkpoint_load_provenance(&back, CHECKPOINT_OUT "/latest");
    CHECK(back.run == m.provenance.run && back.num_shards == 2);
    CHECK(memcmp(back.shards, shards, sizeof(shards)) == 0 && first_other_shard(&back, &m.provenance) < 0);
    CHECK(peek_run(CHECKPOINT_OUT "/latest/state.json") == back.run);
    provenance_free(&back);
    m.provenance = none; // a checkpoint from before
    checkpoint_save_case(&m, 8);
    checkpoint_load_provenance(&back, CHECKPOINT_OUT "/latest");
    CHECK(back.run == 0 && back.num_shards == 0 && peek_run(CHECKPOINT_OUT "/latest/state.json") == 0);
    provenance_free(&back);
    CHECK(system("echo '{\"run\": 5' > " CHECKPOINT_OUT "/latest/state.json") == 0);
    CHECK(peek_run(CHECKPOINT_OUT "/latest/state.json") == 0 && peek_run(CHECKPOINT_OUT "/absent") == 0);
    checkpoint_case_free(&m);
}

typedef struct {
    Provenance before, now;
    int chosen;
} CheckpointData;

static void checkpoint_compare_data(void *data) {
    CheckpointData *d = (CheckpointData *)data;
    check_same_data(&d->before, &d->now, d->chosen);
    printf("done");
}

static void test_checkpoint_other_data(void) {
    ShardRecord three[3] = {{"a.bin", 2048, 7}, {"b.bin", 1024, 1}, {"c.bin", 1024, 2}}, other[3];
    static const struct {
        int before, now, shard;
        ShardRecord as;
        const char *text;
    } cases[] = {
        {2, 2, 0, {"a.bin", 2048, 7}, "done"},
        {0, 2, 0, {"x.bin", 2, 7}, "done"}, // of a run that kept no record
        {2,
         2,
         0,
         {"x.bin", 2048, 7},
         "warning: the training data are the same under other names: x.bin was a.bin"},
        {2, 3, 0, {"a.bin", 2048, 7}, "(2 shards, now 3): c.bin is new"},
        {3, 2, 0, {"a.bin", 2048, 7}, "(3 shards, now 2): c.bin is gone"},
        {2, 2, 1, {"b.bin", 1024, 9}, "b.bin holds other tokens"},
        {2, 2, 1, {"b.bin", 2048, 1}, "b.bin was 1024 bytes, now 2048"},
        {2, 2, 1, {"x.bin", 2048, 1}, "shard 2 was b.bin, now x.bin"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        memcpy(other, three, sizeof(three));
        other[cases[i].shard] = cases[i].as;
        CheckpointData d = {{1, three, cases[i].before}, {1, other, cases[i].now}, 0};
        char output[2048];
        int status = run_in_child(checkpoint_compare_data, &d, output, sizeof(output));
        CHECK(status == (i >= 3) && strstr(output, cases[i].text) != NULL);
        CHECK(i < 3 || strstr(output, "\n  ---> ") != NULL);
        d.chosen = 1; // the user has named other data
        status = run_in_child(checkpoint_compare_data, &d, output, sizeof(output));
        CHECK(status == 0 && strstr(output, cases[i].text) != NULL);
    }
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
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    CHECK(system("cd " CHECKPOINT_OUT
                 " && mkdir .tmp_step_00000007 && echo half > .tmp_step_00000007/tokenizer.json") == 0);
    checkpoint_save_case(&m, 7);
    CHECK(checkpoint_is_tidy() && checkpoint_has("step_00000007") &&
          !checkpoint_has("step_00000007/tokenizer.json"));
    checkpoint_case_free(&m);
}

static void checkpoint_save_below_file(void *m) {
    const CheckpointCase *c = (const CheckpointCase *)m;
    checkpoint_save_to(CHECKPOINT_OUT "/file/run", c, &c->state);
}

static void test_checkpoint_no_folder(void) {
    CheckpointCase m = checkpoint_case("", 1);
    checkpoint_clean();
    CHECK(system("touch " CHECKPOINT_OUT "/file") == 0);
    check_dies(1, "cannot make the folder " CHECKPOINT_OUT "/file/run", checkpoint_save_below_file, &m);
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// several ranks: each its own ranges of the same buffers and files

enum { MOST_RANKS = 4, MOST_CUTS = 400 };

// who keeps what: a flat buffer of `size` cut at random places, each part given to one of the ranks
typedef struct {
    int count; // of ranks
    Range ranges[MOST_RANKS][MOST_CUTS];
    int num_ranges[MOST_RANKS];
} Division;

static int64_t draw_below(unsigned *seed, int64_t n) {
    *seed += 1;
    return (int64_t)(rng_bits(*seed, 11, 0) % (uint64_t)n);
}

static void division_draw(Division *d, int64_t size, int ranks, int64_t longest, unsigned seed) {
    memset(d, 0, sizeof(*d));
    d->count = ranks;
    for (int64_t first = 0, n; first < size; first += n) {
        int rank = (int)draw_below(&seed, ranks), *count = &d->num_ranges[rank];
        n = draw_below(&seed, 8) == 0 ? 0 : 1 + draw_below(&seed, longest);
        n = n < size - first ? n : size - first;
        if (*count == MOST_CUTS - 1) {
            n = size - first;
        }
        Range range = {first, n};
        d->ranges[rank][(*count)++] = range;
    }
}

static FlatBuffer division_buffer(const Division *d, int rank, const TensorTable *table, float *values) {
    FlatBuffer buffer = host_buffer(table, values);
    buffer.ranges = d->ranges[rank];
    buffer.count = d->num_ranges[rank];
    return buffer;
}

// The same tensors elsewhere in the buffer: last to first, with gaps. What values [flat_size] the tensors
// had moves along into a new buffer; the gaps are NaN
static float *checkpoint_spread(TensorTable *table, const float *values) {
    int64_t size = 0, n = 2 * table->flat_size + 64 * table->count;
    float *spread = NEW(float, n);
    for (int64_t i = 0; i < n; i++) {
        spread[i] = NAN;
    }
    for (int i = table->count - 1; i >= 0; i--) {
        Tensor *tensor = &table->tensors[i];
        size += 1 + (13 * i) % 63;
        memcpy(spread + size, values + tensor->offset, (size_t)tensor->size * sizeof(float));
        tensor->offset = size;
        size += tensor->size;
    }
    table->flat_size = size + 7;
    return spread;
}

// is each element of each tensor in one piece of one rank, and nothing else in any?
static void checkpoint_check_pieces(const TensorTable *table, const Division *d) {
    unsigned char *seen = NEW(unsigned char, table->flat_size);
    int64_t wrong = 0, pieces = 0;
    for (int rank = 0; rank < d->count; rank++) {
        FlatBuffer buffer = division_buffer(d, rank, table, NULL);
        for (int i = 0; i < table->count; i++) {
            const Tensor *tensor = &table->tensors[i];
            for (Piece p = before_first_piece; next_piece(&p, tensor, &buffer); pieces++) {
                const Range *range = &buffer.ranges[p.range];
                wrong += p.n <= 0 || p.n > MOST_IN_PIECE || p.element < 0 || p.element + p.n > tensor->size;
                wrong += p.first != tensor->offset + p.element;
                wrong += p.first < range->first || p.first + p.n > range->first + range->size;
                for (int64_t j = 0; j < p.n && wrong == 0; j++) {
                    seen[p.first + j]++;
                }
            }
        }
    }
    for (int i = 0; i < table->count; i++) {
        for (int64_t j = 0; j < table->tensors[i].size; j++) {
            unsigned char *element = &seen[table->tensors[i].offset + j];
            wrong += *element != 1;
            *element = 0;
        }
    }
    for (int64_t j = 0; j < table->flat_size; j++) {
        wrong += seen[j] != 0; // between the tensors
    }
    if (!CHECK(wrong == 0 && pieces > 0)) {
        printf("    %d ranks: %lld of %lld wrong\n", d->count, (long long)wrong, (long long)table->flat_size);
    }
    free(seen);
}

static void test_checkpoint_pieces(void) {
    CheckpointCase m = checkpoint_case("", 1);
    Division *d = NEW(Division, 1);
    Tensor large[2] = {{"a", 1, {MOST_IN_PIECE + 5}, 3, MOST_IN_PIECE + 5, 0.0f, 0},
                       {"b", 1, {3 * MOST_IN_PIECE}, MOST_IN_PIECE + 9, 3 * MOST_IN_PIECE, 0.0f, 0}};
    TensorTable larger;
    memset(&larger, 0, sizeof(larger));
    larger.tensors = large;
    larger.count = 2;
    larger.flat_size = 4 * MOST_IN_PIECE + 20;
    float *spread = checkpoint_spread(&m.table, m.params);
    for (unsigned seed = 0; seed < 200; seed++) {
        int64_t longest = seed % 3 == 0 ? 3000 : seed % 3 == 1 ? 200 : 40;
        division_draw(d, m.table.flat_size, 1 + (int)seed % MOST_RANKS, longest, 1000 * seed);
        checkpoint_check_pieces(&m.table, d);
    }
    for (unsigned seed = 0; seed < 6; seed++) {
        division_draw(d, larger.flat_size, 1 + (int)seed % MOST_RANKS, 2 * MOST_IN_PIECE, seed);
        checkpoint_check_pieces(&larger, d);
    }
    FlatBuffer nothing = host_buffer(&m.table, NULL);
    Piece piece = before_first_piece;
    nothing.count = 0;
    CHECK(!next_piece(&piece, &m.table.tensors[0], &nothing));
    free(spread);
    free(d);
    checkpoint_case_free(&m);
}

// what save_buffers does, the ranks one after the other; returns the bytes that all have written
static uint64_t checkpoint_save_divided(const char *path, const Division *d, const TensorTable *table,
                                        float *const *values, int count) {
    SafetensorsWriter w[MOST_RANKS];
    uint64_t written = 0;
    for (int rank = 0; rank < d->count; rank++) {
        safetensors_writer_open(&w[rank], path);
        for (int b = 0; b < count; b++) {
            FlatBuffer buffer = division_buffer(d, rank, table, values[b]);
            declare_buffer(&w[rank], &buffer, count == 1 ? weight_prefix[0] : moment_prefixes[b], "F32");
        }
        if (rank == 0) {
            safetensors_create(&w[rank]);
        } else {
            safetensors_join(&w[rank]);
        }
    }
    for (int rank = d->count - 1; rank >= 0; rank--) {
        for (int b = 0; b < count; b++) {
            FlatBuffer buffer = division_buffer(d, rank, table, values[b]);
            write_buffer(&w[rank], (size_t)b * (size_t)table->count, &buffer);
        }
        safetensors_close_file(&w[rank]);
        CHECK(w[rank].report.error == 0);
        written += w[rank].report.written;
    }
    newfile_place(&w[0].name);
    return written;
}

// the case's three buffers with the tensors in other places
typedef struct {
    TensorTable table;
    float *buffers[3]; // parameters, exp_avg, exp_avg_sq
} SpreadCase;

static SpreadCase checkpoint_spread_case(CheckpointCase *m) {
    const float *from[3] = {m->params, m->exp_avg, m->exp_avg_sq};
    SpreadCase spread;
    for (int b = 0; b < 3; b++) {
        spread.table = m->table;
        spread.table.tensors = GROW(Tensor, NULL, m->table.count);
        memcpy(spread.table.tensors, m->table.tensors, (size_t)m->table.count * sizeof(Tensor));
        spread.buffers[b] = checkpoint_spread(&spread.table, from[b]);
        if (b < 2) {
            free(spread.table.tensors);
        }
    }
    return spread;
}

static void spread_case_free(SpreadCase *spread) {
    for (int b = 0; b < 3; b++) {
        free(spread->buffers[b]);
    }
    free(spread->table.tensors);
}

// each rank loads its ranges into the same memory: all of the tensors, and nothing between them
static void checkpoint_check_load_divided(const char *folder, const Division *d, const SpreadCase *want) {
    const TensorTable *table = &want->table;
    size_t bytes = (size_t)table->flat_size * sizeof(float);
    float *loaded[3];
    int64_t wrong = 0;
    for (int b = 0; b < 3; b++) {
        loaded[b] = (float *)memset(NEW(float, table->flat_size), 0xff, bytes);
    }
    for (int rank = 0; rank < d->count; rank++) {
        FlatBuffer weights = division_buffer(d, rank, table, loaded[0]);
        FlatBuffer moments[2] = {division_buffer(d, rank, table, loaded[1]),
                                 division_buffer(d, rank, table, loaded[2])};
        checkpoint_load_weights(&weights, folder);
        CHECK(checkpoint_load_moments(moments, folder) == 1);
    }
    for (int b = 0; b < 3; b++) {
        for (int i = 0; i < table->count; i++) {
            const Tensor *t = &table->tensors[i];
            float *x = loaded[b] + t->offset;
            wrong += memcmp(x, want->buffers[b] + t->offset, (size_t)t->size * sizeof(float)) != 0;
            memset(x, 0xff, (size_t)t->size * sizeof(float));
        }
        for (size_t i = 0; i < bytes; i++) {
            wrong += ((unsigned char *)loaded[b])[i] != 0xff;
        }
        free(loaded[b]);
    }
    CHECK(wrong == 0);
}

// files and buffers do not tell how many ranks there are, nor where in memory a tensor lies
static void test_checkpoint_divided(void) {
    const char *folder = CHECKPOINT_OUT "/divided";
    const char *model = CHECKPOINT_OUT "/divided/model.safetensors";
    const char *optimizer = CHECKPOINT_OUT "/divided/optimizer.safetensors";
    CheckpointCase m = checkpoint_case("", 1);
    SpreadCase spread = checkpoint_spread_case(&m);
    Division *d = NEW(Division, 1);
    uint64_t bytes = (uint64_t)m.table.num_params * sizeof(float);
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    make_folder(folder);
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        division_draw(d, spread.table.flat_size, ranks, 300, (unsigned)ranks);
        CHECK(checkpoint_save_divided(model, d, &spread.table, &spread.buffers[0], 1) == bytes);
        CHECK(checkpoint_save_divided(optimizer, d, &spread.table, &spread.buffers[1], 2) == 2 * bytes);
        CHECK(same_file(CHECKPOINT_OUT "/latest", folder, "model.safetensors"));
        CHECK(same_file(CHECKPOINT_OUT "/latest", folder, "optimizer.safetensors"));
        checkpoint_check_load_divided(folder, d, &spread);
    }
    spread_case_free(&spread);
    free(d);
    checkpoint_case_free(&m);
}

// the first values that all ranks together draw are those of one
static void test_checkpoint_init_divided(void) {
    CheckpointCase m = checkpoint_case("", 1);
    Division *d = NEW(Division, 1);
    FlatBuffer whole = host_buffer(&m.table, m.params);
    model_init(&whole, 5);
    for (int ranks = 1; ranks <= MOST_RANKS; ranks++) {
        float *values = NEW(float, m.table.flat_size);
        division_draw(d, m.table.flat_size, ranks, 100, (unsigned)ranks);
        for (int rank = 0; rank < ranks; rank++) {
            FlatBuffer part = division_buffer(d, rank, &m.table, values);
            model_init(&part, 5);
        }
        CHECK(memcmp(values, m.params, (size_t)m.table.flat_size * sizeof(float)) == 0);
        free(values);
    }
    free(d);
    checkpoint_case_free(&m);
}

// a dump of two ranks: the rows of the second follow those of the first
static void test_checkpoint_dump_divided(void) {
    enum { N = 3 };
    CheckpointCase m = checkpoint_case("", 1);
    int64_t V = m.config.vocab_size, E = m.config.router.experts, L = m.config.layers;
    float scalars[DUMP_SCALARS] = {1, 2, 3, 4}, *rows = NEW(float, 2 * N * (V + L * E));
    const float *gates[2][8];
    Division *d = NEW(Division, 1);
    SafetensorsWriter w[2];
    fill_uniform(rows, (size_t)(2 * N * (V + L * E)), 3, 1.0f);
    division_draw(d, m.table.flat_size, 2, 100, 1);
    for (int rank = 0; rank < 2; rank++) {
        for (int64_t l = 0; l < L; l++) {
            gates[rank][l] = rows + 2 * N * V + (2 * l + rank) * N * E;
        }
        Dump dump = {N,           scalars,     rows + rank * N * V,
                     gates[rank], gates[rank], division_buffer(d, rank, &m.table, m.params)};
        safetensors_writer_open(&w[rank], "build/test/divided.dump");
        dump_declare(&w[rank], &m.config, &dump, 2);
        if (rank == 0) {
            safetensors_create(&w[rank]);
        } else {
            safetensors_join(&w[rank]);
        }
        dump_put(&w[rank], &m.config, &dump, rank);
        safetensors_close_file(&w[rank]);
    }
    CHECK(w[0].report.written + w[1].report.written == w[0].total);
    newfile_place(&w[0].name);
    Ranks alone = silent_rank(0, 1);
    for (int64_t l = 0; l < L; l++) {
        gates[0][l] = rows + 2 * N * V + 2 * l * N * E;
    }
    Dump together = {2 * N, scalars, rows, gates[0], gates[0], host_buffer(&m.table, m.params)};
    dump_write(&alone, "build/test/together.dump", &m.config, &together);
    CHECK(system("cmp build/test/divided.dump build/test/together.dump") == 0);
    for (int rank = 0; rank < 2; rank++) {
        Ranks ranks = silent_rank(rank, 2);
        float **routes = dump_read_routes(&ranks, "build/test/together.dump", &m.config, N);
        for (int64_t l = 0; l < L; l++) {
            const float *want = rows + 2 * N * V + (2 * l + rank) * N * E;
            CHECK(memcmp(routes[l], want, (size_t)(N * E) * sizeof(float)) == 0);
        }
        free_layer_matrices(routes);
    }
    unlink("build/test/divided.dump");
    unlink("build/test/together.dump");
    free(rows);
    free(d);
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// several ranks: one of them fails

#define FAILED_FOLDER CHECKPOINT_OUT "/.tmp_failed"

typedef struct {
    Ranks ranks;
    WriteReport reports[MOST_RANKS];
    int unseen[MOST_RANKS];
} FailedSave;

static void checkpoint_judge_reports(void *failed) {
    FailedSave *f = (FailedSave *)failed;
    SafetensorsWriter w;
    safetensors_writer_open(&w, FAILED_FOLDER "/model.safetensors");
    w.folder = FAILED_FOLDER;
    w.total = 100;
    check_reports(&w, &f->ranks, f->reports);
}

static void checkpoint_judge_unseen(void *failed) {
    FailedSave *f = (FailedSave *)failed;
    refuse_unseen(&f->ranks, FAILED_FOLDER, f->unseen);
}

// what every rank says is the same; the folder goes once, by rank 0
static void checkpoint_check_failed(FailedSave *f, void (*judge)(void *), const char *text) {
    for (f->ranks.rank = f->ranks.count - 1; f->ranks.rank >= 0; f->ranks.rank--) {
        CHECK(system("mkdir -p " FAILED_FOLDER " && touch " FAILED_FOLDER "/model.safetensors.tmp") == 0);
        check_dies(1, text, judge, f);
        CHECK(path_exists(FAILED_FOLDER) == (f->ranks.rank != 0));
    }
}

static void test_checkpoint_rank_fails(void) {
    FailedSave f;
    memset(&f, 0, sizeof(f));
    f.ranks.count = 3;
    checkpoint_clean();
    f.reports[0].written = 50;
    f.reports[2].written = 50;
    CHECK(run_in_child(checkpoint_judge_reports, &f, NULL, 0) == 0);
    CHECK(run_in_child(checkpoint_judge_unseen, &f, NULL, 0) == 0);
    f.reports[2].error = ENOSPC;
    checkpoint_check_failed(&f, checkpoint_judge_reports,
                            "rank 2 cannot write " FAILED_FOLDER
                            "/model.safetensors: No space left on device\n  ---> free some disk space");
    f.reports[1].error = ENOENT;
    f.reports[1].unopened = 1;
    checkpoint_check_failed(&f, checkpoint_judge_reports,
                            "rank 1 cannot write " FAILED_FOLDER "/model.safetensors: No such file or "
                            "directory\n  ---> choose a folder on a file system that all machines share");
    f.reports[1].error = f.reports[2].error = 0;
    f.reports[1].written = 1;
    checkpoint_check_failed(&f, checkpoint_judge_reports, "101 bytes of its tensors were written, 100 were");
    f.unseen[2] = 1;
    checkpoint_check_failed(&f, checkpoint_judge_unseen,
                            "rank 2 does not see " FAILED_FOLDER ", which rank 0 has made\n"
                            "  ---> --out must be on a file system that all machines share");
}

// a folder is known by the number in it, not by its name
static void test_checkpoint_token(void) {
    checkpoint_clean();
    CHECK(read_token(CHECKPOINT_OUT) == 0 && read_token(CHECKPOINT_OUT "/absent") == 0);
    write_token(CHECKPOINT_OUT, 0x123456789abcdef0);
    CHECK(read_token(CHECKPOINT_OUT) == 0x123456789abcdef0 && checkpoint_is_tidy());
    CHECK(truncate(CHECKPOINT_OUT "/.ranks", 7) == 0);
    CHECK(read_token(CHECKPOINT_OUT) == 0);
}

// a second rank whose disk takes less than its part: the first failure is what it reports
static void checkpoint_write_little(void *m) {
    const CheckpointCase *c = (const CheckpointCase *)m;
    struct rlimit limit = {2000, 2000};
    FlatBuffer buffer = host_buffer(&c->table, c->params);
    SafetensorsWriter w;
    safetensors_writer_open(&w, CHECKPOINT_OUT "/model.safetensors");
    declare_buffer(&w, &buffer, "", "F32");
    safetensors_join(&w);
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
    write_buffer(&w, 0, &buffer);
    safetensors_close_file(&w);
    _exit(w.report.error == EFBIG && !w.report.unopened ? 0 : 1);
}

static void test_checkpoint_second_disk_full(void) {
    CheckpointCase m = checkpoint_case("", 1);
    FlatBuffer buffer = host_buffer(&m.table, m.params);
    SafetensorsWriter w;
    checkpoint_clean();
    safetensors_writer_open(&w, CHECKPOINT_OUT "/model.safetensors");
    declare_buffer(&w, &buffer, "", "F32");
    safetensors_create(&w);
    struct stat status;
    CHECK(stat(CHECKPOINT_OUT "/model.safetensors.tmp", &status) == 0);
    CHECK((uint64_t)status.st_size == w.data_start + w.total); // whatever is written when
    CHECK(run_in_child(checkpoint_write_little, &m, NULL, 0) == 0);
    safetensors_close_file(&w);
    safetensors_writer_open(&w, CHECKPOINT_OUT "/absent.safetensors"); // nobody has made it
    safetensors_join(&w);
    safetensors_close_file(&w);
    CHECK(w.report.error == ENOENT && w.report.unopened);
    checkpoint_case_free(&m);
}

// ----------------------------------------------------------------------------
// folders by others

// m's tensors last to first, one named `extra` between them, every second in BF16; without one of them
// (or -1)
static void checkpoint_write_foreign(const CheckpointCase *m, int without, const char *extra) {
    const int64_t shape[2] = {2, 3};
    const float unknown[6] = {0};
    Ranks alone = silent_rank(0, 1);
    size_t tensor = 0;
    SafetensorsWriter w;
    safetensors_writer_open(&w, CHECKPOINT_OUT "/model.safetensors");
    for (int i = m->table.count - 1; i >= 0; i--) {
        const Tensor *t = &m->table.tensors[i];
        if (i != without) {
            safetensors_declare(&w, t->name, i % 2 ? "BF16" : "F32", t->ndim, t->shape);
        }
        if (i == 2) {
            safetensors_declare(&w, extra, "F32", 2, shape);
        }
    }
    safetensors_begin(&w, &alone);
    for (int i = m->table.count - 1; i >= 0; i--) {
        const Tensor *t = &m->table.tensors[i];
        if (i != without) {
            safetensors_write_at(&w, tensor++, 0, m->params + t->offset, (uint64_t)t->size);
        }
        if (i == 2) {
            safetensors_write_at(&w, tensor++, 0, unknown, 6);
        }
    }
    safetensors_finish(&w, &alone);
}

static void checkpoint_load_foreign(void *m) {
    checkpoint_weights_equal((const CheckpointCase *)m, CHECKPOINT_OUT);
}

static void checkpoint_load_unused_moments(void *m) {
    const CheckpointCase *c = (const CheckpointCase *)m;
    checkpoint_moments_equal(c, CHECKPOINT_OUT "/latest");
}

// moments of tensors that the model does not have
static void test_checkpoint_unused_moments(void) {
    static const char *const prefixes[] = {"exp_avg.", "exp_avg_sq.", "max_exp_avg_sq."};
    CheckpointCase m = checkpoint_case("", 1);
    FlatBuffer buffers[] = {host_buffer(&m.table, m.exp_avg), host_buffer(&m.table, m.exp_avg_sq),
                            host_buffer(&m.table, m.exp_avg)};
    Ranks alone = silent_rank(0, 1);
    char text[256];
    checkpoint_clean();
    checkpoint_save_case(&m, 7);
    save_buffers(&alone, CHECKPOINT_OUT "/latest", "optimizer.safetensors", buffers, prefixes, 3, "F32");
    check_format(text, sizeof(text),
                 "has tensors that the model of config.json does not use (%d): max_exp_avg_sq.",
                 m.table.count);
    check_dies(1, text, checkpoint_load_unused_moments, &m);
    checkpoint_case_free(&m);
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
    checkpoint_write_foreign(&m, -1,
                             "model.layers.0.self_attn.rotary_emb.inv_freq"); // it follows from rope_theta
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT));
    check_dies(1, "tensor model.embed_tokens.weight has shape [11, 8], expected [11, 16]",
               checkpoint_load_foreign, &wider);
    checkpoint_write_foreign(&m, 4, "x");
    check_dies(1, "has no tensor model.layers.0.self_attn.v_proj.weight, expected with shape [4, 8]",
               checkpoint_load_foreign, &m);
    for (int i = 0; i < 3; i++) { // a model that has these is another one
        static const char *const unused[] = {"model.layers.0.self_attn.v_proj.bias",
                                             "model.layers.1.self_attn.q_norm.weight",
                                             "model.layers.2.input_layernorm.weight"};
        char text[256];
        check_format(text, sizeof(text),
                     "has tensors that the model of config.json does not use (1): %s\n  ---> ", unused[i]);
        checkpoint_write_foreign(&m, -1, unused[i]);
        check_dies(1, text, checkpoint_load_foreign, &m);
    }
    CHECK(truncate(CHECKPOINT_OUT "/model.safetensors", 3000) == 0);
    check_dies(1, CHECKPOINT_OUT "/model.safetensors is not a good safetensors file", checkpoint_load_foreign,
               &m);
    unlink(CHECKPOINT_OUT "/model.safetensors");
    check_dies(1, "cannot open " CHECKPOINT_OUT "/model.safetensors", checkpoint_load_foreign, &m);
    checkpoint_case_free(&m);
    checkpoint_case_free(&wider);
}

// every second tensor of m, from the first or the second on, in CHECKPOINT_OUT/NAME
static void checkpoint_write_shard(const CheckpointCase *m, const char *name, int first) {
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    char path[PATH_SIZE];
    check_format(path, sizeof(path), CHECKPOINT_OUT "/%s", name);
    safetensors_writer_open(&w, path);
    for (int i = first; i < m->table.count; i += 2) {
        const Tensor *t = &m->table.tensors[i];
        safetensors_declare(&w, t->name, "F32", t->ndim, t->shape);
    }
    safetensors_begin(&w, &alone);
    for (int i = first; i < m->table.count; i += 2) {
        const Tensor *t = &m->table.tensors[i];
        safetensors_write_at(&w, (size_t)(i / 2), 0, m->params + t->offset, (uint64_t)t->size);
    }
    safetensors_finish(&w, &alone);
}

// the index of the files a and b; without one tensor (or -1)
static void checkpoint_write_index(const CheckpointCase *m, const char *a, const char *b, int without) {
    FILE *file = fopen(CHECKPOINT_OUT "/model.safetensors.index.json", "wb");
    fputs("{\"metadata\": {\"total_size\": 1}, \"weight_map\": {", file);
    for (int i = 0, written = 0; i < m->table.count; i++) {
        if (i != without) {
            fprintf(file, "%s\"%s\": \"%s\"", written++ ? ", " : "", m->table.tensors[i].name, i % 2 ? b : a);
        }
    }
    fputs("}}", file);
    fclose(file);
}

static void checkpoint_write_text(const char *name, const char *text) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), CHECKPOINT_OUT "/%s", name);
    FILE *file = check_fopen(path, "wb", "");
    fputs(text, file);
    check_fclose(file, path);
}

static void checkpoint_check_shards_refused(CheckpointCase *m) {
    const char *a = "model-00001-of-00002.safetensors", *b = "model-00002-of-00002.safetensors";
    checkpoint_write_index(m, a, b, 4);
    check_dies(1, "model.safetensors.index.json knows 20 tensors, its files hold 21", checkpoint_load_foreign,
               m);
    checkpoint_write_index(m, b, a, -1);
    check_dies(1, "has no tensor model.embed_tokens.weight, which " CHECKPOINT_OUT, checkpoint_load_foreign,
               m);
    checkpoint_write_index(m, a, "../checkpoint/model-00002-of-00002.safetensors", -1);
    check_dies(1, "expected a file of the same folder", checkpoint_load_foreign, m);
    checkpoint_write_index(m, a, "absent.safetensors", -1);
    check_dies(1, "cannot open " CHECKPOINT_OUT "/absent.safetensors", checkpoint_load_foreign, m);
    checkpoint_write_text("model.safetensors.index.json", "{\"weight_map\": {}}");
    check_dies(1, "expected \"weight_map\": {TENSOR: FILE, ...}", checkpoint_load_foreign, m);
    checkpoint_write_text("model.safetensors.index.json", "{\"weight_map\": {");
    check_dies(1, "is not valid JSON", checkpoint_load_foreign, m);
}

// large models by others: several files and an index
static void test_checkpoint_shards(void) {
    CheckpointCase m = checkpoint_case("", 1), other = checkpoint_case("", 2);
    checkpoint_clean();
    checkpoint_write_shard(&m, "model-00001-of-00002.safetensors", 0);
    checkpoint_write_shard(&m, "model-00002-of-00002.safetensors", 1);
    checkpoint_write_index(&m, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", -1);
    CHECK(checkpoint_weights_equal(&m, CHECKPOINT_OUT) && !checkpoint_weights_equal(&other, CHECKPOINT_OUT));
    checkpoint_check_shards_refused(&m);
    checkpoint_write_foreign(&other, -1, "model.layers.0.self_attn.rotary_emb.inv_freq");
    checkpoint_load_foreign(&m); // where both are there, the index is not looked at
    unlink(CHECKPOINT_OUT "/model.safetensors");
    unlink(CHECKPOINT_OUT "/model.safetensors.index.json");
    checkpoint_write_text("pytorch_model.bin", "x");
    check_dies(1, "pytorch_model.bin: weights in PyTorch's own format are not read", checkpoint_load_foreign,
               &m);
    checkpoint_case_free(&m);
    checkpoint_case_free(&other);
}

// ----------------------------------------------------------------------------
// damaged states

static void checkpoint_load_latest(void *m) {
    CheckpointCase *c = (CheckpointCase *)m;
    checkpoint_moments_equal(c, CHECKPOINT_OUT "/latest");
    checkpoint_load_state(&c->state, &c->options, CHECKPOINT_OUT "/latest");
    checkpoint_load_provenance(&c->provenance, CHECKPOINT_OUT "/latest");
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
        {"\"options\": {", "\"run\": 5, \"options\": {", "\"run\" is unusable, expected sixteen"},
        {"\"options\": {", "\"run\": \"0123456789abcdeF\", \"options\": {", "\"run\" is unusable"},
        {"\"options\": {", "\"shards\": {}, \"options\": {", "\"shards\" is unusable"},
        {"\"options\": {", "\"shards\": [1], \"options\": {", "\"shards\" is unusable"},
        {"\"options\": {",
         "\"shards\": [{\"name\": \"a\", \"bytes\": 1.5, \"hash\": \"0123456789abcdef\"}], \"options\": {",
         "\"shards\" is unusable"},
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
    test_checkpoint_always_whole();
    test_checkpoint_again();
    test_checkpoint_find();
    test_checkpoint_latest();
    test_checkpoint_aside();
    test_checkpoint_newest_run();
    test_checkpoint_provenance();
    test_checkpoint_other_data();
    test_checkpoint_keep();
    test_checkpoint_interrupted(2);
    test_checkpoint_interrupted(0);
    test_checkpoint_stale();
    test_checkpoint_no_folder();
    test_checkpoint_pieces();
    test_checkpoint_divided();
    test_checkpoint_init_divided();
    test_checkpoint_dump_divided();
    test_checkpoint_rank_fails();
    test_checkpoint_token();
    test_checkpoint_second_disk_full();
    test_checkpoint_foreign();
    test_checkpoint_shards();
    test_checkpoint_unused_moments();
    test_checkpoint_damaged();
    CHECK(system("rm -rf " CHECKPOINT_OUT) == 0);
}

#endif
