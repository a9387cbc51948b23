-- How long are the synthetic instructions?
-- One row per bucket of 16 tokens: rows, share of all rows, share up to and including the bucket. Many rows in the last
-- bucket mean that --max-new-tokens cuts texts off.
WITH buckets AS (
  SELECT tokens / 16 * 16 AS from_tokens, count(*) AS instructions
  FROM synthetic
  GROUP BY 1
)
SELECT
  from_tokens,
  from_tokens + 15 AS to_tokens,
  instructions,
  round(CAST(instructions AS DOUBLE) / sum(instructions) OVER (), 4) AS share,
  round(CAST(sum(instructions) OVER (ORDER BY from_tokens) AS DOUBLE) / sum(instructions) OVER (), 4)
    AS cumulative_share
FROM buckets
ORDER BY from_tokens;
