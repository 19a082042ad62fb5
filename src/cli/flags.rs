//! Turns settings into options: the libraries know no flags, and write `` `mem=1G` `` where the command line says `--mem 1G`.

use std::borrow::Cow;

use clap::CommandFactory;

/// Settings as the library writes them in what it says, in backquotes, as options: `` `mem=1G` `` is `--mem 1G`. Whatever else
/// is in backquotes stays.
pub fn with_flags(text: &str) -> Cow<'_, str> {
    if !text.contains('`') {
        return Cow::Borrowed(text);
    }
    let mut command = super::Cli::command();
    command.build();
    let mut parts = text.split('`');
    let mut all = parts.next().unwrap_or_default().to_owned();
    let mut inside = true;
    for part in parts {
        match option(&command, part).filter(|_| inside) {
            // The backquote that closes it goes with it.
            Some(option) => {
                all.push_str(&option);
                inside = false;
            }
            None if inside => {
                all.push('`');
                all.push_str(part);
            }
            None => {
                all.push_str(part);
                inside = true;
            }
        }
    }
    Cow::Owned(all)
}

/// `field=value` as an option of `command` or one of its own commands; a switch has no value.
fn option(command: &clap::Command, setting: &str) -> Option<String> {
    let (field, value) = setting.split_once('=')?;
    let name = field.replace('_', "-");
    let commands = std::iter::once(command).chain(command.get_subcommands());
    let arg = commands.flat_map(clap::Command::get_arguments).find(|arg| arg.get_long() == Some(&name))?;
    Some(match value {
        "" | "on" => format!("--{name}"),
        _ if arg.is_require_equals_set() => format!("--{name}={value}"),
        _ => format!("--{name} {value}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_options() {
        for (text, wanted) in [
            ("`mem=1M`: too little; try `mem=128M` or less", "--mem 1M: too little; try --mem 128M or less"),
            ("give it a `name=`, `pit=on`", "give it a --name, --pit"),
            ("`debug_exit=0xf4` `option_rom=FILE`", "--debug-exit=0xf4 --option-rom FILE"),
            ("`cmdline='console=ttyS0 quiet'`", "--cmdline 'console=ttyS0 quiet'"),
            ("unknown field `serial`, expected `path`", "unknown field `serial`, expected `path`"),
            ("`cargo x=y` and `mem=2G`", "`cargo x=y` and --mem 2G"),
            ("one ` alone `mem=1G`", "one ` alone --mem 1G"),
        ] {
            assert_eq!(with_flags(text), wanted);
        }
    }
}
