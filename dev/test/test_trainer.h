/*
The whole trainer, from outside: what it dumps, trains, saves and refuses, against the oracle's fixtures
(dev/oracle, PyTorch float64) and against itself.

Each run of the trainer is a process of its own, this program with --train: it may exit, and a forked child
could not use OpenMP.
*/
#ifndef TEST_TRAINER_H
#define TEST_TRAINER_H

#include <signal.h>
#include <sys/resource.h>
// defines: setrlimit, kill

enum { TRAINER_WORDS = 64 };

typedef struct {
    char text[4096];
    char *words[TRAINER_WORDS];
    rlim_t largest_file; // bytes, 0: no limit
} TrainerCommand;

// "--batch 2 --load DIR" split at spaces
static void trainer_words(TrainerCommand *command, const char *text) {
    int count = 0;
    memset(command, 0, sizeof(*command));
    check_format(command->text, sizeof(command->text), "test_remoe --train %s", text);
    for (char *word = strtok(command->text, " "); word != NULL; word = strtok(NULL, " ")) {
        command->words[count++] = word;
    }
}

// becomes the trainer
static void trainer_main(void *command) {
    TrainerCommand *c = (TrainerCommand *)command;
    if (c->largest_file > 0) {
        struct rlimit limit = {c->largest_file, c->largest_file};
        signal(SIGXFSZ, SIG_IGN); // the write fails with EFBIG instead
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    char program[PATH_SIZE];
    if (program_path(program, sizeof(program))) {
        execv(program, c->words);
    }
    die("cannot start the trainer: %s", strerror(errno));
}

static char trainer_output[1 << 16];

// runs the words in a child; its exit status, and what it printed in trainer_output
PRINTF_LIKE(1, 2) static int trainer_run(const char *fmt, ...) {
    static TrainerCommand command;
    char text[4096];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    trainer_words(&command, text);
    return run_in_child(trainer_main, &command, trainer_output, sizeof(trainer_output));
}

static int trainer_succeeds(int status, const char *what) {
    tally.checks++;
    if (status != 0) {
        tally.failures++;
        printf("  FAILED %s: exit %d: %s\n", what, status, trainer_output);
    }
    return status == 0;
}

// every tensor of `want` is in `got`, the same shape, within the tolerance; nothing else is in `got`
static void trainer_compare(const char *what, const char *got_path, const char *want_path, double tolerance) {
    Safetensors *got = safetensors_open(got_path, "");
    Safetensors *want = safetensors_open(want_path, "");
    CHECK(got->count == want->count);
    for (size_t i = 0; i < want->count; i++) {
        const SafetensorsEntry *w = &want->entries[i];
        const SafetensorsEntry *g = safetensors_find(got, w->name);
        size_t n = (size_t)safetensors_num_elements(w);
        char label[256];
        snprintf(label, sizeof(label), "%s %s", what, w->name);
        if (!CHECK(g != NULL && safetensors_num_elements(g) == n && g->ndim == w->ndim)) {
            continue;
        }
        float *x = NEW(float, n), *y = NEW(float, n);
        safetensors_read_f32(got, g, x);
        safetensors_read_f32(want, w, y);
        int is_loss = strstr(w->name, "loss") != NULL || strcmp(w->name, "sparsity") == 0;
        check_close(label, x, y, n, is_loss && tolerance > 0.0 ? 1e-6 : tolerance);
        free(x);
        free(y);
    }
    safetensors_close(got);
    safetensors_close(want);
}

static int trainer_files_equal(const char *a, const char *b) {
    size_t size_a, size_b;
    char *x = check_read_file(a, &size_a, ""), *y = check_read_file(b, &size_b, "");
    int equal = size_a == size_b && memcmp(x, y, size_a) == 0;
    free(x);
    free(y);
    return equal;
}

static int trainer_checkpoints_equal(const char *a, const char *b) {
    static const char *const files[] = {"config.json", "model.safetensors", "optimizer.safetensors"};
    int equal = 1;
    for (int i = 0; i < 3; i++) {
        char x[PATH_SIZE], y[PATH_SIZE];
        check_format(x, sizeof(x), "%s/%s", a, files[i]);
        check_format(y, sizeof(y), "%s/%s", b, files[i]);
        equal = equal && trainer_files_equal(x, y);
    }
    return equal;
}

// ----------------------------------------------------------------------------
// against the oracle

// fixtures' args.json: one object of numbers and names, whose keys are option names
static void trainer_fixture_options(char *out, size_t capacity, const char *folder, const char *file) {
    char path[PATH_SIZE];
    JsonArena arena;
    size_t used = 0;
    json_arena_init(&arena);
    check_format(path, sizeof(path), "%s/%s", folder, file);
    const Json *json = json_parse_file(path, &arena, "");
    for (const Json *member = json->child; member != NULL; member = member->next) {
        const char *prefix = member->type == JSON_STRING ? folder : "";
        used += (size_t)snprintf(out + used, capacity - used, " --%s %s%s%s", member->key, prefix,
                                 prefix[0] != '\0' ? "/" : "", member->text);
    }
    json_arena_free(&arena);
}

static void trainer_fixture_dump(const char *folder, const char *name) {
    char words[1024], expected[PATH_SIZE];
    trainer_fixture_options(words, sizeof(words), folder, "args.json");
    int status = trainer_run("--load %s --dump build/test/dump.safetensors --data %s/shard.bin%s", folder,
                             folder, words);
    check_format(expected, sizeof(expected), "%s/expected.safetensors", folder);
    if (trainer_succeeds(status, name)) {
        trainer_compare(name, "build/test/dump.safetensors", expected, 1e-5);
    }
}

// lambda exactly; the losses of every step to 1e-5
static void trainer_compare_logs(const char *log_path, const char *state_path) {
    JsonArena arena;
    json_arena_init(&arena);
    const Json *state = json_parse_file(state_path, &arena, "");
    const Json *row = json_get(state, "log")->child;
    char *log = check_read_file(log_path, NULL, "");
    char error[128];
    for (char *line = log, *end; row != NULL && (end = strchr(line, '\n')) != NULL;
         line = end + 1, row = row->next) {
        static const char *const keys[] = {"lm_loss", "reg_loss", "lambda", "sparsity", "grad_norm", "lr"};
        const Json *got = json_parse(line, (size_t)(end - line), &arena, error, sizeof(error));
        for (int i = 0; i < 6 && CHECK(got != NULL); i++) {
            double x = 0.0, y = 0.0;
            if (json_get(row, keys[i]) == NULL || json_get(row, keys[i])->type == JSON_NULL) {
                continue;
            }
            CHECK(json_get(got, keys[i]) != NULL && json_double(json_get(got, keys[i]), &x));
            json_double(json_get(row, keys[i]), &y);
            int close = i == 2 ? (float)x == (float)y : fabs(x - y) <= 1e-5 * fabs(y);
            if (!CHECK(close)) {
                printf("    %s: %.9g, expected %.9g\n", keys[i], x, y);
            }
        }
    }
    CHECK(row == NULL);
    free(log);
    json_arena_free(&arena);
}

static void trainer_fixture_replay(const char *folder, const char *name) {
    char words[1024], replay[PATH_SIZE], path[PATH_SIZE];
    check_format(replay, sizeof(replay), "%s/replay", folder);
    if (!path_exists(replay)) {
        return;
    }
    trainer_fixture_options(words, sizeof(words), replay, "args.json");
    int status = trainer_run("--load %s --data %s/shard.bin --shuffle 0 --out build/test/replay%s", folder,
                             folder, words);
    if (trainer_succeeds(status, name)) {
        check_format(path, sizeof(path), "%s/model.safetensors", replay);
        trainer_compare(name, "build/test/replay/latest/model.safetensors", path, 1e-5);
        check_format(path, sizeof(path), "%s/optimizer.safetensors", replay);
        trainer_compare(name, "build/test/replay/latest/optimizer.safetensors", path, 1e-5);
        check_format(path, sizeof(path), "%s/state.json", replay);
        trainer_compare_logs("build/test/replay/log.jsonl", path);
    }
}

static void trainer_clear(const char *out) {
    char path[PATH_SIZE], command[PATH_SIZE + 16];
    check_format(path, sizeof(path), "build/test/%s", out);
    check_format(command, sizeof(command), "rm -rf %s", path);
    CHECK(system(command) == 0);
}

static void trainer_fixtures(void) {
    struct dirent **names;
    int n = scandir("dev/test/fixtures", &names, NULL, alphasort);
    int seen = 0;
    for (int i = 0; i < n; i++) {
        char folder[PATH_SIZE], config[PATH_SIZE];
        check_format(folder, sizeof(folder), "dev/test/fixtures/%s", names[i]->d_name);
        check_format(config, sizeof(config), "%s/config.json", folder);
        if (names[i]->d_name[0] != '.' && path_exists(config)) {
            trainer_fixture_dump(folder, names[i]->d_name);
            trainer_clear("replay");
            trainer_fixture_replay(folder, names[i]->d_name);
            seen++;
        }
        free(names[i]);
    }
    CHECK(seen >= 15); // a missing folder of fixtures must not look like success
    free(names);
}

// ----------------------------------------------------------------------------
// against itself

// a shard of a small language that can be learned: each token mostly decides the next
static void trainer_make_shard(const char *path, int tokens, int vocab) {
    ShardWriter writer;
    unsigned state = 12345;
    uint16_t token = 1;
    shard_writer_open(&writer, path);
    for (int i = 0; i < tokens; i++) {
        shard_writer_append(&writer, &token, 1);
        state = state * 1664525u + 1013904223u;
        token = (uint16_t)((state >> 28) < 13 ? (unsigned)(token * 7 + 3) % (unsigned)vocab
                                              : (state >> 16) % (unsigned)vocab);
    }
    shard_writer_close(&writer);
}

#define TRAINER_TINY                                                                                         \
    "--layers 2 --hidden 16 --heads 2 --kv-heads 1 --ffn-mult 2 --experts 4 --vocab-size 64 --seq-len 16 "   \
    "--batch 4 "                                                                                             \
    "--global-batch 8 --lr 1e-2 --lambda-init 1e-3 --data build/test/train.bin "

// interrupted after 6 of 12 steps and resumed: the same bits as never stopped; the log reads as one
static void trainer_resume(const char *router) {
    trainer_clear("whole");
    trainer_clear("halves");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 12 --router %s --out build/test/whole", router),
                     "whole run");
    trainer_succeeds(trainer_run(TRAINER_TINY
                                 "--steps 12 --router %s --save-every 6 --keep 0 --out build/test/halves",
                                 router),
                     "run with checkpoints");
    CHECK(trainer_checkpoints_equal("build/test/whole/latest", "build/test/halves/latest"));
    trainer_succeeds(trainer_run("--resume build/test/halves/step_00000006"), "resumed run");
    CHECK(trainer_checkpoints_equal("build/test/whole/latest", "build/test/halves/latest"));
    char *log = check_read_file("build/test/halves/log.jsonl", NULL, "");
    int rows = 0;
    for (char *line = log; (line = strchr(line, '\n')) != NULL; line++) {
        rows++;
    }
    CHECK(rows == 12);
    free(log);
}

static void trainer_resume_stopped_in_the_middle(void) {
    trainer_clear("stopped");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 12 --max-minutes 1e-7 --out build/test/stopped"),
                     "out of time");
    CHECK(strstr(trainer_output, "stopped at step") != NULL);
    trainer_succeeds(trainer_run("--resume latest --max-minutes 0 --out build/test/stopped"), "resumed run");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 12 --out build/test/whole2"), "whole run");
    CHECK(trainer_checkpoints_equal("build/test/whole2/latest", "build/test/stopped/latest"));
    trainer_clear("whole2");
}

// an endless run in a child; SIGINT once it has trained a step
static void trainer_ctrl_c(void) {
    static TrainerCommand command;
    int fds[2], status = 0, interrupted = 0;
    size_t used = 0;
    trainer_clear("interrupted");
    trainer_words(&command, TRAINER_TINY "--steps 100000000 --out build/test/interrupted");
    fflush(stdout);
    CHECK(pipe(fds) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fds[1], 1);
        close(fds[0]);
        trainer_main(&command);
    }
    close(fds[1]);
    for (ssize_t got = 1; got > 0 && used + 1 < sizeof(trainer_output); used += (size_t)got) {
        got = read(fds[0], trainer_output + used, sizeof(trainer_output) - 1 - used);
        got = got < 0 ? 0 : got;
        trainer_output[used + (size_t)got] = '\0';
        if (!interrupted && strstr(trainer_output, "step     1/") != NULL) {
            interrupted = kill(pid, SIGINT) == 0; // once: a second one would not wait
        }
    }
    close(fds[0]);
    waitpid(pid, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(strstr(trainer_output, "continue with --resume") != NULL);
    CHECK(path_exists("build/test/interrupted/latest/optimizer.safetensors"));
}

static void trainer_threads(const char *router) {
    trainer_clear("one");
    trainer_clear("two");
    trainer_succeeds(
        trainer_run(TRAINER_TINY "--steps 6 --router %s --threads 1 --out build/test/one", router),
        "one thread");
    trainer_succeeds(
        trainer_run(TRAINER_TINY "--steps 6 --router %s --threads 2 --out build/test/two", router),
        "two threads");
    CHECK(trainer_checkpoints_equal("build/test/one/latest", "build/test/two/latest"));
}

// two micro-batches of 4 give nearly the gradient of one of 8 (f_le is counted a micro-batch: exactly so
// without it)
static void trainer_accumulation(const char *router) {
    trainer_clear("micro");
    trainer_clear("macro");
    trainer_succeeds(
        trainer_run(TRAINER_TINY "--steps 2 --load-balance 0 --router %s --out build/test/micro", router),
        "two micro-batches");
    trainer_succeeds(trainer_run(TRAINER_TINY
                                 "--steps 2 --load-balance 0 --batch 8 --router %s --out build/test/macro",
                                 router),
                     "one");
    trainer_compare("accumulation", "build/test/micro/latest/model.safetensors",
                    "build/test/macro/latest/model.safetensors", 1e-5);
}

static void trainer_overfits(void) {
    trainer_clear("overfit");
    trainer_succeeds(
        trainer_run(TRAINER_TINY "--steps 300 --overfit-batch --global-batch 4 --out build/test/overfit"),
        "overfitting");
    char *log = check_read_file("build/test/overfit/log.jsonl", NULL, "");
    char *last = strrchr(log, '{') != NULL ? strstr(log, "\"step\": 299") : NULL;
    double loss = last != NULL ? atof(strstr(last, "lm_loss") + 9) : 1e9;
    if (!CHECK(loss < 0.5)) {
        printf("    the loss on one batch is still %g after 300 steps\n", loss);
    }
    free(log);
}

// the gates of a dump, taken as its own route, change nothing
static void trainer_route_from_itself(void) {
    const char *base =
        "--load dev/test/fixtures/relu --data dev/test/fixtures/relu/shard.bin --batch 2 --seq-len 17";
    trainer_succeeds(trainer_run("%s --dump build/test/free.safetensors", base), "free");
    trainer_succeeds(
        trainer_run("%s --dump build/test/routed.safetensors --route-from build/test/free.safetensors", base),
        "routed");
    CHECK(trainer_files_equal("build/test/free.safetensors", "build/test/routed.safetensors"));
}

// a trained model says the same of its validation data when it is loaded again
static void trainer_eval(void) {
    trainer_clear("eval");
    trainer_succeeds(
        trainer_run(TRAINER_TINY "--steps 5 --val-data build/test/train.bin --out build/test/eval"), "train");
    char *line = strstr(trainer_output, "val  ");
    char first[256];
    snprintf(first, sizeof(first), "%.*s", (int)strcspn(line != NULL ? line : "", "\n"),
             line != NULL ? line : "");
    trainer_succeeds(
        trainer_run("--load build/test/eval --eval --val-data build/test/train.bin --seq-len 16 --batch 4"),
        "eval");
    line = strstr(trainer_output, "val  ");
    CHECK(line != NULL && strncmp(line, first, 30) == 0); // of the same step, too
}

// the language model's gradient alone
static void trainer_dump_without_lambda(void) {
    trainer_succeeds(
        trainer_run("--load dev/test/fixtures/relu --data dev/test/fixtures/relu/shard.bin --batch 2 "
                    "--seq-len 17 --lambda 0 --dump build/test/plain.safetensors"),
        "dump");
    double lm_loss = 0.0, reg_loss = 0.0, loss = -1.0;
    CHECK(sscanf(trainer_output, "lm_loss %lf reg_loss %lf loss %lf", &lm_loss, &reg_loss, &loss) == 3);
    CHECK(reg_loss > 0.0 && loss == lm_loss);
}

enum { SAMPLING_T = 40, SAMPLING_V = 64 };

// a model of B sequences with random weights
static Model *trainer_sampling_model(const char *router, int B) {
    Options o;
    options_defaults(&o, "tiny");
    check_format(o.router, sizeof(o.router), "%s", router);
    o.experts = strcmp(router, "dense") == 0 ? 1 : 8;
    o.layers = 2;
    o.hidden = 48;
    o.heads = 4;
    o.vocab_size = SAMPLING_V;
    o.seq_len = SAMPLING_T;
    o.segment_length = 8;
    o.batch = o.global_batch = B;
    Config c = config_from_options(&o);
    Ranks alone = ranks_alone();
    ModelSettings settings = model_settings(&o, &c, FOR_INFERENCE, &alone);
    Model *m = model_open(&c, &settings);
    model_route(m, router_row(c.router.method)->for_one_token, c.router.active);
    fill_uniform(m->params.values, (size_t)m->params.table.flat_size, 7, 0.2f);
    return m;
}

static void trainer_sampling_ids(int *ids, int B) {
    for (int t = 0; t < B * SAMPLING_T; t++) {
        ids[t] = (t * 37 + t * t % 7 + 11) % SAMPLING_V;
    }
}

// every position's logits [B T, V], for free()
static float *trainer_all_logits(Model *m, const int *ids, int B, const int *contexts) {
    float *all = NEW(float, B *SAMPLING_T *SAMPLING_V);
    model_forward(m, ids, B, SAMPLING_T, 0, no_draws, contexts, NULL);
    matmul_forward(all, m->acts.normed, m->params.weights.head, B * SAMPLING_T, m->config.hidden, SAMPLING_V);
    return all;
}

// every position's logits, computed one at a time with the key/value cache, equal the full forward bit for
// bit: where lory merges for the prompt, the forward that uses the prompt's merge for all of the text
static void trainer_cached_sampling(const char *router, int prompt) {
    Model *m = trainer_sampling_model(router, 1);
    int ids[SAMPLING_T], equal = 1;
    trainer_sampling_ids(ids, 1);
    float *full = trainer_all_logits(m, ids, 1, &prompt);
    for (int n = prompt, cached = 0; n <= SAMPLING_T; cached = n, n += 1 + n % 11) {
        const float *logits = next_logits(m, ids, n, cached);
        equal = equal && memcmp(logits, full + (n - 1) * SAMPLING_V, SAMPLING_V * sizeof(float)) == 0;
    }
    CHECK(equal);
    free(full);
    model_close(m);
}

// a batch whose texts have prompts of different lengths: each has the logits that it has alone
static void trainer_contexts(void) {
    enum { B = 3, CELLS = SAMPLING_T * SAMPLING_V };
    Model *m = trainer_sampling_model("lory", B);
    int ids[B * SAMPLING_T], contexts[B] = {5, SAMPLING_T, 17};
    trainer_sampling_ids(ids, B);
    float *all = trainer_all_logits(m, ids, B, contexts);
    float *segments = trainer_all_logits(m, ids, B, NULL);
    for (int b = 0; b < B; b++) {
        float *alone = trainer_all_logits(m, ids + b * SAMPLING_T, 1, &contexts[b]);
        check_close("a prompt of a batch", all + b * CELLS, alone, CELLS, 1e-6);
        CHECK(relative_error(segments + b * CELLS, alone, CELLS) > 1e-4); // which is another function
        free(alone);
    }
    free(all);
    free(segments);
    model_close(m);
}

// ----------------------------------------------------------------------------
// bad input

static void trainer_refuses(int status, const char *text, const char *words) {
    static TrainerCommand command;
    trainer_words(&command, words);
    if (!check_dies(status, text, trainer_main, &command)) {
        printf("    words: %s\n", words);
    }
}

static void trainer_bad_command_lines(void) {
    trainer_refuses(2, "did you mean --global-batch", "--gloabl-batch 4");
    trainer_refuses(2, "expects an integer", "--steps 10x");
    trainer_refuses(2, "expects an integer from 1", "--layers 0");
    trainer_refuses(2, "needs a value", "--steps");
    trainer_refuses(2, "not an option", "steps 10");
    trainer_refuses(2, "unknown", "--router softmax");
    trainer_refuses(2, "unknown", "--preset huge");
    trainer_refuses(2, "not a multiple of --batch", "--batch 3 --global-batch 8");
    trainer_refuses(2, "need a model", "--eval");
    trainer_refuses(2, "need a model", "--sample=");
    trainer_refuses(2, "never does from 0", "--lambda 0");
    trainer_refuses(2, "decides it", "--load dev/test/fixtures/relu --hidden 32");
    trainer_refuses(2, "exclude each other", "--load a --resume b");
    trainer_refuses(2, "--save-dtype belongs to --export", TRAINER_TINY "--save-dtype bf16");
    trainer_refuses(2, "--save-dtype belongs to --export", "--resume build/test/whole --save-dtype bf16");
    trainer_refuses(2, "even head size", "--hidden 100 --heads 3");
    trainer_refuses(2, "not a multiple of 3 key/value heads", "--heads 4 --kv-heads 3");
    trainer_refuses(2, "--active 5 of --experts 4", "--experts 4 --active 5");
    trainer_refuses(1, "no checkpoint in build/test/nowhere", "--load build/test/nowhere --eval");
    trainer_refuses(1, "build/test/nothing",
                    TRAINER_TINY "--data build/test/nothing*.bin --out build/test/refused");
    trainer_refuses(1, "already holds a run", TRAINER_TINY "--steps 1 --out build/test/whole");
    trainer_refuses(1, "token", TRAINER_TINY "--vocab-size 8 --steps 1 --out build/test/refused");
}

// the keys that a run's rows have are those of the table, but for what a CPU alone does not know
static void trainer_log_keys(void) {
    int count, missing = 0, unknown = 0;
    const LogKey *keys = log_keys(&count);
    JsonArena arena;
    char error[128];
    trainer_clear("keys");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 40 --flip-every 13 --log-experts-every 13 --val-data "
                                              "build/test/train.bin --lambda-init 1 --out build/test/keys"),
                     "a run with all keys");
    char *log = check_read_file("build/test/keys/log.jsonl", NULL, ""), *seen = NEW(char, count);
    json_arena_init(&arena);
    for (char *line = log, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        const Json *row = json_parse(line, (size_t)(end - line), &arena, error, sizeof(error));
        int validation = row != NULL && json_get(row, "val_loss") != NULL;
        for (const Json *member = row != NULL ? row->child : NULL; member != NULL; member = member->next) {
            int known = 0;
            for (int i = 0; i < count && !validation; i++) {
                int is = strcmp(member->key, keys[i].name) == 0;
                known |= is;
                seen[i] |= (char)is;
            }
            for (int i = 0; i < LOG_VALIDATION_KEYS && validation; i++) {
                known |= strcmp(member->key, log_validation_keys[i]) == 0;
            }
            unknown += !known;
        }
    }
    for (int i = 0; i < count; i++) {
        int absent = strncmp(keys[i].name, "mfu", 3) == 0 || strcmp(keys[i].name, "ms_waiting") == 0;
        missing += seen[i] == absent;
    }
    CHECK(missing == 0 && unknown == 0);
    json_arena_free(&arena);
    free(log);
    free(seen);
}

// layer 0 of 2 is off for 19 steps, on once, and off for 20; layer 1 is off all the time
static void trainer_layers_off(void *unused) {
    (void)unused;
    static Run run;
    double sparsity[2] = {1.0, 1.0};
    StepRecord record;
    memset(&record, 0, sizeof(record));
    record.layers = 2;
    record.layer_sparsity = sparsity;
    for (int step = 0; step < 40; step++) {
        sparsity[0] = step == 19 ? 0.999 : 1.0;
        guard_layers(&run, &record);
    }
}

static void trainer_guards_layers(void) {
    char said[2048];
    CHECK(run_in_child(trainer_layers_off, NULL, said, sizeof(said)) == 0);
    char *one = strstr(said, "no expert of layer 1 has been active for 20 steps");
    char *all = strstr(said, "no expert of any layer: 0 1 has been active for 20 steps");
    CHECK(one != NULL && all != NULL && one < all && strstr(all, "warning") == NULL); // each said once
}

// saved at a loss of 3 in step 10, and again in step 20 when the loss had risen to 9: only step 10 is good until
// the loss comes down again
static void trainer_loss_risen(void *unused) {
    (void)unused;
    static Run run;
    run.options.keep = 0;
    check_format(run.options.out, sizeof(run.options.out), "out");
    run.good_step = -1;
    for (int step = 0; step <= 40; step++) {
        run.stats.lm_loss = step < 15 || step == 40 ? 3.0 : 9.0;
        run.last_saved = step < 10 ? -1 : step < 20 ? 10 : 20;
        guard_loss(&run);
        if (run.good_step != (step < 10 ? -1 : step < 40 ? 10 : 20)) {
            die("step %d: the good checkpoint is %lld", step, (long long)run.good_step);
        }
    }
}

static void trainer_guards_loss(void) {
    char said[2048];
    CHECK(run_in_child(trainer_loss_risen, NULL, said, sizeof(said)) == 0);
    char *warning = strstr(said, "the loss has been far above what it was, 3.0000: now 9.0000");
    CHECK(warning != NULL && strstr(warning, "--resume out/step_00000010") != NULL);
    CHECK(warning != NULL && strstr(warning, "warning") == NULL); // said once
}

// what a run says where it could go wrong without a word
static void trainer_says(void) {
    trainer_clear("says");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 3 --warmup-steps 50 --out build/test/says/a"),
                     "warm-up");
    CHECK(strstr(trainer_output, "learning rate never gets to --lr") != NULL);
    CHECK(strstr(trainer_output, "| lambda ") != NULL && strstr(trainer_output, "S by layer") != NULL);
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 3 --router topk --out build/test/says/b"), "topk");
    CHECK(strstr(trainer_output, "lambda") == NULL && strstr(trainer_output, "by layer") == NULL);
    // a regulariser that hardly anything withstands
    trainer_succeeds(
        trainer_run(TRAINER_TINY
                    "--steps 60 --warmup-steps 0 --lambda 1e12 --alpha 1 --out build/test/says/c"),
        "nearly off");
    CHECK(strstr(trainer_output, "2 of 2 layers nearly off") != NULL);
    // a stage is announced by the number that its step has in the lines above
    char *stage = strstr(trainer_output, "stage III (sparse) began at step "), shown[32];
    int step = stage != NULL ? atoi(stage + strlen("stage III (sparse) began at step ")) : 0;
    check_format(shown, sizeof(shown), "step %5d/60", step);
    char *line = strstr(trainer_output, shown);
    CHECK(step >= 1 && (line == NULL || strstr(line, "stage III") != NULL));
}

// a weight that is not a number: three skipped updates, a saved checkpoint, exit 1
static void trainer_nan_guard(void) {
    trainer_clear("nan");
    trainer_clear("nan_source");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 1 --out build/test/nan_source"), "source");
    FILE *file = fopen("build/test/nan_source/step_00000001/model.safetensors", "r+b");
    float nan = NAN;
    fseek(file, -4, SEEK_END);
    fwrite(&nan, 4, 1, file);
    fclose(file);
    trainer_refuses(1, "there is no good checkpoint",
                    "--load build/test/nan_source --data build/test/train.bin --batch 4 --seq-len 16 --steps "
                    "9 --out build/test/nan");
    CHECK(!path_exists("build/test/nan/latest"));
    trainer_refuses(1, "is not finite",
                    "--load build/test/nan_source --eval --val-data build/test/train.bin --seq-len 16");
}

// a learning rate that blows the weights up: what was saved before stays, and the advice that is printed works
static void trainer_divergence(void) {
    trainer_clear("blown");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 3 --out build/test/blown"), "begin");
    trainer_refuses(1, "--resume build/test/blown/step_00000003 with a smaller --lr",
                    "--resume build/test/blown --steps 30 --lr 1000 --warmup-steps 0");
    trainer_succeeds(trainer_run("--resume build/test/blown/step_00000003 --steps 6"), "go on");
}

// the disk fills up while the second checkpoint is written: the first one is whole and goes on
static void trainer_full_disk(void) {
    static TrainerCommand command;
    trainer_clear("full_disk");
    trainer_succeeds(trainer_run(TRAINER_TINY "--steps 8 --max-minutes 1e-7 --out build/test/full_disk"),
                     "first part");
    trainer_words(&command, "--resume build/test/full_disk --max-minutes 0");
    command.largest_file = 20000;
    check_dies(1, "cannot write", trainer_main, &command);
    trainer_succeeds(trainer_run("--resume build/test/full_disk --max-minutes 0"),
                     "after the disk was freed");
    CHECK(path_exists("build/test/full_disk/step_00000008/model.safetensors"));
}

// ----------------------------------------------------------------------------
// lory

static void trainer_late_loss(void) {
    const float losses[8] = {1, 2, 3, 4, 5, 6, 7, 9};
    CHECK(mean_late_loss(losses, 2, 4, 0) == 37.0 / 8 && mean_late_loss(losses, 2, 4, 3) == 6.5);
    Model *m = trainer_sampling_model("lory", 2);
    int ids[2 * SAMPLING_T];
    trainer_sampling_ids(ids, 2);
    double loss = model_loss(m, ids, ids, 2, SAMPLING_T);
    float each[2 * SAMPLING_T];
    model_token_losses(m, 2 * SAMPLING_T, each);
    CHECK(fabs(mean_late_loss(each, 2, SAMPLING_T, 0) - loss) < 1e-6 * loss);
    CHECK(fabs(mean_late_loss(each, 2, SAMPLING_T, 8) - loss) > 1e-6 * loss);
    model_close(m);
}

#define TRAINER_LORY TRAINER_TINY "--router lory "

static void trainer_lory(void) {
    trainer_late_loss();
    trainer_clear("lory");
    trainer_succeeds(trainer_run(TRAINER_LORY
                                 "--segment-length 6 --steps 2 --val-data build/test/train.bin --out "
                                 "build/test/lory"),
                     "lory");
    CHECK(strstr(trainer_output, "4 experts merged into one, once every 6 tokens") != NULL);
    CHECK(strstr(trainer_output, "(in brackets: without the first 6 positions") != NULL);
    char *log = check_read_file("build/test/lory/log.jsonl", NULL, "");
    CHECK(strstr(log, ", \"sparsity\": 0, ") != NULL && strstr(log, "\"active_experts\": 1,") != NULL);
    CHECK(strstr(log, ", \"val_loss_after_first_segment\": ") != NULL);
    CHECK(log_has_validation("build/test/lory/log.jsonl", 2));
    free(log);
    trainer_succeeds(
        trainer_run("--load build/test/lory --eval --seq-len 6 --batch 2 --val-data build/test/train.bin"),
        "one segment");
    CHECK(strstr(trainer_output, "in brackets") == NULL); // every position sees its segment
    trainer_refuses(2, "--seq-len 16 is a single segment of --segment-length 16",
                    TRAINER_LORY "--segment-length 16");
    trainer_refuses(2, "--seq-len 5 is a single segment of --segment-length 6",
                    "--load build/test/lory --seq-len 5 --batch 2 --data build/test/train.bin");
    trainer_refuses(2, "merges experts into one of a dense layer's width", TRAINER_LORY "--granularity 2");
    trainer_refuses(2, "merges experts into one of a dense layer's width", TRAINER_LORY "--active 2");
    trainer_refuses(
        2, "--route-from: lory has no active experts",
        "--load build/test/lory --data build/test/train.bin --batch 1 --seq-len 16 --dump "
        "build/test/refused.safetensors --route-from dev/test/fixtures/lory/expected.safetensors");
}

static void test_trainer(void) {
    trainer_make_shard("build/test/train.bin", 4000, 64);
    trainer_fixtures();
    trainer_resume("relu");
    trainer_resume("topk --topk-warmup-steps 8 --topk-warmup-k 3");
    trainer_resume("auxfree --active 2");
    trainer_resume("sparsemixer --active 2 --router-jitter 0.4");
    trainer_resume("lory --segment-length 6");
    trainer_resume("dense --experts 1");
    trainer_resume_stopped_in_the_middle();
    trainer_ctrl_c();
    trainer_threads("relu");
    trainer_threads("lory --segment-length 6");
    trainer_accumulation("relu");
    trainer_accumulation("lory --segment-length 6");
    trainer_overfits();
    trainer_route_from_itself();
    trainer_eval();
    trainer_dump_without_lambda();
    for (int method = 0; method < ROUTER_COUNT; method++) {
        trainer_cached_sampling(router_name((RouterMethod)method), 5);
    }
    trainer_contexts();
    trainer_lory();
    trainer_bad_command_lines();
    trainer_log_keys();
    trainer_guards_layers();
    trainer_guards_loss();
    trainer_says();
    trainer_nan_guard();
    trainer_divergence();
    trainer_full_disk();
}

#endif
