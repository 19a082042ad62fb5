//! The structure that `src/monitor/lib.rs` draws, held against the code: layers, where `unsafe` may stand, file headers.
//! What one crate may use of another is cargo's to enforce. The pages of the documentation are held against the tree, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The monitor's modules by layer: one uses only its own layer and those before it.
const LAYERS: [&[&str]; 9] = [
    &[
        "threads",
        "event_loop",
        "poller",
        "timer",
        "listener",
        "state",
        "config",
        "guest_log",
        "output",
        "planted",
        "printable",
        "recorder",
        "runtime_dir",
        "sandbox",
    ],
    &["memory", "vm", "bus", "hyperv"],
    &["vhost", "disk", "net", "vsock", "chardev", "share", "backends"],
    &["kvm"],
    &["legacy", "pci", "virtio"],
    &["boot", "vcpu"],
    &["machine"],
    &["snapshot"],
    &["session", "api", "pool"],
];

/// Edges that the layers would allow and the design does not: device models know the `Vm` trait, never KVM, and
/// never each other's family.
const FORBIDDEN: [(&str, &str); 21] = [
    ("legacy", "kvm"),
    ("pci", "kvm"),
    ("virtio", "kvm"),
    ("legacy", "virtio"),
    ("virtio", "legacy"),
    ("legacy", "pci"),
    ("pci", "legacy"),
    ("pci", "virtio"),
    ("disk", "chardev"),
    ("chardev", "disk"),
    ("net", "disk"),
    ("disk", "net"),
    ("net", "chardev"),
    ("chardev", "net"),
    ("vsock", "net"),
    ("net", "vsock"),
    ("vsock", "chardev"),
    ("chardev", "vsock"),
    ("share", "disk"),
    ("share", "net"),
    ("vcpu", "boot"),
];

/// Edges upward that are part of the design: sizes and limits are the layout's to know.
const ALLOWED: [(&str, &str); 1] = [("config", "memory")];

/// Where `unsafe` may stand: crate and module.
const UNSAFE: [(&str, &str); 13] = [
    ("monitor", "recorder"),
    ("monitor", "memory"),
    ("monitor", "kvm"),
    ("monitor", "disk"),
    ("monitor", "vhost"),
    ("monitor", "net"),
    ("monitor", "snapshot"),
    ("monitor", "share"),
    ("monitor", "sandbox"),
    ("bench", "sandbox"),
    ("bench", "floor"),
    ("cli", "slack"),
    ("cli", "apart"),
];

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// A source file below `src`, and where it belongs.
struct Source {
    path: PathBuf,
    package: String,
    module: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut paths = Vec::new();
    files(root, &mut paths);
    assert!(paths.len() > 100, "found only {paths:?}");
    let source = |path: PathBuf| {
        let relative = path.strip_prefix(root).unwrap().to_owned();
        let mut parts = relative.components().map(|part| part.as_os_str().to_str().unwrap().to_owned());
        let (package, module) =
            (parts.next().unwrap(), parts.next().unwrap().trim_end_matches(".rs").to_owned());
        Source { text: fs::read_to_string(&path).unwrap(), path: relative, package, module }
    };
    paths.into_iter().map(source).collect()
}

fn code(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules that a file names after `crate::`, also in `crate::{a, b::c}`.
fn uses(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, marker) in text.match_indices("crate::") {
        if text[..at].ends_with('$') || text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &text[at + marker.len()..];
        let word = |s: &str| s.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut start = true;
            for (i, c) in group.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => start = true,
                    c if start && !c.is_whitespace() => {
                        found.push(word(&group[i..]));
                        start = false;
                    }
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            found.push(word(rest));
        }
    }
    found
}

#[test]
fn the_reader_of_uses_reads() {
    let text = "use crate::a::B; use crate::{c, d::{e, f}, g}; x::crate::no; let x = crate::h::I;";
    assert_eq!(uses(text), ["a", "c", "d", "g", "no", "h"]);
}

#[test]
fn the_monitors_modules_use_only_their_layer_and_those_below() {
    let layer: BTreeMap<_, _> =
        LAYERS.iter().enumerate().flat_map(|(n, modules)| modules.iter().map(move |m| (*m, n))).collect();
    let mut wrong = Vec::new();
    let outside = ["lib", "build"];
    let monitor = sources().into_iter().filter(|s| s.package == "monitor" && !outside.contains(&&*s.module));
    for Source { path, module, text, .. } in monitor {
        let Some(own) = layer.get(module.as_str()) else {
            wrong.push(format!("{}: module {module} has no layer", path.display()));
            continue;
        };
        for used in uses(&code(&text)) {
            let Some(other) = layer.get(used.as_str()) else { continue };
            let pair = (module.as_str(), used.as_str());
            if (other > own && !ALLOWED.contains(&pair)) || FORBIDDEN.contains(&pair) {
                wrong.push(format!("{}: {module} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What `virtio` is made of beside devices.
const VIRTIO_CORE: [&str; 8] =
    ["core", "device", "doorbells", "mmio", "pci", "queue", "testing", "transport"];

/// To add one is its own file and `virtio/mod.rs` (and a subject of the tests), because nothing else knows
/// it.
#[test]
fn a_virtio_device_is_known_to_its_own_file_and_the_list_alone() {
    let all = sources();
    let list = all.iter().find(|source| source.path.ends_with("monitor/virtio/mod.rs")).unwrap();
    let modules = list.text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    let devices: Vec<_> = modules.filter(|module| !VIRTIO_CORE.contains(module)).collect();
    assert!(devices.len() >= 3, "found only {devices:?}");
    let mut wrong = Vec::new();
    for Source { path, module, text, .. } in &all {
        let text = code(text);
        for device in &devices {
            let own = [format!("{device}.rs"), format!("{device}/"), "mod.rs".to_owned()];
            let own = own.map(|file| format!("monitor/virtio/{file}"));
            if path.ends_with("virtio/pci/tests.rs") {
                // It needs some device.
                continue;
            }
            let inside = module == "virtio" && text.contains(&format!("super::{device}"));
            if !own.iter().any(|own| path.to_str().unwrap().starts_with(own))
                && (inside || text.contains(&format!("virtio::{device}")))
            {
                wrong.push(format!("{}: {device}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stands_only_where_the_design_says() {
    let is_unsafe = |line: &str| {
        line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
            && !line.contains('"')
    };
    let allowed = |s: &Source| UNSAFE.contains(&(s.package.as_str(), s.module.as_str()));
    let found = sources().into_iter().filter(|s| !allowed(s) && code(&s.text).lines().any(is_unsafe));
    let wrong: Vec<_> = found.map(|s| s.path.display().to_string()).collect();
    assert!(wrong.is_empty(), "unsafe in {}", wrong.join(", "));
}

/// What KVM's interface has for x86-64 alone, as the bindings call it.
const X86: [&str; 12] = [
    "X86", "regs", "kvm_msr", "get_msrs", "set_msrs", "lapic", "kvm_pi", "pit2", "irqchip_", "cpuid2",
    "_tsc_", "hyperv.",
];

#[test]
fn what_kvm_has_for_x86_alone_is_in_the_folder_of_that_name() {
    let all = sources();
    let kvm = all.iter().filter(|s| s.package == "monitor" && s.module == "kvm");
    let (there, elsewhere): (Vec<_>, Vec<_>) = kvm.partition(|s| s.path.starts_with("monitor/kvm/x86_64"));
    for name in X86 {
        assert!(there.iter().any(|s| code(&s.text).contains(name)), "{name} is in no file of kvm/x86_64");
    }
    let mut wrong = Vec::new();
    for Source { path, text, .. } in elsewhere {
        let code = code(text);
        // The folder's own modules are named where they are shown to the other modules.
        let lines = code.lines().filter(|line| !line.contains("x86_64::"));
        let found = lines.filter(|line| X86.iter().any(|name| line.contains(name)));
        wrong.extend(found.map(|line| format!("{}: {}", path.display(), line.trim())));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Words that only x86-64 has, as parts of names: `kvm_sregs` has one, and `MsrRead`.
const X86_WORDS: [&str; 21] = [
    "apic",
    "bzimage",
    "cpuid",
    "cr0",
    "cr3",
    "cr4",
    "dr6",
    "e820",
    "efer",
    "gdt",
    "idt",
    "lapic",
    "msr",
    "msrs",
    "multiboot",
    "pio",
    "pvh",
    "regs",
    "rflags",
    "rip",
    "sregs",
];

/// The monitor's files that know x86 and are in no folder of that name, and why. `legacy` is a PC's devices, all of it.
const X86_ELSEWHERE: [(&str, &str); 8] = [
    (
        "boot/error.rs",
        "one list of what users read: a kernel without an entry point for PVH, or for Multiboot",
    ),
    ("bus.rs", "ports are one of two places where a device may be"),
    ("kvm/exit.rs", "one enum of all exits, for one match in dispatch"),
    ("machine/build.rs", "the assembly, top to bottom in one place: the machine is a PC"),
    ("machine/inventory.rs", "the one list of a machine's parts: the machine is a PC"),
    ("recorder/event.rs", "kinds and fields of events have numbers and places in files"),
    ("vcpu/dispatch.rs", "one match over all exits"),
    ("vcpu/observe.rs", "one match over all exits, and the fields of events"),
];

/// The words of the names in `text`, in lower case.
fn words(text: &str) -> Vec<String> {
    let mut apart = String::new();
    for c in text.chars() {
        if c.is_ascii_uppercase() && apart.ends_with(|before: char| before.is_ascii_lowercase()) {
            apart.push(' ');
        }
        apart.push(c);
    }
    let words = apart.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_ascii_lowercase).collect()
}

#[test]
fn the_reader_of_words_reads() {
    assert_eq!(words("Exit::MsrRead { KVM_GET_SREGS, deny_msrs(cr0) }")[..3], ["exit", "msr", "read"]);
    assert_eq!(words("KVM_GET_SREGS, deny_msrs(cr0)"), ["kvm", "get", "sregs", "deny", "msrs", "cr0"]);
}

#[test]
fn the_monitor_knows_x86_in_folders_of_that_name() {
    let all = sources();
    let monitor = all.iter().filter(|s| s.package == "monitor" && !s.path.ends_with("tests.rs"));
    let is_home = |s: &&Source| s.path.iter().any(|part| part == "x86_64" || part == "x86_64.rs");
    let (homes, others): (Vec<_>, Vec<_>) = monitor.partition(is_home);
    let found = |s: &Source| {
        let code = code(s.text.split("#[cfg(test)]").next().unwrap_or_default());
        // What a module shows of its folder is named where it shows it.
        let lines = code.lines().filter(|line| !line.contains("x86_64::"));
        let words = lines.flat_map(words).filter(|word| X86_WORDS.contains(&&**word));
        words.collect::<BTreeSet<_>>()
    };
    let known: BTreeSet<_> = homes.iter().flat_map(|s| found(s)).collect();
    for word in X86_WORDS {
        assert!(
            known.contains(word),
            "{word} is in no folder x86_64: the rule looks for a word that nobody uses"
        );
    }
    let mut wrong = Vec::new();
    for source in others.iter().filter(|s| s.module != "legacy") {
        let path = source.path.strip_prefix("monitor").unwrap();
        let is_listed = X86_ELSEWHERE.iter().any(|(file, _)| path == Path::new(file));
        let words = found(source);
        if words.is_empty() == is_listed {
            wrong.push(format!("{}: {words:?}, on the list: {is_listed}", path.display()));
        }
        if source.text.contains("pub mod x86_64;") {
            wrong.push(format!("{}: shows all of its folder", path.display()));
        }
    }
    for (file, _) in X86_ELSEWHERE {
        if !others.iter().any(|s| s.path == Path::new("monitor").join(file)) {
            wrong.push(format!("{file}: on the list, but not there"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_command_line_knows_flags() {
    // Settings are written `mem=1G` elsewhere; the command line makes an option of that. Tests may say what they like.
    let flag = |line: &str| {
        let mut rests = line.match_indices("--").map(|(at, _)| &line[at + 2..]);
        rests.any(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()))
    };
    let mut wrong = Vec::new();
    for Source { path, package, module, text } in sources() {
        if ["cli", "bench", "command"].contains(&package.as_str())
            || module == "build"
            || path.ends_with("tests.rs")
        {
            continue;
        }
        let code = code(text.split("#[cfg(test)]").next().unwrap_or_default());
        wrong.extend(
            code.lines().filter(|line| flag(line)).map(|line| format!("{}: {}", path.display(), line.trim())),
        );
    }
    assert!(wrong.is_empty(), "flags outside of the command line:\n{}", wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let silent = sources().into_iter().filter(|s| !s.text.starts_with("//!"));
    let wrong: Vec<_> = silent.map(|s| s.path.display().to_string()).collect();
    assert!(wrong.is_empty(), "no //! at the top of {}", wrong.join(", "));
}

#[test]
fn the_monitors_threads_are_made_in_one_place() {
    let makes = |s: &Source| {
        let text = s.text.split("#[cfg(test)]").next().unwrap_or_default();
        ["thread::spawn", "Builder::new().name("].iter().any(|call| code(text).contains(call))
    };
    let is_test = |path: &Path| path.iter().any(|part| part == "tests" || part == "tests.rs");
    let elsewhere = |s: &Source| s.package == "monitor" && s.module != "threads" && !is_test(&s.path);
    let wrong: Vec<_> = sources().into_iter().filter(|s| elsewhere(s) && makes(s)).map(|s| s.path).collect();
    assert!(wrong.is_empty(), "{wrong:?} do not use threads::spawn");
}

/// The pages written by hand, by their paths below the root.
const PAGES: [&str; 9] = [
    "README.md",
    "firmware/disk/README.md",
    "fuzz/README.md",
    "guest/README.md",
    "guest/labs/README.md",
    "tests/kvm-unit-tests/README.md",
    "tests/rig/README.md",
    "tests/vsock/README.md",
    "docs",
];

/// Columns in a line of a page.
const COLUMNS: usize = 120;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// The pages and their text. `docs` stands for all of its pages.
fn pages() -> Vec<(PathBuf, String)> {
    let mut paths = Vec::new();
    for page in PAGES.map(|page| root().join(page)) {
        if page.is_dir() {
            let found = fs::read_dir(page).unwrap().map(|entry| entry.unwrap().path());
            paths.extend(found.filter(|path| path.extension().is_some_and(|e| e == "md")));
        } else {
            paths.push(page);
        }
    }
    assert!(paths.len() > PAGES.len(), "found only {paths:?}");
    paths.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// The paths in a text that begin at one of the tree's folders, and are not the rest of a longer path or a pattern.
fn paths_named(text: &str) -> Vec<&str> {
    let in_path = |c: char| c.is_ascii_alphanumeric() || "_-./*".contains(c);
    let words = text.split(|c: char| !in_path(c)).map(|word| word.trim_end_matches(['.', '/']));
    let ours = |word: &&str| {
        let folder = word.split_once('/').map(|(folder, _)| folder);
        ["src", "tests", "guest", "docs", "firmware"].iter().any(|ours| folder == Some(ours))
    };
    words.filter(ours).filter(|word| !word.contains('*')).collect()
}

/// The targets of a page's links, but for those into the web and into the page itself.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    targets.filter_map(|t| t.split('#').next()).filter(|t| !t.is_empty() && !t.contains("://")).collect()
}

#[test]
fn the_readers_of_pages_read() {
    let text =
        "a [b](docs/c.md#d) and [e](https://f) `src/g/h.rs`, guest/src/i.rs; ../src/j, src/*/k (tests/l).";
    assert_eq!(links(text), ["docs/c.md"]);
    assert_eq!(paths_named(text), ["docs/c.md", "src/g/h.rs", "guest/src/i.rs", "tests/l"]);
}

#[test]
fn pages_keep_their_lines_short_and_their_links_alive() {
    let mut wrong = Vec::new();
    for (path, text) in pages() {
        let page = path.strip_prefix(root()).unwrap().display();
        for (number, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS {
                wrong.push(format!("{page}:{}: {columns} columns", number + 1));
            }
        }
        let dead = links(&text).into_iter().filter(|link| !path.with_file_name(link).exists());
        wrong.extend(dead.map(|link| format!("{page}: no file for the link {link}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn paths_that_pages_and_file_headers_name_exist() {
    let headers = sources().into_iter().map(|source| {
        let header =
            source.text.lines().filter(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n");
        (Path::new("src").join(source.path), header)
    });
    let mut wrong = Vec::new();
    for (page, text) in pages().into_iter().chain(headers) {
        // A file header may cite another project's docs.
        let cites = |named: &str| page.starts_with("src") && named.starts_with("docs/");
        // A module may be named without `.rs`.
        let exists =
            |named: &str| [named.to_owned(), format!("{named}.rs")].iter().any(|p| root().join(p).exists());
        let missing = paths_named(&text).into_iter().filter(|named| !exists(named) && !cites(named));
        wrong.extend(missing.map(|named| format!("{}: {named}", page.display())));
    }
    assert!(wrong.is_empty(), "named, but not there:\n{}", wrong.join("\n"));
}
