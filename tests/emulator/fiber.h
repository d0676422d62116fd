// Fibers: a stack of its own for each thread of a block, and the switch between two of them.
//
// A switch saves what the calling convention asks a callee to keep. On x86-64 that is a few instructions; elsewhere
// ucontext does it, with a system call for the signal mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

// EMULATOR_UCONTEXT takes the portable way everywhere.
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASSEMBLY 1
#else
#define EMULATOR_ASSEMBLY 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

namespace emulator {

using Entry = void (*)();

class Fiber {
public:
  // The fiber of whoever calls: it has a stack already.
  Fiber() = default;

  explicit Fiber(std::size_t stack_bytes) : bytes_(stack_bytes), stack_(new unsigned char[stack_bytes]) {}

  // Makes the next switch to it start at `entry`, which must not return.
  void start(Entry entry) {
#if EMULATOR_ASAN
    // Frames that were left behind, by an entry that never returns or by a run that failed, are still marked.
    __asan_unpoison_memory_region(stack_.get(), bytes_);
#endif
#if EMULATOR_ASSEMBLY
    // As if `entry` had been called: the stack is 16 bytes aligned before the return address.
    auto* top = reinterpret_cast<std::uint64_t*>(
        (reinterpret_cast<std::uintptr_t>(stack_.get()) + bytes_) & ~std::uintptr_t{15});
    *--top = 0; // entry's return address: there is none, and an unwinder stops here
    *--top = reinterpret_cast<std::uint64_t>(entry);
    for (int saved = 0; saved < 6; ++saved) {
      *--top = 0;
    }
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Goes on in `to`; returns when somebody switches back.
  void switch_to(Fiber& to) {
#if EMULATOR_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to.bottom(), to.size());
#endif
#if EMULATOR_ASSEMBLY
    emulator_switch(&pointer_, to.pointer_);
#else
    swapcontext(&context_, &to.context_);
#endif
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // To be called first thing in an entry: tells AddressSanitizer of the arrival. `from` is the scheduler's fiber.
  static void arrived([[maybe_unused]] Fiber& from) {
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &from.known_bottom_, &from.known_size_);
#endif
  }

private:
  const void* bottom() const {
#if EMULATOR_ASAN
    return stack_ ? stack_.get() : known_bottom_;
#else
    return stack_.get();
#endif
  }
  std::size_t size() const {
#if EMULATOR_ASAN
    return stack_ ? bytes_ : known_size_;
#else
    return bytes_;
#endif
  }

  std::size_t bytes_ = 0;
  std::unique_ptr<unsigned char[]> stack_;
#if EMULATOR_ASAN
  const void* known_bottom_ = nullptr;
  std::size_t known_size_ = 0;
#endif
#if EMULATOR_ASSEMBLY
  static void emulator_switch(void** save, void* load) asm("fastres_emulator_switch");
  void* pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
};

} // namespace emulator

#if EMULATOR_ASSEMBLY
// Saves the callee-saved registers on this stack, changes stacks, takes those saved there and returns there.
asm(R"(
.text
.type fastres_emulator_switch, @function
fastres_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastres_emulator_switch, .-fastres_emulator_switch
)");
#endif
