//! Training: pictures in, a servable adapter out.

#[cfg(test)]
mod golden;
