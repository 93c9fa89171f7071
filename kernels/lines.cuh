// What the CUDA sources share: the tile of a block, and lines of bytes on their way from global to shared memory.
// cuda_source.py puts this before a kernel's own text, and before this what it generates: `struct Tile` from tile.TILE,
// and the constants that the kernel shares with its launcher.

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

typedef unsigned char byte;

namespace {

// Fetch the tile that this block works on, by all of the block's `threads` threads; `thread` is which one calls. It
// lives in shared memory: a register that keeps one of its fields all along is one that a further block cannot have.
__device__ inline void fetch_tile(Tile& tile, const Tile* tiles, const unsigned* tile_of_block, int thread,
                                  int threads) {
    const int* from = (const int*)(tiles + tile_of_block[blockIdx.x]);
    for (int i = thread; i < (int)(sizeof(Tile) / 4); i += threads) ((int*)&tile)[i] = from[i];
    __syncthreads();
}

// A staged line begins as far from a multiple of 16 bytes as the line in global memory.
__device__ inline int lead_of(const void* address) { return (int)((size_t)address & 15); }

__device__ inline void copy_async(uint4* shared, const uint4* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
                 "l"(global));
#else
    *shared = *global;
#endif
}

__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Start to copy `bytes` bytes from `begin` on to `line` and its lead, sixteen at a time, by `threads` threads. Vectors
// that reach beyond [first, end), what may be read, are copied byte by byte.
__device__ inline void stage_line(byte* line, const byte* begin, int bytes, const byte* first, const byte* end,
                                  int thread, int threads) {
    const int lead = lead_of(begin), low = (int)(first - begin), high = (int)(end - begin);
#pragma unroll 1
    for (int at = 16 * thread - lead; at < bytes; at += 16 * threads) {
        if (at >= low && at + 16 <= high) {
            copy_async((uint4*)(line + lead + at), (const uint4*)(begin + at));
        } else {
#pragma unroll 1
            for (int i = max(at, low); i < min(at + 16, high); i++) line[lead + i] = begin[i];
        }
    }
}

}  // namespace
