/*
Cross entropy, forward and backward: ways to go twice over rows of 100 KB, each checked against a simple kernel
and timed.

    crossentropy [rows]     8192 and 16384 rows of V = 51200 N(0, 1) logits, or so many

A variant is a type: how many threads own a row, how many rows a processor has under way, and what a thread
does with its packs of 16 bytes:

    today      crossentropy.cuh as it is
    batches    BATCH packs are on their way before the first is used; the row is read again for the gradient
    kept       the row stays in registers, PACKS a thread, and is read once; with `ahead` a block goes over
               many rows, and loads a pack of the next row as soon as it has stored that pack's gradient
    hints      s: stores that do not stay in the cache (__stcs); l: last reads, likewise (__ldcs)

    nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -I. dev/ladder/crossentropy.cu
*/
#include "llmc/crossentropy.cuh"
#include <algorithm>
#include <math.h>
#include <vector>
// defines: LogitRow, load_logits, store_logits, logit_gradient; std::sort, fabs, std::vector

static const int V = 51200;

__device__ static inline uint32_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return (uint32_t)(x >> 32);
}

static __global__ void fill_kernel(floatX *p, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        float u = ((float)(mix(2 * i) >> 8) + 0.5f) * 0x1p-24f, v = (float)(mix(2 * i + 1) >> 8) * 0x1p-24f;
        p[i] = to_x(sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v));
    }
}

// ----------------------------------------------------------------------------
// the simple kernel: a thread a row's 1024th part, in double

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
// pieces

#define LOG2_E 1.44269504f

enum { HINT_NONE, HINT_STORES, HINT_LOADS, HINT_BOTH };

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// EDGES: rows may begin anywhere (else at multiples of 16 bytes, and end there)
template <bool LAST_USE, bool EDGES>
__device__ __forceinline__ Pack<floatX> read_pack(const LogitRow &row, int p) {
    int first = EDGES ? p * PACK_X - row.shift : p * PACK_X;
    if (EDGES && !(first >= 0 && first + PACK_X <= row.V)) {
        return load_logits(row, p);
    }
    uint4 raw = LAST_USE ? __ldcs((const uint4 *)(row.z + first)) : *(const uint4 *)(row.z + first);
    return *(const Pack<floatX> *)&raw;
}

template <bool STREAM, bool EDGES>
__device__ __forceinline__ void write_pack(const LogitRow &row, int p, const Pack<floatX> &pack) {
    int first = EDGES ? p * PACK_X - row.shift : p * PACK_X;
    if (EDGES && !(first >= 0 && first + PACK_X <= row.V)) {
        store_logits(row, p, pack);
    } else if (STREAM) {
        __stcs((uint4 *)(row.z + first), *(const uint4 *)&pack);
    } else {
        store_pack(row.z + first, pack);
    }
}

// packs p, p + step, ... ; -infinity beyond the row
template <int COUNT, bool LAST_USE, bool EDGES>
__device__ __forceinline__ void read_packs(Pack<floatX> (&z)[COUNT], const LogitRow &row, int p, int step) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (p + i * step < row.packs) {
            z[i] = read_pack<LAST_USE, EDGES>(row, p + i * step);
        } else {
            for (int j = 0; j < PACK_X; j++) {
                z[i].x[j] = to_x(-INFINITY);
            }
        }
    }
}

// the compiler knows no longer what is in the registers: else it keeps all exponentials of the first pass for the
// second, for which there is no room
template <int COUNT> __device__ __forceinline__ void forget(Pack<floatX> (&z)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        uint4 raw = *(uint4 *)&z[i];
        asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
        z[i] = *(Pack<floatX> *)&raw;
    }
}

template <int COUNT>
__device__ __forceinline__ float max_of_packs(float max, const Pack<floatX> (&z)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        Floats wide = widen(z[i]);
        for (int j = 0; j < PACK_X; j++) {
            max = fmaxf(max, wide.x[j]);
        }
    }
    return max;
}

// exponentials relative to max
template <int COUNT>
__device__ __forceinline__ float sum_of_packs(const Pack<floatX> (&z)[COUNT], float max) {
    float offset = max * LOG2_E, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        Floats wide = widen(z[i]);
        for (int j = 0; j < PACK_X; j++) {
            sum += power_of_2(wide.x[j] * LOG2_E - offset);
        }
    }
    return sum;
}

__device__ __forceinline__ Pack<floatX> gradient_of_pack(const Pack<floatX> &z, int first, int target,
                                                         float max, float factor, float scale) {
    Floats wide = widen(z);
    for (int i = 0; i < PACK_X; i++) {
        wide.x[i] = factor * power_of_2(wide.x[i] * LOG2_E - max * LOG2_E);
    }
    if (target >= first && target < first + PACK_X) {
        for (int i = 0; i < PACK_X; i++) {
            wide.x[i] -= first + i == target ? scale : 0.0f;
        }
    }
    return narrow(wide);
}

// over the block, each by one barrier: the two use different memory
template <int THREADS> __device__ __forceinline__ float row_max(float x) {
    __shared__ float partial[32];
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_max(partial[threadIdx.x % (THREADS / 32)]);
}

template <int THREADS> __device__ __forceinline__ float row_total(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < THREADS / 32 ? partial[threadIdx.x % 32] : 0.0f);
}

// ----------------------------------------------------------------------------
// variants

template <int THREADS, int BLOCKS, int BATCH, int HINTS>
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    batches_kernel(float *losses, floatX *logits, const int *targets, int columns, float scale) {
    LogitRow row = logit_row(logits, blockIdx.x, columns);
    int target = targets[blockIdx.x];
    float target_logit = to_float(row.z[target]), most = -INFINITY, sum = 0.0f;
    Pack<floatX> z[BATCH];
    for (int p = (int)threadIdx.x; p < row.packs; p += BATCH * THREADS) {
        read_packs<BATCH, false, true>(z, row, p, THREADS);
        float before = most;
        most = max_of_packs(most, z);
        sum = sum * power_of_2((before - most) * LOG2_E) + sum_of_packs(z, most);
    }
    float max = row_max<THREADS>(most);
    sum = row_total<THREADS>(sum * power_of_2((most - max) * LOG2_E));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + (max - target_logit);
    }
    for (int p = (int)threadIdx.x; p < row.packs && scale != 0.0f; p += BATCH * THREADS) {
        read_packs<BATCH, (HINTS & HINT_LOADS) != 0, true>(z, row, p, THREADS);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int pack = p + i * THREADS;
            if (pack < row.packs) {
                write_pack<(HINTS & HINT_STORES) != 0, true>(
                    row, pack,
                    gradient_of_pack(z[i], pack * PACK_X - row.shift, target, max, scale / sum, scale));
            }
        }
    }
}

template <int THREADS, int BLOCKS, int PACKS, int HINTS>
static __global__ void __launch_bounds__(THREADS, BLOCKS)
    kept_kernel(float *losses, floatX *logits, const int *targets, int64_t N, int columns, float scale) {
    const bool LAST_USE = (HINTS & HINT_LOADS) != 0, STREAM = (HINTS & HINT_STORES) != 0;
    LogitRow row = logit_row(logits, blockIdx.x, columns);
    Pack<floatX> z[PACKS];
    read_packs<PACKS, LAST_USE, false>(z, row, (int)threadIdx.x, THREADS);
    for (int64_t n = blockIdx.x; n < N; n += gridDim.x) {
        int target = targets[n];
        float target_logit = to_float(row.z[target]);
        float max = row_max<THREADS>(max_of_packs(-INFINITY, z));
        forget(z);
        float sum = row_total<THREADS>(sum_of_packs(z, max));
        forget(z);
        if (threadIdx.x == 0) {
            losses[n] = logf(sum) + (max - target_logit);
        }
        bool more = n + gridDim.x < N;
        LogitRow next = logit_row(logits, more ? n + gridDim.x : n, columns);
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int p = (int)threadIdx.x + i * THREADS;
            if (p < row.packs && scale != 0.0f) {
                write_pack<STREAM, false>(
                    row, p, gradient_of_pack(z[i], p * PACK_X, target, max, scale / sum, scale));
            }
            if (p < next.packs && more) {
                z[i] = read_pack<LAST_USE, false>(next, p);
            }
        }
        row = next;
    }
}

typedef void (*Variant)(float *, floatX *, const int *, int64_t, float);

static void today(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    crossentropy_forward_backward(losses, logits, targets, N, V, scale, 0);
}

template <int THREADS, int BLOCKS, int BATCH, int HINTS>
static void batches(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    launch(batches_kernel<THREADS, BLOCKS, BATCH, HINTS>, (unsigned)N, THREADS, 0, 0, losses, logits, targets,
           V, scale);
}

template <int THREADS, int BLOCKS, int PACKS, int HINTS, bool AHEAD>
static void kept(float *losses, floatX *logits, const int *targets, int64_t N, float scale) {
    static_assert(THREADS * PACKS * PACK_X >= V, "the row does not fit");
    int64_t blocks = AHEAD ? std::min<int64_t>(N, BLOCKS * num_sms()) : N;
    launch(kept_kernel<THREADS, BLOCKS, PACKS, HINTS>, (unsigned)blocks, THREADS, 0, 0, losses, logits,
           targets, N, V, scale);
}

static const struct {
    const char *name;
    Variant run;
} variants[] = {
    {"today", today},
    {"batches of 1, 512 threads x 2", batches<512, 2, 1, HINT_NONE>},
    {"batches of 2, 512 threads x 2", batches<512, 2, 2, HINT_NONE>},
    {"batches of 4, 512 threads x 2", batches<512, 2, 4, HINT_NONE>},
    {"batches of 4, 512 threads x 2, s", batches<512, 2, 4, HINT_STORES>},
    {"batches of 4, 512 threads x 2, l", batches<512, 2, 4, HINT_LOADS>},
    {"batches of 4, 512 threads x 2, sl", batches<512, 2, 4, HINT_BOTH>},
    {"batches of 7, 512 threads x 2, sl", batches<512, 2, 7, HINT_BOTH>},
    {"batches of 2, 1024 threads x 2, sl", batches<1024, 2, 2, HINT_BOTH>},
    {"batches of 4, 1024 threads x 1", batches<1024, 1, 4, HINT_NONE>},
    {"batches of 4, 1024 threads x 1, sl", batches<1024, 1, 4, HINT_BOTH>},
    {"kept, 1024 threads x 1", kept<1024, 1, 7, HINT_NONE, false>},
    {"kept, 1024 threads x 1, s", kept<1024, 1, 7, HINT_STORES, false>},
    {"kept, 1024 threads x 1, sl", kept<1024, 1, 7, HINT_BOTH, false>},
    {"kept, 1024 threads x 1, ahead", kept<1024, 1, 7, HINT_NONE, true>},
    {"kept, 1024 threads x 1, ahead, s", kept<1024, 1, 7, HINT_STORES, true>},
    {"kept, 1024 threads x 1, ahead, sl", kept<1024, 1, 7, HINT_BOTH, true>},
    {"kept, 640 threads x 1", kept<640, 1, 10, HINT_NONE, false>},
    {"kept, 640 threads x 1, ahead", kept<640, 1, 10, HINT_NONE, true>},
    {"kept, 640 threads x 1, ahead, s", kept<640, 1, 10, HINT_STORES, true>},
    {"kept, 640 threads x 1, ahead, sl", kept<640, 1, 10, HINT_BOTH, true>},
    {"kept, 512 threads x 1, ahead, sl", kept<512, 1, 13, HINT_BOTH, true>},
};

enum { VARIANTS = sizeof(variants) / sizeof(variants[0]), CHECK_ROWS = 300, REPEATS = 10 };

// ----------------------------------------------------------------------------

template <class T> static T *device_new(int64_t n) {
    T *p;
    CUDA_CHECK(cudaMalloc(&p, (size_t)n * sizeof(T)));
    return p;
}

template <class T> static std::vector<T> fetch(const T *p, int64_t n) {
    std::vector<T> host((size_t)n);
    CUDA_CHECK(cudaMemcpy(host.data(), p, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

// relative errors of losses and gradient over CHECK_ROWS rows
static void check(int variant, floatX *logits, const int *targets) {
    const int64_t n = (int64_t)CHECK_ROWS * V;
    const float scale = 1e-3f;
    float *losses = device_new<float>(CHECK_ROWS), *want = device_new<float>(n),
          *want_losses = device_new<float>(CHECK_ROWS);
    launch(fill_kernel, 1024, 256, 0, 0, logits, n);
    launch(simple_kernel, CHECK_ROWS, 1024, 0, 0, want_losses, want, logits, targets, V, scale);
    variants[variant].run(losses, logits, targets, CHECK_ROWS, scale);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> a = fetch(losses, CHECK_ROWS), b = fetch(want_losses, CHECK_ROWS), g = fetch(want, n);
    std::vector<floatX> z = fetch(logits, n);
    double loss_error = 0.0, error = 0.0, norm = 0.0;
    for (int i = 0; i < CHECK_ROWS; i++) {
        loss_error = std::max(loss_error, fabs((double)a[i] - b[i]) / b[i]);
    }
    for (int64_t i = 0; i < n; i++) {
        double off = (double)to_float(z[i]) - g[i];
        if (fabs(g[i]) < 0.5f * scale) { // else a target: there are few, and they would hide all else
            error += off * off;
            norm += (double)g[i] * g[i];
        }
    }
    error = sqrt(error / norm);
    printf("  losses %.1e, gradient %.1e%s", loss_error, error,
           loss_error < 1e-5 && error < 2e-3 ? "" : "  WRONG");
    CUDA_CHECK(cudaFree(losses));
    CUDA_CHECK(cudaFree(want));
    CUDA_CHECK(cudaFree(want_losses));
}

// the median of REPEATS, each on fresh logits
static double time_ms(int variant, floatX *logits, const int *targets, float *losses, int64_t rows) {
    std::vector<float> times;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < REPEATS + 2; i++) {
        float ms;
        launch(fill_kernel, 4096, 256, 0, 0, logits, rows * V);
        CUDA_CHECK(cudaEventRecord(begin));
        variants[variant].run(losses, logits, targets, rows, 1e-5f);
        CUDA_CHECK(cudaEventRecord(end));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        times.push_back(ms);
    }
    std::sort(times.begin() + 2, times.end());
    return times[2 + REPEATS / 2];
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
    int *targets = device_new<int>(most);
    CUDA_CHECK(cudaMemcpy(targets, host.data(), (size_t)most * sizeof(int), cudaMemcpyHostToDevice));
    floatX *logits = device_new<floatX>(most * V);
    float *losses = device_new<float>(most);
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
    return 0;
}
