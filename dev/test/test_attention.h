/*
attention.h: forward and backward against the T x T matrix in double, whose own gradient is checked by central
differences; and a key/value cache (start > 0), whose rows must be those of the whole forward bit for bit.
*/
#ifndef TEST_ATTENTION_H
#define TEST_ATTENTION_H

#include "llmc/attention.h"
#include "harness.h"

enum { ATTENTION_MOST = 25000, ATTENTION_MOST_T = 400 };

typedef struct {
    int B, T, H, KV, hd;
} AttentionShape;

// ----------------------------------------------------------------------------
// reference; objective: sum dout out

typedef struct {
    AttentionShape s;
    double qkv[ATTENTION_MOST], dout[ATTENTION_MOST];
    double out[ATTENTION_MOST], lse[ATTENTION_MOST], dqkv[ATTENTION_MOST];
} AttentionReference;

// where position t's query of head h, or key (1) or value (2) for it, begins in qkv
static int attention_at(const AttentionShape *s, int b, int t, int h, int what) {
    int block = what == 0 ? h : s->H + (what - 1) * s->KV + h / (s->H / s->KV);
    return (b * s->T + t) * (s->H + 2 * s->KV) * s->hd + block * s->hd;
}

static double attention_dot(const double *a, const double *b, int n) {
    double sum = 0.0;
    for (int c = 0; c < n; c++) {
        sum += a[c] * b[c];
    }
    return sum;
}

static void attention_add(double *to, double scale, const double *x, int n) {
    for (int c = 0; c < n; c++) {
        to[c] += scale * x[c];
    }
}

// p[0..t] of one row; returns its lse
static double attention_reference_row(const AttentionReference *r, int b, int h, int t, double *p) {
    const AttentionShape *s = &r->s;
    double max = -INFINITY, sum = 0.0;
    for (int j = 0; j <= t; j++) {
        const double *query = r->qkv + attention_at(s, b, t, h, 0),
                     *key = r->qkv + attention_at(s, b, j, h, 1);
        p[j] = attention_dot(query, key, s->hd) / sqrt(s->hd);
        max = fmax(max, p[j]);
    }
    for (int j = 0; j <= t; j++) {
        p[j] = exp(p[j] - max);
        sum += p[j];
    }
    for (int j = 0; j <= t; j++) {
        p[j] /= sum;
    }
    return max + log(sum);
}

static void attention_reference_row_backward(AttentionReference *r, int b, int h, int t, const double *p) {
    const AttentionShape *s = &r->s;
    int query = attention_at(s, b, t, h, 0), o = ((b * s->T + t) * s->H + h) * s->hd;
    double D = attention_dot(r->dout + o, r->out + o, s->hd);
    for (int j = 0; j <= t; j++) {
        int key = attention_at(s, b, j, h, 1), value = attention_at(s, b, j, h, 2);
        double ds = p[j] * (attention_dot(r->dout + o, r->qkv + value, s->hd) - D) / sqrt(s->hd);
        attention_add(r->dqkv + query, ds, r->qkv + key, s->hd);
        attention_add(r->dqkv + key, ds, r->qkv + query, s->hd);
        attention_add(r->dqkv + value, p[j], r->dout + o, s->hd);
    }
}

static void attention_reference(AttentionReference *r, int backward) {
    const AttentionShape *s = &r->s;
    double p[ATTENTION_MOST_T];
    memset(r->out, 0, sizeof(r->out));
    memset(r->dqkv, 0, sizeof(r->dqkv));
    for (int row = 0; row < s->B * s->H * s->T; row++) {
        int b = row / (s->H * s->T), h = row / s->T % s->H, t = row % s->T;
        double *out = r->out + ((b * s->T + t) * s->H + h) * s->hd;
        r->lse[row] = attention_reference_row(r, b, h, t, p);
        for (int j = 0; j <= t; j++) {
            attention_add(out, p[j], r->qkv + attention_at(s, b, j, h, 2), s->hd);
        }
        if (backward) {
            attention_reference_row_backward(r, b, h, t, p);
        }
    }
}

static double attention_objective(void *context) {
    AttentionReference *r = (AttentionReference *)context;
    attention_reference(r, 0);
    return attention_dot(r->dout, r->out, r->s.B * r->s.T * r->s.H * r->s.hd);
}

static void attention_reference_fill(AttentionReference *r, AttentionShape s, const float *qkv,
                                     const float *dout) {
    r->s = s;
    to_double(r->qkv, qkv, ATTENTION_MOST);
    to_double(r->dout, dout, ATTENTION_MOST);
    attention_reference(r, 1);
}

static void test_attention_reference(void) {
    const AttentionShape s = {2, 7, 4, 2, 4};
    static float qkv[ATTENTION_MOST], dout[ATTENTION_MOST];
    static AttentionReference r;
    static double numeric[ATTENTION_MOST], analytic[ATTENTION_MOST];
    int n = s.B * s.T * (s.H + 2 * s.KV) * s.hd;
    double worst = 0.0;
    fill_uniform(qkv, ATTENTION_MOST, 1, 2.0f);
    fill_uniform(dout, ATTENTION_MOST, 2, 1.0f);
    attention_reference_fill(&r, s, qkv, dout);
    memcpy(analytic, r.dqkv, sizeof(analytic));
    central_differences(numeric, r.qkv, (size_t)n, attention_objective, &r);
    for (int i = 0; i < n; i++) {
        worst = fmax(worst, fabs(numeric[i] - analytic[i]));
    }
    CHECK(worst < 1e-8); // of values about 1
}

// ----------------------------------------------------------------------------

typedef struct {
    float out[ATTENTION_MOST], lse[ATTENTION_MOST], dqkv[ATTENTION_MOST];
} AttentionRun;

// scale: of queries and keys, whose scores grow with its square
static void attention_check(int B, int T, int H, int KV, int hd, float scale, double tolerance) {
    const AttentionShape s = {B, T, H, KV, hd};
    static float qkv[ATTENTION_MOST], dout[ATTENTION_MOST];
    static AttentionReference r;
    static AttentionRun run[2];
    size_t outs = (size_t)(B * T * H * hd), all = (size_t)(B * T * (H + 2 * KV) * hd);
    CHECK(all <= ATTENTION_MOST && T <= ATTENTION_MOST_T);
    fill_uniform(qkv, ATTENTION_MOST, 3, scale);
    fill_uniform(dout, ATTENTION_MOST, 4, 1.0f);
    for (int i = 0; i < 2; i++) {
        use_threads(i + 1);
        memset(&run[i], 0xFF, sizeof(run[i])); // NaN: all is overwritten
        attention_forward(run[i].out, run[i].lse, qkv, B, T, 0, H, KV, hd);
        attention_backward(run[i].dqkv, dout, qkv, run[i].lse, B, T, H, KV, hd);
    }
    CHECK(memcmp(&run[0], &run[1], sizeof(run[0])) == 0);
    attention_reference_fill(&r, s, qkv, dout);
    int ok = check_close_to("attention out", run[0].out, r.out, outs, tolerance) &
             check_close_to("attention lse", run[0].lse, r.lse, (size_t)(B * H * T), tolerance) &
             check_close_to("attention dqkv", run[0].dqkv, r.dqkv, all, tolerance);
    int nonzero = 0;
    for (int i = 0; T == 1 && i < (int)all;
         i++) { // alone with itself: no gradient, not a rounding error of one
        nonzero += i % ((H + 2 * KV) * hd) < (H + KV) * hd && run[0].dqkv[i] != 0.0f;
    }
    CHECK(nonzero == 0);
    if (!ok) {
        printf("    B %d, T %d, H %d, KV %d, hd %d\n", B, T, H, KV, hd);
    }
}

// the rows from `start` on, computed alone
static void attention_check_cached(const float *qkv, AttentionShape s, int start, const float *out,
                                   const float *lse) {
    static float part[ATTENTION_MOST], part_lse[ATTENTION_MOST];
    int rows = s.T - start, width = s.H * s.hd, wrong = 0;
    attention_forward(part, part_lse, qkv, s.B, s.T, start, s.H, s.KV, s.hd);
    for (int b = 0; b < s.B; b++) {
        wrong += memcmp(part + b * rows * width, out + (b * s.T + start) * width,
                        (size_t)(rows * width) * sizeof(float)) != 0;
        for (int h = 0; h < s.H; h++) {
            wrong += memcmp(part_lse + (b * s.H + h) * rows, lse + (b * s.H + h) * s.T + start,
                            (size_t)rows * sizeof(float)) != 0;
        }
    }
    if (!CHECK(wrong == 0)) {
        printf("    T %d, start %d, hd %d\n", s.T, start, s.hd);
    }
}

static void test_attention_cache(int B, int T, int H, int KV, int hd) {
    const AttentionShape s = {B, T, H, KV, hd};
    static float qkv[ATTENTION_MOST], out[ATTENTION_MOST], lse[ATTENTION_MOST];
    CHECK(B * T * (H + 2 * KV) * hd <= ATTENTION_MOST);
    use_threads(1);
    fill_uniform(qkv, ATTENTION_MOST, 5, 1.5f);
    attention_forward(out, lse, qkv, B, T, 0, H, KV, hd);
    for (int start = 1; start < T; start += start < 70 ? 1 : 13) {
        attention_check_cached(qkv, s, start, out, lse);
    }
    // a token at a time, as the sampler goes; the later rows do not exist yet
    for (int t = 0; B == 1 && t < T; t++) {
        float row[256], row_lse[8];
        int wrong = 0;
        attention_forward(row, row_lse, qkv, 1, t + 1, t, H, KV, hd);
        wrong += memcmp(row, out + t * H * hd, (size_t)(H * hd) * sizeof(float)) != 0;
        for (int h = 0; h < H; h++) {
            wrong += row_lse[h] != lse[h * T + t];
        }
        CHECK(wrong == 0);
    }
}

static void test_attention(void) {
    test_attention_reference();
    attention_check(2, 1, 2, 1, 4, 1.0f, 1e-6);
    attention_check(20, 1, 2, 1, 24, 20.0f, 1e-6);
    attention_check(2, 17, 4, 2, 2, 1.0f, 1e-6);
    attention_check(1, 17, 6, 6, 24, 1.0f, 1e-6);
    attention_check(1, 64, 2, 2, 8, 1.0f, 1e-6);
    attention_check(2, 65, 2, 1, 6, 1.0f, 1e-6); // one row beyond a block
    attention_check(1, 130, 3, 1, 24, 1.0f, 1e-6);
    attention_check(1, 400, 2, 1, 10, 1.0f, 1e-6); // beyond the matmul's blocks too
    attention_check(1, 70, 2, 1, 24, 12.0f, 1e-4); // scores of hundreds, rounded at 1e-7 of themselves
    test_attention_cache(2, 130, 2, 1, 24);
    test_attention_cache(1, 130, 4, 2, 8);
    test_attention_cache(1, 400, 2, 2, 2);
}

#endif
