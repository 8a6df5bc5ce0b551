//! What kernel and agent share.
