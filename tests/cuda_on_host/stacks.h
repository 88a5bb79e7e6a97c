// Several stacks in one thread of the host, and going from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
// In place of swapcontext, which calls the system for each stack's signals: half of the time that the
// kernels took on the host.
extern "C" void cuda_on_host_go(void** from, void* to);
asm(R"(
  .text
  .weak cuda_on_host_go
  .hidden cuda_on_host_go
  .type cuda_on_host_go, @function
cuda_on_host_go:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_on_host_go, . - cuda_on_host_go
)");
#else
#include <ucontext.h>
#endif

namespace cuda_on_host {

#if defined(__x86_64__)

// Where a stack was left: the registers that a call keeps lie there, and above them where to go on.
using Place = void*;

// The begin of `function`, which never returns, on a stack of its own.
inline void begin(Place& place, char* stack, size_t size, void (*function)()) {
  auto top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15));
  *--top = nullptr;  // where it would return to; the stack is now as after a call
  *--top = reinterpret_cast<void*>(function);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  place = top;
}
inline void go(Place& from, Place& to) {
  cuda_on_host_go(&from, to);
}

#else

using Place = ucontext_t;

inline void begin(Place& place, char* stack, size_t size, void (*function)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = size;
  place.uc_link = nullptr;
  makecontext(&place, function, 0);
}
inline void go(Place& from, Place& to) {
  swapcontext(&from, &to);
}

#endif

}  // namespace cuda_on_host
