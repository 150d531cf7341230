//! Sizes of about the same area, so that pictures keep about their shape.

/// Pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

impl Size {
    /// The size of a picture that was scaled until it just covers this one.
    pub(super) fn cover(self, width: u32, height: u32) -> (u32, u32) {
        let (w, h) = (f64::from(width), f64::from(height));
        let scale = (f64::from(self.width) / w).max(f64::from(self.height) / h);
        let side = |side: f64, least: u32| ((side * scale).round() as u32).max(least);
        (side(w, self.width), side(h, self.height))
    }

    fn shape(self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }
}

/// The sizes that samples are cut to.
#[derive(Debug, Clone)]
pub struct Buckets {
    /// In ascending order.
    pub(super) sizes: Vec<Size>,
}

impl Buckets {
    /// Squares alone.
    pub fn square(resolution: u32) -> Self {
        Self {
            sizes: vec![Size {
                width: resolution,
                height: resolution,
            }],
        }
    }

    /// Sizes of at most `resolution`² pixels, with sides that are multiples of `multiple` from half of
    /// the resolution to twice of it: kohya's rule, whose multiple is 64.
    pub fn new(resolution: u32, multiple: u32) -> Self {
        let multiple = multiple.clamp(1, resolution.max(1));
        let area = u64::from(resolution) * u64::from(resolution);
        let down = |side: u64| side / u64::from(multiple) * u64::from(multiple);
        let least = (resolution / 2).next_multiple_of(multiple);
        let most = u64::from(resolution) * 2;
        let square = down(u64::from(resolution)) as u32;
        let mut sizes = Self::square(square).sizes;
        for width in (least..=resolution * 2).step_by(multiple as usize) {
            let height = down(area / u64::from(width)).min(down(most)) as u32;
            if height >= least {
                sizes.push(Size { width, height });
                sizes.push(Size {
                    width: height,
                    height: width,
                });
            }
        }
        sizes.sort_unstable();
        sizes.dedup();
        Self { sizes }
    }

    pub fn sizes(&self) -> &[Size] {
        &self.sizes
    }

    /// The index of the size whose shape is nearest to a picture's; of two, the larger one.
    pub fn nearest(&self, width: u32, height: u32) -> usize {
        let shape = Size { width, height }.shape();
        let apart = |size: &Size| (size.shape() / shape).ln().abs();
        let area = |size: &Size| u64::from(size.width) * u64::from(size.height);
        let better = |a: &Size, b: &Size| {
            let by_shape = apart(a).total_cmp(&apart(b));
            by_shape.then_with(|| area(b).cmp(&area(a)))
        };
        let sizes = self.sizes.iter().enumerate();
        // There is always a square.
        sizes.min_by(|a, b| better(a.1, b.1)).map_or(0, |(i, _)| i)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_those_of_kohya() {
        let sizes = |resolution, multiple| -> Vec<(u32, u32)> {
            let buckets = Buckets::new(resolution, multiple);
            buckets
                .sizes()
                .iter()
                .map(|s| (s.width, s.height))
                .collect()
        };
        // `model_util.make_bucket_resolutions((512, 512), 256, 1024, 64)`
        let expected = [
            (256, 832),
            (256, 896),
            (256, 960),
            (256, 1024),
            (320, 704),
            (320, 768),
            (384, 640),
            (448, 576),
            (512, 512),
            (576, 448),
            (640, 384),
            (704, 320),
            (768, 320),
            (832, 256),
            (896, 256),
            (960, 256),
            (1024, 256),
        ];
        assert_eq!(sizes(512, 64), expected);
        let small = sizes(128, 32);
        assert!(
            small.contains(&(128, 128)) && small.contains(&(160, 96)),
            "{small:?}"
        );
        assert_eq!(sizes(64, 64), [(64, 64)]);
        assert_eq!(sizes(64, 1000), [(64, 64)]);
    }

    #[test]
    fn shapes_find_their_bucket() {
        let buckets = Buckets::new(512, 64);
        let size = |w, h| buckets.sizes()[buckets.nearest(w, h)];
        assert_eq!(
            size(3000, 3000),
            Size {
                width: 512,
                height: 512
            }
        );
        assert_eq!(
            size(4032, 3024),
            Size {
                width: 576,
                height: 448
            }
        );
        assert_eq!(
            size(1080, 1920),
            Size {
                width: 384,
                height: 640
            }
        );
        assert_eq!(
            size(8000, 1000),
            Size {
                width: 1024,
                height: 256
            }
        );
    }

    proptest! {
        #[test]
        fn every_picture_covers_a_bucket_of_bounded_area(
            resolution in 64u32..1100,
            multiple in prop::sample::select(vec![8u32, 16, 32, 64]),
            width in 1u32..9000,
            height in 1u32..9000,
        ) {
            let resolution = resolution / multiple * multiple;
            let buckets = Buckets::new(resolution, multiple);
            for size in buckets.sizes() {
                prop_assert!(size.width * size.height <= resolution * resolution);
                prop_assert!(size.width.is_multiple_of(multiple) && size.width > 0);
                prop_assert!(size.height.is_multiple_of(multiple) && size.height > 0);
            }
            let size = buckets.sizes()[buckets.nearest(width, height)];
            let (w, h) = size.cover(width, height);
            prop_assert!(w >= size.width && h >= size.height);
            // One side fits, but for a rounding.
            prop_assert!(w == size.width || h == size.height, "{w}x{h} for {size:?}");
        }
    }
}
