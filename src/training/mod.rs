//! Training: pictures in, a servable adapter out.

pub mod dataset;
pub mod objective {
    pub mod weights;
}
pub mod optimizer;
pub mod options;
pub mod order;
pub mod random;
