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

// Mean loss of up to val_batches micro-batches of one shard, its windows in order; *tokens counts the
// targets. A signal ends it early. 0 when a token has changed since the run began into one that the
// vocabulary lacks
static inline int validate_domain(Run *run, const DataLoader *loader, double *loss, int64_t *tokens) {
    const Options *o = &run->options;
    int64_t sequences = dataloader_num_sequences(loader), bad_token;
    int64_t most = o->val_batches * o->batch;
    double sum = 0.0;
    *tokens = 0;
    sequences = sequences < most ? sequences : most;
    for (int64_t first = 0; first < sequences && !stop_requested; first += o->batch) {
        int B = (int)(sequences - first < o->batch ? sequences - first : o->batch);
        int64_t N = (int64_t)B * o->seq_len;
        for (int b = 0; b < B; b++) {
            if (dataloader_try_sequence(loader, first + b, run->config.vocab_size,
                                        run->inputs + b * o->seq_len, run->targets + b * o->seq_len,
                                        &bad_token) != NULL) {
                return 0;
            }
        }
        sum += model_loss(run->model, run->inputs, run->targets, B, (int)o->seq_len) * (double)N;
        *tokens += N;
    }
    *loss = *tokens > 0 ? sum / (double)*tokens : NAN;
    return 1;
}

// a loss that is no number: in training the run's own guard has the last word, alone it is the answer
static inline void refuse_broken_loss(const Run *run, double loss, const char *domain) {
    if (isfinite(loss) || stop_requested) {
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
    if (run->num_domains == 0) {
        return;
    }
    model_route(run->model, run->config.router.method, run->config.router.active);
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < run->num_domains && !stop_requested; i++) {
        const DataDomain *domain = &run->domains[i];
        int64_t tokens;
        double loss;
        if (!validate_domain(run, &domain->loader, &loss, &tokens)) {
            warn("%s was not validated: it has changed since the run began, and is damaged", domain->path);
            continue;
        }
        if (stop_requested) {
            break;
        }
        sum += loss * (double)tokens;
        total += tokens;
        printf(" %s %.4f", domain->name, loss);
        fflush(stdout);
        refuse_broken_loss(run, loss, domain->name);
        log_loss(run, loss, domain->name);
    }
    if (stop_requested || total == 0) {
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
    int64_t N = (int64_t)B * T;
    double weight = router_loss_weight(c->router.method, run->state.sparsity.lambda, o->aux_coeff);
    float **routes = o->route_from[0] != '\0' && !dense ? dump_read_routes(o->route_from, c, N) : NULL;
    float **gates = dense ? NULL : layer_matrices(c, N);
    float *logits = N <= DUMP_MOST_LOGIT_ROWS ? NEW(float, N * c->vocab_size) : NULL;
    for (int b = 0; b < B; b++) {
        dataloader_sequence(&run->train, b, c->vocab_size, run->inputs + b * T, run->targets + b * T);
    }
    stats_reset(&run->stats, c);
    model_examine(m, run->inputs, run->targets, B, T, weight, (const float *const *)routes, logits, gates,
                  &run->stats);
    double lm_loss = run->stats.lm_loss, reg = run->stats.reg_loss;
    double loss = lm_loss + weight * reg;
    double sparsity = dense ? 0.0 : sparsity_of(run->stats.active, N * c->layers * c->router.experts);
    float scalars[DUMP_SCALARS] = {(float)lm_loss, (float)reg, (float)loss, (float)sparsity};
    float *grad = model_borrow(m, BUFFER_GRADS);
    dump_write(o->dump, c, model_table(m), N, scalars, logits, (const float *const *)gates, grad);
    model_return(m, BUFFER_GRADS, grad, 0);
    printf("lm_loss %.7f reg_loss %.7f loss %.7f sparsity %.7f -> %s\n", lm_loss, reg, loss, sparsity,
           o->dump);
    free_layer_matrices(routes);
    free_layer_matrices(gates);
    free(logits);
}

#endif
