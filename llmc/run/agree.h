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
// defines: Run; DataLoader, shard_hash; ranks_agree

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

// Ranks that read other data than the others would train on something that nobody asked for, and validate
// more or fewer domains than they
static inline void agree_on_data(Run *run) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) {
        die("out of memory for the list of shards");
    }
    list_shards(out, "training", &run->train); // none where nothing is trained
    for (int i = 0; i < run->num_domains; i++) {
        list_shards(out, "validation", &run->domains[i].loader);
    }
    fclose(out);
    ranks_agree(&run->ranks, "the data", text);
    free(text);
}

// a line of a file that all ranks read: its name, size, and a hash of its ends
static inline void list_file(FILE *out, const char *folder, const char *name) {
    char path[PATH_SIZE], ends[2][4096];
    struct stat status;
    uint64_t hash = 0xcbf29ce484222325;
    check_format(path, sizeof(path), "%s/%s", folder, name);
    int regular = stat(path, &status) == 0 && S_ISREG(status.st_mode); // a FIFO would be waited for
    FILE *file = regular ? fopen(path, "rb") : NULL;
    if (file == NULL) {
        fprintf(out, "no %s\n", path);
        return;
    }
    size_t first = fread(ends[0], 1, sizeof(ends[0]), file);
    int64_t behind = (int64_t)status.st_size - (int64_t)sizeof(ends[1]);
    fseek(file, behind > 0 ? (long)behind : 0, SEEK_SET);
    size_t last = fread(ends[1], 1, sizeof(ends[1]), file);
    fclose(file);
    for (size_t i = 0; i < first + last; i++) { // FNV-1a
        hash = (hash ^ (unsigned char)(i < first ? ends[0][i] : ends[1][i - first])) * 0x100000001b3;
    }
    fprintf(out, "%s, %lld bytes, hash %016llx\n", path, (long long)status.st_size, (unsigned long long)hash);
}

// ranks that began with other weights than the others would train on a mixture. folder: "" where none is loaded
static inline void agree_on_model(Run *run, const char *folder) {
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) {
        die("out of memory for the list of a checkpoint's files");
    }
    if (folder[0] != '\0') {
        list_file(out, folder, "config.json");
        list_file(out, folder, "model.safetensors");
        list_file(out, folder, "optimizer.safetensors");
    }
    fclose(out);
    ranks_agree(&run->ranks, "the checkpoint", text);
    free(text);
}

#endif
