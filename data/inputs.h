/*
The input files of a command line: what kind each one is, and what its documents' domain is called.

    FILE.jsonl, .ndjson    JSON Lines: a document a line
    FOLDER                 its JSON Lines and text files, and those of the folders in it, in the order of
                           their names; hidden ones are passed over, and so is what is no text
    -                      JSON Lines from standard input
    any other file         plain text
    FILE.jsonl.zst, .ndjson.zst, .txt.zst      the same, compressed

A file is text unless a zero byte stands at its beginning. What its name leaves open is refused rather than
guessed at: .json is JSON Lines for some, one JSON value for others; .zst with nothing before it says nothing.

Shapes: none. Errors: exit 1 for a file that cannot be read, 2 for one whose kind is unknown, before anything
is read.
*/
#ifndef INPUTS_H
#define INPUTS_H

#include "data/hash.h"
#include "llmc/check.h"
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
// defines: tolower, scandir, open, stat, read, realpath

enum { DOMAIN_SIZE = 48, INPUT_PATH_SIZE = 4096, INPUT_PROBE = 8192 };

typedef enum { INPUT_UNKNOWN, INPUT_JSON_LINES, INPUT_TEXT } InputKind;

typedef struct {
    char *path;
    char domain[DOMAIN_SIZE]; // of the documents that name none
    InputKind kind;
    int compressed;
    int argument;      // index of the one that named it, or its folder
    int64_t size;      // bytes on disk; 0 when unknown
    uint64_t identity; // of the file as it was found: another number once it is written to or replaced
    int64_t changed;   // seconds since 1970
} Input;

typedef struct {
    Input *files;
    int count, capacity;
    int arguments;        // of the command line, the one being added included
    int64_t size;         // of all on disk; negative when unknown
    int left_out;         // files of folders that are no text
    char *first_left_out; // their first
    dev_t output_device;  // the folder that is written, whose files are no input
    ino_t output_inode;
} Inputs;

// ----------------------------------------------------------------------------
// names

static inline int input_has_suffix(const char *path, size_t n, const char *suffix) {
    size_t m = strlen(suffix);
    return n > m && memcmp(path + n - m, suffix, m) == 0;
}

static inline int input_is_stdin(const Input *input) {
    return strcmp(input->path, "-") == 0;
}

// what the name says; text when it says nothing
static inline InputKind input_kind(const char *path, int *compressed) {
    size_t n = strlen(path);
    *compressed = input_has_suffix(path, n, ".zst");
    n -= *compressed ? strlen(".zst") : 0;
    if (input_has_suffix(path, n, ".jsonl") || input_has_suffix(path, n, ".ndjson") ||
        strcmp(path, "-") == 0) {
        return INPUT_JSON_LINES;
    }
    if (input_has_suffix(path, n, ".json") || (*compressed && !input_has_suffix(path, n, ".txt"))) {
        return INPUT_UNKNOWN;
    }
    return INPUT_TEXT;
}

// lower case, what is neither letter nor digit to one '_': fit for a file name
static inline void make_domain_name(char *domain, const char *name, size_t size) {
    size_t n = 0;
    for (size_t i = 0; i < size && n + 1 < DOMAIN_SIZE; i++) {
        int c = (unsigned char)name[i];
        if (c < 0x80 && isalnum(c)) {
            domain[n++] = (char)tolower(c);
        } else if (n > 0 && domain[n - 1] != '_') {
            domain[n++] = '_';
        }
    }
    while (n > 0 && domain[n - 1] == '_') {
        n--;
    }
    domain[n] = '\0';
    if (n == 0) {
        strcpy(domain, "unnamed");
    }
}

// the file's name up to its first dot
static inline void domain_of_file(char *domain, const char *path) {
    const char *slash = strrchr(path, '/');
    const char *name = slash != NULL ? slash + 1 : path;
    const char *stem = strcmp(path, "-") == 0 ? "stdin" : name;
    make_domain_name(domain, stem, strcspn(stem, "."));
}

// the folder's own name, whatever it was called by: ".", "texts/"
static inline void domain_of_folder(char *domain, const char *path) {
    char *full = realpath(path, NULL);
    const char *name = full != NULL ? strrchr(full, '/') + 1 : "";
    make_domain_name(domain, name, strlen(name));
    free(full);
}

// ----------------------------------------------------------------------------
// looking at a file

__attribute__((noreturn)) static inline void input_cannot_open(const char *path, const char *hint) {
    die("cannot open %s: %s\n  ---> %s", path, strerror(errno),
        errno == ENOENT ? hint : "check its permissions, and those of its folders");
}

// opened once, so that what cannot be read is known before hours of work; 1 if it begins without a zero byte
static inline int input_is_readable_text(const char *path) {
    char start[INPUT_PROBE];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, start, sizeof(start)) : -1;
    if (got < 0) {
        input_cannot_open(path, "it was there a moment ago");
    }
    close(fd);
    return memchr(start, '\0', (size_t)got) == NULL;
}

static inline uint64_t input_identity(const struct stat *status) {
#ifdef __APPLE__
    int64_t nanoseconds[2] = {status->st_mtimespec.tv_nsec, status->st_ctimespec.tv_nsec};
#else
    int64_t nanoseconds[2] = {status->st_mtim.tv_nsec, status->st_ctim.tv_nsec};
#endif
    int64_t all[] = {(int64_t)status->st_size,
                     (int64_t)status->st_ino,
                     (int64_t)status->st_dev,
                     (int64_t)status->st_mtime,
                     nanoseconds[0],
                     (int64_t)status->st_ctime,
                     nanoseconds[1]};
    return hash_text((const char *)all, sizeof(all));
}

// status: NULL for standard input
static inline Input *inputs_append(Inputs *inputs, const char *path, const struct stat *status) {
    if (inputs->count == inputs->capacity) {
        inputs->capacity = 2 * inputs->count + 16;
        inputs->files = GROW(Input, inputs->files, inputs->capacity);
    }
    Input *input = &inputs->files[inputs->count++];
    memset(input, 0, sizeof(*input));
    input->path = strcpy(NEW(char, strlen(path) + 1), path);
    input->kind = input_kind(path, &input->compressed);
    input->argument = inputs->arguments - 1;
    if (status != NULL) {
        input->size = S_ISREG(status->st_mode) ? (int64_t)status->st_size : 0;
        input->identity = input_identity(status);
        input->changed = (int64_t)(status->st_ctime > status->st_mtime ? status->st_ctime : status->st_mtime);
    }
    int known = status != NULL && S_ISREG(status->st_mode) && inputs->size >= 0;
    inputs->size = known ? inputs->size + input->size : -1;
    return input;
}

// ----------------------------------------------------------------------------
// folders

static inline int inputs_is_visible(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static inline int inputs_compare_names(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name); // of bytes: the same in every locale
}

static inline void inputs_leave_out(Inputs *inputs, const char *path) {
    if (inputs->left_out++ == 0) {
        inputs->first_left_out = strcpy(NEW(char, strlen(path) + 1), path);
    }
}

static inline void inputs_add_folder(Inputs *inputs, const char *folder, const char *domain);

static inline void inputs_add_entry(Inputs *inputs, const char *path, const char *domain) {
    struct stat link, status;
    int compressed;
    if (lstat(path, &link) != 0) {
        input_cannot_open(path, "it was there a moment ago");
    }
    if (S_ISDIR(link.st_mode)) {
        inputs_add_folder(inputs, path, domain);
    } else if (stat(path, &status) != 0 || !S_ISREG(status.st_mode)) {
        return; // a link to nowhere or to a folder (there may be circles), a pipe, a device
    } else if (status.st_size == 0) {
        return;
    } else if (input_kind(path, &compressed) == INPUT_UNKNOWN ||
               (!input_is_readable_text(path) && !compressed)) {
        inputs_leave_out(inputs, path);
    } else {
        strcpy(inputs_append(inputs, path, &status)->domain, domain);
    }
}

static inline void inputs_add_folder(Inputs *inputs, const char *folder, const char *domain) {
    struct dirent **entries;
    struct stat status;
    char path[INPUT_PATH_SIZE];
    int n =
        stat(folder, &status) == 0 ? scandir(folder, &entries, inputs_is_visible, inputs_compare_names) : -1;
    if (n < 0) {
        input_cannot_open(folder, "it was there a moment ago");
    }
    size_t length = strlen(folder);
    int is_output = status.st_dev == inputs->output_device && status.st_ino == inputs->output_inode;
    for (int i = 0; i < n; i++) {
        check_format(path, sizeof(path), "%s%s%s", folder, folder[length - 1] == '/' ? "" : "/",
                     entries[i]->d_name);
        if (!is_output) {
            inputs_add_entry(inputs, path, domain);
        }
        free(entries[i]);
    }
    free(entries);
}

// ----------------------------------------------------------------------------
// the list

__attribute__((noreturn)) static inline void input_refuse_kind(const char *path) {
    die_usage(
        "%s: unknown kind of file\n  ---> name JSON Lines FILE.jsonl and text FILE.txt (either with .zst "
        "behind), or give JSON Lines through standard input: - <%s",
        path, path);
}

static inline void inputs_add_file(Inputs *inputs, const char *path, const struct stat *status) {
    int compressed;
    InputKind kind = input_kind(path, &compressed);
    int named = kind == INPUT_JSON_LINES || compressed || input_has_suffix(path, strlen(path), ".txt");
    if (kind == INPUT_UNKNOWN || (!named && !S_ISREG(status->st_mode))) {
        input_refuse_kind(path);
    }
    if (S_ISREG(status->st_mode) && !input_is_readable_text(path) && !named) {
        die_usage(
            "%s is no text: there is a zero byte at its beginning\n  ---> name files of text; only .zst "
            "is decompressed here",
            path);
    }
    domain_of_file(inputs_append(inputs, path, status)->domain, path);
}

static inline void inputs_add(Inputs *inputs, const char *path) {
    struct stat status;
    char domain[DOMAIN_SIZE];
    inputs->arguments++;
    if (strcmp(path, "-") == 0) {
        domain_of_file(inputs_append(inputs, path, NULL)->domain, path);
    } else if (stat(path, &status) != 0) {
        input_cannot_open(path,
                          "check its name; data/download_*.sh fetch text, data/sample.jsonl is the sample");
    } else if (S_ISDIR(status.st_mode)) {
        int before = inputs->count;
        domain_of_folder(domain, path);
        inputs_add_folder(inputs, path, domain);
        if (inputs->count == before) {
            die("%s holds no text\n  ---> name a folder with .jsonl or text files in it, other than --out",
                path);
        }
    } else {
        inputs_add_file(inputs, path, &status);
    }
}

// out: the folder that will be written (it need not be there yet)
static inline void inputs_init(Inputs *inputs, char *const *paths, int count, const char *out) {
    struct stat status;
    memset(inputs, 0, sizeof(*inputs));
    if (stat(out, &status) == 0) {
        inputs->output_device = status.st_dev;
        inputs->output_inode = status.st_ino;
    }
    for (int i = 0; i < count; i++) {
        inputs_add(inputs, paths[i]);
    }
    if (inputs->left_out > 0) {
        warn("%d file%s of the folders %s left out, being no text or of unknown kind, as %s",
             inputs->left_out, inputs->left_out > 1 ? "s" : "", inputs->left_out > 1 ? "are" : "is",
             inputs->first_left_out);
    }
}

static inline void inputs_free(Inputs *inputs) {
    for (int i = 0; i < inputs->count; i++) {
        free(inputs->files[i].path);
    }
    free(inputs->files);
    free(inputs->first_left_out);
}

// of the first n files: as long as it stays the same, nobody has touched them
static inline uint64_t inputs_identity(const Inputs *inputs, int n) {
    uint64_t h = 0;
    for (int i = 0; i < n && i < inputs->count; i++) {
        const uint64_t pair[2] = {h, inputs->files[i].identity};
        h = hash_text((const char *)pair, sizeof(pair));
    }
    return h;
}

#endif
