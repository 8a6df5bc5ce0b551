//! A port of this machine that leads into a namespace: for a person with a browser.

use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result};

use crate::namespace::Namespace;

/// Takes connections at a free port of this machine's loopback, as long as the process lives, and passes them on to
/// `target` in `namespace`. Returns where.
///
/// # Errors
/// If there is no port.
pub fn forward(namespace: &Namespace, target: SocketAddr) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let address = listener.local_addr()?;
    let namespace = namespace.clone();
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // Who comes while nobody listens in there is told by the end of the connection.
            let far = namespace.run(move || Ok(TcpStream::connect(target)?));
            if let Ok(far) = far {
                join(&near, &far);
            }
        }
    });
    Ok(address)
}

/// Copies both ways in threads of their own.
fn join(near: &TcpStream, far: &TcpStream) {
    for (from, to) in [(near, far), (far, near)] {
        if let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) {
            thread::spawn(move || {
                // An end by error and one in order are the same to a browser.
                let _copied = io::copy(&mut from, &mut to);
                let _ended = to.shutdown(Shutdown::Write);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn a_connection_leads_into_the_namespace_and_back() -> Result<()> {
        let scratch = Scratch::new("forward")?;
        let namespace = Namespace::create(&scratch, "inside")?;
        let inside: SocketAddr = (Ipv4Addr::LOCALHOST, 80).into();
        let listener = namespace.run(move || Ok(TcpListener::bind(inside)?))?;
        let mut client = TcpStream::connect(forward(&namespace, inside)?)?;
        let (mut server, _peer) = listener.accept()?;
        client.write_all(b"question")?;
        client.shutdown(Shutdown::Write)?;
        let mut said = String::new();
        server.read_to_string(&mut said)?;
        server.write_all(b"answer")?;
        drop(server);
        client.read_to_string(&mut said)?;
        assert_eq!(said, "questionanswer");
        Ok(())
    }
}
