/*
What a statistics or trace file was made from, as remarks in its header: the checkpoint, the model's router
and sizes. Whoever reads such a file (a report) need not be told again.

Names of domains, texts and folders are spelled as in the log (json_bytes.h): any byte survives. Errors: none.
*/
#ifndef ORIGIN_H
#define ORIGIN_H

#include "llmc/files/json_bytes.h"
#include "llmc/files/safetensors_writer.h"
#include "llmc/run/run.h"
#include "llmc/run/startup.h"
// defines: json_spell_bytes, json_write_bytes; safetensors_note; Run; wants_training

// as a remark, and gone
static inline void note_composed(SafetensorsWriter *w, const char *key, Composed *c) {
    char *text = composed(c);
    safetensors_note(w, key, text);
    free(text);
}

static inline void note_integer(SafetensorsWriter *w, const char *key, int64_t value) {
    char text[32];
    check_format(text, sizeof(text), "%lld", (long long)value);
    safetensors_note(w, key, text);
}

// a JSON list of names
static inline void note_names(SafetensorsWriter *w, const char *key, const char *const *names, int count) {
    Composed list;
    compose(&list);
    for (int i = 0; i < count; i++) {
        fputs(i == 0 ? "[" : ", ", list.out);
        json_write_bytes(list.out, names[i], strlen(names[i]));
    }
    fputs(count == 0 ? "[]" : "]", list.out);
    note_composed(w, key, &list);
}

// the folder of the weights: what was loaded, or what the run has saved of itself
static inline void note_checkpoint(SafetensorsWriter *w, const Run *run) {
    const Options *o = &run->options;
    char folder[PATH_SIZE], *spelled;
    check_format(folder, sizeof(folder), "%s", o->load[0] != '\0' ? o->load : o->resume);
    if (wants_training(o)) {
        check_format(folder, sizeof(folder), "%s/step_%08lld", o->out, (long long)run->state.step);
    }
    spelled = json_spell_bytes(folder, strlen(folder));
    safetensors_note(w, "checkpoint", spelled);
    free(spelled);
}

// kind: "stats" or "trace"
static inline void note_origin(SafetensorsWriter *w, const Run *run, const char *kind) {
    const Config *c = &run->config;
    safetensors_note(w, "kind", kind);
    note_checkpoint(w, run);
    note_integer(w, "step", run->state.step);
    safetensors_note(w, "router", router_name(c->router.method));
    note_integer(w, "experts", c->router.experts);
    note_integer(w, "active", c->router.active);
    note_integer(w, "granularity", c->granularity);
    note_integer(w, "layers", c->layers);
    note_integer(w, "vocab_size", c->vocab_size);
    note_integer(w, "seq_len", run->options.seq_len);
}

#endif
