/*
Causal self-attention with grouped queries on tensor cores (attention.h has the formulas).

    attention_forward        out, lse from qkv, whose queries and keys RoPE has rotated
    attention_rope_backward  dqkv of the unrotated qkv: equals attention_backward, then rope_backward, dq and
                             dk rounded once (but for odd head sizes: attention_backward_portable.cuh)

Two implementations stand behind these names, each with a file for the tiles, the forward and the backward:
gpu/attention_{tiles,,backward}_portable.cuh (mma.sync, sm_80 and later, and fp32), and
gpu/attention_{tiles,,backward}_hopper.cuh (wgmma and TMA, sm_90a, bf16, heads of 64 and 96).
`kernels` chooses; what the second does not have the first does. Each is deterministic, and the rows of a
forward from start on have the same bits as those of the whole.

qkv [B, T, (H + 2 KV) hd], out [B, T - start, H hd], lse [B, H, T - start] (natural logarithm, fp32),
rope_table [T, hd] of rope.h. Errors: a head size that is no multiple of 8 or above 128 is refused.
*/
#ifndef ATTENTION_CUH
#define ATTENTION_CUH

#include "llmc/gpu/attention_backward_hopper.cuh"
#include "llmc/gpu/attention_backward_portable.cuh"
#include "llmc/gpu/attention_hopper.cuh"
#include "llmc/gpu/attention_portable.cuh"

static inline size_t attention_scratch_floats(int B, int T, int H) {
    return portable::attention_scratch_floats(B, T, H);
}

// positions start .. T-1 against all keys up to T
static inline void attention_forward(floatX *out, float *lse, const floatX *qkv, int B, int T, int start,
                                     int H, int KV, int hd, Kernels kernels, cudaStream_t stream) {
    auto forward = portable::attention_forward;
#ifdef HOPPER_KERNELS
    if (kernels == KERNELS_HOPPER && hopper::attention_takes(hd)) {
        forward = hopper::attention_forward;
    }
#endif
    (void)kernels;
    forward(out, lse, qkv, B, T, start, H, KV, hd, stream);
}

// dqkv is overwritten; scratch: attention_scratch_floats
static inline void attention_rope_backward(floatX *dqkv, const floatX *dout, const floatX *out,
                                           const floatX *qkv, const float *lse, float *scratch,
                                           const float *rope_table, int B, int T, int H, int KV, int hd,
                                           Kernels kernels, cudaStream_t stream) {
    auto backward = portable::attention_rope_backward;
#ifdef HOPPER_KERNELS
    if (kernels == KERNELS_HOPPER && hopper::attention_takes(hd)) {
        backward = hopper::attention_rope_backward;
    }
#endif
    (void)kernels;
    backward(dqkv, dout, out, qkv, lse, scratch, rope_table, B, T, H, KV, hd, stream);
}

#endif
