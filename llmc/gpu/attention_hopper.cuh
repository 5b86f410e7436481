/*
Attention's forward on Hopper (sm_90a), bf16, heads of 64 or 96; attention_forward of attention.cuh in
namespace hopper. (attention_backward_hopper.cuh has the backward, attention_tiles_hopper.cuh what both
share.) The mathematics is that of attention_portable.cuh, and P exists only as accumulators; here the
products are wgmma's and the copies TMA's.

How the kernels work. One thread of the producer has TMA bring the rows that the consumers own (forward:
queries), then, 64 at a time, the rows that these are multiplied with, into the ring. What a consumer owns is
the left operand and stays in registers as fragments.

A consumer keeps products in flight while it computes. Forward, tile i of the keys:

    start S_{i+1} = Q K_{i+1}^T | maxima of S_i | await O += P_{i-1} V_{i-1} | P_i = exp | start O += P_i V_i

There are as many blocks as multiprocessors. A block takes tiles of 128 rows in pairs, a long one from the end
of the sequence and the short one that complements it: all pairs are equal work, and the producer is at the
next tile while the consumers finish one. Tiles wholly in the future are not loaded; one that a single
consumer needs is skipped by the other. The mask is applied on the diagonal alone.

Deterministic; nothing is allocated; tensor maps are kernel arguments.
*/
#ifndef ATTENTION_HOPPER_CUH
#define ATTENTION_HOPPER_CUH

#include "llmc/gpu/attention_tiles_hopper.cuh"
// defines: AttentionMemory, AttentionWalk, AttentionOwn, load_tile, add_product, to_operand, store_rows

#ifdef HOPPER_KERNELS
namespace hopper {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ----------------------------------------------------------------------------
// producer (one thread)

// for queries, the keys up to the diagonal; OWN: forward or dq
template <int HD, int OWN>
__device__ __forceinline__ void produce(const AttentionArguments &args, AttentionMemory<HD, OWN> memory) {
    typedef AttentionMemory<HD, OWN> Memory;
    const CUtensorMap *maps[3] = {&args.qkv, &args.dout, &args.out};
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.H)) {
        barrier_wait(memory.own_empty(), memory.own_parity ^ 1);
        barrier_expect(memory.own_full(), Memory::OWN_BYTES);
        memory.own_parity ^= 1;
        for (int i = 0; i < 2 * OWN; i++) {
            int row = at.first + i % 2 * ATTENTION_ROWS;
            load_tile<HD>(memory.own(i / 2, i % 2), maps[i / 2], memory.own_full(), at.head * HD, row, at.b);
        }
        int column = (args.H + at.head / (args.H / args.KV)) * HD;
        for (int key = 0; key < min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T); key += ATTENTION_ROWS) {
            barrier_wait(memory.empty(), memory.ring.parity ^ 1);
            barrier_expect(memory.full(), Memory::STAGE_BYTES);
            load_tile<HD>(memory.tile(0), &args.qkv, memory.full(), column, key, at.b);
            load_tile<HD>(memory.tile(1), &args.qkv, memory.full(), column + args.KV * HD, key, at.b);
            memory.advance();
        }
    }
}

// ----------------------------------------------------------------------------
// consumers: forward

// the softmax so far of this lane's two rows: maximum (near it, in units of the exponent), this lane's share
// of the sum
struct AttentionSoftmax {
    float max[2], sum[2];

    // a tile's own maxima
    static __device__ __forceinline__ void tops(float (&top)[2], const float (&s)[32], float c) {
        top[0] = top[1] = -INFINITY;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
        }
        top[0] = quad_max(top[0]) * c;
        top[1] = quad_max(top[1]) * c;
    }
    // s becomes p; the sum and the output so far follow a new maximum, if p would exceed 2^8 without
    template <int HALF_HD>
    __device__ __forceinline__ void add(float (&s)[32], float (&o)[HALF_HD], const float (&top)[2], float c) {
        bool grows = top[0] > max[0] + 8.0f || top[1] > max[1] + 8.0f;
        if (__any_sync(0xffffffffu, grows)) {
            for (int half = 0; half < 2; half++) {
                float raised = top[half] > max[half] + 8.0f ? top[half] : max[half];
                float keep = power_of_2(max[half] - raised);
                max[half] = raised;
                sum[half] *= keep;
#pragma unroll
                for (int n = 0; n < HALF_HD / 4; n++) {
                    o[4 * n + 2 * half] *= keep;
                    o[4 * n + 2 * half + 1] *= keep;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 32; i++) {
            s[i] = power_of_2(s[i] * c - max[i / 2 % 2]);
            sum[i / 2 % 2] += s[i];
        }
    }
};

// lse, and the output divided by the sum
template <int HD>
__device__ __forceinline__ void store_output(float (&o)[HD / 2], const AttentionSoftmax &softmax,
                                             const AttentionArguments &args, AttentionTile128 at, int row) {
    int rows_out = args.T - args.start, stride = args.H * HD;
    for (int half = 0; half < 2; half++) {
        float total = quad_sum(softmax.sum[half]), inverse = 1.0f / total;
        int position = row + own_row() + 8 * half;
        if (threadIdx.x % 4 == 0 && position >= args.start && position < args.T) {
            args.lse_to[((int64_t)at.b * args.H + at.head) * rows_out + position - args.start] =
                (softmax.max[half] + log2f(total)) * LN_2;
        }
#pragma unroll
        for (int n = 0; n < HD / 8; n++) {
            o[4 * n + 2 * half] *= inverse;
            o[4 * n + 2 * half + 1] *= inverse;
        }
    }
    floatX *to = args.to + ((int64_t)at.b * rows_out + row - args.start) * stride + at.head * HD;
    store_rows<HD, false>(to, stride, o, 1.0f, args, row);
}

template <int HD>
__device__ __forceinline__ void consume(const AttentionArguments &args,
                                        AttentionMemory<HD, ATTENTION_FORWARD> memory, int consumer) {
    float c = args.c;
    AttentionWalk walk = {0};
    AttentionTile128 at;
    while (walk.next(at, args, args.H)) {
        int row = at.first + consumer * ATTENTION_ROWS;
        int tiles = ceil_div<int>(min(at.first + (int)ATTENTION_BLOCK_ROWS, args.T), ATTENTION_ROWS);
        int mine = row < args.T ? row / ATTENTION_ROWS + 1 : 0;
        AttentionSoftmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        AttentionOwn<HD, true> queries;
        float even[32], odd[32], o[HD / 2], top[2];
        uint32_t p[4][4];
        barrier_wait(memory.own_full(), memory.own_parity);
        memory.own_parity ^= 1;
        queries.begin(memory.own(0, consumer));
        release(memory.own_empty());
#pragma unroll
        for (int i = 0; i < HD / 2; i++) {
            o[i] = 0.0f;
        }
        uint32_t done = 0; // the stage before
        // of the tile whose scores are s; meanwhile the next tile's scores
        auto step = [&](float(&s)[32], float(&next)[32]) {
            uint32_t values = memory.tile(1), present = memory.empty();
            memory.advance();
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            queries.times(next, memory.tile(0));
            wgmma_commit();
            AttentionSoftmax::tops(top, s, c);
            wgmma_wait<1>(); // the output so far is there
            wgmma_results(o);
            if (done != 0) {
                release(done);
            }
            softmax.add(s, o, top, c);
            to_operand(p, s);
            wgmma_fence();
            add_product<HD>(o, p, values);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_results(next);
            done = present;
        };
        if (mine > 0) {
            barrier_wait(memory.full(), memory.ring.parity);
            wgmma_fence();
            queries.times(even, memory.tile(0));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(even);
#pragma unroll 1
            for (int i = 2; i < mine; i += 2) {
                step(even, odd);
                step(odd, even);
                wgmma_wait<0>(); // the compiler follows no product around the loop
                wgmma_results(o);
            }
            if (mine % 2 == 0) {
                step(even, odd);
                wgmma_wait<0>();
                wgmma_results(o);
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    even[i] = odd[i];
                }
            }
            mask_diagonal<false>(even);
            AttentionSoftmax::tops(top, even, c);
            wgmma_wait<0>();
            wgmma_results(o);
            if (done != 0) {
                release(done);
            }
            softmax.add(even, o, top, c);
            to_operand(p, even);
            wgmma_fence();
            add_product<HD>(o, p, memory.tile(1));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_results(o);
            release(memory.empty());
            memory.advance();
        }
        for (int i = mine; i < tiles; i++) {
            skip_stage(memory);
        }
        store_output<HD>(o, softmax, args, at, row);
    }
}

#endif

// ----------------------------------------------------------------------------
// launches

// OWN says which of the kernels; produce and consume have one version for each kind of memory
template <int HD, int OWN>
static __global__ void __launch_bounds__(ATTENTION_BLOCK_THREADS, 1)
    attention_kernel(const __grid_constant__ AttentionArguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    AttentionMemory<HD, OWN> memory;
    int group = begin_block(memory);
    if (group == 0) {
        give_registers<ATTENTION_PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            produce(args, memory);
        }
    } else {
        take_registers<ATTENTION_CONSUMER_REGISTERS>();
        consume(args, memory, group - 1);
    }
#else
    (void)args;
    __trap(); // a build without sm_90a has no such kernel
#endif
}

// the head sizes that these kernels are made for
static inline bool attention_takes(int hd) {
    return hd == 64 || hd == 96;
}

static inline AttentionArguments attention_arguments(floatX *to, const floatX *qkv, int B, int T, int start,
                                                     int H, int KV, int hd) {
    AttentionArguments args;
    memset(&args, 0, sizeof(args));
    args.qkv = tensor_map(qkv, (H + 2 * KV) * hd, T, B, ATTENTION_ROWS);
    args.to = to;
    args.B = B;
    args.T = T;
    args.start = start;
    args.H = H;
    args.KV = KV;
    args.scale = 1.0f / sqrtf((float)hd);
    args.c = args.scale * LOG2_E;
    return args;
}

template <int HD, int OWN> static void start_attention(AttentionArguments args, cudaStream_t stream) {
    void (*kernel)(AttentionArguments) = attention_kernel<HD, OWN>;
    int tiles = ceil_div<int>(args.T, ATTENTION_BLOCK_ROWS) - args.start / ATTENTION_BLOCK_ROWS;
    int items = args.B * (OWN == ATTENTION_DKV ? args.KV : args.H) * ((tiles + 1) / 2);
    launch(kernel, min(num_sms(), items), ATTENTION_BLOCK_THREADS, AttentionMemory<HD, OWN>::BYTES, stream,
           args);
}

static inline void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, cudaStream_t stream) {
    AttentionArguments args = attention_arguments(out, qkv, B, T, start, H, KV, hd);
    args.lse_to = lse;
    if (hd == 64) {
        start_attention<64, ATTENTION_FORWARD>(args, stream);
    } else {
        start_attention<96, ATTENTION_FORWARD>(args, stream);
    }
}

} // namespace hopper

#endif
#endif
