//! Reads kernel configurations and finds which lines of a fragment did not survive `make olddefconfig`: an option whose
//! dependencies are missing vanishes without a word there. Called by `tuned`.

use std::collections::BTreeMap;
use std::fmt;

/// Options and their values; `n` for those that are "not set".
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Config(BTreeMap<String, String>);

/// A line of a fragment that came out differently.
#[derive(Debug, PartialEq, Eq)]
pub struct Lost {
    /// The option's name, with its CONFIG_.
    pub option: String,
    /// What the fragment says.
    pub wanted: String,
    /// What the configuration has; `None` if it does not know the option.
    pub got: Option<String>,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { option, wanted, got } = self;
        match got {
            Some(got) => write!(f, "{option}={wanted} came out as {got}"),
            None => write!(f, "{option}={wanted} is gone (unknown, or its dependencies are not met)"),
        }
    }
}

/// A line that is neither an option nor a comment.
#[derive(Debug, thiserror::Error)]
#[error("line {line} is no kernel configuration: {text:?}")]
pub struct Error {
    /// Counted from 1.
    pub line: usize,
    /// What stands there.
    pub text: String,
}

impl Config {
    /// Parses `.config` or a fragment: `CONFIG_X=value`, `# CONFIG_X is not set`, comments, empty lines.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut options = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            let unset = line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set"));
            if let Some(option) = unset.filter(|option| is_option(option)) {
                options.insert(option.to_owned(), "n".to_owned());
            } else if let Some((option, value)) = line.split_once('=').filter(|(option, _)| is_option(option))
            {
                options.insert(option.to_owned(), value.to_owned());
            } else if !line.is_empty() && !line.starts_with('#') {
                return Err(Error { line: index + 1, text: line.to_owned() });
            }
        }
        Ok(Self(options))
    }

    /// What of this fragment the complete configuration `result` does not have. An option that `result` does not
    /// mention is as good as unset.
    pub fn lost_in(&self, result: &Self) -> Vec<Lost> {
        self.0
            .iter()
            .filter_map(|(option, wanted)| {
                let got = result.0.get(option);
                let kept = got.map_or("n", String::as_str) == wanted;
                (!kept).then(|| Lost { option: option.clone(), wanted: wanted.clone(), got: got.cloned() })
            })
            .collect()
    }

    /// The number of options.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn is_option(text: &str) -> bool {
    text.strip_prefix("CONFIG_").is_some_and(|name| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_loss_is_named_and_nothing_else() {
        let fragment = Config::parse(
            "# a comment\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=64\n# CONFIG_D is not set\nCONFIG_E=y\n\nCONFIG_F=\"x=y\"\n",
        )
        .unwrap();
        assert_eq!(fragment.len(), 6);
        let result = Config::parse("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=32\nCONFIG_F=\"x=y\"\n").unwrap();
        let lost: Vec<String> = fragment.lost_in(&result).iter().map(Lost::to_string).collect();
        assert_eq!(
            lost,
            [
                "CONFIG_B=n came out as y",
                "CONFIG_C=64 came out as 32",
                "CONFIG_E=y is gone (unknown, or its dependencies are not met)"
            ]
        );
    }

    #[test]
    fn prose_that_lost_its_hash_is_found() {
        let error = Config::parse("CONFIG_A=y\nwithout a hash\n").unwrap_err();
        assert_eq!((error.line, error.text.as_str()), (2, "without a hash"));
        assert!(Config::parse("CONFIG_A y").is_err());
        assert!(Config::parse("# prose which is not set\n").unwrap().is_empty());
    }

    #[test]
    fn the_projects_own_fragment_is_well_formed() {
        let fragment = Config::parse(crate::tuned::FRAGMENT).unwrap();
        assert!(fragment.len() > 100, "{}", fragment.len());
        assert!(fragment.lost_in(&fragment).is_empty());
    }
}
