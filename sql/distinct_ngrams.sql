-- How varied is the wording, before and after resampling? distinct-n: distinct n-grams of words over all n-grams.
-- The ratio falls as a set grows, so compare sets of equal size.
-- For runs that voted on their own `synthetic`: with another table (vote --candidates), that one came before.
WITH sizes AS (
  SELECT unnest([1, 2, 3, 4]) AS n
),
texts AS (
  SELECT 'synthetic' AS name, text FROM synthetic
  UNION ALL
  SELECT 'selected' AS name, text FROM selected
),
ngrams AS (
  SELECT name, n, unnest(word_ngrams(text, n)) AS ngram
  FROM texts CROSS JOIN sizes
)
SELECT
  name AS set,
  n,
  count(*) AS ngrams,
  count(DISTINCT ngram) AS distinct_ngrams,
  round(CAST(count(DISTINCT ngram) AS DOUBLE) / count(*), 4) AS ratio
FROM ngrams
GROUP BY name, n
ORDER BY set DESC, n;
