/*
compare_dumps: two dumps (llmc/files/dump.h) of the same micro-batch side by side, the CPU trainer's and the CUDA
trainer's: losses, logits, gates, and the gradient of every tensor.

    build/compare_dumps 2e-2 CPU.safetensors GPU.safetensors           the GPU took the CPU's routes
    build/compare_dumps 2e-2 CPU.safetensors GPU.safetensors free      it chose its own

    relative error  ||a - b|| / ||a||       cosine  <a, b> / (||a|| ||b||)       a: the CPU's, b: the GPU's

With the CPU's routes, no expert may be on in one and off in the other, and each tensor's relative error must
be within the tolerance. Free, a logit near 0 may fall on either side: at most 1.5 % of the (token, expert)
pairs may, and the language model's loss must agree to 2e-3; gradients are left out, as a pair that is on in
one of them alone has a gradient there alone. Exit 1 when something is beyond its bound.
*/
#include "llmc/check.h"
#include "llmc/streams.h"
#include "llmc/files/safetensors.h"
#include "llmc/machine.h"
#include <math.h>
// defines: sqrt, strtod

enum { NAME_WIDTH = 48 };

#define MOST_LOSS_ERROR 2e-3
#define MOST_FLIPS 0.015

typedef struct {
    double rms_a, rms_b, error, cosine;
    int64_t on_a, on_b, flips; // elements that are not 0; not 0 in one alone
    double rms_on;             // of those that are not 0 in a
    float largest_flip;        // magnitude
} Difference;

typedef struct {
    double tolerance;
    int free_routes;
    int judged, beyond;
    double worst; // error
    char worst_name[128];
} Verdict;

static Difference difference_of(const float *a, const float *b, size_t n) {
    double aa = 0.0, bb = 0.0, ab = 0.0, dd = 0.0;
    Difference r;
    memset(&r, 0, sizeof(r));
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        aa += (double)a[i] * a[i];
        bb += (double)b[i] * b[i];
        ab += (double)a[i] * b[i];
        dd += d * d;
        r.on_a += a[i] != 0.0f;
        r.on_b += b[i] != 0.0f;
        if ((a[i] != 0.0f) != (b[i] != 0.0f)) {
            float magnitude = fabsf(a[i] != 0.0f ? a[i] : b[i]);
            r.flips++;
            r.largest_flip = magnitude > r.largest_flip ? magnitude : r.largest_flip;
        }
    }
    r.rms_a = sqrt(aa / (double)n);
    r.rms_b = sqrt(bb / (double)n);
    r.rms_on = r.on_a > 0 ? sqrt(aa / (double)r.on_a) : 0.0;
    r.error = aa > 0.0 ? sqrt(dd / aa) : sqrt(dd);
    r.cosine = aa > 0.0 && bb > 0.0 ? ab / sqrt(aa * bb) : dd == 0.0 ? 1.0 : 0.0;
    return r;
}

// counts, and marks the line that is beyond its bound
static void judge(Verdict *v, const char *name, double error, double most) {
    v->judged++;
    if (!(error <= v->worst) && !isnan(v->worst)) { // NaN is the worst
        v->worst = error;
        snprintf(v->worst_name, sizeof(v->worst_name), "%s", name);
    }
    if (error <= most) {
        printf("\n");
    } else {
        v->beyond++;
        printf("   <-- beyond %.0e\n", most);
    }
}

static void print_heading(const char *title, const char *values) {
    printf("\n%-*s %-18s %13s %13s   relative error   cosine\n", NAME_WIDTH, title, values, "CPU", "GPU");
}

static void compare_scalar(Verdict *v, const char *name, float a, float b) {
    int is_lm_loss = strcmp(name, "lm_loss") == 0;
    Difference r = difference_of(&a, &b, 1);
    printf("  %-*s %-18s %13.7f %13.7f   %14.1e", NAME_WIDTH - 2, name, "", a, b, r.error);
    if (!is_lm_loss && v->free_routes) {
        printf("\n");
    } else {
        judge(v, name, r.error,
              is_lm_loss && v->tolerance > MOST_LOSS_ERROR ? MOST_LOSS_ERROR : v->tolerance);
    }
}

static void compare_tensor(Verdict *v, const char *name, const SafetensorsEntry *entry, Difference r) {
    char shape[64];
    safetensors_format_shape(shape, sizeof(shape), entry->ndim, entry->shape);
    printf("  %-*s %-18s %13.6e %13.6e   %14.1e   %.7f", NAME_WIDTH - 2, name, shape, r.rms_a, r.rms_b,
           r.error, r.cosine);
    if (v->free_routes) {
        printf("\n");
    } else {
        judge(v, name, r.error, v->tolerance);
    }
}

// who is on: exactly the same when the routes were given
static void compare_routes(Verdict *v, const char *name, const SafetensorsEntry *entry, Difference r) {
    double pairs = (double)safetensors_num_elements(entry), share = (double)r.flips / pairs;
    char label[128];
    snprintf(label, sizeof(label), "%s: pairs that are on", name);
    printf("  %-*s %-18s %13lld %13lld   ", NAME_WIDTH - 2, label, "", (long long)r.on_a, (long long)r.on_b);
    printf("%6lld differ", (long long)r.flips);
    if (r.flips > 0) {
        printf(", %.2f %%, the largest at %.4f rms", 100.0 * share, r.largest_flip / r.rms_on);
    }
    judge(v, label, share, v->free_routes ? MOST_FLIPS : 0.0);
}

static int has_prefix(const char *name, const char *prefix) {
    return strncmp(name, prefix, strlen(prefix)) == 0;
}

static void compare_entry(Verdict *v, const Safetensors *a, const Safetensors *b,
                          const SafetensorsEntry *entry) {
    const SafetensorsEntry *other = safetensors_require(b, entry->name, entry->ndim, entry->shape);
    size_t n = (size_t)safetensors_num_elements(entry);
    float *x = NEW(float, n), *y = NEW(float, n);
    safetensors_read_f32(a, entry, x);
    safetensors_read_f32(b, other, y);
    if (n == 1 && entry->ndim == 1 && strchr(entry->name, '.') == NULL) {
        compare_scalar(v, entry->name, x[0], y[0]);
    } else {
        int is_gradient = has_prefix(entry->name, "grad.");
        Difference r = difference_of(x, y, n);
        compare_tensor(v, entry->name + (is_gradient ? strlen("grad.") : 0), entry, r);
        if (has_prefix(entry->name, "gates.")) {
            compare_routes(v, entry->name, entry, r);
        }
    }
    free(x);
    free(y);
}

static int by_offset(const void *a, const void *b) {
    uint64_t x = (*(const SafetensorsEntry *const *)a)->offset;
    uint64_t y = (*(const SafetensorsEntry *const *)b)->offset;
    return (x > y) - (x < y);
}

// in the file's order, which is the model's: from the embedding to the head
static void compare_files(Verdict *v, const Safetensors *a, const Safetensors *b) {
    const SafetensorsEntry **order = NEW(const SafetensorsEntry *, a->count);
    for (size_t i = 0; i < a->count; i++) {
        order[i] = &a->entries[i];
    }
    qsort(order, a->count, sizeof(order[0]), by_offset);
    int section = 0;
    print_heading("losses", "");
    for (size_t i = 0; i < a->count; i++) {
        int is_gradient = has_prefix(order[i]->name, "grad.");
        int is_output = has_prefix(order[i]->name, "gates.") || has_prefix(order[i]->name, "logits");
        if (is_gradient && v->free_routes) {
            continue;
        }
        if (is_output && section < 1) {
            print_heading("outputs", "root mean square");
        } else if (is_gradient && section < 2) {
            print_heading("gradients", "root mean square");
        }
        section = is_gradient ? 2 : is_output ? 1 : section;
        compare_entry(v, a, b, order[i]);
    }
    free(order);
}

int main(int argc, char **argv) {
    streams_open();
    machine_start(argv);
    Verdict v;
    memset(&v, 0, sizeof(v));
    v.free_routes = argc == 5 && strcmp(argv[4], "free") == 0;
    char *end = argc >= 4 ? argv[1] : NULL;
    v.tolerance = argc >= 4 ? strtod(argv[1], &end) : 0.0;
    if (argc != 4 + v.free_routes || end == argv[1] || *end != '\0' || !(v.tolerance > 0.0)) {
        die_usage("usage: build/compare_dumps TOLERANCE CPU.safetensors GPU.safetensors [free]");
    }
    Safetensors *a = safetensors_open(argv[2], "make it with --dump");
    Safetensors *b = safetensors_open(argv[3], "make it with --dump");
    if (a->count != b->count) {
        die("%s has %zu tensors, %s has %zu\n  ---> dump the same model and micro-batch with both trainers",
            argv[2], a->count, argv[3], b->count);
    }
    compare_files(&v, a, b);
    printf("\n%d of %d within bounds", v.judged - v.beyond, v.judged);
    if (v.worst == 0.0) {
        printf(", every one equal\n");
    } else {
        printf("; the worst: %.1e, %s\n", v.worst, v.worst_name);
    }
    safetensors_close(a);
    safetensors_close(b);
    return v.beyond > 0;
}
