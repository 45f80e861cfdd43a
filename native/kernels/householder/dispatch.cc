#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/stream.h"
#include "kernels/householder/householder.h"
#include "kernels/integers.h"

namespace fqtstats::householder {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/householder/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/householder/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

constexpr std::int64_t kUnit = 16;        // columns of a cache line
constexpr std::int64_t kCache = 1 << 15;  // elements of a strip: it and the next one stay in the second-level cache
constexpr std::int64_t kWidest = 1 << 9;  // columns of a strip: u and the partial sums stay in the first-level cache
constexpr std::int64_t kGrain = 1 << 16;  // elements: about 10 us, several times a thread's wake-up

std::int64_t width_of(std::int64_t n) { return std::clamp(kCache / n / kUnit * kUnit, kUnit, kWidest); }

// What all strips of a group have in common; n = 1: a row that is only scaled.
Block block_of(const Group& group, float* memory) {
  const double root = std::sqrt(static_cast<double>(group.n));
  Block block{};
  block.order = group.order;
  block.scale = group.scale;
  block.n = group.n;
  block.root = static_cast<float>(1 / root);
  block.spread = static_cast<float>(1 / (root - 1));
  block.memory = memory;
  block.width = width_of(group.n);
  return block;
}

// Columns [begin, end) of every row. low and high are this call's own.
void transform(void (*kernel)(const Block&), const Transform& t, const float* in, std::int64_t columns,
               std::int64_t begin, std::int64_t end, float* memory, float* out, float* low, float* high) {
  const bool stream = !t.read_next && cpu::streams(out, t.rows * columns, columns);
  const auto rows = [&](std::int64_t first, std::int64_t n) {
    Block block = block_of({t.order + first, t.scale + first, n}, memory);
    block.stride = columns;
    block.first = first;
    block.low = low + first;
    block.high = high + first;
    block.stream = stream;
    for (std::int64_t c = begin; c < end; c += block.width) {
      block.in = in + c;
      block.out = out + c;
      block.columns = std::min(block.width, end - c);
      kernel(block);
    }
  };
  std::int64_t position = 0;
  for (std::int64_t g = 0; g < t.groups; ++g) {
    for (; position < t.heads[g]; ++position) rows(position, 1);
    rows(position, static_cast<std::int64_t>(t.sizes[g]));
    position += static_cast<std::int64_t>(t.sizes[g]);
  }
  for (; position < t.rows; ++position) rows(position, 1);
  if (stream) cpu::order_streams();
}

struct Memory {};
struct Partial {};

void run(void (*kernel)(const Block&), const Transform& t, const float* in, std::int64_t columns, int threads,
         float* out, float* low, float* high) {
  const std::int64_t units = ceil_div(columns, kUnit);
  const std::int64_t parts =
      std::max<std::int64_t>(std::min<std::int64_t>({threads, units, t.rows * columns / kGrain}), 1);
  std::int64_t size = memory_of(1);
  for (std::int64_t g = 0; g < t.groups; ++g) size = std::max(size, memory_of(static_cast<std::int64_t>(t.sizes[g])));
  float* memory = cpu::scratch<Memory, float>(parts * size);
  float* partial = cpu::scratch<Partial, float>(parts * 2 * t.rows);
  for (std::int64_t p = 0; p < parts; ++p) {
    std::fill_n(partial + 2 * p * t.rows, t.rows, std::numeric_limits<float>::infinity());
    std::fill_n(partial + (2 * p + 1) * t.rows, t.rows, -std::numeric_limits<float>::infinity());
  }
  cpu::split(parts, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      transform(kernel, t, in, columns, units * p / parts * kUnit, std::min(units * (p + 1) / parts * kUnit, columns),
                memory + p * size, out, partial + 2 * p * t.rows, partial + (2 * p + 1) * t.rows);
  });
  if (low == nullptr) return;
  for (std::int64_t i = 0; i < t.rows; ++i) {
    float least = partial[i], largest = partial[t.rows + i];
    for (std::int64_t p = 1; p < parts; ++p) {
      const float a = partial[2 * p * t.rows + i], b = partial[(2 * p + 1) * t.rows + i];
      if (a < least || a != a) least = a;
      if (b > largest || b != b) largest = b;
    }
    low[i] = least + 0.0f;  // -0 becomes 0: which of the two came first depends on the lanes
    high[i] = largest + 0.0f;
  }
}

}  // namespace

std::int64_t memory_of(std::int64_t n) { return workspace(n) * width_of(n); }

void forward(const Kernel& kernel, const Transform& transform, const float* in, std::int64_t columns, int threads,
             float* out, float* low, float* high) {
  run(kernel.forward, transform, in, columns, threads, out, low, high);
}

void inverse(const Kernel& kernel, const Transform& transform, const float* in, std::int64_t columns, int threads,
             float* out) {
  run(kernel.inverse, transform, in, columns, threads, out, nullptr, nullptr);
}

void find_means(const Kernel& kernel, const Group& group, const float* in, std::int64_t columns, std::int64_t begin,
                std::int64_t end, float* memory, float* mean, float* u) {
  Block block = block_of(group, memory);
  block.stride = columns;
  for (std::int64_t c = begin; c < end; c += block.width) {
    block.in = in + c;
    block.columns = std::min(block.width, end - c);
    kernel.means(block, mean + c, u + c);
  }
}

}  // namespace fqtstats::householder
