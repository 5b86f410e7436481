/*
Looking at a model without changing it: the loss on validation shards, and the dump of one micro-batch.

    validate   mean loss of up to val_batches micro-batches of each domain's shard, then of all together
    dump       one micro-batch, forward and backward in training mode, for checkers (dump.h)

Errors: a loss that is not finite is refused where nothing else was asked for (--eval); in training it is a
warning.
*/
#ifndef EVALUATE_H
#define EVALUATE_H

#include "llmc/files/dataloader.h"
#include "llmc/files/dump.h"
#include "llmc/run/run.h"

typedef enum { VALIDATED, VALIDATION_STOPPED, VALIDATION_DAMAGED } Validation;

// Begins the loss of sequences first .. first + B - 1. VALIDATION_DAMAGED, and nothing begun, when a token
// has changed since the run began into one that the vocabulary lacks
static inline Validation begin_batch(Run *run, const DataLoader *loader, int64_t first, int B) {
    int64_t T = run->options.seq_len, bad_token;
    for (int b = 0; b < B; b++) {
        if (dataloader_try_sequence(loader, first + b, run->config.vocab_size, run->inputs + b * T,
                                    run->targets + b * T, &bad_token) != NULL) {
            return VALIDATION_DAMAGED;
        }
    }
    model_loss_begin(run->model, run->inputs, run->targets, B, (int)T);
    return VALIDATED;
}

// losses [count]: those of this rank's micro-batches become everyone's; the worst of the ranks' outcomes
static inline Validation gather_losses(Run *run, double *losses, int64_t count, Validation outcome) {
    int ranks = run->ranks.count;
    double *all = NEW(double, ranks *(count + 1)), *own = NEW(double, count + 1);
    memcpy(own, losses, (size_t)count * sizeof(double));
    own[count] = outcome;
    ranks_gather(&run->ranks, own, (size_t)(count + 1) * sizeof(double), all);
    for (int64_t i = 0; i < count; i++) {
        losses[i] = all[i % ranks * (count + 1) + i];
    }
    for (int p = 0; p < ranks; p++) {
        double its = all[p * (count + 1) + count];
        outcome = its > outcome ? (Validation)its : outcome;
    }
    free(all);
    free(own);
    return outcome;
}

// losses [count]: those of this rank's micro-batches. While the model computes one, the next is read
static inline Validation own_losses(Run *run, const DataLoader *loader, double *losses, int64_t count,
                                    int64_t sequences) {
    const Options *o = &run->options;
    Validation outcome = VALIDATED;
    int64_t computing = -1;
    for (int64_t i = run->ranks.rank; i < count && outcome == VALIDATED; i += run->ranks.count) {
        int64_t left = sequences - i * o->batch;
        int B = (int)(left < o->batch ? left : o->batch);
        ranks_beat(&run->ranks, run->state.step, "validation");
        outcome = stop_requested ? VALIDATION_STOPPED : begin_batch(run, loader, i * o->batch, B);
        if (computing >= 0) {
            losses[computing] = model_loss_end(run->model, NULL);
        }
        computing = outcome == VALIDATED ? i : -1;
    }
    if (computing >= 0) {
        losses[computing] = model_loss_end(run->model, NULL);
    }
    return outcome;
}

// Mean loss of up to val_batches micro-batches of one shard, its windows in order, which the ranks take in
// turns; *tokens counts the targets. A signal ends it early
static inline Validation validate_domain(Run *run, const DataLoader *loader, double *loss, int64_t *tokens) {
    const Options *o = &run->options;
    int64_t sequences = dataloader_num_sequences(loader), most = o->val_batches * o->batch;
    sequences = sequences < most ? sequences : most;
    int64_t count = (sequences + o->batch - 1) / o->batch;
    double *losses = NEW(double, count), sum = 0.0;
    Validation outcome = own_losses(run, loader, losses, count, sequences);
    outcome = gather_losses(run, losses, count, outcome);
    *tokens = sequences * o->seq_len;
    for (int64_t i = 0; i < count; i++) {
        int64_t left = sequences - i * o->batch;
        sum += losses[i] * (double)((left < o->batch ? left : o->batch) * o->seq_len);
    }
    *loss = *tokens > 0 ? sum / (double)*tokens : NAN;
    free(losses);
    return outcome;
}

// a loss that is no number: in training the run's own guard has the last word, alone it is the answer
static inline void refuse_broken_loss(const Run *run, double loss, const char *domain) {
    if (isfinite(loss)) {
        return;
    }
    if (!run->options.eval) {
        warn("the validation loss of %s is not finite", domain);
    } else {
        die("the loss of %s is not finite: the weights, or what they compute, are no numbers\n"
            "  ---> --load another checkpoint",
            domain);
    }
}

static inline void log_loss(Run *run, double loss, const char *domain) {
    if (run->log != NULL) {
        log_validation(run->log, run->log_path, run->state.step, loss, domain);
    }
}

// every domain of --val-data, then all together; ec routes within its micro-batch. What a signal interrupts
// is not logged: a resumed run validates again
static inline void validate(Run *run) {
    double sum = 0.0;
    int64_t total = 0;
    Validation outcome = VALIDATED;
    if (run->num_domains == 0) {
        return;
    }
    model_route(run->model, run->config.router.method, run->config.router.active);
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < run->num_domains && outcome != VALIDATION_STOPPED; i++) {
        const DataDomain *domain = &run->domains[i];
        int64_t tokens;
        double loss;
        outcome = validate_domain(run, &domain->loader, &loss, &tokens);
        if (outcome == VALIDATION_DAMAGED) {
            warn("%s was not validated: it has changed since the run began, and is damaged", domain->path);
        }
        if (outcome != VALIDATED) {
            continue;
        }
        sum += loss * (double)tokens;
        total += tokens;
        printf(" %s %.4f", domain->name, loss);
        fflush(stdout);
        refuse_broken_loss(run, loss, domain->name);
        log_loss(run, loss, domain->name);
    }
    if (outcome == VALIDATION_STOPPED || total == 0) {
        printf(" stopped\n");
        return;
    }
    printf(" | all %.4f\n", sum / (double)total);
    log_loss(run, sum / (double)total, "all");
}

static inline void dump(Run *run) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    int B = (int)o->batch, T = (int)o->seq_len, dense = !router_has_experts(c->router.method);
    int64_t N = (int64_t)B * T; // of this rank
    double weight = router_loss_weight(c->router.method, run->state.sparsity.lambda, o->aux_coeff);
    float **routes =
        o->route_from[0] != '\0' && !dense ? dump_read_routes(&run->ranks, o->route_from, c, N) : NULL;
    float **gates = dense ? NULL : layer_matrices(c, N);
    float **draws = router_draws(c->router.method) ? layer_matrices(c, N) : NULL;
    float *logits = N * run->ranks.count <= DUMP_MOST_LOGIT_ROWS ? NEW(float, N * c->vocab_size) : NULL;
    for (int b = 0; b < B; b++) {
        dataloader_sequence(&run->train, (int64_t)run->ranks.rank * B + b, c->vocab_size, run->inputs + b * T,
                            run->targets + b * T);
    }
    stats_reset(&run->stats, c);
    model_examine(m, run->inputs, run->targets, B, T, weight, (const float *const *)routes, logits, gates,
                  draws, &run->stats);
    double lm_loss = run->stats.lm_loss, reg = run->stats.reg_loss;
    double loss = lm_loss + weight * reg;
    double sparsity =
        dense ? 0.0 : sparsity_of(run->stats.active, run->stats.tokens * c->layers * c->router.experts);
    float scalars[DUMP_SCALARS] = {(float)lm_loss, (float)reg, (float)loss, (float)sparsity};
    Dump dump = {N,
                 scalars,
                 logits,
                 (const float *const *)gates,
                 (const float *const *)draws,
                 model_buffer(m, BUFFER_GRADS, RANGES_OWNED)};
    dump_write(&run->ranks, o->dump, c, &dump);
    printf("lm_loss %.7f reg_loss %.7f loss %.7f sparsity %.7f -> %s\n", lm_loss, reg, loss, sparsity,
           o->dump);
    free_layer_matrices(routes);
    free_layer_matrices(gates);
    free_layer_matrices(draws);
    free(logits);
}

#endif
