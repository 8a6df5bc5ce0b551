//! Looking a host's addresses up for the agent itself, at the servers that other names are forwarded to.

use std::{net::IpAddr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query as Question, ResponseCode},
    rr::{Name, RData, RecordType},
};
use tokio::sync::mpsc;

use super::{
    Query, Transport,
    forward::{ForwardError, Forwarder},
    message,
};

/// The most addresses that a host has; what goes beyond is left out.
const ADDRESSES_MAX: usize = 64;

/// The most aliases on the way to a host, as resolvers commonly have it.
const ALIASES_MAX: usize = 16;

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// A records.
    Ipv4,
    /// AAAA records.
    Ipv6,
}

/// What a server said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Addresses of one family; none if there is no such host or it has none.
    pub addresses: Vec<IpAddr>,
    /// How long that holds. `None` of what is not there: nobody says so in a way that we read.
    pub ttl: Option<Duration>,
}

/// Nothing was found out.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The query or its answer is none.
    #[error("not a DNS message: {0}")]
    Message(String),
    /// Nobody answered.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Somebody answered that he cannot tell.
    #[error("the server answered {0}")]
    Code(ResponseCode),
}

/// Looks hosts up.
#[derive(Debug)]
pub struct Lookup {
    forwarder: Forwarder,
}

impl Lookup {
    /// Asks where `forwarder` brings queries.
    pub fn new(forwarder: Forwarder) -> Self {
        Self { forwarder }
    }

    /// The addresses of `host`, as they are now.
    ///
    /// # Errors
    /// If that could not be found out. That there is none is no error.
    pub async fn addresses(&self, host: &str, family: Family) -> Result<Found, LookupError> {
        let name = host_name(host)?;
        let query = query(&name, family)?;
        let mut answer = self.exchange(&query, Transport::Udp).await?;
        if answer.metadata.truncation {
            answer = self.exchange(&query, Transport::Tcp).await?;
        }
        read(&answer, &name)
    }

    async fn exchange(&self, message: &[u8], transport: Transport) -> Result<Message, LookupError> {
        let (replies, mut replied) = mpsc::channel(1);
        let query = Query {
            message,
            transport,
            client: ([0, 0, 0, 0], 0).into(),
            original: None,
            drawn: None,
        };
        self.forwarder.exchange(&query, &replies).await?;
        let answer = replied
            .try_recv()
            .map_err(|error| LookupError::Message(error.to_string()))?;
        Message::from_vec(&answer).map_err(|error| LookupError::Message(error.to_string()))
    }
}

fn host_name(host: &str) -> Result<Name, LookupError> {
    let mut name =
        Name::from_ascii(host).map_err(|error| LookupError::Message(error.to_string()))?;
    name.set_fqdn(true);
    Ok(name)
}

fn query(name: &Name, family: Family) -> Result<Vec<u8>, LookupError> {
    let record = match family {
        Family::Ipv4 => RecordType::A,
        Family::Ipv6 => RecordType::AAAA,
    };
    // The id is given where it is sent.
    let mut query = Message::new(0, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Question::query(name.clone(), record));
    let mut edns = Edns::new();
    edns.set_max_payload(message::UDP_SIZE);
    query.edns = Some(edns);
    query
        .to_vec()
        .map_err(|error| LookupError::Message(error.to_string()))
}

/// What an answer says about `host`, along its aliases. Pure.
fn read(answer: &Message, host: &Name) -> Result<Found, LookupError> {
    let code = answer.metadata.response_code;
    if !matches!(code, ResponseCode::NoError | ResponseCode::NXDomain) {
        return Err(LookupError::Code(code));
    }
    let mut name = host.clone();
    let mut ttl = u32::MAX;
    for _ in 0..ALIASES_MAX {
        let of_name = answer.answers.iter().filter(|record| record.name == name);
        let mut aliases = of_name.filter_map(|record| {
            if let RData::CNAME(alias) = &record.data {
                return Some((alias.0.clone(), record.ttl));
            }
            None
        });
        let Some((alias, holds)) = aliases.next() else {
            break;
        };
        name = alias;
        ttl = ttl.min(holds);
    }
    let mut addresses = vec![];
    for record in answer.answers.iter().filter(|record| record.name == name) {
        let Some(address) = record.data.ip_addr() else {
            continue;
        };
        ttl = ttl.min(record.ttl);
        if addresses.len() < ADDRESSES_MAX && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let holds = Duration::from_secs(ttl.into());
    Ok(Found {
        ttl: (!addresses.is_empty()).then_some(holds),
        addresses,
    })
}

/// Any bytes as an answer: read or refused, and never more addresses than there may be.
#[cfg(any(test, fuzzing))]
pub(super) fn bear(bytes: &[u8]) {
    let Ok(message) = Message::from_vec(bytes) else {
        return;
    };
    let host = message.queries.first().map(|query| query.name.clone());
    if let Ok(found) = read(&message, &host.unwrap_or_default()) {
        assert!(found.addresses.len() <= ADDRESSES_MAX);
        assert_eq!(found.ttl.is_none(), found.addresses.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use hickory_proto::rr::{
        Record,
        rdata::{A, AAAA, CNAME},
    };

    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn answer(code: ResponseCode, records: &[(&str, u32, RData)]) -> Message {
        let mut message = Message::new(1, MessageType::Response, OpCode::Query);
        message.metadata.response_code = code;
        for (owner, ttl, data) in records {
            message.add_answer(Record::from_rdata(name(owner), *ttl, data.clone()));
        }
        message
    }

    fn a(last: u8) -> RData {
        RData::A(A::new(192, 0, 2, last))
    }

    #[test]
    fn answers_are_read_along_their_aliases() {
        let alias = |to: &str| RData::CNAME(CNAME(name(to)));
        let six = RData::AAAA(AAAA::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
        let found = |addresses: &[&str], ttl: Option<u64>| Found {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ttl: ttl.map(Duration::from_secs),
        };
        let good = ResponseCode::NoError;
        let table = [
            (
                answer(good, &[("Api.test.", 60, a(1)), ("api.test.", 30, a(2))]),
                found(&["192.0.2.1", "192.0.2.2"], Some(30)),
            ),
            (
                answer(good, &[("api.test.", 60, six)]),
                found(&["2001:db8::1"], Some(60)),
            ),
            (
                answer(
                    good,
                    &[
                        ("c.test.", 300, a(7)),
                        ("api.test.", 20, alias("b.test.")),
                        ("b.test.", 40, alias("c.test.")),
                        // Of somebody else.
                        ("d.test.", 1, a(9)),
                    ],
                ),
                found(&["192.0.2.7"], Some(20)),
            ),
            (
                answer(good, &[("api.test.", 20, alias("api.test."))]),
                found(&[], None),
            ),
            (answer(good, &[]), found(&[], None)),
            (answer(ResponseCode::NXDomain, &[]), found(&[], None)),
        ];
        for (message, expected) in table {
            assert_eq!(read(&message, &name("api.test.")).unwrap(), expected);
        }
        let many: Vec<_> = (0..200).map(|n| ("api.test.", 60, a(n))).collect();
        let many = read(&answer(good, &many), &name("api.test.")).unwrap();
        assert_eq!(many.addresses.len(), ADDRESSES_MAX);
        for code in [ResponseCode::ServFail, ResponseCode::Refused] {
            let error = read(&answer(code, &[]), &name("api.test.")).unwrap_err();
            assert!(matches!(error, LookupError::Code(said) if said == code));
        }
    }
}
