//! Draws against PyTorch's: `tests/golden/noise`, made by `tests/reference/noise.py`.

use std::{fs, path::PathBuf};

use safetensors::SafeTensors;

use super::Generator;

/// Numbers kept of either end of a long sequence.
const ENDS: usize = 16;

#[test]
fn every_number_is_that_of_torch_to_the_bit() {
    let file =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/noise/draws.safetensors");
    let bytes = fs::read(file).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    let mut compared = 0;
    for (name, tensor) in golden.iter().filter(|(name, _)| !name.ends_with("/sum")) {
        let (seed, counts) = name.split_once('/').unwrap();
        let mut generator = Generator::new(seed.parse().unwrap());
        let mut found = Vec::new();
        for count in counts.split(',') {
            found.extend(generator.randn(count.parse().unwrap()));
        }
        let bits: Vec<u32> = found.into_iter().map(f32::to_bits).collect();
        let expected = tensor
            .data()
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(u32::from_le_bytes);
        let expected: Vec<u32> = expected.collect();
        match golden.tensor(&format!("{name}/sum")) {
            Err(_) => assert_eq!(bits, expected, "{name}"),
            Ok(sum) => {
                let ends = [&bits[..ENDS], &bits[bits.len() - ENDS..]].concat();
                assert_eq!(ends, expected, "{name}");
                let found: i64 = bits.iter().map(|&b| i64::from(b)).sum();
                assert_eq!(found.to_le_bytes(), sum.data(), "{name}");
            }
        }
        compared += bits.len();
    }
    assert!(compared > 200_000, "{compared}");
}
