// The operations of ecanet.ops on the CPU: implementations only. Their schemas, fakes (shapes without data) and
// derivatives are in ecanet/ops/library.py; the same operations in plain PyTorch are in ecanet/ops/reference.py and
// ecanet/ops/coefficients.py.
//
// Written against libtorch's stable ABI, so that one binary serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace ecanet {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Fewer elements than this are not worth a second thread.
constexpr int64_t kElementsPerThread = 32768;
// Samples whose maps together have about this many bytes are squeezed and then scaled while they are in the cache.
constexpr int64_t kCacheBytes = 1 << 20;

// An output of at least this many bytes has left the caches before it is read.
constexpr int64_t kStreamedBytes = 8 << 20;

template <class T>
bool streams(const Map& map) {
  return map.samples * map.channels * map.positions * int64_t(sizeof(T)) >= kStreamedBytes;
}

template <class T>
const Kernels<T>& kernels() {
#ifdef ECANET_X86
  static const Kernels<T>& best = has_avx512() ? KernelsFor<T>::avx512()
                                  : has_avx2() ? KernelsFor<T>::avx2()
                                               : KernelsFor<T>::baseline();
  return best;
#else
  return KernelsFor<T>::baseline();
#endif
}

// How error messages describe a tensor: as Python does.
std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

const char* device_of(const Tensor& t) { return t.is_cpu() ? "on the CPU" : "on another device"; }

const char* type_of(const Tensor& t) {
  switch (const ScalarType type = t.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(type);
  }
}

template <class F>
void dispatch(const Tensor& x, F&& f) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bfloat16{});
  if (dtype == aoti_torch_dtype_float16()) return f(float16{});
  STD_TORCH_CHECK(false, "ecanet: x must be float32, float64, bfloat16 or float16; got ", type_of(x));
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// The accumulation type.
int32_t small_type(const Tensor& x) {
  return dtype_of(x) == aoti_torch_dtype_float64() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Straight from the C interface: a call through the dispatcher costs as much as a small map.
Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_as(const Tensor& t) { return empty(t.dim(), t.sizes().data(), t.strides().data(), dtype_of(t)); }

Tensor new_small(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty(2, sizes, strides, small_type(x));
}

Tensor new_small(const Tensor& x, int64_t size) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, small_type(x));
}

// (N, H, W, C) in memory, for 4 and 5 dimensions; strides of dimensions of size 1 do not matter.
bool is_channels_last(const Tensor& t) {
  const int64_t dims = t.dim();
  if (dims != 4 && dims != 5) return false;
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  auto fits = [&](int64_t d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (!fits(1)) return false;
  for (int64_t d = dims - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return fits(0);
}

Map map_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "ecanet: x must have shape (N, C, *spatial); got ", shape_of(x));
  Map map{x.size(0), x.size(1), 1, !x.is_contiguous() && is_channels_last(x)};
  for (int64_t d = 2; d < x.dim(); ++d) map.positions *= x.size(d);
  return map;
}

// The tensor in the map's memory order; a copy if its strides differ.
Tensor ordered(const Tensor& t, const Map& map) {
  if (!map.channels_last) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  if (is_channels_last(t)) return t;
  return torch::stable::contiguous(t, t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast);
}

void check_same(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == x.dim() && dtype_of(t) == dtype_of(x) && t.is_cpu();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "ecanet: ", name, " must have the shape, the type and the device of x: ", shape_of(x), ", ",
                  type_of(x), ", on the CPU; got ", shape_of(t), ", ", type_of(t), ", ", device_of(t));
}

// A small tensor made contiguous, in the accumulation type.
Tensor typed(const Tensor& t, const Tensor& x) {
  const Tensor same = dtype_of(t) == small_type(x) ? t
                      : small_type(x) == aoti_torch_dtype_float64()
                          ? torch::stable::to(t, ScalarType::Double)
                          : torch::stable::to(t, ScalarType::Float);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

Tensor small(const Tensor& t, const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "ecanet: ", name,
                  " must have shape (", rows, ", ", columns, "), on the CPU; got ", shape_of(t), ", ", device_of(t));
  return typed(t, x);
}

Tensor small(const Tensor& t, const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == size, "ecanet: ", name, " must have shape (", size,
                  "), on the CPU; got ", shape_of(t), ", ", device_of(t));
  return typed(t, x);
}

// A tensor to read while x is overwritten: t itself, or a copy if it overlaps x partly. Both are dense.
Tensor apart(const Tensor& t, const Tensor& x) {
  const auto item = [](const Tensor& s) -> int64_t {
    return dtype_of(s) == aoti_torch_dtype_float64() ? 8 : dtype_of(s) == aoti_torch_dtype_float32() ? 4 : 2;
  };
  const auto *begin = static_cast<const char*>(t.const_data_ptr()), *end = begin + t.numel() * item(t);
  const auto *x_begin = static_cast<const char*>(x.const_data_ptr()), *x_end = x_begin + x.numel() * item(x);
  const bool exactly = begin == x_begin && end == x_end;
  return exactly || end <= x_begin || x_end <= begin ? t : torch::stable::clone(t);
}

// A shift that changes nothing, not even the sign of -0.
Tensor no_shift(const Tensor& scale) {
  const Tensor zeros = empty_as(scale);
  return torch::stable::fill_(zeros, -0.0);
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* in(const Optional& t) {
  return t ? in<T>(*t) : nullptr;
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class F>
void parallel(int64_t begin, int64_t end, int64_t elements_per_unit, const F& f) {
  if (begin >= end) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_unit));
  if (end - begin <= grain) return f(begin, end);
  torch::stable::parallel_for(begin, end, grain, f);
}

int64_t bundle_elements(const Map& map) { return map.positions * (map.channels_last ? Map::kBundle : 1); }

// ---- squeeze and moments -------------------------------------------------------------------------------------------

template <class T>
void squeeze_into(const Map& map, const T* x, Acc<T>* mean) {
  const Kernels<T>& loops = kernels<T>();
  const std::unique_ptr<Acc<T>[]> sums(map.channels_last ? new Acc<T>[map.blocks() * map.channels] : nullptr);
  const SqueezeArgs<T> args{map, x, sums ? sums.get() : mean};
  const int64_t elements = map.channels_last ? Map::kPositions * map.channels : map.positions;
  parallel(0, map.blocks(), elements, [&](int64_t b, int64_t e) { loops.squeeze(args, b, e); });
  if (sums) loops.average(map, sums.get(), mean);
}

Tensor squeeze(const Tensor& input) {
  const Map map = map_of(input);
  STD_TORCH_CHECK(map.positions > 0, "ecanet: x has no spatial position to average over: every spatial size must be",
                  " 1 or more; got shape ", shape_of(input));
  const Tensor x = ordered(input, map), mean = new_small(x, map.samples, map.channels);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    squeeze_into<T>(map, in<T>(x), out<Acc<T>>(mean));
  });
  return mean;
}

// Means and sums of squares about them, (N, C) each, in double.
std::vector<double> moments_of(const Tensor& x, const Map& map) {
  const int64_t nc = map.samples * map.channels;
  std::vector<double> result(2 * nc);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const MomentsArgs<T> args{map, in<T>(x), result.data(), result.data() + nc};
    parallel(0, map.bundles(), bundle_elements(map), [&](int64_t b, int64_t e) { kernels<T>().moments(args, b, e); });
  });
  return result;
}

std::tuple<Tensor, Tensor> moments(const Tensor& input) {
  const Map map = map_of(input);
  const Tensor x = ordered(input, map);
  const Tensor mean = new_small(x, map.samples, map.channels), m2 = new_small(x, map.samples, map.channels);
  const std::vector<double> mean_and_m2 = moments_of(x, map);
  dispatch(mean, [&](auto t) {
    using A = Acc<decltype(t)>;
    const int64_t nc = map.samples * map.channels;
    std::copy(mean_and_m2.begin(), mean_and_m2.begin() + nc, out<A>(mean));
    std::copy(mean_and_m2.begin() + nc, mean_and_m2.end(), out<A>(m2));
  });
  return {mean, m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_moments(const Tensor& input, bool needs_m2) {
  const Map map = map_of(input);
  const Tensor x = ordered(input, map);
  const Tensor map_means = new_small(x, map.samples, map.channels);
  const Tensor mean = new_small(x, map.channels), var = new_small(x, map.channels);
  const Tensor m2 = new_small(x, needs_m2 ? map.samples : 0, map.channels);
  const std::vector<double> mean_and_m2 = moments_of(x, map);
  dispatch(map_means, [&](auto t) {
    using A = Acc<decltype(t)>;
    const int64_t nc = map.samples * map.channels;
    std::copy(mean_and_m2.begin(), mean_and_m2.begin() + nc, out<A>(map_means));
    if (needs_m2) std::copy(mean_and_m2.begin() + nc, mean_and_m2.end(), out<A>(m2));
    std::vector<double> scratch(2 * map.channels);
    kernels<A>().statistics({map.samples, map.channels, map.positions, mean_and_m2.data(), mean_and_m2.data() + nc,
                             scratch.data(), scratch.data() + map.channels, out<A>(mean), out<A>(var)});
  });
  return {map_means, mean, var, m2};
}

// ---- apply ---------------------------------------------------------------------------------------------------------

Act act_of(int64_t act) {
  STD_TORCH_CHECK(0 <= act && act <= 4, "ecanet: act must be 0 to 4, got ", act);
  return static_cast<Act>(act);
}

// Lines from the last to the first: the end of the map was read last and is still in the cache.
template <class F>
void parallel_backwards(int64_t lines, int64_t line_size, const F& f) {
  const int64_t chunk = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, line_size));
  const int64_t chunks = (lines + chunk - 1) / chunk;
  parallel(0, chunks, chunk * line_size, [&](int64_t b, int64_t e) {
    for (int64_t i = e - 1; i >= b; --i) f(i * chunk, std::min(lines, (i + 1) * chunk));
  });
}

void apply_into(const Tensor& x, const Map& map, const Tensor& scale, const Optional& shift,
                const Optional& residual, int64_t act, const Tensor& result) {
  Tensor a = small(scale, x, map.samples, map.channels, "scale");
  Tensor b = shift ? small(*shift, x, map.samples, map.channels, "shift") : no_shift(a);
  Optional r;
  if (residual) {
    check_same(*residual, x, "residual");
    r = ordered(*residual, map);
  }
  const bool in_place = result.data_ptr() == x.data_ptr();
  if (in_place) {
    a = apart(a, x);
    b = apart(b, x);
    if (r) r = apart(*r, x);
  }
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const ApplyArgs<T> args{map, act_of(act), in<T>(x), in<Acc<T>>(a), in<Acc<T>>(b), in<T>(r), out<T>(result),
                            !in_place && streams<T>(map)};
    parallel_backwards(map.lines(), map.line_size(), [&](int64_t b, int64_t e) { kernels<T>().apply(args, b, e); });
  });
}

Tensor apply(const Tensor& input, const Tensor& scale, const Optional& shift, const Optional& residual, int64_t act) {
  const Map map = map_of(input);
  const Tensor x = ordered(input, map), result = empty_as(x);
  apply_into(x, map, scale, shift, residual, act, result);
  return result;
}

void apply_(Tensor x, const Tensor& scale, const Optional& shift, const Optional& residual, int64_t act) {
  const Map map = map_of(x);
  const Tensor work = ordered(x, map);
  apply_into(work, map, scale, shift, residual, act, work);
  if (work.data_ptr() != x.data_ptr()) torch::stable::copy_(x, work);
}

// ---- backward ------------------------------------------------------------------------------------------------------

bool needs_input(Act act) { return act == Act::silu || act == Act::hardswish; }

// The tensors that ActGrad points to.
struct Upstream {
  Tensor grad, scale, shift;
  Optional saved;
  Upstream(const Tensor& g, const Tensor& x, const Map& map, const Tensor& a, const Optional& b, const Optional& s,
           Act act)
      : grad(g), scale(small(a, x, map.samples, map.channels, "scale")), shift(scale) {
    check_same(g, x, "grad");
    grad = ordered(g, map);
    if (s) {
      check_same(*s, x, "saved");
      saved = ordered(*s, map);
    }
    STD_TORCH_CHECK(saved || act == Act::none || needs_input(act), "ecanet: ReLU and ReLU6 need saved=out; got None");
    if (needs_input(act))
      shift = b ? small(*b, x, map.samples, map.channels, "shift") : no_shift(scale);
  }
  template <class T>
  ActGrad<T> args(Act act) const {
    return {act, in<T>(grad), in<T>(saved), in<Acc<T>>(scale), in<Acc<T>>(shift)};
  }
};

Tensor center_of(const Optional& center, const Tensor& x, const Map& map) {
  if (center) return small(*center, x, map.channels, "center");
  Tensor zeros = new_small(x, map.channels);
  return torch::stable::zero_(zeros);
}

std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& grad, const Tensor& input, const Tensor& scale,
                                                  const Optional& shift, const Optional& center, const Optional& saved,
                                                  int64_t act_code, bool needs_d) {
  const Map map = map_of(input);
  const Act act = act_of(act_code);
  const Tensor x = ordered(input, map), c = center_of(center, x, map);
  const Upstream upstream(grad, x, map, scale, shift, saved, act);
  const int64_t none = 0, one = 1;
  const Tensor d = needs_d ? empty_as(x) : empty(1, &none, &one, dtype_of(x));
  const Tensor p = new_small(x, map.samples, map.channels), q = new_small(x, map.samples, map.channels);
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const ReduceArgs<T> args{map,
                             upstream.args<T>(act),
                             in<T>(x),
                             in<Acc<T>>(c),
                             needs_d ? out<T>(d) : nullptr,
                             streams<T>(map),
                             out<Acc<T>>(p),
                             out<Acc<T>>(q)};
    parallel(0, map.bundles(), bundle_elements(map), [&](int64_t b, int64_t e) { kernels<T>().reduce(args, b, e); });
  });
  return {d, p, q};
}

Tensor input_backward(const Tensor& grad, const Tensor& input, const Tensor& scale, const Optional& shift,
                      const Optional& saved, int64_t act_code, const Tensor& offset, const Optional& slope,
                      const Optional& center) {
  const Map map = map_of(input);
  const Act act = act_of(act_code);
  const Tensor x = ordered(input, map), c = center_of(center, x, map), result = empty_as(x);
  const Upstream upstream(grad, x, map, scale, shift, saved, act);
  const Tensor u = small(offset, x, map.samples, map.channels, "offset");
  Optional v;
  const bool per_sample = slope && slope->dim() == 2;
  if (slope) v = per_sample ? small(*slope, x, map.samples, map.channels, "slope") : small(*slope, x, map.channels, "slope");
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const InputGradArgs<T> args{map,         upstream.args<T>(act), in<T>(x),      in<Acc<T>>(u),
                                in<Acc<T>>(v), per_sample,            in<Acc<T>>(c),
                                out<T>(result), streams<T>(map)};
    parallel_backwards(map.lines(), map.line_size(), [&](int64_t b, int64_t e) { kernels<T>().input_grad(args, b, e); });
  });
  return result;
}

// ---- the (N, C)-sized maths of norm and ECA ------------------------------------------------------------------------

struct Norm {
  Optional mean, var, weight, bias;
  double eps;
  Norm(const Tensor& like, int64_t channels, const Optional& m, const Optional& v, const Optional& w, const Optional& b,
       double eps)
      : eps(eps) {
    STD_TORCH_CHECK(m.has_value() == v.has_value(), "ecanet: norm_mean and norm_var come together; got ", m ? "norm_mean" : "norm_var",
                    " alone");
    if (m) mean = small(*m, like, channels, "norm_mean");
    if (v) var = small(*v, like, channels, "norm_var");
    if (w) weight = small(*w, like, channels, "weight");
    if (b) bias = small(*b, like, channels, "bias");
  }
  template <class A>
  NormArgs<A> args() const {
    return {in<A>(mean), in<A>(var), in<A>(weight), in<A>(bias), eps};
  }
};

Optional kernel_of(const Optional& kernel, const Tensor& like, int64_t channels, bool circular) {
  if (!kernel) return std::nullopt;
  const int64_t k = kernel->numel();
  STD_TORCH_CHECK(k % 2 == 1 && (!circular || k <= channels), "ecanet: kernel must have an odd size, and at most C",
                  " = ", channels, " if circular; got ", k);
  STD_TORCH_CHECK(kernel->is_cpu(), "ecanet: kernel must be on the CPU; got one ", device_of(*kernel));
  return typed(*kernel, like);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> eca_coefficients(const Tensor& map_means, const Optional& mean,
                                                            const Optional& var, const Optional& weight,
                                                            const Optional& bias, double eps, const Optional& kernel,
                                                            bool circular, double factor) {
  STD_TORCH_CHECK(map_means.dim() == 2, "ecanet: map_means must have shape (N, C); got ", shape_of(map_means));
  const int64_t samples = map_means.size(0), channels = map_means.size(1);
  const Tensor m = small(map_means, map_means, samples, channels, "map_means");
  const Norm norm(m, channels, mean, var, weight, bias, eps);
  const Optional w = kernel_of(kernel, m, channels, circular);
  const Tensor s = new_small(m, samples, channels), gate = new_small(m, w ? samples : 0, channels);
  const Tensor scale = new_small(m, samples, channels), shift = new_small(m, samples, channels);
  dispatch(m, [&](auto t) {
    using A = Acc<decltype(t)>;
    const int64_t k = w ? w->numel() : 1;
    std::vector<A> scratch(2 * channels), padded(w ? samples * (channels + k - 1) : 0);
    const CoefficientArgs<A> args{channels,    norm.args<A>(),           in<A>(m),  in<A>(w),     k,
                                  circular,    factor,                   scratch.data(), scratch.data() + channels, out<A>(s),
                                  out<A>(gate), out<A>(scale),           out<A>(shift), padded.data()};
    kernels<A>().prepare(args);
    kernels<A>().coefficients(args, 0, samples);
  });
  return {s, gate, scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> eca_coefficients_backward(
    const Tensor& p, const Tensor& q, const Tensor& map_means, const Optional& gate, const Optional& grad_s,
    const Optional& mean, const Optional& var, const Optional& weight, const Optional& bias, double eps,
    const Optional& kernel, bool circular, int64_t positions, double factor, const Optional& m2,
    const Optional& grad_v) {
  STD_TORCH_CHECK(map_means.dim() == 2, "ecanet: map_means must have shape (N, C); got ", shape_of(map_means));
  const int64_t samples = map_means.size(0), channels = map_means.size(1);
  const Tensor m = small(map_means, map_means, samples, channels, "map_means");
  const Tensor pp = small(p, m, samples, channels, "p"), qq = small(q, m, samples, channels, "q");
  const Norm norm(m, channels, mean, var, weight, bias, eps);
  const Optional w = kernel_of(kernel, m, channels, circular);
  STD_TORCH_CHECK(!grad_v || m2, "ecanet: grad_v needs m2; got m2=None");
  Optional g, ds, squares, dv;
  if (grad_v) {
    squares = small(*m2, m, samples, channels, "m2");
    dv = small(*grad_v, m, samples, channels, "grad_v");
  }
  if (gate) g = small(*gate, m, samples, channels, "gate");
  if (grad_s) ds = small(*grad_s, m, samples, channels, "grad_s");
  STD_TORCH_CHECK(!w || g, "ecanet: a kernel needs its gate; got gate=None");
  const int64_t k = w ? w->numel() : 0;
  const Tensor offset = new_small(m, samples, channels), grad_kernel = new_small(m, k);
  const Tensor grad_weight = new_small(m, channels), grad_bias = new_small(m, channels);
  const Tensor grad_mean = new_small(m, channels), grad_var = new_small(m, channels);
  const Tensor slope = new_small(m, dv ? samples : 0, channels);
  dispatch(m, [&](auto t) {
    using A = Acc<decltype(t)>;
    const int64_t padded = channels + std::max<int64_t>(k, 1) - 1;
    std::vector<A> scratch(2 * channels + 2 * padded);
    std::vector<double> sums(2 * channels);
    A* const r = scratch.data();
    kernels<A>().coefficients_backward({samples, channels, positions, norm.args<A>(), in<A>(pp), in<A>(qq), in<A>(m),
                                        in<A>(g), in<A>(ds), in<A>(squares), in<A>(dv), in<A>(w), k, circular, factor,
                                        out<A>(offset), out<A>(slope),
                                        out<A>(grad_weight), out<A>(grad_bias), out<A>(grad_kernel), out<A>(grad_mean),
                                        out<A>(grad_var), r, r + channels, r + 2 * channels, r + 2 * channels + padded, sums.data(),
                                        sums.data() + channels});
  });
  return {offset, grad_weight, grad_bias, grad_kernel, grad_mean, grad_var, slope};
}

// ---- squeeze, gate and apply in one --------------------------------------------------------------------------------

void norm_eca_add_act_into(const Tensor& x, const Map& map, const Optional& residual, const Optional& mean, const Optional& var,
                   const Optional& weight, const Optional& bias, double eps, const Optional& kernel, bool circular,
                   int64_t act, double factor, const Tensor& result) {
  Norm norm(x, map.channels, mean, var, weight, bias, eps);
  Optional w = kernel_of(kernel, x, map.channels, circular);
  Optional r;
  if (residual) {
    check_same(*residual, x, "residual");
    r = ordered(*residual, map);
  }
  const bool in_place = result.data_ptr() == x.data_ptr();
  if (in_place)
    for (Optional* read : {&r, &w, &norm.mean, &norm.var, &norm.weight, &norm.bias})
      if (*read) *read = apart(**read, x);
  if (x.numel() == 0) return;
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const Kernels<T>& loops = kernels<T>();
    // Samples are taken in groups: squeezed, and then scaled while they are in the cache.
    const int64_t channels = map.channels, sample = channels * map.positions, k = w ? w->numel() : 1;
    const int64_t group_bytes = sample * int64_t(sizeof(T));
    const int64_t group = w ? std::clamp<int64_t>(kCacheBytes / group_bytes, 1, map.samples) : map.samples;
    auto run = [&](int64_t first, int64_t last) {
      // For each channel a and b; for each map scale and shift, and with a gate the mean (which becomes s), the gate, and
      // s between margins of zeros.
      const int64_t nc = group * channels, padded = w ? group * (channels + k - 1) : 0;
      const std::unique_ptr<A[]> scratch(new A[2 * channels + (w ? 4 : 2) * nc + padded]);
      A *const a = scratch.get(), *const scale = a + 2 * channels, *const s = scale + 2 * nc, *const margins = s + 2 * nc;
      if (w) std::fill(margins, margins + padded, A(0));
      const CoefficientArgs<A> coefficients{channels, norm.args<A>(), w ? s : nullptr, in<A>(w), k, circular, factor, a,
                                            a + channels, w ? s : nullptr, s + nc, scale, scale + nc, margins};
      loops.prepare(coefficients);
      for (int64_t n = first; n < last; n += group) {
        Map part = map;
        part.samples = std::min(group, last - n);
        const int64_t at = n * sample;
        if (w) squeeze_into<T>(part, in<T>(x) + at, s);
        loops.coefficients(coefficients, 0, part.samples);
        const ApplyArgs<T> args{part,  act_of(act), in<T>(x) + at, scale, scale + nc, r ? in<T>(r) + at : nullptr,
                                out<T>(result) + at, !in_place && streams<T>(map)};
        parallel(0, part.lines(), part.line_size(), [&](int64_t b, int64_t e) { loops.apply(args, b, e); });
      }
    };
    // If there are enough samples, each thread takes whole ones: what it has squeezed is in its own cache.
    if (w && map.samples >= int64_t(torch::stable::get_num_threads())) return parallel(0, map.samples, sample, run);
    run(0, map.samples);
  });
}

Tensor norm_eca_add_act(const Tensor& input, const Optional& residual, const Optional& mean, const Optional& var,
                const Optional& weight, const Optional& bias, double eps, const Optional& kernel, bool circular,
                int64_t act, double factor) {
  const Map map = map_of(input);
  const Tensor x = ordered(input, map), result = empty_as(x);
  norm_eca_add_act_into(x, map, residual, mean, var, weight, bias, eps, kernel, circular, act, factor, result);
  return result;
}

void norm_eca_add_act_(Tensor x, const Optional& residual, const Optional& mean, const Optional& var, const Optional& weight,
               const Optional& bias, double eps, const Optional& kernel, bool circular, int64_t act, double factor) {
  const Map map = map_of(x);
  const Tensor work = ordered(x, map);
  norm_eca_add_act_into(work, map, residual, mean, var, weight, bias, eps, kernel, circular, act, factor, work);
  if (work.data_ptr() != x.data_ptr()) torch::stable::copy_(x, work);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ecanet, CPU, m) {
  m.impl("squeeze", TORCH_BOX(&squeeze));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("apply_", TORCH_BOX(&apply_));
  m.impl("apply_backward", TORCH_BOX(&apply_backward));
  m.impl("input_backward", TORCH_BOX(&input_backward));
  m.impl("batch_moments", TORCH_BOX(&batch_moments));
  m.impl("eca_coefficients", TORCH_BOX(&eca_coefficients));
  m.impl("eca_coefficients_backward", TORCH_BOX(&eca_coefficients_backward));
  m.impl("norm_eca_add_act", TORCH_BOX(&norm_eca_add_act));
  m.impl("norm_eca_add_act_", TORCH_BOX(&norm_eca_add_act_));
}

}  // namespace ecanet
