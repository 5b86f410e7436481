/*
The command line's one table: every option of both trainers. How it is read, shown and saved: options.h.

    OPTION(kind, scope, field, default, least, most, what it means)
    kind:  INT (int64), REAL (double), TEXT (least: the fewest bytes that may be given), FLAG (0 or 1;
           `--eval` alone means 1), MODE (a flag that has further words: option_modes)
    scope: SHAPE, sizes of the model, and ROUTING, how it routes: a loaded model has decided them, so they are
           refused beside --load and --resume
           RUN, which a resumed run keeps unless it is given anew; ONCE, of this process alone
*/
#ifndef OPTION_TABLE_H
#define OPTION_TABLE_H

#include "llmc/router.h"
// defines: ROUTER_NAMES

#define OPTION_TABLE(OPTION)                                                                                 \
    OPTION(TEXT, SHAPE, preset, "tiny", 0, 0,                                                                \
           "tiny, small, medium or large: a set of the options below (the paper's Table 1)")                 \
    OPTION(TEXT, ROUTING, router, "relu", 0, 0,                                                              \
           "how tokens find their experts (ReMoE: relu), one of:" ROUTER_NAMES)                              \
    OPTION(INT, ROUTING, experts, "8", 1, 65536, "E, experts at granularity 1")                              \
    OPTION(INT, ROUTING, active, "1", 1, 65536, "k, experts that a token should use on average, of E")       \
    OPTION(INT, ROUTING, granularity, "1", 1, 65536,                                                         \
           "G: E*G experts of width F/G, k*G of them active (Eq. 12, 13)")                                   \
    OPTION(INT, SHAPE, layers, "3", 1, 1024, "L, transformer layers")                                        \
    OPTION(INT, SHAPE, hidden, "192", 2, 65536, "d, width of the residual stream")                           \
    OPTION(INT, SHAPE, heads, "6", 1, 1024, "H, query heads")                                                \
    OPTION(INT, SHAPE, kv_heads, "2", 1, 1024, "KV, key/value heads; H must be a multiple")                  \
    OPTION(INT, SHAPE, ffn_mult, "4", 1, 1024,                                                               \
           "an expert is ffn_mult * d / G wide (Dense x8: --router dense --ffn-mult 32)")                    \
    OPTION(INT, SHAPE, vocab_size, "2048", 1, 65536,                                                         \
           "V, rows of the embedding; at least the tokenizer's ids")                                         \
    OPTION(FLAG, ROUTING, load_balance, "1", 0, 1,                                                           \
           "f_le of Eq. 11 in the regulariser (relu); the auxiliary loss (topk); the biases (auxfree)")      \
    OPTION(REAL, ROUTING, router_jitter, "0.1", 0, 1e3,                                                      \
           "sparsemixer: r, how far below the best a candidate may be")                                      \
    OPTION(INT, ROUTING, segment_length, "48", 1, 1048576,                                                   \
           "lory: S, tokens of a segment, whose experts are merged by the segment before")                   \
    OPTION(REAL, RUN, aux_coeff, "0.01", 0, 1e6, "weight of the auxiliary loss (topk, sparsemixer)")         \
    OPTION(REAL, RUN, bias_rate, "0.001", 0, 1e3, "auxfree: what a step adds to an expert's bias, or takes") \
    OPTION(REAL, RUN, lambda_init, "1e-8", 0, 1e30,                                                          \
           "lambda_0, the regulariser's first weight (also --lambda)")                                       \
    OPTION(REAL, RUN, alpha, "1.2", 1, 1e3, "lambda's factor per step (Eq. 7)")                              \
    OPTION(INT, RUN, topk_warmup_steps, "0", 0, INT64_MAX,                                                   \
           "topk: near-dense first steps (the paper's Appendix H)")                                          \
    OPTION(INT, RUN, topk_warmup_k, "6", 1, 65536, "topk: k during those steps")                             \
    OPTION(TEXT, RUN, train_data, "build/sample/train_*.bin", 1, 0,                                          \
           "token shards: globs, optionally weighted: a*:0.7,b*:0.3 (also --data)")                          \
    OPTION(TEXT, RUN, val_data, "build/sample/val.*.bin", 0, 0,                                              \
           "validation shards, one per domain: val.DOMAIN.bin ('': no validation)")                          \
    OPTION(TEXT, RUN, tokenizer, "build/sample", 0, 0,                                                       \
           "folder with vocab.json and merges.txt, or tokenizer.json, to show samples ('': none)")           \
    OPTION(INT, RUN, batch, "16", 1, 65536, "B, sequences per micro-batch and rank")                         \
    OPTION(INT, RUN, seq_len, "192", 1, 1048576, "T, tokens per sequence")                                   \
    OPTION(INT, RUN, global_batch, "0", 0, 1 << 24, "sequences per step (0: one micro-batch)")               \
    OPTION(INT, RUN, steps, "400", 1, 1e12, "optimizer steps of the whole run")                              \
    OPTION(REAL, RUN, lr, "5e-4", 0, 1e3, "largest learning rate")                                           \
    OPTION(REAL, RUN, lr_min, "5e-5", 0, 1e3, "learning rate of the last step")                              \
    OPTION(INT, RUN, warmup_steps, "-1", -1, INT64_MAX, "steps of linear warm-up (-1: 1 % of the steps)")    \
    OPTION(REAL, RUN, weight_decay, "0.01", 0, 1e3, "AdamW's, on tensors of 2 or more dimensions")           \
    OPTION(REAL, RUN, grad_clip, "1", 0, 1e30, "largest gradient norm (0: no clipping)")                     \
    OPTION(INT, RUN, seed, "1234", 0, INT64_MAX, "of the weights, the data order and the samples")           \
    OPTION(FLAG, RUN, shuffle, "1", 0, 1,                                                                    \
           "visit the training windows in a seeded random order (0: shard order)")                           \
    OPTION(TEXT, RUN, out, "", 1, 0,                                                                         \
           "folder of the run: log.jsonl and checkpoints (default: runs/PRESET-ROUTER, numbered)")           \
    OPTION(INT, RUN, save_every, "0", 0, INT64_MAX, "steps between checkpoints (0: only the last)")          \
    OPTION(INT, RUN, keep, "2", 0, INT64_MAX, "newest checkpoints to keep (0: all)")                         \
    OPTION(TEXT, ONCE, save_dtype, "f32", 0, 0, "weights of an export: f32 or bf16")                         \
    OPTION(INT, RUN, val_every, "0", 0, INT64_MAX, "steps between validations (0: only after the last)")     \
    OPTION(INT, RUN, val_batches, "20", 1, 1e12, "micro-batches per validation and domain, at most")         \
    OPTION(INT, RUN, flip_every, "0", 0, INT64_MAX,                                                          \
           "steps between counts of what an update changes in the routing (Eq. 14; 0: none)")                \
    OPTION(INT, RUN, log_experts_every, "0", 0, INT64_MAX,                                                   \
           "steps between rows of the log with the tokens of each layer and expert (0: none)")               \
    OPTION(INT, RUN, sample_every, "0", 0, INT64_MAX, "steps between samples (0: only after the last)")      \
    OPTION(INT, RUN, sample_tokens, "256", 0, INT64_MAX,                                                     \
           "tokens to generate per sample, and of --generate where a request does not say")                  \
    OPTION(TEXT, ONCE, resume, "", 1, 0, "continue a run: a checkpoint, a run's folder, or 'latest'")        \
    OPTION(TEXT, ONCE, load, "", 1, 0,                                                                       \
           "start from the weights of this checkpoint folder (moments and lambda if it has them)")           \
    OPTION(TEXT, ONCE, dump, "", 1, 0,                                                                       \
           "write one micro-batch's losses, gates and gradients to this file; no training")                  \
    OPTION(TEXT, ONCE, route_from, "", 1, 0, "with --dump: take the active experts from this earlier dump")  \
    OPTION(TEXT, ONCE, export_to, "", 1, 0,                                                                  \
           "write --load's model to this new folder, for Hugging Face's libraries (also --export)")          \
    OPTION(FLAG, ONCE, eval, "0", 0, 1, "validation only")                                                   \
    OPTION(TEXT, ONCE, stats, "", 1, 0,                                                                      \
           "with --eval: write to this file which experts take which tokens of all validation data")         \
    OPTION(TEXT, ONCE, stats_layers, "middle", 0, 0,                                                         \
           "with --stats: layers whose experts are counted by token id: middle or all")                      \
    OPTION(INT, ONCE, stats_tokens, "0", 0, INT64_MAX, "with --stats: tokens of each domain (0: all)")       \
    OPTION(TEXT, ONCE, trace, "", 1, 0,                                                                      \
           "write each token's experts, gates and loss to this file (with --load: only that)")               \
    OPTION(TEXT, ONCE, text, "", 1, 0, "with --trace: this text, instead of the first validation data")      \
    OPTION(INT, ONCE, trace_tokens, "2048", 2, 1 << 24, "with --trace: the first tokens, so many at most")   \
    OPTION(TEXT, ONCE, sample, "", 0, 0,                                                                     \
           "continue this prompt and stop (with --load); -: prompts from standard input, one a line")        \
    OPTION(INT, ONCE, samples, "1", 1, 1e9, "with --sample: continuations to write")                         \
    OPTION(TEXT, ONCE, score, "", 1, 0,                                                                      \
           "log likelihoods of this file's requests (JSON Lines) to the file --out (with --load)")           \
    OPTION(TEXT, ONCE, delimiter, " ", 0, 0, "with --score: what stands between a query and its choices")    \
    OPTION(TEXT, ONCE, generate, "", 1, 0,                                                                   \
           "continue this file's contexts (JSON Lines) into the file --out (with --load)")                   \
    OPTION(REAL, RUN, temperature, "0.8", 0, 1e3, "of samples (0: always the likeliest token)")              \
    OPTION(INT, RUN, top_k, "50", 0, 1 << 24, "sample among so many likeliest tokens (0: all)")              \
    OPTION(FLAG, RUN, overfit_batch, "0", 0, 1,                                                              \
           "train on the first batch again and again: a check that learning works")                          \
    OPTION(REAL, RUN, max_minutes, "0", 0, 1e9, "save and stop after so long (0: no limit)")                 \
    OPTION(INT, RUN, threads, "0", 0, 4096, "OpenMP threads (0: as many as cores)")                          \
    OPTION(TEXT, RUN, kernels, "auto", 0, 0,                                                                 \
           "CUDA: kernels of experts and attention: portable, hopper, or auto (the fastest there is)")       \
    OPTION(REAL, RUN, pair_budget, "0", 0, 1e6,                                                              \
           "CUDA: GB of pair storage kept for the backward pass (0: what memory is left over)")              \
    OPTION(FLAG, RUN, recompute, "0", 0, 1,                                                                  \
           "CUDA: normalised inputs are not kept but computed again in backward: less memory, same bits")    \
    OPTION(INT, ONCE, gpus, "0", 0, 64,                                                                      \
           "CUDA: ranks to start on this machine, a process and a GPU each (0: one, or as a launcher says)") \
    OPTION(FLAG, ONCE, zero, "1", 0, 1,                                                                      \
           "CUDA: ranks divide masters and moments among them (ZeRO-1); 0: each keeps all, the same bits")   \
    OPTION(TEXT, ONCE, comm, "auto", 0, 0,                                                                   \
           "CUDA: what carries data between ranks: copies (one machine's copy engines), nccl, or auto")      \
    OPTION(REAL, ONCE, connect_minutes, "5", 1e-3, 1e6, "how long ranks wait for each other at the start")   \
    OPTION(REAL, ONCE, watchdog_minutes, "10", 0, 1e6,                                                       \
           "a rank that stands still so long ends the run (0: never)")                                       \
    OPTION(MODE, ONCE, bench, "0", 0, 3,                                                                     \
           "reach the target sparsity, then time whole steps; or `--bench forward`, `--bench sample`")

#endif
