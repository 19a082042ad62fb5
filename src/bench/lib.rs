//! `vmm bench`: virtual machines against containers and other monitors, on the user's own machine.
//!
//! [`suites`] say what is compared, [`rivals`] how each contender is started, [`measure`] takes the samples and judges
//! them, [`result`] holds them, [`render`] shows them; [`earlier`] reads them back, [`baseline`] holds two against each
//! other. [`floor`] is what the kernel takes for the least VM. [`command`] is the command line; `vmm bench` only runs this program.

pub mod baseline;
pub mod command;
pub mod earlier;
pub mod elf;
pub mod floor;
pub mod host;
pub mod measure;
pub mod render;
pub mod result;
pub mod rivals;
pub mod sandbox;
pub mod suites;
pub mod work;
