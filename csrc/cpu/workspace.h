// Uninitialised memory for intermediate results.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <new>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace fastres {
inline namespace CPU_CAPABILITY {
namespace conv {

// Memory that a thread keeps between calls: where a convolution is small, page faults would cost more than its
// arithmetic. At most kPoolBytes a thread; the blocks used longest ago are freed first, and a larger one at once.
class WorkspacePool {
public:
  struct Block {
    float* data = nullptr;
    int64_t bytes = 0;
  };

  static WorkspacePool& of_thread() {
    static thread_local WorkspacePool pool;
    return pool;
  }
  ~WorkspacePool() {
    while (count_ > 0) {
      free_oldest();
    }
  }

  // The smallest one that is large enough, or a new one.
  Block take(int64_t bytes) {
    int best = -1;
    for (int i = 0; i < count_; ++i) {
      if (blocks_[i].bytes >= bytes && (best < 0 || blocks_[i].bytes < blocks_[best].bytes)) {
        best = i;
      }
    }
    return best < 0 ? Block{static_cast<float*>(::operator new(bytes, kAlignment)), bytes} : remove(best);
  }
  void give(Block block) noexcept {
    if (block.bytes > kPoolBytes) {
      ::operator delete(block.data, kAlignment);
      return;
    }
    while (count_ == kBlocks || bytes_ + block.bytes > kPoolBytes) {
      free_oldest();
    }
    blocks_[count_++] = block;
    bytes_ += block.bytes;
  }

private:
  static constexpr std::align_val_t kAlignment{64}; // a cache line
  static constexpr int64_t kPoolBytes = 16 * 1024 * 1024;
  // More than a thread ever holds at a time, so that a sequence of layers finds its own again.
  static constexpr int kBlocks = 16;

  Block remove(int i) noexcept {
    const Block block = blocks_[i];
    std::copy(blocks_.begin() + i + 1, blocks_.begin() + count_, blocks_.begin() + i);
    --count_;
    bytes_ -= block.bytes;
    return block;
  }
  void free_oldest() noexcept {
    ::operator delete(remove(0).data, kAlignment);
  }

  std::array<Block, kBlocks> blocks_; // the one given back last is the last
  int count_ = 0;
  int64_t bytes_ = 0;
};

// Uninitialised floats, aligned to a cache line. Made and destroyed by one thread.
class Workspace {
public:
  explicit Workspace(int64_t size)
      : block_(WorkspacePool::of_thread().take(std::max<int64_t>(1, size) * static_cast<int64_t>(sizeof(float)))) {}
  ~Workspace() {
    WorkspacePool::of_thread().give(block_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() const {
    return block_.data;
  }
  // As elements of another type, of which none is larger than a float.
  template <typename T>
  T* as() const {
    static_assert(sizeof(T) <= sizeof(float));
    return reinterpret_cast<T*>(block_.data);
  }

private:
  WorkspacePool::Block block_;
};

} // namespace conv
} // namespace CPU_CAPABILITY
} // namespace fastres

#endif
