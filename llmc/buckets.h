/*
Who keeps what of the parameters when n ranks train together (ZeRO-1: Rajbhandari et al., 2020).

A flat buffer is laid out in buckets, of which each travels at once: all norms, all routers, the embedding, a
layer's matrices, the head. A bucket is a whole number of blocks of BUCKET_BLOCK elements; what its tensors
leave over at its end is padding, and always 0.

    blocks    0 .. nb-1 of a bucket; rank r of n owns  [r s, (r + 1) s),  s = ceil(nb / n), cut off at nb
    owner     adds up the ranks' gradients of its blocks, keeps their masters and moments, updates them
    place     of a bucket's shard in what a rank keeps: behind the shards of the buckets before, s blocks each

The layout does not depend on n, so neither do files. A block never has two owners, so the sums over blocks
that make the gradient's norm have the same bits on any number of ranks. The price: the last owners of a
bucket may have fewer blocks than the others, or none (one block is 64 KB of a layer's 200 to 900 MB).

Shapes: elements of flat buffers. Errors: none.
*/
#ifndef BUCKETS_H
#define BUCKETS_H

#include <stdint.h>
// defines: int64_t

enum { BUCKET_BLOCK = 16384 };

// consecutive elements of a flat buffer
typedef struct {
    int64_t first, size;
} Range;

typedef struct {
    int64_t first, size; // of it in the flat buffer; whole blocks
    int decay;           // does weight decay apply to its tensors?
    int is_fp32;         // kernels read it in fp32, beside the rounded copy
} Bucket;

static inline int64_t bucket_round_up(int64_t elements) {
    return (elements + BUCKET_BLOCK - 1) / BUCKET_BLOCK * BUCKET_BLOCK;
}

static inline int64_t bucket_blocks(const Bucket *bucket) {
    return bucket->size / BUCKET_BLOCK;
}

// s: the blocks of a bucket that a rank owns, if it is not one of the last
static inline int64_t owned_most_blocks(const Bucket *bucket, int ranks) {
    return (bucket_blocks(bucket) + ranks - 1) / ranks;
}

// the elements of a bucket that a rank owns, in the flat buffer; their number may be 0
static inline Range owned_range(const Bucket *bucket, int rank, int ranks) {
    int64_t most = owned_most_blocks(bucket, ranks) * BUCKET_BLOCK;
    int64_t begin = rank * most < bucket->size ? rank * most : bucket->size;
    int64_t end = begin + most < bucket->size ? begin + most : bucket->size;
    Range range = {bucket->first + begin, end - begin};
    return range;
}

// where bucket b's shard begins in a rank's own buffers; b = count: their size
static inline int64_t owned_place(const Bucket *buckets, int b, int ranks) {
    int64_t place = 0;
    for (int i = 0; i < b; i++) {
        place += owned_most_blocks(&buckets[i], ranks) * BUCKET_BLOCK;
    }
    return place;
}

#endif
