// The emulator: runs device code written against csrc/cuda/primitives.cuh on the CPU, a block at a time.
//
// The threads of a block are fibers. A barrier, and whatever the lanes of a warp do together, is a rendezvous; between
// two of them warps, and the lanes of a warp, run in an order drawn from a seed. So that faults show:
// - shared memory is full of NaN before it is written; so is the place of an asynchronous copy from its issue on, and
//   the data arrives no sooner than the wait asks for it;
// - two threads that touch the same shared memory without a barrier between them, one of them writing, are an error
//   (the detector can be switched off: then only wrong results tell);
// - an access to global memory must lie in a registered buffer and be aligned to its size; outputs are written once;
// - lanes that wait for different things are an error, and so is a fragment for tf32 that was not rounded to it.
// Barriers, waits and predicates are known by their line in the source, and each can be taken out for a run.
#pragma once

#include "fiber.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <compare>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

using Where = std::source_location;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { kReady, kAtBarrier, kAtCollective, kDone };
// A wait may be taken out, or be content with one group less.
enum class Site { kBarrier, kWait, kPredicate, kWaitByOne };

// The file of a place without its folders.
inline std::string file_of(const char* path) {
  const std::string file = path;
  return file.substr(file.rfind('/') + 1);
}

// A barrier, wait or predicate in the source.
struct Place {
  Site site;
  std::uint32_t line;
  const char* file;

  auto operator<=>(const Place&) const = default;
};

constexpr int kEverybody = -3; // in place of a thread's number: a warp reads together

struct Copy {
  unsigned char* to;
  const void* from; // null: zeros
  int bytes;
};

struct Thread {
  Fiber fiber{256 << 10};
  State state = State::kReady;
  std::uint32_t line = 0; // of what it waits at
  std::vector<std::vector<Copy>> groups;
};

// What a lane puts down at a collective, and takes away.
struct Slot {
  std::uint32_t in[8];
  float sums[4];
  std::uint32_t out[4];
  const unsigned char* row;
  int lane;
};

struct Warp {
  Slot slots[32];
  int arrived = 0;
  const char* what = nullptr;
  std::uint32_t line = 0;
};

struct Buffer {
  std::size_t bytes;
  std::vector<unsigned char> written; // empty: read only
};

// Who touched a pair of bytes of shared memory, and in which stretch between barriers.
struct Touched {
  std::uint32_t written_in = 0, read_in = 0;
  int writer = -1, reader = -1; // reader -2: several
  bool in_flight = false;
};

class Machine {
public:
  // --- Set up by the tests ---
  std::uint64_t seed = 0;
  bool detect_races = true;
  std::set<std::pair<Site, std::string>> taken_out; // as "file:line"
  std::map<Place, std::uint64_t> seen;              // and how often they were passed
  std::uint64_t conflicts = 0; // rows of ldmatrix that share banks with another row of the same matrix

  void add_buffer(const void* data, std::size_t bytes, bool output) {
    buffers_[static_cast<const unsigned char*>(data)] = {bytes, std::vector<unsigned char>(output ? bytes : 0)};
  }
  void clear_buffers() {
    buffers_.clear();
  }
  // Every byte of an output was written. Only then may the next launch read it, and nobody write it again.
  bool complete(const void* data) const {
    const auto& written = buffers_.at(static_cast<const unsigned char*>(data)).written;
    for (const unsigned char byte : written) {
      if (byte == 0) {
        return false;
      }
    }
    return true;
  }

  void run(std::int64_t grid_x, std::int64_t grid_y, int threads, int shared_bytes, std::function<void()> body) {
    if (grid_x < 1 || grid_y < 1 || grid_x > INT32_MAX || grid_y > 65535 || threads < 1 || threads > 1024 ||
        threads % 32 != 0 || shared_bytes > 48 * 1024) {
      throw Error("launch refused: grid or block out of range, or shared memory beyond 48 KiB");
    }
    random_.seed(seed);
    body_ = std::move(body);
    shared_bytes_ = shared_bytes;
    std::vector<std::int64_t> blocks(grid_x * grid_y);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      blocks[i] = static_cast<std::int64_t>(i);
    }
    std::shuffle(blocks.begin(), blocks.end(), random_);
    for (const std::int64_t block : blocks) {
      block_x = static_cast<std::uint32_t>(block % grid_x);
      block_y = static_cast<std::uint32_t>(block / grid_x);
      run_block(threads);
    }
  }

  // --- Used by the primitives ---
  std::uint32_t block_x = 0, block_y = 0;

  int thread() const {
    return now_;
  }
  unsigned char* shared() {
    return shared_.data();
  }

  bool passes(Site site, const Where& where) {
    ++seen[{site, where.line(), where.file_name()}];
    return taken_out.empty() ||
        !taken_out.contains({site, file_of(where.file_name()) + ":" + std::to_string(where.line())});
  }

  void barrier(const Where& where) {
    if (passes(Site::kBarrier, where)) {
      wait(State::kAtBarrier, where.line());
    }
  }

  // Everybody's slot is filled; the last lane to come calls `together` for all 32.
  template <typename F>
  Slot& collective(const char* what, const Where& where, const Slot& mine, const F& together) {
    Warp& warp = warps_[now_ / 32];
    Slot& slot = warp.slots[now_ % 32];
    if (warp.arrived > 0 && (warp.what != what || warp.line != where.line())) {
      fail("lanes of a warp do different things together: " + std::string(what) + " and " + warp.what, where);
    }
    slot = mine;
    slot.lane = now_ % 32;
    warp.what = what;
    warp.line = where.line();
    if (++warp.arrived < 32) {
      wait(State::kAtCollective, where.line());
    } else {
      together(warp);
      warp.arrived = 0;
      for (int t = now_ / 32 * 32; t < now_ / 32 * 32 + 32; ++t) {
        threads_[t]->state = State::kReady;
      }
    }
    return slot;
  }

  void read_shared(const void* from, int bytes, int thread, const Where& where) {
    const std::size_t at = shared_place(from, bytes, where);
    if (!detect_races) {
      return;
    }
    for (std::size_t unit = at / 2; unit < (at + bytes + 1) / 2; ++unit) {
      Touched& t = touched_[unit];
      if (t.in_flight) {
        fail("shared memory is read while a copy into it is under way", where);
      }
      if (t.written_in == stretch_ && t.writer != thread) {
        fail("race: shared memory is read without a barrier after another thread wrote it", where);
      }
      t.reader = t.read_in == stretch_ && t.reader != thread ? -2 : thread;
      t.read_in = stretch_;
    }
  }

  void write_shared(const void* to, int bytes, int thread, const Where& where, bool flight = false) {
    const std::size_t at = shared_place(to, bytes, where);
    if (!detect_races) {
      return;
    }
    for (std::size_t unit = at / 2; unit < (at + bytes + 1) / 2; ++unit) {
      Touched& t = touched_[unit];
      if (t.in_flight && !flight) {
        fail("shared memory is written while a copy into it is under way", where);
      }
      if (t.written_in == stretch_ && t.writer != thread) {
        fail("race: two threads write the same shared memory without a barrier between them", where);
      }
      if (t.read_in == stretch_ && t.reader != thread) {
        fail("race: shared memory is written without a barrier after another thread read it", where);
      }
      t.written_in = stretch_;
      t.writer = thread;
    }
  }

  const void* check_read(const void* from, int bytes, const Where& where) {
    find(from, bytes, where);
    return from;
  }

  void check_write(const void* to, int bytes, const Where& where) {
    auto& [begin, buffer] = *find(to, bytes, where);
    if (buffer.written.empty()) {
      fail("an input is written", where);
    }
    const std::size_t at = static_cast<const unsigned char*>(to) - begin;
    for (int i = 0; i < bytes; ++i) {
      if (buffer.written[at + i]++ != 0) {
        fail("an output is written twice", where);
      }
    }
  }

  void issue(void* to, const void* from, int bytes, const Where& where) {
    if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0) {
      fail("an asynchronous copy to a misaligned place", where);
    }
    write_shared(to, bytes, now_, where);
    poison(to, bytes);
    flight(to, bytes, true);
    threads_[now_]->groups.back().push_back({static_cast<unsigned char*>(to), from, bytes});
  }

  void commit() {
    threads_[now_]->groups.emplace_back();
  }

  void wait_copies(int pending, const Where& where) {
    if (!passes(Site::kWait, where)) {
      return;
    }
    pending += passes(Site::kWaitByOne, where) ? 0 : 1;
    auto& groups = threads_[now_]->groups;
    while (static_cast<int>(groups.size()) > pending + 1) {
      for (const Copy& copy : groups.front()) {
        flight(copy.to, copy.bytes, false);
        write_shared(copy.to, copy.bytes, now_, where);
        if (copy.from != nullptr) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          std::memset(copy.to, 0, copy.bytes);
        }
      }
      groups.erase(groups.begin());
    }
  }

  [[noreturn]] void fail(const std::string& what, const Where& where) const {
    throw Error(
        what + " (" + file_of(where.file_name()) + ":" + std::to_string(where.line()) + ", block " +
        std::to_string(block_x) + " " + std::to_string(block_y) + ", thread " + std::to_string(now_) + ", seed " +
        std::to_string(seed) + ")");
  }

private:
  static void poison(void* to, std::size_t bytes) {
    std::memset(to, 0xff, bytes); // NaN in bf16, fp16 and float32
  }

  void flight(void* to, int bytes, bool yes) {
    const std::size_t at = static_cast<unsigned char*>(to) - shared_.data();
    for (std::size_t unit = at / 2; unit < (at + bytes) / 2; ++unit) {
      touched_[unit].in_flight = yes;
    }
  }

  std::size_t shared_place(const void* pointer, int bytes, const Where& where) const {
    const auto at = static_cast<const unsigned char*>(pointer) - shared_.data();
    if (at < 0 || at + bytes > shared_bytes_) {
      fail("outside of shared memory", where);
    }
    if (at % bytes != 0) {
      fail("misaligned in shared memory", where);
    }
    return at;
  }

  std::map<const unsigned char*, Buffer>::iterator find(const void* pointer, int bytes, const Where& where) {
    const auto* p = static_cast<const unsigned char*>(pointer);
    auto found = buffers_.upper_bound(p);
    if (found == buffers_.begin() || p + bytes > (--found)->first + found->second.bytes) {
      fail("outside of every global buffer", where);
    }
    if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
      fail("misaligned in global memory", where);
    }
    return found;
  }

  void wait(State state, std::uint32_t line) {
    Thread& me = *threads_[now_];
    me.state = state;
    me.line = line;
    me.fiber.switch_to(scheduler_);
  }

  static void enter();

  void run_block(int count) {
    while (static_cast<int>(threads_.size()) < count) {
      threads_.push_back(std::make_unique<Thread>());
    }
    warps_.assign(count / 32, {});
    // Aligned as the device's is; allocated again for each block, so that AddressSanitizer sees what lies beyond.
    shared_.assign(shared_bytes_, 0xff);
    touched_.assign(shared_bytes_ / 2 + 1, {});
    stretch_ = 1;
    for (int t = 0; t < count; ++t) {
      threads_[t]->state = State::kReady;
      threads_[t]->groups.assign(1, {});
      threads_[t]->fiber.start(enter);
    }
    error_ = nullptr;
    std::vector<int> runnable;
    for (;;) {
      runnable.clear();
      for (int w = 0; w < count / 32; ++w) {
        for (int t = w * 32; t < w * 32 + 32; ++t) {
          if (threads_[t]->state == State::kReady) {
            runnable.push_back(w);
            break;
          }
        }
      }
      if (runnable.empty()) {
        if (!release_barrier(count)) {
          break;
        }
        continue;
      }
      run_warp(runnable[random_() % runnable.size()]);
      if (error_ != nullptr) {
        std::rethrow_exception(error_);
      }
    }
    for (int t = 0; t < count; ++t) {
      for (const auto& group : threads_[t]->groups) {
        if (!group.empty()) {
          fail("a thread left with copies under way", Where::current());
        }
      }
    }
  }

  void run_warp(int warp) {
    // Lanes forwards or backwards, from any of them on.
    const int first = static_cast<int>(random_() % 32), direction = random_() % 2 == 0 ? 1 : 31;
    for (int i = 0; i < 32 && error_ == nullptr; ++i) {
      const int t = warp * 32 + (first + i * direction) % 32;
      if (threads_[t]->state == State::kReady) {
        now_ = t;
        scheduler_.switch_to(threads_[t]->fiber);
      }
    }
  }

  // True where everybody stands at the same barrier and goes on; false where everybody is done.
  bool release_barrier(int count) {
    int at_barrier = 0, done = 0;
    for (int t = 0; t < count; ++t) {
      at_barrier += threads_[t]->state == State::kAtBarrier;
      done += threads_[t]->state == State::kDone;
    }
    if (done == count) {
      return false;
    }
    now_ = 0;
    if (at_barrier != count) {
      fail(
          "deadlock: some threads wait at a barrier or for their warp, others left or wait elsewhere",
          Where::current());
    }
    for (int t = 0; t < count; ++t) {
      if (threads_[t]->line != threads_[0]->line) {
        fail("threads of a block wait at different barriers", Where::current());
      }
      threads_[t]->state = State::kReady;
    }
    ++stretch_;
    return true;
  }

  struct alignas(128) Line {
    unsigned char bytes[128];
  };
  // Bytes that start where the device's shared memory may.
  class Shared {
  public:
    void assign(std::size_t bytes, int value) {
      lines_.reset(new Line[(bytes + sizeof(Line) - 1) / sizeof(Line)]);
      std::memset(static_cast<void*>(lines_.get()), value, (bytes + sizeof(Line) - 1) / sizeof(Line) * sizeof(Line));
    }
    unsigned char* data() const {
      return reinterpret_cast<unsigned char*>(lines_.get());
    }

  private:
    std::unique_ptr<Line[]> lines_;
  };

  std::mt19937_64 random_;
  std::function<void()> body_;
  std::map<const unsigned char*, Buffer> buffers_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  Shared shared_;
  std::int64_t shared_bytes_ = 0;
  std::vector<Touched> touched_;
  std::uint32_t stretch_ = 1;
  Fiber scheduler_;
  int now_ = 0;
  std::exception_ptr error_;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void Machine::enter() {
  Machine& m = machine();
  Fiber::arrived(m.scheduler_);
  try {
    m.body_();
  } catch (...) {
    m.error_ = std::current_exception();
  }
  m.threads_[m.now_]->state = State::kDone;
  m.threads_[m.now_]->fiber.switch_to(m.scheduler_);
  std::abort(); // a fiber that is done is never resumed
}

} // namespace emulator

// --- The primitives --------------------------------------------------------------------------------------------------

namespace fastres {

using emulator::machine;
using emulator::Site;
using emulator::Slot;
using emulator::Where;

inline int thread_index() {
  return machine().thread();
}
inline std::uint32_t block_index_x() {
  return machine().block_x;
}
inline std::uint32_t block_index_y() {
  return machine().block_y;
}
inline unsigned char* shared_memory() {
  return machine().shared();
}

inline void barrier(const Where& where = Where::current()) {
  machine().barrier(where);
}

inline std::uint32_t shuffle(std::uint32_t value, int from, const Where& where) {
  Slot mine{};
  mine.in[0] = value;
  mine.in[1] = static_cast<std::uint32_t>(from);
  return machine()
      .collective(
          "shuffle",
          where,
          mine,
          [](emulator::Warp& warp) {
            for (Slot& slot : warp.slots) {
              slot.out[0] = warp.slots[slot.in[1] & 31].in[0];
            }
          })
      .out[0];
}

inline float shuffle_xor(float value, int mask, const Where& where = Where::current()) {
  return std::bit_cast<float>(shuffle(std::bit_cast<std::uint32_t>(value), machine().thread() % 32 ^ mask, where));
}
inline std::uint32_t shuffle_from(std::uint32_t value, int lane, const Where& where = Where::current()) {
  return shuffle(value, lane, where);
}

template <typename V>
V load_shared(const void* from, const Where& where = Where::current()) {
  machine().read_shared(from, sizeof(V), machine().thread(), where);
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
void store_shared(void* to, V value, const Where& where = Where::current()) {
  machine().write_shared(to, sizeof(V), machine().thread(), where);
  std::memcpy(to, &value, sizeof(V));
}

template <typename V>
V load_global(const V* from, bool valid, const Where& where = Where::current()) {
  if (!valid && machine().passes(Site::kPredicate, where)) {
    return V{};
  }
  V value;
  std::memcpy(&value, machine().check_read(from, sizeof(V), where), sizeof(V));
  return value;
}

template <typename V>
void store_global(V* to, V value, bool valid, const Where& where = Where::current()) {
  if (!valid && machine().passes(Site::kPredicate, where)) {
    return;
  }
  machine().check_write(to, sizeof(V), where);
  std::memcpy(to, &value, sizeof(V));
}

template <int kBytes>
void copy_async(void* to, const void* from, bool valid, const Where& where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const bool read = valid || !machine().passes(Site::kPredicate, where);
  machine().issue(to, read ? machine().check_read(from, kBytes, where) : nullptr, kBytes, where);
}

inline void copy_commit() {
  machine().commit();
}

template <int kPending>
void copy_wait(const Where& where = Where::current()) {
  machine().wait_copies(kPending, where);
}

inline std::uint32_t float_bits(float v) {
  return std::bit_cast<std::uint32_t>(v);
}
inline float bits_float(std::uint32_t v) {
  return std::bit_cast<float>(v);
}

inline float to_float(float v) {
  return v;
}
inline float to_float(bf16 v) {
  return bits_float(static_cast<std::uint32_t>(v.bits) << 16);
}
inline float to_float(f16 v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float sign = v.bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return fraction != 0 ? NAN : sign * INFINITY;
  }
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

template <typename T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const std::uint32_t bits = float_bits(v);
  if (v != v) {
    return {0x7fff};
  }
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float v) {
  const std::uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (v != v) {
    return {0x7fff};
  }
  int exponent = 0;
  const double magnitude = std::fabs(static_cast<double>(v));
  std::frexp(magnitude, &exponent);
  // Units of the last place: 2^-24 at least, and 11 bits below the leading one.
  const int unit = std::max(exponent - 11, -24);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -unit)), unit);
  if (rounded > 65504) {
    return {static_cast<std::uint16_t>(sign | 0x7c00)};
  }
  if (rounded < std::ldexp(1.0, -14)) {
    return {static_cast<std::uint16_t>(sign | static_cast<int>(std::ldexp(rounded, 24)))};
  }
  std::frexp(rounded, &exponent);
  const int fraction = static_cast<int>(std::ldexp(rounded, 11 - exponent)) - 1024;
  return {static_cast<std::uint16_t>(sign | (exponent + 14) << 10 | fraction)};
}

inline std::uint32_t round_to_tf32(std::uint32_t v) {
  return (v + 0x1000u) & ~0x1fffu;
}

// One 16-bit element of row r of matrix m, as the addresses of the lanes say.
inline std::uint16_t matrix_element(const emulator::Warp& warp, int m, int r, int c) {
  std::uint16_t value;
  std::memcpy(&value, warp.slots[m * 8 + r].row + c * 2, 2);
  return value;
}

inline void load_matrices_any(std::uint32_t (&r)[4], const void* row, bool transposed, const Where& where) {
  Slot mine{};
  mine.row = static_cast<const unsigned char*>(row);
  // All lanes get something of the row, not only the one that gives its address: nobody may have written it just now.
  machine().read_shared(row, 16, emulator::kEverybody, where);
  const Slot& slot =
      machine().collective(transposed ? "ldmatrix.trans" : "ldmatrix", where, mine, [transposed](emulator::Warp& warp) {
        // A row is 16 of the 128 bytes that the banks give at a time; the eight of a matrix should cover them all.
        for (int m = 0; m < 4; ++m) {
          unsigned banks = 0;
          for (int r = 0; r < 8; ++r) {
            banks |= 1u << reinterpret_cast<std::uintptr_t>(warp.slots[m * 8 + r].row) / 16 % 8;
          }
          machine().conflicts += 8 - std::popcount(banks);
        }
        for (Slot& slot : warp.slots) {
          const int row = slot.lane / 4, column = slot.lane % 4 * 2;
          for (int m = 0; m < 4; ++m) {
            const auto at = [&](int c) {
              return transposed ? matrix_element(warp, m, c, row) : matrix_element(warp, m, row, c);
            };
            slot.out[m] = at(column) | static_cast<std::uint32_t>(at(column + 1)) << 16;
          }
        }
      });
  std::memcpy(r, slot.out, sizeof(r));
}

inline void load_matrices(std::uint32_t (&r)[4], const void* row, const Where& where = Where::current()) {
  load_matrices_any(r, row, false, where);
}
inline void load_matrices_transposed(std::uint32_t (&r)[4], const void* row, const Where& where = Where::current()) {
  load_matrices_any(r, row, true, where);
}

// The fragments of the PTX ISA for mma.m16n8k16 (16 bits) and m16n8k8 (tf32): register i of a belongs to rows
// lane / 4 + 8 * (i % 2) and the half i / 2 of K; register i of b to column lane / 4 and the half i of K; element e of
// the result to row lane / 4 + 8 * (e / 2), column 2 * (lane % 4) + e % 2.
template <typename Format>
void mma(
    float (&d)[4],
    const std::uint32_t (&a)[4],
    std::uint32_t b0,
    std::uint32_t b1,
    const Where& where = Where::current()) {
  constexpr int kDepth = std::is_same_v<Format, tf32> ? 8 : 16;
  constexpr int kPack = kDepth / 8; // elements in a register
  Slot mine{};
  std::memcpy(mine.in, a, sizeof(a));
  mine.in[4] = b0;
  mine.in[5] = b1;
  std::memcpy(mine.sums, d, sizeof(d));
  const Slot& slot = machine().collective("mma", where, mine, [&](emulator::Warp& warp) {
    const auto element = [&](std::uint32_t bits, int part) {
      if constexpr (std::is_same_v<Format, tf32>) {
        if ((bits & 0x1fff) != 0 && (bits & 0x7f800000) != 0x7f800000) {
          machine().fail("an operand of mma was not rounded to tf32", where);
        }
        return bits_float(bits);
      } else {
        return to_float(Format{static_cast<std::uint16_t>(bits >> (16 * part))});
      }
    };
    float left[16][kDepth], right[8][kDepth];
    for (const Slot& slot : warp.slots) {
      const int row = slot.lane / 4, k = slot.lane % 4 * kPack;
      for (int part = 0; part < kPack; ++part) {
        for (int i = 0; i < 4; ++i) {
          left[row + i % 2 * 8][k + i / 2 * kDepth / 2 + part] = element(slot.in[i], part);
        }
        for (int i = 0; i < 2; ++i) {
          right[row][k + i * kDepth / 2 + part] = element(slot.in[4 + i], part);
        }
      }
    }
    for (Slot& slot : warp.slots) {
      for (int e = 0; e < 4; ++e) {
        const int row = slot.lane / 4 + e / 2 * 8, column = slot.lane % 4 * 2 + e % 2;
        float sum = slot.sums[e];
        for (int k = 0; k < kDepth; ++k) {
          sum += left[row][k] * right[column][k];
        }
        slot.sums[e] = sum;
      }
    }
  });
  std::memcpy(d, slot.sums, sizeof(d));
}

} // namespace fastres
