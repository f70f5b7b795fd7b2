// Wraps the function of an op so that torch can call it, like torch's TORCH_BOX. In addition, a parameter may be a
// struct that is made of several arguments.
//
// Such a struct has a constant kArguments, the number of its arguments, and a constructor that takes them from an
// ArgumentStack in the order of the declaration (negmine/ops/registry.py). A call with a wrong number of arguments
// raises an error.
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
constexpr uint64_t num_arguments() {
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
    constexpr uint64_t wanted = (num_arguments<std::remove_cvref_t<Parameters>>() + ...);
    checks::require(arguments == wanted, "negmine: the op is declared with ", arguments,
                    " arguments, its kernel takes ", wanted, ".");
    ArgumentStack next(stack);
    std::tuple<std::remove_cvref_t<Parameters>...> values{next.take<std::remove_cvref_t<Parameters>>()...};
    return_to(stack, results, std::apply(function, values));
  }

 private:
  static void return_to(StableIValue* stack, uint64_t declared, const checks::Tensor& result) {
    require_results(declared, 1);
    stack[0] = torch::stable::detail::from(result);
  }

  template <class... Tensors>
  static void return_to(StableIValue* stack, uint64_t declared, const std::tuple<Tensors...>& results) {
    require_results(declared, sizeof...(Tensors));
    std::apply([&](const Tensors&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); }, results);
  }

  static void require_results(uint64_t declared, uint64_t returned) {
    checks::require(declared == returned, "negmine: the op is declared with ", declared,
                    " results, its kernel returns ", returned, ".");
  }
};

// The wrapped function, which can be passed to StableLibrary::impl.
template <auto* function>
constexpr auto boxed = &Boxed<decltype(function)>::template call<function>;

}  // namespace negmine
