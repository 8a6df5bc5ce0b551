//! What a handshake costs, printed: `cargo test -p sidestep --lib tunnel::tests::cost -- --nocapture`.

use rustix::time::{ClockId, clock_gettime};

use super::{resumption::Node, *};

/// Of this thread: both ends run on it, and other tests do not.
fn cpu_time() -> Duration {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        spent.tv_sec.try_into().unwrap(),
        spent.tv_nsec.try_into().unwrap(),
    )
}

#[tokio::test]
async fn a_handshake_costs_milliseconds_and_a_resumed_one_less() {
    const ROUNDS: u32 = 100;
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let node = Node::start().await;
    let [mut full, mut resumed] = [Duration::ZERO; 2];
    for _ in 0..ROUNDS {
        client.forget_sessions(server.identity(), node.address);
        for (expected, spent) in [(false, &mut full), (true, &mut resumed)] {
            let started = cpu_time();
            assert_eq!(node.call(&client, &server).await, Ok(expected));
            *spent += cpu_time().saturating_sub(started);
        }
    }
    for (kind, spent) in [("full", full), ("resumed", resumed)] {
        let each = spent / ROUNDS;
        println!(
            "{kind} handshake and a byte each way, both sides together: {each:?} of CPU, {:.0} per CPU second",
            1.0 / each.as_secs_f64()
        );
    }
    // 0.9 ms in a debug build (2 cores, 2026); more than ten times that is not the machine.
    assert!(full / ROUNDS < Duration::from_millis(10), "{full:?}");
    assert!(resumed < full, "{resumed:?} {full:?}");
}
