/*
The inputs of dev/fuzz/corpus that no component's own test replays: config.json, state.json and log.jsonl,
each in a child, since a refusal ends the program. A file named bad_* must be refused, with exit 1 and a
message that names the file and a remedy; any other must be read. What a fuzzer finds is added there.
*/
#include <glob.h>
// defines: glob, globfree

#define CORPUS_FOLDER "build/test/fuzz_corpus"

static void corpus_read_config(void *path) {
    Config c = config_read((const char *)path);
    printf("%lld weights\n", (long long)config_params(&c, c.router.experts));
}

static void corpus_read_state(void *path) {
    static Options options;
    RunState state;
    Provenance provenance;
    char folder[PATH_SIZE];
    check_format(folder, sizeof(folder), "%s", (const char *)path);
    *strrchr(folder, '/') = '\0';
    options_defaults(&options, "tiny");
    checkpoint_load_state(&state, &options, folder);
    checkpoint_load_provenance(&provenance, folder);
    provenance_free(&provenance);
    printf("step %lld\n", (long long)state.step);
}

// whatever the rows: every one that stays is of a step before 3, or a validation after 3 steps; and cut
// again, nothing changes
static void corpus_cut_log(void *path) {
    size_t size, size_again;
    log_cut((const char *)path, 3);
    char *text = check_read_file((const char *)path, &size, "");
    log_cut((const char *)path, 3);
    char *again = check_read_file((const char *)path, &size_again, "");
    if (size != size_again || memcmp(text, again, size) != 0 || strstr(text, "\"step\": 4") != NULL) {
        die("%s was not cut well", (const char *)path);
    }
    free(text);
    free(again);
}

// every file of a corpus folder, copied to `name`, given to `read` in a child
static void corpus_replay(const char *corpus, const char *name, void (*read)(void *)) {
    char pattern[PATH_SIZE], path[PATH_SIZE], output[4096];
    glob_t found;
    check_format(pattern, sizeof(pattern), "dev/fuzz/corpus/%s/*", corpus);
    check_format(path, sizeof(path), CORPUS_FOLDER "/%s", name);
    CHECK(glob(pattern, 0, NULL, &found) == 0 && found.gl_pathc >= 3);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        size_t size;
        char *data = check_read_file(found.gl_pathv[i], &size, "");
        FILE *file = check_fopen(path, "wb", "");
        check_fwrite(data, 1, size, file, path);
        check_fclose(file, path);
        int bad = strstr(found.gl_pathv[i], "/bad_") != NULL;
        int status = run_in_child(read, path, output, sizeof(output));
        int explained = strstr(output, path) != NULL && strstr(output, "\n  ---> ") != NULL;
        if (!CHECK(status == bad && (explained || !bad))) {
            printf("    %s: exit %d: %s\n", found.gl_pathv[i], status, output);
        }
        free(data);
    }
    globfree(&found);
}

static void test_fuzz_corpus(void) {
    make_folder(CORPUS_FOLDER);
    corpus_replay("config", "config.json", corpus_read_config);
    corpus_replay("state", "state.json", corpus_read_state);
    corpus_replay("log", "log.jsonl", corpus_cut_log);
    remove_folder(CORPUS_FOLDER);
}
