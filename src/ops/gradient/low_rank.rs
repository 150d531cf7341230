//! A frozen linear map with a trained low-rank delta beside it, in one operation.

use candle_core::{Result, Tensor};

use super::graft;
use crate::ops::{Beside, Linear, Map, Term, Then, host};

/// `own(x) + up(down(x))`, where `beside` is just that for all rows, and both factors are trained; `None`
/// where the kernels do not serve it.
///
/// The way there is that of serving, and nothing is kept of it but the result. With `G` the result's
/// gradient, `d up = Gᵀ (x downᵀ)`, `d down = (G up)ᵀ x`, and the way back to the input is again a map
/// with a low-rank delta beside it: `G W + (G up) down`.
pub(in super::super) fn low_rank(
    own: &Linear,
    x: &Tensor,
    beside: &Beside,
) -> Result<Option<Tensor>> {
    let [
        Term {
            map: Map::Linear(first),
            up: Some(second),
        },
    ] = beside.terms
    else {
        return Ok(None);
    };
    let (Some(down), Some(up)) = (first.trained(), second.trained()) else {
        return Ok(None);
    };
    let still = [x, down, up].map(Tensor::detach);
    let alone = beside.scale.is_none() && beside.bias.is_none() && beside.rows == (0..x.dim(0)?);
    if !alone || own.packed().is_none() || !host::is_plain(&still) {
        return Ok(None);
    }
    let value = run(own, &still[0], [still[1].clone(), still[2].clone()])?;
    let own = own.clone();
    let wants_input = x.track_op();
    let grafted = graft([x, down, up], value, move |[x, down, up], _, gradient| {
        let outputs = up.dim(0)?;
        let inputs = down.dim(1)?;
        let input = match wants_input {
            true => Some(run(
                &own.transposed()?,
                gradient,
                [up.t()?.contiguous()?, down.t()?.contiguous()?],
            )?),
            false => None,
        };
        let (x, gradient) = (x.reshape(((), inputs))?, gradient.reshape(((), outputs))?);
        let inner = Linear::new(down.clone(), None)?.forward(&x)?;
        let slopes = Linear::new(up.t()?.contiguous()?, None)?.forward(&gradient)?;
        let to_up = gradient.t()?.matmul(&inner)?;
        let to_down = slopes.t()?.matmul(&x)?;
        Ok([input, Some(to_down), Some(to_up)])
    })?;
    Ok(Some(grafted))
}

/// `own(x) + second(first(x))` for all rows.
fn run(own: &Linear, x: &Tensor, [first, second]: [Tensor; 2]) -> Result<Tensor> {
    let term = Term {
        map: Map::Linear(Linear::new(first, None)?),
        up: Some(Linear::new(second, None)?),
    };
    let beside = Beside {
        rows: 0..x.dim(0)?,
        terms: std::slice::from_ref(&term),
        scale: None,
        bias: None,
    };
    own.run(x, Then::Nothing, &[beside])
}
