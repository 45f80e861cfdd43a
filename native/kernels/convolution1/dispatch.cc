#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/codes.h"
#include "kernels/convolution1/convolution1.h"

namespace fqtstats::convolution1 {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/convolution1/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/convolution1/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

std::int64_t words(const Image& a) { return ceil_div(a.c, 64); }

std::int64_t pixel_bytes(const Image& a) { return row_bytes(a.c, a.bits); }

const std::uint8_t* pixel(const Image& a, std::int64_t n, std::int64_t y, std::int64_t x) {
  const std::int64_t height = a.h + 2 * a.pad_h, width = a.w + 2 * a.pad_w;
  return a.data + ((n * height + y + a.pad_h) * width + x + a.pad_w) * pixel_bytes(a);
}

std::int64_t largest_zero(const Grid& grid, std::int64_t groups) {
  std::int64_t largest = 0;
  for (std::int64_t i = 0; grid.zero && i < (grid.groups ? groups : 1); ++i)
    largest = std::max(largest, std::abs(std::int64_t{grid.zero[i]}));
  return largest;
}

// Do all integers that make up a result of `terms` products fit into 32 bits?
bool fits(std::int64_t terms, int bits, std::int64_t zero_a, std::int64_t zero_b) {
  const double a = static_cast<double>((std::int64_t{1} << bits) - 1 + zero_a), b = 1.0 + static_cast<double>(zero_b);
  return static_cast<double>(terms) * a * b < 2147483648.0;
}

// Threads for that many products of codes: each gets some 10 us of work.
int team(double products, int threads) { return static_cast<int>(std::min<double>(threads, 1 + products / 4e6)); }

// body(slot, begin, end) over [0, total), for slots 0 ... slots - 1; a slot has working memory of its own.
template <typename Body>
void split_slots(std::int64_t total, std::int64_t slots, const Body& body) {
  cpu::split(slots, 1, static_cast<int>(slots), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t s = first; s < last; ++s) body(s, total * s / slots, total * (s + 1) / slots);
  });
}

// One axis of a product that slides: output first + j * step, 0 <= j < count, reads sources j * stride + offset[t].
struct Axis {
  std::int64_t first, step, count, stride;
  int taps;
  std::int64_t offset[kMaxTaps];  // ascending
  int tap[kMaxTaps];              // of the kernel
};

Axis forward_axis(std::int64_t taps, std::int64_t count, const Geometry& geometry, int axis) {
  Axis a{0, 1, count, geometry.stride[axis], static_cast<int>(taps), {}, {}};
  for (int t = 0; t < a.taps; ++t) {
    a.offset[t] = t * geometry.dilation[axis] - geometry.padding[axis];
    a.tap[t] = t;
  }
  return a;
}

// Of the input gradient, the outputs first, first + stride, ...: they all read the same taps.
Axis gradient_axis(std::int64_t taps, std::int64_t size, const Geometry& geometry, int axis, std::int64_t first) {
  const std::int64_t stride = geometry.stride[axis];
  Axis a{first, stride, std::max<std::int64_t>(0, ceil_div(size - first, stride)), 1, 0, {}, {}};
  for (std::int64_t t = taps - 1; t >= 0; --t) {
    const std::int64_t from = first + geometry.padding[axis] - t * geometry.dilation[axis];
    if (from % stride) continue;
    a.offset[a.taps] = from / stride;
    a.tap[a.taps++] = static_cast<int>(t);
  }
  return a;
}

// Pixels that the source must have before its first or after its last one.
std::int64_t pad_of(const Axis& axis, std::int64_t size) {
  if (axis.count == 0 || axis.taps == 0) return 0;
  const std::int64_t last = (axis.count - 1) * axis.stride + axis.offset[axis.taps - 1];
  return std::max<std::int64_t>({0, -axis.offset[0], last - (size - 1)});
}

// Outputs whose taps low[k] ... high[k] - 1 lie inside the source are of class k.
struct Classes {
  std::int32_t* of;  // [axis.count]
  int *low, *high;
  std::int64_t count;
};

void classify(const Axis& axis, std::int64_t size, Classes& classes) {
  classes.count = 0;
  for (std::int64_t j = 0; j < axis.count; ++j) {
    int low = 0, high = axis.taps;
    while (low < high && j * axis.stride + axis.offset[low] < 0) ++low;
    while (low < high && j * axis.stride + axis.offset[high - 1] >= size) --high;
    std::int64_t k = 0;
    while (k < classes.count && (classes.low[k] != low || classes.high[k] != high)) ++k;
    if (k == classes.count) {
      classes.low[k] = low;
      classes.high[k] = high;
      ++classes.count;
    }
    classes.of[j] = static_cast<std::int32_t>(k);
  }
}

// How a tile reads its operands.
struct Tile {
  void (*run)(const std::uint8_t* const* source, const Runs& runs, const std::uint8_t* panel, bool add,
              std::int32_t* sums, std::int64_t ld);
  int rows;
  std::int64_t step, panel_step;
};

// Outputs that read the same taps: all of a forward product, one residue of the strides of an input gradient.
struct Phase {
  Axis y, x;
  std::int64_t taps;
  const std::uint8_t* panels;  // [panel][tap][step]
  Classes class_y, class_x;
  Columns columns;
  const float* v;  // [class y][class x][column], or null
};

// Images ready for the tiles: pixels in steps, with the pad that the taps need, and the sum of each pixel's codes.
struct Source {
  const std::uint8_t* data;
  std::int32_t* sums;
  std::int64_t height, width, pad_h, pad_w, pixel;
};

// Weights [O, I, kh, kw] as popcount panels of 32 output channels.
void pack_words(const Image& w, const Phase& phase, std::int64_t panel, std::uint8_t* out) {
  const std::int64_t steps = words(w);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    const std::int64_t o = panel * kColumns + c;
    std::uint8_t* to = out + 8 * c;
    for (int ty = 0; ty < phase.y.taps; ++ty)
      for (int tx = 0; tx < phase.x.taps; ++tx)
        for (std::int64_t k = 0; k < steps; ++k, to += kPopcountPanel) {
          std::uint64_t word = 0;
          if (o < w.n) std::memcpy(&word, pixel(w, o, phase.y.tap[ty], phase.x.tap[tx]) + 8 * k, 8);
          std::memcpy(to, &word, 8);
        }
  }
}

alignas(8) constexpr std::uint8_t kNoCodes[8] = {};

// Weights as lookup panels of 64 input channels, contracted over the output channels.
void pack_blocks(const Kernel& kernel, const Image& w, const Phase& phase, std::int64_t word, std::uint8_t* low,
                 std::uint8_t* high) {
  const std::int64_t steps = ceil_div(w.n, 64);
  for (int ty = 0; ty < phase.y.taps; ++ty)
    for (int tx = 0; tx < phase.x.taps; ++tx)
      for (std::int64_t k = 0; k < steps; ++k, low += kLookupPanel, high += kLookupPanel)
        for (int q = 0; q < 4; ++q) {
          const std::uint8_t* row[16];
          for (int i = 0; i < 16; ++i) {
            const std::int64_t o = k * 64 + q * 16 + i;
            row[i] = o < w.n ? pixel(w, o, phase.y.tap[ty], phase.x.tap[tx]) + 8 * word : kNoCodes;
          }
          kernel.blocks(row, 0, low + 64 * q, high + 64 * q);
        }
}

// One pixel of 1-bit codes that are all `code`.
void fill_bits(std::int64_t channels, std::int32_t code, std::uint8_t* out) {
  for (std::int64_t c = 0; c < channels; c += 64) {
    const std::int64_t left = channels - c;
    const std::uint64_t word = !code ? 0 : left >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << left) - 1;
    std::memcpy(out + c / 8, &word, 8);
  }
}

// 1-bit images n0 ... n1 - 1 with a pad of (pad_h, pad_w) pixels of the code `zero` of their group, or 0.
void copy_padded(const Image& a, std::int64_t n0, std::int64_t n1, std::int64_t pad_h, std::int64_t pad_w, bool zeros,
                 std::uint8_t* out) {
  const std::int64_t bytes = pixel_bytes(a);
  for (std::int64_t n = n0; n < n1; ++n)
    for (std::int64_t y = -pad_h; y < a.h + pad_h; ++y)
      for (std::int64_t x = -pad_w; x < a.w + pad_w;) {
        const bool inside = y >= 0 && y < a.h && x >= 0 && x < a.w;
        if (inside)
          std::memcpy(out, pixel(a, n, y, x), static_cast<std::size_t>(a.w * bytes));
        else
          fill_bits(a.c, !zeros && a.grid.zero ? a.grid.zero[a.grid.groups ? n : 0] : 0, out);
        x += inside ? a.w : 1;
        out += (inside ? a.w : 1) * bytes;
      }
}

// Tables of images n0 ... n1 - 1, with the pad of `to`; and their sums.
void make_tables(const Kernel& kernel, const Image& a, std::int64_t n0, std::int64_t n1, const Source& to,
                 std::uint8_t* codes, std::uint8_t* pad_tables, std::uint8_t* out) {
  const std::int64_t blocks = words(a) * 4;
  std::int32_t* sum = to.sums;
  for (std::int64_t n = n0; n < n1; ++n) {
    const std::int32_t zero = a.grid.zero ? a.grid.zero[a.grid.groups ? n : 0] : 0;
    if (to.pad_h + to.pad_w > 0) {
      std::memset(codes, 0, static_cast<std::size_t>(blocks * 16));
      std::memset(codes, zero, static_cast<std::size_t>(a.c));
      kernel.tables(codes, blocks, 64, pad_tables);
    }
    for (std::int64_t y = -to.pad_h; y < a.h + to.pad_h; ++y)
      for (std::int64_t x = -to.pad_w; x < a.w + to.pad_w; ++x, ++sum, out += to.pixel)
        if (y >= 0 && y < a.h && x >= 0 && x < a.w) {
          *sum = kernel.unpack(pixel(a, n, y, x), a.bits, a.c, codes);
          kernel.tables(codes, blocks, 64, out);
        } else {
          *sum = static_cast<std::int32_t>(a.c) * zero;
          std::memcpy(out, pad_tables, static_cast<std::size_t>(to.pixel));
        }
  }
}

// The sums over the taps of every output pixel of one image. `across` is [source.height][x.count] of working memory;
// they follow it, [y.count][x.count].
void window_sums(const Phase& phase, const Source& source, const std::int32_t* sums, std::int32_t* across) {
  const std::int64_t count = phase.x.count;
  for (std::int64_t y = 0; y < source.height; ++y) {
    std::int32_t* to = across + y * count;
    std::fill_n(to, count, 0);
    for (int t = 0; t < phase.x.taps; ++t) {
      const std::int32_t* from = sums + y * source.width + source.pad_w + phase.x.offset[t];
      if (phase.x.stride == 1)
        for (std::int64_t j = 0; j < count; ++j) to[j] += from[j];
      else
        for (std::int64_t j = 0; j < count; ++j) to[j] += from[j * phase.x.stride];
    }
  }
  for (std::int64_t i = 0; i < phase.y.count; ++i) {
    std::int32_t* to = across + (source.height + i) * count;
    std::fill_n(to, count, 0);
    for (int t = 0; t < phase.y.taps; ++t) {
      const std::int32_t* from = across + (i * phase.y.stride + phase.y.offset[t] + source.pad_h) * count;
      for (std::int64_t j = 0; j < count; ++j) to[j] += from[j];
    }
  }
}

// The taps' runs, from the source of the first tap on. Returns them in `offset`.
Runs runs_of(const Phase& phase, const Source& source, std::int64_t steps, std::int64_t* offset) {
  const Axis &y = phase.y, &x = phase.x;
  const bool whole = x.taps > 0 && x.offset[x.taps - 1] - x.offset[0] == x.taps - 1;
  std::int64_t count = 0;
  for (int ty = 0; ty < y.taps; ++ty)
    for (int tx = 0; tx < (whole ? 1 : x.taps); ++tx)
      offset[count++] = ((y.offset[ty] - y.offset[0]) * source.width + x.offset[tx] - x.offset[0]) * source.pixel;
  return {offset, count, whole ? x.taps * steps : steps};
}

// One entry per column, where there may be one for all.
template <typename Tag, typename T>
const T* spread(const T* values, bool groups, std::int64_t columns) {
  if (!values || groups) return values;
  T* out = cpu::scratch<Tag, T>(columns);
  std::fill_n(out, columns, *values);
  return out;
}

template <typename T>
T* take(T*& next, std::int64_t count) {
  T* taken = next;
  next += count;
  return taken;
}

// tap_sums[tap][column] = sum of the weights' codes, by way of a source of ones.
void sum_taps(const Tile& tile, const Phase& phase, const std::uint8_t* ones, std::int64_t steps, std::int64_t panels,
              std::int32_t* tap_sums) {
  const std::int64_t offset = 0;
  const Runs one_tap{&offset, 1, steps};
  const std::uint8_t* same[8] = {ones, ones, ones, ones, ones, ones, ones, ones};
  for (std::int64_t panel = 0; panel < panels; ++panel)
    for (std::int64_t t = 0; t < phase.taps; ++t) {
      std::int32_t sums[8 * kColumns];
      tile.run(same, one_tap, phase.panels + (panel * phase.taps + t) * steps * tile.panel_step, false, sums, kColumns);
      std::copy_n(sums, kColumns, tap_sums + (t * panels + panel) * kColumns);
    }
}

// n zb - sum cb over all taps, from sums of `ld` columns.
const std::int32_t* set_rest(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
                             const std::int32_t* tap_sums, std::int32_t*& next) {
  std::int32_t* rest = take(next, columns);
  for (std::int64_t c = 0; c < columns; ++c) {
    std::int64_t value = phase.columns.zero ? phase.taps * channels * phase.columns.zero[c] : 0;
    for (std::int64_t t = 0; t < phase.taps; ++t) value -= tap_sums[t * ld + c];
    rest[c] = static_cast<std::int32_t>(value);
  }
  return rest;
}

// v of every class of output pixels: sums over the taps inside the image.
const float* set_v(const Phase& phase, std::int64_t channels, std::int64_t columns, std::int64_t ld,
                   const std::int32_t* tap_sums, float*& next) {
  const Columns& b = phase.columns;
  const Classes &y = phase.class_y, &x = phase.class_x;
  float* v = take(next, y.count * x.count * columns);
  float* to = v;
  for (std::int64_t cy = 0; cy < y.count; ++cy)
    for (std::int64_t cx = 0; cx < x.count; ++cx) {
      const std::int64_t terms = (y.high[cy] - y.low[cy]) * (x.high[cx] - x.low[cx]) * channels;
      for (std::int64_t c = 0; c < columns; ++c) {
        std::int64_t sum = b.zero ? -terms * b.zero[c] : 0;
        for (int ty = y.low[cy]; ty < y.high[cy]; ++ty)
          for (int tx = x.low[cx]; tx < x.high[cx]; ++tx) sum += tap_sums[(ty * phase.x.taps + tx) * ld + c];
        double value = static_cast<double>(b.step[c]) * static_cast<double>(sum);
        if (b.offset) value += static_cast<double>(terms) * static_cast<double>(b.offset[c]);
        *to++ = static_cast<float>(value);
      }
    }
  return v;
}

// The rows of images n0 ... n1 - 1 in one phase; returns how many. With `across`, [source.height + y.count][x.count] of
// working memory, they have the sums that offsets and zero points of the weights need.
std::int64_t make_rows(const Phase& phase, const Image& a, std::int64_t n0, std::int64_t n1, const Source& source,
                       std::int32_t* across, std::int64_t columns, std::int64_t out_h, std::int64_t out_w, float* out,
                       Row* rows) {
  const Axis &y = phase.y, &x = phase.x;
  const std::int64_t top = source.pad_h + (y.taps ? y.offset[0] : 0), left = source.pad_w + (x.taps ? x.offset[0] : 0);
  const auto terms = static_cast<std::int32_t>(phase.taps * a.c);
  Row* row = rows;
  for (std::int64_t n = n0; n < n1; ++n) {
    const std::int32_t* total = across ? across + source.height * x.count : nullptr;
    if (across) window_sums(phase, source, source.sums + (n - n0) * source.height * source.width, across);
    const std::int64_t group = a.grid.groups ? n : 0;
    Row next{};
    next.step = a.grid.step[group];
    if (a.grid.offset) next.offset = a.grid.offset[group];
    if (a.grid.zero) next.zero = a.grid.zero[group];
    for (std::int64_t i = 0; i < y.count; ++i) {
      const std::uint8_t* from =
          source.data + (((n - n0) * source.height + i * y.stride + top) * source.width + left) * source.pixel;
      float* to = out + ((n * out_h + y.first + i * y.step) * out_w + x.first) * columns;
      const float* v = phase.v ? phase.v + phase.class_y.of[i] * phase.class_x.count * columns : nullptr;
      for (std::int64_t j = 0; j < x.count; ++j) {
        next.source = from + j * x.stride * source.pixel;
        next.out = to + j * x.step * columns;
        if (v) next.v = v + phase.class_x.of[j] * columns;
        if (across) {
          next.sum = *total++;
          const std::int32_t centered = next.sum - terms * next.zero;
          next.u = static_cast<float>(static_cast<double>(next.step) * static_cast<double>(centered));
        }
        *row++ = next;
      }
    }
  }
  return row - rows;
}

// Forward (popcount) and input gradient (lookup): every output pixel is a product of the pixels under its taps.
bool slide(const Kernel& kernel, bool forward, const Image& a, const Image& w, const Geometry& geometry,
           const float* bias, std::int64_t out_h, std::int64_t out_w, int threads, float* out) {
  const Tile tile = forward ? Tile{kernel.popcount, kPopcountRows, kPopcountStep, kPopcountPanel}
                            : Tile{kernel.lookup, kLookupRows, kLookupStep, kLookupPanel};
  const std::int64_t columns = forward ? w.n : w.c, steps = words(a), all_taps = w.h * w.w;
  const std::int64_t panels = forward ? ceil_div(columns, kColumns) : 2 * words(w);
  const std::int64_t zero_a = largest_zero(a.grid, a.n), zero_b = largest_zero(w.grid, columns);
  if (w.h > kMaxTaps || w.w > kMaxTaps || all_taps > kMaxTaps * 4) return false;
  if (!forward && (geometry.stride[0] > kMaxStride || geometry.stride[1] > kMaxStride)) return false;
  if (!fits(a.c * all_taps, a.bits, zero_a, zero_b)) return false;

  // The phases, and the pad that they need.
  const std::int64_t phases_y = forward ? 1 : geometry.stride[0], phases_x = forward ? 1 : geometry.stride[1];
  const std::int64_t count = phases_y * phases_x;
  Phase* phases = cpu::scratch<struct PhaseTag, Phase>(count);
  std::int64_t pad_h = 0, pad_w = 0;
  for (std::int64_t p = 0; p < count; ++p) {
    Phase& phase = phases[p];
    phase.y = forward ? forward_axis(w.h, out_h, geometry, 0) : gradient_axis(w.h, out_h, geometry, 0, p / phases_x);
    phase.x = forward ? forward_axis(w.w, out_w, geometry, 1) : gradient_axis(w.w, out_w, geometry, 1, p % phases_x);
    phase.taps = phase.y.taps * phase.x.taps;
    if (phase.taps == 0) phase.y.taps = phase.x.taps = 0;
    pad_h = std::max(pad_h, pad_of(phase.y, a.h));
    pad_w = std::max(pad_w, pad_of(phase.x, a.w));
  }
  for (std::int64_t i = 0; a.grid.zero && pad_h + pad_w > 0 && i < (a.grid.groups ? a.n : 1); ++i)
    if (a.grid.zero[i] < 0 || a.grid.zero[i] >> a.bits) return false;  // no code for the pad

  // Panels.
  const double products = static_cast<double>(a.n * out_h * out_w) * static_cast<double>(columns * a.c) *
                          static_cast<double>(all_taps) / static_cast<double>(count);
  threads = team(products, threads);
  const std::int64_t tap_bytes = steps * tile.panel_step;
  auto* packed = cpu::scratch<struct PanelTag, std::uint8_t>(panels * all_taps * tap_bytes);
  for (std::int64_t p = 0; p < count; ++p) {
    const std::int64_t bytes = phases[p].taps * tap_bytes;
    std::uint8_t* to = take(packed, panels * bytes);
    phases[p].panels = to;
    cpu::split(forward ? panels : panels / 2, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        if (forward)
          pack_words(w, phases[p], i, to + i * bytes);
        else
          pack_blocks(kernel, w, phases[p], i, to + 2 * i * bytes, to + (2 * i + 1) * bytes);
    });
  }

  // What the epilogue needs of the weights.
  const Columns shared{spread<struct StepTag>(w.grid.step, w.grid.groups, columns),
                       spread<struct ZeroTag>(w.grid.zero, w.grid.groups, columns), nullptr,
                       spread<struct OffsetTag>(w.grid.offset, w.grid.groups, columns), bias};
  const std::int64_t padded = panels * kColumns;
  auto* ones = cpu::scratch<struct OnesTag, std::uint8_t>(steps * tile.step + 16 * 64);
  auto* tap_sums = cpu::scratch<struct TapTag, std::int32_t>(all_taps * padded);
  auto* rest = cpu::scratch<struct RestTag, std::int32_t>(count * columns);
  auto* class_ids = cpu::scratch<struct ClassTag, std::int32_t>(count * (out_h + out_w));
  auto* ranges = cpu::scratch<struct RangeTag, int>(2 * count * (out_h + out_w));
  std::int64_t classes = 0;
  for (std::int64_t p = 0; p < count; ++p) {
    Phase& phase = phases[p];
    phase.class_y = {take(class_ids, out_h), take(ranges, out_h), take(ranges, out_h), 0};
    phase.class_x = {take(class_ids, out_w), take(ranges, out_w), take(ranges, out_w), 0};
    classify(phase.y, a.h, phase.class_y);
    classify(phase.x, a.w, phase.class_x);
    classes += phase.class_y.count * phase.class_x.count;
  }
  float* v = a.grid.offset ? cpu::scratch<struct VTag, float>(classes * columns) : nullptr;
  if (forward) {
    fill_bits(a.c, 1, ones);
  } else {
    std::uint8_t codes[16];
    for (std::int64_t k = 0; k < 4 * steps; ++k) {
      for (int i = 0; i < 16; ++i) codes[i] = k * 16 + i < a.c;
      kernel.tables(codes, 1, 64, ones + 64 * k);
    }
  }
  for (std::int64_t p = 0; p < count; ++p) {
    Phase& phase = phases[p];
    phase.columns = shared;
    phase.v = nullptr;
    if (!a.grid.offset && zero_a == 0) continue;
    sum_taps(tile, phase, ones, steps, panels, tap_sums);
    if (zero_a != 0) phase.columns.rest = set_rest(phase, a.c, columns, padded, tap_sums, rest);
    if (a.grid.offset) phase.v = set_v(phase, a.c, columns, padded, tap_sums, v);
  }

  // Groups of images whose working memory stays in the second-level cache.
  constexpr std::int64_t kCache = 1 << 19, kRows = 1024;
  const bool direct = forward && a.pad_h >= pad_h && a.pad_w >= pad_w;
  if (direct) {
    pad_h = a.pad_h;
    pad_w = a.pad_w;
  }
  const std::int64_t height = a.h + 2 * pad_h, width = a.w + 2 * pad_w, per_pixel = steps * tile.step;
  const std::int64_t image_bytes = height * width * per_pixel, outputs = out_h * out_w;
  const std::int64_t slots = std::min<std::int64_t>(threads, a.n);
  const std::int64_t group =
      std::clamp<std::int64_t>(std::min(kCache / image_bytes, kRows / outputs), 1, ceil_div(a.n, slots));
  const bool need_sums = w.grid.offset || zero_b != 0;
  const std::int64_t source_bytes = direct ? 0 : group * image_bytes;
  auto* all_sources = cpu::scratch<struct SourceTag, std::uint8_t>(slots * source_bytes);
  auto* all_codes = cpu::scratch<struct CodeTag, std::uint8_t>(slots * (steps * 64 + per_pixel));
  auto* all_sums = cpu::scratch<struct SumTag, std::int32_t>(slots * group * height * width);
  auto* all_across = cpu::scratch<struct AcrossTag, std::int32_t>(slots * (height * out_w + outputs));
  auto* all_rows = cpu::scratch<struct RowTag, Row>(slots * group * outputs);
  split_slots(a.n, slots, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
    std::uint8_t* copied = all_sources + slot * source_bytes;
    std::uint8_t* codes = all_codes + slot * (steps * 64 + per_pixel);
    std::int32_t* across = all_across + slot * (height * out_w + outputs);
    Row* rows = all_rows + slot * group * outputs;
    for (std::int64_t n0 = begin; n0 < end; n0 += group) {
      const std::int64_t n1 = std::min(end, n0 + group);
      Source source{copied, all_sums + slot * group * height * width, height, width, pad_h, pad_w, per_pixel};
      if (direct) source.data = a.data + n0 * image_bytes;
      if (forward && !direct) copy_padded(a, n0, n1, pad_h, pad_w, false, copied);
      if (forward && need_sums) kernel.count(source.data, (n1 - n0) * height * width, steps, source.sums);
      if (!forward) make_tables(kernel, a, n0, n1, source, codes, codes + steps * 64, copied);
      for (std::int64_t p = 0; p < count; ++p) {
        const Phase& phase = phases[p];
        const std::int64_t total =
            make_rows(phase, a, n0, n1, source, need_sums ? across : nullptr, columns, out_h, out_w, out, rows);
        std::int64_t offsets[kMaxTaps * kMaxTaps];
        const Runs runs = runs_of(phase, source, steps, offsets);
        for (std::int64_t c = 0; c < columns; c += kColumns) {
          const std::uint8_t* panel = phase.panels + c / kColumns * phase.taps * tap_bytes;
          for (std::int64_t r = 0; r < total; r += tile.rows) {
            const std::uint8_t* sources[8];
            for (int i = 0; i < tile.rows; ++i) sources[i] = rows[std::min(r + i, total - 1)].source;
            alignas(64) std::int32_t sums[8 * kColumns];
            // What the epilogue will write comes into the cache while the tile is computed.
            const std::int64_t here = std::min<std::int64_t>(tile.rows, total - r),
                               end = std::min(c + kColumns, columns);
            for (std::int64_t i = r; i < r + here; ++i)
              for (std::int64_t k = c; k < end; k += 16) __builtin_prefetch(rows[i].out + k, 1);
            tile.run(sources, runs, panel, false, sums, kColumns);
            kernel.finish(sums, kColumns, rows + r, static_cast<int>(here), phase.columns, c, end - c);
          }
        }
      }
    }
  });
  return true;
}

}  // namespace

bool forward(const Kernel& kernel, const Image& x, const Image& w, const Geometry& geometry, const float* bias,
             std::int64_t out_h, std::int64_t out_w, int threads, float* y) {
  return slide(kernel, true, x, w, geometry, bias, out_h, out_w, threads, y);
}

bool grad_input(const Kernel& kernel, const Image& g, const Image& w, const Geometry& geometry, std::int64_t in_h,
                std::int64_t in_w, int threads, float* dx) {
  return slide(kernel, false, g, w, geometry, nullptr, in_h, in_w, threads, dx);
}

// A matrix product contracted over the output pixels. Its 1-bit operand has a row for each (tap, input channel), and
// one for each tap that says which pixels have it inside the image: that row's products are the sums of g that the
// corrections need. Its other operand has a column for each output channel, and one of ones: the sums of x.
bool grad_weight(const Kernel& kernel, const Image& g, const Image& x, const Geometry& geometry, std::int64_t kh,
                 std::int64_t kw, int threads, float* dw) {
  constexpr std::int64_t kRows = 1 << 19;  // bytes of a part's rows, which stay in the second-level cache
  constexpr std::int64_t kSteps = 8;       // of 64 pixels: 8 columns of tables are 16 KB, and stay in the first
  const std::int64_t pixels = g.n * g.h * g.w, taps = kh * kw, word_count = words(x), outs = g.c;
  if (taps > 64) return false;
  if (!fits(pixels, g.bits, largest_zero(g.grid, outs), largest_zero(x.grid, x.c))) return false;
  const std::int64_t most = std::clamp<std::int64_t>(kRows / (taps * word_count * 1024), 4, 64) * 64;
  const std::int64_t part = ceil_div(ceil_div(pixels, ceil_div(pixels, most)), 64) * 64, steps = part / 64;
  threads = team(static_cast<double>(pixels) * static_cast<double>(taps * outs * x.c), threads);

  // x with all the pixels that the taps read, and zeros outside the image.
  const std::int64_t last_h = (g.h - 1) * geometry.stride[0] + (kh - 1) * geometry.dilation[0] - geometry.padding[0];
  const std::int64_t last_w = (g.w - 1) * geometry.stride[1] + (kw - 1) * geometry.dilation[1] - geometry.padding[1];
  std::int64_t pad_h = std::max(geometry.padding[0], last_h - (x.h - 1));
  std::int64_t pad_w = std::max(geometry.padding[1], last_w - (x.w - 1));
  const std::uint8_t* source = x.data;
  const std::int64_t bytes = pixel_bytes(x);
  if (x.pad_h >= pad_h && x.pad_w >= pad_w && (pad_h + pad_w == 0 || largest_zero(x.grid, x.c) == 0)) {
    pad_h = x.pad_h;
    pad_w = x.pad_w;
  } else {
    const std::int64_t image = (x.h + 2 * pad_h) * (x.w + 2 * pad_w) * bytes;
    auto* copied = cpu::scratch<struct CopyTag, std::uint8_t>(x.n * image);
    cpu::split(x.n, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      copy_padded(x, begin, end, pad_h, pad_w, true, copied + begin * image);
    });
    source = copied;
  }
  const std::int64_t height = x.h + 2 * pad_h, width = x.w + 2 * pad_w;
  const std::int64_t left = pad_w - geometry.padding[1], top = pad_h - geometry.padding[0];

  // Bit t = ky kw + kx of inside_y[i] * inside_x[j] says whether tap t of output pixel (i, j) lies inside the image.
  auto* inside_y = cpu::scratch<struct InsideYTag, std::uint64_t>(g.h);
  auto* inside_x = cpu::scratch<struct InsideXTag, std::uint64_t>(g.w);
  const auto inside = [](std::int64_t at, std::int64_t size) { return std::uint64_t{at >= 0 && at < size}; };
  for (std::int64_t i = 0; i < g.h; ++i) {
    inside_y[i] = 0;
    for (std::int64_t k = 0; k < kh; ++k)
      inside_y[i] |= inside(i * geometry.stride[0] + k * geometry.dilation[0] - geometry.padding[0], x.h) << (k * kw);
  }
  for (std::int64_t j = 0; j < g.w; ++j) {
    inside_x[j] = 0;
    for (std::int64_t k = 0; k < kw; ++k)
      inside_x[j] |= inside(j * geometry.stride[1] + k * geometry.dilation[1] - geometry.padding[1], x.w) << k;
  }

  // Rows come in words of 64: the input channels of each tap, then the taps.
  const std::int64_t row_words = taps * word_count + 1, ld = row_words * 64, mask_row = ld - 64;
  const std::int64_t panel_bytes = steps * kLookupPanel, column_bytes = steps * kLookupStep;
  const std::int64_t padded = ceil_div(outs, 64) * 64;
  auto* panels = cpu::scratch<struct PanelTag, std::uint8_t>(2 * row_words * panel_bytes);
  auto* columns = cpu::scratch<struct ColumnTag, std::uint8_t>((padded + 1) * column_bytes);
  auto* sums = cpu::scratch<struct ProductTag, std::int32_t>((outs + 1) * ld);
  const std::int64_t reach = ((kh - 1) * geometry.dilation[0] * width + (kw - 1) * geometry.dilation[1] + 1) * bytes;
  auto* zeros = cpu::scratch<struct NothingTag, std::uint8_t>(reach);  // what pixels beyond the last one read
  std::memset(zeros, 0, static_cast<std::size_t>(reach));
  const std::int64_t slots = threads, slot_bytes = 2 * 16 * padded;
  auto* all_codes = cpu::scratch<struct CodeTag, std::uint8_t>(slots * slot_bytes);
  std::uint8_t ones[16];
  std::fill_n(ones, 16, std::uint8_t{1});
  for (std::int64_t k = 0; k < 4 * steps; ++k) kernel.tables(ones, 1, 64, columns + padded * column_bytes + 64 * k);

  const Columns shared{spread<struct StepTag>(x.grid.step, x.grid.groups, x.c),
                       spread<struct ZeroTag>(x.grid.zero, x.grid.groups, x.c), nullptr,
                       spread<struct OffsetTag>(x.grid.offset, x.grid.groups, x.c), nullptr};
  const std::int32_t* sums_x = sums + outs * ld;
  auto* rest = cpu::scratch<struct RestTag, std::int32_t>(taps * x.c);
  auto* v = cpu::scratch<struct VTag, float>(taps * x.c);
  auto* all_results = cpu::scratch<struct ResultTag, float>(slots * taps * x.c);

  for (std::int64_t first = 0; first < pixels; first += part) {
    // Pack 16 pixels at a time.
    split_slots(4 * steps, slots, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
      std::uint8_t* codes = all_codes + slot * slot_bytes;
      std::uint8_t* turned = codes + 16 * padded;
      for (std::int64_t block = begin; block < end; ++block) {
        const std::uint8_t* row[16];
        const std::uint8_t* mask[16];
        std::uint64_t mask_word[16];
        std::int64_t at = first + 16 * block, n = at / (g.h * g.w), i = at / g.w % g.h, j = at % g.w;
        for (int l = 0; l < 16; ++l, ++at) {
          mask[l] = reinterpret_cast<const std::uint8_t*>(mask_word + l);
          if (at < pixels) {
            kernel.unpack(pixel(g, n, i, j), g.bits, outs, codes + l * padded);
            row[l] =
                source + ((n * height + top + i * geometry.stride[0]) * width + left + j * geometry.stride[1]) * bytes;
            mask_word[l] = inside_y[i] * inside_x[j];
          } else {
            std::memset(codes + l * padded, 0, static_cast<std::size_t>(padded));
            row[l] = zeros;
            mask_word[l] = 0;
          }
          if (++j == g.w) {
            j = 0;
            if (++i == g.h) {
              i = 0;
              ++n;
            }
          }
        }
        kernel.transpose(codes, padded, padded, turned);
        kernel.tables(turned, outs, column_bytes, columns + block * 64);
        std::uint8_t* to = panels + block / 4 * kLookupPanel + block % 4 * 64;
        for (std::int64_t t = 0; t < taps; ++t)
          for (std::int64_t k = 0; k < word_count; ++k, to += 2 * panel_bytes)
            kernel.blocks(row, (t / kw * geometry.dilation[0] * width + t % kw * geometry.dilation[1]) * bytes + 8 * k,
                          to, to + panel_bytes);
        kernel.blocks(mask, 0, to, to + panel_bytes);
      }
    });
    // Multiply: the column of ones first, which the epilogue of all others needs.
    const auto multiply = [&](std::int64_t c, int count) {
      const std::uint8_t* table[kLookupRows];
      for (std::int64_t k = 0; k < steps; k += kSteps) {
        const std::int64_t offset = 0;
        const Runs run{&offset, 1, std::min(kSteps, steps - k)};
        for (int i = 0; i < count; ++i)
          table[i] = columns + (c < outs ? c + i : padded) * column_bytes + k * kLookupStep;
        for (std::int64_t w = 0; w < row_words; ++w) {
          const std::int64_t used = w < row_words - 1 ? x.c - w % word_count * 64 : taps;
          for (int half = 0; half < (used > kColumns ? 2 : 1); ++half) {
            const std::uint8_t* panel = panels + (2 * w + half) * panel_bytes + k * kLookupPanel;
            std::int32_t* to = sums + c * ld + w * 64 + half * kColumns;
            const bool add = first + k > 0;
            if (count == kLookupRows)
              kernel.lookup(table, run, panel, add, to, ld);
            else
              for (int i = 0; i < count; ++i) kernel.lookup1(table + i, run, panel, add, to + i * ld, ld);
          }
        }
      }
    };
    const bool last = first + part >= pixels;
    multiply(outs, 1);
    for (std::int64_t t = 0; last && t < taps; ++t)
      for (std::int64_t c = 0; c < x.c; ++c) {
        const std::int64_t terms = sums_x[mask_row + t];
        const std::int64_t centered = sums_x[t * word_count * 64 + c] - (shared.zero ? terms * shared.zero[c] : 0);
        rest[t * x.c + c] = static_cast<std::int32_t>(-centered);
        double value = static_cast<double>(shared.step[c]) * static_cast<double>(centered);
        if (shared.offset) value += static_cast<double>(terms) * static_cast<double>(shared.offset[c]);
        v[t * x.c + c] = static_cast<float>(value);
      }
    // An output channel's results are [tap][input channel], then turned.
    const auto finish = [&](std::int64_t o, float* results) {
      const std::int64_t group = g.grid.groups ? o : 0;
      const std::int32_t zero = g.grid.zero ? g.grid.zero[group] : 0;
      for (std::int64_t t = 0; t < taps; ++t) {
        const std::int32_t sum = sums[o * ld + mask_row + t];
        const double centered = static_cast<double>(sum - std::int64_t{sums_x[mask_row + t]} * zero);
        const Row row{nullptr,
                      results + t * x.c,
                      g.grid.offset ? v + t * x.c : nullptr,
                      g.grid.step[group],
                      g.grid.offset ? g.grid.offset[group] : 0.0F,
                      static_cast<float>(static_cast<double>(g.grid.step[group]) * centered),
                      zero,
                      sum};
        Columns all = shared;
        all.rest = g.grid.zero ? rest + t * x.c : nullptr;
        kernel.finish(sums + o * ld + t * word_count * 64, ld, &row, 1, all, 0, x.c);
      }
      float* to = dw + o * x.c * taps;
      for (std::int64_t c0 = 0; c0 < x.c; c0 += 64)
        for (std::int64_t t = 0; t < taps; ++t)
          for (std::int64_t c = c0; c < std::min(c0 + 64, x.c); ++c) to[c * taps + t] = results[t * x.c + c];
    };
    split_slots(ceil_div(outs, kLookupRows), slots, [&](std::int64_t slot, std::int64_t begin, std::int64_t end) {
      for (std::int64_t c = begin * kLookupRows; c < std::min(outs, end * kLookupRows); c += kLookupRows) {
        const int count = static_cast<int>(std::min<std::int64_t>(kLookupRows, outs - c));
        multiply(c, count);
        for (int i = 0; last && i < count; ++i) finish(c + i, all_results + slot * taps * x.c);
      }
    });
  }
  return true;
}

}  // namespace fqtstats::convolution1
