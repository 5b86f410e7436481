// requests.h, score_block.h: any file of requests is laid out, or refused naming its line; what is laid out keeps the rules: each
// token is a target once, within the context, and a result is read back as it was written. Any line is a result of a request
// or is not. An input is a byte that chooses T, requests, and behind a zero byte a result of the last.
#include "fuzz.h"
#include "fuzz_document.h"
#include "llmc/run/score_block.h"
#include "fuzz_vocabulary.h"

static Tokenizer *bytes_tokenizer(void) {
    char folder[] = "/tmp/fuzz_score.XXXXXX", path[128];
    FUZZ_CHECK(mkdtemp(folder) != NULL);
    fuzz_write_bytes_vocabulary(folder);
    Tokenizer *t = tokenizer_load(folder);
    static const char *const names[] = {"vocab.json", "merges.txt"};
    for (int i = 0; i < 2; i++) {
        check_format(path, sizeof(path), "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
    return t;
}

static void check_block(const ScoreBlock *b, int T) {
    int64_t targets = 0, inputs = 0, tokens = 0;
    int spans = 0;
    for (int i = 0; i < b->sequences.count; i++) {
        const ScoreSequence *s = &b->sequences.items[i];
        FUZZ_CHECK(s->length >= 1 && s->length <= T && s->context >= 1 && s->context <= s->length);
        FUZZ_CHECK(s->inputs + (size_t)s->length <= b->num_ids && s->first == spans && s->count >= 1);
        inputs += s->length;
        for (; spans < s->first + s->count; spans++) {
            const ScoreSpan *span = &b->spans.items[spans];
            FUZZ_CHECK(span->row == s->context - 1 && span->count >= 1 &&
                       span->row + span->count <= s->length);
            FUZZ_CHECK(span->targets + (size_t)span->count <= b->num_ids && span->targets > 0);
            for (int t = 0; t < span->count; t++) { // the inputs are the tokens before the targets
                size_t target = span->targets + (size_t)t;
                FUZZ_CHECK(t == 0 || b->ids[s->inputs + (size_t)(span->row + t)] == b->ids[target - 1]);
            }
            targets += span->count;
        }
    }
    for (int i = 0; i < b->continuations.count; i++) {
        tokens += b->continuations.items[i].tokens;
    }
    FUZZ_CHECK(spans == b->spans.count && targets == tokens && inputs == b->inputs);
}

// with log likelihoods of all kinds
static void check_results(ScoreBlock *b, JsonArena *arena) {
    for (int i = 0; i < b->requests.count; i++) {
        const ScoreRequest *q = &b->requests.items[i];
        char *line = NULL;
        size_t size;
        for (int k = 0; k < q->count; k++) {
            b->continuations.items[q->first + k].ll =
                -1.0f / (float)(3 * k + 7) * (k % 2 == 0 ? 1e-6f : 1e6f);
            b->continuations.items[q->first + k].greedy = k % 3 == 0;
        }
        FILE *out = open_memstream(&line, &size);
        block_write(out, b, q);
        fclose(out);
        FUZZ_CHECK(block_read(b, q, line, size - 1, arena) == 1);
        (free)(line);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Tokenizer *tokenizer;
    static Requests r; // survive the longjmp
    static ScoreBlock b;
    static JsonArena arena;
    if (tokenizer == NULL) {
        tokenizer = bytes_tokenizer();
        fuzz_live_count = 0; // it stays
    }
    if (size == 0) {
        return 0;
    }
    ScoreRules rules = {tokenizer, 1 + data[0] % 40, data[0] % 2 ? " " : ""};
    const char *text = (const char *)data + 1, *end = (const char *)memchr(text, 0, size - 1);
    fuzz_write("requests", text, end != NULL ? (size_t)(end - text) : size - 1);
    memset(&b, 0, sizeof(b));
    json_arena_init(&arena);
    requests_open(&r, fuzz_path, "score");
    if (setjmp(fuzz_died) == 0) {
        for (const Json *json; (json = requests_next(&r)) != NULL;) {
            block_add(&b, &rules, &r, json);
        }
        check_block(&b, rules.T);
        check_results(&b, &arena);
        if (end != NULL && b.requests.count > 0) {
            block_read(&b, &b.requests.items[b.requests.count - 1], end + 1,
                       (size_t)((const char *)data + size - end) - 1, &arena);
        }
    }
    for (int i = 0; i < b.requests.count; i++) {
        (free)(b.requests.items[i].id); // open_memstream's
        b.requests.items[i].id = NULL;
    }
    fclose(r.file);
    (free)(r.text);
    fuzz_free_all();
    tokenizer->symbols = NULL; // its scratch may have grown
    tokenizer->heap = NULL;
    tokenizer->symbols_capacity = tokenizer->heap_capacity = 0;
    return 0;
}
