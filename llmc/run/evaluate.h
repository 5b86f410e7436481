/*
Looking at a model without changing it: the loss on validation shards, and the dump of one micro-batch.

    validate   mean loss of up to val_batches micro-batches of each domain's shard, then of all together. lory
               routes segments as in training: the first of a sequence sees the mean of its own tokens. So
               beside the loss stands that of the positions behind it, which see nothing that comes later
    dump       one micro-batch, forward and backward in training mode, for checkers (dump.h)

Errors: a loss that is not finite is refused where nothing else was asked for (--eval); in training it is a
warning.
*/
#ifndef EVALUATE_H
#define EVALUATE_H

#include "llmc/files/dataloader.h"
#include "llmc/files/dump.h"
#include "llmc/run/run.h"
#include "llmc/run/statistics.h"
// defines: DataLoader; Dump, dump_write, layer_matrices; Run, model_*, step_sparsity; statistics_add

typedef enum { VALIDATED, VALIDATION_STOPPED, VALIDATION_DAMAGED } Validation;

// positions at the beginning of a sequence whose loss may have seen later tokens; 0: none
static inline int leaking_positions(const Run *run) {
    const Router *r = &run->config.router;
    return router_merges(r->method) && r->segment < run->options.seq_len ? r->segment : 0;
}

// mean over the positions from `first` on of losses [B, T]
static inline double mean_late_loss(const float *losses, int B, int T, int first) {
    double sum = 0.0;
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        sum += n % T >= first ? losses[n] : 0.0;
    }
    return sum / ((double)B * (T - first));
}

// Begins the loss of a domain's sequences first .. first + B - 1. VALIDATION_DAMAGED, and nothing begun, when a
// token has changed since the run began into one that the vocabulary lacks
static inline Validation begin_batch(Run *run, int domain, int64_t first, int B) {
    const DataLoader *loader = &run->domains[domain].loader;
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

// losses of a domain's micro-batches [count], the last of which may have fewer sequences
typedef struct {
    int domain;
    int64_t sequences, count;
    double *losses;
    double *late; // of the positions which cannot see later tokens, where others can
} BatchLosses;

static inline int batch_sequences(const Run *run, const BatchLosses *b, int64_t i) {
    int64_t batch = run->options.batch, left = b->sequences - i * batch;
    return (int)(left < batch ? left : batch);
}

// ends the loss of micro-batch i
static inline void end_batch(Run *run, BatchLosses *b, int64_t i) {
    int B = batch_sequences(run, b, i), T = (int)run->options.seq_len;
    b->losses[i] = model_loss_end(run->model, NULL);
    if (leaking_positions(run) > 0) {
        float *losses = NEW(float, B *T);
        model_token_losses(run->model, B * T, losses);
        b->late[i] = mean_late_loss(losses, B, T, leaking_positions(run));
        free(losses);
    }
    if (run->statistics != NULL) {
        model_masks(run->model, B * T, run->statistics->masks);
        statistics_add(run->statistics, b->domain, run->inputs, B * T);
    }
}

// those of this rank. While the model computes one, the next is read, unless all that it leaves is looked at
static inline Validation own_losses(Run *run, BatchLosses *b) {
    int one_by_one = run->statistics != NULL || leaking_positions(run) > 0;
    Validation outcome = VALIDATED;
    int64_t computing = -1, batch = run->options.batch;
    for (int64_t i = run->ranks.rank; i < b->count && outcome == VALIDATED; i += run->ranks.count) {
        int B = batch_sequences(run, b, i);
        ranks_beat(&run->ranks, run->state.step, "validation");
        outcome = stop_requested ? VALIDATION_STOPPED : begin_batch(run, b->domain, i * batch, B);
        if (computing >= 0) {
            end_batch(run, b, computing);
        }
        computing = outcome == VALIDATED ? i : -1;
        if (computing >= 0 && one_by_one) {
            end_batch(run, b, computing);
            computing = -1;
        }
    }
    if (computing >= 0) {
        end_batch(run, b, computing);
    }
    return outcome;
}

// of the micro-batches' losses or late losses, each by its sequences
static inline double mean_of_batches(const Run *run, const BatchLosses *b, const double *losses) {
    double sum = 0.0;
    for (int64_t i = 0; i < b->count; i++) {
        sum += losses[i] * batch_sequences(run, b, i);
    }
    return b->sequences > 0 ? sum / (double)b->sequences : NAN;
}

// of a domain, or of all
typedef struct {
    double loss; // mean over all targets
    double late; // over those behind the leaking positions, if there are such
    int64_t sequences;
} ValidationLoss;

// Mean loss of up to validation_windows() of one domain, its windows in order, of which the ranks take
// micro-batches in turns. A signal ends it early
static inline Validation validate_domain(Run *run, int domain, ValidationLoss *v) {
    const Options *o = &run->options;
    int64_t sequences = dataloader_num_sequences(&run->domains[domain].loader);
    int64_t most = validation_windows(run);
    sequences = sequences < most ? sequences : most;
    int64_t count = (sequences + o->batch - 1) / o->batch;
    BatchLosses b = {domain, sequences, count, NEW(double, count), NEW(double, count)};
    Validation outcome = own_losses(run, &b);
    outcome = gather_losses(run, b.losses, count, outcome);
    outcome = leaking_positions(run) > 0 ? gather_losses(run, b.late, count, outcome) : outcome;
    v->loss = mean_of_batches(run, &b, b.losses);
    v->late = mean_of_batches(run, &b, b.late);
    v->sequences = sequences;
    free(b.losses);
    free(b.late);
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

// says and logs it: " c 3.4596", or " c 3.4596 (3.5012)" with the loss behind the leaking positions
static inline void report_loss(Run *run, const ValidationLoss *v, const char *domain) {
    const double *late = leaking_positions(run) > 0 ? &v->late : NULL;
    printf(" %s %.4f", domain, v->loss);
    if (late != NULL) {
        printf(" (%.4f)", *late);
    }
    fflush(stdout);
    if (run->log != NULL) {
        log_validation(run->log, run->log_path, run->state.step, v->loss, late, domain);
    }
}

// adds a domain's, by its share of the sequences
static inline void add_loss(ValidationLoss *all, const ValidationLoss *v) {
    double before = (double)all->sequences, more = (double)v->sequences;
    all->loss = (all->loss * before + v->loss * more) / (before + more);
    all->late = (all->late * before + v->late * more) / (before + more);
    all->sequences += v->sequences;
}

// every domain of --val-data, then all together; ec routes within its micro-batch. What a signal interrupts
// is not logged: a resumed run validates again
static inline void validate(Run *run) {
    ValidationLoss all = {0.0, 0.0, 0};
    int leaking = leaking_positions(run);
    Validation outcome = VALIDATED;
    if (run->num_domains == 0) {
        return;
    }
    model_route(run->model, run->config.router.method, run->config.router.active);
    printf("val  %5lld |", (long long)run->state.step);
    for (int i = 0; i < run->num_domains && outcome != VALIDATION_STOPPED; i++) {
        const DataDomain *domain = &run->domains[i];
        ValidationLoss v;
        outcome = validate_domain(run, i, &v);
        if (outcome == VALIDATION_DAMAGED && run->statistics != NULL) {
            die("%s has changed since this process began, and is damaged: it cannot be counted\n"
                "  ---> mend it, and begin again",
                domain->path);
        }
        if (outcome == VALIDATION_DAMAGED) {
            warn("%s was not validated: it has changed since the run began, and is damaged", domain->path);
        }
        if (outcome != VALIDATED) {
            continue;
        }
        report_loss(run, &v, domain->name);
        refuse_broken_loss(run, v.loss, domain->name);
        add_loss(&all, &v);
    }
    if (outcome == VALIDATION_STOPPED || all.sequences == 0) {
        printf(" stopped\n");
        return;
    }
    printf(" |");
    report_loss(run, &all, "all");
    printf("\n");
    if (leaking > 0) {
        printf(
            "          (in brackets: without the first %d positions, which are routed by their own mean)\n",
            leaking);
    }
}

static inline void dump(Run *run) {
    Model *m = run->model;
    const Options *o = &run->options;
    const Config *c = &run->config;
    int B = (int)o->batch, T = (int)o->seq_len, dense = !router_has_experts(c->router.method);
    int64_t N = (int64_t)B * T; // of this rank
    double weight = router_loss_weight(c->router.method, run->state.sparsity.lambda, o->aux_coeff);
    if (o->route_from[0] != '\0' && router_merges(c->router.method)) {
        die_usage("--route-from: %s has no active experts to take over, it merges them all\n  ---> drop it",
                  router_name(c->router.method));
    }
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
    double sparsity = dense ? 0.0
                            : step_sparsity(c->router, run->stats.active,
                                            run->stats.tokens * c->layers * c->router.experts);
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
