#include "tests/support/cuda_shim/hopper.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <vector>

#include "base/dtype.h"
#include "kernels/e4m3.h"
#include "tests/support/cuda_shim/cuda_runtime.h"
#include "tests/support/cuda_shim/emulator.h"

namespace cuda_shim {
namespace {

constexpr size_t kRowBytes = 128, kChunkBytes = 16, kAtomRows = 8, kAtomBytes = 1024;
constexpr uint32_t kWarpgroup = 128;
constexpr int kRows = 64;           // of a product
constexpr size_t kDepthBytes = 32;  // of each row

// ---- barriers ---------------------------------------------------------------------------------

// The 64 bits of a barrier. `mark` tells one from noise.
struct BarrierBits {
  static constexpr uint64_t kMark = 0x2ba11a;
  static constexpr int64_t kNoBytes = 1 << 20;
  uint64_t parity : 1 = 0;   // of the phase under way
  uint64_t count : 10 = 0;   // that arrive in a phase
  uint64_t absent : 10 = 0;  // of them
  uint64_t bytes : 21 = 0;   // kNoBytes and those announced that have not come
  uint64_t mark : 22 = kMark;
};
static_assert(sizeof(BarrierBits) == 8);

BarrierBits ReadBarrier(const uint64_t* barrier) {
  const auto bits = std::bit_cast<BarrierBits>(*barrier);
  if (bits.mark != BarrierBits::kMark) Trap("the use of a barrier that nobody has begun");
  return bits;
}

void WriteBarrier(uint64_t* barrier, BarrierBits bits) {
  const bool ends = bits.absent == 0 && bits.bytes == BarrierBits::kNoBytes;
  if (ends) {
    bits.parity ^= 1;
    bits.absent = bits.count;
  }
  *barrier = std::bit_cast<uint64_t>(bits);
  if (ends) WakeSleepers(barrier);
}

void BytesCame(uint64_t* barrier, size_t bytes) {
  BarrierBits bits = std::bit_cast<BarrierBits>(*barrier);
  bits.bytes = (bits.bytes - bytes) & ((1u << 21) - 1);
  WriteBarrier(barrier, bits);
}

// ---- what a block keeps -----------------------------------------------------------------------

// The sums of one thread in one array while products of them are under way.
struct Held {
  std::vector<float> sum;
  size_t end;  // sequence number behind the last product
};

struct Participant {
  size_t issued = 0;                   // products
  std::deque<size_t> groups;           // committed: the sequence number behind their last product
  bool fenced = false;                 // since the last wait
  std::map<float*, Held> accumulator;  // by the array's address
};

struct ProductOp {
  Element element;
  int num_sums;
  uint64_t x, w;
  bool add;
  uint32_t arrived = 0;
  float* d[kWarpgroup] = {};
};

struct Warpgroup {
  std::deque<ProductOp> waiting;  // the first has number `done`
  size_t done = 0;
  Participant participant[kWarpgroup];
};

struct HopperBlock {
  std::byte* shared = SharedMemory();
  std::map<uint32_t, Warpgroup> warpgroup;
  std::map<const uint64_t*, uint32_t> unfenced;  // barriers, by the thread that began them
};

HopperBlock& State() {
  std::shared_ptr<void>& state = BlockState();
  if (state == nullptr) state = std::make_shared<HopperBlock>();
  return *static_cast<HopperBlock*>(state.get());
}
Warpgroup& OwnWarpgroup() {
  return State().warpgroup[threadIdx.x / kWarpgroup];
}
Participant& Self() {
  return OwnWarpgroup().participant[threadIdx.x % kWarpgroup];
}

// ---- products ---------------------------------------------------------------------------------

// Where byte `at` of a tile lies: chunks change places within the atom's rows.
size_t Swizzled(size_t at) {
  return at ^ (at / kRowBytes % kAtomRows * kChunkBytes);
}

struct Descriptor {
  size_t start, atom_stride;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), atom_stride((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) Trap("a product of tiles without the 128-byte swizzle");
    if ((bits >> 49 & 7) != 0) Trap("a product of tiles that do not begin at an atom");
  }
};

void CheckTile(const Descriptor& tile, size_t rows) {
  const size_t end =
      tile.start / kAtomBytes * kAtomBytes + (rows / kAtomRows - 1) * tile.atom_stride + kAtomBytes;
  if (end > SharedBytes()) Trap("a product of what lies outside of shared memory");
}

size_t DepthOf(Element element) {
  return element == Element::kBf16 ? kDepthBytes / 2 : kDepthBytes;
}
float ReadElement(Element element, const std::byte* at) {
  if (element == Element::kE4m3) return ballast::FromE4M3(static_cast<uint8_t>(*at));
  ballast::BFloat16 value;
  std::memcpy(&value, at, sizeof value);
  return ballast::ToFloat(value);
}

// [depth][rows]
std::vector<float> ReadTile(Element element, const std::byte* shared, uint64_t descriptor,
                            size_t rows) {
  const Descriptor tile(descriptor);
  const size_t depth = DepthOf(element), bytes = kDepthBytes / depth;
  std::vector<float> values(depth * rows);
  for (size_t r = 0; r < rows; ++r) {
    const size_t row = tile.start + r / kAtomRows * tile.atom_stride + r % kAtomRows * kRowBytes;
    for (size_t k = 0; k < depth; ++k) {
      values[k * rows + r] = ReadElement(element, shared + Swizzled(row + bytes * k));
    }
  }
  return values;
}

// The thread that has the sum of (row, column), and where.
uint32_t OwnerOf(int row, int column) {
  return static_cast<uint32_t>(row / 16 * 32 + row % 8 * 4 + column % 8 / 2);
}
size_t PlaceOf(int row, int column) {
  return static_cast<size_t>(column / 8 * 4 + row % 16 / 8 * 2 + column % 2);
}

void DoProduct(const std::byte* shared, Warpgroup* group) {
  const ProductOp op = group->waiting.front();
  group->waiting.pop_front();
  const int columns = 2 * op.num_sums;
  const std::vector<float> x = ReadTile(op.element, shared, op.x, kRows);
  const std::vector<float> w = ReadTile(op.element, shared, op.w, static_cast<size_t>(columns));
  float* sums[kWarpgroup];
  for (uint32_t t = 0; t < kWarpgroup; ++t) {
    sums[t] = group->participant[t].accumulator.at(op.d[t]).sum.data();
  }
  std::vector<float> line(static_cast<size_t>(columns));
  for (int row = 0; row < kRows; ++row) {
    for (int c = 0; c < columns; ++c) {
      line[static_cast<size_t>(c)] = op.add ? sums[OwnerOf(row, c)][PlaceOf(row, c)] : 0.0f;
    }
    for (int k = 0; k < static_cast<int>(DepthOf(op.element)); ++k) {
      const float value = x[static_cast<size_t>(k * kRows + row)];
      const float* parameters = &w[static_cast<size_t>(k * columns)];
      for (int c = 0; c < columns; ++c) {
        line[static_cast<size_t>(c)] = std::fma(value, parameters[c], line[static_cast<size_t>(c)]);
      }
    }
    for (int c = 0; c < columns; ++c) {
      sums[OwnerOf(row, c)][PlaceOf(row, c)] = line[static_cast<size_t>(c)];
    }
  }
  ++group->done;
  WakeSleepers(group);
}

}  // namespace

// ---- barriers ---------------------------------------------------------------------------------

void BarrierInit(uint64_t* barrier, uint32_t count) {
  if (count == 0 || count > 1023) Trap("a barrier for a number that is not allowed");
  BarrierBits bits;
  bits.count = bits.absent = count;
  bits.bytes = BarrierBits::kNoBytes;
  *barrier = std::bit_cast<uint64_t>(bits);
  State().unfenced[barrier] = threadIdx.x;
  Yield();
}

void BarrierArrive(uint64_t* barrier, uint32_t announced_bytes) {
  Yield();
  BarrierBits bits = ReadBarrier(barrier);
  if (bits.absent == 0) Trap("more arrivals at a barrier than it was begun for");
  bits.bytes = bits.bytes + announced_bytes;
  --bits.absent;
  WriteBarrier(barrier, bits);
}

void BarrierWait(uint64_t* barrier, uint32_t parity) {
  while (ReadBarrier(barrier).parity == parity) Sleep(barrier, "mbarrier.try_wait");
}

void AsyncProxyFence() {
  std::erase_if(State().unfenced, [](const auto& entry) { return entry.second == threadIdx.x; });
}

// ---- copies -----------------------------------------------------------------------------------

const char* FaultOf(const BoxMap& map) {
  constexpr uint64_t kMost = uint64_t{1} << 32;
  if (reinterpret_cast<uintptr_t>(map.at) % 16 != 0) return "a misaligned base";
  if (map.row_bytes % 16 != 0 || map.matrix_bytes % 16 != 0) return "a misaligned stride";
  if (map.columns == 0 || map.rows == 0 || map.depth == 0) return "nothing in it";
  if (map.columns > kMost || map.rows > kMost || map.depth > kMost) return "too large a size";
  if (map.box_rows == 0 || map.box_rows > 256) return "a box of another height than 1 to 256";
  if (map.columns * map.element_bytes > map.row_bytes) return "rows that overlap";
  return nullptr;
}

void CopyBox(void* to, const BoxMap& map, uint64_t* barrier, int64_t column, int64_t row,
             int64_t matrix) {
  const HopperBlock& state = State();
  const auto offset = static_cast<size_t>(static_cast<std::byte*>(to) - state.shared);
  if (offset % kAtomBytes != 0) Trap("a copy to what is not the beginning of an atom");
  if (offset + map.box_rows * kRowBytes > SharedBytes()) Trap("a copy to outside of shared memory");
  if (matrix < 0 || static_cast<uint64_t>(matrix) >= map.depth) Trap("a copy of no matrix");
  if (state.unfenced.contains(barrier)) Trap("a barrier that the copy engine does not know yet");
  ReadBarrier(barrier);
  const std::byte* from = map.at + static_cast<size_t>(matrix) * map.matrix_bytes;
  const auto copy_rows = [=, shared = state.shared](size_t first, size_t end) {
    for (size_t at = first * kRowBytes; at < end * kRowBytes; at += map.element_bytes) {
      const int64_t r = row + static_cast<int64_t>(at / kRowBytes);
      const int64_t c = column + static_cast<int64_t>(at % kRowBytes / map.element_bytes);
      const bool inside = r >= 0 && c >= 0 && static_cast<uint64_t>(r) < map.rows &&
                          static_cast<uint64_t>(c) < map.columns;
      std::byte* target = shared + Swizzled(offset + at);
      if (!inside) {
        std::memset(target, 0, map.element_bytes);
        continue;
      }
      std::memcpy(target,
                  from + static_cast<size_t>(r) * map.row_bytes +
                      static_cast<size_t>(c) * map.element_bytes,
                  map.element_bytes);
    }
    BytesCame(barrier, (end - first) * kRowBytes);
  };
  const size_t half = map.box_rows / 2;
  if (half > 0) Later([=] { copy_rows(0, half); });
  Later([=] { copy_rows(half, map.box_rows); });
  Yield();
}

// ---- products ---------------------------------------------------------------------------------

uint64_t SharedOffset(const void* at) {
  return static_cast<uint64_t>(static_cast<const std::byte*>(at) - State().shared);
}

void SumsFence() {
  Self().fenced = true;
}

void BeginProduct(Element element, float* d, int num_sums, uint64_t x, uint64_t w, bool add) {
  Warpgroup& group = OwnWarpgroup();
  Participant& self = Self();
  if (!self.fenced) Trap("a product without wgmma.fence");
  CheckTile(Descriptor(x), kRows);
  CheckTile(Descriptor(w), 2 * static_cast<size_t>(num_sums));
  const size_t number = self.issued++;
  if (number - group.done == group.waiting.size())
    group.waiting.push_back({element, num_sums, x, w, add});
  ProductOp& op = group.waiting[number - group.done];
  if (op.element != element || op.num_sums != num_sums || op.x != x || op.w != w || op.add != add) {
    Trap("a product of which the warpgroup's threads say different things");
  }
  const auto [held, is_new] = self.accumulator.try_emplace(d);
  if (is_new) {
    held->second.sum.assign(d, d + num_sums);
    std::fill_n(d, num_sums, std::numeric_limits<float>::quiet_NaN());
  }
  held->second.end = number + 1;
  op.d[threadIdx.x % kWarpgroup] = d;
  if (++op.arrived < kWarpgroup) return;
  // An op is complete after those before it, as no thread begins them in another order.
  Later([shared = State().shared, at = &group] { DoProduct(shared, at); });
}

void CommitProducts() {
  Self().groups.push_back(Self().issued);
}

void WaitProducts(size_t left) {
  Warpgroup& group = OwnWarpgroup();
  Participant& self = Self();
  while (self.groups.size() > left) {
    while (group.done < self.groups.front()) Sleep(&group, "wgmma.wait_group");
    self.groups.pop_front();
  }
  std::erase_if(self.accumulator, [&](const auto& entry) {
    if (entry.second.end > group.done) return false;
    std::copy(entry.second.sum.begin(), entry.second.sum.end(), entry.first);
    return true;
  });
  self.fenced = false;
}

}  // namespace cuda_shim
