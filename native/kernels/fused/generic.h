// The kernels on registers of V::kLanes channels; included by the files of single instruction sets. V has
//
//   F       float32 lanes: + - *      load<kTail>(p, tail), store<kTail>(p, x, tail), set(x), flip
//                                     max, min (of equal or unordered ones the second)
//   M       a choice of lanes         greater(x, y), unordered(x), either(m, n), without(m, n): m and not n
//                                     pick(m, x, y): x where m, else y; keep(m, x), drop(m, x): x where m
//                                     (not m), else 0
//   D       them in float64: + - *    wide(x), load_wide, store_wide
//   T       the lanes of a tail       first(n)
//   encode<kTail>(out, x, zero, levels, channels, row)
//   bits<kTail>(out, m, channels)      what m does not choose, one bit per channel
//
// Everything here is static: the files that include it are compiled for instruction sets of their own.
#pragma once

#include <cstring>
#include <limits>

#include "kernels/fused/fused.h"
#include "kernels/fused/signs.h"

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline
#define FQTSTATS_OPERATOR __attribute__((always_inline)) friend inline

namespace fqtstats::fused {
namespace {

// Calls body.template operator()<kTail>(first channel, tail) for every register's worth of channels.
template <class V, class Body>
FQTSTATS_INLINE void over_channels(std::int64_t channels, const Body& body) {
  std::int64_t c = 0;
  for (; c + V::kLanes <= channels; c += V::kLanes) body.template operator()<false>(c, V::first(V::kLanes));
  if (c < channels) body.template operator()<true>(c, V::first(channels - c));
}

// Pixels that a register's worth of channels takes at a time: the sums stay in registers that long. More of them would
// read memory in strides that prefetchers do not follow.
constexpr std::int64_t kGroup = 4;

// Calls body(part, start) on consecutive parts of at most kGroup pixels of a run.
template <class Body>
FQTSTATS_INLINE void over_groups(const Run& run, const Body& body) {
  const std::int64_t pixel = (run.below == nullptr ? 1 : 2) * run.channels;
  for (std::int64_t i = 0; i < run.count; i += kGroup) {
    const std::int64_t count = run.count - i < kGroup ? run.count - i : kGroup;
    body(Run{run.y + i * pixel, run.below == nullptr ? nullptr : run.below + i * pixel, count, run.channels}, i);
  }
}

// The four pixels of a window at the same channels.
struct Window {
  const float *y0, *y1, *y2, *y3;
};

FQTSTATS_INLINE Window window(const Run& run, std::int64_t i) {
  const std::int64_t c = run.channels;
  const float *top = run.y + 2 * i * c, *bottom = run.below + 2 * i * c;
  return {top, top + c, bottom, bottom + c};
}

template <class V>
FQTSTATS_INLINE typename V::F affine(typename V::F y, typename V::F a, typename V::F b) {
  return a * y + b;
}

template <class V, bool kTail>
FQTSTATS_INLINE typename V::F value(const Run& run, const Map& map, std::int64_t i, std::int64_t c,
                                    typename V::T tail) {
  const auto a = V::template load<kTail>(map.a + c, tail), b = V::template load<kTail>(map.b + c, tail);
  typename V::F t;
  if (run.below == nullptr) {
    t = affine<V>(V::template load<kTail>(run.y + i * run.channels + c, tail), a, b);
  } else {
    const Window w = window(run, i);
    t = affine<V>(V::template load<kTail>(w.y0 + c, tail), a, b);
    for (const float* pixel : {w.y1, w.y2, w.y3}) {
      const auto next = affine<V>(V::template load<kTail>(pixel + c, tail), a, b);
      t = V::pick(V::unordered(t), t, V::max(t, next));  // a NaN stays
    }
  }
  return V::max(V::set(map.floor), t);
}

template <class V, bool kTail>
FQTSTATS_INLINE void moments_of(const Run& run, const float* shift, double* sum, double* square, float* low,
                                float* high, std::int64_t c, typename V::T tail) {
  const auto origin = V::wide(V::template load<kTail>(shift + c, tail));
  auto s = V::template load_wide<kTail>(sum + c, tail), q = V::template load_wide<kTail>(square + c, tail);
  auto lo = V::template load<kTail>(low + c, tail), hi = V::template load<kTail>(high + c, tail);
  const float* y = run.y + c;
  for (std::int64_t i = 0; i < run.count; ++i, y += run.channels) {
    const auto x = V::template load<kTail>(y, tail);
    const auto d = V::wide(x) - origin;
    s = s + d;
    q = q + d * d;
    lo = V::min(lo, x);
    hi = V::max(hi, x);
  }
  V::template store_wide<kTail>(sum + c, s, tail);
  V::template store_wide<kTail>(square + c, q, tail);
  V::template store<kTail>(low + c, lo, tail);
  V::template store<kTail>(high + c, hi, tail);
}

template <class V>
static void moments(const Run& run, const float* shift, double* sum, double* square, float* low, float* high) {
  over_groups(run, [&](const Run& part, std::int64_t) __attribute__((always_inline)) {
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      moments_of<V, kTail>(part, shift, sum, square, low, high, c, tail);
    });
  });
}

template <class V>
static void window_extremes(const Run& run, const std::uint32_t* flip, float* low, float* high) {
  for (std::int64_t i = 0; i < run.count; ++i) {
    const Window w = window(run, i);
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      const auto sign = V::template load<kTail>(reinterpret_cast<const float*>(flip) + c, tail);
      const auto load = [&](const float* p) __attribute__((always_inline)) {
        return V::flip(V::template load<kTail>(p + c, tail), sign);
      };
      const auto best = V::max(V::max(load(w.y0), load(w.y1)), V::max(load(w.y2), load(w.y3)));
      V::template store<kTail>(low + c, V::min(V::template load<kTail>(low + c, tail), best), tail);
      V::template store<kTail>(high + c, V::max(V::template load<kTail>(high + c, tail), best), tail);
    });
  }
}

template <class V>
static void encode(const Run& run, const Map& map, const Grid& grid, std::int64_t row, std::uint8_t* out) {
  const auto offset = V::set(grid.offset), prescale = V::set(grid.prescale), scale = V::set(grid.scale);
  for (std::int64_t i = 0; i < run.count; ++i)
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      const auto x = value<V, kTail>(run, map, i, c, tail);
      const auto coordinate = ((x - offset) * prescale) * scale;
      V::template encode<kTail>(out + i * row + c, coordinate, grid.zero, grid.levels, run.channels - c, row - c);
    });
}

template <class V>
static void bits(const Run& run, const Map& map, float threshold, std::int64_t row, std::uint8_t* out) {
  const auto least = V::set(threshold);
  const std::int64_t used = (run.channels + 7) / 8;
  for (std::int64_t i = 0; i < run.count; ++i, out += row) {
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      const auto x = value<V, kTail>(run, map, i, c, tail);
      V::template bits<kTail>(out + c / 8, V::greater(least, x), run.channels - c);
    });
    std::memset(out + used, 0, static_cast<std::size_t>(row - used));
  }
}

template <class V>
static void apply(const Run& run, const Map& map, float* out) {
  for (std::int64_t i = 0; i < run.count; ++i)
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      V::template store<kTail>(out + i * run.channels + c, value<V, kTail>(run, map, i, c, tail), tail);
    });
}

// The largest t of a window, y there, and which pixel it is: the first of equals.
template <class V>
struct Maximum {
  typename V::F t, y;
  typename V::M at1, at2, at3;
};

template <class V>
FQTSTATS_INLINE Maximum<V> maximum(typename V::F a, typename V::F b, typename V::F y0, typename V::F y1,
                                   typename V::F y2, typename V::F y3) {
  const auto t0 = affine<V>(y0, a, b), t1 = affine<V>(y1, a, b), t2 = affine<V>(y2, a, b), t3 = affine<V>(y3, a, b);
  const auto m1 = V::greater(t1, t0);
  const auto t01 = V::pick(m1, t1, t0);
  const auto m2 = V::greater(t2, t01);
  const auto t012 = V::pick(m2, t2, t01);
  const auto m3 = V::greater(t3, t012);
  const auto y = V::pick(m3, y3, V::pick(m2, y2, V::pick(m1, y1, y0)));
  return {V::pick(m3, t3, t012), y, V::without(m1, V::either(m2, m3)), V::without(m2, m3), m3};
}

// Where gradients pass: floor < t <= top.
template <class V>
FQTSTATS_INLINE typename V::M passing(typename V::F t, typename V::F floor, typename V::F top) {
  return V::without(V::greater(t, floor), V::greater(t, top));
}

template <class V, bool kTail>
FQTSTATS_INLINE void gradient_sums_of(const Run& run, const Map& map, const float* mean, const float* g, double* sum,
                                      double* dot, std::int64_t c, typename V::T tail) {
  const auto load = [&](const float* p) __attribute__((always_inline)) { return V::template load<kTail>(p + c, tail); };
  const auto a = load(map.a), b = load(map.b), center = load(mean);
  const auto floor = V::set(map.floor), top = V::set(map.top);
  auto s = V::template load_wide<kTail>(sum + c, tail), q = V::template load_wide<kTail>(dot + c, tail);
  const auto take = [&](typename V::F t, typename V::F y, std::int64_t i) __attribute__((always_inline)) {
    const auto h = V::wide(V::keep(passing<V>(t, floor, top), load(g + i * run.channels)));
    s = s + h;
    q = q + h * V::wide(y - center);
  };
  if (run.below == nullptr) {
    for (std::int64_t i = 0; i < run.count; ++i) {
      const auto y = load(run.y + i * run.channels);
      take(affine<V>(y, a, b), y, i);
    }
  } else {
    for (std::int64_t i = 0; i < run.count; ++i) {
      const Window w = window(run, i);
      const Maximum<V> m = maximum<V>(a, b, load(w.y0), load(w.y1), load(w.y2), load(w.y3));
      take(m.t, m.y, i);
    }
  }
  V::template store_wide<kTail>(sum + c, s, tail);
  V::template store_wide<kTail>(dot + c, q, tail);
}

template <class V>
static void gradient_sums(const Run& run, const Map& map, const float* mean, const float* g, double* sum, double* dot) {
  over_groups(run, [&](const Run& part, std::int64_t start) __attribute__((always_inline)) {
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      gradient_sums_of<V, kTail>(part, map, mean, g + start * run.channels, sum, dot, c, tail);
    });
  });
}

template <class V, bool kPooled, bool kTail>
FQTSTATS_INLINE void gradient_of(const Run& run, const Map& map, const Adjoint& adjoint, const float* g, float* out,
                                 float* out_below, float* low, float* high, std::int64_t c, typename V::T tail) {
  const auto load = [&](const float* p) __attribute__((always_inline)) { return V::template load<kTail>(p + c, tail); };
  const auto a = load(map.a), b = load(map.b), floor = V::set(map.floor), top = V::set(map.top);
  const auto mean = load(adjoint.mean), p = load(adjoint.p), q = load(adjoint.q), r = load(adjoint.r);
  auto lo = load(low), hi = load(high);
  auto bad = V::unordered(lo);
  const auto emit = [&](typename V::F h, typename V::F y, float* to) __attribute__((always_inline)) {
    const auto dy = ((h - p) - (y - mean) * q) * r;
    V::template store<kTail>(to + c, dy, tail);
    lo = V::min(lo, dy);
    hi = V::max(hi, dy);
    bad = V::either(bad, V::unordered(dy));
  };
  for (std::int64_t i = 0; i < run.count; ++i) {
    const auto incoming = g == nullptr ? V::set(0) : load(g + i * run.channels);
    if constexpr (kPooled) {
      const Window w = window(run, i);
      const auto y0 = load(w.y0), y1 = load(w.y1), y2 = load(w.y2), y3 = load(w.y3);
      const Maximum<V> m = maximum<V>(a, b, y0, y1, y2, y3);
      const auto h = V::keep(passing<V>(m.t, floor, top), incoming);
      float *top = out + 2 * i * run.channels, *bottom = out_below + 2 * i * run.channels;
      emit(V::drop(V::either(m.at1, V::either(m.at2, m.at3)), h), y0, top);
      emit(V::keep(m.at1, h), y1, top + run.channels);
      emit(V::keep(m.at2, h), y2, bottom);
      emit(V::keep(m.at3, h), y3, bottom + run.channels);
    } else {
      const auto y = load(run.y + i * run.channels);
      emit(V::keep(passing<V>(affine<V>(y, a, b), floor, top), incoming), y, out + i * run.channels);
    }
  }
  V::template store<kTail>(low + c, V::pick(bad, V::set(std::numeric_limits<float>::quiet_NaN()), lo), tail);
  V::template store<kTail>(high + c, hi, tail);
}

template <class V, bool kPooled>
FQTSTATS_INLINE void gradient_groups(const Run& run, const Map& map, const Adjoint& adjoint, const float* g, float* out,
                                     float* out_below, float* low, float* high) {
  over_groups(run, [&](const Run& part, std::int64_t start) __attribute__((always_inline)) {
    const float* from = g == nullptr ? nullptr : g + start * run.channels;
    const std::int64_t pixel = (kPooled ? 2 : 1) * start * run.channels;
    float* below = kPooled ? out_below + pixel : nullptr;
    over_channels<V>(run.channels, [&]<bool kTail>(std::int64_t c, typename V::T tail) __attribute__((always_inline)) {
      gradient_of<V, kPooled, kTail>(part, map, adjoint, from, out + pixel, below, low, high, c, tail);
    });
  });
}

template <class V>
static void gradient(const Run& run, const Map& map, const Adjoint& adjoint, const float* g, float* out,
                     float* out_below, float* low, float* high) {
  if (run.below == nullptr)
    gradient_groups<V, false>(run, map, adjoint, g, out, out_below, low, high);
  else
    gradient_groups<V, true>(run, map, adjoint, g, out, out_below, low, high);
}

}  // namespace
}  // namespace fqtstats::fused
