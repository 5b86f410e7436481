/*
Bytes as JSON, and back, unchanged: for paths, which may hold any byte but 0, where JSON holds UTF-8 alone.

A byte that belongs to no UTF-8 character is spelled \xE9 inside the string (in the file "\\xE9"), and so is a
backslash that would otherwise be read as the beginning of one. All other text stands for itself.

Shapes: none. Errors: none.
*/
#ifndef JSON_BYTES_H
#define JSON_BYTES_H

#include "llmc/files/json.h"

// the value of a \xE9 at text, or -1
static inline int json_byte_escape(const char *text, size_t size) {
    if (size < 4 || text[0] != '\\' || text[1] != 'x') {
        return -1;
    }
    int value = 0;
    for (int i = 2; i < 4; i++) {
        const char *digits = "0123456789ABCDEF";
        const char *digit = text[i] != '\0' ? strchr(digits, text[i]) : NULL;
        if (digit == NULL) {
            return -1;
        }
        value = 16 * value + (int)(digit - digits);
    }
    return value;
}

// the spelling, which is UTF-8, without quotes, for the caller to free
static inline char *json_spell_bytes(const char *text, size_t size) {
    char *spelled = GROW(char, NULL, 4 * size + 1);
    size_t n = 0;
    const char *end = text + size;
    while (text < end) {
        size_t bytes = json_utf8_size((const unsigned char *)text, (const unsigned char *)end);
        if (bytes == 0 || json_byte_escape(text, (size_t)(end - text)) >= 0) {
            n += (size_t)sprintf(spelled + n, "\\x%02X", (unsigned char)*text);
            bytes = 1;
        } else {
            memcpy(spelled + n, text, bytes);
            n += bytes;
        }
        text += bytes;
    }
    spelled[n] = '\0';
    return spelled;
}

static inline void json_write_bytes(FILE *file, const char *text, size_t size) {
    char *spelled = json_spell_bytes(text, size);
    json_write_string(file, spelled, strlen(spelled));
    free(spelled);
}

// what json_write_bytes() was given, out of the parsed string: n bytes and a 0, for the caller to free
static inline char *json_read_bytes(const char *spelled, size_t size, size_t *n) {
    char *text = GROW(char, NULL, size + 1);
    *n = 0;
    for (size_t at = 0; at < size;) {
        int byte = json_byte_escape(spelled + at, size - at);
        text[(*n)++] = byte >= 0 ? (char)byte : spelled[at];
        at += byte >= 0 ? 4 : 1;
    }
    text[*n] = '\0';
    return text;
}

#endif
