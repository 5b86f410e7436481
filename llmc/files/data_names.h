/*
Which files `--train-data` and `--val-data` name: "GLOB,GLOB,..." or "GLOB:WEIGHT,GLOB:WEIGHT,...".

A comma, a colon, a bracket may also be part of a path. A name that exists as it stands means that file: the
list is cut only where no file's name goes on, and the pattern is matched only where no file has its name.

Shapes: none. Errors: a pattern without a match, an empty name, a weight that is not positive.
*/
#ifndef DATA_NAMES_H
#define DATA_NAMES_H

#include "llmc/files/shard.h"
#include <glob.h>
#include <sys/stat.h>
// defines: SHARD_HINT; glob; stat

// does a file have this very name, whatever characters of a list or a pattern are in it?
static inline int dataloader_is_file(const char *name) {
    struct stat status;
    return stat(name, &status) == 0;
}

// A pattern's part that is a path as it stands (a file, or the folder before the last slash) means that path:
// its characters lose their meaning
static inline char *dataloader_quote(const char *pattern) {
    char *quoted = GROW(char, NULL, 2 * strlen(pattern) + 1), *out = quoted;
    char *folder = check_strdup(pattern);
    char *slash = strrchr(folder, '/');
    size_t literal = strlen(pattern);
    if (!dataloader_is_file(pattern)) {
        literal = slash == NULL ? 0 : (size_t)(slash - folder) + 1;
        folder[literal] = '\0';
        literal = literal > 0 && dataloader_is_file(folder) ? literal : 0;
    }
    for (size_t i = 0; pattern[i] != '\0'; i++) {
        if (i < literal && strchr("*?[]\\", pattern[i]) != NULL) {
            *out++ = '\\';
        }
        *out++ = pattern[i];
    }
    *out = '\0';
    free(folder);
    return quoted;
}

static inline void dataloader_glob(const char *pattern, glob_t *found) {
    char *quoted = dataloader_quote(pattern);
    int failed = glob(quoted, 0, NULL, found); // sorted by name
    free(quoted);
    if (failed) {
        check_not_closed(pattern);
        die("no file matches %s\n  ---> %s", pattern, SHARD_HINT);
    }
}

// where a weight is cut off "a*.bin:0.7"; NULL: there is none, or the colon is a file's
static inline char *dataloader_weight_colon(char *item, double *weight) {
    char *colon = strrchr(item, ':');
    char *end = NULL;
    *weight = colon == NULL ? 0.0 : strtod(colon + 1, &end);
    return colon == NULL || end == colon + 1 || *end != '\0' || dataloader_is_file(item) ? NULL : colon;
}

// is the item, with or without a weight, the name of a file?
static inline int dataloader_names_file(char *item) {
    double weight;
    char *colon = dataloader_weight_colon(item, &weight);
    if (colon == NULL) {
        return dataloader_is_file(item);
    }
    *colon = '\0';
    int is_file = dataloader_is_file(item);
    *colon = ':';
    return is_file;
}

// where the first item ends: at a comma or at the end of the list; a file's own commas are none
static inline char *dataloader_item_end(char *list) {
    char *end = list + strlen(list), *first = list + strcspn(list, ",");
    for (char *at = end; at > first; at--) {
        if (*at == ',' || *at == '\0') {
            char kept = *at;
            *at = '\0';
            int is_file = dataloader_names_file(list);
            *at = kept;
            if (is_file) {
                return at;
            }
        }
    }
    return first;
}

// the next item of a comma-separated list, or NULL; cuts the list up
static inline char *dataloader_next_item(char **list) {
    char *item = *list;
    if (item == NULL) {
        return NULL;
    }
    item += dataloader_is_file(item) ? 0 : strspn(item, " ");
    char *end = dataloader_item_end(item);
    *list = *end == '\0' ? NULL : end + 1;
    *end = '\0';
    if (item[0] == '\0') {
        die_usage("an empty name in a list of data files, expected GLOB or GLOB:WEIGHT, ...");
    }
    return item;
}

// "a*.bin:0.7": cuts the weight off; 0 when there is none
static inline double dataloader_cut_weight(char *item) {
    double weight;
    char *colon = dataloader_weight_colon(item, &weight);
    if (colon == NULL) {
        return 0.0;
    }
    if (!(weight > 0.0 && weight < 1e30)) {
        die_usage("the weight of %s must be positive, as in \"a*.bin:0.7,b*.bin:0.3\"", item);
    }
    *colon = '\0';
    return weight;
}

#endif
