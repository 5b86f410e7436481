/*
Which run a checkpoint is of, and which data that run has learned from: two members of state.json.

    "run": "0123456789abcdef"           drawn when a run begins: a folder of another run is not written to
    "shards": [{"name": "train_000000.bin", "bytes": 2048, "hash": "0123456789abcdef"}, ...]

The shards stand in the order in which the loader reads them, since that and their sizes decide which window a
step takes. A shard's hash (shard.h) is of its ends alone (of all of it, a start would read all the data).
Checkpoints made before there was such a member lack it: the run is 0, or the data unknown.

Shapes: none. Errors: a member that is not as above dies with its file and the remedy.
*/
#ifndef PROVENANCE_H
#define PROVENANCE_H

#include "llmc/files/dataloader.h"
#include "llmc/files/folder.h"
#include "llmc/files/json_bytes.h"
#include <time.h>
// defines: DataLoader, shard_hash; Json; time

enum { SHARD_NAME_SIZE = 256 }; // the longest that file systems take, and a 0

typedef struct {
    char name[SHARD_NAME_SIZE]; // without its folder, which may move
    int64_t bytes;
    uint64_t hash;
} ShardRecord;

typedef struct {
    uint64_t run; // 0: unknown
    ShardRecord *shards;
    int num_shards; // 0: unknown
} Provenance;

static inline void provenance_free(Provenance *p) {
    free(p->shards);
    memset(p, 0, sizeof(*p));
}

// a number that no other run has
static inline uint64_t draw_run(void) {
    uint64_t number = 0;
    FILE *random = fopen("/dev/urandom", "rb");
    if (random != NULL) {
        number = fread(&number, sizeof(number), 1, random) == 1 ? number : 0;
        fclose(random);
    }
    return number != 0 ? number : rng_bits((uint64_t)time(NULL), (uint64_t)getpid(), 0) | 1;
}

static inline void record_shards(Provenance *p, const DataLoader *loader) {
    free(p->shards);
    p->num_shards = 0;
    for (int s = 0; s < loader->num_sources; s++) {
        p->num_shards += loader->sources[s].num_shards;
    }
    p->shards = NEW(ShardRecord, p->num_shards);
    ShardRecord *record = p->shards;
    for (int s = 0; s < loader->num_sources; s++) {
        for (int i = 0; i < loader->sources[s].num_shards; i++, record++) {
            const TokenShard *shard = &loader->sources[s].shards[i];
            const char *slash = strrchr(shard->path, '/');
            check_format(record->name, sizeof(record->name), "%s", slash == NULL ? shard->path : slash + 1);
            record->bytes = (int64_t)shard->size;
            record->hash = shard_hash(shard);
        }
    }
}

// ----------------------------------------------------------------------------
// in state.json

static inline void provenance_write(FILE *file, const Provenance *p) {
    if (p->run != 0) {
        fprintf(file, "  \"run\": \"%016llx\",\n", (unsigned long long)p->run);
    }
    if (p->num_shards == 0) {
        return;
    }
    fputs("  \"shards\": [", file);
    for (int i = 0; i < p->num_shards; i++) {
        const ShardRecord *shard = &p->shards[i];
        fprintf(file, "%s\n    {\"name\": ", i > 0 ? "," : "");
        json_write_bytes(file, shard->name, strlen(shard->name));
        fprintf(file, ", \"bytes\": %lld, \"hash\": \"%016llx\"}", (long long)shard->bytes,
                (unsigned long long)shard->hash);
    }
    fputs("\n  ],\n", file);
}

// sixteen hexadecimal digits
static inline int provenance_read_hex(const Json *value, uint64_t *out) {
    if (value == NULL || value->type != JSON_STRING || value->text_size != 16 ||
        strspn(value->text, "0123456789abcdef") != 16) {
        return 0;
    }
    *out = strtoull(value->text, NULL, 16);
    return 1;
}

static inline int provenance_read_shard(const Json *json, ShardRecord *shard) {
    const Json *name = json_get(json, "name");
    if (name == NULL || name->type != JSON_STRING) {
        return 0;
    }
    size_t size;
    char *text = json_read_bytes(name->text, name->text_size, &size);
    int fits = size < SHARD_NAME_SIZE;
    if (fits) {
        memcpy(shard->name, text, size + 1);
    }
    free(text);
    return fits && json_int64(json_get(json, "bytes"), &shard->bytes) &&
           provenance_read_hex(json_get(json, "hash"), &shard->hash);
}

// of the whole state.json, which is an object
static inline void provenance_read(Provenance *p, const Json *state, const char *path, const char *hint) {
    const Json *run = json_get(state, "run"), *shards = json_get(state, "shards");
    memset(p, 0, sizeof(*p));
    if (run != NULL && !provenance_read_hex(run, &p->run)) {
        die("%s: \"run\" is unusable, expected sixteen hexadecimal digits\n  ---> %s", path, hint);
    }
    if (shards == NULL) {
        return;
    }
    p->shards = NEW(ShardRecord, shards->count);
    int good = shards->type == JSON_ARRAY;
    for (const Json *json = good ? shards->child : NULL; json != NULL && good; json = json->next) {
        good = provenance_read_shard(json, &p->shards[p->num_shards++]);
    }
    if (!good) {
        die("%s: \"shards\" is unusable, expected a name, bytes and a hash of each\n  ---> %s", path, hint);
    }
}

// the run of a state.json that may be damaged or missing: then 0
static inline uint64_t peek_run(const char *path) {
    char error[128];
    size_t size;
    uint64_t run = 0;
    JsonArena arena;
    if (!path_exists(path)) {
        return 0;
    }
    char *text = check_read_file(path, &size, "");
    json_arena_init(&arena);
    provenance_read_hex(json_get(json_parse(text, size, &arena, error, sizeof(error)), "run"), &run);
    json_arena_free(&arena);
    free(text);
    return run;
}

// ----------------------------------------------------------------------------
// compared

// the first shard whose content differs, or that one of the two lacks; -1: the same data
static inline int first_other_shard(const Provenance *before, const Provenance *now) {
    int n = before->num_shards > now->num_shards ? before->num_shards : now->num_shards;
    for (int i = 0; i < n; i++) {
        if (i >= before->num_shards || i >= now->num_shards ||
            before->shards[i].bytes != now->shards[i].bytes ||
            before->shards[i].hash != now->shards[i].hash) {
            return i;
        }
    }
    return -1;
}

// "train_000001.bin was 2048 bytes, now 4096"
static inline void describe_other_shard(char *out, size_t capacity, const Provenance *before,
                                        const Provenance *now, int i) {
    const ShardRecord *was = &before->shards[i], *is = &now->shards[i];
    if (i >= now->num_shards) {
        snprintf(out, capacity, "%s is gone", was->name);
    } else if (i >= before->num_shards) {
        snprintf(out, capacity, "%s is new", is->name);
    } else if (strcmp(was->name, is->name) != 0) {
        snprintf(out, capacity, "shard %d was %s, now %s", i + 1, was->name, is->name);
    } else if (was->bytes != is->bytes) {
        snprintf(out, capacity, "%s was %lld bytes, now %lld", is->name, (long long)was->bytes,
                 (long long)is->bytes);
    } else {
        snprintf(out, capacity, "%s holds other tokens", is->name);
    }
}

// A resumed run needs the data that it began with: other shards give other windows, and none the same bits.
// chosen: 1 when the command line names the data, so that the user knows
static inline void check_same_data(const Provenance *before, const Provenance *now, int chosen) {
    char what[3 * SHARD_NAME_SIZE];
    int other = first_other_shard(before, now);
    if (before->num_shards == 0) {
        return;
    }
    if (other < 0) {
        for (int i = 0; i < now->num_shards; i++) {
            if (strcmp(before->shards[i].name, now->shards[i].name) != 0) {
                warn("the training data are the same under other names: %s was %s", now->shards[i].name,
                     before->shards[i].name);
                return;
            }
        }
        return;
    }
    describe_other_shard(what, sizeof(what), before, now, other);
    if (chosen) {
        warn("the training data are not those that this run began with (%d shards, now %d): %s",
             before->num_shards, now->num_shards, what);
    } else {
        die("the training data are not those that this run began with (%d shards, now %d): %s\n"
            "  ---> bring them back, or name what the run shall go on with by --train-data",
            before->num_shards, now->num_shards, what);
    }
}

#endif
