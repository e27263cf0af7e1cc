// What both passes ask before they start.
#pragma once

#include "core/kernel_table.h"

namespace tilewise {

constexpr double serial_operations = 4e6; // below about 50 microseconds, waking threads costs more than it brings

// The kernels of the page in use for a sound problem; NULL, with *status and *message set, otherwise.
const tw_kernels *kernels_for(const tw_problem &p, int *status, const char **message);

} // namespace tilewise
