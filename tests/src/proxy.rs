//! A proxy between doppel and the S3 server that does what networks and servers do on bad days.
//!
//! Requests pass unchanged, the `Host` header above all, since it is signed; but each goes over a connection of its own,
//! so that an answer ends where its connection does.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 503 with the code `SlowDown`; the server never sees the request.
    SlowDown,
    /// The connection is reset before the server sees the request.
    Reset,
    /// The server does what was asked, and the connection is reset before its answer.
    LostAnswer,
    /// Half of the answer to a read, then the end of the connection.
    CutShort,
    /// The request reaches the server so much later, also where nobody waits for it any more.
    Stall(Duration),
    /// This status for conditional puts, which the server never sees.
    Conflict(u16),
    /// This status for conditional puts, which the server has carried out.
    FalseConflict(u16),
    /// 403 with the code `RequestTimeTooSkewed`; the server never sees the request.
    TooSkewed,
    /// 400 with the code `RequestTimeout`, as S3 answers who sends too slowly; the server never sees the request.
    TooSlow,
    /// The answer is dated that many days off.
    OtherDate,
}

impl Fault {
    /// Whether it concerns `request` at all.
    fn applies(self, request: &Request) -> bool {
        match self {
            Fault::Conflict(_) | Fault::FalseConflict(_) => request.is_conditional_put(),
            Fault::CutShort => request.line.starts_with("GET "),
            _ => true,
        }
    }
}

/// Which of the requests that a fault concerns it hits, counted from when the fault was set.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// Of every `of` requests, the first `hit`.
    Bursts {
        /// Requests that fail in a row.
        hit: u64,
        /// Requests until the next that fails.
        of: u64,
    },
    /// All from this one on.
    From(u64),
}

impl When {
    fn hits(self, number: u64) -> bool {
        match self {
            When::Bursts { hit, of } => number % of < hit,
            When::From(first) => number >= first,
        }
    }
}

/// A running proxy. Its threads end with the test process.
#[derive(Clone, Debug)]
pub struct Proxy {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    fault: Option<(Fault, When)>,
    seen: u64,
    hit: u64,
}

impl Proxy {
    /// Listens on a free port of loopback, before the server at `server`.
    pub fn start(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let proxy = Self { address: listener.local_addr()?, state: Arc::default() };
        let serving = proxy.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let serving = serving.clone();
                // A client that is killed in the middle of a request is no matter.
                thread::spawn(move || drop(serving.serve(client, server)));
            }
        });
        Ok(proxy)
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on `fault` happens `when`; counts begin at 0.
    pub fn set(&self, fault: Fault, when: When) {
        *self.state() = State { fault: Some((fault, when)), ..State::default() };
    }

    /// From now on all goes well; counts begin at 0.
    pub fn heal(&self) {
        *self.state() = State::default();
    }

    /// Requests that the fault concerns, or all where none is set, since the last change.
    pub fn seen(&self) -> u64 {
        self.state().seen
    }

    /// Requests that the fault has hit since it was set.
    pub fn hit(&self) -> u64 {
        self.state().hit
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault that hits `request`, if one does.
    fn fault(&self, request: &Request) -> Option<Fault> {
        let mut state = self.state();
        let fault = state.fault.filter(|(fault, _)| fault.applies(request));
        if state.fault.is_some() && fault.is_none() {
            return None;
        }
        state.seen += 1;
        let (fault, when) = fault?;
        let hits = when.hits(state.seen - 1);
        state.hit += u64::from(hits);
        hits.then_some(fault)
    }

    fn serve(&self, mut client: TcpStream, server: SocketAddr) -> io::Result<()> {
        let Some(request) = Request::read(&mut client)? else { return Ok(()) };
        match self.fault(&request) {
            None => client.write_all(&request.ask(server)?)?,
            Some(Fault::SlowDown) => client.write_all(&refusal(503, "SlowDown"))?,
            Some(Fault::TooSkewed) => client.write_all(&refusal(403, "RequestTimeTooSkewed"))?,
            Some(Fault::TooSlow) => client.write_all(&refusal(400, "RequestTimeout"))?,
            Some(Fault::Conflict(status)) => client.write_all(&conflict(status))?,
            Some(Fault::FalseConflict(status)) => {
                request.ask(server)?;
                client.write_all(&conflict(status))?;
            }
            Some(Fault::OtherDate) => client.write_all(&with_other_date(request.ask(server)?))?,
            Some(Fault::CutShort) => client.write_all(half(&request.ask(server)?))?,
            Some(Fault::Stall(time)) => {
                thread::sleep(time);
                client.write_all(&request.ask(server)?)?;
            }
            Some(Fault::Reset) => return reset(client),
            Some(Fault::LostAnswer) => {
                request.ask(server)?;
                return reset(client);
            }
        }
        client.shutdown(Shutdown::Both)
    }
}

/// One request as it came.
struct Request {
    line: String,
    head: Vec<u8>,
    body: Vec<u8>,
}

impl Request {
    /// `None` where the client opened a connection and never used it.
    fn read(client: &mut TcpStream) -> io::Result<Option<Self>> {
        let Some((head, mut body)) = read_head(client)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&head).into_owned();
        let length = header(&text, "content-length").and_then(|value| value.parse().ok()).unwrap_or(0);
        let begun = body.len();
        body.resize(length, 0);
        client.read_exact(&mut body[begun..])?;
        let line = text.lines().next().unwrap_or_default().to_string();
        Ok(Some(Self { line, head, body }))
    }

    fn is_conditional_put(&self) -> bool {
        let head = String::from_utf8_lossy(&self.head);
        self.line.starts_with("PUT ") && header(&head, "if-none-match").is_some()
    }

    /// The whole answer of the server.
    fn ask(&self, server: SocketAddr) -> io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(server)?;
        // This header is not signed; with it, the answer ends with the connection.
        let head = &self.head[..self.head.len() - 2];
        stream.write_all(&[head, b"Connection: close\r\n\r\n", &self.body].concat())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// A head with the blank line at its end, and what came of the body with it.
fn read_head(stream: &mut TcpStream) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
    let mut read = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(end) = end_of_head(&read) {
            let body = read.split_off(end);
            return Ok(Some((read, body)));
        }
        match stream.read(&mut buffer)? {
            0 if read.is_empty() => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => read.extend_from_slice(&buffer[..count]),
        }
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// An answer cut in the middle of its body; one without a body, in the middle of its head.
fn half(answer: &[u8]) -> &[u8] {
    let body = end_of_head(answer).unwrap_or(0);
    let end = if body == answer.len() { body / 2 } else { body + (answer.len() - body) / 2 };
    &answer[..end]
}

fn with_other_date(answer: Vec<u8>) -> Vec<u8> {
    let end = end_of_head(&answer).unwrap_or(0);
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let Some(date) = header(&head, "date") else { return answer };
    let head = head.replacen(date, "Thu, 01 Jan 1998 00:00:00 GMT", 1);
    [head.as_bytes(), &answer[end..]].concat()
}

fn refusal(status: u16, code: &str) -> Vec<u8> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>As told</Message></Error>");
    format!(
        "HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn conflict(status: u16) -> Vec<u8> {
    refusal(status, if status == 409 { "ConditionalRequestConflict" } else { "PreconditionFailed" })
}

/// Ends a connection by a reset, as a router does that has forgotten it.
fn reset(client: TcpStream) -> io::Result<()> {
    client.set_nonblocking(true)?;
    // The standard library cannot set how long a closed socket lingers.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async { tokio::net::TcpStream::from_std(client)?.set_zero_linger() })
}
