//! The page that `vmm trace report FILE --html` writes, loaded in a real browser: what its own script made of the trace.

use std::process::{Command, Output, Stdio};

use crate::place::*;
use crate::trace::{RUN, place};

/// The first browser here that can be run without a screen. Says so where there is none.
fn browser(test: &str) -> Option<&'static str> {
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let runs = |name: &&str| {
        let version =
            Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    let found = names.into_iter().find(runs);
    if found.is_none() {
        eprintln!("SKIP: {test}: needs a browser, one of {names:?}: apt-get install chromium");
    }
    found
}

/// The document as `browser` has it after its scripts ran; on standard error what they complained of.
fn load(place: &Place, browser: &str, page: &str, fragment: &str) -> Output {
    let mut command = Command::new(browser);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]);
    command.args(["--virtual-time-budget=3000", "--enable-logging=stderr", "--window-size=1280,1000"]);
    command.arg(format!("--user-data-dir={}", place.path("profile").display()));
    command.arg(format!("file://{}{fragment}", place.path(page).display()));
    place.set_up(&mut command);
    finish(command.spawn().unwrap())
}

/// What the browser's console was told.
fn complaints(output: &Output) -> Vec<String> {
    text(&output.stderr).lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned).collect()
}

/// The text between the tag that has `id` and `end`, without tags.
fn words(document: &str, id: &str, end: &str) -> String {
    let (_, rest) = document.split_once(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("no {id}"));
    let (part, _) = rest.split_once(end).unwrap_or_else(|| panic!("no {end} behind {id}"));
    let mut text = String::new();
    for piece in part.split('<') {
        text.push_str(piece.split_once('>').map_or("", |(_, text)| text));
        text.push(' ');
    }
    let text = text.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_page_shows_the_events_that_were_recorded() {
    const NAME: &str = "a_page_shows_the_events_that_were_recorded";
    if !has_kvm(NAME) {
        return;
    }
    let place = place();
    let run = place.vmm(&format!("trace --keep record --html first.html -- {RUN}"));
    assert_eq!((run.status.code(), text(&run.stdout).as_str()), (Some(1), "Hi"), "{}", text(&run.stderr));
    let report = place.vmm("trace report record --html page.html");
    assert_eq!(report.status.code(), Some(0), "{}", text(&report.stderr));
    let read = |name| std::fs::read(place.path(name)).unwrap();
    assert_eq!(read("first.html"), read("page.html"));
    let refused = place.vmm("trace report record --html /no/such/folder/page.html");
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("/no/such/folder/page.html"), "{}", text(&refused.stderr));

    let Some(browser) = browser(NAME) else { return };
    let loaded = load(&place, browser, "page.html", "#exit=4");
    let document = text(&loaded.stdout);
    assert_eq!(complaints(&loaded), [""; 0], "{}", text(&loaded.stderr));

    let has = |id: &str, end: &str, wanted: &[&str]| {
        let words = words(&document, id, end);
        for wanted in wanted {
            assert!(words.contains(wanted), "no {wanted:?} in {id}: {words}");
        }
    };
    has("title", "</h1>", &["talker"]);
    has("totals", "id=\"shares\"", &["5 exits to the monitor"]);
    has(
        "waterfall",
        "</section>",
        &["serial THR <- 'H' after 0 exits", "used 3 times", "debug-exit <- 0x0 after 4 exits"],
    );
    has("reasons", "</section>", &["out monitor 3 ", "in monitor 2 "]);
    // Whichever is this host's.
    let reasons = words(&document, "reasons", "</section>");
    let [vtx, svm] = ["VT-x 30 I/O instruction", "AMD-V 0x7b IOIO"];
    assert!(
        [[vtx, svm], [svm, vtx]].iter().any(|both| reasons.contains(&both.join(" = "))),
        "not in both vendors' terms: {reasons}"
    );
    has("devices", "</section>", &["serial 3 ", "nobody 1 ", "debug-exit 1 "]);
    has(
        "before",
        "</section>",
        &[
            "The monitor, up to the first entry",
            "open /dev/kvm",
            "guest memory is reserved",
            "KVM makes a VM with its memory slots",
            "are put into guest memory",
            "vCPUs are made and their registers set",
            "the kernel asked for the exits inside KVM",
            "vcpu0 enters the guest",
        ],
    );
    assert!(document.contains("Lanes: vcpu0 (5 to the monitor, 0 in KVM)"));

    // The story that the address asks for.
    has(
        "story",
        "</aside>",
        &[
            "event 4 of 5",
            "nobody -> 0xffffffff",
            "in eax,dx",
            "VT-x 30 I/O instruction",
            "AMD-V 0x7b IOIO",
            "in 4B 0x1234",
            "KVM_EXIT_IO",
            "KVM_RUN returns → kvm::exit → vcpu::dispatch → bus: ports → nobody",
            "a read gives all ones",
            "Registers",
            "rdx 0000000000001234",
            "rip 1000013",
            "cr0 80000011",
            "Next entry",
            "the thread calls KVM_RUN again",
            "comes debug-exit <- 0x0",
        ],
    );
    let plain = text(&load(&place, browser, "page.html", "").stdout);
    assert_eq!(words(&plain, "story", "</aside>"), "", "no story unless asked for");
    let list = words(&plain, "list", "</section>");
    for wanted in ["0x1000006 out dx,al serial THR <- 'H'", "in eax,dx nobody -> 0xffffffff"] {
        assert!(list.contains(wanted), "no {wanted:?} in: {list}");
    }
    assert_eq!(plain.matches("href=\"#exit=").count(), 5, "a line for each exit");

    // An error would have been seen.
    let broken = text(&read("page.html")).replace("followAddress();\n", "noSuchThing();\n");
    place.file("broken.html", broken);
    assert!(!complaints(&load(&place, browser, "broken.html", "")).is_empty());
}

#[test]
fn pages_of_what_was_cut_off_load_without_errors() {
    const NAME: &str = "pages_of_what_was_cut_off_load_without_errors";
    if !has_kvm(NAME) {
        return;
    }
    let place = place();
    place.vmm(&format!("--trace record {RUN}"));
    let whole = std::fs::read(place.path("record")).unwrap();
    let header = 12 + u32::from_le_bytes(whole[8..12].try_into().unwrap()) as usize;
    let lengths = [header, header + 20, (header + whole.len()) / 2];
    for length in lengths {
        place.file("cut", &whole[..length]);
        let report = place.vmm(&format!("trace report cut --html {length}.html"));
        assert_eq!(report.status.code(), Some(0), "{length}: {}", text(&report.stderr));
    }
    let Some(browser) = browser(NAME) else { return };
    for length in lengths {
        let loaded = load(&place, browser, &format!("{length}.html"), "#exit=1");
        assert_eq!(complaints(&loaded), [""; 0], "{length}");
        assert!(text(&loaded.stdout).contains("<canvas id=\"lanes\""), "{length}");
    }
}
