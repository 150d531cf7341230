//! Training: pictures in, a servable adapter out.
