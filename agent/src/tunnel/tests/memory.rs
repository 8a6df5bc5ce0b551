//! What an idle tunnel holds, printed: `cargo test -p sidestep --lib tunnel::tests::memory -- --nocapture`.

use std::{env, pin::Pin, process::Command, task::Poll};

use tokio::io::{AsyncRead as _, AsyncReadExt as _, AsyncWriteExt as _, ReadBuf};

use super::*;

const TUNNELS: usize = 500;

/// What each end of an idle tunnel may hold in the heap, in bytes.
const MOST: usize = 5 << 10;

/// In a process of its own: what the heap holds cannot be told apart from what other tests do.
#[test]
fn an_idle_tunnel_holds_little() {
    let program = env::current_exe().unwrap();
    let name = "tunnel::tests::memory::measured_alone";
    let measured = Command::new(program)
        .args([name, "--exact", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&measured.stdout);
    println!("{said}");
    assert!(said.contains("1 passed"), "{said}");
}

#[tokio::test]
#[ignore = "for the test above"]
async fn measured_alone() {
    let root = TestCa::root("root");
    let client = root.workload(&id("web"), &[&root]);
    let server = root.workload(&id("db"), &[&root]);
    let (listener, address) = listen().await;
    let mut clients = Vec::with_capacity(TUNNELS);
    let mut servers = Vec::with_capacity(TUNNELS);
    for _ in 0..TUNNELS {
        let open = Box::pin(open(address, &client, server.identity()));
        let take = Box::pin(take(&listener, &server));
        let (opened, taken) = tokio::join!(open, take);
        let (mut opened, mut taken) = (Box::new(opened.unwrap()), Box::new(taken.unwrap().0));
        for stream in [&mut opened, &mut taken] {
            stream.write_all(b"x").await.unwrap();
            stream.flush().await.unwrap();
        }
        for stream in [&mut opened, &mut taken] {
            stream.read_exact(&mut [0]).await.unwrap();
            wait_idly(stream).await;
        }
        clients.push(opened);
        servers.push(taken);
    }
    let all = held();
    drop(clients);
    let of_servers = held();
    drop(servers);
    let of_none = held();
    for (end, bytes) in [
        ("calling", all - of_servers),
        ("called", of_servers - of_none),
    ] {
        let each = bytes / TUNNELS;
        println!("idle tunnel, {end} end: {each} bytes of heap");
        assert!(each < MOST, "{end}: {each}");
    }
}

/// As a relay waits for bytes.
async fn wait_idly(stream: &mut TunnelStream) {
    std::future::poll_fn(|cx| {
        let mut into = [0; 64];
        let read = Pin::new(&mut *stream).poll_read(cx, &mut ReadBuf::new(&mut into));
        assert!(read.is_pending(), "{read:?}");
        Poll::Ready(())
    })
    .await;
}

/// Bytes that are allocated now, by C libraries too.
fn held() -> usize {
    #[expect(unsafe_code, reason = "mallinfo2(3) has no safe binding")]
    // SAFETY: takes nothing, and returns plain numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}
