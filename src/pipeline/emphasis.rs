//! What a token's weight does to its hidden state.

/// The mean is scaled up by this much at most. Weights of words move it by some per cent; where they
/// cancel it, restoring it would blow up noise.
const MOST_RESTORED: f64 = 10.0;

/// The weights leave no mean to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the weights in it cancel each other out; bring them nearer to 1")]
pub(super) struct Cancelled;

/// Multiplies each token's hidden state with its weight, then everything so that the mean over all
/// numbers is what it was.
///
/// `hidden` is `[tokens, d]`, one chunk after the final layer norm. This is AUTOMATIC1111's
/// `EmphasisOriginal` (`modules/sd_emphasis.py`): `z *= weights; z *= old_mean / new_mean`. Over
/// there the mean is that of one chunk of all prompts that happen to be encoded together; here it is
/// that of one prompt's chunk alone, which is the same for a prompt that is encoded alone. A factor
/// below zero or beyond ten, which paints noise over there, is an error here.
pub(super) fn apply(hidden: &mut [f32], weights: &[f32]) -> Result<(), Cancelled> {
    let width = hidden.len() / weights.len().max(1);
    let before = mean(hidden);
    for (token, &weight) in hidden.chunks_exact_mut(width.max(1)).zip(weights) {
        token.iter_mut().for_each(|value| *value *= weight);
    }
    let factor = before / mean(hidden);
    // Not the other way round: a mean of zero gives NaN or infinity.
    if !(factor > 0.0 && factor <= MOST_RESTORED) {
        return Err(Cancelled);
    }
    let factor = factor as f32;
    hidden.iter_mut().for_each(|value| *value *= factor);
    Ok(())
}

/// In f64: in a small model the mean is a thousandth of the values.
fn mean(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|&value| f64::from(value)).sum();
    sum / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_multiply_tokens_and_the_mean_stays() {
        let mut hidden = [1.0, 3.0, 2.0, 2.0, -1.0, 5.0];
        apply(&mut hidden, &[1.0, 2.0, 0.5]).unwrap();
        // Weighted: 1 3 4 4 -0.5 2.5, sum 14; before: 12.
        let expected = [1.0, 3.0, 4.0, 4.0, -0.5, 2.5].map(|x| x * (12.0f32 / 14.0));
        for (found, expected) in hidden.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{hidden:?}");
        }
    }

    #[test]
    fn one_weight_for_all_changes_nothing() {
        let mut hidden = [1.0, 3.0, 2.0, 2.0];
        apply(&mut hidden, &[1.5, 1.5]).unwrap();
        assert_eq!(hidden.map(|x: f32| (x * 1e5).round()), [1e5, 3e5, 2e5, 2e5]);
    }

    #[test]
    fn weights_that_cancel_out_are_refused() {
        for weights in [[0.0, 0.0], [1.0, -1.0], [1.0, -2.0], [0.04, 0.04]] {
            let mut hidden = [1.0, 3.0, 2.0, 2.0];
            assert_eq!(apply(&mut hidden, &weights), Err(Cancelled), "{weights:?}");
        }
    }
}
