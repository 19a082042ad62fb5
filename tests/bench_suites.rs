//! Suites of `vmm bench`, with few samples, by the program that was just built.

use std::path::Path;

use vmm_bench::measure::Plan;
use vmm_bench::result::Suite;
use vmm_bench::rivals::Setting;
use vmm_bench::suites::{self, Name};

/// The suite's result here, where there is no kernel to boot. `quick`: as where the clock is a repeatable one.
fn measure(name: Name, quick: bool) -> Result<Suite, String> {
    let scratch = tempfile::tempdir().unwrap();
    let own = Path::new(env!("CARGO_BIN_EXE_vmm-bench"));
    let setting = Setting {
        vmm: own.with_file_name("vmm"),
        own: own.to_owned(),
        with: Default::default(),
        kernel: None,
        bzimage: None,
        stock: None,
        agent: None,
        scratch: scratch.path().to_owned(),
        instances: 10,
        repeatable_clock: quick,
    };
    let plan = Plan { samples: 2, warm_up: 0, seed: 7, limit: None };
    suites::run(name, &setting, plan, &mut |share, _| assert!((0.0..=1.0).contains(&share), "{share}"))
}

/// Everybody was measured or says why not, and whoever failed has no samples.
fn check(suite: &Suite) {
    for contender in &suite.contenders {
        let measured = suite.figures.iter().flat_map(|figure| &figure.series);
        let samples = measured.filter(|series| series.who == contender.name).count();
        match &contender.failure {
            None => assert!(samples > 0, "{} has neither samples nor a failure", contender.name),
            Some(why) => assert!(samples == 0 && !why.is_empty(), "{}: {why}", contender.name),
        }
        assert!(!contender.command.is_empty(), "{}", contender.name);
    }
    assert!(!suite.figures.is_empty() && !suite.method.is_empty());
    for series in suite.figures.iter().flat_map(|figure| &figure.series) {
        assert!(series.samples.iter().all(|sample| *sample > 0.0 && sample.is_finite()), "{series:?}");
    }
}

#[test]
fn work_is_measured_natively_and_who_cannot_do_it_says_why() {
    for name in [Name::Cpu, Name::Console] {
        let suite = measure(name, false).unwrap();
        check(&suite);
        let native = suite.contenders.iter().find(|contender| contender.name == "native").unwrap();
        assert_eq!(native.failure, None, "{name}");
        let vm = suite.contenders.iter().find(|contender| contender.name == "vmm").unwrap();
        assert!(vm.failure.is_some(), "{name}: without a kernel");
    }
}

#[test]
fn a_namespace_is_measured_where_one_can_be_made_and_the_others_say_why_not() {
    let suite = measure(Name::Net, false).unwrap();
    for contender in suite.contenders.iter().filter(|contender| contender.name != "container: veth") {
        assert!(contender.failure.is_some(), "{}: without a kernel", contender.name);
    }
    let container = &suite.contenders.iter().find(|contender| contender.name == "container: veth").unwrap();
    if let Some(why) = &container.failure {
        eprintln!("SKIP: a network namespace that is measured: {why}");
        return;
    }
    check(&suite);
    let left = std::process::Command::new("ip").args(["-o", "link"]).output().unwrap();
    let ours = format!("vb{}n", std::process::id() % 1_000_000);
    assert!(!String::from_utf8_lossy(&left.stdout).contains(&ours), "an interface is left behind");
}

#[test]
fn tiny_guests_start_with_many_cpus_and_much_memory() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIP: scale: this machine lacks /dev/kvm");
        return;
    }
    let suite = measure(Name::Scale, true).unwrap();
    check(&suite);
    let figure = |name: &str| suite.figures.iter().find(|figure| figure.name == name).unwrap();
    assert_eq!(figure("memory: tiny guest to first output").series.len(), 4);
    let (output, exit) = (figure("vCPUs: tiny guest to first output"), figure("vCPUs: tiny guest to exit"));
    for (output, exit) in output.series.iter().zip(&exit.series) {
        let pairs = output.samples.iter().zip(&exit.samples);
        assert!(pairs.clone().all(|(output, exit)| output < exit), "{output:?} {exit:?}");
    }
}

#[test]
fn a_start_is_told_step_by_step_beside_the_bare_calls() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIP: steps: this machine lacks /dev/kvm");
        return;
    }
    let suite = measure(Name::Steps, false).unwrap();
    check(&suite);
    let median = |figure: &str, who: &str| {
        let figure = suite.figures.iter().find(|known| known.name == figure).unwrap();
        let series = figure.series.iter().find(|series| series.who == who);
        vmm_bench::measure::stats::quantile(
            &series.unwrap_or_else(|| panic!("{}: {who}", figure.name)).samples,
            0.5,
        )
    };
    let vm = median("VM", "bare calls");
    let parts =
        ["... KVM_CREATE_VM", "... memory slot", "... irqchip"].map(|part| median(part, "bare calls"));
    assert!(parts.iter().all(|part| *part < vm), "{parts:?} of {vm}");
    for step in ["open /dev/kvm", "guest memory", "VM", "KVM_GET_SUPPORTED_CPUID", "devices", "vCPU"] {
        let (step, whole) = (median(step, "vmm, traced"), median("start to first output", "vmm, traced"));
        assert!(step < whole, "{step} of {whole}");
    }
    assert!(median("start to first output", "bare calls") < median("start to first output", "vmm"));
}
