/*
pairs.cuh: compressed rows, counts, bits, the dense picture and the statistics against pairs.h on the same masks:
every width of a mask's word, tokens without pairs, experts without tokens, all pairs, none, sizes that end
within a tile. All of it is exact.
*/
#ifndef TEST_PAIRS_CUH
#define TEST_PAIRS_CUH

#include "llmc/pairs.cuh"
#include "harness.cuh"

// a device list for N tokens and E experts, every entry a NaN pattern
static DevicePairs device_pairs_new(int N, int E) {
    DevicePairs pairs;
    pairs.row_start = device_new<int>(N + 1);
    pairs.expert = device_new<int>((int64_t)N * E);
    pairs.gate = device_new<float>((int64_t)N * E);
    pairs.counts = device_new<int>(E);
    pairs.rounds = device_new<RouterRound>((int64_t)N * E);
    return pairs;
}

static void device_pairs_release(DevicePairs pairs) {
    device_release(pairs.row_start);
    device_release(pairs.expert);
    device_release(pairs.gate);
    device_release(pairs.counts);
    device_release(pairs.rounds);
}

// same rows, same experts, same counts; gates to the tolerance (0: the same bits); nothing written behind
static int check_pairs(const char *what, DevicePairs device, const PairList *want, int N, int E,
                       double limit) {
    int64_t P = want->num_pairs, wrong = 0, rest = (int64_t)N * E - P;
    int *row_start = fetch(device.row_start, N + 1), *expert = fetch(device.expert, (int64_t)N * E);
    int *counts = fetch(device.counts, E);
    float *gate = fetch(device.gate, (int64_t)N * E);
    for (int t = 0; t <= N; t++) {
        wrong += row_start[t] != want->row_start[t];
    }
    for (int64_t p = 0; p < P; p++) {
        wrong += expert[p] != want->expert[p];
        wrong += limit == 0.0 && gate[p] != want->gate[p];
    }
    for (int64_t p = P; p < P + rest; p++) {
        wrong += expert[p] != -1 || gate[p] == gate[p];
    }
    for (int e = 0; e < E; e++) {
        wrong += counts[e] != want->counts[e];
    }
    if (wrong > 0) {
        printf("  %s: N %d, E %d: %lld differences\n", what, N, E, (long long)wrong);
    }
    int ok = CHECK(wrong == 0);
    if (limit > 0.0 && ok) {
        ok = check_close(what, gate, want->gate, (size_t)P, limit);
    }
    free(row_start);
    free(expert);
    free(counts);
    free(gate);
    return ok;
}

// the kinds of mask [N, E] that tests use
enum { MASK_MIXED, MASK_NONE, MASK_ALL, MASK_ONE_EXPERT, MASK_LAST_PAIR, MASK_KINDS };

static float *sample_mask(int kind, int N, int E, unsigned seed) {
    float *mask = NEW(float, (int64_t)N *E);
    fill_uniform(mask, (size_t)N * (size_t)E, seed, 1.0f);
    for (int64_t i = 0; i < (int64_t)N * E; i++) {
        int64_t t = i / E, e = i % E;
        int on = kind == MASK_ALL || (kind == MASK_ONE_EXPERT && e == E / 2) ||
                 (kind == MASK_LAST_PAIR && i == (int64_t)N * E - 1) ||
                 (kind == MASK_MIXED && t % 5 != 1 && (t % 5 == 2 || mask[i] > 0.4f) && e != 1);
        mask[i] = !on ? 0.0f : mask[i] != 0.0f ? mask[i] : 1e-30f;
    }
    return mask;
}

static void check_stats(DevicePairs pairs, const PairList *want, int N, int E) {
    RoutingStats begin = {100, 1000};
    RoutingStats *stats = device_copy(&begin, 1);
    int64_t wrong = 0, empty = 0, *device_counts = device_copy(want->counts, E);
    routing_stats(stats, pairs, device_counts, N, E, NULL);
    RoutingStats *got = fetch_raw(stats, 1);
    int64_t *got_counts = fetch_raw(device_counts, E);
    for (int e = 0; e < E; e++) {
        wrong += got_counts[e] != 2 * want->counts[e];
    }
    for (int t = 0; t < N; t++) {
        empty += want->row_start[t] == want->row_start[t + 1];
    }
    CHECK(wrong == 0 && got->active == 100 + want->num_pairs && got->zero_expert == 1000 + empty);
    free(got);
    free(got_counts);
    device_release(stats);
    device_release(device_counts);
}

static void check_bits(DevicePairs pairs, const PairList *want, int N, int E) {
    int64_t words = (int64_t)N * bit_words(E), wrong = 0;
    uint64_t *device = device_new<uint64_t>(words), *host = NEW(uint64_t, words);
    pairs_to_bits(device, pairs, N, E, NULL);
    pairs_to_bits(host, want, E);
    uint64_t *got = fetch_raw(device, words);
    for (int64_t i = 0; i < words; i++) {
        wrong += got[i] != host[i];
    }
    CHECK(wrong == 0);
    free(got);
    free(host);
    device_release(device);
}

static void test_pairs_of(int kind, int N, int E) {
    int64_t cells = (int64_t)N * E;
    float *mask = sample_mask(kind, N, E, 3), *score = host_random(cells, 4, 2.0f),
          *picture = NEW(float, cells);
    float *device_mask = device_f(mask, cells), *device_score = device_f(score, cells);
    uint32_t *bits = device_new<uint32_t>((int64_t)N * mask_words(E));
    void *scratch = device_new<char>((int64_t)pairs_scratch_bytes(N, E));
    PairList want = pairs_empty();
    ActiveIfForced active = {device_mask, E};
    mask_where(bits, active, N, E, NULL);
    for (int scored = 0; scored < 2; scored++) {
        DevicePairs got = device_pairs_new(N, E);
        pairs_from_mask(&want, scored ? score : NULL, mask, N, E);
        pairs_from_mask(got, scored ? device_score : NULL, bits, N, E, scratch, NULL);
        if (scored) {
            check_pairs("pairs_from_mask", got, &want, N, E, 0.0);
            check_stats(got, &want, N, E);
            check_bits(got, &want, N, E);
            pairs_to_dense(picture, &want, E);
            pairs_to_dense(device_mask, got, N, E, NULL); // over what the mask was
            check_device("pairs_to_dense", device_mask, picture, cells, 0.0);
        } else {
            check_pairs("pairs_from_mask, gates 1", got, &want, N, E, 0.0);
        }
        device_pairs_release(got);
    }
    pairs_free(&want);
    free(mask);
    free(score);
    free(picture);
    device_release(device_mask);
    device_release(device_score);
    device_release(bits);
    device_release(scratch);
}

static void test_cuda_pairs(void) {
    int experts[] = {1, 2, 3, 8, 31, 32, 33, 128, 130}, tokens[] = {1, 17, 64, 255, 256, 257, 1000};
    for (int i = 0; i < 9; i++) {
        for (int j = 0; j < 7; j++) {
            if (!emulated() || experts[i] * tokens[j] < 20000) {
                test_pairs_of(MASK_MIXED, tokens[j], experts[i]);
            }
        }
        for (int kind = MASK_NONE; kind < MASK_KINDS; kind++) {
            test_pairs_of(kind, 70, experts[i]);
        }
    }
    if (!emulated()) {
        test_pairs_of(MASK_MIXED, 1000003, 8); // more tiles than one block has threads
        test_pairs_of(MASK_MIXED, 20011, 512);
        test_pairs_of(MASK_MIXED, 33, 20000);
    }
}

#endif
