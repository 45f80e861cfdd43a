#include "kernels/householder/groups.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/scratch.h"

namespace fqtstats::householder {
namespace {

// Inclusive prefix sums, in the order that bhq.py prescribes.
void add_up(std::int64_t count, double* sums) {
  for (std::int64_t shift = 1; shift < count; shift *= 2)
    for (std::int64_t i = count - 1; i >= shift; --i) sums[i] += sums[i - shift];
}

// t of a group: small_row_scale() of bhq.py.
double small_row_scale(double n, double leader_range, double small_range) {
  const double root = std::sqrt(n), corner = 1 / (n - root);
  double kappa = std::max(1 / root, std::abs(1 - corner));
  if (n > 2) kappa = std::max(kappa, corner);
  int exponent = 0;
  const double mantissa =
      std::frexp(std::pow((n - 1) / (root * kappa) * (leader_range / small_range), 1.0 / 3), &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 24)), exponent - 24);
}

// s of a group: BlockHouseholder.of() of bhq.py, in float32.
double lift_of(double leader_range) {
  if (leader_range < 0x1p-60) return 0x1p80;
  return leader_range > 0x1p60 ? 0x1p-60 : 1;
}

}  // namespace

std::int64_t group_rows(const double* ranges, std::int64_t rows, const Groups& groups) {
  struct ByRange;
  struct Sorted;
  std::int64_t* by_range = cpu::scratch<ByRange, std::int64_t>(rows);
  std::iota(by_range, by_range + rows, std::int64_t{0});
  std::sort(by_range, by_range + rows, [ranges](std::int64_t a, std::int64_t b) {
    return ranges[a] != ranges[b] ? ranges[a] > ranges[b] : a < b;
  });
  double* sorted = cpu::scratch<Sorted, double>(2 * rows);
  double* sums = sorted + rows;
  for (std::int64_t i = 0; i < rows; ++i) sums[i] = sorted[i] = ranges[by_range[i]];
  add_up(rows, sums);
  std::int64_t leaders = rows - 1;
  while (leaders > 1 && static_cast<double>(rows - leaders) * sorted[leaders - 1] < sums[leaders - 1]) --leaders;
  const std::int64_t small = rows - leaders;
  std::int64_t count = 0, position = 0, begin = 0, surplus = std::numeric_limits<std::int64_t>::min();
  for (std::int64_t i = 1; i <= leaders; ++i) {
    // Small rows [begin, end) are those of leader i, counted from 1.
    const double share = std::floor(static_cast<double>(small) * sums[i - 1] / sums[leaders - 1] + 0.5);
    surplus = std::max(surplus, static_cast<std::int64_t>(share) - i);
    const std::int64_t end = i == leaders ? small : std::min(std::max(surplus + i, i), small - (leaders - i));
    const std::int64_t n = end - begin + 1;
    const double leader_range = sorted[i - 1], small_range = sorted[leaders + begin];
    groups.order[position] = by_range[i - 1];
    std::copy(by_range + leaders + begin, by_range + leaders + end, groups.order + position + 1);
    float leader_scale = 1, small_scale = 1;
    if (small_range > 0) {
      const double lift = lift_of(leader_range);
      leader_scale = static_cast<float>(lift);
      small_scale = static_cast<float>(lift * small_row_scale(static_cast<double>(n), leader_range, small_range));
      groups.heads[count] = position;
      groups.sizes[count++] = static_cast<double>(n);
    }
    groups.scale[position] = leader_scale;
    std::fill_n(groups.scale + position + 1, n - 1, small_scale);
    position += n;
    begin = end;
  }
  return count;
}

}  // namespace fqtstats::householder
