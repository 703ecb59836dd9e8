// Common to all kernels: bfloat16 and a fast exp2.
#pragma once

#include <cstdint>
#include <cstring>

// bfloat16 as in PyTorch: the upper half of a float, rounded to nearest, ties to even. NaN stays NaN.
struct BFloat16 {
    uint16_t bits;

    operator float() const {
        const uint32_t whole = (uint32_t)bits << 16;
        float x;
        std::memcpy(&x, &whole, sizeof x);
        return x;
    }

    BFloat16 &operator=(float x) {
        uint32_t whole;
        std::memcpy(&whole, &x, sizeof whole);
        const uint32_t rounded = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
        bits = (whole & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
        return *this;
    }
};

// Calls `call` with a BFloat16 or a float, for its type.
template <class Call>
inline void with_type(int64_t is_half, Call call) {
    if (is_half) call(BFloat16());
    else call(float());
}

// 2^x for x <= 128, with a relative error of 2e-7; 1 at 0, so that a state without decay stays as it is; infinite at 128; 0 below
// 2^-100, since subnormal numbers are slow. NaN stays NaN. Float is float or a vector, Integer the integer type of that size.
template <class Float, class Integer>
inline Float exp2(Float x) {
    const float rounding = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are x, rounded to an integer
    Float rounded = x + rounding, fraction = x - (rounded - rounding);
    Float power = 0.00132695213f * fraction + 0.00967129134f;  // minimax polynomial of 2^fraction on [-0.5, 0.5] with a constant
    power = power * fraction + 0.0555071086f;                  // term of 1: relative error 9.3e-8
    power = power * fraction + 0.240222469f;
    power = power * fraction + 0.693147004f;
    power = power * fraction + 1.0f;
    Integer bits, whole;
    std::memcpy(&bits, &power, sizeof bits);
    std::memcpy(&whole, &rounded, sizeof whole);
    bits += whole << 23;
    std::memcpy(&power, &bits, sizeof power);
    return x < -100.0f ? Float{} : power;
}
