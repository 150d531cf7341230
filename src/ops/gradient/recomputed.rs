//! Gradient checkpointing (Chen et al. 2016): what a block keeps inside is computed again on the way
//! back.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, Var};

use super::graft;

/// The gradients of some variables inside blocks that were computed again.
#[derive(Debug, Clone)]
pub struct Collected(Arc<Mutex<HashMap<TensorId, Option<Tensor>>>>);

impl Collected {
    /// Nothing yet, for these variables; gradients of others are dropped.
    pub fn new<'a>(variables: impl IntoIterator<Item = &'a Tensor>) -> Self {
        let empty = variables.into_iter().map(|variable| (variable.id(), None));
        Self(Arc::new(Mutex::new(empty.collect())))
    }

    /// What was collected for a variable.
    pub fn get(&self, variable: &Tensor) -> Option<Tensor> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&variable.id()).cloned().flatten()
    }

    fn add(&self, more: &GradStore) -> Result<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, sum) in all.iter_mut() {
            let Some(more) = more.get_id(*id) else {
                continue;
            };
            *sum = Some(match sum.take() {
                Some(before) => (before + more)?,
                None => more.clone(),
            });
        }
        Ok(())
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
        collected.add(&gradients)?;
        Ok(own)
    })
}
