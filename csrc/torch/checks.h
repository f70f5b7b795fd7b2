// What the ops check before they hand out pointers: only what would corrupt memory. negmine/*.py refuses the rest, in
// words.
//
// Each check is a sentence that names the op, the argument, what was wanted and what came. A check returns the tensor
// to read: the given one where its last dimension is contiguous, else a contiguous copy. Nothing here depends on the
// device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace negmine::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws the sentence made of `parts` unless `good`.
template <class... Parts>
void require(bool good, const Parts&... parts) {
  if (good) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// An output, or a sentence with the bytes asked for: what torch says of its refusal does not cross the stable ABI.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> shape,
                        std::optional<ScalarType> dtype = std::nullopt) {
  const std::vector<int64_t> sizes(shape);
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception&) {
    std::ostringstream sentence;
    double bytes = dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : like.element_size();
    sentence << "negmine: out of memory: an output of shape (";
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      sentence << (dim > 0 ? ", " : "") << sizes[dim];
      bytes *= static_cast<double>(sizes[dim]);
    }
    sentence.precision(17);
    sentence << (sizes.size() == 1 ? ",)" : ")") << " takes " << bytes << " bytes";
    throw std::runtime_error(sentence.str());
  }
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 0; dim < t.dim(); ++dim) text << (dim > 0 ? ", " : "") << t.size(dim);
  text << (t.dim() == 1 ? ",)" : ")");
  return text.str();
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
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const bool dense = last < 0 || t.size(last) <= 1 || t.stride(last) == 1;
  return dense ? t : torch::stable::contiguous(t);
}

// A (rows, D) matrix in one of the three storage types, any row stride.
inline Tensor matrix(const char* op, const char* name, const Tensor& t, const char* wanted) {
  require(t.dim() == 2, op, ": ", name, " must be ", wanted, ", got the shape ", shape_text(t), ".");
  const ScalarType dtype = t.scalar_type();
  require(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ", name,
          " must be float32, bfloat16 or float16, got ", dtype_text(dtype), ".");
  return dense_rows(t);
}

// query (B, D) and negative_keys (K, D) agree.
inline void same_width(const char* op, const Tensor& query, const Tensor& negative_keys) {
  require(query.size(1) == negative_keys.size(1), op, ": query (B, D) and negative_keys (K, D) must share D, got ",
          shape_text(query), " and ", shape_text(negative_keys), ".");
  require(same_device(query, negative_keys), op, ": negative_keys must be on the device of query, it is on another.");
}

// A contiguous (size,) vector of `dtype` on the device of `like`.
inline Tensor vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t size,
                     const Tensor& like) {
  require(t.dim() == 1 && t.size(0) == size, op, ": ", name, " must have the shape (", size, ",), got ", shape_text(t),
          ".");
  require(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype), ", got ",
          dtype_text(t.scalar_type()), ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return torch::stable::contiguous(t);
}

inline OptionalTensor vector(const char* op, const char* name, const OptionalTensor& t, ScalarType dtype, int64_t size,
                             const Tensor& like) {
  if (!t.has_value()) return std::nullopt;
  return vector(op, name, *t, dtype, size, like);
}

// A contiguous (rows, any) int64 matrix on the device of `like`.
inline Tensor index_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, const Tensor& like) {
  require(t.dim() == 2 && t.size(0) == rows, op, ": ", name, " must have ", rows, " rows, one for each query, got ",
          shape_text(t), ".");
  require(t.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64, got ", dtype_text(t.scalar_type()),
          ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return torch::stable::contiguous(t);
}

// A single fp32 number on the device of `like`.
inline Tensor scalar(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  require(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, ": ", name,
          " must be one float32 number, got the shape ", shape_text(t), " of ", dtype_text(t.scalar_type()), ".");
  require(same_device(t, like), op, ": ", name, " must be on the device of query, it is on another.");
  return t;
}

// The tensors of a pool (kernels/README.md), checked; holds them while a kernel reads their memory.
struct PoolTensors {
  OptionalTensor negative_mask, query_ids, negative_ids, query_labels, negative_labels, lower, upper;
  bool same_label;

  PoolTensors(const char* op, const Tensor& query, const Tensor& negative_keys, const OptionalTensor& mask,
              const OptionalTensor& q_ids, const OptionalTensor& n_ids, const OptionalTensor& q_labels,
              const OptionalTensor& n_labels, const OptionalTensor& low, const OptionalTensor& high, bool same)
      : same_label(same) {
    const int64_t B = query.size(0), K = negative_keys.size(0);
    require(K <= INT64_C(0xFFFFFFFF), op, ": negative_keys must have fewer than 2^32 rows, got ", K, ".");
    require(q_ids.has_value() == n_ids.has_value(), op, ": query_ids and negative_ids go together, got one of them.");
    require(q_labels.has_value() == n_labels.has_value(), op,
            ": query_labels and negative_labels go together, got one of them.");
    require(q_labels.has_value() || !same, op, ": same_label needs query_labels and negative_labels, got none.");
    if (mask.has_value()) {
      const bool shared = mask->dim() == 1 && mask->size(0) == K;
      const bool own = mask->dim() == 2 && mask->size(0) == B && mask->size(1) == K;
      require(shared || own, op, ": negative_mask must be (K,) = (", K, ",) or (B, K) = (", B, ", ", K, "), got ",
              shape_text(*mask), ".");
      require(mask->scalar_type() == ScalarType::Bool, op, ": negative_mask must be bool, got ",
              dtype_text(mask->scalar_type()), ".");
      require(same_device(*mask, query), op, ": negative_mask must be on the device of query, it is on another.");
      negative_mask = dense_rows(*mask);
    }
    query_ids = vector(op, "query_ids", q_ids, ScalarType::Long, B, query);
    negative_ids = vector(op, "negative_ids", n_ids, ScalarType::Long, K, query);
    query_labels = vector(op, "query_labels", q_labels, ScalarType::Long, B, query);
    negative_labels = vector(op, "negative_labels", n_labels, ScalarType::Long, K, query);
    lower = vector(op, "lower", low, ScalarType::Long, B, query);
    upper = vector(op, "upper", high, ScalarType::Long, B, query);
  }
};

inline const int64_t* longs(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
}

inline const float* floats(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

}  // namespace negmine::checks
