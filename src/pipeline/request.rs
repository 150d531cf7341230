//! The one domain request every dialect and the command line translate into.
//!
//! [`RequestDraft::validate`] is the only way to an [`ImageRequest`] for callers, and a pure
//! function but for the seed it draws when none is given. Its errors name the field, the limit and
//! what to send instead.

use std::sync::Arc;

use image::{GrayImage, RgbImage};

pub use super::init_image::InitImage;
use super::{
    Mixture,
    init_image::{init_image, size_for_image},
    prompt, tags,
};
use crate::registry::{Generation, Resident};
use crate::schedulers::{SchedulerKind, UnknownScheduler};

/// Guidance above this only burns the picture; samplers overflow long before infinity.
const MAX_GUIDANCE: f64 = 100.0;
/// Intermediate pictures per request: each costs a decode.
pub const MAX_PREVIEWS: u32 = 16;
/// Strengths beyond this, in either direction, are slips of the finger.
pub(crate) const MOST_STRENGTH: f64 = 100.0;
/// Adapters of one request.
const MOST_ADAPTERS: usize = 32;

/// An adapter that a request names.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterChoice {
    pub name: String,
    /// Strength in the UNet: 1 is what the adapter was trained for, less than 0 the opposite.
    pub unet: f64,
    /// Strength in the text encoder.
    pub text: f64,
    /// Hash of the file that is used, once it is known.
    pub sha256: Option<Generation>,
}

/// What a client asked for, before validation: every field optional but the prompt.
#[derive(Debug, Clone, Default)]
pub struct RequestDraft {
    /// What to paint.
    pub prompt: String,
    pub negative_prompt: Option<String>,
    /// Pixels.
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub steps: Option<u64>,
    pub guidance_scale: Option<f64>,
    /// Seed of the first picture; picture `i` is drawn with `seed + i`. Random when absent.
    pub seed: Option<u64>,
    /// Number of pictures.
    pub n: Option<u64>,
    /// A scheduler's name, in our spelling, diffusers' class name or A1111's label.
    pub scheduler: Option<String>,
    /// Text-encoder layers left out at the end: 0 or absent is the last layer (diffusers' count).
    pub clip_skip: Option<u64>,
    /// Picture to start from (img2img), already decoded.
    pub image: Option<RgbImage>,
    /// White where the picture is to be painted anew (inpainting); needs `image`.
    pub mask: Option<GrayImage>,
    /// Share of the noise schedule that img2img runs, in (0, 1].
    pub strength: Option<f64>,
    /// Number of intermediate pictures wanted on the progress channel.
    pub previews: Option<u64>,
    /// Adapters beside those that tags in the prompt name.
    pub adapters: Vec<AdapterChoice>,
}

/// Bounds that the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_prompt_bytes: usize,
    /// Pixels per side.
    pub max_side: u32,
    pub max_steps: u32,
    pub max_images: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_prompt_bytes: 16 * 1024,
            max_side: 2048,
            max_steps: 200,
            max_images: 8,
        }
    }
}

/// What the model itself fixes or suggests.
#[derive(Debug, Clone)]
pub struct ModelDefaults {
    pub width: u32,
    pub height: u32,
    /// Sides must be multiples of this many pixels (the VAE's factor).
    pub side_multiple: u32,
    pub steps: u32,
    pub guidance_scale: f64,
    pub scheduler: SchedulerKind,
    /// Number of text-encoder layers, the bound of `clip_skip`.
    pub text_layers: u32,
}

/// A field that cannot be used, with what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct InvalidField {
    pub field: &'static str,
    pub message: String,
}

/// A request that has been checked: every value can be used as it is.
#[derive(Debug, Clone)]
pub struct ImageRequest {
    pub prompt: String,
    pub negative_prompt: String,
    pub width: u32,
    pub height: u32,
    pub steps: u32,
    pub guidance_scale: f64,
    pub seed: u64,
    pub n: u32,
    pub scheduler: SchedulerKind,
    pub clip_skip: u32,
    pub init: Option<InitImage>,
    pub previews: u32,
    /// Those of the tags come last, in their order.
    pub adapters: Vec<AdapterChoice>,
    /// What `adapters` come to; absent until somebody mixed them.
    pub mixture: Option<Arc<Resident<Mixture>>>,
}

impl InvalidField {
    pub(super) fn new(field: &'static str, message: impl Into<String>) -> Self {
        Self {
            field,
            message: message.into(),
        }
    }
}

impl RequestDraft {
    /// Checks every field against the model and the operator's limits and fills in what is absent.
    ///
    /// The init image and its mask are brought to the size of the request, which costs time
    /// proportional to their area: call this off the async threads when there is an image.
    pub fn validate(
        self,
        model: &ModelDefaults,
        limits: &Limits,
    ) -> Result<ImageRequest, InvalidField> {
        check_text("prompt", &self.prompt, limits)?;
        let (prompt, tagged) =
            tags::extract(&self.prompt).map_err(|error| InvalidField::new("prompt", error))?;
        let adapters = check_adapters(self.adapters, tagged)?;
        if prompt.trim().is_empty() {
            return Err(InvalidField::new(
                "prompt",
                "must not be empty; say what to paint",
            ));
        }
        check_grammar("prompt", &prompt)?;
        let negative_prompt = self.negative_prompt.unwrap_or_default();
        check_text("negative_prompt", &negative_prompt, limits)?;
        check_grammar("negative_prompt", &negative_prompt)?;
        if tags::extract(&negative_prompt).is_ok_and(|(_, tagged)| !tagged.is_empty()) {
            return Err(InvalidField::new(
                "negative_prompt",
                "names an adapter; adapters change the whole picture: move the tag to the prompt, \
                 with a strength below 0 for the opposite",
            ));
        }

        let from_image = self
            .image
            .as_ref()
            .map(|i| size_for_image(i.dimensions(), model, limits));
        let (width, height) = from_image.unwrap_or((model.width, model.height));
        let width = check_side("width", self.width.unwrap_or(width), model, limits)?;
        let height = check_side("height", self.height.unwrap_or(height), model, limits)?;

        let steps = whole(
            "steps",
            self.steps,
            model.steps,
            1,
            limits.max_steps,
            "more steps seldom help",
        )?;
        let n = whole(
            "n",
            self.n,
            1,
            1,
            limits.max_images,
            "send several requests for more pictures",
        )?;
        let previews = whole(
            "partial_images",
            self.previews,
            0,
            0,
            MAX_PREVIEWS,
            "each one costs a decode",
        )?;
        // At least one layer must run.
        let most = model.text_layers.saturating_sub(1);
        let clip_skip = whole(
            "clip_skip",
            self.clip_skip,
            0,
            0,
            most,
            "0 takes the last layer of the text encoder, 1 the one before it",
        )?;
        let guidance_scale = check_guidance(self.guidance_scale.unwrap_or(model.guidance_scale))?;
        let scheduler = match &self.scheduler {
            Some(name) => name.parse().map_err(|error: UnknownScheduler| {
                InvalidField::new("scheduler", error.to_string())
            })?,
            None => model.scheduler,
        };
        // A drawn seed fits 32 bits, so that JavaScript clients can send it back unrounded.
        let seed = self
            .seed
            .unwrap_or_else(|| u64::from(rand::random::<u32>()));
        if seed.checked_add(u64::from(n) - 1).is_none() {
            return Err(InvalidField::new(
                "seed",
                format!(
                    "picture i is drawn with seed + i, and {seed} + {} passes 2^64 - 1; \
                     send at most {}",
                    n - 1,
                    u64::MAX - (u64::from(n) - 1)
                ),
            ));
        }
        let init = init_image(self.image, self.mask, self.strength, (width, height), steps)?;

        Ok(ImageRequest {
            prompt,
            negative_prompt,
            width,
            height,
            steps,
            guidance_scale,
            seed,
            n,
            scheduler,
            clip_skip,
            init,
            previews,
            adapters,
            mixture: None,
        })
    }
}

fn check_text(field: &'static str, text: &str, limits: &Limits) -> Result<(), InvalidField> {
    if text.len() > limits.max_prompt_bytes {
        return Err(InvalidField::new(
            field,
            format!(
                "has {} bytes; shorten it to {}",
                text.len(),
                limits.max_prompt_bytes
            ),
        ));
    }
    Ok(())
}

/// Read for its errors alone, which the client is to see before its turn comes.
fn check_grammar(field: &'static str, text: &str) -> Result<(), InvalidField> {
    prompt::parse(text).map_err(|error| InvalidField::new(field, error.to_string()))?;
    Ok(())
}

fn check_adapters(
    mut adapters: Vec<AdapterChoice>,
    tagged: Vec<AdapterChoice>,
) -> Result<Vec<AdapterChoice>, InvalidField> {
    let field = match adapters.is_empty() {
        true => "prompt",
        false => "adapters",
    };
    adapters.extend(tagged);
    if adapters.len() > MOST_ADAPTERS {
        return Err(InvalidField::new(
            field,
            format!(
                "names {} adapters; name at most {MOST_ADAPTERS}",
                adapters.len()
            ),
        ));
    }
    for AdapterChoice {
        name, unet, text, ..
    } in &adapters
    {
        for strength in [unet, text] {
            // Not the other way round: NaN must not pass.
            if !(-MOST_STRENGTH..=MOST_STRENGTH).contains(strength) {
                return Err(InvalidField::new(
                    "adapters",
                    format!(
                        "the strength of `{name}` must be a number from -{MOST_STRENGTH} to \
                         {MOST_STRENGTH}, got {strength}; 1 is usual"
                    ),
                ));
            }
        }
    }
    Ok(adapters)
}

fn check_side(
    field: &'static str,
    side: u32,
    model: &ModelDefaults,
    limits: &Limits,
) -> Result<u32, InvalidField> {
    let multiple = model.side_multiple.max(1);
    let most = limits.max_side / multiple * multiple;
    if side >= multiple && side <= most && side.is_multiple_of(multiple) {
        return Ok(side);
    }
    let nearest = (f64::from(side) / f64::from(multiple)).round() as u32;
    let nearest = nearest
        .saturating_mul(multiple)
        .clamp(multiple, most.max(multiple));
    Err(InvalidField::new(
        field,
        format!(
            "must be a multiple of {multiple} from {multiple} to {most} pixels, got {side}; \
             try {nearest}"
        ),
    ))
}

/// A count with a default and bounds; `hint` says why or what else to do.
fn whole(
    field: &'static str,
    value: Option<u64>,
    default: u32,
    least: u32,
    most: u32,
    hint: &str,
) -> Result<u32, InvalidField> {
    let value = value.unwrap_or(u64::from(default));
    match u32::try_from(value) {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(InvalidField::new(
            field,
            format!("must be a whole number from {least} to {most}, got {value}; {hint}"),
        )),
    }
}

fn check_guidance(scale: f64) -> Result<f64, InvalidField> {
    if (0.0..=MAX_GUIDANCE).contains(&scale) {
        return Ok(scale);
    }
    Err(InvalidField::new(
        "guidance_scale",
        format!(
            "must be a number from 0 to {MAX_GUIDANCE}, got {scale}; 7.5 is usual, 1 or less \
             switches guidance off"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ModelDefaults {
        ModelDefaults {
            width: 128,
            height: 64,
            side_multiple: 8,
            steps: 20,
            guidance_scale: 7.5,
            scheduler: SchedulerKind::Euler,
            text_layers: 12,
        }
    }

    fn draft() -> RequestDraft {
        RequestDraft {
            prompt: "a red fox".into(),
            ..Default::default()
        }
    }

    fn validate(change: impl FnOnce(&mut RequestDraft)) -> Result<ImageRequest, InvalidField> {
        let mut draft = draft();
        change(&mut draft);
        draft.validate(&model(), &Limits::default())
    }

    #[test]
    fn what_is_absent_comes_from_the_model() {
        let request = validate(|_| {}).unwrap();
        assert_eq!((request.width, request.height), (128, 64));
        assert_eq!(
            (
                request.steps,
                request.n,
                request.clip_skip,
                request.previews
            ),
            (20, 1, 0, 0)
        );
        assert_eq!(request.guidance_scale, 7.5);
        assert_eq!(request.scheduler, SchedulerKind::Euler);
        assert!(request.init.is_none());
        assert!(request.seed <= u64::from(u32::MAX));
    }

    #[test]
    fn every_refusal_names_the_field_the_limit_and_the_fix() {
        type Change = fn(&mut RequestDraft);
        let table: &[(&str, &str, Change)] = &[
            ("prompt", "must not be empty", |d| d.prompt.clear()),
            ("prompt", "must not be empty", |d| d.prompt = " \n\t".into()),
            ("prompt", "shorten it to 16384", |d| {
                d.prompt = "x".repeat(100_000)
            }),
            ("negative_prompt", "16384", |d| {
                d.negative_prompt = Some("x".repeat(100_000))
            }),
            (
                "prompt",
                "`:1.2.3)` is not a weight; write one as in",
                |d| d.prompt = "a (fox:1.2.3)".into(),
            ),
            ("negative_prompt", "from -100 to 100", |d| {
                d.negative_prompt = Some("((".repeat(8000) + "a")
            }),
            ("width", "from 8 to 2048 pixels, got 0; try 8", |d| {
                d.width = Some(0)
            }),
            ("width", "got 7; try 8", |d| d.width = Some(7)),
            ("height", "got 513; try 512", |d| d.height = Some(513)),
            ("height", "got 100000; try 2048", |d| {
                d.height = Some(100_000)
            }),
            ("width", "try 2048", |d| d.width = Some(u32::MAX)),
            ("steps", "from 1 to 200, got 0", |d| d.steps = Some(0)),
            ("steps", "got 1000000", |d| d.steps = Some(1_000_000)),
            ("steps", "got 18446744073709551615", |d| {
                d.steps = Some(u64::MAX)
            }),
            ("n", "from 1 to 8, got 0", |d| d.n = Some(0)),
            ("n", "send several requests", |d| d.n = Some(9)),
            ("guidance_scale", "got NaN", |d| {
                d.guidance_scale = Some(f64::NAN)
            }),
            ("guidance_scale", "got -1", |d| {
                d.guidance_scale = Some(-1.0)
            }),
            ("guidance_scale", "got inf", |d| {
                d.guidance_scale = Some(f64::INFINITY)
            }),
            ("guidance_scale", "from 0 to 100, got 100.5", |d| {
                d.guidance_scale = Some(100.5)
            }),
            ("scheduler", "nope", |d| d.scheduler = Some("nope".into())),
            ("clip_skip", "from 0 to 11, got 12", |d| {
                d.clip_skip = Some(12)
            }),
            ("partial_images", "from 0 to 16, got 17", |d| {
                d.previews = Some(17)
            }),
            ("seed", "send at most 18446744073709551614", |d| {
                d.seed = Some(u64::MAX);
                d.n = Some(2);
            }),
            ("mask", "send `image` too", |d| {
                d.mask = Some(GrayImage::new(8, 8))
            }),
            ("strength", "send `image` too", |d| d.strength = Some(0.5)),
            ("strength", "above 0 and at most 1, got 0", |d| {
                with_image(d, 0.0)
            }),
            ("strength", "got 1.01", |d| with_image(d, 1.01)),
            ("strength", "got -0.5", |d| with_image(d, -0.5)),
            ("strength", "got NaN", |d| with_image(d, f64::NAN)),
            ("strength", "send at least 0.05", |d| with_image(d, 0.04)),
            ("mask", "is 8x16 but the image is 16x16", |d| {
                with_image(d, 0.5);
                d.mask = Some(GrayImage::from_pixel(8, 16, [255].into()));
            }),
            ("mask", "marks nothing", |d| {
                with_image(d, 0.5);
                d.mask = Some(GrayImage::new(16, 16));
            }),
        ];
        for (field, text, change) in table {
            let error = validate(change).expect_err(&format!("{field}: {text}"));
            assert_eq!(error.field, *field, "{error}");
            assert!(error.message.contains(text), "{error} lacks {text:?}");
        }
    }

    fn with_image(draft: &mut RequestDraft, strength: f64) {
        draft.image = Some(RgbImage::new(16, 16));
        draft.strength = Some(strength);
    }

    #[test]
    fn the_edges_of_every_range_are_taken() {
        let request = validate(|d| {
            d.width = Some(8);
            d.height = Some(2048);
            d.steps = Some(200);
            d.n = Some(8);
            d.guidance_scale = Some(0.0);
            d.clip_skip = Some(11);
            d.seed = Some(u64::MAX - 7);
            d.previews = Some(16);
        })
        .unwrap();
        assert_eq!(request.seed, u64::MAX - 7);
        assert!(validate(|d| d.seed = Some(u64::MAX)).is_ok());
        assert!(validate(|d| d.guidance_scale = Some(100.0)).is_ok());
        assert!(validate(|d| with_image(d, 1.0)).is_ok());
        assert!(validate(|d| with_image(d, 0.05)).is_ok());
    }

    #[test]
    fn an_image_sets_the_size_rounded_to_what_the_model_can_paint() {
        let size = |w, h| size_for_image((w, h), &model(), &Limits::default());
        assert_eq!(size(100, 50), (104, 48));
        assert_eq!(size(1, 3), (8, 8));
        assert_eq!(size(4096, 1024), (2048, 512));
        assert_eq!(size(60_000, 1), (2048, 8));
        let request = validate(|d| {
            d.image = Some(RgbImage::new(100, 50));
            d.mask = Some(GrayImage::from_pixel(100, 50, [255].into()));
        })
        .unwrap();
        let init = request.init.unwrap();
        assert_eq!((request.width, request.height), (104, 48));
        assert_eq!(init.image.dimensions(), (104, 48));
        assert_eq!(init.mask.unwrap().dimensions(), (104, 48));
        assert_eq!(init.strength, 1.0, "inpainting starts from noise");
    }
}
