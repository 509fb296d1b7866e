// What the compiled host code of csrc/cuda calls: a CUDA runtime whose device is the machine, and
// the few functions of torch that must know that this device is the CPU.
//
// The objects are linked with this file in place of libcudart. A fault of the machine becomes a
// CUDA error, which the host code is to report.
#include <algorithm>
#include <cstring>
#include <sstream>
#include <unordered_map>

#include "interpreter.h"
#include "parser.h"

namespace {

struct Dim3 {
  uint32_t x, y, z;
};

struct Launch {
  Dim3 grid, threads;
  size_t shared_bytes;
  void* stream;
};

constexpr int kLaunchFailure = 719;            // cudaErrorLaunchFailure
constexpr int kMultiprocessorCount = 16;       // cudaDevAttrMultiProcessorCount
constexpr int kMaxDynamicSharedMemory = 8;     // cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr size_t kSharedByDefault = 48 << 10;  // bytes of a block, without the attribute
constexpr size_t kSharedAtMost = 99 << 10;     // on any GPU since sm_80
constexpr uint32_t kGridAtMost = 65535;        // along y

struct Device {
  ptx::Machine machine;
  std::map<std::string, std::string> texts;  // of kernels, by name
  std::unordered_map<std::string, ptx::Kernel> kernels;
  std::unordered_map<const void*, std::string> functions;  // host stub to kernel
  std::unordered_map<std::string, size_t> shared_limits;
  int multiprocessors = 3;
  Launch configured{};
  int error = 0;
  std::string message, report;

  ptx::Kernel& kernel(const std::string& name) {
    const auto found = kernels.find(name);
    if (found != kernels.end()) return found->second;
    const auto text = texts.find(name);
    if (text == texts.end()) throw ptx::Fault("no kernel " + name);
    return kernels[name] = ptx::parse_kernel(text->second);
  }

  int fail(const std::string& words) {
    message = words;
    return error = kLaunchFailure;
  }

  void check(const ptx::Kernel& kernel, const Launch& launch) {
    const auto [x, y, z] = launch.threads;
    if (y != 1 || z != 1 || x == 0 || x % ptx::kLanes || x > 1024)
      throw ptx::Fault("a block must be 1 to 32 whole warps");
    if (static_cast<int>(x) > kernel.most_threads)
      throw ptx::Fault("more threads than the kernel is compiled for");
    if (!launch.grid.x || !launch.grid.y || launch.grid.z != 1 || launch.grid.x > 0x7fffffff ||
        launch.grid.y > kGridAtMost)
      throw ptx::Fault("a grid that no device takes");
    const size_t limit = std::max(kSharedByDefault, shared_limits[kernel.name]);
    if (launch.shared_bytes > limit || launch.shared_bytes > kSharedAtMost)
      throw ptx::Fault("more shared memory than was asked for, or than a device has");
    if (launch.stream) throw ptx::Fault("a stream other than the current one");
  }

  int launch(const std::string& name, const Launch& launch, void** arguments) {
    try {
      ptx::Kernel& kernel = this->kernel(name);
      check(kernel, launch);
      std::vector<unsigned char> parameters(static_cast<size_t>(kernel.parameter_bytes));
      for (size_t i = 0; i < kernel.parameters.size(); ++i)
        std::memcpy(parameters.data() + kernel.parameters[i].offset, arguments[i],
                    static_cast<size_t>(kernel.parameters[i].bytes));
      machine.run(kernel, {launch.grid.x, launch.grid.y}, static_cast<int>(launch.threads.x),
                  launch.shared_bytes, std::move(parameters));
      return 0;
    } catch (const ptx::Fault& fault) {
      return fail(std::string(fault.what()) + " in " + name);
    }
  }
};

Device& device() {
  static Device device;
  return device;
}

// Writes NaN of every type, so that a result or scratch memory that is not written shows.
void poison(uint64_t address, size_t bytes) {
  std::memset(reinterpret_cast<void*>(address), 0xff, bytes);
}

}  // namespace

extern "C" {

// ---- The CUDA runtime, as nvcc's host code calls it. Hidden, so that no other library is served.

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  device().functions[stub] = name;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 threads, size_t shared, void* stream) {
  device().configured = {grid, threads, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* threads, size_t* shared, void* stream) {
  const Launch& launch = device().configured;
  *grid = launch.grid, *threads = launch.threads, *shared = launch.shared_bytes;
  *static_cast<void**>(stream) = launch.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return 0;
}
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 threads, void** arguments, size_t shared,
                     void* stream) {
  return device().launch(device().functions[stub], {grid, threads, shared, stream}, arguments);
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 threads, void** arguments, size_t shared,
                       void* stream) {
  return cudaLaunchKernel(kernel, grid, threads, arguments, shared, stream);
}
int cudaGetLastError() { return std::exchange(device().error, 0); }
const char* cudaGetErrorString(int) { return device().message.c_str(); }
int cudaGetDevice(int* number) { return *number = 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != kMultiprocessorCount) return device().fail("an attribute that is not modelled");
  *value = device().multiprocessors;
  return 0;
}
int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  if (attribute != kMaxDynamicSharedMemory) return device().fail("an attribute not modelled");
  device().shared_limits[device().functions[stub]] = static_cast<size_t>(value);
  return 0;
}

// ---- torch's stable ABI. The linker sends the calls of the objects here (--wrap).

int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }

int __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, void**);
int __wrap_aoti_torch_library_init_impl(const char*, const char*, const char* file, uint32_t line,
                                        void** library) {
  return __real_aoti_torch_library_init_impl("realign_ptx", "CPU", file, line, library);
}

int aoti_torch_get_data_ptr(void* tensor, void** address);
int aoti_torch_get_storage_size(void* tensor, int64_t* bytes);
int __real_torch_call_dispatcher(const char*, const char*, uint64_t*, uint64_t);
int __wrap_torch_call_dispatcher(const char* op, const char* overload, uint64_t* stack,
                                 uint64_t version) {
  const int status = __real_torch_call_dispatcher(op, overload, stack, version);
  if (status || std::strncmp(op, "aten::new_", 10) != 0) return status;
  void* tensor = reinterpret_cast<void*>(stack[0]);
  void* address = nullptr;
  int64_t bytes = 0;
  if (aoti_torch_get_data_ptr(tensor, &address) || aoti_torch_get_storage_size(tensor, &bytes))
    return 1;
  const auto begin = reinterpret_cast<uint64_t>(address);
  const auto size = static_cast<size_t>(bytes);
  if (std::strcmp(op, "aten::new_empty") == 0) poison(begin, size);
  device().machine.global.allow(begin, size, 0, 0, true, "scratch memory or a result");
  return 0;
}

// ---- For the tests

#define EXPORT __attribute__((visibility("default")))

// Adds the kernels of a PTX module, or replaces those of the same name.
EXPORT void ptx_load(const char* module) {
  for (const auto& [name, text] : ptx::kernels_of(module)) {
    device().texts[name] = text;
    device().kernels.erase(name);
  }
}
EXPORT const char* ptx_text(const char* kernel) { return device().texts[kernel].c_str(); }
EXPORT void ptx_configure(int order, int multiprocessors, bool find_races) {
  device().machine.order = static_cast<ptx::Order>(order);
  device().multiprocessors = multiprocessors;
  device().machine.global.find_races = find_races;
}
EXPORT void ptx_allow(uint64_t begin, size_t bytes, size_t row_bytes, size_t row_stride,
                      bool writable, const char* name) {
  device().machine.global.allow(begin, bytes, row_bytes, row_stride, writable, name);
}
EXPORT void ptx_forget() { device().machine.global.forget(); }
// One line for each kernel: launches, blocks, instructions, those that were executed, how often
// warps executed one, name.
EXPORT const char* ptx_report() {
  std::ostringstream lines;
  for (const auto& [name, text] : device().texts) {
    const auto found = device().kernels.find(name);
    int64_t launches = 0, blocks = 0, total = 0, executed = 0, steps = 0;
    if (found != device().kernels.end()) {
      launches = found->second.launches;
      blocks = found->second.blocks;
      for (const auto& instruction : found->second.instructions)
        ++total, executed += instruction.executed > 0, steps += instruction.executed;
    }
    lines << launches << ' ' << blocks << ' ' << total << ' ' << executed << ' ' << steps << ' '
          << name << '\n';
  }
  device().report = lines.str();
  return device().report.c_str();
}
// Launches a kernel without host code; returns "" or the fault.
EXPORT const char* ptx_launch(const char* name, uint32_t blocks, uint32_t threads, size_t shared,
                              void** arguments) {
  device().message.clear();
  device().launch(name, {{blocks, 1, 1}, {threads, 1, 1}, shared, nullptr}, arguments);
  device().error = 0;
  return device().message.c_str();
}

}  // extern "C"
