/*
A tokenizer's files, written beside a model: so a folder needs no other to turn text into ids.

    vocab.json, merges.txt   as they were read, byte for byte. They are kept in memory (1.5 MB with GPT-2's
                             vocabulary), so that a run saves them though their folder is gone meanwhile
    tokenizer_config.json    for transformers: which class reads the two, and the special token
    tokenizer.json           the same vocabulary once more, in one file (tokenizer_json.h)

`vocabulary.h` reads the first two back. Text that is encoded gets no <|endoftext|> at its beginning by
itself, as with GPT-2: who prompts a model puts it there.

Source: the files of openai-community/gpt2 on Hugging Face.
Shapes: none. Errors: a write that fails dies (newfile.h).
*/
#ifndef TOKENIZER_FILES_H
#define TOKENIZER_FILES_H

#include "llmc/files/tokenizer_json.h"

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

#endif
