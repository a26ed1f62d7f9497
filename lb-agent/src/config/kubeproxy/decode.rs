//! From a document to typed fields: decoding as kube-proxy does it, strictly, and leniently where that fails.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    Invalid,
    fields::{self, Field, Kind, Use},
};

/// The value of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoded {
    Bool(bool),
    Int(i64),
    Number(f64),
    Text(String),
    Texts(Vec<String>),
    /// Nanoseconds, and how they are written.
    Duration(i128, String),
    /// Names of features.
    Switches(Vec<String>),
    /// Something that nobody looks into.
    Any(String),
}

/// What a document holds: fields that are set, and the paths of those that the type does not have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Document {
    fields: BTreeMap<&'static str, Decoded>,
    pub unknown: Vec<String>,
}

impl Document {
    pub fn decode(root: &Map<String, Value>) -> Result<Self, Invalid> {
        let mut document = Self::default();
        document.section("", root)?;
        Ok(document)
    }

    fn section(&mut self, above: &str, section: &Map<String, Value>) -> Result<(), Invalid> {
        for (key, value) in section {
            let path = if above.is_empty() { key.clone() } else { format!("{above}.{key}") };
            match (fields::find(&path), value) {
                (Some(_), Value::Null) => {}
                (Some(field), value) => {
                    self.fields.insert(field.path, decode(field, value)?);
                }
                (None, _) if !fields::is_section(&path) => self.unknown.push(path),
                (None, Value::Null) => {}
                (None, Value::Object(inner)) => self.section(&path, inner)?,
                (None, value) => return Err(Invalid::new(&path, value, "must be a mapping")),
            }
        }
        Ok(())
    }

    pub fn get(&self, path: &str) -> Option<&Decoded> {
        self.fields.get(path)
    }

    /// A text field; empty if it is not set, which means the same.
    pub fn text(&self, path: &str) -> &str {
        match self.get(path) {
            Some(Decoded::Text(text)) => text,
            _ => "",
        }
    }

    pub fn texts(&self, path: &str) -> &[String] {
        match self.get(path) {
            Some(Decoded::Texts(texts)) => texts,
            _ => &[],
        }
    }

    pub fn bool(&self, path: &str) -> Option<bool> {
        match self.get(path) {
            Some(Decoded::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    pub fn int(&self, path: &str) -> Option<i64> {
        match self.get(path) {
            Some(Decoded::Int(value)) => Some(*value),
            _ => None,
        }
    }

    /// Nanoseconds, and how they are written.
    pub fn duration(&self, path: &str) -> Option<(i128, &str)> {
        match self.get(path) {
            Some(Decoded::Duration(ns, text)) => Some((*ns, text)),
            _ => None,
        }
    }

    /// Fields without a meaning here that are set to something else than kube-proxy's default.
    pub fn ignored(&self) -> Vec<String> {
        let mut ignored = Vec::new();
        for (path, value) in &self.fields {
            let is_default = match fields::find(path).map(|f| f.usage) {
                Some(Use::Ignored(default)) => value.is_zero() || value.is(default),
                Some(Use::IgnoredPointer(default)) => value.is(default),
                Some(Use::Used) | None => true,
            };
            if let Decoded::Switches(names) = value {
                ignored.extend(names.iter().map(|name| format!("{path}.{name}")));
            } else if !is_default {
                ignored.push((*path).to_owned());
            }
        }
        ignored
    }
}

impl Decoded {
    fn is_zero(&self) -> bool {
        match self {
            Self::Bool(value) => !value,
            Self::Int(value) => *value == 0,
            Self::Number(value) => *value == 0.0,
            Self::Text(text) | Self::Any(text) => matches!(text.as_str(), "" | "0" | "\"0\"" | "[]" | "{}"),
            Self::Texts(texts) | Self::Switches(texts) => texts.is_empty(),
            Self::Duration(ns, _) => *ns == 0,
        }
    }

    fn is(&self, default: &str) -> bool {
        match self {
            Self::Bool(value) => default == value.to_string(),
            Self::Int(value) => default == value.to_string(),
            Self::Number(value) => default == value.to_string(),
            Self::Text(text) | Self::Any(text) => default == text,
            Self::Texts(_) | Self::Switches(_) => false,
            Self::Duration(ns, _) => go_duration(default) == Some(*ns),
        }
    }
}

fn decode(field: &Field, value: &Value) -> Result<Decoded, Invalid> {
    let wrong = |reason: &str| Invalid::new(field.path, value, reason);
    match (field.kind, value) {
        (Kind::Bool, Value::Bool(value)) => Ok(Decoded::Bool(*value)),
        (Kind::Bool, _) => Err(wrong("must be true or false")),
        (Kind::Int(min, max), value) => match value.as_i64() {
            Some(n) if (min..=max).contains(&n) => Ok(Decoded::Int(n)),
            _ => Err(wrong(&format!("must be an integer from {min} to {max}"))),
        },
        (Kind::Number, value) => value.as_f64().map(Decoded::Number).ok_or_else(|| wrong("must be a number")),
        (Kind::Text, Value::String(text)) => Ok(Decoded::Text(text.clone())),
        (Kind::Text, _) => Err(wrong("must be a string")),
        (Kind::Texts, Value::Array(items)) => texts(field.path, items),
        (Kind::Texts, _) => Err(wrong("must be a list of strings")),
        (Kind::DurationOrNanoseconds, Value::Number(n)) => match n.as_i64() {
            Some(ns) => Ok(Decoded::Duration(ns.into(), ns.to_string())),
            None => Err(wrong("must be a duration, or a number of nanoseconds")),
        },
        (Kind::Duration | Kind::DurationOrNanoseconds, value) => {
            let reason = "must be a duration in quotes, such as \"30s\" or \"1h0m0s\"";
            let text = value.as_str().ok_or_else(|| wrong(reason))?;
            let ns = go_duration(text).ok_or_else(|| wrong(reason))?;
            Ok(Decoded::Duration(ns, text.to_owned()))
        }
        (Kind::Switches, Value::Object(entries)) => switches(field.path, entries),
        (Kind::Switches, _) => Err(wrong("must be a mapping of names to true or false")),
        (Kind::Any, Value::String(text)) => Ok(Decoded::Any(text.clone())),
        (Kind::Any, value) => Ok(Decoded::Any(value.to_string())),
    }
}

fn texts(path: &str, items: &[Value]) -> Result<Decoded, Invalid> {
    let text = |(i, item): (usize, &Value)| match item {
        Value::String(text) => Ok(text.clone()),
        other => Err(Invalid::new(format!("{path}[{i}]"), other, "must be a string")),
    };
    items.iter().enumerate().map(text).collect::<Result<_, _>>().map(Decoded::Texts)
}

fn switches(path: &str, entries: &Map<String, Value>) -> Result<Decoded, Invalid> {
    match entries.iter().find(|(_, value)| !value.is_boolean()) {
        Some((name, value)) => Err(Invalid::new(format!("{path}.{name}"), value, "must be true or false")),
        None => Ok(Decoded::Switches(entries.keys().cloned().collect())),
    }
}

/// Nanoseconds of a duration as Go's `time.ParseDuration` reads it: decimal numbers, each with a unit, after one sign.
/// What does not fit into 63 bits is refused there as well.
pub fn go_duration(text: &str) -> Option<i128> {
    let (negative, mut rest) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut sum: i128 = 0;
    while !rest.is_empty() {
        let number_len = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let (number, after) = rest.split_at(number_len);
        let unit_len = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_len);
        sum = sum.checked_add(scaled(number, unit_ns(unit)?)?)?;
        rest = after;
    }
    (sum <= i64::MAX.into()).then_some(if negative { -sum } else { sum })
}

fn unit_ns(unit: &str) -> Option<i128> {
    Some(match unit {
        "ns" => 1,
        // Both letters that Go knows: U+00B5 and U+03BC.
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    })
}

/// `number`, digits with at most one point, times `unit`; what is left below a nanosecond is cut off.
fn scaled(number: &str, unit: i128) -> Option<i128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !is_number(fraction) {
        return None;
    }
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()?.into() };
    // More digits than these are below a nanosecond in every unit.
    let digits = &fraction[..fraction.len().min(15)];
    let part: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    let scale = 10_i128.pow(u32::try_from(digits.len()).ok()?);
    whole.checked_mul(unit)?.checked_add(part * unit / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cases of Go's own TestParseDuration (time/time_test.go) that a configuration could hold.
    #[test]
    fn durations_are_read_as_go_reads_them() {
        const S: i128 = 1_000_000_000;
        for (text, ns) in [
            ("0", 0),
            ("0s", 0),
            ("5s", 5 * S),
            ("1478s", 1478 * S),
            ("-5s", -5 * S),
            ("+5s", 5 * S),
            ("-0", 0),
            ("5.6s", 5 * S + 600_000_000),
            ("5.s", 5 * S),
            (".5s", 500_000_000),
            ("1.004s", 1_004_000_000),
            ("10ns", 10),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("13ms", 13_000_000),
            ("3h30m", 12_600 * S),
            ("10.5s4m", 250 * S + 500_000_000),
            ("1h0m0s", 3600 * S),
            ("24h0m0s", 86_400 * S),
            ("9223372036854775807ns", i64::MAX.into()),
        ] {
            assert_eq!(go_duration(text), Some(ns), "{text}");
        }
        for text in ["", "3", "-", "s", ".", "-.", ".s", "+.s", "1d", "1h ", "9223372036854775808ns", "1..5s"]
        {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }
}
