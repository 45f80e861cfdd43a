#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "kernels/integers.h"
#include "kernels/quantize/quantize.h"

namespace fqtstats::quantize {

#define FQTSTATS_KERNEL(variant) extern const Kernel variant;
#include "kernels/quantize/kernels.inc"
#undef FQTSTATS_KERNEL

std::span<const Kernel> kernels() {
  static const Kernel rows[] = {
#define FQTSTATS_KERNEL(variant) variant,
#include "kernels/quantize/kernels.inc"
#undef FQTSTATS_KERNEL
  };
  return rows;
}

namespace {

// Positions of one image at a time: a multiple of every Philox tile; long runs for the prefetcher.
constexpr std::int64_t kPositions = 1024;
// Consecutive elements at a time: few enough to read ahead while their random bits are made.
constexpr std::int64_t kRun = 1024;
// Elements per thread, some 10 us.
constexpr std::int64_t kGrain = 32768;
// Of kept channels: elements whose random bits are made at a time, kept or not; shorter runs are not worth their own.
constexpr std::int64_t kSpan = 16384, kShort = 128;

std::int64_t groups_of(Axis axis, std::int64_t n, std::int64_t c) {
  return axis == Axis::none ? 1 : axis == Axis::sample ? n : c;
}

const void* at(const Input& in, std::int64_t element) {
  return static_cast<const char*>(in.x) + element * (in.type == Type::bf16 ? 2 : 4);
}

// Positions are cut into chunks of equal size.
struct Chunks {
  explicit Chunks(std::int64_t s) : total(s), size(s) {
    if (s > kPositions) size = ceil_div(ceil_div(s, ceil_div(s, kPositions)), 128) * 128;
  }
  std::int64_t count() const { return ceil_div(total, size); }
  std::int64_t begin(std::int64_t i) const { return i * size; }
  std::int64_t length(std::int64_t i) const { return std::min(size, total - i * size); }
  std::int64_t total, size;
};

// Where a row of codes lies.
struct Place {
  Place(const Layout& layout, std::int64_t channels)
      : layout(layout),
        row(row_bytes(channels, layout.bits)),
        line(layout.width + 2 * layout.pad_w),
        image(line * (layout.height + 2 * layout.pad_h)) {}

  std::int64_t offset(std::int64_t n, std::int64_t s) const {
    const std::int64_t h = s / layout.width, w = s % layout.width;
    return (n * image + (h + layout.pad_h) * line + w + layout.pad_w) * row;
  }
  // Positions from s on that follow each other in memory, at most `count`.
  std::int64_t run(std::int64_t s, std::int64_t count) const {
    return layout.pad_w == 0 ? count : std::min(count, layout.width - s % layout.width);
  }

  Layout layout;
  std::int64_t row, line, image;
};

float lower(float a, float b) { return b < a || std::isnan(b) ? b : a; }
float higher(float a, float b) { return b > a || std::isnan(b) ? b : a; }

// Extremes of the images (or rows of a matrix) [begin, end) per channel.
void channel_extremes(const Kernel& kernel, const Input& in, std::int64_t begin, std::int64_t end, float* low,
                      float* high) {
  const int type = static_cast<int>(in.type);
  if (in.channels_last) {
    kernel.column_extremes[type](at(in, begin * in.s * in.c), (end - begin) * in.s, in.c, in.c, low, high);
    return;
  }
  for (std::int64_t n = begin; n < end; ++n)
    for (std::int64_t c = 0; c < in.c; ++c) {
      float a, b;
      kernel.extremes[type](at(in, (n * in.c + c) * in.s), in.s, &a, &b);
      low[c] = n == begin ? a : lower(low[c], a);
      high[c] = n == begin ? b : higher(high[c], b);
    }
}

}  // namespace

void extremes(const Kernel& kernel, const Input& in, Axis axis, int threads, float* low, float* high) {
  const int type = static_cast<int>(in.type);
  const std::int64_t per_sample = in.c * in.s;
  if (axis == Axis::sample) {
    cpu::split(in.n, kGrain / per_sample + 1, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t n = begin; n < end; ++n)
        kernel.extremes[type](at(in, n * per_sample), per_sample, low + n, high + n);
    });
    return;
  }
  // Parts of a fixed size, of elements or of samples, combined afterwards.
  struct Parts;
  const std::int64_t groups = groups_of(axis, in.n, in.c), total = axis == Axis::none ? in.n * per_sample : in.n;
  const std::int64_t unit = axis == Axis::none ? 1 : per_sample;
  const std::int64_t part = std::max<std::int64_t>(std::max(2 * kGrain / unit, ceil_div(total, 256)), 1);
  const std::int64_t parts = ceil_div(total, part);
  float* lows = cpu::scratch<Parts, float>(2 * parts * groups);
  float* highs = lows + parts * groups;
  cpu::split(parts, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      const std::int64_t first = p * part, last = std::min(total, first + part);
      if (axis == Axis::none)
        kernel.extremes[type](at(in, first), last - first, lows + p, highs + p);
      else
        channel_extremes(kernel, in, first, last, lows + p * groups, highs + p * groups);
    }
  });
  for (std::int64_t g = 0; g < groups; ++g) {
    low[g] = lows[g];
    high[g] = highs[g];
    for (std::int64_t p = 1; p < parts; ++p) {
      low[g] = lower(low[g], lows[p * groups + g]);
      high[g] = higher(high[g], highs[p * groups + g]);
    }
  }
}

namespace {

// One call of encode(); its methods work on disjoint parts of the output.
class Encoder {
 public:
  Encoder(const Kernel& kernel, const Input& in, const Kept& kept, const Recipe& recipe, const philox::Stream& key,
          const Layout& layout, std::uint8_t* out, float* step, std::int32_t* zero, float* offset)
      : kernel_(kernel),
        in_(in),
        kept_(kept),
        n_(kept.axis == Axis::sample ? kept.count : in.n),
        c_(kept.axis == Axis::channel ? kept.count : in.c),
        recipe_(recipe),
        key_(key),
        place_(layout, c_),
        out_(out),
        step_(step),
        zero_(zero),
        offset_(offset) {
    struct Parameters;
    const std::int64_t groups = groups_of(recipe.axis, n_, c_);
    prescale_ = cpu::scratch<Parameters, float>(3 * groups);
    scale_ = prescale_ + groups;
    zero_code_ = scale_ + groups;
    for (const philox::Kernel& row : philox::kernels())
      if (row.isa <= kernel.isa && (philox_ == nullptr || row.isa > philox_->isa)) philox_ = &row;
  }

  // The grid of group g; whether there is one.
  bool set_grid(std::int64_t g, float low, float high) {
    const bool finite = std::isfinite(low) && std::isfinite(high);
    double span = static_cast<double>(high) - low;
    if (recipe_.rule == Rule::mirrored && span > 0) span = 2.0 * std::max(std::abs(low), std::abs(high));
    if (recipe_.rule == Rule::log) span = 0;  // none is too wide for it
    if (!finite || span > std::numeric_limits<float>::max()) {
      (finite ? overflows_ : not_finite_).store(true, std::memory_order_relaxed);
      return false;
    }
    const Grid grid = make_grid(recipe_.rule, low, high, recipe_.levels);
    step_[g] = grid.step;
    zero_[g] = static_cast<std::int32_t>(grid.zero);
    offset_[g] = grid.offset;
    prescale_[g] = grid.prescale;
    scale_[g] = grid.scale;
    zero_code_[g] = grid.zero;
    if (!grid.from_low || grid.prescale != 1) other_.store(true, std::memory_order_relaxed);
    if (grid.from_low) from_low_.store(true, std::memory_order_relaxed);
    return true;
  }

  bool set_grids(const float* low, const float* high, std::int64_t begin, std::int64_t end) {
    bool good = true;
    for (std::int64_t g = begin; g < end; ++g) good = set_grid(g, low[g], high[g]) && good;
    return good;
  }

  bool set_sample_grid(std::int64_t n) {
    float low, high;
    const std::int64_t per_sample = in_.c * in_.s;
    kernel_.extremes[type()](at(in_, n * per_sample), per_sample, &low, &high);
    return set_grid(n, low, high);
  }

  Status status() const {
    if (not_finite_) return Status::not_finite;
    if (overflows_) return Status::range_overflows;
    return from_low_ ? Status::ok_with_offset : Status::ok;
  }

  // Samples and channels of the result.
  std::int64_t samples() const { return n_; }
  std::int64_t channels() const { return c_; }

  // Rows [begin, end) of a matrix: one row, or some kRun elements of all rows.
  void rows(std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = 0; c < c_; c += kRun) {
      const std::int64_t count = std::min(kRun, c_ - c), element = sample(begin) * in_.c + c;
      Rectangle r = rectangle(begin, c, end - begin, count);
      if (kept_.axis == Axis::channel) {
        r.x = gathered(at(in_, begin * in_.c), 0, 1, c, count);
        r.bits = gathered_bits(begin, c, count, 1);
      } else {
        r.x = at(in_, element);
        prefetch(r.x, r.rows * count);
        r.bits = run_of_bits(element, r.rows * count);
      }
      r.x_stride = in_.c;
      r.bits_stride = r.codes_stride = count;
      // Bytes without padding need no packing.
      const bool packed = place_.row == c_ && place_.layout.bits == 8;
      r.codes = packed ? out_ + begin * place_.row + c : codes();
      if (packed) r.codes_stride = place_.row;
      run(r, recipe_.axis == Axis::sample);
      if (packed) continue;
      kernel_.pack(r.codes, count, end - begin, count, place_.layout.bits,
                   out_ + begin * place_.row + c * place_.layout.bits / 8, place_.row);
    }
  }

  // Positions of one chunk of image n, and with the first chunk the border.
  void positions(std::int64_t n, const Chunks& chunks, std::int64_t chunk) {
    const std::int64_t s = chunks.begin(chunk), length = chunks.length(chunk);
    for (std::int64_t c = 0; c < c_; c += kTile) {
      const std::int64_t channels = std::min(kTile, c_ - c);
      in_.channels_last ? last(n, c, channels, s, length) : first(n, c, channels, s, length);
    }
    if (chunk == 0) border(n);
  }

 private:
  int type() const { return static_cast<int>(in_.type); }

  // Where sample n and channel c of the result come from.
  std::int64_t sample(std::int64_t n) const { return kept_.axis == Axis::sample ? kept_.indices[n] : n; }
  std::int64_t channel(std::int64_t c) const { return kept_.axis == Axis::channel ? kept_.indices[c] : c; }

  Rectangle rectangle(std::int64_t n, std::int64_t c, std::int64_t rows, std::int64_t count) const {
    const std::int64_t g = recipe_.axis == Axis::none ? 0 : recipe_.axis == Axis::sample ? n : c;
    Rectangle r{};
    r.rows = rows;
    r.count = count;
    r.grids = {offset_ + g, prescale_ + g, scale_ + g, zero_code_ + g};
    r.columns = recipe_.axis == Axis::channel;
    r.from_low = !other_;
    r.log = recipe_.rule == Rule::log;
    r.random_bits = recipe_.random_bits;
    r.levels = recipe_.levels;
    return r;
  }

  // The memory is read while the random bits are made.
  void prefetch(const void* x, std::int64_t count) const {
    if (recipe_.random_bits == 0) return;
    const char* line = static_cast<const char*>(x);
    for (const char* end = line + count * (in_.type == Type::bf16 ? 2 : 4); line < end; line += 64)
      __builtin_prefetch(line);
  }

  // Rows that follow each other and share a grid are one.
  void run(Rectangle& r, bool grid_per_row) {
    r.grid_step = grid_per_row ? 1 : 0;
    const bool dense =
        r.x_stride == r.count && r.codes_stride == r.count && (r.bits == nullptr || r.bits_stride == r.count);
    if (dense && !grid_per_row && !r.columns) {
      r.count *= r.rows;
      r.rows = 1;
    }
    kernel_.encode[type()](r);
  }

  // Channels first: every channel's run of positions, then the transpose.
  void first(std::int64_t n, std::int64_t c, std::int64_t channels, std::int64_t s, std::int64_t length) {
    const auto from = [&](std::int64_t i) { return at(in_, (sample(n) * in_.c + channel(c + i)) * in_.s + s); };
    const bool apart = kept_.axis == Axis::channel;  // channels do not follow each other
    const std::int64_t step = apart && length >= kShort ? 1 : std::max<std::int64_t>(kRun / length, 1);
    for (std::int64_t i = 0; i < channels; i += step) {
      Rectangle r = rectangle(n, c + i, std::min(step, channels - i), length);
      r.x = from(i);
      r.x_stride = in_.s;
      for (std::int64_t j = 0; j < r.rows; ++j) prefetch(from(i + j), length);
      if (apart && r.rows > 1) {
        const std::size_t bytes = static_cast<std::size_t>(length) * size();
        char* const together = static_cast<char*>(block_of_numbers());
        for (std::int64_t j = 0; j < r.rows; ++j) std::memcpy(together + j * bytes, from(i + j), bytes);
        r.x = together;
        r.x_stride = length;
      }
      r.bits = bits_of(n, c + i, r.rows, s, length, &r.bits_stride);
      r.codes = codes() + i * length;
      r.codes_stride = length;
      r.columns = false;
      run(r, recipe_.axis == Axis::channel);
    }
    std::uint8_t* block = tile_of_codes();
    for (std::int64_t p = 0; p < length; p += kTile) {
      const std::int64_t many = std::min(kTile, length - p);
      kernel_.transpose_codes(codes() + p, length, channels, many, block, kTile);
      put(n, c, channels, s + p, many, block);
    }
  }

  // Channels last: the random bits are transposed.
  void last(std::int64_t n, std::int64_t c, std::int64_t channels, std::int64_t s, std::int64_t length) {
    struct Transposed;
    std::int64_t stride = 0;
    const std::int32_t* bits = bits_of(n, c, channels, s, length, &stride);
    std::uint8_t* block = tile_of_codes();
    for (std::int64_t p = 0; p < length; p += kTile) {
      const std::int64_t many = std::min(kTile, length - p);
      Rectangle r = rectangle(n, c, many, channels);
      r.x = at(in_, (sample(n) * in_.s + s + p) * in_.c + c);
      r.x_stride = in_.c;
      if (kept_.axis == Axis::channel) {
        r.x = gathered(at(in_, (n * in_.s + s + p) * in_.c), in_.c, many, c, channels);
        r.x_stride = channels;
      }
      if (bits != nullptr) {
        std::int32_t* turned = cpu::scratch<Transposed, std::int32_t>(kTile * kTile);
        kernel_.transpose_bits(bits + p, stride, channels, many, turned, kTile);
        r.bits = turned;
        r.bits_stride = kTile;
      }
      r.codes = block;
      r.codes_stride = kTile;
      run(r, false);
      put(n, c, channels, s + p, many, block);
    }
  }

  // Packs the codes [count][kTile] of positions s, s + 1, .. to where they belong.
  void put(std::int64_t n, std::int64_t c, std::int64_t channels, std::int64_t s, std::int64_t count,
           const std::uint8_t* block) {
    for (std::int64_t p = 0; p < count;) {
      const std::int64_t many = place_.run(s + p, count - p);
      kernel_.pack(block + p * kTile, kTile, many, channels, place_.layout.bits,
                   out_ + place_.offset(n, s + p) + c * place_.layout.bits / 8, place_.row);
      p += many;
    }
  }

  // Codes of a block of channels as they are computed where channels come first, or of a run.
  std::uint8_t* codes() const {
    struct Codes;
    return cpu::scratch<Codes, std::uint8_t>(kTile * kPositions + kTile);
  }

  // Codes of up to kTile positions of a block of channels.
  std::uint8_t* tile_of_codes() const {
    struct Tile;
    return cpu::scratch<Tile, std::uint8_t>(kTile * kTile);
  }

  std::size_t size() const { return in_.type == Type::bf16 ? 2 : 4; }

  void* block_of_numbers() const {
    struct Gathered;
    return cpu::scratch<Gathered, float>(std::max(kRun, kTile * kTile));
  }

  // The kept channels c .. c + count - 1 of rows that begin `stride` elements apart.
  const void* gathered(const void* from, std::int64_t stride, std::int64_t rows, std::int64_t c,
                       std::int64_t count) const {
    const auto gather = [&](const auto* x, auto* out) {
      for (std::int64_t r = 0; r < rows; ++r, x += stride)
        for (std::int64_t i = 0; i < count; ++i) *out++ = x[kept_.indices[c + i]];
      return static_cast<const void*>(out - rows * count);
    };
    if (in_.type == Type::bf16)
      return gather(static_cast<const std::uint16_t*>(from), static_cast<std::uint16_t*>(block_of_numbers()));
    return gather(static_cast<const float*>(from), static_cast<float*>(block_of_numbers()));
  }

  // Random bits of a few positions of the kept channels c .. c + count - 1 of sample n, [count][length]: those of other
  // channels between them are left out.
  const std::int32_t* gathered_bits(std::int64_t n, std::int64_t c, std::int64_t count, std::int64_t length) const {
    struct Bits;
    if (recipe_.random_bits == 0) return nullptr;
    std::int32_t* out = cpu::scratch<Bits, std::int32_t>(std::max(kRun, kTile * kShort));
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t first = channel(c + i);
      std::int64_t stop = i + 1;
      while (stop < count && (channel(c + stop) + 1 - first) * length <= kSpan) ++stop;
      const std::int32_t* bits =
          run_of_bits((n * in_.c + first) * length, (channel(c + stop - 1) + 1 - first) * length);
      for (; i < stop; ++i) std::copy_n(bits + (channel(c + i) - first) * length, length, out + i * length);
    }
    return out;
  }

  // Random bits of elements index .. index + count - 1.
  const std::int32_t* run_of_bits(std::int64_t index, std::int64_t count) const {
    if (recipe_.random_bits == 0) return nullptr;
    std::int32_t* buffer = bits_buffer();
    const std::int64_t from = index + in_.first * in_.c * in_.s, skip = from % tile();
    fill_bits(from - skip, skip + count, buffer);
    return buffer + skip;
  }

  // Random bits of a block; channel i's begin i * stride after the first one's.
  const std::int32_t* bits_of(std::int64_t n, std::int64_t c, std::int64_t channels, std::int64_t s,
                              std::int64_t length, std::int64_t* stride) const {
    *stride = length;
    const bool apart = kept_.axis == Axis::channel;
    if (apart && length == in_.s && length < kShort) return gathered_bits(n, c, channels, length);
    const std::int64_t index = (sample(n) * in_.c + (apart ? 0 : c)) * in_.s + s;
    if ((!apart && length == in_.s) || recipe_.random_bits == 0) return run_of_bits(index, channels * length);
    std::int32_t* buffer = bits_buffer() + kMaxTile;
    *stride = kPositions + kMaxTile;
    for (std::int64_t i = 0; i < channels; ++i) {
      const std::int64_t own = apart ? channel(c + i) : i;
      const std::int64_t from = index + (in_.first * in_.c + own) * in_.s, skip = from % tile();
      fill_bits(from - skip, skip + length, buffer + i * *stride - skip);
    }
    return buffer;
  }

  std::int32_t* bits_buffer() const {
    struct Bits;
    return cpu::scratch<Bits, std::int32_t>(kTile * (kPositions + kMaxTile) + 2 * kMaxTile);
  }

  std::int64_t tile() const { return philox::tile_elements(recipe_.random_bits); }

  void fill_bits(std::int64_t index, std::int64_t count, std::int32_t* out) const {
    philox::bits(*philox_, key_, recipe_.random_bits, static_cast<std::uint64_t>(index / tile()), count, 1, out);
  }

  void border(std::int64_t n) {
    const Layout& layout = place_.layout;
    if (layout.pad_h == 0 && layout.pad_w == 0) return;
    std::uint8_t* image = out_ + n * place_.image * place_.row;
    for (std::int64_t c = 0; c < c_; c += kTile) {
      std::uint8_t zeros[kTile];
      const std::int64_t channels = std::min(kTile, c_ - c);
      for (std::int64_t i = 0; i < channels; ++i) {
        const std::int64_t g = recipe_.axis == Axis::none ? 0 : recipe_.axis == Axis::sample ? n : c + i;
        zeros[i] = static_cast<std::uint8_t>(zero_[g]);
      }
      kernel_.pack(zeros, kTile, 1, channels, layout.bits, image + c * layout.bits / 8, place_.row);
    }
    const auto fill = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i)
        std::memcpy(image + i * place_.row, image, static_cast<std::size_t>(place_.row));
    };
    fill(1, layout.pad_h * place_.line + layout.pad_w);
    // The right border of a line and the left one of the next follow each other.
    for (std::int64_t h = 0; h < layout.height; ++h) {
      const std::int64_t end = (layout.pad_h + h + 1) * place_.line;
      fill(end - layout.pad_w, h + 1 < layout.height ? end + layout.pad_w : place_.image);
    }
  }

  static constexpr std::int64_t kMaxTile = 128;  // elements of the longest Philox tile

  const Kernel& kernel_;
  const Input in_;
  const Kept kept_;
  const std::int64_t n_, c_;
  const Recipe recipe_;
  const philox::Stream key_;
  const Place place_;
  std::uint8_t* out_;
  float* step_;
  std::int32_t* zero_;
  float* offset_;
  float *prescale_, *scale_, *zero_code_;
  const philox::Kernel* philox_ = nullptr;
  std::atomic<bool> not_finite_ = false, overflows_ = false, from_low_ = false, other_ = false;
};

}  // namespace

Status encode(const Kernel& kernel, const Input& in, const Kept& kept, const Recipe& recipe, const philox::Stream& key,
              const Layout& layout, const float* low, const float* high, int threads, std::uint8_t* out, float* step,
              std::int32_t* zero, float* offset) {
  struct Extremes;
  Encoder encoder(kernel, in, kept, recipe, key, layout, out, step, zero, offset);
  const std::int64_t samples = encoder.samples(), channels = encoder.channels();
  const std::int64_t groups = groups_of(recipe.axis, samples, channels);
  // A sample's extremes are found just before its codes, while it is in the cache.
  const bool by_sample = low == nullptr && recipe.axis == Axis::sample;
  if (!by_sample) {
    if (low == nullptr) {
      float* found = cpu::scratch<Extremes, float>(2 * groups);
      extremes(kernel, in, recipe.axis, threads, found, found + groups);
      low = found;
      high = found + groups;
    }
    if (!encoder.set_grids(low, high, 0, groups)) return encoder.status();
  }
  if (in.s == 1 && layout.pad_h == 0 && layout.pad_w == 0) {
    // Rows: some kRun elements, if the rows follow each other.
    const bool whole = kept.axis == Axis::none;
    const std::int64_t block = whole ? std::max<std::int64_t>((kRun + channels / 2) / channels, 1) : 1;
    cpu::split(ceil_div(samples, block), kGrain / (block * channels) + 1, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t n = begin * block; n < std::min(end * block, samples); n += block) {
                   const std::int64_t stop = std::min(n + block, samples);
                   bool good = true;
                   if (by_sample)
                     for (std::int64_t i = n; i < stop; ++i) good = encoder.set_sample_grid(i) && good;
                   if (good) encoder.rows(n, stop);
                 }
               });
    return encoder.status();
  }
  const Chunks chunks(in.s);
  const std::int64_t per_sample = by_sample ? 1 : chunks.count();
  cpu::split(samples * per_sample, kGrain * per_sample / (channels * in.s) + 1, threads,
             [&](std::int64_t begin, std::int64_t end) {
               for (std::int64_t i = begin; i < end; ++i) {
                 if (!by_sample)
                   encoder.positions(i / per_sample, chunks, i % per_sample);
                 else if (encoder.set_sample_grid(i))
                   for (std::int64_t chunk = 0; chunk < chunks.count(); ++chunk) encoder.positions(i, chunks, chunk);
               }
             });
  return encoder.status();
}

void decode(const Kernel& kernel, const std::uint8_t* codes, const Layout& layout, std::int64_t n, std::int64_t c,
            const Meaning& meaning, bool channels_last, int threads, float* out) {
  struct Parameters;
  struct Block;
  const Place place(layout, c);
  const Axis axis = meaning.axis;
  const std::int64_t groups = groups_of(axis, n, c), s = layout.height * layout.width;
  float* zeros = cpu::scratch<Parameters, float>(2 * groups);
  float* offsets = zeros + groups;
  for (std::int64_t g = 0; g < groups; ++g) {
    zeros[g] = meaning.zero == nullptr ? 0 : static_cast<float>(meaning.zero[g]);
    offsets[g] = meaning.offset == nullptr ? 0 : meaning.offset[g];
  }
  // The rows of a matrix are taken together like the positions of an image.
  const bool matrix = s == 1 && layout.pad_h == 0 && layout.pad_w == 0;
  const std::int64_t images = matrix ? 1 : n;
  const Chunks chunks(matrix ? n : s);
  cpu::split(images * chunks.count(), kGrain / (chunks.size * c) + 1, threads,
             [&](std::int64_t begin, std::int64_t end) {
               std::uint8_t* block = cpu::scratch<Block, std::uint8_t>(2 * (kTile * kPositions + kTile * kTile));
               std::uint8_t* turned = block + kTile * kPositions + kTile * kTile;
               for (std::int64_t i = begin; i < end; ++i) {
                 const std::int64_t image = i / chunks.count(), chunk = i % chunks.count();
                 const std::int64_t first = chunks.begin(chunk), length = chunks.length(chunk);
                 for (std::int64_t c0 = 0; c0 < c; c0 += kTile) {
                   const std::int64_t channels = std::min(kTile, c - c0);
                   for (std::int64_t p = 0; p < length;) {
                     const std::int64_t many = matrix ? length : place.run(first + p, length - p);
                     const std::int64_t from = matrix ? first * place.row : place.offset(image, first + p);
                     kernel.unpack(codes + from + c0 * layout.bits / 8, place.row, many, channels, layout.bits,
                                   block + p * kTile, kTile);
                     p += many;
                   }
                   const std::int64_t g = axis == Axis::none ? 0 : axis == Axis::channel ? c0 : matrix ? first : image;
                   Decoded d{};
                   d.log = meaning.log;
                   d.step = meaning.step + g;
                   d.zero = zeros + g;
                   d.offset = offsets + g;
                   if (matrix || channels_last) {
                     d.rows = length;
                     d.count = channels;
                     d.codes = block;
                     d.codes_stride = kTile;
                     d.columns = axis == Axis::channel;
                     d.grid_step = matrix && axis == Axis::sample ? 1 : 0;
                     d.x = out + ((matrix ? 0 : image * s) + first) * c + c0;
                     d.x_stride = c;
                   } else {
                     kernel.transpose_codes(block, kTile, length, channels, turned, kPositions);
                     d.rows = channels;
                     d.count = length;
                     d.codes = turned;
                     d.codes_stride = kPositions;
                     d.grid_step = axis == Axis::channel ? 1 : 0;
                     d.x = out + (image * c + c0) * s + first;
                     d.x_stride = s;
                   }
                   kernel.decode(d);
                 }
               }
             });
}

}  // namespace fqtstats::quantize
