// Checks that throw, naming where and what. Used at every boundary instead of assert.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastserve {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const char* file, int line, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  text << " [" << file << ':' << line << ']';
  throw Error(text.str());
}

}  // namespace fastserve

// FS_CHECK(condition, message parts…): throws fastserve::Error unless the condition holds.
#define FS_CHECK(condition, ...)                                         \
  do {                                                                   \
    if (!(condition)) ::fastserve::fail(FS_FILE, __LINE__, __VA_ARGS__); \
  } while (false)

// The path below the repository root, so that messages do not depend on the build machine.
#ifdef FS_SOURCE_DIR_LENGTH
#define FS_FILE (&__FILE__[FS_SOURCE_DIR_LENGTH])
#else
#define FS_FILE __FILE__
#endif
