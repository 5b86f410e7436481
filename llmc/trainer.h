/*
What a trainer offers to the run around it: a model behind fourteen functions. train_remoe.c implements them
on the CPU, train_remoe.cu on a GPU; step.h, and the run with its checkpoints, validation, samples and bench
(llmc/run/run.h), know no more of a model than this.

    open, close           memory for micro-batches of B x T tokens, and what it is wanted for
    table, borrow, return the parameters, by name, on the host
    route                 the routing method and k in force
    gradients, update     an optimizer step, in two halves
    loss, next_logits     forward alone: validation, sampling
    examine               one micro-batch with all that can be compared (dump)
    memory, peak, profile what it costs

Letters: B sequences, T tokens each, N = B T, L layers, V vocabulary, E = E_tot experts, k = k_tot active.
*/
#ifndef TRAINER_H
#define TRAINER_H

#include "llmc/config.h"
#include "llmc/files/prefetch.h"
#include "llmc/model.h"
#include "llmc/router.h"
// defines: Config, Prefetcher, TensorTable, RouterMethod

typedef struct Model Model; // each trainer's own

typedef enum { FOR_INFERENCE, FOR_GRADIENTS, FOR_TRAINING } Purpose;
typedef enum { BUFFER_PARAMS, BUFFER_GRADS, BUFFER_EXP_AVG, BUFFER_EXP_AVG_SQ } ModelBuffer;

// what a model is opened for; the last four lines are the CUDA trainer's
typedef struct {
    Purpose purpose;
    int B, T;          // the largest micro-batch
    int micro_batches; // of a step
    int most_k;        // the largest k that model_route will ask for
    int starts_dense;  // a router that may switch on any number of experts, with weights that are just drawn
    int device;        // which of the machine's GPUs
    const char *kernels; // auto, portable or hopper
    int recompute;       // normalised inputs are computed again in backward
    double pair_budget;  // GB of pairs kept for backward; 0: what memory is left over
} ModelSettings;

// what a step learned, over its micro-batches. A run zeroes it, a model adds to it
typedef struct {
    int64_t tokens;           // N of the step
    int64_t *counts;          // [L, E] tokens per expert
    int64_t zero_expert;      // (layer, token) pairs without an expert
    int64_t active;           // pairs
    double lm_loss, reg_loss; // means over the micro-batches
    double grad_norm;         // of all gradients together
} StepStats;

// Allocates all that the micro-batches need, and refuses what does not fit. For training, the start-up
// table's lines about memory are printed first. Weights, gradients and moments are zero
Model *model_open(const Config *config, const ModelSettings *settings);
void model_close(Model *m);
const TensorTable *model_table(const Model *m);

// One of the flat buffers [num_params], on the host; what model_return gets back with changed = 1 becomes the
// model's. Between the two calls nothing else may use it
float *model_borrow(Model *m, ModelBuffer which);
void model_return(Model *m, ModelBuffer which, float *buffer, int changed);

// the method and k_tot in force: topk's warm-up raises k, ec samples as topk
void model_route(Model *m, RouterMethod method, int k);

// Gradients of a step's mean over micro_batches batches of B x T taken from `ahead`, into the gradient
// buffer; losses, routing and the gradient's norm into s
void model_gradients(Model *m, Prefetcher *ahead, int micro_batches, int B, int T, double reg_weight,
                     StepStats *s);
// AdamW's step t (from 1) with the gradients times grad_scale
void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t);
// mean over the B x T targets, no gradient
double model_loss(Model *m, const int *inputs, const int *targets, int B, int T);
// [V] on the host: logits of position n - 1 of one sequence; the positions before start are in the cache
const float *model_next_logits(Model *m, const int *ids, int n, int start);
// One micro-batch forward and backward, its gradient into the gradient buffer. forced: NULL, or L active sets
// [N, E] that replace the router's own; logits: NULL, or [N, V]; gates: NULL, or L matrices [N, E]
void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, StepStats *s);

double model_memory_gb(const Model *m);  // largest use so far
double model_peak_flops(const Model *m); // of the device, dense, at its products' precision; <= 0: unknown
void model_profile(Model *m, int on);    // 1: measure where the time goes from here; 0: print the table

#endif
