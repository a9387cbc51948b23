use super::*;
use crate::config::UnitRule;

fn layout(body: &str, turns: Option<TurnFields>) -> Layout {
    Layout {
        body: body.to_owned(),
        turns,
        unit: Some("id".to_owned()),
        unit_rule: UnitRule::Whole,
        language: Some("language".to_owned()),
        language_required: false,
    }
}

const OPENAI: TurnFields = TurnFields { role: "role", content: "content" };

fn record(json: &str, layout: &Layout) -> Record {
    read(json.as_bytes(), layout).unwrap_or_else(|problem| panic!("{problem:?}"))
}

fn problem(json: &str, layout: &Layout) -> FieldProblem {
    match read(json.as_bytes(), layout) {
        Err(JsonProblem::Field(problem)) => problem,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it was read"),
    }
}

#[test]
fn a_conversation_of_lmsys() {
    let json = r#"{"id":"a","model":"m","conversation":[{"content":"Hi \"you\"","role":"user"},{"role":"assistant","content":"x"}],
        "language":"English","redacted":true,"openai_moderation":[{"flagged":false,"categories":{}},{"flagged":true}]}"#;
    let record = record(json, &layout("conversation", Some(OPENAI)));
    assert!(record.source == "a" && record.text.as_deref() == Some("Hi \"you\""));
    assert!(record.language.as_deref() == Some("English") && record.redacted && record.flagged);
}

#[test]
fn the_first_user_turn_may_follow_the_system_but_not_the_model() {
    let layout = layout("m", Some(OPENAI));
    let text = |turns: &str| record(&format!(r#"{{"id":7,"m":[{turns}]}}"#), &layout).text;
    let (system, user, model) =
        (r#"{"role":"system","content":null}"#, r#"{"role":"human","content":"q"}"#, r#"{"role":"gpt","content":"a"}"#);
    assert_eq!(text(user).as_deref(), Some("q"));
    assert_eq!(text(&format!("{system},{user},{model}")).as_deref(), Some("q"));
    assert_eq!(text(&format!("{model},{user}")), None);
    assert_eq!(text(""), None);
}

#[test]
fn problems_name_field_and_type_and_nothing_else() {
    let chat = layout("m", Some(OPENAI));
    let check = |json: &str, field: &str, found: &str| {
        let problem = problem(json, &chat);
        assert_eq!((problem.field.as_str(), problem.found), (field, found), "{json}");
        assert!(!format!("{problem:?}").contains("secret"));
    };
    check(r#"{"id":"1"}"#, "m", "missing");
    check(r#"{"id":"1","m":"secret"}"#, "m", "a string");
    check(r#"{"id":"1","m":{"secret":1}}"#, "m", "an object");
    check(r#"{"id":"1","m":["secret"]}"#, "m[0]", "a string");
    check(r#"{"id":"1","m":[{"role":"user","content":["secret"]}]}"#, "m[0].content", "an array");
    check(r#"{"id":"1","m":[{"role":"system"},{"role":"user"}]}"#, "m[1].content", "missing");
    check(r#"{"id":"1","m":[{"role":5,"content":"secret"}]}"#, "m[0].role", "an integer");
    check(r#"{"id":1.5,"m":[]}"#, "id", "a number");
    check(r#"{"m":[]}"#, "id", "missing");
    check(r#"{"id":"1","m":[],"redacted":"secret"}"#, "redacted", "a string");
    check(r#"{"id":"1","m":[],"language":["secret"]}"#, "language", "an array");
    check(r#"{"id":"1","m":[],"openai_moderation":[{"flagged":"secret"}]}"#, "openai_moderation[].flagged", "a string");
    check(r#"{"id":"1","m":[],"openai_moderation":"secret"}"#, "openai_moderation", "a string");
}

#[test]
fn which_of_two_is_meant_is_not_guessed() {
    let layout = layout("m", Some(OPENAI));
    let check = |json: &str, field: &str| {
        let problem = problem(json, &layout);
        assert_eq!((problem.field.as_str(), problem.found), (field, "given twice"), "{json}");
    };
    check(r#"{"id":"1","id":"2","m":[]}"#, "id");
    check(r#"{"id":"1","m":[],"m":[]}"#, "m");
    check(r#"{"id":"1","m":[],"redacted":true,"redacted":false}"#, "redacted");
    check(r#"{"id":"1","m":[],"redacted":null,"redacted":true}"#, "redacted");
    check(r#"{"id":"1","m":[],"language":"English","language":null}"#, "language");
    check(r#"{"id":"1","m":[],"openai_moderation":[],"openai_moderation":null}"#, "openai_moderation");
    check(r#"{"id":"1","m":[],"openai_moderation":[{"flagged":true,"flagged":false}]}"#, "openai_moderation[].flagged");
    check(r#"{"id":"1","m":[{"role":"user","role":"system","content":"a"}]}"#, "m[0].role");
    check(r#"{"id":"1","m":[{"role":"user","content":"a","content":"b"}]}"#, "m[0].content");
    // Of what nobody reads there may be any number.
    record(r#"{"id":"1","m":[],"x":1,"x":2}"#, &layout);
}

#[test]
fn absent_marks_mean_unmarked() {
    let json = r#"{"id":1,"m":[],"redacted":null,"openai_moderation":null,"language":null}"#;
    let record = record(json, &layout("m", Some(OPENAI)));
    assert!(record.source == "1" && !record.redacted && !record.flagged && record.language.is_none());
}

#[test]
fn plain_text() {
    let layout = layout("text", None);
    assert_eq!(record(r#"{"id":1,"text":"a\nb"}"#, &layout).text.as_deref(), Some("a\nb"));
    assert_eq!(problem(r#"{"id":1,"text":["a"]}"#, &layout).found, "an array");
}

#[test]
fn broken_bytes_are_placed() {
    let layout = layout("text", None);
    let check = |bytes: &[u8], expected: u64, expected_problem: &str| match read(bytes, &layout) {
        Err(JsonProblem::Syntax { offset, problem, .. }) => {
            assert_eq!((offset, problem), (expected, expected_problem));
        }
        _ => panic!("{bytes:?} was read"),
    };
    check(b"{\"id\":1,\"other\":\"\xFF\"}", 17, "invalid UTF-8");
    check(b"{\"id\":1,\n \"text\":tru}", 20, "invalid JSON");
    check(b"{\"id\":1,\"text\":\"a", 16, "the record ends too early");
    check(b"[1]", 0, "expected a JSON object");
    check(b"{\"id\":1} {}", 9, "invalid JSON");
}

#[test]
fn keys_in_order() {
    assert_eq!(keys(br#"{"b":{"x":1},"a":[2]}"#).ok(), Some(vec!["b".to_owned(), "a".to_owned()]));
}
