//! The filter: by metadata, as WebText took pages that links with at least three votes led to (Radford et al.
//! 2019), and by what a text looks like. Owns the rules; refuses to know where documents come from.

use super::{Document, Dropped};
use serde_json::Value;

/// Rules, each left out unless it is set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    /// Keys whose number must be at least this.
    pub min: Vec<(String, f64)>,
    /// Fewest characters.
    pub min_characters: Option<usize>,
    /// Most characters.
    pub max_characters: Option<usize>,
    /// Smallest share of letters among characters that are no space.
    pub min_letters: Option<f64>,
    /// Largest share of lines that stand in the text before.
    pub max_repeated_lines: Option<f64>,
}

impl Filter {
    /// Whether a rule looks at other values than the text.
    pub(super) fn wants_fields(&self) -> bool {
        !self.min.is_empty()
    }

    pub(super) fn verdict(&self, document: &Document<'_>) -> Option<Dropped> {
        let (reason, detail) = self.reason(document)?;
        Some(Dropped { stage: "filter", reason, detail })
    }

    fn reason(&self, document: &Document<'_>) -> Option<(String, Option<String>)> {
        for (key, least) in &self.min {
            match document.fields.get(key).and_then(number) {
                Some(value) if value >= *least => {}
                Some(value) => return Some((format!("{key} below {least}"), Some(value.to_string()))),
                None => return Some((format!("no number {key}"), None)),
            }
        }
        let text = &*document.text;
        let characters = text.chars().count();
        let counted = Some(format!("{characters} characters"));
        if let Some(least) = self.min_characters.filter(|&least| characters < least) {
            return Some((format!("fewer than {least} characters"), counted));
        }
        if let Some(most) = self.max_characters.filter(|&most| characters > most) {
            return Some((format!("more than {most} characters"), counted));
        }
        if let Some(least) = self.min_letters {
            let share = letters(text);
            if share < least {
                return Some((format!("less than {least} letters"), Some(format!("{share:.2}"))));
            }
        }
        if let Some(most) = self.max_repeated_lines {
            let share = repeated_lines(text);
            if share > most {
                return Some((format!("more than {most} repeated lines"), Some(format!("{share:.2}"))));
            }
        }
        None
    }
}

/// A number, or a string that is one.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok())
}

fn letters(text: &str) -> f64 {
    let (mut letters, mut all) = (0u64, 0u64);
    for c in text.chars().filter(|c| !c.is_whitespace()) {
        letters += u64::from(c.is_alphabetic());
        all += 1;
    }
    letters as f64 / all.max(1) as f64
}

fn repeated_lines(text: &str) -> f64 {
    let mut seen = rustc_hash::FxHashSet::default();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let (mut repeated, mut all) = (0u64, 0u64);
    for line in lines {
        repeated += u64::from(!seen.insert(line));
        all += 1;
    }
    repeated as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(filter: &Filter, text: &str, fields: &str) -> Option<String> {
        let fields = serde_json::from_str(fields).unwrap();
        filter.verdict(&Document { text: text.into(), fields }).map(|dropped| dropped.reason)
    }

    #[test]
    fn webtexts_rule_keeps_documents_with_three_votes_or_more() {
        let filter = Filter { min: vec![("score".into(), 3.0)], ..Filter::default() };
        for (fields, expected) in [
            (r#"{"score": 3}"#, None),
            (r#"{"score": "17"}"#, None),
            (r#"{"score": 2}"#, Some("score below 3")),
            (r#"{"score": -4.5}"#, Some("score below 3")),
            (r#"{"votes": 9}"#, Some("no number score")),
            (r#"{"score": null}"#, Some("no number score")),
        ] {
            assert_eq!(reason(&filter, "text", fields).as_deref(), expected, "{fields}");
        }
    }

    #[test]
    fn rules_of_text_drop_what_is_too_short_too_long_no_language_or_a_litany() {
        let filter = Filter {
            min_characters: Some(10),
            max_characters: Some(100),
            min_letters: Some(0.6),
            max_repeated_lines: Some(0.3),
            ..Filter::default()
        };
        for (text, expected) in [
            ("A sentence of words.", None),
            ("Too short", Some("fewer than 10 characters")),
            (&*"word ".repeat(21), Some("more than 100 characters")),
            ("1234567890 + 12 = ?", Some("less than 0.6 letters")),
            ("home page\nhome page\nhome page\nnews", Some("more than 0.3 repeated lines")),
        ] {
            assert_eq!(reason(&filter, text, "{}").as_deref(), expected, "{text}");
        }
    }
}
