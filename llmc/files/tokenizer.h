/*
Text to token ids and back, fast: the same ids as the definition in bpe.h.

Words repeat: those of up to 15 bytes are remembered with their ids in a cache. Word boundaries in ASCII are
found eight bytes at a time, without branches. The pairs of a long word are kept in a heap, so that a word of
n bytes takes n log n steps.

A Tokenizer is one thread's, because of its cache; tokenizer_share() gives another thread its own.

Shapes: ids [n] int. Errors: as in vocabulary.h.
*/
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include <sys/mman.h>
// defines: mmap, munmap, madvise
#include "llmc/files/tokenizer_json.h"

enum {
    TOKENIZER_BLANK = 0x10,    // marks of ' ', which may begin a word of any class,
    TOKENIZER_QUOTE = 0x20,    // and of "'", which may begin a contraction
    TOKENIZER_KINDS = 7,       // the bits of a mark that are its class
    TOKENIZER_WINDOW = 2048,   // bytes marked at a time
    TOKENIZER_BATCH = 32,      // words cut at a time
    TOKENIZER_CACHE_WORD = 15, // bytes
    TOKENIZER_CACHE_IDS = 7,
    TOKENIZER_CACHE_BITS = 17 // log2 of the number of pairs of words: 8 MiB
};
static_assert((int)TOKENIZER_MULTIBYTE <= (int)TOKENIZER_KINDS && TOKENIZER_KINDS < TOKENIZER_BLANK,
              "a mark's bits are apart");

// a word and its ids; 32 bytes, so that no entry crosses a cache line
struct TokenizerWord {
    uint64_t key[2];                       // the word's bytes, zero padded; the last byte is its size
    uint16_t ids[TOKENIZER_CACHE_IDS + 1]; // the last one is the number of ids
};
static_assert(sizeof(TokenizerWord) == 32, "entries do not cross a cache line");
static_assert(TOKENIZER_CACHE_WORD == sizeof(((TokenizerWord *)0)->key) - 1, "a key is a word and its size");
static_assert(TOKENIZER_CACHE_IDS + 1 <= TOKENIZER_CACHE_WORD,
              "an entry's ids fit the room that its word reserves");
static_assert((int)TOKENIZER_CACHE_WORD <= (int)TOKENIZER_SHORT,
              "a word of the cache is merged as a short one");

// a symbol of a long word; index -1 means none
struct TokenizerSymbol {
    int64_t previous, next;
    uint32_t merge; // of this symbol and the next: rank << 16 | id, or TOKENIZER_NO_MERGE
    uint16_t id;
};

// ----------------------------------------------------------------------------
// long words

static inline void tokenizer_heap_push(Tokenizer *t, uint64_t value) {
    if (t->heap_size == t->heap_capacity) {
        t->heap_capacity = t->heap_capacity ? 2 * t->heap_capacity : 1024;
        t->heap = GROW(uint64_t, t->heap, t->heap_capacity);
    }
    size_t at = t->heap_size++;
    while (at > 0 && t->heap[(at - 1) / 2] > value) {
        t->heap[at] = t->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    t->heap[at] = value;
}

static inline uint64_t tokenizer_heap_pop(Tokenizer *t) {
    uint64_t least = t->heap[0];
    uint64_t value = t->heap[--t->heap_size];
    size_t at = 0;
    for (size_t child = 1; child < t->heap_size; child = 2 * at + 1) {
        child += child + 1 < t->heap_size && t->heap[child + 1] < t->heap[child];
        if (t->heap[child] >= value) {
            break;
        }
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = value;
    return least;
}

// looks up the pair that starts at index and enters it in the heap
static inline void tokenizer_enter_pair(Tokenizer *t, int64_t index) {
    TokenizerSymbol *symbol = &t->symbols[index];
    symbol->merge = TOKENIZER_NO_MERGE;
    if (symbol->next >= 0) {
        symbol->merge = tokenizer_merge(t, symbol->id, t->symbols[symbol->next].id);
    }
    if (symbol->merge != TOKENIZER_NO_MERGE) {
        tokenizer_heap_push(t, (uint64_t)(symbol->merge >> 16) << 48 | (uint64_t)index);
    }
}

// the symbol at index takes in its right neighbour
static inline void tokenizer_join(Tokenizer *t, int64_t index) {
    TokenizerSymbol *symbol = &t->symbols[index];
    TokenizerSymbol *right = &t->symbols[symbol->next];
    symbol->id = (uint16_t)symbol->merge;
    right->merge = TOKENIZER_NO_MERGE;
    symbol->next = right->next;
    if (right->next >= 0) {
        t->symbols[right->next].previous = index;
    }
    tokenizer_enter_pair(t, index);
    if (symbol->previous >= 0) {
        tokenizer_enter_pair(t, symbol->previous);
    }
}

// any size in n log n steps: the heap may hold pairs that are gone, which their changed rank shows.
// Leaves a list of symbols that starts at index 0
static inline void tokenizer_merge_long(Tokenizer *t, const uint8_t *word, size_t size) {
    if (size > t->symbols_capacity) {
        t->symbols_capacity = 2 * size;
        t->symbols = GROW(TokenizerSymbol, t->symbols, t->symbols_capacity);
    }
    for (size_t i = 0; i < size; i++) {
        t->symbols[i].previous = (int64_t)i - 1;
        t->symbols[i].next = i + 1 < size ? (int64_t)i + 1 : -1;
        t->symbols[i].id = (uint16_t)t->byte_ids[word[i]];
    }
    t->heap_size = 0;
    for (size_t i = 0; i < size; i++) {
        tokenizer_enter_pair(t, (int64_t)i);
    }
    while (t->heap_size > 0) {
        uint64_t pair = tokenizer_heap_pop(t);
        int64_t index = (int64_t)(pair & 0xFFFFFFFFFFFFu);
        uint32_t merge = t->symbols[index].merge;
        if (merge != TOKENIZER_NO_MERGE && merge >> 16 == pair >> 48) {
            tokenizer_join(t, index);
        }
    }
}

// ----------------------------------------------------------------------------
// encoding

// room for `extra` more ids
static inline void tokenizer_reserve(int **ids, size_t n, size_t *capacity, size_t extra) {
    if (n + extra > *capacity) {
        *capacity = 2 * (n + extra) + 1024;
        *ids = GROW(int, *ids, *capacity);
    }
}

__attribute__((noinline, unused)) static size_t
tokenizer_encode_long(Tokenizer *t, const uint8_t *word, size_t size, int **ids, size_t n, size_t *capacity) {
    tokenizer_reserve(ids, n, capacity, size);
    if (size > TOKENIZER_SHORT) {
        tokenizer_merge_long(t, word, size);
        for (int64_t i = 0; i >= 0; i = t->symbols[i].next) {
            (*ids)[n++] = t->symbols[i].id;
        }
        return n;
    }
    uint16_t short_ids[TOKENIZER_SHORT];
    size_t count = tokenizer_merge_short(t, word, size, short_ids);
    for (size_t i = 0; i < count; i++) {
        (*ids)[n++] = short_ids[i];
    }
    return n;
}

// the class of each byte, as far as the byte alone tells, with marks for the two that may begin a word of
// another class; without tables, so that compilers make vectors of the loop
static inline void tokenizer_mark(const uint8_t *text, size_t size, uint8_t *marks) {
    for (size_t i = 0; i < size; i++) {
        uint8_t c = text[i];
        uint8_t letter = (uint8_t)((c | 0x20) - 'a') < 26;
        uint8_t digit = (uint8_t)(c - '0') < 10;
        uint8_t blank = c == ' ';
        uint8_t control = (uint8_t)(c - '\t') < 5;
        uint8_t quote = c == '\'';
        uint8_t kind =
            (uint8_t)(letter * UNICODE_LETTER | digit * UNICODE_NUMBER | (blank | control) * UNICODE_SPACE);
        marks[i] = (uint8_t)(kind | (c >> 7) * TOKENIZER_MULTIBYTE | blank * TOKENIZER_BLANK |
                             quote * TOKENIZER_QUOTE);
    }
}

// bytes of the word that 16 marked bytes begin with: tokenizer_word_size without branches, eight bytes at a
// time. 0 when it is not that simple: a contraction perhaps, a character of many bytes, no end in sight
static inline size_t tokenizer_marked_word(const uint8_t *marks) {
    const uint64_t ones = 0x0101010101010101u;
    uint64_t low, high;
    memcpy(&low, marks, 8);
    memcpy(&high, marks + 8, 8);
    uint64_t blank = (low & TOKENIZER_BLANK) != 0;
    uint64_t kind = low >> 8 * blank & TOKENIZER_KINDS;
    uint64_t other_low = (low ^ kind * ones) & ones * TOKENIZER_KINDS & ~(blank * TOKENIZER_KINDS);
    uint64_t other_high =
        ((high ^ kind * ones) & ones * TOKENIZER_KINDS) | 1ull << 56; // at the last byte we give up
    size_t n =
        other_low != 0 ? (size_t)__builtin_ctzll(other_low) / 8 : 8 + (size_t)__builtin_ctzll(other_high) / 8;
    if (((low & TOKENIZER_QUOTE) | (kind & TOKENIZER_MULTIBYTE) | (marks[n] & TOKENIZER_MULTIBYTE)) != 0 ||
        n == 15) {
        return 0;
    }
    return n - (kind == UNICODE_SPACE && n > 1); // the last space goes with what follows
}

// cuts bytes[0..1] to a word of at most TOKENIZER_CACHE_WORD bytes and puts its size into the last byte
static inline void tokenizer_key(uint64_t *bytes, size_t size) {
    bytes[0] &= size < 8 ? ~(UINT64_MAX << 8 * size) : UINT64_MAX;
    bytes[1] &= size > 8 ? UINT64_MAX >> 8 * (16 - size) : 0;
    bytes[1] |= (uint64_t)size << 56;
}

static inline size_t tokenizer_hash(const uint64_t *key) {
    uint64_t h = (key[0] ^ key[1] * 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;
    return (size_t)((h ^ h >> 29) * 0x9E3779B97F4A7C15ull >> (64 - TOKENIZER_CACHE_BITS));
}

// where a text is being cut into words
typedef struct {
    const uint8_t *word; // the next one
    const uint8_t *end;  // of the text
    const uint8_t *marked;
    const uint8_t *marked_end; // [marked, marked_end) have marks
    uint8_t *marks;            // [TOKENIZER_WINDOW]
} TokenizerCutter;

typedef struct {
    uint64_t key[2]; // all ones, which no entry has, for a word too long for the cache
    const uint8_t *word;
    size_t size;
    TokenizerWord *entries; // its two, on their way from memory
} TokenizerCut;

static inline void tokenizer_cut(const Tokenizer *t, TokenizerCutter *c, TokenizerCut *cut) {
    size_t left = (size_t)(c->end - c->word), size = 0;
    uint64_t key[2] = {0, 0};
    memcpy(key, c->word, left < 16 ? left : 16);
    if (left >= 16) {
        if (c->marked_end - c->word < 16) {
            size_t window = left < TOKENIZER_WINDOW ? left : (size_t)TOKENIZER_WINDOW;
            tokenizer_mark(c->word, window, c->marks);
            c->marked = c->word;
            c->marked_end = c->word + window;
        }
        size = tokenizer_marked_word(c->marks + (c->word - c->marked));
    }
    if (size == 0) {
        size = tokenizer_word_size(t, c->word, left);
    }
    if (size <= TOKENIZER_CACHE_WORD) {
        tokenizer_key(key, size);
    } else {
        memset(key, 0xFF, sizeof(key));
    }
    cut->key[0] = key[0];
    cut->key[1] = key[1];
    cut->word = c->word;
    cut->size = size;
    cut->entries = &t->cache[2 * tokenizer_hash(key)];
    __builtin_prefetch(cut->entries);
    c->word += size;
}

// the ids of a word that is not the first of its two entries: if it is the second they change places, else it
// is merged and, when its ids fit, becomes the first. Returns the number of ids so far
__attribute__((noinline, unused)) static size_t tokenizer_encode_rare(Tokenizer *t, const TokenizerCut *cut,
                                                                      int **ids, size_t n, size_t *capacity) {
    if (cut->size > TOKENIZER_CACHE_WORD) {
        n = tokenizer_encode_long(t, cut->word, cut->size, ids, n, capacity);
        tokenizer_reserve(ids, n, capacity, TOKENIZER_BATCH * TOKENIZER_CACHE_WORD); // for the batch's others
        return n;
    }
    uint16_t merged[TOKENIZER_SHORT] = {0};
    TokenizerWord found = cut->entries[1];
    const uint16_t *from = found.ids;
    size_t count = found.ids[TOKENIZER_CACHE_IDS];
    if (found.key[0] != cut->key[0] || found.key[1] != cut->key[1]) {
        from = merged;
        count = tokenizer_merge_short(t, cut->word, cut->size, merged);
        memcpy(found.key, cut->key, sizeof(found.key));
        memcpy(found.ids, merged, sizeof(found.ids));
        found.ids[TOKENIZER_CACHE_IDS] = (uint16_t)count;
    }
    if (count <= TOKENIZER_CACHE_IDS) {
        cut->entries[1] = cut->entries[0];
        cut->entries[0] = found;
    }
    for (size_t i = 0; i < count; i++) {
        (*ids)[n + i] = from[i];
    }
    return n + count;
}

// appends the text's ids to ids[0..*n); special tokens in the text are text. Some words are cut, then looked
// up, so that the memory has time to answer
static inline void tokenizer_encode(Tokenizer *t, const char *text, size_t size, int **ids, size_t *n,
                                    size_t *capacity) {
    TokenizerCut cuts[TOKENIZER_BATCH];
    uint8_t marks[TOKENIZER_WINDOW];
    TokenizerCutter cutter;
    cutter.marks = marks;
    cutter.marked = NULL;
    cutter.word = (const uint8_t *)text;
    cutter.end = cutter.word + size;
    cutter.marked_end = cutter.word;
    size_t count = *n;
    while (cutter.word < cutter.end) {
        int batch = 0;
        while (batch < TOKENIZER_BATCH && cutter.word < cutter.end) {
            tokenizer_cut(t, &cutter, &cuts[batch++]);
        }
        tokenizer_reserve(ids, count, capacity, TOKENIZER_BATCH * TOKENIZER_CACHE_WORD);
        for (int i = 0; i < batch; i++) {
            const TokenizerWord *entry = cuts[i].entries;
            if (((entry->key[0] ^ cuts[i].key[0]) | (entry->key[1] ^ cuts[i].key[1])) != 0) {
                count = tokenizer_encode_rare(t, &cuts[i], ids, count, capacity);
                continue;
            }
            uint16_t known[TOKENIZER_CACHE_IDS + 1];
            int *out = *ids + count;
            memcpy(known, entry->ids, sizeof(known));
            for (int k = 0; k <= TOKENIZER_CACHE_IDS; k++) { // all of them: quicker than as many as there are
                out[k] = known[k];
            }
            count += known[TOKENIZER_CACHE_IDS];
        }
    }
    *n = count;
}

// the same, with <|endoftext|> in the text recognised as the token
static inline void tokenizer_encode_special(Tokenizer *t, const char *text, size_t size, int **ids, size_t *n,
                                            size_t *capacity) {
    const size_t length = strlen(TOKENIZER_EOT);
    size_t start = 0;
    for (size_t at = 0; at + length <= size; at++) {
        if (text[at] != '<' || memcmp(text + at, TOKENIZER_EOT, length) != 0) {
            continue;
        }
        tokenizer_encode(t, text + start, at - start, ids, n, capacity);
        tokenizer_reserve(ids, *n, capacity, 1);
        (*ids)[(*n)++] = t->eot;
        start = at + length;
    }
    tokenizer_encode(t, text + start, size - start, ids, n, capacity);
}

// ----------------------------------------------------------------------------
// a thread's tokenizer

#define TOKENIZER_CACHE_SIZE (sizeof(TokenizerWord) * 2 << TOKENIZER_CACHE_BITS)

static inline void tokenizer_new_scratch(Tokenizer *t) {
    void *cache =
        mmap(NULL, TOKENIZER_CACHE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (cache == MAP_FAILED) {
        die("out of memory: no %zu bytes for the tokenizer\n  ---> use fewer --threads",
            TOKENIZER_CACHE_SIZE);
    }
#ifdef MADV_HUGEPAGE
    madvise(cache, TOKENIZER_CACHE_SIZE, MADV_HUGEPAGE); // the entries lie far apart: fewer pages to look up
#endif
    t->cache = (TokenizerWord *)cache;
    t->symbols = NULL;
    t->heap = NULL;
    t->symbols_capacity = 0;
    t->heap_capacity = 0;
}

static inline int tokenizer_has(const char *folder, const char *name) {
    char path[4096];
    check_format(path, sizeof(path), "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

// does the folder hold a tokenizer, in two files or in one?
static inline int tokenizer_is_in(const char *folder) {
    return folder[0] != '\0' &&
           ((tokenizer_has(folder, "vocab.json") && tokenizer_has(folder, "merges.txt")) ||
            tokenizer_has(folder, TOKENIZER_JSON));
}

static inline Tokenizer *tokenizer_load(const char *dir) {
    char vocab[4096], merges[4096];
    int in_one = !tokenizer_has(dir, "vocab.json") && tokenizer_has(dir, TOKENIZER_JSON);
    TokenizerLoader loader;
    Tokenizer *t = NEW(Tokenizer, 1);
    tokenizer_init_classes(t);
    check_format(vocab, sizeof(vocab), "%s/%s", dir, in_one ? TOKENIZER_JSON : "vocab.json");
    check_format(merges, sizeof(merges), "%s/%s", dir, in_one ? TOKENIZER_JSON "'s merges" : "merges.txt");
    if (in_one) {
        tokenizer_read_json(t, vocab);
    } else {
        t->vocab_text = check_read_file(vocab, &t->vocab_bytes, TOKENIZER_HINT);
        t->merges_text = check_read_file(merges, &t->merges_bytes, TOKENIZER_HINT);
    }
    tokenizer_load_vocab(t, &loader, vocab);
    tokenizer_require_tokens(t, &loader, vocab);
    tokenizer_load_merges(t, &loader, merges);
    free(loader.slots);
    tokenizer_new_scratch(t);
    return t;
}

// the same vocabulary for another thread, with a cache of its own; to be freed before t
static inline Tokenizer *tokenizer_share(const Tokenizer *t) {
    Tokenizer *other = NEW(Tokenizer, 1);
    *other = *t;
    other->shared = 1;
    tokenizer_new_scratch(other);
    return other;
}

static inline void tokenizer_free(Tokenizer *t) {
    if (t == NULL) {
        return;
    }
    if (!t->shared) {
        free(t->pieces);
        free(t->starts);
        free(t->vocab_text);
        free(t->merges_text);
        free(t->merges);
        free(t->filter);
        free(t->classes);
    }
    munmap(t->cache, TOKENIZER_CACHE_SIZE);
    free(t->symbols);
    free(t->heap);
    free(t);
}

#endif
