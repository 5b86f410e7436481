/*
Trains a byte-level BPE vocabulary: text in, vocab.json and merges.txt out, for llmc/files/tokenizer.h and for
Hugging Face's tokenizers (GPT2Tokenizer) alike.

    build/train_tokenizer --vocab-size 4096 --out build/my_vocabulary my_text.jsonl ...

1. All threads count the words of the text, as tokenizer.h cuts them.
2. The vocabulary starts as the 256 bytes. Again and again the most frequent adjacent pair of tokens becomes a
   token and is replaced wherever it stands; of equally frequent pairs, the one with the smaller ids. Counts
   are kept up to date instead of counted anew: each pair knows the words it may stand in, and a heap knows
   the most frequent pairs, with counts that may be too old (too high) and are then entered again.
3. <|endoftext|> gets the last id.
Source: Sennrich et al. 2016, algorithm 1; GPT-2's files. The result does not depend on the number of threads.

Shapes: none. Errors: exit 1, 2 for usage. Records that are no documents are counted and reported.
*/
#include "llmc/streams.h"
#include "llmc/files/newfile.h"
#include "llmc/files/tokenizer.h"
#include "llmc/machine.h"
#include "data/command.h"
#include "data/document.h"
#include <getopt.h>
// defines: getopt_long

// a longer word is data rather than language (base64, a run of one character): no token comes of it
enum {
    LONGEST_WORD = 4096,
    BATCH_BYTES_A_THREAD = 4 << 20,
    LEAST_COUNT = 2,
    NO_SYMBOL = -1,
    LISTED_UNREADABLE = 10
};

// a distinct word of the text
typedef struct {
    size_t start; // in the bytes of WordCounts
    uint32_t size;
    uint32_t hash;
    int64_t count;
} Word;

typedef struct {
    Word *words;
    size_t n, words_capacity;
    uint32_t *slots; // open addressing: index of a word + 1; 0 when empty
    size_t mask;     // number of slots - 1
    char *bytes;     // of all words
    size_t size, capacity;
} WordCounts;

// an adjacent pair of tokens
typedef struct {
    uint32_t key; // left << 16 | right
    int64_t count;
    uint32_t *words; // where it stands, or stood once
    uint32_t n, capacity;
} Pair;

typedef struct {
    int64_t count; // of the pair when it was entered
    uint32_t key;
    uint32_t pair; // index
} HeapEntry;

typedef struct {
    uint16_t *symbols; // of all words
    size_t *starts;    // of each word in symbols
    uint16_t *sizes;   // of each word, in symbols
    int64_t *counts;
    size_t n_words;
    Pair *pairs;
    size_t n_pairs, pairs_capacity;
    uint32_t *slots; // open addressing: index of a pair + 1; 0 when empty
    size_t mask;     // number of slots - 1
    HeapEntry *heap; // the most frequent first
    size_t heap_size, heap_capacity;
} Trainer;

// a token by its two parts; for a byte left is the byte's symbol and right NO_SYMBOL
typedef struct {
    int left, right;
} Token;

typedef struct {
    int64_t vocab_size;
    const char *out;
    const char *text_key;
    int64_t text_bytes;
    int64_t threads;
} Settings;

typedef struct {
    const Tokenizer *cutter;
    const char *text_key;
    int64_t *listed; // records that were named as being no documents, by all workers
    JsonArena arena;
    WordCounts counts;
    int64_t bytes, documents, unreadable;
} Worker;

// ----------------------------------------------------------------------------
// counting words

static void counts_rehash(WordCounts *c, size_t slots) {
    free(c->slots);
    c->slots = NEW(uint32_t, slots);
    c->mask = slots - 1;
    for (size_t i = 0; i < c->n; i++) {
        size_t slot = c->words[i].hash & c->mask;
        while (c->slots[slot] != 0) {
            slot = (slot + 1) & c->mask;
        }
        c->slots[slot] = (uint32_t)i + 1;
    }
}

static size_t counts_append(WordCounts *c, const char *word, size_t size, uint32_t hash) {
    if (c->n == UINT32_MAX - 1) {
        die("more than 4 billion distinct words\n  ---> train on a part of the text");
    }
    if (c->n == c->words_capacity) {
        c->words_capacity = 2 * c->n + 1024;
        c->words = GROW(Word, c->words, c->words_capacity);
    }
    if (c->size + size > c->capacity) {
        c->capacity = 2 * (c->size + size);
        c->bytes = GROW(char, c->bytes, c->capacity);
    }
    memcpy(c->bytes + c->size, word, size);
    Word *w = &c->words[c->n];
    w->start = c->size;
    w->size = (uint32_t)size;
    w->hash = hash;
    w->count = 0;
    c->size += size;
    return c->n++;
}

static void counts_add(WordCounts *c, const char *word, size_t size, uint32_t hash, int64_t count) {
    if (2 * (c->n + 1) > c->mask) {
        counts_rehash(c, c->mask > 0 ? 2 * (c->mask + 1) : 65536);
    }
    size_t slot = hash & c->mask;
    for (; c->slots[slot] != 0; slot = (slot + 1) & c->mask) {
        Word *w = &c->words[c->slots[slot] - 1];
        if (w->hash == hash && w->size == size && memcmp(c->bytes + w->start, word, size) == 0) {
            w->count += count;
            return;
        }
    }
    size_t index = counts_append(c, word, size, hash);
    c->slots[slot] = (uint32_t)index + 1;
    c->words[index].count = count;
}

static void counts_free(WordCounts *c) {
    free(c->words);
    free(c->slots);
    free(c->bytes);
}

static void count_record(const Corpus *corpus, const CorpusRecord *record, Worker *worker) {
    char error[256];
    Document document;
    const Input *input = &corpus->inputs->files[record->file];
    if (!document_parse(input, worker->text_key, record, &worker->arena, &document, error, sizeof(error))) {
        worker->unreadable++;
#pragma omp critical(warnings) // two at once would share a line
        if (++*worker->listed <= LISTED_UNREADABLE) {
            warn("%s, line %lld is no document: %s", input->path, (long long)record->line, error);
        }
        return;
    }
    for (size_t at = 0, size; at < document.size; at += size) {
        const char *word = document.text + at;
        size = tokenizer_word_size(worker->cutter, (const uint8_t *)word, document.size - at);
        if (size > 1 && size <= LONGEST_WORD) {
            counts_add(&worker->counts, word, size, (uint32_t)hash_text(word, size), 1);
        }
    }
    worker->bytes += (int64_t)document.size;
    worker->documents++;
}

// one thread reads the next batch while the others count this one
static int count_and_read(Corpus *corpus, CorpusBatch *batch, CorpusBatch *next, size_t bytes,
                          Worker *workers) {
    int more = 0;
#pragma omp parallel
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
#pragma omp single nowait
        more = corpus_read_batch(corpus, next, bytes);
#pragma omp for schedule(dynamic, 4)
        for (size_t i = 0; i < batch->n; i++) {
            count_record(corpus, &batch->records[i], &workers[thread]);
        }
    }
    return more;
}

// into the first worker
static void join_workers(Worker *workers, int threads) {
    for (int t = 1; t < threads; t++) {
        const WordCounts *from = &workers[t].counts;
        for (size_t i = 0; i < from->n; i++) {
            const Word *w = &from->words[i];
            counts_add(&workers[0].counts, from->bytes + w->start, w->size, w->hash, w->count);
        }
        workers[0].bytes += workers[t].bytes;
        workers[0].documents += workers[t].documents;
        workers[0].unreadable += workers[t].unreadable;
        counts_free(&workers[t].counts);
        json_arena_free(&workers[t].arena);
    }
}

// cutter: a Tokenizer of which only the classes are there, enough to cut words
static Worker *count_words(Corpus *corpus, const Tokenizer *cutter, const char *text_key, int threads) {
    size_t bytes = (size_t)threads * BATCH_BYTES_A_THREAD;
    CorpusBatch batches[2];
    memset(batches, 0, sizeof(batches));
    int64_t listed = 0;
    Worker *workers = NEW(Worker, threads);
    for (int t = 0; t < threads; t++) {
        workers[t].listed = &listed;
        json_arena_init(&workers[t].arena);
        workers[t].cutter = cutter;
        workers[t].text_key = text_key;
    }
    int current = 0;
    int more = corpus_read_batch(corpus, &batches[0], bytes);
    while (more) {
        more = count_and_read(corpus, &batches[current], &batches[!current], bytes, workers);
        current = !current;
    }
    corpus_free_batch(&batches[0]);
    corpus_free_batch(&batches[1]);
    join_workers(workers, threads);
    return workers;
}

// ----------------------------------------------------------------------------
// the heap of pairs

// more frequent, or as frequent and of smaller ids
static int entry_before(const HeapEntry *a, const HeapEntry *b) {
    return a->count != b->count ? a->count > b->count : a->key < b->key;
}

static void heap_push(Trainer *t, uint32_t pair) {
    if (t->heap_size == t->heap_capacity) {
        t->heap_capacity = 2 * t->heap_capacity + 1024;
        t->heap = GROW(HeapEntry, t->heap, t->heap_capacity);
    }
    HeapEntry entry = {t->pairs[pair].count, t->pairs[pair].key, pair};
    size_t at = t->heap_size++;
    while (at > 0 && entry_before(&entry, &t->heap[(at - 1) / 2])) {
        t->heap[at] = t->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    t->heap[at] = entry;
}

static HeapEntry heap_pop(Trainer *t) {
    HeapEntry first = t->heap[0];
    HeapEntry entry = t->heap[--t->heap_size];
    size_t at = 0;
    for (size_t child = 1; child < t->heap_size; child = 2 * at + 1) {
        child += child + 1 < t->heap_size && entry_before(&t->heap[child + 1], &t->heap[child]);
        if (!entry_before(&t->heap[child], &entry)) {
            break;
        }
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = entry;
    return first;
}

// the most frequent pair's index, or -1 when none is frequent enough
static int64_t pop_best_pair(Trainer *t) {
    while (t->heap_size > 0) {
        HeapEntry entry = heap_pop(t);
        int64_t count = t->pairs[entry.pair].count;
        if (count == entry.count && count >= LEAST_COUNT) {
            return entry.pair;
        }
        if (count >= LEAST_COUNT) {
            heap_push(t, entry.pair); // rarer than when it was entered
        }
    }
    return -1;
}

// ----------------------------------------------------------------------------
// pairs

static size_t pair_slot(const Trainer *t, uint32_t key) {
    size_t slot = (key * 0x9E3779B97F4A7C15ull >> 24) & t->mask;
    while (t->slots[slot] != 0 && t->pairs[t->slots[slot] - 1].key != key) {
        slot = (slot + 1) & t->mask;
    }
    return slot;
}

static void grow_pairs(Trainer *t) {
    t->pairs_capacity = 2 * t->pairs_capacity + 65536;
    t->pairs = GROW(Pair, t->pairs, t->pairs_capacity);
    size_t slots = 1;
    while (slots < 2 * t->pairs_capacity) {
        slots *= 2;
    }
    free(t->slots);
    t->slots = NEW(uint32_t, slots);
    t->mask = slots - 1;
    for (size_t i = 0; i < t->n_pairs; i++) {
        t->slots[pair_slot(t, t->pairs[i].key)] = (uint32_t)i + 1;
    }
}

static Pair *find_pair(Trainer *t, int left, int right) {
    uint32_t key = (uint32_t)left << 16 | (uint32_t)right;
    if (t->n_pairs == t->pairs_capacity) {
        grow_pairs(t);
    }
    size_t slot = pair_slot(t, key);
    if (t->slots[slot] == 0) {
        memset(&t->pairs[t->n_pairs], 0, sizeof(Pair));
        t->pairs[t->n_pairs].key = key;
        t->slots[slot] = (uint32_t)++t->n_pairs;
    }
    return &t->pairs[t->slots[slot] - 1];
}

// the pair stands once more in the word
static void pair_appears(Trainer *t, int left, int right, uint32_t word) {
    Pair *pair = find_pair(t, left, right);
    pair->count += t->counts[word];
    if (pair->n > 0 && pair->words[pair->n - 1] == word) {
        return;
    }
    if (pair->n == pair->capacity) {
        pair->capacity = 2 * pair->capacity + 4;
        pair->words = GROW(uint32_t, pair->words, pair->capacity);
    }
    pair->words[pair->n++] = word;
}

static void pair_vanishes(Trainer *t, int left, int right, uint32_t word) {
    find_pair(t, left, right)->count -= t->counts[word];
}

// replaces left, right by joined throughout the word
static void merge_in_word(Trainer *t, uint32_t word, int left, int right, int joined) {
    uint16_t *symbols = t->symbols + t->starts[word];
    size_t n = t->sizes[word];
    size_t out = 0;
    for (size_t i = 0; i < n; i++) {
        if (symbols[i] != left || i + 1 == n || symbols[i + 1] != right) {
            symbols[out++] = symbols[i];
            continue;
        }
        if (out > 0) {
            pair_vanishes(t, symbols[out - 1], left, word);
            pair_appears(t, symbols[out - 1], joined, word);
        }
        if (i + 2 < n) {
            pair_vanishes(t, right, symbols[i + 2], word);
            pair_appears(t, joined, symbols[i + 2], word);
        }
        symbols[out++] = (uint16_t)joined;
        i++;
    }
    t->sizes[word] = (uint16_t)out;
}

// the pair becomes the token `joined` wherever it stands; the pairs that this makes enter the heap
static void merge_pair(Trainer *t, size_t index, int joined) {
    Pair pair = t->pairs[index];
    size_t first_new = t->n_pairs;
    for (uint32_t i = 0; i < pair.n; i++) {
        merge_in_word(t, pair.words[i], (int)(pair.key >> 16), (int)(pair.key & 0xFFFF), joined);
    }
    free(pair.words);
    memset(&t->pairs[index], 0, sizeof(Pair));
    t->pairs[index].key = pair.key;
    for (size_t i = first_new; i < t->n_pairs; i++) {
        heap_push(t, (uint32_t)i);
    }
}

// ----------------------------------------------------------------------------
// training

// ids of the bytes, in the order of their symbols
static void byte_tokens(Token *tokens, int *ids) {
    int symbols[256];
    int next = 0;
    tokenizer_byte_symbols(symbols);
    for (int symbol = 0; symbol < 512; symbol++) {
        for (int byte = 0; byte < 256; byte++) {
            if (symbols[byte] == symbol) {
                tokens[next].left = symbol;
                tokens[next].right = NO_SYMBOL;
                ids[byte] = next++;
            }
        }
    }
}

static void trainer_init(Trainer *t, const WordCounts *counts, const int *byte_ids) {
    memset(t, 0, sizeof(*t));
    t->n_words = counts->n;
    t->symbols = NEW(uint16_t, counts->size);
    t->starts = NEW(size_t, counts->n);
    t->sizes = NEW(uint16_t, counts->n);
    t->counts = NEW(int64_t, counts->n);
    for (size_t i = 0; i < counts->size; i++) {
        t->symbols[i] = (uint16_t)byte_ids[(uint8_t)counts->bytes[i]];
    }
    for (size_t w = 0; w < counts->n; w++) {
        t->starts[w] = counts->words[w].start;
        t->sizes[w] = (uint16_t)counts->words[w].size;
        t->counts[w] = counts->words[w].count;
        const uint16_t *symbols = t->symbols + t->starts[w];
        for (size_t i = 0; i + 1 < t->sizes[w]; i++) {
            pair_appears(t, symbols[i], symbols[i + 1], (uint32_t)w);
        }
    }
    for (size_t i = 0; i < t->n_pairs; i++) {
        heap_push(t, (uint32_t)i);
    }
}

static void trainer_free(Trainer *t) {
    for (size_t i = 0; i < t->n_pairs; i++) {
        free(t->pairs[i].words);
    }
    free(t->symbols);
    free(t->starts);
    free(t->sizes);
    free(t->counts);
    free(t->pairs);
    free(t->slots);
    free(t->heap);
}

// tokens [vocab_size - 1] without <|endoftext|>; returns how many there are
static int train(const WordCounts *counts, Token *tokens, int vocab_size) {
    int byte_ids[256];
    Trainer trainer;
    byte_tokens(tokens, byte_ids);
    trainer_init(&trainer, counts, byte_ids);
    int n = 256;
    while (n < vocab_size - 1) {
        int64_t best = pop_best_pair(&trainer);
        if (best < 0) {
            break;
        }
        tokens[n].left = (int)(trainer.pairs[best].key >> 16);
        tokens[n].right = (int)(trainer.pairs[best].key & 0xFFFF);
        merge_pair(&trainer, (size_t)best, n);
        n++;
        if (n % 1000 == 0 && isatty(2)) {
            fprintf(stderr, "%d of %d tokens\r", n, vocab_size);
        }
    }
    trainer_free(&trainer);
    return n;
}

// ----------------------------------------------------------------------------
// writing the vocabulary

// appends the token's spelling to out, which has room; returns its end
static char *spell_token(const Token *tokens, int id, char *out) {
    if (tokens[id].right == NO_SYMBOL) {
        return json_put_utf8(out, (unsigned)tokens[id].left);
    }
    return spell_token(tokens, tokens[id].right, spell_token(tokens, tokens[id].left, out));
}

static void write_vocab(NewFile *f, const Token *tokens, int n) {
    char spelling[2 * LONGEST_WORD];
    for (int id = 0; id < n; id++) {
        char *end = spell_token(tokens, id, spelling);
        fputs(id == 0 ? "{" : ", ", f->file);
        json_write_string(f->file, spelling, (size_t)(end - spelling));
        fprintf(f->file, ": %d", id);
    }
    fprintf(f->file, ", \"%s\": %d}\n", TOKENIZER_EOT, n);
}

static void write_merges(NewFile *f, const Token *tokens, int n) {
    char spelling[4 * LONGEST_WORD + 2];
    fprintf(f->file, "#version: 0.2\n");
    for (int id = 256; id < n; id++) {
        char *end = spell_token(tokens, tokens[id].left, spelling);
        *end++ = ' ';
        end = spell_token(tokens, tokens[id].right, end);
        *end++ = '\n';
        fwrite(spelling, 1, (size_t)(end - spelling), f->file); // require_written() sees what came of it
    }
}

static int is_device(const NewFile *f) {
    return strcmp(f->path, f->temporary) == 0;
}

// dies if the file could not be written, and then leaves nothing of the other one either
static void require_written(NewFile *f, const NewFile *other) {
    if (fflush(f->file) != 0 || ferror(f->file)) {
        int cause = errno;
        if (!is_device(other)) {
            unlink(other->temporary);
        }
        errno = cause;
        newfile_fail(f);
    }
}

// The two files belong together. An earlier vocab.json goes before the new merges.txt comes: killed in
// between, the folder holds no vocabulary rather than halves of two. Both are written by then, so that a
// full disk does not cost the earlier vocabulary
static void write_vocabulary(const char *dir, const Token *tokens, int n) {
    char path[4096];
    NewFile vocab, merges;
    check_format(path, sizeof(path), "%s/vocab.json", dir);
    newfile_open(&vocab, path);
    check_format(path, sizeof(path), "%s/merges.txt", dir);
    newfile_open(&merges, path);
    write_vocab(&vocab, tokens, n);
    write_merges(&merges, tokens, n);
    require_written(&vocab, &merges);
    require_written(&merges, &vocab);
    if (!is_device(&vocab)) {
        unlink(vocab.path);
    }
    newfile_close(&merges);
    newfile_close(&vocab);
}

// ----------------------------------------------------------------------------
// the command line

static void print_help(void) {
    printf("Trains a byte-level BPE vocabulary: vocab.json and merges.txt.\n\n"
           "  build/train_tokenizer [options] INPUT...\n\n"
           "INPUT is FILE.jsonl or FILE.ndjson (a document per line), any other file of text, a folder of\n"
           "them, or - (JSON Lines from standard input). JSON Lines and FILE.txt may have .zst behind.\n\n"
           "  --vocab-size N   tokens, with the 256 bytes and %s (2048)\n"
           "  --out DIR        folder for the two files (required)\n"
           "  --text-key NAME  the name of the text in JSON Lines (text)\n"
           "  --text-bytes N   cut text at the first blank line behind so many bytes (16384; 0: one\n"
           "                   document per file)\n"
           "  --threads N      threads (0: one per core)\n"
           "  --help\n",
           TOKENIZER_EOT);
}

static void parse_settings(Settings *s, int argc, char **argv) {
    static const struct option options[] = {
        {"vocab-size", 1, NULL, 'v'}, {"out", 1, NULL, 'o'},     {"text-bytes", 1, NULL, 'b'},
        {"text-key", 1, NULL, 'k'},   {"threads", 1, NULL, 'p'}, {"help", 0, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    int index = 0;
    for (int c; (c = getopt_long(argc, argv, "", options, &index)) != -1;) {
        switch (c) {
        case 'v': s->vocab_size = command_integer("vocab-size", optarg, 257, TOKENIZER_MAX_VOCAB); break;
        case 'o': s->out = command_text("out", optarg); break;
        case 'k': s->text_key = command_text("text-key", optarg); break;
        case 'b': s->text_bytes = command_integer("text-bytes", optarg, 0, 1 << 30); break;
        case 'p': s->threads = command_integer("threads", optarg, 0, 4096); break;
        case 'h': print_help(); exit(0);
        default: exit(2); // getopt_long has said why
        }
    }
    if (s->out == NULL || optind == argc) {
        die_usage("%s is missing\n  ---> build/train_tokenizer --help",
                  s->out == NULL ? "--out" : "an input file");
    }
}

int main(int argc, char **argv) {
    streams_open();
    machine_start(argv);
    Settings s = {2048, NULL, "text", 16384, 0};
    parse_settings(&s, argc, argv);
    Inputs inputs;
    Corpus corpus;
    inputs_init(&inputs, argv + optind, argc - optind, s.out);
    corpus_init(&corpus, &inputs, (size_t)s.text_bytes);
    command_make_folder(s.out);
    command_lock_folder(s.out);
    int threads = command_threads((int)s.threads);
    Tokenizer cutter;
    tokenizer_init_classes(&cutter);
    Worker *workers = count_words(&corpus, &cutter, s.text_key, threads);
    const WordCounts *counts = &workers->counts;
    fprintf(stderr, "%.1f MB, %lld documents, %zu distinct words\n", (double)workers->bytes / 1e6,
            (long long)workers->documents, counts->n);
    if (workers->documents == 0 && workers->unreadable > 0) {
        die("none of the %lld records is a document\n"
            "  ---> if the text has another name than \"text\", give it: --text-key NAME",
            (long long)workers->unreadable);
    }
    if (workers->documents == 0) {
        die("there is no document in the input\n  ---> name files with text: build/train_tokenizer --help");
    }
    Token *tokens = NEW(Token, s.vocab_size);
    int n = train(counts, tokens, (int)s.vocab_size);
    if (n < s.vocab_size - 1) {
        warn("the text is too short for %lld tokens: no other pair stands there twice",
             (long long)s.vocab_size);
    }
    write_vocabulary(s.out, tokens, n);
    printf("%s: %d tokens from %lld documents\n", s.out, n + 1, (long long)workers->documents);
    if (workers->unreadable > 0) {
        warn("%lld records were no documents", (long long)workers->unreadable);
    }
    free(tokens);
    counts_free(&workers->counts);
    json_arena_free(&workers->arena);
    free(cutter.classes);
    free(workers);
    corpus_free(&corpus);
    inputs_free(&inputs);
    return 0;
}
