//! Which pictures step together: a pure function of what is running.

use super::backend::LatentShape;

/// A running picture, as far as the choice is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub shape: LatentShape,
    /// Rows it takes in a forward.
    pub rows: usize,
    /// Number of its last turn, or of its admission: the smaller, the longer it has waited.
    pub last_turn: u64,
}

/// Chooses the pictures of the next forward, as indices into `running`, longest wait first. The
/// caller gives them new turn numbers in this order, which makes the turns an exact round.
///
/// The picture that has waited longest is always taken, so no shape can starve another; the rest
/// of the batch are pictures of its shape, longest wait first, while their rows fit in `max_rows`.
/// A picture's own rows are never split: guidance needs both in one forward.
pub fn choose(running: &[Candidate], max_rows: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..running.len()).collect();
    order.sort_by_key(|&i| (running[i].last_turn, i));
    let Some(&first) = order.first() else {
        return Vec::new();
    };
    let shape = running[first].shape;
    let mut rows = 0;
    let mut batch = Vec::new();
    for i in order {
        let candidate = &running[i];
        if candidate.shape != shape {
            continue;
        }
        if !batch.is_empty() && rows + candidate.rows > max_rows {
            break;
        }
        rows += candidate.rows;
        batch.push(i);
    }
    batch
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: LatentShape = [16, 16, 4];
    const WIDE: LatentShape = [12, 20, 4];

    fn candidate(shape: LatentShape, rows: usize, last_turn: u64) -> Candidate {
        Candidate {
            shape,
            rows,
            last_turn,
        }
    }

    #[test]
    fn pictures_of_one_shape_step_together_whatever_else_differs() {
        let running = [
            candidate(SMALL, 2, 5),
            candidate(WIDE, 2, 5),
            candidate(SMALL, 1, 4),
        ];
        assert_eq!(choose(&running, 8), [2, 0]);
    }

    #[test]
    fn the_longest_wait_decides_the_shape() {
        let running = [
            candidate(SMALL, 2, 7),
            candidate(WIDE, 2, 6),
            candidate(SMALL, 2, 7),
        ];
        assert_eq!(choose(&running, 8), [1]);
    }

    #[test]
    fn a_picture_wider_than_the_batch_still_runs_alone() {
        assert_eq!(choose(&[candidate(SMALL, 2, 0)], 1), [0]);
        assert_eq!(choose(&[], 4), [0usize; 0]);
    }

    #[test]
    fn rows_beyond_the_batch_wait_for_their_turn() {
        let mut running = vec![candidate(SMALL, 2, 0); 5];
        let mut steps = [0; 5];
        let mut turn = 0;
        for _ in 0..10 {
            for i in choose(&running, 4) {
                turn += 1;
                running[i].last_turn = turn;
                steps[i] += 1;
            }
        }
        assert_eq!(steps, [4; 5], "twenty places over five pictures");
    }

    proptest! {
        #[test]
        fn nobody_waits_longer_than_everybody_elses_turn(
            shapes in prop::collection::vec((0usize..3, 1usize..=2), 1..12),
            max_rows in 1usize..9,
        ) {
            let mut running: Vec<Candidate> = shapes
                .iter()
                .map(|&(side, rows)| candidate([8 + side, 8, 4], rows, 0))
                .collect();
            let count = running.len();
            let (mut turn, mut waits) = (0, vec![0; count]);
            for _ in 0..40 {
                let batch = choose(&running, max_rows);
                prop_assert!(!batch.is_empty());
                let rows: usize = batch.iter().map(|&i| running[i].rows).sum();
                prop_assert!(rows <= max_rows || batch.len() == 1);
                waits.iter_mut().for_each(|wait| *wait += 1);
                for i in batch {
                    turn += 1;
                    running[i].last_turn = turn;
                    waits[i] = 0;
                }
                prop_assert!(waits.iter().all(|&wait| wait < count));
            }
        }
    }
}
