// Requests of mixed kind and length, the same in every run.
#ifndef BALLAST_TESTS_SERVE_PROMPTS_H_
#define BALLAST_TESTS_SERVE_PROMPTS_H_

#include <nlohmann/json.hpp>
#include <vector>

namespace ballast::testing {

// Half of them at temperature 0, half sampled, all with a seed of their own; prompts of 1 to 300
// tokens cut from the demo's texts, answers of 1 to `longest_answer` tokens.
std::vector<nlohmann::json> MixedRequests(int count, int longest_answer);

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SERVE_PROMPTS_H_
