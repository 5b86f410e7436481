/*
Cross entropy, forward and backward: ways to go twice over rows of 100 KB, each checked against a simple
kernel and timed.

    crossentropy [rows]     8192 and 16384 rows of V = 51200 N(0, 1) logits, or so many

    trainer    crossentropy.cuh as it is
    batches    BATCH packs of 16 bytes per thread are on their way before the first is used; the row is read
               again for the gradient. So many threads own a row, a multiprocessor has so many rows under way
    kept       the row stays in registers, PACKS per thread, and is read once; with `ahead` a block goes over
               many rows, and loads a pack of the next row as soon as it has stored that pack's gradient
    hints      s: stores that do not stay in the cache (__stcs); l: last reads, likewise (__ldcs)

On an H100 (8192 rows; the least that must move takes 0.56 ms at 3 TB/s):

    online sums, a pack at a time, 512 threads x 2 (the trainer's before)   0.818 ms
    batches of 4, 512 threads x 2: plain 1.164, s 0.693;  of 2, 1024 threads x 2, sl                 0.599
    kept, 1024 threads: plain 0.579, s 0.584, sl 0.624, ahead 0.606;  640 threads 0.664, ahead       0.596

A kept variant that spills a few registers loses it all (0.881): a spilled pack has to be there first.

    make build/ladder_crossentropy
*/
#include "ladder.cuh"
#include "llmc/crossentropy.cuh"
// defines: fill_kernel, poisoned_new, milliseconds, median, failures; LogitRow, load_logits, store_logits,
// logit_gradient, sum_of_powers

static const int V = 51200;

// ----------------------------------------------------------------------------
// the simple kernel: a thread per 1024th of a row, in double

static __global__ void simple_kernel(float *losses, float *gradient, const floatX *logits, const int *targets,
                                     int columns, float scale) {
    __shared__ double sums[1024];
    const floatX *z = logits + (int64_t)blockIdx.x * columns;
    double sum = 0.0;
    for (int v = threadIdx.x; v < columns; v += 1024) {
        sum += exp((double)to_float(z[v]));
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    sum = 0.0;
    for (int i = 0; i < 1024; i++) {
        sum += sums[i];
    }
    for (int v = threadIdx.x; v < columns; v += 1024) {
        double p = exp((double)to_float(z[v])) / sum - (v == targets[blockIdx.x] ? 1.0 : 0.0);
        gradient[(int64_t)blockIdx.x * columns + v] = (float)(scale * p);
    }
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = (float)(log(sum) - (double)to_float(z[targets[blockIdx.x]]));
    }
}

// ----------------------------------------------------------------------------
// pieces. Rows begin at multiples of 16 bytes and are whole packs

enum { HINT_NONE, HINT_STORES, HINT_LOADS, HINT_BOTH };

// packs p, p + step, ... ; -infinity beyond the row
template <int COUNT, bool LAST_USE>
__device__ __forceinline__ void read_packs(Bits (&z)[COUNT], const LogitRow &row, int p, int step) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (LAST_USE && p + i * step < row.packs) {
            uint4 raw = __ldcs((const uint4 *)(row.z + (p + i * step) * PACK_X));
            memcpy(&z[i], &raw, sizeof(raw));
        } else {
            z[i] = load_logits<false>(row, p + i * step);
        }
    }
}

template <bool STREAM>
__device__ __forceinline__ void write_gradient(const LogitRow &row, int p, const Bits &z, int target,
                                               float max, float sum, float scale) {
    if (p >= row.packs) {
        return;
    }
    Floats gradient = logit_gradient(widen(z), p * PACK_X, target, max, scale / sum, scale);
    Pack<floatX> pack = narrow(gradient);
    if (STREAM) {
        __stcs((uint4 *)(row.z + p * PACK_X), *(const uint4 *)&pack);
    } else {
        store_pack(row.z + p * PACK_X, pack);
    }
}

template <int COUNT> __device__ __forceinline__ float max_of_packs(float max, const Bits (&z)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        max = max_of_pack(max, widen(z[i]));
    }
    return max;
}

template <int COUNT> __device__ __forceinline__ float sum_of_packs(const Bits (&z)[COUNT], float max) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        sum += sum_of_powers(widen(z[i]), max);
    }
    return sum;
}

// ----------------------------------------------------------------------------
// variants

template <int THREADS, int BLOCKS, int BATCH, int HINTS>
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    batches_kernel(float *losses, floatX *logits, const int *targets, int columns, float scale) {
    const bool LAST_USE = (HINTS & HINT_LOADS) != 0, STREAM = (HINTS & HINT_STORES) != 0;
    LogitRow row = logit_row(logits, blockIdx.x, columns);
    int target = targets[blockIdx.x];
    float target_logit = to_float(row.z[target]), most = -INFINITY, sum = 0.0f;
    Bits z[BATCH];
    for (int p = (int)threadIdx.x; p < row.packs; p += BATCH * THREADS) {
        read_packs<BATCH, false>(z, row, p, THREADS);
        float before = most;
        most = max_of_packs(most, z);
        sum = sum * exp2f((before - most) * LOG2_E) + sum_of_packs(z, most);
    }
    float max = block_max(most);
    sum = block_sum(sum * power_of_2((most - max) * LOG2_E));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + (max - target_logit);
    }
    for (int p = (int)threadIdx.x; p < row.packs; p += BATCH * THREADS) {
        read_packs<BATCH, LAST_USE>(z, row, p, THREADS);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            write_gradient<STREAM>(row, p + i * THREADS, z[i], target, max, sum, scale);
        }
    }
}

template <int THREADS, int PACKS, int HINTS>
static __global__ void __launch_bounds__(THREADS, 1)
    kept_kernel(float *losses, floatX *logits, const int *targets, int64_t N, int columns, float scale) {
    const bool LAST_USE = (HINTS & HINT_LOADS) != 0, STREAM = (HINTS & HINT_STORES) != 0;
    LogitRow row = logit_row(logits, blockIdx.x, columns);
    Bits z[PACKS];
    read_packs<PACKS, LAST_USE>(z, row, (int)threadIdx.x, THREADS);
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        int target = targets[n];
        float target_logit = to_float(row.z[target]);
        float max = block_max(max_of_packs(-INFINITY, z));
        forget_values(z);
        float sum = block_sum(sum_of_packs(z, max));
        forget_values(z);
        if (threadIdx.x == 0) {
            losses[n] = logf(sum) + (max - target_logit);
        }
        bool more = n + gridDim.x < N;
        LogitRow next = logit_row(logits, more ? n + gridDim.x : n, columns);
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int p = (int)threadIdx.x + i * THREADS;
            write_gradient<STREAM>(row, p, z[i], target, max, sum, scale);
            Bits one[1] = {z[i]};
            if (more) {
                read_packs<1, LAST_USE>(one, next, p, THREADS);
            }
            z[i] = one[0];
        }
        row = next;
    }
}

typedef void (*Variant)(float *, floatX *, const int *, int64_t, float);

static void trainer(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    crossentropy_forward_backward(losses, logits, targets, N, V, scale, 0);
}

template <int THREADS, int BLOCKS, int BATCH, int HINTS>
static void batches(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    launch(batches_kernel<THREADS, BLOCKS, BATCH, HINTS>, (unsigned)N, THREADS, 0, 0, losses, logits, targets,
           V, scale);
}

template <int THREADS, int PACKS, int HINTS, bool AHEAD>
static void kept(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    static_assert(THREADS * PACKS * PACK_X >= V, "the row does not fit");
    int64_t blocks = AHEAD ? std::min<int64_t>(N, num_sms()) : N;
    launch(kept_kernel<THREADS, PACKS, HINTS>, (unsigned)blocks, THREADS, 0, 0, losses, logits, targets, N, V,
           scale);
}

static const struct {
    const char *name;
    Variant run;
} variants[] = {
    {"trainer", trainer},
    {"batches of 1, 512 threads x 2", batches<512, 2, 1, HINT_NONE>},
    {"batches of 4, 512 threads x 2", batches<512, 2, 4, HINT_NONE>},
    {"batches of 4, 512 threads x 2, s", batches<512, 2, 4, HINT_STORES>},
    {"batches of 4, 512 threads x 2, sl", batches<512, 2, 4, HINT_BOTH>},
    {"batches of 2, 1024 threads x 2, sl", batches<1024, 2, 2, HINT_BOTH>},
    {"batches of 4, 1024 threads x 1, sl", batches<1024, 1, 4, HINT_BOTH>},
    {"kept, 1024 threads", kept<1024, 7, HINT_NONE, false>},
    {"kept, 1024 threads, s", kept<1024, 7, HINT_STORES, false>},
    {"kept, 1024 threads, sl", kept<1024, 7, HINT_BOTH, false>},
    {"kept, 1024 threads, ahead", kept<1024, 7, HINT_NONE, true>},
    {"kept, 640 threads", kept<640, 10, HINT_NONE, false>},
    {"kept, 640 threads, ahead", kept<640, 10, HINT_NONE, true>},
};

enum { VARIANTS = sizeof(variants) / sizeof(variants[0]), CHECK_ROWS = 300, REPEATS = 10 };

// ----------------------------------------------------------------------------

template <class T> static std::vector<T> fetch(const T *p, int64_t n) {
    std::vector<T> host((size_t)n);
    CUDA_CHECK(cudaMemcpy(host.data(), p, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

// relative errors of losses and gradient over CHECK_ROWS rows
static void check(int variant, floatX *logits, const int *targets) {
    const int64_t n = (int64_t)CHECK_ROWS * V;
    const float scale = 1e-3f;
    float *losses = poisoned_new<float>(CHECK_ROWS), *want = poisoned_new<float>(n),
          *want_losses = poisoned_new<float>(CHECK_ROWS);
    launch(fill_kernel<floatX>, 1024, 256, 0, 0, logits, n, 1, 1.0f);
    launch(simple_kernel, CHECK_ROWS, 1024, 0, 0, want_losses, want, logits, targets, V, scale);
    variants[variant].run(losses, logits, targets, CHECK_ROWS, scale);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> a = fetch(losses, CHECK_ROWS), b = fetch(want_losses, CHECK_ROWS), g = fetch(want, n);
    std::vector<floatX> z = fetch(logits, n);
    double loss_error = 0.0, error = 0.0, norm = 0.0;
    for (int i = 0; i < CHECK_ROWS; i++) {
        double off = fabs((double)a[i] - b[i]) / b[i];
        loss_error = std::max(loss_error, off < INFINITY ? off : INFINITY); // NaN counts as wrong
    }
    for (int64_t i = 0; i < n; i++) {
        double off = (double)to_float(z[i]) - g[i];
        if (fabs(g[i]) < 0.5f * scale) { // else a target: there are few, and they would hide all else
            error += off * off;
            norm += (double)g[i] * g[i];
        }
    }
    error = sqrt(error / norm);
    bool good = loss_error < 1e-5 && error < 2e-3;
    failures += !good;
    printf("  losses %.1e, gradient %.1e%s", loss_error, error, good ? "" : "  WRONG");
    CUDA_CHECK(cudaFree(losses));
    CUDA_CHECK(cudaFree(want));
    CUDA_CHECK(cudaFree(want_losses));
}

// the median of REPEATS, each on fresh logits
static double time_ms(int variant, floatX *logits, const int *targets, float *losses, int64_t rows) {
    std::vector<float> times;
    for (int i = -2; i < REPEATS; i++) {
        launch(fill_kernel<floatX>, 4096, 256, 0, 0, logits, rows * V, 1, 1.0f);
        float ms = milliseconds([&] { variants[variant].run(losses, logits, targets, rows, 1e-5f); });
        if (i >= 0) {
            times.push_back(ms);
        }
    }
    return median(times);
}

int main(int argc, char **argv) {
    std::vector<int64_t> sizes = {8192, 16384};
    if (argc > 1) {
        sizes = {(int64_t)atoi(argv[1])};
    }
    int64_t most = std::max<int64_t>(CHECK_ROWS, *std::max_element(sizes.begin(), sizes.end()));
    std::vector<int> host((size_t)most);
    for (int64_t i = 0; i < most; i++) {
        host[(size_t)i] = (int)(i * 7919 % V);
    }
    int *targets = poisoned_new<int>(most);
    CUDA_CHECK(cudaMemcpy(targets, host.data(), (size_t)most * sizeof(int), cudaMemcpyHostToDevice));
    floatX *logits = poisoned_new<floatX>(most * V);
    float *losses = poisoned_new<float>(most);
    for (int variant = 0; variant < VARIANTS; variant++) {
        printf("%-36s", variants[variant].name);
        check(variant, logits, targets);
        for (int64_t rows : sizes) {
            double ms = time_ms(variant, logits, targets, losses, rows);
            printf("  %lld rows %.3f ms %.0f GB/s", (long long)rows, ms, 4e-6 * (double)rows * V / ms);
        }
        printf("\n");
        fflush(stdout);
    }
    return failures_shown();
}
