// What the CUDA sources share: the tile of a block, and lines of bytes on their way from global to shared memory.
// cuda_source.py puts this before a kernel's own text, and before this what it generates: `struct Tile` from tile.TILE,
// and the constants that the kernel shares with its launcher.

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

typedef unsigned char byte;

// An address in shared memory, in one register: a pointer is two, and the compiler makes it anew at each use. Not in
// the unnamed namespace, as no source uses all of this.
#ifdef __CUDA_ARCH__
typedef unsigned Shared;

__device__ inline Shared shared_of(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
__device__ inline unsigned low_bits(Shared at) { return at; }

// Keep a value in a register, where the compiler would make it anew at each use.
__device__ inline void hold(unsigned& value) { asm volatile("" : "+r"(value)); }
__device__ inline void hold(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void hold(const byte*& pointer) { asm volatile("" : "+l"(pointer)); }

__device__ inline void load(Shared at, unsigned& value) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
}
__device__ inline void load(Shared at, unsigned short& value) {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at) : "memory");
}
__device__ inline unsigned load_byte(Shared at) {
    unsigned value;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    return value;
}
__device__ inline void load(Shared at, unsigned char& value) { value = (unsigned char)load_byte(at); }
__device__ inline void load(Shared at, uint2& value) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(at) : "memory");
}
__device__ inline void load(Shared at, uint4& value) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(at)
                 : "memory");
}
__device__ inline void store(Shared at, unsigned value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
__device__ inline void store(Shared at, unsigned short value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(value) : "memory");
}
__device__ inline void store_byte(Shared at, unsigned value) {
    asm volatile("st.shared.u8 [%0], %1;" ::"r"(at), "r"(value) : "memory");
}
__device__ inline void store(Shared at, unsigned char value) { store_byte(at, value); }
__device__ inline void store(Shared at, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}
#else
typedef byte* Shared;

inline Shared shared_of(const void* pointer) { return (Shared)pointer; }
inline unsigned low_bits(Shared at) { return (unsigned)(size_t)at; }
inline unsigned load_byte(Shared at) { return *at; }
inline void store_byte(Shared at, unsigned value) { *at = (byte)value; }
template <typename T>
void hold(T&) {}
template <typename T>
void load(Shared at, T& value) {
    value = *(const T*)at;
}
template <typename T>
void store(Shared at, T value) {
    *(T*)at = value;
}
#endif

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

__device__ inline void copy_async(Shared shared, const uint4* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
#else
    store(shared, *global);
#endif
}

__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Start to copy vectors of 16 bytes, STEP bytes apart within SPAN bytes, those of them that begin before `bytes`.
template <int STEP, int SPAN>
__device__ inline void copy_vectors(Shared to, const byte* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
    for (int i = 0; i < SPAN; i += STEP) {
        if (i < bytes) copy_async(to + i, (const uint4*)(from + i));
    }
#else  // all are on their way before one is waited for
    uint4 vectors[(SPAN + STEP - 1) / STEP];
#pragma unroll
    for (int i = 0; i < SPAN; i += STEP) {
        if (i < bytes) vectors[i / STEP] = *(const uint4*)(from + i);
    }
#pragma unroll
    for (int i = 0; i < SPAN; i += STEP) {
        if (i < bytes) store(to + i, vectors[i / STEP]);
    }
#endif
}

// Start to copy `bytes` bytes from `begin` on to `line` and its lead, sixteen at a time, by `threads` threads. Vectors
// that reach beyond [first, end), what may be read, are copied byte by byte.
__device__ inline void stage_line(Shared line, const byte* begin, int bytes, const byte* first, const byte* end,
                                  int thread, int threads) {
    const int lead = lead_of(begin), low = (int)(first - begin), high = (int)(end - begin);
#pragma unroll 1
    for (int at = 16 * thread - lead; at < bytes; at += 16 * threads) {
        if (at >= low && at + 16 <= high) {
            copy_async(line + lead + at, (const uint4*)(begin + at));
        } else {
#pragma unroll 1
            for (int i = max(at, low); i < min(at + 16, high); i++) store(line + lead + i, begin[i]);
        }
    }
}

}  // namespace
