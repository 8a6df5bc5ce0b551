//! Refuses expressions in HCL before it is parsed: a catalog file says values. Pure.
//!
//! Their operators are what the parser must not see. Of `{ a > b > { a > b > {`, which ends too early, it parses
//! the last operand of each level twice (hcl-edit 0.9 and 0.10): 200 bytes take minutes.

/// The characters that an operator begins with, but for `=` and `-`, which also mean something else.
const OPERATORS: [char; 10] = ['!', '?', '<', '>', '+', '*', '/', '%', '&', '|'];

/// What the text is part of.
#[derive(Debug, Clone, Copy)]
enum Within<'a> {
    /// The file, brackets, or a template's `${}`: what is no text.
    Code,
    /// Quotes.
    Quotes,
    /// A heredoc that ends with this word.
    Heredoc(&'a str),
}

/// What is not read yet, and what it is within, innermost last.
struct Scan<'a> {
    rest: &'a str,
    within: Vec<Within<'a>>,
    /// The last character of code that is no blank.
    before: char,
}

/// Fails if there is an operator outside of strings and comments, also within a string's `${}`.
///
/// Of a text that is no HCL it may say either; the parser refuses it.
pub(super) fn refuse(text: &str) -> Result<(), String> {
    let mut scan = Scan {
        rest: text,
        within: vec![],
        before: '\n',
    };
    while let Some(first) = scan.rest.chars().next() {
        let step = match scan.within.last().unwrap_or(&Within::Code) {
            Within::Code => scan.code(first),
            Within::Quotes => Ok(scan.quotes(first)),
            Within::Heredoc(end) => Ok(scan.heredoc(end, first)),
        };
        scan.rest = step.map_err(|operator| {
            let read = text.strip_suffix(scan.rest).unwrap_or_default();
            let line = read.matches('\n').count() + 1;
            format!("expected a value, found the operator {operator} at line {line}")
        })?;
    }
    Ok(())
}

impl<'a> Scan<'a> {
    /// Returns what follows what it read, or the operator that it found.
    fn code(&mut self, first: char) -> Result<&'a str, char> {
        let rest = self.rest;
        if first == '#' || rest.starts_with("//") {
            return Ok(rest.trim_start_matches(|c| c != '\n'));
        }
        if let Some(comment) = rest.strip_prefix("/*") {
            return Ok(comment.split_once("*/").map_or("", |(_, after)| after));
        }
        if let Some((end, after)) = rest.strip_prefix("<<").and_then(heredoc_start) {
            self.within.push(Within::Heredoc(end));
            self.before = first;
            return Ok(after);
        }
        let after = skip(rest, first);
        // A sign stands where a value begins.
        let is_sign = first == '-' && matches!(self.before, '=' | ':' | ',' | '[' | '(');
        let is_operator = OPERATORS.contains(&first)
            || (first == '-' && !is_sign)
            || (first == '=' && after.starts_with('='));
        if is_operator {
            return Err(first);
        }
        match first {
            '"' => self.within.push(Within::Quotes),
            '{' | '[' | '(' => self.within.push(Within::Code),
            '}' | ']' | ')' => drop(self.within.pop()),
            _ => {}
        }
        if !first.is_whitespace() {
            self.before = first;
        }
        Ok(if first.is_ascii_digit() {
            number_end(after)
        } else if first.is_alphabetic() || first == '_' {
            after.trim_start_matches(is_identifier)
        } else {
            after
        })
    }

    fn quotes(&mut self, first: char) -> &'a str {
        let after = skip(self.rest, first);
        match first {
            '\\' => {
                return after
                    .chars()
                    .next()
                    .map_or("", |escaped| skip(after, escaped));
            }
            '"' => drop(self.within.pop()),
            _ => return self.template(first),
        }
        after
    }

    fn heredoc(&mut self, end: &str, first: char) -> &'a str {
        // A line begins: this is called for every character, the newline before it among them.
        if first == '\n'
            && let Some(after) = skip(self.rest, first)
                .trim_start_matches([' ', '\t'])
                .strip_prefix(end)
            && !after.starts_with(is_identifier)
        {
            self.within.pop();
            return after;
        }
        self.template(first)
    }

    /// One character of text, or a template's beginning.
    fn template(&mut self, first: char) -> &'a str {
        let after = skip(self.rest, first);
        if !matches!(first, '$' | '%') {
            return after;
        }
        if let Some(escaped) = after.strip_prefix(first).and_then(|a| a.strip_prefix('{')) {
            return escaped;
        }
        match after.strip_prefix('{') {
            Some(code) => {
                self.within.push(Within::Code);
                self.before = '{';
                code
            }
            None => after,
        }
    }
}

/// What follows `first`, the first character of `text`.
fn skip(text: &str, first: char) -> &str {
    text.get(first.len_utf8()..).unwrap_or_default()
}

fn is_identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '-'
}

/// Behind a number's first digit: in `1e-5` the minus is no operator.
fn number_end(after: &str) -> &str {
    let after = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let exponent = after
        .strip_prefix(['e', 'E'])
        .map(|e| e.strip_prefix(['+', '-']).unwrap_or(e));
    exponent
        .filter(|digits| digits.starts_with(|c: char| c.is_ascii_digit()))
        .map_or(after, |digits| {
            digits.trim_start_matches(|c: char| c.is_ascii_digit())
        })
}

/// Behind `<<`: the word that ends the heredoc, and the rest from the end of this line on.
fn heredoc_start(text: &str) -> Option<(&str, &str)> {
    let text = text.strip_prefix('-').unwrap_or(text);
    let rest = text.trim_start_matches(is_identifier);
    let end = text.strip_suffix(rest).filter(|end| !end.is_empty())?;
    rest.starts_with(['\n', '\r']).then_some((end, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_no_expressions() {
        for text in [
            "",
            "# a > b\n// a > b\n/* a >\n b */ service { name = \"web\" }",
            "a-b = -1\nc = [-1, 1e-5, 2.5E+3, 1.5]\nd = { \"e\" : -2, f = null }",
            r#"meta = { path = "a/b > c \" > \\", text = "$${a > b} 100%" }"#,
            r#"name = "${node.name}-%{ if a }x%{ endif } > y""#,
            "text = <<EOT\na > b\n EOTs\n  EOT\nname = <<-E\r\n$ > %\r\nE\nport = 1\n",
        ] {
            assert_eq!(refuse(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn operators_are_refused_wherever_code_is() {
        for (text, operator) in [
            ("a = b > c", '>'),
            ("a = 1 -1", '-'),
            ("a = 1-1", '-'),
            ("a = { b = [c == d] }", '='),
            ("a = b ? c : d", '?'),
            ("a = !b", '!'),
            ("a = b < c", '<'),
            ("a = [for b in c : b => b]", '>'),
            (r#"a = "${b + c}""#, '+'),
            (r#"a = "${"${b}"}" / 2"#, '/'),
            ("a = <<E\n%{ if b && c }\nE\n", '&'),
            ("a = <<E\nE\nb = c | d", '|'),
        ] {
            let error = refuse(text).unwrap_err();
            assert!(
                error.contains(&format!("operator {operator} at line ")),
                "{text}: {error}"
            );
        }
        let third = refuse("a = 1\n/*\n*/ b = 2 * 3").unwrap_err();
        assert!(third.ends_with(" at line 3"), "{third}");
    }
}
