//! What of a file belongs to the model, in one piece of memory.

use std::collections::HashMap;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use half::{bf16, f16};

use super::{
    AdapterError,
    file::{AdapterFile, MAX_VALUE},
};
use crate::models::header::{Entry, FileDType};

/// All tensors of an adapter, one behind the other as they lie in the file, and in its own type if it
/// has one for all of them: f16 stays f16, with half the bytes. What is taken out of it is a view, so an
/// adapter is one allocation of known size and no thousand small ones.
#[derive(Debug)]
pub(super) struct Numbers {
    flat: Tensor,
    /// Where a tensor begins, by where it does in the file.
    starts: HashMap<u64, usize>,
}

impl Numbers {
    /// Reads these tensors of the file.
    ///
    /// # Errors
    /// A tensor of no type of floats, or with a number no adapter needs.
    pub fn read<'a>(
        file: &AdapterFile,
        parts: impl Iterator<Item = (&'a str, &'a Entry)>,
    ) -> Result<Self, AdapterError> {
        let mut parts: Vec<_> = parts.collect();
        // Of one place an empty tensor comes first.
        parts.sort_unstable_by_key(|(_, entry)| (entry.start, entry.len));
        // Before anything is counted: only of these types has the header's shape been compared with the
        // bytes.
        let floats = [FileDType::F32, FileDType::F16, FileDType::Bf16];
        if let Some((key, _)) = parts.iter().find(|(_, e)| !floats.contains(&e.dtype)) {
            return Err(file.fault(key, "is not of dtype F16, BF16 or F32"));
        }
        let all = |dtype| parts.iter().all(|(_, entry)| entry.dtype == dtype);
        let largest = MAX_VALUE.to_bits();
        let flat = if all(FileDType::F16) {
            gather(file, &parts, |bytes, _, all| {
                // Its largest number is 65504.
                push(bytes, all, f16::from_le_bytes, |v| {
                    v.to_bits() & 0x7fff < 0x7c00
                })
            })
        } else if all(FileDType::Bf16) {
            // Numbers of one sign are in the order of their bits.
            let largest = (largest >> 16) as u16;
            gather(file, &parts, |bytes, _, all| {
                push(bytes, all, bf16::from_le_bytes, |v| {
                    v.to_bits() & 0x7fff <= largest
                })
            })
        } else {
            let fine = |v: f32| v.to_bits() & 0x7fff_ffff <= largest;
            gather(file, &parts, |bytes, dtype, all| match dtype {
                FileDType::F16 => push(bytes, all, |b| f16::from_le_bytes(b).to_f32(), fine),
                FileDType::Bf16 => push(bytes, all, |b| bf16::from_le_bytes(b).to_f32(), fine),
                _ => push(bytes, all, f32::from_le_bytes, fine),
            })
        }?;
        let mut start = 0;
        let starts = parts.iter().map(|(_, entry)| {
            let this = start;
            start += entry.shape.iter().product::<usize>();
            (entry.start, this)
        });
        // Of two in one place the first is empty and lies there too.
        let starts = starts.collect();
        Ok(Self { flat, starts })
    }

    /// One of the tensors that were read, in a shape with as many elements as the file's. The caller has
    /// compared the shapes.
    pub fn tensor(
        &self,
        key: &str,
        entry: &Entry,
        shape: &[usize],
    ) -> Result<Tensor, AdapterError> {
        let taken = match self.starts.get(&entry.start) {
            Some(start) => self
                .flat
                .narrow(0, *start, shape.iter().product())
                .and_then(|part| part.reshape(shape)),
            None => Err(candle_core::Error::Msg("was not read".into())),
        };
        taken.map_err(|source| AdapterError::Tensor {
            site: key.into(),
            source,
        })
    }
}

/// The numbers of all parts in one vector, exactly as large as they are.
fn gather<T: candle_core::WithDType>(
    file: &AdapterFile,
    parts: &[(&str, &Entry)],
    push: impl Fn(&[u8], FileDType, &mut Vec<T>) -> Result<(), String>,
) -> Result<Tensor, AdapterError> {
    let count = parts
        .iter()
        .map(|(_, entry)| entry.shape.iter().product::<usize>())
        .sum();
    let mut all = Vec::with_capacity(count);
    for (key, entry) in parts {
        push(&file.bytes(entry)?, entry.dtype, &mut all).map_err(|why| file.fault(key, why))?;
    }
    Tensor::from_vec(all, count, &Device::Cpu).map_err(|source| AdapterError::Tensor {
        site: file.label(),
        source,
    })
}

/// Adds little-endian numbers, or says what is wrong with the first that is not fine.
fn push<const N: usize, T: Copy + Into<f64>>(
    bytes: &[u8],
    all: &mut Vec<T>,
    one: impl Fn([u8; N]) -> T,
    fine: impl Fn(T) -> bool,
) -> Result<(), String> {
    let (values, _) = bytes.as_chunks::<N>();
    let mut good = true;
    all.extend(values.iter().map(|value| {
        let value = one(*value);
        good &= fine(value);
        value
    }));
    if good {
        return Ok(());
    }
    let mut values = values.iter().map(|value| one(*value)).enumerate();
    Err(match values.find(|(_, value)| !fine(*value)) {
        Some((at, value)) => {
            let value: f64 = value.into();
            match value.is_finite() {
                true => {
                    format!("element {at} is {value:e}; no adapter needs more than {MAX_VALUE:e}")
                }
                false => format!("element {at} is {value}; every value must be finite"),
            }
        }
        None => "changed while it was read".into(),
    })
}

/// Bytes that tensors in host memory take, each piece of memory once however many lie in it.
pub(super) fn bytes<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> usize {
    let mut pieces = HashMap::new();
    for tensor in tensors {
        let (storage, _) = tensor.storage_and_layout();
        if let Storage::Cpu(cpu) = &*storage {
            let size = match cpu {
                CpuStorage::F16(v) => v.capacity() * size_of::<f16>(),
                CpuStorage::BF16(v) => v.capacity() * size_of::<bf16>(),
                CpuStorage::F32(v) => v.capacity() * size_of::<f32>(),
                // No adapter has any other.
                _ => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            };
            pieces.insert(std::ptr::from_ref(cpu), size);
        }
    }
    pieces.into_values().sum()
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::super::{
        Adapter, Delta,
        golden_tests::{base, bytes as file, cases, read},
        packing::{Packed, pack, unpack},
    };

    #[test]
    fn a_shape_that_nobody_compared_with_its_bytes_is_not_counted() {
        let table = &base("two-levels").table;
        let site = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k";
        for dtype in ["F8_E4M3", "F64"] {
            let strange = Packed {
                key: format!("{site}.lora_A.weight"),
                dtype,
                shape: if dtype == "F64" {
                    vec![1]
                } else {
                    vec![1 << 40, 1 << 40]
                },
                bytes: vec![0; 8],
            };
            let read = Adapter::parse("a", pack(&[strange], &[]), table, &Default::default());
            let error = read.unwrap_err().to_string();
            assert!(
                error.contains("is not of dtype F16, BF16 or F32"),
                "{error}"
            );
        }
    }

    #[test]
    fn an_adapter_takes_what_its_file_does_in_the_files_own_type() {
        let mut types = Vec::new();
        for name in [
            "peft",
            "peft-rslora-convolutions",
            "kohya-sgm",
            "loha",
            "lokr",
        ] {
            let case = cases().into_iter().find(|case| case.name == name).unwrap();
            let adapter = read(&case);
            let (tensors, _) = unpack(&file(name));
            let counted = tensors.iter().filter(|tensor| {
                !tensor.key.ends_with(".alpha") && !adapter.unmatched.contains(&tensor.key)
            });
            let size: usize = counted.map(|tensor| tensor.bytes.len()).sum();
            assert_eq!(adapter.bytes(), size, "{name}");
            let mut found: Vec<DType> = adapter
                .deltas
                .values()
                .flat_map(Delta::tensors)
                .map(|tensor| tensor.dtype())
                .collect();
            found.dedup();
            assert_eq!(found.len(), 1, "{name}");
            types.extend(found);
        }
        assert!(types.contains(&DType::F16) && types.contains(&DType::F32));
    }
}
