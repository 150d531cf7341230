//! Captions for a word that nobody has described yet.
//!
//! The lists of the textual inversion authors, which diffusers' script has too.

use crate::training::{
    options::Learnable,
    random::{Draw, Purpose},
};

const OBJECT: [&str; 27] = [
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
];
const STYLE: [&str; 19] = [
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
];

/// Templates with `{}` where the word belongs.
pub fn templates(learnable: Learnable) -> &'static [&'static str] {
    match learnable {
        Learnable::Object => &OBJECT,
        Learnable::Style => &STYLE,
    }
}

/// A caption with the word, for a place in a step's batch.
pub fn with_token(learnable: Learnable, token: &str, seed: u64, step: u64, place: u64) -> String {
    let templates = templates(learnable);
    let mut draw = Draw::new(seed, step, place, Purpose::Template);
    let chosen = draw.below(templates.len() as u64) as usize;
    templates[chosen].replace("{}", token)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_template_comes_and_has_the_word_once() {
        for learnable in [Learnable::Object, Learnable::Style] {
            let distinct: HashSet<_> = templates(learnable).iter().collect();
            let captions: HashSet<String> = (0..1000)
                .map(|place| with_token(learnable, "<zorp>", 7, 3, place))
                .collect();
            assert_eq!(captions.len(), distinct.len());
            assert!(captions.iter().all(|c| c.matches("<zorp>").count() == 1));
            assert!(captions.iter().all(|c| !c.contains('{')));
        }
    }
}
