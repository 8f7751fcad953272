// What libtorch's allocator has taken of a CUDA device, through its generic interface: no header of CUDA is
// needed here, and nothing of it is linked.

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>

#include "guarded.h"

namespace {

constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

c10::DeviceAllocator *allocator() { return c10::getDeviceAllocator(c10::DeviceType::CUDA); }

}  // namespace

extern "C" {

// Gives back what is kept and not used, and counts from what is left on.
int phx_begin_device_peak(int index) {
  return guarded([&] {
    allocator()->emptyCache();
    allocator()->resetPeakStats(static_cast<c10::DeviceIndex>(index));
  });
}

// The most bytes that were taken since then, for tensors and between them.
int phx_device_peak(int index, int64_t *bytes) {
  return guarded([&] {
    *bytes = allocator()->getDeviceStats(static_cast<c10::DeviceIndex>(index)).reserved_bytes[kAll].peak;
  });
}
}
