#include "common/buffer.h"

#include <sys/mman.h>

#include "common/check.h"

namespace fastserve {

namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

Buffer::Buffer(size_t bytes) : bytes_(bytes), release_([](void* data, size_t size) { munmap(data, size); }) {
  if (bytes == 0) return;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  FS_CHECK(data != MAP_FAILED, "cannot reserve ", bytes, " bytes of memory");
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // a hint: failure changes speed only
#endif
  data_ = data;
}

}  // namespace fastserve
