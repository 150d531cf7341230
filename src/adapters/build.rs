//! From the tensors of one site to its delta.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{
    AdapterError, Axis, Block, Change, Delta, Factors, LowRank, Magnitude, alphas::Alpha,
    delta::wide, file::AdapterFile, numbers::Numbers, roles::Role,
};
use crate::models::{Site, SiteKind, header::Entry};

/// Beyond any adapter: the widest matrix of Stable Diffusion has 10,240 rows.
const MAX_RANK: usize = 4096;

/// The tensors that a file has for one site.
#[derive(Debug)]
pub(super) struct Group<'a> {
    pub site: &'a Site,
    pub parts: BTreeMap<Role, (&'a str, &'a Entry)>,
}

/// A group while its tensors are taken out of it.
struct Taking<'a> {
    file: &'a AdapterFile,
    numbers: &'a Numbers,
    site: &'a Site,
    parts: BTreeMap<Role, (&'a str, &'a Entry)>,
    /// The key that stands for the group in errors.
    first: &'a str,
}

/// The sides of a weight: rows, columns, kernel.
#[derive(Debug, Clone)]
struct Sides {
    out: usize,
    input: usize,
    /// Empty for a linear map.
    kernel: Vec<usize>,
}

/// The delta of a group; every one of its tensors has a part in it.
///
/// `header` is the scale that the header gives, which a tensor of the group's own goes before.
pub(super) fn delta(
    file: &AdapterFile,
    numbers: &Numbers,
    group: Group,
    header: Alpha,
) -> Result<Delta, AdapterError> {
    let Group { site, parts } = group;
    let first = parts.values().next().map_or("", |(key, _)| *key);
    let mut take = Taking {
        file,
        numbers,
        site,
        parts,
        first,
    };
    let delta = match site.kind {
        SiteKind::GroupNorm | SiteKind::LayerNorm => take.norm()?,
        SiteKind::Linear | SiteKind::Conv2d => take.map(header)?,
        SiteKind::Embedding => {
            return Err(file.fault(first, "changes an embedding, which only tokens can"));
        }
    };
    // An alpha beside a whole difference says nothing.
    take.parts.remove(&Role::Alpha);
    match take.parts.first_key_value() {
        None => Ok(delta),
        Some((_, (key, _))) => Err(file.fault(
            key,
            format!(
                "does not go with the other tensors of `{}` (a {:?}), or lacks its companions",
                site.name, site.kind
            ),
        )),
    }
}

impl<'a> Taking<'a> {
    fn norm(&mut self) -> Result<Delta, AdapterError> {
        let channels = [self.site.weight_shape[0]];
        let weight = match self.optional(Role::NormDiff, &channels)? {
            Some(weight) => Some(weight),
            None => self.optional(Role::Diff, &channels)?,
        };
        let bias = match self.optional(Role::NormDiffBias, &channels)? {
            Some(bias) => Some(bias),
            None => self.optional(Role::DiffBias, &channels)?,
        };
        Ok(Delta {
            change: weight.map(Change::Whole),
            magnitude: None,
            bias,
        })
    }

    fn map(&mut self, header: Alpha) -> Result<Delta, AdapterError> {
        let shape = &self.site.weight_shape;
        let sides = Sides {
            out: shape[0],
            input: shape[1],
            kernel: shape[2..].to_vec(),
        };
        let alpha = match self.parts.remove(&Role::Alpha) {
            Some((key, entry)) => Alpha {
                alpha: Some(self.file.number(key, entry)?),
                ..header
            },
            None => header,
        };
        let mut bias = self.optional(Role::DiffBias, &[sides.out])?;
        let has = |role: Role| self.parts.contains_key(&role);
        let change = if has(Role::Down) || has(Role::Up) {
            let low = self.low_rank(&sides, alpha)?;
            if let Some(of_up) = self.optional(Role::UpBias, &[sides.out])? {
                let sum = wide(&of_up).and_then(|of_up| {
                    let scaled = (of_up * low.scale)?;
                    match &bias {
                        Some(bias) => wide(bias)? + scaled,
                        None => Ok(scaled),
                    }
                });
                bias = Some(sum.map_err(|source| self.tensor_error(source))?);
            }
            Some(Change::LowRank(low))
        } else if has(Role::HadaW1A) {
            Some(self.hadamard(&sides, alpha)?)
        } else if has(Role::LokrW1) || has(Role::LokrW1A) {
            Some(self.kronecker(&sides, alpha)?)
        } else if has(Role::Gain) {
            Some(self.gain(&sides)?)
        } else {
            self.optional(Role::Diff, shape)?.map(Change::Whole)
        };
        Ok(Delta {
            change,
            magnitude: self.magnitude(&sides)?,
            bias,
        })
    }

    fn low_rank(&mut self, sides: &Sides, alpha: Alpha) -> Result<LowRank, AdapterError> {
        let rank = self.rank(Role::Down, 0)?;
        if !self.parts.contains_key(&Role::Mid) {
            return Ok(LowRank {
                down: self.required(Role::Down, &sides.with(rank, sides.input))?,
                up: self.required(Role::Up, &[sides.out, rank])?,
                mid: None,
                scale: alpha.scale(rank),
            });
        }
        let of_up = self.rank(Role::Up, 1)?;
        let down = self.required(Role::Down, &[rank, sides.input])?;
        let up = self.required(Role::Up, &[sides.out, of_up])?;
        let mid = self.required(Role::Mid, &sides.core(of_up, rank))?;
        let scale = alpha.scale(rank);
        // The core of a linear map is one more factor; left alone it would be written as a kernel.
        let (down, mid) = match sides.kernel.is_empty() {
            true => {
                let product = wide(&mid).and_then(|mid| mid.flatten_from(1)?.matmul(&wide(&down)?));
                (product.map_err(|source| self.tensor_error(source))?, None)
            }
            false => (down, Some(mid)),
        };
        Ok(LowRank {
            down,
            up,
            mid,
            scale,
        })
    }

    fn hadamard(&mut self, sides: &Sides, alpha: Alpha) -> Result<Change, AdapterError> {
        let left = self.factors([Role::HadaW1A, Role::HadaW1B, Role::HadaT1], sides)?;
        let right = self.factors([Role::HadaW2A, Role::HadaW2B, Role::HadaT2], sides)?;
        Ok(Change::Hadamard {
            scale: alpha.scale(left.rank()),
            left,
            right,
        })
    }

    fn kronecker(&mut self, sides: &Sides, alpha: Alpha) -> Result<Change, AdapterError> {
        // The left block says how the sides are cut.
        let (left, u, p) = match self.parts.get(&Role::LokrW1) {
            Some((key, entry)) => {
                let (key, shape) = (*key, entry.shape.clone());
                let [u, p] = shape[..] else {
                    return Err(self.shape(key, shape, "two dimensions"));
                };
                (Block::Whole(self.required(Role::LokrW1, &[u, p])?), u, p)
            }
            None => {
                let u = self.dim(Role::LokrW1A, 0)?;
                let p = self.dim(Role::LokrW1B, 1)?;
                let block = Sides {
                    out: u,
                    input: p,
                    kernel: Vec::new(),
                };
                let factors = self.plain_factors(Role::LokrW1A, Role::LokrW1B, &block)?;
                (Block::Product(factors), u, p)
            }
        };
        if u == 0 || p == 0 || !sides.out.is_multiple_of(u) || !sides.input.is_multiple_of(p) {
            return Err(self.file.fault(
                self.first,
                format!(
                    "LoKr's first block is {u} x {p}, which does not divide the weight's {} x {}",
                    sides.out, sides.input
                ),
            ));
        }
        let block = Sides {
            out: sides.out / u,
            input: sides.input / p,
            kernel: sides.kernel.clone(),
        };
        let right = if self.parts.contains_key(&Role::LokrW2) {
            let shape = block.with(block.out, block.input);
            Block::Whole(self.required(Role::LokrW2, &shape)?)
        } else {
            Block::Product(self.factors([Role::LokrW2A, Role::LokrW2B, Role::LokrT2], &block)?)
        };
        // Two whole blocks have no rank, and their alpha does not count.
        let scale = right
            .rank()
            .or(left.rank())
            .map_or(1.0, |rank| alpha.scale(rank));
        Ok(Change::Kronecker { left, right, scale })
    }

    fn gain(&mut self, sides: &Sides) -> Result<Change, AdapterError> {
        let Some((flag, entry)) = self.parts.remove(&Role::OnInput) else {
            return Err(self.missing(Role::OnInput));
        };
        let axis = match self.file.number(flag, entry)? != 0.0 {
            true => Axis::Columns,
            false => Axis::Rows,
        };
        let values = self.vector(Role::Gain, sides, axis)?;
        Ok(Change::Gain { values, axis })
    }

    fn magnitude(&mut self, sides: &Sides) -> Result<Option<Magnitude>, AdapterError> {
        if self.parts.contains_key(&Role::RowMagnitude) {
            let values = self.vector(Role::RowMagnitude, sides, Axis::Rows)?;
            let axis = Axis::Rows;
            return Ok(Some(Magnitude { values, axis }));
        }
        let Some((_, entry)) = self.parts.get(&Role::DoraScale) else {
            return Ok(None);
        };
        // `[1, in, …]` counts columns; `[out, 1, …]` and `[out]` count rows.
        let axis = match entry.shape[..] {
            [1, n, ..] if n == sides.input => Axis::Columns,
            _ => Axis::Rows,
        };
        let values = self.vector(Role::DoraScale, sides, axis)?;
        Ok(Some(Magnitude { values, axis }))
    }

    /// One number for each row or column, in whatever shape.
    fn vector(&mut self, role: Role, sides: &Sides, axis: Axis) -> Result<Tensor, AdapterError> {
        let n = match axis {
            Axis::Rows => sides.out,
            Axis::Columns => sides.input,
        };
        let Some((key, entry)) = self.parts.remove(&role) else {
            return Err(self.missing(role));
        };
        let long: Vec<usize> = entry.shape.iter().copied().filter(|n| *n != 1).collect();
        if !(long == [n] || (n == 1 && long.is_empty())) {
            return Err(self.shape(key, entry.shape.clone(), format!("{n} numbers")));
        }
        self.numbers.tensor(key, entry, &[n])
    }

    /// Two factors and, if it is there, their core.
    fn factors(&mut self, roles: [Role; 3], sides: &Sides) -> Result<Factors, AdapterError> {
        let [a, b, core] = roles;
        if !self.parts.contains_key(&core) {
            return self.plain_factors(a, b, sides);
        }
        let (of_a, of_b) = (self.rank(a, 0)?, self.rank(b, 0)?);
        Ok(Factors {
            a: self.required(a, &[of_a, sides.out])?,
            b: self.required(b, &[of_b, sides.input])?,
            core: Some(self.required(core, &sides.core(of_a, of_b))?),
        })
    }

    fn plain_factors(&mut self, a: Role, b: Role, sides: &Sides) -> Result<Factors, AdapterError> {
        let rank = self.rank(b, 0)?;
        let columns = sides.input * sides.kernel.iter().product::<usize>();
        Ok(Factors {
            a: self.required(a, &[sides.out, rank])?,
            b: self.required(b, &[rank, columns])?,
            core: None,
        })
    }

    /// A dimension that is a rank.
    fn rank(&self, role: Role, dim: usize) -> Result<usize, AdapterError> {
        let rank = self.dim(role, dim)?;
        if (1..=MAX_RANK).contains(&rank) {
            return Ok(rank);
        }
        let key = self.parts.get(&role).map_or("", |(key, _)| *key);
        let reason = format!("has rank {rank}; ranks from 1 to {MAX_RANK} are read");
        Err(self.file.fault(key, reason))
    }

    fn dim(&self, role: Role, dim: usize) -> Result<usize, AdapterError> {
        let Some((key, entry)) = self.parts.get(&role) else {
            return Err(self.missing(role));
        };
        entry
            .shape
            .get(dim)
            .copied()
            .ok_or_else(|| self.shape(key, entry.shape.clone(), "a matrix"))
    }

    fn required(&mut self, role: Role, shape: &[usize]) -> Result<Tensor, AdapterError> {
        match self.optional(role, shape)? {
            Some(tensor) => Ok(tensor),
            None => Err(self.missing(role)),
        }
    }

    /// A tensor if the group has it, in this shape. Sides of one at the end may be there or not:
    /// a map is the 1x1 convolution it is called elsewhere.
    fn optional(&mut self, role: Role, shape: &[usize]) -> Result<Option<Tensor>, AdapterError> {
        let Some((key, entry)) = self.parts.remove(&role) else {
            return Ok(None);
        };
        if core(&entry.shape) != core(shape) {
            return Err(self.shape(key, entry.shape.clone(), format!("{shape:?}")));
        }
        self.numbers.tensor(key, entry, shape).map(Some)
    }

    fn missing(&self, role: Role) -> AdapterError {
        AdapterError::Incomplete {
            file: self.file.label(),
            key: self.first.into(),
            missing: role.text().into(),
        }
    }

    fn shape(&self, key: &str, found: Vec<usize>, expected: impl Into<String>) -> AdapterError {
        AdapterError::Shape {
            file: self.file.label(),
            key: key.into(),
            site: self.site.name.to_string(),
            found,
            expected: expected.into(),
        }
    }

    fn tensor_error(&self, source: candle_core::Error) -> AdapterError {
        AdapterError::Tensor {
            site: self.site.name.to_string(),
            source,
        }
    }
}

impl Sides {
    /// The shape of a weight with the same kernel.
    fn with(&self, out: usize, input: usize) -> Vec<usize> {
        [&[out, input], &self.kernel[..]].concat()
    }

    /// The shape of a Tucker core, which has a kernel in any case.
    fn core(&self, first: usize, second: usize) -> Vec<usize> {
        match self.kernel[..] {
            [] => vec![first, second, 1, 1],
            _ => self.with(first, second),
        }
    }
}

/// A shape without the ones at its end, down to a vector.
fn core(shape: &[usize]) -> &[usize] {
    match shape {
        [before @ .., 1] if !before.is_empty() => core(before),
        _ => shape,
    }
}
