#include "tests/serve/prompts.h"

#include <catch2/catch.hpp>
#include <string>

#include "base/random.h"

namespace ballast::testing {

std::vector<nlohmann::json> MixedRequests(int count, int longest_answer) {
  constexpr uint64_t kSeed = 20'240'607;
  constexpr uint64_t kLongestPrompt = 300;
  std::vector<std::string> texts;
  for (const char* name : {"code", "english", "japanese", "structured"}) {
    texts.push_back(
        ReadText(std::string(BALLAST_SOURCE_DIR "/deploy/demo/prompts/") + name + ".txt"));
    REQUIRE(texts.back().size() > kLongestPrompt);
  }
  std::vector<nlohmann::json> requests;
  for (int i = 0; i < count; ++i) {
    const auto draw = [&](int what, uint64_t limit) {
      return RandomBits(kSeed, static_cast<uint64_t>(i) * 8 + static_cast<uint64_t>(what)) % limit;
    };
    const std::string& text = texts[static_cast<size_t>(i) % texts.size()];
    const uint64_t length = 1 + draw(0, kLongestPrompt);
    const uint64_t begin = draw(1, text.size() - length);
    // The tokens of the demo model are bytes, so a cut may fall inside a character.
    nlohmann::json prompt = nlohmann::json::array();
    for (uint64_t at = begin; at < begin + length; ++at) {
      prompt.push_back(static_cast<unsigned char>(text[at]));
    }
    requests.push_back({{"prompt", std::move(prompt)},
                        {"max_tokens", 1 + draw(2, static_cast<uint64_t>(longest_answer))},
                        {"temperature", i % 2 == 0 ? 0.0 : 1.0},
                        {"seed", 1000 + i},
                        {"return_token_ids", true}});
  }
  return requests;
}

Reference::Reference(int count, int longest_answer, int concurrency)
    : requests_(MixedRequests(count, longest_answer)) {
  Server plain(1, {"--policy", "static"});
  answers_ = CompleteAll(plain, requests_, concurrency);
  for (const Answer& answer : answers_) REQUIRE(answer.status == 200);
  REQUIRE(plain.Stop() == 0);
}

int Reference::Wrong(const std::vector<Answer>& given) const {
  REQUIRE(given.size() == answers_.size());
  int wrong = 0;
  for (size_t i = 0; i < answers_.size(); ++i) {
    wrong += given[i].status != 200 || given[i].ids() != answers_[i].ids();
  }
  return wrong;
}

}  // namespace ballast::testing
