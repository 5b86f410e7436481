/*
The learning rate of step i of `steps`: linear warm-up over W steps, then a cosine that reaches lr_min at the
last step.

    lr(i) = lr_max (i + 1) / W                                                        i < W
    lr(i) = lr_min + (lr_max - lr_min) (1 + cos(pi (i - W) / (steps - 1 - W))) / 2    i >= W

W is 1 % of the steps (rounded down) unless given. In double; steps beyond the last keep lr_min.
*/
#ifndef SCHEDULE_H
#define SCHEDULE_H

#include <math.h>
#include <stdint.h>
// defines: cos, int64_t

typedef struct {
    double lr_max, lr_min;
    int64_t warmup, steps;
} Schedule;

static inline double schedule_lr(Schedule schedule, int64_t step) {
    if (step < schedule.warmup) {
        return schedule.lr_max * (double)(step + 1) / (double)schedule.warmup;
    }
    if (step >= schedule.steps - 1) {
        return schedule.lr_min;
    }
    double progress = (double)(step - schedule.warmup) / (double)(schedule.steps - 1 - schedule.warmup);
    return schedule.lr_min +
           0.5 * (schedule.lr_max - schedule.lr_min) * (1.0 + cos(3.14159265358979323846 * progress));
}

#endif
