#include "kernels/householder/adapt.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/integers.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::householder {
namespace {

constexpr std::int64_t kGrain = 1 << 15;  // elements per thread
constexpr double kSmallestShare = 0.25;   // of lambda_2
constexpr double kSummation = 0x1p-16;    // relative error of Kernel::fractions, and of what is made of it
constexpr double kRefined = 0x1p-18;      // of Kernel::refined, likewise
constexpr double kLargest = 0x1p125;      // step of Kernel::refined
constexpr double kClose = 0x1p-4;         // of the published scale
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Interval {
  double lower, upper;
};

// Sum of leaf(0) .. leaf(count - 1): zeros make the count a power of two, and halves are added to each other until one
// is left. At `width` numbers, the one of `index`.
template <typename Leaf>
auto tree_sum(const Leaf& leaf, std::int64_t count, std::int64_t index = 0, std::int64_t width = 1)
    -> decltype(leaf(index)) {
  if (index >= count) return {};
  if (width >= count) return leaf(index);
  return tree_sum(leaf, count, index, 2 * width) + tree_sum(leaf, count, index + width, 2 * width);
}

// Consecutive elements that are summed side by side; a power of two, so that the order of additions stays the same.
constexpr std::int64_t kLanes = 128;

// tree_sum() of kLanes numbers each, which leaf(index, to) writes, in place: `to` has room for those of all levels.
template <typename Leaf>
void tree_sums(const Leaf& leaf, std::int64_t count, double* to, std::int64_t index = 0, std::int64_t width = 1) {
  if (width >= count) return leaf(index, to);
  tree_sums(leaf, count, to, index, 2 * width);
  if (index + width >= count) return;
  tree_sums(leaf, count, to + kLanes, index + width, 2 * width);
  for (std::int64_t i = 0; i < kLanes; ++i) to[i] += to[kLanes + i];
}

bool has_grid(float low, float high) {
  return std::isfinite(low) && std::isfinite(high) &&
         static_cast<double>(high) - low <= std::numeric_limits<float>::max();
}

class Adapter {
 public:
  Adapter(const Kernel& kernel, const Source& source, const Rounding& rounding)
      : kernel_(kernel), source_(source), rounding_(rounding), columns_(source.channels * source.positions) {}

  const float* row(std::int64_t position) const { return source_.x + source_.order[position] * columns_; }
  float low(std::int64_t position) const { return source_.low[source_.row[position]] + 0.0f; }
  float high(std::int64_t position) const { return source_.high[source_.row[position]] + 0.0f; }

  // Bounds of exact(); narrow ones take longer.
  Interval interval(const float* y, float low, float high, bool narrow = false) const {
    if (!has_grid(low, high)) return {kInfinity, kInfinity};
    const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
    if (grid.step == 0) return {0, 0};
    if (grid.prescale != 1) return {0, kInfinity};
    const double step = grid.step;  // without prescale far from the subnormal numbers, and so is its square
    if (narrow) {
      if (step > kLargest) return {0, kInfinity};
      const double variance = step * step * kernel_.refined(y, columns_, decoding(grid));
      return {variance * (1 - kRefined), variance * (1 + kRefined)};
    }
    constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
    const double total = kernel_.fractions(y, columns_, grid.offset, grid.scale, static_cast<float>(rounding_.levels));
    // A probability lies up to 2^-n below f; the others are those of the sum.
    const double of_sum = 0x1p-20 + 0x1.8p-22 * rounding_.levels;
    const double slack = static_cast<double>(columns_) * (std::ldexp(1.0, -rounding_.random_bits) + of_sum);
    // Two decoded neighbours are a step apart, up to the rounding of product and sum.
    const double span = static_cast<double>(high) - low;
    const double gap = 1.01 * kEpsilon * (span + std::max(std::abs(low), std::abs(high))) / step;
    const double least = step * std::max(1 - gap, 0.0), most = step * (1 + gap);
    return {least * least * std::max(total * (1 - kSummation) - slack, 0.0),
            most * most * (total * (1 + kSummation) + slack)};
  }

  // Variance of the decoded codes of a row, summed.
  double exact(const float* y, float low, float high) const {
    if (!has_grid(low, high)) return kInfinity;
    const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
    const Decoding by = decoding(grid);
    const auto lanes = [&](std::int64_t i, double* v) {
      const std::int64_t first = i * kLanes, count = std::min(columns_ - first, kLanes);
      float numbers[kLanes];
      if (source_.channels_last)
        for (std::int64_t j = 0; j < count; ++j) numbers[j] = y[place(first + j)];
      kernel_.variances(source_.channels_last ? numbers : y + first, count, by, v);
      std::fill(v + count, v + kLanes, 0.0);
    };
    constexpr int kLevels = 40;  // 2^40 lanes are more than any memory has
    double sums[kLevels * kLanes];
    tree_sums(lanes, ceil_div(columns_, kLanes), sums);
    return tree_sum([&](std::int64_t i) { return sums[i]; }, std::min(columns_, kLanes));
  }

 private:
  Decoding decoding(const quantize::Grid& grid) const {
    return {grid.offset,
            grid.prescale,
            grid.scale,
            grid.step,
            static_cast<float>(rounding_.levels),
            std::ldexp(1.0f, rounding_.random_bits)};
  }

  // Where element i of a row, in logical order, is in memory that is channels-last.
  std::int64_t place(std::int64_t i) const { return i % source_.positions * source_.channels + i / source_.positions; }

  const Kernel& kernel_;
  const Source source_;
  const Rounding rounding_;
  const std::int64_t columns_;
};

// The rows of a group, reflected with the scales of a candidate: the rows themselves, their extremes, how the variance
// of a row enters the decoded ones, and the bounds of that part of the variance.
struct Reflected {
  float *y, *low, *high;
  const float* scale;
  double* weight;
  Interval* part;
};

// _exact_weights() of adaptive.py.
void find_weights(const float* scale, std::int64_t n, double* weight) {
  const auto inverse = [scale](std::int64_t i) {
    const double s = scale[i];
    return 1 / (s * s);
  };
  const double count = static_cast<double>(n), corner = 1 / (count - std::sqrt(count));
  const double first = inverse(0), members = tree_sum([&](std::int64_t i) { return i == 0 ? 0 : inverse(i); }, n);
  weight[0] = (first + members) / count;
  for (std::int64_t i = 1; i < n; ++i)
    weight[i] = (first / count + corner * corner * members) + (1 - 2 * corner) * inverse(i);
}

// Scales of the matched candidate of a group of n rows at `head`; `published` and `scale` are the group's. False where
// all are close to the published ones, and so no candidate.
bool match(const Adapter& rows, const float* published, std::int64_t head, std::int64_t n, float* scale) {
  const auto range = [&](std::int64_t i) { return static_cast<double>(rows.high(head + i)) - rows.low(head + i); };
  const double leader = range(0), least = kSmallestShare * range(1), first = published[0], t = published[1];
  bool close = true;
  scale[0] = published[0];
  for (std::int64_t i = 1; i < n; ++i) {
    scale[i] = static_cast<float>(first * std::sqrt(leader / std::max(range(i), least)));
    close = close && std::abs(scale[i] - t) <= kClose * t;
  }
  return !close;
}

enum Choice : int { kAlone, kMatched, kPublished };

// What has the least variance, of a group of n rows at `head`. matched: nullptr where it is no candidate.
Choice choose(const Adapter& rows, const Reflected* matched, const Reflected& published, std::int64_t head,
              std::int64_t n, std::int64_t columns) {
  const Reflected* reflected[3] = {nullptr, matched, &published};
  Interval total[3] = {{0, kInfinity}, {kInfinity, kInfinity}, {0, 0}};
  if (matched != nullptr) total[kMatched] = {0, 0};
  for (int c : {kMatched, kPublished})
    for (std::int64_t i = 0; reflected[c] != nullptr && i < n; ++i) {
      total[c].lower += reflected[c]->part[i].lower;
      total[c].upper += reflected[c]->part[i].upper;
    }
  const double best = std::min(total[kMatched].upper, total[kPublished].upper);
  double upper = 0;
  std::int64_t seen = 0;  // the leader alone often has more
  for (; seen < n && total[kAlone].lower <= best; ++seen) {
    const Interval part = rows.interval(rows.row(head + seen), rows.low(head + seen), rows.high(head + seen));
    total[kAlone].lower += part.lower;
    upper += part.upper;
  }
  if (seen == n) total[kAlone].upper = upper;
  int least = kAlone;
  const auto open = [&](int c) { return total[c].lower <= total[least].upper; };  // may have the least variance
  const auto clear = [&] {
    least = kAlone;
    for (int c : {kMatched, kPublished})
      if (total[c].upper < total[least].upper) least = c;
    bool found = true;
    for (int c : {kAlone, kMatched, kPublished}) found = found && (c == least || !open(c));
    return found;
  };
  if (clear()) return static_cast<Choice>(least);
  for (int c : {kAlone, kMatched, kPublished}) {
    const bool exists = c != kMatched || matched != nullptr;
    if (!exists || !open(c)) continue;
    Interval narrow{0, 0};
    for (std::int64_t i = 0; i < n; ++i) {
      const Reflected* of = reflected[c];
      const Interval part = of == nullptr
                                ? rows.interval(rows.row(head + i), rows.low(head + i), rows.high(head + i), true)
                                : rows.interval(of->y + i * columns, of->low[i], of->high[i], true);
      const double weight = of == nullptr ? 1 : of->weight[i];
      narrow.lower += weight * part.lower;
      narrow.upper += weight * part.upper;
    }
    total[c] = {std::max(total[c].lower, narrow.lower), std::min(total[c].upper, narrow.upper)};
  }
  if (clear()) return static_cast<Choice>(least);
  double smallest = kInfinity;
  if (open(kAlone))
    smallest = tree_sum(
        [&](std::int64_t i) { return rows.exact(rows.row(head + i), rows.low(head + i), rows.high(head + i)); }, n);
  Choice choice = kAlone;
  for (Choice c : {kMatched, kPublished}) {
    const Reflected* candidate = reflected[c];
    bool finite = candidate != nullptr && open(c);
    for (std::int64_t i = 0; finite && i < n; ++i) finite = has_grid(candidate->low[i], candidate->high[i]);
    if (!finite) continue;
    const double variance = tree_sum(
        [&](std::int64_t i) {
          return candidate->weight[i] * rows.exact(candidate->y + i * columns, candidate->low[i], candidate->high[i]);
        },
        n);
    if (variance < smallest) {
      smallest = variance;
      choice = c;
    }
  }
  return choice;
}

// Working memory for one group.
struct Work {
  float *memory, *y, *low, *high, *scale;
  double* weight;  // of two candidates
  Interval* part;  // likewise
};

}  // namespace

void adapt(const Kernel& kernel, const Transform& published, const Source& source, const Rounding& rounding,
           int threads, float* out, float* low, float* high, float* scale, std::uint8_t* kept) {
  const std::int64_t n_rows = published.rows, columns = source.channels * source.positions;
  const Adapter rows(kernel, source, rounding);
  const auto size = [&](std::int64_t g) { return static_cast<std::int64_t>(published.sizes[g]); };
  // What a thread transforms it also judges and copies: numbers that change their core cost more than all else here.
  // So a group stays with one thread, but for one that is larger than a thread's share.
  const auto shared = [&](std::int64_t g) {
    return threads > 1 && size(g) * threads > n_rows && size(g) * columns >= 2 * kGrain;
  };
  std::int64_t unshared = n_rows, largest = 1, largest_unshared = 1, memory = memory_of(1);
  for (std::int64_t g = 0; g < published.groups; ++g) {
    largest = std::max(largest, size(g));
    if (shared(g)) {
      unshared -= size(g);
    } else {
      largest_unshared = std::max(largest_unshared, size(g));
      memory = std::max(memory, memory_of(size(g)));
    }
  }
  const std::int64_t parts = std::clamp<std::int64_t>(unshared * columns / kGrain, 1, threads);

  // All memory is taken before there are threads.
  constexpr std::int64_t kLine = 16;  // elements
  const auto floats_of = [&](std::int64_t n) { return ceil_div(n * (columns + 3), kLine) * kLine; };
  struct Floats;
  struct Weights;
  struct Parts;
  const std::int64_t stride = memory + floats_of(largest_unshared);
  float* floats = cpu::scratch<Floats, float>(std::max(parts * stride, floats_of(largest)));
  double* weights = cpu::scratch<Weights, double>(std::max(parts * 2 * largest_unshared, 2 * largest));
  Interval* intervals = cpu::scratch<Parts, Interval>(std::max(parts * 2 * largest_unshared, 2 * largest));
  const auto work_of = [&](std::int64_t p, std::int64_t n, std::int64_t own_memory) {
    float* y = floats + p * stride + own_memory;
    float* by_row = y + n * columns;
    return Work{floats + p * stride, y, by_row, by_row + n, by_row + 2 * n, weights + p * 2 * n, intervals + p * 2 * n};
  };

  const auto transform = [&](const Transform& t, const Work& work, int team, float* y, float* least, float* most) {
    if (team == 1)
      forward_alone(kernel, t, source.x, columns, work.memory, y, least, most);
    else
      forward(kernel, t, source.x, columns, team, y, least, most);
  };
  const auto adapt_group = [&](std::int64_t g, const Work& work, int team) {
    const std::int64_t head = published.heads[g], n = size(g);
    float* y = out + head * columns;
    const bool tried = match(rows, scale + head, head, n, work.scale);
    const Reflected matched{y, low + head, high + head, work.scale, work.weight, work.part};
    Reflected theirs{work.y, work.low, work.high, scale + head, work.weight + n, work.part + n};
    if (!tried) theirs = {y, low + head, high + head, scale + head, work.weight, work.part};
    for (const Reflected* candidate : {tried ? &matched : nullptr, static_cast<const Reflected*>(&theirs)}) {
      if (candidate == nullptr) continue;
      const Reflected& c = *candidate;
      find_weights(c.scale, n, c.weight);
      const std::int64_t first = 0;
      transform({n, 1, published.order + head, &first, published.sizes + g, c.scale, true}, work, team, c.y, c.low,
                c.high);
      cpu::split(n, kGrain / columns + 1, team, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const Interval row = rows.interval(c.y + i * columns, c.low[i], c.high[i]);
          c.part[i] = {c.weight[i] * row.lower, c.weight[i] * row.upper};
        }
      });
    }
    const Choice choice = choose(rows, tried ? &matched : nullptr, theirs, head, n, columns);
    kept[g] = choice != kAlone;
    if (choice == kAlone) {
      for (std::int64_t i = 0; i < n; ++i) {
        std::copy_n(rows.row(head + i), columns, y + i * columns);
        low[head + i] = rows.low(head + i);
        high[head + i] = rows.high(head + i);
        scale[head + i] = 1;
      }
    } else if (choice == kMatched) {
      std::copy_n(work.scale, n, scale + head);
    } else if (tried) {
      std::copy_n(theirs.y, n * columns, y);
      std::copy_n(theirs.low, n, low + head);
      std::copy_n(theirs.high, n, high + head);
    }
  };

  for (std::int64_t g = 0; g < published.groups; ++g)
    if (shared(g)) adapt_group(g, work_of(0, size(g), 0), threads);
  // A part is the groups, and the rows outside of groups, that begin in its share of the unshared rows.
  cpu::split(parts, 1, threads, [&](std::int64_t first_part, std::int64_t last_part) {
    for (std::int64_t p = first_part; p < last_part; ++p) {
      const Work work = work_of(p, largest_unshared, memory);
      const std::int64_t begin = unshared * p / parts, end = unshared * (p + 1) / parts;
      const auto ours = [&](std::int64_t i) { return begin <= i && i < end; };
      std::int64_t i = 0, position = 0;
      for (std::int64_t g = 0; g <= published.groups; ++g) {
        const std::int64_t head = g < published.groups ? published.heads[g] : n_rows;
        for (; position < head; ++position, ++i)
          if (ours(i))
            transform({1, 0, published.order + position, nullptr, nullptr, scale + position, true}, work, 1,
                      out + position * columns, low + position, high + position);
        if (g == published.groups) break;
        position += size(g);
        if (shared(g)) continue;
        if (ours(i)) adapt_group(g, work, 1);
        i += size(g);
      }
    }
  });
}

}  // namespace fqtstats::householder
