#include "machine/warpgroup.h"

#include <bit>
#include <cstring>

#include "machine/block.h"

namespace simt {
namespace {

constexpr int kGroupWarps = 4;
constexpr uint32_t kPoison = 0xffffffff;

bool is_poison(const float* sums, int count) {
  for (int i = 0; i < count; ++i) {
    if (std::bit_cast<uint32_t>(sums[i]) != kPoison) return false;
  }
  return true;
}

// A K-major matrix of 16-bit elements, read by its descriptor (PTX ISA, "Matrix Descriptor Format" and "Canonical
// Layouts"). Without a swizzle: core matrices of 8 rows by 16 bytes without gaps; the leading offset leads from one to
// the next along k, the stride offset from 8 rows to the next 8. Swizzled: rows are as wide as the swizzle, the stride
// offset leads from 8 rows to the next 8, the leading offset is not used.
class Operand {
 public:
  Operand(uint64_t descriptor, const unsigned char* shared, size_t shared_bytes)
      : shared_(shared), shared_bytes_(shared_bytes) {
    const auto field = [&](int first) { return static_cast<uint32_t>(descriptor >> first & 0x3fff) << 4; };
    start_ = field(0);
    leading_ = field(16);
    stride_ = field(32);
    constexpr uint32_t kSwizzles[] = {0, 128, 64, 32};
    swizzle_ = kSwizzles[descriptor >> 62];
    if ((descriptor & ~(uint64_t{0x3fff} | uint64_t{0x3fff} << 16 | uint64_t{0x3fff} << 32 | uint64_t{7} << 49 |
                        uint64_t{3} << 62)) != 0) {
      fault("multiply_async with a descriptor that has bits which mean nothing");
    }
    if (swizzle_ != 0) {
      // The pattern repeats every 8 rows, and must begin at a multiple of that unless a base offset says otherwise.
      if ((descriptor >> 49 & 7) != 0) fault("multiply_async with a base offset, which is not emulated");
      if (start_ % (8 * swizzle_) >= swizzle_) {
        fault(
            join("multiply_async of a matrix whose pattern does not begin at a multiple of ", 8 * swizzle_, " bytes"));
      }
    }
  }

  uint16_t at(int row, int k) const {
    const auto group = static_cast<uint32_t>(row / 8), within = static_cast<uint32_t>(row % 8);
    uint32_t address = start_ + group * stride_;
    if (swizzle_ == 0) {
      address += static_cast<uint32_t>(k / 8) * leading_ + within * 16 + static_cast<uint32_t>(k % 8) * 2;
    } else {
      address += within * swizzle_ + static_cast<uint32_t>(k) * 2;
    }
    address = swizzled_address(address, swizzle_);
    if (address < kSharedWindow || address + 2 > kSharedWindow + shared_bytes_) {
      fault(join("multiply_async reads out of the block's ", shared_bytes_, " bytes of shared memory, at byte ",
                 static_cast<int64_t>(address) - kSharedWindow));
    }
    uint16_t bits;
    std::memcpy(&bits, shared_ + (address - kSharedWindow), 2);
    return bits;
  }

 private:
  const unsigned char* shared_;
  size_t shared_bytes_;
  uint32_t start_, leading_, stride_, swizzle_;
};

float widen(Element element, uint16_t bits) {
  return element == Element::kBf16 ? std::bit_cast<float>(uint32_t{bits} << 16) : fastserve::half_to_float(bits);
}

// As in multiply() of matrix.h: a product of two elements is exact, and sums go over k in ascending order.
void run(WarpProduct& product) {
  constexpr int kMostColumns = 256;
  const size_t bytes = block().launch().shared_bytes;
  const Operand a(product.a, block().shared(product.rank), bytes), b(product.b, block().shared(product.rank), bytes);
  const int columns = product.columns, own = columns / 2;
  float left[16][16], right[16][kMostColumns], sums[kMostColumns];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) left[row][k] = widen(product.element, a.at(16 * product.quarter + row, k));
    for (int column = 0; column < columns; ++column) right[k][column] = widen(product.element, b.at(column, k));
  }
  // Lane 4 g + t has of row g + 8 h columns 8 c + 2 t and the next, in sums 4 c + 2 h and the next.
  for (int row = 0; row < 16; ++row) {
    float* lanes[4];
    for (int t = 0; t < 4; ++t) lanes[t] = &product.held[static_cast<size_t>((row % 8 * 4 + t) * own + row / 8 * 2)];
    for (int c = 0; c < columns; ++c) sums[c] = lanes[c % 8 / 2][c / 8 * 4 + c % 2];
    for (int k = 0; k < 16; ++k) {
      const float factor = left[row][k];
      for (int c = 0; c < columns; ++c) sums[c] += factor * right[k][c];
    }
    for (int c = 0; c < columns; ++c) lanes[c % 8 / 2][c / 8 * 4 + c % 2] = sums[c];
  }
}

struct Issue {
  Element element;
  int columns;
  float* sums;
  uint64_t a, b;
};

void issue(void* const (&payloads)[kLanes], unsigned) {
  Warp& warp = block().warp();
  WarpProducts& products = warp.products;
  const Thread& thread = *block().running();
  const auto& first = *static_cast<const Issue*>(payloads[0]);
  const int in_block = static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / kLanes);
  const int own = first.columns / 2;
  WarpProduct product{first.element, first.columns, first.a, first.b, thread.rank, in_block % kGroupWarps, {}, {},
                      false};
  const WarpProduct* before = products.open.empty() ? nullptr : &products.open.back();
  product.follows = before != nullptr && before->sums[0] == first.sums;
  for (const WarpProduct& other : products.open) {
    if (!product.follows && other.sums[0] == first.sums) {
      fault("multiply_async adds to sums that an earlier product than the last is under way to");
    }
  }
  if (product.follows && (before->columns != first.columns || before->element != first.element)) {
    fault("multiply_async of another shape adds to sums that are under way");
  }
  product.held.resize(static_cast<size_t>(kLanes * own));
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& given = *static_cast<const Issue*>(payloads[lane]);
    if (given.a != first.a || given.b != first.b || given.columns != first.columns) {
      fault("multiply_async with descriptors that differ in a warp");
    }
    product.sums[lane] = given.sums;
    if (product.follows) {
      if (!is_poison(given.sums, own)) fault("has changed sums that a product is under way to");
      continue;
    }
    bool fenced = false;
    for (const auto& [place, values] : products.fenced[lane]) {
      fenced |= place == given.sums && values.size() == static_cast<size_t>(own) &&
                std::memcmp(values.data(), given.sums, values.size() * sizeof(float)) == 0;
    }
    if (!fenced) fault("multiply_async without a fence since its sums were changed");
    std::memcpy(&product.held[static_cast<size_t>(lane * own)], given.sums, own * sizeof(float));
    std::memset(given.sums, 0xff, own * sizeof(float));
  }
  // The other warps of the group, as far as they have come.
  const size_t leader = thread.warp - static_cast<size_t>(in_block % kGroupWarps);
  if (static_cast<size_t>(in_block / kGroupWarps * kGroupWarps + kGroupWarps) * kLanes >
      size_t{blockDim.x} * blockDim.y * blockDim.z) {
    fault("multiply_async by a warp that belongs to no whole warpgroup");
  }
  const std::pair both{first.a, first.b};
  for (size_t i = leader; i < leader + kGroupWarps; ++i) {
    const auto& issued = block().warp(i).products.issued;
    if (issued.size() > products.issued.size() && issued[products.issued.size()] != both) {
      fault("multiply_async with descriptors that differ in a warpgroup");
    }
  }
  products.issued.push_back(both);
  products.open.push_back(std::move(product));
}

void commit(void* const (&)[kLanes], unsigned) {
  WarpProducts& products = block().warp().products;
  size_t open = products.open.size();
  for (const size_t group : products.groups) open -= group;
  products.groups.push_back(open);
}

void finish(void* const (&payloads)[kLanes], unsigned) {
  WarpProducts& products = block().warp().products;
  const auto left = static_cast<size_t>(*static_cast<const int*>(payloads[0]));
  size_t count = 0;
  while (products.groups.size() > left) {
    count += products.groups.front();
    products.groups.erase(products.groups.begin());
  }
  for (size_t i = 0; i < count; ++i) {
    WarpProduct& product = products.open[i];
    run(product);
    if (i + 1 < products.open.size() && products.open[i + 1].follows) {
      products.open[i + 1].held = std::move(product.held);
      continue;
    }
    const int own = product.columns / 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!is_poison(product.sums[lane], own)) fault("has changed sums that a product is under way to");
      std::memcpy(product.sums[lane], &product.held[static_cast<size_t>(lane * own)], own * sizeof(float));
    }
  }
  products.open.erase(products.open.begin(), products.open.begin() + static_cast<ptrdiff_t>(count));
  for (auto& fenced : products.fenced) fenced.clear();
}

}  // namespace

void WarpProducts::clear() {
  open.clear();
  groups.clear();
  issued.clear();
  for (auto& lane : fenced) lane.clear();
}

void fence_sums(const float* sums, int count, const Site& site) {
  WarpProducts& products = block().warp().products;
  auto& fenced = products.fenced[lane()];
  std::erase_if(fenced, [&](const auto& entry) { return entry.first == sums; });
  fenced.emplace_back(sums, std::vector<float>(sums, sums + count));
  meet("fence_sums", 0xffffffffu, site, nullptr, nullptr);
}

void multiply_async(Element element, int columns, float* sums, uint64_t a, uint64_t b, const Site& site) {
  Issue own{element, columns, sums, a, b};
  meet("multiply_async", 0xffffffffu, site, &own, issue);
}

void commit_products(const Site& site) { meet("commit_products", 0xffffffffu, site, nullptr, commit); }

void wait_products(int open, const Site& site) { meet("wait_products", 0xffffffffu, site, &open, finish); }

}  // namespace simt
