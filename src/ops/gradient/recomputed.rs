//! Gradient checkpointing (Chen et al. 2016): what a block keeps inside is computed again on the way
//! back.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use super::graft;

/// The gradients of variables inside blocks that were computed again, by variable.
#[derive(Debug, Clone, Default)]
pub struct Collected(Arc<Mutex<Option<GradStore>>>);

impl Collected {
    fn add(&self, more: GradStore) -> Result<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match all.as_mut() {
            Some(all) => all.extend(more),
            None => {
                *all = Some(more);
                Ok(())
            }
        }
    }

    /// Adds what was collected to the gradients of a whole backward pass.
    ///
    /// # Errors
    /// Those of candle.
    pub fn join(self, gradients: &mut GradStore) -> Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(more) => gradients.extend(more),
            None => Ok(()),
        }
    }
}

/// `value`, which is what `block` makes of `args` where nobody wants a gradient. On the way back `block`
/// is run again on variables in their place; the gradients of variables of its own go to `collected`.
///
/// # Errors
/// Those of candle.
pub fn recomputed<const N: usize>(
    args: [&Tensor; N],
    value: Tensor,
    collected: &Collected,
    block: impl Fn([&Tensor; N]) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let collected = collected.clone();
    graft(args, value, move |args, _, gradient| {
        let mut inputs = Vec::with_capacity(N);
        for arg in args {
            inputs.push(Var::from_tensor(arg)?);
        }
        let mut at = inputs.iter();
        // As many as there are arguments.
        let again = block(args.map(|arg| at.next().map_or(arg, |input| input.as_tensor())))?;
        let mut gradients = (again * gradient)?.sum_all()?.backward()?;
        let mut own = inputs.iter().map(|input| gradients.remove(input));
        let own = args.map(|_| own.next().flatten());
        collected.add(gradients)?;
        Ok(own)
    })
}
