//! Prodigy: "An Expeditiously Adaptive Parameter-Free Learner" (Mishchenko & Defazio 2024), the Adam
//! variant (algorithm 4), with the options that diffusers' scripts switch on: bias correction and a
//! safeguard for warm-ups.
//!
//! `d`, a lower bound of the distance from the start to the solution, grows from [`D0`] and is what
//! the learning rate of Adam would be. Two sums bound it: of `<gradient, start - value>`, and of the
//! gradients themselves, both forgotten at the rate of the second moment's root.

use super::{
    OptimizerError, Param, Settings,
    state::{Shelf, State, StateTensor},
    sums,
};

/// The first distance: less than any that makes sense.
const D0: f64 = 1e-6;

#[derive(Debug)]
pub(super) struct Prodigy {
    d: f64,
    /// The sum of `<gradient, start - value>`.
    numerator: f64,
    /// Steps whose learning rate was above zero.
    learned: u64,
    memories: Vec<Memory>,
}

#[derive(Debug)]
struct Memory {
    /// Values before the first step.
    start: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    /// The sum of gradients.
    s: Vec<f32>,
}

impl Prodigy {
    pub(super) fn new(sizes: impl Iterator<Item = usize>) -> Self {
        let memories = sizes
            .map(|size| Memory {
                start: vec![0.0; size],
                m: vec![0.0; size],
                v: vec![0.0; size],
                s: vec![0.0; size],
            })
            .collect();
        Self {
            d: D0,
            numerator: 0.0,
            learned: 0,
            memories,
        }
    }

    pub(super) fn distance(&self) -> f64 {
        self.d
    }

    /// A step of learning rate zero, as warm-ups begin, teaches and changes nothing.
    pub(super) fn step(
        &mut self,
        settings: &Settings,
        params: &mut [Param<'_>],
    ) -> Result<(), OptimizerError> {
        let rate = params.first().map_or(0.0, |param| param.learning_rate);
        if let Some(other) = params.iter().find(|param| param.learning_rate != rate) {
            return Err(OptimizerError::Rates {
                name: other.name.into(),
            });
        }
        if rate == 0.0 {
            return Ok(());
        }
        self.learned += 1;
        let Settings { beta1, beta2, .. } = *settings;
        let beta3 = beta2.sqrt();
        // More steps than an i32 holds leave nothing to correct.
        let exponent = i32::try_from(self.learned).unwrap_or(i32::MAX);
        let correction = (1.0 - beta2.powi(exponent)).sqrt() / (1.0 - beta1.powi(exponent));
        let d = self.d;
        let stride = d * rate * correction;

        self.numerator *= beta3;
        let mut denominator = 0.0;
        for (param, memory) in params.iter().zip(&mut self.memories) {
            if self.learned == 1 {
                memory.start.copy_from_slice(param.values);
            }
            // Both sums are in units of d0: what is of the size of its square would be lost in f32.
            let way =
                sums::dot(param.gradient, &memory.start) - sums::dot(param.gradient, param.values);
            self.numerator += d / D0 * stride * way;
            memory.learn(param.gradient, settings, d, beta3);
            denominator += sums::magnitudes(&memory.s);
        }
        if denominator > 0.0 {
            self.d = d.max(self.numerator / denominator);
        }
        let kept = (1.0 - stride * settings.weight_decay) as f32;
        let eps = (self.d * settings.eps) as f32;
        for (param, memory) in params.iter_mut().zip(&self.memories) {
            let moments = memory.m.iter().zip(&memory.v);
            for (value, (m, v)) in param.values.iter_mut().zip(moments) {
                *value *= kept;
                let denominator = v.sqrt() + eps;
                // Where no gradient ever was, both are zero, and eps may be zero in f32.
                if denominator > 0.0 {
                    *value -= stride as f32 * m / denominator;
                }
            }
        }
        Ok(())
    }

    pub(super) fn save(&self, parameters: &[(String, usize)], state: &mut State) {
        state.insert("/d".into(), StateTensor::of_f64(self.d));
        state.insert("/learned".into(), StateTensor::of_u64(self.learned));
        state.insert("/numerator".into(), StateTensor::of_f64(self.numerator));
        for ((name, _), memory) in parameters.iter().zip(&self.memories) {
            for (part, values) in [
                ("start", &memory.start),
                ("m", &memory.m),
                ("v", &memory.v),
                ("s", &memory.s),
            ] {
                state.insert(format!("{name}/{part}"), StateTensor::of_f32(values));
            }
        }
    }

    pub(super) fn load(
        &mut self,
        parameters: &[(String, usize)],
        shelf: &mut Shelf,
    ) -> Result<(), OptimizerError> {
        self.d = shelf.take_f64("/d")?;
        self.learned = shelf.take_u64("/learned")?;
        self.numerator = shelf.take_f64("/numerator")?;
        for ((name, size), memory) in parameters.iter().zip(&mut self.memories) {
            memory.start = shelf.take_f32(&format!("{name}/start"), *size)?;
            memory.m = shelf.take_f32(&format!("{name}/m"), *size)?;
            memory.v = shelf.take_f32(&format!("{name}/v"), *size)?;
            memory.s = shelf.take_f32(&format!("{name}/s"), *size)?;
        }
        Ok(())
    }
}

impl Memory {
    /// Takes in a gradient, scaled by the distance `d`.
    fn learn(&mut self, gradient: &[f32], settings: &Settings, d: f64, beta3: f64) {
        let (beta1, beta2) = (settings.beta1 as f32, settings.beta2 as f32);
        let first = (d * (1.0 - settings.beta1)) as f32;
        let second = (d * d * (1.0 - settings.beta2)) as f32;
        // The safeguard: without the learning rate, so that the small steps of a warm-up do not
        // make the distance look large.
        let (kept, weight) = (beta3 as f32, (d / D0 * d) as f32);
        let sums = self.s.iter_mut();
        let moments = self.m.iter_mut().zip(&mut self.v);
        for ((&g, s), (m, v)) in gradient.iter().zip(sums).zip(moments) {
            *m = *m * beta1 + first * g;
            *v = *v * beta2 + second * g * g;
            *s = *s * kept + weight * g;
        }
    }
}
