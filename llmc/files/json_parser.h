/*
JSON text to a tree (RFC 8259), strict: what the RFC forbids is an error with line and column, never guessed
at.

A document becomes a tree of Json nodes in an arena that owns every byte of it, so that the text may be freed
at once, and a reader of JSON Lines resets one arena per line and allocates nothing. Members stand in file
order. Strings must be UTF-8 without lone surrogates; \u0000 is kept, hence the sizes beside every text. At
most JSON_MAX_DEPTH levels deep.

Shapes: none. Errors: json_parse returns NULL and describes "line 3, column 7: cause".
*/
#ifndef JSON_PARSER_H
#define JSON_PARSER_H

#include "llmc/check.h"

#define JSON_MAX_DEPTH 128

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct Json {
    JsonType type;
    int boolean;
    const char *key; // in an object: the unescaped name, 0-terminated (key_size does not count the 0)
    size_t key_size;
    const char *text; // string: unescaped bytes, 0-terminated; number: its spelling in the file, 0-terminated
    size_t text_size;
    struct Json *child; // first member of an array or object
    struct Json *next;  // next member of the same array or object
    size_t count;       // number of members
} Json;

// ----------------------------------------------------------------------------
// arena

typedef struct JsonBlock {
    struct JsonBlock *next;
    size_t capacity; // bytes that follow this struct
} JsonBlock;

typedef struct JsonArena {
    JsonBlock *blocks; // the newest first
    size_t used;       // bytes of the newest
    size_t total;      // capacity of all
} JsonArena;

static inline void json_arena_init(JsonArena *arena) {
    memset(arena, 0, sizeof(*arena));
}

static inline void json_arena_free(JsonArena *arena) {
    while (arena->blocks != NULL) {
        JsonBlock *next = arena->blocks->next;
        free(arena->blocks);
        arena->blocks = next;
    }
    json_arena_init(arena);
}

static inline void json_arena_add_block(JsonArena *arena, size_t capacity) {
    JsonBlock *block = (JsonBlock *)check_realloc(NULL, sizeof(JsonBlock) + capacity, 1);
    block->next = arena->blocks;
    block->capacity = capacity;
    arena->blocks = block;
    arena->used = 0;
    arena->total += capacity;
}

// forgets the contents and keeps the memory, as one block: documents alike need no second one
static inline void json_arena_reset(JsonArena *arena) {
    if (arena->blocks != NULL && arena->blocks->next != NULL) {
        size_t total = arena->total;
        json_arena_free(arena);
        json_arena_add_block(arena, total);
    }
    arena->used = 0;
}

static inline void *json_arena_take(JsonArena *arena, size_t size) {
    size = (size + 15) & ~(size_t)15;
    if (arena->blocks == NULL || arena->blocks->capacity - arena->used < size) {
        size_t capacity = arena->total > 65536 ? arena->total : 65536; // doubles
        json_arena_add_block(arena, capacity > size ? capacity : size);
    }
    char *p = (char *)(arena->blocks + 1) + arena->used;
    arena->used += size;
    return p;
}

// ----------------------------------------------------------------------------
// parser: each function starts at s->p, leaves it behind what it read, and returns 0 after json_fail

typedef struct {
    const unsigned char *p;   // next byte
    const unsigned char *end; // behind the last
    char *out;                // where the next unescaped text goes
    JsonArena *arena;
    const char *cause; // of the error at p
} JsonParser;

static inline int json_fail(JsonParser *s, const unsigned char *at, const char *cause) {
    s->p = at;
    s->cause = cause;
    return 0;
}

static inline void json_skip_space(JsonParser *s) {
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\n' || *s->p == '\r' || *s->p == '\t')) {
        s->p++;
    }
}

// bytes of the UTF-8 character at p, 0 when it is not one
static inline size_t json_utf8_size(const unsigned char *p, const unsigned char *end) {
    unsigned c = p[0];
    if (c < 0x80) {
        return 1;
    }
    size_t n = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    if (c < 0xC2 || c > 0xF4 || (size_t)(end - p) < n) {
        return 0;
    }
    // the second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF
    unsigned low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    unsigned high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if (p[1] < low || p[1] > high || (n > 2 && (p[2] & 0xC0) != 0x80) || (n > 3 && (p[3] & 0xC0) != 0x80)) {
        return 0;
    }
    return n;
}

static inline char *json_put_utf8(char *out, unsigned code) {
    if (code < 0x80) {
        *out++ = (char)code;
        return out;
    }
    if (code < 0x800) {
        *out++ = (char)(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            *out++ = (char)(0xE0 | code >> 12);
        } else {
            *out++ = (char)(0xF0 | code >> 18);
            *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        }
        *out++ = (char)(0x80 | (code >> 6 & 0x3F));
    }
    *out++ = (char)(0x80 | (code & 0x3F));
    return out;
}

// the value of \uXXXX at p, or -1
static inline int json_hex4(const unsigned char *p, const unsigned char *end) {
    int value = 0;
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') {
        return -1;
    }
    for (int i = 2; i < 6; i++) {
        int c = p[i];
        int letter = c | 0x20;
        if (c >= '0' && c <= '9') {
            value = 16 * value + c - '0';
        } else if (letter >= 'a' && letter <= 'f') {
            value = 16 * value + letter - 'a' + 10;
        } else {
            return -1;
        }
    }
    return value;
}

static inline int json_unicode_escape(JsonParser *s) {
    int code = json_hex4(s->p, s->end);
    if (code < 0) {
        return json_fail(s, s->p, "\\u needs four hexadecimal digits");
    }
    size_t size = 6;
    if (code >= 0xD800 && code <= 0xDFFF) {
        int low = json_hex4(s->p + 6, s->end);
        if (code >= 0xDC00 || low < 0xDC00 || low > 0xDFFF) {
            return json_fail(s, s->p, "half of a surrogate pair in a string");
        }
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        size = 12;
    }
    s->out = json_put_utf8(s->out, (unsigned)code);
    s->p += size;
    return 1;
}

static inline int json_escape(JsonParser *s) {
    static const char names[] = "\"\\/bfnrt";
    static const char values[] = "\"\\/\b\f\n\r\t";
    int c = s->end - s->p >= 2 ? s->p[1] : 0;
    if (c == 'u') {
        return json_unicode_escape(s);
    }
    const char *name = c != 0 ? strchr(names, c) : NULL;
    if (name == NULL) {
        return json_fail(s, s->p, "no such escape in a string");
    }
    *s->out++ = values[name - names];
    s->p += 2;
    return 1;
}

// high bit of each byte that is '"', '\\', a control character or not ASCII; exact up to the lowest one set
static inline uint64_t json_special_bytes(uint64_t word) {
    const uint64_t ones = 0x0101010101010101u;
    uint64_t quote = word ^ ones * '"';
    uint64_t backslash = word ^ ones * '\\';
    uint64_t found =
        ((quote - ones) & ~quote) | ((backslash - ones) & ~backslash) | (word - ones * 0x20) | word;
    return found & ones * 0x80;
}

// copies plain characters, eight at a time, up to the next special one
static inline void json_copy_plain(JsonParser *s) {
    const unsigned char *p = s->p;
    char *out = s->out;
    uint64_t special = 0;
    while (special == 0 && s->end - p >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        memcpy(out, &word, 8); // too much at the end: the buffer has room, the next text overwrites it
        special = json_special_bytes(word);
        int n = special == 0 ? 8 : __builtin_ctzll(special) >> 3;
        p += n;
        out += n;
    }
    while (special == 0 && p < s->end && *p >= 0x20 && *p < 0x80 && *p != '"' && *p != '\\') {
        *out++ = (char)*p++;
    }
    s->p = p;
    s->out = out;
}

// after the opening quote
static inline int json_string(JsonParser *s, const char **text, size_t *size) {
    const unsigned char *opening = s->p - 1;
    const char *start = s->out;
    for (;;) {
        json_copy_plain(s);
        if (s->p == s->end) {
            return json_fail(s, opening, "string without end");
        }
        if (*s->p == '"') {
            break;
        }
        if (*s->p == '\\') {
            if (!json_escape(s)) {
                return 0;
            }
            continue;
        }
        if (*s->p < 0x20) {
            return json_fail(s, s->p, "control character in a string");
        }
        while (s->p < s->end && *s->p >= 0x80) {
            size_t n = json_utf8_size(s->p, s->end);
            if (n == 0) {
                return json_fail(s, s->p, "invalid UTF-8 in a string");
            }
            for (size_t i = 0; i < n; i++) {
                *s->out++ = (char)*s->p++;
            }
        }
    }
    s->p++;
    *text = start;
    *size = (size_t)(s->out - start);
    *s->out++ = '\0';
    return 1;
}

static inline int json_digits(JsonParser *s) {
    const unsigned char *start = s->p;
    while (s->p < s->end && *s->p >= '0' && *s->p <= '9') {
        s->p++;
    }
    return s->p > start;
}

static inline int json_number(JsonParser *s, Json *node) {
    const unsigned char *start = s->p;
    s->p += *s->p == '-';
    const unsigned char *first = s->p;
    int ok = json_digits(s) && (*first != '0' || s->p - first == 1);
    if (ok && s->p < s->end && *s->p == '.') {
        s->p++;
        ok = json_digits(s);
    }
    if (ok && s->p < s->end && (*s->p == 'e' || *s->p == 'E')) {
        s->p++;
        s->p += s->p < s->end && (*s->p == '+' || *s->p == '-');
        ok = json_digits(s);
    }
    if (!ok) {
        return json_fail(s, start, "malformed number");
    }
    node->type = JSON_NUMBER;
    node->text = s->out;
    node->text_size = (size_t)(s->p - start);
    memcpy(s->out, start, node->text_size);
    s->out[node->text_size] = '\0';
    s->out += node->text_size + 1;
    return 1;
}

static inline int json_word(JsonParser *s, const char *word) {
    size_t n = strlen(word);
    if ((size_t)(s->end - s->p) < n || memcmp(s->p, word, n) != 0) {
        return json_fail(s, s->p, "expected a value");
    }
    s->p += n;
    return 1;
}

static inline int json_value(JsonParser *s, Json *node, int depth);

// the name of an object's member and its colon
static inline int json_member_name(JsonParser *s, Json *member) {
    json_skip_space(s);
    if (s->p == s->end || *s->p != '"') {
        return json_fail(s, s->p, "expected a name in quotes");
    }
    s->p++;
    if (!json_string(s, &member->key, &member->key_size)) {
        return 0;
    }
    json_skip_space(s);
    if (s->p == s->end || *s->p != ':') {
        return json_fail(s, s->p, "expected ':' after a name");
    }
    s->p++;
    return 1;
}

// after the opening bracket of an array or object
static inline int json_members(JsonParser *s, Json *node, unsigned char closing, int depth) {
    Json **link = &node->child;
    json_skip_space(s);
    if (s->p < s->end && *s->p == closing) {
        s->p++;
        return 1;
    }
    for (;;) {
        Json *member = (Json *)json_arena_take(s->arena, sizeof(Json));
        memset(member, 0, sizeof(*member));
        if (closing == '}' && !json_member_name(s, member)) {
            return 0;
        }
        if (!json_value(s, member, depth)) {
            return 0;
        }
        *link = member;
        link = &member->next;
        node->count++;
        json_skip_space(s);
        if (s->p == s->end || (*s->p != ',' && *s->p != closing)) {
            return json_fail(s, s->p, closing == '}' ? "expected ',' or '}'" : "expected ',' or ']'");
        }
        if (*s->p++ == closing) {
            return 1;
        }
    }
}

static inline int json_value(JsonParser *s, Json *node, int depth) {
    json_skip_space(s);
    int c = s->p < s->end ? *s->p : 0;
    if (c == '-' || (c >= '0' && c <= '9')) {
        return json_number(s, node);
    }
    if (c == '"') {
        s->p++;
        node->type = JSON_STRING;
        return json_string(s, &node->text, &node->text_size);
    }
    if (c == '{' || c == '[') {
        if (depth == JSON_MAX_DEPTH) {
            static_assert(JSON_MAX_DEPTH == 128, "the message says so");
            return json_fail(s, s->p, "nested deeper than 128 levels");
        }
        s->p++;
        node->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        return json_members(s, node, c == '{' ? '}' : ']', depth + 1);
    }
    if (c == 't' || c == 'f') {
        node->type = JSON_BOOL;
        node->boolean = c == 't';
        return json_word(s, c == 't' ? "true" : "false");
    }
    node->type = JSON_NULL;
    return json_word(s, "null");
}

static inline int json_document(JsonParser *s, Json *root) {
    if (!json_value(s, root, 0)) {
        return 0;
    }
    json_skip_space(s);
    if (s->p < s->end) {
        return json_fail(s, s->p, "more text after the value");
    }
    return 1;
}

static inline void json_describe_error(const JsonParser *s, const char *text, char *error, size_t capacity) {
    size_t line = 1, column = 1;
    for (const unsigned char *p = (const unsigned char *)text; p < s->p; p++) {
        if (*p == '\n') {
            line++;
            column = 1;
        } else {
            column += (*p & 0xC0) != 0x80; // characters, not bytes
        }
    }
    const char *cut = s->p == s->end ? " (the text ends here)" : "";
    snprintf(error, capacity, "line %zu, column %zu: %s%s", line, column, s->cause, cut);
}

// NULL on error, described in error; the text need not end with a 0
static inline Json *json_parse(const char *text, size_t size, JsonArena *arena, char *error,
                               size_t capacity) {
    JsonParser s;
    s.p = (const unsigned char *)text;
    s.end = s.p + size;
    s.arena = arena;
    s.cause = "";
    // a string and its 0 take no more than the string and its quotes in the file, a number and its 0 no more
    // than the number and what follows: one buffer holds all texts; 8 more for json_copy_plain
    s.out = (char *)json_arena_take(arena, size + 1 + 8);
    Json *root = (Json *)json_arena_take(arena, sizeof(Json));
    memset(root, 0, sizeof(*root));
    if (json_document(&s, root)) {
        return root;
    }
    json_describe_error(&s, text, error, capacity);
    return NULL;
}

#endif
