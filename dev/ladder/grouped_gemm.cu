/*
The grouped GEMM, from the simplest version to the fastest, each checked and timed:

    naive      one thread an element of the result: the reference of the checks (below)
    mma.sync   llmc/gpu/grouped_portable.cuh: tiles by cp.async, epilogues in registers
    wgmma      llmc/gpu/grouped_hopper.cuh: TMA, producer and consumers, the epilogue behind the next tile
    dense      cuBLASLt's dense product of the same size: the best of its first 8 heuristics

    grouped_gemm check [p2]       every product on small and odd shapes, every element
    grouped_gemm time [p2] [c3]   the shapes of the paper's models: sampled elements checked, then times
                                  p2: product 2 alone (on random operands); c3: the first 3 shapes

Timing: CUDA events, medians; half a second ours and half a second cuBLASLt's in turns, because a GPU slows
down under load, and by what bits its operands have: they are N(0, 1) (naive, once, and mma.sync: the first
shape alone). A dense product has as many rows as there are pairs; weight gradients are compared with the
better of one product over all rows and a batch of E. FLOPs are those of the pairs: pads are our loss.

    make build/ladder_grouped_gemm
*/

#include "ladder.cuh"
#include "llmc/gpu/grouped_gemm.cuh"
#include <cublasLt.h>
// defines: random_new, poisoned_new, milliseconds, median, failures; grouped_*; cublasLtMatmul

enum { PRODUCTS = 6 };

static const char *const product_names[PRODUCTS] = {"up_forward",  "down_forward", "down_backward",
                                                    "up_backward", "down_wgrad",   "up_wgrad"};

static const Kernels rungs[] = {KERNELS_PORTABLE, KERNELS_HOPPER};
static const char *const rung_names[] = {"mma.sync", "wgmma"};

template <class T> static T *copied_new(const std::vector<T> &host) {
    T *p;
    CUDA_CHECK(cudaMalloc(&p, std::max<size_t>(host.size(), 1) * sizeof(T)));
    CUDA_CHECK(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

// ----------------------------------------------------------------------------
// a layer: sizes, routing, buffers

struct Case {
    int d, F, E, N, k; // N tokens, k experts each
    int first, rows;   // the chunk; rows 0: all there are
    bool stored;       // H in the store (else in scratch)
    int uneven;        // 1: expert 1 has no token, expert 0 has many
};

struct Layer {
    Case c;
    int64_t pairs;
    int all_rows, existing; // of the layer; of the chunk
    RowChunk chunk;
    ChunkH h;
    floatX *H; // where it is
    floatX *x, *dy, *w_gate_up, *w_down, *y;
    float *dw_gate_up, *dw_down, *dgate_partial;
    std::vector<void *> buffers;
};

static uint32_t host_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

// k different experts for each token; segments padded to 64 rows
static void route(const Case &c, std::vector<int> &offsets, std::vector<int> &tokens,
                  std::vector<float> &gates) {
    std::vector<std::vector<int>> of_expert(c.E);
    uint32_t state = 12345;
    for (int t = 0; t < c.N; t++) {
        std::vector<int> chosen;
        while ((int)chosen.size() < c.k) {
            int e = (int)(host_random(&state) % (uint32_t)c.E);
            if (c.uneven && c.E > 2) {
                e = host_random(&state) % 2 ? 0 : e == 1 ? 2 : e;
            }
            if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) {
                chosen.push_back(e);
                of_expert[e].push_back(t);
            }
        }
    }
    offsets.assign(1, 0);
    for (int e = 0; e < c.E; e++) {
        for (int t : of_expert[e]) {
            tokens.push_back(t);
            gates.push_back(0.1f + (float)(host_random(&state) % 1000) / 1000.0f);
        }
        while (tokens.size() % 64 != 0) {
            tokens.push_back(-1);
            gates.push_back(0.0f);
        }
        offsets.push_back((int)tokens.size());
    }
}

template <class T> static T *keep(Layer &layer, T *p) {
    layer.buffers.push_back(p);
    return p;
}

static int dgate_tiles(int F) {
    return std::max(grouped_dgate_tiles(F, KERNELS_HOPPER), grouped_dgate_tiles(F, KERNELS_PORTABLE));
}

static Layer layer_new(Case c) {
    Layer l;
    l.c = c;
    l.pairs = (int64_t)c.N * c.k;
    std::vector<int> offsets, tokens;
    std::vector<float> gates;
    route(c, offsets, tokens, gates);
    l.all_rows = offsets[c.E];
    int R = c.rows ? c.rows : l.all_rows;
    l.existing = std::max(std::min(c.first + R, l.all_rows) - c.first, 0);
    l.chunk = {keep(l, copied_new(offsets)),
               keep(l, copied_new(tokens)),
               keep(l, copied_new(gates)),
               c.E,
               c.first,
               R,
               KERNELS_HOPPER,
               0};
    int64_t wide = 2 * (int64_t)c.F, row = 3 * (int64_t)c.F;
    int64_t before = c.stored ? 3 : 0; // rows of the store before the chunk's
    std::vector<int64_t> first(1, before);
    floatX *buffer = keep(l, poisoned_new<floatX>((R + before) * row));
    l.H = buffer + before * row;
    l.h = {buffer, R + before, c.stored ? R + before : 0, keep(l, copied_new(first)), 0};
    l.x = keep(l, random_new<floatX>((int64_t)c.N * c.d, 1, 1.0f));
    l.dy = keep(l, random_new<floatX>((int64_t)c.N * c.d, 2, 1.0f));
    l.w_gate_up = keep(l, random_new<floatX>(c.E * wide * c.d, 3, 1.0f / sqrtf((float)c.d)));
    l.w_down = keep(l, random_new<floatX>((int64_t)c.E * c.F * c.d, 4, 1.0f / sqrtf((float)c.F)));
    l.dw_gate_up = keep(l, random_new<float>(c.E * wide * c.d, 5, 1.0f));
    l.dw_down = keep(l, random_new<float>((int64_t)c.E * c.F * c.d, 6, 1.0f));
    l.y = keep(l, poisoned_new<floatX>((int64_t)R * c.d));
    l.dgate_partial = keep(l, poisoned_new<float>((int64_t)R * dgate_tiles(c.F)));
    return l;
}

static void layer_free(Layer &l) {
    for (void *p : l.buffers) {
        CUDA_CHECK(cudaFree(p));
    }
}

static void run(const Layer &l, int product) {
    const Case &c = l.c;
    switch (product) {
    case 0: grouped_up_forward(l.h, 0, l.x, l.w_gate_up, l.chunk, c.d, c.F, 0); break;
    case 1: grouped_down_forward(l.y, l.h, l.w_down, l.chunk, c.d, c.F, 0); break;
    case 2: grouped_down_backward(l.h, l.dgate_partial, l.dy, l.w_down, l.chunk, c.d, c.F, 0); break;
    case 3: grouped_up_backward(l.y, l.h, l.w_gate_up, l.chunk, c.d, c.F, 0); break;
    case 4: grouped_down_wgrad(l.dw_down, l.dy, l.h, l.chunk, c.d, c.F, 0); break;
    case 5: grouped_up_wgrad(l.dw_gate_up, l.h, l.x, l.chunk, c.d, c.F, 0); break;
    }
}

// ----------------------------------------------------------------------------
// the reference: one thread an element, of every step-th row (or element)

__device__ static inline int expert_of(const RowChunk &chunk, int row) {
    int e = 0;
    while (chunk.offsets[e + 1] <= row) {
        e++;
    }
    return e;
}

// out[i][n] = sum over k of A[row][k] W_e[n * n_step + k * k_step], row = i step; A's rows a_row apart
static __global__ void reference_rows_kernel(float *out, const floatX *a, int a_row, bool by_token,
                                             const floatX *w, RowChunk chunk, int N, int K, int n_step,
                                             int k_step, int step) {
    int row = (int)blockIdx.x * step;
    int e = expert_of(chunk, chunk.first + row);
    int from = by_token ? chunk.token_of_row[chunk.first + row] : row;
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
        float sum = 0.0f;
        for (int k = 0; k < K && from >= 0; k++) {
            sum += to_float(a[(int64_t)from * a_row + k]) *
                   to_float(w[(int64_t)e * N * K + (int64_t)n * n_step + (int64_t)k * k_step]);
        }
        out[(int64_t)blockIdx.x * N + n] = sum;
    }
}

// out[i] = dw[i step] + sum over the expert's rows of L[row][m] R[row][n]; the element is [e][m][n]. The
// operand that is not by token is columns of H
static __global__ void reference_wgrad_kernel(float *out, const float *dw, const floatX *left, int M,
                                              const floatX *right, int N, int h_row, bool left_by_token,
                                              RowChunk chunk, int64_t elements, int64_t step, int existing) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, at = i * step;
    if (at >= elements) {
        return;
    }
    int n = (int)(at % N), m = (int)(at / N % M), e = (int)(at / N / M);
    float sum = 0.0f;
    for (int row = max(chunk.offsets[e], chunk.first);
         row < min(chunk.offsets[e + 1], chunk.first + existing); row++) {
        int token = chunk.token_of_row[row], local = row - chunk.first;
        if (token >= 0) {
            sum += to_float(left[left_by_token ? (int64_t)token * M + m : (int64_t)local * h_row + m]) *
                   to_float(right[left_by_token ? (int64_t)local * h_row + n : (int64_t)token * N + n]);
        }
    }
    out[i] = dw[at] + sum;
}

// h [rows][3F] from sums [rows][2F]: G and U, rounded, and gate A
static __global__ void reference_swiglu_kernel(float *h, const float *sums, RowChunk chunk, int F, int step) {
    float gate = chunk.gate_of_row[chunk.first + (int)blockIdx.x * step];
    const float *sum = sums + (int64_t)blockIdx.x * 2 * F;
    float *row = h + (int64_t)blockIdx.x * 3 * F;
    for (int f = threadIdx.x; f < F; f += blockDim.x) {
        float g = row[f] = to_float(to_x(sum[f])), u = row[F + f] = to_float(to_x(sum[F + f]));
        row[2 * F + f] = gate * g / (1.0f + expf(-g)) * u;
    }
}

// in h [rows][3F] G and U become dG and dU; dgate [rows]
static __global__ void reference_swiglu_backward_kernel(float *h, const float *da, float *dgate,
                                                        RowChunk chunk, int F, int step) {
    float gate = chunk.gate_of_row[chunk.first + (int)blockIdx.x * step], dot = 0.0f;
    float *row = h + (int64_t)blockIdx.x * 3 * F;
    for (int f = threadIdx.x; f < F; f += blockDim.x) {
        float g = row[f], u = row[F + f], s = 1.0f / (1.0f + expf(-g)), v = da[(int64_t)blockIdx.x * F + f];
        dot += v * g * s * u;
        row[f] = gate * v * u * s * (1.0f + g * (1.0f - s));
        row[F + f] = gate * v * g * s;
    }
    dot = block_sum(dot);
    if (threadIdx.x == 0) {
        dgate[blockIdx.x] = dot;
    }
}

template <class T>
static __global__ void sample_kernel(float *out, const T *in, int64_t width, int64_t step, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        out[i] = (float)in[i / width * step * width + i % width];
    }
}

static __global__ void sum_tiles_kernel(float *out, const float *partial, int tiles, int step, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    float sum = 0.0f;
    for (int tile = 0; tile < tiles && i < n; tile++) {
        sum += partial[(int64_t)i * step * tiles + tile];
    }
    if (i < n) {
        out[i] = sum;
    }
}

// ||a - b||^2 and ||b||^2, one block
static __global__ void difference_kernel(double *out, const float *a, const float *b, int64_t n) {
    __shared__ double sums[2][256];
    double difference = 0.0, norm = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += 256) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    sums[0][threadIdx.x] = difference;
    sums[1][threadIdx.x] = norm;
    __syncthreads();
    if (threadIdx.x < 2) {
        double sum = 0.0;
        for (int i = 0; i < 256; i++) {
            sum += sums[threadIdx.x][i];
        }
        out[threadIdx.x] = sum;
    }
}

static __global__ void unequal_kernel(unsigned *count, const uint32_t *a, const uint32_t *b, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        if (a[i] != b[i]) {
            atomicAdd(count, 1);
        }
    }
}

// ----------------------------------------------------------------------------
// checks

static int only = -1; // product
static size_t timed_cases = 100;

static bool wanted(int product) {
    return only < 0 || only == product;
}

static float *floats_new(int64_t n) {
    return poisoned_new<float>(std::max<int64_t>(n, 1));
}

// how much is wrong, and where it begins and ends
static void show_worst(const float *got, const float *want, int64_t n) {
    std::vector<float> g(n), w(n);
    CUDA_CHECK(cudaMemcpy(g.data(), got, n * 4, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(w.data(), want, n * 4, cudaMemcpyDeviceToHost));
    int64_t wrong = 0, last = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(g[i] - w[i]) <= 0.02f * fabsf(w[i]) + 0.02f)) {
            if (wrong < 6) {
                printf(" [%lld] %g for %g", (long long)i, g[i], w[i]);
            }
            wrong++;
            last = i;
        }
    }
    printf(" .. [%lld]: %lld of %lld;", (long long)last, (long long)wrong, (long long)n);
}

static void judge(const char *what, const float *got, const float *want, int64_t n, double tolerance) {
    static double *sums = NULL;
    double host[2];
    if (sums == NULL) {
        CUDA_CHECK(cudaMalloc(&sums, 16));
    }
    launch(difference_kernel, 1, 256, 0, 0, sums, got, want, n);
    CUDA_CHECK(cudaMemcpy(host, sums, 16, cudaMemcpyDeviceToHost));
    double error = sqrt(host[0]) / (sqrt(host[1]) + 1e-30);
    bool ok = error <= tolerance; // false for NaN
    failures += !ok;
    printf(" %s %.1e%s", what, error, ok ? "" : " FAILED");
    if (!ok) {
        show_worst(got, want, n);
    }
}

template <class T> static float *sample(const T *in, int64_t rows, int64_t width, int64_t step) {
    float *out = floats_new(rows * width);
    launch(sample_kernel<T>, 256, 256, 0, 0, out, in, width, step, rows * width);
    return out;
}

template <class T> static T *duplicate(const T *from, int64_t n) {
    T *p = poisoned_new<T>(n);
    CUDA_CHECK(cudaMemcpy(p, from, n * sizeof(T), cudaMemcpyDeviceToDevice));
    return p;
}

// a buffer that products are repeated on: whether they give the same bits
struct Repeat {
    void *at, *before, *after;
    int64_t bytes;
};

static Repeat repeat_begin(void *at, int64_t bytes) {
    Repeat r = {at, duplicate((char *)at, bytes), NULL, bytes};
    return r;
}

static void repeat_done(Repeat &r) {
    r.after = duplicate((char *)r.at, r.bytes);
}

static int64_t repeat_differs(const Repeat &r) {
    unsigned *count, host;
    CUDA_CHECK(cudaMalloc(&count, 4));
    CUDA_CHECK(cudaMemset(count, 0, 4));
    launch(unequal_kernel, 512, 256, 0, 0, count, (const uint32_t *)r.at, (const uint32_t *)r.after,
           r.bytes / 4);
    CUDA_CHECK(cudaMemcpy(&host, count, 4, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(count));
    return host;
}

// runs a product, then `times` more from the same state; the outputs must have the same bits
static void run_repeated(const Layer &l, int product, std::vector<Repeat> outputs, int times) {
    run(l, product);
    for (Repeat &r : outputs) {
        repeat_done(r);
    }
    int64_t differ = 0;
    for (int i = 0; i < times; i++) {
        for (Repeat &r : outputs) {
            CUDA_CHECK(cudaMemcpy(r.at, r.before, r.bytes, cudaMemcpyDeviceToDevice));
        }
        run(l, product);
        for (Repeat &r : outputs) {
            differ += repeat_differs(r);
        }
    }
    for (Repeat &r : outputs) {
        CUDA_CHECK(cudaFree(r.before));
        CUDA_CHECK(cudaFree(r.after));
    }
    failures += differ != 0;
    if (differ != 0) {
        printf(" REPEAT DIFFERS in %lld words", (long long)differ);
    }
}

// nothing may be written for rows that do not exist
static void judge_untouched(const char *what, const floatX *from, int64_t elements) {
    if (elements <= 0) {
        return;
    }
    std::vector<uint16_t> host(elements);
    CUDA_CHECK(cudaMemcpy(host.data(), from, elements * 2, cudaMemcpyDeviceToHost));
    int64_t written = elements - std::count(host.begin(), host.end(), 0xffff);
    if (written != 0) {
        printf(" %s WRITTEN BEYOND in %lld", what, (long long)written);
        failures++;
    }
}

static const double BF16 = 4e-3, FP32 = 5e-5; // one rounding to bf16: at most 1.7e-3 of the norm

// backward's call for H: in scratch it is computed again, in the store it is left alone
static void check_again(const Layer &l) {
    Repeat h = repeat_begin(l.H, (int64_t)l.chunk.rows * 3 * l.c.F * 2);
    repeat_done(h);
    CUDA_CHECK(cudaMemset(l.H, 0xff, l.c.stored ? 0 : h.bytes));
    grouped_up_forward(l.h, 1, l.x, l.w_gate_up, l.chunk, l.c.d, l.c.F, 0);
    int64_t differ = repeat_differs(h);
    CUDA_CHECK(cudaFree(h.before));
    CUDA_CHECK(cudaFree(h.after));
    failures += differ != 0;
    if (differ != 0) {
        printf(" H AGAIN DIFFERS in %lld words", (long long)differ);
    }
}

// rows step apart, `times` repeats
static void check_layer(const Layer &l, int row_step, int times) {
    const Case &c = l.c;
    int d = c.d, F = c.F, rows = ceil_div(l.existing, row_step);
    int64_t R = l.chunk.rows;
    std::vector<float *> temporaries;
    auto temporary = [&](float *p) {
        temporaries.push_back(p);
        return p;
    };
    printf("%s, d %d F %d E %d rows %d of %d from %d%s:", rung_names[l.chunk.kernels], d, F, c.E, l.existing,
           l.all_rows, c.first, c.stored ? "" : ", scratch");
    fflush(stdout);
    if (rows == 0) {
        for (int product = 0; product < PRODUCTS; product++) {
            run(l, product);
        }
        judge_untouched("H", l.H, R * 3 * F);
        judge_untouched("Y", l.y, R * d);
        printf(" nothing to do, nothing done\n");
        return;
    }
    if (only >= 0) { // operands that the products before would have made
        launch(fill_kernel<floatX>, 256, 256, 0, 0, l.H, (int64_t)l.existing * 3 * F, 7, 1.0f);
    }
    float *want_h = temporary(floats_new((int64_t)rows * 3 * F)),
          *sums = temporary(floats_new((int64_t)rows * 2 * F));
    float *want_y = temporary(floats_new((int64_t)rows * d));
    if (wanted(0)) {
        run_repeated(l, 0, {repeat_begin(l.H, R * 3 * F * 2)}, times);
        launch(reference_rows_kernel, rows, 256, 0, 0, sums, l.x, d, true, l.w_gate_up, l.chunk, 2 * F, d, d,
               1, row_step);
        launch(reference_swiglu_kernel, rows, 256, 0, 0, want_h, sums, l.chunk, F, row_step);
        judge("H", temporary(sample(l.H, rows, 3 * F, row_step)), want_h, (int64_t)rows * 3 * F, BF16);
        judge_untouched("H", l.H + (int64_t)l.existing * 3 * F, (R - l.existing) * 3 * F);
        check_again(l);
    }
    if (wanted(1)) {
        run_repeated(l, 1, {repeat_begin(l.y, R * d * 2)}, times);
        launch(reference_rows_kernel, rows, 256, 0, 0, want_y, l.H + 2 * F, 3 * F, false, l.w_down, l.chunk,
               d, F, F, 1, row_step);
        judge("Y", temporary(sample(l.y, rows, d, row_step)), want_y, (int64_t)rows * d, BF16);
        judge_untouched("Y", l.y + (int64_t)l.existing * d, (R - l.existing) * d);
    }
    if (wanted(2)) {
        int tiles = grouped_dgate_tiles(F, l.chunk.kernels);
        float *want_dh = temporary(sample(l.H, rows, 3 * F, row_step));
        run_repeated(l, 2, {repeat_begin(l.H, R * 3 * F * 2), repeat_begin(l.dgate_partial, R * tiles * 4)},
                     times);
        float *want_dgate = temporary(floats_new(rows)), *got_dgate = temporary(floats_new(rows));
        launch(reference_rows_kernel, rows, 256, 0, 0, sums, l.dy, d, true, l.w_down, l.chunk, F, d, 1, F,
               row_step);
        launch(reference_swiglu_backward_kernel, rows, 256, 0, 0, want_dh, sums, want_dgate, l.chunk, F,
               row_step);
        launch(sum_tiles_kernel, ceil_div(rows, 256), 256, 0, 0, got_dgate, l.dgate_partial, tiles, row_step,
               rows);
        judge("dH", temporary(sample(l.H, rows, 3 * F, row_step)), want_dh, (int64_t)rows * 3 * F, BF16);
        judge("dgate", got_dgate, want_dgate, rows, 1e-4);
        judge_untouched("dH", l.H + (int64_t)l.existing * 3 * F, (R - l.existing) * 3 * F);
    }
    if (wanted(3)) {
        run_repeated(l, 3, {repeat_begin(l.y, R * d * 2)}, times);
        launch(reference_rows_kernel, rows, 256, 0, 0, want_y, l.H, 3 * F, false, l.w_gate_up, l.chunk, d,
               2 * F, 1, d, row_step);
        judge("dX", temporary(sample(l.y, rows, d, row_step)), want_y, (int64_t)rows * d, BF16);
    }
    if (wanted(4)) {
        int64_t size = (int64_t)c.E * d * F, step = row_step == 1 ? 1 : size / 4096 + 1,
                n = ceil_div(size, step);
        float *want = temporary(floats_new(n));
        launch(reference_wgrad_kernel, (unsigned)ceil_div<int64_t>(n, 64), 64, 0, 0, want, l.dw_down, l.dy, d,
               l.H + 2 * F, F, 3 * F, true, l.chunk, size, step, l.existing);
        run_repeated(l, 4, {repeat_begin(l.dw_down, size * 4)}, times);
        judge("dWd", temporary(sample(l.dw_down, n, 1, step)), want, n, FP32);
    }
    if (wanted(5)) {
        int64_t size = 2 * (int64_t)c.E * d * F, step = row_step == 1 ? 1 : size / 4096 + 1,
                n = ceil_div(size, step);
        float *want = temporary(floats_new(n));
        launch(reference_wgrad_kernel, (unsigned)ceil_div<int64_t>(n, 64), 64, 0, 0, want, l.dw_gate_up, l.H,
               2 * F, l.x, d, 3 * F, false, l.chunk, size, step, l.existing);
        run_repeated(l, 5, {repeat_begin(l.dw_gate_up, size * 4)}, times);
        judge("dWgu", temporary(sample(l.dw_gate_up, n, 1, step)), want, n, FP32);
    }
    printf("\n");
    fflush(stdout);
    for (float *p : temporaries) {
        CUDA_CHECK(cudaFree(p));
    }
}

static void check_all(void) {
    Case cases[] = {
        {64, 64, 1, 64, 1, 0, 0, true, 0},
        {128, 128, 1, 128, 1, 0, 0, true, 0},
        {256, 256, 1, 512, 1, 0, 0, false, 0},
        {768, 384, 4, 1024, 1, 0, 0, true, 0},
        {72, 40, 3, 200, 1, 0, 0, true, 0},
        {200, 136, 8, 900, 2, 0, 0, false, 1},
        {136, 264, 5, 1000, 3, 512, 1024, true, 1},
        {1000, 200, 70, 3000, 2, 64, 4096, false, 0},
        {768, 96, 128, 2000, 4, 0, 20000, true, 1},
        {320, 3072, 8, 3000, 1, 128, 2560, true, 0},
        {8, 8, 3, 17, 1, 0, 0, true, 0},
        {768, 64, 16, 16000, 4, 0, 0, true, 0}, // many tiles a block, each of one step
        {64, 64, 3, 100, 1, 4096, 1024, true, 0},
    };
    for (const Case &c : cases) {
        for (Kernels kernels : rungs) {
            Layer l = layer_new(c);
            l.chunk.kernels = kernels;
            check_layer(l, 1, 3);
            layer_free(l);
        }
    }
}

// ----------------------------------------------------------------------------
// cuBLASLt, dense

#define CUBLAS_CHECK(call)                                                                                   \
    do {                                                                                                     \
        cublasStatus_t status_ = (call);                                                                     \
        if (status_ != CUBLAS_STATUS_SUCCESS) {                                                              \
            die("cuBLASLt: status %d at line %d", (int)status_, __LINE__);                                   \
        }                                                                                                    \
    } while (0)

// C[M, N] = op(A) op(B), row-major; `batch` products side by side
struct DenseShape {
    int trans_a, trans_b;
    int64_t M, N, K;
};

struct Dense : DenseShape {
    int64_t batch;
    bool fp32; // C, which is added to
    floatX *a, *b;
    void *c;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulAlgo_t algorithm;
};

static cublasLtHandle_t lt;
static void *workspace;
enum { WORKSPACE = 64 << 20 };

static cublasLtMatrixLayout_t dense_layout(cudaDataType_t type, int64_t rows, int64_t columns,
                                           int64_t batch) {
    cublasLtMatrixLayout_t layout;
    int32_t count = (int32_t)batch;
    int64_t stride = rows * columns;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, columns, rows, columns));
    CUBLAS_CHECK(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
    CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                  &stride, sizeof(stride)));
    return layout;
}

static void dense_run(const Dense &g) {
    float one = 1.0f, beta = g.fp32 ? 1.0f : 0.0f;
    CUBLAS_CHECK(cublasLtMatmul(lt, g.product, &one, g.b, g.lb, g.a, g.la, &beta, g.c, g.lc, g.c, g.lc,
                                &g.algorithm, workspace, WORKSPACE, 0));
}

// describes the product (cuBLASLt knows columns: C^T = op(B)^T op(A)^T) and picks the fastest of 8
static float dense_plan(Dense &g) {
    cublasOperation_t first = g.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                      second = g.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&g.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(g.product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof(first)));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(g.product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof(second)));
    g.la = dense_layout(CUDA_R_16BF, g.trans_a ? g.K : g.M, g.trans_a ? g.M : g.K, g.batch);
    g.lb = dense_layout(CUDA_R_16BF, g.trans_b ? g.N : g.K, g.trans_b ? g.K : g.N, g.batch);
    g.lc = dense_layout(g.fp32 ? CUDA_R_32F : CUDA_R_16BF, g.M, g.N, g.batch);
    cublasLtMatmulPreference_t wish;
    size_t bytes = WORKSPACE;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&wish));
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                      sizeof(bytes)));
    cublasLtMatmulHeuristicResult_t results[8];
    int found = 0;
    cublasLtMatmulAlgoGetHeuristic(lt, g.product, g.lb, g.la, g.lc, g.lc, wish, 8, results, &found);
    float best = INFINITY;
    cublasLtMatmulAlgo_t chosen = {};
    for (int i = 0; i < found; i++) {
        g.algorithm = results[i].algo;
        dense_run(g);
        float ms = median({milliseconds([&] { dense_run(g); }), milliseconds([&] { dense_run(g); }),
                           milliseconds([&] { dense_run(g); })});
        if (ms < best) {
            best = ms;
            chosen = g.algorithm;
        }
    }
    g.algorithm = chosen;
    return best;
}

// the dense product of the same FLOPs on operands of its own; weight gradients: the faster of one and of E
static Dense dense_of(const Layer &l, int product) {
    const Case &c = l.c;
    int64_t P = l.pairs, d = c.d, F = c.F;
    const DenseShape shapes[PRODUCTS] = {{0, 1, P, 2 * F, d}, {0, 1, P, d, F}, {0, 0, P, F, d},
                                         {0, 0, P, d, 2 * F}, {1, 0, d, F, P}, {1, 0, 2 * F, d, P}};
    Dense one;
    static_cast<DenseShape &>(one) = shapes[product];
    one.batch = 1;
    one.fp32 = product >= 4;
    one.a = random_new<floatX>(one.M * one.K, 7, 1.0f);
    one.b = random_new<floatX>(one.K * one.N, 8, one.fp32 ? 1.0f : 1.0f / sqrtf((float)one.K));
    one.c = random_new<float>(one.M * one.N * (one.fp32 ? c.E : 1), 9, 1.0f);
    float one_ms = dense_plan(one);
    if (!one.fp32) {
        return one;
    }
    Dense batch = one;
    batch.batch = c.E;
    batch.K = P / c.E;
    return dense_plan(batch) < one_ms ? batch : one;
}

static void dense_free(const Dense &g) {
    CUDA_CHECK(cudaFree(g.a));
    CUDA_CHECK(cudaFree(g.b));
    CUDA_CHECK(cudaFree(g.c));
}

// ----------------------------------------------------------------------------
// times

enum { ROUNDS = 2, SUSTAINED_MS = 500 }; // in a round one side's products follow each other

struct Row {
    float ours, dense; // ms
};

static double product_flops(const Layer &l, int product) {
    return 2.0 * (double)l.pairs * l.c.d * l.c.F * (product == 0 || product == 3 || product == 5 ? 2 : 1);
}

// bytes that must move: operands and results once
static double least_bytes(const Layer &l, int product) {
    const Case &c = l.c;
    double P = (double)l.pairs, N = c.N, d = c.d, F = c.F, weights = (double)c.E * d * F;
    switch (product) {
    case 0: return 2 * (N * d + 2 * weights + 3 * P * F);
    case 1: return 2 * (P * F + weights + P * d);
    case 2: return 2 * (N * d + weights + 4 * P * F);
    case 3: return 2 * (2 * P * F + 2 * weights + P * d);
    case 4: return 2 * (N * d + P * F) + 8 * weights;
    default: return 2 * (N * d + 2 * P * F) + 16 * weights;
    }
}

// f() again and again for SUSTAINED_MS: the milliseconds of each run; before() is not timed
template <class Before, class F>
static void sustain(std::vector<float> &times, const Before &before, const F &f) {
    enum { QUEUE = 32 };
    static cudaEvent_t begin[QUEUE], end[QUEUE];
    for (int i = 0; i < QUEUE && begin[QUEUE - 1] == NULL; i++) {
        CUDA_CHECK(cudaEventCreate(&begin[i]));
        CUDA_CHECK(cudaEventCreate(&end[i]));
    }
    for (float sum = 0.0f; sum < SUSTAINED_MS;) {
        for (int i = 0; i < QUEUE; i++) {
            before();
            CUDA_CHECK(cudaEventRecord(begin[i], 0));
            f();
            CUDA_CHECK(cudaEventRecord(end[i], 0));
        }
        CUDA_CHECK(cudaEventSynchronize(end[QUEUE - 1]));
        for (int i = 0; i < QUEUE; i++) {
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, begin[i], end[i]));
            times.push_back(ms);
            sum += ms;
        }
    }
}

static Row time_product(const Layer &l, int product, const Dense &dense, const floatX *h) {
    size_t h_bytes = (size_t)l.chunk.rows * 3 * l.c.F * sizeof(floatX);
    std::vector<float> ours, theirs;
    for (int round = 0; round < ROUNDS; round++) {
        auto restore = [&] {
            if (product == 2) { // works in place
                CUDA_CHECK(cudaMemcpyAsync(l.H, h, h_bytes, cudaMemcpyDeviceToDevice, 0));
            }
        };
        sustain(ours, restore, [&] { run(l, product); });
        sustain(
            theirs, [] {}, [&] { dense_run(dense); });
    }
    return {median(ours), median(theirs)};
}

// operands as they are in training
static void prepare(const Layer &l, int product) {
    for (int before = 0; before < std::min(product, 3); before++) {
        run(l, before);
    }
}

static void print_to(std::vector<char> &table, const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    table.insert(table.end(), line, line + length);
}

// the reference's product over all rows: the first rung
static float time_naive(const Layer &l, int product) {
    const Case &c = l.c;
    int rows = l.existing, d = c.d, F = c.F;
    int64_t weights = (int64_t)c.E * d * F * (product == 5 ? 2 : 1);
    float *out = floats_new(product < 4 ? (int64_t)rows * std::max(3 * F, d) : weights);
    float *sums = floats_new((int64_t)rows * 2 * F), *dgate = floats_new(rows);
    float ms = milliseconds([&] {
        switch (product) {
        case 0:
            launch(reference_rows_kernel, rows, 256, 0, 0, sums, l.x, d, true, l.w_gate_up, l.chunk, 2 * F, d,
                   d, 1, 1);
            launch(reference_swiglu_kernel, rows, 256, 0, 0, out, sums, l.chunk, F, 1);
            break;
        case 1:
            launch(reference_rows_kernel, rows, 256, 0, 0, out, l.H + 2 * F, 3 * F, false, l.w_down, l.chunk,
                   d, F, F, 1, 1);
            break;
        case 2:
            launch(reference_rows_kernel, rows, 256, 0, 0, sums, l.dy, d, true, l.w_down, l.chunk, F, d, 1, F,
                   1);
            launch(reference_swiglu_backward_kernel, rows, 256, 0, 0, out, sums, dgate, l.chunk, F, 1);
            break;
        case 3:
            launch(reference_rows_kernel, rows, 256, 0, 0, out, l.H, 3 * F, false, l.w_gate_up, l.chunk, d,
                   2 * F, 1, d, 1);
            break;
        default:
            launch(reference_wgrad_kernel, (unsigned)ceil_div<int64_t>(weights, 64), 64, 0, 0, out,
                   product == 4 ? l.dw_down : l.dw_gate_up, product == 4 ? l.dy : l.H,
                   product == 4 ? d : 2 * F, product == 4 ? l.H + 2 * F : l.x, product == 4 ? F : d, 3 * F,
                   product == 4, l.chunk, weights, 1, l.existing);
        }
    });
    CUDA_CHECK(cudaFree(out));
    CUDA_CHECK(cudaFree(sums));
    CUDA_CHECK(cudaFree(dgate));
    return ms;
}

static void time_layer(std::vector<char> &table, Layer &l, bool first) {
    const Case &c = l.c;
    for (int product = 0; product < PRODUCTS; product++) {
        if (!wanted(product)) {
            continue;
        }
        l.chunk.kernels = KERNELS_HOPPER;
        prepare(l, product);
        floatX *h = duplicate(l.H, (int64_t)l.chunk.rows * 3 * c.F);
        Dense dense = dense_of(l, product);
        double flops = product_flops(l, product), bound = least_bytes(l, product) / 3e9; // ms at 3 TB/s
        print_to(table, "%4d %4d %3d %-13s bytes %5.3f ms", c.d, c.F, c.E, product_names[product], bound);
        if (first) {
            print_to(table, "  naive %.1f", flops / time_naive(l, product) * 1e-9);
        }
        for (Kernels kernels : rungs) {
            if (kernels != KERNELS_HOPPER && !first) {
                continue;
            }
            l.chunk.kernels = kernels;
            Row r = time_product(l, product, dense, h);
            print_to(table, "  %s %.3f ms %3.0f (dense %.3f ms %3.0f) %.3f", rung_names[kernels], r.ours,
                     flops / r.ours * 1e-9, r.dense, flops / r.dense * 1e-9, fmax(r.dense, bound) / r.ours);
        }
        print_to(table, "\n");
        dense_free(dense);
        CUDA_CHECK(cudaFree(h));
    }
}

static void time_all(void) {
    Case cases[] = {
        {768, 3072, 8, 65536, 1, 0, 0, true, 0},   {1024, 4096, 8, 65536, 1, 0, 0, true, 0},
        {768, 384, 64, 65536, 8, 0, 0, true, 0},   {768, 3072, 64, 65536, 1, 0, 0, true, 0},
        {768, 192, 128, 32768, 16, 0, 0, true, 0}, {768, 96, 256, 16384, 32, 0, 0, true, 0},
    };
    CUBLAS_CHECK(cublasLtCreate(&lt));
    CUDA_CHECK(cudaMalloc(&workspace, WORKSPACE));
    std::vector<char> table;
    size_t count = std::min(timed_cases, sizeof(cases) / sizeof(cases[0]));
    for (size_t i = 0; i < count; i++) {
        Layer l = layer_new(cases[i]);
        check_layer(l, 509, 1);
        time_layer(table, l, i == 0);
        layer_free(l);
    }
    table.push_back(0);
    printf("\nTFLOP/s of the pairs; last of a rung: share of the slower of dense and bytes / 3 TB/s\n%s",
           table.data());
}

int main(int argc, char **argv) {
    bool time = argc > 1 && strcmp(argv[1], "time") == 0;
    if (argc < 2 || (!time && strcmp(argv[1], "check") != 0)) {
        die_usage("grouped_gemm check | time [p2] [c3]");
    }
    for (int i = 2; i < argc; i++) {
        if (argv[i][0] == 'p') {
            only = atoi(argv[i] + 1);
        } else if (argv[i][0] == 'c') {
            timed_cases = (size_t)atoi(argv[i] + 1);
        } else {
            die_usage("no such argument: %s", argv[i]);
        }
    }
    if (!hopper::available()) {
        die("this device is no Hopper GPU (compute capability 9.0)");
    }
    if (time) {
        time_all();
    } else {
        check_all();
    }
    return failures_shown();
}
