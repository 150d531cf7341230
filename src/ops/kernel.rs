//! The innermost loop of every matrix product: a few rows times a panel of 16 columns.
//!
//! # The promise
//! One output element is computed by one chain of operations, `((0 + a₀b₀) + a₁b₁) + ...` in the
//! order of k, whatever row of a group it falls in, however many rows the call has, and whichever
//! thread runs it. A row's result is therefore bitwise independent of its neighbours.
//!
//! # Indirection
//! Rows are given by pointers, several per row: `taps` pieces of `depth` numbers that follow each
//! other in the sum. A plain matrix product has one tap; a convolution has one per kernel position,
//! pointing into the picture or at a row of zeros, and needs no copied patches ("The Indirect
//! Convolution Algorithm", Dukhan 2019).

use std::sync::OnceLock;

use super::simd::{Level, PORTABLE_FMA, fma};

/// Columns of a panel.
pub(super) const COLS: usize = 16;

/// One row of a packed panel, aligned to a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub [f32; COLS]);

impl Line {
    pub(super) const ZERO: Self = Self([0.0; COLS]);
}

/// What one call of the kernel reads and writes: up to [`Kernel::rows`] rows of one panel.
#[derive(Clone, Copy)]
pub(super) struct Call {
    /// `taps * stride` pointers, tap by tap; the first `rows` of each `stride` are used. `offset`
    /// is added to each, and `depth` numbers are read from there.
    pub pointers: *const *const f32,
    pub stride: usize,
    pub offset: usize,
    pub taps: usize,
    pub depth: usize,
    /// `taps * depth` lines.
    pub panel: *const Line,
    /// Added to a row of the result first, or null. 16 numbers.
    pub bias: *const f32,
    /// `rows` rows of `cols <= 16` numbers, `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    pub rows: usize,
    pub cols: usize,
    /// Add to what is in `out`, instead of starting from the bias.
    pub accumulate: bool,
}

/// An implementation of the kernel for one instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    /// The instruction set it is for, which the loops beside it are compiled for too.
    pub level: Level,
    /// The most rows of a call; row tiles are multiples of it.
    pub rows: usize,
    run: unsafe fn(&Call),
}

impl Kernel {
    /// # Safety
    /// All pointers of `call` must be valid for what its fields say, `call.rows` in
    /// `1..=self.rows`, `call.cols` in `1..=16`, and nobody else may touch the part of `out`.
    #[inline]
    pub(super) unsafe fn run(&self, call: &Call) {
        debug_assert!((1..=self.rows).contains(&call.rows) && (1..=COLS).contains(&call.cols));
        // SAFETY: passed on to the caller; a kernel is only handed out where the CPU has its
        // instructions.
        unsafe { (self.run)(call) }
    }
}

/// The best kernel for this machine.
pub(super) fn best() -> Kernel {
    static BEST: OnceLock<Kernel> = OnceLock::new();
    *BEST.get_or_init(|| available()[0])
}

/// The kernels this machine can run, the best first.
pub(super) fn available() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
        {
            kernels.push(x86::AVX512);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push(x86::AVX2);
        }
    }
    kernels.push(PORTABLE);
    kernels
}

const PORTABLE: Kernel = Kernel {
    level: Level::Portable,
    rows: 4,
    run: portable,
};

/// Written for the compiler to vectorise: 4 rows by 8 columns fit sixteen 128-bit registers.
unsafe fn portable(call: &Call) {
    // SAFETY: the caller's promise, `Kernel::run`.
    unsafe {
        match call.rows {
            1 => portable_rows::<1>(call),
            2 => portable_rows::<2>(call),
            3 => portable_rows::<3>(call),
            _ => portable_rows::<4>(call),
        }
    }
}

/// # Safety
/// As [`Kernel::run`], with `R` rows.
unsafe fn portable_rows<const R: usize>(call: &Call) {
    const HALF: usize = COLS / 2;
    let mut sums = [[0f32; COLS]; R];
    for half in 0..2 {
        let mut acc = [[0f32; HALF]; R];
        for tap in 0..call.taps {
            // SAFETY: `tap < taps`, and each tap has at least `R` pointers and `depth` lines.
            let (rows, panel) = unsafe { (row_pointers::<R>(call, tap), tap_panel(call, tap)) };
            for k in 0..call.depth {
                // SAFETY: `k < depth`.
                let line = unsafe { &(*panel.add(k)).0 };
                for (acc, row) in acc.iter_mut().zip(rows) {
                    // SAFETY: a tap's rows have `depth` numbers.
                    let x = unsafe { *row.add(k) };
                    for (acc, w) in acc.iter_mut().zip(&line[half * HALF..][..HALF]) {
                        *acc = fma::<PORTABLE_FMA>(x, *w, *acc);
                    }
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            sums[half * HALF..][..HALF].copy_from_slice(&acc);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(call, &sums) }
}

/// # Safety
/// `tap < call.taps`, and the call's pointers are valid with at least `R` to a tap.
#[inline(always)]
unsafe fn row_pointers<const R: usize>(call: &Call, tap: usize) -> [*const f32; R] {
    std::array::from_fn(|r| {
        // SAFETY: the caller's promise; `offset + depth` numbers lie behind each pointer.
        unsafe { (*call.pointers.add(tap * call.stride + r)).add(call.offset) }
    })
}

/// # Safety
/// `tap < call.taps`.
#[inline(always)]
unsafe fn tap_panel(call: &Call, tap: usize) -> *const Line {
    // SAFETY: the panel has `taps * depth` lines.
    unsafe { call.panel.add(tap * call.depth) }
}

/// Writes finished sums, element by element: the same additions as the vector paths.
///
/// # Safety
/// As [`Kernel::run`].
unsafe fn store<const R: usize>(call: &Call, sums: &[[f32; COLS]; R]) {
    for (r, sums) in sums.iter().enumerate() {
        for (c, sum) in sums.iter().enumerate().take(call.cols) {
            // SAFETY: `r < rows` and `c < cols`.
            unsafe {
                let out = call.out.add(r * call.out_stride + c);
                *out = if call.accumulate {
                    *out + sum
                } else if call.bias.is_null() {
                    *sum
                } else {
                    *call.bias.add(c) + sum
                };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{COLS, Call, Kernel, Level, row_pointers, store, tap_panel};
    use std::arch::x86_64::*;

    /// 6 rows by two 256-bit vectors: twelve sums hide the latency of two FMA units, and fill
    /// sixteen registers together with a line of the panel and a broadcast.
    pub(super) const AVX2: Kernel = Kernel {
        level: Level::Avx2,
        rows: 6,
        run: avx2,
    };

    /// 12 rows by one 512-bit vector.
    pub(super) const AVX512: Kernel = Kernel {
        level: Level::Avx512,
        rows: 12,
        run: avx512,
    };

    unsafe fn avx2(call: &Call) {
        // SAFETY: the caller's promise, `Kernel::run`; the CPU was asked for AVX2 and FMA.
        unsafe {
            match call.rows {
                1 => avx2_rows::<1>(call),
                2 => avx2_rows::<2>(call),
                3 => avx2_rows::<3>(call),
                4 => avx2_rows::<4>(call),
                5 => avx2_rows::<5>(call),
                _ => avx2_rows::<6>(call),
            }
        }
    }

    /// # Safety
    /// As [`Kernel::run`], with `R` rows, on a CPU with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_rows<const R: usize>(call: &Call) {
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for tap in 0..call.taps {
            // SAFETY: `tap < taps`; `k < depth` below; a line is 16 floats, 64-byte aligned.
            unsafe {
                let rows = row_pointers::<R>(call, tap);
                let panel: *const f32 = tap_panel(call, tap).cast();
                for k in 0..call.depth {
                    let w0 = _mm256_load_ps(panel.add(k * COLS));
                    let w1 = _mm256_load_ps(panel.add(k * COLS + 8));
                    for r in 0..R {
                        let x = _mm256_broadcast_ss(&*rows[r].add(k));
                        acc[r][0] = _mm256_fmadd_ps(x, w0, acc[r][0]);
                        acc[r][1] = _mm256_fmadd_ps(x, w1, acc[r][1]);
                    }
                }
            }
        }
        if call.cols < COLS {
            let mut sums = [[0f32; COLS]; R];
            for (sums, acc) in sums.iter_mut().zip(acc) {
                // SAFETY: `sums` is 16 floats.
                unsafe {
                    _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
                    _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
                }
            }
            // SAFETY: the caller's promise.
            unsafe { store(call, &sums) };
            return;
        }
        // SAFETY: 16 columns are valid behind `out` and, where not null, `bias`.
        unsafe {
            let (b0, b1) = if call.accumulate || call.bias.is_null() {
                (_mm256_setzero_ps(), _mm256_setzero_ps())
            } else {
                (
                    _mm256_loadu_ps(call.bias),
                    _mm256_loadu_ps(call.bias.add(8)),
                )
            };
            for (r, acc) in acc.iter().enumerate() {
                let out = call.out.add(r * call.out_stride);
                let (mut y0, mut y1) = (acc[0], acc[1]);
                if call.accumulate {
                    y0 = _mm256_add_ps(_mm256_loadu_ps(out), y0);
                    y1 = _mm256_add_ps(_mm256_loadu_ps(out.add(8)), y1);
                } else if !call.bias.is_null() {
                    y0 = _mm256_add_ps(b0, y0);
                    y1 = _mm256_add_ps(b1, y1);
                }
                _mm256_storeu_ps(out, y0);
                _mm256_storeu_ps(out.add(8), y1);
            }
        }
    }

    unsafe fn avx512(call: &Call) {
        // SAFETY: the caller's promise, `Kernel::run`; the CPU was asked for AVX-512F.
        unsafe {
            match call.rows {
                1 => avx512_rows::<1>(call),
                2 => avx512_rows::<2>(call),
                3 => avx512_rows::<3>(call),
                4 => avx512_rows::<4>(call),
                5 => avx512_rows::<5>(call),
                6 => avx512_rows::<6>(call),
                7 => avx512_rows::<7>(call),
                8 => avx512_rows::<8>(call),
                9 => avx512_rows::<9>(call),
                10 => avx512_rows::<10>(call),
                11 => avx512_rows::<11>(call),
                _ => avx512_rows::<12>(call),
            }
        }
    }

    /// # Safety
    /// As [`Kernel::run`], with `R` rows, on a CPU with AVX-512F.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_rows<const R: usize>(call: &Call) {
        let mut acc = [_mm512_setzero_ps(); R];
        for tap in 0..call.taps {
            // SAFETY: `tap < taps`; `k < depth` below; a line is 16 floats, 64-byte aligned.
            unsafe {
                let rows = row_pointers::<R>(call, tap);
                let panel: *const f32 = tap_panel(call, tap).cast();
                for k in 0..call.depth {
                    let w = _mm512_load_ps(panel.add(k * COLS));
                    for r in 0..R {
                        acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(*rows[r].add(k)), w, acc[r]);
                    }
                }
            }
        }
        if call.cols < COLS {
            let mut sums = [[0f32; COLS]; R];
            for (sums, acc) in sums.iter_mut().zip(acc) {
                // SAFETY: `sums` is 16 floats.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
            }
            // SAFETY: the caller's promise.
            unsafe { store(call, &sums) };
            return;
        }
        for (r, &acc) in acc.iter().enumerate() {
            // SAFETY: 16 columns are valid behind `out` and, where not null, `bias`.
            unsafe {
                let out = call.out.add(r * call.out_stride);
                let y = if call.accumulate {
                    _mm512_add_ps(_mm512_loadu_ps(out), acc)
                } else if call.bias.is_null() {
                    acc
                } else {
                    _mm512_add_ps(_mm512_loadu_ps(call.bias), acc)
                };
                _mm512_storeu_ps(out, y);
            }
        }
    }
}
