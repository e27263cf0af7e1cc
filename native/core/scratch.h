// Working memory of one call. The last block given back is kept for the next call, up to a limit, because fresh pages
// cost more than a small attention does.
#pragma once

#include <stddef.h>

namespace tilewise {

class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    void *memory() const { return memory_; } // aligned to 64 bytes; NULL where there was none to have

  private:
    void *memory_;
    size_t bytes_;
};

} // namespace tilewise
