/*
Softmax cross entropy on the device, in nats, forward and backward in one launch.

    loss_n = ln sum_v exp(z_nv) - z_n,target;     dz_nv = scale (softmax(z_n)_v - 1{v = target})

A block owns a row. While it reads the row it keeps, a thread, the largest logit so far and the sum of the
exponentials relative to it, and rescales the sum when the largest changes:

    max' = max(max, z);   sum' = sum exp(max - max') + exp(z - max')

so that one pass gives both. The gradient needs a second look at the row: its 100 KB (V = 51200, bf16) are still in
the L2 cache. (Kept in shared memory instead, a row was 2.3 times slower on an H200: two blocks a processor.)

exp(z - max) is computed as 2^(z log2(e) - max log2(e)), one multiply-add before the instruction.

Rows of an odd V begin anywhere, so packs are laid on the 16-byte lines of memory rather than on the row: a
row's first and last packs may hang over its ends, and are then read and written by elements.

logits [N, V] floatX, targets [N], losses [N] fp32. With scale != 0 the logits are overwritten by their
gradient; with scale = 0 they stay. All V columns take part. Equals crossentropy_forward_backward of
crossentropy.h. Errors: none; a logit that is not finite makes the loss not finite.
*/
#ifndef CROSSENTROPY_CUH
#define CROSSENTROPY_CUH

#include "floats.cuh"
#include <math.h>
// defines: Floats, widen, narrow; exp2f, INFINITY

enum { CROSSENTROPY_THREADS = 512 };

#define LOG2_E 1.44269504f

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

// columns outside the row are -infinity, whose exponential is 0
__device__ __forceinline__ Pack<floatX> load_logits(const LogitRow &row, int p) {
    int first = p * PACK_X - row.shift;
    if (first >= 0 && first + PACK_X <= row.V) {
        return load_pack(row.z + first);
    }
    Pack<floatX> pack;
    for (int i = 0; i < PACK_X; i++) {
        int v = first + i;
        pack.x[i] = v >= 0 && v < row.V ? row.z[v] : to_x(-INFINITY);
    }
    return pack;
}

__device__ __forceinline__ void store_logits(const LogitRow &row, int p, const Pack<floatX> &pack) {
    int first = p * PACK_X - row.shift;
    if (first >= 0 && first + PACK_X <= row.V) {
        store_pack(row.z + first, pack);
        return;
    }
    for (int i = 0; i < PACK_X; i++) {
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

__device__ __forceinline__ void online_add(OnlineSum &online, const Floats &z) {
    float max = online.max;
    for (int i = 0; i < PACK_X; i++) {
        max = fmaxf(max, z.x[i]);
    }
    float offset = max * LOG2_E;
    float sum = online.sum * exp2f(online.max * LOG2_E - offset);
    for (int i = 0; i < PACK_X; i++) {
        sum += exp2f(z.x[i] * LOG2_E - offset);
    }
    online.max = max;
    online.sum = sum;
}

// the gradient of pack p
__device__ __forceinline__ Floats logit_gradient(Floats z, int first, int target, float max, float factor,
                                                 float scale) {
    for (int i = 0; i < PACK_X; i++) {
        z.x[i] = factor * exp2f(z.x[i] * LOG2_E - max * LOG2_E);
    }
    if (target >= first && target < first + PACK_X) {
        for (int i = 0; i < PACK_X; i++) {
            z.x[i] -= first + i == target ? scale : 0.0f;
        }
    }
    return z;
}

static __global__ void __launch_bounds__(CROSSENTROPY_THREADS, 2)
    crossentropy_kernel(float *losses, floatX *logits, const int *targets, int V, float scale) {
    LogitRow row = logit_row(logits, blockIdx.x, V);
    int target = targets[blockIdx.x];
    float target_logit = to_float(row.z[target]); // before any thread overwrites it: barriers follow
    OnlineSum online = {-INFINITY, 0.0f};
    for (int p = (int)threadIdx.x; p < row.packs; p += CROSSENTROPY_THREADS) {
        online_add(online, widen(load_logits(row, p)));
    }
    float max = block_max(online.max);
    float sum = block_sum(online.sum * exp2f(online.max * LOG2_E - max * LOG2_E));
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + (max - target_logit);
    }
    if (scale == 0.0f) {
        return;
    }
    for (int p = (int)threadIdx.x; p < row.packs; p += CROSSENTROPY_THREADS) {
        Floats z = widen(load_logits(row, p));
        store_logits(row, p,
                     narrow(logit_gradient(z, p * PACK_X - row.shift, target, max, scale / sum, scale)));
    }
}

static inline void crossentropy_forward_backward(float *losses, floatX *logits, const int *targets, int64_t N,
                                                 int V, float scale, cudaStream_t stream) {
    launch(crossentropy_kernel, dim3((unsigned)N), CROSSENTROPY_THREADS, 0, stream, losses, logits, targets,
           V, scale);
}

#undef LOG2_E

// ----------------------------------------------------------------------------

enum { LOSS_THREADS = 1024 };

// *sum += scale * total, each thread's losses in order, then the threads in a tree
static __global__ void __launch_bounds__(LOSS_THREADS)
    sum_losses_kernel(double *sum, const float *losses, int64_t N, double scale) {
    __shared__ double sums[LOSS_THREADS];
    int thread = (int)threadIdx.x;
    double total = 0.0;
    for (int64_t n = thread; n < N; n += LOSS_THREADS) {
        total += (double)losses[n];
    }
    sums[thread] = total;
    for (int step = LOSS_THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (thread < step) {
            sums[thread] += sums[thread + step];
        }
    }
    if (thread == 0) {
        *sum += scale * sums[0];
    }
}

static inline void sum_losses(double *sum, const float *losses, int64_t N, double scale,
                              cudaStream_t stream) {
    launch(sum_losses_kernel, 1, LOSS_THREADS, 0, stream, sum, losses, N, scale);
}

#endif
