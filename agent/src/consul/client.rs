//! One request to Consul, one answer.

use std::{borrow::Cow, fmt, fs, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    HeaderMap, Method,
    header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue},
    http::response::Parts,
};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};

use super::{ClientSettings, ConsulAddress, ConsulError, connection::Connections};

/// From the request to the head of the answer, beside the time that a blocking query may wait; and from there to its
/// last byte.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The largest answer: a service with 20,000 instances at 2 KiB each, with room to spare.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Of an error's text.
const TEXT_CHARS_MAX: usize = 256;

const TOKEN: HeaderName = HeaderName::from_static("x-consul-token");

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    path: String,
    query: Vec<(&'static str, String)>,
    /// How long Consul may wait before it answers.
    wait: Duration,
}

impl Request {
    /// A path of these segments, for example `["v1", "health", "connect", name]`.
    pub fn to(segments: &[&str]) -> Self {
        let path = segments
            .iter()
            .fold(String::new(), |path, segment| path + "/" + &encode(segment));
        Self {
            path,
            query: Vec::new(),
            wait: Duration::ZERO,
        }
    }

    /// Adds to the query; a key without a value is sent with an empty one.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.query.push((key, value.into()));
        self
    }

    /// Asks Consul to wait so long for a change.
    #[must_use]
    pub(super) fn waiting(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self.with("wait", format!("{}ms", wait.as_millis()))
    }

    fn uri(&self, settings: &ClientSettings) -> String {
        let common = [
            ("dc", &settings.datacenter),
            ("ns", &settings.namespace),
            ("partition", &settings.partition),
        ];
        let common = common
            .into_iter()
            .filter_map(|(key, value)| value.as_deref().map(|value| (key, value)))
            // A request may name another.
            .filter(|(key, _)| !self.query.iter().any(|(own, _)| own == key));
        let own = self.query.iter().map(|(key, value)| (*key, value.as_str()));
        let mut uri = self.path.clone();
        for (index, (key, value)) in own.chain(common).enumerate() {
            uri.push(if index == 0 { '?' } else { '&' });
            uri.push_str(&format!("{key}={}", encode(value)));
        }
        uri
    }

    /// With the server's jitter: a sixteenth of the wait. Source: Consul's "Blocking queries".
    fn limit(&self) -> Duration {
        self.wait + self.wait / 16 + TIMEOUT
    }
}

/// As it is shown: without the query, which says nothing that a reader looks for.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn encode(text: &str) -> Cow<'_, str> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    if text.bytes().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let encoded = text.bytes().map(|byte| {
        if is_plain(byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    });
    Cow::Owned(encoded.collect())
}

/// An answer with status 200, and what its headers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<T> {
    /// What it says.
    pub body: T,
    /// `X-Consul-Index`: what to give to the next blocking query. Not every answer has one.
    pub index: Option<u64>,
    /// `X-Consul-Knownleader`: whether the server that answered knew a leader.
    pub known_leader: Option<bool>,
    /// `X-Consul-Lastcontact`: how long ago the server that answered heard of its leader.
    pub last_contact: Option<Duration>,
    /// `X-Consul-Results-Filtered-By-ACLs`: whether something was left out for lack of rights. Servers before 1.11
    /// never say so, and none says so to the anonymous token.
    pub filtered_by_acls: bool,
    /// `X-Consul-Default-ACL-Policy`: `allow` or `deny`, since 1.9.
    pub default_acl_policy: Option<String>,
    /// `X-Consul-Contenthash`: on answers of the agent that are watched by hash.
    pub content_hash: Option<String>,
}

impl<T> Answer<T> {
    /// The same with another body.
    pub fn map<U>(self, map: impl FnOnce(T) -> U) -> Answer<U> {
        let Self {
            body,
            index,
            known_leader,
            last_contact,
            filtered_by_acls,
            default_acl_policy,
            content_hash,
        } = self;
        Answer {
            body: map(body),
            index,
            known_leader,
            last_contact,
            filtered_by_acls,
            default_acl_policy,
            content_hash,
        }
    }

    fn new(headers: &HeaderMap, body: T) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let is_true = |text: &str| text.eq_ignore_ascii_case("true");
        let number = |name| text(name).and_then(|text| text.trim().parse::<u64>().ok());
        Self {
            body,
            index: number("x-consul-index"),
            known_leader: text("x-consul-knownleader").map(is_true),
            last_contact: number("x-consul-lastcontact").map(Duration::from_millis),
            filtered_by_acls: text("x-consul-results-filtered-by-acls").is_some_and(is_true),
            default_acl_policy: text("x-consul-default-acl-policy").map(str::to_owned),
            content_hash: text("x-consul-contenthash").map(str::to_owned),
        }
    }
}

/// Asks Consul. Cheap to clone; clones share connections.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: ClientSettings,
    host: HeaderValue,
    connections: Connections,
    /// As last read; kept while the file cannot be read.
    token: Mutex<Option<HeaderValue>>,
}

impl Client {
    /// Connects with the first request.
    pub fn new(settings: ClientSettings) -> Self {
        let host = match &settings.address {
            ConsulAddress::Http { .. } | ConsulAddress::Https { .. } => {
                let shown = settings.address.to_string();
                let authority = shown.split_once("://").map_or("", |(_, rest)| rest);
                HeaderValue::from_str(authority).ok()
            }
            ConsulAddress::Unix(_) => None,
        };
        let connections = Connections::new(settings.address.clone(), settings.tls.clone());
        Self {
            inner: Arc::new(Inner {
                host: host.unwrap_or(HeaderValue::from_static("consul")),
                connections,
                token: Mutex::default(),
                settings,
            }),
        }
    }

    /// Where Consul is, and as whom it is asked.
    pub fn settings(&self) -> &ClientSettings {
        &self.inner.settings
    }

    /// Gets and decodes.
    ///
    /// # Errors
    /// [`ConsulError`]; all but status 200 is [`ConsulError::Status`].
    pub async fn get<T: DeserializeOwned>(
        &self,
        request: &Request,
    ) -> Result<Answer<T>, ConsulError> {
        let answer = self.ask(&Method::GET, request, Bytes::new()).await?;
        self.decode(&Method::GET, request, answer)
    }

    /// Puts `body` as JSON. What Consul answers to that is not always JSON, so it is handed on as it came.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn put(
        &self,
        request: &Request,
        body: &(impl Serialize + Sync),
    ) -> Result<Answer<Bytes>, ConsulError> {
        let body = self.encode(&Method::PUT, request, body)?;
        self.ask(&Method::PUT, request, body).await
    }

    /// Puts without a body, as the endpoints of the agent take it whose path says all.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn put_nothing(&self, request: &Request) -> Result<Answer<Bytes>, ConsulError> {
        self.ask(&Method::PUT, request, Bytes::new()).await
    }

    /// Deletes. What Consul answers to that is handed on as it came.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn delete(&self, request: &Request) -> Result<Answer<Bytes>, ConsulError> {
        self.ask(&Method::DELETE, request, Bytes::new()).await
    }

    /// Posts `body` as JSON and decodes the answer.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        request: &Request,
        body: &(impl Serialize + Sync),
    ) -> Result<Answer<T>, ConsulError> {
        let body = self.encode(&Method::POST, request, body)?;
        let answer = self.ask(&Method::POST, request, body).await?;
        self.decode(&Method::POST, request, answer)
    }

    async fn ask(
        &self,
        method: &Method,
        request: &Request,
        body: Bytes,
    ) -> Result<Answer<Bytes>, ConsulError> {
        let limit = request.limit();
        let exchange = self.exchange(method, request, body);
        let (parts, body) = tokio::time::timeout(limit, exchange)
            .await
            .map_err(|_elapsed| self.too_late(method, request, limit))??;
        if parts.status.as_u16() == 200 {
            return Ok(Answer::new(&parts.headers, body));
        }
        let text = String::from_utf8_lossy(&body);
        let first = text.lines().next().unwrap_or_default();
        Err(ConsulError::Status {
            request: format!("{method} {request}"),
            address: self.inner.settings.address.clone(),
            status: parts.status,
            text: first.chars().take(TEXT_CHARS_MAX).collect(),
        })
    }

    async fn exchange(
        &self,
        method: &Method,
        request: &Request,
        body: Bytes,
    ) -> Result<(Parts, Bytes), ConsulError> {
        let inner = &*self.inner;
        let make = || {
            let uri = request.uri(&inner.settings);
            let mut made = hyper::Request::new(Full::new(body.clone()));
            *made.uri_mut() = uri
                .parse()
                .map_err(|error| self.cannot(method, request, error))?;
            *made.method_mut() = method.clone();
            let headers = made.headers_mut();
            headers.insert(HOST, inner.host.clone());
            if !body.is_empty() {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            if let Some(token) = inner.token()? {
                headers.insert(TOKEN, token);
            }
            Ok(made)
        };
        // What was kept from an earlier request may be closed by Consul just now; then a new connection is made, once.
        if let Some(mut kept) = inner.connections.kept() {
            match kept.send(make()?).await {
                Ok(response) => {
                    let read = self.read(method, request, response);
                    let read = kept.drive(read).await?;
                    inner.connections.keep(kept);
                    return Ok(read);
                }
                Err(error) if error.is_canceled() || method == Method::GET => {}
                Err(source) => return Err(self.broken(method, request, source)),
            }
        }
        let mut fresh = inner.connections.open().await?;
        let response = fresh
            .send(make()?)
            .await
            .map_err(|source| self.broken(method, request, source))?;
        let read = fresh.drive(self.read(method, request, response)).await?;
        inner.connections.keep(fresh);
        Ok(read)
    }

    async fn read(
        &self,
        method: &Method,
        request: &Request,
        response: hyper::Response<hyper::body::Incoming>,
    ) -> Result<(Parts, Bytes), ConsulError> {
        let (parts, body) = response.into_parts();
        // The wait for a change is over.
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect();
        let body = tokio::time::timeout(TIMEOUT, body)
            .await
            .map_err(|_elapsed| self.too_late(method, request, TIMEOUT))?;
        match body {
            Ok(body) => Ok((parts, body.to_bytes())),
            Err(source) => Err(ConsulError::Body {
                request: format!("{method} {request}"),
                address: self.inner.settings.address.clone(),
                bytes_max: ANSWER_BYTES_MAX,
                source,
            }),
        }
    }

    fn decode<T: DeserializeOwned>(
        &self,
        method: &Method,
        request: &Request,
        answer: Answer<Bytes>,
    ) -> Result<Answer<T>, ConsulError> {
        let mut json = serde_json::Deserializer::from_slice(&answer.body);
        let decoded =
            serde_path_to_error::deserialize(&mut json).map_err(|source| ConsulError::Decode {
                request: format!("{method} {request}"),
                address: self.inner.settings.address.clone(),
                source,
            })?;
        Ok(answer.map(|_bytes| decoded))
    }

    fn encode(
        &self,
        method: &Method,
        request: &Request,
        body: &impl Serialize,
    ) -> Result<Bytes, ConsulError> {
        serde_json::to_vec(body)
            .map(Bytes::from)
            .map_err(|error| self.cannot(method, request, error))
    }

    fn cannot(
        &self,
        method: &Method,
        request: &Request,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> ConsulError {
        ConsulError::Request {
            request: format!("{method} {request}"),
            address: self.inner.settings.address.clone(),
            source: Box::new(source),
        }
    }

    fn too_late(&self, method: &Method, request: &Request, limit: Duration) -> ConsulError {
        ConsulError::Timeout {
            request: format!("{method} {request}"),
            address: self.inner.settings.address.clone(),
            limit,
        }
    }

    fn broken(&self, method: &Method, request: &Request, source: hyper::Error) -> ConsulError {
        ConsulError::Exchange {
            request: format!("{method} {request}"),
            address: self.inner.settings.address.clone(),
            source,
        }
    }
}

impl Inner {
    /// The token to show. Never none because of a file that cannot be read or is empty: Consul would answer as to a
    /// stranger, often with an empty list.
    fn token(&self) -> Result<Option<HeaderValue>, ConsulError> {
        let Some(path) = &self.settings.token_file else {
            return Ok(None);
        };
        let read = fs::read_to_string(path).and_then(|text| token_in(&text));
        let mut last = self.token.lock();
        match (read, &*last) {
            (Ok(token), _) => *last = Some(token),
            (Err(_), Some(_)) => {}
            (Err(source), None) => {
                return Err(ConsulError::TokenFile {
                    path: path.clone(),
                    source,
                });
            }
        }
        Ok(last.clone())
    }
}

fn token_in(text: &str) -> io::Result<HeaderValue> {
    let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let token = text.trim();
    if token.is_empty() {
        return Err(invalid("the file is empty"));
    }
    let mut token = HeaderValue::from_str(token)
        .map_err(|_invalid| invalid("expected a token and nothing else"))?;
    // Not shown by `Debug`.
    token.set_sensitive(true);
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> ClientSettings {
        ClientSettings::anonymous(ConsulAddress::Unix("/nowhere".into()))
    }

    #[test]
    fn what_is_asked_is_encoded() {
        let request = Request::to(&["v1", "health", "connect", "a/b c"]).with("filter", "x==\"y\"");
        assert_eq!(
            request.uri(&settings()),
            "/v1/health/connect/a%2Fb%20c?filter=x%3D%3D%22y%22"
        );
    }

    #[test]
    fn what_all_requests_share_is_added_unless_the_request_names_it() {
        let settings = ClientSettings {
            datacenter: Some("dc1".to_owned()),
            namespace: Some("team".to_owned()),
            ..settings()
        };
        let request = Request::to(&["v1", "catalog", "services"]).with("dc", "dc2");
        assert_eq!(
            request.uri(&settings),
            "/v1/catalog/services?dc=dc2&ns=team"
        );
    }

    #[test]
    fn headers_are_read_whatever_is_missing() {
        let none: Answer<()> = Answer::new(&HeaderMap::new(), ());
        assert_eq!((none.index, none.known_leader), (None, None));
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("x-consul-index", "23"),
            ("x-consul-knownleader", "true"),
            ("x-consul-lastcontact", "141"),
            ("x-consul-results-filtered-by-acls", "true"),
            ("x-consul-default-acl-policy", "deny"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        let answer = Answer::new(&headers, ());
        assert_eq!(answer.index, Some(23));
        assert_eq!(answer.known_leader, Some(true));
        assert_eq!(answer.last_contact, Some(Duration::from_millis(141)));
        assert!(answer.filtered_by_acls);
        assert_eq!(answer.default_acl_policy.as_deref(), Some("deny"));
    }

    #[test]
    fn a_token_is_never_shown_and_never_lost() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let client = Client::new(ClientSettings {
            token_file: Some(path.clone()),
            ..settings()
        });
        assert!(client.inner.token().is_err(), "no file");
        fs::write(&path, "\n").unwrap();
        assert!(client.inner.token().is_err(), "an empty file");
        fs::write(&path, "secret-1\n").unwrap();
        assert_eq!(client.inner.token().unwrap().unwrap(), "secret-1");
        assert!(!format!("{client:?}").contains("secret"));
        fs::write(&path, "secret-2").unwrap();
        assert_eq!(client.inner.token().unwrap().unwrap(), "secret-2");
        fs::remove_file(&path).unwrap();
        assert_eq!(client.inner.token().unwrap().unwrap(), "secret-2");
    }
}
