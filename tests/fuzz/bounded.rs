//! An allocator that ends the process where a file of some kilobytes asks for much more.

use std::alloc::{GlobalAlloc, Layout, System, handle_alloc_error};

/// Bytes of one allocation. The tiny models have 1 MB, and files at most libFuzzer's `-max_len`.
const LARGEST: usize = 64 << 20;

pub struct Bounded;

// SAFETY: the system's allocator answers every call, with its own promises, or the process ends.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > LARGEST {
            handle_alloc_error(layout);
        }
        unsafe { System.realloc(memory, layout, size) }
    }
}

fn check(layout: Layout) {
    if layout.size() > LARGEST {
        handle_alloc_error(layout);
    }
}
