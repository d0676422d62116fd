// A convolution's prologue: what norm_act.h makes of the convolution's input is computed where that is read, and never
// written to memory as a whole.
#pragma once

#include "norm_act.h"

#include <algorithm>

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

template <typename T>
struct Prologue : ApplyOperands<T> {
  const ApplyOperands<T>* filled = nullptr; // the same in rows that are filled; null where these are
};

// Rows first ... first + count - 1 of it to `to`.
template <typename T, typename Out>
inline void run_prologue(const Prologue<T>& prologue, int64_t first, int64_t count, Out* to) {
  const auto run = [&](const ApplyOperands<T>& operands, int64_t begin, int64_t size, Out* out) {
    if (size > 0) {
      apply_range(ApplyParams<T, Out>{operands, out, begin}, begin, begin + size);
    }
  };
  if (prologue.filled == nullptr) {
    return run(prologue, first, count, to);
  }
  const int64_t channels = prologue.rows.channels, pixels = prologue.filled->rows.channels / channels;
  const int64_t before = std::min(count, (pixels - first % pixels) % pixels), rows = (count - before) / pixels;
  const int64_t done = before + rows * pixels;
  run(prologue, first, before, to);
  run(*prologue.filled, (first + before) / pixels, rows, to + before * channels);
  run(prologue, first + done, count - done, to + done * channels);
}

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres
