// Judges the default policy on traffic drawn from recorded routing (ctest judges a sample):
//   judge FOLDER_OF_TRACES
#include <iostream>

#include "tests/placement/judgement.h"

namespace ballast::testing {
namespace {

absl::Status Judge(const std::string& folder) {
  BALLAST_ASSIGN_OR_RETURN(const std::vector<NamedArray> tasks, ReadTasks(folder));
  bool good = true;
  for (const NamedArray& task : tasks) {
    BALLAST_ASSIGN_OR_RETURN(const double copies, CopiesWhenStationary(task, 300));
    std::cout << "stationary " << task.name << ": " << copies
              << " copies per layer-step after 50 steps, allowed 0.02\n";
    good = good && copies <= 0.02;
  }
  std::cout << "24 phases of 100 steps, 512 tokens, 8 ranks, 72 slots, exact split:\n";
  BALLAST_ASSIGN_OR_RETURN(const Verdict verdict,
                           JudgeAgainstOthers(DrawPhases(tasks, 24, 100, /*seed=*/1),
                                              {0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0}));
  std::cout << verdict.table << "worst ratio " << verdict.worst << ", allowed 1.05\n";
  good = good && verdict.worst <= 1.05;
  return good ? absl::OkStatus() : absl::FailedPreconditionError("the policy is not good enough");
}

}  // namespace
}  // namespace ballast::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: judge FOLDER_OF_TRACES\n";
    return 2;
  }
  const absl::Status status = ballast::testing::Judge(argv[1]);
  if (!status.ok()) std::cerr << "judge: " << status.message() << "\n";
  return status.ok() ? 0 : 1;
}
