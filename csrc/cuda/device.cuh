// What every kernel needs of the device: how one is launched, its stream, memory to work in.
//
// No CUDA header of torch is included: torch's stable ABI gives the stream and the memory. Under
// REALIGN_EMULATION the same sources compile with g++ for the CPU, where tests/cuda_emulation runs
// them thread by thread.
#pragma once

#ifdef REALIGN_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checks.h"

namespace realign_fast {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#ifdef REALIGN_EMULATION

// The shared memory of the block, `bytes` of the launch.
inline unsigned char* shared_memory() { return emulation::machine.shared.data(); }

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t,
            Args... args) {
  if (grid.x == 0 || grid.y == 0) return;
  emulation::run_grid(grid, threads, shared, [=] { kernel(static_cast<Params>(args)...); });
}

inline int multiprocessors() { return emulation::multiprocessors; }
inline void make_opaque(uint4&) {}

#else

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// The compiler may no longer know what it has computed from these words: it would keep 16-bit
// entries as widened copies, in twice the registers, from one use to the next.
__device__ __forceinline__ void make_opaque(uint4& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

inline void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "realign_fast: CUDA says ", cudaGetErrorString(status));
}

// An empty grid is no launch. From 48 KiB on shared memory has to be asked for.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
            Args... args) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > 48 << 10)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared)));
  kernel<<<grid, threads, shared, stream>>>(static_cast<Params>(args)...);
  check_cuda(cudaGetLastError());
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

#endif

// One call's place: the device of a tensor made current, its current stream, and memory that torch
// lends until the call is over (in the order of the stream, so under graph capture too).
class Work {
 public:
#ifdef REALIGN_EMULATION
  explicit Work(const Tensor& rows) : rows_(rows) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit Work(const Tensor& rows) : rows_(rows), guard_(rows.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(rows.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
#endif

  // Uninitialised memory for `count` values, on a 16-byte line.
  template <class V>
  V* take(int64_t count) {
    const int64_t bytes = std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(V));
    memory_.push_back(torch::stable::new_empty(rows_, {bytes}, ScalarType::Byte));
    return static_cast<V*>(memory_.back().mutable_data_ptr());
  }

 private:
  Tensor rows_;
#ifndef REALIGN_EMULATION
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
  std::vector<Tensor> memory_;
};

// Blocks of a persistent grid: enough to fill the device, no more than there is work.
inline unsigned persistent_blocks(int64_t work, int blocks_per_multiprocessor) {
  const int64_t most = int64_t(multiprocessors()) * blocks_per_multiprocessor;
  return static_cast<unsigned>(std::min(work, most));
}

// Calls `body` with a value of the tensor's element type.
template <class Body>
void dispatch_rows(const char* op, const Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return body(Half());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    default: STD_TORCH_CHECK(false, op, ": expected rows of float16, bfloat16, float32 or float64");
  }
}

}  // namespace realign_fast

// Which dispatcher key a file registers its kernels under.
#ifdef REALIGN_EMULATION
#define REALIGN_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(realign_emulated, CPU, m)
#else
#define REALIGN_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(realign_fast, CUDA, m)
#endif
