//! What a tensor of a file is to its site: the end of its key.

use super::{Dialect, table::Spelling};

/// The part a tensor plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Role {
    Alpha,
    Down,
    Up,
    Mid,
    /// The bias of `up`, which its scale goes for too.
    UpBias,
    /// DoRA's lengths, always of the rows.
    RowMagnitude,
    /// DoRA's lengths, of rows or columns as the shape says.
    DoraScale,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    Gain,
    OnInput,
    Diff,
    DiffBias,
    NormDiff,
    NormDiffBias,
}

/// How a role is spelt, and by whom.
struct Suffix {
    text: &'static str,
    role: Role,
    spellings: Whose,
}

#[derive(Clone, Copy)]
enum Whose {
    Peft,
    Diffusers,
    Processors,
    /// kohya's underscored names alone.
    Kohya,
    Any,
}

const fn suffix(text: &'static str, role: Role, spellings: Whose) -> Suffix {
    Suffix {
        text,
        role,
        spellings,
    }
}

/// `.weight` is an (IA)³ vector only behind kohya's names: behind dotted ones it is a model's own.
const SUFFIXES: [Suffix; 36] = [
    suffix(".lora_A.weight", Role::Down, Whose::Peft),
    suffix(".lora_B.weight", Role::Up, Whose::Peft),
    suffix(".lora_B.bias", Role::UpBias, Whose::Peft),
    suffix(".lora_magnitude_vector", Role::RowMagnitude, Whose::Peft),
    suffix(
        ".lora_magnitude_vector.weight",
        Role::RowMagnitude,
        Whose::Peft,
    ),
    suffix(".lora.down.weight", Role::Down, Whose::Diffusers),
    suffix(".lora.up.weight", Role::Up, Whose::Diffusers),
    suffix(
        ".lora_linear_layer.down.weight",
        Role::Down,
        Whose::Diffusers,
    ),
    suffix(".lora_linear_layer.up.weight", Role::Up, Whose::Diffusers),
    suffix(".down.weight", Role::Down, Whose::Processors),
    suffix(".up.weight", Role::Up, Whose::Processors),
    suffix(".alpha", Role::Alpha, Whose::Any),
    suffix(".lora.alpha", Role::Alpha, Whose::Diffusers),
    suffix(".lora_down.weight", Role::Down, Whose::Any),
    suffix(".lora_up.weight", Role::Up, Whose::Any),
    suffix(".lora_mid.weight", Role::Mid, Whose::Any),
    suffix(".dora_scale", Role::DoraScale, Whose::Any),
    suffix(".hada_w1_a", Role::HadaW1A, Whose::Any),
    suffix(".hada_w1_b", Role::HadaW1B, Whose::Any),
    suffix(".hada_w2_a", Role::HadaW2A, Whose::Any),
    suffix(".hada_w2_b", Role::HadaW2B, Whose::Any),
    suffix(".hada_t1", Role::HadaT1, Whose::Any),
    suffix(".hada_t2", Role::HadaT2, Whose::Any),
    suffix(".lokr_w1", Role::LokrW1, Whose::Any),
    suffix(".lokr_w1_a", Role::LokrW1A, Whose::Any),
    suffix(".lokr_w1_b", Role::LokrW1B, Whose::Any),
    suffix(".lokr_w2", Role::LokrW2, Whose::Any),
    suffix(".lokr_w2_a", Role::LokrW2A, Whose::Any),
    suffix(".lokr_w2_b", Role::LokrW2B, Whose::Any),
    suffix(".lokr_t2", Role::LokrT2, Whose::Any),
    suffix(".weight", Role::Gain, Whose::Kohya),
    suffix(".on_input", Role::OnInput, Whose::Kohya),
    suffix(".diff", Role::Diff, Whose::Any),
    suffix(".diff_b", Role::DiffBias, Whose::Any),
    suffix(".w_norm", Role::NormDiff, Whose::Any),
    suffix(".b_norm", Role::NormDiffBias, Whose::Any),
];

/// The ways to cut a key into a module's name, a role and whose suffix that is.
pub(super) fn cuts(key: &str) -> impl Iterator<Item = (&str, Role, Cut)> {
    SUFFIXES.iter().filter_map(move |suffix| {
        let module = key.strip_suffix(suffix.text)?;
        Some((module, suffix.role, Cut(suffix.spellings)))
    })
}

/// Whether a key ends as an adapter's keys do, whatever module it names.
pub(super) fn is_adapters(key: &str) -> bool {
    cuts(key).next().is_some()
}

impl Role {
    /// Whether its tensor is a single number, of whatever type.
    pub fn is_single(self) -> bool {
        matches!(self, Self::Alpha | Self::OnInput)
    }

    /// The end of its keys, as most dialects spell it.
    pub fn text(self) -> &'static str {
        SUFFIXES
            .iter()
            .find(|suffix| suffix.role == self)
            .map_or("", |suffix| suffix.text)
    }
}

/// Whose suffix a key has.
pub(super) struct Cut(Whose);

impl Cut {
    /// The dialect of a key with this suffix and a module so spelt; `None` if nobody writes that.
    pub fn dialect(&self, spelling: Spelling) -> Option<Dialect> {
        Some(match (spelling, self.0) {
            (Spelling::Processor, Whose::Processors) => Dialect::Processors,
            (Spelling::Processor, _) | (_, Whose::Processors) => return None,
            (Spelling::Kohya, Whose::Kohya | Whose::Any) => Dialect::Kohya,
            (Spelling::Sgm, Whose::Kohya | Whose::Any) => Dialect::KohyaSgm,
            (Spelling::Kohya | Spelling::Sgm, _) | (Spelling::Dotted, Whose::Kohya) => return None,
            (Spelling::Dotted, Whose::Diffusers) => Dialect::Diffusers,
            (Spelling::Dotted, Whose::Peft | Whose::Any) => Dialect::Peft,
        })
    }
}
