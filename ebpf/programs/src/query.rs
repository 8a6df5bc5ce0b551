//! DNS queries in datagrams: to a loopback address that stands for their server, and their answers from the server.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use sidestep_abi::{
    ABI_VERSION, Address, Class, DNS_PORT, Found, Heartbeat, ListenerKey, PortBe, QueryFacts,
    Server, Verdict, classify, decide_query, may_stand_in, stand_in,
};

use crate::{connect::is_agent, context::SockAddr, interface, maps, report};

/// Servers that may have the same address at first.
const ATTEMPTS: u16 = 4;

/// Looks up no more than the decision needs.
#[inline(always)]
pub fn look_up(listener: &ListenerKey, can_capture: bool) -> QueryFacts {
    let mut facts = QueryFacts {
        enabled: false,
        agent: false,
        can_capture,
        listener: PortBe(0),
        heartbeat: Heartbeat::default(),
        now_ns: 0,
    };
    let Some(config) = maps::config() else {
        return facts;
    };
    facts.enabled = config.abi_version == ABI_VERSION && config.dns_port != 0;
    if !facts.enabled {
        return facts;
    }
    facts.agent = is_agent(config);
    if facts.agent {
        return facts;
    }
    facts.listener = maps::listener(listener);
    facts.heartbeat = maps::heartbeat();
    // SAFETY: takes nothing.
    facts.now_ns = unsafe { bpf_ktime_get_ns() };
    facts
}

/// Writes to `rewritten` where a datagram to `server`, at its port for DNS, goes instead. Returns whether it does: not
/// an option, whose payload would be undefined in one case.
#[inline(always)]
pub fn redirect(context: SockAddr, server: &Address, rewritten: &mut (Address, PortBe)) -> bool {
    let device = interface::picked(context);
    let class = match maps::config() {
        Some(config) => classify(server, &config.ranges),
        None => Class::VipRange,
    };
    let can_capture = may_stand_in(server, class, device);
    let facts = look_up(&ListenerKey::datagrams(context.netns()), can_capture);
    let Some(mut verdict) = decide_query(&facts) else {
        return false;
    };
    if matches!(verdict, Verdict::QueryCaptured) {
        let word = stand_in_for(server, facts.now_ns);
        if word == 0 {
            verdict = Verdict::QueryPassed;
        } else {
            *rewritten = (Address::from_v4_word(word), facts.listener);
        }
    }
    report::count(verdict.slot());
    matches!(verdict, Verdict::QueryCaptured)
}

/// The word of the address that stands for `server`; 0 if none does, for want of room.
#[inline(always)]
fn stand_in_for(server: &Address, now_ns: u64) -> u32 {
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        let word = stand_in(server, attempt);
        let mut found = maps::server(word);
        if matches!(found, Found::Absent) {
            maps::add_server(word, &Server::new(word, *server, DNS_PORT, now_ns));
            found = maps::server(word);
        }
        if let Found::Value(known) = found
            && known.is_at(server, DNS_PORT)
            && known.retired == 0
        {
            if now_ns > known.used_ns + Server::STAMPED_EVERY_NS {
                maps::stamp_server(word, now_ns);
            }
            return word;
        }
        attempt += 1;
    }
    0
}

/// The server that `peer`, at the port of the context, stands for; `None` if it is nobody else.
#[inline(always)]
pub fn shown_server(context: SockAddr, peer: &Address) -> Option<(Address, PortBe)> {
    if !peer.is_loopback() {
        return None;
    }
    let word = peer.v4_word()?;
    let port = maps::config()?.dns_port;
    if port == 0 || u32::from(context.port().to_host()) != port {
        return None;
    }
    match maps::server(word) {
        Found::Value(server) => Some((server.address, server.port)),
        _ => None,
    }
}
