//! A disk that comes and goes for minutes, and in Debian's other kernels: `make plug-whole`.

use crate::guest::available;
use crate::plug::rounds;

#[test]
#[ignore = "minutes: make plug-whole"]
fn whole_rounds() {
    if available("hot plug, 600 rounds") {
        rounds("stock", 600);
    }
}

#[test]
#[ignore = "minutes, and other kernels: make plug-whole"]
fn whole_kernels() {
    if available("hot plug, kernels") {
        ["cloud-6.12", "generic-6.1", "generic-6.12"].into_iter().for_each(|kernel| rounds(kernel, 10));
    }
}
