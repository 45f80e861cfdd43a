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
    constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
    const auto fractions = narrow ? kernel_.refined : kernel_.fractions;
    const double total = fractions(y, columns_, grid.offset, grid.scale, static_cast<float>(rounding_.levels));
    // A probability lies up to 2^-n below f; the others are those of the sum.
    const double of_sum = narrow ? 0x1p-23 : 0x1p-20 + 0x1.8p-22 * rounding_.levels;
    const double slack = static_cast<double>(columns_) * (std::ldexp(1.0, -rounding_.random_bits) + of_sum);
    // Two decoded neighbours are a step apart, up to the rounding of product and sum; a step without prescale is far
    // from the subnormal numbers.
    const double step = grid.step, span = static_cast<double>(high) - low;
    const double gap = 1.01 * kEpsilon * (span + std::max(std::abs(low), std::abs(high))) / step;
    const double least = step * std::max(1 - gap, 0.0), most = step * (1 + gap);
    return {least * least * std::max(total * (1 - kSummation) - slack, 0.0),
            most * most * (total * (1 + kSummation) + slack)};
  }

  // Variance of the decoded codes of a row, summed.
  double exact(const float* y, float low, float high) const {
    if (!has_grid(low, high)) return kInfinity;
    const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
    const Decoding decoding{grid.offset,
                            grid.prescale,
                            grid.scale,
                            grid.step,
                            static_cast<float>(rounding_.levels),
                            std::ldexp(1.0f, rounding_.random_bits)};
    const auto lanes = [&](std::int64_t i, double* v) {
      const std::int64_t first = i * kLanes, count = std::min(columns_ - first, kLanes);
      float numbers[kLanes];
      if (source_.channels_last)
        for (std::int64_t j = 0; j < count; ++j) numbers[j] = y[place(first + j)];
      kernel_.variances(source_.channels_last ? numbers : y + first, count, decoding, v);
      std::fill(v + count, v + kLanes, 0.0);
    };
    constexpr int kLevels = 40;  // 2^40 lanes are more than any memory has
    double sums[kLevels * kLanes];
    tree_sums(lanes, ceil_div(columns_, kLanes), sums);
    return tree_sum([&](std::int64_t i) { return sums[i]; }, std::min(columns_, kLanes));
  }

 private:
  // Where element i of a row, in logical order, is in memory that is channels-last.
  std::int64_t place(std::int64_t i) const { return i % source_.positions * source_.channels + i / source_.positions; }

  const Kernel& kernel_;
  const Source source_;
  const Rounding rounding_;
  const std::int64_t columns_;
};

// Rows of reflected candidates: the rows themselves, their extremes and scales, how the variance of a row enters the
// decoded ones, and the bounds of that part of the variance.
struct Reflected {
  float *y, *low, *high;
  const float* scale;
  double* weight;
  Interval* part;

  // Those from row `first` on.
  Reflected from(std::int64_t first, std::int64_t columns) const {
    return {y + first * columns, low + first, high + first, scale + first, weight + first, part + first};
  }
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

// Scales of the matched candidate of a group at `head`. Those that are all close to the published ones are no
// candidate: then the published ones are written, and the result is false.
bool match(const Adapter& rows, const float* published, std::int64_t head, std::int64_t n, float* scale) {
  const auto range = [&](std::int64_t i) { return static_cast<double>(rows.high(head + i)) - rows.low(head + i); };
  const double leader = range(0), least = kSmallestShare * range(1), first = published[head];
  const double t = published[head + 1];
  bool close = true;
  scale[head] = published[head];
  for (std::int64_t i = 1; i < n; ++i) {
    scale[head + i] = static_cast<float>(first * std::sqrt(leader / std::max(range(i), least)));
    close = close && std::abs(scale[head + i] - t) <= kClose * t;
  }
  if (close) std::copy_n(published + head, n, scale + head);
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

}  // namespace

void adapt(const Kernel& kernel, const Transform& published, const Source& source, const Rounding& rounding,
           int threads, float* out, float* low, float* high, float* scale, std::uint8_t* kept) {
  struct Transformed;
  struct Floats;
  struct Weights;
  struct Parts;
  struct Order;
  struct Heads;
  struct Sizes;
  const std::int64_t n_rows = published.rows, columns = source.channels * source.positions;
  const Adapter rows(kernel, source, rounding);
  float* floats = cpu::scratch<Floats, float>(4 * n_rows);
  double* weights = cpu::scratch<Weights, double>(2 * n_rows);
  Interval* parts = cpu::scratch<Parts, Interval>(2 * n_rows);
  std::int64_t* order = cpu::scratch<Order, std::int64_t>(n_rows);
  std::int64_t* heads = cpu::scratch<Heads, std::int64_t>(2 * published.groups);
  double* sizes = cpu::scratch<Sizes, double>(published.groups);
  float *first_scale = floats, *second_scale = floats + n_rows;
  // Matched groups stand with all other rows in the first transform, and as published in a second one.
  std::copy_n(published.scale, n_rows, first_scale);
  std::fill_n(weights, n_rows, 0.0);  // outside of groups
  Transform first = published, second = published;
  second.rows = second.groups = 0;
  std::int64_t* second_head = heads + published.groups;  // of every group; -1 where it is in the first transform only
  for (std::int64_t g = 0; g < published.groups; ++g) {
    const std::int64_t head = published.heads[g], n = static_cast<std::int64_t>(published.sizes[g]);
    second_head[g] = -1;
    if (match(rows, published.scale, head, n, first_scale)) {
      second_head[g] = heads[second.groups] = second.rows;
      sizes[second.groups++] = published.sizes[g];
      std::copy_n(published.order + head, n, order + second.rows);
      std::copy_n(published.scale + head, n, second_scale + second.rows);
      find_weights(published.scale + head, n, weights + n_rows + second.rows);
      second.rows += n;
    }
    find_weights(first_scale + head, n, weights + head);
  }
  float* y = cpu::scratch<Transformed, float>(second.rows * columns);
  first.scale = first_scale;
  second.order = order;
  second.heads = heads;
  second.sizes = sizes;
  second.scale = second_scale;
  const Reflected in_first{out, low, high, first_scale, weights, parts};
  const Reflected in_second{
      y, floats + 2 * n_rows, floats + 3 * n_rows, second_scale, weights + n_rows, parts + n_rows};
  forward(kernel, first, source.x, columns, threads, out, low, high);
  if (second.rows > 0) forward(kernel, second, source.x, columns, threads, y, in_second.low, in_second.high);

  cpu::split(n_rows + second.rows, kGrain / columns + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) {
      const Reflected c = j < n_rows ? in_first.from(j, columns) : in_second.from(j - n_rows, columns);
      if (*c.weight == 0) continue;
      const Interval row = rows.interval(c.y, *c.low, *c.high);
      *c.part = {*c.weight * row.lower, *c.weight * row.upper};
    }
  });
  cpu::split(published.groups, kGrain * published.groups / (n_rows * columns) + 1, threads,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t g = begin; g < end; ++g) {
                 const std::int64_t head = published.heads[g], n = static_cast<std::int64_t>(published.sizes[g]);
                 const bool tried = second_head[g] >= 0;
                 const Reflected at_head = in_first.from(head, columns);
                 const Reflected theirs = tried ? in_second.from(second_head[g], columns) : at_head;
                 const Choice choice = choose(rows, tried ? &at_head : nullptr, theirs, head, n, columns);
                 kept[g] = choice != kAlone;
                 if (choice == kAlone) {
                   for (std::int64_t i = head; i < head + n; ++i) {
                     std::copy_n(rows.row(i), columns, out + i * columns);
                     low[i] = rows.low(i);
                     high[i] = rows.high(i);
                     scale[i] = 1;
                   }
                   continue;
                 }
                 const Reflected& chosen = choice == kMatched ? at_head : theirs;
                 std::copy_n(chosen.scale, n, scale + head);
                 if (chosen.y == at_head.y) continue;
                 std::copy_n(chosen.y, n * columns, at_head.y);
                 std::copy_n(chosen.low, n, at_head.low);
                 std::copy_n(chosen.high, n, at_head.high);
               }
             });
}

}  // namespace fqtstats::householder
