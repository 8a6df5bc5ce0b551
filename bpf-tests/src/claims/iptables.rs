//! Capture by iptables rules: that they come and go cleanly. Everything else is claimed by `path`, in every mode.

use std::{collections::BTreeSet, fs, net::SocketAddr};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    Claim, Finding, Size, Topic,
    dependable::web::{self, serves},
};
use crate::{
    mesh::{Mesh, local, vip},
    mode::Mode,
    namespace::Namespace,
    program::Program,
    services,
    wait::{SOON, wait_for, wait_for_value},
    workload::{Kind, Workload},
};

/// See the module.
pub const TOPIC: Topic = Topic {
    name: "iptables",
    about: "capture by iptables rules: that they come and go cleanly",
    programs: &[
        "ip",
        "curl",
        "python3",
        "iptables-nft-save",
        "iptables-legacy-save",
    ],
    claims: claims! {
        self::the_agent_says_by_what_it_captures: "status and check say by what connections are captured";
        self::a_killed_agent_fails_closed: "while a killed agent is away, calls are refused at once; the next one serves them with the same rules";
        self::rules_of_others_stay: "what others have in the same tables stays, and the jump to Sidestep's rules comes before it, once";
        self::detach_leaves_a_clean_host: "`sidestep detach` leaves rules and routes as they were before Sidestep, in every namespace";
        self::without_a_pin_directory_nothing_stays: "an agent without a pin directory takes its rules with it";
        self::what_others_removed_comes_back: "rules that somebody flushed are told, and made again within seconds";
        self::the_listener_serves_nobody_directly: "who connects to the capture listener itself is refused";
        self::a_real_address_is_captured_too: "a service at a real address is called through the mesh, and around it by nobody in it";
        self::who_takes_the_port_gets_nothing: "who listens at the capture port when the agent has ended gets no connection, and only root can before";
        self::equal_ports_are_told_apart: "two workloads whose connections meet behind the redirection are still told apart";
        self::one_mode_follows_the_other: "an agent that captures by rules replaces the programs of one that captured by eBPF";
        self::an_upgrade_loses_no_connection: "`sidestep upgrade` hands the rules over, and calls go on";
    },
};

/// The mode of this run, or else nftables.
fn choose() {
    if Mode::chosen() == Mode::Ebpf {
        Mode::IptablesNft.choose();
    }
}

fn web(purpose: &str) -> Result<Mesh> {
    choose();
    web::mesh(purpose)
}

/// What `iptables-save` and `ip6tables-save` say: rules and chains of users, in order, without counts.
fn rules(namespace: &Namespace) -> Result<Vec<String>> {
    let mode = Mode::chosen().as_str();
    let variant = mode.strip_prefix("iptables-").context("not by iptables")?;
    let mut rules = vec![];
    for tool in ["iptables", "ip6tables"] {
        let saved = Program::new(format!("{tool}-{variant}-save"))
            .in_namespace(namespace)
            .run(SOON)?;
        let mut table = String::new();
        for line in saved.lines() {
            if line.starts_with('*') {
                line.clone_into(&mut table);
            } else if line.starts_with("-A") || line.contains(" - [") {
                rules.push(format!("{tool} {table} {line}"));
            }
        }
    }
    Ok(rules)
}

fn iptables(namespace: &Namespace, arguments: &str) -> Result<()> {
    Program::new(Mode::chosen().as_str())
        .args(arguments.split_whitespace())
        .in_namespace(namespace)
        .run(SOON)
        .map(drop)
}

/// All routes, also those of IPv6.
fn routes(namespace: &Namespace) -> Result<String> {
    let mut routes = String::new();
    for family in ["-4", "-6"] {
        routes += &Program::new("ip")
            .args([family, "route", "show", "table", "main"])
            .in_namespace(namespace)
            .run(SOON)?;
    }
    Ok(routes)
}

fn is_ours(rule: impl AsRef<str>) -> bool {
    rule.as_ref().contains("SIDESTEP")
}

fn the_agent_says_by_what_it_captures(_size: Size) -> Result<Finding> {
    let mut mesh = web("says")?;
    mesh.start()?;
    let node = &mesh.lab.a;
    let status = node.status()?;
    let mode = status.get("capture_mode").and_then(|mode| mode.as_str());
    let check = node.sidestep(&["check"])?.output(SOON)?;
    let expected = Mode::chosen().as_str();
    let named = check.stdout.contains(&format!("{expected} IPv6"));
    Ok(Finding::new(
        mode == Some(expected) && named && check.succeeded(),
        format!("status {mode:?}, check {}", check.code_text()),
    ))
}

fn a_killed_agent_fails_closed(_size: Size) -> Result<Finding> {
    let mut mesh = web("killed")?;
    mesh.start()?;
    let namespace = mesh.lab.a.namespace().clone();
    let (before, first) = (rules(&namespace)?, serves(&mesh)?);
    mesh.lab.a.kill_agent();
    let away = web::connect(&mesh)?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let (after, second) = (rules(&namespace)?, serves(&mesh)?);
    Ok(Finding::new(
        first && away == "ECONNREFUSED" && second && before == after && before.iter().any(is_ours),
        format!(
            "served before: {first}, while away: {away}, served after: {second}, {} rules before and {} after, equal: {}",
            before.len(),
            after.len(),
            before == after,
        ),
    ))
}

fn rules_of_others_stay(_size: Size) -> Result<Finding> {
    let mut mesh = web("others")?;
    let namespace = mesh.lab.a.namespace().clone();
    // One that would take the connection away, were it asked first.
    let address = vip(1, 80).ip();
    iptables(&namespace, "-t nat -N OTHERS")?;
    iptables(&namespace, "-t nat -A OUTPUT -p tcp -j OTHERS")?;
    iptables(
        &namespace,
        &format!("-t nat -A OTHERS -p tcp -d {address} -j REDIRECT --to-ports 9"),
    )?;
    iptables(&namespace, "-A OUTPUT -p udp --dport 9 -j DROP")?;
    let others = rules(&namespace)?;
    mesh.start()?;
    let first = serves(&mesh)?;
    // Somebody takes the first place, and the agent is restarted.
    iptables(&namespace, "-t nat -I OUTPUT 1 -p tcp -j OTHERS")?;
    mesh.lab.a.kill_agent();
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let second = serves(&mesh)?;
    iptables(&namespace, "-t nat -D OUTPUT -p tcp -j OTHERS")?;
    let now = rules(&namespace)?;
    let jumps = now
        .iter()
        .filter(|rule| rule.contains("-A OUTPUT") && is_ours(rule));
    let jumps = jumps.count();
    let kept: Vec<&String> = now.iter().filter(|rule| !is_ours(rule)).collect();
    let same = kept == others.iter().collect::<Vec<_>>();
    Ok(Finding::new(
        // One for each table and family.
        first && second && same && jumps == 4,
        format!(
            "served: {first}, and again after somebody went first: {second}; {} rules of others kept: {same}; {jumps} jumps in 4 tables",
            others.len()
        ),
    ))
}

fn detach_leaves_a_clean_host(_size: Size) -> Result<Finding> {
    choose();
    let mut mesh = web::mesh("clean")?;
    let container = mesh
        .lab
        .a
        .add_workload("shop", "container", Kind::Netns)?
        .namespace()
        .clone();
    let host = mesh.lab.a.namespace().clone();
    iptables(
        &host,
        "-t nat -A OUTPUT -p udp --dport 9 -j REDIRECT --to-ports 10",
    )?;
    let places = [&host, &container];
    let look = || -> Result<Vec<_>> {
        let look = |place: &&Namespace| Ok((rules(place)?, routes(place)?));
        places.iter().map(look).collect()
    };
    let before = look()?;
    mesh.start()?;
    let during = look()?;
    let everywhere = during
        .iter()
        .all(|(rules, routes)| rules.iter().any(is_ours) && routes.contains("240.0.0.0/4"));
    let node = &mut mesh.lab.a;
    let refused = node.sidestep(&["detach"])?.output(SOON)?;
    node.signal_agent(Signal::TERM)?;
    node.wait_for_agent_end(SOON)?;
    let left = look()?;
    let left = left
        .iter()
        .all(|(rules, routes)| rules.iter().any(is_ours) && routes.contains("240.0.0.0/4"));
    let detached = node.sidestep(&["detach"])?.output(SOON)?;
    let after = look()?;
    let again = node.sidestep(&["detach"])?.run(SOON)?;
    let clean = before == after;
    ensure!(clean, "before {before:#?}, after {after:#?}");
    Ok(Finding::new(
        everywhere
            && !refused.succeeded()
            && left
            && detached.succeeded()
            && again == "nothing was attached\n",
        format!(
            "in both namespaces: {everywhere}; refused while it runs, left by a stop: {left}; then {}, and nothing is left",
            detached.stdout.trim().replace('\n', ", ")
        ),
    ))
}

fn without_a_pin_directory_nothing_stays(_size: Size) -> Result<Finding> {
    let mut mesh = web("off")?;
    mesh.lab.a.do_not_pin();
    let namespace = mesh.lab.a.namespace().clone();
    let before = (rules(&namespace)?, routes(&namespace)?);
    mesh.start()?;
    let served = serves(&mesh)?;
    mesh.lab.a.signal_agent(Signal::TERM)?;
    mesh.lab.a.wait_for_agent_end(SOON)?;
    let after = (rules(&namespace)?, routes(&namespace)?);
    Ok(Finding::new(
        served && before == after,
        format!("served: {served}; {} rules are left", after.0.len()),
    ))
}

fn what_others_removed_comes_back(_size: Size) -> Result<Finding> {
    let mut mesh = web("flushed")?;
    mesh.start()?;
    let namespace = mesh.lab.a.namespace().clone();
    let before = rules(&namespace)?;
    iptables(&namespace, "-t nat -F OUTPUT")?;
    iptables(&namespace, "-t nat -F SIDESTEP_CAPTURE")?;
    let meanwhile = web::connect(&mesh)?;
    // The agent looks every ten seconds.
    wait_for_value("calls to be served again", 2 * SOON, || {
        Ok(serves(&mesh)?.then_some(()))
    })?;
    let after = rules(&namespace)?;
    Ok(Finding::new(
        meanwhile == "ECONNREFUSED" && before == after,
        format!(
            "meanwhile {meanwhile}; then {} rules, equal: {}",
            after.len(),
            before == after
        ),
    ))
}

fn the_listener_serves_nobody_directly(_size: Size) -> Result<Finding> {
    let mut mesh = web("direct")?;
    mesh.start()?;
    let mut ends = BTreeSet::new();
    for listener in ["127.0.0.1:301", "127.9.9.9:301", "[::1]:301"] {
        let report = mesh.shop.ask_peer(&format!("read {listener}"), SOON)?;
        let bytes = report.get("bytes").and_then(serde_json::Value::as_u64);
        ensure!(bytes == Some(0), "{report}");
        let end = report.get("end").and_then(|end| end.as_str());
        ends.insert(end.unwrap_or("?").to_owned());
    }
    let counted = mesh
        .lab
        .a
        .metric("sidestep_uncaptured_connections_total", &[])?;
    Ok(Finding::new(
        ends == BTreeSet::from(["ECONNRESET".to_owned()]) && counted >= 3.0,
        format!("ends {ends:?}, {counted} counted"),
    ))
}

fn a_real_address_is_captured_too(_size: Size) -> Result<Finding> {
    let mut mesh = web("real")?;
    let real = mesh.lab.b.address();
    let (called, other) = (SocketAddr::new(real, 9090), SocketAddr::new(real, 9091));
    let place = mesh.place("real", "real", Kind::Cgroup)?;
    mesh.register("real", "real", called, local(8081));
    mesh.keep(services::http(&place, local(8081), "through the mesh")?);
    for address in [called, other] {
        mesh.keep(services::http(&place, address, "around the mesh")?);
    }
    mesh.start()?;
    let through = mesh.shop.curl(&format!("http://{called}/")).run(SOON)?;
    // The agent reaches its tunnels at the same address, and programs outside of attach points all of it.
    let outside = mesh.lab.a.tool("curl")?;
    let outside = outside.args(["--silent", &format!("http://{other}/")]);
    let outside = outside.run(SOON)?;
    // What curl says if the connect is refused.
    let is_refused = |mesh: &Mesh, target: SocketAddr| -> Result<bool> {
        let output = mesh.shop.curl(&format!("http://{target}/")).output(SOON)?;
        Ok(output.code() == Some(7))
    };
    let other_port = is_refused(&mesh, other)?;
    mesh.lab.a.kill_agent();
    let away = is_refused(&mesh, called)?;
    // The next agent does not learn of the service, and leaves alone what it finds.
    mesh.lab
        .catalog
        .write("services.yaml", "service: { name: web, port: \n")?;
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let forgotten = is_refused(&mesh, called)?;
    Ok(Finding::new(
        through.trim() == "through the mesh"
            && outside.trim() == "around the mesh"
            && other_port
            && away
            && forgotten,
        format!(
            "{}; for others {}; refused at another port: {other_port}, while the agent is away: {away}, by an agent that does not know it: {forgotten}",
            through.trim(),
            outside.trim()
        ),
    ))
}

fn who_takes_the_port_gets_nothing(_size: Size) -> Result<Finding> {
    // A user id that nobody has.
    const USER: u32 = 47_012;
    let mut mesh = web("squatter")?;
    mesh.start()?;
    let served = serves(&mesh)?;
    mesh.lab.a.kill_agent();
    let log = mesh.lab.a.directory().join("squatter.log");
    let squatter = mesh.lab.a.tool("/usr/bin/python3")?;
    let squatter = squatter.args(["-c", SQUATTER]).log(&log);
    let status = squatter.clone().as_user(USER, USER).spawn()?.wait(SOON)?;
    let said = fs::read_to_string(&log)?;
    let denied =
        status.is_some_and(|status| !status.success()) && said.contains("Permission denied");
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    mesh.lab.a.signal_agent(Signal::TERM)?;
    mesh.lab.a.wait_for_agent_end(SOON)?;
    let _squatter = squatter.spawn()?;
    wait_for("the squatter to listen", SOON, || {
        fs::read_to_string(&log).is_ok_and(|said| said.contains("listening"))
    })?;
    let after = web::connect(&mesh)?;
    let robbed = fs::read_to_string(&log)?.contains("robbed");
    Ok(Finding::new(
        served && denied && after == "ECONNREFUSED" && !robbed,
        format!(
            "after a kill another user may not listen there: {denied}; after a stop root may, and calls end with {after}"
        ),
    ))
}

/// Listens where the agent did.
const SQUATTER: &str = "\
import socket
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(('0.0.0.0', 301))
listener.listen()
print('listening', flush=True)
listener.accept()
print('robbed', flush=True)
";

/// IPv6 has one loopback address: from one port, connections to two services meet there.
fn equal_ports_are_told_apart(_size: Size) -> Result<Finding> {
    let mut mesh = web("ports")?;
    let range = "fd00:51de:57ea::/64";
    for node in [&mut mesh.lab.a, &mut mesh.lab.b] {
        node.set_capture(&format!("ipv6_range = \"{range}\""));
    }
    let local = mesh.registered("web").context("web is registered")?;
    for index in 1..=2 {
        let id = format!("six-{index}");
        let address = format!("[fd00:51de:57ea::{index}]:80").parse()?;
        mesh.register(&id, &id, address, local);
    }
    mesh.start()?;
    let call = |workload: &Workload, words: &str| {
        let program = workload.program("python3").args(["-c", FROM_ONE_PORT]);
        program.args(words.split(' '))
    };
    // Only the shop may call.
    let log = mesh.shop.directory().join("held.log");
    let _held = call(&mesh.shop, "hold 40123 1").log(&log).spawn()?;
    wait_for("the shop to hold its connection", SOON, || {
        fs::read_to_string(&log).is_ok_and(|said| said.contains("held"))
    })?;
    let ask = |workload, words| -> Result<String> {
        Ok(call(workload, words).run(SOON)?.trim().to_owned())
    };
    let guest = ask(&mesh.guest, "ask 40123 2")?;
    let shop = ask(&mesh.shop, "ask 40124 1 2")?;
    Ok(Finding::new(
        shop == "2 answered" && guest == "reset",
        format!(
            "from one port to two services: who may call, {shop}; who may not, meanwhile, {guest}"
        ),
    ))
}

/// Connects to two services from one port; then holds the connections, or asks.
const FROM_ONE_PORT: &str = "\
import signal, socket, sys
action, port, *services = sys.argv[1:]
ends = []
try:
    for service in services:
        end = socket.socket(socket.AF_INET6)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end.bind(('::1', int(port)))
        end.settimeout(10)
        end.connect((f'fd00:51de:57ea::{service}', 80))
        ends.append(end)
    if action == 'hold':
        print('held', flush=True)
        signal.pause()
    for end in ends:
        end.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')
    answers = [b''.join(iter(lambda: end.recv(4096), b'')) for end in ends]
    print(sum(b'web' in answer for answer in answers), 'answered')
except ConnectionResetError:
    print('reset')
";

fn one_mode_follows_the_other(_size: Size) -> Result<Finding> {
    let mut mesh = web("modes")?;
    let by_rules = Mode::chosen();
    mesh.lab.a.set_mode(Mode::Ebpf);
    mesh.start()?;
    let first = serves(&mesh)?;
    mesh.lab.a.kill_agent();
    mesh.lab.a.set_mode(by_rules);
    mesh.lab.a.start_agent()?;
    mesh.lab.a.wait_until_ready()?;
    let second = serves(&mesh)?;
    let status = mesh.lab.a.status()?;
    let mode = status.get("capture_mode").and_then(|mode| mode.as_str());
    Ok(Finding::new(
        first && second && mode == Some(by_rules.as_str()),
        format!("served by programs: {first}, then by rules: {second} ({mode:?})"),
    ))
}

fn an_upgrade_loses_no_connection(_size: Size) -> Result<Finding> {
    let mut mesh = web("upgrade")?;
    mesh.start()?;
    let namespace = mesh.lab.a.namespace().clone();
    let before = rules(&namespace)?;
    let mut served = vec![serves(&mesh)?];
    let log = mesh.lab.a.directory().join("upgrade.log");
    let upgrade = mesh.lab.a.sidestep(&["upgrade"])?.log(&log);
    let mut upgrade = upgrade.spawn()?;
    let status = loop {
        served.push(serves(&mesh)?);
        if let Some(status) = upgrade.ended()? {
            break status;
        }
    };
    ensure!(status.success(), "{}", fs::read_to_string(&log)?);
    served.push(serves(&mesh)?);
    let after = rules(&namespace)?;
    let good = served.iter().filter(|served| **served).count();
    Ok(Finding::new(
        good == served.len() && before == after,
        format!(
            "{good} of {} calls served, rules equal: {}",
            served.len(),
            before == after
        ),
    ))
}
