/*
The shape of a model: its sizes, from the options (config_file.h reads and writes them as config.json), its
parameters and FLOPs.

    E_tot = E G experts of width F = ffn_mult d / G, k_tot = k G of them active          (Eq. 12, 13)
    FLOPs per sequence, forward and backward, no causal halving (Narayanan et al., 2021; the paper's Table 1):
        12 T L d^2 [(1 + KV/H + T/d) + 1.5 (F/d) k_tot + V / (2 L d)]

Errors: an impossible or unsupported shape is refused by the names of its sizes or flags.
*/
#ifndef CONFIG_H
#define CONFIG_H

#include "llmc/run/options.h"
#include "llmc/router.h"

typedef struct {
    int vocab_size; // V
    int hidden;     // d
    int layers;     // L
    int heads;      // H
    int kv_heads;   // KV
    int head_size;  // hd = d / H
    int ffn;        // F, width of one expert
    Router router;  // method, E_tot, k_tot, load balance
    int granularity;
    int max_seq_len;
    double norm_eps;
    double rope_theta;
    int bos, eos; // ids of the tokens that begin and end a text, for who generates; -1: not known
} Config;

// stops with `where` (the file, or "options") and the name that is wrong; fail: die or die_usage
static inline void config_check(const Config *c, const char *where, void (*fail)(const char *, ...)) {
    const Router *r = &c->router;
    if (c->hidden % c->heads != 0 || c->head_size % 2 != 0) {
        fail("%s: hidden size %d over %d heads must give an even head size\n  ---> change one of the two",
             where, c->hidden, c->heads);
    }
    if (c->heads % c->kv_heads != 0) {
        fail("%s: %d query heads are not a multiple of %d key/value heads\n  ---> change one of the two",
             where, c->heads, c->kv_heads);
    }
    if (r->active > r->experts) {
        fail("%s: %d active experts of only %d\n  ---> use fewer active experts, or more experts", where,
             r->active, r->experts);
    }
    if (r->experts % c->granularity != 0 || r->active % c->granularity != 0) {
        fail("%s: %d experts and %d active ones are not multiples of the granularity %d\n"
             "  ---> change one of them",
             where, r->experts, r->active, c->granularity);
    }
    if (router_merges(r->method) && r->active != 1) {
        fail(
            "%s: %s merges experts into one of a dense layer's width: granularity and active experts must be "
            "1, not %d and %d\n  ---> make them 1, or use another router",
            where, router_name(r->method), c->granularity, r->active / c->granularity);
    }
    double weights = 3.0 * c->layers * r->experts * c->hidden * c->ffn;
    if (weights > 1e15) { // sizes far below INT64_MAX from here on
        fail("%s: experts of %g weights in all\n  ---> use fewer layers or experts, or smaller ones", where,
             weights);
    }
}

static inline Config config_from_options(const Options *o) {
    Config c;
    memset(&c, 0, sizeof(c));
    int method = router_from_name(o->router);
    if (method < 0) {
        die_usage("--router %s: unknown\n  ---> one of:" ROUTER_NAMES, o->router);
    }
    int dense = !router_has_experts((RouterMethod)method);
    c.vocab_size = (int)o->vocab_size;
    c.hidden = (int)o->hidden;
    c.layers = (int)o->layers;
    c.heads = (int)o->heads;
    c.kv_heads = (int)o->kv_heads;
    c.head_size = c.hidden / c.heads;
    c.granularity = dense ? 1 : (int)o->granularity;
    c.router.method = (RouterMethod)method;
    c.router.load_balance = (int)o->load_balance;
    c.router.jitter = o->router_jitter;
    c.router.segment = (int)o->segment_length;
    c.max_seq_len = (int)o->seq_len;
    c.norm_eps = 1e-5;
    c.rope_theta = 1e6;
    c.bos = c.eos = -1; // until a tokenizer says
    int64_t experts = dense ? 1 : o->experts * o->granularity;
    int64_t active = dense ? 1 : o->active * o->granularity;
    int64_t width = o->ffn_mult * o->hidden;
    if (experts > 65536 || active > experts) {
        die_usage("--active %lld of --experts %lld, at --granularity %lld: expected no more active ones than "
                  "experts, and at most 65536 experts",
                  (long long)o->active, (long long)o->experts, (long long)o->granularity);
    }
    if (width % c.granularity != 0) {
        die_usage("--granularity %d does not divide the width %lld of a dense feed-forward layer",
                  c.granularity, (long long)width);
    }
    c.router.experts = (int)experts; // E G experts, k G of them active, F / G wide each (Eq. 12, 13)
    c.router.active = (int)active;
    c.ffn = (int)(width / c.granularity);
    config_check(&c, "options", die_usage);
    return c;
}

// ----------------------------------------------------------------------------
// counts

static inline int64_t config_qkv_width(const Config *c) {
    return (int64_t)(c->heads + 2 * c->kv_heads) * c->head_size;
}

// parameters of a model in which each token uses `experts` experts (E_tot: all; k_tot: the active ones)
static inline int64_t config_params(const Config *c, int experts) {
    int64_t d = c->hidden;
    int64_t router = router_has_weights(c->router.method) ? d * c->router.experts : 0;
    int64_t layer = 2 * d + config_qkv_width(c) * d + d * d + (int64_t)experts * 3 * d * c->ffn + router;
    return 2 * (int64_t)c->vocab_size * d + d + c->layers * layer;
}

// forward and backward of one sequence of T tokens, each using `active` experts
static inline double config_flops(const Config *c, int64_t T, double active) {
    double d = c->hidden;
    double attention = 1.0 + (double)c->kv_heads / c->heads + (double)T / d;
    double experts = 1.5 * (c->ffn / d) * active;
    double head = c->vocab_size / (2.0 * c->layers * d);
    return 12.0 * (double)T * c->layers * d * d * (attention + experts + head);
}

#endif
