// Code that the CUDA operators share: the stream and the device of a call, storage types, draws and error messages.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/torch/arguments.h"
#include "csrc/torch/checks.h"
#include "kernels/cuda/mixing.h"
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

// The query (B, D), the negative_keys (K, D) and the draws of a call. The caller sets hard_index and N.
inline cuda::Mixing mixing_of(const checks::Tensor& query, const checks::Tensor& negative_keys,
                              const DrawArguments& given, const DrawTensors& tensors) {
  return {.B = query.size(0),
          .N = 0,
          .D = query.size(1),
          .query = query.data_ptr(),
          .negative_keys = negative_keys.data_ptr(),
          .hard_index = nullptr,
          .query_stride = query.stride(0),
          .negative_keys_stride = negative_keys.stride(0),
          .hard_index_stride = 0,
          .query_storage = storage_of(query),
          .negative_keys_storage = storage_of(negative_keys),
          .pairs = given.pairs,
          .with_query = given.with_query,
          .pair_low = static_cast<float>(given.pair_low),
          .pair_high = static_cast<float>(given.pair_high),
          .query_low = static_cast<float>(given.query_low),
          .query_high = static_cast<float>(given.query_high),
          .distinct = given.distinct,
          .quantiles = checks::floats(tensors.quantiles),
          .seed = static_cast<uint32_t>(given.seed),
          .step = checks::longs(tensors.step),
          .row_offset = checks::longs(tensors.row_offset)};
}

// Makes the device of `tensor` current for launches. A device guard of torch is not enough: it sets the device of
// torch's CUDA runtime, but this library is linked statically with a CUDA runtime of its own.
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
