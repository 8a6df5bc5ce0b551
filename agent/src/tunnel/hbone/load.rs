//! Which connection of a group takes the next stream, and how many there should be. Pure.

/// Streams that one connection carries before another one is worth its handshake: up to here new connections of
/// applications are cheapest together.
const STREAMS_PER_CONNECTION: usize = 16;

/// Streams in flight from which on they are worth a connection on each worker that they come from.
const STREAMS_PER_WORKER: usize = 4;

/// One connection as it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Streams in flight.
    pub(super) streams: usize,
    /// How many its peer takes at a time.
    pub(super) limit: usize,
    /// Many bytes move on it.
    pub(super) is_busy: bool,
    /// It is driven by the worker that the stream is for.
    pub(super) is_near: bool,
}

/// What to do for one more stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// The connection to use; `None` to wait for one that is being opened.
    pub(super) take: Option<usize>,
    /// How many to open.
    pub(super) open: usize,
}

/// Decides for one more stream beside `waiting` others that have no connection yet, while `opening` connections are
/// being opened.
///
/// A group grows to `most` connections: with the streams in flight, by one if bulk moves on all there are, and by one
/// for each worker that has none. Beyond `most` it grows only if no connection has room for another stream.
pub(super) fn plan(loads: &[Load], opening: usize, waiting: usize, most: usize) -> Plan {
    let take = loads
        .iter()
        .enumerate()
        .filter(|(_, load)| load.streams < load.limit)
        .min_by_key(|(_, load)| (load.is_busy, !load.is_near, load.streams))
        .map(|(index, _)| index);
    let have = loads.len();
    let streams = loads.iter().map(|load| load.streams).sum::<usize>() + waiting + 1;
    let mut wanted = streams.div_ceil(STREAMS_PER_CONNECTION);
    let is_far = loads.iter().all(|load| !load.is_near) && streams > STREAMS_PER_WORKER;
    if is_far || loads.iter().all(|load| load.is_busy) {
        wanted = wanted.max(have + 1);
    }
    wanted = wanted.min(most);
    if take.is_none() {
        wanted = wanted.max(have + 1);
    }
    Plan {
        take,
        open: wanted.saturating_sub(have + opening),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(streams: usize) -> Load {
        Load {
            streams,
            limit: 100,
            is_busy: false,
            is_near: true,
        }
    }

    fn busy(streams: usize) -> Load {
        Load {
            is_busy: true,
            ..load(streams)
        }
    }

    fn check(loads: &[Load], opening: usize, waiting: usize, take: Option<usize>, open: usize) {
        let plan = plan(loads, opening, waiting, 4);
        assert_eq!(plan, Plan { take, open }, "{loads:?} {opening} {waiting}");
    }

    #[test]
    fn the_first_stream_opens_one_connection_and_the_next_wait_for_it() {
        check(&[], 0, 0, None, 1);
        check(&[], 1, 1, None, 0);
        check(&[], 1, 16, None, 1);
        check(&[], 4, 1000, None, 0);
    }

    #[test]
    fn the_least_loaded_connection_with_room_takes_it() {
        check(&[load(3), load(1), load(2)], 0, 0, Some(1), 0);
        check(&[load(1), busy(0)], 0, 0, Some(0), 0);
        let full = Load {
            limit: 5,
            ..load(5)
        };
        check(&[full, busy(9)], 0, 0, Some(1), 0);
    }

    #[test]
    fn a_group_grows_with_streams_and_with_bulk_but_not_without_end() {
        check(&[load(15)], 0, 0, Some(0), 0);
        check(&[load(16)], 0, 0, Some(0), 1);
        check(&[load(16)], 1, 0, Some(0), 0);
        check(&[busy(1)], 0, 0, Some(0), 1);
        check(&[busy(1), load(1)], 0, 0, Some(1), 0);
        check(&[busy(50), busy(50), busy(60), busy(50)], 0, 0, Some(0), 0);
    }

    #[test]
    fn a_worker_gets_a_connection_of_its_own_once_many_streams_are_in_flight() {
        let far = |streams| Load {
            is_near: false,
            ..load(streams)
        };
        check(&[far(3)], 0, 0, Some(0), 0);
        check(&[far(4)], 0, 0, Some(0), 1);
        check(&[far(4)], 1, 0, Some(0), 0);
        check(&[far(3), load(9)], 0, 0, Some(1), 0);
        check(&[far(8); 4], 0, 0, Some(0), 0);
    }

    #[test]
    fn full_connections_are_added_to_beyond_the_usual_number() {
        check(&[load(100); 4], 0, 0, None, 1);
        check(&[load(100); 4], 1, 50, None, 0);
    }
}
