//! Buffers that a relay borrows while it has bytes in hand.
//!
//! Each runtime thread keeps a few for reuse, so that a connection without traffic owns none and one with
//! traffic does not allocate. [`super::way`] asks for more as a transfer proves to be bulk.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicUsize, Ordering},
};

/// Sizes of a buffer. The smallest holds one TLS record; the largest amortises a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Size {
    #[default]
    Small,
    Medium,
    Large,
}

impl Size {
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::Small => 16 << 10,
            Self::Medium => 64 << 10,
            Self::Large => 256 << 10,
        }
    }

    /// How many of them a thread keeps: two directions of one connection are in hand at a time.
    const fn kept(self) -> usize {
        match self {
            Self::Small => 8,
            Self::Medium | Self::Large => 2,
        }
    }

    pub(super) fn larger(self) -> Self {
        match self {
            Self::Small => Self::Medium,
            Self::Medium | Self::Large => Self::Large,
        }
    }

    pub(super) fn smaller(self) -> Self {
        match self {
            Self::Large => Self::Medium,
            Self::Medium | Self::Small => Self::Small,
        }
    }
}

/// What all connections together may hold in buffers above [`Size::Small`]. A stalled bulk transfer
/// keeps its buffer; thousands of them must not add up to the node's memory.
const GROWN_BYTES_MAX: usize = 128 << 20;

static GROWN_BYTES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static KEPT: RefCell<[Vec<Box<[u8]>>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

/// A borrowed buffer; goes back to the thread that drops it.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Box<[u8]>,
    size: Size,
}

impl Buffer {
    /// A buffer of `wanted` size, or a small one while grown buffers have used up their share.
    pub(super) fn take(wanted: Size) -> Self {
        let size = if wanted == Size::Small || reserve(wanted.bytes()) {
            wanted
        } else {
            Size::Small
        };
        let kept = KEPT
            .try_with(|kept| shelf(&mut kept.borrow_mut(), size).pop())
            .ok()
            .flatten();
        let bytes = kept.unwrap_or_else(|| vec![0; size.bytes()].into_boxed_slice());
        Self { bytes, size }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.size != Size::Small {
            GROWN_BYTES.fetch_sub(self.size.bytes(), Ordering::Relaxed);
        }
        let bytes = std::mem::take(&mut self.bytes);
        // While a thread ends its shelf is gone already; the buffer is then freed.
        let _ended = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let shelf = shelf(&mut kept, self.size);
            if shelf.len() < self.size.kept() {
                shelf.push(bytes);
            }
        });
    }
}

fn shelf(kept: &mut [Vec<Box<[u8]>>; 3], size: Size) -> &mut Vec<Box<[u8]>> {
    let [small, medium, large] = kept;
    match size {
        Size::Small => small,
        Size::Medium => medium,
        Size::Large => large,
    }
}

fn reserve(bytes: usize) -> bool {
    GROWN_BYTES
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            held.checked_add(bytes)
                .filter(|sum| *sum <= GROWN_BYTES_MAX)
        })
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_lent_again() {
        let first = Buffer::take(Size::Small);
        let address = first.as_slice().as_ptr();
        drop(first);
        assert_eq!(Buffer::take(Size::Small).as_slice().as_ptr(), address);
    }

    #[test]
    fn a_thread_keeps_a_bounded_number() {
        drop(
            (0..100)
                .map(|_| Buffer::take(Size::Small))
                .collect::<Vec<_>>(),
        );
        let kept = KEPT.with_borrow_mut(|kept| shelf(kept, Size::Small).len());
        assert_eq!(kept, Size::Small.kept());
    }

    #[test]
    fn grown_buffers_share_a_bound() {
        let most = GROWN_BYTES_MAX / Size::Large.bytes();
        let held: Vec<_> = (0..most + 8).map(|_| Buffer::take(Size::Large)).collect();
        assert!(
            held.iter().any(|b| b.size == Size::Small),
            "no buffer was held back"
        );
        let grown: usize = held
            .iter()
            .filter(|b| b.size != Size::Small)
            .map(|b| b.as_slice().len())
            .sum();
        assert!(grown <= GROWN_BYTES_MAX, "{grown} bytes lent");
    }
}
