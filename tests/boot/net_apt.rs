//! A real client over the user network: Debian's apt fetches its lists and packages of some megabytes from a server on the host's
//! loopback, holds them against their checksums, and installs them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use crate::guest::{Guest, Kernel, available, bundle, vmm};
use crate::net_user::{noise, sha256};

/// Bytes of each package's file.
const SIZES: [usize; 3] = [5 << 20, 3_000_001, 20];

fn tool(program: &str, arguments: &[&str]) {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|why| panic!("{program}: {why}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A repository with a package for each of `contents`, by what apt asks for: `parcel0` and so on, which have `/parcel0` in them.
fn repository(dir: &Path, contents: &[Vec<u8>]) -> BTreeMap<String, Vec<u8>> {
    let (mut files, mut list) = (BTreeMap::new(), String::new());
    for (number, bytes) in contents.iter().enumerate() {
        let name = format!("parcel{number}");
        let tree = dir.join(&name);
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        let about = format!(
            "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: noise\n"
        );
        fs::write(tree.join("DEBIAN/control"), &about).unwrap();
        fs::write(tree.join(&name), bytes).unwrap();
        let file = dir.join(format!("{name}.deb"));
        let [tree, path] = [&tree, &file].map(|path| path.to_str().unwrap());
        tool("dpkg-deb", &["--root-owner-group", "-Znone", "--build", tree, path]);
        let package = fs::read(&file).unwrap();
        let (size, sum) = (package.len(), sha256(&package));
        list += &format!("{about}Filename: ./{name}.deb\nSize: {size}\nSHA256: {sum}\n\n");
        files.insert(format!("/./{name}.deb"), package.clone());
        files.insert(format!("/{name}.deb"), package);
    }
    files.insert("/./Packages".to_owned(), list.clone().into_bytes());
    files.insert("/Packages".to_owned(), list.into_bytes());
    files
}

/// Serves `files` over HTTP to everyone who comes.
fn serve(listener: TcpListener, files: BTreeMap<String, Vec<u8>>) {
    let files = Arc::new(files);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let files = Arc::clone(&files);
            thread::spawn(move || answer(stream, &files));
        }
    });
}

/// One connection, with as many requests as it has. The guest may go at any time.
fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
    while let Some(request) = lines.next() {
        lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
        let file = files.get(request.split(' ').nth(1)?);
        let (status, body) = file.map_or(("404 Not Found", &[][..]), |body| ("200 OK", body));
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), body].concat()).ok()?;
    }
    Some(())
}

fn apt_installs(kernel: Kernel) {
    let dir = tempfile::tempdir().unwrap();
    let contents = SIZES.map(noise);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    serve(listener, repository(dir.path(), &contents));
    let image = dir.path().join("root.ext4");
    tool("cp", &["--sparse=always", bundle("debian.ext4").to_str().unwrap(), image.to_str().unwrap()]);
    let script = format!(
        "ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2; \
         mkdir -p /m; mount -t ext4 /dev/vda /m; for d in dev proc; do mount --bind /$d /m/$d; done; \
         echo nameserver 10.0.2.3 >/m/etc/resolv.conf; cd /m/etc/apt; \
         echo deb [trusted=yes] http://host.vmm.internal:{port} ./ >sources.list; echo BEGIN; \
         chroot /m sh -c 'apt-get update >/o 2>&1; echo lists $?; \
         apt-get install -y parcel0 parcel1 parcel2 >>/o 2>&1; echo installed $?; \
         sha256sum /parcel0 /parcel1 /parcel2; cat /o >&2'; echo END; umount /m/dev /m/proc /m"
    );
    let mut command = vmm(kernel, &script);
    command.args(["--mem", "384M", "--net", &format!("user,allow=127.0.0.1:{port}")]);
    let ended = Guest::start({
        command.arg("--disk").arg(&image);
        command
    })
    .finish();
    let sums =
        contents.iter().enumerate().map(|(number, bytes)| format!("{}  /parcel{number}", sha256(bytes)));
    let expected: Vec<_> = ["lists 0", "installed 0"].map(str::to_owned).into_iter().chain(sums).collect();
    let body = ended.body();
    assert!(body.len() >= expected.len() && body[..expected.len()] == expected[..], "{}", ended.text);
}

#[test]
fn apt_installs_from_a_server_on_the_hosts_loopback() {
    if available("apt over the user network") {
        apt_installs(Kernel::TunedPvh);
    }
}

#[test]
fn apt_installs_with_the_stock_kernel() {
    if available("apt over the user network, stock kernel") {
        apt_installs(Kernel::Stock);
    }
}
