// Runs every loop of every instruction set on random maps, on random parts of them, in buffers of exactly their size,
// and compares loosely with plain loops in double. Built with sanitizers by test_fuzz.py; no torch.
//
// Usage: fuzz_kernels SECONDS SEED; FUZZ_AVX2 and FUZZ_AVX512 say which loops are linked, besides the baseline's.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using namespace ecanet;

std::string doing;  // what is being run, for the message of a failure

}  // namespace

// AddressSanitizer calls it before it reports.
extern "C" void __asan_on_error() { fprintf(stderr, "while running %s\n", doing.c_str()); }

namespace {

// ---- chance --------------------------------------------------------------------------------------------------------

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t within(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  bool chance(int64_t in) { return within(1, in) == 1; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  double normal() { return uniform() + uniform() + uniform() + uniform() - 2; }  // near enough, deviation 0.58
};

// ---- numbers -------------------------------------------------------------------------------------------------------

double value(double x) { return x; }
double value(float x) { return double(x); }
double value(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof(f));
  return double(f);
}
double value(float16 x) {
  const int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  const double sign = x.bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

void set(double& to, double x) { to = x; }
void set(float& to, double x) { to = float(x); }
void set(bfloat16& to, double x) {  // towards 0: any number near x will do
  const float f = float(x);
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  to.bits = std::isnan(x) ? 0x7fc0 : uint16_t(bits >> 16);
}
void set(float16& to, double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (std::isnan(x) || std::isinf(x)) {
    to.bits = std::isnan(x) ? 0x7e00 : sign | 0x7c00;
    return;
  }
  int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  to.bits = uint16_t(sign | (size < 0x1p-14 ? 0 : (exponent + 15) << 10) |
                     (int64_t(std::ldexp(size, 10 - exponent)) & 1023));
}

// Half a unit in the last place of the type, relative, and what is lost below the smallest normal number.
template <class T> constexpr double rounding = 0x1p-24;
template <> constexpr double rounding<double> = 0x1p-53;
template <> constexpr double rounding<bfloat16> = 0x1p-9;
template <> constexpr double rounding<float16> = 0x1p-12;  // 0x1p-11, since 2 x are allowed
template <class T> constexpr const char* type_name = "float";
template <> constexpr const char* type_name<double> = "double";
template <> constexpr const char* type_name<bfloat16> = "bfloat16";
template <> constexpr const char* type_name<float16> = "float16";

// ---- buffers -------------------------------------------------------------------------------------------------------

constexpr unsigned char kUntouched = 0xa5;

// So many elements, and what lies before and after them is poisoned; aligned as torch's are, or not.
template <class T>
class Buffer {
 public:
  Buffer(Random& random, int64_t size) : size_(size) {
    const int64_t before = random.chance(3) ? random.within(1, 15) : 0;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size_t(before + size) * sizeof(T)) != 0) abort();
    memory_ = static_cast<T*>(memory);
    data_ = memory_ + before;
    if (size) memset(static_cast<void*>(data_), kUntouched, size_t(size) * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(memory_); }

  T* get() const { return data_; }
  T* get_if(bool wanted) const { return wanted ? data_ : nullptr; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return value(data_[i]); }
  void put(int64_t i, double x) { set(data_[i], x); }
  void zero() {
    for (int64_t i = 0; i < size_; ++i) put(i, 0);
  }
  bool untouched(int64_t i) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data_ + i);
    for (size_t b = 0; b < sizeof(T); ++b)
      if (bytes[b] != kUntouched) return false;
    return true;
  }

  Buffer& fill(Random& random, double mean = 0, double deviation = 1) {
    for (int64_t i = 0; i < size_; ++i) put(i, mean + deviation * random.normal());
    return *this;
  }

 private:
  T *memory_, *data_;
  int64_t size_;
};

[[noreturn]] void fail(const char* what, int64_t i, double got, double want) {
  printf("FAILED %s: %s[%lld] is %.17g, want %.17g\n", doing.c_str(), what, static_cast<long long>(i), got, want);
  exit(1);
}

void check(const char* what, int64_t i, double got, double want, double allowed) {
  if (std::isnan(want) ? std::isnan(got) : got == want) return;
  if (std::isfinite(want) && std::fabs(got - want) <= allowed) return;
  fail(what, i, got, want);
}

template <class T>
void check_untouched(const char* what, const Buffer<T>& buffer, int64_t i) {
  if (!buffer.untouched(i)) fail(what, i, buffer[i], NAN);
}

// ---- maps ----------------------------------------------------------------------------------------------------------

Map random_map(Random& random) {
  Map map{random.within(1, 3), random.within(1, 80), random.within(1, 80), random.chance(2)};
  switch (random.within(0, 9)) {
    case 0:  // sums are merged every 4096 positions
      map.positions = random.chance(2) ? random.within(4088, 4112) : random.within(8186, 8202);
      map.channels = random.chance(2) ? random.within(1, 6) : 16;
      map.samples = 1;
      break;
    case 1:  // channels are walked in blocks of 512
      map.channels = random.chance(2) ? random.within(505, 520) : random.within(1020, 1100);
      map.positions = random.within(1, 6);
      break;
    case 2: map.positions = random.within(1, 9); break;
    case 3: map.channels = random.within(1, 9); break;
    case 4: map.positions = 16 * random.within(1, 5), map.channels = 16 * random.within(1, 5); break;
    case 5: map.positions = 1; break;
  }
  return map;
}

struct Range {
  int64_t begin, end;
};

Range random_range(Random& random, int64_t size) {
  if (random.chance(2)) return {0, size};
  const int64_t begin = random.within(0, size), end = random.within(begin, size);
  return {begin, end};
}

int64_t nc_of(const Map& map, int64_t i) {
  if (map.channels_last) return i / (map.channels * map.positions) * map.channels + i % map.channels;
  return i / map.positions;
}
int64_t line_of(const Map& map, int64_t i) { return i / map.line_size(); }
int64_t bundle_of(const Map& map, int64_t nc) {
  if (!map.channels_last) return nc;
  return nc / map.channels * map.bundles_per_sample() + nc % map.channels / Map::kBundle;
}
bool within(const Range& range, int64_t i) { return range.begin <= i && i < range.end; }

int64_t elements(const Map& map) { return map.samples * map.channels * map.positions; }

void describe(const Map& map, const Range& range, int act = -1) {
  char text[200];
  snprintf(text, sizeof(text), " N=%lld C=%lld S=%lld %s [%lld, %lld) act=%d", static_cast<long long>(map.samples),
           static_cast<long long>(map.channels), static_cast<long long>(map.positions),
           map.channels_last ? "channels last" : "contiguous", static_cast<long long>(range.begin),
           static_cast<long long>(range.end), act);
  doing += text;
}

// A map with a mean, now and then with a NaN or an infinity in it.
template <class T>
void fill_map(Random& random, Buffer<T>& x, bool special) {
  const double means[] = {0, 1, -30, 100};
  x.fill(random, means[random.within(0, 3)], random.chance(8) ? 0 : 1);
  const double specials[] = {NAN, INFINITY, -INFINITY};
  for (int64_t left = special ? random.within(1, 3) : 0; left > 0; --left)
    x.put(random.chance(3) ? 0 : random.within(0, x.size() - 1), specials[random.within(0, 2)]);
}

// ---- reductions ----------------------------------------------------------------------------------------------------

struct Sums {
  double total = 0, size = 0;
  void add(double x) {
    total += x;
    size += std::fabs(x);
  }
};

// How far a sum of so many numbers may be off, relative to the sum of their sizes.
template <class A>
double of_sum(int64_t count) {
  return rounding<A> * (64 + 8 * std::sqrt(double(count)));
}

template <class T>
std::vector<Sums> sums(const Map& map, const Buffer<T>& x) {
  std::vector<Sums> result(size_t(map.samples * map.channels));
  for (int64_t i = 0; i < x.size(); ++i) result[size_t(nc_of(map, i))].add(x[i]);
  return result;
}

template <class T>
void fuzz_squeeze(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const Map map = random_map(random);
  const Range range = random_range(random, map.blocks());
  describe(map, range);
  Buffer<T> x(random, elements(map));
  fill_map(random, x, random.chance(5));
  const double S = double(map.positions);
  if (!map.channels_last) {
    Buffer<A> mean(random, map.samples * map.channels);
    kernels.squeeze({map, x.get(), mean.get()}, range.begin, range.end);
    const auto want = sums(map, x);
    for (int64_t nc = 0; nc < mean.size(); ++nc) {
      const Sums& w = want[size_t(nc)];
      if (within(range, nc))
        check("mean", nc, mean[nc], w.total / S, of_sum<A>(map.positions) * w.size / S);
      else
        check_untouched("mean", mean, nc);
    }
    return;
  }
  Buffer<A> blocks(random, map.blocks() * map.channels);
  kernels.squeeze({map, x.get(), blocks.get()}, range.begin, range.end);
  std::vector<Sums> want(size_t(blocks.size()));
  for (int64_t i = 0; i < x.size(); ++i) {
    const int64_t position = i / map.channels, sample = position / map.positions;
    const int64_t block = sample * map.blocks_per_sample() + position % map.positions / Map::kPositions;
    want[size_t(block * map.channels + i % map.channels)].add(x[i]);
  }
  for (int64_t i = 0; i < blocks.size(); ++i) {
    const Sums& w = want[size_t(i)];
    if (within(range, i / map.channels))
      check("sum", i, blocks[i], w.total, of_sum<A>(Map::kPositions) * w.size);
    else
      check_untouched("sum", blocks, i);
  }
  kernels.squeeze({map, x.get(), blocks.get()}, 0, map.blocks());
  Buffer<A> mean(random, map.samples * map.channels);
  kernels.average(map, blocks.get(), mean.get());
  const auto of_maps = sums(map, x);
  for (int64_t nc = 0; nc < mean.size(); ++nc) {
    const Sums& w = of_maps[size_t(nc)];
    check("mean", nc, mean[nc], w.total / S, of_sum<A>(map.positions) * w.size / S);
  }
}

template <class T>
void fuzz_moments(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const Map map = random_map(random);
  const Range range = random_range(random, map.bundles());
  describe(map, range);
  Buffer<T> x(random, elements(map));
  fill_map(random, x, random.chance(5));
  Buffer<double> mean(random, map.samples * map.channels), m2(random, map.samples * map.channels);
  kernels.moments({map, x.get(), mean.get(), m2.get()}, range.begin, range.end);
  const auto want = sums(map, x);
  std::vector<double> want_m2(want.size());
  const double S = double(map.positions);
  for (int64_t i = 0; i < x.size(); ++i) {
    const auto nc = size_t(nc_of(map, i));
    const double away = x[i] - want[nc].total / S;
    want_m2[nc] += away * away;
  }
  for (int64_t nc = 0; nc < mean.size(); ++nc) {
    if (!within(range, bundle_of(map, nc))) {
      check_untouched("mean", mean, nc);
      check_untouched("m2", m2, nc);
      continue;
    }
    const Sums& w = want[size_t(nc)];
    check("mean", nc, mean[nc], w.total / S, of_sum<A>(map.positions) * w.size / S);
    const double w2 = std::isfinite(w.total) ? want_m2[size_t(nc)] : NAN, lost = rounding<A> * w.size / S;
    check("m2", nc, m2[nc], w2, 8 * of_sum<A>(map.positions) * w2 + 16 * S * lost * lost);
  }
}

// ---- element by element --------------------------------------------------------------------------------------------

double activate(Act act, double y) {
  switch (act) {
    case Act::none: return y;
    case Act::relu: return y < 0 ? 0 : y;
    case Act::relu6: return y < 0 ? 0 : y > 6 ? 6 : y;
    case Act::silu: return y / (1 + std::exp(-y));
    case Act::hardswish: return y * (y < -3 ? 0 : y > 3 ? 6 : y + 3) / 6;
  }
  abort();
}

double activate_backward(Act act, double grad, double from) {
  switch (act) {
    case Act::none: return grad;
    case Act::relu: return from <= 0 ? 0 : grad;
    case Act::relu6: return from <= 0 || from >= 6 ? 0 : grad;
    case Act::silu: {
      const double gate = 1 / (1 + std::exp(-from));
      return grad * gate * (1 + from * (1 - gate));
    }
    case Act::hardswish: return from <= -3 ? 0 : from > -3 && from < 3 ? grad * (from / 3 + 0.5) : grad;
  }
  abort();
}

Act random_act(Random& random) { return static_cast<Act>(random.within(0, 4)); }

template <class T>
void fuzz_apply(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const Map map = random_map(random);
  const Range range = random_range(random, map.lines());
  const Act act = random_act(random);
  describe(map, range, int(act));
  const int64_t size = elements(map), nc_size = map.samples * map.channels;
  const bool with_residual = random.chance(2), in_place = random.chance(2), streams = !in_place && random.chance(2);
  Buffer<T> x(random, size), residual(random, with_residual ? size : 0), other(random, in_place ? 0 : size);
  Buffer<A> scale(random, nc_size), shift(random, nc_size);
  fill_map(random, x, random.chance(5));
  residual.fill(random, 0, 3);
  scale.fill(random, 0, 2);
  shift.fill(random, 0, 4);
  std::vector<double> before(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) before[size_t(i)] = x[i];
  Buffer<T>& out = in_place ? x : other;
  kernels.apply({map, act, x.get(), scale.get(), shift.get(), residual.get_if(with_residual), out.get(), streams},
                range.begin, range.end);
  for (int64_t i = 0; i < size; ++i) {
    const double xi = before[size_t(i)];
    if (!within(range, line_of(map, i))) {
      if (in_place)
        check("x", i, x[i], xi, 0);
      else
        check_untouched("out", out, i);
      continue;
    }
    const int64_t nc = nc_of(map, i);
    const double r = with_residual ? residual[i] : 0, product = xi * scale[nc];
    const double want = activate(act, product + shift[nc] + r);
    const double terms = std::fabs(product) + std::fabs(shift[nc]) + std::fabs(r);
    check("out", i, out[i], want, 2 * rounding<T> * std::fabs(want) + 32 * rounding<A> * terms + 1e-7);
  }
}

// What both passes of the backward start from.
template <class T>
struct Gradient {
  using A = Acc<T>;
  Map map;
  Act act;
  bool needs_input, with_saved;
  Buffer<T> x, grad, saved;
  Buffer<A> scale, shift, center;

  Gradient(Random& random, const Map& m, Act a)
      : map(m), act(a), needs_input(a == Act::silu || a == Act::hardswish),
        with_saved(a == Act::relu || a == Act::relu6 || (needs_input && random.chance(2))), x(random, elements(m)),
        grad(random, elements(m)), saved(random, with_saved ? elements(m) : 0), scale(random, m.samples * m.channels),
        shift(random, needs_input ? m.samples * m.channels : 0), center(random, m.channels) {
    const bool special = random.chance(5);
    fill_map(random, x, special);
    grad.fill(random);
    if (special) grad.put(random.within(0, grad.size() - 1), random.chance(2) ? NAN : INFINITY);
    for (int64_t i = 0; i < saved.size(); ++i) {  // the output is often 0 or 6
      const double y = 3 + 6 * random.normal();
      saved.put(i, needs_input ? y - 3 : y < 0 ? 0 : y > 6 && act == Act::relu6 ? 6 : y);
    }
    scale.fill(random, 0, 0.5);
    shift.fill(random, 0, 2);
    center.fill(random, 1, 1);
  }

  ActGrad<T> args() const {
    // The scale is not read where the output says enough, nor is the shift.
    return {act, grad.get(), saved.get_if(with_saved), scale.get(), shift.get_if(needs_input)};
  }

  double from(int64_t i) const {
    if (!needs_input) return with_saved ? saved[i] : 0;
    const int64_t nc = nc_of(map, i);
    return x[i] * scale[nc] + shift[nc] + (with_saved ? saved[i] : 0);
  }
  double d(int64_t i) const { return activate_backward(act, grad[i], from(i)); }

  // How far d may be off: Hardswish's derivative jumps at 3 and -3, and what goes into SiLU may cancel.
  double slack(int64_t i) const {
    if (!needs_input) return 0;
    const int64_t nc = nc_of(map, i);
    const double terms = 1 + std::fabs(x[i] * scale[nc]) + std::fabs(shift[nc]) + (with_saved ? std::fabs(saved[i]) : 0);
    if (!std::isfinite(terms) || !std::isfinite(grad[i])) return 0;
    const double near = std::fabs(std::fabs(from(i)) - 3) < 1e-4 * terms && act == Act::hardswish ? 1 : 0;
    return std::fabs(grad[i]) * (near + 64 * rounding<A> * terms);
  }
};

template <class T>
void fuzz_reduce(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const Map map = random_map(random);
  const Range range = random_range(random, map.bundles());
  const Act act = random_act(random);
  describe(map, range, int(act));
  const Gradient<T> g(random, map, act);
  const bool with_d = random.chance(2), streams = random.chance(2);
  Buffer<T> d(random, with_d ? elements(map) : 0);
  Buffer<A> p(random, map.samples * map.channels), q(random, map.samples * map.channels);
  kernels.reduce({map, g.args(), g.x.get(), g.center.get(), d.get_if(with_d), streams, p.get(), q.get()}, range.begin,
                 range.end);
  std::vector<Sums> want_p(size_t(p.size())), want_q(size_t(p.size()));
  std::vector<double> slack_p(size_t(p.size())), slack_q(size_t(p.size()));
  for (int64_t i = 0; i < elements(map); ++i) {
    const auto nc = size_t(nc_of(map, i));
    const double want = g.d(i), slack = g.slack(i), away = g.x[i] - g.center[int64_t(nc) % map.channels];
    want_p[nc].add(want);
    want_q[nc].add(want * away);
    slack_p[nc] += slack;
    if (std::isfinite(away)) slack_q[nc] += slack * std::fabs(away);
    if (!with_d) continue;
    if (within(range, bundle_of(map, int64_t(nc))))
      check("d", i, d[i], want, 2 * rounding<T> * std::fabs(want) + slack + 1e-7);
    else
      check_untouched("d", d, i);
  }
  for (int64_t nc = 0; nc < p.size(); ++nc) {
    const auto k = size_t(nc);
    if (!within(range, bundle_of(map, nc))) {
      check_untouched("p", p, nc);
      check_untouched("q", q, nc);
      continue;
    }
    check("p", nc, p[nc], want_p[k].total, of_sum<A>(map.positions) * want_p[k].size + slack_p[k]);
    check("q", nc, q[nc], want_q[k].total, of_sum<A>(map.positions) * want_q[k].size + slack_q[k]);
  }
}

template <class T>
void fuzz_input_grad(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const Map map = random_map(random);
  const Range range = random_range(random, map.lines());
  const Act act = random_act(random);
  describe(map, range, int(act));
  const Gradient<T> g(random, map, act);
  const bool with_slope = random.chance(2), per_sample = random.chance(2), streams = random.chance(2);
  Buffer<A> offset(random, map.samples * map.channels), slope(random, (per_sample ? map.samples : 1) * map.channels);
  offset.fill(random);
  slope.fill(random);
  Buffer<T> out(random, elements(map));
  kernels.input_grad({map, g.args(), g.x.get_if(with_slope || g.needs_input), offset.get(), slope.get_if(with_slope),
                      per_sample, g.center.get(), out.get(), streams},
                     range.begin, range.end);
  for (int64_t i = 0; i < out.size(); ++i) {
    if (!within(range, line_of(map, i))) {
      check_untouched("out", out, i);
      continue;
    }
    const int64_t nc = nc_of(map, i), c = nc % map.channels;
    const double first = g.d(i) * g.scale[nc], third = with_slope ? slope[per_sample ? nc : c] * (g.x[i] - g.center[c]) : 0;
    const double want = first + offset[nc] + third;
    const double terms = std::fabs(first) + std::fabs(offset[nc]) + std::fabs(third);
    check("out", i, out[i], want,
          2 * rounding<T> * std::fabs(want) + 32 * rounding<A> * terms + g.slack(i) * std::fabs(g.scale[nc]) + 1e-7);
  }
}

// ---- the (N, C)-sized maths ----------------------------------------------------------------------------------------

template <class A>
struct Norm {
  bool with_statistics, with_weight, with_bias;
  Buffer<A> mean, var, weight, bias;
  double eps = 1e-3;

  Norm(Random& random, int64_t channels)
      : with_statistics(!random.chance(3)), with_weight(!random.chance(3)), with_bias(!random.chance(3)),
        mean(random, channels), var(random, channels), weight(random, channels), bias(random, channels) {
    mean.fill(random);
    weight.fill(random);
    bias.fill(random);
    for (int64_t c = 0; c < channels; ++c) var.put(c, 0.1 + random.uniform());
  }
  NormArgs<A> args() const {
    return {mean.get_if(with_statistics), var.get_if(with_statistics), weight.get_if(with_weight),
            bias.get_if(with_bias), eps};
  }
  double m(int64_t c) const { return with_statistics ? mean[c] : 0; }
  double inverse(int64_t c) const { return with_statistics ? 1 / std::sqrt(var[c] + eps) : 1; }
  double gamma(int64_t c) const { return with_weight ? weight[c] : 1; }
  double a(int64_t c) const { return gamma(c) * inverse(c); }
  double beta(int64_t c) const { return with_bias ? bias[c] : 0; }
  double s(int64_t c, double of) const { return a(c) * (of - m(c)) + beta(c); }
};

struct Band {
  int64_t k;
  bool circular;
  Band(Random& random, int64_t channels) : k(2 * random.within(0, 5) + 1), circular(random.chance(2) && k <= channels) {}
  // Which channel the tap looks at from channel c, or -1.
  int64_t neighbour(int64_t c, int64_t tap, int64_t channels) const {
    const int64_t at = c + tap - (k - 1) / 2;
    if (circular) return (at + channels) % channels;
    return at < 0 || at >= channels ? -1 : at;
  }
};

int64_t random_channels(Random& random) { return random.chance(6) ? random.within(500, 1030) : random.within(1, 70); }

template <class A> constexpr double loosely = 3e-5;
template <> constexpr double loosely<double> = 1e-12;

template <class T>
void fuzz_statistics(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const int64_t samples = random.within(1, 5), channels = random_channels(random), positions = random.within(1, 99);
  Buffer<double> mean(random, samples * channels), m2(random, samples * channels);
  Buffer<A> batch_mean(random, channels), batch_var(random, channels);
  mean.fill(random, 3);
  for (int64_t i = 0; i < m2.size(); ++i) m2.put(i, double(positions) * random.uniform());
  Buffer<double> total(random, channels), spread(random, channels);
  total.zero();
  spread.zero();
  kernels.statistics({samples, channels, positions, mean.get(), m2.get(), total.get(), spread.get(), batch_mean.get(),
                      batch_var.get()});
  for (int64_t c = 0; c < channels; ++c) {
    double mu = 0, var = 0;
    for (int64_t n = 0; n < samples; ++n) mu += mean[n * channels + c] / double(samples);
    for (int64_t n = 0; n < samples; ++n) {
      const double away = mean[n * channels + c] - mu;
      var += (m2[n * channels + c] / double(positions) + away * away) / double(samples);
    }
    check("mean", c, batch_mean[c], mu, loosely<A> * (1 + std::fabs(mu)));
    check("var", c, batch_var[c], var, loosely<A> * (1 + var));
  }
}

template <class T>
void fuzz_coefficients(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const int64_t samples = random.within(1, 5), channels = random_channels(random), nc = samples * channels;
  const Range range = random_range(random, samples);
  describe({samples, channels, 1, false}, range);
  const Norm<A> norm(random, channels);
  const Band band(random, channels);
  const bool with_band = !random.chance(4), with_s = with_band || random.chance(2);
  const double factor = random.chance(2) ? 1 : 2.5;
  Buffer<A> means(random, nc), taps(random, band.k), a(random, channels), b(random, channels), s(random, nc),
      gate(random, with_band ? nc : 0), scale(random, nc), shift(random, nc),
      padded(random, with_band ? samples * (channels + band.k - 1) : 0);
  means.fill(random);
  taps.fill(random);
  padded.zero();
  const CoefficientArgs<A> args{channels,
                                norm.args(),
                                means.get_if(with_s),
                                taps.get_if(with_band),
                                band.k,
                                band.circular,
                                factor,
                                a.get(),
                                b.get(),
                                s.get_if(with_s),
                                gate.get_if(with_band),
                                scale.get(),
                                shift.get(),
                                padded.get_if(with_band)};
  kernels.prepare(args);
  kernels.coefficients(args, range.begin, range.end);
  for (int64_t c = 0; c < channels; ++c) {
    check("a", c, a[c], norm.a(c), loosely<A> * (1 + std::fabs(norm.a(c))));
    check("b", c, b[c], norm.beta(c) - norm.a(c) * norm.m(c), 10 * loosely<A>);
  }
  for (int64_t i = 0; i < nc; ++i) {
    const int64_t n = i / channels, c = i % channels;
    if (!within(range, n)) {
      check_untouched("scale", scale, i);
      check_untouched("shift", shift, i);
      continue;
    }
    if (with_s) check("s", i, s[i], norm.s(c, means[i]), 10 * loosely<A>);
    double g = 1, logit = 0;
    for (int64_t j = 0; with_band && j < band.k; ++j) {
      const int64_t from = band.neighbour(c, j, channels);
      if (from >= 0) logit += taps[j] * norm.s(from, means[n * channels + from]);
    }
    if (with_band) g = factor / (1 + std::exp(-logit));
    if (with_band) check("gate", i, gate[i], g, 10 * loosely<A>);
    check("scale", i, scale[i], g * norm.a(c), 30 * loosely<A>);
    check("shift", i, shift[i], g * (norm.beta(c) - norm.a(c) * norm.m(c)), 100 * loosely<A>);
  }
}

template <class T>
void fuzz_coefficients_backward(const Kernels<T>& kernels, Random& random) {
  using A = Acc<T>;
  const int64_t samples = random.within(1, 5), channels = random_channels(random), positions = random.within(1, 99);
  const int64_t nc = samples * channels;
  describe({samples, channels, positions, false}, {0, samples});
  const Norm<A> norm(random, channels);
  const Band band(random, channels);
  const bool with_band = random.chance(2), with_gate = with_band || random.chance(2);
  const bool with_grad_s = with_gate && !with_band, with_grad_v = with_grad_s && random.chance(2);
  const double factor = random.chance(2) ? 1 : 2.5;
  const int64_t k = with_band ? band.k : 0, room = channels + (with_band ? k - 1 : 0);
  Buffer<A> p(random, nc), q(random, nc), means(random, nc), gate(random, nc), grad_s(random, nc), taps(random, k),
      m2(random, nc), grad_v(random, nc), offset(random, nc), slope(random, nc), weight(random, channels), bias(random, channels), band_grad(random, k),
      mean(random, channels), var(random, channels), a(random, channels), ds(random, channels), padded(random, room),
      logits(random, room);
  Buffer<double> sum_a(random, channels), sum_b(random, channels);
  for (Buffer<A>* t : {&p, &q, &means, &grad_s, &m2, &grad_v, &taps}) t->fill(random);
  for (int64_t i = 0; i < nc; ++i) gate.put(i, random.uniform());
  padded.zero();
  logits.zero();
  sum_a.zero();
  sum_b.zero();
  kernels.coefficients_backward({samples,
                                 channels,
                                 positions,
                                 norm.args(),
                                 p.get(),
                                 q.get(),
                                 means.get(),
                                 gate.get_if(with_gate),
                                 grad_s.get_if(with_grad_s),
                                 m2.get_if(with_grad_v),
                                 grad_v.get_if(with_grad_v),
                                 taps.get_if(with_band),
                                 k,
                                 band.circular,
                                 factor,
                                 offset.get(),
                                 slope.get_if(with_grad_v),
                                 weight.get(),
                                 bias.get(),
                                 band_grad.get(),
                                 mean.get(),
                                 var.get(),
                                 a.get(),
                                 ds.get(),
                                 padded.get(),
                                 logits.get(),
                                 sum_a.get(),
                                 sum_b.get()});
  std::vector<double> want_ds(static_cast<size_t>(nc)), want_band(static_cast<size_t>(k)), size_band(want_band);
  for (int64_t i = 0; i < nc; ++i) {
    const int64_t n = i / channels, c = i % channels;
    if (with_grad_s) want_ds[size_t(i)] = grad_s[i];
    if (!with_band) continue;
    const double logit = (norm.a(c) * q[i] + norm.beta(c) * p[i]) * gate[i] * (1 - gate[i] / factor);
    for (int64_t j = 0; j < k; ++j) {
      const int64_t from = band.neighbour(c, j, channels);
      if (from < 0) continue;
      want_ds[size_t(n * channels + from)] += taps[j] * logit;
      const double term = logit * norm.s(from, means[n * channels + from]);
      want_band[size_t(j)] += term;
      size_band[size_t(j)] += std::fabs(term);
    }
  }
  for (int64_t j = 0; j < k; ++j)
    check("band", j, band_grad[j], want_band[size_t(j)], loosely<A> * (1 + size_band[size_t(j)]));
  for (int64_t c = 0; c < channels; ++c) {
    double da = 0, db = 0, size = 1;
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t i = n * channels + c;
      const double g = with_gate ? gate[i] : 1, dsi = want_ds[size_t(i)], away = means[i] - norm.m(c);
      const double dv = with_grad_v ? 2 * norm.a(c) * grad_v[i] / double(positions) : 0;  // of a m2, per position
      const double want_slope = dv * norm.a(c), from_s = dsi * norm.a(c) / double(positions);
      if (with_grad_v) check("slope", i, slope[i], want_slope, 100 * loosely<A> * (1 + std::fabs(want_slope)));
      const double terms = 1 + std::fabs(from_s) + std::fabs(want_slope * away);
      check("offset", i, offset[i], from_s - want_slope * away, 100 * loosely<A> * terms);
      da += g * q[i] + dsi * away + dv * m2[i];
      db += g * p[i] + dsi;
      size += std::fabs(g * q[i]) + std::fabs(dv * m2[i]) + std::fabs(dsi) * (1 + std::fabs(away)) + std::fabs(g * p[i]);
    }
    const double inverse = norm.inverse(c), gamma = norm.gamma(c), cube = inverse * inverse * inverse;
    check("weight", c, weight[c], da * inverse, 10 * loosely<A> * size * inverse);
    check("bias", c, bias[c], db, 10 * loosely<A> * size);
    check("mean", c, mean[c], -norm.a(c) * db, 10 * loosely<A> * size * inverse * std::fabs(gamma));
    check("var", c, var[c], -0.5 * gamma * da * cube, 10 * loosely<A> * size * cube * std::fabs(gamma));
  }
}

// ---- every instruction set, type and loop --------------------------------------------------------------------------

std::map<std::string, long> counts;

template <class T>
void fuzz_type(const std::string& isa, const Kernels<T>& kernels, Random& random) {
  using Loop = void (*)(const Kernels<T>&, Random&);
  const std::pair<const char*, Loop> loops[] = {
      {"squeeze", fuzz_squeeze<T>},           {"moments", fuzz_moments<T>},
      {"apply", fuzz_apply<T>},               {"reduce", fuzz_reduce<T>},
      {"input_grad", fuzz_input_grad<T>},     {"statistics", fuzz_statistics<T>},
      {"coefficients", fuzz_coefficients<T>}, {"coefficients_backward", fuzz_coefficients_backward<T>},
  };
  for (const auto& [name, loop] : loops) {
    const std::string key = isa + " " + type_name<T> + " " + name;
    doing = key + " seed " + std::to_string(random.state) + ":";
    ++counts[key];
    loop(kernels, random);
  }
}

template <class T>
void fuzz(Random& random) {
  fuzz_type<T>("baseline", KernelsFor<T>::baseline(), random);
#ifdef FUZZ_AVX2
  fuzz_type<T>("avx2", KernelsFor<T>::avx2(), random);
#endif
#ifdef FUZZ_AVX512
  fuzz_type<T>("avx512", KernelsFor<T>::avx512(), random);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  using Clock = std::chrono::steady_clock;
  const auto stop = Clock::now() + std::chrono::duration<double>(atof(argv[1]));
  Random random{uint64_t(atoll(argv[2]))};
  do {
    fuzz<float>(random);
    fuzz<double>(random);
    fuzz<bfloat16>(random);
    fuzz<float16>(random);
  } while (Clock::now() < stop);
  for (const auto& [key, count] : counts) printf("%s: %ld\n", key.c_str(), count);
  return 0;
}
