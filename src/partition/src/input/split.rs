//! Finds where records begin and end in a stream of JSON, without holding more than one of them.
//!
//! Knows brackets and strings, nothing of what records mean; the bytes of each record are checked by the real parser
//! afterwards, so a document that only looks balanced to this scanner is still refused.

use std::ops::Range;

/// Largest record: one that is larger is taken for a string that never ends.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

/// How records follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// One JSON array.
    Array,
    /// One record per line.
    Lines,
}

/// What is wrong with the framing, at a byte offset of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FramingProblem {
    /// Byte offset in the stream.
    pub offset: u64,
    /// What is wrong.
    pub problem: &'static str,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it should.
    Whole,
    /// Inside a record, or an array without its `]`.
    CutOff,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the `[`.
    Start,
    /// Before the first element: an element or `]`.
    First,
    /// After an element: `,` or `]`.
    Comma,
    /// After a comma: an element.
    Element,
    /// In an element.
    Object { depth: u32, string: bool, escape: bool },
    /// After the `]`.
    Done,
}

/// Cuts a stream into records. Feed it with [`Splitter::push`], drain it with [`Splitter::next_record`].
pub struct Splitter {
    framing: Framing,
    state: State,
    buffer: Vec<u8>,
    /// Stream offset of `buffer[0]`.
    base: u64,
    /// Position in `buffer` up to which the scanner came.
    position: usize,
    /// Where the current record begins.
    start: usize,
}

impl Splitter {
    /// A splitter at the start of a stream.
    pub fn new(framing: Framing) -> Self {
        Self { framing, state: State::Start, buffer: Vec::new(), base: 0, position: 0, start: 0 }
    }

    /// Counts bytes at the start of the stream that are no part of a record.
    pub fn skip(&mut self, count: usize) {
        self.base += count as u64;
    }

    /// Appends bytes; what came before the current record is dropped, so earlier ranges are void.
    pub fn push(&mut self, bytes: &[u8]) {
        let keep_from = match (self.framing, self.state) {
            (Framing::Lines, _) | (_, State::Object { .. }) => self.start,
            _ => self.position,
        };
        self.buffer.drain(..keep_from);
        self.base += keep_from as u64;
        self.position -= keep_from;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The bytes of a record.
    pub fn bytes(&self, record: Range<usize>) -> &[u8] {
        &self.buffer[record]
    }

    /// Stream offset of a position that [`Splitter::next_record`] gave.
    pub fn offset(&self, position: usize) -> u64 {
        self.base + position as u64
    }

    /// The next whole record in the buffer, or `None` where more bytes are needed.
    pub fn next_record(&mut self) -> Result<Option<Range<usize>>, FramingProblem> {
        let found = match self.framing {
            Framing::Array => self.next_element()?,
            Framing::Lines => self.next_line(),
        };
        if found.is_none() && self.buffer.len().saturating_sub(self.start) > MAX_RECORD_BYTES && self.in_record() {
            let problem = "a record of more than 64 MiB, or a string that does not end";
            return Err(FramingProblem { offset: self.offset(self.start), problem });
        }
        Ok(found)
    }

    /// At the end of the stream: how it ended, and for lines what stands after the last line break.
    pub fn finish(&mut self) -> (End, Option<Range<usize>>) {
        match self.framing {
            Framing::Array => (if self.state == State::Done { End::Whole } else { End::CutOff }, None),
            Framing::Lines => {
                let rest = self.start..self.buffer.len();
                let blank = self.buffer[rest.clone()].iter().all(u8::is_ascii_whitespace);
                (End::Whole, (!blank).then_some(rest))
            }
        }
    }

    fn in_record(&self) -> bool {
        self.framing == Framing::Lines || matches!(self.state, State::Object { .. })
    }

    fn next_line(&mut self) -> Option<Range<usize>> {
        loop {
            let end = self.position
                + memchr::memchr(b'\n', &self.buffer[self.position..]).or_else(|| {
                    self.position = self.buffer.len();
                    None
                })?;
            let line = self.start..end;
            self.position = end + 1;
            self.start = self.position;
            if !self.buffer[line.clone()].iter().all(u8::is_ascii_whitespace) {
                return Some(line);
            }
        }
    }

    fn next_element(&mut self) -> Result<Option<Range<usize>>, FramingProblem> {
        while self.position < self.buffer.len() {
            if let State::Object { depth, string, escape } = self.state {
                if let Some(end) = self.scan_object(depth, string, escape) {
                    return Ok(Some(self.start..end));
                }
                continue;
            }
            let byte = self.buffer[self.position];
            if !byte.is_ascii_whitespace() {
                self.state = self.between(byte)?;
                if let State::Object { .. } = self.state {
                    self.start = self.position;
                }
            }
            self.position += 1;
        }
        Ok(None)
    }

    /// The state after a byte that is not white space, outside of any element.
    fn between(&self, byte: u8) -> Result<State, FramingProblem> {
        match (self.state, byte) {
            (State::Start, b'[') => Ok(State::First),
            (State::First | State::Comma, b']') => Ok(State::Done),
            (State::Comma, b',') => Ok(State::Element),
            (State::First | State::Element, b'{') => Ok(State::Object { depth: 1, string: false, escape: false }),
            (state, _) => {
                let problem = match state {
                    State::Start => "expected a JSON array",
                    State::Comma => "expected `,` or `]` after a record",
                    State::Done => "expected nothing after the `]` of the array",
                    _ => "expected a JSON object as element of the array",
                };
                Err(FramingProblem { offset: self.offset(self.position), problem })
            }
        }
    }

    /// Goes on inside an object; its end, exclusive, when it is in the buffer.
    fn scan_object(&mut self, mut depth: u32, mut string: bool, mut escape: bool) -> Option<usize> {
        let buffer = &self.buffer;
        let mut at = self.position;
        while at < buffer.len() {
            if escape {
                escape = false;
                at += 1;
                continue;
            }
            let next = if string {
                memchr::memchr2(b'"', b'\\', &buffer[at..])
            } else {
                memchr::memchr3(b'"', b'{', b'}', &buffer[at..])
            };
            let Some(next) = next else {
                at = buffer.len();
                break;
            };
            at += next;
            match buffer[at] {
                b'\\' => escape = true,
                b'"' => string = !string,
                b'{' => depth += 1,
                _ => depth -= 1,
            }
            at += 1;
            if depth == 0 {
                self.position = at;
                self.state = State::Comma;
                return Some(at);
            }
        }
        self.position = at;
        self.state = State::Object { depth, string, escape };
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records, and how the stream ended, when it arrives in pieces of `piece` bytes.
    fn check(framing: Framing, text: &str, piece: usize) -> Result<(Vec<String>, End), FramingProblem> {
        let mut splitter = Splitter::new(framing);
        let mut records = Vec::new();
        for bytes in text.as_bytes().chunks(piece) {
            splitter.push(bytes);
            while let Some(record) = splitter.next_record()? {
                assert_eq!(splitter.bytes(record.clone())[0], text.as_bytes()[splitter.offset(record.start) as usize]);
                records.push(String::from_utf8_lossy(splitter.bytes(record)).into_owned());
            }
        }
        let (end, rest) = splitter.finish();
        records.extend(rest.map(|rest| String::from_utf8_lossy(splitter.bytes(rest)).into_owned()));
        Ok((records, end))
    }

    #[test]
    fn an_array_in_pieces_of_any_size() {
        let text = r#" [ {"a":"}\"{\\"} , {"b":[{"c":{}}]},{} ] "#;
        for piece in 1..=text.len() {
            let (records, end) = check(Framing::Array, text, piece).expect("well framed");
            assert_eq!(records, [r#"{"a":"}\"{\\"}"#, r#"{"b":[{"c":{}}]}"#, "{}"], "pieces of {piece}");
            assert_eq!(end, End::Whole);
        }
    }

    #[test]
    fn lines_in_pieces_of_any_size() {
        let text = "{\"a\":1}\r\n\n  \n{\"b\":2}\n{\"c\":3}";
        for piece in 1..=text.len() {
            let (records, end) = check(Framing::Lines, text, piece).expect("well framed");
            assert_eq!(records, ["{\"a\":1}\r", "{\"b\":2}", "{\"c\":3}"], "pieces of {piece}");
            assert_eq!(end, End::Whole);
        }
    }

    #[test]
    fn an_array_that_was_cut_off_gives_its_whole_records() {
        for text in [r#"[{"a":1},{"b":"x"#, r#"[{"a":1},"#, r#"[{"a":1}"#, r#"[{"a":1},{"b":"\"#] {
            let (records, end) = check(Framing::Array, text, 5).expect("well framed");
            assert_eq!((records.len(), end), (1, End::CutOff), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_array_of_objects_is_refused_with_its_offset() {
        let problem = |text| check(Framing::Array, text, 3).expect_err("badly framed");
        assert_eq!(problem(r#"[{} {}]"#).offset, 4);
        assert_eq!(problem(r#"[{}, 7]"#).offset, 5);
        assert_eq!(problem(r#"[{}] {}"#).offset, 5);
        assert_eq!(problem("7").offset, 0);
        assert_eq!(problem("[,{}]").offset, 1);
    }

    #[test]
    fn a_record_without_end_is_refused_before_memory_runs_out() {
        let mut splitter = Splitter::new(Framing::Array);
        splitter.push(b"[{\"a\":\"");
        let piece = vec![b'x'; 1 << 20];
        let problem = (0..70).find_map(|_| {
            splitter.push(&piece);
            splitter.next_record().err()
        });
        assert_eq!(problem.expect("refused").offset, 1);
    }
}
