/*
The Hopper attention kernels against the portable ones and against attention.h, and both kinds timed.

    attention check   out, lse, dq, dk, dv by relative error on odd and regular shapes, outputs poisoned
                      before; a second run must give the same bits
    attention time    the shapes of the paper's models: errors between the two kinds, ms and TFLOP/s of both

Timing: CUDA events, medians, both kinds in turns on the same N(0, 1) data. FLOPs are nominal and causal:
forward 4 B H (T T / 2) hd, backward 2.5 times that. The backward has RoPE's in it.

    make build/ladder_attention
*/
#include "ladder.cuh"
#include "llmc/attention.cuh"
#include "llmc/attention.h"
#include "llmc/rope.h"
#include <functional>
// defines: random_new, poisoned_new, milliseconds, median, failures; attention_*; std::function

struct Case {
    int B, T, H, KV, hd;
};

// ----------------------------------------------------------------------------
// attention with all its buffers

struct Attention {
    Case c;
    int width;
    int64_t n_qkv, n_out, n_lse;
    floatX *qkv, *dout;
    float *table, *scratch;
    std::vector<float> host_table;
    struct Results {
        floatX *out, *dqkv;
        float *lse;
    } results[2]; // of each kind
};

static Attention attention_new(Case c) {
    Attention a;
    a.c = c;
    a.width = (c.H + 2 * c.KV) * c.hd;
    a.n_qkv = (int64_t)c.B * c.T * a.width;
    a.n_out = (int64_t)c.B * c.T * c.H * c.hd;
    a.n_lse = (int64_t)c.B * c.H * c.T;
    a.qkv = random_new<floatX>(a.n_qkv, 1, 1.0f);
    a.dout = random_new<floatX>(a.n_out, 2, 1.0f);
    a.scratch = poisoned_new<float>((int64_t)attention_scratch_floats(c.B, c.T, c.H));
    a.host_table.resize((size_t)c.T * c.hd);
    rope_table(a.host_table.data(), c.T, c.hd, 1e6);
    a.table = poisoned_new<float>((int64_t)a.host_table.size());
    CUDA_CHECK(cudaMemcpy(a.table, a.host_table.data(), a.host_table.size() * sizeof(float),
                          cudaMemcpyHostToDevice));
    for (Attention::Results &r : a.results) {
        r = {poisoned_new<floatX>(a.n_out), poisoned_new<floatX>(a.n_qkv), poisoned_new<float>(a.n_lse)};
    }
    return a;
}

static void attention_free(Attention &a) {
    for (const void *p : {(void *)a.qkv, (void *)a.dout, (void *)a.table, (void *)a.scratch}) {
        CUDA_CHECK(cudaFree((void *)p));
    }
    for (Attention::Results &r : a.results) {
        CUDA_CHECK(cudaFree(r.out));
        CUDA_CHECK(cudaFree(r.dqkv));
        CUDA_CHECK(cudaFree(r.lse));
    }
}

static void forward(const Attention &a, Kernels kernels) {
    const Case &c = a.c;
    const Attention::Results &r = a.results[kernels];
    attention_forward(r.out, r.lse, a.qkv, c.B, c.T, 0, c.H, c.KV, c.hd, kernels, 0);
}

// of the portable forward's results
static void backward(const Attention &a, Kernels kernels) {
    const Case &c = a.c;
    const Attention::Results &r = a.results[KERNELS_PORTABLE];
    attention_rope_backward(a.results[kernels].dqkv, a.dout, r.out, a.qkv, r.lse, a.scratch, a.table, c.B,
                            c.T, c.H, c.KV, c.hd, kernels, 0);
}

// ----------------------------------------------------------------------------
// comparing

template <class T> static std::vector<float> fetch(const T *device, int64_t n) {
    std::vector<T> raw((size_t)n);
    std::vector<float> host((size_t)n);
    CUDA_CHECK(cudaMemcpy(raw.data(), device, (size_t)n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < raw.size(); i++) {
        host[i] = to_float(raw[i]);
    }
    return host;
}

// relative error of columns from .. from + columns - 1 of rows of `width`; NaN counts as wrong
static void judge(const char *name, const std::vector<float> &got, const std::vector<float> &want, int width,
                  int from, int columns, double limit) {
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < got.size(); i++) {
        int column = (int)(i % (size_t)width);
        if (column >= from && column < from + columns) {
            error += pow((double)got[i] - want[i], 2);
            norm += pow(want[i], 2);
        }
    }
    double relative = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
    bool good = relative <= limit;
    failures += !good;
    printf("  %s %.1e%s", name, relative, good ? "" : " FAILED");
}

static void judge_parts(const Attention &a, const std::vector<float> &got, const std::vector<float> &want) {
    int queries = a.c.H * a.c.hd, keys = a.c.KV * a.c.hd;
    judge("dq", got, want, a.width, 0, queries, a.c.T == 1 ? 0.0 : 6e-3);
    judge("dk", got, want, a.width, queries, keys, a.c.T == 1 ? 0.0 : 6e-3);
    judge("dv", got, want, a.width, queries + keys, keys, 5e-3);
}

static void judge_same(const char *name, const void *device, const std::vector<char> &before) {
    std::vector<char> now(before.size());
    CUDA_CHECK(cudaMemcpy(now.data(), device, now.size(), cudaMemcpyDeviceToHost));
    if (memcmp(now.data(), before.data(), now.size()) != 0) {
        printf("  %s NOT REPEATED", name);
        failures++;
    }
}

static std::vector<char> bytes_of(const void *device, int64_t bytes) {
    std::vector<char> host((size_t)bytes);
    CUDA_CHECK(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost));
    return host;
}

// the C reference on the same rounded inputs, beside the Hopper results
static void judge_reference(const Attention &a) {
    const Case &c = a.c;
    std::vector<float> qkv = fetch(a.qkv, a.n_qkv), dout = fetch(a.dout, a.n_out), out(a.n_out), lse(a.n_lse),
                       dqkv(a.n_qkv);
    const Attention::Results &r = a.results[KERNELS_HOPPER];
    attention_forward(out.data(), lse.data(), qkv.data(), c.B, c.T, 0, c.H, c.KV, c.hd);
    attention_backward(dqkv.data(), dout.data(), qkv.data(), lse.data(), c.B, c.T, c.H, c.KV, c.hd);
    rope_backward(dqkv.data(), a.host_table.data(), c.B, c.T, 0, c.H + c.KV, c.hd, a.width);
    printf("  | reference:");
    judge("out", fetch(r.out, a.n_out), out, 1, 0, 1, 4e-3);
    judge("lse", fetch(r.lse, a.n_lse), lse, 1, 0, 1, 1e-5);
    judge_parts(a, fetch(r.dqkv, a.n_qkv), dqkv);
}

static void check(const Case &c, bool reference) {
    Attention a = attention_new(c);
    const Attention::Results &hopper = a.results[KERNELS_HOPPER], &portable = a.results[KERNELS_PORTABLE];
    printf("B %d T %4d H %d KV %d hd %d:", c.B, c.T, c.H, c.KV, c.hd);
    for (Kernels kernels : {KERNELS_PORTABLE, KERNELS_HOPPER}) {
        forward(a, kernels);
        backward(a, kernels);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    judge("out", fetch(hopper.out, a.n_out), fetch(portable.out, a.n_out), 1, 0, 1, 4e-3);
    judge("lse", fetch(hopper.lse, a.n_lse), fetch(portable.lse, a.n_lse), 1, 0, 1, 1e-5);
    judge_parts(a, fetch(hopper.dqkv, a.n_qkv), fetch(portable.dqkv, a.n_qkv));
    if (reference) {
        judge_reference(a);
    }
    std::vector<char> out = bytes_of(hopper.out, a.n_out * 2), dqkv = bytes_of(hopper.dqkv, a.n_qkv * 2);
    CUDA_CHECK(cudaMemset(hopper.out, 0xff, out.size()));
    CUDA_CHECK(cudaMemset(hopper.dqkv, 0xff, dqkv.size()));
    forward(a, KERNELS_HOPPER);
    backward(a, KERNELS_HOPPER);
    judge_same("out", hopper.out, out);
    judge_same("dqkv", hopper.dqkv, dqkv);
    printf("\n");
    fflush(stdout);
    attention_free(a);
}

static void check_all(void) {
    const int lengths[] = {1, 17, 64, 100, 200, 1024};
    const int heads[][2] = {{1, 1}, {3, 1}, {8, 2}};
    for (int hd = 64; hd <= 96; hd += 32) {
        for (int T : lengths) {
            for (const int *h : heads) {
                check({T < 1024 ? 3 : 1, T, h[0], h[1], hd}, T < 1024 || h[0] == 3);
            }
        }
        check({40, 300, 12, 4, hd}, false); // more tiles than multiprocessors
    }
}

// ----------------------------------------------------------------------------
// times

enum { ROUNDS = 3, TURNS = 8 }; // in a round a kind's calls follow each other

static void time_both(const char *name, const std::function<void(Kernels)> &f, double flops) {
    std::vector<float> times[2];
    for (int round = 0; round < ROUNDS; round++) {
        for (Kernels kernels : {KERNELS_PORTABLE, KERNELS_HOPPER}) {
            for (int turn = -2; turn < TURNS; turn++) {
                float ms = milliseconds([&] { f(kernels); });
                if (turn >= 0) {
                    times[kernels].push_back(ms);
                }
            }
        }
    }
    float ms[2] = {median(times[0]), median(times[1])};
    printf("  %-24s portable %.3f ms %3.0f TFLOP/s, Hopper %.3f ms %3.0f TFLOP/s\n", name, ms[0],
           flops / ms[0] * 1e-9, ms[1], flops / ms[1] * 1e-9);
    fflush(stdout);
}

static void time_all(void) {
    const Case cases[] = {{64, 1024, 12, 4, 64}, {32, 1024, 16, 4, 64}, {32, 1024, 16, 4, 96}};
    for (const Case &c : cases) {
        check(c, false);
        Attention a = attention_new(c);
        double flops = 4.0 * c.B * c.H * c.T * c.T / 2.0 * c.hd;
        time_both(
            "forward", [&](Kernels kernels) { forward(a, kernels); }, flops);
        time_both(
            "backward", [&](Kernels kernels) { backward(a, kernels); }, 2.5 * flops);
        attention_free(a);
    }
}

int main(int argc, char **argv) {
    if (argc != 2 || (strcmp(argv[1], "check") != 0 && strcmp(argv[1], "time") != 0)) {
        die_usage("attention check | time");
    }
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) {
        die("this device is no Hopper GPU (compute capability 9.0)");
    }
    if (strcmp(argv[1], "check") == 0) {
        check_all();
    } else {
        time_all();
    }
    return failures_shown();
}
