//! A program that runs beside the mesh and is ready when it listens.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, bail};

use crate::{
    namespace::Namespace,
    program::{Program, Running},
    wait::{SOON, Stopwatch, pause},
};

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    what: String,
    running: Running,
    log: PathBuf,
}

impl Daemon {
    /// Starts `program`, which is `what` for people and says what it says to `log`, and waits until it listens at all
    /// of `addresses` of `namespace`.
    ///
    /// # Errors
    /// If it ends or does not listen; with what it said.
    pub fn start(
        what: &str,
        program: &Program,
        log: &Path,
        namespace: &Namespace,
        addresses: &[SocketAddr],
    ) -> Result<Self> {
        let mut daemon = Self {
            what: what.to_owned(),
            running: program.clone().log(log).spawn()?,
            log: log.to_owned(),
        };
        for address in addresses {
            daemon.wait_until_it_listens(namespace, *address)?;
        }
        Ok(daemon)
    }

    /// What it has said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// It, as a program that runs.
    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    fn wait_until_it_listens(&mut self, namespace: &Namespace, address: SocketAddr) -> Result<()> {
        let clock = Stopwatch::start();
        loop {
            if let Some(status) = self.running.ended()? {
                bail!("{} ended with {status}: {}", self.what, self.said());
            }
            if namespace.run(move || Ok(TcpStream::connect(address).is_ok()))? {
                return Ok(());
            }
            if clock.elapsed() > SOON {
                let said = self.said();
                bail!("{} does not listen at {address}: {said}", self.what);
            }
            pause(Duration::from_millis(20));
        }
    }
}
