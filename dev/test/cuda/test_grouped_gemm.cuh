/*
grouped_gemm.cuh against the products of matmul.h and the SwiGLU of experts.h (large shapes: against a loop of
cuBLASLt's products over the experts), function by function on the same rounded inputs.

Each case is run in chunks of several sizes, with one chunk beyond the last row. Chunks' H lie in the store
and in scratch by turns. Buffers begin as NaN: rows that exist must all be written, others not at all. The
bits of rows must not depend on the chunks, and H computed again must be H.

Tolerances. fp32 build: 1e-5. bf16: operands are exact and sums fp32, so what is stored in fp32 (weights'
gradients, dgate) is good to 5e-5 (tensor cores cut off bits that fp32 additions would round), and what is
rounded once to bf16, at most 2^-9 = 2e-3 relative an element, to 3e-3.

bench: TFLOP/s of the six products on N(0, 1), beside cuBLASLt's dense product of as many operations.
*/
#ifndef CUDA_TEST_GROUPED_GEMM_CUH
#define CUDA_TEST_GROUPED_GEMM_CUH

#include "llmc/experts.h"
#include "llmc/matmul.cuh"
#include "llmc/gpu/grouped_gemm.cuh"
#include "harness.cuh"

typedef enum { GROUPED_H, GROUPED_Y, GROUPED_DH, GROUPED_DGATE, GROUPED_DX } GroupedRows;
enum { GROUPED_ROW_TENSORS = GROUPED_DX + 1 };

static const char *const grouped_row_names[GROUPED_ROW_TENSORS] = {"G, U, gate A", "Y", "dG, dU, gate A",
                                                                   "dgate", "dX'"};

// sizes, inputs and what the C functions make of them; all on the host, rows with pads
typedef struct {
    int d, F, E, tokens;
    int64_t rows;
    int64_t *offsets; // [E + 1] multiples of 64
    int *token;       // [rows] -1 in pads
    float *gate;
    float *x, *dy, *w_gate_up, *w_down; // [tokens, d], [tokens, d], [E, 2F, d], [E, d, F]
    float *begin_gate_up, *begin_down;  // what the weights' gradients hold before
    float *want[GROUPED_ROW_TENSORS];   // [rows, width]
    float *want_dw_gate_up, *want_dw_down;
} GroupedCase;

static int64_t grouped_width(const GroupedCase *c, int tensor) {
    const int64_t widths[GROUPED_ROW_TENSORS] = {3 * c->F, c->d, 3 * c->F, 1, c->d};
    return widths[tensor];
}

// ----------------------------------------------------------------------------
// the reference

// counts[e] rows of expert e, of tokens at random
static GroupedCase grouped_case(int d, int F, int E, int tokens, const int *counts) {
    GroupedCase c;
    memset(&c, 0, sizeof(c));
    c.d = d;
    c.F = F;
    c.E = E;
    c.tokens = tokens;
    c.offsets = NEW(int64_t, E + 1);
    for (int e = 0; e < E; e++) {
        c.offsets[e + 1] = c.offsets[e] + (counts[e] + 63) / 64 * 64;
    }
    c.rows = c.offsets[E];
    c.token = NEW(int, c.rows);
    c.gate = NEW(float, c.rows);
    fill_uniform(c.gate, (size_t)c.rows, 5, 1.0f);
    for (int e = 0; e < E; e++) {
        for (int64_t r = c.offsets[e]; r < c.offsets[e + 1]; r++) {
            bool pad = r - c.offsets[e] >= counts[e];
            c.token[r] = pad ? -1 : (int)((unsigned)r * 2654435761u % (unsigned)tokens);
            c.gate[r] = pad ? 0.0f : c.gate[r];
        }
    }
    int64_t weight = (int64_t)E * d * F;
    c.x = host_random((int64_t)tokens * d, 1, 1.0f);
    c.dy = host_random((int64_t)tokens * d, 2, 1.0f);
    c.w_gate_up = host_random(2 * weight, 3, 0.5f);
    c.w_down = host_random(weight, 4, 0.5f);
    c.begin_gate_up = host_random(2 * weight, 6, 1.0f);
    c.begin_down = host_random(weight, 7, 1.0f);
    return c;
}

static float *grouped_gathered(const GroupedCase *c, const float *from) {
    float *rows = NEW(float, c->rows * c->d);
    for (int64_t r = 0; r < c->rows; r++) {
        if (c->token[r] >= 0) {
            memcpy(rows + r * c->d, from + (int64_t)c->token[r] * c->d, (size_t)c->d * sizeof(float));
        }
    }
    return rows;
}

static void grouped_round(float *x, int64_t n) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        x[i] = to_float(to_x(x[i]));
    }
}

static float *grouped_copy(const float *x, int64_t n) {
    float *copy = NEW(float, n);
    memcpy(copy, x, (size_t)n * sizeof(float));
    return copy;
}

// The C products, or for large ones cuBLASLt's, expert by expert, with fp32 results: out[M, N] = op(a) op(b)
typedef struct {
    int trans_a, trans_b, N;
    int64_t row_a, row_b; // elements of a row of a, of b
} GroupedProduct;

// By rows: out's rows are the experts', K = row_a. With trans_a they are summed over: out has row_a rows an
// expert
static float *grouped_by_cublas(const GroupedCase *c, GroupedProduct p, const float *a, const float *b) {
    int64_t K = p.row_a, size_b = p.trans_a ? c->rows * p.row_b : c->E * K * p.N;
    int64_t size_out = p.trans_a ? c->E * p.row_a * p.N : c->rows * p.N;
    floatX *da = device_x(a, c->rows * p.row_a), *db = device_x(b, size_b);
    float *out = device_new<float>(size_out);
    void *workspace = device_new<char>(32 << 20);
    GemmPlans *plans = NEW(GemmPlans, 1);
    gemm_open(plans, workspace, 32 << 20);
    CUDA_CHECK(cudaMemset(out, 0, (size_t)size_out * sizeof(float)));
    for (int e = 0; e < c->E; e++) {
        int64_t first = c->offsets[e], rows = c->offsets[e + 1] - first;
        if (p.trans_a && rows > 0) {
            gemm(plans, 1, 0, p.row_a, p.N, rows, da + first * p.row_a, p.row_a, db + first * p.row_b,
                 p.row_b, out + e * p.row_a * p.N, p.N, NULL, 0);
        } else if (rows > 0) {
            gemm(plans, 0, p.trans_b, rows, p.N, K, da + first * K, K, db + e * K * p.N, p.row_b,
                 out + first * p.N, p.N, NULL, 0);
        }
    }
    float *host = fetch(out, size_out);
    gemm_close(plans);
    free(plans);
    device_release(workspace);
    device_release(da);
    device_release(db);
    device_release(out);
    return host;
}

// inp [rows, C] by weight [E, OC, C], transposed
static float *grouped_forward(const GroupedCase *c, const float *inp, const float *weight, int C, int OC,
                              bool large) {
    if (large) {
        GroupedProduct p = {0, 1, OC, C, C};
        return grouped_by_cublas(c, p, inp, weight);
    }
    float *out = NEW(float, c->rows *OC);
    matmul_grouped_forward(out, inp, weight, c->offsets, c->E, C, OC);
    return out;
}

// dout [rows, OC] by weight [E, OC, C]
static float *grouped_backward(const GroupedCase *c, const float *dout, const float *weight, int C, int OC,
                               bool large) {
    if (large) {
        GroupedProduct p = {0, 0, C, OC, C};
        return grouped_by_cublas(c, p, dout, weight);
    }
    float *dinp = NEW(float, c->rows *C);
    matmul_grouped_backward(dinp, NULL, dout, NULL, weight, c->offsets, c->E, C, OC);
    return dinp;
}

// begin + dout^T inp
static float *grouped_wgrad(const GroupedCase *c, const float *begin, const float *dout, const float *inp,
                            int C, int OC, bool large) {
    int64_t n = (int64_t)c->E * C * OC;
    float *dweight = grouped_copy(begin, n);
    if (large) {
        GroupedProduct p = {1, 0, C, OC, C};
        float *product = grouped_by_cublas(c, p, dout, inp);
        for (int64_t i = 0; i < n; i++) {
            dweight[i] += product[i];
        }
        free(product);
    } else {
        matmul_grouped_backward(NULL, dweight, dout, inp, NULL, c->offsets, c->E, C, OC);
    }
    return dweight;
}

// as a chunk's buffer has them: pair [rows, 2F] and a [rows, F] side by side
static float *grouped_beside(const GroupedCase *c, const float *pair, const float *a) {
    int64_t F = c->F;
    float *rows = NEW(float, c->rows * 3 * F);
    for (int64_t r = 0; r < c->rows; r++) {
        memcpy(rows + r * 3 * F, pair + r * 2 * F, (size_t)(2 * F) * sizeof(float));
        memcpy(rows + r * 3 * F + 2 * F, a + r * F, (size_t)F * sizeof(float));
    }
    return rows;
}

static void grouped_reference(GroupedCase *c, bool large) {
    int d = c->d, F = c->F;
    int64_t P = c->rows;
    float **want = c->want, *rows = grouped_gathered(c, c->x), *drows = grouped_gathered(c, c->dy);
    float *h = grouped_forward(c, rows, c->w_gate_up, d, 2 * F, large), *a = NEW(float, P *F);
    grouped_round(h, P * 2 * F);
    swiglu_forward(a, h, P, F);
    for (int64_t i = 0; i < P * F; i++) {
        a[i] *= c->gate[i / F];
    }
    grouped_round(a, P * F);
    want[GROUPED_H] = grouped_beside(c, h, a);
    want[GROUPED_Y] = grouped_forward(c, a, c->w_down, F, d, large);
    float *da = grouped_backward(c, drows, c->w_down, F, d, large);
    want[GROUPED_DGATE] = NEW(float, P);
    swiglu_backward(h, da, want[GROUPED_DGATE], c->gate, P, F); // h: now dH
    grouped_round(h, P * 2 * F);
    want[GROUPED_DH] = grouped_beside(c, h, a);
    want[GROUPED_DX] = grouped_backward(c, h, c->w_gate_up, d, 2 * F, large);
    c->want_dw_down = grouped_wgrad(c, c->begin_down, drows, a, F, d, large);
    c->want_dw_gate_up = grouped_wgrad(c, c->begin_gate_up, h, rows, d, 2 * F, large);
    float *all[] = {rows, drows, h, a, da};
    for (float *p : all) {
        free(p);
    }
}

static void grouped_free(GroupedCase *c) {
    float *all[] = {c->gate,        c->x,
                    c->dy,          c->w_gate_up,
                    c->w_down,      c->begin_gate_up,
                    c->begin_down,  c->want_dw_gate_up,
                    c->want_dw_down};
    for (float *p : all) {
        free(p);
    }
    for (int i = 0; i < GROUPED_ROW_TENSORS; i++) {
        free(c->want[i]);
    }
    free(c->offsets);
    free(c->token);
}

// ----------------------------------------------------------------------------
// the device's side

typedef struct {
    int *offsets, *token;
    float *gate;
    floatX *x, *dy, *w_gate_up, *w_down;
    float *dw_gate_up, *dw_down;
    int64_t *h_first;
    float *got[GROUPED_ROW_TENSORS]; // host, collected chunk by chunk
} GroupedDevice;

static GroupedDevice grouped_upload(const GroupedCase *c) {
    GroupedDevice g;
    int64_t weight = (int64_t)c->E * c->d * c->F;
    int *offsets = NEW(int, c->E + 1);
    for (int e = 0; e <= c->E; e++) {
        offsets[e] = (int)c->offsets[e];
    }
    g.offsets = device_i(offsets, c->E + 1);
    free(offsets);
    g.token = device_i(c->token, c->rows);
    g.gate = device_f(c->gate, c->rows);
    g.x = device_x(c->x, (int64_t)c->tokens * c->d);
    g.dy = device_x(c->dy, (int64_t)c->tokens * c->d);
    g.w_gate_up = device_x(c->w_gate_up, 2 * weight);
    g.w_down = device_x(c->w_down, weight);
    g.dw_gate_up = device_f(c->begin_gate_up, 2 * weight);
    g.dw_down = device_f(c->begin_down, weight);
    g.h_first = device_new<int64_t>(1);
    memset(g.got, 0, sizeof(g.got));
    return g;
}

static void grouped_release(GroupedDevice *g) {
    void *all[] = {g->offsets,   g->token,  g->gate,       g->x,       g->dy,
                   g->w_gate_up, g->w_down, g->dw_gate_up, g->dw_down, g->h_first};
    for (void *p : all) {
        device_release(p);
    }
    for (int i = 0; i < GROUPED_ROW_TENSORS; i++) {
        free(g->got[i]);
    }
}

// A chunk's buffer of R rows: the reference's, where rows exist, else NaN
static floatX *grouped_buffer(const GroupedCase *c, int tensor, int64_t first, int64_t existing, int64_t R) {
    int64_t width = grouped_width(c, tensor);
    floatX *buffer = device_new<floatX>(R * width);
    if (existing > 0) {
        floatX *filled = device_x(c->want[tensor] + first * width, existing * width);
        CUDA_CHECK(cudaMemcpy(buffer, filled, (size_t)(existing * width) * sizeof(floatX),
                              cudaMemcpyDeviceToDevice));
        device_release(filled);
    }
    return buffer;
}

// rows that do not exist must be as they were: NaN
static void grouped_collect(const GroupedCase *c, GroupedDevice *g, int tensor, const floatX *buffer,
                            int64_t first, int64_t existing, int64_t R) {
    int64_t width = grouped_width(c, tensor), touched = 0;
    float *host = fetch(buffer, R * width);
    for (int64_t i = existing * width; i < R * width; i++) {
        touched += !isnan(host[i]);
    }
    CHECK(touched == 0);
    if (existing > 0) {
        memcpy(g->got[tensor] + first * width, host, (size_t)(existing * width) * sizeof(float));
    }
    free(host);
}

// H from row `first` on of a buffer of which the first `kept` rows are the store
static ChunkH grouped_h(const GroupedDevice *g, floatX *buffer, int64_t rows, int64_t kept, int64_t first) {
    CUDA_CHECK(cudaMemcpy(g->h_first, &first, sizeof(first), cudaMemcpyHostToDevice));
    ChunkH h = {buffer, rows, kept, g->h_first, 0};
    return h;
}

// H once more, into a fresh buffer: the same bits in scratch; nothing is written if it is in the store
static void grouped_check_recomputation(const GroupedCase *c, const GroupedDevice *g, RowChunk chunk,
                                        const floatX *was, bool in_store) {
    int64_t R = chunk.rows, n = R * 3 * c->F, bytes = n * (int64_t)sizeof(floatX);
    floatX *store = device_new<floatX>(2 * n), *scratch = store + n;
    ChunkH h = grouped_h(g, store, 2 * R, R, in_store ? 0 : R);
    uint64_t untouched = device_hash(store, bytes);
    grouped_up_forward(h, 1, g->x, g->w_gate_up, chunk, c->d, c->F, 0);
    CHECK(device_hash(store, bytes) == untouched);
    CHECK(device_hash(scratch, bytes) == (in_store ? untouched : device_hash(was, bytes)));
    device_release(store);
}

// without a backward: gate A alone is written, the same bits
static void grouped_check_alone(const GroupedCase *c, const GroupedDevice *g, RowChunk chunk,
                                const floatX *was, int64_t existing) {
    int64_t F = c->F, n = chunk.rows * 3 * F, wrong = 0;
    floatX *buffer = device_new<floatX>(n);
    ChunkH h = grouped_h(g, buffer, chunk.rows, 0, 0);
    h.alone = 1;
    grouped_up_forward(h, 0, g->x, g->w_gate_up, chunk, c->d, c->F, 0);
    float *got = fetch(buffer, n), *want = fetch(was, n);
    for (int64_t i = 0; i < n; i++) {
        bool written = i % (3 * F) >= 2 * F && i / (3 * F) < existing;
        wrong += written ? got[i] != want[i] : !isnan(got[i]);
    }
    CHECK(wrong == 0);
    free(got);
    free(want);
    device_release(buffer);
}

// H from X, Y from the reference's H
static void grouped_run_forward(const GroupedCase *c, GroupedDevice *g, RowChunk chunk, int64_t existing,
                                bool in_store) {
    int d = c->d, F = c->F;
    int64_t R = chunk.rows, first = chunk.first, bytes = R * 3 * F * (int64_t)sizeof(floatX);
    int64_t kept = R + 64, at = in_store ? 64 : kept;
    floatX *store = device_new<floatX>((kept + R) * 3 * F), *scratch = store + kept * 3 * F;
    floatX *y = device_new<floatX>(R * d), *want_h = grouped_buffer(c, GROUPED_H, first, existing, R);
    floatX *here = store + at * 3 * F, *other = in_store ? scratch : store;
    uint64_t untouched = device_hash(other, bytes);
    ChunkH h = grouped_h(g, store, kept + R, kept, at);
    grouped_up_forward(h, 0, g->x, g->w_gate_up, chunk, d, F, 0);
    CHECK(device_hash(other, bytes) == untouched);
    grouped_collect(c, g, GROUPED_H, here, first, existing, R);
    grouped_check_recomputation(c, g, chunk, here, in_store);
    grouped_check_alone(c, g, chunk, here, existing);
    ChunkH wanted = grouped_h(g, want_h, R, in_store ? R : 0, 0);
    grouped_down_forward(y, wanted, g->w_down, chunk, d, F, 0);
    grouped_collect(c, g, GROUPED_Y, y, first, existing, R);
    device_release(store);
    device_release(want_h);
    device_release(y);
}

// each function from the reference's inputs: dH is uploaded anew for the products that read it
static void grouped_run_backward(const GroupedCase *c, GroupedDevice *g, RowChunk chunk, int64_t existing,
                                 bool in_store) {
    int d = c->d, F = c->F, tiles = grouped_dgate_tiles(F, test_kernels);
    int64_t R = chunk.rows, first = chunk.first;
    floatX *h_rows = grouped_buffer(c, GROUPED_H, first, existing, R);
    floatX *dh_rows = grouped_buffer(c, GROUPED_DH, first, existing, R);
    floatX *dx = device_new<floatX>(R * d);
    float *partial = device_new<float>(R * tiles);
    ChunkH h = grouped_h(g, h_rows, R, in_store ? R : 0, 0), dh = h;
    dh.buffer = dh_rows;
    grouped_down_backward(h, partial, g->dy, g->w_down, chunk, d, F, 0);
    grouped_collect(c, g, GROUPED_DH, h_rows, first, existing, R);
    float *parts = fetch(partial, R * tiles);
    int64_t touched = 0;
    for (int64_t i = 0; i < R * tiles; i++) {
        if (i / tiles >= existing) {
            touched += !isnan(parts[i]);
        } else {
            g->got[GROUPED_DGATE][first + i / tiles] += parts[i];
        }
    }
    CHECK(touched == 0);
    free(parts);
    grouped_down_wgrad(g->dw_down, g->dy, dh, chunk, d, F, 0);
    grouped_up_wgrad(g->dw_gate_up, dh, g->x, chunk, d, F, 0);
    grouped_up_backward(dx, dh, g->w_gate_up, chunk, d, F, 0);
    grouped_collect(c, g, GROUPED_DX, dx, first, existing, R);
    device_release(h_rows);
    device_release(dh_rows);
    device_release(dx);
    device_release(partial);
}

static GroupedDevice grouped_run(const GroupedCase *c, int chunk_rows) {
    GroupedDevice g = grouped_upload(c);
    int chunks = (int)ceil_div<int64_t>(c->rows, chunk_rows) + 1; // the last one is empty
    for (int i = 0; i < GROUPED_ROW_TENSORS; i++) {
        g.got[i] = NEW(float, c->rows *grouped_width(c, i));
    }
    for (int i = 0; i < chunks; i++) {
        RowChunk chunk = {g.offsets, g.token, g.gate, c->E, i * chunk_rows, chunk_rows, test_kernels, 0};
        int64_t left = c->rows - (int64_t)i * chunk_rows;
        int64_t existing = left < 0 ? 0 : left < chunk_rows ? left : chunk_rows;
        grouped_run_forward(c, &g, chunk, existing, i % 2 == 0);
        grouped_run_backward(c, &g, chunk, existing, i % 2 == 1);
    }
    return g;
}

// pads are zeros in every tensor
static void grouped_check_pads(const GroupedCase *c, const GroupedDevice *g) {
    int64_t wrong = 0;
    for (int tensor = 0; tensor < GROUPED_ROW_TENSORS; tensor++) {
        int64_t width = grouped_width(c, tensor);
        for (int64_t i = 0; i < c->rows * width; i++) {
            wrong += c->token[i / width] < 0 && g->got[tensor][i] != 0.0f;
        }
    }
    CHECK(wrong == 0);
}

static void grouped_check_weights(const char *what, const float *device, const float *want,
                                  const float *begin, const GroupedCase *c, int64_t per_expert) {
    float *got = fetch(device, c->E * per_expert);
    check_close(what, got, want, (size_t)(c->E * per_expert), tolerance(1e-5, 5e-5));
    for (int e = 0; e < c->E; e++) {
        if (c->offsets[e] == c->offsets[e + 1]) {
            CHECK(memcmp(got + e * per_expert, begin + e * per_expert, (size_t)per_expert * sizeof(float)) ==
                  0);
        }
    }
    free(got);
}

static void grouped_check(const GroupedCase *c, const GroupedDevice *g) {
    char what[128];
    for (int tensor = 0; tensor < GROUPED_ROW_TENSORS; tensor++) {
        snprintf(what, sizeof(what), "grouped %s (d %d, F %d, E %d, %lld rows)", grouped_row_names[tensor],
                 c->d, c->F, c->E, (long long)c->rows);
        check_close(what, g->got[tensor], c->want[tensor], (size_t)(c->rows * grouped_width(c, tensor)),
                    tensor == GROUPED_DGATE ? tolerance(1e-5, 5e-5) : tolerance(1e-5, 3e-3));
    }
    int64_t per_expert = (int64_t)c->d * c->F;
    grouped_check_weights("grouped dW_down", g->dw_down, c->want_dw_down, c->begin_down, c, per_expert);
    grouped_check_weights("grouped dW_gate_up", g->dw_gate_up, c->want_dw_gate_up, c->begin_gate_up, c,
                          2 * per_expert);
    grouped_check_pads(c, g);
}

// chunk sizes end with 0; the first is compared with the reference, all others with the first bit by bit
static void grouped_shape(int d, int F, int E, int tokens, const int *counts, const int *chunk_rows,
                          bool large) {
    GroupedCase c = grouped_case(d, F, E, tokens, counts);
    grouped_reference(&c, large);
    GroupedDevice first = grouped_run(&c, chunk_rows[0]);
    grouped_check(&c, &first);
    for (int i = 1; chunk_rows[i] > 0; i++) {
        GroupedDevice other = grouped_run(&c, chunk_rows[i]);
        for (int tensor = 0; tensor < GROUPED_ROW_TENSORS; tensor++) {
            size_t bytes = (size_t)(c.rows * grouped_width(&c, tensor)) * sizeof(float);
            CHECK(memcmp(first.got[tensor], other.got[tensor], bytes) == 0);
        }
        int64_t per_expert = (int64_t)d * F;
        grouped_check_weights("grouped dW_down, chunked", other.dw_down, c.want_dw_down, c.begin_down, &c,
                              per_expert);
        grouped_check_weights("grouped dW_gate_up, chunked", other.dw_gate_up, c.want_dw_gate_up,
                              c.begin_gate_up, &c, 2 * per_expert);
        if (chunk_rows[i] == chunk_rows[0]) { // a repeat: the sums' order is the same too
            int64_t bytes = E * per_expert * (int64_t)sizeof(float);
            CHECK(device_hash(first.dw_down, bytes) == device_hash(other.dw_down, bytes));
            CHECK(device_hash(first.dw_gate_up, 2 * bytes) == device_hash(other.dw_gate_up, 2 * bytes));
        }
        grouped_release(&other);
    }
    grouped_release(&first);
    grouped_free(&c);
}

// ----------------------------------------------------------------------------
// cases

static void test_grouped_small(void) {
    const int chunks[] = {1024, 128, 1024, 64, 192, 0}; // 128: inside expert 0; 192: tiles of one and a half
    const int mixed[] = {200, 0, 1}, one[] = {300};
    grouped_shape(24, 40, 3, 50, mixed, chunks, false);
    grouped_shape(72, 24, 1, 17, one, chunks + 1, false);
}

static void test_grouped_edges(void) {
    const int two[] = {256, 192, 0};
    const int last[] = {0, 0, 130}, uneven[] = {1, 65, 190}, none[] = {0, 0, 0}, small[] = {3};
    grouped_shape(136, 72, 3, 40, uneven, two, false);
    grouped_shape(40, 136, 3, 40, last, two + 1, false);
    grouped_shape(8, 8, 1, 5, small, two + 1, false);
    grouped_shape(24, 24, 3, 40, none, two + 1, false); // no row at all
}

// every third expert with one row, every seventh with more
static void test_grouped_many_experts(void) {
    enum { E = 130 };
    int counts[E];
    const int chunks[] = {8192, 1280, 0};
    for (int e = 0; e < E; e++) {
        counts[e] = e % 7 == 3 ? 70 : e % 3 == 1;
    }
    grouped_shape(24, 24, E, 100, counts, chunks, false);
}

static void test_grouped_large(void) {
    const int counts[] = {1024, 700, 1500, 3, 0, 2000, 1301, 1664}, chunks[] = {16384, 3072, 16384, 0};
    grouped_shape(768, 3072, 8, 8192, counts, chunks, true);
    const int few[] = {700, 65};
    grouped_shape(1024, 3200, 2, 512, few, chunks + 1, true); // up_forward's blocks share B
    enum { E = 1100 };
    int many[E];
    for (int e = 0; e < E; e++) {
        many[e] = e % 5 == 0 ? 0 : 1 + e % 67;
    }
    grouped_shape(256, 64, E, 4096, many, chunks, true);
    const int even[] = {4000, 4000, 4000, 4000, 4000, 4000, 4000, 4000}, whole[] = {32768, 32768, 0};
    grouped_shape(768, 64, 8, 8192, even, whole, true); // many tiles a block, of one step in k or few
}

// Elements beyond 2^31: the last 64 rows of a chunk of 160,000, against those rows as a chunk of their own
static void test_grouped_far(void) {
    enum { D = 8, WIDTH = 8192, ROWS = 160000, LAST = 64 };
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (available < 4 * sizeof(floatX) * (size_t)ROWS * WIDTH) {
        skip_case("needs a GPU with more free memory");
        return;
    }
    const int counts[] = {ROWS};
    GroupedCase c = grouped_case(D, WIDTH, 1, 1000, counts);
    GroupedDevice g = grouped_upload(&c);
    RowChunk all = {g.offsets, g.token, g.gate, 1, 0, ROWS, test_kernels, 0},
             end = {g.offsets, g.token, g.gate, 1, ROWS - LAST, LAST, test_kernels, 0};
    int64_t wide = (int64_t)(ROWS - LAST) * WIDTH, tiles = grouped_dgate_tiles(WIDTH, test_kernels),
            x = sizeof(floatX);
    floatX *h_all = device_new<floatX>((int64_t)ROWS * 3 * WIDTH),
           *h_end = device_new<floatX>(LAST * 3 * WIDTH);
    floatX *y_all = device_new<floatX>(ROWS * D), *y_end = device_new<floatX>(LAST * D);
    float *parts = device_new<float>(ROWS * tiles);
    for (int i = 0; i < 2; i++) {
        floatX *y = i ? y_end : y_all;
        RowChunk chunk = i ? end : all;
        ChunkH h = grouped_h(&g, i ? h_end : h_all, chunk.rows, 0, 0);
        grouped_up_forward(h, 0, g.x, g.w_gate_up, chunk, D, WIDTH, 0);
        grouped_down_forward(y, h, g.w_down, chunk, D, WIDTH, 0);
    }
    CHECK(device_hash(h_all + 3 * wide, LAST * 3 * WIDTH * x) == device_hash(h_end, LAST * 3 * WIDTH * x));
    CHECK(device_hash(y_all + (ROWS - LAST) * D, LAST * D * x) == device_hash(y_end, LAST * D * x));
    for (int i = 0; i < 2; i++) {
        floatX *y = i ? y_end : y_all;
        RowChunk chunk = i ? end : all;
        ChunkH h = grouped_h(&g, i ? h_end : h_all, chunk.rows, 0, 0);
        grouped_down_backward(h, parts, g.dy, g.w_down, chunk, D, WIDTH, 0);
        grouped_up_backward(y, h, g.w_gate_up, chunk, D, WIDTH, 0);
    }
    CHECK(device_hash(h_all + 3 * wide, LAST * 3 * WIDTH * x) == device_hash(h_end, LAST * 3 * WIDTH * x));
    CHECK(device_hash(y_all + (ROWS - LAST) * D, LAST * D * x) == device_hash(y_end, LAST * D * x));
    void *buffers[] = {h_all, h_end, y_all, y_end, parts};
    for (void *p : buffers) {
        device_release(p);
    }
    grouped_release(&g);
    grouped_free(&c);
}

static void test_cuda_grouped_gemm(void) {
    test_grouped_small();
    test_grouped_edges();
    test_grouped_many_experts();
    if (!emulated()) {
        test_grouped_large();
        test_grouped_far();
    }
}

// ----------------------------------------------------------------------------
// bench

typedef struct {
    int d, F, E, rows;
} GroupedBenchShape;

// N(0, 1): Box and Muller's, of hashed counters
static __global__ void grouped_normal_kernel(floatX *x, int64_t n, unsigned seed) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t bits = ((uint64_t)i + ((uint64_t)seed << 40)) * 0x9E3779B97F4A7C15ull;
        bits = (bits ^ (bits >> 31)) * 0xBF58476D1CE4E5B9ull;
        bits = (bits ^ (bits >> 29)) * 0x94D049BB133111EBull;
        float u = ((float)(bits >> 40) + 0.5f) / 16777216.0f, v = (float)(bits & 0xffffff) / 16777216.0f;
        x[i] = to_x(sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v));
    }
}

static floatX *grouped_normal(int64_t n, unsigned seed) {
    floatX *x = device_new<floatX>(n);
    launch(grouped_normal_kernel, 1024, 256, 0, 0, x, n, seed);
    return x;
}

typedef struct {
    GroupedBenchShape s;
    RowChunk chunk;
    ChunkH h;
    floatX *x, *dy, *y, *w_gate_up, *w_down, *h_rows; // dense products take h_rows for A, too
    float *dw_gate_up, *dw_down, *partial;
    GemmPlans *plans;
} GroupedBench;

// tokens of each expert ascend, experts' rows differ by chance as a router's do
static void grouped_bench_rows(GroupedBench *b) {
    GroupedBenchShape s = b->s;
    int *offsets = NEW(int, s.E + 1), *token = NEW(int, s.rows), *cursor = NEW(int, s.E);
    float *gate = NEW(float, s.rows);
    for (int e = 0; e < s.E; e++) { // about equal, multiples of 64
        offsets[e + 1] = (int)((int64_t)s.rows * (e + 1) / s.E / 64 * 64);
        cursor[e] = offsets[e];
    }
    for (int t = 0; t < s.rows; t++) {
        unsigned e = (unsigned)t * 2654435761u % (unsigned)s.E;
        for (; cursor[e] == offsets[e + 1]; e = (e + 1) % (unsigned)s.E) {
        }
        gate[cursor[e]] = 1.0f;
        token[cursor[e]++] = t;
    }
    RowChunk chunk = {device_i(offsets, s.E + 1),
                      device_i(token, s.rows),
                      device_f(gate, s.rows),
                      s.E,
                      0,
                      s.rows,
                      test_kernels,
                      0};
    b->chunk = chunk;
    free(offsets);
    free(token);
    free(cursor);
    free(gate);
}

// what an earlier product overwrote is N(0, 1) again: the numbers decide the power, and so the clock
static void grouped_bench_refill(GroupedBench *b) {
    int64_t R = b->s.rows;
    launch(grouped_normal_kernel, 1024, 256, 0, 0, b->h_rows, R * 3 * b->s.F, 7u);
}

static GroupedBench grouped_bench_open(GroupedBenchShape s) {
    GroupedBench b;
    int64_t R = s.rows, weight = (int64_t)s.E * s.d * s.F;
    b.s = s;
    grouped_bench_rows(&b);
    b.x = grouped_normal(R * s.d, 1);
    b.dy = grouped_normal(R * s.d, 2);
    b.y = grouped_normal(R * s.d, 4);
    b.w_gate_up = grouped_normal(2 * weight, 5);
    b.w_down = grouped_normal(weight, 6);
    b.h_rows = grouped_normal(R * 3 * s.F, 7);
    b.dw_gate_up = device_new<float>(2 * weight);
    b.dw_down = device_new<float>(weight);
    b.partial = device_new<float>(R * grouped_dgate_tiles(s.F, test_kernels));
    CUDA_CHECK(cudaMemset(b.dw_gate_up, 0, (size_t)(2 * weight) * sizeof(float)));
    CUDA_CHECK(cudaMemset(b.dw_down, 0, (size_t)weight * sizeof(float)));
    int64_t *first = device_new<int64_t>(1), zero = 0;
    CUDA_CHECK(cudaMemcpy(first, &zero, sizeof(zero), cudaMemcpyHostToDevice));
    ChunkH h = {b.h_rows, R, R, first, 0};
    b.h = h;
    b.plans = NEW(GemmPlans, 1);
    gemm_open(b.plans, device_new<char>(32 << 20), 32 << 20);
    return b;
}

static void grouped_bench_close(GroupedBench *b) {
    const void *all[] = {b->chunk.offsets,
                         b->chunk.token_of_row,
                         b->chunk.gate_of_row,
                         b->h.first,
                         b->x,
                         b->dy,
                         b->y,
                         b->w_gate_up,
                         b->w_down,
                         b->h_rows,
                         b->dw_gate_up,
                         b->dw_down,
                         b->partial,
                         b->plans->workspace};
    gemm_close(b->plans);
    free(b->plans);
    for (const void *p : all) {
        device_release(p);
    }
}

// ours and cuBLASLt's C[M, N] = op(A) op(B) of the same sizes
template <class Ours, class Dense>
static void grouped_bench_row(const char *name, double flops, Ours ours, Dense dense) {
    double ms = device_ms(ours), dense_ms = device_ms(dense);
    printf("  %-22s %8.3f ms %6.0f TFLOP/s   dense %8.3f ms %6.0f TFLOP/s   %.2f\n", name, ms,
           flops / ms * 1e-9, dense_ms, flops / dense_ms * 1e-9, dense_ms / ms);
    fflush(stdout);
}

static void grouped_bench_shape(GroupedBenchShape s) {
    GroupedBench b = grouped_bench_open(s);
    int d = s.d, F = s.F;
    int64_t R = s.rows;
    double flops = 2.0 * s.rows * d * F;
    RowChunk chunk = b.chunk;
    printf("grouped_gemm: d %d, F %d, E %d, %d rows\n", d, F, s.E, s.rows);
    grouped_bench_row(
        "up_forward", 2 * flops, [&] { grouped_up_forward(b.h, 0, b.x, b.w_gate_up, chunk, d, F, 0); },
        [&] { gemm(b.plans, 0, 1, R, 2 * F, d, b.x, d, b.w_gate_up, d, b.h_rows, 2 * F, NULL, 0); });
    grouped_bench_refill(&b);
    grouped_bench_row(
        "down_forward", flops, [&] { grouped_down_forward(b.y, b.h, b.w_down, chunk, d, F, 0); },
        [&] { gemm(b.plans, 0, 1, R, d, F, b.h_rows, F, b.w_down, F, b.y, d, NULL, 0); });
    grouped_bench_refill(&b);
    grouped_bench_row(
        "down_backward", flops,
        [&] { grouped_down_backward(b.h, b.partial, b.dy, b.w_down, chunk, d, F, 0); },
        [&] { gemm(b.plans, 0, 0, R, F, d, b.dy, d, b.w_down, F, b.h_rows, F, NULL, 0); });
    grouped_bench_refill(&b);
    grouped_bench_row(
        "down_wgrad", flops, [&] { grouped_down_wgrad(b.dw_down, b.dy, b.h, chunk, d, F, 0); },
        [&] { gemm(b.plans, 1, 0, d, F, R, b.dy, d, b.h_rows, F, b.dw_down, F, b.dw_down, 0); });
    grouped_bench_refill(&b);
    grouped_bench_row(
        "up_wgrad", 2 * flops, [&] { grouped_up_wgrad(b.dw_gate_up, b.h, b.x, chunk, d, F, 0); },
        [&] { gemm(b.plans, 1, 0, 2 * F, d, R, b.h_rows, 2 * F, b.x, d, b.dw_gate_up, d, b.dw_gate_up, 0); });
    grouped_bench_refill(&b);
    grouped_bench_row(
        "up_backward", 2 * flops, [&] { grouped_up_backward(b.y, b.h, b.w_gate_up, chunk, d, F, 0); },
        [&] { gemm(b.plans, 0, 0, R, d, 2 * F, b.h_rows, 2 * F, b.w_gate_up, d, b.y, d, NULL, 0); });
    grouped_bench_close(&b);
}

static void bench_cuda_grouped_gemm(void) {
    const GroupedBenchShape shapes[] = {
        {768, 3072, 8, 65536}, {1024, 4096, 8, 65536}, {768, 384, 64, 524288}, {768, 3072, 64, 65536}};
    for (GroupedBenchShape s : shapes) {
        grouped_bench_shape(s);
    }
}

#endif
