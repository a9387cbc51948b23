//! Is it English? By the input's own column where there is one, else by a detector.

/// Whether the value of a language column means English.
pub fn names_english(language: &str) -> bool {
    let tag = language.trim().split(['-', '_']).next().unwrap_or_default();
    ["en", "eng", "english"].iter().any(|name| name.eq_ignore_ascii_case(tag))
}

/// How much of a text the detector looks at, in bytes: prompts say their language early, and pasted code says nothing.
const HEAD_BYTES: usize = 1000;

/// Whether a text reads as English.
pub fn is_english(text: &str) -> bool {
    let head = &text[..text.floor_char_boundary(HEAD_BYTES)];
    // Words tell most texts, in a tenth of the time that trigrams take.
    whatlang::detect_script(head) == Some(whatlang::Script::Latin)
        && (has_english_words(head) || has_english_trigrams(head))
}

/// Whether a text of the Latin script has trigrams like English, or too few to tell it from a rarer language, for which
/// short prompts, names and code are mistaken.
fn has_english_trigrams(text: &str) -> bool {
    whatlang::detect(text).is_some_and(|info| {
        info.lang() == whatlang::Lang::Eng || !info.is_reliable() && text.is_ascii() && !has_foreign_words(text)
    })
}

/// Words that are frequent in English prompts and rare in other languages of the Latin script.
const ENGLISH_WORDS: &[&str] = &[
    "about",
    "and",
    "answer",
    "are",
    "can",
    "code",
    "continue",
    "could",
    "create",
    "does",
    "do",
    "each",
    "explain",
    "find",
    "following",
    "for",
    "from",
    "generate",
    "give",
    "has",
    "have",
    "hello",
    "help",
    "hey",
    "hi",
    "how",
    "if",
    "is",
    "it",
    "like",
    "list",
    "make",
    "my",
    "need",
    "not",
    "of",
    "or",
    "please",
    "should",
    "show",
    "summarize",
    "tell",
    "thanks",
    "that",
    "the",
    "there",
    "these",
    "this",
    "to",
    "use",
    "using",
    "want",
    "was",
    "what",
    "when",
    "where",
    "which",
    "who",
    "why",
    "will",
    "with",
    "would",
    "write",
    "you",
    "your",
];

/// Whether at least one word in six is a common English one.
fn has_english_words(text: &str) -> bool {
    let mut words = 0;
    let mut english = 0;
    for word in text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()) {
        words += 1;
        english += usize::from(ENGLISH_WORDS.iter().any(|known| known.eq_ignore_ascii_case(word)));
    }
    english * 6 >= words.max(1)
}

/// Words that are frequent in the other large languages of the Latin script, and no words in English.
const FOREIGN_WORDS: &[&str] = &[
    "aku", "apa", "auf", "avec", "che", "como", "con", "dan", "das", "de", "del", "della", "den", "der", "des", "det",
    "di", "dla", "ein", "eine", "el", "en", "est", "et", "het", "ich", "il", "ist", "je", "jest", "la", "le", "les",
    "los", "mit", "mot", "na", "nicht", "nie", "och", "og", "para", "per", "por", "pour", "que", "qui", "quiero",
    "saya", "se", "si", "som", "sur", "um", "uma", "un", "una", "und", "une", "untuk", "van", "var", "voor", "wie",
    "yang", "ve", "bir", "za", "zu",
];

/// Whether any word is a common one of another language.
fn has_foreign_words(text: &str) -> bool {
    text.split(|c: char| !c.is_alphabetic())
        .any(|word| FOREIGN_WORDS.iter().any(|known| known.eq_ignore_ascii_case(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_name_english_in_several_ways() {
        for name in ["English", "english", " en ", "eng", "en-US", "en_US", "en_GB.UTF-8", "eng_Latn"] {
            assert!(names_english(name), "{name}");
        }
        for name in ["", "German", "End", "unknown", "fr", "enm", "fr-en", "_en"] {
            assert!(!names_english(name), "{name}");
        }
    }

    #[test]
    fn english_prompts_are_kept_even_short_or_full_of_code() {
        for text in [
            "Write a short story about a dragon who learns to paint.",
            "hi",
            "write python code",
            "what is docker",
            "email template reinstate google ads account",
            "describe Keswick Convention",
            "fix this code: for(int i=0;i<n;i++){a[i]=b[i];}",
        ] {
            assert!(is_english(text), "{text}");
        }
    }

    #[test]
    fn other_languages_are_not() {
        for text in [
            "Schreibe eine kurze Geschichte über einen Drachen, der malen lernt.",
            "Écris une courte histoire sur un dragon qui apprend à peindre.",
            "Escribe una historia corta sobre un dragón que aprende a pintar.",
            "kann ich die Datei in einen Unterordner speichern, oder muss sie im selben Ordner liegen?",
            "hola como estas",
            "写一个关于学画画的龙的短篇故事",
            "Напиши короткий рассказ о драконе, который учится рисовать.",
            "12345 67890",
            "",
        ] {
            assert!(!is_english(text), "{text}");
        }
    }
}
