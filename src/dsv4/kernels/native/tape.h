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
  bool whole() const { return whole_; }  // no kernel was called that cannot be recorded

  // What is at `given` (address, bytes) goes where the inputs are; then all is done as it was, in so
  // many threads.
  void run(const std::vector<std::pair<uintptr_t, int64_t>>& given, int threads) const {
    bool alike = given.size() == inputs_.size();
    for (size_t i = 0; alike && i < given.size(); i++) alike = given[i].second == inputs_[i].second;
    if (!alike) throw std::invalid_argument("other inputs than recorded");
    for (size_t i = 0; i < given.size(); i++) {
      auto [address, bytes] = inputs_[i];
      if (given[i].first == address) continue;
      std::memcpy(reinterpret_cast<void*>(address), reinterpret_cast<void*>(given[i].first), bytes);
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
  bool whole_ = true;
  friend struct NotRecorded;
};

// Exists while a kernel runs that no tape can hold.
struct NotRecorded {
  NotRecorded() {
    if (Tape* tape = Tape::recording()) tape->whole_ = false;
  }
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
