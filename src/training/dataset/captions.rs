//! How captions differ from step to step.

use crate::training::{
    options::TrainingOptions,
    random::{Draw, Purpose},
};

/// Dropout and shuffle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Captions {
    /// Share of the samples without a caption.
    pub dropout: f64,
    /// Whether the parts between commas change places.
    pub shuffle: bool,
    /// Parts that stay in front.
    pub keep: usize,
}

impl Captions {
    pub fn of(options: &TrainingOptions) -> Self {
        Self {
            dropout: options.caption_dropout,
            shuffle: options.caption_shuffle,
            keep: options.caption_keep as usize,
        }
    }

    /// The caption for a place in a step's batch.
    pub fn vary(&self, caption: &str, seed: u64, step: u64, place: u64) -> String {
        if Draw::new(seed, step, place, Purpose::CaptionDropout).chance(self.dropout) {
            return String::new();
        }
        if !self.shuffle {
            return caption.into();
        }
        let mut parts: Vec<&str> = caption.split(',').map(str::trim).collect();
        if let Some(rest) = parts.get_mut(self.keep..) {
            Draw::new(seed, step, place, Purpose::CaptionShuffle).shuffle(rest);
        }
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_shuffle_keeps_the_parts_and_the_first_in_front() {
        let captions = Captions {
            dropout: 0.0,
            shuffle: true,
            keep: 2,
        };
        let mut seen = HashSet::new();
        for step in 0..200 {
            let caption = captions.vary("zorp, monster,a,  b ,c", 1, step, 0);
            let parts: Vec<&str> = caption.split(", ").collect();
            assert_eq!(parts[..2], ["zorp", "monster"]);
            let mut rest = parts[2..].to_vec();
            rest.sort_unstable();
            assert_eq!(rest, ["a", "b", "c"]);
            assert_eq!(caption, captions.vary("zorp, monster,a,  b ,c", 1, step, 0));
            seen.insert(caption);
        }
        assert_eq!(seen.len(), 6, "all orders come");
        assert_eq!(captions.vary("one", 1, 0, 0), "one");
    }

    #[test]
    fn a_share_of_captions_is_dropped_and_others_stay_as_they_are() {
        let captions = Captions {
            dropout: 0.25,
            shuffle: false,
            keep: 0,
        };
        let all: Vec<String> = (0..2000).map(|p| captions.vary("a,b", 3, 0, p)).collect();
        let dropped = all.iter().filter(|caption| caption.is_empty()).count();
        assert!((420..580).contains(&dropped), "{dropped}");
        assert!(all.iter().all(|c| c.is_empty() || c == "a,b"));
    }
}
