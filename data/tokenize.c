/*
Text to token shards: JSON Lines or plain text in, llm.c shards out, on all cores, in their order.

    build/tokenize --tokenizer data/gpt2 --out data/pile pile/train/00.jsonl.zst ...

One thread reads batches of records while the others parse and encode the batch before; then that batch is
written. Each document begins with <|endoftext|>. What is read stands in inputs.h, corpus.h and document.h,
what is written in output.h and manifest.h, how a run that was killed goes on in state.h.

Errors: exit 1, 2 for usage; a record that is no document is counted and named in unreadable.txt.
*/
#include "llmc/streams.h"
#include "llmc/files/tokenizer.h"
#include "llmc/machine.h"
#include "data/command.h"
#include "data/document.h"
#include "data/manifest.h"
#include "data/output.h"
#include "data/state.h"
#include <getopt.h>
#include <time.h>
// defines: getopt_long, clock_gettime

enum { BATCH_BYTES_A_THREAD = 4 << 20 };

typedef struct {
    const char *tokenizer;
    const char *out;
    const char *text_key;
    int64_t shard_tokens;
    double val_fraction;
    int64_t text_bytes;
    int64_t save_seconds;
    int64_t threads;
    int split_domains;
} Settings;

// what became of a record
typedef struct {
    char *error; // why it is no document, or NULL
    char domain[DOMAIN_SIZE];
    size_t text_size;
    uint16_t *tokens; // the first is <|endoftext|>
    size_t n_tokens;
    int64_t hash;   // of the text
    int validation; // what the hash says
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
// batches

static void encode_record(const Input *input, const CorpusRecord *record, Encoded *e, Worker *worker,
                          const Settings *s) {
    char error[256];
    Document document;
    memset(e, 0, sizeof(*e));
    if (!document_parse(input, s->text_key, record, &worker->arena, &document, error, sizeof(error))) {
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
    uint64_t hash = hash_text(document.text, document.size);
    e->hash = (int64_t)(hash >> 1);
    e->validation = (double)(hash >> 11) * 0x1p-53 < s->val_fraction;
    e->text_size = document.size;
    memcpy(e->domain, document.domain, sizeof(e->domain));
}

// one thread reads the next batch while the others encode this one
static int encode_and_read(Corpus *corpus, Batch *batch, Batch *next, size_t bytes, Worker *workers,
                           const Settings *s) {
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
            const CorpusRecord *record = &batch->input.records[i];
            encode_record(&corpus->inputs->files[record->file], record, &batch->encoded[i], &workers[thread],
                          s);
        }
    }
    return more;
}

static void write_batch(Output *out, const Corpus *corpus, Batch *batch) {
    for (size_t i = 0; i < batch->input.n; i++) {
        const CorpusRecord *record = &batch->input.records[i];
        const Encoded *e = &batch->encoded[i];
        if (e->error != NULL) {
            output_unreadable(out, corpus->inputs->files[record->file].path, record->line, e->error);
        } else {
            output_document(out, e->domain, e->text_size, e->hash, e->validation, e->tokens, e->n_tokens);
        }
        free(e->error);
        free(e->tokens);
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

// nothing to train on is no success; and nothing is left that would bind the next command to these options
static void refuse_no_document(Output *out) {
    char path[OUTPUT_PATH_SIZE];
    if (out->documents > 0) {
        return;
    }
    output_path(out, path, STATE_FILE, "");
    unlink(path);
    if (out->unreadable == 0) {
        output_path(out, path, "unreadable.txt", ".partial");
        unlink(path);
        die("there is no document in the input\n  ---> name files with text: build/tokenize --help");
    }
    fclose(out->unreadable_file);
    output_rename(out, "unreadable.txt");
    die("none of the %lld records is a document: %s/unreadable.txt says why\n"
        "  ---> if the text has another name than \"text\", give it: --text-key NAME",
        (long long)out->unreadable, out->dir);
}

// all input into the partial files, which are then complete
static void tokenize_all(Output *out, Corpus *corpus, Tokenizer *tokenizer, const Settings *s) {
    int threads = command_threads((int)s->threads);
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
        more = encode_and_read(corpus, batch, &batches[current], bytes, workers, s);
        write_batch(out, corpus, batch);
        if (out->unnamed || seconds_now() - saved >= (double)s->save_seconds) {
            const CorpusPosition *end = &batch->input.end;
            state_checkpoint(out, end, inputs_identity(corpus->inputs, end->file + 1));
            saved = seconds_now();
        }
        show_progress(&progress, out, batch->input.progress, 0);
    }
    show_progress(&progress, out, 1.0, 1);
    refuse_no_document(out);
    output_complete(out);
    state_checkpoint(out, &corpus->position, inputs_identity(corpus->inputs, corpus->inputs->count));
    fclose(out->unreadable_file);
    free_workers(workers, threads);
    for (int i = 0; i < 2; i++) {
        corpus_free_batch(&batches[i].input);
        free(batches[i].encoded);
    }
}

// how to weigh the domains; as it stands, each as much as it has tokens
static void report_mix(const Output *out) {
    double total = (double)output_train_tokens(out);
    const char *separator = "  ---> to give the domains other weights: --train-data '";
    for (int i = 0; i < out->domain_count; i++) {
        const Domain *d = &out->domains[i];
        if (d->train_tokens > 0) {
            double weight = (double)d->train_tokens / total;
            printf("%s%s/%s*.bin:%.4f", separator, out->dir, d->train.prefix, weight < 1e-4 ? 1e-4 : weight);
            separator = ",";
        }
    }
    printf("'\n");
}

static void report(Output *out) {
    int64_t val = 0, shards = 0;
    const Series *series;
    for (int i = 0; i < out->domain_count; i++) {
        val += out->domains[i].val_tokens;
    }
    for (int i = 0; (series = output_series(out, i)) != NULL; i++) {
        shards += series->finished;
    }
    printf("%s: %lld documents, %lld training tokens in %lld shards, %lld validation tokens in %d domains\n",
           out->dir, (long long)out->documents, (long long)(out->tokens - val), (long long)shards,
           (long long)val, out->domain_count);
    if (out->unreadable > 0) {
        warn("%lld records are no documents: %s/unreadable.txt names them", (long long)out->unreadable,
             out->dir);
    }
    if (val == 0) {
        warn("no document went to validation: %s",
             out->val_fraction > 0.0 ? "no domain has two different documents" : "raise --val-fraction");
    }
    if (out->split_domains) {
        report_mix(out);
    }
}

// ----------------------------------------------------------------------------
// the command line

static void print_help(void) {
    printf("Text to token shards for ./train_remoe.\n\n"
           "  build/tokenize [options] INPUT...\n\n"
           "INPUT is FILE.jsonl or FILE.ndjson (a document per line), any other file of text, a folder of\n"
           "them, or - (JSON Lines from standard input). JSON Lines and FILE.txt may have .zst behind.\n\n"
           "  --tokenizer DIR      folder with vocab.json and merges.txt (required)\n"
           "  --out DIR            folder for the shards (required); an unfinished run there goes on\n"
           "  --text-key NAME      the name of the text in JSON Lines (text)\n"
           "  --shard-tokens N     tokens per training shard (100000000)\n"
           "  --split-domains      training shards per domain, so that each can be given a weight. The\n"
           "                       domain is meta.pile_set_name in JSON Lines, else the name of the\n"
           "                       file, or of the folder that was given\n"
           "  --val-fraction X     part of the documents that goes to validation (0.01); of a domain\n"
           "                       with two documents at least one, unless X is 0\n"
           "  --text-bytes N       cut text at the first blank line behind so many bytes (16384; 0: one\n"
           "                       document per file). <|endoftext|> ends a document, too\n"
           "  --save-seconds N     make the work so far durable this often (10)\n"
           "  --threads N          threads (0: one per core)\n"
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
        {"text-key", 1, NULL, 'k'},     {"threads", 1, NULL, 'p'},    {"split-domains", 0, NULL, 'd'},
        {"help", 0, NULL, 'h'},         {NULL, 0, NULL, 0},
    };
    int index = 0;
    for (int c; (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        const char *name = c != '?' ? options[index].name : "";
        switch (c) {
        case 't': s->tokenizer = command_text(name, optarg); break;
        case 'o': s->out = command_text(name, optarg); break;
        case 'k': s->text_key = command_text(name, optarg); break;
        case 's': s->shard_tokens = command_integer(name, optarg, 1, INT32_MAX); break;
        case 'v': s->val_fraction = parse_fraction(name, optarg); break;
        case 'b': s->text_bytes = command_integer(name, optarg, 0, 1 << 30); break;
        case 'c': s->save_seconds = command_integer(name, optarg, 0, 1000000000); break;
        case 'p': s->threads = command_integer(name, optarg, 0, 4096); break;
        case 'd': s->split_domains = 1; break;
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

// " PATH (N bytes)", or " FOLDER (M files, N bytes)"
static void describe_size(FILE *text, const Inputs *inputs, int argument, const char *path) {
    int64_t size = 0;
    int files = 0, is_folder = 0;
    for (int i = 0; i < inputs->count; i++) {
        const Input *input = &inputs->files[i];
        if (input->argument == argument) {
            size += input->size;
            files++;
            is_folder |= strcmp(input->path, path) != 0;
        }
    }
    if (is_folder) {
        fprintf(text, " (%d files, %lld bytes)", files, (long long)size);
    } else {
        fprintf(text, " (%lld bytes)", (long long)size);
    }
}

// what the output depends on, in words; with sizes: those of the inputs, too
static char *describe_job(const Settings *s, const Inputs *inputs, char *const *paths, int with_sizes) {
    char *job = NULL, path[OUTPUT_PATH_SIZE], hex[65];
    size_t size = 0;
    FILE *text = open_memstream(&job, &size);
    if (text == NULL) {
        die("out of memory");
    }
    fprintf(text, "--shard-tokens %lld --val-fraction %.17g --text-bytes %lld", (long long)s->shard_tokens,
            s->val_fraction, (long long)s->text_bytes);
    if (strcmp(s->text_key, "text") != 0) {
        fprintf(text, " --text-key %s", s->text_key);
    }
    fprintf(text, "%s", s->split_domains ? " --split-domains" : "");
    for (int i = 0; i < 2; i++) {
        const char *name = i == 0 ? "vocab.json" : "merges.txt";
        check_format(path, sizeof(path), "%s/%s", s->tokenizer, name);
        sha256_file(path, hex);
        fprintf(text, " %s sha256 %s", name, hex);
    }
    for (int i = 0; i < inputs->arguments; i++) {
        fprintf(text, " %s", paths[i]);
        if (with_sizes) {
            describe_size(text, inputs, i, paths[i]);
        }
    }
    fclose(text);
    return job;
}

// from where an earlier run was killed, if there was one, to the end of the input
static void run(Output *out, Corpus *corpus, Tokenizer *tokenizer, const Settings *s, Digest *input) {
    CorpusPosition position;
    const Inputs *inputs = corpus->inputs;
    uint64_t identity = 0;
    int resumed = tokenize_state_read(out, inputs->count, &position, &identity);
    if (!out->complete) {
        output_open(out);
        if (resumed) {
            int trusted = identity == inputs_identity(inputs, position.file + 1);
            fprintf(stderr, "going on at %s, line %lld%s\n",
                    position.file < inputs->count ? inputs->files[position.file].path : "the end",
                    (long long)position.line,
                    trusted ? "" : "; an input was touched since, so what was done is read again first");
            corpus_seek(corpus, &position, trusted);
        }
        tokenize_all(out, corpus, tokenizer, s);
        position = corpus->position;
    }
    *input = position.digest;
}

int main(int argc, char **argv) {
    streams_open();
    machine_start(argv);
    Settings s = {NULL, NULL, "text", 100000000, 0.01, 16384, 10, 0, 0};
    parse_settings(&s, argc, argv);
    Inputs inputs;
    Corpus corpus;
    Digest input;
    inputs_init(&inputs, argv + optind, argc - optind, s.out);
    corpus_init(&corpus, &inputs, (size_t)s.text_bytes);
    Tokenizer *tokenizer = tokenizer_load(s.tokenizer);
    command_make_folder(s.out);
    command_lock_folder(s.out);
    char *job = describe_job(&s, &inputs, argv + optind, 0);
    char *job_with_sizes = describe_job(&s, &inputs, argv + optind, 1);
    Output *out = NEW(Output, 1);
    out->dir = s.out;
    out->shard_tokens = s.shard_tokens;
    out->val_fraction = s.val_fraction;
    out->split_domains = s.split_domains;
    out->job = job;
    output_init(out);
    if (manifest_is_there(out, job_with_sizes, &corpus)) {
        printf("%s: finished by an earlier run of this command\n", out->dir);
    } else {
        run(out, &corpus, tokenizer, &s, &input);
        manifest_finish(out, job_with_sizes, &input);
        report(out);
    }
    corpus_free(&corpus);
    inputs_free(&inputs);
    tokenizer_free(tokenizer);
    free(job);
    free(job_with_sizes);
    free(out);
    return 0;
}
