// The weights of a forward product or an input gradient, as tiles and epilogues read them.
#pragma once

#include <cstdint>

#include "kernels/convolution8/convolution8.h"
#include "kernels/convolution8/images.h"
#include "kernels/convolution8/plan.h"

namespace fqtstats::convolution8 {

struct Shape {
  bool gradient;  // of the input gradient, else of the forward product
  std::int64_t groups;
  std::int64_t taps, kernel_width;
  std::int64_t terms, words;        // contracted channels of a group, and words of them
  std::int64_t columns, positions;  // of the result
};

// Valid until the next object on the same thread.
class Weights {
 public:
  // Lists the panels in `plan`, whose classes are there already. With `offset`, that of the activations is not 0.
  Weights(const Kernel& kernel, const Codes& w, const Shape& shape, bool offset, int threads, Plan& plan);

  const std::int8_t* data(const Panel& panel) const {
    return reinterpret_cast<const std::int8_t*>(panels_ + panel.offset);
  }

  // The panel's constants, without the bias, for results of class `index` of the plan.
  Columns columns(const Panel& panel, std::int64_t index) const;

  // Do results depend on the sums of the activations' codes?
  bool need_sums() const;

 private:
  void pack_forward(const Panel& p, std::int32_t* raw);
  void pack_gradient(const Panel& p, const Plan& plan);
  void sum_classes(const Plan& plan, bool offset);

  const Kernel& kernel_;
  const Shape shape_;
  const Image image_;
  const Scales scales_;
  const std::int64_t tap_stride_, class_stride_;
  std::uint8_t* panels_;
  std::int32_t* tap_sums_;    // [tap][tap_stride] sum b'
  std::int32_t* class_sums_;  // [class][class_stride] -sum b'
  float* v_ = nullptr;        // [class][class_stride] v of fqtstats/ops/products.py
};

}  // namespace fqtstats::convolution8
