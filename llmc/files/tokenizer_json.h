/*
tokenizer.json, the one-file form of a tokenizer that the tokenizers library reads: vocab.json and merges.txt
(vocabulary.h) in one object, with the settings that make a GPT-2 tokenizer of them.

    {"added_tokens": [{"id": 50256, "content": "<|endoftext|>", ...}], "pre_tokenizer": {"type": "ByteLevel", ...},
     "model": {"type": "BPE", "vocab": {token: id}, "merges": ["left right", ...]}, ...}

Written for an export. Read where a folder has no vocab.json: transformers 5 saves a tokenizer in this form
alone, its merges as pairs, ["left", "right"]. The texts of the two other files are made of it, so that all
that follows is one way.

Shapes: none. Errors: a tokenizer of another kind, whose ids would not be the model's, dies with the setting.
*/
#ifndef TOKENIZER_JSON_H
#define TOKENIZER_JSON_H

#include "llmc/files/newfile.h"
#include "llmc/files/vocabulary.h"

#define TOKENIZER_JSON "tokenizer.json"
#define TOKENIZER_JSON_HINT                                                                                  \
    "name a folder with the vocab.json and merges.txt of the model, or none at all: --tokenizer ''"

// ----------------------------------------------------------------------------
// writing

// the lines of merges.txt as a list of strings, without the first one if that is a version
static inline void tokenizer_write_merges_json(const Tokenizer *t, FILE *file) {
    const char *line = t->merges_text, *end = t->merges_text + t->merges_bytes, *before = "";
    while (line < end) {
        const char *newline = (const char *)memchr(line, '\n', (size_t)(end - line));
        size_t size = (size_t)((newline != NULL ? newline : end) - line);
        if (size > 0 && (line != t->merges_text || strncmp(line, "#version", 8) != 0)) {
            fprintf(file, "%s\n      ", before);
            json_write_string(file, line, size);
            before = ",";
        }
        line += size + 1;
    }
}

static inline void tokenizer_save_json(const Tokenizer *t, const char *folder) {
    char path[4096];
    NewFile file;
    check_format(path, sizeof(path), "%s/" TOKENIZER_JSON, folder);
    newfile_open(&file, path);
    fprintf(file.file,
            "{\n"
            "  \"version\": \"1.0\",\n"
            "  \"truncation\": null,\n"
            "  \"padding\": null,\n"
            "  \"added_tokens\": [{\"id\": %d, \"content\": \"" TOKENIZER_EOT "\", \"single_word\": false, "
            "\"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": true}],\n"
            "  \"normalizer\": null,\n"
            "  \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
            "\"trim_offsets\": true, \"use_regex\": true},\n"
            "  \"post_processor\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
            "\"trim_offsets\": false, \"use_regex\": true},\n"
            "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
            "\"trim_offsets\": true, \"use_regex\": true},\n"
            "  \"model\": {\n"
            "    \"type\": \"BPE\", \"dropout\": null, \"unk_token\": null,\n"
            "    \"continuing_subword_prefix\": \"\", \"end_of_word_suffix\": \"\",\n"
            "    \"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,\n"
            "    \"vocab\": ",
            t->eot);
    newfile_write(&file, t->vocab_text, 1, t->vocab_bytes); // it is JSON already
    fputs(",\n    \"merges\": [", file.file);
    tokenizer_write_merges_json(t, file.file);
    fputs("]\n  }\n}\n", file.file);
    newfile_close(&file);
}

// ----------------------------------------------------------------------------
// reading

// a setting that GPT-2's tokenizer has not: neither left out nor null, false or empty
static inline int tokenizer_json_asks(const Json *object, const char *name) {
    const Json *value = json_get(object, name);
    return value != NULL && value->type != JSON_NULL && !json_is_text(value, "") &&
           !(value->type == JSON_BOOL && !value->boolean);
}

// what in it is not GPT-2's kind of tokenizer; NULL: nothing
static inline const char *tokenizer_json_foreign(const Json *json) {
    const Json *model = json_get(json, "model"), *cutter = json_get(json, "pre_tokenizer");
    const Json *regex = json_get(cutter, "use_regex");
    static const char *const settings[] = {"continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
                                           "ignore_merges", "dropout"};
    if (!json_is_text(json_get(model, "type"), "BPE")) {
        return "model: expected the type BPE";
    }
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (tokenizer_json_asks(model, settings[i])) {
            return settings[i];
        }
    }
    if (!json_is_text(json_get(cutter, "type"), "ByteLevel") ||
        tokenizer_json_asks(cutter, "add_prefix_space") ||
        (regex != NULL && !(regex->type == JSON_BOOL && regex->boolean))) {
        return "pre_tokenizer: expected ByteLevel, with its pattern and without a space before the text";
    }
    return tokenizer_json_asks(json, "normalizer") ? "normalizer: expected null" : NULL;
}

// a token that stands beside the vocabulary would never come out of merging
static inline int tokenizer_json_has_token(const Json *vocab, const Json *added) {
    const Json *content = json_get(added, "content");
    int64_t a = -1, b = -2;
    return content != NULL && content->type == JSON_STRING && json_get(added, "id") != NULL &&
           json_int64(json_get(added, "id"), &a) && json_get(vocab, content->text) != NULL &&
           json_int64(json_get(vocab, content->text), &b) && a == b;
}

// the text of vocab.json
static inline void tokenizer_unpack_vocab(Tokenizer *t, const Json *vocab) {
    FILE *file = check_memstream(&t->vocab_text, &t->vocab_bytes);
    const char *before = "{";
    for (const Json *token = vocab->child; token != NULL; token = token->next) {
        fputs(before, file);
        json_write_string(file, token->key, token->key_size);
        fprintf(file, ": %s", token->type == JSON_NUMBER ? token->text : "null");
        before = ", ";
    }
    fputs("}", file);
    fclose(file);
}

// the text of merges.txt, a line per merge; what is no merge becomes a line that is refused as one
static inline void tokenizer_unpack_merges(Tokenizer *t, const Json *merges) {
    FILE *file = check_memstream(&t->merges_text, &t->merges_bytes);
    for (const Json *merge = merges->child; merge != NULL; merge = merge->next) {
        const Json *left = merge->type == JSON_ARRAY && merge->count == 2 ? merge->child : NULL;
        if (left != NULL && left->type == JSON_STRING && left->next->type == JSON_STRING) {
            fprintf(file, "%s %s\n", left->text, left->next->text);
        } else {
            fprintf(file, "%s\n", merge->type == JSON_STRING && merge->text[0] != '\0' ? merge->text : "?");
        }
    }
    fclose(file);
}

static inline void tokenizer_read_json(Tokenizer *t, const char *path) {
    JsonArena arena;
    json_arena_init(&arena);
    const Json *json = json_parse_file(path, &arena, TOKENIZER_JSON_HINT);
    const Json *vocab = json_get(json_get(json, "model"), "vocab"), *added = json_get(json, "added_tokens");
    const Json *merges = json_get(json_get(json, "model"), "merges");
    const char *foreign = tokenizer_json_foreign(json);
    if (foreign == NULL &&
        (vocab == NULL || vocab->type != JSON_OBJECT || json_duplicate_key(vocab) != NULL || merges == NULL ||
         merges->type != JSON_ARRAY)) {
        foreign = "model: expected a vocab, each token once, and merges";
    }
    for (const Json *token = added != NULL ? added->child : NULL; token != NULL && foreign == NULL;
         token = token->next) {
        foreign =
            tokenizer_json_has_token(vocab, token) ? NULL : "added_tokens: a token that is not in vocab";
    }
    if (foreign != NULL) {
        die("%s is not a tokenizer of GPT-2's kind (%s)\n  ---> " TOKENIZER_JSON_HINT, path, foreign);
    }
    tokenizer_unpack_vocab(t, vocab);
    tokenizer_unpack_merges(t, merges);
    json_arena_free(&arena);
}

#endif
