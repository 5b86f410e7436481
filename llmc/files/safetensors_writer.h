/*
Writes a safetensors file (safetensors.h has the format). Its tensors are declared first, on every rank alike,
so that all know where each tensor lies; then each rank writes what it keeps of them, in pieces of any size
and in any order, to its place in the one file.

    open -> declare NAME, dtype, shape ...; note KEY, TEXT ... -> begin -> write_at values ... -> finish

Begin and finish are said by all ranks together: rank 0 makes the file, its header and its full size before
the others open it, and gives it its name (newfile.h) once all say that theirs is on the disk. What fails on
one rank ends all of them, and leaves an earlier file of that name as it was.

Shapes: any up to 8 dimensions; F32, BF16, I64, I32 or U8. Errors: values that do not fit the declared ones,
or are missing, die; a write that fails is remembered until finish, which dies naming rank, file and cause.
*/
#ifndef SAFETENSORS_WRITER_H
#define SAFETENSORS_WRITER_H

#include "llmc/files/folder.h"
#include "llmc/files/newfile.h"
#include "llmc/files/safetensors.h"
#include "llmc/run/ranks.h"

// what a rank says when it is done
typedef struct {
    uint64_t written; // bytes of tensors
    int error;        // errno of what failed first, 0: nothing
    int unopened;     // it failed in opening the file
} WriteReport;

typedef struct {
    NewFile name;
    const char *folder;        // NULL, or a temporary one that rank 0 removes if the file fails
    int file;                  // -1: not open
    JsonArena arena;           // owns the names
    SafetensorsEntry *entries; // as declared
    size_t count;
    uint64_t total; // bytes of all
    char *notes;    // the header's metadata behind its first, each with a comma before it, or NULL
    size_t notes_size;
    FILE *notes_out;
    uint64_t data_start; // bytes before them
    char *header;        // these bytes
    WriteReport report;
} SafetensorsWriter;

static inline void safetensors_writer_open(SafetensorsWriter *w, const char *path) {
    memset(w, 0, sizeof(*w));
    newfile_name(&w->name, path);
    w->file = -1;
}

// a remark of the header: the format wants text
static inline void safetensors_note(SafetensorsWriter *w, const char *key, const char *text) {
    if (w->notes_out == NULL) {
        w->notes_out = check_memstream(&w->notes, &w->notes_size);
    }
    fputc(',', w->notes_out);
    json_write_string(w->notes_out, key, strlen(key));
    fputc(':', w->notes_out);
    json_write_string(w->notes_out, text, strlen(text));
}

static inline int safetensors_can_write(const char *dtype) {
    static const char *const dtypes[] = {"F32", "BF16", "I64", "I32", "U8"};
    int can = 0;
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]); i++) {
        can |= strcmp(dtype, dtypes[i]) == 0;
    }
    return can;
}

// dtype: one of the above; returns the tensor's number, for safetensors_write_at
static inline size_t safetensors_declare(SafetensorsWriter *w, const char *name, const char *dtype, int ndim,
                                         const int64_t *shape) {
    if (!safetensors_can_write(dtype) || ndim < 0 || ndim > SAFETENSORS_MAX_DIMS) {
        die("%s: tensor %s cannot be written as %s with %d dimensions", w->name.path, name, dtype, ndim);
    }
    if ((w->count & (w->count - 1)) == 0) { // full at each power of two
        w->entries = GROW(SafetensorsEntry, w->entries, w->count ? 2 * w->count : 1);
    }
    SafetensorsEntry *entry = &w->entries[w->count++];
    memset(entry, 0, sizeof(*entry));
    entry->name = safetensors_copy_text(&w->arena, name);
    entry->dtype = safetensors_copy_text(&w->arena, dtype);
    entry->ndim = ndim;
    for (int i = 0; i < ndim; i++) {
        entry->shape[i] = shape[i];
    }
    entry->offset = w->total;
    entry->size = safetensors_num_elements(entry) * safetensors_dtype_size(dtype);
    w->total += entry->size;
    return w->count - 1;
}

// ----------------------------------------------------------------------------
// header

static inline void safetensors_print_entry(FILE *out, const SafetensorsEntry *entry) {
    char shape[256];
    safetensors_format_shape(shape, sizeof(shape), entry->ndim, entry->shape);
    fputc(',', out);
    json_write_string(out, entry->name, strlen(entry->name));
    fprintf(out, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}", entry->dtype, shape,
            (unsigned long long)entry->offset, (unsigned long long)(entry->offset + entry->size));
}

// all that stands before the data, in memory
static inline void safetensors_make_header(SafetensorsWriter *w) {
    size_t size = 0;
    uint64_t n = 0;
    FILE *out = check_memstream(&w->header, &size);
    fwrite(&n, sizeof(n), 1, out);                        // its length, known at its end
    fprintf(out, "{\"__metadata__\":{\"format\":\"pt\""); // without it transformers refuses the file
    if (w->notes_out != NULL) {
        fflush(w->notes_out);
        fwrite(w->notes, 1, w->notes_size, out);
    }
    fputc('}', out);
    for (size_t i = 0; i < w->count; i++) {
        safetensors_print_entry(out, &w->entries[i]);
    }
    fputc('}', out);
    while (ftell(out) % 64 != 0) {
        fputc(' ', out); // data begins at a multiple of 64 bytes
    }
    fclose(out);
    n = size - sizeof(n);
    memcpy(w->header, &n, sizeof(n));
    w->data_start = size;
}

// ----------------------------------------------------------------------------
// what one process does. The first failure is remembered, and the rest left out

static inline void safetensors_failed(SafetensorsWriter *w) {
    w->report.error = w->report.error == 0 ? errno : w->report.error;
}

static inline void safetensors_put(SafetensorsWriter *w, const void *data, uint64_t size, uint64_t at) {
    const char *bytes = (const char *)data;
    while (size > 0 && w->report.error == 0) {
        ssize_t put = pwrite(w->file, bytes, (size_t)size, (off_t)at);
        if (put < 0 && errno != EINTR) {
            safetensors_failed(w);
        }
        uint64_t done = put > 0 ? (uint64_t)put : 0;
        bytes += done;
        at += done;
        size -= done;
    }
}

static inline void safetensors_open_file(SafetensorsWriter *w, int flags) {
    w->file = open(w->name.temporary, O_WRONLY | O_CLOEXEC | flags, 0666);
    if (w->file < 0) {
        safetensors_failed(w);
        w->report.unopened = 1;
    }
}

// the file with its header, as long as it will be
static inline void safetensors_create(SafetensorsWriter *w) {
    safetensors_make_header(w);
    safetensors_open_file(w, O_CREAT | O_TRUNC);
    if (w->file >= 0 && !newfile_is_special(&w->name) &&
        ftruncate(w->file, (off_t)(w->data_start + w->total)) != 0) {
        safetensors_failed(w);
    }
    safetensors_put(w, w->header, w->data_start, 0);
}

// the file that another process has created
static inline void safetensors_join(SafetensorsWriter *w) {
    safetensors_make_header(w);
    safetensors_open_file(w, 0);
}

static inline void safetensors_put_bf16(SafetensorsWriter *w, const float *x, uint64_t n, uint64_t at) {
    uint16_t half[4096];
    for (uint64_t done = 0; done < n;) {
        uint64_t piece = n - done < 4096 ? n - done : 4096;
        for (uint64_t i = 0; i < piece; i++) {
            half[i] = float_to_bf16(x[done + i]);
        }
        safetensors_put(w, half, 2 * piece, at + 2 * done);
        done += piece;
    }
}

// elements [first, first + n) of the tensor; x: floats for F32 and BF16, else what the dtype says
static inline void safetensors_write_at(SafetensorsWriter *w, size_t tensor, uint64_t first, const void *x,
                                        uint64_t n) {
    const SafetensorsEntry *entry = &w->entries[tensor];
    uint64_t element = safetensors_dtype_size(entry->dtype), most = entry->size / element;
    uint64_t at = w->data_start + entry->offset + element * first;
    if (first > most || n > most - first) {
        die("%s: more values than declared for %s", w->name.path, entry->name);
    }
    if (strcmp(entry->dtype, "BF16") == 0) {
        safetensors_put_bf16(w, (const float *)x, n, at);
    } else {
        safetensors_put(w, x, element * n, at);
    }
    w->report.written += element * n;
}

// on the disk, as far as this process has written it
static inline void safetensors_close_file(SafetensorsWriter *w) {
    if (w->file >= 0 && !newfile_is_special(&w->name) && w->report.error == 0 && fsync(w->file) != 0) {
        safetensors_failed(w);
    }
    if (w->file >= 0 && close(w->file) != 0) {
        safetensors_failed(w);
    }
    w->file = -1;
    if (w->notes_out != NULL) {
        fclose(w->notes_out);
    }
    free(w->notes);
    free(w->header);
    free(w->entries);
    json_arena_free(&w->arena);
}

// ----------------------------------------------------------------------------
// what all ranks do together

static inline void safetensors_begin(SafetensorsWriter *w, Ranks *ranks) {
    if (ranks->rank == 0) {
        safetensors_create(w);
    }
    ranks_barrier(ranks);
    if (ranks->rank != 0) {
        safetensors_join(w);
    }
}

// the lowest rank that has failed, or how many there are
static inline int first_failed(const WriteReport *all, int ranks) {
    int rank = 0;
    while (rank < ranks && all[rank].error == 0) {
        rank++;
    }
    return rank;
}

__attribute__((noreturn)) static inline void refuse_failed_write(const SafetensorsWriter *w, int rank,
                                                                 int ranks, const WriteReport *report) {
    char who[32] = "";
    if (ranks > 1) {
        check_format(who, sizeof(who), "rank %d ", rank);
    }
    die("%scannot write %s: %s\n  ---> %s", who, w->name.path, strerror(report->error),
        !report->unopened ? "free some disk space, or choose another folder"
        : rank == 0       ? "make its folder, or choose another"
                          : "choose a folder on a file system that all machines share");
}

// Dies, and rank 0 removes what there is of the file, if a rank has failed or if not all bytes of all tensors
// have been written; all [ranks]
static inline void check_reports(const SafetensorsWriter *w, Ranks *ranks, const WriteReport *all) {
    int failed = first_failed(all, ranks->count);
    uint64_t written = 0;
    for (int r = 0; r < ranks->count; r++) {
        written += all[r].written;
    }
    if (failed == ranks->count && written == w->total) {
        return;
    }
    if (ranks->rank != 0) {
        ranks_barrier(ranks); // in which rank 0 ends the run: one of them says why
    } else if (!newfile_is_special(&w->name)) {
        unlink(w->name.temporary);
    }
    if (ranks->rank == 0 && w->folder != NULL) {
        remove_folder(w->folder);
    }
    if (failed < ranks->count) {
        refuse_failed_write(w, failed, ranks->count, &all[failed]);
    }
    die("%s: %llu bytes of its tensors were written, %llu were declared", w->name.path,
        (unsigned long long)written, (unsigned long long)w->total);
}

// the file gets its name here, and only if it is whole
static inline void safetensors_finish(SafetensorsWriter *w, Ranks *ranks) {
    WriteReport *all = NEW(WriteReport, ranks->count);
    safetensors_close_file(w);
    ranks_gather(ranks, &w->report, sizeof(w->report), all);
    check_reports(w, ranks, all);
    free(all);
    if (ranks->rank == 0) {
        newfile_place(&w->name);
    }
}

#endif
