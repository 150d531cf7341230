//! Durable jobs: work that is accepted now and done later, by whichever process is alive.
