//! Training: pictures in, a servable adapter out.

pub mod optimizer;
