/*
state.json: what a run needs to go on besides weights and moments, and the options that it was started with.

    {"step": 1000, ..., "rng": {"seed": 1234, "counter": 1000}, "run": "...", "shards": [...],
     "options": {"preset": "tiny", ...}}

One table names the fields of RunState (step.h; alpha is an option), and OPTION_TABLE the options; the writer
and the reader walk both. Every random draw is a function of (seed, stream, counter), so seed and step are the
random state: "rng" is there for others to read. "run" and "shards" are provenance.h's.

Errors: exit 1 with the file's name, the key, what was expected and the remedy.
*/
#ifndef STATE_FILE_H
#define STATE_FILE_H

#include "llmc/files/json_bytes.h"
#include "llmc/files/keys.h"
#include "llmc/files/newfile.h"
#include "llmc/files/provenance.h"
#include "llmc/run/options.h"
#include "llmc/step.h"

#define STATE_MOST 1e15 // far from overflow, whatever a run adds to it, and exact in a double
#define STATE_HINT "name another checkpoint, or remove the file and --load the folder for its weights alone"

#define FIELD(kind, name, field, least, most, digits)                                                        \
    KEY_ROW(RunState, kind, KEY_EVERY_MODEL, name, field, least, most, KEY_REQUIRED, digits)

// in the order of the file; 1.00000002e30 is how the largest lambda, fp32's 1e30, prints
static inline const Key *state_keys(int *count) {
    // clang-format off
    static const Key keys[] = {
        // kind         key               field                  least        most           digits
        FIELD(INTEGER,  "step",           step,                  0,           STATE_MOST,    0),
        FIELD(INTEGER,  "optimizer_step", optimizer_step,        0,           STATE_MOST,    0),
        FIELD(INTEGER,  "sequences",      sequences,             0,           STATE_MOST,    0),
        FIELD(REAL,     "lambda",         sparsity.lambda,       1e-30,       1.00000002e30, 9),
        FIELD(INTEGER,  "stage",          sparsity.stage,        STAGE_DENSE, STAGE_SPARSE,  0),
        FIELD(REAL,     "min_sparsity",   sparsity.min_sparsity, 0,           1,             17),
        FIELD(INTEGER,  "rising_steps",   sparsity.rising_steps, 0,           1 << 30,       0),
        FIELD(INTEGER,  "stage2_step",    sparsity.stage2_step,  -1,          STATE_MOST,    0),
        FIELD(INTEGER,  "stage3_step",    sparsity.stage3_step,  -1,          STATE_MOST,    0),
    };
    // clang-format on
    *count = (int)(sizeof(keys) / sizeof(keys[0]));
    return keys;
}

#undef FIELD

// ----------------------------------------------------------------------------
// options

// {"preset": "tiny", "experts": 8, ...}
static inline void options_write_json(FILE *file, const Options *options) {
    int count;
    const OptionRow *rows = option_rows(&count);
    for (int i = 0; i < count; i++) {
        char value[OPTION_TEXT_SIZE];
        option_format(value, sizeof(value), options, &rows[i], 17);
        fprintf(file, "%s\"%s\": ", i == 0 ? "{" : ", ", rows[i].field);
        if (rows[i].kind == OPTION_TEXT) {
            json_write_bytes(file, value, strlen(value)); // paths may hold any byte
        } else {
            fputs(value, file);
        }
    }
    fputc('}', file);
}

// options that `object` lacks keep their value; names that no longer exist are refused
static inline void options_read_json(Options *options, const Json *object, const char *path) {
    if (object == NULL || object->type != JSON_OBJECT || json_duplicate_key(object) != NULL) {
        die("%s: \"options\" is not an object without repeated names\n  ---> --load this folder instead of "
            "--resume to use its weights alone",
            path);
    }
    for (const Json *member = object->child; member != NULL; member = member->next) {
        const OptionRow *row = option_find(member->key, member->key_size);
        int is_text = member->type == JSON_STRING;
        int is_scalar = is_text || member->type == JSON_NUMBER;
        if (row == NULL || strcmp(member->key, row->field) != 0 || !is_scalar ||
            is_text != (row->kind == OPTION_TEXT) || strlen(member->text) != member->text_size) {
            die("%s: unusable option \"%.200s\"\n  ---> --load this folder instead of --resume to use its "
                "weights alone",
                path, member->key);
        }
        size_t size;
        char *text = json_read_bytes(member->text, member->text_size, &size);
        option_set(options, row, text, path);
        free(text);
    }
}

// ----------------------------------------------------------------------------
// the file

static inline void state_write(const char *path, const RunState *state, const Provenance *provenance,
                               const Options *options) {
    NewFile file;
    int count;
    const Key *keys = state_keys(&count);
    newfile_open(&file, path);
    fputs("{\n", file.file);
    for (int i = 0; i < count; i++) {
        fprintf(file.file, "  \"%s\": ", keys[i].name);
        key_write(file.file, &keys[i], state);
        fputs(",\n", file.file);
    }
    fprintf(file.file, "  \"rng\": {\"seed\": %lld, \"counter\": %lld},\n", (long long)options->seed,
            (long long)state->step);
    provenance_write(file.file, provenance);
    fputs("  \"options\": ", file.file);
    options_write_json(file.file, options);
    fputs("\n}\n", file.file);
    newfile_close(&file);
}

static inline void state_read_key(RunState *state, const Key *key, const Json *json, const char *path) {
    const Json *value = json_get(json, key->name);
    double number = 0.0;
    KeyResult result = key_read(value, key, state);
    if (result == KEY_IS_UNUSABLE) {
        die("%s: \"%s\" is missing or unusable, expected a number from %.15g to %.15g\n  ---> " STATE_HINT,
            path, key->name, key->least, key->most);
    }
    if (result == KEY_IS_NO_INTEGER) {
        json_double(value, &number);
        die("%s: \"%s\" is unusable: %g, expected an integer\n  ---> " STATE_HINT, path, key->name, number);
    }
}

static inline const Json *state_parse(const char *path, JsonArena *arena) {
    json_arena_init(arena);
    const Json *json = json_parse_file(path, arena, STATE_HINT);
    if (json->type != JSON_OBJECT || json_duplicate_key(json) != NULL) {
        die("%s: expected one JSON object without repeated keys\n  ---> " STATE_HINT, path);
    }
    return json;
}

static inline void state_read_provenance(Provenance *provenance, const char *path) {
    JsonArena arena;
    provenance_read(provenance, state_parse(path, &arena), path, STATE_HINT);
    json_arena_free(&arena);
}

// options NULL: only the state is wanted
static inline void state_read(RunState *state, Options *options, const char *path) {
    JsonArena arena;
    int count;
    const Key *keys = state_keys(&count);
    const Json *json = state_parse(path, &arena);
    for (int i = 0; i < count; i++) {
        state_read_key(state, &keys[i], json, path);
    }
    if (options != NULL) {
        options_read_json(options, json_get(json, "options"), path);
        options_forget_once(options);
    }
    json_arena_free(&arena);
}

#endif
