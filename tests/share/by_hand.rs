//! Mounts a shared folder and serves it until it is unmounted: `share FOLDER PLACE [OPTIONS [user]]`, with options as `--share` has them
//! (`,cache=never` ...). What xfstests mounts its file systems by, and whoever wants to look at one.

use std::path::Path;

// The tests use the rest of it.
#[allow(dead_code)]
mod mount;

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [folder, place, rest @ ..] = &arguments[..] else {
        eprintln!("usage: share FOLDER PLACE [OPTIONS [user]]");
        std::process::exit(2);
    };
    let how = rest.first().map_or("", String::as_str);
    let by_user = rest.get(1).is_some_and(|who| who == "user");
    mount::serve_at(Path::new(folder), Path::new(place), how, by_user).join().unwrap();
}
