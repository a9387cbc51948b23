//! SQL functions for embeddings and text.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray, Float64Builder, Int64Array, ListArray, ListBuilder, PrimitiveArray,
    StringArray, StringBuilder,
};
use arrow::datatypes::{DataType, Field, Float32Type, Float64Type, Int64Type};
use datafusion::common::{exec_err, plan_err, utils::take_function_args};
use datafusion::error::Result;
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::SessionContext;

/// Registers all functions of this module.
pub fn register(context: &SessionContext) {
    context.register_udf(ScalarUDF::from(CosineSimilarity::new()));
    context.register_udf(ScalarUDF::from(WordNgrams::new()));
}

/// `cosine_similarity(list, list)`: dot product over the product of norms, in float64.
///
/// NULL where a list is NULL, holds a NULL or has norm 0; an error where the lengths differ.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct CosineSimilarity {
    signature: Signature,
}

impl CosineSimilarity {
    /// The function.
    pub fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl Default for CosineSimilarity {
    fn default() -> Self {
        Self::new()
    }
}

impl ScalarUDFImpl for CosineSimilarity {
    fn name(&self) -> &str {
        "cosine_similarity"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> Result<DataType> {
        Ok(DataType::Float64)
    }

    /// Both lists get one element type: float32 if either has it, since embeddings do and a cast of them to match a
    /// literal would cost more than it adds; float64 otherwise.
    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        let [left, right] = take_function_args(self.name(), arguments)?;
        let mut element = DataType::Float64;
        for argument in [left, right] {
            match argument {
                DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _)
                    if field.data_type().is_numeric() || field.data_type().is_null() =>
                {
                    if field.data_type() == &DataType::Float32 {
                        element = DataType::Float32;
                    }
                }
                DataType::Null => {}
                other => {
                    return plan_err!("cosine_similarity expects two lists of numbers, found {other}");
                }
            }
        }
        let list = DataType::List(Arc::new(Field::new_list_field(element, true)));
        Ok(vec![list.clone(), list])
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let [left, right] = take_function_args(self.name(), arrays)?;
        let (left, right) = (left.as_list::<i32>(), right.as_list::<i32>());
        let similarity = match left.value_type() {
            DataType::Float32 => cosine_similarity::<Float32Type>(left, right)?,
            _ => cosine_similarity::<Float64Type>(left, right)?,
        };
        Ok(ColumnarValue::Array(similarity))
    }
}

fn cosine_similarity<T>(left: &ListArray, right: &ListArray) -> Result<ArrayRef>
where
    T: ArrowPrimitiveType,
    T::Native: Into<f64>,
{
    let mut similarities = Float64Builder::with_capacity(left.len());
    let (left_values, right_values) = (left.values().as_primitive::<T>(), right.values().as_primitive::<T>());
    for row in 0..left.len() {
        let vectors = vector(left, left_values, row).zip(vector(right, right_values, row));
        let similarity = match vectors {
            Some((a, b)) if a.len() != b.len() => {
                return exec_err!("cosine_similarity expects lists of equal length, found {} and {}", a.len(), b.len());
            }
            Some((a, b)) => cosine(a, b),
            None => None,
        };
        similarities.append_option(similarity);
    }
    Ok(Arc::new(similarities.finish()))
}

/// The elements of one row, or `None` where the list is NULL or holds a NULL.
fn vector<'a, T: ArrowPrimitiveType>(
    lists: &ListArray,
    values: &'a PrimitiveArray<T>,
    row: usize,
) -> Option<&'a [T::Native]> {
    let (from, to) = (lists.value_offsets()[row] as usize, lists.value_offsets()[row + 1] as usize);
    let has_null = values.nulls().is_some_and(|nulls| nulls.slice(from, to - from).null_count() > 0);
    (lists.is_valid(row) && !has_null).then(|| &values.values()[from..to])
}

fn cosine<N: Copy + Into<f64>>(a: &[N], b: &[N]) -> Option<f64> {
    let (mut dot, mut a_squared, mut b_squared) = (0.0, 0.0, 0.0);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y): (f64, f64) = (x.into(), y.into());
        dot += x * y;
        a_squared += x * x;
        b_squared += y * y;
    }
    let norms = f64::sqrt(a_squared) * f64::sqrt(b_squared);
    // Rounding may carry the quotient just past 1, which would make acos of it NaN.
    (norms > 0.0).then(|| (dot / norms).clamp(-1.0, 1.0))
}

/// `word_ngrams(text, n)`: the runs of n words of a text, lower-cased, words being what white space separates.
///
/// NULL where an argument is NULL; an empty list for fewer than n words; an error for n < 1, and where the runs of one
/// batch of rows outgrow its offsets of 32 bits.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct WordNgrams {
    signature: Signature,
}

impl WordNgrams {
    /// The function.
    pub fn new() -> Self {
        Self { signature: Signature::user_defined(Volatility::Immutable) }
    }
}

impl Default for WordNgrams {
    fn default() -> Self {
        Self::new()
    }
}

impl ScalarUDFImpl for WordNgrams {
    fn name(&self) -> &str {
        "word_ngrams"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> Result<DataType> {
        Ok(DataType::List(Arc::new(Field::new_list_field(DataType::Utf8, true))))
    }

    fn coerce_types(&self, arguments: &[DataType]) -> Result<Vec<DataType>> {
        let [text, n] = take_function_args(self.name(), arguments)?;
        if !(text.is_string() || text.is_null()) || !(n.is_integer() || n.is_null()) {
            return plan_err!("word_ngrams expects a text and a whole number, found {text} and {n}");
        }
        Ok(vec![DataType::Utf8, DataType::Int64])
    }

    fn invoke_with_args(&self, arguments: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&arguments.args)?;
        let [texts, sizes] = take_function_args(self.name(), arrays)?;
        let ngrams = word_ngrams(texts.as_string::<i32>(), sizes.as_primitive::<Int64Type>(), i32::MAX as usize)?;
        Ok(ColumnarValue::Array(Arc::new(ngrams)))
    }
}

/// The lists of a batch, whose n-grams have `most_bytes` together; none is empty, so there are no more of them than that.
fn word_ngrams(texts: &StringArray, sizes: &Int64Array, most_bytes: usize) -> Result<ListArray> {
    let mut lists = ListBuilder::new(StringBuilder::new());
    let mut bytes = 0;
    for (text, n) in texts.iter().zip(sizes) {
        let (Some(text), Some(n)) = (text, n) else {
            lists.append_null();
            continue;
        };
        let n = match usize::try_from(n) {
            Ok(n) if n > 0 => n,
            _ => return exec_err!("word_ngrams expects n to be at least 1, found {n}"),
        };
        let text = text.to_lowercase();
        let words: Vec<&str> = text.split_whitespace().collect();
        for ngram in words.windows(n) {
            let ngram = ngram.join(" ");
            bytes += ngram.len();
            if bytes > most_bytes {
                return exec_err!(
                    "word_ngrams: the n-grams of one batch of rows take more than {most_bytes} bytes\n\
                     help: leave out the longest texts, or take a smaller n"
                );
            }
            lists.values().append_value(ngram);
        }
        lists.append(true);
    }
    Ok(lists.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::util::display::array_value_to_string;

    /// Evaluates one expression to text, or to the text of its error.
    fn check(expression: &str, expected: &str) {
        let context = SessionContext::new();
        register(&context);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found = runtime.block_on(async {
            let frame = context.sql(&format!("SELECT {expression}")).await?;
            let batches = frame.collect().await?;
            Ok::<_, datafusion::error::DataFusionError>(array_value_to_string(batches[0].column(0), 0)?)
        });
        match found {
            Ok(value) => assert_eq!(value, expected, "{expression}"),
            Err(error) => assert!(error.to_string().contains(expected), "{expression}: {error}"),
        }
    }

    #[test]
    fn cosine_similarity_is_that_of_the_textbook() {
        check("cosine_similarity([1, 0], [0, 2])", "0.0");
        check("cosine_similarity([1, 2, 3], [2, 4, 6])", "1.0");
        check("cosine_similarity([1.0], [-3.5])", "-1.0");
        // 11 / (5 · √5) by hand.
        check("round(cosine_similarity([3, 4], [1, 2]), 6)", "0.98387");
        check("round(cosine_similarity(arrow_cast([3, 4], 'List(Float32)'), [1, 2]), 6)", "0.98387");
    }

    #[test]
    fn cosine_similarity_of_nothing_is_null() {
        check("cosine_similarity([0, 0], [1, 1])", "");
        check("cosine_similarity(NULL, [1, 1])", "");
        check("cosine_similarity([1, NULL], [1, 1])", "");
    }

    #[test]
    fn wrong_arguments_are_explained() {
        check("cosine_similarity([1], [1, 2])", "equal length, found 1 and 2");
        check("cosine_similarity('a', [1])", "expects two lists of numbers");
        check("word_ngrams('a b', 0)", "at least 1, found 0");
        check("word_ngrams(1, 2)", "expects a text and a whole number");
    }

    #[test]
    fn word_ngrams_are_runs_of_words() {
        check("word_ngrams('The  quick\nbrown fox', 2)", "[the quick, quick brown, brown fox]");
        check("word_ngrams('one', 2)", "[]");
        check("word_ngrams(NULL, 2)", "");
    }

    #[test]
    fn word_ngrams_that_outgrow_a_batch_are_refused() {
        let (texts, sizes) = (StringArray::from(vec!["a b c", "d e"]), Int64Array::from(vec![2, 2]));
        assert_eq!(word_ngrams(&texts, &sizes, 9).unwrap().len(), 2);
        let told = word_ngrams(&texts, &sizes, 8).unwrap_err().to_string();
        assert!(told.contains("more than 8 bytes") && told.contains("help:"), "{told}");
    }
}
