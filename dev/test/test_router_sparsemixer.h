/*
router_sparsemixer.h: the uniform numbers against given ones, rounds worked by hand, the gradient against
central differences, draws that a dump repeats, and the draws as random numbers: frequencies, multipliers,
independence.
*/
#ifndef TEST_ROUTER_SPARSEMIXER_H
#define TEST_ROUTER_SPARSEMIXER_H

#include "llmc/router_sparsemixer.h"
#include "harness.h"

enum { MIXER_TOKENS = 17, MIXER_E = 5, MIXER_CELLS = MIXER_TOKENS * MIXER_E };

static void test_sparsemixer_uniform(void) {
    uint64_t first = draw_key(1234, 0), later = draw_key(1234, 7);
    CHECK(fabs(draw_uniform(first, 0, 0) - 0.859933674) < 1e-8);
    CHECK(fabs(draw_uniform(first, 0, 1) - 0.754564941) < 1e-8);
    CHECK(fabs(draw_uniform(later, 3, 2 * 12345) - 0.364515007) < 1e-8);
    CHECK(fabs(draw_uniform(later, 3, 2 * 12345 + 1) - 0.368903339) < 1e-8);
}

// z* = 2: with r = 1/4 a candidate is at most half of the larger magnitude below; -8 is one, |z| being large
static void test_sparsemixer_round(void) {
    const float z[5] = {1.0f, 2.0f, 0.5f, 2.0f, -8.0f}, below[3] = {-1.0f, -1.5f, -4.0f};
    unsigned char taken[5] = {0};
    RouterRound round;
    CHECK(sparsemixer_begin_round(&round, z, taken, 5, 0.25f) == 1 && round.max == 2.0f); // a tie: the lower
    CHECK(fabsf(round.sum - (2.0f + expf(-1.0f))) < 1e-6f);
    CHECK(sparsemixer_probability(&round, 0.5f, 0.25f) == 0.0f);
    CHECK(fabsf(sparsemixer_probability(&round, 1.0f, 0.25f) * round.sum - expf(-1.0f)) < 1e-6f);
    CHECK(sparsemixer_draw(&round, z, taken, 5, 0.25f, 0.15f, 1) == 0); // 0.155, 0.578, 1
    CHECK(sparsemixer_draw(&round, z, taken, 5, 0.25f, 0.16f, 1) == 1);
    CHECK(sparsemixer_draw(&round, z, taken, 5, 0.25f, 0.57f, 1) == 1);
    CHECK(sparsemixer_draw(&round, z, taken, 5, 0.25f, 0.58f, 1) == 3);
    CHECK(sparsemixer_draw(&round, z, taken, 5, 0.25f, 1.5f, 1) == 3); // what rounding may leave
    taken[1] = taken[3] = 1;
    CHECK(sparsemixer_begin_round(&round, z, taken, 5, 0.25f) == 0 && round.max == 1.0f);
    memset(taken, 0, sizeof(taken));
    CHECK(sparsemixer_begin_round(&round, below, taken, 3, 0.25f) == 0); // 0.5 <= 0.75; 3 > 2
    CHECK(fabsf(round.sum - (1.0f + expf(-0.5f))) < 1e-6f);
    CHECK(sparsemixer_begin_round(&round, below, taken, 3, 0.0f) == 0 && round.sum == 1.0f);
}

// without a key: the k largest in order, M = 1
static void test_sparsemixer_evaluation(void) {
    const float z[8] = {1.0f, 0.9f, 3.0f, -1.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    const RouterDraws none = {NULL, 0, 0};
    PairList pairs = pairs_empty();
    router_sparsemixer_forward(&pairs, z, none, NULL, 2, 4, 2, 0.1f);
    CHECK(pairs.num_pairs == 4 && pairs.expert[0] == 0 && pairs.expert[1] == 2);
    CHECK(pairs.rounds[0].draw == 3 && pairs.rounds[1].draw == 1); // 3 alone in A; then 1 and 0.9
    CHECK(pairs.gate[1] == 1.0f && fabsf(pairs.gate[0] - 1.0f / (1.0f + expf(-0.1f))) < 1e-6f);
    CHECK(pairs.expert[2] == 0 && pairs.expert[3] == 1);
    CHECK(fabsf(pairs.gate[2] - 0.25f) < 1e-6f && fabsf(pairs.gate[3] - 1.0f / 3.0f) < 1e-6f);
    pairs_free(&pairs);
}

// forced draws come back, with their order and multipliers; a row without them has no pair
static void test_sparsemixer_forced(void) {
    const float forced[12] = {0, -1, 2, 0, 1, 0, 0, -2, 0, 0, 0, 0};
    const RouterDraws none = {NULL, 0, 0};
    float z[12] = {0}, draws[12];
    PairList pairs = pairs_empty();
    router_sparsemixer_forward(&pairs, z, none, forced, 3, 4, 2, 0.1f);
    CHECK(pairs.num_pairs == 4 && pairs.row_start[2] == 4 && pairs.row_start[3] == 4);
    CHECK(fabsf(pairs.gate[0] - 0.25f / 3.0f) < 1e-6f && fabsf(pairs.gate[1] - 1.0f / 3.0f) < 1e-6f);
    CHECK(fabsf(pairs.gate[2] - 0.25f) < 1e-6f && fabsf(pairs.gate[3] - 1.0f / 9.0f) < 1e-6f);
    router_sparsemixer_draws(draws, pairs.rounds, 3, 4, 2);
    CHECK(memcmp(draws, forced, sizeof(draws)) == 0);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// gradient of sum_tj c_tj p^j_{D_j} + weight sum_e f_e mean_t s_te; draws, candidates and f constant

static const int64_t mixer_counts[MIXER_E] = {9, 0, 21, 1, 3};

typedef struct {
    double z[MIXER_CELLS], c[MIXER_CELLS], weight, global_tokens;
    unsigned char candidate[MIXER_E][MIXER_CELLS]; // of round j
    int drawn[MIXER_TOKENS * MIXER_E], k;
} MixerCase;

static double mixer_objective(void *context) {
    const MixerCase *x = (const MixerCase *)context;
    double total = 0.0;
    for (int t = 0; t < MIXER_TOKENS; t++) {
        const double *z = x->z + t * MIXER_E;
        double all = 0.0, weighted = 0.0;
        for (int e = 0; e < MIXER_E; e++) {
            all += exp(z[e]);
            weighted += exp(z[e]) * MIXER_E * (double)mixer_counts[e] / (x->k * x->global_tokens);
        }
        total += x->weight * weighted / all / x->global_tokens;
        for (int j = 0; j < x->k; j++) {
            double sum = 0.0;
            for (int e = 0; e < MIXER_E; e++) {
                sum += x->candidate[j][t * MIXER_E + e] ? exp(z[e]) : 0.0;
            }
            int drawn = x->drawn[t * x->k + j];
            total += x->c[t * MIXER_E + drawn] * exp(z[drawn]) / sum;
        }
    }
    return total;
}

static void mixer_check_gradient(int64_t global_tokens, int k, double weight, float jitter) {
    float z[MIXER_CELLS], dgate[MIXER_CELLS], dz[MIXER_CELLS];
    double want[MIXER_CELLS];
    uint64_t key = draw_key(5, 3);
    const RouterDraws draws = {&key, 40, 2};
    static MixerCase x;
    PairList pairs = pairs_empty();
    int thirds = 0;
    memset(&x, 0, sizeof(x));
    fill_uniform(z, MIXER_CELLS, 5, 1.0f);
    to_double(x.z, z, MIXER_CELLS);
    x.k = k;
    x.weight = weight;
    x.global_tokens = (double)global_tokens;
    router_sparsemixer_forward(&pairs, z, draws, NULL, MIXER_TOKENS, MIXER_E, k, jitter);
    fill_uniform(dgate, (size_t)pairs.num_pairs, 6, 0.1f);
    for (int t = 0; t < MIXER_TOKENS; t++) {
        unsigned char taken[MIXER_E] = {0};
        for (int64_t p = pairs.row_start[t]; p < pairs.row_start[t + 1]; p++) {
            x.c[t * MIXER_E + pairs.expert[p]] = dgate[p];
        }
        for (int j = 0; j < k; j++) {
            const RouterRound *round = &pairs.rounds[t * k + j];
            for (int e = 0; e < MIXER_E; e++) {
                float logit = z[t * MIXER_E + e];
                x.candidate[j][t * MIXER_E + e] =
                    !taken[e] && sparsemixer_is_candidate(logit, round->max, jitter);
            }
            x.drawn[t * k + j] = round_expert(round);
            taken[round_expert(round)] = 1;
            thirds += round->draw < 0;
        }
    }
    CHECK(pairs.num_pairs == MIXER_TOKENS * k && thirds > 0);
    central_differences(want, x.z, MIXER_CELLS, mixer_objective, &x);
    fill_uniform(dz, MIXER_CELLS, 7, 1.0f); // overwritten
    router_sparsemixer_backward(dz, dgate, &pairs, z, mixer_counts, global_tokens, MIXER_E, k, jitter,
                                weight);
    check_close_to("router_sparsemixer dz", dz, want, MIXER_CELLS, 1e-6);
    memset(x.c, 0, sizeof(x.c)); // the loss alone
    double loss = router_sparsemixer_loss(z, mixer_counts, MIXER_TOKENS, global_tokens, MIXER_E, k);
    CHECK(fabs(weight * loss - mixer_objective(&x)) <= 1e-6 * weight * loss);
    pairs_free(&pairs);
}

// ----------------------------------------------------------------------------
// draws as random numbers

enum { MIXER_MANY = 40000 };

// is `hits` of n within 4.5 standard deviations of probability p?
static int mixer_is_share(int64_t hits, int64_t n, double p) {
    return fabs((double)hits - (double)n * p) <= 4.5 * sqrt((double)n * p * (1.0 - p));
}

// the same logits for MIXER_MANY tokens: every first and second expert has its share, and away from the argmax
// M = 1 in a quarter of the cases
static void test_sparsemixer_frequencies(void) {
    const float row[4] = {1.0f, 0.8f, 1.1f, -2.0f};
    const double sum = exp(1.0) + exp(0.8) + exp(1.1);
    float *z = NEW(float, MIXER_MANY * 4);
    uint64_t key = draw_key(1234, 11);
    const RouterDraws draws = {&key, 0, 1};
    PairList pairs = pairs_empty();
    int64_t first[4] = {0}, zero_after_two = 0, away = 0, ones = 0, argmax_third = 0;
    for (int i = 0; i < MIXER_MANY * 4; i++) {
        z[i] = row[i % 4];
    }
    router_sparsemixer_forward(&pairs, z, draws, NULL, MIXER_MANY, 4, 2, 0.2f);
    for (int t = 0; t < MIXER_MANY; t++) {
        const RouterRound *rounds = &pairs.rounds[t * 2];
        int e = round_expert(&rounds[0]);
        first[e]++;
        away += e != 2;
        ones += e != 2 && rounds[0].draw > 0;
        argmax_third += e == 2 && rounds[0].draw < 0;
        zero_after_two += e == 2 && round_expert(&rounds[1]) == 0;
    }
    CHECK(mixer_is_share(first[0], MIXER_MANY, exp(1.0) / sum) && first[3] == 0);
    CHECK(mixer_is_share(first[1], MIXER_MANY, exp(0.8) / sum));
    CHECK(mixer_is_share(first[2], MIXER_MANY, exp(1.1) / sum));
    CHECK(mixer_is_share(ones, away, 0.25) && argmax_third == 0);
    CHECK(
        mixer_is_share(zero_after_two, first[2], exp(1.0) / (exp(1.0) + exp(0.8)))); // rounds are independent
    free(z);
    pairs_free(&pairs);
}

// correlation of two sequences of uniform numbers, times sqrt(n): about N(0, 1) if they are independent
static double mixer_correlation(uint64_t key_a, int layer_a, uint64_t from_a, uint64_t key_b, int layer_b,
                                uint64_t from_b, int stride) {
    double sum = 0.0;
    for (int i = 0; i < MIXER_MANY; i++) {
        double a = draw_uniform(key_a, layer_a, from_a + (uint64_t)(i * stride)) - 0.5;
        double b = draw_uniform(key_b, layer_b, from_b + (uint64_t)(i * stride)) - 0.5;
        sum += 12.0 * a * b;
    }
    return fabs(sum) / sqrt((double)MIXER_MANY);
}

static void test_sparsemixer_independence(void) {
    uint64_t key = draw_key(1234, 0), next = draw_key(1234, 1), other = draw_key(1235, 0);
    CHECK(mixer_correlation(key, 0, 0, key, 0, 1, 2) < 4.5);   // u and v
    CHECK(mixer_correlation(key, 0, 0, key, 0, 2, 4) < 4.5);   // rounds
    CHECK(mixer_correlation(key, 0, 0, key, 0, 4, 4) < 4.5);   // tokens
    CHECK(mixer_correlation(key, 0, 0, key, 1, 0, 1) < 4.5);   // layers
    CHECK(mixer_correlation(key, 0, 0, next, 0, 0, 1) < 4.5);  // steps
    CHECK(mixer_correlation(key, 0, 0, other, 0, 0, 1) < 4.5); // seeds
    CHECK(mixer_correlation(key, 0, 0, key, 0, 0, 1) > 100.0); // and what is not independent shows
    double mean = 0.0, lowest = 1.0, highest = 0.0;
    for (int i = 0; i < MIXER_MANY; i++) {
        double u = draw_uniform(key, 0, (uint64_t)i);
        mean += u / MIXER_MANY;
        lowest = fmin(lowest, u);
        highest = fmax(highest, u);
    }
    CHECK(fabs(mean - 0.5) < 4.5 / sqrt(12.0 * MIXER_MANY) && lowest > 0.0 && highest < 1.0);
}

// micro-batches of a step draw what one of them all would
static void test_sparsemixer_parts(void) {
    enum { N = 60, E = 6, K = 2, PART = 20 };
    float z[N * E];
    uint64_t key = draw_key(1, 2);
    PairList whole = pairs_empty(), part = pairs_empty();
    const RouterDraws all = {&key, 0, 4};
    int wrong = 0;
    fill_uniform(z, N * E, 3, 0.3f);
    router_sparsemixer_forward(&whole, z, all, NULL, N, E, K, 0.5f);
    for (int first = 0; first < N; first += PART) {
        const RouterDraws own = {&key, first, 4};
        router_sparsemixer_forward(&part, z + first * E, own, NULL, PART, E, K, 0.5f);
        for (int i = 0; i < PART * K; i++) {
            wrong += part.rounds[i].draw != whole.rounds[first * K + i].draw;
            wrong += part.gate[i] != whole.gate[first * K + i];
        }
    }
    CHECK(wrong == 0);
    pairs_free(&whole);
    pairs_free(&part);
}

static void test_router_sparsemixer(void) {
    test_sparsemixer_uniform();
    test_sparsemixer_round();
    test_sparsemixer_evaluation();
    test_sparsemixer_forced();
    mixer_check_gradient(MIXER_TOKENS, 1, 0.5, 0.4f);
    mixer_check_gradient(3 * MIXER_TOKENS, 2, 5.0, 0.4f);
    mixer_check_gradient(MIXER_TOKENS, MIXER_E, 0.01, 2.0f); // all are drawn
    test_sparsemixer_frequencies();
    test_sparsemixer_independence();
    test_sparsemixer_parts();
}

#endif
