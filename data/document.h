/*
A record (corpus.h) to a document: its text, and the domain that it counts for.

    JSON Lines   the string under text_key, "text" by default; the domain is meta.pile_set_name, as the Pile
                 has it, else the file's
    text         the record as it is; the domain is the file's

Shapes: none. Errors: a record that is no document is the caller's to count.
*/
#ifndef DOCUMENT_H
#define DOCUMENT_H

#include "data/corpus.h"
#include "llmc/files/json.h"

enum { DOCUMENT_NAMES_SHOWN = 5 };

typedef struct {
    const char *text;
    size_t size;
    char domain[DOMAIN_SIZE];
} Document;

static inline int document_is_plain_name(const char *name, size_t size) {
    size_t i = 0;
    while (i < size && (isalnum((unsigned char)name[i]) || name[i] == '_' || name[i] == '-')) {
        i++;
    }
    return i == size && size > 0 && size <= 32;
}

// no "text", but "content", "id": what --text-key could be
static inline void document_name_keys(const Json *object, const char *text_key, char *error,
                                      size_t capacity) {
    size_t used = (size_t)snprintf(error, capacity, "no \"%s\"", text_key);
    int shown = 0;
    for (const Json *member = object->child; member != NULL && shown < DOCUMENT_NAMES_SHOWN;
         member = member->next) {
        if (used < capacity && document_is_plain_name(member->key, member->key_size)) {
            used += (size_t)snprintf(error + used, capacity - used, "%s \"%s\"", shown++ ? "," : ", but",
                                     member->key);
        }
    }
}

// 1 and the document, which lives in the record and the arena; or 0 and the cause
static inline int document_parse(const Input *input, const char *text_key, const CorpusRecord *record,
                                 JsonArena *arena, Document *document, char *error, size_t capacity) {
    memcpy(document->domain, input->domain, sizeof(document->domain));
    if (input->kind == INPUT_TEXT) {
        document->text = record->bytes;
        document->size = record->size;
        return 1;
    }
    char cause[256];
    json_arena_reset(arena);
    const Json *root = json_parse(record->bytes, record->size, arena, cause, sizeof(cause));
    if (root == NULL) {
        snprintf(error, capacity, "%s", cause + strlen("line 1, ")); // the record's line is the file's
        return 0;
    }
    const Json *text = json_get(root, text_key);
    if (root->type != JSON_OBJECT) {
        snprintf(error, capacity, "not an object");
        return 0;
    }
    if (text == NULL) {
        document_name_keys(root, text_key, error, capacity);
        return 0;
    }
    if (text->type != JSON_STRING) {
        snprintf(error, capacity, "\"%s\" is not a string", text_key);
        return 0;
    }
    document->text = text->text;
    document->size = text->text_size;
    const Json *domain = json_get(json_get(root, "meta"), "pile_set_name");
    if (domain != NULL && domain->type == JSON_STRING) {
        make_domain_name(document->domain, domain->text, domain->text_size);
    }
    return 1;
}

#endif
