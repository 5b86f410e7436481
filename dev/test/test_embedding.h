/*
embedding.h: rows copied, their gradients summed in the order of the tokens, whatever the threads.
*/
#ifndef TEST_EMBEDDING_H
#define TEST_EMBEDDING_H

#include "llmc/embedding.h"
#include "harness.h"

static void embedding_check(int N, int V, int d) {
    enum { MOST = 10000 };
    static float table[MOST], out[MOST], dout[MOST], dtable[2][MOST], want[MOST];
    int ids[200], wrong = 0;
    fill_uniform(table, (size_t)(V * d), 1, 1.0f);
    fill_uniform(dout, (size_t)(N * d), 2, 1.0f);
    fill_uniform(want, (size_t)(V * d), 3, 1.0f); // gradients are added to
    memcpy(dtable[0], want, sizeof(want));
    memcpy(dtable[1], want, sizeof(want));
    for (int n = 0; n < N; n++) {
        ids[n] = n * n % V; // many repeated, some never
        for (int c = 0; c < d; c++) {
            want[ids[n] * d + c] += dout[n * d + c];
        }
    }
    embedding_forward(out, ids, table, N, d);
    for (int n = 0; n < N; n++) {
        wrong += memcmp(out + n * d, table + ids[n] * d, (size_t)d * sizeof(float)) != 0;
    }
    for (int threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        embedding_backward(dtable[threads - 1], dout, ids, N, d); // the same sums, so the same bits
        wrong += memcmp(dtable[threads - 1], want, (size_t)(V * d) * sizeof(float)) != 0;
    }
    CHECK(wrong == 0);
}

static void test_embedding(void) {
    embedding_check(60, 67, 130);
    embedding_check(200, 7, 5);
    embedding_check(1, 1, 1);
}

#endif
