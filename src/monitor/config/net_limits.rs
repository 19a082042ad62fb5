//! [`NetLimits`]: what a network device may carry in a second.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::text::{ParseError, Size};

/// Limits of a network device. Each holds each way by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetLimits {
    /// Bytes of frames, with Ethernet's header.
    pub bw: Option<Limit<Size>>,
    /// Frames.
    pub pps: Option<Limit<u64>>,
}

/// A rate, and what may pass at once after a rest: `RATE[/BURST]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit<T> {
    /// The rate.
    pub each_second: T,
    /// Absent: a tenth of a second's worth.
    burst: Option<T>,
}

/// What is counted.
trait Unit: FromStr + Copy + fmt::Display {
    const FORMS: &str;
    fn count(self) -> u64;
    fn of(count: u64) -> Self;
}

impl Unit for Size {
    const FORMS: &str = "bw=100M or bw=100M/1M (bytes a second, and at once)";
    fn count(self) -> u64 {
        self.bytes()
    }
    fn of(count: u64) -> Self {
        Self::from_bytes(count)
    }
}

impl Unit for u64 {
    const FORMS: &str = "pps=10000 or pps=10000/500 (frames a second, and at once)";
    fn count(self) -> u64 {
        self
    }
    fn of(count: u64) -> Self {
        count
    }
}

#[allow(private_bounds, reason = "there are these two units")]
impl<T: Unit> Limit<T> {
    /// What may pass at once.
    pub fn burst(&self) -> T {
        self.burst.unwrap_or_else(|| T::of((self.each_second.count() / 10).max(1)))
    }
}

impl<T: Unit> FromStr for Limit<T> {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let number = |part: &str| {
            let starts = part.starts_with(|c: char| c.is_ascii_digit());
            part.parse::<T>().ok().filter(|_| starts)
        };
        let (rate, burst) = text.split_once('/').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let wrong = || ParseError::new(format!("{text:?} is not a limit: {}", T::FORMS));
        let each_second = number(rate).ok_or_else(wrong)?;
        let burst = burst.map(|burst| number(burst).ok_or_else(wrong)).transpose()?;
        if [Some(each_second), burst].into_iter().flatten().any(|number| number.count() == 0) {
            return Err(ParseError::new(format!("a limit of {text} lets nothing pass")));
        }
        Ok(Self { each_second, burst })
    }
}

impl<T: Unit> Serialize for Limit<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.burst {
            None => serializer.collect_str(&self.each_second),
            Some(burst) => serializer.collect_str(&format_args!("{}/{burst}", self.each_second)),
        }
    }
}

impl<'de, T: Unit> Deserialize<'de> for Limit<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Value::deserialize(deserializer)? {
            Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse().map_err(de::Error::custom)
    }
}
