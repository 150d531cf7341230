//! Sums in a fixed order, and still several at a time.

/// Partial sums: as many as a vector register holds.
const LANES: usize = 8;

/// The sum of `term` over pairs of numbers. Lane by lane, then the lanes in order: the same numbers
/// give the same bits, whatever the processor.
fn sum(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (blocks_a, rest_a) = a.as_chunks::<LANES>();
    let (blocks_b, rest_b) = b.as_chunks::<LANES>();
    for (a, b) in blocks_a.iter().zip(blocks_b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    let rest: f64 = rest_a.iter().zip(rest_b).map(|(&a, &b)| term(a, b)).sum();
    lanes.iter().sum::<f64>() + rest
}

/// The sum of squares: finite for finite numbers, as no square of an `f32` overflows an `f64`.
pub(super) fn squares(a: &[f32]) -> f64 {
    sum(a, a, |a, _| f64::from(a) * f64::from(a))
}

pub(super) fn magnitudes(a: &[f32]) -> f64 {
    sum(a, a, |a, _| f64::from(a.abs()))
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    sum(a, b, |a, b| f64::from(a) * f64::from(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_counted_once() {
        for size in [0, 1, 7, 8, 9, 16, 100] {
            let a: Vec<f32> = (1..=size).map(|i| i as f32).collect();
            let b = vec![-2.0; size as usize];
            let n = f64::from(size);
            assert_eq!(squares(&a), n * (n + 1.0) * (2.0 * n + 1.0) / 6.0);
            assert_eq!(dot(&a, &b), -n * (n + 1.0));
            assert_eq!(magnitudes(&b), 2.0 * n);
        }
        assert!(squares(&[f32::MAX; 20]).is_finite());
        assert!(!squares(&[0.0, f32::NAN]).is_finite());
    }
}
