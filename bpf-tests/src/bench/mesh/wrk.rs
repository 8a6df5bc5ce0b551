//! wrk, a load generator for HTTP: what it is told and what it says.

use std::{net::SocketAddr, time::Duration};

/// The words of its command line: over `connections` connections that stay, in one thread. It counts in whole seconds.
pub(super) fn arguments(server: SocketAddr, connections: u64, time: Duration) -> Vec<String> {
    let seconds = time.as_secs().max(1);
    vec![
        "--threads".to_owned(),
        "1".to_owned(),
        "--connections".to_owned(),
        connections.to_string(),
        "--duration".to_owned(),
        format!("{seconds}s"),
        format!("http://{server}/"),
    ]
}

/// What it counted. `None` if it saw errors or answers other than success, or said nothing.
pub(super) fn requests_per_second(said: &str) -> Option<f64> {
    let is_bad = said.contains("Socket errors") || said.contains("Non-2xx");
    let rate = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Requests/sec:"))?;
    let rate: f64 = rate.trim().parse().ok()?;
    (!is_bad && rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
Running 1s test @ http://127.0.0.1:80/
  1 threads and 1 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    20.00us   10.00us   1.00ms   99.00%
    Req/Sec    45.00k     1.00k   47.00k    80.00%
  45000 requests in 1.00s, 6.00MB read
Requests/sec:  45000.12
Transfer/sec:      6.00MB
";

    #[test]
    fn the_rate_is_read() {
        assert_eq!(requests_per_second(SAID), Some(45000.12));
    }

    #[test]
    fn errors_are_no_figure() {
        let errors = format!("{SAID}  Socket errors: connect 0, read 1, write 0, timeout 0\n");
        assert_eq!(requests_per_second(&errors), None);
        let refused = format!("{SAID}  Non-2xx or 3xx responses: 7\n");
        assert_eq!(requests_per_second(&refused), None);
        assert_eq!(requests_per_second("unable to connect"), None);
    }
}
