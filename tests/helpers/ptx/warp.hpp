// A warp: its registers, and the instructions that need nothing else.

#pragma once

#include <vector>

#include "memory.hpp"

namespace {

struct Copy {
    u64 to, from;
    u32 bytes, zeros;
    int group;
};

enum State : u8 { RUNS, WAITS, MEETS, ENDED };  // meets: waits for the lanes of its warp

struct Warp {
    const u8* register_bits;
    std::vector<u64> values, unknowns;  // [registers][LANES]; unknown: bits that depend on what nobody wrote
    int at[LANES];
    State state[LANES];
    u32 first, lanes, meetings;
    std::vector<Copy> copies[LANES];
    int groups[LANES];
    u64 in_flight[LANES], most_in_flight[LANES];  // bytes of its copies

    u64& value(int reg, int lane) { return values[(size_t)reg * LANES + lane]; }
    u64& unknown(int reg, int lane) { return unknowns[(size_t)reg * LANES + lane]; }
    Thread thread(int lane) const { return {first + lane, first, lanes, meetings}; }

    void put(int reg, int lane, u64 bits, u64 unknown_bits) {
        if (reg < 0) return;  // "_"
        const u64 mask = ones(register_bits[reg]);
        value(reg, lane) = bits & mask;
        unknown(reg, lane) = unknown_bits & mask;
    }

    template <class T>
    bool any_unknown(int reg, int lane) {
        return unknown(reg, lane) & ones(8 * sizeof(T));
    }

    u64 address(int reg, int lane) {
        if (unknown(reg, lane)) fail("has an address that depends on memory nobody wrote");
        return value(reg, lane);
    }

    bool truth(int reg, int lane, bool negated) {
        if (unknown(reg, lane)) fail("decides by memory that nobody wrote");
        return (value(reg, lane) & 1) != negated;
    }
};

struct Partly {  // a number of which some bits are unknown
    u64 value, unknown;
};

// A bit of a sum is unknown where one of the same place is, or where the carry may be another.
inline Partly sum_of(Partly a, Partly b) {
    const u64 least = (a.value & ~a.unknown) + (b.value & ~b.unknown);
    const u64 most = (a.value | a.unknown) + (b.value | b.unknown);
    return {a.value + b.value, a.unknown | b.unknown | (least ^ most)};
}

inline Partly difference_of(Partly a, Partly b) {
    const u64 least = (a.value & ~a.unknown) - (b.value | b.unknown);
    const u64 most = (a.value | a.unknown) - (b.value & ~b.unknown);
    return {a.value - b.value, a.unknown | b.unknown | (least ^ most)};
}

inline Partly product_of(Partly a, Partly b) {
    const u64 product = a.value * b.value;
    if (a.unknown == 0) std::swap(a, b);
    if (a.unknown == 0 || (b.unknown == 0 && b.value == 0)) return {product, 0};
    // By a power of two the bits move; else none is known from the lowest unknown one on.
    if (b.unknown == 0 && (b.value & (b.value - 1)) == 0) return {product, a.unknown * b.value};
    return {product, ~0ull << std::min(__builtin_ctzll(a.unknown), b.unknown ? __builtin_ctzll(b.unknown) : 63)};
}

// A function of up to three operands of one type; what is unknown of one makes the result unknown.
template <class To, class T, class F>
inline void map(Warp& warp, const Instruction& in, const int* lanes, int n, int operands, F f) {
    for (int i = 0; i < n; i++) {
        const int lane = lanes[i];
        T x[3] = {};
        bool lost = false;
        for (int k = 0; k < operands; k++) {
            x[k] = flushed(as<T>(warp.value(in.of[k], lane)), in.flush);
            lost |= warp.any_unknown<T>(in.of[k], lane);
        }
        warp.put(in.to[0], lane, bits(flushed((To)f(x[0], x[1], x[2]), in.flush)), lost ? ~0ull : 0);
    }
}

// Sums and products of whole numbers.
template <class T>
inline void linear(Warp& warp, const Instruction& in, const int* lanes, int n) {
    const int op = in.operation;
    const bool is_wide = op == E_mul_wide || op == E_mad_wide;
    for (int i = 0; i < n; i++) {
        const int lane = lanes[i];
        auto operand = [&](int k) -> Partly {
            const u64 value = warp.value(in.of[k], lane), unknown = warp.unknown(in.of[k], lane);
            if (k == 2 && is_wide) return {value, unknown};
            return {bits(as<T>(value)), bits(as<T>(unknown))};
        };
        Partly result;
        if (op == E_add) {
            result = sum_of(operand(0), operand(1));
        } else if (op == E_sub) {
            result = difference_of(operand(0), operand(1));
        } else {
            result = product_of(operand(0), operand(1));
            if (op == E_mad || op == E_mad_wide) result = sum_of(result, operand(2));
        }
        if (!is_wide) result = {bits(as<T>(result.value)), bits(as<T>(result.unknown))};
        warp.put(in.to[0], lane, result.value, result.unknown);
    }
}

template <class T>
inline void arithmetic(Warp& warp, const Instruction& in, const int* lanes, int n) {
    if constexpr (std::is_floating_point_v<T>) {
        auto run = [&](int operands, auto f) { map<T, T>(warp, in, lanes, n, operands, f); };
        switch (in.operation) {
            case E_add:
                return run(2, [](T a, T b, T) { return a + b; });
            case E_sub:
                return run(2, [](T a, T b, T) { return a - b; });
            case E_mul:
                return run(2, [](T a, T b, T) { return a * b; });
            case E_div:
                return run(2, [](T a, T b, T) { return a / b; });
            case E_fma:
                return run(3, [](T a, T b, T c) { return std::fma(a, b, c); });
            case E_min:
                return run(2, [](T a, T b, T) { return std::fmin(a, b); });
            case E_max:
                return run(2, [](T a, T b, T) { return std::fmax(a, b); });
            case E_abs:
                return run(1, [](T a, T, T) { return std::fabs(a); });
            case E_neg:
                return run(1, [](T a, T, T) { return -a; });
            case E_rcp:
                return run(1, [](T a, T, T) { return 1 / a; });
            case E_sqrt:
                return run(1, [](T a, T, T) { return std::sqrt(a); });
        }
    } else {
        typedef std::make_unsigned_t<T> U;
        typedef std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128> Big;
        auto run = [&](int operands, auto f) { map<T, T>(warp, in, lanes, n, operands, f); };
        switch (in.operation) {
            case E_add:
            case E_sub:
            case E_mul:
            case E_mad:
            case E_mul_wide:
            case E_mad_wide:
                return linear<T>(warp, in, lanes, n);
            case E_mul_hi:
                return run(2, [](T a, T b, T) { return (T)((Big)a * (Big)b >> 8 * sizeof(T)); });
            case E_mad_hi:
                return run(3, [](T a, T b, T c) { return (T)((u64)((Big)a * (Big)b >> 8 * sizeof(T)) + (u64)c); });
            case E_div:
                return run(2, [](T a, T b, T) {
                    if (b == 0) return (T)-1;
                    return std::is_signed_v<T> && b == (T)-1 ? (T)(0 - (u64)a) : (T)(a / b);
                });
            case E_rem:
                return run(2, [](T a, T b, T) {
                    if (b == 0) return a;
                    return std::is_signed_v<T> && b == (T)-1 ? (T)0 : (T)(a % b);
                });
            case E_min:
                return run(2, [](T a, T b, T) { return std::min(a, b); });
            case E_max:
                return run(2, [](T a, T b, T) { return std::max(a, b); });
            case E_abs:
                return run(1, [](T a, T, T) { return a < 0 ? (T)(0 - (u64)a) : a; });
            case E_neg:
                return run(1, [](T a, T, T) { return (T)(0 - (u64)a); });
            case E_popc:
                return run(1, [](T a, T, T) { return (T)__builtin_popcountll((U)a); });
            case E_clz:
                return run(1, [](T a, T, T) {
                    return a ? (T)(__builtin_clzll((U)a) - (64 - 8 * (int)sizeof(T))) : (T)(8 * sizeof(T));
                });
        }
    }
    fail("an operation that this machine does not have for the type");
}

// What moves bits without a look at the others: of the unknown ones it is known which they are.
inline void logic(Warp& warp, const Instruction& in, int lane) {
    auto v = [&](int k) { return warp.value(in.of[k], lane); };
    auto u = [&](int k) { return warp.unknown(in.of[k], lane); };
    auto out = [&](u64 result, u64 lost) { warp.put(in.to[0], lane, result, lost); };
    switch (in.operation) {
        case E_and:
            return out(v(0) & v(1), (u(0) & (v(1) | u(1))) | (u(1) & (v(0) | u(0))));
        case E_or:
            return out(v(0) | v(1), (u(0) & (~v(1) | u(1))) | (u(1) & (~v(0) | u(0))));
        case E_xor:
            return out(v(0) ^ v(1), u(0) | u(1));
        case E_not:
            return out(~v(0), u(0));
        case E_brev: {
            auto reversed = [&](u64 word) {
                u64 result = 0;
                const int width = 8 * size_of(in.type);
                for (int i = 0; i < width; i++) result |= (word >> i & 1) << (width - 1 - i);
                return result;
            };
            return out(reversed(v(0)), reversed(u(0)));
        }
        case E_lop3: {
            u64 result = 0;
            const u32 table = (u32)v(3);
            for (int i = 0; i < 8; i++)
                if (table >> i & 1) result |= (i & 4 ? v(0) : ~v(0)) & (i & 2 ? v(1) : ~v(1)) & (i & 1 ? v(2) : ~v(2));
            return out(result, u(0) | u(1) | u(2));
        }
        case E_shl:
        case E_shr:
            return with_integer(in.type, [&](auto zero) {
                typedef decltype(zero) T;
                const bool left = in.operation == E_shl;
                if (u(1)) return out(0, ~0ull);
                out(bits(shifted(as<T>(v(0)), (u32)v(1), left)), bits(shifted(as<T>(u(0)), (u32)v(1), left)));
            });
        case E_shf_l_wrap:
        case E_shf_r_wrap:
        case E_shf_l_clamp:
        case E_shf_r_clamp:
            if (u(2)) return out(0, ~0ull);
            return out(funnel((u32)v(0), (u32)v(1), (u32)v(2), in.operation),
                       funnel((u32)u(0), (u32)u(1), (u32)v(2), in.operation));
        case E_prmt:
            if (u(2)) return out(0, ~0ull);
            return out(permuted((u32)v(0), (u32)v(1), (u32)v(2)), permuted((u32)u(0), (u32)u(1), (u32)v(2)));
        case E_bfe:
            if (u(1) || u(2)) return out(0, ~0ull);
            return with_integer(in.type, [&](auto zero) {
                typedef decltype(zero) T;
                out(bits(field<T>(v(0), (u32)v(1), (u32)v(2))), bits(field<T>(u(0), (u32)v(1), (u32)v(2))));
            });
        case E_bfi: {
            if (u(2) || u(3)) return out(0, ~0ull);
            const u32 width = 8 * size_of(in.type);
            return out(inserted(v(0), v(1), (u32)v(2), (u32)v(3), width),
                       inserted(u(0), u(1), (u32)v(2), (u32)v(3), width));
        }
        case E_dp2a_lo:
        case E_dp2a_hi: {
            const int shift = in.operation == E_dp2a_hi ? 16 : 0;
            const u32 a = (u32)v(0), b = (u32)v(1) >> shift, lost_of_b = (u32)u(1) >> shift;
            bool lost = u(0) || u(2);  // what is multiplied by a weight of 0 does not matter
            for (int i = 0; i < 2; i++) lost |= (a >> 16 * i & 0xffff) && (lost_of_b >> 8 * i & 255);
            return out((u32)((u32)v(2) + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255)), lost ? ~0ull : 0);
        }
        case E_dp4a: {
            u32 sum = (u32)v(2);
            bool lost = u(2) != 0;  // what is multiplied by 0 does not matter
            for (int i = 0; i < 32; i += 8) {
                const u32 a = v(0) >> i & 255, b = v(1) >> i & 255, lost_a = u(0) >> i & 255, lost_b = u(1) >> i & 255;
                sum += a * b;
                lost |= (lost_a && (b || lost_b)) || (lost_b && a);
            }
            return out(sum, lost ? ~0ull : 0);
        }
        case E_mov:
            return with_type(in.type, [&](auto zero) {  // a signed type is extended to a wider register
                typedef decltype(zero) T;
                if constexpr (std::is_floating_point_v<T>) return out(v(0), u(0));
                out(bits(as<T>(v(0))), bits(as<T>(u(0))));
            });
        case E_selp: {
            const int k = warp.truth(in.of[2], lane, in.negated & 4) ? 0 : 1;
            return out(v(k), u(k));
        }
        case E_pack: {
            const int width = 8 * size_of(in.type) / in.count;
            u64 word = 0, lost = 0;
            for (int k = 0; k < in.count; k++) word |= v(k) << width * k, lost |= u(k) << width * k;
            return out(word, lost);
        }
        case E_unpack: {
            const int width = 8 * size_of(in.type) / in.count;
            for (int k = 0; k < in.count; k++) warp.put(in.to[k], lane, v(0) >> width * k, u(0) >> width * k);
            return;
        }
        case E_isspacep:
            return out((v(0) - (u64)shared_window() < SHARED_WINDOW) == (in.space == S_shared), u(0) ? 1 : 0);
    }
    fail("an operation that this machine does not have");
}

inline void compare(Warp& warp, const Instruction& in, const int* lanes, int n) {
    with_type(in.type, [&](auto zero) {
        typedef decltype(zero) T;
        for (int i = 0; i < n; i++) {
            const int lane = lanes[i];
            if (warp.any_unknown<T>(in.of[0], lane) || warp.any_unknown<T>(in.of[1], lane))
                fail("decides by memory that nobody wrote");
            auto operand = [&](int k) { return flushed(as<T>(warp.value(in.of[k], lane)), in.flush); };
            const bool holds = compares(in.mode, operand(0), operand(1));
            bool results[2] = {holds, !holds};
            if (in.join) {
                const bool other = warp.truth(in.of[2], lane, in.negated & 4);
                for (bool& result : results)
                    result = in.join == 1 ? result && other : in.join == 2 ? result || other : result != other;
            }
            warp.put(in.to[0], lane, results[0], 0);
            if (in.count == 2) warp.put(in.to[1], lane, results[1], 0);
        }
    });
}

inline void convert(Warp& warp, const Instruction& in, const int* lanes, int n) {
    with_type(in.type, [&](auto to) {
        with_type(in.from, [&](auto from) {
            typedef decltype(to) To;
            typedef decltype(from) From;
            for (int i = 0; i < n; i++) {
                const int lane = lanes[i];
                const From x = flushed(as<From>(warp.value(in.of[0], lane)), in.flush);
                u64 lost = warp.any_unknown<From>(in.of[0], lane) ? ~0ull : 0;
                if constexpr (std::is_integral_v<To> && std::is_integral_v<From>)
                    if (lost && !in.join) lost = bits((To)as<From>(warp.unknown(in.of[0], lane)));
                warp.put(in.to[0], lane, bits(flushed(converted<To>(x, in.mode, in.join), in.flush)), lost);
            }
        });
    });
}

}  // namespace
