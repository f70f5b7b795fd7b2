// Parallel loops of the kernels. The caller of a kernel passes a `Parallel`, which provides the threads.
//
// csrc/torch passes torch's parallel_for, csrc/python its own threads. A counter assigns the tasks one by one, so a
// slow thread does not delay the others. Results do not depend on which thread runs a task, nor on the number of
// threads.
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

// Calls body(scratch, task) for every task in [0, tasks), and make_scratch() once for each thread. An exception in one
// of them, such as bad_alloc, is thrown again in the calling thread, because no exception may leave another thread or
// pass through torch's ABI.
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
