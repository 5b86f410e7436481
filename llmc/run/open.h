/*
Opening and closing a run: from the command line to a model with weights, a state, data and a folder to write
to.

    options (startup.h) -> config -> model_open -> weights: drawn, loaded or resumed
                                  -> state: step, lambda, AdamW's moments
                                  -> data, tokenizer, buffers -> start-up table -> log

Errors: exit 1 or 2 with the file or option that is wrong, before anything has been written.
*/
#ifndef OPEN_H
#define OPEN_H

#ifdef _OPENMP
#include <omp.h>
#endif
// defines: omp_set_num_threads, omp_get_max_threads
#include "llmc/run/agree.h"
#include "llmc/run/flips.h"
#include "llmc/run/launch.h"
#include "llmc/run/run.h"
#include "llmc/run/startup.h"
#include "llmc/run/statistics.h"
#include "llmc/run/trace.h"

// what stays the same from step to step
static inline StepSettings step_settings(const Options *o, const Config *c, int ranks) {
    int64_t warmup = o->warmup_steps >= 0 ? o->warmup_steps : o->steps / 100;
    Schedule schedule = {o->lr, o->lr_min, warmup, o->steps};
    StepSettings s;
    s.micro_batches = (int)(o->global_batch / (o->batch * ranks));
    s.B = (int)o->batch;
    s.T = (int)o->seq_len;
    s.ranks = ranks;
    s.schedule = schedule;
    s.weight_decay = o->weight_decay;
    s.grad_clip = o->grad_clip;
    s.aux_coeff = o->aux_coeff;
    s.bias_rate = o->bias_rate;
    s.warmup_steps = o->topk_warmup_steps;
    s.warmup_k = o->topk_warmup_k * c->granularity;
    return s;
}

// the first lines of the start-up table: before anything is allocated or opened, so that a refusal has its
// figures above it
static inline void print_model(const Options *o, const Config *c) {
    const Router *r = &c->router;
    const char *name = o->resume[0] != '\0' ? o->resume
                       : o->load[0] != '\0' ? o->load
                                            : options_model_name(o);
    double gflops = 1e-9 * config_flops(c, o->seq_len, r->active);
    printf("model     %s | L %d, d %d, H %d, KV %d, hd %d, F %d, V %d, T %lld\n", name, c->layers, c->hidden,
           c->heads, c->kv_heads, c->head_size, c->ffn, c->vocab_size, (long long)o->seq_len);
    if (router_merges(r->method)) {
        printf("router    %s | %d experts merged into one, once every %d tokens\n", router_name(r->method),
               r->experts, r->segment);
    } else {
        printf("router    %s | %d of %d experts (granularity %d)%s\n", router_name(r->method), r->active,
               r->experts, c->granularity,
               router_has_lambda(r->method) && !r->load_balance ? ", no load balance" : "");
    }
    printf("params    %lld total, %lld active | %.*f GFLOPs a sequence\n",
           (long long)config_params(c, r->experts), (long long)config_params(c, r->active),
           gflops < 100.0 ? 3 : 1, gflops);
}

// a router that learns from what it does for the next segment needs one
static inline void check_segments(const Options *o, const Config *c) {
    if (router_merges(c->router.method) && o->seq_len <= c->router.segment) {
        die_usage(
            "--seq-len %lld is a single segment of --segment-length %d: a segment is routed by the one "
            "before, "
            "so the router would learn nothing\n  ---> a longer --seq-len, or a shorter --segment-length",
            (long long)o->seq_len, c->router.segment);
    }
}

// what a model is to be opened for
static inline ModelSettings model_settings(const Options *o, const Config *c, Purpose purpose, Ranks *ranks) {
    StepSettings step = step_settings(o, c, ranks->count);
    int loaded = o->load[0] != '\0' || o->resume[0] != '\0';
    ModelSettings s;
    s.purpose = purpose;
    s.B = step.B;
    s.T = step.T;
    s.seed = (uint64_t)o->seed;
    s.micro_batches = step.micro_batches;
    s.most_k = step_most_k(&step, c->router);
    s.starts_dense = router_row(c->router.method)->leaves_number_open && !loaded;
    s.ranks = ranks;
    s.zero = (int)o->zero;
    s.comm = o->comm;
    s.kernels = o->kernels;
    s.recompute = (int)o->recompute;
    s.pair_budget = o->pair_budget;
    return s;
}

// weights, moments and state: drawn from the seed, loaded, or resumed
static inline void build_model(Run *run) {
    const Options *o = &run->options;
    Config *c = &run->config;
    Purpose purpose = wants_training(o) ? FOR_TRAINING : o->dump[0] != '\0' ? FOR_GRADIENTS : FOR_INFERENCE;
    const char *folder = o->resume[0] != '\0' ? o->resume : o->load;
    char path[PATH_SIZE];
    agree_on_model(run, folder);
    if (folder[0] != '\0') {
        check_format(path, sizeof(path), "%s/config.json", folder);
        *c = config_read(path);
    } else {
        *c = config_from_options(o);
    }
    c->max_seq_len = o->seq_len > c->max_seq_len || folder[0] == '\0' ? (int)o->seq_len : c->max_seq_len;
    if (purpose == FOR_TRAINING) {
        check_segments(o, c);
        print_model(o, c);
    }
    ModelSettings settings = model_settings(o, c, purpose, &run->ranks);
    run->model = model_open(c, &settings);
    ranks_beat(&run->ranks, 0, "loading");
    FlatBuffer params = model_buffer(run->model, BUFFER_PARAMS, RANGES_KEPT);
    if (folder[0] == '\0') {
        model_init(&params, (uint64_t)o->seed);
    } else {
        checkpoint_load_weights(&params, folder);
    }
    model_publish(run->model);
}

// AdamW's moments, if the folder has them
static inline int load_moments(Run *run, const char *folder) {
    FlatBuffer moments[] = {model_buffer(run->model, BUFFER_EXP_AVG, RANGES_KEPT),
                            model_buffer(run->model, BUFFER_EXP_AVG_SQ, RANGES_KEPT)};
    return checkpoint_load_moments(moments, folder);
}

static inline void build_state(Run *run, int lambda_given) {
    const Options *o = &run->options;
    RunState *state = &run->state;
    int resuming = o->resume[0] != '\0';
    RunState loaded = *state;
    state->sparsity = resuming ? loaded.sparsity : lambda_init(o->lambda_init, o->alpha);
    state->sparsity.alpha = (float)o->alpha;
    if (o->load[0] != '\0' && checkpoint_load_state(&loaded, NULL, o->load)) {
        state->optimizer_step = loaded.optimizer_step;
        int looks = o->eval || traces_only(o);
        state->step = looks ? loaded.step : state->step; // which is told of the weights
        state->sparsity.lambda = lambda_given ? (float)o->lambda_init : loaded.sparsity.lambda;
    }
    if (wants_training(o)) {
        const char *folder = resuming ? o->resume : o->load;
        int found = folder[0] != '\0' && load_moments(run, folder);
        if (!found) {
            state->optimizer_step = 0; // zero moments: their bias correction starts anew
        }
        if (resuming && !found) {
            die("%s has no optimizer.safetensors\n  ---> start from its weights: --load %s", folder, folder);
        }
    }
    run->step = step_settings(o, &run->config, run->ranks.count);
    run->first_step = state->step;
}

// what a run learns from: the shards that it began with, if it is resumed
static inline void open_training_data(Run *run, int data_given) {
    const Options *o = &run->options;
    const Config *c = &run->config;
    int training = wants_training(o);
    Provenance now = {run->provenance.run, NULL, 0};
    dataloader_open(&run->train, o->train_data, (int)o->seq_len, (uint64_t)o->seed, training && o->shuffle);
    if (!training) {
        return;
    }
    dataloader_check_tokens(&run->train, 1, c->vocab_size);
    record_shards(&now, &run->train);
    if (run->ranks.rank == 0) { // which knows the run's
        check_same_data(&run->provenance, &now, data_given);
    }
    provenance_free(&run->provenance);
    run->provenance = now;
    // micro-batch after micro-batch in the run's order, or the first one again and again; a rank takes every
    // count-th
    int64_t first = (o->overfit_batch ? 0 : run->state.sequences) + run->ranks.rank * o->batch;
    prefetch_start(&run->ahead, &run->train, (int)o->batch, c->vocab_size, first,
                   o->overfit_batch ? 0 : o->batch * run->ranks.count);
    // all ranks save, or none: the others do not know of a token that one cannot read
    run->ahead.before_end = writes_run(o) && run->ranks.count == 1 ? save_before_end : NULL;
    run->ahead.context = run;
}

// every domain, all the tokens that a validation reads
static inline void open_validation_data(Run *run) {
    const Options *o = &run->options;
    if (o->val_data[0] != '\0') {
        run->num_domains = domains_open(o->val_data, &run->domains, (int)o->seq_len, validation_windows(run),
                                        run->config.vocab_size);
    }
    if (o->eval && run->num_domains == 0) {
        die("--eval has nothing to evaluate: every shard of %s is too short\n"
            "  ---> use a smaller --seq-len, or more data",
            o->val_data);
    }
}

// what looks at the routers, and needs some that switch experts on and off
static inline void open_routing(Run *run) {
    const Options *o = &run->options;
    RouterMethod method = run->config.router.method;
    int flips = o->flip_every > 0 && writes_run(o);
    if (!router_has_mask(method) && (o->stats[0] != '\0' || o->trace[0] != '\0' || flips)) {
        die("%s: a %s model switches no experts on and off\n  ---> %s",
            o->stats[0] != '\0'   ? "--stats"
            : o->trace[0] != '\0' ? "--trace"
                                  : "--flip-every",
            router_name(method), flips ? "leave it out (--flip-every 0)" : "--load another model");
    }
    run->statistics = o->stats[0] != '\0' ? statistics_open(run) : NULL;
    run->trace = o->trace[0] != '\0' ? trace_open(run) : NULL;
    if (flips && run->num_domains == 0) {
        die("--flip-every: every shard of %s is too short\n  ---> a smaller --seq-len, or --flip-every 0",
            o->val_data);
    }
    run->flips = flips ? flips_open(run) : NULL;
}

// data, text and buffers; what a run cannot do without is opened before it starts
static inline void open_data(Run *run, int data_given, int tokenizer_given) {
    const Options *o = &run->options;
    Config *c = &run->config;
    const char *folder = tokenizer_folder(o, tokenizer_given);
    char vocab[PATH_SIZE];
    check_format(vocab, sizeof(vocab), "%s/vocab.json", folder);
    if ((o->eval || o->dump[0] != '\0') && o->trace[0] == '\0') {
        run->tokenizer = NULL; // no text is shown
    } else if (tokenizer_is_in(folder)) {
        run->tokenizer = load_tokenizer(folder, c);
    } else if (o->sampling || o->trace[0] != '\0' || has_requests(o)) {
        check_not_closed(vocab);
        die("no tokenizer: there is no %s\n  ---> name its folder with --tokenizer, or run `make "
            "sample-data`",
            vocab);
    } else if (folder[0] != '\0') {
        check_not_closed(vocab);
        warn("no samples will be shown: there is no %s\n  ---> name a folder with --tokenizer", vocab);
    }
    run->inputs = NEW(int, o->batch * o->seq_len);
    run->targets = NEW(int, o->batch * o->seq_len);
    run->layer_sparsity = NEW(double, c->layers);
    if (o->eval || writes_run(o) || (traces_only(o) && o->text[0] == '\0')) {
        open_validation_data(run);
    }
    if (wants_training(o) || o->dump[0] != '\0') { // --bench in each of its modes
        open_training_data(run, data_given);
    }
    agree_on_data(run);
    open_routing(run);
}

static inline void print_table(const Run *run) {
    const Options *o = &run->options;
    const Router *r = &run->config.router;
    int threads = 1;
    char ranks[32] = "";
    if (run->ranks.count > 1) {
        check_format(ranks, sizeof(ranks), "%d ranks x ", run->ranks.count);
    }
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    printf("data      ");
    dataloader_print(&run->train, stdout);
    printf(" | %.1f epochs%s\n",
           (double)o->steps * (double)o->global_batch / (double)dataloader_num_sequences(&run->train),
           o->val_data[0] == '\0' ? " | no validation (--val-data)" : "");
    printf("schedule  %lld steps of %s%d x %lld sequences | lr %g -> %g, warm-up %lld | seed %lld\n",
           (long long)o->steps, ranks, run->step.micro_batches, (long long)o->batch, o->lr, o->lr_min,
           (long long)run->step.schedule.warmup, (long long)o->seed);
    if (has_lambda(run)) {
        printf("sparsity  target %.4f | lambda %g, alpha %g\n", target_sparsity(*r),
               (double)run->state.sparsity.lambda, o->alpha);
    }
    printf("output    %s | %d threads\n", run->options.out, threads);
    fflush(stdout);
}

// Do all ranks see the folder that they are to save into? The first checkpoint would be late to ask
static inline void check_out_is_shared(Run *run) {
    char folder[PATH_SIZE];
    check_format(folder, sizeof(folder), "%.2000s/.tmp_step_shared", run->options.out);
    if (run->ranks.count == 1) {
        return;
    }
    if (run->ranks.rank == 0) {
        make_folder(folder);
    }
    check_shared_folder(&run->ranks, folder);
    if (run->ranks.rank == 0) {
        remove_folder(folder);
    }
}

static inline void open_log(Run *run) {
    char name[64], folder[PATH_SIZE];
    if (run->ranks.rank == 0) {
        make_folder(run->options.out);
        run->lock = run->lock < 0 ? lock_folder(run->options.out, "trains") : run->lock;
    }
    check_out_is_shared(run);
    if (run->ranks.rank > 0) { // rank 0 writes the log
        check_format(run->log_path, PATH_SIZE, "/dev/null");
        run->log = check_fopen(run->log_path, "ab", "");
        return;
    }
    check_format(name, sizeof(name), "step_%08lld", (long long)run->state.step);
    check_format(folder, sizeof(folder), "%.1900s/%s", run->options.out, name);
    if (run->options.resume[0] != '\0' && path_exists(folder)) {
        // to where the log is cut back: later checkpoints are of another future
        point_latest(run->options.out, name);
    }
    check_format(run->log_path, PATH_SIZE, "%.2000s/log.jsonl", run->options.out);
    log_cut(run->log_path, run->state.step);
    run->log = check_fopen(run->log_path, "ab", "choose another folder with --out");
}

static inline void close_run(Run *run) {
    if (run->log != NULL) {
        check_fclose(run->log, run->log_path);
    }
    if (run->tokenizer != NULL) {
        tokenizer_free(run->tokenizer);
    }
    if (wants_training(&run->options)) {
        prefetch_stop(&run->ahead);
    }
    dataloader_close(&run->train);
    statistics_close(run->statistics);
    flips_close(run->flips);
    trace_close(run->trace);
    domains_close(run->domains, run->num_domains);
    provenance_free(&run->provenance);
    free(run->inputs);
    free(run->targets);
    free(run->layer_sparsity);
    free(run->off_steps);
    free(run->stats.counts);
    model_close(run->model);
    ranks_close(&run->ranks);
    free(run);
}

// the folder that a new run writes to must not hold another one, or what is left of it
static inline void open_out(Run *run) {
    Options *o = &run->options;
    char out[PATH_SIZE];
    if (o->out[0] == '\0') {
        const char *name = o->load[0] != '\0' ? "loaded" : o->preset;
        default_out(out, name, router_name(run->config.router.method));
        check_format(o->out, OPTION_TEXT_SIZE, "%s", out);
    }
    if (o->resume[0] != '\0') {
        return;
    }
    if (writes_run(o) && path_exists(o->out)) {
        run->lock = lock_folder(o->out, "trains");
    }
    const char *found = run_in_folder(o->out);
    if (found != NULL) {
        die("%s already holds a run: %s\n"
            "  ---> choose another --out, or continue it with --resume %s (without a checkpoint: remove it)",
            o->out, found, o->out);
    }
    run->provenance.run = draw_run();
}

// The other ranks learn from rank 0 what the run is: it alone has read the checkpoint's options, followed its
// `latest` and locked the folder
static inline void read_options_together(Run *run, const char *program, int argc, const char *const *argv) {
    run->lock = -1;
    if (run->ranks.rank == 0) {
        run->lock =
            read_options(&run->options, &run->state, &run->provenance, program, argc, argv, run->ranks.count);
    }
    ranks_share(&run->ranks, &run->options, sizeof(run->options));
    ranks_share(&run->ranks, &run->state, sizeof(run->state));
}

// the folder that rank 0 has found for the run
static inline void open_out_together(Run *run) {
    if (run->ranks.rank == 0) {
        open_out(run);
    }
    ranks_share(&run->ranks, run->options.out, sizeof(run->options.out));
    ranks_share(&run->ranks, &run->provenance.run, sizeof(run->provenance.run));
}

// so many as were asked for; else the ranks of a machine share its cores
static inline void set_threads(const Run *run, int usual) {
#ifdef _OPENMP
    int threads = run->options.threads > 0 ? (int)run->options.threads : usual;
    if (threads > 0) {
        omp_set_num_threads(threads);
    }
#else
    (void)run;
    (void)usual;
#endif
}

// The ranks of a run, each a process from here on; nothing has touched a GPU yet. A question (--help) is
// answered by one, whatever variables of a launcher an earlier shell has left
static inline void open_ranks(Run *run, const char *build, int argc, const char *const *argv) {
    const Options *o = &run->options;
    run->ranks = ranks_alone();
    if (wants_answer(argc, argv)) {
        return;
    }
    if (!model_takes_ranks()) {
        if (options_given(argc, argv, "gpus")) {
            die_usage("--gpus: this trainer computes on the CPU\n  ---> ./train_remoecu --gpus N");
        }
        return;
    }
    read_launch_options(&run->options, argc, argv);
    run->launch = launch_ranks((int)o->gpus);
    ranks_open(&run->ranks, &run->launch, o->connect_minutes, o->watchdog_minutes, build, argc, argv);
    set_threads(run, run->ranks.count > 1 ? launch_threads(&run->launch) : 0);
}

static inline Run *open_run(const char *program, int argc, const char *const *argv) {
    Run *run = NEW(Run, 1);
    open_ranks(run, REMOE_VERSION, argc, argv);
    read_options_together(run, program, argc, argv);
    set_threads(run, 0);
    build_model(run);
    build_state(run, options_given(argc, argv, "lambda_init"));
    if (wants_training(&run->options)) {
        open_out_together(run);
    }
    open_data(run, options_given(argc, argv, "train_data"), options_given(argc, argv, "tokenizer"));
    run->started = seconds_now();
    return run;
}

#endif
