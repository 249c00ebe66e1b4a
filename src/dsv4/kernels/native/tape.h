// Kernels that were called once, to be called again with the same addresses.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace dsv4 {

// A list of calls. What they read and write must live as long as it does.
class Tape {
 public:
  // Where the first calls read, and how many bytes.
  void input(uintptr_t address, int64_t bytes) { inputs_.emplace_back(address, bytes); }
  void add(std::function<void(int threads)> step) { steps_.push_back(std::move(step)); }
  int64_t steps() const { return (int64_t)steps_.size(); }

  // What is at `given` goes where the inputs are; then all is done as it was, in so many threads.
  void run(const std::vector<uintptr_t>& given, int threads) const {
    if (given.size() != inputs_.size()) throw std::invalid_argument("other inputs than recorded");
    for (size_t i = 0; i < given.size(); i++) {
      auto [address, bytes] = inputs_[i];
      if (given[i] == address) continue;
      std::memcpy(reinterpret_cast<void*>(address), reinterpret_cast<void*>(given[i]), bytes);
    }
    for (const auto& step : steps_) step(threads);
  }

  // The tape that calls from this thread are put on, or null.
  static Tape*& recording() {
    static thread_local Tape* tape = nullptr;
    return tape;
  }

 private:
  std::vector<std::pair<uintptr_t, int64_t>> inputs_;
  std::vector<std::function<void(int)>> steps_;
};

// A kernel whose last argument is the number of threads, as one that can be recorded.
template <auto kernel>
struct Recorded;

template <class... Args, void (*kernel)(Args...)>
struct Recorded<kernel> {
  static void call(Args... args) {
    if (Tape* tape = Tape::recording()) {
      tape->add([all = std::tuple(args...)](int threads) mutable {
        std::get<sizeof...(Args) - 1>(all) = threads;
        std::apply(kernel, all);
      });
    }
    kernel(args...);
  }
};

}  // namespace dsv4
