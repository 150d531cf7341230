//! What a picture's file says of how it was made, in AUTOMATIC1111's format.
//!
//! The web UI, Civitai and most galleries read it back: the prompt, `Negative prompt: …` on a line
//! of its own, and last a line of `Name: value` pairs (`create_infotext` in the web UI's
//! modules/processing.py).

use std::borrow::Cow;

use crate::{
    engine::ModelInfo,
    pipeline::{request::ImageRequest, tag},
};

/// The keyword of the PNG chunk.
pub(super) const KEYWORD: &str = "parameters";

/// The text for the picture drawn with `seed`.
pub(super) fn parameters(seed: u64, made: &ImageRequest, by: &ModelInfo) -> String {
    let mut text = plain(&made.prompt).into_owned();
    for choice in &made.adapters {
        text.push(' ');
        text.push_str(&tag(choice));
    }
    if !made.negative_prompt.is_empty() {
        text.push_str("\nNegative prompt: ");
        text.push_str(&plain(&made.negative_prompt));
    }
    let mut pairs = vec![
        ("Steps", made.steps.to_string()),
        ("Sampler", made.scheduler.label().into()),
        ("CFG scale", made.guidance_scale.to_string()),
        ("Seed", seed.to_string()),
        ("Size", format!("{}x{}", made.width, made.height)),
        ("Model hash", by.hash.clone()),
        ("Model", by.name.clone()),
    ];
    if let Some(init) = &made.init {
        pairs.push(("Denoising strength", init.strength.to_string()));
    }
    if made.clip_skip > 0 {
        // The web UI counts layers from the end, diffusers those that are left out.
        pairs.push(("Clip skip", (made.clip_skip + 1).to_string()));
    }
    let hashes: Vec<String> = made
        .adapters
        .iter()
        .filter_map(|choice| {
            // Civitai's AutoV2: the first ten digits of the file's SHA-256.
            let hash = choice.sha256?.to_string();
            Some(format!("{}: {}", choice.name, &hash[..10]))
        })
        .collect();
    if !hashes.is_empty() {
        pairs.push(("Lora hashes", hashes.join(", ")));
    }
    pairs.push((
        "Version",
        concat!("lorikeet ", env!("CARGO_PKG_VERSION")).into(),
    ));
    let pairs: Vec<String> = pairs
        .iter()
        .map(|(name, value)| format!("{name}: {}", quoted(value)))
        .collect();
    text.push('\n');
    text.push_str(&pairs.join(", "));
    text
}

/// PNG's rules for text: lines end in a line feed, and there is no NUL.
fn plain(text: &str) -> Cow<'_, str> {
    match text.contains(['\r', '\0']) {
        true => text.replace("\r\n", "\n").replace('\0', " ").into(),
        false => text.into(),
    }
}

/// A value that would be taken for several stands in quotes, as JSON writes them.
fn quoted(value: &str) -> Cow<'_, str> {
    match value.contains([',', '\n', ':']) {
        true => serde_json::Value::from(value).to_string().into(),
        false => value.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pipeline::request::{Limits, ModelDefaults, RequestDraft},
        schedulers::SchedulerKind,
    };

    fn info(name: &str) -> ModelInfo {
        ModelInfo {
            name: name.into(),
            hash: "0123456789".into(),
            defaults: ModelDefaults {
                width: 128,
                height: 64,
                side_multiple: 8,
                steps: 20,
                guidance_scale: 7.5,
                scheduler: SchedulerKind::EulerAncestral,
                text_layers: 12,
            },
            limits: Limits::default(),
            created: 0,
            device: String::new(),
        }
    }

    fn text(draft: RequestDraft, model: &str) -> String {
        let info = info(model);
        let request = draft.validate(&info.defaults, &info.limits).unwrap();
        parameters(9, &request, &info)
    }

    #[test]
    fn it_is_what_the_web_ui_would_write() {
        let draft = RequestDraft {
            prompt: "a red fox".into(),
            negative_prompt: Some("snow".into()),
            clip_skip: Some(1),
            image: Some(image::RgbImage::new(16, 16)),
            strength: Some(0.6),
            ..RequestDraft::default()
        };
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            text(draft, "sd15"),
            format!(
                "a red fox\nNegative prompt: snow\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, \
                 Seed: 9, Size: 16x16, Model hash: 0123456789, Model: sd15, \
                 Denoising strength: 0.6, Clip skip: 2, Version: lorikeet {version}"
            )
        );
    }

    #[test]
    fn a_name_with_commas_stays_one_value_and_text_keeps_to_pngs_rules() {
        let draft = RequestDraft {
            prompt: "a\r\nfox\0".into(),
            ..RequestDraft::default()
        };
        let text = text(draft, "my, \"own\": model");
        assert!(text.starts_with("a\nfox \nSteps: 20, "), "{text}");
        assert!(
            text.contains(r#", Model: "my, \"own\": model", Version"#),
            "{text}"
        );
    }
}
