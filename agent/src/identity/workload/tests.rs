//! Tests of the resolver and its rules.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::*;
use crate::config::WorkloadRule;

const HOST: NetnsCookie = NetnsCookie(1);
const CONTAINER: NetnsCookie = NetnsCookie(77);

fn rule(service: &str, rule: WorkloadRule) -> WorkloadConfig {
    WorkloadConfig {
        service: service.parse().unwrap(),
        rule,
        instance: None,
    }
}

fn cgroup(service: &str, path: &str) -> WorkloadConfig {
    rule(service, WorkloadRule::Cgroup(path.into()))
}

fn unit(service: &str, name: &str) -> WorkloadConfig {
    rule(service, WorkloadRule::Unit(name.into()))
}

fn maker(cgroup: u64, netns: NetnsCookie, uid: u32) -> Maker {
    Maker {
        cgroup: CgroupId(cgroup),
        netns,
        uid,
        process: 4711,
    }
}

/// What a process in `path` resolves to.
fn resolve(rules: &[WorkloadConfig], path: &str, uid: u32) -> Option<String> {
    let path = PathBuf::from(path);
    let resolver = WorkloadResolver::new(rules, move |_| Some(path.clone())).unwrap();
    let service = resolver.resolve(&maker(5, HOST, uid)).ok()?;
    Some(service.to_string())
}

#[track_caller]
fn check(rules: &[WorkloadConfig], path: &str, expected: Option<&str>) {
    assert_eq!(resolve(rules, path, 0).as_deref(), expected, "{path}");
}

#[test]
fn the_most_specific_cgroup_wins_and_children_belong_to_it() {
    let rules = [
        cgroup("outer", "/a"),
        cgroup("inner", "a/b/"),
        cgroup("other", "/x"),
    ];
    check(&rules, "/a", Some("outer"));
    check(&rules, "/a/c", Some("outer"));
    check(&rules, "/a/b", Some("inner"));
    check(&rules, "/a/b/c/d", Some("inner"));
    check(&rules, "/ab", None);
    check(&rules, "/", None);
}

#[test]
fn units_match_only_below_slices() {
    let rules = [
        unit("web", "web"),
        unit("job", "job@1.service"),
        unit("all", "apps.slice"),
    ];
    check(&rules, "/system.slice/web.service", Some("web"));
    check(&rules, "/system.slice/web.service/worker", Some("web"));
    check(&rules, "/apps.slice/apps-a.slice/web.service", Some("web"));
    check(&rules, "/apps.slice/apps-a.slice/else.service", Some("all"));
    check(
        &rules,
        "/system.slice/system-job.slice/job@1.service",
        Some("job"),
    );
    check(&rules, "/system.slice/job@2.service", None);
    check(
        &rules,
        "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service",
        None,
    );
    check(&rules, "/system.slice/docker-1.scope/web.service", None);
    check(&rules, "/mine/web.service", None);
}

#[test]
fn a_name_of_any_bytes_leads_out_of_no_unit() {
    let rules = [
        unit("all", "apps.slice"),
        rule("user", WorkloadRule::User(0)),
    ];
    for below in [&b"caf\xe9"[..], b"caf\xe9.slice/x"] {
        let path = Path::new("/apps.slice").join(OsStr::from_bytes(below));
        let resolver = WorkloadResolver::new(&rules, move |_| Some(path.clone())).unwrap();
        let service = resolver.resolve(&maker(5, HOST, 0)).unwrap();
        assert_eq!(service.as_str(), "all");
    }
}

#[test]
fn the_deeper_of_cgroup_and_unit_wins() {
    let rules = [
        unit("unit", "web.service"),
        cgroup("slice", "/system.slice"),
        cgroup("worker", "/system.slice/web.service/worker"),
        cgroup("same", "/system.slice/db.service"),
        unit("db", "db.service"),
    ];
    check(&rules, "/system.slice/web.service", Some("unit"));
    check(&rules, "/system.slice/web.service/worker", Some("worker"));
    check(&rules, "/system.slice/other.service", Some("slice"));
    check(&rules, "/system.slice/db.service", Some("same"));
}

#[test]
fn the_user_counts_only_where_no_cgroup_does() {
    let rules = [cgroup("web", "/a"), rule("batch", WorkloadRule::User(1000))];
    assert_eq!(resolve(&rules, "/a", 1000).as_deref(), Some("web"));
    assert_eq!(resolve(&rules, "/b", 1000).as_deref(), Some("batch"));
    assert_eq!(resolve(&rules, "/b", 1001), None);
}

#[test]
fn an_enrolled_namespace_beats_everything() {
    let netns = Path::new("/run/netns/pod");
    let rules = [
        cgroup("web", "/a"),
        rule("pod", WorkloadRule::Netns(netns.to_owned())),
    ];
    let resolver = WorkloadResolver::new(&rules, |_| Some(PathBuf::from("/a"))).unwrap();
    let service = |netns| resolver.resolve(&maker(5, netns, 0)).unwrap().to_string();
    assert_eq!(
        resolver.namespaces(),
        [(netns.to_owned(), "pod".parse().unwrap())]
    );
    assert_eq!(service(CONTAINER), "web");
    assert!(!resolver.enrol_namespace(Path::new("/run/netns/else"), CONTAINER));
    assert!(resolver.enrol_namespace(netns, CONTAINER));
    assert_eq!(service(CONTAINER), "pod");
    assert_eq!(service(HOST), "web");
    resolver.dismiss_namespace(CONTAINER);
    assert_eq!(service(CONTAINER), "web");
    assert!(resolver.enrol_namespace(netns, CONTAINER));
    resolver.reload(&rules[..1]).unwrap();
    assert_eq!(service(CONTAINER), "web");
}

#[test]
fn answers_are_remembered_until_reload_and_failures_are_not() {
    let lookups = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&lookups);
    let resolver = WorkloadResolver::new(&[cgroup("web", "/a")], move |id: CgroupId| {
        counted.fetch_add(1, Ordering::Relaxed);
        (id == CgroupId(5)).then(|| PathBuf::from("/a"))
    })
    .unwrap();
    for _ in 0..3 {
        assert_eq!(
            resolver.resolve(&maker(5, HOST, 0)).unwrap().as_str(),
            "web"
        );
    }
    assert_eq!(lookups.load(Ordering::Relaxed), 1);
    for _ in 0..3 {
        let unknown = resolver.resolve(&maker(6, HOST, 3)).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "no [[workload]] names process 4711: cgroup 6 (gone or not visible), user 3, network namespace 1"
        );
    }
    assert_eq!(lookups.load(Ordering::Relaxed), 4);
    resolver.reload(&[cgroup("api", "/a")]).unwrap();
    assert_eq!(
        resolver.resolve(&maker(5, HOST, 0)).unwrap().as_str(),
        "api"
    );
}

#[test]
fn memory_of_cgroups_is_bounded() {
    let resolver = WorkloadResolver::new(&[cgroup("web", "/a")], |_| Some("/a/b".into())).unwrap();
    for id in 0..3 * REMEMBERED_CGROUPS as u64 {
        assert_eq!(
            resolver.resolve(&maker(id, HOST, 0)).unwrap().as_str(),
            "web"
        );
    }
    assert!(resolver.remembered.lock().len() <= REMEMBERED_CGROUPS);
}

#[test]
fn one_thing_for_two_services_is_a_conflict() {
    let conflict = WorkloadResolver::new(&[cgroup("a", "/x"), cgroup("b", "x")], |_| None);
    assert_eq!(
        conflict.unwrap_err().to_string(),
        "workload rule cgroup = \"/x\" is given for two services, a and b"
    );
    let same = WorkloadResolver::new(&[unit("a", "x"), unit("a", "x.service")], |_| None);
    same.unwrap();
}

/// The cgroups `/a`, `/a/b`, `/a/b/c` and `/x` with the ids 1, 2, 3 and 9; `/a/b` again as 5 once it was made anew.
fn tree(made_anew: &Arc<std::sync::atomic::AtomicBool>) -> impl CgroupPaths + use<> {
    let made_anew = Arc::clone(made_anew);
    move |id: CgroupId| {
        let anew = made_anew.load(Ordering::Relaxed);
        let path = match id.0 {
            1 => "/a",
            2 if !anew => "/a/b",
            3 if !anew => "/a/b/c",
            5 if anew => "/a/b",
            6 if anew => "/a/b/c",
            9 => "/x",
            _ => return None,
        };
        Some(PathBuf::from(path))
    }
}

fn assigned(assignments: &[(u64, &str, &str)]) -> Assignments {
    let each = assignments.iter().map(|(id, path, service)| {
        let assignment = discovered::Assignment {
            path: path.into(),
            service: service.parse().unwrap(),
        };
        (CgroupId(*id), assignment)
    });
    each.collect()
}

#[test]
fn what_was_discovered_counts_where_no_rule_does() {
    let made_anew = Arc::default();
    let rules = [
        cgroup("ruled", "/x"),
        rule("batch", WorkloadRule::User(1000)),
    ];
    let resolver = WorkloadResolver::new(&rules, tree(&made_anew)).unwrap();
    let service = |cgroup, uid| {
        let resolved = resolver.resolve(&maker(cgroup, HOST, uid));
        resolved.map(|service| service.to_string()).ok()
    };
    let is = |name: &str| Some(name.to_owned());
    assert_eq!(service(2, 0), None);
    resolver.discover(&assigned(&[(2, "/a/b", "found"), (9, "/x", "weaker")]));
    for _remembered in 0..2 {
        assert_eq!(service(2, 0), is("found"));
        assert_eq!(service(3, 0), is("found"), "what is below belongs to it");
        assert_eq!(service(1, 0), None, "what is above does not");
        assert_eq!(service(9, 0), is("ruled"));
        assert_eq!(service(2, 1000), is("batch"), "any rule is stronger");
    }
    resolver.discover(&assigned(&[(2, "/a/b", "found"), (3, "/a/b/c", "inner")]));
    assert_eq!(service(3, 0), is("inner"), "the nearest");
    resolver.discover(&assigned(&[(3, "/a/b/c", "inner")]));
    assert_eq!(service(2, 0), None);
    resolver.discover(&Assignments::new());
    assert_eq!(service(3, 0), None);
}

#[test]
fn a_cgroup_made_anew_is_nobody_until_it_is_found() {
    let made_anew = Arc::<std::sync::atomic::AtomicBool>::default();
    let resolver = WorkloadResolver::new(&[], tree(&made_anew)).unwrap();
    resolver.discover(&assigned(&[(2, "/a/b", "found")]));
    resolver.resolve(&maker(3, HOST, 0)).unwrap();
    made_anew.store(true, Ordering::Relaxed);
    for cgroup in [5, 6] {
        resolver.resolve(&maker(cgroup, HOST, 0)).unwrap_err();
    }
    resolver.discover(&assigned(&[(5, "/a/b", "other")]));
    for cgroup in [5, 6] {
        let service = resolver.resolve(&maker(cgroup, HOST, 0)).unwrap();
        assert_eq!(service.as_str(), "other");
    }
}
