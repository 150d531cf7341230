//! Noise schedules and samplers, numerically those of diffusers.

/// The samplers by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SchedulerKind {
    Ddim,
    Ddpm,
    Euler,
    EulerAncestral,
    Heun,
    Dpmpp2m,
    Dpmpp2mKarras,
    Dpmpp2mSde,
    Dpmpp2mSdeKarras,
    UniPc,
    Lcm,
}
