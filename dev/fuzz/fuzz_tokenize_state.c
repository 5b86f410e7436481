// data/state.h: any tokenize.state.json is read or refused with exit 1; what is read is in range, and is
// written back as itself.
#include "fuzz.h"
#include "fuzz_document.h"
#include "data/state.h"

enum { INPUTS = 3, SHARD_TOKENS = 1000 };

typedef struct {
    Output out;
    CorpusPosition position;
    uint64_t identity;
} State;

static void load(State *s) {
    memset(s, 0, sizeof(*s));
    s->out.dir = fuzz_folder;
    s->out.shard_tokens = SHARD_TOKENS;
    s->out.job = "job";
    output_init(&s->out);
    tokenize_state_read(&s->out, INPUTS, &s->position, &s->identity);
}

static void check_series(const Series *series, int64_t tokens) {
    FUZZ_CHECK(series->finished >= 0 && series->shard.tokens >= 0 && series->shard.tokens < SHARD_TOKENS);
    FUZZ_CHECK(series->renamed == 0 && series->finished <= tokens / SHARD_TOKENS + 1);
}

static void check_ranges(const State *s) {
    const Output *out = &s->out;
    FUZZ_CHECK(s->position.file >= 0 && s->position.file <= INPUTS && s->position.offset >= 0);
    FUZZ_CHECK(out->domain_count >= 0 && out->domain_count <= MAX_DOMAINS && out->unreadable_bytes >= 0);
    FUZZ_CHECK(out->documents >= 0 && out->bytes >= 0 && out->tokens >= output_train_tokens(out));
    check_series(&out->train, output_train_tokens(out));
    for (int i = 0; i < out->domain_count; i++) {
        const Domain *d = &out->domains[i];
        FUZZ_CHECK(strspn(d->name, "abcdefghijklmnopqrstuvwxyz0123456789_") == strlen(d->name));
        FUZZ_CHECK(d->val.tokens >= 0 && d->val.tokens <= INT32_MAX && d->train_tokens >= 0);
        check_series(&d->train, d->train_tokens);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static State before, after;
    static int reading; // survives the longjmp
    fuzz_write(STATE_FILE, data, size);
    reading = 1;
    int died = setjmp(fuzz_died);
    if (died == 0) {
        load(&before);
        reading = 0; // from here on nothing is refused
        check_ranges(&before);
        tokenize_state_write(&before.out, &before.position, before.identity);
        load(&after);
        FUZZ_CHECK(memcmp(&before, &after, sizeof(before)) == 0);
    }
    FUZZ_CHECK(died == 0 || (died == 1 && reading));
    fuzz_free_all();
    return 0;
}
