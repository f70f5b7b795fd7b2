// How a kernel runs on several threads without knowing whose threads they are: the caller passes a `Parallel`.
//
// csrc/torch passes torch's parallel_for, csrc/python a serial loop. Tasks are handed out one by one from a counter, so
// a slow thread does not hold up the rest. No result depends on which thread ran a task, nor on how many there were.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace negmine::cpu {

struct Parallel {
  using Callback = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t begin, int64_t end, int64_t grain, Callback callback, void* context);
  int64_t threads;
};

inline Parallel serial() {
  return {[](int64_t begin, int64_t end, int64_t, Parallel::Callback callback, void* context) {
            callback(begin, end, context);
          },
          1};
}

// body(scratch, task) for every task in [0, tasks); make_scratch() once for each thread that takes part. What one of
// them throws, such as a lack of memory, the caller gets: no exception may leave a thread, and none crosses torch's ABI
// whole.
template <class MakeScratch, class Body>
void for_each_task(const Parallel& parallel, int64_t tasks, const MakeScratch& make_scratch, const Body& body) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const MakeScratch& make_scratch;
    const Body& body;
    std::atomic<bool> failed{false};
    std::exception_ptr error = nullptr;
  } context{.tasks = tasks, .make_scratch = make_scratch, .body = body};
  const auto drain = [](int64_t, int64_t, void* opaque) {
    Context& c = *static_cast<Context*>(opaque);
    int64_t task = c.next.fetch_add(1);
    if (task >= c.tasks) return;
    try {
      auto scratch = c.make_scratch();
      for (; task < c.tasks; task = c.next.fetch_add(1)) c.body(scratch, task);
    } catch (...) {
      c.next.store(c.tasks);
      if (!c.failed.exchange(true)) c.error = std::current_exception();
    }
  };
  const int64_t workers = std::min(std::max<int64_t>(parallel.threads, 1), tasks);
  if (workers > 0) parallel.run(0, workers, 1, drain, &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace negmine::cpu
