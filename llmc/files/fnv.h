/*
FNV-1a, 64 bits: a hash that tells files apart, not one that anybody must not be able to forge.

    hash = FNV_START;  for each byte: hash = (hash xor byte) 1099511628211

Shapes: none. Errors: none.
*/
#ifndef FNV_H
#define FNV_H

#include <stddef.h>
#include <stdint.h>
// defines: size_t, uint64_t

#define FNV_START 0xcbf29ce484222325ull

// the hash of what `hash` is of, followed by these bytes
static inline uint64_t fnv_add(uint64_t hash, const void *bytes, size_t size) {
    const unsigned char *data = (const unsigned char *)bytes;
    for (size_t i = 0; i < size; i++) {
        hash = (hash ^ data[i]) * 0x100000001b3ull;
    }
    return hash;
}

#endif
