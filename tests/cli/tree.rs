//! `vmm snapshot tree`, and the end of snapshots that others lie over.

use std::fs;

use serde_json::Value;

use crate::counting::*;
use crate::place::*;

/// A place where b and d lie over a, and c over b.
fn grown() -> Place {
    let (place, guest) = counting("");
    for command in ["a", "b --base a", "c --base b", "d --base a"] {
        place.done(&format!("snapshot create v {command}"));
    }
    drop(guest);
    place
}

/// The lines of `vmm snapshot tree`, without sizes and ages.
fn tree(place: &Place, folders: &str) -> Vec<String> {
    let told = place.done(&format!("snapshot tree {folders}"));
    told.lines().skip(1).map(|line| line.get(17..).unwrap_or(line).to_owned()).collect()
}

#[test]
fn the_tree_shows_which_snapshots_lie_over_which_and_whose_base_is_gone_or_changed() {
    if !has_kvm("the_tree_shows_which_snapshots_lie_over_which_and_whose_base_is_gone_or_changed") {
        return;
    }
    let place = grown();
    let whole = ["a", "├─ b", "│  └─ c", "└─ d"];
    assert_eq!(tree(&place, ""), whole);
    assert_eq!(tree(&place, "c"), ["a", "└─ b", "   └─ c"], "what it lies over, and nothing else");
    let rows: Vec<Value> = serde_json::from_str(&place.done("snapshot tree --json")).unwrap();
    let [root] = &rows[..] else { panic!("{rows:?}") };
    let below = &root["above"][0];
    assert_eq!(below["base"]["state"], "whole");
    assert!(below["above"][0]["folder"].as_str().unwrap().ends_with("/c"));
    let bytes = |node: &Value| node["bytes"].as_u64().unwrap();
    assert!(0 < bytes(below) && bytes(below) < bytes(root), "each has what is its own: {rows:?}");
    assert!(below["made_at"].as_u64().unwrap() >= root["made_at"].as_u64().unwrap());

    // Elsewhere, with what is below it.
    fs::create_dir(place.path("elsewhere")).unwrap();
    assert_eq!(tree(&place, "elsewhere"), [""; 0]);
    fs::rename(place.path("b"), place.path("away")).unwrap();
    assert_eq!(tree(&place, ""), ["a", "├─ away", "└─ d", "c (its base, b, is gone)"]);
    fs::rename(place.path("d"), place.path("b")).unwrap();
    assert_eq!(tree(&place, ""), ["a", "├─ away", "└─ b", "c (its base, b, is not what it was)"]);
    fs::write(place.path("a/memory"), "cut").unwrap();
    let cut = tree(&place, "");
    assert!(cut[0].starts_with("a (damaged: ") && cut[0].contains("a/memory"), "{cut:?}");
    assert_eq!(cut[1], "away (its base, a, is not what it was)");
    assert!(place.fails("snapshot tree nowhere", BAD_ARGUMENT).contains("nowhere"));
}

#[test]
fn a_snapshot_that_others_lie_over_is_removed_with_them_or_by_force() {
    if !has_kvm("a_snapshot_that_others_lie_over_is_removed_with_them_or_by_force") {
        return;
    }
    let place = grown();
    let all = ["a", "├─ b", "│  └─ c", "└─ d"];
    for (arguments, who) in
        [("a", "b, c, d lie"), ("a b", "b, c, d lie"), ("b", "c lies"), ("a d", "b, c lie")]
    {
        let said = place.fails(&format!("snapshot rm {arguments}"), BAD_ARGUMENT);
        assert!(said.contains(&format!("{who} over it")) && said.contains("--force"), "{said}");
        if arguments.contains('d') {
            assert!(!place.path("d").exists(), "nobody needs it");
        } else {
            assert_eq!(tree(&place, ""), all);
        }
    }
    // By another name, from another folder.
    let mut elsewhere = place.command("snapshot rm ../a/../b");
    elsewhere.current_dir(place.path("run"));
    let output = finish(elsewhere.spawn().unwrap());
    assert!(text(&output.stderr).contains("/c lies over it"), "{}", text(&output.stderr));
    place.done("snapshot rm --force b");
    assert_eq!(tree(&place, ""), ["a", "c (its base, b, is gone)"]);
    place.done("snapshot rm a c");
    assert_eq!(tree(&place, ""), [""; 0]);

    let place = grown();
    place.done("snapshot rm a c b d");
    assert_eq!(tree(&place, ""), [""; 0], "in whatever order they are named");
}
