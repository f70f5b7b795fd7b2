// What the CUDA operators share: the stream and the device of a call, storage, and failures in words.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/torch/checks.h"
#include "kernels/cuda/storage.h"

namespace negmine {

inline void* current_stream(const checks::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline cuda::Storage storage_of(const checks::Tensor& matrix) {
  using checks::ScalarType;
  const ScalarType dtype = matrix.scalar_type();
  return dtype == ScalarType::Float      ? cuda::Storage::kFloat32
         : dtype == ScalarType::BFloat16 ? cuda::Storage::kBFloat16
                                         : cuda::Storage::kFloat16;
}

// Makes the device of `tensor` current for launches: a guard of torch speaks to torch's CUDA runtime, and this library
// is linked with its own, which must agree on the device.
inline void set_device(const char* op, const checks::Tensor& tensor) {
  checks::require(cudaSetDevice(tensor.get_device_index()) == cudaSuccess, op, ": cuda:", tensor.get_device_index(),
                  " could not be made the current device.");
}

inline void require_launched(const char* op, int error) {
  checks::require(error == cudaSuccess, op,
                  ": the launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)), ".");
}

inline void require_on_gpu(const char* op, const checks::Tensor& query) {
  checks::require(query.is_cuda(), op, ": query must be on a CUDA device, where the other tensors are, it is not.");
}

}  // namespace negmine
