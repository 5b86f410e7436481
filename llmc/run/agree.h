/*
What all ranks must read alike: the data, and the checkpoint that a run begins with. Machines that do not share a
disk may have copies, and a copy may be old: the ranks would train on something that nobody asked for.

Each rank lists what it reads, a file a line: its name, size, and a hash of its ends. The lists are compared by
rank 0 (ranks.h). With one rank nothing is compared.

Errors: exit 1, naming the first rank and file that differ.
*/
#ifndef AGREE_H
#define AGREE_H

#include "llmc/run/run.h"
// defines: Run; DataLoader, record_shards, fnv_add; ranks_agree

// what a rank reads, a file a line
typedef struct {
    char *text;
    size_t size;
    FILE *out;
} Listing;

static inline void listing_open(Listing *l) {
    l->out = open_memstream(&l->text, &l->size);
    if (l->out == NULL) {
        die("out of memory for the list of files");
    }
}

static inline void listing_compare(Listing *l, Ranks *ranks, const char *what) {
    fclose(l->out);
    ranks_agree(ranks, what, l->text);
    free(l->text);
}

// a line for each shard
static inline void list_shards(FILE *out, const char *use, const DataLoader *loader) {
    Provenance p = {0, NULL, 0};
    record_shards(&p, loader);
    for (int i = 0; i < p.num_shards; i++) {
        const ShardRecord *shard = &p.shards[i];
        fprintf(out, "%s %s, %lld bytes, hash %016llx\n", use, shard->name, (long long)shard->bytes,
                (unsigned long long)shard->hash);
    }
    provenance_free(&p);
}

// training shards, of which there are none where nothing is trained, and every domain's: ranks that lacked one
// would validate less than the others
static inline void agree_on_data(Run *run) {
    Listing l;
    if (run->ranks.count == 1) {
        return;
    }
    listing_open(&l);
    list_shards(l.out, "training", &run->train);
    for (int i = 0; i < run->num_domains; i++) {
        list_shards(l.out, "validation", &run->domains[i].loader);
    }
    listing_compare(&l, &run->ranks, "the data");
}

static inline void list_file(FILE *out, const char *folder, const char *name) {
    char path[PATH_SIZE], end[4096];
    struct stat status;
    check_format(path, sizeof(path), "%s/%s", folder, name);
    int regular = stat(path, &status) == 0 && S_ISREG(status.st_mode); // a FIFO would be waited for
    FILE *file = regular ? fopen(path, "rb") : NULL;
    if (file == NULL) {
        fprintf(out, "no %s\n", path);
        return;
    }
    uint64_t hash = fnv_add(FNV_START, end, fread(end, 1, sizeof(end), file));
    int64_t behind = (int64_t)status.st_size - (int64_t)sizeof(end);
    fseek(file, behind > 0 ? (long)behind : 0, SEEK_SET);
    hash = fnv_add(hash, end, fread(end, 1, sizeof(end), file));
    fclose(file);
    fprintf(out, "%s, %lld bytes, hash %016llx\n", path, (long long)status.st_size, (unsigned long long)hash);
}

// folder: "" where no checkpoint is loaded
static inline void agree_on_model(Run *run, const char *folder) {
    Listing l;
    if (run->ranks.count == 1 || folder[0] == '\0') {
        return;
    }
    listing_open(&l);
    list_file(l.out, folder, "config.json");
    list_file(l.out, folder, "model.safetensors");
    list_file(l.out, folder, "optimizer.safetensors");
    listing_compare(&l, &run->ranks, "the checkpoint");
}

#endif
