/*
Rotary position embedding (Su et al., 2021) on the device, rotate-half layout, in place.

    forward   (x_i, x_{i + hd/2}) <- (x_i cos - x_{i + hd/2} sin,  x_{i + hd/2} cos + x_i sin),  angle(t, i)
    backward  the same rotation by minus the angle

A position's heads are all turned by the same angles. So a thread takes one pack of columns of one position,
reads its cosines and sines once and walks over the heads: the table costs hd floats a position, not hd a
head. Both halves of a head are read and written in 16-byte packs where hd/2 is a multiple of a pack's
elements, and element by element elsewhere (hd = 24).

x [B, T, stride] floatX: the first `heads` blocks of hd columns are rotated, the values behind them stay.
table [T_max, hd] fp32, made by rope_table of rope.h. Positions are start .. start + T - 1. Equals
rope_forward, rope_backward of rope.h, rounded once. Errors: none.
*/
#ifndef ROPE_CUH
#define ROPE_CUH

#include "llmc/gpu/floats.cuh"
// defines: Floats, load_floats, widen, narrow

enum { ROPE_THREADS = 256 };

// numbers of columns i and i + hd/2; direction: 1 forward, -1 backward
__device__ __forceinline__ void rope_turn(float &low, float &high, float cosine, float sine,
                                          float direction) {
    float a = low, b = high;
    low = a * cosine - b * direction * sine;
    high = b * cosine + a * direction * sine;
}

// block (packs of half a head, positions)
static __global__ void __launch_bounds__(ROPE_THREADS)
    rope_packs_kernel(floatX *x, const float *table, int64_t N, int T, int start, int heads, int hd,
                      int stride, float direction) {
    int64_t n = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    int half = hd / 2;
    for (int i = (int)threadIdx.x * PACK_X; i < half && n < N; i += (int)blockDim.x * PACK_X) {
        const float *angles = table + (start + n % T) * hd + i;
        Floats cosine = load_floats(angles), sine = load_floats(angles + half);
        floatX *at = x + n * stride + i;
        for (int h = 0; h < heads; h++) {
            Floats low = widen(load_pack(at)), high = widen(load_pack(at + half));
            for (int j = 0; j < PACK_X; j++) {
                rope_turn(low.x[j], high.x[j], cosine.x[j], sine.x[j], direction);
            }
            store_pack(at, narrow(low));
            store_pack(at + half, narrow(high));
            at += hd;
        }
    }
}

// block (columns of half a head, positions)
static __global__ void __launch_bounds__(ROPE_THREADS)
    rope_columns_kernel(floatX *x, const float *table, int64_t N, int T, int start, int heads, int hd,
                        int stride, float direction) {
    int64_t n = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    int half = hd / 2;
    for (int i = (int)threadIdx.x; i < half && n < N; i += (int)blockDim.x) {
        const float *angles = table + (start + n % T) * hd + i;
        for (int h = 0; h < heads; h++) {
            floatX *at = x + n * stride + h * hd + i;
            float low = to_float(at[0]), high = to_float(at[half]);
            rope_turn(low, high, angles[0], angles[half], direction);
            at[0] = to_x(low);
            at[half] = to_x(high);
        }
    }
}

static inline void rope_rotate(floatX *x, const float *table, int B, int T, int start, int heads, int hd,
                               int stride, float direction, cudaStream_t stream) {
    int64_t N = (int64_t)B * T;
    bool packs = hd / 2 % PACK_X == 0 && stride % PACK_X == 0 && is_aligned16(x) && is_aligned16(table);
    int columns = std::min<int>(packs ? hd / 2 / PACK_X : hd / 2, ROPE_THREADS);
    int positions = ROPE_THREADS / columns;
    launch(packs ? rope_packs_kernel : rope_columns_kernel, dim3((unsigned)ceil_div<int64_t>(N, positions)),
           dim3((unsigned)columns, (unsigned)positions), 0, stream, x, table, N, T, start, heads, hd, stride,
           direction);
}

static inline void rope_forward(floatX *x, const float *table, int B, int T, int start, int heads, int hd,
                                int stride, cudaStream_t stream) {
    rope_rotate(x, table, B, T, start, heads, hd, stride, 1.0f, stream);
}

static inline void rope_backward(floatX *dx, const float *table, int B, int T, int start, int heads, int hd,
                                 int stride, cudaStream_t stream) {
    rope_rotate(dx, table, B, T, start, heads, hd, stride, -1.0f, stream);
}

#endif
