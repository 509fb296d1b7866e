// How a CUDA kernel runs: its launch, its stream, and the memory that it works in.
//
// No CUDA header of torch is included: torch's stable ABI provides the stream and the memory. The
// tests link these objects with a CUDA runtime of their own, which runs the PTX on a CPU
// (tests/support/ptx_machine).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"

namespace realign_fast {

// Returns the shared memory of the block, as many bytes as the launch asked for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Hides from the compiler what it has computed from these words. Otherwise it would keep 16-bit
// entries as widened copies, which take twice the registers, from one use to the next.
__device__ __forceinline__ void make_opaque(uint4& words) {
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

inline void check_cuda(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess,
                  "realign_fast: a CUDA call failed: ", cudaGetErrorString(status));
}

// Launches a kernel, unless its grid is empty. More than 48 KiB of shared memory must be requested.
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

// The resources of one call: it makes the device of a tensor current, and holds that device's
// current stream and the memory that torch lends until the call is over. Memory is reused in the
// order of the stream, so this also works under graph capture.
class CallResources {
 public:
  explicit CallResources(const Tensor& rows) : rows_(rows), guard_(rows.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(rows.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Returns uninitialised memory for `count` values, aligned to 16 bytes.
  template <class V>
  V* allocate(int64_t count) {
    const int64_t bytes = std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(V));
    memory_.push_back(torch::stable::new_empty(rows_, {bytes}, ScalarType::Byte));
    return static_cast<V*>(memory_.back().mutable_data_ptr());
  }

 private:
  Tensor rows_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> memory_;
};

// The packed rows of a chunk, which are in memory at a time. The larger, the less the launches and
// the last wave of blocks cost. No result depends on it, and the tests make it small.
constexpr int64_t kChunkBytes = int64_t(96) << 20;

inline int64_t chunk_bytes() {
  const char* kibibytes = std::getenv("REALIGN_FAST_CUDA_CHUNK_KIB");
  return kibibytes ? std::atoll(kibibytes) << 10 : kChunkBytes;
}

// Returns the rows of a chunk, a multiple of `multiple`: the last one is about as long as others.
inline int64_t rows_of_a_chunk(int64_t count, int64_t row_bytes, int64_t multiple) {
  const int64_t most = std::max<int64_t>(1, chunk_bytes() / (row_bytes * multiple)) * multiple;
  return round_up(divide_up(count, divide_up(count, most)), multiple);
}

// The blocks of a persistent grid: enough to fill the device, and no more than there is work.
inline unsigned persistent_blocks(int64_t work, int blocks_per_multiprocessor) {
  const int64_t most = int64_t(multiprocessors()) * blocks_per_multiprocessor;
  return static_cast<unsigned>(std::min(work, most));
}

}  // namespace realign_fast

// Registers the kernels of a file with the dispatcher.
#define REALIGN_REGISTER(library) STABLE_TORCH_LIBRARY_IMPL(realign_fast, CUDA, library)
