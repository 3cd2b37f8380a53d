//! Constraints: every completion follows its schema, regular expression or grammar.

use std::collections::HashMap;
use std::sync::Arc;

use crate::tiny_model::{ODD, Shape, llama};
use nybble::engine::constraint::{Constraint, Grammar, Vocabulary};
use nybble::engine::sampler::{Sampled, Sampler, SamplingOptions};
use nybble::engine::{Scheduler, SchedulerOptions, Sequence, Speculation, Stats, step};
use nybble::model::{LoadOptions, Model};
use nybble::quant::block::BlockType;

/// A token for each byte, one that ends a completion, and a special token.
const END: u32 = 256;

fn vocabulary() -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    tokens.push(b"\xff<end>".to_vec());
    tokens.push(Vec::new());
    Vocabulary::new(tokens, &[END]).unwrap()
}

fn schema(text: &str) -> Grammar {
    Grammar::JsonSchema(text.to_owned())
}

/// Whether the constraint accepts the whole text and may end after it.
fn follows(constraint: &Constraint, text: &str) -> bool {
    let mut constraint = constraint.clone();
    text.bytes().all(|byte| {
        let allowed = constraint.allowed().unwrap().contains(byte.into());
        allowed && constraint.accept(byte.into()).is_ok()
    }) && constraint.may_end()
        && constraint.allowed().unwrap().contains(END)
}

/// A random output that the constraint allows.
fn random_text(constraint: &Constraint, seed: u64) -> Option<String> {
    let mut constraint = constraint.clone();
    let options = SamplingOptions::default().with_top_k(0).with_top_p(1.0).with_min_p(0.0).with_seed(seed);
    let mut sampler = Sampler::new(options, 258).unwrap();
    let mut text = Vec::new();
    for _ in 0..2_000 {
        let allowed = constraint.allowed().unwrap();
        let token = sampler.sample_among(&mut [0.0; 258], Some(&allowed)).unwrap().token;
        constraint.accept(token).unwrap();
        if token == END {
            return Some(String::from_utf8(text).unwrap());
        }
        text.push(u8::try_from(token).unwrap());
    }
    None
}

#[test]
fn a_schema_accepts_only_matching_json() {
    let vocabulary = vocabulary();
    let constraint = vocabulary
        .constraint(&schema(
            r#"{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","y"]}},"required":["a"]}"#,
        ))
        .unwrap();
    for text in [r#"{"a": 1}"#, r#"{"a": -20, "b": "y"}"#] {
        assert!(follows(&constraint, text), "{text}");
    }
    for text in [r#"{"a": "1"}"#, r#"{"b": "x"}"#, r#"{"a": 1, "b": "z"}"#, r#"{"a": 1, "c": 2}"#, "{}", "1", ""] {
        assert!(!follows(&constraint, text), "{text}");
    }
}

#[test]
fn an_object_gets_no_other_properties_unless_the_schema_says_so() {
    let vocabulary = vocabulary();
    let open = vocabulary.constraint(&schema(r#"{"properties":{"a":{}},"additionalProperties":true,"type":"object"}"#));
    assert!(follows(&open.unwrap(), r#"{"c": 2}"#));
    let any = vocabulary.constraint(&schema(r#"{"type":"object"}"#)).unwrap();
    assert!(follows(&any, r#"{"c": [1, {"d": null}]}"#));
    // A property with the name "properties" is not a keyword.
    let named = r#"{"type":"object","properties":{"properties":{"type":"object"}}}"#;
    assert!(follows(&vocabulary.constraint(&schema(named)).unwrap(), r#"{"properties": {"z": 1}}"#));
    let parts = r#"{"allOf":[{"type":"object","properties":{"a":{"type":"null"}},"required":["a"]},
                             {"type":"object","properties":{"b":{"type":"null"}},"required":["b"]}]}"#;
    assert!(follows(&vocabulary.constraint(&schema(parts)).unwrap(), r#"{"a": null, "b": null}"#));
}

#[test]
fn random_allowed_tokens_make_valid_output() {
    let vocabulary = vocabulary();
    let object = r#"{"type":"object","properties":{"n":{"type":"integer","minimum":-5,"maximum":99},
        "s":{"type":"string","maxLength":5},"l":{"type":"array","items":{"type":"boolean"},"maxItems":3}},"required":["n","s","l"]}"#;
    let constraint = vocabulary.constraint(&schema(object)).unwrap();
    for seed in 0..50 {
        let text = random_text(&constraint, seed).expect("it ends");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!((-5..=99).contains(&value["n"].as_i64().unwrap()), "{text}");
        assert!(value["s"].as_str().unwrap().chars().count() <= 5, "{text}");
        assert!(value["l"].as_array().unwrap().len() <= 3, "{text}");
    }
    let constraint = vocabulary.constraint(&Grammar::Regex("[a-c]{3}-[0-9]{2}".to_owned())).unwrap();
    for seed in 0..20 {
        let text = random_text(&constraint, seed).expect("it ends");
        let (characters, digits) = text.split_once('-').expect("a hyphen");
        assert!(characters.len() == 3 && characters.bytes().all(|b| b"abc".contains(&b)), "{text}");
        assert!(digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
    }
    let lark = Grammar::Lark("start: \"(\" start \")\" | \"x\"".to_owned());
    let constraint = vocabulary.constraint(&lark).unwrap();
    assert!(follows(&constraint, "((x))") && !follows(&constraint, "((x)"));
}

#[test]
fn an_invalid_constraint_is_refused_by_name() {
    let vocabulary = vocabulary();
    let cases = [
        (schema(r#"{"type":"objekt"}"#), "schema: found Invalid type: objekt"),
        (schema(r#"{"minLength":9,"maxLength":2,"type":"string"}"#), "schema: found Unsatisfiable schema"),
        (schema(r#"{"$ref":"http://localhost:1/x"}"#), "schema: found Resource 'http://localhost:1/x' is not present"),
        (schema("[]"), "schema: found JSON that is not an object"),
        (schema("{"), "schema: found EOF while parsing"),
        (schema(&format!("{}{}", r#"{"items":"#.repeat(5_000), "}".repeat(5_000))), "schema: found recursion limit"),
        (Grammar::Regex("a|(b".to_owned()), "regex: found unclosed group at \"(b\", expected a regular expression"),
        (
            Grammar::Regex("a{5,2}".to_owned()),
            "regex: found invalid repetition count range, the start must be <= the end",
        ),
        (Grammar::Regex("é\n\\d(?<=a)b".to_owned()), "regex: found look-around, including look-ahead and look-behind"),
        (schema(r#"{"type":"string","pattern":"[a"}"#), "schema: found unclosed character class at \"[a"),
        (Grammar::Lark("start: /a(/".to_owned()), "grammar: found "),
        (Grammar::Lark("no grammar".to_owned()), "grammar: found "),
        (Grammar::Lark("start: a\na: a".to_owned()), "grammar: found a form that no text has, expected a grammar"),
        (
            Grammar::Lark("start: b\nb: \"x\" c".to_owned()),
            "grammar: found at 2(4): unknown name: \"c\", expected a grammar that nybble supports:\n   1 | start: b\n   2 | b: \"x\" c\n",
        ),
    ];
    for (grammar, expected) in cases {
        let error = vocabulary.constraint(&grammar).expect_err("it is refused").to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = Vocabulary::new(vec![b"a".to_vec()], &[]).expect_err("no token ends a completion").to_string();
    assert_eq!(error, "ends: found none, expected a token that ends a completion");
    assert!(Vocabulary::new(vec![b"a".to_vec()], &[1]).is_err());
}

#[test]
fn tokens_too_long_for_the_trie_are_never_allowed() {
    let vocabulary = Vocabulary::new(vec![vec![b'a'; 5_000], b"a".to_vec(), b"\xff".to_vec()], &[2]).unwrap();
    let mut constraint = vocabulary.constraint(&Grammar::Regex("a{5000}".to_owned())).unwrap();
    let allowed = constraint.allowed().unwrap();
    assert!(!allowed.contains(0) && allowed.contains(1) && !allowed.contains(2));
}

#[test]
fn logits_beyond_the_vocabulary_are_not_allowed() {
    let mut constraint = vocabulary().constraint(&Grammar::Regex("b".to_owned())).unwrap();
    let mut logits = [1.0; 300];
    constraint.allowed().unwrap().apply(&mut logits);
    let left: Vec<usize> = (0..300).filter(|token| logits[*token].is_finite()).collect();
    assert_eq!(left, [usize::from(b'b')]);
}

#[test]
fn a_constraint_applies_to_its_sequence_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), &ODD, BlockType::Q4_0);
    let model = Model::load(path, &LoadOptions::default()).unwrap();
    let size = model.vocabulary();
    let mut tokens: Vec<Vec<u8>> = (0..size).map(|token| vec![b'a' + (token % 26) as u8]).collect();
    tokens[size - 1] = Vec::new();
    let end = u32::try_from(size - 1).unwrap();
    let vocabulary = Vocabulary::new(tokens, &[end]).unwrap();
    let constraint = vocabulary.constraint(&Grammar::Regex("b{3}".to_owned())).unwrap();
    let new = || Sequence::new(&model, &[1, 2, 3], SamplingOptions::greedy()).unwrap();
    let (mut constrained, mut free, mut alone) = (new(), new(), new());
    constrained.constrain(constraint);
    let mut written = Vec::new();
    for _ in 0..4 {
        let both = step(&model, &mut [&mut constrained, &mut free], &|| false).unwrap();
        let lone = step(&model, &mut [&mut alone], &|| false).unwrap();
        assert_eq!(both[1], lone[0]);
        written.push(both[0].token);
    }
    assert!(written[..3].iter().all(|token| token % 26 == 1), "{written:?}");
    assert_eq!(written[3], end);
}

/// Characters, and longer tokens that spell the same in other ways; the last one ends a completion.
fn spellings(size: usize) -> (Vocabulary, u32) {
    let longer = [
        "name", "na", "am", "me", "\"name", "\": ", "\":", ", \"", "{\"", "\"}", "tr", "true", "]}", "age\"", "ag",
        "12",
    ];
    let mut tokens: Vec<Vec<u8>> = (b' '..127).map(|byte| vec![byte]).collect();
    tokens.extend(longer.iter().map(|token| token.as_bytes().to_vec()));
    tokens.resize(size, Vec::new());
    let end = u32::try_from(size - 1).unwrap();
    (Vocabulary::new(tokens, &[end]).unwrap(), end)
}

/// The tokens of each sequence up to its end. Some steps are interrupted and repeated.
fn written(
    model: &Arc<Model>,
    draft: Option<&Arc<Model>>,
    speculation: Speculation,
    jobs: &[(SamplingOptions, Option<Constraint>)],
    end: u32,
) -> (Vec<Vec<Sampled>>, Stats) {
    let options = SchedulerOptions::default().with_speculation(speculation);
    let mut scheduler = Scheduler::new(model.clone(), draft.cloned(), options).unwrap();
    let mut numbers = HashMap::new();
    for (i, (options, constraint)) in jobs.iter().enumerate() {
        let mut sequence = Sequence::new(model, &[1, 2, 3, 1, 2, i as u32], options.clone()).unwrap();
        if let Some(constraint) = constraint {
            sequence.constrain(constraint.clone());
        }
        numbers.insert(scheduler.submit(sequence, 120).unwrap(), i);
    }
    let mut outputs = vec![Vec::new(); jobs.len()];
    let mut steps = 0;
    while !scheduler.is_idle() {
        steps += 1;
        if steps % 7 == 0 {
            assert!(scheduler.step(&|| true).is_err());
        }
        for event in scheduler.step(&|| false).unwrap() {
            let output: &mut Vec<Sampled> = &mut outputs[numbers[&event.id]];
            if output.last().is_none_or(|last| last.token != end) {
                output.push(event.result.unwrap());
                if output.last().is_some_and(|last| last.token == end) {
                    scheduler.cancel(event.id);
                }
            }
        }
    }
    (outputs, scheduler.stats())
}

#[test]
fn drafts_change_no_token_of_constrained_sequences() {
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape { vocabulary: 128, ..ODD };
    let path = llama(folder.path(), &shape, BlockType::Q4_0);
    let model = Arc::new(Model::load(path, &LoadOptions::default()).unwrap());
    let (vocabulary, end) = spellings(model.vocabulary());
    let grammars = [
        schema(
            r#"{"properties":{"name":{"enum":["name","me","nam"]},"age":{"type":"integer","maximum":99,"minimum":0},
                "flags":{"type":"array","items":{"type":"boolean"},"maxItems":6}},"required":["name","age","flags"]}"#,
        ),
        schema(
            r#"{"type":"array","items":{"properties":{"age":{"const":12},"name":{"const":true}},
                "required":["age","name"]},"minItems":3,"maxItems":3}"#,
        ),
        schema(r#"{"properties":{"name":{"type":"string","maxLength":9}},"required":["name"]}"#),
        schema(r#"{"type":"object"}"#),
        Grammar::Regex("(name, ){5}(true|12|\\}){3}".to_owned()),
        Grammar::Lark("start: \"{\" pair+ \"}\"\npair: \"name\" | \"age\" | \"[\" pair \"]\"".to_owned()),
    ];
    let mut jobs = Vec::new();
    for (i, grammar) in grammars.iter().enumerate() {
        let constraint = vocabulary.constraint(grammar).unwrap();
        for seed in 0..4 {
            let mut options = SamplingOptions::greedy();
            if seed > 0 {
                let seed = Some(10 * i as u64 + seed);
                options = SamplingOptions::default().with_seed(seed).with_temperature(1.3).with_logprobs(2);
            }
            jobs.push((options, Some(constraint.clone())));
        }
        jobs.push((SamplingOptions::greedy(), None));
    }
    let (expected, plain) = written(&model, None, Speculation::Off, &jobs, end);
    assert_eq!(plain.drafted_tokens, 0);
    assert!(expected.iter().filter(|output| output.last().unwrap().token == end).count() > 15, "most of them end");
    for speculation in [Speculation::On, Speculation::Auto] {
        for draft in [None, Some(&model)] {
            let (outputs, stats) = written(&model, draft, speculation, &jobs, end);
            assert!(outputs == expected, "{speculation:?}");
            assert!(stats.accepted_tokens > 50, "{stats:?}");
        }
    }
    // Output without a choice is drafted from the first token on.
    for seed in 0..3 {
        let options = SamplingOptions::default().with_seed(seed);
        let constraint = vocabulary.constraint(&schema(r#"{"const":{"x": [1, 2, 3], "y": "zzzzzz"}}"#)).unwrap();
        let job = [(options, Some(constraint))];
        let (expected, plain) = written(&model, None, Speculation::Off, &job, end);
        let (outputs, stats) = written(&model, None, Speculation::On, &job, end);
        assert!(outputs == expected && outputs[0].len() > 25, "{}", outputs[0].len());
        assert!(stats.steps * 2 < plain.steps, "{stats:?} {plain:?}");
    }
}
