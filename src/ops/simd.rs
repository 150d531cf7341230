//! Loops for the compiler to vectorise, compiled once for each instruction set.
//!
//! Everything element by element here is written with operations that IEEE 754 fixes (sum, product,
//! fused multiply-add, comparison), so a number's result does not depend on whether it fell into a
//! vector or into the rest of a loop.

/// An instruction set, as far as the loops of this module are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// Whether the portable form has a fused multiply-add in hardware: without one, `mul_add` is a
/// call into the C library.
pub(super) const PORTABLE_FMA: bool = cfg!(target_arch = "aarch64");

/// Defines a function that takes a [`Level`] first and runs its body compiled for that level. The
/// name in angle brackets is a constant that says whether fused multiply-add is at hand.
macro_rules! vectorised {
    ($(#[$doc:meta])* fn $name:ident<$fma:ident>($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub(super) fn $name(level: $crate::ops::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body::<true>($($arg),*)
            }
            match level {
                // SAFETY: a level is only made where the CPU was asked for its instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                $crate::ops::simd::Level::Portable => {
                    body::<{ $crate::ops::simd::PORTABLE_FMA }>($($arg),*)
                }
            }
        }
    };
}
pub(super) use vectorised;

/// `a b + c`, in one rounding where `FMA`.
#[inline(always)]
pub(super) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to about 1e-7 for x from -87 to 88, 0 below and infinite above.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; the polynomial is the Taylor series of `e^r` to the
/// seventh power, whose rest is below 5e-9.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Adding this to a number below 2^22 leaves its nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of which is exact in products with small integers.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let rounded = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, x);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = fma::<FMA>(p, r, c);
    }
    let y = f32::from_bits(p.to_bits().wrapping_add(rounded.to_bits() << 23));
    let y = if x < -87.0 { 0.0 } else { y };
    if x > 88.0 { f32::INFINITY } else { y }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(super) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// The distribution function of the standard normal, to about 1e-7.
///
/// `erfc(a) / 2 = e^(-a²) t P(t)` with `t = 1 / (1 + 0.35 a)` for `a >= 0`, the form of Abramowitz
/// and Stegun 7.1.26; P interpolates it at the Chebyshev nodes for a in 0..9, within 9e-9.
#[inline(always)]
pub(super) fn normal_cdf<const FMA: bool>(x: f32) -> f32 {
    const P: [f32; 10] = [
        0.017_313_942,
        -0.068_993_405,
        0.065_494_9,
        0.020_758_262,
        0.013_785_987,
        0.089_571_47,
        0.069_626_23,
        0.095_292_77,
        0.098_398_63,
        0.098_751_224,
    ];
    let a = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / fma::<FMA>(a, 0.35, 1.0);
    let mut p = P[0];
    for c in &P[1..] {
        p = fma::<FMA>(p, t, *c);
    }
    let tail = exp::<FMA>(-a * a) * t * p;
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_the_f64_ones_in_their_range() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            for found in [exp::<true>(x), exp::<false>(x)] {
                let error = (f64::from(found) / exact - 1.0).abs();
                assert!(error < 3e-7, "exp({x}): {error:e}");
            }
        }
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(-1e30), 0.0);
        assert_eq!(exp::<true>(1e30), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan());
        // Values of the normal distribution, from tables.
        for (x, exact) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_543),
            (-1.0, 0.158_655_253_931_457),
            (2.5, 0.993_790_334_674_224),
            (-3.0, 0.001_349_898_031_630_1),
            (-6.0, 9.865_876_450_377e-10),
        ] {
            let error = f64::from(normal_cdf::<true>(x)) - exact;
            assert!(error.abs() < 1.2e-7, "{x}: {error:e}");
        }
    }
}
