/*
Dense linear layers by cuBLASLt: attention's projections, the head and the router's logits. (The experts'
products are grouped_gemm.cuh's.)

    C[M, N] = op(A)[M, K] op(B)[K, N] + addend           row-major, with leading dimensions
    out = inp W^T          dinp = dout W          dW += dout^T inp          a linear layer, W [OC, C]

Operands are floatX, products are summed in fp32, and the addend is added before the one rounding to C's type:
a residual or a gradient that accumulates costs neither a pass of its own nor a second rounding. In the fp32
build cuBLASLt computes in true fp32, never TF32.

cuBLASLt knows matrices by columns. A row-major [rows, cols] is its [cols, rows], so it is asked for
C^T = op(B)^T op(A)^T: its first operand is our B, and each matrix keeps its own transposition.

Plans. Describing a product and asking for an algorithm takes the host longer than small products take the
device, so it is done once a shape; a table keeps the newest GEMM_MOST_PLANS. The algorithm is the first that
cuBLASLt's heuristic names, which is a function of shape, device and version alone: nothing is timed, a run
and its repeat get the same bits. Where the sum over K is divided among blocks ("split K"), only the scheme is
allowed that keeps the parts in fp32 in the workspace and adds them in a second step, in order.

Alignment. cuBLASLt takes 256 bytes for granted unless it is told what addresses to expect. We tell it only
the address modulo 16 (its widest access). So the chosen algorithm, hence the bits, do not depend on where a
buffer happens to lie. Odd leading dimensions (E = 3 logits) it sees in the layouts.

The router's weights are read from their fp32 masters although tensor cores multiply bf16 numbers. An fp32
number has 24 significant bits, a bf16 number 8; and the rounding error of an fp32 number to bf16 is again an
fp32 number. So, without any error (short of underflow below 2^-126),

    w = hi + mid + lo,   hi = bf16(w),  mid = bf16(w - hi),  lo = bf16(w - hi - mid)

and three products, each of exact terms summed in fp32, make the logits what one product in fp32 would be.
(One call computes them, of [hi; mid; lo], 3E outputs.) The smallest is added first. The exactness is worth
its cost, since a logit that crosses 0 or another logit changes the route.

Shapes: N tokens, C inputs, OC outputs, E experts. Errors: a failed call ends the program with its status. The
workspace serves one stream at a time.
*/
#ifndef MATMUL_CUH
#define MATMUL_CUH

#include "llmc/gpu/cuda_common.cuh"
#include <algorithm>
#include <cublasLt.h>
#include <type_traits>
// defines: cublasLtMatmul, cublasLtMatmulAlgoGetHeuristic, std::common_type_t, std::min

enum { GEMM_MOST_PLANS = 64 };

#define CUBLAS_CHECK(call) cublas_check((call), #call, __FILE__, __LINE__)

static inline void cublas_check(cublasStatus_t status, const char *call, const char *file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS) {
        die("cuBLASLt: %s (%s:%d: %s)", cublasLtGetStatusString(status), file, line, call);
    }
}

// what a plan is made for: all of one type, so that two can be compared as bytes
typedef struct {
    int64_t trans_a, trans_b, M, N, K;
    int64_t lda, ldb, ldc;
    int64_t type_c;
    int64_t align_a, align_b, align_c, align_addend;
} GemmShape;

typedef struct {
    GemmShape shape;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} GemmPlan;

// (matmul.h has a Gemm, which is one product)
typedef struct {
    cublasLtHandle_t handle;
    void *workspace; // device
    size_t workspace_bytes;
    GemmPlan plans[GEMM_MOST_PLANS]; // the newest, in a ring
    int64_t made;                    // plans so far
} GemmPlans;

// workspace: device memory, a multiple of 256; 32 MB let cuBLASLt have its way on Hopper
static inline void gemm_open(GemmPlans *gemm, void *workspace, size_t workspace_bytes) {
    memset(gemm, 0, sizeof(*gemm));
    CUBLAS_CHECK(cublasLtCreate(&gemm->handle));
    gemm->workspace = workspace;
    gemm->workspace_bytes = workspace_bytes;
}

static inline void gemm_close(GemmPlans *gemm) {
    CUBLAS_CHECK(cublasLtDestroy(gemm->handle));
    memset(gemm, 0, sizeof(*gemm));
}

// ----------------------------------------------------------------------------
// plans

template <class T> static inline cudaDataType_t gemm_type() {
    return sizeof(T) == sizeof(float) ? CUDA_R_32F : CUDA_R_16BF;
}

// the largest power of two, 16 at most, that divides the address
static inline int64_t gemm_alignment(const void *p) {
    uintptr_t address = (uintptr_t)p | 16;
    return (int64_t)(address & (~address + 1));
}

template <class T>
static inline void gemm_prefer(cublasLtMatmulPreferenceOpaque_t *preference,
                               cublasLtMatmulPreferenceAttributes_t what, T value) {
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof(value)));
}

static inline void gemm_describe(GemmPlan *plan, GemmShape s) {
    cublasOperation_t first = s.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N; // cuBLASLt's first operand is our B
    cublasOperation_t second = s.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    plan->shape = s;
    CUBLAS_CHECK(cublasLtMatmulDescInit(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof(first)));
    CUBLAS_CHECK(
        cublasLtMatmulDescSetAttribute(&plan->product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof(second)));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan->b, gemm_type<floatX>(), s.trans_b ? s.K : s.N,
                                          s.trans_b ? s.N : s.K, s.ldb));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan->a, gemm_type<floatX>(), s.trans_a ? s.M : s.K,
                                          s.trans_a ? s.K : s.M, s.lda));
    CUBLAS_CHECK(cublasLtMatrixLayoutInit(&plan->c, (cudaDataType_t)s.type_c, s.N, s.M, s.ldc));
}

static inline void gemm_choose_algorithm(GemmPlan *plan, const GemmPlans *gemm) {
    GemmShape s = plan->shape;
    cublasLtMatmulPreferenceOpaque_t wish;
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&wish));
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)gemm->workspace_bytes);
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE); // or no split
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)s.align_b);
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)s.align_a);
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)s.align_addend);
    gemm_prefer(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)s.align_c);
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(gemm->handle, &plan->product, &plan->b, &plan->a,
                                                           &plan->c, &plan->c, &wish, 1, &result, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found < 1) {
        die("cuBLASLt has no algorithm for [%lld, %lld] = [%lld, %lld] x [%lld, %lld] (leading dimensions "
            "%lld, %lld, %lld): %s",
            (long long)s.M, (long long)s.N, (long long)s.M, (long long)s.K, (long long)s.K, (long long)s.N,
            (long long)s.ldc, (long long)s.lda, (long long)s.ldb, cublasLtGetStatusString(status));
    }
    plan->algorithm = result.algo;
}

// The newest are the likeliest. A training step has about 20 shapes; only sampling, with a new length each
// token, goes round the ring
static inline GemmPlan *gemm_plan(GemmPlans *gemm, GemmShape shape) {
    int64_t kept = std::min<int64_t>(gemm->made, GEMM_MOST_PLANS);
    for (int64_t i = 0; i < kept; i++) {
        if (memcmp(&gemm->plans[i].shape, &shape, sizeof(shape)) == 0) {
            return &gemm->plans[i];
        }
    }
    GemmPlan *plan = &gemm->plans[gemm->made++ % GEMM_MOST_PLANS];
    gemm_describe(plan, shape);
    gemm_choose_algorithm(plan, gemm);
    return plan;
}

// ----------------------------------------------------------------------------
// products

// C[M, N] = op(A)[M, K] op(B)[K, N] + addend (NULL: 0; may be C itself; its leading dimension is ldc), K > 0.
// trans_a: A is stored [K, M] (else [M, K]); trans_b: B is stored [N, K] (else [K, N]). T is floatX or float.
// (common_type_t is T in a place from which it is not deduced, so that NULL will do)
template <class T>
static inline void gemm(GemmPlans *gemm, int trans_a, int trans_b, int64_t M, int64_t N, int64_t K,
                        const floatX *A, int64_t lda, const floatX *B, int64_t ldb, T *C, int64_t ldc,
                        const std::common_type_t<T> *addend, cudaStream_t stream) {
    if (M <= 0 || N <= 0) {
        return;
    }
    const float one = 1.0f, beta = addend != NULL ? 1.0f : 0.0f; // in host memory, cuBLASLt's default
    const T *from = addend != NULL ? addend : C;
    GemmShape shape = {trans_a != 0,
                       trans_b != 0,
                       M,
                       N,
                       K,
                       lda,
                       ldb,
                       ldc,
                       (int64_t)gemm_type<T>(),
                       gemm_alignment(A),
                       gemm_alignment(B),
                       gemm_alignment(C),
                       gemm_alignment(from)};
    GemmPlan *plan = gemm_plan(gemm, shape);
    CUBLAS_CHECK(cublasLtMatmul(gemm->handle, &plan->product, &one, B, &plan->b, A, &plan->a, &beta, from,
                                &plan->c, C, &plan->c, &plan->algorithm, gemm->workspace,
                                gemm->workspace_bytes, stream));
}

// out[N, OC] = inp[N, C] weight[OC, C]^T
static inline void matmul_forward(floatX *out, const floatX *inp, const floatX *weight, int64_t N, int C,
                                  int OC, GemmPlans *plans, cudaStream_t stream) {
    gemm(plans, 0, 1, N, OC, C, inp, C, weight, C, out, OC, NULL, stream);
}

// dinp[N, C] = dout[N, OC] weight[OC, C] (may be NULL); dweight[OC, C] += dout^T inp, fp32 (may be NULL)
static inline void matmul_backward(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp,
                                   const floatX *weight, int64_t N, int C, int OC, GemmPlans *plans,
                                   cudaStream_t stream) {
    if (dinp != NULL) {
        gemm(plans, 0, 0, N, C, OC, dout, OC, weight, C, dinp, C, NULL, stream);
    }
    if (dweight != NULL && N > 0) {
        gemm(plans, 1, 0, OC, C, N, dout, OC, inp, C, dweight, C, dweight, stream);
    }
}

// ----------------------------------------------------------------------------
// the router's logits

// floats that router_logits wants: a row's of three parts, for as many rows as stay in L2
static inline int64_t router_sums_floats(int64_t N, int E) {
    const int64_t most = 6 << 20, row = 3 * (int64_t)E;
    return row * std::min<int64_t>(N, std::max<int64_t>(most / row / 256 * 256, 256));
}

#ifdef PRECISION_FP32
// logits[N, E] = x[N, d] w[E, d]^T; parts and sums are not used
static inline void router_logits(float *logits, const floatX *x, const float *w, int64_t N, int d, int E,
                                 floatX *parts, float *sums, GemmPlans *plans, cudaStream_t stream) {
    (void)parts, (void)sums;
    gemm(plans, 0, 1, N, E, d, x, d, w, d, logits, E, NULL, stream);
}
#else
// Hi, mid and lo of a weight are what three calls return: each takes what bf16 can hold of the rest
__device__ __forceinline__ floatX next_part(float &rest) {
    floatX part = to_x(rest);
    rest -= to_float(part);
    return part;
}

// a logit from its three products
__device__ __forceinline__ float add_parts(float lo, float mid, float hi) {
    return lo + mid + hi;
}

// parts[0..n) + parts[n..2n) + parts[2n..3n) = w, exactly
static __global__ void __launch_bounds__(256) split_weights_kernel(floatX *parts, const float *w, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float rest = w[i];
        for (int part = 0; part < 3; part++) {
            parts[part * n + i] = next_part(rest);
        }
    }
}

// logits[n, e] = the sum over the parts of sums[n, part E + e]
static __global__ void __launch_bounds__(256)
    add_parts_kernel(float *logits, const float *sums, int64_t N, int E) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < N * E) {
        const float *first = sums + i / E * 3 * E + i % E;
        logits[i] = add_parts(first[2 * E], first[E], first[0]);
    }
}

// logits[N, E] = x[N, d] w[E, d]^T with w in fp32; parts [3 E d], sums [router_sums_floats]
static inline void router_logits(float *logits, const floatX *x, const float *w, int64_t N, int d, int E,
                                 floatX *parts, float *sums, GemmPlans *plans, cudaStream_t stream) {
    int64_t n = (int64_t)E * d, most = router_sums_floats(N, E) / (3 * E);
    launch(split_weights_kernel, dim3((unsigned)ceil_div<int64_t>(n, 256)), 256, 0, stream, parts, w, n);
    for (int64_t first = 0; first < N; first += most) { // x is read once
        int64_t rows = std::min(N - first, most);
        gemm(plans, 0, 1, rows, 3 * E, d, x + first * d, d, parts, d, sums, 3 * E, NULL, stream);
        launch(add_parts_kernel, dim3((unsigned)ceil_div<int64_t>(rows * E, 256)), 256, 0, stream,
               logits + first * E, sums, rows, E);
    }
}
#endif

#endif
