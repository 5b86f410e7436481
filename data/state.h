/*
tokenize.state.json: how far the partial files go (input position, tokens and documents per domain), so that a
run that was killed goes on from there.

    {"job", "complete", "file", "offset", "line",     the position in the input (corpus.h)
     "digest",                                        of all bytes before it, and
     "identity",                                      of the files up to it, as they were found
     "unreadable", "unreadable_bytes",
     "domains": [{"name", "documents", "bytes", "train", "val", "first", "chosen"}]}

Shapes: none. Errors: exit 1; the state of another job, or one that contradicts itself, is refused, with one
exception: where no document was found, nothing is lost, and another job may begin.
*/
#ifndef STATE_H
#define STATE_H

#include "data/corpus.h"
#include "data/output.h"
#include "llmc/files/json.h"
#include "llmc/files/json_bytes.h"
#include "llmc/files/newfile.h"

#define STATE_FILE "tokenize.state.json"
#define STATE_RESTART "remove its folder, and start again"

static inline void tokenize_state_write(const Output *out, const CorpusPosition *position,
                                        uint64_t identity) {
    char path[OUTPUT_PATH_SIZE], digest[DIGEST_TEXT_SIZE];
    NewFile f;
    output_path(out, path, STATE_FILE, "");
    newfile_open(&f, path);
    digest_print(&position->digest, digest);
    fprintf(f.file, "{\"job\": ");
    json_write_bytes(f.file, out->job, strlen(out->job));
    fprintf(f.file, ",\n \"complete\": %d, \"file\": %d, \"offset\": %lld, \"line\": %lld,\n", out->complete,
            position->file, (long long)position->offset, (long long)position->line);
    fprintf(f.file, " \"digest\": \"%s\", \"identity\": \"%016llx\",\n", digest,
            (unsigned long long)identity);
    fprintf(f.file, " \"unreadable\": %lld, \"unreadable_bytes\": %lld, \"domains\": [",
            (long long)out->unreadable, (long long)out->unreadable_bytes);
    for (int i = 0; i < out->domain_count; i++) {
        const Domain *d = &out->domains[i];
        fprintf(f.file, "%s\n  {\"name\": \"%s\", \"documents\": %lld, \"bytes\": %lld, ", i > 0 ? "," : "",
                d->name, (long long)d->documents, (long long)d->bytes);
        fprintf(f.file, "\"train\": %lld, \"val\": %lld, \"first\": %lld, \"chosen\": %lld}",
                (long long)d->train_tokens, (long long)d->val_tokens, (long long)d->first_hash,
                (long long)d->chosen_hash);
    }
    fprintf(f.file, "]}\n");
    newfile_close(&f);
}

// first the data, then the state that vouches for it, then the names
static inline void state_checkpoint(Output *out, const CorpusPosition *position, uint64_t identity) {
    Series *series;
    output_sync(out);
    tokenize_state_write(out, position, identity);
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        series_rename(out, series);
    }
    out->unnamed = 0;
}

static inline int64_t state_integer(const Json *object, const char *key, int64_t most, const char *path) {
    int64_t value;
    if (!json_int64(json_get(object, key), &value) || value < 0 || value > most) {
        die("%s: \"%s\" is no number from 0 to %lld\n  ---> %s", path, key, (long long)most, STATE_RESTART);
    }
    return value;
}

static inline const char *state_text(const Json *object, const char *key, const char *path) {
    const Json *value = json_get(object, key);
    if (value == NULL || value->type != JSON_STRING || strlen(value->text) != value->text_size) {
        die("%s: no text \"%s\"\n  ---> %s", path, key, STATE_RESTART);
    }
    return value->text;
}

// a name becomes a part of file names: only what make_domain_name() makes is one
static inline void state_read_domain(Output *out, const Json *row, const char *path) {
    char name[DOMAIN_SIZE];
    const char *text = state_text(row, "name", path);
    int known = out->domain_count;
    make_domain_name(name, text, strlen(text));
    Domain *d = strcmp(name, text) == 0 && known < MAX_DOMAINS ? output_domain(out, name) : NULL;
    if (d == NULL || out->domain_count == known) {
        die("%s: '%s' is no domain, stands there twice, or is one too many\n  ---> %s", path, name,
            STATE_RESTART);
    }
    d->documents = state_integer(row, "documents", OUTPUT_MOST, path);
    d->bytes = state_integer(row, "bytes", OUTPUT_MOST, path);
    d->train_tokens = state_integer(row, "train", OUTPUT_MOST, path);
    d->val_tokens = state_integer(row, "val", INT32_MAX, path);
    d->first_hash = state_integer(row, "first", INT64_MAX, path);
    d->chosen_hash = state_integer(row, "chosen", INT64_MAX, path);
    d->val.tokens = d->val_tokens;
    series_resume(out, &d->train, d->train_tokens);
    out->documents += d->documents;
    out->bytes += d->bytes;
    out->tokens += d->train_tokens + d->val_tokens;
}

// 1 if the state is of this job; 0 if another job left it that found no document: nothing is lost with it
static inline int state_is_ours(const Output *out, const Json *state, const char *path) {
    const Json *domains = json_get(state, "domains");
    size_t size;
    const char *spelled = state_text(state, "job", path);
    char *job = json_read_bytes(spelled, strlen(spelled), &size);
    int ours = strcmp(job, out->job) == 0;
    if (!ours && (domains == NULL || domains->count > 0)) {
        die("%s was left by another command:\n  %s\nthis one is\n  %s\n  ---> give the same options and "
            "inputs "
            "to go on, or another --out",
            path, job, out->job);
    }
    free(job);
    return ours;
}

// 1 if there was a state of this job to go on from; count: inputs
static inline int tokenize_state_read(Output *out, int count, CorpusPosition *position, uint64_t *identity) {
    char path[OUTPUT_PATH_SIZE];
    JsonArena arena;
    output_path(out, path, STATE_FILE, "");
    if (access(path, F_OK) != 0) {
        return 0;
    }
    json_arena_init(&arena);
    const Json *state = json_parse_file(path, &arena, STATE_RESTART);
    int ours = state_is_ours(out, state, path);
    if (ours) {
        const Json *domains = json_get(state, "domains");
        out->complete = state_integer(state, "complete", 1, path) != 0;
        position->file = (int)state_integer(state, "file", count, path);
        position->offset = state_integer(state, "offset", OUTPUT_MOST, path);
        position->line = state_integer(state, "line", OUTPUT_MOST, path);
        *identity = strtoull(state_text(state, "identity", path), NULL, 16);
        if (!digest_parse(&position->digest, state_text(state, "digest", path))) {
            die("%s: \"digest\" is none\n  ---> %s", path, STATE_RESTART);
        }
        out->unreadable = state_integer(state, "unreadable", OUTPUT_MOST, path);
        out->unreadable_bytes = state_integer(state, "unreadable_bytes", OUTPUT_MOST, path);
        for (const Json *row = domains != NULL ? domains->child : NULL; row != NULL; row = row->next) {
            state_read_domain(out, row, path);
        }
        series_resume(out, &out->train, output_train_tokens(out));
    }
    json_arena_free(&arena);
    return ours;
}

#endif
