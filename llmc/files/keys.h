/*
The fields of a struct as keys of a JSON object. A format is one table of rows (config_file.h, state_file.h),
which its writer and its reader both walk: what is written is what is read back, and a new key is one line.

    KEY_INTEGER    int or int64_t
    KEY_REAL       float or double
    KEY_FLAG       int: true or false, read from 1 or 0 too
    KEY_TOKEN      int: a token's id, or -1 where there is none, written as null; what is no id reads as -1
    KEY_NAME       an enum by its name, which the format writes and reads itself
    KEY_CONSTANT   no field: `text`, the one value that this program knows; any other must be refused
    KEY_NOTE       no field: `text`, written for other readers

Shapes: none. Errors: key_read says what is wrong with a value, and the format words the message.
*/
#ifndef KEYS_H
#define KEYS_H

#include "llmc/files/json.h"
#include <math.h>
#include <stddef.h>
// defines: NAN, isnan, offsetof

typedef enum { KEY_INTEGER, KEY_REAL, KEY_FLAG, KEY_TOKEN, KEY_NAME, KEY_CONSTANT, KEY_NOTE } KeyKind;

typedef struct {
    const char *name;
    KeyKind kind;
    unsigned models;     // bit m: a model whose router is method m has this key
    size_t offset, size; // of the field in the struct
    double least, most;
    double absent;    // what a file without the key means, or KEY_REQUIRED
    int digits;       // of a real number, written
    const char *text; // of a constant or note: its JSON
} Key;

#define KEY_EVERY_MODEL (~0u)
#define KEY_REQUIRED NAN

// a row for a field of a struct, and one for a key without a field
#define KEY_ROW(type, kind, models, name, field, least, most, absent, digits)                                \
    {                                                                                                        \
        name, KEY_##kind, models, offsetof(type, field), sizeof(((type *)0)->field), least, most, absent,    \
            digits, NULL                                                                                     \
    }
#define KEY_TEXT_ROW(kind, models, name, text)                                                               \
    { name, KEY_##kind, models, 0, 0, 0, 0, 0, 0, text }

static inline int key_is_of(const Key *key, int method) {
    return key->models >> method & 1;
}

static inline double key_real(const Key *key, const void *field) {
    float narrow;
    double wide;
    if (key->size == sizeof(narrow)) {
        memcpy(&narrow, field, sizeof(narrow));
        return narrow;
    }
    memcpy(&wide, field, sizeof(wide));
    return wide;
}

static inline int64_t key_integer(const Key *key, const void *field) {
    int narrow;
    int64_t wide;
    if (key->size == sizeof(narrow)) {
        memcpy(&narrow, field, sizeof(narrow));
        return narrow;
    }
    memcpy(&wide, field, sizeof(wide));
    return wide;
}

// the value alone
static inline void key_write(FILE *file, const Key *key, const void *object) {
    const void *field = (const char *)object + key->offset;
    if (key->kind == KEY_CONSTANT || key->kind == KEY_NOTE) {
        fputs(key->text, file);
    } else if (key->kind == KEY_FLAG) {
        fputs(key_integer(key, field) ? "true" : "false", file);
    } else if (key->kind == KEY_REAL) {
        fprintf(file, "%.*g", key->digits, key_real(key, field));
    } else if (key->kind == KEY_TOKEN && key_integer(key, field) < 0) {
        fputs("null", file);
    } else {
        fprintf(file, "%lld", (long long)key_integer(key, field));
    }
}

// a number between least and most: as an integer below 2^53, which a double holds exactly
static inline void key_store(const Key *key, void *object, double number) {
    void *field = (char *)object + key->offset;
    if (key->kind == KEY_REAL && key->size == sizeof(float)) {
        float narrow = (float)number;
        memcpy(field, &narrow, sizeof(narrow));
    } else if (key->kind == KEY_REAL) {
        memcpy(field, &number, sizeof(number));
    } else if (key->size == sizeof(int)) {
        int narrow = (int)number;
        memcpy(field, &narrow, sizeof(narrow));
    } else {
        int64_t wide = (int64_t)number;
        memcpy(field, &wide, sizeof(wide));
    }
}

// where a constant is absent it is the one that we know; null says false
static inline int key_is_constant(const Json *value, const char *text) {
    if (value == NULL) {
        return 1;
    }
    if (strcmp(text, "false") == 0) {
        return value->type == JSON_NULL || (value->type == JSON_BOOL && !value->boolean);
    }
    return value->type == JSON_STRING && value->text_size + 2 == strlen(text) && // 2: the quotes of `text`
           memcmp(value->text, text + 1, value->text_size) == 0;
}

typedef enum { KEY_IS_GOOD, KEY_IS_UNUSABLE, KEY_IS_NO_INTEGER } KeyResult;

// stores a value in its field; value NULL: the key is absent
static inline KeyResult key_read(const Json *value, const Key *key, void *object) {
    double number = key->absent;
    int64_t integer;
    if (key->kind == KEY_NAME || key->kind == KEY_NOTE) {
        return KEY_IS_GOOD;
    }
    if (key->kind == KEY_CONSTANT) {
        return key_is_constant(value, key->text) ? KEY_IS_GOOD : KEY_IS_UNUSABLE;
    }
    if (value == NULL && isnan(key->absent)) {
        return KEY_IS_UNUSABLE;
    }
    if (value != NULL && key->kind == KEY_FLAG && value->type == JSON_BOOL) {
        number = value->boolean;
    } else if (key->kind == KEY_TOKEN) { // others write null, or a list of ids
        int is_id = json_int64(value, &integer) && integer >= key->least && integer <= key->most;
        number = is_id ? (double)integer : key->absent;
    } else if (value != NULL) {
        if (!json_double(value, &number) || number < key->least || number > key->most) {
            return KEY_IS_UNUSABLE;
        }
        if (key->kind != KEY_REAL && !json_int64(value, &integer)) {
            return KEY_IS_NO_INTEGER;
        }
    }
    key_store(key, object, number);
    return KEY_IS_GOOD;
}

#endif
