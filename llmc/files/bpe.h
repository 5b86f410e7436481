/*
Byte-level byte-pair encoding as GPT-2 defines it: text -> token ids -> text, for any bytes at all.

1. The text is cut into words (GPT-2's pre-tokenization), the first alternative that matches winning:
       's 't 're 've 'm 'll 'd | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+(?!\S) | \s+
   Bytes that are not UTF-8 count as characters that are neither letter, number nor space.
2. A word starts as its bytes, one token each. Of the adjacent pairs that merges.txt knows, the one that
   stands first there (its rank), the leftmost of equals, is replaced by its token; until it knows none.

tokenizer_word_size is the first rule and tokenizer_merge_short the second, both as they are written here.
tokenizer.h gives the same ids, faster; vocabulary.h reads the tables from their files.

Source: Radford et al. 2019, section 2.2, and the vocabulary they released.
Shapes: ids [n]. Errors: an id outside of the vocabulary dies.
*/
#ifndef BPE_H
#define BPE_H

#include "llmc/check.h"
#include "llmc/files/json.h"
#include "llmc/files/unicode_classes.h"

#define TOKENIZER_MAX_VOCAB 65536 // shards hold 16 bits per token
#define TOKENIZER_EOT "<|endoftext|>"

enum {
    TOKENIZER_MULTIBYTE = 4, // a fifth class beside unicode_classes.h's: the byte alone does not tell
    TOKENIZER_FILTER_BITS = 19,
    TOKENIZER_SHORT = 64 // symbols of a word up to which searching all pairs beats keeping a heap
};
static_assert((int)TOKENIZER_MULTIBYTE > (int)UNICODE_SPACE, "the fifth class is none of the four");
static_assert(TOKENIZER_MAX_VOCAB - 1 <= UINT16_MAX,
              "an id fits in the 16 bits that merges and shards give it");

#define TOKENIZER_NO_MERGE 0xFFFFFFFFu

typedef struct TokenizerWord TokenizerWord;     // of the cache,
typedef struct TokenizerSymbol TokenizerSymbol; // and of a long word: both in tokenizer.h

typedef struct {
    // the vocabulary
    int vocab_size;
    int eot;          // id of <|endoftext|>
    char *pieces;     // the bytes of all tokens
    uint32_t *starts; // [vocab_size + 1] into pieces
    int byte_ids[256];
    char *vocab_text, *merges_text; // vocab.json and merges.txt as they were read (tokenizer_files.h)
    size_t vocab_bytes, merges_bytes;
    // the merges: an open-addressing table, and a filter in front of it that is small enough to stay near
    uint64_t *merges; // left << 48 | right << 32 | rank << 16 | id, all ones when empty
    int merge_bits;   // log2 of its size
    uint64_t *filter; // [1 << TOKENIZER_FILTER_BITS] bits: 0 when no pair so hashed merges
    // classes of characters
    uint8_t *classes; // [UNICODE_SIZE]
    uint8_t byte_classes[256];
    // one thread's scratch (tokenizer.h)
    TokenizerWord *cache; // [2 << TOKENIZER_CACHE_BITS]: a word is one of two, the last used first
    TokenizerSymbol *symbols;
    uint64_t *heap; // of a long word's pairs: rank << 48 | index, the least first
    size_t symbols_capacity, heap_capacity, heap_size;
    int shared; // everything above the scratch belongs to another Tokenizer
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

#endif
