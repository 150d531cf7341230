//! A computed tensor, put into candle's graph.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage,
    Tensor, bail,
};

/// `value`, as what an operation makes of `args`, with the operation's vector-Jacobian product.
///
/// `back` is called once in a backward pass, with the detached arguments, the result and its gradient.
/// A gradient it gives for an argument that wants none is dropped.
///
/// # Errors
/// Those of candle; no argument, or more than three.
pub(in super::super) fn graft<const N: usize>(
    args: [&Tensor; N],
    value: Tensor,
    back: impl Fn([&Tensor; N], &Tensor, &Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let op = Graft {
        // A view would bring the whole of what it is a view of.
        value: Mutex::new(Some(match value.layout().start_offset() {
            0 if value.is_contiguous() => value,
            _ => value.force_contiguous()?,
        })),
        back: Box::new(move |args, result, gradient| {
            let Ok(args) = args.try_into() else {
                bail!(
                    "an operation of {N} arguments has {} on its way back",
                    args.len()
                )
            };
            Ok(back(args, result, gradient)?.into())
        }),
    };
    match *args.as_slice() {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!("an operation of {N} arguments cannot be put into the graph"),
    }
}

type Back = dyn Fn(&[&Tensor], &Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync;

struct Graft {
    /// Until the operation is put into the graph.
    value: Mutex<Option<Tensor>>,
    back: Box<Back>,
}

impl Graft {
    fn take(&self) -> Result<Tensor> {
        let value = self
            .value
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        value.ok_or_else(|| {
            candle_core::Error::Msg("an operation was put into the graph twice".into())
        })
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a result on another device than its arguments"),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("a result on another device than its arguments"),
        }
    }

    /// The gradients of the arguments that want one.
    fn back<const N: usize>(
        &self,
        args: [&Tensor; N],
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<[Option<Tensor>; N]> {
        let detached = args.map(Tensor::detach);
        let gradients = (self.back)(&detached.each_ref(), &result.detach(), gradient)?;
        let mut gradients = gradients.into_iter();
        Ok(args.map(|arg| gradients.next().flatten().filter(|_| arg.track_op())))
    }
}

const NAME: &str = "graft";

impl CustomOp1 for Graft {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(&self, arg: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let [a] = self.back([arg], result, gradient)?;
        Ok(a)
    }
}

impl CustomOp2 for Graft {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [a, b] = self.back([a, b], result, gradient)?;
        Ok((a, b))
    }
}

impl CustomOp3 for Graft {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = self.back([a, b, c], result, gradient)?;
        Ok((a, b, c))
    }
}
