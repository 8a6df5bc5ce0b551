//! The intentions in force, swapped whole.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::Intentions;

/// Holds the compiled intentions; readers never wait.
#[derive(Debug)]
pub struct PolicyStore {
    current: ArcSwap<Intentions>,
}

impl PolicyStore {
    /// Starts with these.
    pub fn new(intentions: Intentions) -> Self {
        Self {
            current: ArcSwap::from_pointee(intentions),
        }
    }

    /// The intentions in force now.
    pub fn current(&self) -> Arc<Intentions> {
        self.current.load_full()
    }

    /// Puts others in force. Connections that exist are not touched: see
    /// [`crate::connections::Connections::cut_forbidden`].
    pub fn replace(&self, intentions: Intentions) {
        self.current.store(Arc::new(intentions));
    }
}
