//! Files of pictures become pixels: limited before they are decoded, known by their bytes.
//!
//! For what clients send to paint from and for what they send to train on.

use std::io::Cursor;

use image::{
    DynamicImage, GrayImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits,
    Pixel as _, RgbImage,
    codecs::{png::PngDecoder, webp::WebPDecoder},
};

/// Pixels per side.
const MAX_SIDE: u32 = 8192;
/// Bytes the decoder may allocate, the decoded picture included: 8192 x 8192 of RGB.
const MAX_ALLOC: u64 = 256 * 1024 * 1024;

/// Why a file is not a picture. The text is for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    #[error("is neither PNG nor JPEG nor WebP; send one of these")]
    UnknownFormat,
    #[error(
        "is {width}x{height}; send a picture of at most {MAX_SIDE} pixels per side and {} MiB \
         decoded",
        MAX_ALLOC >> 20
    )]
    TooLarge { width: u32, height: u32 },
    #[error("cannot be decoded: {0}")]
    Broken(String),
    #[error("is an animation; send a still picture, one of its frames for example")]
    Animated,
}

/// Decodes a picture to paint from, turned upright as its EXIF data says. Transparent parts show
/// white. Slow: run it on a blocking thread.
pub fn decode_image(bytes: &[u8]) -> Result<RgbImage, PictureError> {
    let image = decode(bytes)?;
    if !image.color().has_alpha() {
        return Ok(image.into_rgb8());
    }
    let image = image.into_rgba8();
    let (width, height) = image.dimensions();
    Ok(RgbImage::from_fn(width, height, |x, y| {
        let pixel = image.get_pixel(x, y);
        let alpha = u32::from(pixel[3]);
        // c * a + white * (1 - a), rounded
        pixel
            .to_rgb()
            .map(|c| ((u32::from(c) * alpha + 255 * (255 - alpha) + 127) / 255) as u8)
    }))
}

/// [`decode_image`], but an animation is refused: which of its frames is meant is not for us to say.
pub fn decode_still(bytes: &[u8]) -> Result<RgbImage, PictureError> {
    let broken = |error: ImageError| PictureError::Broken(error.to_string());
    let animated = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => PngDecoder::new(Cursor::new(bytes))
            .and_then(|decoder| decoder.is_apng())
            .map_err(broken)?,
        Ok(ImageFormat::WebP) => WebPDecoder::new(Cursor::new(bytes))
            .map_err(broken)?
            .has_animation(),
        // Animated formats beside these are refused as such.
        _ => false,
    };
    match animated {
        true => Err(PictureError::Animated),
        false => decode_image(bytes),
    }
}

/// Whether a file begins as a picture does, of any format.
pub fn is_picture(bytes: &[u8]) -> bool {
    image::guess_format(bytes).is_ok()
}

/// Decodes a mask to "white where to paint". A mask with transparency marks by it (OpenAI's way);
/// one without marks by brightness. Slow: run it on a blocking thread.
pub fn decode_mask(bytes: &[u8]) -> Result<GrayImage, PictureError> {
    let image = decode(bytes)?;
    if image.color().has_alpha() {
        let image = image.to_rgba8();
        let (width, height) = image.dimensions();
        // An alpha channel that is opaque everywhere says nothing: many tools always write one.
        if image.pixels().any(|pixel| pixel[3] != 255) {
            return Ok(GrayImage::from_fn(width, height, |x, y| {
                [255 - image.get_pixel(x, y)[3]].into()
            }));
        }
    }
    Ok(image.into_luma8())
}

fn decode(bytes: &[u8]) -> Result<DynamicImage, PictureError> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|error| PictureError::Broken(error.to_string()))?;
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP) => {}
        _ => return Err(PictureError::UnknownFormat),
    }
    // Sides are checked below, where the error can name them.
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_ALLOC);
    reader.limits(limits);
    let broken = |error: ImageError| PictureError::Broken(error.to_string());
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    if width.max(height) > MAX_SIDE || decoder.total_bytes() > MAX_ALLOC {
        return Err(PictureError::TooLarge { width, height });
    }
    // Damaged EXIF data only costs the turn.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use image::{Rgb, Rgba, RgbaImage};

    use super::*;

    fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn transparent_parts_show_white() {
        let mut image = RgbaImage::from_pixel(3, 2, Rgba([10, 20, 30, 255]));
        image.put_pixel(1, 0, Rgba([0, 0, 0, 0]));
        image.put_pixel(2, 0, Rgba([0, 0, 0, 128]));
        let image = decode_image(&png(image)).unwrap();
        assert_eq!(image.get_pixel(0, 0), &Rgb([10, 20, 30]));
        assert_eq!(image.get_pixel(1, 0), &Rgb([255, 255, 255]));
        assert_eq!(image.get_pixel(2, 0), &Rgb([127, 127, 127]));
    }

    #[test]
    fn a_mask_marks_by_transparency_or_else_by_brightness() {
        let mut mask = RgbaImage::from_pixel(3, 2, Rgba([255, 255, 255, 255]));
        mask.put_pixel(1, 1, Rgba([255, 255, 255, 0]));
        let by_alpha = decode_mask(&png(mask)).unwrap();
        assert_eq!(by_alpha.get_pixel(0, 0)[0], 0);
        assert_eq!(by_alpha.get_pixel(1, 1)[0], 255);

        let mut mask = RgbaImage::from_pixel(3, 2, Rgba([0, 0, 0, 255]));
        mask.put_pixel(1, 1, Rgba([255, 255, 255, 255]));
        for mask in [
            png(mask.clone()),
            png(DynamicImage::from(mask).into_luma8()),
        ] {
            let by_light = decode_mask(&mask).unwrap();
            assert_eq!(by_light.get_pixel(0, 0)[0], 0);
            assert_eq!(by_light.get_pixel(1, 1)[0], 255);
        }
    }

    #[test]
    fn a_decompression_bomb_is_refused_by_its_header() {
        // 60000 x 60000 grey pixels, claimed by a header of 33 bytes.
        let mut bomb = png(GrayImage::new(1, 1));
        bomb[16..20].copy_from_slice(&60_000u32.to_be_bytes());
        bomb[20..24].copy_from_slice(&60_000u32.to_be_bytes());
        let crc = crc32(&bomb[12..29]);
        bomb[29..33].copy_from_slice(&crc.to_be_bytes());
        let error = decode_image(&bomb).unwrap_err();
        assert_eq!(
            error,
            PictureError::TooLarge {
                width: 60_000,
                height: 60_000
            }
        );
    }

    /// CRC-32 as PNG uses it (ISO 3309), bit by bit.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
            })
        })
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        for bytes in [&b""[..], b"GIF89a", b"<svg/>", b"%PDF-1.7"] {
            assert_eq!(decode_image(bytes), Err(PictureError::UnknownFormat));
        }
        let mut cut = png(RgbImage::new(64, 64));
        cut.truncate(60);
        assert!(matches!(decode_mask(&cut), Err(PictureError::Broken(_))));
    }
}
