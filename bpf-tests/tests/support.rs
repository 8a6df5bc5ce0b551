//! The support itself: what it makes exists, isolates, and goes.

#![expect(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use std::{fs, net::IpAddr, path::Path, time::Duration};

use bpf_tests::{
    cgroup,
    namespace::Namespace,
    program::Program,
    programs, scratch,
    scratch::Scratch,
    wait::{SOON, wait_for},
};

#[test]
fn a_program_runs_in_its_cgroup_and_namespace() {
    let scratch = Scratch::new("place").unwrap();
    let cgroup = scratch.cgroup().child("a").unwrap();
    let namespace = Namespace::create(&scratch, "a").unwrap();
    let seen = Program::new("sh")
        .args([
            "-c",
            "grep ^0:: /proc/self/cgroup; readlink /proc/self/ns/net; id -u; cat",
        ])
        .in_cgroup(&cgroup)
        .in_namespace(&namespace)
        .as_user(65534, 65534)
        .input("said")
        .run(SOON)
        .unwrap();
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(lines[0], format!("0::{}", cgroup.path()));
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(Path::new(lines[1]), ours);
    assert_eq!(&lines[2..], ["65534", "said"]);
}

#[test]
fn joined_namespaces_reach_each_other_and_nothing_else() {
    let scratch = Scratch::new("join").unwrap();
    let [a, b] = ["a", "b"].map(|name| Namespace::create(&scratch, name).unwrap());
    a.join("mesh0", &b, "mesh0").unwrap();
    let addresses: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().unwrap());
    let addresses6: [IpAddr; 2] = ["2001:db8::1", "2001:db8::2"].map(|text| text.parse().unwrap());
    for (index, namespace) in [&a, &b].into_iter().enumerate() {
        namespace.add_address("mesh0", addresses[index]).unwrap();
        namespace.add_address("mesh0", addresses6[index]).unwrap();
    }
    for target in ["192.0.2.2:7", "[2001:db8::2]:7"] {
        let log = scratch.directory().join("echo");
        let echo = Program::new(programs::peer().unwrap())
            .args(["echo", target])
            .in_namespace(&b)
            .in_cgroup(scratch.cgroup())
            .log(&log)
            .spawn()
            .unwrap();
        wait_for("the echo server", SOON, || {
            fs::read_to_string(&log).is_ok_and(|said| said.contains(target))
        })
        .unwrap();
        let live = Program::new(programs::peer().unwrap())
            .args(["cycle", target, "1", "0"])
            .in_namespace(&a);
        live.run(SOON).unwrap();
        drop(echo);
    }
    let out = Program::new(programs::peer().unwrap())
        .args(["read", "198.51.100.1:80"])
        .in_namespace(&a)
        .run(SOON)
        .unwrap();
    assert!(out.contains("ENETUNREACH"), "{out}");
}

#[test]
fn nothing_is_left_when_a_run_ends() {
    let scratch = Scratch::new("end").unwrap();
    let name = scratch.name().to_owned();
    let (directory, cgroup) = (
        scratch.directory().to_owned(),
        scratch.cgroup().directory().to_owned(),
    );
    let _namespace = Namespace::create(&scratch, "a").unwrap();
    let mut sleeper = Program::new("sh")
        .args(["-c", "sleep 600 & sleep 600"])
        .in_cgroup(&scratch.cgroup().child("deep").unwrap())
        .spawn()
        .unwrap();
    drop(scratch);
    assert!(!directory.exists() && !cgroup.exists());
    assert!(!scratch::runs().unwrap().contains(&name));
    assert!(sleeper.wait(Duration::ZERO).unwrap().is_some());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&name));
}

#[test]
fn the_janitor_cleans_up_after_a_process_that_was_killed() {
    let runs = scratch::runs().unwrap();
    let mut own = Program::new(programs::peer().unwrap())
        .arg("scratch")
        .spawn()
        .unwrap();
    let mut run = String::new();
    wait_for("the other process's run", SOON, || {
        let prefix = format!("sidestep-killed-{}-", own.id());
        let found = scratch::runs()
            .unwrap_or_default()
            .into_iter()
            .find(|run| run.starts_with(&prefix));
        run = found.unwrap_or_default();
        let inside = cgroup::mount().unwrap().join(&run).join("cgroup.events");
        !run.is_empty()
            && !runs.contains(&run)
            && fs::read_to_string(inside).is_ok_and(|events| events.contains("populated 1"))
    })
    .unwrap();
    own.kill();
    wait_for("the janitor to clean up", SOON, || {
        !scratch::runs().unwrap().contains(&run) && !cgroup::mount().unwrap().join(&run).exists()
    })
    .unwrap();
}

#[test]
fn a_program_that_does_not_end_is_killed() {
    let error = Program::new("sleep")
        .arg("600")
        .output(Duration::from_millis(50))
        .unwrap_err();
    assert!(error.to_string().contains("did not end"), "{error:#}");
}
