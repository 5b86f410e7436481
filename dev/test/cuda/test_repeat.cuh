/*
A micro-step a thousand times: all kernels of the model, in a shape that fills the card, give the same bits.
What racecheck cannot follow (wgmma, TMA) shows here if a result ever depends on who comes first.

The first run's gradients, losses and sums are kept. Each later run is compared with them on the device, bit
for bit, tensor by tensor; the host only queues, and reads the counts of what differed at the end. The dense
start, half of the experts on, takes several chunks a layer: some keep their H, the others compute it again.
*/
#ifndef TEST_REPEAT_CUH
#define TEST_REPEAT_CUH

#include "test_model.cuh"
// defines: ModelCase, Examination; the whole trainer

enum { COMPARE_BLOCKS = 1024, COMPARE_THREADS = 256, MOST_WATCHED = 64 };

typedef struct {
    const char *name;
    const void *now; // what each run leaves
    void *kept;      // of the first
    int64_t words;   // of 32 bits
} Watched;

// *count += words that differ
static __global__ void __launch_bounds__(COMPARE_THREADS)
    count_different_kernel(unsigned long long *count, const uint32_t *a, const uint32_t *b, int64_t n) {
    unsigned long long found = 0;
    int64_t stride = (int64_t)gridDim.x * COMPARE_THREADS;
    for (int64_t i = (int64_t)blockIdx.x * COMPARE_THREADS + threadIdx.x; i < n; i += stride) {
        found += a[i] != b[i];
    }
    if (found > 0) {
        atomicAdd(count, found);
    }
}

// weights as large as the paper's first ones, but drawn quickly
static void set_quick_weights(Model *m) {
    float *params = copy_of(m, BUFFER_PARAMS);
    for (int i = 0; i < m->params.table.count; i++) {
        const Tensor *tensor = &m->params.table.tensors[i];
        if (tensor->decay) {
            fill_uniform(params + tensor->offset, (size_t)tensor->size, (unsigned)i, 0.035f);
        }
        for (int64_t j = 0; j < tensor->size && !tensor->decay; j++) {
            params[tensor->offset + j] = 1.0f;
        }
    }
    set_device_weights(m, params);
    free(params);
}

static void watch(Watched *watched, int *count, const char *name, const void *now, int64_t bytes) {
    Watched w = {name, now, NULL, bytes / 4};
    CHECK(*count < MOST_WATCHED && bytes % 4 == 0);
    CUDA_CHECK(cudaMalloc(&w.kept, (size_t)bytes));
    watched[(*count)++] = w;
}

// different [repeats, count]: what the host finds there once all is done
static void repeat_micro_steps(Model *m, int B, int T, int repeats, const Watched *watched, int count,
                               unsigned long long *different) {
    for (int i = 0; i < repeats; i++) {
        begin_step(m);
        micro_step(m, &m->step.batches[0], B, T, 1, 0.03, 1, NULL, NULL);
        end_step(m, 0);
        for (int k = 0; k < count; k++) {
            const Watched *w = &watched[k];
            if (i == 0) {
                CUDA_CHECK(cudaMemcpyAsync(w->kept, w->now, (size_t)w->words * 4, cudaMemcpyDeviceToDevice,
                                           m->stream));
            } else {
                launch(count_different_kernel, COMPARE_BLOCKS, COMPARE_THREADS, 0, m->stream,
                       different + (int64_t)i * count + k, (const uint32_t *)w->now,
                       (const uint32_t *)w->kept, w->words);
            }
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

// of `different`: how many repeats differ; the first is shown
static int count_different_repeats(const unsigned long long *different, int repeats, const Watched *watched,
                                   int count) {
    int found = 0;
    for (int i = 0; i < repeats; i++) {
        int here = 0;
        for (int k = 0; k < count; k++) {
            unsigned long long words = different[(int64_t)i * count + k];
            here |= words > 0;
            if (words > 0 && found == 0) {
                printf("  run %d: %llu of %lld words of %s differ from the first run's\n", i, words,
                       (long long)watched[k].words, watched[k].name);
            }
        }
        found += here;
    }
    return found;
}

static void test_cuda_repeat(void) {
    const ModelCase large = {"large", "relu", 8, 1, 1, 2, 768, 12, 4, 4, 8192, 8, 512, 1, 0, 1.0f};
    const ModelCase tiny = {"tiny", "relu", 8, 1, 1, 2, 64, 4, 2, 4, 256, 2, 33, 1, 0, 1.0f};
    const ModelCase t = emulated() ? tiny : large;
    int repeats = emulated() ? 3 : is_fp32() ? 100 : 1000, count = 0;
    Watched watched[MOST_WATCHED];
    Examination x;
    examination_init(&x, &t);
    x.options.recompute = 1;
    x.options.pair_budget = // half of the pairs
        1e-9 * (double)(arena_row_bytes(x.config.ffn) * x.N * t.L * t.E / 4);
    Model *m = open_for(&x, FOR_GRADIENTS);
    set_quick_weights(m);
    upload_batch(m, 0, x.inputs, x.targets, x.N);
    plan_worst(m, x.N);
    for (int i = 0; i < m->params.table.count; i++) {
        const Tensor *tensor = &m->params.table.tensors[i];
        watch(watched, &count, tensor->name, m->params.grad + tensor->offset, tensor->size * 4);
    }
    watch(watched, &count, "losses", m->acts.losses, (int64_t)x.N * 4);
    watch(watched, &count, "sums", m->step.sums, (int64_t)sizeof(StepSums));
    watch(watched, &count, "norm", m->step.grad_squares, (int64_t)sizeof(double));
    int64_t cells = (int64_t)repeats * count;
    unsigned long long *different = device_new<unsigned long long>(cells);
    CUDA_CHECK(cudaMemset(different, 0, (size_t)cells * sizeof(*different)));
    CUDA_CHECK(cudaDeviceSynchronize());

    repeat_micro_steps(m, t.B, t.T, repeats, watched, count, different);
    CHECK(read_step(m, x.N, &x.stats)); // no layer ran out of chunks
    CHECK(x.stats.lm_loss > 0.0 && x.stats.grad_norm > 0.0);
    unsigned long long *found = fetch_raw(different, cells);
    int differing = count_different_repeats(found, repeats, watched, count);
    CHECK(differing == 0);
    printf("  %d runs of %d tokens, S %.3f, loss %.5f: %d differ from the first\n", repeats, x.N,
           sparsity_of(x.stats.active, (int64_t)x.N * t.L * t.E), x.stats.lm_loss, differing);
    for (int k = 0; k < count; k++) {
        device_release(watched[k].kept);
    }
    free(found);
    device_release(different);
    model_close(m);
    examination_free(&x);
}

#endif
