//! The TLS of one tunnel, without its bytes: rustls works in buffers that are lent to it.
//!
//! rustls' usual interface keeps a buffer of 4 KiB for each connection, also for an idle one, and reads pieces of that
//! size. What is here decides nothing and moves no byte: [`super::stream`] does.

use std::sync::Arc;

use rustls::{
    ClientConfig, CommonState, Error, ServerConfig,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use rustls_pki_types::ServerName;

/// One end of a TLS connection.
pub(super) enum Session {
    Calling(UnbufferedClientConnection),
    Called(UnbufferedServerConnection),
}

/// What came of bytes of the peer.
pub(super) struct Received {
    /// So many of them are done with. The rest is to be shown again, with what follows it.
    pub(super) used: usize,
    /// Whether the peer has said that nothing more comes. After an error there is nothing more to receive.
    pub(super) ended: Result<bool, Error>,
}

/// What one step of rustls came to.
enum Step {
    /// There may be more to do.
    Again,
    /// Nothing is left but what is not whole yet.
    Wait,
    /// The peer has said that nothing more comes.
    Ended,
}

/// How [`Session::seal`] can fail.
#[derive(Debug, thiserror::Error)]
pub(super) enum SealError {
    #[error("the TLS session takes nothing to send")]
    Closed,
    #[error("not sealed")]
    Encrypt(#[from] EncryptError),
    #[error(transparent)]
    Tls(#[from] Error),
}

impl Session {
    /// # Errors
    /// If `config` fits nothing.
    pub(super) fn calling(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Error> {
        UnbufferedClientConnection::new(config, name).map(Self::Calling)
    }

    /// # Errors
    /// If `config` fits nothing.
    pub(super) fn called(config: Arc<ServerConfig>) -> Result<Self, Error> {
        UnbufferedServerConnection::new(config).map(Self::Called)
    }

    /// What both ends have in common.
    pub(super) fn common(&self) -> &CommonState {
        match self {
            Self::Calling(session) => session,
            Self::Called(session) => session,
        }
    }

    /// Works off all that is whole in `incoming`: hands what the peer's application said to `plain`, and appends what is
    /// to be sent to `outgoing`, also if it fails: then it is the alert.
    pub(super) fn receive(
        &mut self,
        incoming: &mut [u8],
        plain: &mut impl FnMut(&[u8]),
        outgoing: &mut Vec<u8>,
    ) -> Received {
        let mut used = 0;
        loop {
            let rest = incoming.get_mut(used..).unwrap_or_default();
            let (discard, step) = self.step(rest, plain, outgoing);
            used += discard;
            let ended = match step {
                Ok(Step::Again) => continue,
                Ok(Step::Wait) => Ok(false),
                Ok(Step::Ended) => Ok(true),
                Err(error) => {
                    // It gives the alert before it would look at any byte.
                    while self.common().wants_write()
                        && matches!(self.step(&mut [], plain, outgoing), (_, Ok(Step::Again)))
                    {
                    }
                    Err(error)
                }
            };
            return Received { used, ended };
        }
    }

    fn step(
        &mut self,
        incoming: &mut [u8],
        plain: &mut impl FnMut(&[u8]),
        outgoing: &mut Vec<u8>,
    ) -> (usize, Result<Step, Error>) {
        match self {
            Self::Calling(session) => take(session.process_tls_records(incoming), plain, outgoing),
            Self::Called(session) => take(session.process_tls_records(incoming), plain, outgoing),
        }
    }

    /// Seals all of `plain` into records at the start of `records`; returns their length. `unread` is what
    /// [`Self::receive`] left over.
    ///
    /// # Errors
    /// If `records` is too short, or nothing may be sent.
    pub(super) fn seal(
        &mut self,
        unread: &mut [u8],
        plain: &[u8],
        records: &mut [u8],
    ) -> Result<usize, SealError> {
        match self {
            Self::Calling(session) => seal(session.process_tls_records(unread), plain, records),
            Self::Called(session) => seal(session.process_tls_records(unread), plain, records),
        }
    }

    /// Seals the word that nothing more comes, as [`Self::seal`] does.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub(super) fn seal_end(
        &mut self,
        unread: &mut [u8],
        records: &mut [u8],
    ) -> Result<usize, SealError> {
        match self {
            Self::Calling(session) => seal_end(session.process_tls_records(unread), records),
            Self::Called(session) => seal_end(session.process_tls_records(unread), records),
        }
    }
}

fn take<Side>(
    UnbufferedStatus { mut discard, state }: UnbufferedStatus<'_, '_, Side>,
    plain: &mut impl FnMut(&[u8]),
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Step, Error>) {
    let state = match state {
        Ok(state) => state,
        Err(error) => return (discard, Err(error)),
    };
    let step = match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        plain(record.payload);
                        discard += record.discard;
                    }
                    Err(error) => return (discard, Err(error)),
                }
            }
            Step::Again
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let at = outgoing.len();
            let mut encode =
                |outgoing: &mut Vec<u8>| data.encode(outgoing.get_mut(at..).unwrap_or_default());
            let encoded = match encode(outgoing) {
                Err(EncodeError::InsufficientSize(needed)) => {
                    outgoing.resize(at + needed.required_size, 0);
                    encode(outgoing)
                }
                encoded => encoded,
            };
            match encoded {
                Ok(length) => outgoing.truncate(at + length),
                Err(error) => return (discard, Err(Error::General(error.to_string()))),
            }
            Step::Again
        }
        // It is in `outgoing`, and everything else comes behind it there.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Step::Again
        }
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Step::Wait,
        ConnectionState::PeerClosed | ConnectionState::Closed => Step::Ended,
        // Nothing here offers early data, and what may come with another version of rustls is not known.
        ConnectionState::ReadEarlyData(_) | _ => {
            return (
                discard,
                Err(Error::General("unexpected TLS state".to_owned())),
            );
        }
    };
    (discard, Ok(step))
}

fn seal<Side>(
    status: UnbufferedStatus<'_, '_, Side>,
    plain: &[u8],
    records: &mut [u8],
) -> Result<usize, SealError> {
    let ConnectionState::WriteTraffic(mut traffic) = status.state? else {
        return Err(SealError::Closed);
    };
    Ok(traffic.encrypt(plain, records)?)
}

fn seal_end<Side>(
    status: UnbufferedStatus<'_, '_, Side>,
    records: &mut [u8],
) -> Result<usize, SealError> {
    let ConnectionState::WriteTraffic(mut traffic) = status.state? else {
        return Err(SealError::Closed);
    };
    Ok(traffic.queue_close_notify(records)?)
}
