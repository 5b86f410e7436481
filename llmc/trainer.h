/*
What a trainer offers to the run around it: a model behind the functions below. train_remoe.c implements them
on the CPU, train_remoe.cu on a GPU; step.h, and the run with its checkpoints, validation, samples and bench
(llmc/run/run.h), know no more of a model than this.

    open, close           memory for micro-batches of B x T tokens, and what it is wanted for
    table, ranges         the parameters, by name, and which of their elements this rank keeps
    get, set, publish     their values, to and from the host
    route                 the routing method and k in force
    gradients, update     an optimizer step, in two halves
    balance               between them: the routers' state that no gradient moves
    loss_begin, loss_end  forward alone: validation
    look                  the same without a loss
    masks, gates, token_losses   what such a forward left
    score                 forward alone: log likelihoods of chosen targets (score.h); shares_contexts
    read, next_token      a text, continued: sampling
    examine               one micro-batch with all that can be compared (dump)
    memory_gb, weight_bytes, peak_flops, peak_bytes, profile   what it costs
    takes_ranks           whether several processes can share the work

Letters: B sequences, T tokens each, N = B T, L layers, V vocabulary, E = E_tot experts, k = k_tot active.
*/
#ifndef TRAINER_H
#define TRAINER_H

#include "llmc/config.h"
#include "llmc/files/prefetch.h"
#include "llmc/model.h"
#include "llmc/ranges.h"
#include "llmc/router.h"
#include "llmc/run/ranks.h"
#include "llmc/run/sampler.h"
// defines: Config, Prefetcher, TensorTable, Range, ModelBuffer, RouterMethod, Ranks, Sampling

typedef struct Model Model; // each trainer's own

typedef enum { FOR_INFERENCE, FOR_GRADIENTS, FOR_TRAINING } Purpose;
typedef enum { RANGES_KEPT, RANGES_OWNED } Holding;

// what a model is opened for; the last six lines are the CUDA trainer's
typedef struct {
    Purpose purpose;
    int B, T;          // the largest micro-batch
    uint64_t seed;     // of the routers' draws
    int micro_batches; // of a step
    int most_k;        // the largest k that model_route will ask for
    int starts_dense;  // a router that may switch on any number of experts, with weights that are just drawn
    Ranks *ranks;      // that compute a step together, each on a GPU
    int zero;          // they divide the optimizer's states among them (ZeRO-1)
    const char *comm;  // auto, copies or nccl: what carries the data between them
    const char *kernels; // auto, portable or hopper
    int recompute;       // normalised inputs are computed again in backward
    double pair_budget;  // GB of pairs kept for backward; 0: what memory is left over
} ModelSettings;

// what a step learned, over the micro-batches of all ranks
typedef struct {
    int64_t tokens;           // N of the step
    int64_t *counts;          // [L, E] tokens per expert
    int64_t zero_expert;      // (layer, token) pairs without an expert
    int64_t active;           // pairs
    double lm_loss, reg_loss; // means over the micro-batches
    double grad_norm;         // of all gradients together
    double ms_waiting;        // in which this rank's device stood still for other ranks; < 0: there are none
    int stop;                 // before: whether this rank wants the run to end; after: whether any rank does
} StepStats;

// Sequences to score together: B of them, in rows of T ids, padded behind their ends with any token. A causal
// model's rows do not see what stands behind them, so that padding changes nothing
typedef struct {
    int B, T;            // B T at most what the model was opened for
    const int *ids;      // [B, T]
    const int *lengths;  // [B] without the padding
    const int *contexts; // [B] the first so many tokens of a sequence are its context, >= 1
    int64_t n;           // targets
    const int *rows;     // [n] b T + t: the position whose logits predict the target; may repeat
    const int *targets;  // [n]
} ScoreBatch;

// all but `stop`
static inline void stats_reset(StepStats *s, const Config *c) {
    int64_t cells = (int64_t)c->layers * c->router.experts;
    if (s->counts == NULL) {
        s->counts = NEW(int64_t, cells);
    }
    memset(s->counts, 0, (size_t)cells * sizeof(int64_t));
    s->tokens = s->zero_expert = s->active = 0;
    s->lm_loss = s->reg_loss = s->grad_norm = 0.0;
    s->ms_waiting = -1.0;
}

// Allocates all that the micro-batches need, and refuses what does not fit. For training, the start-up
// table's lines about memory are printed first. Weights, gradients and moments are zero
Model *model_open(const Config *config, const ModelSettings *settings);
void model_close(Model *m);
const TensorTable *model_table(const Model *m);

// elements of the flat buffers, ascending: those that this rank keeps of parameters and moments, or those
// that it owns, of which every element has one owner. Everything where there is one rank
const Range *model_ranges(const Model *m, Holding holding, int *count);
// n elements from `first` on, all within one range, to the host and back
void model_get(Model *m, ModelBuffer which, int64_t first, int64_t n, float *out);
void model_set(Model *m, ModelBuffer which, int64_t first, int64_t n, const float *x);
// After the last model_set of BUFFER_PARAMS: makes of the parameters what the products read, a rounded copy
// on a GPU, with several ranks of everyone's. All ranks call it
void model_publish(Model *m);

// the method and k_tot in force: topk's warm-up raises k, ec samples as topk
void model_route(Model *m, RouterMethod method, int k);

// Gradients of a step's mean over micro_batches batches of B x T, of each rank, taken from `ahead`, into the
// gradient buffer; losses, routing and the gradient's norm into s. `step` says which random numbers are drawn
void model_gradients(Model *m, Prefetcher *ahead, int64_t step, int micro_batches, int B, int T,
                     double reg_weight, StepStats *s);
// Moves the routers' biases by `rate` towards an even load, from counts [L, E] of the step (router_auxfree.h).
// Before model_update, which tells the other ranks
void model_balance(Model *m, float rate, const int64_t *counts);
// AdamW's step t (from 1) with the gradients times grad_scale
void model_update(Model *m, double lr, double weight_decay, float grad_scale, int64_t t);
// The mean loss of B x T targets, in evaluation mode, nothing kept for a gradient. Begun and ended in the same
// order, at most MOST_LOSSES begun and not ended: so that a GPU computes one batch while the host prepares the
// next. The inputs are the caller's again when model_loss_begin returns
enum { MOST_LOSSES = 2 };
void model_loss_begin(Model *m, const int *inputs, const int *targets, int B, int T);
// *active: NULL, or gets the batch's (token, expert) pairs of all layers
double model_loss_end(Model *m, int64_t *active);

static inline double model_loss(Model *m, const int *inputs, const int *targets, int B, int T) {
    model_loss_begin(m, inputs, targets, B, T);
    return model_loss_end(m, NULL);
}

// forward alone, without a loss; none is begun and not ended
void model_look(Model *m, const int *inputs, int B, int T);
// What the last model_look or model_loss_end did with its N tokens: the active experts, as bits
// [L, N, bit_words(E)] (pairs.h); the gates, L matrices [N, E]; of model_loss, each token's loss [N]
void model_masks(Model *m, int64_t N, uint64_t *masks);
void model_gates(Model *m, int64_t N, float *const *gates);
void model_token_losses(Model *m, int64_t N, float *losses);
// ll [n]: the targets' log likelihoods; greedy [n]: is the target the likeliest token? (crossentropy.h)
void model_score(Model *m, const ScoreBatch *batch, float *ll, unsigned char *greedy);
// does model_score compute once what sequences of a batch have in common? Then those stand side by side
int model_shares_contexts(void);
// A text: the model reads ids [n], n <= T, and up to `most` tokens follow, drawn by s from draw number `draw`
// on. More than T - n + 1 the window does not hold. What was read before is forgotten
void model_read(Model *m, const int *ids, int n, const Sampling *s, int64_t draw, int64_t most);
// the next of them; -1: the logits are no numbers, and the text ends
int model_next_token(Model *m);
// One micro-batch forward and backward, its gradient into the gradient buffer. forced: NULL, or L active sets
// [N, E] that replace the router's own; logits: NULL, or [N, V]; gates, draws: NULL, or L matrices [N, E]. Random
// numbers are step 0's
void model_examine(Model *m, const int *inputs, const int *targets, int B, int T, double reg_weight,
                   const float *const *forced, float *logits, float *const *gates, float *const *draws,
                   StepStats *s);

int model_weight_bytes(void);           // of a weight as products read it
int model_takes_ranks(void);            // can several processes compute a step together?
double model_memory_gb(const Model *m); // largest use so far
// a second: of the devices of all ranks, dense, at its products' precision; <= 0: unknown
double model_peak_flops(const Model *m);
double model_peak_bytes(const Model *m); // a second, of this rank's memory; <= 0: unknown
// 1: measure where the time goes from here; 0: print the table, and return the share of it that other ranks
// cost: waiting for them, and adding up what came
double model_profile(Model *m, int on);

#endif
