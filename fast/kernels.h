// What the files of kernels share.
#pragma once

#include <cstdint>
#include <cstring>

// A float without its lower half, rounded to the nearest, to the even one of two: bfloat16 as torch has it. NaN stays NaN.
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

// Calls with a number of the type that is in memory.
template <class Call>
inline void with_type(int64_t is_half, Call call) {
    if (is_half) call(BFloat16());
    else call(float());
}

// 2^x for x < 127 to a relative 2e-7; 0 below 2^-100, since products with subnormal numbers are slow. NaN stays NaN.
// Float is a number or a vector of them, Integer the integers of the same size.
template <class Float, class Integer>
inline Float exp2(Float x) {
    const float rounding = 12582912.0f;  // 1.5 * 2^23: in the sum, the low bits are x as a whole number
    Float rounded = x + rounding, rest = x - (rounded - rounding);
    Float power = 0.00132765f * rest + 0.00967554f;  // of 2^rest on [-0.5, 0.5], the polynomial of least relative error, 7.5e-8
    power = power * rest + 0.05550713f;
    power = power * rest + 0.24022120f;
    power = power * rest + 0.69314697f;
    power = power * rest + 1.00000007f;
    Integer bits, whole;
    std::memcpy(&bits, &power, sizeof bits);
    std::memcpy(&whole, &rounded, sizeof whole);
    bits += whole << 23;
    std::memcpy(&power, &bits, sizeof power);
    return x < -100.0f ? Float{} : power;
}
