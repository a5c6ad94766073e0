// Flags of `serve` that change nothing: nobody should wait for an effect that cannot come.
#ifndef BALLAST_DEPLOY_IDLE_FLAGS_H_
#define BALLAST_DEPLOY_IDLE_FLAGS_H_

#include <string>
#include <vector>

#include "deploy/serve.h"
#include "placement/policy.h"

namespace ballast {

// What was set to something else than its default and has no effect beside the other flags, a
// sentence each: "--rho has no effect with --policy eplb, which does not weigh what a move costs".
// REQUIRES policy is the one that the flags name
std::vector<std::string> IdleFlags(const ServeFlags& flags, const Policy& policy);

}  // namespace ballast

#endif  // BALLAST_DEPLOY_IDLE_FLAGS_H_
