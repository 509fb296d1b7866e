// The instructions of the tensor cores and the copies that feed them; each has one function.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and
// "... mma.m8n8k4 with .f64"), g = lane / 4, t = lane % 4:
//   A 16x16 float16: word w holds row g + 8 (w % 2), columns 2t + 8 (w / 2) and the next
//   B 16x8 float16:  word w holds rows 2t + 8 w and the next, column g
//   C 16x8 float32:  entry e is row g + 8 (e / 2), column 2t + e % 2
//   A 8x4 float64:   row g, column t;  B 4x8: row t, column g;  C 8x8: row g, columns 2t, 2t + 1
// The instructions are those of sm_80, which every later device runs; sm_90's wgmma is not used.
#pragma once

#include "cuda/device.cuh"

namespace realign_fast {

// c += A B with float16 operands and float32 sums, which the hardware truncates.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += A B in float64.
__device__ __forceinline__ void multiply_add(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// Loads four 8x8 matrices from shared memory. Lane 8 m + r gives the address of the 16 bytes of row
// r of matrix m. Word m of a lane is row g, columns 2t and 2t + 1 of matrix m, or of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const Half* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 16 bytes from global to shared memory, past the registers and L1.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// Copies the first `bytes` of 16, and zeros after them.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kNewest of this thread's groups are in flight.
template <int kNewest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

}  // namespace realign_fast
