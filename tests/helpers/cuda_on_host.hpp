// Lets a C++ compiler build a CUDA kernel: blocks run one after the other, the threads of a block as threads of the
// host or, if there is one alone, as a plain call. Enough for the kernels here, and no more.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) uint4* const name = host::dynamic_shared

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct dim3 {
    unsigned x, y;
};

namespace host {
inline std::mutex one_at_a_time;  // what blocks share is the process's, and a pipeline's thread may launch as well
inline uint4* dynamic_shared;
inline std::barrier<>* threads_of_block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;  // each a row of the block's threads
}  // namespace host

inline thread_local struct {
    int x, y;
} threadIdx;
inline struct {
    unsigned x;
} blockIdx;

inline void __syncthreads() {
    if (host::threads_of_block) host::threads_of_block->arrive_and_wait();
}
inline void __syncwarp() {
    if (host::threads_of_block) host::warps[threadIdx.y]->arrive_and_wait();
}
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline void __stcs(uint4* to, uint4 value) { *to = value; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)((((unsigned long long)high << 32) | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned long long bytes = ((unsigned long long)b << 32) | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}
inline unsigned __dp2a_lo(unsigned a, unsigned b, unsigned c) {
    return c + (a & 65535) * (b & 255) + (a >> 16) * (b >> 8 & 255);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
inline unsigned __dp2a_hi(unsigned a, unsigned b, unsigned c) { return __dp2a_lo(a, b >> 16, c); }

namespace host {
// Launch `kernel(arguments...)` with `blocks` blocks of `across` x `down` threads and dynamic shared memory of exactly
// `bytes` bytes, so that an address sanitizer sees what lies beyond.
template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, int across, int down, int bytes, Kernel kernel, Arguments... arguments) {
    const std::lock_guard lock(one_at_a_time);
    std::vector<uint4> memory(bytes / sizeof(uint4));
    dynamic_shared = memory.data();
    if (across * down == 1) {
        threads_of_block = nullptr;
        threadIdx = {0, 0};
        for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) kernel(arguments...);
        return;
    }
    std::barrier<> barrier(across * down);
    threads_of_block = &barrier;
    warps.clear();
    for (int i = 0; i < down; i++) warps.push_back(std::make_unique<std::barrier<>>(across));
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::vector<std::thread> threads;
        for (int i = 0; i < across * down; i++) {
            threads.emplace_back([=] {
                threadIdx = {i % across, i / across};
                kernel(arguments...);
            });
        }
        for (std::thread& thread : threads) thread.join();
    }
    threads_of_block = nullptr;
}
}  // namespace host
