// The arguments of the loops over feature maps. No torch here: the loops can be built, read and fuzzed alone.
//
// Names follow ecanet/ops/reference.py and coefficients.py, which compute the same in plain PyTorch.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ECANET_X86
#endif

#ifdef ECANET_X86
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace ecanet {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type of means, gates and every other (N, C)- or C-sized tensor that belongs to a map of type T.
template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulateIn<T>::type;

enum class Act : int64_t { none = 0, relu = 1, relu6 = 2, silu = 3, hardswish = 4 };

// A feature map (N, C, S): S positions, contiguous as (N, C, S) in memory or channels last as (N, S, C).
struct Map {
  int64_t samples, channels, positions;
  bool channels_last;

  // Element-wise loops run over lines: contiguous elements of one sample (and of one channel, unless channels last).
  int64_t lines() const { return samples * (channels_last ? positions : channels); }
  int64_t line_size() const { return channels_last ? channels : positions; }

  // Reductions run over bundles of whole maps of one channel; a bundle is a cache line of neighbours if channels last.
  static constexpr int64_t kBundle = 16;
  int64_t bundles_per_sample() const { return channels_last ? (channels + kBundle - 1) / kBundle : channels; }
  int64_t bundles() const { return samples * bundles_per_sample(); }

  // If channels last, only the squeeze runs over blocks of this many positions: what one thread reads is then
  // contiguous, and so is what it writes.
  static constexpr int64_t kPositions = 64;
  int64_t blocks_per_sample() const { return channels_last ? (positions + kPositions - 1) / kPositions : channels; }
  int64_t blocks() const { return samples * blocks_per_sample(); }
};

template <class T>
struct SqueezeArgs {
  Map map;
  const T* x;
  Acc<T>* sums;  // contiguous: means (N, C); channels last: sums (N, blocks of positions, C)
};

template <class T>
struct MomentsArgs {
  Map map;
  const T* x;
  double* mean;  // (N, C); in double: in float, merging means far from zero would cost the variance digits
  double* m2;    // (N, C): sums of (x - mean)^2
};

template <class T>
struct ApplyArgs {
  Map map;
  Act act;
  const T* x;
  const Acc<T>* scale;  // (N, C)
  const Acc<T>* shift;  // (N, C)
  const T* residual;    // or null
  T* out;               // may be x
  bool streams;         // write `out` past the caches: it is not x, and too large to stay in them
};

// What the derivative of the activation is computed from: `out` for ReLU and ReLU6, the activation's input
// (x * scale + shift + residual) for SiLU and Hardswish.
template <class T>
struct ActGrad {
  Act act;
  const T* grad;
  const T* saved;       // out (ReLU, ReLU6) or residual (SiLU, Hardswish; or null)
  const Acc<T>* scale;  // (N, C)
  const Acc<T>* shift;  // (N, C)
};

template <class T>
struct ReduceArgs {
  Map map;
  ActGrad<T> act_grad;
  const T* x;
  const Acc<T>* center;  // (C)
  T* d;                  // or null: gradient of the activation's input
  bool streams;          // as in ApplyArgs, for d
  Acc<T>* p;             // (N, C): sums of d
  Acc<T>* q;             // (N, C): sums of d (x - center)
};

template <class T>
struct InputGradArgs {
  Map map;
  ActGrad<T> act_grad;
  const T* x;            // or null, with slope
  const Acc<T>* offset;  // (N, C)
  const Acc<T>* slope;   // (C), or (N, C) if slope_per_sample; or null
  bool slope_per_sample;
  const Acc<T>* center;  // (C)
  T* out;
  bool streams;          // as in ApplyArgs
};

// A BatchNorm, y = a (x - mean) + bias with a = weight / sqrt(var + eps). Each pointer is (C), or null for mean 0,
// var + eps = 1, weight 1 and bias 0. A is float or double.
template <class A>
struct NormArgs {
  const A *mean, *var, *weight, *bias;
  double eps;
};

template <class A>
struct StatisticsArgs {
  int64_t samples, channels, positions;
  const double *mean, *m2;    // (N, C)
  double *total, *spread;     // (C), zeros: scratch space for sums
  A *batch_mean, *batch_var;  // (C)
};

// From means to gates, scales and shifts.
template <class A>
struct CoefficientArgs {
  int64_t channels;
  NormArgs<A> norm;
  const A* map_means;  // (N, C); not read without s
  const A* band;   // (k) or null
  int64_t k;
  bool circular;
  double factor;  // of the gate
  A *a, *b;      // (C): the norm as a x + b, from `prepare`
  A* s;          // (N, C) or null: means of the norm's output
  A* gate;       // (N, C); null without a band
  A* scale;      // (N, C)
  A* shift;      // (N, C)
  A* padded;     // (N, C + k - 1), zeros; null without a band
};

// eca_coefficients_backward in coefficients.py has the formulas.
template <class A>
struct CoefficientGradArgs {
  int64_t samples, channels, positions;
  NormArgs<A> norm;
  const A *p, *q, *map_means;        // (N, C)
  const A *gate, *grad_s;        // (N, C) or null
  const A *m2, *grad_v;          // (N, C); null if the gate sees no variances
  const A* band;                 // (k) or null
  int64_t k;
  bool circular;
  double factor;                 // of the gate
  A *offset, *slope;             // (N, C); slope with grad_v
  A *weight, *bias, *band_grad;  // (C), (C), (k)
  A *mean, *var;                 // (C)
  A *a, *ds;                     // (C): scratch space
  A *padded, *logits;            // (C + k - 1), zeros: scratch space for s and for the gradient of the logits
  double *sum_a, *sum_b;         // (C), zeros: scratch space for sums
};

// One instruction set's loops; ranges are lines (apply, input_grad), blocks (squeeze), bundles (the other reductions) or
// samples.
template <class T>
struct Kernels {
  void (*squeeze)(const SqueezeArgs<T>&, int64_t begin, int64_t end);
  void (*average)(const Map&, Acc<T>* sums, Acc<T>* mean);  // channels last, after squeeze; adds up in `sums`
  void (*moments)(const MomentsArgs<T>&, int64_t begin, int64_t end);
  void (*apply)(const ApplyArgs<T>&, int64_t begin, int64_t end);
  void (*reduce)(const ReduceArgs<T>&, int64_t begin, int64_t end);
  void (*input_grad)(const InputGradArgs<T>&, int64_t begin, int64_t end);
  void (*statistics)(const StatisticsArgs<Acc<T>>&);
  void (*prepare)(const CoefficientArgs<Acc<T>>&);
  void (*coefficients)(const CoefficientArgs<Acc<T>>&, int64_t begin, int64_t end);
  void (*coefficients_backward)(const CoefficientGradArgs<Acc<T>>&);
};

template <class T>
struct KernelsFor {
  static const Kernels<T>& baseline();
#ifdef ECANET_X86
  static const Kernels<T>& avx2();
  static const Kernels<T>& avx512();
#endif
};

#if defined(ECANET_X86)
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace ecanet
