// PTX's arithmetic, as functions of numbers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "vocabulary.hpp"

namespace {

struct Fault {
    std::string text;
};

template <class... A>
[[noreturn]] void fail(const char* format, A... arguments) {
    char text[400];
    snprintf(text, sizeof text, format, arguments...);
    throw Fault{text};
}

inline u64 ones(int bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; }

template <class T>
T as(u64 bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T>
u64 bits(T value) {
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) return (u64)(int64_t)value;
    u64 word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}

template <class F>
void with_integer(int type, F f) {
    switch (type) {
        case T_u8:
            return f(u8());
        case T_s8:
            return f(int8_t());
        case T_u16:
            return f(uint16_t());
        case T_s16:
            return f(int16_t());
        case T_u32:
            return f(u32());
        case T_s32:
            return f(int32_t());
        case T_u64:
            return f(u64());
        case T_s64:
            return f(int64_t());
    }
    fail("no integer of that type");
}

template <class F>
void with_type(int type, F f) {
    if (type == T_f32) return f(float());
    if (type == T_f64) return f(double());
    if (type == T_pred) return f(u8());
    with_integer(type, f);
}

int size_of(int type) {
    int size = 0;
    with_type(type, [&](auto zero) { size = sizeof zero; });
    return size;
}

template <class T>
T flushed(T value, bool flush) {
    if constexpr (std::is_same_v<T, float>)
        if (flush && std::fpclassify(value) == FP_SUBNORMAL) return std::copysign(0.0f, value);
    return value;
}

template <class T>
T shifted(T value, u32 by, bool left) {
    const int width = 8 * sizeof(T);
    if (left) return by >= (u32)width ? T(0) : T((std::make_unsigned_t<T>)value << by);
    if (by >= (u32)width) return std::is_signed_v<T> && value < 0 ? T(-1) : T(0);
    return T(value >> by);
}

u32 funnel(u32 low, u32 high, u32 by, int operation) {
    const u64 both = (u64)high << 32 | low;
    by = operation == E_shf_l_wrap || operation == E_shf_r_wrap ? by & 31 : std::min(by, 32u);
    return operation == E_shf_l_wrap || operation == E_shf_l_clamp ? u32(both << by >> 32) : u32(both >> by);
}

u32 permuted(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> 4 * i & 15;
        u32 byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

template <class T>
T field(u64 value, u32 position, u32 length) {
    const u32 width = 8 * sizeof(T);
    position &= 255, length &= 255;
    if (length == 0) return 0;
    const u32 last = std::min(position + length - 1, width - 1);
    const bool sign = std::is_signed_v<T> && (value >> last & 1);
    u64 result = 0;
    for (u32 i = 0; i < width; i++) {
        const bool bit = i < length && position + i < width ? value >> (position + i) & 1 : sign;
        result |= (u64)bit << i;
    }
    return (T)result;
}

u64 inserted(u64 value, u64 into, u32 position, u32 length, u32 width) {
    position &= 255, length &= 255;
    if (position >= width || length == 0) return into;
    const u64 mask = ones(length) << position;
    return (into & ~mask) | (value << position & mask);
}

template <class T>
bool compares(int comparison, T a, T b) {
    const bool unordered = a != a || b != b;
    switch (comparison) {
        case C_eq:
            return !unordered && a == b;
        case C_ne:
            return !unordered && a != b;
        case C_lt:
            return a < b;
        case C_le:
            return a <= b;
        case C_gt:
            return a > b;
        case C_ge:
            return a >= b;
        case C_equ:
            return unordered || a == b;
        case C_neu:
            return unordered || a != b;
        case C_ltu:
            return unordered || a < b;
        case C_leu:
            return unordered || a <= b;
        case C_gtu:
            return unordered || a > b;
        case C_geu:
            return unordered || a >= b;
        case C_num:
            return !unordered;
        case C_nan:
            return unordered;
    }
    fail("no such comparison");
}

double rounded(int rounding, double value) {
    switch (rounding) {
        case R_rzi:
            return std::trunc(value);
        case R_rni:
            return std::nearbyint(value);
        case R_rmi:
            return std::floor(value);
        case R_rpi:
            return std::ceil(value);
    }
    return value;
}

template <class To, class From>
To converted(From value, int rounding, bool saturated) {
    if constexpr (std::is_floating_point_v<From>) {
        if (rounding > R_rn) value = (From)rounded(rounding, value);
        if constexpr (std::is_integral_v<To>) {
            if (value != value) return 0;
            if (value <= (From)std::numeric_limits<To>::min()) return std::numeric_limits<To>::min();
            if (value >= (From)std::numeric_limits<To>::max()) return std::numeric_limits<To>::max();
        } else if (saturated) {
            return value > 0 ? (value < 1 ? (To)value : 1) : 0;
        }
    } else if constexpr (std::is_integral_v<To>) {
        if (saturated) {
            const __int128 wide = value;
            return (To)std::clamp<__int128>(wide, std::numeric_limits<To>::min(), std::numeric_limits<To>::max());
        }
    }
    return (To)value;
}

}  // namespace
