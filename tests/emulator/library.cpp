// The emulator as a shared library for ctypes: the kernels of csrc/cuda as their launcher launches them, and small
// kernels that show what the emulator itself does. Every function returns null, or what went wrong.
#include "projection_shortcut.cuh"

#include <sstream>

using emulator::machine;
using namespace fastres;
using namespace fastres::shortcut;

namespace {

std::string last_words;

template <typename F>
const char* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    last_words = e.what();
    return last_words.c_str();
  }
}

// Where the CUDA launcher puts a kernel into a stream, this one runs it. It writes down what it was asked for.
struct Launcher {
  std::vector<Configuration>* launched;

  template <typename P>
  void operator()(const Configuration& c, void (*kernel)(P), const std::type_identity_t<P>& params) const {
    if (launched != nullptr) {
      launched->push_back(c);
    }
    machine().run(c.grid_x, c.grid_y, c.threads, c.shared_bytes, [&] { kernel(params); });
  }
};

template <typename F>
void with_arithmetic(Arithmetic arithmetic, const F& f) {
  switch (arithmetic) {
    case Arithmetic::kBFloat16:
      return f(BFloat16{});
    case Arithmetic::kHalf:
      return f(Half{});
    case Arithmetic::kTf32:
      return f(Tf32{});
    case Arithmetic::kFloat:
      return f(Float{});
  }
}

// --- Kernels that test the emulator --------------------------------------------------------------------------------

enum class Fault {
  kNone,
  kRace,
  kDeadlock,
  kDivergentBarrier,
  kBeyondShared,
  kBeyondGlobal,
  kMisaligned,
  kWrittenTwice,
  kInputWritten,
  kUnrounded,
  kLeftWithCopies,
};

// y[i] = x[i ^ 32] through shared memory, two warps.
void exchange(const float* x, float* y, Fault fault) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_index();
  copy_async<4>(shared + t, x + t, true);
  copy_commit();
  if (fault != Fault::kLeftWithCopies) {
    copy_wait<0>();
  }
  if (fault == Fault::kDeadlock && t == 5) {
    return;
  }
  if (fault == Fault::kDivergentBarrier && t < 32) {
    barrier();
  } else if (fault != Fault::kRace) {
    barrier();
  }
  if (fault == Fault::kUnrounded) {
    float d[4] = {};
    const std::uint32_t a[4] = {1, 0, 0, 0};
    mma<tf32>(d, a, 0, 0);
  }
  const float v = fault == Fault::kLeftWithCopies ? 0 : load_shared<float>(shared + (t ^ 32));
  if (fault == Fault::kBeyondShared) {
    store_shared(shared + 64 + t, v);
  }
  if (fault == Fault::kMisaligned) {
    load_global(reinterpret_cast<const Bytes16*>(x + 1), true);
  }
  store_global(fault == Fault::kInputWritten ? const_cast<float*>(x) + t : y + t, v, true);
  if (fault == Fault::kBeyondGlobal) {
    store_global(y + (1 << 28) + t, v, true); // far from the other buffer as well
  }
  if (fault == Fault::kWrittenTwice && t == 7) {
    store_global(y + t, v, true);
  }
}

template <int kBytes, typename V>
void copy_kernel(const V* x, V* y, int count) {
  auto* shared = reinterpret_cast<V*>(shared_memory());
  const int t = thread_index();
  copy_async<kBytes>(shared + t, x + t, t < count);
  copy_commit();
  copy_wait<0>();
  barrier();
  store_global(y + 31 - t, load_shared<V>(shared + 31 - t), true);
}

} // namespace

extern "C" {

void emulator_start(std::uint64_t seed, int detect_races) {
  machine().seed = seed;
  machine().detect_races = detect_races != 0;
  machine().taken_out.clear();
  machine().seen.clear();
  machine().conflicts = 0;
  machine().clear_buffers();
}

// `place`: "file:line".
void emulator_take_out(int site, const char* place) {
  machine().taken_out.insert({static_cast<emulator::Site>(site), place});
}

void emulator_buffer(const void* data, std::int64_t bytes, int output) {
  machine().add_buffer(data, bytes, output != 0);
}

int emulator_complete(const void* data) {
  return machine().complete(data);
}

std::uint64_t emulator_conflicts() {
  return machine().conflicts;
}

// "site file:line passes" a line.
const char* emulator_sites() {
  std::ostringstream text;
  for (const auto& [place, passes] : machine().seen) {
    text << static_cast<int>(place.site) << ' ' << emulator::file_of(place.file) << ':' << place.line << ' ' << passes
         << '\n';
  }
  last_words = text.str();
  return last_words.c_str();
}

void shortcut_plan(int step, int arithmetic, const Problem* problem, int aligned, int statistics, Plan* plan) {
  *plan =
      plan_of(static_cast<Step>(step), static_cast<Arithmetic>(arithmetic), *problem, aligned != 0, statistics != 0);
}

int shortcut_aligned(int step, const Pointers* pointers) {
  return aligned_for(static_cast<Step>(step), *pointers);
}

const char* shortcut_run(int step, int arithmetic, const Problem* problem, const Pointers* pointers) {
  return guarded([&] {
    const auto s = static_cast<Step>(step);
    const auto a = static_cast<Arithmetic>(arithmetic);
    const Plan plan = plan_of(s, a, *problem, aligned_for(s, *pointers), pointers->mean != nullptr);
    with_arithmetic(a, [&](auto math) { run<decltype(math)>(s, plan, *problem, *pointers, Launcher{nullptr}); });
  });
}

const char* test_exchange(const float* x, float* y, int fault) {
  return guarded([&] { machine().run(1, 1, 64, 256, [&] { exchange(x, y, static_cast<Fault>(fault)); }); });
}

const char* test_copy(const void* x, void* y, int bytes, int count) {
  return guarded([&] {
    machine().run(1, 1, 32, 512, [&] {
      if (bytes == 4) {
        copy_kernel<4>(static_cast<const float*>(x), static_cast<float*>(y), count);
      } else if (bytes == 8) {
        copy_kernel<8>(static_cast<const Bytes8*>(x), static_cast<Bytes8*>(y), count);
      } else {
        copy_kernel<16>(static_cast<const Bytes16*>(x), static_cast<Bytes16*>(y), count);
      }
    });
  });
}

// a [32][4], b [32][2], d [32][4]: the registers of each lane. `how`: an Arithmetic, or 4 and 5 for bf16 and f16 by
// shuffles.
const char* test_mma(const std::uint32_t* a, const std::uint32_t* b, float* d, int how) {
  return guarded([&] {
    machine().run(1, 1, 32, 0, [&] {
      const int lane = thread_index();
      std::uint32_t mine[4];
      float sum[4];
      std::memcpy(mine, a + lane * 4, sizeof(mine));
      std::memcpy(sum, d + lane * 4, sizeof(sum));
      const std::uint32_t b0 = b[lane * 2], b1 = b[lane * 2 + 1];
      switch (how) {
        case 0:
          mma<bf16>(sum, mine, b0, b1);
          break;
        case 1:
          mma<f16>(sum, mine, b0, b1);
          break;
        case 2:
          mma<tf32>(sum, mine, b0, b1);
          break;
        case 4:
          mma_by_shuffles<bf16>(sum, mine, b0, b1);
          break;
        default:
          mma_by_shuffles<f16>(sum, mine, b0, b1);
      }
      std::memcpy(d + lane * 4, sum, sizeof(sum));
    });
  });
}

// words [4 matrices][8 rows][8 columns] of 16 bits -> registers [32][4].
const char* test_load_matrices(const std::uint16_t* words, std::uint32_t* registers, int transposed) {
  return guarded([&] {
    machine().run(1, 1, 32, 512, [&] {
      const int lane = thread_index();
      unsigned char* row = shared_memory() + lane * 16;
      Bytes16 bytes;
      std::memcpy(&bytes, words + lane * 8, 16);
      store_shared(row, bytes);
      barrier();
      std::uint32_t r[4];
      transposed != 0 ? load_matrices_transposed(r, row) : load_matrices(r, row);
      std::memcpy(registers + lane * 4, r, sizeof(r));
    });
  });
}

void test_convert(const float* from, std::uint16_t* to_bf16, std::uint16_t* to_f16, float* tf32_, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    to_bf16[i] = from_float<bf16>(from[i]).bits;
    to_f16[i] = from_float<f16>(from[i]).bits;
    tf32_[i] = bits_float(round_to_tf32(float_bits(from[i])));
  }
}

void test_widen(const std::uint16_t* bits, float* from_bf16, float* from_f16, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    from_bf16[i] = to_float(bf16{bits[i]});
    from_f16[i] = to_float(f16{bits[i]});
  }
}

void test_divide(std::uint32_t divisor, const std::uint32_t* n, std::uint32_t* quotient, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    quotient[i] = Divisor(divisor).quotient(n[i]);
  }
}

// Where output positions lie in the input (strided) or in the product, in elements.
void test_offsets(const Problem* p, int strided, const std::uint32_t* positions, std::int64_t* to, std::int64_t count) {
  const Lines lines = position_lines(*p, strided != 0 ? p->in_channels : p->out_channels, strided != 0);
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = lines.offset(positions[i]);
  }
}

} // extern "C"
