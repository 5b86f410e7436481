/*
json_parser.h and json.h: what RFC 8259 accepts and forbids, each case as small as it can be (the cases follow
the public JSONTestSuite's rules), values read back, errors placed, an arena used again, and what is written
read again.
*/
#ifndef TEST_JSON_H
#define TEST_JSON_H

#include <glob.h>
// defines: glob
#include "llmc/files/json.h"
#include "harness.h"

typedef struct {
    const char *text;
    size_t size;
} JsonCase;

// clang-format off
#define J(literal) {literal, sizeof(literal) - 1}

static const JsonCase json_accepted[] = {
    // structure
    J("[]"), J("{}"), J("[[]]"), J(" [] \r\n\t"), J("[[]   ]"), J("[1\n,2]"), J("[1,null,null,2]"), J("[ 4]"),
    J("[\"a\"]"), J("null"), J("true"), J("false"), J("42"), J("-0.1"), J("\"\""), J("\"asd\""),
    J("[null, 1, \"1\", {}]"), J("\n[\ttrue\r]\n"),
    // objects
    J("{\"a\":\"b\"}"), J("{\"\":0}"), J("{\"a\":[]}"), J("{\n\"a\": \"b\"\n}"), J("{\"a\":1,\"a\":1}"),
    J("{\"a\":1, \"b\":{\"c\":[{}]}}"), J("{\"a\\u0000b\":1}"),
    // numbers
    J("[0]"), J("[-0]"), J("[-0.0]"), J("[0e1]"), J("[0e+1]"), J("[1E22]"), J("[1E-2]"), J("[1E+2]"),
    J("[1e007]"), J("[20e1]"), J("[123.456e78]"), J("[123.456789]"), J("[-1]"), J("[-123]"), J("[1e999]"),
    J("[-1e-999]"), J("[100000000000000000000]"),
    J("[-0.000000000000000000000000000000000000000000000000000000000000000000000000000001]"),
    // escapes
    J("[\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"]"), J("[\"\\u0000\"]"), J("[\"\\u0012\"]"),
    J("[\"\\u0061\\u30af\\u30EA\"]"), J("[\"\\uD801\\udc37\"]"), J("[\"\\\\n\"]"),
    J("[\"\\ud83d\\ude39\\ud83d\\udc8d\"]"), J("[\"\\uDBFF\\uDFFF\"]"), J("[\"\\\\u0000\"]"),
    J("[\"\\uFFFE\\uFDD0\\uFFFF\"]"), J("[\"\\u0022\\u005C\"]"), J("[\"\\u2028\"]"),
    // UTF-8, first and last of each length, around the surrogates
    J("[\"\x7f\"]"), J("[\"\xC2\x80\xDF\xBF\"]"), J("[\"\xE0\xA0\x80\xEF\xBF\xBF\"]"),
    J("[\"\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\"]"), J("[\"\xED\x9F\xBF\xEE\x80\x80\"]"),
    J("[\"\xE2\x80\xA8\xE2\x80\xA9\"]"), J("[\"plain text that is longer than eight \xF0\x9F\x98\x80\"]"),
    J("[\"a/*b*/c//d\"]"), J("[\" \"]"), J("{\"\xE2\x82\xAC\":\"\xE3\x82\xAF\"}"),
};

static const JsonCase json_refused[] = {
    // nothing, or more than one value
    J(""), J(" "), J("\xEF\xBB\xBF"), J("\xEF\xBB\xBF{}"), J("1 2"), J("[][]"), J("{}}"), J("[1]]"), J("[]x"),
    J("{\"a\":1}#"), J("2@"), J("1\0"), J("[]\0"), J("\0"), J("{}\0{"), J("1]"),
    // arrays
    J("["), J("]"), J("[1"), J("[1,"), J("[1,]"), J("[,1]"), J("[,]"), J("[1,,2]"), J("[1 2]"), J("[1:2]"),
    J("[a]"), J("[\"a\",]"), J("[\"a\",,]"), J("[\"a\""), J("[3[4]]"), J("[*]"), J("[1}"), J("[1,\n1\n,1"),
    J("[\f]"), J("[\v]"), J("[\xC2\xA0]"), J("[\xE2\x81\xA0]"), J("[<null>]"), J("[\\n]"), J("[1,\0]"),
    J("[[["),
    // objects
    J("{"), J("}"), J("{]"), J("{\"a\""), J("{\"a\":"), J("{\"a\":}"), J("{\"a\":1"), J("{\"a\":1,"),
    J("{\"a\":1,}"), J("{\"a\":1,,\"b\":2}"), J("{,\"a\":1}"), J("{\"a\" \"b\"}"), J("{\"a\",\"b\"}"),
    J("{\"a\":1 \"b\":2}"), J("{\"a\"::1}"), J("{:1}"), J("{a:1}"), J("{'a':1}"), J("{1:1}"), J("{null:1}"),
    J("{\"a\":1]"), J("{[]:1}"), J("{\"a\":\"b\",\"c\"}"), J("{\"a\":/**/1}"), J("{\"a\":1}//"), J("{}/**/"),
    J("{\"a\":\"a\" 123}"), J("{\"a\":\"b\"}/"), J("{\xF0\x9F\x87\xA8:1}"),
    // words
    J("[nul]"), J("[tru]"), J("[fals]"), J("[True]"), J("[NULL]"), J("nulll"), J("truefalse"), J("n"),
    J("[nullx]"), J("undefined"),
    // numbers
    J("[-]"), J("-"), J("[+1]"), J("[++1]"), J("[--1]"), J("[01]"), J("[-01]"), J("[-012]"), J("[00]"),
    J("[1.]"), J("[.1]"), J("[-.1]"), J("[0.]"), J("[0.e1]"), J("[1.e1]"), J("[2.e+3]"), J("[1e]"),
    J("[1e+]"), J("[1E-]"), J("[0e]"), J("[1eE2]"), J("[1.0e+-2]"), J("[1e1.5]"), J("[1.2.3]"), J("[0x1]"),
    J("[1_000]"), J("[1 000]"), J("[Inf]"), J("[-Infinity]"), J("[NaN]"), J("[-NaN]"), J("[1a]"), J("[1+2]"),
    J("[-1x]"), J("[- 1]"), J("[\xEF\xBC\x91]"), J("1e"), J("1."), J("-a"), J("[1e\xE5]"), J("[0\xE5]"),
    // strings
    J("\""), J("[\""), J("[\"a"), J("'a'"), J("[\"\\\"]"), J("\"\\"), J("[\"a\"b\"]"), J("[\"\\\\\\\"]"),
    J("[\"\\x00\"]"), J("[\"\\a\"]"), J("[\"\\\0\"]"), J("[\"\\ \"]"), J("[\"\\U0061\"]"), J("[\"\\\xE5\"]"),
    J("[\"\\u\"]"), J("[\"\\u00A\"]"), J("[\"\\u00G0\"]"), J("\"\\u00"), J("[\"\\u+0A1\"]"),
    J("[\"\\u 0A1\"]"), J("[\"\n\"]"), J("[\"\t\"]"), J("[\"\x1f\"]"), J("[\"a\0b\"]"), J("[\"12345678\0\"]"),
    J("[\"1234567\n\"]"),
    // half surrogates
    J("[\"\\uDC00\\uDC00\"]"),
    J("[\"\\uD800\"]"), J("[\"\\uDC00\"]"), J("[\"\\uDFFF\"]"), J("[\"\\uD888\\u1234\"]"),
    J("[\"\\uD800\\uD800\"]"), J("[\"\\uD800\\\"]"), J("[\"\\uD800\\u\"]"), J("[\"\\uD800\\u1\"]"),
    J("[\"\\uD800\\n\"]"), J("[\"\\uD834abc\"]"), J("[\"\\uDd1e\\uD834\"]"), J("[\"\\uD800\\x\"]"),
    J("[\"\\uD800\\uE000\"]"),
    // not UTF-8: stray, short, overlong, surrogate, too large, Latin-1, UTF-16
    J("[\"\x80\"]"), J("[\"\xBF\"]"), J("[\"\xFF\"]"), J("[\"\xC2\"]"), J("[\"\xE0\xA0\"]"),
    J("[\"\xF0\x90\x80\"]"), J("[\"\xC0\xAF\"]"), J("[\"\xC1\xBF\"]"), J("[\"\xE0\x9F\xBF\"]"),
    J("[\"\xF0\x8F\xBF\xBF\"]"), J("[\"\xED\xA0\x80\"]"), J("[\"\xED\xBF\xBF\"]"),
    J("[\"\xF4\x90\x80\x80\"]"), J("[\"\xF5\x80\x80\x80\"]"), J("[\"\xFC\x83\xBF\xBF\xBF\xBF\"]"),
    J("[\"\xE4\x28\xA1\"]"), J("[\"\xE4\xA1\x28\"]"), J("[\"\xF0\x90\x80\x28\"]"), J("[\"\xE9t\xE9\"]"),
    J("\"\xE2\x82"), J("\xFF\xFE[\0]\0"), J("\0[\0]"), J("\xE5"), J("[\xFF]"), J("{\"\xB9\":\"0\"}"),
};

#undef J
// clang-format on

// parses a copy in a block of exactly its size, so that AddressSanitizer sees a byte read too far
static Json *json_parse_exact(const char *text, size_t size, JsonArena *arena, char *error, size_t capacity) {
    char *copy = NEW(char, size);
    memcpy(copy, text, size);
    Json *root = json_parse(copy, size, arena, error, capacity);
    free(copy);
    return root;
}

static void test_json_case(const JsonCase *c, int want) {
    char error[256] = "";
    JsonArena arena;
    json_arena_init(&arena);
    int got = json_parse_exact(c->text, c->size, &arena, error, sizeof(error)) != NULL;
    if (!CHECK(got == want)) {
        printf("    %s: %.*s %s\n", want ? "must be accepted" : "must be refused", (int)c->size, c->text,
               error);
    }
    CHECK(want || strstr(error, "line ") == error);
    json_arena_free(&arena);
}

static void test_json_table(void) {
    for (size_t i = 0; i < sizeof(json_accepted) / sizeof(json_accepted[0]); i++) {
        test_json_case(&json_accepted[i], 1);
    }
    for (size_t i = 0; i < sizeof(json_refused) / sizeof(json_refused[0]); i++) {
        test_json_case(&json_refused[i], 0);
    }
}

// every prefix of a valid document that is an object is refused, none is read too far
static void test_json_prefixes(void) {
    const char *text =
        "{\"a\\u00e9\": [1, -2.5e+3, \"x\\ud83d\\ude00 \xE2\x82\xAC\", true, false, null], \"b\": {}}";
    for (size_t size = 0; size < strlen(text); size++) {
        JsonCase c = {text, size};
        test_json_case(&c, 0);
    }
}

static void test_json_depth(void) {
    char text[300];
    JsonCase c = {text, 256};
    memset(text, '[', 128);
    memset(text + 128, ']', 128);
    test_json_case(&c, 1);
    memset(text, '[', 129);
    memset(text + 129, ']', 129);
    c.size = 258;
    test_json_case(&c, 0);
    c.size = 1000000; // only opened
    char *deep = NEW(char, c.size);
    memset(deep, '[', c.size);
    c.text = deep;
    test_json_case(&c, 0);
    free(deep);
}

static int json_text_is(const Json *value, const char *text, size_t size) {
    return value != NULL && value->type == JSON_STRING && value->text_size == size &&
           value->text[size] == '\0' && memcmp(value->text, text, size) == 0;
}

static void test_json_values(void) {
    const char *text =
        "{\"s\": \"a\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20ac\\ud83d\\ude00\", \"zero\": \"a\\u0000b\","
        " \"n\": -12.50e1, \"t\": true, \"f\": false, \"nil\": null, \"a\": [1, [2, 3], {\"x\": 4}],"
        " \"k\\u0000\": 5, \"k\": 6, \"\": 7}";
    char error[256] = "";
    JsonArena arena;
    json_arena_init(&arena);
    const Json *root = json_parse_exact(text, strlen(text), &arena, error, sizeof(error));
    if (!CHECK(root != NULL)) {
        return;
    }
    CHECK(root->type == JSON_OBJECT && root->count == 10);
    CHECK(json_text_is(json_get(root, "s"), "a\"\\/\b\f\n\r\tA\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80", 19));
    CHECK(json_text_is(json_get(root, "zero"), "a\0b", 3));
    CHECK(strcmp(json_get(root, "n")->text, "-12.50e1") == 0 && json_get(root, "n")->text_size == 8);
    CHECK(json_get(root, "t")->type == JSON_BOOL && json_get(root, "t")->boolean == 1);
    CHECK(json_get(root, "f")->type == JSON_BOOL && json_get(root, "f")->boolean == 0);
    CHECK(json_get(root, "nil")->type == JSON_NULL);
    CHECK(json_get(root, "absent") == NULL && json_get(json_get(root, "a"), "x") == NULL &&
          json_get(NULL, "x") == NULL);
    const Json *array = json_get(root, "a");
    CHECK(array->type == JSON_ARRAY && array->count == 3 && array->child->next->count == 2);
    CHECK(strcmp(json_get(array->child->next->next, "x")->text, "4") == 0);
    CHECK(strcmp(json_get(root, "k")->text, "6") == 0 && strcmp(json_get(root, "")->text, "7") == 0);
    CHECK(json_duplicate_key(root) == NULL);
    json_arena_free(&arena);
}

// value: a number's spelling
static void test_json_number(const char *spelling, int is_int, int64_t integer, int is_double, double real) {
    char error[256];
    JsonArena arena;
    json_arena_init(&arena);
    const Json *value = json_parse_exact(spelling, strlen(spelling), &arena, error, sizeof(error));
    int64_t got_int = 0;
    double got_double = 0.0;
    int ok = value != NULL && json_int64(value, &got_int) == is_int &&
             json_double(value, &got_double) == is_double;
    if (!CHECK(ok && (!is_int || got_int == integer) && (!is_double || got_double == real))) {
        printf("    number %s\n", spelling);
    }
    json_arena_free(&arena);
}

static void test_json_numbers(void) {
    test_json_number("0", 1, 0, 1, 0.0);
    test_json_number("-0", 1, 0, 1, 0.0);
    test_json_number("50256", 1, 50256, 1, 50256.0);
    test_json_number("9007199254740993", 1, 9007199254740993, 1, 9007199254740992.0);
    test_json_number("9223372036854775807", 1, INT64_MAX, 1, 9223372036854775808.0);
    test_json_number("-9223372036854775808", 1, INT64_MIN, 1, -9223372036854775808.0);
    test_json_number("9223372036854775808", 0, 0, 1, 9223372036854775808.0);
    test_json_number("-9223372036854775809", 0, 0, 1, -9223372036854775808.0);
    test_json_number("1.0", 0, 0, 1, 1.0);
    test_json_number("1e3", 0, 0, 1, 1000.0);
    test_json_number("1E-5", 0, 0, 1, 1e-5);
    test_json_number("-2.5", 0, 0, 1, -2.5);
    test_json_number("1e999", 0, 0, 0, 0.0);
    test_json_number("-1e999", 0, 0, 0, 0.0);
    test_json_number("1e-999", 0, 0, 1, 0.0);
    test_json_number("\"1\"", 0, 0, 0, 0.0);
}

static void test_json_error(const char *text, const char *want) {
    char error[256] = "";
    JsonArena arena;
    json_arena_init(&arena);
    CHECK(json_parse_exact(text, strlen(text), &arena, error, sizeof(error)) == NULL);
    if (!CHECK(strcmp(error, want) == 0)) {
        printf("    got  %s\n    want %s\n", error, want);
    }
    json_arena_free(&arena);
}

static void test_json_errors(void) {
    test_json_error("", "line 1, column 1: expected a value (the text ends here)");
    test_json_error("{\n  \"a\": 1,\n  \"b\" 2\n}", "line 3, column 7: expected ':' after a name");
    test_json_error("[\"\xE2\x82\xAC\xE2\x82\xAC\", x]", "line 1, column 8: expected a value"); // not bytes
    test_json_error("[1, 02]", "line 1, column 5: malformed number");
    test_json_error("[\"ab\\qc\"]", "line 1, column 5: no such escape in a string");
    test_json_error("[\n\"abc", "line 2, column 1: string without end");
    test_json_error("[\"0123456789\xFF\"]", "line 1, column 13: invalid UTF-8 in a string");
    test_json_error("{} {}", "line 1, column 4: more text after the value");
}

// a string of every length around the eight bytes read at a time, with a special character at every place
static void test_json_scan(void) {
    static const char *const specials[] = {"\\n", "\xC3\xA9", "\\u0041", "\"", "\x01", "\x80"};
    static const char *const values[] = {"\n", "\xC3\xA9", "A", NULL, NULL, NULL};
    JsonArena arena;
    json_arena_init(&arena);
    for (int length = 0; length < 20; length++) {
        for (int place = 0; place <= length; place++) {
            for (int i = 0; i < 6; i++) {
                char text[64], want[64], error[256];
                const char *plain = "abcdefghijklmnopqrstuvwxyz";
                int n = snprintf(text, sizeof(text), "\"%.*s%s%.*s\"", place, plain, specials[i],
                                 length - place, plain + place);
                const Json *value = json_parse_exact(text, (size_t)n, &arena, error, sizeof(error));
                if (values[i] == NULL) {
                    CHECK(value == NULL);
                } else {
                    n = snprintf(want, sizeof(want), "%.*s%s%.*s", place, plain, values[i], length - place,
                                 plain + place);
                    CHECK(json_text_is(value, want, (size_t)n));
                }
                json_arena_reset(&arena);
            }
        }
    }
    json_arena_free(&arena);
}

static void test_json_duplicates(void) {
    char error[256];
    JsonArena arena;
    json_arena_init(&arena);
    const char *twice = "{\"a\":1,\"b\":2,\"ab\":3,\"\\u0062\":4}";
    const Json *root = json_parse_exact(twice, strlen(twice), &arena, error, sizeof(error));
    CHECK(root != NULL && json_duplicate_key(root) != NULL && strcmp(json_duplicate_key(root), "b") == 0);
    CHECK(json_duplicate_key(root->child) == NULL);
    const char *once = "{\"a\":1,\"a\\u0000\":2,\"A\":3,\"\":4}";
    root = json_parse_exact(once, strlen(once), &arena, error, sizeof(error));
    CHECK(root != NULL && json_duplicate_key(root) == NULL);
    json_arena_free(&arena);
}

// many documents in one arena: it grows to what one needs and no further
static void test_json_reuse(void) {
    enum { MEMBERS = 20000 };
    char error[256];
    char *text = NEW(char, 16 * MEMBERS);
    size_t total = 0;
    JsonArena arena;
    json_arena_init(&arena);
    for (int round = 0; round < 5; round++) {
        size_t size = 0;
        text[size++] = '[';
        for (int i = 0; i < MEMBERS; i++) {
            size += (size_t)sprintf(text + size, "%s\"%d\"", i ? "," : "", i + round);
        }
        text[size++] = ']';
        const Json *root = json_parse(text, size, &arena, error, sizeof(error));
        int wrong = root == NULL || root->count != MEMBERS;
        const Json *member = wrong ? NULL : root->child;
        for (int i = 0; i < MEMBERS && !wrong; i++, member = member->next) {
            wrong = atoi(member->text) != i + round;
        }
        CHECK(!wrong);
        json_arena_reset(&arena);
        CHECK(arena.total > size && (round < 2 || arena.total == total));
        total = arena.total;
    }
    json_arena_free(&arena);
    free(text);
}

static void test_json_written(void) {
    const char *text =
        "quote \" backslash \\ line\n tab\t nul\0 bell\a \x7f \xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80 /";
    size_t size = 49;
    char written[256], error[256];
    JsonArena arena;
    json_arena_init(&arena);
    FILE *file = tmpfile();
    json_write_string(file, text, size);
    long n = ftell(file);
    rewind(file);
    CHECK(fread(written, 1, (size_t)n, file) == (size_t)n);
    fclose(file);
    CHECK(json_text_is(json_parse_exact(written, (size_t)n, &arena, error, sizeof(error)), text, size));
    file = tmpfile();
    json_write_string(file, "a\xFF\xE2\x82z", 5); // what is not UTF-8 is replaced, the rest kept
    n = ftell(file);
    rewind(file);
    CHECK(fread(written, 1, (size_t)n, file) == (size_t)n);
    fclose(file);
    const Json *root = json_parse_exact(written, (size_t)n, &arena, error, sizeof(error));
    CHECK(json_text_is(root, "a\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz", 11));
    json_arena_free(&arena);
}

static void json_parse_file_of(void *path) {
    JsonArena arena;
    json_arena_init(&arena);
    json_parse_file((const char *)path, &arena, "make sample");
}

static void test_json_files(void) {
    char path[] = "build/test/bad.json";
    char absent[] = "build/test/absent.json";
    char folder[] = "build/test";
    CHECK(system("mkdir -p build/test && printf '{\\n\"a\": 1,}' > build/test/bad.json") == 0);
    check_dies(1, "build/test/bad.json is not valid JSON: line 2, column 8: expected a name in quotes",
               json_parse_file_of, path);
    check_dies(1, "---> make sample", json_parse_file_of, path);
    check_dies(1, "cannot open build/test/absent.json", json_parse_file_of, absent);
    check_dies(1, "cannot read build/test", json_parse_file_of, folder);
}

// what the fuzzer once found, and its seeds: parsed or refused
static void test_json_fuzz_corpus(void) {
    glob_t found;
    CHECK(glob("dev/fuzz/corpus/json/*", 0, NULL, &found) == 0);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char error[256] = "";
        size_t size;
        JsonArena arena;
        json_arena_init(&arena);
        char *text = check_read_file(found.gl_pathv[i], &size, "");
        const Json *root = json_parse_exact(text, size, &arena, error, sizeof(error));
        CHECK(root != NULL || strstr(error, "line ") == error);
        json_arena_free(&arena);
        free(text);
    }
    globfree(&found);
}

static void test_json(void) {
    test_json_table();
    test_json_prefixes();
    test_json_depth();
    test_json_values();
    test_json_numbers();
    test_json_errors();
    test_json_scan();
    test_json_duplicates();
    test_json_reuse();
    test_json_written();
    test_json_files();
    test_json_fuzz_corpus();
}

#endif
