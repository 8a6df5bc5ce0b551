//! Test support for tests that need a kernel.
