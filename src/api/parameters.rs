//! The fields of an image request, as JSON and as a form.

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    ApiError, OutputFormat, applying,
    body::clip,
    fields::{Fields, wrong},
};
use crate::{
    engine::OnMissing,
    pipeline::request::{AdapterChoice, RequestDraft},
};

/// Names of OpenAI's that mean nothing here; taken without a word, so that its clients work.
const IGNORED: [&str; 6] = [
    "quality",
    "style",
    "user",
    "moderation",
    "input_fidelity",
    "safety_identifier",
];
/// Unknown names listed in the answer; the rest is counted.
const MOST_WARNINGS: usize = 16;

/// How a picture is put into a JSON answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ResponseFormat {
    /// Base64 in `b64_json`.
    #[default]
    B64Json,
    /// A `data:` URL in `url`: the server keeps no pictures to link to.
    Url,
}

/// What to paint and how.
///
/// The first fields are OpenAI's, the others ours. `quality`, `style`, `user`, `moderation` and
/// `input_fidelity` are accepted and ignored; unknown fields are named in the answer's `warnings`.
#[derive(Debug, Clone, Default, ToSchema)]
#[schema(example = json!({"prompt": "a red fox in the snow", "size": "128x128", "seed": 7}))]
pub(super) struct ImageParameters {
    /// What to paint. `(word:1.2)` and `[word]` weigh words as AUTOMATIC1111 does.
    pub prompt: String,
    /// A name from `/v1/models`; by default the model that is served. An adapter's name adds it at
    /// strength 1. OpenAI's own model names are taken for the served one, with a warning.
    pub model: Option<String>,
    /// Number of pictures; picture `i` is painted with seed `seed + i`.
    #[schema(minimum = 1, default = 1)]
    pub n: Option<u64>,
    /// `WIDTHxHEIGHT` in pixels, or `auto` for the model's own size.
    #[schema(example = "128x128")]
    pub size: Option<String>,
    /// `b64_json` (default), or `url` for a `data:` URL.
    #[schema(required = false)]
    pub response_format: ResponseFormat,
    /// `png` (default), `jpeg` or `webp`.
    #[schema(required = false)]
    pub output_format: OutputFormat,
    /// Quality of a JPEG, 0 to 100; 95 by default. PNG and WebP are written without loss.
    #[schema(maximum = 100)]
    pub output_compression: Option<u64>,
    /// `opaque` or `auto`; pictures have no transparency.
    pub background: Option<String>,
    /// Answer with server-sent events: previews, then the pictures.
    #[schema(required = false)]
    pub stream: bool,
    /// Number of previews in a stream.
    #[schema(maximum = 16, default = 0)]
    pub partial_images: Option<u64>,
    /// What to keep out of the picture.
    pub negative_prompt: Option<String>,
    /// Same seed, same picture. Random when absent, null or -1.
    #[schema(example = 7)]
    pub seed: Option<u64>,
    /// Denoising steps.
    #[schema(minimum = 1)]
    pub steps: Option<u64>,
    /// How closely to follow the prompt; 1 or less switches guidance off.
    #[schema(minimum = 0, maximum = 100)]
    pub guidance_scale: Option<f64>,
    /// `ddim`, `ddpm`, `euler`, `euler_a`, `heun`, `dpmpp_2m`, `dpmpp_2m_karras`, `dpmpp_2m_sde`,
    /// `dpmpp_2m_sde_karras`, `unipc` or `lcm`; diffusers' and AUTOMATIC1111's names work too.
    #[schema(example = "euler")]
    pub scheduler: Option<String>,
    /// Layers of the text encoder left out at its end.
    pub clip_skip: Option<u64>,
    /// Pixels; instead of `size`.
    pub width: Option<u32>,
    /// Pixels; instead of `size`.
    pub height: Option<u32>,
    /// For edits: how far to leave the picture sent, above 0 and up to 1. By default 0.8, with a
    /// mask 1.
    #[schema(maximum = 1)]
    pub strength: Option<f64>,
    /// Adapters to paint with, beside those that tags such as `<lora:fox:0.8>` in the prompt name.
    #[schema(required = false, value_type = Option<Vec<super::applying::AdapterField>>)]
    pub adapters: Vec<AdapterChoice>,
    /// What to do about an adapter that is not there: `error` (default), or `ignore` to paint without
    /// it; the answer then names it.
    #[schema(required = false, value_type = Option<String>, example = "error")]
    pub on_missing_adapter: OnMissing,
}

impl ImageParameters {
    /// Takes every field it knows.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        use OutputFormat::{Jpeg, Png, Webp};
        use ResponseFormat::{B64Json, Url};
        let formats = [("png", Png), ("jpeg", Jpeg), ("jpg", Jpeg), ("webp", Webp)];
        let forms = [("b64_json", B64Json), ("url", Url)];
        let parameters = Self {
            // An absent prompt is refused as an empty one is.
            prompt: fields.text("prompt")?.unwrap_or_default(),
            model: fields.text("model")?,
            n: fields.whole("n")?,
            size: fields.text("size")?,
            response_format: fields
                .choice("response_format", &forms)?
                .unwrap_or_default(),
            output_format: fields
                .choice("output_format", &formats)?
                .unwrap_or_default(),
            output_compression: fields.whole("output_compression")?,
            background: fields.text("background")?,
            stream: fields.flag("stream")?,
            partial_images: fields.whole("partial_images")?,
            negative_prompt: fields.text("negative_prompt")?,
            seed: fields.seed("seed")?,
            steps: fields.whole("steps")?,
            guidance_scale: fields.number("guidance_scale")?,
            scheduler: fields.text("scheduler")?,
            clip_skip: fields.whole("clip_skip")?,
            width: fields.side("width")?,
            height: fields.side("height")?,
            strength: fields.number("strength")?,
            adapters: applying::read(fields)?,
            on_missing_adapter: fields
                .choice(
                    "on_missing_adapter",
                    &[("error", OnMissing::Fail), ("ignore", OnMissing::Ignore)],
                )?
                .unwrap_or_default(),
        };
        if parameters
            .output_compression
            .is_some_and(|level| level > 100)
        {
            return Err(ApiError::field(
                "output_compression",
                "must be from 0 to 100",
            ));
        }
        for name in IGNORED {
            fields.take(name);
        }
        Ok(parameters)
    }

    /// What was asked for and will not happen.
    pub(super) fn warnings(&self, fields: &Fields) -> Vec<String> {
        let mut warnings: Vec<String> = fields
            .left_over()
            .take(MOST_WARNINGS)
            .map(|name| format!("unknown field `{}` is ignored", clip(name)))
            .collect();
        let more = fields.left_over().count().saturating_sub(MOST_WARNINGS);
        if more > 0 {
            warnings.push(format!("{more} more unknown fields are ignored"));
        }
        if !matches!(
            self.background.as_deref(),
            None | Some("" | "auto" | "opaque")
        ) {
            warnings.push("`background`: pictures have no transparency".into());
        }
        if !self.stream && self.partial_images.is_some_and(|count| count > 0) {
            warnings.push("`partial_images`: only a stream shows them; send `stream` too".into());
        }
        let lossy = self.output_format == OutputFormat::Jpeg;
        if !lossy && self.output_compression.is_some_and(|level| level < 100) {
            let format = self.output_format.name();
            warnings.push(format!(
                "`output_compression`: {format} is written without loss"
            ));
        }
        warnings
    }

    /// The domain's request, without pictures.
    pub(super) fn draft(&self) -> Result<RequestDraft, ApiError> {
        let (width, height) = match self.parsed_size()? {
            Some((width, height)) => (Some(width), Some(height)),
            None => (self.width, self.height),
        };
        Ok(RequestDraft {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            width,
            height,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            seed: self.seed,
            n: self.n,
            scheduler: self.scheduler.clone(),
            clip_skip: self.clip_skip,
            image: None,
            mask: None,
            strength: self.strength,
            previews: self.partial_images,
            adapters: self.adapters.clone(),
        })
    }

    /// `size` as width and height; `None` for `auto`.
    fn parsed_size(&self) -> Result<Option<(u32, u32)>, ApiError> {
        let text = match self.size.as_deref().map(str::trim) {
            None | Some("" | "auto") => return Ok(None),
            Some(text) => text,
        };
        let Some((width, height)) = parse_size(text) else {
            let got = text.into();
            return Err(wrong(
                "size",
                "WIDTHxHEIGHT in pixels, such as 512x512, or auto",
                &got,
            ));
        };
        let differs = |side: Option<u32>, from_size| side.is_some_and(|side| side != from_size);
        if differs(self.width, width) || differs(self.height, height) {
            return Err(ApiError::field(
                "size",
                format!("{width}x{height} contradicts `width` and `height`; send one of the two"),
            ));
        }
        Ok(Some((width, height)))
    }

    /// Sides are refused under the name the client sent them by.
    pub(super) fn rename_side(&self, error: ApiError) -> ApiError {
        match error {
            ApiError::InvalidField { field, message }
                if self.size.is_some() && matches!(&*field, "width" | "height") =>
            {
                ApiError::field("size", format!("{field} {message}"))
            }
            other => other,
        }
    }
}

/// `512x384` as (512, 384).
pub(crate) fn parse_size(text: &str) -> Option<(u32, u32)> {
    let (width, height) = text.split_once(['x', 'X', '×', '*'])?;
    Some((width.trim().parse().ok()?, height.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use utoipa::PartialSchema as _;

    use super::*;

    #[test]
    fn every_documented_field_is_understood_and_no_other() {
        let schema = serde_json::to_value(ImageParameters::schema()).unwrap();
        let documented: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
        let sent = documented.iter().map(|name| ((*name).clone(), json!(null)));
        let mut fields = Fields::new(sent.collect());
        ImageParameters::read(&mut fields).unwrap();
        assert_eq!(fields.left_over().count(), 0);
        assert_eq!(documented.len(), 21);
        assert_eq!(
            schema["required"],
            json!(["prompt"]),
            "all else has a default"
        );
    }

    #[test]
    fn sizes_are_read_in_the_usual_spellings() {
        assert_eq!(parse_size("512x384"), Some((512, 384)));
        assert_eq!(parse_size(" 8 X 16 "), Some((8, 16)));
        for text in ["512", "x", "-8x8", "8x8x8", "99999999999x8", "8.5x8", "axb"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }
}
