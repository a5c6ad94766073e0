// What the fuzzer feeds with broken input, and what must hold whatever comes.
#ifndef BALLAST_TESTS_FUZZ_TARGETS_H_
#define BALLAST_TESTS_FUZZ_TARGETS_H_

#include <functional>
#include <string>
#include <vector>

#include "base/random.h"

namespace ballast::fuzz {

// One parser. `check` must neither crash nor read outside the input (a sanitizer tells), and
// returns what is wrong with the outcome, or "": either the input is taken, and the invariants of
// what it became hold, or it is refused with kInvalidArgument and a message that names the input.
struct Target {
  std::string name;
  std::vector<std::string> seeds;  // well-formed inputs; mutations of them are tried
  std::function<std::string(const std::string& input, Random& random)> check;
};

// Every target. `folder` is for inputs that a parser reads from a file.
std::vector<Target> MakeTargets(const std::string& folder);

// A few random edits of `input`: bytes changed, cut out, doubled, moved, or replaced by words that
// parsers trip over. `other` lends a part of itself.
std::string Mutate(const std::string& input, const std::string& other, Random& random);

}  // namespace ballast::fuzz

#endif  // BALLAST_TESTS_FUZZ_TARGETS_H_
