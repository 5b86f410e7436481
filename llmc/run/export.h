/*
--load RUN --export DIR: a model as Hugging Face's libraries want it, in one folder that needs no other.

    config.json              the checkpoint's, and what the weights' type is; for MoE, where its code is
    model.safetensors        the weights, fp32 or (--save-dtype bf16) rounded to bf16; no optimizer state
    vocab.json, merges.txt, tokenizer.json, tokenizer_config.json     its tokenizer (tokenizer_files.h)
    generation_config.json   the token that ends a text, and the sampler's settings
    configuration_remoe.py, modeling_remoe.py                         for MoE: dev/hf's, kept in this program
    README.md                the model card

Nothing in there tells where it was made: of the data it has the files' names, without their folders. Written
to .tmp_NAME beside DIR, which then gets the name. A folder that holds something is left alone: a checkpoint
is never replaced by its poorer export.

Errors: exit 1 with the folder or file that is wrong and the remedy; 2 for what --export contradicts.
*/
#ifndef EXPORT_H
#define EXPORT_H

#include "build/hf_code.h"
#include "llmc/run/model_card.h"
#include "llmc/run/startup.h"
#include <signal.h>
// defines: configuration_remoe_py, modeling_remoe_py; signal

typedef struct {
    Options options;
    Ranks alone; // the only one
    RunState state;
    int has_state; // else it is somebody else's model, of whose training nothing is known
    Config config;
    TensorTable table;
    Weights weights;      // no memory behind them
    Safetensors *saved;   // the checkpoint's, while they are copied
    Tokenizer *tokenizer; // NULL: none was found
    char folder[PATH_SIZE], temporary[PATH_SIZE];
    const char *name; // the folder's own, without those around it
} Export;

// ----------------------------------------------------------------------------
// the folder

static inline int folder_is_empty(const char *path) {
    DIR *folder = opendir(path);
    int names = 0;
    while (folder != NULL && names <= 2 && readdir(folder) != NULL) {
        names++; // two are . and ..
    }
    if (folder != NULL) {
        closedir(folder);
    }
    return folder != NULL && names <= 2;
}

// folder, temporary and name from what the user typed; before the weights are read
static inline void export_choose_folder(Export *e, const char *typed) {
    size_t size = strlen(typed);
    while (size > 1 && typed[size - 1] == '/') {
        size--;
    }
    check_format(e->folder, sizeof(e->folder), "%.*s", (int)size, typed);
    const char *slash = strrchr(e->folder, '/');
    e->name = slash == NULL ? e->folder : slash + 1;
    check_format(e->temporary, sizeof(e->temporary), "%.*s.tmp_%s", (int)(e->name - e->folder), e->folder,
                 e->name);
    if (e->name[0] == '\0' || strcmp(e->name, ".") == 0 || strcmp(e->name, "..") == 0) {
        die_usage("--export %s: expected the name of a new folder", typed);
    }
    struct stat status;
    if (stat(e->folder, &status) == 0 && (!S_ISDIR(status.st_mode) || !folder_is_empty(e->folder))) {
        die("--export %s: there is something there already\n  ---> name a new folder, or remove it first",
            e->folder);
    }
}

static inline void export_place_folder(const Export *e) {
    newfile_sync_folder(e->temporary);
    if (rename(e->temporary, e->folder) != 0) {
        die("cannot rename %s to %s: %s\n  ---> it is whole: rename it", e->temporary, e->folder,
            strerror(errno));
    }
    newfile_sync_folder(e->folder);
}

// a file of the folder, open
static inline void export_open(const Export *e, const char *name, NewFile *file) {
    char path[PATH_SIZE];
    check_format(path, sizeof(path), "%s/%s", e->temporary, name);
    newfile_open(file, path);
}

static inline void export_text(const Export *e, const char *name, const char *text) {
    NewFile file;
    export_open(e, name, &file);
    newfile_write(&file, text, 1, strlen(text));
    newfile_close(&file);
}

// ----------------------------------------------------------------------------
// what the libraries read

static inline int export_is_bf16(const Export *e) {
    return strcmp(e->options.save_dtype, "bf16") == 0;
}

static inline void export_config(const Export *e) {
    NewFile file;
    export_open(e, "config.json", &file);
    config_write_keys(&e->config, file.file);
    fprintf(file.file, ",\n  \"torch_dtype\": \"%s\"", export_is_bf16(e) ? "bfloat16" : "float32");
    if (router_has_experts(e->config.router.method)) {
        fputs(",\n  \"auto_map\": {\n"
              "    \"AutoConfig\": \"configuration_remoe.RemoeConfig\",\n"
              "    \"AutoModelForCausalLM\": \"modeling_remoe.RemoeForCausalLM\"\n"
              "  }",
              file.file);
    }
    fputs("\n}\n", file.file);
    newfile_close(&file);
}

// the end of a text also fills up a batch of prompts: nothing was padded in training
static inline void export_generation_config(const Export *e) {
    NewFile file;
    int count;
    const Key *keys = config_keys(&count);
    const char *before = "{\n";
    export_open(e, "generation_config.json", &file);
    for (int i = 0; i < count; i++) {
        if (keys[i].kind == KEY_TOKEN) {
            fprintf(file.file, "%s  \"%s\": ", before, keys[i].name);
            key_write(file.file, &keys[i], &e->config);
            before = ",\n";
        }
    }
    if (e->config.eos >= 0) {
        fprintf(file.file, ",\n  \"pad_token_id\": %d", e->config.eos);
    }
    fputs("\n}\n", file.file);
    newfile_close(&file);
}

static inline const char *export_source(const Export *e) {
    return e->options.resume[0] != '\0' ? e->options.resume : e->options.load;
}

// of the checkpoint's weights n elements of a flat buffer, all of one tensor
static inline void export_get(void *of, int unused, int64_t first, int64_t n, float *out) {
    const Export *e = (const Export *)of;
    const Tensor *tensor = e->table.tensors;
    (void)unused;
    while (first < tensor->offset || first >= tensor->offset + tensor->size) {
        tensor++;
    }
    const SafetensorsEntry *entry = safetensors_require(e->saved, tensor->name, tensor->ndim, tensor->shape);
    safetensors_read_f32_range(e->saved, entry, (uint64_t)(first - tensor->offset), (uint64_t)n, out);
    safetensors_release(entry, (uint64_t)(first - tensor->offset), (uint64_t)n);
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(out[i])) {
            remove_folder(e->temporary);
            die("%s has weights that are no numbers\n  ---> export another checkpoint", export_source(e));
        }
    }
}

// from file to file, piece by piece
static inline void export_weights(Export *e) {
    Range everything = {0, e->table.flat_size};
    FlatBuffer weights = {&e->table, &everything, 1, e, BUFFER_PARAMS, export_get, NULL};
    e->saved = open_weights(export_source(e));
    save_buffers(&e->alone, e->temporary, "model.safetensors", &weights, weight_prefix, 1,
                 export_is_bf16(e) ? "BF16" : "F32");
    refuse_unused_tensors(e->saved, &weights, weight_prefix, 1);
    safetensors_close(e->saved);
}

static inline void export_card(const Export *e) {
    NewFile file;
    ModelCard card = {e->name,          &e->config,       &e->options, e->has_state ? &e->state : NULL,
                      export_source(e), export_is_bf16(e)};
    export_open(e, "README.md", &file);
    model_card_write(&card, file.file);
    newfile_close(&file);
}

// ----------------------------------------------------------------------------
// all of it

// of somebody else's model only the tokenizer in its folder is known, or the one that is given
static inline void export_read_tokenizer(Export *e, int given) {
    const char *folder = given || e->has_state ? tokenizer_folder(&e->options, given) : export_source(e);
    if (tokenizer_is_in(folder)) {
        e->tokenizer = load_tokenizer(folder, &e->config);
    } else if (given && folder[0] != '\0') {
        die("--tokenizer %s: expected a folder with vocab.json and merges.txt, or tokenizer.json\n"
            "  ---> name another",
            folder);
    } else if (!given) {
        warn("no tokenizer goes along: neither vocab.json with merges.txt nor tokenizer.json is in %s\n"
             "  ---> name their folder with --tokenizer",
             export_source(e));
    }
}

static inline void export_read(Export *e, const char *program, int argc, const char *const *argv) {
    const Options *o = &e->options;
    char path[PATH_SIZE];
    Provenance unused; // an export is of no run
    memset(&unused, 0, sizeof(unused));
    e->alone = ranks_alone();
    read_options(&e->options, &e->state, &unused, program, argc, argv, 1);
    if (o->export_to[0] == '\0' || o->dump[0] != '\0' || o->sampling || o->eval || has_requests(o) ||
        o->bench) {
        die_usage("--export expects a folder, and no other work beside it "
                  "(--dump, --eval, --sample, --score, --generate, --bench)");
    }
    export_choose_folder(e, o->export_to);
    check_format(path, sizeof(path), "%s/config.json", export_source(e));
    e->config = config_read(path);
    e->has_state = checkpoint_load_state(&e->state, NULL, export_source(e));
    model_tensors(&e->table, &e->weights, &e->config, NULL);
    export_read_tokenizer(e, options_given(argc, argv, "tokenizer"));
}

static inline void export_write(Export *e) {
    remove_folder(e->temporary);
    make_folder(e->temporary);
    export_config(e);
    export_generation_config(e);
    if (e->tokenizer != NULL) {
        tokenizer_save(e->tokenizer, e->temporary, e->config.max_seq_len);
        tokenizer_save_json(e->tokenizer, e->temporary);
    }
    if (router_has_experts(e->config.router.method)) {
        export_text(e, "configuration_remoe.py", configuration_remoe_py);
        export_text(e, "modeling_remoe.py", modeling_remoe_py);
    }
    export_card(e);
    export_weights(e);
    export_place_folder(e);
}

static inline void export_model(const char *program, int argc, const char *const *argv) {
    Export *e = NEW(Export, 1);
    signal(SIGXFSZ, SIG_IGN); // a file at its size limit is then a failed write, with a message
    export_read(e, program, argc, argv);
    export_write(e);
    printf("%s: %lld parameters in %s, from %s\n", e->folder,
           (long long)config_params(&e->config, e->config.router.experts),
           export_is_bf16(e) ? "bf16" : "fp32", export_source(e));
    if (e->tokenizer != NULL) {
        tokenizer_free(e->tokenizer);
    }
    table_free(&e->table);
    free(e->weights.layers);
    free(e);
}

#endif
