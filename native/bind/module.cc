#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bind/bind.h"
#include "cpu/isa.h"

namespace nb = nanobind;
using namespace fqtstats;

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of fqtstats. Called through fqtstats.ops only.";
#define FQTSTATS_OP(op) bind::op(m);
#include "bind/ops.inc"
#undef FQTSTATS_OP
  m.def("isa", [] { return cpu::name(cpu::limit()); }, "The highest instruction set that kernels may use.");
  m.def(
      "kernels",
      [] {
        nb::list rows;
#define FQTSTATS_OP(op) bind::op##_variants(),
        for (const auto& list : {
#include "bind/ops.inc"
             })
#undef FQTSTATS_OP
          for (const bind::Variant& v : list) rows.append(nb::make_tuple(v.op, v.name, v.available, v.selected));
        return rows;
      },
      "Rows (op, variant, available, selected), fastest first.");
}
