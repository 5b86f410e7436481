/*
Text to token shards: JSON Lines or plain text in, llm.c shards out, on all cores, in their order.

    build/tokenize --tokenizer data/gpt2 --out data/pile pile/train/00.jsonl.zst ...

One thread reads batches of records while the others parse and encode the batch before; then that batch is
written. Each document begins with <|endoftext|>. A hash of its text sends it to the training shards
train_000000.bin, ..., or to its domain's validation shard val.DOMAIN.bin, so that copies of a text stay on
one side.

A file is NAME.partial until it is finished. Every few seconds what was written is made durable and then
tokenize.state.json says how far it goes (file, offset, line, sizes). Started again after a crash, the program
cuts the partial files to these sizes and goes on there: the result is the same as without the crash. At the
end manifest.json counts documents, tokens and bytes a domain and names the shards with their SHA-256.

Shards: 256 int32 {20240520, 1, number of tokens, 0...}, then uint16 tokens. Errors: exit 1, 2 for usage; a
record that is no document is counted and named in unreadable.txt.
*/
#include "llmc/files/newfile.h"
#include "llmc/files/shard.h"
#include "llmc/files/tokenizer.h"
#include "llmc/machine.h"
#include "data/corpus.h"
#include "data/sha256.h"
#include <getopt.h>
#include <sys/file.h>
#include <time.h>
// defines: getopt_long, flock, clock_gettime

enum { BATCH_BYTES_A_THREAD = 4 << 20, MAX_DOMAINS = 256, LISTED_UNREADABLE = 10 };

typedef struct {
    const char *tokenizer;
    const char *out;
    int64_t shard_tokens;
    double val_fraction;
    int64_t text_bytes;
    int64_t save_seconds;
    int64_t threads;
} Settings;

typedef struct {
    char name[64]; // in the output folder
    FILE *file;    // NULL when not open
    int64_t tokens;
} Shard;

typedef struct {
    char name[CORPUS_DOMAIN_SIZE];
    int64_t documents, bytes, train_tokens, val_tokens;
    Shard val;
} Domain;

// everything written, and how far: what tokenize.state.json keeps
typedef struct {
    const char *dir;
    int64_t shard_tokens;
    double val_fraction;
    char *job;        // what the output depends on; a restart must agree
    Shard train;      // the one being filled
    int64_t finished; // training shards that are full
    int64_t renamed;  // of them, those that have their final names
    Domain domains[MAX_DOMAINS];
    int domain_count;
    int64_t documents, tokens, bytes; // bytes of text
    int64_t unreadable, unreadable_bytes;
    FILE *unreadable_file;
    int complete; // all input is in the partial files
} Output;

// what became of a record
typedef struct {
    char *error; // why it is no document, or NULL
    char domain[CORPUS_DOMAIN_SIZE];
    size_t text_size;
    uint16_t *tokens; // the first is <|endoftext|>
    size_t n_tokens;
    int validation;
} Encoded;

typedef struct {
    CorpusBatch input;
    Encoded *encoded; // [input.n]
    size_t capacity;
} Batch;

typedef struct {
    Tokenizer *tokenizer;
    JsonArena arena;
    int *ids;
    size_t capacity;
} Worker;

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ----------------------------------------------------------------------------
// shards

static void output_path(const Output *out, char *path, const char *name, const char *suffix) {
    check_format(path, 4096, "%s/%s%s", out->dir, name, suffix);
}

__attribute__((noreturn)) static void write_failed(const Output *out, const char *name) {
    die("cannot write %s/%s.partial: %s\n  ---> free some disk space and give the same command: it goes on "
        "where it was",
        out->dir, name, strerror(errno));
}

// opens NAME.partial cut to `size` bytes, ready to append
static FILE *open_partial(const Output *out, const char *name, int64_t size) {
    char path[4096];
    output_path(out, path, name, ".partial");
    FILE *file =
        check_fopen(path, size > 0 ? "r+b" : "w+b", "give the command with another --out to start again");
    if (fseek(file, 0, SEEK_END) != 0 || ftell(file) < size) {
        die("%s is shorter than tokenize.state.json says\n  ---> rm -r %s, and start again", path, out->dir);
    }
    if ((size > 0 && ftruncate(fileno(file), size) != 0) || fseek(file, 0, SEEK_END) != 0) {
        die("cannot cut %s to its last known good size: %s\n  ---> check its permissions", path,
            strerror(errno));
    }
    return file;
}

static void open_shard(const Output *out, Shard *shard) {
    const int32_t header[SHARD_HEADER_BYTES / 4] = {0};
    shard->file =
        open_partial(out, shard->name, shard->tokens > 0 ? SHARD_HEADER_BYTES + 2 * shard->tokens : 0);
    if (shard->tokens == 0 && fwrite(header, sizeof(header), 1, shard->file) != 1) {
        write_failed(out, shard->name);
    }
}

static void sync_file(const Output *out, FILE *file, const char *name) {
    if (file != NULL && (fflush(file) != 0 || fsync(fileno(file)) != 0)) {
        write_failed(out, name);
    }
}

// the header, which knows the number of tokens only now
static void finish_shard(const Output *out, Shard *shard) {
    int32_t header[SHARD_HEADER_BYTES / 4] = {SHARD_MAGIC, SHARD_VERSION, (int32_t)shard->tokens};
    if (fseek(shard->file, 0, SEEK_SET) != 0 || fwrite(header, sizeof(header), 1, shard->file) != 1) {
        write_failed(out, shard->name);
    }
    sync_file(out, shard->file, shard->name);
    fclose(shard->file);
    shard->file = NULL;
}

static void append_shard(const Output *out, Shard *shard, const uint16_t *tokens, size_t n) {
    if (shard->file == NULL) {
        open_shard(out, shard);
    }
    if (fwrite(tokens, sizeof(uint16_t), n, shard->file) != n) {
        write_failed(out, shard->name);
    }
    shard->tokens += (int64_t)n;
}

static void name_train_shard(Shard *shard, int64_t index) {
    check_format(shard->name, sizeof(shard->name), "train_%06lld.bin", (long long)index);
}

static void finish_train_shard(Output *out) {
    finish_shard(out, &out->train);
    out->finished++;
    out->train.tokens = 0;
    name_train_shard(&out->train, out->finished);
}

static void append_train(Output *out, const uint16_t *tokens, size_t n) {
    while (n > 0) {
        int64_t room = out->shard_tokens - out->train.tokens;
        size_t use = (int64_t)n < room ? n : (size_t)room;
        append_shard(out, &out->train, tokens, use);
        tokens += use;
        n -= use;
        if (out->train.tokens == out->shard_tokens) {
            finish_train_shard(out);
        }
    }
}

// renames what tokenize.state.json calls finished; done again after a crash, so a missing file is no error
static void rename_partial(const Output *out, const char *name) {
    char partial[4096], path[4096];
    output_path(out, partial, name, ".partial");
    output_path(out, path, name, "");
    if (rename(partial, path) != 0 && (errno != ENOENT || access(path, F_OK) != 0)) {
        die("cannot rename %s: %s\n  ---> check the folder's permissions", partial, strerror(errno));
    }
}

static void rename_train_shards(Output *out) {
    Shard shard;
    for (; out->renamed < out->finished; out->renamed++) {
        name_train_shard(&shard, out->renamed);
        rename_partial(out, shard.name);
    }
}

// ----------------------------------------------------------------------------
// domains

static Domain *find_domain(Output *out, const char *name) {
    for (int i = 0; i < out->domain_count; i++) {
        if (strcmp(out->domains[i].name, name) == 0) {
            return &out->domains[i];
        }
    }
    if (out->domain_count == MAX_DOMAINS) {
        die("more than %d domains, the last one '%s'\n  ---> is meta.pile_set_name a domain in these files?",
            MAX_DOMAINS, name);
    }
    Domain *domain = &out->domains[out->domain_count++];
    check_format(domain->name, sizeof(domain->name), "%s", name);
    check_format(domain->val.name, sizeof(domain->val.name), "val.%s.bin", name);
    return domain;
}

// ----------------------------------------------------------------------------
// the state: how far the partial files go

static void write_state(const Output *out, CorpusPosition position) {
    char path[4096];
    NewFile f;
    output_path(out, path, "tokenize.state.json", "");
    newfile_open(&f, path);
    fprintf(f.file, "{\"job\": ");
    json_write_string(f.file, out->job, strlen(out->job));
    fprintf(f.file, ",\n \"complete\": %d, \"file\": %d, \"offset\": %lld, \"line\": %lld,\n", out->complete,
            position.file, (long long)position.offset, (long long)position.line);
    fprintf(f.file,
            " \"finished\": %lld, \"shard\": %lld, \"documents\": %lld, \"tokens\": %lld, \"bytes\": %lld,\n",
            (long long)out->finished, (long long)out->train.tokens, (long long)out->documents,
            (long long)out->tokens, (long long)out->bytes);
    fprintf(f.file, " \"unreadable\": %lld, \"unreadable_bytes\": %lld, \"domains\": [",
            (long long)out->unreadable, (long long)out->unreadable_bytes);
    for (int i = 0; i < out->domain_count; i++) {
        const Domain *d = &out->domains[i];
        fprintf(
            f.file,
            "%s\n  {\"name\": \"%s\", \"documents\": %lld, \"bytes\": %lld, \"train\": %lld, \"val\": %lld}",
            i > 0 ? "," : "", d->name, (long long)d->documents, (long long)d->bytes,
            (long long)d->train_tokens, (long long)d->val_tokens);
    }
    fprintf(f.file, "]}\n");
    newfile_close(&f);
}

// first the data, then the state that vouches for it, then the names
static void checkpoint(Output *out, CorpusPosition position) {
    char folder[4096];
    sync_file(out, out->train.file, out->train.name);
    for (int i = 0; i < out->domain_count; i++) {
        sync_file(out, out->domains[i].val.file, out->domains[i].val.name);
    }
    sync_file(out, out->unreadable_file, "unreadable.txt");
    output_path(out, folder, "", "");
    newfile_sync_folder(folder);
    write_state(out, position);
    rename_train_shards(out);
}

static int64_t state_integer(const Json *object, const char *key, const char *path) {
    int64_t value;
    if (!json_int64(json_get(object, key), &value) || value < 0) {
        die("%s: no number \"%s\"\n  ---> remove its folder, and start again", path, key);
    }
    return value;
}

// 1 if there was a state of this job to go on from
static int read_state(Output *out, CorpusPosition *position) {
    char path[4096];
    JsonArena arena;
    output_path(out, path, "tokenize.state.json", "");
    if (access(path, F_OK) != 0) {
        return 0;
    }
    json_arena_init(&arena);
    const Json *state = json_parse_file(path, &arena, "remove its folder, and start again");
    const Json *job = json_get(state, "job");
    if (job == NULL || job->type != JSON_STRING || strcmp(job->text, out->job) != 0) {
        die("%s was left by another command:\n  %s\nthis one is\n  %s\n  ---> give the same options and "
            "inputs to go on, or "
            "another --out",
            path, job != NULL && job->type == JSON_STRING ? job->text : "?", out->job);
    }
    out->complete = state_integer(state, "complete", path) != 0;
    position->file = (int)state_integer(state, "file", path);
    position->offset = state_integer(state, "offset", path);
    position->line = state_integer(state, "line", path);
    out->finished = state_integer(state, "finished", path);
    out->train.tokens = state_integer(state, "shard", path);
    out->documents = state_integer(state, "documents", path);
    out->tokens = state_integer(state, "tokens", path);
    out->bytes = state_integer(state, "bytes", path);
    out->unreadable = state_integer(state, "unreadable", path);
    out->unreadable_bytes = state_integer(state, "unreadable_bytes", path);
    const Json *domains = json_get(state, "domains");
    for (const Json *row = domains != NULL ? domains->child : NULL; row != NULL; row = row->next) {
        const Json *name = json_get(row, "name");
        if (name == NULL || name->type != JSON_STRING) {
            die("%s: a domain without name\n  ---> remove its folder, and start again", path);
        }
        Domain *d = find_domain(out, name->text);
        d->documents = state_integer(row, "documents", path);
        d->bytes = state_integer(row, "bytes", path);
        d->train_tokens = state_integer(row, "train", path);
        d->val_tokens = state_integer(row, "val", path);
        d->val.tokens = d->val_tokens;
    }
    json_arena_free(&arena);
    return 1;
}

// the partial files as the state (or the start) has them
static void open_partials(Output *out) {
    name_train_shard(&out->train, out->finished);
    if (out->train.tokens > 0) {
        open_shard(out, &out->train);
    }
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val.tokens > 0) {
            open_shard(out, &out->domains[i].val);
        }
    }
    out->unreadable_file = open_partial(out, "unreadable.txt", out->unreadable_bytes);
}

// ----------------------------------------------------------------------------
// batches

static void encode_record(const Corpus *corpus, const CorpusRecord *record, Encoded *e, Worker *worker,
                          double val_fraction) {
    char error[256];
    CorpusDocument document;
    memset(e, 0, sizeof(*e));
    if (!corpus_parse(corpus, record, &worker->arena, &document, error, sizeof(error))) {
        e->error = strdup(error);
        return;
    }
    tokenizer_reserve(&worker->ids, 0, &worker->capacity, 1);
    worker->ids[0] = worker->tokenizer->eot;
    e->n_tokens = 1;
    tokenizer_encode(worker->tokenizer, document.text, document.size, &worker->ids, &e->n_tokens,
                     &worker->capacity);
    e->tokens = GROW(uint16_t, NULL, e->n_tokens);
    for (size_t i = 0; i < e->n_tokens; i++) {
        e->tokens[i] = (uint16_t)worker->ids[i];
    }
    double uniform = (double)(corpus_hash(document.text, document.size) >> 11) * 0x1p-53;
    e->validation = uniform < val_fraction;
    e->text_size = document.size;
    memcpy(e->domain, document.domain, sizeof(e->domain));
}

// one thread reads the next batch while the others encode this one
static int encode_and_read(Corpus *corpus, Batch *batch, Batch *next, size_t bytes, Worker *workers,
                           double val_fraction) {
    int more = 0;
    if (batch->input.n > batch->capacity) {
        batch->capacity = batch->input.n;
        batch->encoded = GROW(Encoded, batch->encoded, batch->capacity);
    }
#pragma omp parallel
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
#pragma omp single nowait
        more = corpus_read_batch(corpus, &next->input, bytes);
#pragma omp for schedule(dynamic, 4)
        for (size_t i = 0; i < batch->input.n; i++) {
            encode_record(corpus, &batch->input.records[i], &batch->encoded[i], &workers[thread],
                          val_fraction);
        }
    }
    return more;
}

static void write_unreadable(Output *out, const char *path, int64_t line, Encoded *e) {
    int n = fprintf(out->unreadable_file, "%s:%lld: %s\n", path, (long long)line, e->error);
    if (n < 0) {
        write_failed(out, "unreadable.txt");
    }
    if (out->unreadable < LISTED_UNREADABLE) {
        warn("%s, line %lld is no document: %s", path, (long long)line, e->error);
    }
    out->unreadable++;
    out->unreadable_bytes += n;
    free(e->error);
}

static void write_document(Output *out, Encoded *e) {
    Domain *domain = find_domain(out, e->domain);
    domain->documents++;
    domain->bytes += (int64_t)e->text_size;
    out->documents++;
    out->bytes += (int64_t)e->text_size;
    out->tokens += (int64_t)e->n_tokens;
    if (e->validation) {
        domain->val_tokens += (int64_t)e->n_tokens;
        append_shard(out, &domain->val, e->tokens, e->n_tokens);
    } else {
        domain->train_tokens += (int64_t)e->n_tokens;
        append_train(out, e->tokens, e->n_tokens);
    }
    free(e->tokens);
}

static void write_batch(Output *out, const Corpus *corpus, Batch *batch) {
    for (size_t i = 0; i < batch->input.n; i++) {
        const CorpusRecord *record = &batch->input.records[i];
        if (batch->encoded[i].error != NULL) {
            write_unreadable(out, corpus->paths[record->file], record->line, &batch->encoded[i]);
        } else {
            write_document(out, &batch->encoded[i]);
        }
    }
}

// ----------------------------------------------------------------------------
// the run

typedef struct {
    double start;          // when this run began
    double start_progress; // what an earlier run had done
    int64_t start_bytes;
    double shown; // when the line was last shown
} Progress;

static void show_progress(Progress *p, const Output *out, double progress, int last) {
    double now = seconds_now();
    int terminal = isatty(2);
    if (!last && now - p->shown < (terminal ? 0.5 : 10.0)) {
        return;
    }
    p->shown = now;
    double seconds = now - p->start + 1e-9;
    double rate = (double)(out->bytes - p->start_bytes) / seconds / 1e6;
    char ahead[64] = "";
    if (progress > p->start_progress && !last) {
        double eta = seconds * (1.0 - progress) / (progress - p->start_progress);
        snprintf(ahead, sizeof(ahead), "  %.1f %%  ETA %d:%02d:%02d", 100.0 * progress, (int)(eta / 3600.0),
                 (int)(eta / 60.0) % 60, (int)eta % 60);
    }
    fprintf(stderr, "%s%.1f MB  %lld documents  %lld tokens  %.1f MB/s%s   %s", terminal ? "\r" : "",
            (double)out->bytes / 1e6, (long long)out->documents, (long long)out->tokens, rate, ahead,
            terminal && !last ? "" : "\n");
}

static Worker *new_workers(Tokenizer *tokenizer, int threads) {
    Worker *workers = NEW(Worker, threads);
    for (int i = 0; i < threads; i++) {
        workers[i].tokenizer = tokenizer_share(tokenizer);
        json_arena_init(&workers[i].arena);
    }
    return workers;
}

static void free_workers(Worker *workers, int threads) {
    for (int i = 0; i < threads; i++) {
        tokenizer_free(workers[i].tokenizer);
        json_arena_free(&workers[i].arena);
        free(workers[i].ids);
    }
    free(workers);
}

// all input into the partial files, which are then complete
static void tokenize_all(Output *out, Corpus *corpus, Tokenizer *tokenizer, const Settings *s) {
    int threads = corpus_threads((int)s->threads);
    size_t bytes = (size_t)threads * BATCH_BYTES_A_THREAD;
    Worker *workers = new_workers(tokenizer, threads);
    Batch batches[2];
    memset(batches, 0, sizeof(batches));
    Progress progress = {seconds_now(), corpus_progress(corpus), out->bytes, seconds_now()};
    double saved = progress.start;
    int current = 0;
    int more = corpus_read_batch(corpus, &batches[0].input, bytes);
    while (more) {
        Batch *batch = &batches[current];
        current = !current;
        more = encode_and_read(corpus, batch, &batches[current], bytes, workers, s->val_fraction);
        write_batch(out, corpus, batch);
        if (out->finished > out->renamed || seconds_now() - saved >= (double)s->save_seconds) {
            checkpoint(out, batch->input.end);
            saved = seconds_now();
        }
        show_progress(&progress, out, batch->input.progress, 0);
    }
    show_progress(&progress, out, 1.0, 1);
    if (out->train.tokens > 0) {
        finish_train_shard(out);
    }
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val.file != NULL) {
            finish_shard(out, &out->domains[i].val);
        }
    }
    out->complete = 1;
    checkpoint(out, corpus->position);
    fclose(out->unreadable_file);
    free_workers(workers, threads);
    for (int i = 0; i < 2; i++) {
        corpus_free_batch(&batches[i].input);
        free(batches[i].encoded);
    }
}

// ----------------------------------------------------------------------------
// the manifest

typedef struct {
    char name[64];
    int64_t tokens;
    char sha256[65];
} ManifestShard;

static int64_t list_shards(const Output *out, ManifestShard *shards) {
    int64_t n = 0;
    int64_t train = 0;
    for (int i = 0; i < out->domain_count; i++) {
        train += out->domains[i].train_tokens;
    }
    for (; n < out->finished; n++) {
        Shard shard;
        name_train_shard(&shard, n);
        memcpy(shards[n].name, shard.name, sizeof(shard.name));
        shards[n].tokens = train < out->shard_tokens ? train : out->shard_tokens;
        train -= shards[n].tokens;
    }
    for (int i = 0; i < out->domain_count; i++) {
        if (out->domains[i].val_tokens > 0) {
            memcpy(shards[n].name, out->domains[i].val.name, sizeof(shards[n].name));
            shards[n++].tokens = out->domains[i].val_tokens;
        }
    }
    return n;
}

static void write_manifest_text(FILE *f, const Output *out, const ManifestShard *shards, int64_t n_shards) {
    fprintf(f, "{\"job\": ");
    json_write_string(f, out->job, strlen(out->job));
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
    fprintf(f, "]}\n");
}

// gives the files their final names and writes the manifest; each step may be done again after a crash
static void finish(Output *out) {
    char path[4096];
    rename_train_shards(out);
    ManifestShard *shards = NEW(ManifestShard, out->finished + out->domain_count);
    int64_t n = list_shards(out, shards);
    for (int64_t i = out->finished; i < n; i++) {
        rename_partial(out, shards[i].name);
    }
    if (out->unreadable > 0) {
        rename_partial(out, "unreadable.txt");
    } else {
        output_path(out, path, "unreadable.txt", ".partial");
        unlink(path);
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        char shard_path[4096];
        output_path(out, shard_path, shards[i].name, "");
        sha256_file(shard_path, shards[i].sha256);
    }
    NewFile f;
    output_path(out, path, "manifest.json", "");
    newfile_open(&f, path);
    write_manifest_text(f.file, out, shards, n);
    newfile_close(&f);
    output_path(out, path, "tokenize.state.json", "");
    unlink(path);
    free(shards);
}

static void report(const Output *out) {
    int64_t val = 0;
    for (int i = 0; i < out->domain_count; i++) {
        val += out->domains[i].val_tokens;
    }
    printf("%s: %lld documents, %lld training tokens in %lld shards, %lld validation tokens in %d domains\n",
           out->dir, (long long)out->documents, (long long)(out->tokens - val), (long long)out->finished,
           (long long)val, out->domain_count);
    if (out->unreadable > 0) {
        warn("%lld records are no documents: %s/unreadable.txt names them", (long long)out->unreadable,
             out->dir);
    }
    if (out->documents == 0) {
        warn("there was no document in the input");
    } else if (val == 0) {
        warn("no document went to validation: raise --val-fraction");
    }
}

// ----------------------------------------------------------------------------
// the command line

static void print_help(void) {
    printf(
        "Text to token shards for ./train_remoe.\n\n"
        "  build/tokenize [options] FILE...      .jsonl, .txt, either with .zst behind, or - (JSON Lines)\n\n"
        "  --tokenizer DIR      folder with vocab.json and merges.txt (required)\n"
        "  --out DIR            folder for the shards (required); an unfinished run there goes on\n"
        "  --shard-tokens N     tokens a training shard (100000000)\n"
        "  --val-fraction X     part of the documents that goes to validation (0.01)\n"
        "  --text-bytes N       cut .txt at the first blank line behind so many bytes (16384; 0: one "
        "document)\n"
        "  --save-seconds N     make the work so far durable this often (10)\n"
        "  --threads N          threads (0: one a core)\n"
        "  --help\n");
}

static double parse_fraction(const char *name, const char *text) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= 0.0 && value <= 1.0)) {
        die_usage("--%s expects a number from 0 to 1, not '%s'", name, text);
    }
    return value;
}

static void parse_settings(Settings *s, int argc, char **argv) {
    static const struct option options[] = {
        {"tokenizer", 1, NULL, 't'},    {"out", 1, NULL, 'o'},        {"shard-tokens", 1, NULL, 's'},
        {"val-fraction", 1, NULL, 'v'}, {"text-bytes", 1, NULL, 'b'}, {"save-seconds", 1, NULL, 'c'},
        {"threads", 1, NULL, 'p'},      {"help", 0, NULL, 'h'},       {NULL, 0, NULL, 0},
    };
    int index = 0;
    for (int c; (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        const char *name = c != '?' ? options[index].name : "";
        switch (c) {
        case 't': s->tokenizer = optarg; break;
        case 'o': s->out = optarg; break;
        case 's': s->shard_tokens = corpus_integer(name, optarg, 1, INT32_MAX); break;
        case 'v': s->val_fraction = parse_fraction(name, optarg); break;
        case 'b': s->text_bytes = corpus_integer(name, optarg, 0, 1 << 30); break;
        case 'c': s->save_seconds = corpus_integer(name, optarg, 0, 1000000000); break;
        case 'p': s->threads = corpus_integer(name, optarg, 0, 4096); break;
        case 'h': print_help(); exit(0);
        default: exit(2); // getopt_long has said why
        }
    }
    if (s->tokenizer == NULL || s->out == NULL || optind == argc) {
        die_usage("%s is missing\n  ---> build/tokenize --help", s->tokenizer == NULL ? "--tokenizer"
                                                                 : s->out == NULL     ? "--out"
                                                                                      : "an input file");
    }
}

// what the output depends on, in words
static char *describe_job(const Settings *s, char *const *paths, int count) {
    char *job = NULL, path[4096], hex[65];
    size_t size = 0;
    FILE *text = open_memstream(&job, &size);
    if (text == NULL) {
        die("out of memory");
    }
    fprintf(text, "--shard-tokens %lld --val-fraction %.17g --text-bytes %lld", (long long)s->shard_tokens,
            s->val_fraction, (long long)s->text_bytes);
    for (int i = 0; i < 2; i++) {
        const char *name = i == 0 ? "vocab.json" : "merges.txt";
        check_format(path, sizeof(path), "%s/%s", s->tokenizer, name);
        sha256_file(path, hex);
        fprintf(text, " %s sha256 %s", name, hex);
    }
    for (int i = 0; i < count; i++) {
        fprintf(text, " %s (%lld bytes)", paths[i], (long long)corpus_file_size(paths[i]));
    }
    fclose(text);
    return job;
}

// two runs in one folder would write over each other; the system lets go of the lock however this run ends
static void lock_folder(const char *dir) {
    int folder = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0 || flock(folder, LOCK_EX | LOCK_NB) != 0) {
        die("%s: another run is at work there (%s)\n  ---> wait for it, or choose another --out", dir,
            strerror(errno));
    }
}

// 1 if the folder holds this job's finished output
static int is_done(const Output *out) {
    char path[4096];
    JsonArena arena;
    output_path(out, path, "manifest.json", "");
    if (access(path, F_OK) != 0) {
        return 0;
    }
    json_arena_init(&arena);
    const Json *job = json_get(json_parse_file(path, &arena, "remove it, and start again"), "job");
    if (job == NULL || job->type != JSON_STRING || strcmp(job->text, out->job) != 0) {
        die("%s: the folder holds the shards of another command\n  ---> rm -r %s, or choose another --out",
            path, out->dir);
    }
    json_arena_free(&arena);
    output_path(out, path, "tokenize.state.json", "");
    unlink(path); // left by a run that was killed as it finished
    return 1;
}

int main(int argc, char **argv) {
    machine_start(argv);
    Settings s = {NULL, NULL, 100000000, 0.01, 16384, 10, 0};
    parse_settings(&s, argc, argv);
    char *const *paths = argv + optind;
    int count = argc - optind;
    Corpus corpus;
    corpus_init(&corpus, paths, count, (size_t)s.text_bytes);
    Tokenizer *tokenizer = tokenizer_load(s.tokenizer);
    corpus_make_folder(s.out);
    lock_folder(s.out);
    Output *out = NEW(Output, 1);
    out->dir = s.out;
    out->shard_tokens = s.shard_tokens;
    out->val_fraction = s.val_fraction;
    out->job = describe_job(&s, paths, count);
    if (is_done(out)) {
        printf("%s: finished by an earlier run of this command\n", out->dir);
        return 0;
    }
    CorpusPosition position;
    int resumed = read_state(out, &position);
    rename_train_shards(out);
    if (!out->complete) {
        open_partials(out);
        if (resumed) {
            fprintf(stderr, "going on at %s, line %lld\n",
                    position.file < count ? paths[position.file] : "the end", (long long)position.line);
            corpus_seek(&corpus, position);
        }
        tokenize_all(out, &corpus, tokenizer, &s);
    }
    finish(out);
    report(out);
    corpus_free(&corpus);
    tokenizer_free(tokenizer);
    free(out->job);
    free(out);
    return 0;
}
