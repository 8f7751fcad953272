// Streams and events of a CUDA device through libtorch's generic interface, which the CUDA part of
// libtorch fills in when it is opened: no header of CUDA is needed here, and nothing of it is linked.

#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <memory>

#include "guarded.h"

namespace {

c10::Device cuda(int index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

c10::Stream stream_of(int index, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, cuda(index), id);
}

}  // namespace

extern "C" {

// Makes a device the calling thread's current one.
int phx_set_device(int index) {
  return guarded([&] { c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).setDevice(cuda(index)); });
}

// A stream of libtorch's pool, never given back; its id, and the cudaStream_t behind it.
int phx_stream_new(int index, int64_t *id, void **native) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    const c10::Stream stream = impl.getStreamFromGlobalPool(cuda(index), /*isHighPriority=*/true);
    *id = stream.id();
    *native = impl.getStreamNativeHandle(stream);
  });
}

// What the stream is given from now on begins after all that the current stream has been given so far.
int phx_stream_follow_current(int index, int64_t id) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    c10::Event event(c10::DeviceType::CUDA);
    event.record(impl.getStream(cuda(index)));
    event.block(stream_of(index, id));
  });
}

// The cudaStream_t that libtorch gives the calling thread's work on a device to.
int phx_current_stream(int index, void **native) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    *native = impl.getStreamNativeHandle(impl.getStream(cuda(index)));
  });
}

// Makes a stream libtorch's for the calling thread; the id of the one before.
int phx_exchange_stream(int index, int64_t id, int64_t *before) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    *before = impl.exchangeStream(stream_of(index, id)).id();
  });
}

// An event that has passed once the stream has done all it has been given so far.
int phx_event_new(int index, int64_t id, c10::Event **event) {
  return guarded([&] {
    auto recorded = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
    recorded->record(stream_of(index, id));
    *event = recorded.release();
  });
}

// What the calling thread's current stream is given from now on begins after the event.
int phx_event_block_current(const c10::Event *event) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
    event->block(impl.getStream(event->device()));
  });
}

// Returns, on the calling thread, when the event has passed.
int phx_event_synchronize(const c10::Event *event) {
  return guarded([&] { event->synchronize(); });
}

void phx_event_free(c10::Event *event) { delete event; }
}
