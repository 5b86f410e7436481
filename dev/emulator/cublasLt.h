// emulator: the part of NVIDIA's cublasLt.h that remoe.c uses (see cuda_runtime.h beside), as plain loops on
// the CPU: D = alpha op(A) op(B) + beta C on column-major matrices of bf16 or fp32, summed in fp32. It holds
// callers to what they promised: leading dimensions, and the alignments the heuristic was told.
#ifndef EMULATOR_CUBLASLT_H
#define EMULATOR_CUBLASLT_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>
#include <vector>

typedef enum { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType_t;
typedef enum { CUBLAS_OP_N, CUBLAS_OP_T } cublasOperation_t;
typedef enum { CUBLAS_COMPUTE_32F = 68 } cublasComputeType_t;
typedef enum {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
} cublasStatus_t;
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB } cublasLtMatmulDescAttributes_t;
typedef enum {
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
} cublasLtMatmulPreferenceAttributes_t;
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

typedef struct EmulatorCublas *cublasLtHandle_t;
typedef struct {
    cublasOperation_t operation[2];
} cublasLtMatmulDescOpaque_t;
typedef struct {
    cudaDataType_t type;
    int64_t rows, cols, ld;
} cublasLtMatrixLayoutOpaque_t;
typedef struct {
    uint32_t align[4]; // of A, B, C, D
} cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulAlgo_t;
typedef struct {
    cublasLtMatmulAlgo_t algo;
} cublasLtMatmulHeuristicResult_t;

static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = NULL;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
    return CUBLAS_STATUS_SUCCESS;
}

static inline const char *cublasLtGetStatusString(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS         ? "success"
           : status == CUBLAS_STATUS_NOT_SUPPORTED ? "not emulated"
                                                   : "invalid value";
}

static inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDescOpaque_t *product, cublasComputeType_t,
                                                    cudaDataType_t) {
    product->operation[0] = product->operation[1] = CUBLAS_OP_N;
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDescOpaque_t *product,
                                                            cublasLtMatmulDescAttributes_t what,
                                                            const void *value, size_t) {
    memcpy(&product->operation[what], value, sizeof(cublasOperation_t));
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayoutOpaque_t *layout,
                                                      cudaDataType_t type, uint64_t rows, uint64_t cols,
                                                      int64_t ld) {
    *layout = {type, (int64_t)rows, (int64_t)cols, ld};
    return ld < (int64_t)rows ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t *preference) {
    for (uint32_t &align : preference->align) {
        align = 256;
    }
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t
cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t *preference,
                                     cublasLtMatmulPreferenceAttributes_t what, const void *value, size_t) {
    if (what <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES) {
        memcpy(&preference->align[what], value, sizeof(uint32_t));
    }
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t
cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDescOpaque_t *, cublasLtMatrixLayoutOpaque_t *,
                               cublasLtMatrixLayoutOpaque_t *, cublasLtMatrixLayoutOpaque_t *,
                               cublasLtMatrixLayoutOpaque_t *, cublasLtMatmulPreferenceOpaque_t *preference,
                               int, cublasLtMatmulHeuristicResult_t *result, int *found) {
    result->algo = *preference;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static inline float emulator_element(const void *matrix, cudaDataType_t type, int64_t i) {
    return type == CUDA_R_32F ? ((const float *)matrix)[i]
                              : __bfloat162float(((const __nv_bfloat16 *)matrix)[i]);
}

// op(matrix), or its transpose, as floats, column by column
static inline std::vector<float>
emulator_operand(const void *matrix, const cublasLtMatrixLayoutOpaque_t *layout, bool transpose) {
    int64_t rows = transpose ? layout->cols : layout->rows, cols = transpose ? layout->rows : layout->cols;
    std::vector<float> out((size_t)(rows * cols));
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t i = 0; i < rows; i++) {
            int64_t at = transpose ? i * layout->ld + j : j * layout->ld + i;
            out[(size_t)(j * rows + i)] = emulator_element(matrix, layout->type, at);
        }
    }
    return out;
}

// one product, with all that it needs: the caller's descriptions may be gone when it is computed
struct EmulatorProduct {
    bool trans_a, trans_b;
    float scale, keep;
    const void *A, *B, *C;
    void *D;
    cublasLtMatrixLayoutOpaque_t a, b, c, d;
};

static inline void emulator_product(const EmulatorProduct &p) {
    int64_t M = p.d.rows, N = p.d.cols, K = p.trans_a ? p.a.rows : p.a.cols;
    std::vector<float> rows = emulator_operand(p.A, &p.a, !p.trans_a); // [K, M]: sums run along memory
    std::vector<float> columns = emulator_operand(p.B, &p.b, p.trans_b);
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < N; j++) {
        for (int64_t i = 0; i < M; i++) {
            float sum = 0.0f;
            for (int64_t k = 0; k < K; k++) {
                sum += rows[(size_t)(i * K + k)] * columns[(size_t)(j * K + k)];
            }
            sum *= p.scale;
            if (p.keep != 0.0f) { // C is not read otherwise
                sum += p.keep * emulator_element(p.C, p.c.type, j * p.c.ld + i);
            }
            if (p.d.type == CUDA_R_32F) {
                ((float *)p.D)[j * p.d.ld + i] = sum;
            } else {
                ((__nv_bfloat16 *)p.D)[j * p.d.ld + i] = __float2bfloat16(sum);
            }
        }
    }
}

static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDescOpaque_t *product,
                                            const void *alpha, const void *A, cublasLtMatrixLayoutOpaque_t *a,
                                            const void *B, cublasLtMatrixLayoutOpaque_t *b, const void *beta,
                                            const void *C, cublasLtMatrixLayoutOpaque_t *c, void *D,
                                            cublasLtMatrixLayoutOpaque_t *d,
                                            const cublasLtMatmulAlgo_t *algorithm, void *, size_t,
                                            cudaStream_t stream) {
    const void *pointers[4] = {A, B, C, D};
    for (int i = 0; i < 4; i++) {
        if ((uintptr_t)pointers[i] % algorithm->align[i] != 0) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
    }
    bool trans_a = product->operation[0] == CUBLAS_OP_T, trans_b = product->operation[1] == CUBLAS_OP_T;
    int64_t M = trans_a ? a->cols : a->rows, K = trans_a ? a->rows : a->cols, N = trans_b ? b->rows : b->cols;
    if ((trans_b ? b->cols : b->rows) != K || d->rows != M || d->cols != N || c->rows != M || c->cols != N) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    EmulatorProduct p = {trans_a, trans_b, scale, keep, A, B, C, D, *a, *b, *c, *d};
    emulator::queue(stream, [p]() { emulator_product(p); });
    return CUBLAS_STATUS_SUCCESS;
}

#endif
