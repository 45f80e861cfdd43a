// What an operation's binding file gives to module.cc.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

#include "bind/variants.h"

namespace fqtstats::bind {

#define FQTSTATS_OP(op)          \
  void op(nanobind::module_& m); \
  std::vector<Variant> op##_variants();
#include "bind/ops.inc"
#undef FQTSTATS_OP

}  // namespace fqtstats::bind
