//! The part all samplers share: where in the schedule a picture stands.

use super::Sampler;

/// A sampling method: what happens at position `index` of its schedule.
///
/// Its slices all have the length of the sample.
pub(super) trait Method: Send {
    /// Of every model call of the whole schedule.
    fn timesteps(&self) -> &[f32];
    /// Model calls per step, diffusers' `order`.
    fn calls_per_step(&self) -> usize {
        1
    }
    fn init_noise_sigma(&self) -> f32 {
        1.0
    }
    fn scale_model_input(&self, _index: usize, sample: &[f32]) -> Vec<f32> {
        sample.to_vec()
    }
    fn step(
        &mut self,
        index: usize,
        output: &[f32],
        sample: &mut [f32],
        noise: &mut dyn FnMut() -> Vec<f32>,
    );
    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32>;
    /// Factors of the original and of the noise in a noisy sample.
    fn noise_level(&self, index: usize) -> (f32, f32);
}

/// A method and a position in its schedule.
pub(super) struct Run<M> {
    method: M,
    begin: usize,
    index: usize,
}

impl<M: Method + 'static> Run<M> {
    /// A run that leaves out the first `skipped` steps.
    pub(super) fn boxed(method: M, skipped: usize) -> Box<dyn Sampler> {
        let begin = skipped * method.calls_per_step();
        Box::new(Self {
            method,
            begin,
            index: begin,
        })
    }
}

impl<M: Method> Run<M> {
    fn finished(&self) -> bool {
        self.index >= self.method.timesteps().len()
    }
}

impl<M: Method> Sampler for Run<M> {
    fn init_noise_sigma(&self) -> f32 {
        self.method.init_noise_sigma()
    }

    fn evaluations(&self) -> usize {
        self.method.timesteps().len() - self.begin
    }

    fn done(&self) -> usize {
        self.index - self.begin
    }

    fn timestep(&self) -> Option<f32> {
        self.method.timesteps().get(self.index).copied()
    }

    fn scale_model_input(&self, sample: &[f32]) -> Vec<f32> {
        if self.finished() {
            return sample.to_vec();
        }
        self.method.scale_model_input(self.index, sample)
    }

    fn step(
        &mut self,
        model_output: &[f32],
        sample: &mut [f32],
        noise: &mut dyn FnMut() -> Vec<f32>,
    ) {
        debug_assert_eq!(model_output.len(), sample.len());
        if self.finished() {
            return;
        }
        self.method.step(self.index, model_output, sample, noise);
        self.index += 1;
    }

    fn denoised(&self, model_output: &[f32], sample: &[f32]) -> Vec<f32> {
        if self.finished() {
            return sample.to_vec();
        }
        self.method.denoised(self.index, model_output, sample)
    }

    fn add_noise(&self, original: &[f32], noise: &[f32]) -> Option<Vec<f32>> {
        if self.finished() {
            return None;
        }
        let (signal, level) = self.method.noise_level(self.index);
        Some(combine(original, noise, |x, n| signal * x + level * n))
    }
}

/// Element by element.
pub(super) fn combine(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
}

/// Element by element, in place of `a`.
pub(super) fn update(a: &mut [f32], b: &[f32], f: impl Fn(f32, f32) -> f32) {
    for (a, &b) in a.iter_mut().zip(b) {
        *a = f(*a, b);
    }
}
