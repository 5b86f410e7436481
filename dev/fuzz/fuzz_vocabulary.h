/*
For targets that want a tokenizer: a vocabulary of the 256 bytes and a few merges, so that any text has ids. Include after
llmc/files/tokenizer.h.
*/
#ifndef FUZZ_VOCABULARY_H
#define FUZZ_VOCABULARY_H

static void fuzz_write_bytes_vocabulary(const char *folder) {
    static const char merges[] = "a b\nab ab\n\u0120 a\na a\n' s\n1 2\n\u0120 \u0120\n";
    static const char tokens[] =
        ", \"ab\": 256, \"abab\": 257, \"\u0120a\": 258, \"aa\": 259, \"'s\": 260, \"12\": 261, "
        "\"\u0120\u0120\": 262, \"<|endoftext|>\": 263}";
    char path[128], symbol[4];
    int symbols[256];
    check_format(path, sizeof(path), "%s/merges.txt", folder);
    FILE *out = fopen(path, "wb");
    FUZZ_CHECK(out != NULL && fwrite(merges, 1, strlen(merges), out) == strlen(merges) && fclose(out) == 0);
    check_format(path, sizeof(path), "%s/vocab.json", folder);
    out = fopen(path, "wb");
    FUZZ_CHECK(out != NULL);
    tokenizer_byte_symbols(symbols);
    for (int byte = 0; byte < 256; byte++) {
        fputs(byte == 0 ? "{" : ", ", out);
        json_write_string(out, symbol, (size_t)(json_put_utf8(symbol, (unsigned)symbols[byte]) - symbol));
        fprintf(out, ": %d", byte);
    }
    fputs(tokens, out);
    FUZZ_CHECK(fclose(out) == 0);
}

#endif
