-- How much text is there to train on, before and after resampling?
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
  sum(character_length(synthetic.text)) AS characters,
  round(avg(tokens), 1) AS mean_tokens
FROM selected
JOIN synthetic ON synthetic.id = selected.id
ORDER BY set DESC;
