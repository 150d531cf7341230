//! The border between candle's tensors and slices of f32 in host memory.

use std::cell::Cell;

use candle_core::{DType, Device, Result, Shape, Storage, Tensor, bail};

/// Whether somebody wants a gradient of one of these.
pub(super) fn is_tracked<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors.into_iter().any(Tensor::track_op)
}

/// Whether the kernels of this module may serve these tensors: f32 in host memory, and nobody
/// wants a gradient.
pub(super) fn is_plain<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> bool {
    tensors
        .into_iter()
        .all(|t| t.dtype() == DType::F32 && t.device().is_cpu() && !t.track_op())
}

/// Calls `f` with the numbers of plain tensors, copied only if they do not lie in order.
pub(super) fn with_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let tensors = tensors
        .iter()
        .map(|t| t.contiguous())
        .collect::<Result<Vec<_>>>()?;
    let held: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&held) {
        let (Storage::Cpu(cpu), Some((start, end))) = (&**storage, layout.contiguous_offsets())
        else {
            bail!("a plain tensor is contiguous in host memory here")
        };
        *slice = &cpu.as_slice::<f32>()?[start..end];
    }
    f(slices)
}

/// A place that several tasks write to, each its own part.
pub(super) struct Place<T>(*mut T);

/// A place for numbers.
pub(super) type Out = Place<f32>;

impl<T> Clone for Place<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Place<T> {}

// SAFETY: only a pointer; every use of it is an `unsafe` call whose caller keeps parts apart.
unsafe impl<T: Send> Sync for Place<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Place<T> {}

impl<T> Place<T> {
    pub(super) fn new(items: &mut [T]) -> Self {
        Self(items.as_mut_ptr())
    }

    pub(super) fn ptr(self) -> *mut T {
        self.0
    }

    /// Items `start..start + len`.
    ///
    /// # Safety
    /// They lie inside the place, hold values already (or are only written), and no other
    /// reference to them is alive.
    pub(super) unsafe fn part<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }
}

/// A new tensor whose numbers `write` produces.
///
/// # Safety
/// `write` must write each of the `shape`'s numbers before it reads it, and return only then.
pub(super) unsafe fn new_tensor(
    shape: impl Into<Shape>,
    write: impl FnOnce(Out) -> Result<()>,
) -> Result<Tensor> {
    let shape = shape.into();
    let len = shape.elem_count();
    let mut data = Vec::<f32>::with_capacity(len);
    write(Place(data.as_mut_ptr()))?;
    // SAFETY: `write` has initialised `len` numbers, as the caller promises.
    unsafe { data.set_len(len) };
    Tensor::from_vec(data, shape, &Device::Cpu)
}

/// Calls `f` with room for `len` numbers, which hold anything. The room stays with the thread: a new
/// one for every task would cost more in page faults than the task itself. A call inside `f` gets a
/// room of its own.
pub(super) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let mut scratch = SCRATCH.take();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    let result = f(&mut scratch[..len]);
    SCRATCH.set(scratch);
    result
}
