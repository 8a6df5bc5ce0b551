//! Whole numbers in files. A number out of bounds is told in the operator's words; serde's are those of Rust.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, Unexpected, Visitor},
};

/// A whole number from 0 to the greatest of `T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Whole<T>(pub(crate) T);

impl<'de> Deserialize<'de> for Whole<u16> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_u64(UpTo { most: u16::MAX }).map(Self)
    }
}

impl<'de> Deserialize<'de> for Whole<u32> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_u64(UpTo { most: u32::MAX }).map(Self)
    }
}

struct UpTo<T> {
    most: T,
}

impl<T: TryFrom<i64> + TryFrom<u64> + fmt::Display> Visitor<'_> for UpTo<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from 0 to {}", self.most)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        T::try_from(number).map_err(|_outside| E::invalid_value(Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        T::try_from(number)
            .map_err(|_outside| E::invalid_value(Unexpected::Unsigned(number), &self))
    }
}
