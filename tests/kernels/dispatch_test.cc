#include "kernels/dispatch.h"

#include <catch2/catch.hpp>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "kernels/matmul.h"

namespace ballast {
namespace {

// A random host table: every expert on one to three ranks.
struct Hosts {
  Hosts(int32_t num_experts, int32_t num_ranks, Random* random) {
    offsets.push_back(0);
    for (int32_t e = 0; e < num_experts; ++e) {
      const uint32_t first = random->Below(static_cast<uint32_t>(num_ranks));
      for (int32_t r = 0; r < num_ranks; ++r) {
        if (static_cast<uint32_t>(r) == first || random->Below(3) == 0) ranks.push_back(r);
      }
      offsets.push_back(static_cast<int32_t>(ranks.size()));
    }
    copies.assign(ranks.size(), 1);
    slots.assign(ranks.size(), 0);
    nodes.assign(static_cast<size_t>(num_ranks), 0);
    view = {num_experts, num_ranks, offsets, ranks, copies, slots, nodes};
  }
  std::vector<int32_t> offsets, ranks, copies, slots, nodes;
  LayerHosts view;
};

// A batch on one source rank, and shares that cut every expert's copies at random.
struct SourceBatch {
  SourceBatch(int32_t num_tokens, int32_t top_k, int32_t row_width, const Hosts& hosts,
              Random* random)
      : tokens(num_tokens), k(top_k), width(row_width) {
    const int32_t experts = hosts.view.num_experts;
    share.assign(hosts.ranks.size(), 0);
    for (int32_t t = 0; t < tokens; ++t) {
      std::vector<bool> used(static_cast<size_t>(experts));
      for (int32_t i = 0; i < k; ++i) {
        int32_t e;
        do {
          e = static_cast<int32_t>(random->Below(static_cast<uint32_t>(experts)));
        } while (used[e]);
        used[e] = true;
        ids.push_back(e);
        weights.push_back(static_cast<float>(1u << random->Below(3)) * 0.25f);
        const uint32_t num_hosts = static_cast<uint32_t>(hosts.offsets[e + 1] - hosts.offsets[e]);
        ++share[hosts.offsets[e] + random->Below(num_hosts)];
      }
      for (int32_t i = 0; i < width; ++i) {
        x.push_back(static_cast<float>(random->Below(17)) - 8.0f);
      }
    }
  }
  int32_t tokens, k, width;
  std::vector<int32_t> ids, share;
  std::vector<float> weights, x;
};

// An "expert" on exact integers: x -> (e + 1) * x + e.
float Apply(int32_t expert, float x) {
  return static_cast<float>(expert + 1) * x + static_cast<float>(expert);
}

using Message = std::vector<std::byte>;

std::vector<Message> PackAll(const SourceBatch& batch, const Route& route) {
  const size_t row_bytes = static_cast<size_t>(batch.width) * sizeof(float);
  std::vector<Message> messages(route.message.size());
  std::vector<std::span<std::byte>> out;
  for (size_t r = 0; r < messages.size(); ++r) {
    if (route.message[r].num_copies > 0) messages[r].resize(route.message[r].bytes(row_bytes));
    out.emplace_back(messages[r]);
  }
  cpu::Pack({.num_tokens = batch.tokens, .top_k = batch.k, .ids = batch.ids, .route = &route,
             .rows = std::as_bytes(std::span(batch.x)), .row_bytes = row_bytes, .out = out},
            nullptr);
  return messages;
}

absl::Status GroupAll(const std::vector<Message>& messages, const std::vector<int32_t>& groups,
                      int32_t num_groups, size_t row_bytes, Grouped* grouped, AlignedBuffer* x) {
  std::vector<std::span<const std::byte>> received(messages.begin(), messages.end());
  return cpu::Group({.received = received, .group_of_expert = groups, .num_groups = num_groups,
                     .row_bytes = row_bytes, .grouped = grouped, .x = x}, nullptr);
}

// What rank `rank` sends back to each source.
std::vector<Message> ComputeOnRank(int32_t rank, const Hosts& hosts,
                                   const std::vector<Message>& messages, int32_t width) {
  std::vector<int32_t> group_of(static_cast<size_t>(hosts.view.num_experts), -1), expert_of;
  for (int32_t e = 0; e < hosts.view.num_experts; ++e) {
    for (int32_t h = hosts.offsets[e]; h < hosts.offsets[e + 1]; ++h) {
      if (hosts.ranks[h] != rank) continue;
      group_of[e] = static_cast<int32_t>(expert_of.size());
      expert_of.push_back(e);
    }
  }
  Grouped grouped;
  AlignedBuffer x;
  REQUIRE(GroupAll(messages, group_of, static_cast<int32_t>(expert_of.size()),
                   static_cast<size_t>(width) * sizeof(float), &grouped, &x).ok());
  std::vector<float> y(x.size() / sizeof(float));
  for (size_t g = 0; g < expert_of.size(); ++g) {
    REQUIRE(grouped.group_begin[g] % kRowBlock == 0);
    REQUIRE(grouped.group_begin[g] + grouped.group_rows[g] <= grouped.group_begin[g + 1]);
    for (int32_t i = 0; i < grouped.group_rows[g] * width; ++i) {
      const size_t at = static_cast<size_t>(grouped.group_begin[g]) * width + i;
      y[at] = Apply(expert_of[g], x.as<float>()[at]);
    }
  }
  std::vector<Message> back;
  for (size_t s = 0; s < messages.size(); ++s) {
    const size_t copies =
        static_cast<size_t>(grouped.source_begin[s + 1] - grouped.source_begin[s]);
    back.emplace_back(copies * width * sizeof(float));
    cpu::PackResults({.grouped = &grouped, .source = static_cast<int32_t>(s), .y = y.data(),
                      .width = width, .type = DType::kF32, .out = back.back()}, nullptr);
  }
  return back;
}

TEST_CASE("dispatch and combine equal the dense definition on exact data",
          "[kernels][property]") {
  Random random(99);
  for (int round = 0; round < 60; ++round) {
    CAPTURE(round);
    const int32_t num_ranks = 1 + static_cast<int32_t>(random.Below(5));
    const int32_t num_experts = 3 + static_cast<int32_t>(random.Below(20));
    const int32_t top_k = 1 + static_cast<int32_t>(random.Below(3)), width = 5;
    const Hosts hosts(num_experts, num_ranks, &random);
    std::vector<SourceBatch> batches;
    std::vector<Route> routes(static_cast<size_t>(num_ranks));
    std::vector<std::vector<Message>> sent;  // [source][destination]
    for (int32_t s = 0; s < num_ranks; ++s) {
      const int32_t tokens = s == 0 ? 0 : static_cast<int32_t>(random.Below(40));
      batches.emplace_back(tokens, top_k, width, hosts, &random);
      const SourceBatch& b = batches.back();
      REQUIRE(cpu::AssignCopies({.num_tokens = b.tokens, .top_k = b.k, .ids = b.ids,
                                 .hosts = &hosts.view, .share = b.share, .route = &routes[s]},
                                nullptr).ok());
      sent.push_back(PackAll(b, routes[s]));
    }
    std::vector<std::vector<Message>> back;  // [destination][source]
    for (int32_t r = 0; r < num_ranks; ++r) {
      std::vector<Message> arrived;
      for (int32_t s = 0; s < num_ranks; ++s) arrived.push_back(sent[s][r]);
      back.push_back(ComputeOnRank(r, hosts, arrived, width));
    }
    for (int32_t s = 0; s < num_ranks; ++s) {
      const SourceBatch& b = batches[s];
      std::vector<std::span<const std::byte>> returned;
      for (int32_t r = 0; r < num_ranks; ++r) returned.emplace_back(back[r][s]);
      std::vector<float> base(b.x.size(), 3.0f), y(b.x.size());
      cpu::Combine({.num_tokens = b.tokens, .top_k = top_k, .width = width, .route = &routes[s],
                    .weights = b.weights, .returned = returned, .type = DType::kF32,
                    .base = base.data(), .out = y.data()}, nullptr);
      for (size_t i = 0; i < y.size(); ++i) {
        const size_t t = i / width;
        float want = 3.0f;
        for (size_t k = 0; k < static_cast<size_t>(top_k); ++k) {
          want += b.weights[t * top_k + k] * Apply(b.ids[t * top_k + k], b.x[i]);
        }
        REQUIRE(y[i] == want);
      }
    }
  }
}

TEST_CASE("a row goes once to each rank that needs it", "[kernels][unit]") {
  Random random(1);
  const Hosts hosts(6, 1, &random);
  const std::vector<int32_t> ids = {0, 3, 5, 5, 1, 2}, share = {1, 1, 1, 1, 0, 2};
  Route route;
  REQUIRE(cpu::AssignCopies({.num_tokens = 2, .top_k = 3, .ids = ids, .hosts = &hosts.view,
                             .share = share, .route = &route}, nullptr).ok());
  REQUIRE(route.message[0].num_rows == 2);
  REQUIRE(route.message[0].num_copies == 6);
  REQUIRE(route.copy_index == std::vector<int32_t>{0, 1, 2, 3, 4, 5});
}

// Where the rows travel by other means: the same entries, and the same places by expert.
TEST_CASE("messages of rows of no bytes carry the entries alone", "[kernels][unit]") {
  Random random(8);
  const Hosts hosts(5, 1, &random);
  const SourceBatch with_rows(7, 3, 4, hosts, &random);
  SourceBatch without = with_rows;
  without.width = 0;
  without.x.clear();
  Route route;
  REQUIRE(cpu::AssignCopies({.num_tokens = 7, .top_k = 3, .ids = with_rows.ids,
                             .hosts = &hosts.view, .share = with_rows.share, .route = &route},
                            nullptr)
              .ok());
  const std::vector<Message> whole = PackAll(with_rows, route), bare = PackAll(without, route);
  REQUIRE(bare[0].size() == route.message[0].rows_offset());
  REQUIRE(std::equal(bare[0].begin(), bare[0].end(), whole[0].begin()));
  const std::vector<int32_t> groups = {0, 1, 2, 3, 4};
  Grouped of_whole, of_bare;
  AlignedBuffer x, none;
  REQUIRE(GroupAll(whole, groups, 5, 4 * sizeof(float), &of_whole, &x).ok());
  REQUIRE(GroupAll(bare, groups, 5, 0, &of_bare, &none).ok());
  REQUIRE(of_bare.position == of_whole.position);
  REQUIRE(of_bare.group_rows == of_whole.group_rows);
  REQUIRE(none.size() == 0);
}

TEST_CASE("shares below the copies are refused by the expert's name", "[kernels][errors]") {
  Random random(1);
  const Hosts hosts(4, 1, &random);
  const std::vector<int32_t> ids = {2, 2}, share = {0, 0, 1, 0};
  Route route;
  const absl::Status status = cpu::AssignCopies(
      {.num_tokens = 2, .top_k = 1, .ids = ids, .hosts = &hosts.view, .share = share,
       .route = &route}, nullptr);
  REQUIRE(status.code() == absl::StatusCode::kInvalidArgument);
  REQUIRE(std::string(status.message()).find("expert 2") != std::string::npos);
}

TEST_CASE("messages that lie are refused by the sender's name", "[kernels][errors]") {
  Random random(5);
  const Hosts hosts(8, 1, &random);
  const SourceBatch batch(4, 2, 3, hosts, &random);
  Route route;
  REQUIRE(cpu::AssignCopies({.num_tokens = 4, .top_k = 2, .ids = batch.ids, .hosts = &hosts.view,
                             .share = batch.share, .route = &route}, nullptr).ok());
  const Message good = PackAll(batch, route)[0];
  std::vector<int32_t> groups = {0, 1, 2, 3, 4, 5, 6, 7};
  Grouped grouped;
  AlignedBuffer x;
  const auto run = [&](const Message& message) {
    return GroupAll({{}, {}, message}, groups, 8, 12, &grouped, &x);
  };
  REQUIRE(run(good).ok());
  const auto with = [&](size_t at, uint32_t value) {
    Message message = good;
    std::memcpy(message.data() + at, &value, 4);
    return message;
  };
  const size_t entry = DispatchMessage::kEntriesOffset;
  std::vector<Message> bad = {with(0, 5),           with(0, 0xffffffff), with(4, 17),
                              with(4, 0xffffffff),  with(entry, 4),      with(entry, 0xffffffff),
                              with(entry + 4, 8),   with(entry + 4, 0xffffffff)};
  bad.emplace_back(good.begin(), good.end() - 1);
  bad.emplace_back(good.begin(), good.begin() + 7);
  bad.push_back(good);
  bad.back().push_back(std::byte{0});
  for (size_t i = 0; i < bad.size(); ++i) {
    CAPTURE(i);
    const absl::Status status = run(bad[i]);
    REQUIRE(status.code() == absl::StatusCode::kInternal);
    REQUIRE(std::string(status.message()).find("rank 2") != std::string::npos);
  }
  groups[batch.ids[0]] = -1;
  REQUIRE(run(good).code() == absl::StatusCode::kInternal);
}

TEST_CASE("combine adds in the order of k", "[kernels][unit]") {
  // 1 + 2^24 - 2^24 in fp32 is 0 in this order and 1 in the other.
  const float rows[2] = {16777216.0f, -16777216.0f};
  Route route{.copy_rank = {0, 0}, .copy_index = {0, 1}, .message = {{1, 2}}};
  const std::span<const std::byte> returned[] = {std::as_bytes(std::span(rows))};
  const std::vector<float> weights = {1.0f, 1.0f};
  const float base = 1.0f;
  float out = -1.0f;
  cpu::Combine({.num_tokens = 1, .top_k = 2, .width = 1, .route = &route, .weights = weights,
                .returned = returned, .type = DType::kF32, .base = &base, .out = &out}, nullptr);
  REQUIRE(out == 0.0f);
}

TEST_CASE("results travel rounded to the type of the activations", "[kernels][unit]") {
  Grouped grouped;
  grouped.source_begin = {0, 1};
  grouped.position = {0};
  const float y[2] = {1.0f + 0x1.0p-9f, -3.0f};
  std::vector<std::byte> out(4);
  cpu::PackResults({.grouped = &grouped, .source = 0, .y = y, .width = 2, .type = DType::kBF16,
                    .out = out}, nullptr);
  uint16_t bits[2];
  std::memcpy(bits, out.data(), 4);
  REQUIRE(bits[0] == 0x3f80);
  REQUIRE(bits[1] == 0xc040);
}

}  // namespace
}  // namespace ballast
