#include "placement/policy.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace ballast {

// One declaration and one call for each file of placement/policies/, whose list the build writes.
#define BALLAST_POLICY_FILE(stem) std::vector<PolicyFamily> PoliciesIn_##stem();
#include "placement/policy_files.inc"
#undef BALLAST_POLICY_FILE

namespace {

std::vector<PolicyFamily> AllPolicies() {
  std::vector<PolicyFamily> all;
#define BALLAST_POLICY_FILE(stem) \
  for (const PolicyFamily& family : PoliciesIn_##stem()) all.push_back(family);
#include "placement/policy_files.inc"
#undef BALLAST_POLICY_FILE
  return all;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Policy>> MakePolicy(const std::string& name) {
  const size_t colon = name.find(':');
  const bool has_argument = colon != std::string::npos;
  for (const PolicyFamily& family : AllPolicies()) {
    if (name.substr(0, colon) != family.name) continue;
    const bool wants_argument = !family.argument.empty();
    if (has_argument == wants_argument) {
      return family.make(has_argument ? name.substr(colon + 1) : "");
    }
  }
  std::string choices;
  for (const std::string& known : PolicyNames()) {
    absl::StrAppend(&choices, choices.empty() ? "" : ", ", known);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown policy '", name, "'; the choices are ", choices));
}

std::vector<std::string> PolicyNames() {
  std::vector<std::string> names;
  for (const PolicyFamily& family : AllPolicies()) {
    names.push_back(family.argument.empty() ? family.name
                                            : absl::StrCat(family.name, ":", family.argument));
  }
  return names;
}

}  // namespace ballast
