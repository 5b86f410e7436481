/*
Rotary position embedding (Su et al., 2021), rotate-half layout, over the full head size.

    angle(t, i) = t theta^(-2i / hd),  i = 0 .. hd/2 - 1
    forward   (x_i, x_{i + hd/2}) <- (x_i cos - x_{i + hd/2} sin,  x_{i + hd/2} cos + x_i sin)
    backward  the same rotation by minus the angle

x [B, T, stride]: the first `heads` blocks of hd columns are rotated in place (queries and keys lie side by
side in the qkv buffer, values behind them stay as they are). Positions are start .. start + T - 1, never
reset at document ends. table [T_max, hd]: cosines then sines of one position a row, computed in double (fp32
angles near t = 1024 would lose 4 digits).
*/
#ifndef ROPE_H
#define ROPE_H

#include <math.h>
#include <stdint.h>
// defines: pow, cos, sin, int64_t

static inline void rope_table(float *table, int T, int hd, double theta) {
#pragma omp parallel for schedule(static)
    for (int t = 0; t < T; t++) {
        for (int i = 0; i < hd / 2; i++) {
            double angle = t * pow(theta, -2.0 * i / hd);
            table[(int64_t)t * hd + i] = (float)cos(angle);
            table[(int64_t)t * hd + hd / 2 + i] = (float)sin(angle);
        }
    }
}

// direction: 1 forward, -1 backward
static inline void rope_rotate(float *x, const float *table, int B, int T, int start, int heads, int hd,
                               int stride, float direction) {
    int half = hd / 2;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < (int64_t)B * T; n++) {
        const float *cosine = table + (start + n % T) * hd;
        const float *sine = cosine + half;
        for (int h = 0; h < heads; h++) {
            float *low = x + n * stride + h * hd;
            float *high = low + half;
            for (int i = 0; i < half; i++) {
                float a = low[i];
                float b = high[i];
                low[i] = a * cosine[i] - b * direction * sine[i];
                high[i] = b * cosine[i] + a * direction * sine[i];
            }
        }
    }
}

static inline void rope_forward(float *x, const float *table, int B, int T, int start, int heads, int hd,
                                int stride) {
    rope_rotate(x, table, B, T, start, heads, hd, stride, 1.0f);
}

static inline void rope_backward(float *dx, const float *table, int B, int T, int start, int heads, int hd,
                                 int stride) {
    rope_rotate(dx, table, B, T, start, heads, hd, stride, -1.0f);
}

#endif
