//! AdamW, with the order of operations of `torch.optim.AdamW`.

use super::{
    OptimizerError, Param, Settings,
    quantised::{BLOCK, Quantised, SIGNED, UNSIGNED},
    state::{Shelf, State, StateTensor},
};

/// Tensors with fewer values keep their moments in f32 (bitsandbytes' `min_8bit_size`): they cost
/// little, and biases and norms suffer most from rounding.
const SMALLEST_QUANTISED: usize = 4096;

#[derive(Debug)]
pub(super) struct AdamW {
    moments: Vec<Moments>,
}

/// Means of the gradients (`m`) and of their squares (`v`).
#[derive(Debug)]
enum Moments {
    Exact { m: Vec<f32>, v: Vec<f32> },
    Eight { m: Quantised, v: Quantised },
}

/// What is the same for every value of a parameter in one step.
struct Coefficients {
    /// What decay leaves of a value.
    kept: f32,
    /// Share of the new gradient in `m`.
    first: f32,
    /// Share of the old mean in `v`, and of the new square.
    beta2: f32,
    second: f32,
    /// Root of the correction of `v`.
    root: f32,
    eps: f32,
    /// Minus the learning rate over the correction of `m`.
    stride: f32,
}

impl Coefficients {
    fn new(settings: &Settings, step: u64, learning_rate: f64) -> Self {
        // More steps than an i32 holds leave nothing to correct.
        let step = i32::try_from(step).unwrap_or(i32::MAX);
        let Settings { beta1, beta2, .. } = *settings;
        Self {
            kept: (1.0 - learning_rate * settings.weight_decay) as f32,
            first: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            second: (1.0 - beta2) as f32,
            root: (1.0 - beta2.powi(step)).sqrt() as f32,
            eps: settings.eps as f32,
            stride: -(learning_rate / (1.0 - beta1.powi(step))) as f32,
        }
    }

    fn update(&self, values: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]) {
        let moments = m.iter_mut().zip(v);
        for ((value, &g), (m, v)) in values.iter_mut().zip(gradient).zip(moments) {
            *value *= self.kept;
            *m = self.towards(*m, g);
            *v = *v * self.beta2 + self.second * g * g;
            let denominator = v.sqrt() / self.root + self.eps;
            *value += self.stride * *m / denominator;
        }
    }

    /// torch's `lerp`, which starts from the nearer end.
    fn towards(&self, from: f32, to: f32) -> f32 {
        match self.first < 0.5 {
            true => from + self.first * (to - from),
            false => to - (to - from) * (1.0 - self.first),
        }
    }
}

impl AdamW {
    pub(super) fn new(sizes: impl Iterator<Item = usize>, eight_bits: bool) -> Self {
        let moments = sizes
            .map(|size| match eight_bits && size >= SMALLEST_QUANTISED {
                false => Moments::Exact {
                    m: vec![0.0; size],
                    v: vec![0.0; size],
                },
                true => Moments::Eight {
                    m: Quantised::zeros(size, &SIGNED),
                    v: Quantised::zeros(size, &UNSIGNED),
                },
            })
            .collect();
        Self { moments }
    }

    /// Step number `step`, the first being 1.
    pub(super) fn step(&mut self, settings: &Settings, step: u64, params: &mut [Param<'_>]) {
        for (param, moments) in params.iter_mut().zip(&mut self.moments) {
            let coefficients = Coefficients::new(settings, step, param.learning_rate);
            match moments {
                Moments::Exact { m, v } => coefficients.update(param.values, param.gradient, m, v),
                Moments::Eight { m, v } => {
                    let (mut exact_m, mut exact_v) = ([0.0; BLOCK], [0.0; BLOCK]);
                    let values = param.values.chunks_mut(BLOCK);
                    let gradients = param.gradient.chunks(BLOCK);
                    for (block, (values, gradient)) in values.zip(gradients).enumerate() {
                        let exact_m = &mut exact_m[..values.len()];
                        let exact_v = &mut exact_v[..values.len()];
                        m.read(block, exact_m);
                        v.read(block, exact_v);
                        coefficients.update(values, gradient, exact_m, exact_v);
                        m.write(block, exact_m);
                        v.write(block, exact_v);
                    }
                }
            }
        }
    }

    pub(super) fn save(&self, parameters: &[(String, usize)], state: &mut State) {
        for ((name, _), moments) in parameters.iter().zip(&self.moments) {
            match moments {
                Moments::Exact { m, v } => {
                    state.insert(format!("{name}/m"), StateTensor::of_f32(m));
                    state.insert(format!("{name}/v"), StateTensor::of_f32(v));
                }
                Moments::Eight { m, v } => {
                    m.save(&format!("{name}/m"), state);
                    v.save(&format!("{name}/v"), state);
                }
            }
        }
    }

    pub(super) fn load(
        &mut self,
        parameters: &[(String, usize)],
        shelf: &mut Shelf,
    ) -> Result<(), OptimizerError> {
        for ((name, size), moments) in parameters.iter().zip(&mut self.moments) {
            match moments {
                Moments::Exact { m, v } => {
                    *m = shelf.take_f32(&format!("{name}/m"), *size)?;
                    *v = shelf.take_f32(&format!("{name}/v"), *size)?;
                }
                Moments::Eight { m, v } => {
                    m.load(&format!("{name}/m"), shelf)?;
                    v.load(&format!("{name}/v"), shelf)?;
                }
            }
        }
        Ok(())
    }
}
