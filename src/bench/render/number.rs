//! Numbers as people read them: three digits, and a unit that needs no more.

use crate::result::Unit;

/// `value` to three significant digits; whole numbers keep all of theirs.
pub fn three_digits(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{}", value + 0.0);
    }
    // Rounded first: 9.996 is 10.0, not 10.00.
    let rounded = format!("{value:.2e}");
    let exponent: i32 = rounded.split('e').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    match exponent {
        -4..=9 => format!("{value:.*}", usize::try_from(2 - exponent).unwrap_or(0)),
        _ => rounded,
    }
}

/// The unit to show values of `unit` in, the smallest of which is `smallest`: what to divide by, and its symbol.
pub fn scale(unit: Unit, smallest: f64) -> (f64, &'static str) {
    let larger: &[(f64, &str)] = match unit {
        Unit::Milliseconds => &[(1e3, "s")],
        Unit::Nanoseconds => &[(1e6, "ms"), (1e3, "µs")],
        Unit::Kibibytes => &[(1024.0 * 1024.0, "GiB"), (1024.0, "MiB")],
        Unit::MebibytesPerSecond => &[(1024.0, "GiB/s")],
        Unit::PerSecond => &[(1e6, "million/s"), (1e3, "thousand/s")],
        Unit::Instructions => &[(1e6, "million instructions"), (1e3, "thousand instructions")],
        Unit::Cycles | Unit::Exits => &[],
    };
    let found = larger.iter().find(|(factor, _)| smallest >= *factor);
    found.copied().unwrap_or((1.0, unit.symbol()))
}

/// Puts texts of numbers below each other by their decimal points: all get the same length.
pub fn align(texts: &mut [String]) {
    let whole = |text: &str| text.find(['.', 'e']).unwrap_or(text.len());
    let before = texts.iter().map(|text| whole(text)).max().unwrap_or(0);
    let after = texts.iter().map(|text| text.len() - whole(text)).max().unwrap_or(0);
    for text in texts {
        let (left, right) = (before - whole(text), after - (text.len() - whole(text)));
        *text = format!("{:left$}{text}{:right$}", "", "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_are_shown() {
        for (value, text) in [
            (0.0, "0"),
            (-0.0, "0"),
            (0.3, "0.300"),
            (0.012345, "0.0123"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (99.96, "100"),
            (-1.2345, "-1.23"),
            (1234.5, "1234"),
            (16_400_000.0, "16400000"),
            (1e-7, "1.00e-7"),
            (1.5e12, "1.50e12"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(three_digits(value), text);
        }
    }

    #[test]
    fn units_follow_the_smallest() {
        assert_eq!(scale(Unit::Milliseconds, 900.0), (1.0, "ms"));
        assert_eq!(scale(Unit::Milliseconds, 1200.0), (1e3, "s"));
        assert_eq!(scale(Unit::Kibibytes, 3e6), (1048576.0, "GiB"));
        assert_eq!(scale(Unit::Cycles, 3e9), (1.0, "cycles"));
        assert_eq!(scale(Unit::Nanoseconds, f64::NAN), (1.0, "ns"));
    }

    #[test]
    fn points_stand_below_each_other() {
        let mut texts = ["0.300", "26.0", "310"].map(str::to_owned);
        align(&mut texts);
        assert_eq!(texts, ["  0.300", " 26.0  ", "310    "]);
    }
}
