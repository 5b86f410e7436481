/*
Byte-level byte-pair encoding as GPT-2 does it: text -> token ids -> text, for any bytes at all.

1. The text is cut into words (GPT-2's pre-tokenization), the first alternative that matches winning:
       's 't 're 've 'm 'll 'd | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
   Bytes that are not UTF-8 count as characters that are neither letter, number nor space.
2. A word starts as its bytes, one token each; the adjacent pair that stands first in merges.txt (its rank),
the leftmost of equals, is replaced by its token until no pair is left that merges.txt knows. Words repeat:
those of up to 15 bytes are remembered with their ids in a cache. A Tokenizer is one thread's, because of its
cache; tokenizer_share() gives another thread its own.

Files of a folder, under Hugging Face's names: vocab.json {token: id}, merges.txt "left right" a line in order
of rank. Tokens are spelled in GPT-2's byte symbols: printable characters of Latin-1 stand for themselves, the
other bytes for the characters from U+0100 on. Source: Radford et al. 2019, section 2.2, and the vocabulary
they released.

Shapes: ids [n] int. Errors: tokenizer_load dies on anything but a complete vocabulary of at most 65,536
tokens.
*/
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include <sys/mman.h>
// defines: mmap, munmap, madvise
#include "llmc/check.h"
#include "llmc/files/json.h"
#include "llmc/files/unicode_classes.h"

#define TOKENIZER_MAX_VOCAB 65536 // shards hold 16 bits a token
#define TOKENIZER_EOT "<|endoftext|>"
#define TOKENIZER_HINT                                                                                       \
    "data/download_gpt2.sh, or train a vocabulary of your own: build/train_tokenizer --help"

enum {
    TOKENIZER_MULTIBYTE = 4,   // a fifth class beside unicode_classes.h's: the byte alone does not tell
    TOKENIZER_BLANK = 0x10,    // marks of ' ', which may begin a word of any class,
    TOKENIZER_QUOTE = 0x20,    // and of "'", which may begin a contraction
    TOKENIZER_WINDOW = 2048,   // bytes marked at a time
    TOKENIZER_BATCH = 32,      // words cut at a time
    TOKENIZER_CACHE_WORD = 15, // bytes
    TOKENIZER_CACHE_IDS = 7,
    TOKENIZER_CACHE_BITS = 17, // log2 of the number of pairs of words: 8 MiB
    TOKENIZER_FILTER_BITS = 19,
    TOKENIZER_SHORT = 64 // symbols of a word up to which searching all pairs beats keeping a heap
};

#define TOKENIZER_NO_MERGE 0xFFFFFFFFu

// a word and its ids; 32 bytes, so that no entry crosses a cache line
typedef struct {
    uint64_t key[2];                       // the word's bytes, zero padded; the last byte is its size
    uint16_t ids[TOKENIZER_CACHE_IDS + 1]; // the last one is the number of ids
} TokenizerWord;

// a symbol of a long word; index -1 means none
typedef struct {
    int64_t previous, next;
    uint32_t merge; // of this symbol and the next: rank << 16 | id, or TOKENIZER_NO_MERGE
    uint16_t id;
} TokenizerSymbol;

typedef struct {
    int vocab_size;
    int eot;          // id of <|endoftext|>
    char *pieces;     // the bytes of all tokens
    uint32_t *starts; // [vocab_size + 1] into pieces
    int byte_ids[256];
    uint64_t *merges; // open addressing: left << 48 | right << 32 | rank << 16 | id, all ones when empty
    int merge_bits;   // log2 of its size
    uint64_t *
        filter; // [1 << TOKENIZER_FILTER_BITS] bits, few enough to stay near: 0 when no pair so hashed merges
    uint8_t *classes; // [UNICODE_SIZE]
    uint8_t byte_classes[256];
    TokenizerWord *cache; // [2 << TOKENIZER_CACHE_BITS]: a word is one of two, the last used first
    TokenizerSymbol *symbols;
    uint64_t *heap; // of a long word's pairs: rank << 48 | index, the least first
    size_t symbols_capacity, heap_capacity, heap_size;
    int shared; // everything above the cache belongs to another Tokenizer
} Tokenizer;

// ----------------------------------------------------------------------------
// pre-tokenization

// class of the character at text and, in *n, its bytes
static inline int tokenizer_class(const Tokenizer *t, const uint8_t *text, size_t size, size_t *n) {
    unsigned c = text[0];
    *n = 1;
    if (c < 0x80) {
        return t->byte_classes[c];
    }
    size_t bytes = json_utf8_size(text, text + size);
    if (bytes == 0) {
        return UNICODE_OTHER;
    }
    unsigned code = c & (0x7Fu >> bytes);
    for (size_t i = 1; i < bytes; i++) {
        code = code << 6 | (text[i] & 0x3Fu);
    }
    *n = bytes;
    return t->classes[code];
}

// where the run of characters of one class that goes on at `at` ends
static inline size_t tokenizer_run_end(const Tokenizer *t, const uint8_t *text, size_t size, size_t at,
                                       int kind) {
    for (;;) {
        while (at < size && t->byte_classes[text[at]] == kind) {
            at++;
        }
        size_t n;
        if (at == size || text[at] < 0x80 || tokenizer_class(t, text + at, size - at, &n) != kind) {
            return at;
        }
        at += n;
    }
}

// size of 's 't 'm 'd 're 've 'll at text, or 0
static inline size_t tokenizer_contraction(const uint8_t *text, size_t size) {
    int a = size > 1 ? text[1] : 0;
    int b = size > 2 ? text[2] : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') {
        return 2;
    }
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// white space at text: all of it at the end of the text; else its last character is left to the next word,
// unless it is the only one
static inline size_t tokenizer_space(const Tokenizer *t, const uint8_t *text, size_t size) {
    size_t end = tokenizer_run_end(t, text, size, 0, UNICODE_SPACE);
    size_t last = end - 1;
    while ((text[last] & 0xC0) == 0x80) {
        last--;
    }
    return end == size || last == 0 ? end : last;
}

// bytes of the first word of a text that is not empty
static inline size_t tokenizer_word_size(const Tokenizer *t, const uint8_t *text, size_t size) {
    size_t n = text[0] == '\'' ? tokenizer_contraction(text, size) : 0;
    if (n > 0) {
        return n;
    }
    size_t at = text[0] == ' ' && size > 1;
    int kind = tokenizer_class(t, text + at, size - at, &n);
    if (kind == UNICODE_SPACE) {
        return tokenizer_space(t, text, size);
    }
    return tokenizer_run_end(t, text, size, at + n, kind);
}

// ----------------------------------------------------------------------------
// merging a word's symbols

// key = left << 16 | right
static inline uint32_t tokenizer_hash_pair(uint32_t key) {
    return key * 0x9E3779B1u;
}

// the slot of a pair, or the empty one where it would stand
static inline uint32_t tokenizer_merge_slot(const Tokenizer *t, uint32_t key) {
    uint32_t mask = (1u << t->merge_bits) - 1;
    uint32_t slot = tokenizer_hash_pair(key) >> (32 - t->merge_bits);
    while (t->merges[slot] != UINT64_MAX && (uint32_t)(t->merges[slot] >> 32) != key) {
        slot = (slot + 1) & mask;
    }
    return slot;
}

// rank << 16 | id of the token that the pair becomes, or TOKENIZER_NO_MERGE (an empty slot's lower half):
// comparing two compares their ranks
static inline uint32_t tokenizer_merge(const Tokenizer *t, unsigned left, unsigned right) {
    uint32_t key = left << 16 | right;
    uint32_t bit = tokenizer_hash_pair(key) >> (32 - TOKENIZER_FILTER_BITS);
    if ((t->filter[bit / 64] >> bit % 64 & 1) == 0) {
        return TOKENIZER_NO_MERGE;
    }
    return (uint32_t)t->merges[tokenizer_merge_slot(t, key)];
}

// at most TOKENIZER_SHORT bytes: searches all pairs for the least at each merge. Returns the number of ids
static inline size_t tokenizer_merge_short(const Tokenizer *t, const uint8_t *word, size_t size,
                                           uint16_t *ids) {
    uint32_t merges[TOKENIZER_SHORT];
    size_t n = size;
    for (size_t i = 0; i < n; i++) {
        ids[i] = (uint16_t)t->byte_ids[word[i]];
    }
    for (size_t i = 0; i + 1 < n; i++) {
        merges[i] = tokenizer_merge(t, ids[i], ids[i + 1]);
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++) {
            best = merges[i] < merges[best] ? i : best;
        }
        if (merges[best] == TOKENIZER_NO_MERGE) {
            break;
        }
        ids[best] = (uint16_t)merges[best];
        n--;
        for (size_t i = best + 1; i < n; i++) {
            ids[i] = ids[i + 1];
            merges[i - 1] = merges[i];
        }
        if (best > 0) {
            merges[best - 1] = tokenizer_merge(t, ids[best - 1], ids[best]);
        }
        if (best + 1 < n) {
            merges[best] = tokenizer_merge(t, ids[best], ids[best + 1]);
        }
    }
    return n;
}

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
    uint64_t kind = low >> 8 * blank & 7;
    uint64_t other_low = (low ^ kind * ones) & ones * 7 & ~(blank * 7);
    uint64_t other_high = ((high ^ kind * ones) & ones * 7) | 1ull << 56; // at the last byte we give up
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
// decoding

// the raw bytes of one id: perhaps a part of a character. Not 0-terminated
static inline const char *tokenizer_piece(const Tokenizer *t, int id, size_t *size) {
    if (id < 0 || id >= t->vocab_size) {
        die("token %d is not in the vocabulary of %d tokens\n  ---> use the --tokenizer that made the tokens",
            id, t->vocab_size);
    }
    *size = t->starts[id + 1] - t->starts[id];
    return t->pieces + t->starts[id];
}

// the text of ids, 0-terminated, for the caller to free; *size (without that 0) may be NULL
static inline char *tokenizer_decode(const Tokenizer *t, const int *ids, size_t n, size_t *size) {
    size_t total = 0, piece_size = 0;
    for (size_t i = 0; i < n; i++) {
        tokenizer_piece(t, ids[i], &piece_size);
        total += piece_size;
    }
    char *text = NEW(char, total + 1);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const char *piece = tokenizer_piece(t, ids[i], &piece_size);
        memcpy(text + at, piece, piece_size);
        at += piece_size;
    }
    if (size != NULL) {
        *size = total;
    }
    return text;
}

// ----------------------------------------------------------------------------
// loading

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

static inline void tokenizer_load_vocab(Tokenizer *t, TokenizerLoader *loader, const char *path) {
    JsonArena arena;
    json_arena_init(&arena);
    const Json *vocab = json_parse_file(path, &arena, TOKENIZER_HINT);
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

static inline void tokenizer_load_merges(Tokenizer *t, TokenizerLoader *loader, const char *path) {
    size_t size, lines = 1;
    char *text = check_read_file(path, &size, TOKENIZER_HINT);
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
    free(text);
}

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

// the classes of characters: all that tokenizer_word_size needs
static inline void tokenizer_init_classes(Tokenizer *t) {
    t->classes = NEW(uint8_t, UNICODE_SIZE);
    unicode_fill_classes(t->classes);
    memset(t->byte_classes, TOKENIZER_MULTIBYTE, sizeof(t->byte_classes));
    memcpy(t->byte_classes, t->classes, 0x80);
}

static inline Tokenizer *tokenizer_load(const char *dir) {
    char path[4096];
    TokenizerLoader loader;
    Tokenizer *t = NEW(Tokenizer, 1);
    tokenizer_init_classes(t);
    check_format(path, sizeof(path), "%s/vocab.json", dir);
    tokenizer_load_vocab(t, &loader, path);
    tokenizer_require_tokens(t, &loader, path);
    check_format(path, sizeof(path), "%s/merges.txt", dir);
    tokenizer_load_merges(t, &loader, path);
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
