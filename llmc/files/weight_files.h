/*
A model's weights in a folder of Hugging Face's layout, as one table of tensors:

    model.safetensors               all of them: what this trainer writes; or
    model.safetensors.index.json    {"weight_map": {"TENSOR": "model-00001-of-00002.safetensors", ...}}: each
                                    tensor's file, all in the same folder: how others write large models

Where both are there, the first is read, as transformers does. The files of the second form are mapped one by
one, and their tables joined. A tensor that the index does not know, or that is not in the file where the
index has it, is refused: the folder is then half of one model and half of another.

Shapes: any. Errors: exit 1 with the file, the tensor and the remedy.
*/
#ifndef WEIGHT_FILES_H
#define WEIGHT_FILES_H

#include "llmc/files/folder.h"
#include "llmc/files/safetensors.h"

#define WEIGHTS_HINT "name a folder with config.json and model.safetensors"
#define SHARDS_HINT "copy the whole folder again, or have transformers' save_pretrained write it anew"

// the shard of that name, opened when a tensor is first looked for there
static inline Safetensors *weights_shard(Safetensors *all, const char *folder, const Json *name) {
    char path[PATH_SIZE];
    if (name->type != JSON_STRING || strlen(name->text) != name->text_size || name->text[0] == '\0' ||
        strchr(name->text, '/') != NULL) {
        die("%s: expected a file of the same folder for each tensor\n  ---> " SHARDS_HINT, all->path);
    }
    check_format(path, sizeof(path), "%s/%s", folder, name->text);
    for (Safetensors *shard = all->next; shard != NULL; shard = shard->next) {
        if (strcmp(shard->path, path) == 0) {
            return shard;
        }
    }
    Safetensors *shard = safetensors_open(path, SHARDS_HINT);
    shard->next = all->next;
    return all->next = shard;
}

// the entries of `all` from its shards'
static inline void weights_join(Safetensors *all, const char *folder, const Json *map) {
    size_t in_shards = 0;
    all->entries = NEW(SafetensorsEntry, map->count);
    for (const Json *file = map->child; file != NULL; file = file->next) {
        const Safetensors *shard = weights_shard(all, folder, file);
        const SafetensorsEntry *entry = safetensors_find(shard, file->key);
        if (entry == NULL) {
            die("%s has no tensor %.200s, which %s has there\n  ---> " SHARDS_HINT, shard->path, file->key,
                all->path);
        }
        all->entries[all->count++] = *entry;
    }
    for (const Safetensors *shard = all->next; shard != NULL; shard = shard->next) {
        in_shards += shard->count;
    }
    if (in_shards != all->count) {
        die("%s knows %zu tensors, its files hold %zu\n  ---> " SHARDS_HINT, all->path, all->count,
            in_shards);
    }
    qsort(all->entries, all->count, sizeof(SafetensorsEntry), safetensors_compare_names);
}

static inline Safetensors *weights_open_shards(const char *folder, const char *index) {
    Safetensors *all = NEW(Safetensors, 1);
    all->path = safetensors_copy_text(&all->arena, index);
    all->hint = WEIGHTS_HINT;
    const Json *map = json_get(json_parse_file(index, &all->arena, SHARDS_HINT), "weight_map");
    if (map == NULL || map->type != JSON_OBJECT || map->count == 0 || json_duplicate_key(map) != NULL) {
        die("%s: expected \"weight_map\": {TENSOR: FILE, ...}, each tensor once\n  ---> " SHARDS_HINT, index);
    }
    weights_join(all, folder, map);
    return all;
}

// dies unless the folder's config.json has weights beside it; to be closed by safetensors_close
static inline Safetensors *open_weights(const char *folder) {
    char whole[PATH_SIZE], index[PATH_SIZE], pickled[PATH_SIZE];
    check_format(whole, sizeof(whole), "%s/model.safetensors", folder);
    check_format(index, sizeof(index), "%s/model.safetensors.index.json", folder);
    check_format(pickled, sizeof(pickled), "%s/pytorch_model.bin", folder);
    if (!name_exists(whole) && path_exists(index)) {
        return weights_open_shards(folder, index);
    }
    if (!name_exists(whole) && path_exists(pickled)) {
        die("%s: weights in PyTorch's own format are not read\n  ---> have transformers' save_pretrained "
            "write "
            "the folder anew: it makes a model.safetensors",
            pickled);
    }
    return safetensors_open(whole, WEIGHTS_HINT);
}

#endif
