//! DNS messages: what a query says, and an answer as bytes. Pure.
//!
//! The wire format is hickory-proto's. A query that is not ours is read no further than its question.

use hickory_proto::{
    op::{
        Edns, Header, HeaderCounts, Message, MessageType, Metadata, Query as Question, ResponseCode,
    },
    rr::RecordType,
    serialize::binary::{BinDecodable as _, BinDecoder},
};

use super::zone::Answer;

/// The most that an answer over UDP has: what passes everywhere in one piece.
/// Source: DNS Flag Day 2020.
pub(super) const UDP_SIZE: u16 = 1232;

/// The most without EDNS. Source: RFC 1035, section 4.2.1.
pub(super) const PLAIN_UDP_SIZE: u16 = 512;

/// A header's length. Source: RFC 1035, section 4.1.1.
const HEADER: usize = 12;

/// What came in.
pub(super) enum Received<'a> {
    /// Too short for a header, or a response: answering those makes loops.
    Nothing,
    /// A query without exactly one question that can be read.
    Malformed(Metadata),
    /// A query.
    Query(Asked<'a>),
}

/// A query, read as far as its question.
pub(super) struct Asked<'a> {
    /// Its header.
    pub(super) metadata: Metadata,
    /// Its question.
    pub(super) question: Question,
    counts: HeaderCounts,
    rest: BinDecoder<'a>,
}

/// What of a query matters to its answer.
#[derive(Debug)]
pub(super) struct Envelope {
    metadata: Metadata,
    question: Option<Question>,
    edns: Option<Edns>,
}

/// Reads as far as the question.
pub(super) fn receive(message: &[u8]) -> Received<'_> {
    let mut decoder = BinDecoder::new(message);
    let Ok(Header { metadata, counts }) = Header::read(&mut decoder) else {
        return Received::Nothing;
    };
    if message.len() < HEADER || metadata.message_type == MessageType::Response {
        return Received::Nothing;
    }
    if counts.queries != 1 {
        return Received::Malformed(metadata);
    }
    match Question::read(&mut decoder) {
        Ok(question) => Received::Query(Asked {
            metadata,
            question,
            counts,
            rest: decoder,
        }),
        Err(_unreadable) => Received::Malformed(metadata),
    }
}

impl Asked<'_> {
    /// Reads the rest. `Err` with the envelope for saying so, if it cannot be read.
    pub(super) fn open(mut self) -> Result<Envelope, Envelope> {
        let op_code = self.metadata.op_code;
        let mut records = |count: u16, additional| {
            Message::read_records(&mut self.rest, usize::from(count), additional, op_code)
        };
        let rest = records(self.counts.answers, false)
            .and_then(|_| records(self.counts.authorities, false))
            .and_then(|_| records(self.counts.additionals, true));
        let envelope = |edns| Envelope {
            metadata: self.metadata,
            question: Some(self.question.clone()),
            edns,
        };
        match rest {
            Ok((_records, edns, _signature)) => Ok(envelope(edns)),
            Err(_unreadable) => Err(envelope(None)),
        }
    }
}

impl Envelope {
    /// Of a query that has no question to repeat.
    pub(super) fn without_question(metadata: Metadata) -> Self {
        Self {
            metadata,
            question: None,
            edns: None,
        }
    }

    /// RFC 6891, section 6.1.3: there is only version 0.
    pub(super) fn has_known_edns(&self) -> bool {
        self.edns.as_ref().is_none_or(|edns| edns.version() == 0)
    }

    /// The most bytes that the client takes over UDP.
    pub(super) fn udp_size(&self) -> u16 {
        self.edns.as_ref().map_or(PLAIN_UDP_SIZE, |edns| {
            edns.max_payload().max(PLAIN_UDP_SIZE)
        })
    }

    /// The answer in at most `limit` bytes, cut and marked so (TC) if it has more; `None` if it cannot be encoded.
    ///
    /// `recursive`: whether other names are looked up for the client.
    pub(super) fn seal(self, answer: Answer, limit: u16, recursive: bool) -> Option<Vec<u8>> {
        let mut metadata = Metadata::response_from_request(&self.metadata);
        metadata.response_code = answer.code;
        metadata.recursion_available = recursive;
        metadata.authoritative =
            matches!(answer.code, ResponseCode::NoError | ResponseCode::NXDomain);
        let mut message = Message::new(metadata.id, MessageType::Response, metadata.op_code);
        message.metadata = metadata;
        message.queries = self.question.into_iter().collect();
        message.answers = answer.answers;
        message.authorities = answer.authorities;
        message.additionals = answer.additionals;
        message.edns = self.edns.map(|asked| {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_SIZE);
            // RFC 3225, section 3: repeated. It changes nothing, for there are no signatures.
            edns.set_dnssec_ok(asked.flags().dnssec_ok);
            edns
        });
        fit(message, usize::from(limit))
    }
}

/// What is only additional goes first, and without a mark. Source: RFC 2181, section 9.
fn fit(mut message: Message, limit: usize) -> Option<Vec<u8>> {
    let fitting = |message: &Message| {
        let bytes = message.to_vec().ok()?;
        (bytes.len() <= limit).then_some(bytes)
    };
    if let Some(whole) = fitting(&message) {
        return Some(whole);
    }
    message.additionals.clear();
    if let Some(enough) = fitting(&message) {
        return Some(enough);
    }
    message.metadata.truncation = true;
    message.authorities.clear();
    let answers = std::mem::take(&mut message.answers);
    let mut best = fitting(&message)?;
    // As many as fit: halving between what does and what does not.
    let (mut fits, mut too_many) = (0, answers.len());
    while too_many - fits > 1 {
        let tried = usize::midpoint(fits, too_many);
        message.answers = answers.iter().take(tried).cloned().collect();
        match fitting(&message) {
            Some(bytes) => (fits, best) = (tried, bytes),
            None => too_many = tried,
        }
    }
    Some(best)
}

/// An answer with nothing but a code to what may be no more than a header. `None` if there is not even that.
pub(super) fn only_code(query: &[u8], code: ResponseCode, recursive: bool) -> Option<Vec<u8>> {
    let envelope = match receive(query) {
        Received::Nothing => return None,
        Received::Malformed(metadata) => Envelope::without_question(metadata),
        Received::Query(asked) => match asked.open() {
            Ok(envelope) | Err(envelope) => envelope,
        },
    };
    envelope.seal(Answer::only(code), UDP_SIZE, recursive)
}

/// The size that a query allows for its answer over UDP, as far as it can be read.
pub(super) fn udp_size(query: &[u8]) -> u16 {
    match receive(query) {
        Received::Query(asked) => match asked.open() {
            Ok(envelope) | Err(envelope) => envelope.udp_size(),
        },
        Received::Nothing | Received::Malformed(_) => PLAIN_UDP_SIZE,
    }
}

/// The bytes of the question section; `None` if there is not exactly one question that can be read.
pub(super) fn question_bytes(message: &[u8]) -> Option<&[u8]> {
    let mut decoder = BinDecoder::new(message);
    let Header { counts, .. } = Header::read(&mut decoder).ok()?;
    if counts.queries != 1 {
        return None;
    }
    Question::read(&mut decoder).ok()?;
    message.get(HEADER..decoder.index())
}

/// The question, if there is exactly one that can be read.
pub(super) fn question(message: &[u8]) -> Option<Question> {
    let mut decoder = BinDecoder::new(message);
    let Header { counts, .. } = Header::read(&mut decoder).ok()?;
    let question = Question::read(&mut decoder).ok()?;
    (counts.queries == 1).then_some(question)
}

/// A message's id: its first two bytes.
pub(super) fn id(message: &[u8]) -> Option<u16> {
    message.first_chunk().map(|id| u16::from_be_bytes(*id))
}

/// The message under another id.
pub(super) fn with_id(mut message: Vec<u8>, id: u16) -> Vec<u8> {
    if let Some(place) = message.first_chunk_mut() {
        *place = id.to_be_bytes();
    }
    message
}

/// Whether a message is a response, by its header. Source: RFC 1035, section 4.1.1.
pub(super) fn is_response(message: &[u8]) -> bool {
    message.len() >= HEADER && message.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

/// What a response says became of the query, as far as its header has room for it.
pub(super) fn code(message: &[u8]) -> ResponseCode {
    let low = message.get(3).map_or(0, |flags| flags & 0x0f);
    ResponseCode::from_low(low)
}

/// Whether a response says that something went wrong.
pub(super) fn is_error(message: &[u8]) -> bool {
    code(message) != ResponseCode::NoError
}

/// The transfer of a zone, while it comes. Its end is the SOA record with which it began.
#[derive(Debug)]
pub(super) struct Transfer {
    incremental: bool,
    begun: bool,
}

/// The transfer that a query asks for, if `first`, the first message of it, is not all of it.
pub(super) fn transfer(query: &[u8], first: &[u8]) -> Option<Transfer> {
    let Received::Query(asked) = receive(query) else {
        return None;
    };
    let incremental = asked.question.query_type == RecordType::IXFR;
    if is_error(first) || !(incremental || asked.question.query_type == RecordType::AXFR) {
        return None;
    }
    let mut transfer = Transfer {
        incremental,
        begun: false,
    };
    (!transfer.is_last(first)).then_some(transfer)
}

impl Transfer {
    /// Whether it ends with this message. Source: RFC 5936, section 2.2.
    ///
    /// An incremental one (RFC 1995) has the same SOA record within: it is over when the server falls silent.
    pub(super) fn is_last(&mut self, message: &[u8]) -> bool {
        let Ok(message) = Message::from_vec(message) else {
            return false;
        };
        let ends_with_soa = message
            .answers
            .last()
            .is_some_and(|r| r.record_type() == RecordType::SOA);
        let is_first = !std::mem::replace(&mut self.begun, true);
        if self.incremental {
            // A SOA record alone: nothing has changed.
            return is_first && ends_with_soa && message.answers.len() == 1;
        }
        ends_with_soa && !(is_first && message.answers.len() == 1)
    }
}

/// The response of `message`'s kind with nothing in it and the truncation mark, for an answer that is too long.
pub(super) fn truncated(query: &[u8], recursive: bool) -> Option<Vec<u8>> {
    let mut bytes = only_code(query, ResponseCode::NoError, recursive)?;
    if let Some(flags) = bytes.get_mut(2) {
        // Not authoritative, truncated.
        *flags = (*flags & !0x04) | 0x02;
    }
    Some(bytes)
}
