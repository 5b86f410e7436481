/*
--score and --generate: how requests become tokens (the lm-evaluation-harness's rules, written out a second
time), log likelihoods against the full forward of each sequence alone, for every router, and the files: going
on, lines that are wrong, results of others, a full disk.

The tokenizer is the built-in sample's; without it (make sample-data) the files' cases are skipped.
*/
#ifndef TEST_SCORE_H
#define TEST_SCORE_H

#include "dev/test/harness.h"
#include "dev/test/test_trainer.h"
#include "llmc/run/generate_run.h"

// ----------------------------------------------------------------------------
// model_score against sequences alone

enum { SCORE_T = 24, SCORE_V = 61, SCORE_B = 7 };

// sequences that share contexts of 9 tokens (0 to 3), their beginnings alone (4 follows 3 less far), nothing
// (5), and one of a single token; padding that is no token of theirs
typedef struct {
    int ids[SCORE_B * SCORE_T], lengths[SCORE_B], contexts[SCORE_B], rows[64], targets[64];
    int64_t n;
} ScoreCase;

static void score_case_fill(ScoreCase *c) {
    static const int lengths[SCORE_B] = {24, 9, 12, 17, 12, 20, 1}, contexts[SCORE_B] = {9, 9, 9, 9, 4, 9, 1};
    memset(c, 0, sizeof(*c));
    for (int b = 0; b < SCORE_B; b++) {
        c->lengths[b] = lengths[b];
        c->contexts[b] = contexts[b];
        for (int t = 0; t < SCORE_T; t++) {
            int shared = b < 4 ? t < contexts[b] : b == 4 && t < 7;
            int id = shared ? (t * 37 + 11) % SCORE_V : (t * 17 + b * 29 + 3) % SCORE_V;
            c->ids[b * SCORE_T + t] = t < lengths[b] ? id : SCORE_V - 1;
        }
        for (int t = contexts[b] - 1; t < lengths[b];
             t += 1 + b % 2, c->n++) { // some rows, one of them twice
            c->rows[c->n] = b * SCORE_T + t;
            c->targets[c->n] = (int)(c->n * 7 % SCORE_V);
        }
    }
    c->rows[c->n] = c->rows[c->n - 1];
    c->targets[c->n++] = 5;
}

static Model *score_model(const char *router, float scale) {
    Options o;
    options_defaults(&o, "tiny");
    check_format(o.router, sizeof(o.router), "%s", router);
    o.layers = 2;
    o.hidden = 48;
    o.heads = 4;
    o.experts = strcmp(router, "dense") == 0 ? 1 : 4;
    o.active = strcmp(router, "dense") == 0 || strcmp(router, "lory") == 0 ? 1 : 2;
    o.vocab_size = SCORE_V;
    o.seq_len = SCORE_T;
    o.batch = o.global_batch = SCORE_B;
    Config c = config_from_options(&o);
    Ranks alone = ranks_alone();
    ModelSettings settings = model_settings(&o, &c, FOR_INFERENCE, &alone);
    Model *m = model_open(&c, &settings);
    fill_uniform(m->params.values, (size_t)m->params.table.flat_size, 7, scale);
    model_route(m, router_row(c.router.method)->for_one_token, c.router.active);
    return m;
}

// ln softmax(z)_target in double; *greedy: no larger logit, no equal one before
static double score_reference(const float *z, int V, int target, int *greedy) {
    double sum = 0.0, max = z[0];
    *greedy = 1;
    for (int v = 0; v < V; v++) {
        max = z[v] > max ? z[v] : max;
        *greedy &= !(z[v] > z[target] || (z[v] == z[target] && v < target));
    }
    for (int v = 0; v < V; v++) {
        sum += exp((double)z[v] - max);
    }
    return (double)z[target] - max - log(sum);
}

static void score_router(const char *router) {
    static ScoreCase c;
    static float ll[64], alone[64], logits[SCORE_T * SCORE_V];
    static double want[64];
    unsigned char greedy[64], greedy_alone[64];
    Model *m = score_model(router, 0.2f);
    int same = 1, greedy_same = 1;
    score_case_fill(&c);
    ScoreBatch batch = {SCORE_B, SCORE_T, c.ids, c.lengths, c.contexts, c.n, c.rows, c.targets};
    model_score(m, &batch, ll, greedy);
    for (int64_t i = 0; i < c.n; i++) {
        int b = c.rows[i] / SCORE_T, row = c.rows[i] % SCORE_T, right;
        ScoreBatch one = {1, c.lengths[b], c.ids + b * SCORE_T, &c.lengths[b], &c.contexts[b],
                          1, &row,         &c.targets[i]};
        model_score(m, &one, &alone[i], &greedy_alone[i]);
        model_forward(m, c.ids + b * SCORE_T, 1, c.lengths[b], 0, no_draws, &c.contexts[b], NULL);
        matmul_forward(logits, m->acts.normed, m->params.weights.head, c.lengths[b], m->config.hidden,
                       SCORE_V);
        want[i] = score_reference(logits + row * SCORE_V, SCORE_V, c.targets[i], &right);
        same = same && ll[i] == alone[i] && greedy[i] == greedy_alone[i];
        greedy_same = greedy_same && greedy[i] == right;
    }
    CHECK(same); // shared contexts, neighbours and padding do not change a bit
    CHECK(greedy_same);
    check_close_to(router, ll, want, (size_t)c.n, 1e-6);
    model_close(m);
}

// two threads and the smallest batch: the same bits
static void score_threads(void) {
    static ScoreCase c;
    static float ll[2][64];
    unsigned char greedy[64];
    Model *m = score_model("relu", 0.2f);
    score_case_fill(&c);
    ScoreBatch batch = {SCORE_B, SCORE_T, c.ids, c.lengths, c.contexts, c.n, c.rows, c.targets};
    for (int threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        model_score(m, &batch, ll[threads - 1], greedy);
    }
    CHECK(memcmp(ll[0], ll[1], (size_t)c.n * sizeof(float)) == 0);
    model_close(m);
}

// ----------------------------------------------------------------------------
// layout

// the harness's get_rolling_token_windows and make_disjoint_window, in its own terms: a window's inputs and
// targets as ranges of the text's tokens, -1 being end-of-text
static void score_windows(int tokens, int T) {
    ScoreBlock b;
    Requests r;
    Tokenizer bytes;
    memset(&b, 0, sizeof(b));
    memset(&r, 0, sizeof(r));
    memset(&bytes, 0, sizeof(bytes));
    ScoreRules rules = {&bytes, T, " "};
    ScoreRequest request = {NULL, 0, 0, 0, -1, 0};
    *LIST_ADD(ScoreRequest, b.requests) = request;
    tokenizer_reserve(&b.ids, 0, &b.capacity, (size_t)tokens + 1);
    for (int i = 0; i <= tokens; i++) {
        b.ids[i] = i - 1; // token i is i
    }
    b.num_ids = (size_t)tokens + 1;
    block_continue(&b, tokens, -1);
    block_add_windows(&b, &rules, 0, (size_t)tokens);
    int predicted = 0, good = 1, windows = 0;
    while (predicted < tokens) {
        int count = tokens - predicted < T ? tokens - predicted : T, end = predicted + count;
        int first = predicted == 0 ? -1 : end - T - 1; // inputs first .. end - 2
        const ScoreSpan *span = &b.spans.items[windows];
        good = good && windows < b.spans.count && span->count == count;
        const ScoreSequence *s = &b.sequences.items[windows++];
        good = good && s->length == end - 1 - first && s->context == s->length - count + 1 &&
               span->row == s->length - count;
        for (int i = 0; i < s->length && good; i++) {
            good = b.ids[s->inputs + (size_t)i] == first + i;
        }
        for (int i = 0; i < count && good; i++) {
            good = b.ids[span->targets + (size_t)i] == predicted + i;
        }
        predicted += count;
    }
    if (!CHECK(good && windows == b.spans.count && b.sequences.count == windows)) {
        printf("    %d tokens in windows of %d\n", tokens, T);
    }
    block_free(&b);
}

static void score_space(void) {
    static const char *const cases[][2] = {
        {"a b ", "a b"},
        {"a\t\n\x1c\x1f ", "a"},
        {"a\xc2\x85\xc2\xa0", "a"},
        {"a\xe3\x80\x80", "a"},
        {" ", ""},
        {"a\xe2\x80\x8b", NULL},
        {"\xe2\x80\xaf\xe2\x81\x9f", ""},
        {"a\xe1\x9a\x80 \xe2\x80\x8a", "a"},
        {"\x1b", NULL},
        {"\xf0\x9f\x98\x80 ", "\xf0\x9f\x98\x80"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        size_t want = strlen(cases[i][1] != NULL ? cases[i][1] : cases[i][0]);
        CHECK(size_without_space(cases[i][0], strlen(cases[i][0])) == want);
    }
    CHECK(count_characters("a\xc3\xa9\xf0\x9f\x98\x80", 7) == 3);
}

// ----------------------------------------------------------------------------
// files

#define SCORE_RUN "build/test/score_run"
#define SCORE_WORDS "--load " SCORE_RUN "/latest --threads 1 --batch 3 "

static void score_write(const char *path, const char *text) {
    FILE *file = check_fopen(path, "wb", "");
    check_fwrite(text, 1, strlen(text), file, path);
    check_fclose(file, path);
}

static const char score_requests[] =
    "{\"id\": \"a\\n\", \"query\": \"static inline\", \"choices\": [\"int\", \"void f\", \"\\u00e9 x\"], "
    "\"gold\": 1}\n"
    "{\"query\": \"return\", \"choices\": [\"0\", \"1\"], \"delimiter\": \"\", \"gold\": 0}\n"
    "{\"id\": 1.50, \"context\": \"for (int i = 0; \", \"continuations\": [\"i < n\", \"i++\", \" i < n; "
    "i++\"]}\n"
    "{\"id\": null, \"context\": \"\", \"continuations\": [\"# include\"]}\n"
    "{\"context\": \" \\u00a0\\n\", \"continuations\": [\"x\"]}\n"
    "{\"text\": \"A text that is cut into windows, since it is longer than the context that the model has "
    "been given by "
    "its trainer: window after window, each token once.\"}\n"
    "{\"text\": \"\"}\n"
    "{\"id\": false, \"text\": \"a<|endoftext|>b\", \"more\": {\"is\": [\"ignored\"]}}\n"
    "{\"context\": \"A context that is longer than the context of the model, so that it is cut from the "
    "left, and "
    "of it stays only the end, which is this\", \"continuations\": [\" end\", \" beginning of it\"]}\n";

// ll and greedy of one continuation, by the rules as section 4.3 of a harness's reader would write them down
static double score_by_hand(Model *m, Tokenizer *t, const char *context, const char *continuation, int T,
                            int *greedy) {
    int *c = NULL, *w = NULL, V = m->config.vocab_size;
    size_t nc = 0, nw = 0, room_c = 0, room_w = 0;
    char bare[4096], whole[4096];
    check_format(bare, sizeof(bare), "%s", context);
    check_format(whole, sizeof(whole), "%s%s", context, continuation);
    while (bare[0] != '\0' && strchr(" \n", bare[strlen(bare) - 1]) != NULL) {
        bare[strlen(bare) - 1] = '\0';
    }
    tokenizer_encode(t, bare, strlen(bare), &c, &nc, &room_c);
    tokenizer_encode(t, whole, strlen(whole), &w, &nw, &room_w);
    int *all = NEW(int, nc + nw + 1), n = 0, start;
    if (nc == 0) {
        all[n++] = t->eot;
    }
    for (size_t i = 0; i < nc; i++) {
        all[n++] = c[i];
    }
    start = n;
    for (size_t i = nc; i < nw; i++) {
        all[n++] = w[i];
    }
    int from = n > T + 1 ? n - T - 1 : 0, length = n - from - 1;
    float *logits = NEW(float, (int64_t)length *V);
    double sum = 0.0;
    *greedy = 1;
    model_forward(m, all + from, 1, length, 0, no_draws, NULL, NULL);
    matmul_forward(logits, m->acts.normed, m->params.weights.head, length, m->config.hidden, V);
    for (int i = start; i < n; i++) {
        int right;
        sum += score_reference(logits + (int64_t)(i - 1 - from) * V, V, all[i], &right);
        *greedy &= right;
    }
    free(logits);
    free(all);
    free(c);
    free(w);
    return sum;
}

// requests of forms 1 and 2 in score_requests without tricks of white space beyond blanks, by hand
static void score_file_by_hand(const char *results) {
    JsonArena arena, line_arena;
    char *text = check_read_file(results, NULL, ""), error[128], folder[PATH_SIZE];
    const char *line = score_requests, *result = text;
    Requests r;
    json_arena_init(&arena);
    json_arena_init(&line_arena);
    checkpoint_find(folder, SCORE_RUN, "");
    Config c = config_read(SCORE_RUN "/latest/config.json");
    Options o;
    options_defaults(&o, "tiny");
    o.batch = o.global_batch = 1;
    o.seq_len = 16;
    Ranks alone = ranks_alone();
    ModelSettings settings = model_settings(&o, &c, FOR_INFERENCE, &alone);
    Model *m = model_open(&c, &settings);
    FlatBuffer params = model_buffer(m, BUFFER_PARAMS, RANGES_KEPT);
    checkpoint_load_weights(&params, folder);
    Tokenizer *t = tokenizer_load(folder);
    memset(&r, 0, sizeof(r));
    for (int i = 0; i < 4; i++, line = strchr(line, '\n') + 1, result = strchr(result, '\n') + 1) {
        const Json *q = json_parse(line, strcspn(line, "\n"), &arena, error, sizeof(error));
        const Json *s = json_parse(result, strcspn(result, "\n"), &line_arena, error, sizeof(error));
        int choices = json_get(q, "choices") != NULL;
        const char *context = json_get(q, choices ? "query" : "context")->text;
        const char *delimiter = choices && json_get(q, "delimiter") == NULL ? " " : "";
        const Json *list = json_get(q, choices ? "choices" : "continuations")->child;
        const Json *ll = json_get(s, "ll")->child, *flag = json_get(s, "greedy")->child;
        for (; list != NULL && CHECK(ll != NULL && flag != NULL);
             list = list->next, ll = ll->next, flag = flag->next) {
            char continuation[256];
            int greedy;
            double got = 0.0;
            check_format(continuation, sizeof(continuation), "%s%s", delimiter, list->text);
            double want = score_by_hand(m, t, context, continuation, 16, &greedy);
            CHECK(json_double(ll, &got) && fabs(got - want) <= 1e-5 * fabs(want));
            CHECK(flag->boolean == greedy);
        }
    }
    tokenizer_free(t);
    model_close(m);
    json_arena_free(&arena);
    json_arena_free(&line_arena);
    free(text);
}

static void score_copy_part(const char *to, const char *from, size_t most, const char *torn) {
    size_t size;
    char *text = check_read_file(from, &size, "");
    FILE *file = check_fopen(to, "wb", "");
    check_fwrite(text, 1, size < most ? size : most, file, to);
    check_fwrite(torn, 1, strlen(torn), file, to);
    check_fclose(file, to);
    free(text);
}

// cut anywhere, the same command makes the file whole, bit for bit
static void score_goes_on(const char *option) {
    size_t size;
    char *whole = check_read_file("build/test/results", &size, "");
    for (size_t cut = 0; cut <= size; cut += cut < 80 ? 1 + size / 60 : 1 + size / 7) {
        score_copy_part("build/test/results_part", "build/test/results", cut, cut % 2 ? "{\"id\":" : "");
        int status =
            trainer_run(SCORE_WORDS "--%s build/test/requests --out build/test/results_part", option);
        trainer_succeeds(status, "going on");
        if (!CHECK(trainer_files_equal("build/test/results", "build/test/results_part"))) {
            printf("    --%s, cut after %zu bytes\n", option, cut);
        }
    }
    score_copy_part("build/test/results_part", "build/test/results", SIZE_MAX, "{\"id\":");
    trainer_succeeds(
        trainer_run(SCORE_WORDS "--%s build/test/requests --out build/test/results_part", option),
        "all done, and a torn line");
    CHECK(trainer_files_equal("build/test/results", "build/test/results_part"));
    free(whole);
}

// what is refused leaves the results as they were
static void score_refuses_results(const char *option, const char *requests, const char *message) {
    char words[512];
    score_write("build/test/requests_other", requests);
    score_copy_part("build/test/results_other", "build/test/results", SIZE_MAX, "");
    check_format(words, sizeof(words),
                 SCORE_WORDS "--%s build/test/requests_other --out build/test/results_other", option);
    trainer_refuses(1, message, words);
    CHECK(trainer_files_equal("build/test/results", "build/test/results_other"));
}

// a file of one line without an end that is no result's beginning is somebody's, and stays
static void score_keeps_others_files(const char *text) {
    size_t size;
    score_write("build/test/results_other", text);
    trainer_refuses(1, "ends with something else than results",
                    SCORE_WORDS "--score build/test/requests --out build/test/results_other");
    char *now = check_read_file("build/test/results_other", &size, "");
    CHECK(size == strlen(text) && memcmp(now, text, size) == 0);
    free(now);
}

static void score_refuses_line(const char *option, const char *line, const char *message) {
    char text[1024], words[512], named[512];
    check_format(text, sizeof(text), "{\"context\":\"a\",\"continuations\":[\"b c\"]}\n%s\n", line);
    check_format(named, sizeof(named), "build/test/requests_bad:2: %s", message);
    score_write("build/test/requests_bad", text);
    check_format(words, sizeof(words),
                 SCORE_WORDS "--%s build/test/requests_bad --out build/test/results_bad", option);
    trainer_refuses(1, named, words);
    CHECK(!path_exists("build/test/results_bad"));
}

static void score_bad_lines(void) {
    static const char *const lines[][2] = {
        {"", "not valid JSON: column 1"},
        {"{\"context\":\"a\",", "not valid JSON: column 16"},
        {"[1]", "not an object"},
        {"{\"context\":\"a\",\"context\":\"b\",\"continuations\":[\"c\"]}", "\"context\" stands twice"},
        {"{\"context\":\"a\"}", "a request has \"continuations\", \"choices\" or \"text\""},
        {"{\"context\":\"a\",\"continuations\":[\"b\"],\"text\":\"c\"}", "a request has"},
        {"{\"context\":1,\"continuations\":[\"b\"]}", "\"context\" is not a string"},
        {"{\"continuations\":[\"b\"]}", "\"context\" is missing"},
        {"{\"context\":\"a\",\"continuations\":[]}", "\"continuations\" is not a list"},
        {"{\"context\":\"a\",\"continuations\":[\"b\",2]}",
         "\"continuations\" holds something that is not a string"},
        {"{\"context\":\"a\",\"continuations\":[\" b\",\"\"]}", "continuation 1 adds no token"},
        {"{\"query\":\"a\",\"choices\":[\"b\"],\"gold\":1}", "\"gold\" is not an integer from 0 to 0"},
        {"{\"query\":\"a\",\"choices\":[\"b\"],\"gold\":0.5}", "\"gold\" is not an integer"},
        {"{\"query\":\"a\",\"choices\":[\"b\"],\"delimiter\":0}", "\"delimiter\" is not a string"},
        {"{\"id\":{},\"text\":\"a\"}", "\"id\" is neither"},
        {"{\"text\":\"\\ud800\"}", "not valid JSON: column 10"},
        {"{\"text\":\"\xff\"}", "not valid JSON"},
        {"{\"context\":\"a\",\"continuations\":[\"0123456789 0123456789 0123456789 0123456789 0123456789 "
         "0123456789\"]}",
         "continuation 0 has"},
    };
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        score_refuses_line("score", lines[i][0], lines[i][1]);
    }
    score_refuses_line("generate", "{\"context\":\"a\",\"until\":7}", "\"until\" is neither");
    score_refuses_line("generate", "{\"context\":\"a\",\"until\":[7]}", "\"until\" holds something");
    score_refuses_line("generate", "{\"context\":\"a\",\"temperature\":-1}",
                       "\"temperature\" is not a number");
    score_refuses_line("generate", "{\"context\":\"a\",\"max_tokens\":-1}",
                       "\"max_tokens\" is not an integer");
    score_refuses_line("generate", "{\"text\":\"a\"}", "\"context\" is missing");
    trainer_refuses(1, "cannot open build/test/nothing",
                    SCORE_WORDS "--score build/test/nothing --out build/test/r");
    trainer_refuses(1, "not a regular file", SCORE_WORDS "--score /dev/null --out build/test/r");
    trainer_refuses(1, "not a regular file", SCORE_WORDS "--score build/test/requests --out /dev/null");
    trainer_refuses(1, "build/test/nowhere/r",
                    SCORE_WORDS "--score build/test/requests --out build/test/nowhere/r");
    trainer_refuses(1, "is the file of requests",
                    SCORE_WORDS "--score build/test/requests --out build/test/requests");
    trainer_refuses(2, "nowhere to write", SCORE_WORDS "--score build/test/requests");
    trainer_refuses(2, "need a model", "--score build/test/requests --out build/test/r");
    trainer_refuses(2, "exclude each other", SCORE_WORDS "--score a --generate b --out build/test/r");
    trainer_refuses(2, "exclude each other", SCORE_WORDS "--score a --out build/test/r --bench");
    trainer_refuses(2, "exclude each other", SCORE_WORDS "--score a --out build/test/r --dump build/test/d");
    trainer_refuses(2, "--eval and --score exclude", SCORE_WORDS "--score a --eval --out build/test/r");
    trainer_refuses(2, "one at a time", SCORE_WORDS "--score a --trace b --out build/test/r");
    trainer_refuses(2, "--samples belongs to", SCORE_WORDS "--score a --samples 2 --out build/test/r");
    trainer_refuses(2, "--delimiter belongs to", SCORE_WORDS "--generate a --delimiter x --out build/test/r");
}

// (libomp too wants files of a kilobyte, which the limit must leave it)
static void score_full_disk(void) {
    static TrainerCommand command;
    CHECK(system("for i in 1 2 3 4 5 6 7 8 9; do cat build/test/requests; done >build/test/requests_full") ==
          0);
    remove("build/test/results_full");
    remove("build/test/results_whole");
    trainer_succeeds(
        trainer_run(SCORE_WORDS "--score build/test/requests_full --out build/test/results_whole"),
        "with room on the disk");
    trainer_words(&command, SCORE_WORDS "--score build/test/requests_full --out build/test/results_full");
    command.largest_file = 2048;
    check_dies(1, "cannot write build/test/results_full", trainer_main, &command);
    trainer_succeeds(
        trainer_run(SCORE_WORDS "--score build/test/requests_full --out build/test/results_full"),
        "after the disk was freed");
    CHECK(trainer_files_equal("build/test/results_whole", "build/test/results_full"));
}

// accuracy, worked by hand from the results' own numbers
static void score_accuracy(void) {
    score_write("build/test/requests_gold", "{\"query\":\"a\",\"choices\":[\"b\",\"c d e f\"],\"gold\":0}\n"
                                            "{\"query\":\"a\",\"choices\":[\"b\",\"c d e f\"],\"gold\":1}\n"
                                            "{\"query\":\"a\",\"choices\":[\"b\",\"b\"],\"gold\":0}\n");
    remove("build/test/results_gold");
    trainer_succeeds(
        trainer_run(SCORE_WORDS "--score build/test/requests_gold --out build/test/results_gold"), "gold");
    // one of the first two is right by either measure; of equals the first is chosen: 2 of 3
    CHECK(strstr(trainer_output, "score     n 3 | acc 0.6667 +- 0.3333 | acc_norm 0.6667 +- 0.3333\n") !=
          NULL);
    score_write("build/test/requests_gold", "{\"query\":\"a\",\"choices\":[\"b\"],\"gold\":0}\n"
                                            "{\"query\":\"a\",\"choices\":[\"b\"],\"gold\":0}\n");
    remove("build/test/results_gold");
    trainer_succeeds(
        trainer_run(SCORE_WORDS "--score build/test/requests_gold --out build/test/results_gold"), "one");
    double ll = 0.0, acc = -1.0, perplexity = 0.0;
    char *text = check_read_file("build/test/results_gold", NULL, "");
    CHECK(sscanf(text, "{\"ll\":[%lf]", &ll) == 1);
    char *row = strstr(trainer_output, "acc ");
    CHECK(row != NULL && sscanf(row, "acc %lf +- 0.0000 | perplexity %lf +- 0", &acc, &perplexity) == 2);
    CHECK((acc == 0.0 || acc == 1.0) && fabs(perplexity - exp(-ll)) <= 1e-3 * perplexity);
    free(text);
}

static void score_files(void) {
    trainer_clear("score_run");
    trainer_clear("score_other");
    remove("build/test/results");
    remove("build/test/results_bad");
    trainer_succeeds(
        trainer_run("--layers 2 --hidden 32 --heads 2 --kv-heads 1 --experts 4 --seq-len 16 --batch 4 "
                    "--steps 20 --lr 3e-3 --sample-tokens 0 --val-data= --out " SCORE_RUN),
        "a model to score");
    score_write("build/test/requests", score_requests);
    trainer_succeeds(trainer_run(SCORE_WORDS "--score build/test/requests --out build/test/results"),
                     "score");
    CHECK(strstr(trainer_output, "score     n 9 requests\n") != NULL);
    score_file_by_hand("build/test/results");
    score_goes_on("score");
    score_refuses_results("score", "{\"text\":\"a\"}\n",
                          "build/test/results_other:1 is not the result of line 1");
    score_refuses_results("generate", "{\"context\":\"a\"}\n",
                          "build/test/results_other:1 is not the result of line 1");
    char fewer[sizeof(score_requests)];
    check_format(fewer, sizeof(fewer), "%.*s", (int)(strrchr(score_requests, 'A') - score_requests - 13),
                 score_requests);
    score_refuses_results("score", fewer, "more results than");
    score_keeps_others_files("a note to myself");
    score_keeps_others_files("{\"text\":\"a\"}");
    trainer_refuses(1, "is the file of requests",
                    SCORE_WORDS "--score build/test/requests --out build/test/requests");
    trainer_succeeds(
        trainer_run("--load " SCORE_RUN "/latest --steps 40 --lr 1e-2 --val-data= --sample-tokens 0 "
                    "--batch 4 --seq-len 16 --data build/sample/train_*.bin --out build/test/score_other"),
        "other weights");
    trainer_refuses(1, "other weights",
                    "--load build/test/score_other/latest --score build/test/requests --out "
                    "build/test/results --seq-len 16");
    score_bad_lines();
    score_full_disk();
    score_accuracy();
}

static void score_generates(void) {
    score_write("build/test/requests",
                "{\"id\":1,\"context\":\"static inline\",\"max_tokens\":30,\"until\":[\"\",\"e\"]}\n"
                "{\"id\":\"x\",\"context\":\"\",\"max_tokens\":20,\"temperature\":1}\n"
                "{\"context\":\"a context that is longer than the window by far, of which only the end "
                "counts\",\"max_tokens\":9,"
                "\"temperature\":1.5,\"top_k\":5,\"until\":\"zzz\"}\n"
                "{\"context\":\"a\",\"max_tokens\":0}\n"
                "{\"context\":\"static inline\",\"max_tokens\":30,\"until\":null}\n");
    remove("build/test/results");
    trainer_succeeds(trainer_run(SCORE_WORDS "--generate build/test/requests --out build/test/results"),
                     "generate");
    CHECK(strstr(trainer_output, "generate  build/test/results has 5 of 5 results\n") != NULL);
    score_goes_on("generate");
    char *text = check_read_file("build/test/results", NULL, ""), error[128], *line = text;
    const Json *row[5];
    JsonArena arena;
    json_arena_init(&arena);
    for (int i = 0; i < 5; i++, line = strchr(line, '\n') + 1) {
        row[i] = json_get(json_parse(line, strcspn(line, "\n"), &arena, error, sizeof(error)), "text");
        CHECK(row[i] != NULL);
    }
    const char *stop = strchr(row[4]->text, 'e'); // the last text is the first one, not cut
    size_t want = stop != NULL ? (size_t)(stop - row[4]->text) : row[4]->text_size;
    CHECK(row[0]->text_size == want && memcmp(row[0]->text, row[4]->text, want) == 0);
    CHECK(row[3]->text_size == 0 && row[4]->text_size > 0);
    json_arena_free(&arena);
    free(text);
}

static void test_score(void) {
    for (int method = 0; method < ROUTER_COUNT; method++) {
        score_router(router_name((RouterMethod)method));
    }
    score_threads();
    for (int tokens = 0; tokens <= 30; tokens++) {
        for (int T = 1; T <= 9; T++) {
            score_windows(tokens, T);
        }
    }
    score_space();
    if (!path_exists("build/sample/vocab.json")) {
        skip_case("files of requests: no build/sample (make sample-data)");
        return;
    }
    score_files();
    score_generates();
}

#endif
