//! One bound for all gradients together.

use super::{OptimizerError, Param, sums};

/// Against a division by zero, as `torch.nn.utils.clip_grad_norm_` has it.
const TINY: f64 = 1e-6;

/// Scales all gradients by one factor so that their common norm is at most `most`, and gives the
/// norm they had. A gradient that is not finite is an error that names its parameter, with or
/// without a bound; nothing is scaled then.
pub fn clip(params: &mut [Param<'_>], most: Option<f64>) -> Result<f64, OptimizerError> {
    let mut total = 0.0;
    for param in params.iter() {
        let squares = sums::squares(param.gradient);
        if !squares.is_finite() {
            return Err(OptimizerError::NotFinite {
                name: param.name.into(),
            });
        }
        total += squares;
    }
    let norm = total.sqrt();
    if let Some(most) = most {
        let factor = most / (norm + TINY);
        if factor < 1.0 {
            for param in params.iter_mut() {
                for value in param.gradient.iter_mut() {
                    *value *= factor as f32;
                }
            }
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clipped(gradients: [&mut [f32]; 2], most: Option<f64>) -> Result<f64, OptimizerError> {
        let mut values = [vec![0.0; gradients[0].len()], vec![0.0; gradients[1].len()]];
        let mut params: Vec<Param<'_>> = ["a", "b"]
            .into_iter()
            .zip(gradients.into_iter().zip(&mut values))
            .map(|(name, (gradient, values))| Param {
                name,
                values,
                gradient,
                learning_rate: 1.0,
            })
            .collect();
        clip(&mut params, most)
    }

    #[test]
    fn the_norm_is_that_of_all_gradients_together() {
        let (mut a, mut b) = ([3.0, 0.0], [-4.0]);
        assert_eq!(clipped([&mut a, &mut b], None), Ok(5.0));
        assert_eq!(clipped([&mut a, &mut b], Some(5.1)), Ok(5.0));
        assert_eq!((a, b), ([3.0, 0.0], [-4.0]), "within the bound");
        assert_eq!(clipped([&mut a, &mut b], Some(1.0)), Ok(5.0));
        assert!((a[0] - 0.6).abs() < 1e-6 && (b[0] + 0.8).abs() < 1e-6);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named_and_nothing_changes() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut a, mut b) = ([30.0, 0.0], [1.0, bad, 2.0]);
            let error = clipped([&mut a, &mut b], Some(1.0)).unwrap_err();
            assert_eq!(error, OptimizerError::NotFinite { name: "b".into() });
            assert_eq!(a, [30.0, 0.0]);
        }
    }
}
