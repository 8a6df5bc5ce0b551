//! Starting a program in a given cgroup and network namespace, as a given user, and never losing it.

#![expect(
    unsafe_code,
    reason = "a child joins its cgroup and namespace between fork and exec"
)]

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Seek as _, SeekFrom, Write as _},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{
        Gid, Pid, PidfdFlags, Resource, Rlimit, Signal, Uid, getrlimit, kill_process, pidfd_open,
        prlimit, setrlimit,
    },
    thread::{
        LinkNameSpaceType, move_into_link_name_space, set_thread_gid, set_thread_groups,
        set_thread_uid,
    },
};

use crate::{cgroup::Cgroup, namespace::Namespace, programs, wait::SOON};

/// A program to be started, and where.
#[derive(Debug, Clone)]
pub struct Program {
    name: OsString,
    arguments: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    directory: Option<PathBuf>,
    cgroup: Option<Cgroup>,
    namespace: Option<Namespace>,
    user: Option<(u32, u32)>,
    input: Vec<u8>,
    log: Option<PathBuf>,
}

impl Program {
    /// The program `name`, searched in `PATH` and the places of daemons.
    pub fn new(name: impl AsRef<OsStr>) -> Self {
        Self {
            name: name.as_ref().to_owned(),
            arguments: vec![],
            variables: vec![],
            directory: None,
            cgroup: None,
            namespace: None,
            user: None,
            input: vec![],
            log: None,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        for argument in arguments {
            self = self.arg(argument);
        }
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.variables
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn in_directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }

    /// Runs it in `cgroup`.
    #[must_use]
    pub fn in_cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.clone());
        self
    }

    /// Runs it in `namespace`.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &Namespace) -> Self {
        self.namespace = Some(namespace.clone());
        self
    }

    /// Runs it with these user and group ids.
    #[must_use]
    pub fn as_user(mut self, user: u32, group: u32) -> Self {
        self.user = Some((user, group));
        self
    }

    /// What it reads on standard input; nothing otherwise.
    #[must_use]
    pub fn input(mut self, input: impl AsRef<[u8]>) -> Self {
        input.as_ref().clone_into(&mut self.input);
        self
    }

    /// Where a [`Self::spawn`]ed program writes what it says; discarded otherwise.
    #[must_use]
    pub fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    /// Starts it and returns at once.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self) -> Result<Running> {
        let (output, errors) = match &self.log {
            Some(path) => {
                let file = File::options()
                    .create(true)
                    .append(true)
                    .open(path)
                    .with_context(|| format!("opening {}", path.display()))?;
                (file.try_clone()?.into(), file.into())
            }
            None => (Stdio::null(), Stdio::null()),
        };
        self.start(output, errors)
    }

    /// Runs it to its end and returns what it said, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started or has not ended after `deadline`; it is killed then.
    pub fn output(&self, deadline: Duration) -> Result<Output> {
        let (mut output, mut errors) = (anonymous_file()?, anonymous_file()?);
        let mut running = self.start(output.try_clone()?.into(), errors.try_clone()?.into())?;
        let ended = running.wait(deadline)?;
        let output = Output {
            status: ended,
            stdout: contents(&mut output)?,
            stderr: contents(&mut errors)?,
        };
        match output.status {
            Some(_) => Ok(output),
            None => bail!(
                "{} did not end within {deadline:?}; it said: {}",
                self.line(),
                output.stderr
            ),
        }
    }

    /// Like [`Self::output`], and it must succeed. Returns its standard output.
    ///
    /// # Errors
    /// Also if its exit code is not 0.
    pub fn run(&self, deadline: Duration) -> Result<String> {
        let output = self.output(deadline)?;
        if !output.succeeded() {
            bail!(
                "{} failed with {}: {}{}",
                self.line(),
                output.code_text(),
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// The command line, for people.
    pub fn line(&self) -> String {
        let mut line = self.name.to_string_lossy().into_owned();
        for argument in &self.arguments {
            line.push(' ');
            line.push_str(&argument.to_string_lossy());
        }
        line
    }

    fn start(&self, output: Stdio, errors: Stdio) -> Result<Running> {
        let mut command = self.command()?;
        let mut input = anonymous_file()?;
        input.write_all(&self.input)?;
        input.seek(SeekFrom::Start(0))?;
        let child = command
            .stdin(input)
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("starting {}", self.line()))?;
        Ok(Running {
            child,
            name: self.name.to_string_lossy().into_owned(),
        })
    }

    fn command(&self) -> Result<Command> {
        let program = programs::find(&self.name.to_string_lossy())
            .with_context(|| format!("there is no program {}", self.name.to_string_lossy()))?;
        let mut command = Command::new(program);
        command
            .args(&self.arguments)
            .envs(self.variables.iter().cloned())
            // Proxies of the caller's own environment have no business here.
            .env_remove("http_proxy")
            .env_remove("HTTP_PROXY")
            .env_remove("https_proxy")
            .env_remove("HTTPS_PROXY")
            .env_remove("all_proxy")
            .env_remove("ALL_PROXY")
            .current_dir(self.directory.as_deref().unwrap_or(Path::new("/")));
        let placement = Placement {
            entrance: self.cgroup.as_ref().map(Cgroup::entrance).transpose()?,
            namespace: self.namespace.clone(),
            user: self.user,
        };
        // SAFETY: `Placement::take` only makes system calls on values that it holds: it neither allocates
        // nor takes a lock, so it may run in the child of a process with threads.
        unsafe { command.pre_exec(move || placement.take()) };
        Ok(command)
    }
}

/// Everything that the child needs, opened before the fork.
struct Placement {
    entrance: Option<OwnedFd>,
    namespace: Option<Namespace>,
    user: Option<(u32, u32)>,
}

impl Placement {
    fn take(&self) -> io::Result<()> {
        if let Some(entrance) = &self.entrance {
            rustix::io::write(entrance, b"0")?;
        }
        if let Some(namespace) = &self.namespace {
            move_into_link_name_space(namespace.handle(), Some(LinkNameSpaceType::Network))?;
        }
        raise_open_files()?;
        if let Some((user, group)) = self.user {
            set_thread_groups(&[])?;
            set_thread_gid(Gid::from_raw(group))?;
            set_thread_uid(Uid::from_raw(user))?;
        }
        Ok(())
    }
}

/// Two agents and their clients hold tens of thousands of connections here, each more than one file.
const OPEN_FILES: u64 = 400_000;

/// Raises the limit as far as this process may: to what is needed if it may go beyond its hard limit.
fn raise_open_files() -> io::Result<()> {
    let hard = getrlimit(Resource::Nofile).maximum;
    let limits = |limit| Rlimit {
        current: limit,
        maximum: limit,
    };
    let wanted = hard.map(|hard| hard.max(OPEN_FILES));
    Ok(setrlimit(Resource::Nofile, limits(wanted))
        .or_else(|_refused| setrlimit(Resource::Nofile, limits(hard)))?)
}

/// How many files a program started here may open.
pub fn open_files_limit() -> u64 {
    let asked = Program::new("sh").args(["-c", "ulimit -n"]).run(SOON);
    let limit = asked.ok().and_then(|said| said.trim().parse().ok());
    limit.unwrap_or(OPEN_FILES)
}

/// What a program said.
#[derive(Debug, Clone)]
pub struct Output {
    status: Option<ExitStatus>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Whether its exit code was 0.
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }

    /// Its exit code; `None` if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status?.code()
    }

    /// How it ended, for people.
    pub fn code_text(&self) -> String {
        match self.status {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "no exit code".to_owned(),
            },
            None => "no exit code".to_owned(),
        }
    }
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If it has been reaped by somebody else.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("waiting for {}", self.name))
    }

    /// Waits up to `deadline` for its end.
    ///
    /// # Errors
    /// If it has been reaped by somebody else.
    pub fn wait(&mut self, deadline: Duration) -> Result<Option<ExitStatus>> {
        let handle = pidfd_open(self.pid()?, PidfdFlags::empty())
            .with_context(|| format!("opening the process of {}", self.name))?;
        let deadline = Timespec::try_from(deadline).context("a deadline too far away")?;
        // A signal that interrupts the wait is one that ends us.
        poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&deadline))
            .with_context(|| format!("waiting for {}", self.name))?;
        self.ended()
    }

    /// Sets how many files it may open, at most [`open_files_limit`].
    ///
    /// # Errors
    /// If it has ended.
    pub fn limit_open_files(&self, limit: u64) -> Result<()> {
        let limits = Rlimit {
            current: Some(limit),
            maximum: Some(open_files_limit()),
        };
        prlimit(Some(self.pid()?), Resource::Nofile, limits)
            .with_context(|| format!("limiting the open files of {}", self.name))?;
        Ok(())
    }

    /// Sends it `signal`.
    ///
    /// # Errors
    /// If it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal)
            .with_context(|| format!("sending {signal:?} to {}", self.name))
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        // Both fail only if it has ended and been reaped.
        if self.child.kill().is_ok() {
            let _ended = self.child.wait();
        }
    }

    fn pid(&self) -> Result<Pid> {
        i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .with_context(|| format!("{} has no process id", self.name))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn anonymous_file() -> Result<File> {
    let file = rustix::fs::memfd_create("program", rustix::fs::MemfdFlags::CLOEXEC)
        .context("creating a file in memory")?;
    Ok(file.into())
}

fn contents(file: &mut File) -> Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = vec![];
    io::Read::read_to_end(file, &mut bytes).context("reading what a program said")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The user and group id of a user of this machine.
///
/// # Errors
/// If there is no such user.
pub fn user(name: &str) -> Result<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    users
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then_some(())?;
            let mut numbers = fields.skip(1).map_while(|field| field.parse().ok());
            Some((numbers.next()?, numbers.next()?))
        })
        .with_context(|| format!("there is no user {name}"))
}
