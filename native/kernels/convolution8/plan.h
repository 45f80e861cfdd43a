// What a convolution derives from its geometry alone: which positions of the result have which taps inside the image.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/convolution8/convolution8.h"
#include "kernels/convolution8/images.h"

namespace fqtstats::convolution8 {

// One spatial axis: which taps of the kernel a position of the result has inside the image that it reads.
struct Axis {
  struct Tap {
    std::int64_t coordinate;  // relative to the position's first tap
    std::int64_t index;       // in the kernel
  };
  // The positions first + j * step, j < count, read the coordinates from + j * by with one tap.
  struct Span {
    std::int64_t first, step, from, by, count;
  };
  std::vector<std::int64_t> base;         // [position] coordinate of the first tap
  std::vector<std::int64_t> class_of;     // [position]
  std::vector<std::vector<Tap>> classes;  // the first class_count; the others keep their memory
  std::size_t class_count;
  std::vector<std::int64_t> place;  // [tap] in the panel: taps that read neighbours, in the order of their coordinates
  std::vector<Span> spans;          // [tap]
};

// Kept between calls, as scratch is.
struct Plan {
  // Positions of the result with the same taps inside the image.
  struct Class {
    std::int64_t vertical, horizontal;  // of the axes
    std::int64_t taps;
    std::int64_t run_begin, run_end;      // in runs
    std::int64_t pixel_begin, pixel_end;  // in pixels
  };
  struct Pixel {
    std::int64_t in, out;  // bytes from the start of an image; position in the result
  };

  Axis vertical, horizontal;
  std::vector<Class> classes;
  std::vector<Run> runs;
  std::vector<Pixel> pixels;
  std::vector<Panel> panels;

  // Of the calling thread.
  static Plan& of_thread();

  // The axes, for a result and an image of (height, width) and a kernel of taps[0] x taps[1]. `gradient`: the result is
  // the input gradient, and the image that of the output.
  void set_axes(const Geometry& geometry, bool gradient, const std::int64_t (&result)[2],
                const std::int64_t (&image)[2], const std::int64_t (&taps)[2]);

  // The classes, for taps of `words` words each in panels and in images.
  void list_classes(const Image& image, std::int64_t words);

  // Where a panel holds the tap in row y and column x of the kernel.
  std::int64_t place(std::int64_t y, std::int64_t x) const;
};

}  // namespace fqtstats::convolution8
