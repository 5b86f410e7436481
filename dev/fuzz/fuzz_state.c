// state_file.h: any state.json is read or refused with exit 1; what is read is in range, and is written back
// as itself.
#include "fuzz.h"
#include "fuzz_document.h"
#include "llmc/files/checkpoint.h"

// all that a state and its options hold, as text
static char *describe(const RunState *s, const Provenance *provenance, const Options *options) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    fprintf(out, "%lld %lld %lld %a %d %a %d %lld %lld\n", (long long)s->step, (long long)s->optimizer_step,
            (long long)s->sequences, (double)s->sparsity.lambda, s->sparsity.stage, s->sparsity.min_sparsity,
            s->sparsity.rising_steps, (long long)s->sparsity.stage2_step, (long long)s->sparsity.stage3_step);
    provenance_write(out, provenance);
    options_write_json(out, options);
    fclose(out);
    return text;
}

static void check_ranges(const RunState *s, const Options *o) {
    int count;
    const OptionRow *rows = option_rows(&count);
    FUZZ_CHECK(s->step >= 0 && s->optimizer_step >= 0 && s->sequences >= 0);
    FUZZ_CHECK(s->step < INT64_MAX / 2 && s->optimizer_step < INT64_MAX / 2 && s->sequences < INT64_MAX / 2);
    FUZZ_CHECK(s->sparsity.lambda >= 1e-30f && s->sparsity.lambda <= 1e30f);
    FUZZ_CHECK(s->sparsity.stage >= STAGE_DENSE && s->sparsity.stage <= STAGE_SPARSE);
    FUZZ_CHECK(s->sparsity.rising_steps >= 0 && s->sparsity.rising_steps < INT32_MAX);
    for (int i = 0; i < count; i++) {
        const char *field = (const char *)o + rows[i].offset;
        int64_t integer;
        double real;
        memcpy(&integer, field, sizeof(integer));
        memcpy(&real, field, sizeof(real));
        double value = rows[i].kind == OPTION_REAL ? real : (double)integer;
        FUZZ_CHECK(rows[i].kind == OPTION_TEXT || (value >= rows[i].least && value <= rows[i].most));
        FUZZ_CHECK(rows[i].kind != OPTION_TEXT || memchr(field, '\0', OPTION_TEXT_SIZE) != NULL);
    }
}

static void load(RunState *state, Provenance *provenance, Options *options) {
    memset(state, 0, sizeof(*state));
    options_defaults(options, "tiny");
    FUZZ_CHECK(checkpoint_load_state(state, options, fuzz_folder) == 1);
    checkpoint_load_provenance(provenance, fuzz_folder);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static RunState state;
    static Options options;
    static Provenance provenance;
    static int reading; // survives the longjmp
    fuzz_write("state.json", data, size);
    reading = 1;
    int died = setjmp(fuzz_died);
    if (died == 0) {
        load(&state, &provenance, &options);
        reading = 0; // from here on nothing is refused
        check_ranges(&state, &options);
        char *before = describe(&state, &provenance, &options);
        state_write(fuzz_path, &state, &provenance, &options);
        load(&state, &provenance, &options);
        char *after = describe(&state, &provenance, &options);
        FUZZ_CHECK(strcmp(before, after) == 0);
        free(before);
        free(after);
    }
    FUZZ_CHECK(died == 0 || (died == 1 && reading));
    fuzz_free_all();
    return 0;
}
