/*
data/: text cut into records whatever pieces it arrives in, digests of streams, paths as JSON, and the state
that a killed run leaves. The programs themselves are watched from outside by test_data_faults.sh.
*/
#include "data/state.h"

#define DATA_FOLDER "build/test/data"

static uint64_t data_random(uint64_t *state, uint64_t n) {
    return rng_bits(1, 2, (*state)++) % n;
}

// ----------------------------------------------------------------------------
// paths as JSON

static void data_check_path(const char *path, size_t size) {
    char *text = NULL, error[256];
    size_t text_size = 0;
    JsonArena arena;
    json_arena_init(&arena);
    FILE *out = open_memstream(&text, &text_size);
    json_write_bytes(out, path, size);
    fclose(out);
    const Json *value = json_parse(text, text_size, &arena, error, sizeof(error));
    if (CHECK(value != NULL && value->type == JSON_STRING)) {
        size_t again_size;
        char *again = json_read_bytes(value->text, value->text_size, &again_size);
        CHECK(again_size == size && memcmp(again, path, size) == 0);
        free(again);
    }
    json_arena_free(&arena);
    free(text);
}

static void test_data_paths(void) {
    static const char *const names[] = {"plain",        "caf\xC3\xA9",  "caf\xE9",      "\xE9\xE9",
                                        "back\\slash",  "\\x41",        "\\xE9 \xE9",   "\\x5C\\x",
                                        "\\\\x41\\x4g", "\xF0\x9F\x99", "\\x\xE9\\xe9", ""};
    uint64_t state = 0;
    char path[12];
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        data_check_path(names[i], strlen(names[i]));
    }
    for (int i = 0; i < 2000; i++) { // of the characters that matter
        size_t size = data_random(&state, sizeof(path));
        for (size_t k = 0; k < size; k++) {
            path[k] = "\\x4EFe9\xE9\xC3\xA9/\n"[data_random(&state, 12)];
        }
        data_check_path(path, size);
    }
}

// ----------------------------------------------------------------------------
// hashes

static void test_data_digest(void) {
    char bytes[300], text[DIGEST_TEXT_SIZE];
    uint64_t state = 7;
    for (size_t i = 0; i < sizeof(bytes); i++) {
        bytes[i] = (char)data_random(&state, 256);
    }
    Digest whole = {{0}, 0, {0}};
    digest_add(&whole, bytes, sizeof(bytes));
    for (int round = 0; round < 200; round++) {
        Digest pieces = {{0}, 0, {0}}, parsed;
        for (size_t at = 0, n; at < sizeof(bytes); at += n) {
            n = data_random(&state, 70);
            n = n < sizeof(bytes) - at ? n : sizeof(bytes) - at;
            digest_add(&pieces, bytes + at, n);
        }
        digest_print(&pieces, text);
        CHECK(digest_equal(&whole, &pieces) && digest_parse(&parsed, text) && digest_equal(&parsed, &whole));
    }
    for (size_t i = 0; i < sizeof(bytes); i++) { // any byte that changes, any that is missing
        Digest other = {{0}, 0, {0}}, shorter = {{0}, 0, {0}};
        bytes[i] ^= 1;
        digest_add(&other, bytes, sizeof(bytes));
        bytes[i] ^= 1;
        digest_add(&shorter, bytes, i);
        CHECK(!digest_equal(&whole, &other) && !digest_equal(&whole, &shorter));
    }
}

// ----------------------------------------------------------------------------
// cutting text

typedef struct {
    size_t start, end;
} Span;

// what corpus.h promises, said once more for a text that is all there; returns the number of documents
static size_t data_cut_whole(const char *text, size_t size, size_t least, Span *spans) {
    size_t n = 0, next = 0;
    for (size_t at = 0; at < size; at = next) {
        size_t limit = size - at < 64 * least ? size : at + 64 * least, end = limit;
        int blank = 0;
        for (size_t p = at + least; p + 1 < limit && !blank; p++) {
            int returns = text[p + 1] == '\r';
            blank = text[p] == '\n' && p + 1 + returns < limit && text[p + 1 + returns] == '\n';
            end = blank ? p : end;
        }
        while (end < size && (text[end] == '\n' || memcmp(text + end, "\r\n", 2) == 0)) {
            end += text[end] == '\n' ? 1 : 2;
        }
        end +=
            end + 1 == size && text[end] == '\r'; // perhaps half of a newline: no reason to begin a document
        while (!blank && end < size && end - at > 1 && (text[end] & 0xC0) == 0x80) {
            end--;
        }
        const char *separator = (const char *)memmem(text + at, end - at, "<|endoftext|>", 13);
        size_t stop = separator != NULL ? (size_t)(separator - text) : end;
        size_t start = at == 0 && stop >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : at;
        if (strspn(text + start, " \t\r\n") < stop - start) {
            spans[n].start = start;
            spans[n++].end = stop;
        }
        next = separator != NULL ? stop + 13 : end;
    }
    return n;
}

// characters that matter, often ones that belong together
static size_t data_random_text(char *text, size_t capacity, uint64_t *state) {
    static const char *const pieces[] = {
        "a", "b ",   "\n", "\r\n",          "\r",           "\n\n", "\r\n\r\n", "\xC3\xA4",
        " ", "word", "\t", "<|endoftext|>", "\xEF\xBB\xBF", "<|end"};
    size_t n = 0, target = data_random(state, capacity - 16);
    uint64_t words = data_random(state, 30); // in some texts they are all there is between two newlines
    while (n < target) {
        const char *piece = pieces[data_random(state, 60) < 2 * words ? 9 : data_random(state, 14)];
        strcpy(text + n, piece);
        n += strlen(piece);
    }
    return n;
}

// a child that writes the text into the pipe in small pieces
static pid_t data_feed(const char *path, const char *text, size_t size, uint64_t seed) {
    pid_t pid = fork();
    if (pid == 0) {
        int fd = open(path, O_WRONLY);
        for (size_t at = 0, n; at < size; at += n) {
            n = 1 + data_random(&seed, 9);
            n = n < size - at ? n : size - at;
            if (write(fd, text + at, n) != (ssize_t)n) {
                _exit(1);
            }
        }
        _exit(0);
    }
    return pid;
}

static void data_check_documents(const char *path, const char *text, const Span *spans, size_t n,
                                 size_t least, Digest *digest) {
    Inputs inputs;
    Corpus corpus;
    CorpusRecord record;
    size_t found = 0;
    char *paths[] = {(char *)path};
    inputs_init(&inputs, paths, 1, DATA_FOLDER);
    corpus_init(&corpus, &inputs, least);
    while (corpus_next(&corpus, &record)) {
        size_t size = found < n ? spans[found].end - spans[found].start : 0;
        CHECK(found < n && record.size == size && memcmp(record.bytes, text + spans[found].start, size) == 0);
        found++;
    }
    CHECK(found == n);
    *digest = corpus.position.digest;
    corpus_free(&corpus);
    inputs_free(&inputs);
}

static void test_data_cutting(void) {
    static char text[4096 + 16];
    static Span spans[4096];
    uint64_t state = 1000;
    make_folder(DATA_FOLDER);
    for (int round = 0; round < 300; round++) {
        size_t size = data_random_text(text, 4096, &state), least = 1 + data_random(&state, 40);
        size_t n = data_cut_whole(text, size, least, spans);
        Digest digests[2];
        FILE *file = check_fopen(DATA_FOLDER "/x.txt", "wb", "");
        check_fwrite(text, 1, size, file, "x.txt");
        check_fclose(file, "x.txt");
        data_check_documents(DATA_FOLDER "/x.txt", text, spans, n, least, &digests[0]);
        if (round % 10 == 0) { // the same, in pieces
            unlink(DATA_FOLDER "/x.txt");
            CHECK(mkfifo(DATA_FOLDER "/x.txt", 0600) == 0);
            pid_t pid = data_feed(DATA_FOLDER "/x.txt", text, size, state);
            data_check_documents(DATA_FOLDER "/x.txt", text, spans, n, least, &digests[1]);
            CHECK(waitpid(pid, NULL, 0) == pid && digest_equal(&digests[0], &digests[1]));
            unlink(DATA_FOLDER "/x.txt");
        }
    }
    remove_folder(DATA_FOLDER);
}

// a long line, or a text without blank lines, is searched once and not from its start after each read: what
// has been searched may change, and nobody sees it
static void test_data_searched_once(void) {
    char buffer[64] = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    Input input;
    Inputs inputs;
    Corpus corpus;
    memset(&input, 0, sizeof(input));
    memset(&inputs, 0, sizeof(inputs));
    input.path = buffer;
    inputs.files = &input;
    inputs.count = 1;
    for (int kind = 0; kind < 3; kind++) { // a line, a text with paragraphs, a text without
        size_t bytes, skip;
        memset(buffer, 'a', sizeof(buffer));
        input.kind = kind == 0 ? INPUT_JSON_LINES : INPUT_TEXT;
        corpus_init(&corpus, &inputs, kind == 2 ? 0 : 4);
        corpus.buffer = buffer;
        corpus.size = 40;
        CHECK(!corpus_cut(&corpus, &bytes, &skip));
        memcpy(buffer + 10, kind == 2 ? "<|endoftext|>" : "\n\n", kind == 2 ? 13 : 2);
        corpus.size = 41;
        CHECK(!corpus_cut(&corpus, &bytes, &skip));
    }
}

// ----------------------------------------------------------------------------
// the state of a killed run

static void data_read_state(void *path) {
    static Output out;
    CorpusPosition position;
    uint64_t identity;
    char folder[OUTPUT_PATH_SIZE];
    check_format(folder, sizeof(folder), "%s", (const char *)path);
    *strrchr(folder, '/') = '\0';
    memset(&out, 0, sizeof(out));
    out.dir = folder;
    out.shard_tokens = 1000;
    out.job = "job";
    output_init(&out);
    if (tokenize_state_read(&out, 3, &position, &identity)) {
        printf("%d domains\n", out.domain_count);
    }
}

static void test_data(void) {
    test_data_paths();
    test_data_digest();
    test_data_cutting();
    test_data_searched_once();
    make_folder(CORPUS_FOLDER);
    corpus_replay("tokenize_state", STATE_FILE, data_read_state);
    remove_folder(CORPUS_FOLDER);
}
