/*
The parameters on a GPU, and what training keeps for each of them.

    working [flat_size] floatX    what products read: everyone has all of it
    fp32    [norms and routers]   what kernels read in fp32; its own master. In the fp32 build: all
    grad    [flat_size] fp32      everyone's own; of its shards a rank gets the sum
    master, exp_avg, exp_avg_sq   fp32, of the shards that this rank keeps, one bucket's behind the other's

With several ranks each keeps the last three for its own shards alone (ZeRO-1, buckets.h): 6 + 12 / n bytes a
parameter instead of 18. In the fp32 build the working copy is its own master.

Elements are counted as in a flat buffer (model.h). Errors: what the device cannot allocate ends the program.
*/
#ifndef DEVICE_PARAMS_CUH
#define DEVICE_PARAMS_CUH

#include "llmc/adamw.cuh"
#include "llmc/gpu/comm.cuh"
#include "llmc/gpu/memory.cuh"
#include "llmc/trainer.h"
// defines: adamw_update, round_copy; Comm, Region; take; Purpose, ModelBuffer, Range

// a layer's weights as the kernels read them: norms, the router and its bias in fp32, matrices rounded
typedef struct {
    const float *attn_norm, *ffn_norm, *router, *bias; // router, bias NULL without one
    const floatX *qkv, *o, *router_x, *gate_up, *down;
} LayerReads;

typedef struct {
    const floatX *embed, *head;
    const float *norm;
    LayerReads *layers; // [L]
} Reads;

typedef struct {
    TensorTable table;
    Reads weights;
    Weights grads; // into grad
    floatX *working;
    float *fp32, *grad;
    float *master, *exp_avg, *exp_avg_sq;
    int of;       // so many ranks divide the last three among them
    Range *kept;  // [buckets] what this rank keeps of them
    Range *owned; // [buckets] of which gradients it makes the sums
} DeviceParams;

// ----------------------------------------------------------------------------
// places

// where bucket b's shard begins among those that this rank keeps; behind the last: how long they are together
static inline int64_t kept_place(const DeviceParams *p, int bucket) {
    return owned_place(p->table.buckets, bucket, p->of);
}

static inline int64_t kept_elements(const DeviceParams *p) {
    return kept_place(p, p->table.bucket_count);
}

// elements of norms and routers, which come first
static inline int64_t small_elements(const DeviceParams *p) {
    return p->table.buckets[BUCKET_EMBED].first;
}

// the masters of what this rank keeps of a bucket
static inline float *params_master(const DeviceParams *p, int bucket) {
    if (p->table.buckets[bucket].is_fp32 || p->master == NULL) {
        return p->fp32 + p->kept[bucket].first;
    }
    return p->master + kept_place(p, bucket) - kept_place(p, BUCKET_EMBED);
}

// where an element that this rank keeps of a buffer is on this device
static inline float *params_element(const DeviceParams *p, ModelBuffer which, int64_t element) {
    int b = 0;
    while (element >= p->table.buckets[b].first + p->table.buckets[b].size) {
        b++;
    }
    int64_t within = element - p->kept[b].first, place = kept_place(p, b);
    switch (which) {
    case BUFFER_PARAMS: return params_master(p, b) + within;
    case BUFFER_GRADS: return p->grad + element;
    case BUFFER_EXP_AVG: return p->exp_avg + place + within;
    default: return p->exp_avg_sq + place + within;
    }
}

// ----------------------------------------------------------------------------
// memory

// the host's lists, whose lengths the model's shape decides
static inline void params_open_lists(DeviceParams *p, const Config *config) {
    Weights unused = {NULL, NULL, NULL, NULL};
    model_tensors(&p->table, &unused, config, NULL);
    free(unused.layers);
    p->weights.layers = NEW(LayerReads, config->layers);
    p->kept = NEW(Range, p->table.bucket_count);
    p->owned = NEW(Range, p->table.bucket_count);
}

static inline void params_close_lists(DeviceParams *p) {
    table_free(&p->table);
    free(p->weights.layers);
    free(p->grads.layers);
    free(p->kept);
    free(p->owned);
}

static inline void divide_params(DeviceParams *p, const Comm *comm, Purpose purpose) {
    int divided = comm->divided && purpose == FOR_TRAINING;
    p->of = divided ? comm->ranks : 1;
    for (int b = 0; b < p->table.bucket_count; b++) {
        const Bucket *bucket = &p->table.buckets[b];
        p->owned[b] = owned_range(bucket, comm->rank, comm->ranks);
        p->kept[b] = divided ? p->owned[b] : owned_range(bucket, 0, 1);
    }
}

static inline void point_reads(DeviceParams *p, const Config *config) {
    const Places *places = &p->table.places;
    Reads *r = &p->weights;
    const floatX *x = p->working;
    const float *fp32 = p->fp32;
    r->embed = x + places->embed;
    r->head = x + places->head;
    r->norm = fp32 + places->norm;
    for (int l = 0; l < config->layers; l++) {
        const LayerPlaces *from = &places->layers[l];
        LayerReads *to = &r->layers[l];
        int learned = from->router >= 0;
        to->attn_norm = fp32 + from->attn_norm;
        to->ffn_norm = fp32 + from->ffn_norm;
        to->router = learned ? fp32 + from->router : NULL;
        to->router_x = learned ? x + from->router : NULL;
        to->bias = from->bias >= 0 ? fp32 + from->bias : NULL;
        to->qkv = x + from->qkv;
        to->o = x + from->o;
        to->gate_up = x + from->gate_up;
        to->down = x + from->down;
    }
}

static inline void allocate_params(DeviceParams *p, Comm *comm, DeviceMemory *memory, const Config *config,
                                   Purpose purpose) {
    divide_params(p, comm, purpose);
    p->working = take_region<floatX>(comm, REGION_WORKING, memory, SEGMENT_WEIGHTS, p->table.flat_size);
#ifdef PRECISION_FP32
    p->fp32 = p->working;
#else
    p->fp32 = take_region<float>(comm, REGION_FP32, memory, SEGMENT_WEIGHTS, small_elements(p));
    p->master = take<float>(memory, SEGMENT_MASTERS, kept_elements(p) - kept_place(p, BUCKET_EMBED));
#endif
    point_reads(p, config);
    if (purpose != FOR_INFERENCE) {
        p->grad = take_region<float>(comm, REGION_GRADS, memory, SEGMENT_GRADIENTS, p->table.flat_size);
        model_tensors(&p->table, &p->grads, config, p->grad);
    }
    if (purpose == FOR_TRAINING) {
        p->exp_avg = take<float>(memory, SEGMENT_MOMENTS, kept_elements(p));
        p->exp_avg_sq = take<float>(memory, SEGMENT_MOMENTS, kept_elements(p));
    }
}

static inline void clear_buffer(void *buffer, int64_t bytes, cudaStream_t stream) {
    if (buffer != NULL) {
        CUDA_CHECK(cudaMemsetAsync(buffer, 0, (size_t)bytes, stream));
    }
}

// weights, gradients and moments are zero until a run sets them; the padding always
static inline void clear_params(const DeviceParams *p, cudaStream_t stream) {
    int64_t kept = kept_elements(p), flat = p->table.flat_size;
    clear_buffer(p->working, flat * (int64_t)sizeof(floatX), stream);
    clear_buffer(p->fp32, 4 * small_elements(p), stream);
    clear_buffer(p->master, 4 * (kept - kept_place(p, BUCKET_EMBED)), stream);
    clear_buffer(p->exp_avg, 4 * kept, stream);
    clear_buffer(p->exp_avg_sq, 4 * kept, stream);
    clear_buffer(p->grad, 4 * flat, stream);
}

// ----------------------------------------------------------------------------
// change

// AdamW's step t of what this rank keeps of a bucket, which then goes to the others
static inline void update_bucket(DeviceParams *p, Comm *comm, int bucket, AdamW adamw, double lr,
                                 double weight_decay, float grad_scale, int64_t t, cudaStream_t stream) {
    Range kept = p->kept[bucket];
    int64_t place = kept_place(p, bucket);
    adamw_update(params_master(p, bucket), p->working + kept.first, p->exp_avg + place, p->exp_avg_sq + place,
                 p->grad + kept.first, kept.size, adamw, lr,
                 p->table.buckets[bucket].decay ? weight_decay : 0.0, grad_scale, t, stream);
    comm_gather(comm, bucket, stream);
}

// makes of the masters what the products read, everyone's
static inline void publish_params(DeviceParams *p, Comm *comm, cudaStream_t stream) {
    for (int b = 0; b < p->table.bucket_count; b++) {
#ifndef PRECISION_FP32
        round_copy(p->working + p->kept[b].first, params_master(p, b), p->kept[b].size, stream);
#endif
        comm_gather(comm, b, stream);
    }
}

#endif
