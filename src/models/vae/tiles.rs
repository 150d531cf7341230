//! Coding a large picture in overlapping tiles.
//!
//! The decoder's group norms take their statistics over the whole feature map, so that an exact
//! decode needs whole maps: for SD 1.5 and a 2048² picture, 6.4 GB even when every layer is
//! computed in bands. Tiles bound the memory by the tile, at the price of slightly different
//! tones from tile to tile, which the overlap blends. The scheme is that of diffusers'
//! `AutoencoderKL.tiled_decode` and `tiled_encode`, with the tile of SD 1.5's 512² pictures
//! whatever the config's `sample_size`, so that SD 1.5 pictures equal diffusers' with
//! `enable_vae_tiling()`.

use candle_core::{DType, Device, Result, Tensor, bail};

/// Rows of floats, `channels` of them per position.
struct Plane {
    height: usize,
    width: usize,
    channels: usize,
    values: Vec<f32>,
}

/// How tiles are cut; lengths are along a side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    /// Of a tile going in.
    pub tile: usize,
    /// From the beginning of a tile to that of the next.
    pub stride: usize,
    /// What a full stride becomes coming out.
    pub out_stride: usize,
    /// Over how much of a tile coming out the one before it fades.
    pub blend: usize,
}

/// Runs `code` over the tiles of one row `x` `[1, h, w, c]`, and joins what it returns; f32.
pub(super) fn run(
    x: &Tensor,
    tiling: Tiling,
    code: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, height, width, _) = x.dims4()?;
    let mut above: Vec<Plane> = Vec::new();
    let mut bands: Vec<Plane> = Vec::new();
    for top in (0..height).step_by(tiling.stride) {
        let rows = tiling.tile.min(height - top);
        let mut row: Vec<Plane> = Vec::new();
        for left in (0..width).step_by(tiling.stride) {
            let columns = tiling.tile.min(width - left);
            let tile = x
                .narrow(1, top, rows)?
                .narrow(2, left, columns)?
                .contiguous()?;
            let mut tile = Plane::from_tensor(&code(&tile)?)?;
            if let Some(above) = above.get(row.len()) {
                tile.fade_in_from_above(above, tiling.blend);
            }
            if let Some(left) = row.last() {
                tile.fade_in_from_left(left, tiling.blend);
            }
            row.push(tile);
        }
        bands.push(Plane::side_by_side(&row, tiling.out_stride));
        above = row;
    }
    Plane::stacked(bands).into_tensor(x.device())
}

impl Plane {
    fn from_tensor(x: &Tensor) -> Result<Self> {
        let (b, height, width, channels) = x.dims4()?;
        if b != 1 {
            bail!("tiles are coded one row at a time, got {b}");
        }
        let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        Ok(Self {
            height,
            width,
            channels,
            values,
        })
    }

    fn into_tensor(self, device: &Device) -> Result<Tensor> {
        let shape = (1, self.height, self.width, self.channels);
        Tensor::from_vec(self.values, shape, device)
    }

    fn at(&self, y: usize, x: usize) -> usize {
        (y * self.width + x) * self.channels
    }

    /// The last rows of `above` fade into the first rows of this tile.
    fn fade_in_from_above(&mut self, above: &Self, blend: usize) {
        let blend = blend.min(above.height).min(self.height);
        let line = self.width.min(above.width) * self.channels;
        for y in 0..blend {
            let from = above.at(above.height - blend + y, 0);
            let to = self.at(y, 0);
            let old = &above.values[from..from + line];
            mix(&mut self.values[to..to + line], old, y, blend);
        }
    }

    /// The last columns of `left` fade into the first columns of this tile.
    fn fade_in_from_left(&mut self, left: &Self, blend: usize) {
        let blend = blend.min(left.width).min(self.width);
        let c = self.channels;
        for y in 0..self.height.min(left.height) {
            for x in 0..blend {
                let from = left.at(y, left.width - blend + x);
                let to = self.at(y, x);
                let old = &left.values[from..from + c];
                mix(&mut self.values[to..to + c], old, x, blend);
            }
        }
    }

    /// Tiles of one row, each cut to `size` by `size` where it is larger.
    fn side_by_side(tiles: &[Self], size: usize) -> Self {
        let height = tiles.iter().map(|t| t.height).min().unwrap_or(0).min(size);
        let width = tiles.iter().map(|t| t.width.min(size)).sum();
        let channels = tiles.first().map_or(0, |t| t.channels);
        let mut values = Vec::with_capacity(height * width * channels);
        for y in 0..height {
            for tile in tiles {
                let start = tile.at(y, 0);
                values.extend_from_slice(
                    &tile.values[start..start + tile.width.min(size) * channels],
                );
            }
        }
        Self {
            height,
            width,
            channels,
            values,
        }
    }

    fn stacked(bands: Vec<Self>) -> Self {
        let height = bands.iter().map(|b| b.height).sum();
        let (width, channels) = bands.first().map_or((0, 0), |b| (b.width, b.channels));
        Self {
            height,
            width,
            channels,
            values: bands.into_iter().flat_map(|b| b.values).collect(),
        }
    }
}

/// A linear crossfade at `step` of `steps`.
fn mix(new: &mut [f32], old: &[f32], step: usize, steps: usize) {
    let share = (step as f64 / steps as f64) as f32;
    let rest = (1.0 - step as f64 / steps as f64) as f32;
    for (new, old) in new.iter_mut().zip(old) {
        *new = old * rest + *new * share;
    }
}
