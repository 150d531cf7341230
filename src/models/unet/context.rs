//! The rows' contexts, laid out for cross attention.

use candle_core::{DType, Result, Tensor, bail};

/// All rows' context tokens, one row after the other.
#[derive(Debug)]
pub(super) struct Context {
    /// `[sum of lengths, width]`.
    tokens: Tensor,
    lengths: Vec<usize>,
}

impl Context {
    /// `rows` are `[t, width]`, at least one token each.
    pub fn new(rows: &[Tensor], width: usize, dtype: DType) -> Result<Self> {
        let lengths = rows
            .iter()
            .map(|row| match row.dims() {
                [t, d] if *t > 0 && *d == width => Ok(*t),
                dims => bail!("unet: a context of shape {dims:?}; expected [tokens, {width}]"),
            })
            .collect::<Result<Vec<_>>>()?;
        let tokens = Tensor::cat(rows, 0)?.to_dtype(dtype)?;
        Ok(Self { tokens, lengths })
    }

    /// The same, of which nobody wants a gradient.
    pub fn detach(&self) -> Self {
        self.with_tokens(&self.tokens.detach())
    }

    /// Other tokens of the same lengths.
    pub fn with_tokens(&self, tokens: &Tensor) -> Self {
        Self {
            tokens: tokens.clone(),
            lengths: self.lengths.clone(),
        }
    }

    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// Where a row's tokens begin; one past the last row is their number.
    pub fn start(&self, row: usize) -> usize {
        self.lengths.iter().take(row).sum()
    }

    /// The length of every row, if they are the same.
    pub fn common_length(&self) -> Option<usize> {
        let first = *self.lengths.first()?;
        self.lengths.iter().all(|t| *t == first).then_some(first)
    }

    /// Where each row's tokens begin, and how many they are.
    pub fn ranges(&self) -> impl Iterator<Item = (usize, usize)> {
        self.lengths.iter().scan(0, |start, t| {
            let range = (*start, *t);
            *start += t;
            Some(range)
        })
    }
}
