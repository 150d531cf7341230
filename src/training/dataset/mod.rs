//! From files to checked samples.
//!
//! [`files`] come from a folder, from an upload or out of a zip archive; [`Dataset::open`] tells
//! pictures from captions, decodes every picture once, and keeps it at the size it is trained at.
//! Everything a caller got wrong is an error that names the file; what is merely unwise is in
//! [`Dataset::notes`], and what was not used in [`Dataset::ignored`].
//!
//! What differs from step to step (crop, mirror, the caption's order) is a function of seed, step and
//! place in the batch: see [`random`](super::random).

mod archive;
mod buckets;
mod captions;
mod count;
mod cut;
mod error;
pub mod files;
mod pairing;
mod templates;
#[cfg(test)]
mod tests;

use image::{RgbImage, imageops};
use rayon::prelude::*;

use self::{files::File, pairing::Pairs};
use super::{
    options::{Method, TrainingOptions},
    random::{Draw, Purpose},
};
use crate::pictures;

pub use archive::ArchiveLimits;
pub use buckets::{Buckets, Size};
pub use captions::Captions;
pub use count::CountLimits;
pub use cut::{Augment, Choice, Cut};
pub use error::DatasetError;
pub use templates::{templates, with_token};

/// Pixels of the shorter side: less shows nothing that could be learned.
const LEAST_SIDE: u32 = 64;
/// The longer side over the shorter one: the crop would be a small part of what is beyond.
const LONGEST_SHAPE: u32 = 8;
/// Pictures decoded at a time: each may need as much memory as the decoder's limit.
const AT_A_TIME: usize = 4;
/// Where nothing else is said, one in so many is held out, and at most [`MOST_HELD_OUT`].
const HELD_OUT_SHARE: usize = 10;
const MOST_HELD_OUT: usize = 32;

/// A picture at the size it is trained at, or a little more.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Its file's.
    pub name: String,
    /// Its own caption, or the instance prompt; absent where templates make the captions.
    pub caption: Option<String>,
    /// Index into [`Dataset::sizes`].
    pub bucket: usize,
    size: Size,
    /// Covers its bucket's size.
    picture: RgbImage,
}

/// Pictures and captions, checked.
#[derive(Debug)]
pub struct Dataset {
    /// By name.
    pub samples: Vec<Sample>,
    /// Sizes that samples are cut to.
    pub sizes: Vec<Size>,
    /// What may spoil the result.
    pub notes: Vec<String>,
    /// Files that are neither pictures nor captions of one.
    pub ignored: Vec<String>,
}

impl Dataset {
    /// Checks files for a run. Sides of what is trained become multiples of `multiple` pixels. Slow: it
    /// decodes every picture.
    pub fn open(
        files: Vec<File>,
        options: &TrainingOptions,
        multiple: u32,
    ) -> Result<Self, DatasetError> {
        let Pairs {
            pictures,
            mut ignored,
        } = pairing::pair(files)?;
        let mut notes = Vec::new();
        let count = pictures.len();
        notes.extend(count::check(options.method, count, &ignored)?);
        let held_out = held_out(options, count);
        count::check_left(options.method, count, held_out)?;
        if held_out > 0 {
            notes.push(format!(
                "{held_out} of {count} pictures are held out to measure training by"
            ));
        }
        let buckets = match options.aspect_buckets {
            true => Buckets::new(options.resolution, multiple),
            false => Buckets::square(options.resolution),
        };
        let mut samples = Vec::with_capacity(pictures.len());
        let mut small = Vec::new();
        let mut pictures = pictures.into_iter();
        loop {
            let some: Vec<_> = pictures.by_ref().take(AT_A_TIME).collect();
            if some.is_empty() {
                break;
            }
            // All are waited for, so that the first wrong file is named, whichever is done first.
            let read: Vec<_> = some
                .into_par_iter()
                .map(|(file, caption)| Sample::read(file, caption, &buckets))
                .collect();
            for sample in read {
                let (sample, shorter) = sample?;
                if shorter * 2 < options.resolution {
                    small.push(sample.name.clone());
                }
                samples.push(sample);
            }
        }
        if !small.is_empty() {
            notes.push(format!(
                "less than half of the {} pixels that are trained, and will look blurred: {}",
                options.resolution,
                listed(&small)
            ));
        }
        caption(&mut samples, options, &mut notes)?;
        ignored.sort();
        Ok(Self {
            samples,
            sizes: buckets.sizes,
            notes,
            ignored,
        })
    }

    /// The bucket of each sample, for [`Order`](super::order::Order).
    pub fn bucket_of(&self) -> Vec<usize> {
        self.samples.iter().map(|sample| sample.bucket).collect()
    }

    /// Samples kept from training to measure it by, in ascending order: none, unless evaluations are
    /// asked for; then as many as the options say, or one in ten, and at least one.
    pub fn held_out(&self, options: &TrainingOptions) -> Vec<usize> {
        let count = self.samples.len();
        let mut order = Draw::new(options.seed, 0, 0, Purpose::HeldOut).permutation(count);
        order.truncate(held_out(options, count));
        order.sort_unstable();
        order
    }
}

/// How many of `count` pictures are held out.
fn held_out(options: &TrainingOptions, count: usize) -> usize {
    match &options.evaluations {
        None => 0,
        Some(evaluations) => match evaluations.held_out {
            Some(held_out) => held_out as usize,
            None => (count / HELD_OUT_SHARE).clamp(1, MOST_HELD_OUT),
        },
    }
}

/// Gives every sample the caption it is trained with.
fn caption(
    samples: &mut [Sample],
    options: &TrainingOptions,
    notes: &mut Vec<String>,
) -> Result<(), DatasetError> {
    if options.method == Method::TextualInversion {
        let captions = samples.iter_mut().filter_map(|s| s.caption.take()).count();
        if captions > 0 {
            notes.push(format!(
                "{captions} captions are not used: textual inversion makes its own from templates"
            ));
        }
        return Ok(());
    }
    let mut missing = Vec::new();
    for sample in samples {
        if sample.caption.is_none() {
            sample.caption = options.instance_prompt.clone();
        }
        if sample.caption.is_none() {
            missing.push(sample.name.clone());
        }
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(DatasetError::NoCaption {
            files: listed(&missing),
        }),
    }
}

impl Sample {
    /// A sample and the shorter side of its picture as it came.
    fn read(
        file: File,
        caption: Option<String>,
        buckets: &Buckets,
    ) -> Result<(Self, u32), DatasetError> {
        let picture =
            pictures::decode_still(&file.bytes).map_err(|source| DatasetError::Picture {
                file: file.name.clone(),
                source,
            })?;
        let (width, height) = picture.dimensions();
        let (shorter, longer) = (width.min(height), width.max(height));
        let fault = |reason| DatasetError::Shape {
            file: file.name.clone(),
            width,
            height,
            reason,
        };
        if shorter < LEAST_SIDE {
            return Err(fault(format!(
                "send pictures of at least {LEAST_SIDE} pixels per side"
            )));
        }
        if longer > shorter * LONGEST_SHAPE {
            return Err(fault(format!(
                "cut it so that one side is at most {LONGEST_SHAPE} times the other"
            )));
        }
        let bucket = buckets.nearest(width, height);
        let size = buckets.sizes[bucket];
        let (width, height) = size.cover(width, height);
        let picture = match picture.dimensions() == (width, height) {
            true => picture,
            false => imageops::resize(&picture, width, height, imageops::FilterType::Lanczos3),
        };
        let sample = Self {
            name: file.name,
            caption,
            bucket,
            size,
            picture,
        };
        Ok((sample, shorter))
    }
}

/// The first of many names.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().checked_sub(SHOWN) {
        None | Some(0) => shown,
        Some(more) => format!("{shown} and {more} more"),
    }
}
