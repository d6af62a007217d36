// Cache-line aligned, zero-filled memory with an owner. That of the host is whole mappings, so untouched pages cost
// nothing and the system may back large ones with huge pages.
#pragma once

#include <cstddef>
#include <utility>

namespace fastserve {

class Buffer {
 public:
  Buffer() = default;
  using Release = void (*)(void* data, size_t bytes);

  explicit Buffer(size_t bytes);
  // Owns memory that something else has allocated.
  Buffer(void* data, size_t bytes, Release release) : data_(data), bytes_(bytes), release_(release) {}
  ~Buffer() {
    if (data_ != nullptr) release_(data_, bytes_);
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)), release_(other.release_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(release_, other.release_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Release release_ = nullptr;
};

}  // namespace fastserve
