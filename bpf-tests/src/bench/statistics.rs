//! Statistics of a few samples: medians, percentiles, and how far they may be trusted. Pure.

use fastrand::Rng;

/// How often a bootstrap draws: the ends of an interval then move by a percent of its width from seed to seed.
const DRAWS: usize = 2_000;

/// The share of resamples that an interval leaves out on each side: 95 % are within.
const TAIL: f64 = 0.025;

/// A figure with the interval in which 95 of 100 resamples had it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The figure itself.
    pub value: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// The value below which the share `fraction` (0 to 1) of `sorted` lies, between two samples in proportion
/// (Hyndman and Fan 1996, type 7). `None` without samples.
pub fn percentile(sorted: &[f64], fraction: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = fraction.clamp(0.0, 1.0) * as_float(last);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and the last index"
    )]
    let below = position.floor() as usize;
    let lower = *sorted.get(below)?;
    let upper = *sorted.get((below + 1).min(last))?;
    Some(lower + (upper - lower) * (position - as_float(below)))
}

/// `samples` in ascending order.
pub fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The median. `None` without samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    percentile(&sorted(samples), 0.5)
}

/// The median with its bootstrap interval (percentile method, Efron 1979). `None` without samples.
pub fn estimate(samples: &[f64], random: &mut Rng) -> Option<Estimate> {
    bootstrap(median(samples)?, || median(&resample(samples, random)))
}

/// The median of `samples` divided by that of `base`, with its bootstrap interval: both are resampled, each by itself.
/// `None` without samples, or if it would be a division by zero.
pub fn ratio(samples: &[f64], base: &[f64], random: &mut Rng) -> Option<Estimate> {
    let divide = |over: f64, under: f64| (under != 0.0).then(|| over / under);
    let value = divide(median(samples)?, median(base)?)?;
    bootstrap(value, || {
        let over = median(&resample(samples, random))?;
        divide(over, median(&resample(base, random))?)
    })
}

fn bootstrap(value: f64, mut draw: impl FnMut() -> Option<f64>) -> Option<Estimate> {
    let drawn: Vec<f64> = (0..DRAWS).filter_map(|_| draw()).collect();
    let drawn = sorted(&drawn);
    Some(Estimate {
        value,
        low: percentile(&drawn, TAIL)?,
        high: percentile(&drawn, 1.0 - TAIL)?,
    })
}

/// As many samples as there are, each drawn out of all.
fn resample(samples: &[f64], random: &mut Rng) -> Vec<f64> {
    let draw = |_| samples.get(random.usize(..samples.len())).copied();
    (0..samples.len()).filter_map(draw).collect()
}

/// For each round the indices 0 to `count` - 1 in an order of its own.
pub fn orders(rounds: usize, count: usize, random: &mut Rng) -> Vec<Vec<usize>> {
    let shuffled = |_| {
        let mut order: Vec<usize> = (0..count).collect();
        random.shuffle(&mut order);
        order
    };
    (0..rounds).map(shuffled).collect()
}

/// A count as a number to calculate with.
#[expect(
    clippy::cast_precision_loss,
    reason = "a count of what was measured is far below 2^52"
)]
pub fn as_float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(left: f64, right: f64) {
        assert!((left - right).abs() < 1e-9, "{left} is not {right}");
    }

    #[test]
    fn a_median_is_in_the_middle() {
        close(median(&[3.0, 1.0, 2.0]).unwrap(), 2.0);
        close(median(&[4.0, 1.0, 2.0, 3.0]).unwrap(), 2.5);
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn percentiles_lie_between_samples_in_proportion() {
        let samples: Vec<f64> = (0..=100).map(f64::from).collect();
        for (fraction, expected) in [(0.0, 0.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)] {
            close(percentile(&samples, fraction).unwrap(), expected);
        }
        close(percentile(&[1.0, 2.0], 0.25).unwrap(), 1.25);
        close(percentile(&[7.0], 0.99).unwrap(), 7.0);
    }

    #[test]
    fn an_interval_holds_the_median_and_shrinks_with_the_spread() {
        let random = &mut Rng::with_seed(1);
        let wide: Vec<f64> = (0..20).map(f64::from).collect();
        let narrow: Vec<f64> = wide.iter().map(|x| 9.5 + x / 100.0).collect();
        let (wide, narrow) = (
            estimate(&wide, random).unwrap(),
            estimate(&narrow, random).unwrap(),
        );
        for it in [wide, narrow] {
            assert!(it.low <= it.value && it.value <= it.high, "{it:?}");
        }
        assert!(narrow.high - narrow.low < (wide.high - wide.low) / 50.0);
        // Known for the median of 0 to 19 from the binomial distribution: the 6th and the 15th sample.
        assert!((4.0..=6.5).contains(&wide.low), "{wide:?}");
        assert!((12.5..=15.0).contains(&wide.high), "{wide:?}");
    }

    #[test]
    fn samples_that_are_equal_leave_no_doubt() {
        let random = &mut Rng::with_seed(1);
        let it = estimate(&[5.0; 10], random).unwrap();
        assert_eq!((it.value, it.low, it.high), (5.0, 5.0, 5.0));
    }

    #[test]
    fn a_ratio_is_that_of_the_medians() {
        let random = &mut Rng::with_seed(1);
        let base = [9.0, 10.0, 11.0, 10.0, 10.0];
        let twice = base.map(|x| 2.0 * x);
        let it = ratio(&twice, &base, random).unwrap();
        close(it.value, 2.0);
        assert!(it.low < 2.0 && 2.0 < it.high && it.low > 1.6 && it.high < 2.5);
        assert_eq!(ratio(&base, &[0.0, 0.0], random), None);
        assert_eq!(ratio(&[], &base, random), None);
    }

    #[test]
    fn every_round_has_every_variant_once_in_an_order_of_its_own() {
        let random = &mut Rng::with_seed(1);
        let orders = orders(50, 4, random);
        let mut firsts = [0; 4];
        for order in &orders {
            let mut all = order.clone();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3]);
            firsts[order[0]] += 1;
        }
        assert!(firsts.iter().all(|count| *count > 2), "{firsts:?}");
    }

    #[test]
    fn a_seed_repeats_the_order() {
        let order = |seed| orders(10, 5, &mut Rng::with_seed(seed));
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
    }
}
