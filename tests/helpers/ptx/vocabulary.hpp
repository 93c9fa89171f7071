// What a kernel is made of and what a launch is told and tells: machine.py and assembler.py have the same structs.

#pragma once

#include <cstdint>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

// clang-format off
#define OPERATIONS(X)                                                                                              \
    X(nop) X(mov) X(pack) X(unpack) X(add) X(sub) X(mul) X(mul_hi) X(mul_wide) X(mad) X(mad_hi) X(mad_wide) X(fma) \
    X(div) X(rem) X(min) X(max) X(abs) X(neg) X(and) X(or) X(xor) X(not) X(shl) X(shr) X(shf_l_wrap) X(shf_r_wrap) \
    X(shf_l_clamp) X(shf_r_clamp) X(prmt) X(dp2a_lo) X(dp2a_hi) X(dp4a) X(bfi) X(bfe) X(lop3) X(popc) X(clz)       \
    X(brev) X(rcp) X(sqrt) X(setp) X(selp) X(cvt) X(isspacep) X(ld) X(st) X(cp_async) X(cp_commit) X(cp_wait)      \
    X(shfl) X(bar_sync) X(bar_warp) X(bra) X(exit) X(trap)
// clang-format on
#define TYPES(X) X(u8) X(s8) X(u16) X(s16) X(u32) X(s32) X(u64) X(s64) X(f32) X(f64) X(pred)
#define SPACES(X) X(generic) X(global) X(shared) X(param)
#define COMPARISONS(X) X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan)
#define ROUNDINGS(X) X(none) X(rn) X(rzi) X(rni) X(rmi) X(rpi)
#define SHUFFLES(X) X(idx) X(up) X(down) X(bfly)
#define NAME_E(name) E_##name,
#define NAME_T(name) T_##name,
#define NAME_S(name) S_##name,
#define NAME_C(name) C_##name,
#define NAME_R(name) R_##name,
#define NAME_H(name) H_##name,
#define WORD(name) #name " "
enum Operation { OPERATIONS(NAME_E) };
enum Type { TYPES(NAME_T) };
enum Space { SPACES(NAME_S) };
enum Comparison { COMPARISONS(NAME_C) };
enum Rounding { ROUNDINGS(NAME_R) };
enum Shuffle { SHUFFLES(NAME_H) };
extern "C" const char *const ptx_operations = OPERATIONS(WORD), *const ptx_types = TYPES(WORD),
                             *const ptx_spaces = SPACES(WORD), *const ptx_comparisons = COMPARISONS(WORD),
                             *const ptx_roundings = ROUNDINGS(WORD), *const ptx_shuffles = SHUFFLES(WORD);

struct Instruction {
    // join: setp's and, or, xor; 0 is none. flush: numbers of float32 that are too small to be normal are 0.
    u8 operation, type, from, space, mode, join, count, negated, flush;
    int32_t guard, target;  // register, or -1; index of an instruction
    int32_t to[4], of[5];   // registers
    int64_t offset;         // of an address
};
struct Region {
    u64 begin, bytes;
    u64 writable;
};
struct Launch {
    u32 grid[3], block[3];
    u32 static_shared, dynamic_shared;
    u64 seed, limit;  // issues of all warps
    const u8* params;
};
struct Counts {  // of an instruction
    u64 issues, lanes;
    u64 sectors;             // of global memory, asked for
    u64 wavefronts, fewest;  // of shared memory; if no two lanes wanted the same bank
};
struct Totals {
    u64 barriers;        // that blocks came to
    u64 most_in_flight;  // bytes that a block's threads had each asked for asynchronously and not waited for
    u64 sectors_read, sectors_written;  // of global memory, each counted once
};
