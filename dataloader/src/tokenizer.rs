//! From bytes to token ids and back. Owns which tokenizers there are; refuses to know where text
//! comes from and where tokens go.
//!
//! A new tokenizer is a variant and its arms in this file; a large one keeps its tables in a file
//! of its own.

/// A tokenizer, known by its id and a digest of all that decides which ids it gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokenizer {
    /// Every byte is a token: ids 0-255, end-of-text 256. Reads any bytes, UTF-8 or not.
    Bytes,
}

impl Tokenizer {
    /// The ids that [`Tokenizer::from_id`] knows.
    pub const IDS: [&'static str; 1] = ["bytes"];

    /// The tokenizer of that id, if there is one.
    pub fn from_id(id: &str) -> Option<Tokenizer> {
        match id {
            "bytes" => Some(Tokenizer::Bytes),
            _ => None,
        }
    }

    /// The name that shards and manifests know it by.
    pub fn id(&self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
        }
    }

    /// Digest of all that decides which ids text becomes. The same id with another digest is another
    /// tokenizer.
    pub fn digest(&self) -> [u8; 32] {
        match self {
            Tokenizer::Bytes => {
                *blake3::hash(b"phalanx tokenizer bytes: byte b is id b, end of text is 256").as_bytes()
            }
        }
    }

    /// Number of token ids: every id is less than this.
    pub fn vocab_size(&self) -> usize {
        match self {
            Tokenizer::Bytes => 257,
        }
    }

    /// The id that stands after every document.
    pub fn end_of_text(&self) -> u32 {
        match self {
            Tokenizer::Bytes => 256,
        }
    }

    /// Appends the ids of `text` to `tokens`, without end-of-text: text never encodes to it, so a
    /// document cannot forge its own end.
    pub fn encode(&self, text: &[u8], tokens: &mut Vec<u32>) {
        match self {
            Tokenizer::Bytes => tokens.extend(text.iter().map(|&byte| u32::from(byte))),
        }
    }

    /// The bytes that ids stand for. End-of-text stands for none, so that decoding a data set gives
    /// back its documents end to end; an id outside the vocabulary becomes U+FFFD.
    pub fn decode(&self, tokens: &[u32]) -> Vec<u8> {
        match self {
            Tokenizer::Bytes => {
                let mut text = Vec::with_capacity(tokens.len());
                for &token in tokens {
                    match u8::try_from(token) {
                        Ok(byte) => text.push(byte),
                        Err(_) if token == self.end_of_text() => {}
                        Err(_) => text.extend("\u{FFFD}".bytes()),
                    }
                }
                text
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_round_trip() {
        let text: Vec<u8> = (0..=255).collect();
        let mut tokens = Vec::new();
        Tokenizer::Bytes.encode(&text, &mut tokens);
        assert_eq!(Tokenizer::Bytes.decode(&tokens), text);
    }

    #[test]
    fn end_of_text_decodes_to_nothing_and_a_foreign_id_to_the_replacement_character() {
        assert_eq!(Tokenizer::Bytes.decode(&[104, 256, 105]), b"hi");
        assert_eq!(Tokenizer::Bytes.decode(&[104, 257]), "h\u{FFFD}".as_bytes());
    }

    #[test]
    fn every_listed_id_leads_back_to_its_tokenizer() {
        for id in Tokenizer::IDS {
            let tokenizer = Tokenizer::from_id(id).unwrap();
            assert_eq!(tokenizer.id(), id);
            assert!((tokenizer.end_of_text() as usize) < tokenizer.vocab_size());
        }
        assert_eq!(Tokenizer::from_id("runes"), None);
    }
}
