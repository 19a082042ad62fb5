//! Names of Rust and C++ functions as their authors wrote them.

use std::fmt::{self, Write};

/// A longer name says less than the mangled one.
const LONGEST: usize = 300;

/// Whether `name` looks like a mangled one.
pub fn is_mangled(name: &str) -> bool {
    ["_R", "_Z", "__R", "__Z"].iter().any(|prefix| name.starts_with(prefix))
}

/// `name` as in its source where it is mangled, else as it is.
pub fn demangled(name: &str) -> String {
    if !is_mangled(name) || name.len() > 4 * LONGEST {
        return name.to_owned();
    }
    let mut text = Limited(String::new());
    let written = match rustc_demangle::try_demangle(name) {
        // Without the hash.
        Ok(rust) => write!(text, "{rust:#}").is_ok(),
        Err(_) => cpp_demangle::BorrowedSymbol::new(name.as_bytes())
            .is_ok_and(|cpp| cpp.structured_demangle(&mut text, &Default::default()).is_ok()),
    };
    if written && !text.0.is_empty() { text.0 } else { name.to_owned() }
}

/// A short mangled name can be long without end.
struct Limited(String);

impl Write for Limited {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        if self.0.len() + part.len() > LONGEST {
            return Err(fmt::Error);
        }
        self.0.push_str(part);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mangled_is_read_and_nothing_else() {
        for (name, wanted) in [
            ("vm_notify", "vm_notify"),
            ("_stext", "_stext"),
            ("_Zonder", "_Zonder"),
            ("_ZN4core3fmt5write17h0123456789abcdefE", "core::fmt::write"),
            ("_RNvCs1234_7mycrate3foo", "mycrate::foo"),
            ("_ZN6Serial3putEc", "Serial::put(char)"),
            ("_RNvNtCs1234_7mycrate6serial3put.llvm.123", "mycrate::serial::put"),
        ] {
            assert_eq!(demangled(name), wanted);
        }
        // Each template argument doubles what comes before it.
        let nested = (0..40).fold("i".to_owned(), |inner, _| format!("1AI{inner}S_E"));
        let bomb = format!("_Z1fv{nested}");
        assert_eq!(demangled(&bomb), bomb);
        let long = format!("_R{}", "x".repeat(1 << 20));
        assert_eq!(demangled(&long), long);
    }
}
