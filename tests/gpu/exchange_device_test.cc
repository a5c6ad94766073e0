#include <bit>
#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "tests/gpu/schedules.h"
#include "tests/gpu/virtual_ranks.h"
#include "tests/placement/random_instances.h"

namespace ballast {
namespace {

using testing::Batch;
using testing::RandomBatch;
using testing::RandomBatches;
using testing::RequireCuda;
using testing::ShapeFor;
using testing::TestRanks;

TEST_CASE("the exchange computes what one rank would", "[device][exchange][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 3);
    const Topology topology = testing::RandomTopology(&random, 6);
    const Placement placement = testing::RandomPlacement(&random, topology, 1);
    const int32_t top_k = std::min(placement.num_experts(), 1 + round % 5);
    ArenaShape shape = ShapeFor(placement, 9, top_k);
    // Memory of ranks that are gone is among theirs, and is poison.
    if (round % 2 == 1) shape.num_places = shape.num_ranks + round % 4;
    REQUIRE(CheckArenaShape(shape).ok());
    TestRanks ranks(placement, shape);
    for (const uint32_t number : {1u, 2u, 3u}) {  // nothing is cleared in between
      CAPTURE(round, shape.num_ranks, number);
      ranks.Run(RandomBatches(shape, &random), number);
      for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
    }
  });
}

TEST_CASE("ranks of one launch exchange rows", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 60);
    const Placement placement =
        testing::RandomPlacement(&random, testing::RandomTopology(&random, 8), 1);
    const ArenaShape shape = ShapeFor(placement, 12, std::min(placement.num_experts(), 3));
    TestRanks ranks(placement, shape);
    for (const uint32_t number : {7u, 8u}) {
      ranks.RunTogether(RandomBatches(shape, &random), number, 1 + round % 3);
      for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
    }
  });
}

// The last block speaks for all: what the others stored must be seen with its flag.
TEST_CASE("blocks of one rank wait for each other's rows", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 360);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(1, 4), true);
    const ArenaShape shape = ShapeFor(placement, 8, 2);
    TestRanks ranks(placement, shape);
    for (uint32_t number = 1; number <= 12; ++number) {
      ranks.RunTogether({RandomBatch(shape, 8, &random)}, number, 2 + round % 3);
      ranks.rank(0).RequireResult();
    }
  });
}

// Every warp copies, and twice; a block has several tokens.
TEST_CASE("rows wider than a block are exchanged", "[device][exchange]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 160);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 3), true);
    const ArenaShape shape = ShapeFor(placement, 4, 2, 4900);
    TestRanks ranks(placement, shape);
    const std::vector<Batch> batches = {RandomBatch(shape, 4, &random),
                                        RandomBatch(shape, 3, &random)};
    ranks.RunTogether(batches, 1, 1);
    for (int32_t r = 0; r < 2; ++r) ranks.rank(r).RequireResult();
  });
}

TEST_CASE("more tokens than a launch has blocks are exchanged", "[device][exchange][streams]") {
  testing::ForEachSchedule([](int round) {
    if (round % 4 != 3) return;  // it takes a while
    Random random(static_cast<uint64_t>(round) + 260);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(1, 4), true);
    const ArenaShape shape = ShapeFor(placement, 300, 1, 136);
    TestRanks ranks(placement, shape);
    ranks.rank(0).exchange().max_blocks = 150;  // more than the emulator holds at a time
    ranks.Run({RandomBatch(shape, 300, &random)}, 1);
    ranks.rank(0).RequireResult();
  });
}

TEST_CASE("results do not depend on the placement", "[device][exchange][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 90);
    const Topology topology = Topology::Uniform(4, 4);
    std::vector<std::vector<float>> first;
    std::vector<Batch> batches;
    for (uint32_t epoch = 0; epoch < 3; ++epoch) {
      const Placement placement = *Placement::Create(
          1, 6, topology, testing::RandomRow(&random, topology.num_slots(), 6), epoch);
      const ArenaShape shape = ShapeFor(placement, 10, 4);
      if (batches.empty()) {
        batches = RandomBatches(shape, &random);
        // Of any size now: the order of the sums shows.
        for (Batch& batch : batches) {
          for (float& x : batch.x) x = static_cast<float>(std::exp(8 * random.Uniform()));
        }
      }
      TestRanks ranks(placement, shape);
      ranks.Run(batches, 1);
      for (int32_t r = 0; r < 4; ++r) {
        if (epoch == 0) first.push_back(ranks.rank(r).out());
        REQUIRE(ranks.rank(r).out() == first[r]);
      }
    }
  });
}

TEST_CASE("numbers of exchanges come round", "[device][exchange][streams]") {
  Random random(5);
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true);
  const ArenaShape shape = ShapeFor(placement, 5, 2);
  TestRanks ranks(placement, shape);
  // A flag may be 2^31 behind at most, so it gets there in steps.
  for (const uint32_t number : {0x7fffffffu, 0xfffffffeu, 0xffffffffu, 0u, 1u}) {
    CAPTURE(number);
    ranks.Run(RandomBatches(shape, &random), number);
    for (int32_t r = 0; r < shape.num_ranks; ++r) ranks.rank(r).RequireResult();
  }
}

// `late` is missing from `code` on; the others say so, and do nothing more.
TEST_CASE("a rank that does not come is named when the deadline has passed",
          "[device][exchange][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 7);
    const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true);
    const ArenaShape shape = ShapeFor(placement, 5, 2);
    TestRanks ranks(placement, shape);
    const int32_t late = round % 3;
    const int stage = round / 3 % 3;
    for (int32_t r = 0; r < 3; ++r) {
      ranks.rank(r).exchange().deadline_ns = testing::ShortDeadlineNs();
    }
    ranks.Begin(RandomBatches(shape, &random), 0);
    for (int32_t r = 0; r < 3; ++r) {
      if (r != late || stage == 2) ranks.rank(r).LaunchFirstHalf();
      if (r == late && stage == 1) ranks.rank(r).LaunchSplit();
    }
    RequireCuda(cudaDeviceSynchronize());
    for (int32_t r = 0; r < 3; ++r) {
      if (r != late) ranks.rank(r).LaunchSecondHalf();
    }
    const char* what[] = {"counts", "rows", "results"};
    for (int32_t r = 0; r < 3; ++r) {
      CAPTURE(round, late, stage, r);
      if (r == late) continue;
      REQUIRE(absl::IsDeadlineExceeded(ranks.rank(r).status()));
      REQUIRE(ranks.rank(r).status().message() == absl::StrCat("exchange: the ", what[stage],
                                                               " of rank ", late,
                                                               " did not come in time"));
      for (float x : ranks.rank(r).out()) REQUIRE(std::bit_cast<uint32_t>(x) == 0xa5a5a5a5u);
    }
  });
}

// Its experts, which are launched all the same, must find nothing to do.
TEST_CASE("a rank that misses counts has empty groups", "[device][exchange][streams]") {
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 2), true);
  const ArenaShape shape = ShapeFor(placement, 5, 2);
  TestRanks ranks(placement, shape);
  Random random(1);
  for (int32_t r = 0; r < 2; ++r) {
    ranks.rank(r).exchange().deadline_ns = testing::ShortDeadlineNs();
  }
  ranks.Begin(RandomBatches(shape, &random), 0);
  ranks.rank(0).LaunchFirstHalf();
  RequireCuda(cudaDeviceSynchronize());
  REQUIRE(absl::IsDeadlineExceeded(ranks.rank(0).status()));
  REQUIRE(ranks.rank(0).group_rows() == std::vector<int32_t>(4, 0));
  ranks.rank(0).LaunchFirstHalf();  // and so where it had failed before
  REQUIRE(ranks.rank(0).group_rows() == std::vector<int32_t>(4, 0));
}

TEST_CASE("a rank with tables of another epoch is named", "[device][exchange][streams]") {
  testing::ForEachSchedule([](int round) {
    Random random(static_cast<uint64_t>(round) + 5);
    const Topology topology = Topology::Uniform(3, 2);
    const Placement now = *Placement::Contiguous(1, 4, topology, true);
    const std::vector<int32_t> row(now.expert_of_slot(0).begin(), now.expert_of_slot(0).end());
    const Placement next = *Placement::Create(1, 4, topology, row, now.epoch() + 1);
    const ArenaShape shape = ShapeFor(now, 5, 2);
    TestRanks ranks(now, shape);
    const int32_t early = round % 3;
    ranks.rank(early).Flip(next);
    ranks.Begin(RandomBatches(shape, &random), 0);
    for (int32_t r = 0; r < 3; ++r) ranks.rank(r).LaunchFirstHalf();
    RequireCuda(cudaDeviceSynchronize());
    for (int32_t r = 0; r < 3; ++r) {
      CAPTURE(round, r);
      const std::string said(ranks.rank(r).status().message());
      // To the early one all others are of another epoch.
      REQUIRE(said.find("are of another epoch") != std::string::npos);
      if (r != early) REQUIRE(said.find(absl::StrCat("rank ", early)) != std::string::npos);
      REQUIRE(ranks.rank(r).group_rows() == std::vector<int32_t>(6, 0));
    }
  });
}

TEST_CASE("more tokens than an arena has room for are refused", "[device][exchange]") {
  const Placement placement = *Placement::Contiguous(1, 4, Topology::Uniform(2, 2), true);
  const ArenaShape shape = ShapeFor(placement, 5, 2);
  TestRanks ranks(placement, shape);
  DispatchArgs args = ranks.rank(0).dispatch_args();
  args.num_tokens = 6;
  const absl::Status status = cuda::Dispatch(args, ranks.rank(0).exchange(), nullptr);
  REQUIRE(absl::IsInvalidArgument(status));
  REQUIRE(status.message() == "exchange: 6 tokens, allowed: 0 to 5");
}

TEST_CASE("an arena of a shape that cannot be is refused", "[device][exchange]") {
  const ArenaShape good =
      ShapeFor(*Placement::Contiguous(1, 4, Topology::Uniform(3, 2), true), 5, 2);
  REQUIRE(CheckArenaShape(good).ok());
  const auto refused = [&](auto change) {
    ArenaShape shape = good;
    change(shape);
    return absl::IsInvalidArgument(CheckArenaShape(shape));
  };
  REQUIRE(refused([](ArenaShape& s) { s.num_ranks = kMaxPeers + 1; }));
  REQUIRE(refused([](ArenaShape& s) { s.num_ranks = 0; }));
  REQUIRE(refused([](ArenaShape& s) { s.top_k = 33; }));
  REQUIRE(refused([](ArenaShape& s) { s.row_bytes = 24; }));
  REQUIRE(refused([](ArenaShape& s) { s.row_capacity = 0; }));
  REQUIRE(refused([](ArenaShape& s) { s.num_kinds = 0; }));
  REQUIRE(refused([](ArenaShape& s) { s.num_experts = 1 << 29; }));
  REQUIRE(refused([](ArenaShape& s) { s.max_tokens = 1 << 30; }));
  // Parts do not overlap and lie in the order of their offsets, each on a line of its own.
  const size_t parts[] = {
      good.counts_offset(),      good.flags_offset(), good.tokens_offset(),  good.epochs_offset(),
      good.row_of_copy_offset(), good.rows_offset(),  good.results_offset(), good.bytes()};
  const size_t sizes[] = {4u * 3 * 2 * 4,
                          128u * 3 * 3,
                          4u * 3,
                          4u * 3,
                          4u * 3 * 5 * 2,
                          3u * 5 * 96,
                          96u * static_cast<size_t>(good.row_capacity)};
  for (int i = 0; i < 7; ++i) {
    REQUIRE(parts[i] % 128 == 0);
    REQUIRE(parts[i + 1] >= parts[i] + sizes[i]);
    REQUIRE(parts[i + 1] < parts[i] + sizes[i] + 128);
  }
}

}  // namespace
}  // namespace ballast
