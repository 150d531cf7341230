//! What img2img and inpainting start from.

use image::{
    GrayImage, RgbImage,
    imageops::{self, FilterType},
};

use super::request::{InvalidField, Limits, ModelDefaults};

/// Share of the schedule that img2img runs when the client does not say (diffusers' default).
const IMG2IMG_STRENGTH: f64 = 0.8;
/// Inpainting starts from pure noise under the mask (diffusers' default).
const INPAINT_STRENGTH: f64 = 1.0;

/// Where img2img and inpainting start; pictures have the size of the request.
#[derive(Debug, Clone)]
pub struct InitImage {
    pub image: RgbImage,
    pub mask: Option<GrayImage>,
    pub strength: f64,
}

/// The size a picture is painted at when only an init image is given: its own, scaled down to the
/// limit if it passes it, each side rounded to the nearest multiple the model can paint.
pub(super) fn size_for_image(
    (width, height): (u32, u32),
    model: &ModelDefaults,
    limits: &Limits,
) -> (u32, u32) {
    let longest = width.max(height).max(1);
    let scale = (f64::from(limits.max_side) / f64::from(longest)).min(1.0);
    let multiple = model.side_multiple.max(1);
    let most = (limits.max_side / multiple).max(1);
    let side = |pixels: u32| {
        let multiples = (f64::from(pixels) * scale / f64::from(multiple)).round() as u32;
        multiples.clamp(1, most) * multiple
    };
    (side(width), side(height))
}

/// Checks what a client sent to start from, and brings it to the size of the request.
pub(super) fn init_image(
    image: Option<RgbImage>,
    mask: Option<GrayImage>,
    strength: Option<f64>,
    size: (u32, u32),
    steps: u32,
) -> Result<Option<InitImage>, InvalidField> {
    let Some(image) = image else {
        if mask.is_some() {
            return Err(InvalidField::new(
                "mask",
                "needs an image to paint into; send `image` too",
            ));
        }
        if strength.is_some() {
            return Err(InvalidField::new(
                "strength",
                "says how far to leave an image; send `image` too, or drop it",
            ));
        }
        return Ok(None);
    };
    let default = if mask.is_some() {
        INPAINT_STRENGTH
    } else {
        IMG2IMG_STRENGTH
    };
    let strength = strength.unwrap_or(default);
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(InvalidField::new(
            "strength",
            format!(
                "must be above 0 and at most 1, got {strength}; {IMG2IMG_STRENGTH} is usual, 1 \
                 keeps nothing of the image"
            ),
        ));
    }
    // diffusers: init_timestep = min(int(num_inference_steps * strength), num_inference_steps)
    if (f64::from(steps) * strength) as u32 == 0 {
        return Err(InvalidField::new(
            "strength",
            format!(
                "{strength} of {steps} steps leaves none to run; send at least {:.2} or more steps",
                (100.0 / f64::from(steps)).ceil() / 100.0
            ),
        ));
    }
    if let Some(mask) = &mask {
        check_mask(mask, image.dimensions())?;
    }
    let (width, height) = size;
    let fits = image.dimensions() == size;
    let image = match fits {
        true => image,
        false => imageops::resize(&image, width, height, FilterType::Lanczos3),
    };
    // Triangle does not ring: a mask must not overshoot at its edge.
    let mask = mask.map(|mask| match fits {
        true => mask,
        false => imageops::resize(&mask, width, height, FilterType::Triangle),
    });
    Ok(Some(InitImage {
        image,
        mask,
        strength,
    }))
}

fn check_mask(mask: &GrayImage, (width, height): (u32, u32)) -> Result<(), InvalidField> {
    if mask.dimensions() != (width, height) {
        return Err(InvalidField::new(
            "mask",
            format!(
                "is {}x{} but the image is {width}x{height}; send a mask of the image's size",
                mask.width(),
                mask.height()
            ),
        ));
    }
    if mask.as_raw().iter().all(|&value| value == 0) {
        return Err(InvalidField::new(
            "mask",
            "marks nothing to paint; make the area transparent (or white, without alpha)",
        ));
    }
    Ok(())
}
