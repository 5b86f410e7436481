// shard.h, dataloader.h: any file is a shard or refused, every window of it lies within; any list of globs is cut up.
#include "fuzz.h"
#include "llmc/files/dataloader.h"

static void read_windows(const uint8_t *data, size_t size) {
    static int inputs[16], targets[16], mix_source[MIX_PERIOD];
    static int64_t mix_used[MIX_PERIOD];
    TokenShard shard;
    DataSource source;
    DataLoader loader;
    memset(&shard, 0, sizeof(shard));
    memset(&source, 0, sizeof(source));
    memset(&loader, 0, sizeof(loader));
    shard.path = (char *)"fuzz.bin";
    shard.num_tokens = shard_check(shard.path, data, size);
    FUZZ_CHECK(shard.num_tokens == (int64_t)(size - SHARD_HEADER_BYTES) / 2);
    shard.tokens = (const uint16_t *)(data + SHARD_HEADER_BYTES);
    loader.seq_len = 1 + data[12] % 16; // a byte of the header that nothing reads
    source.shards = &shard;
    source.num_shards = 1;
    source.num_windows = shard.num_tokens > 0 ? (shard.num_tokens - 1) / loader.seq_len : 0;
    source.share = MIX_PERIOD;
    loader.sources = &source;
    loader.num_sources = 1;
    loader.shuffle = data[13] % 2;
    loader.mix_source = mix_source; // one source: always that
    loader.mix_used = mix_used;
    for (int64_t i = 0; i < MIX_PERIOD; i++) {
        mix_used[i] = i;
    }
    for (int64_t i = 0; i < source.num_windows; i++) {
        dataloader_sequence(&loader, i, 50257, inputs, targets);
    }
}

static void cut_list(const uint8_t *data, size_t size) {
    static char text[256];
    char *list = text, *item;
    size = size < sizeof(text) ? size : sizeof(text) - 1;
    memcpy(text, data, size);
    text[size] = '\0';
    while ((item = dataloader_next_item(&list)) != NULL) {
        double weight = dataloader_cut_weight(item);
        FUZZ_CHECK(weight >= 0.0 && strchr(item, ',') == NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (setjmp(fuzz_died) == 0) {
        cut_list(data, size);
    }
    if (setjmp(fuzz_died) == 0) {
        read_windows(data, size);
    }
    return 0;
}

// most mutations keep magic, version and size right, so that they reach what lies behind them
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t capacity, unsigned seed) {
    size = LLVMFuzzerMutate(data, size, capacity);
    int32_t header[3] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)(size > 1024 ? (size - 1024) / 2 : 0)};
    if (seed % 8 != 0 && size >= sizeof(header)) {
        memcpy(data, header, seed % 8 < 3 ? 8 : sizeof(header));
    }
    return size;
}
