//! Pictures to files.

use std::io::Cursor;

use image::{
    ExtendedColorType, ImageEncoder, RgbImage,
    codecs::{jpeg::JpegEncoder, webp::WebPEncoder},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::metadata;
use crate::{
    engine::{ModelInfo, Picture},
    pipeline::request::ImageRequest,
};

/// File format of the pictures. WebP is written without loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OutputFormat {
    #[default]
    Png,
    Jpeg,
    Webp,
}

impl OutputFormat {
    /// Media type.
    pub fn mime(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }

    /// OpenAI's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }
}

/// JPEG quality when the client does not say: no visible loss, half the bytes of 100.
const JPEG_QUALITY: u8 = 95;

/// Why a picture could not be written.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error(transparent)]
    Image(#[from] image::ImageError),
    #[error(transparent)]
    Png(#[from] png::EncodingError),
}

/// Encodes a finished picture; a PNG says what it was made from. Slow: run it on a blocking thread.
pub fn encode(
    picture: &Picture,
    format: OutputFormat,
    quality: Option<u8>,
    made: &ImageRequest,
    by: &ModelInfo,
) -> Result<Vec<u8>, EncodeError> {
    match format {
        OutputFormat::Png => {
            let text = metadata::parameters(picture.seed, made, by);
            Ok(encode_png(&picture.image, Some(text))?)
        }
        _ => encode_plain(&picture.image, format, quality),
    }
}

/// Encodes pixels without metadata (previews, grids). Slow: run it on a blocking thread.
pub fn encode_plain(
    image: &RgbImage,
    format: OutputFormat,
    quality: Option<u8>,
) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = Cursor::new(Vec::new());
    let (width, height) = image.dimensions();
    let (pixels, color) = (image.as_raw(), ExtendedColorType::Rgb8);
    match format {
        OutputFormat::Png => return Ok(encode_png(image, None)?),
        OutputFormat::Jpeg => {
            let quality = quality.unwrap_or(JPEG_QUALITY).clamp(1, 100);
            JpegEncoder::new_with_quality(&mut bytes, quality)
                .write_image(pixels, width, height, color)?
        }
        OutputFormat::Webp => {
            WebPEncoder::new_lossless(&mut bytes).write_image(pixels, width, height, color)?
        }
    }
    Ok(bytes.into_inner())
}

fn encode_png(image: &RgbImage, text: Option<String>) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let (width, height) = image.dimensions();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    // Writing a picture must not show beside painting it.
    encoder.set_compression(png::Compression::Fast);
    encoder.set_filter(png::Filter::Adaptive);
    if let Some(text) = text {
        let keyword = metadata::KEYWORD.to_owned();
        // A tEXt chunk is Latin-1; what is not goes into the newer iTXt, as Pillow does it.
        match text.chars().all(|c| u32::from(c) < 256) {
            true => encoder.add_text_chunk(keyword, text)?,
            false => encoder.add_itxt_chunk(keyword, text)?,
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}
