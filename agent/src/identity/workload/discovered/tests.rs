//! Tables: sockets and registrations in, services by cgroup out.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::*;

/// The cgroups of a node, by id.
#[derive(Default)]
struct Tree(Mutex<BTreeMap<u64, PathBuf>>);

impl Tree {
    fn of(paths: &[(u64, &str)]) -> Self {
        let paths = paths.iter().map(|(id, path)| (*id, PathBuf::from(path)));
        Self(Mutex::new(paths.collect()))
    }

    fn remove(&self, id: u64) {
        self.0.lock().remove(&id);
    }
}

impl CgroupPaths for Tree {
    fn path_of(&self, cgroup: CgroupId) -> Option<PathBuf> {
        self.0.lock().get(&cgroup.0).cloned()
    }
}

fn registered(service: &str, address: &str) -> RegisteredService {
    RegisteredService {
        instance: format!("{service}-1").parse().unwrap(),
        service: service.parse().unwrap(),
        address: address.parse().unwrap(),
    }
}

fn listener(address: &str, cgroup: u64) -> (SocketAddr, SocketOwner) {
    let owner = SocketOwner {
        uid: 0,
        cgroup: CgroupId(cgroup),
        inode: 1,
        cookie: 1,
    };
    (address.parse().unwrap(), owner)
}

fn bounds() -> Bounds {
    let attach_points = [
        "apps.slice".into(),
        "/system.slice/deep.slice/".into(),
        "/apps.slice/group.slice/inner.slice".into(),
    ];
    let [agent, init] = [
        "/apps.slice/sidestep.service/main",
        "/apps.slice/init.scope",
    ];
    Bounds::new(&attach_points, Path::new(agent), Some(Path::new(init)))
}

#[test]
fn the_socket_that_the_kernel_would_choose_is_found() {
    // Registered address; sockets with the cgroups that hold them; what is dialled and whose it is.
    type Case = (
        &'static str,
        &'static [(&'static str, u64)],
        Option<(&'static str, u64)>,
    );
    let cases: &[Case] = &[
        (
            "192.0.2.1:80",
            &[("192.0.2.1:80", 1)],
            Some(("192.0.2.1:80", 1)),
        ),
        (
            "192.0.2.1:80",
            &[("0.0.0.0:80", 1)],
            Some(("192.0.2.1:80", 1)),
        ),
        ("192.0.2.1:80", &[("[::]:80", 1)], Some(("192.0.2.1:80", 1))),
        (
            "192.0.2.1:80",
            &[("[::ffff:192.0.2.1]:80", 1)],
            Some(("192.0.2.1:80", 1)),
        ),
        // The closer one, in whatever order.
        (
            "192.0.2.1:80",
            &[("[::]:80", 3), ("0.0.0.0:80", 2), ("192.0.2.1:80", 1)],
            Some(("192.0.2.1:80", 1)),
        ),
        (
            "192.0.2.1:80",
            &[("[::]:80", 3), ("0.0.0.0:80", 2)],
            Some(("192.0.2.1:80", 2)),
        ),
        // Only on loopback, as behind a sidecar; but not if something is at the registered address.
        (
            "192.0.2.1:80",
            &[("127.0.0.1:80", 1)],
            Some(("127.0.0.1:80", 1)),
        ),
        ("192.0.2.1:80", &[("[::1]:80", 1)], Some(("[::1]:80", 1))),
        (
            "192.0.2.1:80",
            &[("127.0.0.1:80", 1), ("192.0.2.1:80", 2)],
            Some(("192.0.2.1:80", 2)),
        ),
        (
            "[2001:db8::1]:80",
            &[("[2001:db8::1]:80", 1)],
            Some(("[2001:db8::1]:80", 1)),
        ),
        (
            "[2001:db8::1]:80",
            &[("[::]:80", 1)],
            Some(("[2001:db8::1]:80", 1)),
        ),
        // IPv6 is not taken by an IPv4 socket.
        (
            "[2001:db8::1]:80",
            &[("0.0.0.0:80", 1)],
            Some(("127.0.0.1:80", 1)),
        ),
        (
            "192.0.2.1:80",
            &[
                ("192.0.2.1:81", 1),
                ("192.0.2.2:80", 1),
                ("127.0.0.2:80", 1),
            ],
            None,
        ),
        ("192.0.2.1:80", &[], None),
    ];
    for (address, sockets, expected) in cases {
        let sockets: Vec<_> = sockets
            .iter()
            .map(|(at, cgroup)| listener(at, *cgroup))
            .collect();
        let services = [registered("web", address)];
        let found = locate(&services, &sockets);
        let found = found.get(&services[0].instance);
        let expected = expected.map(|(local, cgroup)| Located {
            local: local.parse().unwrap(),
            cgroups: [CgroupId(cgroup)].into(),
        });
        assert_eq!(found, expected.as_ref(), "{address} {sockets:?}");
    }
}

/// What comes of `services` and `listeners` when nothing held before.
fn assigned(
    tree: &Tree,
    services: &[RegisteredService],
    listeners: &[(SocketAddr, SocketOwner)],
) -> (Vec<(u64, String)>, Vec<String>) {
    let located = locate(services, listeners);
    let (assigned, refused) = assign(services, &located, tree, &bounds(), &Assignments::new());
    let assigned = assigned.iter().map(|(id, a)| (id.0, a.service.to_string()));
    let refused = refused.iter().map(Refusal::to_string);
    (assigned.collect(), refused.collect())
}

#[test]
fn each_cgroup_with_one_service_below_an_attach_point_is_assigned() {
    let tree = Tree::of(&[
        (1, "/apps.slice/web.service"),
        (2, "/system.slice/deep.slice/db.service/main"),
        (3, "/apps.slice/second.service"),
    ]);
    let mut other_web = registered("web", "192.0.2.1:81");
    other_web.instance = "web-2".parse().unwrap();
    let services = [
        registered("web", "192.0.2.1:80"),
        other_web,
        registered("db", "192.0.2.1:5432"),
        registered("down", "192.0.2.1:9"),
    ];
    let listeners = [
        listener("0.0.0.0:80", 1),
        // Two instances in one cgroup are one service; one instance may be in two.
        listener("0.0.0.0:81", 1),
        listener("0.0.0.0:81", 3),
        listener("127.0.0.1:5432", 2),
        listener("127.0.0.1:7", 3),
    ];
    let (assigned, refused) = assigned(&tree, &services, &listeners);
    assert!(refused.is_empty(), "{refused:?}");
    let expected = [(1, "web"), (2, "db"), (3, "web")].map(|(id, name)| (id, name.to_owned()));
    assert_eq!(assigned, expected);
}

#[test]
fn what_is_not_clear_is_refused() {
    let tree = Tree::of(&[
        (1, "/"),
        (2, "/apps.slice"),
        (3, "/system.slice"),
        (4, "/system.slice/other.service"),
        (5, "/apps.slice/sidestep.service"),
        (6, "/apps.slice/sidestep.service/main"),
        (7, "/apps.slice/init.scope"),
        (8, "/apps.slice/both.service"),
        (10, "/apps.slice/group.slice"),
        (11, "/apps.slice/group.slice/inner.slice"),
        (12, "/apps.slice/apps-team.slice"),
    ]);
    let outside = |path: &str| {
        format!(
            "web listens in {path}, which is not below one of capture.cgroups, or holds one: give it a cgroup of its own there"
        )
    };
    let agent = |path: &str| format!("web listens in {path}, where the agent itself runs");
    for (cgroup, said) in [
        (1, agent("/")),
        (2, agent("/apps.slice")),
        (3, outside("/system.slice")),
        (4, outside("/system.slice/other.service")),
        (10, outside("/apps.slice/group.slice")),
        (11, outside("/apps.slice/group.slice/inner.slice")),
        (
            12,
            "web listens in /apps.slice/apps-team.slice, a slice: give it a unit of its own, or write a [[workload]] rule"
                .to_owned(),
        ),
        (5, agent("/apps.slice/sidestep.service")),
        (6, agent("/apps.slice/sidestep.service/main")),
        (
            7,
            "the socket of web was made by the first process in /apps.slice/init.scope, as for a socket unit: \
             write a [[workload]] rule"
                .to_owned(),
        ),
        (9, "web listens in cgroup 9, which this agent cannot see".to_owned()),
    ] {
        let services = [registered("web", "192.0.2.1:80")];
        let found = assigned(&tree, &services, &[listener("0.0.0.0:80", cgroup)]);
        assert_eq!(found, (vec![], vec![said]));
    }
    let services = [
        registered("web", "192.0.2.1:80"),
        registered("admin", "192.0.2.1:81"),
    ];
    let listeners = [listener("0.0.0.0:80", 8), listener("0.0.0.0:81", 8)];
    let said = "/apps.slice/both.service listens for several services (admin, web): give each a cgroup of its own, \
                or write a [[workload]] rule";
    let found = assigned(&tree, &services, &listeners);
    assert_eq!(found, (vec![], vec![said.to_owned()]));
}

#[test]
fn an_assignment_lasts_as_long_as_nothing_speaks_against_it() {
    let tree = Tree::of(&[(1, "/apps.slice/a"), (2, "/apps.slice/b")]);
    let services = [
        registered("web", "192.0.2.1:80"),
        registered("db", "192.0.2.1:5432"),
    ];
    let step = |before: &Assignments, services: &[RegisteredService], listeners: &[_]| {
        let located = locate(services, listeners);
        let (after, refused) = assign(services, &located, &tree, &bounds(), before);
        assert!(refused.is_empty(), "{refused:?}");
        after
    };
    let names = |assignments: &Assignments| -> Vec<(u64, String)> {
        let each = assignments
            .iter()
            .map(|(id, a)| (id.0, a.service.to_string()));
        each.collect()
    };
    let (web, db) = ("web".to_owned(), "db".to_owned());
    let found = step(&Assignments::new(), &services, &[listener("0.0.0.0:80", 1)]);
    assert_eq!(names(&found), [(1, web.clone())]);

    let drains = step(&found, &services, &[]);
    assert_eq!(drains, found, "it stopped listening");
    let moved = step(&found, &services, &[listener("0.0.0.0:80", 2)]);
    assert_eq!(
        names(&moved),
        [(1, web.clone()), (2, web)],
        "the new one beside the old"
    );
    let replaced = step(&found, &services, &[listener("0.0.0.0:5432", 1)]);
    assert_eq!(
        names(&replaced),
        [(1, db)],
        "another service is found in it"
    );
    assert!(
        step(&found, &services[1..], &[]).is_empty(),
        "registered no more"
    );
    tree.remove(1);
    assert!(
        step(&found, &services, &[]).is_empty(),
        "the cgroup is gone"
    );
}

#[test]
fn a_conflict_ends_the_assignment_of_before() {
    let tree = Tree::of(&[(1, "/apps.slice/a")]);
    let services = [
        registered("web", "192.0.2.1:80"),
        registered("db", "192.0.2.1:5432"),
    ];
    let both = [listener("0.0.0.0:80", 1), listener("0.0.0.0:5432", 1)];
    let located = locate(&services, &both[..1]);
    let (before, _) = assign(&services, &located, &tree, &bounds(), &Assignments::new());
    assert_eq!(before.len(), 1);
    let located = locate(&services, &both);
    let (after, refused) = assign(&services, &located, &tree, &bounds(), &before);
    assert!(after.is_empty());
    assert_eq!(refused.len(), 1);
}
