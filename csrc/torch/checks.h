// The checks of tensors in the ops. They reject only what would corrupt memory; the Python functions that call the ops
// check the meaning of the arguments.
//
// A failed check throws a sentence with the names of the op and of the argument, what was wanted and what was passed.
// The functions return the tensor to read: the argument itself if its layout is suitable, otherwise a contiguous copy.
// They work for any device.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>

namespace negmine::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws an exception with the concatenated `parts` unless `good`.
template <class... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

// Prints the shape of a tensor as Python does, for example (3,) or (2, 4).
struct Shape {
  const Tensor& of;

  friend std::ostream& operator<<(std::ostream& text, const Shape& shape) {
    text << '(';
    for (int64_t dim = 0; dim < shape.of.dim(); ++dim) text << (dim > 0 ? ", " : "") << shape.of.size(dim);
    return text << (shape.of.dim() == 1 ? ",)" : ")");
  }
};

// If the tests set NEGMINE_POISON_OUTPUTS, fills new outputs with NaN or the largest integer, so that elements which a
// kernel does not write are noticed. torch's own fill_uninitialized_memory has no effect on new_empty(), which bypasses
// the dispatcher.
inline void poison(const Tensor& output, bool longs) {
  static const bool wanted = std::getenv("NEGMINE_POISON_OUTPUTS") != nullptr;
  if (!wanted || !output.is_cpu()) return;
  const int64_t numel = output.numel();
  if (longs) {
    std::fill_n(static_cast<int64_t*>(output.mutable_data_ptr()), numel, INT64_MAX);
  } else {
    std::fill_n(static_cast<uint8_t*>(output.mutable_data_ptr()), numel * output.element_size(), uint8_t{0xFF});
  }
}

// An uninitialised dense tensor on the device of `like`. `dtype` is a result of the functions aoti_torch_dtype_*().
// This bypasses torch's dispatcher to save time: a small call takes only about a microsecond for each of its outputs.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape, int32_t dtype) {
  constexpr size_t kMostDims = 4;
  int64_t strides[kMostDims], stride = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(shape.begin()[dim], 1);
  }
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  const int64_t dims = static_cast<int64_t>(shape.size());
  const auto failure = aoti_torch_empty_strided(dims, shape.begin(), strides, dtype, type, index, &handle);
  if (failure == 0) {
    Tensor tensor(handle);
    poison(tensor, dtype == aoti_torch_dtype_int64());
    return tensor;
  }
  // torch's own error message is not available through the stable ABI.
  std::ostringstream sentence;
  double bytes = dtype == aoti_torch_dtype_int64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : like.element_size();
  sentence << "negmine: out of memory: an output of shape (";
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    sentence << (dim > 0 ? ", " : "") << shape.begin()[dim];
    bytes *= static_cast<double>(shape.begin()[dim]);
  }
  sentence.precision(17);
  sentence << (shape.size() == 1 ? ",)" : ")") << " takes " << bytes << " bytes";
  throw std::runtime_error(sentence.str());
}

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_empty(like, shape, aoti_torch_dtype_float32());
}

inline Tensor new_longs(const Tensor& like, std::initializer_list<int64_t> shape) {
  return new_empty(like, shape, aoti_torch_dtype_int64());
}

inline Tensor new_codes(const Tensor& like, int64_t rows, int64_t width) {
  return new_empty(like, {rows, width}, aoti_torch_dtype_uint8());
}

inline Tensor new_bytes(const Tensor& like, int64_t bytes) {
  return new_empty(like, {bytes}, aoti_torch_dtype_uint8());
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The tensor, or a copy of it, such that the elements of a row (its last dimension) are contiguous.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const bool dense = last < 0 || t.size(last) <= 1 || t.stride(last) == 1;
  return dense ? t : torch::stable::contiguous(t);
}

// A (rows, D) matrix in one of the three storage types, any row stride.
inline Tensor matrix(const char* op, const char* name, const Tensor& t, const char* wanted) {
  require(t.dim() == 2, op, ": ", name, " must be ", wanted, ", got the shape ", Shape{t}, ".");
  const ScalarType dtype = t.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ", name,
          " must be float32, bfloat16 or float16, got ", dtype_text(dtype), ".");
  return dense_rows(t);
}

// A (rows, width) matrix of codes, any row stride.
inline Tensor codes(const char* op, const char* name, const Tensor& t, const char* wanted) {
  require(t.dim() == 2 && t.size(1) % 4 == 0, op, ": ", name, " must be ", wanted,
          " with a width that is a multiple of 4, got the shape ", Shape{t}, ".");
  require(t.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8, got ", dtype_text(t.scalar_type()),
          ".");
  return dense_rows(t);
}

// Requires that query (B, D) and negative_keys (K, D) have the same D and the same device.
inline void same_width(const char* op, const Tensor& query, const Tensor& negative_keys) {
  require(query.size(1) == negative_keys.size(1), op, ": query (B, D) and negative_keys (K, D) must share D, got ",
          Shape{query}, " and ", Shape{negative_keys}, ".");
  require(same_device(query, negative_keys), op, ": negative_keys must be on the device of query, it is on another.");
}

// The positive of each query, (B, D).
inline Tensor positives(const char* op, const Tensor& positive_key, const Tensor& query) {
  const Tensor positive = matrix(op, "positive_key", positive_key, "(B, D)");
  require(positive.size(0) == query.size(0) && positive.size(1) == query.size(1), op,
          ": positive_key must have the shape of query, got ", Shape{positive}, " and ", Shape{query}, ".");
  require(same_device(positive, query), op, ": positive_key must be on the device of query, it is on another.");
  return positive;
}

// A contiguous (size,) vector of `dtype` on the device of `like`.
inline Tensor vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t size,
                     const Tensor& like) {
  require(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have the shape (", size, ",), got ", Shape{t}, ".");
  require(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype), ", got ",
          dtype_text(t.scalar_type()), ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return as_contiguous(t);
}

inline OptionalTensor vector(const char* op, const char* name, const OptionalTensor& t, ScalarType dtype, int64_t size,
                             const Tensor& like) {
  if (!t.has_value()) return std::nullopt;
  return vector(op, name, *t, dtype, size, like);
}

// A contiguous (rows, any) int64 matrix on the device of `like`.
inline Tensor index_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& like) {
  require(t.dim() == 2 && t.size(0) == rows, op, ": ", name, " must have ", rows, " rows, one for each query, got ",
          Shape{t}, ".");
  require(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64, got ", dtype_text(t.scalar_type()),
          ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return as_contiguous(t);
}

// The scales (S,) of log-sum-exps, at least one.
inline Tensor scales(const char* op, const Tensor& t, const Tensor& like) {
  require(t.dim() == 1 && t.size(0) >= 1, op, ": scales must be (S,) with S of 1 or more, got ", Shape{t}, ".");
  return vector(op, "scales", t, ScalarType::Float, t.size(0), like);
}

// A log-sum-exp can also find the N hardest columns, or be restricted to a window of ranks, but not both.
inline void mined_or_ranked(const char* op, int64_t N, bool ranked) {
  require(N >= 0, op, ": N must not be negative, got ", N, ".");
  require(N == 0 || !ranked, op, ": N > 0 and ranks do not go together, got N = ", N, ".");
}

// Whether S synthetic negatives are mixed from the ranks [skip, skip + hard) of the pool, which has no window then.
inline bool mixes(const char* op, int64_t hard, int64_t skip, int64_t S, bool ranked) {
  require(hard >= 0 && skip >= 0, op, ": hard and skip must not be negative, got ", hard, " and ", skip, ".");
  const bool wanted = hard > 0 && S > 0;
  require(!wanted || !ranked, op, ": ranks and synthetic negatives do not go together, got hard = ", hard, ".");
  return wanted;
}

// The first and the last rank of each query, (B, 2) int64.
inline OptionalTensor rank_pairs(const char* op, const OptionalTensor& ranks, int64_t B, const Tensor& like) {
  if (!ranks.has_value()) return std::nullopt;
  const Tensor pairs = index_matrix(op, "ranks", *ranks, B, like);
  require(pairs.size(1) == 2, op, ": ranks must be (B, 2), the first and the last, got ", Shape{pairs}, ".");
  return pairs;
}

// A single number of `dtype` on the device of `like`.
inline Tensor scalar(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like) {
  require(t.numel() == 1, op, ": ", name, " must be one number, a tensor of shape (), got the shape ", Shape{t}, ".");
  require(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype), ", got ",
          dtype_text(t.scalar_type()), ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return t;
}

inline OptionalTensor scalar(const char* op, const char* name, const OptionalTensor& t, ScalarType dtype,
                             const Tensor& like) {
  if (!t.has_value()) return std::nullopt;
  return scalar(op, name, *t, dtype, like);
}

inline const int64_t* longs(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

inline const float* floats(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

}  // namespace negmine::checks
