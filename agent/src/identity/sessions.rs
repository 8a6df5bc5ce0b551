//! Sessions of TLS 1.3 that a caller can resume with one peer.
//!
//! A ticket is used once, and each handshake brings one. rustls' own store keeps eight, which
//! run out where calls come in tens at a time.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;
use rustls::{
    NamedGroup,
    client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue},
};
use rustls_pki_types::ServerName;

/// How many tickets are kept for each name. There are as many as handshakes were under way at a time.
const TICKETS: usize = 32;

/// For how many names: those that lead to one service at one node are few, its own and those of its subsets.
const NAMES: usize = 4;

/// What is known of one peer.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<ServerName<'static>, Known>>);

#[derive(Debug, Default)]
struct Known {
    group: Option<NamedGroup>,
    /// The oldest first.
    tickets: VecDeque<Tls13ClientSessionValue>,
}

impl Sessions {
    fn change(&self, name: ServerName<'static>, change: impl FnOnce(&mut Known)) {
        let mut names = self.0.lock();
        // Rare, and all that is lost is one full handshake each.
        if names.len() >= NAMES && !names.contains_key(&name) {
            names.clear();
        }
        change(names.entry(name).or_default());
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.change(name, |known| known.group = Some(group));
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.lock().get(name)?.group
    }

    // What is resumed here is of TLS 1.3.
    fn set_tls12_session(&self, _name: ServerName<'static>, _session: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _name: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.change(name, |known| {
            if known.tickets.len() >= TICKETS {
                known.tickets.pop_front();
            }
            known.tickets.push_back(ticket);
        });
    }

    /// The newest, which is valid for the longest time.
    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.lock().get_mut(name)?.tickets.pop_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_ever_new_names_is_not_kept_for_all_of_them() {
        let sessions = Sessions::default();
        let name = |number: usize| ServerName::try_from(format!("v{number}.example.org")).unwrap();
        for number in 0..NAMES * 10 {
            sessions.set_kx_hint(name(number), NamedGroup::X25519);
            assert!(sessions.kx_hint(&name(number)).is_some(), "{number}");
        }
        let known = (0..NAMES * 10).filter(|number| sessions.kx_hint(&name(*number)).is_some());
        assert!(known.count() <= NAMES);
    }
}
