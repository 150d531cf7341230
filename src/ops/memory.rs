//! Keeping freed memory for the next operation, and giving it back when there is none.
//!
//! A step frees and asks for hundreds of megabytes in large pieces. The C library returns each piece
//! to the system at once, and the system then clears every page of the next one: a tenth of the
//! time of an SD 1.5 step or decode on two cores (figures in `benches/README.md`). mimalloc and
//! jemalloc, tried in its place, did no better with pieces of this size.

/// Lets the process keep what it frees, up to its own peak. Call it first thing, while there is one
/// thread; a second call changes nothing. Without glibc it does nothing.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Larger than any piece: none is mapped by itself.
        const NEVER: libc::c_int = libc::c_int::MAX;
        // One arena for all threads: those of other threads give whole heaps back whatever the
        // thresholds, and the device thread is one of them. Small pieces have a cache per thread
        // before the arena.
        // SAFETY: `mallopt` takes any numbers.
        let set = unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1) == 1
                && libc::mallopt(libc::M_MMAP_THRESHOLD, NEVER) == 1
                && libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER) == 1
        };
        if !set {
            tracing::debug!("the allocator keeps its own thresholds");
        }
    }
}

/// Returns what is free to the system: for when there is nothing to do for a while.
pub fn give_back_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
