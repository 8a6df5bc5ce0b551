//! What both families do at `connect()`.
//!
//! Every pass either writes or deletes the socket's memory: a socket that once went to a virtual
//! address and now goes elsewhere must not carry the old destination.

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_ktime_get_ns};
use sidestep_abi::{
    ABI_VERSION, Address, Class, Config, DNS_PORT, Facts, Found, Heartbeat, ListenerKey, Origin,
    PortBe, Role, Target, Verdict, VipKey, classify, decide, decide_query, loopback_spread,
    maps::{TCP, UDP},
    may_fall_back,
};

use crate::{
    context::{LOOPBACK_DEVICE, SockAddr, Socket, fail_with},
    log, maps, origins, query, report,
};

/// `IPPROTO_MPTCP`; what goes through connect() is TCP all the same.
const MPTCP: u32 = 262;

/// What the caller in the program for one family has to do.
pub enum Step {
    /// Return 1.
    Pass,
    /// Return 0; the errno is set.
    Refuse,
    /// Write this destination and return 1.
    Rewrite(Address, PortBe),
}

#[inline(always)]
pub fn handle(context: SockAddr, destination: Address) -> Step {
    let protocol = context.protocol();
    let port = context.port();
    if protocol != TCP && protocol != MPTCP {
        let mut rewritten = (Address::default(), PortBe(0));
        let is_query = protocol == UDP && port == DNS_PORT;
        if is_query && query::redirect(context, &destination, &mut rewritten) {
            return Step::Rewrite(rewritten.0, rewritten.1);
        }
        report::count(Verdict::PassedProtocol.slot());
        return Step::Pass;
    }
    let mut facts = look_up(context, &destination, port);
    let mut verdict = decide(&facts);
    let mut target = facts.target();
    let passes = matches!(verdict, Verdict::PassedOther | Verdict::PassedLoopback);
    if port == DNS_PORT && passes {
        let key = ListenerKey::new(context.netns(), &destination);
        let found = query::look_up(&key, true);
        if let Some(decided) = decide_query(&found) {
            verdict = decided;
            target = Some(Target::DNS);
            facts.listener = found.listener;
            facts.now_ns = found.now_ns;
        }
    }
    let mut rewritten = (Address::default(), facts.listener);
    match (verdict, target) {
        (Verdict::Captured | Verdict::QueryCaptured, Some(target)) => {
            match capture(context, &destination, port, &target, &facts) {
                Ok(address) => rewritten.0 = address,
                // Its server answers it too.
                Err(_) if matches!(verdict, Verdict::QueryCaptured) => {
                    verdict = let_go(context).err().unwrap_or(Verdict::QueryPassed);
                }
                Err(refusal) => verdict = refusal,
            }
        }
        (Verdict::Fallback, Some(target)) => {
            verdict = fall_back(context, &destination, port, &target, &facts, &mut rewritten);
        }
        _ => {
            if let Err(refusal) = let_go(context) {
                verdict = refusal;
            }
        }
    }
    report::count(verdict.slot());
    log::verdict(context, &destination, port, verdict);
    if verdict.is_refusal() {
        report::refusal(verdict, &destination, port, context.netns());
        fail_with(verdict.errno());
        return Step::Refuse;
    }
    match verdict {
        Verdict::Captured | Verdict::Fallback | Verdict::QueryCaptured => {
            Step::Rewrite(rewritten.0, rewritten.1)
        }
        _ => Step::Pass,
    }
}

/// Looks up no more than the decision needs.
#[inline(always)]
fn look_up(context: SockAddr, destination: &Address, port: PortBe) -> Facts {
    let mut facts = Facts {
        class: Class::Other,
        configured: false,
        agent: false,
        vip: Found::Absent,
        address: Found::Absent,
        listener: PortBe(0),
        heartbeat: Heartbeat::default(),
        now_ns: 0,
    };
    let Some(config) = maps::config() else {
        // Cannot be: the map has one element. 240/4 stays closed even so.
        facts.class = classify(destination, &sidestep_abi::Ranges::default());
        return facts;
    };
    facts.configured = config.abi_version == ABI_VERSION;
    facts.class = classify(destination, &config.ranges);
    if matches!(facts.class, Class::Loopback) || !facts.configured {
        return facts;
    }
    facts.vip = maps::vip(&VipKey::new(*destination, port));
    if matches!(facts.vip, Found::Absent) {
        facts.address = maps::address(destination);
    }
    if facts.target().is_some() {
        facts.listener = maps::listener(&ListenerKey::new(context.netns(), destination));
        facts.heartbeat = maps::heartbeat();
        // SAFETY: takes nothing.
        facts.now_ns = unsafe { bpf_ktime_get_ns() };
    }
    let is_ours = matches!(facts.class, Class::VipRange)
        || !matches!((facts.vip, facts.address), (Found::Absent, Found::Absent));
    facts.agent = is_ours && is_agent(config);
    facts
}

#[inline(always)]
pub fn is_agent(config: &Config) -> bool {
    let level = config.agent_cgroup_level as i32;
    // SAFETY: takes a number; gives 0 if the task is not as deep.
    let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
    ancestor != 0 && ancestor == config.agent_cgroup
}

/// Remembers the destination on the socket and says where to send it.
#[inline(always)]
fn capture(
    context: SockAddr,
    destination: &Address,
    port: PortBe,
    target: &Target,
    facts: &Facts,
) -> Result<Address, Verdict> {
    let Some(socket) = context.socket() else {
        return Err(Verdict::RefusedNoSocket);
    };
    let rewritten = match destination.v4_word() {
        Some(_) => Address::from_v4_word(loopback_spread(destination, port)),
        None => Address::LOOPBACK_V6,
    };
    let device = socket.bound_device();
    let bound_device = if device > LOOPBACK_DEVICE {
        device
    } else {
        remembered_device(socket)
    };
    let caller = report::caller();
    let origin = Origin {
        destination: *destination,
        rewritten,
        destination_port: port,
        rewritten_port: facts.listener,
        service: target.service,
        cgroup: caller.cgroup,
        netns: context.netns(),
        socket_cookie: context.socket_cookie(),
        stamped_ns: facts.now_ns,
        check: 0,
        uid: caller.uid,
        process: caller.process,
        bound_device,
        role: Role::CLIENT,
        flags: 0,
        zero: 0,
    };
    if !origins::remember(socket, &origin) {
        return Err(Verdict::RefusedStorage);
    }
    // Loopback addresses cannot be reached through another interface.
    if device > LOOPBACK_DEVICE && !context.bind_device(LOOPBACK_DEVICE) {
        origins::forget(socket);
        return Err(Verdict::RefusedDevice);
    }
    Ok(rewritten)
}

/// Remembers the destination on the socket, for `getpeername()` alone, and writes to `rewritten` where the service is
/// reached while no agent takes connects to it. Returns the verdict after all: not a result, whose payload would be
/// undefined in one case.
#[inline(always)]
fn fall_back(
    context: SockAddr,
    destination: &Address,
    port: PortBe,
    target: &Target,
    facts: &Facts,
    rewritten: &mut (Address, PortBe),
) -> Verdict {
    // Forgets whatever else was on the socket, and gives it back the interface that it was bound to.
    if let Err(refusal) = let_go(context) {
        return refusal;
    }
    // The decision found a reason; the other is never taken.
    let refusal = facts.away().unwrap_or(Verdict::RefusedNetns);
    let Some(config) = maps::config() else {
        return refusal;
    };
    let Found::Value(to) = maps::fallback(target.service) else {
        return refusal;
    };
    if !may_fall_back(destination, &to, &config.ranges) {
        return refusal;
    }
    let Some(socket) = context.socket() else {
        return Verdict::RefusedNoSocket;
    };
    let origin = Origin {
        destination: *destination,
        rewritten: to.endpoint,
        destination_port: port,
        rewritten_port: to.port,
        service: target.service,
        stamped_ns: facts.now_ns,
        role: Role::FALLBACK,
        ..Origin::default()
    };
    if !origins::remember(socket, &origin) {
        return Verdict::RefusedStorage;
    }
    *rewritten = (to.endpoint, to.port);
    Verdict::Fallback
}

/// Leaves the socket as if it had never been captured.
#[inline(always)]
fn let_go(context: SockAddr) -> Result<(), Verdict> {
    let Some(socket) = context.socket() else {
        return Ok(());
    };
    let device = remembered_device(socket);
    if device != 0 && !context.bind_device(device) {
        return Err(Verdict::RefusedDevice);
    }
    origins::forget(socket);
    Ok(())
}

/// The interface that an earlier capture took the socket off, if it still is off it.
#[inline(always)]
fn remembered_device(socket: Socket) -> u32 {
    if socket.bound_device() != LOOPBACK_DEVICE {
        return 0;
    }
    match origins::of(socket) {
        Some(origin) if origin.role == Role::CLIENT => origin.bound_device,
        _ => 0,
    }
}
