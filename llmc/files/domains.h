/*
Validation data: one shard per domain, `val.DOMAIN.bin`. They are opened before a run begins and stay open, so
that no missing, short or foreign file can end it later.

Shapes: none. Errors: a domain that is shorter than one window is named and left out; a file that is no shard,
or a token that the vocabulary does not have, dies.
*/
#ifndef DOMAINS_H
#define DOMAINS_H

#include "llmc/files/data_names.h"
#include "llmc/files/dataloader.h"

typedef struct {
    char *path;
    char *name; // "github" of val.github.bin, else the file's name without .bin
    DataLoader loader;
} DataDomain;

static inline char *domain_name(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = check_strdup(slash == NULL ? path : slash + 1);
    size_t size = strlen(name);
    if (size > 4 && strcmp(name + size - 4, ".bin") == 0) {
        name[size - 4] = '\0';
    }
    if (strncmp(name, "val.", 4) == 0 && name[4] != '\0') {
        memmove(name, name + 4, strlen(name + 4) + 1);
    }
    return name;
}

// the files of "GLOB,GLOB,...", one domain each, not yet opened; returns how many
static inline int domains_name(const char *spec, DataDomain **domains) {
    char *copy = check_strdup(spec), *list = copy, *item;
    int n = 0;
    *domains = NULL;
    while ((item = dataloader_next_item(&list)) != NULL) {
        glob_t found;
        dataloader_glob(item, &found);
        *domains = GROW(DataDomain, *domains, n + (int)found.gl_pathc);
        for (size_t i = 0; i < found.gl_pathc; i++, n++) {
            (*domains)[n].path = check_strdup(found.gl_pathv[i]);
            (*domains)[n].name = domain_name(found.gl_pathv[i]);
        }
        globfree(&found);
    }
    free(copy);
    return n;
}

static inline void domain_close(DataDomain *domain) {
    free(domain->path);
    free(domain->name);
    dataloader_close(&domain->loader);
}

static inline void domains_close(DataDomain *domains, int n) {
    for (int i = 0; i < n; i++) {
        domain_close(&domains[i]);
    }
    free(domains);
}

// The domains of "GLOB,GLOB,...", with the first `windows` windows of each looked through. Returns how many
static inline int domains_open(const char *spec, DataDomain **domains, int seq_len, int64_t windows,
                               int vocab_size) {
    int n = domains_name(spec, domains), kept = 0;
    for (int i = 0; i < n; i++) {
        DataDomain domain = (*domains)[i];
        dataloader_open_shards(&domain.loader, domain.path, seq_len, 0, 0);
        if (dataloader_num_sequences(&domain.loader) == 0) {
            warn(
                "%s will not be validated: %lld tokens, too few for a window of %d + 1\n  ---> use a smaller "
                "--seq-len, or more data",
                domain.path, (long long)dataloader_total_tokens(&domain.loader), seq_len);
            domain_close(&domain);
            continue;
        }
        dataloader_check_tokens(&domain.loader, windows, vocab_size);
        (*domains)[kept++] = domain;
    }
    return kept;
}

#endif
