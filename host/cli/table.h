// Plain text tables.
#ifndef QUANTMILL_HOST_CLI_TABLE_H_
#define QUANTMILL_HOST_CLI_TABLE_H_

#include <cstdint>
#include <string>
#include <vector>

namespace quantmill {

// Columns as wide as their widest cell, two spaces between them; the first row is the head and gets
// a line below it. Cells of columns in `right` are flush right.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows,
                        const std::vector<size_t>& right = {});

// "17.2 MB", "512 B": powers of 1000, as disks count.
std::string FormatBytes(int64_t bytes);

}  // namespace quantmill

#endif  // QUANTMILL_HOST_CLI_TABLE_H_
