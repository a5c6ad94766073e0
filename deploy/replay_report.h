#ifndef BALLAST_DEPLOY_REPLAY_REPORT_H_
#define BALLAST_DEPLOY_REPLAY_REPORT_H_

#include <string>
#include <vector>

#include "placement/replay.h"

namespace ballast {

// The predicted times of a replay with a cluster, a row per figure under a row of headings.
std::vector<std::vector<std::string>> PredictedTable(const ReplayResult& result);

// How many steps a trace has, and of how many tokens: counts tell that with top_k only.
std::string StepsText(const StepTrace& trace, bool of_counts);

// One HTML page that needs nothing else: the final table, imbalance and copies over time, cost over
// rho, and imbalance per layer, as SVG. `steps` is the text of StepsText.
std::string ReplayReport(const std::string& steps, const StepTrace& trace,
                         const ReplayOptions& options, const ReplayResult& result);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_REPLAY_REPORT_H_
