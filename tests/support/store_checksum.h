// What a store holds of an expert now.
#ifndef BALLAST_TESTS_SUPPORT_STORE_CHECKSUM_H_
#define BALLAST_TESTS_SUPPORT_STORE_CHECKSUM_H_

#include <cstdint>

#include "base/check.h"
#include "runtime/expert_store.h"

namespace ballast::testing {

// REQUIRES the store holds it
inline uint64_t ChecksumOf(const ExpertStore& store, int32_t layer, int32_t expert) {
  BlockMemory::Reading reading{.block = store.BlockOf(layer, expert)};
  BALLAST_CHECK(reading.block >= 0);
  while (true) {
    const auto done = store.Advance(&reading);
    BALLAST_CHECK(done.ok());
    if (*done) return reading.checksum;
  }
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_SUPPORT_STORE_CHECKSUM_H_
