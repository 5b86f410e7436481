/*
manifest.json, the last file that build/tokenize writes: what was asked for, documents, tokens and bytes per
domain, and the shards with their SHA-256. A folder that holds it is finished; the same command given again,
on input that has not changed, does nothing.

Shapes: none. Errors: exit 1; the manifest of another command, or of other input, is refused.
*/
#ifndef MANIFEST_H
#define MANIFEST_H

#include "data/output.h"
#include "data/sha256.h"
#include "data/state.h"
// defines: sha256_file

typedef struct {
    char name[OUTPUT_NAME_SIZE];
    int64_t tokens;
    char sha256[65];
} ManifestShard;

static inline int64_t manifest_list_series(const Output *out, const Series *series, int64_t tokens,
                                           ManifestShard *shards) {
    for (int64_t i = 0; i < series->finished; i++) {
        series_name(series, i, shards[i].name);
        shards[i].tokens = tokens < out->shard_tokens ? tokens : out->shard_tokens;
        tokens -= shards[i].tokens;
    }
    return series->finished;
}

// shards [all]; returns how many are for training: they come first
static inline int64_t manifest_list(Output *out, ManifestShard *shards, int64_t *all) {
    int64_t n = 0;
    Series *series;
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        int64_t tokens = out->split_domains ? out->domains[i].train_tokens : output_train_tokens(out);
        n += manifest_list_series(out, series, tokens, shards + n);
    }
    int64_t train = n;
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val_tokens > 0) {
            memcpy(shards[n].name, out->domains[i].val.name, sizeof(shards[n].name));
            shards[n++].tokens = out->domains[i].val_tokens;
        }
    }
    *all = n;
    return train;
}

// job: with the sizes of the inputs
static inline void manifest_write_text(FILE *f, const Output *out, const char *job, const Digest *input,
                                       const ManifestShard *shards, int64_t n_shards) {
    char digest[DIGEST_TEXT_SIZE];
    digest_print(input, digest);
    fprintf(f, "{\"job\": ");
    json_write_bytes(f, job, strlen(job));
    fprintf(
        f,
        ",\n \"documents\": %lld, \"tokens\": %lld, \"bytes\": %lld, \"unreadable\": %lld,\n \"domains\": [",
        (long long)out->documents, (long long)out->tokens, (long long)out->bytes, (long long)out->unreadable);
    for (int i = 0; i < out->domain_count; i++) {
        const Domain *d = &out->domains[i];
        fprintf(f,
                "%s\n  {\"name\": \"%s\", \"documents\": %lld, \"bytes\": %lld, \"train_tokens\": %lld, "
                "\"val_tokens\": %lld}",
                i > 0 ? "," : "", d->name, (long long)d->documents, (long long)d->bytes,
                (long long)d->train_tokens, (long long)d->val_tokens);
    }
    fprintf(f, "],\n \"shards\": [");
    for (int64_t i = 0; i < n_shards; i++) {
        fprintf(f, "%s\n  {\"file\": \"%s\", \"tokens\": %lld, \"sha256\": \"%s\"}", i > 0 ? "," : "",
                shards[i].name, (long long)shards[i].tokens, shards[i].sha256);
    }
    fprintf(f, "],\n \"input_digest\": \"%s\"}\n", digest);
}

// gives the files their final names and writes the manifest; each step may be done again after a crash
static inline void manifest_finish(Output *out, const char *job, const Digest *input) {
    char path[OUTPUT_PATH_SIZE];
    int64_t n = out->domain_count;
    Series *series;
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        series_rename(out, series);
        n += series->finished;
    }
    ManifestShard *shards = NEW(ManifestShard, n);
    for (int64_t i = manifest_list(out, shards, &n); i < n; i++) {
        output_rename(out, shards[i].name);
    }
    if (out->unreadable > 0) {
        output_rename(out, "unreadable.txt");
    } else {
        output_path(out, path, "unreadable.txt", ".partial");
        unlink(path);
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        char shard_path[OUTPUT_PATH_SIZE];
        output_path(out, shard_path, shards[i].name, "");
        sha256_file(shard_path, shards[i].sha256);
    }
    NewFile f;
    output_path(out, path, "manifest.json", "");
    newfile_open(&f, path);
    manifest_write_text(f.file, out, job, input, shards, n);
    newfile_close(&f);
    output_path(out, path, STATE_FILE, "");
    unlink(path);
    free(shards);
}

// dies unless the manifest is of this job and, where a file has been touched since, of the same bytes
static inline void manifest_check(const Json *manifest, const char *path, const char *job, Corpus *corpus) {
    struct stat status;
    Digest digest;
    size_t size;
    const char *spelled = state_text(manifest, "job", path);
    char *theirs = json_read_bytes(spelled, strlen(spelled), &size);
    int same = strcmp(theirs, job) == 0;
    free(theirs);
    int64_t written = stat(path, &status) == 0 ? (int64_t)status.st_mtime : 0;
    int touched = 0;
    for (int i = 0; i < corpus->inputs->count; i++) {
        const Input *input = &corpus->inputs->files[i];
        touched |= input->changed >= written || input_is_stdin(input);
    }
    if (same && touched && json_get(manifest, "input_digest") != NULL) {
        corpus_read_files(corpus, corpus->inputs->count);
        same = digest_parse(&digest, state_text(manifest, "input_digest", path)) &&
               digest_equal(&digest, &corpus->position.digest);
    }
    if (!same) {
        die("%s: the folder holds the shards of another command, or of other input\n  ---> rm -r its folder, "
            "or "
            "choose another --out",
            path);
    }
}

// 1 if the folder holds this job's finished output
static inline int manifest_is_there(const Output *out, const char *job, Corpus *corpus) {
    char path[OUTPUT_PATH_SIZE];
    JsonArena arena;
    output_path(out, path, "manifest.json", "");
    if (access(path, F_OK) != 0) {
        return 0;
    }
    json_arena_init(&arena);
    manifest_check(json_parse_file(path, &arena, "remove it, and start again"), path, job, corpus);
    json_arena_free(&arena);
    output_path(out, path, STATE_FILE, "");
    unlink(path); // left by a run that was killed as it finished
    return 1;
}

#endif
