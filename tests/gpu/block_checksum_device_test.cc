// Checksums that a device computes, against base/block_checksum.h.
#include <catch2/catch.hpp>
#include <vector>

#include "base/block_checksum.h"
#include "base/random.h"
#include "kernels/block_checksum.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/schedules.h"

namespace ballast {
namespace {

using testing::DeviceArray;

std::vector<std::byte> RandomBytes(size_t count, Random* random) {
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random->Next());
  return bytes;
}

TEST_CASE("a device adds up the checksums of pieces as the host does", "[device][checksum]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 900);
    // Blocks of any size, the last words not whole, each cut into pieces that add to its sum. The
    // first one is longer than all threads take at once.
    BlockChecksumArgs args{.num_thread_blocks = 1 + round % 3};
    std::vector<uint64_t> sums = {5, 6, 7, 8}, expected = sums;
    const DeviceArray<uint64_t> device_sums(sums);
    const size_t sizes[] = {120'000 + random.Below(999), random.Below(3000), random.Below(40),
                            static_cast<size_t>(round)};
    std::vector<std::byte> host;
    struct Cut {
      size_t block, begin, offset, bytes;
    };
    std::vector<Cut> cuts;
    for (size_t b = 0; b < 4; ++b) {
      const size_t begin = (host.size() + 15) / 16 * 16;
      host.resize(begin);
      const std::vector<std::byte> block = RandomBytes(sizes[b], &random);
      host.insert(host.end(), block.begin(), block.end());
      const size_t piece = 16 * (1 + random.Below(static_cast<uint32_t>(sizes[b] / 32 + 1)));
      for (size_t at = 0; at < sizes[b] || at == 0; at += piece) {
        cuts.push_back({b, begin + at, at, std::min(piece, sizes[b] - at)});
      }
      expected[b] += BlockChecksum(block) - block.size();
    }
    const DeviceArray<std::byte> device(host);
    for (size_t first = 0; first < cuts.size(); first += kMostChecksumPieces) {
      args.num_pieces = 0;
      for (size_t i = first; i < std::min(cuts.size(), first + kMostChecksumPieces); ++i) {
        args.pieces[args.num_pieces++] = {.at = device.data() + cuts[i].begin,
                                          .bytes = cuts[i].bytes,
                                          .offset = cuts[i].offset,
                                          .sum = device_sums.data() + cuts[i].block};
      }
      REQUIRE(cuda::AddBlockChecksums(args, nullptr).ok());
    }
    REQUIRE(device_sums.Read() == expected);
  });
}

TEST_CASE("a device finds one changed bit anywhere in a block", "[device][checksum]") {
  Random random(1);
  std::vector<std::byte> block = RandomBytes(4099, &random);
  const uint64_t sum = BlockChecksum(block);
  for (const size_t at :
       {size_t{0}, size_t{15}, size_t{16}, size_t{4095}, size_t{4096}, size_t{4098}}) {
    block[at] ^= std::byte{32};
    const DeviceArray<std::byte> device(block);
    const DeviceArray<uint64_t> found(std::vector<uint64_t>{block.size()});
    REQUIRE(cuda::AddBlockChecksums({.num_pieces = 1,
                                     .num_thread_blocks = 2,
                                     .pieces = {{{device.data(), block.size(), 0, found.data()}}}},
                                    nullptr)
                .ok());
    REQUIRE(found.Read()[0] != sum);
    REQUIRE(found.Read()[0] == BlockChecksum(block));
    block[at] ^= std::byte{32};
  }
}

TEST_CASE("pieces that a device cannot read are refused by name", "[device][checksum][errors]") {
  const DeviceArray<std::byte> device(size_t{64});
  const DeviceArray<uint64_t> sum(size_t{1});
  const auto refuse = [&](BlockChecksumArgs args, const std::string& part) {
    const absl::Status status = cuda::AddBlockChecksums(args, nullptr);
    INFO(status.message());
    REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
    REQUIRE(std::string(status.message()).find(part) != std::string::npos);
  };
  BlockChecksumArgs args{.num_pieces = 1, .num_thread_blocks = 1};
  args.pieces[0] = {device.data() + 8, 16, 0, sum.data()};
  refuse(args, "a piece of a block");
  args.pieces[0] = {device.data(), 16, 12, sum.data()};
  refuse(args, "piece 0 is at byte 12 of its block");
  args.pieces[0] = {device.data(), 16, 8, sum.data()};
  args.num_thread_blocks = 0;
  refuse(args, "1 pieces and 0 thread blocks");
  args.num_thread_blocks = 1;
  args.num_pieces = kMostChecksumPieces + 1;
  refuse(args, "17 pieces");
  args.num_pieces = 1;
  args.pieces[0].bytes = 0;
  REQUIRE(cuda::AddBlockChecksums(args, nullptr).ok());
}

}  // namespace
}  // namespace ballast
