/*
Softmax cross entropy on the device, in nats, forward and backward in one launch.

    loss_n = ln sum_v exp(z_nv) - z_n,target;     dz_nv = scale (softmax(z_n)_v - 1{v = target})

A block owns a row. With up to 57336 columns (bf16) it keeps the row in its registers, and all loads are under
way at once: each byte is read once and written once. That is one row per multiprocessor, 1024 threads with 7
packs of 16 bytes each. (dev/ladder/crossentropy.cu compares ways to do it, on an H100 at V = 51200:
this one at 2900 GB/s, and reading the row again from the L2 cache at 2050. In shared memory it was slower
still.)

A wider row is read twice, and so it takes one pass for both the maximum and the sum: a thread keeps the
largest logit so far and the sum of the exponentials relative to it, and rescales the sum when the largest
changes:

    max' = max(max, z);   sum' = sum exp(max - max') + exp(z - max')

exp(z - max) is computed as 2^(z log2(e) - max log2(e)), one multiply-add before the instruction.

Rows of an odd V begin anywhere (EDGES), so packs are laid on the 16-byte lines of memory rather than on the
row: a row's first and last packs may hang over its ends, and are then read and written by elements.

Scoring wants log likelihoods to more digits than a bf16 logit has (2^-9 of 20 is 0.04), and an argmax that
does not tie where bf16 does: its logits are fp32, what the head's product has summed up. It reads a row once:
the target is beaten by a larger logit, or an equal one of a lower index.

logits [N, V] floatX, targets [N], losses [N] fp32. With scale != 0 the logits are overwritten by their
gradient; with scale = 0 they stay. All V columns take part. Equals crossentropy_forward_backward and
crossentropy_score of crossentropy.h. Errors: none; a logit that is not finite makes the loss not finite.
*/
#ifndef CROSSENTROPY_CUH
#define CROSSENTROPY_CUH

#include "llmc/gpu/floats.cuh"
#include "llmc/gpu/sums.cuh"
#include <math.h>
// defines: Floats, widen, narrow, LOG2_E, power_of_2; block_sum, block_max, add_all; INFINITY

enum {
    CROSSENTROPY_KEPT_THREADS = 1024, // of a block that keeps its row
    CROSSENTROPY_KEPT_PACKS = 7,      // a thread
    CROSSENTROPY_THREADS = 512        // of one that does not
};

// A row on memory's 16-byte lines: pack p holds columns p PACK_X - shift ... and the row ends within the last
typedef struct {
    floatX *z;
    int V, shift, packs;
} LogitRow;

__device__ __forceinline__ LogitRow logit_row(floatX *logits, int64_t n, int V) {
    LogitRow row;
    row.z = logits + n * V;
    row.V = V;
    row.shift = (int)((uintptr_t)row.z % 16 / sizeof(floatX));
    row.packs = ceil_div<int>(V + row.shift, PACK_X);
    return row;
}

// is pack p within the row? Without EDGES packs are whole or none
template <bool EDGES> __device__ __forceinline__ bool is_whole(const LogitRow &row, int p) {
    int first = p * PACK_X - row.shift;
    return EDGES ? first >= 0 && first + PACK_X <= row.V : p < row.packs;
}

// columns outside the row are -infinity, whose exponential is 0
template <bool EDGES> __device__ __forceinline__ Bits load_logits(const LogitRow &row, int p) {
    int first = EDGES ? p * PACK_X - row.shift : p * PACK_X;
    if (is_whole<EDGES>(row, p)) {
        return load_bits(row.z + first);
    }
    Pack<floatX> pack;
    for (int i = 0; i < PACK_X; i++) {
        int v = first + i;
        pack.x[i] = EDGES && v >= 0 && v < row.V ? row.z[v] : to_x(-INFINITY);
    }
    return to_bits(pack);
}

template <bool EDGES>
__device__ __forceinline__ void store_logits(const LogitRow &row, int p, const Pack<floatX> &pack) {
    int first = EDGES ? p * PACK_X - row.shift : p * PACK_X;
    if (is_whole<EDGES>(row, p)) {
        store_pack(row.z + first, pack);
        return;
    }
    for (int i = 0; i < PACK_X && EDGES; i++) {
        int v = first + i;
        if (v >= 0 && v < row.V) {
            row.z[v] = pack.x[i];
        }
    }
}

// a maximum and the sum of exponentials relative to it
typedef struct {
    float max, sum;
} OnlineSum;

__device__ __forceinline__ float max_of_pack(float max, const Floats &z) {
    for (int i = 0; i < PACK_X; i++) {
        max = fmaxf(max, z.x[i]);
    }
    return max;
}

// of the exponentials relative to max
__device__ __forceinline__ float sum_of_powers(const Floats &z, float max) {
    float offset = max * LOG2_E, sum = 0.0f;
    for (int i = 0; i < PACK_X; i++) {
        sum += power_of_2(z.x[i] * LOG2_E - offset);
    }
    return sum;
}

__device__ __forceinline__ void online_add(OnlineSum &online, const Floats &z) {
    float max = max_of_pack(online.max, z);
    online.sum = online.sum * power_of_2(online.max * LOG2_E - max * LOG2_E) + sum_of_powers(z, max);
    online.max = max;
}

// the gradient of pack p
__device__ __forceinline__ Floats logit_gradient(Floats z, int first, int target, float max, float factor,
                                                 float scale) {
    for (int i = 0; i < PACK_X; i++) {
        z.x[i] = factor * power_of_2(z.x[i] * LOG2_E - max * LOG2_E);
    }
    if (target >= first && target < first + PACK_X) {
        for (int i = 0; i < PACK_X; i++) {
            z.x[i] -= first + i == target ? scale : 0.0f;
        }
    }
    return z;
}

template <bool EDGES>
__device__ __forceinline__ void store_logit_gradient(const LogitRow &row, int p, const Bits &z, int target,
                                                     float max, float sum, float scale) {
    int first = p * PACK_X - row.shift;
    store_logits<EDGES>(row, p, narrow(logit_gradient(widen(z), first, target, max, scale / sum, scale)));
}

template <bool EDGES>
static __global__ void __launch_bounds__(CROSSENTROPY_KEPT_THREADS, 1)
    crossentropy_kept_kernel(float *losses, floatX *logits, const int *targets, int V, float scale) {
    const int THREADS = CROSSENTROPY_KEPT_THREADS, PACKS = CROSSENTROPY_KEPT_PACKS;
    LogitRow row = logit_row(logits, blockIdx.x, V);
    int target = targets[blockIdx.x], thread = (int)threadIdx.x;
    float target_logit = to_float(row.z[target]); // before any thread overwrites it: barriers follow
    Bits z[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        z[i] = load_logits<EDGES>(row, thread + i * THREADS);
    }
    float max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        max = max_of_pack(max, widen(z[i]));
    }
    max = block_max(max);
    forget_values(z); // or the compiler would keep the exponentials of the sum for the gradient
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        sum += sum_of_powers(widen(z[i]), max);
    }
    sum = block_sum(sum);
    if (thread == 0) {
        losses[blockIdx.x] = logf(sum) + (max - target_logit);
    }
    if (scale == 0.0f) {
        return;
    }
    forget_values(z);
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        store_logit_gradient<EDGES>(row, thread + i * THREADS, z[i], target, max, sum, scale);
    }
}

static __global__ void __launch_bounds__(CROSSENTROPY_THREADS, 2)
    crossentropy_kernel(float *losses, floatX *logits, const int *targets, int V, float scale) {
    LogitRow row = logit_row(logits, blockIdx.x, V);
    int target = targets[blockIdx.x];
    float target_logit = to_float(row.z[target]); // before any thread overwrites it: barriers follow
    OnlineSum online = {-INFINITY, 0.0f};
    for (int p = (int)threadIdx.x; p < row.packs; p += CROSSENTROPY_THREADS) {
        online_add(online, widen(load_logits<true>(row, p)));
    }
    float max = block_max(online.max);
    float sum = block_sum(online.sum * power_of_2(online.max * LOG2_E - max * LOG2_E));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + (max - target_logit);
    }
    for (int p = (int)threadIdx.x; p < row.packs && scale != 0.0f; p += CROSSENTROPY_THREADS) {
        store_logit_gradient<true>(row, p, load_logits<true>(row, p), target, max, sum, scale);
    }
}

static inline void crossentropy_forward_backward(float *losses, floatX *logits, const int *targets, int64_t N,
                                                 int V, float scale, cudaStream_t stream) {
    int most = CROSSENTROPY_KEPT_THREADS * CROSSENTROPY_KEPT_PACKS * PACK_X - PACK_X; // wherever a row begins
    int keeps =
        V > CROSSENTROPY_THREADS * PACK_X && V <= most; // in a short row few threads would have any work
    int edges = V % PACK_X != 0 || !is_aligned16(logits);
    auto kernel = !keeps  ? crossentropy_kernel
                  : edges ? crossentropy_kept_kernel<true>
                          : crossentropy_kept_kernel<false>;
    launch(kernel, (unsigned)N, keeps ? CROSSENTROPY_KEPT_THREADS : CROSSENTROPY_THREADS, 0, stream, losses,
           logits, targets, V, scale);
}

// ----------------------------------------------------------------------------

// a block owns a row
static __global__ void __launch_bounds__(CROSSENTROPY_THREADS)
    crossentropy_score_kernel(float *ll, unsigned char *greedy, const float *logits, const int *targets,
                              int V) {
    const float *z = logits + (int64_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    float target_logit = z[target], max = -INFINITY, sum = 0.0f, beaten = 0.0f;
    for (int v = (int)threadIdx.x; v < V; v += CROSSENTROPY_THREADS) {
        float x = z[v], larger = fmaxf(max, x);
        // (differences first: contracted to one multiply-add, products would differ even where logits are equal)
        sum = sum * power_of_2((max - larger) * LOG2_E) + power_of_2((x - larger) * LOG2_E);
        max = larger;
        beaten += x > target_logit || (x == target_logit && v < target) ? 1.0f : 0.0f;
    }
    float all_max = block_max(max);
    float all_sum = block_sum(sum > 0.0f ? sum * power_of_2((max - all_max) * LOG2_E) : sum);
    beaten = block_sum(beaten);
    if (threadIdx.x == 0) {
        ll[blockIdx.x] = (target_logit - all_max) - logf(all_sum);
        greedy[blockIdx.x] = beaten == 0.0f;
    }
}

// fp32 logits [N, V], which stay as they are
static inline void crossentropy_score(float *ll, unsigned char *greedy, const float *logits,
                                      const int *targets, int64_t N, int V, cudaStream_t stream) {
    launch(crossentropy_score_kernel, (unsigned)N, CROSSENTROPY_THREADS, 0, stream, ll, greedy, logits,
           targets, V);
}

// ----------------------------------------------------------------------------

enum { LOSS_THREADS = 1024 };

// *sum += scale (losses[0] + .. + losses[N - 1])
static inline void sum_losses(double *sum, const float *losses, int64_t N, double scale,
                              cudaStream_t stream) {
    add_all<LOSS_THREADS>(sum, losses, N, scale, stream);
}

#endif
