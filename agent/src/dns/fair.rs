//! What all share, so that nobody can have all of it: each may have as much as is left for the others.
//!
//! Who is alone gets half of it; of two who take what they can, each gets a third, and a third stays free. A fixed
//! part for each would be either too small for one alone or used up by a few. Source: Choudhury and Hahne, "Dynamic
//! queue length thresholds for shared-memory packet switches" (1998), with a factor of 1.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// So many slots, of which everybody who has a [`Share`] takes some.
#[derive(Debug)]
pub struct Slots {
    most: usize,
    taken: AtomicUsize,
}

/// What one of those who share may take.
#[derive(Debug)]
pub struct Share {
    slots: Arc<Slots>,
    taken: AtomicUsize,
}

/// Taken; given back as it is dropped.
#[derive(Debug)]
pub struct Slot {
    share: Arc<Share>,
}

impl Slots {
    /// `most` of them.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: AtomicUsize::new(0),
        })
    }

    /// For one more who shares.
    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share {
            slots: Arc::clone(self),
            taken: AtomicUsize::new(0),
        })
    }
}

impl Share {
    /// One more, unless this one had more then than are left for all.
    pub fn take(self: &Arc<Self>) -> Option<Slot> {
        let slot = Slot {
            share: Arc::clone(self),
        };
        // Counted first: two at once may both be refused the last one, but never both have it.
        let own = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let all = self.slots.taken.fetch_add(1, Ordering::Relaxed) + 1;
        (own + all <= self.slots.most).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.share.taken.fetch_sub(1, Ordering::Relaxed);
        self.share.slots.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take_all(share: &Arc<Share>) -> Vec<Slot> {
        std::iter::from_fn(|| share.take()).collect()
    }

    #[test]
    fn one_alone_gets_half_and_two_a_third_each() {
        let slots = Slots::new(600);
        let (a, b) = (slots.share(), slots.share());
        let of_a = take_all(&a);
        assert_eq!(of_a.len(), 300);
        let of_b = take_all(&b);
        assert_eq!(of_b.len(), 150);
        drop(of_a);
        // As a comes back, they share what there is.
        let mut held = (take_all(&a), of_b);
        for _ in 0..1000 {
            held.0.pop();
            held.1.extend(b.take());
            held.0.extend(a.take());
        }
        assert!(held.0.len().abs_diff(200) <= 2, "{}", held.0.len());
        drop(held);
        assert_eq!(slots.taken.load(Ordering::Relaxed), 0);
    }

    proptest! {
        #[test]
        fn somebody_new_gets_half_of_what_is_left(floods in 0_usize..11) {
            let slots = Slots::new(4096);
            let flooding: Vec<_> = (0..floods).map(|_| take_all(&slots.share())).collect();
            let held: usize = flooding.iter().map(Vec::len).sum();
            prop_assert!(held < 4096);
            prop_assert_eq!(take_all(&slots.share()).len(), (4096 - held) / 2);
        }
    }
}
