// The loops over feature maps, for the instruction set that this is included for (see simd.h).
#include "simd.h"

namespace ecanet {
namespace ECANET_ISA {

template <class T>
constexpr int64_t width = Simd<Acc<T>>::width;

// An (N, C)- or C-sized factor within a line: one number for a contiguous line, one per element for channels last.
template <class A, bool last>
struct Factor {
  const A* values;
  Vec<A> everywhere;
  ECANET_INLINE Factor at(const A* p) {
    Factor f;
    f.values = p;
    f.everywhere = !last && p ? splat(*p) : Vec<A>{};
    return f;
  }
  inline __attribute__((always_inline)) Vec<A> operator()(int64_t i) const {
    if constexpr (last) return load(values + i);
    return everywhere;
  }
  inline __attribute__((always_inline)) Vec<A> some(int64_t i, int64_t count) const {
    if constexpr (last) return load_some(values + i, count);
    return everywhere;
  }
};

// Where a line begins: in the map, in an (N, C)-sized tensor and in a C-sized one.
struct Line {
  int64_t map, nc, c;
  static Line at(const Map& map, int64_t line) {
    if (map.channels_last) return {line * map.channels, line / map.positions * map.channels, 0};
    return {line * map.positions, line, line % map.channels};
  }
};

// ---- squeeze -------------------------------------------------------------------------------------------------------

// Sums of long runs are kept in blocks, so that the rounding error does not grow with the size of the map.
constexpr int64_t kBlock = 4096;
// This many vectors are summed before they are added to the running total.
constexpr int64_t kPartial = 32;

// The sums of a run of at least one vector, lane by lane.
template <class T>
ECANET_INLINE Vec<Acc<T>> lane_sums(const T* x, int64_t size) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  Vec<A> s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W) {
    s0 += load(x + i);
    s1 += load(x + i + W);
    s2 += load(x + i + 2 * W);
    s3 += load(x + i + 3 * W);
  }
  for (; i + W <= size; i += W) s0 += load(x + i);
  if (i < size) s1 += keep_last<A>(load(x + size - W), size - i);
  return (s0 + s1) + (s2 + s3);
}

template <class T>
ECANET_INLINE Acc<T> row_sum(const T* x, int64_t size) {
  using A = Acc<T>;
  A total = 0;
  for (; size >= 2 * kBlock; size -= kBlock, x += kBlock) total += sum<A>(lane_sums(x, kBlock));
  return total + sum<A>(size < width<T> ? load_some(x, size) : lane_sums(x, size));
}

// Channels last: `columns` walks the channels of [begin, end) in blocks that stay in the first-level cache.
constexpr int64_t kColumns = 512;

template <class F>
ECANET_INLINE void columns(const Map& map, int64_t begin, int64_t end, F&& block) {
  const int64_t per_sample = map.bundles_per_sample();
  while (begin < end) {
    const int64_t n = begin / per_sample;
    const int64_t last = end < (n + 1) * per_sample ? end : (n + 1) * per_sample;
    int64_t c = (begin - n * per_sample) * Map::kBundle;
    int64_t stop = (last - n * per_sample) * Map::kBundle;
    if (stop > map.channels) stop = map.channels;
    for (; c < stop; c += kColumns) block(n, c, stop - c < kColumns ? stop - c : kColumns);
    begin = last;
  }
}

template <int rows, class T>
ECANET_INLINE void add_rows(const T* x, int64_t stride, int64_t count, Acc<T>* total) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    Vec<A> s = load(x + i);
#pragma GCC unroll 8
    for (int r = 1; r < rows; ++r) s += load(x + r * stride + i);
    store(total + i, load(total + i) + s);
  }
  if (i < count) {
    const int64_t some = count - i;
    Vec<A> s = {};
    for (int r = 0; r < rows; ++r) s += load_some(x + r * stride + i, some);
    store(total + i, load(total + i) + s);  // total is padded to whole vectors
  }
}

template <class T>
void squeeze(const SqueezeArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t positions = a.map.positions, channels = a.map.channels;
  if (!a.map.channels_last) {
    constexpr int64_t W = width<T>;
    int64_t row = begin;
    for (; positions >= W && positions < kBlock && row + W <= end; row += W) {  // as many rows as a vector has lanes
      Vec<A> s[W];
#pragma GCC unroll 16
      for (int64_t r = 0; r < W; ++r) s[r] = lane_sums(a.x + (row + r) * positions, positions);
      store(a.sums + row, sums<A>(s) / A(positions));
    }
    for (; row < end; ++row) a.sums[row] = row_sum(a.x + row * positions, positions) / A(positions);
    return;
  }
  const int64_t blocks = a.map.blocks_per_sample();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * Map::kPositions;
    const int64_t rows = positions - first < Map::kPositions ? positions - first : Map::kPositions;
    const T* x = a.x + (unit / blocks * positions + first) * channels;
    for (int64_t c = 0; c < channels; c += kColumns) {
      const int64_t count = channels - c < kColumns ? channels - c : kColumns;
      A total[kColumns] = {};
      int64_t s = 0;
      for (; s + 8 <= rows; s += 8) add_rows<8>(x + s * channels + c, channels, count, total);
      for (; s < rows; ++s) add_rows<1>(x + s * channels + c, channels, count, total);
      memcpy(a.sums + unit * channels + c, total, count * sizeof(A));
    }
  }
}

template <class T>
void average(const Map& map, Acc<T>* sums, Acc<T>* mean) {
  using A = Acc<T>;
  constexpr int64_t together = kBlock / Map::kPositions;
  const int64_t channels = map.channels, blocks = map.blocks_per_sample();
  const A per_position = A(map.positions);
  auto add = [&](const A* from, A* to) {
    for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
  };
  for (int64_t n = 0; n < map.samples; ++n) {
    A *const m = mean + n * channels, *const s = sums + n * blocks * channels;
    for (int64_t first = 0; first < blocks; first += together) {
      const int64_t last = first + together < blocks ? first + together : blocks;
      for (int64_t b = first + 1; b < last; ++b) add(s + b * channels, s + first * channels);
      if (first > 0) add(s + first * channels, s);
    }
    for (int64_t c = 0; c < channels; ++c) m[c] = s[c] / per_position;
  }
}

// ---- moments -------------------------------------------------------------------------------------------------------

// Means and sums of squares about them of two sets become those of both (Chan, Golub, LeVeque 1979).
struct Moments {
  double count, mean, m2;
  void merge(double other_count, double other_mean, double other_m2) {
    const double both = count + other_count;
    const double delta = other_mean - mean;
    mean += delta * (other_count / both);
    m2 += other_m2 + delta * delta * (count * other_count / both);
    count = both;
  }
};

// In double, value by value: for sums that overflow, and for values that are not finite.
template <class T>
void slow_moments(const T* x, int64_t stride, int64_t size, double* mean, double* m2) {
  double total = 0, spread = 0;
  for (int64_t i = 0; i < size; ++i) total += load_some(x + i * stride, 1)[0];
  *mean = total / double(size);
  for (int64_t i = 0; i < size; ++i) {
    const double away = load_some(x + i * stride, 1)[0] - *mean;
    spread += away * away;
  }
  *m2 = spread;
}

template <class T>
void row_moments(const T* x, int64_t size, double* mean, double* m2) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  Moments all = {0, 0, 0};
  for (int64_t block = 0; block < size; block += kBlock) {  // a block is read twice, the second time from the cache
    const int64_t count = size - block < kBlock ? size - block : kBlock;
    const T* b = x + block;
    const A about = row_sum(b, count) / A(count);
    const Vec<A> center = splat(about);
    Vec<A> d0 = {}, d1 = {}, q0 = {}, q1 = {};
    int64_t i = 0;
    while (i + 2 * W <= count) {
      // Squares of values on a coarse grid, as those far from 0 are, round to one side when added to a long sum.
      const int64_t end = count - i < kPartial * W ? count : i + kPartial * W;
      Vec<A> p0 = {}, p1 = {};
      for (; i + 2 * W <= end; i += 2 * W) {
        const Vec<A> u = load(b + i) - center, v = load(b + i + W) - center;
        d0 += u;
        d1 += v;
        p0 += u * u;
        p1 += v * v;
      }
      q0 += p0;
      q1 += p1;
    }
    for (; i + W <= count; i += W) {
      const Vec<A> u = load(b + i) - center;
      d0 += u;
      q0 += u * u;
    }
    if (i < count) {
      const Vec<A> v = size < W ? load_some(b, count) - center : load(b + count - W) - center;
      const Vec<A> u = size < W ? keep_first<A>(v, count) : keep_last<A>(v, count - i);
      d1 += u;
      q1 += u * u;
    }
    const A d = sum<A>(d0 + d1), q = sum<A>(q0 + q1);
    if (!std::isfinite(q)) return slow_moments(x, 1, size, mean, m2);
    // What `about` lost by rounding.
    const A rest = d / A(count);
    if (count == size) {
      *mean = double(about) + rest;
      *m2 = q - d * rest;
      return;
    }
    all.merge(double(count), double(about) + rest, q - d * rest);
  }
  *mean = all.mean;
  *m2 = all.m2;
}

// `rows` positions at once: their moments in registers, then merged with those of the positions before.
template <int rows, class T>
ECANET_INLINE void merge_rows(const T* x, int64_t stride, int64_t count, int64_t before, const Acc<T>* origin,
                              Acc<T>* mean, Acc<T>* m2) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  const A both = A(before) + A(rows);
  const A weight = A(rows) / both, cross = A(before) * A(rows) / both;
  auto merge = [&](int64_t i, auto&& load_row) __attribute__((always_inline)) {
    const Vec<A> from = load(origin + i);
    Vec<A> v[rows];
    Vec<A> total = {};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      v[r] = load_row(x + r * stride + i) - from;
      total += v[r];
    }
    const Vec<A> here = total * (A(1) / A(rows));
    Vec<A> spread = {};
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) spread += (v[r] - here) * (v[r] - here);
    const Vec<A> delta = here - load(mean + i);
    store(mean + i, load(mean + i) + delta * weight);
    store(m2 + i, load(m2 + i) + spread + delta * delta * cross);
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) merge(i, [](const T* p) __attribute__((always_inline)) { return load(p); });
  if (i < count) merge(i, [&](const T* p) { return load_some(p, count - i); });
}

template <class T>
void moments(const MomentsArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t positions = a.map.positions, channels = a.map.channels;
  if (!a.map.channels_last) {
    for (int64_t row = begin; row < end; ++row)
      row_moments(a.x + row * positions, positions, a.mean + row, a.m2 + row);
    return;
  }
  columns(a.map, begin, end, [&](int64_t n, int64_t c, int64_t count) {
    // Relative to the first position, so that a mean much larger than the spread costs no digits.
    A origin[kColumns] = {}, mean[kColumns] = {}, m2[kColumns] = {};
    const T* x = a.x + n * positions * channels + c;
    for (int64_t i = 0; i < count; ++i) origin[i] = load_some(x + i, 1)[0];
    int64_t s = 0;
    for (; s + 8 <= positions; s += 8) merge_rows<8>(x + s * channels, channels, count, s, origin, mean, m2);
    for (; s < positions; ++s) merge_rows<1>(x + s * channels, channels, count, s, origin, mean, m2);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t nc = n * channels + c + i;
      a.mean[nc] = double(origin[i]) + mean[i];
      a.m2[nc] = m2[i];
      if (!std::isfinite(m2[i])) slow_moments(x + i, channels, positions, a.mean + nc, a.m2 + nc);
    }
  });
}

// ---- apply ---------------------------------------------------------------------------------------------------------

// Where in a line of `size` elements the first aligned vector begins; a store across two cache lines takes twice as long.
template <class T>
ECANET_INLINE int64_t aligned_from(const T* p, int64_t size) {
  constexpr int64_t bytes = sizeof(T) * width<T>;
  const int64_t beyond = reinterpret_cast<uintptr_t>(p) % bytes;
  const int64_t from = beyond == 0 ? 0 : (bytes - beyond) / int64_t(sizeof(T));
  return from + width<T> <= size ? from : 0;
}

// Write `result(i)`, a vector, to out + i for a line of at least one vector; result may read what is overwritten.
template <bool streams, class T, class F>
ECANET_INLINE void write_line(T* out, int64_t size, F&& result) {
  constexpr int64_t W = width<T>;
  using V = Vec<Acc<T>>;
  // Whole vectors are written where they are aligned; the first and the last of a line overlap those, and are computed
  // before anything is written.
  const int64_t begin = streams ? 0 : aligned_from(out, size);
  const bool overlap = size % W != 0 || begin != 0;
  V first_vector = {}, last_vector = {};
  if (overlap) {
    first_vector = result(0);
    last_vector = result(size - W);
  }
  int64_t i = begin;
  for (; i + 4 * W <= size; i += 4 * W) {
    const V y0 = result(i), y1 = result(i + W), y2 = result(i + 2 * W), y3 = result(i + 3 * W);
    write<streams>(out + i, y0);
    write<streams>(out + i + W, y1);
    write<streams>(out + i + 2 * W, y2);
    write<streams>(out + i + 3 * W, y3);
  }
  for (; i + W <= size; i += W) write<streams>(out + i, result(i));
  if (overlap) {
    store(out, first_vector);
    store(out + size - W, last_vector);
  }
}

template <bool streams, class T, bool last, Act act, bool with_residual>
void apply_lines(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t size = a.map.line_size();
  for (int64_t l = begin; l < end; ++l) {
    const Line line = Line::at(a.map, l);
    const T* x = a.x + line.map;
    const T* residual = with_residual ? a.residual + line.map : nullptr;
    T* out = a.out + line.map;
    const auto scale = Factor<A, last>::at(a.scale + line.nc), shift = Factor<A, last>::at(a.shift + line.nc);
    if (size >= width<T>) {
      write_line<streams>(out, size, [&](int64_t i) __attribute__((always_inline)) {
        Vec<A> y = load(x + i) * scale(i) + shift(i);
        if constexpr (with_residual) y += load(residual + i);
        return activate<act, A>(y);
      });
    } else {
      Vec<A> y = load_some(x, size) * scale.some(0, size) + shift.some(0, size);
      if constexpr (with_residual) y += load_some(residual, size);
      store_some(out, activate<act, A>(y), size);
    }
  }
  end_of_writes<streams>();
}

template <class T, bool last, Act act, bool with_residual>
void apply_residual(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  if (a.streams && can_stream(a.out, a.map.line_size()))
    apply_lines<true, T, last, act, with_residual>(a, begin, end);
  else
    apply_lines<false, T, last, act, with_residual>(a, begin, end);
}

template <class T, bool last, Act act>
void apply_act(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  a.residual ? apply_residual<T, last, act, true>(a, begin, end) : apply_residual<T, last, act, false>(a, begin, end);
}

// Runs `call` with A_, the activation as a constant for templates.
#define ECANET_FOR_ACT(act, call)                           \
  switch (act) {                                            \
    case Act::none: { constexpr Act A_ = Act::none; call; } break;           \
    case Act::relu: { constexpr Act A_ = Act::relu; call; } break;           \
    case Act::relu6: { constexpr Act A_ = Act::relu6; call; } break;         \
    case Act::silu: { constexpr Act A_ = Act::silu; call; } break;           \
    case Act::hardswish: { constexpr Act A_ = Act::hardswish; call; } break; \
  }

template <class T>
void apply(const ApplyArgs<T>& a, int64_t begin, int64_t end) {
  ECANET_FOR_ACT(a.act, (a.map.channels_last ? apply_act<T, true, A_>(a, begin, end)
                                             : apply_act<T, false, A_>(a, begin, end)));
}

// ---- backward ------------------------------------------------------------------------------------------------------

constexpr bool needs_input(Act act) { return act == Act::silu || act == Act::hardswish; }

// Gradient of the activation's input, from element i of a line on: a vector, or its first n elements (`some`).
template <class T, bool last, Act act>
struct Upstream {
  using A = Acc<T>;
  const T *grad, *saved;
  Factor<A, last> scale, shift;
  inline __attribute__((always_inline)) Upstream(const ActGrad<T>& a, int64_t map, int64_t nc)
      : grad(a.grad + map), saved(a.saved ? a.saved + map : nullptr) {
    if constexpr (needs_input(act)) {
      scale = Factor<A, last>::at(a.scale + nc);
      shift = Factor<A, last>::at(a.shift + nc);
    }
  }
  inline __attribute__((always_inline)) Vec<A> operator()(int64_t i, Vec<A> x) const {
    if constexpr (act == Act::none) return load(grad + i);
    if constexpr (!needs_input(act)) return activate_backward<act, A>(load(grad + i), load(saved + i));
    Vec<A> from = x * scale(i) + shift(i);
    if (saved) from += load(saved + i);
    return activate_backward<act, A>(load(grad + i), from);
  }
  inline __attribute__((always_inline)) Vec<A> some(int64_t i, Vec<A> x, int64_t n) const {
    if constexpr (act == Act::none) return load_some(grad + i, n);
    if constexpr (!needs_input(act))
      return activate_backward<act, A>(load_some(grad + i, n), load_some(saved + i, n));
    Vec<A> from = x * scale.some(i, n) + shift.some(i, n);
    if (saved) from += load_some(saved + i, n);
    return activate_backward<act, A>(load_some(grad + i, n), from);
  }
};

enum class Keep { nothing, d, past_caches };

template <class T, Act act, Keep keep>
void reduce_rows(const ReduceArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  const int64_t size = a.map.positions;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = row * size;
    const Upstream<T, false, act> upstream(a.act_grad, start, row);
    const T* x = a.x + start;
    const Vec<A> center = splat(a.center[row % a.map.channels]);
    A p = 0, q = 0;
    for (int64_t block = 0; block < size; block += kBlock) {
      const int64_t stop = block + kBlock < size ? block + kBlock : size;
      Vec<A> p0 = {}, p1 = {}, q0 = {}, q1 = {};
      int64_t i = block;
      for (; i + 2 * W <= stop; i += 2 * W) {
        const Vec<A> x0 = load(x + i), x1 = load(x + i + W);
        const Vec<A> d0 = upstream(i, x0), d1 = upstream(i + W, x1);
        if constexpr (keep != Keep::nothing) {
          write<keep == Keep::past_caches>(a.d + start + i, d0);
          write<keep == Keep::past_caches>(a.d + start + i + W, d1);
        }
        p0 += d0;
        p1 += d1;
        q0 += d0 * (x0 - center);
        q1 += d1 * (x1 - center);
      }
      for (; i + W <= stop; i += W) {
        const Vec<A> x0 = load(x + i);
        const Vec<A> d0 = upstream(i, x0);
        if constexpr (keep != Keep::nothing) write<keep == Keep::past_caches>(a.d + start + i, d0);
        p0 += d0;
        q0 += d0 * (x0 - center);
      }
      if (i < stop && size >= W) {  // overlaps the vector before; elements already counted are left out
        const int64_t at = stop - W;
        const Vec<A> x0 = load(x + at);
        const Vec<A> d0 = upstream(at, x0);
        if constexpr (keep != Keep::nothing) store(a.d + start + at, d0);
        p1 += keep_last<A>(d0, stop - i);
        q1 += keep_last<A>(d0 * (x0 - center), stop - i);
      } else if (i < stop) {
        const Vec<A> x0 = load_some(x, size);
        const Vec<A> d0 = upstream.some(0, x0, size);
        if constexpr (keep != Keep::nothing) store_some(a.d + start, d0, size);
        p1 += keep_first<A>(d0, size);
        q1 += keep_first<A>(d0 * (x0 - center), size);
      }
      p += sum<A>(p0 + p1);
      q += sum<A>(q0 + q1);
    }
    a.p[row] = p;
    a.q[row] = q;
  }
}

template <class T, Act act, Keep keep>
ECANET_INLINE void reduce_line(const ReduceArgs<T>& a, int64_t at, int64_t nc, const Acc<T>* center, int64_t count,
                               Acc<T>* p, Acc<T>* q) {
  using A = Acc<T>;
  constexpr int64_t W = width<T>;
  const Upstream<T, true, act> upstream(a.act_grad, at, nc);
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    const Vec<A> x = load(a.x + at + i);
    const Vec<A> d = upstream(i, x);
    if constexpr (keep != Keep::nothing) write<keep == Keep::past_caches>(a.d + at + i, d);
    store(p + i, load(p + i) + d);
    store(q + i, load(q + i) + d * (x - load(center + i)));
  }
  if (i < count) {  // p and q are padded to whole vectors
    const int64_t some = count - i;
    const Vec<A> x = load_some(a.x + at + i, some);
    const Vec<A> d = upstream.some(i, x, some);
    if constexpr (keep != Keep::nothing) store_some(a.d + at + i, d, some);
    store(p + i, load(p + i) + keep_first<A>(d, some));
    store(q + i, load(q + i) + keep_first<A>(d * (x - load_some(center + i, some)), some));
  }
}

template <class T, Act act, Keep keep>
void reduce_act(const ReduceArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  if (!a.map.channels_last) return reduce_rows<T, act, keep>(a, begin, end);
  const int64_t positions = a.map.positions, channels = a.map.channels;
  columns(a.map, begin, end, [&](int64_t n, int64_t c, int64_t count) {
    A p_total[kColumns] = {}, q_total[kColumns] = {};
    const int64_t start = n * positions * channels + c, nc = n * channels + c;
    for (int64_t block = 0; block < positions; block += kBlock) {
      const int64_t stop = block + kBlock < positions ? block + kBlock : positions;
      A p[kColumns] = {}, q[kColumns] = {};
      for (int64_t s = block; s < stop; ++s) reduce_line<T, act, keep>(a, start + s * channels, nc, a.center + c, count, p, q);
      for (int64_t i = 0; i < count; ++i) {
        p_total[i] += p[i];
        q_total[i] += q[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      a.p[nc + i] = p_total[i];
      a.q[nc + i] = q_total[i];
    }
  });
}

template <class T, Act act>
void reduce_keep(const ReduceArgs<T>& a, int64_t begin, int64_t end) {
  if (!a.d) return reduce_act<T, act, Keep::nothing>(a, begin, end);
  if (!a.streams || !can_stream(a.d, a.map.line_size())) return reduce_act<T, act, Keep::d>(a, begin, end);
  reduce_act<T, act, Keep::past_caches>(a, begin, end);
  end_of_writes<true>();
}

template <class T>
void reduce(const ReduceArgs<T>& a, int64_t begin, int64_t end) {
  ECANET_FOR_ACT(a.act_grad.act, (reduce_keep<T, A_>(a, begin, end)));
}

template <bool streams, class T, bool last, Act act, bool with_slope>
void input_grad_lines(const InputGradArgs<T>& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool reads_x = with_slope || needs_input(act);
  const int64_t size = a.map.line_size();
  for (int64_t l = begin; l < end; ++l) {
    const Line line = Line::at(a.map, l);
    const Upstream<T, last, act> upstream(a.act_grad, line.map, line.nc);
    const T* x = reads_x ? a.x + line.map : nullptr;
    T* out = a.out + line.map;
    const auto scale = Factor<A, last>::at(a.act_grad.scale + line.nc);
    const auto offset = Factor<A, last>::at(a.offset + line.nc);
    const auto slope = Factor<A, last>::at(with_slope ? a.slope + (a.slope_per_sample ? line.nc : line.c) : nullptr);
    const auto center = Factor<A, last>::at(with_slope ? a.center + line.c : nullptr);
    if (size >= width<T>) {
      write_line<streams>(out, size, [&](int64_t i) __attribute__((always_inline)) {
        Vec<A> xi = {};
        if constexpr (reads_x) xi = load(x + i);
        Vec<A> g = upstream(i, xi) * scale(i) + offset(i);
        if constexpr (with_slope) g += slope(i) * (xi - center(i));
        return g;
      });
    } else {
      Vec<A> xi = {};
      if constexpr (reads_x) xi = load_some(x, size);
      Vec<A> g = upstream.some(0, xi, size) * scale.some(0, size) + offset.some(0, size);
      if constexpr (with_slope) g += slope.some(0, size) * (xi - center.some(0, size));
      store_some(out, g, size);
    }
  }
  end_of_writes<streams>();
}

template <class T, bool last, Act act>
void input_grad_act(const InputGradArgs<T>& a, int64_t begin, int64_t end) {
  const bool streams = a.streams && can_stream(a.out, a.map.line_size());
  if (a.slope && streams) return input_grad_lines<true, T, last, act, true>(a, begin, end);
  if (a.slope) return input_grad_lines<false, T, last, act, true>(a, begin, end);
  if (streams) return input_grad_lines<true, T, last, act, false>(a, begin, end);
  input_grad_lines<false, T, last, act, false>(a, begin, end);
}

template <class T>
void input_grad(const InputGradArgs<T>& a, int64_t begin, int64_t end) {
  ECANET_FOR_ACT(a.act_grad.act, (a.map.channels_last ? input_grad_act<T, true, A_>(a, begin, end)
                                                      : input_grad_act<T, false, A_>(a, begin, end)));
}

// ---- the (N, C)-sized maths ----------------------------------------------------------------------------------------
// Plain loops, which the compiler turns into vectors; sums over samples are in double.

template <class A>
void statistics(const StatisticsArgs<A>& a) {
  const int64_t channels = a.channels;
  for (int64_t n = 0; n < a.samples; ++n)
    for (int64_t c = 0; c < channels; ++c) a.total[c] += a.mean[n * channels + c];
  for (int64_t c = 0; c < channels; ++c) a.total[c] /= double(a.samples);
  for (int64_t n = 0; n < a.samples; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      const double away = a.mean[n * channels + c] - a.total[c];
      a.spread[c] += a.m2[n * channels + c] + double(a.positions) * away * away;
    }
  const double count = double(a.samples) * double(a.positions);
  for (int64_t c = 0; c < channels; ++c) {
    a.batch_mean[c] = A(a.total[c]);
    a.batch_var[c] = A(a.spread[c] / count);
  }
}

template <class A>
void norm_slope(const NormArgs<A>& norm, int64_t channels, A* slope) {
  if (norm.var)
    for (int64_t c = 0; c < channels; ++c) slope[c] = A(1) / std::sqrt(norm.var[c] + A(norm.eps));
  else
    for (int64_t c = 0; c < channels; ++c) slope[c] = A(1);
  for (int64_t c = 0; norm.weight && c < channels; ++c) slope[c] *= norm.weight[c];
}

// s = a (m - mean) + bias
template <class A>
ECANET_INLINE void norm_means(const NormArgs<A>& norm, int64_t channels, const A* a, const A* map_means, A* s) {
  for (int64_t c = 0; !norm.mean && c < channels; ++c) s[c] = map_means[c];
  for (int64_t c = 0; norm.mean && c < channels; ++c) s[c] = map_means[c] - norm.mean[c];
  for (int64_t c = 0; c < channels; ++c) s[c] *= a[c];
  for (int64_t c = 0; norm.bias && c < channels; ++c) s[c] += norm.bias[c];
}

template <class A>
void prepare(const CoefficientArgs<A>& a) {
  norm_slope(a.norm, a.channels, a.a);
  for (int64_t c = 0; c < a.channels; ++c) a.b[c] = a.norm.bias ? a.norm.bias[c] : A(0);
  for (int64_t c = 0; a.norm.mean && c < a.channels; ++c) a.b[c] -= a.a[c] * a.norm.mean[c];
}

// Fill the margins of (C + k - 1) numbers whose middle is already filled.
template <class A>
void wrap_around(A* padded, int64_t channels, int64_t margin) {
  for (int64_t j = 0; j < margin; ++j) {
    padded[j] = padded[channels + j];
    padded[margin + channels + j] = padded[margin + j];
  }
}

// gate = factor sigmoid(band of s), or 1 without a band; scale = gate a, shift = gate b.
template <class A>
void coefficients(const CoefficientArgs<A>& a, int64_t begin, int64_t end) {
  constexpr int64_t W = Simd<A>::width;
  const int64_t channels = a.channels, margin = a.band ? (a.k - 1) / 2 : 0;
  const A factor = A(a.factor);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = n * channels;
    A *scale = a.scale + at, *shift = a.shift + at;
    if (a.s) norm_means(a.norm, channels, a.a, a.map_means + at, a.s + at);
    if (!a.band) {
      memcpy(scale, a.a, channels * sizeof(A));
      memcpy(shift, a.b, channels * sizeof(A));
      continue;
    }
    A *padded = a.padded + n * (channels + 2 * margin), *gate = a.gate + at;
    memcpy(padded + margin, a.s + at, channels * sizeof(A));
    if (a.circular) wrap_around(padded, channels, margin);
    int64_t i = 0;
    for (; i + W <= channels; i += W) {
      Vec<A> logit = {};
      for (int64_t j = 0; j < a.k; ++j) logit += a.band[j] * load(padded + i + j);
      const Vec<A> g = factor * sigmoid<A>(logit);
      store(gate + i, g);
      store(scale + i, g * load(a.a + i));
      store(shift + i, g * load(a.b + i));
    }
    if (i < channels) {
      const int64_t some = channels - i;
      Vec<A> logit = {};
      for (int64_t j = 0; j < a.k; ++j) logit += a.band[j] * load_some(padded + i + j, some);
      const Vec<A> g = factor * sigmoid<A>(logit);
      store_some(gate + i, g, some);
      store_some(scale + i, g * load_some(a.a + i, some), some);
      store_some(shift + i, g * load_some(a.b + i, some), some);
    }
  }
}

template <class A>
void coefficients_backward(const CoefficientGradArgs<A>& g) {
  const int64_t channels = g.channels, margin = g.band ? (g.k - 1) / 2 : 0;
  const A *mean = g.norm.mean, *bias = g.norm.bias;
  const A inverse_factor = A(1 / g.factor);
  A *a = g.a, *ds = g.ds, *s = g.padded + margin, *logits = g.logits + margin;
  norm_slope(g.norm, channels, a);
  for (int64_t j = 0; j < g.k; ++j) g.band_grad[j] = 0;
  for (int64_t n = 0; n < g.samples; ++n) {
    const int64_t at = n * channels;
    const A *p = g.p + at, *q = g.q + at, *map_means = g.map_means + at, *gate = g.gate ? g.gate + at : nullptr;
    if (g.band) {
      norm_means(g.norm, channels, a, map_means, s);
      for (int64_t c = 0; c < channels; ++c) logits[c] = a[c] * q[c];
      for (int64_t c = 0; bias && c < channels; ++c) logits[c] += bias[c] * p[c];
      for (int64_t c = 0; c < channels; ++c) logits[c] *= gate[c] * (A(1) - gate[c] * inverse_factor);
      if (g.circular) {
        wrap_around(g.padded, channels, margin);
        wrap_around(g.logits, channels, margin);
      }
      for (int64_t c = 0; c < channels; ++c) ds[c] = 0;
      for (int64_t j = 0; j < g.k; ++j) {
        const A tap = g.band[j], *from = g.logits + 2 * margin - j, *shifted = g.padded + j;
        for (int64_t c = 0; c < channels; ++c) ds[c] += tap * from[c];
        A total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t c = 0; c < channels; ++c) total += logits[c] * shifted[c];
        g.band_grad[j] += total;
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) ds[c] = g.grad_s ? g.grad_s[at + c] : A(0);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const A gc = gate ? gate[c] : A(1), away = map_means[c] - (mean ? mean[c] : A(0));
      g.sum_a[c] += double(gc * q[c] + ds[c] * away);
      g.sum_b[c] += double(gc * p[c] + ds[c]);
    }
    const A per_position = A(1) / A(g.positions);
    for (int64_t c = 0; c < channels; ++c) g.offset[at + c] = ds[c] * a[c] * per_position;
    for (int64_t c = 0; g.grad_v && c < channels; ++c) {
      const A slope = A(2) * a[c] * per_position * g.grad_v[at + c];
      const A away = map_means[c] - (mean ? mean[c] : A(0));
      g.sum_a[c] += double(slope * g.m2[at + c]);
      g.slope[at + c] = slope * a[c];
      g.offset[at + c] -= slope * a[c] * away;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = g.norm.var ? double(g.norm.var[c]) + g.norm.eps : 1.0;
    const double inverse = 1.0 / std::sqrt(variance), gamma = g.norm.weight ? double(g.norm.weight[c]) : 1.0;
    g.weight[c] = A(g.sum_a[c] * inverse);
    g.bias[c] = A(g.sum_b[c]);
    g.mean[c] = A(-gamma * inverse * g.sum_b[c]);
    g.var[c] = A(-0.5 * gamma * g.sum_a[c] * inverse / variance);
  }
}

template <class T>
const Kernels<T>& kernels() {
  using A = Acc<T>;
  static const Kernels<T> table = {squeeze<T>,    average<T>, moments<T>, apply<T>,        reduce<T>,               input_grad<T>,
                                   statistics<A>, prepare<A>, coefficients<A>, coefficients_backward<A>};
  return table;
}

}  // namespace ECANET_ISA

template <> const Kernels<float>& KernelsFor<float>::ECANET_ISA() { return ECANET_ISA::kernels<float>(); }
template <> const Kernels<double>& KernelsFor<double>::ECANET_ISA() { return ECANET_ISA::kernels<double>(); }
template <> const Kernels<bfloat16>& KernelsFor<bfloat16>::ECANET_ISA() { return ECANET_ISA::kernels<bfloat16>(); }
template <> const Kernels<float16>& KernelsFor<float16>::ECANET_ISA() { return ECANET_ISA::kernels<float16>(); }

}  // namespace ecanet
