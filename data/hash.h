/*
Hashes of bytes, of the bytes alone: the same on every machine (little-endian, as the shards are).

    hash_text()      of one text: which side of the split it goes to, which words are equal
    digest_add()     of a stream, in pieces of any size: is it still the bytes that were read before?

The digest keeps four lanes, so that four multiplications run at a time; each step is a bijection of the lane,
so no change of a single word goes unseen. Both are for accidents, not against an adversary.

Shapes: none. Errors: none.
*/
#ifndef HASH_H
#define HASH_H

#include "llmc/check.h"

#define HASH_FACTOR 0xD6E8FEB86659FD93ull
#define HASH_GOLDEN 0x9E3779B97F4A7C15ull

static inline uint64_t hash_text(const char *text, size_t size) {
    uint64_t h = size + HASH_GOLDEN;
    uint64_t word;
    size_t at = 0;
    for (; at + 8 <= size; at += 8) {
        memcpy(&word, text + at, 8);
        h = (h ^ word) * HASH_FACTOR;
        h ^= h >> 32;
    }
    for (word = 0; at < size; at++) {
        word = word << 8 | (uint8_t)text[at];
    }
    h = (h ^ word) * HASH_FACTOR;
    h = (h ^ h >> 32) * HASH_GOLDEN;
    return h ^ h >> 32;
}

enum { DIGEST_LANES = 4, DIGEST_BLOCK = 8 * DIGEST_LANES };

// all of it is compared and written into the state: no padding
typedef struct {
    uint64_t lanes[DIGEST_LANES];
    uint64_t size;              // bytes so far
    uint8_t tail[DIGEST_BLOCK]; // the last size % DIGEST_BLOCK of them, zeros behind
} Digest;

#define DIGEST_TEXT_SIZE (2 * sizeof(Digest) + 1)

static inline void digest_block(Digest *d, const void *block) {
    uint64_t words[DIGEST_LANES];
    memcpy(words, block, DIGEST_BLOCK);
    for (int i = 0; i < DIGEST_LANES; i++) {
        d->lanes[i] = (d->lanes[i] ^ words[i]) * HASH_FACTOR;
        d->lanes[i] ^= d->lanes[i] >> 32;
    }
}

static inline void digest_add(Digest *d, const void *bytes, size_t size) {
    const uint8_t *p = (const uint8_t *)bytes;
    size_t held = d->size % DIGEST_BLOCK;
    d->size += size;
    if (held > 0) {
        size_t use = size < DIGEST_BLOCK - held ? size : DIGEST_BLOCK - held;
        memcpy(d->tail + held, p, use);
        if (held + use < DIGEST_BLOCK) {
            return;
        }
        digest_block(d, d->tail);
        memset(d->tail, 0, DIGEST_BLOCK);
        p += use;
        size -= use;
    }
    for (; size >= DIGEST_BLOCK; size -= DIGEST_BLOCK, p += DIGEST_BLOCK) {
        digest_block(d, p);
    }
    memcpy(d->tail, p, size);
}

static inline int digest_equal(const Digest *a, const Digest *b) {
    return memcmp(a, b, sizeof(*a)) == 0;
}

// in hexadecimal; text [DIGEST_TEXT_SIZE]
static inline void digest_print(const Digest *d, char *text) {
    uint8_t bytes[sizeof(Digest)];
    memcpy(bytes, d, sizeof(bytes));
    for (size_t i = 0; i < sizeof(bytes); i++) {
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    }
}

// 0 when the text is no digest
static inline int digest_parse(Digest *d, const char *text) {
    uint8_t bytes[sizeof(Digest)];
    if (strlen(text) != 2 * sizeof(bytes) || strspn(text, "0123456789abcdef") != 2 * sizeof(bytes)) {
        return 0;
    }
    for (size_t i = 0; i < sizeof(bytes); i++) {
        const char two[3] = {text[2 * i], text[2 * i + 1], '\0'};
        bytes[i] = (uint8_t)strtol(two, NULL, 16);
    }
    memcpy(d, bytes, sizeof(bytes));
    return 1;
}

#endif
