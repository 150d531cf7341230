//! Logarithm, sine and cosine in `f32` as Cephes computes them.
//!
//! PyTorch's vectorised normal distribution uses Cephes' polynomials (S. Moshier, `logf.c`,
//! `sinf.c`) with fused multiply-adds; the platform's own functions differ from these by an ulp or
//! two. The order of operations below, fused ones included, is what makes the bits agree.

/// Horner's rule, highest coefficient first.
fn polynomial(x: f32, coefficients: &[f32]) -> f32 {
    coefficients
        .iter()
        .copied()
        .fold(0.0, |sum, c| sum.mul_add(x, c))
}

/// The natural logarithm of a normal positive number.
pub(super) fn ln(x: f32) -> f32 {
    const P: [f32; 9] = [
        0.070_376_836,
        -0.115_146_1,
        0.116_769_984,
        -0.124_201_41,
        0.142_493_23,
        -0.166_680_57,
        0.200_007_14,
        -0.249_999_94,
        0.333_333_3,
    ];
    // ln 2 in two parts, the larger one exact in few bits.
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LN2_HIGH: f32 = 355.0 / 512.0;

    // x = mantissa · 2^exponent, the mantissa in [0.5, 1), then in [sqrt(1/2), sqrt(2)) minus 1.
    let bits = x.to_bits();
    let mut exponent = ((bits >> 23) as i32 - 126) as f32;
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000);
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let z = x * x;
    let y = polynomial(x, &P) * x;
    let y = y.mul_add(z, exponent * LN2_LOW) - 0.5 * z;
    exponent.mul_add(LN2_HIGH, x + y)
}

/// Sine and cosine of an angle in [0, 8192).
pub(super) fn sin_cos(x: f32) -> (f32, f32) {
    const SINE: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
    const COSINE: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];
    // pi / 4 in three parts.
    const PI_4: [f32; 3] = [0.785_156_25, 2.418_756_5e-4, 3.774_895e-8];
    const FOUR_BY_PI: f32 = 1.273_239_5;

    // Octant, rounded to the next even one; the rest of the angle is in [-pi/4, pi/4].
    let octant = ((x * FOUR_BY_PI) as i32 + 1) & !1;
    let x = PI_4
        .iter()
        .fold(x, |x, &part| (-(octant as f32)).mul_add(part, x));
    let z = x * x;
    let cosine = (polynomial(z, &COSINE) * z).mul_add(z, -0.5 * z) + 1.0;
    let sine = (polynomial(z, &SINE) * z).mul_add(x, x);
    let (sine, cosine) = if octant & 2 == 0 {
        (sine, cosine)
    } else {
        (cosine, sine)
    };
    let signed = |value: f32, negative: bool| if negative { -value } else { value };
    (
        signed(sine, octant & 4 != 0),
        signed(cosine, (octant - 2) & 4 == 0),
    )
}
