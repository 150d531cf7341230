//! Which samples each batch has, computed from the seed and the number of the batch alone.

use super::random::{Draw, Purpose};

/// Where a batch is in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Full passes over the samples before it.
    pub epoch: u64,
    /// Its place in the pass.
    pub batch: usize,
}

/// The order of samples of a whole run.
///
/// In each epoch every sample comes at least once. A batch has samples of one bucket only, as they must
/// have one size; the last batch of a bucket is filled with samples of that bucket a second time, so
/// that every batch has the same number and weighs the same.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    /// The samples of each bucket; none is empty.
    buckets: Vec<Vec<usize>>,
    batch_size: usize,
}

impl Order {
    /// An order of samples whose buckets are given, sample by sample. No sample at all, or a batch of
    /// none, makes an order without batches.
    pub fn new(seed: u64, bucket_of: &[usize], batch_size: usize) -> Self {
        let mut buckets = vec![Vec::new(); bucket_of.iter().max().map_or(0, |most| most + 1)];
        for (sample, &bucket) in bucket_of.iter().enumerate() {
            buckets[bucket].push(sample);
        }
        buckets.retain(|bucket| !bucket.is_empty() && batch_size > 0);
        Self {
            seed,
            buckets,
            batch_size,
        }
    }

    /// Batches of one pass over all samples.
    pub fn batches_per_epoch(&self) -> usize {
        let batches = |bucket: &Vec<usize>| bucket.len().div_ceil(self.batch_size);
        self.buckets.iter().map(batches).sum()
    }

    /// Where batch number `number` of the run is; none if there are no samples.
    pub fn position(&self, number: u64) -> Option<Position> {
        let batches = self.batches_per_epoch() as u64;
        Some(Position {
            epoch: number.checked_div(batches)?,
            batch: (number % batches) as usize,
        })
    }

    /// The samples of batch number `number` of the run: none if there are no samples at all.
    pub fn batch(&self, number: u64) -> Vec<usize> {
        let Some(Position { epoch, batch }) = self.position(number) else {
            return Vec::new();
        };
        self.epoch(epoch).swap_remove(batch)
    }

    /// All batches of an epoch.
    fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut batches = Vec::with_capacity(self.batches_per_epoch());
        for (number, bucket) in self.buckets.iter().enumerate() {
            let mut draw = Draw::new(self.seed, epoch, number as u64 + 1, Purpose::Order);
            let wanted = bucket.len().next_multiple_of(self.batch_size);
            let mut samples = Vec::with_capacity(wanted);
            while samples.len() < wanted {
                let order = draw.permutation(bucket.len());
                let missing = wanted - samples.len();
                samples.extend(order.iter().take(missing).map(|&place| bucket[place]));
            }
            batches.extend(samples.chunks(self.batch_size).map(<[usize]>::to_vec));
        }
        Draw::new(self.seed, epoch, 0, Purpose::Order).shuffle(&mut batches);
        batches
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_epoch_has_every_sample_and_a_batch_one_bucket(
            seed: u64,
            bucket_of in prop::collection::vec(0usize..5, 1..60),
            batch_size in 1usize..10,
            epoch in 0u64..1000,
        ) {
            let order = Order::new(seed, &bucket_of, batch_size);
            let batches = order.batches_per_epoch() as u64;
            let mut seen = vec![0; bucket_of.len()];
            for batch in 0..batches {
                let number = epoch * batches + batch;
                prop_assert_eq!(
                    order.position(number),
                    Some(Position { epoch, batch: batch as usize })
                );
                let samples = order.batch(number);
                prop_assert_eq!(samples.len(), batch_size);
                for &sample in &samples {
                    seen[sample] += 1;
                    prop_assert_eq!(bucket_of[sample], bucket_of[samples[0]]);
                }
            }
            let most = 1 + batch_size;
            prop_assert!(seen.iter().all(|times| (1..=most).contains(times)), "{:?}", seen);
        }
    }

    #[test]
    fn without_a_remainder_every_sample_comes_once() {
        let order = Order::new(1, &[0; 12], 4);
        assert_eq!(order.batches_per_epoch(), 3);
        let mut samples: Vec<usize> = (3..6).flat_map(|number| order.batch(number)).collect();
        assert_ne!(samples, (0..12).collect::<Vec<_>>());
        samples.sort_unstable();
        assert_eq!(samples, (0..12).collect::<Vec<_>>());
    }

    #[test]
    fn seeds_and_epochs_give_other_orders() {
        let order = |seed| Order::new(seed, &[0; 30], 30);
        assert_ne!(order(1).batch(0), order(2).batch(0));
        assert_ne!(order(1).batch(0), order(1).batch(1));
        assert_eq!(order(1).batch(5), order(1).batch(5));
    }

    #[test]
    fn a_batch_larger_than_the_set_goes_round() {
        let batch = Order::new(0, &[0; 3], 8).batch(0);
        let count = |sample| batch.iter().filter(|&&s| s == sample).count();
        assert!(
            (0..3).all(|sample| (2..=3).contains(&count(sample))),
            "{batch:?}"
        );
    }

    #[test]
    fn nothing_has_no_batches() {
        for order in [Order::new(0, &[], 4), Order::new(0, &[0, 1], 0)] {
            assert_eq!(order.position(3), None);
            assert!(order.batch(3).is_empty());
        }
    }
}
