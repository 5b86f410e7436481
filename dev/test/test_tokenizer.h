/*
bpe.h, vocabulary.h and tokenizer.h: words and merges against a literal reading of their definition on random
text, the fast way against bpe.h on long text, any bytes there and back, very long words, special tokens,
damaged vocabularies; GPT-2's ids, where its vocabulary is present; and the built-in sample's shards.

GPT-2's vocabulary is looked for in the folder that the environment variable GPT2_VOCABULARY names, data/gpt2 by
default (data/download_gpt2.sh). Strings and files with the ids on which five other implementations agree are
checked where they lie beside it: golden.jsonl, golden_special.jsonl, corpus_tokens.json and ../corpus.
*/
#ifndef TEST_TOKENIZER_H
#define TEST_TOKENIZER_H

#include <glob.h>
#include <sys/stat.h>
#include <time.h>
// defines: glob, mkdir, clock
#include "data/document.h"
#include "data/sha256.h"
#include "llmc/files/tokenizer.h"
#include "harness.h"

#define TK_FOLDER "build/test/vocabulary"

// ----------------------------------------------------------------------------
// a tiny vocabulary: the bytes, these merges, <|endoftext|>

static const char *const tk_merges[][2] = {
    {"a", "b"},           {"\u0120", "a"},      {"b", "c"},
    {"ab", "ab"},         {"\u0120", "\u0120"}, {"abab", "abab"},
    {"a", "a"},           {"aa", "a"},          {"\u0120a", "b"},
    {"\u010a", "\u010a"}, {"'", "s"},           {"\u00c3", "\u00a9"},
    {"1", "2"},           {"h", "e"},           {"l", "l"},
    {"he", "ll"},         {"hell", "o"},        {"\u0120\u0120", "\u0120\u0120"},
};
enum { TK_MERGES = sizeof(tk_merges) / sizeof(tk_merges[0]), TK_VOCAB = 256 + TK_MERGES + 1 };

static void tk_write(void) {
    int symbols[256], next = 0;
    char text[16];
    mkdir("build", 0777);
    mkdir("build/test", 0777);
    mkdir(TK_FOLDER, 0777);
    FILE *vocab = check_fopen(TK_FOLDER "/vocab.json", "wb", "");
    FILE *merges = check_fopen(TK_FOLDER "/merges.txt", "wb", "");
    tokenizer_byte_symbols(symbols);
    for (int byte = 0; byte < 256; byte++) {
        fputs(byte == 0 ? "{" : ", ", vocab);
        json_write_string(vocab, text, (size_t)(json_put_utf8(text, (unsigned)symbols[byte]) - text));
        fprintf(vocab, ": %d", next++);
    }
    fprintf(merges, "#version: 0.2\n");
    for (int i = 0; i < TK_MERGES; i++) {
        fprintf(vocab, ", \"%s%s\": %d", tk_merges[i][0], tk_merges[i][1], next++);
        fprintf(merges, "%s %s\n", tk_merges[i][0], tk_merges[i][1]);
    }
    fprintf(vocab, ", \"<|endoftext|>\": %d}\n", next);
    check_fclose(vocab, TK_FOLDER "/vocab.json");
    check_fclose(merges, TK_FOLDER "/merges.txt");
}

static int tk_encodes(Tokenizer *t, const char *text, size_t size, const int *want, size_t n_want) {
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    tokenizer_encode(t, text, size, &ids, &n, &capacity);
    int equal = n == n_want && (n == 0 || memcmp(ids, want, n * sizeof(int)) == 0);
    free(ids);
    return equal;
}

// ----------------------------------------------------------------------------
// the definition, read literally

typedef struct {
    int code; // -1: a byte that is no UTF-8
    int kind;
    size_t size;
} TkChar;

static size_t tk_chars(const Tokenizer *t, const uint8_t *text, size_t size, TkChar *chars) {
    size_t n = 0;
    for (size_t at = 0; at < size; n++) {
        size_t bytes = json_utf8_size(text + at, text + size);
        int code = bytes == 0 ? -1 : bytes == 1 ? text[at] : text[at] & (0x7F >> bytes);
        for (size_t i = 1; i < bytes; i++) {
            code = code * 64 + text[at + i] % 64;
        }
        chars[n].code = code;
        chars[n].kind = code < 0 ? UNICODE_OTHER : t->classes[code];
        chars[n].size = bytes == 0 ? 1 : bytes;
        at += chars[n].size;
    }
    return n;
}

// the number of characters that the first alternative that matches takes
static size_t tk_match(const TkChar *c, size_t n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    static const int kinds[] = {UNICODE_LETTER, UNICODE_NUMBER, UNICODE_OTHER};
    for (int i = 0; i < 7; i++) {
        size_t length = strlen(contractions[i]), k = 0;
        while (k < length && k < n && c[k].code == contractions[i][k]) {
            k++;
        }
        if (k == length) {
            return length;
        }
    }
    for (int i = 0; i < 3; i++) { // ` ?` and a run
        size_t start = c[0].code == ' ', end = start;
        while (end < n && c[end].kind == kinds[i]) {
            end++;
        }
        if (end > start) {
            return end;
        }
    }
    size_t run = 0;
    while (run < n && c[run].kind == UNICODE_SPACE) {
        run++;
    }
    size_t before_space_or_end = run == n ? run : run - 1; // \s+(?!\S)
    return before_space_or_end > 0 ? before_space_or_end : run;
}

// merges one pair at a time, searching tk_merges in order
static size_t tk_merge(int *ids, size_t n, int (*merges)[3]) {
    for (int rank = 0; rank < TK_MERGES; rank++) {
        for (size_t i = 0; i + 1 < n; i++) {
            if (ids[i] == merges[rank][0] && ids[i + 1] == merges[rank][1]) {
                ids[i] = merges[rank][2];
                memmove(ids + i + 1, ids + i + 2, (n - i - 2) * sizeof(int));
                n--;
                rank = -1; // from the first merge again
                break;
            }
        }
    }
    return n;
}

static int tk_token(const Tokenizer *t, const char *left, const char *right) {
    char bytes[64], spelled[64];
    TokenizerLoader loader;
    size_t size;
    tokenizer_loader_init(&loader, 1);
    free(loader.slots);
    check_format(spelled, sizeof(spelled), "%s%s", left, right);
    size_t n = tokenizer_unspell(&loader, spelled, strlen(spelled), bytes);
    for (int id = 0; id < t->vocab_size; id++) {
        const char *piece = tokenizer_piece(t, id, &size);
        if (size == n && memcmp(piece, bytes, n) == 0) {
            return id;
        }
    }
    return -1;
}

static size_t tk_reference(const Tokenizer *t, const char *text, size_t size, int (*merges)[3], int *ids) {
    TkChar chars[1024];
    size_t n_chars = tk_chars(t, (const uint8_t *)text, size, chars);
    size_t n = 0, byte = 0;
    for (size_t at = 0; at < n_chars;) {
        size_t end = at + tk_match(chars + at, n_chars - at);
        size_t first = n;
        for (; at < end; at++) {
            for (size_t i = 0; i < chars[at].size; i++) {
                ids[n++] = t->byte_ids[(uint8_t)text[byte++]];
            }
        }
        n = first + tk_merge(ids + first, n - first, merges);
    }
    return n;
}

static const char *const tk_parts[] = {
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "a",
    "ab",
    "abab",
    "abc",
    "aaaaaaa",
    "hello",
    " hello",
    "'",
    "'s",
    "'ll",
    "'re",
    "'T",
    "'ve",
    "12",
    "7",
    "!",
    "...",
    "\u00e9",
    "\u00c9t\u00e9",
    "\u65e5\u672c",
    "\u0663",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\xff",
    "\xe2\x82",
    "\xf0\x9f",
    "\U0001F600",
    "\u0301",
    "_",
    "<|endoftext|>",
    "abcdefghijklmn",
    "Abcdefghijklmnop",
    "                  ",
    "\u1c89",
    "\u01c5",
    "\u00bd",
    "\x1c",
};

// one of tk_parts, drawn
static const char *tk_draw_part(unsigned long long *state) {
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return tk_parts[(*state >> 33) % (sizeof(tk_parts) / sizeof(tk_parts[0]))];
}

static void test_tokenizer_definition(Tokenizer *t) {
    int merges[TK_MERGES][3], want[1024];
    char text[1024];
    unsigned long long state = 1;
    size_t wrong = 0, lost = 0;
    for (int i = 0; i < TK_MERGES; i++) {
        merges[i][0] = tk_token(t, tk_merges[i][0], "");
        merges[i][1] = tk_token(t, tk_merges[i][1], "");
        merges[i][2] = tk_token(t, tk_merges[i][0], tk_merges[i][1]);
    }
    for (int trial = 0; trial < 20000; trial++) {
        size_t size = 0, n = 0, capacity = 0, back_size;
        int *ids = NULL;
        for (int i = 0; i <= trial % 13; i++) {
            const char *part = tk_draw_part(&state);
            memcpy(text + size, part, strlen(part));
            size += strlen(part);
        }
        wrong += !tk_encodes(t, text, size, want, tk_reference(t, text, size, merges, want));
        tokenizer_encode(t, text, size, &ids, &n, &capacity);
        char *back = tokenizer_decode(t, ids, n, &back_size);
        lost += back_size != size || memcmp(back, text, size) != 0 || back[size] != '\0';
        free(back);
        free(ids);
    }
    CHECK(wrong == 0);
    CHECK(lost == 0);
}

// the ids that bpe.h gives, one word after the other; returns their number, 0 at a word that is not short
static size_t tk_plain(const Tokenizer *t, const char *text, size_t size, int *ids) {
    uint16_t merged[TOKENIZER_SHORT];
    size_t n = 0, bytes;
    for (size_t at = 0; at < size; at += bytes) {
        const uint8_t *word = (const uint8_t *)text + at;
        bytes = tokenizer_word_size(t, word, size - at);
        if (bytes == 0 || bytes > TOKENIZER_SHORT) {
            return 0;
        }
        size_t count = tokenizer_merge_short(t, word, bytes, merged);
        for (size_t i = 0; i < count; i++) {
            ids[n++] = merged[i];
        }
    }
    return n;
}

// marks, batches and the cache, empty and then full, on more text than a window of marks
static void test_tokenizer_fast_is_plain(Tokenizer *t) {
    enum { SIZE = 1 << 20, NUMBER_EVERY = 3, LONGEST_PART = 32 };
    char *text = NEW(char, SIZE + LONGEST_PART);
    int *want = NEW(int, SIZE + LONGEST_PART);
    unsigned long long state = 11;
    size_t size = 0;
    for (int i = 0; size < SIZE; i++) {
        char number[LONGEST_PART]; // so many different words that some leave the cache
        check_format(number, sizeof(number), " %llu", state >> 45);
        const char *part = i % NUMBER_EVERY == 0 ? number : tk_draw_part(&state);
        memcpy(text + size, part, strlen(part));
        size += strlen(part);
    }
    size_t n = tk_plain(t, text, size, want);
    CHECK(n > size / LONGEST_PART);
    CHECK(tk_encodes(t, text, size, want, n));
    CHECK(tk_encodes(t, text, size, want, n));
    free(want);
    free(text);
}

// ----------------------------------------------------------------------------
// any bytes, long words, special tokens

static int tk_round_trip(Tokenizer *t, const char *text, size_t size) {
    int *ids = NULL;
    size_t n = 0, capacity = 0, back_size;
    tokenizer_encode(t, text, size, &ids, &n, &capacity);
    char *back = tokenizer_decode(t, ids, n, &back_size);
    int equal = back_size == size && memcmp(back, text, size) == 0;
    free(back);
    free(ids);
    return equal;
}

static void test_tokenizer_any_bytes(Tokenizer *t) {
    char text[4096];
    unsigned long long state = 7;
    int lost = 0;
    for (size_t size = 0; size < 300; size++) {
        for (size_t i = 0; i < size; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            text[i] = (char)(state >> 40);
        }
        lost += !tk_round_trip(t, text, size);
    }
    for (int byte = 0; byte < 256; byte++) {
        memset(text, byte, sizeof(text));
        lost += !tk_round_trip(t, text, sizeof(text));
    }
    CHECK(lost == 0);
}

// a heap word gives what short words give: "abab" repeats merge in eights, letter by letter or not
static void test_tokenizer_long_words(Tokenizer *t) {
    const size_t size = 1 << 20;
    char *text = NEW(char, size);
    int *ids = NULL;
    size_t n = 0, capacity = 0, wrong = 0;
    for (size_t i = 0; i < size; i++) {
        text[i] = i % 2 == 0 ? 'a' : 'b';
    }
    clock_t start = clock();
    tokenizer_encode(t, text, size, &ids, &n, &capacity);
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 5.0); // quadratic would take hours
    CHECK(n == size / 8);
    for (size_t i = 0; i < n; i++) {
        wrong += ids[i] != tk_token(t, "abab", "abab");
        i += i > 100 ? n / 100 : 0; // a sample: finding the token is slow
    }
    CHECK(wrong == 0);
    CHECK(tk_round_trip(t, text, size - 3));
    free(ids);
    free(text);
}

// both ways of merging a word, on the same words
static void test_tokenizer_two_ways(Tokenizer *t) {
    static const char letters[] = "aaabbc";
    unsigned long long state = 3;
    uint16_t short_ids[TOKENIZER_SHORT];
    uint8_t word[TOKENIZER_SHORT];
    int different = 0;
    for (int trial = 0; trial < 2000; trial++) {
        size_t size = 1 + (size_t)trial % TOKENIZER_SHORT, n = 0;
        for (size_t i = 0; i < size; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            word[i] = (uint8_t)letters[(state >> 33) % 6];
        }
        size_t n_short = tokenizer_merge_short(t, word, size, short_ids);
        tokenizer_merge_long(t, word, size);
        for (int64_t i = 0; i >= 0; i = t->symbols[i].next) {
            different += n >= n_short || t->symbols[i].id != short_ids[n];
            n++;
        }
        different += n != n_short;
    }
    CHECK(different == 0);
}

static void test_tokenizer_special(Tokenizer *t) {
    const char *text = "ab<|endoftext|>\n<|endoftext|><|endoftext|";
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    CHECK(t->eot == TK_VOCAB - 1 && t->vocab_size == TK_VOCAB);
    tokenizer_encode_special(t, text, strlen(text), &ids, &n, &capacity);
    CHECK(n == 4 + strlen("<|endoftext|") && ids[1] == t->eot && ids[2] == t->byte_ids['\n'] &&
          ids[3] == t->eot);
    char *back = tokenizer_decode(t, ids, n, NULL);
    CHECK(strcmp(back, text) == 0);
    free(back);
    n = 0;
    tokenizer_encode(t, text, strlen(text), &ids, &n, &capacity);
    for (size_t i = 0; i < n; i++) {
        CHECK(ids[i] != t->eot); // special tokens as text are text
    }
    n = 0;
    tokenizer_encode_special(t, "", 0, &ids, &n, &capacity);
    CHECK(n == 0);
    free(ids);
}

static void test_tokenizer_share(const Tokenizer *t) {
    const int want[] = {t->byte_ids['x'], t->byte_ids[' '], tk_token(t, "a", "b")};
    Tokenizer *other = tokenizer_share(t);
    CHECK(tk_encodes(other, "x ab", 4, want, 3));
    CHECK(tk_encodes(other, "x ab", 4, want, 3)); // now from its cache
    tokenizer_free(other);
    tokenizer_free(NULL);
}

static void tk_piece_outside(void *t) {
    size_t size;
    tokenizer_piece((Tokenizer *)t, TK_VOCAB, &size);
}

// ----------------------------------------------------------------------------
// damaged vocabularies

static void tk_load(void *folder) {
    tokenizer_load((const char *)folder);
}

// writes the tiny vocabulary with `find` in one of its files replaced (find "": the whole file), and loads it
static void tk_refused(const char *name, const char *find, const char *replacement, const char *message) {
    char path[256];
    tk_write();
    check_format(path, sizeof(path), TK_FOLDER "/%s", name);
    char *text = check_read_file(path, NULL, "");
    char *at = strstr(text, find);
    if (!CHECK(at != NULL)) {
        return;
    }
    FILE *file = check_fopen(path, "wb", "");
    fprintf(file, "%.*s%s%s", (int)(at - text), text, replacement, find[0] ? at + strlen(find) : "");
    check_fclose(file, path);
    check_dies(1, message, tk_load, (void *)TK_FOLDER);
    check_dies(1, "---> ", tk_load, (void *)TK_FOLDER);
    free(text);
}

static void test_tokenizer_damaged(void) {
    const char *vocab = "vocab.json";
    const char *merges = "merges.txt";
    check_dies(1, "cannot open build/test/nowhere/vocab.json", tk_load, (void *)"build/test/nowhere");
    tk_refused(vocab, "", "", "is not valid JSON");
    tk_refused(vocab, "{", "[", "is not valid JSON");
    tk_refused(vocab, "", "[1, 2]", "holds 0 tokens");
    tk_refused(vocab, "", "{\"a\": 0}", "holds 1 tokens");
    tk_refused(vocab, "\"a\": 97", "\"a\": \"97\"",
               "the id of token \"a\" is not a number; expected the ids 0 to");
    tk_refused(vocab, "\"a\": 97", "\"a\": 98", "expected the ids 0 to");
    tk_refused(vocab, "\"a\": 97", "\"a\": -1", "the id of token \"a\" is -1");
    tk_refused(vocab, "\"a\": 97", "\"a\": 97.5", "the id of token \"a\" is 97.5");
    tk_refused(vocab, "\"a\": 97", "\"a\": 99999999999999999999", "the id of token \"a\"");
    tk_refused(vocab, "\"b\": 98", "\"a\": 98", "token \"a\" stands there twice");
    tk_refused(vocab, "\"a\": 97", "\"a b\": 97", "token \"a b\" is not spelled in GPT-2's byte symbols");
    tk_refused(vocab, "\"a\": 97", "\"\u20ac\": 97", "is not spelled in GPT-2's byte symbols");
    tk_refused(vocab, "\"a\": 97", "\"\": 97", "is not spelled in GPT-2's byte symbols");
    tk_refused(vocab, "\"a\": 97", "\"aX\": 97", "no token for the byte 97");
    tk_refused(vocab, "<|endoftext|>", "<|end|>", "has no token <|endoftext|>");
    tk_refused(merges, "\nh e\n", "\nhe\n", "merges.txt, line 15: expected two tokens");
    tk_refused(merges, "\nh e\n", "\nh ee\n", "merges.txt, line 15: \"ee\" is not a token");
    tk_refused(merges, "\nh e\n", "\nh f\n", "merges.txt, line 15: \"hf\" is not a token");
    tk_refused(merges, "\nh e\n", "\nh e e\n", "merges.txt, line 15: \"e e\" is not a token");
    tk_refused(merges, "\nh e\n", "\nb c\n", "merges.txt, line 15: the pair \"b c\" stands there twice");
    tk_refused(merges, "\nh e\n", "\n#version: 1\n", "is not a token");
    tk_refused(merges, "\nh e\n", "\n\xff e\n", "is not a token");
    unlink(TK_FOLDER "/merges.txt");
    check_dies(1, "cannot open build/test/vocabulary/merges.txt", tk_load, (void *)TK_FOLDER);
}

// tokenizer.json of the tiny vocabulary alone, its merges as strings or as transformers 5 has them, as pairs
static void tk_write_json(int as_pairs) {
    tk_write();
    Tokenizer *t = tokenizer_load(TK_FOLDER);
    tokenizer_save_json(t, TK_FOLDER);
    tokenizer_free(t);
    unlink(TK_FOLDER "/vocab.json");
    unlink(TK_FOLDER "/merges.txt");
    char *text = check_read_file(TK_FOLDER "/" TOKENIZER_JSON, NULL, "");
    FILE *file = check_fopen(TK_FOLDER "/" TOKENIZER_JSON, "wb", "");
    char *merges = strstr(text, "\"merges\": [");
    fprintf(file, "%.*s\"merges\": [", (int)(merges - text), text);
    for (int i = 0; i < TK_MERGES; i++) {
        const char *form = as_pairs ? "%s[\"%s\", \"%s\"]" : "%s\"%s %s\"";
        fprintf(file, form, i > 0 ? ", " : "", tk_merges[i][0], tk_merges[i][1]);
    }
    fputs("]}}", file);
    check_fclose(file, TOKENIZER_JSON);
    free(text);
}

static void tk_json_refused(const char *find, const char *replacement, const char *message) {
    tk_write_json(1);
    char *text = check_read_file(TK_FOLDER "/" TOKENIZER_JSON, NULL, "");
    char *at = strstr(text, find);
    if (CHECK(at != NULL)) {
        FILE *file = check_fopen(TK_FOLDER "/" TOKENIZER_JSON, "wb", "");
        fprintf(file, "%.*s%s%s", (int)(at - text), text, replacement, at + strlen(find));
        check_fclose(file, TOKENIZER_JSON);
        check_dies(1, message, tk_load, (void *)TK_FOLDER);
        check_dies(1, "---> ", tk_load, (void *)TK_FOLDER);
    }
    free(text);
}

// a folder with the one-file form alone is the same tokenizer; what is of another kind is refused
static void test_tokenizer_json(void) {
    const char text[] = "abc ab a b cab\n\xc3\xa9 aab";
    tk_write();
    Tokenizer *want = tokenizer_load(TK_FOLDER);
    for (int as_pairs = 0; as_pairs < 2; as_pairs++) {
        int *a = NULL, *b = NULL;
        size_t n = 0, m = 0, a_capacity = 0, b_capacity = 0;
        tk_write_json(as_pairs);
        CHECK(tokenizer_is_in(TK_FOLDER));
        Tokenizer *got = tokenizer_load(TK_FOLDER);
        tokenizer_encode(want, text, sizeof(text) - 1, &a, &n, &a_capacity);
        tokenizer_encode(got, text, sizeof(text) - 1, &b, &m, &b_capacity);
        CHECK(n == m && n > 0 && n < sizeof(text) - 1 && memcmp(a, b, n * sizeof(int)) == 0);
        CHECK(got->eot == want->eot && got->vocab_size == TK_VOCAB &&
              tk_round_trip(got, text, sizeof(text) - 1));
        free(a);
        free(b);
        tokenizer_free(got);
    }
    tokenizer_free(want);
    tk_json_refused("\"BPE\"", "\"Unigram\"", "(model: expected the type BPE)");
    tk_json_refused("\"byte_fallback\": false", "\"byte_fallback\": true", "(byte_fallback)");
    tk_json_refused("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}",
                    "(normalizer: expected null)");
    tk_json_refused("\"add_prefix_space\": false", "\"add_prefix_space\": true", "(pre_tokenizer: expected");
    tk_json_refused("\"use_regex\": true", "\"use_regex\": false", "(pre_tokenizer: expected");
    tk_json_refused("\"content\": \"<|endoftext|>\"", "\"content\": \"<pad>\"", "(added_tokens: a token");
    tk_json_refused("\"merges\": [", "\"mergers\": [", "(model: expected a vocab");
    tk_json_refused("\"merges\": [", "\"merges\": [[\"a\", \"b\", \"c\"], ",
                    "merges, line 1: expected two tokens");
    tk_json_refused("\"merges\": [", "\"merges\": [7, ", "merges, line 1: expected two tokens");
    tk_json_refused("\"a\": 97", "\"a\": [97]", "tokenizer.json: the id of token \"a\" is not a number");
    unlink(TK_FOLDER "/" TOKENIZER_JSON);
}

static void test_tokenizer_too_many(void) {
    FILE *file = check_fopen(TK_FOLDER "/vocab.json", "wb", "");
    for (int i = 0; i <= TOKENIZER_MAX_VOCAB; i++) {
        fprintf(file, "%s\"t%d\": %d", i == 0 ? "{" : ",", i, i);
    }
    fputs("}", file);
    check_fclose(file, TK_FOLDER "/vocab.json");
    check_dies(1, "holds 65537 tokens; expected an object of 257", tk_load, (void *)TK_FOLDER);
}

static void tk_write_file(const char *path, const char *bytes, size_t size) {
    FILE *file = check_fopen(path, "wb", "");
    check_fwrite(bytes, 1, size, file, path);
    check_fclose(file, path);
}

static void tk_load_and_return(void *input) {
    const char *text = (const char *)input; // 0-terminated, as all of them are
    Tokenizer *t = tokenizer_load(TK_FOLDER);
    exit(tk_round_trip(t, text, strlen(text)) ? 0 : 3);
}

// dev/fuzz/corpus/tokenizer: "V" vocab.json 0 merges.txt 0 text, or "T" text; those named bad_ are refused
static void test_tokenizer_fuzz_corpus(void) {
    glob_t found;
    CHECK(glob("dev/fuzz/corpus/tokenizer/*", 0, NULL, &found) == 0);
    CHECK(found.gl_pathc > 2);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        size_t size;
        char *input = check_read_file(found.gl_pathv[i], &size, "");
        char *text = input + 1;
        tk_write();
        if (input[0] == 'V') {
            char *merges = input + strlen(input) + 1;
            text = merges + strlen(merges) + 1;
            tk_write_file(TK_FOLDER "/vocab.json", input + 1, strlen(input + 1));
            tk_write_file(TK_FOLDER "/merges.txt", merges, strlen(merges));
        }
        int bad = strstr(found.gl_pathv[i], "/bad_") != NULL;
        CHECK(run_in_child(tk_load_and_return, text, NULL, 0) == bad);
        free(input);
    }
    globfree(&found);
}

// the k-th string over "abc" of a length, in base 3
static void tk_spell(int k, int length, char *out) {
    for (int i = 0; i < length; i++) {
        out[i] = (char)('a' + k % 3);
        k /= 3;
    }
    out[length] = '\0';
}

// every way to make every string of 2 to 9 letters: more merges than a rank of 16 bits can count
static void test_tokenizer_too_many_merges(void) {
    char word[16];
    tk_write();
    char *text = check_read_file(TK_FOLDER "/vocab.json", NULL, "");
    FILE *vocab = check_fopen(TK_FOLDER "/vocab.json", "wb", "");
    FILE *merges = check_fopen(TK_FOLDER "/merges.txt", "wb", "");
    fprintf(vocab, "%.*s", (int)(strstr(text, ", \"ab\"") - text), text); // the bytes
    int id = 256;
    for (int length = 2, count = 9; length <= 9; length++, count *= 3) {
        for (int k = 0; k < count; k++) {
            tk_spell(k, length, word);
            fprintf(vocab, ", \"%s\": %d", word, id++);
            for (int cut = 1; cut < length; cut++) {
                fprintf(merges, "%.*s %s\n", cut, word, word + cut);
            }
        }
    }
    fprintf(vocab, ", \"<|endoftext|>\": %d}", id);
    check_fclose(vocab, TK_FOLDER "/vocab.json");
    check_fclose(merges, TK_FOLDER "/merges.txt");
    check_dies(1, "merges.txt, line 65536: more than 65,535 merges", tk_load, (void *)TK_FOLDER);
    free(text);
}

// ----------------------------------------------------------------------------
// GPT-2

// each line {"text", "ids"}; returns the number of lines, or 0 if one differs
static int tk_golden(Tokenizer *t, const char *path, int special) {
    size_t size;
    int lines = 0, wrong = 0;
    char error[256];
    JsonArena arena;
    json_arena_init(&arena);
    char *text = check_read_file(path, &size, "");
    for (char *line = text; line < text + size; lines++) {
        char *end = strchr(line, '\n');
        json_arena_reset(&arena);
        const Json *row = json_parse(line, (size_t)(end - line), &arena, error, sizeof(error));
        const Json *string = json_get(row, "text"), *want = json_get(row, "ids");
        int *ids = NULL;
        size_t n = 0, capacity = 0, i = 0;
        (special ? tokenizer_encode_special : tokenizer_encode)(t, string->text, string->text_size, &ids, &n,
                                                                &capacity);
        int equal = n == want->count && tk_round_trip(t, string->text, string->text_size);
        for (const Json *id = want->child; equal && id != NULL; id = id->next) {
            int64_t value = -1;
            equal = json_int64(id, &value) && value == ids[i++];
        }
        wrong += !equal;
        free(ids);
        line = end + 1;
    }
    json_arena_free(&arena);
    free(text);
    return wrong == 0 ? lines : 0;
}

// SHA-256 of the ids of all documents of a file, as little-endian uint16, with_eot each followed by it
static void tk_hash_file(Tokenizer *t, const char *path, int with_eot, char *hex) {
    char copy[256], error[256];
    char *paths[1] = {copy};
    Inputs inputs;
    Corpus corpus;
    CorpusRecord record;
    Document document;
    JsonArena arena;
    Sha256 sha;
    int *ids = NULL;
    size_t capacity = 0;
    check_format(copy, sizeof(copy), "%s", path);
    inputs_init(&inputs, paths, 1, "");
    corpus_init(&corpus, &inputs, 0);
    json_arena_init(&arena);
    sha256_init(&sha);
    while (corpus_next(&corpus, &record)) {
        size_t n = 0;
        CHECK(document_parse(&inputs.files[record.file], "text", &record, &arena, &document, error,
                             sizeof(error)));
        tokenizer_encode(t, document.text, document.size, &ids, &n, &capacity);
        tokenizer_reserve(&ids, n, &capacity, 1);
        ids[n] = t->eot;
        for (size_t i = 0; i < n + (size_t)with_eot; i++) {
            uint16_t id = (uint16_t)ids[i];
            sha256_update(&sha, &id, 2);
        }
    }
    sha256_finish(&sha, hex);
    json_arena_free(&arena);
    corpus_free(&corpus);
    inputs_free(&inputs);
    free(ids);
}

static void test_tokenizer_corpus(Tokenizer *t, const char *folder) {
    char path[256], hex[65];
    JsonArena arena;
    json_arena_init(&arena);
    check_format(path, sizeof(path), "%s/corpus_tokens.json", folder);
    const Json *files = json_parse_file(path, &arena, "");
    for (const Json *file = files->child; file != NULL; file = file->next) {
        const Json *plain = json_get(file, "sha256_u16le");
        const Json *want = plain != NULL ? plain : json_get(file, "sha256_u16le_with_eot");
        check_format(path, sizeof(path), "%s/../corpus/%s.%s", folder, file->key,
                     plain != NULL ? "txt" : "jsonl.zst");
        tk_hash_file(t, path, plain == NULL, hex);
        CHECK(strcmp(hex, want->text) == 0);
    }
    CHECK(files->count == 4);
    json_arena_free(&arena);
}

static void test_tokenizer_agreed(Tokenizer *t, const char *folder) {
    char path[256];
    check_format(path, sizeof(path), "%s/golden.jsonl", folder);
    if (access(path, R_OK) != 0) {
        skip_case("GPT-2's ids of the agreed strings: no golden.jsonl beside the vocabulary");
        return;
    }
    CHECK(tk_golden(t, path, 0) == 318);
    check_format(path, sizeof(path), "%s/golden_special.jsonl", folder);
    CHECK(tk_golden(t, path, 1) == 8);
    if (system("zstd --version >/dev/null 2>&1") != 0) {
        skip_case("GPT-2's ids of whole files: no zstd");
    } else {
        test_tokenizer_corpus(t, folder);
    }
}

static void test_tokenizer_gpt2(void) {
    const char *named = getenv("GPT2_VOCABULARY"), *folder = named != NULL ? named : "data/gpt2";
    char path[256];
    int *ids = NULL;
    size_t n = 0, capacity = 0;
    check_format(path, sizeof(path), "%s/vocab.json", folder);
    if (named == NULL && access(path, R_OK) != 0) {
        skip_case("GPT-2's ids: no data/gpt2 (data/download_gpt2.sh fetches it)");
        return;
    }
    Tokenizer *t = tokenizer_load(folder);
    CHECK(t->vocab_size == 50257 && t->eot == 50256);
    tokenizer_encode(t, "Hello, world!", 13, &ids, &n, &capacity);
    CHECK(n == 4 && ids[0] == 15496 && ids[1] == 11 && ids[2] == 995 && ids[3] == 0);
    free(ids);
    test_tokenizer_agreed(t, folder);
    tokenizer_free(t);
}

// ----------------------------------------------------------------------------
// data/corpus.h: documents out of files

enum { TK_CORPUS_SIZE = 3000000 };

// words, now and then a blank line, rarely a separator; the bytes without separators in *plain
static char *tk_corpus_text(char *plain, size_t *plain_size) {
    static const char *const parts[] = {"word ",    "\u00e9t\u00e9 ", "line\n",        "x",
                                        "end.\n\n", "end.\n\n\n\n",   CORPUS_SEPARATOR};
    char *text = NEW(char, TK_CORPUS_SIZE + 64);
    unsigned long long state = 5;
    size_t size = 0;
    *plain_size = 0;
    while (size < TK_CORPUS_SIZE) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        unsigned r = (unsigned)(state >> 40) % 1000;
        const char *part = parts[r < 960 ? r % 4 : r < 999 ? 4 + r % 2 : 6];
        memcpy(text + size, part, strlen(part));
        size += strlen(part);
        if (r < 999) {
            memcpy(plain + *plain_size, part, strlen(part));
            *plain_size += strlen(part);
        }
    }
    text[size] = '\0';
    return text;
}

// every byte of a text file is in one document, and from each position an earlier run may go on
static void tk_corpus_cuts(size_t text_bytes, const char *plain, size_t plain_size) {
    char path[] = TK_FOLDER "/cuts.txt";
    char *paths[1] = {path};
    Inputs inputs;
    Corpus corpus, again;
    CorpusRecord record, same;
    size_t at = 0, records = 0, wrong = 0;
    inputs_init(&inputs, paths, 1, "");
    corpus_init(&corpus, &inputs, text_bytes);
    for (;;) {
        CorpusPosition before = corpus.position;
        if (!corpus_next(&corpus, &record)) {
            break;
        }
        wrong += at + record.size > plain_size || memcmp(plain + at, record.bytes, record.size) != 0;
        wrong += (record.bytes[0] & 0xC0) == 0x80; // never within a character
        at += record.size;
        if (records++ % 500 == 0) {
            corpus_init(&again, &inputs, text_bytes);
            corpus_seek(&again, &before, records % 1000 != 0); // taken for granted, or read again
            wrong += !corpus_next(&again, &same) || same.size != record.size || same.line != record.line ||
                     memcmp(same.bytes, record.bytes, same.size) != 0;
            corpus_free(&again);
        }
    }
    CHECK(wrong == 0 && at == plain_size);
    CHECK(text_bytes == 0 ? records > 10 : records > 100 && records <= 2 * plain_size / text_bytes + 1000);
    corpus_free(&corpus);
    inputs_free(&inputs);
}

static void test_tokenizer_corpus_text(void) {
    char *plain = NEW(char, TK_CORPUS_SIZE + 64);
    size_t plain_size;
    char *text = tk_corpus_text(plain, &plain_size);
    tk_write_file(TK_FOLDER "/cuts.txt", text, strlen(text));
    tk_corpus_cuts(0, plain, plain_size);
    tk_corpus_cuts(100, plain, plain_size);
    tk_corpus_cuts(10000, plain, plain_size);
    free(text);
    memset(plain, '-', plain_size); // no blank line at all
    tk_write_file(TK_FOLDER "/cuts.txt", plain, plain_size);
    tk_corpus_cuts(100, plain, plain_size);
    free(plain);
}

static void test_tokenizer_corpus_lines(void) {
    static const char lines[] =
        "\n{\"text\": \"a\"}\r\n   \n{\"text\": \"b\", \"meta\": {\"pile_set_name\": \"Wikipedia (en)\"}}\n"
        "{\"text\": 1}\n[]\n{\"text\": \"\xff\"}\n{\"text\": \"last\"}";
    static const char *const want[] = {"2 a lines",
                                       "4 b wikipedia_en",
                                       "5 \"text\" is not a string",
                                       "6 not an object",
                                       "7 column 11: invalid UTF-8 in a string",
                                       "8 last lines"};
    char path[] = TK_FOLDER "/lines.jsonl", error[256], got[512];
    char *paths[1] = {path};
    size_t n = 0;
    Inputs inputs;
    Corpus corpus;
    CorpusRecord record;
    Document document;
    JsonArena arena;
    tk_write_file(path, lines, sizeof(lines) - 1);
    json_arena_init(&arena);
    inputs_init(&inputs, paths, 1, "");
    corpus_init(&corpus, &inputs, 0);
    while (corpus_next(&corpus, &record) && n < 6) {
        int line = (int)record.line;
        if (document_parse(&inputs.files[record.file], "text", &record, &arena, &document, error,
                           sizeof(error))) {
            check_format(got, sizeof(got), "%d %.*s %s", line, (int)document.size, document.text,
                         document.domain);
        } else {
            check_format(got, sizeof(got), "%d %s", line, error);
        }
        if (!CHECK(strcmp(got, want[n++]) == 0)) {
            printf("    %s\n", got);
        }
    }
    CHECK(n == 6);
    corpus_free(&corpus);
    inputs_free(&inputs);
    json_arena_free(&arena);
}

// ----------------------------------------------------------------------------
// what data/ makes of the built-in sample

// the training and validation shards, decoded, hold each document of the sample once
static void test_tokenizer_sample(void) {
    if (access("build/sample/manifest.json", R_OK) != 0) {
        skip_case("the sample's shards: no build/sample (make sample-data)");
        return;
    }
    char sample[] = "data/sample.jsonl", error[256];
    char *paths[1] = {sample};
    Inputs inputs;
    Corpus corpus;
    CorpusRecord record;
    Document document;
    JsonArena arena;
    size_t size;
    int missing = 0, documents = 0;
    Tokenizer *t = tokenizer_load("build/sample");
    uint16_t *shard = (uint16_t *)check_read_file("build/sample/train_000000.bin", &size, "");
    size_t n = size / 2, at = 512; // behind the header
    inputs_init(&inputs, paths, 1, "");
    corpus_init(&corpus, &inputs, 0);
    json_arena_init(&arena);
    int *ids = NULL;
    size_t capacity = 0;
    while (corpus_next(&corpus, &record)) {
        size_t count = 0;
        CHECK(document_parse(&inputs.files[record.file], "text", &record, &arena, &document, error,
                             sizeof(error)));
        tokenizer_encode(t, document.text, document.size, &ids, &count, &capacity);
        size_t i = 0;
        while (at < n && shard[at] == t->eot && i < count && at + 1 + i < n && shard[at + 1 + i] == ids[i]) {
            i++;
        }
        if (i == count) {
            at += 1 + count; // in order; the others went to validation
        } else {
            missing++;
        }
        documents++;
    }
    CHECK(at == n && missing > 0 && missing < documents / 2);
    json_arena_free(&arena);
    corpus_free(&corpus);
    inputs_free(&inputs);
    tokenizer_free(t);
    free(shard);
    free(ids);
}

static void test_tokenizer(void) {
    tk_write();
    Tokenizer *t = tokenizer_load(TK_FOLDER);
    test_tokenizer_definition(t);
    test_tokenizer_fast_is_plain(t);
    test_tokenizer_any_bytes(t);
    test_tokenizer_two_ways(t);
    test_tokenizer_long_words(t);
    test_tokenizer_special(t);
    test_tokenizer_share(t);
    check_dies(1, "is not in the vocabulary", tk_piece_outside, t);
    tokenizer_free(t);
    test_tokenizer_damaged();
    test_tokenizer_json();
    test_tokenizer_fuzz_corpus();
    test_tokenizer_too_many();
    test_tokenizer_too_many_merges();
    test_tokenizer_gpt2();
    test_tokenizer_corpus_text();
    test_tokenizer_corpus_lines();
    test_tokenizer_sample();
}

#endif
