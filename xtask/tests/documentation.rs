//! The documentation holds together: what it links to and the files that it names are there.

#![expect(
    clippy::tests_outside_test_module,
    clippy::expect_used,
    clippy::panic,
    reason = "an integration test is a test module"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

/// One link or one file name, and where it stands.
#[derive(Debug, PartialEq, Eq)]
struct Mention {
    line: usize,
    target: String,
}

#[test]
fn links_lead_to_files_and_headings() {
    let root = workspace();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for document in documents(&root) {
        let text = read(&root.join(&document));
        for link in links(&text) {
            if link.target.contains("://") || link.target.starts_with("mailto:") {
                continue;
            }
            seen += 1;
            if let Err(why) = follow(&root, &document, &link.target) {
                wrong.push(format!("{}:{}: {why}", document.display(), link.line));
            }
        }
    }
    assert!(wrong.is_empty(), "broken links:\n{}", wrong.join("\n"));
    assert!(seen > 50, "only {seen} links found: is the search broken?");
}

#[test]
fn chapters_of_the_book_are_listed_and_link_within_it() {
    let root = workspace();
    let book = Path::new("docs");
    let summary = book.join("SUMMARY.md");
    let listed: BTreeSet<PathBuf> = links(&read(&root.join(&summary)))
        .into_iter()
        .map(|link| resolve(&summary, &link.target))
        .collect();
    let mut wrong = Vec::new();
    for document in documents(&root) {
        if !document.starts_with(book) || document == summary {
            continue;
        }
        if !listed.contains(&document) {
            wrong.push(format!("{} is not in SUMMARY.md", document.display()));
        }
        for link in links(&read(&root.join(&document))) {
            let (file, _heading) = split(&link.target);
            if !link.target.contains("://") && !resolve(&document, file).starts_with(book) {
                let place = format!("{}:{}", document.display(), link.line);
                wrong.push(format!(
                    "{place}: {} leads out of the book, where it is dead",
                    link.target
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_that_are_named_exist() {
    let root = workspace();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for document in documents(&root) {
        for name in file_names(&read(&root.join(&document))) {
            seen += 1;
            if !root.join(&name.target).exists() {
                let place = format!("{}:{}", document.display(), name.line);
                wrong.push(format!("{place}: there is no {}", name.target));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(seen > 20, "only {seen} names found: is the search broken?");
}

#[test]
fn links_and_headings_are_found_as_a_reader_sees_them() {
    let text = "# A `b`, C: d_e\n\n[one](x.md) `[no](y.md)` and [two](#a-b-c-d_e)\n\
                ```sh\n# no heading\n[no](z.md)\n```\n## Same\n## Same\n[three]: w.md\n";
    let targets: Vec<String> = links(text).into_iter().map(|link| link.target).collect();
    assert_eq!(targets, ["x.md", "#a-b-c-d_e", "w.md"]);
    let expected = ["a-b-c-d_e", "same", "same-1"].map(str::to_owned);
    assert_eq!(anchors(text), BTreeSet::from(expected));
}

fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask
        .parent()
        .expect("xtask is in the workspace")
        .to_owned()
}

/// Every Markdown file of the workspace that is not built or hidden, relative to its root.
fn documents(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(root.join(&directory)).expect("a directory of the workspace") {
            let entry = entry.expect("an entry of the workspace");
            let name = entry
                .file_name()
                .into_string()
                .expect("a name that is text");
            let path = directory.join(&name);
            if entry.path().is_dir() {
                if !name.starts_with('.') && name != "target" {
                    directories.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 10, "only {found:?}");
    found.sort();
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Whether `target`, as it stands in `document`, leads anywhere.
fn follow(root: &Path, document: &Path, target: &str) -> Result<(), String> {
    let (file, heading) = split(target);
    let path = resolve(document, file);
    if !root.join(&path).exists() {
        return Err(format!("there is no {}", path.display()));
    }
    match heading {
        Some(heading) if !anchors(&read(&root.join(&path))).contains(heading) => {
            Err(format!("{} has no heading #{heading}", path.display()))
        }
        Some(_) | None => Ok(()),
    }
}

fn split(target: &str) -> (&str, Option<&str>) {
    match target.split_once('#') {
        Some((file, heading)) => (file, Some(heading)),
        None => (target, None),
    }
}

/// The path from the workspace's root. An empty `file` is the document itself.
fn resolve(document: &Path, file: &str) -> PathBuf {
    if file.is_empty() {
        return document.to_owned();
    }
    let mut path = document.parent().unwrap_or(Path::new("")).to_owned();
    for component in Path::new(file).components() {
        match component {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(name) => path.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path
}

/// The lines outside of fenced code, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
            return None;
        }
        (!fenced).then_some((index + 1, line))
    })
}

/// The targets of `[text](target)` and `[text]: target`.
fn links(text: &str) -> Vec<Mention> {
    let mut found = Vec::new();
    for (line, text) in prose(text) {
        // Every second piece between backticks is code.
        let words: Vec<&str> = text.split('`').step_by(2).collect();
        let words = words.join("`");
        let inline = words
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split([')', ' ']).next());
        let reference = words
            .starts_with('[')
            .then(|| words.split_once("]: "))
            .flatten()
            .map(|(_name, target)| target.trim());
        found.extend(inline.chain(reference).map(|target| Mention {
            line,
            target: target.to_owned(),
        }));
    }
    found
}

/// What `#` links may name, by the rules of GitHub and mdBook, which agree on our headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut counts = BTreeMap::<String, u32>::new();
    let mut anchors = BTreeSet::new();
    for (_line, text) in prose(text) {
        let Some((marks, title)) = text.split_once(' ') else {
            continue;
        };
        if marks.is_empty() || !marks.trim_start_matches('#').is_empty() {
            continue;
        }
        let anchor: String = title
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let count = counts.entry(anchor.clone()).or_default();
        anchors.insert(match *count {
            0 => anchor,
            count => format!("{anchor}-{count}"),
        });
        *count += 1;
    }
    anchors
}

/// Files and directories of the workspace that stand in backticks.
fn file_names(text: &str) -> Vec<Mention> {
    let ours = [
        "agent/",
        "ebpf/",
        "bpf-tests/",
        "xtask/",
        "docs/",
        "manifests/",
    ];
    let mut found = Vec::new();
    for (line, text) in prose(text) {
        for code in text.split('`').skip(1).step_by(2) {
            let plain = !code.contains(['*', ' ', '{', '<', ':']);
            if plain && ours.iter().any(|directory| code.starts_with(directory)) {
                found.push(Mention {
                    line,
                    target: code.to_owned(),
                });
            }
        }
    }
    found
}
