#ifndef BALLAST_DEPLOY_DEMO_DRIVER_REPORT_H_
#define BALLAST_DEPLOY_DEMO_DRIVER_REPORT_H_

#include <string>

#include "deploy/demo/driver/measures.h"
#include "deploy/demo/driver/run_record.h"

namespace ballast {

// The load of each rank over the time of one run as an SVG image: one row per rank, one column per
// slice of time; the colour is the rank's load / mean in its hottest layer. Lines mark the phases,
// triangles the steps at which a new epoch came into force.
std::string HeatMapSvg(const RunRecord& run);

// A page that needs nothing else: a summary, the table, both heat maps.
std::string ReportHtml(const RunRecord& fixed, const RunRecord& dynamic,
                       const Comparison& comparison);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_DEMO_DRIVER_REPORT_H_
