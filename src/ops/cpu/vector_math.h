#pragma once

// The inner loops of the CPU ops. Written so that a compiler vectorises them without fast-math (fixed lanes, no reassociation
// across them), and compiled once per instruction set of the machines that wheels meet.

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CODA_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CODA_TARGET_CLONES
#endif

namespace coda::cpu {

// x[i] = x[i] + bias[i] (bias may be null); returns max(peak, max x).
float add_bias_and_max(float* x, const float* bias, int64_t n, float peak);
double add_bias_and_max(double* x, const double* bias, int64_t n, double peak);

// x[i] = exp(x[i] - peak); returns their sum.
float exp_and_sum(float* x, int64_t n, float peak);
double exp_and_sum(double* x, int64_t n, double peak);

// x[i] *= factor.
void scale_row(float* x, int64_t n, float factor);
void scale_row(double* x, int64_t n, double factor);

// p[i] = factor * p[i] * (dp[i] - d).
void softmax_backward_row(float* p, const float* dp, int64_t n, float factor, float d);
void softmax_backward_row(double* p, const double* dp, int64_t n, double factor, double d);

// y[i] += factor * x[i].
void axpy_row(float* y, const float* x, int64_t n, float factor);
void axpy_row(double* y, const double* x, int64_t n, double factor);

// out[l * stride + r] = line l . rows[r], for `count` lines of n elements, one after the other, and rows of n wherever they lie.
void dot_rows(float* out, int64_t stride, const float* lines, int64_t count, const float* const* rows, int64_t row_count, int64_t n);
void dot_rows(double* out, int64_t stride, const double* lines, int64_t count, const double* const* rows, int64_t row_count, int64_t n);

// Line l = sum over r of weight[l * stride + r] * rows[r].
void sum_rows(float* lines, int64_t count, const float* weight, int64_t stride, const float* const* rows, int64_t row_count, int64_t n);
void sum_rows(double* lines, int64_t count, const double* weight, int64_t stride, const double* const* rows, int64_t row_count, int64_t n);

// Sum of a[i] * b[i] in one fixed order on every device: 32 interleaved partial sums, each product rounded before its sum,
// folded 16, 8, 4, 2, 1. Routing decisions rest on it.
float fixed_order_dot(const float* a, const float* b, int64_t n);
double fixed_order_dot(const double* a, const double* b, int64_t n);

}  // namespace coda::cpu
