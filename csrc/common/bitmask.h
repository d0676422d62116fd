// The bit mask that backward reads: one bit an element, in the order of memory.
//
// Memory is rows: M rows of C in channels_last, N * C rows of H * W in NCHW. Element k of a row is bit k % 8 of the
// row's byte k / 8, and every row starts on a byte of its own, so that two rows never share a byte and may be written
// by two threads. A bit is set where the element was kept by dropout and, where the activation is piecewise linear with
// the slopes 1 and 0 (or 1 and alpha), passed by it: ReLU passes what is not <= 0, NaN included.
#pragma once

#include <cstdint>

namespace fastres {

constexpr int64_t bitmask_row_bytes(int64_t elements) {
  return (elements + 7) / 8;
}

} // namespace fastres
