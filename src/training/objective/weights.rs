//! What a sample's loss weighs, by how noisy it is.

use crate::schedulers::PredictionType;

/// The ratio of signal to noise, `ᾱ / (1 - ᾱ)`, for each step of the noise schedule. Infinite where
/// there is no noise.
pub fn signal_to_noise(alphas_cumprod: &[f32]) -> Vec<f32> {
    alphas_cumprod
        .iter()
        .map(|&alpha| {
            // The order of diffusers' `compute_snr`.
            let ratio = alpha.sqrt() / (1.0 - alpha).sqrt();
            ratio * ratio
        })
        .collect()
}

/// The weight of "Efficient Diffusion Training via Min-SNR Weighting Strategy" (Hang et al. 2023), for
/// a loss on what the model predicts: `min(SNR, γ)` on the clean sample, over `SNR` on the noise,
/// over `SNR + 1` on the velocity.
pub fn min_snr(snr: f32, gamma: f32, prediction: PredictionType) -> f32 {
    // Written so that each limit is one: 0 / 0 where there is only noise, inf / inf where there is none.
    match prediction {
        PredictionType::Epsilon if snr <= gamma => 1.0,
        PredictionType::Epsilon => gamma / snr,
        PredictionType::VPrediction => snr.min(gamma) / (snr + 1.0),
        PredictionType::Sample => snr.min(gamma),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn ratios_and_weights_are_those_of_diffusers() {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/training/weights.safetensors");
        let bytes = fs::read(file).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let floats = |name: &str| -> Vec<f32> {
            let data = golden.tensor(name).unwrap().data().to_vec();
            let words = data.as_chunks().0.iter();
            words.copied().map(f32::from_le_bytes).collect()
        };
        let close = |found: f32, expected: f32, what: &str| {
            let error = (found - expected).abs();
            assert!(
                error <= 2e-6 * expected.abs(),
                "{what}: {found} for {expected}"
            );
        };
        for schedule in ["plain", "zero"] {
            let timesteps = golden.tensor(&format!("{schedule}/timesteps")).unwrap();
            let timesteps = timesteps.data().as_chunks().0.iter();
            let timesteps: Vec<usize> =
                timesteps.map(|t| i64::from_le_bytes(*t) as usize).collect();
            let ratios = signal_to_noise(&floats(&format!("{schedule}/alphas_cumprod")));
            assert_eq!(ratios.len(), 1000);
            let expected = floats(&format!("{schedule}/snr"));
            for (&t, expected) in timesteps.iter().zip(expected) {
                close(ratios[t], expected, &format!("{schedule} {t}"));
            }
            for (name, prediction) in [
                ("epsilon", PredictionType::Epsilon),
                ("velocity", PredictionType::VPrediction),
            ] {
                for gamma in [1.0, 5.0] {
                    let expected = floats(&format!("{schedule}/{name}/{gamma}"));
                    assert_eq!(expected.len(), timesteps.len());
                    for (&t, expected) in timesteps.iter().zip(expected) {
                        let found = min_snr(ratios[t], gamma, prediction);
                        // Where nothing but noise is left, diffusers finds 0 / 0; the limit is 1.
                        let expected = if expected.is_nan() { 1.0 } else { expected };
                        close(found, expected, &format!("{schedule} {name} {gamma} {t}"));
                    }
                }
            }
        }
    }

    #[test]
    fn the_ends_of_every_schedule_have_finite_weights() {
        let ratios = signal_to_noise(&[1.0, 0.0]);
        assert_eq!(ratios, [f32::INFINITY, 0.0]);
        let weights = |prediction| {
            ratios
                .iter()
                .map(|&r| min_snr(r, 5.0, prediction))
                .collect()
        };
        let all: [Vec<f32>; 3] = [
            weights(PredictionType::Epsilon),
            weights(PredictionType::VPrediction),
            weights(PredictionType::Sample),
        ];
        assert_eq!(all, [[0.0, 1.0], [0.0, 0.0], [5.0, 0.0]]);
    }
}
