#include "kernels/householder/adapt.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/householder/judge.h"
#include "kernels/integers.h"

namespace fqtstats::householder {
namespace {

constexpr std::int64_t kGrain = 1 << 15;  // elements per thread
constexpr double kSmallestShare = 0.25;   // of lambda_2
constexpr double kClose = 0x1p-4;         // of the published scale
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The rows by position.
class Rows {
 public:
  explicit Rows(const Source& source) : source_(source), columns_(source.channels * source.positions) {}

  std::int64_t columns() const { return columns_; }
  const float* operator[](std::int64_t position) const { return source_.x + source_.order[position] * columns_; }
  float low(std::int64_t position) const { return source_.low[source_.row[position]] + 0.0f; }
  float high(std::int64_t position) const { return source_.high[source_.row[position]] + 0.0f; }

 private:
  const Source& source_;
  const std::int64_t columns_;
};

enum Choice : int { kAlone, kMatched, kPublished };

// What a group may become: its rows alone, or reflected with the scales of one or the other. A row of variance v has
// part v * weight in that of what is decoded; `part` bounds it.
struct Candidate {
  bool exists;
  const float* scale;
  float *mean, *u;  // [columns], of those reflected
  float* y;         // the rows; nullptr: they are not kept
  float *low, *high;
  double* weight;
  Interval* part;
};

// Kernel::row, of which low and high become the extremes.
void write(const Kernel& kernel, const float* x, std::int64_t columns, float scale, const float* u, float* y,
           float& low, float& high) {
  low = std::numeric_limits<float>::infinity();
  high = -low;
  kernel.row(x, columns, scale, u, y, low, high);
  low += 0.0f;  // -0 becomes 0, as in forward()
  high += 0.0f;
}

// Row i of a candidate of the group at `head` to `y`, with its extremes.
void reflect(const Kernel& kernel, const Rows& rows, const Candidate& c, std::int64_t head, std::int64_t i, float* y,
             float& low, float& high) {
  if (i == 0)
    write(kernel, c.mean, rows.columns(), 1, nullptr, y, low, high);
  else
    write(kernel, rows[head + i], rows.columns(), c.scale[i], c.u, y, low, high);
}

// _weights() of adaptive.py.
void find_weights(const float* scale, std::int64_t n, double* weight) {
  for (std::int64_t i = 0; i < n; ++i) weight[i] = 1 / (static_cast<double>(scale[i]) * scale[i]);
  const double count = static_cast<double>(n), corner = 1 / (count - std::sqrt(count));
  const double first = weight[0], members = tree_sum([&](std::int64_t i) { return i == 0 ? 0 : weight[i]; }, n);
  const double common = first / count + corner * corner * members, own = 1 - 2 * corner;
  weight[0] = (first + members) / count;
  for (std::int64_t i = 1; i < n; ++i) weight[i] = common + own * weight[i];
}

// Scales of the matched candidate of a group of rows `alone`; `published` and `scale` are the group's. False where all
// are close to the published ones, and so no candidate.
bool match(const Candidate& alone, const float* published, std::int64_t n, float* scale) {
  const auto range = [&](std::int64_t i) { return static_cast<double>(alone.high[i]) - alone.low[i]; };
  const double leader = range(0), least = kSmallestShare * range(1), first = published[0], t = published[1];
  bool close = true;
  scale[0] = published[0];
  for (std::int64_t i = 1; i < n; ++i) {
    scale[i] = static_cast<float>(first * std::sqrt(leader / std::max(range(i), least)));
    close = close && std::abs(scale[i] - t) <= kClose * t;
  }
  return !close;
}

// What has the least variance, of a group of n rows; row(c, i) gives row i of a candidate. Parts of the rows alone are
// not known yet. On the calling thread, also for a group that several have transformed: it seldom has much to do.
template <typename Row>
Choice choose(const Judge& judge, const Candidate (&candidates)[3], std::int64_t n, const Row& row) {
  Interval total[3] = {{kInfinity, kInfinity}, {kInfinity, kInfinity}, {kInfinity, kInfinity}};
  const auto add_up = [&](int c) {
    if (!candidates[c].exists) return;
    total[c] = {0, 0};
    for (std::int64_t i = 0; i < n; ++i) {
      total[c].lower += candidates[c].part[i].lower;
      total[c].upper += candidates[c].part[i].upper;
    }
  };
  const auto bound = [&](int c, std::int64_t i, bool narrow) {
    const Candidate& of = candidates[c];
    const Interval part = judge.interval(row(of, i), of.low[i], of.high[i], narrow);
    of.part[i] = {std::max(of.part[i].lower, of.weight[i] * part.lower),
                  std::min(of.part[i].upper, of.weight[i] * part.upper)};
  };
  add_up(kMatched);
  add_up(kPublished);
  const double best = std::min(total[kMatched].upper, total[kPublished].upper);
  total[kAlone] = {0, kInfinity};
  for (std::int64_t i = 0; i < n && total[kAlone].lower <= best; ++i) {  // the leader alone often has more
    candidates[kAlone].part[i] = {0, kInfinity};
    bound(kAlone, i, false);
    total[kAlone].lower += candidates[kAlone].part[i].lower;
  }
  if (total[kAlone].lower <= best) add_up(kAlone);

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
  // The leader and a few rows mostly decide.
  for (std::int64_t begin = 0, end = 1; begin < n; begin = end, end = std::min(2 * end, n)) {
    if (clear()) return static_cast<Choice>(least);
    bool still[3];
    for (int c : {kAlone, kMatched, kPublished}) still[c] = candidates[c].exists && open(c);
    for (int c : {kAlone, kMatched, kPublished}) {
      if (!still[c]) continue;
      for (std::int64_t i = begin; i < end; ++i) bound(c, i, true);
      add_up(c);
    }
  }
  if (clear()) return static_cast<Choice>(least);
  double smallest = kInfinity;
  Choice choice = kAlone;
  for (Choice c : {kAlone, kMatched, kPublished}) {
    const Candidate& of = candidates[c];
    bool finite = of.exists && open(c);
    for (std::int64_t i = 0; finite && i < n; ++i) finite = has_grid(of.low[i], of.high[i]);
    if (!finite) continue;
    const double variance =
        tree_sum([&](std::int64_t i) { return of.weight[i] * judge.exact(row(of, i), of.low[i], of.high[i]); }, n);
    if (variance < smallest) {
      smallest = variance;
      choice = c;
    }
  }
  return choice;
}

// Working memory of a thread; that of the first one has what belongs to the group.
struct Work {
  float* memory;                    // of find_means()
  float *row, *mean[2], *u[2];      // [columns], of those reflected
  float *scale, *low[2], *high[2];  // [rows of the largest group]
  double* weight[3];                // likewise, of all candidates
  Interval* part[3];                // likewise
};

// Calls body(p, begin, end) for disjoint ranges of [0, total), on `threads` threads at most; p < threads.
template <typename Body>
void share(std::int64_t total, std::int64_t elements, int threads, const Body& body) {
  const std::int64_t parts = std::clamp<std::int64_t>(std::min(total * elements / kGrain, total), 1, threads);
  cpu::split(parts, 1, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t p = first; p < last; ++p) body(p, total * p / parts, total * (p + 1) / parts);
  });
}

}  // namespace

void adapt(const Kernel& kernel, const Transform& published, const Source& source, const Rounding& rounding,
           int threads, float* out, float* low, float* high, float* scale, std::uint8_t* kept) {
  const std::int64_t n_rows = published.rows, columns = source.channels * source.positions;
  const Rows rows(source);
  const Judge judge(kernel, rounding, source.channels, source.positions, source.channels_last);
  const auto size = [&](std::int64_t g) { return static_cast<std::int64_t>(published.sizes[g]); };
  // What a thread transforms it also judges and copies: numbers that change their core cost more than all else here.
  // So a group stays with one thread, but for one that is much larger than a thread's share.
  const auto shared = [&](std::int64_t g) {
    return threads > 1 && 2 * size(g) * threads > 3 * n_rows && size(g) * columns >= 2 * kGrain;
  };
  std::int64_t unshared = n_rows, largest = 1, memory = 0;
  for (std::int64_t g = 0; g < published.groups; ++g) {
    largest = std::max(largest, size(g));
    memory = std::max(memory, memory_of(size(g)));
    if (shared(g)) unshared -= size(g);
  }

  // All memory is taken before there are threads.
  constexpr std::int64_t kLine = 16;  // elements
  struct Floats;
  struct Weights;
  struct Parts;
  const std::int64_t width = ceil_div(columns, kLine) * kLine, by_row = ceil_div(5 * largest, kLine) * kLine;
  const std::int64_t stride = memory + 5 * width + by_row;
  float* floats = cpu::scratch<Floats, float>(threads * stride);
  double* weights = cpu::scratch<Weights, double>(threads * 3 * largest);
  Interval* parts = cpu::scratch<Parts, Interval>(threads * 3 * largest);
  const auto work_of = [&](std::int64_t p) {
    float *own = floats + p * stride, *row = own + memory, *of_rows = row + 5 * width;
    double* weight = weights + p * 3 * largest;
    Interval* part = parts + p * 3 * largest;
    return Work{own,
                row,
                {row + width, row + 2 * width},
                {row + 3 * width, row + 4 * width},
                of_rows,
                {of_rows + largest, of_rows + 2 * largest},
                {of_rows + 3 * largest, of_rows + 4 * largest},
                {weight, weight + largest, weight + 2 * largest},
                {part, part + largest, part + 2 * largest}};
  };

  // Group g, with the working memory of `team` threads from `thread` on.
  const auto adapt_group = [&](std::int64_t g, std::int64_t thread, int team) {
    const Work work = work_of(thread);
    const std::int64_t head = published.heads[g], n = size(g);
    const std::int64_t* order = published.order + head;
    const Candidate alone{true,        nullptr,      nullptr,        nullptr,     nullptr,
                          work.low[0], work.high[0], work.weight[0], work.part[0]};
    for (std::int64_t i = 0; i < n; ++i) {
      alone.low[i] = rows.low(head + i);
      alone.high[i] = rows.high(head + i);
      alone.weight[i] = 1;
    }
    const bool tried = match(alone, scale + head, n, work.scale);
    float* y = out + head * columns;
    const Candidate candidates[3] = {
        alone,
        {tried, work.scale, work.mean[0], work.u[0], y, low + head, high + head, work.weight[1], work.part[1]},
        {true, scale + head, work.mean[1], work.u[1], tried ? nullptr : y, tried ? work.low[1] : low + head,
         tried ? work.high[1] : high + head, work.weight[2], work.part[2]}};
    const Candidate& theirs = candidates[kPublished];
    const auto each = [&](const auto& body) {  // of those reflected
      for (const Choice c : {kMatched, kPublished})
        if (candidates[c].exists) body(candidates[c]);
    };
    each([&](const Candidate& c) { find_weights(c.scale, n, c.weight); });
    share(width / kLine, n * kLine, team, [&](std::int64_t p, std::int64_t begin, std::int64_t end) {
      const std::int64_t last = std::min(end * kLine, columns);
      each([&](const Candidate& c) {
        find_means(kernel, {order, c.scale, n}, source.x, columns, begin * kLine, last, work_of(thread + p).memory,
                   c.mean, c.u);
      });
    });
    share(n, columns, team, [&](std::int64_t p, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        each([&](const Candidate& c) {
          float* to = c.y == nullptr ? work_of(thread + p).row : c.y + i * columns;
          reflect(kernel, rows, c, head, i, to, c.low[i], c.high[i]);
          const Interval row = judge.interval(to, c.low[i], c.high[i]);
          c.part[i] = {c.weight[i] * row.lower, c.weight[i] * row.upper};
        });
    });
    const Choice choice = choose(judge, candidates, n, [&](const Candidate& c, std::int64_t i) -> const float* {
      if (&c == &candidates[kAlone]) return rows[head + i];
      if (c.y != nullptr) return c.y + i * columns;
      float least, most;
      reflect(kernel, rows, c, head, i, work.row, least, most);
      return work.row;
    });
    kept[g] = choice != kAlone;
    if (choice == kMatched) std::copy_n(work.scale, n, scale + head);
    if (choice == kAlone) std::fill_n(scale + head, n, 1.0f);
    if (candidates[choice].y != nullptr) return;
    std::copy_n(candidates[choice].low, n, low + head);
    std::copy_n(candidates[choice].high, n, high + head);
    share(n, columns, team, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        float *to = y + i * columns, least, most;
        if (choice == kAlone)
          std::copy_n(rows[head + i], columns, to);
        else
          reflect(kernel, rows, theirs, head, i, to, least, most);
      }
    });
  };

  for (std::int64_t g = 0; g < published.groups; ++g)
    if (shared(g)) adapt_group(g, 0, threads);
  // A part is the groups, and the rows outside of groups, that begin in its share of the unshared rows.
  share(unshared, columns, threads, [&](std::int64_t p, std::int64_t begin, std::int64_t end) {
    const auto ours = [&](std::int64_t i) { return begin <= i && i < end; };
    std::int64_t i = 0, position = 0;
    for (std::int64_t g = 0; g <= published.groups; ++g) {
      const std::int64_t head = g < published.groups ? published.heads[g] : n_rows;
      for (; position < head; ++position, ++i)
        if (ours(i))
          write(kernel, rows[position], columns, scale[position], nullptr, out + position * columns, low[position],
                high[position]);
      if (g == published.groups) break;
      position += size(g);
      if (shared(g)) continue;
      if (ours(i)) adapt_group(g, p, 1);
      i += size(g);
    }
  });
}

}  // namespace fqtstats::householder
