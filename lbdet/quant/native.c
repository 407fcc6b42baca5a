/* The inner loops of the quantizers, each one pass over memory. native_build.py compiles this file where it runs.

Each function gives the values of the PyTorch code that it stands for, bit for bit: the same operations in the
same order, never contracted to fused ones. Only sums in float64 are added in another order (`omp simd`, which
needs no library of OpenMP); those of LBW's exact solver are exact and so have no order.

A tensor is `rows` rows of n numbers, one behind the other. `half`: numbers are bfloat16, not float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 1024, MAX_LEVELS = 256, LANES = 4, INFINITY_BITS = 0x7f800000 };

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* ---- powers of two, see pow2.py: normal numbers only ------------------------------------------------- */

static inline float pow2(int exponent) { return from_bits((uint32_t)(exponent + 127) << 23); }
static inline int exponent_of(float x) { return (int)(bits_of(x) >> 23) - 127; }
static inline float nearest_pow2(float x) { return from_bits((bits_of(x) + 0x00400000u) & 0x7f800000u); }

/* 2^floor(log2 x); 0 for a subnormal x */
static inline double pow2_below(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0x7ff0000000000000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ---- LBW, see lbw.py ----------------------------------------------------------------------------------- */

typedef struct {
    int magnitudes;  /* n in lbw.py */
    int shift, s;    /* the scale is 2^(s + shift); values are looked at times `unit` = 2^-shift */
    float unit;
    double mu;       /* of the semi-analytical rule; 0 = exact */
} Row;

static uint32_t largest_magnitude(const float *w, int64_t n) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) {
        uint32_t magnitude = bits_of(w[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/* E(s-1) - E(s) */
static double step_down(const float *w, int64_t n, const Row *row, int s) {
    float unit = row->unit, top = pow2(s), p = pow2(s - row->magnitudes);
    float border = 0.75f * top, half_width = 0.5f * p;
    double clipped = 0, gained = 0;
#pragma omp simd reduction(+ : clipped, gained)
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(w[i]) * unit, ramp = a - border, tent = half_width - fabsf(a - p);
        clipped += ramp > 0 ? ramp : 0;
        gained += tent > 0 ? tent : 0;
    }
    return clipped * top - gained * (2 * p);
}

static int exact_exponent(const float *w, int64_t n, const Row *row, int start) {
    double error = 0, best_error = 0; /* relative to the error at `start` */
    int best = start;
    for (int s = start;;) {
        double half_width = 0.5 * pow2(s - row->magnitudes);
        error += step_down(w, n, row, s--);
        if (error < best_error) best = s, best_error = error;
        if (!(error - (double)n * (half_width * half_width) < best_error)) return best;
    }
}

/* 2^s |Q| of the nearest levels */
static void nearest_levels(const float *w, int64_t n, const Row *row, float *value) {
    float unit = row->unit, top = pow2(row->s);
    float lowest = pow2(row->s - row->magnitudes + 1), border = pow2(row->s - row->magnitudes);
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(w[i]) * unit, level = clamp(nearest_pow2(a), lowest, top);
        value[i] = a >= border ? level : 0;
    }
}

/* 2^s |Q| of the paper's rule */
static void assigned_levels(const float *w, int64_t n, const Row *row, float *value) {
    float unit = row->unit, scale = pow2(row->s);
    double mu = row->mu, lowest = pow2(1 - row->magnitudes), border = 2 * lowest * mu;
    for (int64_t i = 0; i < n; i++) {
        double a = fabsf(w[i]) * unit, level = pow2_below(a / mu);
        level = level < lowest ? lowest : level > 1 ? 1 : level;
        value[i] = (a > 0) & (3 * a >= border) ? (float)level * scale : 0;
    }
}

static void levels(const float *w, int64_t n, const Row *row, float *value) {
    (row->mu > 0 ? assigned_levels : nearest_levels)(w, n, row, value);
}

static int semi_analytical_exponent(const float *w, int64_t n, const Row *row) {
    float level[BLOCK];
    double products = 0, squares = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        int64_t count = smaller(BLOCK, n - i);
        assigned_levels(w + i, count, row, level);
#pragma omp simd reduction(+ : products, squares)
        for (int64_t k = 0; k < count; k++) {
            products += (double)(fabsf(w[i + k]) * row->unit) * level[k];
            squares += (double)level[k] * level[k];
        }
    }
    int exponent;
    frexp(4 * products / (3 * squares), &exponent);
    return squares > 0 ? exponent - 1 : 0;
}

static void solve(const float *w, int64_t n, uint32_t largest_bits, double ratio, Row *row) {
    int shift = (int)(largest_bits >> 23) - 126; /* frexp's exponent; -126 for subnormal numbers */
    row->shift = shift > 126 ? 126 : shift;
    row->unit = pow2(-row->shift);
    row->s = 0;
    float largest = from_bits(largest_bits) * row->unit;
    row->mu = ratio * largest;
    int highest = 127 - row->shift;
    int s = row->mu > 0 ? semi_analytical_exponent(w, n, row) : exponent_of(nearest_pow2(largest));
    s = s < highest ? s : highest;
    row->s = row->mu > 0 ? s : exact_exponent(w, n, row, s);
}

static void write_values(const float *w, const float *magnitude, int64_t n, const Row *row, float *value) {
    float back = pow2(row->shift);
    for (int64_t i = 0; i < n; i++) value[i] = copysignf(magnitude[i] * back, w[i]);
}

static void write_codes(const float *w, const float *magnitude, int64_t n, const Row *row, int8_t *code) {
    for (int64_t i = 0; i < n; i++) {
        int k_plus_1 = row->s - exponent_of(magnitude[i]) + 1;
        code[i] = (int8_t)(magnitude[i] > 0 ? w[i] < 0 ? -k_plus_1 : k_plus_1 : 0);
    }
}

/* Fill `exponent` [rows], and of `value` and `code` [rows, n] the one that is not null; ratio 0 is the exact
solver. Returns 0, or 1 at a weight that is not finite. */
int lbw(const float *w, int64_t rows, int64_t n, int magnitudes, double ratio, float *value, int8_t *code,
        int32_t *exponent) {
    for (int64_t r = 0; r < rows; r++, w += n) {
        uint32_t bits = largest_magnitude(w, n);
        if (bits >= INFINITY_BITS) return 1;
        Row row = {.magnitudes = magnitudes};
        float largest = from_bits(bits), level = 0;
        if (bits) {
            solve(w, n, bits, ratio, &row);
            levels(&largest, 1, &row, &level);
        }
        exponent[r] = level > 0 ? row.s + row.shift : 0;
        for (int64_t i = 0; i < n; i += BLOCK) {
            float magnitude[BLOCK];
            int64_t count = smaller(BLOCK, n - i);
            levels(w + i, count, &row, magnitude);
            if (value) write_values(w + i, magnitude, count, &row, value + r * n + i);
            if (code) write_codes(w + i, magnitude, count, &row, code + r * n + i);
        }
    }
    return 0;
}

/* ---- equally spaced levels, see uniform.py and dorefa.py --------------------------------------------- */

static const float *widened(const void *x, int64_t i, int64_t n, int half, float *buffer) {
    const uint16_t *bits = (const uint16_t *)x + i;
    if (!half) return (const float *)x + i;
    for (int64_t k = 0; k < n; k++) buffer[k] = from_bits((uint32_t)bits[k] << 16);
    return buffer;
}

/* Round float32 to bfloat16, ties to even. */
static void narrow(const float *x, int64_t n, uint16_t *to) {
    for (int64_t k = 0; k < n; k++) {
        uint32_t bits = bits_of(x[k]), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
        to[k] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

/* y = scale * clamp(round(x / scale), low, high) */
static void round_block(const float *x, int64_t n, float scale, float low, float high, float *y) {
    for (int64_t k = 0; k < n; k++) y[k] = clamp(rintf(x[k] / scale), low, high) * scale;
}

void round_rows(const void *x, int64_t rows, int64_t n, int half, const float *scale, float low, float high,
                void *y) {
    float wide[BLOCK], rounded[BLOCK];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * n; i < (r + 1) * n; i += BLOCK) {
            int64_t count = smaller(BLOCK, (r + 1) * n - i);
            const float *in = widened(x, i, count, half, wide);
            round_block(in, count, scale[r], low, high, half ? rounded : (float *)y + i);
            if (half) narrow(rounded, count, (uint16_t *)y + i);
        }
}

/* The gradient of x, and the sum of the gradient of one scale */
static double round_gradient(const float *x, const float *grad, int64_t n, float scale, float low, float high,
                             float *grad_x) {
    double slope = 0;
#pragma omp simd reduction(+ : slope)
    for (int64_t k = 0; k < n; k++) {
        float steps = x[k] / scale, level = clamp(steps, low, high);
        int inside = (steps >= low) & (steps <= high);
        slope += grad[k] * (inside ? rintf(level) - level : level);
        grad_x[k] = inside ? grad[k] : 0;
    }
    return slope;
}

/* The same of x clipped to [0, clip], where only what is clipped moves the clip */
static double clip_gradient(const float *x, const float *grad, int64_t n, float clip, float *grad_x) {
    double slope = 0;
#pragma omp simd reduction(+ : slope)
    for (int64_t k = 0; k < n; k++) {
        float share = x[k] / clip;
        slope += share >= 1 ? grad[k] : 0;
        grad_x[k] = (share >= 0) & (share <= 1) ? grad[k] : 0;
    }
    return slope;
}

/* Fill `grad_x` [rows, n] and `slope` [rows]; with `is_clip` a scale is a clip, and low and high are not used. */
void gradient_rows(const void *x, const void *grad, int64_t rows, int64_t n, int half, const float *scale,
                   float low, float high, int is_clip, void *grad_x, double *slope) {
    float wide_x[BLOCK], wide_grad[BLOCK], wide[BLOCK];
    for (int64_t r = 0; r < rows; r++) {
        slope[r] = 0;
        for (int64_t i = r * n; i < (r + 1) * n; i += BLOCK) {
            int64_t count = smaller(BLOCK, (r + 1) * n - i);
            const float *a = widened(x, i, count, half, wide_x), *g = widened(grad, i, count, half, wide_grad);
            float *to = half ? wide : (float *)grad_x + i;
            slope[r] += is_clip ? clip_gradient(a, g, count, scale[r], to)
                                : round_gradient(a, g, count, scale[r], low, high, to);
            if (half) narrow(wide, count, (uint16_t *)grad_x + i);
        }
    }
}

/* ---- levels of any place, see learned_levels.py ------------------------------------------------------ */

/* From border[j] on a weight has level j + 1: the least float32 not below the middle of two levels; infinity
from j = k - 1 on. Returns 0, or 1 where levels are not sorted and finite. */
static int borders_between(const float *level, int64_t k, float *border) {
    for (int64_t j = 0; j < MAX_LEVELS; j++) border[j] = INFINITY;
    if (!isfinite(level[0])) return 1;
    for (int64_t j = 1; j < k; j++) {
        if (!isfinite(level[j]) || level[j] < level[j - 1]) return 1;
        double middle = ((double)level[j] + (double)level[j - 1]) / 2;
        border[j - 1] = (float)middle;
        if (border[j - 1] < middle) border[j - 1] = nextafterf(border[j - 1], INFINITY);
    }
    return 0;
}

/* Fill `value` and `index` [rows, n] from `table` [rows, k].
Returns 0, or 1 where an argument is to be refused. */
int nearest_of_table(const float *w, int64_t rows, int64_t n, const float *table, int64_t k, float *value,
                     uint8_t *index) {
    float border[MAX_LEVELS];
    for (int64_t r = 0; r < rows; r++) {
        const float *level = table + r * k;
        if (largest_magnitude(w + r * n, n) >= INFINITY_BITS || borders_between(level, k, border)) return 1;
        for (int64_t i = r * n; i < (r + 1) * n; i += BLOCK) {
            int32_t found[BLOCK] = {0};
            int64_t count = smaller(BLOCK, (r + 1) * n - i);
            for (const float *b = border; b < border + k - 1; b += 4) /* four at a time, to load and store less */
                for (int64_t m = 0; m < count; m++) {
                    float x = w[i + m];
                    found[m] += (x >= b[0]) + (x >= b[1]) + (x >= b[2]) + (x >= b[3]);
                }
            for (int64_t m = 0; m < count; m++) value[i + m] = level[found[m]];
            for (int64_t m = 0; m < count; m++) index[i + m] = (uint8_t)found[m];
        }
    }
    return 0;
}

/* Fill `sum` and `uses` [rows, k]: of each level, of the gradients and of the weights that have it */
void sums_of_levels(const float *grad, const uint8_t *index, int64_t rows, int64_t n, int64_t k, double *sum,
                    double *uses) {
    for (int64_t r = 0; r < rows; r++, grad += n, index += n) {
        double part[LANES][MAX_LEVELS] = {{0}}; /* neighbours add to different numbers: none waits for another */
        int64_t count[LANES][MAX_LEVELS] = {{0}};
        for (int64_t i = 0; i < n; i++) {
            part[i % LANES][index[i]] += grad[i];
            count[i % LANES][index[i]]++;
        }
        for (int64_t j = 0; j < k; j++) {
            sum[r * k + j] = part[0][j] + part[1][j] + part[2][j] + part[3][j];
            uses[r * k + j] = (double)(count[0][j] + count[1][j] + count[2][j] + count[3][j]);
        }
    }
}
