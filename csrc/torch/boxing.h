// How torch calls an op's function: TORCH_BOX, and besides it a parameter may be a struct that takes several arguments.
//
// Such a struct has a constant kArguments, how many, and a constructor from ArgumentStack that takes them in the order
// of the declaration (negmine/ops/registry.py). A call with another number of arguments is refused.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include "csrc/torch/checks.h"

namespace negmine {

class ArgumentStack {
 public:
  explicit ArgumentStack(StableIValue* first) : next_(first) {}

  template <class T>
  T take() {
    if constexpr (requires { T::kArguments; }) {
      return T(*this);
    } else {
      return torch::stable::detail::to<T>(*next_++);
    }
  }

 private:
  StableIValue* next_;
};

template <class T>
constexpr uint64_t arguments_of() {
  if constexpr (requires { T::kArguments; }) {
    return T::kArguments;
  } else {
    return 1;
  }
}

template <class Function>
struct Boxed;

template <class Result, class... Parameters>
struct Boxed<Result (*)(Parameters...)> {
  template <Result (*function)(Parameters...)>
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr uint64_t taken = (arguments_of<std::remove_cvref_t<Parameters>>() + ...);
    checks::require(arguments == taken, "negmine: the op is declared with ", arguments, " arguments, its kernel takes ",
                    taken, ".");
    ArgumentStack next(stack);
    std::tuple<std::remove_cvref_t<Parameters>...> values{next.take<std::remove_cvref_t<Parameters>>()...};
    put(stack, results, std::apply(function, values));
  }

 private:
  static void put(StableIValue* stack, uint64_t results, const checks::Tensor& result) {
    require_results(results, 1);
    stack[0] = torch::stable::detail::from(result);
  }

  template <class... Tensors>
  static void put(StableIValue* stack, uint64_t results, const std::tuple<Tensors...>& made) {
    require_results(results, sizeof...(Tensors));
    std::apply([&](const Tensors&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); }, made);
  }

  static void require_results(uint64_t declared, uint64_t made) {
    checks::require(declared == made, "negmine: the op is declared with ", declared, " results, its kernel makes ",
                    made, ".");
  }
};

// The function of an op as StableLibrary::impl takes it.
template <auto* function>
constexpr auto boxed = &Boxed<decltype(function)>::template call<function>;

}  // namespace negmine
