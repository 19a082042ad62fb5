//! The page as a browser sees it: the document that it makes of it, and the picture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::SMALL;
use crate::place::{Place, finish, text};

/// Chromium, or a loud word that there is none.
fn browser(test: &str) -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let files = std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name)));
    let found = files.into_iter().find(|file| file.is_file());
    if found.is_none() {
        eprintln!("SKIP: {test}: needs Chromium: apt-get install chromium");
    }
    found
}

fn run(browser: &Path, place: &Place, arguments: &[&str]) -> String {
    let mut command = Command::new(browser);
    // Its own sandbox needs more than a container or root has; the page is ours.
    command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]);
    command.arg(format!("--user-data-dir={}", place.path("profile").display())).args(arguments);
    command.current_dir(place.dir.path()).env("HOME", place.dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = finish(command.spawn().unwrap());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Makes `page.html` of a result and gives the document that the browser makes of it.
fn document(browser: &Path, place: &Place, result: &str) -> String {
    place.file("result.json", result);
    let made = place.vmm("--from result.json --html page.html");
    assert_eq!(made.status.code(), Some(0), "{}", text(&made.stderr));
    run(browser, place, &["--dump-dom", &format!("file://{}", place.path("page.html").display())])
}

/// The text from `start` to `end`, each time.
fn parts<'a>(text: &'a str, start: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(start).skip(1).map(move |part| part.split(end).next().unwrap())
}

#[test]
fn every_sample_of_every_contender_is_drawn() {
    let Some(browser) = browser("every_sample_of_every_contender_is_drawn") else { return };
    let place = Place::new();
    let document = document(&browser, &place, SMALL);
    let result: Value = serde_json::from_str(SMALL).unwrap();
    let suite = &result["suites"][0];
    let figures: Vec<_> = parts(&document, "<figure", "</figure>").collect();
    let expected = suite["figures"].as_array().unwrap();
    assert_eq!(figures.len(), expected.len());
    for (drawn, figure) in figures.iter().zip(expected) {
        assert!(drawn.contains(figure["name"].as_str().unwrap()));
        let rows: Vec<_> = parts(drawn, "<tr class=", "</tr>").collect();
        let series = figure["series"].as_array().unwrap();
        assert_eq!(rows.len(), series.len());
        for (row, series) in rows.iter().zip(series) {
            let who = series["who"].as_str().unwrap();
            assert!(row.contains(&format!("data-who=\"{who}\"")), "{who}: {row}");
            let marks = ["<circle class=\"dot\"", "<line class=\"median\"", "<rect class=\"spread\""];
            let counts = marks.map(|mark| row.matches(mark).count());
            assert_eq!(counts, [series["samples"].as_array().unwrap().len(), 1, 1], "{who}");
            // Within the strip, and those of different values at different places.
            let places: Vec<f64> = parts(row, "cx=\"", "%").map(|at| at.parse().unwrap()).collect();
            assert!(places.iter().all(|at| (0.0..=100.0).contains(at)), "{who}: {places:?}");
            assert!(places.first() < places.last(), "{who}: {places:?}");
        }
        let twin = rows.iter().find(|row| row.contains("crun twin")).unwrap();
        let is_open = twin.contains("no difference shown");
        assert_eq!(is_open, figure["baseline"] == "crun", "{twin}");
    }
    let failures = parts(&document, "class=\"failures\"", "</div>").collect::<String>();
    assert_eq!(failures.matches("class=\"failure\"").count(), 2);
    assert!(failures.contains("Permission denied") && failures.contains("--with firecracker=FILE"));
    for contender in suite["contenders"].as_array().unwrap() {
        let command = contender["command"].as_str().unwrap();
        let shown = format!("<code class=\"command\">{command}</code>");
        assert!(document.contains(&shown), "{command}");
    }
}

#[test]
fn a_hostile_result_stays_text() {
    let Some(browser) = browser("a_hostile_result_stays_text") else { return };
    let place = Place::new();
    let evil = r#"</script><script>document.title='gone'</script></dd><img src=x onerror=alert(1)><!-- "'>"#;
    let mut result: Value = serde_json::from_str(SMALL).unwrap();
    let suite = &mut result["suites"][0];
    suite["title"] = evil.into();
    suite["host"]["cpu"] = evil.into();
    suite["method"][0] = evil.into();
    suite["contenders"][1]["command"] = evil.into();
    suite["contenders"][4]["failure"] = evil.into();
    suite["contenders"][0]["name"] = evil.into();
    for figure in 0..2 {
        suite["figures"][figure]["series"][0]["who"] = evil.into();
    }
    suite["figures"][0]["baseline"] = evil.into();
    let document = document(&browser, &place, &result.to_string());
    assert!(document.contains("<title>vmm bench: boot</title>"), "a script ran");
    assert_eq!((document.matches("<script").count(), document.matches("<img").count()), (1, 0));
    assert_eq!(document.matches("class=\"dot\"").count(), 1 + 2 * 4 * 8);
    assert!(document.trim_end().ends_with("</html>") && document.contains("<footer>"));
}

#[test]
fn the_picture_has_both_colours_of_both_themes() {
    let Some(browser) = browser("the_picture_has_both_colours_of_both_themes") else { return };
    let place = Place::new();
    document(&browser, &place, SMALL);
    let page = fs::read_to_string(place.path("page.html")).unwrap();
    place.file("dark.html", page.replace("id=\"dark\"", "id=\"dark\" checked"));
    // Paper, other contenders, ours: as the style sheet has them.
    let light = [[0xfb, 0xfa, 0xf7], [0x51, 0x68, 0x8f], [0xd1, 0x48, 0x0c]];
    let dark = [[0x14, 0x17, 0x1d], [0x8e, 0xa8, 0xd6], [0xff, 0x95, 0x57]];
    for (page, width, [paper, other, ours]) in
        [("page.html", 1280, light), ("page.html", 600, light), ("dark.html", 1280, dark)]
    {
        let picture = place.path("picture.png");
        let url = format!("file://{}", place.path(page).display());
        let [shot, size] =
            [format!("--screenshot={}", picture.display()), format!("--window-size={width},1000")];
        run(&browser, &place, &[&shot, &size, "--force-device-scale-factor=1", &url]);
        let (size, count) = colours(&picture);
        assert_eq!(size, (width, 1000), "{page}");
        let [paper, other, ours] = [paper, other, ours].map(&count);
        // Medians alone are 3 pixels wide and 34 high, four rows of them.
        assert!(paper > 50_000 && other > 300 && ours > 100, "{page} {width}: {paper} {other} {ours}");
    }
}

/// The size of a picture, and how many of its pixels have a colour.
fn colours(picture: &Path) -> ((u32, u32), impl Fn([u8; 3]) -> usize) {
    let file = std::io::BufReader::new(fs::File::open(picture).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(info.bit_depth, png::BitDepth::Eight);
    let bytes = info.color_type.samples();
    let count =
        move |colour: [u8; 3]| pixels.chunks_exact(bytes).filter(|pixel| pixel[..3] == colour).count();
    ((info.width, info.height), count)
}
