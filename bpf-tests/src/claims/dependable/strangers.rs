//! Strangers at the tunnel port.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::web;
use crate::{
    claims::{Finding, Size},
    mesh::Mesh,
    node::Node,
    wait::{SOON, Stopwatch, wait_for_value},
};

/// `tunnel.handshake_timeout`, and how much later a connection may be gone.
const HANDSHAKE: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(3);

/// What one silent connection may cost, in bytes of resident memory.
const COST: f64 = 32.0 * 1024.0;

/// Files that come and go by themselves.
const FEW_FILES: f64 = 8.0;

pub(super) fn connections_that_say_nothing_are_cheap_and_end(size: Size) -> Result<Finding> {
    let strangers = size.pick(1_000_usize, 10_000);
    let mesh = started("loris")?;
    ensure!(web::serves(&mesh)?, "no call is answered");
    let node = &mesh.lab.b;
    let (files_before, memory_before) = (files(node)?, memory(node)?);
    let target = tunnel(node);
    let silent = mesh.lab.a.namespace().run(move || {
        let connect = |_| TcpStream::connect(target).context("opening a tunnel");
        (0..strangers).map(connect).collect::<Result<Vec<_>>>()
    })?;
    let clock = Stopwatch::start();
    let most = web::live(node, "inbound")?;
    let cost = (memory(node)? - memory_before).max(0.0) / f64::from(u32::try_from(strangers)?);
    let calls = web::served(&mesh, 10)?;
    wait_for_value("the strangers to be sent away", SOON, || {
        Ok((web::live(node, "inbound")? == 0).then_some(()))
    })?;
    let time = clock.elapsed();
    let left = wait_for_value("their files to be closed", SOON, || {
        let open = files(node)?;
        Ok((open <= files_before + FEW_FILES).then_some(open))
    })?;
    let told = silent.into_iter().map(ended).collect::<Result<Vec<_>>>()?;
    let in_time = time < HANDSHAKE + GRACE;
    Ok(Finding::new(
        most > strangers as u64 / 2
            && calls == 10
            && cost < COST
            && in_time
            && told.len() == strangers,
        format!(
            "{most} of {strangers} held at once, {:.1} KiB each; {calls} of 10 calls meanwhile; all gone after {} ms, {left} files open, {files_before} before",
            cost / 1024.0,
            time.as_millis()
        ),
    ))
}

pub(super) fn garbage_at_the_tunnel_port_harms_nobody(size: Size) -> Result<Finding> {
    let rounds = size.pick(20_usize, 1_000);
    let mesh = started("garbage")?;
    ensure!(web::serves(&mesh)?, "no call is answered");
    let node = &mesh.lab.b;
    let target = tunnel(node);
    let seen = node.access_log().len();
    let kinds = garbage();
    let sent = kinds.clone();
    let streams = mesh.lab.a.namespace().run(move || {
        let mut streams = vec![];
        for _ in 0..rounds {
            for (_, bytes) in &sent {
                let mut stream = TcpStream::connect(target).context("opening a tunnel")?;
                // The agent may have closed it already.
                let _sent = stream.write_all(bytes);
                streams.push(stream);
            }
        }
        Ok(streams)
    })?;
    let clock = Stopwatch::start();
    let calls = web::served(&mesh, 10)?;
    wait_for_value("the strangers to be sent away", SOON, || {
        Ok((web::live(node, "inbound")? == 0).then_some(()))
    })?;
    let time = clock.elapsed();
    let count = streams.len();
    let ended = streams.into_iter().map(ended).collect::<Result<Vec<_>>>()?;
    let lines = wait_for_value("a line for each", SOON, || {
        let log = node.access_log();
        let new = log
            .iter()
            .skip(seen)
            .filter(|line| line.contains("outcome=failed"));
        let lines = new.count();
        Ok((lines >= count).then_some(lines))
    })?;
    let after = web::served(&mesh, 10)?;
    Ok(Finding::new(
        calls == 10
            && after == 10
            && ended.len() == count
            && lines == count
            && time < HANDSHAKE + GRACE,
        format!(
            "{count} connections with {}: all ended within {} ms, {lines} lines; {calls} of 10 calls meanwhile, {after} after",
            kinds.map(|(kind, _)| kind).join(", "),
            time.as_millis()
        ),
    ))
}

fn started(purpose: &str) -> Result<Mesh> {
    let mut mesh = web::mesh(purpose)?;
    let timeout = HANDSHAKE.as_secs();
    let setting = format!("[tunnel]\nhandshake_timeout = \"{timeout}s\"");
    mesh.lab.b.add_setting(&setting);
    mesh.start()?;
    Ok(mesh)
}

/// What strangers send, by name.
fn garbage() -> [(&'static str, Vec<u8>); 5] {
    // A handshake record (22) of 512 bytes that begins a ClientHello (1), of which no more comes.
    let mut half = vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    half.extend([7; 100]);
    // The same, told to be longer than a record may be.
    let mut long = half.clone();
    long.splice(3..5, [255, 255]);
    [
        (
            "noise",
            (0..4096_u32)
                .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
                .collect(),
        ),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: web\r\n\r\n".to_vec()),
        ("zeroes", vec![0; 16 * 1024]),
        ("half a ClientHello", half),
        ("a record that is too long", long),
    ]
}

/// Fails if the other side has not ended the connection.
fn ended(mut stream: TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(SOON))?;
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            // An alert.
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => bail!("a stranger's connection lives: {error}"),
        }
    }
}

fn tunnel(node: &Node) -> SocketAddr {
    (node.address(), 15_443).into()
}

fn files(node: &Node) -> Result<f64> {
    node.metric("process_open_fds", &[])
}

fn memory(node: &Node) -> Result<f64> {
    node.metric("process_resident_memory_bytes", &[])
}
