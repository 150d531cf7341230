//! Pictures to tensors and back, as diffusers' `VaeImageProcessor`.

use candle_core::{Device, Result, Tensor, bail};
use image::{GrayImage, RgbImage};

/// A picture as `[1, h, w, 3]` in -1..1, f32.
pub(crate) fn to_tensor(image: &RgbImage, device: &Device) -> Result<Tensor> {
    let (width, height) = image.dimensions();
    let values: Vec<f32> = image
        .as_raw()
        .iter()
        .map(|&value| 2.0 * (f32::from(value) / 255.0) - 1.0)
        .collect();
    Tensor::from_vec(values, (1, height as usize, width as usize, 3), device)
}

/// The first picture of `[b, h, w, 3]` around -1..1, rounded to whole channel values.
///
/// Halves go to the even neighbour, as numpy rounds. Values that are not finite are an error: a
/// picture of them would be black without a word.
pub(super) fn from_tensor(tensor: &Tensor) -> Result<RgbImage> {
    let (_, height, width, channels) = tensor.dims4()?;
    if channels != 3 {
        bail!("the VAE painted {channels} channels; expected 3");
    }
    let values = tensor.get(0)?.flatten_all()?.to_vec1::<f32>()?;
    if !values.iter().all(|value| value.is_finite()) {
        bail!("the picture has values that are not finite; try --dtype f32");
    }
    let bytes = values
        .iter()
        .map(|value| ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8)
        .collect();
    match RgbImage::from_raw(width as u32, height as u32, bytes) {
        Some(image) => Ok(image),
        None => bail!("a picture of {width}x{height} does not fit its pixels"),
    }
}

/// The mask at the size of a latent, one value per latent pixel: 1 where to paint, 0 where to keep.
///
/// Binarised at one half, then every `factor`-th pixel of every `factor`-th line is taken, which is
/// what diffusers' `interpolate` (nearest) does.
pub(super) fn latent_mask(mask: &GrayImage, factor: u32) -> Vec<f32> {
    let (width, height) = mask.dimensions();
    let mut values = Vec::with_capacity((width / factor * (height / factor)) as usize);
    for y in 0..height / factor {
        for x in 0..width / factor {
            let value = mask.get_pixel(x * factor, y * factor)[0];
            values.push(if value >= 128 { 1.0 } else { 0.0 });
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_survives_the_way_there_and_back() {
        let image = RgbImage::from_fn(5, 3, |x, y| {
            [(x * 51) as u8, (y * 127) as u8, (x * y * 17) as u8].into()
        });
        let tensor = to_tensor(&image, &Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [1, 3, 5, 3]);
        assert_eq!(from_tensor(&tensor).unwrap(), image);
    }

    #[test]
    fn values_beyond_the_range_are_clamped_and_nan_is_an_error() {
        let pixel =
            |values: [f32; 3]| Tensor::from_slice(&values, (1, 1, 1, 3), &Device::Cpu).unwrap();
        let image = from_tensor(&pixel([-7.0, 0.0, 1.5])).unwrap();
        assert_eq!(image.get_pixel(0, 0).0, [0, 128, 255]);
        let error = from_tensor(&pixel([0.0, f32::NAN, 0.0])).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
    }

    #[test]
    fn a_mask_is_sampled_at_the_corner_of_each_latent_pixel() {
        let mut mask = GrayImage::new(24, 16);
        mask.put_pixel(8, 0, [128].into());
        mask.put_pixel(17, 9, [255].into());
        mask.put_pixel(0, 8, [127].into());
        assert_eq!(latent_mask(&mask, 8), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
