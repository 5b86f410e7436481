/*
Votes: what the ranks tell each other at the end of a step, so that all of them do the same next.

    a rank's row   Vote: its sums, whether a layer overflowed its plan, whether it wants the run to end
                   counts [L, E] tokens per expert; rows [L] most rows of a micro-batch
    vote_kernel    writes the own row; comm_votes (comm.cuh) brings everyone's to everyone
    count_votes    adds them up on the host, by rank

Sums are added in rank order, so every rank has the same bits. Errors: none.
*/
#ifndef VOTES_CUH
#define VOTES_CUH

#include "llmc/gpu/model_memory.cuh"
// defines: Model, Vote, vote_bytes, StepSums, StepStats

// the own row: what this rank has summed up; stop: whether it wants the run to end
static __global__ void vote_kernel(unsigned char *row, const StepSums *sums, const int *overflow, int stop,
                                   const int64_t *counts, int cells, const int *rows, int layers) {
    Vote *vote = (Vote *)row;
    int64_t *vote_counts = (int64_t *)(vote + 1);
    int *vote_rows = (int *)(vote_counts + cells);
    if (threadIdx.x == 0) {
        vote->sums = *sums;
        vote->overflow = *overflow;
        vote->stop = stop;
    }
    for (int i = (int)threadIdx.x; i < cells; i += (int)blockDim.x) {
        vote_counts[i] = counts[i];
    }
    for (int l = (int)threadIdx.x; l < layers; l += (int)blockDim.x) {
        vote_rows[l] = rows[l];
    }
}

static unsigned char *own_vote(const Model *m) {
    return (unsigned char *)m->comm.regions[REGION_VOTES].own + m->comm.rank * vote_bytes(m);
}

// adds up the ranks' votes, by rank; rows [L]: the most of any. Returns whether a layer had too many
static int count_votes(const Model *m, const unsigned char *votes, StepStats *s, int *rows) {
    int L = m->config.layers, cells = L * m->config.router.experts, overflow = 0;
    for (int p = 0; p < m->comm.ranks; p++) {
        const Vote *vote = (const Vote *)(votes + p * vote_bytes(m));
        const int64_t *counts = (const int64_t *)(vote + 1);
        const int *its_rows = (const int *)(counts + cells);
        s->active += vote->sums.routing.active;
        s->zero_expert += vote->sums.routing.zero_expert;
        s->lm_loss += vote->sums.lm_loss;
        s->reg_loss += vote->sums.reg_loss;
        s->stop |= vote->stop;
        overflow |= vote->overflow;
        for (int i = 0; i < cells; i++) {
            s->counts[i] += counts[i];
        }
        for (int l = 0; l < L; l++) {
            rows[l] = its_rows[l] > rows[l] ? its_rows[l] : rows[l];
        }
    }
    return overflow;
}

#endif
