/*
SHA-256: the hashes of the manifest, which say that a shard is the one that was made.

Source: FIPS 180-4, sections 4.1.2, 4.2.2, 5.1.1, 5.3.3, 6.2.2.

Shapes: none. Errors: a file that cannot be read.
*/
#ifndef SHA256_H
#define SHA256_H

#include "llmc/check.h"

typedef struct {
    uint32_t state[8];
    uint64_t size; // bytes so far
    uint8_t block[64];
} Sha256;

static inline void sha256_init(Sha256 *s) {
    // the first 32 bits of the fractional parts of the square roots of the first 8 primes
    static const uint32_t initial[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    memcpy(s->state, initial, sizeof(initial));
    s->size = 0;
}

static inline uint32_t sha256_rotate(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

static inline void sha256_block(uint32_t *state, const uint8_t *block) {
    // the same of the cube roots of the first 64 primes
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };
    uint32_t w[64];
    for (int i = 0; i < 16; i++) {
        memcpy(&w[i], block + 4 * i, 4);
        w[i] = __builtin_bswap32(w[i]); // little-endian machines
    }
    for (int i = 16; i < 64; i++) {
        uint32_t x = w[i - 15], y = w[i - 2];
        uint32_t s0 = sha256_rotate(x, 7) ^ sha256_rotate(x, 18) ^ x >> 3;
        uint32_t s1 = sha256_rotate(y, 17) ^ sha256_rotate(y, 19) ^ y >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = sha256_rotate(e, 6) ^ sha256_rotate(e, 11) ^ sha256_rotate(e, 25);
        uint32_t s0 = sha256_rotate(a, 2) ^ sha256_rotate(a, 13) ^ sha256_rotate(a, 22);
        uint32_t t1 = h + s1 + (g ^ (e & (f ^ g))) + k[i] + w[i];
        uint32_t t2 = s0 + ((a & b) | (c & (a | b)));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    const uint32_t sum[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) {
        state[i] += sum[i];
    }
}

static inline void sha256_update(Sha256 *s, const void *data, size_t size) {
    const uint8_t *p = (const uint8_t *)data;
    while (size > 0) {
        size_t at = s->size % 64;
        size_t n = size < 64 - at ? size : 64 - at;
        const uint8_t *block = p;
        if (n < 64) {
            memcpy(s->block + at, p, n);
            block = s->block;
        }
        s->size += n;
        p += n;
        size -= n;
        if (at + n == 64) {
            sha256_block(s->state, block);
        }
    }
}

// 64 hexadecimal digits and a 0
static inline void sha256_finish(Sha256 *s, char *hex) {
    uint64_t bits = __builtin_bswap64(8 * s->size);
    uint8_t one = 0x80, zero = 0;
    sha256_update(s, &one, 1);
    while (s->size % 64 != 56) {
        sha256_update(s, &zero, 1);
    }
    sha256_update(s, &bits, 8);
    for (int i = 0; i < 8; i++) {
        sprintf(hex + 8 * i, "%08x", s->state[i]);
    }
}

static inline void sha256_file(const char *path, char *hex) {
    static const size_t chunk = 1 << 20;
    FILE *file = check_fopen(path, "rb", "");
    char *bytes = NEW(char, chunk);
    Sha256 s;
    sha256_init(&s);
    for (size_t n = chunk; n == chunk;) {
        n = fread(bytes, 1, chunk, file);
        sha256_update(&s, bytes, n);
    }
    if (ferror(file)) {
        die("cannot read %s: %s", path, strerror(errno));
    }
    fclose(file);
    free(bytes);
    sha256_finish(&s, hex);
}

#endif
