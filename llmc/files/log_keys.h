/*
The keys of log.jsonl, one table: the struct that a step fills, the row that is written of it (logger.h), and
the test that holds dev/doc/log.md to it, all walk LOG_TABLE. dev/doc/log.md says what each key means: unit
and equation.

    LOG(kind, presence, key)      the key is the field's name
    kind      INTEGER  int64_t                  REAL   double, null where it is not finite
              SECONDS  double, to milliseconds  RANGE  {min, mean, max}
              LAYERS   const double *, [L]      CELLS  const int64_t *, [L][E]
    presence  ALWAYS; KNOWN: a negative number, or NULL, leaves the key out

A validation's row has the keys of log_validation_keys. Shapes: L layers, E = E_tot experts.
*/
#ifndef LOG_KEYS_H
#define LOG_KEYS_H

#include <stddef.h>
#include <stdint.h>
// defines: offsetof, int64_t

#define LOG_TABLE(LOG)                                                                                       \
    LOG(INTEGER, ALWAYS, step)                                                                               \
    LOG(REAL, ALWAYS, lm_loss)                                                                               \
    LOG(REAL, ALWAYS, reg_loss)                                                                              \
    LOG(REAL, ALWAYS, lambda)                                                                                \
    LOG(REAL, ALWAYS, sparsity)                                                                              \
    LOG(INTEGER, ALWAYS, stage)                                                                              \
    LOG(LAYERS, ALWAYS, layer_sparsity)                                                                      \
    LOG(RANGE, ALWAYS, tokens_per_expert)                                                                    \
    LOG(INTEGER, ALWAYS, dead_experts)                                                                       \
    LOG(INTEGER, ALWAYS, zero_expert_tokens)                                                                 \
    LOG(REAL, ALWAYS, active_experts)                                                                        \
    LOG(REAL, ALWAYS, grad_norm)                                                                             \
    LOG(REAL, ALWAYS, lr)                                                                                    \
    LOG(REAL, ALWAYS, ms)                                                                                    \
    LOG(REAL, ALWAYS, tok_s)                                                                                 \
    LOG(REAL, ALWAYS, tflops)                                                                                \
    LOG(REAL, ALWAYS, tflops_active)                                                                         \
    LOG(REAL, KNOWN, mfu)                                                                                    \
    LOG(REAL, KNOWN, mfu_active)                                                                             \
    LOG(REAL, ALWAYS, mem_gb)                                                                                \
    LOG(SECONDS, ALWAYS, time)                                                                               \
    LOG(REAL, KNOWN, ms_waiting)                                                                             \
    LOG(INTEGER, KNOWN, stage2_step)                                                                         \
    LOG(INTEGER, KNOWN, stage3_step)                                                                         \
    LOG(REAL, KNOWN, flip_rate)                                                                              \
    LOG(REAL, KNOWN, flip_count)                                                                             \
    LOG(LAYERS, KNOWN, layer_flip_rate)                                                                      \
    LOG(CELLS, KNOWN, layer_expert_tokens)

typedef struct {
    int64_t min;
    double mean;
    int64_t max;
} LogRange;

#define LOG_TYPE_INTEGER int64_t
#define LOG_TYPE_REAL double
#define LOG_TYPE_SECONDS double
#define LOG_TYPE_RANGE LogRange
#define LOG_TYPE_LAYERS const double *
#define LOG_TYPE_CELLS const int64_t *
#define LOG_FIELD(kind, presence, key) LOG_TYPE_##kind key;

// what is said of a step
typedef struct {
    LOG_TABLE(LOG_FIELD)
    int layers, experts; // L and E of the lists
} StepRecord;

typedef enum { LOG_INTEGER, LOG_REAL, LOG_SECONDS, LOG_RANGE, LOG_LAYERS, LOG_CELLS } LogKind;
typedef enum { LOG_ALWAYS, LOG_KNOWN } LogPresence;

typedef struct {
    const char *name;
    LogKind kind;
    LogPresence presence;
    size_t offset; // in StepRecord
} LogKey;

#define LOG_KEY(kind, presence, key) {#key, LOG_##kind, LOG_##presence, offsetof(StepRecord, key)},

static inline const LogKey *log_keys(int *count) {
    static const LogKey keys[] = {LOG_TABLE(LOG_KEY)};
    *count = (int)(sizeof(keys) / sizeof(keys[0]));
    return keys;
}

enum { LOG_VALIDATION_KEYS = 4 };
static const char *const log_validation_keys[LOG_VALIDATION_KEYS] = {
    "step", "val_loss", "val_loss_after_first_segment", "domain"};

#endif
