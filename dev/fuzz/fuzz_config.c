// config_file.h: any config.json is read or refused with exit 1; what is read is a model whose sizes fit, and
// is written back as itself.
#include "fuzz.h"
#include "fuzz_document.h"
#include "llmc/files/config_file.h"
#include "llmc/model.h"

static void check_config(const Config *c) {
    const Router *r = &c->router;
    FUZZ_CHECK(c->vocab_size > 0 && c->hidden > 0 && c->layers > 0 && c->ffn > 0 && c->max_seq_len > 0);
    FUZZ_CHECK(c->head_size > 0 && c->head_size % 2 == 0 && c->heads * c->head_size == c->hidden);
    FUZZ_CHECK(c->kv_heads > 0 && c->heads % c->kv_heads == 0 && c->norm_eps > 0.0 && c->rope_theta > 0.0);
    FUZZ_CHECK(r->active > 0 && r->active <= r->experts && r->experts % c->granularity == 0);
    FUZZ_CHECK((r->method == ROUTER_DENSE) == (router_name(r->method)[0] == 'd'));
    FUZZ_CHECK(config_flops(c, c->max_seq_len, r->experts) > 0.0);
    FUZZ_CHECK(config_params(c, r->active) <= config_params(c, r->experts));
}

static void check_table(const Config *c) {
    TensorTable table;
    Weights weights;
    int64_t next = 0;
    memset(&table, 0, sizeof(table));
    memset(&weights, 0, sizeof(weights));
    model_tensors(&table, &weights, c, NULL);
    for (int i = 0; i < table.count; i++) {
        FUZZ_CHECK(table.tensors[i].size > 0 &&
                   table.tensors[i].offset + table.tensors[i].size <= table.flat_size);
        next += table.tensors[i].size;
    }
    FUZZ_CHECK(table.num_params == next && next == config_params(c, c->router.experts));
    FUZZ_CHECK(next < INT64_MAX / 16); // bytes of weights, gradients and moments
}

static int same(const Config *a, const Config *b) {
    const Router *r = &a->router, *s = &b->router;
    return a->vocab_size == b->vocab_size && a->hidden == b->hidden && a->layers == b->layers &&
           a->heads == b->heads && a->kv_heads == b->kv_heads && a->head_size == b->head_size &&
           a->ffn == b->ffn && a->granularity == b->granularity && a->max_seq_len == b->max_seq_len &&
           r->method == s->method && r->experts == s->experts && r->active == s->active &&
           r->load_balance == s->load_balance && fabs(a->norm_eps / b->norm_eps - 1.0) < 1e-14 &&
           fabs(a->rope_theta / b->rope_theta - 1.0) < 1e-14;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int reading; // survives the longjmp
    fuzz_write("config.json", data, size);
    reading = 1;
    int died = setjmp(fuzz_died);
    if (died == 0) {
        Config c = config_read(fuzz_path);
        reading = 0; // from here on nothing is refused
        check_config(&c);
        if (c.layers < 16) {
            check_table(&c);
        }
        FILE *file = fopen(fuzz_path, "wb");
        config_write(&c, file);
        fclose(file);
        Config again = config_read(fuzz_path);
        FUZZ_CHECK(same(&c, &again));
    }
    FUZZ_CHECK(died == 0 || (died == 1 && reading));
    fuzz_free_all();
    return 0;
}
