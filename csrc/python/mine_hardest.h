// mine_hardest on NumPy arrays: the binding of kernels/cpu/mine_hardest.h in negmine._C.
#pragma once

#include <pybind11/pybind11.h>

namespace negmine::python {

void define_mine_hardest(pybind11::module_& m);

}  // namespace negmine::python
