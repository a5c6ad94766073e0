// Requests of mixed kind and length, the same in every run.
#ifndef BALLAST_TESTS_SERVE_PROMPTS_H_
#define BALLAST_TESTS_SERVE_PROMPTS_H_

#include <nlohmann/json.hpp>
#include <vector>

#include "tests/serve/server.h"

namespace ballast::testing {

// Half of them at temperature 0, half sampled, all with a seed of their own; prompts of 1 to 300
// tokens cut from the demo's texts, answers of 1 to `longest_answer` tokens.
std::vector<nlohmann::json> MixedRequests(int count, int longest_answer);

// MixedRequests, and what a rank answers to them alone, `concurrency` at a time.
class Reference {
 public:
  Reference(int count, int longest_answer, int concurrency);
  const std::vector<nlohmann::json>& requests() const { return requests_; }
  // How many of the answers to requests() are missing or differ.
  int Wrong(const std::vector<Answer>& given) const;

 private:
  std::vector<nlohmann::json> requests_;
  std::vector<Answer> answers_;
};

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SERVE_PROMPTS_H_
