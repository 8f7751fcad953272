//! Text with places for an example's fields: `{question}`. Owns the form; knows no examples.

use serde::Deserialize;
use std::str::FromStr;

/// Text with fields in it. `{name}` stands for a field, `{{` and `}}` for braces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(String),
}

impl Template {
    /// The fields, in order.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Field(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// The text with its fields filled.
    ///
    /// # Errors
    /// What `value_of` says of a field that it cannot give.
    pub fn fill<E>(&self, mut value_of: impl FnMut(&str) -> Result<String, E>) -> Result<String, E> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Field(name) => text.push_str(&value_of(name)?),
            }
        }
        Ok(text)
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Template, String> {
        let (mut parts, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let (brace, after) = (&rest[at..at + 1], &rest[at + 1..]);
            if let Some(after) = after.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            let name = after.split_once('}').filter(|_| brace == "{");
            let (name, after) = name.ok_or_else(|| {
                format!("{text:?} has a {brace} of its own; a field is {{name}}, braces are {{{{ and }}}}")
            })?;
            if name.is_empty() || name.contains('{') {
                return Err(format!("{text:?} has {{{name}}}, expected the name of a field in it"));
            }
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(Part::Field(name.to_string()));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(Template { parts })
    }
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Template, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(text: &str) -> Result<String, String> {
        let template: Template = text.parse()?;
        template.fill(|name| if name == "no" { Err("no such field".into()) } else { Ok(name.to_uppercase()) })
    }

    #[test]
    fn fields_are_filled_and_doubled_braces_are_braces() {
        assert_eq!(filled("Q: {question}\nA:{x}").unwrap(), "Q: QUESTION\nA:X");
        assert_eq!(filled("{{{a}}} {{b}}").unwrap(), "{A} {b}");
        assert_eq!(filled("").unwrap(), "");
        let template: Template = "{b} and {a}".parse().unwrap();
        assert_eq!(template.fields().collect::<Vec<_>>(), ["b", "a"]);
    }

    #[test]
    fn a_brace_that_opens_no_field_is_refused() {
        for (text, told) in [("a { b", "a { of its own"), ("a } b", "a } of its own"), ("{}", "the name")] {
            let error = filled(text).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
        assert_eq!(filled("{no}").unwrap_err(), "no such field");
    }
}
