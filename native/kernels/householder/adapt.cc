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
constexpr std::int64_t kLanes = 16;

struct Lanes {
  double of[kLanes];

  friend Lanes operator+(Lanes a, const Lanes& b) {
    for (std::int64_t i = 0; i < kLanes; ++i) a.of[i] += b.of[i];
    return a;
  }
};

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

  // Bounds of exact().
  Interval interval(const float* y, float low, float high) const {
    if (!has_grid(low, high)) return {kInfinity, kInfinity};
    const quantize::Grid grid = quantize::make_grid(quantize::Rule::affine, low, high, rounding_.levels);
    if (grid.step == 0) return {0, 0};
    if (grid.prescale != 1) return {0, kInfinity};
    constexpr double kEpsilon = std::numeric_limits<float>::epsilon();
    const double total = kernel_.fractions(y, columns_, grid.offset, grid.scale, static_cast<float>(rounding_.levels));
    // A probability lies up to 2^-n below f, and f (1 - f) is rounded.
    const double slack = static_cast<double>(columns_) * (std::ldexp(1.0, -rounding_.random_bits) + 2 * kEpsilon);
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
    const float numbers = std::ldexp(1.0f, rounding_.random_bits), levels = static_cast<float>(rounding_.levels);
    const auto decoded = [&](float code) { return std::min(code, levels) * grid.step + grid.offset; };
    const auto variance = [&](float x) {
      // A coordinate is not negative, and below 2^9: to cut off is to round down.
      const float coordinate = ((x - grid.offset) * grid.prescale) * grid.scale;
      const float k = static_cast<float>(static_cast<std::int32_t>(coordinate));
      const auto below = static_cast<std::int64_t>((coordinate - k) * numbers);
      const double up = static_cast<double>(below) / static_cast<double>(numbers);
      const double gap = static_cast<double>(decoded(k + 1)) - static_cast<double>(decoded(k));
      return gap * gap * (up * (1 - up));
    };
    const auto lanes = [&](std::int64_t i) {
      Lanes v{};
      for (std::int64_t j = i * kLanes; j < std::min((i + 1) * kLanes, columns_); ++j)
        v.of[j - i * kLanes] = variance(y[place(j)]);
      return v;
    };
    Lanes v = tree_sum(lanes, ceil_div(columns_, kLanes));
    return tree_sum([&](std::int64_t i) { return v.of[i]; }, std::min(columns_, kLanes));
  }

 private:
  // Where element i of a row, in logical order, is in memory.
  std::int64_t place(std::int64_t i) const {
    return source_.channels_last ? i % source_.positions * source_.channels + i / source_.positions : i;
  }

  const Kernel& kernel_;
  const Source source_;
  const Rounding rounding_;
  const std::int64_t columns_;
};

// A reflected candidate: its rows, their extremes, and by position its scales, how the variance of a row enters the
// decoded ones, and the bounds of that part of the variance.
struct Candidate {
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

// What has the least variance, of a group of n rows at `head`.
Choice choose(const Adapter& rows, const Candidate (&reflected)[2], bool is_matched, std::int64_t head, std::int64_t n,
              std::int64_t columns) {
  Interval total[3] = {{0, kInfinity}, {0, 0}, {0, 0}};
  if (!is_matched) total[kMatched] = {kInfinity, kInfinity};
  for (int c = is_matched ? kMatched : kPublished; c <= kPublished; ++c)
    for (std::int64_t i = head; i < head + n; ++i) {
      total[c].lower += reflected[c - 1].part[i].lower;
      total[c].upper += reflected[c - 1].part[i].upper;
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
  for (int c : {kMatched, kPublished})
    if (total[c].upper < total[least].upper) least = c;
  bool clear = true;
  for (int c : {kAlone, kMatched, kPublished}) clear = clear && (c == least || total[c].lower > total[least].upper);
  if (clear) return static_cast<Choice>(least);
  double smallest = tree_sum(
      [&](std::int64_t i) { return rows.exact(rows.row(head + i), rows.low(head + i), rows.high(head + i)); }, n);
  Choice choice = kAlone;
  for (Choice c : {kMatched, kPublished}) {
    const Candidate& candidate = reflected[c - 1];
    bool finite = c == kPublished || is_matched;
    for (std::int64_t i = head; i < head + n; ++i) finite = finite && has_grid(candidate.low[i], candidate.high[i]);
    if (!finite) continue;
    const double variance = tree_sum(
        [&](std::int64_t i) {
          const std::int64_t p = head + i;
          return candidate.weight[p] * rows.exact(candidate.y + p * columns, candidate.low[p], candidate.high[p]);
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
  struct Matched;
  const std::int64_t n_rows = published.rows, columns = source.channels * source.positions;
  const Adapter rows(kernel, source, rounding);
  float* floats = cpu::scratch<Floats, float>(3 * n_rows);
  double* weights = cpu::scratch<Weights, double>(2 * n_rows);
  Interval* parts = cpu::scratch<Parts, Interval>(2 * n_rows);
  float* matched_scale = floats + 2 * n_rows;
  bool* is_matched = cpu::scratch<Matched, bool>(published.groups);
  float* y = cpu::scratch<Transformed, float>(n_rows * columns);
  std::copy_n(published.scale, n_rows, matched_scale);
  for (std::int64_t i = 0; i < 2 * n_rows; ++i) weights[i] = 0;  // outside of groups
  for (std::int64_t g = 0; g < published.groups; ++g) {
    const std::int64_t head = published.heads[g], n = static_cast<std::int64_t>(published.sizes[g]);
    is_matched[g] = match(rows, published.scale, head, n, matched_scale);
    find_weights(matched_scale + head, n, weights + head);
    find_weights(published.scale + head, n, weights + n_rows + head);
  }
  Transform matched = published;
  matched.scale = matched_scale;
  forward(kernel, published, source.x, columns, threads, y, floats, floats + n_rows);
  forward(kernel, matched, source.x, columns, threads, out, low, high);

  const Candidate reflected[2] = {{out, low, high, matched_scale, weights, parts},
                                  {y, floats, floats + n_rows, published.scale, weights + n_rows, parts + n_rows}};
  cpu::split(2 * n_rows, kGrain / columns + 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) {
      const Candidate& c = reflected[j / n_rows];
      const std::int64_t i = j % n_rows;
      if (c.weight[i] == 0) continue;
      const Interval row = rows.interval(c.y + i * columns, c.low[i], c.high[i]);
      c.part[i] = {c.weight[i] * row.lower, c.weight[i] * row.upper};
    }
  });
  cpu::split(published.groups, kGrain * published.groups / (n_rows * columns) + 1, threads,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t g = begin; g < end; ++g) {
                 const std::int64_t head = published.heads[g], n = static_cast<std::int64_t>(published.sizes[g]);
                 const Choice choice = choose(rows, reflected, is_matched[g], head, n, columns);
                 kept[g] = choice != kAlone;
                 const bool in_place = choice == kMatched || (choice == kPublished && !is_matched[g]);
                 for (std::int64_t i = head; i < head + n; ++i) {
                   if (in_place) {
                     scale[i] = matched_scale[i];
                     continue;
                   }
                   const bool alone = choice == kAlone;
                   std::copy_n(alone ? rows.row(i) : y + i * columns, columns, out + i * columns);
                   low[i] = alone ? rows.low(i) : floats[i];
                   high[i] = alone ? rows.high(i) : floats[n_rows + i];
                   if (alone) scale[i] = 1;
                 }
               }
             });
}

}  // namespace fqtstats::householder
