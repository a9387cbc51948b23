-- Why did the texts end: by an end token (stop), or cut off at --max-new-tokens (length)?
-- Mean length and mean log-probability of each kind; a low log-probability beside a high share of `length` is the mark
-- of texts that ramble.
SELECT
  finish_reason,
  count(*) AS instructions,
  round(CAST(count(*) AS DOUBLE) / sum(count(*)) OVER (), 4) AS share,
  round(avg(tokens), 1) AS mean_tokens,
  round(avg(mean_logprob), 3) AS mean_logprob
FROM synthetic
GROUP BY finish_reason
ORDER BY instructions DESC, finish_reason;
