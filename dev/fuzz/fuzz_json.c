// json_parser.h, json.h: any bytes are parsed or refused; what is parsed, written and parsed again is the same.
#include "fuzz.h"
#include "llmc/files/json.h"

static void print_value(FILE *out, const Json *value) {
    const char *const words[] = {"null", value->boolean ? "true" : "false"};
    if (value->type == JSON_NULL || value->type == JSON_BOOL) {
        fputs(words[value->type], out);
    } else if (value->type == JSON_NUMBER) {
        fwrite(value->text, 1, value->text_size, out);
    } else if (value->type == JSON_STRING) {
        json_write_string(out, value->text, value->text_size);
    } else {
        fputc(value->type == JSON_OBJECT ? '{' : '[', out);
        for (const Json *member = value->child; member != NULL; member = member->next) {
            if (value->type == JSON_OBJECT) {
                json_write_string(out, member->key, member->key_size);
                fputc(':', out);
            }
            print_value(out, member);
            fputs(member->next != NULL ? ", " : "", out);
        }
        fputc(value->type == JSON_OBJECT ? '}' : ']', out);
    }
}

static void check_same(const Json *a, const Json *b) {
    FUZZ_CHECK(a->type == b->type && a->boolean == b->boolean && a->count == b->count);
    FUZZ_CHECK(a->key_size == b->key_size && a->text_size == b->text_size);
    FUZZ_CHECK(a->key_size == 0 || memcmp(a->key, b->key, a->key_size + 1) == 0);
    FUZZ_CHECK(a->text_size == 0 || memcmp(a->text, b->text, a->text_size + 1) == 0);
    const Json *x = a->child, *y = b->child;
    for (size_t i = 0; i < a->count; i++, x = x->next, y = y->next) {
        check_same(x, y);
    }
    FUZZ_CHECK(x == NULL && y == NULL);
}

static void read_values(const Json *value) {
    int64_t integer;
    double real;
    FUZZ_CHECK(!json_int64(value, &integer) || json_double(value, &real));
    FUZZ_CHECK(json_duplicate_key(value) == NULL || value->count > 1);
    for (const Json *member = value->child; member != NULL; member = member->next) {
        read_values(member);
    }
}

static void check_written_again(const Json *root, JsonArena *arena) {
    char *text = NULL, error[256];
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    print_value(out, root);
    fclose(out);
    const Json *again = json_parse(text, size, arena, error, sizeof(error));
    FUZZ_CHECK(again != NULL);
    check_same(root, again);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char error[256] = "";
    JsonArena arena;
    json_arena_init(&arena);
    if (setjmp(fuzz_died) == 0) {
        const Json *root = json_parse((const char *)data, size, &arena, error, sizeof(error));
        FUZZ_CHECK(root != NULL || strncmp(error, "line ", 5) == 0);
        if (root != NULL) {
            read_values(root);
            check_written_again(root, &arena);
        }
    } else {
        FUZZ_CHECK(!"the parser never dies");
    }
    json_arena_free(&arena);
    return 0;
}
