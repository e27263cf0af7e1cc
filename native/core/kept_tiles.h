// The tile registers of AMX over code that may use them itself: their shape and contents are a thread's.
#pragma once

#include "core/scratch.h"

namespace tilewise {

// Keeps those of this thread while it lives, and puts them back. Does nothing where no page uses tile registers.
class KeptTiles {
  public:
    KeptTiles();
    ~KeptTiles();
    KeptTiles(const KeptTiles &) = delete;
    KeptTiles &operator=(const KeptTiles &) = delete;

  private:
    size_t bytes_; // 0: nothing to keep
    Scratch area_;
};

} // namespace tilewise
