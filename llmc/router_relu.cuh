/*
The ReLU router on the device (router_relu.h has the formulas).

    forward   mask bit = z_te > 0, or not finite; the gates are the logits themselves
    loss      scale / N sum_p f_e(p) gate_p over the pair list, products and sums in double, in a fixed order
    backward  dz_te = dR_te + weight f_e / N for the active pairs, 0 elsewhere: a group of lanes writes its
              token's zeros, then the pairs over them

The load f_e = E / (k N) n_e comes from counts [E], tokens of each expert in the global micro-batch of N
tokens; counts == NULL means f = 1 (no load balance). logits, dlogits [tokens, E].
*/
#ifndef ROUTER_RELU_CUH
#define ROUTER_RELU_CUH

#include "llmc/pairs.cuh"
#include "llmc/router_relu.h"

struct ActiveIfPositive {
    const float *logits;
    int E;
    __device__ bool operator()(int t, int e) const {
        float z = logits[(int64_t)t * E + e];
        return !(z <= 0.0f && z >= -FLT_MAX); // R = relu(z) (Eq. 4, 5); router_relu_is_active()
    }
};

static inline void router_relu_forward(uint32_t *mask, const float *logits, int N, int E,
                                       cudaStream_t stream) {
    ActiveIfPositive active = {logits, E};
    mask_where(mask, active, N, E, stream);
}

// f_e / N per token of expert e, to be multiplied by n_e = counts[e]; without counts f_e / N itself, f = 1
static inline double router_relu_load_per_token(const int *counts, int64_t N, int E, int k) {
    return (counts != NULL ? (double)E / ((double)k * (double)N) : 1.0) / (double)N; // (Eq. 11)
}

static __global__ void __launch_bounds__(SUM_THREADS)
    router_relu_loss_kernel(double *partial, DevicePairs pairs, const int *counts, int tokens) {
    double sum = 0.0;
    int64_t P = pairs.row_start[tokens], stride = (int64_t)gridDim.x * SUM_THREADS;
    for (int64_t p = blockIdx.x * SUM_THREADS + threadIdx.x; p < P; p += stride) {
        double load = counts != NULL ? (double)counts[pairs.expert[p]] : 1.0;
        sum += load * pairs.gate[p]; // (Eq. 9, 10)
    }
    sum = block_sum_double(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// *loss += scale * sum_e f_e mean_t R_te of this rank's tokens; partial [SUM_MOST_BLOCKS]
static inline void router_relu_loss(double *loss, DevicePairs pairs, const int *counts, int tokens, int64_t N,
                                    int E, int k, double scale, double *partial, cudaStream_t stream) {
    int blocks = sum_blocks((int64_t)tokens * E);
    launch(router_relu_loss_kernel, blocks, SUM_THREADS, 0, stream, partial, pairs, counts, tokens);
    add_partials(loss, partial, blocks, scale * router_relu_load_per_token(counts, N, E, k), stream);
}

static __global__ void __launch_bounds__(GROUP_BLOCK)
    router_relu_backward_kernel(floatX *dlogits, const float *dgate, DevicePairs pairs, const int *counts,
                                int tokens, int E, float share, int lanes) {
    int t = group_token(lanes), lane = group_lane(lanes);
    floatX *row = dlogits + (int64_t)t * E;
    for (int e = lane; e < E && t < tokens; e += lanes) {
        row[e] = to_x(0.0f);
    }
    __syncwarp(); // the zeros are in place before another lane writes a pair over one
    int end = t < tokens ? pairs.row_start[t + 1] : 0;
    for (int p = t < tokens ? pairs.row_start[t] + lane : 0; p < end; p += lanes) {
        int e = pairs.expert[p];
        row[e] = to_x(dgate[p] + share * (counts != NULL ? (float)counts[e] : 1.0f)); // gradient of (Eq. 6)
    }
}

// dlogits [tokens, E] overwritten from dgate [P]
static inline void router_relu_backward(floatX *dlogits, const float *dgate, DevicePairs pairs,
                                        const int *counts, int tokens, int64_t N, int E, int k, double weight,
                                        cudaStream_t stream) {
    int lanes = lanes_of(E);
    double share = weight * router_relu_load_per_token(counts, N, E, k);
    launch(router_relu_backward_kernel, group_blocks(tokens, lanes), GROUP_BLOCK, 0, stream, dlogits, dgate,
           pairs, counts, tokens, E, share, lanes);
}

#endif
