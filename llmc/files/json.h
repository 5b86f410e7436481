/*
JSON: what the readers and writers of config.json, state.json, log.jsonl, vocab.json and safetensors headers
share. Text becomes a tree in json_parser.h; here are a whole file, an object's members, numbers, and strings
on their way out. Repeated keys are the caller's to refuse (json_duplicate_key).

Shapes: none. Errors: json_parse_file and json_parse_text die, with line and column; json_int64 and
json_double return 0.
*/
#ifndef JSON_H
#define JSON_H

#include "llmc/files/json_parser.h"

// ----------------------------------------------------------------------------
// reading

// a whole file's text; path: for the message
static inline Json *json_parse_text(const char *text, size_t size, JsonArena *arena, const char *path,
                                    const char *hint) {
    char error[256];
    Json *root = json_parse(text, size, arena, error, sizeof(error));
    if (root == NULL) {
        die("%s is not valid JSON: %s%s%s", path, error, hint[0] ? "\n  ---> " : "", hint);
    }
    return root;
}

static inline Json *json_parse_file(const char *path, JsonArena *arena, const char *hint) {
    size_t size;
    char *text = check_read_file(path, &size, hint);
    Json *root = json_parse_text(text, size, arena, path, hint);
    free(text);
    return root;
}

// NULL when absent, or when object is not one
static inline const Json *json_get(const Json *object, const char *key) {
    size_t size = strlen(key);
    if (object == NULL || object->type != JSON_OBJECT) {
        return NULL;
    }
    for (const Json *member = object->child; member != NULL; member = member->next) {
        if (member->key_size == size && memcmp(member->key, key, size) == 0) {
            return member;
        }
    }
    return NULL;
}

static inline int json_compare_keys(const void *a, const void *b) {
    const Json *x = *(const Json *const *)a;
    const Json *y = *(const Json *const *)b;
    int order = memcmp(x->key, y->key, x->key_size < y->key_size ? x->key_size : y->key_size);
    return order != 0 ? order : (x->key_size > y->key_size) - (x->key_size < y->key_size);
}

// a name that stands twice in the object, or NULL
static inline const char *json_duplicate_key(const Json *object) {
    const char *found = NULL;
    size_t n = 0;
    if (object->type != JSON_OBJECT) {
        return NULL;
    }
    const Json **members = NEW(const Json *, object->count);
    for (const Json *member = object->child; member != NULL; member = member->next) {
        members[n++] = member;
    }
    qsort(members, n, sizeof(members[0]), json_compare_keys);
    for (size_t i = 1; i < n && found == NULL; i++) {
        if (json_compare_keys(&members[i - 1], &members[i]) == 0) {
            found = members[i]->key;
        }
    }
    free(members);
    return found;
}

// 1 if the value is spelled as an integer and fits
static inline int json_int64(const Json *value, int64_t *out) {
    if (value == NULL || value->type != JSON_NUMBER || strpbrk(value->text, ".eE") != NULL) {
        return 0;
    }
    errno = 0;
    long long number = strtoll(value->text, NULL, 10);
    if (errno == ERANGE) {
        return 0;
    }
    *out = (int64_t)number;
    return 1;
}

// 1 if the value is a number that a double can hold (1e999 cannot be)
static inline int json_double(const Json *value, double *out) {
    if (value == NULL || value->type != JSON_NUMBER) {
        return 0;
    }
    double number = strtod(value->text, NULL);
    if (number - number != 0.0) {
        return 0;
    }
    *out = number;
    return 1;
}

// is the value this text? (It may hold a zero byte)
static inline int json_is_text(const Json *value, const char *text) {
    return value != NULL && value->type == JSON_STRING && value->text_size == strlen(text) &&
           memcmp(value->text, text, value->text_size) == 0;
}

// ----------------------------------------------------------------------------
// writing

// quoted and escaped; bytes that are not UTF-8 become U+FFFD, so that the result is always valid
static inline void json_write_string(FILE *file, const char *text, size_t size) {
    const unsigned char *p = (const unsigned char *)text;
    const unsigned char *end = size > 0 ? p + size : p; // a text of nothing may be NULL
    fputc('"', file);
    while (p < end) {
        size_t n = json_utf8_size(p, end);
        if (n == 0) {
            fputs("\xEF\xBF\xBD", file);
            n = 1;
        } else if (*p == '"' || *p == '\\') {
            fprintf(file, "\\%c", *p);
        } else if (*p == '\n') {
            fputs("\\n", file);
        } else if (*p < 0x20) {
            fprintf(file, "\\u%04x", *p);
        } else {
            fwrite(p, 1, n, file);
        }
        p += n;
    }
    fputc('"', file);
}

#endif
