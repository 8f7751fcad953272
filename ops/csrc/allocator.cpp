// Host memory for tensors: large ones come from regions that the process keeps, in huge pages where the
// system has them. A step allocates what the step before freed; giving it back to the system in between costs
// a page fault and a cleared page for every 4 KiB.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "guarded.h"

namespace {

constexpr size_t kLarge = 256 << 10;         // bytes; less is the system allocator's
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kRegion = 32 << 20;         // of memory taken from the system at once
constexpr size_t kMostKept = 256 << 20;      // a free region that is larger goes back: more than a chunk of logits
constexpr size_t kGrain = 4 << 10;           // what is handed out is a multiple of it

size_t rounded_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Regions of memory, best fit, neighbours joined when they are freed. A very large region that is free as a
// whole goes back to the system: what is that large is seldom wanted again.
class Regions final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    const size_t size = rounded_up(bytes, kGrain);
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) {
      add_region(size);
      found = by_size_.lower_bound({size, nullptr});
    }
    char *const at = found->first.second;
    const size_t free = found->first.first;
    forget(at);
    if (free > size) remember(at + size, free - size);
    used_[at] = size;
    return {at, at, &Regions::release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Regions::release; }

  void copy_data(void *to, const void *from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Gives back the regions of which nothing is used.
  void trim() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto region = regions_.begin(); region != regions_.end();) {
      const auto [at, size] = *region;
      const auto free = by_place_.find(at);
      if (free == by_place_.end() || free->second != size) {
        ++region;
        continue;
      }
      forget(at);
      region = regions_.erase(region);
      munmap(at, size);
    }
  }

  // Never destroyed: tensors may outlive whatever is.
  static Regions &only() {
    static Regions *const regions = new Regions;
    return *regions;
  }

 private:
  // Of whatever is handed out: oneDNN asks for one function that frees both.
  static void release(void *memory) {
    Regions &regions = only();
    std::unique_lock<std::mutex> lock(regions.mutex_);
    char *at = static_cast<char *>(memory);
    const auto used = regions.used_.find(at);
    if (used == regions.used_.end()) {
      lock.unlock();
      c10::free_cpu(memory);
      return;
    }
    size_t size = used->second;
    regions.used_.erase(used);
    const auto after = regions.by_place_.find(at + size);
    if (after != regions.by_place_.end() && !regions.regions_.count(at + size)) {
      size += after->second;
      regions.forget(after->first);
    }
    if (!regions.regions_.count(at)) {
      auto before = regions.by_place_.lower_bound(at);
      if (before != regions.by_place_.begin() && (--before)->first + before->second == at) {
        at = before->first;
        size += before->second;
        regions.forget(at);
      }
    }
    const auto region = regions.regions_.find(at);
    if (size > kMostKept && region != regions.regions_.end() && region->second == size) {
      regions.regions_.erase(region);
      munmap(at, size);
    } else {
      regions.remember(at, size);
    }
  }

  void add_region(size_t size) {
    const size_t bytes = rounded_up(std::max(size, kRegion), kHugePage), mapped = bytes + kHugePage;
    void *const memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "no memory for a tensor of ", size, " bytes");
    char *const begin = static_cast<char *>(memory);
    char *const at = reinterpret_cast<char *>(rounded_up(reinterpret_cast<size_t>(begin), kHugePage));
    if (at > begin) munmap(begin, at - begin);
    munmap(at + bytes, begin + mapped - (at + bytes));
    madvise(at, bytes, MADV_HUGEPAGE);  // advice: fewer page faults where the system takes it
    regions_[at] = bytes;
    remember(at, bytes);
  }

  void remember(char *at, size_t size) {
    by_place_[at] = size;
    by_size_[{size, at}] = true;
  }

  void forget(char *at) {
    const auto found = by_place_.find(at);
    by_size_.erase({found->second, at});
    by_place_.erase(found);
  }

  std::mutex mutex_;
  std::map<char *, size_t> regions_, by_place_, used_;  // by_place_: what is free
  std::map<std::pair<size_t, char *>, bool> by_size_;
};

}  // namespace

extern "C" {

// From now on large tensors in host memory are the regions'.
int phx_keep_host_memory() {
  return guarded([] { c10::SetAllocator(c10::DeviceType::CPU, &Regions::only(), /*priority=*/1); });
}

// Gives back what is kept and not used.
int phx_trim_host_memory() {
  return guarded([] { Regions::only().trim(); });
}
}
