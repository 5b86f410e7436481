/*
One token at a time: what the kernels of a single row share, and the products of a layer.

A text's next token needs every active weight once and almost no arithmetic, so a token costs the time in
which memory delivers them, if enough loads are under way. Tiles of 64 rows would be 1/64 full. Here a warp
takes one to four rows of a matrix, its lanes 16-byte packs of them, and each lane's packs are all loaded
before the first is used. What lies between two products is done by whoever needs it, so a layer is six
kernels:

    decode_qkv        RMSNorm, W_qkv, RoPE, into the cache's row      (every block finds the norm's r itself)
    decode_attention  the cache in pieces, combined in order            decode_attention.cuh
    decode_output     mid = x + W_o att
    decode_router     RMSNorm, router, choice                           decode_router.cuh
    decode_up         h = gate silu(G) U of the chosen experts, whose list is on the device
    decode_down       x = mid + sum_e W_down,e h_e
    decode_head       once per token: RMSNorm, logits in fp32

Each equals the functions that the training forward calls, in the same precision where values are stored:
normed, h and the residual stream are rounded to floatX. Sums have another order, so the last bits differ. No
order depends on timing: the same context gives the same bits.

Kernels begin early. On Hopper a kernel of this chain is launched while the one before still runs; it loads
its first weights, which no kernel changes, and then waits (previous_done) for the one before to be over.
Launching and the first loads' latency, most of such a kernel's time, are hidden so.

K columns of a matrix, a multiple of 8. Errors: none.
*/
#ifndef DECODE_CUH
#define DECODE_CUH

#include "llmc/gpu/mma.cuh"
#include "llmc/pairs.cuh"
#include "llmc/rmsnorm.cuh"
#include "llmc/rope.cuh"
// defines: lane_id; DevicePairs; rmsnorm_rstd, rmsnorm_scaled, sum_of_products, load_packs; rope_turn

enum {
    DECODE_THREADS = 256, // of a block
    DECODE_WARPS = DECODE_THREADS / 32,
    DECODE_DEPTH = 4,                  // packs of each row that a lane loads at once
    DECODE_STEP = 32 * PACK_X,         // columns that a warp takes with one pack per lane
    DECODE_HEAD_ROWS = 4,              // of a warp of the head
    DECODE_DOWN_WARPS = 4,             // that share a row of W_down
    DECODE_ROUTER_ROWS = DECODE_WARPS, // experts of a block
};

// ----------------------------------------------------------------------------
// a chain of kernels

// the kernel that was launched before this one is over, and what it wrote can be read
__device__ __forceinline__ void previous_done(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// the next kernel may be launched as soon as all of this one's blocks have begun
__device__ __forceinline__ void next_may_begin(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifdef EMULATED
template <class... P, class... A>
static void launch_chained(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, A... args) {
    launch(kernel, grid, block, 0, stream, args...);
}
#else
// a Hopper device or later, and code for it: kernels of older code do not wait
template <class... P> static bool waits_for_previous(void (*kernel)(P...)) {
    cudaFuncAttributes code;
    CUDA_CHECK(cudaFuncGetAttributes(&code, (const void *)kernel));
    return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && code.binaryVersion >= 90 &&
           code.ptxVersion >= 90;
}

template <class... P>
static void launch_chained_exact(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream,
                                 P... args) {
    void *pointers[] = {(void *)&args..., NULL};
    cudaLaunchAttribute early;
    cudaLaunchConfig_t config;
    memset(&early, 0, sizeof(early));
    memset((void *)&config, 0, sizeof(config));
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = waits_for_previous(kernel);
    CUDA_CHECK(cudaLaunchKernelExC(&config, (const void *)kernel, pointers));
}

// a kernel that calls previous_done() before it reads or writes what other kernels of the chain do
template <class... P, class... A>
static void launch_chained(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, A... args) {
    launch_chained_exact<P...>(kernel, grid, block, stream, static_cast<P>(args)...);
}
#endif

// Is this the last of `blocks` blocks to come here? Then it sees what the others wrote before (by
// load_written), and *ticket, which begins as 0, is 0 again
__device__ __forceinline__ bool is_last_block(int *ticket, int blocks) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1) == blocks - 1;
        if (last) {
            *ticket = 0;
        }
    }
    __syncthreads();
    if (last) {
        __threadfence();
    }
    return last;
}

// what another block has written: not from this multiprocessor's own cache
__device__ __forceinline__ float load_written(const float *from) {
#ifdef EMULATED
    return *from;
#else
    return __ldcg(from);
#endif
}

// ----------------------------------------------------------------------------
// a warp's rows of a matrix times a vector

// what the rows are multiplied with: columns c .. c + PACK_X - 1
struct PlainRow {
    const floatX *x;
    __device__ __forceinline__ Floats operator()(int c) const {
        return widen(load_bits(x + c));
    }
};

// RMSNorm of x, rounded as rmsnorm_forward rounds it
struct NormedRow {
    const floatX *x;
    const float *w;
    float r;
    __device__ __forceinline__ Floats operator()(int c) const {
        return widen(rmsnorm_scaled(load_bits(x + c), load_constant_floats(w + c), r));
    }
};

// by a block
__device__ __forceinline__ NormedRow normed_row(const floatX *x, const float *w, int d, float eps) {
    float sum = 0.0f;
    for (int c = (int)threadIdx.x * PACK_X; c < d; c += (int)blockDim.x * PACK_X) {
        Floats some = widen(load_bits(x + c));
        sum += sum_of_products(some, some);
    }
    NormedRow row = {x, w, rmsnorm_rstd(block_sum(sum), d, eps)};
    return row;
}

template <int ROWS> struct WarpRows {
    const floatX *row[ROWS];
    int K;
    Bits held[ROWS][DECODE_DEPTH];

    __device__ __forceinline__ int lane_column(void) const {
        return lane_id() * PACK_X;
    }
    // the packs of columns `first` and on are on their way
    __device__ __forceinline__ void load(int first) {
        for (int r = 0; r < ROWS; r++) {
            load_packs(held[r], row[r], first + lane_column(), DECODE_STEP, K);
        }
    }
    // after load(0); in all lanes
    template <class Row> __device__ __forceinline__ void multiply(float (&sum)[ROWS], const Row &x) {
        for (int r = 0; r < ROWS; r++) {
            sum[r] = 0.0f;
        }
        for (int first = 0; first < K; first += DECODE_DEPTH * DECODE_STEP) {
            if (first > 0) {
                load(first);
            }
#pragma unroll
            for (int i = 0; i < DECODE_DEPTH; i++) {
                int c = first + i * DECODE_STEP + lane_column();
                if (c < K) {
                    Floats column = x(c);
                    for (int r = 0; r < ROWS; r++) {
                        sum[r] += sum_of_products(widen(held[r][i]), column);
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; r++) {
            sum[r] = warp_sum(sum[r]);
        }
    }
};

__device__ __forceinline__ int decode_warp(void) {
    return (int)(blockIdx.x * DECODE_WARPS + threadIdx.x / 32);
}

static inline unsigned decode_blocks(int64_t warps) {
    return (unsigned)ceil_div<int64_t>(warps, DECODE_WARPS);
}

// ----------------------------------------------------------------------------
// attention's products

// A warp per pair of columns i, i + hd/2 of a head, which RoPE turns (not the values'). cache: the layer's
// rows, of which *position's is written
static __global__ void __launch_bounds__(DECODE_THREADS)
    decode_qkv_kernel(floatX *cache, const int *position, const floatX *x, const float *norm,
                      const floatX *w_qkv, const float *rope, int d, int heads, int turned, int hd,
                      float eps) {
    int half = hd / 2, pair = min(decode_warp(), heads * half - 1), head = pair / half, i = pair % half;
    const floatX *row = w_qkv + ((int64_t)head * hd + i) * d;
    WarpRows<2> rows = {{row, row + (int64_t)half * d}, d, {}};
    float sum[2];
    next_may_begin();
    rows.load(0);
    previous_done();
    rows.multiply(sum, normed_row(x, norm, d, eps));
    if (lane_id() == 0) {
        const float *angles = rope + (int64_t)*position * hd + i;
        floatX *at = cache + (int64_t)*position * heads * hd + head * hd + i;
        if (head < turned) {
            rope_turn(sum[0], sum[1], angles[0], angles[half], 1.0f);
        }
        at[0] = to_x(sum[0]);
        at[half] = to_x(sum[1]);
    }
}

// heads: H + 2 KV, of which the first `turned` are rotated
static inline void decode_qkv(floatX *cache, const int *position, const floatX *x, const float *norm,
                              const floatX *w_qkv, const float *rope, int d, int heads, int turned, int hd,
                              float eps, cudaStream_t stream) {
    launch_chained(decode_qkv_kernel, decode_blocks((int64_t)heads * hd / 2), DECODE_THREADS, stream, cache,
                   position, x, norm, w_qkv, rope, d, heads, turned, hd, eps);
}

static __global__ void __launch_bounds__(DECODE_THREADS)
    decode_output_kernel(floatX *mid, const floatX *x, const floatX *att, const floatX *w_o, int d) {
    int row = min(decode_warp(), d - 1);
    WarpRows<1> rows = {{w_o + (int64_t)row * d}, d, {}};
    PlainRow operand = {att};
    float sum[1];
    next_may_begin();
    rows.load(0);
    previous_done();
    rows.multiply(sum, operand);
    if (lane_id() == 0) {
        mid[row] = to_x(to_float(x[row]) + sum[0]);
    }
}

// mid [d] = x + att W_o^T
static inline void decode_output(floatX *mid, const floatX *x, const floatX *att, const floatX *w_o, int d,
                                 cudaStream_t stream) {
    launch_chained(decode_output_kernel, decode_blocks(d), DECODE_THREADS, stream, mid, x, att, w_o, d);
}

// ----------------------------------------------------------------------------
// experts: those of the list of one token, row_start[1] of them

// warps walk over the (active expert, column of h) pairs
static __global__ void __launch_bounds__(DECODE_THREADS)
    decode_up_kernel(floatX *h, const floatX *normed, DevicePairs pairs, const floatX *gate_up, int d,
                     int F) {
    next_may_begin();
    previous_done();
    int items = pairs.row_start[1] * F;
    PlainRow operand = {normed};
    for (int item = decode_warp(); item < items; item += (int)gridDim.x * DECODE_WARPS) {
        int f = item % F, p = item / F;
        const floatX *row = gate_up + ((int64_t)pairs.expert[p] * 2 * F + f) * d;
        WarpRows<2> rows = {{row, row + (int64_t)F * d}, d, {}};
        float sum[2];
        rows.load(0);
        rows.multiply(sum, operand);
        if (lane_id() == 0) {
            float g = to_float(to_x(sum[0])), u = to_float(to_x(sum[1]));
            h[item] = to_x(pairs.gate[p] * g * sigmoid(g) * u);
        }
    }
}

// h [active, F]; gate_up [E, 2F, d]; k: experts that a token has on average: twice as many find a warp each
static inline void decode_up(floatX *h, const floatX *normed, DevicePairs pairs, const floatX *gate_up, int E,
                             int k, int d, int F, cudaStream_t stream) {
    int64_t usual = std::min<int64_t>(2 * (int64_t)k, E) * F;
    launch_chained(decode_up_kernel, decode_blocks(usual), DECODE_THREADS, stream, h, normed, pairs, gate_up,
                   d, F);
}

// A row of all active experts' W_down is one long row: DECODE_DOWN_WARPS warps take its packs in turns
static __global__ void __launch_bounds__(DECODE_THREADS)
    decode_down_kernel(floatX *x, const floatX *mid, const floatX *h, DevicePairs pairs, const floatX *down,
                       int d, int F) {
    const int LANES = 32 * DECODE_DOWN_WARPS, ROWS = DECODE_THREADS / LANES;
    __shared__ float partial[DECODE_WARPS];
    int row = (int)blockIdx.x * ROWS + (int)threadIdx.x / LANES, lane = (int)threadIdx.x % LANES;
    next_may_begin();
    previous_done();
    int width = F / PACK_X, packs = row < d ? pairs.row_start[1] * width : 0;
    float sum = 0.0f;
    for (int first = lane; first < packs; first += DECODE_DEPTH * LANES) {
        Bits weights[DECODE_DEPTH];
#pragma unroll
        for (int i = 0; i < DECODE_DEPTH; i++) {
            int j = first + i * LANES;
            const floatX *from = down + row * (int64_t)F + j % width * PACK_X;
            weights[i] = j < packs ? load_bits(from + (int64_t)pairs.expert[j / width] * d * F) : Bits{};
        }
#pragma unroll
        for (int i = 0; i < DECODE_DEPTH; i++) {
            int j = first + i * LANES;
            sum += j < packs ? sum_of_products(widen(weights[i]), widen(load_bits(h + (int64_t)j * PACK_X)))
                             : 0.0f;
        }
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) {
        partial[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (lane == 0 && row < d) {
        float total = to_float(mid[row]);
        for (int i = 0; i < DECODE_DOWN_WARPS; i++) {
            total += partial[threadIdx.x / 32 + i];
        }
        x[row] = to_x(total);
    }
}

// x [d] = mid + sum over the active experts of h_e W_down,e^T; down [E, d, F]
static inline void decode_down(floatX *x, const floatX *mid, const floatX *h, DevicePairs pairs,
                               const floatX *down, int d, int F, cudaStream_t stream) {
    launch_chained(decode_down_kernel, decode_blocks((int64_t)d * DECODE_DOWN_WARPS), DECODE_THREADS, stream,
                   x, mid, h, pairs, down, d, F);
}

// ----------------------------------------------------------------------------
// the head

// warps walk over groups of rows; *allowed rows have a token
static __global__ void __launch_bounds__(DECODE_THREADS, 2)
    decode_head_kernel(float *logits, const floatX *x, const float *norm, const floatX *head,
                       const int *allowed, int d, float eps) {
    const int ROWS = DECODE_HEAD_ROWS;
    next_may_begin();
    previous_done();
    NormedRow operand = normed_row(x, norm, d, eps);
    int V = *allowed;
    for (int v = decode_warp() * ROWS; v < V; v += (int)gridDim.x * DECODE_WARPS * ROWS) {
        WarpRows<ROWS> rows;
        float sum[ROWS];
        rows.K = d;
        for (int r = 0; r < ROWS; r++) {
            rows.row[r] = head + (int64_t)min(v + r, V - 1) * d;
        }
        rows.load(0);
        rows.multiply(sum, operand);
        for (int r = 0; r < ROWS; r++) {
            if (lane_id() == r && v + r < V) {
                logits[v + r] = sum[r];
            }
        }
    }
}

// logits [*allowed] of RMSNorm(x)
static inline void decode_head(float *logits, const floatX *x, const float *norm, const floatX *head,
                               const int *allowed, int V, int d, float eps, cudaStream_t stream) {
    unsigned blocks = std::min(decode_blocks(ceil_div<int>(V, DECODE_HEAD_ROWS)), 2 * (unsigned)num_sms());
    launch_chained(decode_head_kernel, blocks, DECODE_THREADS, stream, logits, x, norm, head, allowed, d,
                   eps);
}

#endif
