// What `serve` and `replay` let a user say of the controller, in the same words.
#ifndef BALLAST_DEPLOY_CONTROLLER_FLAGS_H_
#define BALLAST_DEPLOY_CONTROLLER_FLAGS_H_

#include <CLI/App.hpp>
#include <cstdint>
#include <string>

#include "placement/controller.h"
#include "placement/rules.h"

namespace ballast {

struct ControllerFlags {
  std::string windows = "separate";
  int64_t window_tokens = 8192;
  int64_t batch_tokens = 1;
  double min_gain = 0.02;
  int32_t min_steps_between = 0;
  PlacementRules rules = {};

  // The controller's defaults with these in their places.
  ControllerOptions Options() const;
};

// UNITS as in ControllerOptions
void AddControllerFlags(CLI::App* app, const char* group, ControllerFlags* f);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_CONTROLLER_FLAGS_H_
