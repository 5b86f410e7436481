/*
embedding.cuh and positions.h: forward copies rows, backward against the C loop for ids of every frequency, up
to one id everywhere, and for the first and last of the vocabulary; the plan names each position once.
*/
#ifndef TEST_CUDA_EMBEDDING_CUH
#define TEST_CUDA_EMBEDDING_CUH

#include "llmc/embedding.h"
#include "llmc/embedding.cuh"
#include "harness.cuh"

// id n of a text: mode 0: uniform; 1: the last id everywhere; 2: mostly the first and last; 3: each id once
static int embedding_test_id(int mode, int64_t n, int V) {
    uint32_t random = (uint32_t)(n * 2654435761u) >> 7;
    int uniform = (int)(random % (uint32_t)V);
    return mode == 0   ? uniform
           : mode == 1 ? V - 1
           : mode == 2 ? (random % 8 == 0 ? uniform
                          : random % 2    ? 0
                                          : V - 1)
                       : (int)(n % V);
}

// the plan, in host memory
static int *embedding_test_plan(const int *ids, int64_t N, int V) {
    int *memory = NEW(int, embedding_plan_ints(N)), *place = NEW(int, V);
    embedding_plan(embedding_plan_in(memory, N), ids, N, V, place);
    free(place);
    return memory;
}

// every position once, with the id its piece is for, ascending; pieces short enough, partial rows in turn
static void embedding_check_plan(const int *memory, const int *ids, int64_t N) {
    EmbeddingPlan plan = embedding_plan_in((int *)memory, N);
    int pieces = plan.counts[0], long_ids = plan.counts[1], at = 0, row = 0, l = -1, wrong = 0, id = -1;
    CHECK(pieces <= N && long_ids <= long_ids_most(N));
    for (int p = 0; p < pieces; p++) {
        int to = plan.piece_to[p];
        l += to < 0 && l + 1 < long_ids && plan.long_first[l + 1] == row; // a long id's first piece
        int next = to >= 0 ? to : plan.long_id[l];
        int count = plan.piece_first[p + 1] - plan.piece_first[p];
        wrong += plan.piece_first[p] != at || count < 1 || count > PIECE_POSITIONS;
        wrong += to < 0 ? -1 - to != row : next <= id; // ids ascend
        wrong += to < 0 && next < id;
        for (int i = 0; i < count; i++, at++) {
            wrong += ids[plan.position[at]] != next;
            wrong += (i > 0 || next == id) && plan.position[at] <= plan.position[at - 1];
        }
        row += to < 0;
        id = next;
    }
    CHECK(wrong == 0 && at == N && row <= partial_rows_most(N) && plan.long_first[long_ids] == row);
}

static void embedding_case(int mode, int64_t N, int V, int d) {
    int *ids = NEW(int, N);
    for (int64_t n = 0; n < N; n++) {
        ids[n] = embedding_test_id(mode, n, V);
    }
    float *table = host_random((int64_t)V * d, 1, 1.0f), *dout = host_random(N * d, 2, 1.0f);
    float *out = NEW(float, N *d), *dtable = host_random((int64_t)V * d, 3, 1.0f); // added to
    int *plan = embedding_test_plan(ids, N, V);
    embedding_check_plan(plan, ids, N);
    floatX *d_table = device_x(table, (int64_t)V * d), *d_dout = device_x(dout, N * d);
    floatX *d_out = device_new<floatX>(N * d);
    float *before = device_f(dtable, (int64_t)V * d), *again = device_f(dtable, (int64_t)V * d);
    float *partial = device_new<float>(partial_rows_most(N) * d);
    int *d_ids = device_i(ids, N), *d_plan = device_i(plan, (int64_t)embedding_plan_ints(N));
    embedding_forward(out, ids, table, N, d);
    embedding_forward(d_out, d_ids, d_table, N, d, 0);
    check_device("embedding out", d_out, out, N * d, 0.0);
    embedding_backward(dtable, dout, ids, N, d);
    embedding_backward(before, d_dout, embedding_plan_in(d_plan, N), partial, N, d, 0);
    embedding_backward(again, d_dout, embedding_plan_in(d_plan, N), partial, N, d, 0);
    check_device("embedding dtable", before, dtable, (int64_t)V * d, 1e-5); // fp32 sums in another order
    CHECK(device_hash(before, 4ll * V * d) == device_hash(again, 4ll * V * d));
    const void *taken[] = {d_table, d_dout, d_out, before, again, partial, d_ids, d_plan};
    for (const void *p : taken) {
        device_release(p);
    }
    float *mine[] = {table, dout, out, dtable};
    for (float *p : mine) {
        free(p);
    }
    free(ids);
    free(plan);
}

static void test_cuda_embedding(void) {
    for (int mode = 0; mode < 4; mode++) {
        embedding_case(mode, 300, 67, 24);
        embedding_case(mode, 17, 2048, 192);
    }
    embedding_case(0, 1, 1, 8);
    embedding_case(1, 64, 3, 8);    // exactly one piece
    embedding_case(1, 65, 3, 1000); // and one position more
    embedding_case(2, 1031, 50257, 8);
    if (!emulated()) {
        embedding_case(2, 65536, 50257, 768);
        embedding_case(1, 65536, 50257, 768);
    }
}

#endif
