/*
shard.h, dataloader.h and prefetch.h: a shard's bytes, which window each sequence is, that an epoch is a
permutation, that weighted sources keep to their weights at every moment, damaged and foreign files, and
batches assembled ahead.
*/
#ifndef TEST_DATALOADER_H
#define TEST_DATALOADER_H

#include <signal.h>
#include <sys/resource.h>
// defines: signal, kill, setrlimit
#include "llmc/files/dataloader.h"
#include "llmc/files/domains.h"
#include "llmc/files/prefetch.h"
#include "harness.h"

#define DL_FOLDER "build/test/shards/"
#define DL_VOCAB 65536

// n tokens first, first + 1, ...
static void dl_write(const char *path, int first, int n) {
    ShardWriter w;
    shard_writer_open(&w, path);
    for (int i = 0; i < n; i++) {
        uint16_t token = (uint16_t)(first + i);
        shard_writer_append(&w, &token, 1);
    }
    shard_writer_close(&w);
}

// the first token of sequence index, after checking that the others follow it as dl_write wrote them
static int dl_first_token(const DataLoader *loader, int64_t index) {
    int inputs[64] = {0}, targets[64] = {0}, wrong = 0;
    dataloader_sequence(loader, index, DL_VOCAB, inputs, targets);
    for (int t = 0; t < loader->seq_len; t++) {
        wrong += inputs[t] != inputs[0] + t || targets[t] != inputs[t] + 1;
    }
    CHECK(wrong == 0);
    return inputs[0];
}

static void test_dataloader_bytes(void) {
    const char *path = DL_FOLDER "bytes.bin";
    const uint16_t tokens[5] = {50256, 0, 1, 65535, 258};
    int32_t header[256] = {20240520, 1, 5};
    size_t size;
    ShardWriter w;
    shard_writer_open(&w, path);
    shard_writer_append(&w, tokens, 2);
    shard_writer_append(&w, tokens + 2, 3);
    CHECK(access(path, F_OK) != 0); // no name before it is whole
    shard_writer_close(&w);
    char *bytes = check_read_file(path, &size, "");
    CHECK(size == 1034 && memcmp(bytes, header, 1024) == 0 && memcmp(bytes + 1024, tokens, 10) == 0);
    CHECK(access(DL_FOLDER "bytes.bin.tmp", F_OK) != 0);
    free(bytes);
    unlink(path);
}

// three files of 2, 0 and 3 windows of 5, in the order of their names
static void test_dataloader_order(void) {
    const int first[5] = {100, 105, 300, 305, 310};
    DataLoader loader;
    dl_write(DL_FOLDER "o_2.bin", 200, 5); // too short by the last target
    dl_write(DL_FOLDER "o_3.bin", 300, 20);
    dl_write(DL_FOLDER "o_1.bin", 100, 11);
    dataloader_open(&loader, DL_FOLDER "o_*.bin", 5, 7, 0);
    CHECK(dataloader_num_sequences(&loader) == 5 && dataloader_total_tokens(&loader) == 36);
    for (int i = 0; i < 15; i++) {
        CHECK(dl_first_token(&loader, i) == first[i % 5]);
    }
    CHECK(dl_first_token(&loader, 5000000000003) == 305); // an index beyond 2^32
    dataloader_close(&loader);
    dataloader_open(&loader, DL_FOLDER "o_3.bin," DL_FOLDER "o_1.bin", 5, 7, 0); // as named
    CHECK(dl_first_token(&loader, 0) == 300 && dl_first_token(&loader, 3) == 100);
    dataloader_close(&loader);
    dataloader_open(&loader, DL_FOLDER "o_1.bin", 10, 7, 0); // exactly one window
    CHECK(dataloader_num_sequences(&loader) == 1 && dl_first_token(&loader, 1) == 100);
    dataloader_close(&loader);
}

// every window once an epoch, another order each epoch and with each seed
static void test_dataloader_epochs(void) {
    const int sizes[] = {1, 2, 3, 4, 5, 16, 17, 63, 100, 1000};
    for (size_t c = 0; c < sizeof(sizes) / sizeof(sizes[0]); c++) {
        int n = sizes[c], repeated = 0, as_before = 0, as_other_seed = 0;
        DataLoader loader, other;
        dl_write(DL_FOLDER "e_1.bin", 0, 4 * (n - n / 3) + 1);
        dl_write(DL_FOLDER "e_2.bin", 4 * (n - n / 3), 4 * (n / 3) + 1);
        dataloader_open(&loader, DL_FOLDER "e_*.bin", 4, 1, 1);
        dataloader_open(&other, DL_FOLDER "e_*.bin", 4, 2, 1);
        CHECK(dataloader_num_sequences(&loader) == n);
        for (int epoch = 0; epoch < 3; epoch++) {
            char *seen = NEW(char, n);
            for (int i = 0; i < n; i++) {
                int window = dl_first_token(&loader, epoch * n + i) / 4;
                repeated += seen[window]++;
                as_before += epoch > 0 && window == dl_first_token(&loader, (epoch - 1) * n + i) / 4;
                as_other_seed += window == dl_first_token(&other, epoch * n + i) / 4;
            }
            free(seen);
        }
        CHECK(repeated == 0);
        CHECK(n < 63 || (as_before < 20 && as_other_seed < 20)); // by chance, about one an epoch
        dataloader_close(&loader);
        dataloader_close(&other);
    }
}

// how far counts are from equal
static double dl_chi_square(const int *count, int n) {
    double chi = 0.0, mean = 0.0;
    for (int i = 0; i < n; i++) {
        mean += (double)count[i] / n;
    }
    for (int i = 0; i < n; i++) {
        chi += (count[i] - mean) * (count[i] - mean) / mean;
    }
    return chi;
}

// a permutation of any size, without bias: 0 comes to each place equally often, and so does 1 as seen from 0
static void test_dataloader_permutation(void) {
    int place[10] = {0}, distance_of_five[5] = {0}, outside = 0;
    double distance = 0.0;
    for (uint64_t key = 0; key < 20000; key++) {
        place[dataloader_permute(0, 10, key)]++;
        distance_of_five[(dataloader_permute(1, 5, key) - dataloader_permute(0, 5, key) + 5) % 5]++;
    }
    CHECK(dl_chi_square(place, 10) < 30.0); // 9 degrees of freedom: more happens once in 2,000
    CHECK(distance_of_five[0] == 0 && dl_chi_square(distance_of_five + 1, 4) < 18.0); // 3: once in 2,000
    const int64_t n = ((int64_t)1 << 40) + 1;
    int64_t before = 0;
    for (int64_t j = 0; j < 10000; j++) {
        int64_t place = dataloader_permute(j, n, 5);
        outside += place < 0 || place >= n;
        distance += fabs((double)(place - before)) / (double)n / 10000.0;
        before = place;
    }
    CHECK(outside == 0);
    CHECK(distance > 0.32 && distance < 0.347); // of independent places: 1/3
}

// after any n sequences each source was used n w times, less than one more or less, each time its next window
static void test_dataloader_weights(const char *spec, int num_sources, const double *weights) {
    int64_t used[8] = {0}, next[8] = {0};
    int wrong = 0, skipped = 0;
    DataLoader loader;
    dataloader_open(&loader, spec, 4, 3, 0);
    CHECK(loader.num_sources == num_sources);
    for (int64_t n = 0; n < 25000; n++) {
        int64_t window;
        const TokenShard *shard = dataloader_locate(&loader, n, &window);
        int s = 0;
        while (shard < loader.sources[s].shards ||
               shard >= loader.sources[s].shards + loader.sources[s].num_shards) {
            s++;
        }
        skipped += shard->first_window + window != next[s];
        next[s] = (next[s] + 1) % loader.sources[s].num_windows;
        used[s]++;
        for (s = 0; s < num_sources; s++) {
            wrong += fabs((double)used[s] - weights[s] * (double)(n + 1)) >= 1.0;
        }
    }
    CHECK(wrong == 0 && skipped == 0);
    dataloader_close(&loader);
}

static void test_dataloader_mix(void) {
    const double two[] = {0.7, 0.3}, uneven[] = {0.0001, 0.9999}, three[] = {0.5, 0.25, 0.25};
    const double five[] = {0.02, 0.58, 0.1, 0.2999, 0.0001};
    dl_write(DL_FOLDER "m_a1.bin", 0, 29);
    dl_write(DL_FOLDER "m_a2.bin", 100, 29);
    dl_write(DL_FOLDER "m_b.bin", 200, 5);
    dl_write(DL_FOLDER "m_c.bin", 300, 401);
    test_dataloader_weights(DL_FOLDER "m_a*.bin:0.7," DL_FOLDER "m_b.bin:0.3", 2, two);
    test_dataloader_weights(DL_FOLDER "m_a*.bin:1, " DL_FOLDER "m_b.bin:9999", 2, uneven);
    test_dataloader_weights(DL_FOLDER "m_a*.bin:2," DL_FOLDER "m_b.bin:1," DL_FOLDER "m_c.bin:1e0", 3, three);
    test_dataloader_weights(DL_FOLDER "m_a1.bin:2," DL_FOLDER "m_b.bin:58," DL_FOLDER "m_c.bin:10," DL_FOLDER
                                      "m_a2.bin:29.99," DL_FOLDER "m_c.bin:0.01",
                            5, five);
}

// the same for random weights, and the shares of a period add up
static void test_dataloader_shares(void) {
    enum { SOURCES = 8 };
    float weights[SOURCES];
    int wrong = 0;
    for (unsigned trial = 0; trial < 50; trial++) {
        int64_t used[SOURCES] = {0}, total = 0;
        DataSource sources[SOURCES];
        DataLoader loader;
        memset(sources, 0, sizeof(sources));
        memset(&loader, 0, sizeof(loader));
        loader.sources = sources;
        loader.num_sources = 2 + (int)(trial % (SOURCES - 1));
        fill_uniform(weights, SOURCES, trial, 1.0f);
        for (int s = 0; s < loader.num_sources; s++) {
            sources[s].weight = exp(4.0 * (double)weights[s]);
        }
        dataloader_set_shares(&loader);
        dataloader_mix(&loader);
        for (int64_t t = 0; t < MIX_PERIOD; t++) {
            wrong += loader.mix_used[t] != used[loader.mix_source[t]]++;
            for (int s = 0; s < loader.num_sources; s++) {
                int64_t excess = used[s] * MIX_PERIOD - (t + 1) * sources[s].share;
                wrong += excess >= MIX_PERIOD || excess <= -MIX_PERIOD;
            }
        }
        for (int s = 0; s < loader.num_sources; s++) {
            total += sources[s].share;
        }
        CHECK(total == MIX_PERIOD);
        free(loader.mix_source);
        free(loader.mix_used);
    }
    CHECK(wrong == 0);
}

// the same sequence for the same index, in whatever order they are asked for
static void test_dataloader_pure(void) {
    int first[500], wrong = 0;
    DataLoader loader;
    dataloader_open(&loader, DL_FOLDER "m_a*.bin:0.7," DL_FOLDER "m_c.bin:0.3", 4, 3, 1);
    for (int i = 0; i < 500; i++) {
        first[i] = dl_first_token(&loader, i);
    }
    dataloader_close(&loader);
    dataloader_open(&loader, DL_FOLDER "m_a*.bin:0.7," DL_FOLDER "m_c.bin:0.3", 4, 3, 1);
    for (int i = 499; i >= 0; i--) {
        wrong += dl_first_token(&loader, i) != first[i];
    }
    CHECK(wrong == 0);
    dataloader_close(&loader);
}

// ----------------------------------------------------------------------------
// errors

static void dl_open_with(void *spec) {
    DataLoader loader;
    dataloader_open(&loader, (const char *)spec, 8, 1, 1);
    dataloader_close(&loader);
}

static void check_dl_dies(int status, const char *message, const char *spec) {
    char copy[1024];
    check_format(copy, sizeof(copy), "%s", spec);
    if (!check_dies(status, message, dl_open_with, copy)) {
        printf("    for %s\n", spec);
    }
}

// a shard that says what header says and has size bytes
static void check_dl_damaged(const char *message, int magic, int version, int count, size_t size) {
    int32_t header[512] = {magic, version, count};
    FILE *file = check_fopen(DL_FOLDER "damaged.bin", "wb", "");
    check_fwrite(header, 1, size, file, "damaged.bin");
    check_fclose(file, "damaged.bin");
    check_dl_dies(1, message, DL_FOLDER "damaged.bin");
}

static void check_dl_foreign(const char *message, const char *bytes, size_t size) {
    FILE *file = check_fopen(DL_FOLDER "foreign.bin", "wb", "");
    check_fwrite(bytes, 1, size, file, "foreign.bin");
    check_fclose(file, "foreign.bin");
    check_dl_dies(1, message, DL_FOLDER "foreign.bin");
}

static void test_dataloader_damaged(void) {
    check_dl_damaged("is truncated: its header counts 20 tokens, 1064 bytes, but the file has 1063", 20240520,
                     1, 20, 1063);
    check_dl_damaged("is damaged: its header counts 20 tokens, 1064 bytes, but the file has 1066", 20240520,
                     1, 20, 1066);
    check_dl_damaged("is truncated", 20240520, 1, INT32_MAX, 1064);
    check_dl_damaged("is damaged", 20240520, 1, -20, 1064);
    check_dl_damaged("is damaged", 20240520, 1, INT32_MIN, 1064);
    check_dl_damaged("is truncated: 1023 bytes, its header alone needs 1024", 20240520, 1, 0, 1023);
    check_dl_damaged("is truncated: 4 bytes", 20240520, 1, 0, 4);
    check_dl_damaged("is truncated: its header counts 20", 20240520, 1, 20, 1024);
    check_dl_damaged("version 2, expected 1", 20240520, 2, 20, 1064);
    check_dl_damaged("it begins with 20240521, expected 20240520", 20240521, 1, 20, 1064);
    check_dl_damaged("32-bit tokens", 20240801, 7, 10, 1064);
    check_dl_damaged("not a token shard", 20240520, 1, 20, 3);
    check_dl_damaged("empty", 0, 0, 0, 0);
    check_dl_damaged("holds 0 tokens", 20240520, 1, 0, 1024);
    check_dl_damaged(
        "holds 8 tokens in 1 files, none long enough for a window of 8 + 1\n  ---> use a smaller --seq-len",
        20240520, 1, 8, 1040);
    check_dl_foreign("zstd -d", "\x28\xB5\x2F\xFD....", 8);
    check_dl_foreign("gunzip", "\x1F\x8B\x08", 3);
    check_dl_foreign("a NumPy array", "\x93NUMPY\x01", 7);
    check_dl_foreign("JSON text", "{\"text\":\"a\"}", 12);
    check_dl_foreign("not a token shard", "x", 1);
    unlink(DL_FOLDER "damaged.bin");
    unlink(DL_FOLDER "foreign.bin");
}

static void test_dataloader_specs(void) {
    check_dl_dies(1, "no file matches " DL_FOLDER "none*.bin\n  ---> make sample-data",
                  DL_FOLDER "none*.bin");
    check_dl_dies(1, "no file matches absent.bin", "absent.bin");
    check_dl_dies(1, "not a regular file", DL_FOLDER);
    check_dl_dies(2, "must be positive", DL_FOLDER "m_a*.bin:0");
    check_dl_dies(2, "must be positive", DL_FOLDER "m_a*.bin:-1");
    check_dl_dies(2, "must be positive", DL_FOLDER "m_a*.bin:nan");
    check_dl_dies(2, "must be positive", DL_FOLDER "m_a*.bin:inf");
    check_dl_dies(1, "no file matches " DL_FOLDER "m_a*.bin:1x", DL_FOLDER "m_a*.bin:1x");
    check_dl_dies(2, "or none of them", DL_FOLDER "m_a*.bin:1," DL_FOLDER "m_c.bin");
    check_dl_dies(2, "or none of them", DL_FOLDER "m_a*.bin," DL_FOLDER "m_c.bin:1");
    check_dl_dies(2, "is less than 1/10000 of all", DL_FOLDER "m_a*.bin:1," DL_FOLDER "m_c.bin:100000");
    check_dl_dies(2, "an empty name", "");
    check_dl_dies(2, "an empty name", DL_FOLDER "m_a*.bin,");
    dl_write(DL_FOLDER "a:1.5:b.bin", 0, 50); // a colon in a name
    CHECK(run_in_child(dl_open_with, (void *)DL_FOLDER "a:1.5:b.bin", NULL, 0) == 0);
    CHECK(run_in_child(dl_open_with, (void *)DL_FOLDER "a:1.5:b.bin:2", NULL, 0) == 0);
    unlink(DL_FOLDER "a:1.5:b.bin");
}

static void dl_small_vocabulary(void *vocab_size) {
    int inputs[5], targets[5];
    DataLoader loader;
    dataloader_open(&loader, DL_FOLDER "o_1.bin", 5, 1, 0);
    dataloader_sequence(&loader, 0, *(int *)vocab_size, inputs, targets);
    dataloader_sequence(&loader, 1, *(int *)vocab_size, inputs, targets);
}

static void test_dataloader_vocabulary(void) {
    int small = 108, smaller = 110, exact = 111; // o_1.bin holds 100 to 110
    check_dies(1, DL_FOLDER "o_1.bin: token 8 is 108, but the vocabulary has 108", dl_small_vocabulary,
               &small);
    check_dies(1, "token 10 is 110, but the vocabulary has 110", dl_small_vocabulary,
               &smaller); // the last target
    CHECK(run_in_child(dl_small_vocabulary, &exact, NULL, 0) == 0);
}

static void dl_check_tokens(void *vocabulary) {
    DataLoader loader;
    dataloader_open(&loader, DL_FOLDER "o_*.bin", 5, 7, 0); // 100-110, 200-204 (no window), 300-319
    dataloader_check_tokens(&loader, 1, *(int *)vocabulary);
}

// the first and the last window of each shard
static void test_dataloader_check_tokens(void) {
    int enough = 316, last = 315, first = 110;
    CHECK(run_in_child(dl_check_tokens, &enough, NULL, 0) == 0);
    check_dies(1, "o_3.bin: token 15 is 315, but the vocabulary has 315", dl_check_tokens, &last);
    check_dies(1, "o_1.bin: token 10 is 110, but the vocabulary has 110", dl_check_tokens, &first);
}

static uint64_t dl_hash(const char *path) {
    TokenShard shard;
    shard_open(&shard, path);
    uint64_t hash = shard_hash(&shard);
    shard_close(&shard);
    return hash;
}

// of the header and of both ends; what lies between is not read
static void test_shard_hash(void) {
    static const struct {
        long byte;
        int changes;
    } cases[] = {{8, 1}, {1024, 1}, {1024 + 4095, 1}, {1024 + 4096, 0}, {15904, 0}, {16928, 1}, {21023, 1}};
    const char *path = DL_FOLDER "hash.bin";
    dl_write(path, 0, 10000);
    uint64_t whole = dl_hash(path);
    for (size_t i = 1; i < sizeof(cases) / sizeof(cases[0]); i++) {
        dl_write(path, 0, 10000);
        FILE *file = fopen(path, "r+b");
        fseek(file, cases[i].byte, SEEK_SET);
        fputc(0x5A, file);
        fclose(file);
        CHECK((dl_hash(path) != whole) == cases[i].changes);
    }
    dl_write(path, 0, 9999);
    CHECK(dl_hash(path) != whole);
    dl_write(path, 0, 3);
    whole = dl_hash(path);
    dl_write(path, 1, 3);
    CHECK(dl_hash(path) != whole);
}

static void test_domains(void) {
    const char *want[] = {"github", "val", "web.val", "x.y"};
    const char *files[] = {"d/val.github.bin", "d/val.bin", "d/web.val.bin", "e/val.x.y.bin"};
    char path[256];
    DataDomain *domains;
    CHECK(system("mkdir -p " DL_FOLDER "d " DL_FOLDER "e") == 0);
    for (int i = 0; i < 4; i++) {
        check_format(path, sizeof(path), "%s%s", DL_FOLDER, files[i]);
        dl_write(path, 0, 10);
    }
    int n = domains_open(DL_FOLDER "d/*.bin," DL_FOLDER "e/*.bin", &domains, 4, 100, 10);
    CHECK(n == 4);
    for (int i = 0; i < n; i++) {
        const char *name = i == 0   ? want[1]
                           : i == 1 ? want[0]
                                    : want[i]; // "val.bin" sorts before "val.github.bin"
        CHECK(strcmp(domains[i].name, name) == 0 && strstr(domains[i].path, ".bin") != NULL);
        CHECK(dataloader_num_sequences(&domains[i].loader) == 2);
    }
    domains_close(domains, n);
}

static void dl_open_domains(void *vocabulary) {
    DataDomain *domains;
    int n = domains_open(DL_FOLDER "d/*.bin", &domains, 4, 2, *(int *)vocabulary);
    printf("%d domains, %s and %s\n", n, domains[0].name, domains[1].name);
    domains_close(domains, n);
}

// before a run: a short domain is named and left out, a token that will be read is looked at
static void test_domains_checked(void) {
    char output[1024];
    int vocabulary = 14, small = 13;
    dl_write(DL_FOLDER "d/val.github.bin", 5, 10); // windows end at its 9th token, 13
    dl_write(DL_FOLDER "d/val.bin", 0, 4);
    CHECK(run_in_child(dl_open_domains, &vocabulary, output, sizeof(output)) == 0);
    CHECK(strstr(output, "d/val.bin will not be validated: 4 tokens, too few for a window of 4 + 1") != NULL);
    CHECK(strstr(output, "2 domains, github and web.val\n") != NULL);
    check_dies(1, "d/val.github.bin: token 8 is 13, but the vocabulary has 13", dl_open_domains, &small);
}

// ----------------------------------------------------------------------------
// names

// how many files the list names; the first window's first token is its file's
static void check_dl_names(const char *spec, int shards, int first) {
    DataLoader loader;
    int files = 0;
    dataloader_open(&loader, spec, 4, 1, 0);
    for (int s = 0; s < loader.num_sources; s++) {
        files += loader.sources[s].num_shards;
    }
    if (!CHECK(files == shards && dl_first_token(&loader, 0) == first)) {
        printf("    for %s: %d files, token %d\n", spec, files, dl_first_token(&loader, 0));
    }
    dataloader_close(&loader);
}

// a path that exists as it stands is that file, whatever a list or a pattern would make of it
static void test_dataloader_literal_names(void) {
    CHECK(system("mkdir -p '" DL_FOLDER "n [1]' '" DL_FOLDER "n 1' '" DL_FOLDER "n,b'") == 0);
    dl_write(DL_FOLDER "n [1]/t.bin", 10, 9);
    dl_write(DL_FOLDER "n 1/t.bin", 20, 9); // what the pattern would match
    dl_write(DL_FOLDER "n,b/t.bin", 30, 9);
    dl_write(DL_FOLDER "n:3", 40, 9);
    dl_write(DL_FOLDER "n*.bin", 50, 9);
    dl_write(DL_FOLDER "nn.bin", 60, 9);
    check_dl_names(DL_FOLDER "n [1]/t.bin", 1, 10);
    check_dl_names(DL_FOLDER "n [1]/*.bin", 1, 10);
    check_dl_names(DL_FOLDER "n ?/t.bin", 1, 20);
    check_dl_names(DL_FOLDER "n,b/t.bin", 1, 30);
    check_dl_names(DL_FOLDER "n,b/t.bin," DL_FOLDER "n [1]/t.bin", 2, 30);
    check_dl_names(DL_FOLDER "nn.bin," DL_FOLDER "n,b/t.bin", 2, 60);
    check_dl_names(DL_FOLDER "n:3", 1, 40);
    check_dl_names(DL_FOLDER "n:3:0.5," DL_FOLDER "nn.bin:0.5", 2, 40);
    check_dl_names(DL_FOLDER "n,b/t.bin:0.5," DL_FOLDER "nn.bin:0.5", 2, 30);
    check_dl_names(DL_FOLDER "n*.bin", 1, 50);
    check_dl_names(DL_FOLDER "n[n].bin", 1, 60);
    unlink(DL_FOLDER "n*.bin");
    check_dl_names(DL_FOLDER "n*.bin", 1, 60);
}

static void test_dataloader_print(void) {
    char text[512] = "";
    DataLoader loader;
    FILE *file = tmpfile();
    dataloader_open(&loader, DL_FOLDER "m_a*.bin:0.7," DL_FOLDER "m_b.bin:0.3", 4, 3, 1);
    dataloader_print(&loader, file);
    rewind(file);
    CHECK(fgets(text, sizeof(text), file) != NULL);
    CHECK(strcmp(text, "63 tokens in 3 files, 15 windows of 4, shuffled: 70.00 % " DL_FOLDER
                       "m_a*.bin, 30.00 % " DL_FOLDER "m_b.bin") == 0);
    fclose(file);
    dataloader_close(&loader);
}

// ----------------------------------------------------------------------------
// faults

static void dl_write_much(void *path) {
    struct rlimit limit = {65536, 65536};
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
    dl_write((const char *)path, 0, 100000);
}

static void dl_write_endlessly(const char *path) {
    uint16_t tokens[1000] = {0};
    ShardWriter w;
    shard_writer_open(&w, path);
    for (int i = 0; i < 1000000; i++) {
        shard_writer_append(&w, tokens, 1000);
    }
    shard_writer_close(&w);
}

// what stood under the name before stays, whatever happens to the writer
static void test_dataloader_faults(void) {
    char path[] = DL_FOLDER "fault.bin";
    DataLoader loader;
    dl_write(path, 500, 21);
    check_dies(1, "cannot write " DL_FOLDER "fault.bin", dl_write_much, path);
    pid_t pid = fork();
    if (pid == 0) {
        dl_write_endlessly(path);
        _exit(0);
    }
    usleep(20000);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    dataloader_open(&loader, path, 10, 1, 0);
    CHECK(dataloader_num_sequences(&loader) == 2 && dl_first_token(&loader, 0) == 500);
    dataloader_close(&loader);
    dl_write(path, 700, 21); // over what the killed one left
    dataloader_open(&loader, path, 10, 1, 0);
    CHECK(dl_first_token(&loader, 0) == 700);
    dataloader_close(&loader);
}

static void dl_read_all(void *path) {
    int inputs[3], targets[3];
    DataLoader loader;
    dataloader_open(&loader, (const char *)path, 3, 1, 1);
    for (int64_t i = 0; i < dataloader_num_sequences(&loader); i++) {
        dataloader_sequence(&loader, i, 50257, inputs, targets);
    }
    dataloader_close(&loader);
}

// what the fuzzer once found, and its seeds: read or refused
static void test_dataloader_fuzz_corpus(void) {
    glob_t found;
    CHECK(glob("dev/fuzz/corpus/shard/*", 0, NULL, &found) == 0);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char output[1024];
        int status = run_in_child(dl_read_all, found.gl_pathv[i], output, sizeof(output));
        CHECK(status == 0 || (status == 1 && strncmp(output, "error: ", 7) == 0));
    }
    globfree(&found);
}

// ----------------------------------------------------------------------------
// prefetch

// rank 1 of 2: batches of 3 at 4, 10, 16, ...; with a slow reader or a fast one
static void test_prefetch_batches(void) {
    enum { B = 3, LENGTH = 4 };
    int wrong = 0, inputs[LENGTH], targets[LENGTH];
    int *batch_inputs, *batch_targets;
    DataLoader loader;
    Prefetcher p;
    dataloader_open(&loader, DL_FOLDER "m_a*.bin:0.7," DL_FOLDER "m_c.bin:0.3", LENGTH, 3, 1);
    prefetch_start(&p, &loader, B, DL_VOCAB, 4, 6);
    for (int n = 0; n < 2000; n++) {
        prefetch_next(&p, &batch_inputs, &batch_targets);
        if (n % 100 == 0) {
            usleep(1000); // time for the thread to overwrite what it must not
        }
        for (int b = 0; b < B; b++) {
            dataloader_sequence(&loader, 4 + 6 * n + b, DL_VOCAB, inputs, targets);
            wrong += memcmp(inputs, batch_inputs + b * LENGTH, sizeof(inputs)) != 0;
            wrong += memcmp(targets, batch_targets + b * LENGTH, sizeof(targets)) != 0;
        }
    }
    CHECK(wrong == 0);
    CHECK(p.wait_ms > 0.0);
    prefetch_stop(&p);
    for (int i = 0; i < 100; i++) { // stopped at once, or after one batch
        prefetch_start(&p, &loader, B, DL_VOCAB, 0, B);
        if (i % 2) {
            prefetch_next(&p, &batch_inputs, &batch_targets);
        }
        prefetch_stop(&p);
    }
    dataloader_close(&loader);
}

static void dl_prefetch_small_vocabulary(void *unused) {
    int *inputs, *targets;
    DataLoader loader;
    Prefetcher p;
    (void)unused;
    dataloader_open(&loader, DL_FOLDER "o_1.bin", 5, 1, 0);
    prefetch_start(&p, &loader, 2, 108, 0, 2);
    prefetch_next(&p, &inputs, &targets);
}

static void dl_before_end(void *context) {
    printf("%s", (const char *)context);
}

// the batches before the bad token come; then what was learned can be saved
static void dl_prefetch_bad_token(void *unused) {
    static char saved[] = "saved, ";
    int *inputs, *targets;
    DataLoader loader;
    Prefetcher p;
    (void)unused;
    dataloader_open(&loader, DL_FOLDER "o_1.bin", 5, 1, 0); // 100 ... 110
    prefetch_start(&p, &loader, 1, 108, 0, 1);
    p.before_end = dl_before_end;
    p.context = saved;
    prefetch_next(&p, &inputs, &targets);
    printf("%d, ", inputs[0]);
    prefetch_next(&p, &inputs, &targets);
}

static void test_prefetch(void) {
    test_prefetch_batches();
    check_dies(1, "token 8 is 108, but the vocabulary has 108", dl_prefetch_small_vocabulary, NULL);
    check_dies(1, "100, saved, error: " DL_FOLDER "o_1.bin: token 8 is 108", dl_prefetch_bad_token, NULL);
}

// ----------------------------------------------------------------------------
// a real shard of GPT-2 tokens

static void test_dataloader_real(void) {
    const char *shards = getenv("GPT2_DATA"); // as --train-data takes them
    enum { LENGTH = 64, MOST_SEQUENCES = 1 << 20 };
    int inputs[LENGTH], targets[LENGTH], breaks = 0;
    DataLoader loader;
    if (shards == NULL) {
        skip_case("shards of GPT-2 tokens: GPT2_DATA names none (data/download_fineweb.sh fetches some)");
        return;
    }
    dataloader_open(&loader, shards, LENGTH, 1, 1);
    for (int64_t i = 0; i < dataloader_num_sequences(&loader) && i < MOST_SEQUENCES; i++) {
        dataloader_sequence(&loader, i, 50257, inputs, targets);
        for (int t = 0; t < LENGTH; t++) {
            breaks += inputs[t] == 50256;
        }
    }
    CHECK(breaks > 0); // documents begin with it
    dataloader_close(&loader);
}

static void test_dataloader(void) {
    CHECK(system("rm -rf " DL_FOLDER " && mkdir -p " DL_FOLDER) == 0);
    test_dataloader_bytes();
    test_dataloader_order();
    test_dataloader_epochs();
    test_dataloader_permutation();
    test_dataloader_mix();
    test_dataloader_shares();
    test_dataloader_pure();
    test_dataloader_damaged();
    test_dataloader_specs();
    test_dataloader_vocabulary();
    test_domains();
    test_domains_checked();
    test_dataloader_literal_names();
    test_dataloader_check_tokens();
    test_shard_hash();
    test_dataloader_print();
    test_dataloader_faults();
    test_dataloader_fuzz_corpus();
    test_prefetch();
    test_dataloader_real();
    CHECK(system("rm -rf " DL_FOLDER) == 0);
}

#endif
