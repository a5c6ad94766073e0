// Rows grouped by expert, for tests of the grouped MLPs.
#ifndef BALLAST_TESTS_GPU_RANDOM_GROUPS_H_
#define BALLAST_TESTS_GPU_RANDOM_GROUPS_H_

#include <cstdint>
#include <vector>

#include "base/random.h"

namespace ballast::testing {

inline constexpr int kPoison = 0xa5;  // what a DeviceArray begins with

struct Group {
  int32_t begin, rows, block;
};

// The same as the tables that kernels read.
struct GroupTables {
  std::vector<int32_t> begin, rows, block;
  explicit GroupTables(const std::vector<Group>& groups) {
    for (const Group& g : groups) {
      begin.push_back(g.begin);
      rows.push_back(g.rows);
      block.push_back(g.block);
    }
  }
};

// Groups one after the other, some of them empty; the last rows belong to none.
inline std::vector<Group> RandomGroups(int32_t most_rows, int32_t num_blocks, Random* random,
                                       int32_t* num_rows) {
  std::vector<Group> groups;
  int32_t begin = 0;
  const uint32_t count = 1 + random->Below(9);
  for (uint32_t g = 0; g < count; ++g) {
    int32_t rows = static_cast<int32_t>(random->Below(static_cast<uint32_t>(most_rows) + 1));
    if (random->Below(3) == 0) rows = static_cast<int32_t>(random->Below(2));
    const auto block = static_cast<int32_t>(random->Below(static_cast<uint32_t>(num_blocks)));
    groups.push_back({begin, rows, block});
    begin += rows + static_cast<int32_t>(random->Below(4));
  }
  *num_rows = begin + 3;
  return groups;
}

}  // namespace ballast::testing

#endif  // BALLAST_TESTS_GPU_RANDOM_GROUPS_H_
