/*
A vocabulary's two files, under Hugging Face's names, into the tables of bpe.h.

    vocab.json   {token: id}, the ids 0 .. n-1
    merges.txt   "left right" per line, in order of rank

Tokens are spelled in GPT-2's byte symbols: printable characters of Latin-1 stand for themselves, the other
bytes for the characters from U+0100 on.

Shapes: none. Errors: anything but a complete vocabulary of at most 65,536 tokens dies, named with its line.
*/
#ifndef VOCABULARY_H
#define VOCABULARY_H

#include "llmc/files/bpe.h"

#define TOKENIZER_HINT                                                                                       \
    "data/download_gpt2.sh, or train a vocabulary of your own: build/train_tokenizer --help"

// GPT-2's symbols: the code point that stands for each byte
static inline void tokenizer_byte_symbols(int *symbols) {
    int next = 256;
    for (int byte = 0; byte < 256; byte++) {
        int printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
        symbols[byte] = printable ? byte : next++;
    }
}

// what loading needs: symbols back to bytes, and tokens by their bytes
typedef struct {
    int bytes[512];   // of each symbol's code point; -1: no symbol
    int *slots;       // open addressing: ids; -1 when empty
    size_t mask;      // number of slots - 1
    const char *path; // of the file being read, for messages
} TokenizerLoader;

static inline void tokenizer_loader_init(TokenizerLoader *loader, size_t vocab_size) {
    int symbols[256];
    tokenizer_byte_symbols(symbols);
    memset(loader->bytes, -1, sizeof(loader->bytes));
    for (int byte = 0; byte < 256; byte++) {
        loader->bytes[symbols[byte]] = byte;
    }
    size_t slots = 1024;
    while (slots < 2 * vocab_size) {
        slots *= 2;
    }
    loader->slots = NEW(int, slots);
    memset(loader->slots, -1, slots * sizeof(int));
    loader->mask = slots - 1;
}

// a token's spelling in symbols -> its bytes in out; returns their number, 0 if a character is no symbol
static inline size_t tokenizer_unspell(const TokenizerLoader *loader, const char *token, size_t size,
                                       char *out) {
    const uint8_t *p = (const uint8_t *)token;
    const uint8_t *end = p + size;
    size_t n = 0;
    while (p < end) {
        size_t bytes = json_utf8_size(p, end);
        unsigned code = bytes == 1 ? p[0] : bytes == 2 ? (p[0] & 0x1Fu) << 6 | (p[1] & 0x3Fu) : 511;
        if (code > 511 || loader->bytes[code] < 0) {
            return 0;
        }
        out[n++] = (char)loader->bytes[code];
        p += bytes;
    }
    return n;
}

// the slot of the token with these bytes, or the empty one where it would stand
static inline int *tokenizer_slot(const Tokenizer *t, const TokenizerLoader *loader, const char *bytes,
                                  size_t size) {
    uint64_t hash = size;
    for (size_t i = 0; i < size; i++) {
        hash = (hash ^ (uint8_t)bytes[i]) * 0x100000001B3ull;
    }
    size_t slot = (hash ^ hash >> 32) & loader->mask;
    for (; loader->slots[slot] >= 0; slot = (slot + 1) & loader->mask) {
        int id = loader->slots[slot];
        if (t->starts[id + 1] - t->starts[id] == size &&
            memcmp(t->pieces + t->starts[id], bytes, size) == 0) {
            break;
        }
    }
    return &loader->slots[slot];
}

// checks that the ids are 0..n-1 and returns the members in their order
static inline const Json **tokenizer_sort_vocab(const Json *vocab, const char *path) {
    const Json **by_id = NEW(const Json *, vocab->count);
    for (const Json *token = vocab->child; token != NULL; token = token->next) {
        int64_t id;
        if (!json_int64(token, &id) || id < 0 || id >= (int64_t)vocab->count || by_id[id] != NULL) {
            die("%s: the id of token \"%s\" is %s; expected the ids 0 to %zu, each once\n  ---> %s", path,
                token->key, token->type == JSON_NUMBER ? token->text : "not a number", vocab->count - 1,
                TOKENIZER_HINT);
        }
        by_id[id] = token;
    }
    return by_id;
}

// of t->vocab_text
static inline void tokenizer_load_vocab(Tokenizer *t, TokenizerLoader *loader, const char *path) {
    JsonArena arena;
    json_arena_init(&arena);
    const Json *vocab = json_parse_text(t->vocab_text, t->vocab_bytes, &arena, path, TOKENIZER_HINT);
    if (vocab->type != JSON_OBJECT || vocab->count < 257 || vocab->count > TOKENIZER_MAX_VOCAB) {
        die("%s holds %zu tokens; expected an object of 257 (bytes and %s) to %d tokens\n  ---> %s", path,
            vocab->type == JSON_OBJECT ? vocab->count : 0, TOKENIZER_EOT, TOKENIZER_MAX_VOCAB,
            TOKENIZER_HINT);
    }
    const Json **by_id = tokenizer_sort_vocab(vocab, path);
    size_t total = 0;
    for (size_t id = 0; id < vocab->count; id++) {
        total += by_id[id]->key_size;
    }
    t->vocab_size = (int)vocab->count;
    t->pieces = NEW(char, total);
    t->starts = NEW(uint32_t, vocab->count + 1);
    tokenizer_loader_init(loader, vocab->count);
    for (int id = 0; id < t->vocab_size; id++) {
        const Json *token = by_id[id];
        char *piece = t->pieces + t->starts[id];
        size_t size = tokenizer_unspell(loader, token->key, token->key_size, piece);
        if (size == 0) {
            die("%s: token \"%s\" is not spelled in GPT-2's byte symbols\n  ---> %s", path, token->key,
                TOKENIZER_HINT);
        }
        int *slot = tokenizer_slot(t, loader, piece, size);
        if (*slot >= 0) {
            die("%s: token \"%s\" stands there twice\n  ---> %s", path, token->key, TOKENIZER_HINT);
        }
        *slot = id;
        t->starts[id + 1] = t->starts[id] + (uint32_t)size;
    }
    free(by_id);
    json_arena_free(&arena);
}

static inline void tokenizer_require_tokens(Tokenizer *t, const TokenizerLoader *loader, const char *path) {
    for (int byte = 0; byte < 256; byte++) {
        char c = (char)byte;
        t->byte_ids[byte] = *tokenizer_slot(t, loader, &c, 1);
        if (t->byte_ids[byte] < 0) {
            die("%s has no token for the byte %d; expected all 256\n  ---> %s", path, byte, TOKENIZER_HINT);
        }
    }
    t->eot = *tokenizer_slot(t, loader, TOKENIZER_EOT, strlen(TOKENIZER_EOT));
    if (t->eot < 0) {
        die("%s has no token %s, which begins each document\n  ---> %s", path, TOKENIZER_EOT, TOKENIZER_HINT);
    }
}

// the id of a symbol of merges.txt; dies when the vocabulary lacks it. scratch: room for size bytes
static inline unsigned tokenizer_merge_symbol(const Tokenizer *t, const TokenizerLoader *loader,
                                              const char *symbol, size_t size, size_t line, char *scratch) {
    size_t bytes = tokenizer_unspell(loader, symbol, size, scratch);
    int id = bytes > 0 ? *tokenizer_slot(t, loader, scratch, bytes) : -1;
    if (id < 0) {
        die("%s, line %zu: \"%.*s\" is not a token of vocab.json\n  ---> %s", loader->path, line, (int)size,
            symbol, TOKENIZER_HINT);
    }
    return (unsigned)id;
}

// one line "left right"
static inline void tokenizer_add_merge(Tokenizer *t, const TokenizerLoader *loader, const char *text,
                                       size_t size, size_t line, size_t rank, char *scratch) {
    const char *space = (const char *)memchr(text, ' ', size);
    if (space == NULL || rank >= 0xFFFF) {
        die("%s, line %zu: %s\n  ---> %s", loader->path, line,
            space == NULL ? "expected two tokens with a space between" : "more than 65,535 merges",
            TOKENIZER_HINT);
    }
    size_t left_size = (size_t)(space - text);
    unsigned left = tokenizer_merge_symbol(t, loader, text, left_size, line, scratch);
    unsigned right = tokenizer_merge_symbol(t, loader, space + 1, size - left_size - 1, line, scratch);
    memcpy(scratch, text, left_size);
    memcpy(scratch + left_size, space + 1, size - left_size - 1);
    unsigned joined = tokenizer_merge_symbol(t, loader, scratch, size - 1, line, scratch);
    uint32_t key = left << 16 | right;
    uint64_t *merge = &t->merges[tokenizer_merge_slot(t, key)];
    if (*merge != UINT64_MAX) {
        die("%s, line %zu: the pair \"%.*s\" stands there twice\n  ---> %s", loader->path, line, (int)size,
            text, TOKENIZER_HINT);
    }
    *merge = (uint64_t)key << 32 | (uint64_t)rank << 16 | joined;
    uint32_t bit = tokenizer_hash_pair(key) >> (32 - TOKENIZER_FILTER_BITS);
    t->filter[bit / 64] |= 1ull << bit % 64;
}

// of t->merges_text
static inline void tokenizer_load_merges(Tokenizer *t, TokenizerLoader *loader, const char *path) {
    const char *text = t->merges_text;
    size_t size = t->merges_bytes, lines = 1;
    char *scratch = NEW(char, size + 1);
    for (size_t i = 0; i < size; i++) {
        lines += text[i] == '\n';
    }
    t->merge_bits = 10;
    while (t->merge_bits < 20 && (size_t)1 << t->merge_bits < 2 * lines) {
        t->merge_bits++;
    }
    t->merges = GROW(uint64_t, NULL, (size_t)1 << t->merge_bits);
    memset(t->merges, 0xFF, sizeof(uint64_t) << t->merge_bits);
    t->filter = NEW(uint64_t, (1 << TOKENIZER_FILTER_BITS) / 64);
    loader->path = path;
    size_t line = 1, rank = 0;
    for (size_t start = 0; start < size; line++) {
        const char *newline = (const char *)memchr(text + start, '\n', size - start);
        size_t end = newline != NULL ? (size_t)(newline - text) : size;
        int version = line == 1 && end - start >= 8 && memcmp(text + start, "#version", 8) == 0;
        if (end > start && !version) {
            tokenizer_add_merge(t, loader, text + start, end - start, line, rank++, scratch);
        }
        start = end + 1;
    }
    free(scratch);
}

// the classes of characters: all that tokenizer_word_size needs
static inline void tokenizer_init_classes(Tokenizer *t) {
    t->classes = NEW(uint8_t, UNICODE_SIZE);
    unicode_fill_classes(t->classes);
    memset(t->byte_classes, TOKENIZER_MULTIBYTE, sizeof(t->byte_classes));
    memcpy(t->byte_classes, t->classes, 0x80);
}

#endif
