//! Comparing versions as the UAPI group's Version Format Specification says.

use core::cmp::Ordering;

/// Which of two versions is the newer one.
pub fn compare(mut a: &[u8], mut b: &[u8]) -> Ordering {
    loop {
        (a, b) = (skip(a), skip(b));
        match lower(&mut a, &mut b, b'~') {
            Ordering::Equal => {}
            decided => return decided,
        }
        match (a.is_empty(), b.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        for mark in [b'-', b'^', b'.'] {
            match lower(&mut a, &mut b, mark) {
                Ordering::Equal => {}
                decided => return decided,
            }
        }
        let number = |rest: &[u8]| rest.first().is_some_and(u8::is_ascii_digit);
        let order = if number(a) || number(b) {
            let (x, y) = (zeros(take(&mut a, u8::is_ascii_digit)), zeros(take(&mut b, u8::is_ascii_digit)));
            x.len().cmp(&y.len()).then(x.cmp(y))
        } else {
            take(&mut a, u8::is_ascii_alphabetic).cmp(take(&mut b, u8::is_ascii_alphabetic))
        };
        if order.is_ne() {
            return order;
        }
    }
}

/// Leaves out what has no meaning in a version.
fn skip(text: &[u8]) -> &[u8] {
    let known = |byte: &u8| byte.is_ascii_alphanumeric() || b"-.~^".contains(byte);
    text.get(text.iter().position(known).unwrap_or(text.len())..).unwrap_or(&[])
}

/// If only one of both begins with `mark`, that one is lower; if both do, both go on behind it.
fn lower(a: &mut &[u8], b: &mut &[u8], mark: u8) -> Ordering {
    match (a.split_first(), b.split_first()) {
        (Some((x, rest_a)), Some((y, rest_b))) if *x == mark && *y == mark => {
            (*a, *b) = (rest_a, rest_b);
            Ordering::Equal
        }
        (Some((x, _)), _) if *x == mark => Ordering::Less,
        (_, Some((y, _))) if *y == mark => Ordering::Greater,
        _ => Ordering::Equal,
    }
}

/// Takes the longest beginning that `of` accepts.
fn take<'a>(from: &mut &'a [u8], of: fn(&u8) -> bool) -> &'a [u8] {
    let end = from.iter().position(|byte| !of(byte)).unwrap_or(from.len());
    let (taken, rest) = from.split_at(end);
    *from = rest;
    taken
}

fn zeros(digits: &[u8]) -> &[u8] {
    digits.get(digits.iter().position(|digit| *digit != b'0').unwrap_or(digits.len())..).unwrap_or(&[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_the_specification_orders_them() {
        // The specification's own examples, each lower than the next.
        let rising = [
            "~",
            "",
            "a",
            "122.1",
            "123~rc1-1",
            "123",
            "123-a",
            "123-a.1",
            "123-1",
            "123-1.1",
            "123^post1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124-1",
        ];
        for pair in rising.windows(2) {
            assert_eq!(compare(pair[0].as_bytes(), pair[1].as_bytes()), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1].as_bytes(), pair[0].as_bytes()), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare(b"6.1.0-9-amd64", b"6.1.0-10-amd64"), Ordering::Less);
        assert_eq!(compare(b"6.01_", b"6.1"), Ordering::Equal);
    }
}
