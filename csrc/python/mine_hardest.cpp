// mine_hardest for NumPy arrays, without torch. The kernel runs on std::threads, one for each core by default.
//
// For programs that hold embeddings as NumPy arrays or memory maps (FAISS, data pipelines). Rows may have any stride;
// an array whose elements are not contiguous within a row is copied.
#include "csrc/python/mine_hardest.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cpu/mine_hardest.h"

namespace py = pybind11;

namespace negmine::python {
namespace {

// A cpu::Parallel::run with one thread for each index; the calling thread is the first of them.
void run_on_threads(int64_t begin, int64_t end, int64_t, cpu::Parallel::Callback callback, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin + 1; i < end; ++i) threads.emplace_back(callback, i, i + 1, context);
  if (begin < end) callback(begin, begin + 1, context);
  for (std::thread& thread : threads) thread.join();
}

cpu::Dtype dtype_of(const char* name, const py::array& array) {
  if (py::isinstance<py::array_t<float>>(array)) return cpu::Dtype::kFloat32;
  if (array.dtype().equal(py::dtype("float16"))) return cpu::Dtype::kFloat16;
  if (std::string(py::str(array.dtype())) == "bfloat16") return cpu::Dtype::kBFloat16;  // from ml_dtypes
  throw py::type_error("mine_hardest: " + std::string(name) + " must be float32, float16 or bfloat16, got " +
                       std::string(py::str(array.dtype())) + ".");
}

// The array, or a copy of it if its rows are not contiguous or not aligned to whole elements.
py::array contiguous_rows(const char* name, const py::array& array) {
  if (array.ndim() != 2) {
    throw py::value_error("mine_hardest: " + std::string(name) + " must have 2 dimensions, got " +
                          std::to_string(array.ndim()) + ".");
  }
  const py::ssize_t item = array.itemsize();
  const bool contiguous = array.shape(1) <= 1 || array.strides(1) == item;
  const bool aligned = array.strides(0) % item == 0 && reinterpret_cast<uintptr_t>(array.data()) % item == 0;
  if (contiguous && aligned) return array;
  return array.attr("copy")("C");
}

cpu::Matrix matrix(const py::array& rows, cpu::Dtype dtype) {
  return {.data = rows.data(), .row_stride = rows.strides(0) / rows.itemsize(), .dtype = dtype};
}

std::pair<py::array, py::array> mine_hardest(const py::array& query, const py::array& negative_keys, int64_t N,
                                             int64_t threads) {
  // Checks.
  const cpu::Dtype query_dtype = dtype_of("query", query);
  const cpu::Dtype keys_dtype = dtype_of("negative_keys", negative_keys);
  const py::array q = contiguous_rows("query", query);                     // (B, D)
  const py::array keys = contiguous_rows("negative_keys", negative_keys);  // (K, D)
  if (q.shape(1) != keys.shape(1)) {
    throw py::value_error("mine_hardest: query and negative_keys must have the same number of columns, got " +
                          std::to_string(q.shape(1)) + " and " + std::to_string(keys.shape(1)) + ".");
  }
  if (N < 0) throw py::value_error("mine_hardest: N must be at least 0, got " + std::to_string(N) + ".");
  if (threads < 0) {
    throw py::value_error("mine_hardest: threads must be at least 0, got " + std::to_string(threads) + ".");
  }
  // Outputs.
  py::array_t<float> scores({static_cast<py::ssize_t>(q.shape(0)), static_cast<py::ssize_t>(N)});   // (B, N)
  py::array_t<int64_t> index({static_cast<py::ssize_t>(q.shape(0)), static_cast<py::ssize_t>(N)});  // (B, N)
  // Params.
  const cpu::MineHardestParams params = {.query = matrix(q, query_dtype),
                                         .negative_keys = matrix(keys, keys_dtype),
                                         .B = q.shape(0),
                                         .K = keys.shape(0),
                                         .D = q.shape(1),
                                         .N = N,
                                         .pool = {},
                                         .scores = scores.mutable_data(),
                                         .index = index.mutable_data()};
  // Run.
  const int64_t available = std::max<int64_t>(1, std::thread::hardware_concurrency());
  {
    const py::gil_scoped_release release;
    cpu::mine_hardest(params, {run_on_threads, threads == 0 ? available : threads});
  }
  return {scores, index};
}

}  // namespace

void define_mine_hardest(py::module_& m) {
  m.def("mine_hardest", &mine_hardest, py::arg("query"), py::arg("negative_keys"), py::arg("N"), py::kw_only(),
        py::arg("threads") = 0,
        "The N highest inner products of each query with the keys: scores (B, N) float32, index (B, N) int64.\n\n"
        "query (B, D), negative_keys (K, D): float32, float16 or (with ml_dtypes) bfloat16 arrays. Highest first, ties "
        "to the lower index; -inf and "
        "-1 past the last key.\nthreads: 0 = one for each core. The result does not depend on it.");
}

}  // namespace negmine::python
