#include "kernels/peak/peak.h"

namespace fqtstats::peak {

extern const Kernel scalar{"scalar", cpu::Isa::scalar, nullptr, nullptr, nullptr, nullptr};

}  // namespace fqtstats::peak
