#include "kernels/convolution8/plan.h"

#include <algorithm>
#include <numeric>

namespace fqtstats::convolution8 {

using std::int64_t;

namespace {

// The taps of position t that lie in an image of `extent`, in the order of their coordinates, which are absolute.
void list_taps(const Geometry& g, int dimension, bool gradient, int64_t t, int64_t extent, int64_t count,
               std::vector<Axis::Tap>& taps) {
  taps.clear();
  for (int64_t j = 0; j < count; ++j) {
    const int64_t k = gradient ? count - 1 - j : j;
    int64_t coordinate = gradient ? g.strided_position(dimension, t, k) : g.pixel(dimension, t, k);
    if (gradient) {
      if (coordinate % g.stride[dimension] != 0) continue;
      coordinate /= g.stride[dimension];
    }
    if (coordinate >= 0 && coordinate < extent) taps.push_back({coordinate, k});
  }
}

// Adds one more position, which reads `coordinate`.
void extend(Axis::Span& span, int64_t position, int64_t coordinate) {
  if (span.count == 0) {
    span.first = position;
    span.from = coordinate;
  } else if (span.count == 1) {
    span.step = position - span.first;
    span.by = coordinate - span.from;
  }
  ++span.count;
}

// The class of positions with those taps, a new one if there is none.
int64_t class_of(Axis& axis, const std::vector<Axis::Tap>& taps) {
  const auto same = [&](const std::vector<Axis::Tap>& other) {
    return std::equal(other.begin(), other.end(), taps.begin(), taps.end(),
                      [](const Axis::Tap& a, const Axis::Tap& b) { return a.index == b.index; });
  };
  const auto begin = axis.classes.begin(), end = begin + static_cast<std::ptrdiff_t>(axis.class_count);
  const auto found = std::find_if(begin, end, same);
  const int64_t index = found - begin;
  if (found == end) {
    if (axis.class_count == axis.classes.size()) axis.classes.emplace_back();
    axis.classes[axis.class_count++].assign(taps.begin(), taps.end());
  }
  return index;
}

void fill(Axis& axis, const Geometry& g, int dimension, bool gradient, int64_t positions, int64_t extent,
          int64_t taps) {
  axis.base.assign(positions, 0);
  axis.class_of.assign(positions, 0);
  axis.place.assign(taps, 0);
  axis.spans.assign(taps, {0, 1, 0, 1, 0});
  axis.class_count = 0;
  thread_local std::vector<Axis::Tap> inside;
  for (int64_t t = 0; t < positions; ++t) {
    list_taps(g, dimension, gradient, t, extent, taps, inside);
    for (const Axis::Tap& tap : inside) extend(axis.spans[tap.index], t, tap.coordinate);
    if (!inside.empty()) axis.base[t] = inside.front().coordinate;
    for (Axis::Tap& tap : inside) tap.coordinate -= axis.base[t];
    axis.class_of[t] = class_of(axis, inside);
  }
  int64_t place = 0;
  // Of the input gradient, the taps of one phase of the stride read neighbours.
  const int64_t phases = gradient ? g.stride[dimension] / std::gcd(g.stride[dimension], g.dilation[dimension]) : 1;
  for (int64_t phase = 0; phase < phases; ++phase)
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t k = gradient ? taps - 1 - j : j;
      if (k % phases == phase) axis.place[k] = place++;
    }
}

}  // namespace

Plan& Plan::of_thread() {
  thread_local Plan plan;
  return plan;
}

void Plan::set_axes(const Geometry& geometry, bool gradient, const int64_t (&result)[2], const int64_t (&image)[2],
                    const int64_t (&taps)[2]) {
  fill(vertical, geometry, 0, gradient, result[0], image[0], taps[0]);
  fill(horizontal, geometry, 1, gradient, result[1], image[1], taps[1]);
}

int64_t Plan::place(int64_t y, int64_t x) const {
  return vertical.place[y] * static_cast<int64_t>(horizontal.place.size()) + horizontal.place[x];
}

void Plan::list_classes(const Image& image, int64_t words) {
  const auto height = static_cast<int64_t>(vertical.base.size()), width = static_cast<int64_t>(horizontal.base.size());
  classes.clear();
  runs.clear();
  pixels.clear();
  for (int64_t v = 0; v < static_cast<int64_t>(vertical.class_count); ++v)
    for (int64_t h = 0; h < static_cast<int64_t>(horizontal.class_count); ++h) {
      const auto first_run = static_cast<int64_t>(runs.size()), first_pixel = static_cast<int64_t>(pixels.size());
      for (const Axis::Tap& y : vertical.classes[v])
        for (const Axis::Tap& x : horizontal.classes[h]) {
          const Run run{y.coordinate * image.row + x.coordinate * image.pixel, place(y.index, x.index) * words, words};
          Run* last = static_cast<int64_t>(runs.size()) > first_run ? &runs.back() : nullptr;
          if (last != nullptr && last->row + 4 * last->words == run.row && last->panel + last->words == run.panel)
            last->words += words;
          else
            runs.push_back(run);
        }
      for (int64_t y = 0; y < height; ++y) {
        if (vertical.class_of[y] != v) continue;
        for (int64_t x = 0; x < width; ++x)
          if (horizontal.class_of[x] == h)
            pixels.push_back({vertical.base[y] * image.row + horizontal.base[x] * image.pixel, y * width + x});
      }
      classes.push_back({v, h, static_cast<int64_t>(vertical.classes[v].size() * horizontal.classes[h].size()),
                         first_run, static_cast<int64_t>(runs.size()), first_pixel,
                         static_cast<int64_t>(pixels.size())});
    }
}

}  // namespace fqtstats::convolution8
