//! The figures of an evaluation agree with their definitions.

use nybble::Error;
use nybble::model::{Input, LoadOptions, Logits, Model};
use nybble::quant::block::BlockType;
use nybble::quantize::eval::{Reference, perplexity, windows};

use crate::tiny_model::{ODD, Shape, llama};

const WINDOW: usize = 21;

fn load(shape: &Shape, block_type: BlockType, threads: usize) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = llama(folder.path(), shape, block_type);
    Model::load(path, &LoadOptions::default().with_threads(threads)).unwrap()
}

/// After each of these tokens 16 bits distinguish the most likely token from the second.
fn text(tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| (i * i + 9 * i + 5) % 101).collect()
}

fn cut(tokens: usize) -> Vec<Vec<u32>> {
    windows(&text(tokens), WINDOW, None).unwrap()
}

/// The log-probabilities at each scored position, and the token that follows.
fn expected(model: &Model, windows: &[Vec<u32>]) -> Vec<(Vec<f64>, usize)> {
    let mut all = Vec::new();
    for window in windows {
        let (mut session, mut logits) = (model.session(), Vec::new());
        let input = Input::new(&mut session, window, Logits::All);
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
        for position in WINDOW / 2..WINDOW - 1 {
            let row = &logits[position * model.vocabulary()..][..model.vocabulary()];
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            let logs = row.iter().map(|x| f64::from(*x) - sum.ln()).collect();
            all.push((logs, window[position + 1] as usize));
        }
    }
    all
}

fn close(found: f64, expected: f64, tolerance: f64) {
    assert!((found - expected).abs() <= tolerance * expected.abs().max(1e-3), "found {found}, expected {expected}");
}

#[test]
fn windows_do_not_overlap_and_begin_with_the_start_token() {
    let tokens: Vec<u32> = (10..20).collect();
    assert_eq!(windows(&tokens, 4, None).unwrap(), [[10, 11, 12, 13], [14, 15, 16, 17]]);
    assert_eq!(windows(&tokens, 5, Some(1)).unwrap(), [[1, 11, 12, 13, 14], [1, 16, 17, 18, 19]]);
}

#[test]
fn a_text_shorter_than_a_window_is_refused_with_both_lengths() {
    let error = windows(&[1, 2, 3], 4, None).unwrap_err().to_string();
    assert!(error.contains("3 tokens") && error.contains("at least 4"), "{error}");
    assert!(windows(&[1, 2, 3], 3, None).is_err());
}

#[test]
fn perplexity_scores_the_second_half_of_each_window() {
    let model = load(&ODD, BlockType::F32, 2);
    let windows = cut(5 * WINDOW + 4);
    let logs: Vec<f64> = expected(&model, &windows).iter().map(|(logs, token)| -logs[*token]).collect();
    let found = perplexity(&model, &windows, &|_, _| Ok(()), &|| false).unwrap();
    assert_eq!((found.tokens, logs.len()), (50, 50));
    let mean = logs.iter().sum::<f64>() / 50.0;
    let variance = logs.iter().map(|x| x * x).sum::<f64>() / 50.0 - mean * mean;
    close(found.perplexity.value, mean.exp(), 1e-5);
    close(found.perplexity.error, mean.exp() * (variance / 49.0).sqrt(), 1e-4);
    assert_eq!(found.divergence, None);
}

#[test]
fn divergence_agrees_with_its_definition() {
    let (base, model) = (load(&ODD, BlockType::F32, 1), load(&ODD, BlockType::Q4_0, 1));
    let windows = cut(4 * WINDOW);
    let pairs: Vec<_> = expected(&base, &windows).into_iter().zip(expected(&model, &windows)).collect();
    let mut kl: Vec<f64> = pairs
        .iter()
        .map(|((base, _), (model, _))| base.iter().zip(model).map(|(b, m)| b.exp() * (b - m)).sum())
        .collect();
    let top = |logs: &[f64]| (0..logs.len()).max_by(|a, b| logs[*a].total_cmp(&logs[*b]));
    let same = pairs.iter().filter(|((base, _), (model, _))| top(base) == top(model)).count();
    let squares: f64 =
        pairs.iter().map(|((base, token), (model, _))| (model[*token].exp() - base[*token].exp()).powi(2)).sum();

    let mut reference = Reference::record(&base, &windows, &|_, _| Ok(()), &|| false).unwrap();
    let found = reference.compare(&model, &|_, _| Ok(()), &|| false).unwrap();
    let divergence = found.divergence.as_ref().unwrap();
    assert_eq!(found.tokens, 40);
    close(divergence.kl_mean.value, kl.iter().sum::<f64>() / 40.0, 2e-3);
    let by_position: Vec<f64> = (0..10).map(|at| kl.iter().skip(at).step_by(10).sum::<f64>() / 4.0).collect();
    assert_eq!(divergence.kl_by_position.len(), 10);
    divergence.kl_by_position.iter().zip(by_position).for_each(|(found, expected)| close(*found, expected, 2e-3));
    kl.sort_by(f64::total_cmp);
    close(divergence.kl_median, (kl[19] + kl[20]) / 2.0, 2e-3);
    close(divergence.kl_p99, kl[38] + 0.61 * (kl[39] - kl[38]), 2e-3);
    close(divergence.kl_max, kl[39], 2e-3);
    close(divergence.top_agreement.value, same as f64 / 40.0, 1e-12);
    close(divergence.rms_dp.value, (squares / 40.0).sqrt(), 2e-3);
    close(divergence.reference.value, reference.evaluation().perplexity.value, 1e-12);
    close(divergence.ratio.value, found.perplexity.value / divergence.reference.value, 1e-9);
}

#[test]
fn a_model_does_not_diverge_from_itself() {
    let model = load(&ODD, BlockType::Q8_0, 1);
    let mut reference = Reference::record(&model, &cut(3 * WINDOW), &|_, _| Ok(()), &|| false).unwrap();
    let found = reference.compare(&model, &|_, _| Ok(()), &|| false).unwrap().divergence.unwrap();
    assert!(found.kl_mean.value.abs() < 1e-5 && found.kl_max < 1e-4, "{found:?}");
    assert_eq!(found.top_agreement.value, 1.0);
    close(found.ratio.value, 1.0, 1e-4);
    assert!(found.rms_dp.value < 1e-5);
}

#[test]
fn a_reference_gives_the_same_figures_on_any_number_of_threads() {
    let windows = cut(3 * WINDOW);
    let (one, two) = (load(&ODD, BlockType::Q4_1, 1), load(&ODD, BlockType::Q4_1, 2));
    let base = load(&ODD, BlockType::F32, 2);
    let mut reference = Reference::record(&base, &windows, &|_, _| Ok(()), &|| false).unwrap();
    let first = reference.compare(&one, &|_, _| Ok(()), &|| false).unwrap();
    assert_eq!(first, reference.compare(&two, &|_, _| Ok(()), &|| false).unwrap());
}

#[test]
fn a_model_with_another_vocabulary_is_refused() {
    let (model, other) = (load(&ODD, BlockType::F32, 1), load(&Shape { vocabulary: 64, ..ODD }, BlockType::F32, 1));
    let windows = vec![vec![1; WINDOW]];
    let mut reference = Reference::record(&model, &windows, &|_, _| Ok(()), &|| false).unwrap();
    let error = reference.compare(&other, &|_, _| Ok(()), &|| false).unwrap_err().to_string();
    assert!(error.contains("64 tokens") && error.contains("101 tokens"), "{error}");
}

#[test]
fn windows_that_cannot_be_scored_are_refused() {
    let model = load(&ODD, BlockType::F32, 1);
    let fails = |windows: &[Vec<u32>]| perplexity(&model, windows, &|_, _| Ok(()), &|| false).is_err();
    assert!(fails(&[]));
    assert!(fails(&[vec![1, 2, 3]]));
    assert!(fails(&[vec![1; 8], vec![1; 9]]));
    assert!(fails(&[vec![101; 8]]), "an id beyond the vocabulary");
    // The model never reads the last token, which is only scored.
    assert!(fails(&[vec![1, 1, 1, 1, 1, 1, 1, 101]]), "an id beyond the vocabulary at the end");
}

#[test]
fn an_interrupted_evaluation_stops() {
    let model = load(&ODD, BlockType::F32, 1);
    let error = perplexity(&model, &cut(3 * WINDOW), &|_, _| Ok(()), &|| true).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error}");
}

#[test]
fn progress_counts_windows_up_to_the_total() {
    let model = load(&ODD, BlockType::F32, 1);
    let seen = std::sync::Mutex::new(Vec::new());
    perplexity(
        &model,
        &cut(3 * WINDOW),
        &|done, total| {
            seen.lock().unwrap().push((done, total));
            Ok(())
        },
        &|| false,
    )
    .unwrap();
    assert_eq!(*seen.lock().unwrap(), [(0, 3), (1, 3), (2, 3), (3, 3)]);
}
