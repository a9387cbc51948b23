-- How much text is there to train on, before and after resampling?
-- Tokens are known of sampled texts: of a selection from another table than the run's `synthetic` they are NULL.
SELECT
  'synthetic' AS set,
  count(*) AS instructions,
  sum(tokens) AS tokens,
  sum(character_length(text)) AS characters,
  round(avg(tokens), 1) AS mean_tokens
FROM synthetic
UNION ALL
SELECT
  'selected' AS set,
  count(*) AS instructions,
  sum(tokens) AS tokens,
  sum(character_length(selected.text)) AS characters,
  round(avg(tokens), 1) AS mean_tokens
FROM selected
LEFT JOIN synthetic ON synthetic.id = selected.id
ORDER BY set DESC;
