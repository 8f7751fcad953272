//! A web server for numbers: GET and HEAD of small documents, one request a connection, and nobody who is
//! connected can hold up anything but himself.
//!
//! There are at most [`MOST_CONNECTIONS`] at a time, each with a thread of its own, and each is over after
//! [`PATIENCE`], whatever the other side does or leaves undone. What more come are told to come again. So memory
//! is bounded, and a client that never reads costs one small thread for a few seconds.
//!
//! Requests are parsed by `httparse`, which hyper uses too. Tokio with axum or hyper would be another forty
//! crates, and 42 s of building on two cores, for a page that few people at a time look at.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Connections at a time.
const MOST_CONNECTIONS: usize = 48;

/// How long a connection may take, from the first byte to the last.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 8 });

/// Longest request, bytes, and most headers.
const MOST_REQUEST_BYTES: usize = 8 << 10;
const MOST_HEADERS: usize = 64;

/// Stack of a connection's thread.
const STACK_BYTES: usize = 256 << 10;

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    status: u16,
    content_type: &'static str,
    body: Vec<u8>,
}

impl Reply {
    /// 200, with a document of this type.
    pub fn of(content_type: &'static str, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status: 200, content_type, body: body.into() }
    }

    /// What went wrong, in a line.
    pub fn error(status: u16, what: &str) -> Reply {
        Reply { status, content_type: "text/plain; charset=utf-8", body: format!("{what}\n").into() }
    }

    /// The head, with what keeps browsers from guessing, storing, and asking anybody else.
    fn head(&self) -> String {
        let allow = if self.status == 405 { "Allow: GET, HEAD\r\n" } else { "" };
        format!(
            "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\
             Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n\
             Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
             connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'\r\n{allow}\r\n",
            self.status,
            reason(self.status),
            self.content_type,
            self.body.len(),
        )
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Error",
    }
}

/// The metrics of some registries in Prometheus' text format. What belongs together has one name, so one
/// registry.
pub fn exposition(registries: &[&prometheus::Registry]) -> Reply {
    let families: Vec<_> = registries.iter().flat_map(|registry| registry.gather()).collect();
    match prometheus::TextEncoder::new().encode_to_string(&families) {
        Ok(text) => Reply::of("text/plain; version=0.0.4; charset=utf-8", text),
        Err(error) => Reply::error(500, &format!("metrics cannot be written: {error}")),
    }
}

/// A server; goes on as long as the process.
#[derive(Debug, Clone, Copy)]
pub struct Server {
    address: SocketAddr,
}

impl Server {
    /// Listens at `address`, or, where its port is taken, at another one of the same interface; then the
    /// second value says why.
    ///
    /// # Errors
    /// An address that is none of this machine's; no thread.
    pub fn start(
        address: SocketAddr,
        answer: impl Fn(&str) -> Reply + Send + Sync + 'static,
    ) -> io::Result<(Server, Option<io::Error>)> {
        let (listener, taken) = match TcpListener::bind(address) {
            Ok(listener) => (listener, None),
            Err(error) if address.port() == 0 => return Err(error),
            Err(error) => (TcpListener::bind((address.ip(), 0))?, Some(error)),
        };
        let server = Server { address: listener.local_addr()? };
        let answer: Arc<Answer> = Arc::new(answer);
        std::thread::Builder::new().name("http".into()).spawn(move || accept(&listener, &answer))?;
        Ok((server, taken))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// From a path, with its query if it has one, to what is there.
type Answer = dyn Fn(&str) -> Reply + Send + Sync;

fn accept(listener: &TcpListener, answer: &Arc<Answer>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, or gone before it was taken.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MOST_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            let reply = Reply::error(503, "too many connections");
            let _ = stream.set_nonblocking(true).and_then(|()| (&stream).write_all(reply.head().as_bytes()));
            continue;
        }
        let (counted, answer) = (Counted(Arc::clone(&open)), Arc::clone(answer));
        let serve = move || {
            let _counted = counted;
            let _ = converse(&stream, &*answer); // who is gone is not told so
        };
        // Without a thread the connection is closed, and the count goes back with it.
        let _ = std::thread::Builder::new().name("http".into()).stack_size(STACK_BYTES).spawn(serve);
    }
}

/// A connection, while it is open.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(stream: &TcpStream, answer: &Answer) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let (reply, with_body) = match read_request(stream, deadline)? {
        Ok(Request { target, head }) => (answer(&target), !head),
        Err(refusal) => (refusal, true),
    };
    // A moment is left for the answer to somebody whose time is over.
    let deadline = deadline.max(Instant::now() + Duration::from_millis(200));
    write_by(stream, reply.head().as_bytes(), deadline)?;
    if with_body {
        write_by(stream, &reply.body, deadline)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // What was sent beyond the request is read, for otherwise the system takes the answer back.
    let mut rest = [0; 1024];
    for _ in 0..64 {
        if wait(deadline.min(Instant::now() + Duration::from_millis(500)), |left| {
            stream.set_read_timeout(left)
        })
        .and_then(|()| (&*stream).read(&mut rest))
        .is_ok_and(|read| read > 0)
        {
            continue;
        }
        break;
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Request {
    target: String,
    head: bool,
}

/// The request, or what it is refused with.
fn read_request(mut stream: &TcpStream, deadline: Instant) -> io::Result<Result<Request, Reply>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let read =
            wait(deadline, |left| stream.set_read_timeout(left)).and_then(|()| stream.read(&mut buffer));
        match read {
            Ok(0) => return Ok(Err(Reply::error(400, "the request breaks off"))),
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) if is_timeout(&error) => {
                return Ok(Err(Reply::error(408, "the request takes too long")));
            }
            Err(error) => return Err(error),
        }
        if let Some(parsed) = parse(&bytes) {
            return Ok(parsed);
        }
    }
}

/// None while it is not complete.
fn parse(bytes: &[u8]) -> Option<Result<Request, Reply>> {
    let too_long = || Reply::error(431, "the request is too long");
    if bytes.len() > MOST_REQUEST_BYTES {
        return Some(Err(too_long()));
    }
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => None,
        Ok(httparse::Status::Complete(_)) => Some(match (request.method, request.path) {
            (Some(method @ ("GET" | "HEAD")), Some(path)) if path.starts_with('/') => {
                Ok(Request { target: path.to_string(), head: method == "HEAD" })
            }
            (Some("GET" | "HEAD"), _) => Err(Reply::error(400, "the path begins with no slash")),
            _ => Err(Reply::error(405, "only GET and HEAD")),
        }),
        Err(httparse::Error::TooManyHeaders) => Some(Err(too_long())),
        Err(error) => Some(Err(Reply::error(400, &format!("no HTTP request: {error}")))),
    }
}

/// Writes all, or fails when the time is over; a system's time-out alone starts anew with each byte taken.
fn write_by(mut stream: &TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        wait(deadline, |left| stream.set_write_timeout(left))?;
        match stream.write(bytes)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => bytes = &bytes[written..],
        }
    }
    Ok(())
}

fn wait(deadline: Instant, set: impl Fn(Option<Duration>) -> io::Result<()>) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { set(Some(left)) }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> SocketAddr {
        let answer = |path: &str| match path {
            "/metrics" => Reply::of("text/plain", "phalanx_loss 1\n"),
            "/large" => Reply::of("text/plain", vec![b'x'; 32 << 20]),
            _ => Reply::error(404, "nothing is here"),
        };
        Server::start("127.0.0.1:0".parse().unwrap(), answer).unwrap().0.address()
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE * 2)).unwrap();
        stream
    }

    /// What comes back for these bytes.
    fn ask(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = connect(address);
        let _ = stream.write_all(bytes); // it may be refused half-way
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn get(address: SocketAddr, path: &str) -> String {
        ask(address, format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n").as_bytes())
    }

    #[test]
    fn a_document_is_answered_whole_and_a_head_without_it() {
        let address = server();
        let answer = get(address, "/metrics");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nphalanx_loss 1\n"));
        let head = ask(address, b"HEAD /metrics HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 15\r\n") && head.ends_with("\r\n\r\n"), "{head}");
        assert!(get(address, "/other").starts_with("HTTP/1.1 404 "));
    }

    #[test]
    fn garbage_is_refused_with_a_code_that_says_so() {
        let address = server();
        let long =
            [b"GET / HTTP/1.1\r\nA: ".as_slice(), &[b'a'; MOST_REQUEST_BYTES * 4], b"\r\n\r\n"].concat();
        let headers =
            [b"GET / HTTP/1.1\r\n".as_slice(), &b"A: b\r\n".repeat(MOST_HEADERS + 1), b"\r\n"].concat();
        let cases: [(&[u8], u16); 7] = [
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
            (b"hello\r\n\r\n", 400),
            (b"GET metrics HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/9.7\r\n\r\n", 400),
            (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
            (&long, 431),
            (&headers, 431),
        ];
        for (bytes, code) in cases {
            let answer = ask(address, bytes);
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{code}: {answer}");
        }
        assert!(get(address, "/metrics").contains("phalanx_loss 1"), "and it still answers");
    }

    #[test]
    fn clients_that_never_read_or_never_ask_leave_room_for_others_and_are_ended() {
        let address = server();
        let mut stuck: Vec<TcpStream> = (0..MOST_CONNECTIONS / 2).map(|_| connect(address)).collect();
        for stream in stuck.iter_mut().take(8) {
            stream.write_all(b"GET /large HTTP/1.1\r\n\r\n").unwrap();
        }
        assert!(get(address, "/metrics").contains("phalanx_loss 1"));
        // More than there is room for: refused, and not queued.
        stuck.extend((0..MOST_CONNECTIONS).map(|_| connect(address)));
        let refused = stuck.last_mut().unwrap();
        let mut answer = Vec::new();
        let _ = refused.read_to_end(&mut answer);
        assert!(answer.starts_with(b"HTTP/1.1 503 "), "{}", String::from_utf8_lossy(&answer));
        // Who never asked is told so when his time is over, and then there is room again.
        let mut told = Vec::new();
        let _ = stuck[MOST_CONNECTIONS / 4].read_to_end(&mut told);
        assert!(told.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&told));
        let began = Instant::now();
        while !get(address, "/metrics").contains("phalanx_loss 1") {
            assert!(began.elapsed() < PATIENCE, "still no room");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    #[test]
    fn a_port_that_is_taken_is_replaced_by_a_free_one() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let first = server();
        let (second, why) = Server::start(first, |_| Reply::error(404, "")).unwrap();
        assert_eq!(why.unwrap().kind(), io::ErrorKind::AddrInUse);
        assert!(second.address().ip() == first.ip() && second.address() != first && taken != first);
        assert!(Server::start("192.0.2.1:0".parse().unwrap(), |_| Reply::error(404, "")).is_err());
    }
}
