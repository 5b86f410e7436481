/*
A tokenizer's files, written beside a model: so a folder needs no other to turn text into ids.

    vocab.json, merges.txt   as they were read, byte for byte. They are kept in memory (1.5 MB with GPT-2's
                             vocabulary), so that a run saves them though their folder is gone meanwhile
    tokenizer_config.json    for transformers: which class reads the two, and the special token
    tokenizer.json           the same vocabulary once more, in the one-file format of the tokenizers library

`vocabulary.h` reads the first two back. Text that is encoded gets no <|endoftext|> at its beginning by
itself, as with GPT-2: who prompts a model puts it there.

Source: the files of openai-community/gpt2 on Hugging Face.
Shapes: none. Errors: a write that fails dies (newfile.h).
*/
#ifndef TOKENIZER_FILES_H
#define TOKENIZER_FILES_H

#include "llmc/files/newfile.h"
#include "llmc/files/vocabulary.h"

// does the folder hold a tokenizer?
static inline int tokenizer_is_in(const char *folder) {
    static const char *const names[] = {"vocab.json", "merges.txt"};
    int found = folder[0] != '\0';
    for (int i = 0; i < 2 && found; i++) {
        char path[4096];
        check_format(path, sizeof(path), "%s/%s", folder, names[i]);
        found = access(path, F_OK) == 0;
    }
    return found;
}

static inline void tokenizer_write_file(const char *folder, const char *name, const char *text, size_t size) {
    char path[4096];
    NewFile file;
    check_format(path, sizeof(path), "%s/%s", folder, name);
    newfile_open(&file, path);
    newfile_write(&file, text, 1, size);
    newfile_close(&file);
}

// longest: tokens that the model has seen in a row
static inline void tokenizer_write_settings(const Tokenizer *t, const char *folder, int longest) {
    char text[1024];
    check_format(text, sizeof(text),
                 "{\n"
                 "  \"tokenizer_class\": \"GPT2Tokenizer\",\n"
                 "  \"bos_token\": \"" TOKENIZER_EOT "\",\n"
                 "  \"eos_token\": \"" TOKENIZER_EOT "\",\n"
                 "  \"unk_token\": \"" TOKENIZER_EOT "\",\n"
                 "  \"added_tokens_decoder\": {\n"
                 "    \"%d\": {\"content\": \"" TOKENIZER_EOT "\", \"lstrip\": false, \"normalized\": false, "
                 "\"rstrip\": false, \"single_word\": false, \"special\": true}\n"
                 "  },\n"
                 "  \"add_bos_token\": false,\n"
                 "  \"add_prefix_space\": false,\n"
                 "  \"clean_up_tokenization_spaces\": false,\n"
                 "  \"model_max_length\": %d\n"
                 "}\n",
                 t->eot, longest);
    tokenizer_write_file(folder, "tokenizer_config.json", text, strlen(text));
}

static inline void tokenizer_save(const Tokenizer *t, const char *folder, int longest) {
    tokenizer_write_file(folder, "vocab.json", t->vocab_text, t->vocab_bytes);
    tokenizer_write_file(folder, "merges.txt", t->merges_text, t->merges_bytes);
    tokenizer_write_settings(t, folder, longest);
}

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
    check_format(path, sizeof(path), "%s/tokenizer.json", folder);
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

#endif
