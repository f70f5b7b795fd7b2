// What the CPU operators share: tensors as the structs of kernels/cpu, and torch's parallel_for as their Parallel.
#pragma once
#include <torch/csrc/stable/library.h>

#include "csrc/torch/checks.h"
#include "kernels/cpu/matrix.h"
#include "kernels/cpu/parallel.h"

namespace negmine {

template <class T>
T* output(checks::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline cpu::Parallel torch_threads() {
  const auto run = [](int64_t begin, int64_t end, int64_t grain, cpu::Parallel::Callback callback, void* context) {
    torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) { callback(from, to, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

inline cpu::Matrix matrix_of(const checks::Tensor& t) {
  using checks::ScalarType;
  const ScalarType dtype = t.scalar_type();
  return {t.data_ptr(), t.stride(0),
          dtype == ScalarType::Float      ? cpu::Dtype::kFloat32
          : dtype == ScalarType::BFloat16 ? cpu::Dtype::kBFloat16
                                          : cpu::Dtype::kFloat16};
}

}  // namespace negmine
