/*
logger.h, log_keys.h: every row is JSON with the values that went in, whatever they were; dev/doc/log.md explains
each key; a log is cut back to the step of a resumed run, whatever state it was left in.
*/
#ifndef TEST_LOGGER_H
#define TEST_LOGGER_H

#include "llmc/files/logger.h"
#include "harness.h"

#define LOGGER_PATH "build/test/log.jsonl"

// ----------------------------------------------------------------------------
// rows

static const double logger_layers[3] = {0.5, 0.875, 1.0 / 3.0};
static const int64_t logger_cells[6] = {0, (int64_t)1 << 40, 2, 3, 4, 5};

static StepRecord logger_record(int64_t step) {
    StepRecord r;
    memset(&r, 0, sizeof(r));
    r.step = step;
    r.lm_loss = 3.141592653589793;
    r.reg_loss = 0.25;
    r.lambda = (double)1.2e-8f;
    r.sparsity = 0.875;
    r.stage = 2;
    r.layer_sparsity = logger_layers;
    r.layers = 3;
    r.experts = 2;
    r.tokens_per_expert.min = 1;
    r.tokens_per_expert.mean = 12.5;
    r.tokens_per_expert.max = (int64_t)1 << 40;
    r.dead_experts = 4;
    r.zero_expert_tokens = 5;
    r.active_experts = 1.0625;
    r.grad_norm = 0.75;
    r.lr = 5e-4;
    r.ms = 1234.5;
    r.tok_s = 65536.0;
    r.tflops = 0.125;
    r.tflops_active = 0.0625;
    r.mfu = r.mfu_active = -1.0;
    r.mem_gb = 1.5;
    r.time = 1764368667.1239;
    r.ms_waiting = r.flip_rate = r.flip_count = -1.0;
    r.stage2_step = r.stage3_step = -1;
    return r;
}

// the only row of a log, as JSON; NULL if it is none
static const Json *logger_row(const StepRecord *r, JsonArena *arena) {
    char error[128];
    size_t size;
    FILE *log = check_fopen(LOGGER_PATH, "wb", "");
    log_step(log, LOGGER_PATH, r);
    check_fclose(log, LOGGER_PATH);
    char *text = check_read_file(LOGGER_PATH, &size, "");
    const Json *json = json_parse(text, size, arena, error, sizeof(error));
    CHECK(size > 0 && memchr(text, '\n', size) == text + size - 1); // one line
    free(text);
    return json;
}

static double logger_real(const Json *json, const char *key) {
    double value = -1e300;
    json_double(json_get(json, key), &value);
    return value;
}

static void test_logger_step(void) {
    JsonArena arena;
    StepRecord r = logger_record(7);
    json_arena_init(&arena);
    const Json *json = logger_row(&r, &arena);
    const Json *layers = json_get(json, "layer_sparsity"), *tokens = json_get(json, "tokens_per_expert");
    CHECK(json_duplicate_key(json) == NULL && logger_real(json, "step") == 7);
    CHECK(fabs(logger_real(json, "lm_loss") - r.lm_loss) < 1e-8 && logger_real(json, "reg_loss") == 0.25);
    CHECK((float)logger_real(json, "lambda") == 1.2e-8f); // every bit of an fp32
    CHECK(logger_real(json, "sparsity") == 0.875 && logger_real(json, "stage") == 2);
    CHECK(layers->count == 3 && strcmp(layers->child->text, "0.5") == 0);
    CHECK(logger_real(tokens, "min") == 1 && logger_real(tokens, "mean") == 12.5);
    CHECK(logger_real(tokens, "max") == 1099511627776.0);
    CHECK(logger_real(json, "dead_experts") == 4 && logger_real(json, "zero_expert_tokens") == 5);
    CHECK(logger_real(json, "active_experts") == 1.0625 && logger_real(json, "grad_norm") == 0.75);
    CHECK(logger_real(json, "lr") == 5e-4 && logger_real(json, "ms") == 1234.5);
    CHECK(logger_real(json, "tok_s") == 65536.0 && logger_real(json, "tflops") == 0.125);
    CHECK(logger_real(json, "tflops_active") == 0.0625 && logger_real(json, "mem_gb") == 1.5);
    CHECK(logger_real(json, "time") == 1764368667.124);                           // to milliseconds
    CHECK(json_get(json, "mfu") == NULL && json_get(json, "mfu_active") == NULL); // the peak is unknown
    json_arena_free(&arena);
}

// what is not known has no key; 0 is known
static void test_logger_known(void) {
    static const char *const keys[] = {"mfu",         "mfu_active", "ms_waiting", "stage2_step",
                                       "stage3_step", "flip_rate",  "flip_count"};
    JsonArena arena;
    StepRecord r = logger_record(7);
    json_arena_init(&arena);
    const Json *json = logger_row(&r, &arena);
    for (int i = 0; i < 7; i++) {
        CHECK(json_get(json, keys[i]) == NULL);
    }
    CHECK(json_get(json, "layer_flip_rate") == NULL && json_get(json, "layer_expert_tokens") == NULL);
    r.mfu = 0.5;
    r.mfu_active = 0.25;
    r.ms_waiting = r.flip_rate = 0.0;
    r.flip_count = 0.125;
    r.stage2_step = 0;
    r.stage3_step = 55;
    r.layer_flip_rate = logger_layers;
    r.layer_expert_tokens = logger_cells;
    json = logger_row(&r, &arena);
    const double values[] = {0.5, 0.25, 0.0, 0.0, 55.0, 0.0, 0.125};
    for (int i = 0; i < 7; i++) {
        CHECK(logger_real(json, keys[i]) == values[i]);
    }
    const Json *flips = json_get(json, "layer_flip_rate"), *cells = json_get(json, "layer_expert_tokens");
    CHECK(flips->count == 3 && strcmp(flips->child->next->text, "0.875") == 0);
    CHECK(cells->count == 3 && cells->child->count == 2 && cells->child->next->next->count == 2);
    CHECK(strcmp(cells->child->child->next->text, "1099511627776") == 0);
    CHECK(strcmp(cells->child->next->next->child->next->text, "5") == 0);
    json_arena_free(&arena);
}

// the table's keys are those of dev/doc/log.md, in order: first a step's, then a validation's
static void test_logger_explained(void) {
    int count, explained = 0, wrong = 0;
    const LogKey *keys = log_keys(&count);
    char *page = check_read_file("dev/doc/log.md", NULL, "");
    for (char *line = strtok(page, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        char name[64];
        if (sscanf(line, "| `%63[^`]` |", name) != 1) {
            continue;
        }
        const char *want = explained < count                         ? keys[explained].name
                           : explained < count + LOG_VALIDATION_KEYS ? log_validation_keys[explained - count]
                                                                     : "nothing more";
        if (strcmp(name, want) != 0 && ++wrong == 1) {
            printf("    dev/doc/log.md explains %s where the table has %s\n", name, want);
        }
        explained++;
    }
    CHECK(wrong == 0 && explained == count + LOG_VALIDATION_KEYS);
    free(page);
}

// a diverged run still writes JSON
static void test_logger_not_finite(void) {
    static const double layers[2] = {NAN, 0.5};
    JsonArena arena;
    StepRecord r = logger_record(7);
    json_arena_init(&arena);
    r.lm_loss = NAN;
    r.reg_loss = INFINITY;
    r.grad_norm = -NAN;
    r.tokens_per_expert.mean = NAN;
    r.layer_sparsity = layers;
    r.layers = 2;
    const Json *json = logger_row(&r, &arena);
    CHECK(json != NULL && json_get(json, "lm_loss")->type == JSON_NULL);
    CHECK(json != NULL && json_get(json, "reg_loss")->type == JSON_NULL);
    CHECK(json != NULL && json_get(json, "grad_norm")->type == JSON_NULL && logger_real(json, "step") == 7);
    json_arena_free(&arena);
}

static void test_logger_validation(void) {
    const char *domain = "c++ \"quoted\" \xFF";
    char error[128];
    size_t size;
    JsonArena arena;
    json_arena_init(&arena);
    FILE *log = check_fopen(LOGGER_PATH, "wb", "");
    log_validation(log, LOGGER_PATH, 300, 2.5, NULL, domain);
    check_fclose(log, LOGGER_PATH);
    char *text = check_read_file(LOGGER_PATH, &size, "");
    const Json *json = json_parse(text, size, &arena, error, sizeof(error));
    CHECK(logger_real(json, "step") == 300 && logger_real(json, "val_loss") == 2.5);
    CHECK(json != NULL && strncmp(json_get(json, "domain")->text, domain, 13) == 0);
    free(text);
    json_arena_free(&arena);
}

static void logger_write_full(void *unused) {
    StepRecord r = logger_record(1);
    (void)unused;
    FILE *log = check_fopen("/dev/full", "wb", "");
    log_step(log, "/dev/full", &r);
}

// ----------------------------------------------------------------------------
// cutting

static void logger_save(const char *text, size_t size) {
    FILE *file = check_fopen(LOGGER_PATH, "wb", "");
    check_fwrite(text, 1, size, file, LOGGER_PATH);
    check_fclose(file, LOGGER_PATH);
}

static void logger_check_cut(const char *before, size_t size, int64_t step, const char *after) {
    size_t left;
    logger_save(before, size);
    log_cut(LOGGER_PATH, step);
    char *text = check_read_file(LOGGER_PATH, &left, "");
    if (!CHECK(left == strlen(after) && memcmp(text, after, left) == 0)) {
        printf("    cut to %s\n", text);
    }
    CHECK(access(LOGGER_PATH ".tmp", F_OK) != 0);
    free(text);
}

// what train_remoe writes, cut everywhere: the row of step i says i, a validation after n steps says n
static void test_logger_cut(void) {
    static char whole[65536];
    size_t ends[5], size;
    FILE *log = check_fopen(LOGGER_PATH, "wb", "");
    for (int64_t i = 0; i < 4; i++) {
        StepRecord r = logger_record(i);
        log_step(log, LOGGER_PATH, &r);
        ends[i] = (size_t)ftell(log);
        if (i == 1) {
            log_validation(log, LOGGER_PATH, 2, 2.5, NULL,
                           "all"); // made again by a run that resumes after 2 steps
        }
    }
    check_fclose(log, LOGGER_PATH);
    char *text = check_read_file(LOGGER_PATH, &size, "");
    for (int64_t step = 0; step <= 5; step++) {
        size_t kept = step == 0 ? 0 : step >= 4 ? size : ends[step - 1];
        memcpy(whole, text, kept);
        whole[kept] = '\0';
        logger_check_cut(text, size, step, whole);
    }
    memcpy(whole, text, ends[2]);
    whole[ends[2]] = '\0';
    logger_check_cut(text, size - 10, 100, whole); // the last row was not finished
    free(text);
}

// a finished run is one whose last validation is whole
static void test_logger_has_validation(void) {
    static const char *const logs[] = {
        "{\"step\": 3, \"lm_loss\": 2}\n{\"step\": 4, \"val_loss\": 1.5, \"domain\": \"a\"}\n",
        "{\"step\": 4, \"val_loss\": 1.5, \"domain\": \"all\"}",
        "{\"step\": 3, \"val_loss\": 1.5, \"domain\": \"all\"}\n",
        "",
    };
    static const char whole[] = "{\"step\": 3, \"lm_loss\": 2}\n"
                                "{\"step\": 4, \"val_loss\": null, \"domain\": \"all\"}\n";
    for (size_t i = 0; i < sizeof(logs) / sizeof(logs[0]); i++) {
        logger_save(logs[i], strlen(logs[i]));
        CHECK(!log_has_validation(LOGGER_PATH, 4));
    }
    logger_save(whole, sizeof(whole) - 1);
    CHECK(log_has_validation(LOGGER_PATH, 4) && !log_has_validation(LOGGER_PATH, 40));
    unlink(LOGGER_PATH);
    CHECK(!log_has_validation(LOGGER_PATH, 4));
}

static int logger_cut_missing(void) {
    unlink(LOGGER_PATH);
    log_cut(LOGGER_PATH, 3); // nothing to cut, nothing made
    return access(LOGGER_PATH, F_OK) == 0;
}

// rows that cannot be read go, with a warning; the others stay as they are, byte by byte
static void logger_cut_hostile(void *unused) {
    static const char hostile[] = "{\"step\": 0}\n"
                                  "\n"
                                  "not JSON\n"
                                  "{\"step\": 1, \"x\": nan}\n"
                                  "[1]\n"
                                  "{\"x\": 1}\n"
                                  "{\"step\": \"1\"}\n"
                                  "{\"step\": 1.5}\n"
                                  "{\"step\": 1e400}\n"
                                  "{\"step\": 99999999999999999999}\n"
                                  "\0\0\0\0{\"step\": 1}\n"
                                  "{\"step\": 1}{\"step\": 2}\n"
                                  "  {\"step\" :1,\"foreign\":[{}] }\t\n"
                                  "{\"step\": 2, \"text\": \"\xFF\"}\n"
                                  "{\"step\": 2}\r\n"
                                  "{\"step\": 7}\n"
                                  "{\"step\": -5}\n"
                                  "{\"step\": 3";
    (void)unused;
    logger_check_cut(hostile, sizeof(hostile) - 1, 3,
                     "{\"step\": 0}\n"
                     "  {\"step\" :1,\"foreign\":[{}] }\t\n"
                     "{\"step\": 2}\r\n"
                     "{\"step\": -5}\n");
    _exit(tally.failures != 0); // the tally of a child is not its parent's
}

// a FIFO would be waited for, by a process that signals do not stop
static void logger_cut_fifo(void *unused) {
    (void)unused;
    alarm(10);
    log_cut(LOGGER_PATH, 3);
}

static void logger_cut_folder(void *unused) {
    (void)unused;
    log_cut("build/test", 3);
}

static void test_logger_hostile(void) {
    char output[4096];
    int failures = tally.failures;
    tally.failures = 0;
    int status = run_in_child(logger_cut_hostile, NULL, output, sizeof(output));
    tally.failures = failures;
    if (!CHECK(status == 0 && strstr(output, LOGGER_PATH ": 12 unreadable rows dropped") != NULL)) {
        printf("    %s\n", output);
    }
    CHECK(!logger_cut_missing());
    logger_check_cut("", 0, 3, "");
    logger_check_cut("{\"step\": 1}", 11, 3, ""); // no end of line: it may be half a row
    check_dies(1, "build/test is not a regular file", logger_cut_folder, NULL);
    unlink(LOGGER_PATH);
    CHECK(mkfifo(LOGGER_PATH, 0666) == 0);
    check_dies(1, LOGGER_PATH " is not a regular file\n  ---> ", logger_cut_fifo, NULL);
    unlink(LOGGER_PATH);
}

// ----------------------------------------------------------------------------
// for people

static void logger_print(void *record) {
    print_step((const StepRecord *)record, 600, 80.0);
}

static void test_logger_print(void) {
    const double seconds[] = {0.4, 59.4, 60.0, 200.0, 3599.0, 3600.0, 100000.0};
    const char *const texts[] = {"0s", "59s", "1m00s", "3m20s", "59m59s", "1h00m", "27h46m"};
    char text[32], output[4096];
    for (int i = 0; i < 7; i++) {
        format_duration(text, sizeof(text), seconds[i]);
        CHECK(strcmp(text, texts[i]) == 0);
    }
    StepRecord r = logger_record(9);
    CHECK(run_in_child(logger_print, &r, output, sizeof(output)) == 0);
    CHECK(strstr(output, "10/600") && strstr(output, " 3.1416 ") && strstr(output, " 1.20e-08 "));
    CHECK(strstr(output, "S 0.8750") && strstr(output, "stage II ") && strstr(output, "62.5 GFLOP/s"));
    CHECK(strstr(output, "1m20s left"));
    r.mfu = 0.451;
    r.stage = 3;
    CHECK(run_in_child(logger_print, &r, output, sizeof(output)) == 0);
    CHECK(strstr(output, "stage III") && strstr(output, "45.1% MFU") && strstr(output, "FLOP/s") == NULL);
    CHECK(seconds_now() > 0.0 && seconds_now() <= seconds_now() && peak_memory_gb() > 0.0);
}

static void test_logger(void) {
    CHECK(system("mkdir -p build/test") == 0);
    test_logger_step();
    test_logger_known();
    test_logger_explained();
    test_logger_not_finite();
    test_logger_validation();
    check_dies(1, "cannot write /dev/full", logger_write_full, NULL);
    test_logger_cut();
    test_logger_hostile();
    test_logger_has_validation();
    test_logger_print();
    unlink(LOGGER_PATH);
}

#endif
