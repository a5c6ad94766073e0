// The contract of transparency, seen from outside: the same tokens whatever the server is made of.
#include <catch2/catch.hpp>

#include "tests/serve/prompts.h"
#include "tests/serve/server.h"

namespace ballast::testing {
namespace {

struct Variant {
  int ranks;
  std::vector<std::string> flags;
  bool moves = false;  // experts are copied while it serves
};

TEST_CASE("token ids do not depend on ranks placement or chunks", "[serve]") {
  const std::string dtype = GENERATE("auto", "fp32");
  constexpr int kConcurrency = 8;
  const std::vector<nlohmann::json> requests = MixedRequests(24, 48);
  std::vector<std::vector<int32_t>> expected;
  {
    Server plain(1, {"--dtype", dtype, "--policy", "static"});
    // One at a time: nothing else is in the batch.
    for (const nlohmann::json& request : requests) {
      const Answer answer = plain.Complete(request);
      REQUIRE(answer.status == 200);
      expected.push_back(answer.ids());
    }
  }
  const Variant variants[] = {
      {1, {"--policy", "static", "--prefill-chunk", "16"}},
      {2, {"--policy", "static", "--prefill-chunk", "256"}},
      {2, {"--policy", "eplb", "--rebalance-every", "20", "--prefill-chunk", "16"}, true},
      {4, {"--policy", "static", "--prefill-chunk", "16"}},
      {4, {"--policy", "eplb", "--rebalance-every", "20", "--prefill-chunk", "256"}, true},
  };
  for (const Variant& variant : variants) {
    std::vector<std::string> flags = variant.flags;
    flags.insert(flags.end(), {"--dtype", dtype});
    Server server(variant.ranks, flags);
    const int64_t epoch = server.Epoch();
    const std::vector<Answer> answers = CompleteAll(server, requests, kConcurrency);
    for (size_t i = 0; i < requests.size(); ++i) {
      INFO("dtype " << dtype << ", " << variant.ranks << " ranks, " << flags[1] << ", chunk "
                    << flags[flags.size() - 3] << ", request " << i << ": " << answers[i].body);
      REQUIRE(answers[i].status == 200);
      REQUIRE(answers[i].ids() == expected[i]);
    }
    REQUIRE((server.Epoch() > epoch) == variant.moves);
  }
}

}  // namespace
}  // namespace ballast::testing
