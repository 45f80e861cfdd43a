// The vector variants, given the operations of a register. For ISA files only: all of it has internal linkage.
//
// Two passes over a strip that the second-level cache holds. The first reads four rows side by side, keeps them scaled,
// and adds them to the tree as a binary counter does: partial sum l stands for 2^l runs of four rows. The second
// subtracts, and writes each row once. Each asks for what comes next before it is needed: the first for the next four
// rows, the second for the next strip, so that memory is read while it is written.
#pragma once

#include <bit>
#include <cstdint>

#include "kernels/householder/householder.h"

#define FQTSTATS_INLINE __attribute__((always_inline)) static inline

namespace fqtstats::householder {
namespace {

constexpr std::int64_t kRun = 4;  // rows that are added in registers

template <bool kInverse>
FQTSTATS_INLINE const float* source(const Block& b, std::int64_t i) {
  return b.in + (kInverse ? b.first + i : b.order[i]) * b.stride;
}

template <bool kInverse>
FQTSTATS_INLINE float* target(const Block& b, std::int64_t i) {
  return b.out + (kInverse ? b.order[i] : b.first + i) * b.stride;
}

// step(c, mask) for every register of the strip; the last one may be partly used.
template <typename V, typename Step>
FQTSTATS_INLINE void columns(std::int64_t count, const Step& step) {
  std::int64_t c = 0;
  for (; c + V::kLanes <= count; c += V::kLanes) step(c, typename V::All{});
  if (c < count) step(c, V::first(count - c));
}

// Where the results of a group go; `sums` has room for the partial sums of the tree.
struct Means {
  float *mean, *u, *sums;
};

// kRows rows from position i on, added to the tree, and to working memory with kKeep. They are run i / kRun; `merge`
// has a bit for every partial sum that its own completes.
template <typename V, bool kInverse, bool kKeep, int kRows, bool kLast>
FQTSTATS_INLINE void gather(const Block& b, const Means& means, std::int64_t i, std::uint64_t merge) {
  using Reg = typename V::Reg;
  const float* in0 = source<kInverse>(b, i);
  const float* in1 = source<kInverse>(b, i + (kRows > 1 ? 1 : 0));
  const float* in2 = source<kInverse>(b, i + (kRows > 2 ? 2 : 0));
  const float* in3 = source<kInverse>(b, i + (kRows > 3 ? 3 : 0));
  const auto later = [&](std::int64_t j) __attribute__((always_inline)) {
    const std::int64_t row = i + kRun + j;
    return source<kInverse>(b, row < b.n ? row : b.n - 1);
  };
  const float *later0 = later(0), *later1 = later(1), *later2 = later(2), *later3 = later(3);
  const Reg scale0 = V::fill(b.scale[i]), scale1 = V::fill(b.scale[i + (kRows > 1 ? 1 : 0)]);
  const Reg scale2 = V::fill(b.scale[i + (kRows > 2 ? 2 : 0)]), scale3 = V::fill(b.scale[i + (kRows > 3 ? 3 : 0)]);
  const Reg root = V::fill(b.root), spread = V::fill(b.spread), first_scale = V::fill(b.scale[0]);
  const float* first = source<kInverse>(b, 0);
  float* z = b.memory + i * b.width;
  float *sums = means.sums, *to = sums + std::popcount(merge) * b.width;
  columns<V>(b.columns, [&](std::int64_t c, auto mask) __attribute__((always_inline)) {
    const auto row = [&](const float* in, Reg scale, float* out) __attribute__((always_inline)) {
      Reg x = V::load(in + c, mask);
      if constexpr (!kInverse) x = V::mul(x, scale);
      if constexpr (kKeep) V::store(out + c, x);
      return x;
    };
    if constexpr (!kLast) {
      V::prefetch(later0 + c);
      V::prefetch(later1 + c);
      V::prefetch(later2 + c);
      V::prefetch(later3 + c);
    }
    Reg sum = row(in0, scale0, z);
    if constexpr (kRows > 1) sum = V::add(sum, row(in1, scale1, z + b.width));
    if constexpr (kRows > 2) {
      Reg other = row(in2, scale2, z + 2 * b.width);
      if constexpr (kRows > 3) other = V::add(other, row(in3, scale3, z + 3 * b.width));
      sum = V::add(sum, other);
    }
    for (std::uint64_t rest = merge; rest != 0; rest &= rest - 1)
      sum = V::add(V::load(sums + std::countr_zero(rest) * b.width + c), sum);
    if constexpr (kLast) {
      const Reg mean = V::mul(sum, root);
      Reg z0;
      if constexpr (kKeep)
        z0 = V::load(b.memory + c);
      else
        z0 = V::mul(V::load(first + c, mask), first_scale);
      V::store(means.u + c, V::mul(V::sub(mean, z0), spread));
      V::store(means.mean + c, mean);
    } else {
      V::store(to + c, sum);
    }
  });
}

enum class Row { alone, leader, member };

// The row at position i to its place.
template <typename V, bool kInverse, Row kRow, bool kStream>
FQTSTATS_INLINE void finish(const Block& b, std::int64_t i) {
  using Reg = typename V::Reg;
  const float* in = kRow == Row::alone ? source<kInverse>(b, i) : b.memory + i * b.width;
  const float* u = b.memory + b.n * b.width;
  const float* next_strip = source<kInverse>(b, i) + b.width;
  float* out = target<kInverse>(b, i);
  const Reg scale = V::fill(b.scale[i]);
  typename V::Extremes extremes;
  columns<V>(b.columns, [&](std::int64_t c, auto mask) __attribute__((always_inline)) {
    V::prefetch(next_strip + c);
    Reg y = V::load(in + c, mask);
    if constexpr (kRow == Row::member) y = V::sub(y, V::load(u + c));
    if constexpr (kInverse) y = V::div(y, scale);
    if constexpr (!kInverse && kRow == Row::alone) y = V::mul(y, scale);
    if constexpr (kStream)
      V::stream(out + c, y, mask);
    else
      V::store(out + c, y, mask);
    if constexpr (!kInverse) extremes.add(y, mask);
  });
  if constexpr (!kInverse) extremes.update(b.low[i], b.high[i]);
}

template <typename V, bool kInverse, bool kStream>
FQTSTATS_INLINE void finish_all(const Block& b) {
  if (b.n == 1) {
    finish<V, kInverse, Row::alone, kStream>(b, 0);
  } else {
    finish<V, kInverse, Row::leader, kStream>(b, 0);
    for (std::int64_t i = 1; i < b.n; ++i) finish<V, kInverse, Row::member, kStream>(b, i);
  }
}

template <typename V, bool kInverse, bool kKeep>
FQTSTATS_INLINE void gather_all(const Block& b, const Means& to) {
  const std::int64_t last = (b.n - 1) / kRun;
  for (std::int64_t run = 0; run < last; ++run) {
    const auto bits = static_cast<std::uint64_t>(run);
    gather<V, kInverse, kKeep, 4, false>(b, to, run * kRun, (bits ^ (bits + 1)) >> 1);
  }
  const auto all = static_cast<std::uint64_t>(last);
  switch (b.n - last * kRun) {
    case 1:
      gather<V, kInverse, kKeep, 1, true>(b, to, last * kRun, all);
      break;
    case 2:
      gather<V, kInverse, kKeep, 2, true>(b, to, last * kRun, all);
      break;
    case 3:
      gather<V, kInverse, kKeep, 3, true>(b, to, last * kRun, all);
      break;
    default:
      gather<V, kInverse, kKeep, 4, true>(b, to, last * kRun, all);
  }
}

template <typename V, bool kInverse>
static void transform(const Block& b) {
  float* u = b.memory + b.n * b.width;
  if (b.n > 1) gather_all<V, kInverse, true>(b, {b.memory, u, u + b.width});
  if (b.stream)
    finish_all<V, kInverse, true>(b);
  else
    finish_all<V, kInverse, false>(b);
}

template <typename V>
static void means(const Block& b, float* mean, float* u) {
  gather_all<V, false, false>(b, {mean, u, b.memory});
}

template <typename V>
static void row(const float* x, std::int64_t count, float scale, const float* u, float* y, float& low, float& high) {
  using Reg = typename V::Reg;
  const Reg s = V::fill(scale);
  typename V::Extremes extremes;
  const auto all = [&](const auto& value) __attribute__((always_inline)) {
    columns<V>(count, [&](std::int64_t c, auto mask) __attribute__((always_inline)) {
      const Reg v = value(V::mul(V::load(x + c, mask), s), c, mask);
      V::store(y + c, v, mask);
      extremes.add(v, mask);
    });
  };
  if (u == nullptr)
    all([](Reg v, std::int64_t, auto) __attribute__((always_inline)) { return v; });
  else
    all([u](Reg v, std::int64_t c, auto mask)
            __attribute__((always_inline)) { return V::sub(v, V::load(u + c, mask)); });
  extremes.update(low, high);
}

}  // namespace
}  // namespace fqtstats::householder
