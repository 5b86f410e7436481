/*
What all ranks must read alike: the data, the checkpoint that a run begins with, the requests that it answers.
Machines that do not share a disk may have copies, and a copy may be old: the ranks would train on something
that nobody asked for.

Each rank lists what it reads, a file a line: its name, size, and a hash of its ends. The lists are compared
by rank 0 (ranks.h). With one rank nothing is compared.

Errors: exit 1, naming the first rank and file that differ.
*/
#ifndef AGREE_H
#define AGREE_H

#include "llmc/run/run.h"
// defines: Run; DataLoader, record_shards, fnv_add; ranks_agree; Composed, compose, composed

// list: what a rank reads, a file a line
static inline void agree_on_list(Composed *list, Ranks *ranks, const char *what) {
    char *text = composed(list);
    ranks_agree(ranks, what, text);
    free(text);
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
    Composed list;
    if (run->ranks.count == 1) {
        return;
    }
    compose(&list);
    list_shards(list.out, "training", &run->train);
    for (int i = 0; i < run->num_domains; i++) {
        list_shards(list.out, "validation", &run->domains[i].loader);
    }
    agree_on_list(&list, &run->ranks, "the data");
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
    Composed list;
    if (run->ranks.count == 1 || folder[0] == '\0') {
        return;
    }
    compose(&list);
    list_file(list.out, folder, "config.json");
    list_file(list.out, folder, "model.safetensors");
    list_file(list.out, folder, "optimizer.safetensors");
    agree_on_list(&list, &run->ranks, "the checkpoint");
}

// of --score and --generate
static inline void agree_on_requests(Run *run, const char *path) {
    Composed list;
    char folder[PATH_SIZE], name[PATH_SIZE];
    if (run->ranks.count == 1) {
        return;
    }
    split_path(folder, name, path);
    compose(&list);
    list_file(list.out, folder, name);
    agree_on_list(&list, &run->ranks, "the file of requests");
}

#endif
