//! The host's facts as lines for people.

use crate::host::Host;

/// One line for the machine, one for its state when it was measured.
pub fn lines(host: &Host) -> [String; 2] {
    let place = if host.in_vm { "in a virtual machine" } else { "on bare metal, as far as its CPU tells" };
    let gib = host.memory as f64 / f64::from(1 << 30);
    let cpus = if host.cpus == 1 { "1 CPU".to_owned() } else { format!("{} CPUs", host.cpus) };
    let machine = format!("{}, {cpus}, {gib:.1} GiB, {}, {place}", host.cpu, host.kernel);
    let kvm = if host.kvm.is_empty() { "no KVM".to_owned() } else { format!("KVM: {}", host.kvm.join(", ")) };
    let hardware = if host.hardware_virtualization { "" } else { ", no hardware virtualization" };
    let governor =
        host.governor.as_ref().map_or("no frequency governor".to_owned(), |g| format!("governor {g}"));
    let clock = if host.repeatable_clock { ", repeatable clock (1 ns an instruction)" } else { "" };
    let (load, time, vmm) = (host.load, date(host.time), &host.vmm);
    [machine, format!("{kvm}{hardware}; {governor}; load {load:.2} before{clock}; {time} UTC; vmm {vmm}")]
}

/// The machine in a few words, to tell hosts apart.
pub fn short(host: &Host) -> String {
    format!("{}, {}", host.cpu, host.kernel)
}

/// "2026-11-21 07:15" of seconds since 1970.
pub fn date(seconds: u64) -> String {
    // The year 9999; what is later is no measurement.
    let seconds = seconds.min(253_402_300_799);
    // Days to a date, by eras of 400 years that begin in March (Hinnant, "chrono-compatible low-level date algorithms").
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, year) = if month < 10 { (month + 3, year) } else { (month - 9, year + 1) };
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{:04}-{month:02}-{day:02} {hour:02}:{minute:02}", year + era * 400)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_782_399, "2000-02-28 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (1_795_245_000, "2026-11-21 07:10"),
            (4_107_542_399, "2100-02-28 23:59"),
            (4_107_542_400, "2100-03-01 00:00"),
            (u64::MAX, "9999-12-31 23:59"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }
}
