//! Real programs as services: each runs in a workload and is ready when its function returns.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    program::{Program, Running, user},
    programs,
    wait::{SOON, Stopwatch, pause},
    workload::Workload,
};

/// A service that runs; ended with all its processes when dropped.
#[derive(Debug)]
pub struct Service {
    running: Running,
    workload: Workload,
    log: PathBuf,
    /// What it is, for people: `nginx`, `Redis`.
    pub what: &'static str,
}

impl Service {
    fn start(
        what: &'static str,
        workload: &Workload,
        address: SocketAddr,
        program: &Program,
    ) -> Result<Self> {
        let log = workload.directory().join(format!("{what}.log"));
        let mut service = Self {
            running: program.clone().log(&log).spawn()?,
            workload: workload.clone(),
            log,
            what,
        };
        service.wait_until_it_listens(address)?;
        Ok(service)
    }

    /// What it has said.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn wait_until_it_listens(&mut self, address: SocketAddr) -> Result<()> {
        let clock = Stopwatch::start();
        loop {
            if let Some(status) = self.running.ended()? {
                bail!("{} ended with {status}: {}", self.what, self.said());
            }
            if self.listens(address)? {
                return Ok(());
            }
            if clock.elapsed() > SOON {
                bail!(
                    "{} does not listen at {address}: {}",
                    self.what,
                    self.said()
                );
            }
            pause(Duration::from_millis(20));
        }
    }

    /// Programs of ours say so; the others are found out by connecting.
    fn listens(&self, address: SocketAddr) -> Result<bool> {
        if self.what == PEER {
            return Ok(self.said().contains("listening on"));
        }
        self.workload
            .namespace()
            .run(move || Ok(TcpStream::connect(address).is_ok()))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.running.kill();
        // Children of daemons; what resists is left to the run's end.
        let _killed = self.workload.cgroup().kill();
    }
}

/// A `sidestep-peer` server.
const PEER: &str = "sidestep-peer";

/// `sidestep-peer MODE ADDRESS ARGUMENTS`.
///
/// # Errors
/// If it does not start.
pub fn peer(
    workload: &Workload,
    mode: &str,
    address: SocketAddr,
    arguments: &str,
) -> Result<Service> {
    let program = workload.peer(&format!("{mode} {address} {arguments}"))?;
    Service::start(PEER, workload, address, &program)
}

/// A web server that answers `GET /` with `text`: nginx if present, or Python's.
///
/// # Errors
/// If neither is there, or does not start.
pub fn http(workload: &Workload, address: SocketAddr, text: &str) -> Result<Service> {
    if programs::find("nginx").is_some() {
        nginx(workload, address, text)
    } else {
        python(workload, address, text)
    }
}

/// nginx: answers `GET /` with `text` and serves the files of the workload's directory `files`.
///
/// # Errors
/// If it is not there, or does not start.
pub fn nginx(workload: &Workload, address: SocketAddr, text: &str) -> Result<Service> {
    nginx_by(workload, address, text, "access_log off;", "")
}

/// The same over TLS, with `certificate`.pem and its key, `certificate`-key.pem. Requests are in `requests.log` of the
/// workload's directory.
///
/// # Errors
/// As [`nginx`].
pub fn nginx_tls(
    workload: &Workload,
    address: SocketAddr,
    text: &str,
    certificate: &Path,
) -> Result<Service> {
    let place = certificate.with_extension("");
    let tls = format!(
        "ssl_certificate {place}.pem; ssl_certificate_key {place}-key.pem; access_log {directory}/requests.log;",
        place = place.display(),
        directory = workload.directory().display(),
    );
    nginx_by(workload, address, text, &tls, "ssl")
}

fn nginx_by(
    workload: &Workload,
    address: SocketAddr,
    text: &str,
    settings: &str,
    kind: &str,
) -> Result<Service> {
    let directory = workload.directory().display();
    let configuration = workload.directory().join("nginx.conf");
    fs::write(
        &configuration,
        format!(
            "\
daemon off;
user root;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    {settings}
    server {{
        listen {address} {kind};
        location = / {{ return 200 \"{text}\\n\"; }}
        location /files/ {{ root {directory}; }}
    }}
}}
"
        ),
    )?;
    let program = workload
        .program("nginx")
        .args(["-e", "stderr", "-c"])
        .arg(&configuration);
    Service::start("nginx", workload, address, &program)
}

/// The web server of Python's standard library.
fn python(workload: &Workload, address: SocketAddr, text: &str) -> Result<Service> {
    const SCRIPT: &str = "\
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (sys.argv[3] + '\\n').encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Answer).serve_forever()
";
    let program = workload.program("python3").args([
        "-c",
        SCRIPT,
        &address.ip().to_string(),
        &address.port().to_string(),
        text,
    ]);
    Service::start("python3", workload, address, &program)
}

/// Redis, without files.
///
/// # Errors
/// If it is not there, or does not start.
pub fn redis(workload: &Workload, address: SocketAddr) -> Result<Service> {
    let program = workload
        .program("redis-server")
        .args(["--bind", &address.ip().to_string()])
        .args(["--port", &address.port().to_string()])
        .args(["--save", "", "--appendonly", "no", "--protected-mode", "no"]);
    Service::start("redis-server", workload, address, &program)
}

/// The user, database and password of [`postgres`].
pub const POSTGRES_USER: &str = "mesh";
/// See [`POSTGRES_USER`].
pub const POSTGRES_PASSWORD: &str = "between the nodes";

/// `PostgreSQL` with a fresh database that wants a password (SCRAM).
///
/// # Errors
/// If it is not there, or does not start.
pub fn postgres(workload: &Workload, address: SocketAddr) -> Result<Service> {
    // It refuses to run as root.
    let (uid, gid) = user("postgres").or_else(|_absent| user("nobody"))?;
    let directory = workload.directory();
    chown(directory, Some(uid), Some(gid))?;
    let password = directory.join("password");
    fs::write(&password, POSTGRES_PASSWORD)?;
    let data = directory.join("data");
    workload
        .program(postgres_program("initdb")?)
        .args(["--auth", "scram-sha-256", "--username", POSTGRES_USER])
        .args(["--no-sync", "--encoding", "UTF8", "--locale", "C"])
        .arg("--pwfile")
        .arg(&password)
        .arg("--pgdata")
        .arg(&data)
        .as_user(uid, gid)
        .run(Duration::from_mins(2))
        .context("making a database")?;
    let program = workload
        .program(postgres_program("postgres")?)
        .arg("-D")
        .arg(&data)
        .args(["-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string()])
        .arg("-k")
        .arg(directory)
        .args(["-c", "fsync=off", "-c", "max_connections=50"])
        .as_user(uid, gid);
    Service::start("postgres", workload, address, &program)
}

/// Debian keeps them in a directory for each version, out of `PATH`.
///
/// # Errors
/// If it is not there.
pub fn postgres_program(name: &str) -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut found: Vec<PathBuf> = versions
        .flatten()
        .map(|version| version.path().join("bin").join(name))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found
        .pop()
        .or_else(|| programs::find(name))
        .with_context(|| format!("there is no program {name}: install postgresql"))
}

/// Whether `program` is on this machine, to be asked before a service that is optional.
pub fn present(program: &str) -> bool {
    programs::find(program).is_some() || Path::new(program).is_file()
}
