//! The part of a picture that a step sees.

use image::{GenericImageView as _, imageops};

use super::Sample;
use crate::training::{
    options::{Crop, TrainingOptions},
    random::{Draw, Purpose},
};

/// How pictures differ from step to step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Augment {
    pub crop: Crop,
    pub flip: bool,
}

/// What [`Augment`] came to: with the sample, all that a cut depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Choice {
    /// The upper left corner.
    pub x: u32,
    pub y: u32,
    pub flip: bool,
}

/// A picture for the VAE.
#[derive(Debug, Clone, PartialEq)]
pub struct Cut {
    pub width: usize,
    pub height: usize,
    /// `[height, width, 3]`, from -1 to 1.
    pub values: Vec<f32>,
}

impl Augment {
    pub fn of(options: &TrainingOptions) -> Self {
        Self {
            crop: options.crop,
            flip: options.flip,
        }
    }

    /// The choice for a place in a step's batch.
    pub fn choose(self, sample: &Sample, seed: u64, step: u64, place: u64) -> Choice {
        let (x, y) = sample.slack();
        let (x, y) = match self.crop {
            Crop::Center => (x / 2, y / 2),
            Crop::Random => {
                let mut draw = Draw::new(seed, step, place, Purpose::Crop);
                // At most what was passed in, which is a u32.
                let mut below = |slack: u32| draw.below(u64::from(slack) + 1) as u32;
                (below(x), below(y))
            }
        };
        let flip = self.flip && Draw::new(seed, step, place, Purpose::Flip).chance(0.5);
        Choice { x, y, flip }
    }
}

impl Sample {
    /// How far the corner of a cut can be from the picture's.
    fn slack(&self) -> (u32, u32) {
        let (width, height) = self.picture.dimensions();
        (width - self.size.width, height - self.size.height)
    }

    /// The choice without any chance in it: the middle, not mirrored.
    pub fn middle(&self) -> Choice {
        let (x, y) = self.slack();
        Choice {
            x: x / 2,
            y: y / 2,
            flip: false,
        }
    }

    /// A cut of its bucket's size. A corner too far to the right or below is moved back.
    pub fn cut(&self, choice: Choice) -> Cut {
        let slack = self.slack();
        let (x, y) = (choice.x.min(slack.0), choice.y.min(slack.1));
        let mut part = self
            .picture
            .view(x, y, self.size.width, self.size.height)
            .to_image();
        if choice.flip {
            imageops::flip_horizontal_in_place(&mut part);
        }
        let values = part.as_raw().iter();
        Cut {
            width: self.size.width as usize,
            height: self.size.height as usize,
            values: values
                .map(|&v| 2.0 * (f32::from(v) / 255.0) - 1.0)
                .collect(),
        }
    }
}
