//! Which samplers there are, and their names in three worlds.

use std::{fmt, str::FromStr};

use super::SchedulerConfig;

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

/// A name that is no scheduler's in any spelling.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown scheduler `{name}`; send one of {}", known_names())]
pub struct UnknownScheduler {
    pub name: String,
}

fn known_names() -> String {
    SchedulerKind::all().map(SchedulerKind::name).join(", ")
}

impl SchedulerKind {
    /// Every kind, in the order of the documentation.
    pub const fn all() -> [Self; 11] {
        use SchedulerKind::*;
        [
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
        ]
    }

    /// Our own name, as requests and the command line spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Ddpm => "ddpm",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_a",
            Self::Heun => "heun",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Dpmpp2mKarras => "dpmpp_2m_karras",
            Self::Dpmpp2mSde => "dpmpp_2m_sde",
            Self::Dpmpp2mSdeKarras => "dpmpp_2m_sde_karras",
            Self::UniPc => "unipc",
            Self::Lcm => "lcm",
        }
    }

    /// AUTOMATIC1111's label, as it goes into a picture's metadata.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ddim => "DDIM",
            Self::Ddpm => "DDPM",
            Self::Euler => "Euler",
            Self::EulerAncestral => "Euler a",
            Self::Heun => "Heun",
            Self::Dpmpp2m => "DPM++ 2M",
            Self::Dpmpp2mKarras => "DPM++ 2M Karras",
            Self::Dpmpp2mSde => "DPM++ 2M SDE",
            Self::Dpmpp2mSdeKarras => "DPM++ 2M SDE Karras",
            Self::UniPc => "UniPC",
            Self::Lcm => "LCM",
        }
    }

    /// Diffusers' class; `None` for kinds that are a class with other settings.
    const fn class_name(self) -> Option<&'static str> {
        Some(match self {
            Self::Ddim => "DDIMScheduler",
            Self::Ddpm => "DDPMScheduler",
            Self::Euler => "EulerDiscreteScheduler",
            Self::EulerAncestral => "EulerAncestralDiscreteScheduler",
            Self::Heun => "HeunDiscreteScheduler",
            Self::Dpmpp2m => "DPMSolverMultistepScheduler",
            Self::UniPc => "UniPCMultistepScheduler",
            Self::Lcm => "LCMScheduler",
            Self::Dpmpp2mKarras | Self::Dpmpp2mSde | Self::Dpmpp2mSdeKarras => return None,
        })
    }

    /// The kind a model's own config suggests.
    ///
    /// Schedulers that are not here get a stand-in. PNDM and its kin, which the Stable Diffusion 1
    /// models name, become DDIM: it is the same discretisation of the same equation at first order,
    /// reads the same fields of the config, and starts from the same unscaled noise, so that a
    /// picture keeps its composition; and it is deterministic, as they are. The other multistep
    /// and single-step DPM solvers become DPM++ 2M, and anything else becomes Euler.
    pub fn from_config(config: &SchedulerConfig) -> Self {
        let Some(class) = config.class_name.as_deref() else {
            return Self::Ddim;
        };
        let karras = config.use_karras_sigmas == Some(true);
        let sde = matches!(&config.algorithm_type, Some(t) if t.starts_with("sde"));
        match class {
            "DPMSolverMultistepScheduler"
            | "DPMSolverSinglestepScheduler"
            | "DPMSolverSDEScheduler"
            | "DEISMultistepScheduler" => match (sde || class.contains("SDE"), karras) {
                (false, false) => Self::Dpmpp2m,
                (false, true) => Self::Dpmpp2mKarras,
                (true, false) => Self::Dpmpp2mSde,
                (true, true) => Self::Dpmpp2mSdeKarras,
            },
            "PNDMScheduler"
            | "IPNDMScheduler"
            | "LMSDiscreteScheduler"
            | "DDIMParallelScheduler" => Self::Ddim,
            _ => Self::all()
                .into_iter()
                .find(|kind| kind.class_name() == Some(class))
                .unwrap_or(Self::Euler),
        }
    }
}

impl fmt::Display for SchedulerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for SchedulerKind {
    type Err = UnknownScheduler;

    /// Reads our names, diffusers' class names and AUTOMATIC1111's labels, whatever the case,
    /// spaces, dashes and underscores.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let wanted = folded(name);
        Self::all()
            .into_iter()
            .find(|kind| {
                [Some(kind.name()), Some(kind.label()), kind.class_name()]
                    .into_iter()
                    .flatten()
                    .any(|known| folded(known) == wanted)
            })
            .or(match wanted.as_str() {
                "eulerancestral" => Some(Self::EulerAncestral),
                "ddimcfg++" => None,
                _ => None,
            })
            .ok_or_else(|| UnknownScheduler {
                // A hostile name must not fill the log.
                name: name.chars().take(64).collect(),
            })
    }
}

fn folded(name: &str) -> String {
    name.chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, '_' | '-'))
        .flat_map(char::to_lowercase)
        .collect::<String>()
        .replace("++", "pp")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Option<SchedulerKind> {
        name.parse().ok()
    }

    #[test]
    fn three_worlds_names_are_understood() {
        use SchedulerKind::*;
        for kind in SchedulerKind::all() {
            assert_eq!(parse(kind.name()), Some(kind));
            assert_eq!(parse(kind.label()), Some(kind));
            assert_eq!(parse(&kind.to_string().to_uppercase()), Some(kind));
        }
        let table = [
            ("EulerAncestralDiscreteScheduler", EulerAncestral),
            ("eulerdiscretescheduler", Euler),
            ("DPMSolverMultistepScheduler", Dpmpp2m),
            ("DPM++ 2M Karras", Dpmpp2mKarras),
            ("dpm++ 2m sde karras", Dpmpp2mSdeKarras),
            ("DPM++2MSDE", Dpmpp2mSde),
            (" euler A ", EulerAncestral),
            ("Euler-Ancestral", EulerAncestral),
            ("dpmpp 2m", Dpmpp2m),
            ("UniPCMultistepScheduler", UniPc),
        ];
        for (name, kind) in table {
            assert_eq!(parse(name), Some(kind), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        for name in ["", "nope", "euler b", &"x".repeat(100_000)] {
            let error = name.parse::<SchedulerKind>().unwrap_err().to_string();
            assert!(error.contains("dpmpp_2m_sde_karras"), "{error}");
            assert!(error.len() < 300);
        }
    }

    #[test]
    fn a_models_own_class_suggests_the_kind() {
        use SchedulerKind::*;
        let from =
            |text: &str| SchedulerKind::from_config(&SchedulerConfig::from_json(text).unwrap());
        assert_eq!(from("{}"), Ddim);
        assert_eq!(from(r#"{"_class_name": "PNDMScheduler"}"#), Ddim);
        assert_eq!(from(r#"{"_class_name": "LCMScheduler"}"#), Lcm);
        assert_eq!(
            from(r#"{"_class_name": "EulerAncestralDiscreteScheduler"}"#),
            EulerAncestral
        );
        assert_eq!(
            from(
                r#"{"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true,
                    "algorithm_type": "sde-dpmsolver++"}"#
            ),
            Dpmpp2mSdeKarras
        );
        assert_eq!(
            from(
                r#"{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}"#
            ),
            Dpmpp2m
        );
        assert_eq!(from(r#"{"_class_name": "SomethingElse"}"#), Euler);
    }
}
