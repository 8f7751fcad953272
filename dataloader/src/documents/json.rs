//! A line of JSON as a document: its text, and its other values where they are asked for. Owns what an
//! object must look like; refuses to know files.

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// The values of a document's object.
pub(crate) type Fields = serde_json::Map<String, serde_json::Value>;

/// The text under `key` of a line's object; other keys are passed over.
///
/// # Errors
/// What is wrong with the line.
pub(crate) fn parse<'a>(line: &'a [u8], key: &str) -> Result<Cow<'a, str>, String> {
    let mut json = serde_json::Deserializer::from_slice(line);
    let text = TextOf { key }.deserialize(&mut json).and_then(|text| json.end().map(|()| text));
    let text = text.map_err(|error| {
        let what = error.to_string();
        let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
        format!("{what}, at column {}", error.column())
    })?;
    text.ok_or_else(|| format!("the object has no {key:?}"))
}

/// Reads an object and keeps one value.
struct TextOf<'k> {
    key: &'k str,
}

impl<'de> DeserializeSeed<'de> for TextOf<'_> {
    type Value = Option<Cow<'de, str>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TextOf<'_> {
    type Value = Option<Cow<'de, str>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut text = None;
        while let Some(Borrowed(key)) = map.next_key()? {
            if key != self.key {
                map.next_value::<IgnoredAny>()?;
            } else if text.is_some() {
                return Err(A::Error::custom(format!("the object has {key:?} twice")));
            } else {
                text = map.next_value::<Option<Borrowed<'de>>>()?.map(|Borrowed(text)| text);
            }
        }
        Ok(text)
    }
}

/// A string that is borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Borrowed<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_its_text_with_escapes_resolved() {
        let line = br#"{"id": 7, "text": "one\ntwo \u00e4", "body": "other"}"#;
        assert_eq!(parse(line, "text").unwrap(), "one\ntwo \u{e4}");
        assert_eq!(parse(line, "body").unwrap(), "other");
    }

    #[test]
    fn a_bad_line_says_what_is_wrong_with_it() {
        for (line, what) in [
            (&b"{\"id\": 7}"[..], "no \"text\""),
            (b"{\"text\": null}", "no \"text\""),
            (b"{\"text\": 3}", "expected a string"),
            (b"{\"text\": \"open", "EOF"),
            (b"[1, 2]", "invalid"),
            (b"{\"text\": \"\xff\"}", "unicode"),
            (b"{\"text\": \"a\"} {}", "trailing"),
            (b"{\"text\": \"\\ud800\"}", "escape"),
            (b"{\"text\": \"a\", \"text\": \"b\"}", "twice"),
        ] {
            let error = parse(line, "text").unwrap_err();
            assert!(error.contains(what), "{}: {error}", String::from_utf8_lossy(line));
        }
    }
}
