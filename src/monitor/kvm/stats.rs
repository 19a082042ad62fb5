//! KVM's own counters of a vCPU (KVM_GET_STATS_FD, Documentation/virt/kvm/api.rst, 4.134): exits by kind, and more, for anyone.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);

/// Bytes of kvm_stats_header, and of kvm_stats_desc without its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// The kernel has some hundred of them.
const MOST: u32 = 4096;

/// The counters of one vCPU. They can be read as long as this lives, also after the vCPU has gone.
#[derive(Debug)]
pub struct Counters(File);

impl Counters {
    pub(super) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the ioctl has no argument, and returns a new descriptor or an error.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now, and is nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Name and value of each simple counter (histograms are left out).
    ///
    /// # Errors
    /// The descriptor cannot be read, or what it says makes no sense.
    pub fn read(&self) -> io::Result<Vec<(String, u64)>> {
        let mut header = [0; HEADER];
        self.0.read_exact_at(&mut header, 0)?;
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let (name_size, count) = (word(&header, 4), word(&header, 8));
        let (descriptors, data) = (u64::from(word(&header, 16)), u64::from(word(&header, 20)));
        if count > MOST || name_size > 256 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "KVM's statistics are of an unknown form",
            ));
        }
        let size = DESCRIPTOR + name_size as usize;
        let mut table = vec![0; size * count as usize];
        self.0.read_exact_at(&mut table, descriptors)?;
        let mut counters = Vec::new();
        for descriptor in table.chunks_exact(size) {
            let values = u16::from_le_bytes([descriptor[6], descriptor[7]]);
            if values != 1 {
                continue;
            }
            let name = descriptor[DESCRIPTOR..].split(|byte| *byte == 0).next().unwrap_or_default();
            let mut value = [0; 8];
            self.0.read_exact_at(&mut value, data + u64::from(word(descriptor, 8)))?;
            counters.push((String::from_utf8_lossy(name).into_owned(), u64::from_le_bytes(value)));
        }
        Ok(counters)
    }
}
