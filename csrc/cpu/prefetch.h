// Software prefetch of what is read after a matrix product. The product keeps the multipliers busy and the memory idle:
// meanwhile the next data is brought into the L2 cache, a share at a time.
#pragma once

#include "gemm.h"

#include <cstdint>
#include <utility>
#include <vector>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

class Prefetch {
public:
  void clear() {
    runs_.clear();
    lines_ = run_ = at_ = 0;
  }

  // One of `shares` shares, each call the next.
  void fetch(int64_t shares) {
    for (int64_t left = (lines_ + shares - 1) / shares; left > 0 && run_ < static_cast<int64_t>(runs_.size()); --left) {
      __builtin_prefetch(runs_[run_].first + at_, 0, 2);
      at_ += kLine;
      if (at_ >= runs_[run_].second) {
        ++run_;
        at_ = 0;
      }
    }
  }

  // The next lines, at most so many and all in one run, for a micro-kernel to fetch.
  Ahead take(int64_t most) {
    if (most <= 0 || run_ == static_cast<int64_t>(runs_.size())) {
      return {};
    }
    const auto [start, bytes] = runs_[run_];
    const Ahead ahead{start + at_, std::min(most, (bytes - at_ + kLine - 1) / kLine)};
    at_ += ahead.lines * kLine;
    if (at_ >= bytes) {
      ++run_;
      at_ = 0;
    }
    return ahead;
  }
  int64_t lines() const {
    return lines_;
  }

  void add(const void* start, int64_t bytes) {
    const char* first = static_cast<const char*>(start);
    lines_ += (bytes + kLine - 1) / kLine;
    if (!runs_.empty() && runs_.back().first + runs_.back().second == first) {
      runs_.back().second += bytes;
    } else {
      runs_.emplace_back(first, bytes);
    }
  }

private:
  static constexpr int64_t kLine = Ahead::kLine;

  std::vector<std::pair<const char*, int64_t>> runs_;
  int64_t lines_ = 0, run_ = 0, at_ = 0;
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
